"""The items of a dataset: what is known of each picture, how they are checked, joined, balanced and written down.

`measure` decodes every picture once, so that what is damaged is known before any long work. Nothing is left out in
silence: `Dataset.problems` lists what was excluded, could not be honoured, or looks wrong; `Dataset.notes` what was
done to data that is used.

Boxes are fractions (left, top, right, bottom) of the upright picture. Masks are weights: 255 = full weight.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..batch import Problem
from ..errors import ErnieError
from . import pictures
from .captions import DEFAULT_STYLE, TRIGGER_MARK, Caption, CaptionRules
from .pictures import Alpha, load_image, load_mask

MissingCaption = Literal["error", "empty", "default"]
OnProgress = Callable[[int, int, str], None]
Box = tuple[float, float, float, float]

MANIFEST_HEADER = "ernie-image dataset"
MANIFEST_VERSION = 1
_ALL = "; all are trained"  # ends a note on duplicates


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture with everything that training on it needs."""

    image: Path
    captions: tuple[Caption, ...] = ()
    rules: CaptionRules = field(default_factory=CaptionRules)
    """What its source says about captions; `DatasetOptions.rules` goes over it."""
    repeats: int = 1
    """Times per epoch."""
    draws: float | None = None
    """Expected times per epoch of a dataset that is drawn from at random (`Dataset.is_drawn`); None = `repeats`."""
    weight: float = 1.0
    """Factor of its loss."""
    concept: str = ""
    """What it is balanced by: the folder or the name that its source gives."""
    resolutions: tuple[int, ...] = ()
    """Square roots of pixel areas to train it at, where a stage names none; several = the picture at each of them."""
    max_upscale: float | None = None
    """Enlargement allowed by its source; None = `DatasetOptions.max_upscale`."""
    alpha: Alpha | None = None
    """What transparency means; None = `DatasetOptions.alpha`."""
    mask: Path | None = None
    mask_floor: float = 0.0
    """Weight of what is masked out, in [0, 1]."""
    boxes: tuple[Box, ...] = ()
    keywords: tuple[str, ...] = ()
    width: int = 0
    """Pixels of the upright picture."""
    height: int = 0
    sha256: str = ""
    """Of the file's bytes."""
    mask_sha256: str = ""
    perceptual_hash: str = ""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ErnieError(f"{self.image.name}: repeats must be at least 1, got {self.repeats}.")
        if self.draws is not None and not 0 <= self.draws < float("inf"):
            raise ErnieError(f"{self.image.name}: draws must be 0 or more, got {self.draws:g}.")
        if not self.weight >= 0:
            raise ErnieError(f"{self.image.name}: the loss weight must be 0 or more, got {self.weight:g}.")
        if not 0 <= self.mask_floor <= 1:
            raise ErnieError(f"{self.image.name}: mask_floor must lie between 0 and 1, got {self.mask_floor:g}.")
        if any(r < 16 for r in self.resolutions):
            raise ErnieError(f"{self.image.name}: resolutions must be at least 16, got {min(self.resolutions)}.")

    @property
    def times(self) -> float:
        """Times per epoch, expected or exact."""
        return self.repeats if self.draws is None else self.draws


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """How a dataset is read and used. None = as the source says, else the neutral value."""

    rules: CaptionRules = field(default_factory=CaptionRules)
    """Trigger, shuffling and dropout; what is set here goes over what the source says."""
    styles: tuple[tuple[str, float], ...] = ()
    """(caption style, weight) to draw from; empty = all styles alike."""
    shuffle_variants: int = 4
    """Orders of the tags per caption; finite, as each must be encoded ahead."""
    missing_caption: MissingCaption = "error"
    default_caption: str = ""
    """For missing_caption "default"."""
    caption_extensions: tuple[str, ...] = (".txt", ".caption")
    caption_per_line: bool = False
    """Whether each line of a caption file is a caption of its own."""
    mask_folder: str = ""
    """Folder of masks with the pictures' names; NAME-masklabel.png beside a picture is found without it."""
    mask_floor: float | None = None
    alpha: Alpha | None = None
    """"matte": transparent parts get the matte colour; "mask": they are masked out of the loss besides."""
    matte: tuple[int, int, int] = (255, 255, 255)
    max_aspect: float = 3.0
    """Longest side ratio; longer pictures are cropped."""
    max_upscale: float = 1.3
    """Largest enlargement; smaller pictures are trained smaller."""
    near_duplicate_bits: int = 6
    """Perceptual hashes (128 bits) that differ in no more count as near duplicates; -1 = do not look."""

    def __post_init__(self) -> None:
        for name, low in (("shuffle_variants", 1), ("max_aspect", 1), ("max_upscale", 1)):
            if not getattr(self, name) >= low:
                raise ErnieError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.missing_caption not in get_args(MissingCaption):
            choices = ", ".join(get_args(MissingCaption))
            raise ErnieError(f"missing_caption must be one of {choices}; got {self.missing_caption!r}.")
        if self.missing_caption == "default" and not self.default_caption.strip():
            raise ErnieError('missing_caption "default" needs a default_caption.')
        if len(self.matte) != 3 or not all(0 <= v <= 255 for v in self.matte):
            raise ErnieError(f"matte must be three numbers from 0 to 255, got {self.matte}.")
        if any(weight < 0 for _, weight in self.styles):
            raise ErnieError(f"style weights must be 0 or more, got {dict(self.styles)}.")
        if self.alpha not in (None, *get_args(Alpha)):
            raise ErnieError(f"alpha must be one of {', '.join(get_args(Alpha))}; got {self.alpha!r}.")

    def alpha_of(self, item: Item) -> Alpha:
        """What transparency of `item` means."""
        return self.alpha or item.alpha or "matte"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Items that can be trained on, and what was found while reading them."""

    items: tuple[Item, ...]
    options: DatasetOptions = field(default_factory=DatasetOptions)
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def is_drawn(self) -> bool:
        """Whether steps draw items at random by their expected `times`, rather than go through all of them."""
        return any(item.draws is not None for item in self.items)

    @property
    def concepts(self) -> dict[str, float]:
        """Samples per epoch and concept; expected ones where the dataset is drawn from."""
        counts: defaultdict[str, float] = defaultdict(float)
        for item in self.items:
            counts[item.concept] += item.times
        return dict(counts)

    def report(self) -> str:
        """Lines for people: counts, then every problem and note."""
        samples = sum(item.times for item in self.items)
        lines = [f"{len(self.items)} images, {samples:.0f} samples per epoch, {len(self.concepts)} concepts"]
        lines += [f"problem - {p}" for p in self.problems]
        lines += [f"note - {p}" for p in self.notes]
        return "\n".join(lines)


class Findings:
    """What a reader collects."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []

    def problem(self, label: object, reason: str) -> None:
        self.problems.append(Problem(label=str(label), reason=reason))

    def note(self, label: object, reason: str) -> None:
        self.notes.append(Problem(label=str(label), reason=reason))


