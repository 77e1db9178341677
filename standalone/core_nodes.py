"""The core nodes that workflows mix with ours, under core's ids and inputs, so that the same files run.

What standalone does not do (other samplers) is refused by name when the workflow is checked or run. Core's file
loaders build our own models here: there is one engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..ernie_core.errors import ErnieError
from . import host
from .schedules import SCHEDULERS, core_sigmas

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 0xFFFFFFFFFFFFFFFF
MAX_SIZE = 16384
SAMPLERS = ("euler",)
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff", ".gif")


def check_choice(sampler_name: str | None = None, scheduler: str | None = None) -> bool | str:
    """Say what standalone offers when a workflow asks for another sampler or scheduler."""
    if sampler_name is not None and sampler_name not in SAMPLERS:
        return (
            f"sampler_name {' or '.join(SAMPLERS)} expected without ComfyUI, got {sampler_name!r}; "
            "set it, or run this in ComfyUI."
        )
    if scheduler is not None and scheduler not in SCHEDULERS:
        return (
            f"scheduler {' or '.join(SCHEDULERS)} expected without ComfyUI, got {scheduler!r}; "
            "set it, or run this in ComfyUI."
        )
    return True


# ---------------------------------------------------------------------------------------------------- loaders


class UNETLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UNETLoader",
            display_name="Load Diffusion Model",
            category="advanced/loaders",
            inputs=[
                io.Combo.Input("unet_name", options=host.list_models("diffusion_models")),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES)),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        component = read_component(host.model_path("diffusion_models", unet_name), "transformer")
        return io.NodeOutput(host.make_model(component, weight_dtype=weight_dtype))


class CLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPLoader",
            display_name="Load CLIP",
            category="advanced/loaders",
            inputs=[
                io.Combo.Input("clip_name", options=host.list_models("text_encoders")),
                io.Combo.Input("type", options=["flux2"], tooltip="Only ERNIE-Image's text encoder (flux2) here."),
                io.Combo.Input("device", options=["default", "cpu"], optional=True),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name: str, type: str, device: str = "default") -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        component = read_component(host.model_path("text_encoders", clip_name), "text_encoder")
        return io.NodeOutput(host.make_clip(component, rope="plain"))  # as core computes it


class VAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAELoader",
            display_name="Load VAE",
            category="loaders",
            inputs=[io.Combo.Input("vae_name", options=host.list_models("vae"))],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        component = read_component(host.model_path("vae", vae_name), "vae")
        return io.NodeOutput(host.make_vae(component, weight_dtype="default"))


def strength_input() -> io.Float.Input:
    return io.Float.Input("strength_model", default=1.0, min=-100.0, max=100.0, step=0.01)


def with_lora(model: host.Model, lora: Any, shapes: dict, strength: float) -> host.Model:
    """Return a model with every module of `lora` added at `strength`."""
    from ..ernie_core.weights.lora import module_strengths

    return host.apply_lora(model, lora, module_strengths(lora, strength, "", shapes))


class LoraLoaderModelOnly(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoaderModelOnly",
            display_name="Load LoRA (Model)",
            category="loaders",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("lora_name", options=host.list_loras()),
                strength_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: host.Model, lora_name: str, strength_model: float) -> io.NodeOutput:
        from ..ernie_core.weights.lora import read_lora

        shapes = host.lora_shapes(model)
        return io.NodeOutput(with_lora(model, read_lora(host.lora_path(lora_name), shapes), shapes, strength_model))


class LoraModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraModelLoader",
            display_name="Load LoRA Model",
            category="loaders",
            inputs=[
                io.Model.Input("model"),
                io.Custom("LORA_MODEL").Input("lora"),
                strength_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: host.Model, lora: dict, strength_model: float) -> io.NodeOutput:
        from ..ernie_core.weights.lora import parse_lora

        shapes = host.lora_shapes(model)
        return io.NodeOutput(with_lora(model, parse_lora(lora, shapes), shapes, strength_model))


# ---------------------------------------------------------------------------------------------------- conditioning


class CLIPTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPTextEncode",
            display_name="CLIP Text Encode (Prompt)",
            category="conditioning",
            inputs=[io.String.Input("text", multiline=True, dynamic_prompts=True), io.Clip.Input("clip")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str, clip: host.TextModel) -> io.NodeOutput:
        return io.NodeOutput(host.encode_prompt(clip, text))


class ConditioningZeroOut(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConditioningZeroOut",
            display_name="ConditioningZeroOut",
            category="advanced/conditioning",
            inputs=[io.Conditioning.Input("conditioning")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: list) -> io.NodeOutput:
        return io.NodeOutput([[text.new_zeros(text.shape), dict(extras)] for text, extras in conditioning])


# ---------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True, kw_only=True)
class RandomNoiseSource:
    """NOISE: drawn when the latent's shape is known."""

    seed: int

    def generate_noise(self, latent: dict) -> Tensor:
        return host.prepare_noise(latent, self.seed)


