"""Who computes the batches of a stage: this process, worker processes of this machine, or Ray Data on a cluster.

All three give the same columns: a stage is a pure function of its rows, and batches are cut before they are given out.
A worker that dies (no memory, a decoder that crashes) is replaced and its batch given out again; a row that keeps
taking workers with it fails, and the others of its batch are kept.

A worker imports the package under the name that it has here, without running the pack's own `__init__`, so that a
pickled stage finds its class; stages are pickled only on the way to workers of this same run.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..errors import ErnieError, Interrupted
from ..ray_cluster import connect_ray
from .manifest import Row, to_line

logger = logging.getLogger(__name__)

MAX_DEATHS = 2  # processes that a batch may take with it before its rows are tried one by one, and then a row
_RAY_BYTES = 64 << 20  # of rows that one Ray Data execution is given: the driver's memory stays constant

Batch = tuple[int, list[Row]]  # (its number, its rows)


class Compute(Protocol):
    """The part of a stage that a worker needs."""

    @property
    def name(self) -> str: ...
    def __call__(self, rows: list[Row]) -> list[Row]: ...


def compute(stage: Compute, rows: list[Row]) -> list[Row]:
    """The stage's new columns for each row; a row on which it breaks gets {"failed": reason}, the others theirs.

    Raises:
        ErnieError, Interrupted: what the stage raises when it cannot run at all, such as a missing model.
    """
    try:
        made = stage(rows)
    except (ErnieError, Interrupted):
        raise
    except Exception as e:  # anything a decoder, a model or a server throws belongs to one row
        if len(rows) > 1:
            return [compute(stage, [row])[0] for row in rows]
        logger.debug("%s failed on %s", stage.name, rows[0].get("source"), exc_info=True)
        return [{"failed": f"{type(e).__name__}: {e}"}]
    if len(made) != len(rows):
        raise ErnieError(f"the stage {stage.name} gave {len(made)} results for {len(rows)} rows.")
    return [_plain(columns) for columns in made]


def _plain(columns: Row) -> Row:
    """Columns as they are after a way through JSON, so that they are the same with every engine."""
    try:
        return json.loads(to_line(columns))
    except ErnieError as e:
        return {"failed": str(e)}


def run_here(stage: Compute, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """(number, columns of its rows) of each batch, made in this process."""
    for number, rows in batches:
        yield number, compute(stage, rows)


# --- worker processes -----------------------------------------------------------------------------------------

_START = """
import importlib, json, sys, types
setup = json.loads(sys.argv[1])
sys.path[:] = setup["path"]
for name, folder in setup["packages"]:
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [folder] if folder else []
importlib.import_module(setup["module"]).serve()
"""


def _setup() -> dict[str, Any]:
    """What a new interpreter needs to import this module under the name that it has here."""
    root = Path(__file__).resolve().parents[2]
    above = __name__.split(".")[:-3]  # packages that ernie_core lies in: none, the pack, or a folder of packs and it
    packages = [(".".join(above[: i + 1]), str(root) if i + 1 == len(above) else "") for i in range(len(above))]
    path = [str(root)] * (not above) + [os.path.abspath(p) for p in sys.path]
    return {"module": __name__, "packages": packages, "path": path}


def serve() -> None:
    """A worker's life: the stage comes as the first line of standard input, then a batch per line until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    stage = pickle.loads(base64.b64decode(sys.stdin.buffer.readline()))
    for line in sys.stdin.buffer:
        answers.write(_answer(lambda line=line: compute(stage, json.loads(line))).encode() + b"\n")
        answers.flush()


def _answer(make: Callable[[], list[Row]]) -> str:
    """What a worker says to a batch, in JSON: {"made": columns}, or {"error": reason} when the stage cannot run."""
    try:
        return json.dumps({"made": make()})
    except (ErnieError, Interrupted) as e:
        return json.dumps({"error": str(e)})


def _read_answer(text: str | bytes) -> list[Row]:
    answer = json.loads(text)
    if "error" in answer:
        raise ErnieError(answer["error"])
    return answer["made"]


