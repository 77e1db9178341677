"""Rates of verdicts by category, with intervals that know that pictures of one prompt are alike.

A pass rate of 4 pictures for each of 16 prompts is not one of 64 independent trials: the prompts are what was drawn.
Wilson's 95 % interval is therefore taken at the effective number of verdicts, n^2 / sum m_i (1 + (m_i - 1) rho) with
m_i verdicts on prompt i (Kish's design effect) and the intraclass correlation rho of the analysis of variance (Fleiss
1981), which one judge's categories estimate together: three prompts say next to nothing about rho by themselves.
Where every prompt has one verdict it is Wilson's interval as it stands. Simulated coverage: bench/EVALUATION.md.
Effective sizes in score intervals: Dean and Pagano 2015 (J. Surv. Stat. Methodol. 3(4)).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..scoring.metrics import FEW_IMAGES, Interval, mean_interval, wilson
from ..scoring.win_rate import sign_test
from .verdicts import OF_TWO, Criterion, Outcome, Verdict

FEW_PROMPTS = FEW_IMAGES  # below, a category says so
ALL = ""  # the category of everything together


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of verdicts."""

    interval: Interval
    count: int
    total: int
    prompts: int
    effective: float
    """As many independent verdicts would say as much."""
    ids: tuple[int, ...] = ()
    """Places of the verdicts that it is made of, among all that were given."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often the pictures of each setting pass, in one category, for one judge and criterion."""

    judge: str
    criterion: Criterion
    category: str
    rates: dict[str, Rate]
    """By setting."""
    difference: Interval | None
    """Second setting minus first, over the prompts that both were judged on; None unless there are two."""
    means: dict[str, Interval]
    """By setting: the mean of the numbers behind the verdicts, over prompts; empty where there are none."""


@dataclass(frozen=True, kw_only=True)
class Wins:
    """How often which setting is better, in one category, for one judge and criterion."""

    judge: str
    criterion: Criterion
    category: str
    settings: tuple[str, str]
    rates: dict[Outcome, Rate]
    """Of first, same and second."""
    p_value: float
    """Of the two-sided sign test over prompts: on how many more of them which one won more often."""


def intraclass(groups: Sequence[Sequence[tuple[int, int]]]) -> float:
    """Correlation of two verdicts on one prompt, in 0..1, from groups (categories) of (successes, verdicts) per prompt.

    The analysis-of-variance estimate; 1, the careful value, where the verdicts cannot tell (no prompt with two, or all
    alike).
    """
    between = within = weights = 0.0
    degrees_between = degrees_within = 0
    for group in groups:
        total = sum(m for _, m in group)
        if not total:
            continue
        mean = sum(s for s, _ in group) / total
        between += sum(m * (s / m - mean) ** 2 for s, m in group)
        within += sum(s * (m - s) / m for s, m in group)
        degrees_between += len(group) - 1
        degrees_within += total - len(group)
        weights += total - sum(m * m for _, m in group) / total
    if not degrees_between or not degrees_within:
        return 1.0
    size = weights / degrees_between
    b, w = between / degrees_between, within / degrees_within
    spread = b + (size - 1) * w
    return min(1.0, max(0.0, (b - w) / spread)) if spread > 0 else 1.0


def clustered(prompts: Sequence[tuple[int, int]], rho: float) -> tuple[Interval, float]:
    """(rate with its interval, effective number) of (successes, verdicts) per prompt."""
    total = sum(m for _, m in prompts)
    effective = total * total / sum(m * (1 + (m - 1) * rho) for _, m in prompts)
    share = sum(s for s, _ in prompts) / total
    return wilson(share * effective, effective), effective


def pass_rates(verdicts: Sequence[Verdict]) -> list[Passes]:
    """By judge, criterion and category: `ALL` first, then in the order of the prompt set."""
    found = []
    for (judge, criterion), ids in _grouped(verdicts, pairs=False).items():
        settings = list(dict.fromkeys(verdicts[i].setting for i in ids))
        for category, members in _categories(verdicts, ids).items():
            own = {s: [i for i in members if verdicts[i].setting == s] for s in settings}
            own = {s: places for s, places in own.items() if places}
            rates: dict[str, Rate] = {
                s: _rate(verdicts, places, "pass", [i for i in ids if verdicts[i].setting == s], category)
                for s, places in own.items()
            }
            found.append(
                Passes(
                    judge=judge,
                    criterion=criterion,
                    category=category,
                    rates=rates,
                    difference=_difference(verdicts, list(own.values())) if len(own) == 2 else None,
                    means={s: m for s, places in own.items() if (m := _mean(verdicts, places)) is not None},
                )
            )
    return found


