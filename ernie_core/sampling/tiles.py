"""Tiled sampling: a picture larger than the model was trained for, in overlapping tiles whose velocities are blended.

MultiDiffusion (arXiv 2302.08113): at every noise level the network sees one tile after the other and each place of the
picture takes the weighted mean of the tiles that cover it, so that all tiles walk one common latent. Attention then
grows with the number of tiles instead of the square of the picture's area.

Positions: a tile is to the network a picture of its own, its RoPE positions run from 0, as in training. It does not
know where in the picture it stands: only what is left of the picture in the latent says that.

Tiles have the asked size and are spread evenly, so neighbours overlap at least as asked. Weights are products of one
raised cosine per axis, rounded to multiples of 1/1024 so that they sum to 1 exactly, in any order.

Sizes are in cells of the latent (16 px) unless they end with `_px`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import SIZE_MULTIPLE
from ..errors import ErnieError
from .guidance import Denoise

WEIGHT_STEPS = 1024


class Box(NamedTuple):
    """A rectangle of the latent."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """What lies in it of a tensor [..., H, W]."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How pictures are cut; ErnieError unless both are multiples of 16 px and 0 <= overlap <= tile / 2."""

    tile_px: int
    overlap_px: int

    def __post_init__(self) -> None:
        is_on_grid = self.tile_px % SIZE_MULTIPLE == self.overlap_px % SIZE_MULTIPLE == 0
        if not is_on_grid or self.tile_px <= 0 or not 0 <= self.overlap_px <= self.tile_px // 2:
            raise ErnieError(
                f"tile and overlap must be multiples of {SIZE_MULTIPLE} px with 0 <= overlap <= tile / 2, "
                f"got {self.tile_px} and {self.overlap_px}."
            )

    def boxes(self, height: int, width: int) -> list[Box]:
        """The tiles of a latent of this size; one where it fits."""
        return tile_boxes(height, width, self.tile_px // SIZE_MULTIPLE, self.overlap_px // SIZE_MULTIPLE)


def tile_boxes(height: int, width: int, tile: int, overlap: int) -> list[Box]:
    """Boxes, row by row, that cover a latent; neighbours share at least `overlap` cells.

    Each is `tile` x `tile`, or the latent's own height or width where that is smaller.
    """
    return [
        Box(top, left, min(tile, height), min(tile, width))
        for top in _starts(height, tile, overlap)
        for left in _starts(width, tile, overlap)
    ]


def _starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    if length <= tile:
        return (0,)
    count = math.ceil((length - overlap) / (tile - overlap))
    return tuple(round(i * (length - tile) / (count - 1)) for i in range(count))


def _axis_weights(length: int, starts: Sequence[int], tile: int) -> Tensor:
    """Weights [tiles, length] fp64 along one axis: multiples of 1 / WEIGHT_STEPS, of sum 1 at each place."""
    place = torch.arange(length, dtype=torch.float64) + 0.5
    raw = torch.zeros(len(starts), length, dtype=torch.float64)
    for i, start in enumerate(starts):
        bump = torch.ones(length, dtype=torch.float64)
        if i > 0:
            shared = max(starts[i - 1] + tile - start, 0)
            bump *= ((place - start) / max(shared, 1)).clamp(0, 1).mul(math.pi / 2).sin().square()
        if i + 1 < len(starts):
            shared = max(start + tile - starts[i + 1], 0)
            bump *= ((start + tile - place) / max(shared, 1)).clamp(0, 1).mul(math.pi / 2).sin().square()
        raw[i, start : start + tile] = bump[start : start + tile]
    units = (raw / raw.sum(dim=0) * WEIGHT_STEPS).round()
    heaviest = units.argmax(dim=0, keepdim=True)
    units.scatter_add_(0, heaviest, WEIGHT_STEPS - units.sum(dim=0, keepdim=True))
    return units / WEIGHT_STEPS


@cache
def _weights(height: int, width: int, boxes: tuple[Box, ...]) -> tuple[Tensor, ...]:
    rows, columns = (tuple(sorted({box[axis] for box in boxes})) for axis in (0, 1))
    down = _axis_weights(height, rows, boxes[0].height)
    across = _axis_weights(width, columns, boxes[0].width)
    return tuple(
        box.of(down[rows.index(box.top), :, None] * across[columns.index(box.left), None, :]).clone() for box in boxes
    )


def tile_weights(height: int, width: int, boxes: Sequence[Box]) -> tuple[Tensor, ...]:
    """Weight [box.height, box.width] of each of `tile_boxes`, fp64; laid over each other they are exactly 1."""
    return _weights(height, width, tuple(boxes))


def in_tiles(call: Callable[[int, Box, Tensor], Tensor], x_BCHW: Tensor, boxes: Sequence[Box]) -> Tensor:
    """call(number, box, part of x) of every box, blended into one tensor like `x_BCHW`; one box is called as it is."""
    if len(boxes) == 1:
        return call(0, boxes[0], x_BCHW)
    # fp64 so that equal values blend to themselves bit for bit; Apple's GPUs have fp32 only.
    dtype = torch.float32 if x_BCHW.device.type == "mps" else torch.float64
    total = torch.zeros(x_BCHW.shape, dtype=dtype, device=x_BCHW.device)
    weights = tile_weights(x_BCHW.shape[-2], x_BCHW.shape[-1], boxes)
    out_dtype = x_BCHW.dtype
    for i, (box, weight) in enumerate(zip(boxes, weights, strict=True)):
        part = call(i, box, box.of(x_BCHW))
        out_dtype = part.dtype
        box.of(total).add_(part.to(dtype) * weight.to(total))
    return total.to(out_dtype)


def with_tiles(denoise_of: Callable[[int, Box], Denoise], boxes: Sequence[Box]) -> Denoise:
    """denoise(x, sigma) whose velocity is blended from those of `boxes`.

    `denoise_of(number, box)` is asked once per box for what denoises a picture of its size. One box is that itself.
    """
    denoisers = [denoise_of(i, box) for i, box in enumerate(boxes)]
    if len(boxes) == 1:
        return denoisers[0]

    def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
        return in_tiles(lambda i, _box, part: denoisers[i](part, sigma), x_BCHW, boxes)

    return denoise
