"""Preference pairs: a prompt, the picture that is preferred and the one that is not, from every format in use.

Both pictures of a pair are `items.Item`s, so captions, masks and caches work on them as on any other picture; the
chosen one holds the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..batch import Problem
from ..errors import ErnieError
from . import pictures
from .captions import DEFAULT_STYLE, Caption, CaptionRules
from .dataset import MASK_SUFFIX, REPEATS_FOLDER, captions_beside, captions_from_values
from .items import (
    MANIFEST_VERSION,
    DatasetOptions,
    Findings,
    Item,
    OnProgress,
    check_item,
    fill_captions,
    item_from_json,
    item_to_json,
    measure,
    options_from_json,
    read_lines,
    read_table,
    write_lines,
    write_whole,
)

_HEADER = "ernie-image pairs"
_FOLDERS = (("chosen", "rejected"), ("w", "l"))
_CHOSEN = ("chosen", "image_w", "winner", "win", "preferred", "jpg_w")
_REJECTED = ("rejected", "image_l", "loser", "lose", "jpg_l")
_GROUP = ("images", "image_path", "image_paths", "file_path")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures for one prompt, one of them preferred."""

    chosen: Item
    """Holds captions, rules, repeats, weight and concept for both."""
    rejected: Item
    margin: float = 1.0
    """How far the scores or ranks are apart; 1 where nothing is said."""

    @property
    def captions(self) -> tuple[Caption, ...]:
        return self.chosen.captions

    @property
    def rules(self) -> CaptionRules:
        return self.chosen.rules

    @property
    def repeats(self) -> int:
        return self.chosen.repeats

    @property
    def times(self) -> float:
        """Times per epoch; pairs are never drawn by a sampling plan."""
        return self.chosen.repeats

    @property
    def weight(self) -> float:
        return self.chosen.weight

    @property
    def concept(self) -> str:
        return self.chosen.concept

    @property
    def keywords(self) -> tuple[str, ...]:
        return self.chosen.keywords

    @property
    def resolutions(self) -> tuple[int, ...]:
        return self.chosen.resolutions


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs that can be trained on, and what was found while reading them."""

    pairs: tuple[Pair, ...]
    options: DatasetOptions = field(default_factory=DatasetOptions)
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def report(self) -> str:
        """Lines for people: counts, then every problem and note."""
        prompts = len({pair.captions for pair in self.pairs})
        lines = [f"{len(self.pairs)} pairs for {prompts} prompts"]
        lines += [f"problem - {p}" for p in self.problems]
        lines += [f"note - {p}" for p in self.notes]
        return "\n".join(lines)


def read_pairs(
    path: Path | str,
    options: DatasetOptions | None = None,
    *,
    min_margin: float = 0.0,
    max_pairs_per_prompt: int | None = None,
    image_folder: Path | str | None = None,
    on_progress: OnProgress | None = None,
) -> Pairs:
    """The preference pairs at `path`, every picture decoded once.

    Formats: a folder with `chosen/` and `rejected/`, or `w/` and `l/` (also inside `N_name/`), equal stems, prompts
    beside the chosen picture (else beside the rejected one, or in the folder above); .jsonl, .json or .csv rows with
    prompt, chosen, rejected and optionally margin or scores (chosen's, rejected's) and mask; rows with prompt, images
    and ranks (1 = best) or scores (more = better), expanded to pairs; .parquet with pickapic_v2's columns; a manifest.

    Args:
        path: of the folder or file.
        options: how to read; None = the defaults.
        min_margin: least difference of ranks or scores for a pair.
        max_pairs_per_prompt: the pairs with the largest margins are kept; None = all.
        image_folder: where pictures inside a parquet file are written; None = NAME_images beside it.
        on_progress: called with (pictures done, pictures, what); may raise to stop.

    Raises:
        ErnieError: nothing there, no pairs, an unknown format, or prompts missing while missing_caption is "error".
    """
    path = Path(path).expanduser()
    options = options or DatasetOptions()
    found = Findings()
    if not path.exists():
        raise ErnieError(f"there is no file or folder {path}.")
    if path.is_dir() and (path / "manifest.jsonl").is_file():
        path = path / "manifest.jsonl"
    if path.is_dir():
        drafts = list(_iter_folder(path, found, options))
        for table in ("pairs.jsonl", "metadata.jsonl"):
            if not drafts and (path / table).is_file():
                path = path / table
    else:
        drafts = []
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            folder = Path(image_folder) if image_folder else path.with_name(f"{path.stem}_images")
            drafts = list(_iter_parquet(path, folder, found))
        elif path.suffix.lower() in (".jsonl", ".json", ".csv"):
            first = next((row for _, row in read_table(path)), None)
            if isinstance(first, dict) and first.get("format") == _HEADER:
                return read_pairs_manifest(path, on_progress=on_progress)
            drafts = list(_iter_rows(path, found))
        else:
            raise ErnieError(f"{path.name} is no file of pairs: expected .jsonl, .json, .csv or .parquet, or a folder.")
    drafts = _limit(drafts, found, min_margin, max_pairs_per_prompt)
    return _finish(path, drafts, found, options, on_progress)


def check_pairs(
    drafts: Sequence[Pair],
    source: Path | str,
    options: DatasetOptions | None = None,
    *,
    min_margin: float = 0.0,
    max_pairs_per_prompt: int | None = None,
    on_progress: OnProgress | None = None,
) -> Pairs:
    """Pairs that were put together elsewhere, their pictures decoded and measured as `read_pairs` does it.

    `source` is what messages name; the rest is as in `read_pairs`. Raises ErnieError when no pair is usable.
    """
    found = Findings()
    kept = _limit(list(drafts), found, min_margin, max_pairs_per_prompt)
    return _finish(Path(source), kept, found, options or DatasetOptions(), on_progress)


def _iter_folder(path: Path, found: Findings, options: DatasetOptions) -> Iterator[Pair]:
    roots: list[tuple[Path, Item]] = [(path, Item(image=path))]
    for sub in sorted(path.iterdir(), key=lambda p: p.name):
        match = REPEATS_FOLDER.fullmatch(sub.name)
        if sub.is_dir() and match and int(match[1]) > 0:
            roots.append((sub, Item(image=sub, repeats=int(match[1]), concept=match[2])))
    seen = False
    for root, like in roots:
        names = {p.name.lower(): p for p in root.iterdir() if p.is_dir()}
        for win, lose in _FOLDERS:
            if win in names and lose in names:
                seen = True
                yield from _iter_two_folders(root, names[win], names[lose], like, found, options)
    if not seen and not any((path / t).is_file() for t in ("pairs.jsonl", "metadata.jsonl")):
        raise ErnieError(f"{path} holds no pairs: expected the folders chosen and rejected, or w and l.")


def _iter_two_folders(
    root: Path, win: Path, lose: Path, like: Item, found: Findings, options: DatasetOptions
) -> Iterator[Pair]:
    sides: list[dict[str, Path]] = []
    for folder in (win, lose):
        images: dict[str, Path] = {}
        for file in sorted(folder.rglob("*"), key=str):
            if file.suffix.lower() not in pictures.SUFFIXES or file.stem.endswith(MASK_SUFFIX):
                continue
            key = file.relative_to(folder).with_suffix("").as_posix()
            if key in images:
                found.problem(file, f"left out: {images[key].name} has the same stem")
            else:
                images[key] = file
        sides.append(images)
    chosen, rejected = sides
    for images, others, name in ((chosen, rejected, lose.name), (rejected, chosen, win.name)):
        for key in images.keys() - others.keys():
            found.problem(images[key], f"left out: there is no {key} in {name}")
    found.problems.sort(key=str)
    for key in sorted(chosen.keys() & rejected.keys()):
        captions: tuple[Caption, ...] = ()
        problem = ""
        for place in (chosen[key], rejected[key], root / f"{key}.png"):
            files = sorted(p for p in place.parent.iterdir() if p.is_file()) if place.parent.is_dir() else []
            captions, _, problem = captions_beside(place, files, {}, options.caption_extensions, options)
            if captions or problem:
                break
        if problem:
            found.problem(chosen[key], f"left out: {problem}")
            continue
        mask = chosen[key].with_name(f"{chosen[key].stem}{MASK_SUFFIX}.png")
        item = replace(like, image=chosen[key], captions=captions, mask=mask if mask.is_file() else None)
        yield Pair(chosen=item, rejected=Item(image=rejected[key], mask=item.mask))


def _iter_rows(path: Path, found: Findings) -> Iterator[Pair]:
    unknown: Counter[str] = Counter()
    num_rows = 0
    for label, row in read_table(path):
        num_rows += 1
        if isinstance(row, ErnieError):
            found.problem(label, f"left out: it {row}")
            continue
        row = {str(k).strip(): v for k, v in row.items() if v is not None}
        try:
            drafts, used = _pairs_of_row(label, row, path.parent, found)
        except (ErnieError, TypeError, ValueError) as e:
            found.problem(label, f"left out: {e}")
            continue
        unknown.update(row.keys() - used)
        yield from drafts
    for key, count in sorted(unknown.items()):
        found.problem(path, f"the column {key} ({count} of {num_rows} rows) is not known here and not used")


def _numbers(value: Any, name: str, count: int) -> list[float]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, list) or len(value) != count:
        raise ErnieError(f"{name} must be a list of {count} numbers, got {value!r}")
    return [float(v) for v in value]


def _file(base: Path, value: Any) -> Path:
    path = base / Path(str(value)).expanduser()
    if not path.is_file():
        raise ErnieError(f"there is no picture {path}")
    return path


def _pairs_of_row(label: str, row: dict[str, Any], base: Path, found: Findings) -> tuple[list[Pair], set[str]]:
    """(pairs of one row, its keys that were used)."""
    win, lose = (next((k for k in names if k in row), None) for names in (_CHOSEN, _REJECTED))
    group = next((k for k in _GROUP if isinstance(row.get(k), list)), None)
    used = {k for k in (win, lose, group) if k} | {"mask", "scores", "ranks", "rank", "margin", "repeats", "weight"}
    used |= {"concept", "keywords", "info"}  # info: seeds and settings of both pictures, for people
    captions, its_keys = captions_from_values({k: v for k, v in row.items() if k not in used})
    used |= its_keys
    mask = _file(base, row["mask"]) if row.get("mask") else None
    like = Item(
        image=base,
        captions=tuple(captions),
        mask=mask,
        repeats=int(row.get("repeats", 1)),
        weight=float(row.get("weight", 1)),
        concept=str(row.get("concept", "")),
        keywords=tuple(row.get("keywords", ())),
    )
    if win and lose:
        margin = float(row.get("margin", 1.0))
        if row.get("scores") is not None:
            better, worse = _numbers(row["scores"], "scores", 2)
            if better == worse:
                found.note(label, "left out: a tie")
                return [], used
            if better < worse:
                raise ErnieError(f"its rejected picture has the higher score ({better:g} and {worse:g})")
            margin = float(row.get("margin", better - worse))
        if margin <= 0:
            raise ErnieError(f"its margin must be above 0, got {margin:g}")
        chosen, rejected = _file(base, row[win]), _file(base, row[lose])
        return [Pair(chosen=replace(like, image=chosen), rejected=Item(image=rejected, mask=mask), margin=margin)], used
    if group:
        return _expand_group(label, row, [_file(base, v) for v in row[group]], like, found), used
    raise ErnieError(
        f"it is no pair: expected chosen and rejected, or images with ranks or scores, "
        f"got {', '.join(row) or 'nothing'}"
    )


def _expand_group(label: str, row: Mapping[str, Any], files: list[Path], like: Item, found: Findings) -> list[Pair]:
    ranks = row.get("ranks", row.get("rank"))
    if (ranks is None) == (row.get("scores") is None):
        raise ErnieError("a group of images needs either ranks (1 = best) or scores (more = better)")
    name = "scores" if ranks is None else "ranks"
    values = _numbers(row["scores"] if ranks is None else ranks, name, len(files))
    worth = values if ranks is None else [-v for v in values]
    drafts: list[Pair] = []
    ties = 0
    for i in range(len(files)):
        for j in range(i + 1, len(files)):
            if worth[i] == worth[j]:
                ties += 1
                continue
            best, worst = (i, j) if worth[i] > worth[j] else (j, i)
            rejected = Item(image=files[worst], mask=like.mask)
            margin = worth[best] - worth[worst]
            drafts.append(Pair(chosen=replace(like, image=files[best]), rejected=rejected, margin=margin))
    if ties:
        found.note(label, f"{ties} ties are left out")
    return drafts


def _iter_parquet(path: Path, folder: Path, found: Findings) -> Iterator[Pair]:
    """pickapic_v2: jpg_0, jpg_1 (bytes), label_0 (1, 0, or 0.5 for a tie), caption."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise ErnieError(f"{path.name} is a parquet file, which needs the package pyarrow: install it.") from e
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as e:  # pyarrow's ArrowInvalid is a ValueError
        raise ErnieError(f"{path} is not a readable parquet file ({e}).") from e
    columns = ["jpg_0", "jpg_1", "label_0", "caption"]
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise ErnieError(f"{path.name} lacks the columns {', '.join(missing)} of pickapic_v2.")
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=columns):
        for row in batch.to_pylist():
            number += 1
            label = f"{path.name} row {number}"
            if row["label_0"] == 0.5:
                found.note(label, "left out: a tie")
                continue
            if row["label_0"] not in (0, 1) or not row["jpg_0"] or not row["jpg_1"]:
                found.problem(label, f"left out: label_0 is {row['label_0']!r}, or a picture is missing")
                continue
            files = []
            for data in (row["jpg_0"], row["jpg_1"]):
                image = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.jpg"
                if not image.is_file():
                    write_whole(image, data)
                files.append(image)
            best, worst = files if row["label_0"] == 1 else reversed(files)
            text = (row["caption"] or "").strip()
            captions = (Caption(DEFAULT_STYLE, text),) if text else ()
            yield Pair(chosen=Item(image=best, captions=captions), rejected=Item(image=worst))


