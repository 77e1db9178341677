"""Swiss tournaments of pictures: who meets whom, who stands where, and how strong each one is.

Rules (FIDE C.04.1, as far as they concern pictures): the number of rounds is fixed, nobody meets anybody twice, each
round pairs equal or nearest points, an odd group has one bye per round, worth a point and given to nobody twice.
Ties between equal points are broken by Buchholz (sum of the opponents' points), then by Sonneborn-Berger.

One tournament holds one person's judgments: several people are several tournaments, whose rankings are merged
(`merge_rankings`), never their judgments (ERNIE-Image report, 3.1).

`left` and `right` are numbers of pictures; a score is the left one's: 1 better, 0.5 a tie, 0 worse, NaN not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ErnieError
from .metrics import rank_normalise

TIERS = 10
PRIOR = 0.3
"""Ridge of `bradley_terry`: strengths are drawn from a normal distribution of variance 1 / PRIOR. Meetings of equals
make likelihood alone exaggerate: over 6 to 14 simulated Swiss rounds 0.1 stretched the strengths by 1.3 to 1.6 and its
95 % intervals held 78 to 87 %; 0.3 gave 0.96 to 1.1 and 92 to 95 %."""
EXACT_INTERVALS = 1200
"""Up to this many pictures intervals come from the whole inverse; above, from random probes of it."""
_PROBES = 64
_NONE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """What has been played so far."""

    num_pictures: int
    pairs_G2: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(left, right) of every pair that was asked, judged or not."""
    scores_G: np.ndarray = field(default_factory=lambda: np.zeros(0))
    byes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_pictures < 1:
            raise ErnieError(f"a tournament needs at least one picture, got {self.num_pictures}.")
        if self.pairs_G2.shape != (len(self.scores_G), 2):
            raise ErnieError(f"{len(self.scores_G)} scores need as many pairs, got {self.pairs_G2.shape}.")
        known = np.concatenate([self.pairs_G2.reshape(-1), np.asarray(self.byes, np.int64)])
        if known.size and (known.min() < 0 or known.max() >= self.num_pictures):
            raise ErnieError(f"numbers of pictures must lie in 0 to {self.num_pictures - 1}.")
        if (self.pairs_G2[:, 0] == self.pairs_G2[:, 1]).any():
            raise ErnieError("a picture cannot meet itself.")
        judged = self.scores_G[~np.isnan(self.scores_G)]
        if judged.size and not np.isin(judged, (0.0, 0.5, 1.0)).all():
            raise ErnieError("scores must be 0, 0.5, 1 or NaN.")

    @property
    def judged(self) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, scores) without the pairs that were not judged."""
        keep = ~np.isnan(self.scores_G)
        return self.pairs_G2[keep], self.scores_G[keep]


@dataclass(frozen=True, kw_only=True, eq=False)
class Standing:
    """Where the pictures stand; arrays by picture number."""

    points_N: np.ndarray
    buchholz_N: np.ndarray
    sonneborn_berger_N: np.ndarray
    order: np.ndarray
    """Numbers of the pictures, best first; what nothing else decides, chance does (by seed)."""


@dataclass(frozen=True, kw_only=True)
class Round:
    pairs: tuple[tuple[int, int], ...]
    """(left, right), sides and order by chance."""
    bye: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Strengths:
    """Bradley-Terry: P(i is better than j) = 1 / (1 + exp(b_j - b_i))."""

    values_N: np.ndarray
    """b, mean 0 in every set of pictures that judgments connect."""
    errors_N: np.ndarray
    """Standard errors of b against that mean; +-1.96 of them are the 95 % interval. Infinite without any judgment."""


# --- Swiss ----------------------------------------------------------------------------------------------------------


def default_rounds(num_pictures: int) -> int:
    """ceil(log2 N) rounds single out the best picture; two more sort the middle. At most `most_rounds`."""
    return min(math.ceil(math.log2(max(num_pictures, 2))) + 2, most_rounds(num_pictures))


def most_rounds(num_pictures: int) -> int:
    """Rounds in which nobody has to meet anybody twice, or to have a second bye."""
    return max(num_pictures - 1, 0) if num_pictures % 2 == 0 else (num_pictures if num_pictures > 1 else 0)


def stand(record: Record, *, seed: int = 0) -> Standing:
    """The standing. A bye is a point, a pair that was not judged half a point for both; in the tie-breaks both count as
    a meeting with somebody of the picture's own points (FIDE's dummy opponent)."""
    num, scores = record.num_pictures, record.scores_G
    left, right = record.pairs_G2[:, 0], record.pairs_G2[:, 1]
    open_G = np.isnan(scores)
    given = np.where(open_G, 0.5, scores)
    byes = np.bincount(np.asarray(record.byes, np.int64), minlength=num).astype(float)

    def total(of_left: np.ndarray, of_right: np.ndarray) -> np.ndarray:
        return np.bincount(left, of_left, num) + np.bincount(right, of_right, num)

    points = total(given, 1 - given) + byes
    against_left = np.where(open_G, points[left], points[right])
    against_right = np.where(open_G, points[right], points[left])
    buchholz = total(against_left, against_right) + byes * points
    sonneborn_berger = total(given * against_left, (1 - given) * against_right) + byes * points
    chance = np.random.default_rng([seed, len(scores)]).permutation(num)
    order = np.lexsort((chance, -sonneborn_berger, -buchholz, -points))
    return Standing(points_N=points, buchholz_N=buchholz, sonneborn_berger_N=sonneborn_berger, order=order)


def pair_round(record: Record, *, members: Sequence[int] | None = None, seed: int) -> Round | None:
    """The next round of a tournament, or None when every pairing would repeat a meeting or a bye.

    From the top, everybody meets the nearest one below that it has not met. Who is left over in the end is fitted in by
    exchanging partners along augmenting paths (Edmonds), so that a pairing is found whenever there is one.

    Args:
        record: what has been played.
        members: the pictures that meet each other; None = all.
        seed: of sides, order of the questions and places that are otherwise equal.
    """
    standing = stand(record, seed=seed)
    order = standing.order.tolist()
    if members is not None:
        inside = set(members)
        order = [n for n in order if n in inside]
    if len(order) < 2:
        return None
    met: dict[int, set[int]] = {n: set() for n in order}
    for left, right in record.pairs_G2.tolist():
        if left in met and right in met:
            met[left].add(right)
            met[right].add(left)
    had_bye = set(record.byes)
    # Places in the standing are the vertices; with an odd number the bye is one more, below everybody.
    place = {number: i for i, number in enumerate(order)}
    barred = [{place[other] for other in met[number]} for number in order]
    if len(order) % 2:
        bye = len(order)
        barred.append({i for i, number in enumerate(order) if number in had_bye})
        for i in barred[bye]:
            barred[i].add(bye)
    mates = _match(barred, last_is_bye=len(order) % 2 == 1)
    if mates is None:
        return None
    pairs = [(order[i], order[j]) for i, j in enumerate(mates) if i < j < len(order)]
    bye = order[mates[-1]] if len(order) % 2 else None
    return shuffled(Round(pairs=tuple(pairs), bye=bye), seed=[seed, len(record.scores_G), 1])


def next_round(record: Record, rounds: int, *, members: Sequence[int] | None = None, seed: int) -> Round | None:
    """`pair_round`, but from a table in which everybody meets everybody where `rounds` are more than half of that.

    Up to half of all meetings (V / 2 rounds, V the pictures and the bye) a Swiss pairing always exists (Dirac); beyond,
    standings can lead into a dead end, and there is little left for them to choose.
    """
    numbers = list(range(record.num_pictures)) if members is None else list(members)
    if len(numbers) > 1 and rounds > (len(numbers) + 1) // 2:
        met = {frozenset(pair) for pair in record.pairs_G2.tolist()}
        had_bye = set(record.byes)
        for table in round_robin(len(numbers), seed=seed):
            pairs = tuple((numbers[a], numbers[b]) for a, b in table.pairs)
            bye = None if table.bye is None else numbers[table.bye]
            if bye not in had_bye and not any(frozenset(pair) in met for pair in pairs):
                return shuffled(Round(pairs=pairs, bye=bye), seed=[seed, len(record.scores_G), 1])
    return pair_round(record, members=members, seed=seed)


def shuffled(round_: Round, *, seed: int | Sequence[int]) -> Round:
    """The same meetings with sides and order drawn by `seed`, so that neither tells who stands higher."""
    rng = np.random.default_rng(seed)
    swap = rng.random(len(round_.pairs)) < 0.5
    sided = [(b, a) if turned else (a, b) for (a, b), turned in zip(round_.pairs, swap, strict=True)]
    return Round(pairs=tuple(sided[i] for i in rng.permutation(len(sided))), bye=round_.bye)


def _match(barred: Sequence[set[int]], *, last_is_bye: bool) -> list[int] | None:
    """The partner of each place such that nobody is alone and no barred pair sits together; None if there is no such.

    The number of places is even. The bye is served first, by the lowest place that may have it.
    """
    num = len(barred)
    mates = [_NONE] * num
    below = list(range(1, num + 1))  # the next place that is still alone
    above = list(range(-1, num - 1))

    def take(i: int, j: int) -> None:
        mates[i], mates[j] = j, i
        for k in (i, j):
            if above[k] >= 0:
                below[above[k]] = below[k]
            if below[k] < num:
                above[below[k]] = above[k]

    if last_is_bye:
        lowest = next((i for i in range(num - 2, -1, -1) if i not in barred[-1]), None)
        if lowest is not None:
            take(lowest, num - 1)
    for i in range(num):
        if mates[i] != _NONE:
            continue
        j = below[i]
        while j < num and j in barred[i]:
            j = below[j]
        if j < num:
            take(i, j)
    for root in range(num - 1, -1, -1):
        if mates[root] == _NONE and not _augment(root, mates, barred):
            return None
    return mates


def _augment(root: int, mates: list[int], barred: Sequence[set[int]]) -> bool:
    """Find a partner for `root` by exchanging partners along a path; False if there is no way. Edmonds' blossoms."""
    num = len(mates)
    parent = [_NONE] * num
    base = list(range(num))
    outer = [False] * num
    outer[root] = True
    alone = [i for i in range(num) if mates[i] == _NONE and i != root]
    queue = [root]

    def common_base(a: int, b: int) -> int:
        seen = set()
        while True:
            a = base[a]
            seen.add(a)
            if mates[a] == _NONE:
                break
            a = parent[mates[a]]
        while base[b] not in seen:
            b = parent[mates[base[b]]]
        return base[b]

    def mark(v: int, stem: int, child: int, blossom: set[int]) -> None:
        while base[v] != stem:
            blossom.update((base[v], base[mates[v]]))
            parent[v] = child
            child = mates[v]
            v = parent[mates[v]]

    def turn(end: int) -> None:
        while end != _NONE:
            before = parent[end]
            after = mates[before]
            mates[end], mates[before] = before, end
            end = after

    for s in alone:
        if s not in barred[root]:
            mates[root], mates[s] = s, root
            return True
    for v in queue:
        for other in _iter_near(v, num):
            if other in barred[v] or base[v] == base[other] or mates[v] == other:
                continue
            if other == root or (mates[other] != _NONE and parent[mates[other]] != _NONE):
                stem, blossom = common_base(v, other), set()
                mark(v, stem, other, blossom)
                mark(other, stem, v, blossom)
                grown = []
                for i in range(num):
                    if base[i] in blossom:
                        base[i] = stem
                        if not outer[i]:
                            outer[i] = True
                            grown.append(i)
                queue.extend(grown)
                found = grown
            elif parent[other] == _NONE:
                parent[other] = v
                if mates[other] == _NONE:
                    turn(other)
                    return True
                outer[mates[other]] = True
                queue.append(mates[other])
                found = [mates[other]]
            else:
                continue
            # Nearly everybody may meet nearly everybody: look at once whether the path can end here.
            for i in found:
                for s in alone:
                    if s not in barred[i]:
                        parent[s] = i
                        turn(s)
                        return True
    return False


