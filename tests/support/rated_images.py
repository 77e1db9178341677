"""Small sets of drawn pictures with human scores, as people keep them."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

CATEGORIES = ("photography", "illustration/anime", "film photography")


def draw_picture(number: int, size: int = 64) -> Image.Image:
    """Coloured stripes and boxes, with fine detail; another one for each number."""
    rng = np.random.default_rng(number)
    pixels = np.full((size, size, 3), rng.integers(40, 200, 3), np.uint8)
    for _ in range(14):
        x, y = rng.integers(0, size - 8, 2)
        w, h = rng.integers(4, size // 3, 2)
        pixels[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def draw_rated(folder: Path, count: int = 24, *, size: int = 64) -> list[dict]:
    """`count` pictures in `folder`/images and their rows: human score 1 to 10, the sharper the higher; one category is
    rated two lower than its sharpness, so that a scorer that sees sharpness over-rates it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        share = (i * 7 % count) / max(1, count - 1)
        category = CATEGORIES[i % len(CATEGORIES)]
        blurred = draw_picture(i, size).filter(ImageFilter.GaussianBlur(3 * (1 - share)))
        name = f"images/{i:03d}.png"
        blurred.save(folder / name)
        human = 1 + 9 * share - (2 if category == CATEGORIES[2] else 0)
        rows.append({"image": name, "gt_score": round(human, 3), "category": category, "prompt": f"boxes {i}"})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """As .json, .jsonl or .csv, by the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path
