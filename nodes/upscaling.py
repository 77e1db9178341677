"""Pictures larger than the model was trained for: a larger latent, denoised in tiles."""

from __future__ import annotations

from comfy_api.latest import io

from . import host

CATEGORY = "ERNIE/editing"


class ErnieTiledSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieTiledSampling",
            display_name="Tiled Sampling (ERNIE)",
            category=CATEGORY,
            description="Lets a model denoise large pictures in overlapping tiles that are blended at every step.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, from these loaders or from core's."),
                io.Int.Input(
                    "tile",
                    default=1024,
                    min=32,
                    max=4096,
                    step=16,
                    tooltip="Side of a tile in pixels, 32 to 4096, a multiple of 16. A picture that fits one tile is "
                    "sampled as ever (neutral). 1024 is what the model was trained on.",
                ),
                io.Int.Input(
                    "overlap",
                    default=256,
                    min=0,
                    max=2048,
                    step=16,
                    tooltip="Pixels that neighbours share at least, 0 to half a tile, a multiple of 16. More hides the "
                    "borders better and takes more tiles.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model that denoises in tiles, for any sampler.")
            ],
        )

    @classmethod
    def execute(cls, model, tile: int, overlap: int) -> io.NodeOutput:
        from ..ernie_core.sampling.tiles import Tiles

        return io.NodeOutput(host.set_tiles(model, Tiles(tile_px=tile, overlap_px=overlap)))


class ErnieUpscaleLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieUpscaleLatent",
            display_name="Upscale Latent (ERNIE)",
            category=CATEGORY,
            description="Resizes a latent so that everything stays in its place, as the base of a second pass.",
            inputs=[
                io.Latent.Input("latent", tooltip="Latent of this model: a sampler's, or a picture through VAEEncode."),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=0.1,
                    max=8.0,
                    step=0.05,
                    round=0.0001,
                    tooltip="Factor on both sides, 0.1 to 8; they are rounded to multiples of 16 px. 1 (neutral) = the "
                    "same latent.",
                ),
                io.Combo.Input(
                    "method",
                    options=["bicubic", "bilinear", "nearest-exact"],
                    default="bicubic",
                    tooltip="How values between are found. bicubic is the sharpest; nearest-exact repeats them.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For a sampler with denoise 0.1 to 0.3, not VAEDecode.")
            ],
        )

    @classmethod
    def execute(cls, latent, scale: float, method: str) -> io.NodeOutput:
        from ..ernie_core.sampling.inputs import check_latent
        from ..ernie_core.sampling.latents import resize_latent, scaled_size

        samples = latent["samples"]
        check_latent(samples)
        height, width = scaled_size(samples.shape[2], samples.shape[3], scale)
        return io.NodeOutput({**latent, "samples": resize_latent(samples, height, width, method)})
