"""8-bit weights: reading their scales, turning them back into plain weights, and making them.

Layouts read (ComfyUI's quant_ops, QUANTIZATION.md): `<layer>.comfy_quant`, a uint8 tensor that holds JSON such as
{"format": "float8_e4m3fn"}, beside `weight_scale` and `input_scale`; the same JSON for all layers in the file's
metadata under `_quantization_metadata`; the older `scaled_fp8` marker with `scale_weight` and `scale_input`. Plain
fp8 tensors have no scale and are no quantisation in this sense. A true weight is stored weight * weight_scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError

FP8_DTYPES: dict[str, torch.dtype] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
READABLE = (*FP8_DTYPES, "int8_tensorwise")
# stored columns per true column, of formats that pack two values into a byte
_PACKED = {"nvfp4": 2, "convrot_w4a4": 2}

# names beside `weight` in a quantised layer: file's name -> ComfyUI's present name
_COMPANIONS = {
    "weight_scale": "weight_scale",
    "scale_weight": "weight_scale",
    "input_scale": "input_scale",
    "scale_input": "input_scale",
    "weight_scale_2": "weight_scale_2",
    "pre_quant_scale": "pre_quant_scale",
}
_MARKER = "comfy_quant"
_OLD_MARKER = "scaled_fp8"
METADATA_KEY = "_quantization_metadata"


@dataclass(frozen=True, kw_only=True)
class LayerQuantisation:
    """How one layer's weight is stored."""

    options: Mapping[str, Any]
    """The layer's JSON; "format" names the scheme."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """weight_scale, input_scale, ... under ComfyUI's present names."""

    @property
    def format(self) -> str:
        return str(self.options.get("format", "unknown"))


def is_companion(name: str) -> bool:
    """Whether a tensor of this name is a scale or marker beside a weight, not a weight."""
    leaf = name.rpartition(".")[2]
    return leaf in _COMPANIONS or leaf in (_MARKER, _OLD_MARKER)


def stored_columns(shape: tuple[int, ...], format: str) -> tuple[int, ...]:
    """The true shape of a weight whose stored shape is `shape`."""
    packed = _PACKED.get(format, 1)
    return (*shape[:-1], shape[-1] * packed) if packed > 1 and shape else shape


