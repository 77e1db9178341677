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
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..errors import ErnieError, Interrupted
from ..ray_cluster import connect_ray
from .manifest import Row, to_line

logger = logging.getLogger(__name__)

MAX_DEATHS = 2  # workers that a batch may take with it before its rows are tried one by one, and then a row
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
        answers.write(answer(stage, line.decode()).encode() + b"\n")
        answers.flush()


class _Worker:
    """One process of this machine; started when it is first needed, and again after its death."""

    def __init__(self, stage: Compute):
        self.stage = stage
        self.process: subprocess.Popen[bytes] | None = None
        self.death = ""
        self.ended = False

    def compute(self, rows: list[Row]) -> list[Row]:
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
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(_setup())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_threads()},
            )
            first = base64.b64encode(pickle.dumps(self.stage)) + b"\n"
        else:
            first = b""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(first + json.dumps(rows).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            code = self.process.wait()
            self.death = f"signal {-code}" if code < 0 else f"exit code {code}"
            logger.warning("a worker of %s died (%s); another one goes on.", self.stage.name, self.death)
            self.close()
            return None
        answer = json.loads(line)
        if "error" in answer:
            raise ErnieError(answer["error"])
        return answer["made"]

    def close(self) -> None:
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
    pool = [_Worker(stage) for _ in range(workers)]

    def work(worker: _Worker) -> None:
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

    Raises:
        ErnieError: Ray is not installed or not reached.
    """
    ray, connected_here = connect_ray(address, workers)
    try:
        while group := _take_group(batches):
            yield from _run_group(ray, stage, group, workers)
    finally:
        if connected_here:
            ray.shutdown()


def _take_group(batches: Iterator[Batch]) -> list[tuple[int, str]]:
    """The next batches as (number, rows in JSON), up to `_RAY_BYTES`."""
    group, size = [], 0
    while size < _RAY_BYTES and (batch := next(batches, None)) is not None:
        text = json.dumps(batch[1])
        group.append((batch[0], text))
        size += len(text)
    return group


def _run_group(ray: Any, stage: Compute, group: list[tuple[int, str]], workers: int) -> Iterator[Batch]:
    left = dict(group)
    try:
        for number, made in _map(ray, stage, left, workers):
            del left[number]
            yield number, made
    except ray.exceptions.RayError as e:
        logger.warning("Ray gave up on a batch of %s (%s); the rest are tried singly.", stage.name, _brief(e))
    for number, text in left.items():
        yield number, _try_alone(ray, stage, json.loads(text))


def _try_alone(ray: Any, stage: Compute, rows: list[Row]) -> list[Row]:
    try:
        return next(_map(ray, stage, {0: json.dumps(rows)}, 1))[1]
    except ray.exceptions.RayError as e:
        if len(rows) == 1:
            return [{"failed": f"the workers that made it died ({_brief(e)})"}]
    return [_try_alone(ray, stage, [row])[0] for row in rows]


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _map(ray: Any, stage: Compute, texts: dict[int, str], workers: int) -> Iterator[Batch]:
    """(number, columns) by a Ray Data pipeline.

    Raises:
        ErnieError: the stage cannot run at all.
        ray.exceptions.RayError: a batch took `MAX_DEATHS` workers with it.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    gpus = int(ray.cluster_resources().get("GPU", 0)) if getattr(stage, "wants_gpu", False) else 0
    items = [{"number": number, "rows": text} for number, text in texts.items()]
    pipeline = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _actor_class(),
        fn_constructor_args=(_setup(), pickle.dumps(stage), _threads()),
        concurrency=min(workers, len(items)),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        max_restarts=MAX_DEATHS,
        max_task_retries=MAX_DEATHS,
    )
    for item in pipeline.iter_rows():
        answer = json.loads(item["answer"])
        if "error" in answer:
            raise ErnieError(answer["error"])
        yield item["number"], answer["made"]


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
            self.answer = importlib.import_module(setup["module"]).answer
            self.stage = pickle.loads(stage)

        def __call__(self, item: dict) -> dict:
            return {"number": item["number"], "answer": self.answer(self.stage, item["rows"])}

    return Actor


def answer(stage: Compute, rows: str) -> str:
    """What a worker says to a batch, in JSON: {"made": columns}, or {"error": reason} when the stage cannot run."""
    try:
        return json.dumps({"made": compute(stage, json.loads(rows))})
    except (ErnieError, Interrupted) as e:
        return json.dumps({"error": str(e)})
