"""Shapes of the released networks, official picture sizes and sampling presets.

Source: config.json files of baidu/ERNIE-Image (`transformer/`, `vae/`) and its model card. Every default below is the
released value; other sizes are read from a state dict (`from_state_dict`) or from a folder's config.json (`from_dict`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import CheckpointError, ErnieError

SIZE_MULTIPLE = 16  # pixels per latent cell: 8x convolutional VAE, then 2x2 patchify
MAX_TEXT_TOKENS = 2048  # tokenizer_config.json, model_max_length
MAX_SIZE = 8192  # pixels a side; far above what the model was trained on
MAX_STEPS = 1000
# functions of sampling.samplers; the last two draw new noise as they go
SAMPLERS = ("euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral", "dpmpp_2m_sde")

# what a step cache compares between evaluations, see sampling.cache
CACHE_SIGNALS = ("first_block", "modulated_input")

# width x height, model card of baidu/ERNIE-Image
OFFICIAL_SIZES: tuple[tuple[int, int], ...] = (
    (1024, 1024),
    (848, 1264),
    (1264, 848),
    (768, 1376),
    (1376, 768),
    (896, 1200),
    (1200, 896),
)


def check_size(width: int, height: int) -> None:
    """Raise ErnieError unless both sides are positive multiples of 16; the message names the nearest valid sizes."""
    for name, px in (("width", width), ("height", height)):
        if px < SIZE_MULTIPLE or px % SIZE_MULTIPLE:
            low = max(SIZE_MULTIPLE, px // SIZE_MULTIPLE * SIZE_MULTIPLE)
            hint = str(low) if px < SIZE_MULTIPLE else f"{low} or {low + SIZE_MULTIPLE}"
            raise ErnieError(f"{name} must be a multiple of {SIZE_MULTIPLE}, got {px}; use {hint}.")


@dataclass(frozen=True, kw_only=True)
class SamplingPreset:
    """Recommended settings of one released checkpoint (model card)."""

    steps: int
    cfg: float
    shift: float = 4.0  # scheduler_config.json of both checkpoints


BASE = SamplingPreset(steps=50, cfg=4.0)
TURBO = SamplingPreset(steps=8, cfg=1.0)


def _from_dict(cls, config: Mapping[str, Any], what: str):
    """Build `cls` from config.json, refusing values whose type cannot be right; keys it does not know are left out."""
    known = {f.name for f in fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    try:
        return cls(**values)
    except TypeError as e:
        raise CheckpointError(f"{what} config.json does not describe this model: {e}") from e


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """ErnieImageTransformer2DModel; defaults are transformer/config.json of the release."""

    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_layers: int = 36
    ffn_hidden_size: int = 12288
    in_channels: int = 128
    out_channels: int = 128
    patch_size: int = 1
    text_in_dim: int = 3072
    rope_theta: int = 256
    rope_axes_dim: tuple[int, ...] = (32, 48, 48)
    eps: float = 1e-6
    qk_layernorm: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ErnieError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if len(self.rope_axes_dim) != 3 or sum(self.rope_axes_dim) != self.head_dim:
            raise ErnieError(
                f"rope_axes_dim must be three widths that sum to the head size {self.head_dim}, got "
                f"{self.rope_axes_dim}."
            )
        if any(d % 2 for d in self.rope_axes_dim):
            raise ErnieError(f"rope_axes_dim must be even, got {self.rope_axes_dim}.")
        if not self.qk_layernorm:
            raise ErnieError("qk_layernorm must be true: no released ERNIE-Image checkpoint goes without it.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiTConfig:
        return _from_dict(cls, config, "transformer")

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> DiTConfig:
        """Read every size from tensor shapes (bare key names).

        The split of the head size over the three RoPE axes leaves no trace in the weights; it is the released
        proportion 2 : 3 : 3, in even numbers.
        """
        try:
            hidden, in_channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
            head_dim = state_dict["layers.0.self_attention.norm_q.weight"].shape[0]
            ffn = state_dict["layers.0.mlp.gate_proj.weight"].shape[0]
            out = state_dict["final_linear.weight"].shape[0]
            text_in = state_dict["text_proj.weight"].shape[1] if "text_proj.weight" in state_dict else hidden
        except KeyError as e:
            raise CheckpointError(f"not an ERNIE-Image transformer: the tensor {e} is missing.") from e
        layers = 1 + max(int(k.split(".")[1]) for k in state_dict if k.startswith("layers."))
        side = head_dim * 3 // 16 * 2
        return cls(
            hidden_size=hidden,
            num_attention_heads=hidden // head_dim,
            num_layers=layers,
            ffn_hidden_size=ffn,
            in_channels=in_channels,
            out_channels=out // (patch * patch),
            patch_size=patch,
            text_in_dim=text_in,
            rope_axes_dim=(head_dim - 2 * side, side, side),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rope_axes_dim": list(self.rope_axes_dim)}


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """AutoencoderKLFlux2; defaults are vae/config.json of the release but for `batch_norm_eps`."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    """None: the same as the encoder's."""
    layers_per_block: int = 2
    norm_num_groups: int = 32
    patch_size: tuple[int, ...] = (2, 2)
    # The file says 1e-4, but the official pipeline normalises with the trained 1e-5 (diffusers PR #13663).
    batch_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for width in (*self.block_out_channels, *self.decoder_widths):
            if width % self.norm_num_groups:
                raise ErnieError(
                    f"block_out_channels must be multiples of norm_num_groups {self.norm_num_groups}, got {width}."
                )
        if self.patch_size != (2, 2):
            raise ErnieError(f"patch_size must be (2, 2), got {self.patch_size}.")

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def packed_channels(self) -> int:
        return self.latent_channels * self.patch_size[0] * self.patch_size[1]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        values = {k: v for k, v in config.items() if k != "batch_norm_eps"}
        return _from_dict(cls, values, "vae")

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> VAEConfig:
        """Read widths and depth from tensor shapes (diffusers names).

        The group count leaves no trace there: it is 32, or the largest power of two that divides all widths.
        """
        try:
            levels = 1 + max(int(k.split(".")[2]) for k in state_dict if k.startswith("encoder.down_blocks."))
            widths = tuple(
                state_dict[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
            )
            decoder = tuple(
                state_dict[f"decoder.up_blocks.{levels - 1 - i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
            )
            depth = 1 + max(int(k.split(".")[4]) for k in state_dict if k.startswith("encoder.down_blocks.0.resnets."))
            latent = state_dict["post_quant_conv.weight"].shape[0]
        except (KeyError, ValueError) as e:
            raise CheckpointError(f"not a FLUX.2 VAE: {e}.") from e
        return cls(
            latent_channels=latent,
            block_out_channels=widths,
            decoder_block_out_channels=None if decoder == widths else decoder,
            layers_per_block=depth,
            norm_num_groups=math.gcd(32, *widths, *decoder),
        )

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
