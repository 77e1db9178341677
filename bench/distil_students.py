"""Few-step students of one teacher and of several: the ablation of multi-teacher distribution matching.

Two LoRA experts know what the base does not: hearts, and pink. Students for 8 steps at cfg 1 learn from the base alone,
or from base and experts by tag, by noise level, by term. All arms of a seed start from the same student, which was
trained by regression to the teachers' trajectories, so that what differs is who teaches the matching. A run that exists
is not made again; a killed one goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from ..ernie_core.pipeline import Pipeline
from ..ernie_core.training.adapters import AdapterConfig
from ..ernie_core.training.buckets import Stage
from ..ernie_core.training.dataset import read_dataset
from ..ernie_core.training.distillation import DistilConfig, FakeConfig
from ..ernie_core.training.export import write_trained
from ..ernie_core.training.items import join_datasets
from ..ernie_core.training.previews import picture_grid
from ..ernie_core.training.prompts import Prompts, make_prompt
from ..ernie_core.training.recipe import OptimiserConfig, Recipe
from ..ernie_core.training.teachers import Rule, Teacher, TeacherTable, by_objective, by_sigma, by_tag
from ..ernie_core.weights.lora import module_shapes, module_strengths, read_lora
from ..ernie_core.weights.lora_edit import concatenate_loras
from ..tiny.evaluate import JUDGED, paint
from ..tiny.measure import matches
from ..tiny.measure import measure as measure_picture
from ..tiny.novel import CONCEPTS, SHAPES_AND_NOVEL, concept_prompts, concept_scenes, write_concept_dataset
from ..tiny.scenes import INKS, NOVEL_COLOR, NOVEL_SHAPE, Scene, caption, heldout_prompts, short_prompt, split
from .compare import Row
from .lora_learns import HEARTS, REPEATS, own_pictures
from .lora_learns import RECIPE as EXPERT_RECIPE
from .tiny_runs import TINY, WORK, load_tiny, percent, run_job, save_picture, with_lora

STEPS, TEACHER_STEPS, CFG = 8, 50, 4.0
JUDGED_PROMPTS = {"": 60, NOVEL_SHAPE: 40, NOVEL_COLOR: 40}
TAUGHT_PROMPTS = {"": 120, NOVEL_SHAPE: 80, NOVEL_COLOR: 80}
OPEN_PROMPTS, OPEN_SEEDS = 8, 6
SEEDS = (0, 1, 2)
RESULTS = WORK / "distil_students.json"
EXPERT_STEPS = {NOVEL_SHAPE: 700, NOVEL_COLOR: 1200}

START = Recipe(
    name="distil-start",
    models=TINY,
    precision="fp32",
    objective="distil",
    steps=400,
    batch_size=8,
    accumulation=1,
    adapter=AdapterConfig(rank=32),
    optimiser=OptimiserConfig(lr=1e-3, warmup=20, ema=0.99),
    stages=(Stage(resolutions=(128,)),),
    checkpointing=False,
    save_every=100,
    keep=0,
    distil=DistilConfig(cfg=CFG, trajectory_steps=400, trajectory_substeps=2, trajectory_bank=1),
)
MATCHING = replace(
    START,
    name="distil-matching",
    steps=56,
    optimiser=OptimiserConfig(lr=5e-4, warmup=5, betas=(0.0, 0.99), schedule="constant", ema=0.95),
    save_every=20,
    distil=DistilConfig(cfg=CFG, fake=FakeConfig(lr=1e-3, steps_per_student=2, warmup=12)),
)

WHOLE = replace(
    MATCHING,
    steps=70,
    optimiser=replace(MATCHING.optimiser, lr=4e-4, ema=0.9),
    distil=DistilConfig(cfg=CFG, gradient="all", fake=FakeConfig(lr=1e-3, steps_per_student=3, warmup=45)),
)
"""The finished picture is matched, with the gradient through all eight steps."""


# --- experts and tables -------------------------------------------------------------------------------------


def expert(concept: str, base: Pipeline) -> Path:
    """The LoRA that knows a concept, trained as the hearts of `lora_learns` are."""
    recipe = replace(EXPERT_RECIPE, name=f"expert-{concept}", save_every=300, steps=EXPERT_STEPS[concept])
    folder = WORK / f"{concept}s"
    if not folder.is_dir():
        write_concept_dataset(folder / f"{REPEATS}_{concept}s", HEARTS, concept=concept)
    return run_job(recipe, join_datasets([read_dataset(folder, "kohya"), own_pictures(base)]))[0]


def table(rules: Sequence[Rule], loras: Mapping[str, Path]) -> TeacherTable:
    """A table with the experts that `rules` ask."""
    asked = {name for rule in rules for name in rule.weights}
    teachers = tuple(Teacher(name=name, lora=str(path)) for name, path in loras.items() if name in asked)
    return TeacherTable(teachers=teachers, rules=tuple(rules))


HANDOVER = 0.8
"""Where the shape's expert hands over to the colour's: half of the grid's eight steps lie above it."""
BY_TAG = by_tag({concept: concept for concept in CONCEPTS})


