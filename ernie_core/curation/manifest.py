"""The manifest: a sequence of rows, one per picture, as JSONL or Parquet; and the pictures that rows name.

A row is one JSON object. Columns are only ever added. What went wrong with a row stays in it:

    problem                     the file is no picture that can be used, and why
    failed {stage: reason}      a stage could do nothing with the row
    passed_by {stage: reason}   a stage left the row alone: a column that it needs is missing, or a filter dropped it
    kept false, dropped_by      a filter took it out; it stays in the manifest
    made_by {stage: key}        what each stage's columns were made with

`source` is a path, or `SHARD.tar#MEMBER`; the n-th member of one name (n > 1) is `SHARD.tar#MEMBER#n`. A relative one
starts at its manifest's folder; `read_rows` makes it whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from PIL import Image

from ..errors import ErnieError
from ..training.pictures import LoadedImage, load_image

logger = logging.getLogger(__name__)

Row = dict[str, Any]

PARQUET = ".parquet"
_GROUP = 4096  # rows per Parquet row group
_AS_JSON = b"ernie_json_columns"  # Parquet metadata: which columns hold JSON text
_MAX_EXACT = 2**53  # whole numbers up to here survive in a column of floats


@dataclass(frozen=True)
class Manifest:
    """What the ERNIE_MANIFEST socket carries: where the rows lie."""

    path: Path

    def rows(self) -> Iterator[Row]:
        """The rows, in order, read as they are asked for."""
        return read_rows(self.path)

    def __len__(self) -> int:
        return count_rows(self.path)

    def next(self, stage: str, key: str) -> Path:
        """Where the manifest of a stage that follows this one goes: `<NN>_<stage>_<hash>.jsonl` beside it.

        The hash is of this file's name and the stage's key, so that two branches of a graph have files of their own,
        and going back to earlier settings finds what was made with them.
        """
        number = self.path.name.partition("_")[0]
        return self.path.with_name(step_name(int(number) + 1 if number.isdecimal() else 1, stage, self.path.name, key))


def step_name(number: int, stage: str, *of: str) -> str:
    """The file name of step `number` of a run, with a hash of everything it follows from."""
    return f"{number:02d}_{stage}_{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:6]}.jsonl"


# --- rows -----------------------------------------------------------------------------------------------------


def read_rows(path: Path | str) -> Iterator[Row]:
    """The rows of a manifest, in order, a few in memory at a time; Parquet by its suffix, else JSONL.

    A last line that a killed run left half written is left out, with a warning.

    Raises:
        ErnieError: no such file, a line that is no JSON object (its number), or Parquet without the package pyarrow.
    """
    path = _existing(path)
    base = path.resolve().parent
    rows = _read_parquet(path) if path.suffix.lower() == PARQUET else _read_jsonl(path)
    for row in rows:
        source = row.get("source")
        if isinstance(source, str) and source and not os.path.isabs(source):
            row["source"] = os.path.normpath(base / source)
        yield row


def _existing(path: Path | str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise ErnieError(f"there is no manifest {path}.")
    return path


def count_rows(path: Path | str) -> int:
    """How many rows `read_rows` gives, without parsing them (of JSONL: its lines). Raises as `read_rows`."""
    path = _existing(path)
    if path.suffix.lower() == PARQUET:
        return _pyarrow().parquet.ParquetFile(path).metadata.num_rows
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def write_rows(path: Path | str, rows: Iterable[Row]) -> int:
    """Write a manifest, whole or not at all (temporary name, fsync, rename); returns how many rows.

    In Parquet a column whose values are of one plain kind (text, whole number, number, true/false) is of that kind;
    any other holds JSON text. Reading gives equal rows back, keys in the order of the columns.

    Raises:
        ErnieError: the disk is full, a value that JSON does not know (NaN is one), or Parquet without pyarrow.
    """
    path = Path(path).expanduser()
    with replacing(path) as file:
        if path.suffix.lower() == PARQUET:
            return _write_parquet(file, path, rows)
        count = 0
        for row in rows:
            file.write(to_line(row))
            count += 1
        return count


def to_line(row: Row) -> bytes:
    """A row as one line of JSONL; readable text, escaped only where a file name is no valid Unicode.

    Raises:
        ErnieError: a value that JSON does not know.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ErnieError(f"a row holds a value that is not plain JSON ({e}): {str(row)[:200]}") from e
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False).encode() + b"\n"


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends well, and is gone when it does not.

    `sync` False leaves it to the system when it reaches the disk: for files that are checked before they count.

    Raises:
        ErnieError: it cannot be written (a full disk, a folder without permission).
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ErnieError(
            f"{path} cannot be written ({e.strerror or e}). Free some space or take another folder."
        ) from e
    finally:
        part.unlink(missing_ok=True)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig") if number == 1 else line)
            except ValueError as e:
                if not line.endswith(b"\n"):
                    logger.warning("%s: its last line is half written, and left out.", path)
                    return
                raise ErnieError(f"{path.name} line {number} is not JSON ({e}).") from e
            if not isinstance(row, dict):
                raise ErnieError(f"{path.name} line {number} must be an object, got {line[:60]!r}.")
            yield row


# --- Parquet --------------------------------------------------------------------------------------------------


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ErnieError("Parquet needs the package pyarrow: pip install pyarrow, or take a .jsonl file.") from e
    return pyarrow


