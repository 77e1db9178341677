"""Inpainting and outpainting: from a picture with a mask to what is sampled, and back into the picture.

The part of the picture around the mask is cut out with some context, scaled to a size the model paints well, sampled,
scaled back, its colours matched to what surrounds it, and laid over the picture under a soft mask. What the soft mask
leaves out is the picture's own, bit for bit.

Pictures are [B, H, W, 3] in 0..1, masks [B, H, W] in 0..1 (1 = painted anew), lengths in pixels of the picture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..config import MAX_SIZE, SIZE_MULTIPLE
from ..errors import ErnieError
from .masks import grow, soften, spread, to_latent_mask, to_pixels

logger = logging.getLogger(__name__)

FILLS = ("original", "surroundings", "grey", "noise")
COLOUR_MATCHES = ("smooth", "mean and spread", "off")
RING_PX = 32
"""How far from the painted part colours are compared."""
EVEN_VARIANCE = (4 / 255) ** 2
"""Added to both variances of a ring, so that flat surroundings do not scale the painted part by their noise."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of the canvas; it may reach beyond the lower and right edge."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Stitch:
    """What is needed to lay the painted part into the picture."""

    canvas: Tensor
    """[B, H, W, 3]: the picture, with the new margins of an outpainting."""
    alpha: Tensor
    """[B or 1, H, W]: how much of the painted part is laid over the canvas."""
    known: Tensor
    """[B or 1, height, width] of the box: 1 where the painted part should show what the canvas shows."""
    box: Box
    size: tuple[int, int]
    """(height, width) in which the part is painted: multiples of 16."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is sampled."""

    image: Tensor
    """[B, h, w, 3]: the part that is painted, at the size in which it is painted, with the fill in place."""
    latent_mask: Tensor
    """[B or 1, 1, h/16, w/16]: noise mask of its latent."""
    stitch: Stitch


def prepare(
    image: Tensor,
    mask: Tensor | None,
    *,
    padding: Sequence[int] = (0, 0, 0, 0),
    grow_px: int = 0,
    feather_px: int = 0,
    fill: str = FILLS[0],
    context_px: int | None = None,
    size_px: int = 0,
) -> Prepared:
    """Cut out, mask and fill what is to be painted.

    Args:
        image: the picture; channels beyond three are dropped.
        mask: one for all pictures or one each, of their size. None: all of it, or only the margins of `padding`.
        padding: (left, top, right, bottom): margins to be painted around the picture, in pixels.
        grow_px: how far the mask reaches beyond what was given; it then also covers the inner edge of a margin.
        feather_px: width of the slope outside the mask over which new and old are mixed.
        fill: what the model starts from under the mask, for a denoise below 1: the picture itself (margins: its edge,
            stretched), a smooth continuation of the surroundings, grey, or noise.
        context_px: how much of the surroundings is cut out with the mask; None = the whole picture.
        size_px: the part is scaled to about size_px x size_px pixels of its own shape; 0 = its own size.

    Raises:
        ErnieError: sizes that do not fit, NaN, an unknown fill, a part too large or too small to be painted.
    """
    picture, painted = _check(image, mask)
    left, top, right, bottom = padding
    if min(padding) < 0 or min(grow_px, feather_px, context_px or 0, size_px) < 0:
        raise ErnieError("margins, grow, feather, context and size of 0 or more pixels expected, one is negative.")
    if fill not in FILLS:
        raise ErnieError(f"fill {' or '.join(FILLS)} expected, got {fill!r}.")
    edges = (left, right, top, bottom)
    canvas = pad(picture.movedim(-1, 1), edges, mode="replicate").movedim(1, -1)
    if painted is None:
        painted = torch.full_like(picture[:1, ..., 0], 0.0 if any(padding) else 1.0)
    hard = grow(pad(painted, edges, value=1.0), grow_px)
    alpha = soften(hard, feather_px)
    if not bool(hard.any()):
        logger.warning("The mask is empty: nothing will be painted, the picture comes back as it is.")

    box = _find_box(alpha, context_px)
    size = _size_of(box, size_px)
    part = _resize(_cut(canvas, box).movedim(-1, 1), size).clamp(0, 1)
    hard_part = _resize(_cut(hard[..., None], box).movedim(-1, 1), size, "bilinear")[:, 0].clamp(0, 1)
    alpha_part = _resize(_cut(alpha[..., None], box).movedim(-1, 1), size, "bilinear")[:, 0].clamp(0, 1)
    latent_mask = to_latent_mask(hard_part, alpha_part)
    untouched = _resize(to_pixels((latent_mask == 0).float())[:, None], (box.height, box.width), "nearest")[:, 0]
    known = untouched * (_cut(alpha[..., None], box)[..., 0] == 0)
    stitch = Stitch(canvas=canvas, alpha=alpha, known=known, box=box, size=size)
    return Prepared(
        image=_fill(part, hard_part[:, None], fill).movedim(1, -1).contiguous(), latent_mask=latent_mask, stitch=stitch
    )


