"""Stages that behave well, and badly in every way; imported by worker processes under this very name."""

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Double:
    """Adds `double` = 2 * number; the other fields say on which numbers it misbehaves, and how."""

    name: str = "double"
    adds: tuple[str, ...] = ("double", "note")
    needs: tuple[str, ...] = ("number",)
    batch_size: int = 4
    version: int = 1
    seconds: float = 0.0
    fails: tuple[int, ...] = ()
    raises: tuple[int, ...] = ()
    nan: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    dies_once: Path | None = None
    """A file that the first worker to see it missing makes, and then dies."""
    cannot_run: str = ""
    log: Path | None = field(default=None, compare=False)
    """Where each number that is computed is written down."""

    def key(self) -> str:
        return f"double {self.version}"

    def __call__(self, rows):
        if self.cannot_run:
            from ernie_pack.ernie_core.errors import ErnieError

            raise ErnieError(self.cannot_run)
        if self.dies_once is not None and not self.dies_once.exists():
            self.dies_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [self._one(row) for row in rows]

    def _one(self, row):
        number = row["number"]
        assert not {"double", "note"} & row.keys(), "a stage must not see its own columns"
        time.sleep(self.seconds)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(number) + "\n")
        if number == 1:
            os.write(1, b"a library that prints\n")  # must not reach the answers
        if number in self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if number in self.raises:
            raise RuntimeError(f"no {number}")
        if number in self.fails:
            return {"failed": f"cannot double {number}"}
        made = {"double": float("nan") if number in self.nan else 2 * number}
        return made | ({"note": "\u9b5a"} if number % 3 == 0 else {})
