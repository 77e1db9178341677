"""A custom node pack for tests: loads the pack's miniature files into ComfyUI's own ERNIE-Image classes.

Core's loaders know the released sizes only, so its classes are built here at the sizes that stand in the files'
metadata. A running ComfyUI imports this file from its custom_nodes folder; nothing of the pack under test is in it.
"""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from unittest.mock import patch

import torch


def read(folder, name):
    """(config, tensors) of a single file in one of ComfyUI's model folders."""
    import comfy.utils
    import folder_paths

    path = folder_paths.get_full_path_or_raise(folder, name)
    tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    return json.loads(metadata["config"]), tensors


class CoreModel:
    """MODEL around core's transformer, in fp32."""

    INPUT_TYPES = classmethod(lambda _: {"required": {"file": ("STRING", {})}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "test"

    def load(self, file):
        import comfy.model_management as mm
        import comfy.model_patcher
        import comfy.supported_models

        config, tensors = read("diffusion_models", file)
        description = comfy.supported_models.ErnieImage({"image_model": "ernie", **config})
        description.set_inference_dtype(torch.float32, None)
        model = description.get_model({}, "")
        model.diffusion_model.load_state_dict({name: t.float() for name, t in tensors.items()})
        device, offload = mm.get_torch_device(), mm.unet_offload_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload),)


class CoreClip:
    """CLIP that core's CLIPLoader makes, but for the sizes."""

    INPUT_TYPES = classmethod(lambda _: {"required": {"file": ("STRING", {})}})
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "test"

    def load(self, file):
        import comfy.sd
        import comfy.text_encoders.llama as llama

        given, tensors = read("text_encoders", file)
        released = llama.Ministral3_3BConfig
        sizes = {f.name: given[f.name] for f in dataclasses.fields(released) if f.name in given}

        class Miniature(released):
            head_dim = given["head_dim"]  # not a field of the dataclass

        with (
            patch.object(llama, "Ministral3_3BConfig", Miniature),
            patch.object(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.MINISTRAL_3_3B),
        ):
            options = {"ministral3_3b_model_config": sizes}
            return (comfy.sd.load_text_encoder_state_dicts([tensors], model_options=options),)


class Ratio(Fraction):
    """A factor between two widths; a width times it is a width."""

    def __rmul__(self, width):
        return int(Fraction(self) * width)


class CoreVae:
    """VAE around core's autoencoder, in fp32."""

    INPUT_TYPES = classmethod(lambda _: {"required": {"file": ("STRING", {})}})
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "test"

    def load(self, file):
        import comfy.ldm.modules.diffusionmodules.model as layers
        import comfy.sd

        config, tensors = read("vae", file)
        # Core renames these two, and sets the sizes below, only where it derives the configuration itself.
        inner = ("encoder.quant_conv.", "decoder.post_quant_conv.")
        tensors = {n.split(".", 1)[1] if n.startswith(inner) else n: t.float() for n, t in tensors.items()}

        def settings(widths):
            return {
                "double_z": True,
                "z_channels": config["latent_channels"],
                "resolution": 256,
                "in_channels": config["in_channels"],
                "out_ch": config["out_channels"],
                "ch": widths[0],
                "ch_mult": [Ratio(width, widths[0]) for width in widths],
                "num_res_blocks": config["layers_per_block"],
                "attn_resolutions": [],
                "batch_norm_latent": True,
            }

        encoder = config["block_out_channels"]
        params = {
            "ddconfig": settings(encoder),
            "decoder_ddconfig": settings(config.get("decoder_block_out_channels") or encoder),
            "embed_dim": config["latent_channels"],
        }
        with patch.object(layers.Normalize, "__defaults__", (config["norm_num_groups"],)):
            vae = comfy.sd.VAE(sd=tensors, config={"params": params}, dtype=torch.float32)
        missing = vae.first_stage_model.state_dict().keys() - tensors.keys()
        assert not missing, missing  # core only warns
        vae.latent_channels = 4 * config["latent_channels"]
        vae.downscale_ratio = vae.upscale_ratio = 16
        return (vae,)


class ConditioningNumbers:
    """The features of a CONDITIONING as a LATENT, which SaveLatent writes as it is."""

    INPUT_TYPES = classmethod(lambda _: {"required": {"conditioning": ("CONDITIONING",)}})
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "read"
    CATEGORY = "test"

    def read(self, conditioning):
        ((features, _),) = conditioning
        return ({"samples": features.float()},)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (CoreModel, CoreClip, CoreVae, ConditioningNumbers)}
