"""Samplers: one function each, all with the head sample(denoise, x_BCHW, sigmas, *, on_step).

All of them solve dx/dsigma = velocity on the path x = (1 - sigma) x0 + sigma noise. Multistep ones think in the
half log-SNR lambda = log((1 - sigma) / sigma), which is infinite at both ends of the path: where a formula would need
such an end, the step is of first order, which is its limit. Stochastic ones move part of the noise that is in x out and
as much new noise in, so that the noise level stays the grid's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..config import SAMPLERS
from ..errors import ErnieError
from .guidance import Denoise

OnStep = Callable[[int, int, Tensor, Tensor], None]
"""on_step(call, calls, x_BCHW, x0_BCHW): after model call `call` (from 0) of `calls`; may raise to stop."""

DrawNoise = Callable[[Tensor], Tensor]
"""draw(x_BCHW) -> standard normal like x_BCHW, another one at each call; see `latents.step_noise`."""


def sample_euler(denoise: Denoise, x_BCHW: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dsigma = velocity from sigmas[0] to sigmas[-1] with Euler steps; returns x at sigmas[-1], fp32.

    `x_BCHW` is the state at sigmas[0] (pure noise when that is 1). The state stays fp32 between steps whatever the
    model computes in. Order 1. Source: FlowMatchEulerDiscreteScheduler.step (diffusers).

    Raises:
        ErnieError: the result is not finite: `x_BCHW` or a prediction was not.
    """
    x = x_BCHW.float()
    predict = _Predictor(denoise, on_step, len(sigmas) - 1)
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        velocity, _ = predict(x, sigma)
        x = x + (sigma_next - sigma) * velocity
    return _check_finite(x)