def _limit(drafts: list[Pair], found: Findings, min_margin: float, most: int | None) -> list[Pair]:
    """The pairs with at least `min_margin`, and of each prompt the `most` with the largest margins."""
    if most is not None and most < 1:
        raise ErnieError(f"max_pairs_per_prompt must be at least 1, got {most}.")
    kept = [pair for pair in drafts if pair.margin >= min_margin]
    if len(kept) < len(drafts):
        found.note("margins", f"{len(drafts) - len(kept)} pairs below the least margin {min_margin:g} are left out")
    if most is None:
        return kept
    ranked = sorted(range(len(kept)), key=lambda i: (-kept[i].margin, i))
    taken: Counter[tuple[Caption, ...]] = Counter()
    chosen: list[int] = []
    for i in ranked:
        # pairs without a prompt cannot be told to share one: each counts alone
        if not kept[i].captions or taken[kept[i].captions] < most:
            taken[kept[i].captions] += 1
            chosen.append(i)
    if len(chosen) < len(kept):
        found.note("prompts", f"{len(kept) - len(chosen)} pairs beyond {most} per prompt are left out")
    return [kept[i] for i in sorted(chosen)]


def _finish(
    path: Path, drafts: list[Pair], found: Findings, options: DatasetOptions, on_progress: OnProgress | None
) -> Pairs:
    distinct = {(item.image, item.mask): item for pair in drafts for item in (pair.rejected, pair.chosen)}
    measured: dict[tuple[Path, Path | None], Item] = {}
    for number, (key, item) in enumerate(distinct.items()):
        if on_progress is not None:
            on_progress(number, len(distinct), "reading pictures")
        for one in measure([item], found, options, None):
            measured[key] = one
    facts = ("width", "height", "sha256", "perceptual_hash", "mask", "mask_sha256", "mask_floor")
    pairs: list[Pair] = []
    for pair in drafts:
        sides = [measured.get((item.image, item.mask)) for item in (pair.chosen, pair.rejected)]
        if sides[0] is None or sides[1] is None:
            bad = pair.chosen if sides[0] is None else pair.rejected
            found.problem(pair.chosen.image, f"left out: its pair needs {bad.image.name}, which cannot be used")
            continue
        chosen, rejected = (
            replace(item, **{name: getattr(side, name) for name in facts})
            for item, side in zip((pair.chosen, pair.rejected), sides, strict=True)
        )
        if chosen.sha256 == rejected.sha256:
            found.problem(chosen.image, f"left out: it is the same file as {rejected.image.name}, nothing is preferred")
            continue
        ratio = (chosen.width * rejected.height) / (chosen.height * rejected.width)
        if abs(ratio - 1) > 0.02:
            found.problem(
                chosen.image,
                f"has another aspect than {rejected.image.name} ({chosen.width} x {chosen.height}, {rejected.width} x "
                f"{rejected.height}): both are cropped to one size",
            )
        pairs.append(replace(pair, chosen=chosen, rejected=rejected))
    if not pairs:
        reasons = "; ".join(str(p) for p in (*found.problems, *found.notes)[:5]) or "nothing was found"
        raise ErnieError(f"{path} holds no usable pair ({reasons}).")
    filled = fill_captions([pair.chosen for pair in pairs], found, options)
    pairs = [replace(pair, chosen=chosen) for pair, chosen in zip(pairs, filled, strict=True)]
    return Pairs(pairs=tuple(pairs), options=options, problems=tuple(found.problems), notes=tuple(found.notes))


