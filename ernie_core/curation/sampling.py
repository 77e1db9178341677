"""How often each picture is drawn: between categories p ~ n^alpha q^gamma, inside one by score with a temperature.

The ERNIE-Image report (arXiv 2605.25347, section 2.1) samples on two levels: between fine-grained categories by size
and aggregate aesthetic quality together, so that frequent categories do not dominate, and inside a category by score.
Its formula is not published. Here, with n pictures in category c and q the mean or an upper quantile of their scores,

    p(c) ~ n^alpha q^gamma            p(i | c) ~ exp(s_i / T)

alpha in (0, 1) damps large categories, gamma above 0 favours good ones, a low temperature T favours good pictures.
By default scores enter as percentiles of the whole pool (0 the worst, 1 the best, ties in the middle), so that alpha,
gamma and T mean the same for every scorer, whatever its unit and sign.

Draws are stateless: number k of a seed is a function of (seed, k), whatever the batch size and however many workers
share the work (see draws.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..errors import ErnieError

Quality = Literal["mean", "upper"]
Scale = Literal["percentile", "raw"]
Within = Literal["score", "rank"]

UPPER = 0.1
"""Quality "upper" is the score that this share of a category's pictures reach."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How often categories and pictures are drawn."""

    alpha: float = 0.5
    """Exponent of a category's size, 0 to 1: 1 = by size, 0 = all categories alike."""
    gamma: float = 1.0
    """Exponent of a category's quality; 0 = quality does not count."""
    quality: Quality = "mean"
    """Of a category: the mean of its scores, or the score that its best tenth reaches ("upper")."""
    scale: Scale = "percentile"
    """Scores as percentiles of the whole pool, in [0, 1], or as they are ("raw": all qualities must be above 0)."""
    within: Within = "score"
    """What the temperature acts on: the score, or the rank in the category (1 the best, 0 the worst)."""
    temperature: float = 0.5
    """Of the draw inside a category, in units of `scale` (of 1 for ranks): infinite = all alike, 0 = only the best."""

    def __post_init__(self) -> None:
        for name, choices in (("quality", Quality), ("scale", Scale), ("within", Within)):
            if getattr(self, name) not in get_args(choices):
                expected = ", ".join(get_args(choices))
                raise ErnieError(f"{name} must be one of {expected}; got {getattr(self, name)!r}.")
        if not 0 <= self.alpha <= 2:
            raise ErnieError(f"alpha must lie between 0 (all categories alike) and 2, got {self.alpha:g}.")
        if not -10 <= self.gamma <= 10:
            raise ErnieError(f"gamma must lie between -10 and 10 (0 = quality does not count), got {self.gamma:g}.")
        if not self.temperature >= 0:
            raise ErnieError(f"temperature must be 0 (only the best) or more, got {self.temperature:g}.")

    @property
    def uses_scores(self) -> bool:
        """Whether anything but the sizes of categories counts."""
        return self.gamma != 0 or self.temperature != math.inf