@dataclass(frozen=True)
class Arm:
    """Who teaches the matching, and whose trajectories the start was regressed to."""

    label: str
    rules: tuple[Rule, ...] = ()
    start: str = "tag"
    from_experts: bool = False
    """Of a start: whether it begins as the sum of the experts' LoRAs, and not from nothing."""
    steps: int = START.steps
    """Of a start."""
    noises: int = 1
    """Of a start: trajectories per prompt."""
    matching: Recipe = MATCHING
    seeds: tuple[int, ...] = SEEDS


ARMS = {
    "single": Arm("one teacher", start="base"),
    "tag": Arm("by tag", BY_TAG),
    "sigma": Arm("by noise level", by_sigma((NOVEL_SHAPE, NOVEL_COLOR), [HANDOVER])),
    "term": Arm("by term", by_objective(ca=NOVEL_SHAPE, dm=NOVEL_COLOR)),
    "experts": Arm("by tag, from the experts", BY_TAG, start="experts"),
    "long": Arm("by tag, after the longer regression", BY_TAG, start="long", seeds=(0,)),
    "whole": Arm("by tag, the finished picture matched", BY_TAG, start="long", matching=WHOLE, seeds=(0,)),
}
STARTS = {
    "base": Arm("regression to one teacher"),
    "tag": Arm("regression by tag", BY_TAG),
    "experts": Arm("regression by tag, from the experts", BY_TAG, from_experts=True),
    "long": Arm("longer regression by tag, from the experts", BY_TAG, from_experts=True, steps=900, seeds=(0,)),
    "noises": Arm(
        "longer regression, three noises per prompt", BY_TAG, from_experts=True, steps=900, noises=3, seeds=(0,)
    ),
}


# --- prompts ------------------------------------------------------------------------------------------------


def judged(tag: str) -> list[tuple[Scene, str]]:
    """Prompts that no student and no expert was trained on."""
    count = JUDGED_PROMPTS[tag]
    if not tag:
        return heldout_prompts(200)[:count]
    return concept_prompts(count, training=concept_scenes(HEARTS, concept=tag), concept=tag)


def taught() -> Prompts:
    """What the students paint while they learn, with their tags; half of the base's name colour and shape only."""
    items, rng = [], np.random.default_rng(5)
    for tag, count in TAUGHT_PROMPTS.items():
        asked = {scene for scene, _ in judged(tag)}
        pool = concept_scenes(count + len(asked), seed=1, concept=tag) if tag else split()[0]
        pool = [scene for scene in pool if scene not in asked]
        texts: dict[str, None] = {}
        while len(texts) < count:
            scene = pool[rng.integers(len(pool))]
            texts[short_prompt(scene, rng, ()) if not tag and len(texts) % 2 else caption(scene, rng)] = None
        items += [make_prompt(text, tag=tag) for text in texts]
    return Prompts(items=tuple(items))


def open_prompts() -> list[str]:
    """Prompts that leave size, place and background open, none of them taught in these words."""
    rng, known = np.random.default_rng(6), {item.captions[0].text for item in taught().items}
    texts: dict[str, None] = {}
    while len(texts) < OPEN_PROMPTS:
        text = short_prompt(split()[1][rng.integers(len(split()[1]))], rng, ())
        if text not in known:
            texts[text] = None
    return list(texts)


# --- judging ------------------------------------------------------------------------------------------------


def judge(models: Mapping[str, Pipeline], *, steps: int, cfg: float) -> dict[str, float]:
    """Shares right in colour, shape and place by tag, over all prompts ("all"), and the diversity of the base's.

    `models`: by tag; the base's prompts have the tag "". Diversity is the mean distance (root mean square over pixels
    in 0..1) of two pictures of one open prompt.
    """
    found: dict[str, float] = {}
    hits: list[bool] = []
    for tag in JUDGED_PROMPTS:
        prompts = judged(tag)
        pictures = paint(models[tag], [text for _, text in prompts], seeds=range(len(prompts)), steps=steps, cfg=cfg)
        right = [is_right(scene, picture) for (scene, _), picture in zip(prompts, pictures, strict=True)]
        found[tag or "base"] = mean(right)
        hits += right
    found["all"] = mean(hits)
    texts = [text for text in open_prompts() for _ in range(OPEN_SEEDS)]
    pictures = paint(models[""], texts, seeds=range(len(texts)), steps=steps, cfg=cfg)
    groups = [pictures[i : i + OPEN_SEEDS] for i in range(0, len(pictures), OPEN_SEEDS)]
    found["diversity"] = mean(distance(a, b) for group in groups for a, b in combinations(group, 2))
    return found