def write_pairs_manifest(pairs: Pairs, path: Path | str) -> None:
    """Write `pairs` as JSONL: a header, then one line {chosen, rejected, margin} per pair; see `write_manifest`."""
    path = Path(path)
    header = {
        "format": _HEADER,
        "version": MANIFEST_VERSION,
        "options": asdict(pairs.options),
        "problems": [[p.label, p.reason] for p in pairs.problems],
        "notes": [[p.label, p.reason] for p in pairs.notes],
    }
    lines: list[dict[str, Any]] = [header]
    for pair in pairs.pairs:
        chosen, rejected = item_to_json(pair.chosen, path.parent), item_to_json(pair.rejected, path.parent)
        lines.append({"chosen": chosen, "rejected": rejected, "margin": pair.margin})
    write_lines(path, lines)


def read_pairs_manifest(path: Path | str, *, check: bool = True, on_progress: OnProgress | None = None) -> Pairs:
    """The pairs that `write_pairs_manifest` wrote; `check` as in `items.read_manifest`."""
    path = Path(path)
    header, lines = read_lines(path, _HEADER)
    found = Findings()
    options = options_from_json(header.get("options", {}))
    found.problems = [Problem(label=a, reason=b) for a, b in header.get("problems", [])]
    found.notes = [Problem(label=a, reason=b) for a, b in header.get("notes", [])]
    pairs: list[Pair] = []
    for number, line in enumerate(lines):
        if on_progress is not None:
            on_progress(number, len(lines), "checking pictures")
        sides = [[item_from_json(line[name], path.parent)] for name in ("chosen", "rejected")]
        if check:
            sides = [check_item(side[0], found, options) for side in sides]
        if all(sides):
            pairs.append(Pair(chosen=sides[0][0], rejected=sides[1][0], margin=float(line.get("margin", 1))))
    if not pairs:
        raise ErnieError(f"no pair of {path} has both its pictures any more.")
    return Pairs(pairs=tuple(pairs), options=options, problems=tuple(found.problems), notes=tuple(found.notes))
