"""A reference picture's style by the statistics of its latent: colours and contrast, at most.

Each channel of the clean estimate x0 is moved towards the mean and the standard deviation that this channel has in a
reference picture, at high noise levels, so that the model finishes what was moved. There is no place and no motif in
these numbers, so none comes over. Source: AdaIN (arXiv 1703.06868), section 5, there on a VGG network's features, here
on the VAE's latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import ErnieError
from .guidance import Denoise, check_range, in_range
from .inputs import LATENT_CHANNELS, check_latent

EPSILON = 1e-6
"""A channel that varies less counts as constant: it takes the reference's mean, and there is nothing to stretch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StyleStatistics:
    """Mean and standard deviation [1, 128, 1, 1] of a reference, and where they act.

    strength: how far the estimate is moved, 0 (not at all) to 1 (it has the reference's statistics).
    start, end: noise levels, 1 to 0; start >= sigma > end is where it acts, equal ones are never.
    """

    mean: Tensor
    std: Tensor
    strength: float = 0.5
    start: float = 1.0
    end: float = 0.6

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if list(value.shape) != [1, LATENT_CHANNELS, 1, 1] or not bool(value.isfinite().all()):
                raise ErnieError(
                    f"{name} must be finite numbers [1, {LATENT_CHANNELS}, 1, 1], got {list(value.shape)}."
                )
        if bool((self.std < 0).any()):
            raise ErnieError("std must not be negative.")
        if not 0 <= self.strength <= 1:  # also NaN
            raise ErnieError(f"strength must lie between 0 and 1 (0 = off), got {self.strength:g}.")
        check_range(self.start, self.end)

    @classmethod
    def of(cls, latent_BCHW: Tensor, *, strength: float = 0.5, start: float = 1.0, end: float = 0.6) -> StyleStatistics:
        """The statistics of a reference latent [1, 128, H/16, W/16].

        Raises:
            ErnieError: another model's latent, not finite, more than one picture, or settings out of range.
        """
        check_latent(latent_BCHW)
        if len(latent_BCHW) != 1:
            raise ErnieError(
                f"one reference picture expected, the latent holds {len(latent_BCHW)}: choose one with LatentFromBatch."
            )
        mean, std = _statistics(latent_BCHW.float())
        return cls(mean=mean, std=std, strength=strength, start=start, end=end)

    @property
    def is_neutral(self) -> bool:
        return self.strength == 0 or self.start == self.end

    def acts_at(self, sigma: float) -> bool:
        """Whether the estimate is moved at this noise level."""
        return not self.is_neutral and in_range(sigma, self.start, self.end)


def _statistics(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, 1, 1] over a picture's cells."""
    return x_BCHW.mean((2, 3), keepdim=True), x_BCHW.std((2, 3), correction=0, keepdim=True)


def restyle(x0_BCHW: Tensor, style: StyleStatistics, sigma: float) -> Tensor:
    """The clean estimate at a noise level with each channel moved towards the reference's mean and deviation.

    Every picture of a batch by itself; `x0_BCHW` itself where `style` does not act.
    """
    if not style.acts_at(sigma):
        return x0_BCHW
    x0 = x0_BCHW.float()
    mean, std = _statistics(x0)
    moved = (x0 - mean) / std.clamp_min(EPSILON) * style.std.to(x0) + style.mean.to(x0)
    return (x0 + style.strength * (moved - x0)).to(x0_BCHW.dtype)


def with_style(denoise: Denoise, styles: Sequence[StyleStatistics]) -> Denoise:
    """A denoiser whose clean estimate is moved by each of `styles`, one after the other; `denoise` itself without any.

    As a velocity: v' = (x - x0') / sigma.
    """
    styles = tuple(style for style in styles if not style.is_neutral)
    if not styles:
        return denoise

    def restyled(x_BCHW: Tensor, sigma: float) -> Tensor:
        velocity, level = denoise(x_BCHW, sigma), float(sigma)
        acting = [style for style in styles if style.acts_at(level)]
        if not acting:
            return velocity
        x0 = x_BCHW - level * velocity
        for style in acting:
            x0 = restyle(x0, style, level)
        return (x_BCHW - x0) / level

    return restyled
