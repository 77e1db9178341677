"""Laws of the correlations, of their intervals and of the tables by category."""

import itertools
import math

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.metrics import (
    _krcc,
    _leave_one_out,
    agreement,
    bias_table,
    bootstrap,
    bootstrap_difference,
    category_table,
    krcc,
    plcc,
    rank,
    rank_normalise,
    srcc,
    wilson,
)

ALL = [srcc, plcc, krcc]


def draws(n, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return x, x + noise * rng.normal(size=n)


def tau_by_definition(x, y):
    """Over all pairs: (agreeing - disagreeing) / sqrt(pairs untied in x * pairs untied in y)."""
    signs = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2)]
    untied_x, untied_y = (sum(s[i] != 0 for s in signs) for i in (0, 1))
    return sum(a * b for a, b in signs) / math.sqrt(untied_x * untied_y)


@pytest.mark.parametrize("seed", range(20))
def test_tau_is_what_its_definition_says(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, rng.integers(2, 12), (2, int(rng.integers(5, 40))))
    x[:2], y[:2] = (0, 1), (0, 1)
    assert krcc(x, y) == pytest.approx(tau_by_definition(x, y), abs=1e-12)


@pytest.mark.parametrize("statistic", ALL)
def test_a_correlation_is_symmetric_odd_and_one_with_itself(statistic):
    x, y = draws(50)
    assert statistic(x, y) == pytest.approx(statistic(y, x), abs=1e-12)
    assert statistic(x, -y) == pytest.approx(-statistic(x, y), abs=1e-12)
    assert statistic(x, x) == pytest.approx(1)


@pytest.mark.parametrize("statistic", ALL)
@pytest.mark.parametrize("scale", [1e-200, 1e-3, 7.0, 1e200])
def test_scale_and_offset_do_not_matter(statistic, scale):
    x, y = draws(50)
    assert statistic(scale * (x + 3), y) == pytest.approx(statistic(x, y), abs=1e-9)


@pytest.mark.parametrize("statistic", [srcc, krcc])
def test_rank_correlations_see_the_order_only(statistic):
    x, y = draws(50)
    assert statistic(np.exp(3 * x), y**3) == pytest.approx(statistic(x, y), abs=1e-12)


BAD = {
    "two images at least": ([1.0], [1.0]),
    "as many scores as human scores": ([1.0, 2.0], [1.0]),
    "1 of the scores are not finite, the first is number 2": ([1.0, float("nan"), 3.0], [1.0, 2.0, 3.0]),
    "human scores are not finite": ([1.0, 2.0], [1.0, float("inf")]),
    "all scores are 5": ([5.0, 5.0], [1.0, 2.0]),
    "all human scores are 1": ([5.0, 6.0], [1.0, 1.0]),
}


@pytest.mark.parametrize("statistic", ALL)
@pytest.mark.parametrize("text", BAD)
def test_what_has_no_correlation_is_an_error_that_says_why(statistic, text):
    with pytest.raises(ErnieError, match=text):
        statistic(*BAD[text])


@pytest.mark.parametrize("text", BAD)
def test_a_group_without_a_correlation_has_the_reason_in_its_row(text):
    row = agreement(*BAD[text])
    assert row.srcc is row.plcc is row.krcc is None
    assert text in row.problem


def test_equal_values_share_their_mean_rank():
    np.testing.assert_array_equal(rank([10, 30, 20, 30, 30]), [1, 4, 2, 4, 4])


def test_normalised_ranks_lie_in_0_to_1_around_one_half():
    values = rank_normalise([5, 5, 1, 900, -3, 5])
    assert values.mean() == pytest.approx(0.5)
    assert 0 < values.min() < values.max() < 1


@pytest.mark.parametrize("statistic", ALL)
def test_an_interval_holds_its_value_and_is_the_same_for_the_same_seed(statistic):
    x, y = draws(80)
    found = bootstrap(statistic, x, y, samples=200)
    assert found.low < found.value == statistic(x, y) < found.high
    assert found == bootstrap(statistic, x, y, samples=200)
    assert found != bootstrap(statistic, x, y, samples=200, seed=1)


def test_more_images_and_less_confidence_make_an_interval_narrower():
    def width(n, level=0.95):
        found = bootstrap(plcc, *draws(n), samples=400, level=level)
        return found.high - found.low

    assert width(900) < 0.5 * width(90)
    assert width(90, level=0.5) < 0.6 * width(90)


def test_an_interval_of_95_percent_holds_the_truth_about_95_times_of_100():
    """Truth of the correlation of x and x + noise is 1 / sqrt(2); 200 experiments, so within 4 sigma of the level."""
    held = 0
    for seed in range(200):
        found = bootstrap(plcc, *draws(60, seed=1000 + seed), samples=200)
        held += found.low <= 1 / math.sqrt(2) <= found.high
    assert 0.87 <= held / 200 <= 0.995


@pytest.mark.parametrize("distinct", [3, 1000])
def test_tau_of_resamples_by_products_is_tau_of_each_resample(distinct):
    x, y = (np.round(v * distinct / 6) for v in draws(70, seed=4))
    slow = bootstrap(lambda a, b: _krcc(a, b), x, y, samples=100)  # another function object: takes the loop
    fast = bootstrap(krcc, x, y, samples=100)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high), abs=1e-6)


