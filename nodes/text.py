"""Prompts: encoding them, and having them written out first."""

from __future__ import annotations

from comfy_api.latest import io

from ..ernie_core.enhancing import writing
from ..ernie_core.enhancing.writing import AUTO, PRESETS, QUOTES
from ..ernie_core.errors import ErnieError
from . import host
from .loading import Enhancer
from .picture_notes import note_in_pictures
from .sampling import CUSTOM, MAX_SEED, size_inputs

CATEGORY = "ERNIE/text"
MAX_NEW_TOKENS = 2048  # what the official pipeline allows, and what the text encoder reads


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
                *writing_inputs(),
            ],
            outputs=[
                io.String.Output(
                    display_name="enhanced", tooltip="The detailed prompt, or the original when switched off."
                ),
                io.String.Output(display_name="original", tooltip="The prompt as it was, for comparing side by side."),
                io.String.Output(
                    display_name="variants",
                    tooltip="All detailed prompts as a list: nodes behind it run once for each.",
                    is_output_list=True,
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="One line per variant: its seed, whether it was written or kept from before, and what "
                    "happened to quoted text.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def check_lazy_status(cls, prompt: str, enabled: bool, enhancer=None, **others) -> list[str]:
        return ["enhancer"] if enabled and enhancer is None else []

    @classmethod
    def execute(
        cls, prompt, enabled, width, height, seed, enhancer=None, preset=CUSTOM, language=AUTO, length=AUTO, words=150,
        quoted_text: writing.Quotes = QUOTES[0], retries=2, variants=1, cache=True, **settings,
    ) -> io.NodeOutput:  # fmt: skip
        if not enabled:
            return io.NodeOutput(prompt, prompt, [prompt], "switched off")
        if enhancer is None:
            raise ErnieError(
                "Enhance Prompt needs an enhancer: connect Load Prompt Enhancer, switch load_enhancer on in "
                "Load ERNIE-Image, or switch enabled off."
            )
        request = writing.Request(
            prompt=prompt,
            width=width,
            height=height,
            seed=seed,
            settings=settings | PRESETS.get(preset, {}),
            system=writing.instruction(language, length, words),
            quotes=quoted_text,
            retries=retries,
        )
        texts, report = enhance(enhancer, writing.variants(request, variants), cache, cls.hidden)
        return io.NodeOutput(texts[0], prompt, texts, report)


class ErnieServerEnhancer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieServerEnhancer",
            display_name="Enhancer on a Server (ERNIE)",
            category=CATEGORY,
            description="Lets a language model on your own OpenAI-compatible server write prompts out.",
            inputs=[
                io.Boolean.Input(
                    "send_prompts",
                    default=False,
                    tooltip="On: prompts are sent to the address below. Off (neutral): nothing is ever sent, and "
                    "Enhance Prompt stops with a message.",
                ),
                io.String.Input(
                    "url",
                    default="http://127.0.0.1:8080/v1",
                    tooltip="Where the server's chat API begins, without chat/completions: llama.cpp, vLLM, Ollama, "
                    "LM Studio or a paid service.",
                ),
                io.String.Input(
                    "model", default="default", tooltip="Name under which the server knows the model, as it lists it."
                ),
                io.String.Input(
                    "key_variable",
                    default="",
                    tooltip="Name of the environment variable that holds the key, such as OPENAI_API_KEY; never the "
                    "key itself, which is saved nowhere. Empty (neutral) = no key.",
                ),
                io.Int.Input(
                    "timeout",
                    default=120,
                    min=1,
                    max=3600,
                    tooltip="How long the server may stay silent, 1 to 3600 seconds.",
                ),
                io.Int.Input(
                    "retries",
                    default=3,
                    min=0,
                    max=10,
                    tooltip="How often a busy, failing or missing server is asked again, 0 to 10. 0 = never (neutral).",
                ),
            ],
            outputs=[Enhancer.Output(display_name="enhancer", tooltip="Prompt enhancer for Enhance Prompt.")],
        )

    @classmethod
    def execute(cls, send_prompts, url, model, key_variable, timeout, retries) -> io.NodeOutput:
        from ..ernie_core.enhancing.server import ServerEnhancer

        if not send_prompts:
            raise ErnieError(
                "Enhancer on a Server would send prompts to another program: switch send_prompts on to allow it."
            )
        return io.NodeOutput(
            ServerEnhancer(
                url,
                model,
                key_variable=key_variable,
                timeout_s=timeout,
                retries=retries,
                check=host.throw_if_interrupted,
            )
        )


def enhance(enhancer, requests: list, cache: bool, hidden) -> tuple[list[str], str]:
    """(detailed prompts, report); what the same enhancer was asked before comes from the disk, the rest is shown as
    it is written. Both prompts go into the pictures that this run saves."""
    from ..ernie_core.enhancing.disk_cache import DiskCache

    kept = DiskCache(host.user_folder() / "enhanced")
    source = enhancer.fingerprint
    keys = [{"enhancer": source, **request.as_dict()} for request in requests]
    found = {i: answer for i, key in enumerate(keys) if cache and (answer := kept.get(key))}
    missing = [i for i in range(len(requests)) if i not in found]

    def write(seeds, numbers) -> list[str]:
        def show(row: int, text: str) -> None:
            host.show_text(hidden.unique_id, titled(numbers[row], len(requests), text))

        first = requests[0]
        return enhancer.enhance_variants(
            first.prompt,
            first.width,
            first.height,
            seeds=seeds,
            system=first.system,
            on_token=show,
            **first.settings,
        )

    written = dict(zip(missing, writing.answer_requests(write, [requests[i] for i in missing], missing), strict=True))
    for i, answer in written.items():
        if cache:
            kept.put(keys[i], answer)
    answers = [(found | written)[i] for i in range(len(requests))]
    texts = [answer.text for answer in answers]
    host.show_text(hidden.unique_id, "\n\n".join(titled(i, len(texts), text) for i, text in enumerate(texts)))
    note_in_pictures(hidden, requests[0].prompt, texts)
    lines = (
        "; ".join([f"{i + 1}: seed {request.seed}", "kept from before" if i in found else "written", *answer.notes])
        for i, (request, answer) in enumerate(zip(requests, answers, strict=True))
    )
    return texts, "\n".join(lines)


def titled(number: int, total: int, text: str) -> str:
    return text if total == 1 else f"{number + 1} of {total}: {text}"


def writing_inputs() -> list:
    """Inputs that came later: optional, so that older workflows need none of them, and behind all others."""
    choices = writing.instructions()
    return [
        io.Combo.Input(
            "preset",
            options=[CUSTOM, *PRESETS],
            default=CUSTOM,
            optional=True,
            tooltip="Whose settings choose the words: those of diffusers' pipeline, of the model's README or of "
            "ComfyUI's template. custom (neutral) takes the five values above.",
        ),
        io.Combo.Input(
            "language",
            options=[AUTO, *choices["language"]],
            default=AUTO,
            optional=True,
            tooltip="Language of the answer, asked for in one sentence behind the official instruction. auto "
            "(neutral) leaves the instruction as it is; the model then often answers in Chinese.",
        ),
        io.Combo.Input(
            "length",
            options=[AUTO, *choices["length"]],
            default=AUTO,
            optional=True,
            tooltip="Length of the answer, asked for likewise: short is up to 60 words, medium about 150, long about "
            "350, words as many as below. auto (neutral) leaves the instruction as it is.",
        ),
        io.Int.Input(
            "words",
            default=150,
            min=1,
            max=1500,
            optional=True,
            tooltip="About how many words to ask for, 1 to 1500, when length is words. Otherwise unused (neutral).",
        ),
        io.Combo.Input(
            "quoted_text",
            options=list(QUOTES),
            default=QUOTES[0],
            optional=True,
            tooltip="What happens when the answer lost text that the prompt has between quotation marks, after all "
            "retries: append adds a sentence with it, report only says so, ignore (neutral) does not look.",
        ),
        io.Int.Input(
            "retries",
            default=2,
            min=0,
            max=10,
            optional=True,
            tooltip="How often an answer that lost quoted text is written anew with another seed, 0 to 10. 0 = never "
            "(neutral). Unused at temperature 0 and where quoted_text is ignore.",
        ),
        io.Int.Input(
            "variants",
            default=1,
            min=1,
            max=64,
            optional=True,
            tooltip="How many texts to write, 1 to 64, with this seed, the next, and so on. 1 = one (neutral).",
        ),
        io.Boolean.Input(
            "cache",
            default=True,
            optional=True,
            tooltip="On: texts are kept in ComfyUI's user folder (the last 2000) and the same question is not asked "
            "twice, also after a restart. Off (neutral): nothing is read or kept.",
        ),
    ]
