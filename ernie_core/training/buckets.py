"""Sizes and batches: what a picture is scaled and cropped to, and which samples belong to a step.

Sizes fit each picture freely: multiples of 16 under an area cap that keep the picture's aspect, so that almost nothing
is cropped; there is no list of aspect ratios. Pictures of one size form a bucket; a batch holds one bucket only.

Batches are a function of (seed, step): the epoch's samples of each bucket are ordered by a hash of (seed, stage, epoch,
sample), cut into batches of `batch_size * world_size`, and the batches, partial ones included, are ordered by a hash.
So any step can be asked for at once, W processes with batch size B see the samples of one process with batch size W B,
and no library's random stream decides what a seed means. BLAKE2b is used for all of it.

Where a sampling plan has set items' `draws`, there are no rounds through the data: every batch draws its bucket by the
buckets' sums of draws, then each of its places an item of the bucket by the items' draws. All batches are full, and the
probability of an item at any place of any step is its share of all draws.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..config import SIZE_MULTIPLE
from ..errors import ErnieError
from .captions import draw_uniform
from .items import Box, DatasetOptions, Item
from .pairs import Pair

Entry = Item | Pair
_REACH = 3  # steps of 16 px around the ideal size that are tried on each side
_AREA_WORTH = 0.25  # how much a lost share of the area cap counts against a lost share of the picture


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a resolution curriculum."""

    resolutions: tuple[int, ...] = ()
    """Square roots of the pixel areas; several = each picture at all of them. Empty: what the data says, else 1024."""
    until_step: int | None = None
    """The first step of the next stage; None = to the end."""

    def __post_init__(self) -> None:
        if any(r < SIZE_MULTIPLE for r in self.resolutions):
            raise ErnieError(f"a stage's resolutions must be at least {SIZE_MULTIPLE}, got {min(self.resolutions)}.")
        if self.until_step is not None and self.until_step < 1:
            raise ErnieError(f"a stage must last until step 1 or later, got {self.until_step}.")


DEFAULT_RESOLUTION = 1024
CURRICULUM = ((256, 0.5), (512, 0.3), (1024, 0.2))
"""(resolution, share of the steps). The ERNIE-Image report (section 2.1) names the sizes; the shares are ours."""


def curriculum(steps: int) -> tuple[Stage, ...]:
    """The stages of `CURRICULUM` for a run of `steps`; the last one has no end.

    Raises:
        ErnieError: fewer steps than stages.
    """
    if steps < len(CURRICULUM):
        raise ErnieError(f"a curriculum of {len(CURRICULUM)} resolutions needs as many steps at least, got {steps}.")
    ends = [max(i, int(steps * share + 1e-9)) for i, share in enumerate(accumulate(s for _, s in CURRICULUM), start=1)]
    stages = [Stage(resolutions=(side,), until_step=end) for (side, _), end in zip(CURRICULUM, ends, strict=True)]
    return *stages[:-1], Stage(resolutions=stages[-1].resolutions)


class Fit(NamedTuple):
    """How a picture of `source` pixels becomes one of `width` x `height`: cut to `box`, then scaled."""

    width: int
    height: int
    box: Box
    """Left, top, right, bottom in pixels of the upright source; not whole numbers in general."""
    source: tuple[int, int]

    @property
    def scale(self) -> float:
        """Target over source pixels; above 1 the picture is enlarged."""
        return self.width / (self.box[2] - self.box[0])

    @property
    def crop_loss(self) -> float:
        """The share of the picture that is cut off, in [0, 1)."""
        left, top, right, bottom = self.box
        return max(0.0, 1 - (right - left) * (bottom - top) / (self.source[0] * self.source[1]))


def bucket_size(
    width: int, height: int, area_px: float, *, max_aspect: float = 3.0, max_upscale: float = math.inf
) -> tuple[int, int]:
    """(width, height), multiples of 16, that a picture of that size is trained at.

    At most `area_px` pixels, side ratio at most `max_aspect`, and no enlargement beyond `max_upscale` unless a side of
    the picture is below 16 pixels / max_upscale. Among the sizes near the ideal one, the one that loses least of the
    picture and of the area.
    """
    aspect = min(max(width / height, 1 / max_aspect), max_aspect)
    limit = min(area_px, _inside(width, height, aspect) * max_upscale**2)
    ideal_width, ideal_height = math.sqrt(limit * aspect), math.sqrt(limit / aspect)
    best, best_cost = (SIZE_MULTIPLE, SIZE_MULTIPLE), math.inf
    for w in _near(ideal_width):
        for h in _near(ideal_height):
            fits = w * h <= area_px and 1 / max_aspect <= w / h <= max_aspect
            if not fits or max(w / width, h / height) > max_upscale:
                continue
            crop = 1 - min(w / h * height / width, h / w * width / height)
            cost = crop + _AREA_WORTH * max(0.0, 1 - w * h / limit)
            if cost < best_cost - 1e-12:
                best, best_cost = (w, h), cost
    return best