def sample_heun(denoise: Denoise, x_BCHW: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """`sample_euler` with the mean of the velocities at both ends of each step. Order 2, two model calls per step.

    A step to sigma 0 has one call: there is no noise left for a model to see. Source: EDM (arXiv 2206.00364),
    algorithm 1, on the flow path.
    """
    x = x_BCHW.float()
    predict = _Predictor(denoise, on_step, _heun_calls(sigmas))
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        velocity, _ = predict(x, sigma)
        step = sigma_next - sigma
        if sigma_next != 0:
            velocity = (velocity + predict(x + step * velocity, sigma_next)[0]) / 2
        x = x + step * velocity
    return _check_finite(x)


def _heun_calls(sigmas: Tensor) -> int:
    return sum(1 if sigma_next == 0 else 2 for sigma_next in sigmas.tolist()[1:])


def sample_dpmpp_2m(denoise: Denoise, x_BCHW: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M), midpoint: x0 carried on in a straight line of lambda. Order 2, one call per step.

    Source: arXiv 2211.01095, algorithm 2, with alpha = 1 - sigma.
    """
    x = x_BCHW.float()
    predict = _Predictor(denoise, on_step, len(sigmas) - 1)
    past = _Past()
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        velocity, x0 = predict(x, sigma)
        x = x + (sigma_next - sigma) * velocity
        change = past.slope(sigma, sigma_next, x0)
        if change is not None:
            x = x + (1 - sigma_next / sigma) / 2 * change
        past.keep(sigma, x0)
    return _check_finite(x)


def sample_unipc(denoise: Denoise, x_BCHW: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1: DPM-Solver++(2M) whose every step is corrected by the prediction at its end.

    That prediction is the next step's own, so there is still one call per step. Source: arXiv 2302.04867, data
    prediction (UniC-2 of section 3.2; coefficients as in diffusers' UniPCMultistepScheduler).
    """
    x = x_BCHW.float()
    predict = _Predictor(denoise, on_step, len(sigmas) - 1)
    past, before = _Past(), None
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        velocity, x0 = predict(x, sigma)
        if before is not None:
            x = _correct(*before, sigma, x0)
            velocity = (x - x0) / sigma
        euler = x + (sigma_next - sigma) * velocity
        change = past.slope(sigma, sigma_next, x0)
        before = (euler, sigma, x0, past.sigma, past.x0)
        x = euler if change is None else euler + (1 - sigma_next / sigma) / 2 * change
        past.keep(sigma, x0)
    return _check_finite(x)


def _correct(
    euler: Tensor,
    sigma: float,
    x0: Tensor,
    sigma_before: float | None,
    x0_before: Tensor | None,
    end: float,
    x0_end: Tensor,
) -> Tensor:
    """The state at `end` from the first-order one and the clean estimates before, at the start and at the end."""
    weight = 1 - end / sigma
    start, h = _log_snr(sigma), _log_snr(end) - _log_snr(sigma)
    if x0_before is None or sigma_before is None or not math.isfinite(h) or h == 0:
        return euler + weight / 2 * (x0_end - x0)
    # with g_k as in the paper: rho_before + rho_end = g_1, r rho_before + rho_end = g_2
    b = math.expm1(-h)
    phi = -b / h - 1
    g_1, g_2 = phi / b, 2 * (-phi / h - 0.5) / b
    r = (_log_snr(sigma_before) - start) / h
    if r == 0 or not math.isfinite(r):
        return euler + weight * g_1 * (x0_end - x0)
    rho = (g_1 - g_2) / (1 - r)
    return euler + weight * (rho / r * (x0_before - x0) + (g_1 - rho) * (x0_end - x0))


def sample_euler_ancestral(
    denoise: Denoise,
    x_BCHW: Tensor,
    sigmas: Tensor,
    *,
    draw_noise: DrawNoise,
    eta: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler with fresh noise at each step; eta 1 = the ancestral sampler of DDPM, eta 0 = `sample_euler`. Order 1.

    Source: DDIM (arXiv 2010.02502), equation 16, on the flow path.

    Raises:
        ErnieError: eta outside [0, 1], or the result is not finite.
    """
    if check_eta(eta) == 0:
        return sample_euler(denoise, x_BCHW, sigmas, on_step=on_step)
    x = x_BCHW.float()
    predict = _Predictor(denoise, on_step, len(sigmas) - 1)
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        velocity, x0 = predict(x, sigma)
        kept, fresh = _noise_shares(sigma, sigma_next, eta)
        x = (1 - sigma_next) * x0 + kept * (x + (1 - sigma) * velocity)
        if fresh:
            x = x + fresh * draw_noise(x)
    return _check_finite(x)


def sample_dpmpp_2m_sde(
    denoise: Denoise,
    x_BCHW: Tensor,
    sigmas: Tensor,
    *,
    draw_noise: DrawNoise,
    eta: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """`sample_euler_ancestral` with x0 carried on in a straight line of lambda; eta 0 = `sample_dpmpp_2m`.

    Source: SDE-DPM-Solver++(2M), arXiv 2211.01095, section 4, with DDIM's share of new noise.

    Raises:
        ErnieError: eta outside [0, 1], or the result is not finite.
    """
    if check_eta(eta) == 0:
        return sample_dpmpp_2m(denoise, x_BCHW, sigmas, on_step=on_step)
    x = x_BCHW.float()
    predict = _Predictor(denoise, on_step, len(sigmas) - 1)
    past = _Past()
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        velocity, x0 = predict(x, sigma)
        kept, fresh = _noise_shares(sigma, sigma_next, eta)
        x = (1 - sigma_next) * x0 + kept * (x + (1 - sigma) * velocity)
        change = past.slope(sigma, sigma_next, x0)
        if change is not None:
            x = x + (1 - sigma_next - (1 - sigma) * kept / sigma) / 2 * change
        past.keep(sigma, x0)
        if fresh:
            x = x + fresh * draw_noise(x)
    return _check_finite(x)


def check_eta(eta: float) -> float:
    """`eta` itself; ErnieError outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ErnieError(f"eta must lie between 0 (no new noise) and 1 (all that fits), got {eta:g}.")
    return eta


def _noise_shares(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """How much of the noise in x a step keeps and how much it draws; squares add up to sigma_next squared."""
    if not 0 < sigma_next < sigma:
        return sigma_next, 0.0
    ratio = sigma_next / sigma * (1 - sigma) / (1 - sigma_next)
    share = eta * eta * (1 - ratio * ratio)
    return sigma_next * math.sqrt(1 - share), sigma_next * math.sqrt(share)


class _Predictor:
    """Asks the model, in fp32, and tells `on_step` of each call."""

    def __init__(self, denoise: Denoise, on_step: OnStep | None, calls: int):
        self.denoise, self.on_step, self.calls = denoise, on_step, calls
        self.done = 0

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Velocity and clean estimate."""
        velocity = self.denoise(x, sigma).float()
        x0 = x - sigma * velocity
        if self.on_step is not None:
            self.on_step(self.done, self.calls, x, x0)
        self.done += 1
        return velocity, x0


class _Past:
    """The last step's noise level and clean estimate."""

    def __init__(self) -> None:
        self.sigma: float | None = None
        self.x0: Tensor | None = None

    def keep(self, sigma: float, x0: Tensor) -> None:
        self.sigma, self.x0 = sigma, x0

    def slope(self, sigma: float, sigma_next: float, x0: Tensor) -> Tensor | None:
        """How much x0 would change until `sigma_next` in a straight line of lambda; None where there is no such line:
        in the first step, beside an end of the path, or where a noise level repeats."""
        if self.x0 is None or self.sigma is None:
            return None
        length, before = (_log_snr(b) - _log_snr(a) for a, b in ((sigma, sigma_next), (self.sigma, sigma)))
        if not (math.isfinite(length) and math.isfinite(before)) or before == 0:
            return None
        return (x0 - self.x0) * (length / before)


def _log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma): -inf at pure noise, inf at the picture."""
    if sigma <= 0:
        return math.inf
    return -math.inf if sigma >= 1 else math.log((1 - sigma) / sigma)


def _check_finite(x: Tensor) -> Tensor:
    # One look at the end, not one per step: reading a flag back would stall the device every time.
    if not bool(x.isfinite().all()):
        raise ErnieError(
            "sampling ended in NaN or infinite values. Look for NaN in the input latent, a broken LoRA, "
            "or fp16 weights (use bf16 or fp32)."
        )
    return x


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler by name, with how much new noise it draws; called as sampler(denoise, x, sigmas, draw_noise=...)."""

    name: str = "euler"
    """One of config.SAMPLERS."""
    eta: float = 1.0
    """Share of new noise of the stochastic ones, 0 to 1; the others do not read it."""

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise ErnieError(f"sampler {', '.join(SAMPLERS)} expected, got {self.name!r}.")
        check_eta(self.eta)

    def calls(self, sigmas: Tensor) -> int:
        """How often it asks the model on this grid."""
        return _heun_calls(sigmas) if self.name == "heun" else max(len(sigmas) - 1, 0)

    def __call__(
        self,
        denoise: Denoise,
        x_BCHW: Tensor,
        sigmas: Tensor,
        *,
        draw_noise: DrawNoise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """x at sigmas[-1], fp32; see the function of that name."""
        if self.name in STOCHASTIC:
            return STOCHASTIC[self.name](denoise, x_BCHW, sigmas, draw_noise=draw_noise, eta=self.eta, on_step=on_step)
        return DETERMINISTIC[self.name](denoise, x_BCHW, sigmas, on_step=on_step)


DETERMINISTIC: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "unipc": sample_unipc,
}
STOCHASTIC: dict[str, Callable[..., Tensor]] = {
    "euler_ancestral": sample_euler_ancestral,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
}
