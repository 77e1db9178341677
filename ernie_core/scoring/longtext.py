"""LongText-Bench: how much of the text that a prompt asks for can be read in the picture, given what an OCR read.

The published rule (X-Omni-Team/X-Omni@2b8237b: textbench/summary_scores.py, Apache-2.0): everything but Latin letters,
some accented ones, digits and Chinese characters is removed from both texts. English counts words in lower case,
Chinese counts characters as they are. Matches are the multiset intersection with what was asked for, so neither order
nor extra text is punished. The score is the sum of all matches over the sum of all that was asked for: long texts weigh
more, and several pictures of one prompt count each. The published OCR is Qwen2.5-VL-7B; another OCR gives other scores.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..batch import Problem
from ..errors import ErnieError
from ..training.items import read_table, read_text
from .metrics import Interval, ratio_interval

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

# Baidu's README (baidu/ERNIE-Image@1f30f5b): model -> prompts as they are / enhanced -> (English, Chinese).
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "ERNIE-Image": {"without enhancer": (0.9679, 0.9594), "with enhancer": (0.9804, 0.9661)},
    "ERNIE-Image-Turbo": {"without enhancer": (0.9602, 0.9675), "with enhancer": (0.9675, 0.9636)},
}

_LETTERS = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_NOT_WORDS = re.compile(rf"[^{_LETTERS}\s]")
_NOT_CHARACTERS = re.compile(rf"[^{_LETTERS}]")
_OCR_FILLER = "No text recognized."  # removed by the published script, which asks the OCR to say so
_TEXT_KEYS = ("ocr_results", "ocr", "ocr_text", "recognized", "recognised", "prediction")
_IMAGE_KEYS = ("image", "file_name", "filename", "file", "path", "image_path")


@dataclass(frozen=True, kw_only=True)
class TextPrompt:
    """A line of the benchmark's prompts file."""

    id: int
    prompt: str
    text: tuple[str, ...]
    """What the picture must show, one entry per place."""
    category: str = ""
    length: str = ""


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """One picture: how many of the words (characters) asked for were read in it."""

    prompt_id: int
    image: str
    matched: int
    wanted: int
    missing: tuple[str, ...]
    """What was asked for and not read, as often as it is missing."""
    category: str = ""
    length: str = ""

    @property
    def recall(self) -> float:
        return self.matched / self.wanted


@dataclass(frozen=True, kw_only=True)
class LongText:
    """The benchmark's outcome for one language."""

    language: Language
    score: Interval
    """Sum of matches over sum of wanted; the interval resamples prompts, so pictures of one prompt stay together."""
    results: tuple[TextResult, ...]
    by_category: tuple[tuple[str, int, Interval], ...]
    """(category, pictures, score)"""
    by_length: tuple[tuple[str, int, Interval], ...]
    problems: tuple[Problem, ...] = ()


def match_text(wanted: str | Sequence[str], read: str, language: Language) -> TextResult:
    """What of `wanted` (one text, or one per place) was read.

    Raises:
        ErnieError: nothing is wanted that the rule counts.
    """
    joined = wanted if isinstance(wanted, str) else " ".join(wanted)
    asked = Counter(_units(joined, language))
    if not asked:
        raise ErnieError(f"no text is asked for that could be counted, got {joined!r}.")
    got = Counter(_units(read.replace(_OCR_FILLER, ""), language))
    return TextResult(
        prompt_id=-1,
        image="",
        matched=(asked & got).total(),
        wanted=asked.total(),
        missing=tuple((asked - got).elements()),
    )


def _units(text: str, language: Language) -> list[str]:
    """Words of an English text, characters of a Chinese one."""
    if language == "en":
        return _NOT_WORDS.sub("", text).lower().split()
    return list(_NOT_CHARACTERS.sub("", text))