class Worker:
    """One process of this machine; started when it is first needed, and again after its death."""

    def __init__(self, stage: Compute):
        self.stage = stage
        self.process: subprocess.Popen[bytes] | None = None
        self.death = ""
        self.ended = False

    def answer(self, rows: str) -> str:
        """`compute` from JSON to JSON, as `_answer` has it."""
        return _answer(lambda: self.compute(json.loads(rows)))

    def compute(self, rows: list[Row]) -> list[Row]:
        """The rows' columns; those of a row that `MAX_DEATHS` processes died of are its failure.

        Raises:
            ErnieError: the stage cannot run.
            Interrupted: the run has ended.
        """
        for _ in range(MAX_DEATHS):
            made = self._ask(rows)
            if made is not None:
                return made
        if len(rows) > 1:
            return [self.compute([row])[0] for row in rows]
        return [{"failed": f"{MAX_DEATHS} worker processes died while they made it ({self.death})"}]

    def _ask(self, rows: list[Row]) -> list[Row] | None:
        """The rows' columns; None when the process died of them."""
        if self.ended:
            raise Interrupted("the run has ended.")
        first = b""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(_setup())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_threads()},
            )
            first = base64.b64encode(pickle.dumps(self.stage)) + b"\n"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(first + json.dumps(rows).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if line.endswith(b"\n"):
            return _read_answer(line)
        code = self.process.wait()
        self.death = f"signal {-code}" if code < 0 else f"exit code {code}"
        logger.warning("a worker of %s died (%s); another one goes on.", self.stage.name, self.death)
        self.close()
        return None

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _threads() -> dict[str, str]:
    """As many threads as here: another number adds up in another order, which gives other last bits."""
    torch = sys.modules.get("torch")
    return {} if torch is None else {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def run_processes(stage: Compute, batches: Iterator[Batch], workers: int) -> Generator[Batch, None, None]:
    """As `run_here`, by `workers` processes, in the order in which batches are finished."""
    tasks: queue.Queue[Batch | None] = queue.Queue()
    answers: queue.Queue[tuple[int, list[Row] | Exception]] = queue.Queue()
    pool = [Worker(stage) for _ in range(workers)]

    def work(worker: Worker) -> None:
        while (task := tasks.get()) is not None:
            number, rows = task
            try:
                answers.put((number, worker.compute(rows)))
            except Exception as e:  # noqa: BLE001  it is raised again where the answers are read
                answers.put((number, e))

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in pool]
    for thread in threads:
        thread.start()
    waiting = 0
    try:
        more = True
        while more or waiting:
            while more and waiting < 2 * workers:
                batch = next(batches, None)
                more = batch is not None
                if batch is not None:
                    tasks.put(batch)
                    waiting += 1
            if waiting:
                number, made = answers.get()
                waiting -= 1
                if isinstance(made, Exception):
                    raise made
                yield number, made
    finally:
        while not tasks.empty():
            tasks.get_nowait()
        for worker in pool:
            tasks.put(None)
            worker.ended = True
            if worker.process is not None:
                worker.process.kill()
        for worker, thread in zip(pool, threads, strict=True):
            thread.join()
            worker.close()


# --- Ray Data -------------------------------------------------------------------------------------------------


def run_ray(stage: Compute, batches: Iterator[Batch], workers: int, address: str) -> Generator[Batch, None, None]:
    """As `run_here`, by `workers` actors of a Ray Data pipeline, in the order in which batches are finished.

    An actor computes in a process of its own, as `run_processes` does: what kills that does not kill the actor. Ray
    starts the actors of a lost machine again.

    Raises:
        ErnieError: Ray is not installed, not reached, or gave up; finished batches were given out before.
    """
    ray, connected_here = connect_ray(address, workers)
    try:
        while group := _take_group(batches):
            yield from _map(ray, stage, group, workers)
    except ray.exceptions.RayError as e:
        reason = " ".join(str(e).split())[:300]
        raise ErnieError(f"Ray gave up on {stage.name} ({reason}). What is made is kept; run again to go on.") from e
    finally:
        if connected_here:
            ray.shutdown()


def _take_group(batches: Iterator[Batch]) -> list[dict[str, Any]]:
    """The next batches as {number, rows in JSON}, up to `_RAY_BYTES`."""
    group, size = [], 0
    while size < _RAY_BYTES and (batch := next(batches, None)) is not None:
        text = json.dumps(batch[1])
        group.append({"number": batch[0], "rows": text})
        size += len(text)
    return group


def _map(ray: Any, stage: Compute, group: list[dict[str, Any]], workers: int) -> Iterator[Batch]:
    try:
        import ray.data
    except ImportError as e:
        raise ErnieError(f"--engine ray needs Ray's data part as well ({e}): pip install 'ray[data]'.") from e
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0)) if getattr(stage, "wants_gpu", False) else 0
    pipeline = ray.data.from_items(group, override_num_blocks=len(group)).map(
        _actor_class(),
        fn_constructor_args=(_setup(), pickle.dumps(stage), _threads()),
        concurrency=min(workers, len(group)),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    for item in pipeline.iter_rows():
        yield item["number"], _read_answer(item["answer"])


def _actor_class() -> type:
    """The class that Ray sends to its workers: it holds nothing of this package, which they load by its path."""

    class Actor:
        def __init__(self, setup: dict, stage: bytes, threads: dict):
            import importlib
            import os
            import pickle
            import sys
            import types

            os.environ.update(threads)
            sys.path[:0] = [p for p in setup["path"] if p not in sys.path]
            for name, folder in setup["packages"]:
                if name not in sys.modules:
                    package = sys.modules[name] = types.ModuleType(name)
                    package.__path__ = [folder] if folder else []
            self.worker = importlib.import_module(setup["module"]).Worker(pickle.loads(stage))

        def __call__(self, item: dict) -> dict:
            return {"number": item["number"], "answer": self.worker.answer(item["rows"])}

    return Actor
