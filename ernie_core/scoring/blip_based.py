"""ImageReward: how well a picture fits its prompt, and how good it looks, as people ranked it.

Xu et al. 2023 (THUDM/ImageReward, ImageReward.py): BLIP's text encoder reads the prompt and looks at the picture; its
first hidden vector goes through five linear layers without activations; the result is shifted and scaled to mean 0 and
deviation 1 over their data. The network is transformers' BlipVisionModel and BlipTextModel, filled from BLIP's own
names; ImageReward.pt holds no tokenizer, BERT's vocab.txt (bert-base-uncased) must lie beside it.

Shape letters: B pictures, C = 3 colours, S tokens, D width.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .clip_based import prepare_cropped
from .network import Bring, Place, Precision, Weights, fill, require_transformers, stay
from .scorer import BatchScorer

REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # ImageReward.py
MAX_TOKENS = 35
_HEAD = (0, 2, 4, 6, 7)  # places of the linear layers in `mlp.layers`; dropouts between

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's pre-training
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def is_image_reward(names: Iterable[str]) -> bool:
    """Whether these are the tensors of ImageReward.pt."""
    names = set(names)
    return {"blip.visual_encoder.cls_token", "mlp.layers.0.weight"} <= names


def to_transformers(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Names of `RewardNetwork`. Raises CheckpointError: a name that is not ImageReward's (the first five)."""
    made: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        leaf = name.removeprefix("blip.visual_encoder.")
        block = _BLOCK.fullmatch(leaf)
        if name.startswith(_UNUSED) or name.endswith("position_ids"):
            continue
        if name.startswith("mlp.layers."):
            made["head." + name.removeprefix("mlp.layers.")] = tensor
        elif name.startswith("blip.text_encoder."):
            made["text." + name.removeprefix("blip.text_encoder.").removeprefix("bert.")] = tensor
        elif leaf == name:
            unknown.append(name)
        elif leaf in _VISION:
            made[f"vision.{_VISION[leaf]}"] = tensor
        elif leaf.rpartition(".")[0] in _VISION:
            made[f"vision.{_VISION[leaf.rpartition('.')[0]]}.{leaf.rpartition('.')[2]}"] = tensor
        elif block is not None and block[2] in _IN_BLOCK:
            made[f"vision.encoder.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{source} has {len(unknown)} tensors that ImageReward has not: {', '.join(unknown[:5])}."
        )
    return made


