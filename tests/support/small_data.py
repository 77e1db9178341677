"""Training data in miniature: folders of drawn pictures and of preference pairs, as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE_PX = 64


def draw(number: int, *, bright: bool = False) -> Image.Image:
    """A picture that no other number has: a square on a gradient."""
    rng = np.random.default_rng([number, bright])
    pixels = np.linspace(0, 120, SIDE_PX)[:, None, None] * rng.random(3) * np.ones((1, SIDE_PX, 1))
    top, left = rng.integers(4, SIDE_PX - 28, 2)
    pixels[top : top + 24, left : left + 24] = 255 if bright else rng.integers(60, 200, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def write_pictures(folder: Path, *, count: int, captions: bool = True) -> Path:
    """`count` pictures in `folder`, with a .txt caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        draw(i).save(folder / f"{i:02}.png")
        if captions:
            (folder / f"{i:02}.txt").write_text(f"a square, number {i}", encoding="utf-8")
    return folder


def write_pairs(folder: Path, *, count: int, captions: bool = True) -> Path:
    """`count` pairs in `folder` as pairs.jsonl: the bright square is preferred, each by another margin."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        names = {"chosen": f"{i:02}_bright.png", "rejected": f"{i:02}_dark.png"}
        for kind, name in names.items():
            draw(i, bright=kind == "chosen").save(folder / name)
        rows.append({"prompt": "a square" if captions else "", **names, "margin": 0.05 * (i + 1)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
