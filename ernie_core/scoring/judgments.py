"""Tournaments on the disk: SQLite (WAL, synchronous FULL), every answer committed before the next question is read.

A tournament is one name and one annotator; several annotators of a name are several tournaments. No answer is deleted:
what is undone stays in the log, marked. One connection per call is meant (`open_store`); any number of processes may
have the file open.

Rounds: 0 is the calibration, where there is one; from 1 on every group (all pictures, or those of one prompt) plays
its own Swiss tournament. A pair that is skipped comes again at the end of its round; skipped there too, it is left out
for good: half a point for both, and they meet others.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import sqlite3
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..errors import ErnieError
from . import store as store_file
from . import tournament
from .metrics import krcc, rank_normalise
from .store import writing
from .tournament import Record

Answer = Literal["left", "right", "tie", "skip"]
Stage = Literal["calibrating", "refused", "judging", "complete"]

VERSION = 1
SKIPS = 2  # as many skips of one pair leave it out
PAUSE_S = 120.0  # longer gaps between two answers are breaks, not thought
_SCORES = {"left": 1.0, "tie": 0.5, "right": 0.0}

_SCHEMA = """
CREATE TABLE tournaments(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, annotator TEXT NOT NULL, question TEXT NOT NULL,
    rounds INTEGER NOT NULL, seed INTEGER NOT NULL, repeat_share REAL NOT NULL, per_prompt INTEGER NOT NULL,
    pass_share REAL NOT NULL, num_pictures INTEGER NOT NULL, digest TEXT NOT NULL, plan TEXT NOT NULL,
    round INTEGER NOT NULL, attempts INTEGER NOT NULL, created REAL NOT NULL, UNIQUE(name, annotator));
CREATE TABLE pictures(
    tournament INTEGER NOT NULL, number INTEGER NOT NULL, path TEXT NOT NULL, label TEXT NOT NULL,
    prompt TEXT NOT NULL, PRIMARY KEY(tournament, number)) WITHOUT ROWID;
CREATE TABLE questions(
    id INTEGER PRIMARY KEY AUTOINCREMENT, tournament INTEGER NOT NULL, round INTEGER NOT NULL,
    position INTEGER NOT NULL, kind TEXT NOT NULL, left INTEGER NOT NULL, right INTEGER NOT NULL,
    expected TEXT, repeats INTEGER, status TEXT NOT NULL, answer TEXT);
CREATE INDEX questions_waiting ON questions(tournament, status, position, kind);
CREATE TABLE byes(
    tournament INTEGER NOT NULL, round INTEGER NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY(tournament, number)) WITHOUT ROWID;
CREATE TABLE actions(
    id INTEGER PRIMARY KEY AUTOINCREMENT, tournament INTEGER NOT NULL, question INTEGER NOT NULL,
    answer TEXT NOT NULL, position INTEGER NOT NULL, at REAL NOT NULL, undone REAL);
