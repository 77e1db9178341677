"""A prompt for a picture with text in it: poster, cover, infographic, comic page or sticker sheet, field by field.

The sentences are in `layout_prompts.json`, by language and layout, in the order of the prompt. Every text that the
picture is to show stands between quotation marks that `enhancing.quotes` recognises; that is checked at the end.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import MAX_TEXT_TOKENS
from .enhancing.quotes import quoted_texts, stray_mark
from .errors import ErnieError

MAX_SIDE = 12  # columns or rows
TOKENS_PER_WORD = 4 / 3  # 2048 tokens are about 1500 words
ENDS = tuple(".!?\u2026\u3002\uff01\uff1f")
_CJK = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"


@functools.cache
def templates() -> dict[str, dict[str, Any]]:
    """language -> {"space", "stop", "list", "marks", "layouts"}."""
    return json.loads(Path(__file__).with_name("layout_prompts.json").read_text(encoding="utf-8"))


def languages() -> list[str]:
    return list(templates())


def layouts() -> list[str]:
    return list(templates()[languages()[0]]["layouts"])


@dataclass(frozen=True, kw_only=True)
class LayoutPrompt:
    """What the fields of a picture with text hold; an empty field is left out of the prompt."""

    layout: str
    """One of `layouts()`."""
    language: str
    """Of the sentences around the fields, one of `languages()`."""
    subject: str = ""
    """What is seen; line breaks become blanks."""
    style: str = ""
    title: str = ""
    """One line, shown as it is."""
    subtitle: str = ""
    """One line, shown as it is."""
    body: str = ""
    """A line each: text shown as it is, or, in comics and stickers, a panel, whose text stands in quotation marks."""
    columns: int = 2
    """Of the grid, 1 to 12; read in comics and stickers only."""
    rows: int = 2
    """Of the grid, 1 to 12; read in comics and stickers only."""

    def __post_init__(self):
        for name, value, known in (("layout", self.layout, layouts()), ("language", self.language, languages())):
            if value not in known:
                raise ErnieError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if not any(text.strip() for text in (self.subject, self.title, self.subtitle, self.body)):
            raise ErnieError("there is nothing to lay out: fill in subject, title, subtitle or body.")
        for name in ("title", "subtitle"):
            if (count := len(getattr(self, name).strip().splitlines())) > 1:
                raise ErnieError(f"{name} must be one line, got {count}: put the other lines into body.")
        if not self.has_panels:
            return
        for name in ("columns", "rows"):
            if not 1 <= getattr(self, name) <= MAX_SIDE:
                raise ErnieError(f"{name} must be 1 to {MAX_SIDE}, got {getattr(self, name)}.")
        if len(self.lines) > self.columns * self.rows:
            raise ErnieError(
                f"body has {len(self.lines)} lines, one per panel, and the grid of {self.columns} x {self.rows} holds "
                f"{self.columns * self.rows}: raise columns or rows, or take lines out."
            )

    @property
    def sentences(self) -> dict[str, str]:
        return templates()[self.language]["layouts"][self.layout]

    @property
    def has_panels(self) -> bool:
        return "panel" in self.sentences

    @property
    def lines(self) -> list[str]:
        """Lines of `body` that hold something, without the blanks around them."""
        return [line.strip() for line in self.body.splitlines() if line.strip()]

    def write(self) -> str:
        """The prompt, in one line.

        Raises:
            ErnieError: quotation marks without partners in a description, or every kind of them in a text to show.
        """
        fields, shown = self._fields()
        words = templates()[self.language]
        parts = [self.sentences["alone"]] if "subject" not in fields else []
        for slot, sentence in self.sentences.items():
            if slot == "panel":
                parts += [sentence.format(number=i, text=line) for i, line in enumerate(self.lines, 1)]
            elif slot == "grid":
                panels = len(self.lines) or self.columns * self.rows
                parts.append(sentence.format(panels=panels, columns=self.columns, rows=self.rows))
            elif slot in fields:
                parts.append(sentence.format(text=fields[slot]))
        prompt = words["space"].join(_ended(part, words["stop"]) for part in parts)
        if (found := quoted_texts(prompt)) != list(dict.fromkeys(shown)):
            raise ErnieError(
                f"the quotation marks run into each other: the picture should show {shown}, the prompt quotes {found}. "
                'Put text in subject, style and panels between double marks, as "text".'
            )
        return prompt

    def _fields(self) -> tuple[dict[str, str], list[str]]:
        """(slot -> what stands in it, if anything; the texts to show in their order)."""
        fields: dict[str, str] = {}
        shown: list[str] = []
        for name in ("subject", "style"):
            if text := " ".join(line.strip() for line in getattr(self, name).splitlines() if line.strip()):
                fields[name] = _described(name, text)
                shown += quoted_texts(fields[name])
        for name in ("title", "subtitle"):
            if text := getattr(self, name).strip():
                fields[name] = self._quote(name, text)
                shown.append(text)
        for number, line in enumerate(self.lines, 1):
            if self.has_panels:
                shown += quoted_texts(_described(f"line {number} of body", line))
            else:
                quoted = self._quote(f"line {number} of body", line)
                fields["body"] = templates()[self.language]["list"].join(filter(None, (fields.get("body"), quoted)))
                shown.append(line)
        return fields, shown

    def _quote(self, name: str, text: str) -> str:
        """`text` between the first marks of the language that it does not hold itself."""
        for opening, closing in templates()[self.language]["marks"]:
            quoted = opening + text + closing
            if opening not in text and closing not in text and quoted_texts(quoted) == [text]:
                return quoted
        raise ErnieError(f"{name} holds every kind of quotation marks: leave one kind out, got {text!r}.")


def report(page: LayoutPrompt, prompt: str, num_tokens: int | None = None) -> str:
    """What is in the prompt of `page`: words, tokens (an estimate where `num_tokens` is None), texts to show, notes.

    Raises:
        ErnieError: there are more tokens than the text encoder reads.
    """
    num_words = count_words(prompt)
    if num_tokens is not None and num_tokens > MAX_TEXT_TOKENS:
        raise ErnieError(
            f"the prompt has {num_tokens} tokens and the text encoder reads {MAX_TEXT_TOKENS}: shorten the fields."
        )
    counted = f"{num_tokens} tokens" if num_tokens is not None else f"about {estimate_tokens(prompt)} tokens"
    lines = [f"{page.layout}, {page.language}: {num_words} words, {counted} of {MAX_TEXT_TOKENS}"]
    if num_tokens is None and estimate_tokens(prompt) > MAX_TEXT_TOKENS:
        lines.append("Probably too long: the end would be cut off. Shorten the fields, or connect clip to count.")
    lines += [f"shows: {text}" for text in quoted_texts(prompt)]
    if page.has_panels and (free := page.columns * page.rows - len(page.lines)):
        lines.append(f"not described: {free} of {page.columns * page.rows} panels")
    return "\n".join(lines)


def count_words(text: str) -> int:
    """Words, where each Chinese, Japanese or Korean character is one."""
    return len(re.findall(_CJK, text)) + len(re.findall(r"\w+(?:['\u2019-]\w+)*", re.sub(_CJK, " ", text)))


def estimate_tokens(text: str) -> int:
    """About how many tokens `text` has: 4/3 per word, one per Chinese, Japanese or Korean character."""
    characters = len(re.findall(_CJK, text))
    return round(characters + TOKENS_PER_WORD * (count_words(text) - characters))


def _described(name: str, text: str) -> str:
    """A description as it is, once its quotation marks are known to pair."""
    if mark := stray_mark(text):
        raise ErnieError(f'{name} has a {mark} without its partner: write text to show as "text", got {text!r}.')
    return text


def _ended(sentence: str, stop: str) -> str:
    """The sentence with a full stop, unless it ends with one, or with quoted text that does."""
    return sentence if sentence.rstrip("\"'\u201d\u2019\u300d\u300f\u00bb\uff02").endswith(ENDS) else sentence + stop
