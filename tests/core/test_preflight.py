"""The report before a run: what it says is counted, its costs follow published tables and measured steps."""

from dataclasses import dataclass, replace

import broken_images as odd
import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import Interrupted
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.training.adapters import Adapter, AdapterConfig
from ernie_pack.ernie_core.training.buckets import Stage
from ernie_pack.ernie_core.training.caching import LatentCache, TextCache, build_latents, build_texts
from ernie_pack.ernie_core.training.captions import CaptionRules, all_texts
from ernie_pack.ernie_core.training.dataset import DatasetOptions, read_dataset
from ernie_pack.ernie_core.training.optimisers import make_optimiser
from ernie_pack.ernie_core.training.pairs import read_pairs
from ernie_pack.ernie_core.training.preflight import (
    GB,
    check,
    draw_buckets,
    draw_crops,
    draw_tokens,
    estimate_memory,
    format_time,
    num_adapter_weights,
    num_linear_weights,
    step_flops,
)
from ernie_pack.ernie_core.training.recipe import ModelPaths, OptimiserConfig, Recipe
from tiny_components import DIT

RELEASED = DiTConfig()


@dataclass(frozen=True)
class Cost:
    seconds: tuple
    peak_bytes: int | None = None


def recipe(**values):
    defaults = {"name": "x", "models": ModelPaths(transformer="nowhere"), "stages": (Stage(resolutions=(64,)),)}
    return Recipe(**(defaults | values))


@pytest.fixture
def dataset(tmp_path):
    odd.write_pictures(tmp_path / "a", [(64, 64)] * 5 + [(256, 64)] * 2 + [(40, 40)])
    odd.write_pictures(tmp_path / "b", [(64, 64)] * 2, seed=9)
    return read_dataset(tmp_path)


# --- cost ---


def lora_weights(rank):
    return 36 * 81_920 * rank  # q, k, v, o: 2 x 4096 each; gate, up, down: 4096 + 12288 each


@pytest.mark.parametrize(
    ("precision", "cells", "sequences", "checkpointing", "published"),
    [
        ("bf16", 1024, 1, True, 18.2),
        ("bf16", 4096, 1, True, 20.1),
        ("fp8", 1024, 1, True, 10.3),
        ("int8", 4096, 1, True, 12.2),
        ("bf16", 1024, 4, True, 20.7),
        ("fp8", 1024, 4, True, 12.8),
        ("bf16", 1024, 1, False, 29),
        ("fp8", 1024, 1, False, 21),
    ],
)
def test_memory_agrees_with_the_table_for_rank_16(precision, cells, sequences, checkpointing, published):
    """performance.md 1.7 gives GB (10^9) per precision."""
    memory = estimate_memory(
        RELEASED,
        precision=precision,
        num_trainable=lora_weights(16),
        tokens=cells + 250,
        sequences=sequences,
        checkpointing=checkpointing,
    )
    assert memory.total / GB == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("precision", "cells", "sequences", "published"),
    [
        ("bf16", 1024, 1, 18.8),
        ("bf16", 4096, 1, 20.4),
        ("bf16", 4096, 2, 23),
        ("fp8", 1024, 1, 10.9),
        ("fp8", 4096, 1, 12.5),
    ],
)
def test_memory_agrees_with_the_guide_for_rank_32(precision, cells, sequences, published):
    """trainers.md 3.5, an estimate of its own: within 6 %."""
    memory = estimate_memory(
        RELEASED, precision=precision, num_trainable=lora_weights(32), tokens=cells + 200, sequences=sequences
    )
    assert memory.total / GB == pytest.approx(published, rel=0.06)


def test_memory_follows_what_costs_memory():
    def total(**values):
        defaults = {"precision": "bf16", "num_trainable": lora_weights(32), "tokens": 4352, "sequences": 1}
        return estimate_memory(RELEASED, **(defaults | values)).total

    assert total(precision="fp32") > 1.8 * total()
    assert total(precision="stored") == total()
    assert total(stream=True) < 0.4 * total()
    assert total(optimiser=OptimiserConfig(ema=0.99)) - total() == 4 * lora_weights(32)
    adamw8bit = total(optimiser=OptimiserConfig(name="adamw8bit"))
    assert total(optimiser=OptimiserConfig(name="prodigy")) > total() > adamw8bit


