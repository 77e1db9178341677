"""Evaluation by category on the tiny model, its intervals' coverage, and FID and CMMD against their formulas.

Base settings (50 steps, cfg 4) against fast ones (8 steps, cfg 1, without any distillation: how much is lost, and
where) on held-out prompts of six categories, each of which asks for one thing; judged from pixels (`tiny.measure`), so
that a verdict is neither a person's nor a model's opinion. Painting is resumable: start again what was killed.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..ernie_core.batch import Row as BatchRow
from ..ernie_core.batch import append_manifest, file_name, read_manifest
from ..ernie_core.evaluation import distances, rates, report
from ..ernie_core.evaluation.prompt_sets import PromptItem, PromptSet, make_rows, read_setting, write_setting
from ..ernie_core.evaluation.verdicts import Outcome, Verdicts, judge_by_scorer, match, of_one, of_two
from ..ernie_core.pipeline import Pipeline
from ..ernie_core.scoring.builtin import BuiltinScorer
from ..ernie_core.scoring.metrics import ratio_interval, wilson
from ..ernie_core.scoring.scorer import to_rgb
from ..tiny.evaluate import paint
from ..tiny.measure import matches
from ..tiny.measure import measure as measure_picture
from ..tiny.scenes import Scene, facts, heldout_prompts, short_prompt
from .compare import Row
from .tiny_runs import WORK, load_tiny, remember, save_picture

ROOT = Path(__file__).resolve().parents[1]
FOLDER = WORK / "categories"
PROMPTS, SEEDS = 12, 2
SETTINGS = {"base 50-4": (50, 4.0), "fast 8-1": (8, 1.0)}
ASKED: dict[str, tuple[str, ...]] = {
    "one object": (),
    "color": ("color",),
    "shape": ("shape",),
    "place": ("place",),
    "background": ("background",),
    "everything": ("color", "shape", "size", "place", "background"),
}
"""Category -> facts that must be right; "one object": any single one that can be measured, as counting goes here."""
COVERAGE_TRIALS = 400


def make_set() -> tuple[PromptSet, dict[str, Scene]]:
    """The prompts, and the scene that each one means: no scene and no prompt twice."""
    rng = np.random.default_rng(0)
    scenes = iter(scene for scene, _ in heldout_prompts(200))
    meant: dict[str, Scene] = {}
    items = []
    for category, asked in ASKED.items():
        while sum(item.category == category for item in items) < PROMPTS:
            scene = next(scenes)
            text = short_prompt(scene, rng, keep={fact for fact in asked if fact not in ("color", "shape")})
            if text not in meant:
                meant[text] = scene
                items.append(PromptItem(number=len(items) + 1, prompt=text, category=category, source="tiny"))
    return PromptSet(name="tiny_categories", items=tuple(items)), meant


def paint_setting(pipeline: Pipeline, prompts: PromptSet, folder: Path, steps: int, cfg: float) -> Path:
    """The folder that Prompt Set would leave; what is there is not painted again."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = BatchRow(
        label="", prompt="", negative="", seed=0, width=128, height=128, steps=steps, cfg=cfg, shift=4.0
    )
    rows = make_rows(prompts, defaults, seeds=SEEDS)
    write_setting(folder, prompts, rows)
    todo = [row for part in rows for row in part if row.hash not in read_manifest(folder)]
    for start in range(0, len(todo), 12):
        part = todo[start : start + 12]
        made = paint(pipeline, [r.prompt for r in part], seeds=[r.seed for r in part], steps=steps, cfg=cfg, batch=12)
        for row, picture in zip(part, made, strict=True):
            Image.fromarray(picture).save(folder / file_name(row))
            append_manifest(folder, row, file_name(row))
        print(f"{folder.name}: {start + len(part)} of {len(todo)}", flush=True)
    return folder


def shows(scene: Scene, path: Path, asked: tuple[str, ...]) -> bool:
    """Whether a picture shows what its category asks for."""
    found = measure_picture(to_rgb(path))
    right = matches(scene, found)
    return found.found and all(right[fact] for fact in asked)


