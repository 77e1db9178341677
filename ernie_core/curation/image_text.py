"""Models that put pictures and sentences into one space: CLIP, SigLIP, SigLIP 2 and what else transformers knows.

CLIP is built by `scoring.clip_based`, so that every file a scorer is read from (transformers' names or open_clip's)
works here; the others come through transformers' AutoModel and AutoProcessor from a local folder, never with code of
the folder's own. What is compared is scale * cos(picture, sentence) with the model's own learned scale; SigLIP's bias
is the same for every sentence and leaves a softmax over sentences as it is.

Shape letters: B pictures or sentences, D features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, ErnieError
from ..scoring.clip_based import Prompts, build_clip, image_features, is_clip, prepare_cropped, read_tokenizer
from ..scoring.network import DTYPES, Place, Precision, Weights, fingerprint, read_weights, require_transformers, stay

logger = logging.getLogger(__name__)

CACHE_RULES = 1  # raise it when the same text gives other features


class ImageText(Protocol):
    """What a loaded model gives; features are fp32, of length 1."""

    scale: float
    """What cosines are multiplied by: exp(logit_scale)."""
    bias: float
    """What is added then: SigLIP's logit_bias, else 0."""

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[B, D] on the CPU, of RGB pictures of any size."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[B, D] on the CPU."""
        ...


def model_key(path: Path, precision: Precision) -> str:
    """Changes with the weights, their precision and the folder's settings; nothing is loaded.

    Raises CheckpointError: not there, or damaged.
    """
    weights = read_weights(path)
    return fingerprint(weights.tensors, precision, _settings(weights))


def _settings(weights: Weights) -> str:
    """Contents of the small files that decide how pictures and sentences are prepared."""
    folder = weights.folder
    if folder is None:
        return ""
    names = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
    digest = hashlib.sha256()
    for name in (*names, "tokenizer.json", "vocab.json", "merges.txt", "spiece.model"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def load_image_text(
    path: Path,
    *,
    precision: Precision = "fp32",
    device: str | None = None,
    tokenizer_folders: Sequence[Path | None] = (),
    place: Place = stay,
) -> ImageText:
    """The model in a local file or folder.

    Args:
        precision: fp32, bf16 or fp16.
        device: where it runs; None = where it lies, or as `place` says.
        tokenizer_folders: where CLIP's tokenizer is looked for, after the model's own folder.
        place: the host's memory manager.

    Raises:
        ErnieError: a precision that it cannot have.
        CheckpointError: damaged, or a model that does not compare pictures with sentences (what it is).
    """
    if precision not in DTYPES:
        raise ErnieError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}.")
    weights = read_weights(path)
    if is_clip(weights.tensors):
        folder = path if path.is_dir() else path.parent
        tokenizer = read_tokenizer([weights.folder, folder, *tokenizer_folders], path)
        network = build_clip(weights, precision=precision)
        return _Clip(network if device is None else network.to(device), tokenizer, place)
    if weights.folder is None or not weights.config:
        raise CheckpointError(
            f"{path} is no CLIP; other models that compare pictures with sentences are read from their folder, with "
            "config.json and the tokenizer beside the weights."
        )
    return _load_auto(weights.folder, precision, device, place)


def _load_auto(folder: Path, precision: Precision, device: str | None, place: Place) -> ImageText:
    transformers = require_transformers()
    local: Any = {"local_files_only": True, "trust_remote_code": False}
    try:
        network = transformers.AutoModel.from_pretrained(str(folder), dtype=DTYPES[precision], **local)
        processor = transformers.AutoProcessor.from_pretrained(str(folder), **local)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
        raise CheckpointError(
            f"{folder} cannot be loaded as a model that compares pictures with sentences (CLIP, SigLIP, SigLIP 2): "
            f"{first_line(e)}"
        ) from e
    if not all(hasattr(network, name) for name in ("get_image_features", "get_text_features", "logit_scale")):
        raise CheckpointError(
            f"{folder} is {type(network).__name__}, which does not compare pictures with sentences; choose a CLIP, "
            "SigLIP or SigLIP 2 folder."
        )
    network.eval().requires_grad_(False)
    return _Auto(network if device is None else network.to(device), processor, place)


