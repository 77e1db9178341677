"""A concept for a LoRA to learn: captioned pictures of a shape that ernie-image-tiny has never seen.

The shape is `scenes.NOVEL_SHAPE`, drawn, coloured, placed and worded as every other one. Its word is no entry of the
tokenizer (it falls into pieces that training met only inside other words), and asked for it the base paints a ring.
All of them are large: a small one is two latent cells wide, and twenty pictures of both sizes taught half as well.
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
    NOVEL_SHAPE,
    PLACES,
    SHAPES,
    STYLES,
    Scene,
    all_scenes,
    caption,
    draw,
    split,
)
from .vae import PICTURE_PX

SHAPES_AND_NOVEL = (*SHAPES, NOVEL_SHAPE)
"""What `measure(picture, shapes=...)` has to tell apart once the concept is learnt."""


def concept_scenes(count: int = 20, seed: int = 0) -> list[Scene]:
    """`count` different large scenes of the novel shape; each value of every other fact occurs about equally often."""
    if count > len(_all_concept_scenes()):
        raise ValueError(f"there are {len(_all_concept_scenes())} scenes of the novel shape, {count} are asked for")
    rng = np.random.default_rng([seed, count])
    scenes: dict[Scene, None] = {}
    drawable = set(_all_concept_scenes())
    facts = {"color": COLORS, "place": PLACES, "background": BACKGROUNDS, "style": STYLES}
    while len(scenes) < count:
        dealt = [_deal(list(values), count - len(scenes), rng) for values in facts.values()]
        for values in zip(*dealt, strict=True):
            scene = Scene(shape=NOVEL_SHAPE, size="large", **dict(zip(facts, values, strict=True)))
            if scene in drawable:
                scenes[scene] = None
    return list(scenes)


def concept_prompts(count: int = 50, *, training: Sequence[Scene], seed: int = 0) -> list[tuple[Scene, str]]:
    """`count` scenes of the novel shape with one caption each; no (color, place) of theirs is among `training`'s."""
    seen = {(scene.color, scene.place) for scene in training}
    pool = [scene for scene in _all_concept_scenes() if (scene.color, scene.place) not in seen]
    rng = np.random.default_rng([seed, count, 1])
    return [(pool[i], caption(pool[i], rng)) for i in rng.choice(len(pool), size=count, replace=False)]


def _all_concept_scenes() -> list[Scene]:
    return [replace(s, shape=NOVEL_SHAPE) for s in all_scenes() if s.shape == SHAPES[0] and s.size == "large"]


def write_concept_dataset(folder: Path, count: int = 20, seed: int = 0) -> list[Scene]:
    """Write 00.png, 00.txt, 01.png, ... (128 px, one caption each) into a new or empty folder; returns the scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, count, 2])
    scenes = concept_scenes(count, seed)
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
