"""Several prompts in one picture: each reaches its own region, in one pass of the network.

The texts stand one behind the other after the image tokens. Image tokens attend to all image tokens and to the texts of
their region; a text attends to itself and to the image tokens of its region. So the picture stays one, and each prompt
stays where its mask is. This goes through the attention call site: queries with the same keys are one call, so there
is no mask of all tokens by all tokens, and where every weight is 0 or 1 there is no mask at all: every backend serves.

Weights between 0 and 1 multiply the attention that a text gets (their logarithm is added to the scores of its keys).
They are rounded to steps of 0.05, and image tokens of equal weights are one group.

Positions: a text stands as it would alone, from 0 on; an image token's frame (axis 0) is the length of the text that
weighs most on it, as for a picture of that text alone.

Shape letters: R texts (0 = base) - L image tokens - S all tokens, image first - B, N, K as in `model.dit`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ErnieError
from ..model.attention import AttentionFunction, attention
from ..model.rope import RopeTable, angles, positions
from .tiles import Box

logger = logging.getLogger(__name__)

LEVELS = 20
"""Weights are multiples of 1 / LEVELS."""

REGIONS_KEY = "ernie_regions"
"""Where a CONDITIONING's entry keeps its `Regions`."""
UNUSED_EXTRAS = ("pooled_output", "attention_mask")

Conditioning = list[Any]
BiasedAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""attend(q_BSNK, k_BSNK, v_BSNK, bias_S): attention whose scores get bias_S[key] added."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Regions:
    """What is drawn where: texts of these lengths, one behind the other, and the masks of all but the first."""

    lengths: tuple[int, ...]
    """Tokens of the base text and of each region's."""
    masks_HW: tuple[Tensor, ...]
    """One per region, 0 to 1, of any size: it is stretched over the picture. A strength is multiplied in."""

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.masks_HW) + 1

    def plus(self, length: int, mask_HW: Tensor) -> Regions:
        """These regions and one more, whose text of `length` tokens is put behind the others."""
        return Regions(lengths=(*self.lengths, length), masks_HW=(*self.masks_HW, mask_HW))

    def within(self, box: Box, rows: int, columns: int) -> Regions:
        """What of them lies in `box` of a latent of `rows` x `columns` cells."""
        masks = tuple(box.of(_over(mask, rows, columns)) for mask in self.masks_HW)
        return Regions(lengths=self.lengths, masks_HW=masks)


def add_region(conditioning: Conditioning, region: Conditioning, mask: Tensor, strength: float) -> Conditioning:
    """CONDITIONING whose entries carry one region more: the text put behind theirs, and `Regions` under REGIONS_KEY.

    strength 0 gives `conditioning` itself.

    Raises:
        ErnieError: strength outside [0, 1], not one plain prompt for the region, texts of two models, or a bad mask.
    """
    if not 0 <= strength <= 1:
        raise ErnieError(
            f"strength must lie between 0 (no region) and 1 (the region's prompt alone), got {strength:g}."
        )
    if len(region) != 1 or REGIONS_KEY in region[0][1]:
        raise ErnieError(
            f"one plain prompt expected as region, {len(region)} came or it has regions itself: connect Encode Prompt, "
            "and chain Regional Prompts through conditioning."
        )
    mask_HW = check_region_mask(mask) * strength
    text, extras = region[0]
    others = sorted(name for name, value in extras.items() if value is not None and name not in UNUSED_EXTRAS)
    if others:
        logger.warning("%s of the region's prompt are not used: set them on the other prompt.", ", ".join(others))
    if strength == 0:
        return conditioning
    out = []
    for base, base_extras in conditioning:
        if base.shape[2] != text.shape[2]:
            raise ErnieError(
                f"both prompts must come from one text encoder, got widths {base.shape[2]} and {text.shape[2]}."
            )
        before = base_extras.get(REGIONS_KEY) or Regions(lengths=(base.shape[1],), masks_HW=())
        joined = torch.cat([base, text.to(base).expand(len(base), -1, -1)], dim=1)
        out.append([joined, {**base_extras, REGIONS_KEY: before.plus(text.shape[1], mask_HW)}])
    return out


def check_alone(has_nag: bool) -> None:
    """Raise ErnieError where a negative prompt sits in the attention too: both decide who attends to whom."""
    if has_nag:
        raise ErnieError(
            "regional prompts and a negative prompt in the attention (NAG) cannot act together: take one of them off."
        )


def check_region_mask(mask: Tensor) -> Tensor:
    """The mask [H, W] of a MASK [1, H, W] or [H, W]; ErnieError unless it is one, finite and in 0 to 1."""
    shape = list(mask.shape)
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2 or 0 in mask.shape:
        raise ErnieError(f"one mask [1, height, width] expected, got {shape}: take one mask of a batch.")
    if not bool(mask.isfinite().all()):
        raise ErnieError("a mask of finite numbers expected, this one holds NaN or infinite values.")
    if float(mask.min()) < 0 or float(mask.max()) > 1:
        raise ErnieError(
            f"a mask between 0 and 1 expected, this one runs from {float(mask.min()):g} to {float(mask.max()):g}."
        )
    return mask.float().cpu()


def _over(mask_HW: Tensor, rows: int, columns: int) -> Tensor:
    """A mask stretched over a latent of this size."""
    return F.interpolate(mask_HW[None, None].float(), size=(rows, columns), mode="area")[0, 0]


