"""GenEval: whether a picture shows the objects, numbers, colours and places its prompt names, given detections.

The published rules (djghosh13/geneval@af4902f: evaluation/evaluate_images.py, summary_scores.py; MIT), in own words:

- A detection counts above a confidence of 0.3, in counting prompts above 0.9; at most the 16 most confident of a class.
- include: at least `count` objects of the class. Their colour, and their place against all counted objects of the group
  that `position` points at, are asked of the `count` most confident ones only. exclude: fewer than `count`.
- Place: the offset of the centres, shortened on each axis by 0.1 of both objects' sizes and divided by its own full
  length, must reach beyond 0.5 to that side.
- A task's score is the share of its pictures that are right; overall is the mean of the six tasks, not of all pictures.

The published detector is Mask2Former (Swin-S, COCO), the colours are CLIP ViT-L/14's; others give other scores.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import Problem
from ..errors import ErnieError
from ..training.items import read_table
from .metrics import Interval, ratio_interval

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SIDES = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CONFIDENCE, COUNTING_CONFIDENCE, POSITION_MARGIN, MOST_OBJECTS = 0.3, 0.9, 0.1, 16

# Baidu's README (baidu/ERNIE-Image@1f30f5b): model -> prompts as they are / enhanced -> overall, then as in TASKS.
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "ERNIE-Image": {
        "without enhancer": (0.8856, 1.0000, 0.9596, 0.7781, 0.9282, 0.8550, 0.7925),
        "with enhancer": (0.8728, 0.9906, 0.9596, 0.8187, 0.8830, 0.8625, 0.7225),
    },
    "ERNIE-Image-Turbo": {
        "without enhancer": (0.8667, 1.0000, 0.9621, 0.7906, 0.9202, 0.7975, 0.7300),
        "with enhancer": (0.8510, 0.9938, 0.9419, 0.8375, 0.8351, 0.7950, 0.7025),
    },
}

# GenEval's names of three COCO classes; a detector that says COCO's would otherwise never be right about them.
_COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_IMAGE_KEYS = ("filename", "image", "file_name", "file", "path", "image_path")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """An object that a detector found."""

    name: str
    score: float
    """Confidence, 0 to 1."""
    box: tuple[float, float, float, float]
    """left, top, right, bottom, in pixels; y grows downwards."""
    colour: str | None = None
    """One of COLOURS; None = nobody looked."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A clause of a prompt."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None
    """(side, number of the include clause it is seen from)"""


@dataclass(frozen=True, kw_only=True)
class ObjectPrompt:
    """A line of evaluation_metadata.jsonl."""

    index: int
    task: str
    prompt: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ObjectResult:
    """One picture."""

    image: str
    task: str
    prompt: str
    correct: bool
    reason: str = ""
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class GenEval:
    """The benchmark's outcome."""

    overall: Interval
    """Mean of the tasks' scores; NaN unless all six tasks are there. The interval resamples prompts within tasks."""
    tasks: tuple[tuple[str, int, Interval], ...]
    """(task, pictures, score), in the order of TASKS"""
    num_prompts: int
    correct_images: float
    """Share of all pictures."""
    correct_prompts: float
    """Share of the prompts with at least one right picture."""
    results: tuple[ObjectResult, ...]
    problems: tuple[Problem, ...] = ()


# --- one picture -----------------------------------------------------------------------------------------------


def judge(prompt: ObjectPrompt, detections: Iterable[Detection]) -> tuple[bool, str]:
    """(whether the picture is right, what is wrong with it).

    Raises:
        ErnieError: a colour is asked for and nobody looked for it, or position points at a later clause.
    """
    found = _counted(detections, COUNTING_CONFIDENCE if prompt.task == "counting" else CONFIDENCE)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # per include clause; None = not satisfied
    for clause in prompt.include:
        objects = found.get(clause.name, [])[: clause.count]
        reason = ""
        if len(objects) < clause.count:
            reason = f"expected {clause.count} {clause.name}, found {len(objects)}"
        elif clause.colour is not None:
            reason = _wrong_colours(clause, objects)
        if not reason and clause.position is not None:
            reason = _wrong_place(clause, objects, groups)
        groups.append(None if reason else objects)
        reasons += [reason] if reason else []
    for clause in prompt.exclude:
        number = len(found.get(clause.name, []))
        if number >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.name}, found {number}")
    return not reasons, "; ".join(reasons)