def judge(folders: list[Path], meant: dict[str, Scene]) -> Verdicts:
    """Alignment from pixels for every picture and pair."""
    settings = [read_setting(folder) for folder in folders]
    told = {"judge": "tiny.measure", "criterion": "alignment"}
    right = {p.file: shows(meant[p.prompt], p.file, ASKED[p.category]) for s in settings for p in s.pictures}
    found = [of_one(p, s, "pass" if right[p.file] else "fail", **told) for s in settings for p in s.pictures]
    for pair in match(*settings)[0]:
        first, second = right[pair.first.file], right[pair.second.file]
        better: Outcome = "same" if first == second else "first" if first else "second"
        found.append(of_two(pair, settings, better, **told))
    return Verdicts(verdicts=tuple(found))


# --- intervals ----------------------------------------------------------------------------------------------------


def coverage(chance: float, rho: float, prompts: int, pictures: int, *, categories: int = 16) -> dict[str, float]:
    """Share of trials whose 95 % interval holds the true rate, by method; chances of prompts are beta-distributed."""
    rng = np.random.default_rng([int(100 * chance), int(100 * rho), prompts, pictures])
    inside = dict.fromkeys(("Wilson over pictures", "bootstrap over prompts", "effective number"), 0)
    for _ in range(COVERAGE_TRIALS):
        if rho:
            shape = (1 - rho) / rho
            chances = rng.beta(chance * shape, (1 - chance) * shape, (categories, prompts))
        else:
            chances = np.full((categories, prompts), chance)
        groups = [[(int(s), pictures) for s in row] for row in rng.binomial(pictures, chances)]
        right = sum(s for s, _ in groups[0])
        found = {
            "Wilson over pictures": wilson(right, prompts * pictures),
            "bootstrap over prompts": ratio_interval(*zip(*groups[0], strict=True), samples=200),
            "effective number": rates.clustered(groups[0], rates.intraclass(groups))[0],
        }
        for name, interval in found.items():
            inside[name] += interval.low <= chance <= interval.high
    return {name: count / COVERAGE_TRIALS for name, count in inside.items()}


# --- distances ----------------------------------------------------------------------------------------------------


def draw_features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """float32 [count, width] of a correlated normal distribution."""
    mixing = np.random.default_rng(width).normal(size=(width, width)) / math.sqrt(width)
    return (np.random.default_rng(seed).normal(size=(count, width)) @ mixing + shift).astype(np.float32)


def check_fid(count: int, width: int) -> float:
    """Largest relative difference from the formula with scipy's matrix root, both ways of a pair of sets."""
    from scipy import linalg

    x, y = (draw_features(count, width, seed, shift).astype(np.float64) for seed, shift in ((1, 0.0), (2, 0.1)))
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(linalg.sqrtm(s @ t)))
    return abs(distances.frechet(x, y) - expected) / expected


