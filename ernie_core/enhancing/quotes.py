"""Text that a prompt puts between quotation marks: what the picture is to show, letter by letter."""

from __future__ import annotations

import re

# Opening and closing marks. A straight mark after a digit is inches or feet, and one between letters an apostrophe.
_PAIRS = (
    (r'(?<!\d)"', '"', '"'),
    ("\u201c", "\u201d", "\u201c\u201d"),
    ("\u201e", "[\u201c\u201d]", "\u201c\u201d"),
    ("\u00ab", "\u00bb", "\u00bb"),
    ("\u300c", "\u300d", "\u300d"),
    ("\u300e", "\u300f", "\u300f"),
    ("\uff02", "\uff02", "\uff02"),
    (r"(?<!\w)'(?=\S)", r"(?<=\S)'(?!\w)", None),
    (r"(?<!\w)\u2018", r"\u2019(?!\w)", None),
)
_QUOTED = re.compile(
    "|".join(start + ("([^" + inside + r"\n]+?)" if inside else r"([^\n]+?)") + end for start, end, inside in _PAIRS)
)

_STRAY = re.compile(r"(?<!\d)\"|[\u201c-\u201e\u00ab\u00bb\u300c-\u300f\uff02]|(?<!\w)['\u2018](?=\S)")


def quoted_texts(prompt: str) -> list[str]:
    """Every text between quotation marks (straight, typographic, CJK), marks and outer blanks left off, each once.

    Single marks count only where words begin and end; a mark without its partner is none. What is quoted inside of
    something quoted belongs to it.
    """
    found = (next(text for text in match.groups() if text is not None) for match in _QUOTED.finditer(prompt))
    return list(dict.fromkeys(text.strip() for text in found if text.strip()))


def quoted_spans(prompt: str) -> list[tuple[int, int]]:
    """(start, end) of everything between quotation marks, marks included, in order."""
    return [match.span() for match in _QUOTED.finditer(prompt)]


def missing_texts(prompt: str, answer: str) -> list[str]:
    """The quoted texts of `prompt` that `answer` does not hold verbatim."""
    return [text for text in quoted_texts(prompt) if text not in answer]


def stray_mark(text: str) -> str | None:
    """The first quotation mark of `text` that opens or closes nothing; None where all of them pair."""
    found = _STRAY.search(_QUOTED.sub(" ", text))
    return found.group() if found else None
