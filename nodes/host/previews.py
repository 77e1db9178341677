"""Pictures for the page to show, gone with the session."""

from __future__ import annotations

import uuid
from pathlib import Path

from torch import Tensor

from .pictures import save_png
from .runtime import throw_if_interrupted


def preview_images(images_BHWC: Tensor) -> list[dict[str, str]]:
    """Write pictures in [0, 1] into the host's temp folder; {filename, subfolder, type} of each, as /view takes them.

    Raises:
        ErnieError: the disk is full.
    """
    import folder_paths

    folder, batch = Path(folder_paths.get_temp_directory()), uuid.uuid4().hex[:12]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, image in enumerate(images_BHWC):
        throw_if_interrupted()
        name = f"ernie_{batch}_{i:05}.png"
        save_png(image, folder / name, prompt=None, extra_pnginfo=None, entries={})
        files.append({"filename": name, "subfolder": "", "type": "temp"})
    return files
