"""Aesthetic benchmark: scorers against the scores of people, on a set of rated images.

Scores are kept on disk per scorer, by the hash of the image's bytes, after every batch: a run that was interrupted goes
on where it was. What others published stands in a table of its own, never among what was measured here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import Problem
from ..errors import ErnieError
from ..training.items import read_table, write_whole
from ..training.pictures import SUFFIXES, load_image
from . import geneval, longtext
from .charts import Bar, Cell, contact_sheet, draw_bars, draw_scatter, draw_table, stack_pictures
from .metrics import (
    SAMPLES,
    Agreement,
    Bias,
    Interval,
    agreement,
    bias_table,
    bootstrap_difference,
    category_table,
    rank_normalise,
    srcc,
)
from .scorer import DEFAULT_BATCH, Scorer, Scores
from .tables import finite, markdown_table

# (SRCC, PLCC) on ERIA-1K: ERNIE-Image report (arXiv 2605.25347), Table 2. UniPercept's SRCC is .4553 in its prose.
PUBLISHED: dict[str, tuple[float, float]] = {
    "LAION-AES": (0.2944, 0.3138),
    "ArtiMuse": (0.4277, 0.4704),
    "UniPercept": (0.4533, 0.4748),
    "ERNIE-Image-Aes": (0.7445, 0.7598),
}
PUBLISHED_TITLE = "Published on ERIA-1K (ERNIE-Image report, Table 2); not measured here"
COLUMNS = ("without enhancer", "with enhancer")

_IMAGE_KEYS = ("image", "file_name", "filename", "img", "image_path", "path", "file", "image_id")
_SCORE_KEYS = (
    *("gt_score", "human_score", "human", "mos", "mean_score", "rating", "aesthetic_score", "score", "tier", "label"),
)
_CATEGORY_KEYS = ("category", "class", "type", "genre", "subset")
_PROMPT_KEYS = ("prompt", "text", "caption")
_TABLE_SUFFIXES = (".jsonl", ".json", ".csv")
_EXTREMES = 6  # pictures in each row of the sheets of disagreement


@dataclass(frozen=True, kw_only=True)
class Rating:
    """An image and what people think of it."""

    image: Path
    human: float
    """Higher is better, on any scale."""
    category: str = ""
    prompt: str = ""
    sha256: str = ""
    """Of the file's bytes."""


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """A rated set, and what of its rows could not be used."""

    name: str
    ratings: tuple[Rating, ...]
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.ratings)


@dataclass(frozen=True, kw_only=True)
class ScorerResult:
    """One scorer on the whole set."""

    scores: Scores
    """Of the images that every scorer could score, in the set's order."""
    overall: Agreement
    categories: tuple[Agreement, ...]
    biases: tuple[Bias, ...]
    """The most over-rated category first; empty when there is one category only."""

    @property
    def name(self) -> str:
        return self.scores.scorer


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Outcome of `run_benchmark`."""

    name: str
    images: tuple[Rating, ...]
    """Those that counted."""
    results: tuple[ScorerResult, ...]
    differences: tuple[tuple[str, str, Interval], ...]
    """(scorer, other, SRCC of the one minus that of the other, on the same resampled images), of each pair."""
    problems: tuple[Problem, ...]
    samples: int
    seed: int

    def to_markdown(self) -> str:
        """The whole report as text."""
        return _markdown(self)

    def to_csv(self) -> str:
        """One row per image: what people and what each scorer gave it."""
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        writer.writerow(["image", "category", "prompt", "human", *(r.name for r in self.results)])
        for i, rating in enumerate(self.images):
            values = [r.scores.values[i] for r in self.results]
            writer.writerow([rating.image, rating.category, rating.prompt, rating.human, *values])
        return out.getvalue()

    def to_json(self) -> str:
        """Every number of the report, with the settings of the intervals; what is undefined is null."""
        content = {
            "name": self.name,
            "images": len(self.images),
            "bootstrap": {"samples": self.samples, "seed": self.seed, "level": 0.95},
            "measured": [
                {
                    "scorer": r.name,
                    "overall": asdict(r.overall),
                    "categories": [asdict(c) for c in r.categories],
                    "bias": [asdict(b) | {"verdict": b.verdict} for b in r.biases],
                }
                for r in self.results
            ],
            "srcc_differences": [{"scorer": a, "other": b, **asdict(d)} for a, b, d in self.differences],
            "published": {"where": PUBLISHED_TITLE, "srcc_plcc": PUBLISHED},
            "problems": [str(p) for p in self.problems],
        }
        return json.dumps(finite(content), ensure_ascii=False, indent=1) + "\n"

    def pictures(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] by name: the tables, a scatter plot per scorer, SRCC and bias by category, and per scorer the
        images that it over- and under-rates most."""
        return _pictures(self)


