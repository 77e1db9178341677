"""Running a stage over a manifest: what is there is not made again, and a kill at any moment loses one batch at most.

While a stage runs, `TARGET.parts` holds one line per finished batch: the digest of what it was made from, and its
columns. A restart reads it, leaves a half-written last line out, and makes only what is missing; the end joins source
and columns into TARGET, whole or not at all. So TARGET has the same bytes with every engine, every number of workers
and every interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, get_args

from ..errors import ErnieError, Interrupted
from ..file_lock import try_lock
from .manifest import Manifest, Row, count_rows, read_rows, to_line, write_rows
from .workers import Batch, run_here, run_processes, run_ray

Engine = Literal["here", "processes", "ray"]
OnProgress = Callable[[int, int, str], None]

_WINDOW = 10_000  # rows of an earlier TARGET that are looked ahead for one that is needed
_SYNC_S = 1.0  # what a power cut may cost; a killed process loses nothing that was appended


class Stage(Protocol):
    """A pure function from rows to new columns.

    It is picklable, loads its model lazily, once per process, and does not read the columns that it adds (it is given
    rows without them). What it gives may not depend on which other rows are in the batch: round numbers whose last bits
    do. An ErnieError of `__call__` stops the run; any other exception fails the rows that it comes from.
    An attribute `wants_gpu = True` gives each Ray worker a GPU where the cluster has any.
    """

    @property
    def name(self) -> str:
        """What its rows say it is: "ingest", "categories", "captions", ..."""
        ...

    @property
    def adds(self) -> tuple[str, ...]:
        """Columns that it may add."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns without which a row is passed by."""
        ...

    @property
    def batch_size(self) -> int: ...

    def key(self) -> str:
        """A hash of everything that decides its output; kept in row["made_by"][name]."""
        ...

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The new columns of each row, in order; {"failed": reason} where a row cannot have any."""
        ...


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did."""

    stage: str
    path: Path
    rows: int
    made: int
    """Computed in this run."""
    kept: int
    """There already: in SOURCE, in an earlier TARGET, or from a run that was interrupted."""
    passed_by: int
    failed: int
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.made / self.seconds:.1f} rows/s" if self.made and self.seconds > 0 else ""
        return (
            f"{self.stage}: {self.rows} rows, {self.made} made, {self.kept} already there, {self.passed_by} passed by, "
            f"{self.failed} failed; {self.seconds:.1f} s{rate}"
        )


