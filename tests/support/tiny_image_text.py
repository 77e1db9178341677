"""Small random image-text and vision-language models, written as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_scorers import byte_alphabet


def byte_tokenizer(special: tuple[str, ...] = (), **options: Any):
    """One token per byte, and the special ones; nothing is added to a text."""
    import tokenizers
    import transformers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *special, *byte_alphabet()])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"additional_special_tokens": list(special)} | options),
    )


def spread(model: torch.nn.Module, *, seed: int = 0) -> Any:
    """Weights of unit gain, so that no two answers are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            elif "norm" not in name and parameter.numel() > 1:
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def write_siglip_folder(folder: Path, *, seed: int = 0, length: int = 64):
    """A SigLIP with its processor; returns the model."""
    import transformers

    tokenizer = byte_tokenizer(model_max_length=length)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.SiglipConfig(
        text_config=sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": length, "projection_size": 32},
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
    )
    model = spread(transformers.SiglipModel(config), seed=seed)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    model.save_pretrained(str(folder))
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    transformers.SiglipProcessor(images, tokenizer).save_pretrained(str(folder))
    return model


# --- vision-language models -------------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
VISION_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_vlm_folder(folder: Path, kind: str, *, seed: int = 0) -> None:
    """A vision-language model with its processor and chat template; `kind` is one of VLM_KINDS."""
    import transformers

    make_model, special, mark = VLM_KINDS[kind]
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    extra = {"extra_special_tokens": names | {"video_token": "<video>"}} if kind == "internvl" else {}
    tokenizer = byte_tokenizer(special, **extra)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    model, make_processor = make_model(transformers, len(tokenizer), ids)
    spread(model, seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(str(folder))
    processor = make_processor(tokenizer, CHAT.replace("MARK", mark))
    processor.save_pretrained(str(folder))


def _llava(transformers, vocab_size: int, ids: dict[str, int]):
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=vocab_size, **TEXT_SIZES),
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, **VISION_SIZES),
        image_token_index=ids["<image>"],
    )

    def processor(tokenizer, template):
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
            image_token="<image>",
        )

    return transformers.LlavaForConditionalGeneration(config), processor


def _qwen2_vl(transformers, vocab_size: int, ids: dict[str, int]):
    config = transformers.Qwen2VLConfig(
        text_config=TEXT_SIZES
        | {
            "vocab_size": vocab_size,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )

    def processor(tokenizer, template):
        images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
        videos = transformers.Qwen2VLVideoProcessor()
        return transformers.Qwen2VLProcessor(images, tokenizer, videos, chat_template=template)

    return transformers.Qwen2VLForConditionalGeneration(config), processor


def _internvl(transformers, vocab_size: int, ids: dict[str, int]):
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(vocab_size=vocab_size, **TEXT_SIZES),
        vision_config=VISION_SIZES | {"image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )

    def processor(tokenizer, template):
        size = {"height": 28, "width": 28}
        images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=False)
        videos = transformers.InternVLVideoProcessor(size=size)
        return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)

    return transformers.InternVLForConditionalGeneration(config), processor


VLM_KINDS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "llava": (_llava, ("<image>",), "<image>"),
    "qwen2_vl": (
        _qwen2_vl,
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "internvl": (_internvl, ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), "<IMG_CONTEXT>"),
}
