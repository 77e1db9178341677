"""Full size on a GPU: random bf16 weights, against diffusers and, where COMFYUI_DIR names one, ComfyUI's own path.

Targets are an H200's (reference figures of an engine at 75 % of its matrix rate); on another card read the ratios.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ernie_core.config import CACHE_SIGNALS, SIZE_MULTIPLE, DiTConfig, VAEConfig
from ..ernie_core.sampling.cache import StepCache, StepCacheRun
from ..ernie_core.sampling.guidance import cfg_velocity
from .cfg import CFG, COND_TOKENS, UNCOND_TOKENS, diffusers_step, our_step
from .compare import Row, compare, cuda_seconds
from .inputs import ForwardInputs, forward_inputs
from .pairs import make_dit_pair, make_vae_pair
from .vae import diffusers_decode

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, where and how; the defaults are the published goals, a test runs it in miniature."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 15
    seconds: Callable[[Callable[[], Any]], float] = cuda_seconds
    comfyui: Path | None = None
    forwards: tuple[tuple[str, int, float], ...] = (("H1", 1024, 135), ("H4", 512, 42), ("H5", 2048, 730))
    """(goal, pixels a side, milliseconds)"""
    guided_px: int = 1024
    decode_px: int = 1024
    tiled_px: int = 2048


def load_comfyui_model(folder: Path, config: DiTConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """ComfyUI's ErnieImageModel on the given tensors, with the plain operations of a fully loaded model."""
    sys.path.insert(0, str(folder))
    model_module = importlib.import_module("comfy.ldm.ernie.model")
    ops = importlib.import_module("comfy.ops").disable_weight_init
    model = model_module.ErnieImageModel(**config.to_dict(), device="meta", dtype=dtype, operations=ops)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval().requires_grad_(False)


def comfyui_step(model: nn.Module, given: ForwardInputs) -> Callable[[], Tensor]:
    """A guided step as ComfyUI's sampler makes it: conditionings of unequal length run one after the other."""
    x, timesteps, text = given.ours
    uncond, cond = (text[row : row + 1, :n] for row, n in enumerate(given.text_lengths))

    def step() -> Tensor:
        v_cond, v_uncond = (model(x[:1], timesteps[:1], part).float() for part in (cond, uncond))
        return cfg_velocity(v_cond, v_uncond, CFG)

    return step


def transformer_rows(bench: Bench) -> Iterator[Row]:
    """Forwards (H1, H2, H4, H5) and the guided step (H3), each against every peer at hand."""
    ours, theirs = make_dit_pair(bench.dit, dtype=bench.dtype, device=bench.device)
    host = None
    if bench.comfyui is not None:
        host = load_comfyui_model(bench.comfyui, bench.dit, ours.state_dict(), bench.dtype)
    place = {"dtype": bench.dtype, "device": bench.device}
    timing = {"rounds": bench.rounds, "seconds": bench.seconds}

    for goal, px, milliseconds in bench.forwards:
        side = px // SIZE_MULTIPLE
        given = forward_inputs(bench.dit, side=side, text_lengths=[COND_TOKENS], **place)
        rope = ours.rope(side, side, [COND_TOKENS], **place)
        peers: list[tuple[str, float, Callable[[], Any]]] = [
            ("diffusers", 1.40, lambda given=given: theirs(*given.peer, return_dict=False))
        ]
        if host is not None:
            peers.append(("ComfyUI", 1.03, lambda given=given: host(*given.ours)))
        for peer_name, at_least, peer in peers:
            yield compare(
                f"{goal} DiT forward, {px} px, {COND_TOKENS} text tokens",
                ours=lambda given=given, rope=rope: ours(*given.ours, rope=rope),
                peer=peer,
                peer_name=peer_name,
                at_least=at_least,
                at_most_ms=milliseconds,
                **timing,
            )

    side = bench.guided_px // SIZE_MULTIPLE
    given = forward_inputs(bench.dit, side=side, text_lengths=[UNCOND_TOKENS, COND_TOKENS], **place)
    peers = [("diffusers", 1.5, diffusers_step(theirs, given))]
    if host is not None:
        peers.append(("ComfyUI", 1.0, comfyui_step(host, given)))
    for peer_name, at_least, peer in peers:
        yield compare(
            f"H3 guided step, {bench.guided_px} px, text of {COND_TOKENS} + {UNCOND_TOKENS} tokens",
            ours=our_step(ours, given, side=side),
            peer=peer,
            peer_name=peer_name,
            at_least=at_least,
            at_most_ms=265,
            **timing,
        )


