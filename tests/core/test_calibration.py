"""What a change of the input means for the output: laws of the fit, and the files."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling import calibration
from ernie_pack.ernie_core.sampling.cache import StepCache, StepCacheRun
from ernie_pack.ernie_core.sampling.calibration import (
    IDENTITY,
    Calibration,
    calibration_path,
    fit_calibration,
    read_calibration,
    write_calibration,
)

SMALL = DiTConfig(
    hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=48, text_in_dim=24, rope_axes_dim=(4, 6, 6)
)
X = np.linspace(0.01, 0.5, 60)


@pytest.mark.parametrize("change", [0.0, 1e-9, 0.1, 0.7, 3.0, float("inf")])
def test_the_identity_changes_nothing(change):
    assert IDENTITY(change) == change


@pytest.mark.parametrize(
    "true",
    [lambda x: 2 * x, lambda x: 0.1 + x**2, lambda x: 5 * x**4 + x, lambda x: 3 * x**3 + x**2],
    ids=["line", "square", "fourth", "third"],
)
def test_a_polynomial_is_found_again(true):
    fitted = fit_calibration(X, true(X))
    assert [fitted(x) for x in X] == pytest.approx(true(X), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_change_never_counts_less_inside_the_range_and_outside(seed):
    noise = np.random.default_rng(seed).uniform(0, 1, len(X))
    fitted = fit_calibration(X, noise)
    values = [fitted(x) for x in np.linspace(0, 2, 2001)]
    assert min(values) >= 0
    assert (np.diff(values) >= -1e-12).all()


def test_outside_the_range_it_goes_on_in_proportion():
    fitted = Calibration(coefficients=(1.0, 0.0, 0.1), low=0.2, high=0.4)
    assert fitted(0.1) == pytest.approx(0.1 / 2)
    assert fitted(0.8) == pytest.approx(2 * 0.14)
    assert fitted(0.0) == 0


def test_where_more_change_means_less_the_mean_is_left():
    fitted = fit_calibration(X, 1 - X)
    assert [fitted(x) for x in (X[0], X[30], X[-1])] == pytest.approx([(1 - X).mean()] * 3)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_polynomial_without_negative_coefficients_fits_better(seed):
    """Against SciPy's non-negative least squares."""
    optimize = pytest.importorskip("scipy.optimize")
    y = np.random.default_rng(seed).uniform(0, 1, len(X)) + np.sin(9 * X)[::-1] + 1
    fitted = fit_calibration(X, y)
    _, norm = optimize.nnls((X - X[0])[:, None] ** np.arange(5), y)
    assert np.linalg.norm(y - [fitted(x) for x in X]) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.1] * 4, [0.1] * 4, "5 or more pairs of changes expected, got 4 and 4"),
        ([0.1] * 6, [0.1] * 5, "got 6 and 5"),
        ([0.1] * 6, [float("nan")] * 6, "must be finite"),
        ([0.0] * 6, [0.1] * 6, "its input never changed"),
        ([-0.1] * 6, [0.1] * 6, "0 or more"),
    ],
)
def test_pairs_that_cannot_be_fitted(x, y, message):
    with pytest.raises(ErnieError, match=message):
        fit_calibration(x, y)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "calibrations")


@pytest.mark.usefixtures("folder")
def test_a_file_is_read_back_for_networks_of_its_shape():
    assert read_calibration(SMALL) is None
    fitted = replace(fit_calibration(X, X + X**2), made_with={"model": "small"})
    write_calibration(calibration_path(SMALL), fitted)
    assert read_calibration(SMALL) == fitted
    assert read_calibration(replace(SMALL, num_layers=4)) is None
    assert StepCacheRun.of(StepCache(threshold=0.1, signal="modulated_input"), SMALL).rescale == fitted


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"coefficients": ["a"]}', '{"coefficients": [1, NaN]}', '{"coefficients": [-1]}']
)
def test_a_damaged_file_is_named(text):
    path = calibration_path(SMALL)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ErnieError, match=r"3x32\.json cannot be read as a calibration"):
        StepCacheRun.of(StepCache(threshold=0.1, signal="modulated_input"), SMALL)
    assert StepCacheRun.of(StepCache(threshold=0.1), SMALL).rescale is IDENTITY  # which does not read it


@pytest.mark.usefixtures("folder")
def test_without_a_calibration_changes_count_as_they_are_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        run = StepCacheRun.of(StepCache(threshold=0.1, signal="modulated_input"), SMALL)
    assert run.rescale is IDENTITY
    assert "nobody has calibrated modulated_input for 3 blocks of width 32" in caplog.text


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ErnieError, match="could not be written"):
        write_calibration(tmp_path / "file" / "3x32.json", IDENTITY)
