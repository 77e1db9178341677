"""Scoring on the CPU: batches of 8 against one by one, and peak memory against the number of pictures.

The networks have the sizes of OpenAI's CLIP ViT-L/14 and ViT-B/32 with random weights: what a forward costs does not
depend on their values. Both ways score the same pictures with one process and one thread; prompts are alike, so that
batches also read a prompt once, as they do for the candidates of one prompt.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..ernie_core.scoring.builtin import BuiltinScorer
from ..ernie_core.scoring.clip_based import ClipScorer
from ..ernie_core.scoring.scorer import Scorer
from .compare import Row, compare
from .pairs import randomise

BATCH, SIDE_PX, TARGET = 8, 512, 4.0
COUNTS = (8, 64)  # pictures, for the memory
SIZES = {"ViT-B/32": (768, 3072, 12, 12, 32, 512, 8), "ViT-L/14": (1024, 4096, 24, 16, 14, 768, 12)}
ROUNDS = {"ViT-B/32": 5, "ViT-L/14": 2}  # the large one takes half a minute a round


class OneToken:
    """Stands for a tokenizer: 20 tokens whatever the prompt says."""

    def __len__(self) -> int:
        return 49408

    def __call__(self, _text: str) -> dict[str, list[int]]:
        return {"input_ids": [49406, *range(100, 118), 49407]}


def make_scorer(size: str) -> ClipScorer:
    """CLIP of a published size with random weights, fp32."""
    import transformers

    width, inner, layers, heads, patch, text_width, text_heads = SIZES[size]
    vision: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "patch_size": patch, "image_size": 224}
    text: dict[str, Any] = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": 12}
    config = transformers.CLIPConfig(
        vision_config=vision | {"num_hidden_layers": layers, "num_attention_heads": heads},
        text_config=text | {"num_attention_heads": text_heads, "eos_token_id": 49407},
        projection_dim=text_width,
        attn_implementation="sdpa",
    )
    network = transformers.CLIPModel(config).eval().requires_grad_(False)
    randomise(network)
    return ClipScorer(network, OneToken())


def pictures(count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)


def speed_row(size: str) -> Row:
    scorer, images = make_scorer(size), list(pictures(BATCH))

    def one_by_one() -> list[float]:
        return [scorer.score([image], "a red fox")[0] for image in images]

    return compare(
        f"CLIP {size} scores {BATCH} pictures at once (fp32)",
        ours=lambda: scorer.score(images, "a red fox", batch_size=BATCH),
        peer=one_by_one,
        peer_name="one by one",
        at_least=TARGET,
        rounds=ROUNDS[size],
    )


def peak_bytes(scorer: Scorer, count: int) -> int:
    """Most that Python and numpy held while scoring `count` pictures out of a generator."""
    tracemalloc.start()
    scorer.score(pictures(count), batch_size=BATCH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def memory_row() -> Row:
    few, many = (peak_bytes(BuiltinScorer(), count) for count in COUNTS)
    return Row(
        name=f"memory while scoring {COUNTS[1]} pictures of {SIDE_PX} px",
        ours=f"{many / 1e6:.1f} MB",
        peer_name=f"{COUNTS[0]} pictures",
        peer=f"{few / 1e6:.1f} MB",
        target="the same, + 5 %",
        met=many <= 1.05 * few,
    )


def measure() -> list[Row]:
    torch.manual_seed(0)
    return [*(speed_row(size) for size in SIZES), memory_row()]
