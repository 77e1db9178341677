"""What it costs to sort a picture into a tree of 10,000 leaves, and to label without a model.

Features are random, 768 wide as those of CLIP ViT-L and SigLIP so400m are about; computing them is the model's time and
not counted. The peer of the sorting is the least that it takes: one matrix product with all sentences and the arg max.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from ..ernie_core.curation.answers import read_description
from ..ernie_core.curation.builtin_labels import measure_look
from ..ernie_core.curation.categories import choose, sentences, step_log_probabilities
from ..ernie_core.curation.image_text import TextFeatures
from ..ernie_core.curation.styles import STYLES, Source, Style, faults, write_by_rules
from ..ernie_core.curation.taxonomy import Taxonomy, parse_taxonomy
from ..tiny.scenes import all_scenes, canonical_caption, draw
from .compare import Row, process_seconds

WIDTH, PICTURES, REPEATS, BATCH = 768, 1000, 5, 100
SCALE = 100.0


def large_tree() -> str:
    """20 x 25 x 20 = 10,000 leaves as a file's text."""
    lines = []
    for a in range(20):
        lines.append(f"branch {a}")
        for b in range(25):
            lines += [f"  twig {a} {b}", *(f"    leaf {a} {b} {c}" for c in range(20))]
    return "\n".join(lines)


def timed(name: str, run: Callable[[], object], *, per: int = 1, target_s: float = 0.0, note: str = "") -> Row:
    """One measurement by processor time, median and range of REPEATS, per item."""
    times = [process_seconds(run) / per for _ in range(REPEATS)]
    shown = f"{show(median(times))} [{show(min(times))}-{show(max(times))}]" + (f"; {note}" if note else "")
    target = f"at most {show(target_s)}" if target_s else ""
    return Row(name=name, ours=shown, target=target, met=median(times) <= target_s if target_s else None, untold="-")


def show(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 0.1
        else f"{seconds * 1e3:.2f} ms"
        if seconds >= 1e-4
        else f"{seconds * 1e6:.0f} us"
    )


class _Stored:
    """Gives random features for sentences, in no time."""

    scale, bias = SCALE, 0.0

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(len(texts), WIDTH), dim=-1)

    def pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        raise NotImplementedError


def sort_all(features_ND: np.ndarray, pictures_BD: np.ndarray, tree: Taxonomy, **how) -> list:
    """Everything from features to assignments, in batches as the stage does."""
    beam, method = how.get("beam", 0), how.get("method", "names")
    found = []
    for start in range(0, len(pictures_BD), BATCH):
        logits_BN = SCALE * (pictures_BD[start : start + BATCH] @ features_ND.T)
        found += choose(step_log_probabilities(logits_BN, tree, method), tree, beam=beam)
    return found


def measure() -> Iterator[Row]:
    text = large_tree()
    yield timed("read a tree of 10,000 leaves", lambda: parse_taxonomy(text).paths, target_s=1.0)
    tree = parse_taxonomy(text)
    rng = np.random.default_rng(0)
    features_ND = unit(rng.normal(size=(len(tree), WIDTH)))
    pictures_BD = unit(rng.normal(size=(PICTURES, WIDTH)))
    leaves_LD = features_ND[tree.leaves]

    def flat() -> None:
        for start in range(0, PICTURES, BATCH):
            (pictures_BD[start : start + BATCH] @ leaves_LD.T).argmax(axis=1)

    for name, how in (
        ("softmax by siblings, all kept", {}),
        ("softmax over leaves", {"method": "leaves"}),
        ("softmax by siblings, beam 8", {"beam": 8}),
    ):
        ours, peer = [], []
        for _ in range(REPEATS):
            ours.append(process_seconds(lambda how=how: sort_all(features_ND, pictures_BD, tree, **how)))
            peer.append(process_seconds(flat))
        yield Row(
            name=f"sort {PICTURES} pictures into 10,000 leaves: {name}",
            ours=f"{show(median(ours))} [{show(min(ours))}-{show(max(ours))}]",
            target="at most 10 s",
            met=median(ours) <= 10,
            peer_name="one product and arg max over the leaves",
            peer=show(median(peer)),
            ratios=tuple(p / o for p, o in zip(peer, ours, strict=True)),
        )
    with tempfile.TemporaryDirectory() as folder:
        kept = TextFeatures(Path(folder), "bench")
        texts = sentences(tree, "a picture of {name}")
        kept.features(_Stored(), texts)
        size = f"{kept.path.stat().st_size / 2**20:.0f} MiB"
        yield timed(
            "read the features of its sentences from the disk", lambda: kept.features(_Stored(), texts), note=size
        )
    yield from without_a_model()


def without_a_model() -> Iterator[Row]:
    """Pixels, rules, and reading answers."""
    scenes = all_scenes()[::13]
    pictures = [Image.fromarray(draw(scene, np.random.default_rng(i), 512)) for i, scene in enumerate(scenes[:60])]
    yield timed(
        "labels from the pixels of a picture of 512 px", lambda: [measure_look(p) for p in pictures], per=len(pictures)
    )
    asked: list[tuple[Source, Style, str]] = [
        (Source.of({"caption": canonical_caption(s)}), style, str(i)) for i, s in enumerate(scenes) for style in STYLES
    ]
    lost = sum(bool(faults(source.text, write_by_rules(source, style, 0, row))) for source, style, row in asked)
    yield timed(
        "write one prompt by rules",
        lambda: [write_by_rules(source, style, 0, row) for source, style, row in asked],
        per=len(asked),
        note=f"{lost} of {len(asked)} lost a quoted text or a name",
    )
    answer = (
        '```json\n{"type": "poster", "text": ["SALE"], "long": "'
        + "A long description. " * 40
        + '", "tags": ["a"]}\n```'
    )
    yield timed("read an answer of 850 characters", lambda: [read_description(answer) for _ in range(200)], per=200)


def unit(values_ND: np.ndarray) -> np.ndarray:
    return (values_ND / np.linalg.norm(values_ND, axis=1, keepdims=True)).astype(np.float32)
