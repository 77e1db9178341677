"""What a run was made with: `run.json` beside its pictures, from which any single one can be made again.

It holds every row with its settings, the graph that made them, versions, and fingerprints of the model files. A run
that asks for other rows or another graph keeps the earlier file as `run_<hash>.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .batch import Row, read_manifest_entries
from .errors import ErnieError

RUN = "run.json"
FORMAT = 1
_BLOCK, _BLOCKS = 65_536, 64


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as its file tells it."""

    rows: Sequence[Mapping[str, Any]]
    """Settings of each row, as `Row.settings` gives them; read one by one with `row`."""
    node: str | None
    """Id of the node that made it."""
    prompt: Mapping[str, Any] | None
    """The graph in API format; None where the host hid it."""
    made_with: Mapping[str, str]
    """Versions and device, such as {"torch": "2.13.0"}."""
    models: Sequence[Mapping[str, Any]]
    """{kind, name, size, sample} of each model file: `fingerprint_file`."""

    def row(self, number: int) -> Row:
        """Row `number`, counted from 1.

        Raises:
            ErnieError: there is no such row, or it was written by another version of the pack.
        """
        if not 1 <= number <= len(self.rows):
            raise ErnieError(f"this run has rows 1 to {len(self.rows)}; row {number} is none of them.")
        return Row.from_settings(self.rows[number - 1])


def describe_machine(device: str) -> dict[str, str]:
    """What, besides the settings, decides the last bit of a picture."""
    import torch

    from . import VERSION

    return {
        "pack": VERSION,
        "torch": torch.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def fingerprint_file(path: Path) -> dict[str, Any]:
    """{size, sample}: the size, and a sha256 of the size and of 64 pieces of 64 KiB spread over the file.

    It tells one model from another in a moment; it does not see a change between the pieces. Of a folder, it covers
    the .safetensors files in it.
    """
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    digest, total = hashlib.sha256(), 0
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for start in sorted({i * max(0, size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)}):
                f.seek(start)
                digest.update(f.read(_BLOCK))
    return {"size": total, "sample": digest.hexdigest()}


def write_run(folder: Path, run: Run) -> Path:
    """Write `run.json`, whole or not at all; an earlier one of other content is kept under another name.

    Raises:
        ErnieError: the disk is full or the folder cannot be written to.
    """
    values = {
        "format": FORMAT,
        "made_with": run.made_with,
        "models": run.models,
        "node": run.node,
        "prompt": run.prompt,
        "rows": run.rows,
    }
    data = (json.dumps(values, ensure_ascii=False) + "\n").encode()
    path = folder / RUN
    part = folder / f".{RUN}.part"
    try:
        before = path.read_bytes() if path.exists() else data
        if before != data:
            os.replace(path, folder / f"run_{hashlib.sha256(before).hexdigest()[:12]}.json")
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ErnieError(f"{path} could not be written ({e.strerror or e}). Free some space and run again.") from e
    finally:
        part.unlink(missing_ok=True)
    return path


def read_run(path: Path) -> Run:
    """A run's file, or that of a run's folder.

    Raises:
        ErnieError: it is missing, damaged, or of a newer version of the pack.
    """
    path = path / RUN if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ErnieError(f"{path} has format {values['format']}, this pack reads format {FORMAT}: update the pack.")
        names = ("rows", "node", "prompt", "made_with", "models")
        return Run(**{name: values[name] for name in names})
    except OSError as e:
        raise ErnieError(
            f"{path} cannot be read ({e.strerror or e}). A batch or grid writes it into its folder."
        ) from e
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, ErnieError):
            raise
        raise ErnieError(f"{path} is not the file of a run ({type(e).__name__}: {e}). Give the run.json of one.") from e


def recorded_pixels(folder: Path, row: Row) -> str | None:
    """The pixels' hash that the run wrote down for a row; None where it was not finished."""
    return next((e.get("pixels") for e in read_manifest_entries(folder) if e["hash"] == row.hash), None)


def differences(run: Run, made_with: Mapping[str, str], models: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is not as it was when the run was made: each may change the last bits of a picture, or all of it."""
    now = {(m["kind"], m["name"]): m["sample"] for m in models}
    changed = {name: was for name, was in run.made_with.items() if made_with.get(name) != was}
    found = [f"{name} was {was}, is {made_with.get(name)}" for name, was in changed.items()]
    for model in run.models:
        key = (model["kind"], model["name"])
        if key in now and now[key] != model["sample"]:
            found.append(f"the file {model['name']} is not the one that it was")
    return found
