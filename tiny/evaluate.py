"""Does ernie-image-tiny do as it is told? Measured from pixels, on prompts that training never showed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..ernie_core.pipeline import Pipeline
from . import scenes
from .measure import matches, measure

logger = logging.getLogger(__name__)

JUDGED = ("color", "shape", "place")


def paint(
    pipeline: Pipeline,
    texts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 50,
    cfg: float = 4.0,
    shift: float = 4.0,
    batch: int = 20,
    size_px: int = 128,
) -> list[np.ndarray]:
    """One picture per text and seed, uint8 [size_px, size_px, 3]; `batch` of them at a time."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(texts), batch):
        painted = pipeline.generate(
            texts[start : start + batch],
            seeds=seeds[start : start + batch],
            width=size_px,
            height=size_px,
            steps=steps,
            cfg=cfg,
            shift=shift,
        )
        pictures += list(np.rint(painted.numpy() * 255).astype(np.uint8))
    return pictures


def evaluate(
    pipeline: Pipeline,
    prompts: Sequence[tuple[scenes.Scene, str]],
    *,
    steps: int = 50,
    cfg: float = 4.0,
    shift: float = 4.0,
    batch: int = 20,
    size_px: int = 128,
    shapes: Sequence[str] = scenes.SHAPES,
    colors: Mapping[str, tuple[int, int, int]] = scenes.COLORS,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Shares of pictures right in each fact, and in colour, shape and place together ("all").

    Picture i uses seed i. `shapes`, `colors`: those to tell apart. `sheet`: where to save the first 40 as one PNG.
    """
    right: dict[str, list[bool]] = {}
    shown = paint(
        pipeline,
        [text for _, text in prompts],
        seeds=range(len(prompts)),
        steps=steps,
        cfg=cfg,
        shift=shift,
        batch=batch,
        size_px=size_px,
    )
    for (scene, text), picture in zip(prompts, shown, strict=True):
        found = measure(picture, shapes=shapes, colors=colors)
        hit = matches(scene, found)
        hit["all"] = all(hit[fact] for fact in JUDGED)
        for fact, ok in hit.items():
            right.setdefault(fact, []).append(ok)
        if not hit["all"]:
            logger.info("missed: %r -> %s", text, found)
    if sheet is not None:
        rows = [np.concatenate(shown[i : i + 8], axis=1) for i in range(0, min(40, len(shown)) // 8 * 8, 8)]
        Image.fromarray(np.concatenate(rows, axis=0)).save(sheet)
    return {fact: float(np.mean(hits)) for fact, hits in right.items()} | {"prompts": float(len(shown))}
