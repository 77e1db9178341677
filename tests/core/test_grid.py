"""Axes are read as written, cells are what they say, and sheets show each picture in its place."""

import itertools

import numpy as np
import pytest
from ernie_pack.ernie_core import grid
from ernie_pack.ernie_core.batch import Row
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.grid import AXES, Offers, describe, draw_sheets, make_cells, parse_axis

ROW = Row(label="", prompt="a red fox", negative="", seed=7, width=64, height=32, steps=4, cfg=4.0, shift=4.0)
OFFERS = Offers(
    loras=["style.safetensors", "people/anna.safetensors", "people/otto.safetensors", "anna.v2.safetensors"],
    checkpoints=["base.safetensors", "turbo.safetensors", "official/"],
    variants=3,
    has_enhancer=True,
)
NO_AXIS = parse_axis("none", "", OFFERS)


def axis(name, text):
    return parse_axis(name, text, OFFERS)


def rows(name, text, row=ROW):
    return [value.change(row) for value in axis(name, text).values]


@pytest.mark.parametrize(
    ("name", "text", "field", "values"),
    [
        ("seed", "1-4", "seed", [1, 2, 3, 4]),
        ("seed", "1-9:4, 30", "seed", [1, 5, 9, 30]),
        ("steps", "8,20\n", "steps", [8, 20]),
        ("cfg", "1, 2.5, 4", "cfg", [1.0, 2.5, 4.0]),
        ("cfg", "0-0.3:0.1", "cfg", [0.0, 0.1, 0.2, 0.3]),
        ("shift", "3\n4\n", "shift", [3.0, 4.0]),
        ("sampler", "euler, heun", "sampler", ["euler", "heun"]),
        ("enhancer", "off, ON", "enhance", [False, True]),
        ("checkpoint", "connected, turbo, official", "checkpoint", ["", "turbo.safetensors", "official/"]),
        ("model", "1, 3:with experts", "variant", [1, 3]),
        ("prompt part", "red, blue\t", "prompt", ["a red fox", "a blue fox"]),
        ("prompt part", "red fox\na fox, asleep", "prompt", ["a red fox", "a a fox, asleep"]),
    ],
)
def test_an_axis_changes_its_setting_and_nothing_else(name, text, field, values):
    found = rows(name, text)
    assert [getattr(row, field) for row in found] == values
    assert all(
        {k: v for k, v in row.__dict__.items() if k != field} == {k: v for k, v in ROW.__dict__.items() if k != field}
        for row in found
    )


def test_loras_have_strengths_ranges_and_company():
    found = [row.loras for row in rows("LoRA", "none, style:0.5, anna, people/otto:-1, style:0-1:0.5 + otto:2")]
    otto = ("people/otto.safetensors", 2.0)
    assert found == [
        (),
        (("style.safetensors", 0.5),),
        (("people/anna.safetensors", 1.0),),
        (("people/otto.safetensors", -1.0),),
        *(((("style.safetensors", s)), otto) for s in (0.0, 0.5, 1.0)),
    ]


def test_labels_say_what_differs():
    assert [v.label for v in axis("LoRA", "none, style:0.5 + otto").values] == ["no LoRA", "style 0.5 + otto 1"]
    assert [v.label for v in axis("model", "1, 2:with experts").values] == ["model 1", "with experts"]
    assert [v.label for v in axis("cfg", "1-2:0.5").values] == ["cfg 1", "cfg 1.5", "cfg 2"]
    assert [v.label for v in axis("seed", "18446744073709551615").values] == ["seed 18446744073709551615"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("colour", "1", "an axis is one of none, seed"),
        ("none", "1, 2", "values are given for an axis that is none"),
        ("seed", " ", "has no values; write 1-4"),
        ("seed", "a", "a whole number, or a range"),
        ("seed", "1.5", "a whole number"),
        ("seed", "5-1", "runs upwards"),
        ("seed", "1-5:0", "steps above 0"),
        ("seed", "0-99999999", "at most 10000"),
        ("seed", "1, 1-2", "the value 'seed 1' twice"),
        ("cfg", "nan", "a number, or a range"),
        ("LoRA", "stile:1", r"no LoRA 'stile' in models/loras; near it: style"),
        ("LoRA", "style:x", "the axis LoRA has the value 'x'"),
        ("sampler", "eulr", "each is one of euler, heun"),
        ("enhancer", "maybe", "each is off or on"),
        ("checkpoint", "nothing", "no model 'nothing'"),
        ("model", "4", "1 to 3"),
        ("model", "x", "the number of a connected model"),
        ("prompt part", "red", "only the text to replace"),
    ],
)
def test_bad_values_are_refused(name, text, reason):
    with pytest.raises(ErnieError, match=reason):
        axis(name, text)


def test_what_is_not_connected_is_said():
    with pytest.raises(ErnieError, match="no enhancer is connected"):
        parse_axis("enhancer", "on", Offers())
    with pytest.raises(ErnieError, match="1 to 1"):
        parse_axis("model", "2", Offers())


def cells(*axes):
    return make_cells(ROW, [*axes, *[NO_AXIS] * (3 - len(axes))])


def test_every_combination_has_one_cell():
    found = cells(axis("cfg", "1,2"), axis("seed", "1-3"), axis("steps", "4,5"))
    assert len(found) == 12
    assert {c.place: (c.row.cfg, c.row.seed, c.row.steps) for c in found} == {
        (x, y, z): ([1, 2][x], [1, 2, 3][y], [4, 5][z]) for x in range(2) for y in range(3) for z in range(2)
    }
    assert found[0].row.label == "cfg 1, seed 1, steps 4"


