"""Key names of every layout in which ERNIE-Image's networks are published, and what other files look like.

Sources: baidu/ERNIE-Image (official folders, diffusers and transformers names), Comfy-Org/ERNIE-Image (single
files) and ComfyUI's full checkpoints. Inside the pack there is one name per tensor ("our names"): the transformer's
bare names; `embed_tokens.weight`, `layers.N...`, `norm.weight` for the two language models; diffusers' names for
the VAE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import CheckpointError

Kind = Literal["transformer", "text_encoder", "enhancer", "vae"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Shape = tuple[int, ...]

NAMES: dict[Kind, str] = {
    "transformer": "an ERNIE-Image transformer",
    "text_encoder": "an ERNIE-Image text encoder",
    "enhancer": "an ERNIE-Image prompt enhancer",
    "vae": "a FLUX.2 VAE",
}

# Sub-folder of the official layout -> kind, and where the tokenizer of a language model lies
FOLDERS: dict[Kind, str] = {
    "transformer": "transformer",
    "text_encoder": "text_encoder",
    "enhancer": "pe",
    "vae": "vae",
}
TOKENIZER_FOLDERS: dict[Kind, str] = {"text_encoder": "tokenizer", "enhancer": "pe_tokenizer"}

# Single files for ComfyUI's model folders, with the paths inside the repository
SINGLE_FILE_REPOSITORY = "Comfy-Org/ERNIE-Image"
SINGLE_FILES: dict[str, Kind] = {
    "diffusion_models/ernie-image.safetensors": "transformer",
    "diffusion_models/ernie-image-turbo.safetensors": "transformer",
    "text_encoders/ministral-3-3b.safetensors": "text_encoder",
    "text_encoders/ernie-image-prompt-enhancer.safetensors": "enhancer",
    "vae/flux2-vae.safetensors": "vae",
}

_CHECKPOINT_TEXT_ENCODER = "text_encoders.ministral3_3b.transformer."
_LANGUAGE_MODEL_PREFIXES = (
    "language_model.model.",
    "model.language_model.model.",
    "model.language_model.",
    "language_model.",
    _CHECKPOINT_TEXT_ENCODER + "model.",
    "model.",
    "",
)
PREFIXES: dict[Kind, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    "text_encoder": _LANGUAGE_MODEL_PREFIXES,
    "enhancer": _LANGUAGE_MODEL_PREFIXES,
    "vae": ("vae.", "first_stage_model.", ""),
}

# A prefix is right when one of these follows it.
_SIGNATURES: dict[Kind, tuple[str, ...]] = {
    "transformer": ("layers.0.adaLN_sa_ln.weight", "layers.0.mlp.linear_fc2.weight"),
    "text_encoder": ("layers.0.post_attention_layernorm.weight",),
    "enhancer": ("layers.0.post_attention_layernorm.weight",),
    "vae": ("bn.running_mean",),
}

# Parts of a full checkpoint: in such a file keys of the other parts are not "extra".
_CHECKPOINT_PARTS = (
    "model.diffusion_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "vae.",
    "first_stage_model.",
)

TEKKEN_KEY = "tekken_model"
_UNUSED_TEXT_KEYS = re.compile(
    r"^(?:text_encoders\.(?:ministral3_3b\.(?:transformer\.)?)?)?(?:model\.|language_model\.)*"
    r"(?:vision_tower\..*|multi_modal_projector\..*|lm_head\..*|logit_scale)$"
)
_VISION_KEYS = re.compile(r"(?:^|\.)(?:vision_tower|multi_modal_projector)\.")


def find_prefix(keys: Iterable[str], kind: Kind) -> str | None:
    """The prefix under which the tensors of `kind` lie among `keys`, or None when they are not there."""
    keys = keys if isinstance(keys, set | frozenset | Mapping) else set(keys)
    for prefix in PREFIXES[kind]:
        if any(prefix + signature in keys for signature in _SIGNATURES[kind]):
            # norms over q and k, or biases, are other families' (Qwen)
            block = f"{prefix}layers.0.self_attn."
            if kind in TOKENIZER_FOLDERS and (block + "q_norm.weight" in keys or block + "q_proj.bias" in keys):
                return None
            return prefix
    return None


def to_our_names(keys: Iterable[str], kind: Kind, prefix: str) -> tuple[dict[str, str], list[str]]:
    """({our name: key in the file}, keys that have no business in a file of this kind).

    Left out of both: the vision tower, projector, tied output weights and tokenizer of a language model, and the other
    parts of a full checkpoint.
    """
    ours: dict[str, str] = {}
    strangers: list[str] = []
    parts = tuple(part for part in _CHECKPOINT_PARTS if part != prefix)
    for key in keys:
        if key.endswith(TEKKEN_KEY) or (kind in TOKENIZER_FOLDERS and _UNUSED_TEXT_KEYS.match(key)):
            continue
        if key.startswith(prefix) and not (prefix == "" and key.startswith(parts)):
            name = key[len(prefix) :]
            ours[vae_to_diffusers(name) if kind == "vae" else name] = key
        elif not key.startswith(parts):
            strangers.append(key)
    return ours, strangers


def find_tekken(keys: Iterable[str]) -> str | None:
    """The key whose uint8 tensor holds a tekken.json, or None."""
    return next((key for key in keys if key.endswith(TEKKEN_KEY)), None)


# --- VAE: diffusers names <-> the names of BFL's and ComfyUI's files ----------------------------------------

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION_BACK = {theirs: ours for ours, theirs in _ATTENTION.items()}
_LEAVES = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
_LEAVES_BACK = {theirs: ours for ours, theirs in _LEAVES.items()}
_QUANT_CONV = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
VAE_LEVELS = 4  # 8x down; BFL counts the decoder's levels from the other end, so the names depend on it

_DOWN = re.compile(r"^encoder\.down\.(\d+)\.(?:block\.(\d+)|downsample)\.(.+)$")
_UP = re.compile(r"^decoder\.up\.(\d+)\.(?:block\.(\d+)|upsample)\.(.+)$")
_MID = re.compile(r"^(encoder|decoder)\.mid\.(?:block_([12])|attn_1)\.(.+)$")
_DOWN_OURS = re.compile(r"^encoder\.down_blocks\.(\d+)\.(?:resnets\.(\d+)|downsamplers\.0)\.(.+)$")
_UP_OURS = re.compile(r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.(.+)$")
_MID_OURS = re.compile(r"^(encoder|decoder)\.mid_block\.(?:resnets\.([01])|attentions\.0)\.(.+)$")


def _swap_part(name: str, table: Mapping[str, str]) -> str:
    """Replace the module name in `name` ("<module>.weight") by its entry, if it has one."""
    module, _, leaf = name.rpartition(".")
    return f"{table.get(module, module)}.{leaf}"


def vae_to_diffusers(name: str) -> str:
    """The diffusers name of a tensor under its BFL/ComfyUI name; diffusers names stay as they are."""
    for theirs, ours in _QUANT_CONV.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    if m := _DOWN.match(name):
        part = "downsamplers.0" if m[2] is None else f"resnets.{m[2]}"
        return f"encoder.down_blocks.{m[1]}.{part}.{_swap_part(m[3], _LEAVES_BACK)}"
    if m := _UP.match(name):
        part = "upsamplers.0" if m[2] is None else f"resnets.{m[2]}"
        return f"decoder.up_blocks.{VAE_LEVELS - 1 - int(m[1])}.{part}.{_swap_part(m[3], _LEAVES_BACK)}"
    if m := _MID.match(name):
        if m[2] is None:
            return f"{m[1]}.mid_block.attentions.0.{_swap_part(m[3], _ATTENTION_BACK)}"
        return f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.{_swap_part(m[3], _LEAVES_BACK)}"
    coder, _, rest = name.partition(".")
    return f"{coder}.{_swap_part(rest, _LEAVES_BACK)}" if coder in ("encoder", "decoder") else name


def vae_to_bfl(name: str) -> str:
    """The BFL/ComfyUI name of a tensor under its diffusers name: the inverse of `vae_to_diffusers`."""
    for theirs, ours in _QUANT_CONV.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    if m := _DOWN_OURS.match(name):
        part = "downsample" if m[2] is None else f"block.{m[2]}"
        return f"encoder.down.{m[1]}.{part}.{_swap_part(m[3], _LEAVES)}"
    if m := _UP_OURS.match(name):
        part = "upsample" if m[2] is None else f"block.{m[2]}"
        return f"decoder.up.{VAE_LEVELS - 1 - int(m[1])}.{part}.{_swap_part(m[3], _LEAVES)}"
    if m := _MID_OURS.match(name):
        if m[2] is None:
            return f"{m[1]}.mid.attn_1.{_swap_part(m[3], _ATTENTION)}"
        return f"{m[1]}.mid.block_{int(m[2]) + 1}.{_swap_part(m[3], _LEAVES)}"
    coder, _, rest = name.partition(".")
    return f"{coder}.{_swap_part(rest, _LEAVES)}" if coder in ("encoder", "decoder") else name


def is_vae_attention(name: str) -> bool:
    """Whether this (diffusers) name is one of the attention matrices that BFL files hold as 1x1 convolutions."""
    return bool(re.search(r"\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight$", name))


# --- language models: sizes from shapes ---------------------------------------------------------------------

# text_encoder/config.json (text_config) and pe/config.json of the release; what no tensor's shape tells
RELEASED_ROPE = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "max_position_embeddings": 262144,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_RELEASED_TEXT: dict[str, Any] = {
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_parameters": RELEASED_ROPE,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
}
_MODEL_TYPES: dict[Kind, str] = {"text_encoder": "mistral", "enhancer": "ministral3"}


def text_config(shapes: Mapping[str, Shape], kind: Kind, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a language model from its shapes (our names), the rest from `given` or else the release.

    Raises:
        CheckpointError: a size in `given` is not the weights', a tensor to read from is missing, or the head size is
            neither given nor the released 128.
    """
    given = dict(given or {})
    try:
        vocab, hidden = shapes["embed_tokens.weight"]
        intermediate = shapes["layers.0.mlp.gate_proj.weight"][0]
        q_rows = shapes["layers.0.self_attn.q_proj.weight"][0]
        kv_rows = shapes["layers.0.self_attn.k_proj.weight"][0]
        layers = 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("layers."))
    except KeyError as e:
        raise CheckpointError(f"not {NAMES[kind]}: the tensor {e} is missing.") from e
    head_dim = given.get("head_dim") or (
        hidden // given["num_attention_heads"] if given.get("num_attention_heads") else _RELEASED_TEXT["head_dim"]
    )
    if q_rows % head_dim or kv_rows % head_dim:
        raise CheckpointError(
            f"the attention of this language model is {q_rows} and {kv_rows} wide, which heads of {head_dim} do not "
            "divide; the file needs a config.json, or its content under 'config' in the file's metadata."
        )
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": q_rows // head_dim,
        "num_key_value_heads": kv_rows // head_dim,
    }
    for name, value in sizes.items():
        if given.get(name, value) != value:
            raise CheckpointError(f"config.json says {name} {given[name]}, the weights say {value}.")
    return _RELEASED_TEXT | {"model_type": _MODEL_TYPES[kind]} | given | sizes | {"head_dim": head_dim}


