"""What a sampler may be given; asked before any long work."""

from __future__ import annotations

from torch import Tensor

from ..errors import ErnieError

LATENT_CHANNELS = 128


def check_latent(samples: Tensor) -> None:
    """Raise ErnieError unless `samples` is a finite latent [B, 128, H/16, W/16]."""
    if samples.ndim != 4 or samples.shape[1] != LATENT_CHANNELS:
        raise ErnieError(
            f"a latent [batch, {LATENT_CHANNELS}, height / 16, width / 16] expected, got {list(samples.shape)}: "
            "it is another model's; make it with Empty Latent (ERNIE), EmptyFlux2LatentImage, or VAEEncode."
        )
    if not bool(samples.isfinite().all()):
        raise ErnieError(
            "a latent of finite numbers expected, this one holds NaN or infinite values; look at the node that made it."
        )


def check_text(name: str, text: Tensor, width: int) -> None:
    """Raise ErnieError unless `text`, called `name` in the message, is [B, T, width] and finite."""
    if text.ndim != 3 or text.shape[2] != width:
        raise ErnieError(
            f"{name} [batch, tokens, {width}] expected, got {list(text.shape)}: another model's text encoder made "
            "it; encode the prompt with Load Text Encoder (ERNIE)."
        )
    if not bool(text.isfinite().all()):
        raise ErnieError(
            f"{name} of finite numbers expected, it holds NaN or infinite values; look at the node that made it."
        )
