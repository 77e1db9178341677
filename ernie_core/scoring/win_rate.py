"""Before against after: the same prompts and seeds painted by two models, side by side, and how often the second wins.

"after" is the one that wins or loses: a win rate of 1 says that its picture was better every time. Pictures meet by
their prompt and seed, never by their place in a folder; a pair whose settings differ is an error, not a comparison. A
tie counts as half a win.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..batch import read_entries
from ..errors import ErnieError
from ..training.pictures import SUFFIXES
from .charts import Cell, contact_sheet, draw_table, stack_pictures
from .metrics import FEW_IMAGES, Interval, ratio_interval, wilson
from .pairs import read_prompt, read_settings
from .scorer import Scorer, to_rgb
from .tables import csv_table

Better = Literal["after", "before", "tie"]
_POINTS: dict[Better, float] = {"after": 1.0, "tie": 0.5, "before": 0.0}
_SAME_SETTINGS = ("negative", "width", "height", "steps", "cfg", "shift", "sampler", "scheduler")
HEADER = ("prompt", "comparisons", "after wins", "ties", "before wins", "win rate")
MAX_ROWS = 40  # of the table on the sheet; the files have all


@dataclass(frozen=True, kw_only=True)
class Match:
    """The same prompt and seed, painted before and after."""

    prompt: str
    seed: int | None
    """None where the pictures do not say it."""
    before: Path | Tensor
    """A file, or a picture [H, W, 3] in [0, 1]."""
    after: Path | Tensor


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one judge said once about a picture of each side."""

    prompt: str
    before: str
    """File, or "" for a picture of the graph."""
    after: str
    better: Better
    seed: int | None = None
    """None where the two have different ones."""
    before_value: float | None = None
    after_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class PromptRate:
    """One prompt's part of a `WinRate`."""

    prompt: str
    wins: int
    ties: int
    losses: int

    @property
    def count(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def points(self) -> float:
        return self.wins + self.ties / 2

    @property
    def rate(self) -> float:
        return self.points / self.count


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often after beats before, in the eyes of one judge."""

    judge: str
    comparisons: tuple[Comparison, ...]
    prompts: tuple[PromptRate, ...]
    """In the order of their first comparison."""
    wins: int
    ties: int
    losses: int
    rate: Interval
    """(wins + ties / 2) / comparisons, with Wilson's 95 % interval: as if every comparison stood for itself."""
    by_prompt: Interval
    """The same rate with the BCa bootstrap's interval over prompts: pictures of one prompt are alike, so that this one
    is the honest one where prompts have several; no ends for a single prompt."""
    p_value: float
    """Of the two-sided exact sign test on wins and losses: how likely so uneven a split is when neither is better."""


# --- which picture meets which --------------------------------------------------------------------------------


def match_folders(before: Path, after: Path) -> tuple[list[Match], list[str]]:
    """Pictures of two folders that are of the same prompt and seed, and a line per thing that is worth knowing.

    Prompts and settings come from `manifest.jsonl`, where a run left one, else from the pictures' metadata; pictures
    that say no seed meet by their file name.

    Raises:
        ErnieError: both are the same folder, a folder holds no pictures or two of one prompt and seed, nothing fits
            together, or the two sides were painted with different settings.
    """
    if before.resolve() == after.resolve():
        raise ErnieError(f"before and after are the same folder ({before}): give the folders of two runs.")
    first, second = _read_run(before, "before"), _read_run(after, "after")
    both = [key for key in first if key in second]
    if not both:
        raise ErnieError(
            f"no picture of {before} has the prompt and seed of one in {after}: paint the same prompts and seeds "
            "again, for example with the folder of the first run as source of Batch from Prompts."
        )
    problems = [
        f"{len(own) - len(both)} of {len(own)} pictures of {side} have no partner and are left out"
        for side, own in (("before", first), ("after", second))
        if len(own) > len(both)
    ]
    matches = []
    for key in both:
        (path_b, told_b), (path_a, told_a) = first[key], second[key]
        for name in _SAME_SETTINGS:
            if name in told_b and name in told_a and told_b[name] != told_a[name]:
                raise ErnieError(
                    f"before and after must be painted with the same settings; {name} of {path_b.name} and "
                    f"{path_a.name} is {told_b[name]} before and {told_a[name]} after. Paint one side again."
                )
        matches.append(Match(prompt=key[0], seed=told_b.get("seed"), before=path_b, after=path_a))
    made = [read_settings(Path(side)).get("made_with", "") for side in (matches[0].before, matches[0].after)]  # type: ignore[arg-type]
    if made[0] and not made[1]:
        problems.append(
            f"before says that it was made with {made[0]}, after says nothing of the kind: are the two exchanged?"
        )
    return matches, problems


def _read_run(folder: Path, side: str) -> dict[tuple[str, Any], tuple[Path, dict[str, Any]]]:
    """(prompt, seed) -> (file, settings)."""
    if not folder.is_dir():
        raise ErnieError(f"{side} must be a folder of pictures, got {str(folder)!r}.")
    known = {entry["file"]: entry for entry in read_entries(folder)}
    files = [folder / name for name in known] or sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    found: dict[tuple[str, Any], tuple[Path, dict[str, Any]]] = {}
    for path in files:
        told = known.get(path.name) or {"prompt": read_prompt(path), **read_settings(path)}
        prompt, seed = str(told.get("prompt", "")).strip(), told.get("seed")
        key = (prompt, path.stem if seed is None else seed)
        if key in found:
            raise ErnieError(
                f"{side} holds two pictures of one prompt and seed ({found[key][0].name} and {path.name} in {folder}): "
                "give every run a folder of its own."
            )
        found[key] = (path, told)
    if not found:
        raise ErnieError(f"{side}: {folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return found


def match_pictures(before: Sequence[Tensor], after: Sequence[Tensor], prompts: Sequence[str] = ()) -> list[Match]:
    """Pictures of the graph [H, W, 3], the same prompts and seeds in the same order on both sides.

    `prompts`: one per picture, one for all, or none.

    Raises:
        ErnieError: their numbers or sizes differ.
    """
    if len(before) != len(after) or not before:
        raise ErnieError(
            f"before and after must be the same prompts in the same order, got {len(before)} and {len(after)} pictures."
        )
    if len(prompts) not in (0, 1, len(before)):
        raise ErnieError(f"{len(before)} pictures need 1 or {len(before)} prompts, one per line; got {len(prompts)}.")
    texts = list(prompts) * len(before) if len(prompts) == 1 else list(prompts) or [""] * len(before)
    for place, (one, other) in enumerate(zip(before, after, strict=True), start=1):
        if one.shape != other.shape:
            sizes = " and ".join(f"{p.shape[1]} x {p.shape[0]}" for p in (one, other))
            raise ErnieError(f"before and after must be of one size; picture {place} is {sizes}.")
    sides = zip(texts, before, after, strict=True)
    return [Match(prompt=text.strip(), seed=None, before=b, after=a) for text, b, a in sides]


# --- who is better --------------------------------------------------------------------------------------------


def compare_by_scorer(
    matches: Sequence[Match], scorer: Scorer, *, batch_size: int, on_scored: Callable[[int], None] | None = None
) -> list[Comparison]:
    """A comparison per match: the better score wins, equal ones tie. Both sides go through one call.

    Raises:
        ErnieError: the scorer reads prompts and one is missing, or a picture cannot be read.
    """
    if scorer.reads_prompt and not all(match.prompt for match in matches):
        raise ErnieError(f"{scorer.name} reads the prompt, and not every picture says its own: give the prompts.")
    pictures = (to_rgb(picture) for match in matches for picture in (match.before, match.after))
    texts = (match.prompt for match in matches for _ in range(2)) if scorer.reads_prompt else None
    values = scorer.score(pictures, texts, batch_size=batch_size, on_scored=on_scored)
    found = []
    for match, before, after in zip(matches, values[::2], values[1::2], strict=True):
        if not (math.isfinite(before) and math.isfinite(after)):
            raise ErnieError(f"{scorer.name} gave no number ({before}, {after}) for {match.prompt!r}.")
        gain = after - before if scorer.higher_is_better else before - after
        found.append(
            Comparison(
                prompt=match.prompt,
                seed=match.seed,
                before=_name(match.before),
                after=_name(match.after),
                better="after" if gain > 0 else "before" if gain < 0 else "tie",
                before_value=before,
                after_value=after,
            )
        )
    return found


def compare_by_judgments(matches: Sequence[Match], rows: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """The judgments of a tournament in which one picture of before met one of after, of the same prompt.

    Args:
        matches: of files.
        rows: from `judgments.judgment_rows`: left, right, answer, kind. Those that were skipped, asked a second time or
            between two pictures of one side are left out.
    """
    sides: dict[str, tuple[str, Match]] = {}
    for match in matches:
        for side, picture in (("before", match.before), ("after", match.after)):
            if isinstance(picture, Path):
                sides[_name(picture)] = (side, match)
    found = []
    for row in rows:
        left, right = (sides.get(_name(Path(row[side]))) for side in ("left", "right"))
        if row["kind"] != "pair" or row["answer"] not in ("left", "right", "tie") or left is None or right is None:
            continue
        if left[0] == right[0] or left[1].prompt != right[1].prompt:
            continue
        places = {left[0]: (left[1], "left"), right[0]: (right[1], "right")}
        (old, _), (new, new_place) = places["before"], places["after"]
        won: Better = "tie" if row["answer"] == "tie" else "after" if row["answer"] == new_place else "before"
        seed = old.seed if old is new else None
        found.append(
            Comparison(prompt=old.prompt, seed=seed, before=_name(old.before), after=_name(new.after), better=won)
        )
    return found


def _name(picture: Path | Tensor) -> str:
    return str(picture.resolve()) if isinstance(picture, Path) else ""


# --- how often ------------------------------------------------------------------------------------------------


def win_rate(judge: str, comparisons: Sequence[Comparison]) -> WinRate:
    """The rate at which after wins, with its intervals.

    Raises:
        ErnieError: there are no comparisons.
    """
    if not comparisons:
        raise ErnieError(f"{judge} has compared nothing of before with anything of after.")
    groups: dict[str, list[Better]] = {}
    for one in comparisons:
        groups.setdefault(one.prompt, []).append(one.better)
    prompts = tuple(
        PromptRate(prompt=p, wins=b.count("after"), ties=b.count("tie"), losses=b.count("before"))
        for p, b in groups.items()
    )
    wins, ties, losses = (sum(getattr(p, name) for p in prompts) for name in ("wins", "ties", "losses"))
    return WinRate(
        judge=judge,
        comparisons=tuple(comparisons),
        prompts=prompts,
        wins=wins,
        ties=ties,
        losses=losses,
        rate=wilson(wins + ties / 2, len(comparisons)),
        by_prompt=ratio_interval([p.points for p in prompts], [p.count for p in prompts]),
        p_value=sign_test(wins, losses),
    )


def sign_test(wins: int, losses: int) -> float:
    """The two-sided exact p-value of a split under a fair coin; 1 where nothing was decided."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


# --- what is written and drawn --------------------------------------------------------------------------------


def summarise(rates: Sequence[WinRate], *, matches: int) -> str:
    """A few lines per judge."""
    lines = [f"{matches} pictures before and after"]
    for r in rates:
        lines.append(
            f"{r.judge}: after wins {_percent(r.rate)} of {len(r.comparisons)} comparisons "
            f"({r.wins} won, {r.ties} ties, {r.losses} lost; sign test p {r.p_value:.2g})"
        )
        if math.isfinite(r.by_prompt.low):
            few = f"; {len(r.prompts)} prompts are few, do not rely on it" if len(r.prompts) < FEW_IMAGES else ""
            lines.append(f"  by prompt ({len(r.prompts)}): {_percent(r.by_prompt)}{few}")
    return "\n".join(lines)


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def prompt_table(rates: Sequence[WinRate]) -> str:
    """CSV: a row per judge and prompt."""
    rows = [(r.judge, p.prompt, p.count, p.wins, p.ties, p.losses, f"{p.rate:.6f}") for r in rates for p in r.prompts]
    return csv_table(("judge", *HEADER), rows)


def comparison_table(rates: Sequence[WinRate]) -> str:
    """CSV: a row per comparison, which says on which side each file is and which one was better."""
    columns = ("prompt", "seed", "before", "after", "before_value", "after_value", "better")
    rows = [(r.judge, *(getattr(c, name) for name in columns)) for r in rates for c in r.comparisons]
    return csv_table(("judge", *columns), rows)


def to_json(rates: Sequence[WinRate], *, before: str, after: str, matches: int, problems: Sequence[str]) -> str:
    """Everything but the single comparisons, which are in `comparison_table`; null where there is no number."""

    def ends(interval: Interval) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in (interval.low, interval.high)]

    judges = [
        {
            "judge": r.judge,
            "comparisons": len(r.comparisons),
            "wins": r.wins,
            "ties": r.ties,
            "losses": r.losses,
            "rate": r.rate.value,
            "wilson_95": ends(r.rate),
            "by_prompt_95": ends(r.by_prompt),
            "sign_test_p": r.p_value,
            "prompts": [
                {"prompt": p.prompt, "wins": p.wins, "ties": p.ties, "losses": p.losses, "rate": p.rate}
                for p in r.prompts
            ],
        }
        for r in rates
    ]
    told = {"before": before, "after": after, "matches": matches, "judges": judges, "problems": list(problems)}
    return json.dumps(told, ensure_ascii=False, indent=1) + "\n"


def draw_sheet(
    matches: Sequence[Match],
    rates: Sequence[WinRate],
    *,
    shown: int = 12,
    cell_px: int = 256,
) -> np.ndarray:
    """uint8 [H, W, 3]: the rates, a table by prompt, and matches side by side: before left, after right, so labelled.

    Shown are `shown` matches evenly spread over all of them, not chosen by who won; a star is at the better score.
    """
    parts = []
    for r in rates:
        rows = [_row("all", r), *(_row(p.prompt or "(no prompt)", p) for p in r.prompts[:MAX_ROWS])]
        title = f"After against before, {r.judge}: {_percent(r.rate)} (by prompt {_percent(r.by_prompt)})"
        parts.append(draw_table(HEADER, rows, title=title))
    count = min(shown, len(matches))
    places = [i * len(matches) // count for i in range(count)]
    values = {(c.before, c.after): c for r in rates for c in r.comparisons if c.before_value is not None}
    cells = []
    for number, place in enumerate(places):
        match = matches[place]
        found = values.get((_name(match.before), _name(match.after)))
        if isinstance(match.before, Path):
            scored = found
        else:  # pictures of the graph have no names: their comparisons stand in the order of the matches
            scored = next((r.comparisons[place] for r in rates if len(r.comparisons) == len(matches)), None)
        seed = "" if match.seed is None else f"seed {match.seed}: "
        for side, picture in (("before", match.before), ("after", match.after)):
            value = None if scored is None else getattr(scored, f"{side}_value")
            told = "" if value is None else f" {value:.4g}"
            won = " *" if scored is not None and scored.better == side else ""
            label = f"{number + 1} {side}, {seed}{match.prompt}"
            cells.append(Cell(picture=to_rgb(picture), text=f"{side}{told}{won}", label=label))
    if cells:
        parts.append(contact_sheet(cells, title="Before (left) and after (right)", columns=4, cell_px=cell_px))
    return stack_pictures(parts)


def _row(name: str, r: WinRate | PromptRate) -> list[str]:
    if isinstance(r, WinRate):
        return [name, str(len(r.comparisons)), str(r.wins), str(r.ties), str(r.losses), f"{r.rate.value:.3f}"]
    return [name, str(r.count), str(r.wins), str(r.ties), str(r.losses), f"{r.rate:.3f}"]
