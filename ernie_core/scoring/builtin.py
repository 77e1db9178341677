"""A scorer without weights: seven measures of the pixels, each 0 to 100, higher is better.

They see craft, not taste: a sharp, clean, well exposed picture of nothing scores high. They are here so that every
workflow runs without a download, and to sort out broken pictures. Formulas and sources:

sharpness      1 - blur of Crete et al. 2007 (The Blur Effect, SPIE 6492): how much of the differences between
               neighbours a strong low-pass (9 pixels) takes away; few = it was blurred before. Differences below
               4.5 sigma of the noise do not count, else noise would pass for detail; 2 % of that limit per pixel is
               added below the fraction.
cleanliness    exp(-sigma / 10): sigma is the noise in 8-bit steps, from the Laplacian difference of Immerkaer 1996
               (Fast Noise Variance Estimation), its median instead of its mean, so that edges do not count.
exposure       mean of exp(-(y - 0.5)^2 / (2 * 0.25^2)), y = luma in 0..1: the well-exposedness of Mertens et al. 2007
               (Exposure Fusion) with 0.25 for their 0.2, times 1 - the share of pixels that are clipped to white or
               black (all channels within 2 steps of an end).
contrast       RMS contrast (Peli 1990), the standard deviation of y, doubled: 0.5 is the most that it can be.
colourfulness  M = sigma_rgyb + 0.3 mu_rgyb of Hasler and Suesstrunk 2003 (Measuring Colourfulness in Natural Images),
               as 100 * M / 109 (109 is their "extremely colourful"), at most 100.
text_legibility  over the tenth of the tiles (32 px) with the most edges: how far the tile is made of two tones (Otsu
               1979, between-class share of the variance; a uniform ramp and noise count as none) times how far apart
               they are (WCAG 2 contrast ratio, 7:1 = AAA counts as full). It reads no letters: a proxy.
combined       weighted geometric mean of the first five, see WEIGHTS.

Contrast, colourfulness and exposure are measured on averages of 4 x 4 pixels or larger, where noise is small.

Shape letters: H, W pixels, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import ErnieError
from .scorer import BatchScorer

Measure = Literal["combined", "sharpness", "cleanliness", "exposure", "contrast", "colourfulness", "text_legibility"]
MEASURES: tuple[Measure, ...] = (
    *("combined", "sharpness", "cleanliness", "exposure", "contrast", "colourfulness", "text_legibility"),
)
WEIGHTS: dict[Measure, float] = {
    "sharpness": 0.3,
    "cleanliness": 0.25,
    "exposure": 0.2,
    "contrast": 0.15,
    "colourfulness": 0.1,
}
RULES = 1  # raise it when a change here gives other numbers
FLOOR = 2.0  # of 100, in the geometric mean: one measure at 0 does not hide the others
NOISE_SIGMAS = 4.5
MAX_SIDE = 2048  # longer pictures are measured at this size
TILE_PX = 32

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_RELATIVE_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # WCAG 2, of linear light


@dataclass(frozen=True, kw_only=True)
class BuiltinScorer(BatchScorer[float]):
    """One of MEASURES as a scorer, 0 to 100."""

    measure: Measure = "combined"
    low: float | None = 0.0
    high: float | None = 100.0
    higher_is_better: bool = True
    reads_prompt: bool = False

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ErnieError(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}.")

    @property
    def name(self) -> str:
        return f"built-in {self.measure}"

    @property
    def key(self) -> str:
        return f"{self.name}:{RULES}"

    def prepare(self, rgb_HWC: np.ndarray) -> float:
        return measure_picture(rgb_HWC, self.measure)

    def start(self) -> Callable[[list[float], list[str]], Sequence[float]]:
        return lambda made, _texts: made


def measure_picture(rgb_HWC: np.ndarray, measure: Measure) -> float:
    """One measure, 0 to 100, of uint8 [H, W, 3]."""
    if measure == "combined":
        return combine(measure_all(rgb_HWC))
    return _measure(rgb_HWC, (measure,))[measure]


def measure_all(rgb_HWC: np.ndarray) -> dict[Measure, float]:
    """The five measures that `combine` takes."""
    return _measure(rgb_HWC, tuple(WEIGHTS))


def _measure(rgb_HWC: np.ndarray, measures: tuple[Measure, ...]) -> dict[Measure, float]:
    rgb_HWC = _shrink(rgb_HWC, MAX_SIDE)
    made: dict[Measure, float] = {}
    if "sharpness" in measures or "cleanliness" in measures:
        luma_HW = rgb_HWC.astype(np.float32) @ _LUMA
        sigma = noise_sigma(luma_HW)
        made["cleanliness"] = float(np.exp(-sigma / 10))
        if "sharpness" in measures:
            made["sharpness"] = 1 - blur_effect(luma_HW, sigma)
    if "text_legibility" in measures:
        made["text_legibility"] = _legibility(rgb_HWC)
    coarse: dict[Measure, Callable[[np.ndarray], float]]
    coarse = {"exposure": _exposure, "contrast": _contrast, "colourfulness": _colourfulness}
    if any(measure in coarse for measure in measures):
        coarse_HWC = _average(rgb_HWC)
        made |= {measure: function(coarse_HWC) for measure, function in coarse.items()}
    return {measure: 100 * made[measure] for measure in measures}


def combine(parts: dict[Measure, float]) -> float:
    """Their weighted geometric mean, 0 to 100; each counts as FLOOR at least."""
    floor = FLOOR / 100
    total = sum(weight * np.log(max(parts[measure] / 100, floor)) for measure, weight in WEIGHTS.items())
    return float(100 * (np.exp(total) - floor) / (1 - floor))


def _shrink(rgb_HWC: np.ndarray, side: int) -> np.ndarray:
    """The longer side at most `side`, by averaging whole blocks."""
    step = -(-max(rgb_HWC.shape[:2]) // side)
    return rgb_HWC if step == 1 else np.rint(_blocks(rgb_HWC, step)).astype(np.uint8)


def _average(rgb_HWC: np.ndarray) -> np.ndarray:
    """Float [h, w, 3] in 0..255, averages of blocks of 4 pixels or more, about 256 on the longer side."""
    return _blocks(rgb_HWC, max(4, max(rgb_HWC.shape[:2]) // 256))


def _blocks(rgb_HWC: np.ndarray, step: int) -> np.ndarray:
    height, width = rgb_HWC.shape[:2]
    step_h, step_w = min(step, height), min(step, width)
    rows, columns = height // step_h, width // step_w
    cut_HWC = rgb_HWC[: rows * step_h, : columns * step_w].astype(np.float32)
    return cut_HWC.reshape(rows, step_h, columns, step_w, 3).mean(axis=(1, 3))


def noise_sigma(luma_HW: np.ndarray) -> float:
    """Standard deviation of the noise in the steps of the picture: median |difference of Laplacians| / (6 * 0.6745).

    6 is the gain of the mask [1 -2 1; -2 4 -2; 1 -2 1] on white noise; 0.6745 the median of |N(0, 1)|.
    """
    if min(luma_HW.shape) < 3:
        return 0.0
    across = luma_HW[:, :-2] - 2 * luma_HW[:, 1:-1] + luma_HW[:, 2:]
    both = across[:-2] - 2 * across[1:-1] + across[2:]
    return float(np.median(np.abs(both)) / (6 * 0.6745))


def blur_effect(luma_HW: np.ndarray, sigma: float = 0.0) -> float:
    """0 (sharp) to 1 (blurred, or nothing to see), as in the module's text; the worse of the two directions."""
    return max(_blur_along(luma_HW, sigma), _blur_along(luma_HW.T, sigma))


