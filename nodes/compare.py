"""Two batches of pictures over each other, with a divider to drag (web/compare.js)."""

from __future__ import annotations

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host

CATEGORY = "ERNIE/compare"


class ErnieCompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieCompareImages",
            display_name="Compare Images (ERNIE)",
            category=CATEGORY,
            description="Shows two batches of pictures over each other on the node, with a divider to drag and a zoom.",
            is_output_node=True,
            inputs=[
                io.Image.Input("image_a", tooltip="Pictures on the left of the divider."),
                io.Image.Input(
                    "image_b",
                    tooltip="Pictures on the right of the divider; another size is fitted into the same frame, and a "
                    "shorter batch stays at its last picture.",
                ),
                io.String.Input("label_a", default="A", tooltip="What is written on the left; empty = nothing."),
                io.String.Input("label_b", default="B", tooltip="What is written on the right; empty = nothing."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, image_a, image_b, label_a: str, label_b: str) -> io.NodeOutput:
        shown = {"a": preview("image_a", image_a), "b": preview("image_b", image_b)}
        return io.NodeOutput(ui={"ernie_compare": [{**shown, "label_a": label_a, "label_b": label_b}]})


def preview(name: str, images) -> list[dict[str, str]]:
    """Where the page finds each picture of a batch."""
    if images.ndim != 4 or not len(images) or images.shape[-1] not in (3, 4):
        raise ErnieError(f"{name} must hold pictures [B, H, W, 3], got {list(images.shape)}.")
    if not images.isfinite().all():
        raise ErnieError(f"{name} holds NaN or infinite values: look at the node in front of it.")
    return host.preview_images(images[..., :3])
