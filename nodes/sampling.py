"""Latents, sigmas and the sampler."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..ernie_core.config import (
    BASE,
    MAX_SIZE,
    MAX_STEPS,
    OFFICIAL_SIZES,
    SAMPLERS,
    SIZE_MULTIPLE,
    TURBO,
    SamplingPreset,
)
from ..ernie_core.errors import ErnieError
from . import host

logger = logging.getLogger(__name__)

CATEGORY = "ERNIE/sampling"
CUSTOM = "custom"
MAX_SEED = 0xFFFFFFFFFFFFFFFF

SIZES: dict[str, tuple[int, int]] = {f"{w} x {h}": (w, h) for w, h in OFFICIAL_SIZES}
PRESETS: dict[str, SamplingPreset] = {
    f"{name} {preset.steps} / {preset.cfg:g}": preset for name, preset in (("Base", BASE), ("Turbo", TURBO))
}

STEPS_TOOLTIP = "Model evaluations, 1 to 1000. More follows the flow more exactly and takes longer."
SHIFT_TOOLTIP = (
    "How many of the steps go to high noise, 0.1 to 100. 4 is what both official models use, 3 is what ComfyUI's own "
    "ERNIE nodes use, 1 = evenly spread."
)
DENOISE_TOOLTIP = (
    "How much of the input latent is replaced by noise, 0.01 to 1. 1 (neutral) starts from pure noise; lower values "
    "keep "
    "more of the picture, for image to image. Works in whole steps of the schedule."
)


def steps_input(id: str = "steps", tooltip: str = STEPS_TOOLTIP) -> io.Int.Input:
    return io.Int.Input(id, default=BASE.steps, min=1, max=MAX_STEPS, tooltip=tooltip)


def cfg_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("cfg", default=BASE.cfg, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def shift_input(tooltip: str = SHIFT_TOOLTIP) -> io.Float.Input:
    return io.Float.Input("shift", default=BASE.shift, min=0.1, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def denoise_input() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=DENOISE_TOOLTIP)


SAMPLER_TOOLTIP = (
    "How a step is made. euler (neutral): the official one. heun: more exact, two evaluations per step. dpmpp_2m, "
    "unipc: more exact at one evaluation per step. euler_ancestral, dpmpp_2m_sde: with new noise at each step."
)


def sampler_input(*, optional: bool, tooltip: str = SAMPLER_TOOLTIP) -> io.Combo.Input:
    return io.Combo.Input("sampler", options=list(SAMPLERS), default=SAMPLERS[0], tooltip=tooltip, optional=optional)


def size_inputs(tooltip: str) -> list[io.Int.Input]:
    """width and height in steps of 16."""
    return [
        io.Int.Input(side, default=1024, min=SIZE_MULTIPLE, max=MAX_SIZE, step=SIZE_MULTIPLE, tooltip=tooltip % side)
        for side in ("width", "height")
    ]


class ErnieEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieEmptyLatent",
            display_name="Empty Latent (ERNIE)",
            category=CATEGORY,
            description="Makes an empty latent in one of the seven official sizes or in a size of your own.",
            inputs=[
                io.Combo.Input(
                    "size",
                    options=[*SIZES, CUSTOM],
                    default=next(iter(SIZES)),
                    tooltip="Picture size, width x height in pixels. The listed sizes are those the model was "
                    "trained for; "
                    "custom takes width and height from below.",
                ),
                *size_inputs("Picture %s in pixels, a multiple of 16. Read only when size is custom."),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="Number of pictures made at once, 1 to 4096."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Zeros, 128 channels at 1/16 of the picture size.")
            ],
        )

    @classmethod
    def execute(cls, size: str, width: int, height: int, batch_size: int) -> io.NodeOutput:
        width, height = SIZES.get(size, (width, height))
        return io.NodeOutput(host.empty_latent(width, height, batch_size))


def preset_settings(preset: str, steps: int, cfg: float) -> tuple[int, float]:
    """Steps and cfg of `preset`, or the widgets' own when it is custom; says so when it overrides a changed widget."""
    if preset not in PRESETS:
        return steps, cfg
    chosen = PRESETS[preset]
    for name, value, default, wanted in (
        ("steps", steps, BASE.steps, chosen.steps),
        ("cfg", cfg, BASE.cfg, chosen.cfg),
    ):
        if value not in (default, wanted):
            logger.warning("%s %g is not used: preset %r sets %g. Choose preset custom.", name, value, preset, wanted)
    return chosen.steps, chosen.cfg


class ErnieSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieSampler",
            display_name="Sampler (ERNIE)",
            category=CATEGORY,
            description="Denoises a latent with the official flow-matching Euler sampler, or with another.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, from these loaders or from core's."),
                io.Conditioning.Input("positive", tooltip="Encoded prompt: what the picture shows."),
                io.Latent.Input("latent_image", tooltip="Where to start: Empty Latent, or an encoded picture."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default=next(iter(PRESETS)),
                    tooltip="Official steps / cfg of the two models. custom takes steps and cfg from below.",
                ),
                steps_input(tooltip=STEPS_TOOLTIP + " Read only when preset is custom."),
                cfg_input(
                    "Strength of the prompt against the negative prompt, 0 to 100. 1 = off: the negative is not "
                    "evaluated "
                    "and a step takes half the time. Read only when preset is custom."
                ),
                shift_input(SHIFT_TOOLTIP + " Replaces the shift that the model carries."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Noise number; the same seed gives the same picture on every device, and the same noise as "
                    "core's KSampler.",
                ),
                denoise_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Encoded negative prompt (an empty prompt is the official choice). Needed unless cfg is 1.",
                ),
                sampler_input(optional=True),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The finished latent, for VAEDecode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, preset, steps, cfg, shift, seed, denoise, negative=None, sampler="euler"
    ) -> io.NodeOutput:
        from ..ernie_core.sampling.samplers import Sampler
        from ..ernie_core.sampling.schedule import make_sigmas

        steps, cfg = preset_settings(preset, steps, cfg)
        if negative is None and cfg != 1:
            raise ErnieError(
                f"cfg {cfg:g} compares with a negative prompt, but the input negative is not connected. "
                "Connect Encode Prompt with an empty text, or set cfg to 1 (Turbo)."
            )
        latent = host.sample(
            host.set_shift(model, shift),
            positive=positive,
            negative=negative,
            latent=latent_image,
            sigmas=make_sigmas(steps, shift=shift, denoise=denoise),
            cfg=cfg,
            seed=seed,
            sampler=Sampler(name=sampler),
        )
        return io.NodeOutput(latent)


class ErnieSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieSigmas",
            display_name="Sigmas (ERNIE)",
            category=CATEGORY,
            description="Makes the official noise schedule for core's SamplerCustom and SamplerCustomAdvanced.",
            inputs=[steps_input(), shift_input(), denoise_input()],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels from 1 (or less, by denoise) down to 0.")
            ],
        )

    @classmethod
    def execute(cls, steps: int, shift: float, denoise: float) -> io.NodeOutput:
        from ..ernie_core.sampling.schedule import make_sigmas

        return io.NodeOutput(make_sigmas(steps, shift=shift, denoise=denoise))


class ErnieSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieSamplerSelect",
            display_name="Sampler Select (ERNIE)",
            category=CATEGORY,
            description="Chooses a flow-matching sampler for core's SamplerCustom and SamplerCustomAdvanced.",
            inputs=[
                sampler_input(optional=False),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Share of new noise at each step, 0 to 1: 1 = all that fits, 0 (neutral) = none, which is "
                    "euler or dpmpp_2m itself. Read by euler_ancestral and dpmpp_2m_sde.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="The sampler, for any model of this kind.")],
        )

    @classmethod
    def execute(cls, sampler: str, eta: float) -> io.NodeOutput:
        from ..ernie_core.sampling.samplers import STOCHASTIC, Sampler

        if sampler not in STOCHASTIC and eta != 1:
            logger.warning(
                "eta %g is not used: %s draws no new noise. Choose euler_ancestral or dpmpp_2m_sde.", eta, sampler
            )
        return io.NodeOutput(host.make_sampler(Sampler(name=sampler, eta=eta)))