def _inside(width: int, height: int, aspect: float) -> float:
    """Area of the largest crop of that aspect."""
    return min(width, height * aspect) * min(height, width / aspect)


def _near(ideal: float) -> range:
    middle = math.floor(ideal / SIZE_MULTIPLE)
    return range(max(1, middle - _REACH) * SIZE_MULTIPLE, (middle + _REACH + 1) * SIZE_MULTIPLE, SIZE_MULTIPLE)


def fit_into(width: int, height: int, size: tuple[int, int]) -> Fit:
    """The central crop of a picture that fills `size`."""
    scale = max(size[0] / width, size[1] / height)
    left, top = (width - size[0] / scale) / 2, (height - size[1] / scale) / 2
    box = (max(left, 0.0), max(top, 0.0), min(width - left, float(width)), min(height - top, float(height)))
    return Fit(size[0], size[1], box, (width, height))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture at a size: what a cached latent belongs to."""

    item: Item
    fit: Fit

    def boxes(self) -> tuple[Box, ...]:
        """The item's boxes as fractions of the crop, cut at its edges; boxes outside it are left out."""
        left, top, right, bottom = self.fit.box
        width, height = self.fit.source
        found: list[Box] = []
        for box in self.item.boxes:
            x0, x1 = (min(max((v * width - left) / (right - left), 0.0), 1.0) for v in (box[0], box[2]))
            y0, y1 = (min(max((v * height - top) / (bottom - top), 0.0), 1.0) for v in (box[1], box[3]))
            if x1 > x0 and y1 > y0:
                found.append((x0, y0, x1, y1))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One place in a batch."""

    number: int
    """Running number over the whole run, dense from 0, the same however many processes share the work."""
    entry: Entry
    """The item, or the pair."""
    pictures: tuple[Picture, ...]
    """One for an item; for a pair the chosen and the rejected one, of equal size."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pictures[0].fit.width, self.pictures[0].fit.height


def place_pictures(entry: Entry, resolution: int, options: DatasetOptions) -> tuple[Picture, ...]:
    """The pictures of `entry` at `resolution`; those of a pair share one size, of their mean aspect."""
    items = (entry,) if isinstance(entry, Item) else (entry.chosen, entry.rejected)
    upscale = min(options.max_upscale if item.max_upscale is None else item.max_upscale for item in items)
    width = height = 0.0
    if len(items) == 1 or items[0].width * items[1].height == items[1].width * items[0].height:
        smallest = min(items, key=lambda item: item.width)
        width, height = smallest.width, smallest.height
    else:
        # the smaller area at the mean aspect, so that neither picture is enlarged beyond the limit
        aspect = math.sqrt(math.prod(item.width / item.height for item in items))
        area = min(_inside(item.width, item.height, aspect) for item in items)
        width, height = max(1, int(math.sqrt(area * aspect))), max(1, int(math.sqrt(area / aspect)))
    size = bucket_size(int(width), int(height), resolution**2, max_aspect=options.max_aspect, max_upscale=upscale)
    return tuple(Picture(item=item, fit=fit_into(item.width, item.height, size)) for item in items)


class _Slot(NamedTuple):
    """An entry at one resolution."""

    entry: int
    """Its place in the plan's entries."""
    resolution: int
    pictures: tuple[Picture, ...]


class _Epoch(NamedTuple):
    batches: list[list[_Slot]]
    starts: list[int]
    """Samples of the epoch before each batch."""


def _find(bounds: list[float], share: float) -> int:
    """Which part of a cumulative sum a share in [0, 1) of it falls into; never a part of no width."""
    place = bisect_right(bounds, share * bounds[-1])
    return place if place < len(bounds) else bisect_left(bounds, bounds[-1])