# --- the rated set ---------------------------------------------------------------------------------------------


def read_ratings(
    path: Path | str,
    *,
    image_folder: Path | str | None = None,
    score_column: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Ratings:
    """A rated set from a table or a folder.

    Args:
        path: a .json (list of objects, such as ArtiMuse's {"image", "gt_score"}; or {image: score}), .jsonl or .csv
            file; a folder with one such table, such as Hugging Face's metadata.csv or metadata.jsonl; or a folder of
            folders whose names are the scores (tiers 1 to 10).
        image_folder: where the table's image names start (None: beside the table, or in images/ beside it).
        score_column: the column with the human score ("" = the first known one that is there).
        on_progress: called with (images read, of how many).

    Raises:
        ErnieError: no table, no image that could be used, or the column is not there.
    """
    path = Path(path).expanduser()
    problems: list[Problem] = []
    if path.is_dir() and not _tables(path):
        drafts = _ratings_of_tiers(path, problems)
    else:
        table = _one_table(path) if path.is_dir() else path
        if table.suffix.lower() not in _TABLE_SUFFIXES or not table.is_file():
            found = "no such file" if not table.exists() else f"a {table.suffix or 'file without an ending'}"
            raise ErnieError(
                f"ratings must be a folder or one of {', '.join(_TABLE_SUFFIXES)}, {table.name} is {found}."
            )
        drafts = _ratings_of_table(table, image_folder, score_column, problems)
    ratings: list[Rating] = []
    by_path: dict[Path, float] = {}
    by_hash: dict[str, Rating] = {}
    for number, (label, rating) in enumerate(drafts, start=1):
        before = by_path.get(rating.image)
        if before is not None:
            same = "again" if before == rating.human else f"again, {rating.human:g} after {before:g}; the first counts"
            problems.append(Problem(label=label, reason=f"left out: {rating.image.name} is rated {same}"))
            continue
        by_path[rating.image] = rating.human
        try:
            digest = hashlib.sha256(rating.image.read_bytes()).hexdigest()
        except OSError as e:
            problems.append(Problem(label=label, reason=f"left out: {rating.image} cannot be read ({e.strerror})"))
            continue
        if digest in by_hash:
            other = by_hash[digest]
            twins = f"is the same image as {other.image.name} ({rating.human:g} and {other.human:g}); both count"
            problems.append(Problem(label=label, reason=f"{rating.image.name} {twins}"))
        rating = replace(rating, sha256=digest)
        by_hash.setdefault(digest, rating)
        ratings.append(rating)
        if on_progress is not None:
            on_progress(number, len(drafts))
    if not ratings:
        raise ErnieError(f"{path} holds no rated image: {_some(problems) or 'it is empty.'}")
    return Ratings(name=path.stem if path.is_file() else path.name, ratings=tuple(ratings), problems=tuple(problems))


def _tables(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.suffix.lower() in _TABLE_SUFFIXES)


def _one_table(folder: Path) -> Path:
    tables = _tables(folder)
    named = [t for t in tables if t.stem.lower() == "metadata"]
    chosen = named or tables
    if len(chosen) > 1:
        names = ", ".join(t.name for t in chosen[:5])
        raise ErnieError(f"{folder} has several tables ({names}): name the one with the human scores itself.")
    return chosen[0]


def _ratings_of_tiers(folder: Path, problems: list[Problem]) -> list[tuple[str, Rating]]:
    """Of sub-folders named by their score."""
    if not folder.is_dir():
        raise ErnieError(f"there is no folder {folder}.")
    drafts: list[tuple[str, Rating]] = []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if not re.fullmatch(r"-?\d+(\.\d+)?", sub.name):
            problems.append(Problem(label=sub.name, reason="left out: the folder's name is no score"))
            continue
        for file in sorted(sub.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                drafts.append((f"{sub.name}/{file.name}", Rating(image=file, human=float(sub.name))))
    if not drafts:
        raise ErnieError(
            f"{folder} holds neither a table of human scores ({', '.join(_TABLE_SUFFIXES)}) nor folders named by them."
        )
    return drafts


def _ratings_of_table(
    table: Path, image_folder: Path | str | None, score_column: str, problems: list[Problem]
) -> list[tuple[str, Rating]]:
    if image_folder is not None and not Path(image_folder).expanduser().is_dir():
        raise ErnieError(f"there is no image folder {image_folder}.")
    folders = [Path(image_folder).expanduser()] if image_folder else [table.parent, table.parent / "images"]
    drafts: list[tuple[str, Rating]] = []
    for label, row in read_table(table):
        try:
            if isinstance(row, ErnieError):
                raise ErnieError(f"it {row}")
            drafts.append((label, _rating_of_row(row, folders, score_column)))
        except ErnieError as e:
            problems.append(Problem(label=label, reason=f"left out: {e}"))
    return drafts


def _rating_of_row(row: Mapping[str, Any], folders: Sequence[Path], score_column: str) -> Rating:
    by_lower = {str(key).strip().lower(): value for key, value in row.items()}

    def value_of(keys: Sequence[str]) -> Any:
        return next((by_lower[k] for k in keys if by_lower.get(k) not in (None, "")), None)

    name = value_of(_IMAGE_KEYS)
    if name is None:
        raise ErnieError(f"it names no image: expected one of {', '.join(_IMAGE_KEYS)}, got {', '.join(row)}")
    keys = (score_column.strip().lower(),) if score_column.strip() else _SCORE_KEYS
    human = value_of(keys)
    if human is None:
        expected = score_column or ", ".join(_SCORE_KEYS)
        raise ErnieError(f"it has no human score: expected the column {expected}, got {', '.join(row)}")
    try:
        score = float(human)
    except (TypeError, ValueError) as e:
        raise ErnieError(f"its score must be a number, got {human!r}") from e
    if not math.isfinite(score):
        raise ErnieError(f"its score must be a finite number, got {human}")
    relative = Path(str(name)).expanduser()
    places = [folder / part for folder in folders for part in (relative, relative.name)]
    image = next((p for p in places if p.is_file()), None)
    if image is None:
        raise ErnieError(f"there is no image {places[0]}")
    category, prompt = value_of(_CATEGORY_KEYS), value_of([k for k in _PROMPT_KEYS if k not in keys])
    return Rating(image=image.resolve(), human=score, category=str(category or ""), prompt=str(prompt or ""))


# --- scoring ---------------------------------------------------------------------------------------------------


def run_benchmark(
    scorers: Sequence[Scorer],
    ratings: Ratings,
    *,
    batch_size: int = DEFAULT_BATCH,
    samples: int = SAMPLES,
    seed: int = 0,
    cache_folder: Path | str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Benchmark:
    """Score a rated set with each scorer and compare.

    All scorers are compared on the same images: what one of them cannot score, or what cannot be decoded, counts for
    none and is listed. No more than `batch_size` decoded images are held.

    Args:
        cache_folder: where scores are kept (None = nowhere). They are taken again while the scorer's name and weights
            are the same; scorers without a `key` of their weights are tried on one kept batch first.
        on_progress: called with (images scored, of how many, scorer's name); what it raises ends the run, and what
            was scored until then is kept.

    Raises:
        ErnieError: no scorer, two of one name, a scorer reads prompts and there are none, or no image is left.
    """
    if not scorers:
        raise ErnieError("the benchmark needs at least one scorer, got none.")
    names = [s.name for s in scorers]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ErnieError(f"the scorer {twice!r} is connected twice; the report could not tell them apart.")
    for scorer in scorers:
        missing = sum(not r.prompt.strip() for r in ratings.ratings)
        if scorer.reads_prompt and missing:
            raise ErnieError(
                f"{scorer.name} compares images with prompts, and {missing} of {len(ratings)} ratings have none; "
                f"give the table a column {' or '.join(_PROMPT_KEYS)}, or leave this scorer out."
            )
    problems = list(ratings.problems)
    values: list[dict[str, float]] = []
    for scorer in scorers:
        kept = ScoreCache(cache_folder, scorer) if cache_folder is not None else None
        values.append(_score_all(scorer, ratings.ratings, kept, batch_size, problems, on_progress))
    images = tuple(r for r in ratings.ratings if all(r.sha256 in v for v in values))
    if len(images) < 2:
        raise ErnieError(
            f"a benchmark needs two images at least, and {len(images)} of {len(ratings)} could be scored: "
            f"{_some(problems)}"
        )
    unique = list(dict.fromkeys(problems))  # an image that cannot be decoded is met once per scorer
    results = [_compare(s, images, v, samples, seed) for s, v in zip(scorers, values, strict=True)]
    return Benchmark(
        name=ratings.name,
        images=images,
        results=tuple(results),
        differences=_differences(results, images, samples, seed),
        problems=tuple(unique),
        samples=samples,
        seed=seed,
    )


class ScoreCache:
    """Scores of one scorer by image, one line each in a file that is only ever added to."""

    def __init__(self, folder: Path | str, scorer: Scorer) -> None:
        self.has_key = bool(getattr(scorer, "key", ""))
        identity = json.dumps([scorer.name, type(scorer).__name__, getattr(scorer, "key", "")])
        words = re.sub(r"[^A-Za-z0-9]+", "-", scorer.name).strip("-")[:40] or "scorer"
        self.path = Path(folder) / f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
        self.values: dict[str, float] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    image, value = json.loads(line)
                    self.values[str(image)] = float(value)
                except (ValueError, TypeError):
                    continue  # the last line of a run that was killed

    def add(self, scores: Mapping[str, float]) -> None:
        """Raises ErnieError when the disk is full."""
        self.values.update(scores)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell():  # a killed run's torn last line must not swallow the next one
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write("".join(json.dumps(list(item)) + "\n" for item in scores.items()).encode())
        except OSError as e:
            raise ErnieError(f"{self.path} cannot be written ({e.strerror or e}); free some space.") from e

    def clear(self) -> None:
        self.values.clear()
        self.path.unlink(missing_ok=True)


def _score_all(
    scorer: Scorer,
    ratings: Sequence[Rating],
    cache: ScoreCache | None,
    batch_size: int,
    problems: list[Problem],
    on_progress: Callable[[int, int, str], None] | None,
) -> dict[str, float]:
    """Score by image hash; without those that cannot be scored."""
    keys = {r.sha256: _cache_key(scorer, r) for r in ratings}
    known = cache.values if cache is not None else {}
    if cache is not None and not cache.has_key:
        _try_cache(scorer, [r for r in ratings if keys[r.sha256] in known], cache, keys, batch_size, problems)
    values = {image: known[key] for image, key in keys.items() if key in known}
    todo = [r for r in ratings if r.sha256 not in values]
    for start in range(0, len(todo), batch_size):
        if on_progress is not None:
            on_progress(len(values), len(ratings), scorer.name)
        found = _score_batch(scorer, todo[start : start + batch_size], batch_size, problems)
        values.update(found)
        if cache is not None and found:
            cache.add({keys[image]: value for image, value in found.items()})
    if on_progress is not None:
        on_progress(len(ratings), len(ratings), scorer.name)
    return values


def _cache_key(scorer: Scorer, rating: Rating) -> str:
    if not scorer.reads_prompt:
        return rating.sha256
    return f"{rating.sha256}+{hashlib.sha256(rating.prompt.encode()).hexdigest()}"


def _try_cache(
    scorer: Scorer,
    kept: Sequence[Rating],
    cache: ScoreCache,
    keys: Mapping[str, str],
    batch_size: int,
    problems: list[Problem],
) -> None:
    """Score one batch of kept images again; other numbers come of other weights of the same name."""
    if not kept:
        return
    again = _score_batch(scorer, kept[:batch_size], batch_size, [])
    spread = float(np.std(list(cache.values.values())))
    for image, value in again.items():
        before = cache.values[keys[image]]
        if abs(value - before) > 0.02 * spread + 1e-3 * abs(before):
            reason = f"its {len(cache.values)} kept scores are of other weights and were made again"
            problems.append(Problem(label=scorer.name, reason=reason))
            cache.clear()
            return


def _score_batch(scorer: Scorer, batch: Sequence[Rating], batch_size: int, problems: list[Problem]) -> dict[str, float]:
    loaded: list[tuple[Rating, np.ndarray]] = []
    for rating in batch:
        try:
            loaded.append((rating, load_image(rating.image).rgb_HWC))
        except ErnieError as e:
            problems.append(Problem(label=rating.image.name, reason=f"left out: {e}"))

    def score(part: Sequence[tuple[Rating, np.ndarray]]) -> list[float]:
        prompts = [r.prompt for r, _ in part] if scorer.reads_prompt else None
        return scorer.score([image for _, image in part], prompts, batch_size=batch_size)

    if not loaded:
        return {}
    try:
        return {r.sha256: v for (r, _), v in zip(loaded, score(loaded), strict=True)}
    except ErnieError as error:
        found: dict[str, float] = {}  # one image that a scorer refuses must not end the run
        for pair in loaded if len(loaded) > 1 else ():
            try:
                found[pair[0].sha256] = score([pair])[0]
            except ErnieError as e:
                problems.append(Problem(label=pair[0].image.name, reason=f"left out: {scorer.name}: {e}"))
        if not found:
            raise error
        return found


def _compare(
    scorer: Scorer, images: Sequence[Rating], values: Mapping[str, float], samples: int, seed: int
) -> ScorerResult:
    scores = Scores(
        scorer=scorer.name,
        values=tuple(values[r.sha256] for r in images),
        labels=tuple(r.image.name for r in images),
        prompts=tuple(r.prompt for r in images),
        categories=tuple(r.category for r in images),
        files=tuple(str(r.image) for r in images),
        higher_is_better=scorer.higher_is_better,
        low=scorer.low,
        high=scorer.high,
    )
    liked, human = _liked(scores), [r.human for r in images]
    overall = agreement(liked, human, samples=samples, seed=seed)
    several = len(set(scores.categories)) > 1
    return ScorerResult(
        scores=scores,
        overall=overall,
        categories=tuple(category_table(liked, human, scores.categories, samples=samples, seed=seed))
        if several
        else (),
        biases=tuple(bias_table(liked, human, scores.categories, samples=samples, seed=seed))
        if several and overall.srcc is not None
        else (),
    )


def _liked(scores: Scores) -> np.ndarray:
    """The scores, turned so that higher is better."""
    return np.asarray(scores.values, float) * (1 if scores.higher_is_better else -1)


def _differences(
    results: Sequence[ScorerResult], images: Sequence[Rating], samples: int, seed: int
) -> tuple[tuple[str, str, Interval], ...]:
    human = [r.human for r in images]
    good = [r for r in results if r.overall.srcc is not None]
    return tuple(
        (
            a.name,
            b.name,
            bootstrap_difference(srcc, _liked(a.scores), _liked(b.scores), human, samples=samples, seed=seed),
        )
        for i, a in enumerate(good)
        for b in good[i + 1 :]
    )


# --- the report ------------------------------------------------------------------------------------------------


def write_benchmark(benchmark: Benchmark, folder: Path | str) -> list[Path]:
    """Write report.md, report.json, scores.csv and the pictures; returns their paths."""
    from PIL import Image

    folder = Path(folder)
    files = {
        "report.md": benchmark.to_markdown().encode(),
        "report.json": benchmark.to_json().encode(),
        "scores.csv": benchmark.to_csv().encode("utf-8-sig"),  # with BOM: Excel reads it as UTF-8
    }
    for name, picture in benchmark.pictures().items():
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        files[f"{name}.png"] = data.getvalue()
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


_HEADER = ("scorer", "SRCC", "PLCC", "KRCC", "images")


def _row(name: str, row: Agreement) -> list[str]:
    shown = [_show(i) for i in (row.srcc, row.plcc, row.krcc)]
    return [name, *shown, str(row.n)]


def _show(interval: Interval | None) -> str:
    if interval is None or not math.isfinite(interval.value):
        return "n/a"
    if not math.isfinite(interval.low):
        return f"{interval.value:.4f}"
    return f"{interval.value:.4f} [{interval.low:.3f}, {interval.high:.3f}]"


def _measured_title(b: Benchmark) -> str:
    return f"Measured here on {b.name}: {len(b.images)} images"


def _markdown(b: Benchmark) -> str:
    parts = [f"# Aesthetic benchmark: {b.name}", f"## {_measured_title(b)}"]
    parts.append(markdown_table(_HEADER, [_row(r.name, r.overall) for r in b.results]))
    parts.append(
        f"In brackets: 95 % BCa bootstrap intervals, {b.samples} resamples of images, seed {b.seed}. KRCC is tau-b."
    )
    parts += [f"- {r.name}: {r.overall.problem}" for r in b.results if r.overall.problem]
    if b.differences:
        parts.append("## Which scorer is better: difference of SRCC on the same images")
        rows = [[x, y, _show(d), _better(x, y, d)] for x, y, d in b.differences]
        parts.append(markdown_table(("scorer", "other", "difference", "better"), rows))
    parts.append(f"## {PUBLISHED_TITLE}")
    parts.append(
        markdown_table(("scorer", "SRCC", "PLCC"), [[n, f"{s:.4f}", f"{p:.4f}"] for n, (s, p) in PUBLISHED.items()])
    )
    parts.append("Comparable with the table above only if that set is ERIA-1K, with the same images.")
    for r in b.results:
        if r.categories:
            parts.append(f"## {r.name} by category")
            header = ("category", *_HEADER[1:], "note")
            rows = [[*_row(c.category or "(none)", c), c.problem] for c in r.categories]
            parts.append(markdown_table(header, rows))
        if r.biases:
            parts.append(
                "Bias: mean of the rank-normalised score minus that of the human score, 1 = from the last place to "
                "the first; above 0 = over-rated."
            )
            rows = [[x.category or "(none)", _show(x.bias), x.verdict, str(x.n)] for x in r.biases]
            parts.append(markdown_table(("category", "bias", "verdict", "images"), rows))
    if b.problems:
        parts.append(f"## {len(b.problems)} problems")
        parts.append("\n".join(f"- {p}" for p in b.problems[:200]))
        if len(b.problems) > 200:
            parts.append(f"... and {len(b.problems) - 200} more (report.json has all).")
    return "\n\n".join(parts) + "\n"


def _better(first: str, second: str, difference: Interval) -> str:
    if difference.low > 0:
        return first
    return second if difference.high < 0 else "not decided by these images"


def _pictures(b: Benchmark) -> dict[str, np.ndarray]:
    measured = draw_table(_HEADER, [_row(r.name, r.overall) for r in b.results], title=_measured_title(b))
    published = draw_table(
        ("scorer", "SRCC", "PLCC"),
        [[n, f"{s:.4f}", f"{p:.4f}"] for n, (s, p) in PUBLISHED.items()],
        title=PUBLISHED_TITLE,
    )
    found = {"table": stack_pictures([measured, published])}
    for number, r in enumerate(b.results, start=1):
        points: dict[str, list[tuple[float, float]]] = {}
        for rating, value in zip(b.images, r.scores.values, strict=True):
            points.setdefault(rating.category or "images", []).append((rating.human, value))
        title = f"{r.name}: SRCC {_show(r.overall.srcc)}, PLCC {_show(r.overall.plcc)}"
        found[f"scatter_{number}"] = draw_scatter(points, title=title, x_label="human score", y_label=r.name)
        bars = [
            Bar(label=f"{c.category or '(none)'} ({c.n})", value=c.srcc.value, low=c.srcc.low, high=c.srcc.high)
            for c in r.categories
            if c.srcc is not None
        ]
        if bars:
            found[f"categories_{number}"] = draw_bars(bars, title=f"{r.name}: SRCC by category (images)", label="SRCC")
        bars = [
            Bar(label=f"{x.category or '(none)'} ({x.n})", value=x.bias.value, low=x.bias.low, high=x.bias.high)
            for x in r.biases
        ]
        if bars:
            found[f"bias_{number}"] = draw_bars(
                bars, title=f"{r.name}: bias by category", label="under-rated < 0 < over-rated", zero=True
            )
        found[f"extremes_{number}"] = _extremes(b, r)
    return found


def _extremes(b: Benchmark, r: ScorerResult) -> np.ndarray:
    """Contact sheets of the images where scorer and people disagree most."""
    ranks, human = rank_normalise(_liked(r.scores)), rank_normalise([x.human for x in b.images])
    order = np.argsort(human - ranks, kind="stable")
    n = len(order)
    count = min(_EXTREMES, n // 2)

    def sheet(places: np.ndarray, title: str) -> np.ndarray:
        return contact_sheet(
            (
                Cell(
                    picture=load_image(b.images[i].image).rgb_HWC,
                    text=f"{r.scores.values[i]:.4g} / {b.images[i].human:.4g}",
                    label=b.images[i].category or b.images[i].image.name,
                )
                for i in map(int, places)
            ),
            title=title,
            columns=_EXTREMES,
            cell_px=144,
        )

    return stack_pictures(
        [
            sheet(order[:count], f"{r.name} likes these more than people do (score / human)"),
            sheet(order[::-1][:count], f"{r.name} likes these less than people do (score / human)"),
        ]
    )


def _some(problems: Sequence[Problem]) -> str:
    more = f" and {len(problems) - 5} more." if len(problems) > 5 else ""
    return "; ".join(str(p) for p in problems[:5]) + more


# --- prompt following ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """A prompt-following benchmark in both of the model card's columns, which are never added up."""

    text: str
    """Markdown."""
    picture: np.ndarray
    """uint8 [H, W, 3]"""
    numbers: dict[str, Any]
    """For JSON: per column its score, tables and problems; and what was published."""


def list_prompts(prompts_file: Path | str, *, copies: int = 4, seed: int = 0) -> str:
    """A CSV with prompt and seed for Batch from Prompts, `copies` rows per prompt of either benchmark, with the seeds
    seed, seed + 1, ...

    Raises:
        ErnieError: the file is of neither benchmark, or copies is below 1.
    """
    if copies < 1:
        raise ErnieError(f"copies must be 1 or more, got {copies}.")
    first = next((row for _, row in read_table(Path(prompts_file)) if isinstance(row, dict)), {})
    is_geneval = "include" in first
    read = geneval.read_object_prompts if is_geneval else longtext.read_text_prompts
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["prompt", "seed"])
    for prompt in read(prompts_file):
        writer.writerows([prompt.prompt, seed + i] for i in range(copies))
    return out.getvalue()


def benchmark_geneval(
    prompts_file: Path | str, files: Mapping[str, Path | str], *, model: str, samples: int = SAMPLES, seed: int = 0
) -> PromptReport:
    """GenEval out of files: {column: detections, or already judged pictures}; see `geneval.read_detections`.

    Raises:
        ErnieError: an unknown column or model, one file for both columns, or nothing in a file that could be used.
    """
    _check_columns(files, model, geneval.PUBLISHED)
    prompts = geneval.read_object_prompts(prompts_file)
    columns: dict[str, geneval.GenEval] = {}
    for column, file in files.items():
        if geneval.holds_results(file):
            results, problems = geneval.read_results(file)
            columns[column] = geneval.summarise(results, problems=problems, samples=samples, seed=seed)
        else:
            pictures, problems = geneval.read_detections(file, prompts)
            found = geneval.score_geneval(prompts, pictures, samples=samples, seed=seed)
            columns[column] = replace(found, problems=(*problems, *found.problems))
    return report_geneval(columns, model)


def benchmark_longtext(
    prompts_file: Path | str,
    files: Mapping[str, Path | str],
    *,
    language: longtext.Language,
    model: str,
    samples: int = SAMPLES,
    seed: int = 0,
) -> PromptReport:
    """LongText-Bench out of files: {column: what an OCR read}; see `longtext.read_ocr`.

    Raises:
        ErnieError: an unknown column, model or language, one file for both columns, or nothing that could be used.
    """
    _check_columns(files, model, longtext.PUBLISHED)
    if language not in longtext.LANGUAGES:
        raise ErnieError(f"language must be one of {', '.join(longtext.LANGUAGES)}, got {language!r}.")
    prompts = longtext.read_text_prompts(prompts_file)
    columns: dict[str, longtext.LongText] = {}
    for column, file in files.items():
        readings, problems = longtext.read_ocr(file, prompts)
        found = longtext.score_longtext(prompts, readings, language, samples=samples, seed=seed)
        columns[column] = replace(found, problems=(*problems, *found.problems))
    return report_longtext(columns, model)


def report_geneval(columns: Mapping[str, geneval.GenEval], model: str) -> PromptReport:
    """GenEval with and without the enhancer, beside what was published of `model`."""
    header = ["", *columns, *(f"published, {c}" for c in COLUMNS)]
    published = geneval.PUBLISHED[model]
    by_task = {c: {task: (n, score) for task, n, score in g.tasks} for c, g in columns.items()}
    rows = [["overall", *(_show(g.overall) for g in columns.values()), *(f"{published[c][0]:.4f}" for c in COLUMNS)]]
    for i, task in enumerate(geneval.TASKS, start=1):
        own = [_show(by_task[c][task][1]) if task in by_task[c] else "n/a" for c in columns]
        rows.append([task, *own, *(f"{published[c][i]:.4f}" for c in COLUMNS)])
    rows.append(["pictures", *(str(len(g.results)) for g in columns.values()), "", ""])
    rows.append(["prompts", *(str(g.num_prompts) for g in columns.values()), "553", "553"])
    numbers = {
        c: {
            "overall": asdict(g.overall),
            "tasks": {task: {"pictures": n, **asdict(score)} for task, n, score in g.tasks},
            "correct_images": g.correct_images,
            "correct_prompts": g.correct_prompts,
            "wrong": [{"image": r.image, "prompt": r.prompt, "reason": r.reason} for r in g.results if not r.correct],
            "problems": [str(p) for p in g.problems],
        }
        for c, g in columns.items()
    }
    return _prompt_report(f"GenEval: {model}", header, rows, numbers, {c: g.problems for c, g in columns.items()})


def report_longtext(columns: Mapping[str, longtext.LongText], model: str) -> PromptReport:
    """LongText-Bench of one language with and without the enhancer, beside what was published of `model`."""
    languages = {t.language for t in columns.values()}
    assert len(languages) == 1, languages
    place = longtext.LANGUAGES.index(languages.pop())
    header = ["", *columns, *(f"published, {c}" for c in COLUMNS)]
    published = [f"{longtext.PUBLISHED[model][c][place]:.4f}" for c in COLUMNS]
    rows = [["score", *(_show(t.score) for t in columns.values()), *published]]
    tables = {c: dict((name, s) for name, _, s in (*t.by_length, *t.by_category)) for c, t in columns.items()}
    for name in dict.fromkeys(n for table in tables.values() for n in table if n):
        rows.append([name, *(_show(tables[c].get(name)) for c in columns), "", ""])
    rows.append(["pictures", *(str(len(t.results)) for t in columns.values()), "", ""])
    numbers = {
        c: {
            "language": t.language,
            "score": asdict(t.score),
            "by_category": {name: {"pictures": n, **asdict(s)} for name, n, s in t.by_category},
            "by_length": {name: {"pictures": n, **asdict(s)} for name, n, s in t.by_length},
            "pictures": [asdict(r) | {"recall": r.recall} for r in t.results],
            "problems": [str(p) for p in t.problems],
        }
        for c, t in columns.items()
    }
    title = f"LongText-Bench {('English', 'Chinese')[place]}: {model}"
    return _prompt_report(title, header, rows, numbers, {c: t.problems for c, t in columns.items()})


def write_prompt_report(report: PromptReport, folder: Path | str) -> list[Path]:
    """Write report.md, report.json and table.png; returns their paths."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(report.picture).save(data, "PNG")
    folder = Path(folder)
    numbers = json.dumps(report.numbers, ensure_ascii=False, indent=1) + "\n"
    files = {"report.md": report.text.encode(), "report.json": numbers.encode(), "table.png": data.getvalue()}
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def _check_columns(files: Mapping[str, Path | str], model: str, published: Mapping[str, Any]) -> None:
    if model not in published:
        raise ErnieError(f"model must be one of {', '.join(published)}, got {model!r}.")
    if not files or not set(files) <= set(COLUMNS):
        raise ErnieError(f"columns must be of {', '.join(COLUMNS)}, got {', '.join(files) or 'none'}.")
    paths = [Path(file) for file in files.values()]
    missing = next((p for p in paths if not p.exists()), None)
    if missing is not None:
        raise ErnieError(f"there is no file {missing}.")
    if len({p.resolve() for p in paths}) < len(paths) or (
        len(paths) == 2 and all(p.is_file() for p in paths) and paths[0].read_bytes() == paths[1].read_bytes()
    ):
        raise ErnieError("both columns hold the same results; pictures with and without the enhancer are two sets.")


def _prompt_report(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: dict[str, Any],
    problems: Mapping[str, Sequence[Problem]],
) -> PromptReport:
    parts = [f"# {title}", markdown_table(header, rows)]
    parts.append(
        "In brackets: 95 % bootstrap intervals over prompts. Published: Baidu's README of ERNIE-Image; its detector, "
        "OCR, settings and seeds may differ from yours."
    )
    for column, found in problems.items():
        if found:
            parts.append(f"## {column}: {len(found)} problems")
            parts.append("\n".join(f"- {p}" for p in found[:100]))
    picture = draw_table(header, rows, title=title)
    return PromptReport(text="\n\n".join(parts) + "\n", picture=picture, numbers=finite(numbers))
