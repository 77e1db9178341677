"""Core's schedulers on a flow model: sigma grids read from a table of 1,000 entries.

Rules observed on ComfyUI 0.12.1 (`comfy/samplers.py`, `comfy/model_sampling.py`); `simple` equals our own grid
(`ernie_core.sampling.schedule.make_sigmas`) whenever the steps divide 1,000.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULERS = ("simple", "normal")
TABLE_SIZE = 1000


def core_sigmas(scheduler: str, steps: int, *, shift: float, denoise: float = 1.0) -> Tensor:
    """Return descending fp32 sigmas ending in 0; below denoise 1 the last `steps` of a grid of int(steps / denoise).

    denoise 0 gives an empty grid: nothing to do.
    """
    import torch

    if denoise <= 0:
        return torch.zeros(0)
    total = steps if denoise > 0.9999 else int(steps / denoise)
    grid = {"simple": _simple, "normal": _normal}[scheduler](total, shift)
    return torch.tensor(grid, dtype=torch.float32)[-(steps + 1) :]


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _simple(steps: int, shift: float) -> list[float]:
    """Every (1000 / steps)-th table entry from the top, rounded to the noisier side."""
    table = [_shifted(i / TABLE_SIZE, shift) for i in range(1, TABLE_SIZE + 1)]
    stride = TABLE_SIZE / steps
    return [table[-(1 + int(i * stride))] for i in range(steps)] + [0.0]


def _normal(steps: int, shift: float) -> list[float]:
    """Evenly spaced between the table's ends after shifting, then shifted once more (core's timestep is its sigma)."""
    low = _shifted(1 / TABLE_SIZE, shift)
    times = [1.0 + (low - 1.0) * i / max(steps - 1, 1) for i in range(steps)]
    grid = [_shifted(t, shift) for t in times]
    return grid if abs(grid[-1]) < 1e-5 else [*grid, 0.0]
