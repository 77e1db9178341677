"""What a change of the first block's input means for the output: fitted, one file per shape of the network.

`python -m bench calibrate` makes the files in calibrations/; the shipped one is ernie-image-tiny's. Source: TeaCache
(arXiv 2411.19108), section 3.3, whose polynomial is free; ours cannot fall, see `fit_calibration`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DiTConfig
from ..errors import ErnieError

FOLDER = Path(__file__).resolve().parent / "calibrations"
MAX_DEGREE = 4


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """calibration(change of the input) = expected change of the output, both relative L1."""

    coefficients: tuple[float, ...]
    """Of the polynomial in (change - low), highest power first; none is negative."""
    low: float = 0.0
    """Changes from here ..."""
    high: float = math.inf
    """... to here were fitted; outside, the value at the edge goes on in proportion, so that no power runs away."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """Model, prompts, steps, shift, cfg: for people."""

    def __call__(self, change: float) -> float:
        """0 or more; infinite stays infinite."""
        if not math.isfinite(change):
            return change
        inside = min(max(change, self.low), self.high)
        value = 0.0
        for coefficient in self.coefficients:
            value = value * (inside - self.low) + coefficient
        return value * (change / inside) if inside > 0 else value


IDENTITY = Calibration(coefficients=(1.0, 0.0))


def fit_calibration(
    inputs: Sequence[float], outputs: Sequence[float], *, made_with: Mapping[str, Any] | None = None
) -> Calibration:
    """The least-squares polynomial of degree 4 at most in (change - smallest change) without negative coefficients.

    Such a one never goes below 0 and never falls, so that a larger change never counts less; a free fit does both
    where the pairs scatter (ernie-image-tiny's falls over a fifth of the range).

    Raises:
        ErnieError: fewer than five pairs, or one that is not a finite number of 0 or more.
    """
    x, y = np.asarray(inputs, dtype=np.float64), np.asarray(outputs, dtype=np.float64)
    if len(x) != len(y) or len(x) <= MAX_DEGREE:
        raise ErnieError(
            f"{MAX_DEGREE + 1} or more pairs of changes expected, got {len(x)} and {len(y)}; use more steps."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x >= 0).all() and (y >= 0).all() and x.max() > 0):
        raise ErnieError("changes must be finite and 0 or more; the model painted NaN, or its input never changed.")
    low, high = float(x.min()), float(x.max())
    scale = high - low or 1.0  # powers of numbers up to 1, or the columns would be far apart
    columns = ((x - low) / scale)[:, None] ** np.arange(MAX_DEGREE + 1)
    best, least = np.zeros(MAX_DEGREE + 1), math.inf
    # The best one without negative coefficients is the free fit of the powers that it has: try every set of powers.
    for powers in product((False, True), repeat=MAX_DEGREE + 1):
        tried = np.zeros(MAX_DEGREE + 1)
        tried[list(powers)] = np.linalg.lstsq(columns[:, list(powers)], y, rcond=None)[0]
        error = float(((columns @ tried - y) ** 2).sum())
        if (tried >= 0).all() and error < least:
            best, least = tried, error
    best /= scale ** np.arange(MAX_DEGREE + 1)
    return Calibration(coefficients=tuple(map(float, best[::-1])), low=low, high=high, made_with=made_with or {})


def calibration_path(config: DiTConfig) -> Path:
    """Where the calibration of a network of this shape lies or would lie: calibrations/36x4096.json."""
    return FOLDER / f"{config.num_layers}x{config.hidden_size}.json"


def read_calibration(config: DiTConfig) -> Calibration | None:
    """The calibration of a network of this shape; None where nobody has made one.

    Raises:
        ErnieError: the file is damaged.
    """
    path = calibration_path(config)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        read = Calibration(**values | {"coefficients": tuple(map(float, values["coefficients"]))})
        if not all(0 <= number < math.inf for number in (*read.coefficients, read.low, read.high)):
            raise ValueError("a number is negative or not finite")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ErnieError(
            f"{path} cannot be read as a calibration ({e}). Delete it, or make it anew: python -m bench calibrate."
        ) from e
    return read


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Make or replace the file.

    Raises:
        ErnieError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(calibration), indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ErnieError(f"{path} could not be written ({e.strerror or e}). Free some space and run again.") from e
