"""One DiT forward on the CPU against diffusers: reduced width, one thread, processor time."""

from __future__ import annotations

from ..ernie_core.config import DiTConfig
from .compare import Row, compare, cpu_dtype
from .inputs import forward_inputs
from .pairs import make_dit_pair

# As wide a ratio of arithmetic to memory as the full model's where bf16 units are present.
REDUCED = DiTConfig(hidden_size=1024, num_attention_heads=8, num_layers=2, ffn_hidden_size=3072, text_in_dim=256)
LATENT_SIDE, TEXT_TOKENS = 32, 77


def measure() -> list[Row]:
    dtype, words = cpu_dtype()
    ours, peer = make_dit_pair(REDUCED, dtype=dtype)
    given = forward_inputs(REDUCED, side=LATENT_SIDE, text_lengths=[TEXT_TOKENS], dtype=dtype)
    rope = ours.rope(LATENT_SIDE, LATENT_SIDE, [TEXT_TOKENS], device="cpu", dtype=dtype)
    return [
        compare(
            f"DiT forward, width 1024, 1,101 tokens ({words})",
            ours=lambda: ours(*given.ours, rope=rope),
            peer=lambda: peer(*given.peer, return_dict=False),
            peer_name="diffusers",
            at_least=1.15,
            rounds=21,
        )
    ]
