"""Prompts with choices: `{a|b}`, weights, picks of several, and lists in files.

Everything is drawn from one stream of numbers that follows from (seed, row), so the same text, files, seed and row give
the same prompt on every machine and every Python. What is chosen in one place does not change how text is read in
another: options are read first and drawn after.

    {red|green|blue}            one of them
    {3::red|1::blue}            red three times as often
    {2$$a|b|c}                  two different ones, joined by ", "
    {1-3$$ and $$a|b|c}         one to three, joined by " and "
    __colours__                 a line of colours.txt; __animals/cats__ a line of animals/cats.txt
    \\{ \\} \\| \\_ \\$ \\: \\\\         these signs themselves
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ErnieError

SUFFIX = ".txt"
MAX_DEPTH = 32  # braces and files inside each other
MAX_DRAWS = 10_000  # choices of one prompt: files that name each other twice grow without end
MAX_CHARACTERS = 100_000
_SPECIAL = "{}|_$:\\#"
_NAME = re.compile(r"__([^\W_](?:[\w./ -]*?[^\W_])?)__")
_PICKS = re.compile(r"(\d+)(?:-(\d+))?\$\$")
_SEPARATOR = re.compile(r"([^{}|$]*)\$\$")
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf)\s*::")
_WEIGHTING = re.compile(r"\([^()]*:\s*[\d.]+\s*\)")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`fewest` to `most` different options out of `options`, joined by `separator`."""

    options: tuple[tuple[float, Text], ...]
    """(weight, text); likelihood is weight over the sum of weights."""
    fewest: int = 1
    most: int = 1
    separator: str = ", "


@dataclass(frozen=True, kw_only=True)
class FileChoice:
    """One line of a file."""

    name: str


Text = tuple["str | Choice | FileChoice", ...]


