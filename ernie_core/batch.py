"""Batches from prompt lists: reading rows, remembering which pictures exist, running the rest.

A run owns one folder: pictures and `manifest.jsonl`, one line per finished picture, written after the picture is safely
on disk. A row is done when the manifest names its hash and the file is there, so an interrupted run goes on where it
stopped and nothing is made twice. Files are never overwritten: the hash is part of the name.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import MAX_SIZE, MAX_STEPS, SAMPLERS, check_size
from .errors import ErnieError
from .wildcards import Wildcards

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".csv", ".jsonl")
MANIFEST = "manifest.jsonl"
MAX_SEED = 2**64 - 1
ENCODE_AHEAD = 16  # rows whose prompts are encoded before sampling starts: fewer swaps of text encoder and transformer


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture to make."""

    label: str
    """Where it came from, for people: "row 3" or "captions.csv row 3"."""
    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    steps: int
    cfg: float
    shift: float
    # What follows has a neutral value: rows that leave it there keep the hash that they had before it existed.
    enhance: bool = False
    """Whether the enhancer writes the prompt out."""
    checkpoint: str = ""
    """A transformer among the model files; empty = the model that is connected."""
    variant: int = 1
    """Which of the connected models."""
    loras: tuple[tuple[str, float], ...] = ()
    """(file name, strength) of LoRAs on top of what the model has."""
    sampler: str = "euler"
    """One of `config.SAMPLERS`."""

    @property
    def hash(self) -> str:
        """Twelve hex digits that follow from everything that shapes the picture, not from where the row stands."""
        values = {k: v for k, v in self.settings().items() if k != "label"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def settings(self) -> dict[str, Any]:
        """Every field but those at their neutral value."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, neutral) in values.items() if value != neutral}

    @classmethod
    def from_settings(cls, values: Mapping[str, Any]) -> Row:
        """The row that `settings` gave, also after a way through JSON.

        Raises:
            ErnieError: a field is missing or unknown.
        """
        known = {f.name: f for f in fields(cls)}
        missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
        if missing or values.keys() - known.keys():
            raise ErnieError(
                f"a row with the fields {', '.join(known)} expected; missing {', '.join(missing) or 'none'}, "
                f"unknown {', '.join(sorted(values.keys() - known.keys())) or 'none'}."
            )
        read = dict(values)
        if "loras" in read:
            read["loras"] = tuple((str(name), float(strength)) for name, strength in read["loras"])
        return cls(**read)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A row, or a column, that cannot be used; the others still are."""

    label: str
    reason: str

    def __str__(self) -> str:
        return f"{self.label}: {self.reason}"


# column -> how its text becomes a value; the columns a row may have besides "prompt"
_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "prompt": str,
    "negative": str,
    "seed": int,
    "width": int,
    "height": int,
    "steps": int,
    "cfg": float,
    "shift": float,
    "sampler": str,
}


_OF_THE_PICTURE = ("hash", "file", "pixels", "label")  # what an entry of a manifest says besides the row's settings


def read_rows(
    source: str, defaults: Row, *, folder: Path | None = None, count_seeds: bool = True
) -> tuple[list[Row], list[Problem]]:
    """Rows of a prompt list, and what could not be read.

    Args:
        source: one prompt per line; or the path of a .txt (one prompt per line), .csv (header with `prompt`) or .jsonl
            file (one object per line); or a folder of such files; or the folder of an earlier run, whose prompts, seeds
            and settings are taken from its manifest. A relative path is looked up in `folder`.
        defaults: values for what a row leaves out; a row without a seed gets the default seed + its place in the list.
        folder: where relative paths start.
        count_seeds: False = a row without a seed gets the default seed itself.

    Raises:
        ErnieError: the file or folder is missing or of another kind, or not one row is usable (names the first five).
    """
    path = _as_path(source, folder)
    rows: list[Row] = []
    problems: list[Problem] = []
    for label, values in _iter_values(source, path, problems):
        try:
            rows.append(_make_row(label, values, defaults, len(rows) + len(problems) if count_seeds else 0))
        except ErnieError as e:
            problems.append(Problem(label=label, reason=str(e)))
    if not rows:
        detail = "; ".join(str(p) for p in problems[:5]) or "it holds no prompts"
        advice = "Correct these rows and run again." if problems else "Write one prompt per line."
        raise ErnieError(f"the prompt list has no usable row ({detail}). {advice}")
    return rows, problems


