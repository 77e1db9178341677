"""What the training loop asks of the data: the micro-batches of a step, ready to compute on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ErnieError, Interrupted
from ..sampling.inputs import LATENT_CHANNELS
from ..sampling.latents import latent_size
from ..weights.checkpoint import build_text_encoder, build_tokenizer, build_vae, read_component
from .buckets import BatchPlan, Sample
from .caching import LatentCache, TextCache, build_latents, build_texts, encoder_key, vae_key
from .captions import all_texts, draw_caption, keyword_columns
from .items import Dataset, read_manifest
from .objectives import is_drawn, region_weights
from .pairs import Pair, Pairs, read_pairs_manifest
from .prompts import Prompts, is_prompts_manifest, read_prompts_manifest
from .recipe import Recipe
from .state import Job, file_hash
from .world import World

OnEvent = Callable[[Mapping[str, Any]], None]
Data = Dataset | Pairs | Prompts
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one size. Of a pair `latents_BCHW` is the winner and `lose_BCHW` the loser."""

    numbers: tuple[int, ...]
    keys: tuple[str, ...]
    """What a sample is, whatever step it is drawn in."""
    tags: tuple[str, ...]
    """What each sample's prompt is about, for distillation's table of teachers; "" = nothing said."""
    captions: tuple[str, ...]
    shape_CHW: tuple[int, int, int]
    """Of a latent."""
    latents_BCHW: Tensor | None
    """None where the objective paints its pictures itself."""
    lose_BCHW: Tensor | None
    texts: tuple[Tensor, ...]
    """Features [T, D] of each sample's caption."""
    masks_BHW: Tensor | None
    """Loss weights, divided by their own area; None = all ones."""
    regions_BHW: Tensor | None
    """Loss weights that are not divided out (ERNIE-ViLG 2.0); None = all ones."""
    keyword_columns: tuple[tuple[int, ...] | None, ...]
    """Text columns of each sample's keywords; None = attention as usual."""
    weights_B: Tensor

    def split(self) -> list[Batch]:
        """The same samples, one per batch."""
        return [self.take([i]) for i in range(len(self.numbers))]

    def take(self, rows: Sequence[int]) -> Batch:
        """Some of the samples."""

        def some(values: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(values[i] for i in rows)

        def row(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[list(rows)]

        return replace(
            self,
            numbers=some(self.numbers),
            keys=some(self.keys),
            tags=some(self.tags),
            captions=some(self.captions),
            latents_BCHW=row(self.latents_BCHW),
            lose_BCHW=row(self.lose_BCHW),
            texts=some(self.texts),
            masks_BHW=row(self.masks_BHW),
            regions_BHW=row(self.regions_BHW),
            keyword_columns=some(self.keyword_columns),
            weights_B=self.weights_B[list(rows)],
        )


class Feed:
    """Plan, captions and caches of a job; everything it gives is a function of the recipe, the data and the step."""

    def __init__(self, job: Job, recipe: Recipe, world: World, log: OnEvent):
        """Read the manifest and make what the caches lack; one process makes it while the others wait.

        Raises:
            ErnieError: no data, data for the other objective, or pictures that have gone or changed.
            Interrupted: it was asked to stop; what is cached stays.
        """
        self.recipe, self.world, self.job = recipe, world, job
        data = read_data(job, recipe)
        self.options = data.options
        entries = data.pairs if isinstance(data, Pairs) else data.items
        self.hash = file_hash(job.manifest_path)[:16]
        self.items = len(entries)
        self.shows_pictures = recipe.objective != "distil" or recipe.distil.gan_weight > 0
        self.trigger = data.options.rules.trigger or next((e.rules.trigger for e in entries if e.rules.trigger), "")
        self.plan = BatchPlan(
            entries,
            data.options,
            stages=recipe.stages,
            batch_size=recipe.batch_size,
            accumulation=recipe.accumulation,
            world_size=world.size,
            seed=recipe.seed,
        )
        # The caches are keyed by what made an entry, so jobs on one set of data may share a folder.
        self.dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        memo = model_hashes_path(job)
        vae, encoder = recipe.models.path("vae"), recipe.models.path("text_encoder")
        self.latents = LatentCache(
            job.cache_folder, vae=vae_key(vae, dtype=torch.float32, memo=memo), options=data.options
        )
        self.texts = TextCache(job.cache_folder, encoder=encoder_key(encoder, dtype=self.dtype, memo=memo))
        if world.leads:
            self._build([*all_texts(entries, data.options), *recipe.samples.prompts], log)
        world.barrier()
        keywords = recipe.keyword_weight and any(entry.keywords for entry in entries)
        self.tokenizer = build_tokenizer(read_component(encoder, "text_encoder")) if keywords else None
        self._columns: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = {}

    def _build(self, texts: list[str], log: OnEvent) -> None:
        said = 0.0

        def on_progress(done: int, total: int, what: str) -> None:
            nonlocal said
            if self.job.stop_requested():
                raise Interrupted(f"stopped while {what}, {done} of {total} done; they are kept.")
            if time.monotonic() - said > 1 or done == total:
                said = time.monotonic()
                message = f"{what}: {done} of {total}"
                log({"event": "caching", "what": what, "done": done, "total": total, "message": message})

        models, device = self.recipe.models, self.world.device
        if self.texts.missing(texts):
            component = read_component(models.path("text_encoder"), "text_encoder")
            encoder, tokenizer = build_text_encoder(component, dtype=self.dtype, device=device)
            encoder.eval().requires_grad_(False)
            build_texts(
                self.texts,
                texts,
                lambda prompts: encoder.encode_ids([tokenizer.encode(p) for p in prompts], device=device),
                on_progress=on_progress,
            )
        pictures = self.plan.pictures() if self.shows_pictures else ()
        if self.latents.missing(pictures):
            vae = build_vae(read_component(models.path("vae"), "vae"), dtype=torch.float32, device=device)
            build_latents(self.latents, pictures, vae.eval().requires_grad_(False), on_progress=on_progress)

    # --- questions ---

    def text(self, prompt: str) -> Tensor:
        """Features [T, D] of a caption, of a sample prompt or of the empty prompt."""
        return self.texts.text(prompt)

    def samples_in(self, step: int) -> int:
        """Samples of a step over all processes: what its loss is the mean over."""
        return self.plan.samples_in(step)

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's share of a step; empty micro-batches are left out."""
        shares = (self.plan.batch_at(step, micro, rank=self.world.rank) for micro in range(self.recipe.accumulation))
        return [self._batch(samples) for samples in shares if samples]

    def _batch(self, samples: tuple[Sample, ...]) -> Batch:
        recipe = self.recipe
        height, width = latent_size(*samples[0].size)
        read = self.shows_pictures
        latents = [[self.latents.latent(p).float() for p in s.pictures] for s in samples] if read else []
        captions = [draw_caption(s.entry, self.options, seed=recipe.seed, number=s.number) for s in samples]
        masks = [self.latents.mask(s.pictures[0]) if read else None for s in samples]
        regions = [self._regions(s, height, width) for s in samples]
        return Batch(
            numbers=tuple(s.number for s in samples),
            keys=tuple(" ".join(picture.item.sha256 for picture in s.pictures) for s in samples),
            tags=tuple("" if isinstance(s.entry, Pair) else s.entry.concept for s in samples),
            captions=tuple(captions),
            shape_CHW=(LATENT_CHANNELS, height, width),
            latents_BCHW=torch.stack([of_sample[0] for of_sample in latents]) if read else None,
            lose_BCHW=torch.stack([of[1] for of in latents]) if recipe.objective == "dpo" else None,
            texts=tuple(self.text(caption) for caption in captions),
            masks_BHW=_stack(masks, height, width),
            regions_BHW=_stack(regions, height, width),
            keyword_columns=tuple(self._keywords(s, caption) for s, caption in zip(samples, captions, strict=True)),
            weights_B=torch.tensor([s.entry.weight for s in samples]),
        )

    def _regions(self, sample: Sample, height: int, width: int) -> Tensor | None:
        """ERNIE-ViLG 2.0's loss weights of a sample, from its boxes, on its share of the samples."""
        weight = self.recipe.region_weight
        boxes = sample.pictures[0].boxes() if weight else ()
        share = self.recipe.device_share
        if not boxes or not is_drawn(share, "region", seed=self.recipe.seed, number=sample.number):
            return None
        return region_weights(boxes, height, width, weight)

    def _keywords(self, sample: Sample, caption: str) -> tuple[int, ...] | None:
        """Text columns of a sample's keywords, on its share of the samples; None = attention as usual."""
        if self.tokenizer is None or not caption:
            return None
        if not is_drawn(self.recipe.device_share, "keyword", seed=self.recipe.seed, number=sample.number):
            return None
        key = caption, sample.entry.keywords
        if key not in self._columns:
            self._columns[key] = keyword_columns(caption, sample.entry.keywords, self.tokenizer)
        return self._columns[key]


def read_data(job: Job, recipe: Recipe) -> Data:
    """What the job's manifest lists.

    Raises:
        ErnieError: there is none, it is of the other kind, or pictures that it lists have gone or changed.
    """
    if not job.manifest_path.is_file():
        raise ErnieError(f"{job.folder} has no manifest.jsonl: make the job together with its data.")
    if recipe.objective == "distil" and is_prompts_manifest(job.manifest_path):
        return read_prompts_manifest(job.manifest_path)
    return (read_pairs_manifest if recipe.objective == "dpo" else read_manifest)(job.manifest_path)


def model_hashes_path(job: Job) -> Path:
    """Where the hashes of model files are remembered, for all jobs of a folder: a 16 GB file takes a minute."""
    return job.folder.parent / ".model-hashes.json"


def _stack(maps: list[Tensor | None], height: int, width: int) -> Tensor | None:
    """[B, H, W] with ones where a sample has none; None where no sample has one."""
    if all(m is None for m in maps):
        return None
    return torch.stack([torch.ones(height, width) if m is None else m for m in maps])
