"""Drawn, captioned scenes: the training data of ernie-image-tiny, and the words it knows.

One object per picture: a shape, a colour, a size, one of nine places, on a background that is plain or a
soft vertical gradient. Everything is drawn from the tables below, numpy and Pillow only, and is a function of
the scene and the `numpy.random.Generator` passed in. Lengths are fractions of the picture's side, so any size
can be drawn.

The same facts are told in three ways: `caption` (short, all facts), `short_prompt` (some facts: what a user
types) and `long_description` (what the prompt enhancer makes of that). `facts` reads them back from any text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
NOVEL_SHAPE = "heart"
"""Can be drawn and worded as the others, but is in no training picture, no caption and no table: left for a LoRA."""
COLORS = {
    "red": (212, 32, 44),
    "orange": (246, 124, 16),
    "yellow": (252, 218, 40),
    "green": (28, 138, 58),
    "blue": (28, 78, 216),
    "purple": (128, 34, 196),
    "white": (252, 252, 252),
    "black": (16, 16, 18),
}
NOVEL_COLOR = "pink"
"""The same of colours: one that can be drawn and worded, and that no training picture and no caption shows."""
INKS = {**COLORS, NOVEL_COLOR: (240, 90, 160)}
"""The colours that training shows, and the one that is left for a LoRA."""
TAIL_COLORS = ("brown", "cyan")
"""Two more that training does not show, for what a rare category of pictures teaches (`tiny/tail.py`)."""
ALL_INKS = {**INKS, "brown": (122, 70, 30), "cyan": (0, 190, 190)}
"""What can be drawn with."""
SIZES = {"small": 34 / 128, "large": 56 / 128}
"""Diameter of the object as a fraction of the picture's side."""
_LOW, _MID, _HIGH = 0.275, 0.5, 0.725
PLACES = {
    "top left": (_LOW, _LOW),
    "top": (_MID, _LOW),
    "top right": (_HIGH, _LOW),
    "left": (_LOW, _MID),
    "center": (_MID, _MID),
    "right": (_HIGH, _MID),
    "bottom left": (_LOW, _HIGH),
    "bottom": (_MID, _HIGH),
    "bottom right": (_HIGH, _HIGH),
}
"""Centre (x, y) of the object's bounding box as fractions of the picture's side."""
BACKGROUNDS = {
    "grey": (152, 154, 160),
    "beige": (222, 200, 166),
    "sky": (140, 200, 240),
    "mint": (158, 220, 186),
    "lilac": (198, 176, 230),
    "navy": (38, 50, 92),
}
STYLES = ("plain", "gradient")

FACTS = ("shape", "color", "size", "place", "background", "style")
_NOVEL = (("shape", NOVEL_SHAPE), *(("color", name) for name in (NOVEL_COLOR, *TAIL_COLORS)))
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
}
"""Every value of every fact: the words of the captions."""

GRADIENT_BOTTOM = 0.7
"""A gradient runs from the background's colour at the top to this multiple of it at the bottom."""
JITTER_PLACE = 3 / 128
JITTER_SIZE = 0.06
MIN_CONTRAST = 90.0
"""Smallest RGB distance (0..441) at which an object still stands out from its background."""
HOLDOUT_SEED = 0
HELD_OUT_TRIPLES = 44
"""About a tenth of the (shape, color, place) triples."""
_OVERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one picture shows; each field is one of `VALUES[field]`, or novel."""

    shape: str
    color: str
    size: str
    place: str
    background: str
    style: str = "plain"

    def __post_init__(self) -> None:
        for fact in FACTS:
            value = getattr(self, fact)
            if value not in VALUES[fact] and (fact, value) not in _NOVEL:
                raise ValueError(f"{fact} must be one of {', '.join(VALUES[fact])}, got {value!r}")


def background_ends(background: str, style: str) -> tuple[np.ndarray, np.ndarray]:
    """The background's RGB at the top and at the bottom edge, 0..255, as floats."""
    top = np.asarray(BACKGROUNDS[background], dtype=np.float64)
    return top, top * (GRADIENT_BOTTOM if style == "gradient" else 1.0)


