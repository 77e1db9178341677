"""Features of pictures for distances, by a vision model from a local folder, kept by the hash of the file.

Any model of transformers that pools a picture into one vector will do (CLIP, SigLIP, DINOv2, ViT, ResNet, ConvNeXt;
Inception and others of timm through transformers' timm wrapper), prepared as its own preprocessor_config.json says; a
single file must be a CLIP. The vectors are raw: of no set length. A model is loaded whole or refused: a pooling layer
that the file lacks would be random numbers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError, ErnieError
from ..scoring.clip_based import build_clip, is_clip_vision, prepare_cropped
from ..scoring.files import list_pictures
from ..scoring.network import Place, fingerprint, read_weights, require_transformers, stay
from ..scoring.store import open_store, writing
from ..training.pictures import load_image
from .distances import Distances, compare

DEFAULT_BATCH = 16
_PREPROCESSING = "preprocessor_config.json"
_READ_AT_ONCE = 500  # rows of the cache; SQLite takes at most 999 values in a statement

_SCHEMA = """
CREATE TABLE features(
    model TEXT NOT NULL, picture TEXT NOT NULL, vector BLOB NOT NULL, PRIMARY KEY(model, picture)) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class FeatureModel:
    """Turns pictures into vectors."""

    name: str
    key: str
    """Changes with weights and preprocessing: equal keys give equal vectors."""
    run: Callable[[Sequence[np.ndarray]], np.ndarray]
    """uint8 [H, W, 3] of any sizes -> float32 [B, D]"""


@dataclass(frozen=True, kw_only=True)
class FolderFeatures:
    """What a folder's pictures look like to a model."""

    folder: Path
    files: tuple[Path, ...]
    features_ND: np.ndarray
    """float32, a row per file."""
    problems: tuple[str, ...]
    """A line per picture that could not be used, and one about pictures that are there several times."""
    num_kept: int = 0
    """Pictures whose features were known from an earlier run."""


# --- models -------------------------------------------------------------------------------------------------------


def load_feature_model(path: Path, *, place: Place = stay) -> FeatureModel:
    """The model in a folder with config.json, weights and preprocessor_config.json, or in a CLIP's file, in fp32.

    `place`: the host's memory manager.

    Raises:
        CheckpointError: no such model, weights that are missing, or nothing that pools a picture into one vector.
    """
    if path.is_dir() and (path / _PREPROCESSING).is_file():
        return _load_pretrained(path, place)
    weights = read_weights(path)
    if not is_clip_vision(weights.tensors):
        lacks = f"no {_PREPROCESSING}" if path.is_dir() else "no vision tower of CLIP"
        raise CheckpointError(
            f"{path} must be a folder of a vision model with config.json, its weights and {_PREPROCESSING}, or a "
            f"CLIP's file; it has {lacks}. Take the whole folder as its authors publish it."
        )
    network = build_clip(weights, vision_only=True)
    side = network.config.image_size
    bring = place(network)

    def run(pictures: Sequence[np.ndarray]) -> np.ndarray:
        pixels_BCHW = torch.stack([prepare_cropped(picture, side) for picture in pictures]).to(bring())
        hidden = network.vision_model(pixel_values=pixels_BCHW).pooler_output
        return network.visual_projection(hidden).float().cpu().numpy()

    return FeatureModel(name=path.name, key=fingerprint(weights.tensors, "cropped", side), run=_in_order(run))


