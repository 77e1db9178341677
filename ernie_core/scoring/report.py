"""What scores say, as one picture and as text: histogram, tables by prompt and category, best and worst pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..errors import ErnieError
from .charts import Cell, contact_sheet, draw_histogram, draw_table, stack_pictures
from .scorer import Scores

MAX_ROWS = 40  # of a table; the files have all
HEADER = ("", "pictures", "mean", "deviation", "median", "lowest", "highest")


def table_rows(scores: Scores, column: str) -> list[tuple[str, int, float, float, float, float, float]]:
    """(group, pictures, mean, standard deviation, median, lowest, highest) by "prompts" or "categories".

    Best mean first; the deviation of a single value is 0.
    """
    rows = [
        (
            key or "(none)",
            len(part),
            statistics.fmean(part.values),
            statistics.pstdev(part.values),
            statistics.median(part.values),
            min(part.values),
            max(part.values),
        )
        for key, part in scores.by(column).items()
    ]
    return sorted(rows, key=lambda row: -row[2] if scores.higher_is_better else row[2])


def summarise(sets: Sequence[Scores]) -> str:
    """The numbers of the report as text.

    Raises ErnieError: no scores.
    """
    _check(sets)
    lines: list[str] = []
    for scores in sets:
        direction = "" if scores.higher_is_better else ", lower is better"
        lines.append(f"{scores.scorer}: {len(scores)} pictures{direction}")
        for name, column in (("all", None), ("prompt", "prompts"), ("category", "categories")):
            for row in _tables(scores, column):
                lines.append(f"{name}  " + "  ".join(_cells(row)))
    return "\n".join(lines)


def _tables(scores: Scores, column: str | None) -> list[tuple[str, int, float, float, float, float, float]]:
    """The rows of one table; none where all pictures are of one group."""
    if column is None:
        everything = scores.chosen(range(len(scores)))
        return table_rows(
            Scores(
                scorer=scores.scorer,
                values=everything.values,
                labels=everything.labels,
                prompts=("all",) * len(scores),
                categories=everything.categories,
            ),
            "prompts",
        )
    rows = table_rows(scores, column)
    return rows if len(rows) > 1 else []


def _cells(row: tuple[str, int, float, float, float, float, float]) -> list[str]:
    return [row[0], str(row[1]), *(f"{value:.4g}" for value in row[2:])]


def _check(sets: Sequence[Scores]) -> None:
    if not sets or not any(len(scores) for scores in sets):
        raise ErnieError("there are no scores to report on.")


def draw_report(
    sets: Sequence[Scores], read: Callable[[Scores, int], np.ndarray | None], *, shown: int = 6
) -> np.ndarray:
    """uint8 [H, W, 3]: one histogram for scorers of the same name, and tables and pictures for each set.

    `read` gives the picture at a place as uint8 [H, W, 3], or None where it is no more: those are left out of the
    best and worst. Only the small ones on the sheet are held.

    Raises ErnieError: no scores.
    """
    _check(sets)
    parts: list[np.ndarray] = []
    for name in dict.fromkeys(scores.scorer for scores in sets):
        same = [scores for scores in sets if scores.scorer == name]
        groups = {name if len(same) == 1 else f"{i}": scores.values for i, scores in enumerate(same, start=1)}
        parts.append(draw_histogram(groups, title=f"Scores: {name}", label="score"))
    for i, scores in enumerate(sets, start=1):
        suffix = "" if len(sets) == 1 else f" ({scores.scorer}, {i})"
        for title, column in (("All", None), ("By prompt", "prompts"), ("By category", "categories")):
            rows = _tables(scores, column)
            if rows:
                more = f", best {MAX_ROWS} of {len(rows)}" if len(rows) > MAX_ROWS else ""
                parts.append(draw_table(HEADER, [_cells(row) for row in rows[:MAX_ROWS]], title=title + suffix + more))
        order = scores.order()
        for title, places in (("Best", order), ("Worst", order[::-1])):
            if shown:
                cells = _cells_of(scores, places, read, shown)
                parts.append(contact_sheet(cells, title=title + suffix))
    return stack_pictures(parts)


def _cells_of(
    scores: Scores, places: Sequence[int], read: Callable[[Scores, int], np.ndarray | None], most: int
) -> Iterator[Cell]:
    count = 0
    for place in places:
        picture = read(scores, place)
        if picture is None:
            continue
        yield Cell(picture=picture, text=f"{scores.values[place]:.4g}", label=scores.labels[place])
        count += 1
        if count == most:
            return
