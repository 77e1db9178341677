"""The transformer against diffusers' ErnieImageTransformer2DModel; fp32, the same random weights."""

import pytest
import torch
from ernie_pack.bench.pairs import make_dit_pair, randomise
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.model.dit import Block, DiT, timestep_embedding
from ernie_pack.ernie_core.model.rope import rope_table

pytestmark = pytest.mark.parity

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96, "rope_axes_dim": (4, 6, 6)}
CONFIGS = {
    "small": DiTConfig(**SMALL, num_layers=3, in_channels=8, out_channels=8, text_in_dim=24),
    "released head, deep, no projection": DiTConfig(
        hidden_size=256, num_attention_heads=2, num_layers=8, ffn_hidden_size=512, text_in_dim=256
    ),
    "patches of 2": DiTConfig(**SMALL, num_layers=2, in_channels=6, out_channels=10, text_in_dim=24, patch_size=2),
    "one block at full width": DiTConfig(num_layers=1),
}


def inputs(config, *, batch=2, text=7, height=4, width=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, height, width, generator=generator)
    return (
        x,
        torch.tensor([965.5172, 363.6364])[:batch],
        torch.randn(batch, text, config.text_in_dim, generator=generator),
    )


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1, "the outputs must be of a size at which the bound means something"
    return float((ours - theirs).abs().max())


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if "full width" in name else ()) for name in CONFIGS],
    ids=str,
)
def pair(request):
    return make_dit_pair(CONFIGS[request.param], dtype=torch.float32)


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3), (1, 6)], ids=["equal", "ragged", "padded"])
def test_velocity_is_diffusers(lengths, pair):
    ours, theirs = pair
    x, t, text = inputs(ours.config)
    with torch.no_grad():
        expected = theirs(x, t, text, torch.tensor(lengths), return_dict=False)[0]
        found = ours(x, t, text, text_lengths=lengths)
    assert difference(found, expected) <= 1e-4


@pytest.mark.parametrize("index", [0, -1])
def test_a_block_is_diffusers(index, pair):
    """The real modulation and rotation of a forward pass, unit-sized tokens."""
    ours, theirs = pair
    _, t, _ = inputs(ours.config)
    c = ours.config
    tokens = torch.randn(2, 4 * 6 + 7, c.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        rope = ours.rope(4 * c.patch_size, 6 * c.patch_size, [7], device="cpu", dtype=torch.float32)
        _, modulation = ours.modulation(t, torch.float32)
        found = ours.layers[index](tokens, modulation, rope)

        ids = torch.zeros(1, tokens.shape[1], 3)
        ids[0, :24] = torch.cartesian_prod(torch.tensor([7.0]), torch.arange(4.0), torch.arange(6.0))
        ids[0, 24:, 0] = torch.arange(7.0)
        temb = [
            v.expand(tokens.shape[1], -1, -1)
            for v in theirs.adaLN_modulation(theirs.time_embedding(theirs.time_proj(t)))[None].chunk(6, dim=-1)
        ]
        expected = theirs.layers[index](tokens.transpose(0, 1), theirs.pos_embed(ids), temb).transpose(0, 1)
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("dim", [64, 4096])
def test_the_timestep_embedding_is_diffusers_to_the_bit(dim):
    from diffusers.models.embeddings import Timesteps

    t = torch.tensor([0.0, 0.4, 363.636, 500.0, 965.517, 1000.0])
    expected = Timesteps(dim, flip_sin_to_cos=False, downscale_freq_shift=0)(t)
    assert torch.equal(timestep_embedding(t, dim), expected)


def test_rotation_is_diffusers():
    from diffusers.models.transformers.transformer_ernie_image import ErnieImageEmbedND3

    theirs = ErnieImageEmbedND3(128, 256, (32, 48, 48))
    ids = torch.zeros(1, 64 * 64 + 20, 3)
    ids[0, : 64 * 64] = torch.cartesian_prod(torch.tensor([20.0]), torch.arange(64.0), torch.arange(64.0))
    ids[0, 64 * 64 :, 0] = torch.arange(20.0)
    angle = theirs(ids)
    cos, sin = rope_table(64, 64, [20], axes_dim=(32, 48, 48), theta=256, device="cpu", dtype=torch.float32)
    # their angles are fp32 products up to 63
    torch.testing.assert_close(cos, angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, angle.sin(), atol=1e-5, rtol=0)


def test_names_and_shapes_are_diffusers():
    from diffusers import ErnieImageTransformer2DModel

    with torch.device("meta"):
        theirs = ErnieImageTransformer2DModel(**DiTConfig().to_dict()).state_dict()
    ours = DiT(DiTConfig(), device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_bf16_stays_as_close_to_fp32_as_diffusers_does():
    """Folded modulation rounds at other places, and not worse."""
    config = CONFIGS["small"]
    exact = make_dit_pair(config, dtype=torch.float32)[0]
    ours, theirs = make_dit_pair(config, dtype=torch.bfloat16)
    ours.load_state_dict(exact.state_dict())
    theirs.load_state_dict(exact.state_dict())
    x, t, text = inputs(config)
    t = t.bfloat16().float()  # theirs rounds it
    with torch.no_grad():
        expected = exact(x, t, text)
        found = ours(x.bfloat16(), t, text.bfloat16()).float()
        peer = theirs(x.bfloat16(), t.bfloat16(), text.bfloat16(), torch.tensor([7, 7]), return_dict=False)[0].float()
    ours_off, peer_off = ((v - expected).norm() / expected.norm() for v in (found, peer))
    assert ours_off < 1.25 * peer_off


def test_a_wrong_rotation_would_be_noticed():
    """The usual rotation, one angle for both partners, differs by far more than the bound."""
    ours, _ = make_dit_pair(CONFIGS["small"], dtype=torch.float32)
    x, t, text = inputs(ours.config)
    cos, sin = ours.rope(4, 6, [7], device="cpu", dtype=torch.float32)
    usual = tuple(torch.cat([table[..., ::2], table[..., ::2]], dim=-1) for table in (cos, sin))
    with torch.no_grad():
        assert float((ours(x, t, text) - ours(x, t, text, rope=usual)).abs().max()) > 1e-2


def test_randomised_weights_leave_nothing_neutral():
    block = Block(CONFIGS["small"], torch.nn)
    randomise(block)
    assert all(p.std() > 0.01 for p in block.parameters())