def score_longtext(
    prompts: Sequence[TextPrompt],
    readings: Iterable[tuple[str, int, str]],
    language: Language,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> LongText:
    """The score of what an OCR read: (image, prompt id, text) per picture.

    Prompts without a picture are not counted, as published, and listed in `problems`; so are readings of prompts that
    do not exist, and pictures that come twice (the first counts).

    Raises:
        ErnieError: no reading belongs to a prompt.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    results: list[TextResult] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for image, prompt_id, text in readings:
        prompt = by_id.get(prompt_id)
        if prompt is None:
            problems.append(Problem(label=image, reason=f"left out: there is no prompt {prompt_id}"))
        elif image in seen:
            problems.append(Problem(label=image, reason="left out: it was read before"))
        else:
            seen.add(image)
            found = match_text(prompt.text, text, language)
            results.append(
                TextResult(
                    prompt_id=prompt_id,
                    image=image,
                    matched=found.matched,
                    wanted=found.wanted,
                    missing=found.missing,
                    category=prompt.category,
                    length=prompt.length,
                )
            )
    if not results:
        raise ErnieError(f"no picture belongs to one of the {len(prompts)} prompts: {_first(problems)}")
    without = sorted(by_id.keys() - {r.prompt_id for r in results})
    if without:
        some = ", ".join(map(str, without[:10])) + (", ..." if len(without) > 10 else "")
        reason = f"{len(without)} of {len(by_id)} prompts have no picture and are not counted: {some}"
        problems.append(Problem(label=f"{language} prompts", reason=reason))
    return LongText(
        language=language,
        score=_score(results, samples, seed),
        results=tuple(results),
        by_category=_table(results, "category", samples, seed),
        by_length=_table(results, "length", samples, seed),
        problems=tuple(problems),
    )


def _score(results: Sequence[TextResult], samples: int, seed: int) -> Interval:
    matched: Counter[int] = Counter()
    wanted: Counter[int] = Counter()
    for result in results:
        matched[result.prompt_id] += result.matched
        wanted[result.prompt_id] += result.wanted
    return ratio_interval([matched[i] for i in wanted], list(wanted.values()), samples=samples, seed=seed)


def _table(
    results: Sequence[TextResult], column: str, samples: int, seed: int
) -> tuple[tuple[str, int, Interval], ...]:
    groups: dict[str, list[TextResult]] = {}
    for result in results:
        groups.setdefault(getattr(result, column), []).append(result)
    return tuple((name, len(group), _score(group, samples, seed)) for name, group in groups.items())


# --- files -----------------------------------------------------------------------------------------------------


def read_text_prompts(path: Path | str) -> list[TextPrompt]:
    """The benchmark's text_prompts.jsonl or text_prompts_zh.jsonl.

    Raises:
        ErnieError: a line is not of that shape, or an id comes twice.
    """
    prompts: list[TextPrompt] = []
    for label, row in read_table(Path(path)):
        if isinstance(row, ErnieError):
            raise ErnieError(f"{label} {row}.")
        text = row.get("text")
        text = [text] if isinstance(text, str) else text
        if "prompt" not in row or not isinstance(text, list) or not all(isinstance(t, str) for t in text):
            raise ErnieError(
                f"{label} is no prompt of LongText-Bench: expected prompt, text (a list) and prompt_id, "
                f"got {', '.join(row) or 'nothing'}."
            )
        prompts.append(
            TextPrompt(
                id=_as_id(row.get("prompt_id", len(prompts)), label),
                prompt=str(row["prompt"]),
                text=tuple(text),
                category=str(row.get("category", "")),
                length=str(row.get("length", "")),
            )
        )
    twice = [i for i, n in Counter(p.id for p in prompts).items() if n > 1]
    if not prompts or twice:
        raise ErnieError(f"{path} holds " + (f"the prompt_id {twice[0]} twice." if twice else "no prompts."))
    return prompts


def read_ocr(path: Path | str, prompts: Sequence[TextPrompt]) -> tuple[list[tuple[str, int, str]], list[Problem]]:
    """(image, prompt id, text) per picture, and the rows that could not be used.

    Takes what the published evaluation writes (results.jsonl with image, prompt, ocr_gt, ocr_results), a table
    (.jsonl, .json, .csv) with image or prompt_id and one of the columns ocr_results, ocr, ocr_text, or a folder of
    text files. Where no prompt_id is given, the row's prompt is looked up; else the file name starts with the id, as
    published: 12.png, 12_3.png.

    Raises:
        ErnieError: there is nothing readable there.
    """
    path = Path(path)
    ids = {prompt.prompt: prompt.id for prompt in prompts}
    readings: list[tuple[str, int, str]] = []
    problems: list[Problem] = []
    if path.is_dir():
        rows: Iterable[tuple[str, Any]] = ((f.name, {"image": f.stem, "ocr": read_text(f)}) for f in _texts(path))
    else:
        rows = list(read_table(path))
        if path.suffix.lower() == ".csv":  # an empty cell is no key there: the OCR saw nothing
            used = {key for _, row in rows if isinstance(row, dict) for key in row if key in _TEXT_KEYS}
            rows = [(label, dict.fromkeys(used) | row if isinstance(row, dict) else row) for label, row in rows]
    for label, row in rows:
        try:
            if isinstance(row, ErnieError):
                raise row
            readings.append(_reading(row, ids, label))
        except ErnieError as e:
            problems.append(Problem(label=label, reason=f"left out: it {e}"))
    if not readings:
        raise ErnieError(f"{path} holds no OCR text that could be used: {_first(problems)}")
    return readings, problems


def _texts(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() == ".txt" and not f.name.startswith("."))
    if not files:
        raise ErnieError(f"{folder} holds no .txt files; expected one per picture, named like it.")
    return files


def _reading(row: Mapping[str, Any], ids: Mapping[str, int], label: str) -> tuple[str, int, str]:
    image = next((str(row[k]) for k in _IMAGE_KEYS if row.get(k)), "")
    text = next((row[k] for k in _TEXT_KEYS if row.get(k) is not None), None)
    if text is None and not row.keys() & set(_TEXT_KEYS):
        raise ErnieError(f"has none of the columns {', '.join(_TEXT_KEYS)}")
    text = " ".join(map(str, text)) if isinstance(text, list) else str(text or "")
    if row.get("prompt_id") is not None:
        return image or f"prompt {row['prompt_id']} of {label}", _as_id(row["prompt_id"], label), text
    if row.get("prompt") in ids:  # before the file's name: that of Batch from Prompts is a hash, of digits by chance
        return image or label, ids[row["prompt"]], text
    number = re.match(r"(\d+)(?=_|\.|$)", re.split(r"[\\/]", image)[-1])
    if number:
        return image, int(number[1]), text
    raise ErnieError(f"belongs to no prompt: {image or 'its row'!r} starts with no number and has no prompt_id")


def _as_id(value: Any, label: str) -> int:
    try:
        return int(str(value))
    except ValueError as e:
        raise ErnieError(f"{label}: prompt_id must be a whole number, got {value!r}.") from e


def _first(problems: Sequence[Problem]) -> str:
    return f"{problems[0]}." if problems else "it is empty."
