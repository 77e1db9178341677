"""Batches larger than one machine: the rows of a batch or grid, made by workers of a Ray cluster.

Every worker runs the same graph up to the node that has rows, once, and then makes rows as that node would: one code
path, so the same files. The driver loads no model. It gives rows out one by one, takes each finished PNG back, writes
it under its name, reads it again, and only then adds its line to the manifest. Rows of a worker that died are given
out again.

The pack and the models lie at the same paths on every machine.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..ernie_core.batch import BatchResult, Row, append_manifest, file_name, hash_pixels, read_manifest, run_rows
from ..ernie_core.errors import ErnieError, Interrupted
from ..ernie_core.ray_cluster import connect_ray

logger = logging.getLogger(__name__)

ENGINES = ("serial", "ray")
MAX_DEATHS = 3  # workers that one row may take with it before it is at fault
POLL_S = 0.5  # how often the driver looks whether it was asked to stop
KEPT_TEXTS = 64


class Ready(Interrupted):
    """Carries a node's studio out of a graph that a worker runs: from here on the driver says what to make."""

    def __init__(self, studio: Any):
        super().__init__("a worker's graph ran past the node that has rows")
        self.studio = studio


class RowWorker:
    """One process's models, loaded once, and the rows they make."""

    def __init__(self, job: Mapping[str, Any]):
        import torch

        from . import graph, host, load_node_classes

        torch.set_num_threads(job["threads"])  # another number adds up in another order: other last bits
        self.folder = Path(tempfile.mkdtemp(prefix="ernie_rows_"))
        models = None if job["models"] is None else Path(job["models"])
        host.session = host.Session(models=models, output=self.folder, input=Path(job["input"]), on_studio=self._take)
        workflow = graph.Workflow(prompt=job["prompt"], page=job["page"])
        try:
            graph.run_prompt(workflow, load_node_classes(), only=job["node"])
        except Ready as ready:
            self.studio = ready.studio
        self.callbacks = self.studio.painters()
        self.callbacks["encode"] = lru_cache(KEPT_TEXTS)(self.callbacks["encode"])

    @staticmethod
    def _take(studio: Any) -> None:
        raise Ready(studio)

    def make(self, settings: Mapping[str, Any]) -> tuple[bytes, str]:
        """(the PNG of a row, the hash of its pixels)."""
        row = Row.from_settings(settings)
        run_rows([row], self.folder, save=self.studio.save, **self.callbacks)
        path = self.folder / file_name(row)
        data, pixels = path.read_bytes(), hash_pixels(path)
        path.unlink()  # the driver keeps it; a row that is asked for again is made again
        return data, pixels


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where rows are made."""

    address: str | None
    """Of a running Ray cluster, "auto" for the one this machine belongs to; None starts one here."""
    workers: int
    """Processes with their own models; 0 = one per GPU of the cluster, or one where it has none."""


def make_job(workflow: Any, node: str) -> dict[str, Any]:
    """What a worker needs to run a graph up to `node`."""
    import torch

    from . import host

    models = host.session.models
    return {
        "prompt": workflow.prompt,
        "page": workflow.page,
        "node": node,
        "models": None if models is None else str(models.resolve()),
        "input": str(host.session.input.resolve()),
        "threads": torch.get_num_threads(),
    }


def make_elsewhere(
    rows: Sequence[Row],
    folder: Path,
    job: Mapping[str, Any],
    cluster: Cluster,
    *,
    on_row: Callable[[int, int, Row], None],
) -> BatchResult:
    """`run_rows` on a cluster: the same files and manifest lines, in the order in which they are finished.

    Raises:
        ErnieError: Ray is not installed or not reached; a row failed, or took `MAX_DEATHS` workers with it. Everything
            finished until then stays.
    """
    done = read_manifest(folder)
    pending = list({row.hash: row for row in rows if row.hash not in done}.values())
    if pending:
        _RayDriver(job, cluster, len(pending)).run(pending, lambda row, *answer: _keep(folder, row, *answer), on_row)
        done = read_manifest(folder)
    return BatchResult(
        files=[folder / done[row.hash] for row in rows], made=len(pending), kept=len(rows) - len(pending)
    )


def _keep(folder: Path, row: Row, data: bytes, pixels: str) -> None:
    """Write a finished picture, whole or not at all, and its manifest line once it reads back as the worker saw it."""
    path = folder / file_name(row)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if hash_pixels(part) != pixels:
            raise ErnieError(f"{path} did not arrive as it was made. Run again: the other pictures are kept.")
        os.replace(part, path)
    except OSError as e:
        raise ErnieError(f"{path} could not be written ({e.strerror or e}). Free some space and run again.") from e
    finally:
        part.unlink(missing_ok=True)
    append_manifest(folder, row, path.name)


class _RayDriver:
    def __init__(self, job: Mapping[str, Any], cluster: Cluster, count: int):
        ray, self.started_here = connect_ray(cluster.address, cluster.workers)
        self.ray, self.job = ray, dict(job)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.gpus_each = 1 if gpus else 0
        self.size = min(count, cluster.workers or gpus or 1)

    def run(
        self,
        rows: Sequence[Row],
        keep: Callable[[Row, bytes, str], None],
        on_row: Callable[[int, int, Row], None],
    ) -> None:
        from . import ROOT, host

        actor_class = self.ray.remote(num_cpus=1, num_gpus=self.gpus_each, max_restarts=0)(_actor_class())
        left, deaths = deque(rows), dict.fromkeys((row.hash for row in rows), 0)
        free: list[Any] = [actor_class.remote(str(ROOT), self.job) for _ in range(self.size)]
        busy: dict[Any, tuple[Any, Row]] = {}
        finished = 0
        try:
            while left or busy:
                host.throw_if_interrupted()
                while left and free:
                    row, actor = left.popleft(), free.pop()
                    on_row(min(finished + len(busy) + 1, len(rows)), len(rows), row)
                    busy[actor.make.remote(row.settings())] = (actor, row)
                ready, _ = self.ray.wait(list(busy), timeout=POLL_S)
                for reference in ready:
                    actor, row = busy.pop(reference)
                    try:
                        answer = self.ray.get(reference)
                    except self.ray.exceptions.RayActorError as e:
                        deaths[row.hash] += 1
                        why = " ".join(str(e).split())[-600:]
                        if deaths[row.hash] >= MAX_DEATHS or "creation task" in str(e):
                            raise ErnieError(
                                f"{row.label}: the workers that made it died ({why}). Look into "
                                "Ray's logs; finished pictures are kept."
                            ) from e
                        logger.warning("a worker died while it made %s; another one makes it again.", row.label)
                        left.appendleft(row)
                        free.append(actor_class.remote(str(ROOT), self.job))
                        continue
                    except self.ray.exceptions.RayTaskError as e:
                        raise ErnieError(f"{row.label}: {e.cause}") from e
                    keep(row, *answer)
                    finished += 1
                    free.append(actor)
        finally:
            for actor in [*free, *(actor for actor, _ in busy.values())]:
                self.ray.kill(actor)
            if self.started_here:
                self.ray.shutdown()


def _actor_class() -> type:
    """The class that Ray sends to the workers: it holds nothing of this package, which they load by its path."""

    class Actor:
        def __init__(self, root: str, job: dict):
            import importlib
            import importlib.util
            import sys

            name = "ernie_pack"
            spec = importlib.util.spec_from_file_location(
                name, f"{root}/__init__.py", submodule_search_locations=[root]
            )
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
            importlib.import_module(f"{name}.standalone").load_pack()
            self.worker = importlib.import_module(f"{name}.standalone.rows_elsewhere").RowWorker(job)

        def make(self, settings: dict) -> tuple:
            return self.worker.make(settings)

    return Actor
