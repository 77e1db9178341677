"""Text on pictures: fonts that can show it, its width, cutting and wrapping to a width.

The font is Pillow's own; text that it cannot show takes a font of the machine that can. A character that no font here
shows is written as "?", never as an empty box, and `undrawable` names it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

TEXT_PX = 12
INK, PAPER, PLATE = (40, 40, 46), (255, 255, 255), (16, 16, 20)
_OWN = ""  # the font that comes with Pillow
_FONTS = (
    *(_OWN, "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf", "msyh.ttc"),
    *("simhei.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
    *("DroidSansFallback.ttf", "Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf"),
)
_NO_GLYPH = "\U0010fffd"  # for private use: fonts draw their empty box for it
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int = TEXT_PX,
    *,
    fill: tuple[int, int, int] = INK,
) -> None:
    """One line of text; white space becomes single spaces."""
    if text := drawable(text):
        pen.text(at, text, fill=fill, font=_font(size, _name_for(text)))


def write_plate(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, width_px: int) -> None:
    """White text on a dark plate, at most `width_px` wide."""
    (x, y), pad = corner, size // 3
    text = fit(text, width_px - 2 * pad, size)
    pen.rectangle((x, y, x + text_width(text, size) + 2 * pad, y + size + 2 * pad), fill=PLATE)
    write(pen, (x + pad, y + pad - size // 10), text, size, fill=PAPER)


def text_width(text: str, size: int) -> int:
    """Width in pixels of what `write` draws."""
    text = drawable(text)
    return math.ceil(_font(size, _name_for(text)).getlength(text)) if text else 0


def fit(text: str, width_px: int, size: int) -> str:
    """`text`, cut to what is drawn in `width_px`."""
    text = " ".join(text.split())
    if text_width(text, size) <= width_px:
        return text
    most = len(text)
    while most > 1 and text_width(text[:most] + "...", size) > width_px:
        most = min(most - 1, max(1, int(most * width_px / text_width(text[:most] + "...", size))))
    return text[:most] + "..."


def wrap(text: str, width_px: int, size: int, lines: int) -> list[str]:
    """At most `lines` lines that are drawn in `width_px`; breaks at spaces, inside words that are too long, and where
    there are no spaces; the last line is cut."""
    rest, found = " ".join(text.split()), []
    while rest and len(found) < lines - 1 and text_width(rest, size) > width_px:
        most = max(1, int(len(rest) * width_px / text_width(rest, size)))
        while most < len(rest) and text_width(rest[: most + 1], size) <= width_px:
            most += 1
        while most > 1 and text_width(rest[:most], size) > width_px:
            most -= 1
        space = rest.rfind(" ", 1, most + 1)
        cut = space if space > 0 else most
        found.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return [*found, fit(rest, width_px, size)] if rest else found


def drawable(text: str) -> str:
    """`text` with single spaces and "?" for what no font here shows."""
    text = " ".join(text.split())
    if text.isascii():
        return text
    shown = _glyphs(_name_for(text))
    return "".join(c if shown(c) else "?" for c in text)


def undrawable(text: str) -> str:
    """The characters of `text` that are drawn as "?", each once."""
    return "".join(dict.fromkeys(c for c, d in zip(" ".join(text.split()), drawable(text), strict=True) if c != d))


@functools.lru_cache(maxsize=1024)
def _name_for(text: str) -> str:
    """The first font that shows all of `text`, else the one that shows most of it."""
    if text.isascii():
        return _OWN
    characters = set(text) - {" "}
    best, most = _OWN, -1
    for name in _FONTS:
        if not _exists(name):
            continue
        count = sum(map(_glyphs(name), characters))
        if count == len(characters):
            return name
        if count > most:
            best, most = name, count
    return best


@functools.lru_cache(maxsize=32)
def _glyphs(name: str) -> Callable[[str], bool]:
    """shown(character): whether the font has more for it than its empty box."""
    font = _font(16, name)

    def drawn(text: str) -> bytes:
        picture = Image.new("L", (32, 32))
        try:
            ImageDraw.Draw(picture).text((4, 4), text, fill=255, font=font)
        except UnicodeError:  # Pillow's bitmap font knows Latin-1 only
            return b""
        return picture.tobytes()

    empty = drawn(_NO_GLYPH)

    @functools.lru_cache(maxsize=4096)
    def shown(character: str) -> bool:
        return character.isspace() or drawn(character) not in (empty, b"")

    return shown


@functools.lru_cache(maxsize=32)
def _exists(name: str) -> bool:
    try:
        return name == _OWN or ImageFont.truetype(name, 16) is not None
    except OSError:
        return False  # not on this machine


@functools.lru_cache(maxsize=64)
def _font(size: int, name: str) -> Font:
    return ImageFont.load_default(size) if name == _OWN else ImageFont.truetype(name, size)
