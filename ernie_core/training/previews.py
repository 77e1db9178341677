"""Pictures of a run: the sample grid and the loss curves. Drawn with Pillow, returned as uint8 [H, W, 3]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..model.dit import DiT
from ..model.vae import VAE
from ..pipeline import make_denoise
from ..sampling.guidance import with_cfg
from ..sampling.latents import latent_size, make_noise
from ..sampling.samplers import sample_euler

_PAPER, _INK, _GRID = (255, 255, 255), (40, 40, 46), (224, 224, 228)
_COLOURS = ((38, 92, 196), (206, 84, 30), (34, 138, 84), (140, 62, 170), (120, 120, 128))
_LABEL_PX = 18


def sample_pictures(
    model: DiT,
    vae: VAE,
    texts: Sequence[Tensor],
    empty_text: Tensor,
    *,
    seed: int,
    width: int,
    height: int,
    sigmas: Tensor,
    cfg: float,
) -> list[np.ndarray]:
    """One picture uint8 [height, width, 3] per text features [T, D], from the noises of seed, seed + 1, ...; painted
    on the grid `sigmas`.

    One at a time: a preview must not need more memory than training does.
    """
    rows, columns = latent_size(width, height)
    weight = vae.quant_conv.weight
    pictures = []
    for i, text in enumerate(texts):
        cond = make_denoise(model, [text], rows, columns)
        uncond = make_denoise(model, [empty_text], rows, columns) if cfg != 1 else None
        noise = make_noise([seed + i], model.config.in_channels, rows, columns)
        with torch.no_grad():
            x = sample_euler(with_cfg(cond, uncond, cfg), noise.to(next(model.parameters()).device), sigmas)
            image = vae.decode_fitting(x.to(weight.device, weight.dtype)).float()
        pixels = ((image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        pictures.append(pixels.cpu().numpy())
    return pictures


def picture_grid(rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str] = ()) -> np.ndarray:
    """Rows of pictures of one size, each row with its label above it and each column with its own at the top."""
    filled = {label: pictures for label, pictures in rows.items() if len(pictures)}
    high, wide = next(iter(filled.values()))[0].shape[:2]
    across = max(len(p) for p in filled.values())
    top = _LABEL_PX if columns else 0
    sheet = Image.new("RGB", (across * wide, top + len(filled) * (high + _LABEL_PX)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(columns):
        pen.text((i * wide + 4, 3), _fit(label, wide), fill=_INK)
    for row, (label, pictures) in enumerate(filled.items()):
        y = top + row * (high + _LABEL_PX)
        pen.text((4, y + 3), _fit(label, across * wide), fill=_INK)
        for i, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (i * wide, y + _LABEL_PX))
    return np.asarray(sheet)


def draw_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, width: int = 900, height: int = 260
) -> np.ndarray:
    """Line charts below each other: {title: {line name: [(step, value), ...]}}; what is not finite is left out."""
    sheet = Image.new("RGB", (width, height * max(1, len(panels))), _PAPER)
    for i, (title, lines) in enumerate(panels.items()):
        sheet.paste(Image.fromarray(_draw_panel(title, lines, width, height)), (0, i * height))
    return np.asarray(sheet)


def _draw_panel(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], width: int, height: int) -> np.ndarray:
    picture = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(picture)
    left, right, top, bottom = 64, width - 14, 34, height - 26
    pen.text((left, 8), title, fill=_INK, font=ImageFont.load_default(13))
    lines = {name: [(x, y) for x, y in points if np.isfinite(y)] for name, points in lines.items()}
    points = [p for line in lines.values() for p in line]
    if not points:
        pen.text((left, height // 2), "no values yet", fill=_INK)
        return np.asarray(picture)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = min(ys), max(ys)
    margin = 0.06 * (y1 - y0) or abs(y1) * 0.05 or 0.5  # a constant curve lies in the middle
    y0, y1 = y0 - margin, y1 + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for share in (0, 0.25, 0.5, 0.75, 1):
        value = y0 + share * (y1 - y0)
        _, y = place(x0, value)
        pen.line((left, y, right, y), fill=_GRID)
        pen.text((6, y - 6), f"{value:.4g}", fill=_INK)
        x, _ = place(x0 + share * (x1 - x0), y0)
        pen.text((x - 12, bottom + 6), f"{x0 + share * (x1 - x0):.0f}", fill=_INK)
    for i, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        if len(line) == 1:
            x, y = place(*line[0])
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        elif line:
            pen.line([place(*p) for p in line], fill=colour, width=2)
        pen.text((right - 150 * (len(lines) - i), 10), name, fill=colour)
    return np.asarray(picture)


def smooth(points: Sequence[tuple[float, float]], *, span: int = 50) -> list[tuple[float, float]]:
    """The running average over about `span` points, unbiased at the start."""
    total = weight = 0.0
    keep = 1 - 2 / (span + 1)
    out = []
    for x, y in points:
        if np.isfinite(y):
            total, weight = keep * total + y, keep * weight + 1
        if weight:
            out.append((x, total / weight))
    return out


_DISTIL = {
    "fake score: loss on new pictures and on seen ones (the gap is its lag)": {
        "new": "fake_fresh",
        "seen": "fake_seen",
    },
    "way to the teachers: cosine with the push (0 = astray), share that is pushed (falls)": {
        "dm_cos": "dm_cos",
        "dm_mag_ratio": "dm_mag_ratio",
    },
    "contrast of the student's pictures (must stay)": {"x_std": "x_std"},
    "terms": {"matching": "loss_dm", "guidance": "loss_ca", "anchor": "anchor", "gan": "gan", "critic": "critic"},
}


def curve_panels(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """What `draw_curves` draws of a run's progress: the loss, DPO's errors, the health of a distillation."""
    steps = [e for e in events if e.get("event") == "step"]

    def line(name: str) -> list[tuple[float, float]]:
        return [(e["step"], e[name]) for e in steps if isinstance(e.get(name), int | float)]

    loss = line("loss")
    panels = {"loss": {"every step": loss, "average": smooth(loss)}}
    bins = {k for e in steps for k in e if k.startswith("loss_sigma_")}
    bins = sorted(bins, key=lambda name: float(name.split("_")[2]))
    if bins:
        panels["loss by noise level (average)"] = {b.removeprefix("loss_"): smooth(line(b)) for b in bins}
    if any("win_excess" in e for e in steps):
        panels["error of the policy minus the reference's (winner must not rise above 0)"] = {
            "winner": smooth(line("win_excess")),
            "loser": smooth(line("lose_excess")),
        }
        panels["implicit accuracy"] = {"average": smooth(line("accuracy"))}
    if any("loss_fake" in e for e in steps):
        for title, names in _DISTIL.items():
            panels[title] = {label: smooth(line(name)) for label, name in names.items() if line(name)}
    panels["gradient norm"] = {"every step": line("grad_norm")}
    return panels


def _fit(text: str, width_px: int) -> str:
    """`text`, cut to what the default font draws in `width_px`."""
    most = max(4, width_px // 6 - 1)
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
