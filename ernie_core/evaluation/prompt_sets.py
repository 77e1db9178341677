"""Prompt sets with categories: the tables that benchmarks of text-to-image models come as.

Known shapes: ViLG-300 (PaddlePaddle/ERNIE, Research/ERNIE-ViLG2/data/ViLG-300.csv: prompt, its Chinese text, category
and source, of which three have Chinese column names; quoted cells hold line breaks), DrawBench (Prompts, Category),
PartiPrompts (tab-separated: Prompt, Category, Challenge, Note), GenEval (JSON lines: prompt, tag), and any table with a
header and a column of prompts. Which column was taken for what is said, never guessed silently. A translation is never
checked against its prompt: in ViLG-300 at least one says right where the English says left.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..batch import MAX_SEED, Problem, Row, check_row, file_name
from ..errors import ErnieError
from ..training.items import read_text, write_whole

Role = Literal["prompt", "translation", "category", "source"]
ROLES: tuple[Role, ...] = get_args(Role)
EXAMPLE = Path(__file__).with_name("example_prompts.csv")
SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
SEEDS_APART = 1000  # between prompts, so that more seeds per prompt, or fewer prompts, leave each picture's seed alone
MAX_SEEDS = SEEDS_APART
SETTING = "setting.json"
FORMAT = 1

# Column names, in lower case without white space and signs, best first; the escapes are Chinese for text, Chinese,
# prompt; category, kind, class; source.
ALIASES: dict[Role, tuple[str, ...]] = {
    "prompt": (
        *("prompt", "prompts", "prompten", "enprompt", "promptenglish", "english", "text", "caption", "en"),
        *("\u63d0\u793a\u8bcd", "\u6587\u672c", "\u4e2d\u6587"),
    ),
    "translation": (
        *("\u6587\u672c", "\u4e2d\u6587", "\u4e2d\u6587\u6587\u672c", "\u63d0\u793a\u8bcd", "chinesetext", "chinese"),
        *("promptzh", "promptcn", "zhprompt", "cnprompt", "promptchinese", "translation", "zh", "cn"),
    ),
    "category": (
        *("category", "categories", "class", "type", "\u7c7b\u522b", "\u7c7b\u578b", "\u5206\u7c7b", "tag"),
        *("subcategory", "subset", "skill", "challenge"),
    ),
    "source": ("source", "sources", "\u6765\u6e90", "origin", "dataset", "benchmark", "from"),
}
_DELIMITERS = (",", "\t", ";", "|")


@dataclass(frozen=True, kw_only=True)
class PromptItem:
    """One prompt of a set."""

    number: int
    """Place in the file, from 1, counting records, not lines."""
    prompt: str
    category: str = ""
    source: str = ""
    translation: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A table of prompts as it was read."""

    name: str
    items: tuple[PromptItem, ...]
    columns: dict[Role, str] = field(default_factory=dict)
    """Role -> the column that was taken for it, as the file writes it."""
    unused: tuple[str, ...] = ()
    """Columns that were taken for nothing."""
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def counts(self) -> dict[str, int]:
        """Category -> number of prompts, in the order of the file."""
        return dict(Counter(item.category for item in self.items))

    def report(self) -> str:
        """What was read from where, a line per category and per problem."""
        lines = [f"{self.name}: {len(self)} prompts in {len(self.counts())} categories"]
        lines += [f"{role} from the column {name!r}" for role, name in self.columns.items()]
        if self.unused:
            lines.append(f"not used: {', '.join(map(repr, self.unused))}")
        lines += [f"{name or '(no category)'}: {count}" for name, count in self.counts().items()]
        return "\n".join([*lines, *map(str, self.problems)])


# --- reading ------------------------------------------------------------------------------------------------------