@pytest.mark.parametrize("name", ["adamw", "prodigy", "adafactor"])
def test_the_optimisers_hold_what_the_estimate_says(name):
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    weight = torch.nn.Parameter(torch.randn(400, 300, generator=torch.Generator().manual_seed(0)))
    config = OptimiserConfig(name=name)
    optimiser = make_optimiser([weight], config)
    for _ in range(2):
        weight.grad = torch.randn(400, 300, generator=torch.Generator().manual_seed(1))
        optimiser.step()
    state = sum(
        t.numel() * t.element_size() for s in optimiser.state.values() for t in s.values() if torch.is_tensor(t)
    )
    count = weight.numel()
    memory = estimate_memory(DIT, precision="fp32", num_trainable=count, tokens=1, sequences=1, optimiser=config)
    assert memory.adapter - 10 * count == pytest.approx(state, rel=0.02, abs=0.1 * count)


@pytest.mark.parametrize(
    ("cells", "checkpointing", "published"), [(1024, True, 64.7), (4096, True, 255), (1024, False, 43.6)]
)
def test_operations_agree_with_the_table(cells, checkpointing, published):
    """performance.md 1.7, TFLOP per sample, with 256 tokens of text."""
    assert step_flops(RELEASED, tokens=cells + 256, checkpointing=checkpointing) / 1e12 == pytest.approx(
        published, rel=0.01
    )


def test_the_released_model_has_the_weights_that_the_notes_say():
    assert num_linear_weights(RELEASED) == pytest.approx(7.85e9, rel=0.001)
    assert num_adapter_weights(DiT(RELEASED, device="meta"), AdapterConfig(rank=16)) == lora_weights(16)


@pytest.mark.parametrize(
    "config",
    [
        *(AdapterConfig(rank=3), AdapterConfig(algorithm="dora", rank=3), AdapterConfig(algorithm="lokr", rank=2)),
        *(
            AdapterConfig(algorithm="lokr", rank=64),
            AdapterConfig(rank=5, targets=("layers.*.mlp.*",), exclude=("*.1.*",)),
        ),
    ],
    ids=["lora", "dora", "lokr thin", "lokr whole", "some"],
)
def test_adapter_weights_are_counted_without_making_them(config):
    model = DiT(DIT)
    adapter = Adapter(model, config, seed=0)
    assert num_adapter_weights(DiT(DIT, device="meta"), config) == sum(p.numel() for p in adapter.parameters())


# --- facts ---


def test_sizes_crops_and_small_pictures_are_found(dataset):
    found = check(
        dataset, recipe(batch_size=4, stages=(Stage(resolutions=(64,), until_step=30), Stage(resolutions=(32,))))
    )
    first, second = found.stages
    assert first.buckets == {(64, 64): 7, (96, 32): 2, (48, 48): 1}
    assert (first.samples_per_epoch, first.batches_per_epoch, first.partial_batches) == (10, 4, 3)
    assert (first.first_step, first.last_step, second.first_step, second.last_step) == (0, 30, 30, 1500)
    assert first.epochs == 30 * 2 / 4
    assert [p.fit.source for p in found.crops][:2] == [(256, 64)] * 2
    assert found.crops[0].fit.crop_loss == max(p.fit.crop_loss for p in found.crops) > 0.1
    assert [p.item.width for p in found.small] == [40]
    assert [p.item.width for p in found.upscaled] == [40]
    assert found.concepts == {"a": 8, "b": 2}
    for text in (
        "| 64 x 64 | 7 | 70.0% |",
        "are cropped by more than 1 %",
        "| a | 8 | 80.0% |",
        "1 are enlarged",
        "1.20 times",
    ):
        assert text in found.text
    assert "3 of 4 batches are not full" in found.text


def test_a_curriculum_says_what_each_stage_has_of_steps_samples_and_work(dataset):
    """A quarter of the pixels is a quarter of the work, but for the text and the attention."""
    stages = (Stage(resolutions=(32,), until_step=75), Stage(resolutions=(64,)))
    found = check(dataset, recipe(steps=100, stages=stages))
    assert "| stage | mean area | steps | share of steps | share of samples | share of compute |" in found.text
    low, high = found.stages
    line = next(line for line in found.text.splitlines() if line.startswith("| 1 | "))
    assert "^2 px | 75 | 75.0% | 75.0% |" in line
    assert f"{low.flops / (low.flops + high.flops):.1%}" in line
    assert 0.4 < low.flops / (low.flops + high.flops) < 0.75
    assert "## Curriculum" not in check(dataset, recipe()).text
    empty = check(dataset, recipe(steps=50, stages=stages))
    assert "stage 2 has no steps" in empty.text


def test_data_of_a_sampling_plan_is_counted_by_its_expected_draws(dataset):
    draws = [4.0 if item.concept == "b" else 0.25 for item in dataset.items]
    items = (replace(item, draws=d) for item, d in zip(dataset.items, draws, strict=True))
    found = check(replace(dataset, items=tuple(items)), recipe(batch_size=4))
    assert found.concepts == {"a": 2.0, "b": 8.0}
    assert "10 samples per epoch, drawn at random by a sampling plan" in found.text
    assert "| b | 8 | 80.0% |" in found.text
    (stage,) = found.stages
    assert (stage.partial_batches, stage.samples_per_epoch, stage.batches_per_epoch) == (0, 8, 2)


