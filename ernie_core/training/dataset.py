"""Training data: every format that people have, compiled to `items.Dataset`.

A foreign format is read by one function that makes `Item`s without looking at the pictures; `items.finish` then decodes
each once. Options of a foreign file are honoured, or listed as problems: none is dropped in silence.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import ErnieError
from . import pictures
from .captions import DEFAULT_STYLE, Caption, CaptionRules
from .items import (
    MANIFEST_HEADER,
    Box,
    Dataset,
    DatasetOptions,
    Findings,
    Item,
    OnProgress,
    balance_concepts,
    finish,
    join_datasets,
    parse_json,
    read_manifest,
    read_table,
    read_text,
    write_manifest,
    write_whole,
)

__all__ = [
    "Dataset",
    "DatasetOptions",
    "Format",
    "Item",
    "balance_concepts",
    "dataset_from_images",
    "detect_format",
    "join_datasets",
    "read_dataset",
    "read_manifest",
    "write_manifest",
]

Format = Literal["auto", "folder", "kohya", "toml", "aitoolkit", "metadata", "manifest"]

MASK_SUFFIX = "-masklabel"
STYLES = ("keyword", "keywords", "tags", "sentence", "instruction", "short", "medium", "long")
REPEATS_FOLDER = re.compile(r"(\d+)_(.+)")
_PAIR_FOLDERS = ({"chosen", "rejected"}, {"w", "l"})


def read_dataset(
    path: Path | str,
    format: Format = "auto",
    options: DatasetOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """The dataset at `path`, every picture decoded once.

    Args:
        path: a folder, or a .toml (kohya sd-scripts, musubi-tuner, diffusion-pipe), .yaml or .json (ai-toolkit job),
            .jsonl, .json or .csv (metadata, or our own manifest).
        format: "auto" looks at what is there; the others insist.
        options: how to read; None = the defaults.
        on_progress: called with (pictures done, pictures, what); may raise to stop.

    Raises:
        ErnieError: nothing there, an unknown format, no usable picture (with the first reasons), or missing captions
            while `missing_caption` is "error" (with the count and the first names).
    """
    path = Path(path).expanduser()
    options = options or DatasetOptions()
    chosen = _choose_format(path, format)
    if chosen == "manifest":
        return read_manifest(path / "manifest.jsonl" if path.is_dir() else path, on_progress=on_progress)
    return finish(path, find_items(path, chosen, options), options, on_progress)


def find_items(path: Path | str, format: Format = "auto", options: DatasetOptions | None = None) -> Findings:
    """What `read_dataset` would decode: the items that a folder or a foreign file names, and what is wrong with it.

    Raises:
        ErnieError: nothing there, an unknown format, or a manifest (which names items that were decoded already).
    """
    path = Path(path).expanduser()
    options = options or DatasetOptions()
    chosen = _choose_format(path, format)
    found = Findings()
    if chosen == "folder":
        _read_folder(path, found, options, Item(image=path), recursive=True)
    elif chosen == "kohya":
        _read_kohya_folder(path, found, options)
    elif chosen == "toml":
        _read_toml(path, found, options)
    elif chosen == "aitoolkit":
        _read_aitoolkit(path, found, options)
    elif chosen == "metadata":
        _read_metadata(path, found, options)
    else:
        raise ErnieError(f"{path} is a manifest; read it with read_manifest.")
    return found


def _choose_format(path: Path, format: Format) -> Format:
    if format not in get_args(Format):
        raise ErnieError(f"format must be one of {', '.join(get_args(Format))}; got {format!r}.")
    if not path.exists():
        raise ErnieError(f"there is no file or folder {path}.")
    chosen = detect_format(path) if format == "auto" else format
    _check_kind(path, chosen)
    return chosen


def detect_format(path: Path) -> Format:
    """The format of an existing file or folder.

    Raises:
        ErnieError: nothing that is known, or preference pairs, which `pairs.read_pairs` reads.
    """
    if path.is_dir():
        names = {p.name.lower() for p in path.iterdir() if p.is_dir()}
        if any(pair <= names for pair in _PAIR_FOLDERS):
            raise ErnieError(f"{path} holds preference pairs (chosen and rejected pictures); read it as pairs.")
        if (path / "manifest.jsonl").is_file() and _has_header(path / "manifest.jsonl"):
            return "manifest"
        if any((path / f"metadata{suffix}").is_file() for suffix in (".jsonl", ".csv", ".json")):
            return "metadata"
        return "kohya" if any(REPEATS_FOLDER.fullmatch(name) for name in names) else "folder"
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return "manifest" if _has_header(path) else "metadata"
    if suffix == ".json":
        return "aitoolkit" if isinstance(parse_json(path), dict) and "config" in parse_json(path) else "metadata"
    if suffix in (".toml", ".yaml", ".yml", ".csv"):
        return {".toml": "toml", ".csv": "metadata"}.get(suffix, "aitoolkit")  # type: ignore[return-value]
    raise ErnieError(
        f"{path.name} is no dataset: expected a folder, or a .toml, .yaml, .json, .jsonl or .csv file"
        + ("; preference pairs are read as pairs." if suffix == ".parquet" else ".")
    )


def _check_kind(path: Path, format: Format) -> None:
    file = {"toml": (".toml",), "aitoolkit": (".yaml", ".yml", ".json")}.get(format)
    if file and (path.is_dir() or path.suffix.lower() not in file):
        raise ErnieError(f"format {format!r} is read from a {' or '.join(file)} file, got {path}.")
    if format in ("folder", "kohya") and not path.is_dir():
        raise ErnieError(f"format {format!r} is read from a folder, got the file {path.name}.")


def _has_header(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline().decode("utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and first.get("format") == MANIFEST_HEADER


# --- folders --------------------------------------------------------------------------------------------------


def _read_folder(
    folder: Path,
    found: Findings,
    options: DatasetOptions,
    like: Item,
    *,
    recursive: bool,
    extensions: Sequence[str] | None = None,
) -> int:
    """Add the pictures below `folder` with their captions and masks, as copies of `like`; returns how many."""
    if not folder.is_dir():
        found.problem(folder, "left out: there is no such folder")
        return 0
    extensions = tuple(extensions or options.caption_extensions)
    mask_root = Path(options.mask_folder).expanduser() if options.mask_folder else None
    if mask_root is not None and not mask_root.is_absolute() and not mask_root.is_dir():
        mask_root = folder / mask_root
    if mask_root is not None and not mask_root.is_dir():
        raise ErnieError(f"there is no mask folder {options.mask_folder}.")
    skipped = {mask_root} if mask_root is not None else set()
    added, others = 0, Counter()
    for place, files in _walk(folder, skipped, found, recursive=recursive):
        images, unreadable = [], []
        for file in files:
            suffix = file.suffix.lower()
            if suffix in pictures.SUFFIXES and not file.stem.endswith(MASK_SUFFIX):
                images.append(file)
            elif suffix in pictures.UNREADABLE_SUFFIXES:
                unreadable.append(file)
        for file in unreadable:
            found.problem(file, f"left out: {file.suffix} pictures cannot be read; save it as PNG, JPEG or WebP")
        by_stem: defaultdict[str, list[Path]] = defaultdict(list)
        for file in images:
            by_stem[file.stem].append(file)
        for stem, group in by_stem.items():
            if len(group) > 1:
                found.problem(
                    place / stem,
                    f"names {len(group)} pictures ({', '.join(p.name for p in group)}) that share a caption",
                )
        used: set[Path] = set()
        for file in images:
            captions, its_files, problem = captions_beside(file, files, by_stem, extensions, options)
            used |= its_files
            if problem:
                found.problem(file, f"left out: {problem}")
                continue
            concept = like.concept
            if not concept and place != folder:
                concept = place.relative_to(folder).parts[0]
            mask = like.mask or _find_mask(file, folder, mask_root, found)
            found.items.append(replace(like, image=file, captions=captions, concept=concept, mask=mask))
            added += 1
        for file in files:
            known = file in images or file in unreadable or file in used or file.stem.endswith(MASK_SUFFIX)
            if not known and file.suffix.lower() in (*extensions, ".txt", ".caption") and not file.name.startswith("."):
                found.problem(file, "is a caption without a picture")
            elif not known:
                others[file.suffix.lower() or file.name] += 1
    if others:
        kinds = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(others.items()))
        found.note(folder, f"has files that are no pictures or captions and are not read: {kinds}")
    return added


def _walk(folder: Path, skipped: set[Path], found: Findings, *, recursive: bool) -> Iterator[tuple[Path, list[Path]]]:
    """(folder, its files) in an order that is the same everywhere; hidden folders and links back up are not entered."""
    try:
        entries = sorted(folder.iterdir(), key=lambda p: p.name)
    except OSError as e:
        found.problem(folder, f"left out: it cannot be read ({e.strerror or e})")
        return
    yield folder, [p for p in entries if p.is_file() and not p.name.startswith(".")]
    for sub in entries if recursive else ():
        if not sub.is_dir() or sub in skipped or sub.name.startswith("."):
            continue
        if sub.is_symlink() and folder.resolve().is_relative_to(sub.resolve()):
            found.problem(sub, "left out: it is a link to a folder that it lies in")
        else:
            yield from _walk(sub, skipped, found, recursive=True)


def captions_beside(
    image: Path,
    files: list[Path],
    stems: Mapping[str, Any],
    extensions: Sequence[str],
    options: DatasetOptions,
) -> tuple[tuple[Caption, ...], set[Path], str]:
    """(captions, the files they come from, "" or why the picture must be left out)."""
    captions: list[Caption] = []
    used: set[Path] = set()
    for file in files:
        suffix = file.suffix.lower()
        if (suffix not in extensions and suffix != ".json") or file.stem in pictures.SUFFIXES:
            continue
        style = ""
        if file.stem == image.stem or file.stem == image.name:
            style = DEFAULT_STYLE
        elif file.stem.startswith(f"{image.stem}.") and file.stem not in stems:
            style = file.stem[len(image.stem) + 1 :].lower()
            if "." in style:
                style = ""
        if not style:
            continue
        used.add(file)
        try:
            text = read_text(file)
        except ErnieError as e:
            return (), used, str(e)
        if suffix == ".json":
            try:
                captions += _captions_from_json(text)
            except (ErnieError, ValueError) as e:
                return (), used, f"{file.name} is no caption file ({e})"
        else:
            lines = text.splitlines() if options.caption_per_line else [text]
            captions += [Caption(style, line.strip()) for line in lines if line.strip()]
    return tuple(dict.fromkeys(captions)), used, ""


def _captions_from_json(text: str) -> list[Caption]:
    values = json.loads(text)
    if isinstance(values, str):
        values = {"caption": values}
    if not isinstance(values, dict):
        raise ErnieError('expected an object such as {"caption": "a red apple"}')
    captions, _ = captions_from_values(values)
    return captions


def captions_from_values(values: Mapping[str, Any]) -> tuple[list[Caption], set[str]]:
    """(captions of a row, its keys that are captions); rows come from .json captions, metadata and manifests."""
    captions: list[Caption] = []
    used: set[str] = set()
    for key, value in values.items():
        style = _style_of(key)
        if style is None:
            continue
        used.add(key)
        parts = value if isinstance(value, Mapping) else {style: value}
        for name, texts in parts.items():
            for text in texts if isinstance(texts, list) else [texts]:
                if not isinstance(text, str | type(None)):
                    raise ErnieError(f"{key} must be text, got {text!r}")
                if text and text.strip():
                    captions.append(Caption(str(name), text.strip()))
    return list(dict.fromkeys(captions)), used


def _style_of(key: str) -> str | None:
    """The caption style that a column holds, None where it is no caption: "caption_short" -> "short"."""
    key = key.lower().strip()
    if key in ("caption", "captions", "text", "prompt", "prompts"):
        return DEFAULT_STYLE
    if key in STYLES and key != "keywords":  # "keywords" are the words to attend to, see Item
        return key
    for word in ("caption", "text", "prompt"):
        if key.startswith(f"{word}_"):
            return key[len(word) + 1 :]
        if key.endswith(f"_{word}"):
            return key[: -len(word) - 1]
    return None


def _find_mask(image: Path, folder: Path, mask_root: Path | None, found: Findings) -> Path | None:
    beside = image.with_name(f"{image.stem}{MASK_SUFFIX}.png")
    if mask_root is None:
        return beside if beside.is_file() else None
    for place in (mask_root / image.parent.relative_to(folder), mask_root):
        for name in (image.name, *(f"{image.stem}{suffix}" for suffix in pictures.SUFFIXES)):
            if (place / name).is_file():
                return place / name
    if beside.is_file():
        return beside
    found.problem(image, f"has no mask in {mask_root}; it is trained whole")
    return None


def _read_kohya_folder(folder: Path, found: Findings, options: DatasetOptions) -> None:
    """Sub-folders named N_name: N repeats of what lies in them, "name" as the caption of pictures without one."""
    outside = Counter()
    for sub in sorted(folder.iterdir(), key=lambda p: p.name):
        match = REPEATS_FOLDER.fullmatch(sub.name)
        if sub.is_dir() and match and int(match[1]) > 0:
            like = Item(image=sub, repeats=int(match[1]), concept=match[2])
            first = len(found.items)
            _read_folder(sub, found, options, like, recursive=False)
            _use_class_caption(found, first, match[2], f"the folder {sub.name}")
        elif sub.is_dir() and match:
            found.problem(sub, "left out: 0 repeats")
        elif sub.is_dir() and not sub.name.startswith("."):
            count = sum(p.suffix.lower() in pictures.SUFFIXES for p in sub.rglob("*"))
            outside[f"folder {sub.name}"] += count
        elif sub.suffix.lower() in pictures.SUFFIXES:
            outside["this folder"] += 1
    for place, count in outside.items():
        if count:
            found.problem(folder, f"{count} pictures in {place} are left out: only folders named N_name are read here")


def _use_class_caption(found: Findings, first: int, text: str, where: str) -> None:
    """kohya's rule: a picture without a caption is captioned by its class tokens."""
    bare = [i for i in range(first, len(found.items)) if not found.items[i].captions]
    for i in bare:
        found.items[i] = replace(found.items[i], captions=(Caption(DEFAULT_STYLE, text),))
    if bare:
        found.note(where, f"{len(bare)} pictures without a caption get {text!r}, as kohya's scripts do")