CREATE INDEX actions_last ON actions(tournament, undone, id);
CREATE INDEX actions_question ON actions(question);
"""


class Unknown(ErnieError):
    """There is no such tournament or picture."""


class Stale(ErnieError):
    """The question is not the one that waits: it was answered elsewhere, or undone."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    path: str
    """Absolute; what makes it the same picture in two tournaments."""
    label: str = ""
    """For people; empty = the file's name."""
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a tournament is about."""

    name: str
    annotator: str
    pictures: tuple[Picture, ...]
    rounds: int = 0
    """0 = `tournament.default_rounds` of each group; more than a group can play are cut to what it can."""
    question: str = ""
    seed: int = 0
    per_prompt: bool = False
    """Whether only pictures of the same prompt meet."""
    repeat_share: float = 0.0
    """Questions asked a second time with sides changed, as a share of each round from the second on."""
    calibration: tuple[tuple[Picture, Picture], ...] = ()
    """(better, worse) pairs that come first."""
    pass_share: float = 0.8
    """Share of the calibration that must be right; a tie or a skip is not."""

    def __post_init__(self) -> None:
        for what in ("name", "annotator"):
            text = getattr(self, what)
            if not text.strip() or len(text) > 200 or any(ord(c) < 32 for c in text):
                raise ErnieError(f"{what} must be 1 to 200 characters on one line, got {text!r}.")
        if len(self.pictures) < 2:
            raise ErnieError(f"a tournament needs at least two pictures, got {len(self.pictures)}.")
        if len({p.path for p in self.pictures}) < len(self.pictures):
            raise ErnieError("a tournament needs different files, and one of them is given twice.")
        if self.rounds < 0:
            raise ErnieError(f"rounds must be 0 (by the number of pictures) or more, got {self.rounds}.")
        if not 0 <= self.repeat_share <= 1:
            raise ErnieError(f"repeat_share must lie between 0 and 1, got {self.repeat_share:g}.")
        if not 0 <= self.pass_share <= 1:
            raise ErnieError(f"pass_share must lie between 0 and 1, got {self.pass_share:g}.")
        if self.per_prompt and all(len(group) < 2 for group in self.groups()):
            raise ErnieError("only pictures of the same prompt are to meet, and no two have the same prompt.")

    def groups(self) -> list[list[int]]:
        """Numbers of the pictures that meet each other, in the order of their first."""
        found: dict[str, list[int]] = {}
        for number, picture in enumerate(self.pictures):
            found.setdefault(picture.prompt if self.per_prompt else "", []).append(number)
        return list(found.values())

    def digest(self) -> str:
        """Changes with the pictures, their prompts and what they are compared by."""
        pictures = [(p.path, p.prompt) for p in self.pictures]
        known = [(a.path, b.path) for a, b in self.calibration]
        return hashlib.sha256(json.dumps([pictures, known, self.per_prompt]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Question:
    """A pair that waits for an answer."""

    id: int
    kind: Literal["pair", "repeat", "calibration"]
    round: int
    left: int
    """Number of the picture on the left."""
    right: int
    prompt: str
    """Of both; empty where they differ."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a tournament is."""

    id: int
    name: str
    annotator: str
    question: str
    stage: Stage
    round: int
    rounds: int
    done: int
    """Answered questions, the calibration's included."""
    left: int
    """Questions to come, as far as is known now."""
    num_pictures: int
    calibration_right: int
    calibration_total: int
    seconds_left: float | None
    """By the pace of the last answers; None before there is one."""
    can_undo: bool
    last_answer: float | None
    """Seconds since 1970."""

    @property
    def complete(self) -> bool:
        return self.stage == "complete"


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One picture of a finished or running tournament."""

    place: int
    """1 = best; equal strengths share the better place."""
    path: str
    label: str
    prompt: str
    value: float
    """Bradley-Terry strength; of several annotators the mean of the normalised ranks, in (0, 1)."""
    low: float
    """95 % interval of `value`; infinite without a judgment, NaN where ranks were merged or none was asked for."""
    high: float
    points: float
    buchholz: float
    judged: int
    """Judgments that it was part of."""
    share: float
    """Rank in its group, in (0, 1), 1 = best: what tiers and merging go by."""
    tier: int
    """1 to 10, 10 = best."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How much two annotators of a name agree."""

    first: str
    second: str
    shared_pictures: int
    tau: float
    """Kendall's tau-b of their rankings of the shared pictures; NaN for fewer than two, or where one has no order."""
    shared_pairs: int
    kappa: float
    """Cohen's kappa of their answers (better, worse, tie) to the pairs that both were asked; NaN without any."""


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """How often one annotator gave the same answer to the same question twice."""

    repeated: int
    same: int
    kappa: float


# --- the file -------------------------------------------------------------------------------------------------------


def open_store(path: Path | str) -> contextlib.AbstractContextManager[sqlite3.Connection]:
    """A connection to the file, made where there is none, closed at the end; raises what `store.open_store` raises."""
    return store_file.open_store(path, _SCHEMA, version=VERSION, what="judgments")


# --- beginning and going on -----------------------------------------------------------------------------------------


