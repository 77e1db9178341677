"""Every file of a pile of pictures, one row each, before any picture is decoded.

Folders (kohya's N_name, metadata tables and caption files included), tar shards, tables, manifests, and the dataset
files of other trainers. Nothing is passed over: a file that is neither picture nor caption nor table, a table row
without a picture, a link to nothing gets a row too, with the reason in `given.problem`. Hidden files are not read.

    source      see `manifest`
    modified    nanoseconds; a file with another time is read again
    caption     what stands beside the picture or in its table row; "" = nothing
    given       whatever else its source says of it: concept, repeats, other captions, columns of a table
"""

from __future__ import annotations

import json
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ErnieError
from ..training.captions import DEFAULT_STYLE, Caption
from ..training.dataset import IMAGE_KEYS, REPEATS_FOLDER, captions_from_values, find_items
from ..training.items import MANIFEST_HEADER, item_to_json, read_table
from ..training.pictures import SUFFIXES
from .manifest import PARQUET, Row, read_bytes, read_rows, read_shard

TEXTS = (".txt", ".caption", ".json")  # beside a picture of the same stem
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.json", "captions.json")  # in a folder; the first counts
_TRAINERS = (".toml", ".yaml", ".yml")
_OURS = ("source", "modified", "problem", "given")  # never restored from a row that lies beside a picture


def list_sources(paths: Sequence[Path | str]) -> Iterator[Row]:
    """One row for every file under `paths`, in an order that is the same everywhere.

    Args:
        paths: folders, .tar shards, tables (.jsonl, .csv, .json, .parquet), dataset files of other trainers (.toml,
            .yaml, an ai-toolkit .json), or single pictures.

    Raises:
        ErnieError: a path is not there, or is of a kind that cannot be read.
    """
    paths = [Path(os.path.abspath(Path(path).expanduser())) for path in paths]
    if not paths:
        raise ErnieError("expected at least one folder, shard or table, got none.")
    for path in paths:
        if not path.exists():
            raise ErnieError(f"there is no file or folder {path}.")
    for path in paths:
        suffix = path.suffix.lower()
        if path.is_dir():
            yield from _Folder(path).rows()
        elif suffix == ".tar":
            yield from _list_shard(path)
        elif suffix in _TRAINERS or (suffix == ".json" and _is_job(path)):
            yield from _list_trainer_file(path)
        elif suffix in (".jsonl", ".csv", ".json", PARQUET):
            yield from _list_table(path)
        else:
            yield _row(str(path), path.stat().st_mtime_ns)


def _row(source: str, modified: int, captions: Iterable[Caption] = (), given: Mapping[str, Any] | None = None) -> Row:
    captions, given = list(captions), dict(given or {})
    first = next((c.text for c in captions if c.style == DEFAULT_STYLE), captions[0].text if captions else "")
    if len(captions) > 1 or any(c.style != DEFAULT_STYLE for c in captions):
        styles: dict[str, list[str]] = {}
        for style, text in captions:
            styles.setdefault(style, []).append(text)
        given["captions"] = styles
    row = {"source": source, "modified": modified, "caption": first}
    return row | ({"given": given} if given else {})


def _refused(source: str, reason: str, modified: int = 0) -> Row:
    return _row(source, modified, given={"problem": reason})


# --- captions beside pictures ---------------------------------------------------------------------------------


def _match_texts(names: Iterable[str]) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """(picture -> its (style, text file)s, files that are no texts or have no picture), names in one folder.

    "a.txt", "a.png.txt" and "a.json" belong to "a.png" as they are; "a.short.txt" in the style "short". Linear.
    """
    texts, others = [], []
    for name in names:
        (texts if name.lower().endswith(TEXTS) else others).append(name)
    by_stem: defaultdict[str, list[str]] = defaultdict(list)
    for name in others:
        by_stem[PurePosixPath(name).stem].append(name)
        by_stem[name].append(name)
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in others}
    left = []
    for text in texts:
        stem = PurePosixPath(text).stem
        style = DEFAULT_STYLE
        if stem not in by_stem:
            stem, _, style = stem.rpartition(".")
        owners = by_stem.get(stem) if stem else None
        for owner in owners or ():
            found[owner].append((style.lower(), text))
        if not owners:
            left.append(text)
    return found, left


