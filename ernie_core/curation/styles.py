"""Rewriting captions into the ways people write prompts, in chosen shares, without losing what must stay.

    keyword       short phrases with commas
    natural       how a person asks for a picture
    instruction   begins with a verb: draw, create
    detailed      everything that is known, in order
    original      the fullest caption as it is

Which style a row gets is drawn from (seed, id): it does not depend on other rows, on their order or on workers. The
report on ERNIE-Image names these four styles and no shares; PRESETS are ours.

Rules write without any model, from the captions of several lengths and the structured description where a row has
them, else from the one caption. A language model writes more freely. Either way the result is checked: every text
between quotation marks and every name of the caption must still be there, and no quoted text may be new, since it would
teach the model to paint it. What fails is written anew, and in the end the row keeps the original, which is noted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ..enhancing.quotes import missing_texts, quoted_spans, quoted_texts
from ..errors import ErnieError
from .answers import is_refusal
from .captions import best_text
from .manifest import Row
from .vision_language import Question, Writer, question_seed

Style = Literal["keyword", "natural", "instruction", "detailed", "original"]
STYLES: tuple[Style, ...] = get_args(Style)
CUSTOM = "custom"
PRESETS: dict[str, dict[str, float]] = {
    "even": dict.fromkeys(("keyword", "natural", "instruction", "detailed"), 1.0),
    "mostly detailed": {"detailed": 0.5, "natural": 0.2, "instruction": 0.15, "keyword": 0.15},
    "as it is": {"original": 1.0},
}
RULES = 1  # raise it when the same row gives another prompt
MAX_CHARS = 6000  # of a model's answer; longer ones run in circles

_OPENERS = re.compile(
    r"^(?:(?:this|the|an?) )?(?:image|picture|photo|photograph|illustration)s? "
    r"(?:of|shows?|showing|depicts?|depicting) ",
    re.IGNORECASE,
)
_PARTS = re.compile(r"[,;.!?\uff0c\u3002\uff1b\u3001\uff01\uff1f]+(?:\s|$|(?<=[\uff0c\u3002\uff1b\u3001\uff01\uff1f]))")
_JOINTS = re.compile(
    r"\s(?:on|in|at|with|under|over|above|below|beside|behind|near|against|while|and there (?:is|are)) ", re.IGNORECASE
)
_ARTICLE = re.compile(r"^(?:an?|the|there (?:is|are)|it (?:is|has)) ", re.IGNORECASE)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|(?:show|stand|sit|run|hold|wear|look|walk|play|eat|hang|feature|depict|contain|lie)s?"
    r"|flies)\b",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<=[\w,;:] )(?:[A-Z][\w'\u2019-]+)(?: [A-Z][\w'\u2019-]+)*")
_HAN = re.compile("[\u4e00-\u9fff]")


@functools.cache
def _words() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("styles.json").read_text(encoding="utf-8"))


# --- shares -----------------------------------------------------------------------------------------------------------


def check_shares(shares: Mapping[str, float]) -> dict[Style, float]:
    """The shares, summing to 1, zeros left out.

    Raises ErnieError: an unknown style, a negative or infinite share, or nothing above 0.
    """
    unknown = [style for style in shares if style not in STYLES]
    if unknown:
        raise ErnieError(f"styles must be some of {', '.join(STYLES)}, got {', '.join(unknown)}.")
    wrong = next((f"{style} {share}" for style, share in shares.items() if not 0 <= share < float("inf")), None)
    total = sum(shares.values()) if wrong is None else 0.0
    if wrong is not None or not total:
        raise ErnieError(f"shares must be 0 or more, and one above 0, got {wrong or 'only zeros'}.")
    return {style: shares[style] / total for style in STYLES if shares.get(style)}


def draw_style(shares: Mapping[Style, float], seed: int, row: str) -> Style:
    """The style of a row: the same for the same shares, seed and id, whatever other rows there are."""
    point = _uniform(seed, "style", row)
    for style, share in shares.items():
        point -= share
        if point < 0:
            return style
    return list(shares)[-1]  # rounding


def _uniform(seed: int, what: str, row: str) -> float:
    digest = hashlib.sha256(f"{seed} {what} {row}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


# --- what must stay ---------------------------------------------------------------------------------------------------


def named_facts(text: str, entities: Sequence[str] = ()) -> list[str]:
    """Names in a text: those of `entities` that occur in it, or else runs of capitalised words inside of sentences.

    The latter finds "Eiffel Tower" and misses names at the start of a sentence and in scripts without capitals.
    """
    if entities:
        return [name for name in dict.fromkeys(entities) if name.casefold() in text.casefold()]
    bare = "".join(" " * len(p) if i % 2 else p for i, p in enumerate(_split_quotes(text)))
    return list(dict.fromkeys(match.group() for match in _NAME.finditer(bare)))


def faults(source: str, answer: str, entities: Sequence[str] = ()) -> list[str]:
    """Why `answer` may not stand for `source`: quoted texts and names that it lost, quoted texts that are new."""
    found = [f'"{text}" was lost' for text in missing_texts(source, answer)]
    found += [f'"{text}" lost its quotation marks' for text in _unquoted(source, answer)]
    found += [f'"{text}" is new' for text in quoted_texts(answer) if text not in source]
    folded = answer.casefold()
    found += [f"{name} was lost" for name in named_facts(source, entities) if name.casefold() not in folded]
    return found


def _unquoted(source: str, answer: str) -> list[str]:
    held = quoted_texts(answer)
    return [text for text in quoted_texts(source) if text in answer and not any(text in quoted for quoted in held)]


def _split_quotes(text: str) -> list[str]:
    """The text in parts: outside, quoted with its marks, outside, ..."""
    parts: list[str] = []
    end = 0
    for start, stop in quoted_spans(text):
        parts += [text[end:start], text[start:stop]]
        end = stop
    return [*parts, text[end:]]


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is known of a row's picture."""

    text: str
    """The fullest caption."""
    captions: Mapping[str, str]
    description: Mapping[str, Any]

    @classmethod
    def of(cls, row: Row) -> Source:
        known = {k: row.get(k) for k in ("captions", "caption")}
        return cls(text=best_text(known), captions=row.get("captions") or {}, description=row.get("description") or {})

    @property
    def entities(self) -> list[str]:
        return list(self.description.get("entities") or [])

    @property
    def language(self) -> str:
        return "zh" if len(_HAN.findall(self.text)) > len(self.text) / 4 else "en"


