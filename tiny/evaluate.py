"""Does ernie-image-tiny do as it is told? Measured from pixels, on prompts that training never showed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..ernie_core.pipeline import Pipeline
from . import scenes
from .measure import matches, measure

logger = logging.getLogger(__name__)

JUDGED = ("color", "shape", "place")


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
    sheet: Path | None = None,
) -> dict[str, float]:
    """Shares of pictures right in each fact, and in colour, shape and place together ("all").

    Picture i uses seed i. `shapes`: those to tell apart. `sheet`: where to save the first 40 as one PNG.
    """
    right: dict[str, list[bool]] = {}
    shown = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        pictures = pipeline.generate(
            [text for _, text in part],
            seeds=range(start, start + len(part)),
            width=size_px,
            height=size_px,
            steps=steps,
            cfg=cfg,
            shift=shift,
        )
        for (scene, text), picture in zip(part, pictures.numpy(), strict=True):
            pixels = np.rint(picture * 255).astype(np.uint8)
            shown.append(pixels)
            found = measure(pixels, shapes=shapes)
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
