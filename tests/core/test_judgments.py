"""The store of judgments: what is answered stays answered, whatever happens; who is asked what, and what comes out."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring import judgments
from ernie_pack.ernie_core.scoring.judgments import (
    Picture,
    Setup,
    Stale,
    Unknown,
    agree,
    answer,
    begin,
    calibrate_again,
    consistency,
    current,
    fingerprint,
    judgment_rows,
    list_tournaments,
    open_store,
    picture_path,
    progress,
    rank,
    rank_merged,
    read_record,
    undo,
    upcoming,
)
from ernie_pack.ernie_core.scoring.metrics import srcc

ROOT = Path(__file__).resolve().parents[2]


def setup_of(count=6, **changes):
    """Pictures whose number is their worth."""
    pictures = tuple(Picture(path=f"/p/{i:05}.png") for i in range(count))
    return Setup(**{"name": "cats", "annotator": "ann", "pictures": pictures, "rounds": 0} | changes)


def worth(store, id_, number):
    return int(picture_path(store, id_, number).stem)


def judge(store, id_, question):
    """What somebody says who sees the worth."""
    left, right = worth(store, id_, question.left), worth(store, id_, question.right)
    return "tie" if left == right else "left" if left > right else "right"


def play(store, id_, count=None, judge=judge):
    """Answer `count` questions, or all; returns how many."""
    done = 0
    while count is None or done < count:
        question = current(store, id_)
        if question is None:
            break
        answer(store, id_, question.id, judge(store, id_, question))
        done += 1
    return done


@pytest.fixture
def path(tmp_path):
    return tmp_path / "user" / "judgments.sqlite"


@pytest.fixture
def store(path):
    with open_store(path) as store:
        yield store


def test_the_file_is_safe_against_power_cuts(store):
    assert store.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 13, 16])
def test_a_tournament_is_played_to_its_end(store, count):
    id_ = begin(store, setup_of(count))
    promised = progress(store, id_).left
    asked = play(store, id_)
    state = progress(store, id_)
    assert (state.stage, state.left, state.done) == ("complete", 0, asked)
    assert asked == promised
    meetings = [frozenset(p) for p in read_record(store, id_).pairs_G2.tolist()]
    assert len(set(meetings)) == len(meetings)
    ranking = rank(store, id_)
    assert ranking[0].path == f"/p/{count - 1:05}.png"
    assert srcc([r.value for r in ranking], [int(Path(r.path).stem) for r in ranking]) > 0.85
    assert ranking[0].place == 1


def test_ties_share_a_place_and_no_judgment_no_interval(store):
    id_ = begin(store, setup_of(4))
    assert {r.place for r in rank(store, id_)} == {1}
    assert all(math.isinf(r.high) for r in rank(store, id_))
    play(store, id_, judge=lambda *_: "tie")
    ranking = rank(store, id_)
    assert {round(r.value, 9) for r in ranking} == {0.0}
    assert all(r.low < 0 < r.high for r in ranking)


def test_it_goes_on_on_another_day(path):
    with open_store(path) as store:
        id_ = begin(store, setup_of(8))
        play(store, id_, 7)
        waiting = current(store, id_)
    with open_store(path) as store:
        assert begin(store, setup_of(8)) == id_
        assert current(store, id_) == waiting
        assert progress(store, id_).done == 7


def test_the_same_name_with_other_pictures_is_refused(store):
    begin(store, setup_of(4))
    with pytest.raises(ErnieError, match=r"'cats' of ann has other pictures or prompts \(4 then, 5 now"):
        begin(store, setup_of(5))
    assert begin(store, setup_of(5, annotator="bob")) != begin(store, setup_of(4))


def test_more_rounds_can_be_asked_for_later(store):
    id_ = begin(store, setup_of(16, rounds=2))
    assert play(store, id_) == 16
    begin(store, setup_of(16, rounds=4))
    assert progress(store, id_).left == 16
    assert play(store, id_) == 16
    begin(store, setup_of(16, rounds=1))
    assert progress(store, id_).stage == "complete"


# --- answers --------------------------------------------------------------------------------------------------


def test_only_the_waiting_question_takes_an_answer(store):
    id_ = begin(store, setup_of(6))
    first, second, _ = upcoming(store, id_, count=3)
    with pytest.raises(Stale):
        answer(store, id_, second.id, "left")
    answer(store, id_, first.id, "left")
    with pytest.raises(Stale, match="it was answered or undone elsewhere"):
        answer(store, id_, first.id, "left")  # a second tab, or a second key press
    assert progress(store, id_).done == 1


@pytest.mark.parametrize("given", ["", "LEFT", "middle", None, 1])
def test_an_answer_is_one_of_four(store, given):
    id_ = begin(store, setup_of(4))
    with pytest.raises(ErnieError, match="an answer is one of left, right, tie, skip"):
        answer(store, id_, current(store, id_).id, given)


def test_ids_that_are_not_there(store):
    begin(store, setup_of(4))
    for call in (current, progress, undo, rank, read_record, calibrate_again):
        with pytest.raises(Unknown):
            call(store, 99)
    with pytest.raises(Unknown):
        answer(store, 99, 1, "left")
    with pytest.raises(Unknown):
        picture_path(store, 1, 4)
    with pytest.raises(Unknown):
        rank_merged(store, "dogs")


def test_a_skip_comes_again_later_and_a_second_one_is_the_last(store):
    id_ = begin(store, setup_of(8))
    first = current(store, id_)
    answer(store, id_, first.id, "skip")
    asked = [q.id for q in upcoming(store, id_, count=9)]
    assert asked[-1] == first.id
    play(store, id_, 3)
    assert current(store, id_).id == first.id
    answer(store, id_, first.id, "skip")
    record = read_record(store, id_)
    assert np.isnan(record.scores_G).sum() == 1
    play(store, id_)
    meetings = [frozenset(p) for p in read_record(store, id_).pairs_G2.tolist()]
    assert meetings.count(frozenset((first.left, first.right))) == 1, "they meet others"


# --- undo -----------------------------------------------------------------------------------------------------


def test_undo_goes_back_step_by_step_to_the_beginning(store):
    id_ = begin(store, setup_of(5))
    asked = []
    for given in ["left", "skip", "tie", "right", "left", "right", "skip"]:
        question = current(store, id_)
        asked.append((question.left, question.right))
        answer(store, id_, question.id, given)
    while asked:
        assert undo(store, id_)
        question = current(store, id_)
        assert (question.left, question.right) == asked.pop()
    assert not undo(store, id_)
    assert not progress(store, id_).can_undo
    assert progress(store, id_).done == 0


def test_undo_across_a_round_pairs_anew_by_the_new_answer(store):
    id_ = begin(store, setup_of(8, rounds=2))
    play(store, id_, 4)
    before = {(q.left, q.right) for q in upcoming(store, id_, count=9)}
    assert undo(store, id_)
    assert (progress(store, id_).round, progress(store, id_).done) == (1, 3)
    question = current(store, id_)
    other = {"left": "right", "right": "left"}[judge(store, id_, question)]
    answer(store, id_, question.id, other)
    after = {(q.left, q.right) for q in upcoming(store, id_, count=9)}
    assert before != after
    play(store, id_)
    assert len(read_record(store, id_).scores_G) == 8


def test_undo_of_the_last_answer_opens_a_finished_tournament(store):
    id_ = begin(store, setup_of(3))
    play(store, id_)
    ranking = rank(store, id_)
    assert undo(store, id_)
    assert progress(store, id_).stage == "judging"
    play(store, id_)
    assert rank(store, id_) == ranking


def test_nothing_is_ever_deleted(store):
    id_ = begin(store, setup_of(4))
    play(store, id_, 2)
    undo(store, id_)
    play(store, id_)
    kept = store.execute("SELECT count(*), count(undone) FROM actions").fetchone()
    assert tuple(kept) == (progress(store, id_).done + 1, 1)


def test_fingerprint_changes_with_every_step(store):
    seen = {fingerprint(store, "cats")}
    id_ = begin(store, setup_of(4))
    for step in (lambda: None, lambda: play(store, id_, 1), lambda: undo(store, id_), lambda: play(store, id_, 1)):
        step()
        seen.add(fingerprint(store, "cats"))
    assert len(seen) == 5


# --- groups, repeats, calibration -----------------------------------------------------------------------------


def test_pictures_of_one_prompt_meet_only_each_other(store):
    pictures = tuple(Picture(path=f"/p/{i:05}.png", prompt="abc"[i % 3]) for i in range(11))
    id_ = begin(store, setup_of(pictures=pictures, per_prompt=True))
    assert current(store, id_).prompt in "abc"
    asked = progress(store, id_).left
    assert play(store, id_) == asked
    prompts = [p.prompt for p in pictures]
    assert all(prompts[a] == prompts[b] for a, b in read_record(store, id_).pairs_G2.tolist())
    ranking = rank(store, id_)
    assert {r.path for r in ranking[:3]} == {"/p/00008.png", "/p/00009.png", "/p/00010.png"}, "the best of each"


def test_questions_that_come_twice_measure_consistency_and_count_once(store):
    id_ = begin(store, setup_of(12, rounds=4, repeat_share=0.5))
    promised = progress(store, id_).left
    assert play(store, id_) == promised
    assert len(read_record(store, id_).scores_G) == 24
    found = consistency(store, id_)
    assert (found.repeated, found.same) == (promised - 24, promised - 24) == (9, 9)
    other = begin(store, setup_of(12, rounds=4, repeat_share=0.5, annotator="left-hander"))
    play(store, other, judge=lambda *_: "left")
    assert consistency(store, other).same == 0, "the sides were changed"


CALIBRATION = tuple((Picture(path=f"/k/{i:05}1.png"), Picture(path=f"/k/{i:05}0.png")) for i in range(5))


def test_who_passes_the_calibration_goes_on(store):
    id_ = begin(store, setup_of(4, calibration=CALIBRATION))
    assert progress(store, id_).stage == "calibrating"
    sides = set()
    for _ in range(5):
        assert current(store, id_).kind == "calibration"
        sides.add(judge(store, id_, current(store, id_)))
        play(store, id_, 1)
    assert sides == {"left", "right"}
    state = progress(store, id_)
    assert (state.stage, state.calibration_right, state.round) == ("judging", 5, 1)
    assert not undo(store, id_), "what is over stays"
    play(store, id_)
    assert {r.path for r in rank(store, id_)} == {f"/p/{i:05}.png" for i in range(4)}


def test_who_does_not_pass_is_not_asked_on_and_may_try_again(store):
    id_ = begin(store, setup_of(4, calibration=CALIBRATION, pass_share=0.8))
    with pytest.raises(ErnieError, match="only after it was not passed"):
        calibrate_again(store, id_)
    play(store, id_, 3)
    play(store, id_, judge=lambda *_: "tie")
    state = progress(store, id_)
    assert (state.stage, state.calibration_right, state.done) == ("refused", 3, 5)
    assert current(store, id_) is None
    calibrate_again(store, id_)
    play(store, id_)
    assert progress(store, id_).stage == "complete"


# --- several annotators ---------------------------------------------------------------------------------------


def test_annotators_are_merged_by_rank_and_compared(store):
    shared = tuple(Picture(path=f"/p/{i:05}.png") for i in range(8))
    for who, pictures in (("ann", shared), ("bob", shared[2:]), ("eve", shared)):
        id_ = begin(store, setup_of(pictures=pictures, annotator=who, rounds=5))
        contrary = (lambda s, i, q: {"left": "right", "right": "left"}[judge(s, i, q)]) if who == "eve" else judge
        play(store, id_, judge=contrary)
    by = {(a.first, a.second): a for a in agree(store, "cats")}
    assert by["ann", "bob"].shared_pictures == 6
    assert by["ann", "bob"].tau > 0.6
    assert by["ann", "eve"].tau < -0.6
    assert by["ann", "bob"].kappa == 1
    assert by["ann", "eve"].shared_pairs > 5
    assert by["ann", "eve"].kappa < 0
    merged = rank_merged(store, "cats")
    assert len(merged) == 8
    assert merged[0].value > merged[-1].value
    assert all(0 < r.value < 1 for r in merged)
    assert read_record(store, 1).num_pictures == 8, "nobody's judgments are mixed"


def test_lists_and_files(store):
    id_ = begin(store, setup_of(4))
    begin(store, setup_of(4, name="dogs"))
    play(store, id_, 3)
    assert [p.name for p in list_tournaments(store)] == ["cats", "dogs"]
    rows = list(judgment_rows(store, id_))
    assert len(rows) == 3
    assert rows[0]["left"].startswith("/p/")
    assert rows[0]["answer"] in ("left", "right")
    assert rows[0]["time"] <= time.time()


def test_time_left_follows_the_pace(store, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(judgments.time, "time", lambda: clock[0])
    id_ = begin(store, setup_of(16))
    assert progress(store, id_).seconds_left is None
    for gap in (3.0, 3.0, 4000.0, 3.0, 5.0):  # a night's sleep is not thought
        play(store, id_, 1)
        clock[0] += gap
    play(store, id_, 1)
    state = progress(store, id_)
    assert state.seconds_left == 3.0 * state.left


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "  "}, "name must be 1 to 200 characters on one line"),
        ({"annotator": "a\nb"}, "annotator must be 1 to 200 characters on one line"),
        ({"count": 1}, "at least two pictures, got 1"),
        ({"pictures": (Picture(path="/a"), Picture(path="/a"))}, "one of them is given twice"),
        ({"rounds": -1}, "rounds must be 0"),
        ({"repeat_share": 2}, "repeat_share must lie between 0 and 1, got 2"),
        ({"pass_share": -0.1}, "pass_share must lie between 0 and 1, got -0.1"),
        ({"pictures": (Picture(path="/a", prompt="a"), Picture(path="/b", prompt="b")), "per_prompt": True}, "no two"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ErnieError, match=message):
        setup_of(changes.pop("count", 4), **changes)


def test_a_damaged_file_says_what_to_do(path):
    path.parent.mkdir()
    path.write_bytes(b"this is no database at all, but long enough to be looked at" * 40)
    with (
        pytest.raises(ErnieError, match=r"judgments\.sqlite cannot be read or written .*move it away"),
        open_store(path),
    ):
        pass


def test_files_of_others_and_of_the_future_are_refused(tmp_path):
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE t(x)")
    with pytest.raises(ErnieError, match="a database of something else"), open_store(tmp_path / "other.sqlite"):
        pass
    with sqlite3.connect(tmp_path / "new.sqlite") as new:
        new.execute("PRAGMA user_version=99")
    with pytest.raises(ErnieError, match="newer version"), open_store(tmp_path / "new.sqlite"):
        pass


# --- kill, size -----------------------------------------------------------------------------------------------

ANSWERING = """
import importlib.util, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("ernie_pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["ernie_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["ernie_pack"])
from ernie_pack.ernie_core.scoring.judgments import *
from ernie_pack.ernie_core.scoring.judgments import answer, begin, current, open_store
pictures = tuple(Picture(path=f"/p/{i:05}.png") for i in range(64))
with open_store(sys.argv[2]) as store:
    id_ = begin(store, Setup(name="cats", annotator="ann", pictures=pictures, rounds=8))
    while (question := current(store, id_)) is not None:
        answer(store, id_, question.id, "left")
        print(question.id, flush=True)
