"""Where models, inputs, outputs and people's work lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...ernie_core.errors import ErnieError


def models_folder() -> Path:
    """Where downloaded official folders go: models/ernie."""
    import folder_paths

    return Path(folder_paths.models_dir) / "ernie"


def output_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory())


def input_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_input_directory())


def user_folder() -> Path:
    """Where people's judgments are kept: user/__ernie_image (the host never serves names that begin with __)."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "__ernie_image"


def picture_folders() -> list[Path]:
    """Folders whose pictures may be shown to the browser: input, output, and ernie_images of extra_model_paths.yaml."""
    import folder_paths

    paths, _ = folder_paths.folder_names_and_paths.get("ernie_images", ([], set()))
    return [input_folder(), output_folder(), *map(Path, paths)]


def jobs_folder() -> Path:
    """Where training jobs are kept: output/ernie_jobs."""
    return output_folder() / "ernie_jobs"


def loras_folder() -> Path:
    """Where a finished LoRA goes: the first of the host's LoRA folders."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("loras")[0])


def checkpoints_folder() -> Path:
    """Where a merged transformer goes: models/diffusion_models, else the first of the host's folders for these."""
    import folder_paths

    folders = [Path(p) for p in folder_paths.get_folder_paths("diffusion_models")]  # models/unet comes first
    return next((folder for folder in folders if folder.name == "diffusion_models"), folders[0])


def list_loras() -> list[str]:
    """File names in the host's LoRA folders."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """Where `name`, an entry of `list_loras()`, lies.

    Raises:
        ErnieError: it is not there any more.
    """
    import folder_paths

    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ErnieError(f"{name} is not in models/loras any more. Refresh the node list and choose again.")
    return Path(path)


def _official_folders(kind: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of folders in the official layout, up to two levels below the host's model folders."""
    import folder_paths

    roots = [Path(p) for p in folder_paths.get_folder_paths(kind)]
    roots += [models_folder(), Path(folder_paths.models_dir) / "diffusers"]
    for root in dict.fromkeys(roots):
        if not root.is_dir():
            continue
        whole = [p.parent for pattern in ("*/", "*/*/") for p in root.glob(f"{pattern}model_index.json")]
        parts = [
            p.parent
            for pattern in ("*/", "*/*/")
            for p in root.glob(f"{pattern}config.json")
            if not any(p.is_relative_to(w) for w in whole) and any(p.parent.glob("*.safetensors"))
        ]
        for path in sorted(whole + parts):
            yield f"{path.relative_to(root).as_posix()}/", path


def list_models(kind: str) -> list[str]:
    """File names of a model folder of the host, then official folders (ending with "/")."""
    import folder_paths

    folders = dict(_official_folders(kind))
    files = [n for n in folder_paths.get_filename_list(kind) if not n.replace(os.sep, "/").startswith(tuple(folders))]
    return [*files, *folders]


def model_path(kind: str, name: str) -> Path:
    """Where `name`, an entry of `list_models(kind)`, lies.

    Raises:
        ErnieError: it is not there any more.
    """
    import folder_paths

    if name.endswith("/"):
        path = dict(reversed(list(_official_folders(kind)))).get(name)
    else:
        path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ErnieError(f"{name} is not in the model folder {kind} any more. Refresh the node list and choose again.")
    return Path(path)