def text_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor of a language model of this config, under our names."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    shapes: dict[str, Shape] = {"embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"layers.{i}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", (hidden,)),
                ("post_attention_layernorm", (hidden,)),
                ("self_attn.q_proj", (q_rows, hidden)),
                ("self_attn.k_proj", (kv_rows, hidden)),
                ("self_attn.v_proj", (kv_rows, hidden)),
                ("self_attn.o_proj", (hidden, q_rows)),
                ("mlp.gate_proj", (ffn, hidden)),
                ("mlp.up_proj", (ffn, hidden)),
                ("mlp.down_proj", (hidden, ffn)),
            )
        }
    return shapes | {"norm.weight": (hidden,)}


# --- what a file looks like ---------------------------------------------------------------------------------

# (what to call it, patterns of which each must be found in some key). First match wins.
_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "a LoRA or another adapter",
        (r"\.(?:lora_[AB]|lora_down|lora_up|lora_mid|lokr_w[12]|hada_w[12]|oft_blocks|dora_scale)\b",),
    ),
    ("a ControlNet", (r"(?:^|\.)(?:controlnet_|control_model\.|zero_convs\.)",)),
    ("a FLUX.2 transformer", (r"(?:^|\.)double_stream_modulation_img\.",)),
    ("a Chroma transformer", (r"(?:^|\.)distilled_guidance_layer\.",)),
    ("a FLUX transformer", (r"(?:^|\.)double_blocks\.0\.", r"(?:^|\.)single_blocks\.0\.")),
    ("a FLUX transformer", (r"(?:^|\.)single_transformer_blocks\.0\.", r"(?:^|\.)transformer_blocks\.0\.")),
    ("a Qwen-Image transformer", (r"(?:^|\.)transformer_blocks\.0\.img_mlp\.",)),
    ("an SD3 transformer", (r"(?:^|\.)joint_blocks\.0\.",)),
    ("a Z-Image or Lumina transformer", (r"(?:^|\.)noise_refiner\.0\.",)),
    ("a HiDream transformer", (r"(?:^|\.)caption_projection\.0\.",)),
    ("a Wan transformer", (r"(?:^|\.)blocks\.0\.cross_attn\.",)),
    ("an SDXL checkpoint", (r"^conditioner\.embedders\.", r"input_blocks\.0\.")),
    ("an SD or SDXL UNet", (r"(?:^|\.)input_blocks\.0\.",)),
    ("an SD or SDXL UNet", (r"^down_blocks\.0\.", r"^mid_block\.")),
    ("a CLIP text encoder", (r"(?:^|\.)text_model\.encoder\.layers\.0\.",)),
    ("a T5 text encoder", (r"(?:^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.",)),
    ("a Qwen3 language model", (r"(?:^|\.)layers\.0\.self_attn\.q_norm\.",)),
    ("a Qwen2 language model", (r"(?:^|\.)layers\.0\.self_attn\.q_proj\.bias$",)),
)