def lay_back(painted: Tensor, stitch: Stitch, *, colour_match: str = COLOUR_MATCHES[0]) -> Tensor:
    """The pictures with `painted` [N, h, w, 3] laid into them; painted part i goes into picture i modulo their number.

    Raises:
        ErnieError: `painted` has another size than what was prepared, or is not finite; an unknown colour match.
    """
    if colour_match not in COLOUR_MATCHES:
        raise ErnieError(f"colour_match {' or '.join(COLOUR_MATCHES)} expected, got {colour_match!r}.")
    if tuple(painted.shape[1:3]) != stitch.size:
        height, width = stitch.size
        raise ErnieError(
            f"a picture of {width} x {height}, as Inpaint Prepare made it, expected, got "
            f"{painted.shape[2]} x {painted.shape[1]}; resize it back, or connect the stitch that belongs to it."
        )
    if not bool(painted.isfinite().all()):
        raise ErnieError("a picture of finite numbers expected, it holds NaN or infinite values; look at the VAE.")
    box, pictures = stitch.box, []
    rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    for i, one in enumerate(painted):
        canvas = stitch.canvas[i % len(stitch.canvas)].clone()
        inside = canvas[rows, columns]
        height, width = inside.shape[:2]
        part = _resize(one[None, ..., :3].movedim(-1, 1).to(canvas), (box.height, box.width))[..., :height, :width]
        alpha, known = (
            m[i % len(m)].to(canvas) for m in (stitch.alpha[:, rows, columns], stitch.known[:, :height, :width])
        )
        part = match_colour(part, inside.movedim(-1, 0)[None], known[None, None], colour_match)
        part = part[0].movedim(0, -1).clamp(0, 1)
        mixed = inside * (1 - alpha[..., None]) + part * alpha[..., None]
        canvas[rows, columns] = torch.where(alpha[..., None] > 0, mixed, inside)
        pictures.append(canvas)
    return torch.stack(pictures)


def match_colour(painted_BCHW: Tensor, picture_BCHW: Tensor, known_B1HW: Tensor, how: str) -> Tensor:
    """`painted` with the colours it should have, judged where both show the same (`known` 1).

    "smooth" adds the difference of the two, continued smoothly into the painted part, so a tint and a slow gradient of
    it go and no seam is left; "mean and spread" gives each channel the mean and the standard deviation that the picture
    has within 32 pixels of the painted part; "off" changes nothing. Without anything known nothing is changed.
    """
    if how == "off" or not bool(known_B1HW.any()):
        return painted_BCHW
    if how == "smooth":
        return painted_BCHW + spread((picture_BCHW - painted_BCHW), known_B1HW)
    near = known_B1HW * grow(1 - known_B1HW[:, 0], RING_PX)[:, None]
    near = near if bool(near.any()) else known_B1HW
    (mean, variance), (wanted_mean, wanted_variance) = (_moments(p, near) for p in (painted_BCHW, picture_BCHW))
    gain = ((wanted_variance + EVEN_VARIANCE) / (variance + EVEN_VARIANCE)).sqrt()
    return (painted_BCHW - mean) * gain + wanted_mean


