"""Reading the released networks from files and folders, building them, and writing them back.

`read_component` finds one network in a single safetensors file (bare, prefixed, or a full checkpoint), in an official
folder, or in one of its sub-folders, sharded or not, and checks every name and shape from the file's header before any
weight is read. Tensors are views of the memory-mapped file: a file is read once, and only as far as it is used. The
`build_*` functions assign them to modules that were made on the meta device, so no weight exists twice.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..config import DiTConfig, VAEConfig
from ..errors import CheckpointError, ErnieError
from ..model.dit import DiT
from ..model.enhancer import Enhancer
from ..model.text_encoder import Rope, TextEncoder, Tokenizer
from ..model.vae import VAE
from .layouts import (
    FOLDERS,
    KINDS,
    NAMES,
    PREFIXES,
    SINGLE_FILES,
    TEKKEN_KEY,
    TOKENIZER_FOLDERS,
    Kind,
    Shape,
    find_foreign_quantisation,
    find_prefix,
    find_tekken,
    identify,
    is_vae_attention,
    language_model_role,
    text_config,
    text_shapes,
    to_our_names,
    vae_to_bfl,
)
from .quantise import (
    METADATA_KEY,
    LayerQuantisation,
    dequantise,
    is_companion,
    read_quantisation,
    stored_columns,
    to_comfy_layout,
)

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)

CONFIG_KEY = "config"  # safetensors metadata that holds config.json, in single files that this pack writes
_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_SHOWN = 5  # names shown of each list in an error


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network as read: complete, its names and shapes checked, not built yet."""

    kind: Kind
    config: dict[str, Any]
    """config.json of the network (of a text encoder, its text_config), every size checked against the weights."""
    state_dict: dict[str, Tensor]
    """Weights under our names, as stored; views of the file. Scales and markers are in `quantisation`."""
    tokenizer: str | bytes | None = None
    """Text of a tokenizer.json, or bytes of a tekken.json; None where the kind or the file has none."""
    source: Path
    quantisation: dict[str, LayerQuantisation] | None = None
    """Per quantised layer; None = plain weights."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The file's own."""


# --- files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    shapes: dict[str, Shape]
    metadata: dict[str, str]


_DISGUISES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "this is a Git LFS pointer, download the file itself"),
    (b"PK\x03\x04", "this is a zip archive or PyTorch checkpoint (.ckpt, .pt); convert it to safetensors"),
    (b"\x80", "this is a Python pickle (.ckpt, .pt), which can run code; convert it to safetensors"),
    (b"GGUF", "GGUF is not supported by this loader yet; use a GGUF pack's loader"),
    (b"<!DOCTYPE", "this is a web page, not the file; the download went wrong, repeat it"),
    (b"<!doctype", "this is a web page, not the file; the download went wrong, repeat it"),
    (b"<html", "this is a web page, not the file; the download went wrong, repeat it"),
    (b"<?xml", "this is a web page, not the file; the download went wrong, repeat it"),
)


def read_header(path: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """({key: shape}, metadata) of a safetensors file; raises as `read_entries` does."""
    entries, metadata = read_entries(path)
    return {key: tuple(entry["shape"]) for key, entry in entries.items()}, metadata


def read_entries(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({key: {dtype, shape, data_offsets}}, metadata) of a safetensors file, after checking that the file is whole.

    Raises:
        CheckpointError: no such file, empty, truncated, or another format (which one, and what to do).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            disguise = next((what for magic, what in _DISGUISES if start.lstrip().startswith(magic)), None)
            if size == 0:
                raise CheckpointError(f"{path} is empty (0 bytes); download it again.")
            if start[8:9] != b"{" and disguise is not None:
                raise CheckpointError(f"{path} is not a safetensors file: {disguise}.")
            if start[8:9] != b"{":
                raise CheckpointError(
                    f"{path} is not a safetensors file, whatever its name says; download it again, or choose another."
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}; download it again."
                )
            file.seek(8)
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if any(not isinstance(entry[part], str | list) for entry in header.values() for part in ("shape", "dtype")):
                raise TypeError("a tensor without shape or dtype")
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}.") from e
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: its header is damaged ({e}); download it again."
        ) from e
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: its header promises {end} bytes, the file has {size}; download it again."
        )
    return header, metadata


