"""The statistics against scipy's."""

import math

import numpy as np
import pytest
from ernie_pack.ernie_core.scoring import metrics

stats = pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.parity


def pairs(n, distinct, seed=0, noise=1.0):
    """Two rows of correlated values with about `distinct` different ones each: few = many ties."""
    rng = np.random.default_rng([seed, n, distinct])
    x = rng.normal(size=n)
    y = x + noise * rng.normal(size=n)
    return np.round(x * distinct / 6), np.round(y * distinct / 6)


CASES = [(n, d) for n in (3, 10, 101, 1000, 5003) for d in (3, 20, 10**9)]


@pytest.mark.parametrize(("n", "distinct"), CASES, ids=str)
def test_the_correlations_are_those_of_scipy_ties_or_none(n, distinct):
    x, y = pairs(n, distinct)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        x[0] += 1
        y[-1] += 1
    assert metrics.srcc(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert metrics.plcc(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert metrics.krcc(x, y) == pytest.approx(stats.kendalltau(x, y, variant="b").statistic, abs=1e-12)


def test_ranks_are_those_of_scipy():
    x, _ = pairs(500, 8)
    np.testing.assert_array_equal(metrics.rank(x), stats.rankdata(x))


@pytest.mark.parametrize(("wins", "total"), [(0, 5), (5, 5), (3, 10), (512, 1000), (1, 1)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_intervals_are_those_of_scipy(wins, total, level):
    expected = stats.binomtest(wins, total).proportion_ci(level, method="wilson")
    found = metrics.wilson(wins, total, level=level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


SCIPY = {
    "srcc": lambda x, y: stats.spearmanr(x, y).statistic,
    "plcc": lambda x, y: stats.pearsonr(x, y).statistic,
    "krcc": lambda x, y: stats.kendalltau(x, y).statistic,
}


@pytest.mark.parametrize("name", SCIPY)
@pytest.mark.parametrize(("n", "distinct", "noise"), [(25, 10**9, 0.4), (120, 6, 1.0)], ids=str)
def test_bootstrap_intervals_are_the_bca_intervals_of_scipy(name, n, distinct, noise):
    x, y = pairs(n, distinct, seed=3, noise=noise)
    expected = stats.bootstrap(
        (x, y), SCIPY[name], paired=True, vectorized=False, n_resamples=2000, method="BCa", rng=1
    ).confidence_interval
    found = metrics.bootstrap(getattr(metrics, name), x, y, samples=2000, seed=1)
    width = expected.high - expected.low  # other random draws: the ends differ by about 1 / sqrt(samples) of the width
    assert found.low == pytest.approx(expected.low, abs=0.08 * width)
    assert found.high == pytest.approx(expected.high, abs=0.08 * width)


def test_the_bca_correction_is_needed_for_that():
    """The plain percentile interval is further from scipy's than the tolerance above allows."""
    x, y = pairs(25, 10**9, seed=3, noise=0.4)
    bca, percentile = (
        stats.bootstrap(
            (x, y), SCIPY["plcc"], paired=True, vectorized=False, n_resamples=2000, method=m, rng=1
        ).confidence_interval
        for m in ("BCa", "percentile")
    )
    assert abs(bca.low - percentile.low) > 0.08 * (bca.high - bca.low)


def test_the_mean_has_the_interval_of_scipy():
    values = np.random.default_rng(5).exponential(size=60)
    expected = stats.bootstrap((values,), np.mean, n_resamples=5000, method="BCa", rng=2).confidence_interval
    found = metrics.mean_interval(values, samples=5000)
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert math.isclose(found.value, values.mean())
