"""Latents and text features on disk, one safetensors file per entry, named by a hash of everything that decides them.

A key holds the picture's bytes (SHA-256), how it is decoded, matte and alpha, crop, size, mask and the VAE; or the
exact text and the text encoder with its tokenizer. When one of them changes the key changes, and the old entry is never
read. Each entry carries its key, compared on reading. Files are written whole or not at all, so an interrupted build
goes on where it stopped; a truncated file counts as missing.

Networks are identified by the SHA-256 of all their files' bytes. Sampling a few bytes would be faster, but would not
see a change confined to one embedding row, and modification times change when a folder is copied. A full hash of the
8 GB text encoder takes seconds, once: with `memo` it is remembered by path, size and time.

Shape letters: C latent channels; H, W latent grid; T text tokens; D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import SIZE_MULTIPLE
from ..errors import ErnieError
from ..model.text_encoder import Rope
from ..model.vae import VAE
from ..weights.checkpoint import component_files, write_safetensors
from ..weights.layouts import Kind
from .buckets import Picture
from .items import DatasetOptions, OnProgress, write_whole
from .pictures import RULES, load_image, load_mask

logger = logging.getLogger(__name__)
T = TypeVar("T", Picture, str)

VERSION = 1
"""Of the entries' content; raise it when the code computes something else from the same key."""
TEXT_LAYER = "before the last layer, no final norm"


# --- what networks are --------------------------------------------------------------------------------------


