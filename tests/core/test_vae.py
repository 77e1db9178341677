"""The autoencoder: shapes of the release, tiling, layout. Parity is tests/parity/test_vae.py."""

import pytest
import torch
from ernie_pack.bench.pairs import randomise
from ernie_pack.ernie_core.config import VAEConfig
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.model.vae import VAE, _blend_tiles
from ernie_pack.ernie_core.sampling.latents import patchify

CONFIG = VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def vae():
    model = VAE(CONFIG).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    randomise(model)
    return model


@pytest.fixture
def picture():
    return torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def latent():
    return torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(0))


def test_the_released_size():
    model = VAE(VAEConfig(), device="meta")
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    assert len(parameters) == 248
    assert sum(p.numel() for p in parameters.values()) == 84_046_115
    assert {k: tuple(v.shape) for k, v in buffers.items()} == {
        "bn.running_mean": (128,),
        "bn.running_var": (128,),
        "bn.num_batches_tracked": (),
    }
    assert {k: tuple(v.shape) for k, v in parameters.items() if "conv_shortcut.weight" in k} == {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight": (512, 256, 1, 1),
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
    }


def test_encoding_and_decoding_change_size_by_16(vae, picture):
    latent = vae.encode(picture)
    assert latent.shape == (2, 16, 3, 5)
    assert vae.decode(latent).shape == picture.shape


def test_encoding_is_the_normalised_posterior_mean(vae, picture):
    mean, log_variance = vae.posterior(picture)
    assert mean.shape == log_variance.shape == (2, 4, 6, 10)
    assert torch.equal(vae.encode(picture), vae.normalise(patchify(mean)))
    assert torch.equal(vae.encode(picture), vae.encode(picture))


def test_normalising_is_by_the_running_statistics_and_undone_by_denormalising(vae):
    x = torch.randn(2, 16, 3, 5)
    expected = torch.nn.functional.batch_norm(x, vae.bn.running_mean, vae.bn.running_var, eps=1e-5)
    torch.testing.assert_close(vae.normalise(x), expected)
    torch.testing.assert_close(vae.denormalise(vae.normalise(x)), x)


def test_statistics_stay_fp32_in_a_half_precision_model():
    model = VAE(CONFIG, dtype=torch.bfloat16)
    assert model.bn.running_var.dtype == torch.float32
    x = torch.randn(1, 16, 2, 2).bfloat16()
    assert model.normalise(x).dtype == torch.bfloat16


