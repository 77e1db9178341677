"""Writes the trained parts: the official folder layout in bf16, and the single files of the ComfyUI repackage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from ..ernie_core.config import DiTConfig, VAEConfig
from ..ernie_core.weights.checkpoint import read_component, save_single_file, write_safetensors
from ..ernie_core.weights.layouts import Kind
from . import tokenizer as tiny_tokenizer

FOLDER = Path(__file__).parent / "ernie-image-tiny"

# kind -> file of the Comfy-Org/ERNIE-Image repackage, below ComfyUI's models folder
SINGLE_FILES: dict[Kind, tuple[str, ...]] = {
    "transformer": ("diffusion_models/ernie-image.safetensors", "diffusion_models/ernie-image-turbo.safetensors"),
    "text_encoder": ("text_encoders/ministral-3-3b.safetensors",),
    "enhancer": ("text_encoders/ernie-image-prompt-enhancer.safetensors",),
    "vae": ("vae/flux2-vae.safetensors",),
}

MODEL_INDEX = {
    "_class_name": "ErnieImagePipeline",
    "_diffusers_version": "0.38.0",
    "pe": ["transformers", "Ministral3ForCausalLM"],
    "pe_tokenizer": ["transformers", "TokenizersBackend"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Mistral3Model"],
    "tokenizer": ["transformers", "TokenizersBackend"],
    "transformer": ["diffusers", "ErnieImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
SCHEDULER = {  # scheduler/scheduler_config.json of the release
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 4.0,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
}
# The released text encoder carries a vision tower that nothing uses; ours is as small as one can be.
VISION_CONFIG = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 16,
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 16,
    "hidden_act": "gelu",
}


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _bf16(state_dict: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {
        prefix + name: (w.to(torch.bfloat16) if w.is_floating_point() else w).detach().cpu().contiguous()
        for name, w in state_dict.items()
    }


def _vae_config(config: VAEConfig) -> dict:
    levels = len(config.block_out_channels)
    widths = {k: v for k, v in config.to_dict().items() if v is not None}
    return {
        "_class_name": "AutoencoderKLFlux2",
        **widths,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "force_upcast": True,
        "sample_size": 128,
    }


def write_folder(
    folder: Path,
    *,
    transformer: dict[str, Tensor],
    transformer_config: DiTConfig,
    text_encoder: dict[str, Tensor],
    text_config: dict,
    enhancer: dict[str, Tensor],
    enhancer_config: dict,
    vae: dict[str, Tensor],
    vae_config: VAEConfig,
) -> None:
    """Write everything an official folder holds, as bf16; the layers that no one uses get random weights."""
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    _write_json(
        folder / "transformer/config.json",
        {"_class_name": "ErnieImageTransformer2DModel", **transformer_config.to_dict()},
    )
    _write_json(folder / "vae/config.json", _vae_config(vae_config))
    pt = {"format": "pt"}
    weights = "diffusion_pytorch_model.safetensors"
    write_safetensors(_bf16(transformer), folder / "transformer" / weights, metadata=pt)
    write_safetensors(_bf16(vae), folder / "vae" / weights, metadata=pt)
    write_safetensors(
        _bf16(_whole_text_encoder(text_encoder, text_config)), folder / "text_encoder/model.safetensors", metadata=pt
    )
    _write_json(
        folder / "text_encoder/config.json",
        {
            "architectures": ["Mistral3Model"],
            "model_type": "mistral3",
            "image_token_index": 10,
            "spatial_merge_size": 2,
            "text_config": text_config,
            "vision_config": VISION_CONFIG,
        },
    )
    head = {"lm_head.weight": enhancer["embed_tokens.weight"].clone()}  # the release stores the tied copy as well
    write_safetensors(_bf16(enhancer, "model.") | _bf16(head), folder / "pe/model.safetensors", metadata=pt)
    _write_json(folder / "pe/config.json", enhancer_config)
    _write_json(
        folder / "pe/generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11, "top_k": 0}
    )
    tiny_tokenizer.save_tokenizer(folder / "tokenizer")
    tiny_tokenizer.save_pe_tokenizer(folder / "pe_tokenizer")


def _whole_text_encoder(trained: dict[str, Tensor], text_config: dict) -> dict[str, Tensor]:
    """The trained layers under the released names, with an unused last layer, final norm and vision tower."""
    from transformers import Mistral3Config, Mistral3Model

    torch.manual_seed(0)
    whole = Mistral3Model(
        Mistral3Config(text_config=text_config, vision_config=VISION_CONFIG, spatial_merge_size=2)
    ).state_dict()
    prefix = "language_model."
    unknown = [name for name in trained if prefix + name not in whole]
    assert not unknown, unknown[:5]
    whole |= {prefix + name: weight for name, weight in trained.items()}
    return {name.replace(prefix, "language_model.model.", 1): weight for name, weight in whole.items()}


def export_single_files(models: Path, *, folder: Path = FOLDER) -> list[Path]:
    """Write the folder as the single files of the ComfyUI repackage, under the released names, below `models`."""
    written = []
    tekken = tiny_tokenizer.to_tekken_bytes(tiny_tokenizer.build_tokenizer(prepend_bos=False))
    for kind, names in SINGLE_FILES.items():
        component = read_component(folder, kind)
        if component.tokenizer is not None:
            component = dataclasses.replace(component, tokenizer=tekken)
        for name in names:
            path = models / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_single_file(component, path)
            written.append(path)
    return written