def _load_pretrained(path: Path, place: Place) -> FeatureModel:
    transformers = require_transformers()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(str(path), backend="pil", **local)
        network, told = transformers.AutoModel.from_pretrained(
            str(path), dtype=torch.float32, output_loading_info=True, **local
        )
    except Exception as e:  # transformers raises whatever its readers raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{path} cannot be loaded as a vision model: {reason}") from e
    missing = sorted(told["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of the model are not in its files ({', '.join(missing[:5])}); their "
            "values would be random. Take the folder of the whole model, not of a part or a head."
        )
    network.eval().requires_grad_(False)
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    key = fingerprint(network.state_dict(), settings)
    bring = place(network)

    def run(pictures: Sequence[np.ndarray]) -> np.ndarray:
        pixels_BCHW = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(bring())
        if hasattr(network, "get_image_features"):
            found = network.get_image_features(pixel_values=pixels_BCHW)
        else:
            found = network(pixel_values=pixels_BCHW)
        pooled = found if isinstance(found, torch.Tensor) else getattr(found, "pooler_output", None)
        if pooled is None:
            raise CheckpointError(
                f"{path.name} ({type(network).__name__}) pools nothing: a model whose output has one vector per "
                "picture is needed, such as CLIP, SigLIP, DINOv2 or a ResNet."
            )
        return pooled.flatten(1).float().cpu().numpy()

    return FeatureModel(name=path.name, key=key, run=_in_order(run))


def _in_order(run: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """`run` without gradients, its numbers checked."""

    @torch.inference_mode()
    def checked(pictures: Sequence[np.ndarray]) -> np.ndarray:
        found = run(pictures)
        if not np.isfinite(found).all():
            raise ErnieError("the model gave features that are NaN or infinite; its weights are damaged.")
        return found.astype(np.float32)

    return checked


# --- folders ------------------------------------------------------------------------------------------------------


def read_features(
    folder: Path,
    model: FeatureModel,
    *,
    cache: Path | None = None,
    batch_size: int = DEFAULT_BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> FolderFeatures:
    """Features of all pictures in a folder and below, in the order of their paths.

    Args:
        cache: a file that keeps them by the hash of a picture's bytes and the model; written after every batch, so that
            an interrupted run goes on where it was. None = nothing is kept.
        on_progress: called with (pictures done, of how many); may raise to stop.

    Raises:
        ErnieError: no such folder, not one usable picture, or the cache cannot be written.
    """
    if batch_size < 1:
        raise ErnieError(f"batch_size must be 1 or more, got {batch_size}.")
    files = list_pictures(folder)
    problems: list[str] = []
    hashes: dict[Path, str] = {}
    for path in files:
        try:
            hashes[path] = _hash_file(path)
        except OSError as e:
            problems.append(f"{path.relative_to(folder)}: cannot be read ({e.strerror or e})")
    known = _read_cache(cache, model.key, set(hashes.values()))
    num_kept = sum(digest in known for digest in hashes.values())
    todo = {digest: path for path, digest in reversed(hashes.items()) if digest not in known}  # the first of each
    order = [digest for digest in dict.fromkeys(hashes.values()) if digest in todo]
    bad: dict[str, str] = {}
    for batch in _iter_batches(order, todo, batch_size, bad):
        digests, pictures = zip(*batch, strict=True)
        made = dict(zip(digests, model.run(pictures), strict=True))
        _write_cache(cache, model.key, made)
        known |= made
        if on_progress is not None:
            on_progress(sum(digest in known or digest in bad for digest in hashes.values()), len(files))
    problems += [f"{path.relative_to(folder)}: {bad[digest]}" for path, digest in hashes.items() if digest in bad]
    used = [path for path, digest in hashes.items() if digest in known]
    if not used:
        raise ErnieError(f"none of {len(files)} pictures in {folder} could be read ({'; '.join(problems[:5])}).")
    copies = sum(count - 1 for count in Counter(hashes[path] for path in used).values())
    if copies:
        problems.append(f"{copies} pictures are the same file as another one and count again")
    return FolderFeatures(
        folder=folder,
        files=tuple(used),
        features_ND=np.stack([known[hashes[path]] for path in used]),
        problems=tuple(problems),
        num_kept=num_kept,
    )


def _iter_batches(
    order: Sequence[str], files: dict[str, Path], size: int, bad: dict[str, str]
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Batches of (hash, picture); what cannot be decoded goes into `bad` with its reason."""
    waiting: list[tuple[str, np.ndarray]] = []
    for digest in order:
        try:
            waiting.append((digest, load_image(files[digest]).rgb_HWC))
        except ErnieError as e:
            bad[digest] = str(e)
            continue
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_cache(cache: Path | None, model: str, pictures: set[str]) -> dict[str, np.ndarray]:
    if cache is None or not cache.exists():
        return {}
    found: dict[str, np.ndarray] = {}
    wanted = sorted(pictures)
    with open_store(cache, _SCHEMA, version=1, what="features") as store:
        for start in range(0, len(wanted), _READ_AT_ONCE):
            part = wanted[start : start + _READ_AT_ONCE]
            query = f"SELECT picture, vector FROM features WHERE model=? AND picture IN ({','.join('?' * len(part))})"
            for picture, vector in store.execute(query, (model, *part)):
                found[picture] = np.frombuffer(vector, np.float32)
    return found


def _write_cache(cache: Path | None, model: str, made: dict[str, np.ndarray]) -> None:
    if cache is None:
        return
    with open_store(cache, _SCHEMA, version=1, what="features") as store, writing(store):
        store.executemany(
            "INSERT OR REPLACE INTO features VALUES(?,?,?)",
            [(model, picture, vector.tobytes()) for picture, vector in made.items()],
        )


# --- two folders --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FolderDistance:
    """How far two folders are apart."""

    model: str
    first: FolderFeatures
    second: FolderFeatures
    distances: Distances

    def report(self) -> str:
        """The numbers with what they rest on, warnings, and pictures that could not be used."""
        d = self.distances
        lines = [
            f"{self.first.folder.name} ({d.num_first} pictures) against {self.second.folder.name} ({d.num_second})",
            f"features: {d.num_features} of {self.model}",
            f"FID {d.fid:.6g}",
            f"CMMD {d.cmmd:.6g} (unbiased); {d.cmmd_published:.6g} as published code computes it",
            *(f"warning: {text}" for text in d.warnings()),
        ]
        for side in (self.first, self.second):
            lines += [f"{side.folder.name}: {problem}" for problem in side.problems]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Every number, both folders and every problem."""
        told = {
            "model": self.model,
            "first": str(self.first.folder),
            "second": str(self.second.folder),
            **asdict(self.distances),
            "warnings": self.distances.warnings(),
            "problems": {str(side.folder): side.problems for side in (self.first, self.second)},
        }
        return json.dumps(told, ensure_ascii=False, indent=1) + "\n"


def measure_folders(
    first: Path,
    second: Path,
    model: FeatureModel,
    *,
    cache: Path | None = None,
    batch_size: int = DEFAULT_BATCH,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> FolderDistance:
    """FID and CMMD between the pictures of two folders.

    Args:
        on_progress: called with (what is done, how much, of how much); may raise to stop.

    Raises:
        ErnieError: what `read_features` and `distances.compare` raise; or both are the same folder.
    """
    if first.resolve() == second.resolve():
        raise ErnieError(f"both folders are {first}: give two different ones.")

    def tell(what: str) -> Callable[[int, int], None] | None:
        return None if on_progress is None else functools.partial(on_progress, what)

    sides = [
        read_features(folder, model, cache=cache, batch_size=batch_size, on_progress=tell(f"features of {folder.name}"))
        for folder in (first, second)
    ]
    found = compare(sides[0].features_ND, sides[1].features_ND, on_block=tell("CMMD"))
    return FolderDistance(model=model.name, first=sides[0], second=sides[1], distances=found)