class RewardNetwork(nn.Module):
    """BLIP's two encoders and the head."""

    def __init__(self, vision_config: Any, text_config: Any, widths: Sequence[int]):
        """`widths`: of the head's layers, the input first."""
        super().__init__()
        transformers = require_transformers()
        self.vision: Any = transformers.BlipVisionModel(vision_config)
        self.text: Any = transformers.BlipTextModel(text_config, add_pooling_layer=False)
        pairs = itertools.pairwise(widths)
        self.head = nn.ModuleDict({str(place): nn.Linear(*pair) for place, pair in zip(_HEAD, pairs, strict=True)})

    def forward(self, pixels_BCHW: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """[B] rewards."""
        seen_BLD = self.vision(pixel_values=pixels_BCHW).last_hidden_state
        mask_BL = torch.ones(seen_BLD.shape[:2], dtype=torch.long, device=seen_BLD.device)
        out = self.text(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            encoder_hidden_states=seen_BLD,
            encoder_attention_mask=mask_BL,
            use_cache=False,
            is_decoder=False,
        )
        x_BD = out.last_hidden_state[:, 0]
        for layer in self.head.values():
            x_BD = layer(x_BD)
        return (x_BD[:, 0].float() - REWARD_MEAN) / REWARD_STD


def build_network(weights: Weights, *, precision: Precision = "fp32", ops: Any = None) -> nn.Module:
    """The network with these weights; all sizes are those of the tensors, 64 to an attention head.

    Raises CheckpointError: missing or extra tensors.
    """
    transformers = require_transformers()
    tensors = to_transformers(weights.tensors, weights.source)
    try:
        patch = tensors["vision.embeddings.patch_embedding.weight"]
        positions = tensors["vision.embeddings.position_embedding"].shape[1]
        words = tensors["text.embeddings.word_embeddings.weight"]
        vision_inner = tensors["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]
        text_inner = tensors["text.encoder.layer.0.intermediate.dense.weight"].shape[0]
        text_positions = tensors["text.embeddings.position_embeddings.weight"].shape[0]
        heads = [tensors[f"head.{place}.weight"] for place in _HEAD]
    except KeyError as e:
        raise CheckpointError(f"{weights.source} is not ImageReward: it has no {e}.") from e
    vision = transformers.BlipVisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=vision_inner,
        num_hidden_layers=_count(tensors, "vision.encoder.layers."),
        num_attention_heads=max(1, patch.shape[0] // 64),
        image_size=round((positions - 1) ** 0.5) * patch.shape[-1],
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,  # timm's, which BLIP uses; transformers' converted configs say 1e-5
    )
    text = transformers.BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=patch.shape[0],
        intermediate_size=text_inner,
        num_hidden_layers=_count(tensors, "text.encoder.layer."),
        num_attention_heads=max(1, words.shape[1] // 64),
        max_position_embeddings=text_positions,
        layer_norm_eps=1e-12,
        pad_token_id=0,
    )
    vision._attn_implementation = text._attn_implementation = "eager"
    with torch.device("meta"):
        network = RewardNetwork(vision, text, [heads[0].shape[1], *(w.shape[0] for w in heads)])
    return fill(network, tensors, precision=precision, source=weights.source, ops=ops)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].partition(".")[0]) for name in tensors if name.startswith(prefix))


def read_tokenizer(folders: Sequence[Path | None], source: Path) -> Any:
    """BERT's tokenizer from the first folder that has vocab.txt. Raises CheckpointError: none has."""
    transformers = require_transformers()
    for folder in folders:
        if folder is not None and (folder / "vocab.txt").is_file():
            return transformers.BertTokenizer.from_pretrained(str(folder), local_files_only=True, do_lower_case=True)
    raise CheckpointError(
        f"{source} reads prompts and has no tokenizer: put vocab.txt of bert-base-uncased beside it, in a folder of "
        "its own."
    )


class ImageReward(BatchScorer[Tensor]):
    """ImageReward as a scorer; about -2.5 to 2.5, 0 is the mean of its training pictures."""

    name = "ImageReward"
    low: float | None = None
    high: float | None = None
    higher_is_better = True
    reads_prompt = True

    key: str = ""

    def __init__(self, network: Any, tokenizer: Any, *, place: Place = stay):
        """`network`: of `build_network`; `place`: the host's memory manager."""
        self.network = network
        self.tokenizer = tokenizer
        self.side_px = int(network.vision.config.image_size)
        self._bring: Bring = place(network)

    def prepare(self, rgb_HWC: np.ndarray) -> Tensor:
        return prepare_cropped(rgb_HWC, self.side_px)

    def start(self) -> Callable[[list[Tensor], list[str]], Sequence[float]]:
        return lambda made, texts: self._score_batch(torch.stack(made), texts).tolist()

    @torch.inference_mode()
    def _score_batch(self, pixels_BCHW: Tensor, texts: list[str]) -> Tensor:
        device = self._bring()
        text = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(device)
        dtype = self.network.head["0"].weight.dtype
        return self.network(pixels_BCHW.to(device, dtype), text["input_ids"], text["attention_mask"]).cpu()


def load_image_reward(
    weights: Weights,
    tokenizer_folders: Sequence[Path | None] = (),
    *,
    precision: Precision = "fp32",
    ops: Any = None,
    place: Place = stay,
) -> ImageReward:
    """The scorer of ImageReward.pt. Raises as `build_network` and `read_tokenizer` do."""
    tokenizer = read_tokenizer([weights.folder, weights.source.parent, *tokenizer_folders], weights.source)
    return ImageReward(build_network(weights, precision=precision, ops=ops), tokenizer, place=place)
