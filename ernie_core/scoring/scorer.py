"""What every scorer is, the numbers it gives, and choosing by them.

A scorer turns pictures into one number each. Pictures are taken one after the other and dropped as soon as they are
prepared, so memory does not grow with their number; the model sees `batch_size` of them at once.

Shape letters: B pictures, H, W pixels, C = 3 colours.
"""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ErnieError

T = TypeVar("T")
Picture = Any  # a uint8 array or float tensor [H, W, 3], a PIL image, or the path of a file

DEFAULT_BATCH = 8


@runtime_checkable
class Scorer(Protocol):
    """One number per picture."""

    @property
    def name(self) -> str:
        """For people and files: "LAION aesthetic", "built-in combined"."""
        ...

    @property
    def low(self) -> float | None:
        """Least value it can give; None = open."""
        ...

    @property
    def high(self) -> float | None:
        """Greatest value it can give; None = open."""
        ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def reads_prompt(self) -> bool:
        """Whether the number is about picture and prompt together; prompts must be given then."""
        ...

    @property
    def key(self) -> str:
        """Changes with weights and settings: equal keys give equal numbers, so that scores can be kept."""
        ...

    def score(
        self,
        images: Tensor | Iterable[Picture],
        prompts: str | Iterable[str] | None = None,
        *,
        batch_size: int = DEFAULT_BATCH,
        on_scored: Callable[[int], None] | None = None,
    ) -> list[float]:
        """One number per picture, in their order.

        Args:
            images: [B, H, W, C] or [H, W, C] in 0..1, or pictures of any sizes, also an iterator: uint8 arrays
                [H, W, 3], float tensors [H, W, C], PIL images, paths.
            prompts: one per picture, or one for all; scorers that do not read prompts take no notice.
            batch_size: pictures that the model sees at once; changes speed and memory, the numbers by rounding only.
            on_scored: called with the count so far after each batch; what it raises ends the call.

        Raises:
            ErnieError: a picture cannot be used (which, why), a prompt is missing, or a number came out as NaN.
        """
        ...


class BatchScorer(ABC, Generic[T]):
    """What is the same in every `Scorer`: `score`, out of how one picture is prepared and how a batch is run."""

    @abstractmethod
    def prepare(self, rgb_HWC: np.ndarray) -> T:
        """Something small of fixed size, out of uint8 [H, W, 3]."""

    @abstractmethod
    def start(self) -> Callable[[list[T], list[str]], Sequence[float]]:
        """What scores a batch of prepared pictures with their prompts; made anew for every `score`."""

    def score(
        self,
        images: Tensor | Iterable[Picture],
        prompts: str | Iterable[str] | None = None,
        *,
        batch_size: int = DEFAULT_BATCH,
        on_scored: Callable[[int], None] | None = None,
    ) -> list[float]:
        """As `Scorer.score`."""
        scorer = cast(Scorer, self)
        return score_stream(
            images,
            prompts,
            prepare=self.prepare,
            run=self.start(),
            reads_prompt=scorer.reads_prompt,
            name=scorer.name,
            batch_size=batch_size,
            on_scored=on_scored,
        )


# --- pictures --------------------------------------------------------------------------------------------------------


def to_rgb(image: Picture, name: str = "the picture") -> np.ndarray:
    """uint8 [H, W, 3] of one picture; transparent parts lie on white, grey becomes RGB.

    Raises ErnieError: another shape or type, NaN, no pixels, or a file that cannot be decoded.
    """
    if isinstance(image, (str, Path)):
        from ..training.pictures import load_image

        return load_image(Path(image)).rgb_HWC
    if isinstance(image, Image.Image):
        return _flatten(np.asarray(image.convert("RGBA" if "A" in image.getbands() else "RGB")))
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ErnieError(f"{name} must have the shape [height, width, 3], got {list(image.shape)}.")
        if image.is_floating_point():
            image = image.detach().float().cpu()
            if not bool(torch.isfinite(image).all()):
                raise ErnieError(f"{name} holds NaN or infinite values; something before it went wrong.")
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ErnieError(f"{name} must be a uint8 array, a float tensor in 0..1, a PIL image or a path, got {kind}.")
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ErnieError(f"{name} must have the shape [height, width, 3], got {list(image.shape)}.")
    return _flatten(image)


