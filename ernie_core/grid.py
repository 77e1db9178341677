"""Grids: one picture per combination of up to three settings, on labelled sheets.

An axis is a setting and its values, read from text. Every cell becomes a `Row`, so a grid is a batch: single files,
resumable, nothing made twice. Cells are made in the order that changes models, LoRAs and prompts least.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .batch import Row, check_row
from .config import SAMPLERS
from .errors import ErnieError
from .lettering import PAPER, text_width, wrap, write

NONE = "none"
MAX_CELLS = 10_000
MAX_SHEET_PX = 8192  # longest side of a sheet: 8192 x 8192 are 200 MB as bytes and 800 MB as the host's floats
CONNECTED = "connected"  # the checkpoint axis's word for the model that is connected
_GAP = 6


@dataclass(frozen=True, kw_only=True)
class Offers:
    """What the axes may choose from."""

    loras: Sequence[str] = ()
    checkpoints: Sequence[str] = ()
    variants: int = 1
    """How many models are connected."""
    has_enhancer: bool = False


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of an axis."""

    label: str
    change: Callable[[Row], Row]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting and the values it takes; the axis `none` has one value that changes nothing."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a grid."""

    place: tuple[int, int, int]
    """(x, y, z): numbers of the values."""
    row: Row


# --- axes ------------------------------------------------------------------------------------------------------------


def parse_axis(name: str, text: str, offers: Offers) -> Axis:
    """An axis from its text: values separated by commas, or one per line where one of them holds a comma.

    Numbers may be ranges: 1-5, 1-9:2 (in steps of 2). LoRAs are file:strength, several on one picture joined by " + ",
    and none. A prompt part's first value is the text to replace.

    Raises:
        ErnieError: no such axis, no value, one that comes twice, or one that cannot be read; says which and why.
    """
    if name not in AXES:
        raise ErnieError(f"an axis is one of {', '.join(AXES)}; got {name!r}.")
    if name == NONE:
        if text.strip():
            raise ErnieError(f"values are given for an axis that is {NONE}: {text.strip()[:40]!r}. Choose its setting.")
        return Axis(name=NONE, values=(Value(label="", change=lambda row: row),))
    entries = [e.strip() for e in (text.splitlines() if "\n" in text.strip() else text.split(",")) if e.strip()]
    if not entries:
        raise ErnieError(f"the axis {name} has no values; {_HINTS[name]}.")
    values = [value for value in AXES[name](entries, offers)]
    labels = [value.label for value in values]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ErnieError(f"the axis {name} has the value {twice!r} twice; take one away.")
    return Axis(name=name, values=tuple(values))


def _numbers(field: str, whole: bool) -> Callable[[Sequence[str], Offers], Iterator[Value]]:
    def read(entries: Sequence[str], _offers: Offers) -> Iterator[Value]:
        for entry in entries:
            for number in _expand_range(field, entry, whole):
                label = f"{field} {number}" if whole else f"{field} {number:.6g}"
                yield Value(label=label, change=_set(field, number))

    return read


def _expand_range(field: str, entry: str, whole: bool) -> list[float]:
    number = r"\d+" if whole else r"\d*\.?\d+"
    match = re.fullmatch(rf"({number})\s*(?:-\s*({number})\s*(?::\s*({number}))?)?", entry)
    if match is None:
        kind = "a whole number, or a range such as 1-5 or 0-100:25" if whole else "a number, or a range such as 1-3:0.5"
        raise ErnieError(f"the axis {field} has the value {entry!r}; each is {kind}.")
    cast = int if whole else float
    first = cast(match[1])
    if match[2] is None:
        return [first]
    last = cast(match[2])
    step = cast(match[3]) if match[3] else 1
    if last < first or step <= 0:
        raise ErnieError(f"the axis {field} has the range {entry!r}; a range runs upwards in steps above 0.")
    count = (last - first) // step + 1 if whole else math.floor((last - first) / step + 1e-9) + 1
    if count > MAX_CELLS:
        raise ErnieError(f"the axis {field} has {count:.0f} values in the range {entry!r}; at most {MAX_CELLS} fit.")
    return [first + i * step if whole else round(first + i * step, 6) for i in range(int(count))]


