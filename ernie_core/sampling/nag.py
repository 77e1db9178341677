"""Normalized attention guidance: a negative prompt without a second model call, also at cfg 1.

In every block the image looks twice: at the prompt and at the negative prompt. What it would see of the second is
pushed away inside the attention's output, held to a length near the first's, and mixed in. Source: NAG
(arXiv 2505.21179), equations 7 to 10 and its FLUX code, whose `nag_scale` is `scale` here.

The paper's code runs every token of a doubled batch. Here the negative prompt's tokens ride behind the prompt's, and
image tokens run once: what is added per block is one attention and those few tokens. The result is the same, because
the image tokens of both halves are equal after every attention anyway. Positions need care: the model puts the image
at position T of a text of T tokens, and with its pairing of angles a rotation does not depend on distances alone. So
queries and keys are turned inside the attention, the image's once for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ErnieError
from ..model.attention import AttentionFunction
from ..model.rope import RopeTable, apply_rope
from .guidance import check_range, in_range
from .inputs import check_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Nag:
    """A negative prompt for the attention, from noise level `start` down to `end`.

    text_BTD: its features [1 or B, T, D]; a batch of pictures repeats it.
    scale: 1 = off; above, how far the attention's output is pushed away.
    tau: the longest that the pushed output may be, in lengths of the plain one (sums of absolute values per token).
    alpha: share of the pushed output in the result, 0 to 1; 0 = off.

    What is pushed in the end is alpha * (scale - 1). The paper takes 5, 2.5 and 0.25 for FLUX; here that takes objects
    apart on the tiny model, so the defaults are weaker (bench/GUIDANCE.md).
    """

    text_BTD: Tensor
    scale: float = 3.0
    tau: float = 2.5
    alpha: float = 0.1
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high, advice in (
            ("scale", 0, 100, "1 = off"),
            ("tau", 1, 100, "the paper's is 2.5"),
            ("alpha", 0, 1, "0 = off"),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ErnieError(f"{name} must lie between {low} and {high} ({advice}), got {value:g}.")
        check_range(self.start, self.end)

    @property
    def is_neutral(self) -> bool:
        return self.scale == 1 or self.alpha == 0 or self.start == self.end

    @property
    def is_whole(self) -> bool:
        """Whether it acts at every noise level."""
        return self.start >= 1 and self.end <= 0

    def acts_at(self, sigma: float) -> bool:
        return in_range(sigma, self.start, self.end)

    def text_for(self, like_BTD: Tensor) -> Tensor:
        """The negative's features [B, T', D], one per picture, on the device and in the type of `like_BTD`."""
        text = self.text_BTD.to(like_BTD)
        return text[[i % len(text) for i in range(len(like_BTD))]]


def nag_from(conditioning: list, width: int, **settings: float) -> Nag:
    """A `Nag` of a host's conditioning, [[text_BTD, {...}]].

    Raises:
        ErnieError: not one prompt, or not `width` wide, or settings out of range.
    """
    if len(conditioning) != 1:
        raise ErnieError(f"one prompt expected as negative, {len(conditioning)} came; encode one without combining.")
    text_BTD = conditioning[0][0]
    check_text("negative", text_BTD, width)
    return Nag(text_BTD=text_BTD, **settings)


def push_away(z_pos: Tensor, z_neg: Tensor, nag: Nag) -> Tensor:
    """Attention output [B, L, D] under the prompt, pushed away from that under the negative prompt."""
    pushed = nag.scale * z_pos - (nag.scale - 1) * z_neg
    plain, length = (z.float().abs().sum(-1, keepdim=True).clamp_min(1e-6) for z in (z_pos, pushed))
    pushed = pushed * (nag.tau * plain / length).clamp_max(1.0).to(pushed.dtype)
    return nag.alpha * pushed + (1 - nag.alpha) * z_pos


def nag_attention(
    nag: Nag, image_tokens: int, rope_pos: RopeTable, rope_neg: RopeTable, attend: AttentionFunction
) -> AttentionFunction:
    """`attend` for unturned queries and keys of [image, prompt, negative prompt]; nothing may be padded."""
    main = rope_pos[0].shape[1]

    def call(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, lengths: Sequence[int] | None) -> Tensor:
        assert lengths is None, "prompts of different lengths cannot share a negative prompt in one batch"

        def beside_image(x_BSNK: Tensor) -> Tensor:
            return torch.cat([x_BSNK[:, :image_tokens], x_BSNK[:, main:]], dim=1)

        q, k = (apply_rope(x[:, :main], rope_pos) for x in (q_BSNK, k_BSNK))
        pos = attend(q, k, v_BSNK[:, :main], None)
        q, k = (apply_rope(beside_image(x), rope_neg) for x in (q_BSNK, k_BSNK))
        neg = attend(q, k, beside_image(v_BSNK), None)
        image = push_away(pos[:, :image_tokens].flatten(2), neg[:, :image_tokens].flatten(2), nag)
        image = image.unflatten(-1, q_BSNK.shape[2:])
        return torch.cat([image, pos[:, image_tokens:], neg[:, image_tokens:]], dim=1)

    return call


def nag_inputs(
    nag: Nag, text_BTD: Tensor, image_tokens: int, rope_for: Callable[[int], RopeTable], attend: AttentionFunction
) -> dict[str, Any]:
    """The inputs of `DiT.forward` that differ under NAG (text_BTD, attend, rope), for texts of one length.

    `rope_for(tokens)`: the model's table for the image and a text of so many tokens. `rope` turns nothing, as the
    attention does it. All of it is constant over a sampling run.
    """
    negative = nag.text_for(text_BTD)
    rope_pos, rope_neg = rope_for(text_BTD.shape[1]), rope_for(negative.shape[1])
    one = torch.ones_like(rope_pos[0][:1, :1])
    return {
        "text_BTD": torch.cat([text_BTD, negative], dim=1),
        "attend": nag_attention(nag, image_tokens, rope_pos, rope_neg, attend),
        "rope": (one, torch.zeros_like(one)),
    }
