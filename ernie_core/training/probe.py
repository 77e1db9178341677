"""What a run will cost, measured: real steps of the real trainer on made-up data of the right size."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..sampling.inputs import LATENT_CHANNELS
from ..sampling.latents import latent_size
from .feed import Batch
from .recipe import Recipe, SampleConfig
from .state import Job
from .trainer import Trainer
from .world import World, join_world

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one optimiser step."""

    seconds: tuple[float, ...]
    """Each measured step, the first (which warms up) left out."""
    peak_bytes: int | None
    """Most memory that the device held; None on a CPU."""
    size: tuple[int, int]
    """Width and height in pixels that it was measured at."""


class _MadeUpFeed:
    """What the trainer asks of `Feed`, without any data."""

    hash, trigger, items = "probe", "", 0

    def __init__(self, recipe: Recipe, size: tuple[int, int], text_tokens: int, text_dim: int):
        self.recipe = recipe
        rows, columns = latent_size(*size)
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(recipe.batch_size, LATENT_CHANNELS, rows, columns, generator=generator)
        self.features = torch.randn(text_tokens, text_dim, generator=generator)

    def samples_in(self, step: int) -> int:  # noqa: ARG002
        return self.recipe.batch_size * self.recipe.accumulation

    def text(self, prompt: str) -> Tensor:  # noqa: ARG002
        return self.features

    def micro_batches(self, step: int) -> list[Batch]:
        count = self.recipe.batch_size
        return [
            Batch(
                numbers=tuple(range(first, first + count)),
                keys=tuple(map(str, range(first, first + count))),
                tags=("",) * count,
                captions=("",) * count,
                shape_CHW=(self.latents.shape[1], self.latents.shape[2], self.latents.shape[3]),
                latents_BCHW=self.latents,
                lose_BCHW=self.latents.flip(0, -1) if self.recipe.objective == "dpo" else None,
                texts=(self.features,) * count,
                masks_BHW=None,
                regions_BHW=None,
                keyword_columns=(None,) * count,
                weights_B=torch.ones(count),
            )
            for first in range(step * self.samples_in(step), (step + 1) * self.samples_in(step), count)
        ]


def probe(recipe: Recipe, size: tuple[int, int], *, text_tokens: int = 256, device: str | None = None) -> Cost:
    """Load the base, train `STEPS` steps after one to warm up, and throw everything away.

    Args:
        size: width and height in pixels, the largest bucket of the data.
        text_tokens: length of the captions, in tokens.

    Raises:
        ErnieError: the models cannot be used, or it does not fit into memory.
    """
    world = World(device=join_world(device).device)
    # Nothing is cached or drawn, and nobody waits for other processes.
    recipe = replace(recipe, samples=SampleConfig(), tensorboard=False, reference_bank=0)
    if recipe.objective == "distil":  # what most steps of a run are
        fake = replace(recipe.distil.fake, warmup=0)
        recipe = replace(recipe, distil=replace(recipe.distil, trajectory_steps=0, fake=fake))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.enable_grad():
        job = Job(Path(folder) / "probe")
        job.write_recipe(recipe)
        trainer = Trainer(
            job,
            world,
            lambda _: None,
            make_feed=lambda model: _MadeUpFeed(recipe, size, text_tokens, model.config.text_in_dim),
        )
        seconds = []
        for step in range(1 + STEPS):
            started = time.perf_counter()
            trainer.train_step(step)
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    return Cost(seconds=tuple(seconds[1:]), peak_bytes=peak, size=size)
