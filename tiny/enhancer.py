"""Trains the prompt enhancer of ernie-image-tiny: official prompt format in, long description out."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..ernie_core.config import OFFICIAL_SIZES
from ..ernie_core.model.enhancer import Enhancer, render_prompt
from ..ernie_core.model.text_encoder import Tokenizer
from . import scenes
from .dit import pad_ids
from .muon import Muon

logger = logging.getLogger(__name__)

_SIZES = ((128, 128), (128, 128), (256, 256), (512, 512), *OFFICIAL_SIZES)


def training_pair(pool: list[scenes.Scene], rng: np.random.Generator) -> tuple[str, str]:
    """(rendered prompt, answer): a prompt of some facts, and a description that keeps and completes them."""
    prompt = scenes.short_prompt(pool[rng.integers(len(pool))], rng)
    width, height = _SIZES[rng.integers(len(_SIZES))]
    return render_prompt(prompt, width, height), scenes.long_description(scenes.facts(prompt), rng)


def logits(model: Enhancer, ids_BT: Tensor) -> Tensor:
    """Next-token logits [B, T, V] with gradients."""
    hidden = model.norm(model.run_layers(ids_BT))
    return F.linear(hidden, model.output_weight(hidden))


def train_enhancer(
    tokenizer: Tokenizer,
    config: dict,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    checkpoint: Path,
    batch: int = 16,
    lr: float = 4e-3,
) -> Enhancer:
    """The trained enhancer (fp32, eval); saved to `checkpoint`. The loss is on the answer only."""
    torch.manual_seed(seed)
    pool, _ = scenes.split()
    model = Enhancer(config, tokenizer).to(device).train()
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.05)
    words = model.embed_tokens.weight
    matrices = [w for w in model.parameters() if w.ndim > 1 and w is not words]
    others = [w for w in model.parameters() if w.ndim <= 1 or w is words]
    optimizers = ((Muon(matrices, lr=lr), lr), (torch.optim.AdamW(others, betas=(0.9, 0.98)), lr))
    eos = tokenizer.eos_id
    start = time.monotonic()
    for step in range(steps):
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50, 1.3 * (1 - step / steps))
        rng = np.random.default_rng([seed, 4, step])
        pairs = [training_pair(pool, rng) for _ in range(batch)]
        questions = [tokenizer.encode(question) for question, _ in pairs]
        answers = [[*tokenizer.encode(answer, bos=False), eos] for _, answer in pairs]
        ids = pad_ids([q + a for q, a in zip(questions, answers, strict=True)], device)
        target = torch.full_like(ids, -100)
        for row, (q, a) in enumerate(zip(questions, answers, strict=True)):
            target[row, len(q) - 1 : len(q) + len(a) - 1] = torch.tensor(a, device=device)
        loss = F.cross_entropy(logits(model, ids).flatten(0, 1), target.flatten(), ignore_index=-100)
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            pace = (time.monotonic() - start) / (step + 1)
            logger.info("enhancer step %d/%d  loss %.4f  %.2f s/step", step, steps, loss.item(), pace)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), checkpoint)
    return model.eval()


def kept_facts(prompt: str, answer: str) -> bool:
    """Whether an answer names every fact of the prompt with the same value, and is longer."""
    given, told = scenes.facts(prompt), scenes.facts(answer)
    return len(answer) > len(prompt) and all(told.get(fact) == value for fact, value in given.items())


def evaluate_enhancer(model: Enhancer, *, count: int, seed: int = 0) -> dict[str, float]:
    """Share of `count` prompts from held-out scenes whose answer keeps every fact, at the official settings."""
    _, heldout = scenes.split()
    rng = np.random.default_rng([seed, 5])
    kept = 0
    for index in range(count):
        prompt = scenes.short_prompt(heldout[rng.integers(len(heldout))], rng)
        answer = model.enhance(prompt, 128, 128, seed=index, max_new_tokens=200)
        ok = kept_facts(prompt, answer)
        kept += ok
        if not ok:
            logger.info("lost a fact: %s", json.dumps({"prompt": prompt, "answer": answer}))
    return {"kept_every_fact": kept / count, "prompts": count}
