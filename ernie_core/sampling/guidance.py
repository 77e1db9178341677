"""Guidance as pure functions of predictions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""denoise(x_BCHW, sigma) -> velocity_BCHW; conditioning is inside the closure."""


def cfg_velocity(velocity_cond: Tensor, velocity_uncond: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance v_u + cfg (v_c - v_u); cfg 1 is the conditional prediction."""
    return velocity_uncond + cfg * (velocity_cond - velocity_uncond)


def with_cfg(cond: Denoise, uncond: Denoise | None, cfg: float) -> Denoise:
    """A denoiser under guidance: two calls at their true text lengths, or one when cfg is at most 1, as officially.

    Sequential calls beat the padded, masked batch of the reference: nothing is padded, so no mask keeps the fast
    attention kernels away, and an empty negative prompt costs one text token.
    """
    if cfg <= 1 or uncond is None:
        return cond

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return cfg_velocity(cond(x, sigma).float(), uncond(x, sigma).float(), cfg)

    return denoise
