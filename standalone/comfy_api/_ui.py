"""What a node shows when it is done. Pictures are files; `standalone.host` decides where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import host
from ._io import FolderType


class SavedResult(dict):
    """One file, as the host's answer names it."""

    def __init__(self, filename: str, subfolder: str, type: FolderType) -> None:
        super().__init__(filename=filename, subfolder=subfolder, type=FolderType(type).value)


class SavedImages:
    """Files that a node has written."""

    def __init__(self, results: list[SavedResult], is_animated: bool = False) -> None:
        self.results = results
        self.is_animated = is_animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.results} | ({"animated": (True,)} if self.is_animated else {})


class ImageSaveHelper:
    """Writes image batches as PNG files with the prompt and the workflow inside."""

    @staticmethod
    def save_images(images: Any, filename_prefix: str, folder_type: FolderType, cls: Any) -> list[SavedResult]:
        folder = host.output_folder() if folder_type == FolderType.output else host.preview_folder()
        hidden = getattr(cls, "hidden", None)
        paths = host.save_images(
            images,
            folder=folder,
            prefix=filename_prefix,
            prompt=getattr(hidden, "prompt", None),
            extra_pnginfo=getattr(hidden, "extra_pnginfo", None),
        )
        return [SavedResult(p.name, _subfolder(p, folder), folder_type) for p in paths]

    @staticmethod
    def get_save_images_ui(images: Any, filename_prefix: str, cls: Any) -> SavedImages:
        saved = ImageSaveHelper.save_images(images, filename_prefix, FolderType.output, cls)
        return SavedImages(saved)


def _subfolder(path: Path, folder: Path) -> str:
    relative = path.parent.relative_to(folder).as_posix()
    return "" if relative == "." else relative


class PreviewImage:
    """Pictures for a look; here they are kept, in the `preview` folder beside the results."""

    def __init__(self, image: Any, animated: bool = False, cls: Any = None) -> None:
        self.values = ImageSaveHelper.save_images(image, "preview", FolderType.temp, cls)
        self.animated = animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.values, "animated": (self.animated,)}


class PreviewMask(PreviewImage):
    """A mask as a grey picture."""

    def __init__(self, mask: Any, animated: bool = False, cls: Any = None) -> None:
        grey = mask.reshape((-1, *mask.shape[-2:], 1)).expand(-1, -1, -1, 3)
        super().__init__(grey, animated, cls)


class PreviewText:
    """Text for a look."""

    def __init__(self, value: str) -> None:
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}
