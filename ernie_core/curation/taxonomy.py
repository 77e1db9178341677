"""The tree of categories that pictures are sorted into: read from a file, kept as flat arrays in level order.

A file is either indented text, one category per line,

    animals
        birds
            owl
            crane | a crane, the bird       # what stands behind | is what a model reads instead of the name

or JSON: objects are branches, lists and null are leaves: {"animals": {"birds": ["owl", "crane | a crane, the bird"]}}.
A category's path is its names with "/" between them: animals/birds/owl.

Level order means: all categories of the first level, then all of the second, and so on; children of one parent lie
beside each other. So a whole tree is a few arrays, and a step down the tree for many pictures is one operation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ErnieError

STARTER = Path(__file__).with_name("taxonomy.txt")
"""A tree of our own for pictures of all kinds, to start from."""
MAX_BYTES = 64 << 20
TAB = 4  # columns that a tab counts as

Line = tuple[int, str, str]  # (line number, or 0 in JSON; name; text)
Node = tuple[Line, list["Node"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Taxonomy:
    """Categories in level order; the root is left out."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    """What a model reads for each: the name, or what stands behind its "|"."""
    parents: np.ndarray
    """int64 [N]: place of the parent, -1 on the first level."""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Names from the first level down, with "/" between them."""
        paths: list[str] = []
        for name, parent in zip(self.names, self.parents.tolist(), strict=True):
            paths.append(name if parent < 0 else f"{paths[parent]}/{name}")
        return tuple(paths)

    @cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(first, end) of each level's places."""
        depth = np.zeros(len(self), dtype=np.int64)
        for i, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                depth[i] = depth[parent] + 1
        ends = np.flatnonzero(np.diff(depth)) + 1
        bounds = [0, *ends.tolist(), len(self)]
        return tuple(pairwise(bounds))

    @cached_property
    def family_starts(self) -> np.ndarray:
        """int64 [F]: where each group of siblings begins."""
        return np.concatenate([[0], np.flatnonzero(np.diff(self.parents)) + 1])

    @cached_property
    def families(self) -> np.ndarray:
        """int64 [N]: which group of siblings a category is in."""
        return np.searchsorted(self.family_starts, np.arange(len(self)), side="right") - 1

    @cached_property
    def leaves(self) -> np.ndarray:
        """int64: places without children."""
        return np.setdiff1d(np.arange(len(self)), self.parents)

    @cached_property
    def ancestors(self) -> np.ndarray:
        """int64 [levels, N]: the category's place on each level on the way to it, itself included; -1 below it."""
        ancestors = np.full((len(self.levels), len(self)), -1, dtype=np.int64)
        for level, (first, end) in enumerate(self.levels):
            ancestors[:level, first:end] = ancestors[:level, self.parents[first:end]]
            ancestors[level, first:end] = np.arange(first, end)
        return ancestors

    def way(self, place: int) -> list[int]:
        """Places from the first level down to `place`."""
        return [step for step in self.ancestors[:, place].tolist() if step >= 0]

    def children(self, place: int) -> range:
        """Places of the children; of the first level for -1."""
        first = int(np.searchsorted(self.parents, place, side="left"))
        return range(first, int(np.searchsorted(self.parents, place, side="right")))

    def place(self, path: str) -> int | None:
        """Where the category with this path lies; None where there is none."""
        return self._places.get(path)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.paths)}

    @cached_property
    def key(self) -> str:
        """16 hex digits that change with names, texts, order and shape of the tree."""
        content = json.dumps([self.names, self.texts, self.parents.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_taxonomy(path: Path | str) -> Taxonomy:
    """The tree in a text or .json file.

    Raises ErnieError: not there, too large, not UTF-8, or as `parse_taxonomy`.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ErnieError(f"{path} is larger than {MAX_BYTES >> 20} MiB; a list of categories is not.")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ErnieError(f"{path} must be text in UTF-8; save it so ({e}).") from e
    except OSError as e:
        raise ErnieError(f"the categories in {path} cannot be read: {e.strerror or e}.") from e
    return parse_taxonomy(text, path.name, is_json=path.suffix.lower() == ".json")


def parse_taxonomy(text: str, source: str = "the taxonomy", *, is_json: bool = False) -> Taxonomy:
    """The tree of a file's content; `source` is its name in messages.

    Raises ErnieError: nothing in it, an indentation that fits no line above, a name twice under one parent, a name
    with "/" in it, or JSON of another form; with the number of the line.
    """
    roots = _from_json(text, source) if is_json else _from_lines(text, source)
    if not roots:
        raise ErnieError(f"{source} holds no categories; write one per line, children indented under their parent.")
    names: list[str] = []
    texts: list[str] = []
    parents: list[int] = []
    level: list[tuple[int, list[Node]]] = [(-1, roots)]
    while level:
        below: list[tuple[int, list[Node]]] = []
        for parent, siblings in level:
            _check_names(siblings, names[parent] if parent >= 0 else "", source)
            for (_, name, read), children in siblings:
                if children:
                    below.append((len(names), children))
                names.append(name)
                texts.append(read)
                parents.append(parent)
        level = below
    return Taxonomy(names=tuple(names), texts=tuple(texts), parents=np.asarray(parents, dtype=np.int64))


def _check_names(siblings: Sequence[Node], parent: str, source: str) -> None:
    seen: set[str] = set()
    for (number, name, _), _ in siblings:
        where = f"{source}, line {number}" if number else source
        if not name or "/" in name:
            raise ErnieError(f'{where}: a name must not be empty or hold "/", got {name!r}; write "and" or "or".')
        if name in seen:
            raise ErnieError(f"{where}: {name!r} stands twice under {parent or 'the first level'}; names must differ.")
        seen.add(name)


def _read_name(text: str, number: int) -> Line:
    name, mark, read = (part.strip() for part in text.partition("|"))
    return number, " ".join(name.split()), read if mark and read else " ".join(name.split())


def _from_lines(text: str, source: str) -> list[Node]:
    roots: list[Node] = []
    open_: list[tuple[int, list[Node]]] = [(-1, roots)]  # (columns, children) of the line above and its parents
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split(" #")[0].split("\t#")[0].strip()
        if not content or content.startswith("#"):
            continue
        indent = line[: len(line) - len(line.lstrip())]
        *_, columns = accumulate((TAB if c == "\t" else 1 for c in indent), initial=0)
        while open_[-1][0] >= columns:
            removed, _ = open_.pop()
            if open_[-1][0] < columns < removed:
                raise ErnieError(
                    f"{source}, line {number}: {content!r} is indented by {columns} columns, which no line above it "
                    f"is; indent siblings alike."
                )
        children: list[Node] = []
        open_[-1][1].append((_read_name(content, number), children))
        open_.append((columns, children))
    return roots


def _from_json(text: str, source: str) -> list[Node]:
    try:
        return list(_nodes(json.loads(text), source))
    except (ValueError, RecursionError) as e:
        if isinstance(e, ErnieError):
            raise
        raise ErnieError(f"{source} cannot be read as JSON: {e}.") from e


def _nodes(value: Any, source: str) -> Iterator[Node]:
    if value is None:
        return
    if isinstance(value, dict):
        for name, below in value.items():
            yield _read_name(name, 0), list(_nodes(below, source))
    elif isinstance(value, list) and all(isinstance(name, str) for name in value):
        for name in value:
            yield _read_name(name, 0), []
    else:
        raise ErnieError(f"{source}: objects, lists of names and null were expected, got {str(value)[:60]!r}.")
