"""Inpainting on ComfyUI: as standalone does it, on our sampler and core's, our model and core's; neutral is plain."""

from __future__ import annotations

from pathlib import Path

import core_loaders
import pytest
import torch
from host_graph import STEPS, Graph, difference

pytestmark = pytest.mark.host

SAME = 1e-3  # fp32; summed over the steps
PREPARE = {"left": 0, "top": 0, "right": 0, "bottom": 0, "grow": 4, "feather": 8}
PREPARE |= {"fill": "original", "crop": False, "context": 8, "size": 0}
HARD = {"iterations": 2, "evidence": 0.5, "step": 0.5, "start": 1.0, "end": 0.0, "seed": 7}


@pytest.fixture(scope="module")
def has_core_model(comfyui_folder):
    return "class ErnieImage(" in (comfyui_folder / "comfy" / "supported_models.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(has_core_model, start_comfyui):
    """A ComfyUI with nodes that load core's classes; hides the server of the other tests."""
    with start_comfyui(*([Path(core_loaders.__file__)] if has_core_model else [])) as server:
        yield server


def masked(graph, **changes):
    image = graph.add("LoadImage", image="example.png")
    node = graph.add("ErnieInpaintPrepare", image=image, vae=graph.vae, mask=[image[0], 1], **PREPARE | changes)
    return [node[0], 0]


def hard(graph, model=None, **changes):
    return graph.add("ErnieHardInpaint", model=model or graph.model, **HARD | changes)


def test_every_sampler_inpaints_as_standalone_does(latents, standalone_latent):
    graph = Graph()
    start = masked(graph)
    plain, walked = (graph.ernie_sampler(latent_image=start, model=m) for m in (graph.model, hard(graph)))
    wanted_plain, wanted = standalone_latent(graph, plain), standalone_latent(graph, walked)
    sigmas = graph.add("ErnieSigmas", steps=STEPS, shift=4.0, denoise=1.0)
    ours_plain, ours, core, custom = latents(
        graph,
        plain,
        walked,
        graph.ksampler(model=hard(graph), latent_image=start),
        graph.custom_sampler(sigmas, model=hard(graph), latent_image=start),
    )
    assert difference(ours_plain, wanted_plain) < SAME
    for found in (ours, core, custom):
        assert difference(found, wanted) < SAME
    assert difference(ours, ours_plain) > 10 * SAME


def test_neutral_settings_and_latents_without_a_mask_are_plain_bit_for_bit(latents):
    graph = Graph()
    start = masked(graph)
    plain, neutral, nowhere, free_plain, free = latents(
        graph,
        graph.ernie_sampler(latent_image=start),
        graph.ernie_sampler(latent_image=start, model=hard(graph, iterations=0)),
        graph.ksampler(latent_image=start, model=hard(graph, start=0.5, end=0.5)),
        graph.ernie_sampler(),
        graph.ernie_sampler(model=hard(graph)),
    )
    assert torch.equal(plain, neutral)
    assert difference(plain, nowhere) < SAME
    assert torch.equal(free, free_plain)


def test_on_cores_model_it_acts_as_on_ours(latents, has_core_model):
    if not has_core_model:
        pytest.skip("this ComfyUI has no ERNIE-Image model of its own")
    graph = Graph()
    start = masked(graph)
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    theirs, ours = latents(
        graph, *(graph.ernie_sampler(latent_image=start, model=hard(graph, m)) for m in (core, graph.model))
    )
    assert difference(theirs, ours) < SAME


def test_differential_diffusion_and_guidance_act_inside(latents):
    graph = Graph()
    start = masked(graph, feather=48)
    soft = graph.add("DifferentialDiffusion", model=graph.model)
    both, only_hard, only_soft = latents(
        graph,
        graph.ernie_sampler(latent_image=start, model=hard(graph, soft)),
        graph.ernie_sampler(latent_image=start, model=hard(graph)),
        graph.ernie_sampler(latent_image=start, model=soft),
    )
    assert difference(both, only_hard) > SAME
    assert difference(both, only_soft) > SAME
