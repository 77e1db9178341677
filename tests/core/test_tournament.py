"""Swiss tournaments: their rules at every size, exact pairing, strengths and intervals, merging, agreement."""

import itertools
import math
import time

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring import tournament
from ernie_pack.ernie_core.scoring.metrics import srcc
from ernie_pack.ernie_core.scoring.tournament import (
    Record,
    bradley_terry,
    cohen_kappa,
    default_rounds,
    elo_ratings,
    merge_rankings,
    most_rounds,
    next_round,
    pair_round,
    point_tiers,
    round_robin,
    stand,
    tiers,
)

SIZES = [*range(2, 14), 20, 33, 64]


def record_of(num, games, byes=()):
    """A Record of (left, right, score) triples."""
    return Record(
        num_pictures=num,
        pairs_G2=np.array([g[:2] for g in games], np.int64).reshape(-1, 2),
        scores_G=np.array([g[2] for g in games], float),
        byes=tuple(byes),
    )


def play(num, rounds, judge, *, seed=0):
    """(record, list of rounds): a whole tournament; judge(left, right) -> score."""
    games, byes, played = [], [], []
    for _ in range(rounds):
        round_ = next_round(record_of(num, games, byes), rounds, seed=seed)
        if round_ is None:
            break
        played.append(round_)
        games += [(left, right, judge(left, right)) for left, right in round_.pairs]
        byes += [round_.bye] if round_.bye is not None else []
    return record_of(num, games, byes), played


def noisy(strengths, *, noise, ties=0.0, seed=0):
    """A person who knows the strengths, answers the other way round with probability `noise`, and ties below `ties`."""
    rng = np.random.default_rng(seed)

    def judge(left, right):
        if abs(strengths[left] - strengths[right]) < ties:
            return 0.5
        return float((strengths[left] > strengths[right]) ^ (rng.random() < noise))

    return judge


# --- the rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_every_round_is_a_round_of_a_swiss_tournament(num, seed):
    rng = np.random.default_rng([num, seed])
    judge = noisy(rng.normal(size=num), noise=0.15, ties=0.3, seed=seed)
    rounds = most_rounds(num) if seed == 0 else default_rounds(num)
    record, played = play(num, rounds, judge, seed=seed)
    assert len(played) == rounds
    for round_ in played:  # everybody has one opponent or the bye
        seats = [n for pair in round_.pairs for n in pair] + ([round_.bye] if round_.bye is not None else [])
        assert sorted(seats) == list(range(num))
        assert (round_.bye is not None) == (num % 2 == 1)
    meetings = [frozenset(pair) for round_ in played for pair in round_.pairs]
    assert len(set(meetings)) == len(meetings), "nobody meets anybody twice"
    assert len(set(record.byes)) == len(record.byes), "nobody has two byes"
    total = stand(record).points_N.sum()
    assert total == len(record.scores_G) + len(record.byes)


def test_pairs_have_equal_or_nearest_points():
    # Ideal for 64 without noise: in the first rounds the groups are even, and nobody is paired outside of his own.
    strengths = np.random.default_rng(0).permutation(64)
    games = []
    for _ in range(5):
        record = record_of(64, games)
        points = stand(record).points_N
        round_ = pair_round(record, seed=3)
        assert all(points[a] == points[b] for a, b in round_.pairs)
        games += [(a, b, float(strengths[a] > strengths[b])) for a, b in round_.pairs]
    best = int(np.argmax(strengths))
    points = stand(record_of(64, games)).points_N
    assert points[best] == 5


def test_gaps_in_points_stay_small_when_groups_run_dry():
    judge = noisy(np.random.default_rng(1).normal(size=51), noise=0.2, ties=0.1)
    games, byes, gaps = [], [], []
    for _ in range(10):
        record = record_of(51, games, byes)
        points = stand(record).points_N
        round_ = pair_round(record, seed=1)
        gaps += [abs(points[a] - points[b]) for a, b in round_.pairs]
        games += [(a, b, judge(a, b)) for a, b in round_.pairs]
        byes.append(round_.bye)
    assert np.mean(gaps) < 0.5
    assert np.quantile(gaps, 0.95) <= 1.5