"""


def test_kill_9_at_any_moment_loses_nothing(path):
    kept: list[int] = []
    for wait in (5, 17, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", ANSWERING, str(ROOT), str(path)], stdout=subprocess.PIPE, text=True
        )
        told = [int(process.stdout.readline()) for _ in range(wait)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().splitlines()]
        process.wait()
        process.stdout.close()
        kept += told
        with open_store(path) as store:
            done = [i for (i,) in store.execute("SELECT question FROM actions ORDER BY id")]
            assert store.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            # Everything that was said to be kept is; at most the one in flight is more.
            assert done[: len(kept)] == kept
            assert len(done) - len(kept) <= 1
            kept = done
            assert len(read_record(store, 1).scores_G) == len(done)
            assert current(store, 1).id not in done


def test_10000_pictures_are_quick_and_take_no_memory(path):
    with open_store(path) as store:
        id_ = begin(store, setup_of(10_000, rounds=14))
        assert progress(store, id_).left == 14 * 5000
        play(store, id_, 20)
        tracemalloc.start()
        took = []
        for _ in range(100):
            start = time.perf_counter()
            question = current(store, id_)
            answer(store, id_, question.id, "left")
            progress(store, id_)
            upcoming(store, id_, count=4)
            took.append(time.perf_counter() - start)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert np.median(took) < 0.05
        assert peak < 2_000_000
        # The last answer of a round pairs the next one.
        store.execute(
            "UPDATE questions SET status='done', answer='left' WHERE status='open' AND id!=("
            "SELECT max(id) FROM questions)"
        )
        start = time.perf_counter()
        play(store, id_, 1)
        assert time.perf_counter() - start < 5
        assert progress(store, id_).round == 2
