"""Weights of scorers: reading them from what people have, and filling networks of transformers with them.

Networks are built on the meta device and take the tensors of the memory-mapped file one by one, so no weight exists
twice; 8-bit and 4-bit layers are made on the way. Old PyTorch files (.pt, .pth, .bin) are read with weights_only: they
can hold tensors, never code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ErnieError
from ..weights.checkpoint import read_tensors
from ..weights.four_bit import FourBit, FourBitLinear, quantise_nf4
from ..weights.quantise import QuantisedLinear, quantise_rows

logger = logging.getLogger(__name__)

Precision = Literal["bf16", "fp16", "fp32", "int8", "fp8", "nf4"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16", "fp32", "int8", "fp8", "nf4")
LOW_BIT: tuple[Precision, ...] = ("int8", "fp8", "nf4")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

Bring = Callable[[], torch.device]
Place = Callable[[nn.Module], Bring]


def stay(network: nn.Module) -> Bring:
    """The `Place` of a program without a memory manager: the network runs where its weights lie."""
    return lambda: next(network.parameters()).device


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file or folder holds; tensors are views of the file."""

    source: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    """config.json of the folder, {} where there is none."""
    folder: Path | None = None
    """Where tokenizer and config lie, if the weights came from a folder."""


def read_weights(path: Path | str) -> Weights:
    """Everything in a .safetensors, .pt, .pth or .bin file, or in a folder with config.json and weights.

    Raises:
        CheckpointError: not there, damaged, shards missing, or a file with something else than tensors in it.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in TORCH_SUFFIXES:
        return Weights(source=path, tensors=_read_torch(path))
    if path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in TORCH_SUFFIXES)
        if not files:
            raise CheckpointError(f"{path} has neither .safetensors nor .pt, .pth or .bin files; choose another.")
        whole = [p for p in files if p.stem in ("pytorch_model", "open_clip_pytorch_model")] or files
        if len(whole) > 1:
            raise CheckpointError(f"{path} has {len(whole)} weight files; choose one of them.")
        tensors = _read_torch(whole[0])
    else:
        tensors = read_tensors(path)
    folder = path if path.is_dir() else None
    if folder is None and (path.parent / "config.json").is_file() and path.stem.startswith("model"):
        folder = path.parent
    config: dict[str, Any] = {}
    if folder is not None and (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{folder / 'config.json'} cannot be read as JSON: {e}; download it again.") from e
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder / 'config.json'} must hold a JSON object, got {type(config).__name__}.")
    return Weights(source=path, tensors=tensors, config=config, folder=folder)


def fingerprint(tensors: Mapping[str, Tensor], *settings: object) -> str:
    """16 hex digits of names, shapes, types, the first 64 numbers of each tensor, and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1)[:64].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 are no zip archives and cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}.") from e
    except Exception as e:  # UnpicklingError, EOFError, RuntimeError, ...: torch raises nothing narrower
        raise CheckpointError(
            f"{path} cannot be read as tensors ({str(e).splitlines()[0] if str(e) else type(e).__name__}); it is "
            "damaged, or holds code, which is never run. Take a .safetensors file."
        ) from e
    while isinstance(loaded, Mapping) and isinstance(inner := loaded.get("state_dict", loaded.get("model")), Mapping):
        loaded = inner
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()) or not loaded:
        raise CheckpointError(f"{path} holds no state dict; choose another file.")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


# --- building --------------------------------------------------------------------------------------------------------


def require_transformers() -> Any:
    """The package, 5.0 or newer.

    Raises ErnieError: it is not there, or older.
    """
    try:
        import transformers
    except ImportError as e:
        raise ErnieError(f"this scorer needs the package transformers >= 5.0; pip install -U transformers ({e})") from e
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ErnieError(
            f"this scorer needs the package transformers >= 5.0, got {transformers.__version__}; "
            "pip install -U transformers"
        )
    return transformers