def test_two_lora_axes_stack_and_two_prompt_axes_both_act():
    found = {c.place[:2]: c.row for c in cells(axis("LoRA", "none, style:0.5"), axis("LoRA", "none, otto"))}
    assert [len(found[p].loras) for p in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 1, 1, 2]
    found = {c.place[:2]: c.row.prompt for c in cells(axis("prompt part", "red,blue"), axis("prompt part", "fox,cat"))}
    assert found[1, 1] == "a blue cat"


def test_cells_come_in_the_order_that_changes_models_least():
    found = cells(axis("seed", "1-3"), axis("LoRA", "none, style, otto"), axis("checkpoint", "connected, turbo"))
    for key, values in ((lambda c: c.row.checkpoint, 2), (lambda c: (c.row.checkpoint, c.row.loras), 6)):
        assert len(list(itertools.groupby(found, key))) == values


def test_a_grid_without_axes_is_one_picture():
    assert [c.row.hash for c in cells(NO_AXIS)] == [ROW.hash]


def test_grids_that_cannot_be_made_are_refused():
    with pytest.raises(ErnieError, match="two axes are seed"):
        cells(axis("seed", "1"), axis("seed", "2"))
    with pytest.raises(ErnieError, match="the grid has 1000000 cells"):
        cells(axis("seed", "1-1000"), axis("steps", "1-1000"))
    with pytest.raises(ErnieError, match="the cell steps 0: steps must be at least 1"):
        cells(axis("steps", "0"))
    with pytest.raises(ErnieError, match="which the prompt does not hold"):
        cells(axis("prompt part", "blue, green"))


def test_every_axis_has_a_hint_and_the_node_offers_them_all():
    from ernie_pack.nodes.grid import AXES as OFFERED

    assert tuple(AXES) == OFFERED
    for name in set(AXES) - {"none"}:
        with pytest.raises(ErnieError, match="has no values; write"):
            axis(name, "")


def test_the_head_tells_what_does_not_vary():
    assert describe(ROW, [axis("cfg", "1"), NO_AXIS, NO_AXIS]) == (
        "a red fox",
        "steps 4, shift 4, seed 7, 64 x 32",
    )


COLOURS = {(x, y, z): (40 + 60 * x, 50 + 70 * y, 90 * z) for x in range(3) for y in range(2) for z in range(2)}


def sheets(cell_px, labels=("1,2,3", "1,2"), size=(32, 64)):
    axes = [axis("cfg", labels[0]), axis("seed", labels[1]), axis("steps", "4,5")]
    read = lambda *place: np.full((*size, 3), COLOURS[place], np.uint8)  # noqa: E731
    return list(draw_sheets(axes, read, head=("a red fox", "seed 7"), cell_px=cell_px))


@pytest.mark.parametrize("cell_px", [0, 48, 200])
def test_each_picture_is_in_its_place(cell_px):
    made = sheets(cell_px)
    assert made[0].shape == made[1].shape
    for z, sheet in enumerate(made):
        spots = {}
        for x, y in itertools.product(range(3), range(2)):
            hit = np.argwhere((sheet == COLOURS[x, y, z]).all(-1))
            longest = max(np.ptp(hit, axis=0) + 1)
            assert longest == (cell_px or 64)
            spots[x, y] = hit.mean(0)
        assert spots[0, 0][0] == spots[2, 0][0] < spots[0, 1][0]
        assert spots[0, 0][1] == spots[0, 1][1] < spots[1, 0][1] < spots[2, 0][1]


def test_labels_stand_beside_the_pictures():
    """Changing a label changes ink above its column, or left of its row, and nothing in the pictures."""
    one, other = sheets(100)[0], sheets(100, labels=("1,2,9", "1,2"))[0]
    changed = np.argwhere((one != other).any(-1))
    picture = np.argwhere((one == COLOURS[2, 0, 0]).all(-1))
    assert len(changed)
    assert changed[:, 0].max() < picture[:, 0].min()
    assert picture[:, 1].min() <= changed[:, 1].min()
    assert changed[:, 1].max() <= picture[:, 1].max()
    one, other = sheets(100)[0], sheets(100, labels=("1,2,3", "1,8"))[0]
    changed = np.argwhere((one != other).any(-1))
    picture = np.argwhere((one == COLOURS[0, 1, 0]).all(-1))
    assert len(changed)
    assert changed[:, 1].max() < picture[:, 1].min()


def test_a_sheet_keeps_to_its_size(monkeypatch):
    monkeypatch.setattr(grid, "MAX_SHEET_PX", 1400)
    made = sheets(0, size=(900, 1800))
    assert max(made[0].shape) <= 1400


def test_long_and_foreign_labels_stay_inside():
    text = "red, " + "a very long replacement for one word " * 3 + ", \u4e2d\u6587\u6807\u7b7e"
    axes = [axis("prompt part", text), axis("prompt part", text), NO_AXIS]
    (sheet,) = draw_sheets(axes, lambda *_: np.zeros((60, 60, 3), np.uint8), head=("x " * 300,), cell_px=60)
    assert sheet.shape[1] < 800
    assert (sheet[:, -1] == 255).all()
