"""Scores of a manifest's pictures by any scorer, and what they say of each category."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ErnieError
from ..scoring.charts import Bar, Cell, contact_sheet, draw_bars, draw_histogram, draw_table, stack_pictures
from ..scoring.loading import BUILTIN, Kind, find_builtin, list_builtin, load_scorer
from ..scoring.network import Precision
from ..scoring.report import HEADER
from ..scoring.scorer import Scorer
from .captions import best_text
from .image_text import model_key
from .manifest import Row, open_picture

COLUMN = "score"
DIGITS = 5  # of the scores in a manifest: more would depend on what else is in the batch
SHOWN = 15  # categories at each end


class ScorerFile:
    """A scorer by name or path: loaded at the first score, in every process that needs it."""

    def __init__(
        self, name: str, *, kind: Kind = "auto", precision: Precision | None = None, device: str | None = None
    ):
        """`name`: one of `list_builtin()`, or a file or folder as `load_scorer` reads it.

        Raises ErnieError: neither of both.
        """
        if find_builtin(name) is None and name.startswith(BUILTIN):
            raise ErnieError(f"scorer must be a file, a folder or one of {', '.join(list_builtin())}, got {name!r}.")
        self.name, self.device = name, device
        self.kind: Kind = kind
        self.precision: Precision | None = precision
        builtin = find_builtin(name)
        self._key = builtin.key if builtin else json.dumps([model_key(Path(name), "fp32"), kind, precision])
        self._loaded: Scorer | None = builtin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": find_builtin(self.name)}

    @property
    def key(self) -> str:
        return self._key

    def load(self) -> Scorer:
        """The scorer itself."""
        if self._loaded is None:
            import torch

            def place(network: Any) -> Callable[[], Any]:
                device = torch.device(self.device or "cpu")
                network.to(device)
                return lambda: device

            self._loaded = load_scorer(Path(self.name), kind=self.kind, precision=self.precision, place=place)
        return self._loaded


class ScorePictures:
    """Stage "scores" (or "scores.COLUMN"): adds COLUMN and COLUMN_of, the scorer's name."""

    needs = ("source",)

    def __init__(self, scorer: Scorer | ScorerFile, *, column: str = COLUMN, batch_size: int = 8):
        """`scorer`: a loaded one stays in this process; a `ScorerFile` goes to workers too.

        Raises ErnieError: a name that is no column's.
        """
        if not column.isidentifier():
            raise ErnieError(f"column must be a name of letters, digits and _, got {column!r}.")
        if batch_size < 1:
            raise ErnieError(f"batch_size must be 1 or more, got {batch_size}.")
        self.scorer = scorer
        self.column = column
        self.batch_size = batch_size
        self.name = "scores" if column == COLUMN else f"scores.{column}"
        self.adds = (column, f"{column}_of")

    def key(self) -> str:
        return hashlib.sha256(self.scorer.key.encode()).hexdigest()[:16]

    def __call__(self, rows: list[Row]) -> list[Row]:
        scorer = self.scorer.load() if isinstance(self.scorer, ScorerFile) else self.scorer
        made: list[Row] = [{} for _ in rows]
        pictures: dict[int, Image.Image] = {}
        for i, row in enumerate(rows):
            if scorer.reads_prompt and not best_text(row):
                made[i] = {"failed": f"{scorer.name} reads the caption, and there is none."}
                continue
            try:
                pictures[i] = open_picture(row)
            except ErnieError as e:
                made[i] = {"failed": str(e)}
        if pictures:
            prompts = [best_text(rows[i]) for i in pictures] if scorer.reads_prompt else None
            values = scorer.score(list(pictures.values()), prompts, batch_size=self.batch_size)
            for i, value in zip(pictures, values, strict=True):
                made[i] = {self.column: round(float(value), DIGITS), f"{self.column}_of": scorer.name}
        return made


