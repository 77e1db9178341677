"""What a manifest holds, for people: counts per stage, failures by row, what filters took out, and pictures to look at.

Read in one pass, a few numbers per row: a manifest of any length is looked over in constant memory, apart from the
list of rows with problems, which goes to a file.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import ErnieError
from ..scoring.charts import Cell, contact_sheet, stack_pictures
from .manifest import Manifest, Row, count_rows, load_picture, read_rows, replacing, write_rows

SHOWN = 24  # pictures on a contact sheet
LISTED = 20  # rows with problems in the text; the file has them all
_CELL_PX = 160
_BEFORE = ("width", "height", "bytes", "orientation", "modified")  # numbers that are no measure of a picture's worth


@dataclass
class _StageCounts:
    made: int = 0
    failed: int = 0
    passed_by: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What `look_over` found."""

    path: Path
    rows: int
    usable: int
    """Pictures that are whole and that no filter dropped."""
    broken: int
    dropped: dict[str, int]
    """By the filter's name."""
    text: str
    """All of it, in lines."""
    kept_sheet: np.ndarray
    """Contact sheet of usable pictures, uint8 [H, W, 3]."""
    dropped_sheet: np.ndarray | None
    """Of pictures that filters took out, with the filter's name; None where there are none."""

    def sheet(self) -> np.ndarray:
        """Both contact sheets below each other."""
        sheets = [self.kept_sheet, *([] if self.dropped_sheet is None else [self.dropped_sheet])]
        return stack_pictures(sheets)


def problems(rows: Iterator[Row] | Manifest) -> Iterator[Row]:
    """{source, stage, reason} of every row with which something went wrong, in order."""
    for row in rows.rows() if isinstance(rows, Manifest) else rows:
        source = row.get("source", "")
        if row.get("problem"):
            yield {"source": source, "stage": "ingest", "reason": str(row["problem"])}
        if caption := (row.get("given") or {}).get("caption_problem"):
            yield {"source": source, "stage": "ingest", "reason": f"its caption was not read: {caption}"}
        for stage, reason in (row.get("failed") or {}).items():
            yield {"source": source, "stage": stage, "reason": str(reason)}


class _Sample:
    """The rows of the smallest hashes: the same few of many, in whatever order and however often they are read."""

    def __init__(self, size: int):
        self.size = size
        self.heap: list[tuple[int, int, Row]] = []

    def offer(self, place: int, row: Row) -> None:
        rank = int.from_bytes(hashlib.sha256(str(row.get("id")).encode()).digest()[:8], "big")
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, (-rank, -place, row))
        elif (-rank, -place) > self.heap[0][:2]:
            heapq.heapreplace(self.heap, (-rank, -place, row))

    def rows(self) -> list[tuple[int, Row]]:
        """(place, row), in the order of the manifest."""
        return sorted(((-place, row) for _, place, row in self.heap), key=lambda entry: entry[0])


