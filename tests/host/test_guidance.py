"""Guidance in a running ComfyUI: our samplers and core's, our model and core's; calls that are saved are not made."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import call_log
import core_loaders
import pytest
import torch
from comfyui_server import HostError
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from host_graph import STEPS, Graph, difference

pytestmark = pytest.mark.host

SAME = 1e-3  # fp32; summed over the steps
NEUTRAL = {
    "method": "cfg",
    "start": 1.0,
    "end": 0.0,
    "rescale": 0.0,
    "skip_similarity": 1.0,
    "eta": 0.0,
    "momentum": 0.0,
    "norm_threshold": 0.0,
    "zero_steps": 0,
}
SETTINGS = {
    "interval": {"start": 0.97, "end": 0.6},
    "rescale": {"rescale": 0.7},
    "skip": {"skip_similarity": 0.97},
    "apg": {"method": "apg", "norm_threshold": 0.3},
    "zero star": {"method": "cfg-zero*", "zero_steps": 1},
    "all": {"method": "apg", "start": 0.97, "end": 0.3, "rescale": 0.5, "skip_similarity": 0.99},
}
SLG = {"scale": 1.5, "blocks": "1", "start": 1.0, "end": 0.6}


@pytest.fixture(scope="module")
def server(has_core_model, start_comfyui):
    """A ComfyUI with nodes that count calls and load core's classes; hides the server of the other tests."""
    packs = [call_log, core_loaders] if has_core_model else [call_log]
    with start_comfyui(*(Path(pack.__file__) for pack in packs)) as server:
        yield server


def guide(graph, model=None, **changes):
    return graph.add("ErnieGuidance", model=model or graph.model, **NEUTRAL | changes)


def slg(graph, model=None, **changes):
    return graph.add("ErnieSkipLayerGuidance", model=model or graph.model, **SLG | changes)


def calls(log):
    """(which predictions, noise level in thousandths) of every model call in a log."""
    found = re.findall(r"model call \[([\d, ]+)\] at ([\d.]+)", log)
    return [(kind, float(level)) for names, level in found for kind in names.split(", ")]


def count(log):
    made = [kind for kind, _ in calls(log)]
    return made.count("0"), made.count("1")


def test_neutral_settings_give_the_same_picture_bit_for_bit(latents):
    graph = Graph()
    neutral = slg(graph, guide(graph), scale=0.0)
    plain, ours, core, core_plain = latents(
        graph,
        graph.ernie_sampler(),
        graph.ernie_sampler(model=neutral),
        graph.ksampler(model=neutral),
        graph.ksampler(),
    )
    assert torch.equal(plain, ours)
    assert torch.equal(core, core_plain)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_both_samplers_guide_as_standalone_does(latents, standalone_latent, changes):
    graph = Graph()
    model = guide(graph, **changes)
    link = graph.ernie_sampler(model=model)
    wanted = standalone_latent(graph, link)
    plain, ours, core = latents(graph, graph.ernie_sampler(), link, graph.ksampler(model=model))
    assert difference(ours, wanted) < SAME
    assert difference(core, wanted) < SAME
    assert difference(ours, plain) > 10 * SAME


def test_skip_layer_guidance_is_standalones(latents, standalone_latent):
    graph = Graph()
    link = graph.ernie_sampler(model=slg(graph))
    wanted = standalone_latent(graph, link)
    plain, ours, sigmas = latents(
        graph,
        graph.ernie_sampler(),
        link,
        graph.custom_sampler(graph.add("ErnieSigmas", steps=STEPS, shift=4.0, denoise=1.0), model=slg(graph)),
    )
    assert difference(ours, wanted) < SAME
    assert difference(sigmas, wanted) < SAME
    assert difference(ours, plain) > 10 * SAME


