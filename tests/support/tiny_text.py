"""A 259-entry tekken file, and language-model configs in miniature with the released rope settings."""

import base64
import functools
import json
from pathlib import Path

import torch

ROPE = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "max_position_embeddings": 262144,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

RELEASED_TEXT_CONFIG = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
}


def text_config(model_type="mistral"):
    """q is 4 x 32 = 128 wide against a hidden size of 48; two k/v heads; 4 layers."""
    return RELEASED_TEXT_CONFIG | {
        "model_type": model_type,
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": dict(ROPE),
    }


def tekken_bytes():
    """All bytes, then "th", "the", " the"; 32 specials that the file does not list; split at spaces."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    file = {
        "config": {
            "pattern": r" ?[^\s]+|\s+",
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": 32 + len(tokens),
            "default_num_special_tokens": 32,
            "version": "v3",
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)],
    }
    return json.dumps(file).encode()


def randomise(model, *, seed):
    """Give every parameter values large enough for attention to pick and for text not to repeat itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            gain = parameter.ndim == 1
            parameter.normal_(mean=float(gain), std=0.2, generator=generator)
    return model.eval()


def released_tekken():
    """Path of the released model's vocabulary, or skip the test: it comes with the package mistral-common."""
    import pytest

    package = pytest.importorskip("mistral_common", reason="the released vocabulary comes with mistral-common")
    return Path(package.__file__).parent / "data" / "tekken_240911.json"


@functools.cache
def released_tokenizer():
    from ernie_pack.ernie_core.model.text_encoder import Tokenizer

    return Tokenizer.from_tekken(released_tekken().read_bytes())