PRESETS = {
    "tempered": Sampling(),
    "proportional": Sampling(alpha=1.0, gamma=0.0, temperature=math.inf),
    "uniform over categories": Sampling(alpha=0.0, gamma=0.0, temperature=math.inf),
    "article: count x mean score": Sampling(alpha=1.0, gamma=1.0, scale="raw", temperature=math.inf),
}
"""By name. The article's weight is not in the report: it lets frequent categories dominate, the opposite of its aim."""
ARTICLE = "article: count x mean score"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Rows that can be drawn, sorted by category and inside it from the best score to the worst."""

    names: tuple[str, ...]
    """Of the C categories, sorted."""
    starts: np.ndarray
    """int64 [C + 1]: where each category begins in the arrays below."""
    order: np.ndarray
    """[N]: the row of the manifest at each place."""
    scores: np.ndarray
    """float32 [N], in the order of the places."""
    percentiles: np.ndarray
    """float32 [N]: share of the pool that is worse, ties counted half."""
    is_scored: bool = True
    """False where no row has a score."""
    left_out: tuple[tuple[str, int], ...] = ()
    """(why, how many) of the rows that cannot be drawn."""
    folder: Path | None = None
    """Where it is kept; None = in memory only."""

    def __len__(self) -> int:
        return len(self.order)

    @property
    def counts(self) -> np.ndarray:
        """Pictures per category, int64 [C]."""
        return np.diff(self.starts)

    def values(self, scale: Scale) -> np.ndarray:
        """What a score counts as."""
        return self.percentiles if scale == "percentile" else self.scores

    def quality(self, quality: Quality, scale: Scale) -> np.ndarray:
        """One number per category, float64 [C]."""
        values = self.values(scale)
        if quality == "upper":
            places = self.starts[:-1] + np.ceil(UPPER * self.counts).astype(np.int64) - 1
            return np.asarray(values[places], dtype=np.float64)
        # category by category: a sum over a memory map of ten million rows must not read it whole
        parts = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        return np.array([np.mean(values[a:b], dtype=np.float64) for a, b in parts])


def make_pool(
    categories: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    names: Sequence[str],
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    left_out: Iterable[tuple[str, int]] = (),
) -> Pool:
    """A pool in memory.

    Args:
        categories: number of each row's category in `names`.
        scores: of each row; all of them NaN where nothing was scored.
        names: of the categories, sorted; those without a row are left out.
        rows: of the manifest; None = 0, 1, 2, ...
        left_out: (why, how many) of the rows that are not among these.

    Raises:
        ErnieError: there is no row, or some scores are finite and some are not.
    """
    category, score = np.asarray(categories, dtype=np.int32), np.asarray(scores, dtype=np.float32)
    if not len(category):
        raise ErnieError(
            f"there is nothing to draw from: no row of the manifest can be used. {_say_left_out(left_out)}"
        )
    known = np.isfinite(score)
    if known.any() and not known.all():
        raise ErnieError(f"{int((~known).sum())} of {len(score)} scores are not finite; leave those rows out.")
    if not known.any():
        score = np.zeros(len(score), dtype=np.float32)
    best_first = np.lexsort((-score, category))
    category, score = category[best_first], score[best_first]
    present, counts = np.unique(category, return_counts=True)
    return Pool(
        names=tuple(str(names[i]) for i in present.tolist()),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        order=best_first if rows is None else np.asarray(rows)[best_first],
        scores=score,
        percentiles=_percentiles(score),
        is_scored=bool(known.any()),
        left_out=tuple(left_out),
    )


def _say_left_out(left_out: Iterable[tuple[str, int]]) -> str:
    return "; ".join(f"{count} {why}" for why, count in left_out)


def _percentiles(scores: np.ndarray) -> np.ndarray:
    """The share of scores below each, equal ones counted half, float32."""
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, scores, side="left")
    upto = np.searchsorted(ordered, scores, side="right")
    return ((below + upto) / (2 * len(scores))).astype(np.float32)


# --- probabilities --------------------------------------------------------------------------------------------------


def category_shares(pool: Pool, sampling: Sampling) -> np.ndarray:
    """p(c), float64 [C], summing to 1.

    Raises:
        ErnieError: scores are needed and there are none, or a raw quality is not above 0.
    """
    if sampling.uses_scores and not pool.is_scored:
        raise ErnieError(
            "this sampling needs scores, and no row of the manifest has one. Run the scores stage first, or set gamma "
            "to 0 and the temperature to infinite."
        )
    log_p = sampling.alpha * np.log(pool.counts)
    if sampling.gamma:
        quality = pool.quality(sampling.quality, sampling.scale)
        worst = int(quality.argmin())
        if not quality[worst] > 0:
            raise ErnieError(
                f"the quality of category {pool.names[worst]!r} is {quality[worst]:g}, and n^alpha q^gamma needs "
                'qualities above 0. Take scores as percentiles (scale "percentile").'
            )
        log_p = log_p + sampling.gamma * np.log(quality)
    p = np.exp(log_p - log_p.max())
    return p / p.sum()


def inside_shares(pool: Pool, sampling: Sampling, category: int) -> np.ndarray:
    """p(i | c) of one category's places, float64, summing to 1."""
    start, end = int(pool.starts[category]), int(pool.starts[category + 1])
    if sampling.temperature == math.inf:
        return np.full(end - start, 1 / (end - start))
    if sampling.within == "rank":
        values = _ranks(np.asarray(pool.scores[start:end]))
    else:
        values = np.asarray(pool.values(sampling.scale)[start:end], dtype=np.float64)
    gap = values - values.max()
    with np.errstate(over="ignore"):  # the smallest temperatures: minus infinity is right
        p = (gap == 0).astype(np.float64) if sampling.temperature == 0 else np.exp(gap / sampling.temperature)
    return p / p.sum()


def _ranks(descending: np.ndarray) -> np.ndarray:
    """1 for the best .. 0 for the worst, equal scores alike (their mean); 1 for one alone."""
    if len(descending) == 1:
        return np.ones(1)
    _, first, counts = np.unique(-descending, return_index=True, return_counts=True)
    middle = first + (counts - 1) / 2
    return np.repeat(1 - middle / (len(descending) - 1), counts)


def row_shares(pool: Pool, sampling: Sampling) -> np.ndarray:
    """p of every place of the pool, float64 [N], summing to 1: for datasets that fit into memory."""
    shares = category_shares(pool, sampling)
    return np.concatenate([p * inside_shares(pool, sampling, c) for c, p in enumerate(shares.tolist())])
