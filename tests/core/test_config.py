"""Config: defaults are the release's, sizes are read from tensors, mistakes are named."""

import pytest
import torch
from ernie_pack.ernie_core.config import BASE, OFFICIAL_SIZES, TURBO, DiTConfig, VAEConfig, check_size
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.model.vae import VAE

# transformer/config.json of baidu/ERNIE-Image
RELEASED_TRANSFORMER = {
    "_class_name": "ErnieImageTransformer2DModel",
    "_diffusers_version": "0.36.0",
    "eps": 1e-06,
    "ffn_hidden_size": 12288,
    "hidden_size": 4096,
    "in_channels": 128,
    "num_attention_heads": 32,
    "num_layers": 36,
    "out_channels": 128,
    "patch_size": 1,
    "qk_layernorm": True,
    "rope_axes_dim": [32, 48, 48],
    "rope_theta": 256,
    "text_in_dim": 3072,
}

# vae/config.json of baidu/ERNIE-Image
RELEASED_VAE = {
    "_class_name": "AutoencoderKLFlux2",
    "act_fn": "silu",
    "batch_norm_eps": 0.0001,
    "batch_norm_momentum": 0.1,
    "block_out_channels": [128, 256, 512, 512],
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 32,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "patch_size": [2, 2],
    "sample_size": 1024,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}

DIT_CONFIGS = [
    DiTConfig(hidden_size=64, num_attention_heads=4, num_layers=1, ffn_hidden_size=96, rope_axes_dim=(4, 6, 6)),
    DiTConfig(
        hidden_size=96,
        num_attention_heads=3,
        num_layers=3,
        ffn_hidden_size=40,
        text_in_dim=24,
        rope_axes_dim=(8, 12, 12),
    ),
    DiTConfig(
        hidden_size=128,
        num_attention_heads=1,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=6,
        out_channels=10,
        patch_size=2,
        text_in_dim=48,
    ),
    # text as wide as the model: no projection is stored
    DiTConfig(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=8, text_in_dim=32, rope_axes_dim=(4, 6, 6)
    ),
]

VAE_CONFIGS = [
    VAEConfig(),
    VAEConfig(decoder_block_out_channels=(96, 192, 384, 384)),
    VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8),
    VAEConfig(latent_channels=2, block_out_channels=(32, 64), layers_per_block=3, norm_num_groups=32),
]


def test_defaults_are_the_released_transformer():
    ours = DiTConfig().to_dict()
    assert ours == {k: v for k, v in RELEASED_TRANSFORMER.items() if not k.startswith("_")}
    assert DiTConfig.from_dict(RELEASED_TRANSFORMER) == DiTConfig()


def test_keys_that_change_nothing_are_left_out():
    assert DiTConfig.from_dict({"lora_rank": 4, "use_lora": False}) == DiTConfig()  # as in Turbo's file


def test_defaults_are_the_released_vae_but_for_the_trained_eps():
    assert VAEConfig.from_dict(RELEASED_VAE) == VAEConfig()
    different = {k for k, v in VAEConfig().to_dict().items() if k in RELEASED_VAE and v != RELEASED_VAE[k]}
    assert different == {"batch_norm_eps"}
    assert VAEConfig().batch_norm_eps == 1e-5


def test_presets_and_sizes_are_the_model_cards():
    assert (BASE.steps, BASE.cfg, BASE.shift) == (50, 4.0, 4.0)
    assert (TURBO.steps, TURBO.cfg, TURBO.shift) == (8, 1.0, 4.0)
    sizes = "1024x1024 848x1264 1264x848 768x1376 1376x768 896x1200 1200x896"
    assert [f"{w}x{h}" for w, h in OFFICIAL_SIZES] == sizes.split()
    for size in OFFICIAL_SIZES:
        check_size(*size)


@pytest.mark.parametrize("config", DIT_CONFIGS, ids=range(len(DIT_CONFIGS)))
def test_a_transformers_sizes_are_read_from_its_tensors(config):
    state = DiT(config, device="meta").state_dict()
    assert DiTConfig.from_state_dict(state) == config
    assert DiTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("config", VAE_CONFIGS, ids=range(len(VAE_CONFIGS)))
def test_a_vaes_sizes_are_read_from_its_tensors(config):
    state = VAE(config, device="meta").state_dict()
    assert VAEConfig.from_state_dict(state) == config
    assert VAEConfig.from_dict(config.to_dict()) == config


def test_tensors_of_something_else_are_refused():
    stranger = {"layers.0.self_attention.norm_q.weight": torch.empty(8)}
    with pytest.raises(CheckpointError, match=r"not an ERNIE-Image transformer: .*x_embedder.proj.weight"):
        DiTConfig.from_state_dict(stranger)
    with pytest.raises(CheckpointError, match=r"not a FLUX.2 VAE"):
        VAEConfig.from_state_dict(stranger)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1000, 1024), r"width must be a multiple of 16, got 1000; use 992 or 1008\."),
        ((1024, 17), r"height must be a multiple of 16, got 17; use 16 or 32\."),
        ((8, 1024), r"width must be a multiple of 16, got 8; use 16\."),
        ((1024, 0), r"height must be a multiple of 16, got 0; use 16\."),
        ((-16, 1024), r"width must be a multiple of 16, got -16; use 16\."),
    ],
)
def test_a_wrong_size_is_answered_with_the_nearest_valid_ones(size, message):
    with pytest.raises(ErnieError, match=message):
        check_size(*size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 4097}, "hidden_size must be a multiple of num_attention_heads, got 4097 and 32"),
        ({"rope_axes_dim": (32, 48, 47)}, r"three widths that sum to the head size 128, got \(32, 48, 47\)"),
        ({"rope_axes_dim": (64, 64)}, r"three widths that sum to the head size 128, got \(64, 64\)"),
        ({"rope_axes_dim": (31, 49, 48)}, r"rope_axes_dim must be even, got \(31, 49, 48\)"),
        ({"qk_layernorm": False}, "qk_layernorm must be true"),
        ({"hidden_size": "wide"}, "does not describe this model"),
    ],
)
def test_an_impossible_transformer_is_named_by_field_and_value(values, message):
    with pytest.raises(ErnieError, match=message):
        DiTConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_out_channels": [100, 200]}, "multiples of norm_num_groups 32, got 100"),
        ({"patch_size": [1, 1]}, r"patch_size must be \(2, 2\), got \(1, 1\)"),
    ],
)
def test_an_impossible_vae_is_named_by_field_and_value(values, message):
    with pytest.raises(ErnieError, match=message):
        VAEConfig.from_dict(values)


def test_a_misspelt_field_is_an_error_at_once():
    with pytest.raises(TypeError):
        DiTConfig(hiden_size=64)
