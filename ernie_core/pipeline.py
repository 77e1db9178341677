"""Prompt to picture without a host: text encoder, DiT, VAE and, where present, the prompt enhancer, on one device.

The numbers are those of diffusers' ErnieImagePipeline (0.42.1); the deliberate differences are in precision only: the
latent stays fp32 between steps, and the two guidance branches run at their true text lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import BASE, check_size
from .errors import ErnieError
from .model.attention import AttentionFunction, attention
from .model.dit import DiT, RunBlock, call_block
from .model.enhancer import Enhancer
from .model.rope import RopeTable
from .model.text_encoder import TextEncoder, Tokenizer
from .model.vae import VAE
from .sampling.guidance import Denoise, with_cfg
from .sampling.latents import latent_size, make_noise, mix_noise, step_noise
from .sampling.nag import Nag, nag_inputs
from .sampling.regions import RegionPlan, Regions, check_alone
from .sampling.samplers import OnStep, Sampler
from .sampling.schedule import NUM_TRAIN_TIMESTEPS, make_sigmas


def make_denoise(
    transformer: DiT,
    texts: Sequence[Tensor],
    height_lat: int,
    width_lat: int,
    *,
    run_block: RunBlock = call_block,
    nag: Nag | None = None,
    regions: Regions | None = None,
) -> Denoise:
    """denoise(x, sigma) conditioned on `texts` (one [T_i, D] per picture), the RoPE table computed once for the run.

    `run_block`: as in `DiT.forward`. `nag`: a negative prompt in the attention, for texts of one length. `regions`:
    each of `texts` is several, one behind the other, for these regions of the picture.

    Raises:
        ErnieError: `nag` with texts of different lengths or with regions; texts of `regions` not as long as `texts`.
    """
    weight = transformer.text_proj.weight if transformer.text_proj is not None else transformer.final_linear.weight
    device, dtype = weight.device, weight.dtype
    text_lengths = [len(t) for t in texts]
    text_BTD = torch.nn.utils.rnn.pad_sequence([t.to(device, dtype) for t in texts], batch_first=True)

    def rope_for(*lengths: int) -> RopeTable:
        return transformer.rope(height_lat, width_lat, lengths, device=device, dtype=dtype)

    attend: AttentionFunction = attention
    if regions is None:
        rope = rope_for(*text_lengths)
    else:
        check_alone(nag is not None and not nag.is_neutral)
        plan = RegionPlan(regions, height_lat, width_lat, text_length=text_BTD.shape[1], device=device)
        c = transformer.config
        rope = plan.rope(axes_dim=c.rope_axes_dim, theta=c.rope_theta, device=device, dtype=dtype)
        text_BTD, attend = text_BTD[:, plan.text_index], plan.through()
        text_lengths = [text_BTD.shape[1]] * len(texts)
    under_nag: dict[str, Any] = {}
    if nag is not None and not nag.is_neutral:
        if len(set(text_lengths)) > 1:
            raise ErnieError("a negative prompt in the attention needs prompts of one length in a batch; make fewer.")
        tokens = (height_lat // transformer.config.patch_size) * (width_lat // transformer.config.patch_size)
        under_nag = nag_inputs(nag, text_BTD, tokens, rope_for, attention)

    @torch.no_grad()
    def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
        timesteps = torch.full((len(texts),), NUM_TRAIN_TIMESTEPS * sigma, dtype=torch.float32, device=device)
        x_BCHW = x_BCHW.to(device, dtype)
        if under_nag and nag is not None and nag.acts_at(sigma):
            return transformer(x_BCHW, timesteps, run_block=run_block, **under_nag)
        return transformer(
            x_BCHW, timesteps, text_BTD, text_lengths=text_lengths, rope=rope, attend=attend, run_block=run_block
        )

    return denoise


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The released networks, loaded."""

    transformer: DiT
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    vae: VAE
    enhancer: Enhancer | None = None

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        enhancer: bool = True,
    ) -> Pipeline:
        """Load an official folder (the one with model_index.json); `enhancer` False leaves `pe/` on disk."""
        from .weights import checkpoint as ckpt
        from .weights.layouts import Kind

        def read(kind: Kind) -> ckpt.Component:
            return ckpt.read_component(Path(path), kind)

        text_encoder, tokenizer = ckpt.build_text_encoder(read("text_encoder"), dtype=dtype, device=device)
        return cls(
            transformer=ckpt.build_transformer(read("transformer"), dtype=dtype, device=device).eval(),
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            vae=ckpt.build_vae(read("vae"), dtype=dtype, device=device).eval(),
            enhancer=ckpt.build_enhancer(read("enhancer"), dtype=dtype, device=device).eval() if enhancer else None,
        )

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text features [T_i, D] of each prompt at its true length."""
        return self.text_encoder.encode_ids([self.tokenizer.encode(p) for p in prompts])

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negatives: Sequence[str] | None = None,
        width: int = 1024,
        height: int = 1024,
        steps: int = BASE.steps,
        cfg: float = BASE.cfg,
        shift: float = BASE.shift,
        image_BHWC: Tensor | None = None,
        denoise: float = 1.0,
        sampler: Sampler | str = "euler",
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Pictures [B, height, width, 3] in [0, 1], fp32 on the CPU; picture i depends on prompts[i], seeds[i] alone.

        Args:
            prompts: one per picture.
            seeds: one per picture.
            negatives: one per picture; None = empty. Read only when cfg is above 1.
            width, height: in pixels, multiples of 16.
            steps, cfg, shift: 50, 4, 4 for the base checkpoint and 8, 1, 4 for Turbo.
            image_BHWC: pictures to start from, in [0, 1] and of the given size; needs denoise below 1.
            denoise: 1 = from noise; lower keeps more of `image_BHWC`.
            sampler: a name of config.SAMPLERS, or a `Sampler` with its share of new noise.
            on_step: see samplers.OnStep.

        Raises:
            ErnieError: counts that do not match, sizes that are not multiples of 16, values out of range.
        """
        check_size(width, height)
        sampler = Sampler(name=sampler) if isinstance(sampler, str) else sampler
        negatives = [""] * len(prompts) if negatives is None else negatives
        if not len(prompts) == len(seeds) == len(negatives):
            raise ErnieError(
                "prompts, seeds and negatives must be as many as pictures, "
                f"got {len(prompts)}, {len(seeds)} and {len(negatives)}."
            )
        if image_BHWC is None and denoise < 1:
            raise ErnieError(f"denoise {denoise:g} needs a picture to start from; give image_BHWC or use denoise 1.")
        rows, columns = latent_size(width, height)
        weight = self.vae.quant_conv.weight
        sigmas = make_sigmas(steps, shift=shift, denoise=denoise)
        x = make_noise(seeds, self.transformer.config.in_channels, rows, columns).to(weight.device)
        if image_BHWC is not None:
            if image_BHWC.shape[1:3] != (height, width):
                raise ErnieError(
                    f"image_BHWC must be {width} x {height}, got {image_BHWC.shape[2]} x {image_BHWC.shape[1]}."
                )
            x0 = self.vae.encode(image_BHWC.permute(0, 3, 1, 2).to(weight) * 2 - 1).float()
            x = mix_noise(x0, x, float(sigmas[0])) if len(sigmas) else x0
        cond = make_denoise(self.transformer, self.encode(prompts), rows, columns)
        uncond = make_denoise(self.transformer, self.encode(negatives), rows, columns) if cfg > 1 else None
        if len(sigmas):
            draw_noise = step_noise([(seed, 0) for seed in seeds])
            x = sampler(with_cfg(cond, uncond, cfg), x, sigmas, draw_noise=draw_noise, on_step=on_step)
        pictures = self.vae.decode_fitting(x.to(weight.dtype)).float()
        return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu()
