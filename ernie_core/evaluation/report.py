"""What verdicts say, by category: Markdown and CSV for reading on, JSON with the rows behind each number, a picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ErnieError
from ..scoring.charts import GREY, draw_intervals, draw_shares, draw_table, stack_pictures
from ..scoring.metrics import Interval
from ..scoring.tables import csv_table, finite, markdown_table
from ..training.items import write_whole
from .rates import ALL, FEW_PROMPTS, Passes, Rate, Wins, pass_rates, win_rates
from .verdicts import OF_TWO, Outcome, Verdict, Verdicts

EVERYTHING = "(all)"
HOW = (
    "In brackets: 95 % intervals. Of shares: Wilson's at the effective number of verdicts, since pictures of one "
    "prompt are alike; of differences and mean scores: bootstrap over prompts. n counts prompts; categories with fewer "
    f"than {FEW_PROMPTS} are marked few: look at their intervals, not at their numbers."
)
RATE_COLUMNS = (
    *("judge", "criterion", "category", "setting", "other_setting", "outcome", "count", "verdicts", "share"),
    *("low", "high", "prompts", "effective", "few"),
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rates of a number of verdicts; made with `make_report`."""

    name: str
    verdicts: tuple[Verdict, ...]
    passes: tuple[Passes, ...]
    wins: tuple[Wins, ...]
    notes: tuple[str, ...]

    def to_markdown(self) -> str:
        """The whole report as text."""
        parts = [f"# Evaluation: {self.name}", HOW]
        for (judge, criterion), rows in _sections(self.passes).items():
            parts.append(f"## {criterion}, pass or fail, by {judge}")
            parts.append(markdown_table(*_pass_table(rows)))
        for (judge, criterion, *settings), rows in _pair_sections(self.wins).items():
            parts.append(f"## {criterion}, {settings[0]} against {settings[1]}, by {judge}")
            parts.append(markdown_table(*_win_table(rows)))
        if self.notes:
            parts += ["## Notes", "\n".join(f"- {note}" for note in self.notes)]
        return "\n\n".join(parts) + "\n"

    def rates_csv(self) -> str:
        """A row per share; its verdicts are the rows of `verdicts_csv` with the same first five columns."""
        return csv_table(RATE_COLUMNS, [[row[name] for name in RATE_COLUMNS] for row in _iter_rates(self)])

    def verdicts_csv(self) -> str:
        """A row per verdict, numbered as in the JSON."""
        names = [f.name for f in fields(Verdict)]
        rows = [(i, *(getattr(verdict, name) for name in names)) for i, verdict in enumerate(self.verdicts)]
        return csv_table(("id", *names), rows)

    def to_json(self) -> str:
        """Every number with the ids of the verdicts that it is made of."""
        differences = [
            {**_key(p), "settings": list(p.rates), "second_minus_first": asdict(p.difference)}
            for p in self.passes
            if p.difference is not None
        ]
        means = [{**_key(p), "setting": s, "mean": asdict(m)} for p in self.passes for s, m in p.means.items()]
        signs = [{**_key(w), "settings": w.settings, "sign_test_p": w.p_value} for w in self.wins]
        told = {
            "name": self.name,
            "level": 0.95,
            "rates": list(_iter_rates(self)),
            "differences": differences,
            "mean_scores": means,
            "sign_tests": signs,
            "notes": self.notes,
        }
        return json.dumps(finite(told), ensure_ascii=False, indent=1) + "\n"

    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3]: charts and tables below each other."""
        parts: list[np.ndarray] = []
        for (judge, criterion), rows in _sections(self.passes).items():
            title = f"{criterion}: pass rate by {judge}"
            names = list(rows[0].rates)
            values = [(_label(p), [_ends(p.rates.get(name)) for name in names]) for p in rows]
            label = "share that passes, with 95 % interval"
            parts.append(draw_intervals(values, names, title=title, label=label))
            parts.append(draw_table(*_pass_table(rows), title=title))
        for (judge, criterion, *settings), rows in _pair_sections(self.wins).items():
            title = f"{criterion}: {settings[0]} against {settings[1]} by {judge}"
            names = _outcomes(rows[0])
            shares = [(_label(w), [w.rates[o].interval.value for o in OF_TWO]) for w in rows]
            parts.append(draw_shares(shares, names, colours=(0, GREY, 1), title=title, label="share of pairs"))
            parts.append(draw_table(*_win_table(rows), title=title))
        return stack_pictures(parts)


def make_report(name: str, verdicts: Verdicts) -> Report:
    """All rates of these verdicts.

    Raises:
        ErnieError: there are none.
    """
    if not verdicts.verdicts:
        detail = f" ({'; '.join(verdicts.notes[:5])})" if verdicts.notes else ""
        raise ErnieError(f"there are no verdicts to report on{detail}: answer questions, or let a scorer judge.")
    return Report(
        name=name,
        verdicts=verdicts.verdicts,
        passes=tuple(pass_rates(verdicts.verdicts)),
        wins=tuple(win_rates(verdicts.verdicts)),
        notes=verdicts.notes,
    )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md, rates.csv, verdicts.csv, report.json and report.png, each whole or not at all; their paths.

    Raises:
        ErnieError: the disk is full or the folder cannot be written to.
    """
    data = io.BytesIO()
    Image.fromarray(report.picture()).save(data, "PNG")
    files = {
        "verdicts.csv": report.verdicts_csv().encode("utf-8-sig"),  # with BOM: Excel reads it as UTF-8
        "rates.csv": report.rates_csv().encode("utf-8-sig"),
        "report.json": report.to_json().encode(),
        "report.md": report.to_markdown().encode(),
        "report.png": data.getvalue(),
    }
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def read_verdicts(path: Path) -> Verdicts:
    """Verdicts of a verdicts.csv, such as `write_report` leaves; other columns than a verdict's are passed by.

    Raises:
        ErnieError: it cannot be read, lacks a column, or a row is no verdict (which, why).
    """
    from ..training.items import read_table

    found = []
    for label, row in read_table(path):
        if isinstance(row, ErnieError):
            raise ErnieError(f"{label}: {row}")
        try:
            values: dict[str, Any] = {f.name: row[f.name] for f in fields(Verdict) if f.name in row}
            values |= {name: int(values[name]) for name in ("number", "seed")}
            values |= {name: float(values[name]) for name in ("value", "other_value") if name in values}
            found.append(Verdict(**{"category": "", **values}))
        except (KeyError, TypeError, ValueError) as e:
            raise ErnieError(f"{label} of {path.name} is no verdict ({type(e).__name__}: {e}).") from e
    return Verdicts(verdicts=tuple(found))