def _set(field: str, value: object) -> Callable[[Row], Row]:
    return lambda row: replace(row, **{field: value})


def _lora_values(entries: Sequence[str], offers: Offers) -> Iterator[Value]:
    for entry in entries:
        if entry.lower() == NONE:
            yield Value(label="no LoRA", change=lambda row: row)
            continue
        sets: list[list[tuple[str, float]]] = [[]]
        for part in re.split(r"\s+\+\s+", entry):
            name, strengths = _read_lora(part, offers)
            sets = [[*found, (name, strength)] for found in sets for strength in strengths]
        for found in sets:
            label = " + ".join(f"{Path(name).stem} {strength:g}" for name, strength in found)
            yield Value(label=label, change=_add_loras(tuple(found)))


def _add_loras(loras: tuple[tuple[str, float], ...]) -> Callable[[Row], Row]:
    return lambda row: replace(row, loras=(*row.loras, *loras))


def _read_lora(part: str, offers: Offers) -> tuple[str, list[float]]:
    """(file, its strengths) of file, file:0.8 or file:0-1:0.25."""
    if (file := _find(part, offers.loras)) is not None:  # a name may hold colons
        return file, [1.0]
    name, _, rest = part.partition(":")
    file = _find(name.strip(), offers.loras)
    if file is None:
        raise ErnieError(f"no LoRA {name.strip()!r} in models/loras{_nearest(name.strip(), offers.loras)}.")
    try:
        return file, [float(rest)]
    except ValueError:
        return file, _expand_range("LoRA", rest.strip(), whole=False)


def _find(name: str, files: Sequence[str]) -> str | None:
    """The file of that name, with or without its folder and ending; None unless exactly one fits best."""
    if name in files:
        return name
    for key in (lambda f: Path(f).with_suffix("").as_posix(), lambda f: Path(f).name, lambda f: Path(f).stem):
        found = [f for f in files if key(f) == name]
        if len(found) == 1:
            return found[0]
    return None


def _nearest(name: str, files: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, [Path(f).stem for f in files], n=3, cutoff=0.3)
    return f"; near it: {', '.join(near)}" if near else f"; there are {len(files)} files"


def _checkpoint_values(entries: Sequence[str], offers: Offers) -> Iterator[Value]:
    for entry in entries:
        if entry.lower() == CONNECTED:
            yield Value(label="connected model", change=_set("checkpoint", ""))
            continue
        file = _find(entry.rstrip("/") + "/", offers.checkpoints) or _find(entry, offers.checkpoints)
        if file is None:
            raise ErnieError(
                f"no model {entry!r} in models/diffusion_models{_nearest(entry, offers.checkpoints)}; "
                f"{CONNECTED} stands for the model that is connected."
            )
        yield Value(label=Path(file).stem, change=_set("checkpoint", file))


def _model_values(entries: Sequence[str], offers: Offers) -> Iterator[Value]:
    for entry in entries:
        number, _, label = entry.partition(":")
        if not number.strip().isdecimal() or not 1 <= int(number) <= offers.variants:
            raise ErnieError(
                f"the axis model has the value {entry!r}; each is the number of a connected model, 1 to "
                f"{offers.variants}, with a name after a colon if you like: 2:with experts."
            )
        yield Value(label=label.strip() or f"model {int(number)}", change=_set("variant", int(number)))


def _prompt_values(entries: Sequence[str], _offers: Offers) -> Iterator[Value]:
    part = entries[0]
    if len(entries) < 2:
        raise ErnieError(f"the axis prompt part has only the text to replace, {part!r}; {_HINTS['prompt part']}.")

    def put(new: str) -> Callable[[Row], Row]:
        def change(row: Row) -> Row:
            if part not in row.prompt:
                raise ErnieError(
                    f"the axis prompt part replaces {part!r}, which the prompt does not hold: {row.prompt!r}."
                )
            return replace(row, prompt=row.prompt.replace(part, new))

        return change

    for entry in entries:
        yield Value(label=entry, change=put(entry))


