"""The GPU benchmark in miniature on the CPU, and the table it prints."""

import pytest
import torch
from ernie_pack.bench.compare import HEADINGS, Row, compare, process_seconds
from ernie_pack.bench.gpu import Bench, autoencoder_rows, cache_rows, measure, transformer_rows
from ernie_pack.bench.import_time import heavy_modules, import_once
from ernie_pack.ernie_core.config import DiTConfig, VAEConfig


@pytest.mark.parity
def test_the_gpu_benchmark_runs_from_end_to_end():
    bench = Bench(
        dit=DiTConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_layers=3,
            ffn_hidden_size=96,
            text_in_dim=24,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8),
        device="cpu",
        dtype=torch.float32,
        rounds=2,
        seconds=process_seconds,
        forwards=(("H1", 64, 135), ("H4", 32, 42)),
        guided_px=32,
        decode_px=32,
    )
    rows = [*transformer_rows(bench), *autoencoder_rows(bench)]
    assert [row.name.split()[0] for row in rows] == ["H1", "H4", "H3", "H8"]
    assert all(row.ratio > 0 for row in rows)
    caches = list(cache_rows(bench))
    assert len(caches) == 4
    assert all(out.ratio > whole.ratio for whole, out in zip(caches[::2], caches[1::2], strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no CUDA")
def test_without_a_gpu_it_says_so():
    (row,) = measure()
    assert row.cells()[-1] == "not measurable here"
    assert "needs CUDA" in row.ours


def test_a_row_states_ratio_spread_and_verdict():
    calls = []
    row = compare(
        "nothing",
        ours=lambda: calls.append("ours"),
        peer=lambda: calls.append("peer"),
        peer_name="nobody",
        at_least=2.0,
        rounds=4,
        seconds=lambda f: (f(), {"ours": 1.0, "peer": 3.0}[calls[-1]])[1],
    )
    assert len(row.cells()) == len(HEADINGS)
    assert row.cells()[1:] == ("1000 ms", "nobody: 3000 ms", "3.00 [3.00-3.00]", ">= 2x", "met")
    assert calls == ["ours", "peer", *("peer", "ours", "ours", "peer") * 2]
    assert Row(name="x", ours="", target="", met=False).cells()[-1] == "missed"


def test_importing_the_pack_brings_nothing_heavy():
    run = import_once()
    assert run["nodes"] > 0
    assert heavy_modules(run["alone"][1], ("torch", "numpy", "PIL", "safetensors", "einops")) == []
    assert heavy_modules(run["asked"][1]) == []