_FOREIGN_QUANTISATION: tuple[tuple[str, str], ...] = (
    ("bitsandbytes (nf4/int8)", r"\.(?:absmax|quant_map|nested_absmax|SCB)$|quant_state\.bitsandbytes"),
    ("nunchaku (svdquant)", r"\.(?:qweight|smooth_factor|wscales)$"),
    ("DFloat11", r"\.(?:encoded_exponent|sign_mantissa)$"),
    ("SDNQ", r"\.(?:zero_point|svd_up|svd_down)$"),
)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a file is, judged by its keys."""

    kinds: tuple[Kind, ...]
    """Networks of ours in it; both language models when nothing tells them apart; empty for a stranger."""
    description: str
    """For messages, with its article: "a LoRA or another adapter", "a FLUX.2 VAE"."""


def language_model_role(keys: Iterable[str]) -> Kind | None:
    """Which of the two language models this is, if its keys tell: only the text encoder keeps a vision tower."""
    keys = list(keys)
    if any(_VISION_KEYS.search(key) for key in keys):
        return "text_encoder"
    return "enhancer" if any(key.endswith("lm_head.weight") for key in keys) else None


def identify(shapes: Mapping[str, Shape]) -> Identity:
    """What the tensors of these names and shapes make up."""
    for description, patterns in _OTHERS[:2]:  # an adapter's keys contain its model's
        if _has_all(shapes, patterns):
            return Identity(kinds=(), description=description)
    kinds: list[Kind] = [kind for kind in KINDS if find_prefix(shapes, kind) is not None]
    role = language_model_role(shapes)
    if role is not None and role in kinds:
        kinds = [kind for kind in kinds if kind == role or kind not in TOKENIZER_FOLDERS]
    if kinds == ["text_encoder", "enhancer"]:
        return Identity(kinds=tuple(kinds), description="a Mistral language model (text encoder or prompt enhancer)")
    if "transformer" in kinds and len(kinds) > 1:
        return Identity(kinds=tuple(kinds), description="a full checkpoint of ERNIE-Image")
    if kinds:
        return Identity(kinds=tuple(kinds), description=NAMES[kinds[0]])
    for description, patterns in _OTHERS:
        if _has_all(shapes, patterns):
            return Identity(kinds=(), description=description)
    return Identity(kinds=(), description=_describe_vae(shapes) or "nothing this pack knows")


def find_foreign_quantisation(keys: Iterable[str]) -> str | None:
    """Name of the quantisation, of those no part of the pack can read, that these keys show; None = none."""
    keys = list(keys)
    for name, pattern in _FOREIGN_QUANTISATION:
        if any(re.search(pattern, key) for key in keys):
            return name
    return None


def _has_all(keys: Iterable[str], patterns: Iterable[str]) -> bool:
    return all(any(re.search(pattern, key) for key in keys) for pattern in patterns)


def _describe_vae(shapes: Mapping[str, Shape]) -> str | None:
    for prefix in PREFIXES["vae"]:
        shape = shapes.get(prefix + "decoder.conv_in.weight")
        if shape is not None and len(shape) == 4:
            family = {4: "an SD or SDXL VAE", 16: "a FLUX.1 or SD3 VAE"}.get(shape[1], "a VAE")
            return f"{family} without the batch-norm statistics that ERNIE-Image needs"
        if shape is not None:
            return "a video VAE"
    return None
