"""Which category of a tree a picture belongs to, how sure that is, and what would have been next.

By an image-text model (`ImageTextCategoriser`): every category has a sentence; scale * cos(picture, sentence), the
model's own logits, become probabilities among siblings, and a category's probability is the product along its path.
Two ways to the probabilities:

    names    softmax over the sentences of each group of siblings, the branches' own names included
    leaves   softmax over the sentences of all leaves; a branch has the sum of its leaves (their exact marginal)

The walk down the tree keeps the `beam` best places per level; 0 keeps all, which is the arg max over the products of
all leaves. Every sentence is compared with every picture in any case: for 10,000 leaves that is one small matrix
product, cheaper than choosing which to compare (bench/CURATION.md).

By a vision-language model (`asked_categories`), by measures of the pixels (`builtin_labels`), or by a function of
your own (`own_labels`).

Shape letters: B pictures, N categories, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from ..errors import ErnieError
from ..scoring.network import Place, Precision, stay
from .image_text import ImageText, TextFeatures, load_image_text, model_key
from .manifest import Row, open_picture
from .taxonomy import Taxonomy

Method = Literal["names", "leaves"]
METHODS: tuple[Method, ...] = get_args(Method)
TEMPLATES = ("a picture of {name}",)
"""Neutral sentence; several are averaged."""
DIGITS = 4  # of the probabilities in a manifest: more would depend on what else is in the batch


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where one picture belongs."""

    category: str
    """Path in the tree; "" where not even a branch was sure enough."""
    confidence: float | None
    """Probability of `category`, 0..1; None where the labeller gives none."""
    levels: tuple[float, ...] = ()
    """Probability of each step of the path among its siblings."""
    runner_up: str = ""
    """The next best leaf outside of `category`; "" where there is none."""
    runner_up_confidence: float | None = None


class Categoriser(Protocol):
    """What sorts pictures; picklable, loads what it needs at the first call."""

    def key(self) -> str:
        """Changes with everything that decides its answers."""
        ...

    def assign(self, pictures: Sequence[Image.Image]) -> list[Assignment | ErnieError]:
        """One answer per RGB picture; an error stands for the picture that it belongs to."""
        ...


# --- probabilities ----------------------------------------------------------------------------------------------------


def step_log_probabilities(logits_BN: np.ndarray, tree: Taxonomy, method: Method = "names") -> np.ndarray:
    """fp64 [B, N]: log of each category's probability among its siblings, given that their parent is right."""
    if method == "names":
        starts, families = tree.family_starts, tree.families
        shifted_BN = logits_BN - np.maximum.reduceat(logits_BN, starts, axis=1)[:, families].astype(np.float64)
        return shifted_BN - np.log(np.add.reduceat(np.exp(shifted_BN), starts, axis=1))[:, families]
    log_p_BN = _sum_leaves(logits_BN, tree)
    steps_BN = log_p_BN.copy()
    below = tree.parents >= 0
    steps_BN[:, below] -= log_p_BN[:, tree.parents[below]]
    return steps_BN


def _sum_leaves(logits_BN: np.ndarray, tree: Taxonomy) -> np.ndarray:
    """fp64 [B, N]: log softmax over all leaves; a branch has the log of its leaves' sum."""
    leaf_BL = logits_BN[:, tree.leaves].astype(np.float64)
    leaf_BL -= leaf_BL.max(axis=1, keepdims=True)
    log_p_BN = np.full(logits_BN.shape, -np.inf)
    log_p_BN[:, tree.leaves] = leaf_BL - np.log(np.exp(leaf_BL).sum(axis=1, keepdims=True))
    for first, end in reversed(tree.levels[1:]):
        starts = tree.family_starts[(tree.family_starts >= first) & (tree.family_starts < end)]
        log_p_BN[:, tree.parents[starts]] = np.logaddexp.reduceat(log_p_BN[:, first:end], starts - first, axis=1)
    return log_p_BN


def path_log_probabilities(steps_BN: np.ndarray, tree: Taxonomy) -> np.ndarray:
    """fp64 [B, N]: log of the product of the steps from the first level down to each category."""
    paths_BN = steps_BN.copy()
    for first, end in tree.levels[1:]:
        paths_BN[:, first:end] += paths_BN[:, tree.parents[first:end]]
    return paths_BN


