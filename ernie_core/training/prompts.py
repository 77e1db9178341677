"""Prompts alone as training data: what distillation needs, whose pictures the student paints itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..batch import Problem
from ..errors import ErnieError
from .captions import DEFAULT_STYLE, Caption
from .items import MANIFEST_VERSION, DatasetOptions, Item, read_lines, write_lines

PROMPTS_HEADER = "ernie-image prompts"
SQUARE = (1, 1)
OPTIONS = DatasetOptions(max_upscale=1e9)
"""A prompt has no pixels that could be enlarged."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts with their tags, as items without pictures: `concept` is the tag, `width` to `height` the shape."""

    items: tuple[Item, ...]
    options: DatasetOptions = OPTIONS
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def report(self) -> str:
        """Lines for people: how many there are, and of which tags."""
        tags = ", ".join(f"{count} {tag or 'without a tag'}" for tag, count in self.tags.items())
        return f"{len(self)} prompts: {tags}"

    @property
    def tags(self) -> dict[str, int]:
        """Prompts of each tag; "" = without one."""
        return dict(Counter(item.concept for item in self.items))


def make_prompt(text: str, *, tag: str = "", shape: tuple[int, int] = SQUARE) -> Item:
    """A prompt as an item; `shape` is width to height, the size is the recipe's."""
    key = hashlib.sha256(f"{tag}\n{text}".encode()).hexdigest()
    captions = (Caption(DEFAULT_STYLE, text),)
    return Item(image=Path(), captions=captions, concept=tag, width=shape[0], height=shape[1], sha256=key)


def read_prompts(text: str, *, tags: Collection[str] = ()) -> Prompts:
    """One prompt per line; "tag: prompt" where the tag is one of `tags`, so that a prompt may hold a colon.

    Empty lines and those that start with # are passed over.

    Raises:
        ErnieError: nothing is left, or a tag without a prompt.
    """
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        head, colon, rest = line.partition(":")
        tag, prompt = (head.strip(), rest.strip()) if colon and head.strip() in tags else ("", line)
        if not prompt:
            raise ErnieError(f"line {number} of the prompts has the tag {tag!r} and no prompt behind it.")
        items.append(make_prompt(prompt, tag=tag))
    if not items:
        raise ErnieError("there are no prompts to train on: write one per line.")
    return Prompts(items=tuple(items))


def write_prompts_manifest(prompts: Prompts, path: Path | str) -> None:
    """Write a header and a line for each prompt."""
    lines = [
        {"prompt": item.captions[0].text, "tag": item.concept, "shape": [item.width, item.height]}
        for item in prompts.items
    ]
    write_lines(Path(path), [{"format": PROMPTS_HEADER, "version": MANIFEST_VERSION}, *lines])


def read_prompts_manifest(path: Path | str) -> Prompts:
    """What `write_prompts_manifest` wrote.

    Raises:
        ErnieError: it is no such file, or a line is damaged.
    """
    _, lines = read_lines(Path(path), PROMPTS_HEADER)
    try:
        items = [make_prompt(v["prompt"], tag=v["tag"], shape=(v["shape"][0], v["shape"][1])) for v in lines]
    except (KeyError, TypeError, IndexError) as e:
        raise ErnieError(f"{path} is damaged ({e!r}); make the job again from its prompts.") from e
    return Prompts(items=tuple(items))


def is_prompts_manifest(path: Path) -> bool:
    """Whether the manifest at `path` lists prompts and not pictures."""
    with path.open(encoding="utf-8") as file:
        return PROMPTS_HEADER in file.readline()
