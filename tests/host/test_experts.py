"""Experts in a running ComfyUI: our samplers and core's, LoRAs and whole models, what is evaluated and what is left."""

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
from ernie_pack.ernie_core.weights.checkpoint import read_component, save_single_file
from ernie_pack.ernie_core.weights.lora import weight_shapes
from host_graph import STEPS, Graph, difference
from lora_dialects import random_lora
from safetensors.torch import save_file

pytestmark = pytest.mark.host

SAME = 1e-3  # fp32; summed over the steps
EXPERT = {"start": 1.0, "end": 0.7, "lora_name": "none", "strength": 0.3, "cfg": -1.0}
HIGH = {"lora_name": "expert_a.safetensors"}
LOW = {"start": 0.7, "end": 0.0, "lora_name": "expert_b.safetensors"}
LEVELS = make_sigmas(STEPS)[:-1].tolist()
OTHER = "other.safetensors"

new_seeds = itertools.count(2000)


@pytest.fixture(scope="module")
def server(has_core_model, start_comfyui):
    """A ComfyUI with two experts' LoRAs, a second checkpoint, and nodes that count calls; hides the others' server."""
    packs = [call_log, core_loaders] if has_core_model else [call_log]
    with start_comfyui(*(Path(pack.__file__) for pack in packs)) as server:
        models = server.base / "models"
        component = read_component(models / "diffusion_models" / "ernie-image.safetensors", "transformer")
        shapes = weight_shapes(component.state_dict)
        for i, name in enumerate("ab"):
            save_file(random_lora(shapes, rank=2, seed=i), models / "loras" / f"expert_{name}.safetensors")
        generator = torch.Generator().manual_seed(0)
        state = {k: v + 0.02 * torch.randn(v.shape, generator=generator).to(v) for k, v in component.state_dict.items()}
        other = type(component)(kind="transformer", config=component.config, state_dict=state, source=component.source)
        save_single_file(other, models / "diffusion_models" / OTHER)
        yield server


def mix(graph, *changes, model=None, blend=0.0):
    chain = {}
    for change in changes:
        chain = {"experts": graph.add("ErnieExpert", **EXPERT | chain | change)}
    return graph.add("ErnieMixExperts", model=model or graph.model, blend=blend, **chain)


def load_other(graph):
    return graph.add("ErnieLoadDiffusionModel", model_name=OTHER, weight_dtype="fp32")


def calls(log):
    """(predictions, noise level) of every model call in a log."""
    return [(names, float(level)) for names, level in re.findall(r"model call \[([\d, ]+)\] at ([\d.]+)", log)]


def test_the_same_expert_everywhere_is_the_plain_model_to_the_bit(latents):
    graph = Graph()
    whole = {"strength": 0.3, "blocks": "", "start": 1.0, "end": 0.0, "allow_unmatched": False}
    lora = graph.add("ErnieLoadLora", model=graph.model, lora_name="expert_a.safetensors", **whole)
    low_a = LOW | {"lora_name": "expert_a.safetensors"}
    plain, same_cfg, same_model, with_lora, same_lora = latents(
        graph,
        graph.ernie_sampler(),
        graph.ernie_sampler(model=mix(graph, {"cfg": 4.0}, {"start": 0.7, "end": 0.0, "cfg": 4.0})),
        graph.ernie_sampler(model=mix(graph, {"model": graph.model}, {"start": 0.7, "end": 0.0, "model": graph.model})),
        graph.ernie_sampler(model=lora),
        graph.ernie_sampler(model=mix(graph, HIGH, low_a)),
    )
    assert torch.equal(same_cfg, plain)
    assert torch.equal(same_model, plain)
    assert torch.equal(same_lora, with_lora)


CHAINS = {
    "loras": ([HIGH, LOW], 0.0),
    "loras blended": ([HIGH, LOW], 0.2),
    "cfg": ([{"cfg": 1.0}, LOW | {"cfg": 6.0}], 0.0),
    "a gap": ([{"end": 0.9, **HIGH}, LOW | {"start": 0.5}], 0.0),
    "a model": ([{"model": OTHER}], 0.0),
    "a model below": ([{"start": 0.7, "end": 0.0, "model": OTHER, "cfg": 2.0}], 0.0),
    "models blended": ([{"model": OTHER}], 0.3),
}