def test_the_bye_goes_to_the_lowest_who_had_none():
    # 0 beat 1, 2 had the bye; then 1 has 0 points and is last.
    record = record_of(3, [(0, 1, 1.0)], byes=[2])
    assert pair_round(record, seed=0).bye == 1


def test_ties_and_unjudged_pairs_count_half():
    record = record_of(4, [(0, 1, 0.5), (2, 3, math.nan), (0, 2, 1.0)])
    assert stand(record).points_N.tolist() == [1.5, 0.5, 0.5, 0.5]


def test_tie_breaks_are_the_sums_they_are_named_for():
    # 0 beat 1, 2 beat 3, 0 beat 2, 1 and 3 tied: points 2, 0.5, 1, 0.5.
    record = record_of(4, [(0, 1, 1.0), (3, 2, 0.0), (0, 2, 1.0), (1, 3, 0.5)])
    standing = stand(record)
    assert standing.points_N.tolist() == [2, 0.5, 1, 0.5]
    assert standing.buchholz_N.tolist() == [1.5, 2.5, 2.5, 1.5]
    assert standing.sonneborn_berger_N.tolist() == [1.5, 0.25, 0.5, 0.25]
    assert standing.order.tolist() == [0, 2, 1, 3]


def test_a_bye_meets_somebody_of_the_same_points_in_the_tie_breaks():
    standing = stand(record_of(3, [(0, 1, 1.0)], byes=[2]))
    assert standing.points_N.tolist() == [1, 0, 1]
    assert standing.buchholz_N.tolist() == [0, 1, 1]


def test_one_seed_is_one_tournament_and_sides_are_even():
    judge = noisy(np.arange(40.0), noise=0.0)
    record, played = play(40, 9, judge, seed=5)
    assert play(40, 9, judge, seed=5)[1] == played
    assert play(40, 9, judge, seed=6)[1] != played
    share_right = np.mean(record.scores_G == 0.0)  # the better one is not always on the same side
    assert 0.4 < share_right < 0.6


def test_unjudged_pairs_are_not_asked_again():
    record = record_of(4, [(0, 1, math.nan), (2, 3, math.nan)])
    assert {frozenset(p) for p in pair_round(record, seed=0).pairs} <= {
        frozenset(p) for p in [(0, 2), (1, 3), (0, 3), (1, 2)]
    }


# --- a pairing whenever there is one --------------------------------------------------------------------------


def has_perfect(num, barred):
    """Whether `num` places can be paired, by trying."""

    def rest(places):
        if not places:
            return True
        first, *others = places
        return any(frozenset((first, o)) not in barred and rest([p for p in others if p != o]) for o in others)

    return rest(list(range(num)))


@pytest.mark.parametrize("seed", range(300))
def test_a_pairing_is_found_exactly_when_there_is_one(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.choice([4, 6, 8, 10]))
    every = list(itertools.combinations(range(num), 2))
    met = [pair for pair in every if rng.random() < rng.uniform(0.4, 0.9)]
    record = record_of(num, [(a, b, float(rng.choice([0, 0.5, 1]))) for a, b in met])
    round_ = pair_round(record, seed=seed)
    assert (round_ is not None) == has_perfect(num, {frozenset(p) for p in met})
    if round_ is not None:
        assert sorted(n for pair in round_.pairs for n in pair) == list(range(num))
        assert not {frozenset(p) for p in round_.pairs} & {frozenset(p) for p in met}


@pytest.mark.parametrize("seed", range(100))
def test_with_a_bye_as_well(seed):
    rng = np.random.default_rng([seed, 1])
    num = int(rng.choice([3, 5, 7, 9]))
    every = list(itertools.combinations(range(num), 2))
    met = [pair for pair in every if rng.random() < rng.uniform(0.3, 0.9)]
    byes = rng.permutation(num)[: rng.integers(0, num)].tolist()
    record = record_of(num, [(a, b, 1.0) for a, b in met], byes)
    barred = {frozenset(p) for p in met} | {frozenset((b, num)) for b in byes}
    assert (pair_round(record, seed=seed) is not None) == has_perfect(num + 1, barred)


