"""First-block caching: where the first block says that little has changed, the other blocks are not run.

The first block always runs. When what it adds to the stream differs little from what it added at the last whole
evaluation, the other blocks' sum from then is added again. Values of `DiT.forward`'s `run_block`. Source of the idea:
First Block Cache (ParaAttention), after TeaCache (arXiv 2411.19108).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ErnieError
from ..model.dit import RunBlock, call_block


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """When an evaluation may be left out."""

    threshold: float
    """Mean |change of the first block's addition| / mean |that addition|, below which; 0 = never."""
    start: float = 1.0
    """Noise level from which ..."""
    end: float = 0.0
    """... down to which evaluations may be left out; this one itself not."""
    max_skips: int = 3
    """How many in a row at most."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ErnieError(f"threshold must lie between 0 (nothing is left out) and 1, got {self.threshold:g}.")
        if not 0 <= self.end <= self.start <= 1:
            raise ErnieError(
                f"start and end must be noise levels with 1 >= start >= end >= 0, got {self.start:g} and {self.end:g}."
            )
        if self.max_skips < 0:
            raise ErnieError(f"max_skips must be 0 or more, got {self.max_skips}.")

    @property
    def is_neutral(self) -> bool:
        """Whether it can leave nothing out."""
        return self.threshold == 0 or self.max_skips == 0 or self.start == self.end


class StepCacheRun:
    """One sampling run under a `StepCache`; make a new one for each, so that nothing outlives an interrupt."""

    def __init__(self, cache: StepCache, blocks: int):
        self.cache = cache
        self.blocks = blocks
        self.whole = 0
        """Evaluations of all blocks."""
        self.skipped = 0
        """Evaluations of the first block only."""
        self._branches: dict[Hashable, _Branch] = {}

    def run_block(self, key: Hashable, sigma: float, run_block: RunBlock = call_block) -> RunBlock:
        """A `run_block` for one evaluation at `sigma`.

        `key` tells apart what must not be mixed: prompts, their batches, networks, blocks left out. Each has a cache of
        its own. `run_block` runs a block that is not left out.
        """
        branch = self._branches.setdefault(key, _Branch())
        in_range = self.cache.end < sigma <= self.cache.start

        def run(index: int, block: Any, x_BSD: Tensor, *inputs: Any) -> Tensor:
            if index > 0 and branch.reuses and branch.others is not None:
                return x_BSD + branch.others if index == 1 else x_BSD
            out = run_block(index, block, x_BSD, *inputs)
            if index == 0:
                self._decide(branch, out - x_BSD, in_range)
                branch.after_first = out
            elif index == self.blocks - 1 and branch.after_first is not None:
                branch.others = out - branch.after_first
                branch.after_first = None
            return out

        return run

    def _decide(self, branch: _Branch, added: Tensor, in_range: bool) -> None:
        cache, before = self.cache, branch.added
        branch.reuses = (
            in_range
            and branch.others is not None
            and before is not None
            and before.shape == added.shape
            and branch.in_a_row < cache.max_skips
            and float((added - before).abs().mean()) < cache.threshold * float(before.abs().mean())
        )
        if branch.reuses:
            branch.in_a_row += 1
            self.skipped += 1
        else:
            branch.added, branch.in_a_row = added, 0
            self.whole += 1

    def report(self) -> str:
        """One line for people."""
        total = self.whole + self.skipped
        share = 100 * self.skipped / total if total else 0.0
        return f"{self.skipped} of {total} evaluations left out ({share:.0f} %)"


@dataclass
class _Branch:
    """What is kept of one prompt's evaluations."""

    added: Tensor | None = None
    """What the first block added at the last whole evaluation."""
    others: Tensor | None = None
    """What the other blocks added there."""
    after_first: Tensor | None = None
    reuses: bool = False
    in_a_row: int = 0
