"""VAE: ours under the host's memory manager."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...ernie_core.errors import ErnieError
from ...ernie_core.model.vae import VAE
from ...ernie_core.sampling.inputs import LATENT_CHANNELS
from .models import DTYPES, patcher_class


class HostVAE(VAE):
    """Our VAE with the host's calling convention for `VAE.first_stage_model`."""

    def decode(self, latent_BCHW: Tensor, **options) -> Tensor:
        return super().decode(latent_BCHW)

    def encode(self, image_BCHW: Tensor, **options) -> Tensor:
        return super().encode(image_BCHW)


def make_vae(component, *, weight_dtype: str = "default"):
    """A VAE around our FLUX.2 VAE: VAEDecode, VAEEncode and their tiled kin work with it."""
    return _load_vae(component, weight_dtype)


def reload_vae(path: Path, weight_dtype: str, disable_dynamic: bool = False):
    from ...ernie_core.weights.checkpoint import read_component

    return _load_vae(read_component(path, "vae"), weight_dtype, disable_dynamic=disable_dynamic).patcher


def _load_vae(component, weight_dtype: str, disable_dynamic: bool = False):
    import comfy.model_management as mm
    import comfy.ops
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from ...ernie_core.weights.checkpoint import build_vae

    # The host's VAE object is built around the smallest autoencoder it knows, which ours then replaces: its constructor
    # recognises FLUX.2 at fixed widths only.
    dd = {"double_z": True, "z_channels": 1, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1]}
    params = {"ddconfig": {**dd, "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}, "embed_dim": 1}
    stand_in = AutoencoderKL(**params).state_dict()
    vae = comfy.sd.VAE(sd=stand_in, config={"params": params}, dtype=DTYPES.get(weight_dtype))
    model = build_vae(component, ops=comfy.ops.disable_weight_init, dtype=vae.vae_dtype, device="cpu")
    model.__class__ = HostVAE
    model.eval().requires_grad_(False)
    for weight in model.parameters():  # with dynamic VRAM the host's Linear keeps the file's type; buffers stay fp32
        weight.data = weight.data.to(vae.vae_dtype)
    mm.archive_model_dtypes(model)
    vae.first_stage_model = model
    vae.patcher = patcher_class(disable_dynamic)(model, load_device=vae.device, offload_device=mm.vae_offload_device())
    vae.latent_channels = LATENT_CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = 16
    vae.memory_used_decode = lambda shape, dtype: shape[0] * model.decode_bytes(shape[2], shape[3], dtype)
    vae.memory_used_encode = lambda shape, dtype: shape[0] * model.decode_bytes(shape[2] // 16, shape[3] // 16, dtype)
    vae.size = mm.module_size(model)
    vae.patcher.cached_patcher_init = (reload_vae, (component.source, weight_dtype))
    return vae


def decode(vae, latent: dict[str, Tensor]) -> Tensor:
    """IMAGE [B, H, W, 3] in [0, 1]."""
    if vae is None:
        raise ErnieError("the VAE is empty: connect Load VAE (ERNIE) or a VAELoader.")
    images = vae.decode(latent["samples"])
    return images.reshape(-1, *images.shape[-3:])