def _moments(picture_BCHW: Tensor, weight_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance), each [B, C, 1, 1], of the pixels of weight 1."""
    count = weight_B1HW.sum((2, 3), keepdim=True)
    mean = (picture_BCHW * weight_B1HW).sum((2, 3), keepdim=True) / count
    return mean, ((picture_BCHW - mean).square() * weight_B1HW).sum((2, 3), keepdim=True) / count


def _check(image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The picture with three channels and the mask with its size."""
    if image.ndim != 4 or image.shape[-1] < 3:
        raise ErnieError(f"pictures [batch, height, width, 3] expected, got {list(image.shape)}; connect an IMAGE.")
    batch, height, width = image.shape[:3]
    if not bool(image.isfinite().all()):
        raise ErnieError("a picture of finite numbers expected, this one holds NaN or infinite values.")
    if mask is None:
        return image[..., :3].float(), None
    mask_BHW = mask.reshape(-1, *mask.shape[-2:]).to(image.device, torch.float32)
    if not bool(mask_BHW.isfinite().all()):
        raise ErnieError("a mask of finite numbers expected, this one holds NaN or infinite values.")
    if mask_BHW.shape[1:] != (height, width):
        if not bool(mask_BHW.any()):  # what LoadImage gives for a picture without an alpha channel: 64 x 64 zeros
            mask_BHW = mask_BHW.new_zeros(1, height, width)
        else:
            _, rows, columns = mask_BHW.shape
            raise ErnieError(
                f"a mask of the picture's size, {width} x {height}, expected, got {columns} x {rows}; "
                "draw it on this picture (MaskEditor), or resize it."
            )
    if len(mask_BHW) not in (1, batch):
        raise ErnieError(f"one mask, or one for each of {batch} pictures, expected, got {len(mask_BHW)}.")
    return image[..., :3].float(), mask_BHW.clamp(0, 1)


def _find_box(alpha: Tensor, context_px: int | None) -> Box:
    """The part of the canvas that holds what is painted in any picture, and its context; sides are multiples of 16."""
    height, width = alpha.shape[1:]
    rows, columns = (alpha.amax(dim).amax(0).nonzero()[:, 0].tolist() for dim in (2, 1))
    if context_px is None or not rows:
        return Box(top=0, left=0, height=_round_up(height), width=_round_up(width))

    def extent(low: int, high: int, whole: int) -> tuple[int, int]:
        low, high = max(0, low - context_px), min(whole, high + context_px)
        length = _round_up(high - low)
        # Where there is room what rounding adds lies on both sides; it leaves the canvas only if that is too small.
        return max(0, min(low - (length - (high - low)) // 2, whole - length)), length

    (top, box_height), (left, box_width) = (
        extent(rows[0], rows[-1] + 1, height),
        extent(columns[0], columns[-1] + 1, width),
    )
    return Box(top=top, left=left, height=box_height, width=box_width)


def _round_up(px: int) -> int:
    return -(-px // SIZE_MULTIPLE) * SIZE_MULTIPLE


def _size_of(box: Box, size_px: int) -> tuple[int, int]:
    """(height, width) in which the box is painted."""
    scale = size_px / math.sqrt(box.height * box.width) if size_px else 1.0
    height, width = (
        max(SIZE_MULTIPLE, round(side * scale / SIZE_MULTIPLE) * SIZE_MULTIPLE) for side in (box.height, box.width)
    )
    if max(height, width) > MAX_SIZE:
        raise ErnieError(
            f"a part of at most {MAX_SIZE} pixels a side expected, it is {width} x {height}; crop, or set a size."
        )
    return height, width


def _cut(canvas_BHWC: Tensor, box: Box) -> Tensor:
    """The box out of the canvas, whose edge is repeated where the box reaches beyond."""
    part = canvas_BHWC[:, box.top : box.top + box.height, box.left : box.left + box.width]
    beyond = (0, box.width - part.shape[2], 0, box.height - part.shape[1])
    if not any(beyond):
        return part
    return pad(part.movedim(-1, 1), beyond, mode="replicate").movedim(1, -1)


def _resize(picture_BCHW: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """The picture at (height, width); itself where it has that size."""
    if tuple(picture_BCHW.shape[-2:]) == tuple(size):
        return picture_BCHW
    if mode == "nearest":
        return interpolate(picture_BCHW, size=size, mode=mode)
    return interpolate(picture_BCHW, size=size, mode=mode, antialias=True)


def _fill(part_BCHW: Tensor, mask_B1HW: Tensor, fill: str) -> Tensor:
    """The part with something else under the mask."""
    if fill == "original":
        return part_BCHW
    if fill == "surroundings":
        # All that is masked at all is unknown: a soft edge would let what is to go shine through.
        new = spread(part_BCHW, (mask_B1HW == 0).to(part_BCHW).expand(len(part_BCHW), -1, -1, -1))
    elif fill == "grey":
        new = torch.full_like(part_BCHW, 0.5)
    else:
        new = torch.rand(part_BCHW.shape, generator=torch.Generator("cpu").manual_seed(0)).to(part_BCHW)
    return part_BCHW * (1 - mask_B1HW) + new * mask_B1HW
