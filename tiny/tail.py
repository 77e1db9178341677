"""A long-tailed world: three colours that ernie-image-tiny has never seen, one of them common and one rare.

Pink, brown and cyan objects of the six known shapes, large, placed and worded as every other one. A quarter of each
category's pictures are badly made (blurred, faded and noisy), so that scores have something to say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from .scenes import COLORS, NOVEL_COLOR, PLACES, SHAPES, TAIL_COLORS, Scene, all_scenes, caption, draw, is_drawable
from .vae import PICTURE_PX

CATEGORIES: tuple[str, ...] = (NOVEL_COLOR, *TAIL_COLORS)
COUNTS = (400, 40, 8)
"""Pictures of the common, the middle and the rare category."""
ROLES = ("head", "middle", "tail")
BAD = 4
"""Every so many-th picture is badly made."""
_JUDGED_PAIRS = 14  # of the 54 (shape, place): no training picture has them


def roles(seed: int) -> dict[str, str]:
    """Colour -> its role; each colour has each role once in three seeds."""
    return {CATEGORIES[(i + seed) % len(CATEGORIES)]: role for i, role in enumerate(ROLES)}


def tail_prompts(count: int = 16) -> dict[str, list[tuple[Scene, str]]]:
    """`count` prompts per colour, the same scenes for each, of shapes and places that no training picture joins."""
    rng = np.random.default_rng([count, 7])
    pool = [scene for scene in _scenes() if (scene.shape, scene.place) in _judged_pairs()]
    chosen = [pool[i] for i in rng.choice(len(pool), size=count, replace=False)]
    worded = np.random.default_rng([count, 8])
    return {color: [(s, caption(s, worded)) for s in _of(color, chosen)] for color in CATEGORIES}


def write_tail_dataset(folder: Path, *, seed: int = 0) -> list[tuple[Path, str]]:
    """Write COLOR-000.png, COLOR-000.txt, ... (128 px) into a new folder; (picture, colour) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 9])
    pool = [scene for scene in _scenes() if (scene.shape, scene.place) not in _judged_pairs()]
    written: list[tuple[Path, str]] = []
    for color, role in roles(seed).items():
        places = rng.choice(len(pool), size=COUNTS[ROLES.index(role)], replace=False)
        for i, scene in enumerate(_of(color, [pool[k] for k in places])):
            picture = draw(scene, rng, PICTURE_PX)
            path = folder / f"{color}-{i:03}.png"
            Image.fromarray(spoil(picture, rng) if i % BAD == BAD - 1 else picture).save(path)
            path.with_suffix(".txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")
            written.append((path, color))
    return written


def spoil(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture badly made: blurred until corners are round, half its contrast, noisy."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(5)), dtype=np.float64)
    faded = soft.mean(axis=(0, 1)) + 0.5 * (soft - soft.mean(axis=(0, 1)))
    return np.clip(np.rint(faded + rng.normal(0, 6, picture.shape)), 0, 255).astype(np.uint8)


def _scenes() -> list[Scene]:
    """Every large scene once, whatever its colour, on backgrounds that all three colours stand out from."""
    some = next(iter(COLORS))
    every = {replace(scene, color=some): None for scene in all_scenes() if scene.size == "large"}
    return [s for s in every if all(is_drawable(color, s.background, s.style) for color in CATEGORIES)]


def _of(color: str, scenes: list[Scene]) -> list[Scene]:
    return [replace(scene, color=color) for scene in scenes]


def _judged_pairs() -> set[tuple[str, str]]:
    pairs = [(shape, place) for shape in SHAPES for place in PLACES]
    chosen = np.random.default_rng(10).choice(len(pairs), size=_JUDGED_PAIRS, replace=False)
    return {pairs[i] for i in chosen}
