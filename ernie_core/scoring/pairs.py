"""Preference pairs out of values: a ranking's strengths or a scorer's numbers become what DPO trains on.

Only pictures of the same prompt make a pair. The files that are written are those that other trainers read: folders
`chosen` and `rejected` of equal names with the prompt as .txt beside the chosen one, and `pairs.jsonl`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ErnieError
from ..training.captions import DEFAULT_STYLE, Caption
from ..training.dataset import DatasetOptions
from ..training.items import Item, OnProgress, read_text, write_lines, write_whole
from ..training.pairs import Pair, Pairs, check_pairs

How = Literal["best against worst", "every pair"]

# What a picture's metadata calls its settings -> what we call them; inputs of sampler nodes and A1111's words.
_SETTINGS = {
    "seed": "seed",
    "noise_seed": "seed",
    "steps": "steps",
    "cfg": "cfg",
    "cfg scale": "cfg",
    "sampler_name": "sampler",
    "sampler": "sampler",
    "scheduler": "scheduler",
    "schedule type": "scheduler",
    "denoise": "denoise",
    "shift": "shift",
    "width": "width",
    "height": "height",
    "model": "model",
}
ENTRY = "ernie_"  # what our own nodes write into a picture begins with it
_TEXTS = ("text", "prompt", "string", "value")
MAX_LINKS = 50  # steps from node to node in which a value is looked for


@dataclass(frozen=True, kw_only=True)
class Valued:
    """A picture and what it is worth; more is better."""

    path: Path
    value: float
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Preference:
    chosen: Valued
    rejected: Valued

    @property
    def margin(self) -> float:
        return self.chosen.value - self.rejected.value


def prefer(
    pictures: Sequence[Valued],
    how: How = "best against worst",
    *,
    min_gap: float = 0.0,
    max_per_prompt: int | None = None,
) -> list[Preference]:
    """Pairs of pictures of the same prompt whose values differ by `min_gap` or more, never equals.

    Args:
        pictures: of any prompts, in any order.
        how: "best against worst": the best with the worst, the second best with the second worst, and so on, each
            picture once; "every pair": all of them, the widest gaps first.
        min_gap: least difference of the values.
        max_per_prompt: pairs per prompt, from the widest gap on; None = all.

    Raises:
        ErnieError: an argument out of its range.
    """
    if how not in get_args(How):
        raise ErnieError(f"pairs are made by one of {', '.join(get_args(How))}; got {how!r}.")
    _check_limits(min_gap, max_per_prompt)
    groups: dict[str, list[Valued]] = {}
    for picture in pictures:
        groups.setdefault(picture.prompt.strip(), []).append(picture)
    made: list[Preference] = []
    for group in groups.values():
        ranked = sorted(group, key=lambda p: -p.value)
        num = len(ranked)
        if how == "best against worst":
            places = [(i, num - 1 - i) for i in range(num // 2)]
        else:
            places = [(i, j) for i in range(num) for j in range(i + 1, num)]
        made += _widest((Preference(chosen=ranked[i], rejected=ranked[j]) for i, j in places), min_gap, max_per_prompt)
    return made


def keep_judged(
    judged: Iterable[Preference], *, min_gap: float = 0.0, max_per_prompt: int | None = None
) -> list[Preference]:
    """Pairs that somebody decided, left out where all judgments together say the contrary or too small a gap."""
    _check_limits(min_gap, max_per_prompt)
    groups: dict[str, list[Preference]] = {}
    for pair in judged:
        if pair.chosen.prompt.strip() == pair.rejected.prompt.strip():
            groups.setdefault(pair.chosen.prompt.strip(), []).append(pair)
    return [kept for group in groups.values() for kept in _widest(group, min_gap, max_per_prompt)]


def _check_limits(min_gap: float, max_per_prompt: int | None) -> None:
    if not 0 <= min_gap < float("inf"):
        raise ErnieError(f"min_gap must be 0 or more, got {min_gap:g}.")
    if max_per_prompt is not None and max_per_prompt < 1:
        raise ErnieError(f"max_per_prompt must be at least 1, got {max_per_prompt}.")


def _widest(pairs: Iterable[Preference], min_gap: float, most: int | None) -> list[Preference]:
    wide = [pair for pair in pairs if pair.margin > 0 and pair.margin >= min_gap]
    return sorted(wide, key=lambda pair: -pair.margin)[:most]


def make_pairs(
    preferences: Sequence[Preference],
    options: DatasetOptions | None = None,
    *,
    source: str = "the ranking",
    on_progress: OnProgress | None = None,
) -> Pairs:
    """`training.pairs.Pairs`, every picture decoded once; what cannot be used is in its `problems`.

    Raises:
        ErnieError: no pair is left (says why), or prompts are missing while `options.missing_caption` is "error".
    """
    if not preferences:
        raise ErnieError(
            f"{source} gives no pair: no two pictures of one prompt differ enough. Lower the gap, judge more, or see "
            "that pictures of the same prompt are among them."
        )
    drafts = []
    for pair in preferences:
        text = pair.chosen.prompt.strip()
        captions = (Caption(DEFAULT_STYLE, text),) if text else ()
        chosen = Item(image=pair.chosen.path, captions=captions)
        drafts.append(Pair(chosen=chosen, rejected=Item(image=pair.rejected.path), margin=pair.margin))
    return check_pairs(drafts, source, options, on_progress=on_progress)


# --- files ----------------------------------------------------------------------------------------------------


def write_pairs(pairs: Pairs, folder: Path | str, *, copy: bool = True) -> Path:
    """Write `folder`/pairs.jsonl: prompt, chosen, rejected, margin, info (seeds and settings); returns its path.

    With `copy` the pictures go to chosen/ and rejected/ as 00001.png and on, with 00001.txt beside the chosen one.
    What an earlier call wrote there is replaced; other files stay.

    Raises:
        ErnieError: the folder holds pictures of somebody else's, or cannot be written.
    """
    folder = Path(folder)
    table = folder / "pairs.jsonl"
    _remove_earlier(folder, table)
    rows = []
    for number, pair in enumerate(pairs.pairs, start=1):
        sides = {"chosen": pair.chosen.image, "rejected": pair.rejected.image}
        info = {side: settings for side, path in sides.items() if (settings := read_settings(path))}
        prompt = pair.captions[0].text if pair.captions else ""
        if copy:
            for side, path in sides.items():
                sides[side] = folder / side / f"{number:05}{path.suffix.lower()}"
                _copy(path, sides[side])
            write_whole(sides["chosen"].with_suffix(".txt"), (prompt + "\n").encode())
        shown = {side: _relative(path, folder) for side, path in sides.items()}
        rows.append({"prompt": prompt, **shown, "margin": pair.margin, **({"info": info} if info else {})})
    write_lines(table, rows)
    return table


def _remove_earlier(folder: Path, table: Path) -> None:
    if table.is_file():
        for line in read_text(table).splitlines():
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                file = folder / str(row.get(side, ""))
                if file.parent == folder / side and re.fullmatch(r"\d{5}\.\w+", file.name):
                    file.unlink(missing_ok=True)
                    file.with_suffix(".txt").unlink(missing_ok=True)
    for side in ("chosen", "rejected"):
        if (folder / side).is_dir() and any((folder / side).iterdir()):
            raise ErnieError(f"{folder / side} holds pictures that no pairs.jsonl lists; give another name.")


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as e:
        raise ErnieError(
            f"{target} cannot be written ({e.strerror or e}). Free some space or take another name."
        ) from e


def _relative(path: Path, folder: Path) -> str:
    resolved, base = path.resolve(), folder.resolve()
    return (resolved.relative_to(base) if resolved.is_relative_to(base) else resolved).as_posix()


# --- what pictures say of themselves --------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any]:
    """Prompt, negative, seed, steps, cfg, sampler, ... as far as a picture's metadata says; {} when it says nothing.

    Read are our own text entries, the graph that ComfyUI puts into its pictures, and A1111's parameters. Never raises:
    metadata is a convenience, and anybody may have written it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            texts = {str(k): v for k, v in image.info.items() if isinstance(v, str)}
    except (OSError, SyntaxError, ValueError):
        return {}
    ours = {k.removeprefix(ENTRY): v for k, v in texts.items() if k.startswith(ENTRY)}
    row = {k: ours[k] for k in ("prompt", "negative", "made_with") if ours.get(k)} | _settings(ours)
    graph = _parse_graph(texts.get("prompt", ""))
    if graph is not None:  # a batch's graph holds the settings of no picture in particular: its own go before
        return _settings_of_graph(graph) | row
    if row:
        return row
    if "parameters" in texts:
        return _settings_of_parameters(texts["parameters"])
    own = {k: texts[k] for k in ("prompt", "negative") if texts.get(k)}
    return own | _settings(texts)