def begin(store: sqlite3.Connection, setup: Setup) -> int:
    """The id of the tournament: a new one, or the one that is there with the same pictures.

    Question, shares and rounds may change from call to call; rounds that have begun are finished.

    Raises:
        ErnieError: the name is taken by this annotator for other pictures.
    """
    row = _find(store, setup.name, setup.annotator)
    digest = setup.digest()
    if row is not None and row["digest"] != digest:
        raise ErnieError(
            f"the tournament {setup.name!r} of {setup.annotator} has other pictures or prompts "
            f"({row['num_pictures']} then, {len(setup.pictures)} now; or another calibration). Give this one another "
            "name, or bring the same pictures (the same folder, or a fixed seed)."
        )
    plan = json.dumps(_plan(setup))
    settings = (setup.question, setup.rounds, setup.repeat_share, setup.pass_share, plan)
    if (
        row is not None
        and tuple(row[k] for k in ("question", "rounds", "repeat_share", "pass_share", "plan")) == settings
    ):
        return row["id"]
    with writing(store):
        row = _find(store, setup.name, setup.annotator)
        if row is None:
            id_ = _insert(store, setup, digest, plan)
        else:
            id_ = row["id"]
            store.execute(
                "UPDATE tournaments SET question=?, rounds=?, repeat_share=?, pass_share=?, plan=? WHERE id=?",
                (*settings, id_),
            )
        if _waiting(store, id_) is None:
            _advance(store, id_)
    return id_


def _find(store: sqlite3.Connection, name: str, annotator: str) -> sqlite3.Row | None:
    return store.execute("SELECT * FROM tournaments WHERE name=? AND annotator=?", (name, annotator)).fetchone()


def _plan(setup: Setup) -> list[list[int]]:
    """Per group: [pictures, rounds]."""
    plan = []
    for group in setup.groups():
        rounds = setup.rounds or tournament.default_rounds(len(group))
        plan.append([len(group), min(rounds, tournament.most_rounds(len(group)))])
    return plan


def _insert(store: sqlite3.Connection, setup: Setup, digest: str, plan: str) -> int:
    cursor = store.execute(
        "INSERT INTO tournaments(name, annotator, question, rounds, seed, repeat_share, per_prompt, pass_share, "
        "num_pictures, digest, plan, round, attempts, created) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            *(setup.name, setup.annotator, setup.question, setup.rounds, setup.seed, setup.repeat_share),
            *(setup.per_prompt, setup.pass_share, len(setup.pictures), digest, plan, 0, 0, time.time()),
        ),
    )
    id_ = cursor.lastrowid
    assert id_ is not None
    known = [picture for pair in setup.calibration for picture in pair]
    store.executemany(
        "INSERT INTO pictures VALUES(?,?,?,?,?)",
        (
            (id_, number, p.path, p.label or Path(p.path).name, p.prompt)
            for number, p in enumerate((*setup.pictures, *known))
        ),
    )
    _ask_calibration(store, _tournament(store, id_))
    return id_


def _ask_calibration(store: sqlite3.Connection, row: sqlite3.Row) -> None:
    """Add the calibration's questions; pictures beyond the tournament's own are its (better, worse) pairs."""
    num = store.execute("SELECT count(*) FROM pictures WHERE tournament=?", (row["id"],)).fetchone()[0]
    rng = np.random.default_rng([row["seed"], row["attempts"], 2])
    pairs = [(n, n + 1) for n in range(row["num_pictures"], num, 2)]
    asked = []
    for i in rng.permutation(len(pairs)):
        better, worse = pairs[i]
        left = bool(rng.random() < 0.5)
        asked.append(
            ("calibration", *((better, worse) if left else (worse, better)), "left" if left else "right", None)
        )
    _ask(store, row["id"], 0, asked)


def _ask(store: sqlite3.Connection, id_: int, round_: int, asked: Sequence[tuple]) -> None:
    """Add questions (kind, left, right, expected, repeats) behind all others."""
    start = store.execute("SELECT coalesce(max(position), 0) FROM questions WHERE tournament=?", (id_,)).fetchone()[0]
    store.executemany(
        "INSERT INTO questions(tournament, round, position, kind, left, right, expected, repeats, status) "
        "VALUES(?,?,?,?,?,?,?,?,'open')",
        ((id_, round_, place, *values) for place, values in enumerate(asked, start=start + 1)),
    )


