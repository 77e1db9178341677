"""Captions: a structured description of each picture, and texts of several lengths out of it.

A vision-language model (`vision_language`) is asked once per picture for everything (`instructions.json`); what it
answers is read leniently and never added to (`answers`). Text that it saw in the picture must stand verbatim, between
quotation marks, in the long and the medium caption: an answer that lost one is asked for anew, and if none has it, a
sentence with it is added and noted. Several lengths and the simulated prompt follow what published captioners for
text-to-image do (Z-Image: long, medium, short, tags, simulated user prompt, text read first and kept in its language).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

from PIL import Image

from ..enhancing.quotes import quoted_texts
from ..enhancing.writing import shown_sentence
from ..errors import ErnieError
from .answers import LENGTHS, check_lengths, instructions, is_refusal, read_description
from .manifest import Row, open_picture
from .vision_language import Question, Writer, question_seed

Form = Literal["structured", "plain"]
FORMS: tuple[Form, ...] = get_args(Form)
RULES = 1  # raise it when the same answer gives other columns
RETRY_TEMPERATURE = 0.7  # the likeliest words would be the same again
DIGEST_CHARS = 16


class Captioner(Protocol):
    """What describes pictures; picklable, loads what it needs at the first call."""

    def key(self) -> str:
        """Changes with everything that decides its captions."""
        ...

    def describe(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row | ErnieError]:
        """The columns `description`, `captions` and `caption_notes` of each, or why there are none."""
        ...


def best_text(row: Row) -> str:
    """What a row says of its picture: the prompt in its drawn style, captions from long to tags, what lay beside it."""
    captions = row.get("captions") or {}
    texts = (
        (row.get("prompts") or {}).get(row.get("prompt_style")),
        *(captions.get(length) for length in LENGTHS),
        row.get("caption"),
    )
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


class LanguageCaptioner:
    """Captions by a vision-language model."""

    def __init__(
        self,
        writer: Writer,
        *,
        lengths: Sequence[str] = LENGTHS,
        form: Form = "structured",
        language: str = "English",
        hints: bool = False,
        instruction: str = "",
        temperature: float = 0.0,
        max_tokens: int = 1024,
        retries: int = 2,
        seed: int = 0,
    ):
        """Asks nothing yet.

        Args:
            lengths: which of LENGTHS to ask for.
            form: structured = JSON with all fields; plain = one paragraph, for models that write no JSON.
            language: of the captions; visible text keeps its own.
            hints: tell the model the caption and category that the row has.
            instruction: sentences added to the question.
            temperature: 0 = the likeliest words; tries after the first take RETRY_TEMPERATURE at least.
            max_tokens: longest answer.
            retries: tries after an answer that cannot be read, lacks a length, or lost visible text.
            seed: of drawn words.

        Raises:
            ErnieError: a value is out of its range.
        """
        if form not in FORMS:
            raise ErnieError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
        if not 0 <= temperature <= 2:
            raise ErnieError(f"temperature must lie between 0 and 2, got {temperature:g}.")
        for name, value, least in (("max_tokens", max_tokens, 1), ("retries", retries, 0)):
            if value < least:
                raise ErnieError(f"{name} must be {least} or more, got {value}.")
        if not language.strip():
            raise ErnieError("language is empty; name one, such as English.")
        self.writer = writer
        self.lengths = check_lengths(lengths)
        self.form: Form = form
        self.language, self.hints, self.instruction = language.strip(), hints, instruction.strip()
        self.temperature, self.max_tokens, self.retries, self.seed = temperature, max_tokens, retries, seed

    def key(self) -> str:
        settings = [self.question({}), self.hints, self.temperature, self.max_tokens, self.retries, self.seed]
        content = json.dumps([RULES, self.writer.key(), self.form, *settings])
        return hashlib.sha256(content.encode()).hexdigest()[:DIGEST_CHARS]

    def question(self, row: Row) -> str:
        """What the model is asked about a row's picture."""
        said = instructions()
        parts = [said["plain"]] if self.form == "plain" else [*said["describe"]]
        if self.form == "structured":
            parts += [said["lengths"][length] for length in self.lengths]
        parts.append(said["language"].replace("{language}", self.language))
        known = {name: row.get(name) for name in ("caption", "category") if row.get(name)} if self.hints else {}
        if known:
            parts.append(said["hints"].replace("{hints}", json.dumps(known, ensure_ascii=False)))
        return "\n".join([*parts, self.instruction] if self.instruction else parts)

    def describe(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row | ErnieError]:
        best: dict[int, tuple[int, Row]] = {}  # (number of faults, columns)
        errors: dict[int, ErnieError] = {}
        waiting = list(range(len(rows)))
        for attempt in range(self.retries + 1):
            if not waiting:
                break
            answers = self.writer.write(
                [Question(self.question(rows[i]), pictures[i]) for i in waiting],
                seeds=[
                    question_seed(self.seed, str(rows[i].get("id") or rows[i].get("source")), attempt) for i in waiting
                ],
                temperature=max(self.temperature, RETRY_TEMPERATURE) if attempt else self.temperature,
                max_tokens=self.max_tokens,
            )
            again: list[int] = []
            for i, answer in zip(waiting, answers, strict=True):
                if isinstance(answer, ErnieError):  # it was tried often enough, or may not be asked any more
                    errors[i] = answer
                    continue
                try:
                    faults, columns = self._read(answer)
                except ErnieError as e:
                    errors[i] = e
                    again.append(i)
                    continue
                if i not in best or faults < best[i][0]:
                    best[i] = faults, columns
                if faults:
                    again.append(i)
            waiting = again
        return [_finish(best[i][1]) if i in best else errors[i] for i in range(len(rows))]

    def _read(self, answer: str) -> tuple[int, Row]:
        if self.form == "plain":
            if not answer.strip():
                raise ErnieError("the answer is empty.")
            if is_refusal(answer):
                raise ErnieError(f"the model refused: {' '.join(answer.split())[:120]!r}.")
            text = " ".join(answer.split())
            shown = quoted_texts(text)
            return 0, {"description": {"text": shown} if shown else {}, "captions": {"long": text}, "caption_notes": []}
        description, captions, notes = read_description(answer)
        captions = {length: captions[length] for length in self.lengths if length in captions}
        if not captions:
            raise ErnieError(f"the answer has none of the lengths {', '.join(self.lengths)}.")
        absent = [length for length in self.lengths if length not in captions]
        notes += [f"no {length} caption" for length in absent]
        lost = [text for length in _QUOTING for text in _lost(description, captions.get(length))]
        columns = {"description": description, "captions": captions, "caption_notes": notes}
        return len(absent) + len(lost) + ("the answer was cut off" in notes), columns