def read_quantisation(
    companions: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> dict[str, LayerQuantisation]:
    """{layer: how it is stored} for every quantised layer; empty for a plain file.

    Args:
        companions: tensors for which `is_companion` holds, under our names.
        dtypes: of the weights, under our names; it tells the format where nothing else does.
        metadata: the file's own, its layer names without the file's prefix.

    Raises:
        CheckpointError: a marker that is not JSON, or a scale without a weight.
    """
    options: dict[str, dict[str, Any]] = {}
    if METADATA_KEY in metadata:
        options |= _parse(metadata[METADATA_KEY], METADATA_KEY).get("layers", {})
    tensors: dict[str, dict[str, Tensor]] = {}
    old_marker: Tensor | None = None
    for name, tensor in companions.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == _OLD_MARKER:
            old_marker = tensor
        elif leaf == _MARKER:
            options[layer] = _parse(bytes(tensor.flatten().tolist()), name)
        else:
            tensors.setdefault(layer, {})[_COMPANIONS[leaf]] = tensor
    quantisation: dict[str, LayerQuantisation] = {}
    for layer in dict.fromkeys((*options, *tensors)):
        dtype = dtypes.get(f"{layer}.weight")
        if dtype is None:
            raise CheckpointError(f"the quantised layer {layer} has scales but no weight.")
        chosen = options.get(layer)
        if chosen is None and dtype.itemsize > 1 and dtype.is_floating_point:
            continue  # old files write scale 1 beside layers that were left in high precision
        if chosen is None:
            chosen = {"format": _guess_format(dtype, tensors.get(layer, {}))}
            if old_marker is not None and old_marker.numel() == 2:  # how old files ask for it
                chosen |= {"full_precision_matrix_mult": True}
        quantisation[layer] = LayerQuantisation(options=chosen, tensors=tensors.get(layer, {}))
    return quantisation


def _guess_format(dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> str:
    by_dtype = {dtype: name for name, dtype in FP8_DTYPES.items()} | {torch.int8: "int8_tensorwise"}
    if dtype is torch.uint8 and "weight_scale_2" in tensors:
        return "nvfp4"
    return by_dtype.get(dtype, f"unknown ({dtype})")


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise CheckpointError(f"{where} does not hold JSON: {e}.") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, got {type(value).__name__}.")
    return value


def check_readable(quantisation: Mapping[str, LayerQuantisation]) -> None:
    """Raise CheckpointError unless `dequantise` can read every layer; the message names the formats."""
    strange = sorted(
        {
            "int8_tensorwise with rotation (convrot)" if q.format in READABLE else q.format
            for q in quantisation.values()
            if q.format not in READABLE or q.options.get("convrot")
        }
    )
    if strange:
        raise CheckpointError(
            f"the weights are quantised as {', '.join(strange)}, which is not read here (only {', '.join(READABLE)} "
            "are); load the file with the host's own loader, or take a bf16 or fp8 file."
        )


def dequantise_weight(weight: Tensor, quantisation: LayerQuantisation, dtype: torch.dtype) -> Tensor:
    """weight * weight_scale in `dtype`, multiplied in fp32; the scale is one number or one per row."""
    scale = quantisation.tensors.get("weight_scale")
    if scale is None:
        if weight.dtype is torch.int8:
            raise CheckpointError("an int8 weight has no weight_scale; the file is incomplete.")
        return weight.to(dtype)
    scale = scale.to(device=weight.device, dtype=torch.float32)
    if scale.numel() not in (1, weight.shape[0]):
        raise CheckpointError(
            f"weight_scale must hold one number or one per row ({weight.shape[0]}), got shape {tuple(scale.shape)}."
        )
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
    return (weight.float() * scale).to(dtype)


def dequantise(
    state_dict: Mapping[str, Tensor], quantisation: Mapping[str, LayerQuantisation], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The state dict with quantised weights multiplied out in `dtype`; other tensors are passed on as they are.

    Raises:
        CheckpointError: a format other than fp8 with scales or int8 with one scale per tensor or row.
    """
    check_readable(quantisation)
    plain = dict(state_dict)
    for layer, how in quantisation.items():
        plain[f"{layer}.weight"] = dequantise_weight(state_dict[f"{layer}.weight"], how, dtype)
    return plain


def to_comfy_layout(
    state_dict: Mapping[str, Tensor], quantisation: Mapping[str, LayerQuantisation]
) -> dict[str, Tensor]:
    """The state dict with scales and `comfy_quant` markers beside the weights, as the host reads them."""
    full = dict(state_dict)
    for layer, how in quantisation.items():
        full |= {f"{layer}.{name}": tensor for name, tensor in how.tensors.items()}
        marker = json.dumps(dict(how.options)).encode("utf-8")
        full[f"{layer}.{_MARKER}"] = torch.tensor(list(marker), dtype=torch.uint8)
    return full


def quantise_fp8(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """(fp8 weight, fp32 scale): the largest absolute value lands on the format's largest number; 0 stays 0."""
    largest = weight.detach().abs().amax().float()
    scale = torch.where(largest > 0, largest / torch.finfo(dtype).max, torch.ones_like(largest))
    limit = torch.finfo(dtype).max
    return (weight.detach().float() / scale).clamp(-limit, limit).to(dtype), scale


# --- computing with 8-bit weights ---------------------------------------------------------------------------

RowFormat = Literal["fp8", "int8"]


def quantise_rows(weight: Tensor, format: RowFormat) -> tuple[Tensor, Tensor]:
    """(8-bit weight, fp32 scale [out, 1]): the largest absolute value of each row lands on the format's largest number.

    fp8 is e4m3, int8 symmetric. A row of zeros stays zeros.

    Raises:
        CheckpointError: infinite or undefined values, which no scale can hold.
    """
    exact = weight.detach().float()
    largest = exact.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise CheckpointError("the weight holds infinite or undefined values; take another file.")
    limit = torch.finfo(torch.float8_e4m3fn).max if format == "fp8" else 127.0
    scale = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    scaled = (exact / scale).clamp(-limit, limit)
    return (scaled.to(torch.float8_e4m3fn) if format == "fp8" else scaled.round().to(torch.int8)), scale


class _QuantisedProduct(torch.autograd.Function):
    """x W^T with W multiplied out for the call, and again in backward: no 16-bit copy is kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, multiply_out(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, scale) = grads, ctx.saved_tensors
        return grad @ multiply_out(weight, scale, grad.dtype), None, None, None


@torch.no_grad()
def multiply_out(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An 8-bit weight times its fp32 scale, rounded once to `dtype`, without an fp32 copy of the matrix on the way."""
    exact = weight if weight.dtype is torch.int8 else weight.to(dtype)  # every fp8 value is a bf16 value
    return torch.mul(exact, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight stays in 8 bits; activations and products are in the input's dtype.

    `weight` [out, in] is fp8 or int8, `weight_scale` fp32, one for all [1, 1] or one per row [out, 1].
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if scale.numel() not in (1, self.out_features):
            raise CheckpointError(
                f"weight_scale must hold one number or one per row ({self.out_features}), got shape "
                f"{tuple(scale.shape)}."
            )
        self.weight: Tensor
        self.weight_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        # Two axes always: a scale of none would not lift the product to fp32.
        self.register_buffer("weight_scale", scale.float().reshape(-1, 1))
        self.register_buffer("bias", bias)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight multiplied out."""
        return multiply_out(self.weight, self.weight_scale, dtype)

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear names it
        return cast(Tensor, _QuantisedProduct.apply(input, self.weight, self.weight_scale, self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight.dtype}"