def is_right(scene: Scene, picture: np.ndarray) -> bool:
    hit = matches(scene, measure_picture(picture, shapes=SHAPES_AND_NOVEL, colors=INKS))
    return all(hit[fact] for fact in JUDGED)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one.astype(np.float64) - other) ** 2)) / 255)


class Kept:
    """Results by name, on disk; what is there is not computed again."""

    def __init__(self, path: Path = RESULTS):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def get(self, name: str, compute) -> dict[str, Any]:
        if name not in self.found:
            self.found[name] = compute()
            self.write()
        return self.found[name]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


# --- students -----------------------------------------------------------------------------------------------


def train_start(name: str, seed: int, loras: Mapping[str, Path]) -> tuple[Path, float]:
    """(LoRA, seconds) of regression to trajectories; those of one table are computed once for all seeds."""
    arm = STARTS[name]
    recipe = replace(
        START,
        name=f"{START.name}-{name}-s{seed}",
        seed=seed,
        steps=arm.steps,
        initial_lora=str(sum_of(loras)) if arm.from_experts else "",
        distil=replace(
            START.distil, table=table(arm.rules, loras), trajectory_steps=arm.steps, trajectory_bank=arm.noises
        ),
    )
    return train(recipe, cache=f"distil-cache-{'tag' if arm.rules else 'base'}")


def sum_of(loras: Mapping[str, Path]) -> Path:
    """A LoRA that is the sum of the experts', their ranks side by side."""
    path = WORK / "distil-experts.safetensors"
    if not path.is_file():
        shapes = module_shapes(load_tiny().transformer)
        read = [read_lora(lora, shapes) for lora in loras.values()]
        both = concatenate_loras([(lora, module_strengths(lora, 1.0, "", shapes)) for lora in read])
        write_trained(both, path, shapes, dtype="fp32", metadata={})
    return path


def train_arm(name: str, seed: int, loras: Mapping[str, Path]) -> tuple[Path, float]:
    """(LoRA, seconds) of the matching alone, from the start of its seed."""
    arm = ARMS[name]
    start, _ = train_start(arm.start, seed, loras)
    recipe = replace(
        arm.matching,
        name=f"{MATCHING.name}-{name}-s{seed}",
        seed=seed,
        initial_lora=str(start),
        distil=replace(arm.matching.distil, table=table(arm.rules, loras)),
    )
    return train(recipe, cache="distil-cache-matching")


def train(recipe: Recipe, *, cache: str) -> tuple[Path, float]:
    """Run a job whose cache is shared with others."""
    folder = WORK / "jobs" / recipe.name
    (WORK / cache).mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache").exists():
        (folder / "cache").symlink_to(WORK / cache)
    path, events = run_job(recipe, taught())
    return path, sum(event["seconds"] for event in events)


def evaluations(arm: str) -> dict[str, int]:
    """Network evaluations per training sample that a stage takes, a backward pass counted as two."""
    recipe = ARMS[arm].matching
    start, matching, batch = START.distil, recipe.distil, START.batch_size
    made = sum(TAUGHT_PROMPTS.values()) * start.trajectory_bank * start.trajectory_substeps * STEPS * 2
    teachers = 3 if arm == "term" else 2  # by term: one expert with the prompt, the other with and without
    whole = matching.gradient == "all"
    student = (3 * STEPS if whole else (STEPS - 1) / 2 + 3) + teachers + 1
    fake, updates = 3 * matching.fake.steps_per_student, recipe.steps - matching.fake.warmup_steps
    warmup = matching.fake.warmup_steps * (fake + (STEPS if whole else (STEPS + 1) / 2))
    return {
        "trajectories, once": made,
        "regression": 3 * batch * START.steps,
        "matching": round(batch * (updates * (student + fake) + warmup)),
    }


# --- the lesson ---------------------------------------------------------------------------------------------


def measure() -> Iterator[Row]:
    """Train and judge every arm of every seed, then a row per arm and question: the mean, and each seed."""
    base, kept = load_tiny(), Kept()
    loras = {concept: expert(concept, base) for concept in CONCEPTS}
    experts = {"": base, **{concept: with_lora(base, path) for concept, path in loras.items()}}
    for seed in SEEDS:
        judge_students(seed, base, loras, kept)
    judge_teachers(base, experts, kept)
    paint_sheet(base, experts, loras)
    yield from rows(kept.found)


