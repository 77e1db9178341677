"""Captions in training: several per picture, one drawn per step, and the finite set of texts to encode ahead.

A draw is a function of (seed, sample number) and of the picture's captions, of nothing else: no state is carried, so
any step can be asked for alone, resumed, or drawn on another machine. Drawn numbers come from BLAKE2b, the same in
every version of every package, unlike the streams of random-number libraries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

from ..errors import ErnieError
from ..model.text_encoder import TextStream, Tokenizer

DEFAULT_STYLE = "caption"
TAG_STYLES = (DEFAULT_STYLE, "keyword", "keywords", "tags")  # comma lists may be shuffled; sentences never are
TRIGGER_MARK = "[trigger]"  # ai-toolkit's place holder


class Caption(NamedTuple):
    """One text that describes a picture."""

    style: str
    """What kind of text it is: "caption" (nothing said), "keyword", "sentence", "instruction", or any other word."""
    text: str


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How captions become the text of a step; None = not said, which counts as the neutral value."""

    trigger: str | None = None
    """Word that replaces "[trigger]", or else is put in front as "word, caption"; "" = none."""
    shuffle: bool | None = None
    """Whether the tags of a caption (style caption, keyword or tags) change places."""
    keep_tokens: int | None = None
    """How many tags in front stay where they are."""
    separator: str | None = None
    """What stands between tags; neutral ","."""
    dropout: float | None = None
    """Probability in [0, 1] that a step sees the empty prompt instead."""

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout <= 1:
            raise ErnieError(f"caption dropout must lie between 0 and 1, got {self.dropout:g}.")
        if self.keep_tokens is not None and self.keep_tokens < 0:
            raise ErnieError(f"keep_tokens must be 0 or more, got {self.keep_tokens}.")
        if self.separator is not None and not self.separator.strip():
            raise ErnieError(f"the separator of tags must be a visible character, got {self.separator!r}.")

    def over(self, other: CaptionRules) -> CaptionRules:
        """These rules, and those of `other` where these say nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return CaptionRules(**{k: getattr(other, k) if v is None else v for k, v in values.items()})


def read_styles(text: str) -> tuple[tuple[str, float], ...]:
    """`keyword 1, sentence 3` as (style, weight); "" is none.

    Raises:
        ErnieError: a part is not a kind and a number.
    """
    found: list[tuple[str, float]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, weight = part.rpartition(" ")
        try:
            found.append((name.strip().lower(), float(weight)))
        except ValueError:
            name = ""
        if not name:
            raise ErnieError(f"styles must be like 'keyword 1, sentence 3' (a kind and its weight), got {part!r}.")
    return tuple(found)


class Captioned(Protocol):
    """What a caption can be drawn for: an item of a dataset, or a pair."""

    @property
    def captions(self) -> tuple[Caption, ...]: ...
    @property
    def rules(self) -> CaptionRules: ...


class CaptionOptions(Protocol):
    """What drawing needs to know of `items.DatasetOptions`."""

    @property
    def rules(self) -> CaptionRules: ...
    @property
    def styles(self) -> tuple[tuple[str, float], ...]: ...
    @property
    def shuffle_variants(self) -> int: ...


def draw_uniform(*key: str | int) -> float:
    """A number in [0, 1) that follows from `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def draw_caption(entry: Captioned, options: CaptionOptions, *, seed: int, number: int) -> str:
    """The text that sample `number` of a run with `seed` is trained with; "" when the caption is dropped.

    First dropout, then the style by its weight in `options.styles` (those the picture has; all alike when the mix is
    empty or names none of them), then one caption of that style, then one of `shuffle_variants` orders of its tags,
    then the trigger word.
    """
    rules = options.rules.over(entry.rules)
    if not entry.captions or draw_uniform("dropout", seed, number) < (rules.dropout or 0):
        return ""
    weights = _style_weights(entry.captions, options.styles)
    place = draw_uniform("style", seed, number) * sum(weights.values())
    style = next(iter(weights))
    for style, weight in weights.items():  # noqa: B007  the last one stands when rounding leaves a rest
        place -= weight
        if place < 0:
            break
    texts = [caption.text for caption in entry.captions if caption.style == style]
    text = texts[int(draw_uniform("caption", seed, number) * len(texts))]
    variant = int(draw_uniform("shuffle", seed, number) * max(1, options.shuffle_variants))
    return _finish(text, style, rules, variant)


def all_texts(entries: Iterable[Captioned], options: CaptionOptions) -> tuple[str, ...]:
    """Every text that `draw_caption` can return for `entries`, the empty prompt first, each once, in order."""
    texts: dict[str, None] = {"": None}
    for entry in entries:
        rules = options.rules.over(entry.rules)
        if rules.dropout == 1:
            continue
        weights = _style_weights(entry.captions, options.styles)
        for style, text in entry.captions:
            if style in weights:
                shuffled = rules.shuffle and style in TAG_STYLES
                for variant in range(max(1, options.shuffle_variants) if shuffled else 1):
                    texts[_finish(text, style, rules, variant)] = None
    return tuple(texts)


def _style_weights(captions: Sequence[Caption], mix: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Weight per style that the captions have, in a fixed order; never empty unless there are no captions."""
    present = dict.fromkeys(sorted({caption.style for caption in captions}), 1.0)
    weights = {style: weight for style, weight in sorted(mix) if style in present and weight > 0}
    return weights or present


def _finish(text: str, style: str, rules: CaptionRules, variant: int) -> str:
    if rules.shuffle and style in TAG_STYLES:
        text = shuffle_tags(text, variant, keep=rules.keep_tokens or 0, separator=rules.separator or ",")
    return apply_trigger(text, rules.trigger or "")


def shuffle_tags(text: str, variant: int, *, keep: int = 0, separator: str = ",") -> str:
    """`text` with its tags in the order of `variant`; the first `keep` stay. A function of its arguments alone."""
    tags = [tag.strip() for tag in text.split(separator.strip())]
    tags = [tag for tag in tags if tag]
    head, tail = tags[:keep], tags[keep:]
    order = sorted(range(len(tail)), key=lambda i: (draw_uniform("tag", variant, i, tail[i]), i))
    return f"{separator.strip()} ".join([*head, *(tail[i] for i in order)])


def apply_trigger(text: str, trigger: str) -> str:
    """`text` with "[trigger]" replaced by `trigger`; without the mark and the word itself, it goes in front."""
    if not trigger:
        return text
    if TRIGGER_MARK in text:
        return text.replace(TRIGGER_MARK, trigger)
    if trigger.lower() in text.lower():
        return text
    return f"{trigger}, {text}" if text else trigger


def keyword_columns(text: str, keywords: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Columns of the text features of `text` (0 = BOS) whose tokens spell any part of a keyword; case is ignored.

    A keyword counts where it stands as a whole word; in scripts without spaces, wherever it stands.
    """
    lower = text.lower()
    marked = [False] * len(text)
    fold = len(lower) == len(text)  # a few letters change length in lower case; then case counts
    if not fold:
        lower = text
    for keyword in keywords:
        word = keyword.strip().lower() if fold else keyword.strip()
        start = lower.find(word) if word else -1
        while start >= 0:
            end = start + len(word)
            before, after = lower[start - 1 : start], lower[end : end + 1]
            if not (_joins(before, word[0]) or _joins(word[-1], after)):
                marked[start:end] = [True] * len(word)
            start = lower.find(word, start + 1)
    columns: list[int] = []
    stream, position = TextStream(tokenizer), 0
    pending: list[int] = []
    for column, token in enumerate(tokenizer.encode(text)):
        pending.append(column)
        end = len(stream.push(token))
        if end > position:
            if any(marked[position:end]):
                columns += pending
            position = end
            pending.clear()
    return tuple(column for column in columns if column > 0)


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word of an alphabetic script."""
    return all(c.isalnum() and ord(c) < 0x2E80 for c in (left or " ", right or " "))
