"""How well scores agree with people: rank and linear correlation, their intervals, and bias by category.

Sources: tau-b of Kendall 1945; Knight 1966 for its O(n log n) count; BCa bootstrap intervals of Efron 1987 (Better
Bootstrap Confidence Intervals, JASA 82); score interval of Wilson 1927. Everything is float64 and on numpy arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..errors import ErnieError

SAMPLES = 1000  # bootstrap resamples
LEVEL = 0.95
FEW_IMAGES = 10  # below this an interval is given, and called unreliable
_JACKKNIFE_LIMIT = 2000  # above, the acceleration (of order 1 / sqrt n) is taken as 0 instead of n more evaluations

_Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the ends of its confidence interval; NaN where they could not be had."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Correlations of scores with human scores over one group of images."""

    category: str
    """"" for all images."""
    n: int
    srcc: Interval | None
    """Spearman's; None when it is undefined here, for the reason in `problem`."""
    plcc: Interval | None
    """Pearson's."""
    krcc: Interval | None
    """Kendall's tau-b."""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Bias:
    """How much higher a scorer ranks the images of a category than people do."""

    category: str
    n: int
    mean_score: float
    """Mean of the rank-normalised scores, in (0, 1); 0.5 = average."""
    mean_human: float
    """The same of the human scores."""
    bias: Interval
    """mean_score - mean_human: above 0 = over-rated."""

    @property
    def verdict(self) -> str:
        """ "over-rated" or "under-rated" when the interval lies on one side of 0, else ""."""
        if self.bias.low > 0:
            return "over-rated"
        return "under-rated" if self.bias.high < 0 else ""


# --- correlation -----------------------------------------------------------------------------------------------