# --- kohya, musubi-tuner and diffusion-pipe TOML --------------------------------------------------------------

_WITHOUT_EFFECT = {
    "batch_size": "it is set in the recipe",
    "train_batch_size": "it is set in the recipe",
    "cache_directory": "the job folder has its own cache",
    "cache_latents": "latents are always cached",
    "cache_latents_to_disk": "latents are always cached",
    "cache_text_embeddings": "text features are always cached",
    "cache_info": "sizes are in the manifest",
    "min_bucket_reso": "sizes follow the pictures",
    "max_bucket_reso": "sizes follow the pictures",
    "bucket_reso_steps": "sizes are multiples of 16",
    "bucket_tolerance": "sizes are multiples of 16",
    "buckets": "pictures always keep their aspect",
    "enable_ar_bucket": "pictures always keep their aspect",
    "num_ar_buckets": "sizes follow the pictures",
    "min_ar": "see max_aspect",
    "max_ar": "see max_aspect",
    "ar_buckets": "sizes follow the pictures",
    "num_workers": "pictures come from the cache",
    "type": "",
}


_NOT_SUPPORTED = {
    "flip_aug": "latents are cached unflipped",
    "flip_x": "latents are cached unflipped",
    "flip_y": "latents are cached unflipped",
    "color_aug": "latents are cached as they are",
    "random_crop": "crops are central",
    "control_directory": "pictures to edit are not trained",
    "control_path": "pictures to edit are not trained",
    "caption_tag_dropout_rate": "only whole captions are dropped",
    "token_dropout_rate": "only whole captions are dropped",
    "caption_dropout_every_n_epochs": "use caption_dropout_rate",
}


