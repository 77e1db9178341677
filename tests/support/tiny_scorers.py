"""Small random scorer models, written to disk under the names that people's files have."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = {b: chr(b) for b in plain}
    extra = iter(range(256, 512))
    return [shifted.get(b) or chr(next(extra)) for b in range(256)]


def write_qwen_tokenizer(folder: Path, *, leave_out: tuple[str, ...] = ()) -> int:
    """vocab.json, merges.txt and tokenizer_config.json with all letter pairs as tokens; returns the vocabulary's size.

    `leave_out`: tokens that it lacks.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a in "acde" for b in letters if a + b not in leave_out]
    vocab = {token: i for i, token in enumerate([*byte_alphabet(), *pairs])}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    added = {len(vocab) + i: name for i, name in enumerate(n for n in names if n not in leave_out)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(f"{pair[0]} {pair[1]}" for pair in pairs)]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(i): {"content": name, **entry} for i, name in added.items()},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(vocab) + len(added)


def internvl_config(vocab_size: int) -> dict:
    """config.json in the form of InternVL3-8B, small: 56 px pictures = 16 patches, 4 picture tokens."""
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        },
    }


def internvl_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Published tensor names of InternVL3 with a Qwen2 language model -> shapes."""
    text, vision = config["llm_config"], config["vision_config"]
    v, vi = vision["hidden_size"], vision["intermediate_size"]
    d, f = text["hidden_size"], text["intermediate_size"]
    kv = d // text["num_attention_heads"] * text["num_key_value_heads"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, v),
        "vision_model.embeddings.patch_embedding.weight": (v, 3, vision["patch_size"], vision["patch_size"]),
        "vision_model.embeddings.patch_embedding.bias": (v,),
        "vision_model.embeddings.position_embedding": (1, patches + 1, v),
        "mlp1.0.weight": (4 * v,),
        "mlp1.0.bias": (4 * v,),
        "mlp1.1.weight": (d, 4 * v),
        "mlp1.1.bias": (d,),
        "mlp1.3.weight": (d, d),
        "mlp1.3.bias": (d,),
        "language_model.model.embed_tokens.weight": (text["vocab_size"], d),
        "language_model.model.norm.weight": (d,),
        "language_model.lm_head.weight": (text["vocab_size"], d),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}"
        shapes |= {
            f"{layer}.attn.qkv.weight": (3 * v, v),
            f"{layer}.attn.qkv.bias": (3 * v,),
            f"{layer}.attn.proj.weight": (v, v),
            f"{layer}.attn.proj.bias": (v,),
            f"{layer}.ls1": (v,),
            f"{layer}.ls2": (v,),
            f"{layer}.mlp.fc1.weight": (vi, v),
            f"{layer}.mlp.fc1.bias": (vi,),
            f"{layer}.mlp.fc2.weight": (v, vi),
            f"{layer}.mlp.fc2.bias": (v,),
            **{f"{layer}.norm{n}.{leaf}": (v,) for n in (1, 2) for leaf in ("weight", "bias")},
        }
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        rows = {"q": d, "k": kv, "v": kv}
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (n, d) for p, n in rows.items()}
        shapes |= {f"{layer}.self_attn.{p}_proj.bias": (n,) for p, n in rows.items()}
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (d, d),
            f"{layer}.mlp.gate_proj.weight": (f, d),
            f"{layer}.mlp.up_proj.weight": (f, d),
            f"{layer}.mlp.down_proj.weight": (d, f),
            f"{layer}.input_layernorm.weight": (d,),
            f"{layer}.post_attention_layernorm.weight": (d,),
        }
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Matrices of unit gain, gains around 1, small biases: activations stay of order 1 and no two rows are alike."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) < 2:
            gain = name.endswith("weight") or name.rpartition(".")[2] in ("ls1", "ls2", "lambda_1", "lambda_2")
            tensors[name] = 0.2 * noise + (1.0 if gain else 0.0)
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            tensors[name] = noise / fan_in**0.5 if "embed" not in name else 0.5 * noise
    return tensors


def write_internvl(folder: Path, *, seed: int = 0, shards: int = 2, leave_out: tuple[str, ...] = ()) -> dict:
    """A whole model folder in the published form; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = internvl_config(write_qwen_tokenizer(folder, leave_out=leave_out))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = random_tensors(internvl_shapes(config), seed=seed)
    tensors["language_model.lm_head.weight"] *= 3  # decided answers, so that a score is not always about 50
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in names[i::shards]}
        save_file(part, str(folder / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return tensors


# --- CLIP ------------------------------------------------------------------------------------------------------------

CLIP_VOCABULARY = 514  # bytes, bytes at a word's end, start, end


def write_clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of CLIP's form: one token per byte, no merges."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def open_clip_tensors(
    *,
    width: int = 768,
    inner: int = 96,
    features: int = 24,
    layers: int = 2,
    text_width: int = 128,
    patch_px: int = 14,
    side_px: int = 28,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A CLIP under open_clip's names; 768 is the narrowest vision width whose heads are known without a config."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((side_px // patch_px) ** 2 + 1, width),
        "visual.conv1.weight": (width, 3, patch_px, patch_px),
        "visual.proj": (width, features),
        "token_embedding.weight": (CLIP_VOCABULARY, text_width),
        "positional_embedding": (77, text_width),
        "text_projection": (text_width, features),
        "logit_scale": (),
    }
    gains: list[str] = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    widths = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text_width}
    for prefix, w in (("visual.", width), ("", text_width)):
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}"
            gains += [f"{block}.ln_1", f"{block}.ln_2"]
            widths |= {f"{block}.ln_1": w, f"{block}.ln_2": w}
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * w, w),
                f"{block}.attn.in_proj_bias": (3 * w,),
                f"{block}.attn.out_proj.weight": (w, w),
                f"{block}.attn.out_proj.bias": (w,),
                f"{block}.mlp.c_fc.weight": (inner, w),
                f"{block}.mlp.c_fc.bias": (inner,),
                f"{block}.mlp.c_proj.weight": (w, inner),
                f"{block}.mlp.c_proj.bias": (w,),
            }
    for name in gains:
        shapes |= {f"{name}.weight": (widths[name],), f"{name}.bias": (widths[name],)}
    tensors = random_tensors(shapes, seed=seed)
    tensors["logit_scale"] = torch.tensor(2.5)
    return tensors