def _iter_near(place: int, num: int) -> Iterator[int]:
    """All other places, nearest first."""
    for step in range(1, num):
        if place + step < num:
            yield place + step
        if place - step >= 0:
            yield place - step


# --- strengths ------------------------------------------------------------------------------------------------------


def bradley_terry(record: Record, *, prior: float = PRIOR, errors: bool = True) -> Strengths:
    """Strengths of maximum likelihood with a normal prior, and their standard errors from the Fisher information.

    A tie is half a win for each. The prior keeps pictures that always won finite. Newton's method; the linear systems
    are solved by conjugate gradients, so memory grows with the judgments, not with the square of the pictures.

    Args:
        record: what was judged.
        prior: 1 / variance of the prior.
        errors: False leaves the standard errors NaN, which saves most of the time.

    Raises:
        ErnieError: prior is not above 0.
    """
    if not prior > 0:
        raise ErnieError(f"prior must be above 0, got {prior:g}.")
    num = record.num_pictures
    pairs, scores = record.judged
    left, right = pairs[:, 0], pairs[:, 1]
    b = np.zeros(num)
    for _ in range(50):
        p = 1 / (1 + np.exp(np.clip(b[right] - b[left], -500, 500)))
        gradient = np.bincount(left, scores - p, num) - np.bincount(right, scores - p, num) - prior * b
        if np.abs(gradient).max() < 1e-9 * max(1, len(scores)):
            break
        step = _solve(left, right, p * (1 - p), prior, gradient[:, None])[:, 0]
        b += step * min(1.0, 3.0 / np.abs(step).max())  # no leap into the flat ends of the logistic
    p = 1 / (1 + np.exp(np.clip(b[right] - b[left], -500, 500)))
    if not errors:
        return Strengths(values_N=b, errors_N=np.full(num, np.nan))
    return Strengths(values_N=b, errors_N=_standard_errors(left, right, p * (1 - p), prior, num))