def _tournament(store: sqlite3.Connection, id_: int) -> sqlite3.Row:
    row = store.execute("SELECT * FROM tournaments WHERE id=?", (id_,)).fetchone()
    if row is None:
        raise Unknown(f"there is no tournament {id_}.")
    return row


def _waiting(store: sqlite3.Connection, id_: int) -> sqlite3.Row | None:
    return store.execute(
        "SELECT * FROM questions WHERE tournament=? AND status='open' ORDER BY position LIMIT 1", (id_,)
    ).fetchone()


def _advance(store: sqlite3.Connection, id_: int) -> None:
    """Add the questions of the next round, if there is one."""
    row = _tournament(store, id_)
    right, total = _calibration(store, row)
    if total and right < row["pass_share"] * total - 1e-9:
        return
    plan = json.loads(row["plan"])
    while row["round"] < max(rounds for _, rounds in plan):
        next_ = row["round"] + 1
        store.execute("UPDATE tournaments SET round=? WHERE id=?", (next_, id_))
        row = _tournament(store, id_)
        record = read_record(store, id_)
        asked: list[tuple] = []
        for (_, rounds), members in zip(plan, _groups(store, row), strict=True):
            if next_ > rounds:
                continue
            made = tournament.next_round(record, rounds, members=members, seed=row["seed"])
            if made is None:
                continue
            asked += [("pair", left, right, None, None) for left, right in made.pairs]
            if made.bye is not None:
                store.execute("INSERT INTO byes VALUES(?,?,?)", (id_, next_, made.bye))
        rng = np.random.default_rng([row["seed"], next_, 3])
        asked += _repeats(store, row, len(asked), rng)
        _ask(store, id_, next_, [asked[i] for i in rng.permutation(len(asked))])
        if asked:
            return


def _groups(store: sqlite3.Connection, row: sqlite3.Row) -> list[list[int]]:
    if not row["per_prompt"]:
        return [list(range(row["num_pictures"]))]
    found: dict[str, list[int]] = {}
    query = "SELECT number, prompt FROM pictures WHERE tournament=? AND number<? ORDER BY number"
    for number, prompt in store.execute(query, (row["id"], row["num_pictures"])):
        found.setdefault(prompt, []).append(number)
    return list(found.values())


def _repeats(store: sqlite3.Connection, row: sqlite3.Row, num_pairs: int, rng: np.random.Generator) -> list[tuple]:
    """Pairs of earlier rounds to ask again, sides changed; each once."""
    count = round(row["repeat_share"] * num_pairs)
    if not count:
        return []
    before = store.execute(
        "SELECT id, left, right FROM questions WHERE tournament=? AND status='done' AND kind='pair' AND id NOT IN "
        "(SELECT repeats FROM questions WHERE tournament=? AND repeats IS NOT NULL AND status!='void') ORDER BY id",
        (row["id"], row["id"]),
    ).fetchall()
    chosen = rng.permutation(len(before))[:count]
    return [("repeat", before[i]["right"], before[i]["left"], None, before[i]["id"]) for i in chosen]


# --- asking and answering -------------------------------------------------------------------------------------------


def current(store: sqlite3.Connection, id_: int) -> Question | None:
    """The question that waits, or None when nothing is left to ask.

    Raises:
        Unknown: there is no such tournament.
    """
    found = upcoming(store, id_, count=1)
    return found[0] if found else None


def upcoming(store: sqlite3.Connection, id_: int, *, count: int) -> list[Question]:
    """The question that waits and those behind it, at most `count`: whose pictures can be fetched ahead."""
    _tournament(store, id_)
    rows = store.execute(
        "SELECT q.id, q.kind, q.round, q.left, q.right, a.prompt AS p, b.prompt AS q FROM questions q "
        "JOIN pictures a ON a.tournament=q.tournament AND a.number=q.left "
        "JOIN pictures b ON b.tournament=q.tournament AND b.number=q.right "
        "WHERE q.tournament=? AND q.status='open' ORDER BY q.position LIMIT ?",
        (id_, count),
    )
    return [
        Question(id=i, kind=kind, round=round_, left=left, right=right, prompt=p if p == q else "")
        for i, kind, round_, left, right, p, q in rows
    ]


