"""How far two sets of pictures are apart: FID and CMMD of their features.

    FID    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        Heusel et al. 2017 (arXiv 1706.08500), equation 6
    CMMD   1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)),      Jayasumana et al. 2024 (arXiv 2401.09603), section 4;
           k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma 10  features of length 1, as the authors' code has them

tr (S1 S2)^(1/2) is taken as the sum of the singular values of F1^T F2 with Si = Fi Fi^T, which needs no square root of
an indefinite product and stays exact where a set has fewer pictures than features. CMMD comes in two: `cmmd` leaves
out each picture's comparison with itself (unbiased; it may be slightly negative), `cmmd_published` keeps it, as the
code does that published numbers were made with, and so depends on the number of pictures.

Both walk over blocks of rows in float64, so memory grows with a block and the square of the feature length, never with
the square of the number of pictures. Shape letters: N, M pictures, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ErnieError

SIGMA = 10.0
SCALE = 1000.0
FEW_PICTURES = 2048  # below, FID mostly tells how many pictures there are; the customary least number
BLOCK = 2048  # rows at a time

OnBlock = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Distances:
    """What two sets of features say about each other."""

    fid: float
    cmmd: float
    """Unbiased; its expectation for two samples of one distribution is 0."""
    cmmd_published: float
    """As the authors' code: of N pictures against N others of the same kind it is above 0 by the order of 1 / N."""
    num_first: int
    num_second: int
    num_features: int

    def warnings(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        found = []
        fewest = min(self.num_first, self.num_second)
        if fewest < FEW_PICTURES:
            found.append(
                f"FID of {fewest} pictures is too high: it is biased upwards with few pictures, so that only values "
                f"of equal numbers may be compared, and below {FEW_PICTURES} not even these mean much; CMMD is unbiased"
            )
        if fewest <= self.num_features:
            found.append(
                f"{fewest} pictures cannot fill a covariance of {self.num_features} x {self.num_features} features: "
                "FID is that of the plane which they span"
            )
        return found


def compare(first_ND: np.ndarray, second_MD: np.ndarray, *, on_block: OnBlock | None = None) -> Distances:
    """FID and CMMD of two sets of features, of any float type.

    `on_block`: called with (blocks done, of how many) of CMMD's, which takes the time; may raise to stop.

    Raises:
        ErnieError: a set with fewer than two pictures, another length of features, or a value that is not finite.
    """
    _check(first_ND, second_MD)
    unbiased, biased = kernel_distances(unit(first_ND), unit(second_MD), on_block=on_block)
    return Distances(
        fid=frechet(first_ND, second_MD),
        cmmd=SCALE * unbiased,
        cmmd_published=SCALE * biased,
        num_first=len(first_ND),
        num_second=len(second_MD),
        num_features=first_ND.shape[1],
    )


def unit(features_ND: np.ndarray) -> np.ndarray:
    """Each row at length 1, in its own float type; a row of zeros stays."""
    lengths = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND / np.where(lengths > 0, lengths, 1)


# --- FID ----------------------------------------------------------------------------------------------------------


def frechet(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    """The squared Frechet distance of the normal distributions with the means and covariances (over N - 1) of both.

    Raises:
        ErnieError: as `compare`.
    """
    _check(first_ND, second_MD)
    mean_1, factor_1 = _moments(first_ND)
    mean_2, factor_2 = _moments(second_MD)
    overlap = float(torch.linalg.svdvals(factor_1.T @ factor_2).sum())
    spread = float(factor_1.square().sum() + factor_2.square().sum())  # tr S1 + tr S2
    return max(0.0, float((mean_1 - mean_2).square().sum()) + spread - 2 * overlap)


def _moments(features_ND: np.ndarray) -> tuple[Tensor, Tensor]:
    """(mean [D], factor F [D, R] with F F^T = covariance), float64."""
    count, width = features_ND.shape
    mean_D = sum((block.sum(0) for block in _blocks(features_ND)), torch.zeros(width, dtype=torch.float64)) / count
    if count <= width:  # the centred pictures themselves are the smaller factor, and the exact one
        rows = torch.cat([block - mean_D for block in _blocks(features_ND)])
        return mean_D, rows.T / math.sqrt(count - 1)
    total_DD = torch.zeros(width, width, dtype=torch.float64)
    for block in _blocks(features_ND):
        centred = block - mean_D
        total_DD += centred.T @ centred
    values, vectors = torch.linalg.eigh(total_DD / (count - 1))
    return mean_D, vectors * values.clamp(min=0).sqrt()


# --- CMMD ---------------------------------------------------------------------------------------------------------


def kernel_distances(
    first_ND: np.ndarray, second_MD: np.ndarray, *, sigma: float = SIGMA, on_block: OnBlock | None = None
) -> tuple[float, float]:
    """(unbiased, biased) squared maximum mean discrepancy under a Gaussian kernel: Gretton et al. 2012, (3) and (5).

    Features are taken as they are. Raises ErnieError as `compare`.
    """
    _check(first_ND, second_MD)
    n, m = len(first_ND), len(second_MD)
    blocks = {count: math.ceil(count / BLOCK) for count in (n, m)}
    total = sum(b * (b + 1) // 2 for b in (blocks[n], blocks[m])) + blocks[n] * blocks[m]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_block is not None:
            on_block(done, total)

    within_1 = _kernel_sum(first_ND, None, sigma, step)
    within_2 = _kernel_sum(second_MD, None, sigma, step)
    between = _kernel_sum(first_ND, second_MD, sigma, step) / (n * m)
    unbiased = within_1 / (n * (n - 1)) + within_2 / (m * (m - 1)) - 2 * between
    biased = within_1 / n**2 + within_2 / m**2 - 2 * between
    return unbiased, max(0.0, biased)


def _kernel_sum(x_ND: np.ndarray, y_MD: np.ndarray | None, sigma: float, step: Callable[[], None]) -> float:
    """Sum of k(x, y) - 1 over all pairs; y None: over all pairs of x, each with itself included (there it is 0).

    At length 1 and sigma 10 a kernel lies in [0.98, 1]: the ones, which cancel in the distance, are never added up.
    """
    total = 0.0
    for i, rows in enumerate(_blocks(x_ND)):
        squares = rows.square().sum(1)
        # The kernel is symmetric: within one set each pair of blocks is seen once.
        partners = _blocks(x_ND[i * BLOCK :]) if y_MD is None else _blocks(y_MD)
        for j, others in enumerate(partners):
            distances = squares[:, None] + others.square().sum(1)[None, :] - 2 * (rows @ others.T)
            if y_MD is None and j == 0:
                distances.fill_diagonal_(0.0)
            kernel = torch.expm1(distances.clamp_(min=0).mul_(-1 / (2 * sigma**2)))
            total += float(kernel.sum()) * (2 if y_MD is None and j > 0 else 1)
            step()
    return total


def _blocks(features_ND: np.ndarray) -> Iterator[Tensor]:
    for start in range(0, len(features_ND), BLOCK):
        yield torch.from_numpy(features_ND[start : start + BLOCK].astype(np.float64))


def _check(first_ND: np.ndarray, second_MD: np.ndarray) -> None:
    for name, features in (("first", first_ND), ("second", second_MD)):
        if features.ndim != 2 or len(features) < 2:
            raise ErnieError(
                f"a distance needs two pictures at least on each side; the {name} set has {len(features)}."
            )
        if not np.isfinite(features).all():
            raise ErnieError(f"features of the {name} set hold NaN or infinite values; load the model in fp32.")
    if first_ND.shape[1] != second_MD.shape[1]:
        raise ErnieError(
            f"both sets need features of one model, got lengths {first_ND.shape[1]} and {second_MD.shape[1]}."
        )
