"""LoRA files of every trainer: reading, checking against the transformer, and writing in any dialect.

A file adapts modules. How it spells a module (`transformer.layers.0.self_attention.to_q`,
`lora_unet_layers_0_self_attention_to_q`, ...) is its dialect; what it holds for one is a LoRA, LoKr, LoHa or a plain
difference, each with or without a DoRA magnitude. Here a module has its path in the transformer, and tensors have one
name each (`LoraLayer`). Flat names hold real underscores, so they are looked up among the model's, never split.

The change of a weight at strength 1 is scale * B A (LoRA), scale * w1 (x) w2 (LoKr, Kronecker product), scale *
(w1_a w1_b) * (w2_a w2_b) (LoHa) or the difference itself. scale = alpha / rank, and alpha is, first found first taken:
the file's `.alpha` of the module; `lora_alpha` (and `alpha_pattern`, `use_rslora`) of the safetensors metadata
`lora_adapter_metadata` that diffusers writes; the same of an `adapter_config.json` beside a file called
`adapter_model.safetensors` or alone in its folder; else the rank, so scale 1. A LoKr whose two factors are both whole
has no rank: its `.alpha` is a placeholder in LyCORIS files and not used, PEFT's config does scale it.

DoRA (Liu et al. 2024, arXiv 2402.09353) sets the norm of every row of weight + change to the magnitude `dora_scale`
[out, 1], or of every column when it is [1, in] (LyCORIS without wd_on_output, OneTrainer).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ErnieError
from .checkpoint import read_header, write_safetensors, write_text
from .layouts import Shape, identify

Algorithm = Literal["lora", "lokr", "loha", "diff"]

_SHOWN = 5  # names shown of each list in an error
_PEFT_METADATA = "lora_adapter_metadata"  # diffusers: the PEFT config as JSON, keys prefixed with "transformer."
_PEFT_CONFIG = "adapter_config.json"


# --- one module ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """What a file holds for one module."""

    algorithm: Algorithm
    tensors: Mapping[str, Tensor]
    """lora: lora_A [r, in], lora_B [out, r]. lokr: lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or lokr_w2_a, lokr_w2_b.
    loha: hada_w1_a [out, r], hada_w1_b [r, in], hada_w2_a, hada_w2_b. diff: diff in the weight's shape, or nothing.
    Any of them may hold diff_b [out], the change of the bias. Convolutions keep their two extra axes."""
    alpha: float | None = None
    """scale = alpha / rank; None = scale 1."""
    dora_scale: Tensor | None = None
    """[out, 1] or [1, in]; None = no DoRA."""

    @property
    def rank(self) -> int | None:
        """Inner size of the factors; None where there are none (diff, LoKr of two whole factors)."""
        for name, axis in (("lora_A", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("hada_w1_b", 0)):
            if name in self.tensors:
                return self.tensors[name].shape[axis]
        return None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def has_weight(self) -> bool:
        """Whether the weight changes; False for a file that holds the bias only."""
        return self.algorithm != "diff" or "diff" in self.tensors

    def product(self, device: torch.device | str | None = None) -> Tensor:
        """scale times the factors multiplied out, in fp32; before DoRA. Its shape is [out, in] or the weight's."""
        t = {name: tensor.to(device=device, dtype=torch.float32) for name, tensor in self.tensors.items()}
        if self.algorithm == "diff":
            return t["diff"]
        if self.algorithm == "lora":
            return self.scale * (t["lora_B"].flatten(1) @ t["lora_A"].flatten(1))
        if self.algorithm == "loha":
            return self.scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        w1, w2 = kronecker_factors(t)
        return self.scale * torch.kron(w1, w2.flatten(1))

    def delta(self, weight: Tensor) -> Tensor:
        """What to add to `weight` at strength 1: fp32, in its shape and on its device.

        Only DoRA reads the values of `weight`: the norms are those of weight + change, which counts what was added to
        `weight` before.
        """
        if not self.has_weight:
            return torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)
        change = self.product(weight.device).reshape(weight.shape)
        if self.dora_scale is None:
            return change
        whole = (weight.float() + change).flatten(1)
        ratio = dora_ratio(self.dora_scale, whole)
        return (whole * ratio).reshape(weight.shape) - weight.float()

    def bias_delta(self) -> Tensor | None:
        """What to add to the bias at strength 1, or None."""
        return self.tensors.get("diff_b")