def answer(store: sqlite3.Connection, id_: int, question: int, given: Answer) -> None:
    """Keep an answer: it is on the disk when this returns.

    Raises:
        Unknown: there is no such tournament.
        Stale: the question does not wait (any more).
        ErnieError: `given` is none of left, right, tie, skip.
    """
    if given not in get_args(Answer):
        raise ErnieError(f"an answer is one of {', '.join(get_args(Answer))}, got {given!r}.")
    with writing(store):
        _tournament(store, id_)
        row = _waiting(store, id_)
        if row is None or row["id"] != question:
            raise Stale(f"question {question} is not the one that waits: it was answered or undone elsewhere.")
        skips = 0
        if given == "skip":
            query = "SELECT count(*) FROM actions WHERE question=? AND answer='skip' AND undone IS NULL"
            skips = 1 + store.execute(query, (question,)).fetchone()[0]
        store.execute(
            "INSERT INTO actions(tournament, question, answer, position, at) VALUES(?,?,?,?,?)",
            (id_, question, given, row["position"], time.time()),
        )
        if given != "skip":
            store.execute("UPDATE questions SET status='done', answer=? WHERE id=?", (given, question))
        elif skips >= SKIPS:
            store.execute("UPDATE questions SET status='dropped' WHERE id=?", (question,))
        else:
            store.execute(
                "UPDATE questions SET position=(SELECT max(position) + 1 FROM questions WHERE tournament=?) WHERE id=?",
                (id_, question),
            )
        if _waiting(store, id_) is None:
            _advance(store, id_)


def undo(store: sqlite3.Connection, id_: int) -> bool:
    """Take the last answer or skip back; its question waits again. False when there is none to take back.

    A round that was made from it is made anew when it is answered. A calibration that is over stays as it is.
    """
    with writing(store):
        row = _tournament(store, id_)
        action = _last_action(store, row)
        if action is None:
            return False
        if action["round"] < row["round"]:
            store.execute("UPDATE questions SET status='void' WHERE tournament=? AND round>?", (id_, action["round"]))
            store.execute("DELETE FROM byes WHERE tournament=? AND round>?", (id_, action["round"]))
            store.execute("UPDATE tournaments SET round=? WHERE id=?", (action["round"], id_))
        store.execute("UPDATE actions SET undone=? WHERE id=?", (time.time(), action["id"]))
        store.execute(
            "UPDATE questions SET status='open', answer=NULL, position=? WHERE id=?",
            (action["position"], action["question"]),
        )
    return True


def _last_action(store: sqlite3.Connection, row: sqlite3.Row) -> sqlite3.Row | None:
    """The action that `undo` would take back."""
    action = store.execute(
        "SELECT a.id, a.question, a.position, q.round, q.status FROM actions a JOIN questions q ON q.id=a.question "
        "WHERE a.tournament=? AND a.undone IS NULL ORDER BY a.id DESC LIMIT 1",
        (row["id"],),
    ).fetchone()
    if action is None or action["status"] == "void":
        return None
    over = action["round"] == 0 and _waiting_round(store, row["id"]) != 0
    return None if over else action


def _waiting_round(store: sqlite3.Connection, id_: int) -> int | None:
    row = _waiting(store, id_)
    return None if row is None else row["round"]


def calibrate_again(store: sqlite3.Connection, id_: int) -> None:
    """Ask the calibration anew, in another order, after it was not passed.

    Raises:
        ErnieError: it was passed, or is not over.
    """
    with writing(store):
        row = _tournament(store, id_)
        if _stage(store, row) != "refused":
            raise ErnieError("the calibration can be repeated only after it was not passed.")
        store.execute("UPDATE questions SET status='void' WHERE tournament=? AND round=0", (id_,))
        store.execute("UPDATE tournaments SET attempts=attempts+1 WHERE id=?", (id_,))
        _ask_calibration(store, _tournament(store, id_))


def _calibration(store: sqlite3.Connection, row: sqlite3.Row) -> tuple[int, int]:
    """(right answers, questions) of the present attempt."""
    right, total = store.execute(
        "SELECT coalesce(sum(answer=expected), 0), count(*) FROM questions "
        "WHERE tournament=? AND kind='calibration' AND status!='void'",
        (row["id"],),
    ).fetchone()
    return right, total


