"""How well a ranking is known after so many judgments: Swiss against round robin, Elo and random pairing.

Simulated people know every picture's strength (normal) and answer the other way round with a fixed probability, or, as
people do, the oftener the nearer the two are (Bradley-Terry, scaled so that 15 % of random pairs go wrong).
Measured is Spearman's rank correlation between the ranking and the strengths, mean and standard error over tournaments
that all four ways play with the same strengths. Deterministic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..ernie_core.scoring.metrics import srcc
from ..ernie_core.scoring.tournament import (
    Record,
    Round,
    bradley_terry,
    elo_ratings,
    pair_round,
    random_round,
    round_robin,
    stand,
)
from .compare import Row

SIZES = (64, 256)
ROUNDS = (4, 8, 12, 16)
NOISE = (0.1, 0.2, None)
"""Probability of a wrong answer; None = by distance."""
SCALE = 2.35  # of a difference of strengths in the logistic: 15 % wrong over random pairs of a normal distribution
REPEATS = 40

NextRound = Callable[[Record], Round]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Rank correlations, one per repetition."""

    swiss_standing: list[float]
    swiss: list[float]
    round_robin: list[float]
    elo: list[float]
    elo_nearest: list[float]
    random: list[float]


def play(
    num: int, rounds: int, next_round: NextRound, strengths: np.ndarray, *, noise: float | None, seed: int
) -> Record:
    """A tournament answered by somebody who knows the strengths and errs as `noise` says."""
    rng = np.random.default_rng([seed, 7])
    pairs, scores = np.zeros((0, 2), np.int64), np.zeros(0)
    for _ in range(rounds):
        made = next_round(Record(num_pictures=num, pairs_G2=pairs, scores_G=scores))
        new = np.array(made.pairs, np.int64).reshape(-1, 2)
        ahead = strengths[new[:, 0]] - strengths[new[:, 1]]
        wrong = noise if noise is not None else 1 / (1 + np.exp(SCALE * np.abs(ahead)))
        pairs = np.concatenate([pairs, new])
        scores = np.concatenate([scores, ((ahead > 0) ^ (rng.random(len(new)) < wrong)).astype(float)])
    return Record(num_pictures=num, pairs_G2=pairs, scores_G=scores)


def simulate(num: int, rounds: int, noise: float | None, *, repeats: int = REPEATS) -> Found:
    """Rank correlation with the true strengths after `rounds` * num / 2 judgments, for each way of pairing.

    Swiss is ranked by its standing and by Bradley-Terry; round robin (its first rounds) and random pairing, which can
    repeat a meeting, by Bradley-Terry; Elo by its ratings, after random pairs and after pairs of nearest ratings.
    """
    found = Found(swiss_standing=[], swiss=[], round_robin=[], elo=[], elo_nearest=[], random=[])
    for seed in range(repeats):
        strengths = np.random.default_rng([seed, num]).normal(size=num)

        def swiss(record: Record, seed: int = seed) -> Round:
            made = pair_round(record, seed=seed)
            assert made is not None, "fewer rounds than half of all meetings: there is always one"
            return made

        table = itertools.cycle(round_robin(num, seed=seed))
        rng = np.random.default_rng([seed, 11])
        ways: dict[str, NextRound] = {
            "swiss": swiss,
            "round_robin": lambda _, table=table: next(table),
            "random": lambda _, rng=rng: random_round(num, rng=rng),
            "elo_nearest": lambda record, rng=rng: nearest_round(record, rng),
        }
        records = {name: play(num, rounds, way, strengths, noise=noise, seed=seed) for name, way in ways.items()}
        for name in ("swiss", "round_robin", "random"):
            getattr(found, name).append(srcc(bradley_terry(records[name], errors=False).values_N, strengths))
        places = np.empty(num)
        places[stand(records["swiss"], seed=seed).order] = np.arange(num, 0, -1)
        found.swiss_standing.append(srcc(places, strengths))
        found.elo.append(srcc(elo_ratings(records["random"]), strengths))
        found.elo_nearest.append(srcc(elo_ratings(records["elo_nearest"]), strengths))
    return found


def nearest_round(record: Record, rng: np.random.Generator) -> Round:
    """Neighbours by Elo rating meet, whether they have met or not."""
    order = np.lexsort((rng.random(record.num_pictures), elo_ratings(record))).tolist()
    return Round(pairs=tuple(zip(order[::2], order[1::2], strict=True)))


def show(values: list[float]) -> str:
    return f"{np.mean(values):.3f} +-{np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def measure() -> list[Row]:
    rows = []
    for num in SIZES:
        for noise in NOISE:
            for rounds in ROUNDS:
                found = simulate(num, rounds, noise)
                wrong = "nearer pairs oftener wrong" if noise is None else f"{noise:.0%} wrong"
                others = [found.round_robin, found.elo, found.elo_nearest, found.random]
                rows.append(
                    Row(
                        name=f"{num} pictures, {rounds * num // 2} judgments ({rounds} rounds), {wrong}",
                        ours=f"Swiss {show(found.swiss)} (standing {show(found.swiss_standing)})",
                        peer_name="round robin / Elo random / Elo nearest / random",
                        peer=" / ".join(map(show, others)),
                        target="above the four",
                        met=all(np.mean(found.swiss) > np.mean(values) for values in others),
                    )
                )
    return rows