def read_prompt(path: Path) -> str:
    """The prompt of a picture: the .txt beside it, else its metadata, else empty."""
    for suffix in (".txt", ".caption"):
        beside = path.with_suffix(suffix)
        if beside.is_file():
            return read_text(beside)
    return str(read_settings(path).get("prompt", "")).strip()


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = _SETTINGS.get(str(key).strip().lower())
        if name and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            found.setdefault(name, _number(value))
    return found


def _number(value: str | int | float) -> str | int | float:
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value.strip()


def _parse_graph(text: str) -> dict[str, Any] | None:
    try:
        graph = json.loads(text)
    except ValueError:
        return None
    if not isinstance(graph, dict):
        return None
    nodes = {str(k): v for k, v in graph.items() if isinstance(v, dict) and isinstance(v.get("inputs"), dict)}
    return nodes or None


def _settings_of_graph(graph: dict[str, Any]) -> dict[str, Any]:
    """Of the nodes that sample: a seed, and links to what they are conditioned on."""
    found: dict[str, Any] = {}
    for node in graph.values():
        inputs = {name: _follow(graph, value) for name, value in node["inputs"].items()}
        if "seed" not in inputs and "noise_seed" not in inputs:
            continue
        if not {"positive", "guider", "conditioning", "model", "steps"} & inputs.keys() and "noise_seed" not in inputs:
            continue
        found |= {k: v for k, v in _settings(inputs).items() if k not in found}
        for name, key in (("positive", "prompt"), ("negative", "negative")):
            text = next(_iter_texts(graph, node["inputs"].get(name)), "")
            if text and key not in found:
                found[key] = text
    return found


