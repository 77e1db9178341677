"""Folders of a prompt set as the runner leaves them, painted in one colour each instead of by a model."""

from __future__ import annotations

from pathlib import Path

from ernie_pack.ernie_core.batch import Row, append_manifest, file_name
from ernie_pack.ernie_core.evaluation.prompt_sets import PromptItem, PromptSet, make_rows, write_setting
from PIL import Image

ROW = Row(label="", prompt="", negative="", seed=0, width=16, height=16, steps=2, cfg=1.0, shift=4.0)


def make_set(counts: dict[str, int], name: str = "set") -> PromptSet:
    """So many prompts in each category."""
    told = [(category, i) for category, count in counts.items() for i in range(count)]
    items = [
        PromptItem(number=n, prompt=f"{category} {i}\nand more", category=category, source="own")
        for n, (category, i) in enumerate(told, start=1)
    ]
    return PromptSet(name=name, items=tuple(items))


def paint(folder: Path, prompts: PromptSet, red, *, seeds: int = 1, cfg: float = 1.0) -> Path:
    """`red`(item, number of the seed) is the redness of each picture, 0 to 255; None = no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(prompts, Row(**{**ROW.__dict__, "cfg": cfg}), seeds=seeds)
    write_setting(folder, prompts, rows)
    for item, part in zip(prompts.items, rows, strict=True):
        for k, row in enumerate(part):
            if red(item, k) is not None:
                Image.new("RGB", (16, 16), (red(item, k), 0, 0)).save(folder / file_name(row))
                append_manifest(folder, row, file_name(row))
    return folder


class Red:
    """The score of a picture is how red it is, 0 to 255."""

    name, key, reads_prompt, higher_is_better, low, high = "red", "red", False, True, 0.0, 255.0

    def score(self, images, prompts=None, *, batch_size=8, on_scored=None):
        texts = None if prompts is None or isinstance(prompts, str) else iter(prompts)
        values = []
        for image in images:
            if texts is not None:
                self.seen.append((next(texts), float(image[0, 0, 0])))
            values.append(float(image[0, 0, 0]))
        if on_scored is not None:
            on_scored(len(values))
        return values


class RedOfPrompt(Red):
    """The same, of a picture and its prompt together, which it remembers."""

    name, key, reads_prompt = "red of prompt", "red of prompt", True

    def __init__(self):
        self.seen = []
