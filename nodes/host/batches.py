"""Where the rows of a batch or grid are made: in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def take_studio(studio: Any) -> None:
    """Nothing: only workers without ComfyUI want to know what makes a node's rows."""


def makes_rows_here() -> bool:
    """Yes, so their models are loaded."""
    return True


def run_rows(rows: Sequence[Any], folder: Path, studio: Any) -> Any:
    """The engine's result of a batch or grid."""
    from ...ernie_core import batch

    return batch.run_rows(rows, folder, **studio.callbacks())
