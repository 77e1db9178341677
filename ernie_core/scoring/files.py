"""Scoring pictures on disk: files that may be scorers, and a folder's pictures with their prompts and categories.

Of the pictures one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ErnieError
from ..training.pictures import DECODE_ERRORS, SUFFIXES
from .network import TORCH_SUFFIXES
from .scorer import DEFAULT_BATCH, Scorer, Scores, make_scores, to_rgb

PROMPT_ENTRY = "ernie_prompt"  # in the PNGs of this pack
MAX_PROMPT_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ScoredFiles:
    """What scoring a number of files gave."""

    scores: Scores
    problems: tuple[str, ...]
    """A line per picture that could not be used, with the reason."""


def list_weights(folder: Path) -> Iterator[str]:
    """Weight files and model folders (ending with "/") up to two levels below `folder`, sorted."""
    if not folder.is_dir():
        return
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in suffixes:
            yield path.name
        elif path.is_dir() and not path.name.startswith("."):
            holds = any(p.suffix.lower() in suffixes for p in path.iterdir())
            if holds and (path / "config.json").is_file():
                yield f"{path.name}/"
            else:
                yield from (f"{path.name}/{p.name}" for p in sorted(path.iterdir()) if p.suffix.lower() in suffixes)


def list_pictures(folder: Path) -> list[Path]:
    """Picture files in `folder` and below, sorted; hidden ones are left out.

    Raises ErnieError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ErnieError(f"{folder} is not a folder; give one that holds pictures.")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _is_hidden(path.relative_to(folder))
    ]
    if not found:
        raise ErnieError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_prompt(path: Path) -> str:
    """The prompt of a picture: the .txt file beside it, else the entry of this pack's PNGs, else ""."""
    beside = path.with_suffix(".txt")
    if beside.is_file() and beside.stat().st_size <= MAX_PROMPT_BYTES:
        return beside.read_bytes().decode("utf-8-sig", errors="replace").strip()
    if path.suffix.lower() == ".png":
        try:
            with Image.open(path) as image:
                return str(image.info.get(PROMPT_ENTRY, "")).strip()
        except DECODE_ERRORS:
            return ""
    return ""


def score_files(
    scorer: Scorer,
    files: list[Path],
    *,
    folder: Path | None = None,
    prompts: list[str] | str | None = None,
    batch_size: int = DEFAULT_BATCH,
    on_scored: Callable[[int], None] | None = None,
) -> ScoredFiles:
    """The scores of picture files; one that cannot be used is left out and named.

    Args:
        folder: labels are paths below it, categories its sub-folders; None = names only.
        prompts: one per file, or one for all; None = `read_prompt` of each.
        on_scored: called with the number of scored pictures after each batch; may raise.

    Raises:
        ErnieError: not one could be used, or the numbers of prompts and files differ.
    """
    if isinstance(prompts, list) and len(prompts) != len(files):
        raise ErnieError(
            f"{len(files)} pictures and {len(prompts)} prompts; give one prompt per picture, or one for all."
        )
    used: list[tuple[Path, str]] = []
    problems: list[str] = []

    def pictures() -> Iterator:
        for i, path in enumerate(files):
            text = prompts if isinstance(prompts, str) else read_prompt(path) if prompts is None else prompts[i]
            if scorer.reads_prompt and not text.strip():
                problems.append(f"{path.name}: has no prompt, and {scorer.name} reads it")
                continue
            try:
                picture = to_rgb(path)
            except ErnieError as e:
                problems.append(str(e))
                continue
            used.append((path, text))
            yield picture

    def texts() -> Iterator[str]:
        """The prompt of the picture that was taken last; asked for once after each."""
        taken = 0
        while taken < len(used):
            taken += 1
            yield used[taken - 1][1]

    asked = texts() if scorer.reads_prompt else None
    values = scorer.score(pictures(), asked, batch_size=batch_size, on_scored=on_scored)
    if not values:
        raise ErnieError(f"none of {len(files)} pictures could be scored ({'; '.join(problems[:5])}).")
    paths = [path for path, _ in used]
    inside = [path.relative_to(folder) if folder is not None else Path(path.name) for path in paths]
    scores = make_scores(
        scorer,
        values,
        labels=[path.as_posix() for path in inside],
        prompts=[text for _, text in used],
        categories=["" if path.parent == Path(".") else path.parent.as_posix() for path in inside],
        files=[str(path.resolve()) for path in paths],
    )
    return ScoredFiles(scores=scores, problems=tuple(problems))