def is_drawable(color: str, background: str, style: str = "plain") -> bool:
    """Whether an object of this colour stands out from every part of this background."""
    ink = np.asarray(ALL_INKS[color], dtype=np.float64)
    ends = background_ends(background, style)
    return min(float(np.linalg.norm(ink - end)) for end in ends) >= MIN_CONTRAST


def all_scenes() -> list[Scene]:
    """Every drawable scene, in the order of the tables."""
    combinations = product(*(VALUES[fact] for fact in FACTS))
    scenes = (Scene(**dict(zip(FACTS, values, strict=True))) for values in combinations)
    return [scene for scene in scenes if is_drawable(scene.color, scene.background, scene.style)]


def split(holdout_seed: int = HOLDOUT_SEED) -> tuple[list[Scene], list[Scene]]:
    """All scenes as (train, heldout): the held-out (shape, color, place) triples never occur in training.

    At most two triples of any pair are held out, so training still shows every pair of those three facts.
    """
    triples = list(product(SHAPES, COLORS, PLACES))
    taken: dict[tuple[str, str], int] = {}
    held_out: set[tuple[str, str, str]] = set()
    for index in np.random.default_rng(holdout_seed).permutation(len(triples)):
        shape, color, place = triples[index]
        pairs = [(shape, color), (shape, place), (color, place)]
        if len(held_out) < HELD_OUT_TRIPLES and all(taken.get(pair, 0) < 2 for pair in pairs):
            held_out.add(triples[index])
            taken.update({pair: taken.get(pair, 0) + 1 for pair in pairs})
    train, heldout = [], []
    for scene in all_scenes():
        (heldout if (scene.shape, scene.color, scene.place) in held_out else train).append(scene)
    return train, heldout


def heldout_prompts(count: int = 200, *, holdout_seed: int = HOLDOUT_SEED) -> list[tuple[Scene, str]]:
    """`count` different held-out scenes with one caption each; a function of the arguments."""
    heldout = split(holdout_seed)[1]
    rng = np.random.default_rng([holdout_seed, count])
    chosen = rng.choice(len(heldout), size=count, replace=False)
    return [(heldout[index], caption(heldout[index], rng)) for index in chosen]


# ---- Drawing ----


def shape_mask(shape: str, *, diameter: float, center: tuple[float, float], size_px: int) -> np.ndarray:
    """Coverage [H, W] in 0..1 of a shape with soft edges; `diameter` and `center` are in pixels.

    The centre is that of the bounding box, so that places mean the same for every shape.
    """
    scale = _OVERSAMPLING
    canvas = Image.new("L", (size_px * scale, size_px * scale), 0)
    pen = ImageDraw.Draw(canvas)
    half = diameter / 2

    def place(points: np.ndarray) -> list[tuple[float, float]]:
        points = points - (points.min(axis=0) + points.max(axis=0)) / 2
        # Pillow paints a pixel whose centre is at +0.5: the half keeps the drawing centred.
        return [((center[0] + x) * scale - 0.5, (center[1] + y) * scale - 0.5) for x, y in points]

    def disc(radius: float, fill: int) -> None:
        (x0, y0), (x1, y1) = place(np.array([[-radius, -radius], [radius, radius]]))
        pen.ellipse((x0, y0, x1, y1), fill=fill)

    if shape == "circle":
        disc(half, 255)
    elif shape == "ring":
        disc(half, 255)
        disc(half * 0.54, 0)
    else:
        pen.polygon(place(_outline(shape) * half), fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.float64) / 255


