"""What the step cache leaves out on ernie-image-tiny and what it costs: evaluations, PSNR and SSIM, prompts followed.

Official settings, 50 steps at cfg 4; every threshold paints the same prompts with the same seeds as the run without it.
What exists in out/bench/step_cache.json is not painted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..ernie_core.pipeline import Pipeline, make_denoise
from ..ernie_core.sampling.cache import StepCache, StepCacheRun
from ..ernie_core.sampling.guidance import Denoise, with_cfg
from ..ernie_core.sampling.latents import make_noise
from ..ernie_core.sampling.samplers import sample_euler
from ..ernie_core.sampling.schedule import make_sigmas
from ..tiny.scenes import heldout_prompts
from .compare import Row
from .guidance_helps import SIDE, judge, kept, psnr, standard_error
from .samplers_pay import paint
from .tiny_runs import load_tiny, percent, remember

PROMPTS = 20
STEPS = 50
CACHES = {
    "whole": StepCache(threshold=0.0),
    "0.02": StepCache(threshold=0.02),
    "0.05": StepCache(threshold=0.05),
    "0.1": StepCache(threshold=0.1),
    "0.2": StepCache(threshold=0.2),
    "0.1, at most 1 in a row": StepCache(threshold=0.1, max_skips=1),
    "1.0, at most 9 in a row": StepCache(threshold=1.0, max_skips=9),
}


def sample(pipeline: Pipeline, cache: StepCache, texts: list[str]) -> tuple[Tensor, float]:
    """(latents, share of evaluations left out)."""
    dit = pipeline.transformer
    run = StepCacheRun(cache, len(dit.layers))

    def under(key: str, prompts: list[str]) -> Denoise:
        features = pipeline.encode(prompts)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return make_denoise(dit, features, SIDE, SIDE, run_block=run.run_block(key, sigma))(x, sigma)

        return denoise

    denoise = with_cfg(under("positive", texts), under("negative", [""] * len(texts)), 4.0)
    noise = make_noise(range(len(texts)), dit.config.in_channels, SIDE, SIDE)
    return sample_euler(denoise, noise, make_sigmas(STEPS)), run.skipped / (run.skipped + run.whole)


def ssim(pictures: np.ndarray, others: np.ndarray, window: int = 7) -> float:
    """Median over pictures of the mean SSIM of luma, uniform window (Wang et al. 2004)."""
    a, b = (torch.from_numpy(p.astype(np.float64)).mean(dim=-1)[:, None] / 255 for p in (pictures, others))
    mean_a, mean_b = avg_pool2d(a, window, 1), avg_pool2d(b, window, 1)
    var_a, var_b = avg_pool2d(a * a, window, 1) - mean_a**2, avg_pool2d(b * b, window, 1) - mean_b**2
    covariance = avg_pool2d(a * b, window, 1) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(score.mean(dim=(1, 2, 3)).median())


def run_all(pipeline: Pipeline) -> dict[str, Any]:
    results = kept("step_cache")
    missing = [name for name in CACHES if name not in results]
    if missing:
        asked = heldout_prompts(200)[:PROMPTS]
        scenes, texts = [scene for scene, _ in asked], [text for _, text in asked]
        whole = paint(pipeline, sample(pipeline, CACHES["whole"], texts)[0])
    for name in missing:
        latents, saved = sample(pipeline, CACHES[name], texts)
        pictures = paint(pipeline, latents)
        results[name] = {
            "right": judge(pictures, scenes)["right"],
            "saved": saved,
            "psnr": psnr(pictures, whole),
            "ssim": ssim(pictures, whole),
        }
        remember("step_cache", results)
    return results


def measure(load: Callable[[], Pipeline] = load_tiny) -> Iterator[Row]:
    results = run_all(load())
    for name, found in results.items():
        yield Row(
            name=f"step cache, threshold {name}",
            ours=f"{percent(found['saved'])} of evaluations left out",
            peer_name="right",
            peer=f"{percent(np.mean(found['right']))} +- {percent(standard_error(found['right']))}",
            target="reported as found",
            met=None,
            untold=f"PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.4f}",
        )
