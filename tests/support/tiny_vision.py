"""Small random vision models, written to disk as their authors publish such folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIDE_PX = 32
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_SQUARE = {"height": SIDE_PX, "width": SIDE_PX}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": _SQUARE},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": _SQUARE},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": SIDE_PX},
        "do_center_crop": True,
        "crop_size": _SQUARE,
    },
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE_PX}, "crop_pct": 0.875},
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE_PX},
        "do_center_crop": True,
        "crop_size": _SQUARE,
    },
}
KINDS = tuple(_PROCESSORS)


def make_vision_model(kind: str) -> Any:
    """One of transformers' own, seeded by its kind."""
    import transformers as t

    torch.manual_seed(KINDS.index(kind))
    sizes = {**_VISION, "image_size": SIDE_PX, "patch_size": 16}
    text = {**_VISION, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "siglip":
        config: Any = t.SiglipConfig(text_config=text, vision_config=sizes)
    elif kind == "clip":
        config = t.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=12)
    elif kind == "vit":
        config = t.ViTConfig(**sizes)
    elif kind == "dinov2":
        config = t.Dinov2Config(**{k: v for k, v in sizes.items() if k != "intermediate_size"})
    else:
        config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return t.AutoModel.from_config(config).eval()


def write_vision_model(folder: Path, kind: str) -> Any:
    """Write the folder; returns the model in it."""
    model = make_vision_model(kind)
    model.save_pretrained(str(folder))
    told = {
        **{"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        **{"image_mean": [0.5, 0.45, 0.4], "image_std": [0.25, 0.26, 0.27]},
        **_PROCESSORS[kind],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")
    return model
