"""People's verdicts: order, sides, blindness, undo, skip, resuming, damage, two annotators."""

import itertools
import json
import sqlite3
import subprocess
import sys

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.evaluation import verdict_store as engine
from ernie_pack.ernie_core.evaluation.prompt_sets import read_setting
from ernie_pack.ernie_core.scoring.judgments import Stale, Unknown
from painted_settings import make_set, paint


@pytest.fixture
def sides(tmp_path):
    prompts = make_set({"color": 3, "counting": 2})
    first = paint(tmp_path / "base", prompts, lambda item, k: 10 * item.number + k, seeds=2)
    second = paint(tmp_path / "turbo", prompts, lambda item, k: 100 + 10 * item.number + k, seeds=2, cfg=4.0)
    return read_setting(first), read_setting(second)


@pytest.fixture
def store(tmp_path):
    with engine.open_store(tmp_path / "verdicts.sqlite") as opened:
        yield opened


def setup(sides, mode="side by side", **changes):
    return engine.Setup(**{"name": "n", "annotator": "ann", "mode": mode, "settings": sides} | changes)


def play(store, id_, give):
    """Answer everything by `give`(question, [setting of each picture])."""
    asked = []
    while found := engine.upcoming(store, id_, count=1):
        shown = [engine.picture_path(store, id_, n).parent.name for n in found[0].pictures]
        asked.append((found[0].criterion, *shown, found[0].prompt))
        engine.answer(store, id_, found[0].id, give(found[0], shown))
    return asked


def to_the_better(question, shown):
    return "left" if shown[0] == "turbo" else "right"


def test_every_pair_is_asked_for_both_criteria_with_sides_by_chance(store, sides):
    id_ = engine.begin(store, setup(sides))
    asked = play(store, id_, to_the_better)
    assert len(asked) == 20
    assert [a[0] for a in asked] == ["alignment", "fidelity"] * 10
    assert all(a[1:] == b[1:] for a, b in zip(asked[::2], asked[1::2], strict=True))  # the same pair, the same sides
    lefts = [a[1] for a in asked[::2]]
    assert {"base", "turbo"} == set(lefts)
    assert 1 < lefts.count("base") < 9
    found = engine.read_verdicts(store, id_)
    assert found.notes == ()
    assert {(v.outcome, v.setting, v.other_setting) for v in found.verdicts} == {("second", "base", "turbo")}
    assert {v.judge for v in found.verdicts} == {"ann"}
    assert sorted({(v.number, v.seed, v.category) for v in found.verdicts})[0] == (1, 0, "color")


def test_pictures_of_both_settings_come_mixed_one_at_a_time(store, sides):
    id_ = engine.begin(store, setup(sides, mode="pass or fail"))
    asked = play(store, id_, lambda q, shown: "pass" if (shown[0], q.criterion) == ("turbo", "alignment") else "fail")
    assert len(asked) == 40
    order = [a[1] for a in asked[::2]]
    assert order.count("base") == 10
    assert sum(a != b for a, b in itertools.pairwise(order)) > 3
    found = engine.read_verdicts(store, id_).verdicts
    passed = {(v.setting, v.criterion) for v in found if v.outcome == "pass"}
    assert passed == {("turbo", "alignment")}
    assert all(v.other_setting == "" for v in found)


def test_order_and_sides_follow_from_seed_and_annotator(tmp_path, sides):
    def asked(**changes):
        path = tmp_path / f"{len(list(tmp_path.glob('*.sqlite')))}.sqlite"
        with engine.open_store(path) as store:
            id_ = engine.begin(store, setup(sides, **changes))
            shown = engine.upcoming(store, id_, count=100)
            return [[(engine.picture_path(store, id_, n)) for n in q.pictures] for q in shown]

    assert asked() == asked()
    assert asked() == asked(name="another")
    assert asked() != asked(seed=1)
    assert asked() != asked(annotator="bob")


def test_nothing_that_the_page_gets_tells_the_setting(store, sides):
    """Numbers of pictures do not go by setting, and prompts are those of both."""
    id_ = engine.begin(store, setup(sides))
    rows = store.execute("SELECT number, setting FROM pictures WHERE evaluation=?", (id_,)).fetchall()
    numbers = {s: sorted(n for n, t in rows if t == s) for s in (0, 1)}
    assert abs(sum(numbers[0]) - sum(numbers[1])) < 100 - 10
    assert numbers[0] not in (list(range(10)), list(range(0, 20, 2)), list(range(10, 20)))
    question = engine.upcoming(store, id_, count=1)[0]
    assert set(question.__dict__) == {"id", "mode", "criterion", "pictures", "prompt"}
    assert set(engine.progress(store, id_).__dict__) & {"settings", "setting"} == set()


