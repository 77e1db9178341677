"""Laws of the drawn scenes: deterministic, split without leaks, and every wording tells its facts back."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from ernie_pack.tiny import scenes as s

ALL = s.all_scenes()


def triple(scene: s.Scene) -> tuple[str, str, str]:
    return scene.shape, scene.color, scene.place


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("size_px", [32, 128, 200])
def test_a_seed_always_draws_the_same_picture(size_px):
    for scene in ALL[::1000]:
        first, second = (s.draw(scene, np.random.default_rng(7), size_px) for _ in range(2))
        assert first.dtype == np.uint8
        assert first.shape == (size_px, size_px, 3)
        assert np.array_equal(first, second)


def test_different_scenes_look_different():
    pictures = {s.draw(scene, np.random.default_rng(1), 64).tobytes() for scene in ALL[::20]}
    assert len(pictures) == len(ALL[::20])


def test_all_scenes_are_different_and_drawable():
    assert len(set(ALL)) == len(ALL)
    assert all(s.is_drawable(scene.color, scene.background, scene.style) for scene in ALL)
    assert not s.is_drawable("black", "navy")


def test_objects_stay_clear_of_the_border(rng):
    for scene in ALL[::50]:
        plain = s.draw(s.Scene(**{**s.named_facts(scene), "style": "plain"}), rng).astype(int)
        border = np.concatenate([plain[0], plain[-1], plain[:, 0], plain[:, -1]])
        assert (border == border[0]).all(), scene


def test_split_is_disjoint_in_triples_and_complete():
    train, heldout = s.split()
    assert not {triple(scene) for scene in train} & {triple(scene) for scene in heldout}
    assert set(train) | set(heldout) == set(ALL)
    assert len({triple(scene) for scene in heldout}) == s.HELD_OUT_TRIPLES


def test_training_still_shows_every_pair():
    seen = {pair for scene in s.split()[0] for pair in itertools.combinations(triple(scene), 2)}
    every = {pair for scene in ALL for pair in itertools.combinations(triple(scene), 2)}
    assert seen == every


def test_holdout_seed_chooses_the_split():
    assert s.split(1)[1] == s.split(1)[1]
    assert s.split(1)[1] != s.split(2)[1]


def test_heldout_prompts_are_fixed_and_describe_heldout_scenes():
    prompts = s.heldout_prompts(200)
    heldout = set(s.split()[1])
    assert prompts == s.heldout_prompts(200)
    assert len({scene for scene, _ in prompts}) == 200
    for scene, text in prompts:
        assert scene in heldout
        assert s.facts(text) == s.named_facts(scene), text


def test_captions_name_exactly_the_facts(rng):
    wordings = Counter()
    for scene in ALL:
        text = s.caption(scene, rng)
        assert s.facts(text) == s.named_facts(scene), text
        assert s.facts(s.canonical_caption(scene)) == s.named_facts(scene)
        wordings[text.split()[0]] += 1
    assert len(wordings) >= 8


def test_captions_use_the_right_article(rng):
    for scene in ALL[::7]:
        for text in (s.caption(scene, rng), s.short_prompt(scene, rng)):
            assert " a orange" not in f" {text}", text
            assert " an orange" not in f" {text}" or scene.color == "orange", text


def test_short_prompts_name_colour_shape_and_what_is_kept(rng):
    optional = ("size", "place", "background")
    for scene in ALL[::101]:
        for count in range(4):
            for keep in itertools.combinations(optional, count):
                named = s.facts(s.short_prompt(scene, rng, keep))
                assert set(named) == {"shape", "color", *keep}
                assert named.items() <= s.named_facts(scene).items()


def test_long_descriptions_keep_given_facts_and_fill_the_rest(rng):
    for scene in ALL[::5]:
        given = s.facts(s.short_prompt(scene, rng))
        text = s.long_description(given, rng)
        named = s.facts(text)
        assert given.items() <= named.items(), text
        assert set(s.FACTS) - set(named) <= {"style"}, text
        assert s.is_drawable(named["color"], named["background"], named.get("style", "plain")), text
        assert 35 <= len(text.split()) <= 70, text
        full = s.Scene(**named)
        assert text.lower().startswith(s.canonical_caption(full) + ".")


def test_long_description_of_all_facts_changes_none(rng):
    for scene in ALL[::11]:
        assert s.facts(s.long_description(s.named_facts(scene), rng)) == s.named_facts(scene)


def test_facts_ignores_what_is_named_twice_differently():
    assert s.facts("a red circle and a blue circle at the TOP  left") == {
        "shape": "circle",
        "place": "top left",
    }
    assert s.facts("nothing known, a starfish") == {}


def test_wrong_words_are_refused(rng):
    with pytest.raises(ValueError, match=r"color must be one of red, .*black, got 'teal'"):
        s.Scene(shape="star", color="teal", size="small", place="top", background="grey")
    with pytest.raises(ValueError, match=r"keep must hold names of shape, .*, got colour"):
        s.short_prompt(ALL[0], rng, ["colour"])
