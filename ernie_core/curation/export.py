"""The end of the pipeline: what was kept, as a folder for any trainer, as WebDataset shards, or as a table.

Pictures are copied byte for byte, so an export shows what was ingested; a file that has changed since is not taken and
named. Whatever is not exported is listed with its reason. A run that was killed is started again and copies only what
is missing; the files have the bytes of a run that was not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ErnieError, Interrupted
from ..training.captions import DEFAULT_STYLE, Caption
from ..training.dataset import captions_from_values
from ..training.items import Dataset, DatasetOptions, Findings, Item, fill_captions
from .ingest import suffix_of
from .manifest import (
    Manifest,
    Row,
    count_rows,
    open_picture,
    read_bytes,
    read_rows,
    replacing,
    split_source,
    to_line,
    write_rows,
)
from .texts import row_captions

METADATA = "metadata.jsonl"
ROWS = "rows.jsonl"
LEFT_OUT = "left_out.jsonl"
INDEX = "index.jsonl"
PICTURES = "images"
_BLOCK = 512  # of a tar


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    path: Path
    pictures: int
    without_caption: int
    left_out: dict[str, int]
    """Rows that are not in it, by reason."""
    failed: tuple[tuple[str, str], ...]
    """(source, reason) of pictures that could not be copied."""
    shards: tuple[Path, ...] = ()

    def __str__(self) -> str:
        what = f"{len(self.shards)} shards, " if self.shards else ""
        lines = [f"export: {what}{self.pictures} pictures ({self.without_caption} without caption) in {self.path}"]
        lines += [f"left out - {reason}: {count}" for reason, count in sorted(self.left_out.items())]
        return "\n".join([*lines, *(f"not copied - {source}: {reason}" for source, reason in self.failed)])


def why_left_out(row: Row) -> str:
    """Why a row is in no export, "" for one that is."""
    if row.get("problem"):
        return "no usable picture"
    if row.get("kept") is False:
        return f"dropped by {str(row.get('dropped_by') or 'a filter').partition(':')[0]}"
    return "" if row.get("id") else "not ingested"


class _Export:
    """What the ways of exporting share: rows that are taken, counts, and files that cannot be copied."""

    def __init__(
        self,
        source: Manifest | Path | str,
        styles: Sequence[str],
        on_progress: Callable[[int, int, str], None] | None,
        should_stop: Callable[[], bool] | None,
    ):
        self.source = source.path if isinstance(source, Manifest) else Path(source).expanduser()
        self.styles = tuple(styles)
        self.on_progress, self.should_stop = on_progress, should_stop
        self.total = count_rows(self.source)
        self.left_out: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.pictures = self.bare = 0

    def rows(self) -> Iterator[Row]:
        """The rows that are exported."""
        for number, row in enumerate(read_rows(self.source)):
            if self.should_stop is not None and self.should_stop():
                raise Interrupted("the export was stopped; what is copied is kept. Run again to go on.")
            if self.on_progress is not None and number % 20 == 0:
                self.on_progress(number, self.total, "export")
            reason = why_left_out(row)
            if reason:
                self.left_out[reason] += 1
            else:
                yield row

    def read(self, row: Row) -> bytes | None:
        """The bytes to write for a row's picture; None, and a word in `failed`, where it cannot be had."""
        try:
            return _picture(row)
        except ErnieError as e:
            self.failed[row["source"]] = str(e)
            return None

    def captions(self, row: Row) -> list[Caption]:
        found = row_captions(row, self.styles)
        self.pictures += 1
        self.bare += not found
        return found

    def done(self, path: Path, shards: Sequence[Path] = ()) -> Exported:
        if self.on_progress is not None:
            self.on_progress(self.total, self.total, "export")
        if not self.pictures:
            reasons = (
                ", ".join(f"{reason}: {count}" for reason, count in sorted(self.left_out.items())) or "it is empty"
            )
            raise ErnieError(f"{self.source.name} has no picture to export ({reasons}).")
        return Exported(
            path=path,
            pictures=self.pictures,
            without_caption=self.bare,
            left_out=dict(self.left_out),
            failed=tuple(self.failed.items()),
            shards=tuple(shards),
        )

    def write_left_out(self, folder: Path) -> None:
        """List every row that is not in the export, with its whole reason."""

        def lines() -> Iterator[Row]:
            for row in read_rows(self.source):
                reason = row.get("problem") or row.get("dropped_by") or why_left_out(row)
                reason = reason or self.failed.get(str(row.get("source")))
                if reason:
                    yield {"source": row.get("source"), "reason": reason}

        write_rows(folder / LEFT_OUT, lines())


def _picture(row: Row) -> bytes:
    """A row's picture file as it is, or as PNG where training does not read its format.

    Raises:
        ErnieError: it is gone, or has changed since it was ingested.
    """
    data = read_bytes(row["source"])
    if hashlib.sha256(data).hexdigest() != row["id"]:
        raise ErnieError("the file has changed since it was ingested; ingest it again")
    if suffix_of(row["format"]):
        return data
    buffer = io.BytesIO()
    open_picture(row).save(buffer, format="PNG")
    return buffer.getvalue()


