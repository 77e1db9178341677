"""Draws from a manifest of any length: a pool kept on the disk, mapped into memory, and read at random.

`open_pool` makes the arrays once and finds them again; `Draws` is what a worker holds. Draw k of a seed is two numbers
in [0, 1) that follow from (seed, k) by SplitMix64 (Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number
Generators), whose k-th output is a function of k alone. The first chooses a category, the second a place inside it,
each by a search in cumulative sums. So batch b of any size of any worker can be asked for at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ErnieError
from .manifest import PARQUET, Row, count_rows, read_rows, replacing
from .sampling import Pool, Sampling, category_shares, inside_shares, make_pool

OnProgress = Callable[[int, int, str], None]
"""Called with (rows done, rows, what)."""

ONE_CATEGORY = "(all)"
_FORMAT = 1
_INSIDE_BITS = 32  # a place inside a category is drawn this finely, so that category + place is exact in float64
_REPORT_EVERY = 50_000
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def draw_uniforms(numbers: np.ndarray, *key: str | int, bits: int = 53) -> np.ndarray:
    """For each number from 0 a float64 in [0, 1), a multiple of 2^-bits: a function of it and of `key` alone."""
    state = np.uint64(int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big"))
    mixed = state + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(64 - bits)).astype(np.float64) * 2.0**-bits


# --- the pool on the disk --------------------------------------------------------------------------------------------


def open_pool(
    manifest: Path | str,
    folder: Path | str | None = None,
    *,
    depth: int = 0,
    on_progress: OnProgress | None = None,
) -> Pool:
    """The pool of a manifest, mapped into memory; made where it is not there or the manifest has changed since.

    Rows that a filter dropped, whose file is no picture, or that lack the category or the score that others have, are
    left out and counted in `Pool.left_out`. A manifest without categories is one category. Several processes may ask at
    once: the first to end wins, and all see the same arrays. Making it takes about 100 bytes of memory per row.

    Args:
        manifest: JSONL or Parquet; of its rows `category` (a path like animal/bird) and `score` are read.
        folder: where the arrays are kept; None = MANIFEST.pool beside it.
        depth: how many parts of a category's path count; 0 = all of them.
        on_progress: called every 50,000 rows; may raise to stop.

    Raises:
        ErnieError: the manifest cannot be read, or no row of it can be drawn.
    """
    manifest = Path(manifest).expanduser()
    if depth < 0:
        raise ErnieError(f"depth must be 0 (the whole path) or more, got {depth}.")
    try:
        state = manifest.stat()
    except OSError as e:
        raise ErnieError(f"there is no manifest {manifest}.") from e
    facts = [_FORMAT, str(manifest.resolve()), state.st_size, state.st_mtime_ns, depth]
    kept = Path(folder or f"{manifest}.pool") / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    if not (kept / "pool.json").is_file():
        pool, offsets = read_pool(manifest, depth=depth, on_progress=on_progress)
        _write_pool(pool, offsets, manifest, kept)
    said = json.loads((kept / "pool.json").read_text(encoding="utf-8"))
    arrays = {name: _map(kept / f"{name}.npy") for name in ("order", "scores", "percentiles")}
    return Pool(
        names=tuple(said["names"]),
        starts=np.load(kept / "starts.npy"),
        is_scored=said["is_scored"],
        left_out=tuple((why, count) for why, count in said["left_out"]),
        folder=kept,
        **arrays,
    )


def read_pool(manifest: Path, *, depth: int = 0, on_progress: OnProgress | None = None) -> tuple[Pool, array[int]]:
    """(the pool of a manifest, in memory; the byte that each row begins at, empty for Parquet). See `open_pool`."""
    numbers: dict[str, int] = {}
    rows, categories, scores = array("I"), array("i"), array("f")
    offsets = array("q")
    left_out: Counter[str] = Counter()
    total = count_rows(manifest) if on_progress is not None and manifest.is_file() else 0
    starts = itertools.repeat(0) if manifest.suffix.lower() == PARQUET else line_starts(manifest)
    for number, (row, start) in enumerate(zip(read_rows(manifest), starts, strict=False)):
        if on_progress is not None and number % _REPORT_EVERY == 0:
            on_progress(number, total, "reading the manifest")
        offsets.append(start)
        reason = _why_not(row)
        if reason:
            left_out[reason] += 1
            continue
        category, score = row.get("category"), row.get("score")
        path = "/".join(str(category).split("/")[: depth or None]) if category else ""
        rows.append(number)
        categories.append(numbers.setdefault(path, len(numbers)) if path else -1)
        scores.append(score if isinstance(score, int | float) and not isinstance(score, bool) else math.nan)
    row, category, score = np.array(rows), np.array(categories), np.array(scores)
    usable = np.ones(len(row), dtype=bool)
    for found, why in ((category >= 0, "without a category"), (np.isfinite(score), "without a score")):
        if found.any() and not found.all():
            left_out[why] += int((usable & ~found).sum())
            usable &= found
    names = sorted(numbers)
    if names:
        sorted_number = np.empty(len(names), dtype=np.int32)
        sorted_number[[numbers[name] for name in names]] = np.arange(len(names))
        category = sorted_number[category[usable]]
    else:
        names, category = [ONE_CATEGORY], np.zeros(int(usable.sum()), dtype=np.int32)
    pool = make_pool(category, score[usable], names, rows=row[usable], left_out=sorted(left_out.items()))
    return pool, offsets if manifest.suffix.lower() != PARQUET else array("q")


def _why_not(row: Row) -> str:
    """Why a row cannot be drawn whatever else is known of it; "" = it can."""
    if row.get("problem"):
        return "whose file is no usable picture"
    return "that a filter dropped" if row.get("kept") is False else ""


def line_starts(path: Path) -> Iterator[int]:
    """The byte that each line of a text file begins at; empty lines are left out."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield place
            place += len(line)


