"""Editing on a real ComfyUI: neutral settings are exact, and core's own ERNIE model is edited as ours."""

from pathlib import Path

import core_loaders
import pytest
import torch
from comfyui_server import read_version
from host_graph import CFG, STEPS, Graph, difference

pytestmark = pytest.mark.host

SAME = 1e-3  # fp32; two implementations, differences summed over the steps


def edit(graph, model=None, **changes):
    settings = {
        "source": graph.positive,
        "target": graph.add("ErnieEncodePrompt", clip=graph.clip, prompt="a blue star"),
    }
    settings |= {"latent": graph.ernie_sampler(), "method": "flow edit", "strength": 0.8, "steps": STEPS, "cfg": CFG}
    settings |= {"source_cfg": 1.5, "shift": 4.0, "seed": 1, "repeat": 1, "negative": graph.negative}
    return graph.add("ErnieEditWords", model=model or graph.model, **settings | changes)


def vary(graph, model=None, **changes):
    settings = {"positive": graph.positive, "latent": graph.ernie_sampler(), "strength": 0.3, "steps": STEPS}
    settings |= {"cfg": CFG, "shift": 4.0, "seed": 1, "iterations": 1, "negative": graph.negative}
    return graph.add("ErnieVariation", model=model or graph.model, **settings | changes)


def test_neutral_settings_give_the_picture_back(latents):
    graph = Graph()
    same = {"target": graph.positive, "source_cfg": CFG}
    picture, *edited = latents(
        graph,
        graph.ernie_sampler(),
        edit(graph, strength=0.0),
        edit(graph, **same),
        vary(graph, strength=0.0),
    )
    assert all(torch.equal(each, picture) for each in edited)


def test_edits_change_the_picture(latents):
    graph = Graph()
    picture, *edited = latents(graph, graph.ernie_sampler(), edit(graph), edit(graph, method="inversion"), vary(graph))
    assert all(difference(each, picture) > 1e-2 for each in edited)


def test_guidance_rules_act_on_each_prompt_by_itself(latents):
    """Rules that remember: with equal prompts nothing may change, so the two must not share what they remember."""
    graph = Graph()
    model = graph.add(
        "ErnieGuidance",
        **{"model": graph.model, "method": "apg", "start": 1.0, "end": 0.0, "rescale": 0.3, "skip_similarity": 1.0},
        **{"eta": 0.5, "momentum": -0.5, "norm_threshold": 0.0, "zero_steps": 0},
    )
    plain = edit(graph)
    picture, same, ruled, bare = latents(
        graph,
        graph.ernie_sampler(),
        edit(graph, model, target=graph.positive, source_cfg=CFG),
        edit(graph, model),
        plain,
    )
    assert torch.equal(same, picture)
    assert difference(ruled, bare) > 1e-3


def test_the_noise_of_a_picture_goes_into_cores_sampler(latents):
    graph = Graph()
    first = graph.add("RandomNoise", noise_seed=1)

    def paint(noise):
        guider = graph.add("CFGGuider", model=graph.model, positive=graph.positive, negative=graph.negative, cfg=CFG)
        return graph.add(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=graph.add("KSamplerSelect", sampler_name="euler"),
            sigmas=graph.add("ErnieSigmas", steps=STEPS, shift=4.0, denoise=1.0),
            latent_image=graph.latent,
        )

    found = graph.add(
        "ErnieInvertPicture",
        **{
            "model": graph.model,
            "latent": graph.ernie_sampler(),
            "positive": graph.positive,
            "negative": graph.negative,
        },
        **{"steps": STEPS, "cfg": CFG, "shift": 4.0, "iterations": 1},
    )
    mixed = graph.add("ErnieMixNoise", first=first, second=found, strength=0.0)
    plain, same, other = latents(graph, paint(first), paint(mixed), paint(found))
    assert torch.equal(plain, same)
    assert difference(other, plain) > 1e-2


@pytest.fixture(scope="module")
def knows_ernie(comfyui_folder):
    """Whether the ComfyUI under test has an ERNIE-Image model of its own."""
    return "class ErnieImage(" in (comfyui_folder / "comfy" / "supported_models.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(knows_ernie, start_comfyui):
    """A ComfyUI with nodes that load core's classes, where it has any."""
    with start_comfyui(*([Path(core_loaders.__file__)] if knows_ernie else [])) as server:
        yield server


def test_cores_model_is_edited_as_ours(latents, knows_ernie, comfyui_folder):
    if not knows_ernie:
        version = ".".join(map(str, read_version(comfyui_folder)))
        pytest.skip(f"ComfyUI {version} has no ERNIE-Image model of its own")
    graph = Graph()
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    for node in (edit, vary):
        theirs, ours = latents(graph, node(graph, core), node(graph))
        assert difference(theirs, ours) < SAME


def restyle(graph, model=None, **changes):
    reference = graph.ernie_sampler(seed=11, positive=graph.add("ErnieEncodePrompt", clip=graph.clip, prompt="a tree"))
    settings = {"latent": reference, "strength": 0.7, "start": 1.0, "end": 0.6}
    return graph.add("ErnieStyleStatistics", model=model or graph.model, **settings | changes)


def test_style_statistics_of_strength_0_are_exact(latents):
    graph = Graph()
    neutral = restyle(graph, strength=0.0)
    plain, ours, core_plain, core = latents(
        graph,
        graph.ernie_sampler(),
        graph.ernie_sampler(model=neutral),
        graph.ksampler(),
        graph.ksampler(model=neutral),
    )
    assert torch.equal(plain, ours)
    assert torch.equal(core_plain, core)


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_both_samplers_move_towards_a_reference_as_standalone_does(latents, standalone_latent, cfg):
    graph = Graph()
    model = restyle(graph, restyle(graph, strength=0.3, end=0.0))
    link = graph.ernie_sampler(model=model, cfg=cfg)
    wanted = standalone_latent(graph, link)
    plain, ours, core = latents(graph, graph.ernie_sampler(cfg=cfg), link, graph.ksampler(model=model, cfg=cfg))
    assert difference(ours, wanted) < SAME
    assert difference(core, wanted) < SAME
    assert difference(ours, plain) > 10 * SAME


def test_cores_model_takes_style_statistics(latents, knows_ernie, comfyui_folder):
    if not knows_ernie:
        version = ".".join(map(str, read_version(comfyui_folder)))
        pytest.skip(f"ComfyUI {version} has no ERNIE-Image model of its own")
    graph = Graph()
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    # Both get the same noise levels: core's model carries a shift of its own, which KSampler would follow.
    sigmas = graph.add("ErnieSigmas", steps=STEPS, shift=4.0, denoise=1.0)
    theirs, ours, plain = latents(
        graph,
        graph.custom_sampler(sigmas, model=restyle(graph, core)),
        graph.custom_sampler(sigmas, model=restyle(graph)),
        graph.custom_sampler(sigmas, model=core),
    )
    assert difference(theirs, plain) > 10 * SAME
    assert difference(theirs, ours) < SAME