def check_cmmd(count: int, width: int) -> float:
    """Relative difference from a double loop, the larger one of unbiased and biased."""
    x, y = (distances.unit(draw_features(count, width, seed, shift)) for seed, shift in ((1, 0.0), (2, 0.1)))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()) / 200)

    sums = [sum(kernel(a, b) for a in p for b in q) for p, q in ((x, x), (y, y), (x, y))]
    own, other, between = sums
    pairs = count * (count - 1)
    expected = (
        (own - count) / pairs + (other - count) / pairs - 2 * between / count**2,
        own / count**2 + other / count**2 - 2 * between / count**2,
    )
    found = distances.kernel_distances(x, y)
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def time_distances(count: int, width: int) -> tuple[float, float, float]:
    """(processor seconds of FID, of CMMD, MiB at most), in a process of its own: its peak, less what it had loaded."""
    code = (
        "import importlib; from standalone import PACK_NAME, load_pack; load_pack()\n"
        "m = importlib.import_module(PACK_NAME + '.bench.prompt_categories')\n"
        f"print(*m.time_here({count}, {width}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fid, cmmd, most = map(float, done.stdout.split())
    return fid, cmmd, most


def time_here(count: int, width: int) -> tuple[float, float, float]:
    """`time_distances` in this process."""
    torch.set_num_threads(1)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x, y = draw_features(count, width, 1), draw_features(count, width, 2, 0.1)
    start = time.process_time()
    distances.frechet(x, y)
    middle = time.process_time()
    distances.kernel_distances(distances.unit(x), distances.unit(y))
    end = time.process_time()
    most = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 1024
    return middle - start, end - middle, most


def measure() -> Iterator[Row]:
    """Every row; tables go to standard output and out/bench/categories."""
    yield from measure_settings()
    yield from measure_distances()
    yield from measure_coverage()


def measure_distances() -> Iterator[Row]:
    for count, width in ((5000, 768), (2048, 512), (300, 64)):
        found = check_fid(count, width)
        yield Row(
            name=f"FID, {count:,} x {width}", ours=f"{found:.1e} off scipy's sqrtm", target="<= 1e-6", met=found <= 1e-6
        )
    for count, width in ((300, 768), (200, 64)):
        found = check_cmmd(count, width)
        yield Row(
            name=f"CMMD, {count} x {width}", ours=f"{found:.1e} off a double loop", target="<= 1e-6", met=found <= 1e-6
        )
    for count, width in ((10_000, 768), (500, 2048)):
        fid, cmmd, most = time_distances(count, width)
        told = f"FID {fid:.1f} s, CMMD {cmmd:.1f} s of processor, {most:.0f} MiB at most, features included"
        yield Row(name=f"distances, {count:,} x {width}", ours=told, target="", met=None, untold="-")


def measure_coverage() -> Iterator[Row]:
    worst: dict[str, float] = {}
    for chance in (0.5, 0.8, 0.95):
        for rho in (0.0, 0.2, 0.6):
            for prompts, pictures in ((4, 4), (16, 4), (20, 2)):
                found = coverage(chance, rho, prompts, pictures)
                print(
                    f"| {chance} | {rho} | {prompts} x {pictures} | "
                    + " | ".join(f"{v:.3f}" for v in found.values())
                    + " |"
                )
                for name, value in found.items():
                    worst[name] = min(worst.get(name, 1.0), value)
    for name, value in worst.items():
        target, met = (">= 0.90", value >= 0.9) if name == "effective number" else ("", None)
        yield Row(
            name=f"coverage, {name}", ours=f"{value:.3f} at worst of 27 cases", target=target, met=met, untold="-"
        )


def measure_settings() -> Iterator[Row]:
    prompts, meant = make_set()
    assert all(ASKED[item.category] is not None and facts(item.prompt) for item in prompts.items)
    pipeline = load_tiny()
    folders = [paint_setting(pipeline, prompts, FOLDER / name, *how) for name, how in SETTINGS.items()]
    found = judge(folders, meant)
    scored = judge_by_scorer([read_setting(f) for f in folders], BuiltinScorer(measure="combined"), threshold=50.0)
    made = report.make_report("tiny_categories", Verdicts(verdicts=(*found.verdicts, *scored.verdicts)))
    report.write_report(made, FOLDER / "report")
    save_picture("categories", report.make_report("tiny_categories", found).picture())
    print(made.to_markdown())
    everything = made.passes[0]
    base, fast = (everything.rates[name] for name in SETTINGS)
    remember("categories", {"base": base.interval.value, "fast": fast.interval.value})
    difference = everything.difference
    assert difference is not None
    told = f"{100 * base.interval.value:.1f} % and {100 * fast.interval.value:.1f} %"
    change = " ".join(f"{100 * v:+.1f}" for v in (difference.value, difference.low, difference.high))
    yield Row(
        name="alignment, base 50-4 and fast 8-1",
        ours=f"{told}; difference and its interval {change}",
        target="interval without 0",
        met=difference.high < 0,
    )