@pytest.mark.parametrize(("chain", "blend"), CHAINS.values(), ids=CHAINS)
def test_both_samplers_mix_as_standalone_does(latents, standalone_latent, new_log, chain, blend):
    graph = Graph()
    other = load_other(graph)
    model = mix(graph, *(c | ({"model": other} if "model" in c else {}) for c in chain), blend=blend)
    link = graph.ernie_sampler(model=model)
    wanted = standalone_latent(graph, link)
    plain, ours, core = latents(graph, graph.ernie_sampler(), link, graph.ksampler(model=model))
    assert difference(ours, wanted) < SAME
    assert difference(core, wanted) < SAME
    assert difference(ours, plain) > 10 * SAME
    assert "WARNING" not in new_log()


def test_guidance_on_the_mixture_acts_on_every_expert(latents, standalone_latent):
    graph = Graph()
    rules = {"method": "apg", "start": 1.0, "end": 0.0, "rescale": 0.5, "skip_similarity": 1.0}
    rules |= {"eta": 0.0, "momentum": -0.5, "norm_threshold": 0.0, "zero_steps": 0}
    mixture = mix(graph, {"model": load_other(graph)})
    link = graph.ernie_sampler(model=graph.add("ErnieGuidance", model=mixture, **rules))
    wanted = standalone_latent(graph, link)
    ours, unguided = latents(graph, link, graph.ernie_sampler(model=mixture))
    assert difference(ours, wanted) < SAME
    assert difference(ours, unguided) > 10 * SAME


def test_style_statistics_on_the_mixture_act_on_every_expert_and_an_experts_own_are_named(
    latents, standalone_latent, new_log
):
    graph = Graph()
    reference = {"latent": graph.ernie_sampler(seed=11), "strength": 0.7, "start": 1.0, "end": 0.6}

    def restyle(model):
        return graph.add("ErnieStyleStatistics", model=model, **reference)

    other = load_other(graph)
    mixture = mix(graph, {"model": other})
    link = graph.ernie_sampler(model=restyle(mixture))
    wanted = standalone_latent(graph, link)
    ours, plain = latents(graph, link, graph.ernie_sampler(model=mixture))
    assert difference(ours, wanted) < SAME
    assert difference(ours, plain) > 10 * SAME
    assert "style statistics on the model of the expert" not in new_log()
    (own,) = latents(graph, graph.ernie_sampler(model=mix(graph, {"model": restyle(other)})))
    assert difference(own, plain) < SAME
    assert "style statistics on the model of the expert for noise levels 1 to 0.7 are not used" in new_log()


@pytest.mark.parametrize("sampler", ["ours", "core"])
def test_one_expert_per_step_and_no_negative_where_cfg_is_1(latents, new_log, sampler):
    graph = Graph()
    base, other = (graph.add("LogCalls", model=m) for m in (graph.model, load_other(graph)))
    model = mix(graph, {"model": other, "cfg": 1.0}, model=base)
    paint = graph.ernie_sampler if sampler == "ours" else graph.ksampler
    latents(graph, paint(model=model, seed=next(new_seeds)))
    made = calls(new_log())
    assert sum(len(kind.split(", ")) for kind, _ in made) == sum(1 if s > 0.7 else 2 for s in LEVELS)


def test_the_base_is_itself_again_afterwards(latents):
    graph = Graph()
    other = load_other(graph)
    again = graph.add("RepeatLatentBatch", samples=graph.latent, amount=1)  # another node, so nothing is cached
    before, _, after = latents(
        graph,
        graph.ernie_sampler(),
        graph.ernie_sampler(model=mix(graph, {"model": other}, LOW)),
        graph.ernie_sampler(latent_image=again),
    )
    assert torch.equal(before, after)


def test_on_cores_model_they_act_as_on_ours(latents, has_core_model):
    if not has_core_model:
        pytest.skip("this ComfyUI has no ERNIE-Image model of its own")
    graph = Graph()
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    theirs, ours = latents(
        graph, *(graph.ernie_sampler(model=mix(graph, HIGH, LOW, model=m)) for m in (core, graph.model))
    )
    assert difference(theirs, ours) < SAME


def test_what_cannot_be_is_said_before_sampling(server):
    graph = Graph()
    link = graph.ernie_sampler(model=mix(graph, HIGH, {"start": 0.8}))
    graph.add("SaveLatent", samples=link, filename_prefix="test/never")
    with pytest.raises(HostError, match=r"two experts claim the noise levels 0\.8 to 0\.7"):
        server.run(graph.prompt)
