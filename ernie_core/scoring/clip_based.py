"""Scorers that look through CLIP: LAION aesthetic, PickScore, HPS v2 and CLIP score.

All of them compare normalised features of transformers' CLIPModel: of the picture with those of its prompt, or, for
LAION's heads, with learned weights. Files come in transformers' names or in open_clip's (as HPS v2 and OpenAI publish
them); which it is, and all sizes, are read from the tensors' names and shapes.

    CLIP score     100 * max(cos, 0)        Hessel et al. 2021 (CLIPScore), scaled as torchmetrics does (theirs: 2.5)
    PickScore      exp(logit_scale) * cos   Kirstain et al. 2023 (yuvalkirstain/PickScore_v1, CLIP-H)
    HPS v2, v2.1   cos                      Wu et al. 2023 (tgxs002/HPSv2, img_score.py; CLIP-H, open_clip's names)
    LAION          head(features)           christophschuhmann/improved-aesthetic-predictor and LAION-AI/
                                            aesthetic-predictor: a linear layer, or five without activations between,
                                            on OpenAI's CLIP ViT-L/14

Pictures are resized (bicubic) to 224 on the shorter side and cropped around the middle; for HPS v2 to 224 on the longer
side and padded with black, as its own code does.

Shape letters: B pictures or prompts, C = 3 colours, D features, S tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import CheckpointError, ErnieError
from .network import Bring, Place, Precision, Weights, fill, require_transformers, stay
from .scorer import BatchScorer

logger = logging.getLogger(__name__)

ClipKind = Literal["clip", "pickscore", "hpsv2"]
NAMES: dict[ClipKind, str] = {"clip": "CLIP score", "pickscore": "PickScore", "hpsv2": "HPS v2"}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP preprocessing
STD = (0.26862954, 0.26130258, 0.27577711)
KEPT_PROMPTS = 256  # features of the last prompts are kept within one call

# Attention heads of the published vision towers, which no shape tells: width -> heads (L 64, H 80, G 88/104 each).
_VISION_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}


# --- pictures --------------------------------------------------------------------------------------------------------


def prepare_cropped(rgb_HWC: np.ndarray, side_px: int = 224) -> Tensor:
    """[C, side, side] fp32: the shorter side becomes `side_px`, then the middle is cut out; CLIP's mean and deviation.

    The longer side is rounded down, as torchvision's Resize does.
    """
    height, width = rgb_HWC.shape[:2]
    if width <= height:
        size = (side_px, max(side_px, int(side_px * height / width)))
    else:
        size = (max(side_px, int(side_px * width / height)), side_px)
    image = Image.fromarray(rgb_HWC).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side_px) / 2), round((size[1] - side_px) / 2)
    return _normalise(np.asarray(image.crop((left, top, left + side_px, top + side_px))))


def prepare_padded(rgb_HWC: np.ndarray, side_px: int = 224) -> Tensor:
    """[C, side, side] fp32: the longer side becomes `side_px`, black bars fill the rest; CLIP's mean and deviation."""
    height, width = rgb_HWC.shape[:2]
    scale = side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(rgb_HWC)
    if scale != 1:
        image = image.resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side_px, side_px))
    square.paste(image, ((side_px - size[0]) // 2, (side_px - size[1]) // 2))
    return _normalise(np.asarray(square))


def _normalise(rgb_HWC: np.ndarray) -> Tensor:
    pixels_HWC = torch.from_numpy(rgb_HWC.astype(np.float32) / 255)
    return ((pixels_HWC - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, 0).contiguous()


# --- names and sizes -------------------------------------------------------------------------------------------------

_OPEN_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers spells it so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IGNORED = ("attn_mask", "position_ids")  # buffers that older versions saved


def is_open_clip(names: Iterable[str]) -> bool:
    """Whether these are open_clip's names (or OpenAI's own, which are the same) of a CLIP with a vision transformer."""
    return "visual.conv1.weight" in set(names)


def is_clip(names: Iterable[str]) -> bool:
    """Whether a whole CLIP, picture and text side, has these names."""
    names = set(names)
    whole = {
        "vision_model.embeddings.class_embedding",
        "text_model.final_layer_norm.weight",
        "visual_projection.weight",
    }
    return whole <= names or {"visual.conv1.weight", "ln_final.weight"} <= names


def is_clip_vision(names: Iterable[str]) -> bool:
    """Whether a CLIP's picture side, with its projection, has these names; the text side may be there too."""
    names = set(names)
    return is_open_clip(names) or {"vision_model.embeddings.class_embedding", "visual_projection.weight"} <= names


def to_transformers(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The state dict under transformers' names; buffers that old files hold are left out.

    Raises CheckpointError: names that are not CLIP's (the first five).
    """
    tensors = {name: t for name, t in tensors.items() if name.rpartition(".")[2] not in _IGNORED}
    if not is_open_clip(tensors):
        return tensors
    made: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        side = "vision_model" if name.startswith("visual.") else "text_model"
        block, _, rest = name.removeprefix("visual.").partition("transformer.resblocks.")
        if name in _OPEN_CLIP:
            made[_OPEN_CLIP[name]] = tensor
        elif name == "visual.proj":
            made["visual_projection.weight"] = tensor.T
        elif name == "text_projection":
            made["text_projection.weight"] = tensor.T
        elif name == "text_projection.weight":
            made[name] = tensor
        elif not block and rest:
            number, _, leaf = rest.partition(".")
            layer = f"{side}.encoder.layers.{number}"
            module, _, kind = leaf.rpartition(".")
            if leaf in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = leaf.rpartition("_")[2]
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    made[f"{layer}.self_attn.{part}_proj.{kind}"] = rows
            elif module in _IN_BLOCK:
                made[f"{layer}.{_IN_BLOCK[module]}.{kind}"] = tensor
            else:
                unknown.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{source} has {len(unknown)} tensors that CLIP has not: {', '.join(unknown[:5])}.")
    return made


def make_config(tensors: Mapping[str, Tensor], given: Mapping[str, Any], source: Path) -> Any:
    """transformers' CLIPConfig for these tensors (transformers' names); `given`: the folder's config.json or {}.

    Sizes are those of the tensors. Heads and activation are the config's; without one those of the published models:
    vision widths of `_VISION_HEADS`, 64 per head on the text side, quick GELU for OpenAI's ViT-L and ViT-B, else GELU.

    Raises CheckpointError: a vision tower of a width that no published model has, and no config.json.
    """
    transformers = require_transformers()
    text_given, vision_given = (dict(given.get(f"{side}_config") or {}) for side in ("text", "vision"))
    if "vision_config" not in given and "projection_dim" in given:  # a folder that holds the picture side only
        vision_given = dict(given)
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    width, patch_px = patch.shape[0], patch.shape[-1]
    positions = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
    heads = vision_given.get("num_attention_heads") or _VISION_HEADS.get(width)
    if heads is None:
        raise CheckpointError(
            f"{source}: a vision tower {width} wide is none of the published CLIP models "
            f"({', '.join(map(str, _VISION_HEADS))}); choose a folder with its config.json."
        )
    projection = tensors["visual_projection.weight"].shape[0]
    activation = "quick_gelu" if width in (768, 1024) else "gelu"
    vision = {
        "hidden_size": width,
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _num_layers(tensors, "vision_model"),
        "num_attention_heads": heads,
        "patch_size": patch_px,
        "image_size": round((positions - 1) ** 0.5) * patch_px,
        "hidden_act": vision_given.get("hidden_act") or activation,
        "layer_norm_eps": vision_given.get("layer_norm_eps") or 1e-5,
        "projection_dim": projection,
    }
    if "text_model.final_layer_norm.weight" not in tensors:
        return transformers.CLIPVisionConfig(**vision)
    vocabulary, text_width = tensors["text_model.embeddings.token_embedding.weight"].shape
    text = {
        "hidden_size": text_width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _num_layers(tensors, "text_model"),
        "num_attention_heads": text_given.get("num_attention_heads") or max(1, text_width // 64),
        "vocab_size": vocabulary,
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": text_given.get("hidden_act") or activation,
        "layer_norm_eps": text_given.get("layer_norm_eps") or 1e-5,
        "projection_dim": projection,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,  # config.json files from before 2023 say 2, which is wrong
        "pad_token_id": vocabulary - 1,
    }
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def _num_layers(tensors: Mapping[str, Tensor], side: str) -> int:
    prefix = f"{side}.encoder.layers."
    return 1 + max(int(name[len(prefix) :].partition(".")[0]) for name in tensors if name.startswith(prefix))


def build_clip(weights: Weights, *, precision: Precision = "fp32", ops: Any = None, vision_only: bool = False) -> Any:
    """transformers' CLIPModel, or its picture side (CLIPVisionModelWithProjection), with these weights.

    Raises CheckpointError: missing or extra tensors, or sizes that nothing tells.
    """
    transformers = require_transformers()
    tensors = to_transformers(weights.tensors, weights.source)
    if vision_only:
        tensors = {n: t for n, t in tensors.items() if n.startswith(("vision_model.", "visual_projection."))}
    config = make_config(tensors, weights.config, weights.source)
    config._attn_implementation = "sdpa"
    whole = "text_model.final_layer_norm.weight" in tensors
    model_class: Any = transformers.CLIPModel if whole else transformers.CLIPVisionModelWithProjection
    with torch.device("meta"):
        network = model_class(config)
    return fill(network, tensors, precision=precision, source=weights.source, ops=ops)


def image_features(network: Any, pixels_BCHW: Tensor) -> Tensor:
    """[B, D] fp32, each of length 1."""
    hidden = network.vision_model(pixel_values=pixels_BCHW).pooler_output
    return F.normalize(network.visual_projection(hidden).float(), dim=-1)


def text_features(network: Any, ids_BS: Tensor) -> Tensor:
    """[B, D] fp32, each of length 1; rows end at their first end token."""
    hidden = network.text_model(input_ids=ids_BS).pooler_output
    return F.normalize(network.text_projection(hidden).float(), dim=-1)


# --- text ------------------------------------------------------------------------------------------------------------


def read_tokenizer(folders: Sequence[Path | None], source: Path) -> Any:
    """CLIP's tokenizer out of the first folder that has tokenizer.json, or vocab.json and merges.txt.

    Raises CheckpointError: none has, or the files are damaged.
    """
    transformers = require_transformers()
    for folder in folders:
        if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
            continue
        try:
            return transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as e:  # the tokenizers library raises nothing narrower
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {e}; download it again.") from e
    raise CheckpointError(
        f"{source} reads prompts and has no tokenizer: put vocab.json and merges.txt of CLIP beside it, in a folder of "
        "its own, and choose that folder."
    )


class Prompts:
    """Features of prompts, kept for the next picture with the same one."""

    def __init__(self, network: Any, tokenizer: Any):
        self.network = network
        self.tokenizer = tokenizer
        self.length: int = network.config.text_config.max_position_embeddings
        self.eos: int = network.config.text_config.eos_token_id
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def ids(self, texts: Sequence[str]) -> Tensor:
        """[B, S], cut to the model's length with an end token last, a warning for each that is cut."""
        rows: list[list[int]] = []
        for text in texts:
            row = list(self.tokenizer(text)["input_ids"])
            if len(row) > self.length:
                logger.warning(
                    "the prompt has %d tokens; CLIP reads the first %d: %.60s...", len(row), self.length, text
                )
                row = [*row[: self.length - 1], self.eos]
            rows.append(row)
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[self.eos] * (longest - len(row))] for row in rows])

    def features(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """[B, D] for each of the texts; those not seen before are computed together."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if fresh:
            made_BD = text_features(self.network, self.ids(fresh).to(device))
            self._kept.update(zip(fresh, made_BD, strict=True))
        out_BD = torch.stack([self._kept[text] for text in texts])
        while len(self._kept) > KEPT_PROMPTS:
            self._kept.popitem(last=False)
        return out_BD


# --- scorers ---------------------------------------------------------------------------------------------------------


class ClipScorer(BatchScorer[Tensor]):
    """CLIP score, PickScore or HPS v2: how well a picture fits its prompt."""

    higher_is_better = True
    reads_prompt = True

    key: str = ""

    def __init__(self, network: Any, tokenizer: Any, kind: ClipKind = "clip", *, place: Place = stay):
        """`network`: of `build_clip`, both sides; `place`: the host's memory manager."""
        if kind not in NAMES:
            raise ErnieError(f"kind must be one of {', '.join(NAMES)}, got {kind!r}.")
        vocabulary = network.config.text_config.vocab_size
        if len(tokenizer) > vocabulary:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}: it belongs to another model."
            )
        self.kind: ClipKind = kind
        self.name = NAMES[kind]
        self.low: float | None = {"clip": 0.0, "hpsv2": -1.0}.get(kind)
        self.high: float | None = {"clip": 100.0, "hpsv2": 1.0}.get(kind)
        self.network = network
        self.tokenizer = tokenizer
        self.side_px = int(network.config.vision_config.image_size)
        self._bring: Bring = place(network)

    def prepare(self, rgb_HWC: np.ndarray) -> Tensor:
        fit = prepare_padded if self.kind == "hpsv2" else prepare_cropped
        return fit(rgb_HWC, self.side_px)

    def start(self) -> Callable[[list[Tensor], list[str]], Sequence[float]]:
        kept = Prompts(self.network, self.tokenizer)
        return lambda made, texts: self._score_batch(torch.stack(made), texts, kept).tolist()

    @torch.inference_mode()
    def _score_batch(self, pixels_BCHW: Tensor, texts: list[str], prompts: Prompts) -> Tensor:
        device = self._bring()
        dtype = self.network.visual_projection.weight.dtype
        cosine_B = (image_features(self.network, pixels_BCHW.to(device, dtype)) * prompts.features(texts, device)).sum(
            dim=-1
        )
        if self.kind == "clip":
            return 100 * cosine_B.clamp(min=0)
        if self.kind == "pickscore":
            return self.network.logit_scale.detach().float().to(device).exp() * cosine_B
        return cosine_B


