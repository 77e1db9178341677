"""Who teaches what: a table over prompt tag, noise level and term, in place of a gate network.

Multi-teacher distribution matching (ERNIE-Image report, section 2.2.3) estimates x0 = sum_k W_k E_k with W in [0, 1]
over experts, noise levels and the terms CA and DM. How the report finds W is not published; here a person writes it
down. Teachers are the frozen base, with or without guidance, and LoRAs on it.

A table has no network and no tensor: it says which teachers to ask, and how much each counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from ..errors import ErnieError

Term: TypeAlias = Literal["CA", "DM"]
"""CA: the guidance term, "what the prompt asks for". DM: distribution matching, "what pictures look like"
(Decoupled DMD, arXiv 2511.22677). A plain, undivided score asks for both at one noise level."""
TERMS: tuple[Term, ...] = get_args(Term)
BASE = "base"
"""The teacher that every table has: the frozen base, without a LoRA unless the table says otherwise."""
ALL = "*"
"""In a text: prompts of every tag, and those without one."""
_SUM_TOLERANCE = 1e-6
_RESERVED = "|,#*"
_SETTINGS = ("strength ", "cfg ")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network to learn from: the frozen base, with `lora` on it where one is named."""

    name: str
    lora: str = ""
    """Name or path of a LoRA file; empty: the base itself."""
    strength: float = 1.0
    """Of the LoRA."""
    cfg: float | None = None
    """Guidance strength in the usual form, uncond + cfg (cond - uncond); None: the recipe's."""

    def __post_init__(self) -> None:
        _check_word(self.name, "a teacher's name")
        if _number(self.name.split()[-1]) is not None:
            raise ErnieError(
                f"a teacher's name must not end in a number, which would be read as its weight; got {self.name!r}. "
                f"Write {self.name.replace(' ', '_')!r}, for instance."
            )
        if any(c in self.lora for c in "|\n") or self.lora.strip() != self.lora or self.lora.startswith(_SETTINGS):
            raise ErnieError(
                f"the LoRA of teacher {self.name!r} must be a file name in one line, without '|' and without strength "
                f"or cfg in front, got {self.lora!r}."
            )
        if not math.isfinite(self.strength):
            raise ErnieError(f"the strength of teacher {self.name!r} must be a number, got {self.strength}.")
        if self.strength != 1 and not self.lora:
            raise ErnieError(f"teacher {self.name!r} has the strength {self.strength:g} but no LoRA; name its file.")
        if self.cfg is not None and not (math.isfinite(self.cfg) and self.cfg >= 0):
            raise ErnieError(f"the cfg of teacher {self.name!r} must be 0 or more (1 = no guidance), got {self.cfg:g}.")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Who teaches prompts of `tags` at noise levels from `high`, included, down to `low`, not included (but for 0)."""

    weights: Mapping[str, float]
    """How much each teacher counts, by name; 0 or more, adding up to 1."""
    tags: tuple[str, ...] = ()
    """Empty: all prompts."""
    low: float = 0.0
    high: float = 1.0
    terms: tuple[Term, ...] = TERMS

    def __post_init__(self) -> None:
        for tag in self.tags:
            _check_word(tag, "a tag")
            if tag.split()[0] in ("teacher", "blend"):
                raise ErnieError(f"a tag must not start with 'teacher' or 'blend', got {tag!r}.")
        if not 0 <= self.low < self.high <= 1:  # NaN fails too
            raise ErnieError(
                f"the noise levels of a rule must run down from high to low within 1 and 0, got {self.high:g} to "
                f"{self.low:g}."
            )
        if not self.terms or not set(self.terms) <= set(TERMS):
            raise ErnieError(f"the terms of a rule must be some of {', '.join(TERMS)}, got {self.terms}.")
        # Nobody's weight is 0: such a teacher is not asked, and not loaded.
        weights = {name.strip() or BASE: float(weight) for name, weight in self.weights.items()}
        if not weights or not all(math.isfinite(w) and w >= 0 for w in weights.values()):
            raise ErnieError(f"the weights of a rule must be numbers of 0 or more, got {dict(self.weights)}.")
        total = math.fsum(weights.values())
        if len(weights) != len(self.weights) or abs(total - 1) > _SUM_TOLERANCE:
            raise ErnieError(
                f"the weights of a rule must name each teacher once and add up to 1; got {dict(self.weights)}, which "
                f"add up to {total:g}."
            )
        object.__setattr__(self, "weights", {name: w / total for name, w in weights.items() if w > 0})

    def matches(self, tag: str, sigma: float, term: Term) -> bool:
        """Whether the rule speaks about this prompt, noise level and term."""
        inside = self.low < sigma <= self.high or sigma <= 0 >= self.low
        return inside and term in self.terms and (not self.tags or tag in self.tags)


@dataclass(frozen=True, kw_only=True)
class TeacherTable:
    """Teachers and the rules that say when each is asked: the first rule that matches wins, without one the base does.

    Raises:
        ErnieError: two teachers of one name, a rule that names an unknown one, or a rule that never wins.
    """

    teachers: tuple[Teacher, ...] = ()
    """The base need not be among them; as `Teacher(name="base", cfg=...)` it has a guidance strength of its own."""
    rules: tuple[Rule, ...] = ()
    blend: float = 0.0
    """Width in sigma over which neighbouring bands hand over in a straight line; 0 = at once."""

    def __post_init__(self) -> None:
        if not 0 <= self.blend <= 1:
            raise ErnieError(f"blend must lie between 0 (a hard edge) and 1, got {self.blend:g}.")
        names = [t.name for t in self.teachers]
        for name in names:
            if names.count(name) > 1:
                raise ErnieError(f"two teachers are called {name!r}; give each a name of its own.")
        for rule in self.rules:
            for name in rule.weights:
                if name != BASE and name not in names:
                    raise ErnieError(
                        f"a rule asks the teacher {name!r}, but the table has only {', '.join([BASE, *names])}; add "
                        "it, or correct the name."
                    )
        won = {id(self._rule(*question)) for question in self._questions()}
        for i, rule in enumerate(self.rules):
            if id(rule) not in won:
                raise ErnieError(
                    f"rule {i + 1} ({write_rule(rule)}) never acts, because rules before it match first; move it up "
                    "or leave it out."
                )

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that a rule names, in order."""
        return tuple(dict.fromkeys(tag for rule in self.rules for tag in rule.tags))

    def teacher(self, name: str) -> Teacher:
        """The teacher of a name that `weights` gave."""
        return next((t for t in self.teachers if t.name == name), Teacher(name=name))

    def used(self) -> tuple[str, ...]:
        """Names of the teachers that are ever asked, the base first where it is: what has to be loaded."""
        asked = {name for question in self._questions() for name in self._hard(*question)}
        return tuple(name for name in dict.fromkeys([BASE, *(t.name for t in self.teachers)]) if name in asked)

    def edges(self, *, tag: str, term: Term) -> tuple[float, ...]:
        """Noise levels where the answer may change, from 1 down to 0, both included; see `blend`."""
        cuts = {cut for rule in self.rules for cut in (rule.low, rule.high) if rule.matches(tag, rule.high, term)}
        return tuple(sorted({0.0, 1.0} | cuts, reverse=True))

    def weights(self, *, tag: str, sigma: float, term: Term) -> dict[str, float]:
        """How much each teacher counts for a prompt of `tag` ("" = none) at noise level `sigma`.

        Only teachers that count are in it; the weights add up to 1. With `blend` it is the mean of the answers over
        noise levels that wide around `sigma`: a straight line from one band's answer to the next one's.
        """
        if not 0 <= sigma <= 1:
            raise ErnieError(f"sigma must lie between 0 and 1, got {sigma}.")
        if not self.blend:
            return self._hard(tag, sigma, term)
        top, bottom = sigma + self.blend / 2, sigma - self.blend / 2
        # Beyond 1 and 0 the outermost answers go on.
        cuts = [top, *(e for e in self.edges(tag=tag, term=term) if bottom < e < top and 0 < e < 1), bottom]
        parts: dict[str, list[float]] = {}
        for high, low in pairwise(cuts):
            for name, weight in self._hard(tag, min(1.0, max(0.0, (high + low) / 2)), term).items():
                parts.setdefault(name, []).append(weight * (high - low) / self.blend)
        if len(parts) == 1:
            return dict.fromkeys(parts, 1.0)  # one teacher everywhere is that teacher, to the bit
        total = math.fsum(part for answers in parts.values() for part in answers)
        return {name: math.fsum(answers) / total for name, answers in parts.items()}

    def _hard(self, tag: str, sigma: float, term: Term) -> dict[str, float]:
        rule = self._rule(tag, sigma, term)
        return {BASE: 1.0} if rule is None else dict(rule.weights)

    def _rule(self, tag: str, sigma: float, term: Term) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(tag, sigma, term)), None)

    def _questions(self) -> Iterator[tuple[str, float, Term]]:
        """One (tag, sigma, term) of every kind that the table tells apart; the tag "" is that of all other prompts."""
        for tag in (*self.tags, ""):
            for term in TERMS:
                for high, low in pairwise(self.edges(tag=tag, term=term)):
                    yield tag, (high + low) / 2, term


# --- ready-made rules; chain them with +, the first that matches wins ---------------------------------------


def by_tag(teachers: Mapping[str, str]) -> tuple[Rule, ...]:
    """{tag: teacher}: each kind of prompt has its own."""
    return tuple(Rule(tags=(tag,), weights={name: 1.0}) for tag, name in teachers.items())


def by_sigma(names: Sequence[str], edges: Sequence[float], *, tags: Collection[str] = ()) -> tuple[Rule, ...]:
    """Teachers from high noise to low, `edges` between them: layout first, texture last (the report's second idea).

    Raises:
        ErnieError: there must be one edge less than teachers, falling.
    """
    if len(edges) != len(names) - 1:
        raise ErnieError(f"{len(names)} teachers need {len(names) - 1} edges between them, got {len(edges)}.")
    levels = pairwise([1.0, *edges, 0.0])
    bands = zip(names, levels, strict=True)
    return tuple(Rule(tags=tuple(tags), high=high, low=low, weights={name: 1.0}) for name, (high, low) in bands)


def by_objective(*, ca: str, dm: str, tags: Collection[str] = ()) -> tuple[Rule, ...]:
    """One teacher for what the prompt asks for, one for what pictures look like (the report's first idea)."""
    return tuple(
        Rule(tags=tuple(tags), terms=(term,), weights={name: 1.0}) for term, name in zip(TERMS, (ca, dm), strict=True)
    )


ARTICLE_STEPS = (30, 15)
"""Where the article lets one teacher hand over to the next, of 50 steps that count down to 1."""


def article_bands(first: str, second: str, third: str, *, shift: float = 4.0) -> tuple[Rule, ...]:
    """The three bands of a widely read article about the report: steps 50-30, 30-15 and 15-1 of 50.

    They are the ARTICLE's invention: the report publishes neither the number of teachers nor any band. The article
    gives steps, not noise levels; read on the official sampler's grid, whose `shift` is 4, the edges lie at sigma
    0.857 and 0.632.
    """
    edges = [shift * t / (1 + (shift - 1) * t) for t in (steps / 50 for steps in ARTICLE_STEPS)]
    return by_sigma((first, second, third), [round(edge, 3) for edge in edges])


PRESETS = ("as written", "by tag", "by noise level", "by term", "the article's bands")


def preset_rules(preset: str, names: Sequence[str]) -> tuple[Rule, ...]:
    """Rules for teachers in their order. Tags are the teachers' names, bands are equally wide, from high noise to low.

    Raises:
        ErnieError: no such preset, or another number of teachers is needed.
    """
    if preset not in PRESETS:
        raise ErnieError(f"the preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    if preset == "as written":
        return ()
    least, most = {"by term": (2, 2), "the article's bands": (3, 3), "by noise level": (2, 99)}.get(preset, (1, 99))
    if not least <= len(names) <= most:
        count = str(least) if least == most else f"{least} or more"
        raise ErnieError(f"the preset {preset!r} is for {count} LoRAs, got {len(names)}: {', '.join(names) or 'none'}.")
    if preset == "by tag":
        return by_tag({name: name for name in names})
    if preset == "by noise level":
        return by_sigma(names, [round(1 - i / len(names), 3) for i in range(1, len(names))])
    return by_objective(ca=names[0], dm=names[1]) if preset == "by term" else article_bands(*names)


def name_of(file: str) -> str:
    """A teacher's name for a LoRA file: the file's, without folder and ending, as a table can hold it."""
    stem = file.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".safetensors")
    name = " ".join("".join("_" if c in _RESERVED else c for c in stem).split()) or "lora"
    return name if _number(name.split()[-1]) is None else "_".join([*name.split(), "lora"])


def make_table(text: str, files: Sequence[str], preset: str, blend: float = 0.0) -> TeacherTable:
    """The table of a text, with teachers for LoRA `files` and the rules of `preset` behind those of the text.

    Raises:
        ErnieError: as `read_table`; two widths of blending; a teacher that no rule ever asks.
    """
    given = [Teacher(name=name_of(file), lora=file) for file in files]
    written = read_table(text, given=given)
    if blend and written.blend and blend != written.blend:
        raise ErnieError(
            f"blend is {blend:g} and the text says {written.blend:g}: leave the line out, or set blend to 0."
        )
    rules = (*written.rules, *preset_rules(preset, [teacher.name for teacher in given]))
    table = TeacherTable(teachers=written.teachers, rules=rules, blend=blend or written.blend)
    if idle := [t.name for t in table.teachers if t.name not in table.used()]:
        raise ErnieError(
            f"no rule asks {', '.join(idle)}: choose a preset, write a line such as '* | 1 - 0 | * | {idle[0]}', or "
            "leave the teacher out."
        )
    return table


def with_files(table: TeacherTable, find: Callable[[str], Path]) -> TeacherTable:
    """`table` with the path that `find` gives for each LoRA's name; absolute paths of files stay.

    Raises:
        ErnieError: `find` does not know a name.
    """

    def found(teacher: Teacher) -> Teacher:
        path = Path(teacher.lora)
        return replace(teacher, lora=str(path if path.is_absolute() and path.is_file() else find(teacher.lora)))

    return replace(table, teachers=tuple(found(t) if t.lora else t for t in table.teachers))


# --- text ---------------------------------------------------------------------------------------------------

TEXT_RULES = """\
teacher NAME | LORA FILE | strength 1 | cfg 4      (the file, strength and cfg may be left out)
TAGS | HIGH - LOW | CA, DM | NAME 0.7, NAME 0.3    (tags by comma, or * for all prompts)
blend 0.1"""
"""The three kinds of lines; empty ones and those that start with # are passed over."""


@dataclass
class _Reader:
    teachers: list[Teacher] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    blend: float | None = None

    def line(self, text: str) -> None:
        cells = [cell.strip() for cell in text.split("|")]
        words = cells[0].split()
        if words[:1] == ["teacher"]:
            self.teachers.append(_read_teacher(cells))
        elif words[:1] == ["blend"] and len(cells) == 1:
            if self.blend is not None:
                raise ErnieError("blend is given twice.")
            self.blend = _read_number(" ".join(words[1:]), "the width of the blend")
        elif len(cells) == 4:
            self.rules.append(_read_rule(cells))
        else:
            raise ErnieError(f"expected one of\n{TEXT_RULES}")


def read_table(text: str, *, given: Sequence[Teacher] = ()) -> TeacherTable:
    """The table that a text describes, see `TEXT_RULES`; an empty text asks the base for everything.

    `given`: teachers that it may ask without a line for them.

    Raises:
        ErnieError: a line that is none of the three kinds, or says something impossible; the message has its number.
    """
    reader = _Reader(teachers=list(given))
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                reader.line(line.strip())
            except ErnieError as e:
                raise ErnieError(f"line {number} of the table of teachers ({line.strip()!r}): {e}") from e
    return TeacherTable(teachers=tuple(reader.teachers), rules=tuple(reader.rules), blend=reader.blend or 0.0)


def write_table(table: TeacherTable) -> str:
    """Text that `read_table` reads back as `table`."""
    lines = []
    for teacher in table.teachers:
        cells = [f"teacher {teacher.name}"]
        cells += [teacher.lora] if teacher.lora else []
        cells += [f"strength {_digits(teacher.strength)}"] if teacher.strength != 1 else []
        cells += [] if teacher.cfg is None else [f"cfg {_digits(teacher.cfg)}"]
        lines.append(" | ".join(cells))
    lines += map(write_rule, table.rules)
    return "\n".join([*lines, f"blend {_digits(table.blend)}"] if table.blend else lines)


def write_rule(rule: Rule) -> str:
    """A rule as its line."""
    alone = len(rule.weights) == 1
    who = ", ".join(name if alone else f"{name} {_digits(weight)}" for name, weight in rule.weights.items())
    tags = ", ".join(rule.tags) or ALL
    return f"{tags} | {_digits(rule.high)} - {_digits(rule.low)} | {', '.join(rule.terms)} | {who}"


def _read_teacher(cells: Sequence[str]) -> Teacher:
    values: dict[str, float] = {}
    lora = ""
    for i, cell in enumerate(cells[1:], 1):
        name, _, number = cell.partition(" ")
        if name in ("strength", "cfg") and name not in values:
            values[name] = _read_number(number, f"the {name} of a teacher")
        elif i == 1 and cell:
            lora = cell
        else:
            raise ErnieError(f"expected strength or cfg with a number, once each, got {cell!r}.")
    return Teacher(name=" ".join(cells[0].split()[1:]), lora=lora, **values)


def _read_rule(cells: Sequence[str]) -> Rule:
    tags, levels, terms, who = cells
    ends = [end.strip() for end in levels.split("-")]
    if levels == ALL:
        ends = ["1", "0"]
    if len(ends) != 2:
        raise ErnieError(f"the noise levels must be HIGH - LOW, for instance 1 - 0.5, or {ALL}; got {levels!r}.")
    high, low = (_read_number(end, "a noise level") for end in ends)
    asked = TERMS if terms == ALL else tuple(term.strip().upper() for term in terms.split(","))
    weights: dict[str, float] = {}
    for part in who.split(","):
        *name, last = part.split() or [""]
        number = _number(last)
        name, weight = (" ".join([*name, last]), 1.0) if number is None else (" ".join(name), number)
        if not name or name in weights:
            raise ErnieError(f"each teacher must be named once, with its weight behind it; got {who!r}.")
        weights[name] = weight
    if any(term not in TERMS for term in asked):
        raise ErnieError(f"the terms must be {' or '.join(TERMS)}, or {ALL} for both; got {terms!r}.")
    found = () if tags == ALL else tuple(tag.strip() for tag in tags.split(","))
    return Rule(tags=found, high=high, low=low, terms=cast("tuple[Term, ...]", asked), weights=weights)


def _read_number(text: str, what: str) -> float:
    number = _number(text.strip())
    if number is None:
        raise ErnieError(f"{what} must be a number, got {text.strip()!r}.")
    return number


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _digits(number: float) -> str:
    """As few digits as read back to the same number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _check_word(word: str, what: str) -> None:
    if not word or word != " ".join(word.split()) or any(c in word for c in _RESERVED):
        raise ErnieError(
            f"{what} must be one or more words without {' '.join(_RESERVED)} or space around them, got {word!r}."
        )