def win_rates(verdicts: Sequence[Verdict]) -> list[Wins]:
    """By judge, criterion, two settings and category: `ALL` first, then in the order of the prompt set."""
    found = []
    for (judge, criterion), together in _grouped(verdicts, pairs=True).items():
        couples: dict[tuple[str, str], list[int]] = {}
        for i in together:
            couples.setdefault((verdicts[i].setting, verdicts[i].other_setting), []).append(i)
        for settings, ids in couples.items():
            for category, members in _categories(verdicts, ids).items():
                rates: dict[Outcome, Rate] = {
                    outcome: _rate(verdicts, members, outcome, ids, category) for outcome in OF_TWO
                }
                leads = _leads(verdicts, members)
                found.append(
                    Wins(
                        judge=judge,
                        criterion=criterion,
                        category=category,
                        settings=settings,
                        rates=rates,
                        p_value=sign_test(sum(v > 0 for v in leads), sum(v < 0 for v in leads)),
                    )
                )
    return found


def _grouped(verdicts: Sequence[Verdict], *, pairs: bool) -> dict[tuple[str, Criterion], list[int]]:
    groups: dict[tuple[str, Criterion], list[int]] = {}
    for i, verdict in enumerate(verdicts):
        if bool(verdict.other_setting) == pairs:
            groups.setdefault((verdict.judge, verdict.criterion), []).append(i)
    return groups


def _categories(verdicts: Sequence[Verdict], ids: Sequence[int]) -> dict[str, list[int]]:
    """Category -> places, everything first, then as in the prompt set; a set without categories has everything only."""
    groups: dict[str, list[int]] = {}
    for i in sorted(ids, key=lambda i: verdicts[i].number):
        groups.setdefault(verdicts[i].category, []).append(i)
    named = {category: sorted(places) for category, places in groups.items() if category != ALL}
    return {ALL: list(ids), **named}


def _by_prompt(verdicts: Sequence[Verdict], ids: Sequence[int]) -> dict[str, list[int]]:
    """Prompt -> places; by its text, since the same text in two rows paints the same pictures."""
    groups: dict[str, list[int]] = {}
    for i in ids:
        groups.setdefault(verdicts[i].prompt, []).append(i)
    return groups


def _counts(verdicts: Sequence[Verdict], ids: Sequence[int], outcome: Outcome) -> list[tuple[int, int]]:
    return [
        (sum(verdicts[i].outcome == outcome for i in places), len(places))
        for places in _by_prompt(verdicts, ids).values()
    ]


def _rate(
    verdicts: Sequence[Verdict], ids: Sequence[int], outcome: Outcome, everything: Sequence[int], category: str
) -> Rate:
    """`everything`: the verdicts of all categories, which tell how alike those of one prompt are."""
    whole = _categories(verdicts, everything)
    parts = [whole[ALL]] if category == ALL or len(whole) == 1 else [p for name, p in whole.items() if name != ALL]
    rho = intraclass([_counts(verdicts, part, outcome) for part in parts])
    counts = _counts(verdicts, ids, outcome)
    interval, effective = clustered(counts, rho)
    return Rate(
        interval=interval,
        count=sum(s for s, _ in counts),
        total=len(ids),
        prompts=len(counts),
        effective=effective,
        ids=tuple(ids),
    )


def _difference(verdicts: Sequence[Verdict], sides: Sequence[Sequence[int]]) -> Interval:
    """Mean over prompts of the second's pass rate minus the first's; the bootstrap's interval over prompts."""
    shares = [
        {prompt: np.mean([verdicts[i].outcome == "pass" for i in places]) for prompt, places in group.items()}
        for group in (_by_prompt(verdicts, side) for side in sides)
    ]
    both = [prompt for prompt in shares[0] if prompt in shares[1]]
    return over_prompts([float(shares[1][prompt] - shares[0][prompt]) for prompt in both])


def _mean(verdicts: Sequence[Verdict], ids: Sequence[int]) -> Interval | None:
    values: dict[str, list[float]] = defaultdict(list)
    for i in ids:
        value = verdicts[i].value
        if value is not None:
            values[verdicts[i].prompt].append(value)
    return over_prompts([float(np.mean(v)) for v in values.values()]) if values else None


def over_prompts(values: Sequence[float]) -> Interval:
    """The mean of a value per prompt with the bootstrap's interval; no ends where all are equal: that tells nothing."""
    if len(set(values)) < 2:
        return Interval(value=float(np.mean(values)) if values else math.nan, low=math.nan, high=math.nan)
    return mean_interval(np.asarray(values, float))


def _leads(verdicts: Sequence[Verdict], ids: Sequence[int]) -> list[int]:
    """Per prompt: how many more pairs the first won than the second."""
    worth = {"first": 1, "same": 0, "second": -1}
    return [sum(worth[verdicts[i].outcome] for i in places) for places in _by_prompt(verdicts, ids).values()]
