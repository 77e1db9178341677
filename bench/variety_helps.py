"""What noise in a prompt's features does to ernie-image-tiny: how different are seeds, is the prompt still followed?

Diversity on prompts that leave the colour open, following on held-out prompts that say everything. Every
case paints the same prompts with the same seeds. What exists in out/bench/variety.json is not painted again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from ..ernie_core.pipeline import Pipeline, make_denoise
from ..ernie_core.sampling.guidance import with_cfg
from ..ernie_core.sampling.latents import make_noise
from ..ernie_core.sampling.samplers import sample_euler
from ..ernie_core.sampling.schedule import make_sigmas
from ..ernie_core.sampling.variety import Variety, VarietyRun, with_variety
from ..tiny.measure import matches
from ..tiny.measure import measure as measure_picture
from ..tiny.scenes import SHAPES, heldout_prompts
from .compare import Row
from .guidance_helps import SIDE, kept, standard_error
from .negative_helps import word
from .tiny_runs import load_tiny, percent, remember

STEPS = 8
CFG = 1.0  # Turbo's: one call per step
FOLLOWED = 100
SEEDS = 8
BATCH = 20
OPEN = tuple(word(i) for i in range(len(SHAPES)))
CASES: dict[str, Variety | None] = {
    "plain": None,
    "strength 0.25": Variety(strength=0.25),
    "strength 0.5": Variety(strength=0.5),
    "strength 1": Variety(strength=1.0),
    "strength 2": Variety(strength=2.0),
    "strength 4": Variety(strength=4.0),
    "strength 1, 1 to 0.97": Variety(strength=1.0, start=1.0, end=0.97),
    "strength 4, 1 to 0.97": Variety(strength=4.0, start=1.0, end=0.97),
    "strength 1, 0.97 to 0.9": Variety(strength=1.0, start=0.97, end=0.9),
    "strength 2, 0.97 to 0.9": Variety(strength=2.0, start=0.97, end=0.9),
}


def paint(pipeline: Pipeline, texts: Sequence[str], seeds: Sequence[int], variety: Variety | None) -> np.ndarray:
    """Pictures uint8 [N, 128, 128, 3]."""
    encoded, pictures = pipeline.encode(texts), {}
    groups: dict[int, list[int]] = {}  # one batch has prompts of one length
    for i, text in enumerate(encoded):
        groups.setdefault(len(text), []).append(i)
    batches = [group[k : k + BATCH] for group in groups.values() for k in range(0, len(group), BATCH)]
    for members in batches:
        noise = make_noise([seeds[i] for i in members], 128, SIDE, SIDE)

        def make(text_BTD: torch.Tensor):
            return make_denoise(pipeline.transformer, list(text_BTD), SIDE, SIDE)

        text_BTD = torch.stack([encoded[i] for i in members])
        cond = make(text_BTD) if variety is None else with_variety(make, text_BTD, VarietyRun(variety, noise))
        uncond = None if CFG == 1 else make(torch.stack([pipeline.encode([""])[0]] * len(members)))
        x = sample_euler(with_cfg(cond, uncond, CFG), noise, make_sigmas(STEPS))
        with torch.no_grad():
            shown = ((pipeline.vae.decode_fitting(x) / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        pictures |= dict(zip(members, shown.permute(0, 2, 3, 1).numpy(), strict=True))
    return np.stack([pictures[i] for i in range(len(texts))])


def distances(pictures: np.ndarray) -> list[float]:
    """Root mean square difference of each pair, in values of 0 to 1."""
    scaled = pictures.astype(np.float32) / 255
    return [float(((a - b) ** 2).mean() ** 0.5) for a, b in combinations(scaled, 2)]


def judge(pipeline: Pipeline, variety: Variety | None) -> dict[str, Any]:
    """Per open prompt: mean distance of its seeds' pictures, how many colours there are, and how many show
    the shape; per held-out prompt: whether the picture is right."""
    spread, colors, shapes = [], [], []
    opened = paint(
        pipeline, [text for text in OPEN for _ in range(SEEDS)], [*range(SEEDS)] * len(OPEN), variety
    ).reshape(len(OPEN), SEEDS, 128, 128, 3)
    for shape, pictures in zip(SHAPES, opened, strict=True):
        found = [measure_picture(picture) for picture in pictures]
        spread.append(float(np.mean(distances(pictures))))
        colors.append(len({f.color for f in found if f.found}))
        shapes.append(float(np.mean([f.shape == shape for f in found])))
    asked = heldout_prompts(200)[:FOLLOWED]
    pictures = paint(pipeline, [text for _, text in asked], range(FOLLOWED), variety)
    hits = [matches(scene, measure_picture(p)) for (scene, _), p in zip(asked, pictures, strict=True)]
    right = [bool(hit["color"] and hit["shape"] and hit["place"]) for hit in hits]
    return {"spread": spread, "colors": colors, "shapes": shapes, "right": right}


def measure() -> Iterator[Row]:
    pipeline, results = load_tiny(), kept("variety")
    for name, variety in CASES.items():
        if name not in results:
            results[name] = judge(pipeline, variety)
            remember("variety", results)
        found = results[name]
        yield Row(
            name=f"{name}: distance of {SEEDS} seeds, mean of {len(OPEN)} open prompts",
            ours=f"{np.mean(found['spread']):.4f} +- {np.std(found['spread']) / len(OPEN) ** 0.5:.4f}",
            peer_name="plain",
            peer=f"{np.mean(results['plain']['spread']):.4f}",
            target="reported as found",
            met=None,
            untold=f"colours of {SEEDS} {np.mean(found['colors']):.2f}, "
            f"shape right {percent(np.mean(found['shapes']))}, "
            f"held-out prompts right {percent(np.mean(found['right']))} +- {percent(standard_error(found['right']))}",
        )
