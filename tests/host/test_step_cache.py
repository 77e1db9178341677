"""Step caching on the real host: ours, core's EasyCache, and a block patch of another pack on our MODEL."""

from __future__ import annotations

import re
from pathlib import Path

import block_patch_pack
import pytest
import torch
from ernie_pack.ernie_core.config import CACHE_SIGNALS
from host_graph import Graph, difference
from random_models import LORAS

pytestmark = pytest.mark.host

MANY = 20  # steps: enough for neighbours to be alike


@pytest.fixture(scope="module")
def server(start_comfyui):
    """A ComfyUI with another pack's block patch; hides the server of the other tests."""
    with start_comfyui(Path(block_patch_pack.__file__)) as server:
        yield server


def cached(graph, model=None, **settings):
    values = {"threshold": 0.2, "start": 1.0, "end": 0.0, "max_skips": 3, "signal": "first_block"} | settings
    return graph.add("ErnieStepCache", model=model or graph.model, **values)


def reported(log):
    """(left out, of) of each run with our cache."""
    return [(int(a), int(b)) for a, b in re.findall(r"Step Cache \(ERNIE\): (\d+) of (\d+) evaluations", log)]


both_signals = pytest.mark.parametrize("signal", CACHE_SIGNALS)


@both_signals
def test_threshold_0_changes_nothing(signal, latents, new_log):
    graph = Graph()
    none = cached(graph, threshold=0.0, signal=signal)
    plain, none = latents(graph, graph.ernie_sampler(), graph.ernie_sampler(model=none))
    assert torch.equal(plain, none)
    assert reported(new_log()) == []


@both_signals
def test_evaluations_are_left_out_and_counted(signal, latents, new_log):
    graph = Graph()  # 128 px: below what the tiny model was trained on, small changes end far apart
    graph.latent = graph.add("ErnieEmptyLatent", size="custom", width=128, height=128, batch_size=1)
    model = cached(graph, signal=signal)
    plain, fast = latents(graph, graph.ernie_sampler(steps=MANY), graph.ernie_sampler(steps=MANY, model=model))
    log = new_log()
    assert "nobody has calibrated" not in log  # the tiny model's calibration is shipped
    ((left_out, total),) = reported(log)
    assert total == 2 * MANY
    assert 0 < left_out < total
    assert difference(plain, fast) > 0
    assert (plain - fast).abs().mean() < 0.3 * plain.abs().mean()  # 0.19 and 0.12, as without a host


def test_core_samplers_leave_out_the_same(latents, new_log):
    graph = Graph()
    model = cached(graph, threshold=0.19)  # another than above: the host keeps results
    ours, core = latents(graph, graph.ernie_sampler(steps=MANY, model=model), graph.ksampler(steps=MANY, model=model))
    first, second = reported(new_log())
    assert first == second
    assert difference(ours, core) < 2e-3


def test_with_reduced_depth_and_skip_layer_guidance(latents, new_log):
    """The pass without some blocks asks the same prompt again and has a cache of its own."""
    graph = Graph()
    depth = graph.add("ErnieReducedDepth", model=graph.model, blocks=1)
    guided = graph.add("ErnieSkipLayerGuidance", model=depth, scale=1.0, blocks="2", start=1.0, end=0.0)
    plain, fast = latents(
        graph,
        graph.ernie_sampler(steps=MANY, model=guided),
        graph.ernie_sampler(steps=MANY, model=cached(graph, model=guided)),
    )
    ((left_out, total),) = reported(new_log())
    assert total == 3 * MANY
    assert 0 < left_out < total
    assert fast.isfinite().all()
    assert difference(plain, fast) > 0


@both_signals
def test_a_lora_with_a_range_and_without_it_are_kept_apart(signal, latents, new_log):
    """Everything may be left out, so evaluations are whole where a cache is new: for each prompt, on each side."""
    graph = Graph()
    widgets = {"lora_name": LORAS[0], "strength": 1.0, "blocks": "", "allow_unmatched": False}
    loaded = graph.add("ErnieLoadLora", model=graph.model, **widgets, start=1.0, end=0.5)
    settings = {"threshold": 1.0, "max_skips": 1000, "signal": signal}
    alone, with_lora = latents(
        graph,
        graph.ernie_sampler(steps=MANY, model=cached(graph, **settings)),
        graph.ernie_sampler(steps=MANY, model=cached(graph, model=loaded, **settings)),
    )
    whole = sorted(total - left_out for left_out, total in reported(new_log()))
    assert whole[1] > whole[0] >= 2
    assert whole[1] >= 4
    assert difference(alone, with_lora) > 0


def test_cores_easy_cache_leaves_steps_out_of_our_model(latents, new_log, server):
    if not server.get_json("/object_info/EasyCache"):
        pytest.skip("this ComfyUI has no EasyCache")
    graph = Graph()
    easy = graph.add(
        "EasyCache", model=graph.model, reuse_threshold=0.3, start_percent=0.15, end_percent=0.95, verbose=False
    )
    plain, fast = latents(graph, graph.ernie_sampler(steps=MANY), graph.ernie_sampler(steps=MANY, model=easy))
    ((left_out, total),) = re.findall(r"EasyCache - skipped (\d+)/(\d+) steps", new_log())
    assert int(total) == MANY
    assert 0 < int(left_out) < MANY
    assert fast.isfinite().all()
    assert difference(plain, fast) > 0


@pytest.mark.parametrize("with_cache", [False, True], ids=["alone", "with our cache"])
def test_a_block_patch_of_another_pack_acts_on_our_model(with_cache, latents, new_log):
    graph = Graph()
    patched = graph.add("LeaveBlockOut", model=graph.model, block=1)
    plain, found = latents(
        graph,
        graph.ernie_sampler(),
        graph.ernie_sampler(model=cached(graph, model=patched) if with_cache else patched),
    )
    calls = re.findall(r"block patch: call (\d+), (left out|run)", new_log())
    assert len(calls) >= 5  # cond and uncond in one batch or apart, by the host's memory
    assert {what for _, what in calls} == {"left out", "run"}
    assert difference(plain, found) > 1e-3