def _blur_along(luma_HW: np.ndarray, sigma: float) -> float:
    taps = 9
    if luma_HW.shape[1] < taps + 1:
        return 1.0
    padded = np.pad(luma_HW, ((0, 0), (taps // 2 + 1, taps // 2)), mode="edge")
    sums = padded.cumsum(axis=1, dtype=np.float64)
    low_pass = (sums[:, taps:] - sums[:, :-taps]) / taps
    hidden = NOISE_SIGMAS * 2**0.5 * sigma  # noise of a difference of neighbours is sqrt(2) sigma
    before = np.maximum(np.abs(np.diff(luma_HW, axis=1)) - hidden, 0)
    after = np.abs(np.diff(low_pass, axis=1))
    total = float(before.sum())
    if total <= 0:
        return 1.0
    # Where hardly anything stands out of the noise, what does is its tail: the second term outweighs it.
    return 1 - float(np.maximum(before - after, 0).sum()) / (total + 0.02 * hidden * before.size)


def _exposure(coarse_HWC: np.ndarray) -> float:
    luma_HW = coarse_HWC @ _LUMA / 255
    clipped = (coarse_HWC.min(axis=-1) >= 253) | (coarse_HWC.max(axis=-1) <= 2)
    return float(np.exp(-((luma_HW - 0.5) ** 2) / (2 * 0.25**2)).mean() * (1 - clipped.mean()))


def _contrast(coarse_HWC: np.ndarray) -> float:
    return float(min(2 * (coarse_HWC @ _LUMA / 255).std(), 1.0))


def _colourfulness(coarse_HWC: np.ndarray) -> float:
    return min(hasler_suesstrunk(coarse_HWC) / 109, 1.0)


def hasler_suesstrunk(rgb_HWC: np.ndarray) -> float:
    """M of the paper: 0 = grey, 15 slightly, 33 moderately, 45 averagely, 59 quite, 82 highly, 109 extremely."""
    red, green, blue = (rgb_HWC[..., i].astype(np.float64) for i in range(3))
    rg, yb = red - green, 0.5 * (red + green) - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def _legibility(rgb_HWC: np.ndarray) -> float:
    height, width = rgb_HWC.shape[:2]
    rows, columns = height // TILE_PX, width // TILE_PX
    if not rows or not columns:
        return 0.0
    cut_HWC = rgb_HWC[: rows * TILE_PX, : columns * TILE_PX].astype(np.float32) / 255
    light_HWC = np.where(cut_HWC <= 0.04045, cut_HWC / 12.92, ((cut_HWC + 0.055) / 1.055) ** 2.4)
    light_TP = _tiles(light_HWC @ _RELATIVE_LUMINANCE)
    luma_TP = _tiles(cut_HWC @ _LUMA)
    steps = luma_TP.reshape(-1, TILE_PX, TILE_PX)
    edges_T = np.abs(np.diff(steps, axis=2)).mean(axis=(1, 2)) + np.abs(np.diff(steps, axis=1)).mean(axis=(1, 2))
    busiest = np.argsort(-edges_T, kind="stable")[: max(1, len(edges_T) // 10)]
    return float(np.mean([_two_tones(luma_TP[t], light_TP[t]) for t in busiest]))


def _tiles(values_HW: np.ndarray) -> np.ndarray:
    rows, columns = values_HW.shape[0] // TILE_PX, values_HW.shape[1] // TILE_PX
    return values_HW.reshape(rows, TILE_PX, columns, TILE_PX).swapaxes(1, 2).reshape(rows * columns, TILE_PX**2)


def _two_tones(luma_P: np.ndarray, light_P: np.ndarray) -> float:
    """0 (one tone, a ramp, noise) to 1 (two clean tones at 7:1 or more)."""
    variance = float(luma_P.var())
    if variance < 1e-6:
        return 0.0
    order = np.argsort(luma_P, kind="stable")
    sorted_P = luma_P[order]
    count = len(sorted_P)
    below = np.arange(1, count)
    sums = sorted_P.cumsum(dtype=np.float64)
    between = (sums[-1] * below / count - sums[:-1]) ** 2 / (below * (count - below))
    cut = int(between.argmax()) + 1
    # 0.75 = the share of a uniform ramp, more than a normal distribution's 0.64; two clean tones: 1
    split = max(float(between[cut - 1]) / variance - 0.75, 0) / 0.25
    dark, bright = float(light_P[order[:cut]].mean()), float(light_P[order[cut:]].mean())
    low, high = sorted((dark, bright))
    ratio = (high + 0.05) / (low + 0.05)
    return min(split, 1.0) * min((ratio - 1) / 6, 1.0)