def _read_parquet(path: Path) -> Iterator[Row]:
    arrow = _pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, OSError) as e:
        raise ErnieError(f"{path.name} is no Parquet file, or a cut one ({e}).") from e
    coded = set(json.loads((file.schema_arrow.metadata or {}).get(_AS_JSON, b"[]")))
    for batch in file.iter_batches(batch_size=_GROUP):
        for row in batch.to_pylist():
            yield {k: json.loads(v) if k in coded else v for k, v in row.items() if v is not None}


def _write_parquet(file: IO[bytes], path: Path, rows: Iterable[Row]) -> int:
    """Two passes, as a column's kind is known at the end: rows are kept as JSONL beside the file in between."""
    arrow = _pyarrow()
    kinds: dict[str, str] = {}
    count = 0
    spool = path.with_name(f".{path.name}.{os.getpid()}.spool")
    try:
        with spool.open("wb") as lines:
            for row in rows:
                lines.write(to_line(row))
                count += 1
                for key, value in row.items():
                    kinds[key] = _join_kinds(kinds.get(key), _kind_of(value))
        plain = {"text": arrow.string(), "whole": arrow.int64(), "number": arrow.float64(), "truth": arrow.bool_()}
        fields = [arrow.field(key, plain.get(kind, arrow.string())) for key, kind in kinds.items()]
        coded = [key for key, kind in kinds.items() if kind not in plain]
        schema = arrow.schema(fields, metadata={_AS_JSON: json.dumps(coded).encode()})
        with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            stream = _read_jsonl(spool)
            while group := list(itertools.islice(stream, _GROUP)):
                cells = [{k: json.dumps(v) if k in coded else v for k, v in row.items()} for row in group]
                writer.write_table(arrow.Table.from_pylist(cells, schema=schema))
    finally:
        spool.unlink(missing_ok=True)
    return count


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int):
        return "whole" if abs(value) <= _MAX_EXACT else "json"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value):
        return "text"
    return "json"


def _join_kinds(old: str | None, new: str) -> str:
    if old is None or old == new:
        return new
    return "number" if {old, new} == {"whole", "number"} else "json"


# --- pictures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """What a tar file holds."""

    members: dict[str, tuple[int, int]]
    """(offset, size) of each file's bytes, by its name as rows say it."""
    damage: str
    """"", or why it could not be read to its end."""


def read_shard(path: Path | str) -> Shard:
    """The files in a tar, in its order; a damaged one gives those before the damage.

    Raises:
        ErnieError: it cannot be opened, or is compressed (whose members cannot be reached one by one).
    """
    try:
        stat = os.stat(path)
    except OSError as e:
        raise ErnieError(f"{path} cannot be read ({e.strerror or e}).") from e
    return _read_shard(str(path), (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=64)
def _read_shard(path: str, stamp: tuple[int, int]) -> Shard:
    """The shard as it was at `stamp`: (time of its last change, size)."""
    size = stamp[1]
    members: dict[str, tuple[int, int]] = {}
    seen: dict[str, int] = {}
    damage = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                seen[member.name] = number = seen.get(member.name, 0) + 1
                if member.offset_data + member.size > size:
                    damage = f"it ends in the middle of {member.name}"
                    break
                name = member.name if number == 1 else f"{member.name}#{number}"
                members[name] = (member.offset_data, member.size)
            else:
                with open(path, "rb") as file:  # tarfile takes a damaged header for the end
                    file.seek(tar.offset)
                    rest = file.read(512)
                if rest.strip(b"\0"):
                    damage = f"what follows byte {tar.offset} is no tar header"
                elif len(rest) < 512:
                    damage = "its end mark is missing"
    except (tarfile.TarError, OSError, EOFError, ValueError) as e:
        with open(path, "rb") as file:
            start = file.read(6)
        if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0":
            raise ErnieError(f"{path} is compressed; unpack it to a .tar (pictures are compressed already).") from e
        if not members:
            raise ErnieError(f"{path} is no tar file ({e}).") from e
        damage = str(e)
    return Shard(members, damage)


def split_source(source: str) -> tuple[str, str]:
    """(path, member) of a row's `source`; the member is "" for a file."""
    path, mark, member = source.partition(".tar#")
    return (f"{path}.tar", member) if mark else (source, "")


def read_bytes(source: str) -> bytes:
    """The bytes of a row's picture file, as they are.

    Raises:
        ErnieError: it is not there or cannot be read.
    """
    path, member = split_source(source)
    try:
        if not member:
            with open(path, "rb") as file:
                return file.read()
        place = read_shard(path).members.get(member)
        if place is None:
            raise ErnieError(f"{path} has no member {member}.")
        with open(path, "rb") as file:
            file.seek(place[0])
            return file.read(place[1])
    except OSError as e:
        raise ErnieError(f"{source} cannot be read ({e.strerror or e}).") from e


def load_picture(row: Row) -> LoadedImage:
    """The row's picture, whole: upright sRGB, its alpha, and notes on what was done to it.

    Raises:
        ErnieError: the row names no picture, or it cannot be read or decoded.
    """
    source = row.get("source")
    if not isinstance(source, str) or not source:
        raise ErnieError("the row has no source.")
    return load_image(read_bytes(source))


def open_picture(row: Row) -> Image.Image:
    """The row's picture as RGB: upright, sRGB, transparent parts white. Raises as `load_picture`."""
    return Image.fromarray(load_picture(row).rgb_HWC)