_OFF = (False, None, 0, 0.0, "", [], {}, "none", "None")


def _report_option(found: Findings, where: object, key: str, value: Any) -> None:
    """List an option of a foreign file that is not honoured; one that is switched off needs no word."""
    if value in _OFF or key == "type":
        return
    if key in _WITHOUT_EFFECT:
        found.note(where, f"{key} = {value!r} has no effect: {_WITHOUT_EFFECT[key]}")
    else:
        found.problem(where, f"{key} = {value!r} is not honoured: {_NOT_SUPPORTED.get(key, 'it is not known here')}")


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as e:
            raise ErnieError(f"{path.name} is TOML, which Python 3.10 reads with the package tomli: install it.") from e
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as e:
        raise ErnieError(f"{path} is not valid TOML: {e}.") from e


def _read_toml(path: Path, found: Findings, options: DatasetOptions) -> None:
    file = _parse_toml(path)
    if "directory" in file:
        _read_diffusion_pipe(path, file, found, options)
        return
    blocks = file.get("datasets")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ErnieError(
            f"{path.name} has neither [[datasets]] (kohya, musubi-tuner) nor [[directory]] (diffusion-pipe)."
        )
    general = file.get("general", {})
    for key in file.keys() - {"general", "datasets"}:
        found.problem(path, f"[{key}] is not honoured: it is not known here")
    for number, block in enumerate(blocks, start=1):
        subsets = block.get("subsets", [{}])
        shared = {**general, **{k: v for k, v in block.items() if k != "subsets"}}
        for place, subset in enumerate(subsets, start=1):
            where = f"{path.name} dataset {number}" + (f" subset {place}" if "subsets" in block else "")
            _read_kohya_subset({**shared, **subset}, path.parent, where, found, options)


