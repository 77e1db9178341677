"""Scorers: their files, and their networks under the host's memory manager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...ernie_core.errors import ErnieError
from .models import patcher_class
from .runtime import throw_if_interrupted


def _scorer_folders() -> dict[str, Path]:
    """Shown name -> folder: where people keep scorers and CLIP."""
    import folder_paths

    models = Path(folder_paths.models_dir)
    found = {name: models / name for name in ("scorers", "aesthetic")}
    for path in reversed(folder_paths.get_folder_paths("clip_vision")):
        found["clip_vision"] = Path(path)
    return found


def list_scorers() -> list[str]:
    """Weight files and model folders (ending with "/") that may be scorers, with the name of their place in front."""
    from ...ernie_core.scoring.files import list_weights

    return [f"{place}/{name}" for place, folder in _scorer_folders().items() for name in list_weights(folder)]


def scorer_path(name: str) -> Path:
    """Where `name`, an entry of `list_scorers()`, lies.

    Raises:
        ErnieError: it is not there any more.
    """
    place, _, rest = name.partition("/")
    path = _scorer_folders().get(place, Path()) / rest
    if not rest or place not in _scorer_folders() or not path.exists():
        raise ErnieError(f"{name} is not there any more. Refresh the node list and choose again.")
    return path


def tokenizer_folders() -> list[Path]:
    """Where CLIP's tokenizer lies that the host brings along."""
    import comfy

    return [Path(next(iter(comfy.__path__))) / "sd1_tokenizer"]


def scorer_layers() -> Any:
    """Layers that the memory manager can hold in part and that compute in the type of their input."""
    import comfy.ops

    return comfy.ops.manual_cast


def place_scorer(network: torch.nn.Module) -> Callable[[], torch.device]:
    """Put a network under the host's memory manager; what is returned brings it to the device and says which."""
    import comfy.model_management as mm

    from ...ernie_core.scoring.network import LowBitLinear, bring_loose

    for module in network.modules():
        if isinstance(module, LowBitLinear):
            # By this mark the host knows layers that it may leave in main memory one by one. Without it, a card too
            # small for all of them would hold none.
            module.comfy_cast_weights = True
    held = torch.nn.Module()  # the host writes `device` on a model, which transformers' models do not allow
    held.network = network
    mm.archive_model_dtypes(held)
    patcher = patcher_class(disable_dynamic=True)(
        held, load_device=mm.get_torch_device(), offload_device=mm.text_encoder_offload_device()
    )

    def bring() -> torch.device:
        throw_if_interrupted()
        mm.load_models_gpu([patcher])
        bring_loose(network, patcher.load_device, lambda module: hasattr(module, "comfy_cast_weights"))
        return patcher.load_device

    return bring