def _open_file(path: Path) -> _File:
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{path}: GGUF is not supported by this loader yet; use a GGUF pack's loader.")
    shapes, metadata = read_header(path)
    return _File(path=path, shapes=shapes, metadata=metadata)


def _read_tensors(files: Iterable[_File], wanted: set[str]) -> dict[str, Tensor]:
    """The tensors of these keys, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in files:
        keys = [key for key in file.shapes if key in wanted]
        try:
            with safe_open(str(file.path), framework="pt", device="cpu") as reader:
                tensors |= {key: reader.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file.path} cannot be read: {e}; download it again.") from e
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON: {e}; download it again.") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def _open_folder(folder: Path) -> list[_File]:
    """Every weight file of one sub-folder: one file, or the shards its index names."""
    for stem in _WEIGHT_NAMES:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _open_shards(index)
        if (folder / f"{stem}.safetensors").is_file():
            return [_open_file(folder / f"{stem}.safetensors")]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return [_open_file(found[0])]
    if not found:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".ckpt", ".gguf"))
        hint = f" (only {', '.join(others[:_SHOWN])}, which is not read)" if others else ""
        raise CheckpointError(f"{folder} has no .safetensors file{hint}; download the folder again.")
    raise CheckpointError(
        f"{folder} has {len(found)} .safetensors files and no index that says which belong together "
        f"({', '.join(p.name for p in found[:_SHOWN])}); choose one of them."
    )


def _open_shards(index: Path) -> list[_File]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no weight_map; download it again.")
    names = sorted(set(where.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent}: {len(absent)} of {len(names)} shards are missing: {_some(absent)}; download them."
        )
    files = [_open_file(index.parent / name) for name in names]
    present = {key: file.path.name for file in files for key in file.shapes}
    wrong = [key for key, name in where.items() if present.get(key) != name]
    extra = [key for key in present if key not in where]
    if wrong or extra:
        raise CheckpointError(
            f"{index.name} and its shards disagree: {len(wrong)} tensors are not where it says ({_some(wrong)}), "
            f"{len(extra)} are not in it ({_some(extra)}); download index and shards again."
        )
    return files


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") if names else "none"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a component lies."""

    files: list[_File]
    folder: Path | None = None
    """The sub-folder, if it is one of the official layout."""