def _resolutions(value: Any, where: str, *, several: bool = False) -> tuple[int, ...]:
    """Square roots of areas from 512, [512, 768] as one width and height, or, if `several`, as a list of sizes."""
    values = value if isinstance(value, list | tuple) else [value]
    sizes: list[int] = []
    try:
        if not several:
            width, height = (float(values[0]), float(values[-1]))
            return (round((width * height) ** 0.5),)
        for one in values:
            sizes += _resolutions(one, where)
    except (TypeError, ValueError, IndexError) as e:
        raise ErnieError(f"{where}: resolution must be numbers such as 1024 or [1024, 768], got {value!r}.") from e
    return tuple(sizes)


def _beside(base: Path, text: str) -> Path:
    """A path of a foreign file: relative ones start at the file, or, as some trainers do, at the current folder."""
    path = Path(text).expanduser()
    return base / path if path.is_absolute() or (base / path).exists() or not path.exists() else path


def _read_kohya_subset(
    values: dict[str, Any], base: Path, where: str, found: Findings, options: DatasetOptions
) -> None:
    values = dict(values)
    folder = values.pop("image_dir", None) or values.pop("image_directory", None)
    rows = values.pop("image_jsonl_file", None)
    if not folder and not rows:
        keys = ", ".join(sorted(values)) or "nothing"
        found.problem(where, f"left out: it has no image_dir, image_directory or image_jsonl_file, only {keys}")
        return
    extension = values.pop("caption_extension", None)
    class_tokens = values.pop("class_tokens", None)
    prefix, suffix = values.pop("caption_prefix", ""), values.pop("caption_suffix", "")
    enlarges = not values.pop("bucket_no_upscale", False)
    keeps_aspect = values.pop("enable_bucket", True)
    if not keeps_aspect:
        found.problem(where, "enable_bucket = false is not honoured: pictures keep their aspect")
    if values.pop("is_reg", False):
        found.problem(where, "is_reg = true is not honoured: its pictures are trained like the others")
    match = REPEATS_FOLDER.fullmatch(Path(folder).name) if folder else None
    concept = class_tokens or (match[2] if match else Path(folder or rows).stem)
    try:
        like = Item(
            image=base,
            rules=CaptionRules(
                shuffle=values.pop("shuffle_caption", None),
                keep_tokens=values.pop("keep_tokens", None),
                separator=values.pop("caption_separator", None),
                dropout=values.pop("caption_dropout_rate", None),
            ),
            repeats=int(values.pop("num_repeats", 1)),
            concept=str(concept),
            resolutions=_resolutions(values.pop("resolution"), where) if "resolution" in values else (),
            max_upscale=None if enlarges else 1.0,
            alpha="mask" if values.pop("alpha_mask", False) else None,
        )
    except (TypeError, ValueError) as e:
        raise ErnieError(f"{where}: {e}") from e
    for key, value in sorted(values.items()):
        _report_option(found, where, key, value)
    first = len(found.items)
    if rows:
        _read_rows(_beside(base, rows), found, options, like)
    else:
        extensions = None if extension is None else (f".{str(extension).lstrip('.')}",)
        _read_folder(_beside(base, folder), found, options, like, recursive=False, extensions=extensions)
    if class_tokens:
        _use_class_caption(found, first, str(class_tokens), where)
    if prefix or suffix:
        for i in range(first, len(found.items)):
            item = found.items[i]
            captions = tuple(Caption(s, " ".join(filter(None, (prefix, t, suffix)))) for s, t in item.captions)
            found.items[i] = replace(item, captions=captions)
    several = sum("\n" in c.text for item in found.items[first:] for c in item.captions)
    if several:
        found.note(where, f"{several} captions have several lines; all are used, where kohya's scripts take the first")


