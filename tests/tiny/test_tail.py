"""The long-tailed world: its colours are measured apart, and what is judged was never shown."""

from collections import Counter

import numpy as np
import pytest
from ernie_pack.ernie_core.scoring.builtin import measure_picture
from ernie_pack.tiny import scenes as s
from ernie_pack.tiny import tail
from ernie_pack.tiny.measure import measure
from ernie_pack.tiny.tokenizer import build_tokenizer
from PIL import Image

ALL = s.all_scenes()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tail.write_tail_dataset(tmp_path_factory.mktemp("tail") / "data", seed=1)


def test_every_colour_has_every_role_once_in_three_seeds():
    found = {(color, role) for seed in range(3) for color, role in tail.roles(seed).items()}
    assert found == {(color, role) for color in tail.CATEGORIES for role in tail.ROLES}


def test_there_are_as_many_pictures_as_said_and_each_names_its_colour(written):
    counts = dict(zip(tail.ROLES, tail.COUNTS, strict=True))
    assert Counter(color for _, color in written) == {c: counts[role] for c, role in tail.roles(1).items()}
    for path, color in written:
        assert color in path.with_suffix(".txt").read_text()


def test_what_was_drawn_is_measured_and_scores_tell_good_from_bad(written):
    for path, color in written[::7]:
        picture = np.asarray(Image.open(path))
        bad = int(path.stem.split("-")[1]) % tail.BAD == tail.BAD - 1
        assert bad or measure(picture, colors=s.ALL_INKS).color == color, path
        assert (measure_picture(picture, "combined") < 30) == bad, path


def test_three_more_candidates_change_nothing_about_the_known_colours():
    rng = np.random.default_rng(0)
    for index in rng.integers(len(ALL), size=100):
        picture = s.draw(ALL[index], rng)
        assert measure(picture, colors=s.ALL_INKS) == measure(picture), ALL[index]


def test_no_prompt_joins_a_shape_and_place_that_a_picture_joins(written):
    shown = {(f["shape"], f["place"]) for path, _ in written if (f := s.facts(path.with_suffix(".txt").read_text()))}
    asked = tail.tail_prompts(16)
    assert set(asked) == set(tail.CATEGORIES)
    assert len({tuple((scene.shape, scene.place) for scene, _ in prompts) for prompts in asked.values()}) == 1
    for color, prompts in asked.items():
        for scene, text in prompts:
            assert scene.color == color
            assert color in text
            assert (scene.shape, scene.place) not in shown


def test_the_colours_are_in_no_table_and_no_vocabulary_of_the_base():
    assert not set(tail.CATEGORIES) & {word for values in s.VALUES.values() for word in values}
    assert not set(tail.CATEGORIES) & {scene.color for scene in ALL}
    assert not set(tail.CATEGORIES) & set(build_tokenizer().get_vocab())
