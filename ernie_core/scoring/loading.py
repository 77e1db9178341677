"""From a name on a list to a scorer: which kind a file is, by its tensors' names, and what it needs beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, ErnieError
from .blip_based import is_image_reward, load_image_reward
from .builtin import MEASURES, BuiltinScorer
from .clip_based import (
    ClipKind,
    ClipScorer,
    LaionAesthetic,
    build_clip,
    head_width,
    is_clip,
    is_clip_vision,
    is_laion_head,
    read_tokenizer,
)
from .ernie_aes import PromptStyle, is_internvl, load_ernie_aes
from .network import LOW_BIT, Place, Precision, Weights, fingerprint, read_weights, stay
from .scorer import Scorer

BUILTIN = "built-in "
Kind = Literal["auto", "clip", "pickscore", "hpsv2"]
KINDS: tuple[Kind, ...] = ("auto", "clip", "pickscore", "hpsv2")
MAX_HEAD_BYTES = 64 << 20  # an aesthetic head has a few MB; only files up to this size are looked into as one


def list_builtin() -> list[str]:
    """Names of the scorers without weights, the combined one first."""
    return [BUILTIN + measure for measure in MEASURES]


def find_builtin(name: str) -> BuiltinScorer | None:
    """The scorer behind a name from `list_builtin`, None for another name."""
    return next((BuiltinScorer(measure=measure) for measure in MEASURES if BUILTIN + measure == name), None)


def clip_kind(weights: Weights, kind: Kind = "auto") -> ClipKind:
    """Which of the scores a whole CLIP gives: as asked, or by the file's or folder's name.

    PickScore and HPS v2 are CLIP-H with other weights; nothing in the tensors' names or shapes tells them apart.
    """
    if kind != "auto":
        return kind
    words = f"{weights.source.parent.name}/{weights.source.name}".lower()
    if "hps" in words:
        return "hpsv2"
    return "pickscore" if "pick" in words else "clip"


def load_scorer(
    path: Path,
    *,
    kind: Kind = "auto",
    backbone: Path | None = None,
    backbones: Iterable[Path] = (),
    tokenizer_folders: Sequence[Path | None] = (),
    precision: Precision | None = None,
    style: PromptStyle = "artimuse",
    ops: Any = None,
    place: Place = stay,
) -> Scorer:
    """The scorer that a file or folder is, recognised by its tensors.

    Args:
        kind: which score a whole CLIP gives; auto goes by its name.
        backbone: for a LAION head: CLIP ViT-L/14, whole or its picture side; None = the first of `backbones` that
            fits.
        tokenizer_folders: where CLIP's (or BERT's) tokenizer is looked for, after the weights' own folder.
        precision: None = bf16 for ERNIE-Image-Aes (nf4 for a file in 4 bits), fp32 for the others, whose scores lie
            close together.
        style: how ERNIE-Image-Aes is asked.
        ops, place: the host's layers and memory manager.

    Raises:
        ErnieError: an option of another kind of scorer.
        CheckpointError: the file is no scorer (what it looks like), or something that it needs is missing.
    """
    if kind not in KINDS:
        raise ErnieError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    weights = read_weights(path)
    scorer = _load(
        weights, kind, backbone, backbones, tokenizer_folders, precision=precision, style=style, ops=ops, place=place
    )
    body = getattr(scorer, "backbone_key", "")
    scorer.key = f"{scorer.name}:{fingerprint(weights.tensors, precision, style, body)}"
    return scorer


def _load(
    weights: Weights,
    kind: Kind,
    backbone: Path | None,
    backbones: Iterable[Path],
    tokenizer_folders: Sequence[Path | None],
    *,
    precision: Precision | None,
    style: PromptStyle,
    ops: Any,
    place: Place,
) -> Any:
    path = weights.source
    names = set(weights.tensors)
    if is_internvl(names):
        _refuse_kind(kind, path, "ERNIE-Image-Aes")
        return load_ernie_aes(weights, precision=precision, style=style, ops=ops, place=place)
    if precision in LOW_BIT:
        raise ErnieError(
            f"precision {precision} is for ERNIE-Image-Aes; {path.name} is small: take fp32, fp16 or bf16."
        )
    chosen: Precision = precision or "fp32"
    if is_image_reward(names):
        _refuse_kind(kind, path, "ImageReward")
        return load_image_reward(weights, tokenizer_folders, precision=chosen, ops=ops, place=place)
    if is_laion_head(weights.tensors):
        _refuse_kind(kind, path, "a LAION aesthetic head")
        body = _find_backbone(weights, backbone, backbones)
        network = build_clip(body, precision=chosen, ops=ops, vision_only=True)
        scorer = LaionAesthetic(network, weights.tensors, source=path, place=place)
        scorer.backbone_key = fingerprint(body.tensors)
        return scorer
    if is_clip(names):
        folders = [weights.folder, path if path.is_dir() else path.parent, *tokenizer_folders]
        tokenizer = read_tokenizer(folders, path)
        network = build_clip(weights, precision=chosen, ops=ops)
        return ClipScorer(network, tokenizer, clip_kind(weights, kind), place=place)
    if is_clip_vision(names):
        raise CheckpointError(
            f"{path} is the picture side of a CLIP only, which scores nothing by itself: choose a LAION head (a small "
            ".pth file), and this one as its backbone, or a CLIP with its text side."
        )
    shown = ", ".join(sorted(names)[:5])
    raise CheckpointError(
        f"{path} is no scorer that is known here ({len(names)} tensors; first are {shown}). Known are ERNIE-Image-Aes "
        "and ArtiMuse (folder), LAION aesthetic heads, PickScore, HPS v2, CLIP and ImageReward. Scorers on other "
        "networks (HPS v3, UniPercept, Q-Align, SigLIP) are not supported: they need code that is not in transformers."
    )


def _refuse_kind(kind: Kind, path: Path, what: str) -> None:
    if kind != "auto":
        raise ErnieError(f"{path.name} is {what}, not {kind}; set kind to auto.")


def _find_backbone(head: Weights, backbone: Path | None, backbones: Iterable[Path]) -> Weights:
    """The CLIP that a head belongs to: as wide as the head's input."""
    wide = head_width(head.tensors)
    for path in [backbone] if backbone is not None else backbones:
        if path == head.source or (path.is_file() and path.stat().st_size <= MAX_HEAD_BYTES and backbone is None):
            continue
        try:
            body = read_weights(path)
        except CheckpointError:
            if backbone is not None:
                raise
            continue
        if backbone is not None or (is_clip_vision(body.tensors) and _features(body) == wide):
            if not is_clip_vision(body.tensors):
                raise CheckpointError(f"{path} must be a CLIP with its picture side and projection; choose another.")
            return body
    raise CheckpointError(
        f"{head.source} is the head of LAION's aesthetic predictor and needs OpenAI's CLIP ViT-L/14 ({wide} features) "
        "beside it: put clip-vit-large-patch14 into models/clip_vision, or choose a backbone."
    )


def _features(weights: Weights) -> int:
    proj = weights.tensors.get("visual.proj")
    return proj.shape[1] if proj is not None else weights.tensors["visual_projection.weight"].shape[0]
