"""Picture files as upright sRGB: EXIF rotation, ICC profiles, alpha, palettes, CMYK, 16 bit, animations.

Whatever is done to a picture beyond decoding is said in `LoadedImage.notes`; what cannot be decoded whole is an
ErnieError with the reason, so that a dataset can list it. `RULES` names this behaviour in cache keys: change it when a
change here gives other pixels.

Shape letters: H, W pixels, C = 3 colours.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ..errors import ErnieError

logger = logging.getLogger(__name__)

RULES = "1: EXIF upright, ICC to sRGB, first frame, 16 bit / 257"
Alpha = Literal["matte", "mask"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".tga")
# Formats that people keep pictures in and that Pillow cannot open by itself: listed as pictures that cannot be used.
UNREADABLE_SUFFIXES = (".heic", ".heif", ".jxl", ".psd", ".raw", ".dng", ".cr2", ".nef", ".svg")

# What Pillow's decoders raise on damaged files, besides OSError (which UnidentifiedImageError is).
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, ArithmeticError),
    *(struct.error, zlib.error, MemoryError, Image.DecompressionBombError),
)


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """One decoded picture, upright, in sRGB."""

    rgb_HWC: np.ndarray
    """uint8; transparent parts are laid on the matte colour."""
    alpha_HW: np.ndarray | None
    """uint8, 255 = opaque; None where the file has no transparency, or none that shows."""
    notes: tuple[str, ...]
    """What was done to it, for people."""
    format: str
    """What the bytes are, as Pillow names it: PNG, JPEG, ..."""
    orientation: int
    """EXIF tag 274 of the file, 1 to 8; 1 = it lay upright."""

    @property
    def width(self) -> int:
        return self.rgb_HWC.shape[1]

    @property
    def height(self) -> int:
        return self.rgb_HWC.shape[0]


def load_image(source: Path | str | bytes, *, matte: tuple[int, int, int] = (255, 255, 255)) -> LoadedImage:
    """Decode a picture file (or its bytes) completely.

    Args:
        source: path, or the file's content.
        matte: the colour (0-255) under transparent parts.

    Raises:
        ErnieError: empty, truncated or no picture, too large to be one, or a pixel format without a known range.
    """
    notes: list[str] = []
    name = "the picture" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as e:
        raise ErnieError(f"{name} cannot be read ({e.strerror or e}).") from e
    if not data:
        raise ErnieError(f"{name} is an empty file (0 bytes).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and of size; both are handled or raised here
            with Image.open(io.BytesIO(data)) as file:
                frames = getattr(file, "n_frames", 1)
                if frames > 1 and file.format != "MPO":  # MPO: a phone's JPEG with a preview behind it
                    notes.append(f"has {frames} frames; the first is used")
                file.seek(0)
                file.load()
                image, alpha = _to_srgb(file, notes)
                orientation = _read_orientation(file, notes)
                image, alpha = _upright(image, alpha, orientation)
                kind = file.format or ""
                rgb_HWC = np.asarray(image, dtype=np.uint8)
    except ErnieError as e:
        raise ErnieError(f"{name} {e}") from e
    except DECODE_ERRORS as e:
        raise ErnieError(f"{name} cannot be decoded ({_reason(e)}).") from e
    alpha_HW = None if alpha is None else np.asarray(alpha, dtype=np.uint8)
    facts: dict[str, Any] = {"notes": tuple(notes), "format": kind, "orientation": orientation}
    if alpha_HW is None or alpha_HW.min() == 255:
        return LoadedImage(rgb_HWC=rgb_HWC, alpha_HW=None, **facts)
    weight = alpha_HW[..., None].astype(np.float32) / 255
    flat = rgb_HWC * weight + np.asarray(matte, dtype=np.float32) * (1 - weight)
    return LoadedImage(rgb_HWC=np.rint(flat).astype(np.uint8), alpha_HW=alpha_HW, **facts)


def load_mask(path: Path) -> np.ndarray:
    """A mask file as uint8 [H, W], upright: its brightness times its own alpha; 255 = full weight.

    Raises ErnieError as `load_image` does.
    """
    loaded = load_image(path, matte=(0, 0, 0))  # so that transparent counts as masked out
    return np.asarray(Image.fromarray(loaded.rgb_HWC).convert("L"))


def _reason(error: Exception | MemoryError) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no picture, or of a kind that Pillow cannot read"
    return str(error) or type(error).__name__


def _to_srgb(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """(RGB, alpha or None) of one frame, still as it lies in the file."""
    alpha: Image.Image | None = None
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image, notes)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if image.mode not in ("LA", "La") or not image.info.get("icc_profile"):
            image = rgba.convert("RGB")
        else:
            image = image.convert("L")
    elif image.mode in ("P", "1", "YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    profile = image.info.get("icc_profile")
    if profile:
        image = _apply_profile(image, profile, notes)
    if image.mode == "CMYK":
        notes.append("is CMYK without a usable profile; converted by formula")
    elif image.mode == "LAB":
        raise ErnieError("is in Lab colours without a usable profile; save it as RGB.")
    return image if image.mode == "RGB" else image.convert("RGB"), alpha


def _to_eight_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """A grey picture of 16 or 32 bits per pixel as mode L; 16 bits keep their scale (65535 = white)."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (np.isfinite(values).all() and low >= 0 and high <= 1):
            raise ErnieError(
                f"holds floating-point values from {low:g} to {high:g}, not 0 to 1; save it as 8 or 16 bit."
            )
        notes.append("holds floating-point values; 1 counts as white")
        values = values * 255
    else:
        if low < 0 or high > 65535:
            raise ErnieError(f"holds whole numbers from {low:g} to {high:g}, not 0 to 65535; save it as 8 or 16 bit.")
        notes.append("is 16-bit grey; scaled to 8 bit")
        values = values / 257
    grey = Image.fromarray(np.rint(values).astype(np.uint8))
    grey.info = {k: v for k, v in image.info.items() if k == "icc_profile"}
    return grey


