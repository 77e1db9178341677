"""A preference for DPO to learn: of two pictures that ernie-image-tiny painted for one prompt, the smaller object.

The prompts name no size. Training always named it; without the word the base paints objects of about 55 px, and half of
them are smaller than usual (`USUAL_PX`): that is the property. Nothing else in a pair decides who wins: both show the
colour, the shape, the place and the background that the prompt asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..ernie_core.pipeline import Pipeline
from .evaluate import paint
from .measure import Measured, matches, measure
from .scenes import Scene, short_prompt, split
from .vae import PICTURE_PX

logger = logging.getLogger(__name__)

USUAL_PX = {"circle": 56.5, "square": 50, "triangle": 52.5, "star": 51, "ring": 56, "cross": 59.5}
"""The longer side, in px of 128, that about half of the base's objects stay below where no size is named: its medians
over 300 open prompts of scenes that training showed, by shape."""
MIN_GAP = 3 / 128
"""Winner and loser of a pair differ by at least this much."""
NAMED = ("shape", "color", "place", "background")
"""What the prompts name, and both pictures of a pair show."""


def is_preferred(scene: Scene, measured: Measured) -> bool:
    """Whether the picture has the property; one without an object has not."""
    return measured.diameter is not None and measured.diameter * PICTURE_PX < USUAL_PX[scene.shape]


def open_prompts(count: int, *, heldout: bool, seed: int = 0) -> list[tuple[Scene, str]]:
    """`count` different prompts that name everything but the size, with a scene of theirs (its size means nothing).

    `heldout`: from the (shape, color, place) triples that no training of this model saw.
    """
    pool = split()[1 if heldout else 0]
    rng = np.random.default_rng([seed, int(heldout), 3])
    prompts: dict[str, Scene] = {}
    for index in rng.permutation(len(pool)):
        prompts.setdefault(short_prompt(pool[index], rng, {"place", "background", "style"}), pool[index])
        if len(prompts) == count:
            break
    return [(scene, text) for text, scene in prompts.items()]


def follows(scene: Scene, measured: Measured) -> bool:
    """Whether the picture shows everything that an open prompt of the scene names."""
    right = matches(scene, measured)
    return all(right[fact] for fact in NAMED)


def write_preference_pairs(
    folder: Path, pipeline: Pipeline, *, count: int = 200, seed: int = 0, tries: int = 6, steps: int = 12
) -> list[tuple[Measured, Measured]]:
    """Paint and write chosen/000.png, chosen/000.txt (the prompt), rejected/000.png, ...; returns what they show.

    Each prompt is painted with `tries` seeds; its smallest and its largest right picture become a pair when one is
    has the property and the other has not, and they are `MIN_GAP` apart. At most one pair per prompt.
    """
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    pairs: list[tuple[Measured, Measured]] = []
    for number, (scene, text) in enumerate(open_prompts(20 * count, heldout=False, seed=seed)):
        if len(pairs) == count:
            break
        pictures = paint(pipeline, [text] * tries, seeds=range(number * tries, (number + 1) * tries), steps=steps)
        found = [(shown, picture) for picture in pictures if follows(scene, shown := measure(picture))]
        found.sort(key=lambda pair: pair[0].diameter or 0)
        if not found or not is_preferred(scene, found[0][0]) or is_preferred(scene, found[-1][0]):
            continue
        if (found[-1][0].diameter or 0) - (found[0][0].diameter or 0) < MIN_GAP:
            continue
        for side, (_, picture) in (("chosen", found[0]), ("rejected", found[-1])):
            Image.fromarray(picture).save(folder / side / f"{len(pairs):03}.png")
        (folder / "chosen" / f"{len(pairs):03}.txt").write_text(text + "\n", encoding="utf-8")
        pairs.append((found[0][0], found[-1][0]))
        logger.info("pair %d of %d after %d prompts", len(pairs), count, number + 1)
    return pairs


def measure_preference(
    pipeline: Pipeline, prompts: Sequence[tuple[Scene, str]], *, steps: int = 20
) -> dict[str, float]:
    """Over open prompts, seed i for prompt i: shares with the property and followed, and the median diameter in px."""
    pictures = paint(pipeline, [text for _, text in prompts], seeds=range(len(prompts)), steps=steps)
    shown = [(scene, measure(picture)) for (scene, _), picture in zip(prompts, pictures, strict=True)]
    diameters = [measured.diameter for _, measured in shown if measured.diameter is not None]
    return {
        "property": float(np.mean([is_preferred(scene, measured) for scene, measured in shown])),
        "followed": float(np.mean([follows(scene, measured) for scene, measured in shown])),
        "diameter_px": float(np.median(diameters) * PICTURE_PX) if diameters else float("nan"),
        "prompts": float(len(shown)),
    }