def look_over(
    source: Manifest | Path | str,
    *,
    shown: int = SHOWN,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Overview:
    """Counts, problems and contact sheets of a manifest.

    Args:
        shown: pictures on each contact sheet, chosen by their hash: the same ones every time.
        on_progress: called with (rows done, rows, what); may raise to stop.

    Raises:
        ErnieError: no manifest there, or an empty one.
    """
    path = source.path if isinstance(source, Manifest) else Path(source).expanduser()
    total = count_rows(path)
    stages: dict[str, _StageCounts] = {}
    dropped: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    numbers: dict[str, list[float]] = {}  # column -> count, sum, least, most
    counts = Counter[str]()
    kept, out = _Sample(shown), _Sample(shown)
    listed: list[Row] = []

    def watched() -> Iterator[Row]:
        for place, row in enumerate(read_rows(path)):
            if on_progress is not None and place % 200 == 0:
                on_progress(place, total, "report")
            counts["rows"] += 1
            _count_stages(row, stages)
            if row.get("problem"):
                counts["broken"] += 1
                reasons[re.sub(r"\d+", "N", str(row["problem"]).rpartition("/")[2])[:100]] += 1
            elif row.get("kept") is False:
                dropped[str(row.get("dropped_by") or "a filter").partition(":")[0]] += 1
                out.offer(place, row)
            elif row.get("id"):
                counts["usable"] += 1
                counts["captioned"] += bool(row.get("caption") or row.get("captions"))
                formats[str(row.get("format"))] += 1
                categories[str(row.get("category") or "")] += 1
                sizes[row["width"], row["height"]] += 1
                _add_numbers(row, numbers)
                kept.offer(place, row)
            yield row

    for line in problems(watched()):
        counts["problems"] += 1
        if len(listed) < LISTED:
            listed.append(line)
    if not counts["rows"]:
        raise ErnieError(f"{path} is empty: there is nothing to report.")
    lines = [
        f"{path.name}: {counts['rows']} rows; {counts['usable']} usable, {counts['broken']} no usable pictures, "
        f"{sum(dropped.values())} dropped by filters",
    ]
    for stage, its in stages.items():
        passed = sum(its.passed_by.values())
        why = f" ({', '.join(f'{reason}: {n}' for reason, n in its.passed_by.most_common(5))})" if passed else ""
        lines.append(f"stage {stage}: {its.made} made, {its.failed} failed, {passed} passed by{why}")
    lines += [f"dropped by {name}: {count}" for name, count in sorted(dropped.items())]
    if counts["usable"]:
        lines += _describe(sizes, formats, counts["captioned"])
    lines += _describe_categories(categories)
    for column, (count, total_of, low, high) in numbers.items():
        lines.append(f"{column}: {count:.0f} rows, mean {total_of / count:.4g}, {low:.4g} to {high:.4g}")
    lines += [f"no usable picture - {reason}: {count}" for reason, count in reasons.most_common(15)]
    if found := counts["problems"]:
        lines.append(f"{found} problems" + (f", the first {LISTED}" if found > LISTED else "") + ":")
        lines += [f"  {line['source']} [{line['stage']}] {line['reason']}" for line in listed]
    if on_progress is not None:
        on_progress(total, total, "report")
    return Overview(
        path=path,
        rows=counts["rows"],
        usable=counts["usable"],
        broken=counts["broken"],
        dropped=dict(dropped),
        text="\n".join(lines),
        kept_sheet=contact_sheet(_cells(kept, ""), title=f"kept: {len(kept.heap)} of {counts['usable']}"),
        dropped_sheet=contact_sheet(
            _cells(out, "dropped_by"), title=f"dropped: {len(out.heap)} of {sum(dropped.values())}"
        )
        if out.heap
        else None,
    )


def _count_stages(row: Row, stages: dict[str, _StageCounts]) -> None:
    for stage in row.get("made_by") or {}:
        stages.setdefault(stage, _StageCounts()).made += 1
    for stage in row.get("failed") or {}:
        stages.setdefault(stage, _StageCounts()).failed += 1
    for stage, reason in (row.get("passed_by") or {}).items():
        stages.setdefault(stage, _StageCounts()).passed_by[str(reason).partition(":")[0]] += 1


def _add_numbers(row: Row, numbers: dict[str, list[float]]) -> None:
    for column, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and column not in _BEFORE:
            known = numbers.setdefault(column, [0.0, 0.0, float("inf"), float("-inf")])
            known[0] += 1
            known[1] += value
            known[2], known[3] = min(known[2], value), max(known[3], value)


def _describe(sizes: Counter[tuple[int, int]], formats: Counter[str], captioned: int) -> list[str]:
    """Lines about the pictures that are usable."""
    array = np.repeat(np.array(list(sizes)), list(sizes.values()), axis=0)
    short, long = array.min(axis=1), array.max(axis=1)
    below = ", ".join(f"{int((short < px).sum())} below {px}" for px in (256, 512, 1024))
    return [
        f"shorter side: {int(short.min())} to {int(short.max())} px, median {np.median(short):.0f}; {below}",
        f"aspect: up to {float((long / short).max()):.2f}; {int((long > 3 * short).sum())} above 3",
        f"formats: {', '.join(f'{name} {count}' for name, count in formats.most_common())}",
        f"captions: {captioned} of {sizes.total()}",
    ]


def _describe_categories(categories: Counter[str]) -> list[str]:
    found = [(name, count) for name, count in categories.most_common() if name]
    if not found:
        return []
    most = ", ".join(f"{name} {count}" for name, count in found[:8])
    return [f"categories: {len(found)}; most {most}; least {found[-1][0]} {found[-1][1]}"]


def _cells(sample: _Sample, column: str) -> Iterator[Cell]:
    for place, row in sample.rows():
        try:
            picture = load_picture(row).rgb_HWC
        except ErnieError:  # gone since it was ingested: a grey place says so
            picture = np.full((_CELL_PX, _CELL_PX, 3), 128, np.uint8)
        label = str(row.get(column) or "").partition(":")[0] if column else str(row.get("category") or "")
        yield Cell(picture=picture, text=str(place + 1), label=label)


def write_report(found: Overview, folder: Path | str) -> None:
    """Write report.md, problems.jsonl (every one), kept.png and dropped.png.

    Raises:
        ErnieError: the folder cannot be written to.
    """
    folder = Path(folder).expanduser()
    with replacing(folder / "report.md") as file:
        file.write(("\n".join(f"- {line}" for line in found.text.splitlines()) + "\n").encode("utf-8", "replace"))
    write_rows(folder / "problems.jsonl", problems(read_rows(found.path)))
    for name, sheet in (("kept", found.kept_sheet), ("dropped", found.dropped_sheet)):
        if sheet is not None:
            with replacing(folder / f"{name}.png") as file:
                Image.fromarray(sheet).save(file, format="PNG")