def descend(steps_N: np.ndarray, tree: Taxonomy, beam: int = 0) -> list[tuple[int, float]]:
    """(leaf, log probability of its path), best first, of the leaves that a walk with `beam` places ends in.

    On each level the `beam` best of all branches and finished leaves stay; 0 = all. Equals go by their place.
    """
    kept: list[tuple[int, float]] = [(-1, 0.0)]
    is_open = True
    while is_open:
        grown: list[tuple[int, float]] = []
        is_open = False
        for place, log_p in kept:
            children = tree.children(place)
            is_open = is_open or bool(children)
            grown += [(child, log_p + float(steps_N[child])) for child in children] or [(place, log_p)]
        grown.sort(key=lambda entry: (-entry[1], entry[0]))
        kept = grown[:beam] if beam else grown
    return kept


def choose(steps_BN: np.ndarray, tree: Taxonomy, *, beam: int = 0, min_confidence: float = 0.0) -> list[Assignment]:
    """The best leaf of each picture, or the nearest branch above it that has `min_confidence`."""
    paths_BN = path_log_probabilities(steps_BN, tree)
    made = []
    for steps_N, paths_N in zip(steps_BN, paths_BN, strict=True):
        ends = np.array([leaf for leaf, _ in descend(steps_N, tree, beam)]) if beam else tree.leaves
        made.append(_assignment(ends, steps_N, paths_N, tree, min_confidence))
    return made


def _assignment(ends: np.ndarray, steps_N: np.ndarray, paths_N: np.ndarray, tree: Taxonomy, least: float) -> Assignment:
    """The best of `ends` (leaves), backed off to a branch that has `least`, and the best end outside of it."""
    way = tree.way(int(ends[paths_N[ends].argmax()]))
    while way and np.exp(paths_N[way[-1]]) < least:
        way.pop()
    others = ends[tree.ancestors[len(way) - 1, ends] != way[-1]] if way else ends
    second = int(others[paths_N[others].argmax()]) if len(others) else None
    return Assignment(
        category=tree.paths[way[-1]] if way else "",
        confidence=_round(paths_N[way[-1]]) if way else 0.0,
        levels=tuple(_round(steps_N[place]) for place in way),
        runner_up="" if second is None else tree.paths[second],
        runner_up_confidence=None if second is None else _round(paths_N[second]),
    )


def _round(log_p: float) -> float:
    return round(float(np.exp(log_p)), DIGITS)


# --- by an image-text model -------------------------------------------------------------------------------------------


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates without empty lines.

    Raises ErnieError: none is left, or one lacks {name}.
    """
    kept = tuple(line.strip() for line in templates if line.strip())
    wrong = next((line for line in kept if "{name}" not in line), None)
    if wrong is not None or not kept:
        raise ErnieError(f'a template must hold {{name}}, as in "{TEMPLATES[0]}", got {wrong or "none"!r}.')
    return kept


def sentences(tree: Taxonomy, template: str) -> list[str]:
    """What a model reads for each category: {name} is its text, {parent} its parent's name, {path} its path."""
    return [
        template.replace("{name}", text)
        .replace("{parent}", tree.names[parent] if parent >= 0 else "")
        .replace("{path}", path.replace("/", ", "))
        for text, parent, path in zip(tree.texts, tree.parents.tolist(), tree.paths, strict=True)
    ]


