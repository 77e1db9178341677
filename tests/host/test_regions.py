"""Regional prompts on a real ComfyUI: exact where nothing is regional, refused by a model that cannot do them."""

from pathlib import Path

import core_loaders
import pytest
import torch
from comfyui_server import HostError, read_version
from host_graph import Graph, difference

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def knows_ernie(comfyui_folder):
    """Whether the ComfyUI under test has an ERNIE-Image model of its own."""
    return "class ErnieImage(" in (comfyui_folder / "comfy" / "supported_models.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(knows_ernie, start_comfyui):
    """A ComfyUI with nodes that load core's classes, where it has any."""
    with start_comfyui(*([Path(core_loaders.__file__)] if knows_ernie else [])) as server:
        yield server


def regional(graph, *, width=64, strength=1.0):
    """The base prompt with another one on the left `width` pixels of 64."""
    dark = graph.add("SolidMask", value=0.0, width=64, height=64)
    part = graph.add("SolidMask", value=1.0, width=width, height=64)
    mask = graph.add("MaskComposite", destination=dark, source=part, x=0, y=0, operation="add")
    base = graph.add("ErnieEncodePrompt", clip=graph.clip, prompt="a small green circle on the right, mint background")
    return graph.add(
        "ErnieRegionalPrompt", conditioning=base, region=graph.positive, mask=mask, strength=strength
    ), base


def test_neutral_regions_are_plain_prompts_with_every_sampler(latents):
    graph = Graph()
    everywhere, base = regional(graph)
    nowhere, _ = regional(graph, strength=0.0)
    for sampler in (graph.ernie_sampler, graph.ksampler):
        one, plain, none, rest = latents(
            graph, sampler(positive=everywhere), sampler(), sampler(positive=nowhere), sampler(positive=base)
        )
        assert torch.equal(one, plain)
        assert torch.equal(none, rest)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_region_changes_the_picture_alike_with_both_samplers(latents, strength):
    graph = Graph()
    half, base = regional(graph, width=32, strength=strength)
    ours, core, plain, rest = latents(
        graph,
        graph.ernie_sampler(positive=half),
        graph.ksampler(positive=half),
        graph.ernie_sampler(),
        graph.ernie_sampler(positive=base),
    )
    assert difference(ours, core) < 1e-5
    assert difference(ours, plain) > 1e-2
    assert difference(ours, rest) > 1e-2


def test_cores_model_refuses_regions(server, knows_ernie, comfyui_folder):
    if not knows_ernie:
        version = ".".join(map(str, read_version(comfyui_folder)))
        pytest.skip(f"ComfyUI {version} has no ERNIE-Image model of its own")
    graph = Graph()
    half, _ = regional(graph, width=32)
    model = graph.add("CoreModel", file="ernie-image.safetensors")
    graph.add("SaveLatent", samples=graph.ksampler(model=model, positive=half), filename_prefix="test/refused")
    with pytest.raises(HostError, match="regional prompts need this pack's network"):
        server.run(graph.prompt)
