"""Step caching against evaluations written out, on a transformer in miniature."""

from itertools import pairwise

import pytest
import torch
from ernie_pack.ernie_core.config import CACHE_SIGNALS, DiTConfig
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.model.dit import DiT, call_block
from ernie_pack.ernie_core.sampling.cache import StepCache, StepCacheRun, modulated_input, relative_change
from ernie_pack.ernie_core.sampling.calibration import IDENTITY, Calibration

LAYERS = 4


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    config = DiTConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=LAYERS,
        ffn_hidden_size=48,
        text_in_dim=24,
        in_channels=8,
        out_channels=8,
        rope_axes_dim=(4, 6, 6),
    )
    return DiT(config).eval()


class Counted:
    """`call_block` that writes down which blocks ran."""

    def __init__(self):
        self.ran = []

    def __call__(self, index, block, *inputs):
        self.ran.append(index)
        return call_block(index, block, *inputs)


@pytest.fixture
def evaluate(dit):
    """evaluate(run, sigma, key) -> (velocity, blocks that ran)."""
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def call(run, sigma, key="cond", x=x, **options):
        counted = Counted()
        run_block = counted if run is None else run.run_block(key, sigma, counted)
        out = dit(x, torch.full((len(x),), 1000 * sigma), text[: len(x)], run_block=run_block, **options)
        return out, counted.ran

    return call


def make_run(threshold=1.0, rescale=IDENTITY, **settings):
    return StepCacheRun(StepCache(threshold=threshold, **settings), LAYERS, rescale)


def no_change(_):
    return 0.0


both_signals = pytest.mark.parametrize("signal", CACHE_SIGNALS)
LEFT = {"first_block": [0], "modulated_input": []}  # the blocks that run in an evaluation that is left out


@both_signals
def test_threshold_0_is_the_plain_model_bit_for_bit(evaluate, signal):
    run = make_run(threshold=0.0, signal=signal)
    for sigma in (0.9, 0.9, 0.5):
        cached, ran = evaluate(run, sigma)
        assert torch.equal(cached, evaluate(None, sigma)[0])
        assert ran == list(range(LAYERS))
    assert run.report() == "0 of 3 evaluations left out (0 %)"


@both_signals
def test_the_same_input_again_gives_the_same_output_without_the_other_blocks(evaluate, signal):
    run = make_run(threshold=1e-6, signal=signal)
    first, _ = evaluate(run, 0.8)
    again, ran = evaluate(run, 0.8)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)
    assert ran == LEFT[signal]
    assert (run.whole, run.skipped) == (1, 1)