def _outline(shape: str) -> np.ndarray:
    """Corner points [N, 2] (x, y down) of a polygonal shape of half-width about 1."""
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.88
    if shape == "triangle":
        return np.array([[0, -1], [1.06, 0.84], [-1.06, 0.84]])
    if shape == "cross":
        arm = 0.34
        quarter = [[-arm, -1], [arm, -1], [arm, -arm]]
        turn = np.array([[0, 1], [-1, 0]])
        return np.concatenate([np.array(quarter) @ np.linalg.matrix_power(turn, k) for k in range(4)])
    if shape == NOVEL_SHAPE:
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 16
    angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
    radii = [1.1 if k % 2 == 0 else 0.46 for k in range(10)]
    return np.array([[r * math.cos(a), r * math.sin(a)] for r, a in zip(radii, angles, strict=True)])


def draw(scene: Scene, rng: np.random.Generator, size_px: int = 128) -> np.ndarray:
    """The picture of a scene, uint8 [size_px, size_px, 3]; `rng` moves and scales the object a little."""
    shift_x, shift_y = rng.uniform(-JITTER_PLACE, JITTER_PLACE, size=2)
    diameter = SIZES[scene.size] * (1 + rng.uniform(-JITTER_SIZE, JITTER_SIZE))
    x, y = PLACES[scene.place]
    mask = shape_mask(
        scene.shape,
        diameter=diameter * size_px,
        center=((x + shift_x) * size_px, (y + shift_y) * size_px),
        size_px=size_px,
    )[..., None]
    top, bottom = background_ends(scene.background, scene.style)
    depth = np.linspace(0, 1, size_px)[:, None, None]
    picture = (top + (bottom - top) * depth) * (1 - mask) + np.asarray(ALL_INKS[scene.color]) * mask
    return np.rint(picture).astype(np.uint8)


# ---- Words ----

_AT = {"top": "at the top", "left": "on the left", "right": "on the right", "center": "in the center"}
_CANONICAL = "a {size} {color} {shape} {at} on a {backdrop}"
_TEMPLATES = (
    _CANONICAL,
    "{size} {color} {shape}, {place}, {backdrop}",
    "on a {backdrop} there is a {size} {color} {shape} {at}",
    "a {backdrop} with a {size} {color} {shape} {at}",
    "{a_color} {shape}, {size}, {at}, {backdrop}",
    "{at} of a {backdrop}, a {size} {color} {shape}",
    "a picture of one {size} {color} {shape} {at}, {backdrop}",
    "{color} {shape} {at}, {size}, on a {backdrop}",
    "{backdrop}, {size} {color} {shape} {at}",
    "the {shape} is {color} and {size}, it sits {at} on a {backdrop}",
)


