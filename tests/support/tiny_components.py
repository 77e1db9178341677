"""One component of each kind in miniature, with random weights."""

from pathlib import Path

import torch
from ernie_pack.ernie_core.config import DiTConfig, VAEConfig
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.model.vae import VAE
from ernie_pack.ernie_core.weights.checkpoint import Component
from ernie_pack.ernie_core.weights.layouts import text_shapes
from tiny_text import tekken_bytes, text_config

DIT = DiTConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    ffn_hidden_size=96,
    text_in_dim=48,
    in_channels=8,
    out_channels=8,
    rope_axes_dim=(4, 6, 6),
)
VAE_CONFIG = VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8)


def make_component(kind: str, dtype: torch.dtype = torch.float32) -> Component:
    generator = torch.Generator().manual_seed(0)
    tokenizer = None
    if kind in ("transformer", "vae"):
        config = DIT if kind == "transformer" else VAE_CONFIG
        module = (DiT if kind == "transformer" else VAE)(config, device="meta")
        like = module.state_dict()
        values = config.to_dict()
    else:
        values = text_config("mistral" if kind == "text_encoder" else "ministral3")
        like = {name: torch.empty(shape, device="meta") for name, shape in text_shapes(values).items()}
        tokenizer = tekken_bytes()
    state_dict = {
        name: torch.randn(t.shape, generator=generator).abs().to(torch.float32 if name.startswith("bn.") else dtype)
        if t.is_floating_point()
        else torch.zeros(t.shape, dtype=t.dtype)
        for name, t in like.items()
    }
    return Component(kind=kind, config=values, state_dict=state_dict, tokenizer=tokenizer, source=Path("made"))


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.float(), right[name].float()), name