def cache_rows(bench: Bench) -> Iterator[Row]:
    """What the step cache itself takes: an evaluation that it lets run whole, and one that it leaves out."""
    model, _ = make_dit_pair(bench.dit, dtype=bench.dtype, device=bench.device)
    place = {"dtype": bench.dtype, "device": bench.device}
    side = bench.guided_px // SIZE_MULTIPLE
    given = forward_inputs(bench.dit, side=side, text_lengths=[COND_TOKENS], **place)
    rope = model.rope(side, side, [COND_TOKENS], **place)
    x, timesteps, text = given.ours
    for signal in CACHE_SIGNALS:
        for what, threshold, at_least in (("lets run whole", 1e-30, 0.97), ("leaves out", 1.0, 10.0)):
            run = StepCacheRun(StepCache(threshold=threshold, signal=signal, max_skips=10**9), bench.dit.num_layers)
            inputs = cycle((x, 1.001 * x))  # what does not move is below any threshold
            yield compare(
                f"step cache, {signal}: an evaluation it {what}, {bench.guided_px} px",
                ours=lambda run=run, inputs=inputs: model(
                    next(inputs), timesteps, text, rope=rope, run_block=run.run_block("one", 0.5)
                ),
                peer=lambda: model(*given.ours, rope=rope),
                peer_name="without the cache",
                at_least=at_least,
                rounds=bench.rounds,
                seconds=bench.seconds,
            )


def autoencoder_rows(bench: Bench) -> Iterator[Row]:
    """Decoding whole and tiled (H8)."""
    ours, theirs = make_vae_pair(bench.vae, dtype=bench.dtype, device=bench.device)

    def draw(px: int) -> Tensor:
        side = px // SIZE_MULTIPLE
        return torch.randn(1, bench.vae.packed_channels, side, side, device=bench.device).to(bench.dtype)

    latent = draw(bench.decode_px)
    yield compare(
        f"H8 VAE decode, {bench.decode_px} px",
        ours=lambda: ours.decode(latent),
        peer=lambda: diffusers_decode(theirs, latent),
        peer_name="diffusers",
        at_least=1.0,
        at_most_ms=35,
        rounds=bench.rounds,
        seconds=bench.seconds,
    )
    if torch.device(bench.device).type != "cuda":
        return
    large = draw(bench.tiled_px)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.inference_mode():
        ours.decode_tiled(large)
    extra = (torch.cuda.max_memory_allocated() - held) / GIB
    yield Row(
        name=f"H8 VAE decode in tiles, {bench.tiled_px} px: peak memory",
        ours=f"{extra:.2f} GiB more",
        target="<= 2 GiB more",
        met=extra <= 2,
    )


def measure() -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield Row(
            name="full size on a GPU (H1-H5, H8, step cache)",
            ours="needs CUDA",
            target="see bench/RESULTS.md",
            met=None,
        )
        return
    folder = os.environ.get("COMFYUI_DIR")
    bench = Bench(comfyui=Path(folder) if folder else None)
    yield from transformer_rows(bench)
    torch.cuda.empty_cache()
    yield from cache_rows(bench)
    torch.cuda.empty_cache()
    yield from autoencoder_rows(bench)
