"""Fetching the published files from Hugging Face, only when asked: plan, check the disk, download, verify.

Layouts: the official folders of baidu/ERNIE-Image and baidu/ERNIE-Image-Turbo, and ComfyUI's single files in
Comfy-Org/ERNIE-Image. Downloads resume where they stopped (huggingface_hub keeps the part under `.cache` in the target
folder), a plan is pinned to one commit, and every file is checked against the hash that the repository states.
Needs the optional package huggingface_hub.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError, ErnieError
from .checkpoint import check_present
from .layouts import FOLDERS, SINGLE_FILE_REPOSITORY, SINGLE_FILES, TOKENIZER_FOLDERS, Kind

logger = logging.getLogger(__name__)

# Official folder layout
REPOSITORIES = ("baidu/ERNIE-Image", "baidu/ERNIE-Image-Turbo")

# Of the official folders, in GB: what can be said without asking the network
SIZES_GB: dict[Kind, float] = {"transformer": 16.07, "text_encoder": 7.7, "enhancer": 7.66, "vae": 0.17}

DEFAULT_KINDS: tuple[Kind, ...] = ("transformer", "text_encoder", "vae")
_ROOT_FILES = ("model_index.json", "LICENSE", "scheduler/scheduler_config.json")
_SUFFIXES = (".safetensors", ".json", ".jinja")
_CHUNK = 1 << 22
_NOT_FOUND = {"RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError"}

OnProgress = Callable[[int, int, str], None]
"""on_progress(bytes done, bytes in all, file); may raise to stop, and the next call goes on from there."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    path: str
    """Inside the repository, and below the target folder."""
    size: int
    """Bytes."""
    sha256: str | None = None
    """Of large files."""
    git_sha1: str | None = None
    """Git's blob id, of small ones."""


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """What would be fetched; show it before `download`."""

    repo_id: str
    revision: str
    """Commit that all files are taken from."""
    files: tuple[RemoteFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def describe(self) -> str:
        """Repository, number of files and their size, for people."""
        return f"{len(self.files)} files, {_gb(self.total_bytes)}, from {self.repo_id}"


def plan_download(repo_id: str, kinds: Iterable[Kind] = DEFAULT_KINDS) -> DownloadPlan:
    """Ask an official repository which files `kinds` need: weights, configs, tokenizers, in its newest commit.

    Raises:
        ErnieError: huggingface_hub is not installed, no network, no such repository, no permission.
        CheckpointError: the repository lacks a network that was asked for.
    """
    kinds = tuple(kinds)
    folders = {FOLDERS[kind] for kind in kinds} | {TOKENIZER_FOLDERS[k] for k in kinds if k in TOKENIZER_FOLDERS}

    def wanted(path: str) -> bool:
        folder, _, name = path.partition("/")
        return path in _ROOT_FILES or (folder in folders and "/" not in name and path.endswith(_SUFFIXES))

    revision, files = _list_files(repo_id)
    chosen = tuple(file for file in files if wanted(file.path))
    for kind in kinds:
        folder = FOLDERS[kind] + "/"
        if not any(file.path.startswith(folder) and file.path.endswith(".safetensors") for file in chosen):
            raise CheckpointError(f"{repo_id} has no weights in {folder}; choose one of {', '.join(REPOSITORIES)}.")
    return DownloadPlan(repo_id=repo_id, revision=revision, files=chosen)


def plan_single_files(paths: Iterable[str]) -> DownloadPlan:
    """Ask Comfy-Org/ERNIE-Image about some of its single files; `paths` are keys of SINGLE_FILES.

    Raises: as `plan_download`.
    """
    paths = tuple(paths)
    unknown = [path for path in paths if path not in SINGLE_FILES]
    if unknown:
        raise ErnieError(f"expected some of {', '.join(SINGLE_FILES)}, got {', '.join(unknown)}.")
    revision, files = _list_files(SINGLE_FILE_REPOSITORY)
    chosen = tuple(file for file in files if file.path in paths)
    if missing := sorted(set(paths) - {file.path for file in chosen}):
        raise CheckpointError(f"{SINGLE_FILE_REPOSITORY} no longer has {', '.join(missing)}.")
    return DownloadPlan(repo_id=SINGLE_FILE_REPOSITORY, revision=revision, files=chosen)


def download(plan: DownloadPlan, folder: Path | str, *, confirm: bool, on_progress: OnProgress | None = None) -> Path:
    """Fetch the files of a plan into `folder`, each verified; files that are there and right are not fetched again.

    `confirm` False downloads nothing and raises, with the size and the place. Returns `folder`.

    Raises:
        ErnieError: not confirmed, disk too small (nothing is fetched), no network, no permission.
        CheckpointError: a file arrived damaged; it is removed, what else arrived stays.
    """
    folder = Path(folder)
    if not confirm:
        raise ErnieError(f"nothing is downloaded unless asked for: {plan.describe()}, would go to {folder}.")
    hub = _hub()
    pending: list[RemoteFile] = []
    for file in plan.files:
        if not _is_right(folder / file.path, file):
            pending.append(file)
    done = plan.total_bytes - sum(file.size for file in pending)
    _check_disk(folder, pending)
    logger.info("downloading %d of %s to %s", len(pending), plan.describe(), folder)
    for file in pending:
        _fetch(hub, plan, file, folder, _byte_counter(on_progress, done, plan.total_bytes, file))
        if not _is_right(folder / file.path, file):
            (folder / file.path).unlink(missing_ok=True)
            raise CheckpointError(
                f"{file.path} from {plan.repo_id} arrived damaged (its hash is not the repository's) and was removed; "
                "download again, the other files are kept."
            )
        done += file.size
        if on_progress is not None:
            on_progress(done, plan.total_bytes, file.path)
    return folder


def find_or_download(
    repo_id: str,
    models_folder: Path | str,
    *,
    kinds: Iterable[Kind] = DEFAULT_KINDS,
    confirm: bool,
    on_progress: OnProgress | None = None,
) -> Path:
    """The folder of an official repository below `models_folder`, downloaded if `confirm` and not complete.

    Complete folders are recognised without the network.

    Raises:
        ErnieError: not complete and not confirmed (the message has size and place), or as `download`.
    """
    kinds = tuple(kinds)
    folder = Path(models_folder) / PurePosixPath(repo_id).name
    absent: list[Kind] = [kind for kind in kinds if not is_present(folder, kind)]
    if not absent:
        return folder
    if not confirm:
        raise ErnieError(
            f"{repo_id} is not complete in {folder}: {', '.join(FOLDERS[kind] for kind in absent)} missing. Switch "
            f"download on to fetch about {sum(SIZES_GB[kind] for kind in absent):.1f} GB, or put the files there."
        )
    return download(plan_download(repo_id, kinds), folder, confirm=True, on_progress=on_progress)


def is_present(folder: Path, kind: Kind) -> bool:
    """Whether all weight files of `kind` lie in an official folder, whole by their headers."""
    try:
        check_present(folder, kind)
    except CheckpointError:
        return False
    return (folder / "model_index.json").is_file()


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as e:
        raise ErnieError(
            "downloading needs the package huggingface_hub; pip install huggingface_hub, or download the files by hand."
        ) from e
    return huggingface_hub


def _list_files(repo_id: str) -> tuple[str, tuple[RemoteFile, ...]]:
    hub = _hub()
    try:
        info = hub.HfApi().model_info(repo_id, files_metadata=True)
    except (OSError, ValueError, hub.errors.HTTPError) as e:
        raise ErnieError(_explain(e, repo_id)) from e
    files = []
    for entry in info.siblings or []:
        large = entry.lfs is not None
        files.append(
            RemoteFile(
                path=entry.rfilename,
                size=int(entry.size or 0),
                sha256=entry.lfs["sha256"] if large else None,
                git_sha1=None if large else entry.blob_id,
            )
        )
    return info.sha, tuple(files)


def _explain(error: Exception, repo_id: str) -> str:
    """What a failed request means, in plain words."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    names = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in names or status == 403:
        return f"Hugging Face refuses access to {repo_id}: accept its terms there, then log in with `hf auth login`."
    if status == 401 and "RepositoryNotFoundError" not in names:
        return f"Hugging Face does not accept the access token for {repo_id} (401); log in with `hf auth login`."
    if "LocalEntryNotFoundError" not in names and names & _NOT_FOUND:
        return f"Hugging Face has no {repo_id}, or not this file of it, or it is private: {_first_line(error)}"
    if "OfflineModeIsEnabled" in names:
        return f"huggingface_hub is in offline mode (HF_HUB_OFFLINE), so {repo_id} cannot be fetched; unset it."
    if status is not None and status >= 400:
        return f"Hugging Face answered {status} for {repo_id}; try again later. {_first_line(error)}"
    return (
        f"no connection to Hugging Face for {repo_id} ({_first_line(error)}); check the network, then run again: "
        "a download goes on where it stopped."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_disk(folder: Path, pending: Iterable[RemoteFile]) -> None:
    parts = folder / ".cache" / "huggingface" / "download"
    fetched = sum(part.stat().st_size for part in parts.rglob("*.incomplete")) if parts.is_dir() else 0
    needed = max(0, sum(file.size for file in pending) - fetched)
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ErnieError(f"the download needs {_gb(needed)} in {folder}, but only {_gb(free)} are free there.")


def _fetch(hub: Any, plan: DownloadPlan, file: RemoteFile, folder: Path, counter: Callable[[int], None] | None) -> None:
    extra: dict[str, Any] = {}
    # older versions cannot report bytes; then there is one report per file
    if counter is not None and "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:
        extra["tqdm_class"] = _reporting_bar(hub, counter)
    try:
        hub.hf_hub_download(plan.repo_id, file.path, revision=plan.revision, local_dir=folder, **extra)
    except (OSError, hub.errors.HTTPError) as e:
        if getattr(e, "errno", None) == 28:
            raise ErnieError(
                f"the disk became full while {file.path} ({_gb(file.size)}) was fetched to {folder}."
            ) from e
        raise ErnieError(_explain(e, plan.repo_id)) from e


def _byte_counter(
    on_progress: OnProgress | None, done: int, total: int, file: RemoteFile
) -> Callable[[int], None] | None:
    if on_progress is None:
        return None
    return lambda fetched: on_progress(done + min(fetched, file.size), total, file.path)


def _reporting_bar(hub: Any, counter: Callable[[int], None]) -> type:
    """A progress bar class for huggingface_hub that reports bytes to `counter` and draws nothing."""

    class ReportingBar(hub.utils.tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            self.fetched = int(kwargs.get("initial") or 0)
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            self.fetched += int(n or 0)
            counter(self.fetched)
            return super().update(n)

    return ReportingBar


def _is_right(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256 is None and file.git_sha1 is None:
        return True
    digest = hashlib.sha256()
    if file.sha256 is None:  # git's blob id
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.git_sha1)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
