"""What a picture shows, measured without any network: shape, colour, size and place of its one object.

Used to say in numbers how well the tiny model follows its prompts. The steps, each robust to noise and blur:

1. The background is a straight line in y per colour channel, fitted to the left and right border (so
   it covers plain backgrounds and vertical gradients).
2. Pixels far from it in RGB, after a slight blur, form the mask; its largest 4-connected component is the
   object. A second pass puts the mask's edge half way between the object's colour and the background.
3. Colour is the palette entry nearest to the median inside; place is the grid place nearest to the centre of
   the bounding box; size is its longer side against the half-way point of the two sizes.
4. Shape is the drawn reference mask with the best overlap (intersection over union) after both are scaled to
   the same square. A ring's hole, a star's notches and a triangle's corners all cost overlap, so this one
   feature is enough; the overlap is reported as `shape_overlap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageFilter

from .scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, STYLES, Scene, background_ends, shape_mask

MIN_DISTANCE = 40.0
"""RGB distance (0..441) from the background at which a pixel belongs to an object (drawn: 90 or more)."""
AREA_RANGE = (0.012, 0.35)
"""Share of the picture that an object may cover; drawn ones cover 0.02 to 0.18."""
MIN_OVERLAP = 0.5
"""Below this no reference shape is meant: pure noise reached 0.41, blurred objects kept 0.64."""
_GRID = 32

Name = TypeVar("Name")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a picture shows; every field is None where there was no object to measure it on."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None
    background: str
    style: str
    diameter: float | None = None
    """Longer side of the object's bounding box as a fraction of the picture's shorter side."""
    shape_overlap: float = 0.0
    """Overlap with the best reference shape, 0..1; drawn scenes reach about 0.9."""

    @property
    def found(self) -> bool:
        """Whether the picture shows an object at all."""
        return self.shape is not None


def measure(
    image: np.ndarray, *, shapes: Sequence[str] = SHAPES, colors: Mapping[str, tuple[int, int, int]] = COLORS
) -> Measured:
    """Measure a picture [H, W, 3], uint8 or float in 0..1; `shapes` and `colors` are those its object may have.

    A picture without one clear object (nothing stands out from the border, nearly everything does, or what
    does resembles no shape) gives a `Measured` whose `found` is False; its background is named all the same.
    """
    picture = _to_uint8(image)
    height, width = picture.shape[:2]
    smooth = np.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(0.5)), dtype=np.float32)
    top, bottom = _border_line(smooth)
    backdrop, style = _nearest(np.concatenate([top, bottom]), _backdrops())
    behind = (top + (bottom - top) * np.linspace(0, 1, height, dtype=np.float32)[:, None])[:, None]
    difference = smooth - behind

    component = _largest_component(np.einsum("hwc,hwc->hw", difference, difference) > MIN_DISTANCE**2)
    if not AREA_RANGE[0] < component.mean() < AREA_RANGE[1]:
        return Measured(background=backdrop, style=style)
    ink = _inner_median(smooth, component)
    # Share of ink in each pixel, 0 = background .. 1 = object, along the line between the two colours.
    towards = ink - behind
    length = np.maximum(np.einsum("hwc,hwc->hw", towards, towards), 1.0)
    share = np.einsum("hwc,hwc->hw", difference, np.broadcast_to(towards, difference.shape)) / length
    component = _largest_component(share > 0.5)
    if not AREA_RANGE[0] < component.mean() < AREA_RANGE[1]:
        return Measured(background=backdrop, style=style)

    rows, columns = np.flatnonzero(component.any(axis=1)), np.flatnonzero(component.any(axis=0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    center = np.array([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height])
    diameter = max(y1 - y0, x1 - x0) / min(height, width)
    overlaps = _shape_overlaps(component[y0:y1, x0:x1], shapes)
    shape = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[shape] < MIN_OVERLAP:
        return Measured(background=backdrop, style=style)
    return Measured(
        shape=shape,
        color=_nearest(_inner_median(smooth, component), colors),
        size="large" if diameter > sum(SIZES.values()) / 2 else "small",
        place=_nearest(center, PLACES),
        background=backdrop,
        style=style,
        diameter=float(diameter),
        shape_overlap=overlaps[shape],
    )


def matches(scene: Scene, measured: Measured) -> dict[str, bool]:
    """For each fact whether the picture shows what the scene says; nothing found matches no object fact."""
    return {
        "shape": measured.shape == scene.shape,
        "color": measured.color == scene.color,
        "size": measured.size == scene.size,
        "place": measured.place == scene.place,
        "background": measured.background == scene.background,
        "style": measured.style == scene.style,
    }


def _to_uint8(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must have the shape [H, W, 3], got {list(image.shape)}")
    if image.dtype == np.uint8:
        return image
    return np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)


def _border_line(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour [3] of the background at the top and at the bottom, from a line fitted to each row's border.

    Rows whose border is far from the line (an object that touches the side) are left out of the next fit.
    """
    height, width = picture.shape[:2]
    margin = max(2, round(0.03 * min(height, width)))
    sides = np.concatenate([picture[:, :margin], picture[:, -margin:]], axis=1)
    per_row = np.median(sides, axis=1)
    depth = np.linspace(0, 1, height)
    design = np.stack([1 - depth, depth], axis=1)
    keep = np.ones(height, dtype=bool)
    ends = np.zeros((2, 3))
    for _ in range(3):
        ends = np.linalg.lstsq(design[keep], per_row[keep], rcond=None)[0].astype(np.float32)
        error = np.linalg.norm(per_row - design @ ends, axis=1)
        keep = error <= max(12.0, 2 * float(np.median(error)))
    return ends[0], ends[1]


