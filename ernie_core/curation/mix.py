"""What a sampling plan makes of a pool, before anything is trained: a table, warnings and a picture.

Head: the largest categories that together hold half of the pictures. Tail: the smallest that together hold a tenth.
Effective categories: exp of the entropy of the shares, how many equally frequent ones would be as diverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..errors import ErnieError
from ..lettering import INK, PAPER, TEXT_PX, fit, write
from .sampling import ARTICLE, PRESETS, Pool, Sampling, category_shares, inside_shares

OFTEN = 10.0
"""Draws of one picture per epoch from which on the report warns that it is learnt by heart."""
_HEAD, _TAIL = 0.5, 0.1
_LISTED, _DRAWN = 200, 40  # categories in the table and in the picture: as many of the largest as of the smallest
_NAMED = 5
_POOL, _DRAWS, _FAINT = (176, 180, 190), (38, 92, 196), (226, 226, 230)
_WIDTH, _ROW, _LEFT, _RIGHT = 900, 30, 250, 650


@dataclass(frozen=True, kw_only=True)
class CategoryMix:
    """One category before and after."""

    name: str
    count: int
    """Its pictures."""
    quality: float | None
    """As the sampling counts it; None where the manifest has no scores."""
    pool: float
    """Its share of the pictures."""
    drawn: float
    """Its share of the draws."""
    each: float
    """Expected draws of one of its pictures per epoch, their mean."""
    most: float
    """Expected draws of its most drawn picture per epoch."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a plan makes of a pool; an epoch is as many draws as the pool has pictures."""

    sampling: Sampling
    categories: tuple[CategoryMix, ...]
    """Largest first."""
    seen: float
    """Share of the pictures that an epoch is expected to show at least once."""
    left_out: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Pictures that can be drawn."""
        return sum(c.count for c in self.categories)

    def end(self, *, tail: bool) -> tuple[CategoryMix, ...]:
        """The head, or the tail, which shares no category with it and is empty only where there is one category."""
        head = 1 + next(i for i, held in enumerate(np.cumsum([c.pool for c in self.categories])) if held >= _HEAD)
        if not tail:
            return self.categories[:head]
        held, start = 0.0, len(self.categories)
        while start > head and (held == 0 or held + self.categories[start - 1].pool <= _TAIL):
            start -= 1
            held += self.categories[start].pool
        return self.categories[start:]

    def effective(self, *, drawn: bool) -> float:
        """Effective categories of the draws, or of the pool."""
        shares = (c.drawn if drawn else c.pool for c in self.categories)
        return math.exp(-sum(p * math.log(p) for p in shares if p > 0))

    def warnings(self) -> list[str]:
        """What the plan does that people may not want."""
        found = [f"{count} rows {why} are not drawn" for why, count in self.left_out]
        if self.sampling == PRESETS[ARTICLE]:
            found.append(
                "count x mean score is an article's reading, not the report's: it lets frequent categories dominate, "
                "and the report's aim is the opposite"
            )
        often = sorted((c for c in self.categories if c.most > OFTEN), key=lambda c: -c.most)
        if often:
            names = ", ".join(f"{c.name} ({c.most:.0f} times)" for c in often[:_NAMED])
            found.append(
                f"in {_count(len(often))} a picture comes more than {OFTEN:g} times per epoch and is learnt by "
                f"heart: {names}. Raise alpha or the temperature, or find more pictures"
            )
        rare = sum(c.drawn * self.total < 1 for c in self.categories)
        if rare:
            found.append(f"less than one picture per epoch is expected of {_count(rare)}")
        return found

    def report(self) -> str:
        """All of it in Markdown."""
        lines = ["# Sampling plan", "", f"{self.total} pictures in {len(self.categories)} categories.", ""]
        lines.append(f"{describe(self.sampling)}.")
        lines.append(
            f"An epoch is {self.total} draws; {self.seen:.1%} of the pictures are expected to be seen in it. Effective "
            f"categories: {self.effective(drawn=False):.1f} in the pool, {self.effective(drawn=True):.1f} in the draws."
        )
        lines += [
            "",
            "| | categories | of the pictures | of the draws | of a picture per epoch |",
            "|---|" + 4 * "---|",
        ]
        for label, part in (("head", self.end(tail=False)), ("tail", self.end(tail=True))):
            pool, drawn = sum(c.pool for c in part), sum(c.drawn for c in part)
            if part:
                lines.append(f"| {label} | {len(part)} | {pool:.1%} | {drawn:.1%} | {drawn / pool:.3g} draws |")
        lines += ["", "## Warnings", "", *([f"- {w}" for w in self.warnings()] or ["none"])]
        lines += ["", "## Categories", ""]
        lines.append(
            "| category | pictures | quality | of the pictures | of the draws | draws of a picture | at most |"
        )
        lines.append("|---|" + 6 * "---|")
        for c in _both_ends(self.categories, _LISTED):
            if c is None:
                lines.append(f"| ({len(self.categories) - _LISTED} more) | | | | | | |")
                continue
            quality = "-" if c.quality is None else f"{c.quality:.3g}"
            lines.append(
                f"| {c.name} | {c.count} | {quality} | {c.pool:.2%} | {c.drawn:.2%} | {c.each:.3g} | {c.most:.3g} |"
            )
        return "\n".join(lines)


def _count(categories: int) -> str:
    return "1 category" if categories == 1 else f"{categories} categories"


def _both_ends(categories: tuple[CategoryMix, ...], most: int) -> list[CategoryMix | None]:
    """All categories, or `most` of them from both ends with None between."""
    if len(categories) <= most:
        return list(categories)
    return [*categories[: most // 2], None, *categories[-(most // 2) :]]


def describe(sampling: Sampling) -> str:
    """The formula in words: `p(category) ~ n^0.5 q^1 ...`."""
    scale = "percentile in the pool" if sampling.scale == "percentile" else "as it is"
    quality = "mean score" if sampling.quality == "mean" else "score that its best tenth reaches"
    between = f"n^{sampling.alpha:g}" + (f" q^{sampling.gamma:g} (q = {quality}, {scale})" if sampling.gamma else "")
    if sampling.temperature == math.inf:
        inside = "all pictures of a category alike"
    elif sampling.temperature == 0:
        inside = "of a category only the best"
    else:
        by = f"score, {scale}" if sampling.within == "score" else "rank in the category, 1 the best"
        inside = f"inside a category exp({by} / {sampling.temperature:g})"
    return f"p(category) ~ {between or '1'}; {inside}"


def plan_mix(pool: Pool, sampling: Sampling) -> Mix:
    """What `sampling` makes of `pool`, category by category.

    Raises:
        ErnieError: the sampling needs scores that the pool lacks, or raw qualities above 0 (see `category_shares`).
    """
    shares = category_shares(pool, sampling)
    quality = pool.quality(sampling.quality, sampling.scale).tolist() if pool.is_scored else [None] * len(pool.names)
    found: list[CategoryMix] = []
    seen = 0.0
    for number, (name, count, share) in enumerate(zip(pool.names, pool.counts.tolist(), shares.tolist(), strict=True)):
        expected = len(pool) * share * inside_shares(pool, sampling, number)
        seen += float(-np.expm1(-expected).sum())  # Poisson: at least once
        found.append(
            CategoryMix(
                name=name,
                count=count,
                quality=quality[number],
                pool=count / len(pool),
                drawn=share,
                each=len(pool) * share / count,
                most=float(expected.max()),
            )
        )
    return Mix(
        sampling=sampling,
        categories=tuple(sorted(found, key=lambda c: (-c.count, c.name))),
        seen=seen / len(pool),
        left_out=pool.left_out,
    )


def draw_mix(mix: Mix) -> np.ndarray:
    """Two bars per category, its share of the pictures and of the draws: uint8 [H, 900, 3]."""
    rows = _both_ends(mix.categories, _DRAWN)
    sheet = Image.new("RGB", (_WIDTH, 70 + _ROW * len(rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (10, 8), fit(describe(mix.sampling), _WIDTH - 20, 14), 14)
    for x, colour, text in ((10, _POOL, "of the pictures"), (140, _DRAWS, "of the draws")):
        pen.rectangle((x, 36, x + 12, 48), fill=colour)
        write(pen, (x + 18, 34), text)
    write(pen, (_RIGHT + 20, 34), "pictures -> draws, draws of a picture")
    widest = max(max(c.pool, c.drawn) for c in mix.categories)
    for number, c in enumerate(rows):
        y = 60 + _ROW * number
        pen.line((10, y - 2, _WIDTH - 10, y - 2), fill=_FAINT)
        if c is None:
            write(pen, (10, y + 6), f"... {len(mix.categories) - _DRAWN} more ...")
            continue
        write(pen, (10, y + 6), fit(f"{c.name} ({c.count})", _LEFT - 20, TEXT_PX))
        for top, share, colour in ((y + 2, c.pool, _POOL), (y + 13, c.drawn, _DRAWS)):
            pen.rectangle((_LEFT, top, _LEFT + max(1, (_RIGHT - _LEFT) * share / widest), top + 9), fill=colour)
        write(pen, (_RIGHT + 20, y + 6), f"{c.pool:.1%} -> {c.drawn:.1%}, {c.each:.3g} x", fill=INK)
    return np.asarray(sheet)


def named_sampling(name: str) -> Sampling:
    """A preset by its name.

    Raises:
        ErnieError: there is none of that name.
    """
    if name not in PRESETS:
        raise ErnieError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}.")
    return PRESETS[name]
