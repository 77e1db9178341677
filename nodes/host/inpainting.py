"""Encoding pictures, and inner iterations around the steps of any sampler."""

from __future__ import annotations

import copy
import logging

from torch import Tensor

from ...ernie_core.errors import ErnieError
from ...ernie_core.sampling.langevin import InnerIterations, walk
from .models import check_model

logger = logging.getLogger(__name__)

INNER_KEY = "ernie_inner_iterations"


def encode(vae, image_BHWC: Tensor) -> dict[str, Tensor]:
    """LATENT of pictures in [0, 1]; sides that are no multiples of 16 are cropped around the middle."""
    if vae is None:
        raise ErnieError("the VAE is empty: connect Load VAE (ERNIE) or a VAELoader.")
    return {"samples": vae.encode(image_BHWC[..., :3])}


def set_inner_iterations(model, how: InnerIterations):
    """A clone of `model` that inpaints with these inner iterations, not earlier ones; `model` where they are none.

    They act where the latent has a noise mask, on every sampler that goes on from the state that it asked about.
    """
    check_model(model)
    if how.is_neutral:
        return model
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, INNER_KEY)

    def sample(executor, noise, latent_image, sampler, *args, **kwargs):
        return executor(noise, latent_image, _walking(sampler, how), *args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, INNER_KEY, sample)
    return patched


def _walking(sampler, how: InnerIterations):
    """The host's sampler with a model that walks before it answers."""
    run = getattr(sampler, "sampler_function", None)
    if run is None:
        logger.warning(
            "Hard Inpaint (ERNIE) does not act: the sampler %s keeps its steps to itself. Use Sampler (ERNIE) "
            "or KSampler.",
            type(sampler).__name__,
        )
        return sampler
    ours = copy.copy(sampler)
    ours.sampler_function = lambda model, *args, **kwargs: run(_WalkingModel(model, how), *args, **kwargs)
    return ours


class _WalkingModel:
    """The host's masked model of one run, with a walk in front of each answer; everything else is the host's."""

    def __init__(self, model, how: InnerIterations):
        self._model, self._how, self._generator = model, how, how.make_generator()

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None = None, **options):
        model, level = self._model, float(sigma.max())
        mask, change = denoise_mask, options.get("model_options", {}).get("denoise_mask_function")
        if mask is not None and change is not None:  # Differential Diffusion
            mask = change(sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})
        if mask is not None and self._how.acts_at(level, mask):

            def denoise(x_BCHW: Tensor, _level: float) -> Tensor:
                return (x_BCHW - model.inner_model(x_BCHW, sigma, **options)) / level

            walked = walk(
                denoise,
                x,
                level,
                mask_B1HW=mask,
                start_BCHW=model.latent_image,
                how=self._how,
                generator=self._generator,
            )
            x.copy_(walked)  # the sampler goes on from here
        return model(x, sigma, denoise_mask, **options)
