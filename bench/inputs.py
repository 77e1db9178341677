"""Random inputs of one forward, in our arguments and in diffusers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ernie_core.config import DiTConfig


@dataclass(frozen=True, kw_only=True)
class ForwardInputs:
    """`ours`: latent, timesteps, text; `peer`: the same and the text lengths as diffusers takes them."""

    ours: tuple[Tensor, Tensor, Tensor]
    text_lengths: tuple[int, ...]

    @property
    def peer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.ours, torch.tensor(self.text_lengths, device=self.ours[0].device)


def forward_inputs(
    config: DiTConfig,
    *,
    side: int,
    text_lengths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ForwardInputs:
    """Inputs for a square latent of `side` cells; the text is zero-padded to its longest, as diffusers pads it."""
    generator = torch.Generator(device).manual_seed(0)
    batch = len(text_lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    # One start, for all samples: under guidance both halves of the batch see the same latent.
    x = draw(1, config.in_channels, side, side).expand(batch, -1, -1, -1).contiguous()
    text = draw(batch, max(text_lengths), config.text_in_dim)
    for row, n in zip(text, text_lengths, strict=True):
        row[n:] = 0
    timesteps = torch.full((batch,), 800.0, device=device)
    return ForwardInputs(ours=(x, timesteps, text), text_lengths=tuple(text_lengths))
