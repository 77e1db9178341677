"""Regional prompts as CONDITIONING that any sampler of the host takes."""

from __future__ import annotations

from torch import Tensor

from ...ernie_core.errors import ErnieError
from ...ernie_core.sampling import regions as engine

REGIONS_KEY = engine.REGIONS_KEY


def add_region(conditioning: list, region: list, mask: Tensor, strength: float) -> list:
    """CONDITIONING with one region more; see the engine's `add_region`.

    The host hands `model_conds` of an entry on to the network. Ours replaces the `OurModelOnly` in it by the regions;
    with any other model it stays there and says so at the first step, instead of a picture of all texts at once.
    """
    out = engine.add_region(conditioning, region, mask, strength)
    if out is conditioning:
        return out
    return [
        [text, {**extras, "model_conds": {**extras.get("model_conds", {}), REGIONS_KEY: OurModelOnly()}}]
        for text, extras in out
    ]


class OurModelOnly:
    """A condition that no network can take."""

    def process_cond(self, *_args, **_more):
        raise ErnieError(
            "regional prompts need this pack's network, the MODEL here is core's or another pack's: load it with Load "
            "Diffusion Model (ERNIE)."
        )