# --- rows ---------------------------------------------------------------------------------------------------------


def _sections(passes: Sequence[Passes]) -> dict[tuple[str, str], list[Passes]]:
    groups: dict[tuple[str, str], list[Passes]] = {}
    for p in passes:
        groups.setdefault((p.judge, p.criterion), []).append(p)
    return groups


def _pair_sections(wins: Sequence[Wins]) -> dict[tuple[str, str, str, str], list[Wins]]:
    groups: dict[tuple[str, str, str, str], list[Wins]] = {}
    for w in wins:
        groups.setdefault((w.judge, w.criterion, *w.settings), []).append(w)
    return groups


def _pass_table(rows: Sequence[Passes]) -> tuple[list[str], list[list[str]]]:
    settings = list(rows[0].rates)
    compares = rows[0].difference is not None
    means = list(rows[0].means)
    header = ["category", "n", *settings]
    header += [f"{settings[1]} minus {settings[0]}"] if compares else []
    header += [f"mean score {s}" for s in means]
    table = []
    for p in rows:
        cells = [_label(p), _prompts(p.rates), *(_show_rate(p.rates.get(s)) for s in settings)]
        cells += [_show(p.difference, signed=True)] if compares else []
        table.append([*cells, *(_show_mean(p.means.get(s)) for s in means)])
    return header, table


def _win_table(rows: Sequence[Wins]) -> tuple[list[str], list[list[str]]]:
    header = ["category", "n", *_outcomes(rows[0]), "sign test p"]
    table = [
        [_label(w), _prompts(w.rates), *(_show_rate(w.rates[o]) for o in OF_TWO), f"{w.p_value:.2g}"] for w in rows
    ]
    return header, table


def _outcomes(wins: Wins) -> list[str]:
    told: dict[Outcome, str] = {
        "first": f"{wins.settings[0]} better",
        "same": "no difference",
        "second": f"{wins.settings[1]} better",
    }
    return [told[outcome] for outcome in OF_TWO]


def _label(row: Passes | Wins) -> str:
    return EVERYTHING if row.category == ALL else row.category


def _prompts(rates: Mapping[Any, Rate]) -> str:
    count = max(rate.prompts for rate in rates.values())
    return f"{count}, few" if count < FEW_PROMPTS else str(count)


def _show_rate(rate: Rate | None) -> str:
    return "-" if rate is None else f"{_show(rate.interval)} {rate.count}/{rate.total}"


def _show(interval: Interval | None, *, signed: bool = False) -> str:
    """In per cent."""
    if interval is None or not math.isfinite(interval.value):
        return "-"
    sign = "+" if signed else ""
    ends = f" [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"
    return f"{100 * interval.value:{sign}.1f} %" + (ends if math.isfinite(interval.low) else "")


def _show_mean(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    ends = f" [{interval.low:.4g}, {interval.high:.4g}]" if math.isfinite(interval.low) else ""
    return f"{interval.value:.4g}{ends}"


def _ends(rate: Rate | None) -> tuple[float, float, float] | None:
    return None if rate is None else (rate.interval.value, rate.interval.low, rate.interval.high)


def _key(row: Passes | Wins) -> dict[str, str]:
    return {"judge": row.judge, "criterion": row.criterion, "category": _label(row)}


def _iter_rates(report: Report) -> list[dict[str, Any]]:
    """Every share as one flat row, with the ids of its verdicts."""
    rows = [(_key(p), s, "", "pass", rate) for p in report.passes for s, rate in p.rates.items()]
    rows += [(_key(w), *w.settings, outcome, w.rates[outcome]) for w in report.wins for outcome in OF_TWO]
    return [
        {
            **key,
            "setting": setting,
            "other_setting": other,
            "outcome": outcome,
            "count": rate.count,
            "verdicts": rate.total,
            "share": rate.interval.value,
            "low": rate.interval.low,
            "high": rate.interval.high,
            "prompts": rate.prompts,
            "effective": rate.effective,
            "few": rate.prompts < FEW_PROMPTS,
            "ids": list(rate.ids),
        }
        for key, setting, other, outcome, rate in rows
    ]