def judge_students(seed: int, base: Pipeline, loras: Mapping[str, Path], kept: Kept) -> None:
    """Train and judge the starts and the arms of a seed."""
    for arms, trained in ((STARTS, train_start), (ARMS, train_arm)):
        for name, arm in arms.items():
            if seed not in arm.seeds:
                continue
            path, seconds = trained(name, seed, loras)
            student = dict.fromkeys(JUDGED_PROMPTS, with_lora(base, path))
            found = kept.get(f"{arm.label}, seed {seed}", lambda s=student: judge(s, steps=STEPS, cfg=1.0))
            found["seconds"] = seconds
            kept.write()


def judge_teachers(base: Pipeline, experts: Mapping[str, Pipeline], kept: Kept) -> None:
    """What the students are held against."""
    alone = dict.fromkeys(JUDGED_PROMPTS, base)
    kept.get("base, 8 steps", lambda: judge(alone, steps=STEPS, cfg=1.0))
    kept.get("teachers, 8 steps cfg 4", lambda: judge(experts, steps=STEPS, cfg=CFG))
    kept.get("teachers, 50 steps", lambda: judge(experts, steps=TEACHER_STEPS, cfg=CFG))


def rows(found: Mapping[str, dict[str, float]]) -> Iterator[Row]:
    """The table of the page."""
    teacher = found["teachers, 50 steps"]
    single = of_seeds(found, ARMS["single"].label, "experts")
    for name in (
        "teachers, 8 steps cfg 4",
        "base, 8 steps",
        *(arm.label for arm in (*STARTS.values(), *ARMS.values())),
    ):
        for question, goal in (("all", 0.03), ("base", None), ("experts", None), ("diversity", 0.8)):
            values = of_seeds(found, name, question)
            if question == "diversity":
                shares = [value / teacher["diversity"] for value in values]
                met = mean(shares) >= goal if goal else None
                yield row(f"{name}: diversity", shares, "teacher 100 %", ">= 80 %", met)
            else:
                peer = of_seeds(found, "teachers, 50 steps", question)
                target, met = "", None
                if question == "all":
                    target, met = "within 3 points", mean(peer) - mean(values) <= 0.03
                if question == "experts" and name in [arm.label for arm in ARMS.values()][1:]:
                    target, met = "above one teacher", mean(values) > mean(single)
                yield row(f"{name}: {question} prompts right", values, f"teachers {percent(mean(peer))}", target, met)
    for name, arm in ARMS.items():
        took = of_seeds(found, STARTS[arm.start].label, "seconds") + of_seeds(found, arm.label, "seconds")
        cost = ", ".join(f"{what} {count:,}" for what, count in evaluations(name).items())
        runs = len(of_seeds(found, arm.label, "seconds"))
        yield Row(
            name=f"{arm.label}: network evaluations", ours=f"{cost}; {sum(took) / runs:.0f} s", target="", met=None
        )


def of_seeds(found: Mapping[str, dict[str, float]], name: str, question: str) -> list[float]:
    """A number of each seed that was run; "experts" is the mean over what the experts know."""
    runs = [found[name]] if name in found else [r for key, r in found.items() if key.startswith(f"{name}, seed ")]
    return [mean(run[concept] for concept in CONCEPTS) if question == "experts" else run[question] for run in runs]


def row(name: str, values: Sequence[float], peer: str, target: str, met: bool | None) -> Row:
    each = f" ({', '.join(map(percent, values))})" if len(values) > 1 else ""
    ours = percent(mean(values)) + each
    return Row(name=name, ours=ours, peer_name=peer, target=target, met=met, untold="shown beside it")


def paint_sheet(base: Pipeline, experts: Mapping[str, Pipeline], loras: Mapping[str, Path]) -> None:
    """bench/pictures/distil_students.jpg: the same prompts and noise in every arm of the first seed."""
    asked = [(tag, text) for tag in JUDGED_PROMPTS for _, text in judged(tag)[:3]]
    seeds = range(len(asked))

    def of(models: Mapping[str, Pipeline], steps: int, cfg: float) -> list[np.ndarray]:
        return [
            paint(models[tag], [text], seeds=[i], steps=steps, cfg=cfg)[0]
            for i, (tag, text) in zip(seeds, asked, strict=True)
        ]

    alone = dict.fromkeys(JUDGED_PROMPTS, base)
    grid = {"teachers, 50 steps cfg 4": of(experts, TEACHER_STEPS, CFG), "base, 8 steps cfg 1": of(alone, STEPS, 1.0)}
    trained = {arm.label: train_start(name, SEEDS[0], loras)[0] for name, arm in STARTS.items()}
    trained |= {arm.label: train_arm(name, SEEDS[0], loras)[0] for name, arm in ARMS.items()}
    for label, path in trained.items():
        student = with_lora(base, path)
        grid[f"{label}, 8 steps cfg 1"] = of(dict.fromkeys(JUDGED_PROMPTS, student), STEPS, 1.0)
    save_picture("distil_students", picture_grid(grid))
