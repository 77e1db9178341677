"""Does a negative prompt in the attention take a colour away at cfg 1? On ernie-image-tiny; prompts name no colour.

Each prompt is painted once as it is; its picture's own colour, measured, then goes into the negative prompt, worded
like the prompt, and the same seed is painted again. `gone`: the object is still found and has another colour. What
exists in out/bench/negative.json is not painted again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..ernie_core.pipeline import Pipeline, make_denoise
from ..ernie_core.sampling.guidance import cfg_velocity
from ..ernie_core.sampling.latents import make_noise
from ..ernie_core.sampling.nag import Nag
from ..ernie_core.sampling.samplers import sample_euler
from ..ernie_core.sampling.schedule import make_sigmas
from ..tiny.measure import measure as measure_picture
from ..tiny.scenes import BACKGROUNDS, SHAPES
from .compare import Row
from .guidance_helps import kept
from .tiny_runs import load_tiny, percent, remember

PROMPTS = 48
STEPS = 8
SIDE = 8
CASES: dict[str, dict[str, float]] = {
    **{f"scale {scale:g}": {"scale": scale} for scale in (1.5, 2.0, 3.0, 5.0)},
    "scale 1.5, tau 1, alpha 0.5": {"scale": 1.5, "tau": 1.0, "alpha": 0.5},
    "scale 2, tau 1": {"scale": 2.0, "tau": 1.0},
    "scale 3, alpha 0.1": {"scale": 3.0, "alpha": 0.1},
    "scale 2, from 0.95": {"scale": 2.0, "start": 0.95},
    "scale 3, from 0.95": {"scale": 3.0, "start": 0.95},
    "scale 5, from 0.95": {"scale": 5.0, "start": 0.95},
    "scale 3, 0.95 to 0.5": {"scale": 3.0, "start": 0.95, "end": 0.5},
    "scale 3, from 0.9": {"scale": 3.0, "start": 0.9},
}


def word(i: int, color: str = "") -> str:
    """Prompt i, with a colour or without one."""
    shape, background = list(SHAPES)[i % len(SHAPES)], list(BACKGROUNDS)[i % len(BACKGROUNDS)]
    return f"a large {f'{color} ' if color else ''}{shape} in the center on a {background} background"


def paint(
    pipeline: Pipeline, texts: Sequence[str], *, negatives: Sequence[str] = (), cfg: float = 1.0, **settings: float
) -> list[np.ndarray]:
    """Pictures of `texts`, seed i for text i; `negatives` in the attention by `settings`, or by guidance at `cfg`."""
    encoded = pipeline.encode(list(texts))
    against = pipeline.encode(list(negatives)) if negatives else []
    groups: dict[tuple[int, ...], list[int]] = {}  # one batch has prompts of one length
    for i, text in enumerate(encoded):
        groups.setdefault((len(text), len(against[i]) if against else 0), []).append(i)
    pictures: dict[int, np.ndarray] = {}
    for members in groups.values():
        negative = torch.stack([against[i] for i in members]) if against else None
        nag = (
            Nag(text_BTD=negative, **{"scale": 1.0, "tau": 2.5, "alpha": 0.25} | settings)
            if negative is not None and settings
            else None
        )
        cond = make_denoise(pipeline.transformer, [encoded[i] for i in members], SIDE, SIDE, nag=nag)
        uncond = make_denoise(pipeline.transformer, list(negative), SIDE, SIDE) if negative is not None else cond

        def denoise(x: torch.Tensor, sigma: float, cond=cond, uncond=uncond) -> torch.Tensor:
            return cond(x, sigma) if cfg == 1 else cfg_velocity(cond(x, sigma), uncond(x, sigma), cfg)

        x = sample_euler(denoise, make_noise(members, 128, SIDE, SIDE), make_sigmas(STEPS))
        with torch.no_grad():
            shown = ((pipeline.vae.decode_fitting(x) / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        pictures |= dict(zip(members, shown.permute(0, 2, 3, 1).numpy(), strict=True))
    return [pictures[i] for i in range(len(texts))]


def judge(pictures: Sequence[np.ndarray], colors: Sequence[str | None]) -> dict[str, Any]:
    found = [measure_picture(picture) for picture in pictures]
    shapes = [f.shape == list(SHAPES)[i % len(SHAPES)] for i, f in enumerate(found)]
    gone = [f.found and f.color != color for f, color in zip(found, colors, strict=True)]
    return {"found": [f.found for f in found], "shape": shapes, "gone": gone}


def measure() -> Iterator[Row]:
    pipeline, known = load_tiny(), kept("negative")
    texts = [word(i) for i in range(PROMPTS)]
    plain = paint(pipeline, texts)
    colors = [measure_picture(picture).color for picture in plain]
    seen = [i for i, color in enumerate(colors) if color is not None]  # what shows nothing has nothing to lose
    negatives = [word(i, color or "red") for i, color in enumerate(colors)]
    results = {"plain": judge(plain, colors)}
    for name, settings in {"guidance, cfg 3": {"cfg": 3.0}, **CASES}.items():
        results[name] = known.get(name) or judge(paint(pipeline, texts, negatives=negatives, **settings), colors)
        remember("negative", results)
    for name, found in results.items():
        shares = {what: float(np.mean([hits[i] for i in seen])) for what, hits in found.items()}
        yield Row(
            name=f"{name}: the negative's colour is gone ({len(seen)} pictures)",
            ours=percent(shares["gone"]),
            target="reported as found",
            met=None,
            untold=f"found {percent(shares['found'])}, shape right {percent(shares['shape'])}",
        )
