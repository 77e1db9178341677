"""The ERNIE-Image diffusion transformer: 8B single-stream DiT with one shared adaLN.

Source: ErnieImageTransformer2DModel (diffusers 0.42.1, transformer_ernie_image.py) and transformer/config.json of
baidu/ERNIE-Image. Names inside modules are the checkpoint's. Conventions that are easily got wrong: image tokens come
first, then text; the image's position on axis 0 is the text length; sin before cos in the timestep embedding; block
modulation is (shift, scale, gate) but the final norm is (scale, shift) with no SiLU; GELU (erf) sits on gate_proj.

Shape letters: B batch · C channels · H, W latent grid · L image tokens = H·W · T text tokens · S = L + T · D width ·
N heads · K head dim. The residual stream exceeds fp16's range: run in bf16 or fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import DiTConfig
from ..errors import ErnieError
from .attention import AttentionFunction, attention
from .rope import RopeTable, apply_rope, rope_table

# per step and shared by all blocks, each [B, 1, D]: shift, 1 + scale, gate of attention; the same of the MLP
Modulation = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def timestep_embedding(timesteps_B: Tensor, dim: int) -> Tensor:
    """Sinusoid [B, dim] in fp32, sines first, frequencies exp(-ln(10000) k / (dim/2)); timesteps count to 1000."""
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=timesteps_B.device)
    # Multiplied before divided, as the reference does: fp32 rounds the other order differently.
    phase = timesteps_B.float()[:, None] * torch.exp(-math.log(10000) * k / half)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig, ops: Any, **factory: Any):
        super().__init__()
        p = config.patch_size
        self.proj = ops.Conv2d(config.in_channels, config.hidden_size, kernel_size=p, stride=p, **factory)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return rearrange(self.proj(x_BCHW), "b d h w -> b (h w) d")


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int, ops: Any, **factory: Any):
        super().__init__()
        self.linear_1 = ops.Linear(dim, dim, **factory)
        self.linear_2 = ops.Linear(dim, dim, **factory)

    def forward(self, sinusoid_BD: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid_BD)))


class SelfAttention(nn.Module):
    def __init__(self, config: DiTConfig, ops: Any, **factory: Any):
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.to_q = ops.Linear(dim, dim, bias=False, **factory)
        self.to_k = ops.Linear(dim, dim, bias=False, **factory)
        self.to_v = ops.Linear(dim, dim, bias=False, **factory)
        self.norm_q = ops.RMSNorm(config.head_dim, eps=config.eps, **factory)
        self.norm_k = ops.RMSNorm(config.head_dim, eps=config.eps, **factory)
        self.to_out = nn.ModuleList([ops.Linear(dim, dim, bias=False, **factory)])

    def forward(
        self, x_BSD: Tensor, rope: RopeTable, lengths: Sequence[int] | None, attend: AttentionFunction
    ) -> Tensor:
        q, k, v = (proj(x_BSD).unflatten(-1, (self.heads, -1)) for proj in (self.to_q, self.to_k, self.to_v))
        q, k = apply_rope(self.norm_q(q), rope), apply_rope(self.norm_k(k), rope)
        return self.to_out[0](attend(q, k, v, lengths).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: DiTConfig, ops: Any, **factory: Any):
        super().__init__()
        self.gate_proj = ops.Linear(config.hidden_size, config.ffn_hidden_size, bias=False, **factory)
        self.up_proj = ops.Linear(config.hidden_size, config.ffn_hidden_size, bias=False, **factory)
        self.linear_fc2 = ops.Linear(config.ffn_hidden_size, config.hidden_size, bias=False, **factory)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class Block(nn.Module):
    """x + gate·Attention(norm(x)·(1+scale) + shift), then the same with the MLP; modulation is shared by all blocks."""

    def __init__(self, config: DiTConfig, ops: Any, **factory: Any):
        super().__init__()
        self.adaLN_sa_ln = ops.RMSNorm(config.hidden_size, eps=config.eps, **factory)
        self.self_attention = SelfAttention(config, ops, **factory)
        self.adaLN_mlp_ln = ops.RMSNorm(config.hidden_size, eps=config.eps, **factory)
        self.mlp = FeedForward(config, ops, **factory)

    def forward(
        self,
        x_BSD: Tensor,
        modulation: Modulation,
        rope: RopeTable,
        lengths: Sequence[int] | None = None,
        attend: AttentionFunction = attention,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        n = torch.addcmul(shift_a, self.adaLN_sa_ln(x_BSD), scale_a)
        x_BSD = torch.addcmul(x_BSD, gate_a, self.self_attention(n, rope, lengths, attend))
        n = torch.addcmul(shift_m, self.adaLN_mlp_ln(x_BSD), scale_m)
        return torch.addcmul(x_BSD, gate_m, self.mlp(n))


# run_block(index, block, x_BSD, modulation, rope, lengths, attend) -> x_BSD
RunBlock = Callable[[int, Any, Tensor, Modulation, RopeTable, Sequence[int] | None, AttentionFunction], Tensor]


def call_block(_index: int, block: Block, *inputs: Any) -> Tensor:
    """The `run_block` of inference: the block itself."""
    return block(*inputs)


class FinalNorm(nn.Module):
    def __init__(self, config: DiTConfig, ops: Any, **factory: Any):
        super().__init__()
        self.norm = ops.LayerNorm(config.hidden_size, eps=config.eps, elementwise_affine=False, **factory)
        self.linear = ops.Linear(config.hidden_size, 2 * config.hidden_size, **factory)

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        scale, shift = self.linear(c_BD)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x_BLD), 1 + scale)


class DiT(nn.Module):
    """Velocity (noise - x0) of a noisy latent; see `forward`.

    `ops` supplies Linear, Conv2d, RMSNorm and LayerNorm classes: torch.nn, or a host's own, so that casting, offloading
    and LoRA patching are the host's. Weights are created in `dtype` on `device` ("meta" builds without memory).
    """

    active_loras: tuple[bool, ...] = ()
    """Which LoRAs with a range of noise levels act on the present call, set by `weights.lora_hooks`; what is kept from
    call to call must be kept apart by it."""

    def __init__(
        self,
        config: DiTConfig,
        *,
        ops: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        dim = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbed(config, ops, **factory)
        # Released checkpoints always project; the reference has no projection where the widths already agree.
        self.text_proj = (
            ops.Linear(config.text_in_dim, dim, bias=False, **factory) if config.text_in_dim != dim else None
        )
        self.time_embedding = TimestepEmbedding(dim, ops, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(dim, 6 * dim, **factory))
        self.layers = nn.ModuleList([Block(config, ops, **factory) for _ in range(config.num_layers)])
        self.final_norm = FinalNorm(config, ops, **factory)
        self.final_linear = ops.Linear(dim, config.patch_size**2 * config.out_channels, **factory)

    def rope(
        self,
        height: int,
        width: int,
        text_lengths: Sequence[int],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        options: Mapping[str, float] | None = None,
    ) -> RopeTable:
        """The (cos, sin) table for a latent of `height` x `width` cells: compute once per run, pass to `forward`."""
        c = self.config
        p = c.patch_size
        return rope_table(
            height // p,
            width // p,
            text_lengths,
            axes_dim=c.rope_axes_dim,
            theta=c.rope_theta,
            device=device,
            dtype=dtype,
            options=options,
        )

    def modulation(self, timesteps_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Modulation]:
        """Time embedding c [B, D] and the six vectors all blocks share, `1 + scale` folded in once per step."""
        c_BD = self.time_embedding(timestep_embedding(timesteps_B, self.config.hidden_size).to(dtype))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_BD)[:, None].chunk(6, dim=-1)
        return c_BD, (shift_a, 1 + scale_a, gate_a, shift_m, 1 + scale_m, gate_m)

    def forward(
        self,
        x_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BTD: Tensor,
        *,
        text_lengths: Sequence[int] | None = None,
        rope: RopeTable | None = None,
        attend: AttentionFunction = attention,
        run_block: RunBlock = call_block,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Velocity [B, C, H, W] in the dtype of `x_BCHW`.

        Args:
            x_BCHW: noisy latent, normalised.
            timesteps_B: 1000 * sigma, kept in fp32 whatever the dtype of `x_BCHW`.
            text_BTD: text features, right-padded when `text_lengths` differ.
            text_lengths: true lengths; None when nothing is padded. Padding that no sample needs is cut off, and where
                all are equal no mask exists anywhere.
            rope: table from `self.rope`; None computes it here, once per call.
            attend: attention function, called as attend(q_BSNK, k_BSNK, v_BSNK, lengths).
            run_block: runs one block, called as run_block(index, block, x_BSD, modulation, rope, lengths, attend);
                where training recomputes, streams or skips blocks (`training.blocks`).
            transformer_options: the host's dictionary. Block patches ("patches": post_input, single_block,
                double_block), block replacements ("patches_replace"/"dit", key ("single_block", i) or, as other
                single-kind models use, ("double_block", i)) and "rope_options" are honoured; block_index, block_type,
                total_blocks and img_slice are written into it for those who read them, so pass a copy.

        Raises:
            ErnieError: channels or text width are another model's.
        """
        _, channels, height, width = x_BCHW.shape
        p = self.config.patch_size
        if channels != self.config.in_channels:
            raise ErnieError(
                f"the latent must have {self.config.in_channels} channels, got {channels}: "
                "it is another model's latent."
            )
        if text_BTD.shape[-1] != self.config.text_in_dim:
            raise ErnieError(
                f"the conditioning must be {self.config.text_in_dim} wide, got {text_BTD.shape[-1]}: "
                "encode the prompt with this model's text encoder."
            )
        if text_lengths is not None:
            text_BTD = text_BTD[:, : max(text_lengths)]
            if len(set(text_lengths)) == 1:
                text_lengths = None
        padded = text_BTD.shape[1]
        options = transformer_options if transformer_options is not None else {}
        tokens = (height // p) * (width // p)
        lengths = None if text_lengths is None else [tokens + n for n in text_lengths]
        if rope is None:
            rope = self.rope(
                height,
                width,
                text_lengths or [padded],
                device=x_BCHW.device,
                dtype=x_BCHW.dtype,
                options=options.get("rope_options"),
            )

        image = self.x_embedder(x_BCHW)
        text = text_BTD.to(x_BCHW.dtype)
        if self.text_proj is not None:
            text = self.text_proj(text)
        c_BD, modulation = self.modulation(timesteps_B, x_BCHW.dtype)
        if options:
            x_BSD = self._patched_blocks(image, text, modulation, rope, lengths, attend, run_block, options, x_BCHW)
        else:
            x_BSD = torch.cat([image, text], dim=1)
            for i, block in enumerate(self.layers):
                x_BSD = run_block(i, block, x_BSD, modulation, rope, lengths, attend)

        out = self.final_linear(self.final_norm(x_BSD[:, :tokens], c_BD))
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=height // p, p=p, q=p)

    def _patched_blocks(
        self,
        image_BLD: Tensor,
        text_BTD: Tensor,
        modulation: Modulation,
        rope: RopeTable,
        lengths: Sequence[int] | None,
        attend: AttentionFunction,
        run_block: RunBlock,
        options: dict[str, Any],
        x_BCHW: Tensor,
    ) -> Tensor:
        """The block loop with the host's patches; the same numbers as the plain loop when there are none."""
        patches = options.get("patches", {})
        replacements = options.get("patches_replace", {}).get("dit", {})
        tokens = image_BLD.shape[1]
        for patch in patches.get("post_input", ()):
            out = patch({"img": image_BLD, "txt": text_BTD, "transformer_options": options})
            image_BLD, text_BTD = out["img"], out["txt"]
        x_BSD = torch.cat([image_BLD, text_BTD], dim=1)
        options.update(total_blocks=len(self.layers), block_type="single", img_slice=[0, tokens])
        for i, block in enumerate(self.layers):
            options["block_index"] = i

            def original(args: Mapping[str, Any], i: int = i, block: nn.Module = block) -> dict[str, Any]:
                return {"img": run_block(i, block, args["img"], args["vec"], args["pe"], lengths, attend)}

            args = {"img": x_BSD, "vec": modulation, "pe": rope, "transformer_options": options}
            replace = replacements.get(("single_block", i)) or replacements.get(("double_block", i))
            x_BSD = (replace(args, {"original_block": original}) if replace else original(args))["img"]
            for patch in (*patches.get("single_block", ()), *patches.get("double_block", ())):
                out = patch(
                    {
                        "img": x_BSD[:, :tokens],
                        "txt": x_BSD[:, tokens:],
                        "x": x_BCHW,
                        "vec": modulation,
                        "pe": rope,
                        "block_index": i,
                        "transformer_options": options,
                    }
                )
                x_BSD = torch.cat([out.get("img", x_BSD[:, :tokens]), out.get("txt", x_BSD[:, tokens:])], dim=1)
        return x_BSD
