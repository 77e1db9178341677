"""The training benchmark in miniature: both sides make the same step, and the counts count."""

import pytest
import torch
from ernie_pack.bench.compare import process_seconds
from ernie_pack.bench.pairs import make_dit_pair
from ernie_pack.bench.train_step import (
    Bench,
    PeakMemory,
    kept_bytes,
    our_step,
    peak_row,
    peer_step,
    quantise_blocks,
    step_row,
    units_row,
)
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.weights.quantise import QuantisedLinear

BENCH = Bench(
    dit=DiTConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_layers=2,
        ffn_hidden_size=96,
        text_in_dim=24,
        rope_axes_dim=(4, 6, 6),
    ),
    dtype=torch.float32,
    px=64,
    text_tokens=5,
    rounds=2,
    seconds=process_seconds,
)


@pytest.mark.parity
@pytest.mark.parametrize("checkpoint", [True, False])
def test_both_sides_make_the_same_step(checkpoint):
    ours, theirs = make_dit_pair(BENCH.dit, dtype=torch.float32)
    peer = peer_step(theirs, BENCH, checkpoint=checkpoint)
    step, adapter = our_step(ours, BENCH, checkpoint=checkpoint)
    named = dict(theirs.named_parameters())
    factors = {name: named[f"{name}.default.weight"] for name, _ in adapter.named_parameters()}
    for name, p in adapter.named_parameters():
        factors[name].data.copy_(p.data.normal_(std=0.05))
    torch.testing.assert_close(step(), peer())
    assert all(factors[name].grad is not None for name in factors)
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, factors[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parity
def test_the_benchmark_runs_from_end_to_end():
    pair = make_dit_pair(BENCH.dit, dtype=torch.float32)
    row = step_row(*pair, BENCH, checkpoint=True, name="step", at_least=1.15)
    assert row.ratio > 0
    peak = peak_row(*pair, BENCH, checkpoint=True)
    assert peak.ratio > 1


@pytest.mark.parity
def test_a_block_keeps_at_most_thirty_units():
    row = units_row(tokens=64)
    assert row.met, row.ours
    assert row.ratio > 1.5


def test_what_is_kept_and_the_peak_are_counted():
    x, w = torch.randn(100, 10, requires_grad=True), torch.randn(10, 10)
    assert kept_bytes(lambda: ((x @ w).exp() * 2).sum(), [w]) == 4000
    with PeakMemory([x, w]) as memory:
        y = x.detach() @ w
        z = y[:50] + 1
        del y
        u = z * 2
        del z, u
    assert (memory.peak, memory.alive) == (6000, 0)


@pytest.mark.parity
def test_the_8_bit_base_of_the_benchmark_is_the_trainers():
    model = make_dit_pair(BENCH.dit, dtype=torch.float32)[0]
    quantise_blocks(model)
    assert sum(isinstance(m, QuantisedLinear) for m in model.modules()) == 14
