"""Verdicts on pictures of a prompt set: does one pass, or which of two is better; by people, by a scorer, by a measure.

Two questions, as ERNIE-ViLG 2.0 puts them to people (arXiv 2210.15257, section 4.1): alignment (does the picture show
what the prompt says) and fidelity (is it a clean and convincing picture). Each is answered with pass or fail for a
picture, or with first, second or same for two settings' pictures of one prompt and seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ErnieError
from ..scoring.scorer import DEFAULT_BATCH, Scorer, to_rgb
from .prompt_sets import Picture, Setting

Criterion = Literal["alignment", "fidelity"]
Outcome = Literal["pass", "fail", "first", "second", "same"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
OF_ONE: tuple[Outcome, ...] = ("pass", "fail")
OF_TWO: tuple[Outcome, ...] = ("first", "same", "second")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one judge said once."""

    judge: str
    criterion: Criterion
    outcome: Outcome
    number: int
    """Of the prompt in its set."""
    prompt: str
    category: str
    seed: int
    setting: str
    """Whose picture; of two, the first's."""
    file: str
    other_setting: str = ""
    """The second's; "" where one picture was judged."""
    other_file: str = ""
    source: str = ""
    value: float | None = None
    """The number behind it, where there is one."""
    other_value: float | None = None

    def __post_init__(self) -> None:
        allowed = OF_TWO if self.other_setting else OF_ONE
        if self.outcome not in allowed or self.criterion not in CRITERIA:
            raise ErnieError(
                f"a verdict on {'two pictures' if self.other_setting else 'one picture'} is {', '.join(allowed)} for "
                f"{' or '.join(CRITERIA)}, got {self.outcome!r} for {self.criterion!r}."
            )


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Verdicts and what is worth knowing about them (socket ERNIE_VERDICTS)."""

    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.verdicts)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two settings' pictures of one prompt and seed."""

    first: Picture
    second: Picture


def name_settings(settings: Sequence[Setting]) -> list[Setting]:
    """The settings under names that differ: their folder's, with the folder above where two are equal.

    Raises:
        ErnieError: a folder is given twice, or the settings are of different prompt sets.
    """
    folders = [setting.folder.resolve() for setting in settings]
    if len(set(folders)) < len(folders):
        raise ErnieError(f"the same folder is given twice ({folders[0]}): give the folders of two settings.")
    sets = list(dict.fromkeys(setting.prompts for setting in settings))
    if len(sets) > 1:
        raise ErnieError(
            f"the settings painted different prompt sets ({' and '.join(sets)}): paint the same file with each."
        )
    if len({setting.name for setting in settings}) == len(settings):
        return list(settings)
    return [replace(s, name=f"{f.parent.name}/{f.name}") for s, f in zip(settings, folders, strict=True)]


def match(first: Setting, second: Setting) -> tuple[list[Pair], list[str]]:
    """Pictures of the same prompt and seed, and a line per thing that is worth knowing.

    Raises:
        ErnieError: no picture has a partner.
    """
    theirs = {(p.number, p.seed): p for p in second.pictures}
    pairs = [Pair(first=p, second=theirs[p.number, p.seed]) for p in first.pictures if (p.number, p.seed) in theirs]
    if not pairs:
        raise ErnieError(
            f"no picture of {first.name} has prompt and seed of one of {second.name}: paint both with the same seed."
        )
    notes = [
        f"{len(setting.pictures) - len(pairs)} of {len(setting.pictures)} pictures of {setting.name} have no partner"
        for setting in (first, second)
        if len(setting.pictures) > len(pairs)
    ]
    other = sum(pair.first.prompt != pair.second.prompt for pair in pairs)
    if other:
        notes.append(f"{other} pairs were painted from different texts, such as a prompt and its translation")
    return pairs, notes


# --- a scorer as judge --------------------------------------------------------------------------------------------


