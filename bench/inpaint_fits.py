"""Inpainting and outpainting on ernie-image-tiny: what was asked for is there, it fits, all else is untouched.

Pictures are drawn scenes, painted into by the engine's own way: prepare, encode, sample, decode, lay back.

- object: the object's box (grown by 8 px) is masked and another shape in another colour is asked for;
- half: the right half of the object is masked, and the picture is described as it was: the shape must be completed;
- outpaint: the left half of a picture whose object stands there is given, the right half is new background.

What exists in out/bench/inpaint.json is not painted again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ernie_core.pipeline import Pipeline, make_denoise
from ..ernie_core.sampling.guidance import with_cfg
from ..ernie_core.sampling.inpaint import Prepared, lay_back, prepare
from ..ernie_core.sampling.langevin import InnerIterations, with_inner_iterations
from ..ernie_core.sampling.latents import make_noise, mix_noise
from ..ernie_core.sampling.masks import hold_outside
from ..ernie_core.sampling.samplers import sample_euler
from ..ernie_core.sampling.schedule import make_sigmas
from ..tiny.measure import matches
from ..tiny.measure import measure as measure_picture
from ..tiny.scenes import COLORS, PLACES, SHAPES, Scene, all_scenes, background_ends, caption, draw, is_drawable
from .compare import Row
from .tiny_runs import WORK, load_tiny, percent, remember

COUNT, BATCH, STEPS, CFG = 100, 20, 20, 4.0
SIDE = 128
BACKGROUND_ERROR = 12.0
"""Largest mean difference (of 255) between a new half and the drawn background: half of what two differ by."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One picture to change."""

    image: np.ndarray
    """[H, W, 3] uint8: what is given."""
    mask: np.ndarray | None
    """[H, W] bool; None with margins."""
    wanted: Scene
    prompt: str
    right_px: int = 0


def backdrop(scene: Scene) -> np.ndarray:
    top, bottom = background_ends(scene.background, scene.style)
    depth = np.linspace(0, 1, SIDE)[:, None, None]
    return np.broadcast_to(top + (bottom - top) * depth, (SIDE, SIDE, 3))


