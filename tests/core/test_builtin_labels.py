"""Labels without a model, on pictures whose look is known."""

import numpy as np
import pytest
from ernie_pack.ernie_core.curation.builtin_labels import COLOURS, BuiltinCategoriser, measure_look, to_lab
from ernie_pack.tiny.scenes import Scene, draw
from PIL import Image


def textured(colour, size=(160, 100), *, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 25, (size[1], size[0], 1))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in COLOURS.items() for v in values])
def test_a_flat_picture_is_blank_and_has_its_colours_name(name, value):
    look = measure_look(Image.new("RGB", (64, 64), value))
    assert (look.kind, look.colour, look.second_colour, look.format) == ("blank", name, "", "square")


def test_texture_tells_photographs_from_drawings():
    assert measure_look(textured((60, 120, 60))).kind == "photo"
    scene = Scene(shape="star", color="red", size="large", place="center", background="sky", style="plain")
    look = measure_look(Image.fromarray(draw(scene, np.random.default_rng(0))))
    assert look.kind == "graphic"
    assert (
        BuiltinCategoriser()
        .assign([Image.fromarray(draw(scene, np.random.default_rng(0)))])[0]
        .category.startswith("graphic/")
    )


def test_two_colours_of_one_lightness_are_no_blank_picture():
    picture = np.full((64, 64, 3), (155, 155, 158), np.uint8)
    picture[20:44, 20:44] = (255, 128, 20)
    look = measure_look(Image.fromarray(picture))
    assert (look.kind, look.colour, look.second_colour) == ("graphic", "grey", "orange")


@pytest.mark.parametrize(
    ("background", "colour"), [("navy", "blue"), ("sky", "blue"), ("beige", "beige"), ("grey", "grey")]
)
def test_backgrounds_of_drawn_scenes_have_their_names(background, colour):
    scene = Scene(shape="star", color="black", size="small", place="center", background=background)
    assert measure_look(Image.fromarray(draw(scene, np.random.default_rng(0)))).colour == colour


def test_light_and_format_follow_the_picture():
    assert measure_look(textured((30, 30, 30))).light == "dark"
    assert measure_look(textured((225, 225, 225), size=(80, 120))).light == "bright"
    assert measure_look(textured((128, 128, 128), size=(80, 120))).format == "tall"
    assert measure_look(textured((128, 128, 128), size=(120, 80))).format == "wide"


def test_no_main_colour_is_colourful_and_two_colours_are_both_named():
    thirds = np.zeros((60, 90, 3), np.uint8)
    for i, name in enumerate(("red", "green", "blue")):
        thirds[:, 30 * i : 30 * i + 30] = COLOURS[name][0]
    assert measure_look(Image.fromarray(thirds)).colour == "colourful"
    halves = np.full((60, 90, 3), COLOURS["yellow"][0], np.uint8)
    halves[:, 60:] = COLOURS["purple"][0]
    found = BuiltinCategoriser().assign([Image.fromarray(halves)])[0]
    assert (found.category, found.runner_up) == ("graphic/yellow", "graphic/purple")
    assert found.confidence == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (5000, 3)])
def test_any_size_is_measured(size):
    assert measure_look(Image.new("RGB", size, (200, 10, 10))).colour == "red"


def test_lab_has_the_published_values():
    assert np.allclose(to_lab(np.array([[255, 255, 255], [0, 0, 0]])), [[100, 0, 0], [0, 0, 0]], atol=0.05)
    assert np.allclose(to_lab(np.array([[255, 0, 0]])), [[53.24, 80.09, 67.20]], atol=0.05)  # Lindbloom's calculator
