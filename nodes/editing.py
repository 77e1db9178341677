"""Editing finished pictures by words, and variations of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .sampling import MAX_SEED, SHIFT_TOOLTIP, cfg_input, shift_input, steps_input

CATEGORY = "ERNIE/editing"
FLOW_EDIT, INVERSION = "flow edit", "inversion"

STEPS_TOOLTIP = (
    "Steps of the schedule, 1 to 1000. They are made at the noise levels that strength leaves, so the time is the same "
    "at every strength."
)
PICTURE_TOOLTIP = "Finished picture: a sampler's latent, or a photograph through VAEEncode."
MASK_TOOLTIP = " A noise mask on it says where it may change."
NEGATIVE_TOOLTIP = "Encoded negative prompt (an empty one is the official choice). Needed unless every cfg is 1."


def strength_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("strength", default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def iterations_input() -> io.Int.Input:
    return io.Int.Input(
        "iterations",
        default=1,
        min=1,
        max=50,
        tooltip="Model evaluations per step on the way back to the noise, 1 to 50. 1 is robust; at cfg 1 more give the "
        "picture back more exactly, above cfg 1 they may run away.",
    )


def check_guidance(negative: Any, *cfgs: float) -> None:
    """ErnieError when a cfg needs the negative prompt and there is none."""
    cfg = next((cfg for cfg in cfgs if cfg != 1), 1)
    if negative is None and cfg != 1:
        raise ErnieError(
            f"cfg {cfg:g} compares with a negative prompt, but the input negative is not connected. "
            "Connect Encode Prompt with an empty text, or set cfg to 1 (Turbo)."
        )


def make_edit(method: str, sigmas: Any, seed: int, latent: dict, repeats: int) -> Callable:
    """The engine's function for a method, with all but what the host adds."""
    from ..ernie_core.sampling.flow_edit import edit_by_inversion, flow_edit, noises

    if method == INVERSION:
        return partial(edit_by_inversion, sigmas=sigmas, iterations=repeats)
    return partial(flow_edit, sigmas=sigmas, draw=noises(seed, latent), repeats=repeats)


@dataclass(frozen=True, kw_only=True)
class PictureNoise:
    """NOISE: the noise that makes one picture."""

    noise_BCHW: Any
    seed: int = 0

    def generate_noise(self, input_latent: dict) -> Any:
        wanted, own = list(input_latent["samples"].shape), list(self.noise_BCHW.shape)
        if wanted != own:
            raise ErnieError(
                f"this noise was found for a latent {own}, the latent here is {wanted}: use an Empty Latent of the "
                "picture's own size and batch."
            )
        return self.noise_BCHW


@dataclass(frozen=True, kw_only=True)
class MixedNoise:
    """NOISE: two others mixed, of unit variance again."""

    first: Any
    second: Any
    strength: float

    @property
    def seed(self) -> int:
        return self.first.seed

    def generate_noise(self, input_latent: dict) -> Any:
        from ..ernie_core.sampling.flow_edit import mix_gaussians

        first, second = (noise.generate_noise(input_latent) for noise in (self.first, self.second))
        return mix_gaussians(first, second.to(first), self.strength)


class ErnieEditWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieEditWords",
            display_name="Edit by Words (ERNIE)",
            category=CATEGORY,
            description="Changes a finished picture as its prompt changes: swap a word, keep the rest.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, from these loaders or from core's."),
                io.Latent.Input("latent", tooltip=PICTURE_TOOLTIP + MASK_TOOLTIP),
                io.Conditioning.Input("source", tooltip="Encoded prompt that says what the picture shows now."),
                io.Conditioning.Input(
                    "target", tooltip="Encoded prompt that says what it shall show: the same text with words changed."
                ),
                io.Combo.Input(
                    "method",
                    options=[FLOW_EDIT, INVERSION],
                    default=FLOW_EDIT,
                    tooltip="flow edit walks from one picture to the other and keeps best what the prompts share; "
                    "inversion goes back to the picture's noise and paints it anew.",
                ),
                strength_input(
                    0.8,
                    "How much may change, 0 to 1: the noise level at which the edit begins, as a share of the steps. "
                    "0 (neutral) gives the picture back; at 0.5 colours and backgrounds change, shapes want 0.8.",
                ),
                steps_input(tooltip=STEPS_TOOLTIP),
                cfg_input("Strength of the target prompt, 0 to 100. 1 = no guidance, for Turbo."),
                io.Float.Input(
                    "source_cfg",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Strength of the source prompt, 0 to 100. Below cfg the change is pushed further than the "
                    "prompts differ; 1 = no guidance and saves a quarter of the time.",
                ),
                shift_input(SHIFT_TOOLTIP + " Replaces the shift that the model carries."),
                seed_input("Noise number of the noisy copies that flow edit compares; inversion draws none."),
                io.Int.Input(
                    "repeat",
                    default=1,
                    min=1,
                    max=50,
                    tooltip="1 to 50, 1 is the usual choice. flow edit: noises averaged in each step. inversion: "
                    "evaluations per step on the way back; more are more exact at cfg 1 only.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE_TOOLTIP),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The edited picture, for VAEDecode.")],
        )

    @classmethod
    def execute(
        cls, model, latent, source, target, method, strength, steps, cfg, source_cfg, shift, seed, repeat, negative=None
    ) -> io.NodeOutput:
        from ..ernie_core.sampling.schedule import make_sigmas

        check_guidance(negative, cfg, source_cfg)
        sigmas = make_sigmas(steps, shift=shift, denoise=strength)
        edited = host.sample_branches(
            host.set_shift(model, shift),
            branches={"source": (source, negative, source_cfg), "target": (target, negative, cfg)},
            latent=latent,
            sigmas=sigmas,
            run=make_edit(method, sigmas, seed, latent, repeat),
            steps=steps if method == FLOW_EDIT else 2 * steps,
        )
        return io.NodeOutput(edited)


class ErnieInvertPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieInvertPicture",
            display_name="Invert Picture (ERNIE)",
            category=CATEGORY,
            description="Finds the noise from which the model paints a given picture.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, from these loaders or from core's."),
                io.Latent.Input("latent", tooltip=PICTURE_TOOLTIP),
                io.Conditioning.Input("positive", tooltip="Encoded prompt that says what the picture shows."),
                steps_input(tooltip="Steps of the schedule, 1 to 1000. Sample with the same number afterwards."),
                cfg_input("Strength of the prompt, 0 to 100. Sample with the same cfg afterwards. 1 = no guidance."),
                shift_input(SHIFT_TOOLTIP + " Sample with the same shift afterwards."),
                iterations_input(),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE_TOOLTIP),
            ],
            outputs=[
                io.Noise.Output(
                    display_name="noise", tooltip="For SamplerCustomAdvanced with an Empty Latent of the same size."
                )
            ],
        )

    @classmethod
    def execute(cls, model, latent, positive, steps, cfg, shift, iterations, negative=None) -> io.NodeOutput:
        from ..ernie_core.sampling.flow_edit import find_noise
        from ..ernie_core.sampling.schedule import make_sigmas

        check_guidance(negative, cfg)
        sigmas = make_sigmas(steps, shift=shift)
        noise = host.sample_branches(
            host.set_shift(model, shift),
            branches={"source": (positive, negative, cfg)},
            latent=latent,
            sigmas=sigmas,
            run=partial(find_noise, sigmas=sigmas, iterations=iterations),
            steps=steps,
        )
        return io.NodeOutput(PictureNoise(noise_BCHW=noise["samples"]))


class ErnieMixNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieMixNoise",
            display_name="Mix Noise (ERNIE)",
            category=CATEGORY,
            description="Mixes two noises into one of the same variance, for variations of a seed or of a picture.",
            inputs=[
                io.Noise.Input("first", tooltip="RandomNoise with the seed of a picture, or Invert Picture."),
                io.Noise.Input("second", tooltip="RandomNoise with another seed."),
                strength_input(0.3, "Share of the second noise, 0 to 1. 0 (neutral) is the first, 1 the second."),
            ],
            outputs=[io.Noise.Output(display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, first, second, strength: float) -> io.NodeOutput:
        from ..ernie_core.sampling.flow_edit import check_strength

        check_strength(strength)
        return io.NodeOutput(MixedNoise(first=first, second=second, strength=strength))


class ErnieVariation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieVariation",
            display_name="Variation (ERNIE)",
            category=CATEGORY,
            description="Paints a finished picture again from its own noise with some fresh noise mixed in.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, from these loaders or from core's."),
                io.Latent.Input("latent", tooltip=PICTURE_TOOLTIP + MASK_TOOLTIP),
                io.Conditioning.Input("positive", tooltip="Encoded prompt that says what the picture shows."),
                strength_input(
                    0.3, "How far from the picture, 0 to 1. 0 (neutral) gives the picture back, 1 is a fresh one."
                ),
                seed_input("Number of the fresh noise; each seed is another variation."),
                steps_input(tooltip="Steps of the schedule, each way, 1 to 1000."),
                cfg_input("Strength of the prompt, 0 to 100: that with which the picture was made. 1 = no guidance."),
                shift_input(SHIFT_TOOLTIP + " Replaces the shift that the model carries."),
                iterations_input(),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE_TOOLTIP),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The variation, for VAEDecode.")],
        )

    @classmethod
    def execute(
        cls, model, latent, positive, strength, seed, steps, cfg, shift, iterations, negative=None
    ) -> io.NodeOutput:
        from ..ernie_core.sampling.flow_edit import noises, vary
        from ..ernie_core.sampling.schedule import make_sigmas

        check_guidance(negative, cfg)
        sigmas = make_sigmas(steps, shift=shift)
        varied = host.sample_branches(
            host.set_shift(model, shift),
            branches={"source": (positive, negative, cfg)},
            latent=latent,
            sigmas=sigmas,
            run=partial(vary, sigmas=sigmas, draw=noises(seed, latent), strength=strength, iterations=iterations),
            steps=2 * steps,
        )
        return io.NodeOutput(varied)


class ErnieStyleStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieStyleStatistics",
            display_name="Style Statistics (ERNIE)",
            category=CATEGORY,
            description="Moves colours and contrast of what a model paints towards those of a reference picture.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, from these loaders or from core's."),
                io.Latent.Input(
                    "latent", tooltip="Reference picture through VAEEncode, of any size. Its noise mask is not used."
                ),
                strength_input(
                    0.5, "How far to move, 0 to 1. 0 (neutral) = off, 1 = mean and contrast as in the reference."
                ),
                io.Float.Input(
                    "start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Act from this noise level down, 1 to 0. 1 = from the first step. There is no neutral "
                    "value.",
                ),
                io.Float.Input(
                    "end",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Act above this noise level, 1 to 0; below it the model paints freely. 1 (neutral) = "
                    "never.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model that is moved, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, latent: dict, strength: float, start: float, end: float) -> io.NodeOutput:
        from ..ernie_core.sampling.style import StyleStatistics

        style = StyleStatistics.of(latent["samples"], strength=strength, start=start, end=end)
        return io.NodeOutput(host.set_style(model, style))