def test_a_batch_of_two_is_two_batches_of_one(vae, picture):
    both = vae.encode(picture)
    torch.testing.assert_close(both, torch.cat([vae.encode(p[None]) for p in picture]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(both), torch.cat([vae.decode(z[None]) for z in both]), atol=1e-4, rtol=1e-4)


def test_everything_runs_in_channels_last(vae, picture):
    convolutions = [m for m in vae.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 1]
    wrong = []
    handles = [
        m.register_forward_pre_hook(
            lambda m, args: None if args[0].is_contiguous(memory_format=torch.channels_last) else wrong.append(m)
        )
        for m in convolutions
    ]
    try:
        vae.decode(vae.encode(picture))
    finally:
        for handle in handles:
            handle.remove()
    assert wrong == []


def test_gradients_reach_every_parameter(picture):
    model = VAE(CONFIG)
    randomise(model)
    mean, log_variance = model.posterior(picture)
    (model.decode(model.normalise(patchify(mean))).square().mean() + log_variance.square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_decoding_leaves_its_input_alone(vae, latent, picture):
    for function, x in ((vae.decode, latent), (vae.encode, picture)):
        before = x.clone()
        function(x)
        assert torch.equal(x, before)


def test_one_tile_is_the_whole(vae, latent, picture):
    assert torch.equal(vae.decode_tiled(latent, tile_px=128, overlap_px=32), vae.decode(latent))
    assert torch.equal(vae.encode_tiled(picture, tile_px=80, overlap_px=16), vae.encode(picture))


def test_tiles_are_close_to_the_whole():
    """With the group norms and the middle attention left neutral, only the convolutions' reach is cut, and blended."""
    model = VAE(CONFIG).eval().requires_grad_(False)
    randomise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x * 0.5
    model.decoder.mid_block.attentions[0].forward = lambda x: x
    model.encoder.mid_block.attentions[0].forward = lambda x: x
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 16, 24, 8, generator=generator)
    whole, tiled = model.decode(z), model.decode_tiled(z, tile_px=256, overlap_px=160)
    assert (tiled - whole).abs().mean() < 0.01 * whole.abs().mean()
    x = torch.randn(1, 3, 384, 128, generator=generator)
    whole, tiled = model.encode(x), model.encode_tiled(x, tile_px=256, overlap_px=160)
    assert (tiled - whole).abs().mean() < 0.02 * whole.abs().mean()  # one latent cell sees further, in pixels


@pytest.mark.parametrize(("tile", "overlap"), [(2, 0), (2, 1), (3, 1), (5, 4), (4, 3), (7, 2)])
@pytest.mark.parametrize("scale", [(16, 1), (1, 16)], ids=["decode", "encode"])
def test_blending_reproduces_what_is_the_same_in_every_tile(tile, overlap, scale):
    """A pointwise function of the picture must come out untouched whatever the tiles: the weights sum to one."""
    up, down = scale

    def resize(x):
        if up > 1:
            return x.repeat_interleave(up, dim=2).repeat_interleave(up, dim=3)
        return torch.nn.functional.avg_pool2d(x, down)

    x = torch.randn(2, 3, 7 * down, 10 * down)
    out = _blend_tiles(resize, x, tile=tile * down, overlap=overlap * down, scale=scale, on_tile=None)
    torch.testing.assert_close(out, resize(x))


def test_tiles_cover_sizes_that_do_not_divide(vae):
    z = torch.randn(1, 16, 5, 9)
    assert vae.decode_tiled(z, tile_px=48, overlap_px=16).shape == (1, 3, 80, 144)
    assert vae.encode_tiled(torch.randn(1, 3, 80, 144), tile_px=48, overlap_px=16).shape == (1, 16, 5, 9)


def test_tiling_returns_the_inputs_dtype(latent):
    model = VAE(CONFIG, dtype=torch.bfloat16).eval().requires_grad_(False)
    assert model.decode_tiled(latent.bfloat16(), tile_px=64, overlap_px=16).dtype == torch.bfloat16


def test_on_tile_counts_and_may_stop(vae, latent):
    seen = []
    vae.decode_tiled(latent, tile_px=64, overlap_px=0, on_tile=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done, total):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        vae.decode_tiled(latent, tile_px=64, overlap_px=0, on_tile=stop)


def test_a_single_tile_is_counted_too(vae, latent):
    seen = []
    vae.decode_tiled(latent, tile_px=256, overlap_px=0, on_tile=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


@pytest.mark.parametrize(
    ("tile", "overlap"), [(0, 0), (64, 64), (64, 80), (64, -16), (40, 16), (64, 8)], ids=lambda v: str(v)
)
def test_impossible_tiles_are_refused(tile, overlap, vae, latent, picture):
    message = f"multiples of 16 px with 0 <= overlap < tile, got {tile} and {overlap}"
    with pytest.raises(ErnieError, match=message):
        vae.decode_tiled(latent, tile_px=tile, overlap_px=overlap)
    with pytest.raises(ErnieError, match=message):
        vae.encode_tiled(picture, tile_px=tile, overlap_px=overlap)


def test_a_picture_of_the_wrong_size_is_named(vae):
    for function in (vae.encode, vae.encode_tiled):
        with pytest.raises(ErnieError, match=r"width must be a multiple of 16, got 40; use 32 or 48"):
            function(torch.zeros(1, 3, 32, 40))


def test_another_models_latent_is_named(vae):
    for function in (vae.decode, vae.decode_tiled):
        with pytest.raises(ErnieError, match="the latent must have 16 channels, got 4: it is another model's latent"):
            function(torch.zeros(1, 4, 8, 8))


def test_the_memory_estimate_follows_pixels_and_dtype():
    model = VAE(VAEConfig(), device="meta")
    at_1024 = model.decode_bytes(64, 64, torch.bfloat16)
    assert 2.5 * 2**30 < at_1024 < 4 * 2**30  # published: 2.8 GiB
    assert model.decode_bytes(128, 64, torch.bfloat16) == 2 * at_1024
    assert model.decode_bytes(64, 64, torch.float32) == 2 * at_1024


@pytest.mark.parametrize(("free", "tiles"), [(1, True), (2**50, False), (None, False)])
def test_decoding_goes_in_tiles_only_where_memory_is_short(monkeypatch, free, tiles):
    vae = VAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)).eval()
    latent = torch.zeros(1, 128, 40, 8)
    seen = []
    monkeypatch.setattr("ernie_pack.ernie_core.model.vae.free_bytes", lambda device: free)
    with torch.no_grad():
        assert vae.decode_fitting(latent, on_tile=lambda done, total: seen.append(total)).shape == (1, 3, 640, 128)
    assert bool(seen) is tiles
