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
        additional_special_tokens=list(special),
        **options,
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
