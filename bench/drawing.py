"""Draws from a manifest of ten million rows: how long the pool takes, how fast one core draws, and what a worker holds.

The manifest is made up (10,000 categories, long-tailed, scores between 0 and 100) and written once under out/bench. The
draws are measured in a process of its own, which opens the pool as a worker does (Linux: memory is read from /proc).
Times are processor time: other processes' turns on the core do not count.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..ernie_core.curation.draws import Draws, open_pool
from ..ernie_core.curation.sampling import Sampling
from .compare import Row
from .tiny_runs import WORK, remember

ROWS, CATEGORIES = 10_000_000, 10_000
DRAWS, BATCH = 1_000_000, 4096
_CHUNK = 250_000


def write_manifest(path: Path) -> None:
    """ROWS lines; a category's size falls as 1 / rank."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, CATEGORIES + 1)
    bounds = np.cumsum(shares / shares.sum())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, ROWS, _CHUNK):
            categories = np.minimum(np.searchsorted(bounds, rng.random(_CHUNK)), CATEGORIES - 1).tolist()
            scores = rng.normal(50, 15, _CHUNK).tolist()
            file.writelines(
                f'{{"id":"{i:x}","source":"{i % 1000}/{i}.jpg","category":"k{c % 100}/c{c}","score":{s:.2f}}}\n'
                for i, c, s in zip(range(start, start + _CHUNK), categories, scores, strict=True)
            )


def memory_kib() -> dict[str, int]:
    """Resident memory of this process: its own pages, and pages of files that all workers share (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[f"Rss{name}"].split()[0]) for name in ("Anon", "File")}


def work(manifest: Path) -> dict[str, float]:
    """What a worker measures: seconds to open, draws per second in batches, its memory and how it grows by drawing."""
    empty, began = memory_kib(), time.process_time()
    draws = Draws(open_pool(manifest), Sampling())
    opened = time.process_time() - began
    draws.batch(0, BATCH)
    before, began = memory_kib(), time.process_time()
    for step in range(DRAWS // BATCH):
        draws.batch(step, BATCH)
    seconds, after = time.process_time() - began, memory_kib()
    return {
        "open_s": opened,
        "per_second": DRAWS // BATCH * BATCH / seconds,
        "anon_mib": (after["Anon"] - before["Anon"]) / 1024,
        "held_mib": (after["Anon"] - empty["Anon"]) / 1024,
        "file_mib": (after["File"] - empty["File"]) / 1024,
    }


def measure() -> Iterator[Row]:
    """Rows: making the pool, opening it, drawing, and memory."""
    manifest = WORK / f"rows-{ROWS}.jsonl"
    if not manifest.is_file():
        write_manifest(manifest)
    began = time.process_time()
    pool = open_pool(manifest)
    made = time.process_time() - began
    began = time.process_time()
    Draws(pool, Sampling())
    summed = time.process_time() - began
    # a process of its own, so that the pool was not in its memory before
    with multiprocessing.get_context("fork").Pool(1) as worker:
        found = worker.apply(work, (manifest,))
    remember("drawing", found | {"pool_s": made, "sums_s": summed})
    million = f"{ROWS / 1e6:g} million rows"
    yield Row(name=f"pool of {million} made once", ours=f"{made:.0f} s", target="", met=None, untold="once")
    yield Row(name=f"sums of a plan over {million}", ours=f"{summed:.1f} s", target="", met=None, untold="once")
    yield Row(
        name=f"draws per second, one core, {million}",
        ours=f"{found['per_second']:,.0f}",
        target="at least 200,000",
        met=found["per_second"] >= 200_000,
    )
    yield Row(
        name=f"a worker's own memory over {DRAWS:,} draws",
        ours=f"{found['anon_mib']:+.2f} MiB (held: {found['held_mib']:.1f}; mapped files: {found['file_mib']:.0f})",
        target="constant",
        met=found["anon_mib"] < 8,
    )
