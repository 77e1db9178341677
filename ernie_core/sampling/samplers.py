"""Samplers: one function each, all with the head sample(denoise, x_BCHW, sigmas, *, on_step)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ..errors import ErnieError
from .guidance import Denoise

OnStep = Callable[[int, int, Tensor, Tensor], None]
"""on_step(step, steps, x_BCHW, x0_BCHW): after model call `step` (from 0) of `steps`; may raise to stop."""


def sample_euler(denoise: Denoise, x_BCHW: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dsigma = velocity from sigmas[0] to sigmas[-1] with Euler steps; returns x at sigmas[-1], fp32.

    `x_BCHW` is the state at sigmas[0] (pure noise when that is 1). The state stays fp32 between steps whatever the
    model computes in. Source: FlowMatchEulerDiscreteScheduler.step (diffusers).

    Raises:
        ErnieError: the result is not finite: `x_BCHW` or a prediction was not.
    """
    x = x_BCHW.float()
    grid = sigmas.tolist()
    steps = len(grid) - 1
    for step, (sigma, sigma_next) in enumerate(pairwise(grid)):
        velocity = denoise(x, sigma).float()
        if on_step is not None:
            on_step(step, steps, x, x - sigma * velocity)
        x = x + (sigma_next - sigma) * velocity
    # One look at the end, not one per step: reading a flag back would stall the device every time.
    if not bool(x.isfinite().all()):
        raise ErnieError(
            "sampling ended in NaN or infinite values. Look for NaN in the input latent, a broken LoRA, "
            "or fp16 weights (use bf16 or fp32)."
        )
    return x