class BatchPlan:
    """Which samples belong to which step. Sizes are computed once; every answer is a function of (seed, step)."""

    def __init__(
        self,
        entries: Sequence[Entry],
        options: DatasetOptions | None = None,
        *,
        stages: Sequence[Stage] = (),
        batch_size: int = 1,
        accumulation: int = 1,
        world_size: int = 1,
        seed: int = 0,
    ):
        """Plan a run.

        Args:
            entries: a dataset's items or its pairs.
            options: for max_aspect and max_upscale.
            stages: in order; empty = one at what the data says, else 1024.
            batch_size: samples per process and micro-batch.
            accumulation: micro-batches per step.
            world_size: number of processes.
            seed: of the order of samples.

        Raises:
            ErnieError: no entries, counts below 1, or stages whose steps do not ascend.
        """
        stages = tuple(stages) or (Stage(),)
        if not entries:
            raise ErnieError("there is nothing to train on: the dataset is empty.")
        for name, count in (("batch_size", batch_size), ("accumulation", accumulation), ("world_size", world_size)):
            if count < 1:
                raise ErnieError(f"{name} must be at least 1, got {count}.")
        ends = [stage.until_step for stage in stages]
        if None in ends[:-1] or any(a and b and b <= a for a, b in pairwise(ends)):
            raise ErnieError(f"until_step must be given for all stages but the last and ascend, got {ends}.")
        self.entries = tuple(entries)
        self.options = options or DatasetOptions()
        self.stages = stages
        self.batch_size, self.accumulation, self.world_size = batch_size, accumulation, world_size
        self.seed = seed
        self.is_drawn = any(isinstance(entry, Item) and entry.draws is not None for entry in self.entries)
        """Whether items are drawn at random; else every epoch goes through all of them."""
        if self.is_drawn and not any(entry.times for entry in self.entries):
            raise ErnieError("there is nothing to train on: no picture of the dataset is ever drawn.")
        # the last stage goes on past its own end
        self._first_steps = [0, *(end for end in ends[:-1] if end is not None)]
        self._buckets = [self._make_buckets(stage) for stage in stages]
        self._epochs: dict[tuple[int, int], _Epoch] = {}
        self._first_numbers: list[int] = [0]

    def _make_buckets(self, stage: Stage) -> dict[tuple[int, int], list[_Slot]]:
        """Size -> its slots, each as often as it is in the list; sorted by size."""
        buckets: defaultdict[tuple[int, int], list[_Slot]] = defaultdict(list)
        for index, entry in enumerate(self.entries):
            for resolution in self.resolutions_of(entry, stage):
                if entry.times == 0:
                    continue
                placed = place_pictures(entry, resolution, self.options)
                buckets[placed[0].fit.width, placed[0].fit.height].append(_Slot(index, resolution, placed))
        return dict(sorted(buckets.items()))

    # --- questions ---

    @staticmethod
    def resolutions_of(entry: Entry, stage: Stage) -> tuple[int, ...]:
        """What `entry` is trained at in `stage`: the stage's, else its own, else 1024."""
        return stage.resolutions or entry.resolutions or (DEFAULT_RESOLUTION,)

    def stage_at(self, step: int) -> int:
        """Index of the stage that `step` (from 0) belongs to."""
        return bisect_right(self._first_steps, step) - 1

    def first_step(self, stage: int) -> int:
        """The step that `stage` begins with."""
        return self._first_steps[stage]

    def batches_per_epoch(self, stage: int = 0) -> int:
        """Micro-batches of one pass over the data; the same in every epoch of a stage."""
        full = self.batch_size * self.world_size
        if self.is_drawn:
            return max(1, round(sum(self._expected(slots) for slots in self._buckets[stage].values()) / full))
        return sum(-(-self._count(slots) // full) for slots in self._buckets[stage].values())

    def samples_per_epoch(self, stage: int = 0) -> int:
        """The sum of repeats over entries and resolutions; where items are drawn, that of draws in full batches."""
        if self.is_drawn:
            return self.batches_per_epoch(stage) * self.batch_size * self.world_size
        return sum(self._count(slots) for slots in self._buckets[stage].values())

    def bucket_counts(self, stage: int = 0) -> dict[tuple[int, int], int]:
        """Samples per epoch of each (width, height); rounded expectations where items are drawn."""
        if self.is_drawn:
            return {size: round(self._expected(slots)) for size, slots in self._buckets[stage].items()}
        return {size: self._count(slots) for size, slots in self._buckets[stage].items()}

    def concept_counts(self, stage: int = 0) -> dict[str, float]:
        """Samples per epoch of each concept; expected ones where items are drawn."""
        counts: defaultdict[str, float] = defaultdict(float)
        for slots in self._buckets[stage].values():
            for slot in slots:
                counts[self.entries[slot.entry].concept] += self.entries[slot.entry].times
        return dict(counts)

    def pictures(self, stage: int | None = None) -> tuple[Picture, ...]:
        """Every picture at every size that the run uses (or one stage of it), each once: what must be cached."""
        chosen = self._buckets if stage is None else [self._buckets[stage]]
        found: dict[tuple[str, str, Fit], Picture] = {}
        for buckets in chosen:
            for slots in buckets.values():
                for slot in slots:
                    for picture in slot.pictures:
                        found[str(picture.item.image), picture.item.mask_sha256, picture.fit] = picture
        return tuple(found.values())

    def batch_at(self, step: int, micro: int = 0, *, rank: int | None = None) -> tuple[Sample, ...]:
        """The samples of micro-batch `micro` (from 0) of optimiser step `step` (from 0).

        All of them, or the share of process `rank`: every world_size-th, which is empty where a partial batch has
        fewer samples than there are processes.
        """
        assert step >= 0, step
        assert 0 <= micro < self.accumulation, (micro, self.accumulation)
        stage = self.stage_at(step)
        epoch, place = divmod(
            (step - self._first_steps[stage]) * self.accumulation + micro, self.batches_per_epoch(stage)
        )
        plan = self._epoch(stage, epoch)
        first = self._first_number(stage) + epoch * self.samples_per_epoch(stage) + plan.starts[place]
        samples = tuple(
            Sample(number=first + i, entry=self.entries[slot.entry], pictures=slot.pictures)
            for i, slot in enumerate(plan.batches[place])
        )
        return samples if rank is None else samples[rank :: self.world_size]

    def samples_in(self, step: int) -> int:
        """Samples of all micro-batches and processes of a step: what its loss is the mean over."""
        return sum(len(self.batch_at(step, micro)) for micro in range(self.accumulation))

    def plan_epoch(self, epoch: int, stage: int = 0) -> list[tuple[Picture, ...]]:
        """The pictures of each sample of an epoch in order, batches joined."""
        return [slot.pictures for batch in self._epoch(stage, epoch).batches for slot in batch]

    # --- order ---

    def _count(self, slots: Sequence[_Slot]) -> int:
        return sum(self.entries[slot.entry].repeats for slot in slots)

    def _epoch(self, stage: int, epoch: int) -> _Epoch:
        if (stage, epoch) not in self._epochs:
            while len(self._epochs) >= 4:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[stage, epoch] = self._make_epoch(stage, epoch)
        return self._epochs[stage, epoch]

    def _expected(self, slots: Sequence[_Slot]) -> float:
        return sum(self.entries[slot.entry].times for slot in slots)

    def _draw_epoch(self, stage: int, epoch: int) -> _Epoch:
        """Full batches, each a function of the number of its first sample."""
        full = self.batch_size * self.world_size
        buckets = list(self._buckets[stage].values())
        bounds = list(accumulate(self._expected(slots) for slots in buckets))
        inside = [list(accumulate(self.entries[slot.entry].times for slot in slots)) for slots in buckets]
        first = self._first_number(stage) + epoch * self.samples_per_epoch(stage)
        batches: list[list[_Slot]] = []
        for start in range(first, first + self.samples_per_epoch(stage), full):
            chosen = _find(bounds, draw_uniform("bucket", self.seed, start))
            batches.append(
                [
                    buckets[chosen][_find(inside[chosen], draw_uniform("draw", self.seed, number))]
                    for number in range(start, start + full)
                ]
            )
        return _Epoch(batches, list(range(0, full * (len(batches) + 1), full)))

    def _make_epoch(self, stage: int, epoch: int) -> _Epoch:
        if self.is_drawn:
            return self._draw_epoch(stage, epoch)
        full = self.batch_size * self.world_size
        batches: list[tuple[bytes, list[_Slot]]] = []
        for size, slots in self._buckets[stage].items():
            # repeats go round by round, so that a batch holds one picture twice only where a round ends
            rounds = [
                (turn, self._hash("sample", stage, epoch, turn, slot.entry, slot.resolution), slot)
                for slot in slots
                for turn in range(self.entries[slot.entry].repeats)
            ]
            ordered = [slot for _, _, slot in sorted(rounds, key=lambda r: r[:2])]
            for start in range(0, len(ordered), full):
                key = self._hash("batch", stage, epoch, *size, start)
                batches.append((key, ordered[start : start + full]))
        batches.sort(key=lambda batch: batch[0])
        starts = [0]
        for _, batch in batches:
            starts.append(starts[-1] + len(batch))
        return _Epoch([batch for _, batch in batches], starts)

    def _hash(self, *key: str | int) -> bytes:
        return hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=16).digest()

    def _first_number(self, stage: int) -> int:
        """Samples drawn before the first step of `stage`."""
        while len(self._first_numbers) <= stage:
            before = len(self._first_numbers) - 1
            count = (self._first_steps[before + 1] - self._first_steps[before]) * self.accumulation
            epochs, rest = divmod(count, self.batches_per_epoch(before))
            drawn = epochs * self.samples_per_epoch(before) + self._make_epoch(before, epochs).starts[rest]
            self._first_numbers.append(self._first_numbers[-1] + drawn)
        return self._first_numbers[stage]