def _apply_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """`image` in sRGB by its embedded profile; a profile that cannot be used is noted and left out."""
    try:
        from PIL import ImageCms
    except ImportError:
        notes.append("has a colour profile that this Pillow cannot apply (built without littlecms)")
        return image
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in (ImageCms.getProfileDescription(source) or ""):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as e:
        notes.append(f"has a colour profile that cannot be applied ({e}); left out")
        return image
    return image if converted is None else converted


def _read_orientation(file: Image.Image, notes: list[str]) -> int:
    """EXIF tag 274, 1 where there is none or none that is known."""
    try:
        orientation = file.getexif().get(0x0112, 1)
    except DECODE_ERRORS as e:
        notes.append(f"has EXIF data that cannot be read ({_reason(e)}); not rotated")
        return 1
    return orientation if orientation in range(2, 9) else 1


def _upright(image: Image.Image, alpha: Image.Image | None, orientation: int) -> tuple[Image.Image, Image.Image | None]:
    if orientation == 1:
        return image, alpha

    def turn(picture: Image.Image) -> Image.Image:
        plain = Image.fromarray(np.asarray(picture))
        plain.getexif()[0x0112] = orientation
        return ImageOps.exif_transpose(plain)

    return turn(image), alpha if alpha is None else turn(alpha)


def perceptual_hash(rgb_HWC: np.ndarray) -> str:
    """38 hex digits: 128 bits of brightness differences (8x8, rightwards and downwards) and the mean colour.

    Compare with `near_duplicates`. Rescaling and recompressing leave almost all bits alone; a flat area gives zeros, as
    only differences above one grey level count.
    """
    grey = Image.fromarray(rgb_HWC).convert("L").resize((9, 9), Image.Resampling.BOX, reducing_gap=3.0)
    values = np.asarray(grey, dtype=np.int16)
    right = values[:8, 1:] > values[:8, :-1] + 1
    down = values[1:, :8] > values[:-1, :8] + 1
    bits = np.packbits(np.concatenate([right.ravel(), down.ravel()]))
    totals = rgb_HWC.sum(axis=0, dtype=np.uint32).sum(axis=0, dtype=np.uint64)  # whole rows at once: 16 times faster
    mean = np.rint(totals / (rgb_HWC.shape[0] * rgb_HWC.shape[1])).astype(np.uint8)
    return bits.tobytes().hex() + mean.tobytes().hex()


def near_duplicates(hashes: list[str], *, max_bits: int = 6, max_colour: int = 6) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of perceptual hashes that differ in at most `max_bits` of 128 and `max_colour` levels."""
    if len(hashes) < 2:
        return []
    rows = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), 19)
    signs = np.unpackbits(rows[:, :16], axis=1).astype(np.float32) * 2 - 1
    colours = rows[:, 16:].astype(np.int16)
    found: list[tuple[int, int]] = []
    for start in range(0, len(hashes), 512):  # blocks, so that memory stays small for tens of thousands of pictures
        distance = (128 - signs[start : start + 512] @ signs.T) / 2
        for i, j in np.argwhere(distance <= max_bits):
            first, second = int(i) + start, int(j)
            if first < second and np.abs(colours[first] - colours[second]).max() <= max_colour:
                found.append((first, second))
    return found
