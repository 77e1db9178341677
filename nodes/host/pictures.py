"""Writing pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from ...ernie_core.errors import ErnieError


def save_png(image_HWC: Tensor, path: Path, *, prompt, extra_pnginfo, entries: dict[str, str]) -> None:
    """Write a PNG with its workflow inside, whole or not at all.

    Raises:
        ErnieError: the disk is full or the folder cannot be written to.
    """
    from comfy.cli_args import args
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if not args.disable_metadata:
        host_entries = {"prompt": prompt, **(extra_pnginfo or {})}
        texts = {k: json.dumps(v) for k, v in host_entries.items() if v is not None} | entries
        for key, text in texts.items():
            info.add_text(key, text)
    pixels = (image_HWC.clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as f:
            Image.fromarray(pixels).save(f, format="PNG", pnginfo=info, compress_level=4)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ErnieError(
            f"{path} could not be written ({e.strerror or e}). Free some space or choose another folder."
        ) from e
    finally:
        part.unlink(missing_ok=True)
