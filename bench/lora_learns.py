"""A LoRA learns a shape that the base has never seen, from 20 pictures: hearts before and after, and what it costs.

Beside the 20 pictures stand 1,000 of the base's own (prior preservation: nothing new is shown), so that one sample in
three is a heart; the run without them is shown too. Judged on 50 prompts of colours and places that no training
heart had together, and on the base's own 200 held-out prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..ernie_core.pipeline import Pipeline
from ..ernie_core.training.adapters import AdapterConfig
from ..ernie_core.training.buckets import Stage
from ..ernie_core.training.captions import CaptionRules
from ..ernie_core.training.dataset import read_dataset
from ..ernie_core.training.items import Dataset, DatasetOptions, join_datasets
from ..ernie_core.training.objectives import SigmaSampling
from ..ernie_core.training.previews import picture_grid
from ..ernie_core.training.recipe import OptimiserConfig, Recipe
from ..tiny.evaluate import evaluate, paint
from ..tiny.novel import SHAPES_AND_NOVEL, concept_prompts, concept_scenes, write_concept_dataset, write_own_pictures
from ..tiny.scenes import Scene, heldout_prompts
from .compare import Row
from .tiny_runs import SAMPLING_STEPS, TINY, WORK, load_tiny, percent, remember, run_job, save_picture, with_lora

HEARTS, REPEATS, OWN = 20, 25, 1000
OWN_STEPS = 12
RECIPE = Recipe(
    name="lora-hearts",
    models=TINY,
    precision="fp32",
    steps=1200,
    batch_size=8,
    accumulation=1,
    adapter=AdapterConfig(rank=16),
    optimiser=OptimiserConfig(lr=1e-3, warmup=20, ema=0.995),
    sigmas=SigmaSampling(shift=2.5),
    stages=(Stage(resolutions=(128,)),),
    checkpointing=False,
    save_every=1000,
)
OWN_OPTIONS = DatasetOptions(rules=CaptionRules(dropout=0.1))
"""Only the base's own pictures lose captions, so that the empty prompt, which guidance subtracts, stays as it was."""


def make_data(pipeline: Pipeline, *, preserve: bool) -> Dataset:
    """The hearts, 25 times an epoch, and unless `preserve` is False the base's own pictures, once."""
    hearts = WORK / "hearts"
    if not hearts.is_dir():
        write_concept_dataset(hearts / f"{REPEATS}_hearts", HEARTS)
    data = read_dataset(hearts, "kohya")
    return join_datasets([data, own_pictures(pipeline)]) if preserve else data


def own_pictures(pipeline: Pipeline) -> Dataset:
    """The base's own pictures, painted where they are not there yet."""
    own = WORK / "own"
    if len(list(own.glob("*.txt"))) < OWN:
        tried = write_own_pictures(own, pipeline, OWN, steps=OWN_STEPS)
        print(f"{OWN} own pictures of {tried} painted")
    return read_dataset(own, "folder", OWN_OPTIONS)


def judge(pipeline: Pipeline) -> dict[str, float]:
    """Shares right in colour, shape and place, of the hearts and of the base's own prompts."""
    new = evaluate(pipeline, asked(), steps=SAMPLING_STEPS, shapes=SHAPES_AND_NOVEL)
    own = evaluate(pipeline, heldout_prompts(200), steps=SAMPLING_STEPS, shapes=SHAPES_AND_NOVEL)
    return {"hearts": new["all"], "own": own["all"]}


def asked() -> list[tuple[Scene, str]]:
    """The 50 held-out prompts of hearts."""
    return concept_prompts(50, training=concept_scenes(HEARTS))


def measure() -> Iterator[Row]:
    """Rows of the base, of the LoRA, and of the one that was trained on hearts alone for as many hearts."""
    base = load_tiny()
    results = {"base": judge(base)}
    models = {"base": base}
    alone = replace(RECIPE, name="lora-hearts-alone", steps=RECIPE.steps // 3)
    for label, recipe, preserve in (("LoRA", RECIPE, True), ("LoRA, hearts alone", alone, False)):
        path, events = run_job(recipe, make_data(base, preserve=preserve))
        models[label] = with_lora(base, path)
        results[label] = judge(models[label])
        results[label]["seconds"] = sum(event["seconds"] for event in events)
        remember("lora_learns", results)
    prompts = [text for _, text in [*asked()[:6], *heldout_prompts(200)[:4]]]
    grid = {
        label: paint(model, prompts, seeds=range(len(prompts)), steps=SAMPLING_STEPS) for label, model in models.items()
    }
    save_picture("lora_learns", picture_grid(grid))
    before = results["base"]
    for label, now in list(results.items())[1:]:
        wanted = label == "LoRA"
        yield Row(
            name=f"{label}: hearts right, 50 held-out prompts",
            ours=percent(now["hearts"]),
            peer_name="base",
            peer=percent(before["hearts"]),
            target="from < 10 % to > 80 %" if wanted else "",
            met=before["hearts"] < 0.1 and now["hearts"] > 0.8 if wanted else None,
            untold="shown beside it",
        )
        yield Row(
            name=f"{label}: the base's own 200 held-out prompts right",
            ours=percent(now["own"]),
            peer_name="base",
            peer=percent(before["own"]),
            target="at most 5 points lower" if wanted else "",
            met=before["own"] - now["own"] <= 0.05 if wanted else None,
            untold="shown beside it",
        )
