"""4-bit weights in plain torch: NF4 made from plain weights, NF4 and FP4 read as bitsandbytes stores them.

A weight is cut into blocks of 64 numbers, row after row. A block's largest absolute value is kept in fp32, every
number as one of 16 shares of it; two of them make a byte, the first in the high bits. With the fp32 maxima that is 4.5
bits per number.

Names in a file: `X.weight` (uint8, all bytes in one column), `X.weight.absmax`, `X.weight.quant_map` (the 16 shares)
and `X.weight.quant_state.bitsandbytes__nf4` (JSON as uint8: shape, blocksize, dtype). With double quantisation absmax
is uint8 too, an index into `nested_quant_map` (256 shares) of blocks with their own `nested_absmax`, around the JSON's
`nested_offset`.

Sources: QLoRA (arXiv 2305.14314, appendix E: the 16 levels); bitsandbytes 0.50.2, functional.py (QuantState) and
backends/default for layout and rounding. tests/core/test_four_bit.py compares with numbers that bitsandbytes made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64
_STATE = "quant_state.bitsandbytes__"
_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PIECE = 1 << 22  # numbers worked on at once: bounds the fp32 copies on the way


@dataclass(frozen=True, kw_only=True)
class FourBit:
    """A matrix in 4 bits per number."""

    codes: Tensor
    """uint8 [numbers / 2]."""
    absmax: Tensor
    """fp32 [blocks]."""
    table: Tensor
    """fp32 [16], the shares."""
    shape: tuple[int, ...]
    block: int = BLOCK

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return True

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The matrix: shares times maxima in fp32, rounded once to `dtype`."""
        return multiply_out(self.codes, self.absmax, self.table, self.shape, self.block, dtype)

    def chunk(self, count: int) -> tuple[FourBit, ...]:
        """As Tensor.chunk along the rows.

        Raises CheckpointError: the cut would go through a block.
        """
        numbers = torch.Size(self.shape).numel() // count
        if self.shape[0] % count or numbers % self.block:
            raise CheckpointError(f"a 4-bit weight of shape {self.shape} cannot be cut into {count}; take a bf16 file.")
        codes, absmax = self.codes.split(numbers // 2), self.absmax.split(numbers // self.block)
        shape = (self.shape[0] // count, *self.shape[1:])
        return tuple(
            FourBit(codes=c, absmax=a, table=self.table, shape=shape, block=self.block)
            for c, a in zip(codes, absmax, strict=True)
        )


@torch.no_grad()
def quantise_nf4(weight: Tensor, block: int = BLOCK) -> FourBit:
    """`weight` [out, in] as the nearest NF4 shares of each block's largest absolute value; a block of zeros stays so.

    Raises:
        CheckpointError: infinite or undefined values, which no block can hold.
    """
    flat = weight.detach().reshape(-1)
    table = torch.tensor(NF4, device=weight.device)
    between = (table[1:] + table[:-1]) / 2
    codes, maxima = [], []
    for piece in flat.split(_PIECE // block * block):
        exact = piece.float()
        blocks = F.pad(exact, (0, -len(exact) % block)).view(-1, block)
        absmax = blocks.abs().amax(1)
        if not bool(torch.isfinite(absmax).all()):
            raise CheckpointError("the weight holds infinite or undefined values; take another file.")
        shares = blocks / torch.where(absmax > 0, absmax, torch.ones_like(absmax))[:, None]
        chosen = (
            torch.bucketize(shares, between, out_int32=True).to(torch.uint8).view(-1)[: len(exact) + len(exact) % 2]
        )
        codes.append(chosen[::2] << 4 | chosen[1::2])
        maxima.append(absmax)
    return FourBit(
        codes=torch.cat(codes), absmax=torch.cat(maxima), table=table, shape=tuple(weight.shape), block=block
    )


@torch.no_grad()
def multiply_out(
    codes: Tensor, absmax: Tensor, table: Tensor, shape: tuple[int, ...], block: int, dtype: torch.dtype
) -> Tensor:
    """`FourBit.dequantised` of its parts; fp32 copies are of a part of the matrix at a time."""
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)  # [256, 2]: what a byte stands for
    numbers = torch.Size(shape).numel()
    whole = torch.empty(len(absmax) * block, dtype=dtype, device=codes.device)
    step = max(1, _PIECE // block)
    for start in range(0, len(absmax), step):
        part = codes[start * block // 2 : (start + step) * block // 2]
        shares = F.embedding(part.int(), pairs).view(-1)
        target = whole[start * block : (start + step) * block].view(-1, block)
        shares = F.pad(shares, (0, target.numel() - len(shares))).view(-1, block)
        torch.mul(shares, absmax[start : start + step, None], out=target)
    return whole[:numbers].view(shape)


class FourBitLinear(nn.Module):
    """A frozen linear layer whose weight stays in 4 bits; it is multiplied out for each call, in the input's dtype.

    Where the input lies on another device, the 4-bit weight is brought over for the call and dropped again.
    """

    def __init__(self, weight: FourBit, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block = weight.block
        self.weight: Tensor
        self.absmax: Tensor
        self.table: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight.codes)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("table", weight.table)
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear names it
        codes, absmax, table = (t.to(input.device, non_blocking=True) for t in (self.weight, self.absmax, self.table))
        bias = None if self.bias is None else self.bias.to(input.device, input.dtype, non_blocking=True)
        shape = (self.out_features, self.in_features)
        return F.linear(input, multiply_out(codes, absmax, table, shape, self.block, input.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, 4 bits in blocks of {self.block}"


# --- bitsandbytes' files ---------------------------------------------------------------------------------------------


def is_four_bit(names: Mapping[str, Any]) -> bool:
    """Whether a state dict holds weights as bitsandbytes stores them in 4 bits."""
    return any(f".{_STATE}" in name for name in names)


def read_bitsandbytes(tensors: Mapping[str, Tensor], source: Path | str) -> dict[str, Tensor | FourBit]:
    """The state dict with every 4-bit weight as a FourBit, its companions gone; other tensors are passed on.

    Raises:
        CheckpointError: a companion is missing, a state is no JSON, or lengths do not fit the shape.
    """
    made: dict[str, Tensor | FourBit] = dict(tensors)
    for state_name in [name for name in tensors if f".{_STATE}" in name]:
        name = state_name.partition(f".{_STATE}")[0]
        try:
            state = json.loads(bytes(made.pop(state_name).tolist()))  # type: ignore[union-attr]
            parts = {leaf: made.pop(f"{name}.{leaf}") for leaf in _COMPANIONS if f"{name}.{leaf}" in made}
            made[name] = _join(made[name], state, parts)  # type: ignore[arg-type]
        except KeyError as e:
            raise CheckpointError(
                f"{source}: the 4-bit weight {name} has no {e.args[0]}; the file is incomplete."
            ) from e
        except ValueError as e:  # of JSON, and of _join
            raise CheckpointError(f"{source}: the 4-bit weight {name} cannot be read: {e}") from e
    return made


def _join(codes: Tensor, state: Mapping[str, Any], parts: Mapping[str, Any]) -> FourBit:
    shape, block = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
    absmax, table = parts["absmax"], parts["quant_map"].float().reshape(-1)
    if "nested_absmax" in parts:
        inner = parts["nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
        shares = parts["nested_quant_map"].float()[absmax.reshape(-1).int()]
        absmax = shares * inner + float(state["nested_offset"])
    numbers = torch.Size(shape).numel()
    codes = codes.reshape(-1).view(torch.uint8)  # some store the bytes as another type
    wanted = (-(-numbers // 2), -(-numbers // block), 16)
    found = (codes.numel(), absmax.numel(), table.numel())
    if found != wanted:
        raise ValueError(f"bytes, blocks and levels must be {wanted} for shape {shape}, got {found}.")
    return FourBit(codes=codes, absmax=absmax.float().reshape(-1), table=table, shape=shape, block=block)
