"""Trains the VAE of ernie-image-tiny: the first stage, since nothing that it loses can be learnt later.

Trained on small crops of 128 px scenes (the network is convolutional), which show many more colours for the same
work, then on larger ones, and a short while on whole pictures. There is
no KL term: a KL strong enough to matter silences most of the 128 channels, and normalisation would then blow their
residue up to unit variance for the DiT to model. Instead noise of a fixed size is added to the mean, which makes
the decoder forgive small errors, and a small penalty on the mean's square keeps that noise meaningful.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..ernie_core.config import VAEConfig
from ..ernie_core.model.vae import VAE, Downsample, ResnetBlock, SpatialAttention, Upsample
from ..ernie_core.sampling.latents import patchify
from . import scenes
from .muon import Muon

logger = logging.getLogger(__name__)

CONFIG = VAEConfig(block_out_channels=(24, 32, 64, 64), layers_per_block=1, norm_num_groups=4)
LATENT_NOISE = 0.2
MEAN_PENALTY = 3e-4
PICTURE_PX = 128


def draw_pictures(
    pool: list[scenes.Scene], count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` random pictures [128, 128, 3] uint8, each with the (row, column) of its object's centre."""
    shown = [pool[i] for i in rng.integers(len(pool), size=count)]
    return [
        (scenes.draw(scene, rng, PICTURE_PX), np.array(scenes.PLACES[scene.place])[::-1] * PICTURE_PX)
        for scene in shown
    ]


def crop_batch(
    pictures: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator, count: int, crop_px: int
) -> Tensor:
    """Crops [count, 3, crop_px, crop_px] in [-1, 1] of random pictures; three of four touch the object."""
    room = PICTURE_PX - crop_px
    crops = []
    for index in rng.integers(len(pictures), size=count):
        picture, centre = pictures[index]
        corner = rng.integers(0, room + 1, size=2)
        if rng.random() < 0.75:
            corner = np.clip(centre - crop_px / 2 + rng.integers(-20, 21, size=2), 0, room).astype(int)
        crops.append(picture[corner[0] : corner[0] + crop_px, corner[1] : corner[1] + crop_px])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


def initialise(vae: VAE) -> None:
    """Start from a network that only subsamples and enlarges: silent residual branches, identity resampling.

    Colours then reach the output from the first step on, and training spends itself on edges. The large biases are
    for group norm: its statistics mix object and background and divide a flat colour's strength away, unless
    something constant outweighs both.
    """
    for first in (vae.encoder.conv_in, vae.decoder.conv_in):
        first.weight.data.mul_(2)
        first.bias.data.copy_(3 * torch.randn_like(first.bias).sign())
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, SpatialAttention):
            nn.init.zeros_(module.to_out[0].weight)
        elif isinstance(module, Downsample | Upsample):
            nn.init.dirac_(module.conv.weight)
            nn.init.zeros_(module.conv.bias)


STAGES = ((600, 32, 32), (400, 64, 8), (200, PICTURE_PX, 2))
"""(steps, crop in pixels, crops per step): the same work per step."""


def train_vae(*, seed: int, device: torch.device, checkpoint: Path, lr: float = 1e-2) -> VAE:
    """The trained VAE (fp32, eval), with `bn` statistics of its latents; also saved to `checkpoint`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pool, _ = scenes.split()
    pictures = draw_pictures(pool, 3000, rng)
    vae = VAE(CONFIG)
    initialise(vae)
    vae.to(device, memory_format=torch.channels_last)
    ends = {vae.encoder.conv_in.weight, vae.decoder.conv_out.weight}
    inner = [w for w in vae.parameters() if w.ndim > 1 and w not in ends]
    outer = [w for w in vae.parameters() if w.ndim <= 1 or w in ends]
    optimizers = ((Muon(inner, lr=lr), lr), (torch.optim.AdamW(outer, betas=(0.9, 0.99), weight_decay=0), 0.4 * lr))
    plan = [(crop_px, count) for steps, crop_px, count in STAGES for _ in range(steps)]
    total = len(plan)
    start = time.monotonic()
    for step, (crop_px, count) in enumerate(plan):
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 20) * (1 - step / total)
        images = crop_batch(pictures, rng, count, crop_px).to(device)
        mean, _ = vae.posterior(images)
        z = mean + LATENT_NOISE * torch.randn_like(mean)
        out = vae.decoder(vae.post_quant_conv(z))
        loss = F.l1_loss(out, images) + F.mse_loss(out, images) + MEAN_PENALTY * mean.square().mean()
        vae.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
        if step % 50 == 0 or step == total - 1:
            pace = (time.monotonic() - start) / (step + 1)
            logger.info(
                "vae step %d/%d  loss %.4f  mse %.5f  mean std %.2f  %.2f s/step",
                step,
                total,
                loss.item(),
                F.mse_loss(out, images).item(),
                mean.std().item(),
                pace,
            )
        if step % 500 == 499 or step == total - 1:
            save(vae, checkpoint)
    return finish_vae(vae, pictures, seed, checkpoint)


def save(vae: VAE, checkpoint: Path) -> None:
    """Write the weights; channels_last tensors are made contiguous first, as safetensors wants them."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, checkpoint)


@torch.no_grad()
def finish_vae(vae: VAE, pictures: list[tuple[np.ndarray, np.ndarray]], seed: int, checkpoint: Path) -> VAE:
    """Measure `bn` over 512 whole pictures and save."""
    rng = np.random.default_rng([seed, 1])
    device = vae.quant_conv.weight.device
    packed = torch.cat(
        [patchify(vae.posterior(crop_batch(pictures, rng, 32, PICTURE_PX).to(device))[0]) for _ in range(16)]
    )
    vae.bn.running_mean.copy_(packed.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(packed.var(dim=(0, 2, 3)))
    save(vae, checkpoint)
    return vae.eval()