@cache
def _backdrops() -> dict[tuple[str, str], np.ndarray]:
    """Top and bottom colour, as one vector [6], of every (background, style)."""
    names = product(BACKGROUNDS, STYLES)
    return {(background, style): np.concatenate(background_ends(background, style)) for background, style in names}


def _nearest(point: np.ndarray, table: Mapping[Name, ArrayLike]) -> Name:
    distances = np.linalg.norm(np.array(list(table.values())) - point, axis=1)
    return list(table)[int(distances.argmin())]


def _inner_median(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Median colour inside the mask after taking one pixel off its edge (or all of it if nothing is left)."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return np.median(picture[inner if inner.any() else mask], axis=0)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of a mask [H, W]; all False for an empty one.

    Works on the runs of each row: runs of neighbouring rows that overlap are joined in a union-find forest.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    result = np.zeros_like(mask)
    if len(rows) == 0:
        return result
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first_run = np.searchsorted(rows, np.arange(mask.shape[0] + 1)).tolist()
    starts_list, ends_list = starts.tolist(), ends.tolist()
    for row in range(int(rows[0]) + 1, int(rows[-1]) + 1):
        above, below = first_run[row - 1], first_run[row]
        stop_above, stop_below = first_run[row], first_run[row + 1]
        while above < stop_above and below < stop_below:
            if starts_list[above] < ends_list[below] and starts_list[below] < ends_list[above]:
                parent[root(above)] = root(below)
            if ends_list[above] < ends_list[below]:
                above += 1
            else:
                below += 1
    roots = np.array([root(run) for run in range(len(rows))])
    areas = np.bincount(roots, weights=ends - starts)
    for run in np.flatnonzero(roots == np.argmax(areas)):
        result[rows[run], starts[run] : ends[run]] = True
    return result


def _shape_overlaps(mask: np.ndarray, shapes: Sequence[str]) -> dict[str, float]:
    found = _on_grid(mask)
    overlaps = {}
    for shape in shapes:
        reference = _reference(shape)
        overlaps[shape] = float(np.minimum(found, reference).sum() / np.maximum(found, reference).sum())
    return overlaps


def _on_grid(mask: np.ndarray) -> np.ndarray:
    """A mask cut to its bounding box, centred in a square and scaled to [_GRID, _GRID] with soft edges."""
    height, width = mask.shape
    side = max(height, width)
    square = np.zeros((side, side), dtype=np.float32)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = mask
    return np.asarray(Image.fromarray(square).resize((_GRID, _GRID), Image.Resampling.BOX))


@cache
def _reference(shape: str) -> np.ndarray:
    mask = shape_mask(shape, diameter=96, center=(64, 64), size_px=128) > 0.5
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return _on_grid(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
