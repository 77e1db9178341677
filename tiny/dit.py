"""Trains the DiT of ernie-image-tiny together with its text encoder, on latents of the finished VAE.

Rectified-flow velocity matching, as the released model: x = (1 - sigma) x0 + sigma noise, target noise - x0, MSE.
Sigmas are stratified logit-normal, shifted towards noise like the sampler's grid. One caption in ten is dropped to the
empty prompt, so that classifier-free guidance has its second branch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..ernie_core.config import DiTConfig
from ..ernie_core.model.dit import DiT
from ..ernie_core.model.text_encoder import TextEncoder, Tokenizer
from ..ernie_core.model.vae import VAE
from ..ernie_core.sampling.latents import mix_noise
from ..ernie_core.sampling.schedule import shift_sigmas
from ..ernie_core.weights.layouts import RELEASED_ROPE
from . import scenes
from .muon import Muon
from .vae import PICTURE_PX

logger = logging.getLogger(__name__)

TEXT_DIM = 96
CONFIG = DiTConfig(
    hidden_size=192,
    num_attention_heads=3,
    num_layers=7,
    ffn_hidden_size=512,
    text_in_dim=TEXT_DIM,
    rope_axes_dim=(16, 24, 24),
)
DROP_CAPTION = 0.1
TRAIN_SHIFT = 2.5
LONG_SHARE = 0.2
# What goes in and what comes out, and the table of words, are not maps between hidden states: AdamW.
_NOT_MATRICES = ("embed_tokens.weight", "x_embedder.proj.weight", "final_linear.weight")


def language_config(*, model_type: str, vocab_size: int, hidden_size: int, heads: int, layers: int) -> dict:
    """config.json of a small Ministral-3 language model: grouped-query attention, YaRN, tied embedding."""
    return {
        "architectures": ["Ministral3ForCausalLM"] if model_type == "ministral3" else None,
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "rope_parameters": RELEASED_ROPE,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
        "use_cache": True,
    }


@torch.no_grad()
def encode_pictures(vae: VAE, count: int, seed: int) -> tuple[Tensor, list[scenes.Scene]]:
    """Normalised latents [count, 128, 8, 8] (CPU fp32) of random training scenes, and the scenes."""
    device = vae.quant_conv.weight.device
    rng = np.random.default_rng([seed, 2])
    pool, _ = scenes.split()
    shown = [pool[i] for i in rng.integers(len(pool), size=count)]
    parts = []
    for start in range(0, count, 32):
        pictures = np.stack([scenes.draw(s, rng, PICTURE_PX) for s in shown[start : start + 32]])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
        parts.append(vae.encode(images).cpu())
    return torch.cat(parts), shown


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """`count` stratified sigmas in (0, 1): one from each of `count` equal slices of the distribution."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-4, 1 - 1e-4) - 1)
    return shift_sigmas(normal.sigmoid(), TRAIN_SHIFT)


def training_text(scene: scenes.Scene, rng: np.random.Generator, *, long: bool) -> str:
    if rng.random() < DROP_CAPTION:
        return ""
    if long:
        return scenes.long_description(scenes.named_facts(scene), rng)
    return scenes.canonical_caption(scene) if rng.random() < 0.35 else scenes.caption(scene, rng)


def pad_ids(batch: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, batch))
    return torch.tensor([[*ids, *[11] * (longest - len(ids))] for ids in batch], device=device)


class TextToVelocity(nn.Module):
    """Text encoder and DiT as one trainable module."""

    def __init__(self, text_config: dict):
        super().__init__()
        self.text_encoder = TextEncoder(text_config)
        self.transformer = DiT(CONFIG)
        for name, weight in self.transformer.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "adaLN" in name or "final" in name else weight.shape[1] ** -0.5)
        # Modulation starts at identity with open gates half shut; the output starts at zero.
        nn.init.zeros_(self.transformer.final_linear.weight)
        nn.init.zeros_(self.transformer.final_linear.bias)

    def forward(self, x: Tensor, sigmas_B: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        text = self.text_encoder.encode_padded(pad_ids(ids, x.device))
        return self.transformer(x, 1000 * sigmas_B, text, text_lengths=[len(i) for i in ids])


def train_dit(
    latents: Tensor,
    shown: Sequence[scenes.Scene],
    tokenizer: Tokenizer,
    text_config: dict,
    *,
    steps: int,
    lr: float,
    seed: int,
    device: torch.device,
    checkpoint: Path,
    initial: dict[str, Tensor] | None = None,
    batch: int = 32,
) -> TextToVelocity:
    """The trained text encoder and DiT (exponential moving average, fp32, eval); saved to `checkpoint` on the way.

    Args:
        latents, shown: from `encode_pictures`.
        lr: peak; it falls to 0 at the end.
        initial: weights to start from; None = from scratch.
        batch: pictures per step, half as many when their captions are long.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = TextToVelocity(text_config).to(device).train()
    if initial is not None:
        model.load_state_dict(initial)
    average = TextToVelocity(text_config).to(device).eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    named = dict(model.named_parameters())
    matrices = {name for name, w in named.items() if w.ndim > 1 and not name.endswith(_NOT_MATRICES)}
    optimizers = (
        (Muon([w for name, w in named.items() if name in matrices], lr=lr, weight_decay=0.01), lr),
        (torch.optim.AdamW([w for name, w in named.items() if name not in matrices], betas=(0.9, 0.98)), 0.5 * lr),
    )
    weights = list(model.parameters())
    start, smooth = time.monotonic(), None
    for step in range(steps):
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 100, 1.3 * (1 - step / steps))
        step_rng = np.random.default_rng([seed, 3, step])
        generator.manual_seed(seed * 1_000_003 + step)
        long = step_rng.random() < LONG_SHARE
        chosen = step_rng.integers(len(shown), size=batch // 2 if long else batch)
        ids = [tokenizer.encode(training_text(shown[i], step_rng, long=long)) for i in chosen]
        x0 = latents[torch.from_numpy(chosen)]
        noise = torch.randn(x0.shape, generator=generator)
        sigmas = draw_sigmas(len(chosen), generator)
        x = mix_noise(x0, noise, sigmas[:, None, None, None]).to(device)
        velocity = model(x, sigmas.to(device), ids)
        loss = F.mse_loss(velocity, (noise - x0).to(device))
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
        decay = min(0.999, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), weights, 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            pace = (time.monotonic() - start) / (step + 1)
            logger.info("dit step %d/%d  loss %.4f  %.2f s/step", step, steps, smooth, pace)
        if step % 500 == 499 or step == steps - 1:
            save_file(average.state_dict(), checkpoint)
    return average