def _as_path(source: str, folder: Path | None) -> Path | None:
    """The file or folder `source` names, or None when it is text."""
    text = source.strip().strip('"')
    if not text or "\n" in text or len(text) > 1024:
        return None
    candidates = [Path(text), *([folder / text] if folder else [])]
    for path in candidates:
        if path.exists() and (path.is_dir() or path.suffix.lower() in SUFFIXES):
            return path
    if Path(text).suffix.lower() in SUFFIXES:
        raise ErnieError(f"no such prompt file: {' or '.join(str(p) for p in candidates)}.")
    return None


def _iter_values(source: str, path: Path | None, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    if path is None:
        yield from _iter_text(source, "")
    elif path.is_file():
        yield from _iter_file(path, "", problems)
    elif (path / MANIFEST).is_file():  # the folder of a run: its pictures, again
        for number, entry in enumerate(read_entries(path), start=1):
            # settings that no column can hold stay, so that the row is refused rather than painted without them
            yield f"picture {number}", {k: v for k, v in entry.items() if k not in _OF_THE_PICTURE}
    else:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ErnieError(f"the folder {path} holds no {', '.join(SUFFIXES)} file.")
        for file in files:
            yield from _iter_file(file, f"{file.name} ", problems)


def _iter_file(path: Path, where: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as e:
        problems.append(Problem(label=path.name, reason=f"cannot be read ({e.strerror or e})"))
        return
    if path.suffix.lower() == ".csv":
        yield from _iter_csv(text, where, problems)
    elif path.suffix.lower() == ".jsonl":
        yield from _iter_jsonl(text, where, problems)
    else:
        yield from _iter_text(text, where)


def _iter_text(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{where}row {number}", {"prompt": line.strip()}


def _iter_csv(text: str, where: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = [c.strip().lower() for c in reader.fieldnames or []]
    if "prompt" not in columns:
        problems.append(
            Problem(
                label=f"{where}header", reason=f"needs a column named prompt, got {', '.join(columns) or 'nothing'}"
            )
        )
        return
    reader.fieldnames = columns
    number = 0
    try:
        for number, values in enumerate(reader, start=1):
            if values.get(None):  # more cells than the header has
                problems.append(
                    Problem(
                        label=f"{where}row {number}",
                        reason=f"has {len(columns) + len(values[None])} cells, the header has {len(columns)}; "
                        "put a prompt with commas in double quotes",
                    )
                )
                continue
            yield f"{where}row {number}", {k: v for k, v in values.items() if v is not None and v.strip()}
    except csv.Error as e:
        problems.append(Problem(label=f"{where}row {number + 1}", reason=f"is not CSV ({e}); the file ends here"))


def _iter_jsonl(text: str, where: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        label = f"{where}row {number}"
        try:
            values = json.loads(line)
        except ValueError as e:
            problems.append(Problem(label=label, reason=f"is not JSON ({e})"))
            continue
        if not isinstance(values, dict):
            problems.append(Problem(label=label, reason='must be an object such as {"prompt": "a red apple"}'))
            continue
        yield label, {str(k).strip().lower(): v for k, v in values.items() if v is not None}


def _make_row(label: str, values: dict[str, Any], defaults: Row, place: int) -> Row:
    unknown = sorted(values.keys() - _COLUMNS.keys())
    if unknown:
        raise ErnieError(f"has unknown columns {', '.join(unknown)}; known are {', '.join(_COLUMNS)}")
    if not str(values.get("prompt", "")).strip():
        raise ErnieError("has no prompt")
    read: dict[str, Any] = {"seed": (defaults.seed + place) & MAX_SEED}
    for name, value in values.items():
        try:
            read[name] = _COLUMNS[name](value.strip() if isinstance(value, str) else value)
        except (TypeError, ValueError) as e:
            kind = _COLUMNS[name].__name__
            raise ErnieError(
                f"{name} must be {'a whole number' if kind == 'int' else 'a number'}, got {value!r}"
            ) from e
    row = replace(defaults, label=label, **read)
    check_row(row)
    return row


def check_row(row: Row) -> None:
    """Raise ErnieError unless a picture of these settings can be made."""
    if "\ufffd" in row.prompt + row.negative:
        raise ErnieError("is not UTF-8 text; save the file as UTF-8")
    check_size(row.width, row.height)
    if max(row.width, row.height) > MAX_SIZE:
        raise ErnieError(f"width and height must be at most {MAX_SIZE}, got {row.width} and {row.height}")
    if not 0 <= row.seed <= MAX_SEED:
        raise ErnieError(f"seed must lie between 0 and {MAX_SEED}, got {row.seed}")
    if row.steps < 1:
        raise ErnieError(f"steps must be at least 1, got {row.steps}")
    if row.steps > MAX_STEPS:
        raise ErnieError(f"steps must be at most {MAX_STEPS}, got {row.steps}")
    if not (0 <= row.cfg < float("inf")):
        raise ErnieError(f"cfg must be 0 or more, got {row.cfg:g}")
    if not (0 < row.shift < float("inf")):
        raise ErnieError(f"shift must be above 0, got {row.shift:g}")
    if row.sampler not in SAMPLERS:
        raise ErnieError(f"sampler must be {', '.join(SAMPLERS)}, got {row.sampler!r}")


def vary_rows(
    rows: Sequence[Row], *, variations: int = 1, wildcards: Wildcards | None = None, seed: int = 0
) -> tuple[list[Row], list[Problem]]:
    """Each row `variations` times with seeds that count up, its choices made; and the rows whose choices failed.

    Args:
        wildcards: makes the choices of prompt and negative; None = braces and double underscores are plain text.
        seed: what the choices follow from, together with the place among all variations.

    Raises:
        ErnieError: not one row is usable.
    """
    varied: list[Row] = []
    failed: dict[tuple[str, str], list[str]] = {}  # (row, reason) -> labels: a fault in the text is told once
    for place, row in enumerate(rows):
        for i in range(variations):
            label = row.label if variations == 1 else f"{row.label} variation {i + 1}"
            number = place * variations + i
            try:
                prompt, negative = _choose(row, wildcards, seed, number)
            except ErnieError as e:
                failed.setdefault((row.label, str(e)), []).append(label)
                continue
            varied.append(replace(row, label=label, prompt=prompt, negative=negative, seed=(row.seed + i) & MAX_SEED))
    problems = [
        Problem(label=labels[0] + (f" and {len(labels) - 1} more" if len(labels) > 1 else ""), reason=reason)
        for (_, reason), labels in failed.items()
    ]
    if not varied:
        raise ErnieError(f"no row is usable ({'; '.join(map(str, problems[:5]))}). Correct these and run again.")
    return varied, problems


def _choose(row: Row, wildcards: Wildcards | None, seed: int, number: int) -> tuple[str, str]:
    """Prompt and negative with their choices made."""
    if wildcards is None:
        return row.prompt, row.negative
    prompt = wildcards.expand(row.prompt, seed=seed, row=number).strip()
    if not prompt:
        raise ErnieError("its choices left no prompt")
    # a stream of its own: a choice more in the prompt does not change the negative
    return prompt, wildcards.expand(row.negative, seed=seed, row=-1 - number)


def run_folder(output: Path, name: str) -> Path:
    """The folder `name` inside `output`, made if needed.

    Raises:
        ErnieError: `name` is empty or leads outside `output`, or the folder cannot be made.
    """
    folder = (output / name.strip()).resolve()
    if not name.strip() or not folder.is_relative_to(output.resolve()) or folder == output.resolve():
        raise ErnieError(f"name must be a folder inside the output folder, such as 'batch', got {name!r}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ErnieError(
            f"the folder {folder} could not be made ({e.strerror or e}). Take another name, or free some space."
        ) from e
    return folder


def name_run(name: str, made_with: str) -> str:
    """The name of a run's folder: with eight hex digits of what made it, so that two models never share a folder.

    `made_with` "" changes nothing; the path of a file stands for its content.

    Raises:
        ErnieError: the file cannot be read.
    """
    text = made_with.strip()
    if not text or not name.strip():
        return name
    path = Path(text)
    try:
        content = path.read_bytes() if len(text) < 4096 and path.is_file() else text.encode()
    except OSError as e:
        raise ErnieError(f"made_with: {path} cannot be read ({e.strerror or e}).") from e
    return f"{name.strip()}_{hashlib.sha256(content).hexdigest()[:8]}"


def fingerprint(
    source: str | None, name: str | None, *, inputs: Path, output: Path, made_with: str | None = ""
) -> list[tuple[str, int, int]]:
    """(path, size, time) of the prompt files and of everything in the run's folder: equal means nothing to do.

    None is what a host says of a text that is linked: it is not known before the run. Then all folders that it may
    lead to are looked at.
    """
    try:
        path = _as_path(source or "", inputs)
    except ErnieError:
        path = None  # the run itself reports it
    read = [] if path is None else [path] if path.is_file() else sorted(path.iterdir())
    plain = output / (name or "").strip()
    if made_with is None:
        folders = sorted(plain.parent.glob(f"{glob.escape(plain.name)}_????????"))
    else:
        try:
            folders = [output / name_run(name or "", made_with).strip()]
        except ErnieError:
            folders = []  # the run itself reports it
    made = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in (*read, *made) if p.is_file()]


def read_manifest(folder: Path) -> dict[str, str]:
    """Row hash -> file name of every finished picture that is still there; a half-written last line is left out."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {entry["hash"]: entry["file"] for entry in read_manifest_entries(folder) if entry["file"] in there}


def read_manifest_entries(folder: Path) -> list[dict[str, Any]]:
    """{hash, file, pixels, and the row's settings} of every picture that was finished, oldest first."""
    path = folder / MANIFEST
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            entry |= {name: str(entry[name]) for name in ("hash", "file")}
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a line could not be read and is left out: %.60s", path, line)
            continue
        entries.append(entry)
    return entries


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """The manifest's entries of pictures that are still there, each file once."""
    entries = {entry["file"]: entry for entry in read_manifest_entries(folder)}
    return [entry for file, entry in entries.items() if (folder / file).is_file()]


def append_manifest(folder: Path, row: Row, file: str) -> None:
    """Add one line and force it to disk; call it after the picture is written, which is read back for its pixels' hash.

    Raises:
        ErnieError: the picture cannot be read back, the disk is full, or the folder cannot be written to.
    """
    append_line(
        folder / MANIFEST, {"hash": row.hash, "file": file, "pixels": hash_pixels(folder / file), **row.settings()}
    )


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Add one line of JSON to a journal and force it to disk, after ending a line that a killed run left unfinished.

    Raises:
        ErnieError: the disk is full, or the folder cannot be written to.
    """
    try:
        with path.open("a+b") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":  # a run was killed while writing its last line
                    f.write(b"\n")
            f.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise ErnieError(
            f"{path} could not be written ({e.strerror or e}). Free some space and run again: finished pictures are "
            "kept."
        ) from e


def read_image(path: Path) -> Tensor:
    """A picture file as a float tensor [H, W, 3] in [0, 1].

    Raises:
        ErnieError: it is damaged or no picture.
    """
    return torch.from_numpy(read_pixels(path).astype(np.float32) / 255.0)


def hash_pixels(path: Path) -> str:
    """sha256 of a picture's size and pixels, whatever the file says besides; ErnieError as `read_image`."""
    pixels = read_pixels(path)
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def read_pixels(path: Path) -> np.ndarray:
    """A picture file as uint8 [H, W, 3]; ErnieError as `read_image`."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as e:  # PIL: SyntaxError for a broken PNG chunk
        raise ErnieError(f"{path} cannot be read as a picture ({e}). Delete it and run again: it is made anew.") from e


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What a run left behind."""

    files: list[Path]
    """One per row, in the order of the rows."""
    made: int
    kept: int

    def report(self, problems: Iterable[Problem]) -> str:
        """A few lines for people: counts, folder, and each row that could not be used."""
        problems = list(problems)
        lines = [f"{self.made} made, {self.kept} already there, {len(problems)} not usable"]
        if self.files:
            lines.append(f"in {self.files[0].parent}")
        return "\n".join([*lines, *(str(p) for p in problems)])


def run_rows(
    rows: Sequence[Row],
    folder: Path,
    *,
    encode: Callable[[str], Any],
    generate: Callable[[Row, Any, Any], Tensor],
    save: Callable[[Tensor, Path, Row], None],
    write: Callable[[Row], str] | None = None,
    on_row: Callable[[int, int, Row], None] | None = None,
) -> BatchResult:
    """Make every picture that is not there yet, one after the other.

    Args:
        rows: what to make; two rows that ask for the very same picture share one file.
        folder: where pictures and manifest go (`run_folder`).
        encode: text -> conditioning; called once per different text of a group of rows.
        generate: (row, positive, negative) -> picture [H, W, 3] in [0, 1]; negative is None at cfg 1.
        save: writes a picture; must be atomic.
        write: row -> the text to encode; None = its prompt.
        on_row: called with (number from 1, rows to make, row) before each picture; may raise to stop, and everything
            finished until then stays.
    """
    done = read_manifest(folder)
    pending = list({row.hash: row for row in rows if row.hash not in done}.values())
    encoded: dict[str, Any] = {}
    for start in range(0, len(pending), ENCODE_AHEAD):
        group = pending[start : start + ENCODE_AHEAD]
        texts = [(row.prompt if write is None else write(row), None if row.cfg == 1 else row.negative) for row in group]
        wanted = dict.fromkeys(text for pair in texts for text in pair if text is not None)
        encoded = {text: encoded[text] if text in encoded else encode(text) for text in wanted}
        for number, (row, (prompt, negative)) in enumerate(zip(group, texts, strict=True), start=start + 1):
            if on_row is not None:
                on_row(number, len(pending), row)
            image = generate(row, encoded[prompt], None if negative is None else encoded[negative])
            file = file_name(row)
            save(image, folder / file, row)
            append_manifest(folder, row, file)
            done[row.hash] = file
    return BatchResult(
        files=[folder / done[row.hash] for row in rows], made=len(pending), kept=len(rows) - len(pending)
    )


def make_image(
    row: Row,
    *,
    encode: Callable[[str], Any],
    generate: Callable[[Row, Any, Any], Tensor],
    write: Callable[[Row], str] | None = None,
) -> Tensor:
    """One row's picture [H, W, 3] in [0, 1], as `run_rows` makes it."""
    positive = encode(row.prompt if write is None else write(row))
    return generate(row, positive, None if row.cfg == 1 else encode(row.negative))


def file_name(row: Row) -> str:
    """The name of a row's picture: the same in every run and on every machine."""
    return f"{row.hash}_{row.seed}.png"


def row_entries(row: Row) -> dict[str, str]:
    """The row's settings as text, for a picture's metadata."""
    return {name: str(value) for name, value in row.settings().items() if name != "label"}