def _read_diffusion_pipe(path: Path, file: dict[str, Any], found: Findings, options: DatasetOptions) -> None:
    file = dict(file)
    directories = file.pop("directory")
    for number, block in enumerate(directories, start=1):
        where = f"{path.name} directory {number}"
        values = {**file, **block}
        folder = values.pop("path", None)
        if not folder:
            found.problem(where, "left out: it has no path")
            continue
        mask = values.pop("mask_path", None)
        sizes = values.pop("resolutions", ())
        like = Item(
            image=path,
            repeats=int(values.pop("num_repeats", 1)),
            concept=Path(folder).name,
            resolutions=_resolutions(sizes, where, several=True) if sizes else (),
        )
        for key, value in sorted(values.items()):
            _report_option(found, where, key, value)
        its_options = replace(options, mask_folder=str(_beside(path.parent, mask))) if mask else options
        _read_folder(_beside(path.parent, folder), found, its_options, like, recursive=False)


# --- ai-toolkit -----------------------------------------------------------------------------------------------


def _parse_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as e:
        raise ErnieError(f"{path.name} is YAML, which needs the package PyYAML: install it, or save it as JSON.") from e
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as e:
        raise ErnieError(f"{path} is not valid YAML: {e}.") from e


def _read_aitoolkit(path: Path, found: Findings, options: DatasetOptions) -> None:
    file = parse_json(path) if path.suffix.lower() == ".json" else _parse_yaml(path)
    config = file.get("config") if isinstance(file, dict) else None
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not all(isinstance(process, dict) for process in processes):
        raise ErnieError(f"{path.name} is no ai-toolkit job: expected config, and in it a list named process.")
    blocks = [(process, block) for process in processes for block in process.get("datasets") or []]
    if not blocks:
        raise ErnieError(f"{path.name} is an ai-toolkit job without datasets.")
    found.note(path, "only its datasets and trigger_word are read; all else is set in the recipe")
    for number, (process, block) in enumerate(blocks, start=1):
        _read_aitoolkit_block(dict(block), process, path, f"{path.name} dataset {number}", found, options)