def write_clip_folder(folder: Path, *, seed: int = 0, width: int = 64, features: int = 24):
    """A CLIP as transformers saves it, with config.json and tokenizer; returns the model."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": CLIP_VOCABULARY,
            "bos_token_id": CLIP_VOCABULARY - 2,
            "eos_token_id": CLIP_VOCABULARY - 1,
            "hidden_act": "gelu",
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        projection_dim=features,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            elif name.endswith("class_embedding"):
                tensor.normal_()
    model.save_pretrained(str(folder))
    write_clip_tokenizer(folder)
    return model


def laion_head(kind: str, features: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The published names: `weight`, `bias` of the linear head, `layers.N` of the other."""
    if kind == "linear":
        return random_tensors({"weight": (1, features), "bias": (1,)}, seed=seed)
    widths = [features, 32, 16, 8, 4, 1]
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        shapes |= {f"layers.{place}.weight": (b, a), f"layers.{place}.bias": (b,)}
    return random_tensors(shapes, seed=seed)


# --- ImageReward -----------------------------------------------------------------------------------------------------


def write_bert_vocabulary(folder: Path) -> int:
    """vocab.txt of BERT's form with single letters; returns its size."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


def image_reward_tensors(
    vocabulary: int, *, width: int = 64, layers: int = 2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """ImageReward.pt's names, 28 px pictures of 7 px patches."""
    d, inner, vision_inner = 128, 96, 80
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, width),
        "blip.visual_encoder.pos_embed": (1, 17, width),
        "blip.visual_encoder.patch_embed.proj.weight": (width, 3, 7, 7),
        "blip.visual_encoder.patch_embed.proj.bias": (width,),
        "blip.visual_encoder.norm.weight": (width,),
        "blip.visual_encoder.norm.bias": (width,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, d),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, d),
        "blip.text_encoder.embeddings.LayerNorm.weight": (d,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (d,),
        "blip.vision_proj.weight": (16, width),
        "blip.vision_proj.bias": (16,),
        "blip.text_proj.weight": (16, d),
        "blip.text_proj.bias": (16,),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    for i in range(layers):
        block = f"blip.visual_encoder.blocks.{i}"
        shapes |= {f"{block}.norm{n}.{leaf}": (width,) for n in (1, 2) for leaf in ("weight", "bias")}
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", vision_inner, width)
        linear(f"{block}.mlp.fc2", width, vision_inner)
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for part, source in (("attention", d), ("crossattention", width)):
            linear(f"{layer}.{part}.self.query", d, d)
            linear(f"{layer}.{part}.self.key", d, source)
            linear(f"{layer}.{part}.self.value", d, source)
            linear(f"{layer}.{part}.output.dense", d, d)
            shapes |= {f"{layer}.{part}.output.LayerNorm.{leaf}": (d,) for leaf in ("weight", "bias")}
        linear(f"{layer}.intermediate.dense", inner, d)
        linear(f"{layer}.output.dense", d, inner)
        shapes |= {f"{layer}.output.LayerNorm.{leaf}": (d,) for leaf in ("weight", "bias")}
    widths = [d, 32, 16, 8, 4, 1]
    for place, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        linear(f"mlp.layers.{place}", b, a)
    tensors = random_tensors(shapes, seed=seed)
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return tensors