def test_duplicates_are_counted(tmp_path):
    folder = odd.write_pictures(tmp_path, [(64, 64), (48, 48)])
    for name in ("x", "y"):
        (folder / f"{name}.png").write_bytes((folder / "0.png").read_bytes())
        (folder / f"{name}.txt").write_text(name)
    found = check(read_dataset(folder))
    assert (found.duplicates, found.near_duplicates) == (2, 0)
    assert "2 exact and 0 near duplicates" in found.text
    assert "## Notes" in found.text


def test_problems_come_first(tmp_path):
    folder = odd.write_pictures(tmp_path, [(64, 64)])
    (folder / "bad.png").write_bytes(b"")
    text = check(read_dataset(folder)).text
    assert "bad.png: left out" in text[text.index("## Problems") : text.index("## Stage")]


def test_tokens_are_those_of_the_tokenizer_and_long_captions_are_named(tmp_path, tiny_models):
    folder = odd.write_pictures(tmp_path, [(64, 64)] * 2)
    (folder / "0.txt").write_text("word " * 2500)
    dataset = read_dataset(folder)
    found = check(dataset, recipe(models=ModelPaths(transformer=str(tiny_models))))
    assert found.tokens_counted
    assert found.tokens[""] == 1
    assert found.tokens[("word " * 2500).strip()] > 2048
    assert "1 captions are longer than 2048 tokens and are cut: 'word word" in found.text
    assert "1 above 512 tokens" in found.text
    assert "cannot be read" not in found.text


def test_without_models_tokens_are_estimated_and_it_says_so(dataset):
    found = check(dataset, recipe())
    assert not found.tokens_counted
    assert "the text encoder cannot be read, so tokens are estimated" in found.text
    assert "estimated from characters" in found.text
    assert found.tokens == check(dataset).tokens


@pytest.fixture(scope="module")
def tiny_models():
    from pathlib import Path

    return Path(__file__).resolve().parents[2] / "tiny" / "ernie-image-tiny"


def test_the_cache_takes_what_was_said(tmp_path, tiny_models):
    from ernie_pack.ernie_core.pipeline import Pipeline
    from ernie_pack.ernie_core.training.buckets import BatchPlan

    pipeline = Pipeline.from_folder(tiny_models, dtype=torch.float32, enhancer=False)
    dataset = read_dataset(odd.write_pictures(tmp_path / "p", [(128, 128), (192, 128)]))
    settings = recipe(models=ModelPaths(transformer=str(tiny_models)), stages=(Stage(resolutions=(64, 128)),))
    said = check(dataset, settings).cache_bytes
    latents = LatentCache(tmp_path / "cache", vae="v")
    texts = TextCache(tmp_path / "cache", encoder="e", dtype=torch.bfloat16)
    build_latents(latents, BatchPlan(dataset.items, dataset.options, stages=settings.stages).pictures(), pipeline.vae)
    build_texts(texts, all_texts(dataset.items, dataset.options), pipeline.encode)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    taken = sum(f.stat().st_size for f in files)
    assert said < taken < said + 1200 * len(files)  # a header with the key each


# --- measured ---


def test_time_is_measured_at_the_largest_size_and_scaled_by_operations(dataset):
    sizes = []

    def probe(size):
        sizes.append(size)
        return Cost((9.0, 2.0, 2.0), 7 * GB)

    stages = (Stage(resolutions=(32,), until_step=100), Stage(resolutions=(64,)))
    found = check(dataset, recipe(steps=300, accumulation=2, stages=stages), probe=probe)
    assert sizes == [(64, 64)]
    slow = {(64, 64): 16, (96, 32): 12, (48, 48): 9}
    mean_text = sum(found.tokens.values()) / len(found.tokens)

    def flops(cells):
        return step_flops(RELEASED, tokens=round(cells + mean_text))

    per_sample = 2.0 / (step_flops(RELEASED, tokens=16 + 256) * 2)
    mean = sum(flops(slow[size]) * count for size, count in found.stages[1].buckets.items()) / 10
    assert found.stages[1].seconds == pytest.approx(per_sample * mean * 2 * 200)
    assert found.seconds == pytest.approx(found.stages[0].seconds + found.stages[1].seconds)
    assert "memory, measured: 7.0 GB" in found.text
    assert "measured: 9, 2, 2 s" in found.text