# --- checking -------------------------------------------------------------------------------------------------


def finish(path: Path, found: Findings, options: DatasetOptions, on_progress: OnProgress | None) -> Dataset:
    """What all formats share: captions that are missing, pictures decoded, duplicates."""
    if not found.items and not found.problems:
        raise ErnieError(f"{path} holds no pictures; expected {', '.join(pictures.SUFFIXES)} files.")
    items = measure(found.items, found, options, on_progress)
    if not items:
        reasons = "; ".join(str(p) for p in found.problems[:5])
        raise ErnieError(f"{path} holds no usable picture. The first of {len(found.problems)} problems: {reasons}")
    items = fill_captions(items, found, options)
    _report_captions(items, found, options)
    _report_duplicates(items, found, options)
    return Dataset(items=tuple(items), options=options, problems=tuple(found.problems), notes=tuple(found.notes))


def measure(
    items: Iterable[Item], found: Findings, options: DatasetOptions, on_progress: OnProgress | None
) -> list[Item]:
    """Items with size and hashes; pictures that cannot be decoded whole are listed and left out."""
    items, measured = list(items), []
    for number, item in enumerate(items):
        if on_progress is not None:
            on_progress(number, len(items), "reading pictures")
        try:
            data = item.image.read_bytes()
        except OSError as e:
            found.problem(item.image, f"left out: cannot be read ({e.strerror or e})")
            continue
        try:
            loaded = load_image(data, matte=options.matte)
        except ErnieError as e:
            found.problem(item.image, f"left out: {e}")
            continue
        for note in loaded.notes:
            found.note(item.image, note)
        if min(loaded.width, loaded.height) < 16:
            found.problem(item.image, f"left out: {loaded.width} x {loaded.height} pixels; 16 x 16 is the least")
            continue
        mask, mask_sha256 = _check_mask(item, loaded.width, loaded.height, found)
        measured.append(
            replace(
                item,
                width=loaded.width,
                height=loaded.height,
                sha256=hashlib.sha256(data).hexdigest(),
                perceptual_hash=pictures.perceptual_hash(loaded.rgb_HWC),
                mask=mask,
                mask_sha256=mask_sha256,
                mask_floor=item.mask_floor if options.mask_floor is None else options.mask_floor,
                boxes=tuple(_check_boxes(item, loaded.width, loaded.height, found)),
            )
        )
    if on_progress is not None:
        on_progress(len(items), len(items), "reading pictures")
    return measured


