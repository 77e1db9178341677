"""Guidance: patches on MODEL that change what is made of the predictions."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from . import host

logger = logging.getLogger(__name__)

CATEGORY = "ERNIE/guidance"
APG, ZERO_STAR = "apg", "cfg-zero*"
METHODS = ("cfg", APG, ZERO_STAR)
# Settings of one method, with their defaults: those of the papers.
OWN_SETTINGS = {"eta": (APG, 0.0), "momentum": (APG, 0.0), "norm_threshold": (APG, 0.0), "zero_steps": (ZERO_STAR, 0)}

MODEL_TOOLTIP = "ERNIE-Image model, ours or core's, with or without LoRA and other guidance."


def start_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        "start",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=f"{tooltip} from this noise level on, 1 to 0. 1 (neutral) = from the first step.",
    )


def end_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        "end",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=f"{tooltip} down to this noise level, 1 to 0. 0 (neutral) = to the last step, start = never.",
    )


class ErnieGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieGuidance",
            display_name="Guidance (ERNIE)",
            category=CATEGORY,
            description="Sets how a prompt is weighed against the negative prompt: where, by which method, how long.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TOOLTIP),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="cfg (neutral): the difference of the two predictions, cfg times. apg: without the part of "
                    "it along the prediction. cfg-zero*: the negative prediction scaled to fit.",
                ),
                start_input("Guidance acts"),
                end_input("Guidance acts"),
                io.Float.Input(
                    "rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the contrast that guidance added and that is taken back, 0 to 1. 0 (neutral) = "
                    "none; 0.7 is the paper's.",
                ),
                io.Float.Input(
                    "skip_similarity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="The negative prompt is not asked any more once both predictions of a picture are this "
                    "similar (cosine, 0 to 1): steps then take half the time. 1 (neutral) = always asked; try 0.995.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="apg only: how much of the part along the prediction is kept, -10 to 10. 0 is the paper's, "
                    "1 (neutral) = all of it.",
                ),
                io.Float.Input(
                    "momentum",
                    default=0.0,
                    min=-0.99,
                    max=0.99,
                    step=0.05,
                    round=0.01,
                    advanced=True,
                    tooltip="apg only: share of the earlier steps' difference that is added, -0.99 to 0.99. -0.5 is "
                    "the paper's, 0 (neutral) = none; take 0 at few steps or a high cfg.",
                ),
                io.Float.Input(
                    "norm_threshold",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="apg only: largest length of the difference, in standard deviations of the latent (root "
                    "mean square over the picture), 0 to 100. 0 (neutral) = no limit.",
                ),
                io.Int.Input(
                    "zero_steps",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="cfg-zero* only: first steps of the schedule that leave the noise as it is, without a "
                    "model call, 0 to 1000. 0 (neutral) = none; the paper leaves out the first 4 % for base models.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model under this guidance, for any sampler.")],
        )

    @classmethod
    def execute(
        cls, model, method, start, end, rescale, skip_similarity, eta, momentum, norm_threshold, zero_steps
    ) -> io.NodeOutput:
        from ..ernie_core.sampling.guidance import AdaptiveSkip, Interval, Projection, Rescale, ZeroStar

        warn_about_unread(method, eta=eta, momentum=momentum, norm_threshold=norm_threshold, zero_steps=zero_steps)
        rules = [Interval(start=start, end=end), AdaptiveSkip(similarity=skip_similarity), Rescale(share=rescale)]
        if method == APG:
            rules.append(Projection(eta=eta, momentum=momentum, norm_threshold=norm_threshold))
        if method == ZERO_STAR:
            rules.append(ZeroStar(zero_steps=zero_steps))
        return io.NodeOutput(host.add_guidance(model, rules))


def warn_about_unread(method: str, **settings: float) -> None:
    """Name settings of another method that were changed."""
    for name, value in settings.items():
        owner, default = OWN_SETTINGS[name]
        if owner != method and value != default:
            logger.warning("%s %g is not used by method %r: it belongs to %r.", name, value, method, owner)


class ErnieSkipLayerGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieSkipLayerGuidance",
            display_name="Skip Layer Guidance (ERNIE)",
            category=CATEGORY,
            description="Pushes pictures away from what the model paints with some of its blocks left out.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TOOLTIP),
                io.Float.Input(
                    "scale",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How far it is pushed, 0 to 100. 0 (neutral) = off; try 1 to 3. Each step in the range "
                    "below takes one more model call.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Blocks left out in the third prediction, counted from 0, such as 12, 13 or 12-14. Empty: "
                    "a twelfth of all blocks, after the first third (12 to 14 of 36).",
                ),
                start_input("It acts"),
                end_input("It acts"),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model under this guidance, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, scale: float, blocks: str, start: float, end: float) -> io.NodeOutput:
        from ..ernie_core.sampling.guidance import SkipLayers, read_blocks

        chosen = read_blocks(blocks, host.num_blocks(model))
        return io.NodeOutput(host.add_guidance(model, [SkipLayers(blocks=chosen, scale=scale, start=start, end=end)]))


class ErnieNegativeForTurbo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieNegativeForTurbo",
            display_name="Negative Prompt for Turbo (ERNIE)",
            category=CATEGORY,
            description="Lets a model at cfg 1 obey a negative prompt, by normalized attention guidance.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model from these loaders, with or without LoRA."),
                io.Conditioning.Input("negative", tooltip="Encoded text that names what shall not be in the picture."),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    round=0.01,
                    tooltip="How far the picture is pushed away from it, 0 to 100. 1 (neutral) = off; try 2 to 5.",
                ),
                start_input("It acts"),
                end_input("It acts"),
                io.Float.Input(
                    "tau",
                    default=2.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    advanced=True,
                    tooltip="Longest that the pushed attention may get, in lengths of the plain one, 1 to 100. There "
                    "is no neutral value; lower is safer.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    advanced=True,
                    tooltip="Share of the pushed attention in the result, 0 to 1. 0 (neutral) = off; try 0.1 to 0.25, "
                    "the paper's for FLUX. Lower is safer.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with this negative prompt inside.")],
        )

    @classmethod
    def execute(cls, model, negative, scale, start, end, tau, alpha) -> io.NodeOutput:
        return io.NodeOutput(host.add_nag(model, negative, scale=scale, start=start, end=end, tau=tau, alpha=alpha))


class ErnieSeedVariety(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieSeedVariety",
            display_name="Seed Variety (ERNIE)",
            category=CATEGORY,
            description="Lets seeds differ more, by noise in the prompt's features during the first steps.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TOOLTIP),
                io.Float.Input(
                    "strength",
                    default=0.25,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    round=0.01,
                    tooltip="Noise in the features, in their own deviations, 0 to 4. 0 (neutral) = off; from 1 on the "
                    "prompt gets lost.",
                ),
                io.Float.Input(
                    "start",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From the first step down to this noise level, 1 to 0, the noise is there in full; below "
                    "it fades. There is no neutral value.",
                ),
                io.Float.Input(
                    "end",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From this noise level down, 1 to 0, the features are exact. 1 (neutral) = no noise.",
                ),
                io.Float.Input(
                    "rescale",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    advanced=True,
                    tooltip="How far mean and deviation of the features are brought back after the noise, 0 to 1. 1 = "
                    "as without noise, 0 = not at all. There is no neutral value.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with varied prompts, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, strength: float, start: float, end: float, rescale: float) -> io.NodeOutput:
        from ..ernie_core.sampling.variety import Variety

        variety = Variety(strength=strength, start=start, end=end, rescale=rescale)
        return io.NodeOutput(host.set_variety(model, variety))
