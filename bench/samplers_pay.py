"""Which sampler pays on ernie-image-tiny: distance to the exact flow, and prompts followed, per model evaluation.

Every sampler paints the same prompts with the same seeds at cfg 4. Exact is Heun with `EXACT` steps, twice that many
evaluations. One method that the pack does not offer is measured beside them: Adams-Bashforth of second order in sigma.
What exists in out/bench/samplers.json is not painted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ernie_core.config import SAMPLERS
from ..ernie_core.pipeline import Pipeline, make_denoise
from ..ernie_core.sampling.guidance import Denoise, with_cfg
from ..ernie_core.sampling.latents import make_noise, step_noise
from ..ernie_core.sampling.samplers import STOCHASTIC, Sampler
from ..ernie_core.sampling.schedule import make_sigmas
from ..tiny.scenes import heldout_prompts
from .compare import Row
from .guidance_helps import SIDE, judge, kept, standard_error
from .tiny_runs import load_tiny, percent, remember

PROMPTS = 20
BATCH = 20
EXACT = 100
EVALUATIONS = (8, 12, 20)
NOT_OFFERED = "adams_bashforth"
NAMES = (*SAMPLERS, NOT_OFFERED)


def denoiser(pipeline: Pipeline, texts: list[str]) -> Denoise:
    def under(prompts: list[str]) -> Denoise:
        return make_denoise(pipeline.transformer, pipeline.encode(prompts), SIDE, SIDE)

    return with_cfg(under(texts), under([""] * len(texts)), 4.0)


def grid_of(name: str, evaluations: int) -> Tensor:
    """The official grid on which a sampler asks the model at most `evaluations` times; Heun's last step asks once."""
    return make_sigmas((evaluations + 1) // 2 if name == "heun" else evaluations)


def sample_adams_bashforth(denoise: Denoise, x: Tensor, sigmas: Tensor, **_: Any) -> Tensor:
    """The velocity carried on in a straight line of sigma to the middle of each step; order 2, one call per step."""
    before: tuple[float, Tensor] | None = None
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        velocity, step = denoise(x, sigma), sigma_next - sigma
        slope = 0.0 if before is None else (velocity - before[1]) / (sigma - before[0])
        x = x + step * (velocity + step / 2 * slope)
        before = (sigma, velocity)
    return x


def run(pipeline: Pipeline, name: str, sigmas: Tensor) -> Tensor:
    """Latents of all prompts, picture i from seed i."""
    texts = [text for _, text in heldout_prompts(200)[:PROMPTS]]
    parts = []
    for start in range(0, PROMPTS, BATCH):
        seeds = range(start, start + BATCH)
        noise = make_noise(seeds, pipeline.transformer.config.in_channels, SIDE, SIDE)
        draw_noise = step_noise([(seed, 0) for seed in seeds])
        denoise = denoiser(pipeline, texts[start : start + BATCH])
        sample = sample_adams_bashforth if name == NOT_OFFERED else Sampler(name=name)
        parts.append(sample(denoise, noise, sigmas, draw_noise=draw_noise))
    return torch.cat(parts)


@torch.no_grad()
def paint(pipeline: Pipeline, latents: Tensor) -> np.ndarray:
    latents = latents.to(next(pipeline.vae.parameters()).dtype)
    shown = torch.cat([pipeline.vae.decode_fitting(x) for x in latents.split(BATCH)]).float()
    return ((shown / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def judge_latents(pipeline: Pipeline, latents: Tensor, exact: Tensor) -> dict[str, Any]:
    scenes = [scene for scene, _ in heldout_prompts(200)[:PROMPTS]]
    error = ((latents - exact) ** 2).mean(dim=(1, 2, 3)).sqrt()
    return {"right": judge(paint(pipeline, latents), scenes)["right"], "error": error.tolist()}


def run_all(pipeline: Pipeline) -> dict[str, Any]:
    results = kept("samplers")
    missing = [(f"{n} {e}", n, e) for e in EVALUATIONS for n in NAMES if f"{n} {e}" not in results]
    if not missing:
        return results
    exact = run(pipeline, "heun", make_sigmas(EXACT))
    results["exact"] = judge_latents(pipeline, exact, exact)
    for label, name, evaluations in missing:
        results[label] = judge_latents(pipeline, run(pipeline, name, grid_of(name, evaluations)), exact)
        remember("samplers", results)
    return results


def measure(load: Callable[[], Pipeline] = load_tiny) -> Iterator[Row]:
    results = run_all(load())
    for evaluations in EVALUATIONS:
        euler = results[f"euler {evaluations}"]
        for name in NAMES:
            found = results[f"{name} {evaluations}"]
            low, middle, high = np.percentile(found["error"], [25, 50, 75])
            ratios = tuple(a / b for a, b in zip(euler["error"], found["error"], strict=True))
            yield Row(
                name=f"{name}, {evaluations} evaluations",
                ours=f"{percent(np.mean(found['right']))} +- {percent(standard_error(found['right']))} right",
                peer_name="exact flow",
                peer=percent(np.mean(results["exact"]["right"])),
                ratios=() if name in STOCHASTIC or name == "euler" else ratios,
                target="reported as found",
                met=None,
                untold="draws noise: another picture"
                if name in STOCHASTIC
                else f"error {middle:.4f} [{low:.4f}-{high:.4f}]",
            )