def test_a_reused_evaluation_is_the_first_block_plus_the_others_of_the_last_whole_one(evaluate, dit):
    """Written out: the stream after the first block, and what the other blocks added to it before."""
    streams = []

    def watch(index, block, *inputs):
        out = call_block(index, block, *inputs)
        streams.append(out)
        return out

    run = make_run()
    evaluate(run, 0.8)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dit(x, torch.full((2,), 800.0), text, run_block=watch)
        others = streams[-1] - streams[0]
        streams.clear()

        def first_only(index, block, x_BSD, *inputs):
            return watch(index, block, x_BSD, *inputs) + others if index == 0 else x_BSD

        expected = dit(x, torch.full((2,), 700.0), text, run_block=first_only)
    found, ran = evaluate(run, 0.7)
    assert ran == [0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_threshold_decides_by_the_first_blocks_addition(evaluate):
    """Between the change that happens and a tenth of it lies the difference of reuse and not."""
    added = []

    def watch(index, block, x_BSD, *inputs):
        out = call_block(index, block, x_BSD, *inputs)
        if index == 0:
            added.append(out - x_BSD)
        return out

    run = StepCacheRun(StepCache(threshold=0.0), LAYERS)
    for sigma in (0.8, 0.6):
        run.run_block("cond", sigma, watch)
    for sigma in (0.8, 0.6):
        evaluate(StubRun(watch), sigma)
    change = float((added[1] - added[0]).abs().mean() / added[0].abs().mean())
    for threshold, skips in ((1.01 * change, 1), (0.99 * change, 0)):
        run = make_run(threshold=min(threshold, 1.0))
        evaluate(run, 0.8)
        evaluate(run, 0.6)
        assert run.skipped == skips


class StubRun:
    """Hands on one `run_block` whatever is asked."""

    def __init__(self, run_block):
        self.run_block = lambda *_: run_block


@both_signals
def test_no_more_than_max_skips_in_a_row(evaluate, signal):
    run = make_run(max_skips=2, signal=signal)
    ran = [evaluate(run, 0.8)[1] == LEFT[signal] for _ in range(7)]
    assert ran == [False, True, True, False, True, True, False]


@both_signals
def test_only_between_start_and_end(evaluate, signal):
    run = make_run(start=0.8, end=0.4, max_skips=99, signal=signal, rescale=no_change)
    ran = {sigma: evaluate(run, sigma)[1] for sigma in (1.0, 0.9, 0.8, 0.6, 0.41, 0.4, 0.1)}
    assert [sigma for sigma, blocks in ran.items() if blocks == LEFT[signal]] == [0.8, 0.6, 0.41]


@both_signals
def test_prompts_do_not_mix(evaluate, signal):
    """Each key has its own cache; one that is new is evaluated whole."""
    run = make_run(signal=signal)
    evaluate(run, 0.8, "cond")
    assert len(evaluate(run, 0.8, "uncond")[1]) == LAYERS
    assert evaluate(run, 0.8, "cond")[1] == LEFT[signal]
    assert evaluate(run, 0.8, "uncond")[1] == LEFT[signal]


@both_signals
def test_another_size_under_the_same_key_is_evaluated_whole(evaluate, signal):
    run = make_run(signal=signal)
    evaluate(run, 0.8)
    out, ran = evaluate(run, 0.8, x=torch.randn(1, 8, 6, 4))
    assert len(ran) == LAYERS
    assert out.shape == (1, 8, 6, 4)


def test_an_evaluation_that_was_stopped_is_not_reused(evaluate):
    """An interrupt inside an evaluation ends the run; a new run starts from nothing."""

    def stop(index, block, *inputs):
        if index == 2:
            raise Interrupted
        return call_block(index, block, *inputs)

    run = make_run()
    with pytest.raises(Interrupted):
        evaluate(StubRun(run.run_block("cond", 0.8, stop)), 0.8)
    assert len(evaluate(run, 0.8)[1]) == LAYERS
    assert len(evaluate(make_run(), 0.8)[1]) == LAYERS


def test_block_patches_of_the_host_still_run(evaluate):
    """On the reused stream too: they see every block's number, and what they change stays changed."""
    seen = []
    patch = {"patches": {"single_block": [lambda args: seen.append(args["block_index"]) or {}]}}
    run = make_run()
    plain, _ = evaluate(run, 0.8)
    patched, ran = evaluate(run, 0.8, transformer_options=patch)
    assert ran == [0]
    assert seen == list(range(LAYERS))
    torch.testing.assert_close(patched, plain, atol=1e-5, rtol=0)


@both_signals
def test_where_another_pack_leaves_the_first_block_out_nothing_stale_is_reused(evaluate, signal):
    """Its replacement does not call our block, so nothing can be compared: the evaluation is whole."""
    run = make_run(signal=signal)
    evaluate(run, 0.8)
    assert evaluate(run, 0.8)[1] == LEFT[signal]
    replaced = {"patches_replace": {"dit": {("single_block", 0): lambda args, _: {"img": args["img"]}}}}
    assert evaluate(run, 0.8, transformer_options=replaced)[1] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------- modulated input

SIGMAS = (0.9, 0.8, 0.7, 0.5, 0.3)


@pytest.fixture
def changes(evaluate):
    """Relative L1 of the modulated input between neighbours of SIGMAS, read inside plain evaluations."""
    seen = []

    def watch(index, block, x_BSD, modulation, *inputs):
        if index == 0:
            seen.append(modulated_input(block, x_BSD, modulation))
        return call_block(index, block, x_BSD, modulation, *inputs)

    for sigma in SIGMAS:
        evaluate(StubRun(watch), sigma)
    return [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(seen)]


def test_the_modulated_input_is_what_the_first_blocks_attention_reads(dit, evaluate):
    read, computed = [], []
    hook = dit.layers[0].self_attention.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))

    def watch(index, block, x_BSD, modulation, *inputs):
        if index == 0:
            computed.append(modulated_input(block, x_BSD, modulation))
        return call_block(index, block, x_BSD, modulation, *inputs)

    evaluate(StubRun(watch), 0.6)
    hook.remove()
    assert torch.equal(read[0], computed[0])


