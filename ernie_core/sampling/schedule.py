"""Sigma grids. Sigma runs from 1 (noise) down to 0; the model's timestep is 1000 * sigma."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import BASE
from ..errors import ErnieError

NUM_TRAIN_TIMESTEPS = 1000  # scheduler_config.json


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Bend a sigma grid towards high noise: s' = k·s / (1 + (k - 1)·s).

    `sigmas` lie in [0, 1] and keep their order; 0 and 1 stay fixed; shift 1 changes nothing.
    Source: SD3 paper (arXiv 2403.03206), resolution-dependent shift; the released scheduler uses 4.

    Raises:
        ErnieError: `shift` is not positive.
    """
    if not shift > 0:
        raise ErnieError(f"shift must be above 0 (the official value is {BASE.shift:g}, 1 = no shift), got {shift:g}.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_sigmas(steps: int, *, shift: float = BASE.shift, denoise: float = 1.0) -> Tensor:
    """The official grid: `steps` + 1 descending sigmas (fp32, CPU), ending in 0.

    denoise 1 starts at pure noise. Below 1 the grid is the last `steps` intervals of a longer one of
    int(steps / denoise) steps, so that `steps` model calls are made whatever `denoise` is (the host's rule);
    denoise 0 gives an empty grid: nothing to do.

    Raises:
        ErnieError: steps below 1, denoise outside [0, 1], or shift not positive.
    """
    if steps < 1:
        raise ErnieError(f"steps must be at least 1, got {steps}.")
    if not 0 <= denoise <= 1:
        raise ErnieError(f"denoise must lie between 0 (keep the picture) and 1 (start from noise), got {denoise:g}.")
    if denoise == 0:
        return torch.zeros(0)
    total = int(steps / denoise)
    grid = torch.linspace(1.0, 0.0, total + 1, dtype=torch.float64)
    return shift_sigmas(grid, shift)[-(steps + 1) :].float()
