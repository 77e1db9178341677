"""Masks: where a picture is painted anew (1) and where it stays (0), in pixels and in latent cells.

Legend: B pictures, C channels, H, W picture or latent rows and columns. Masks hold 0..1, floats. One latent cell is
16 x 16 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

from ..config import SIZE_MULTIPLE
from .guidance import Denoise


def grow(mask_BHW: Tensor, px: int) -> Tensor:
    """The mask reaching `px` pixels further in every direction (a square neighbourhood); 0 changes nothing."""
    if px <= 0:
        return mask_BHW
    grown = max_pool2d(mask_BHW[:, None], (2 * px + 1, 1), stride=1, padding=(px, 0))
    return max_pool2d(grown, (1, 2 * px + 1), stride=1, padding=(0, px))[:, 0]


def soften(mask_BHW: Tensor, px: int) -> Tensor:
    """The mask with a straight slope of about `px` pixels outside its edge; what is 1 stays 1, 0 px changes nothing.

    A box blur of the mask grown by the blur's own radius: beyond `px` pixels it is exactly 0, inside exactly 1.
    """
    radius = px // 2
    if radius <= 0:
        return mask_BHW
    size = 2 * radius + 1
    grown = pad(grow(mask_BHW, radius)[:, None], (radius,) * 4, mode="replicate")
    blurred = avg_pool2d(avg_pool2d(grown, (size, 1), stride=1), (1, size), stride=1)[:, 0]
    return torch.maximum(mask_BHW, blurred.clamp(0, 1))


def to_latent_mask(hard_BHW: Tensor, soft_BHW: Tensor) -> Tensor:
    """The mask [B, 1, H/16, W/16] in latent cells: every cell that `hard_BHW` touches, others by their share of `soft`.

    Both sides must be multiples of 16.
    """
    touched = max_pool2d(hard_BHW[:, None], SIZE_MULTIPLE)
    return torch.maximum(touched, avg_pool2d(soft_BHW[:, None], SIZE_MULTIPLE))


def to_pixels(latent_mask_B1HW: Tensor) -> Tensor:
    """A mask in latent cells as one in pixels [B, 16 H, 16 W]; cells keep hard edges."""
    return interpolate(latent_mask_B1HW, scale_factor=SIZE_MULTIPLE, mode="nearest")[:, 0]


def fit_mask(mask: Tensor, samples_BCHW: Tensor) -> Tensor:
    """A noise mask of any size as [B, 1, H, W] for these samples: the host's rule.

       That is bilinear, and masks repeat over the batch.
    A mask that has the samples' size already comes out as it is, bit for bit.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(samples_BCHW)
    mask = interpolate(mask, size=samples_BCHW.shape[-2:], mode="bilinear")
    batch = samples_BCHW.shape[0]
    return mask.repeat(-(-batch // mask.shape[0]), 1, 1, 1)[:batch]


def hold_outside(denoise: Denoise, mask_B1HW: Tensor, start_BCHW: Tensor, noise_BCHW: Tensor) -> Denoise:
    """A denoiser that keeps everything outside the mask on the straight path from the noise to the start picture.

    The host's rule for a noise mask, step for step: the state is put on the path, the clean estimate on the start
    picture, each by its share. A mask of ones is `denoise` itself, one of zeros gives the start picture.
    """
    if bool((mask_B1HW == 1).all()):
        return denoise

    def masked(x: Tensor, sigma: float) -> Tensor:
        path = sigma * noise_BCHW + (1 - sigma) * start_BCHW
        inside = x * mask_B1HW + path * (1 - mask_B1HW)
        x0 = (inside - sigma * denoise(inside, sigma)) * mask_B1HW + start_BCHW * (1 - mask_B1HW)
        return (x - x0) / sigma

    return masked


def spread(values_BCHW: Tensor, known_B1HW: Tensor) -> Tensor:
    """`values` where `known` is 1, and a smooth continuation of them elsewhere; zeros where nothing is known at all.

    Push and pull over a pyramid of halves: each level holds means of what is known below it, and what is unknown takes
    the level above. Far holes get broad means, near ones what lies beside them (Gortler et al., The Lumigraph, 1996).
    """
    rows, columns = values_BCHW.shape[-2:]
    if rows == 1 and columns == 1:
        return values_BCHW * (known_B1HW > 0)
    even = (0, columns % 2, 0, rows % 2)
    weight = avg_pool2d(pad(known_B1HW, even), 2)
    mean = avg_pool2d(pad(values_BCHW * known_B1HW, even), 2) / weight.clamp_min(1e-12)
    above = spread(mean, (4 * weight).clamp_max(1))
    above = interpolate(above, scale_factor=2, mode="bilinear")[..., :rows, :columns]
    return values_BCHW * known_B1HW + above * (1 - known_B1HW)