def _information(left, right, weights_G, prior: float, num: int) -> Callable[[np.ndarray], np.ndarray]:
    """x_NK -> (Laplacian of the weighted graph of judgments + prior) x."""
    ends, others = np.concatenate([left, right]), np.concatenate([right, left])
    by_end = np.argsort(ends, kind="stable")
    present, starts = np.unique(ends[by_end], return_index=True)
    others, weights = others[by_end], np.concatenate([weights_G, weights_G])[by_end][:, None]
    diagonal = np.bincount(ends[by_end], weights[:, 0], num)[:, None] + prior

    def multiply(x_NK: np.ndarray) -> np.ndarray:
        out = diagonal * x_NK
        if len(present):
            out[present] -= np.add.reduceat(weights * x_NK[others], starts, axis=0)
        return out

    return multiply


def _solve(left, right, weights_G, prior: float, rhs_NK: np.ndarray, *, tolerance: float = 1e-10) -> np.ndarray:
    """Preconditioned conjugate gradients for every column."""
    num = len(rhs_NK)
    multiply = _information(left, right, weights_G, prior, num)
    diagonal = (np.bincount(left, weights_G, num) + np.bincount(right, weights_G, num) + prior)[:, None]
    x = np.zeros_like(rhs_NK)
    r = rhs_NK.copy()
    z = r / diagonal
    d = z.copy()
    rz = (r * z).sum(0)
    goal = tolerance**2 * np.maximum(rz, 1e-300)
    for _ in range(10 * num):
        if (rz <= goal).all():
            break
        image = multiply(d)
        alpha = rz / np.maximum((d * image).sum(0), 1e-300)
        x += alpha * d
        r -= alpha * image
        z = r / diagonal
        rz, before = (r * z).sum(0), rz
        d = z + rz / np.maximum(before, 1e-300) * d
    return x


