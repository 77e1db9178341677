"""Concepts for LoRAs to learn: captioned pictures of a shape and of a colour that ernie-image-tiny has never seen.

They are `scenes.NOVEL_SHAPE` and `scenes.NOVEL_COLOR`, drawn, placed and worded as every other one. Their words are no
entries of the tokenizer (they fall into pieces that training met only inside other words): asked for the shape, the
base paints a ring. All are large: a small heart is two latent cells wide, and twenty pictures of both sizes taught half
as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..ernie_core.pipeline import Pipeline
from .evaluate import JUDGED, paint
from .measure import matches, measure
from .scenes import (
    BACKGROUNDS,
    COLORS,
    NOVEL_COLOR,
    NOVEL_SHAPE,
    PLACES,
    SHAPES,
    STYLES,
    Scene,
    all_scenes,
    caption,
    draw,
    is_drawable,
    split,
)
from .vae import PICTURE_PX

SHAPES_AND_NOVEL = (*SHAPES, NOVEL_SHAPE)
"""What `measure(picture, shapes=...)` has to tell apart once the concept is learnt."""


CONCEPTS = {NOVEL_SHAPE: "shape", NOVEL_COLOR: "color"}
"""What can be learnt, and the fact that it is a value of."""


def concept_scenes(count: int = 20, seed: int = 0, *, concept: str = NOVEL_SHAPE) -> list[Scene]:
    """`count` different large scenes of the concept; each value of every other fact occurs about equally often."""
    drawable = _all_concept_scenes(concept)
    if count > len(drawable):
        raise ValueError(f"there are {len(drawable)} scenes of the concept {concept}, {count} are asked for")
    rng = np.random.default_rng([seed, count])
    scenes: dict[Scene, None] = {}
    facts = {"shape": SHAPES, "color": tuple(COLORS), "place": tuple(PLACES)}
    facts |= {"background": tuple(BACKGROUNDS), "style": STYLES}
    del facts[CONCEPTS[concept]]
    while len(scenes) < count:
        dealt = [_deal(values, count - len(scenes), rng) for values in facts.values()]
        for values in zip(*dealt, strict=True):
            told = dict(zip(facts, values, strict=True)) | {CONCEPTS[concept]: concept, "size": "large"}
            # Not every colour stands out from every background.
            if Scene(**told) in drawable:
                scenes[Scene(**told)] = None
    return list(scenes)


def concept_prompts(
    count: int = 50, *, training: Sequence[Scene], seed: int = 0, concept: str = NOVEL_SHAPE
) -> list[tuple[Scene, str]]:
    """`count` scenes of the concept with one caption each, none close to a scene in `training`.

    No (color, place) of the novel shape, and no (shape, place) of the novel colour, is among those of `training`.
    """
    other = "color" if CONCEPTS[concept] == "shape" else "shape"
    seen = {(getattr(scene, other), scene.place) for scene in training}
    pool = [scene for scene in _all_concept_scenes(concept) if (getattr(scene, other), scene.place) not in seen]
    rng = np.random.default_rng([seed, count, 1])
    return [(pool[i], caption(pool[i], rng)) for i in rng.choice(len(pool), size=count, replace=False)]


def _all_concept_scenes(concept: str) -> list[Scene]:
    """Every drawable large scene of the concept."""
    large = [scene for scene in all_scenes() if scene.size == "large"]
    if CONCEPTS[concept] == "shape":
        return [replace(scene, shape=concept) for scene in large if scene.shape == SHAPES[0]]
    kept = {replace(scene, color=concept): None for scene in large}
    return [scene for scene in kept if is_drawable(scene.color, scene.background, scene.style)]


def write_concept_dataset(folder: Path, count: int = 20, seed: int = 0, *, concept: str = NOVEL_SHAPE) -> list[Scene]:
    """Write 00.png, 00.txt, 01.png, ... (128 px, one caption each) into a new or empty folder; returns the scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, count, 2])
    scenes = concept_scenes(count, seed, concept=concept)
    for i, scene in enumerate(scenes):
        Image.fromarray(draw(scene, rng, PICTURE_PX)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")
    return scenes


def write_own_pictures(folder: Path, pipeline: Pipeline, count: int = 200, *, seed: int = 0, steps: int = 20) -> int:
    """Pictures that the base paints of what it knows (prior preservation), with prompts; returns how many it tried.

    000.png, 000.txt, ... of the scenes that training showed (no held-out triple is among them), each only if colour,
    shape and place came out as its prompt says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 4])
    pool = split()[0]
    kept = tried = 0
    while kept < count:
        scenes = [pool[i] for i in rng.integers(len(pool), size=25)]
        texts = [caption(scene, rng) for scene in scenes]
        pictures = paint(pipeline, texts, seeds=range(tried, tried + len(texts)), steps=steps)
        tried += len(scenes)
        for scene, text, picture in zip(scenes, texts, pictures, strict=True):
            right = matches(scene, measure(picture))
            if kept < count and all(right[fact] for fact in JUDGED):
                Image.fromarray(picture).save(folder / f"{kept:03}.png")
                (folder / f"{kept:03}.txt").write_text(text + "\n", encoding="utf-8")
                kept += 1
    return tried


def _deal(values: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` values in random order, each as often as every other, give or take one."""
    rest = rng.permutation(len(values))  # so that it is not always the first value that gets the odd one
    return [values[rest[i % len(values)]] for i in rng.permutation(count)]
