"""Sizes that crop almost nothing, and batches that are a function of seed and step."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.buckets import (
    BatchPlan,
    Picture,
    Stage,
    bucket_size,
    curriculum,
    fit_into,
    place_pictures,
)
from ernie_pack.ernie_core.training.items import DatasetOptions, Item
from ernie_pack.ernie_core.training.pairs import Pair

OPTIONS = DatasetOptions(max_upscale=2.0)


def item(i, width=64, height=64, **more):
    return Item(image=Path(f"{i}.png"), width=width, height=height, sha256=str(i), **more)


def mixed(count=23):
    """Three sizes, repeats 1 to 3."""
    sizes = [(64, 64), (96, 64), (64, 96)]
    return [item(i, *sizes[i % 3], repeats=1 + i % 3 if i < 9 else 1) for i in range(count)]


def plan(entries=None, **options):
    defaults = {"stages": (Stage(resolutions=(64,)),), "batch_size": 2, "seed": 5}
    return BatchPlan(entries or mixed(), OPTIONS, **(defaults | options))


# --- sizes ---


@pytest.mark.parametrize("area", [256**2, 512**2, 768**2, 1024**2])
def test_a_size_keeps_every_rule_and_wastes_little(area):
    generator = random.Random(0)
    for _ in range(300):
        width, height = generator.randint(40, 6000), generator.randint(40, 6000)
        w, h = bucket_size(width, height, area, max_upscale=1.3)
        fit = fit_into(width, height, (w, h))
        assert w % 16 == h % 16 == 0
        assert w * h <= area
        assert 1 / 3 <= w / h <= 3
        assert fit.scale <= 1.3 + 1e-9
        if 1 / 3 <= width / height <= 3 and min(width, height) * 1.3 >= 160:
            assert fit.crop_loss < 0.065
            limit = min(area, width * height * 1.69)
            assert w * h > 0.84 * limit


@pytest.mark.parametrize(
    ("source", "resolution", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((3000, 3000), 512, (512, 512)),
        ((1920, 1080), 1024, (1360, 768)),
        ((800, 600), 1024, (1024, 768)),  # 1.28 times, within the limit of 1.3
        ((500, 500), 1024, (640, 640)),  # 1.3 times is 650
        ((100, 5000), 1024, (128, 384)),  # 1:3, and 1.3 times the crop of 100 x 300
        ((16, 16), 1024, (16, 16)),
    ],
)
def test_sizes_of_known_pictures(source, resolution, expected):
    assert bucket_size(*source, resolution**2, max_upscale=1.3) == expected


def test_turning_a_picture_turns_its_size():
    generator = random.Random(1)
    for _ in range(200):
        width, height = generator.randint(100, 4000), generator.randint(100, 4000)
        turned = bucket_size(height, width, 768**2, max_upscale=1.5)
        assert bucket_size(width, height, 768**2, max_upscale=1.5) == turned[::-1]


def test_a_crop_is_central_inside_and_of_the_right_aspect():
    fit = fit_into(300, 100, (64, 64))
    assert fit.box == (100.0, 0.0, 200.0, 100.0)
    assert fit.scale == 0.64
    assert fit.crop_loss == pytest.approx(2 / 3)
    assert fit_into(640, 320, (64, 32)).crop_loss == 0
    generator = random.Random(2)
    for _ in range(200):
        width, height = generator.randint(16, 5000), generator.randint(16, 5000)
        size = (16 * generator.randint(1, 99), 16 * generator.randint(1, 99))
        left, top, right, bottom = fit_into(width, height, size).box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])
        assert math.isclose(left + right, width)
        assert math.isclose(top + bottom, height)


def test_boxes_follow_the_crop():
    boxes = ((0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.3, 1.0), (0.5, 0.25, 1.0, 0.5))
    picture = Picture(item=item(0, 300, 100, boxes=boxes), fit=fit_into(300, 100, (64, 64)))
    assert picture.boxes() == ((0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 1.0, 0.5))


def test_a_pair_shares_one_size_and_neither_is_enlarged_too_much():
    for a, b in (((640, 480), (64, 48)), ((400, 200), (200, 400)), ((64, 64), (900, 300))):
        chosen, rejected = place_pictures(
            Pair(chosen=item(0, *a), rejected=item(1, *b)), 512, DatasetOptions(max_upscale=1.3)
        )
        assert chosen.fit[:2] == rejected.fit[:2]
        assert max(chosen.fit.scale, rejected.fit.scale) <= 1.3 + 1e-9
    # opposite aspects meet in the middle
    chosen, rejected = place_pictures(Pair(chosen=item(0, 400, 200), rejected=item(1, 200, 400)), 512, OPTIONS)
    assert chosen.fit.crop_loss == rejected.fit.crop_loss == pytest.approx(0.5)


def test_an_item_may_forbid_enlargement():
    (placed,) = place_pictures(item(0, 300, 300, max_upscale=1.0), 1024, OPTIONS)
    assert placed.fit[:2] == (288, 288)


# --- batches ---


def steps_of(made, count):
    return [made.batch_at(step, micro) for step in range(count) for micro in range(made.accumulation)]


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_an_epoch_holds_every_sample_exactly_as_often_as_it_repeats(epoch, batch_size):
    made = plan(batch_size=batch_size)
    count = made.batches_per_epoch()
    seen = Counter(s.entry.image.name for step in range(count) for s in made.batch_at(epoch * count + step))
    assert seen == {entry.image.name: entry.repeats for entry in made.entries}
    assert sum(seen.values()) == made.samples_per_epoch() == sum(made.bucket_counts().values())


def test_a_batch_holds_one_size_and_none_is_empty_or_too_large():
    made = plan(batch_size=4)
    for batch in steps_of(made, 3 * made.batches_per_epoch()):
        assert 1 <= len(batch) <= 4
        assert len({sample.size for sample in batch}) == 1


def test_a_picture_comes_twice_in_a_batch_only_where_its_repeats_meet():
    made = BatchPlan([item(i, repeats=3) for i in range(8)], OPTIONS, batch_size=4, seed=1)
    for batch in steps_of(made, made.batches_per_epoch()):
        assert len({sample.entry.image for sample in batch}) == 4


def test_any_step_can_be_asked_for_at_once():
    whole = steps_of(plan(accumulation=3), 40)
    order = list(range(40))
    random.Random(0).shuffle(order)
    fresh = plan(accumulation=3)
    for step in order:
        for micro in range(3):
            assert fresh.batch_at(step, micro) == whole[3 * step + micro]
    assert plan(accumulation=3).batch_at(39, 2) == whole[-1]


def test_epochs_and_seeds_differ_and_a_seed_does_not():
    made = plan()
    count = made.batches_per_epoch()

    def names(made, epoch):
        return [s.entry.image.name for step in range(count) for s in made.batch_at(epoch * count + step)]

    assert names(made, 0) != names(made, 1)
    assert names(made, 0) != names(plan(seed=6), 0)
    assert names(made, 0) == names(plan(), 0)


def test_the_order_of_a_seed_never_changes_between_versions():
    """Golden: a resumed run depends on it."""
    made = BatchPlan([item(i) for i in range(6)], OPTIONS, seed=0)
    assert [made.batch_at(step)[0].entry.image.stem for step in range(6)] == ["4", "2", "3", "1", "0", "5"]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_several_processes_draw_what_one_with_their_whole_batch_draws(world_size):
    one = plan(batch_size=2 * world_size, accumulation=2)
    many = plan(batch_size=2, world_size=world_size, accumulation=2)
    for step in range(30):
        assert many.samples_in(step) == one.samples_in(step)
        for micro in range(2):
            whole = one.batch_at(step, micro)
            shares = [many.batch_at(step, micro, rank=rank) for rank in range(world_size)]
            assert sorted((s for share in shares for s in share), key=lambda s: s.number) == list(whole)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert many.batch_at(step, micro) == whole


def test_numbers_are_dense_across_stages_and_epochs():
    stages = (
        Stage(resolutions=(32,), until_step=7),
        Stage(resolutions=(48, 64), until_step=20),
        Stage(resolutions=(64,)),
    )
    made = plan(stages=stages, accumulation=2, batch_size=3)
    numbers = [sample.number for batch in steps_of(made, 60) for sample in batch]
    assert numbers == list(range(len(numbers)))
    late = plan(stages=stages, accumulation=2, batch_size=3)
    assert late.batch_at(55) == made.batch_at(55)


def test_stages_change_the_resolution_at_their_step():
    stages = (Stage(resolutions=(32,), until_step=3), Stage(resolutions=(64,)))
    made = plan([item(i) for i in range(4)], stages=stages)
    assert [made.batch_at(step)[0].size[0] for step in range(6)] == [32, 32, 32, 64, 64, 64]
    assert [made.stage_at(step) for step in (0, 2, 3, 1000)] == [0, 0, 1, 1]


@pytest.mark.parametrize("steps", [3, 4, 10, 1500])
def test_the_curriculum_has_every_stage(steps):
    stages = curriculum(steps)
    made = plan([item(i, 2000, 2000) for i in range(3)], stages=stages)
    sides = [made.batch_at(step)[0].size[0] for step in range(min(steps, 10))]
    assert sorted(sides) == sides
    if steps <= 10:
        assert set(sides) == {256, 512, 1024}
    if steps >= 10:
        assert [stage.until_step for stage in stages] == [steps * 5 // 10, steps * 8 // 10, None]


def test_a_curriculum_of_too_few_steps_says_so():
    with pytest.raises(ErnieError, match="needs as many steps at least, got 2"):
        curriculum(2)


def test_several_resolutions_train_every_picture_at_each():
    made = plan([item(i, 200, 200) for i in range(5)], stages=(Stage(resolutions=(32, 64)),))
    assert made.bucket_counts() == {(32, 32): 5, (64, 64): 5}
    assert len(made.pictures()) == 10


def test_without_a_stage_the_data_says_the_resolution_else_1024():
    entries = [item(0, 2000, 2000, resolutions=(256, 512)), item(1, 2000, 2000)]
    counts = BatchPlan(entries, OPTIONS).bucket_counts()
    assert counts == {(256, 256): 1, (512, 512): 1, (1024, 1024): 1}
    assert BatchPlan(entries, OPTIONS, stages=(Stage(resolutions=(64,)),)).bucket_counts() == {(64, 64): 2}


def test_everything_that_is_drawn_is_among_the_pictures_to_cache():
    stages = (Stage(resolutions=(32,), until_step=20), Stage(resolutions=(48, 64)))
    made = plan(stages=stages)
    drawn = {(p.item.image, p.fit) for batch in steps_of(made, 80) for s in batch for p in s.pictures}
    cached = [(p.item.image, p.fit) for p in made.pictures()]
    assert drawn == set(cached)
    assert len(cached) == len(set(cached))


# --- items drawn by a sampling plan ---


def drawn_entries():
    """Three sizes; draws from 0 to 6, and one item that keeps its repeats."""
    sizes = [(64, 64), (96, 64), (64, 96)]
    draws = [0.25, 6.0, 1.0, 0.0, 2.5, 0.75, 1.5, 3.0]
    return [*(item(i, *sizes[i % 3], draws=d) for i, d in enumerate(draws)), item(8, *sizes[2], repeats=2)]


def test_drawn_items_come_as_often_as_their_draws_say():
    entries = drawn_entries()
    made = plan(entries, batch_size=5, accumulation=2)
    count = 5 * 2 * 2000
    found = Counter(s.entry.image.stem for step in range(2000) for m in range(2) for s in made.batch_at(step, m))
    total = sum(entry.times for entry in entries)
    for entry in entries:
        share = entry.times / total
        # a batch is of one bucket, so its places are not independent: five times the variance at most
        allowed = 4 * math.sqrt(5 * share * (1 - share) / count)
        assert abs(found[entry.image.stem] / count - share) <= allowed, entry
    assert found["3"] == 0
    assert not any(picture.item.image.stem == "3" for picture in made.pictures())


def test_drawn_batches_are_full_and_of_one_size():
    made = plan(drawn_entries(), batch_size=4)
    for batch in steps_of(made, 60):
        assert len(batch) == 4
        assert len({sample.size for sample in batch}) == 1


def test_draws_of_one_bucket_do_not_depend_on_the_batch_size():
    entries = [item(i, draws=1 + i % 3) for i in range(9)]
    names = {
        size: [s.entry.image.stem for batch in steps_of(plan(entries, batch_size=size), 120 // size) for s in batch]
        for size in (1, 2, 4, 8)
    }
    assert names[1] == names[2] == names[4] == names[8]


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_draw_the_items_that_one_draws(world_size):
    one = plan(drawn_entries(), batch_size=2 * world_size, accumulation=2)
    many = plan(drawn_entries(), batch_size=2, world_size=world_size, accumulation=2)
    for step in range(30):
        for micro in range(2):
            whole = one.batch_at(step, micro)
            shares = [many.batch_at(step, micro, rank=rank) for rank in range(world_size)]
            assert sorted((s for share in shares for s in share), key=lambda s: s.number) == list(whole)


def test_drawn_steps_can_be_asked_for_at_once_and_numbers_are_dense_across_stages():
    stages = (Stage(resolutions=(32,), until_step=7), Stage(resolutions=(48, 64), until_step=20), Stage())
    options = {"stages": stages, "accumulation": 2, "batch_size": 3}
    made = plan(drawn_entries(), **options)
    whole = steps_of(made, 60)
    numbers = [sample.number for batch in whole for sample in batch]
    assert numbers == list(range(len(numbers)))
    for step in (59, 7, 0, 33, 20):
        assert plan(drawn_entries(), **options).batch_at(step, 1) == whole[2 * step + 1]
    drawn = {(p.item.image, p.fit) for batch in whole for s in batch for p in s.pictures}
    assert drawn <= {(p.item.image, p.fit) for p in made.pictures()}


def test_an_epoch_of_drawn_items_is_their_expected_number():
    made = plan(drawn_entries(), batch_size=4)
    assert made.samples_per_epoch() == 16  # of 17 draws, in whole batches
    assert made.bucket_counts() == {(64, 64): 2, (80, 48): 12, (48, 80): 4}
    assert made.concept_counts() == {"": 17.0}


def test_what_is_never_drawn_cannot_be_trained_on():
    with pytest.raises(ErnieError, match="no picture of the dataset is ever drawn"):
        plan([item(0, draws=0.0)])
    for draws in (-1.0, math.nan, math.inf):
        with pytest.raises(ErnieError, match="draws must be 0 or more"):
            item(0, draws=draws)


def test_pairs_are_planned_like_items():
    pairs = [Pair(chosen=item(2 * i, repeats=2), rejected=item(2 * i + 1, 96, 64)) for i in range(3)]
    made = plan(pairs)
    assert made.samples_per_epoch() == 6
    sample = made.batch_at(0)[0]
    assert sample.pictures[0].fit[:2] == sample.pictures[1].fit[:2] == sample.size
    assert len(made.pictures()) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entries": []}, "nothing to train on"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"stages": (Stage(), Stage())}, "until_step must be given"),
        ({"stages": (Stage(until_step=5), Stage(until_step=5))}, r"ascend, got \[5, 5\]"),
    ],
)
def test_a_plan_that_makes_no_sense_says_so(options, message):
    with pytest.raises(ErnieError, match=message):
        BatchPlan(**({"entries": [item(0)]} | options))


def test_a_stage_out_of_range_says_so():
    with pytest.raises(ErnieError, match="at least 16, got 8"):
        Stage(resolutions=(8,))
    with pytest.raises(ErnieError, match="until step 1 or later"):
        Stage(until_step=0)


def test_ten_thousand_samples_are_planned_in_a_second():
    import time

    entries = [item(i, 64 + 16 * (i % 7), 64) for i in range(10_000)]
    start = time.perf_counter()
    made = plan(entries, batch_size=4)
    made.batch_at(10_000_000)
    assert time.perf_counter() - start < 5  # about 1 s; generous, as machines are shared