def _read_texts(texts: Iterable[tuple[str, str]], read: Callable[[str], bytes]) -> tuple[list[Caption], Row, Row]:
    """(captions, what else a .json says, columns of a manifest row that a .json holds)."""
    captions: list[Caption] = []
    given: Row = {}
    columns: Row = {}
    for style, name in texts:
        try:
            text = _decode(read(name))
            if not name.lower().endswith(".json"):
                captions += [Caption(style, text.strip())] if text.strip() else []
                continue
            values = json.loads(text)
            if isinstance(values, str):
                values = {"caption": values}
            if not isinstance(values, dict):
                raise ErnieError(f"holds {type(values).__name__}, not an object")
            values: Row
            if isinstance(values.get("made_by"), dict):  # written by our own export: nothing of it is made again
                columns = _looked_at_anew({k: v for k, v in values.items() if k not in _OURS})
                given |= dict(values.get("given") or {})
                continue
            more, used = captions_from_values(values)
            captions += more
            given |= {k: v for k, v in values.items() if k not in used}
        except (ErnieError, ValueError) as e:
            given["caption_problem"] = f"{name}: {e}"
    return list(dict.fromkeys(captions)), given, columns


def _decode(data: bytes) -> str:
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").replace("\r\n", "\n")


# --- folders --------------------------------------------------------------------------------------------------


