"""The novel shape is told from the six known ones without disturbing them, and its pictures are what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from ernie_pack.tiny import scenes as s
from ernie_pack.tiny.measure import matches, measure
from ernie_pack.tiny.novel import CONCEPTS, SHAPES_AND_NOVEL, concept_prompts, concept_scenes, write_concept_dataset
from ernie_pack.tiny.preference import NAMED, USUAL_PX, follows, is_preferred, open_prompts
from ernie_pack.tiny.tokenizer import build_tokenizer
from PIL import Image, ImageFilter

ALL = s.all_scenes()


def spoilt(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred and noisy, as a network paints."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)), dtype=np.float64)
    return np.clip((soft + rng.normal(0, 8, soft.shape)) / 255, 0, 1)


def test_the_novel_shape_is_in_no_table_that_training_draws_from():
    assert s.NOVEL_SHAPE not in {word for values in s.VALUES.values() for word in values}
    assert all(scene.shape != s.NOVEL_SHAPE for scene in ALL)
    assert s.NOVEL_SHAPE not in build_tokenizer().get_vocab()
    assert "shape" not in s.facts(f"a red {s.NOVEL_SHAPE}")


@pytest.mark.parametrize("spoil", [lambda picture, _: picture, spoilt], ids=["clean", "blurred and noisy"])
def test_a_seventh_candidate_changes_nothing_about_the_six(spoil):
    rng = np.random.default_rng(0)
    for index in rng.integers(len(ALL), size=300):
        picture = spoil(s.draw(ALL[index], rng), rng)
        assert measure(picture, shapes=SHAPES_AND_NOVEL) == measure(picture), ALL[index]


@pytest.mark.parametrize("spoil", [lambda picture, _: picture, spoilt], ids=["clean", "blurred and noisy"])
def test_drawn_novel_scenes_measure_right(spoil):
    rng = np.random.default_rng(0)
    right: Counter[str] = Counter()
    for index in rng.integers(len(ALL), size=200):
        scene = replace(ALL[index], shape=s.NOVEL_SHAPE)
        picture = spoil(s.draw(scene, rng), rng)
        right.update({k: int(v) for k, v in matches(scene, measure(picture, shapes=SHAPES_AND_NOVEL)).items()})
        assert measure(picture).shape != s.NOVEL_SHAPE
    assert min(right[fact] for fact in s.FACTS) >= 0.97 * 200, right


@pytest.mark.parametrize("concept", CONCEPTS)
def test_concept_scenes_are_different_drawable_and_even(concept):
    scenes = concept_scenes(20, concept=concept)
    assert len(set(scenes)) == 20
    assert scenes == concept_scenes(20, concept=concept) != concept_scenes(20, seed=1, concept=concept)
    assert all(s.is_drawable(scene.color, scene.background, scene.style) for scene in scenes)
    assert {scene.size for scene in scenes} == {"large"}
    for fact, values in (("shape", s.SHAPES), ("color", s.COLORS), ("place", s.PLACES), ("background", s.BACKGROUNDS)):
        wanted = {concept} if CONCEPTS[concept] == fact else set(values)
        assert {getattr(scene, fact) for scene in scenes} == wanted


@pytest.mark.parametrize(("concept", "other"), [(s.NOVEL_SHAPE, "color"), (s.NOVEL_COLOR, "shape")])
def test_held_out_prompts_are_not_close_to_the_pictures(concept, other):
    training = concept_scenes(20, concept=concept)
    prompts = concept_prompts(50, training=training, concept=concept)
    assert len({scene for scene, _ in prompts}) == 50
    seen = {(getattr(scene, other), scene.place) for scene in training}
    for scene, text in prompts:
        assert (getattr(scene, other), scene.place) not in seen
        assert concept in text.split() or f"{concept}," in text
        assert s.facts(text) == {k: v for k, v in s.named_facts(scene).items() if v != concept}


def test_the_novel_colour_is_in_no_table_that_training_draws_from():
    assert s.NOVEL_COLOR not in {word for values in s.VALUES.values() for word in values}
    assert s.NOVEL_COLOR not in build_tokenizer().get_vocab()
    assert "color" not in s.facts(f"a {s.NOVEL_COLOR} star")


@pytest.mark.parametrize("spoil", [lambda picture, _: picture, spoilt], ids=["clean", "blurred and noisy"])
def test_the_novel_colour_is_told_from_the_eight_without_disturbing_them(spoil):
    rng = np.random.default_rng(0)
    for index in rng.integers(len(ALL), size=200):
        picture = spoil(s.draw(ALL[index], rng), rng)
        assert measure(picture, colors=s.INKS) == measure(picture), ALL[index]
    for scene in concept_scenes(40, concept=s.NOVEL_COLOR):
        picture = spoil(s.draw(scene, rng), rng)
        assert measure(picture, colors=s.INKS).color == s.NOVEL_COLOR
        assert measure(picture).color != s.NOVEL_COLOR


def test_the_dataset_on_disk_is_what_it_says(tmp_path):
    scenes = write_concept_dataset(tmp_path / "a", 6)
    write_concept_dataset(tmp_path / "b", 6)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        f"{i:02}.{e}" for i in range(6) for e in ("png", "txt")
    ]
    for i, scene in enumerate(scenes):
        path = tmp_path / "a" / f"{i:02}.png"
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert all(matches(scene, measure(np.asarray(Image.open(path)), shapes=SHAPES_AND_NOVEL)).values())
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        assert s.facts(caption) == {k: v for k, v in s.named_facts(scene).items() if k != "shape"}


def test_open_prompts_name_everything_but_the_size():
    heldout = set(s.split()[1])
    for held in (True, False):
        prompts = open_prompts(60, heldout=held)
        assert prompts == open_prompts(60, heldout=held)
        assert len({text for _, text in prompts}) == 60
        for scene, text in prompts:
            assert (scene in heldout) == held
            assert s.facts(text) == {k: v for k, v in s.named_facts(scene).items() if k != "size"}


def test_the_property_is_the_drawn_diameter():
    rng = np.random.default_rng(0)
    for scene in ALL[::300]:
        measured = measure(s.draw(scene, rng))
        assert measured.diameter is not None
        if scene.shape in ("circle", "ring"):  # thin points of the others end below half coverage
            nominal = s.SIZES[scene.size]
            assert abs(measured.diameter - nominal) < s.JITTER_SIZE * nominal + 2 / 128, scene
        assert is_preferred(scene, measured) == (128 * measured.diameter < USUAL_PX[scene.shape])
        assert is_preferred(scene, measured) == (scene.size == "small") or scene.size == "large"
        assert follows(scene, measured)
        assert not follows(replace(scene, place="top" if scene.place != "top" else "left"), measured)
    nothing = measure(np.full((128, 128, 3), 200, np.uint8))
    assert not is_preferred(ALL[0], nothing)
    assert nothing.diameter is None
    assert set(NAMED) < set(s.FACTS)