def srcc(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation, in [-1, 1]; equal values share their mean rank.

    Raises:
        ErnieError: unequal length, fewer than two values, a value that is not finite, or all values equal.
    """
    return _srcc(*_checked(x, y))


def plcc(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Pearson's linear correlation, in [-1, 1]; raises what `srcc` raises."""
    return _plcc(*_checked(x, y))


def krcc(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau-b, in [-1, 1], in O(n log n); raises what `srcc` raises."""
    return _krcc(*_checked(x, y))


def rank(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1 (least), float64 [n]; equal values share their mean rank."""
    places = _dense(np.asarray(values, float))
    counts = np.bincount(places)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def rank_normalise(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(rank - 1/2) / n: the order of the values as numbers in (0, 1) with mean 0.5, whatever their scale."""
    return (rank(values) - 0.5) / len(values)


def _srcc(x: np.ndarray, y: np.ndarray) -> float:
    return _plcc(rank(x), rank(y))


def _plcc(x: np.ndarray, y: np.ndarray) -> float:
    """NaN when one of them is constant."""
    scale_x, scale_y = np.abs(x).max(), np.abs(y).max()
    if scale_x == 0 or scale_y == 0 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x / scale_x, y / scale_y  # neither 1e200 nor 1e-200 leaves float64 when squared
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / size)) if size else math.nan


def _krcc(x: np.ndarray, y: np.ndarray) -> float:
    """NaN when one of them is constant."""
    x, y = _dense(x), _dense(y)
    order = np.lexsort((y, x))
    pairs = math.comb(len(x), 2)
    ties_x, ties_y = _tied_pairs(x), _tied_pairs(y)
    ties_both = _tied_pairs(_dense(x * (y.max() + 1) + y))
    if pairs in (ties_x, ties_y):
        return math.nan
    difference = pairs - ties_x - ties_y + ties_both - 2 * _inversions(y[order])
    return max(-1.0, min(1.0, difference / math.sqrt(pairs - ties_x) / math.sqrt(pairs - ties_y)))


def _dense(values: np.ndarray) -> np.ndarray:
    """0 for the least value, 1 for the next one, ...; int64 [n]."""
    return np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _tied_pairs(places: np.ndarray) -> int:
    counts = np.bincount(places)
    return int((counts * (counts - 1) // 2).sum())


def _inversions(places: np.ndarray) -> int:
    """Pairs i < j with places[i] > places[j]: a radix sort from the highest bit, which counts what it swaps."""
    found = 0
    for bit in range(int(places.max()).bit_length() - 1, -1, -1):
        one = (places >> bit) & 1
        group = places >> (bit + 1)  # ascending: sorted so far by the higher bits
        start = np.searchsorted(group, group)
        ones_before = np.cumsum(one) - one
        ones_here = ones_before - ones_before[start]  # ones in front of this one in its group
        found += int(ones_here[one == 0].sum())
        index = np.arange(len(places))
        zeros_here = index - start - ones_here
        end = np.searchsorted(group, group, side="right")
        zeros_in_group = (end - start) - (np.append(ones_before, one.sum())[end] - ones_before[start])
        target = start + np.where(one == 0, zeros_here, zeros_in_group + ones_here)
        moved = np.empty_like(places)
        moved[target] = places
        places = moved
    return found


def _checked(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, float).reshape(-1), np.asarray(y, float).reshape(-1)
    if problem := _problem(a, b):
        raise ErnieError(f"no correlation: {problem}.")
    return a, b


def _problem(x: np.ndarray, y: np.ndarray) -> str:
    """Why two rows of numbers have no correlation; "" when they have one."""
    if len(x) != len(y):
        return f"as many scores as human scores expected, got {len(x)} and {len(y)}"
    if len(x) < 2:
        return f"two images at least are needed, got {len(x)}"
    for name, values in (("scores", x), ("human scores", y)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            return f"{len(wrong)} of the {name} are not finite, the first is number {wrong[0] + 1} ({values[wrong[0]]})"
        if np.ptp(values) == 0:
            return f"all {name} are {values[0]:g}, so there is no order to compare"
    return ""


# --- intervals -------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: _Statistic,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """A statistic of pairs (x, y) and its BCa interval, from resamples of whole pairs.

    `statistic` is `srcc`, `plcc`, `krcc` or any function of two arrays that gives NaN or raises ErnieError where it
    is undefined; such resamples are left out. The ends are NaN when more than half of them are.

    Raises:
        ErnieError: the statistic is undefined for all pairs, or samples or level is out of range.
    """
    a, b = _checked(x, y)
    return _bootstrap(_PLAIN.get(statistic, statistic), a, b, samples=samples, level=level, seed=seed)


def bootstrap_difference(
    statistic: _Statistic,
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    human: Sequence[float] | np.ndarray,
    *,
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """statistic(first, human) - statistic(second, human) with its interval, both on the same resampled images.

    Two intervals of single scorers may overlap although one scorer is clearly better: their errors are shared. This
    one answers whether it is. Raises what `bootstrap` raises.
    """
    a, h = _checked(first, human)
    b, _ = _checked(second, human)
    plain = _PLAIN.get(statistic, statistic)
    place = np.arange(len(h))

    def difference(i: np.ndarray, _: np.ndarray) -> float:
        return _or_nan(plain, a[i], h[i]) - _or_nan(plain, b[i], h[i])

    return _bootstrap(difference, place, place, samples=samples, level=level, seed=seed)


def wilson(wins: float, total: float, *, level: float = LEVEL) -> Interval:
    """A win rate in [0, 1] with Wilson's score interval; a tie may count as half a win.

    0 of 0 is 0.5 in [0, 1]: nothing is known.

    Raises:
        ErnieError: wins is not within 0..total.
    """
    if not 0 <= wins <= total:
        raise ErnieError(f"wins must be from 0 to the number of comparisons ({total:g}), got {wins:g}.")
    if total == 0:
        return Interval(value=0.5, low=0.0, high=1.0)
    share, z = wins / total, NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def mean_interval(values: np.ndarray, *, samples: int = SAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """The mean with its BCa interval."""
    return _bootstrap(lambda v, _: float(v.mean()), values, values, samples=samples, level=level, seed=seed)


def ratio_interval(
    parts: Sequence[float], wholes: Sequence[float], *, samples: int = SAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """sum(parts) / sum(wholes) with its BCa interval, from resamples of the pairs; no ends for a single pair."""
    a, b = np.asarray(parts, float), np.asarray(wholes, float)
    if len(a) == 1:
        return Interval(value=float(a[0] / b[0]), low=math.nan, high=math.nan)
    return _bootstrap(lambda p, w: float(p.sum() / w.sum()), a, b, samples=samples, level=level, seed=seed)


def _bootstrap(
    statistic: _Statistic, x: np.ndarray, y: np.ndarray, *, samples: int, level: float, seed: int
) -> Interval:
    if samples < 10:
        raise ErnieError(f"bootstrap samples must be 10 or more, got {samples}.")
    if not 0 < level < 1:
        raise ErnieError(f"the confidence level must lie between 0 and 1, got {level:g}.")
    value, n = float(statistic(x, y)), len(x)
    draws = _indices(n, samples, seed)
    if statistic is _krcc and n <= _JACKKNIFE_LIMIT:
        found, left_out = _krcc_resampled(x, y, draws)
    else:
        found = np.array([_or_nan(statistic, x[i], y[i]) for i in draws])
        left_out = _leave_one_out(statistic, x, y) if n <= _JACKKNIFE_LIMIT else np.empty(0)
    found = found[np.isfinite(found)]
    if len(found) <= samples // 2:
        return Interval(value=value, low=math.nan, high=math.nan)
    normal = NormalDist()
    # bias correction; equal values count half, and no share is 0 or 1, where it would be infinite
    below = (np.sum(found < value) + 0.5 * np.sum(found == value)) / len(found)
    z0 = normal.inv_cdf(min(max(below, 0.5 / len(found)), 1 - 0.5 / len(found)))
    acceleration = _acceleration(left_out)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + normal.inv_cdf(share)
        ends.append(normal.cdf(z0 + z / (1 - acceleration * z)) if acceleration * z < 1 else share)
    low, high = np.quantile(found, sorted(ends))
    return Interval(value=value, low=float(low), high=float(high))


@functools.lru_cache(maxsize=2)
def _indices(n: int, samples: int, seed: int) -> np.ndarray:
    """Places to draw, [samples, n]; the same for every statistic of one size, so that they share their resamples."""
    return np.random.default_rng([seed, n]).integers(0, n, (samples, n), dtype=np.int32)


def _leave_one_out(statistic: _Statistic, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([_or_nan(statistic, np.delete(x, i), np.delete(y, i)) for i in range(len(x))])


def _acceleration(left_out: np.ndarray) -> float:
    """Skewness of the leave-one-out values; 0 where it cannot be had."""
    if len(left_out) < 3 or not np.isfinite(left_out).all():
        return 0.0
    difference = left_out.mean() - left_out
    spread = float((difference**2).sum())
    return float((difference**3).sum()) / (6 * spread**1.5) if spread > 1e-24 else 0.0


def _krcc_resampled(x: np.ndarray, y: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """tau-b of each resample [samples], and of all pairs but one [n].

    A resample weights image i by how often it was drawn, w_i, so its sums over pairs are w^T S w with one matrix S for
    all resamples: a product instead of a sort each. float32 is exact, since no sum passes n^2 < 2^24.
    """
    n = len(x)
    weights = np.stack([np.bincount(row, minlength=n) for row in draws]).astype(np.float32)
    sign_x, sign_y = (np.sign(v[:, None] - v[None, :]).astype(np.float32) for v in (x, y))
    sums, without = [], []
    for matrix in (sign_x * sign_y, np.abs(sign_x), np.abs(sign_y)):
        sums.append(np.einsum("bn,bn->b", weights @ matrix, weights))
        rows = matrix.sum(axis=1)
        without.append(rows.sum() - 2 * rows)
    return _tau(*sums), _tau(*without)


def _tau(difference: np.ndarray, untied_x: np.ndarray, untied_y: np.ndarray) -> np.ndarray:
    size = np.sqrt(untied_x.astype(float)) * np.sqrt(untied_y.astype(float))
    return np.where(size > 0, difference / np.maximum(size, 1.0), math.nan)


def _or_nan(statistic: _Statistic, x: np.ndarray, y: np.ndarray) -> float:
    try:
        return statistic(x, y)
    except ErnieError:  # this resample has no value
        return math.nan


# --- tables ----------------------------------------------------------------------------------------------------


def agreement(
    scores: Sequence[float] | np.ndarray,
    human: Sequence[float] | np.ndarray,
    *,
    category: str = "",
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Agreement:
    """All three correlations of scores with human scores; where they are undefined `problem` says why."""
    x, y = np.asarray(scores, float).reshape(-1), np.asarray(human, float).reshape(-1)
    problem = _problem(x, y)
    if problem:
        return Agreement(category=category, n=len(x), srcc=None, plcc=None, krcc=None, problem=problem)
    if len(x) < FEW_IMAGES:
        problem = f"{len(x)} images: the interval is unreliable"
    s, p, k = (_bootstrap(f, x, y, samples=samples, level=level, seed=seed) for f in (_srcc, _plcc, _krcc))
    return Agreement(category=category, n=len(x), srcc=s, plcc=p, krcc=k, problem=problem)


def category_table(
    scores: Sequence[float] | np.ndarray,
    human: Sequence[float] | np.ndarray,
    categories: Sequence[str],
    *,
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> list[Agreement]:
    """`agreement` within each category, the largest first."""
    x, y = np.asarray(scores, float), np.asarray(human, float)
    return [
        agreement(x[places], y[places], category=name, samples=samples, level=level, seed=seed)
        for name, places in _by_category(categories, len(x))
    ]


def bias_table(
    scores: Sequence[float] | np.ndarray,
    human: Sequence[float] | np.ndarray,
    categories: Sequence[str],
    *,
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> list[Bias]:
    """How much each category is over-rated, the most over-rated first.

    Scores and human scores are rank-normalised over all images, so that scales do not matter and the biases, weighted
    by the number of images, add up to 0. A scorer that knows little pulls every category to the middle: it under-rates
    what people like and over-rates what they do not. Intervals are of the mean over the images of the category.

    Raises:
        ErnieError: what `srcc` raises.
    """
    a, b = _checked(scores, human)
    x, y = rank_normalise(a), rank_normalise(b)
    rows = [
        Bias(
            category=name,
            n=len(places),
            mean_score=float(x[places].mean()),
            mean_human=float(y[places].mean()),
            bias=mean_interval((x - y)[places], samples=samples, level=level, seed=seed)
            if len(places) > 1
            else Interval(value=float((x - y)[places[0]]), low=math.nan, high=math.nan),
        )
        for name, places in _by_category(categories, len(x))
    ]
    return sorted(rows, key=lambda row: -row.bias.value)


def _by_category(categories: Sequence[str], n: int) -> list[tuple[str, np.ndarray]]:
    if len(categories) != n:
        raise ErnieError(f"one category per image expected ({n}), got {len(categories)}.")
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(categories):
        groups.setdefault(name, []).append(i)
    return [(name, np.array(places)) for name, places in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))]


_PLAIN: dict[_Statistic, _Statistic] = {srcc: _srcc, plcc: _plcc, krcc: _krcc}  # without the checks of each resample