def _check_mask(item: Item, width: int, height: int, found: Findings) -> tuple[Path | None, str]:
    if item.mask is None:
        return None, ""
    try:
        mask_HW = load_mask(item.mask)
        digest = hashlib.sha256(item.mask.read_bytes()).hexdigest()
    except (ErnieError, OSError) as e:
        found.problem(item.image, f"its mask is left out, and it is trained whole: {e}")
        return None, ""
    mask_height, mask_width = mask_HW.shape
    if abs(mask_width * height / (mask_height * width) - 1) > 0.02:
        found.problem(
            item.image,
            f"its mask is left out, and it is trained whole: the mask is {mask_width} x {mask_height}, the picture "
            f"{width} x {height}",
        )
        return None, ""
    if not mask_HW.any() and not item.mask_floor:
        found.problem(item.image, f"its mask {item.mask.name} is black throughout: nothing of it is learnt")
    return item.mask, digest


def _check_boxes(item: Item, width: int, height: int, found: Findings) -> Iterator[Box]:
    """Boxes as fractions; what reaches beyond the picture is cut, and what is empty then is listed and left out."""
    for box in item.boxes:
        pixels = any(abs(v) > 1 for v in box)
        size = (width, height, width, height) if pixels else (1, 1, 1, 1)
        left, top, right, bottom = (min(max(v / s, 0.0), 1.0) for v, s in zip(box, size, strict=True))
        if right <= left or bottom <= top:
            found.problem(item.image, f"box {list(box)} is left out: it covers nothing of {width} x {height} pixels")
        else:
            yield left, top, right, bottom


def fill_captions(items: list[Item], found: Findings, options: DatasetOptions) -> list[Item]:
    missing = [item for item in items if not item.captions]
    if not missing:
        return items
    names = ", ".join(item.image.name for item in missing[:5]) + (", ..." if len(missing) > 5 else "")
    count = f"{len(missing)} of {len(items)} pictures have no caption ({names})"
    if options.missing_caption == "error":
        raise ErnieError(
            f'{count}. Write them, or set missing_caption to "empty" (the empty prompt) or "default" (one caption for '
            "all of them)."
        )
    text = options.default_caption.strip() if options.missing_caption == "default" else ""
    what = f"the default caption {text!r}" if text else "the empty prompt"
    found.problem(count, f"they are trained with {what}")
    filled = (Caption(DEFAULT_STYLE, text),)
    return [item if item.captions else replace(item, captions=filled) for item in items]


def _report_captions(items: list[Item], found: Findings, options: DatasetOptions) -> None:
    marked = sum(
        any(TRIGGER_MARK in c.text for c in item.captions) and not options.rules.over(item.rules).trigger
        for item in items
    )
    if marked:
        found.problem(f"{marked} captions", f"contain {TRIGGER_MARK}, but no trigger word is set: it stays as it is")
    if options.styles:
        wanted = {style for style, weight in options.styles if weight > 0}
        outside = sum(not wanted & {c.style for c in item.captions} for item in items)
        if outside:
            found.problem(
                f"{outside} of {len(items)} pictures",
                f"have no caption of the styles {', '.join(sorted(wanted))}; they use what they have",
            )