def test_an_answer_is_kept_and_can_be_taken_back(store, sides, tmp_path):
    id_ = engine.begin(store, setup(sides))
    first, second = engine.upcoming(store, id_, count=2)
    assert not engine.undo(store, id_)
    engine.answer(store, id_, first.id, "tie")
    with engine.open_store(tmp_path / "verdicts.sqlite") as other:  # as another process would see it
        assert engine.progress(other, id_).done == 1
        assert engine.upcoming(other, id_, count=1)[0].id == second.id
    with pytest.raises(Stale, match="was answered or undone elsewhere"):
        engine.answer(store, id_, first.id, "left")
    assert engine.undo(store, id_)
    assert engine.upcoming(store, id_, count=1)[0].id == first.id
    assert engine.progress(store, id_).done == 0
    assert engine.read_verdicts(store, id_).verdicts == ()
    assert [tuple(r) for r in store.execute("SELECT answer, undone IS NULL FROM actions")] == [("tie", 0)]


def test_what_is_skipped_comes_again_at_the_end_and_then_is_left_out(store, sides):
    id_ = engine.begin(store, setup(sides, criteria=("fidelity",)))
    skipped = engine.upcoming(store, id_, count=1)[0].id
    asked = []
    while found := engine.upcoming(store, id_, count=1):
        asked.append(found[0].id)
        engine.answer(store, id_, found[0].id, "skip" if found[0].id == skipped else "tie")
    assert (asked[0], asked[-1], len(asked)) == (skipped, skipped, 11)
    assert engine.progress(store, id_).complete
    found = engine.read_verdicts(store, id_)
    assert len(found.verdicts) == 9
    assert found.notes == ("ann could not say for 1 questions, which are left out",)
    assert engine.undo(store, id_)
    assert engine.upcoming(store, id_, count=1)[0].id == skipped
    engine.answer(store, id_, skipped, "left")
    assert len(engine.read_verdicts(store, id_).verdicts) == 10


def test_progress_says_how_much_is_left(store, sides):
    id_ = engine.begin(store, setup(sides))
    state = engine.progress(store, id_)
    assert (state.done, state.left, state.num_pictures, state.can_undo, state.seconds_left) == (0, 20, 20, False, None)
    for _ in range(2):
        engine.answer(store, id_, engine.upcoming(store, id_, count=1)[0].id, "tie")
    state = engine.progress(store, id_)
    assert (state.done, state.left, state.can_undo) == (2, 18, True)
    assert state.seconds_left is not None
    assert engine.read_verdicts(store, id_).notes == ("ann has 18 questions of n left to answer",)
    assert [p.id for p in engine.list_evaluations(store)] == [id_]


def test_the_same_name_goes_on_and_other_pictures_are_refused(store, sides):
    id_ = engine.begin(store, setup(sides))
    assert engine.begin(store, setup(sides, seed=5)) == id_
    for other in (setup(sides, mode="pass or fail"), setup(sides, criteria=("fidelity",)), setup(sides[::-1])):
        with pytest.raises(ErnieError, match=r"has other pictures or questions \(20 pictures, side by side\)"):
            engine.begin(store, other)
    assert engine.begin(store, setup(sides, annotator="bob")) != id_


def test_two_annotators_are_compared_on_what_both_answered(store, sides):
    for who, better in (("ann", "turbo"), ("bob", "turbo"), ("cy", "base")):
        id_ = engine.begin(store, setup(sides, annotator=who))
        count = 0
        while (found := engine.upcoming(store, id_, count=1)) and count < 15:
            shown = [engine.picture_path(store, id_, n).parent.name for n in found[0].pictures]
            number = engine.picture_path(store, id_, found[0].pictures[0]).name
            liked = better if int(number[0], 16) % 2 else "base"
            engine.answer(store, id_, found[0].id, "left" if shown[0] == liked else "right")
            count += 1
    lines = engine.agreement(store, "n")
    assert len(lines) == 6
    assert lines[0].startswith("ann and bob, alignment: Cohen's kappa ")
    assert "shared questions" in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "name must be 1 to 200 characters"),
        ({"annotator": "a\nb"}, "annotator must be"),
        ({"mode": "guess"}, "mode must be one of pass or fail, side by side"),
        ({"criteria": ()}, "at least one of alignment, fidelity"),
    ],
    ids=["name", "annotator", "mode", "criteria"],
)
def test_a_setup_that_cannot_be_asked_is_refused(sides, changes, message):
    with pytest.raises(ErnieError, match=message):
        setup(sides, **changes)