@dataclass(frozen=True, kw_only=True)
class ZeroNoiseSource:
    """NOISE: none."""

    seed: int = 0

    def generate_noise(self, latent: dict) -> Tensor:
        samples = latent["samples"]
        return samples.new_zeros(samples.shape)


@dataclass(frozen=True, kw_only=True)
class Guider:
    """GUIDER: a model with its prompts."""

    model: host.Model
    positive: list
    negative: list | None
    cfg: float


def seed_input(name: str) -> io.Int.Input:
    return io.Int.Input(name, default=0, min=0, max=MAX_SEED, control_after_generate=True)


def denoise_input() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01)


def cfg_input() -> io.Float.Input:
    return io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01)


class KSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSampler",
            display_name="KSampler",
            category="sampling",
            inputs=[
                io.Model.Input("model"),
                seed_input("seed"),
                io.Int.Input("steps", default=20, min=1, max=10000),
                cfg_input(),
                io.Combo.Input("sampler_name", options=list(SAMPLERS)),
                io.Combo.Input("scheduler", options=list(SCHEDULERS)),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                denoise_input(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def validate_inputs(cls, sampler_name: str | None, scheduler: str | None) -> bool | str:
        return check_choice(sampler_name, scheduler)

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
    ) -> io.NodeOutput:
        sigmas = core_sigmas(scheduler, steps, shift=model.shift, denoise=denoise)
        return io.NodeOutput(
            host.sample(
                model,
                positive=positive,
                negative=negative,
                latent=latent_image,
                sigmas=sigmas,
                cfg=cfg,
                seed=seed,
            )
        )


class KSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSamplerSelect",
            display_name="KSamplerSelect",
            category="sampling/custom_sampling/samplers",
            inputs=[io.Combo.Input("sampler_name", options=list(SAMPLERS))],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def validate_inputs(cls, sampler_name: str | None) -> bool | str:
        return check_choice(sampler_name)

    @classmethod
    def execute(cls, sampler_name: str) -> io.NodeOutput:
        from ..ernie_core.sampling.samplers import Sampler

        return io.NodeOutput(host.make_sampler(Sampler(name=sampler_name)))


class BasicScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BasicScheduler",
            display_name="BasicScheduler",
            category="sampling/custom_sampling/schedulers",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("scheduler", options=list(SCHEDULERS)),
                io.Int.Input("steps", default=20, min=1, max=10000),
                denoise_input(),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def validate_inputs(cls, scheduler: str | None) -> bool | str:
        return check_choice(scheduler=scheduler)

    @classmethod
    def execute(cls, model: host.Model, scheduler: str, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(core_sigmas(scheduler, steps, shift=model.shift, denoise=denoise))


class ModelSamplingSD3(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelSamplingSD3",
            display_name="ModelSamplingSD3",
            category="advanced/model",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input("shift", default=3.0, min=0.0, max=100.0, step=0.01),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: host.Model, shift: float) -> io.NodeOutput:
        return io.NodeOutput(host.set_shift(model, shift))


class RandomNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RandomNoise",
            display_name="RandomNoise",
            category="sampling/custom_sampling/noise",
            inputs=[seed_input("noise_seed")],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls, noise_seed: int) -> io.NodeOutput:
        return io.NodeOutput(RandomNoiseSource(seed=noise_seed))


class DisableNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DisableNoise",
            display_name="DisableNoise",
            category="sampling/custom_sampling/noise",
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(ZeroNoiseSource())


class CFGGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CFGGuider",
            display_name="CFGGuider",
            category="sampling/custom_sampling/guiders",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                cfg_input(),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model: host.Model, positive: list, negative: list, cfg: float) -> io.NodeOutput:
        return io.NodeOutput(Guider(model=model, positive=positive, negative=negative, cfg=cfg))


class BasicGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BasicGuider",
            display_name="BasicGuider",
            category="sampling/custom_sampling/guiders",
            inputs=[io.Model.Input("model"), io.Conditioning.Input("conditioning")],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model: host.Model, conditioning: list) -> io.NodeOutput:
        return io.NodeOutput(Guider(model=model, positive=conditioning, negative=None, cfg=1.0))


class SamplerCustomAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SamplerCustomAdvanced",
            display_name="SamplerCustomAdvanced",
            category="sampling/custom_sampling",
            inputs=[
                io.Noise.Input("noise"),
                io.Guider.Input("guider"),
                io.Sampler.Input("sampler"),
                io.Sigmas.Input("sigmas"),
                io.Latent.Input("latent_image"),
            ],
            outputs=[
                io.Latent.Output(display_name="output"),
                io.Latent.Output(display_name="denoised_output"),
            ],
        )

    @classmethod
    def execute(cls, noise, guider: Guider, sampler: Any, sigmas: Tensor, latent_image: dict) -> io.NodeOutput:
        samples, x0 = host.sample_from_noise(
            guider.model,
            positive=guider.positive,
            negative=guider.negative,
            latent=latent_image,
            sigmas=sigmas,
            cfg=guider.cfg,
            noise=noise.generate_noise(latent_image),
            sampler=sampler,
            seed=noise.seed,
        )
        return io.NodeOutput({**latent_image, "samples": samples}, {**latent_image, "samples": x0})


# ---------------------------------------------------------------------------------------------------- latents


def size_inputs() -> list[io.Int.Input]:
    return [io.Int.Input(side, default=1024, min=16, max=MAX_SIZE, step=16) for side in ("width", "height")]


class EmptyFlux2LatentImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EmptyFlux2LatentImage",
            display_name="Empty Flux 2 Latent",
            category="latent",
            inputs=[*size_inputs(), io.Int.Input("batch_size", default=1, min=1, max=4096)],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int = 1) -> io.NodeOutput:
        return io.NodeOutput(host.empty_latent(width // 16 * 16, height // 16 * 16, batch_size))  # core rounds down too


class SetLatentNoiseMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SetLatentNoiseMask",
            display_name="Set Latent Noise Mask",
            category="latent/inpaint",
            inputs=[io.Latent.Input("samples"), io.Mask.Input("mask")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: dict, mask: Tensor) -> io.NodeOutput:
        return io.NodeOutput({**samples, "noise_mask": mask.reshape((-1, 1, *mask.shape[-2:]))})


class SolidMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sides = [io.Int.Input(side, default=512, min=1, max=MAX_SIZE) for side in ("width", "height")]
        return io.Schema(
            node_id="SolidMask",
            display_name="SolidMask",
            category="mask",
            inputs=[io.Float.Input("value", default=1.0, min=0.0, max=1.0, step=0.01), *sides],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, value: float, width: int, height: int) -> io.NodeOutput:
        import torch

        return io.NodeOutput(torch.full((1, height, width), value))


class InvertMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InvertMask",
            display_name="InvertMask",
            category="mask",
            inputs=[io.Mask.Input("mask")],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, mask: Tensor) -> io.NodeOutput:
        return io.NodeOutput(1 - mask)


class MaskComposite(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskComposite",
            display_name="MaskComposite",
            category="mask",
            inputs=[
                io.Mask.Input("destination"),
                io.Mask.Input("source"),
                *[io.Int.Input(name, default=0, min=0, max=MAX_SIZE) for name in ("x", "y")],
                io.Combo.Input("operation", options=list(MASK_OPERATIONS)),
            ],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, destination: Tensor, source: Tensor, x: int, y: int, operation: str) -> io.NodeOutput:
        out = destination.reshape(-1, *destination.shape[-2:]).clone()
        source = source.reshape(-1, *source.shape[-2:])
        part = out[:, y : y + source.shape[1], x : x + source.shape[2]]
        part.copy_(MASK_OPERATIONS[operation](part, source[:, : part.shape[1], : part.shape[2]]).clamp(0, 1))
        return io.NodeOutput(out)


MASK_OPERATIONS = {
    "multiply": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "and": lambda a, b: (a.round().bool() & b.round().bool()).float(),
    "or": lambda a, b: (a.round().bool() | b.round().bool()).float(),
    "xor": lambda a, b: (a.round().bool() ^ b.round().bool()).float(),
}


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAEDecode",
            display_name="VAE Decode",
            category="latent",
            inputs=[io.Latent.Input("samples"), io.Vae.Input("vae")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict, vae: Any) -> io.NodeOutput:
        return io.NodeOutput(host.decode(vae, samples))


class VAEDecodeTiled(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAEDecodeTiled",
            display_name="VAE Decode (Tiled)",
            category="experimental",
            inputs=[
                io.Latent.Input("samples"),
                io.Vae.Input("vae"),
                io.Int.Input("tile_size", default=512, min=64, max=4096, step=32),
                io.Int.Input("overlap", default=64, min=0, max=4096, step=32),
                io.Int.Input("temporal_size", default=64, min=8, max=4096, step=4),
                io.Int.Input("temporal_overlap", default=8, min=4, max=4096, step=4),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, samples: dict, vae: Any, tile_size: int, overlap: int, temporal_size: int, temporal_overlap: int
    ) -> io.NodeOutput:
        overlap = min(overlap, tile_size // 4 // 16 * 16)  # core's rule, in whole latent cells
        return io.NodeOutput(host.decode_tiled(vae, samples, tile_px=tile_size, overlap_px=overlap))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAEEncode",
            display_name="VAE Encode",
            category="latent",
            inputs=[io.Image.Input("pixels"), io.Vae.Input("vae")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels: Tensor, vae: Any) -> io.NodeOutput:
        return io.NodeOutput(host.encode(vae, pixels))


# ---------------------------------------------------------------------------------------------------- pictures


class LoadImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = host.input_folder()
        files = (
            sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
        )
        return io.Schema(
            node_id="LoadImage",
            display_name="Load Image",
            category="image",
            inputs=[io.Combo.Input("image", options=files, upload=io.UploadType.image)],
            outputs=[io.Image.Output(), io.Mask.Output()],
        )

    @classmethod
    def validate_inputs(cls, image: str | None) -> bool | str:
        path = host.input_folder() / str(image)
        if image is None or path.is_file():
            return True
        return (
            f"image: a file in {host.input_folder()} expected, {image!r} is not there; "
            "put it there or name the folder with --input."
        )

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        import numpy as np
        import torch
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(host.input_folder() / image) as file:
                picture = ImageOps.exif_transpose(file)
                picture.load()
        except (OSError, UnidentifiedImageError) as e:
            raise ErnieError(f"a readable picture expected, {image!r} is none: {e}; save it again as PNG.") from e
        if picture.mode == "I":
            picture = picture.point(lambda v: v * (1 / 255))  # 16 bit grey
        has_alpha = "A" in picture.getbands() or "transparency" in picture.info
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]
        if not has_alpha:
            return io.NodeOutput(pixels, torch.zeros(1, 64, 64))
        alpha = torch.from_numpy(np.asarray(picture.convert("RGBA"))[..., 3].astype(np.float32) / 255)[None]
        return io.NodeOutput(pixels, 1 - alpha)


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveImage",
            display_name="Save Image",
            category="image",
            is_output_node=True,
            inputs=[io.Image.Input("images"), io.String.Input("filename_prefix", default="ComfyUI")],
        )

    @classmethod
    def execute(cls, images: Tensor, filename_prefix: str = "ComfyUI") -> io.NodeOutput:
        return io.NodeOutput(ui=ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls=cls))


class PreviewImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewImage",
            display_name="Preview Image",
            category="image",
            is_output_node=True,
            inputs=[io.Image.Input("images")],
        )

    @classmethod
    def execute(cls, images: Tensor) -> io.NodeOutput:
        return io.NodeOutput(ui=ui.PreviewImage(images, cls=cls))


class PreviewAny(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewAny",
            display_name="Preview as Text",
            category="utils",
            is_output_node=True,
            inputs=[io.AnyType.Input("source")],
        )

    @classmethod
    def execute(cls, source: Any = None) -> io.NodeOutput:
        if isinstance(source, dict | list):
            source = json.dumps(source, indent=4, default=str, ensure_ascii=False)
        return io.NodeOutput(ui=ui.PreviewText(str(source)))


class ImageBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImageBatch",
            display_name="Batch Images",
            category="image",
            inputs=[io.Image.Input("image1"), io.Image.Input("image2")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image1: Tensor, image2: Tensor) -> io.NodeOutput:
        import torch

        if image1.shape[1:3] != image2.shape[1:3]:
            image2 = resize(image2, height=image1.shape[1], width=image1.shape[2])
        return io.NodeOutput(torch.cat([image1, image2]))


def resize(image_BHWC: Tensor, *, height: int, width: int) -> Tensor:
    import torch

    image = image_BHWC.movedim(-1, 1)
    image = torch.nn.functional.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    return image.movedim(1, -1).clamp(0, 1)


STITCH_COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
}


class ImageStitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImageStitch",
            display_name="Image Stitch",
            category="image/transform",
            inputs=[
                io.Image.Input("image1"),
                io.Combo.Input("direction", options=["right", "down", "left", "up"], default="right"),
                io.Boolean.Input("match_image_size", default=True),
                io.Int.Input("spacing_width", default=0, min=0, max=1024, step=2),
                io.Combo.Input("spacing_color", options=list(STITCH_COLOURS), default="white"),
                io.Image.Input("image2", optional=True),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image1, direction, match_image_size, spacing_width, spacing_color, image2=None) -> io.NodeOutput:
        if image2 is None:
            return io.NodeOutput(image1)
        axis = 2 if direction in ("right", "left") else 1
        colour = STITCH_COLOURS[spacing_color]
        return io.NodeOutput(
            stitch(
                [image1, image2] if direction in ("right", "down") else [image2, image1],
                axis=axis,
                scale_to=image1 if match_image_size else None,
                spacing=spacing_width,
                colour=colour,
            )
        )


def stitch(
    images: list[Tensor],
    *,
    axis: int,
    scale_to: Tensor | None,
    spacing: int,
    colour: tuple[float, float, float],
) -> Tensor:
    """Pictures side by side along `axis` (1 = down, 2 = right), padded in black to one height (width)."""
    import torch

    other = 3 - axis
    if scale_to is not None:
        side = scale_to.shape[other]
        sizes = [{other: side, axis: max(1, round(i.shape[axis] * side / i.shape[other]))} for i in images]
        images = [
            i if i.shape[other] == side else resize(i, height=s[1], width=s[2])
            for i, s in zip(images, sizes, strict=True)
        ]
    side, batch = max(i.shape[other] for i in images), max(i.shape[0] for i in images)
    parts = []
    for image in images:
        shape = list(image.shape)
        shape[0], shape[other] = batch, side
        canvas = image.new_zeros(shape)
        start = (side - image.shape[other]) // 2
        image = torch.cat([image, image[-1:].expand(batch - image.shape[0], -1, -1, -1)])
        canvas.narrow(other, start, image.shape[other]).copy_(image)
        parts.append(canvas)
    if spacing:
        shape = list(parts[0].shape)
        shape[axis] = spacing
        parts.insert(1, parts[0].new_tensor(colour).expand(shape))
    return torch.cat(parts, dim=axis)


# ---------------------------------------------------------------------------------------------------- primitives


class PrimitiveString(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PrimitiveString",
            display_name="String",
            category="utils/primitive",
            inputs=[io.String.Input("value")],
            outputs=[io.String.Output()],
        )

    @classmethod
    def execute(cls, value: str) -> io.NodeOutput:
        return io.NodeOutput(value)


class PrimitiveStringMultiline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PrimitiveStringMultiline",
            display_name="String (Multiline)",
            category="utils/primitive",
            inputs=[io.String.Input("value", multiline=True)],
            outputs=[io.String.Output()],
        )

    @classmethod
    def execute(cls, value: str) -> io.NodeOutput:
        return io.NodeOutput(value)


class PrimitiveInt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PrimitiveInt",
            display_name="Int",
            category="utils/primitive",
            inputs=[io.Int.Input("value", control_after_generate=True)],
            outputs=[io.Int.Output()],
        )

    @classmethod
    def execute(cls, value: int) -> io.NodeOutput:
        return io.NodeOutput(value)


class PrimitiveFloat(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PrimitiveFloat",
            display_name="Float",
            category="utils/primitive",
            inputs=[io.Float.Input("value")],
            outputs=[io.Float.Output()],
        )

    @classmethod
    def execute(cls, value: float) -> io.NodeOutput:
        return io.NodeOutput(value)


class PrimitiveBoolean(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PrimitiveBoolean",
            display_name="Boolean",
            category="utils/primitive",
            inputs=[io.Boolean.Input("value")],
            outputs=[io.Boolean.Output()],
        )

    @classmethod
    def execute(cls, value: bool) -> io.NodeOutput:
        return io.NodeOutput(value)


NODES: tuple[type[io.ComfyNode], ...] = (
    UNETLoader,
    CLIPLoader,
    VAELoader,
    LoraLoaderModelOnly,
    LoraModelLoader,
    CLIPTextEncode,
    ConditioningZeroOut,
    KSampler,
    KSamplerSelect,
    BasicScheduler,
    ModelSamplingSD3,
    RandomNoise,
    DisableNoise,
    CFGGuider,
    BasicGuider,
    SamplerCustomAdvanced,
    EmptyFlux2LatentImage,
    SetLatentNoiseMask,
    SolidMask,
    InvertMask,
    MaskComposite,
    VAEDecode,
    VAEDecodeTiled,
    VAEEncode,
    LoadImage,
    SaveImage,
    PreviewImage,
    PreviewAny,
    ImageBatch,
    ImageStitch,
    PrimitiveString,
    PrimitiveStringMultiline,
    PrimitiveInt,
    PrimitiveFloat,
    PrimitiveBoolean,
)