def test_a_dead_end_of_greed_is_left_again():
    # Greedy from the top takes 0-1 and leaves 2 and 3, who have met: only exchanging partners helps.
    record = record_of(4, [(2, 3, 0.5)])
    met = {frozenset((2, 3))}
    for seed in range(20):
        round_ = pair_round(record, seed=seed)
        assert not {frozenset(p) for p in round_.pairs} & met


def test_a_path_through_blossoms_is_found():
    # Two triangles joined by one edge: a pairing exists only through the bridge.
    open_pairs = {(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (2, 3)}
    met = [p for p in itertools.combinations(range(6), 2) if p not in open_pairs]
    for seed in range(10):
        round_ = pair_round(record_of(6, [(a, b, 0.5) for a, b in met], []), seed=seed)
        assert {frozenset(p) for p in round_.pairs} == {frozenset(p) for p in [(0, 1), (2, 3), (4, 5)]}


def test_members_are_a_tournament_of_their_own():
    record = record_of(7, [(0, 1, 1.0)])
    round_ = pair_round(record, members=[1, 3, 5], seed=0)
    assert sorted([*round_.pairs[0], round_.bye]) == [1, 3, 5]


def test_a_round_of_10000_is_paired_in_seconds():
    num, games, byes = 10_001, [], []
    strengths = np.random.default_rng(0).normal(size=num)
    judge = noisy(strengths, noise=0.1)
    slowest = 0.0
    for _ in range(5):
        record = record_of(num, games, byes)
        start = time.perf_counter()
        round_ = pair_round(record, seed=0)
        slowest = max(slowest, time.perf_counter() - start)
        games += [(a, b, judge(a, b)) for a, b in round_.pairs]
        byes.append(round_.bye)
    assert slowest < 5.0


@pytest.mark.parametrize("num", [1, 2, 3, 4, 6, 64, 1000])
def test_rounds_by_default_are_possible(num):
    assert 0 <= default_rounds(num) <= most_rounds(num)
    assert default_rounds(64) == 8


# --- strengths ------------------------------------------------------------------------------------------------


def test_strengths_are_the_maximum_of_the_likelihood():
    judge = noisy(np.random.default_rng(2).normal(size=12), noise=0.2, ties=0.2)
    record, _ = play(12, 6, judge)
    values = bradley_terry(record, prior=0.3).values_N

    def loss(b):
        pairs, scores = record.judged
        d = b[pairs[:, 0]] - b[pairs[:, 1]]
        return float((scores * np.log1p(np.exp(-d)) + (1 - scores) * np.log1p(np.exp(d))).sum() + 0.15 * (b @ b))

    least = loss(values)
    rng = np.random.default_rng(0)
    assert all(loss(values + rng.normal(size=12) * step) > least for step in (1e-3, 1e-2, 1.0) for _ in range(50))
    assert abs(values.mean()) < 1e-9


def test_two_pictures_have_the_strengths_of_the_formula():
    # 3 of 4 with next to no prior: b0 - b1 = log(3).
    record = record_of(2, [(0, 1, 1.0)] * 2 + [(1, 0, 0.0), (0, 1, 0.0)])
    b = bradley_terry(record, prior=1e-9)
    assert b.values_N[0] - b.values_N[1] == pytest.approx(math.log(3), abs=1e-6)
    # Information of the difference: 4 p (1 - p); of b0 against the mean: half of the difference.
    assert b.errors_N[0] == pytest.approx(math.sqrt(1 / (4 * 0.75 * 0.25)) / 2, rel=1e-3)


def test_who_always_won_stays_finite_and_who_never_played_has_no_interval():
    b = bradley_terry(record_of(3, [(0, 1, 1.0)] * 5))
    assert np.isfinite(b.values_N).all()
    assert b.values_N[0] > 0 > b.values_N[1]
    assert b.values_N[2] == 0
    assert math.isinf(b.errors_N[2])


def test_intervals_hold_what_they_say():
    rng = np.random.default_rng(0)
    inside = total = 0
    for seed in range(30):
        truth = rng.normal(size=30)
        truth -= truth.mean()

        def judge(left, right, truth=truth):
            return float(rng.random() < 1 / (1 + math.exp(truth[right] - truth[left])))

        record, _ = play(30, 14, judge, seed=seed)
        b = bradley_terry(record)
        inside += int((np.abs(b.values_N - truth) < 1.96 * b.errors_N).sum())
        total += 30
    assert 0.92 < inside / total < 0.98  # 95 %


def test_intervals_by_probes_are_those_of_the_inverse(monkeypatch):
    record, _ = play(300, 9, noisy(np.random.default_rng(3).normal(size=300), noise=0.15))
    exact = bradley_terry(record).errors_N
    monkeypatch.setattr(tournament, "EXACT_INTERVALS", 10)
    ratio = bradley_terry(record).errors_N / exact
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() < 0.06


def test_groups_that_never_meet_have_mean_zero_each():
    b = bradley_terry(record_of(5, [(0, 1, 1.0), (2, 3, 1.0), (3, 4, 1.0)])).values_N
    assert b[:2].sum() == pytest.approx(0, abs=1e-9)
    assert b[2:].sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("noise", [0.1, 0.2])
def test_a_noisy_person_ranks_nearly_right(noise):
    found = []
    for seed in range(5):
        strengths = np.random.default_rng(seed).normal(size=64)
        record, _ = play(64, 12, noisy(strengths, noise=noise, seed=seed), seed=seed)
        found.append(srcc(bradley_terry(record, errors=False).values_N, strengths))
    assert np.mean(found) > {0.1: 0.9, 0.2: 0.8}[noise]


# --- the others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 3, 6, 7])
def test_in_a_round_robin_everybody_meets_everybody(num):
    rounds = list(round_robin(num, seed=1))
    meetings = [frozenset(p) for r in rounds for p in r.pairs]
    assert sorted(map(sorted, meetings)) == [list(p) for p in itertools.combinations(range(num), 2)]
    assert [r.bye is None for r in rounds] == [num % 2 == 0] * len(rounds)


def test_elo_is_the_formula():
    ratings = elo_ratings(record_of(2, [(0, 1, 1.0), (0, 1, 1.0)]))
    second = 32 * (1 - 1 / (1 + 10 ** (-32 / 400)))
    assert ratings.tolist() == pytest.approx([1516 + second, 1484 - second])


# --- results --------------------------------------------------------------------------------------------------


def test_tiers_are_equal_shares_and_equals_stay_together():
    assert tiers(range(100)) == [1 + i // 10 for i in range(100)]
    assert tiers([3.0, 3.0, 3.0]) == [6, 6, 6]
    assert set(tiers([1, 1, 1, 2])) == {4, 9}
    assert point_tiers([0, 4.5, 9], 9) == [1, 5, 10]
    with pytest.raises(ErnieError, match="rounds must be at least 1"):
        point_tiers([1], 0)


def test_rankings_are_merged_by_places_not_by_values():
    strict = {"a": 1000.0, "b": 900.0, "c": 1.0}
    mild = {"c": 0.3, "d": 0.2}
    merged = merge_rankings([strict, mild])
    assert merged == pytest.approx({"a": 5 / 6, "b": 3 / 6, "c": (1 / 6 + 3 / 4) / 2, "d": 1 / 4})
    other_scale = {k: math.log(v) for k, v in strict.items()}
    assert merge_rankings([other_scale, mild]) == merged


def test_kappa_is_the_textbook_one():
    # 50 questions, both yes 20, both no 15, only a yes 5, only b yes 10: kappa 0.4.
    a = [1] * 20 + [0] * 15 + [1] * 5 + [0] * 10
    b = [1] * 20 + [0] * 15 + [0] * 5 + [1] * 10
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa([1, 0], [1, 0]) == 1
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))
    assert math.isnan(cohen_kappa([], []))


@pytest.mark.parametrize(
    ("games", "message"),
    [
        ([(0, 9, 1.0)], "must lie in 0 to 2"),
        ([(1, 1, 1.0)], "cannot meet itself"),
        ([(0, 1, 0.7)], "scores must be 0, 0.5, 1 or NaN"),
    ],
)
def test_a_record_that_cannot_be_is_refused(games, message):
    with pytest.raises(ErnieError, match=message):
        record_of(3, games)


def test_a_prior_of_nothing_is_refused():
    with pytest.raises(ErnieError, match="prior must be above 0, got 0"):
        bradley_terry(record_of(2, []), prior=0)