def _read_aitoolkit_block(
    values: dict[str, Any],
    process: Mapping[str, Any],
    path: Path,
    where: str,
    found: Findings,
    options: DatasetOptions,
) -> None:
    folder = values.pop("folder_path", None) or values.pop("dataset_path", None)
    if not folder:
        found.problem(where, "left out: it has no folder_path or dataset_path")
        return
    values.pop("dataset_path", None)
    extension = values.pop("caption_ext", None) or values.pop("caption_type", None)
    default = values.pop("default_caption", None)
    mask = values.pop("mask_path", None)
    if values.pop("is_reg", False):
        found.problem(where, "is_reg = True is not honoured: its pictures are trained like the others")
    sizes = values.pop("resolution", ())
    own_trigger = values.pop("trigger_word", None)
    try:
        like = Item(
            image=path,
            rules=CaptionRules(
                trigger=own_trigger or process.get("trigger_word") or None,
                shuffle=values.pop("shuffle_tokens", None),
                keep_tokens=values.pop("keep_tokens", None),
                dropout=values.pop("caption_dropout_rate", None),
            ),
            repeats=int(values.pop("num_repeats", 1)),
            weight=float(values.pop("loss_multiplier", 1.0)),
            concept=Path(folder).name,
            resolutions=_resolutions(sizes, where, several=True) if sizes else (),
            alpha="mask" if values.pop("alpha_mask", False) else None,
            mask_floor=float(values.pop("mask_min_value", 0.0)),
        )
    except (TypeError, ValueError) as e:
        raise ErnieError(f"{where}: {e}") from e
    for key, value in sorted(values.items()):
        _report_option(found, where, key, value)
    its_options = replace(options, mask_folder=str(_beside(path.parent, mask))) if mask else options
    source = _beside(path.parent, folder)
    first = len(found.items)
    if source.is_file():
        _read_rows(source, found, its_options, like)
    else:
        extensions = None if extension is None else (f".{str(extension).lstrip('.')}",)
        _read_folder(source, found, its_options, like, recursive=True, extensions=extensions)
    if default:
        bare = [i for i in range(first, len(found.items)) if not found.items[i].captions]
        for i in bare:
            found.items[i] = replace(found.items[i], captions=(Caption(DEFAULT_STYLE, str(default)),))
        if bare:
            found.note(where, f"{len(bare)} pictures without a caption get its default_caption {default!r}")


