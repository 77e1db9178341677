"""What each kind of guidance does to ernie-image-tiny: prompts followed, contrast, model calls, on held-out prompts.

Every case paints the same prompts with the same seeds. What exists in out/bench/guidance.json is not painted again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ernie_core.model.dit import DiT
from ..ernie_core.pipeline import Pipeline, make_denoise
from ..ernie_core.sampling.guidance import (
    AdaptiveSkip,
    Denoise,
    GuidanceRun,
    Interval,
    Projection,
    Rescale,
    Rule,
    SkipLayers,
    ZeroStar,
    with_guidance,
)
from ..ernie_core.sampling.latents import make_noise
from ..ernie_core.sampling.samplers import sample_euler
from ..ernie_core.sampling.schedule import make_sigmas
from ..tiny.measure import matches
from ..tiny.measure import measure as measure_picture
from ..tiny.scenes import Scene, draw, heldout_prompts
from .compare import Row
from .tiny_runs import WORK, load_tiny, percent, remember

PROMPTS = 100
BATCH = 20
SIDE = 8  # latent cells of a 128 px picture
STEPS = 20
APG = Projection(eta=0.0, momentum=-0.5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: how the prompts are painted."""

    cfg: float = 4.0
    steps: int = STEPS
    rules: tuple[Rule, ...] = ()
    peer: str = "cfg 4"


CASES: dict[str, Case] = {
    "cfg 4": Case(),
    "cfg 1": Case(cfg=1.0),
    "cfg 12": Case(cfg=12.0),
    "cfg 12, rescale 0.7": Case(cfg=12.0, rules=(Rescale(share=0.7),), peer="cfg 12"),
    "cfg 12, apg": Case(cfg=12.0, rules=(APG,), peer="cfg 12"),
    "cfg 12, apg, threshold 0.2": Case(
        cfg=12.0, rules=(Projection(eta=0.0, momentum=-0.5, norm_threshold=0.2),), peer="cfg 12"
    ),
    "cfg 12, interval 0.95 to 0.5": Case(cfg=12.0, rules=(Interval(start=0.95, end=0.5),), peer="cfg 12"),
    "cfg 12, cfg-zero*": Case(cfg=12.0, rules=(ZeroStar(),), peer="cfg 12"),
    "apg": Case(rules=(APG,)),
    "rescale 0.7": Case(rules=(Rescale(share=0.7),)),
    "interval 1 to 0.8": Case(rules=(Interval(start=1.0, end=0.8),)),
    "interval 0.97 to 0.5": Case(rules=(Interval(start=0.97, end=0.5),)),
    "skip 0.95": Case(rules=(AdaptiveSkip(similarity=0.95),)),
    "skip 0.98": Case(rules=(AdaptiveSkip(similarity=0.98),)),
    "skip 0.99": Case(rules=(AdaptiveSkip(similarity=0.99),)),
    "skip 0.995": Case(rules=(AdaptiveSkip(similarity=0.995),)),
    "8 steps": Case(steps=8),
    "8 steps, cfg-zero*": Case(steps=8, rules=(ZeroStar(),), peer="8 steps"),
    "8 steps, cfg-zero*, 1 zero step": Case(steps=8, rules=(ZeroStar(zero_steps=1),), peer="8 steps"),
    "8 steps, cfg 12": Case(steps=8, cfg=12.0, peer="8 steps"),
    **{
        f"8 steps, cfg 12, apg, eta {eta:g}, momentum {momentum:g}": Case(
            steps=8, cfg=12.0, rules=(Projection(eta=eta, momentum=momentum),), peer="8 steps, cfg 12"
        )
        for eta, momentum in ((0.0, -0.5), (0.0, 0.0), (0.5, 0.0), (0.5, -0.5))
    },
    "cfg-zero*": Case(rules=(ZeroStar(),)),
    "cfg-zero*, 1 zero step": Case(rules=(ZeroStar(zero_steps=1),)),
    "skip layers 1.5": Case(rules=(SkipLayers(blocks=(2,), scale=1.5),)),
    "skip layers 1.5, 1 to 0.8": Case(rules=(SkipLayers(blocks=(2,), scale=1.5, start=1.0, end=0.8),)),
    "cfg 1, skip layers 1.5": Case(cfg=1.0, rules=(SkipLayers(blocks=(2,), scale=1.5),), peer="cfg 1"),
}


class Counted:
    """A denoiser that counts pictures times calls."""

    def __init__(self, denoise: Denoise):
        self.denoise = denoise
        self.pictures = 0

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.pictures += len(x)
        return self.denoise(x, sigma)


