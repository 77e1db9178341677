"""A table of teachers as a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..lettering import TEXT_PX, fit, write
from .teachers import TERMS, TeacherTable, Term

_COLOURS = (
    *((150, 154, 162), (38, 110, 200), (222, 120, 30), (40, 150, 90), (190, 60, 90), (130, 80, 190), (20, 150, 170)),
    *((170, 130, 40), (100, 100, 210), (120, 160, 40)),
)
_PAPER, _FRAME = (255, 255, 255), (210, 210, 214)


def draw_table(table: TeacherTable, *, width: int = 760) -> np.ndarray:
    """Who teaches what at which noise level, uint8 [H, width, 3]: a bar per tag and term, sigma 1 left and 0 right."""
    rows: list[tuple[str, Term]] = []
    for tag in (*table.tags, ""):
        name = tag or ("other prompts" if table.tags else "all prompts")
        answers = [[table.weights(tag=tag, sigma=i / 64, term=term) for i in range(65)] for term in TERMS]
        if answers[0] == answers[1]:
            rows.append((f"{name}|both", "DM"))
        else:
            rows.extend((name, term) for term in TERMS)
    names = table.used()
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    left, right, top, step, bar = 190, width - 16, 30, 30, 22
    sheet = Image.new("RGB", (width, top + step * len(rows) + 34 + 20 * len(names)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (left, 8), "noise level (sigma): 1 = noise, 0 = picture")
    pixels = right - left
    for row, (label, term) in enumerate(rows):
        y = top + row * step
        name, _, both = label.partition("|")
        tag = name if name in table.tags else ""
        write(pen, (8, y + 4), fit(f"{name}: {', '.join(TERMS) if both else term}", left - 16, TEXT_PX))
        for column in range(pixels):
            at = float(y)
            weights = table.weights(tag=tag, sigma=1 - column / (pixels - 1), term=term)
            for who in (name for name in names if name in weights):
                pen.line((left + column, round(at), left + column, round(at + weights[who] * bar)), fill=colours[who])
                at += weights[who] * bar
        pen.rectangle((left, y, right, y + bar), outline=_FRAME)
    bottom = top + step * len(rows)
    for tick in range(11):
        x = left + tick * pixels // 10
        pen.line((x, bottom - 4, x, bottom), fill=_FRAME)
        write(pen, (x - 9, bottom + 2), f"{1 - tick / 10:g}")
    for i, name in enumerate(names):
        y, teacher = bottom + 28 + 20 * i, table.teacher(name)
        pen.rectangle((left, y, left + 12, y + 12), fill=colours[name])
        lora = f"{teacher.lora or 'the base'}" + (f" x {teacher.strength:g}" if teacher.strength != 1 else "")
        about = f"{name} = {lora}" + ("" if teacher.cfg is None else f", cfg {teacher.cfg:g}")
        write(pen, (left + 20, y - 2), fit(about, right - left - 20, TEXT_PX))
    return np.asarray(sheet)