def _report_duplicates(items: list[Item], found: Findings, options: DatasetOptions) -> None:
    same: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        same[item.sha256].append(item)
    for group in same.values():
        if len(group) > 1:
            others = ", ".join(str(item.image) for item in group[1:])
            found.note(group[0].image, f"is the same file as {others}{_ALL}")
    if options.near_duplicate_bits >= 0:
        hashes = [item.perceptual_hash for item in items]
        for i, j in pictures.near_duplicates(hashes, max_bits=options.near_duplicate_bits):
            if items[i].sha256 != items[j].sha256:
                found.note(items[i].image, f"looks the same as {items[j].image}{_ALL}")


# --- several datasets -----------------------------------------------------------------------------------------


def join_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """One dataset of all items. Caption rules, alpha and mask_floor stay those of each part.

    Raises:
        ErnieError: none given, or the parts differ in an option that can only be one for all (named).
    """
    if not datasets:
        raise ErnieError("expected at least one dataset, got none.")
    first = datasets[0].options
    own = ("rules", "alpha", "max_upscale")  # kept per item
    reading = (
        "missing_caption",
        "default_caption",
        "caption_extensions",
        "caption_per_line",
        "mask_folder",
        "mask_floor",
    )
    for other in datasets[1:]:
        for f in fields(DatasetOptions):
            a, b = getattr(first, f.name), getattr(other.options, f.name)
            if f.name not in (*own, *reading, "near_duplicate_bits") and a != b:
                raise ErnieError(f"datasets that are joined need the same {f.name}, got {a!r} and {b!r}.")
    items: list[Item] = []
    for part in datasets:
        for item in part.items:
            rules, alpha = part.options.rules.over(item.rules), part.options.alpha or item.alpha
            upscale = part.options.max_upscale if item.max_upscale is None else item.max_upscale
            items.append(replace(item, rules=rules, alpha=alpha, max_upscale=upscale))
    found = Findings()
    found.problems = [p for part in datasets for p in part.problems]
    found.notes = [p for part in datasets for p in part.notes if not p.reason.endswith(_ALL)]  # they are found anew
    _report_duplicates(items, found, first)
    options = replace(first, rules=CaptionRules(), alpha=None)
    return Dataset(items=tuple(items), options=options, problems=tuple(found.problems), notes=tuple(found.notes))