def run_stage(
    stage: Stage,
    source: Manifest | Path | str,
    target: Path | str,
    *,
    engine: str = "here",
    address: str = "",
    workers: int = 0,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Summary:
    """Write `target`: the rows of `source`, in order, with the stage's columns.

    Rows that `source` or an earlier `target` has with the stage's key are not computed again; failed ones are. Rows
    that a filter dropped, that have a `problem` or lack a column the stage needs are passed by, and say why.

    Args:
        engine: "here" (this process), "processes" (of this machine), "ray" (Ray Data).
        address: of a Ray cluster; "" starts one here.
        workers: processes; 0 = one per CPU of this machine (Ray: of the cluster that is started). More than 1 is only
            for "processes" and "ray".
        on_progress: called with (rows done, rows, stage); may raise to stop.
        should_stop: asked between batches.

    Raises:
        ErnieError: bad settings, another run on `target`, the stage cannot run, a full disk. Finished batches are kept.
        Interrupted: `should_stop` said so; run again to go on.
    """
    source = source.path if isinstance(source, Manifest) else Path(source).expanduser()
    target = Path(target).expanduser()
    workers = _check(engine, address, workers)
    total = count_rows(source)
    if target.exists() and target.samefile(source):
        raise ErnieError(f"{target} cannot be source and target at once; give the target another name.")
    start = time.monotonic()
    before = _stamp(source)
    with _log(target) as log:
        run = _Run(stage, source, target, log)
        batches = run.unfinished(lambda done: on_progress and on_progress(done, total, stage.name))
        if engine == "here":
            answers = run_here(stage, batches)
        elif engine == "processes":
            answers = run_processes(stage, batches, workers)
        else:
            answers = run_ray(stage, batches, workers, address)
        made = 0
        try:
            for number, columns in answers:
                run.keep(number, columns)
                made += len(columns)
                if should_stop is not None and should_stop():
                    raise Interrupted(f"{stage.name} was stopped; what is made is kept. Run again to go on.")
        finally:
            answers.close()  # its workers end now
        if _stamp(source) != before:
            raise ErnieError(f"{source} changed while {stage.name} ran; run again (what is made is kept).")
        counts = run.join(made)
    if on_progress is not None:
        on_progress(total, total, stage.name)
    return Summary(stage=stage.name, path=target, made=made, seconds=time.monotonic() - start, **counts)


def _check(engine: str, address: str, workers: int) -> int:
    if engine not in get_args(Engine):
        raise ErnieError(f"engine must be one of {', '.join(get_args(Engine))}; got {engine!r}.")
    if workers < 0:
        raise ErnieError(f"workers must be 0 (one per CPU) or more, got {workers}.")
    if engine == "here" and workers > 1:
        raise ErnieError(f'engine "here" has one worker, got {workers}; take "processes" or "ray".')
    if address and engine != "ray":
        raise ErnieError(f'an address is for engine "ray", not {engine!r}.')
    return workers or os.cpu_count() or 1


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@contextmanager
def _log(target: Path) -> Iterator[IO[bytes]]:
    """TARGET.parts, open and locked; deleted once TARGET is there, empty or not."""
    path = target.with_name(f"{target.name}.parts")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as e:
        raise ErnieError(f"{target} cannot be written ({e.strerror or e}). Take another folder.") from e
    with file:
        if not try_lock(file):
            raise ErnieError(f"another process is making {target}; wait for it, or take another name.")
        yield file
    path.unlink(missing_ok=True)


def bare(row: Row, stage: Stage) -> Row:
    """`row` without anything that `stage` says of it: what the stage is given."""
    left = {k: v for k, v in row.items() if k not in stage.adds}
    for column in ("made_by", "failed", "passed_by"):
        values = {k: v for k, v in left.get(column, {}).items() if k != stage.name}
        left.pop(column, None)
        if values:
            left[column] = values
    return left


def _digest(key: str, lines: list[bytes]) -> bytes:
    digest = hashlib.sha256(key.encode())
    for line in lines:
        digest.update(line)
    return digest.digest()


class _Earlier:
    """Columns in an earlier TARGET, found by the rows that they were made from, a window at a time."""

    def __init__(self, stage: Stage, key: str, target: Path):
        self.stage, self.key = stage, key
        self.rows = read_rows(target) if target.is_file() else iter(())
        self.window: dict[bytes, Row] = {}
        self.misses = 0

    def take(self, line: bytes) -> Row | None:
        """The columns of the row whose bare line this is, None where there are none."""
        if self.misses > _WINDOW:  # the rows ahead are of no use: they are gone from the source
            for digest in list(self.window)[: _WINDOW // 2]:
                del self.window[digest]
            self.misses = 0
        while len(self.window) < _WINDOW and (row := next(self.rows, None)) is not None:
            if row.get("made_by", {}).get(self.stage.name) == self.key:
                self.window[_digest("", [to_line(bare(row, self.stage))])] = row
        if not self.window:
            return None
        row = self.window.pop(_digest("", [line]), None)
        self.misses = 0 if row is not None else self.misses + 1
        return row if row is None else {k: row[k] for k in self.stage.adds if k in row}


class _Run:
    """One run of a stage: what is to be made, the log of what is made, and the join of both."""

    def __init__(self, stage: Stage, source: Path, target: Path, log: IO[bytes]):
        self.stage, self.source, self.target, self.log = stage, source, target, log
        self.key = stage.key()
        self.finished = self._read_log()
        self.offsets = array("q")  # by batch number: where its line stands in the log, -1 = not yet
        self.digests: dict[int, bytes] = {}  # of batches that are being made
        self.synced = time.monotonic()

    def _read_log(self) -> dict[bytes, int]:
        """Digest -> place of its line; what a kill or a power cut left damaged is cut off or passed over."""
        finished: dict[bytes, int] = {}
        self.log.seek(0)
        place = 0
        for line in iter(self.log.readline, b""):
            if not line.endswith(b"\n"):
                break
            with suppress(ValueError, KeyError, TypeError):  # a torn line in the middle: its batch is made again
                finished[bytes.fromhex(json.loads(line)["batch"])] = place
            place += len(line)
        self.log.truncate(place)
        return finished

    def _decide(self) -> Iterator[tuple[Row, Row | None, Row | None, str]]:
        """(row, columns that are there, bare row to make columns for, why it is passed by) of each row of the source.

        Both passes over the source go through here, so that they decide alike.
        """
        earlier = _Earlier(self.stage, self.key, self.target)
        for row in read_rows(self.source):
            if row.get("kept") is False:
                yield row, None, None, f"dropped by {row.get('dropped_by') or 'a filter'}"
            elif row.get("problem") and "problem" not in self.stage.adds:
                yield row, None, None, "has a problem"
            elif missing := [name for name in self.stage.needs if row.get(name) is None]:
                yield row, None, None, f"has no {', '.join(missing)}"
            elif row.get("made_by", {}).get(self.stage.name) == self.key:
                yield row, {k: row[k] for k in self.stage.adds if k in row}, None, ""
            else:
                asked = bare(row, self.stage)
                columns = earlier.take(to_line(asked))
                yield row, columns, asked if columns is None else None, ""

    def unfinished(self, on_row: Callable[[int], Any]) -> Iterator[Batch]:
        """The batches that the log does not have."""
        asked: list[Row] = []
        size = max(1, self.stage.batch_size)
        for done, (_, _, row, _) in enumerate(self._decide()):
            if row is not None:
                asked.append(row)
                if len(asked) == size:
                    yield from self._batch(asked)
                    asked = []
            if done % size == 0:
                on_row(done)
        if asked:
            yield from self._batch(asked)

    def _batch(self, rows: list[Row]) -> Iterator[Batch]:
        digest = _digest(self.key, [to_line(row) for row in rows])
        number = len(self.offsets)
        self.offsets.append(self.finished.get(digest, -1))
        if self.offsets[number] < 0:
            self.digests[number] = digest
            yield number, rows

    def keep(self, number: int, columns: list[Row]) -> None:
        """Append a finished batch to the log."""
        allowed = {*self.stage.adds, "failed"}
        for made in columns:
            if strange := made.keys() - allowed:
                names = ", ".join(sorted(strange))
                raise ErnieError(f"the stage {self.stage.name} gave {names}, which it does not say that it adds.")
        line = to_line({"batch": self.digests.pop(number).hex(), "made": columns})
        try:
            self.offsets[number] = self.log.seek(0, os.SEEK_END)
            self.log.write(line)
            self.log.flush()
            if time.monotonic() - self.synced > _SYNC_S:
                os.fsync(self.log.fileno())
                self.synced = time.monotonic()
        except OSError as e:
            raise ErnieError(
                f"{self.log.name} cannot be written ({e.strerror or e}). Free some space, run again."
            ) from e

    def join(self, made: int) -> dict[str, int]:
        """Write the target; returns the counts of a Summary."""
        counts = {"rows": 0, "kept": -made, "passed_by": 0, "failed": 0}

        def rows() -> Iterator[Row]:
            batch: Iterator[Row] = iter(())
            number = 0
            for row, columns, asked, reason in self._decide():
                counts["rows"] += 1
                if asked is not None:
                    columns = next(batch, None)
                    if columns is None:
                        batch = iter(self._made(number))
                        number += 1
                        columns = next(batch)
                if columns is None:
                    counts["passed_by"] += 1
                    yield self._with(row, "passed_by", reason)
                elif "failed" in columns:
                    counts["failed"] += 1
                    counts["kept"] += 1
                    yield self._with(row, "failed", str(columns["failed"]))
                else:
                    counts["kept"] += 1
                    new = {k: columns[k] for k in self.stage.adds if k in columns}
                    yield self._with({**bare(row, self.stage), **new}, "made_by", self.key)

        write_rows(self.target, rows())
        return counts

    def _made(self, number: int) -> list[Row]:
        self.log.seek(self.offsets[number])
        return json.loads(self.log.readline())["made"]

    def _with(self, row: Row, column: str, value: str) -> Row:
        """`row` with the stage's word on it in one of its three columns, and in no other."""
        name, left = self.stage.name, dict(row)
        said = {c: {k: v for k, v in left.pop(c, {}).items() if k != name} for c in ("made_by", "failed", "passed_by")}
        said[column][name] = value
        return left | {c: values for c, values in said.items() if values}