def head_width(tensors: Mapping[str, Tensor]) -> int:
    """How many features an aesthetic head reads."""
    return _head_layers(tensors)[0][0].shape[1]


def is_laion_head(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of an aesthetic head: one or several linear layers that end in one number."""
    try:
        _head_layers(tensors)
    except CheckpointError:
        return False
    return True


def _head_layers(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weight [out, in], bias [out]) in order; they fit each other and the last gives one number."""
    names = [name for name in tensors if name.endswith("weight")]
    if {name.removesuffix("weight") + "bias" for name in names} | set(names) != set(tensors) or not names:
        raise CheckpointError("not an aesthetic head")
    numbered = sorted(names, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    layers = [(tensors[name], tensors[name.removesuffix("weight") + "bias"]) for name in numbered]
    fits = all(w.ndim == 2 and tuple(b.shape) == (w.shape[0],) for w, b in layers)
    if not fits or layers[-1][0].shape[0] != 1:
        raise CheckpointError("not an aesthetic head")
    if any(first[0].shape[0] != second[0].shape[1] for first, second in itertools.pairwise(layers)):
        raise CheckpointError("not an aesthetic head")
    return layers


class LaionAesthetic(BatchScorer[Tensor]):
    """LAION's aesthetic predictor, trained on ratings of 1 to 10; values outside do occur."""

    low: float | None = None
    high: float | None = None
    higher_is_better = True
    reads_prompt = False

    key: str = ""
    backbone_key: str = ""

    def __init__(
        self,
        network: Any,
        head: Mapping[str, Tensor],
        *,
        source: Path,
        place: Place = stay,
        name: str = "LAION aesthetic",
    ):
        """`network`: the picture side of OpenAI's CLIP ViT-L/14; `head`: weights, as published.

        Raises CheckpointError: the head is none, or of another CLIP.
        """
        layers = _head_layers(head)
        # No activation lies between the layers, so that they are one layer: computed once, in fp64.
        weight, bias = (part.double() for part in layers[0])
        for w, b in layers[1:]:
            weight, bias = w.double() @ weight, w.double() @ bias + b.double()
        width = network.visual_projection.out_features
        if weight.shape[1] != width:
            raise CheckpointError(
                f"{source} is for a CLIP with {weight.shape[1]} features, this one has {width}; LAION's heads belong "
                "to OpenAI's CLIP ViT-L/14 (768)."
            )
        self.name = name
        self.network = network
        self.weight_D, self.bias = weight[0].float(), float(bias[0])
        config = getattr(network.config, "vision_config", network.config)
        self.side_px = int(config.image_size)
        self._bring: Bring = place(network)

    def prepare(self, rgb_HWC: np.ndarray) -> Tensor:
        return prepare_cropped(rgb_HWC, self.side_px)

    def start(self) -> Callable[[list[Tensor], list[str]], Sequence[float]]:
        return lambda made, _texts: self._score_batch(torch.stack(made)).tolist()

    @torch.inference_mode()
    def _score_batch(self, pixels_BCHW: Tensor) -> Tensor:
        device = self._bring()
        dtype = self.network.visual_projection.weight.dtype
        features_BD = image_features(self.network, pixels_BCHW.to(device, dtype))
        return features_BD @ self.weight_D.to(device) + self.bias
