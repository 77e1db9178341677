"""Step caching: where a signal says that little has changed, the network's blocks are not run again.

Two signals. First block: it always runs; when what it adds to the stream differs little from what it added at the last
whole evaluation, the other blocks' sum from then is added again (First Block Cache of ParaAttention). Modulated input:
no block runs; how far what the first block would read has moved from evaluation to evaluation is passed through a
calibration and summed up since the last whole evaluation, and below the threshold the sum of all blocks from then is
added again (TeaCache, arXiv 2411.19108). Values of `DiT.forward`'s `run_block`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import CACHE_SIGNALS, DiTConfig
from ..errors import ErnieError
from ..model.dit import Modulation, RunBlock, call_block
from .calibration import IDENTITY, calibration_path, read_calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """When an evaluation may be left out."""

    threshold: float
    """Change of the signal, as mean |difference| / mean |value|, below which; 0 = never."""
    start: float = 1.0
    """Noise level from which ..."""
    end: float = 0.0
    """... down to which evaluations may be left out; this one itself not."""
    max_skips: int = 3
    """How many in a row at most."""
    signal: str = CACHE_SIGNALS[0]
    """What is compared, one of config.CACHE_SIGNALS; see the top of the file."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ErnieError(f"threshold must lie between 0 (nothing is left out) and 1, got {self.threshold:g}.")
        if not 0 <= self.end <= self.start <= 1:
            raise ErnieError(
                f"start and end must be noise levels with 1 >= start >= end >= 0, got {self.start:g} and {self.end:g}."
            )
        if self.max_skips < 0:
            raise ErnieError(f"max_skips must be 0 or more, got {self.max_skips}.")
        if self.signal not in CACHE_SIGNALS:
            raise ErnieError(f"signal {' or '.join(CACHE_SIGNALS)} expected, got {self.signal!r}.")

    @property
    def is_neutral(self) -> bool:
        """Whether it can leave nothing out."""
        return self.threshold == 0 or self.max_skips == 0 or self.start == self.end


class StepCacheRun:
    """One sampling run under a `StepCache`; make a new one for each, so that nothing outlives an interrupt.

    `rescale`: change of the modulated input -> expected change of the output; the other signal does not read it.
    """

    def __init__(self, cache: StepCache, blocks: int, rescale: Callable[[float], float] = IDENTITY):
        self.cache = cache
        self.blocks = blocks
        self.rescale = rescale
        self.whole = 0
        """Evaluations of all blocks."""
        self.skipped = 0
        """Evaluations of the first block only, or of none."""
        self._branches: dict[Hashable, _Branch] = {}

    @classmethod
    def of(cls, cache: StepCache, config: DiTConfig) -> StepCacheRun:
        """A run with the calibration of a network of this shape; without one, changes count as they are, and the log
        says so.

        Raises:
            ErnieError: the calibration's file is damaged.
        """
        if cache.signal == "first_block":
            return cls(cache, config.num_layers)
        rescale = read_calibration(config)
        if rescale is None:
            logger.warning(
                "Step Cache (ERNIE): nobody has calibrated modulated_input for %d blocks of width %d, so its changes "
                "count as they are. Make %s: python -m bench calibrate --model YOUR_OFFICIAL_FOLDER",
                config.num_layers,
                config.hidden_size,
                calibration_path(config).name,
            )
        return cls(cache, config.num_layers, rescale or IDENTITY)

    def run_block(self, key: Hashable, sigma: float, run_block: RunBlock = call_block) -> RunBlock:
        """A `run_block` for one evaluation at `sigma`.

        `key` tells apart what must not be mixed: prompts, their batches, networks, blocks left out. Each has a cache of
        its own. `run_block` runs a block that is not left out.
        """
        branch = self._branches.setdefault(key, _Branch())
        # A replacement of another pack may not call the first block: such an evaluation is whole.
        branch.reuses, branch.start = False, None
        may_skip = self.cache.end < sigma <= self.cache.start
        by_input = self.cache.signal == "modulated_input"

        def run(index: int, block: Any, x_BSD: Tensor, modulation: Modulation, *inputs: Any) -> Tensor:
            if index == 0 and by_input:
                self._decide_by_input(branch, modulated_input(block, x_BSD, modulation), may_skip)
                if branch.reuses and branch.rest is not None:
                    return x_BSD + branch.rest
                branch.start = x_BSD
            elif index > 0 and branch.reuses and branch.rest is not None:
                return x_BSD + branch.rest if index == 1 and not by_input else x_BSD
            out = run_block(index, block, x_BSD, modulation, *inputs)
            if index == 0 and not by_input:
                self._decide_by_addition(branch, out - x_BSD, may_skip)
                branch.start = out
            elif index == self.blocks - 1 and branch.start is not None:
                branch.rest, branch.start = out - branch.start, None
            return out

        return run

    def _decide_by_addition(self, branch: _Branch, added: Tensor, may_skip: bool) -> None:
        change = relative_change(branch.signal, added) if self._can_reuse(branch, added, may_skip) else None
        self._count(branch, change is not None and change < self.cache.threshold)
        if not branch.reuses:
            branch.signal = added

    def _decide_by_input(self, branch: _Branch, modulated: Tensor, may_skip: bool) -> None:
        can_reuse = self._can_reuse(branch, modulated, may_skip)
        if can_reuse:
            branch.moved += self.rescale(relative_change(branch.signal, modulated))
        self._count(branch, can_reuse and branch.moved < self.cache.threshold)
        branch.signal = modulated
        if not branch.reuses:
            branch.moved = 0.0

    def _can_reuse(self, branch: _Branch, signal: Tensor, may_skip: bool) -> bool:
        return (
            may_skip
            and branch.rest is not None
            and branch.signal is not None
            and branch.signal.shape == signal.shape
            and branch.in_a_row < self.cache.max_skips
        )

    def _count(self, branch: _Branch, reuses: bool) -> None:
        branch.reuses = reuses
        branch.in_a_row = branch.in_a_row + 1 if reuses else 0
        self.skipped += reuses
        self.whole += not reuses

    def report(self) -> str:
        """One line for people."""
        total = self.whole + self.skipped
        share = 100 * self.skipped / total if total else 0.0
        return f"{self.skipped} of {total} evaluations left out ({share:.0f} %)"


def modulated_input(block: Any, x_BSD: Tensor, modulation: Modulation) -> Tensor:
    """What a block's attention reads: the normed stream under this step's shift and scale."""
    return torch.addcmul(modulation[0], block.adaLN_sa_ln(x_BSD), modulation[1])


def relative_change(before: Tensor | None, now: Tensor) -> float:
    """Mean |now - before| / mean |before|; infinite without a before, or where it is 0 and now is not."""
    if before is None:
        return float("inf")
    # Read together: each reading waits for the device.
    change, size = torch.stack([t.abs().mean(dtype=torch.float32) for t in (now - before, before)]).tolist()
    return change / size if size > 0 else 0.0 if change == 0 else float("inf")


@dataclass
class _Branch:
    """What is kept of one prompt's evaluations."""

    signal: Tensor | None = None
    """What the first block added at the last whole evaluation; or its modulated input at the last evaluation."""
    moved: float = 0.0
    """Rescaled changes of the modulated input since the last whole evaluation."""
    rest: Tensor | None = None
    """What the blocks after the first (first_block) or all of them (modulated_input) added at the last whole one."""
    start: Tensor | None = None
    """The stream from which `rest` counts, while an evaluation runs."""
    reuses: bool = False
    in_a_row: int = 0
