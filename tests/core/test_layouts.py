"""Key names: the VAE's two dialects are inverse, every layout is found, strangers are named."""

import pytest
from ernie_pack.ernie_core.config import VAEConfig
from ernie_pack.ernie_core.errors import CheckpointError
from ernie_pack.ernie_core.model.vae import VAE
from ernie_pack.ernie_core.weights.layouts import (
    KINDS,
    PREFIXES,
    find_prefix,
    find_tekken,
    identify,
    text_config,
    text_shapes,
    to_our_names,
    vae_to_bfl,
    vae_to_diffusers,
)
from tiny_components import make_component
from tiny_text import RELEASED_TEXT_CONFIG

RELEASED_VAE = VAE(VAEConfig(), device="meta").state_dict()
LANGUAGE = ("text_encoder", "enhancer")


def shapes_of(kind, prefix=""):
    return {prefix + name: tuple(t.shape) for name, t in make_component(kind).state_dict.items()}


def test_vae_names_go_to_bfl_and_back():
    theirs = [vae_to_bfl(name) for name in RELEASED_VAE]
    assert len(set(theirs)) == len(theirs) == 251
    assert [vae_to_diffusers(name) for name in theirs] == list(RELEASED_VAE)


def test_diffusers_names_stay_as_they_are():
    assert [vae_to_diffusers(name) for name in RELEASED_VAE] == list(RELEASED_VAE)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
        ("encoder.down_blocks.2.downsamplers.0.conv.bias", "encoder.down.2.downsample.conv.bias"),
        ("decoder.up_blocks.0.resnets.2.norm1.weight", "decoder.up.3.block.2.norm1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up.1.upsample.conv.weight"),
        ("encoder.mid_block.resnets.1.conv2.weight", "encoder.mid.block_2.conv2.weight"),
        ("decoder.mid_block.attentions.0.group_norm.bias", "decoder.mid.attn_1.norm.bias"),
        ("decoder.mid_block.attentions.0.to_out.0.weight", "decoder.mid.attn_1.proj_out.weight"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
        ("quant_conv.weight", "encoder.quant_conv.weight"),
        ("post_quant_conv.bias", "decoder.post_quant_conv.bias"),
        ("bn.running_mean", "bn.running_mean"),
    ],
)
def test_vae_names_are_those_of_the_published_files(ours, theirs):
    assert vae_to_bfl(ours) == theirs
    assert vae_to_diffusers(theirs) == ours


@pytest.mark.parametrize(("kind", "prefix"), [(kind, prefix) for kind in KINDS for prefix in PREFIXES[kind]])
def test_every_prefix_is_found_and_taken_off(kind, prefix):
    shapes = shapes_of(kind, prefix)
    assert find_prefix(shapes, kind) == prefix
    ours, strangers = to_our_names(shapes, kind, prefix)
    assert ours.keys() == shapes_of(kind).keys()
    assert not strangers


def test_unused_tensors_of_a_language_model_are_left_out():
    unused = [
        "vision_tower.patch_conv.weight",
        "model.vision_tower.ln_pre.weight",
        "multi_modal_projector.norm.weight",
        "model.multi_modal_projector.linear_1.weight",
        "lm_head.weight",
        "language_model.lm_head.weight",
        "tekken_model",
        "model.tekken_model",
    ]
    ours, strangers = to_our_names([*shapes_of("text_encoder", "model."), *unused], "text_encoder", "model.")
    assert ours.keys() == shapes_of("text_encoder").keys()
    assert not strangers


def test_strangers_are_reported():
    shapes = shapes_of("transformer", "diffusion_model.")
    _, strangers = to_our_names([*shapes, "foo.weight"], "transformer", "diffusion_model.")
    assert strangers == ["foo.weight"]


def test_a_full_checkpoint_holds_all_parts():
    shapes = shapes_of("transformer", "model.diffusion_model.") | shapes_of("vae", "vae.")
    shapes |= shapes_of("text_encoder", "text_encoders.ministral3_3b.transformer.model.")
    shapes["text_encoders.ministral3_3b.logit_scale"] = ()
    shapes["text_encoders.tekken_model"] = (9,)
    assert "full checkpoint" in identify(shapes).description
    assert find_tekken(shapes) == "text_encoders.tekken_model"
    for kind in ("transformer", "text_encoder", "vae"):
        ours, strangers = to_our_names(shapes, kind, find_prefix(shapes, kind))
        assert ours.keys() == shapes_of(kind).keys(), kind
        assert not strangers


@pytest.mark.parametrize(
    ("keys", "description"),
    [
        (["diffusion_model.layers.0.self_attention.to_q.lora_A.weight"], "LoRA"),
        (["lora_unet_layers_0_self_attention_to_q.lora_down.weight"], "LoRA"),
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "a FLUX transformer"),
        (["double_blocks.0.x", "double_stream_modulation_img.lin.weight"], "FLUX.2 transformer"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "SD or SDXL UNet"),
        (["transformer_blocks.0.img_mlp.net.0.proj.weight"], "Qwen-Image transformer"),
        (["model.layers.0.self_attn.q_norm.weight", "model.layers.0.post_attention_layernorm.weight"], "Qwen3"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "CLIP"),
        (["foo"], "nothing this pack knows"),
    ],
)
def test_other_models_are_named(keys, description):
    found = identify(dict.fromkeys(keys, (8, 8)))
    assert description in found.description
    assert not found.kinds


@pytest.mark.parametrize(("channels", "family"), [(4, "SD or SDXL"), (16, "FLUX.1 or SD3")])
def test_a_vae_without_statistics_is_named(channels, family):
    found = identify({"decoder.conv_in.weight": (512, channels, 3, 3)})
    assert family in found.description
    assert "without the batch-norm statistics" in found.description


@pytest.mark.parametrize(
    ("extra", "kinds"),
    [
        ("vision_tower.ln_pre.weight", ("text_encoder",)),
        ("lm_head.weight", ("enhancer",)),
        (None, ("text_encoder", "enhancer")),
    ],
)
def test_language_models_are_told_apart_where_possible(extra, kinds):
    shapes = shapes_of("text_encoder", "model.") | ({extra: (1,)} if extra else {})
    assert identify(shapes).kinds == kinds


def test_the_released_text_config_comes_back_from_its_shapes():
    assert text_config(text_shapes(RELEASED_TEXT_CONFIG), "text_encoder") == RELEASED_TEXT_CONFIG
    assert len(text_shapes(RELEASED_TEXT_CONFIG)) == 236
    assert text_config(text_shapes(RELEASED_TEXT_CONFIG), "enhancer")["model_type"] == "ministral3"


def test_an_unreadable_head_size_is_refused():
    shapes = shapes_of("text_encoder") | {
        "layers.0.self_attn.q_proj.weight": (96, 48),
        "layers.0.self_attn.k_proj.weight": (96, 48),
    }
    with pytest.raises(CheckpointError, match=r"heads of 128 do not divide; the file needs a config\.json"):
        text_config(shapes, "text_encoder")
