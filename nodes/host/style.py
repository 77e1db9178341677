"""A reference's statistics on a MODEL, for every sampler and guider that samples through the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ernie_core.sampling.style import StyleStatistics, restyle
from .models import check_model

STYLE_KEY = "ernie_style"


def set_style(model, style: StyleStatistics):
    """A clone of `model` whose clean estimate is moved by `style` too, or `model` itself where it never acts.

    It acts after guidance; several, and other packs' functions there, act in the order in which they were added.

    Raises:
        ErnieError: not an ERNIE-Image model, ours or core's.
    """
    check_model(model)
    if style.is_neutral:
        return model
    patched = model.clone()
    patched.set_attachments(STYLE_KEY, (*(patched.get_attachment(STYLE_KEY) or ()), style))

    def move(args: dict[str, Any]) -> Tensor:
        return restyle(args["denoised"], style, float(args["sigma"].max()))

    patched.set_model_sampler_post_cfg_function(move)
    return patched