def test_changes_add_up_until_they_reach_the_threshold(evaluate, changes):
    """With the identity: between the sum of two changes and a hair less lies the difference of reuse and not."""
    for factor, expected in ((1.001, [False, True, True]), (0.999, [False, True, False])):
        run = make_run(threshold=factor * (changes[0] + changes[1]), signal="modulated_input", max_skips=9)
        assert [evaluate(run, sigma)[1] == [] for sigma in SIGMAS[:3]] == expected


def test_after_a_whole_evaluation_the_sum_starts_anew_and_counts_from_the_evaluation_before(evaluate, changes):
    run = make_run(threshold=1.001 * max(changes), signal="modulated_input", max_skips=9)
    moved, expected = 0.0, [False]
    for change in changes:
        moved += change
        expected.append(moved < run.cache.threshold)
        moved *= expected[-1]
    assert [evaluate(run, sigma)[1] == [] for sigma in SIGMAS] == expected
    assert len(set(expected)) == 2


def test_the_calibration_is_asked_for_each_change(evaluate, changes):
    asked = []
    run = make_run(signal="modulated_input", max_skips=9, rescale=lambda change: asked.append(change) or 0.0)
    for sigma in SIGMAS:
        evaluate(run, sigma)
    assert asked == pytest.approx(changes, rel=1e-5)
    assert run.skipped == len(changes)


def test_a_higher_threshold_or_a_smaller_calibration_never_leaves_less_out(evaluate):
    """Greedy over the same changes; three times the calibration is a third of the threshold."""

    def skipped(threshold, factor=1.0):
        rescale = Calibration(coefficients=(factor, 0.0))
        run = make_run(threshold=threshold, signal="modulated_input", max_skips=99, rescale=rescale)
        for sigma in SIGMAS:
            evaluate(run, sigma)
        return run.skipped

    counts = [skipped(threshold) for threshold in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]
    assert [skipped(3 * t, 3.0) for t in (0.01, 0.03, 0.1, 0.3)] == counts[1:5]


def test_a_skipped_evaluation_adds_what_all_blocks_added_before(evaluate):
    """Written out, on the stream of the new evaluation."""
    streams = []

    def watch(index, block, x_BSD, *inputs):
        out = call_block(index, block, x_BSD, *inputs)
        streams.append((x_BSD, out))
        return out

    evaluate(StubRun(watch), 0.8)
    added = streams[-1][1] - streams[0][0]
    expected, _ = evaluate(StubRun(lambda index, block, x_BSD, *inputs: x_BSD + added if index == 0 else x_BSD), 0.7)
    run = make_run(signal="modulated_input", rescale=no_change)
    evaluate(run, 0.8)
    found, ran = evaluate(run, 0.7)
    assert ran == []
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_relative_change_of_nothing_and_from_nothing():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert relative_change(None, one) == relative_change(zero, one) == float("inf")
    assert relative_change(zero, zero) == 0
    assert relative_change(one, 1.5 * one) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold must lie between 0"),
        ({"threshold": float("nan")}, "threshold must lie between 0"),
        ({"threshold": 0.1, "start": 0.2, "end": 0.5}, "start and end must be noise levels"),
        ({"threshold": 0.1, "max_skips": -1}, "max_skips must be 0 or more"),
        ({"threshold": 0.1, "signal": "output"}, "signal first_block or modulated_input expected, got 'output'"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ErnieError, match=message):
        StepCache(**settings)


@pytest.mark.parametrize(
    ("settings", "neutral"),
    [({"threshold": 0.0}, True), ({"max_skips": 0}, True), ({"start": 0.5, "end": 0.5}, True), ({}, False)],
)
def test_what_can_leave_nothing_out_is_neutral(settings, neutral):
    assert StepCache(**{"threshold": 0.1} | settings).is_neutral is neutral
