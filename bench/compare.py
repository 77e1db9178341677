"""Paired timing and the one table format of all benchmarks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `ratios` are peer / ours, one per alternation: above 1 we are faster."""

    name: str
    ours: str
    target: str
    met: bool | None
    """None: see `untold`."""
    untold: str = "not measurable here"
    """What the verdict says where `met` is None."""
    peer_name: str = ""
    peer: str = ""
    ratios: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def cells(self) -> tuple[str, ...]:
        ratio = ""
        if self.ratios:
            ratio = f"{self.ratio:.2f}"
        if len(self.ratios) > 1:
            low, _, high = quantiles(self.ratios, n=4)
            ratio += f" [{low:.2f}-{high:.2f}]"
        verdict = self.untold if self.met is None else "met" if self.met else "missed"
        return (
            self.name,
            self.ours,
            f"{self.peer_name}: {self.peer}" if self.peer_name else "",
            ratio,
            self.target,
            verdict,
        )


HEADINGS = ("measurement", "ours", "peer", "peer / ours: median [IQR]", "target", "verdict")


def table_line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def heading_lines() -> list[str]:
    return [table_line(HEADINGS), table_line(("---",) * len(HEADINGS))]


def process_seconds(function: Callable[[], Any]) -> float:
    """Processor time of one call on the CPU: unmoved by other processes' turns on the core."""
    start = time.process_time()
    function()
    return time.process_time() - start


def cuda_seconds(function: Callable[[], Any]) -> float:
    """Device time of one call, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@torch.inference_mode()
def alternate(
    ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int, seconds: Callable[[Callable[[], Any]], float]
) -> tuple[list[float], list[float]]:
    """Times of `ours` and `peer`, called in turn `rounds` times after one warm-up each; who goes first alternates."""
    ours()
    peer()
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    try:
        for i in range(rounds):
            for which in (0, 1) if i % 2 else (1, 0):
                times[which].append(seconds((ours, peer)[which]))
    finally:
        gc.enable()
    return times


def compare(
    name: str,
    *,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    peer_name: str,
    at_least: float,
    at_most_ms: float | None = None,
    rounds: int = 15,
    seconds: Callable[[Callable[[], Any]], float] = process_seconds,
) -> Row:
    """The row of a paired timing: the target is a ratio, and a time of ours where `at_most_ms` is given."""
    our_times, peer_times = alternate(ours, peer, rounds=rounds, seconds=seconds)
    ratios = tuple(p / o for o, p in zip(our_times, peer_times, strict=True))
    return Row(
        name=name,
        peer_name=peer_name,
        ours=_milliseconds(our_times),
        peer=_milliseconds(peer_times),
        ratios=ratios,
        target=f">= {at_least:g}x" + ("" if at_most_ms is None else f", <= {at_most_ms:g} ms"),
        met=median(ratios) >= at_least and (at_most_ms is None or 1000 * median(our_times) <= at_most_ms),
    )


def _milliseconds(times: list[float]) -> str:
    return f"{1000 * median(times):.4g} ms"


def cpu_dtype() -> tuple[torch.dtype, str]:
    """(dtype to measure in, words for the row): bf16 where the CPU multiplies in it, else fp32.

    Emulated bf16 products are twenty times slower than fp32 ones, and would hide everything else.
    """
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    if any(getattr(torch.cpu, name, bool)() for name in units):
        return torch.bfloat16, "bf16"
    return torch.float32, "fp32: this CPU has no bf16 units"
