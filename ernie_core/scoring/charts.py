"""Charts, tables and contact sheets. Drawn with Pillow, returned as uint8 [H, W, 3]."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..errors import ErnieError
from ..lettering import INK, PAPER, TEXT_PX, fit, text_width, write, write_plate

_FAINT, _GRID = (120, 120, 128), (226, 226, 230)
_HEAD, _BAND = (236, 240, 248), (248, 249, 252)
_COLOURS = (
    *((38, 92, 196), (206, 84, 30), (34, 138, 84), (140, 62, 170)),
    *((186, 140, 16), (20, 140, 160), (200, 50, 100), (110, 110, 118)),
)
GREY = 7  # place in the palette
_TITLE_PX = 15
_NUMBER = re.compile(r"[-+]?[\d.,]*\d%?|-|n/a|nan", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of `draw_bars`."""

    label: str
    value: float
    low: float | None = None
    """Lower end of its interval; None = no interval is drawn."""
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a `contact_sheet`."""

    picture: np.ndarray
    """uint8 [H, W, 3]"""
    text: str
    """What is written on it: its number."""
    label: str = ""
    """What is written below it, such as its file name."""


def draw_histogram(
    groups: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    label: str = "",
    bins: int = 24,
    low: float | None = None,
    high: float | None = None,
    width: int = 900,
    height: int = 320,
) -> np.ndarray:
    """How often which values occur, per group in its colour; over each other when there are several.

    `low` and `high` are the ends of the axis (default: of the values); values beyond them are counted in the outermost
    bins. Values that are not finite are left out and their number is written.
    """
    kept = {name: np.asarray([v for v in values if math.isfinite(v)], float) for name, values in groups.items()}
    lost = sum(len(values) for values in groups.values()) - sum(map(len, kept.values()))
    chart = _Chart(width, height, title, lost=lost)
    everything = np.concatenate(list(kept.values())) if kept else np.empty(0)
    if not len(everything):
        return chart.empty()
    first = float(everything.min()) if low is None else low
    last = float(everything.max()) if high is None else high
    if last <= first:  # one value only: its bin lies in the middle
        first, last = first - 0.5, first + 0.5
    edges = np.linspace(first, last, bins + 1)
    counts = {name: np.histogram(np.clip(v, first, last), edges)[0] for name, v in kept.items()}
    top = max(1, *(int(c.max()) for c in counts.values()))
    chart.axes(first, last, 0.0, top * 1.08, x_label=label, y_label="images", whole_y=True)
    for i, count in enumerate(counts.values()):  # one layer per group: where they overlap, both are seen
        shade = Image.new("RGBA", (width, height), (0, 0, 0, 0))
        pen = ImageDraw.Draw(shade)
        for j, n in enumerate(count):
            if n:
                (left, upper), (right, lower) = chart.at(edges[j], n), chart.at(edges[j + 1], 0.0)
                pen.rectangle((left + 1, upper, right - 1, lower), fill=(*_colour(i), 255 if len(counts) == 1 else 140))
        chart.picture.paste(shade, (0, 0), shade)
    chart.legend(list(counts))
    return chart.pixels()


def draw_scatter(
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    line: bool = True,
    width: int = 900,
    height: int = 560,
) -> np.ndarray:
    """Points, per group in its colour. `line` draws the least-squares line through all points.

    Points that are not finite are left out and their number is written.
    """
    kept = {
        name: np.asarray([p for p in points if all(map(math.isfinite, p))], float).reshape(-1, 2)
        for name, points in groups.items()
    }
    lost = sum(len(points) for points in groups.values()) - sum(map(len, kept.values()))
    chart = _Chart(width, height, title, lost=lost)
    everything = np.concatenate(list(kept.values())) if kept else np.empty((0, 2))
    if not len(everything):
        return chart.empty()
    (x0, y0), (x1, y1) = everything.min(0), everything.max(0)
    ends = []
    if line and x1 > x0:
        slope, start = np.polyfit(everything[:, 0], everything[:, 1], 1)
        ends = [(x, slope * x + start) for x in (x0, x1)]
        y0, y1 = min(y0, *(y for _, y in ends)), max(y1, *(y for _, y in ends))
    chart.axes(*_with_margin(x0, x1), *_with_margin(y0, y1), x_label=x_label, y_label=y_label)
    dot = 3 if len(everything) < 400 else 2
    shade = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(shade)
    for i, points in enumerate(kept.values()):
        for point in points:
            x, y = chart.at(*point)
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=(*_colour(i), 190))
    chart.picture.paste(shade, (0, 0), shade)
    if ends:
        chart.pen.line([chart.at(*end) for end in ends], fill=INK, width=2)
    chart.legend(list(kept))
    return chart.pixels()


def draw_bars(
    bars: Sequence[Bar], *, title: str = "", label: str = "", zero: bool = False, width: int = 900
) -> np.ndarray:
    """Horizontal bars from 0, below each other, with their numbers and, as a line across the end, their intervals.

    `zero`: the axis has 0 in its middle, for values that are differences.
    """
    rows = [bar for bar in bars if math.isfinite(bar.value)]
    chart = _Chart(width, 84 + 26 * max(1, len(rows)), title, lost=len(bars) - len(rows))
    if not rows:
        return chart.empty()
    ends = [v for bar in rows for v in (bar.value, bar.low, bar.high) if v is not None and math.isfinite(v)]
    if zero:
        reach = max(map(abs, ends)) or 1.0
        low, high = -1.1 * reach, 1.1 * reach
    else:
        low, high = min(0.0, *ends), max(0.0, *ends)
        low, high = (low, high + 0.1 * (high - low)) if high > low else (0.0, 1.0)
    chart.left = 24 + min(width // 3, max(text_width(bar.label, TEXT_PX) for bar in rows))
    chart.right -= 64
    chart.axes(low, high, 0.0, float(len(rows)), x_label=label, grid_y=False)
    for i, bar in enumerate(rows):
        middle = chart.at(0.0, len(rows) - i - 0.5)[1]
        a, b = sorted((chart.at(0.0, 0.0)[0], chart.at(bar.value, 0.0)[0]))
        chart.pen.rectangle((a, middle - 8, max(b, a + 1), middle + 8), fill=_colour(0 if bar.value >= 0 else 1))
        if bar.low is not None and bar.high is not None and math.isfinite(bar.low) and math.isfinite(bar.high):
            x0, x1 = chart.at(bar.low, 0.0)[0], chart.at(bar.high, 0.0)[0]
            chart.pen.line((x0, middle, x1, middle), fill=INK, width=2)
            for x in (x0, x1):
                chart.pen.line((x, middle - 4, x, middle + 4), fill=INK, width=2)
        write(chart.pen, (12, middle - 8), fit(bar.label, chart.left - 20, TEXT_PX))
        write(chart.pen, (chart.right + 10, middle - 8), f"{bar.value:.4g}")
    x = chart.at(0.0, 0.0)[0]
    chart.pen.line((x, chart.top, x, chart.bottom), fill=_FAINT)
    return chart.pixels()


def draw_intervals(
    rows: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]],
    names: Sequence[str],
    *,
    title: str = "",
    label: str = "",
    width: int = 900,
) -> np.ndarray:
    """Shares in 0..1 with their intervals, a row per label and in it a dot and a line per name, in its colour.

    An entry is (value, low, high), None where there is nothing; ends that are not finite are not drawn.
    """
    row_px = 12 + 13 * max(1, len(names))
    chart = _Chart(width, 100 + row_px * max(1, len(rows)), title)
    if not rows:
        return chart.empty()
    chart.left = 24 + min(width // 3, max(text_width(name, TEXT_PX) for name, _ in rows))
    chart.axes(0.0, 1.0, 0.0, float(len(rows)), x_label=label, grid_y=False)
    for i, (name, values) in enumerate(rows):
        top = chart.at(0.0, len(rows) - i)[1]
        if i % 2:
            chart.pen.line((chart.left, top, chart.right, top), fill=_GRID)
        write(chart.pen, (12, top + row_px / 2 - 8), fit(name, chart.left - 20, TEXT_PX))
        for j, entry in enumerate(values):
            if entry is None or not math.isfinite(entry[0]):
                continue
            y = top + row_px * (j + 1) / (len(names) + 1)
            ends = [chart.at(end, 0.0)[0] for end in entry[1:] if math.isfinite(end)]
            if len(ends) == 2:
                chart.pen.line((ends[0], y, ends[1], y), fill=_colour(j), width=3)
            x = chart.at(entry[0], 0.0)[0]
            chart.pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=_colour(j), outline=PAPER)
    chart.legend(names)
    return chart.pixels()


def draw_shares(
    rows: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    *,
    colours: Sequence[int] | None = None,
    title: str = "",
    label: str = "",
    width: int = 900,
) -> np.ndarray:
    """Shares that add up to 1 as one bar per row, a piece per name in its colour, with its per cent where it fits.

    `colours`: places in the charts' palette, `GREY` for what is between; None = in their order.
    """
    hues = list(range(len(names))) if colours is None else list(colours)
    row_px = 26
    chart = _Chart(width, 100 + row_px * max(1, len(rows)), title)
    if not rows:
        return chart.empty()
    chart.left = 24 + min(width // 3, max(text_width(name, TEXT_PX) for name, _ in rows))
    chart.axes(0.0, 1.0, 0.0, float(len(rows)), x_label=label, grid_y=False)
    for i, (name, shares) in enumerate(rows):
        middle = chart.at(0.0, len(rows) - i - 0.5)[1]
        write(chart.pen, (12, middle - 8), fit(name, chart.left - 20, TEXT_PX))
        start = 0.0
        for j, share in enumerate(shares):
            a, b = chart.at(start, 0.0)[0], chart.at(start + share, 0.0)[0]
            start += share
            if b - a < 1:
                continue
            chart.pen.rectangle((a, middle - 9, b, middle + 9), fill=_colour(hues[j]), outline=PAPER)
            text = f"{100 * share:.0f} %"
            if text_width(text, TEXT_PX) + 8 < b - a:
                write(chart.pen, ((a + b - text_width(text, TEXT_PX)) / 2, middle - 8), text, fill=PAPER)
    chart.legend(names, hues)
    return chart.pixels()


def draw_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> np.ndarray:
    """A table; cells that are numbers stand on the right of their column.

    Raises:
        ErnieError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ErnieError(f"a row of the table has {len(row)} cells and its header {len(header)}: {list(row)}.")
    widest = 320
    columns = [
        min(widest, max(text_width(c, TEXT_PX) for c in column)) + 24 for column in zip(header, *rows, strict=True)
    ]
    row_px, top = 24, 34 if title else 6
    width = max(sum(columns) + 12, text_width(title, _TITLE_PX) + 20)
    picture = Image.new("RGB", (width, top + row_px * (len(rows) + 1) + 8), PAPER)
    pen = ImageDraw.Draw(picture)
    write(pen, (8, 8), title, _TITLE_PX)
    for i, row in enumerate((header, *rows)):
        y = top + i * row_px
        if i == 0 or i % 2 == 0:
            pen.rectangle((6, y, 6 + sum(columns), y + row_px - 1), fill=_HEAD if i == 0 else _BAND)
        x = 6
        for j, cell in enumerate(row):
            text = fit(cell, columns[j] - 16, TEXT_PX)
            numeric = all(_NUMBER.fullmatch(r[j].strip().split(" ")[0]) for r in rows if r[j].strip())
            shift = columns[j] - 12 - text_width(text, TEXT_PX) if numeric and rows else 12
            write(pen, (x + shift, y + 4), text)
            x += columns[j]
    pen.line((6, top + row_px - 1, 6 + sum(columns), top + row_px - 1), fill=_FAINT)
    return np.asarray(picture)