def region_weights(regions: Regions, rows: int, columns: int) -> Tensor:
    """Weights [R, L] of each text on each image token, multiples of 1 / LEVELS; the base fills what regions leave."""
    maps = [_over(mask, rows, columns).flatten() for mask in regions.masks_HW]
    weights = (torch.stack(maps) * LEVELS).round() / LEVELS
    base = ((1 - weights).prod(dim=0) * LEVELS).round() / LEVELS
    return torch.cat([base[None], weights])


@dataclass(frozen=True, eq=False, kw_only=True)
class _Group:
    """Queries that see the same keys with the same weights."""

    queries: Tensor
    keys: Tensor
    bias_S: Tensor | None
    """One number per key; None: all 0."""

    def to(self, device: torch.device | str) -> _Group:
        bias = self.bias_S
        return _Group(
            queries=self.queries.to(device),
            keys=self.keys.to(device),
            bias_S=bias.to(device) if bias is not None and bool(bias.any()) else None,
        )


class RegionPlan:
    """Who attends to whom for a latent of `rows` x `columns` cells; made once per run.

    Texts that no image token sees are left out; `text_index` says which of the tokens of all texts stay.

    Raises:
        ErnieError: the texts are not `text_length` tokens long together.
    """

    def __init__(
        self,
        regions: Regions,
        rows: int,
        columns: int,
        *,
        text_length: int,
        device: torch.device | str = "cpu",
    ):
        if sum(regions.lengths) != text_length:
            raise ErnieError(
                f"the regional prompts are {sum(regions.lengths)} tokens long together, the conditioning has "
                f"{text_length}: a node behind Regional Prompt (ERNIE) changed the text. Put it in front of it."
            )
        weights_RL = region_weights(regions, rows, columns)
        kept = [r for r in range(len(regions.lengths)) if float(weights_RL[r].max()) > 0]
        if not kept:  # masks of nearly nothing whose weights were rounded away
            kept, weights_RL[0] = [0], 1.0
        starts = [sum(regions.lengths[:r]) for r in range(len(regions.lengths))]
        self.rows, self.columns = rows, columns
        self.lengths = [regions.lengths[r] for r in kept]
        self.text_index = torch.cat([torch.arange(starts[r], starts[r] + regions.lengths[r]) for r in kept]).to(device)
        self._weights_RL = weights_RL[kept]
        self._groups = [group.to(device) for group in self._make_groups()]

    @property
    def is_plain(self) -> bool:
        """Whether everything attends to everything: one prompt, or several that all weigh 1 everywhere."""
        return not self._groups

    def _make_groups(self) -> list[_Group]:
        weights_RL, image = self._weights_RL, self.rows * self.columns
        if bool((weights_RL == 1).all()):
            return []
        ends = torch.tensor([image, *self.lengths]).cumsum(0).tolist()
        texts = [torch.arange(a, b) for a, b in pairwise(ends)]
        groups = []
        rows, member = torch.unique(weights_RL.T, dim=0, return_inverse=True)
        for i, weights in enumerate(rows.tolist()):
            seen = [(text, w) for text, w in zip(texts, weights, strict=True) if w > 0]
            keys = torch.cat([torch.arange(image), *(text for text, _ in seen)])
            bias = torch.cat([torch.zeros(image), *(torch.full((len(text),), w).log() for text, w in seen)])
            groups.append(_Group(queries=torch.where(member == i)[0], keys=keys, bias_S=bias))
        for text, weights in zip(texts, weights_RL, strict=True):
            seen = torch.where(weights > 0)[0]
            bias = torch.cat([weights[seen].log(), torch.zeros(len(text))])
            groups.append(_Group(queries=text, keys=torch.cat([seen, text]), bias_S=bias))
        return groups

    def rope(
        self,
        *,
        axes_dim: Sequence[int],
        theta: float,
        device: torch.device | str,
        dtype: torch.dtype,
        options: Mapping[str, float] | None = None,
    ) -> RopeTable:
        """(cos, sin), each [1, S, 1, K]; see the positions above."""
        grid = positions(self.rows, self.columns, 0, 0, options=options)
        heaviest = self._weights_RL.argmax(dim=0)
        grid[:, 0] += torch.tensor(self.lengths, dtype=grid.dtype)[heaviest]
        texts = [positions(0, 0, n, n) for n in self.lengths]
        turns = angles(torch.cat([grid, *texts]), axes_dim, theta).repeat_interleave(2, dim=-1)[None, :, None, :]
        return turns.cos().to(device, dtype), turns.sin().to(device, dtype)

    def through(
        self, attend: AttentionFunction = attention, attend_biased: BiasedAttention | None = None
    ) -> AttentionFunction:
        """The attention function in which each token sees its own keys, done by these two."""
        biased = attend_biased or _sdpa_biased

        def attend_regions(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, lengths: Sequence[int] | None) -> Tensor:
            assert lengths is None, "the texts of all pictures of a batch have the same lengths"
            if self.is_plain:
                return attend(q_BSNK, k_BSNK, v_BSNK, None)
            out = torch.empty_like(q_BSNK)
            for group in self._groups:
                q, k, v = q_BSNK[:, group.queries], k_BSNK[:, group.keys], v_BSNK[:, group.keys]
                if group.bias_S is None:
                    out[:, group.queries] = attend(q, k, v, None)
                else:
                    out[:, group.queries] = biased(q, k, v, group.bias_S.to(q.dtype))
            return out

        return attend_regions


def _sdpa_biased(q: Tensor, k: Tensor, v: Tensor, bias_S: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_S[None, None, None]).transpose(1, 2)