def kronecker_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(w1, w2) of a LoKr, each multiplied out if it is stored as two factors."""
    w1, w2 = (
        tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"].flatten(1)
        for name in ("lokr_w1", "lokr_w2")
    )
    return w1, w2


def dora_ratio(dora_scale: Tensor, whole: Tensor) -> Tensor:
    """magnitude / norm, [out, 1] or [1, in], for `whole` = weight + change [out, in]; a row of zeros stays one."""
    axis = dora_axis(dora_scale)
    magnitude = dora_scale.to(device=whole.device, dtype=torch.float32).reshape((-1, 1) if axis == 1 else (1, -1))
    return magnitude / whole.norm(dim=axis, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def dora_axis(dora_scale: Tensor) -> int:
    """The axis that the norm runs over: 1 for a magnitude per row, 0 for one per column."""
    return 0 if dora_scale.ndim > 1 and dora_scale.shape[0] == 1 and dora_scale.shape[1] > 1 else 1


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One file, its modules under their paths in the transformer."""

    layers: Mapping[str, LoraLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The file's own, without what said its alpha: that is in the layers."""
    dialect: str = "comfyui"
    unmatched: tuple[str, ...] = ()
    """Modules of the file that the transformer does not have, with the reason; empty unless that was allowed."""

    @property
    def summary(self) -> str:
        """ "252 of 252 matched"."""
        return f"{len(self.layers)} of {len(self.layers) + len(self.unmatched)} matched"

    @property
    def ranks(self) -> str:
        """ "16", or "4 to 16"; "-" where nothing has a rank."""
        found = sorted({layer.rank for layer in self.layers.values() if layer.rank is not None})
        return "-" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def module_shapes(model: nn.Module) -> dict[str, Shape]:
    """{module path: weight shape} of every module with a weight, read without touching the weights.

    Linear and convolution layers say their sizes themselves: a host may hold packed or no weights in them.
    """
    shapes: dict[str, Shape] = {}
    for path, module in model.named_modules():
        if hasattr(module, "in_features"):
            shapes[path] = (int(module.out_features), int(module.in_features))  # pyright: ignore
        elif hasattr(module, "kernel_size"):
            groups = module.groups  # pyright: ignore
            shapes[path] = (module.out_channels, module.in_channels // groups, *module.kernel_size)  # pyright: ignore
        elif isinstance(getattr(module, "weight", None), Tensor):
            shapes[path] = tuple(module.weight.shape)  # pyright: ignore
    return shapes


def weight_shapes(tensors: Mapping[str, Tensor | Shape]) -> dict[str, Shape]:
    """{module path: weight shape} of a transformer's state dict, or of its shapes, under our names."""
    return {
        name.removesuffix(".weight"): tuple(t) if isinstance(t, tuple) else tuple(t.shape)
        for name, t in tensors.items()
        if name.endswith(".weight")
    }


_NAMES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "diff": "difference"}


def report_lora(lora: Lora, strengths: Mapping[str, float]) -> str:
    """What the loader tells: "252 of 252 matched", algorithms and ranks, what is at 0, what was left out."""
    kinds: dict[str, int] = {}
    for layer in lora.layers.values():
        name = ("DoRA on " if layer.dora_scale is not None else "") + _NAMES[layer.algorithm]
        kinds[name] = kinds.get(name, 0) + 1
    what = ", ".join(f"{count} {name}" for name, count in kinds.items())
    lines = [lora.summary, f"{what}; rank {lora.ranks}; dialect {lora.dialect}"]
    if len(strengths) < len(lora.layers):
        lines.append(f"{len(lora.layers) - len(strengths)} at strength 0")
    if lora.unmatched:
        more = ", ..." if len(lora.unmatched) > _SHOWN else ""
        lines.append(f"left out: {', '.join(lora.unmatched[:_SHOWN])}{more}")
    return "\n".join(lines)


_FACTOR_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def factor_dtype(name: str) -> torch.dtype:
    """The dtype of factors that is called `name`: bf16, fp16 or fp32."""
    if name not in _FACTOR_DTYPES:
        raise ErnieError(f"the type of the factors must be one of {', '.join(_FACTOR_DTYPES)}, got {name!r}.")
    return _FACTOR_DTYPES[name]


# --- dialects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a file spells what it adapts."""

    prefix: str
    flat: bool = False
    """Dots of the module path are underscores."""
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: bool = False
    """Each module has its `.alpha`; otherwise the scale is multiplied into a factor."""
    dora: str | None = "dora_scale"
    """Name of the DoRA magnitude; None where readers cannot take one."""
    only_lora: bool = False
    """Readers refuse LoKr, LoHa and differences."""
    description: str


_KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": True}

DIALECTS: dict[str, Dialect] = {
    "comfyui": Dialect(
        prefix="diffusion_model.", description="ComfyUI, ai-toolkit, diffusion-pipe; diffusers reads it"
    ),
    "diffusers": Dialect(
        prefix="transformer.", dora=None, only_lora=True, description="diffusers, SimpleTuner, OneTrainer's DIFFUSERS"
    ),
    "kohya": Dialect(
        prefix="lora_unet_", flat=True, description="kohya, musubi-tuner, OneTrainer's KOHYA; not diffusers", **_KOHYA
    ),
    "onetrainer_comfy": Dialect(prefix="diffusion_model.", alpha=True, description="OneTrainer's COMFY"),
    "onetrainer_original": Dialect(
        prefix="", description="OneTrainer's ORIGINAL; ComfyUI's own loader cannot", **_KOHYA
    ),
    "onetrainer_legacy": Dialect(prefix="transformer.", description="OneTrainer's LEGACY", **_KOHYA),
    "peft": Dialect(
        prefix="base_model.model.",
        dora="lora_magnitude_vector",
        only_lora=True,
        description="a raw PEFT adapter (adapter_model.safetensors, with adapter_config.json)",
    ),
    "bare": Dialect(
        prefix="", down="lora_A.default.weight", up="lora_B.default.weight", description="DiffSynth; names as they are"
    ),
    "lycoris": Dialect(prefix="lycoris_", flat=True, description="LyCORIS, SimpleTuner's LyCORIS", **_KOHYA),
    "lora_transformer": Dialect(prefix="lora_transformer_", flat=True, description="older diffusers, kohya", **_KOHYA),
}

# Longest first: a name is cut at the first that leaves a module of the model.
_DOTTED_PREFIXES = (
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet.",
    "lora_transformer.",
    "lycoris.",
    "",
)
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_unet_", "lycoris_")

# What follows a module's name. PEFT may put an adapter's name in between.
_LEAVES: tuple[tuple[str, str], ...] = (
    ("lora_B_bias", r"\.lora_B(?:\.[^.]+)?\.bias$"),
    ("lora_A", r"\.lora_A(?:\.[^.]+){0,2}$"),
    ("lora_B", r"\.lora_B(?:\.[^.]+){0,2}$"),
    ("lora_A", r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)down(?:\.weight)?$"),
    ("lora_B", r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)up(?:\.weight)?$"),
    ("dora_scale", r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+){0,2})$"),
    ("alpha", r"\.(?:lora_)?alpha$"),
    *((name, rf"\.{name}(?:\.[^.]+)?$") for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
    *((name, rf"\.{name}(?:\.[^.]+)?$") for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    *((name, rf"\.{name}(?:\.[^.]+)?$") for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((name, rf"\.{name}(?:\.[^.]+)?$") for name in ("hada_t1", "hada_t2")),
    ("diff", r"\.(?:diff|w_norm)$"),
    ("diff_b", r"\.(?:diff_b|b_norm)$"),
    ("lora_mid", r"\.lora_mid(?:\.weight)?$"),
    ("oft", r"\.(?:oft_blocks|oft_diag|oft_R)(?:\.[^.]+)*$"),
    ("glora", r"\.[ab][12]\.weight$"),
    ("ia3", r"\.(?:on_input|ia3_l)(?:\.[^.]+)*$"),
    ("set_weight", r"\.set_weight$"),
    ("reshape_weight", r"\.reshape_weight$"),
)
_LEAF_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _LEAVES)
_UNREAD = {
    "lora_mid": "LoCon with a middle (Tucker) factor",
    "lokr_t2": "LoKr with a Tucker core",
    "hada_t1": "LoHa with a Tucker core",
    "hada_t2": "LoHa with a Tucker core",
    "oft": "OFT",
    "glora": "GLoRA",
    "ia3": "IA3",
    "set_weight": "whole weights (set_weight)",
    "reshape_weight": "LoRA that reshapes weights",
}

# (what a LoRA is for, a pattern in its keys). First match wins.
_OTHER_MODELS: tuple[tuple[str, str], ...] = (
    ("FLUX.2", r"double_stream_modulation|to_qkv_mlp_proj|single_stream_modulation"),
    ("Chroma", r"distilled_guidance_layer"),
    ("HunyuanVideo", r"double_blocks\.\d+\.img_attn_qkv|individual_token_refiner"),
    ("FLUX", r"double_blocks[._]\d|single_blocks[._]\d|single_transformer_blocks[._]\d"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|img_mod|txt_mod|attn[._]add_q_proj)"),
    ("HiDream", r"double_stream_blocks|single_stream_blocks"),
    ("SD3", r"joint_blocks[._]\d|joint_transformer"),
    ("Z-Image or Lumina", r"noise_refiner|context_refiner|layers[._]\d+[._](?:attention[._]|feed_forward[._]w[123])"),
    ("LTX-Video", r"transformer_blocks[._]\d+[._]attn2[._].*(?:to_k|to_q)|audio_attn"),
    ("Wan", r"blocks[._]\d+[._](?:cross_attn|self_attn)[._]|blocks[._]\d+[._]ffn[._][02]"),
    ("SDXL", r"lora_te2_|(?:input_blocks[._][78]|down_blocks[._]2[._]attentions[._]\d[._]transformer_blocks[._][2-9])"),
    ("SD 1.5 or SDXL", r"(?:input|output|down|up|mid)_blocks?[._]\d|mid_block[._]|lora_te_text_model"),
    ("a language model", r"layers[._]\d+[._]self_attn[._][qkvo]_proj"),
)


def find_dialect(keys: Iterable[str]) -> str:
    """The name in `DIALECTS` that fits these keys best."""
    keys = list(keys)
    has_alpha = any(key.endswith(".alpha") for key in keys)
    kohya = any("lora_down" in key for key in keys)
    default = any(".default" in key for key in keys)

    def begins(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    if begins("base_model.model."):
        return "peft"
    for name in ("kohya", "lora_transformer", "lycoris"):
        if begins(DIALECTS[name].prefix):
            return name
    if begins("diffusion_model."):
        return "onetrainer_comfy" if has_alpha and not kohya else "comfyui"
    if begins("transformer."):
        return "onetrainer_legacy" if kohya or has_alpha else "diffusers"
    return "onetrainer_original" if (has_alpha or kohya) and not default else "bare"


# --- reading ------------------------------------------------------------------------------------------------


def read_lora(path: Path | str, shapes: Mapping[str, Shape], *, allow_unmatched: bool = False) -> Lora:
    """Read a file for the transformer of these shapes; see `parse_lora` and, for alpha, the head of this module.

    Raises:
        CheckpointError: not a whole safetensors file, or what `parse_lora` finds.
    """
    path = Path(path)
    keys, metadata = read_header(path)
    config = path.parent / _PEFT_CONFIG
    alone = path.name == "adapter_model.safetensors" or [*path.parent.glob("*.safetensors")] == [path]
    if alone and config.is_file() and _PEFT_METADATA not in metadata:
        try:
            metadata = metadata | {_PEFT_METADATA: config.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{config} cannot be read: {e}.") from e
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as reader:
            tensors = {key: reader.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}; download it again.") from e
    try:
        return parse_lora(tensors, shapes, metadata, allow_unmatched=allow_unmatched)
    except CheckpointError as e:
        raise CheckpointError(f"{path.name}: {e}") from e


def parse_lora(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str] | None = None,
    *,
    allow_unmatched: bool = False,
) -> Lora:
    """The modules that `state_dict` adapts, checked against the transformer.

    Args:
        shapes: {module path: weight shape} of the transformer (`module_shapes`, `weight_shapes`).
        metadata: the file's own; it may hold alpha.
        allow_unmatched: leave out modules that the transformer does not have, or has in another size.

    Raises:
        CheckpointError: no adapter in it; modules the transformer does not have (how many, the first five, what the
            file looks like); none that it has, whatever is allowed; half a pair, factors that do not fit together,
            values that are not finite, or an algorithm that is not read here.
    """
    modules = _group(state_dict)
    flat = {path.replace(".", "_"): path for path in shapes}
    metadata = dict(metadata or {})
    alpha_of = _config_alpha(metadata.pop(_PEFT_METADATA, None))
    layers: dict[str, LoraLayer] = {}
    unmatched: list[str] = []
    resized = 0
    for name, tensors in modules.items():
        path = _find_path(name, shapes, flat)
        if path is None:
            unmatched.append(name)
            continue
        if path in layers:
            raise CheckpointError(f"the module {path} is adapted twice, once as {name}; the file is damaged.")
        layer = _make_layer(name, tensors, lambda rank, path=path: alpha_of(path, rank))
        found = _layer_shape(layer)
        if not _fits(layer, found, shapes[path]):
            unmatched.append(f"{name} {list(found)} instead of {list(shapes[path])}")
            resized += 1
            continue
        layers[path] = layer
    if unmatched and (not layers or not allow_unmatched):
        raise CheckpointError(_mismatch(state_dict, len(layers), unmatched, resized))
    return Lora(
        layers={path: layers[path] for path in shapes if path in layers},
        metadata=metadata,
        dialect=find_dialect(state_dict),
        unmatched=tuple(unmatched),
    )


def _group(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module as the file spells it: {our tensor name: tensor}}; unknown keys are modules of their own."""
    modules: dict[str, dict[str, Tensor]] = {}
    known = 0
    for key, tensor in state_dict.items():
        for leaf, pattern in _LEAF_PATTERNS:
            match = pattern.search(key)
            if match is None:
                continue
            known += leaf != "alpha"
            tensors = modules.setdefault(key[: match.start()], {})
            if leaf in tensors:
                raise CheckpointError(f"{key[: match.start()]} has two tensors for {leaf}; the file is damaged.")
            tensors[leaf] = tensor
            break
        else:
            modules.setdefault(key, {})
    if not known:
        looks = identify({key: tuple(tensor.shape) for key, tensor in state_dict.items()}).description
        first = ", ".join(sorted(state_dict)[:_SHOWN]) or "none"
        raise CheckpointError(
            f"there is no LoRA in it ({len(state_dict)} tensors; first are {first}); it looks like {looks}. "
            "Choose a LoRA made for ERNIE-Image."
        )
    return modules


def _find_path(name: str, shapes: Mapping[str, Shape], flat: Mapping[str, str]) -> str | None:
    for prefix in _DOTTED_PREFIXES:
        if name.startswith(prefix) and name[len(prefix) :] in shapes:
            return name[len(prefix) :]
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix) and name[len(prefix) :] in flat:
            return flat[name[len(prefix) :]]
    return None


def _config_alpha(text: str | None) -> Callable[[str, int | None], float | None]:
    """alpha_of(module path, rank or None) by a PEFT config; for no rank it is relative to rank 1."""
    if text is None:
        return lambda _path, _rank: None
    try:
        config = json.loads(text)
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        rank_pattern, alpha_pattern = (config.get(f"{k}_pattern") or {} for k in ("rank", "alpha"))
    except (ValueError, AttributeError) as e:
        raise CheckpointError(f"its PEFT config ({_PEFT_METADATA} or {_PEFT_CONFIG}) is not a JSON object: {e}.") from e

    def alpha_of(path: str, rank: int | None) -> float | None:
        def chosen(pattern: Mapping[str, Any], default: Any) -> Any:
            return next((v for k, v in pattern.items() if re.match(rf"(?:.*\.)?(?:{k})$", path)), default)

        alpha = chosen(alpha_pattern, config.get("lora_alpha", config.get("alpha")))
        if alpha is None:
            return None
        true_rank = rank or chosen(rank_pattern, config.get("r"))
        if not true_rank:
            return None
        scale = alpha / (true_rank**0.5 if config.get("use_rslora") else true_rank)
        return float(scale * (rank or 1))

    return alpha_of


def _make_layer(name: str, tensors: dict[str, Tensor], config_alpha: Callable[[int | None], float | None]) -> LoraLayer:
    """One module's tensors as a layer; CheckpointError when they do not make one."""
    for leaf, what in _UNREAD.items():
        if leaf in tensors:
            raise CheckpointError(f"{name} is {what}, which is not read here; convert it to a LoRA with its trainer.")
    for leaf, tensor in tensors.items():
        if not tensor.is_floating_point() and leaf != "alpha":
            raise CheckpointError(f"{name}: {leaf} holds {tensor.dtype} instead of floating-point numbers.")
        if not torch.isfinite(tensor.float()).all():
            raise CheckpointError(
                f"{name}: {leaf} holds NaN or infinite values; the training went wrong or the file is damaged."
            )
    own = dict(tensors)
    stored_alpha, dora_scale = own.pop("alpha", None), own.pop("dora_scale", None)
    up_bias = own.pop("lora_B_bias", None)
    algorithm = _algorithm(name, own)
    layer = LoraLayer(algorithm=algorithm, tensors=own)
    _check_factors(name, layer)
    if stored_alpha is not None:
        if stored_alpha.numel() != 1:
            raise CheckpointError(f"{name}: alpha must be one number, got shape {list(stored_alpha.shape)}.")
        layer = replace(layer, alpha=None if layer.rank is None else float(stored_alpha))
    else:
        alpha = config_alpha(layer.rank)
        if alpha is not None and layer.rank is None and algorithm == "lokr":
            own["lokr_w1"] = own["lokr_w1"] * alpha
        elif layer.rank is not None:
            layer = replace(layer, alpha=alpha)
    if up_bias is not None:
        if "diff_b" in own:
            raise CheckpointError(f"{name} has two changes of its bias (lora_B.bias and diff_b); the file is damaged.")
        own["diff_b"] = up_bias * layer.scale
    if dora_scale is not None:
        dora_scale = dora_scale.reshape(-1, 1) if dora_scale.ndim == 1 else dora_scale.flatten(1)
        if dora_scale.shape[0] == 1 and dora_scale.shape[1] == 1 and _layer_shape(layer)[0] != 1:
            raise CheckpointError(f"{name}: dora_scale holds one number instead of one per row or column.")
    return replace(layer, tensors=own, dora_scale=dora_scale)


def _algorithm(name: str, tensors: Mapping[str, Tensor]) -> Algorithm:
    found: list[Algorithm] = []
    if "lora_A" in tensors or "lora_B" in tensors:
        found.append("lora")
    if any(key.startswith("lokr") for key in tensors):
        found.append("lokr")
    if any(key.startswith("hada") for key in tensors):
        found.append("loha")
    if "diff" in tensors or (not found and "diff_b" in tensors):
        found.append("diff")
    if len(found) != 1:
        what = " and ".join(found) if found else f"only {', '.join(tensors) or 'a scale'}"
        raise CheckpointError(f"{name} holds {what}, which is not one adapter; the file is damaged.")
    return found[0]


def _check_factors(name: str, layer: LoraLayer) -> None:
    """CheckpointError unless every factor has its partner and they can be multiplied."""
    t = layer.tensors
    if layer.algorithm == "diff":
        return
    if layer.algorithm == "lora":
        pairs = [("lora_B", "lora_A")]
    elif layer.algorithm == "loha":
        pairs = [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")]
    else:
        pairs = [(f"{w}_a", f"{w}_b") for w in ("lokr_w1", "lokr_w2") if w not in t]
        doubled = [w for w in ("lokr_w1", "lokr_w2") if w in t and (f"{w}_a" in t or f"{w}_b" in t)]
        if doubled:
            raise CheckpointError(f"{name} holds {doubled[0]} whole and as factors; the file is damaged.")
    for left, right in pairs:
        missing = [key for key in (left, right) if key not in t]
        if missing:
            raise CheckpointError(f"{name} lacks {' and '.join(missing)}: half a pair; the file is damaged.")
        if t[left].ndim < 2 or t[right].ndim < 2 or t[left].shape[1] != t[right].shape[0]:
            raise CheckpointError(
                f"{name}: the ranks of {left} {list(t[left].shape)} and {right} {list(t[right].shape)} differ; "
                "the file is damaged."
            )
    whole = [w for w in ("lokr_w1", "lokr_w2") if w in t and t[w].ndim < 2]
    if whole:
        raise CheckpointError(f"{name}: {whole[0]} must be a matrix, got shape {list(t[whole[0]].shape)}.")
    if layer.algorithm == "loha" and _loha_shape(t, 1) != _loha_shape(t, 2):
        raise CheckpointError(f"{name}: its two halves have the shapes {_loha_shape(t, 1)} and {_loha_shape(t, 2)}.")


def _loha_shape(tensors: Mapping[str, Tensor], half: int) -> Shape:
    return tensors[f"hada_w{half}_a"].shape[0], tensors[f"hada_w{half}_b"].flatten(1).shape[1]


def _layer_shape(layer: LoraLayer) -> Shape:
    """[out, in] that the layer adapts; of a difference its own shape, of a bias alone [out]."""
    t = layer.tensors
    if layer.algorithm == "lora":
        return t["lora_B"].shape[0], t["lora_A"].flatten(1).shape[1]
    if layer.algorithm == "loha":
        return _loha_shape(t, 1)
    if layer.algorithm == "diff":
        return tuple(t["diff" if "diff" in t else "diff_b"].shape)
    rows = columns = 1
    for w in ("lokr_w1", "lokr_w2"):
        rows *= t[w if w in t else f"{w}_a"].shape[0]
        columns *= t[w if w in t else f"{w}_b"].flatten(1).shape[1]
    return rows, columns


def _fits(layer: LoraLayer, found: Shape, weight: Shape) -> bool:
    flat = (weight[0], int(torch.Size(weight[1:]).numel()))
    bias = layer.tensors.get("diff_b")
    if bias is not None and bias.numel() != weight[0]:
        return False
    if layer.dora_scale is not None and tuple(layer.dora_scale.shape) not in ((flat[0], 1), (1, flat[1])):
        return False
    if layer.algorithm == "diff":
        return found == weight if "diff" in layer.tensors else True
    return len(weight) > 1 and found == flat


def _mismatch(state_dict: Mapping[str, Tensor], matched: int, unmatched: list[str], resized: int) -> str:
    total = matched + len(unmatched)
    first = ", ".join(unmatched[:_SHOWN]) + (", ..." if len(unmatched) > _SHOWN else "")
    if resized == len(unmatched) and resized:
        looks = "It looks like a LoRA for an ERNIE-Image of another size."
    else:
        other = next((what for what, p in _OTHER_MODELS if any(re.search(p, key) for key in state_dict)), None)
        looks = f"It looks like a LoRA for {other}." if other else "It is no LoRA for ERNIE-Image that is known here."
        if matched:
            looks = f"Part of it looks like a LoRA for {other}." if other else ""
    hint = (
        "Turn on allow_unmatched to load the rest without them, or choose another file."
        if matched
        else "Choose a LoRA made for ERNIE-Image."
    )
    return " ".join(
        filter(
            None,
            (
                f"{matched} of {total} adapted modules match this model; the others are not in it: {first}.",
                looks,
                hint,
            ),
        )
    )


# --- strength per block -------------------------------------------------------------------------------------

_PARTS: dict[str, str] = {
    "attention": "self_attention",
    "mlp": "mlp",
    "to_q": "self_attention.to_q",
    "to_k": "self_attention.to_k",
    "to_v": "self_attention.to_v",
    "to_out": "self_attention.to_out",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "linear_fc2": "mlp.linear_fc2",
}
BLOCK_SYNTAX = (
    "block weights are entries such as 0-11:0.5, 12:1, attention:0.8, 12-23 mlp:0, other:0 or all:0, separated by "
    f"commas or new lines; parts of a block are {', '.join(_PARTS)}; other = outside the blocks"
)
_ENTRY = re.compile(r"^(?P<blocks>\d+(?:\s*-\s*\d+)?)?\s*(?P<part>[A-Za-z_]\w*)?$")


@dataclass(frozen=True, kw_only=True)
class BlockWeight:
    """One entry of a block-weight text."""

    first: int | None
    """First block; None = every block."""
    last: int | None
    part: str | None
    """A key of the parts, "all" or "other"; None = the whole block."""
    weight: float

    def covers(self, path: str) -> bool:
        block = re.match(r"layers\.(\d+)\.(.+)$", path)
        if block is None or self.part in ("all", "other"):
            return self.part == "all" or (self.part == "other" and block is None)
        if self.first is not None and self.last is not None and not self.first <= int(block[1]) <= self.last:
            return False
        return self.part is None or f"{block[2]}.".startswith(f"{_PARTS[self.part]}.")


def parse_block_weights(text: str, num_layers: int) -> tuple[BlockWeight, ...]:
    """The entries of a block-weight text; empty for an empty text.

    An entry is `blocks:weight`, `part:weight` or `blocks part:weight`. Where entries overlap the last one holds; what
    none names keeps weight 1, so `all:0, 12-20:1` leaves blocks 12 to 20 only.

    Raises:
        ErnieError: an entry that is not one, or a block that the model does not have.
    """
    entries: list[BlockWeight] = []
    for entry in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        selector, colon, number = (part.strip() for part in entry.rpartition(":"))
        match = _ENTRY.match(selector)
        try:
            weight = float(number)
        except ValueError:
            weight = float("nan")
        if not colon or not selector or match is None or not torch.isfinite(torch.tensor(weight)):
            raise ErnieError(f"{entry!r} is no block weight: {BLOCK_SYNTAX}.")
        part, first, last = match["part"], None, None
        if part is not None and part not in (*_PARTS, "all", "other"):
            raise ErnieError(f"{part!r} in {entry!r} is no part of the model: {BLOCK_SYNTAX}.")
        if match["blocks"]:
            first, last = _block_range(match["blocks"])
            if part in ("all", "other"):
                raise ErnieError(f"{entry!r} names blocks and {part}, which is not in blocks: {BLOCK_SYNTAX}.")
            if first > last or last >= num_layers:
                raise ErnieError(f"{entry!r} must name blocks from 0 to {num_layers - 1}, the lower one first.")
        entries.append(BlockWeight(first=first, last=last, part=part, weight=weight))
    return tuple(entries)


def _block_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def module_strengths(lora: Lora, strength: float, blocks: str, shapes: Mapping[str, Shape]) -> dict[str, float]:
    """{module path: strength * block weight} of the modules that are to change; those at 0 are left out.

    Args:
        blocks: text for `parse_block_weights`.
        shapes: the transformer's, which say how many blocks there are.
    """
    numbers = [int(path.split(".")[1]) for path in shapes if path.startswith("layers.")]
    weights = parse_block_weights(blocks, 1 + max(numbers, default=-1))
    chosen: dict[str, float] = {}
    for path in lora.layers:
        weight = next((entry.weight for entry in reversed(weights) if entry.covers(path)), 1.0)
        if strength * weight:
            chosen[path] = strength * weight
    return chosen


# --- writing ------------------------------------------------------------------------------------------------


def folded(layer: LoraLayer) -> LoraLayer:
    """The same layer with its scale multiplied into one factor, in that factor's dtype, and no alpha."""
    if layer.scale == 1.0:
        return replace(layer, alpha=None)
    tensors = dict(layer.tensors)
    name = next(n for n in ("lora_B", "lokr_w1", "lokr_w1_a", "hada_w1_a") if n in tensors)
    tensors[name] = (tensors[name].float() * layer.scale).to(tensors[name].dtype)
    return replace(layer, tensors=tensors, alpha=None)


def check_dialect(lora: Lora, dialect: str) -> None:
    """Raise ErnieError unless `dialect` can say everything that `lora` holds."""
    if dialect not in DIALECTS:
        raise ErnieError(f"the dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}.")
    how = DIALECTS[dialect]
    for path, layer in lora.layers.items():
        strange = None
        if layer.dora_scale is not None and how.dora is None:
            strange = "a DoRA"
        elif layer.dora_scale is not None and how.dora == "lora_magnitude_vector" and dora_axis(layer.dora_scale) == 0:
            strange = "a DoRA with a magnitude per column"
        elif how.only_lora and (layer.algorithm != "lora" or "diff_b" in layer.tensors):
            strange = {"lokr": "a LoKr", "loha": "a LoHa"}.get(layer.algorithm, "a difference of weights or biases")
        if strange:
            able = [name for name, d in DIALECTS.items() if d.dora == "dora_scale" and not d.only_lora]
            raise ErnieError(
                f"{path} is {strange}, which the dialect {dialect} cannot hold; write it as {', '.join(able)}, "
                "or make a plain LoRA of it first (convert with a rank)."
            )


def lora_tensors(lora: Lora, dialect: str = "comfyui") -> dict[str, Tensor]:
    """The tensors of a file in `dialect`, a name in `DIALECTS`.

    Raises:
        ErnieError: no such dialect, or one whose readers cannot take an algorithm in `lora`.
    """
    check_dialect(lora, dialect)
    how = DIALECTS[dialect]
    leaves = {"lora_A": how.down, "lora_B": how.up}
    file: dict[str, Tensor] = {}
    for path, layer in lora.layers.items():
        name = how.prefix + (path.replace(".", "_") if how.flat else path)
        whole = layer if how.alpha else folded(layer)
        file |= {f"{name}.{leaves.get(leaf, leaf)}": tensor for leaf, tensor in whole.tensors.items()}
        if how.alpha and layer.rank is not None:
            alpha = layer.rank if layer.alpha is None else layer.alpha
            file[f"{name}.alpha"] = torch.tensor(float(alpha))
        if layer.dora_scale is not None and how.dora is not None:
            scale = layer.dora_scale
            file[f"{name}.{how.dora}"] = scale.flatten() if how.dora == "lora_magnitude_vector" else scale
    return file


def peft_config(lora: Lora) -> dict[str, Any]:
    """adapter_config.json for a file in the dialect "peft": alpha is the rank everywhere, as the file is folded."""
    ranks = {path: layer.rank or 0 for path, layer in lora.layers.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {path: rank for path, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any(layer.dora_scale is not None for layer in lora.layers.values()),
    }


def write_lora(
    lora: Lora, path: Path | str, *, dialect: str = "comfyui", metadata: Mapping[str, str] | None = None
) -> None:
    """Write `lora` whole or not at all; `metadata` None keeps the file's own.

    The default is what ComfyUI, diffusers and the trainers all read. In the dialect "peft" a file that is called
    adapter_model.safetensors gets its adapter_config.json.

    Raises:
        ErnieError: nothing to write, a dialect that cannot hold it, or the disk is full.
    """
    path = Path(path)
    if not lora.layers:
        raise ErnieError(f"{path.name} would be empty: the LoRA adapts no module.")
    tensors = lora_tensors(lora, dialect)
    texts = dict(lora.metadata if metadata is None else metadata)
    texts.pop(_PEFT_METADATA, None)  # its alpha would be applied to factors that hold it already
    if dialect == "peft" and path.name == "adapter_model.safetensors":
        write_text(path.with_name(_PEFT_CONFIG), json.dumps(peft_config(lora), indent=2) + "\n")
    write_safetensors(tensors, path, metadata={"format": "pt"} | texts)
