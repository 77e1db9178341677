"""Inpainting and outpainting: what is cut out, how it is painted, how it goes back."""

from __future__ import annotations

from comfy_api.latest import io

from ..ernie_core.config import MAX_SIZE
from . import host
from .guidance import end_input, start_input
from .sampling import MAX_SEED

CATEGORY = "ERNIE/editing"
FILLS = ("original", "surroundings", "grey", "noise")
COLOUR_MATCHES = ("smooth", "mean and spread", "off")
SIDES = ("left", "top", "right", "bottom")

Stitch = io.Custom("ERNIE_STITCH")


def pixels_input(id: str, default: int, tooltip: str, *, maximum: int = MAX_SIZE, step: int = 1) -> io.Int.Input:
    return io.Int.Input(id, default=default, min=0, max=maximum, step=step, tooltip=tooltip)


def margin_input(side: str) -> io.Int.Input:
    tooltip = f"Pixels of new picture on this side ({side}), 0 to {MAX_SIZE}. 0 (neutral) = none."
    return pixels_input(side, 0, tooltip, step=8)


class ErnieInpaintPrepare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieInpaintPrepare",
            display_name="Inpaint Prepare (ERNIE)",
            category=CATEGORY,
            description="Makes the latent of a picture whose masked part, or new margins, any sampler then paints.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="Picture to change, of any size; a batch is changed picture by picture."
                ),
                io.Vae.Input("vae", tooltip="VAE that encodes it: Load VAE (ERNIE), or core's loader."),
                *[margin_input(side) for side in SIDES],
                pixels_input(
                    "grow",
                    8,
                    "How far the mask reaches beyond what was drawn, in pixels, 0 to 512. 0 (neutral) = not at all. "
                    "With margins: how far into the picture.",
                    maximum=512,
                ),
                pixels_input(
                    "feather",
                    16,
                    "Width of the soft edge outside the mask, in pixels, 0 to 512: there new and old are mixed. 0 "
                    "(neutral) = a hard edge. Beyond it the picture stays as it is, exactly.",
                    maximum=512,
                ),
                io.Combo.Input(
                    "fill",
                    options=list(FILLS),
                    default=FILLS[0],
                    tooltip="What lies under the mask when sampling starts; it matters when the sampler's denoise is "
                    "below 1. original (neutral): the picture, margins its stretched edge. surroundings: a smooth "
                    "continuation. grey. noise.",
                ),
                io.Boolean.Input(
                    "crop",
                    default=False,
                    tooltip="Cut out the mask with its context and paint only that: for large pictures and small "
                    "masks. Off (neutral) = the whole picture is encoded at its own size.",
                ),
                pixels_input(
                    "context",
                    64,
                    "How much of the picture around the mask is cut out with it, in pixels. 0 = none. Read only when "
                    "crop is on.",
                ),
                pixels_input(
                    "size",
                    1024,
                    "The part is scaled to about size x size pixels, in its own proportions and multiples of 16. 0 "
                    "(neutral) = painted at its own size. Read only when crop is on.",
                    step=16,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to paint (1), of the picture's size. Not connected: only the margins, or the whole "
                    "picture where there are none (image to image).",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="With its noise mask: for Sampler, KSampler or SamplerCustom."
                ),
                Stitch.Output(display_name="stitch", tooltip="For Inpaint Stitch: where the painted part belongs."),
                io.Image.Output(display_name="image", tooltip="What was encoded, to look at."),
                io.Mask.Output(
                    display_name="mask", tooltip="What is painted of it, in whole latent cells, to look at."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image, vae, left, top, right, bottom, grow, feather, fill, crop, context, size, mask=None
    ) -> io.NodeOutput:
        from ..ernie_core.sampling.inpaint import prepare
        from ..ernie_core.sampling.masks import to_pixels

        prepared = prepare(
            image,
            mask,
            padding=(left, top, right, bottom),
            grow_px=grow,
            feather_px=feather,
            fill=fill,
            context_px=context if crop else None,
            size_px=size if crop else 0,
        )
        latent = host.encode(vae, prepared.image) | {"noise_mask": prepared.latent_mask}
        return io.NodeOutput(latent, prepared.stitch, prepared.image, to_pixels(prepared.latent_mask))


class ErnieInpaintStitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieInpaintStitch",
            display_name="Inpaint Stitch (ERNIE)",
            category=CATEGORY,
            description="Lays the painted part back into the picture; everything outside the mask is the original's.",
            inputs=[
                io.Image.Input("image", tooltip="The painted part, decoded."),
                Stitch.Input("stitch", tooltip="From the Inpaint Prepare that made its latent."),
                io.Combo.Input(
                    "colour_match",
                    options=list(COLOUR_MATCHES),
                    default=COLOUR_MATCHES[0],
                    tooltip="Colours of the painted part against what surrounds it. smooth: the difference at the edge "
                    "is carried on inwards, no seam is left. mean and spread: each channel's average and contrast "
                    "around the mask. off (neutral): as painted.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The whole picture, margins included.")],
        )

    @classmethod
    def execute(cls, image, stitch, colour_match) -> io.NodeOutput:
        from ..ernie_core.sampling.inpaint import lay_back

        return io.NodeOutput(lay_back(image, stitch, colour_match=colour_match))


class ErnieHardInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieHardInpaint",
            display_name="Hard Inpaint (ERNIE)",
            category=CATEGORY,
            description="Lets the painted part and its surroundings agree before each step, for hard masks.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, ours or core's, with or without other patches."),
                io.Int.Input(
                    "iterations",
                    default=5,
                    min=0,
                    max=100,
                    tooltip="Moves before each step, 0 to 100; each takes as long as a step. 0 (neutral) = off. Acts "
                    "only on latents with a noise mask.",
                ),
                io.Float.Input(
                    "evidence",
                    default=0.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How strongly the surroundings insist on the picture against what the model would rather "
                    "have there, 0 to 20. 0 (neutral) = they do not insist; try 0.5 to 2 at cfg 1.",
                ),
                io.Float.Input(
                    "step",
                    default=0.5,
                    min=0.01,
                    max=5.0,
                    step=0.01,
                    tooltip="Length of a move in relaxation times of the noise, 0.01 to 5. Short ones keep what is "
                    "there, 5 all but draws it anew.",
                ),
                start_input("It acts"),
                end_input("It acts"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Noise number of the moves, apart from the sampler's.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model that inpaints so, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, iterations, evidence, step, start, end, seed) -> io.NodeOutput:
        from ..ernie_core.sampling.langevin import InnerIterations

        how = InnerIterations(iterations=iterations, evidence=evidence, step=step, start=start, end=end, seed=seed)
        return io.NodeOutput(host.set_inner_iterations(model, how))
