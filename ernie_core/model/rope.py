"""Three-axis rotary positions of ERNIE-Image.

Source: ErnieImageTransformer2DModel (diffusers 0.42, transformer_ernie_image.py). A trap for every fused kernel: the 64
angles are repeat-interleaved to the 128 channels, but the rotation pairs channel i with channel i + 64, so the two
partners turn by *different* angles and the result is not an orthogonal rotation.

Shape letters: B batch (1 when every sample has the same text length) · S joint tokens, image first · K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RopeTable = tuple[Tensor, Tensor]


def positions(
    height: int, width: int, text_length: int, padded_length: int, *, options: Mapping[str, float] | None = None
) -> Tensor:
    """Positions [S, 3] (float64, CPU) of an image grid followed by `padded_length` text tokens.

    An image token in row y, column x stands at (text_length, y, x); text token j at (j, 0, 0). `options` are the host's
    rope_options: scale_y, scale_x (grid stretch, 1 = none) and shift_t, shift_y, shift_x (offsets, 0 = none).
    """
    options = options or {}
    y = torch.arange(height, dtype=torch.float64) * options.get("scale_y", 1.0) + options.get("shift_y", 0.0)
    x = torch.arange(width, dtype=torch.float64) * options.get("scale_x", 1.0) + options.get("shift_x", 0.0)
    frame = torch.tensor(text_length + options.get("shift_t", 0.0), dtype=torch.float64)
    image = torch.stack(torch.broadcast_tensors(frame, y[:, None], x[None, :]), dim=-1).reshape(-1, 3)
    text = torch.zeros(padded_length, 3, dtype=torch.float64)
    text[:, 0] = torch.arange(padded_length)
    return torch.cat([image, text])


def angles(position_S3: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Angles [S, K/2]: pos * theta^(-2k/d) for each axis of width d, axes concatenated, float64.

    In bf16 positions above 256 would collapse onto each other; in float64 nothing is lost, and it runs once a picture.
    """
    return torch.cat(
        [
            position_S3[:, axis, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for axis, dim in enumerate(axes_dim)
        ],
        dim=-1,
    )


def rope_table(
    height: int,
    width: int,
    text_lengths: Sequence[int],
    *,
    axes_dim: Sequence[int],
    theta: float,
    device: torch.device | str,
    dtype: torch.dtype,
    options: Mapping[str, float] | None = None,
) -> RopeTable:
    """(cos, sin), each [B, S, 1, K], for an image grid of `height` x `width` cells followed by text.

    `text_lengths` are the true lengths; the table is padded to the longest. B is 1 when all are equal. Computed once
    per sampling run and handed to every `DiT.forward`. `options`: see `positions`.
    """
    padded = max(text_lengths)
    distinct = sorted(set(text_lengths))
    tables = {
        n: angles(positions(height, width, n, padded, options=options), axes_dim, theta).repeat_interleave(2, dim=-1)
        for n in distinct
    }
    rows = [distinct[0]] if len(distinct) == 1 else list(text_lengths)
    full_BS1K = torch.stack([tables[n] for n in rows])[:, :, None, :]
    return full_BS1K.cos().to(device, dtype), full_BS1K.sin().to(device, dtype)


def apply_rope(x_BSNK: Tensor, rope: RopeTable) -> Tensor:
    """Rotate q or k: out = x * cos + rotate_half(x) * sin, rotate_half([a, b]) = [-b, a].

    Written as one product and two in-place halves: 5 reads and writes of the tensor instead of 12, no copy of
    rotate_half.
    """
    cos, sin = rope
    half = x_BSNK.shape[-1] // 2
    out = x_BSNK * cos
    out[..., :half].addcmul_(x_BSNK[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x_BSNK[..., :half], sin[..., half:])
    return out
