"""Several prompts in one picture."""

from __future__ import annotations

from comfy_api.latest import io

from . import host

CATEGORY = "ERNIE/editing"


class ErnieRegionalPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieRegionalPrompt",
            display_name="Regional Prompt (ERNIE)",
            category=CATEGORY,
            description="Gives a part of the picture a prompt of its own; chain several for several parts.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="Encoded prompt for the rest of the picture, or another Regional Prompt to add to.",
                ),
                io.Conditioning.Input("region", tooltip="Encoded prompt for what the mask covers."),
                io.Mask.Input(
                    "mask", tooltip="Where the region is: 1 inside, 0 outside. It is stretched over the picture."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Weight of the region's prompt inside the mask, 0 to 1, in steps of 0.05; the rest of the "
                    "weight is the other prompt's. 0 (neutral) = no region, 1 = the region's prompt alone.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="For positive of any sampler, with this pack's MODEL."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning, region, mask, strength: float) -> io.NodeOutput:
        return io.NodeOutput(host.add_region(conditioning, region, mask, strength))