def test_side_by_side_needs_two_settings(sides):
    with pytest.raises(ErnieError, match="side by side needs the folders of 2 settings"):
        setup(sides[:1])
    assert setup(sides[:1], mode="pass or fail")


@pytest.mark.parametrize("given", ["pass", "LEFT", "", None, 3, "left; DROP TABLE"], ids=repr)
def test_a_wrong_answer_is_refused(store, sides, given):
    id_ = engine.begin(store, setup(sides))
    question = engine.upcoming(store, id_, count=1)[0].id
    with pytest.raises(ErnieError, match="an answer is one of left, tie, right, skip"):
        engine.answer(store, id_, question, given)
    assert engine.progress(store, id_).done == 0


def test_unknown_ids_are_refused(store, sides):
    id_ = engine.begin(store, setup(sides))
    for call in (
        lambda: engine.progress(store, id_ + 1),
        lambda: engine.upcoming(store, id_ + 1, count=1),
        lambda: engine.undo(store, id_ + 1),
        lambda: engine.answer(store, id_ + 1, 1, "tie"),
        lambda: engine.read_verdicts(store, id_ + 1),
        lambda: engine.picture_path(store, id_, 20),
    ):
        with pytest.raises(Unknown):
            call()


def test_pictures_that_were_not_made_are_noted(tmp_path, store):
    prompts = make_set({"a": 3})
    first = read_setting(paint(tmp_path / "x", prompts, lambda item, k: 1))
    second = read_setting(paint(tmp_path / "y", prompts, lambda item, k: 2 if item.number > 1 else None))
    id_ = engine.begin(store, setup((first, second)))
    notes = engine.read_verdicts(store, id_).notes
    assert notes[0] == "ann: 1 pictures of y were not made when the questions were drawn"
    assert notes[1] == "ann: 1 of 3 pictures of x have no partner"


def test_the_fingerprint_changes_with_every_answer(store, sides):
    seen = [engine.fingerprint(store, "n")]
    id_ = engine.begin(store, setup(sides))
    seen.append(engine.fingerprint(store, "n"))
    engine.answer(store, id_, engine.upcoming(store, id_, count=1)[0].id, "tie")
    seen.append(engine.fingerprint(store, "n"))
    engine.undo(store, id_)
    seen.append(engine.fingerprint(store, "n"))
    assert len(set(seen)) == 4
    assert engine.fingerprint(store, "other") == "0 0 0 0"
    assert engine.fingerprint(store, None) == seen[-1]


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    (tmp_path / "a.sqlite").write_bytes(b"not a database, for sure" * 100)
    with (
        pytest.raises(ErnieError, match=r"verdicts in .* cannot be read or written"),
        engine.open_store(tmp_path / "a.sqlite"),
    ):
        pass
    with sqlite3.connect(tmp_path / "b.sqlite") as other:
        other.execute("CREATE TABLE things(x)")
    with pytest.raises(ErnieError, match="database of something else"), engine.open_store(tmp_path / "b.sqlite"):
        pass


def test_a_killed_process_loses_no_answer(tmp_path, sides):
    """Answer in a process that dies without closing anything; what it was told is kept, is kept."""
    path = tmp_path / "verdicts.sqlite"
    with engine.open_store(path) as store:
        id_ = engine.begin(store, setup(sides))
    code = (
        "import sys, os, json; sys.path.insert(0, sys.argv[1]); import importlib.util as u\n"
        "import pathlib; root = pathlib.Path(sys.argv[1])\n"
        "s = u.spec_from_file_location('ernie_pack', root / '__init__.py', submodule_search_locations=[str(root)])\n"
        "m = u.module_from_spec(s); sys.modules['ernie_pack'] = m\n"
        "from ernie_pack.ernie_core.evaluation import verdict_store as e\n"
        "with e.open_store(sys.argv[2]) as store:\n"
        "    for n in range(7):\n"
        f"        e.answer(store, {id_}, e.upcoming(store, {id_}, count=1)[0].id, 'tie'); print(n, flush=True)\n"
        "    os._exit(9)\n"
    )
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(root), str(path)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    with engine.open_store(path) as store:
        assert engine.progress(store, id_).done == len(done.stdout.split()) == 7
        assert json.loads(store.execute("SELECT settings FROM evaluations").fetchone()[0]) == ["base", "turbo"]