class _Folder:
    """One folder that was asked for, and what lies below it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entered: set[tuple[int, int]] = set()  # (device, inode) of folders, against links in a circle
        self.table: dict[str, list[tuple[str, Row]]] = {}
        """Picture -> its rows in the metadata tables that were met, with their labels."""

    def rows(self) -> Iterator[Row]:
        yield from self._walk(self.folder)
        for source, rows in self.table.items():
            for label, _ in rows:
                yield _refused(source, f"there is no such picture ({label})")

    def _walk(self, folder: Path) -> Iterator[Row]:
        try:
            place = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as e:
            yield _refused(str(folder), f"the folder cannot be read ({e.strerror or e})")
            return
        if (place.st_dev, place.st_ino) in self.entered:
            yield _refused(str(folder), "it is a link to a folder that is read already")
            return
        self.entered.add((place.st_dev, place.st_ino))
        files, folders = {}, []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                facts = entry.stat()
            except OSError:
                yield _refused(entry.path, "it is a link to nothing")
                continue
            if stat.S_ISDIR(facts.st_mode):
                folders.append(entry)
            elif stat.S_ISREG(facts.st_mode):
                files[entry.name] = facts
            else:
                yield _refused(entry.path, "it is no regular file")
        yield from self._read_table(folder, files)
        yield from self._files(folder, files)
        for entry in folders:
            if entry.name.lower().endswith(SUFFIXES):
                yield _refused(entry.path, "it is a folder, though named like a picture; what lies in it is read")
            yield from self._walk(Path(entry.path))

    def _read_table(self, folder: Path, files: dict[str, os.stat_result]) -> Iterator[Row]:
        tables = [name for name in TABLES if name in files]
        for name in tables[1:]:
            yield _refused(str(folder / name), f"not read: {tables[0]} says what its pictures are")
        for label, row in read_table(folder / tables[0]) if tables else ():
            if isinstance(row, ErnieError):
                yield _refused(str(folder / tables[0]), f"{label} {row}")
                continue
            image, values = _split(row)
            if image is None:
                yield _refused(str(folder / tables[0]), f"{label} names no picture")
            else:
                path = os.path.normpath(folder / image)
                self.table.setdefault(path, []).append((label, values))
        for name in tables:
            del files[name]

    def _files(self, folder: Path, files: dict[str, os.stat_result]) -> Iterator[Row]:
        matched, left = _match_texts(files)
        concept = self._concept(folder)
        for name in sorted([*matched, *left]):
            source, modified = str(folder / name), files[name].st_mtime_ns
            if name not in matched:
                yield _refused(source, "it is a caption without a picture", modified)
            elif name.lower().endswith(".tar"):
                yield from _list_shard(Path(source))
            else:
                captions, given, columns = _read_texts(matched[name], lambda text: (folder / text).read_bytes())
                for _, values in self.table.pop(source, [("", {})]):
                    said, used = captions_from_values(values)
                    more = {k: v for k, v in values.items() if k not in used}
                    yield _row(source, modified, [*said, *captions], {**concept, **given, **more}) | columns

    def _concept(self, folder: Path) -> Row:
        """What the names of the folders say of the pictures in them."""
        if folder == self.folder:
            return {}
        match = REPEATS_FOLDER.fullmatch(folder.name)
        if match and int(match[1]) > 0:
            return {"concept": match[2], "repeats": int(match[1])}
        return {"concept": folder.relative_to(self.folder).parts[0]}


# --- shards, tables, dataset files ------------------------------------------------------------------------------


def _list_shard(path: Path) -> Iterator[Row]:
    try:
        modified = path.stat().st_mtime_ns
        shard = read_shard(path)
    except (ErnieError, OSError) as e:
        yield _refused(str(path), str(e))
        return
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for member in shard.members:
        name = PurePosixPath(member)
        if not name.name.startswith("."):
            by_folder[member[: -len(name.name)]].append(name.name)
    for folder, names in by_folder.items():
        matched, left = _match_texts(names)
        for name in names:
            source = f"{path}#{folder}{name}"
            if name in matched:
                prefix = f"{path}#{folder}"
                captions, given, columns = _read_texts(
                    matched[name], lambda text, prefix=prefix: read_bytes(prefix + text)
                )
                yield _row(source, modified, captions, given) | columns
            elif name in left:
                yield _refused(source, "it is a caption without a picture", modified)
    if shard.damage:
        yield _refused(str(path), f"the shard is damaged: {shard.damage}; what stands before it is read", modified)


def _split(row: Mapping[str, Any]) -> tuple[str | None, Row]:
    """(the picture that a table's row names, its other columns)."""
    keys = [key for key in row if str(key).strip().lower() in IMAGE_KEYS]
    if not keys or not isinstance(row[keys[0]], str):
        return None, dict(row)
    return row[keys[0]], {str(k).strip(): v for k, v in row.items() if k != keys[0] and v is not None}


def _list_table(path: Path) -> Iterator[Row]:
    """Rows of a table of pictures, or of a manifest, whose columns are kept as they are."""
    rows: Iterable[tuple[str, Any]]
    if path.suffix.lower() == PARQUET:
        rows = ((f"{path.name} row {n}", row) for n, row in enumerate(read_rows(path), start=1))
    else:
        rows = read_table(path)
    for label, row in rows:
        if isinstance(row, ErnieError):
            yield _refused(str(path), f"{label} {row}")
        elif row.get("format") == MANIFEST_HEADER:
            continue
        elif isinstance(row.get("source"), str) and "made_by" in row:  # a manifest of ours: it is looked at anew
            source = os.path.normpath(path.parent / row["source"]) if row["source"] else ""
            modified = _modified(source)
            same = modified == row.get("modified")
            yield {**(row if same else _looked_at_anew(row)), "source": source, "modified": modified}
        else:
            image, values = _split(row)
            if image is None:
                held = [k for k, v in row.items() if isinstance(v, Mapping) and "bytes" in v]
                if held:
                    raise ErnieError(
                        f"the column {held[0]} of {path.name} holds the pictures themselves; write them as files or "
                        "tar shards, with a table that names them."
                    )
                yield _refused(str(path), f"{label} names no picture: expected one of {', '.join(IMAGE_KEYS)}")
                continue
            source = os.path.normpath(path.parent / Path(image).expanduser())
            try:
                captions, used = captions_from_values(values)
            except ErnieError as e:
                yield _refused(source, f"{label}: {e}")
                continue
            given = {k: v for k, v in values.items() if k not in used}
            yield _row(source, _modified(source), captions, given)


def _looked_at_anew(row: Row) -> Row:
    """A manifest's row of which the ingest counts as not done."""
    return row | {"made_by": {stage: key for stage, key in row["made_by"].items() if stage != "ingest"}}


def _modified(source: str) -> int:
    try:
        return os.stat(source.partition(".tar#")[0] + ".tar" if ".tar#" in source else source).st_mtime_ns
    except OSError:
        return 0  # what is wrong with it is said when it is opened


def _is_job(path: Path) -> bool:
    """Whether a .json is an ai-toolkit job; what cannot be parsed is reported as a table."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "config" in values


def _list_trainer_file(path: Path) -> Iterator[Row]:
    found = find_items(path)
    for problem in found.problems:
        whole = os.path.isabs(problem.label)  # else it is a place in the file
        yield _refused(problem.label if whole else str(path), problem.reason if whole else str(problem))
    for item in found.items:
        values = item_to_json(item, path.parent)
        given = {k: v for k, v in values.items() if k not in ("image", "captions")}
        source = os.path.abspath(item.image)
        yield _row(source, _modified(source), item.captions, given)
