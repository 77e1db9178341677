"""Tiled sampling on a real ComfyUI: exact where the picture fits, alike with every sampler, on our model and core's."""

from pathlib import Path

import core_loaders
import pytest
import torch
from comfyui_server import read_version
from host_graph import SIDE_PX, STEPS, Graph, difference

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


def large(graph):
    return graph.add("ErnieEmptyLatent", size="custom", width=2 * SIDE_PX, height=SIDE_PX, batch_size=2)


def tiled(graph, *, tile=SIDE_PX, overlap=32, model=None):
    return graph.add("ErnieTiledSampling", model=model or graph.model, tile=tile, overlap=overlap)


def test_what_fits_one_tile_is_bit_equal(latents):
    graph = Graph()
    model = tiled(graph)
    ours, ours_tiled, core, core_tiled = latents(
        graph,
        graph.ernie_sampler(),
        graph.ernie_sampler(model=model),
        graph.ksampler(),
        graph.ksampler(model=model),
    )
    assert torch.equal(ours, ours_tiled)
    assert torch.equal(core, core_tiled)


def test_large_pictures_are_alike_with_every_sampler(latents):
    graph = Graph()
    model, latent = tiled(graph), large(graph)
    sigmas = graph.add("ErnieSigmas", steps=STEPS, shift=4.0, denoise=1.0)
    ours, core, custom, whole = latents(
        graph,
        graph.ernie_sampler(model=model, latent_image=latent),
        graph.ksampler(model=model, latent_image=latent),
        graph.custom_sampler(sigmas, model=model, latent_image=latent),
        graph.ernie_sampler(latent_image=latent),
    )
    assert difference(ours, core) < 1e-5
    assert difference(ours, custom) < 1e-5
    assert difference(ours, whole) > 1e-2


def test_cores_model_is_tiled_alike(knows_ernie, comfyui_folder, latents):
    if not knows_ernie:
        version = ".".join(map(str, read_version(comfyui_folder)))
        pytest.skip(f"ComfyUI {version} has no ERNIE-Image model of its own")
    graph = Graph()
    latent = large(graph)
    core = graph.add("CoreModel", file="ernie-image.safetensors")
    one, other = latents(
        graph,
        graph.ernie_sampler(model=tiled(graph), latent_image=latent),
        graph.ernie_sampler(model=tiled(graph, model=core), latent_image=latent),
    )
    assert difference(one, other) < 1e-4


def test_tiles_compose_with_caches_areas_and_guidance(latents):
    """Nothing may mix two tiles: caches that leave nothing out change nothing."""
    graph = Graph()
    model, latent = tiled(graph), large(graph)
    cached = graph.add("ErnieStepCache", model=model, threshold=0.0001, start=1.0, end=0.0, max_skips=3)
    easy = graph.add("EasyCache", model=model, reuse_threshold=0.0, start_percent=0.15, end_percent=0.95, verbose=False)
    area = graph.add(
        "ConditioningSetArea",
        conditioning=graph.positive,
        width=2 * SIDE_PX,
        height=SIDE_PX,
        x=0,
        y=0,
        strength=1.0,
    )
    skipped = graph.add("ErnieSkipLayerGuidance", model=model, blocks="0", scale=2.0, start=0.95, end=0.1)
    plain, with_cache, with_easy, with_area, pushed = latents(
        graph,
        graph.ksampler(model=model, latent_image=latent),
        graph.ksampler(model=cached, latent_image=latent),
        graph.ksampler(model=easy, latent_image=latent),
        graph.ksampler(model=model, latent_image=latent, positive=area),
        graph.ksampler(model=skipped, latent_image=latent),
    )
    assert torch.equal(plain, with_cache)
    assert difference(plain, with_easy) < 1e-5
    assert difference(plain, with_area) < 1e-5
    assert difference(plain, pushed) > 1e-3


def test_a_second_pass_starts_from_the_first(latents):
    graph = Graph()
    first = graph.ernie_sampler()
    up = graph.add("ErnieUpscaleLatent", latent=first, scale=2.0, method="bicubic")
    once = graph.add("ErnieUpscaleLatent", latent=first, scale=1.0, method="bicubic")
    second, same, before = latents(
        graph, graph.ernie_sampler(model=tiled(graph), latent_image=up, denoise=0.5), once, first
    )
    assert second.shape[2:] == (2 * before.shape[2], 2 * before.shape[3])
    assert torch.equal(same, before)
