"""A progress line on stderr."""

from __future__ import annotations

import sys
import time

WIDTH = 30  # characters of the bar


class ProgressBar:
    """Counts towards `total`; draws only on a terminal, at most ten times a second."""

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self._start = time.monotonic()
        self._drawn = 0.0

    def update_absolute(self, value: int, total: int | None = None, preview: object = None) -> None:  # noqa: ARG002
        """Say that `value` of `total` is done; the line ends with the last one. Pictures are not shown here."""
        self.total = self.total if total is None else total
        now = time.monotonic()
        done = value >= self.total
        if not sys.stderr.isatty() or (not done and now - self._drawn < 0.1):
            return
        self._drawn = now
        filled = WIDTH * min(value, self.total) // max(self.total, 1)
        spent = now - self._start
        left = spent / value * (self.total - value) if value else 0.0
        bar = "#" * filled + "." * (WIDTH - filled)
        line = f"{self.label} [{bar}] {value}/{self.total}  {spent:.1f} s, {left:.0f} s left"
        sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if done else ""))
        sys.stderr.flush()
