"""Tiled sampling on a MODEL, ours or core's, for every sampler that samples through the host."""

from __future__ import annotations

import logging
import uuid
from weakref import WeakKeyDictionary

from torch import Tensor

from ...ernie_core.errors import ErnieError
from ...ernie_core.sampling.regions import REGIONS_KEY, Regions
from ...ernie_core.sampling.tiles import Tiles, in_tiles
from .models import check_model
from .runtime import throw_if_interrupted

logger = logging.getLogger(__name__)

TILES_KEY = "ernie_tiles"


def set_tiles(model, tiles: Tiles):
    """A clone of `model` that denoises pictures larger than a tile in tiles, in place of earlier ones.

    It wraps the call of the network, inside the host's areas, masks, batching and guidance: every one of them acts on
    the whole picture. A latent that fits one tile goes through untouched. The host plans memory for one tile.

    Raises:
        ErnieError: not an ERNIE-Image model, ours or core's; at the first step: a ControlNet or a latent of video.
    """
    from comfy.patcher_extension import WrappersMP

    check_model(model)
    patched = model.clone()
    if patched.get_attachment(TILES_KEY) is not None:
        logger.warning("This model had Tiled Sampling (ERNIE) already: only the last one acts.")
    patched.set_attachments(TILES_KEY, tiles)
    cut: WeakKeyDictionary[Regions, dict] = WeakKeyDictionary()  # the same objects at each step: plans are kept by them

    def regions_in(regions: Regions, box, size: tuple[int, int]) -> Regions:
        found = cut.setdefault(regions, {})
        if (box, size) not in found:
            found[box, size] = regions.within(box, *size)
        return found[box, size]

    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        boxes = tiles.boxes(*x.shape[-2:])
        if len(boxes) == 1:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        if control is not None:
            raise ErnieError("ERNIE-Image has no ControlNet: remove the ControlNet node from the conditioning.")
        regions = kwargs.get(REGIONS_KEY)
        size = (x.shape[-2], x.shape[-1])

        def denoise(number: int, box, part: Tensor) -> Tensor:
            throw_if_interrupted()
            own = dict(kwargs)
            if regions is not None:
                own[REGIONS_KEY] = regions_in(regions, box, size)
            concat = None if c_concat is None else box.of(c_concat)
            options = _of_tile(transformer_options, number)
            return executor(part.contiguous(), t, concat, c_crossattn, control, options, **own)

        return in_tiles(denoise, x, boxes)

    def prepare(executor, model, noise_shape, *args, **more):
        box = tiles.boxes(*noise_shape[-2:])[0]
        return executor(model, [*noise_shape[:-2], box.height, box.width], *args, **more)

    for kind, wrapper in ((WrappersMP.APPLY_MODEL, apply), (WrappersMP.PREPARE_SAMPLING, prepare)):
        patched.remove_wrappers_with_key(kind, TILES_KEY)
        patched.add_wrapper_with_key(kind, TILES_KEY, wrapper)
    return patched


def _of_tile(options: dict, number: int) -> dict:
    """The options for one tile: to caches that know a call by its prompt's number, each tile is another prompt."""
    own = dict(options)
    if "uuids" in own:
        own["uuids"] = [uuid.uuid5(u, f"tile {number}") for u in own["uuids"]]
    return own