def test_when_all_samples_are_like_the_probe_the_time_is_steps_times_step(tmp_path):
    options = DatasetOptions(rules=CaptionRules(dropout=1.0))
    dataset = read_dataset(odd.write_pictures(tmp_path, [(512, 512)] * 4), options=options)
    settings = recipe(steps=100, batch_size=2, accumulation=3, stages=(Stage(resolutions=(512,)),))
    seconds = check(dataset, settings, probe=lambda size: Cost((1.0, 1.0, 1.0))).seconds
    # one token of text instead of the probe's 256
    assert seconds == pytest.approx(
        100 * step_flops(RELEASED, tokens=1025) / step_flops(RELEASED, tokens=1280), rel=1e-6
    )


def test_more_processes_share_the_samples(dataset):
    def run(world_size, batch_size):
        settings = recipe(steps=100, batch_size=batch_size, stages=(Stage(resolutions=(64,)),))
        return check(dataset, settings, probe=lambda size: Cost((1.0,) * 3), world_size=world_size)

    one, two = run(1, 4), run(2, 2)
    assert [s.epochs for s in one.stages] == [s.epochs for s in two.stages]
    assert two.seconds == pytest.approx(one.seconds)  # a probe of half the batch took as long


def test_it_tells_how_far_it_is_and_can_be_stopped(dataset):
    calls = []
    check(dataset, on_progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == [0, 1, 2, 3, 4]

    def stop(done, total, what):
        raise Interrupted

    with pytest.raises(Interrupted):
        check(dataset, on_progress=stop)


def test_pairs_are_looked_at_too(tmp_path):
    odd.write_pictures(tmp_path / "chosen", [(64, 64), (48, 64)], seed=1)
    odd.write_pictures(tmp_path / "rejected", [(64, 64), (48, 64)], captions=False, seed=2)
    pairs = read_pairs(tmp_path)
    found = check(pairs, recipe(objective="dpo"))
    assert "2 pairs, 2 samples per epoch" in found.text
    assert found.duplicates == 0
    single = check(replace(pairs, pairs=pairs.pairs[:1]), recipe(objective="dpo"))
    images = read_dataset(odd.write_pictures(tmp_path / "one", [(64, 64)], seed=1))
    assert single.memory.activations == 2 * check(images, recipe()).memory.activations


# --- pictures ---


def test_every_picture_is_rgb_of_one_width_even_with_names_that_no_font_has(tmp_path):
    folder = odd.write_pictures(tmp_path, [(300, 64)])
    for suffix in (".png", ".txt"):
        (folder / f"0{suffix}").rename(folder / f"\u732b\U0001f431{suffix}")
    found = check(read_dataset(folder), recipe())
    assert set(found.pictures) == {"buckets", "crops", "tokens"}
    for picture in found.pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape[1:] == (900, 3)


def test_bars_are_as_long_as_their_counts(dataset):
    stage = check(dataset, recipe()).stages[0]
    stage = replace(stage, buckets={(64, 64): 8, (32, 64): 2})
    blue = (draw_buckets([stage]) == (38, 92, 196)).all(axis=2)
    lengths = [int(row.sum()) for row in blue if row.any()]
    assert max(lengths) == pytest.approx(660, abs=2)
    assert min(lengths) == pytest.approx(165, abs=2)


def test_what_is_cut_off_is_dark_and_what_stays_is_not(tmp_path):
    from PIL import Image

    (tmp_path / "wide.png").write_bytes(odd.encode(Image.new("RGB", (400, 100), (200, 200, 200))))
    (tmp_path / "wide.txt").write_text("x")
    found = check(read_dataset(tmp_path), recipe())
    sheet = draw_crops(found.crops)
    row = sheet[6 + 26, 6 : 6 + 213].astype(int)  # through the picture, 213 x 53 of the cell
    left = round(213 * (found.crops[0].fit.box[0] / 400))
    assert (row[: left - 2] == 60).all()
    assert (row[left + 4 : 213 - left - 4] == 200).all()
    assert (row[213 - left + 2 :] == 60).all()


def test_without_crops_the_sheet_says_so():
    assert draw_crops([]).shape == (44, 900, 3)


def test_the_histogram_counts_every_text():
    blue = (draw_tokens([5] * 30 + [700] * 10) == (38, 92, 196)).all(axis=2)
    columns = blue.sum(axis=0)
    tall, short = columns[:450].max(), columns[450:].max()
    assert short / tall == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(("seconds", "text"), [(0.5, "0.5 s"), (75, "1 min 15 s"), (7300, "2 h 1 min")])
def test_times_are_written_for_people(seconds, text):
    assert format_time(seconds) == text
