"""Taking pictures out: too small, too long, there twice. A row that is taken out stays, and says why.

A picture counts as a duplicate of one that is kept, never of one that is dropped: likeness does not travel along a
chain of pictures. Of several alike, the one with most pixels is kept, then the one with most bytes, then the one whose
path comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ErnieError
from .manifest import Manifest, Row, count_rows, read_rows, write_rows

HASH_BITS = 128
MAX_BITS = 15  # of a banded search that misses nothing: 16 bands of 8 bits
_COLOUR = 6  # levels by which the mean colours of near duplicates may differ, as `pictures.near_duplicates` takes it
_BLOCK = 2048  # rows of a band's bucket that are compared at once
_CELL = 2 * _COLOUR + 1


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What is kept; the neutral value of each lets everything through."""

    min_side: int = 0
    """Pixels of the shorter side; 0 = any."""
    max_side: int = 0
    """Pixels of the longer side; 0 = any."""
    min_pixels: int = 0
    """Width times height; 0 = any."""
    max_aspect: float = 0.0
    """Longest side ratio; 0 = any."""
    exact: bool = False
    """Whether files with the same bytes are kept once."""
    near_bits: int = -1
    """Pictures whose perceptual hashes differ in no more of 128 bits are kept once; -1 = not looked for."""

    def __post_init__(self) -> None:
        for name in ("min_side", "max_side", "min_pixels"):
            if getattr(self, name) < 0:
                raise ErnieError(f"{name} must be 0 (any) or more, got {getattr(self, name)}.")
        if self.max_aspect and not self.max_aspect >= 1:
            raise ErnieError(f"max_aspect must be 0 (any) or at least 1, got {self.max_aspect:g}.")
        if not -1 <= self.near_bits <= MAX_BITS:
            raise ErnieError(f"near_bits must lie between -1 (off) and {MAX_BITS}, got {self.near_bits}.")

    def refuse(self, width: int, height: int) -> str:
        """Why a picture of this size is dropped, "" when it is kept."""
        short, long = min(width, height), max(width, height)
        if short < self.min_side:
            return f"size: {width} x {height}; the shorter side must have {self.min_side}"
        if self.max_side and long > self.max_side:
            return f"size: {width} x {height}; the longer side may have {self.max_side}"
        if width * height < self.min_pixels:
            return f"size: {width} x {height}; {self.min_pixels} pixels are wanted"
        if self.max_aspect and long > self.max_aspect * short:
            return f"aspect: {long / short:.2f}; at most {self.max_aspect:g}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What filters did."""

    path: Path
    rows: int
    kept: int
    dropped: dict[str, int]
    """Rows that these filters took out, by the filter's name."""
    passed_by: int
    """Rows without a picture that could be measured, or dropped before."""

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.dropped.items())) or "nothing"
        return f"filter: {self.rows} rows, {self.kept} kept, {self.passed_by} passed by; dropped: {counts}"


