"""A long tail of categories: what a rare one teaches under three ways of drawing, at equal steps.

Three colours that the base has never seen: 400, 40 and 8 pictures of them (which colour has which count goes round with
the seed), a quarter of all badly made; scores by the built-in scorer. One LoRA per way and seed, same steps and batch,
same pictures on the disk: only how often each is drawn differs. Judged per category on prompts of shapes and places
that no training picture joins, the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

import numpy as np

from ..ernie_core.curation.sampling import ARTICLE, PRESETS, make_pool, row_shares
from ..ernie_core.pipeline import Pipeline
from ..ernie_core.scoring.builtin import measure_picture
from ..ernie_core.training.dataset import read_dataset
from ..ernie_core.training.items import Dataset
from ..ernie_core.training.pictures import load_image
from ..ernie_core.training.previews import picture_grid
from ..tiny.evaluate import evaluate, paint
from ..tiny.scenes import ALL_INKS
from ..tiny.tail import CATEGORIES, ROLES, roles, tail_prompts, write_tail_dataset
from .compare import Row
from .lora_learns import RECIPE
from .tiny_runs import SAMPLING_STEPS, WORK, load_tiny, percent, remember, run_job, save_picture, with_lora

SEEDS = (0, 1, 2)
PROMPTS = 16
WAYS = ("proportional", ARTICLE, "tempered", "uniform over categories")
LEARNT = replace(
    RECIPE,
    name="tail",
    steps=300,
    batch_size=4,
    optimiser=replace(RECIPE.optimiser, lr=2e-3, ema=0.98),
    save_every=200,
)


def make_data(way: str, seed: int) -> Dataset:
    """The pictures of `seed`, each with the draws that `way` gives it."""
    folder = WORK / f"tail-{seed}"
    if not folder.is_dir():
        write_tail_dataset(folder, seed=seed)
    data = read_dataset(folder, "folder")
    scores = [measure_picture(load_image(item.image).rgb_HWC, "combined") for item in data.items]
    names: list[str] = sorted(CATEGORIES)
    color = [item.image.stem.split("-")[0] for item in data.items]
    pool = make_pool([names.index(c) for c in color], scores, names)
    draws = np.empty(len(pool))
    draws[pool.order] = len(pool) * row_shares(pool, PRESETS[way])
    items = (replace(i, concept=c, draws=float(d)) for i, c, d in zip(data.items, color, draws, strict=True))
    return replace(data, items=tuple(items))


def judge(model: Pipeline, seed: int) -> dict[str, float]:
    """Role -> share of its prompts right in colour, shape and place."""
    return {
        role: evaluate(model, tail_prompts(PROMPTS)[color], steps=SAMPLING_STEPS, colors=ALL_INKS)["all"]
        for color, role in roles(seed).items()
    }


def run_arm(base: Pipeline, way: str, seed: int) -> tuple[Pipeline, dict[str, float]]:
    """The LoRA of one way and seed, trained and judged where that has not happened; on its model, and the shares."""
    name = f"tail-{way.split(':')[0].replace(' ', '-')}-s{seed}"
    data = make_data(way, seed)
    path, _ = run_job(replace(LEARNT, name=name, seed=seed), data)
    model = with_lora(base, path)
    kept = WORK / f"{name}.json"
    if not kept.is_file():
        shares = {k: v / sum(data.concepts.values()) for k, v in data.concepts.items()}
        remember(name, judge(model, seed) | {f"{role} share": shares[color] for color, role in roles(seed).items()})
    return model, json.loads(kept.read_text())


def measure() -> Iterator[Row]:
    """A row per way and role: the mean over the seeds, and each of them."""
    base = load_tiny()
    found = {way: [run_arm(base, way, seed)[1] for seed in SEEDS] for way in WAYS}
    remember("long_tail", {**found, "base": judge(base, SEEDS[0])})
    prompts = [text for color in roles(SEEDS[0]) for _, text in tail_prompts(PROMPTS)[color][:4]]
    grid = {
        way: paint(run_arm(base, way, SEEDS[0])[0], prompts, seeds=range(len(prompts)), steps=SAMPLING_STEPS)
        for way in WAYS
    }
    save_picture("long_tail", picture_grid(grid))
    plain = WAYS[0]
    for way in WAYS[1:]:
        for role in ROLES:
            ours, peer = ([r[role] for r in found[name]] for name in (way, plain))
            wanted = way == "tempered" and role == "tail"
            yield Row(
                name=f"{way}: {role}, {percent(mean(r[f'{role} share'] for r in found[way]))} of the draws",
                ours=f"{percent(mean(ours))} ({', '.join(map(percent, ours))})",
                peer_name=plain,
                peer=f"{percent(mean(peer))} ({', '.join(map(percent, peer))})",
                target="above proportional" if wanted else "",
                met=mean(ours) > mean(peer) if wanted else None,
                untold="shown beside it",
            )