def first_line(error: Exception) -> str:
    """The first line of a message that has something in it; the error's kind where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _Clip:
    bias = 0.0

    def __init__(self, network: Any, tokenizer: Any, place: Place):
        self.network = network
        self.scale = float(network.logit_scale.detach().float().exp())
        self.prompts = Prompts(network, tokenizer)
        self.side_px = int(network.config.vision_config.image_size)
        self._bring = place(network)

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([prepare_cropped(np.asarray(p.convert("RGB")), self.side_px) for p in pictures])
        device = self._bring()
        return image_features(self.network, pixels.to(device, self.network.visual_projection.weight.dtype)).cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.prompts.features(texts, self._bring()).float().cpu()


class _Auto:
    def __init__(self, network: Any, processor: Any, place: Place):
        self.network = network
        self.processor = processor
        self.scale = float(network.logit_scale.detach().float().exp())
        bias = getattr(network, "logit_bias", None)
        self.bias = 0.0 if bias is None else float(bias.detach().float())
        self.length = int(network.config.text_config.max_position_embeddings)
        self._bring = place(network)

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        made = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        return self._features(self.network.get_image_features, made)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        # SigLIP was trained on sentences padded to its full length, without a mask
        options: Any = {"padding": "max_length", "truncation": True, "max_length": self.length}
        return self._features(
            self.network.get_text_features, self.processor(text=list(texts), return_tensors="pt", **options)
        )

    def _features(self, function: Any, inputs: Any) -> Tensor:
        device = self._bring()
        dtype = self.network.dtype
        given = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
        made = function(**given)
        made = made if isinstance(made, Tensor) else made.pooler_output  # transformers 5 gives the whole output
        return F.normalize(made.float(), dim=-1).cpu()


# --- sentences, kept on the disk --------------------------------------------------------------------------------------


class TextFeatures:
    """Features of sentences by one model, in one file of `folder`; only those that it lacks are computed.

    The file is replaced whole, so that it can be read and stopped at any time. One that is damaged costs a warning
    and is made anew; a folder that cannot be written costs a warning only.
    """

    def __init__(self, folder: Path, key: str):
        """`key`: of the model, from `model_key`."""
        self.path = folder / f"{key}-{CACHE_RULES}.safetensors"

    def features(self, model: ImageText, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """fp32 [B, D], one row per text."""
        known = self._read()
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        if missing:
            made = [model.texts(part).numpy() for part in _parts(missing, batch_size)]
            known |= dict(zip(missing, np.concatenate(made), strict=True))
            self._write(known)
        return np.stack([known[text] for text in texts])

    def covers(self, texts: Sequence[str]) -> bool:
        """Whether none of these would have to be computed."""
        return set(texts) <= self._read().keys()

    def _read(self) -> dict[str, np.ndarray]:
        if not self.path.is_file():
            return {}
        try:
            tensors = load_file(str(self.path))
            texts = json.loads(bytes(tensors["texts"].numpy()).decode("utf-8"))
            return dict(zip(texts, tensors["features"].numpy(), strict=True))
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            logger.warning("the kept features in %s cannot be read (%s): they are made anew", self.path, e)
            return {}

    def _write(self, known: dict[str, np.ndarray]) -> None:
        texts = np.frombuffer(json.dumps(list(known)).encode(), dtype=np.uint8).copy()
        features = torch.from_numpy(np.stack(list(known.values())))
        partial = self.path.with_suffix(f".{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({"texts": torch.from_numpy(texts), "features": features}, str(partial))
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, SafetensorError) as e:  # a full disk
            logger.warning("the features could not be kept in %s (%s): the next run makes them anew", self.path, e)


def _parts(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
