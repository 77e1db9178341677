"""What it costs to ingest, to filter and to run a stage, and what the perceptual hash takes for a copy.

Pictures are drawn scenes of 1024 px with grain, as JPEG and PNG, so that a file weighs what a photograph does. The peer
of the ingest is the least that any reader does: open, decode, sha256; both in processor time. Ways alternate in one
run; figures of two workers are of the clock on the wall, and mean something on two idle cores only.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageEnhance

from ..ernie_core.curation.filters import keep_first_of_alike
from ..ernie_core.curation.ingest import ingest
from ..ernie_core.curation.manifest import Row as ManifestRow
from ..ernie_core.curation.manifest import write_rows
from ..ernie_core.training.pictures import near_duplicates, perceptual_hash
from ..tiny.scenes import all_scenes, draw
from .compare import Row

PICTURES, SIDE, REPEATS = 200, 1024, 3
MANIFEST_ROWS = 300_000
BITS = (0, 3, 6, 10)


def write_scenes(folder: Path) -> None:
    """Half JPEG, half PNG; each picture another scene."""
    folder.mkdir(parents=True)
    scenes = all_scenes()
    for n in range(PICTURES):
        rng = np.random.default_rng(n)
        picture = draw(scenes[n * len(scenes) // PICTURES], rng, SIDE).astype(np.int16)
        picture = np.clip(picture + rng.integers(-6, 7, picture.shape), 0, 255).astype(np.uint8)
        kind = {"format": "JPEG", "quality": 90} if n % 2 else {"format": "PNG"}
        Image.fromarray(picture).save(folder / f"{n:04d}.{'jpg' if n % 2 else 'png'}", **kind)


def plainly(folder: Path) -> None:
    """The least that any reader does."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        hashlib.sha256(data).hexdigest()
        with Image.open(io.BytesIO(data)) as picture:
            picture.convert("RGB").load()


def seconds(run, *arguments, clock=time.perf_counter, **options) -> float:
    start = clock()
    run(*arguments, **options)
    return clock() - start


def everyones_time() -> float:
    """Processor seconds of this process and of all that it started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def measure_ingest(place: Path) -> Iterator[Row]:
    folder = place / "in"
    write_scenes(folder)
    megabytes = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    here, plain, one, two = [], [], [], []
    for repeat in range(REPEATS):
        plain.append(seconds(plainly, folder, clock=time.process_time))
        here.append(seconds(ingest, [folder], place / f"{repeat}.jsonl", clock=time.process_time))
        for count, times in ((1, one), (2, two)):
            times.append(
                seconds(ingest, [folder], place / f"{repeat}p{count}.jsonl", engine="processes", workers=count)
            )
    again = median(seconds(ingest, [folder], place / "0.jsonl", clock=time.process_time) for _ in range(REPEATS))
    in_all = seconds(ingest, [folder], place / "cpu.jsonl", engine="processes", workers=2, clock=everyones_time)
    driver = seconds(ingest, [folder], place / "own.jsonl", engine="processes", workers=2, clock=time.process_time)
    what = f"ingest of {PICTURES} pictures of {SIDE} px, {megabytes:.0f} MB"
    yield Row(
        name=f"{what}, processor time of one process",
        ours=f"{PICTURES / median(here):.1f} rows/s",
        peer_name="open, decode, sha256",
        peer=f"{PICTURES / median(plain):.1f} rows/s",
        ratios=tuple(p / h for p, h in zip(plain, here, strict=True)),
        target=">= 0.7",
        met=median(p / h for p, h in zip(plain, here, strict=True)) >= 0.7,
    )
    yield Row(
        name=f"{what}, two workers, start included (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)",
        ours=f"{PICTURES / median(two):.1f} rows/s",
        peer_name="one worker",
        peer=f"{PICTURES / median(one):.1f} rows/s",
        ratios=tuple(h / t for h, t in zip(one, two, strict=True)),
        target=">= 1.6 on idle cores",
        met=median(h / t for h, t in zip(one, two, strict=True)) >= 1.6,
    )
    yield Row(
        name="processor time per picture of two workers and their driver, of which the driver's",
        ours=f"{in_all / PICTURES * 1e3:.1f} ms, {driver / PICTURES * 1e3:.2f} ms",
        peer_name="one process",
        peer=f"{median(here) / PICTURES * 1e3:.1f} ms",
        ratios=(median(here) / in_all,),
        target="",
        met=None,
        untold="-",
    )
    yield Row(
        name="the same again, nothing changed",
        ours=f"{PICTURES / again:.0f} rows/s",
        peer_name="first time",
        peer=f"{PICTURES / median(here):.1f} rows/s",
        ratios=(median(here) / again,),
        target="",
        met=None,
        untold="-",
    )


def made_rows(count: int) -> Iterator[ManifestRow]:
    """Rows of random pictures, a tenth of them copies."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (count, 19), dtype=np.uint8)
    for n in range(count):
        of = n - 1 if n % 10 == 9 else n
        yield {
            "source": f"/pictures/{n // 10_000:03d}/{n:08d}.jpg",
            **{"modified": n, "caption": "a picture of something", "id": hashlib.sha256(str(of).encode()).hexdigest()},
            **{"width": 1024, "height": 768, "bytes": 200_000 + n, "format": "JPEG", "orientation": 1},
            **{"phash": hashes[of].tobytes().hex(), "made_by": {"ingest": "k"}},
        }


