"""Seed variety: a prompt's features with noise in them while a picture's layout is decided.

Distilled models paint one prompt nearly alike from every seed. Noise in the features while the noise level is high lets
layouts differ; below the range the features are exact again, so details follow the prompt. Source: CADS (arXiv
2310.17347), equations 2 to 5: noise of a given share, annealed between two noise levels, then mean and deviation
brought back by a share. Three things differ. The noise belongs to the picture's own starting noise and stays the same
over the run, so that a picture is a function of its seed with every sampler and in every batch. Its size is counted in
deviations of each token's features, and mean and deviation are brought back per token, since tokens differ in length by
orders of magnitude. The first token, which all prompts share and which is the longest, stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ErnieError
from .guidance import Denoise, check_range


@dataclass(frozen=True, kw_only=True)
class Variety:
    """Noise in a prompt's features, in full from the first step to noise level `start`, none from `end` down.

    strength: in deviations of a token's features, 0 (none) to 4.
    rescale: how far mean and deviation of each token are brought back to what they were, 0 to 1.
    """

    strength: float
    start: float = 0.9
    end: float = 0.8
    rescale: float = 1.0

    def __post_init__(self) -> None:
        for name, top, advice in (("strength", 4, "0 = off"), ("rescale", 1, "1 = brought back fully")):
            value = getattr(self, name)
            if not 0 <= value <= top:
                raise ErnieError(f"{name} must lie between 0 and {top} ({advice}), got {value:g}.")
        check_range(self.start, self.end)

    @property
    def is_neutral(self) -> bool:
        return self.strength == 0 or self.end >= 1

    def amount(self, sigma: float) -> float:
        """Deviation of the noise at a noise level, 0 to `strength`; its square falls linearly from start to end."""
        if sigma <= self.end:
            return 0.0
        ramp = 1.0 if sigma >= self.start else (sigma - self.end) / (self.start - self.end)
        return self.strength * ramp**0.5


def vary_text(text_BTD: Tensor, noise_BTD: Tensor, amount: float, rescale: float = 1.0) -> Tensor:
    """Features plus `amount` deviations of noise, mean and deviation of each token brought back by `rescale`."""
    if amount == 0:
        return text_BTD
    text = text_BTD.float()
    mean, deviation = text.mean(-1, keepdim=True), text.std(-1, keepdim=True)
    varied = text + amount * deviation * noise_BTD.to(text)
    centred = varied - varied.mean(-1, keepdim=True)
    brought_back = mean + centred * (deviation / centred.std(-1, keepdim=True).clamp_min(1e-12))
    varied = varied + rescale * (brought_back - varied)
    return torch.cat([text_BTD[:, :1], varied[:, 1:].to(text_BTD.dtype)], dim=1)


class VarietyRun:
    """A `Variety` at work in one sampling run, whose pictures are known by the noise that they start from.

    Runs that start without noise of their own (a second stage that goes on from the first) are left as they are.
    """

    def __init__(self, variety: Variety, noise_BCHW: Tensor):
        self.variety = variety
        self._seeds = [_seed_of(noise) for noise in noise_BCHW] if bool(noise_BCHW.any()) else []
        self._noise: dict[tuple[int, ...], Tensor] = {}

    def amount(self, sigma: float) -> float:
        """Deviation of the noise at this noise level; 0 = the features are as they were."""
        return self.variety.amount(sigma) if self._seeds else 0.0

    def vary(self, text_BTD: Tensor, sigma: float) -> Tensor:
        """Features [B, T, D] of all pictures at this noise level; `text_BTD` itself [1 or more, T, D] outside of the
        range. Picture i has the features of row i, rows repeating as on the host."""
        amount = self.amount(sigma)
        if amount == 0:
            return text_BTD
        shape = tuple(text_BTD.shape[1:])
        if shape not in self._noise:
            drawn = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in self._seeds]
            self._noise = {shape: torch.stack(drawn).to(text_BTD.device)}
        rows = [i % len(text_BTD) for i in range(len(self._seeds))]
        return vary_text(text_BTD[rows], self._noise[shape], amount, self.variety.rescale)


def _seed_of(noise: Tensor) -> int:
    digest = hashlib.sha256(b"variety" + noise.detach().float().cpu().contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big")


def with_variety(make: Callable[[Tensor], Denoise], text_BTD: Tensor, run: VarietyRun) -> Denoise:
    """A denoiser of which the features follow the noise level; make(text_BTD) -> denoise under these features."""
    made: dict[float, Denoise] = {}

    def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
        amount = run.amount(float(sigma))
        if amount not in made:
            made[amount] = make(run.vary(text_BTD, float(sigma)))
        return made[amount](x_BCHW, sigma)

    return denoise
