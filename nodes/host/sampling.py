"""Latents in, latents out, through the host's guider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ernie_core.errors import ErnieError
from ...ernie_core.sampling.inputs import LATENT_CHANNELS, check_latent, check_text
from ...ernie_core.sampling.latents import latent_size, step_noise
from ...ernie_core.sampling.samplers import Sampler
from .models import check_model
from .runtime import throw_if_interrupted

EULER = Sampler()


def empty_latent(width: int, height: int, batch_size: int) -> dict[str, Tensor]:
    """LATENT of zeros for a picture of `width` x `height` pixels."""
    import comfy.model_management as mm

    rows, columns = latent_size(width, height)
    return {"samples": torch.zeros(batch_size, LATENT_CHANNELS, rows, columns, device=mm.intermediate_device())}


def checked_latent(model, latent: dict[str, Tensor]) -> Tensor:
    """The samples to start from; ErnieError when they are another model's or not finite."""
    import comfy.sample

    samples = latent["samples"]
    if latent.get("downscale_ratio_spacial") is not None:  # EmptyLatentImage: zeros that the host fits to the model
        samples = comfy.sample.fix_empty_latent_channels(model, samples, latent["downscale_ratio_spacial"])
    check_latent(samples)
    return samples


def check_conditioning(network, name: str, conditioning: list) -> None:
    projection = network.text_proj
    width = projection.in_features if projection is not None else network.final_linear.in_features
    if not conditioning:
        raise ErnieError(f"{name} is empty: encode a prompt with Encode Prompt (ERNIE); an empty prompt is enough.")
    for text, _ in conditioning:
        check_text(name, text, width)


def sample(
    model,
    *,
    positive,
    negative,
    latent: dict[str, Any],
    sigmas: Tensor,
    cfg: float,
    seed: int,
    sampler: Sampler = EULER,
) -> dict:
    """LATENT after one of the engine's samplers, with the host's previews, masks, hooks and interrupt.

    The noise is what core's KSampler draws for `seed`. `negative` None: nothing to compare with, for cfg 1 only.

    Raises:
        ErnieError: model, latent or conditioning are not ERNIE-Image's, or the latent holds NaN.
    """
    import comfy.model_management as mm
    import comfy.sample
    import comfy.samplers
    import comfy.utils
    import latent_preview

    network = check_model(model)
    samples = checked_latent(model, latent)
    conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    for name, conditioning in conds.items():
        check_conditioning(network, name, conditioning)

    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    out = guider.sample(
        noise,
        samples,
        make_sampler(sampler, places=latent.get("batch_index")),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": out.to(mm.intermediate_device())}


def make_sampler(sampler: Sampler, *, places: Sequence[int] | None = None):
    """SAMPLER: a sampler of the engine, for core's SamplerCustom and SamplerCustomAdvanced.

    The host's progress counts steps; the bar in the log counts calls of the model. `places`: where each picture stood
    in the batch that its noise was drawn for; None = where it stands now.
    """
    import comfy.samplers

    def run(model, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable | None, disable: bool) -> Tensor:
        return _run(sampler, places, model, x, sigmas, extra_args, callback, disable)

    return comfy.samplers.KSAMPLER(run)


def _run(
    sampler: Sampler,
    places: Sequence[int] | None,
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict,
    callback: Callable | None,
    disable: bool,
) -> Tensor:
    """A sampler of the engine on a `model` of the host, which answers with x0."""
    from tqdm.auto import tqdm

    ones = x.new_ones(x.shape[0])
    steps = len(sigmas) - 1
    seed = extra_args.get("seed") or 0
    draw_noise = step_noise([(seed, place) for place in places or range(x.shape[0])])

    def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
        return (x_BCHW - model(x_BCHW, sigma * ones, **extra_args)) / sigma

    with tqdm(total=sampler.calls(sigmas), disable=disable) as bar:

        def on_step(call: int, calls: int, x_BCHW: Tensor, x0_BCHW: Tensor) -> None:
            throw_if_interrupted()
            bar.update()
            step = (call + 1) * steps // calls - 1
            if callback is not None and step > call * steps // calls - 1:  # the step's last call
                level = sigmas[step]
                callback({"i": step, "x": x_BCHW, "denoised": x0_BCHW, "sigma": level, "sigma_hat": level})

        return sampler(denoise, x, sigmas, draw_noise=draw_noise, on_step=on_step)