class MovedLinear(QuantisedLinear):
    """An 8-bit layer that a host left in main memory is brought over for each call and dropped again."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.device == input.device:
            return super().forward(input)
        weight, scale = (t.to(input.device, non_blocking=True) for t in (self.weight, self.weight_scale))
        bias = None if self.bias is None else self.bias.to(input.device, input.dtype, non_blocking=True)
        return F.linear(input, (weight.to(input.dtype) * scale.to(input.dtype)), bias)


LowBitLinear = (MovedLinear, FourBitLinear)


def fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor | FourBit],
    *,
    precision: Precision,
    source: Path,
    ops: Any = None,
    in_low_bits: Callable[[str], bool] = lambda _layer: False,
) -> nn.Module:
    """`network`, which lies on the meta device, with these weights, frozen and in eval mode; all of them or an error.

    Args:
        precision: of the weights; int8, fp8 and nf4 hold for the linear layers `in_low_bits` says, the rest is bf16.
            A file's own 4-bit weights stay as they are with nf4, and are multiplied out with any other.
        source: for messages.
        ops: namespace with Linear, Embedding, Conv2d and LayerNorm (a host's, that casts and streams); None = torch.nn.

    Raises:
        CheckpointError: missing, extra or misshapen tensors (counts and the first five).
    """
    dtype = DTYPES.get(precision, torch.bfloat16)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    if ops is not None:
        _replace_layers(network, ops, dtype)
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if precision in LOW_BIT and leaf == "weight" and tensor.ndim == 2 and in_low_bits(layer):
            bias = tensors.get(f"{layer}.bias")
            parent, _, child = layer.rpartition(".")
            made = _low_bit_layer(tensor, None if bias is None else _plain(bias, dtype), precision)
            setattr(network.get_submodule(parent), child, made)
        else:
            rest[name] = _plain(tensor, dtype)
    for name in [name for name in rest if isinstance(network.get_submodule(name.rpartition(".")[0]), LowBitLinear)]:
        del rest[name]  # a bias went with its weight
    network.load_state_dict(rest, strict=False, assign=True)
    _make_buffers(network)
    left = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]
    assert not left, left
    return network.eval().requires_grad_(False)


def _plain(tensor: Tensor | FourBit, dtype: torch.dtype) -> Tensor:
    if isinstance(tensor, FourBit):
        return tensor.dequantised(dtype)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _low_bit_layer(weight: Tensor | FourBit, bias: Tensor | None, precision: Precision) -> nn.Module:
    if precision == "nf4":
        return FourBitLinear(weight if isinstance(weight, FourBit) else quantise_nf4(weight), bias)
    assert precision in ("int8", "fp8"), precision
    return MovedLinear(*quantise_rows(_plain(weight, torch.float32), precision), bias)


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raise CheckpointError unless both have the same names and shapes."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {found[name]}, expected {expected[name]}"
        for name in found
        if found[name] != expected.get(name, found[name])
    ]
    if missing or extra or wrong:
        some = [", ".join(names[:5]) or "none" for names in (missing, extra, wrong)]
        raise CheckpointError(
            f"{source} does not fit: {len(missing)} tensors missing ({some[0]}), {len(extra)} extra ({some[1]}), "
            f"{len(wrong)} of another shape ({some[2]})."
        )


def _replace_layers(module: nn.Module, ops: Any, dtype: torch.dtype) -> None:
    """Every Linear, Embedding, Conv2d and LayerNorm below `module` becomes one of `ops`, on the meta device."""
    factory = {"device": "meta", "dtype": dtype}
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            made = ops.Linear(child.in_features, child.out_features, bias=child.bias is not None, **factory)
        elif type(child) is nn.Embedding:
            made = ops.Embedding(child.num_embeddings, child.embedding_dim, **factory)
        elif type(child) is nn.Conv2d:
            made = ops.Conv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                stride=child.stride,
                padding=child.padding,
                bias=child.bias is not None,
                **factory,
            )
        elif type(child) is nn.LayerNorm:
            made = ops.LayerNorm(child.normalized_shape, eps=child.eps, **factory)
        else:
            _replace_layers(child, ops, dtype)
            continue
        setattr(module, name, made)


def _make_buffers(network: nn.Module) -> None:
    """Real values for what no file holds: positions counted up, and rope frequencies."""
    for name, module in list(network.named_modules()):
        frequencies = module._buffers.get("inv_freq")
        if frequencies is not None and frequencies.is_meta:
            parent, _, child = name.rpartition(".")
            with torch.device("cpu"):
                setattr(network.get_submodule(parent), child, type(module)(module.config))
        positions = module._buffers.get("position_ids")
        if positions is not None and positions.is_meta:
            module._buffers["position_ids"] = torch.arange(positions.shape[-1]).expand(positions.shape).clone()


def bring_loose(network: nn.Module, device: torch.device, bring_themselves: Callable[[nn.Module], bool]) -> None:
    """Move what a host leaves behind that loads a network layer by layer: buffers that no file holds, and parameters
    outside of the layers that `bring_themselves`, such as a class token or a norm's gain.
    """
    for module in network.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if not bring_themselves(module) and any(tensor.device != device for tensor in own):
            module._apply(lambda tensor: tensor.to(device), recurse=False)  # what Module.to() does, of this one only
