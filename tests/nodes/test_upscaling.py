"""Upscaling nodes: what reaches the host, and tiles on a miniature network through standalone."""

import importlib
import re

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.sampling.cache import StepCache
from ernie_pack.ernie_core.sampling.guidance import SkipLayers
from ernie_pack.ernie_core.sampling.latents import resize_latent
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.ernie_core.sampling.tiles import Tiles
from ernie_pack.standalone import host
from random_models import DIT, write_random_models

SMALL = Tiles(tile_px=64, overlap_px=32)


def test_the_settings_reach_the_host(run, recording):
    assert run("ErnieTiledSampling", model="MODEL", tile=512, overlap=128).result == ("MODEL",)
    assert recording.calls == [("set_tiles", "MODEL", Tiles(tile_px=512, overlap_px=128))]


@pytest.mark.parametrize(("tile", "overlap"), [(1000, 128), (512, 100), (512, 272)])
def test_tiles_off_the_grid_are_refused(run, recording, tile, overlap):
    with pytest.raises(ErnieError, match="multiples of 16 px"):
        run("ErnieTiledSampling", model="MODEL", tile=tile, overlap=overlap)
    assert not recording.calls


def upscale(run, latent, **changes):
    return run("ErnieUpscaleLatent", **{"latent": latent, "scale": 2.0, "method": "bicubic"} | changes).result[0]


def test_a_latent_is_resized_and_keeps_what_else_it_carries(run):
    samples = torch.randn(2, 128, 4, 6, generator=torch.Generator().manual_seed(0))
    latent = {"samples": samples, "batch_index": [3, 1], "noise_mask": torch.ones(1, 64, 96)}
    out = upscale(run, latent, scale=1.5, method="bilinear")
    assert torch.equal(out["samples"], resize_latent(samples, 6, 9, "bilinear"))
    assert (out["batch_index"], out["noise_mask"]) == (latent["batch_index"], latent["noise_mask"])
    assert upscale(run, latent, scale=1.0)["samples"] is samples
    assert not torch.equal(out["samples"], upscale(run, latent, scale=1.5)["samples"])


@pytest.mark.parametrize(
    ("samples", "changes", "message"),
    [
        (torch.zeros(1, 4, 8, 8), {}, "another model's"),
        (torch.full((1, 128, 2, 2), float("nan")), {}, "finite numbers"),
        (torch.zeros(1, 128, 2, 2), {"scale": 0.0}, "scale must be above 0"),
        (torch.zeros(1, 128, 2, 2), {"method": "area"}, "method must be one of"),
    ],
)
def test_bad_input_is_refused(run, samples, changes, message):
    with pytest.raises(ErnieError, match=message):
        upscale(run, {"samples": samples}, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = importlib.import_module("ernie_pack.ernie_core.weights.checkpoint")
    folder = write_random_models(tmp_path_factory.mktemp("models"))
    return host.make_model(
        checkpoint.read_component(folder / "diffusion_models" / "ernie-image.safetensors", "transformer")
    )


def texts():
    both = torch.randn(2, 1, 3, DIT.text_in_dim, generator=torch.Generator().manual_seed(0))
    return [[both[0], {}]], [[both[1], {}]]


def sample(model, *, side=8, width=6, steps=3, positive=None):
    given, negative = texts()
    return host.sample(
        model,
        positive=positive or given,
        negative=negative,
        latent={"samples": torch.zeros(2, 128, side, width)},
        sigmas=make_sigmas(steps),
        cfg=3.0,
        seed=3,
    )["samples"]


def test_a_picture_that_fits_one_tile_is_bit_equal(model):
    assert torch.equal(sample(host.set_tiles(model, Tiles(tile_px=128, overlap_px=64))), sample(model))


def test_each_call_of_the_network_is_one_tile(model, monkeypatch):
    seen = []
    forward = type(model.dit).forward

    def note(self, x, *args, **kwargs):
        seen.append(tuple(x.shape))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model.dit), "forward", note)
    whole = sample(model, steps=2)
    assert set(seen) == {(2, 128, 8, 6)}
    count = len(seen)
    seen.clear()
    tiled = sample(host.set_tiles(model, SMALL), steps=2)
    assert set(seen) == {(2, 128, 4, 4)}
    assert len(seen) == 6 * count  # 3 rows of 2
    assert tiled.isfinite().all()
    assert not torch.equal(tiled, whole)


def test_tiles_work_beside_a_step_cache_that_leaves_nothing_out_and_skipped_layers(model):
    tiled = host.set_tiles(model, SMALL)
    cached = host.set_step_cache(tiled, StepCache(threshold=1e-9), node_id="9")
    assert torch.equal(sample(cached), sample(tiled))
    assert host.session.shown.pop("9").startswith("0 of 36 ")  # 6 tiles, 3 steps, 2 prompts
    fast = host.set_step_cache(tiled, StepCache(threshold=1.0, max_skips=1), node_id="9")
    assert not torch.equal(sample(fast, steps=8), sample(tiled, steps=8))
    left_out, calls = map(int, re.findall(r"\d+", host.session.shown.pop("9"))[:2])
    assert calls == 8 * 6 * 2
    assert 0 < left_out < calls
    pushed = host.add_guidance(tiled, [SkipLayers(blocks=(0,), scale=2.0)])
    assert not torch.equal(sample(pushed), sample(tiled))


def test_regions_keep_their_place_in_tiles(model):
    base, other = texts()
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    half = host.add_region(base, other, mask, 1.0)
    tiles = Tiles(tile_px=64, overlap_px=0)  # left and right half, each one prompt alone
    out = sample(host.set_tiles(model, tiles), side=4, width=8, positive=half)
    left = sample(host.set_tiles(model, tiles), side=4, width=8, positive=other)
    right = sample(host.set_tiles(model, tiles), side=4, width=8)
    assert (out[..., :4] - left[..., :4]).abs().max() < 1e-4
    assert (out[..., 4:] - right[..., 4:]).abs().max() < 1e-4


def test_an_interrupt_stops_between_tiles(model, monkeypatch):
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted

    monkeypatch.setattr(host, "throw_if_interrupted", stop)
    with pytest.raises(Interrupted):
        sample(host.set_tiles(model, SMALL))
    assert len(calls) == 2


def test_branches_of_an_edit_run_under_the_step_cache_and_say_so(model):
    positive, negative = texts()
    latent = {"samples": torch.randn(1, 128, 2, 2, generator=torch.Generator().manual_seed(1))}

    def run(denoise, x, *, on_step, mask_BCHW):
        for sigma in (0.9, 0.899, 0.898):
            x = x + 0.001 * (denoise["target"](x, sigma) - denoise["source"](x, sigma))
        return x

    def edit(model):
        branches = {"source": (positive, negative, 2.0), "target": (negative, positive, 3.0)}
        out = host.sample_branches(model, branches=branches, latent=latent, sigmas=make_sigmas(3), run=run, steps=3)
        return out["samples"]

    plain = edit(model)
    cached = host.set_step_cache(model, StepCache(threshold=1.0, max_skips=1), node_id="9")
    assert not torch.equal(edit(cached), plain)
    # Two branches of two prompts, each with a cache of its own: the second of three calls is left out.
    assert host.session.shown.pop("9").startswith("4 of 12 ")
    under = host.add_nag(model, negative, scale=5.0, tau=2.5, alpha=0.5, start=1.0, end=0.0)
    assert not torch.equal(edit(under), plain)