def _enhancer_values(entries: Sequence[str], offers: Offers) -> Iterator[Value]:
    words = {"off": False, "on": True}
    for entry in entries:
        if entry.lower() not in words:
            raise ErnieError(f"the axis enhancer has the value {entry!r}; each is off or on.")
        on = words[entry.lower()]
        if on and not offers.has_enhancer:
            raise ErnieError("the axis enhancer has the value on, but no enhancer is connected.")
        yield Value(label=f"enhancer {entry.lower()}", change=_set("enhance", on))


def _sampler_values(entries: Sequence[str], _offers: Offers) -> Iterator[Value]:
    for entry in entries:
        if entry not in SAMPLERS:
            raise ErnieError(f"the axis sampler has the value {entry!r}; each is one of {', '.join(SAMPLERS)}.")
        yield Value(label=entry, change=_set("sampler", entry))


def _no_values(_entries: Sequence[str], _offers: Offers) -> Iterator[Value]:
    return iter(())


AXES: dict[str, Callable[[Sequence[str], Offers], Iterator[Value]]] = {
    NONE: _no_values,
    "seed": _numbers("seed", whole=True),
    "steps": _numbers("steps", whole=True),
    "cfg": _numbers("cfg", whole=False),
    "shift": _numbers("shift", whole=False),
    "sampler": _sampler_values,
    "LoRA": _lora_values,
    "prompt part": _prompt_values,
    "enhancer": _enhancer_values,
    "checkpoint": _checkpoint_values,
    "model": _model_values,
}
_HINTS = {
    "seed": "write 1-4, or 7, 21, 300",
    "steps": "write 8, 20, 50",
    "cfg": "write 1, 2.5, 4, or 1-4:0.5",
    "shift": "write 1, 3, 4",
    "sampler": f"write {', '.join(SAMPLERS[:3])}",
    "LoRA": "write none, style:0.8, style:0-1:0.25, or style:1 + person:0.6",
    "prompt part": "write the part to replace first, then what to put in its place: red, blue, green",
    "enhancer": "write off, on",
    "checkpoint": f"write file names, one per line, or {CONNECTED}",
    "model": "write 1, 2, or 1:plain, 2:with experts",
}
_STACKING = ("LoRA", "prompt part")  # may stand on several axes


# --- cells -----------------------------------------------------------------------------------------------------------


def make_cells(row: Row, axes: Sequence[Axis]) -> list[Cell]:
    """Every combination of three axes' values on top of `row`, in the order that changes models least.

    Raises:
        ErnieError: two axes change the same setting, there are too many cells, or a cell cannot be made.
    """
    names = [axis.name for axis in axes if axis.name != NONE]
    twice = next((n for n in names if names.count(n) > 1 and n not in _STACKING), None)
    if twice is not None:
        raise ErnieError(f"two axes are {twice}: the second would overwrite the first. Choose another for one of them.")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_CELLS:
        raise ErnieError(f"the grid has {count} cells, at most {MAX_CELLS} are made; take values away.")
    cells = []
    x_axis, y_axis, z_axis = axes
    for z, z_value in enumerate(z_axis.values):
        for y, y_value in enumerate(y_axis.values):
            for x, x_value in enumerate(x_axis.values):
                label = ", ".join(v.label for v in (x_value, y_value, z_value) if v.label)
                cell = x_value.change(y_value.change(z_value.change(replace(row, label=label))))
                try:
                    check_row(cell)
                except ErnieError as e:
                    raise ErnieError(f"the cell {label}: {e}") from e
                cells.append(Cell(place=(x, y, z), row=cell))
    return sorted(cells, key=_cost_order)


def _cost_order(cell: Cell) -> tuple:
    """Dearest changes first: loading a checkpoint, patching LoRAs in, writing out and encoding a prompt."""
    row = cell.row
    return row.checkpoint, row.variant, row.loras, row.enhance, row.prompt, row.negative, cell.place[::-1]


