"""Prompts: encoding them, and having them written out first."""

from __future__ import annotations

from collections import OrderedDict

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .loading import Enhancer
from .sampling import MAX_SEED, size_inputs

CATEGORY = "ERNIE/text"
MAX_NEW_TOKENS = 2048  # what the official pipeline allows, and what the text encoder reads

CACHE_SIZE = 64
_enhanced: OrderedDict[tuple, str] = OrderedDict()  # text only: nothing that outlives a run may hold a tensor


class ErnieEncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieEncodePrompt",
            display_name="Encode Prompt (ERNIE)",
            category=CATEGORY,
            description="Turns a prompt into the conditioning that ERNIE-Image was trained with.",
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder, from these loaders or from core's."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the picture shows, in any language, up to 2048 tokens (about 1500 words); more is "
                    "cut off "
                    "with a warning. Brackets and weights such as (word:1.2) are read as plain text. Empty is the "
                    "official "
                    "negative prompt.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="Encoded prompt for the sampler.")],
        )

    @classmethod
    def execute(cls, clip, prompt: str) -> io.NodeOutput:
        return io.NodeOutput(host.encode_prompt(clip, prompt))


class ErnieEnhancePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieEnhancePrompt",
            display_name="Enhance Prompt (ERNIE)",
            category=CATEGORY,
            description="Lets the official language model write a short prompt out into a detailed one.",
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The short prompt. The model often answers in Chinese, which ERNIE-Image reads just as "
                    "well.",
                ),
                Enhancer.Input(
                    "enhancer", lazy=True, tooltip="Prompt enhancer. Not loaded at all while enabled is off."
                ),
                io.Boolean.Input(
                    "enabled",
                    default=True,
                    tooltip="Off (neutral): the prompt passes through unchanged and the enhancer is neither loaded "
                    "nor run.",
                ),
                *size_inputs("Picture %s in pixels: the enhancer is told the size and composes for it."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Another seed words it differently; the same seed repeats the text. Unused at "
                    "temperature 0.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.6,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How freely words are chosen, 0 to 2. 0 = always the likeliest word; 0.6 is the official "
                    "value.",
                ),
                io.Float.Input(
                    "top_p",
                    default=0.95,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Choose among the likeliest words that together reach this probability, 0.01 to 1. 1 = "
                    "off; "
                    "0.95 is the official pipeline's value, 0.8 that of the README and of ComfyUI's template.",
                ),
                io.Int.Input(
                    "top_k",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Choose among this many likeliest words, 0 to 1000. 0 = off (official).",
                ),
                io.Float.Input(
                    "min_p",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Leave out words less likely than this share of the likeliest one, 0 to 1. 0 = off "
                    "(official).",
                ),
                io.Float.Input(
                    "repetition_penalty",
                    default=1.0,
                    min=0.5,
                    max=2.0,
                    step=0.01,
                    tooltip="Above 1 makes words that were already used less likely, 0.5 to 2. 1 = off (official).",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=MAX_NEW_TOKENS,
                    min=1,
                    max=MAX_NEW_TOKENS,
                    tooltip="Longest answer in tokens, 1 to 2048; the text is cut there. 2048 is the official value.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="enhanced", tooltip="The detailed prompt, or the original when switched off."
                ),
                io.String.Output(display_name="original", tooltip="The prompt as it was, for comparing side by side."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(cls, prompt: str, enabled: bool, enhancer=None, **others) -> list[str]:
        return ["enhancer"] if enabled and enhancer is None else []

    @classmethod
    def execute(cls, prompt: str, enabled: bool, width: int, height: int, enhancer=None, **settings) -> io.NodeOutput:
        if not enabled:
            return io.NodeOutput(prompt, prompt)
        if enhancer is None:
            raise ErnieError(
                "Enhance Prompt needs an enhancer: connect Load Prompt Enhancer, switch load_enhancer on in "
                "Load ERNIE-Image, or switch enabled off."
            )
        return io.NodeOutput(enhance(enhancer, prompt, width, height, settings, cls.hidden.unique_id), prompt)


def enhance(enhancer, prompt: str, width: int, height: int, settings: dict, node_id: str | None) -> str:
    """The enhanced prompt, from the cache when the same enhancer was asked the same before; shown as it is written."""
    key = (enhancer.source, prompt, width, height, *sorted(settings.items()))
    if key not in _enhanced:
        _enhanced[key] = enhancer.enhance(
            prompt, width, height, on_token=lambda text: host.show_text(node_id, text), **settings
        )
        if len(_enhanced) > CACHE_SIZE:
            _enhanced.popitem(last=False)
    _enhanced.move_to_end(key)
    host.show_text(node_id, _enhanced[key])
    return _enhanced[key]