_QUOTING = ("long", "medium")  # the lengths that must hold all visible text


def _lost(description: Row, caption: str | None) -> list[str]:
    """Visible texts that a caption does not hold verbatim between quotation marks."""
    if caption is None:
        return []
    held = quoted_texts(caption)
    return [text for text in description.get("text", []) if not any(text in quoted for quoted in held)]


def _finish(columns: Row) -> Row:
    """With a sentence for each visible text that the long or medium caption lost."""
    captions, notes = dict(columns["captions"]), list(columns["caption_notes"])
    for length in _QUOTING:
        for text in _lost(columns["description"], captions.get(length)):
            captions[length] += " " + shown_sentence(text, captions[length])
            notes.append(f"{text!r} was added to the {length} caption")
    return {"description": columns["description"], "captions": captions, "caption_notes": notes}


class Captions:
    """Stage "captions": adds description, captions and caption_notes."""

    name = "captions"
    needs = ("source",)
    adds = ("description", "captions", "caption_notes")

    def __init__(self, captioner: Captioner, *, batch_size: int = 4):
        """`batch_size`: pictures in memory at once, and before a local model."""
        if batch_size < 1:
            raise ErnieError(f"batch_size must be 1 or more, got {batch_size}.")
        self.captioner = captioner
        self.batch_size = batch_size

    def key(self) -> str:
        return self.captioner.key()

    def __call__(self, rows: list[Row]) -> list[Row]:
        made: list[Row] = [{} for _ in rows]
        pictures: dict[int, Image.Image] = {}
        for i, row in enumerate(rows):
            try:
                pictures[i] = open_picture(row)
            except ErnieError as e:
                made[i] = {"failed": str(e)}
        found = self.captioner.describe([rows[i] for i in pictures], list(pictures.values())) if pictures else []
        for i, answer in zip(pictures, found, strict=True):
            made[i] = {"failed": str(answer)} if isinstance(answer, ErnieError) else answer
        return made


def report(rows: Sequence[Row] | Any) -> str:
    """How many rows have captions, of which lengths, what was noted, and every failure with its row."""
    count, by_length, noted, failed = 0, dict.fromkeys(LENGTHS, 0), 0, []
    words = dict.fromkeys(LENGTHS, 0)
    for row in rows:
        for length, text in (row.get("captions") or {}).items():
            by_length[length] += 1
            words[length] += len(text.split())
        count += bool(row.get("captions"))
        noted += bool(row.get("caption_notes"))
        if reason := (row.get("failed") or {}).get("captions"):
            failed.append(f"{row.get('source')}: {reason}")
    lengths = ", ".join(f"{n} {length} ({words[length] / n:.0f} words)" for length, n in by_length.items() if n)
    lines = [
        f"{count} pictures with captions" + (f": {lengths}" if lengths else ""),
        f"{noted} with notes, {len(failed)} failed",
    ]
    return "\n".join([*lines, *failed])