def balance_concepts(dataset: Dataset, balance: Literal["equal"] | Mapping[str, float]) -> Dataset:
    """`dataset` with repeats such that the concepts' samples per epoch stand in the ratio of their weights.

    The least repeated item gets 1, so nothing is dropped. Inside a concept, repeats keep their ratio as nearly as whole
    numbers can (largest remainder). A dataset that is drawn from keeps the samples of its epoch, and gets `draws`.

    Args:
        balance: "equal", or a weight above 0 per concept; concepts without one are weighted 1.

    Raises:
        ErnieError: a weight that is not above 0, or for a concept that is not there.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(dataset.items):
        members[item.concept].append(i)
    weights = dict.fromkeys(members, 1.0)
    if not isinstance(balance, str):
        strange = sorted(balance.keys() - members.keys())
        if strange:
            raise ErnieError(f"there is no concept {', '.join(strange)}; expected {', '.join(sorted(members))}.")
        weights |= {k: float(v) for k, v in balance.items()}
    elif balance != "equal":
        raise ErnieError(f'balance must be "equal" or weights by concept, got {balance!r}.')
    if not all(0 < w < float("inf") for w in weights.values()):
        raise ErnieError(f"the weights of concepts must be above 0, got {weights}.")

    shares = np.array([float(item.times) for item in dataset.items])
    samples = shares.sum()
    for concept, places in members.items():
        if not shares[places].any():
            raise ErnieError(f"the concept {concept!r} is never drawn and cannot be balanced; leave its pictures out.")
        shares[places] *= weights[concept] / shares[places].sum()
    items = list(dataset.items)
    if dataset.is_drawn:
        draws = (shares * (samples / shares.sum())).tolist()
        return replace(dataset, items=tuple(replace(item, draws=d) for item, d in zip(items, draws, strict=True)))
    shares /= shares.min()
    for places in members.values():
        wanted = shares[places]
        repeats = np.floor(wanted + 1e-9).astype(int)
        rest = round(float(wanted.sum())) - int(repeats.sum())
        for i in sorted(range(len(places)), key=lambda i: (-(wanted[i] - repeats[i]), i))[:rest]:
            repeats[i] += 1
        for place, count in zip(places, repeats.tolist(), strict=True):
            items[place] = replace(items[place], repeats=max(1, count))
    return replace(dataset, items=tuple(items))


# --- files ----------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A text file's content without BOM and with plain line ends; UTF-8, or UTF-16 where its BOM says so.

    Raises:
        ErnieError: it cannot be read, or is in neither encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ErnieError(f"{path.name} cannot be read ({e.strerror or e})") from e
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as e:
        raise ErnieError(f"{path.name} is not UTF-8 text (byte {e.start}); save it as UTF-8") from e
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def parse_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except ValueError as e:
        raise ErnieError(f"{path} is not valid JSON: {e}.") from e


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any] | ErnieError]]:
    """(label, row) of a .jsonl, .json (list) or .csv file with a header; an ErnieError in place of a bad row."""
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        try:
            for number, row in enumerate(reader, start=1):
                if row.get(None):  # type: ignore[call-overload]
                    yield f"{path.name} row {number}", ErnieError("has more cells than the header; quote commas")
                else:
                    yield f"{path.name} row {number}", {k: v for k, v in row.items() if v not in (None, "")}
        except csv.Error as e:
            yield path.name, ErnieError(f"is not CSV from here on ({e})")
        return
    if path.suffix.lower() == ".json":
        rows = parse_json(path)
        if isinstance(rows, dict):  # captions.json: {"a.png": "text"} or {"a.png": {...}}
            rows = [{"image": k, **(v if isinstance(v, dict) else {"caption": v})} for k, v in rows.items()]
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
            good = isinstance(row, dict)
            yield f"{path.name} row {number}", row if good else ErnieError(f"must be an object, got {row!r}")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            good = isinstance(row, dict)
            yield f"{path.name} row {number}", row if good else ErnieError(f"must be an object, got {line:.60}")
        except ValueError as e:
            yield f"{path.name} row {number}", ErnieError(f"is not JSON ({e})")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ErnieError: the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise ErnieError(
            f"{path} cannot be written ({e.strerror or e}). Free some space or take another folder."
        ) from e
    finally:
        temporary.unlink(missing_ok=True)


# --- manifest -------------------------------------------------------------------------------------------------


def write_manifest(dataset: Dataset, path: Path | str) -> None:
    """Write `dataset` as JSONL: a header with options, problems and notes, then one line per item.

    Paths inside the manifest's folder are written relative to it, so that the folder can move.
    """
    path = Path(path)
    header = {
        "format": MANIFEST_HEADER,
        "version": MANIFEST_VERSION,
        "options": asdict(dataset.options),
        "problems": [[p.label, p.reason] for p in dataset.problems],
        "notes": [[p.label, p.reason] for p in dataset.notes],
    }
    write_lines(path, [header, *(item_to_json(item, path.parent) for item in dataset.items)])


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file whole or not at all; readable text, escaped only where a file name is no valid Unicode."""
    lines = list(lines)
    try:
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    except UnicodeEncodeError:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write_whole(path, data)


def item_to_json(item: Item, base: Path) -> dict[str, Any]:
    """`item` as JSON values; fields at their default are left out, paths below `base` are relative to it."""
    values: dict[str, Any] = {}
    for f in fields(Item):
        value = getattr(item, f.name)
        if isinstance(value, Path):
            inside = value.resolve().is_relative_to(base.resolve())
            values[f.name] = (value.resolve().relative_to(base.resolve()) if inside else value.resolve()).as_posix()
        elif f.name == "captions":
            styles: dict[str, list[str]] = {}
            for style, text in item.captions:
                styles.setdefault(style, []).append(text)
            values["captions"] = styles
        elif f.name == "rules":
            rules = {k: v for k, v in asdict(item.rules).items() if v is not None}
            values |= {"rules": rules} if rules else {}
        elif value != f.default:
            values[f.name] = value
    return values