def relative_position(
    box: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> frozenset[str]:
    """On which of SIDES of `other` an object lies: none when they are too close, at most two."""
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i]) for i in (0, 1)]
    beyond = [max(abs(offset[i]) - POSITION_MARGIN * sizes[i], 0.0) for i in (0, 1)]
    if max(beyond) < 1e-3:
        return frozenset()
    names = (("left of", "right of"), ("above", "below"))
    return frozenset(names[i][int(offset[i] > 0)] for i in (0, 1) if beyond[i] / math.hypot(*offset) > 0.5)


def _counted(detections: Iterable[Detection], confidence: float) -> dict[str, list[Detection]]:
    """Per class, most confident first."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > confidence:
            found.setdefault(_COCO_NAMES.get(detection.name, detection.name), []).append(detection)
    return {name: objects[:MOST_OBJECTS] for name, objects in found.items()}


def _wrong_colours(clause: Wanted, objects: Sequence[Detection]) -> str:
    colours = [o.colour for o in objects]
    if None in colours:
        raise ErnieError(f"the colour of {clause.name} is asked for, and its detection has none; give it as 'color'")
    if colours.count(clause.colour) >= clause.count:
        return ""
    return f"expected {clause.colour} {clause.name}, found {', '.join(str(c) for c in colours)}"


def _wrong_place(clause: Wanted, objects: Sequence[Detection], groups: Sequence[list[Detection] | None]) -> str:
    assert clause.position is not None
    side, number = clause.position
    if not 0 <= number < len(groups):
        raise ErnieError(f"{clause.name} is to be {side} clause {number}, which is not before it")
    targets = groups[number]
    if targets is None:
        return f"nothing there for {clause.name} to be {side}"
    for thing in objects:
        for target in targets:
            sides = relative_position(thing.box, target.box)
            if side not in sides:
                return (
                    f"expected {clause.name} {side} {target.name}, it is {' and '.join(sorted(sides)) or 'too close'}"
                )
    return ""


# --- all of them -----------------------------------------------------------------------------------------------


def score_geneval(
    prompts: Sequence[ObjectPrompt],
    pictures: Iterable[tuple[str, int, Sequence[Detection]]],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> GenEval:
    """Judge (image, index of its prompt, detections) per picture and add up.

    Raises:
        ErnieError: no picture belongs to a prompt.
    """
    by_index = {prompt.index: prompt for prompt in prompts}
    results: list[ObjectResult] = []
    problems: list[Problem] = []
    for image, index, detections in pictures:
        prompt = by_index.get(index)
        if prompt is None:
            problems.append(Problem(label=image, reason=f"left out: there is no prompt {index}"))
            continue
        try:
            correct, reason = judge(prompt, detections)
        except ErnieError as e:
            problems.append(Problem(label=image, reason=f"left out: {e}"))
            continue
        results.append(
            ObjectResult(image=image, task=prompt.task, prompt=prompt.prompt, correct=correct, reason=reason)
        )
    if not results:
        raise ErnieError(f"no picture could be judged: {_first(problems)}")
    without = len({p.prompt for p in prompts} - {r.prompt for r in results})
    if without:
        reason = f"{without} of {len(prompts)} have no picture and are not counted"
        problems.append(Problem(label="prompts", reason=reason))
    return summarise(results, problems=problems, samples=samples, seed=seed)


def summarise(
    results: Sequence[ObjectResult], *, problems: Sequence[Problem] = (), samples: int = 1000, seed: int = 0
) -> GenEval:
    """GenEval's numbers out of right and wrong pictures. A picture that comes twice is counted once, and said.

    Raises:
        ErnieError: there are none.
    """
    kept: dict[str, ObjectResult] = {}
    said = list(problems)
    for number, result in enumerate(results):
        if result.image and result.image in kept:
            said.append(Problem(label=result.image, reason="left out: it was judged before"))
        else:
            kept[result.image or f"#{number}"] = result
    if not kept:
        raise ErnieError("GenEval needs at least one judged picture, got none.")
    per_task: dict[str, dict[str, list[bool]]] = {}
    for result in kept.values():
        per_task.setdefault(result.task, {}).setdefault(result.prompt, []).append(result.correct)
    missing = [task for task in TASKS if task not in per_task]
    if missing:
        reason = f"no pictures of {', '.join(missing)}: the overall score is the mean of all six and is left out"
        said.append(Problem(label="tasks", reason=reason))
    odd = [task for task in per_task if task not in TASKS]
    if odd:
        said.append(Problem(label="tasks", reason=f"{', '.join(odd)}: not one of GenEval's six, not in the overall"))
    tasks = []
    for task in (*TASKS, *odd):
        if groups := per_task.get(task):
            right, total = [sum(g) for g in groups.values()], [len(g) for g in groups.values()]
            tasks.append((task, sum(total), ratio_interval(right, total, samples=samples, seed=seed)))
    groups = [g for prompts in per_task.values() for g in prompts.values()]
    return GenEval(
        overall=_overall({t: per_task[t] for t in TASKS if t in per_task}, samples, seed),
        tasks=tuple(tasks),
        num_prompts=len(groups),
        correct_images=sum(map(sum, groups)) / sum(map(len, groups)),
        correct_prompts=sum(map(any, groups)) / len(groups),
        results=tuple(kept.values()),
        problems=tuple(said),
    )


def _overall(per_task: Mapping[str, Mapping[str, Sequence[bool]]], samples: int, seed: int) -> Interval:
    """Mean of the six means; percentile interval of resamples of prompts within each task."""
    if len(per_task) < len(TASKS):
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    rng = np.random.default_rng(seed)
    means, draws = [], np.zeros(samples)
    for groups in per_task.values():
        right = np.array([sum(g) for g in groups.values()], float)
        total = np.array([len(g) for g in groups.values()], float)
        means.append(right.sum() / total.sum())
        places = rng.integers(0, len(right), (samples, len(right)))
        draws += right[places].sum(axis=1) / total[places].sum(axis=1) / len(TASKS)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(value=float(np.mean(means)), low=float(low), high=float(high))


# --- files -----------------------------------------------------------------------------------------------------


def read_object_prompts(path: Path | str) -> list[ObjectPrompt]:
    """The benchmark's evaluation_metadata.jsonl; a prompt's index is its line, from 0.

    Raises:
        ErnieError: a line is not of that shape.
    """
    prompts = []
    for label, row in read_table(Path(path)):
        if isinstance(row, ErnieError):
            raise ErnieError(f"{label} {row}.")
        prompts.append(_as_prompt(row, len(prompts), label))
    if not prompts:
        raise ErnieError(f"{path} holds no prompts.")
    return prompts


def read_detections(
    path: Path | str, prompts: Sequence[ObjectPrompt]
) -> tuple[list[tuple[str, int, list[Detection]]], list[Problem]]:
    """(image, index of its prompt, detections) per picture, and the rows that could not be used.

    A row of the table (.jsonl, .json) has the picture's name and `detections`: a list of {"class", "score", "box":
    [left, top, right, bottom], "color"}; or, as the published evaluation writes them, `details`: {class: [[left, top,
    right, bottom, score], ...]} (no colours there). Its prompt is given by `prompt_index`, by `prompt`, or by the
    published folders, 00012/samples/0003.png.

    Raises:
        ErnieError: no row could be used.
    """
    index_of = {prompt.prompt: prompt.index for prompt in prompts}
    pictures: list[tuple[str, int, list[Detection]]] = []
    problems: list[Problem] = []
    for label, row in read_table(Path(path)):
        try:
            if isinstance(row, ErnieError):
                raise row
            image = next((str(row[k]) for k in _IMAGE_KEYS if row.get(k)), label)
            pictures.append((image, _index(row, image, index_of), _detections(row)))
        except ErnieError as e:
            problems.append(Problem(label=label, reason=f"left out: it {e}"))
    if not pictures:
        raise ErnieError(f"{path} holds no detections that could be used: {_first(problems)}")
    return pictures, problems


def read_results(path: Path | str) -> tuple[list[ObjectResult], list[Problem]]:
    """Already judged pictures, as the published evaluation writes them: tag, prompt and correct (and filename).

    Raises:
        ErnieError: no row could be used.
    """
    results: list[ObjectResult] = []
    problems: list[Problem] = []
    for label, row in read_table(Path(path)):
        if isinstance(row, ErnieError) or not {"tag", "prompt", "correct"} <= row.keys():
            reason = row if isinstance(row, ErnieError) else "has no tag, prompt and correct"
            problems.append(Problem(label=label, reason=f"left out: it {reason}"))
            continue
        results.append(
            ObjectResult(
                image=next((str(row[k]) for k in _IMAGE_KEYS if row.get(k)), ""),
                task=str(row["tag"]),
                # the published summary groups by the whole clause text; a prompt has one
                prompt=str(row["prompt"]),
                correct=str(row["correct"]).lower() in ("true", "1"),
                reason=str(row.get("reason", "")),
            )
        )
    if not results:
        raise ErnieError(f"{path} holds no judged pictures: {_first(problems)}")
    return results, problems


def holds_results(path: Path | str) -> bool:
    """Whether a file holds judged pictures (else detections)."""
    first = next(iter(read_table(Path(path))), ("", ErnieError("is empty")))[1]
    return isinstance(first, dict) and "correct" in first


def _as_prompt(row: Mapping[str, Any], index: int, label: str) -> ObjectPrompt:
    try:
        return ObjectPrompt(
            index=index,
            task=row["tag"],
            prompt=row["prompt"],
            include=tuple(_as_clause(clause) for clause in row.get("include", ())),
            exclude=tuple(_as_clause(clause) for clause in row.get("exclude", ())),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ErnieError(
            f"{label} is no prompt of GenEval: expected tag, prompt and include with class and count ({e!r})."
        ) from e


def _as_clause(clause: Mapping[str, Any]) -> Wanted:
    position = clause.get("position")
    colour = clause.get("color")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"color must be one of {', '.join(COLOURS)}, got {colour!r}")
    if position is not None and position[0] not in SIDES:
        raise ValueError(f"position must be one of {', '.join(SIDES)}, got {position[0]!r}")
    return Wanted(
        name=str(clause["class"]),
        count=int(clause["count"]),
        colour=colour,
        position=None if position is None else (str(position[0]), int(position[1])),
    )


def _index(row: Mapping[str, Any], image: str, index_of: Mapping[str, int]) -> int:
    for key in ("prompt_index", "prompt_id", "index"):
        if row.get(key) is not None:
            try:
                return int(str(row[key]))
            except ValueError as e:
                raise ErnieError(f"has the {key} {row[key]!r}, which is no whole number") from e
    if row.get("prompt") in index_of:
        return index_of[row["prompt"]]
    folder = re.search(r"(?:^|[\\/])(\d+)[\\/](?:samples[\\/])?[^\\/]+$", image)
    if folder:
        return int(folder[1])
    raise ErnieError(
        f"belongs to no prompt: give prompt_index, prompt, or a path like 00012/samples/0003.png ({image})"
    )


def _detections(row: Mapping[str, Any]) -> list[Detection]:
    try:
        if "detections" in row:
            found = [
                Detection(
                    name=str(d.get("class", d.get("label"))),
                    score=float(d["score"]),
                    box=_box(d["box"] if "box" in d else d["bbox"]),
                    colour=d.get("color"),
                )
                for d in _parsed(row["detections"])
            ]
        elif "details" in row:
            found = [
                Detection(name=name, score=float(box[4]), box=_box(box[:4]))
                for name, boxes in _parsed(row["details"]).items()
                for box in boxes
            ]
        else:
            raise ErnieError("has neither detections nor details")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise ErnieError(f"holds detections of another shape ({e!r}); expected class, score and box of four") from e
    for d in found:
        if not 0 <= d.score <= 1:
            raise ErnieError(f"gives {d.name} the score {d.score:g}; a confidence from 0 to 1 is expected")
        if d.colour is not None and d.colour not in COLOURS:
            raise ErnieError(f"gives {d.name} the colour {d.colour!r}; expected one of {', '.join(COLOURS)}")
    return found


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _box(values: Sequence[Any]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(v) for v in values)
    return left, top, right, bottom


def _first(problems: Sequence[Problem]) -> str:
    return f"{problems[0]}." if problems else "it is empty."


def task_counts(prompts: Sequence[ObjectPrompt]) -> dict[str, int]:
    """Prompts per task; the published file has 80, 99, 80, 94, 100, 100."""
    return dict(Counter(p.task for p in prompts))