def _stage(store: sqlite3.Connection, row: sqlite3.Row) -> Stage:
    waiting = _waiting_round(store, row["id"])
    if waiting is not None:
        return "calibrating" if waiting == 0 else "judging"
    right, total = _calibration(store, row)
    return "refused" if total and right < row["pass_share"] * total - 1e-9 else "complete"


# --- looking --------------------------------------------------------------------------------------------------------


def progress(store: sqlite3.Connection, id_: int) -> Progress:
    """Where the tournament is.

    Raises:
        Unknown: there is no such tournament.
    """
    row = _tournament(store, id_)
    stage = _stage(store, row)
    counts = dict(
        store.execute("SELECT status, count(*) FROM questions WHERE tournament=? GROUP BY status", (id_,)).fetchall()
    )
    plan = json.loads(row["plan"])
    rounds = max(row["round"], *(r for _, r in plan))
    to_come = 0.0
    for number in range(row["round"] + 1, rounds + 1):
        pairs = sum(size // 2 for size, most in plan if number <= most)
        to_come += pairs + (round(row["repeat_share"] * pairs) if number > 1 else 0)
    left = 0 if stage in ("complete", "refused") else counts.get("open", 0) + int(to_come)
    right, total = _calibration(store, row)
    times = [
        t
        for (t,) in store.execute(
            "SELECT at FROM actions WHERE tournament=? AND undone IS NULL ORDER BY id DESC LIMIT 21", (id_,)
        )
    ]
    pace = seconds_each(times)
    return Progress(
        id=id_,
        name=row["name"],
        annotator=row["annotator"],
        question=row["question"],
        stage=stage,
        round=row["round"],
        rounds=rounds,
        done=counts.get("done", 0) + counts.get("dropped", 0),
        left=left,
        num_pictures=row["num_pictures"],
        calibration_right=right,
        calibration_total=total,
        seconds_left=None if pace is None else pace * left,
        can_undo=_last_action(store, row) is not None,
        last_answer=times[0] if times else None,
    )


def seconds_each(times: Sequence[float]) -> float | None:
    """What an answer takes by the times of the last ones, latest first, breaks left out; None before there are two."""
    gaps = [a - b for a, b in itertools.pairwise(times) if 0 <= a - b < PAUSE_S]
    return statistics.median(gaps) if gaps else None


def list_tournaments(store: sqlite3.Connection) -> list[Progress]:
    """All tournaments, the latest first."""
    rows = store.execute("SELECT id FROM tournaments ORDER BY id DESC").fetchall()
    found = [progress(store, row["id"]) for row in rows]
    return sorted(found, key=lambda p: -(p.last_answer or 0.0))


def find(store: sqlite3.Connection, name: str, annotator: str) -> int | None:
    """The id of a tournament, or None."""
    row = _find(store, name, annotator)
    return None if row is None else row["id"]


def annotators(store: sqlite3.Connection, name: str) -> dict[str, int]:
    """Annotator -> id of the tournaments of a name, in the order of their beginning."""
    return dict(store.execute("SELECT annotator, id FROM tournaments WHERE name=? ORDER BY id", (name,)).fetchall())


def picture_path(store: sqlite3.Connection, id_: int, number: int) -> Path:
    """Where a picture of a tournament lies.

    Raises:
        Unknown: there is no such picture.
    """
    row = store.execute("SELECT path FROM pictures WHERE tournament=? AND number=?", (id_, number)).fetchone()
    if row is None:
        raise Unknown(f"there is no picture {number} in tournament {id_}.")
    return Path(row["path"])


def picture_numbers(store: sqlite3.Connection, id_: int, paths: Sequence[str]) -> dict[str, int]:
    """Path -> number of a tournament's pictures."""
    marks = ",".join("?" * len(paths))
    query = f"SELECT path, min(number) FROM pictures WHERE tournament=? AND path IN ({marks}) GROUP BY path"
    return dict(store.execute(query, (id_, *paths)).fetchall())


def fingerprint(store: sqlite3.Connection, name: str | None) -> str:
    """Changes with every answer, undo and new annotator of a name; of any name where it is None."""
    row = store.execute(
        "SELECT count(*), coalesce(max(a.id), 0), coalesce(max(a.undone), 0), count(a.undone) FROM tournaments t "
        "LEFT JOIN actions a ON a.tournament=t.id WHERE ? IS NULL OR t.name=?",
        (name, name),
    ).fetchone()
    return " ".join(map(str, tuple(row)))


def read_record(store: sqlite3.Connection, id_: int) -> Record:
    """What was played, in the order of the answers' questions."""
    row = _tournament(store, id_)
    rows = store.execute(
        "SELECT left, right, answer FROM questions WHERE tournament=? AND kind='pair' "
        "AND status IN ('done', 'dropped') ORDER BY id",
        (id_,),
    ).fetchall()
    byes = store.execute("SELECT number FROM byes WHERE tournament=? ORDER BY round, number", (id_,)).fetchall()
    return Record(
        num_pictures=row["num_pictures"],
        pairs_G2=np.array([(left, right) for left, right, _ in rows], np.int64).reshape(-1, 2),
        scores_G=np.array([_SCORES.get(given, math.nan) for _, _, given in rows]),
        byes=tuple(number for (number,) in byes),
    )


# --- results --------------------------------------------------------------------------------------------------------


def rank(store: sqlite3.Connection, id_: int, *, intervals: bool = True) -> list[Ranked]:
    """The pictures as one annotator ranks them, best first: by strength, in groups by their share in it.

    Without `intervals` low and high are NaN, which saves most of the time.
    """
    row = _tournament(store, id_)
    record = read_record(store, id_)
    strengths = tournament.bradley_terry(record, errors=intervals)
    standing = tournament.stand(record, seed=row["seed"])
    pairs, _ = record.judged
    judged = np.bincount(pairs.reshape(-1), minlength=row["num_pictures"])
    share = np.zeros(row["num_pictures"])
    for members in _groups(store, row):
        share[members] = rank_normalise(strengths.values_N[members])
    pictures = store.execute(
        "SELECT path, label, prompt FROM pictures WHERE tournament=? AND number<? ORDER BY number",
        (id_, row["num_pictures"]),
    ).fetchall()
    order = np.lexsort((-strengths.values_N, -share))
    tier = tournament.tiers(share.tolist())
    found: list[Ranked] = []
    for n in order.tolist():
        value, error = float(strengths.values_N[n]), float(strengths.errors_N[n])
        same = found and (found[-1].share, found[-1].value) == (share[n], value)
        found.append(
            Ranked(
                place=found[-1].place if same else len(found) + 1,
                path=pictures[n]["path"],
                label=pictures[n]["label"],
                prompt=pictures[n]["prompt"],
                value=value,
                low=value - 1.96 * error,
                high=value + 1.96 * error,
                points=float(standing.points_N[n]),
                buchholz=float(standing.buchholz_N[n]),
                judged=int(judged[n]),
                share=float(share[n]),
                tier=tier[n],
            )
        )
    return found


def rank_merged(store: sqlite3.Connection, name: str) -> list[Ranked]:
    """The pictures of all annotators of a name: the mean of their ranks in each one's own tournament.

    Raises:
        Unknown: nobody has a tournament of that name.
    """
    ids = annotators(store, name)
    if not ids:
        raise Unknown(f"there is no tournament {name!r}.")
    rankings = [rank(store, id_, intervals=False) for id_ in ids.values()]
    merged = tournament.merge_rankings([{r.path: r.share for r in ranking} for ranking in rankings])
    known: dict[str, list[Ranked]] = {}
    for ranking in rankings:
        for ranked in ranking:
            known.setdefault(ranked.path, []).append(ranked)
    order = sorted(known, key=lambda path: -merged[path])
    shares = rank_normalise([merged[path] for path in order]).tolist()
    tier = tournament.tiers(shares)
    found: list[Ranked] = []
    for i, path in enumerate(order):
        seen, value = known[path], merged[path]
        found.append(
            Ranked(
                place=found[-1].place if found and found[-1].value == value else i + 1,
                path=path,
                label=seen[0].label,
                prompt=seen[0].prompt,
                value=value,
                low=math.nan,
                high=math.nan,
                points=sum(r.points for r in seen),
                buchholz=sum(r.buchholz for r in seen),
                judged=sum(r.judged for r in seen),
                share=shares[i],
                tier=tier[i],
            )
        )
    return found


def agree(store: sqlite3.Connection, name: str) -> list[Agreement]:
    """Every two annotators of a name against each other."""
    ids = annotators(store, name)
    if len(ids) < 2:
        return []
    rankings = {who: {r.path: r.share for r in rank(store, id_, intervals=False)} for who, id_ in ids.items()}
    answers = {who: _answers(store, id_) for who, id_ in ids.items()}
    found = []
    people = list(ids)
    for i, first in enumerate(people):
        for second in people[i + 1 :]:
            pictures = [p for p in rankings[first] if p in rankings[second]]
            pairs = [p for p in answers[first] if p in answers[second]]
            a, b = ([rankings[who][p] for p in pictures] for who in (first, second))
            orders = len(pictures) > 1 and len(set(a)) > 1 and len(set(b)) > 1
            kappa = tournament.cohen_kappa([answers[first][p] for p in pairs], [answers[second][p] for p in pairs])
            found.append(
                Agreement(
                    first=first,
                    second=second,
                    shared_pictures=len(pictures),
                    tau=krcc(a, b) if orders else math.nan,
                    shared_pairs=len(pairs),
                    kappa=kappa,
                )
            )
    return found


def _answers(store: sqlite3.Connection, id_: int) -> dict[tuple[str, str], float]:
    """(path, path) -> score of the first. Which one is first is the same for everybody, and chance: in the order of the
    names one side might always be the better one, and kappa's agreement by chance would be 1."""
    rows = store.execute(
        "SELECT a.path, b.path, q.answer FROM questions q "
        "JOIN pictures a ON a.tournament=q.tournament AND a.number=q.left "
        "JOIN pictures b ON b.tournament=q.tournament AND b.number=q.right "
        "WHERE q.tournament=? AND q.kind='pair' AND q.status='done'",
        (id_,),
    )
    found = {}
    for left, right, given in rows:
        first, second = sorted((left, right))
        turned = hashlib.sha256(f"{first}\n{second}".encode()).digest()[0] % 2 == 1
        pair = (second, first) if turned else (first, second)
        found[pair] = _SCORES[given] if left == pair[0] else 1 - _SCORES[given]
    return found


def consistency(store: sqlite3.Connection, id_: int) -> Consistency:
    """How one annotator answered the questions that came twice."""
    rows = store.execute(
        "SELECT q.answer, p.answer FROM questions q JOIN questions p ON p.id=q.repeats "
        "WHERE q.tournament=? AND q.kind='repeat' AND q.status='done' AND p.status='done'",
        (id_,),
    ).fetchall()
    again = [1 - _SCORES[a] for a, _ in rows]  # the sides were changed
    first = [_SCORES[b] for _, b in rows]
    same = sum(a == b for a, b in zip(again, first, strict=True))
    return Consistency(repeated=len(rows), same=same, kappa=tournament.cohen_kappa(first, again))


def judgment_rows(store: sqlite3.Connection, id_: int) -> Iterator[dict[str, Any]]:
    """Every question that was answered or left out, for files: left, right, answer, when, round, kind."""
    rows = store.execute(
        "SELECT q.round, q.kind, a.path, b.path, coalesce(q.answer, 'skip'), "
        "(SELECT max(at) FROM actions WHERE question=q.id AND undone IS NULL) FROM questions q "
        "JOIN pictures a ON a.tournament=q.tournament AND a.number=q.left "
        "JOIN pictures b ON b.tournament=q.tournament AND b.number=q.right "
        "WHERE q.tournament=? AND q.status IN ('done', 'dropped') ORDER BY q.id",
        (id_,),
    )
    for round_, kind, left, right, given, at in rows:
        yield {"round": round_, "kind": kind, "left": left, "right": right, "answer": given, "time": at}
