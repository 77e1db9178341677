"""A whole ERNIE-Image model in miniature with random weights, as the single files that workflows name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tiny_text
import torch
from ernie_pack.ernie_core.config import DiTConfig, VAEConfig
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.model.enhancer import Enhancer
from ernie_pack.ernie_core.model.text_encoder import Tokenizer
from ernie_pack.ernie_core.model.vae import VAE
from ernie_pack.ernie_core.weights.checkpoint import (
    Component,
    read_component,
    read_header,
    save_single_file,
    write_safetensors,
)
from ernie_pack.ernie_core.weights.lora import weight_shapes
from lora_dialects import random_lora

RELEASED_FILES = {
    "transformer": "diffusion_models/ernie-image.safetensors",
    "text_encoder": "text_encoders/ministral-3-3b.safetensors",
    "enhancer": "text_encoders/ernie-image-prompt-enhancer.safetensors",
    "vae": "vae/flux2-vae.safetensors",
}
LORAS = ("my_style.safetensors", "my_subject.safetensors")
TURBO_FILE = "diffusion_models/ernie-image-turbo.safetensors"

DIT = DiTConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    ffn_hidden_size=96,
    text_in_dim=tiny_text.text_config()["hidden_size"],
    rope_axes_dim=(4, 6, 6),
)
AUTOENCODER = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)


def write_random_loras(folder: Path) -> None:
    """Write two small LoRAs, as workflows name them, for the transformer that lies in `folder` already."""
    shapes, _ = read_header(folder / RELEASED_FILES["transformer"])
    for i, name in enumerate(LORAS):
        write_safetensors(random_lora(weight_shapes(shapes), size=0.05, seed=i), folder / "loras" / name)


def write_random_models(folder: Path) -> Path:
    """Write the five files under their released names into `folder`, laid out like ComfyUI's models; and two LoRAs."""
    tekken = tiny_text.tekken_bytes()
    for kind, name in RELEASED_FILES.items():
        tokenizer = None
        if kind == "transformer":
            model, config = DiT(DIT), DIT.to_dict()
        elif kind == "vae":
            model, config = VAE(AUTOENCODER), AUTOENCODER.to_dict()
        else:
            tokenizer = tekken
            config = tiny_text.text_config("mistral" if kind == "text_encoder" else "ministral3")
            model = Enhancer(config, Tokenizer.from_tekken(tekken))
        weights = random_weights(model.state_dict(), seed=len(kind))
        component = Component(kind=kind, config=config, state_dict=weights, tokenizer=tokenizer, source=folder)
        save_single_file(component, folder / name)
    write_turbo(folder)
    write_random_loras(folder)
    return folder


def write_turbo(folder: Path) -> None:
    """A Turbo that differs from the Base in `folder`, so that there is something to extract."""
    base = read_component(folder / RELEASED_FILES["transformer"], "transformer")
    weights = {k: v + 0.002 if k.endswith("to_q.weight") else v for k, v in base.state_dict.items()}
    save_single_file(replace(base, state_dict=weights), folder / TURBO_FILE)


def random_weights(like: dict[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    """Values that keep activations at a usable size: gains near 1, matrices small, the VAE's variances near 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in like.items():
        if not tensor.is_floating_point():
            weights[name] = tensor
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            weights[name] = 1 + 0.1 * noise.abs()
        elif tensor.ndim == 1 and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = noise * (0.02 if tensor.ndim == 1 else tensor[0].numel() ** -0.5)
        weights[name] = weights[name].to(torch.bfloat16)
    return weights
