"""A small frozen transformer with inputs of unequal text lengths, and gradients taken through it."""

import torch
from ernie_pack.bench.pairs import randomise
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.model.dit import DiT

CONFIG = DiTConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=3,
    ffn_hidden_size=96,
    text_in_dim=48,
    in_channels=8,
    out_channels=8,
    rope_axes_dim=(4, 6, 6),
)
TEXT_LENGTHS = (7, 4)


def make_model(config=CONFIG, *, dtype=torch.float32, seed=0):
    model = DiT(config).eval().requires_grad_(False)
    randomise(model, seed=seed)
    return model.to(dtype)


def make_inputs(config=CONFIG, *, dtype=torch.float32, seed=1, lengths=TEXT_LENGTHS, height=4, width=6):
    """(latent, timesteps, text), random, for one sample per text length."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    x = torch.randn(batch, config.in_channels, height, width, generator=generator)
    timesteps = 1000 * torch.rand(batch, generator=generator)
    text = torch.randn(batch, max(lengths), config.text_in_dim, generator=generator)
    return x.to(dtype), timesteps, text.to(dtype)


def shake(adapter, *, size=0.05, seed=2):
    """Move every factor off its start, so that the adapter changes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p += (size * torch.randn(p.shape, generator=generator)).to(p)
    return adapter


def gradients(adapter, loss):
    """{name: gradient} of the adapter's factors."""
    names, factors = zip(*adapter.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, factors, allow_unused=True), strict=True))


def largest_error(found, expected):
    """Largest difference of two {name: tensor}, each relative to the expected tensor's largest entry."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - e).abs().max() / e.abs().max()) for k, e in expected.items())
