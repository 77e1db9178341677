"""Short training runs on ernie-image-tiny, through the trainer, judged by the LoRA file that comes out.

A run is a job folder as a user's: pictures and captions on disk, a recipe, `train`. What is measured afterwards is the
base with the *file* merged into it, read back from disk. Everything is seeded; a run that exists is not trained again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..ernie_core.pipeline import Pipeline
from ..ernie_core.training.feed import Data
from ..ernie_core.training.job import create_job
from ..ernie_core.training.recipe import ModelPaths, Recipe
from ..ernie_core.training.state import Job
from ..ernie_core.training.trainer import train
from ..ernie_core.weights.lora import module_shapes, read_lora
from ..tiny.package import FOLDER

WORK = Path(__file__).resolve().parents[1] / "out" / "bench"
PICTURES = Path(__file__).resolve().parent / "pictures"
TINY = ModelPaths(transformer=str(FOLDER))
SAMPLING_STEPS = 20
"""Of every picture that is judged, at cfg 4: the base follows 200 held-out prompts as well as with its 50."""


def load_tiny() -> Pipeline:
    """The base, fp32, frozen."""
    torch.set_flush_denormal(True)
    pipeline = Pipeline.from_folder(FOLDER, dtype=torch.float32, enhancer=False)
    pipeline.transformer.requires_grad_(False)
    return pipeline


def run_job(recipe: Recipe, data: Data) -> tuple[Path, list[dict[str, Any]]]:
    """Train under out/bench/jobs/NAME where that has not happened; (the LoRA file, its step events)."""
    job = Job(WORK / "jobs" / recipe.name)
    same = job.exists() and job.recipe() == recipe
    if not same or job.newest_step() != recipe.steps:
        create_job(job.folder, recipe, data, start_over=job.exists() and not same)
        train(job, device="cpu")
    return job.lora_path, [event for event in job.events() if event["event"] == "step"]


def with_lora(pipeline: Pipeline, path: Path) -> Pipeline:
    """The pipeline with a LoRA file merged into a copy of its transformer."""
    transformer = copy.deepcopy(pipeline.transformer)
    lora = read_lora(path, module_shapes(transformer))
    with torch.no_grad():
        for name, layer in lora.layers.items():
            weight = transformer.get_submodule(name).weight
            weight += layer.delta(weight)
    return Pipeline(
        transformer=transformer, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, vae=pipeline.vae
    )


def save_picture(name: str, picture: np.ndarray) -> None:
    """bench/pictures/NAME.jpg, at most 1,024 px wide."""
    PICTURES.mkdir(exist_ok=True)
    image = Image.fromarray(picture)
    image.thumbnail((1024, 1024 * image.height // image.width + 1))
    image.save(PICTURES / f"{name}.jpg", quality=85)


def remember(name: str, result: Mapping[str, Any]) -> None:
    """Keep the numbers of a run beside its files, for the results page."""
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
