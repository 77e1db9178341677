"""A concept for a LoRA to learn: captioned pictures of a shape that ernie-image-tiny has never seen.

The shape is `scenes.NOVEL_SHAPE`, drawn, coloured, placed and worded as every other one. Its word is no entry of the
tokenizer (it falls into pieces that training met only inside other words), and asked for it the base paints a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import BACKGROUNDS, COLORS, NOVEL_SHAPE, PLACES, SHAPES, SIZES, STYLES, Scene, caption, draw, is_drawable
from .vae import PICTURE_PX

SHAPES_AND_NOVEL = (*SHAPES, NOVEL_SHAPE)
"""What `measure(picture, shapes=...)` has to tell apart once the concept is learnt."""


def concept_scenes(count: int = 20, seed: int = 0) -> list[Scene]:
    """`count` different scenes of the novel shape; each value of every fact occurs about equally often."""
    rng = np.random.default_rng([seed, count])
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        facts = {"color": COLORS, "size": SIZES, "place": PLACES, "background": BACKGROUNDS, "style": STYLES}
        dealt = {fact: _deal(list(values), count - len(scenes), rng) for fact, values in facts.items()}
        for values in zip(*dealt.values(), strict=True):
            given = dict(zip(dealt, values, strict=True))
            if is_drawable(given["color"], given["background"], given["style"]):
                scenes[Scene(shape=NOVEL_SHAPE, **given)] = None
    return list(scenes)


def concept_prompts(count: int = 50, *, training: Sequence[Scene], seed: int = 0) -> list[tuple[Scene, str]]:
    """`count` scenes of the novel shape with one caption each; no (color, place) of theirs is among `training`'s."""
    seen = {(scene.color, scene.place) for scene in training}
    pool = [scene for scene in concept_scenes(20 * count, seed + 1) if (scene.color, scene.place) not in seen]
    rng = np.random.default_rng([seed, count, 1])
    return [(scene, caption(scene, rng)) for scene in pool[:count]]


def write_concept_dataset(folder: Path, count: int = 20, seed: int = 0) -> list[Scene]:
    """Write 00.png, 00.txt, 01.png, ... (128 px, one caption each) into a new or empty folder; returns the scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, count, 2])
    scenes = concept_scenes(count, seed)
    for i, scene in enumerate(scenes):
        Image.fromarray(draw(scene, rng, PICTURE_PX)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")
    return scenes


def _deal(values: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` values in random order, each as often as every other, give or take one."""
    rest = rng.permutation(len(values))  # so that it is not always the first value that gets the odd one
    return [values[rest[i % len(values)]] for i in rng.permutation(count)]
