"""The job folder: the single truth about a training run, and what survives a kill at any byte.

    recipe.json              what the run computes
    manifest.jsonl           its data
    cache/                   latents, text features, reference errors
    checkpoints/step-000250/ lora.safetensors (to use), state.safetensors + state.json (to go on from)
    latest.json              the newest whole checkpoint and the hashes of its files
    progress.jsonl           one line per step and event, in order
    metrics.csv, samples/    for people
    lock, stop               held by the running process; there while it is asked to stop
    NAME.safetensors         the finished LoRA

A checkpoint is written under a temporary name, flushed to the disk, read back and compared, and only then renamed;
`latest.json` follows, and only then do old checkpoints go. Whatever moment a process dies at, one whole checkpoint is
there and is found.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ErnieError
from ..file_lock import try_lock
from ..weights.checkpoint import write_safetensors
from .recipe import Recipe, recipe_from_dict

logger = logging.getLogger(__name__)

_METRICS = ("step", "loss", "lr", "grad_norm", "seconds", "samples")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One whole, verified checkpoint."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def lora_path(self) -> Path:
        return self.path / "lora.safetensors"


class Job:
    """A job folder. Making one touches nothing; `create` and `lock` write."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.recipe_path = self.folder / "recipe.json"
        self.manifest_path = self.folder / "manifest.jsonl"
        self.progress_path = self.folder / "progress.jsonl"
        self.cache_folder = self.folder / "cache"
        self.samples_folder = self.folder / "samples"
        self.log_path = self.folder / "worker.log"
        self._checkpoints = self.folder / "checkpoints"
        self._latest = self.folder / "latest.json"
        self._lock = self.folder / "lock"
        self._stop = self.folder / "stop"

    # --- recipe ---

    def exists(self) -> bool:
        return self.recipe_path.is_file()

    def write_recipe(self, recipe: Recipe) -> None:
        """Keep `recipe`; a job that has trained already takes only one that computes the same.

        Raises:
            ErnieError: the job has checkpoints of a recipe that computes something else.
        """
        if self.exists() and self.newest_step() is not None:
            old, new = self.recipe(), recipe
            if old.hash() != new.hash():
                changed = [k for k, v in new.to_dict().items() if old.to_dict()[k] != v]
                raise ErnieError(
                    f"the job {self.folder.name} has trained {self.newest_step()} steps with other settings "
                    f"(changed: {', '.join(changed)}). Give the job a new name, or start it over."
                )
        write_text(self.recipe_path, json.dumps(recipe.to_dict(), indent=1))

    def recipe(self) -> Recipe:
        """Raises ErnieError when the folder is no job or its recipe is damaged."""
        try:
            return recipe_from_dict(json.loads(self.recipe_path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ErnieError(f"{self.folder} is not a training job: it has no recipe.json.") from None
        except json.JSONDecodeError as e:
            raise ErnieError(f"{self.recipe_path} is damaged: {e}.") from e

    # --- one process at a time ---

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; the system releases it however the process ends.

        Raises:
            ErnieError: another process trains in this folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a+b") as file:
            # Whoever asks `is_running` holds the lock for an instant: one refusal proves nothing.
            if not any(try_lock(file) or time.sleep(0.05) for _ in range(20)):
                raise ErnieError(f"another process is training in {self.folder}: attach to it, or stop it first.")
            self._stop.unlink(missing_ok=True)
            yield

    def is_running(self) -> bool:
        """Whether a process holds the folder now."""
        if not self._lock.exists():
            return False
        with self._lock.open("a+b") as file:
            return not try_lock(file)

    def request_stop(self) -> None:
        """Ask the running process to save and end after the step it is at."""
        self._stop.touch()

    def stop_requested(self) -> bool:
        return self._stop.exists()

    # --- events ---

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one line to progress.jsonl; a step also to metrics.csv."""
        line = json.dumps({**event, "time": round(time.time(), 3)}, separators=(",", ":"))
        with self.progress_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if event["event"] == "step":
            path = self.folder / "metrics.csv"
            new = not path.exists()
            with path.open("a", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow([*_METRICS, "more"])
                more = {k: v for k, v in event.items() if k not in (*_METRICS, "event")}
                writer.writerow([*(event.get(k) for k in _METRICS), json.dumps(more)])

    def events(self) -> list[dict[str, Any]]:
        """Every event so far; a line that was cut off by a kill is left out."""
        if not self.progress_path.exists():
            return []
        found = []
        for line in self.progress_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def rewind_events(self, step: int) -> None:
        """Forget what was logged beyond `step`, from where the run goes on."""
        kept = [e for e in self.events() if e.get("step", 0) <= step]
        write_text(self.progress_path, "".join(json.dumps(e, separators=(",", ":")) + "\n" for e in kept))
        (self.folder / "metrics.csv").unlink(missing_ok=True)
        steps = [e for e in kept if e["event"] == "step"]
        if steps:
            with (self.folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([*_METRICS, "more"])
                for e in steps:
                    more = {k: v for k, v in e.items() if k not in (*_METRICS, "event", "time")}
                    writer.writerow([*(e.get(k) for k in _METRICS), json.dumps(more)])

    # --- checkpoints ---

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint by name, without reading it; None before the first."""
        steps = self._steps()
        return steps[-1] if steps else None

    def _steps(self) -> list[int]:
        if not self._checkpoints.is_dir():
            return []
        return sorted(int(p.name.removeprefix("step-")) for p in self._checkpoints.glob("step-*") if p.is_dir())

    @property
    def lora_path(self) -> Path:
        """The finished LoRA; not there before the run's end."""
        return self.folder / f"{self.recipe().name}.safetensors"

    def checkpoint_path(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:06d}"

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        write_lora: Callable[[Path], None],
        *,
        keep: int,
    ) -> Path:
        """Write, verify and publish the checkpoint of `step`; keep `keep` older ones. Returns its folder.

        Args:
            tensors, values: the state to go on from.
            write_lora: writes the LoRA file to the path it gets and checks it (see trainer).

        Raises:
            ErnieError: the disk is full, or what was read back is not what was written; older checkpoints stay.
        """
        final = self.checkpoint_path(step)
        part = self._checkpoints / f".{final.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            write_lora(part / "lora.safetensors")
            state = part / "state.safetensors"
            write_safetensors(dict(tensors), state)
            _compare(state, tensors)
            hashes = {p.name: file_hash(p) for p in (part / "lora.safetensors", state)}
            write_text(part / "state.json", json.dumps({**values, "step": step, "files": hashes}))
            _sync(part)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            _sync(self._checkpoints)
        except OSError as e:
            raise ErnieError(
                f"the checkpoint of step {step} could not be written ({e.strerror or e}). "
                "The checkpoints before it are whole: free some space and resume."
            ) from e
        finally:
            shutil.rmtree(part, ignore_errors=True)
        write_text(self._latest, json.dumps({"step": step, "state": file_hash(final / "state.json")}))
        for old in self._steps()[: -(keep + 1)]:
            shutil.rmtree(self.checkpoint_path(old), ignore_errors=True)
        return final

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None before the first; a damaged one is named in the log and passed over.

        Raises:
            ErnieError: there are checkpoints and none of them is whole.
        """
        steps = self._steps()
        for step in reversed(steps):
            path = self.checkpoint_path(step)
            try:
                return self._read(path, step)
            except (OSError, ValueError, KeyError) as e:
                logger.warning("The checkpoint %s is damaged (%s); the one before it is used.", path, e)
        if steps:
            raise ErnieError(f"none of the {len(steps)} checkpoints in {self._checkpoints} is whole: start over.")
        return None

    def _read(self, path: Path, step: int) -> Checkpoint:
        from safetensors.torch import load_file

        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if values["step"] != step:
            raise ValueError(f"it is of step {values['step']}")
        for name, wanted in values["files"].items():
            if file_hash(path / name) != wanted:
                raise ValueError(f"{name} is not what was written")
        return Checkpoint(path=path, step=step, tensors=load_file(path / "state.safetensors"), values=values)

    def start_over(self) -> None:
        """Delete checkpoints, samples and the log; recipe, data and caches stay.

        Raises:
            ErnieError: a process trains in this folder.
        """
        with self.lock():
            for folder in (self._checkpoints, self.samples_folder, self.folder / "tensorboard"):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self._latest, self.progress_path, self.folder / "metrics.csv"):
                file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ErnieError(f"{path} cannot be written: {e.strerror or e}. Nothing was changed.") from e
    finally:
        part.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ErnieError unless the file holds exactly `tensors`, bit by bit (NaN equals NaN)."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        same = set(file.keys()) == set(tensors)
        for name, tensor in tensors.items() if same else ():
            read, wanted = file.get_tensor(name), tensor.detach().cpu()
            same = same and read.dtype == wanted.dtype and read.shape == wanted.shape
            same = same and torch.equal(_bits(read), _bits(wanted))
    if not same:
        raise ErnieError(f"{path.name} reads back different from what was written: the disk may be failing.")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sync(folder: Path) -> None:
    """Make the renames inside a folder survive a power cut; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
