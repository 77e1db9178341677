"""Preference pairs out of values, the files they are written to, and what pictures say of their making."""

import json
from pathlib import Path

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.pairs import (
    Preference,
    Valued,
    keep_judged,
    make_pairs,
    prefer,
    read_prompt,
    read_settings,
    write_pairs,
)
from ernie_pack.ernie_core.training.dataset import DatasetOptions
from ernie_pack.ernie_core.training.pairs import read_pairs
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_data import draw, write_pictures


def values(*numbers, prompt="a cat"):
    return [Valued(path=Path(f"/{prompt}/{n}.png"), value=n, prompt=prompt) for n in numbers]


def shown(pairs):
    return [(p.chosen.value, p.rejected.value) for p in pairs]


@pytest.fixture
def pictures(tmp_path):
    """Six files of two prompts, worth 0 to 5."""
    folder = write_pictures(tmp_path / "in", count=6, captions=False)
    files = sorted(folder.glob("*.png"))
    return [Valued(path=f, value=i, prompt="a cat" if i < 4 else "a dog") for i, f in enumerate(files)]


def test_the_best_meets_the_worst_and_nobody_twice():
    assert shown(prefer(values(3, 1, 5, 2))) == [(5, 1), (3, 2)]
    assert shown(prefer(values(3, 1, 5, 2), max_per_prompt=1)) == [(5, 1)]
    assert shown(prefer(values(1, 2, 3))) == [(3, 1)]


def test_every_pair_comes_with_the_widest_gap_first():
    found = prefer(values(1, 2, 4), "every pair")
    assert shown(found) == [(4, 1), (4, 2), (2, 1)]
    assert [p.margin for p in found] == [3, 2, 1]


def test_a_gap_is_the_least_difference_and_equals_are_no_pair():
    assert shown(prefer(values(1, 2, 4), "every pair", min_gap=2)) == [(4, 1), (4, 2)]
    assert prefer(values(1, 1, 1), "every pair") == []


def test_prompts_never_mix():
    found = prefer([*values(1, 2), *values(0, 9, prompt="a dog")], "every pair")
    assert {(p.chosen.prompt, p.rejected.prompt) for p in found} == {("a cat", "a cat"), ("a dog", "a dog")}
    assert prefer([*values(1), *values(2, prompt="a dog")]) == []


def test_judged_pairs_are_kept_unless_all_judgments_say_the_contrary():
    a, b, c = values(1, 2, 3)
    (dog,) = values(9, prompt="a dog")
    judged = [Preference(chosen=c, rejected=a), Preference(chosen=a, rejected=b), Preference(chosen=dog, rejected=a)]
    assert keep_judged(judged) == [Preference(chosen=c, rejected=a)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"how": "some"}, "one of best against worst, every pair; got 'some'"),
        ({"min_gap": -1}, "min_gap must be 0 or more, got -1"),
        ({"min_gap": float("nan")}, "min_gap must be 0 or more, got nan"),
        ({"max_per_prompt": 0}, "max_per_prompt must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ErnieError, match=message):
        prefer(values(1, 2), **changes)


def test_pairs_can_be_trained_on(pictures):
    pairs = make_pairs(prefer(pictures))
    assert len(pairs) == 3
    assert {pair.captions[0].text for pair in pairs.pairs} == {"a cat", "a dog"}
    first = pairs.pairs[0]
    assert (first.chosen.image, first.rejected.image) == (pictures[3].path, pictures[0].path)
    assert first.margin == 3
    assert first.chosen.sha256
    assert first.chosen.width == 64


def test_no_pair_says_why():
    with pytest.raises(ErnieError, match=r"the ranking gives no pair: no two pictures of one prompt differ enough"):
        make_pairs([])


def test_a_picture_that_is_gone_is_listed(pictures):
    pictures[0].path.unlink()
    pairs = make_pairs(prefer(pictures))
    assert len(pairs) == 2
    assert "00.png" in pairs.report()


def test_pictures_without_prompt_need_a_word_about_it(pictures):
    bare = [Valued(path=p.path, value=p.value) for p in pictures]
    with pytest.raises(ErnieError, match="have no caption"):
        make_pairs(prefer(bare))
    pairs = make_pairs(prefer(bare), DatasetOptions(missing_caption="empty"))
    assert "the empty prompt" in pairs.report()


def test_what_is_written_is_read_back_by_the_trainer(pictures, tmp_path):
    pairs = make_pairs(prefer(pictures))
    table = write_pairs(pairs, tmp_path / "out")
    by_table, by_folder = read_pairs(table), read_pairs(tmp_path / "out")
    for read in (by_table, by_folder):
        assert not read.problems
        assert [p.chosen.sha256 for p in read.pairs] == [p.chosen.sha256 for p in pairs.pairs]
        assert [p.rejected.sha256 for p in read.pairs] == [p.rejected.sha256 for p in pairs.pairs]
        assert [p.captions for p in read.pairs] == [p.captions for p in pairs.pairs]
    assert [p.margin for p in by_table.pairs] == [p.margin for p in pairs.pairs]
    assert (tmp_path / "out" / "chosen" / "00001.txt").read_text() == "a cat\n"
    assert json.loads(table.read_text().splitlines()[0])["chosen"] == "chosen/00001.png"


def test_fewer_pairs_leave_nothing_old_behind(pictures, tmp_path):
    write_pairs(make_pairs(prefer(pictures)), tmp_path / "out")
    write_pairs(make_pairs(prefer(pictures, max_per_prompt=1)), tmp_path / "out")
    assert len(read_pairs(tmp_path / "out")) == 2
    assert len(list((tmp_path / "out" / "rejected").iterdir())) == 2


def test_somebody_elses_pictures_are_not_touched(pictures, tmp_path):
    (tmp_path / "out" / "chosen").mkdir(parents=True)
    draw(9).save(tmp_path / "out" / "chosen" / "mine.png")
    with pytest.raises(ErnieError, match=r"holds pictures that no pairs\.jsonl lists"):
        write_pairs(make_pairs(prefer(pictures)), tmp_path / "out")


def test_a_table_alone_names_the_pictures_where_they_are(pictures, tmp_path):
    table = write_pairs(make_pairs(prefer(pictures)), tmp_path / "elsewhere", copy=False)
    assert not (tmp_path / "elsewhere" / "chosen").exists()
    assert len(read_pairs(table)) == 3


# --- metadata -------------------------------------------------------------------------------------------------

GRAPH = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": ["7", 0], "clip": ["9", 0]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["9", 0]}},
    "3": {
        "class_type": "KSampler",
        "inputs": {
            **{"seed": ["8", 0], "steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"},
            **{"positive": ["5", 0], "negative": ["2", 0], "model": ["9", 0], "denoise": 1.0},
        },
    },
    "5": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["1", 0]}},
    "7": {"class_type": "PrimitiveString", "inputs": {"value": "a red star"}},
    "8": {"class_type": "PrimitiveInt", "inputs": {"value": 42}},
    "9": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
}
A1111 = (
    "a red star\nvery red\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x640"
)