def draw_number(picture: np.ndarray, text: str) -> np.ndarray:
    """A copy of a picture uint8 [H, W, 3] with `text` on a dark plate in its upper left corner."""
    image = Image.fromarray(picture)
    write_plate(ImageDraw.Draw(image), (0, 0), text, max(10, min(48, min(image.size) // 9)), image.width)
    return np.array(image)


def contact_sheet(cells: Iterable[Cell], *, title: str = "", columns: int = 6, cell_px: int = 160) -> np.ndarray:
    """Pictures in rows, in the order given, each fitted into a square of `cell_px` with its number on it.

    Reads `cells` one by one and keeps only the small pictures, so that they may come from a generator.
    """
    small = []
    for cell in cells:
        image = Image.fromarray(cell.picture)
        image.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
        if max(image.size) < cell_px:  # thumbnail() only makes smaller
            scale = cell_px / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        small.append((image, cell.text, cell.label))
    top, gap = 34 if title else 8, 8
    label_px = 20 if any(label for *_, label in small) else 0
    across = max(1, min(columns, len(small)))
    width = max(gap + across * (cell_px + gap), text_width(title, _TITLE_PX) + 20)
    down = math.ceil(len(small) / across)
    sheet = Image.new("RGB", (width, top + max(1, down) * (cell_px + label_px + gap)), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (8, 8), title, _TITLE_PX)
    if not small:
        write(pen, (8, top), "no pictures", fill=_FAINT)
    for i, (image, text, label) in enumerate(small):
        x = gap + i % across * (cell_px + gap)
        y = top + i // across * (cell_px + label_px + gap)
        corner = (x + (cell_px - image.width) // 2, y + (cell_px - image.height) // 2)
        sheet.paste(image, corner)
        write_plate(pen, corner, text, max(10, cell_px // 11), cell_px)
        write(pen, (x, y + cell_px + 2), fit(label, cell_px, TEXT_PX))
    return np.asarray(sheet)


def stack_pictures(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures uint8 [H, W, 3] below each other, left-aligned on white."""
    width = max((p.shape[1] for p in pictures), default=1)
    height = sum(p.shape[0] for p in pictures) or 1
    sheet = np.full((height, width, 3), 255, np.uint8)
    y = 0
    for p in pictures:
        sheet[y : y + p.shape[0], : p.shape[1]] = p
        y += p.shape[0]
    return sheet


# --- drawing --------------------------------------------------------------------------------------------------


class _Chart:
    """A sheet with a title and a plane of data coordinates; `at` says where a value lies on it."""

    def __init__(self, width: int, height: int, title: str, *, lost: int = 0) -> None:
        self.picture = Image.new("RGB", (width, height), PAPER)
        self.pen = ImageDraw.Draw(self.picture)
        self.left, self.right, self.top, self.bottom = 68, width - 18, 52, height - 44
        write(self.pen, (12, 8), fit(title, width - 24, _TITLE_PX), _TITLE_PX)
        if lost:
            text = f"{lost} without a finite value left out"
            write(self.pen, (width - text_width(text, TEXT_PX) - 12, 10), text, fill=_COLOURS[1])

    def axes(
        self,
        x0: float,
        x1: float,
        y0: float,
        y1: float,
        *,
        x_label: str = "",
        y_label: str = "",
        grid_y: bool = True,
        whole_y: bool = False,
    ) -> None:
        self.x0, self.x1, self.y0, self.y1 = map(float, (x0, x1, y0, y1))
        for value in _ticks(self.x0, self.x1, 7):
            x, _ = self.at(value, self.y0)
            self.pen.line((x, self.top, x, self.bottom), fill=_GRID)
            text = f"{value:.6g}"
            write(self.pen, (x - text_width(text, TEXT_PX) / 2, self.bottom + 5), text)
        for value in _ticks(self.y0, self.y1, 6) if grid_y else ():
            if whole_y and value != round(value):
                continue
            _, y = self.at(self.x0, value)
            self.pen.line((self.left, y, self.right, y), fill=_GRID)
            text = f"{value:.6g}"
            write(self.pen, (self.left - 8 - text_width(text, TEXT_PX), y - 8), text)
        self.pen.line((self.left, self.bottom, self.right, self.bottom), fill=_FAINT)
        middle = (self.left + self.right - text_width(x_label, TEXT_PX)) / 2
        write(self.pen, (middle, self.bottom + 23), x_label, fill=_FAINT)
        write(self.pen, (12, self.top - 20), y_label, fill=_FAINT)

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def legend(self, names: Sequence[str], colours: Sequence[int] | None = None) -> None:
        if len(names) < 2:
            return
        hues = range(len(names)) if colours is None else colours
        shown = [(fit(name, 140, TEXT_PX), i) for i, name in zip(hues, names[:6], strict=False)]
        if len(names) > len(shown):
            shown.append((f"and {len(names) - len(shown)} more", -1))
        x = self.right - sum(text_width(text, TEXT_PX) + 28 for text, _ in shown)
        for text, i in shown:
            if i >= 0:
                self.pen.rectangle((x, self.top - 17, x + 10, self.top - 7), fill=_colour(i))
            write(self.pen, (x + 14, self.top - 20), text)
            x += text_width(text, TEXT_PX) + 28

    def empty(self) -> np.ndarray:
        write(self.pen, (self.left, self.picture.height / 2), "no values", fill=_FAINT)
        return self.pixels()

    def pixels(self) -> np.ndarray:
        return np.asarray(self.picture)


def _colour(index: int) -> tuple[int, int, int]:
    return _COLOURS[index % len(_COLOURS)]


def _with_margin(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.5  # equal values lie in the middle
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers, at most about `most`, between two ends."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step + 0.0 for i in range(first, last + 1)]