_FILTER = """
import sys, time, resource
sys.path.insert(0, {root!r})
from ernie_core.curation.filters import Filters, filter_rows
start = time.perf_counter()
print(filter_rows({source!r}, {target!r}, Filters(min_side=512, max_aspect=3, exact=True, near_bits=6)))
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measure_filter(place: Path) -> Iterator[Row]:
    write_rows(place / "many.jsonl", made_rows(MANIFEST_ROWS))
    root = str(Path(__file__).resolve().parents[1])
    script = _FILTER.format(root=root, source=str(place / "many.jsonl"), target=str(place / "kept.jsonl"))
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    spent, megabytes = (float(v) for v in out.splitlines()[-1].split())
    yield Row(
        name=f"filter of {MANIFEST_ROWS:,} rows: size, aspect, exact and near duplicates",
        ours=f"{MANIFEST_ROWS / spent:,.0f} rows/s, {megabytes:.0f} MB at most",
        target="",
        met=None,
        untold="-",
    )
    for count in (3_000, 10_000, 100_000):
        rows = [bytes.fromhex(row["phash"]) for row in made_rows(count)]
        ours = seconds(keep_first_of_alike, rows, 6)
        if count > 10_000:
            yield Row(name=f"near duplicates of {count:,}", ours=f"{ours:.2f} s", target="", met=None, untold="-")
            continue
        peer = seconds(near_duplicates, [row.hex() for row in rows], max_bits=6)
        yield Row(
            name=f"near duplicates of {count:,}",
            ours=f"{ours:.2f} s",
            peer_name="all pairs",
            peer=f"{peer:.2f} s",
            ratios=(peer / ours,),
            target="not quadratic",
            met=None,
            untold="-",
        )


def copies(picture: Image.Image) -> dict[str, Image.Image]:
    """What people's copies of a picture are."""

    def coded(quality: int, format: str = "JPEG") -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, format=format, quality=quality)
        return Image.open(buffer).convert("RGB")

    width, height = picture.size
    cut = round(0.03 * width)
    return {
        "JPEG at quality 50": coded(50),
        "WebP at quality 60": coded(60, "WEBP"),
        "half the size": picture.resize((width // 2, height // 2), Image.Resampling.LANCZOS),
        "a third larger": picture.resize((width * 4 // 3, height * 4 // 3), Image.Resampling.BICUBIC),
        "3 % brighter": ImageEnhance.Brightness(picture).enhance(1.03),
        "3 % cut off each side": picture.crop((cut, cut, width - cut, height - cut)),
        "mirrored": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }


def measure_hash() -> Iterator[Row]:
    """How many copies are found, and how many different scenes are taken for copies."""
    scenes = all_scenes()
    rng = np.random.default_rng(0)
    chosen = [scenes[i] for i in rng.choice(len(scenes), 300, replace=False)]
    pictures = [Image.fromarray(draw(scene, np.random.default_rng(n), 256)) for n, scene in enumerate(chosen)]
    hashes = [perceptual_hash(np.asarray(p)) for p in pictures]
    found: dict[tuple[str, int], int] = {}
    for picture, own in zip(pictures, hashes, strict=True):
        for how, copy in copies(picture).items():
            other = perceptual_hash(np.asarray(copy))
            for bits in BITS:
                found[how, bits] = found.get((how, bits), 0) + bool(near_duplicates([own, other], max_bits=bits))
    for how in copies(pictures[0]):
        yield Row(
            name=f"copies found within 0 / 3 / 6 / 10 bits: {how}",
            ours=" / ".join(f"{found[how, bits] / 3:.0f} %" for bits in BITS),
            target="",
            met=None,
            untold="-",
        )
    apart = [len({i for pair in near_duplicates(hashes, max_bits=bits) for i in pair[1:]}) for bits in BITS]
    yield Row(
        name="of 300 different drawn scenes, taken for copies of another within 0 / 3 / 6 / 10 bits",
        ours=" / ".join(f"{count / 3:.1f} %" for count in apart),
        target="",
        met=None,
        untold="-",
    )


def measure() -> Iterator[Row]:
    place = Path(tempfile.mkdtemp(prefix="ernie_ingest_"))
    try:
        yield from itertools.chain(measure_ingest(place), measure_filter(place), measure_hash())
    finally:
        shutil.rmtree(place)