# --- metadata tables ------------------------------------------------------------------------------------------

IMAGE_KEYS = ("image", "file_name", "image_path", "image_file", "file", "path", "filename")


_ITEM_KEYS = (
    "mask",
    "mask_floor",
    "boxes",
    "keywords",
    "repeats",
    "weight",
    "concept",
    "resolutions",
    "max_upscale",
    "alpha",
)


def _read_metadata(path: Path, found: Findings, options: DatasetOptions) -> None:
    """metadata.jsonl/.csv/.json: one row per picture; a folder's pictures that no row names are listed."""
    if path.is_file():
        _read_rows(path, found, options, Item(image=path))
        return
    tables = [
        path / f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".json") if (path / f"metadata{suffix}").is_file()
    ]
    if not tables:
        raise ErnieError(f"{path} has no metadata.jsonl, metadata.csv or metadata.json.")
    for table in tables[1:]:
        found.problem(table, f"left out: {tables[0].name} is read")
    _read_rows(tables[0], found, options, Item(image=path))
    named = {item.image.resolve() for item in found.items} | {item.mask.resolve() for item in found.items if item.mask}
    rest = [
        p
        for _, files in _walk(path, set(), found, recursive=True)
        for p in files
        if p.suffix.lower() in pictures.SUFFIXES
    ]
    rest = [p for p in rest if p.resolve() not in named and not p.stem.endswith(MASK_SUFFIX)]
    if rest:
        names = ", ".join(p.name for p in rest[:5])
        found.problem(tables[0], f"{len(rest)} pictures are in the folder but in no row, and left out ({names})")


def _read_rows(table: Path, found: Findings, options: DatasetOptions, like: Item) -> None:
    if not table.is_file():
        found.problem(table, "left out: there is no such file")
        return
    if table.suffix.lower() not in (".jsonl", ".json", ".csv"):
        raise ErnieError(f"{table.name} is no table of pictures: expected .jsonl, .json or .csv.")
    unknown: Counter[str] = Counter()
    num_rows = 0
    for label, row in read_table(table):
        num_rows += 1
        if isinstance(row, ErnieError):
            found.problem(label, f"left out: it {row}")
            continue
        try:
            item, strange = _item_from_row(row, table.parent, like)
        except (ErnieError, TypeError, ValueError) as e:
            found.problem(label, f"left out: {e}")
            continue
        unknown.update(strange)
        if item.mask is None and not row.get("mask"):
            root = Path(options.mask_folder).expanduser() if options.mask_folder else None
            item = replace(item, mask=_find_mask(item.image, item.image.parent, root, found))
        found.items.append(item)
    for key, count in sorted(unknown.items()):
        found.problem(table, f"the column {key} ({count} of {num_rows} rows) is not known here and not used")


def _item_from_row(row: Mapping[str, Any], base: Path, like: Item) -> tuple[Item, set[str]]:
    """(item, keys that mean nothing) of one row of a table."""
    row = {str(k).strip(): v for k, v in row.items() if v is not None}
    images = [key for key in row if key.lower() in IMAGE_KEYS]
    if not images:
        raise ErnieError(
            f"it names no picture: expected one of {', '.join(IMAGE_KEYS)}, got {', '.join(row) or 'nothing'}"
        )
    image = base / Path(str(row[images[0]])).expanduser()
    if not image.is_file():
        raise ErnieError(f"there is no picture {image}")
    captions, used = captions_from_values({k: v for k, v in row.items() if k.lower() not in IMAGE_KEYS})
    values: dict[str, Any] = {}
    for key in _ITEM_KEYS:
        if key in row:
            values[key] = _ITEM_VALUES[key](row[key], base)
    unknown = row.keys() - used - set(_ITEM_KEYS) - {images[0]} - {"width", "height", "sha256"}
    return replace(like, image=image, captions=tuple(captions), **values), unknown


def _as_list(value: Any) -> list[Any]:
    """A list as it is, or from a CSV cell that holds JSON or words between commas."""
    if isinstance(value, str):
        text = value.strip()
        return json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _as_boxes(value: Any, _: Path) -> tuple[Box, ...]:
    boxes = _as_list(value)
    if boxes and not isinstance(boxes[0], list | tuple):
        boxes = [boxes]
    numbers = [tuple(float(v) for v in box) for box in boxes]
    if any(len(box) != 4 for box in numbers):
        raise ErnieError(f"boxes must be [left, top, right, bottom], in pixels or fractions, got {value!r}")
    return tuple((box[0], box[1], box[2], box[3]) for box in numbers)