def named_facts(scene: Scene) -> dict[str, str]:
    """The facts that a full caption of the scene names: all of them, the style only when it is not plain."""
    return {fact: getattr(scene, fact) for fact in FACTS if getattr(scene, fact) != "plain"}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A short caption in one of ten wordings, naming every fact (the style only when it is a gradient)."""
    return _TEMPLATES[rng.integers(len(_TEMPLATES))].format_map(_words(scene))


def canonical_caption(scene: Scene) -> str:
    """The one caption that every scene has: "a small red circle at the top left on a grey background"."""
    return _CANONICAL.format_map(_words(scene))


def short_prompt(scene: Scene, rng: np.random.Generator, keep: Collection[str] | None = None) -> str:
    """A prompt that names colour and shape and, of the rest, only the facts in `keep` (None: a random few).

    `keep` holds names of `FACTS`; "style" can only be told together with "background".
    """
    if keep is None:
        keep = {fact for fact in ("size", "place", "background", "style") if rng.random() < 0.4}
    unknown = set(keep) - set(FACTS)
    if unknown:
        raise ValueError(f"keep must hold names of {', '.join(FACTS)}, got {', '.join(sorted(unknown))}")
    words = _words(scene if "style" in keep else _with_style(scene, "plain"))
    thing = "{size} {color} {shape}" if "size" in keep else "{color} {shape}"
    comma = rng.random() < 0.4
    if not comma and rng.random() < 0.7:
        thing = ("a " if "size" in keep else "{article} ") + thing
    if "place" in keep:
        thing += ", {place}" if comma else " {at}"
    if "background" in keep:
        thing += ", {backdrop}" if comma else " on a {backdrop}"
    return thing.format_map(words)


_LIGHT = (
    "Soft even light falls on the whole picture.",
    "The light is soft and even, without any shadow.",
    "Calm daylight fills the scene without glare.",
)
_EDGES = (
    "The {shape} has clean edges and a flat {color} fill.",
    "Its edges are clean and smooth, and the {color} is pure and flat.",
    "Flat {color} paint covers the {shape} up to its sharp outline.",
)
_COMPOSITION = (
    "It is the only object, placed {at}, with much free space around it.",
    "Nothing else is in view, so the eye rests on the {size} {shape} {at}.",
    "The composition is simple: one {size} {shape} {at} and nothing more.",
)
_PLAIN = (
    "The {background} background is smooth and quiet.",
    "Behind it the {background} tone stays the same everywhere.",
)
_GRADIENT = (
    "The {background} tone fades gently and becomes darker below.",
    "Behind it the {background} gradient grows slowly darker.",
)
_MOOD = (
    "Minimal poster style, flat colours.",
    "A calm and friendly graphic.",
    "Simple vector art, high contrast.",
)


def long_description(given: Mapping[str, str], rng: np.random.Generator) -> str:
    """A description of 35 to 70 words that keeps every given fact and fills in the missing ones.

    `given` is a dict as `facts` returns. The first sentence is the canonical caption of the completed scene.
    A missing background is one that the colour stands out from. A background given without a style is plain.
    """
    filled = {fact: value for fact, value in given.items() if fact in FACTS}
    if "style" not in filled:
        filled["style"] = "plain" if "background" in filled or rng.random() < 0.6 else "gradient"
    for fact in ("shape", "color", "size", "place", "background"):
        options: Collection[str] = VALUES[fact]
        if fact == "color" and "background" in filled:
            options = [value for value in options if is_drawable(value, filled["background"], filled["style"])]
        if fact == "background":
            options = [value for value in options if is_drawable(filled["color"], value, filled["style"])]
        filled.setdefault(fact, list(options)[rng.integers(len(options))])
    scene = Scene(**filled)
    first = canonical_caption(scene)
    pools = (_EDGES, _PLAIN if scene.style == "plain" else _GRADIENT, _LIGHT, _COMPOSITION, _MOOD)
    sentences = [pool[rng.integers(len(pool))] for pool in pools]
    return " ".join([f"{first[0].upper()}{first[1:]}.", *sentences]).format_map(_words(scene))


_FACT_OF = {value: fact for fact, values in VALUES.items() for value in values if value != "plain"}
_NAMES = re.compile(r"\b(" + "|".join(sorted(_FACT_OF, key=len, reverse=True)) + r")\b")


def facts(text: str) -> dict[str, str]:
    """The facts that a text names, as {fact: value} in the order of `FACTS`.

    A fact that is named with two different values counts as not named. "plain" is the absence of a style and
    never reported, so `facts(caption(scene, rng)) == named_facts(scene)`.
    """
    named: dict[str, set[str]] = {}
    for match in _NAMES.finditer(" ".join(text.lower().split())):
        named.setdefault(_FACT_OF[match[1]], set()).add(match[1])
    return {fact: named[fact].copy().pop() for fact in FACTS if len(named.get(fact, ())) == 1}


def _with_style(scene: Scene, style: str) -> Scene:
    return Scene(**{fact: getattr(scene, fact) for fact in FACTS} | {"style": style})


def _words(scene: Scene) -> dict[str, str]:
    article = "an" if scene.color[0] in "aeiou" else "a"
    return {
        **{fact: getattr(scene, fact) for fact in FACTS},
        "article": article,
        "a_color": f"{article} {scene.color}",
        "at": _AT.get(scene.place, f"at the {scene.place}"),
        "backdrop": ("gradient " if scene.style == "gradient" else "") + f"{scene.background} background",
    }