def _given(row: Row) -> Row:
    """What trainers know besides captions: concept (a category counts before a folder), repeats, weight."""
    given = row.get("given") or {}
    concept = row.get("category") or given.get("concept") or ""
    found = {"concept": str(concept)} if concept else {}
    for name, kind in (("repeats", int), ("weight", float)):
        try:
            found |= {name: kind(given[name])} if name in given else {}
        except (TypeError, ValueError):
            continue  # a column of a foreign table that is only called so
    return found


# --- a folder -------------------------------------------------------------------------------------------------


def export_folder(
    source: Manifest | Path | str,
    folder: Path | str,
    *,
    styles: Sequence[str] = (),
    link: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Exported:
    """Write a folder that trainers read: `images/`, `metadata.jsonl`, `rows.jsonl` (whole rows) and `left_out.jsonl`.

    Pictures are named by their content, so one that is there already is not copied again, and two rows of the same
    bytes share a file. Those that an earlier export put there and that are no longer in it are deleted.

    Args:
        styles: caption styles to write, see `row_captions`.
        link: hard links in place of copies where the file system can; a picture edited in place then changes in both.

    Raises:
        ErnieError: no manifest, no picture in it, a full disk.
        Interrupted: `should_stop` said so; run again to go on.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    export = _Export(source, styles, on_progress, should_stop)
    earlier = {line["file_name"] for line in _earlier(folder / METADATA)}
    names: set[str] = set()
    with replacing(folder / METADATA) as table, replacing(folder / ROWS) as whole:
        for row in export.rows():
            name = _name(row)
            data = None if _is_there(folder / name, row) else export.read(row)
            if data is not None and not (link and _link(row, folder / name)):
                with replacing(folder / name, sync=False) as out:  # its hash is looked at before it counts as whole
                    out.write(data)
            elif row["source"] in export.failed:
                continue
            names.add(name)
            digest = row["id"] if suffix_of(row["format"]) else hashlib.sha256(data or b"").hexdigest()
            table.write(to_line(_metadata_line(row, name, digest, export.captions(row))))
            whole.write(to_line(row))
        found = export.done(folder)
    export.write_left_out(folder)
    for name in earlier - names:
        (folder / name).unlink(missing_ok=True)
    return found


def _metadata_line(row: Row, name: str, digest: str, captions: Sequence[Caption]) -> Row:
    """`file_name` and `text` as Hugging Face's imagefolder names them; further captions by style."""
    line: Row = {"file_name": name}
    first = next((c for c in captions if c.style == DEFAULT_STYLE), captions[0] if captions else None)
    if first is not None and first.style == DEFAULT_STYLE:
        line["text"] = first.text
    styles: dict[str, list[str]] = {}
    for style, text in captions:
        if (style, text) != (DEFAULT_STYLE, line.get("text")):
            styles.setdefault(style, []).append(text)
    if styles:
        line["captions"] = styles
    return line | _given(row) | {"width": row["width"], "height": row["height"], "sha256": digest}


def _earlier(path: Path) -> Iterator[Row]:
    """Lines of a file that an earlier export wrote here."""
    for line in read_rows(path) if path.is_file() else ():
        if isinstance(line.get("file_name"), str) and line["file_name"].startswith(f"{PICTURES}/"):
            yield line


def _name(row: Row) -> str:
    """Where a row's picture lies in an exported folder; PNG where training does not read its format."""
    return f"{PICTURES}/{row['id'][:2]}/{row['id'][:20]}{suffix_of(row['format']) or '.png'}"


def _is_there(path: Path, row: Row) -> bool:
    """Whether `path` holds the row's picture, byte for byte; one that was made a PNG is always made again."""
    if not suffix_of(row["format"]) or not path.is_file() or path.stat().st_size != row["bytes"]:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == row["id"]


def _link(row: Row, path: Path) -> bool:
    """Put a hard link to the row's file at `path`; False where that cannot be: a member of a shard, another disk."""
    file, member = split_source(row["source"])
    if member or not suffix_of(row["format"]):
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(file, path)
    except OSError:
        return False
    return True


def read_export(folder: Path | str, options: DatasetOptions | None = None) -> Dataset:
    """The dataset in a folder that `export_folder` wrote, as Dataset Folder reads it, without decoding.

    Raises:
        ErnieError: pictures without captions while `options.missing_caption` is "error".
    """
    folder, options = Path(folder), options or DatasetOptions()
    found = Findings()
    items: list[Item] = []
    for line, row in zip(read_rows(folder / METADATA), read_rows(folder / ROWS), strict=True):
        item = Item(
            image=folder / line["file_name"],
            captions=tuple(captions_from_values({k: line[k] for k in ("text", "captions") if k in line})[0]),
            width=row["width"],
            height=row["height"],
            sha256=line["sha256"],
            perceptual_hash=row["phash"],
        )
        items.append(replace(item, **_given(row)))
    items = fill_captions(items, found, options)
    return Dataset(items=tuple(items), options=options, problems=tuple(found.problems), notes=tuple(found.notes))


# --- shards ---------------------------------------------------------------------------------------------------


def export_shards(
    source: Manifest | Path | str,
    folder: Path | str,
    *,
    name: str = "pictures",
    shard_bytes: int = 1 << 30,
    styles: Sequence[str] = (),
    on_progress: Callable[[int, int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Exported:
    """Write WebDataset shards NAME-000000.tar ...: per sample KEY.jpg (or its own format), KEY.txt and KEY.json.

    KEY.txt is the first caption of `styles`; KEY.json is the whole row, from which ingest takes every column back.
    `index.jsonl` has name, samples, bytes and sha256 of each shard. A shard is as large as `shard_bytes` allows, and
    holds at least one sample; equal rows give equal bytes.

    Raises:
        ErnieError: as `export_folder`, or `shard_bytes` below 1 MB.
        Interrupted: `should_stop` said so; whole shards are kept. Run again to go on.
    """
    if shard_bytes < 1 << 20:
        raise ErnieError(f"shards must have at least {1 << 20} bytes (1 MB), got {shard_bytes}.")
    if not name or any(c in name for c in '/\\:*?"<>|#') or name.startswith("."):
        raise ErnieError(f"the name of shards must be a plain file name, got {name!r}.")
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    export = _Export(source, styles, on_progress, should_stop)
    log = folder / f".{name}.{INDEX}.parts"
    finished: dict[str, Row] = {line["rows"]: line for line in (*_lines(folder / INDEX), *_lines(log))}
    index: list[Row] = []
    for number, rows in enumerate(_group(export, shard_bytes)):
        path = folder / f"{name}-{number:06d}.tar"
        digest = hashlib.sha256(json.dumps([number, styles, rows], sort_keys=True).encode()).hexdigest()
        line = finished.get(digest)
        if line is None or line["name"] != path.name or not path.is_file() or path.stat().st_size != line["bytes"]:
            line = {**_write_shard(path, number, rows, export), "rows": digest}
            with log.open("ab") as file:
                file.write(to_line(line))
        export.failed |= line["failed"]
        export.pictures += line["samples"]
        export.bare += line["without_caption"]
        index.append(line)
    found = export.done(folder, [folder / line["name"] for line in index])
    earlier = {line["name"] for line in _lines(folder / INDEX)}
    write_rows(folder / INDEX, index)
    export.write_left_out(folder)
    for stale in earlier - {line["name"] for line in index}:
        (folder / stale).unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    return found


def _lines(path: Path) -> Iterator[Row]:
    for line in read_rows(path) if path.is_file() else ():
        if {"rows", "name", "bytes", "samples", "failed", "without_caption"} <= line.keys():
            yield line


def _group(export: _Export, shard_bytes: int) -> Iterator[list[Row]]:
    """Rows per shard, by what a sample takes in a tar; decided before any picture is read."""
    rows: list[Row] = []
    size = 2 * _BLOCK
    for row in export.rows():
        parts = (row["bytes"], len(_text(row, export.styles)), len(to_line(row)))
        needed = sum(_BLOCK + -(-part // _BLOCK) * _BLOCK for part in parts)
        if rows and size + needed > shard_bytes:
            yield rows
            rows, size = [], 2 * _BLOCK
        rows.append(row)
        size += needed
    if rows:
        yield rows


def _text(row: Row, styles: Sequence[str]) -> bytes:
    captions = row_captions(row, styles)
    return captions[0].text.encode("utf-8", "replace") if captions else b""


def _write_shard(path: Path, number: int, rows: Sequence[Row], export: _Export) -> Row:
    failed: dict[str, str] = {}  # of this shard: its line in the index says so to a later run
    samples = bare = 0
    with replacing(path) as out, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, row in enumerate(rows):
            data = export.read(row)
            if data is None:
                failed[row["source"]] = export.failed[row["source"]]
                continue
            text = _text(row, export.styles)
            samples += 1
            bare += not text
            key = f"{number:06d}_{place:06d}_{row['id'][:12]}"
            own = suffix_of(row["format"]) or ".png"
            for ending, content in ((own, data), (".txt", text), (".json", to_line(row))):
                info = tarfile.TarInfo(key + ending)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    facts = {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return {**facts, "without_caption": bare, "failed": failed}


# --- a table --------------------------------------------------------------------------------------------------


def export_table(source: Manifest | Path | str, path: Path | str, *, styles: Sequence[str] = ()) -> Exported:
    """Write the kept rows as one table, .parquet or .jsonl: all columns, and the captions of `styles` as `text`.

    Raises:
        ErnieError: no manifest, no picture in it, Parquet without pyarrow, a full disk.
    """
    path = Path(path).expanduser()
    export = _Export(source, styles, None, None)

    def rows() -> Iterator[Row]:
        for row in export.rows():
            captions = export.captions(row)
            yield row | ({"text": captions[0].text} if captions else {})

    write_rows(path, rows())
    return export.done(path)
