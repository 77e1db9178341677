"""Reading what a language model answered: lenient about form, strict about content.

Nothing is put in that the model did not write: a field that is cut off, of a wrong kind or a placeholder is left out,
and the caller is told which.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ErnieError

TEXTS = ("type", "subject", "scene", "style", "layout")
LISTS = ("entities", "text")
LENGTHS = ("long", "medium", "short", "tags", "prompt")
ALIASES = {
    **dict.fromkeys(("image_type", "picture_type", "kind", "medium_type"), "type"),
    **dict.fromkeys(("main_subject", "subjects", "content"), "subject"),
    **dict.fromkeys(("setting", "background", "environment"), "scene"),
    "composition": "layout",
    **dict.fromkeys(("named_entities", "names", "entity"), "entities"),
    **dict.fromkeys(("visible_text", "texts", "ocr", "text_content"), "text"),
    **dict.fromkeys(("long_caption", "caption_long", "detailed", "caption"), "long"),
    **dict.fromkeys(("medium_caption", "caption_medium"), "medium"),
    **dict.fromkeys(("short_caption", "caption_short"), "short"),
    **dict.fromkeys(("keywords", "tag"), "tags"),
    **dict.fromkeys(("user_prompt", "simulated_prompt"), "prompt"),
}
"""Other names that models give the fields."""
_SPLIT_TAGS = re.compile("[,;\uff0c\u3001\uff1b\n]")


@functools.cache
def instructions() -> dict[str, Any]:
    """The sentences that models are asked with, and words that mean refusal or nothing."""
    return json.loads(Path(__file__).with_name("instructions.json").read_text(encoding="utf-8"))


def read_object(answer: str) -> tuple[dict[str, Any], bool]:
    """(the JSON object in an answer, whether it was cut off before its end).

    Fences, thoughts and talk around it, trailing commas, single quotes and line breaks inside of texts are borne. Of an
    object that was cut off, the complete fields are given.

    Raises ErnieError: there is no object.
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", answer, flags=re.DOTALL)
    cut: dict[str, Any] = {}
    for start, end in _braces(text):
        found = _load(text[start:end]) if end is not None else _load_cut(text[start:])
        if found and end is not None:
            return found, False
        cut = cut or found or {}
    if cut:
        return cut, True
    shown = " ".join(answer.split())[:120]
    raise ErnieError(f"the answer holds no JSON object: {shown!r}." if shown else "the answer is empty.")


def _braces(text: str) -> Iterator[tuple[int, int | None]]:
    """(start, end or None) of what begins with a brace and is not inside of such, strings heeded."""
    place = text.find("{")
    while place >= 0:
        end = next((i + 1 for i, depth, _ in _walk(text, place) if depth == 0), None)
        yield place, end
        place = text.find("{", place + 1 if end is None else end)


def _walk(text: str, start: int) -> Iterator[tuple[int, int, str]]:
    """(place, depth after it, character) of braces, brackets and commas outside of strings, from a brace on."""
    depth, quote, skip = 0, "", False
    for i in range(start, len(text)):
        c = text[i]
        if skip:
            skip = False
        elif quote:
            skip = c == "\\"
            if c == quote:
                quote = ""
        elif c == '"' or (c == "'" and text[:i].rstrip()[-1:] in "{[,:"):
            quote = c
        elif c in "{[":
            depth += 1
            yield i, depth, c
        elif c in "}]":
            depth -= 1
            yield i, depth, c
        elif c == ",":
            yield i, depth, c


def _load(text: str) -> dict[str, Any] | None:
    plain = re.sub(r",(\s*[}\]])", r"\1", text)
    for candidate in (text, plain):
        try:
            found = json.loads(candidate, strict=False)
        except (ValueError, RecursionError):
            continue
        return found if isinstance(found, dict) else None
    try:
        found = ast.literal_eval(plain)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _load_cut(text: str) -> dict[str, Any] | None:
    """The fields before the last comma between fields."""
    commas = [i for i, depth, c in _walk(text, 0) if c == "," and depth == 1]
    return _load(text[: commas[-1]] + "}") if commas else None


def read_description(answer: str) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """(description, captions by length, notes) of an answer to "describe".

    The description has those of TEXTS and LISTS that the answer has; notes say what was left out.

    Raises ErnieError: there is no object, or none of its fields is known.
    """
    fields, was_cut = read_object(answer)
    found: dict[str, Any] = {}
    notes = ["the answer was cut off"] if was_cut else []
    known = {*TEXTS, *LISTS, *LENGTHS}
    for key, value in fields.items():
        name = re.sub(r"[\s-]+", "_", str(key).strip().lower())
        name = name if name in known else ALIASES.get(name, name)
        if name not in known or name in found:
            notes.append(f"field {str(key)[:40]!r} left out")
            continue
        made = _texts(value, split=name == "tags") if name in (*LISTS, "tags") else _text(value)
        if made is None:
            notes.append(f"field {name} was of a wrong kind")
        elif made or name in LISTS:
            found[name] = ", ".join(made) if name == "tags" else made
    if not found:
        raise ErnieError(f"the answer has none of the fields asked for: {' '.join(answer.split())[:120]!r}.")
    description = {name: found[name] for name in (*TEXTS, *LISTS) if name in found}
    return description, {name: found[name] for name in LENGTHS if name in found}, notes


def _text(value: Any) -> str | None:
    """One text; "" for a placeholder; None for something else."""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = ", ".join(value)
    if value is None:
        return ""
    if not isinstance(value, str):
        return None
    value = " ".join(value.split())
    return "" if value.lower().rstrip(".") in instructions()["nothing"] else value


def _texts(value: Any, *, split: bool = False) -> list[str] | None:
    """Several texts; entries such as {"text": "SALE", "place": "top"} give their text."""
    if isinstance(value, str):
        value = _SPLIT_TAGS.split(value) if split else [value]
    if value is None:
        return []
    if not isinstance(value, list):
        return None
    made: list[str] = []
    for entry in value:
        if isinstance(entry, dict):
            entry = next(
                (entry[k] for k in ("text", "content", "name", "value") if isinstance(entry.get(k), str)), None
            )
        if isinstance(entry, int | float) and not isinstance(entry, bool):
            entry = str(entry)
        if not isinstance(entry, str):
            return None
        kept = " ".join(entry.split())
        if kept and (not split or len(kept) < 100) and kept.lower() not in instructions()["nothing"]:
            made.append(kept)
    return list(dict.fromkeys(made))


def check_lengths(lengths: Sequence[str]) -> tuple[str, ...]:
    """Those of LENGTHS that are asked for, in that order.

    Raises ErnieError: another one, or none.
    """
    unknown = [length for length in lengths if length not in LENGTHS]
    if unknown or not lengths:
        raise ErnieError(f"lengths must be some of {', '.join(LENGTHS)}, got {', '.join(unknown) or 'none'}.")
    return tuple(length for length in LENGTHS if length in lengths)


def is_refusal(answer: str) -> bool:
    """Whether an answer begins like an apology instead of a description."""
    return answer.strip().lower().replace("\u2019", "'").startswith(tuple(instructions()["refusals"]))