def _write_pool(pool: Pool, offsets: array[int], manifest: Path, kept: Path) -> None:
    """Write the arrays into a new folder and give it its name when it is whole."""
    part = kept.with_name(f".{kept.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        arrays = {"starts": pool.starts, "scores": pool.scores, "percentiles": pool.percentiles}
        arrays |= {"order": pool.order.astype(np.uint32), "offsets": np.array(offsets, dtype=np.int64)}
        for name, values in arrays.items():
            np.save(part / f"{name}.npy", values)
        said = {"manifest": str(manifest.resolve()), "names": pool.names, "is_scored": pool.is_scored}
        text = json.dumps(said | {"left_out": pool.left_out}, ensure_ascii=False)
        (part / "pool.json").write_text(text, encoding="utf-8")
        os.replace(part, kept)
    except OSError as e:
        if not (kept / "pool.json").is_file():  # else another process was first
            raise ErnieError(
                f"the pool {kept} cannot be written ({e.strerror or e}). Free some space or take another folder."
            ) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


# --- drawing ----------------------------------------------------------------------------------------------------------


class Draws:
    """Rows of a pool, drawn with replacement: every answer is a function of the seed and of a draw's number."""

    def __init__(self, pool: Pool, sampling: Sampling, *, seed: int = 0):
        """Sum up the probabilities, or map the sums that were kept beside the pool.

        Raises:
            ErnieError: the sampling needs scores that the pool lacks, or the sums cannot be written.
        """
        self.pool, self.sampling, self.seed = pool, sampling, seed
        if pool.folder is None:
            self._between = np.cumsum(category_shares(pool, sampling))
            self._inside = np.concatenate(list(_iter_sums(pool, sampling)))
        else:
            name = hashlib.sha256(json.dumps(asdict(sampling), sort_keys=True).encode()).hexdigest()[:16]
            between, inside = (pool.folder / f"{what}-{name}.npy" for what in ("between", "inside"))
            if not between.is_file():
                _keep_sums(pool, sampling, between, inside)
            self._between, self._inside = np.load(between), _map(inside)
        self._between[-1] = 1.0

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The manifest's row for each draw, int64; `numbers` count from 0."""
        numbers = np.asarray(numbers)
        category = np.searchsorted(self._between, draw_uniforms(numbers, self.seed, "category"), side="right")
        inside = draw_uniforms(numbers, self.seed, "row", bits=_INSIDE_BITS)
        place = np.searchsorted(self._inside, category + inside, side="right")
        return self.pool.order[place].astype(np.int64)

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows that worker `rank` of `world` draws in step `step`, `size` of them.

        All workers together draw the numbers [step size world, (step + 1) size world), each every world-th: what one
        worker with the whole batch draws.
        """
        if size < 1 or world < 1 or not 0 <= rank < world or step < 0:
            raise ErnieError(
                "a batch needs a size and a world of 1 or more, a rank below world and a step from 0; got "
                f"size {size}, world {world}, rank {rank}, step {step}."
            )
        first = step * size * world
        return self.rows(np.arange(first + rank, first + size * world, world))

    def read(self, rows: np.ndarray) -> list[Row]:
        """Those rows of the manifest, whole, by seeking.

        Raises:
            ErnieError: the pool is not kept on the disk, or its manifest is Parquet, which cannot be read row by row.
        """
        if self.pool.folder is None:
            raise ErnieError("rows can be read from a pool that open_pool made; this one is in memory only.")
        manifest = Path(json.loads((self.pool.folder / "pool.json").read_text(encoding="utf-8"))["manifest"])
        offsets = _map(self.pool.folder / "offsets.npy")
        if not len(offsets):
            raise ErnieError(f"rows are read one by one from JSONL only; write {manifest.name} as .jsonl first.")
        found: list[Row] = []
        with manifest.open("rb") as file:
            for start in offsets[rows].tolist():
                file.seek(start)
                found.append(_read_line(file.readline(), manifest))
        return found


def _read_line(line: bytes, manifest: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise ErnieError(f"{manifest} has changed since its pool was made; open the pool again.") from e
    source = row.get("source")
    if isinstance(source, str) and source and not os.path.isabs(source):
        row["source"] = os.path.normpath(manifest.parent / source)
    return row


def _iter_sums(pool: Pool, sampling: Sampling) -> Iterator[np.ndarray]:
    """For every category c: c + the cumulative sum of p(i | c) over its places; the last one is c + 1."""
    for category in range(len(pool.names)):
        sums = np.cumsum(inside_shares(pool, sampling, category))
        yield category + sums / sums[-1]


def _keep_sums(pool: Pool, sampling: Sampling, between: Path, inside: Path) -> None:
    """Write both sums beside the pool, category by category; the smaller file last, as it says that both are whole."""
    shares = category_shares(pool, sampling)
    with replacing(inside) as file:  # written, not mapped: a full disk kills a process that writes to a map
        header = {"descr": "<f8", "fortran_order": False, "shape": (len(pool),)}
        np.lib.format.write_array_header_1_0(file, header)
        for sums in _iter_sums(pool, sampling):
            file.write(sums.astype("<f8").tobytes())
    with replacing(between) as file:
        np.save(file, np.cumsum(shares))