class ImageTextCategoriser:
    """Sorts by CLIP, SigLIP or SigLIP 2 from a local folder."""

    def __init__(
        self,
        model: Path,
        tree: Taxonomy,
        *,
        cache: Path,
        templates: Sequence[str] = TEMPLATES,
        method: Method = "names",
        beam: int = 0,
        min_confidence: float = 0.0,
        precision: Precision = "fp32",
        device: str | None = None,
        tokenizer_folders: Sequence[Path] = (),
        place: Place = stay,
    ):
        """Loads nothing yet.

        Args:
            model: file or folder, as `load_image_text` reads it.
            cache: folder for the features of the sentences.
            templates: sentences around the names; features of several are averaged.
            beam: places kept per level of the tree, 0 = all.
            min_confidence: 0..1; below it a picture gets the nearest branch that has it. 0 = always a leaf.

        Raises:
            ErnieError: a value is out of its range.
            CheckpointError: the model cannot be read.
        """
        if method not in METHODS:
            raise ErnieError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
        if beam < 0:
            raise ErnieError(f"beam must be 0 (all) or more, got {beam}.")
        if not 0 <= min_confidence <= 1:
            raise ErnieError(f"min_confidence must lie between 0 and 1, got {min_confidence:g}.")
        self.tree = tree
        self.method: Method = method
        self.beam = beam
        self.min_confidence = min_confidence
        self.templates = check_templates(templates)
        self.model_key = model_key(model, precision)
        self._cache = cache
        self._load = (model, precision, device, tuple(tokenizer_folders), place)
        self._model: ImageText | None = None
        self._features_ND: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_features_ND": None}

    def key(self) -> str:
        settings = [self.model_key, self.tree.key, self.templates, self.method, self.beam, self.min_confidence]
        return _digest("image-text", settings)

    def prepare(self) -> None:
        """Compute and keep the sentences' features now, so that worker processes find them on the disk."""
        kept = TextFeatures(self._cache, self.model_key)
        texts = [sentences(self.tree, template) for template in self.templates]
        if not kept.covers([text for part in texts for text in part]):
            for part in texts:
                kept.features(self._loaded(), part)

    def _loaded(self) -> ImageText:
        if self._model is None:
            model, precision, device, folders, place = self._load
            self._model = load_image_text(
                model, precision=precision, device=device, tokenizer_folders=folders, place=place
            )
        return self._model

    def _features(self) -> np.ndarray:
        """fp32 [N, D] of length 1: the mean over the templates."""
        if self._features_ND is None:
            kept = TextFeatures(self._cache, self.model_key)
            model = self._loaded()
            each_TND = [kept.features(model, sentences(self.tree, template)) for template in self.templates]
            mean_ND = np.mean(each_TND, axis=0)
            made_ND: np.ndarray = mean_ND / np.linalg.norm(mean_ND, axis=1, keepdims=True)
            self._features_ND = made_ND
        return self._features_ND

    def logits(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """fp32 [B, N]: the model's logits_per_image for the categories' sentences."""
        model = self._loaded()
        return model.scale * (model.pictures(pictures).numpy() @ self._features().T) + model.bias

    def assign(self, pictures: Sequence[Image.Image]) -> list[Assignment | ErnieError]:
        logits_BN = self.logits(pictures)
        if not np.isfinite(logits_BN).all():
            raise ErnieError("the image-text model gave NaN; use fp32 or bf16.")
        steps_BN = step_log_probabilities(logits_BN, self.tree, self.method)
        return [*choose(steps_BN, self.tree, beam=self.beam, min_confidence=self.min_confidence)]


def _digest(kind: str, settings: Any) -> str:
    return hashlib.sha256(json.dumps([kind, settings]).encode()).hexdigest()[:16]


# --- the stage --------------------------------------------------------------------------------------------------------


class Categories:
    """Stage "categories": adds where each picture belongs, as in `Assignment`."""

    name = "categories"
    needs = ("source",)
    adds = (
        *("category", "category_confidence", "category_levels"),
        *("category_runner_up", "category_runner_up_confidence"),
    )

    def __init__(self, categoriser: Categoriser, *, batch_size: int = 16):
        """`batch_size`: pictures in memory and before the model at once."""
        if batch_size < 1:
            raise ErnieError(f"batch_size must be 1 or more, got {batch_size}.")
        self.categoriser = categoriser
        self.batch_size = batch_size

    def key(self) -> str:
        return self.categoriser.key()

    def __call__(self, rows: list[Row]) -> list[Row]:
        pictures: dict[int, Image.Image] = {}
        made: list[Row] = [{} for _ in rows]
        for i, row in enumerate(rows):
            try:
                pictures[i] = open_picture(row)
            except ErnieError as e:
                made[i] = {"failed": str(e)}
        found = self.categoriser.assign(list(pictures.values())) if pictures else []
        for i, answer in zip(pictures, found, strict=True):
            made[i] = {"failed": str(answer)} if isinstance(answer, ErnieError) else _columns(answer)
        return made


def _columns(answer: Assignment) -> Row:
    return {
        "category": answer.category,
        "category_confidence": answer.confidence,
        "category_levels": list(answer.levels),
        "category_runner_up": answer.runner_up,
        "category_runner_up_confidence": answer.runner_up_confidence,
    }