def read_prompt_set(path: Path | str, *, columns: dict[Role, str] | None = None) -> PromptSet:
    """A .csv, .tsv, .txt, .jsonl or .json (list of objects) file; the delimiter is found by the header.

    A .txt whose header names no prompts holds one prompt per line.

    Args:
        columns: which column is what, where the names are not known; the others are found by `ALIASES`.

    Raises:
        ErnieError: no such file, of another kind, no column of prompts (names those that are there), a column that is
            not there, or not one usable row.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        what = "there is no such file" if not path.is_file() else f"it ends with {path.suffix or 'nothing'}"
        raise ErnieError(f"prompts must be a file that ends with {', '.join(SUFFIXES)}, got {path}: {what}.")
    text = read_text(path)
    if not text:
        raise ErnieError(f"{path.name} is empty: a header with a column of prompts, and a row per prompt expected.")
    problems: list[Problem] = []
    wanted: dict[Role, str] = {role: name for role, name in (columns or {}).items() if name.strip()}
    if path.suffix.lower() in (".jsonl", ".json"):
        records = list(_iter_json(text, path, problems))
        header = list(dict.fromkeys(str(name) for _, record in records for name in record))
        taken = _find_columns(header, wanted, path)
    else:
        header, rows, taken = _read_table(text, wanted, path)
        records = list(_iter_records(header, rows, problems))
    items = list(_iter_items(records, taken, problems))
    if not items:
        detail = "; ".join(map(str, problems[:5])) or "it has a header only"
        raise ErnieError(f"{path.name} has no usable prompt ({detail}).")
    double = [p for p, count in Counter((i.prompt, i.category) for i in items).items() if count > 1]
    if double:
        problems.append(
            Problem(label="twice", reason=f"{len(double)} prompts are there twice in a category: {double[0][0]:.60}")
        )
    return PromptSet(
        name=path.stem,
        items=tuple(items),
        columns=taken,
        unused=tuple(name for name in header if name not in taken.values()),
        problems=tuple(problems),
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _find_columns(header: Sequence[str], wanted: dict[Role, str], path: Path) -> dict[Role, str]:
    """Role -> column; those that are `wanted` first, each column once."""
    taken: dict[Role, str] = {}
    for role, name in wanted.items():
        match = next((column for column in header if column.strip() == name.strip()), None)
        if match is None:
            raise ErnieError(f"{path.name} has no column {name!r} for {role}; it has {', '.join(map(repr, header))}.")
        taken[role] = match
    for role in ROLES:
        free = {_plain(column): column for column in reversed(header) if column not in taken.values()}
        found = next((free[alias] for alias in ALIASES[role] if alias in free), None)
        if role not in taken and found is not None:
            taken[role] = found
    if "prompt" not in taken:
        raise ErnieError(
            f"{path.name} needs a column of prompts, such as {', '.join(ALIASES['prompt'][:4])}; it has "
            f"{', '.join(repr(name[:40]) for name in header[:8]) or 'none'}. Name the column, or write a header line."
        )
    return {role: taken[role] for role in ROLES if role in taken}


def _read_table(
    text: str, wanted: dict[Role, str], path: Path
) -> tuple[list[str], Iterator[list[str]], dict[Role, str]]:
    """(header, rows, columns) under the delimiter that gives the header most known columns, then most columns."""
    best: tuple[tuple[int, int], str, list[str], dict[Role, str]] | None = None
    first_error: ErnieError | None = None
    for delimiter in _DELIMITERS:
        try:
            header = [name.strip() for name in next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))]
            taken = _find_columns(header, wanted, path)
        except csv.Error as e:
            raise ErnieError(f"{path.name}: the header cannot be read as a table ({e}).") from e
        except ErnieError as e:
            first_error = first_error or e
            continue
        rank = (len(taken), len(header))
        if best is None or rank > best[0]:
            best = (rank, delimiter, header, taken)
    if best is None:
        assert first_error is not None
        if path.suffix.lower() != ".txt" or wanted:
            raise first_error
        lines = ([line] for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        return ["prompt"], lines, {"prompt": "prompt"}
    _, delimiter, header, taken = best
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t")
    next(rows)
    return header, rows, taken


def _iter_records(
    header: Sequence[str], rows: Iterator[list[str]], problems: list[Problem]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for number, cells in enumerate(rows, start=1):
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
                reason = f"has {len(cells)} cells, the header has {len(header)}; put cells with delimiters in quotes"
                problems.append(Problem(label=f"row {number}", reason=reason))
                continue
            yield number, dict(zip(header, cells, strict=False))
    except csv.Error as e:
        problems.append(Problem(label=f"row {number + 1}", reason=f"cannot be read ({e}); the file ends here"))


def _iter_json(text: str, path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(text)
        except ValueError as e:
            raise ErnieError(f"{path.name} is not valid JSON: {e}.") from e
        texts: list[Any] = found if isinstance(found, list) else [found]
    else:
        texts = [line for line in text.split("\n") if line.strip()]
    for number, record in enumerate(texts, start=1):
        try:
            record = json.loads(record) if path.suffix.lower() == ".jsonl" else record
        except ValueError as e:
            problems.append(Problem(label=f"row {number}", reason=f"is not JSON ({e})"))
            continue
        if isinstance(record, dict):
            yield number, {str(name): value for name, value in record.items()}
        else:
            problems.append(Problem(label=f"row {number}", reason="must be an object with a prompt"))


def _iter_items(
    records: Sequence[tuple[int, dict[str, Any]]], columns: dict[Role, str], problems: list[Problem]
) -> Iterator[PromptItem]:
    for number, record in records:
        values: dict[Role, Any] = {role: record.get(name) for role, name in columns.items()}
        wrong: list[Role] = [role for role, value in values.items() if isinstance(value, (dict, list, bool))]
        if wrong:
            reason = f"{columns[wrong[0]]} must be text, got {type(values[wrong[0]]).__name__}"
            problems.append(Problem(label=f"row {number}", reason=reason))
            continue
        told = {role: "" if value is None else str(value).strip() for role, value in values.items()}
        if not told["prompt"]:
            problems.append(Problem(label=f"row {number}", reason="has no prompt"))
            continue
        told |= {role: " ".join(told[role].split()) for role in ("category", "source") if role in told}
        yield PromptItem(number=number, **told)


# --- choosing and painting ----------------------------------------------------------------------------------------


def choose(prompts: PromptSet, *, categories: Sequence[str] = (), per_category: int = 0) -> PromptSet:
    """Only these categories (none = all), of each the first `per_category` prompts (0 = all).

    Raises:
        ErnieError: a category that the set has not (names those that it has).
    """
    known = {name.casefold(): name for name in prompts.counts()}
    wanted = [name.strip().casefold() for name in categories if name.strip()]
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ErnieError(
            f"{prompts.name} has no category {missing[0]!r}; it has {', '.join(map(repr, known.values()))}."
        )
    kept: list[PromptItem] = []
    seen: Counter[str] = Counter()
    for item in prompts.items:
        if wanted and item.category.casefold() not in wanted:
            continue
        seen[item.category] += 1
        if not per_category or seen[item.category] <= per_category:
            kept.append(item)
    return replace(prompts, items=tuple(kept))


def make_rows(prompts: PromptSet, defaults: Row, *, seeds: int = 1, translated: bool = False) -> list[list[Row]]:
    """Per prompt the pictures to make, `seeds` of each: what else they are made with is that of `defaults`.

    Prompt number k takes the seeds from `defaults.seed + 1000 (k - 1)` on, whatever else is chosen, so that two
    settings of one set share every seed.

    Args:
        translated: whether the translation is painted in the place of the prompt.

    Raises:
        ErnieError: seeds or a setting out of range, or a prompt without a translation (names the first).
    """
    if not 1 <= seeds <= MAX_SEEDS:
        raise ErnieError(f"seeds_per_prompt must lie between 1 and {MAX_SEEDS}, got {seeds}.")
    rows = []
    for item in prompts.items:
        if translated and not item.translation:
            raise ErnieError(f"row {item.number} of {prompts.name} has no translation; paint the prompts instead.")
        text = item.translation if translated else item.prompt
        first = defaults.seed + SEEDS_APART * (item.number - 1)
        own = replace(defaults, label=f"row {item.number}", prompt=text)
        check_row(own)
        rows.append([replace(own, seed=(first + i) & MAX_SEED) for i in range(seeds)])
    return rows


# --- what a folder's pictures are ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a setting."""

    number: int
    """Of its prompt."""
    prompt: str
    """As it was painted."""
    category: str
    source: str
    seed: int
    file: Path


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The pictures that one way of painting made of a prompt set."""

    name: str
    """The name of its folder."""
    folder: Path
    prompts: str
    """The name of the prompt set."""
    pictures: tuple[Picture, ...]
    """In the order of the set, then by seed; only those that are there."""
    missing: int = 0
    """Pictures that the setting asks for and that are not made yet."""


def write_setting(folder: Path, prompts: PromptSet, rows: Sequence[Sequence[Row]]) -> None:
    """Say in the folder of a run which of its pictures is of which prompt and category.

    Raises:
        ErnieError: the disk is full or the folder cannot be written to.
    """
    told = {
        "format": FORMAT,
        "prompts": prompts.name,
        "columns": prompts.columns,
        "items": [
            {
                **{name: value for name, value in asdict(item).items() if value != ""},
                "pictures": [{"seed": row.seed, "file": file_name(row), "text": row.prompt} for row in part],
            }
            for item, part in zip(prompts.items, rows, strict=True)
        ],
    }
    write_whole(folder / SETTING, (json.dumps(told, ensure_ascii=False, indent=1) + "\n").encode())


def read_setting(folder: Path) -> Setting:
    """The pictures of a folder that a prompt set was painted into.

    Raises:
        ErnieError: it is none, its file is damaged or newer than this pack, or not one picture is there.
    """
    path = folder / SETTING
    if not path.is_file():
        raise ErnieError(f"{folder} is no folder of a prompt set (it has no {SETTING}): paint one with Prompt Set.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ErnieError(f"{path} has format {told['format']}, this pack reads {FORMAT}: update the pack.")
        pictures = [
            Picture(
                number=int(item["number"]),
                prompt=str(picture["text"]),
                category=str(item.get("category", "")),
                source=str(item.get("source", "")),
                seed=int(picture["seed"]),
                file=(folder / Path(str(picture["file"])).name).resolve(),
            )
            for item in told["items"]
            for picture in item["pictures"]
        ]
        name = str(told["prompts"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, ErnieError):
            raise
        raise ErnieError(f"{path} cannot be read ({type(e).__name__}: {e}); paint the set again.") from e
    there = tuple(picture for picture in pictures if picture.file.is_file())
    if not there:
        raise ErnieError(f"{folder} holds none of the {len(pictures)} pictures that its {SETTING} tells of.")
    return Setting(name=folder.name, folder=folder, prompts=name, pictures=there, missing=len(pictures) - len(there))