def paint(
    pipeline: Pipeline, texts: Sequence[str], seeds: Sequence[int], case: Case, *, batch: int = BATCH
) -> tuple[np.ndarray, float]:
    """(pictures uint8 [N, 128, 128, 3], model calls per picture)."""
    dit, calls, pictures = pipeline.transformer, 0, []
    for start in range(0, len(texts), batch):
        some = pipeline.encode(texts[start : start + batch])
        sigmas = make_sigmas(case.steps)
        cond = Counted(make_denoise(dit, some, SIDE, SIDE))
        empty = pipeline.encode([""])[0]
        uncond = Counted(make_denoise(dit, [empty] * len(some), SIDE, SIDE)) if case.cfg != 1 else None
        weak = {r.blocks: Counted(_reduced(dit, some, r.blocks)) for r in case.rules if isinstance(r, SkipLayers)}
        run = GuidanceRun(case.rules, sigmas)
        denoise = with_guidance(cond, uncond, case.cfg, run, without=weak.__getitem__)
        noise = make_noise(seeds[start : start + batch], dit.config.in_channels, SIDE, SIDE)
        x = sample_euler(denoise, noise, sigmas)
        with torch.no_grad():
            shown = pipeline.vae.decode_fitting(x)
        pictures.append(((shown / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
        calls += sum(c.pictures for c in (cond, uncond, *weak.values()) if c is not None)
    return np.concatenate(pictures), calls / len(texts)


def _reduced(dit: DiT, texts: Sequence[torch.Tensor], blocks: Sequence[int]) -> Denoise:
    def run_block(index: int, block: Any, x_BSD: torch.Tensor, *inputs: Any) -> torch.Tensor:
        return x_BSD if index in blocks else block(x_BSD, *inputs)

    return make_denoise(dit, texts, SIDE, SIDE, run_block=run_block)


def contrast(picture: np.ndarray) -> float:
    return float(picture.astype(np.float32).std())


def saturation(picture: np.ndarray) -> float:
    return float((picture.max(axis=-1).astype(np.float32) - picture.min(axis=-1)).mean())


def judge(pictures: np.ndarray, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Share of pictures right in colour, shape and place; contrast and saturation against the drawn scenes (1 = as
    drawn), clipped values in percent of all."""
    drawn = [draw(scene, np.random.default_rng(0)) for scene in scenes]
    hits = [matches(scene, measure_picture(picture)) for scene, picture in zip(scenes, pictures, strict=True)]
    return {
        "right": [bool(hit["color"] and hit["shape"] and hit["place"]) for hit in hits],
        "contrast": float(np.mean([contrast(p) / contrast(d) for p, d in zip(pictures, drawn, strict=True)])),
        "saturation": float(np.mean([saturation(p) / saturation(d) for p, d in zip(pictures, drawn, strict=True)])),
        "clipped": float(100 * ((pictures == 0) | (pictures == 255)).mean()),
        "clipped_drawn": float(100 * np.mean([((d == 0) | (d == 255)).mean() for d in drawn])),
    }


def psnr(pictures: np.ndarray, others: np.ndarray) -> float:
    """Median over pictures, in dB; pictures that are equal count as 99."""
    error = ((pictures.astype(np.float64) - others) ** 2).mean(axis=(1, 2, 3))
    return float(np.median(np.where(error > 0, 10 * np.log10(255**2 / np.maximum(error, 1e-9)), 99.0)))


def kept(name: str) -> dict[str, Any]:
    file = WORK / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def run_cases(pipeline: Pipeline, cases: dict[str, Case]) -> dict[str, Any]:
    """Every case judged, and compared with its peer's pictures."""
    asked = heldout_prompts(200)[:PROMPTS]
    scenes, texts = [scene for scene, _ in asked], [text for _, text in asked]
    results, painted = kept("guidance"), {}

    def pictures_of(name: str) -> tuple[np.ndarray, float]:
        if name not in painted:
            painted[name] = paint(pipeline, texts, range(PROMPTS), cases[name])
        return painted[name]

    for name, case in cases.items():
        if name in results:
            continue
        pictures, calls = pictures_of(name)
        results[name] = judge(pictures, scenes) | {"calls": calls}
        if name != case.peer:
            results[name]["psnr"] = psnr(pictures, pictures_of(case.peer)[0])
        remember("guidance", results)
    return results


def standard_error(right: Sequence[bool]) -> float:
    share = float(np.mean(right))
    return (share * (1 - share) / len(right)) ** 0.5


def measure(load: Callable[[], Pipeline] = load_tiny) -> Iterator[Row]:
    results = run_cases(load(), CASES)
    for name, found in results.items():
        peer = CASES[name].peer
        told = results[peer]
        yield Row(
            name=f"{name}: right in colour, shape and place",
            ours=f"{percent(np.mean(found['right']))} +- {percent(standard_error(found['right']))}",
            peer_name=peer,
            peer=percent(np.mean(told["right"])),
            target="reported as found",
            met=None,
            untold=f"contrast {found['contrast']:.2f}, saturation {found['saturation']:.2f}, clipped "
            f"{found['clipped']:.1f} %, {found['calls']:.1f} calls, PSNR {found.get('psnr', 99):.1f} dB",
        )