def component_hash(path: Path | str, kind: Kind, *, memo: Path | None = None) -> str:
    """SHA-256 (hex) over all files of a network: weights, config.json and, for a text encoder, the tokenizer.

    Copying the files does not change it; renaming shards does.

    Args:
        path: as `checkpoint.read_component` takes it.
        kind: which network.
        memo: JSON file that keeps hashes by path, size and modification time, so that large files are read once.
    """
    known: dict[str, str] = {}
    if memo is not None and memo.is_file():
        try:
            known = {str(k): str(v) for k, v in json.loads(memo.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError):
            logger.warning("%s could not be read; the files are hashed again", memo)
    digest, fresh = hashlib.sha256(), False
    for file in component_files(path, kind):
        state = file.stat()
        mark = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
        if mark not in known:
            known[mark] = _hash_file(file)
            fresh = True
        digest.update(f"{file.name} {known[mark]}\n".encode())
    if memo is not None and fresh:
        write_whole(memo, json.dumps(known, indent=1).encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def module_hash(module: nn.Module) -> str:
    """SHA-256 (hex) of a loaded network's weights: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vae_key(path: Path | str, *, dtype: torch.dtype, memo: Path | None = None) -> str:
    """What identifies a VAE in cache keys: its files and the dtype that it runs in."""
    return f"{component_hash(path, 'vae', memo=memo)} {dtype}"


def encoder_key(path: Path | str, *, dtype: torch.dtype, rope: Rope = "yarn", memo: Path | None = None) -> str:
    """What identifies a text encoder in cache keys: its files, tokenizer, dtype, rope and the layer that is taken."""
    return f"{component_hash(path, 'text_encoder', memo=memo)} {dtype} {rope} {TEXT_LAYER}"


# --- entries ------------------------------------------------------------------------------------------------


def entry_name(key: str) -> str:
    """The file name, without its ending, of the entry of `key`."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_whole_entry(path: Path, key: str) -> bool:
    """Whether an entry is there, not truncated, and made for `key`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("key") == key
    except (OSError, SafetensorError):
        return False


def read_entry(path: Path, key: str, name: str, what: str) -> Tensor | None:
    """Tensor `name` of the entry at `path`, made for `key`; None where it has none. `what` names it in errors.

    Raises:
        ErnieError: it is missing, damaged or made for something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                # A copy: the tensor maps the file, which then could not be replaced on Windows.
                return file.get_tensor(name).clone() if name in file.keys() else None  # noqa: SIM118  no container
        reason = "belongs to something else"
    except FileNotFoundError:
        reason = "is missing"
    except (OSError, SafetensorError) as e:
        reason = f"is damaged ({e})"
    raise ErnieError(f"the cache entry {path} of {what} {reason}. Start the job again: it is made anew.")


class LatentCache:
    """Latents and masks of pictures, as the VAE makes them."""

    def __init__(
        self,
        folder: Path | str,
        *,
        vae: str,
        options: DatasetOptions | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """Open `folder`; nothing is read or written yet.

        Args:
            folder: made when the first entry is written.
            vae: what identifies the VAE, see `vae_key`.
            options: for alpha and matte.
            dtype: of stored latents; float32, or bfloat16 for half the disk.
        """
        self.folder = Path(folder)
        self.vae, self.options, self.dtype = vae, options or DatasetOptions(), dtype

    def key(self, picture: Picture) -> str:
        """Everything that decides the entry, as JSON."""
        item, fit = picture.item, picture.fit
        if not item.sha256:
            raise ErnieError(f"{item.image} has not been read yet; only items of a read dataset can be cached.")
        alpha = self.options.alpha_of(item)
        masked = bool(item.mask_sha256) or alpha == "mask"
        values: dict[str, Any] = {
            "version": VERSION,
            "image": item.sha256,
            "decoded": RULES,
            "alpha": alpha,
            "matte": list(self.options.matte),
            "box": [round(v, 6) for v in fit.box],
            "size": [fit.width, fit.height],
            "mask": item.mask_sha256,
            "mask_floor": item.mask_floor if masked else 0,
            "vae": self.vae,
            "dtype": str(self.dtype),
        }
        return json.dumps(values, sort_keys=True)

    def path(self, picture: Picture) -> Path:
        """The file that the entry lies in."""
        name = entry_name(self.key(picture))
        return self.folder / "latents" / name[:2] / f"{name}.safetensors"

    def has(self, picture: Picture) -> bool:
        """Whether the entry is there and whole."""
        return is_whole_entry(self.path(picture), self.key(picture))

    def missing(self, pictures: Iterable[Picture]) -> list[Picture]:
        """Those of `pictures` that have no whole entry; when there are none, the VAE need not be loaded."""
        return [picture for picture in pictures if not self.has(picture)]

    def latent(self, picture: Picture) -> Tensor:
        """Normalised latent [C, H, W] (posterior mean), as stored. ErnieError: missing or damaged."""
        latent = read_entry(self.path(picture), self.key(picture), "latent", str(picture.item.image))
        assert latent is not None
        return latent

    def mask(self, picture: Picture) -> Tensor | None:
        """Loss weights [H, W] in [0, 1], fp32, averaged over each latent cell; None = the whole picture counts."""
        return read_entry(self.path(picture), self.key(picture), "mask", str(picture.item.image))


class TextCache:
    """Text features at their true length."""

    def __init__(self, folder: Path | str, *, encoder: str, dtype: torch.dtype | None = None):
        """Open `folder`; nothing is read or written yet.

        Args:
            folder: made when the first entry is written.
            encoder: what identifies text encoder and tokenizer, see `encoder_key`.
            dtype: of stored features; None = as computed.
        """
        self.folder = Path(folder)
        self.encoder, self.dtype = encoder, dtype

    def key(self, text: str) -> str:
        """Everything that decides the entry, as JSON."""
        values = {"version": VERSION, "text": text, "encoder": self.encoder, "dtype": str(self.dtype)}
        return json.dumps(values, sort_keys=True)

    def path(self, text: str) -> Path:
        """The file that the entry lies in."""
        name = entry_name(self.key(text))
        return self.folder / "texts" / name[:2] / f"{name}.safetensors"

    def has(self, text: str) -> bool:
        """Whether the entry is there and whole."""
        return is_whole_entry(self.path(text), self.key(text))

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those of `texts`, and of the empty prompt, that have no whole entry."""
        return [text for text in dict.fromkeys(["", *texts]) if not self.has(text)]

    def text(self, text: str) -> Tensor:
        """Features [T, D] of `text`, as stored. ErnieError: missing or damaged."""
        features = read_entry(self.path(text), self.key(text), "text", repr(text[:60]))
        assert features is not None
        return features


# --- building -----------------------------------------------------------------------------------------------


def load_picture(picture: Picture, options: DatasetOptions) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels uint8 [height, width, 3], weights float32 [height / 16, width / 16] or None) as they are trained.

    Raises:
        ErnieError: the file cannot be decoded, or is not the one that the dataset was read from.
    """
    item, fit = picture.item, picture.fit
    try:
        data = item.image.read_bytes()
    except OSError as e:
        raise ErnieError(f"{item.image} cannot be read any more ({e.strerror or e}).") from e
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise ErnieError(f"{item.image} has changed since the dataset was read. Read the dataset again.")
    try:
        loaded = load_image(data, matte=options.matte)
    except ErnieError as e:
        raise ErnieError(f"{item.image}: {e}") from e
    resized = Image.fromarray(loaded.rgb_HWC).resize(
        (fit.width, fit.height), Image.Resampling.LANCZOS, box=_inside(fit.box, loaded.width, loaded.height)
    )
    weights: list[np.ndarray] = []
    if item.mask is not None:
        try:
            same = hashlib.sha256(item.mask.read_bytes()).hexdigest() == item.mask_sha256
        except OSError as e:
            raise ErnieError(f"the mask {item.mask} cannot be read any more ({e.strerror or e}).") from e
        if not same:
            raise ErnieError(f"the mask {item.mask} has changed since the dataset was read. Read the dataset again.")
        weights.append(load_mask(item.mask))
    if options.alpha_of(item) == "mask" and loaded.alpha_HW is not None:
        weights.append(loaded.alpha_HW)
    if not weights:
        return np.asarray(resized), None
    total = np.ones((fit.height // SIZE_MULTIPLE, fit.width // SIZE_MULTIPLE), dtype=np.float32)
    for weight in weights:
        total *= _shrink(weight, picture)
    return np.asarray(resized), item.mask_floor + (1 - item.mask_floor) * total


def _inside(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """`box` without the last bits of rounding that would put it outside the picture."""
    return max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)


def _shrink(weight: np.ndarray, picture: Picture) -> np.ndarray:
    """Weights in [0, 1] of each latent cell: the mean of the mask below it."""
    height, width = weight.shape
    x, y = width / picture.fit.source[0], height / picture.fit.source[1]
    left, top, right, bottom = picture.fit.box
    cells = (picture.fit.width // SIZE_MULTIPLE, picture.fit.height // SIZE_MULTIPLE)
    box = _inside((left * x, top * y, right * x, bottom * y), width, height)
    image = Image.fromarray(weight.astype(np.float32) / 255)
    return np.asarray(image.resize(cells, Image.Resampling.BOX, box=box)).clip(0, 1)


@torch.no_grad()
def build_latents(
    cache: LatentCache, pictures: Iterable[Picture], vae: VAE, *, on_progress: OnProgress | None = None
) -> int:
    """Make the entries that are missing; returns how many.

    Each picture is encoded alone, so an entry does not depend on its neighbours. `on_progress(done, total, what)` is
    called before each and at the end, and may raise to stop: what is done stays.

    Raises:
        ErnieError: a picture that has changed or cannot be decoded, a latent that is not finite, or a full disk.
    """
    weight = vae.quant_conv.weight

    def make(picture: Picture) -> None:
        pixels_HWC, mask_HW = load_picture(picture, cache.options)
        image = torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1)[None].to(weight.device).float() / 127.5 - 1
        latent = vae.encode(image.to(weight.dtype).contiguous(memory_format=torch.channels_last))[0].float().cpu()
        if not latent.isfinite().all():
            raise ErnieError(f"the VAE made NaN or infinity of {picture.item.image}; run it in bfloat16 or float32.")
        tensors = {"latent": latent.to(cache.dtype)}
        if mask_HW is not None:
            tensors["mask"] = torch.from_numpy(np.ascontiguousarray(mask_HW, dtype=np.float32))
        write_safetensors(tensors, cache.path(picture), metadata={"key": cache.key(picture)})

    return _build(cache.missing(pictures), make, "encoding pictures", on_progress)


@torch.no_grad()
def build_texts(
    cache: TextCache,
    texts: Iterable[str],
    encode: Callable[[Sequence[str]], list[Tensor]],
    *,
    on_progress: OnProgress | None = None,
) -> int:
    """Make the entries that are missing, that of the empty prompt always; returns how many.

    Args:
        cache: where they go.
        texts: as `captions.all_texts` gives them.
        encode: texts to features [T_i, D] at true length, such as `Pipeline.encode`; called with one text at a time.
        on_progress: as for `build_latents`.

    Raises:
        ErnieError: features that are not finite, or a full disk.
    """

    def make(text: str) -> None:
        features = encode([text])[0].detach().cpu()
        if not features.isfinite().all():
            raise ErnieError(f"the text encoder made NaN or infinity of {text[:60]!r}; run it in bfloat16 or float32.")
        write_safetensors(
            {"text": features.to(cache.dtype or features.dtype)}, cache.path(text), metadata={"key": cache.key(text)}
        )

    return _build(cache.missing(texts), make, "encoding captions", on_progress)


def _build(things: list[T], make: Callable[[T], None], what: str, on_progress: OnProgress | None) -> int:
    for number, thing in enumerate(things):
        if on_progress is not None:
            on_progress(number, len(things), what)
        make(thing)
    if on_progress is not None:
        on_progress(len(things), len(things), what)
    return len(things)
