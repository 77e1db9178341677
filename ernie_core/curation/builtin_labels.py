"""Labels without a model: what can be measured on the pixels of a picture, and nothing else.

They name no objects. They are here so that the whole pipeline runs without a download, and to sort out what needs no
model: blank pictures, drawings against photographs, black and white, dark, wide. Measured on at most 128 pixels:

kind        blank     no channel spreads by more than 2 of 255 (standard deviation)
            graphic   a third or more of the picture is flat: neighbours that differ by less than 1.5 of 255 in each
                      direction. Drawings, screens and charts are; photographs have grain and texture everywhere, so
                      studio shots and clear skies can pass for graphics
            photo     the rest; detailed paintings land here as well
colour      the nearest colour name (the eleven of Berlin and Kay 1969, cyan and beige) for most of the picture, in
            CIELAB; "colourful" where no name has 40 %
light       mean luma: dark below 70, bright above 185, else medium
format      wide from 1.2 : 1, tall from 1 : 1.2, else square
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from ..errors import ErnieError
from .answers import LENGTHS, check_lengths
from .categories import Assignment
from .manifest import Row

RULES = 1  # raise it when a change here gives other labels
SIDE_PX = 128
COLOURS = {
    "black": ((12, 12, 12),),
    "white": ((245, 245, 245),),
    "grey": ((128, 128, 128), (70, 70, 72), (190, 190, 192)),
    "red": ((205, 30, 35), (120, 20, 25)),
    "orange": ((240, 130, 30),),
    "yellow": ((245, 220, 50), (250, 240, 150)),
    "green": ((50, 150, 60), (25, 70, 35), (160, 215, 150)),
    "cyan": ((70, 200, 210), (30, 110, 115)),
    "blue": ((45, 85, 200), (35, 45, 90), (145, 195, 240)),
    "purple": ((125, 55, 160), (60, 30, 80), (200, 175, 230)),
    "pink": ((240, 150, 185),),
    "brown": ((115, 70, 40), (60, 38, 22)),
    "beige": ((222, 200, 165),),
}
"""Typical sRGB values of the names, of our own: full, dark and light where people use one name for them."""
MAIN_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was measured."""

    kind: str
    colour: str
    second_colour: str
    """Of the rest of the picture; "" where one name has 90 % of it."""
    colour_share: float
    light: str
    format: str


def measure_look(picture: Image.Image) -> Look:
    """The measures above, of an RGB picture."""
    width, height = picture.size
    small = picture.convert("RGB")
    scale = SIDE_PX / max(width, height)
    if scale < 1:
        small = small.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    rgb_HWC = np.asarray(small, dtype=np.float32)
    luma_HW = rgb_HWC @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    names = list(COLOURS)
    shares = np.bincount(_nearest_colour(rgb_HWC.reshape(-1, 3)), minlength=len(names)) / (rgb_HWC.size // 3)
    order = np.argsort(-shares, kind="stable")
    mean = float(luma_HW.mean())
    return Look(
        kind="blank"
        if float(rgb_HWC.std(axis=(0, 1)).max()) <= 2
        else "graphic"
        if _flat_share(luma_HW) >= 1 / 3
        else "photo",
        colour=names[order[0]] if shares[order[0]] >= MAIN_SHARE else "colourful",
        second_colour=names[order[1]] if shares[order[0]] < 0.9 else "",
        colour_share=float(shares[order[0]]),
        light="dark" if mean < 70 else "bright" if mean > 185 else "medium",
        format="wide" if width >= 1.2 * height else "tall" if height >= 1.2 * width else "square",
    )


def _flat_share(luma_HW: np.ndarray) -> float:
    """Share of the pixels that differ by less than 1.5 from their right and lower neighbour."""
    if min(luma_HW.shape) < 2:
        return 1.0
    across = np.abs(np.diff(luma_HW, axis=1))[:-1] < 1.5
    down = np.abs(np.diff(luma_HW, axis=0))[:, :-1] < 1.5
    return float((across & down).mean())


def to_lab(rgb_PC: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB in 0..255: L 0..100, a, b. IEC 61966-2-1 and CIE 15."""
    encoded = np.asarray(rgb_PC, dtype=np.float32) / 255
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=np.float32)
    xyz = light @ to_xyz.T / np.array([0.9505, 1.0, 1.089], dtype=np.float32)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@cache
def _named() -> tuple[np.ndarray, np.ndarray]:
    """(CIELAB of every value, place of its name)."""
    values = [(value, place) for place, values in enumerate(COLOURS.values()) for value in values]
    return to_lab(np.array([value for value, _ in values])), np.array([place for _, place in values])


def _nearest_colour(rgb_PC: np.ndarray) -> np.ndarray:
    lab_VC, places_V = _named()
    return places_V[np.linalg.norm(to_lab(rgb_PC)[:, None] - lab_VC[None], axis=2).argmin(axis=1)]


class BuiltinCategoriser:
    """Sorts into kind/colour, as graphic/blue.

    The confidence is the colour's share of the picture, and the runner-up its second colour.
    """

    def key(self) -> str:
        return f"built-in:{RULES}"

    def assign(self, pictures: Sequence[Image.Image]) -> list[Assignment | ErnieError]:
        return [_assign(measure_look(picture)) for picture in pictures]


def _assign(look: Look) -> Assignment:
    if look.kind == "blank":
        return Assignment(category=f"blank/{look.colour}", confidence=round(look.colour_share, 4))
    second = f"{look.kind}/{look.second_colour}" if look.second_colour else ""
    return Assignment(category=f"{look.kind}/{look.colour}", confidence=round(look.colour_share, 4), runner_up=second)


class BuiltinCaptioner:
    """Captions that say what was measured, in English, such as "A bright graphic, mostly white with some red".

    A row with a caption of its own gets none: what somebody wrote says more, and later stages take the newest.
    """

    def __init__(self, lengths: Sequence[str] = LENGTHS):
        """Raises ErnieError: an unknown length, or none."""
        self.lengths = check_lengths(lengths)

    def key(self) -> str:
        return f"built-in:{RULES} {self.lengths}"

    def describe(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row | ErnieError]:
        made: list[Row | ErnieError] = []
        for row, picture in zip(rows, pictures, strict=True):
            columns = _describe(measure_look(picture))
            if str(row.get("caption") or "").strip():
                notes = ["the caption beside the picture stays the only one"]
                made.append(columns | {"captions": {}, "caption_notes": notes})
            else:
                made.append(columns | {"captions": {length: columns["captions"][length] for length in self.lengths}})
        return made


def _describe(look: Look) -> Row:
    kind = {"photo": "picture", "blank": "blank picture"}.get(look.kind, look.kind)
    colours = [look.colour, *([look.second_colour] if look.second_colour else [])]
    mostly = "colourful" if look.colour == "colourful" else f"mostly {look.colour}"
    some = f" with some {look.second_colour}" if look.second_colour and look.colour != "colourful" else ""
    light = "" if look.light == "medium" else f"{look.light} "
    short = f"A {light}{kind}, {mostly}{some}"
    return {
        "description": {
            "type": kind,
            "style": ", ".join([*colours, f"{look.light} light"]),
            "layout": f"{look.format} format",
        },
        "captions": {
            "long": f"{short}, in {look.format} format.",
            "medium": f"{short}.",
            "short": f"{short}.",
            "tags": ", ".join([kind, *colours, look.light, look.format]),
            "prompt": f"{mostly.removeprefix('mostly ')} {kind}",
        },
        "caption_notes": ["measured on the pixels: no object is named"],
    }