def describe(row: Row, axes: Sequence[Axis]) -> tuple[str, str]:
    """(prompt, settings that are the same everywhere), for the head of the sheets."""
    varied = {axis.name for axis in axes}
    settings = [f"{n} {getattr(row, n):g}" for n in ("steps", "cfg", "shift") if n not in varied]
    settings += [] if "seed" in varied else [f"seed {row.seed}"]
    return row.prompt, ", ".join([*settings, f"{row.width} x {row.height}"])


# --- sheets ----------------------------------------------------------------------------------------------------------


def draw_sheets(
    axes: Sequence[Axis], read: Callable[[int, int, int], np.ndarray], *, head: Sequence[str], cell_px: int
) -> Iterator[np.ndarray]:
    """One labelled sheet per value of the third axis, uint8 [H, W, 3], all of one size.

    Args:
        axes: x runs to the right, y downwards, z from sheet to sheet.
        read: (x, y, z) -> picture uint8 [h, w, 3]; called cell by cell, so pictures may come from disk.
        head: lines above the grid; the sheet's own z label comes below them.
        cell_px: longest side of a cell; 0 = as large as the picture. Cells shrink so that a sheet keeps to
            `MAX_SHEET_PX`.
    """
    x_axis, y_axis, z_axis = axes
    across, down = len(x_axis.values), len(y_axis.values)
    height, width = read(0, 0, 0).shape[:2]
    room = MAX_SHEET_PX - 600  # labels and head
    scale = min(
        cell_px / max(height, width) if cell_px else 1.0,
        (room / across - _GAP) / width,
        (room / down - _GAP) / height,
    )
    cell_w, cell_h = max(8, round(width * scale)), max(8, round(height * scale))
    text_px = max(11, min(40, max(cell_w, cell_h) // 14))
    line = round(text_px * 1.35)
    left_px = min(280, max((text_width(v.label, text_px) for v in y_axis.values), default=0))
    left = left_px + 2 * _GAP if left_px else _GAP
    total_w = max(left + across * (cell_w + _GAP), 12 * text_px)
    columns = [wrap(v.label, cell_w, text_px, 3) for v in x_axis.values]
    heads = [part for text in head for part in wrap(text, total_w - 2 * _GAP, text_px, 3)]
    z_lines = max(len(wrap(v.label, total_w - 2 * _GAP, text_px, 2)) for v in z_axis.values)
    top = _GAP + line * (len(heads) + z_lines + max(len(c) for c in columns)) + _GAP
    total_h = top + down * (cell_h + _GAP)
    for z, z_value in enumerate(z_axis.values):
        sheet = Image.new("RGB", (total_w, total_h), PAPER)
        pen = ImageDraw.Draw(sheet)
        for i, text in enumerate([*heads, *wrap(z_value.label, total_w - 2 * _GAP, text_px, 2)]):
            write(pen, (_GAP, _GAP + i * line), text, text_px)
        for x, lines in enumerate(columns):
            for i, text in enumerate(lines):
                spot = left + x * (cell_w + _GAP) + max(0, (cell_w - text_width(text, text_px)) // 2)
                write(pen, (spot, top - _GAP - (len(lines) - i) * line), text, text_px)
        for y, y_value in enumerate(y_axis.values):
            corner = top + y * (cell_h + _GAP)
            lines = wrap(y_value.label, left_px, text_px, max(1, cell_h // line)) if left_px else []
            for i, text in enumerate(lines):
                write(pen, (_GAP, corner + (cell_h - len(lines) * line) // 2 + i * line), text, text_px)
            for x in range(across):
                picture = Image.fromarray(read(x, y, z))
                if picture.size != (cell_w, cell_h):
                    picture = picture.resize((cell_w, cell_h), Image.Resampling.LANCZOS)
                sheet.paste(picture, (left + x * (cell_w + _GAP), corner))
        yield np.asarray(sheet)
