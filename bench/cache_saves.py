"""What the step cache leaves out on ernie-image-tiny and what it costs: evaluations, PSNR and SSIM, prompts followed.

Official settings, 50 steps at cfg 4, one picture at a time as in the graph; every threshold of either signal paints the
same prompts with the same seeds as the run without it. What exists in out/bench/step_cache.json is not painted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..ernie_core.pipeline import Pipeline, make_denoise
from ..ernie_core.sampling.cache import StepCache, StepCacheRun
from ..ernie_core.sampling.calibration import read_calibration
from ..ernie_core.sampling.guidance import Denoise, with_cfg
from ..ernie_core.sampling.latents import make_noise
from ..ernie_core.sampling.samplers import sample_euler
from ..ernie_core.sampling.schedule import make_sigmas
from ..tiny.scenes import heldout_prompts
from .compare import Row
from .guidance_helps import SIDE, judge, kept, psnr, standard_error
from .samplers_pay import paint
from .tiny_runs import load_tiny, percent, remember

PROMPTS = 12
STEPS = 50
CFG = 4.0
WHOLE = StepCache(threshold=0.0)
NOT_CALIBRATED = ", not calibrated"  # as on a network of which nobody has made a calibration
CACHES = {
    "first_block 0.02": StepCache(threshold=0.02),
    "first_block 0.05": StepCache(threshold=0.05),
    "first_block 0.1": StepCache(threshold=0.1),
    "first_block 0.2": StepCache(threshold=0.2),
    "first_block 1, at most 9 in a row": StepCache(threshold=1.0, max_skips=9),
    "modulated_input 0.02": StepCache(threshold=0.02, signal="modulated_input"),
    "modulated_input 0.05": StepCache(threshold=0.05, signal="modulated_input"),
    "modulated_input 0.1": StepCache(threshold=0.1, signal="modulated_input"),
    "modulated_input 0.2": StepCache(threshold=0.2, signal="modulated_input"),
    "modulated_input 1, at most 9 in a row": StepCache(threshold=1.0, max_skips=9, signal="modulated_input"),
    f"modulated_input 0.03{NOT_CALIBRATED}": StepCache(threshold=0.03, signal="modulated_input"),
    f"modulated_input 0.05{NOT_CALIBRATED}": StepCache(threshold=0.05, signal="modulated_input"),
}


def sample(
    pipeline: Pipeline,
    run: StepCacheRun,
    text: str,
    seed: int,
    *,
    side: int = SIDE,
    see: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """Latent of one picture of `side` x `side` cells under a run of the cache; `see` gets (branch, velocity)."""
    dit = pipeline.transformer

    def under(key: str) -> Denoise:
        features = pipeline.encode([text if key == "positive" else ""])

        def denoise(x: Tensor, sigma: float) -> Tensor:
            velocity = make_denoise(dit, features, side, side, run_block=run.run_block(key, sigma))(x, sigma)
            if see is not None:
                see(key, velocity)
            return velocity

        return denoise

    noise = make_noise([seed], dit.config.in_channels, side, side).to(dit.final_linear.weight.device)
    return sample_euler(with_cfg(under("positive"), under("negative"), CFG), noise, make_sigmas(STEPS))


def ssim(pictures: np.ndarray, others: np.ndarray, window: int = 7) -> list[float]:
    """Mean SSIM of luma of each picture, uniform window (Wang et al. 2004)."""
    a, b = (torch.from_numpy(p.astype(np.float64)).mean(dim=-1)[:, None] / 255 for p in (pictures, others))
    mean_a, mean_b = avg_pool2d(a, window, 1), avg_pool2d(b, window, 1)
    var_a, var_b = avg_pool2d(a * a, window, 1) - mean_a**2, avg_pool2d(b * b, window, 1) - mean_b**2
    covariance = avg_pool2d(a * b, window, 1) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean(dim=(1, 2, 3)).tolist()


def compare(
    pipeline: Pipeline,
    caches: Mapping[str, StepCache],
    texts: Sequence[str],
    *,
    side: int = SIDE,
) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """(name, pictures, {saved, psnr, ssim: one per picture}) of the runs without a cache and with each."""
    dit = pipeline.transformer

    def paint_all(cache: StepCache, calibrated: bool = True) -> tuple[np.ndarray, list[float]]:
        latents, saved = [], []
        for seed, text in enumerate(texts):
            run = StepCacheRun.of(cache, dit.config) if calibrated else StepCacheRun(cache, len(dit.layers))
            latents.append(sample(pipeline, run, text, seed, side=side))
            saved.append(run.skipped / (run.skipped + run.whole))
        return np.concatenate([paint(pipeline, latent) for latent in latents]), saved

    whole, none = paint_all(WHOLE)
    yield "whole", whole, {"saved": none, "psnr": [99.0] * len(texts), "ssim": [1.0] * len(texts)}
    for name, cache in caches.items():
        pictures, saved = paint_all(cache, not name.endswith(NOT_CALIBRATED))
        each = [psnr(a[None], b[None]) for a, b in zip(pictures, whole, strict=True)]
        yield name, pictures, {"saved": saved, "psnr": each, "ssim": ssim(pictures, whole)}


def run_all(pipeline: Pipeline) -> dict[str, Any]:
    results = kept("step_cache")
    calibration = read_calibration(pipeline.transformer.config)
    used = None if calibration is None else list(calibration.coefficients)
    if results.get("calibration") != used:
        results = {name: found for name, found in results.items() if not name.startswith("modulated_input")}
        results["calibration"] = used
    missing = {name: cache for name, cache in CACHES.items() if name not in results}
    if missing:
        asked = heldout_prompts(200)[:PROMPTS]
        scenes, texts = [scene for scene, _ in asked], [text for _, text in asked]
        for name, pictures, found in compare(pipeline, missing, texts):
            results[name] = found | {"right": judge(pictures, scenes)["right"]}
            remember("step_cache", results)
    return {name: results[name] for name in ("whole", *CACHES)}


def spread(values: Sequence[float], digits: int) -> str:
    """Median and both ends."""
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def row_of(name: str, found: Mapping[str, Any]) -> Row:
    right = found.get("right")
    return Row(
        name=f"step cache, {name}",
        ours=f"{spread([100 * s for s in found['saved']], 0)} % of evaluations left out",
        peer_name="" if right is None else "right",
        peer="" if right is None else f"{percent(np.mean(right))} +- {percent(standard_error(right))}",
        target="reported as found",
        met=None,
        untold=f"PSNR {spread(found['psnr'], 1)} dB, SSIM {spread(found['ssim'], 4)}",
    )


def measure(load: Callable[[], Pipeline] = load_tiny) -> Iterator[Row]:
    for name, found in run_all(load()).items():
        yield row_of(name, found)
