"""One guided step on the CPU: two calls at true lengths against diffusers' padded and masked batch of two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ernie_core.model.dit import DiT
from ..ernie_core.sampling.guidance import cfg_velocity, with_cfg
from .compare import Row, compare, cpu_dtype
from .dit import LATENT_SIDE, REDUCED
from .inputs import ForwardInputs, forward_inputs
from .pairs import make_dit_pair

COND_TOKENS, UNCOND_TOKENS = 256, 1  # an enhanced prompt, and the empty one
CFG = 4.0


def our_step(model: DiT, given: ForwardInputs, *, side: int) -> Callable[[], Tensor]:
    """The engine's guided step: rows 0 (empty prompt) and 1 of the padded inputs, each at its true length."""
    x, timesteps, text = given.ours

    def branch(row: int):
        n = given.text_lengths[row]
        rope = model.rope(side, side, [n], device=x.device, dtype=x.dtype)
        return lambda x, _: model(x, timesteps[:1], text[row : row + 1, :n], rope=rope)

    denoise = with_cfg(branch(1), branch(0), CFG)
    return lambda: denoise(x[:1], 0.8)


def diffusers_step(model, given: ForwardInputs) -> Callable[[], Tensor]:
    """The guided step of ErnieImagePipeline: one call on [uncond, cond], then the guidance formula."""

    def step() -> Tensor:
        uncond, cond = model(*given.peer, return_dict=False)[0].chunk(2)
        return cfg_velocity(cond, uncond, CFG)

    return step


def measure() -> list[Row]:
    dtype, words = cpu_dtype()
    ours, peer = make_dit_pair(REDUCED, dtype=dtype)
    given = forward_inputs(REDUCED, side=LATENT_SIDE, text_lengths=[UNCOND_TOKENS, COND_TOKENS], dtype=dtype)
    step, peer_step = our_step(ours, given, side=LATENT_SIDE), diffusers_step(peer, given)
    with torch.inference_mode():
        torch.testing.assert_close(step(), peer_step().float(), atol=0.1, rtol=0.1)
    return [
        compare(
            f"guided step, width 1024, text of {COND_TOKENS} + {UNCOND_TOKENS} tokens ({words})",
            ours=step,
            peer=peer_step,
            peer_name="diffusers",
            at_least=1.35,
        )
    ]
