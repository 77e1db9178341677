"""The loop whole: pictures, a tournament answered by a rule, pairs, DPO, the pictures again, a second tournament.

What `workflows/preference_loop` does, in one process and with a rule instead of a person (`tiny.preference`: the
smaller object is better, and a picture that does not show its prompt is worse than one that does). Training sees
pictures of 200 prompts; the win rate is of 100 held-out prompts, painted before and after with the same seeds and
judged blind, in a tournament of its own. The same rate on prompts that were trained on stands beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..ernie_core.batch import Row as BatchRow
from ..ernie_core.batch import append_manifest, read_entries, read_manifest
from ..ernie_core.pipeline import Pipeline
from ..ernie_core.scoring import judgments
from ..ernie_core.scoring.pairs import Valued, make_pairs, prefer
from ..ernie_core.scoring.scorer import to_rgb
from ..ernie_core.scoring.win_rate import (
    Comparison,
    Match,
    WinRate,
    compare_by_judgments,
    draw_sheet,
    match_folders,
    win_rate,
)
from ..tiny.evaluate import paint
from ..tiny.measure import measure as measure_picture
from ..tiny.preference import MIN_GAP, follows, is_preferred, open_prompts
from ..tiny.scenes import Scene
from .compare import Row
from .dpo_prefers import ANCHORED
from .tiny_runs import SAMPLING_STEPS, WORK, load_tiny, percent, remember, run_job, save_picture, with_lora

PROMPTS, SEEDS = 200, 4
HELDOUT = 100
TRAINED_ON = 50  # of the prompts of training, painted again
FOLDER = WORK / "loop"
RECIPE = replace(ANCHORED, name="loop-dpo")

Prompts = Sequence[tuple[Scene, str]]


def paint_run(pipeline: Pipeline, prompts: Prompts, folder: Path, *, seeds: int, steps: int, first_seed: int) -> Path:
    """The folder that Batch from Prompts would leave: pictures and manifest; what is there is not painted again."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        BatchRow(
            label="",
            prompt=text,
            negative="",
            seed=first_seed + number * seeds + i,
            width=128,
            height=128,
            steps=steps,
            cfg=4.0,
            shift=4.0,
        )
        for number, (_, text) in enumerate(prompts)
        for i in range(seeds)
    ]
    done = read_manifest(folder)
    waiting = [row for row in rows if row.hash not in done]
    for start in range(0, len(waiting), 20):
        part = waiting[start : start + 20]
        painted = paint(pipeline, [row.prompt for row in part], seeds=[row.seed for row in part], steps=steps)
        for row, picture in zip(part, painted, strict=True):
            file = f"{row.hash}_{row.seed}.png"
            Image.fromarray(picture).save(folder / file)
            append_manifest(folder, row, file)
    return folder


@functools.cache
def worth(path: Path, scene: Scene) -> tuple[bool, float]:
    """(shows its prompt, minus its diameter): more is better."""
    shown = measure_picture(to_rgb(path))
    return follows(scene, shown), -(shown.diameter or 1.0)


def answer(left: Path, right: Path, scene: Scene) -> judgments.Answer:
    """What the rule says; a tie where both show the prompt, or neither, and the sizes cannot be told apart."""
    (right_is_right, right_size), (left_is_right, left_size) = worth(right, scene), worth(left, scene)
    if left_is_right != right_is_right:
        return "left" if left_is_right else "right"
    if abs(left_size - right_size) < MIN_GAP:
        return "tie"
    return "left" if left_size > right_size else "right"


def play(name: str, files: dict[Path, str], scenes: dict[str, Scene]) -> tuple[list[judgments.Ranked], list[dict]]:
    """(ranking, judgments) of a tournament among pictures of one prompt each, answered to its end."""
    pictures = tuple(judgments.Picture(path=str(path), prompt=text) for path, text in files.items())
    store_path = FOLDER / f"{name}.sqlite"
    with judgments.open_store(store_path) as store:
        setup = judgments.Setup(name=name, annotator="rule", pictures=pictures, per_prompt=True)
        id_ = judgments.begin(store, setup)
        while (question := judgments.current(store, id_)) is not None:
            sides = [judgments.picture_path(store, id_, number) for number in (question.left, question.right)]
            judgments.answer(store, id_, question.id, answer(*sides, scenes[question.prompt]))
        return judgments.rank(store, id_, intervals=False), list(judgments.judgment_rows(store, id_))