def _flatten(image_HWC: np.ndarray) -> np.ndarray:
    channels = image_HWC.shape[-1]
    if channels == 1:
        return np.repeat(image_HWC, 3, axis=-1)
    if channels == 3:
        return image_HWC
    alpha = image_HWC[..., 3:].astype(np.float32) / 255
    return np.rint(image_HWC[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def iter_rgb(images: Tensor | Iterable[Picture]) -> Iterator[np.ndarray]:
    """`to_rgb` of each, one at a time."""
    alone = isinstance(images, (str, Path, Image.Image)) or getattr(images, "ndim", 4) == 3
    for number, image in enumerate([images] if alone else images, start=1):
        yield to_rgb(image, f"picture {number}")


def score_stream(
    images: Tensor | Iterable[Picture],
    prompts: str | Iterable[str] | None,
    *,
    prepare: Callable[[np.ndarray], T],
    run: Callable[[list[T], list[str]], Sequence[float]],
    reads_prompt: bool,
    name: str,
    batch_size: int,
    on_scored: Callable[[int], None] | None = None,
) -> list[float]:
    """The loop behind `Scorer.score`: `prepare` each picture at once, `run` on `batch_size` of them.

    `prepare` makes something small of fixed size out of uint8 [H, W, 3]; no more than a batch of those is held.
    """
    if batch_size < 1:
        raise ErnieError(f"batch_size must be 1 or more, got {batch_size}.")
    if reads_prompt and prompts is None:
        raise ErnieError(f"{name} compares a picture with its prompt, and no prompt came; connect the prompts.")
    texts = None if isinstance(prompts, str) or prompts is None else iter(prompts)
    scores: list[float] = []
    waiting: list[T] = []
    waiting_texts: list[str] = []

    def flush() -> None:
        made = [float(score) for score in run(waiting, waiting_texts)]
        assert len(made) == len(waiting), (len(made), len(waiting))
        wrong = next((i for i, score in enumerate(made, start=len(scores) + 1) if not math.isfinite(score)), None)
        if wrong is not None:
            raise ErnieError(f"{name} gave {made[wrong - len(scores) - 1]} for picture {wrong}; use fp32 or bf16.")
        scores.extend(made)
        waiting.clear()
        waiting_texts.clear()
        if on_scored is not None:
            on_scored(len(scores))

    count = 0
    for count, rgb_HWC in enumerate(iter_rgb(images), start=1):
        text = (prompts if isinstance(prompts, str) else "") if texts is None else next(texts, None)
        if text is None:
            raise ErnieError(f"picture {count} has no prompt; give one prompt per picture, or one for all.")
        if reads_prompt and not text.strip():
            raise ErnieError(f"{name} compares a picture with its prompt; picture {count} has an empty one.")
        waiting.append(prepare(rgb_HWC))
        waiting_texts.append(text)
        if len(waiting) == batch_size:
            flush()
    if waiting:
        flush()
    if texts is not None and next(texts, None) is not None:
        raise ErnieError(
            f"there are more prompts than pictures ({count}); give one prompt per picture, or one for all."
        )
    return scores


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a scorer said about a number of pictures (socket ERNIE_SCORES). All tuples have one entry per picture."""

    scorer: str
    """Its name."""
    values: tuple[float, ...]
    labels: tuple[str, ...]
    """For people: the file's name, or "image 3"."""
    prompts: tuple[str, ...]
    """"" where there is none."""
    categories: tuple[str, ...]
    """"" where there is none."""
    files: tuple[str, ...] = ()
    """Where each picture lies; "" for one that is no file; () stands for "" everywhere."""
    higher_is_better: bool = True
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not self.files:
            object.__setattr__(self, "files", ("",) * len(self.values))
        for name in ("labels", "prompts", "categories", "files"):
            if len(getattr(self, name)) != len(self.values):
                raise ErnieError(
                    f"{name} must have one entry per score ({len(self.values)}), got {len(getattr(self, name))}."
                )

    def __len__(self) -> int:
        return len(self.values)

    def order(self) -> list[int]:
        """Places of the pictures, best first; equals keep their order."""
        sign = -1 if self.higher_is_better else 1
        return sorted(range(len(self)), key=lambda i: sign * self.values[i])

    def chosen(self, places: Sequence[int]) -> Scores:
        """Of these pictures only, in this order."""
        columns = {name: tuple(getattr(self, name)[i] for i in places) for name in COLUMNS}
        return replace(self, **columns)

    def joined(self, other: Scores) -> Scores:
        """This one's pictures, then the other's.

        Raises ErnieError when they are of different scorers.
        """
        if (self.scorer, self.higher_is_better) != (other.scorer, other.higher_is_better):
            raise ErnieError(f"scores of one scorer expected, got {self.scorer!r} and {other.scorer!r}.")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in COLUMNS})

    def by(self, column: str) -> dict[str, Scores]:
        """Grouped by "prompts" or "categories", groups in the order of their first picture."""
        groups: dict[str, list[int]] = {}
        for i, key in enumerate(getattr(self, column)):
            groups.setdefault(key, []).append(i)
        return {key: self.chosen(places) for key, places in groups.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One dict per picture: rank (1 = best), score, label, prompt, category, file."""
        ranks = {place: rank for rank, place in enumerate(self.order(), start=1)}
        return [
            {
                "rank": ranks[i],
                "score": self.values[i],
                "label": self.labels[i],
                "prompt": self.prompts[i],
                "category": self.categories[i],
                "file": self.files[i],
            }
            for i in range(len(self))
        ]

    def to_csv(self) -> str:
        """A table with a header, one row per picture, in the order given."""
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["rank", "score", "label", "prompt", "category", "file"])
        writer.writeheader()
        writer.writerows(self.rows())
        return out.getvalue()

    def to_json(self) -> str:
        """Everything; `from_json` reads it back."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Raises ErnieError unless the text is one that `to_json` wrote."""
        try:
            values = json.loads(text)
            known = {f.name for f in fields(cls)}
            columns: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**{k: v for k, v in columns.items() if k in known})
        except (ValueError, TypeError, AttributeError) as e:
            raise ErnieError(f"not a file of scores: {e}.") from e