def object_box(scene: Scene, picture: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the drawn object."""
    inked = np.abs(picture - backdrop(scene)).max(axis=2) > 8
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def make_tasks(kind: str, count: int = COUNT) -> list[Task]:
    """The first `count` tasks of a kind; a function of the arguments."""
    rng, scenes, tasks = np.random.default_rng(len(kind)), all_scenes(), []
    while len(tasks) < count:
        scene = scenes[rng.integers(len(scenes))]
        wanted = replace(scene, shape=rng.choice(SHAPES), color=rng.choice(list(COLORS)))
        is_new = wanted.shape != scene.shape and wanted.color != scene.color
        if not is_new or not is_drawable(wanted.color, scene.background, scene.style):
            continue
        picture = draw(scene, rng)
        top, bottom, left, right = object_box(scene, picture)
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        if kind == "outpaint":
            if PLACES[scene.place][0] > 0.4 or right > SIDE // 2:
                continue
            tasks.append(
                Task(
                    image=picture[:, : SIDE // 2],
                    mask=None,
                    wanted=scene,
                    prompt=caption(scene, rng),
                    right_px=SIDE // 2,
                )
            )
            continue
        if kind == "half":
            left, wanted = (left + right) // 2, scene
        mask[top:bottom, left:right] = True
        tasks.append(Task(image=picture, mask=mask, wanted=wanted, prompt=caption(wanted, rng)))
    return tasks


def prepare_task(task: Task) -> Prepared:
    image = torch.from_numpy(task.image).float()[None] / 255
    mask = None if task.mask is None else torch.from_numpy(task.mask).float()[None]
    grow_px = 0 if task.mask is None else 8
    return prepare(image, mask, padding=(0, 0, task.right_px, 0), grow_px=grow_px, feather_px=8)


@torch.no_grad()
def paint(pipeline: Pipeline, tasks: Sequence[Task], how: InnerIterations | None, steps: int = STEPS) -> list[Tensor]:
    """The finished pictures [128, 128, 3] in 0..1; picture i uses seed i."""
    finished: list[Tensor] = []
    for first in range(0, len(tasks), BATCH):
        some = tasks[first : first + BATCH]
        parts = [prepare_task(task) for task in some]
        start = torch.cat([pipeline.vae.encode(p.image.movedim(-1, 1) * 2 - 1) for p in parts]).float()
        mask = torch.cat([p.latent_mask for p in parts])
        rows, columns = start.shape[2:]
        cond = make_denoise(pipeline.transformer, pipeline.encode([t.prompt for t in some]), rows, columns)
        empty = pipeline.encode([""])[0]
        uncond = make_denoise(pipeline.transformer, [empty] * len(some), rows, columns)
        denoise = with_cfg(cond, uncond, CFG)
        noise = make_noise(range(first, first + len(some)), start.shape[1], rows, columns)
        masked = hold_outside(denoise, mask, start, noise)
        if how is not None:
            masked = with_inner_iterations(denoise, masked, mask_B1HW=mask, start_BCHW=start, how=how)
        sigmas = make_sigmas(steps)
        x = sample_euler(masked, mix_noise(start, noise, float(sigmas[0])), sigmas)
        shown = (pipeline.vae.decode_fitting(x).float() / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        finished += [lay_back(one[None], p.stitch)[0] for one, p in zip(shown, parts, strict=True)]
    return finished


def judge(tasks: Sequence[Task], pictures: Sequence[Tensor]) -> dict[str, Any]:
    """Right per picture, largest change outside the soft mask in 1/255, and how far new background is off."""
    right, changes, errors = [], [], []
    for task, picture in zip(tasks, pictures, strict=True):
        part = prepare_task(task)
        kept = part.stitch.alpha[0] == 0
        changes.append(float(255 * (picture - part.stitch.canvas[0])[kept].abs().max()))
        pixels = np.rint(picture.numpy() * 255).astype(np.uint8)
        hit = matches(task.wanted, measure_picture(pixels))
        ok = hit["shape"] and hit["color"]
        if task.right_px:
            new = np.abs(pixels.astype(float) - backdrop(task.wanted))[:, -task.right_px :]
            errors.append(float(new.mean()))
            ok = ok and hit["background"] and hit["style"] and new.mean() <= BACKGROUND_ERROR
        right.append(bool(ok))
    return {"right": right, "changed": max(changes), "background_error": float(np.mean(errors)) if errors else None}


HARD = InnerIterations(iterations=3)
CASES: dict[str, tuple[str, InnerIterations | None]] = {
    "object, plain": ("object", None),
    "half, plain": ("half", None),
    "outpaint, plain": ("outpaint", None),
    "object, hard": ("object", HARD),
    "half, hard": ("half", HARD),
    "outpaint, hard": ("outpaint", HARD),
    "half, hard, evidence 2": ("half", replace(HARD, evidence=2.0)),
}


def run_cases(pipeline: Pipeline, cases: dict[str, tuple[str, InnerIterations | None]]) -> dict[str, Any]:
    file = WORK / "inpaint.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, (kind, how) in cases.items():
        if name not in results:
            tasks = make_tasks(kind)
            results[name] = judge(tasks, paint(pipeline, tasks, how))
            remember("inpaint", results)
    return results


def measure(load: Callable[[], Pipeline] = load_tiny) -> Iterator[Row]:
    results = run_cases(load(), CASES)
    for name in CASES:
        found = results[name]
        share = float(np.mean(found["right"]))
        spread = (share * (1 - share) / len(found["right"])) ** 0.5
        background = found["background_error"]
        yield Row(
            name=f"inpainting, {name}: right",
            ours=f"{percent(share)} +- {percent(spread)}",
            peer_name="goal",
            peer="85 %",
            target="at least the goal",
            met=share >= 0.85,
            untold=f"largest change outside the mask {found['changed']:.3f} of 255"
            + ("" if background is None else f", new background off by {background:.1f} of 255"),
        )
