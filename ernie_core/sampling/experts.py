"""Mixture of denoising experts: every noise level has one model, LoRA and guidance strength of its own.

Source: ERNIE-ViLG 2.0 (arXiv 2210.15257, section 3.3), where ten denoisers share the timesteps in uniform blocks and
one of them is evaluated per step; Wan 2.2 uses two. Noise levels are sigmas here, because steps move with the shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ErnieError
from .guidance import Denoise


@dataclass(frozen=True, kw_only=True)
class Band:
    """Noise levels from `start`, included, down to `end`, not included; 1 to 0 is all of them."""

    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start <= 1:
            raise ErnieError(
                f"the noise levels must run down from start to end within 1 and 0, got {self.start:g} to {self.end:g}."
            )

    @property
    def is_whole(self) -> bool:
        return self.start >= 1 and self.end <= 0

    def share(self, sigmas_B: Tensor, blend: float = 0.0) -> Tensor:
        """How far the band counts at each noise level, [B] in [0, 1].

        1 inside and 0 outside; with `blend`, a straight ramp of that width lies across each edge but 1 and 0, so that
        the shares of two bands that meet add up to 1 everywhere.
        """
        if not blend:
            inside = (sigmas_B <= self.start) & ((sigmas_B > self.end) | (self.end <= 0))
            return inside.to(sigmas_B.dtype)
        share = torch.ones_like(sigmas_B)
        if self.start < 1:
            share = share * ((self.start - sigmas_B) / blend + 0.5).clamp(0, 1)
        if self.end > 0:
            share = share * ((sigmas_B - self.end) / blend + 0.5).clamp(0, 1)
        return share


def uniform_bands(count: int) -> list[Band]:
    """`count` bands of equal width from 1 down to 0, as ERNIE-ViLG 2.0 cuts its timesteps (`count` 10 there)."""
    if count < 1:
        raise ErnieError(f"the number of bands must be 1 or more, got {count}.")
    return [Band(start=1 - i / count, end=1 - (i + 1) / count) for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class Expert:
    """Who denoises a band: `model` or `lora`, or neither for the base itself, under `cfg`."""

    band: Band
    model: Any = None
    """Another MODEL, evaluated in place of the base."""
    lora: Any = None
    """A LoRA added to the base: the name of its file, or its tensors."""
    strength: float = 1.0
    """Of the LoRA."""
    cfg: float | None = None
    """Guidance strength inside the band; None = the sampler's."""
    label: str = ""
    """For people: a file name."""

    def __post_init__(self) -> None:
        if self.model is not None and self.lora is not None:
            raise ErnieError(
                f"the expert for {self.band.start:g} to {self.band.end:g} has a model and a LoRA; give it one of them "
                "(a LoRA for another model goes on that model first)."
            )


def order_experts(experts: Sequence[Expert], blend: float = 0.0) -> list[Expert]:
    """The experts from high noise to low, neighbours that are the same expert joined.

    Bands may leave gaps, which the base denoises. Joining keeps "the same expert everywhere" the plain model, bit by
    bit, and spares a change of weights in the middle of a picture.

    Raises:
        ErnieError: two bands overlap, a band is empty, or one is narrower than `blend`.
    """
    if not 0 <= blend <= 1:
        raise ErnieError(f"blend must lie between 0 (a hard edge) and 1, got {blend:g}.")
    joined: list[Expert] = []
    for expert in sorted(experts, key=lambda e: (-e.band.start, -e.band.end)):
        band = expert.band
        if band.start == band.end:
            raise ErnieError(f"the expert for noise levels {band.start:g} to {band.end:g} never acts: widen its band.")
        before = joined[-1] if joined else None
        if before is not None and before.band.end < band.start:
            raise ErnieError(
                f"two experts claim the noise levels {band.start:g} to {max(before.band.end, band.end):g}: "
                f"let one end where the other starts, for instance at {band.start:g}."
            )
        if before is not None and before.band.end == band.start and _same(before, expert):
            joined[-1] = _with_band(before, Band(start=before.band.start, end=band.end))
        else:
            joined.append(expert)
    for expert in joined:
        if not expert.band.is_whole and expert.band.start - expert.band.end < blend:
            raise ErnieError(
                f"blend {blend:g} is wider than the band {expert.band.start:g} to {expert.band.end:g}: "
                "its two edges would meet. Take a smaller blend."
            )
    return joined