def _follow(graph: dict[str, Any], value: Any) -> Any:
    """The value behind a link, if the node there holds just one."""
    for _ in range(MAX_LINKS):
        if not (isinstance(value, list) and len(value) == 2 and str(value[0]) in graph):
            return value
        inputs = graph[str(value[0])]["inputs"]
        value = inputs.get("value", next(iter(inputs.values())) if len(inputs) == 1 else None)
    return None


def _iter_texts(graph: dict[str, Any], link: Any) -> Iterator[str]:
    """Prompts in the nodes behind a link, nearest first."""
    queue, seen = [link], set()
    while queue and len(seen) < MAX_LINKS:
        link = queue.pop(0)
        if not (isinstance(link, list) and len(link) == 2 and str(link[0]) in graph) or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        inputs = graph[str(link[0])]["inputs"]
        for name in _TEXTS:
            text = _follow(graph, inputs.get(name))
            if isinstance(text, str) and text.strip():
                yield text.strip()
        queue += [value for value in inputs.values() if isinstance(value, list)]


def _settings_of_parameters(text: str) -> dict[str, Any]:
    """A1111: prompt, "Negative prompt: ...", then one line "Steps: 20, Sampler: Euler, Seed: 1, Size: 512x512"."""
    *lines, last = text.strip().splitlines() or [""]
    if "Steps:" not in last:
        lines, last = [*lines, last], ""
    body = "\n".join(lines)
    prompt, _, negative = body.partition("Negative prompt:")
    pairs = dict(part.split(":", 1) for part in last.split(",") if ":" in part)
    found = {k: v for k, v in (("prompt", prompt.strip()), ("negative", negative.strip())) if v}
    size = re.search(r"Size:\s*(\d+)x(\d+)", last)
    if size:
        found |= {"width": int(size[1]), "height": int(size[2])}
    return found | _settings(pairs)