def negative(graph, model=None, **changes):
    text = graph.add("ErnieEncodePrompt", clip=graph.clip, prompt="a small blue circle at the top left")
    settings = {"scale": 3.0, "start": 1.0, "end": 0.0, "tau": 2.5, "alpha": 0.25} | changes
    return graph.add("ErnieNegativeForTurbo", model=model or graph.model, negative=text, **settings)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_negative_prompt_in_the_attention_is_standalones(latents, standalone_latent, cfg):
    graph = Graph()
    model = negative(graph)
    link = graph.ernie_sampler(model=model, cfg=cfg)
    wanted = standalone_latent(graph, link)
    plain, ours, core, neutral = latents(
        graph,
        graph.ernie_sampler(cfg=cfg),
        link,
        graph.ksampler(model=model, cfg=cfg),
        graph.ernie_sampler(model=negative(graph, scale=1.0), cfg=cfg),
    )
    assert difference(ours, wanted) < SAME
    assert difference(core, wanted) < SAME
    assert difference(ours, plain) > 10 * SAME
    assert torch.equal(neutral, plain)


def test_prompts_of_one_length_share_a_call_and_only_the_prompt_is_pushed(latents, standalone_latent):
    """Core puts equally long prompts into one batch; the negative in the attention is the prompt's alone."""
    graph = Graph()
    graph.negative = graph.add("ErnieEncodePrompt", clip=graph.clip, prompt="a red ring")
    link = graph.ernie_sampler(model=negative(graph, start=0.97, end=0.6))
    wanted = standalone_latent(graph, link)
    assert difference(latents(graph, link)[0], wanted) < SAME


def test_cores_network_has_no_place_for_it_and_says_so(server, has_core_model):
    if not has_core_model:
        pytest.skip("this ComfyUI has no ERNIE-Image model of its own")
    graph = Graph()
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    graph.add("SaveLatent", samples=graph.ernie_sampler(model=negative(graph, core)), filename_prefix="test/core")
    with pytest.raises(HostError, match="this is ComfyUI's own"):
        server.run(graph.prompt)


def test_on_cores_model_all_of_it_acts_as_on_ours(latents, has_core_model):
    if not has_core_model:
        pytest.skip("this ComfyUI has no ERNIE-Image model of its own")
    graph = Graph()
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    theirs, ours = latents(
        graph, *(graph.ernie_sampler(model=slg(graph, guide(graph, m, **SETTINGS["all"]))) for m in (core, graph.model))
    )
    assert difference(theirs, ours) < SAME


def vary(graph, model=None, **changes):
    settings = {"strength": 1.0, "start": 0.9, "end": 0.6, "rescale": 1.0} | changes
    return graph.add("ErnieSeedVariety", model=model or graph.model, **settings)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_seed_variety_is_standalones(latents, standalone_latent, cfg):
    graph = Graph()
    link = graph.ernie_sampler(model=vary(graph), cfg=cfg)
    wanted = standalone_latent(graph, link)
    plain, ours, core, neutral, below = latents(
        graph,
        graph.ernie_sampler(cfg=cfg),
        link,
        graph.ksampler(model=vary(graph), cfg=cfg),
        graph.ernie_sampler(model=vary(graph, strength=0.0), cfg=cfg),
        graph.ernie_sampler(model=vary(graph, end=1.0, start=1.0), cfg=cfg),
    )
    assert difference(ours, wanted) < SAME
    assert difference(core, wanted) < SAME
    assert difference(ours, plain) > 10 * SAME
    assert torch.equal(neutral, plain)
    assert torch.equal(below, plain)


def test_seed_variety_of_a_batch_is_that_of_its_pictures(latents):
    """KSampler knows a picture's place in its batch by the noise only."""
    graph = Graph()
    four = graph.add("ErnieEmptyLatent", size="custom", width=64, height=64, batch_size=3)
    third = graph.add("LatentFromBatch", samples=four, batch_index=2, length=1)
    model = vary(graph)
    batch, alone, core = latents(
        graph,
        graph.ernie_sampler(model=model, latent_image=four),
        graph.ernie_sampler(model=model, latent_image=third),
        graph.ksampler(model=model, latent_image=third),
    )
    assert difference(batch[2:], alone) < SAME
    assert difference(core, alone) < SAME
    assert difference(batch[:1], batch[1:2]) > 10 * SAME


def test_seed_variety_acts_on_cores_model_as_on_ours(latents, has_core_model):
    if not has_core_model:
        pytest.skip("this ComfyUI has no ERNIE-Image model of its own")
    graph = Graph()
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    theirs, ours = latents(graph, *(graph.ernie_sampler(model=vary(graph, m)) for m in (core, graph.model)))
    assert difference(theirs, ours) < SAME