def _same(one: Expert, other: Expert) -> bool:
    same_lora = one.lora == other.lora if isinstance(one.lora, str) else one.lora is other.lora
    return (
        one.model is other.model
        and same_lora
        and (one.lora is None or one.strength == other.strength)
        and one.cfg == other.cfg
    )


def _with_band(expert: Expert, band: Band) -> Expert:
    return Expert(
        band=band,
        model=expert.model,
        lora=expert.lora,
        strength=expert.strength,
        cfg=expert.cfg,
        label=expert.label,
    )


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One evaluation of a step: which model, under which guidance, and how much its velocity counts."""

    model: Any
    """None = the base."""
    cfg: float
    share: float


def seats(experts: Sequence[Expert], sigma: float, *, cfg: float, blend: float = 0.0) -> list[Seat]:
    """Who is evaluated at `sigma`: one model, or, where two different ones blend, both; shares add up to 1.

    `cfg` is the sampler's: that of experts without their own and of gaps. Experts that share a network (LoRAs and gaps
    on the base) are one evaluation, whose cfg is their mean by share: the same as the mix of their velocities, since
    guidance is linear in cfg.
    """
    level = torch.tensor([sigma], dtype=torch.float64)
    parts = [(e.model, cfg if e.cfg is None else e.cfg, float(e.band.share(level, blend))) for e in experts]
    rest = 1 - sum(share for _, _, share in parts)
    if rest > 1e-9:
        parts.append((None, cfg, rest))
    by_model: dict[int, list[tuple[Any, float, float]]] = {}
    for part in parts:
        if part[2] > 0:
            by_model.setdefault(id(part[0]), []).append(part)
    found = []
    for group in by_model.values():
        share = sum(part[2] for part in group)
        # One expert alone keeps its cfg to the bit.
        mean = group[0][1] if len(group) == 1 else sum(part[1] * part[2] for part in group) / share
        found.append(Seat(model=group[0][0], cfg=mean, share=share))
    return found


def mix(denoise_of: Callable[[Any, float], Denoise], experts: Sequence[Expert], *, cfg: float, blend: float) -> Denoise:
    """A denoiser that asks whoever is responsible; `denoise_of(model, cfg)` gives one model's guided denoiser."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked = seats(experts, sigma, cfg=cfg, blend=blend)
        if len(asked) == 1:
            return denoise_of(asked[0].model, asked[0].cfg)(x, sigma)
        return torch.stack([seat.share * denoise_of(seat.model, seat.cfg)(x, sigma).float() for seat in asked]).sum(0)

    return denoise


def report_experts(experts: Sequence[Expert], blend: float = 0.0) -> str:
    """A line per band, from high noise to low, gaps included."""
    lines, level = [], 1.0
    for expert in experts:
        if expert.band.start < level:
            lines.append(f"{level:g} to {expert.band.start:g}: the model itself")
        name = expert.label or ("the model itself" if expert.model is None and expert.lora is None else "an expert")
        strength = f", strength {expert.strength:g}" if expert.lora is not None else ""
        guidance = "" if expert.cfg is None else f", cfg {expert.cfg:g}"
        lines.append(f"{expert.band.start:g} to {expert.band.end:g}: {name}{strength}{guidance}")
        level = expert.band.end
    if level > 0:
        lines.append(f"{level:g} to 0: the model itself")
    if blend:
        lines.append(f"blended over {blend:g} at each edge")
    return "\n".join(lines)
