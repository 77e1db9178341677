"""First-block caching against evaluations written out, on a transformer in miniature."""

import pytest
import torch
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.model.dit import DiT, call_block
from ernie_pack.ernie_core.sampling.cache import StepCache, StepCacheRun

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


def make_run(threshold=1.0, **settings):
    return StepCacheRun(StepCache(threshold=threshold, **settings), LAYERS)


def test_threshold_0_is_the_plain_model_bit_for_bit(evaluate):
    run = make_run(threshold=0.0)
    for sigma in (0.9, 0.9, 0.5):
        cached, ran = evaluate(run, sigma)
        assert torch.equal(cached, evaluate(None, sigma)[0])
        assert ran == list(range(LAYERS))
    assert run.report() == "0 of 3 evaluations left out (0 %)"


def test_the_same_input_again_gives_the_same_output_without_the_other_blocks(evaluate):
    run = make_run(threshold=1e-6)
    first, _ = evaluate(run, 0.8)
    again, ran = evaluate(run, 0.8)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)
    assert ran == [0]
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


def test_no_more_than_max_skips_in_a_row(evaluate):
    run = make_run(max_skips=2)
    ran = [len(evaluate(run, 0.8)[1]) for _ in range(7)]
    assert ran == [LAYERS, 1, 1, LAYERS, 1, 1, LAYERS]


def test_only_between_start_and_end(evaluate):
    run = make_run(start=0.8, end=0.4, max_skips=99)
    ran = {sigma: len(evaluate(run, sigma)[1]) for sigma in (1.0, 0.9, 0.8, 0.6, 0.41, 0.4, 0.1)}
    assert [sigma for sigma, blocks in ran.items() if blocks == 1] == [0.8, 0.6, 0.41]


def test_prompts_do_not_mix(evaluate):
    """Each key has its own cache; one that is new is evaluated whole."""
    run = make_run()
    evaluate(run, 0.8, "cond")
    assert len(evaluate(run, 0.8, "uncond")[1]) == LAYERS
    assert len(evaluate(run, 0.8, "cond")[1]) == 1
    assert len(evaluate(run, 0.8, "uncond")[1]) == 1


def test_another_size_under_the_same_key_is_evaluated_whole(evaluate):
    run = make_run()
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold must lie between 0"),
        ({"threshold": float("nan")}, "threshold must lie between 0"),
        ({"threshold": 0.1, "start": 0.2, "end": 0.5}, "start and end must be noise levels"),
        ({"threshold": 0.1, "max_skips": -1}, "max_skips must be 0 or more"),
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
