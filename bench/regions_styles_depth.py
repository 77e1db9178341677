"""Region weighting, several caption styles and elastic depth, each against the run without it; equal steps and seeds.

All runs learn the hearts of `lora_learns`, with its recipe for 400 steps and every second sample a heart: so early that
there is room above.

- region: boxes around the hearts, extra loss weight 0.1 (ERNIE-ViLG 2.0's value) and 1.0, on every sample;
- styles: keyword, sentence and instruction captions mixed, against keywords alone, asked for in all three;
- depth: a quarter of the steps without one middle block, judged with all blocks and without that one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..ernie_core.pipeline import Pipeline
from ..ernie_core.training.blocks import run_blocks, skip_list
from ..ernie_core.training.dataset import read_dataset
from ..ernie_core.training.items import Dataset, join_datasets
from ..ernie_core.training.recipe import DepthConfig, Recipe
from ..tiny.evaluate import evaluate
from ..tiny.novel import SHAPES_AND_NOVEL, concept_prompts, concept_scenes, write_concept_dataset
from ..tiny.scenes import Scene, heldout_prompts
from .compare import Row
from .lora_learns import HEARTS, OWN, RECIPE, own_pictures
from .tiny_runs import WORK, load_tiny, percent, remember, run_job, with_lora

SEEDS = (0,)
STEPS = 400
OWN_PROMPTS = 100
STEPS_JUDGED = 10
"""Sampling steps: half of the other benchmarks', for twice the runs."""
SKIPPED = 1
STYLES = {
    "keyword": "{size} {color} {shape}, {place}, {background} background",
    "sentence": "the {shape} is {color} and {size}, it sits at the {place}, and the background is {background}",
    "instruction": "please draw one {size} {color} {shape} at the {place} and make the background {background}",
}
"""How a caption of each style is worded here; only the keywords are among the wordings of the base's training."""


def write_hearts(folder: Path, styles: Collection[str] = ()) -> Path:
    """The hearts of `lora_learns` as a metadata.jsonl with their boxes; captions in `styles`, or the usual ones."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    rows = []
    for i, scene in enumerate(write_concept_dataset(folder, HEARTS)):
        path = folder / f"{i:02}.png"
        pixels = np.asarray(Image.open(path)).astype(int)
        inked = np.abs(pixels - pixels[:, :1]).max(axis=2) > 8  # objects stay clear of the left edge
        columns, rows_inked = np.flatnonzero(inked.any(axis=0)), np.flatnonzero(inked.any(axis=1))
        box = [columns[0], rows_inked[0], columns[-1] + 1, rows_inked[-1] + 1]
        captions = {style: word(scene, style) for style in styles}
        if not styles:
            captions = {"caption": path.with_suffix(".txt").read_text(encoding="utf-8").strip()}
        path.with_suffix(".txt").unlink()
        rows.append({"file_name": path.name, **captions, "boxes": [[int(v) for v in box]], "repeats": OWN // HEARTS})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder


def word(scene: Scene, style: str) -> str:
    text = STYLES[style].format_map(vars(scene))
    # The style of a background is told as the base learnt to read it: the word in front of its colour.
    return text.replace(scene.background, f"gradient {scene.background}") if scene.style == "gradient" else text


def make_data(pipeline: Pipeline, styles: Collection[str] = ()) -> Dataset:
    """Hearts with captions in `styles` and the base's own pictures, each half of an epoch."""
    hearts = write_hearts(WORK / "-".join(["hearts", "boxes", *styles]), styles)
    return join_datasets([read_dataset(hearts, "metadata"), own_pictures(pipeline)])


def hearts_right(pipeline: Pipeline, style: str | None = None) -> float:
    """Share of the 50 held-out hearts right in colour, shape and place, asked for as captioned or in a style."""
    asked = concept_prompts(50, training=concept_scenes(HEARTS))
    if style is not None:
        asked = [(scene, word(scene, style)) for scene, _ in asked]
    return evaluate(pipeline, asked, steps=STEPS_JUDGED, shapes=SHAPES_AND_NOVEL)["all"]


def own_right(pipeline: Pipeline) -> float:
    """Share of 100 held-out prompts of the base right in colour, shape and place."""
    return evaluate(pipeline, heldout_prompts(200)[:OWN_PROMPTS], steps=STEPS_JUDGED, shapes=SHAPES_AND_NOVEL)["all"]


@contextmanager
def reduced(pipeline: Pipeline) -> Iterator[Pipeline]:
    """The pipeline with the middle block(s) of `skip_list` left out."""
    transformer = pipeline.transformer
    whole = transformer.forward
    blocks = run_blocks(checkpoint=False, skip=skip_list(len(transformer.layers), SKIPPED))
    transformer.forward = lambda *inputs, **options: whole(*inputs, **{**options, "run_block": blocks})
    try:
        yield pipeline
    finally:
        del transformer.forward


def judge(pipeline: Pipeline, kind: str) -> dict[str, float]:
    """What a run of this kind is judged by."""
    if kind == "styles":
        return {f"hearts, {style}": hearts_right(pipeline, style) for style in STYLES}
    found = {"hearts": hearts_right(pipeline), "own": own_right(pipeline)}
    if kind == "depth":
        with reduced(pipeline):
            found |= {"hearts, reduced": hearts_right(pipeline), "own, reduced": own_right(pipeline)}
    return found


PLAIN = replace(RECIPE, name="plain", steps=STEPS, optimiser=replace(RECIPE.optimiser, ema=0.99))
RUNS: dict[str, tuple[str, Recipe, Collection[str]]] = {
    "plain": ("depth", PLAIN, ()),
    "region 0.1": ("region", replace(PLAIN, name="region-0.1", region_weight=0.1, device_share=1.0), ()),
    "region 1.0": ("region", replace(PLAIN, name="region-1.0", region_weight=1.0, device_share=1.0), ()),
    "elastic depth": ("depth", replace(PLAIN, name="elastic", depth=DepthConfig(skip=SKIPPED, share=0.25)), ()),
    "keyword captions": ("styles", replace(PLAIN, name="keyword"), ("keyword",)),
    "three styles": ("styles", replace(PLAIN, name="styles"), tuple(STYLES)),
}
"""What the table calls a run -> (how it is judged, its recipe, the styles of its captions)."""


def measure() -> Iterator[Row]:
    base = load_tiny()
    results: dict[str, list[dict[str, float]]] = {"base": [judge(base, "depth") | judge(base, "styles")]}
    for seed in SEEDS:
        for name, (kind, recipe, styles) in RUNS.items():
            path, _ = run_job(replace(recipe, name=f"{recipe.name}-{seed}", seed=seed), make_data(base, styles))
            results.setdefault(name, []).append(judge(with_lora(base, path), kind))
            remember("regions_styles_depth", results)
    for name, (kind, _, _) in RUNS.items():
        peer = "keyword captions" if kind == "styles" else "plain"
        for what in results[name][0]:
            ours, theirs = ([run[what] for run in results[n]] for n in (name, peer))
            yield Row(
                name=f"{name}: {what}",
                ours=" ".join(map(percent, ours)),
                peer_name="base" if name == peer else peer,
                peer=percent(results["base"][0][what]) if name == peer else " ".join(map(percent, theirs)),
                target="reported as found",
                met=None,
                untold="shown beside it",
            )
