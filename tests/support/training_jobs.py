"""Small real training jobs: a random ERNIE-Image of two blocks, drawn pictures, seconds a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ernie_pack.ernie_core.training.adapters import AdapterConfig
from ernie_pack.ernie_core.training.buckets import Stage
from ernie_pack.ernie_core.training.dataset import read_dataset
from ernie_pack.ernie_core.training.job import create_job
from ernie_pack.ernie_core.training.pairs import read_pairs
from ernie_pack.ernie_core.training.prompts import Prompts, make_prompt
from ernie_pack.ernie_core.training.recipe import ModelPaths, OptimiserConfig, Recipe, SampleConfig
from ernie_pack.ernie_core.training.state import Job
from PIL import Image
from random_models import RELEASED_FILES

CAPTIONS = ("a red square", "a blue circle, small", "a green star in the corner", "a black ring")


def model_paths(models: Path) -> ModelPaths:
    """The files of `write_random_models`."""
    return ModelPaths(**{k: str(models / RELEASED_FILES[k]) for k in ("transformer", "text_encoder", "vae")})


def write_pictures(folder: Path, *, count: int, seed: int = 0, px: tuple[int, int] = (64, 48)) -> None:
    """Pictures of smooth noise with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize(px, Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(CAPTIONS[i % len(CAPTIONS)], encoding="utf-8")


def small_prompts(count: int = 7) -> Prompts:
    """Captions, every other one with the tag shapes."""
    items = [make_prompt(f"{CAPTIONS[i % 4]} {i}", tag="shapes" if i % 2 else "") for i in range(count)]
    return Prompts(items=tuple(items))


def small_recipe(models: Path, **changes) -> Recipe:
    """Four samples a step, rank 2, fp32, no samples."""
    settings = {
        "name": "small",
        "models": model_paths(models),
        "steps": 6,
        "batch_size": 2,
        "accumulation": 2,
        "precision": "fp32",
        "save_dtype": "fp32",
        "adapter": AdapterConfig(rank=2),
        "optimiser": OptimiserConfig(lr=1e-2, warmup=1),
        "stages": (Stage(resolutions=(64,)),),
        "samples": SampleConfig(width=64, height=48, base_steps=2, turbo_steps=2),
    }
    if changes.get("objective") == "distil":  # painted on the student's grid
        settings["samples"] = SampleConfig(width=64, height=48)
    return Recipe(**{**settings, **changes})


def small_job(folder: Path, recipe: Recipe, *, count: int = 7) -> Job:
    """A job on drawn pictures, on pairs of them for dpo, or on their captions for distil."""
    if recipe.objective == "distil" and not recipe.distil.gan_weight:
        return create_job(folder, recipe, small_prompts(count))
    data = folder.parent / f"data-{recipe.objective}-{count}"
    if recipe.objective == "dpo":
        if not data.exists():
            write_pictures(data / "chosen", count=count, seed=1)
            write_pictures(data / "rejected", count=count, seed=2)
        return create_job(folder, recipe, read_pairs(data))
    if not data.exists():
        write_pictures(data, count=count)
    return create_job(folder, recipe, read_dataset(data))
