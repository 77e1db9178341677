"""The loop behind every scorer, its results, and choosing by them."""

import math

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.ernie_core.scoring.scorer import (
    Scorer,
    Scores,
    choose,
    iter_rgb,
    make_scores,
    score_stream,
    to_rgb,
)
from PIL import Image


def stream(images, prompts=None, *, reads_prompt=False, batch_size=2, batches=None, on_scored=None, run=None):
    def brightness(made, texts):
        if batches is not None:
            batches.append((len(made), list(texts)))
        return [float(m) for m in made]

    return score_stream(
        images,
        prompts,
        prepare=lambda rgb: rgb.mean(),
        run=run or brightness,
        reads_prompt=reads_prompt,
        name="brightness",
        batch_size=batch_size,
        on_scored=on_scored,
    )


def grey(value, size=(4, 6)):
    return np.full((*size, 3), value, dtype=np.uint8)


def test_one_number_per_picture_in_order_batched():
    batches, counts = [], []
    assert stream([grey(v) for v in (10, 20, 30)], "x", batches=batches, on_scored=counts.append) == [10, 20, 30]
    assert batches == [(2, ["x", "x"]), (1, ["x"])]
    assert counts == [2, 3]


def test_pictures_are_taken_one_at_a_time_and_dropped():
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def pictures():
        nonlocal alive, most
        for v in range(50):
            alive += 1
            most = max(most, alive)
            yield grey(v).view(Counted)

    assert len(stream(pictures(), batch_size=8)) == 50
    assert most <= 3


def test_an_interrupt_ends_the_call_between_batches():
    def stop(done):
        raise InterruptedError

    taken = []
    with pytest.raises(InterruptedError):
        stream((taken.append(v) or grey(v) for v in range(10)), batch_size=3, on_scored=stop)
    assert len(taken) == 3


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (torch.full((2, 2, 3), 0.5), 128),
        (torch.full((2, 2, 1), 1.0), 255),
        (torch.tensor([0.0, 0.0, 0.0, 0.0]).expand(2, 2, 4), 255),  # transparent: white shows
        (torch.full((2, 2, 3), 7.0), 255),
        (Image.new("L", (3, 2), 9), 9),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 128)), 127),
    ],
)
def test_every_form_of_picture_becomes_rgb(picture, expected):
    rgb = to_rgb(picture)
    assert (rgb.dtype, rgb.shape[-1]) == (np.uint8, 3)
    assert int(rgb[0, 0, 0]) == expected


def test_numbers_read_back_from_a_file_are_the_same(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    as_tensor = torch.from_numpy(picture.astype(np.float32) / 255)
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), as_tensor, Image.fromarray(picture)):
        assert np.array_equal(to_rgb(form), picture)
    assert len(list(iter_rgb(as_tensor))) == 1
    assert len(list(iter_rgb(torch.stack([as_tensor] * 3)))) == 3


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.full((2, 2, 3), math.nan), "picture 1 holds NaN"),
        (np.zeros((2, 2, 3)), "uint8"),
        (np.zeros((2, 3), dtype=np.uint8), "height, width, 3"),
        (np.zeros((2, 2, 2), dtype=np.uint8), "height, width, 3"),
        (np.zeros((0, 2, 3), dtype=np.uint8), "height, width, 3"),
        (17, "got int"),
    ],
)
def test_a_picture_that_cannot_be_used_says_which_and_why(picture, message):
    with pytest.raises(ErnieError, match=message):
        stream([picture])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "no prompt came"),
        (["a"], "picture 2 has no prompt"),
        (["a", " "], "picture 2 has an empty one"),
        (["a", "b", "c"], "more prompts than pictures"),
    ],
)
def test_prompts_must_fit_the_pictures(prompts, message):
    with pytest.raises(ErnieError, match=message):
        stream([grey(1), grey(2)], prompts, reads_prompt=True)


def test_a_number_that_is_none_is_an_error_with_its_picture():
    with pytest.raises(ErnieError, match="nan for picture 2"):
        stream([grey(1), grey(2)], run=lambda made, texts: [1.0, math.nan])
    with pytest.raises(ErnieError, match="batch_size"):
        stream([], batch_size=0)


def test_no_pictures_no_numbers():
    assert stream([]) == []


# --- Scores ----------------------------------------------------------------------------------------------------------


def scores(values, **columns):
    count = len(values)
    base = {
        "labels": tuple(f"p{i}" for i in range(count)),
        "prompts": ("",) * count,
        "categories": ("",) * count,
    }
    return Scores(scorer="s", values=tuple(values), **(base | columns))


def test_order_is_best_first_and_stable():
    assert scores([1, 3, 3, 2]).order() == [1, 2, 3, 0]
    assert scores([1, 3, 3, 2], higher_is_better=False).order() == [0, 3, 1, 2]


def test_json_and_csv_hold_everything():
    import csv
    import io

    made = scores([0.25, 2.0], prompts=('say "hi", now', "zwei\nZeilen"), categories=("a", "b"), files=("x.png", ""))
    assert Scores.from_json(made.to_json()) == made
    rows = list(csv.DictReader(io.StringIO(made.to_csv(), newline="")))
    assert [row["rank"] for row in rows] == ["2", "1"]
    assert [row["prompt"] for row in rows] == list(made.prompts)
    with pytest.raises(ErnieError, match="not a file of scores"):
        Scores.from_json("[1]")
    with pytest.raises(ErnieError, match="not a file of scores"):
        Scores.from_json("{")


def test_columns_must_be_as_long_as_the_scores():
    with pytest.raises(ErnieError, match="labels must have one entry per score"):
        scores([1.0], labels=())


def test_scores_join_and_part():
    made = scores([1.0, 2.0, 3.0], prompts=("b", "a", "b"))
    assert {k: v.values for k, v in made.by("prompts").items()} == {"b": (1.0, 3.0), "a": (2.0,)}
    assert made.chosen([0]).joined(made.chosen([1, 2])) == made
    with pytest.raises(ErnieError, match="one scorer"):
        made.joined(Scores(scorer="other", values=(), labels=(), prompts=(), categories=()))


def test_make_scores_fills_in_what_is_not_given():
    scorer = BuiltinScorer()
    assert isinstance(scorer, Scorer)
    made = make_scores(scorer, [1.0, 2.0], prompts="fox")
    assert (made.labels, made.prompts) == (("image 1", "image 2"), ("fox", "fox"))
    assert (made.low, made.high, made.files) == (0.0, 100.0, ("", ""))


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"threshold": 3}, [1, 3, 4]),
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_share": 0.4}, [1, 4]),
        ({"top_share": 0.41}, [1, 3, 4]),
        ({"top_share": 0.001}, [1]),
        ({"top_k": 1, "per_prompt": True}, [1, 4]),
        ({"top_k": 3, "threshold": 4.5}, [1, 4]),
        ({"threshold": 99}, []),
    ],
)
def test_choosing(rules, kept):
    made = scores([1, 6, 2, 3, 5], prompts=("a", "a", "b", "b", "b"))
    assert choose(made, **rules) == kept


def test_choosing_where_lower_is_better():
    made = scores([1, 6, 2], higher_is_better=False)
    assert choose(made, top_k=1) == [0]
    assert choose(made, threshold=2) == [0, 2]


@pytest.mark.parametrize(
    "rules", [{"top_k": 0}, {"top_share": 0.0}, {"top_share": 1.5}, {"threshold": math.nan}, {"top_share": math.nan}]
)
def test_rules_out_of_range(rules):
    with pytest.raises(ErnieError):
        choose(scores([1.0]), **rules)