def test_leaving_one_out_leaves_out_each():
    x, y = draws(6)
    found = _leave_one_out(plcc, x, y)
    assert found[0] == plcc(x[1:], y[1:])
    assert found[5] == plcc(x[:5], y[:5])


def test_a_perfect_order_has_a_narrow_interval_at_1():
    found = bootstrap(srcc, np.arange(20), np.arange(20))
    assert (found.low, found.high) == pytest.approx((1, 1))


def test_resamples_without_a_correlation_are_left_out_and_too_many_leave_no_interval():
    few = agreement([1.0, 2.0], [1.0, 2.0])  # half of the resamples of two images are one image twice
    assert few.srcc is not None
    assert few.srcc.value == pytest.approx(1)
    assert "2 images: the interval is unreliable" in few.problem
    hardly = bootstrap(lambda a, b: a.mean() if len(set(a)) == len(a) else math.nan, *draws(31), samples=200)
    assert math.isfinite(hardly.value)
    assert math.isnan(hardly.low)
    assert math.isnan(hardly.high)


@pytest.mark.parametrize("changes", [{"samples": 5}, {"level": 0.0}, {"level": 1.0}], ids=str)
def test_settings_of_the_bootstrap_are_checked(changes):
    with pytest.raises(ErnieError, match=next(iter(changes))):
        bootstrap(srcc, *draws(9), **changes)


def test_the_difference_of_two_scorers_is_sharper_than_their_intervals():
    rng = np.random.default_rng(2)
    human = rng.normal(size=300)
    first = human + 0.6 * rng.normal(size=300)
    second = first + 0.35 * rng.normal(size=300)  # the same scorer, a little worse: their errors are shared
    a, b = bootstrap(plcc, first, human, samples=400), bootstrap(plcc, second, human, samples=400)
    assert b.high > a.low  # single intervals overlap
    found = bootstrap_difference(plcc, first, second, human, samples=400)
    assert found.value == pytest.approx(a.value - b.value)
    assert found.low > 0  # yet it is worse


def test_a_scorer_does_not_differ_from_itself():
    x, y = draws(40)
    found = bootstrap_difference(srcc, x, x, y, samples=100)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_win_rates_of_nothing_and_of_ties():
    nothing = wilson(0, 0)
    assert (nothing.value, nothing.low, nothing.high) == (0.5, 0.0, 1.0)
    assert wilson(2.5, 5).value == 0.5
    assert wilson(0, 8).low == 0.0
    assert wilson(8, 8).high == 1.0
    assert wilson(0, 8).high == pytest.approx(1 - wilson(8, 8).low)
    with pytest.raises(ErnieError, match=r"from 0 to the number of comparisons \(3\), got 4"):
        wilson(4, 3)


def test_the_category_table_is_the_agreement_within_each_largest_first():
    x, y = draws(60)
    categories = ["a"] * 15 + ["b"] * 45
    table = category_table(x, y, categories, samples=50)
    assert [(row.category, row.n) for row in table] == [("b", 45), ("a", 15)]
    assert table[1].krcc.value == krcc(x[:15], y[:15])
    assert table[0].plcc.value == plcc(x[15:], y[15:])


def test_a_planted_bias_is_found_with_its_sign_and_the_others_balance_it():
    rng = np.random.default_rng(0)
    human = rng.normal(size=600)
    categories = np.array(["photo", "anime", "film"])[rng.integers(0, 3, 600)]
    scores = human + 0.5 * rng.normal(size=600) + 1.0 * (categories == "anime")
    table = bias_table(scores, human, list(categories))
    assert table[0].category == "anime"
    assert table[0].verdict == "over-rated"
    assert {row.verdict for row in table[1:]} == {"under-rated"}
    assert sum(row.n * row.bias.value for row in table) == pytest.approx(0, abs=1e-9)
    for row in table:
        assert row.bias.value == pytest.approx(row.mean_score - row.mean_human)


def test_without_a_bias_none_is_found_in_most_categories():
    rng = np.random.default_rng(1)
    human = rng.normal(size=900)
    categories = [f"c{i % 9}" for i in range(900)]
    table = bias_table(human + rng.normal(size=900), human, categories)
    assert sum(bool(row.verdict) for row in table) <= 2


def test_bias_does_not_depend_on_the_scale_of_the_scores():
    x, y = draws(90)
    categories = [f"c{i % 3}" for i in range(90)]
    assert bias_table(x, y, categories, samples=50) == bias_table(np.exp(x), 100 * y - 5, categories, samples=50)


def test_a_category_of_one_image_has_a_bias_and_no_interval():
    table = {row.category: row for row in bias_table([1, 2, 3, 9], [1, 2, 9, 3], ["a", "a", "a", "lone"])}
    assert math.isnan(table["lone"].bias.low)
    assert table["lone"].verdict == ""
    assert table["lone"].bias.value == pytest.approx(0.25)


def test_as_many_categories_as_images_are_needed():
    with pytest.raises(ErnieError, match=r"one category per image expected \(3\), got 2"):
        category_table([1, 2, 3], [1, 2, 3], ["a", "b"])
