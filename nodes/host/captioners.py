"""Vision-language models: where people keep their folders."""

from __future__ import annotations

from pathlib import Path

from ...ernie_core.errors import ErnieError

PLACES = ("captioners", "LLM", "VLM")


def list_captioners() -> list[str]:
    """Model folders (ending with "/") that may describe pictures, with the name of their place in front."""
    import folder_paths

    from ...ernie_core.scoring.files import list_weights

    models = Path(folder_paths.models_dir)
    return [f"{place}/{name}" for place in PLACES for name in list_weights(models / place) if name.endswith("/")]


def captioner_path(name: str) -> Path:
    """Where `name`, an entry of `list_captioners()`, lies.

    Raises:
        ErnieError: it is not there any more.
    """
    import folder_paths

    path = Path(folder_paths.models_dir) / name
    if name.partition("/")[0] not in PLACES or not path.is_dir():
        raise ErnieError(f"{name} is not there any more. Refresh the node list and choose again.")
    return path
