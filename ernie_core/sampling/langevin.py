"""Inner iterations for hard inpainting: at each noise level the picture and its surroundings are brought to agree.

Plain masking pins the surroundings to their noisy path, so the model sees them but they never answer: what is painted
early may not fit and is not taken back. Here each step first walks a few Langevin moves at its own noise level. What is
painted follows the model; the surroundings follow the evidence (the picture that is there) and are pushed against what
the model would rather have there, so that the inside must come to meet them.

Idea: LanPaint (arXiv 2502.03491): Langevin dynamics with a bidirectional guided score. Ours differs from the paper's in
the integrator: with the clean estimate x0 held during one move, the overdamped dynamics of a rectified flow are an
Ornstein-Uhlenbeck process, solved exactly, so that no step size is unstable by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ErnieError
from .guidance import Denoise, check_range, in_range


@dataclass(frozen=True, kw_only=True)
class InnerIterations:
    """How hard inpainting walks; `iterations` 0 = plain masking."""

    iterations: int
    """Moves, each one model call, before each step; 0 to 100."""
    evidence: float = 0.0
    """How strongly the surroundings are pushed against what the model makes of them, 0 (not at all) to 20.

    The paper guides inside and outside apart; here one guided estimate serves both, and at a high cfg part of its
    difference from the picture is guidance. Measured: bench/INPAINTING.md."""
    step: float = 0.5
    """Length of a move in relaxation times, above 0 up to 5: 0.1 is a slow walk, 5 all but draws the noise anew."""
    start: float = 1.0
    """Noise level from which on it walks; at 1 itself there is nothing to agree on yet."""
    end: float = 0.0
    """Noise level down to which it walks."""
    seed: int = 0
    """Of the walk's noise: each run makes a `generator` of it."""

    def __post_init__(self) -> None:
        for name, low, high, hint in (
            ("iterations", 0, 100, "0 = plain masking"),
            ("evidence", 0, 20, "0 = the surroundings do not push back"),
            ("step", 0.01, 5, "in relaxation times"),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also NaN
                raise ErnieError(f"{name} must lie between {low:g} and {high:g} ({hint}), got {value:g}.")
        check_range(self.start, self.end)

    def make_generator(self) -> torch.Generator:
        """A CPU generator at the start of this seed's noise."""
        return torch.Generator("cpu").manual_seed(self.seed)

    @property
    def is_neutral(self) -> bool:
        return self.iterations == 0 or self.start == self.end

    def acts_at(self, sigma: float, mask_B1HW: Tensor) -> bool:
        """Whether there are moves at this noise level: never at 1, and never without anything outside the mask."""
        inside = self.iterations > 0 and sigma < 1 and in_range(sigma, self.start, self.end)
        return inside and not bool((mask_B1HW == 1).all())


def walk(
    denoise: Denoise,
    x_BCHW: Tensor,
    sigma: float,
    *,
    mask_B1HW: Tensor,
    start_BCHW: Tensor,
    how: InnerIterations,
    generator: torch.Generator,
) -> Tensor:
    """The state after the moves of one noise level `sigma` (above 0), inside and outside the mask (1 = painted).

    With x0 the model's clean estimate and y the start picture, the score of the state is -(x - (1 - sigma) t) /
    sigma^2, where t is x0 inside and y + evidence (y - x0) outside; a move is the exact solution over `step` relaxation
    times. Outside a relaxation time is (1 + evidence) times longer, as its feedback is that much stronger. Noise comes
    from `generator` (CPU). `x_BCHW` is left alone.
    """
    steps = how.step * (mask_B1HW + (1 - mask_B1HW) / (1 + how.evidence))
    remains = torch.exp(-steps)
    spread = sigma * torch.sqrt(1 - remains.square())
    x = x_BCHW
    for _ in range(how.iterations):
        x0 = x - sigma * denoise(x, sigma)
        target = mask_B1HW * x0 + (1 - mask_B1HW) * (start_BCHW + how.evidence * (start_BCHW - x0))
        centre = (1 - sigma) * target
        noise = torch.randn(x.shape, generator=generator).to(x)
        x = centre + remains * (x - centre) + spread * noise
    return x


def with_inner_iterations(
    denoise: Denoise, masked: Denoise, *, mask_B1HW: Tensor, start_BCHW: Tensor, how: InnerIterations
) -> Denoise:
    """A denoiser of one run that walks before it answers, and **moves the sampler's own state** to where it walked.

    This is the corrector half of a predictor-corrector sampler. No return value can say it to a sampler that was not
    written for it: it goes on from the state that it asked about, so that tensor is written. `denoise` is the bare one,
    `masked` the one that holds the outside (`masks.hold_outside`), which gives every answer: bit for bit as without
    inner iterations where there is nothing to walk for.
    """
    generator = how.make_generator()

    def walked(x: Tensor, sigma: float) -> Tensor:
        if how.acts_at(sigma, mask_B1HW):
            x.copy_(walk(denoise, x, sigma, mask_B1HW=mask_B1HW, start_BCHW=start_BCHW, how=how, generator=generator))
        return masked(x, sigma)

    return walked
