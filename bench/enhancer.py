"""Writing with the prompt enhancer on the CPU, against transformers' `generate` with the same weights."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..ernie_core.model.enhancer import Enhancer, render_prompt
from ..ernie_core.model.text_encoder import Tokenizer
from .compare import Row, compare, cpu_dtype

# 202 million parameters, in the released enhancer's proportions (3072 wide, 26 layers, 131072 entries: 3429 million)
REDUCED = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
NARROW = REDUCED | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
PROMPT, SIZE, SYSTEM = (
    "a red cat on a wooden table",
    (1024, 1024),
    "Write the prompt out. " * 3,
)  # 140 tokens, one a byte


def make_pair(config: dict[str, Any], dtype: torch.dtype) -> tuple[Enhancer, Any]:
    """(our enhancer, transformers' model) with the same random weights; neither ever ends an answer."""
    import transformers

    theirs: Any = transformers.Ministral3Config(**config | _ROPE)
    torch.manual_seed(0)
    peer: Any = transformers.Ministral3ForCausalLM(theirs)
    peer = peer.to(dtype).eval()
    ours = Enhancer(config | _ROPE | {"model_type": "ministral3"}, byte_tokenizer(), dtype=dtype).eval()
    ours.load_state_dict({k.removeprefix("model."): v for k, v in peer.state_dict().items() if k != "lm_head.weight"})
    ours.eos_ids = frozenset()
    return ours, peer


_ROPE = {
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "max_position_embeddings": 262144,
        "llama_4_scaling_beta": 0.1,
    },
}


def byte_tokenizer() -> Tokenizer:
    """One token per byte, behind the released number of special tokens."""
    import base64
    import json

    entries = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    settings = {"pattern": r"[\s\S]", "default_num_special_tokens": 1000, "default_vocab_size": 1256}
    return Tokenizer.from_tekken(json.dumps({"config": settings, "vocab": entries}).encode())


def row(config: dict[str, Any], words: str, dtype: torch.dtype, *, tokens: int, rounds: int, at_least: float) -> Row:
    """One answer of `tokens` tokens, always the likeliest; the two texts are the same."""
    ours, peer = make_pair(config, dtype)
    ids = torch.tensor([ours.tokenizer.encode(render_prompt(PROMPT, *SIZE, system=SYSTEM))])
    written: list[list[int]] = []

    def write() -> None:
        cut = logging.getLogger(Enhancer.__module__)
        cut.disabled = True  # every answer is cut, and says so
        written.append(ours.write_ids(ids[0].tolist(), max_new_tokens=tokens, temperature=0.0, seeds=[0])[0])
        cut.disabled = False

    def generate() -> None:
        out = peer.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=11,
            eos_token_id=None,
        )
        assert out[0, ids.shape[1] :].tolist() == written[0]

    return compare(
        f"{tokens} tokens after {ids.shape[1]}, {words}",
        ours=write,
        peer=generate,
        peer_name="transformers' generate",
        at_least=at_least,
        rounds=rounds,
    )


def measure() -> list[Row]:
    dtype, words = cpu_dtype()
    return [
        row(REDUCED, f"202 M parameters ({words})", dtype, tokens=128, rounds=7, at_least=1.5),
        row(REDUCED, "202 M parameters (fp32)", torch.float32, tokens=128, rounds=7, at_least=1.5),
        row(NARROW, "11 M parameters (fp32)", torch.float32, tokens=256, rounds=15, at_least=1.5),
    ]