def item_from_json(values: Mapping[str, Any], base: Path) -> Item:
    """The inverse of `item_to_json`.

    Raises:
        ErnieError: a key that no item has, or a value of the wrong kind.
    """
    values = dict(values)
    try:
        captions = values.pop("captions", {})
        read: dict[str, Any] = {
            "captions": tuple(Caption(style, text) for style, texts in captions.items() for text in texts),
            "rules": CaptionRules(**values.pop("rules", {})),
            "boxes": tuple((b[0], b[1], b[2], b[3]) for b in values.pop("boxes", ())),
        }
        for name in ("keywords", "resolutions"):
            read[name] = tuple(values.pop(name, ()))
        for name in ("image", "mask"):
            if values.get(name) is not None:
                read[name] = base / values.pop(name)
        return Item(**read, **values)
    except (TypeError, AttributeError, IndexError) as e:
        raise ErnieError(f"it is no item of a manifest ({e})") from e


def options_from_json(values: Mapping[str, Any]) -> DatasetOptions:
    """DatasetOptions from `asdict` values that went through JSON."""
    values = dict(values)
    read: dict[str, Any] = {"rules": CaptionRules(**values.pop("rules", {}))}
    if "styles" in values:
        read["styles"] = tuple((style, float(weight)) for style, weight in values.pop("styles"))
    read |= {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return DatasetOptions(**read)
    except TypeError as e:
        raise ErnieError(f"these are no options of a dataset: {e}.") from e


def read_manifest(path: Path | str, *, check: bool = True, on_progress: OnProgress | None = None) -> Dataset:
    """The dataset that `write_manifest` wrote.

    Args:
        check: hash every picture and mask again. One that changed is measured anew and listed in `problems`; one that
            is gone is listed and left out.
        on_progress: called with (pictures done, pictures, what); may raise to stop.

    Raises:
        ErnieError: it is no manifest, of a newer version, a line is damaged, or no picture is left.
    """
    path = Path(path)
    header, lines = read_lines(path, MANIFEST_HEADER)
    found = Findings()
    items = [item_from_json(line, path.parent) for line in lines]
    options = options_from_json(header.get("options", {}))
    found.problems = [Problem(label=a, reason=b) for a, b in header.get("problems", [])]
    found.notes = [Problem(label=a, reason=b) for a, b in header.get("notes", [])]
    if check:
        kept: list[Item] = []
        for number, item in enumerate(items):
            if on_progress is not None:
                on_progress(number, len(items), "checking pictures")
            kept += check_item(item, found, options)
        if not kept:
            raise ErnieError(
                f"no picture of {path} is there any more; the first was {items[0].image if items else '-'}."
            )
        items = kept
    return Dataset(items=tuple(items), options=options, problems=tuple(found.problems), notes=tuple(found.notes))


def read_lines(path: Path, header: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, the other lines) of a manifest file whose format is `header`."""
    lines: list[dict[str, Any]] = []
    for label, row in read_table(path):
        if isinstance(row, ErnieError):
            raise ErnieError(f"{label} {row}; the manifest is damaged. Make it again from the dataset.")
        lines.append(row)
    if not lines or lines[0].get("format") != header:
        raise ErnieError(f"{path} is no manifest: its first line must hold the format {header!r}.")
    if lines[0].get("version", 0) > MANIFEST_VERSION:
        raise ErnieError(
            f"{path} was written by a newer version ({lines[0]['version']}); this one reads {MANIFEST_VERSION}."
        )
    return lines[0], lines[1:]


def check_item(item: Item, found: Findings, options: DatasetOptions) -> list[Item]:
    """[item] as its files are now, measured anew if they changed; [] when it is gone or damaged (listed in `found`)."""
    try:
        same = hashlib.sha256(item.image.read_bytes()).hexdigest() == item.sha256
        if item.mask is not None:
            same = same and hashlib.sha256(item.mask.read_bytes()).hexdigest() == item.mask_sha256
    except OSError as e:
        found.problem(item.image, f"left out: cannot be read any more ({e.strerror or e})")
        return []
    if same:
        return [item]
    if item.sha256:
        found.problem(item.image, "it or its mask has changed since the manifest was written; it is read anew")
    return measure([item], found, options, None)
