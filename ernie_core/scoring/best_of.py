"""Best of N: many candidates per prompt, the best are kept. ERNIE-ViLG 2.0 reranks four pictures with CLIP.

Every candidate is on disk as soon as it is made, and scored with the next batch; never more than a batch of decoded
pictures is held. `candidates.jsonl` in the run's folder has a line per scored candidate: an interrupted run goes on
where it stopped, and a run again with more candidates makes only the new ones.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..batch import Row, append_line
from ..errors import ErnieError
from .scorer import DEFAULT_BATCH, Scorer, Scores, make_scores, to_rgb

logger = logging.getLogger(__name__)

Rejected = Literal["delete", "keep"]
REJECTED: tuple[Rejected, ...] = ("delete", "keep")
JOURNAL = "candidates.jsonl"
REJECTED_FOLDER = "rejected"


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """What a run left behind."""

    kept: Scores
    """Best first within each prompt, prompts in their order; their files are in the run's folder."""
    candidates: Scores
    """All, in the order of the seeds; rejected ones that were deleted have file ""."""
    made: int
    """Candidates that were made now; the others were there before."""


def run_best_of(
    prompts: Sequence[Sequence[Row]],
    folder: Path,
    scorer: Scorer,
    *,
    keep: int,
    encode: Callable[[str], Any],
    generate: Callable[[Row, Any, Any], Tensor],
    save: Callable[[Tensor, Path, Row], None],
    rejected: Rejected = "delete",
    batch_size: int = DEFAULT_BATCH,
    on_candidate: Callable[[int, int, Row], None] | None = None,
) -> BestOf:
    """Make and score all candidates that are not there yet, and sort out the best.

    Args:
        prompts: per prompt its candidates, rows that differ in the seed.
        folder: the run's own; `rejected/` in it takes the others when they are kept.
        keep: how many of each prompt.
        encode, generate, save: as for `ernie_core.batch.run_rows`.
        batch_size: candidates scored at once, and held at once.
        on_candidate: called with (number from 1, of how many, row) before each is made; may raise, and everything
            until then stays.

    Raises:
        ErnieError: keep is less than 1 or more than a prompt's candidates, or the disk is full.
    """
    fewest = min((len(rows) for rows in prompts), default=0)
    if not 1 <= keep <= fewest:
        raise ErnieError(f"keep must lie between 1 and the number of candidates ({fewest}), got {keep}.")
    if rejected not in REJECTED:
        raise ErnieError(f"rejected must be one of {', '.join(REJECTED)}, got {rejected!r}.")
    known = _read_journal(folder, scorer.name)
    waiting: list[tuple[Row, Any]] = []
    total = sum(len(rows) for rows in prompts)
    made = number = 0

    def flush() -> None:
        if not waiting:
            return
        values = scorer.score(
            [picture for _, picture in waiting], [row.prompt for row, _ in waiting], batch_size=batch_size
        )
        for (row, _), value in zip(waiting, values, strict=True):
            known[row.hash] = value
            _append_journal(folder, scorer.name, row, value)
        waiting.clear()

    for rows in prompts:
        encoded: tuple[Any, Any] | None = None
        for row in rows:
            number += 1
            path = _find(folder, row)
            if row.hash in known and (path is not None or rejected == "delete"):
                continue
            if path is None:
                if on_candidate is not None:
                    on_candidate(number, total, row)
                if encoded is None:
                    encoded = encode(row.prompt), None if row.cfg == 1 else encode(row.negative)
                image_HWC = generate(row, *encoded)
                save(image_HWC, folder / _file_name(row), row)
                made += 1
                picture = to_rgb(image_HWC)
            else:
                picture = to_rgb(path)
            if row.hash not in known:
                waiting.append((row, picture))
            if len(waiting) == batch_size:
                flush()
                _sort_out(rows, known, folder, keep, scorer, rejected)
        flush()
        _restore(_best(rows, known, keep, scorer), folder, encode, generate, save)
        _sort_out(rows, known, folder, keep, scorer, rejected)
    kept = [row for rows in prompts for row in _best(rows, known, keep, scorer)]
    everything = [row for rows in prompts for row in rows]
    return BestOf(
        kept=_scores(kept, known, folder, scorer), candidates=_scores(everything, known, folder, scorer), made=made
    )


def _file_name(row: Row) -> str:
    return f"{row.hash}_{row.seed}.png"


def _find(folder: Path, row: Row) -> Path | None:
    """Where a candidate lies, if it does."""
    places = (folder / _file_name(row), folder / REJECTED_FOLDER / _file_name(row))
    return next((path for path in places if path.is_file()), None)


def _best(rows: Sequence[Row], known: dict[str, float], keep: int, scorer: Scorer) -> list[Row]:
    """The scored ones to keep, best first; equals in the order of their seeds."""
    sign = -1 if scorer.higher_is_better else 1
    scored = [row for row in rows if row.hash in known]
    return sorted(scored, key=lambda row: sign * known[row.hash])[:keep]


def _sort_out(
    rows: Sequence[Row], known: dict[str, float], folder: Path, keep: int, scorer: Scorer, rejected: Rejected
) -> None:
    """Kept pictures lie in the folder, the other scored ones in `rejected/`, or nowhere."""
    best = {row.hash for row in _best(rows, known, keep, scorer)}
    for row in rows:
        path = _find(folder, row)
        if path is None or row.hash not in known:
            continue
        target = folder / _file_name(row) if row.hash in best else folder / REJECTED_FOLDER / _file_name(row)
        if row.hash not in best and rejected == "delete":
            path.unlink()
        elif path != target:
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def _restore(best: Sequence[Row], folder: Path, encode, generate, save) -> None:
    """Make again what is to be kept and was deleted: after a run that kept fewer."""
    for row in best:
        if _find(folder, row) is None:
            negative = None if row.cfg == 1 else encode(row.negative)
            save(generate(row, encode(row.prompt), negative), folder / _file_name(row), row)


def _scores(rows: Sequence[Row], known: dict[str, float], folder: Path, scorer: Scorer) -> Scores:
    files = [_find(folder, row) for row in rows]
    return make_scores(
        scorer,
        [known[row.hash] for row in rows],
        labels=[f"seed {row.seed}" for row in rows],
        prompts=[row.prompt for row in rows],
        files=["" if path is None else str(path.resolve()) for path in files],
    )


def _read_journal(folder: Path, scorer: str) -> dict[str, float]:
    """Row hash -> score by this scorer; a half-written last line is left out."""
    path = folder / JOURNAL
    known: dict[str, float] = {}
    if not path.is_file():
        return known
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            if entry["scorer"] == scorer:
                known[entry["hash"]] = float(entry["score"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a line could not be read and is left out: %.60s", path, line)
    return known


def _append_journal(folder: Path, scorer: str, row: Row, score: float) -> None:
    entry = {"hash": row.hash, "scorer": scorer, "score": score, **asdict(row)}
    append_line(folder / JOURNAL, entry)
