"""Core's own ERNIE-Image classes, at the miniature's size, next to ours: the same numbers from the same files.

tests/support/core_loaders.py gives ComfyUI nodes that build core's MODEL, CLIP and VAE from the files that our loaders
read; users meet the same pairs when they mix core's loaders with our nodes.
"""

from __future__ import annotations

from pathlib import Path

import core_loaders
import pytest
from comfyui_server import read_version
from host_graph import Graph, difference

pytestmark = pytest.mark.host

SAME = 1e-3  # fp32; two implementations, differences summed over the steps
SAME_PIXELS = 2e-2  # of [0, 1]; the autoencoders add another epsilon to the variance of the latent


@pytest.fixture(scope="module")
def server(comfyui_folder, start_comfyui):
    """A ComfyUI with nodes that load core's classes; hides the server of the other tests."""
    classes = (comfyui_folder / "comfy" / "supported_models.py").read_text(encoding="utf-8")
    if "class ErnieImage(" not in classes:
        version = ".".join(map(str, read_version(comfyui_folder)))
        pytest.skip(f"ComfyUI {version} has no ERNIE-Image model of its own")
    with start_comfyui(Path(core_loaders.__file__)) as server:
        yield server


def core_model(graph):
    return graph.add("CoreModel", file="ernie-image.safetensors")


@pytest.fixture
def core_clip(server):
    """Add core's CLIP to a graph; skips where core cannot read the vocabulary."""
    file = server.base / "models" / "text_encoders" / "ministral-3-3b.safetensors"
    if b'"special_tokens"' not in file.read_bytes():
        pytest.skip("core cannot read the vocabulary of the model with random weights; the trained one is not there")
    return lambda graph: graph.add("CoreClip", file=file.name)


def core_vae(graph):
    return graph.add("CoreVae", file="flux2-vae.safetensors")


def plain_clip(graph):
    return graph.add("ErnieLoadTextEncoder", encoder_name="ministral-3-3b.safetensors", rope="plain")


def encode(graph, clip, text):
    return graph.add("CLIPTextEncode", clip=clip, text=text)


@pytest.mark.parametrize("shift", [4.0, 3.0], ids=["our shift", "core's shift"])
def test_our_sampler_samples_cores_model_as_ours(shift, latents):
    graph = Graph()
    core, ours = latents(
        graph, graph.ernie_sampler(model=core_model(graph), shift=shift), graph.ernie_sampler(shift=shift)
    )
    assert difference(core, ours) < SAME


def test_ksampler_samples_our_model_as_cores(latents):
    """Only the shift that the model brings along differs."""
    graph = Graph()
    shifted = graph.add("ModelSamplingSD3", model=core_model(graph), shift=4.0)
    core, ours = latents(graph, graph.ksampler(model=shifted), graph.ksampler())
    assert difference(core, ours) < SAME


def test_cores_model_takes_a_non_square_latent_of_ours(latents):
    graph = Graph()
    graph.latent = graph.add("ErnieEmptyLatent", size="custom", width=128, height=80, batch_size=2)
    core, ours = latents(graph, graph.ernie_sampler(model=core_model(graph)), graph.ernie_sampler())
    assert core.shape == (2, 128, 5, 8)
    assert difference(core, ours) < SAME


def test_cores_vae_decodes_our_latent_to_the_same_picture(images):
    graph = Graph()
    latent = graph.ernie_sampler()
    core, ours = images(
        graph,
        graph.add("VAEDecode", samples=latent, vae=core_vae(graph)),
        graph.add("VAEDecode", samples=latent, vae=graph.vae),
    )
    assert ours.std() > 1e-2, "the picture is one colour"
    assert (core - ours).abs().max() <= SAME_PIXELS


def test_cores_vae_encodes_a_picture_to_the_same_latent(latents):
    graph = Graph()
    picture = graph.add("VAEDecode", samples=graph.ernie_sampler(), vae=graph.vae)
    core, ours = latents(
        graph,
        graph.add("VAEEncode", pixels=picture, vae=core_vae(graph)),
        graph.add("VAEEncode", pixels=picture, vae=graph.vae),
    )
    assert difference(core, ours) < SAME


def test_cores_text_features_are_our_plain_ones(latents, core_clip):
    """Core leaves YaRN out, so only `plain` gives its numbers; the tokens are the same either way."""
    graph = Graph()
    text = "a large red star, 12 small blue rings"
    core, plain, yarn = latents(
        graph,
        *(
            graph.add("ConditioningNumbers", conditioning=encode(graph, clip, text))
            for clip in (core_clip(graph), plain_clip(graph), graph.clip)
        ),
    )
    assert core.shape == plain.shape == yarn.shape
    assert core.isfinite().all()
    assert difference(core, plain) < SAME
    assert difference(core, yarn) > 0


def test_our_sampler_takes_cores_conditioning(latents, core_clip):
    graph = Graph()
    pairs = [
        {"positive": encode(graph, clip, "a red star"), "negative": encode(graph, clip, "")}
        for clip in (core_clip(graph), plain_clip(graph))
    ]
    core, plain, whole = latents(
        graph,
        graph.ernie_sampler(**pairs[0]),
        graph.ernie_sampler(**pairs[1]),
        graph.ernie_sampler(model=core_model(graph), **pairs[0]),
    )
    assert difference(core, plain) < SAME
    assert difference(whole, plain) < SAME