def save(path, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    return path


def test_settings_of_a_graph_are_found_through_its_links(tmp_path):
    found = read_settings(save(tmp_path / "a.png", prompt=json.dumps(GRAPH)))
    expected = {"prompt": "a red star", "negative": "blurry", "seed": 42, "steps": 20, "cfg": 4.0}
    assert found == expected | {"sampler": "euler", "scheduler": "simple", "denoise": 1.0, "model": "x"}


def test_settings_of_our_batches_and_of_a1111(tmp_path):
    ours = save(tmp_path / "a.png", prompt="a red star", negative="", seed="42", steps="50", cfg="4.0", shift="4.0")
    assert read_settings(ours) == {"prompt": "a red star", "seed": 42, "steps": 50, "cfg": 4.0, "shift": 4.0}
    theirs = read_settings(save(tmp_path / "b.png", parameters=A1111))
    assert theirs["prompt"] == "a red star\nvery red"
    assert (theirs["negative"], theirs["seed"], theirs["cfg"], theirs["width"]) == ("blurry", 42, 7, 512)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"1": 5}', '{"1": {"inputs": {"seed": ["1", 0], "positive": ["1", 0], "model": ["1", 0]}}}'],
)
def test_strange_metadata_is_no_error(tmp_path, text):
    assert isinstance(read_settings(save(tmp_path / "a.png", prompt=text)), dict)
    assert read_settings(tmp_path / "none.png") == {}
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert read_settings(tmp_path / "b.png") == {}


def test_the_prompt_is_beside_the_picture_or_inside(tmp_path):
    picture = save(tmp_path / "a.png", prompt=json.dumps(GRAPH))
    assert read_prompt(picture) == "a red star"
    (tmp_path / "a.txt").write_text("a blue star\n")
    assert read_prompt(picture) == "a blue star"


def test_seeds_travel_with_the_pairs(tmp_path):
    files = [save(tmp_path / f"{i}.png", prompt="a star", seed=str(i), steps="8") for i in range(2)]
    draw(1).save(files[1], pnginfo=None)
    pairs = make_pairs(prefer([Valued(path=f, value=i, prompt="a star") for i, f in enumerate(files)]))
    row = json.loads(write_pairs(pairs, tmp_path / "out").read_text())
    assert row["info"] == {"rejected": {"prompt": "a star", "seed": 0, "steps": 8}}
    assert not read_pairs(tmp_path / "out" / "pairs.jsonl").problems
