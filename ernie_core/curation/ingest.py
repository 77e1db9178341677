"""The first stage: every picture is decoded once, measured and hashed; what is no picture says why."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..errors import ErnieError, Interrupted
from ..training import pictures
from .engines import Summary, run_stage
from .manifest import Row, read_bytes, split_source, write_rows

MIN_PX = 16  # the model's unit: what is smaller cannot be trained on
MAX_BYTES = 2 << 30
_SNIFF_BYTES = 64 << 20  # larger files are looked at before they are read whole
_TOLD = 500  # files between two words on how far the listing is

_FORMATS = {
    **{"PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",), "GIF": (".gif",), "AVIF": (".avif",)},
    **{"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")},
    **{"TIFF": (".tif", ".tiff"), "JPEG2000": (".jp2",), "TGA": (".tga",)},
}


@dataclass(frozen=True)
class Ingest:
    """The stage: columns that follow from a picture's bytes alone."""

    name: str = "ingest"
    adds: tuple[str, ...] = ("problem", "id", "width", "height", "bytes", "format", "orientation", "phash", "notes")
    needs: tuple[str, ...] = ("source",)
    batch_size: int = 32

    def key(self) -> str:
        return hashlib.sha256(f"ingest 1, pictures {pictures.RULES}".encode()).hexdigest()[:16]

    def __call__(self, rows: list[Row]) -> list[Row]:
        return [_look(row) for row in rows]


def _look(row: Row) -> Row:
    refused = row.get("given", {}).get("problem")
    if refused:
        return {"problem": refused}
    source = row["source"]
    suffix = PurePosixPath(source.replace(os.sep, "/")).suffix.lower().partition("#")[0]
    try:
        _sniff(source)
        data = read_bytes(source)
        loaded = pictures.load_image(data)
    except ErnieError as e:
        advice = "; save it as PNG, JPEG or WebP" if suffix in pictures.UNREADABLE_SUFFIXES else ""
        return {"problem": f"{e}{advice}"}
    if min(loaded.width, loaded.height) < MIN_PX:
        return {"problem": f"{loaded.width} x {loaded.height} pixels; {MIN_PX} x {MIN_PX} is the least"}
    notes = list(loaded.notes)
    if suffix not in _FORMATS.get(loaded.format, (suffix,)):
        notes.append(f"is named {suffix or 'without suffix'} and holds {loaded.format}")
    facts: Row = {
        "id": hashlib.sha256(data).hexdigest(),
        "width": loaded.width,
        "height": loaded.height,
        "bytes": len(data),
        "format": loaded.format,
        "orientation": loaded.orientation,
        "phash": pictures.perceptual_hash(loaded.rgb_HWC),
    }
    return facts | ({"notes": notes} if notes else {})


def _sniff(source: str) -> None:
    """Refuse a huge file that is no picture before its bytes fill the memory."""
    path, member = split_source(source)
    try:
        size = os.stat(path).st_size
        if member or size <= _SNIFF_BYTES:
            return
        if size > MAX_BYTES:
            raise ErnieError(f"the file has {size:,} bytes; more than {MAX_BYTES:,} are not read")
        with Image.open(path):
            pass
    except OSError as e:
        raise ErnieError(f"it cannot be read ({getattr(e, 'strerror', None) or e})") from e
    except pictures.DECODE_ERRORS as e:
        raise ErnieError(f"it cannot be decoded ({e})") from e


def suffix_of(format: str) -> str:
    """The usual suffix of a picture format, "" for one that training does not read."""
    return _FORMATS.get(format, ("",))[0]


def ingest(
    paths: Sequence[Path | str],
    target: Path | str,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **how: Any,
) -> Summary:
    """Write `target`: a row for every file under `paths` (`sources.list_sources`), every picture decoded.

    An earlier `target` gives the columns of files that have not changed. `how` goes to `engines.run_stage`.

    Raises:
        ErnieError: a path is not there, nothing is in it, or as `run_stage`.
        Interrupted: `should_stop` said so; run again to go on.
    """
    from .sources import list_sources  # not above: workers, which only look at pictures, need no torch

    target = Path(target).expanduser()
    listing = target.with_name(f".{target.name}.{os.getpid()}.listing")

    def listed() -> Iterator[Row]:
        for number, row in enumerate(list_sources(paths), start=1):
            if number % _TOLD == 0 and on_progress is not None:
                on_progress(number, number, "listing files")
            if number % _TOLD == 0 and should_stop is not None and should_stop():
                raise Interrupted("the listing of files was stopped. Run again to start it anew.")
            yield row

    if write_rows(listing, listed()) == 0:
        listing.unlink()
        raise ErnieError(f"there are no files in {', '.join(str(path) for path in paths)}.")
    try:
        summary = run_stage(Ingest(), listing, target, on_progress=on_progress, should_stop=should_stop, **how)
    finally:
        listing.unlink(missing_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.listing"):  # of runs that were killed
        left.unlink(missing_ok=True)
    return summary
