"""CLIP and ERNIE_ENHANCER: the two language models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ernie_core.config import MAX_TEXT_TOKENS
from ...ernie_core.errors import ErnieError
from .models import patcher_class
from .runtime import progress, throw_if_interrupted

logger = logging.getLogger(__name__)

TOKENS_KEY = "ministral3_3b"  # the name core's own ERNIE tokenizer gives its tokens


def make_clip(component, *, rope: str = "yarn"):
    """A CLIP around our text encoder; CLIPTextEncode and other nodes work with it."""
    return _load_clip(component, rope)


def reload_clip(path: Path, rope: str, disable_dynamic: bool = False):
    from ...ernie_core.weights.checkpoint import read_component

    return _load_clip(read_component(path, "text_encoder"), rope, disable_dynamic=disable_dynamic).patcher


class ClipModel(torch.nn.Module):
    """Our text encoder with the host's calling convention for `CLIP.cond_stage_model`."""

    def __init__(self, encoder: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.encoder.compute_dtype = torch.float32  # as core computes text features, whatever the weights are stored in
        self.dtypes = {dtype}
        self.execution_device: torch.device | None = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        if options.get("layer") not in (None, -2):
            logger.warning("CLIP layer %s is not used: ERNIE-Image reads layer -2.", options["layer"])
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def encode_token_weights(self, tokens: dict[str, list[list[tuple]]]) -> tuple[Tensor, None]:
        """(features [1, T, D] fp32 on the host's intermediate device, no pooled vector)."""
        import comfy.model_management as mm

        ids = [[token[0] for token in section] for section in tokens[TOKENS_KEY]]
        hidden = self.encoder.encode_ids(ids, device=self.execution_device)
        return torch.cat([h[None] for h in hidden]).float().to(mm.intermediate_device()), None

    def generate(self, *args, **kwargs):
        raise ErnieError(
            "the text encoder cannot write text: use Enhance Prompt (ERNIE) with Load Prompt Enhancer (ERNIE)."
        )

    def load_sd(self, sd: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        missing, unexpected = self.encoder.load_state_dict(sd, strict=False)
        return list(missing), list(unexpected)


class ClipTokenizer:
    """Our tokenizer with the host's calling convention: one section, weight 1 everywhere, exactly one BOS."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        ids = self.tokenizer.encode(text, max_tokens=None)
        if len(ids) > MAX_TEXT_TOKENS:
            logger.warning(
                "The prompt has %d tokens, the text encoder reads %d: the last %d are cut off.",
                len(ids),
                MAX_TEXT_TOKENS,
                len(ids) - MAX_TEXT_TOKENS,
            )
            ids = ids[:MAX_TEXT_TOKENS]
        return {TOKENS_KEY: [[(i, 1.0, n) if return_word_ids else (i, 1.0) for n, i in enumerate(ids)]]}

    def count(self, text: str) -> int:
        """Tokens of all of `text`, BOS included, also beyond what the encoder reads."""
        return len(self.tokenizer.encode(text, max_tokens=None))

    def untokenize(self, tokens: list[tuple]) -> list[tuple[tuple, str]]:
        return [(token, self.tokenizer.decode([token[0]])) for token in tokens]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def _load_clip(component, rope: str, disable_dynamic: bool = False):
    import comfy.model_management as mm
    import comfy.ops
    import comfy.sd
    import comfy.supported_models_base
    import comfy.utils

    from ...ernie_core.weights.checkpoint import build_text_encoder

    dtype = _storage_dtype(component)
    tokenizer = None

    def build(device, dtype, model_options):
        nonlocal tokenizer
        encoder, tokenizer = build_text_encoder(
            component, ops=comfy.ops.manual_cast, dtype=dtype, device=device, rope=rope
        )
        return ClipModel(encoder, dtype)

    target = comfy.supported_models_base.ClipTarget(lambda **_: ClipTokenizer(tokenizer), build)
    options = {"dtype": dtype, "load_device": mm.text_encoder_device()}
    extra = {"disable_dynamic": True} if disable_dynamic else {}
    parameters = comfy.utils.calculate_parameters(component.state_dict)
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options=options, **extra)
    clip.patcher.cached_patcher_init = (reload_clip, (component.source, rope))
    return clip


def _storage_dtype(component) -> torch.dtype:
    """As in the file, but not fp16, whose range the activations of these language models exceed."""
    from ...ernie_core.weights.checkpoint import stored_dtype

    dtype = stored_dtype(component)
    return torch.bfloat16 if dtype is torch.float16 else dtype


def encode_prompt(clip, text: str):
    """CONDITIONING of one prompt, as CLIPTextEncode makes it."""
    if clip is None:
        raise ErnieError("the text encoder is empty: connect Load Text Encoder (ERNIE) or a CLIPLoader.")
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def count_tokens(clip, text: str) -> int:
    """How many tokens a CLIP, ours or core's, makes of `text`."""
    if isinstance(clip.tokenizer, ClipTokenizer):
        return clip.tokenizer.count(text)
    return max(sum(len(section) for section in sections) for sections in clip.tokenize(text).values())


class PromptEnhancer:
    """ERNIE_ENHANCER: the engine's enhancer under the host's memory manager."""

    def __init__(self, patcher, source: str):
        self.patcher = patcher
        self.source = source

    @property
    def fingerprint(self) -> str:
        """Changes with the model file."""
        from ...ernie_core.enhancing.disk_cache import fingerprint

        return fingerprint(self.source)

    def enhance_variants(
        self,
        prompt: str,
        width: int,
        height: int,
        *,
        seeds: Sequence[int],
        on_token: Callable[[int, str], None],
        max_new_tokens: int,
        **settings,
    ) -> list[str]:
        """Detailed prompts, one per seed; see the engine's `Enhancer.enhance_variants` for the settings."""
        import comfy.model_management as mm

        total = max_new_tokens * len(seeds)
        bar = progress(total)
        count = 0

        def step(row: int, text: str) -> None:
            nonlocal count
            throw_if_interrupted()
            count += 1
            bar.update_absolute(count, total)
            on_token(row, text)

        mm.load_models_gpu([self.patcher])
        return self.patcher.model.enhance_variants(
            prompt,
            width,
            height,
            seeds=seeds,
            on_token=step,
            max_new_tokens=max_new_tokens,
            device=self.patcher.load_device,
            **settings,
        )


def make_enhancer(component) -> PromptEnhancer:
    """An ERNIE_ENHANCER; its weights come and go as the host's other models do."""
    import comfy.model_management as mm
    import comfy.ops

    from ...ernie_core.weights.checkpoint import build_enhancer

    dtype = _storage_dtype(component)
    offload = mm.text_encoder_offload_device()
    enhancer = build_enhancer(component, ops=comfy.ops.manual_cast, dtype=dtype, device=offload)
    enhancer.eval().requires_grad_(False)
    mm.archive_model_dtypes(enhancer)
    # Not the dynamic patcher: it leaves the embedding on the meta device, and the answer's scores are read from it.
    patcher = patcher_class(disable_dynamic=True)(
        enhancer, load_device=mm.text_encoder_device(), offload_device=offload
    )
    return PromptEnhancer(patcher, str(component.source))