def _standard_errors(left, right, weights_G, prior: float, num: int) -> np.ndarray:
    """Square roots of the diagonal of the inverse information, each component's mean taken as known."""
    component = _components(left, right, num)
    sizes = np.bincount(component, minlength=num)[component]
    if num <= EXACT_INTERVALS:
        information = np.zeros((num, num))
        np.add.at(information, (left, right), -weights_G)
        np.add.at(information, (right, left), -weights_G)
        information[np.diag_indices(num)] = prior - information.sum(1)
        information += (component[:, None] == component) / sizes  # takes each component's mean out of the question
        variance = np.linalg.inv(information).diagonal() - 1 / ((1 + prior) * sizes)
    else:
        # The inverse's diagonal is 1/D plus what the others' uncertainty adds; random signs estimate that part.
        diagonal = np.bincount(left, weights_G, num) + np.bincount(right, weights_G, num) + prior
        rng = np.random.default_rng(0)
        signs = rng.choice((-1.0, 1.0), (num, _PROBES))
        means = np.stack([np.bincount(component, signs[:, k], num) for k in range(_PROBES)], 1)[component]
        solved = _solve(left, right, weights_G, prior, signs - means / sizes[:, None], tolerance=1e-3)
        variance = 1 / diagonal + (signs * (solved - signs / diagonal[:, None])).mean(1)
    return np.where(sizes > 1, np.sqrt(np.maximum(variance, 0)), np.inf)


