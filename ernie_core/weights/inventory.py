"""What model files are, by their headers alone: which network, in which numbers, how large. No tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checkpoint import component_files, read_entries
from .layouts import (
    KINDS,
    NAMES,
    TOKENIZER_FOLDERS,
    Kind,
    Shape,
    find_foreign_quantisation,
    find_prefix,
    identify,
    to_our_names,
)
from .quantise import is_companion

# safetensors' dtype names -> ours and bytes per number
_DTYPES = {
    "F64": "fp32",
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "I8": "int8",
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """One network in one file or folder."""

    name: str
    kind: Kind
    format: str
    """fp32, bf16, fp16, fp8, int8, nvfp4, mxfp8, nf4, or other: that of most of its bytes."""
    bytes: int
    """Of all its tensors, scales included; other networks and a vision tower in the file are not counted."""
    shapes: Mapping[str, Shape]
    """Under our names, as stored."""

    @property
    def turbo(self) -> bool:
        """Whether a transformer is the Turbo one, which only its name says."""
        return "turbo" in self.name.lower()


def look(name: str, path: Path, kinds: Iterable[Kind]) -> list[Found]:
    """The networks of these kinds in a file or official folder.

    A language model in a file whose tensors do not tell is a prompt enhancer if its name says so.

    Raises:
        CheckpointError: not there, damaged, another format, or none of these networks (what it looks like).
    """
    found: list[Found] = []
    refused: CheckpointError | None = None
    for kind in kinds:
        try:
            files = [p for p in component_files(path, kind) if p.suffix == ".safetensors"]
            made = _describe(name, kind, files)
        except CheckpointError as e:
            refused = e
            continue
        if made is not None:
            found.append(made)
    if len(found) == 2 and path.is_file() and all(f.kind in TOKENIZER_FOLDERS for f in found):
        role = "enhancer" if "enhancer" in name.lower() else "text_encoder"  # nothing in the file tells them apart
        return [f for f in found if f.kind == role]
    if found:
        return found
    if refused is not None:
        raise refused
    shapes = {key: tuple(entry["shape"]) for key, entry in _entries(path).items()}
    wanted = " or ".join(NAMES[kind] for kind in kinds)
    raise CheckpointError(f"{name} looks like {identify(shapes).description}, not {wanted}.")


def look_at_all(files: Iterable[tuple[str, Path, tuple[Kind, ...]]]) -> tuple[list[Found], list[str]]:
    """(networks, why the other files are none) of (name, path, kinds); a file named twice counts once."""
    found: dict[tuple[Kind, Path], Found] = {}
    problems: list[str] = []
    for name, path, kinds in files:
        try:
            found |= {(each.kind, path.resolve()): each for each in look(name, path, kinds)}
        except CheckpointError as e:
            problems.append(str(e))
    return list(found.values()), problems


def look_everywhere(paths: Iterable[Path]) -> tuple[list[Found], list[str]]:
    """As `look_at_all`, of files, official folders and folders with files (all levels below)."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; choose a file or folder that does.")
        official = [p.parent for p in path.rglob("model_index.json")] if path.is_dir() else []
        loose = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        files += [*official, *(p for p in loose if not any(p.is_relative_to(folder) for folder in official))]
    return look_at_all((p.name, p, KINDS) for p in files)


def _entries(path: Path) -> dict[str, Any]:
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return {key: entry for file in files for key, entry in read_entries(file)[0].items()}


def _describe(name: str, kind: Kind, files: Iterable[Path]) -> Found | None:
    entries: dict[str, Any] = {}
    for file in files:
        entries |= read_entries(file)[0]
    shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
    prefix = find_prefix(shapes, kind)
    if prefix is None or kind not in identify(shapes).kinds:
        return None
    ours, _ = to_our_names(entries, kind, prefix)
    sizes: Counter[str] = Counter()
    for key in ours.values():
        entry = entries[key]
        sizes[str(entry["dtype"])] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return Found(
        name=name,
        kind=kind,
        format=_format(sizes, ours),
        bytes=sum(sizes.values()),
        shapes={n: shapes[key] for n, key in ours.items() if not is_companion(n)},
    )


def _format(sizes: Counter[str], names: Iterable[str]) -> str:
    """The numbers that most bytes are in; packed formats have uint8 weights and are told by what lies beside them."""
    names = list(names)
    foreign = find_foreign_quantisation(names)
    if foreign is not None:
        return "nf4" if foreign.startswith("bitsandbytes") else "other"
    most = sizes.most_common(1)[0][0] if sizes else ""
    if most == "U8":
        return "nvfp4" if any(name.endswith("weight_scale_2") for name in names) else "other"
    if most.startswith("F8") and any("E8M0" in dtype for dtype in sizes):
        return "mxfp8"
    return _DTYPES.get(most, "other")