# --- what they say ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores by category, without the rows."""

    column: str
    scorer: str
    values: dict[str, np.ndarray]
    """fp64 per category, best mean first; "" where a row has no category."""
    without: int
    """Rows without a score."""
    best: tuple[tuple[float, Row], ...]
    worst: tuple[tuple[float, Row], ...]

    def rows(self) -> list[list[str]]:
        """Cells as in HEADER: category, pictures, mean, deviation, median, lowest, highest."""
        return [
            [name or "(none)", str(len(v)), *(f"{x:.4g}" for x in (v.mean(), v.std(), np.median(v), v.min(), v.max()))]
            for name, v in self.values.items()
        ]

    def describe(self) -> str:
        """The table as text."""
        total = sum(map(len, self.values.values()))
        if not total:
            return f"no row has a {self.column} ({self.without} rows)"
        lines = [f"{self.column} by {self.scorer}: {total} pictures, {self.without} without; by category:"]
        return "\n".join([*lines, *("  ".join(cells) for cells in (list(HEADER), *self.rows()))])

    def draw(self) -> np.ndarray:
        """uint8 [H, W, 3]: histogram, best and worst categories with the error of their mean, table, pictures.

        Raises ErnieError: no row has a score.
        """
        if not self.values:
            raise ErnieError(f"no row has a {self.column}; run Curate Scores first.")
        everything = np.concatenate(list(self.values.values()))
        title = f"{self.column} by {self.scorer}: {len(everything)} pictures in {len(self.values)} categories"
        names = list(self.values)
        ends = names if len(names) <= 2 * SHOWN else [*names[:SHOWN], *names[-SHOWN:]]
        table = self.rows()
        shown = table if len(table) <= 2 * SHOWN else [*table[:SHOWN], *table[-SHOWN:]]
        parts = [
            draw_histogram({self.scorer: everything.tolist()}, title=title, label=self.column),
            draw_bars([_bar(name, self.values[name]) for name in ends], title="Mean of categories", label=self.column),
            draw_table(HEADER, shown, title="Categories" if shown is table else "Best and worst categories"),
        ]
        ends_of = (("Best", self.best), ("Worst", self.worst))
        parts += [contact_sheet(_cells(few), title=name) for name, few in ends_of if few]
        return stack_pictures(parts)


def _bar(name: str, values: np.ndarray) -> Bar:
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    if error is None:
        return Bar(label=name or "(none)", value=mean)
    return Bar(label=name or "(none)", value=mean, low=mean - error, high=mean + error)


def _cells(few: Iterable[tuple[float, Row]]) -> Iterator[Cell]:
    for value, row in few:
        try:
            picture = open_picture(row)
        except ErnieError:  # it is gone since; the table stands without it
            continue
        yield Cell(picture=np.asarray(picture), text=f"{value:.4g}", label=str(row.get("category") or ""))


def tabulate(rows: Iterable[Row], column: str = COLUMN, *, shown: int = 6) -> ScoreTable:
    """The scores of rows that no filter dropped, by category; `shown` rows are kept from each end."""
    values: dict[str, array] = {}
    scorers: dict[str, None] = {}
    without = 0
    best: list[tuple[float, int, Row]] = []
    worst: list[tuple[float, int, Row]] = []
    for number, row in enumerate(rows):
        if row.get("kept") is False:
            continue
        value = row.get(column)
        if not isinstance(value, int | float) or not math.isfinite(value):
            without += 1
            continue
        values.setdefault(str(row.get("category") or ""), array("d")).append(value)
        scorers.setdefault(str(row.get(f"{column}_of") or "unknown"))
        for heap, sign in ((best, 1), (worst, -1)):
            heapq.heappush(heap, (sign * value, -number, row))
            if len(heap) > shown:
                heapq.heappop(heap)
    arrays = {name: np.frombuffer(v, dtype=np.float64) for name, v in values.items()}
    ordered = dict(sorted(arrays.items(), key=lambda entry: (-entry[1].mean(), entry[0])))
    return ScoreTable(
        column=column,
        scorer=", ".join(scorers),
        values=ordered,
        without=without,
        best=tuple((value, row) for value, _, row in sorted(best, key=lambda e: (-e[0], -e[1]))),
        worst=tuple((-value, row) for value, _, row in sorted(worst, key=lambda e: (-e[0], -e[1]))),
    )
