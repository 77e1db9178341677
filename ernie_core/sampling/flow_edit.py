"""Editing a finished picture by words, and variations of it, without extra weights or a look into the network.

- `flow_edit` (FlowEdit, arXiv 2412.08629, algorithm 1) walks straight from the picture to its edited twin along the
  *difference* of two prompts' velocities at noisy copies of both. No inversion; where the prompts agree nothing moves.
- `edit_by_inversion` runs the flow backwards under the source prompt to the noise that makes the picture, and forwards
  again under the target prompt (DDIM inversion and its kin; as arXiv 2410.10792 without the controller).
- `vary` mixes the noise that makes the picture with fresh noise.

All but `invert` have the head run(denoise, x0_BCHW, *, ..., on_step, mask_BCHW): `denoise` holds one denoiser per
branch by name, `mask_BCHW` (1 = may change) broadcasts to the latent, None = everywhere. States are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import ErnieError
from .guidance import Denoise
from .latents import mix_noise, step_noise

OnStep = Callable[[int, int, Tensor, Tensor], None]
"""on_step(step, steps, x_BCHW, x0_BCHW), as in `samplers`."""
DrawNoise = Callable[[Tensor], Tensor]
"""draw(x_BCHW) -> standard normal like x_BCHW, another one at each call."""


def flow_edit(
    denoise: Mapping[str, Denoise],
    x0_BCHW: Tensor,
    *,
    sigmas: Tensor,
    draw: DrawNoise,
    repeats: int = 1,
    on_step: OnStep | None = None,
    mask_BCHW: Tensor | None = None,
) -> Tensor:
    """The picture `x0_BCHW`, described by the branch "source", as the branch "target" describes it.

    Equal branches give `x0_BCHW` back, bit for bit.

    Args:
        sigmas: descending; the first says how much may change (1 = everything), the last is 0.
        repeats: noises whose velocity differences are averaged in each step, one call of each branch for each.

    Raises:
        ErnieError: repeats below 1, or the result is not finite.
    """
    _check_count("repeats", repeats)
    x0 = x0_BCHW.float()
    moved = torch.zeros_like(x0)  # edited picture - picture: exactly zero as long as the branches agree
    steps = len(sigmas) - 1
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        difference = torch.zeros_like(x0)
        x_target = velocity = x0
        for _ in range(repeats):
            x_source = mix_noise(x0, draw(x0), sigma)
            x_target = x_source + moved
            velocity = denoise["target"](x_target, sigma).float()
            difference += (velocity - denoise["source"](x_source, sigma).float()) / repeats
        if on_step is not None:
            on_step(step, steps, x_target, x_target - sigma * velocity)
        moved = moved + (sigma_next - sigma) * difference
        if mask_BCHW is not None:
            moved = moved * mask_BCHW
    return _finite(x0 + moved)


def invert(
    denoise: Denoise, x0_BCHW: Tensor, sigmas: Tensor, *, iterations: int = 1, on_step: OnStep | None = None
) -> list[Tensor]:
    """The states at each of `sigmas` (descending) through which Euler steps lead to `x0_BCHW`; the last is `x0_BCHW`.

    An Euler step down ends at x_low = x_high + (low - high) v(x_high, high). That is solved for x_high by fixed-point
    iteration (as ReNoise, arXiv 2403.14602), so what is undone is the sampler that will be run, not the ODE behind it,
    and the model is never asked at sigma 0. `iterations` model calls per step; each multiplies the error that remains
    by the step's length times the velocity's slope. That is no contraction where the denoiser throws noise away: in
    practice (bench/EDITING.md) more than one call pays at cfg 1 only, and the noise found grows above unit variance.

    Raises:
        ErnieError: iterations below 1, or the noise is not finite.
    """
    _check_count("iterations", iterations)
    x = x0_BCHW.float()
    states = [x]
    steps = len(sigmas) - 1
    for step, (sigma_low, sigma) in enumerate(pairwise(reversed(sigmas.tolist()))):
        velocity = torch.zeros_like(x)
        for _ in range(iterations):
            velocity = denoise(x, sigma).float()
            x = states[-1] + (sigma - sigma_low) * velocity
        states.append(x)
        if on_step is not None:
            on_step(step, steps, x, x - sigma * velocity)
    _finite(x)
    return states[::-1]


def find_noise(
    denoise: Mapping[str, Denoise],
    x0_BCHW: Tensor,
    *,
    sigmas: Tensor,
    iterations: int = 1,
    on_step: OnStep | None = None,
    mask_BCHW: Tensor | None = None,
) -> Tensor:
    """The state at sigmas[0] of `invert` under the branch "source".

    Raises:
        ErnieError: there is a mask: a part of a picture has no noise of its own.
    """
    if mask_BCHW is not None:
        raise ErnieError("the noise of a whole picture is sought, but the latent has a noise mask: take it off.")
    return invert(denoise["source"], x0_BCHW, sigmas, iterations=iterations, on_step=on_step)[0]


def edit_by_inversion(
    denoise: Mapping[str, Denoise],
    x0_BCHW: Tensor,
    *,
    sigmas: Tensor,
    iterations: int = 1,
    on_step: OnStep | None = None,
    mask_BCHW: Tensor | None = None,
) -> Tensor:
    """The picture inverted along `sigmas` under the branch "source" and made again under the branch "target".

    Equal branches give the picture back within the error of `invert`.
    """
    inverted = _halves(on_step, 0)
    states = invert(denoise["source"], x0_BCHW, sigmas, iterations=iterations, on_step=inverted)
    return _regenerate(denoise["target"], states, states[0], sigmas, _halves(on_step, 1), mask_BCHW)


def vary(
    denoise: Mapping[str, Denoise],
    x0_BCHW: Tensor,
    *,
    sigmas: Tensor,
    draw: DrawNoise,
    strength: float,
    iterations: int = 1,
    on_step: OnStep | None = None,
    mask_BCHW: Tensor | None = None,
) -> Tensor:
    """The picture made again, under the branch "source", from its own noise mixed with fresh noise by `strength`.

    0 gives the picture itself, without a model call; 1 a fresh one that owes it nothing (where sigmas[0] is 1).
    """
    check_strength(strength)
    if strength == 0:
        return x0_BCHW.float()
    states = invert(denoise["source"], x0_BCHW, sigmas, iterations=iterations, on_step=_halves(on_step, 0))
    # What is noise in the state at sigmas[0] < 1 is (x - (1 - sigma) x0) / sigma.
    sigma = float(sigmas[0])
    x0 = x0_BCHW.float()
    noise = mix_gaussians((states[0] - (1 - sigma) * x0) / sigma, draw(x0), strength)
    start = mix_noise(x0, noise, sigma)
    return _regenerate(denoise["source"], states, start, sigmas, _halves(on_step, 1), mask_BCHW)


def mix_gaussians(first: Tensor, second: Tensor, strength: float) -> Tensor:
    """cos(a) first + sin(a) second, a = strength * 90 degrees: of unit variance where both are, and independent.

    strength 0 is `first` and 1 is `second`, bit for bit. Source: arXiv 2010.02502 (DDIM), appendix D.5, whose slerp
    this is for vectors at right angles, as independent noises of this many numbers nearly are.

    Raises:
        ErnieError: strength outside [0, 1].
    """
    check_strength(strength)
    if strength == 0:
        return first
    if strength == 1:
        return second
    angle = strength * math.pi / 2
    return math.cos(angle) * first + math.sin(angle) * second


def noises(seed: int, latent: Mapping[str, Any]) -> DrawNoise:
    """What `flow_edit` and `vary` draw for a LATENT: another noise for each picture, the same for the same picture.

    Picture i of the batch, or batch_index[i] where the latent says so, depends on `seed` and this number alone.
    """
    places = latent.get("batch_index") or range(len(latent["samples"]))
    return step_noise([(seed, place) for place in places])


def check_strength(strength: float) -> None:
    """Raise ErnieError unless `strength` lies in [0, 1]."""
    if not 0 <= strength <= 1:
        raise ErnieError(f"strength must lie between 0 (the picture as it is) and 1, got {strength:g}.")


def _regenerate(
    denoise: Denoise,
    states: list[Tensor],
    start: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None,
    mask_BCHW: Tensor | None,
) -> Tensor:
    """Euler steps from `start`; outside the mask the picture's own `states`."""
    x = start
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        if mask_BCHW is not None:
            x = torch.lerp(states[step], x, mask_BCHW.to(x).expand_as(x))
        velocity = denoise(x, sigma).float()
        if on_step is not None:
            on_step(step, len(sigmas) - 1, x, x - sigma * velocity)
        x = x + (sigma_next - sigma) * velocity
    if mask_BCHW is not None:
        x = torch.lerp(states[-1], x, mask_BCHW.to(x).expand_as(x))
    return _finite(x)


def _halves(on_step: OnStep | None, half: int) -> OnStep | None:
    """`on_step` of a part of a run that has two of the same length."""
    if on_step is None:
        return None
    return lambda step, steps, x, x0: on_step(step + half * steps, 2 * steps, x, x0)


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ErnieError(f"{name} must be at least 1, got {count}.")


def _finite(x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise ErnieError(
            "the edit ended in NaN or infinite values. Lower cfg or strength; look for NaN in the latent, a broken "
            "LoRA, or fp16 weights (use bf16 or fp32)."
        )
    return x