def compare(name: str, before: Path, after: Path, scenes: dict[str, Scene]) -> tuple[list[Match], WinRate]:
    """The matches of two runs, and the win rate that a blind tournament of both gives."""
    matches, _ = match_folders(before, after)
    files = {Path(side): match.prompt for match in matches for side in (match.before, match.after)}  # type: ignore[arg-type]
    _, rows = play(name, files, scenes)
    comparisons: list[Comparison] = compare_by_judgments(matches, rows)
    return matches, win_rate("the rule", comparisons)


def share(matches: Sequence[Match], side: str, scenes: dict[str, Scene]) -> dict[str, float]:
    """How many pictures of a side have the property, and how many show their prompt."""
    shown = [(scenes[m.prompt], measure_picture(to_rgb(getattr(m, side)))) for m in matches]
    return {
        "property": float(np.mean([is_preferred(scene, found) for scene, found in shown])),
        "followed": float(np.mean([follows(scene, found) for scene, found in shown])),
    }


def measure() -> Iterator[Row]:
    """Rows of the loop's numbers."""
    base = load_tiny()
    prompts = open_prompts(PROMPTS, heldout=False, seed=11)
    heldout = open_prompts(HELDOUT, heldout=True)
    scenes = {text: scene for scene, text in (*prompts, *heldout)}
    painted = paint_run(base, prompts, FOLDER / "before", seeds=SEEDS, steps=12, first_seed=0)
    texts = {(painted / entry["file"]).resolve(): entry["prompt"] for entry in read_entries(painted)}
    ranking, rows = play("first", texts, scenes)
    valued = [Valued(path=Path(r.path), value=r.value, prompt=r.prompt) for r in ranking]
    pairs = make_pairs(prefer(valued, min_gap=0.5, max_per_prompt=1))
    path, events = run_job(RECIPE, pairs)
    tuned = with_lora(base, path)
    results: dict = {"judgments": len(rows), "pairs": len(pairs.pairs), "seconds": sum(e["seconds"] for e in events)}
    remember("preference_loop", results)
    sheet: tuple[list[Match], WinRate] | None = None
    for label, chosen, seed in (("held-out", heldout, 10**6), ("trained on", prompts[:TRAINED_ON], 2 * 10**6)):
        sides = [
            paint_run(model, chosen, FOLDER / f"{label}-{side}", seeds=1, steps=SAMPLING_STEPS, first_seed=seed)
            for side, model in (("before", base), ("after", tuned))
        ]
        matches, rate = compare(label, *sides, scenes)
        sheet = sheet or (matches, rate)
        results[label] = {
            "wins": rate.wins,
            "ties": rate.ties,
            "losses": rate.losses,
            "rate": rate.rate.value,
            "wilson": [rate.rate.low, rate.rate.high],
            "by_prompt": [rate.by_prompt.low, rate.by_prompt.high],
            "p": rate.p_value,
            "before": share(matches, "before", scenes),
            "after": share(matches, "after", scenes),
        }
        remember("preference_loop", results)
        yield Row(
            name=f"after wins against before, {len(matches)} prompts, {label}: {rate.wins} won, {rate.ties} ties, "
            f"{rate.losses} lost; 95 % {percent(rate.rate.low)} to {percent(rate.rate.high)}",
            ours=percent(rate.rate.value),
            peer_name="no difference",
            peer=percent(0.5),
            target="lower end above 50 %" if label == "held-out" else "",
            met=rate.rate.low > 0.5 if label == "held-out" else None,
            untold="shown beside it",
        )
    assert sheet is not None
    save_picture("preference_loop", draw_sheet(sheet[0], [replace(sheet[1], prompts=())], shown=12, cell_px=160))  # type: ignore[arg-type]