def test_patches_act_together_and_with_experts(latents, standalone_latent):
    """Variety, a negative prompt, guidance and a step cache on a mixture whose lower expert is another cfg."""
    graph = Graph()
    model = vary(graph, guide(graph, negative(graph), rescale=0.5))
    model = graph.add("ErnieStepCache", model=model, threshold=0.2, start=1.0, end=0.0, max_skips=1)
    expert = graph.add("ErnieExpert", start=0.8, end=0.0, lora_name="none", strength=1.0, cfg=2.0)
    link = graph.ernie_sampler(model=graph.add("ErnieMixExperts", model=model, experts=expert, blend=0.0))
    wanted = standalone_latent(graph, link)
    ours, alone = latents(graph, link, graph.ernie_sampler(model=model))
    assert difference(ours, wanted) < SAME
    assert difference(ours, alone) > 10 * SAME


new_seeds = itertools.count(1000)  # ComfyUI answers a graph that it knows without running it
LEVELS = make_sigmas(STEPS)[:-1].tolist()


@pytest.mark.parametrize(
    ("changes", "cond", "uncond"),
    [
        ({}, STEPS, STEPS),
        (SETTINGS["interval"], STEPS, sum(0.6 < s <= 0.97 for s in LEVELS)),
        ({"start": 0.5, "end": 0.5}, STEPS, 0),
        ({"skip_similarity": 0.0}, STEPS, 1),
        ({"method": "cfg-zero*", "zero_steps": 2}, STEPS - 2, STEPS - 2),
    ],
    ids=["plain", "interval", "never", "skip", "zero steps"],
)
@pytest.mark.parametrize("sampler", ["ours", "core"])
def test_what_is_skipped_is_not_computed(latents, new_log, changes, cond, uncond, sampler):
    graph = Graph()
    model = graph.add("LogCalls", model=guide(graph, **changes))
    paint = graph.ernie_sampler if sampler == "ours" else graph.ksampler
    latents(graph, paint(model=model, seed=next(new_seeds)))
    assert count(new_log()) == (cond, uncond)


def test_skip_layer_guidance_costs_a_call_in_its_range_only(latents, new_log):
    graph = Graph()
    model = graph.add("LogCalls", model=slg(graph))
    latents(graph, graph.ernie_sampler(model=model, seed=77))
    assert count(new_log()) == (STEPS + sum(s > 0.6 for s in LEVELS), STEPS)


def test_nothing_is_left_from_one_run_to_the_next(latents):
    graph = Graph()
    model = guide(graph, **SETTINGS["all"])
    settings = graph.ernie_sampler(model=model)
    again = graph.add("RepeatLatentBatch", samples=graph.latent, amount=1)  # another node, so nothing is cached
    first, second = latents(graph, settings, graph.ernie_sampler(model=model, latent_image=again))
    assert torch.equal(first, second)


def test_a_foreign_formula_is_named_when_it_gives_way_and_kept_where_it_can_be(latents, new_log):
    graph = Graph()
    foreign = graph.add("RescaleCFG", model=graph.model, multiplier=0.7)
    kept = guide(graph, foreign, start=1.0, end=0.6)
    only, both, replaced, alone = latents(
        graph,
        graph.ernie_sampler(model=foreign),
        graph.ernie_sampler(model=kept),
        graph.ernie_sampler(model=guide(graph, foreign, rescale=0.5)),
        graph.ernie_sampler(model=guide(graph, rescale=0.5)),
    )
    assert difference(only, both) > SAME
    assert torch.equal(replaced, alone)
    warnings = [line for line in new_log().splitlines() if "The guidance of" in line]
    assert len(warnings) == 1
    assert "nodes_model_advanced.RescaleCFG.patch on this model" in warnings[0]


def test_wrong_settings_say_so(server):
    graph = Graph()
    graph.add("SaveLatent", samples=graph.ernie_sampler(model=slg(graph, blocks="99")), filename_prefix="test/bad")
    with pytest.raises(HostError, match="there is no block 99"):
        server.run(graph.prompt)
