"""Guidance: what is made of the predictions under the prompt and under the negative prompt.

A rule is a frozen record of settings; several make a tuple, and `GuidanceRun` is what they do in one sampling run. They
compose like this, whatever their order in the tuple between the kinds; inside a kind they act one after the other:

1. `ZeroStar` leaves the first steps of the schedule out;
2. `Interval`: the negative prompt is asked only at noise levels inside all intervals;
3. `AdaptiveSkip`: not any more once both predictions agree;
4. `ZeroStar` scales the unconditional prediction, `Projection` reshapes the difference of the two;
5. classifier-free guidance adds the difference cfg times;
6. `Rescale` takes the contrast back;
7. `SkipLayers` pushes away from what the network predicts without some blocks.

Where a rule needs norms or products they are taken per picture, so a batch equals its pictures one by one. Predictions
are velocities; x0 = x - sigma * velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ErnieError

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


# --- formulas --------------------------------------------------------------------------------------------------------


def _flat_dot(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Inner product per picture [B, 1, 1, 1]."""
    return (a_BCHW * b_BCHW).flatten(1).sum(1)[:, None, None, None]


def cosine_similarity(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Cosine [B] of the angle between two predictions of each picture."""
    return torch.nn.functional.cosine_similarity(a_BCHW.flatten(1).double(), b_BCHW.flatten(1).double(), dim=1)


def zero_star_scale(velocity_cond: Tensor, velocity_uncond: Tensor) -> Tensor:
    """The s [B, 1, 1, 1] for which s * v_u is nearest to v_c: <v_c, v_u> / |v_u|^2.

    Source: CFG-Zero* (arXiv 2503.18886), section 4.2; 1 where v_u is zero.
    """
    square = _flat_dot(velocity_uncond, velocity_uncond)
    return torch.where(square > 0, _flat_dot(velocity_cond, velocity_uncond) / square.clamp_min(1e-12), 1.0)


def project_difference(difference: Tensor, x0_cond: Tensor, *, eta: float, norm_threshold: float) -> Tensor:
    """A guidance difference shortened to `norm_threshold` and with its part along `x0_cond` times `eta`.

    The length is the root mean square over a picture, so that the threshold means the same at every size; the paper's
    norm is that times sqrt(C H W). Source: APG (arXiv 2410.02416), algorithm 1; there on x0 predictions, as here.
    """
    if norm_threshold > 0:
        length = difference.square().flatten(1).mean(1).sqrt()[:, None, None, None]
        difference = difference * (norm_threshold / length.clamp_min(1e-12)).clamp_max(1.0)
    if eta == 1:
        return difference
    along = _flat_dot(difference, x0_cond) / _flat_dot(x0_cond, x0_cond).clamp_min(1e-12) * x0_cond
    return difference + (eta - 1) * along


def rescale_contrast(x0: Tensor, x0_cond: Tensor, share: float) -> Tensor:
    """`x0` with its standard deviation per picture moved by `share` (0 to 1) towards that of `x0_cond`.

    Source: arXiv 2305.08891, section 3.4. The paper rescales v = alpha noise - sigma x0, which at high noise, where
    guidance overexposes, is the picture; a flow's velocity always holds the noise as well, so x0 is rescaled here.
    """
    ratio = x0_cond.flatten(1).std(1) / x0.flatten(1).std(1).clamp_min(1e-12)
    return x0 * (1 + share * (ratio - 1))[:, None, None, None]


# --- rules -----------------------------------------------------------------------------------------------------------


def _check(name: str, value: float, low: float, high: float, advice: str) -> None:
    if not low <= value <= high:  # also NaN
        raise ErnieError(f"{name} must lie between {low:g} and {high:g} ({advice}), got {value:g}.")


def check_range(start: float, end: float) -> None:
    """Raise ErnieError unless the noise levels lie in 1 to 0 and run downwards; equal ones mean never."""
    _check("start", start, 0, 1, "a noise level: 1 = pure noise, 0 = the picture")
    _check("end", end, 0, 1, "a noise level: 1 = pure noise, 0 = the picture")
    if end > start:
        raise ErnieError(
            f"start must not be below end, sampling runs from noise level 1 down to 0; got start {start:g} and "
            f"end {end:g}. Swap them."
        )


def in_range(sigma: float, start: float, end: float) -> bool:
    """Whether a noise level lies in (end, start]: start 1 and end 0 hold every model call, equal ones none."""
    return end < sigma <= start


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Guide from noise level `start` down to `end` only (arXiv 2404.07724); 1 and 0 = always, equal = never."""

    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_range(self.start, self.end)

    @property
    def is_neutral(self) -> bool:
        return self.start >= 1 and self.end <= 0


@dataclass(frozen=True, kw_only=True)
class AdaptiveSkip:
    """Leave guidance out for the rest of a picture once both predictions' cosine reaches `similarity`; 1 = never.

    Source: Adaptive Guidance (arXiv 2312.12487), section 5, there on noise predictions; here on x0, which does not
    share the noise that makes all velocities look alike. Model calls are saved when all pictures of a batch agree.
    """

    similarity: float

    def __post_init__(self) -> None:
        _check("similarity", self.similarity, 0, 1, "1 = never skip")

    @property
    def is_neutral(self) -> bool:
        return self.similarity >= 1


@dataclass(frozen=True, kw_only=True)
class ZeroStar:
    """CFG-Zero*: the unconditional prediction optimally scaled, the first `zero_steps` of the schedule left out."""

    zero_steps: int = 0

    def __post_init__(self) -> None:
        _check("zero_steps", self.zero_steps, 0, 1000, "0 = leave none out")

    is_neutral = False


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Adaptive projected guidance; eta 1, momentum 0 and norm_threshold 0 = classifier-free guidance."""

    eta: float = 1.0
    momentum: float = 0.0
    norm_threshold: float = 0.0

    def __post_init__(self) -> None:
        _check("eta", self.eta, -10, 10, "1 = keep the part along the prediction, 0 = drop it")
        _check("momentum", self.momentum, -1, 1, "0 = off, negative values damp what keeps its direction")
        _check("norm_threshold", self.norm_threshold, 0, 100, "0 = off")
        if abs(self.momentum) == 1:
            raise ErnieError(
                f"momentum must lie inside -1 to 1, or the differences add up forever; got {self.momentum:g}."
            )

    @property
    def is_neutral(self) -> bool:
        return self.eta == 1 and self.momentum == 0 and self.norm_threshold == 0


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """Take back `share` of the contrast that guidance added; 0 = none."""

    share: float

    def __post_init__(self) -> None:
        _check("rescale", self.share, 0, 1, "0 = keep, 1 = the contrast of the unguided prediction")

    @property
    def is_neutral(self) -> bool:
        return self.share == 0


@dataclass(frozen=True, kw_only=True)
class SkipLayers:
    """Add scale * (v - v without `blocks`) from noise level `start` down to `end`: skip-layer guidance.

    A third model call at those levels. Source: Stability AI's SD3.5 release; after arXiv 2403.17377.
    """

    blocks: tuple[int, ...]
    scale: float
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check("scale", self.scale, 0, 100, "0 = off")
        check_range(self.start, self.end)

    @property
    def is_neutral(self) -> bool:
        return self.scale == 0 or not self.blocks or self.start == self.end


Rule = Interval | AdaptiveSkip | ZeroStar | Projection | Rescale | SkipLayers


def without_neutral(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules that change anything."""
    return tuple(rule for rule in rules if not rule.is_neutral)


def read_blocks(text: str, blocks: int) -> tuple[int, ...]:
    """Block numbers in "12, 13" or "12-14" for a network of `blocks`; empty text = a twelfth after the first third.

    Raises:
        ErnieError: not such a list.
    """
    if not text.strip():
        return tuple(range(blocks // 3, blocks // 3 + max(1, round(blocks / 12))))
    numbers: set[int] = set()
    for part in text.replace(",", " ").split():
        ends = part.split("-")
        if len(ends) > 2 or not all(end.isdecimal() and len(end) < 5 for end in ends):
            raise ErnieError(f"block numbers such as 12, 13 or 12-14 expected, got {part!r} in {text!r}.")
        numbers.update(range(int(ends[0]), int(ends[-1]) + 1))
    return tuple(sorted(numbers))


def check_blocks(rules: Sequence[Rule], blocks: int) -> None:
    """Raise ErnieError when a skip-layer rule names a block that a network of `blocks` does not have, or all."""
    for rule in rules:
        if not isinstance(rule, SkipLayers):
            continue
        missing = [i for i in rule.blocks if not 0 <= i < blocks]
        if missing:
            raise ErnieError(
                f"this model has blocks 0 to {blocks - 1}, there is no block {missing[0]}; name others to skip."
            )
        if len(set(rule.blocks)) == blocks:
            raise ErnieError(f"all {blocks} blocks would be skipped; name fewer.")


# --- a run -----------------------------------------------------------------------------------------------------------


class GuidanceRun:
    """Rules at work in one sampling run, with what they remember: make a new one for every run.

    Callers ask `is_held`, `wants_uncond` and `wants_weak` before a model call, and hand the predictions (fp32
    velocities) to `observe`, `combine` and `push`, in this order; `with_guidance` shows how.
    """

    def __init__(self, rules: Sequence[Rule], sigmas: Tensor):
        rules = without_neutral(rules)
        self.intervals = [r for r in rules if isinstance(r, Interval)]
        self.skips = [r for r in rules if isinstance(r, AdaptiveSkip)]
        self.zero_stars = [r for r in rules if isinstance(r, ZeroStar)]
        self.projections = [r for r in rules if isinstance(r, Projection)]
        self.rescales = [r for r in rules if isinstance(r, Rescale)]
        self.weak_rules = [r for r in rules if isinstance(r, SkipLayers)]
        grid = sigmas.tolist()
        steps = max((r.zero_steps for r in self.zero_stars), default=0)
        # By noise level, not by counting calls: samplers of higher order call the model more than once a step.
        self._held_above = grid[min(steps, len(grid) - 1)] if steps and grid else math.inf
        self._averages: list[Tensor | None] = [None] * len(self.projections)
        self.ended_B: Tensor | None = None  # pictures [B] whose guidance had ended before the last call
        self._agreed_B: Tensor | None = None
        self._all_agreed = False
        self.evaluations_saved = 0

    @property
    def changes_difference(self) -> bool:
        """Whether plain classifier-free guidance does not do: `combine` is needed."""
        return bool(self.zero_stars or self.projections or self.rescales)

    def is_held(self, sigma: float) -> bool:
        """Whether this step is left out: the velocity is zero and no model call is needed."""
        return sigma > self._held_above

    def wants_uncond(self, sigma: float) -> bool:
        """Whether the prediction under the negative prompt is needed here."""
        wanted = not self._all_agreed and all(in_range(sigma, r.start, r.end) for r in self.intervals)
        self.evaluations_saved += not wanted
        return wanted

    def wants_weak(self, sigma: float) -> list[SkipLayers]:
        """The skip-layer rules that act here: each needs a prediction without its blocks."""
        return [r for r in self.weak_rules if in_range(sigma, r.start, r.end)]

    def observe(self, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor) -> None:
        """See whether both predictions agree; guidance of such a picture ends with the next call."""
        if not self.skips:
            return
        similarity = min(r.similarity for r in self.skips)
        self.ended_B = self._agreed_B
        agreed_B = cosine_similarity(x - sigma * cond, x - sigma * uncond) >= similarity
        agreed_B = agreed_B if self.ended_B is None else agreed_B | self.ended_B
        self._agreed_B = agreed_B
        self._all_agreed = bool(agreed_B.all())

    def combine(self, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
        """The guided velocity of predictions that `observe` has seen."""
        velocity = self._projected(x, sigma, cond, uncond, cfg)
        if self.rescales:
            x0_cond, x0 = x - sigma * cond, x - sigma * velocity
            for rule in self.rescales:
                x0 = rescale_contrast(x0, x0_cond, rule.share)
            velocity = (x - x0) / sigma
        return velocity if self.ended_B is None else torch.where(self.ended_B[:, None, None, None], cond, velocity)

    def _projected(self, x: Tensor, sigma: float, cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
        for _ in self.zero_stars:
            uncond = zero_star_scale(cond, uncond) * uncond
        if not self.projections:
            return cfg_velocity(cond, uncond, cfg)
        difference = sigma * (uncond - cond)  # of x0
        for i, rule in enumerate(self.projections):
            average = self._averages[i]
            if rule.momentum and average is not None:
                difference = difference + rule.momentum * average
            self._averages[i] = difference
            difference = project_difference(
                difference, x - sigma * cond, eta=rule.eta, norm_threshold=rule.norm_threshold
            )
        return cond - (cfg - 1) * difference / sigma

    def push(self, velocity: Tensor, cond: Tensor, weak: Sequence[tuple[SkipLayers, Tensor]]) -> Tensor:
        """`velocity` pushed away from predictions without some blocks, as asked for by `wants_weak`."""
        for rule, prediction in weak:
            velocity = velocity + rule.scale * (cond - prediction)
        return velocity


def with_guidance(
    cond: Denoise,
    uncond: Denoise | None,
    cfg: float,
    run: GuidanceRun,
    *,
    without: Callable[[tuple[int, ...]], Denoise] | None = None,
) -> Denoise:
    """A denoiser for one sampling run under rules; without rules, classifier-free guidance at any cfg.

    `without(blocks)`: the denoiser under the prompt whose network leaves out these blocks, for `SkipLayers`.
    """
    weak_denoise = {}
    if without is not None:
        weak_denoise = {rule: without(rule.blocks) for rule in run.weak_rules}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if run.is_held(sigma):
            return torch.zeros_like(x)
        prediction = velocity = cond(x, sigma).float()
        if uncond is not None and run.wants_uncond(sigma):
            other = uncond(x, sigma).float()
            run.observe(x, sigma, prediction, other)
            velocity = run.combine(x, sigma, prediction, other, cfg)
        weak = [(rule, weak_denoise[rule](x, sigma).float()) for rule in run.wants_weak(sigma)]
        return run.push(velocity, prediction, weak)

    return denoise