def _find_place(path: Path, kind: Kind) -> _Place:
    if path.is_file():
        official = path.stem.split("-0")[0] in _WEIGHT_NAMES and (path.parent / "config.json").is_file()
        shard = any(path.parent.glob(f"{path.stem.split('-0')[0]}.safetensors.index.json"))
        if path.suffix == ".safetensors" and (official or shard):
            return _Place(files=_open_folder(path.parent), folder=path.parent)
        if path.name.endswith(".safetensors.index.json"):
            return _Place(files=_open_shards(path), folder=path.parent)
        return _Place(files=[_open_file(path)])
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; choose a file or folder that does.")
    sub = path / FOLDERS[kind]
    if sub.is_dir():
        return _Place(files=_open_folder(sub), folder=sub)
    if (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path} has no folder {FOLDERS[kind]}, where {NAMES[kind]} should be; download it (see the model's page)."
        )
    parts = [part for part in FOLDERS.values() if (path / part).is_dir()]
    if parts:
        raise CheckpointError(f"{path} has no folder {FOLDERS[kind]} (only {', '.join(parts)}); download it.")
    return _Place(files=_open_folder(path), folder=path)


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, of a folder, or of all shards that a file belongs to; memory-mapped.

    Raises:
        CheckpointError: not there, damaged, or shards are missing.
    """
    path = Path(path)
    if path.name.endswith(".safetensors.index.json"):
        files = _open_shards(path)
    elif path.is_dir() or (path.parent / f"{path.stem.split('-0')[0]}.safetensors.index.json").is_file():
        files = _open_folder(path if path.is_dir() else path.parent)
    elif path.exists():
        files = [_open_file(path)]
    else:
        raise CheckpointError(f"{path} does not exist; choose a file or folder that does.")
    return _read_tensors(files, {key for file in files for key in file.shapes})


def check_present(path: Path | str, kind: Kind) -> None:
    """Raise CheckpointError unless every weight file of `kind` is there and whole by its header."""
    _find_place(Path(path), kind)


def component_files(path: Path | str, kind: Kind) -> list[Path]:
    """Every file that decides what `read_component` returns: weights, config.json, tokenizer."""
    place = _find_place(Path(path), kind)
    files = [file.path for file in place.files]
    if place.folder is not None:
        files += [p for p in [place.folder / "config.json"] if p.is_file()]
        if kind in TOKENIZER_FOLDERS:
            for folder in (place.folder.parent / TOKENIZER_FOLDERS[kind], place.folder):
                found = [folder / name for name in ("tokenizer.json", "tekken.json") if (folder / name).is_file()]
                if found:
                    return [*files, found[0]]
    return files


# --- reading ------------------------------------------------------------------------------------------------


def read_component(path: Path | str, kind: Kind) -> Component:
    """Find, check and memory-map one network.

    Args:
        path: a .safetensors file, an official folder (with model_index.json), or one of its sub-folders.
        kind: "transformer", "text_encoder", "enhancer" or "vae".

    Raises:
        CheckpointError: not there, damaged, another kind of file (the message says what it looks like), missing, extra
            or misshapen tensors (counts and the first five), or a config.json that contradicts the weights.
    """
    if kind not in KINDS:
        raise ErnieError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    path = Path(path)
    place = _find_place(path, kind)
    stored: dict[str, Shape] = {}
    metadata: dict[str, str] = {}
    for file in place.files:
        stored |= file.shapes
        metadata |= file.metadata
    foreign = find_foreign_quantisation(stored)
    if foreign is not None:
        raise CheckpointError(
            f"{path} is quantised with {foreign}, which is not read here; take a bf16 or fp8 file, or the loader "
            "it was made for."
        )
    prefix = find_prefix(stored, kind)
    found = identify(stored)
    if prefix is None or not found.kinds:
        raise CheckpointError(
            f"{path} must be {NAMES[kind]}, but it looks like {found.description} ({len(stored)} tensors; first are "
            f"{_some(sorted(stored))}). Choose a file such as {_released_names(kind)}."
        )
    names, strangers = to_our_names(stored, kind, prefix)
    weights = {name: key for name, key in names.items() if not is_companion(name)}
    scales = {name: key for name, key in names.items() if is_companion(name)}
    # A lone marker of older files lies beside the prefix, not below it.
    scales |= {key.rpartition(".")[2]: key for key in strangers if is_companion(key)}
    strangers = [key for key in strangers if not is_companion(key)]

    tekken = find_tekken(stored) if kind in TOKENIZER_FOLDERS else None
    wanted = {*weights.values(), *scales.values(), *([tekken] if tekken else [])}
    tensors = _read_tensors(place.files, wanted)
    state_dict = {name: tensors[key] for name, key in weights.items()}
    dtypes = {name: tensor.dtype for name, tensor in state_dict.items()}
    own = _without_prefix(metadata, prefix)
    companions = {name: tensors[key] for name, key in scales.items()}
    try:
        quantisation = read_quantisation(companions, dtypes, own)
        if kind == "vae":
            state_dict = _linear_attention(state_dict)
            state_dict.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.long))
        shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        for layer, how in quantisation.items():
            weight = f"{layer}.weight"
            shapes[weight] = stored_columns(shapes[weight], how.format)
        given = _read_config(place.folder, metadata, kind)
        config, expected = _check_config(shapes, kind, given)
        _check_shapes(shapes, expected, strangers, kind, prefix)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e} Download it again, or choose one such as {_released_names(kind)}.") from e
    _check_role(path, place, stored, given, kind)
    return Component(
        kind=kind,
        config=config,
        state_dict=state_dict,
        tokenizer=_read_tokenizer(place.folder, kind, tensors[tekken] if tekken else None),
        source=path,
        quantisation=quantisation or None,
        metadata=metadata,
    )


def _without_prefix(metadata: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Metadata whose quantised layers carry our names."""
    if METADATA_KEY not in metadata:
        return {}
    try:
        table = json.loads(metadata[METADATA_KEY])
        layers = {name.removeprefix(prefix): how for name, how in table["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {METADATA_KEY: metadata[METADATA_KEY]}  # read_quantisation says what is wrong
    return {METADATA_KEY: json.dumps(table | {"layers": layers})}


def _linear_attention(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """1x1 convolutions of the VAE's attention as the matrices they are."""
    return {
        name: tensor.flatten(1) if is_vae_attention(name) and tensor.ndim == 4 else tensor
        for name, tensor in state_dict.items()
    }


def _read_config(folder: Path | None, metadata: Mapping[str, str], kind: Kind) -> dict[str, Any] | None:
    """config.json beside the weights, or from the file's metadata; None when there is neither."""
    if folder is not None and (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
    elif CONFIG_KEY in metadata:
        try:
            config = json.loads(metadata[CONFIG_KEY])
        except ValueError:
            logger.warning("the file's metadata has a config that is not JSON; sizes are read from the weights")
            return None
        telling = {"transformer": "ffn_hidden_size", "vae": "latent_channels"}.get(kind, "intermediate_size")
        if not isinstance(config, dict) or telling not in config.get("text_config", config):
            logger.warning("the file's metadata has a config of another kind; sizes are read from the weights")
            return None
    else:
        return None
    if kind in TOKENIZER_FOLDERS and "text_config" in config:
        architectures = {k: config[k] for k in ("architectures",) if k in config}
        return architectures | config["text_config"]
    return config


def _check_config(
    shapes: Mapping[str, Shape], kind: Kind, given: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Shape]]:
    """The network's config and every shape it should have."""
    if kind in TOKENIZER_FOLDERS:
        config = text_config(shapes, kind, given)
        return config, text_shapes(config)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        if kind == "transformer":
            derived = DiTConfig.from_state_dict(meta)
            free = {"rope_theta", "rope_axes_dim", "eps", "qk_layernorm"}
            chosen = derived if given is None else DiTConfig.from_dict(given)
            _compare(chosen.to_dict(), derived.to_dict(), free)
            module = DiT(chosen, device="meta")
        else:
            derived = VAEConfig.from_state_dict(meta)
            free = {"norm_num_groups", "batch_norm_eps", "decoder_block_out_channels"}
            chosen = derived if given is None else VAEConfig.from_dict(given)
            _compare(chosen.to_dict(), derived.to_dict(), free)
            module = VAE(chosen, device="meta")
    except CheckpointError:
        raise
    except ValueError as e:  # sizes that no network of ours can have
        raise CheckpointError(f"the sizes of this {kind} do not fit together: {e}") from e
    return chosen.to_dict(), {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _compare(given: Mapping[str, Any], derived: Mapping[str, Any], free: set[str]) -> None:
    for name, value in derived.items():
        if name not in free and given[name] != value:
            raise CheckpointError(f"config.json says {name} {given[name]}, the weights say {value}.")


def _check_shapes(
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    strangers: Iterable[str],
    kind: Kind,
    prefix: str,
) -> None:
    missing = [name for name in expected if name not in shapes]
    extra = [*(name for name in shapes if name not in expected), *strangers]
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if missing or extra or misshapen:
        layout = f"prefix {prefix!r}" if prefix else "names without a prefix"
        raise CheckpointError(
            f"{len(missing)} tensors are missing ({_some(missing)}), {len(extra)} are extra ({_some(extra)}), "
            f"{len(misshapen)} have the wrong shape ({_some(misshapen)}). The nearest known layout is {NAMES[kind]}, "
            f"{layout}, {len(expected)} tensors."
        )


def _released_names(kind: Kind) -> str:
    """File names to look for, for messages."""
    return " or ".join(path.rpartition("/")[2] for path, its_kind in SINGLE_FILES.items() if its_kind == kind)


def _check_role(path: Path, place: _Place, stored: Iterable[str], given: Mapping[str, Any] | None, kind: Kind) -> None:
    """Warn when there is evidence that a language model sits in the other one's place; the two have the same keys."""
    if kind not in TOKENIZER_FOLDERS:
        return
    architectures = " ".join((given or {}).get("architectures") or [])
    role: Kind | None = language_model_role(stored)
    if "Mistral3Model" in architectures or "Mistral3ForConditionalGeneration" in architectures:
        role = "text_encoder"
    elif "ForCausalLM" in architectures or (place.folder or path).name == FOLDERS["enhancer"]:
        role = "enhancer"
    if role is not None and role != kind:
        logger.warning("%s looks like %s, but is used as %s", path, NAMES[role], NAMES[kind])


def _read_tokenizer(folder: Path | None, kind: Kind, tekken: Tensor | None) -> str | bytes | None:
    if tekken is not None:
        return tekken.contiguous().numpy().tobytes()
    if folder is None or kind not in TOKENIZER_FOLDERS:
        return None
    for place in (folder.parent / TOKENIZER_FOLDERS[kind], folder):
        if (place / "tokenizer.json").is_file():
            return (place / "tokenizer.json").read_text(encoding="utf-8")
        if (place / "tekken.json").is_file():
            return (place / "tekken.json").read_bytes()
    return None


# --- building -----------------------------------------------------------------------------------------------


def build_transformer(
    component: Component,
    *,
    ops: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DiT:
    """The transformer with its weights; `dtype` None = as stored (bfloat16 for 8-bit files)."""
    _check_kind(component, "transformer")
    dtype = dtype or stored_dtype(component)
    module = DiT(DiTConfig.from_dict(component.config), ops=ops, dtype=dtype, device="meta")
    return _assign(module, component, dtype, device)


def build_vae(
    component: Component,
    *,
    ops: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> VAE:
    """The VAE with its weights, in channels_last, for inference (`.eval()`)."""
    _check_kind(component, "vae")
    dtype = dtype or stored_dtype(component)
    module = VAE(VAEConfig.from_dict(component.config), ops=ops, dtype=dtype, device="meta")
    module = _assign(module, component, dtype, device).eval()
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stubs lack it


def build_text_encoder(
    component: Component,
    *,
    ops: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rope: Rope = "yarn",
) -> tuple[TextEncoder, Tokenizer]:
    """The text encoder with its weights (all layers but the last, no final norm), and its tokenizer."""
    _check_kind(component, "text_encoder", "enhancer")
    dtype = dtype or stored_dtype(component)
    tokenizer = build_tokenizer(component)
    module = TextEncoder(component.config, ops=ops, dtype=dtype, device="meta", rope=rope)
    last = component.config["num_hidden_layers"] - 1
    return _assign(module, component, dtype, device, unused=(f"layers.{last}.", "norm.")), tokenizer


def build_enhancer(
    component: Component,
    *,
    ops: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Enhancer:
    """The prompt enhancer with its weights, holding its tokenizer."""
    _check_kind(component, "enhancer", "text_encoder")
    dtype = dtype or stored_dtype(component)
    module = Enhancer(component.config, build_tokenizer(component), ops=ops, dtype=dtype, device="meta")
    return _assign(module, component, dtype, device)


def build_tokenizer(component: Component) -> Tokenizer:
    """The tokenizer that came with a language model."""
    if component.tokenizer is None:
        folder = TOKENIZER_FOLDERS.get(component.kind, "tokenizer")
        raise CheckpointError(
            f"{component.source} has no tokenizer: a single file needs the tensor {TEKKEN_KEY} (ComfyUI's have it), "
            f"a folder needs {folder}/tokenizer.json beside it."
        )
    if isinstance(component.tokenizer, bytes):
        return Tokenizer.from_tekken(component.tokenizer)
    return Tokenizer.from_json(component.tokenizer)


def stored_dtype(component: Component) -> torch.dtype:
    """The dtype of most weights, bfloat16 where that is none to compute in (8 bits; fp16 except for a VAE)."""
    counts: dict[torch.dtype, int] = {}
    for tensor in component.state_dict.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(counts, key=lambda dtype: counts[dtype])
    too_narrow = dtype.itemsize == 1 or (dtype is torch.float16 and component.kind != "vae")
    return torch.bfloat16 if too_narrow or not dtype.is_floating_point else dtype


def _check_kind(component: Component, *kinds: Kind) -> None:
    if component.kind not in kinds:
        raise ErnieError(f"expected {NAMES[kinds[0]]}, got {NAMES[component.kind]} ({component.source}).")


def _assign(
    module: M,
    component: Component,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    unused: tuple[str, ...] = (),
) -> M:
    """Give `module` its weights; every tensor is used but those under `unused`, and none is missing."""
    expected = module.state_dict()
    # 8-bit storage would drop the scales: multiplied-out weights stay in bfloat16 then.
    plain_dtype = dtype if dtype.itemsize > 1 else torch.bfloat16
    used = {name: tensor for name, tensor in component.state_dict.items() if not name.startswith(unused or ("\0",))}
    layers = component.quantisation or {}
    layers = {layer: how for layer, how in layers.items() if f"{layer}.weight" in used}
    try:
        used = dequantise(used, layers, plain_dtype)
    except CheckpointError as e:
        raise CheckpointError(f"{component.source}: {e}") from e
    multiplied_out = {f"{layer}.weight" for layer in layers}
    for name, tensor in used.items():
        if name in expected and tensor.is_floating_point():
            wanted = plain_dtype if name in multiplied_out else expected[name].dtype
            used[name] = tensor.to(device=device, dtype=wanted)
        else:
            used[name] = tensor.to(device=device)
    missing, unexpected = module.load_state_dict(used, strict=False, assign=True)
    if missing or unexpected:
        raise CheckpointError(
            f"{component.source} does not fit: {len(missing)} tensors missing ({_some(missing)}), "
            f"{len(unexpected)} extra ({_some(unexpected)})."
        )
    return module


# --- writing ------------------------------------------------------------------------------------------------

SingleFileLayout = Literal["comfyui", "official"]


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path | str, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all: temporary name, fsync, rename.

    Raises:
        ErnieError: the disk is full (with the bytes needed) or cannot be written to; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in contiguous.values())

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, str(temporary), metadata=dict(metadata or {}))
        except SafetensorError as e:
            full = "No space left" in str(e) or "os error 28" in str(e)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(e)) from e

    _write_whole(path, needed, write)


_FILE_DTYPES = {  # names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors_in_turn(
    like: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    path: Path | str,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write_safetensors` of tensors that are made one after the other, so that they never lie in memory together.

    Args:
        like: tensors of the names, dtypes and shapes to write; they may be on the meta device.
        make: gives the tensor of a name; it is asked once per name, in the order of `like`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in like.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _FILE_DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the format asks for

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, expected in like.items():
                tensor = make(name).detach().to("cpu").contiguous()
                assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    _write_whole(Path(path), end + 8 + len(text), write)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 whole or not at all; ErnieError as for `write_safetensors`."""
    data = text.encode("utf-8")
    _write_whole(path, len(data), lambda temporary: temporary.write_bytes(data))


def _write_whole(path: Path, needed: int, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise ErnieError(
                f"the disk is full: {path} needs {needed} bytes ({needed / 1e9:.2f} GB). Nothing was written."
            ) from e
        raise ErnieError(f"{path} cannot be written: {e.strerror or e}. Nothing was written.") from e
    finally:
        temporary.unlink(missing_ok=True)


def _file_tensors(component: Component) -> dict[str, Tensor]:
    return to_comfy_layout(component.state_dict, component.quantisation or {})


def save_single_file(
    component: Component,
    path: Path | str,
    *,
    layout: SingleFileLayout = "comfyui",
    prefix: str | None = None,
) -> None:
    """Write one network as a single file; its config goes into the metadata.

    Args:
        layout: "comfyui" = as Comfy-Org publishes them (bare transformer; `model.` and `tekken_model` for language
            models; BFL's names for the VAE); "official" = the names of the official folders.
        prefix: instead of the layout's own.

    Raises:
        ErnieError: disk full, or a language model whose tokenizer is not tekken bytes.
    """
    names: Callable[[str], str] = str
    tensors = _file_tensors(component)
    language_model = component.kind in TOKENIZER_FOLDERS
    if layout == "comfyui" and component.kind == "vae":
        names = vae_to_bfl
        tensors = {
            name: tensor[:, :, None, None] if is_vae_attention(name) else tensor for name, tensor in tensors.items()
        }
    if prefix is None:
        official = {"text_encoder": "language_model.model.", "enhancer": "model."}
        prefix = "model." if language_model and layout == "comfyui" else official.get(component.kind, "")
    assert prefix in PREFIXES[component.kind], (prefix, PREFIXES[component.kind])
    file = {prefix + names(name): tensor for name, tensor in tensors.items()}
    if language_model and layout == "comfyui":
        if not isinstance(component.tokenizer, bytes):
            raise ErnieError("a single file holds the tokenizer as the bytes of a tekken.json; this one has none.")
        file[TEKKEN_KEY] = torch.frombuffer(bytearray(component.tokenizer), dtype=torch.uint8)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(component.config)}
    write_safetensors(file, path, metadata=metadata)


def save_folder_component(component: Component, folder: Path | str, *, max_shard_bytes: int | None = None) -> Path:
    """Write one network into its sub-folder of the official folder `folder`; returns the sub-folder.

    `max_shard_bytes`: split the weights into shards with an index; None = one file. A tokenizer.json goes into
    `tokenizer/` or `pe_tokenizer/`, a tekken tokenizer into the weight file.
    """
    root = Path(folder)
    sub = root / FOLDERS[component.kind]
    config = dict(component.config)
    prefix = ""
    if component.kind == "text_encoder":
        prefix = "language_model.model."
        config = {"architectures": ["Mistral3Model"], "model_type": "mistral3", "text_config": config}
    elif component.kind == "enhancer":
        prefix = "model."
        config = {"architectures": ["Ministral3ForCausalLM"]} | config
    else:
        classes = {"transformer": "ErnieImageTransformer2DModel", "vae": "AutoencoderKLFlux2"}
        config = {"_class_name": classes[component.kind]} | config
    tensors = {prefix + name: tensor for name, tensor in _file_tensors(component).items()}
    if isinstance(component.tokenizer, bytes):
        tensors[TEKKEN_KEY] = torch.frombuffer(bytearray(component.tokenizer), dtype=torch.uint8)
    elif component.tokenizer is not None:
        write_text(root / TOKENIZER_FOLDERS[component.kind] / "tokenizer.json", component.tokenizer)
    stem = "model" if component.kind in TOKENIZER_FOLDERS else "diffusion_pytorch_model"
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(tensors, sub / f"{stem}.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(shard, sub / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(sub / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_text(sub / "config.json", json.dumps(config, indent=2) + "\n")
    return sub


def _split(tensors: Mapping[str, Tensor], max_bytes: int | None) -> list[dict[str, Tensor]]:
    if max_bytes is None:
        return [dict(tensors)]
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards
