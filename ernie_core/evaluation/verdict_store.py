"""People's verdicts on the disk: an SQLite file beside that of the tournaments; an answer is kept when it is given.

An evaluation is one name and one annotator; several annotators of a name are several evaluations of the same pictures.
All questions are known from the beginning. Who answers sees pictures and prompt, never a setting: pictures are numbered
by chance, sides are drawn, and pictures of both settings come mixed. Order and sides follow from the seed and the
annotator, so that two people see them in different orders and one person's can be drawn again.

No answer is deleted: what is undone stays in the log, marked. What is skipped comes again at the end; skipped there
too, it is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..errors import ErnieError
from ..scoring import store as store_file
from ..scoring.judgments import SKIPS, Stale, Unknown, seconds_each
from ..scoring.store import writing
from ..scoring.tournament import cohen_kappa
from .prompt_sets import Picture, Setting
from .verdicts import CRITERIA, Criterion, Outcome, Verdict, Verdicts, match, name_settings

Mode = Literal["pass or fail", "side by side"]
MODES: tuple[Mode, ...] = get_args(Mode)
ANSWERS: dict[Mode, tuple[str, ...]] = {
    "pass or fail": ("pass", "fail", "skip"),
    "side by side": ("left", "tie", "right", "skip"),
}
VERSION = 1

_SCHEMA = """
CREATE TABLE evaluations(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, annotator TEXT NOT NULL, mode TEXT NOT NULL, seed INTEGER NOT NULL,
    settings TEXT NOT NULL, notes TEXT NOT NULL, num_pictures INTEGER NOT NULL, digest TEXT NOT NULL,
    created REAL NOT NULL, UNIQUE(name, annotator));
CREATE TABLE pictures(
    evaluation INTEGER NOT NULL, number INTEGER NOT NULL, setting INTEGER NOT NULL, path TEXT NOT NULL,
    prompt_number INTEGER NOT NULL, prompt TEXT NOT NULL, category TEXT NOT NULL, source TEXT NOT NULL,
    seed TEXT NOT NULL, PRIMARY KEY(evaluation, number)) WITHOUT ROWID;
CREATE TABLE questions(
    id INTEGER PRIMARY KEY AUTOINCREMENT, evaluation INTEGER NOT NULL, position INTEGER NOT NULL,
    criterion TEXT NOT NULL, left INTEGER NOT NULL, right INTEGER, status TEXT NOT NULL, answer TEXT);
CREATE INDEX questions_waiting ON questions(evaluation, status, position);
CREATE TABLE actions(
    id INTEGER PRIMARY KEY AUTOINCREMENT, evaluation INTEGER NOT NULL, question INTEGER NOT NULL,
    answer TEXT NOT NULL, position INTEGER NOT NULL, at REAL NOT NULL, undone REAL);
CREATE INDEX actions_last ON actions(evaluation, undone, id);
CREATE INDEX actions_question ON actions(question);
"""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an evaluation asks."""

    name: str
    annotator: str
    mode: Mode
    settings: tuple[Setting, ...]
    """One or two; side by side needs two."""
    criteria: tuple[Criterion, ...] = CRITERIA
    seed: int = 0

    def __post_init__(self) -> None:
        for what in ("name", "annotator"):
            text = getattr(self, what)
            if not text.strip() or len(text) > 200 or any(ord(c) < 32 for c in text):
                raise ErnieError(f"{what} must be 1 to 200 characters on one line, got {text!r}.")
        if self.mode not in MODES:
            raise ErnieError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        least = 2 if self.mode == "side by side" else 1
        if not least <= len(self.settings) <= 2:
            raise ErnieError(f"{self.mode} needs the folders of {least} settings or 2, got {len(self.settings)}.")
        if not self.criteria:
            raise ErnieError(f"at least one of {', '.join(CRITERIA)} must be asked.")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What waits for an answer."""

    id: int
    mode: Mode
    criterion: Criterion
    pictures: tuple[int, ...]
    """Numbers of the one picture, or of the left and the right one."""
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an evaluation is."""

    id: int
    name: str
    annotator: str
    mode: Mode
    done: int
    left: int
    num_pictures: int
    seconds_left: float | None
    """By the pace of the last answers; None before there is one."""
    can_undo: bool
    last_answer: float | None
    """Seconds since 1970."""

    @property
    def complete(self) -> bool:
        return self.left == 0


def open_store(path: Path | str) -> contextlib.AbstractContextManager[sqlite3.Connection]:
    """A connection to the file, made where there is none, closed at the end; raises what `store.open_store` raises."""
    return store_file.open_store(path, _SCHEMA, version=VERSION, what="verdicts")


# --- beginning ----------------------------------------------------------------------------------------------------


def begin(store: sqlite3.Connection, setup: Setup) -> int:
    """The id of the evaluation: a new one, or the one that is there with the same pictures and questions.

    Raises:
        ErnieError: the name is taken by this annotator for something else; what `name_settings` and `match` raise.
    """
    settings = name_settings(setup.settings)
    digest = _digest(setup, settings)
    row = _find(store, setup.name, setup.annotator)
    if row is None:
        units, notes = _units(setup.mode, settings)
        with writing(store):
            row = _find(store, setup.name, setup.annotator)
            if row is None:
                return _insert(store, setup, settings, units, notes, digest)
    if row["digest"] != digest:
        raise ErnieError(
            f"the evaluation {setup.name!r} of {setup.annotator} has other pictures or questions "
            f"({row['num_pictures']} pictures, {row['mode']}): give this one another name, or bring the same folders."
        )
    return row["id"]


def _find(store: sqlite3.Connection, name: str, annotator: str) -> sqlite3.Row | None:
    return store.execute("SELECT * FROM evaluations WHERE name=? AND annotator=?", (name, annotator)).fetchone()


def _digest(setup: Setup, settings: Sequence[Setting]) -> str:
    pictures = [[(str(p.file), p.prompt) for p in setting.pictures] for setting in settings]
    return hashlib.sha256(json.dumps([setup.mode, setup.criteria, pictures]).encode()).hexdigest()


def _units(mode: Mode, settings: Sequence[Setting]) -> tuple[list[tuple[tuple[int, Picture], ...]], list[str]]:
    """What is shown together, as (setting, picture), and what is worth knowing."""
    notes = [f"{s.missing} pictures of {s.name} were not made when the questions were drawn" for s in settings]
    notes = [note for note, s in zip(notes, settings, strict=True) if s.missing]
    if mode == "side by side":
        pairs, more = match(*settings)
        return [((0, pair.first), (1, pair.second)) for pair in pairs], [*notes, *more]
    return [((i, picture),) for i, setting in enumerate(settings) for picture in setting.pictures], notes


def _insert(
    store: sqlite3.Connection,
    setup: Setup,
    settings: Sequence[Setting],
    units: Sequence[tuple[tuple[int, Picture], ...]],
    notes: Sequence[str],
    digest: str,
) -> int:
    pictures = [shown for unit in units for shown in unit]
    names = [setting.name for setting in settings]
    cursor = store.execute(
        "INSERT INTO evaluations(name, annotator, mode, seed, settings, notes, num_pictures, digest, created) "
        "VALUES(?,?,?,?,?,?,?,?,?)",
        (
            *(setup.name, setup.annotator, setup.mode, setup.seed, json.dumps(names), json.dumps(list(notes))),
            *(len(pictures), digest, time.time()),
        ),
    )
    id_ = cursor.lastrowid
    assert id_ is not None
    person = int.from_bytes(hashlib.sha256(setup.annotator.encode()).digest()[:4], "big")
    rng = np.random.default_rng([setup.seed, person])
    numbers = rng.permutation(len(pictures)).tolist()  # a number must not tell whose picture it is
    store.executemany(
        "INSERT INTO pictures VALUES(?,?,?,?,?,?,?,?,?)",
        [
            (id_, number, setting, str(p.file), p.number, p.prompt, p.category, p.source, str(p.seed))
            for number, (setting, p) in zip(numbers, pictures, strict=True)
        ],
    )
    starts = [0, *itertools.accumulate(len(unit) for unit in units)]
    position = 0
    for k in rng.permutation(len(units)).tolist():
        shown = numbers[starts[k] : starts[k + 1]]
        if len(shown) == 2 and rng.random() < 0.5:
            shown = shown[::-1]
        for criterion in setup.criteria:
            position += 1
            store.execute(
                "INSERT INTO questions(evaluation, position, criterion, left, right, status) VALUES(?,?,?,?,?,'open')",
                (id_, position, criterion, shown[0], shown[1] if len(shown) == 2 else None),
            )
    return id_


# --- asking and answering -----------------------------------------------------------------------------------------


def upcoming(store: sqlite3.Connection, id_: int, *, count: int) -> list[Question]:
    """The question that waits and those behind it, at most `count`: whose pictures can be fetched ahead.

    Raises:
        Unknown: there is no such evaluation.
    """
    mode = _evaluation(store, id_)["mode"]
    rows = store.execute(
        "SELECT q.id, q.criterion, q.left, q.right, p.prompt FROM questions q "
        "JOIN pictures p ON p.evaluation=q.evaluation AND p.number=q.left "
        "WHERE q.evaluation=? AND q.status='open' ORDER BY q.position LIMIT ?",
        (id_, count),
    )
    return [
        Question(
            id=i,
            mode=mode,
            criterion=criterion,
            pictures=(left,) if right is None else (left, right),
            prompt=prompt,
        )
        for i, criterion, left, right, prompt in rows
    ]


def answer(store: sqlite3.Connection, id_: int, question: int, given: str) -> None:
    """Keep an answer: it is on the disk when this returns.

    Raises:
        Unknown: there is no such evaluation.
        Stale: the question does not wait (any more).
        ErnieError: `given` is no answer to its kind of question.
    """
    with writing(store):
        allowed = ANSWERS[_evaluation(store, id_)["mode"]]
        if given not in allowed:
            raise ErnieError(f"an answer is one of {', '.join(allowed)}, got {given!r}.")
        row = store.execute(
            "SELECT id, position FROM questions WHERE evaluation=? AND status='open' ORDER BY position LIMIT 1", (id_,)
        ).fetchone()
        if row is None or row["id"] != question:
            raise Stale(f"question {question} is not the one that waits: it was answered or undone elsewhere.")
        query = "SELECT count(*) FROM actions WHERE question=? AND answer='skip' AND undone IS NULL"
        skips = store.execute(query, (question,)).fetchone()[0] + (given == "skip")
        store.execute(
            "INSERT INTO actions(evaluation, question, answer, position, at) VALUES(?,?,?,?,?)",
            (id_, question, given, row["position"], time.time()),
        )
        if given != "skip":
            store.execute("UPDATE questions SET status='done', answer=? WHERE id=?", (given, question))
        elif skips >= SKIPS:
            store.execute("UPDATE questions SET status='dropped' WHERE id=?", (question,))
        else:
            last = "(SELECT max(position) + 1 FROM questions WHERE evaluation=?)"
            store.execute(f"UPDATE questions SET position={last} WHERE id=?", (id_, question))


def undo(store: sqlite3.Connection, id_: int) -> bool:
    """Take the last answer or skip back; its question waits again. False when there is none to take back."""
    with writing(store):
        _evaluation(store, id_)
        row = store.execute(
            "SELECT id, question, position FROM actions WHERE evaluation=? AND undone IS NULL ORDER BY id DESC LIMIT 1",
            (id_,),
        ).fetchone()
        if row is None:
            return False
        store.execute("UPDATE actions SET undone=? WHERE id=?", (time.time(), row["id"]))
        store.execute(
            "UPDATE questions SET status='open', answer=NULL, position=? WHERE id=?", (row["position"], row["question"])
        )
    return True


def _evaluation(store: sqlite3.Connection, id_: int) -> sqlite3.Row:
    row = store.execute("SELECT * FROM evaluations WHERE id=?", (id_,)).fetchone()
    if row is None:
        raise Unknown(f"there is no evaluation {id_}.")
    return row


# --- looking ------------------------------------------------------------------------------------------------------


def progress(store: sqlite3.Connection, id_: int) -> Progress:
    """Where the evaluation is.

    Raises:
        Unknown: there is no such evaluation.
    """
    row = _evaluation(store, id_)
    counts = dict(
        store.execute("SELECT status, count(*) FROM questions WHERE evaluation=? GROUP BY status", (id_,)).fetchall()
    )
    query = "SELECT at FROM actions WHERE evaluation=? AND undone IS NULL ORDER BY id DESC LIMIT 21"
    times = [at for (at,) in store.execute(query, (id_,))]
    left, pace = counts.get("open", 0), seconds_each(times)
    return Progress(
        id=id_,
        name=row["name"],
        annotator=row["annotator"],
        mode=row["mode"],
        done=counts.get("done", 0) + counts.get("dropped", 0),
        left=left,
        num_pictures=row["num_pictures"],
        seconds_left=None if pace is None else pace * left,
        can_undo=bool(times),
        last_answer=times[0] if times else None,
    )


def list_evaluations(store: sqlite3.Connection) -> list[Progress]:
    """All evaluations, the one that was answered last first."""
    found = [progress(store, row["id"]) for row in store.execute("SELECT id FROM evaluations ORDER BY id DESC")]
    return sorted(found, key=lambda p: -(p.last_answer or 0.0))


def annotators(store: sqlite3.Connection, name: str) -> dict[str, int]:
    """Annotator -> id of the evaluations of a name, in the order of their beginning."""
    return dict(store.execute("SELECT annotator, id FROM evaluations WHERE name=? ORDER BY id", (name,)).fetchall())


def picture_path(store: sqlite3.Connection, id_: int, number: int) -> Path:
    """Where a picture of an evaluation lies.

    Raises:
        Unknown: there is no such picture.
    """
    row = store.execute("SELECT path FROM pictures WHERE evaluation=? AND number=?", (id_, number)).fetchone()
    if row is None:
        raise Unknown(f"there is no picture {number} in evaluation {id_}.")
    return Path(row["path"])


def fingerprint(store: sqlite3.Connection, name: str | None) -> str:
    """Changes with every answer, undo and new annotator of a name; of any name where it is None."""
    row = store.execute(
        "SELECT count(*), coalesce(max(a.id), 0), coalesce(max(a.undone), 0), count(a.undone) FROM evaluations e "
        "LEFT JOIN actions a ON a.evaluation=e.id WHERE ? IS NULL OR e.name=?",
        (name, name),
    ).fetchone()
    return " ".join(map(str, tuple(row)))


def read_verdicts(store: sqlite3.Connection, id_: int) -> Verdicts:
    """What one annotator answered so far, in the order of the questions; the judge is the annotator.

    Raises:
        Unknown: there is no such evaluation.
    """
    row = _evaluation(store, id_)
    found = [verdict for _, verdict in _iter_verdicts(store, row)]
    query = "SELECT count(*) FROM questions WHERE evaluation=? AND status=?"
    dropped, left = (store.execute(query, (id_, status)).fetchone()[0] for status in ("dropped", "open"))
    notes = [f"{row['annotator']}: {note}" for note in json.loads(row["notes"])]
    if dropped:
        notes.append(f"{row['annotator']} could not say for {dropped} questions, which are left out")
    if left:
        notes.append(f"{row['annotator']} has {left} questions of {row['name']} left to answer")
    return Verdicts(verdicts=tuple(found), notes=tuple(notes))


def _iter_verdicts(store: sqlite3.Connection, row: sqlite3.Row) -> Iterator[tuple[tuple, Verdict]]:
    """(what makes it the same question for two people, verdict)."""
    settings = json.loads(row["settings"])
    pictures = {
        p["number"]: p for p in store.execute("SELECT * FROM pictures WHERE evaluation=?", (row["id"],)).fetchall()
    }
    query = "SELECT * FROM questions WHERE evaluation=? AND status='done' ORDER BY id"
    for question in store.execute(query, (row["id"],)):
        shown = [pictures[n] for n in (question["left"], question["right"]) if n is not None]
        own = min(shown, key=lambda p: p["setting"])
        outcome: Outcome = question["answer"]
        other = None
        if len(shown) == 2:
            other = max(shown, key=lambda p: p["setting"])
            better = {"left": shown[0], "right": shown[1]}.get(question["answer"])
            outcome = "same" if better is None else "first" if better is own else "second"
        yield (
            (question["criterion"], *sorted(p["path"] for p in shown)),
            Verdict(
                judge=row["annotator"],
                criterion=question["criterion"],
                outcome=outcome,
                number=own["prompt_number"],
                prompt=own["prompt"],
                category=own["category"],
                source=own["source"],
                seed=int(own["seed"]),
                setting=settings[own["setting"]],
                file=own["path"],
                other_setting="" if other is None else settings[other["setting"]],
                other_file="" if other is None else other["path"],
            ),
        )


def agreement(store: sqlite3.Connection, name: str) -> list[str]:
    """A line per two annotators of a name and criterion: Cohen's kappa on the questions that both answered."""
    rows = [_evaluation(store, id_) for id_ in annotators(store, name).values()]
    worth = {"pass": 1.0, "fail": 0.0, "first": 1.0, "same": 0.5, "second": 0.0}
    answers = [{key: worth[v.outcome] for key, v in _iter_verdicts(store, row)} for row in rows]
    lines = []
    for (i, first), (j, second) in itertools.combinations(enumerate(rows), 2):
        for criterion in CRITERIA:
            shared = [key for key in answers[i] if key in answers[j] and key[0] == criterion]
            if shared:
                kappa = cohen_kappa([answers[i][key] for key in shared], [answers[j][key] for key in shared])
                lines.append(
                    f"{first['annotator']} and {second['annotator']}, {criterion}: Cohen's kappa {kappa:.2f} on "
                    f"{len(shared)} shared questions"
                )
    return lines