COLUMNS = ("values", "labels", "prompts", "categories", "files")


def make_scores(
    scorer: Scorer,
    values: Sequence[float],
    *,
    labels: Sequence[str] | None = None,
    prompts: str | Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
    files: Sequence[str] | None = None,
) -> Scores:
    """`Scores` with everything that is known; what is None becomes "image 1", ... or ""."""
    count = len(values)
    prompts = [prompts] * count if isinstance(prompts, str) else prompts
    return Scores(
        scorer=scorer.name,
        values=tuple(values),
        labels=tuple(labels) if labels is not None else tuple(f"image {i}" for i in range(1, count + 1)),
        prompts=tuple(prompts or ("",) * count),
        categories=tuple(categories or ("",) * count),
        files=tuple(files or ("",) * count),
        higher_is_better=scorer.higher_is_better,
        low=scorer.low,
        high=scorer.high,
    )


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(
    scores: Scores,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    top_share: float | None = None,
    per_prompt: bool = False,
) -> list[int]:
    """Places of the pictures to keep, in their original order. Of the given rules, all must hold.

    Args:
        threshold: at least this (at most, where lower is better).
        top_k: the k best.
        top_share: the best share, in (0, 1]; rounded up, so never none.
        per_prompt: top_k and top_share count within each prompt.

    Raises:
        ErnieError: a value out of its range.
    """
    if top_k is not None and top_k < 1:
        raise ErnieError(f"top_k must be 1 or more, got {top_k}.")
    if top_share is not None and not 0 < top_share <= 1:
        raise ErnieError(f"top_share must be above 0 and at most 1, got {top_share:g}.")
    if threshold is not None and not math.isfinite(threshold):
        raise ErnieError(f"threshold must be a number, got {threshold}.")
    groups: Mapping[str, list[int]] = {"": list(range(len(scores)))}
    if per_prompt:
        groups = {}
        for i, prompt in enumerate(scores.prompts):
            groups.setdefault(prompt, []).append(i)
    kept: set[int] = set()
    for places in groups.values():
        best = [places[i] for i in scores.chosen(places).order()]
        limit = len(best)
        if top_k is not None:
            limit = min(limit, top_k)
        if top_share is not None:
            limit = min(limit, math.ceil(len(best) * top_share - 1e-9))
        kept |= set(best[:limit])
    if threshold is not None:
        sign = 1 if scores.higher_is_better else -1
        kept = {i for i in kept if sign * scores.values[i] >= sign * threshold}
    return sorted(kept)
