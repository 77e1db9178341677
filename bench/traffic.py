"""Elementwise memory traffic of one transformer block, counted from dispatched operations: no GPU, no noise.

Traffic = bytes read plus bytes written by every kernel that is neither a matrix product nor attention, in units of
U = one [S, 4096] tensor of the model's dtype. Views are free, broadcast operands count at their stored size. torch's
RMS norm counts as the one kernel that it is on CUDA. Runs on the meta device: no memory, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ernie_core.config import DiTConfig
from ..ernie_core.model.dit import Block
from .compare import Row

IMAGE_TOKENS, TEXT_TOKENS = 4096, 256  # 1024 x 1024 px
WIDTH, HEADS, FFN = 4096, 32, 12288
TARGET_UNITS, TARGET_KERNELS = 47, 20

MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


@dataclass(frozen=True)
class Kernel:
    """One launched operation and the bytes it reads and writes."""

    name: str
    bytes: int


def stored_bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor: an expanded axis is stored once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class _Fused(TorchFunctionMode):
    """Leave attention out, and RMS norm whole, where the meta device would break them into parts."""

    def __init__(self, kernels: list[Kernel]) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        if func in (F.rms_norm, torch.rms_norm):
            out = torch.empty_like(args[0])
            operands = (out, *_tensors(args), *_tensors(kwargs))
            self.kernels.append(Kernel("rms_norm", sum(map(stored_bytes, operands))))
            return out
        return func(*args, **kwargs)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in MATRIX_PRODUCTS or name in NO_KERNEL:
            return out
        # Inputs are read but for a plain overwrite; an in-place operation returns what it was given, now written.
        read = [] if name in ("fill_", "zero_") else [*_tensors(args), *_tensors(kwargs)]
        if name == "copy_":
            read = read[1:]
        self.kernels.append(Kernel(name, sum(map(stored_bytes, read)) + sum(map(stored_bytes, _tensors(out)))))
        return out


def count_kernels(function: Callable[[], Any]) -> list[Kernel]:
    """Every elementwise kernel that `function` launches, in order."""
    count = _Count()
    with torch.no_grad(), _Fused(count.kernels), count:
        function()
    return count.kernels


def units(kernels: list[Kernel], *, tokens: int, width: int, dtype: torch.dtype) -> float:
    """Traffic of `kernels` in U."""
    return sum(k.bytes for k in kernels) / (tokens * width * dtype.itemsize)


def count_our_block(*, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[float, int]:
    """(U, kernels) of our block at full width, 1024 px and 256 text tokens."""
    tokens = IMAGE_TOKENS + TEXT_TOKENS
    config = DiTConfig(hidden_size=WIDTH, num_attention_heads=HEADS, ffn_hidden_size=FFN)
    block = Block(config, torch.nn, dtype=dtype, device="meta")
    x = torch.empty(batch, tokens, WIDTH, dtype=dtype, device="meta")
    vector = torch.empty(batch, 1, WIDTH, dtype=dtype, device="meta")
    table = torch.empty(1, tokens, 1, config.head_dim, dtype=dtype, device="meta")
    kernels = count_kernels(lambda: block(x, (vector,) * 6, (table, table)))
    return units(kernels, tokens=batch * tokens, width=WIDTH, dtype=dtype), len(kernels)


def count_diffusers_block(*, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[float, int]:
    """(U, kernels) of diffusers' block with what its transformer hands it."""
    from diffusers.models.transformers.transformer_ernie_image import ErnieImageSharedAdaLNBlock

    tokens = IMAGE_TOKENS + TEXT_TOKENS
    with torch.device("meta"):
        block = ErnieImageSharedAdaLNBlock(WIDTH, HEADS, FFN).to(dtype)
    x = torch.empty(tokens, batch, WIDTH, dtype=dtype, device="meta")
    table = torch.empty(batch, tokens, 1, WIDTH // HEADS, device="meta")  # fp32 angles; each block takes their cosine
    mask = torch.empty(batch, 1, 1, tokens, dtype=torch.bool, device="meta")
    kernels = count_kernels(lambda: block(x, table, [torch.empty_like(x) for _ in range(6)], mask))
    return units(kernels, tokens=batch * tokens, width=WIDTH, dtype=dtype), len(kernels)


def measure() -> list[Row]:
    ours, kernels = count_our_block()
    peer, peer_kernels = count_diffusers_block()
    return [
        Row(
            name="elementwise traffic per block",
            peer_name="diffusers",
            ours=f"{ours:.1f} U in {kernels} kernels",
            peer=f"{peer:.1f} U in {peer_kernels} kernels",
            ratios=(peer / ours,),
            target=f"<= {TARGET_UNITS} U in <= {TARGET_KERNELS}",
            met=ours <= TARGET_UNITS and kernels <= TARGET_KERNELS,
        )
    ]