def filter_rows(
    source: Manifest | Path | str,
    target: Path | str,
    filters: Filters,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Filtered:
    """Write `target`: the rows of `source`, with `kept` false and `dropped_by` where a filter takes them out.

    Memory holds a few numbers per row, not the rows. The file is written whole or not at all.

    Raises:
        ErnieError: no manifest, or it cannot be written.
    """
    path = source.path if isinstance(source, Manifest) else Path(source).expanduser()
    target = Path(target).expanduser()
    if target.exists() and target.samefile(path):
        raise ErnieError(f"{target} cannot be source and target at once; give the target another name.")
    total = count_rows(path)

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(min(done, total), total, "filter")

    reasons, owners = _decide(path, filters, tell)
    names = {place: "" for _, place in owners.values()}
    for place, row in enumerate(read_rows(path) if names else ()):
        if place in names:
            names[place] = row["source"]
    dropped: Counter[str] = Counter()
    counts = {"rows": 0, "kept": 0, "passed_by": 0}

    def rows() -> Iterator[Row]:
        for place, row in enumerate(read_rows(path)):
            counts["rows"] += 1
            reason = reasons.get(place, "")
            if place in owners:
                how, owner = owners[place]
                reason = f"{how} {names[owner]}"
            if reason:
                dropped[reason.partition(":")[0]] += 1
                yield row | {"kept": False, "dropped_by": reason}
                continue
            counts["kept" if _measured(row) else "passed_by"] += 1
            yield row

    write_rows(target, rows())
    tell(total)
    return Filtered(path=target, dropped=dict(dropped), **counts)


def _measured(row: Row) -> bool:
    return row.get("kept") is not False and bool(row.get("id")) and "problem" not in row


def _decide(
    path: Path, filters: Filters, tell: Callable[[int], None]
) -> tuple[dict[int, str], dict[int, tuple[str, int]]]:
    """(place -> why it is dropped, place -> (what it is, place of what is kept in its stead))."""
    reasons: dict[int, str] = {}
    places: list[int] = []
    ids: list[bytes] = []
    hashes: list[bytes] = []
    order: list[tuple[int, int, str]] = []
    for place, row in enumerate(read_rows(path)):
        if place % 1000 == 0:
            tell(place)
        if not _measured(row):
            continue
        reason = filters.refuse(row["width"], row["height"])
        if reason:
            reasons[place] = reason
        elif filters.exact or filters.near_bits >= 0:
            places.append(place)
            ids.append(bytes.fromhex(row["id"])[:16])
            hashes.append(bytes.fromhex(row["phash"]))
            order.append((-row["width"] * row["height"], -row.get("bytes", 0), row["source"]))
    best_first = sorted(range(len(places)), key=lambda i: (*order[i], places[i]))
    owners: dict[int, tuple[str, int]] = {}
    left = best_first
    if filters.exact:
        first: dict[bytes, int] = {}
        left = []
        for i in best_first:
            if ids[i] in first:
                owners[places[i]] = ("exact duplicate: the same file as", places[first[ids[i]]])
            else:
                first[ids[i]] = i
                left.append(i)
    if filters.near_bits >= 0 and left:
        kept = keep_first_of_alike([hashes[i] for i in left], filters.near_bits)
        for i, owner in zip(left, kept, strict=True):
            if left[owner] != i:
                owners[places[i]] = ("near duplicate: looks the same as", places[left[owner]])
    return reasons, owners


def keep_first_of_alike(hashes: list[bytes], max_bits: int) -> list[int]:
    """For each perceptual hash the place of the first kept one that it is like: its own where it is kept.

    Alike: at most `max_bits` of the first 128 bits differ, and at most 6 levels of each mean colour. Hashes that are
    alike share at least one of `max_bits` + 1 bands, so only those are compared: the result is that of comparing all
    pairs. Equal hashes count once, so that a thousand blank pages cost what one does.

    Args:
        hashes: of 19 bytes each, as `pictures.perceptual_hash` gives them in hex; the best first.
    """
    kept = list(range(len(hashes)))
    same: dict[bytes, int] = {}
    distinct: list[int] = []
    for i, value in enumerate(hashes):
        if same.setdefault(value, i) == i:
            distinct.append(i)
    rows = np.frombuffer(b"".join(hashes[i] for i in distinct), np.uint8).reshape(-1, HASH_BITS // 8 + 3)
    alike: dict[int, list[int]] = {}
    for first, second in _pairs(rows, max_bits):
        alike.setdefault(second, []).append(first)
    owner = list(range(len(distinct)))
    for second in sorted(alike):
        before = [first for first in sorted(alike[second]) if owner[first] == first]
        if before:
            owner[second] = before[0]
    of_distinct = {i: distinct[owner[k]] for k, i in enumerate(distinct)}
    for i, value in enumerate(hashes):
        kept[i] = of_distinct[same[value]]
    return kept


def _pairs(rows: np.ndarray, max_bits: int) -> set[tuple[int, int]]:
    """Pairs (i, j), i < j, of hashes that are alike. rows: uint8 [N, 19]."""
    bits = np.unpackbits(rows[:, : HASH_BITS // 8], axis=1)
    # neighbouring bits are alike in most pictures: bands of bits from all over the picture tell more apart
    bits = bits[:, np.random.default_rng(0).permutation(HASH_BITS)]
    packed = np.packbits(bits, axis=1)
    colours = rows[:, HASH_BITS // 8 :].astype(np.int16)
    found: set[tuple[int, int]] = set()
    for band in np.array_split(np.arange(HASH_BITS), max_bits + 1):
        keys = np.packbits(bits[:, band], axis=1)
        for members in _buckets(keys, colours):
            _compare(members, packed, colours, max_bits, found)
    return found


def _buckets(keys: np.ndarray, colours: np.ndarray) -> Iterator[np.ndarray]:
    """Rows with one band in common whose mean colours may be near, each set of rows once or more.

    Two colours that differ by at most 6 levels share a cell of 13 levels in at least one of two grids per channel.
    """
    for shift in np.ndindex(2, 2, 2):
        cells = (colours + np.array(shift) * (_CELL // 2 + 1)) // _CELL
        words = np.zeros(len(keys), np.uint64)
        for column in (*keys.T, *cells.T):  # a hash: two keys that meet by chance only cost a comparison
            words = (words ^ column.astype(np.uint64)) * np.uint64(0x100000001B3)
        order = np.argsort(words, kind="stable")
        edges = np.flatnonzero(words[order][1:] != words[order][:-1]) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            yield np.sort(order[start:end])


def _compare(
    members: np.ndarray, packed: np.ndarray, colours: np.ndarray, max_bits: int, found: set[tuple[int, int]]
) -> None:
    for start in range(0, len(members), _BLOCK):
        left = members[start : start + _BLOCK]
        for other in range(start, len(members), _BLOCK):
            right = members[other : other + _BLOCK]
            near = (np.abs(colours[left, None] - colours[None, right]) <= _COLOUR).all(-1)
            a, b = np.nonzero(near)
            a, b = left[a], right[b]
            a, b = a[a < b], b[a < b]
            if len(a):
                close = _POPCOUNT[packed[a] ^ packed[b]].sum(axis=1, dtype=np.int16) <= max_bits
                found.update(zip(a[close].tolist(), b[close].tolist(), strict=True))


_POPCOUNT = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)