class Rewriter(Protocol):
    """What writes prompts; picklable."""

    def key(self) -> str: ...

    def rewrite(self, sources: Sequence[tuple[str, Source, Style]]) -> list[str | ErnieError]:
        """A prompt for each (row's id, what is known, style); unchecked."""
        ...


class RuleRewriter:
    """Writes by rules; the wording is drawn from (seed, id)."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def key(self) -> str:
        return f"rules {RULES} {self.seed}"

    def rewrite(self, sources: Sequence[tuple[str, Source, Style]]) -> list[str | ErnieError]:
        return [write_by_rules(source, style, self.seed, row) for row, source, style in sources]


def write_by_rules(source: Source, style: Style, seed: int = 0, row: str = "") -> str:
    """A prompt in `style`; the wording is drawn from (seed, row)."""
    words = _words()[source.language]
    if style == "original":
        return source.text
    if style == "keyword":
        return _keywords(source, words["comma"])
    if style == "detailed":
        return _detailed(source, words["detailed"])
    lengths = ("medium", "short", "prompt") if style == "natural" else ("short", "prompt", "medium")
    known = [source.captions[length] for length in lengths if source.captions.get(length)]
    text = _pick(known, seed, "length", row) if known else source.text
    if faults(source.text, text, source.entities):  # it is shorter and lacks what must stay
        text = source.text
    return _phrase(_strip_end(_OPENERS.sub("", text)), style, words, seed, row)


def _phrase(text: str, style: str, words: Mapping[str, Any], seed: int, row: str) -> str:
    plain = "".join(
        " " * len(p) if i % 2 else p for i, p in enumerate(_split_quotes(text))
    )  # quoted text is no grammar
    if re.search(r"[.!?]\s|[\u3002\uff01\uff1f]", plain):
        kind = "instruction_long" if style == "instruction" else "natural_sentence"
        template = words[kind][0] if style == "natural" else _pick(words[kind], seed, style, row)
    elif _ARTICLE.match(text) and not _VERB.search(plain):
        template = _pick(words[style], seed, style, row)
    else:
        template = _pick(words[f"{style}_sentence"], seed, style, row)
    low = text[0].lower() + text[1:] if _ARTICLE.match(text) else text
    return _fill(template, thing=low, text=low, Text=text[0].upper() + text[1:])


def _fill(template: str, **values: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match.group(1)], template)


def _pick(choices: Sequence[str], seed: int, what: str, row: str) -> str:
    return choices[int(_uniform(seed, what, row) * len(choices))]


def _strip_end(text: str) -> str:
    return text.strip().rstrip(".\u3002 ").strip() or text.strip()


def _keywords(source: Source, comma: str) -> str:
    tags = source.captions.get("tags")
    phrases = [tag.strip() for tag in tags.split(",")] if tags else _phrases(source.text)
    phrases = [phrase for phrase in dict.fromkeys(phrases) if phrase]
    made = comma.join(phrases)
    marks = ("\u201c", "\u201d")
    kept = [f'"{t}"' if '"' not in t else marks[0] + t + marks[1] for t in quoted_texts(source.text)]
    held = quoted_texts(made)
    phrases += [text for text in kept if not any(text[1:-1] in quoted for quoted in held)]
    phrases += [name for name in named_facts(source.text, source.entities) if name.casefold() not in made.casefold()]
    return comma.join(dict.fromkeys(phrases)) or source.text


def _phrases(text: str) -> list[str]:
    """Short phrases of a sentence or paragraph; quoted text stays whole."""
    spans = _split_quotes(_OPENERS.sub("", text))
    coded = "".join(f"\x00{i}\x00" if i % 2 else part for i, part in enumerate(spans))
    phrases: list[str] = []
    for part in _PARTS.split(coded):
        for phrase in _JOINTS.split(part) if len(part.split()) > 3 else [part]:
            bare = _ARTICLE.sub("", phrase.strip()).strip()
            phrases.append(re.sub("\x00(\\d+)\x00", lambda match: spans[int(match.group(1))], bare))
    return phrases


def _detailed(source: Source, labels: Mapping[str, str]) -> str:
    text = source.text.strip()
    if not re.search(r"[.!?\u3002\uff01\uff1f\"\u201d]$", text):
        text += "\u3002" if source.language == "zh" else "."
    text = text[0].upper() + text[1:]
    more = [
        label.replace("{value}", _strip_end(str(source.description[field])))
        for field, label in labels.items()
        if source.description.get(field) and str(source.description[field]).casefold() not in text.casefold()
    ]
    return ("" if source.language == "zh" else " ").join([text, *more])


# --- by a language model ----------------------------------------------------------------------------------------------


class LanguageRewriter:
    """Writes by a language model, several tries where an answer lost or invented something."""

    def __init__(
        self, writer: Writer, *, temperature: float = 0.6, max_tokens: int = 512, retries: int = 2, seed: int = 0
    ):
        """Raises ErnieError: a value is out of its range."""
        if not 0 <= temperature <= 2:
            raise ErnieError(f"temperature must lie between 0 and 2, got {temperature:g}.")
        for name, value, least in (("max_tokens", max_tokens, 1), ("retries", retries, 0)):
            if value < least:
                raise ErnieError(f"{name} must be {least} or more, got {value}.")
        self.writer, self.temperature, self.max_tokens = writer, temperature, max_tokens
        self.retries, self.seed = retries, seed

    def key(self) -> str:
        settings = [self.writer.key(), _words()["ask"], self.temperature, self.max_tokens, self.retries, self.seed]
        return hashlib.sha256(json.dumps([RULES, settings]).encode()).hexdigest()[:16]

    def rewrite(self, sources: Sequence[tuple[str, Source, Style]]) -> list[str | ErnieError]:
        made: list[str | ErnieError] = [source.text for _, source, _ in sources]
        waiting = [i for i, (_, _, style) in enumerate(sources) if style != "original"]
        for attempt in range(self.retries + 1):
            if not waiting:
                break
            answers = self.writer.write(
                [Question(sources[i][1].text, system=instruction(sources[i][2])) for i in waiting],
                seeds=[question_seed(self.seed, sources[i][0], attempt) for i in waiting],
                temperature=max(self.temperature, 0.6) if attempt else self.temperature,
                max_tokens=self.max_tokens,
            )
            again: list[int] = []
            for i, answer in zip(waiting, answers, strict=True):
                made[i] = answer if isinstance(answer, ErnieError) else _clean(answer)
                if isinstance(answer, str) and check_answer(sources[i][1], made[i]):
                    again.append(i)
            waiting = again
        return made


def instruction(style: Style) -> str:
    """What a language model is told for a style."""
    ask = _words()["ask"]
    return f"{ask[style]} {ask['all']}"


def _clean(answer: str) -> str:
    text = re.sub(r"^```\w*\n|\n```$", "", answer.strip())
    return " ".join(text.split())


def check_answer(source: Source, answer: str | ErnieError) -> list[str]:
    """Why an answer cannot be taken; [] where it can."""
    if isinstance(answer, ErnieError):
        return [str(answer)]
    if not answer.strip():
        return ["the answer is empty"]
    if is_refusal(answer):
        return ["the model refused"]
    if len(answer) > MAX_CHARS:
        return [f"the answer has {len(answer)} characters"]
    return faults(source.text, answer, source.entities)


# --- the stage --------------------------------------------------------------------------------------------------------


class Styles:
    """Stage "styles": adds `prompts` by style, `prompt_style` (the drawn one), `prompt_notes` where it fell back."""

    name = "styles"
    needs = ()
    adds = ("prompts", "prompt_style", "prompt_notes")

    def __init__(
        self,
        rewriter: Rewriter,
        shares: Mapping[str, float],
        *,
        every: bool = False,
        seed: int = 0,
        batch_size: int = 64,
    ):
        """`every`: write all styles that have a share, for mixing while training; else only the drawn one.

        Raises ErnieError: shares as in `check_shares`.
        """
        if batch_size < 1:
            raise ErnieError(f"batch_size must be 1 or more, got {batch_size}.")
        self.rewriter = rewriter
        self.shares = check_shares(shares)
        self.every = every
        self.seed = seed
        self.batch_size = batch_size

    def key(self) -> str:
        content = json.dumps([RULES, self.rewriter.key(), self.shares, self.every, self.seed])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def __call__(self, rows: list[Row]) -> list[Row]:
        made: list[Row] = [{"failed": "there is no caption to rewrite; run Curate Captions first."} for _ in rows]
        asked: list[tuple[int, str, Source, Style]] = []
        for i, row in enumerate(rows):
            source = Source.of(row)
            if source.text:
                name = str(row.get("id") or row.get("source") or "")
                drawn: Style = draw_style(self.shares, self.seed, name)
                made[i] = {"prompts": {}, "prompt_style": drawn, "prompt_notes": []}
                wanted: dict[Style, None] = {drawn: None}  # the drawn one first
                if self.every:
                    wanted.update(dict.fromkeys(self.shares))
                for style in wanted:
                    asked.append((i, name, source, style))
        answers = self.rewriter.rewrite([(name, source, style) for _, name, source, style in asked])
        for (i, _, source, style), answer in zip(asked, answers, strict=True):
            if found := check_answer(source, answer):
                made[i]["prompt_notes"] += [f"{style}: {fault}" for fault in found]
                made[i]["prompts"]["original"] = source.text
                if style == made[i]["prompt_style"]:
                    made[i]["prompt_style"] = "original"
            else:
                made[i]["prompts"][style] = str(answer)
        return made


def report(rows: Iterable[Row], shares: Mapping[str, float]) -> str:
    """How many prompts of each style there are against what was asked for, and every row that fell back or failed."""
    wanted = check_shares(shares)
    drawn: Counter[str] = Counter()
    styles: Counter[str] = Counter()
    lines: list[str] = []
    for row in rows:
        if "prompt_style" in row:
            notes = row.get("prompt_notes") or []
            styles.update(row["prompts"].keys())
            fell_back = row["prompt_style"] == "original" and notes
            drawn[notes[0].split(":")[0] if fell_back else row["prompt_style"]] += 1
            if notes:
                lines.append(f"{row.get('source') or row.get('id')}: original kept, {'; '.join(notes)}")
        elif reason := (row.get("failed") or {}).get("styles"):
            lines.append(f"{row.get('source') or row.get('id')}: {reason}")
    total = sum(drawn.values())
    shown = [
        f"{style}: {styles[style]} prompts; drawn {drawn[style] / total if total else 0:.1%}, "
        f"asked for {wanted.get(style, 0.0):.1%}"
        for style in STYLES
        if style in wanted or style in styles
    ]
    return "\n".join([f"{total} prompts, {sum(1 for line in lines)} rows with remarks", *shown, *lines])
