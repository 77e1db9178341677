"""FID and CMMD against their formulas written out: scipy's matrix root, a double loop over pictures."""

import math

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.evaluation import distances
from scipy import linalg


def features(count, width, *, seed, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / math.sqrt(width)
    return (scale * mixed + shift).astype(np.float32)


def frechet_by_scipy(x, y):
    """The formula as the paper prints it."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(s1 @ s2)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(root)))


def kernel_loop(x, y, sigma=10.0):
    """(unbiased, biased) with one exp per pair of pictures."""

    def k(a, b):
        return math.exp(-float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()) / (2 * sigma**2))

    n, m = len(x), len(y)
    between = sum(k(a, b) for a in x for b in y) / (n * m)
    xx = [[k(a, b) for b in x] for a in x]
    yy = [[k(a, b) for b in y] for a in y]
    off = [sum(v for i, row in enumerate(g) for j, v in enumerate(row) if i != j) for g in (xx, yy)]
    unbiased = off[0] / (n * (n - 1)) + off[1] / (m * (m - 1)) - 2 * between
    return unbiased, np.mean(xx) + np.mean(yy) - 2 * between


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 16), (100, 90, 64), (65, 400, 64)])
def test_fid_is_the_formula_with_scipys_matrix_root(n, m, width):
    x, y = features(n, width, seed=0), features(m, width, seed=1, shift=0.3, scale=1.4)
    expected = frechet_by_scipy(x, y)
    assert distances.frechet(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(12, 9), (64, 12), (12, 300)], ids=str)
def test_fid_of_fewer_pictures_than_features_is_that_of_the_plane_they_span(n, m):
    """Rotated so that all pictures lie in few coordinates, the covariances are whole and scipy's root is exact."""
    x, y = features(n, 64, seed=2), features(m, 64, seed=3, shift=0.2)
    if m > 64:
        x = np.concatenate([x, x[:, ::-1]])  # a set on each side of the length, neither larger than the plane
    found = distances.frechet(x, y)
    # tr (S1 S2)^(1/2) from the eigenvalues of S1 S2, which are real and not negative
    s1, s2 = (np.cov(v.astype(np.float64), rowvar=False) for v in (x, y))
    roots = np.sqrt(np.clip(np.real(np.linalg.eigvals(s1 @ s2)), 0, None)).sum()
    mean = ((x.astype(np.float64).mean(0) - y.astype(np.float64).mean(0)) ** 2).sum()
    assert math.isfinite(found)
    assert found == pytest.approx(mean + np.trace(s1) + np.trace(s2) - 2 * roots, rel=1e-5)


def test_fid_of_a_set_with_itself_is_nothing_even_with_few_pictures():
    for count in (5, 63, 64, 65, 500):
        x = features(count, 64, seed=4, shift=7.0)
        assert distances.frechet(x, x) < 1e-10 * np.trace(np.cov(x, rowvar=False))


def test_fid_does_not_change_when_features_turn_or_sides_swap():
    x, y = features(90, 24, seed=5), features(80, 24, seed=6, shift=0.1)
    turn = linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0]
    turned = [(v.astype(np.float64) @ turn) for v in (x, y)]
    assert distances.frechet(*turned) == pytest.approx(distances.frechet(x, y), rel=1e-9)
    assert distances.frechet(y, x) == pytest.approx(distances.frechet(x, y), rel=1e-12)


def test_fid_is_too_high_with_few_pictures_and_cmmd_is_not():
    """Two samples of one distribution: what is promised in the report's warning."""
    found = {n: [distances.compare(features_of(n, s), features_of(n, s + 100)) for s in range(8)] for n in (40, 400)}
    fid = {n: np.mean([d.fid for d in runs]) for n, runs in found.items()}
    assert fid[40] > 5 * fid[400] > 0
    for runs in found.values():
        values = np.array([d.cmmd for d in runs])
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
        assert all(d.cmmd_published > d.cmmd for d in runs)


def features_of(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 32)).astype(np.float32)


@pytest.mark.parametrize("block", [3, 7, 2048])
def test_cmmd_is_the_double_loop_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr(distances, "BLOCK", block)
    x, y = distances.unit(features(17, 12, seed=7)), distances.unit(features(11, 12, seed=8, shift=0.4))
    unbiased, biased = distances.kernel_distances(x, y)
    expected = kernel_loop(x, y)
    assert unbiased == pytest.approx(expected[0], rel=1e-9)
    assert biased == pytest.approx(expected[1], rel=1e-9)
    found = distances.compare(7 * x, 0.2 * y)  # lengths do not matter
    assert found.cmmd == pytest.approx(1000 * expected[0], rel=1e-5)
    assert found.cmmd_published == pytest.approx(1000 * expected[1], rel=1e-5)


def test_another_sigma_is_taken(monkeypatch):
    x, y = features(9, 5, seed=9), features(8, 5, seed=10)
    expected = kernel_loop(x, y, sigma=1.5)
    assert distances.kernel_distances(x, y, sigma=1.5) == pytest.approx(expected, rel=1e-9)


def test_blocks_are_counted_and_can_stop_the_work(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 4)
    x, y = features(9, 5, seed=1), features(6, 5, seed=2)
    seen = []
    distances.compare(x, y, on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 15) for i in range(1, 16)]  # 6 + 3 within, 6 between

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distances.compare(x, y, on_block=stop)


def test_what_cannot_be_compared_is_refused():
    good = features(4, 3, seed=0)
    with pytest.raises(ErnieError, match="two pictures at least on each side; the second set has 1"):
        distances.compare(good, good[:1])
    with pytest.raises(ErnieError, match="got lengths 3 and 2"):
        distances.compare(good, good[:, :2])
    with pytest.raises(ErnieError, match="NaN or infinite"):
        distances.compare(good, np.where(good == good[0, 0], np.nan, good))


def test_few_pictures_are_said_to_be_few():
    few = distances.compare(features(20, 32, seed=0), features(30, 32, seed=1)).warnings()
    assert [("too high" in w, "cannot fill" in w) for w in few] == [(True, False), (False, True)]
    many = distances.Distances(fid=1, cmmd=1, cmmd_published=1, num_first=2048, num_second=3000, num_features=768)
    assert many.warnings() == []
