"""Asking for a detailed prompt: presets, language and length, variants, and quoted text that must not change."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ErnieError
from .quotes import missing_texts

logger = logging.getLogger(__name__)

# The three settings in use; all allow 2048 tokens.
PRESETS: dict[str, dict[str, float]] = {
    "diffusers": {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    "README": {"temperature": 0.6, "top_p": 0.8, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    "core": {"temperature": 0.6, "top_p": 0.8, "top_k": 64, "min_p": 0.05, "repetition_penalty": 1.05},
}
"""diffusers' pipeline, the model's README (vLLM), and ComfyUI's template (TextGenerate)."""

AUTO = "auto"
"""Neutral: the official instruction, which names neither language nor length."""
NUM_SEEDS = 2**64

Quotes = Literal["append", "report", "ignore"]
QUOTES: tuple[Quotes, ...] = get_args(Quotes)


@functools.cache
def instructions() -> dict[str, dict[str, str]]:
    """Sentences that are added to the official instruction, by what they control and how."""
    return json.loads(Path(__file__).with_name("instructions.json").read_text(encoding="utf-8"))


def instruction(language: str = AUTO, length: str = AUTO, words: int = 150) -> str | None:
    """The official instruction with what is asked for added; None, the official one itself, where both are "auto".

    Raises:
        ErnieError: a choice that does not exist, or a number of words that is not positive.
    """
    added: list[str] = []
    for name, value in (("language", language), ("length", length)):
        choices = instructions()[name]
        if value == AUTO:
            continue
        if value not in choices:
            raise ErnieError(f"{name} must be one of {', '.join([AUTO, *choices])}, got {value!r}.")
        added.append(choices[value])
    if length == "words" and words < 1:
        raise ErnieError(f"words must be 1 or more, got {words}.")
    from ..model.enhancer import default_system_prompt  # here: it brings torch, and the node reads the choices above

    return default_system_prompt() + "".join(added).replace("{words}", str(words)) if added else None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides one answer. Two equal requests to the same enhancer have the same answer."""

    prompt: str
    width: int
    height: int
    seed: int
    settings: Mapping[str, float]
    """temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens."""
    system: str | None = None
    quotes: Quotes = "append"
    retries: int = 2
    """How often an answer that lost quoted text is written anew."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**vars(self), "settings": dict(self.settings)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    text: str
    notes: tuple[str, ...] = ()
    """What had to be done about quoted text."""


Write = Callable[[Sequence[int], Sequence[int]], list[str]]
"""(seeds, which variants they are for) -> texts."""


def variants(request: Request, count: int) -> list[Request]:
    """`count` requests whose seeds follow each other: number i is what its seed gives alone."""
    if count < 1:
        raise ErnieError(f"variants must be 1 or more, got {count}.")
    return [replace(request, seed=(request.seed + i) % NUM_SEEDS) for i in range(count)]


def retry_seed(seed: int, attempt: int) -> int:
    """The seed of another try; far from the seeds of the variants beside it."""
    return (seed + attempt * 0x9E3779B97F4A7C15) % NUM_SEEDS  # 2**64 / golden ratio


def answer_requests(write: Write, requests: Sequence[Request], numbers: Sequence[int]) -> list[Answer]:
    """Answers to requests that differ in their seed only; those that lost quoted text are written anew.

    Args:
        write: writes texts, all at once where it can.
        numbers: which variant each request is, for what is shown while it is written.
    """
    if not requests:
        return []
    first = requests[0]
    texts = write([request.seed for request in requests], numbers)
    tries = [1] * len(requests)
    # the likeliest text stays the likeliest
    retries = 0 if first.quotes == "ignore" or not first.settings.get("temperature") else first.retries
    for attempt in range(1, retries + 1):
        lost = [i for i, text in enumerate(texts) if missing_texts(first.prompt, text)]
        if not lost:
            break
        again = write([retry_seed(requests[i].seed, attempt) for i in lost], [numbers[i] for i in lost])
        for i, text in zip(lost, again, strict=True):
            tries[i] = attempt + 1
            if len(missing_texts(first.prompt, text)) < len(missing_texts(first.prompt, texts[i])):
                texts[i] = text
    return [_answer(request, text, n) for request, text, n in zip(requests, texts, tries, strict=True)]


def _answer(request: Request, text: str, tries: int) -> Answer:
    notes: list[str] = [] if tries == 1 else [f"quoted text was lost at first: written {tries} times"]
    lost = [] if request.quotes == "ignore" else missing_texts(request.prompt, text)
    if lost:
        shown = ", ".join(f'"{part}"' for part in lost)
        done = "added at the end" if request.quotes == "append" else "not in the text"
        notes.append(f"{shown} {done}")
        logger.warning("the enhancer lost quoted text of the prompt: %s, %s", shown, done)
        if request.quotes == "append":
            text = " ".join([text, *(shown_sentence(part, text) for part in lost)])
    return Answer(text=text, notes=tuple(notes))


def shown_sentence(part: str, text: str) -> str:
    """A sentence, in the language of `text`, that has the picture show `part`."""
    is_chinese = len(re.findall("[\u4e00-\u9fff]", text)) > len(text) / 4
    marks = "\u201c\u201d" if '"' in part else '""'
    return instructions()["shown"]["zh" if is_chinese else "en"].replace("{text}", marks[0] + part + marks[1])