def _components(left, right, num: int) -> np.ndarray:
    """The smallest number in each picture's component."""
    label = np.arange(num)
    while True:
        before = label.copy()
        low = np.minimum(label[left], label[right])
        np.minimum.at(label, left, low)
        np.minimum.at(label, right, low)
        label = label[label]
        if (label == before).all():
            return label


# --- other ways to compare ------------------------------------------------------------------------------------------


def elo_ratings(record: Record, *, k: float = 32.0) -> np.ndarray:
    """Ratings after all judgments in their order: R += k (S - 1 / (1 + 10^((Rj - Ri) / 400))), from 1500."""
    ratings = [1500.0] * record.num_pictures
    pairs, scores = record.judged
    for (left, right), score in zip(pairs.tolist(), scores.tolist(), strict=True):
        change = k * (score - 1 / (1 + 10 ** ((ratings[right] - ratings[left]) / 400)))
        ratings[left] += change
        ratings[right] -= change
    return np.array(ratings)


def round_robin(num_pictures: int, *, seed: int) -> Iterator[Round]:
    """All rounds in which everybody meets everybody once (circle method), seats drawn by seed."""
    rng = np.random.default_rng(seed)
    seats = [*rng.permutation(num_pictures).tolist(), *([_NONE] if num_pictures % 2 else [])]
    half = len(seats) // 2
    for _ in range(len(seats) - 1):
        meetings = list(zip(seats[:half], reversed(seats[half:]), strict=True))
        bye = next((max(pair) for pair in meetings if _NONE in pair), None)
        yield Round(pairs=tuple(pair for pair in meetings if _NONE not in pair), bye=bye)
        seats = [seats[0], seats[-1], *seats[1:-1]]


def random_round(num_pictures: int, *, rng: np.random.Generator) -> Round:
    """Everybody meets somebody, whoever it may be."""
    seats = rng.permutation(num_pictures).tolist()
    bye = seats.pop() if num_pictures % 2 else None
    return Round(pairs=tuple(zip(seats[::2], seats[1::2], strict=True)), bye=bye)


# --- results of one and of several tournaments ----------------------------------------------------------------------


def tiers(values: Sequence[float], *, num_tiers: int = TIERS) -> list[int]:
    """A tier per value, 1 (lowest) to `num_tiers`: equal shares of the ranking, equal values together.

    The report's tiers are 1-10 too, but how it maps standings to them is not public; these are quantiles.
    """
    share = rank_normalise(values)
    return [min(int(s * num_tiers) + 1, num_tiers) for s in share]


def point_tiers(points: Sequence[float], rounds: int, *, num_tiers: int = TIERS) -> list[int]:
    """A tier per number of points: 0 is 1, a point per round is `num_tiers`. With 9 rounds a point is a tier."""
    if rounds < 1:
        raise ErnieError(f"rounds must be at least 1, got {rounds}.")
    return [1 + int(p / rounds * (num_tiers - 1) + 1e-9) for p in points]


def merge_rankings(rankings: Sequence[Mapping[Hashable, float]]) -> dict[Hashable, float]:
    """One value in (0, 1) per picture: the mean of its `rank_normalise` in the rankings that it is part of.

    Values of different tournaments are never compared with each other, only places.
    """
    shares: dict[Hashable, list[float]] = {}
    for ranking in rankings:
        for key, share in zip(ranking, rank_normalise(list(ranking.values())).tolist(), strict=True):
            shares.setdefault(key, []).append(share)
    return {key: sum(found) / len(found) for key, found in shares.items()}


def cohen_kappa(a: Sequence[float], b: Sequence[float]) -> float:
    """Agreement beyond chance of two people's answers to the same questions, in [-1, 1]; NaN where chance is all."""
    if len(a) != len(b):
        raise ErnieError(f"both lists need the same questions, got {len(a)} and {len(b)} answers.")
    if not a:
        return math.nan
    seen = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    chance = sum((a.count(v) / len(a)) * (b.count(v) / len(b)) for v in set(a) | set(b))
    return (seen - chance) / (1 - chance) if chance < 1 else math.nan