def judge_by_scorer(
    settings: Sequence[Setting],
    scorer: Scorer,
    *,
    criterion: Criterion | None = None,
    threshold: float,
    margin: float = 0.0,
    batch_size: int = DEFAULT_BATCH,
    on_scored: Callable[[int], None] | None = None,
) -> Verdicts:
    """Pass or fail for every picture of one setting or two, and of two also which one of each pair is better.

    Args:
        criterion: None = alignment for a scorer that reads prompts, fidelity for another.
        threshold: a picture passes with at least this (at most, where lower is better).
        margin: scores this close are the same; 0 = only equal ones.

    Raises:
        ErnieError: what `name_settings` and `match` raise, a value out of range, or not one usable picture.
    """
    if not math.isfinite(threshold) or not 0 <= margin < math.inf:
        raise ErnieError(f"threshold must be a number and margin 0 or more, got {threshold} and {margin}.")
    settings = name_settings(settings)
    asked: Criterion = criterion or ("alignment" if scorer.reads_prompt else "fidelity")
    if asked == "alignment" and not scorer.reads_prompt:
        raise ErnieError(f"{scorer.name} does not read the prompt and cannot judge alignment; judge fidelity by it.")
    pictures = [picture for setting in settings for picture in setting.pictures]
    values, notes = _score(pictures, scorer, batch_size, on_scored)
    sign = 1 if scorer.higher_is_better else -1

    def gap(pair: Pair) -> float:
        return sign * (values[pair.first.file] - values[pair.second.file])

    told: dict[str, Any] = {"judge": scorer.name, "criterion": asked}
    found = [
        of_one(p, setting, "pass" if sign * (values[p.file] - threshold) >= 0 else "fail", values[p.file], **told)
        for setting in settings
        for p in setting.pictures
        if p.file in values
    ]
    if len(settings) == 2:
        pairs, more = match(*settings)
        notes += more
        for pair in pairs:
            if pair.first.file in values and pair.second.file in values:
                better: Outcome = "same" if abs(gap(pair)) <= margin else "first" if gap(pair) > 0 else "second"
                found.append(of_two(pair, settings, better, values=values, **told))
    notes += [f"{s.missing} pictures of {s.name} are not made yet" for s in settings if s.missing]
    return Verdicts(verdicts=tuple(found), notes=tuple(notes))


def _score(
    pictures: Sequence[Picture], scorer: Scorer, batch_size: int, on_scored: Callable[[int], None] | None
) -> tuple[dict[Path, float], list[str]]:
    """File -> score, and a line per picture that cannot be read."""
    used: list[Picture] = []
    problems: list[str] = []

    def readable() -> Iterator[Any]:
        for picture in pictures:
            try:
                rgb_HWC = to_rgb(picture.file)
            except ErnieError as e:
                problems.append(str(e))
                continue
            used.append(picture)
            yield rgb_HWC

    def prompts() -> Iterator[str]:
        taken = 0
        while taken < len(used):
            taken += 1
            yield used[taken - 1].prompt

    texts = prompts() if scorer.reads_prompt else None
    values = scorer.score(readable(), texts, batch_size=batch_size, on_scored=on_scored)
    if not values:
        raise ErnieError(f"none of {len(pictures)} pictures could be read ({'; '.join(problems[:5])}).")
    return {picture.file: value for picture, value in zip(used, values, strict=True)}, problems


def of_one(
    picture: Picture,
    setting: Setting,
    outcome: Outcome,
    value: float | None = None,
    *,
    judge: str,
    criterion: Criterion,
) -> Verdict:
    """The verdict on one picture of a setting."""
    return Verdict(
        **_told(picture), judge=judge, criterion=criterion, outcome=outcome, setting=setting.name, value=value
    )


def of_two(
    pair: Pair,
    settings: Sequence[Setting],
    outcome: Outcome,
    *,
    judge: str,
    criterion: Criterion,
    values: Mapping[Path, float] | None = None,
) -> Verdict:
    """The verdict on a pair of two settings; `values`: file -> the number behind it."""
    first, second = settings
    return Verdict(
        **_told(pair.first),
        judge=judge,
        criterion=criterion,
        outcome=outcome,
        setting=first.name,
        other_setting=second.name,
        other_file=str(pair.second.file),
        value=None if values is None else values[pair.first.file],
        other_value=None if values is None else values[pair.second.file],
    )


def _told(picture: Picture) -> dict[str, Any]:
    names = ("number", "prompt", "category", "source", "seed")
    return {"file": str(picture.file), **{name: getattr(picture, name) for name in names}}


def join(parts: Iterable[Verdicts]) -> Verdicts:
    """All verdicts and notes, in order, each note once."""
    parts = list(parts)
    return Verdicts(
        verdicts=tuple(verdict for part in parts for verdict in part.verdicts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