@dataclass(frozen=True, kw_only=True)
class Wildcards:
    """Reads prompts with choices, and the files that they name; each file is read once."""

    folder: Path | None = None
    """Where the files of `__name__` lie; None = there are none."""
    _files: dict[str, Choice] = field(default_factory=dict, repr=False)

    def expand(self, text: str, *, seed: int, row: int = 0) -> str:
        """`text` with every choice made.

        Args:
            seed, row: what the choices follow from; two rows of one seed choose independently.

        Raises:
            ErnieError: an unclosed or stray brace, a bad weight or number of picks, a missing or empty file, files that
                name each other in a circle, or a prompt that grows beyond all measure.
        """
        return _Draw(self, random.Random(f"{seed}:{row}")).text(_parse(text, "the prompt"), ())

    def file(self, name: str) -> Choice:
        """The lines of the file that `__name__` names, as options; # starts a comment line.

        Raises:
            ErnieError: the file is missing, outside the folder, unreadable, or holds no line.
        """
        if name not in self._files:
            self._files[name] = self._read(name)
        return self._files[name]

    def _read(self, name: str) -> Choice:
        if self.folder is None:
            raise ErnieError(f"__{name}__ names a file of choices, but no folder of such files was given.")
        path = (self.folder / f"{name}{SUFFIX}").resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ErnieError(f"__{name}__ must name a file inside {self.folder}; leave out '..'.")
        if not path.is_file():
            there = self.names()
            shown = ", ".join(f"__{n}__" for n in there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
            raise ErnieError(
                f"__{name}__: no file {name}{SUFFIX} in {self.folder}; there are {shown or 'none'}. Correct the name, "
                r"or write \_\_ for the signs themselves."
            )
        try:
            lines = path.read_bytes().decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ErnieError(f"{path} cannot be read ({e}). Save it as UTF-8 text.") from e
        options = [
            _option(line.strip(), f"{path.name} line {i}")
            for i, line in enumerate(lines, start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not options:
            raise ErnieError(f"{path} holds no line to choose. Write one option per line.")
        return _checked(Choice(options=tuple(options)), path.name)

    def names(self) -> list[str]:
        """Every name that `__name__` can have, sorted."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(p.relative_to(self.folder).with_suffix("").as_posix() for p in self.folder.rglob(f"*{SUFFIX}"))

    def state(self) -> list[tuple[str, int, int]]:
        """(name, size, time) of every file: equal means that the same text expands to the same prompt."""
        stats = [(name, (self.folder / f"{name}{SUFFIX}").stat()) for name in self.names() if self.folder]
        return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def find_weighting(text: str) -> list[str]:
    """Pieces such as (word:1.2), which this text encoder reads as plain text: it has no weights per word."""
    return _WEIGHTING.findall(text)


# --- reading ---------------------------------------------------------------------------------------------------------


def _parse(text: str, where: str) -> Text:
    parts, end = _parse_until(text, 0, "", where, 0)
    assert end == len(text)
    return parts


def _parse_until(text: str, at: int, stops: str, where: str, depth: int) -> tuple[Text, int]:
    """Parts from `at` to the first sign of `stops`, or to the end, and where that is."""
    parts: list[str | Choice | FileChoice] = []
    plain: list[str] = []
    while at < len(text) and text[at] not in stops:
        sign = text[at]
        if sign == "\\" and at + 1 < len(text) and text[at + 1] in _SPECIAL:
            plain.append(text[at + 1])
            at += 2
        elif sign == "{":
            parts += ["".join(plain)]
            plain.clear()
            choice, at = _parse_choice(text, at, where, depth + 1)
            parts.append(choice)
        elif sign == "}":
            raise ErnieError(f"{where} has a }} without its {{ at character {at + 1}; write \\}} for the sign itself.")
        elif sign == "_" and (match := _NAME.match(text, at)):
            parts += ["".join(plain), FileChoice(name=match[1])]
            plain.clear()
            at = match.end()
        else:
            plain.append(sign)
            at += 1
    return (*parts, "".join(plain)), at


def _parse_choice(text: str, start: int, where: str, depth: int) -> tuple[Choice, int]:
    if depth > MAX_DEPTH:
        raise ErnieError(f"{where} has braces more than {MAX_DEPTH} deep inside each other; put lists into files.")
    at, fewest, most, joint = start + 1, 1, 1, ", "
    if picks := _PICKS.match(text, at):
        fewest, most, at = int(picks[1]), int(picks[2] or picks[1]), picks.end()
        if separator := _SEPARATOR.match(text, at):
            joint, at = separator[1], separator.end()
    options: list[tuple[float, Text]] = []
    while True:
        weight = _WEIGHT.match(text, at)
        parts, end = _parse_until(text, weight.end() if weight else at, "|}", where, depth)
        options.append((float(weight[1]) if weight else 1.0, parts))
        if end == len(text):
            raise ErnieError(
                f"{where} has a {{ without its }} at character {start + 1}; write \\{{ for the sign itself."
            )
        at = end + 1
        if text[end] == "}":
            return _checked(Choice(options=tuple(options), fewest=fewest, most=most, separator=joint), where), at


def _option(line: str, where: str) -> tuple[float, Text]:
    weight = _WEIGHT.match(line)
    return float(weight[1]) if weight else 1.0, _parse(line[weight.end() :].strip() if weight else line, where)


def _checked(choice: Choice, where: str) -> Choice:
    weights = [weight for weight, _ in choice.options]
    bad = [w for w in weights if not (0 <= w < math.inf)]
    if bad:
        raise ErnieError(f"{where} has a weight of {bad[0]:g}; weights are 0 or more.")
    possible = sum(w > 0 for w in weights)
    if not possible:
        raise ErnieError(f"{where} has a choice whose weights are all 0; give one option a weight above 0.")
    if not choice.fewest <= choice.most <= possible:
        raise ErnieError(
            f"{where} asks for {choice.fewest} to {choice.most} different options of {possible} that can be drawn."
        )
    return choice


# --- drawing ---------------------------------------------------------------------------------------------------------


class _Draw:
    """One expansion: its stream of numbers, and how much it has drawn."""

    def __init__(self, source: Wildcards, stream: random.Random):
        self.source, self.stream = source, stream
        self.draws = self.characters = 0

    def text(self, parts: Text, files: tuple[str, ...]) -> str:
        return "".join(self._part(part, files) for part in parts)

    def _part(self, part: str | Choice | FileChoice, files: tuple[str, ...]) -> str:
        if isinstance(part, Choice):
            return self._choose(part, files)
        if isinstance(part, FileChoice):
            if part.name in files:
                circle = " -> ".join(f"__{n}__" for n in (*files[files.index(part.name) :], part.name))
                raise ErnieError(f"files of choices name each other in a circle: {circle}. Break it in one of them.")
            if len(files) == MAX_DEPTH:
                raise ErnieError(f"files of choices name each other more than {MAX_DEPTH} deep: __{part.name}__.")
            return self._choose(self.source.file(part.name), (*files, part.name))
        self.characters += len(part)
        if self.characters > MAX_CHARACTERS:
            raise ErnieError(f"the prompt grows beyond {MAX_CHARACTERS} characters; name fewer files in the files.")
        return part

    def _choose(self, choice: Choice, files: tuple[str, ...]) -> str:
        self.draws += 1
        if self.draws > MAX_DRAWS:
            raise ErnieError(f"the prompt needs more than {MAX_DRAWS} choices; name fewer files in the files.")
        left = list(choice.options)
        count = choice.fewest + int(self.stream.random() * (choice.most - choice.fewest + 1))
        chosen = []
        for _ in range(count):
            point = self.stream.random() * math.fsum(weight for weight, _ in left)
            number = 0
            while (point := point - left[number][0]) >= 0 and number < len(left) - 1:
                number += 1
            while left[number][0] == 0:  # rounding at the very end
                number -= 1
            chosen.append(left.pop(number)[1])
        return choice.separator.join(self.text(parts, files) for parts in chosen)