def _as_mask(value: Any, base: Path) -> Path:
    mask = base / Path(str(value)).expanduser()
    if not mask.is_file():
        raise ErnieError(f"there is no mask {mask}")
    return mask


_ITEM_VALUES: dict[str, Callable[[Any, Path], Any]] = {
    "mask": _as_mask,
    "mask_floor": lambda value, _: float(value),
    "boxes": _as_boxes,
    "keywords": lambda value, _: tuple(str(word) for word in _as_list(value)),
    "repeats": lambda value, _: int(value),
    "weight": lambda value, _: float(value),
    "concept": lambda value, _: str(value),
    "resolutions": lambda value, _: tuple(int(size) for size in _as_list(value)),
    "max_upscale": lambda value, _: float(value),
    "alpha": lambda value, _: str(value),
}


# --- pictures from the graph ----------------------------------------------------------------------------------


def dataset_from_images(
    images_BHWC: Tensor,
    captions: Sequence[str],
    folder: Path | str,
    *,
    masks_BHW: Tensor | None = None,
    options: DatasetOptions | None = None,
) -> Dataset:
    """A dataset of the pictures of a batch, written to `folder` as PNG under names that follow from their pixels.

    Writing the same picture again changes nothing. A .txt with its caption lies beside each picture; pictures that are
    equal (masks too) become one item with all their captions.

    Args:
        images_BHWC: float in [0, 1], 3 or 4 channels (the fourth is alpha).
        captions: one per picture, or one for all.
        folder: made if needed; its name is the concept.
        masks_BHW: loss weights in [0, 1] of the pictures' size, one per picture or one for all; written as
            NAME-masklabel.png.
        options: how they are used; None = the defaults.

    Raises:
        ErnieError: counts or shapes that do not match, NaN, or a folder that cannot be written to.
    """
    if images_BHWC.ndim != 4 or images_BHWC.shape[3] not in (3, 4):
        raise ErnieError(f"pictures must be [B, H, W, 3 or 4], got {list(images_BHWC.shape)}.")
    count = len(images_BHWC)
    if len(captions) not in (1, count):
        raise ErnieError(f"{count} pictures need 1 or {count} captions, got {len(captions)}.")
    if masks_BHW is not None and (len(masks_BHW) not in (1, count) or masks_BHW.shape[1:] != images_BHWC.shape[1:3]):
        raise ErnieError(
            f"masks must be as many and as large as the pictures, got {list(masks_BHW.shape)} for "
            f"{list(images_BHWC.shape[:3])}."
        )
    if not images_BHWC.isfinite().all() or (masks_BHW is not None and not masks_BHW.isfinite().all()):
        raise ErnieError("the pictures or masks contain NaN or infinity; look at what made them.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[Path, list[str]] = {}
    masks: dict[Path, Path] = {}
    for i, image_HWC in enumerate(images_BHWC):
        pixels = _to_bytes(image_HWC)
        mask = None if masks_BHW is None else _to_bytes(masks_BHW[i if len(masks_BHW) > 1 else 0])
        content = repr(pixels.shape).encode() + pixels.tobytes() + (b"" if mask is None else mask.tobytes())
        path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.png"
        texts.setdefault(path, []).append(captions[i if len(captions) > 1 else 0].strip())
        _write_png(path, pixels)
        if mask is not None:
            masks[path] = path.with_name(f"{path.stem}{MASK_SUFFIX}.png")
            _write_png(masks[path], mask)
    found = Findings()
    for path, its_texts in texts.items():
        named = tuple(Caption(DEFAULT_STYLE, t) for t in dict.fromkeys(its_texts) if t)
        write_whole(path.with_suffix(".txt"), "\n".join(c.text for c in named).encode("utf-8", "replace"))
        found.items.append(Item(image=path, captions=named, concept=folder.name, mask=masks.get(path)))
        if len(its_texts) > 1:
            found.note(path, f"{len(its_texts)} pictures of the batch are equal; they are one item")
    return finish(folder, found, options or DatasetOptions(), None)


def _to_bytes(values: Tensor) -> np.ndarray:
    return (values.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def _write_png(path: Path, pixels: np.ndarray) -> None:
    if not path.is_file():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        write_whole(path, buffer.getvalue())
