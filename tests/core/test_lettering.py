"""Text on pictures keeps to its width and never shows an empty box."""

import numpy as np
import pytest
from ernie_pack.ernie_core import lettering
from ernie_pack.ernie_core.lettering import drawable, fit, text_width, undrawable, wrap, write
from PIL import Image, ImageDraw

NOWHERE = "\U0010fff0"  # for private use: no font has it


def draw(text, size=16):
    picture = Image.new("L", (400, 40), 0)
    write(ImageDraw.Draw(picture.convert("RGB")), (0, 0), text, size)
    rgb = Image.new("RGB", (400, 40))
    write(ImageDraw.Draw(rgb), (0, 0), text, size, fill=(255, 255, 255))
    return np.asarray(rgb.convert("L"))


@pytest.mark.parametrize("text", ["a red fox", "x" * 300, "\u0440\u044b\u0436\u0430\u044f \u043b\u0438\u0441\u0430"])
@pytest.mark.parametrize("width", [40, 90, 300])
def test_cut_and_wrapped_text_fits(text, width):
    assert text_width(fit(text, width, 14), 14) <= max(width, text_width(text[0] + "...", 14))
    lines = wrap(text, width, 14, 3)
    assert 1 <= len(lines) <= 3
    assert all(text_width(line, 14) <= max(width, text_width("m...", 14)) for line in lines)


def test_wrapping_loses_nothing_where_there_is_room():
    text = "a large red star in the center on a sky background"
    assert " ".join(wrap(text, 120, 12, 20)) == text
    assert "".join(wrap("\u4e2d" * 40, 120, 12, 20)) == "\u4e2d" * 40
    assert wrap("", 100, 12, 3) == []


def test_the_width_is_that_of_the_ink():
    columns = np.flatnonzero(draw("a red fox").max(0))
    assert abs(columns[-1] + 1 - text_width("a red fox", 16)) <= 2


def test_what_no_font_shows_becomes_a_question_mark_and_is_named():
    text = f"a {NOWHERE}\u00e9 {NOWHERE}"
    assert drawable(text) == "a ?\u00e9 ?"
    assert undrawable(text) == NOWHERE
    assert (draw(text) == draw("a ?\u00e9 ?")).all()


def test_a_font_of_the_machine_is_taken_for_what_pillows_own_lacks(monkeypatch):
    """Chinese is drawn where a font has it; where none has, as question marks: never as empty boxes."""
    text = "\u4e2d\u6587"
    shown = drawable(text)
    assert shown in (text, "??")
    assert draw(text).any()
    monkeypatch.setattr(lettering, "_FONTS", (lettering._OWN,))
    lettering._name_for.cache_clear()
    try:
        assert drawable(text) == "??"
        assert undrawable(text) == text
    finally:
        lettering._name_for.cache_clear()
