"""Verdicts and their rates: who meets whom, what a scorer says, intervals that know of prompts."""

import math

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.evaluation import rates, verdicts
from ernie_pack.ernie_core.evaluation.prompt_sets import read_setting
from ernie_pack.ernie_core.scoring.metrics import wilson
from painted_settings import Red, RedOfPrompt, make_set, paint


@pytest.fixture
def sides(tmp_path):
    prompts = make_set({"color": 2, "counting": 1})
    first = paint(tmp_path / "base", prompts, lambda item, k: 100 + 10 * item.number + k, seeds=2)
    second = paint(tmp_path / "turbo", prompts, lambda item, k: 200 - 30 * item.number + k, seeds=2, cfg=4.0)
    return read_setting(first), read_setting(second)


def test_pictures_meet_by_prompt_and_seed(sides):
    pairs, notes = verdicts.match(*sides)
    assert notes == []
    assert [(p.first.number, p.first.seed) for p in pairs] == [(p.second.number, p.second.seed) for p in pairs]
    assert [p.first.file.parent.name for p in pairs] == ["base"] * 6
    assert [p.second.file.parent.name for p in pairs] == ["turbo"] * 6


def test_pictures_without_a_partner_are_counted(tmp_path):
    prompts = make_set({"a": 3})
    first = read_setting(paint(tmp_path / "x", prompts, lambda item, k: 1, seeds=2))
    second = read_setting(paint(tmp_path / "y", prompts, lambda item, k: 2 if item.number > 1 else None))
    pairs, notes = verdicts.match(first, second)
    assert len(pairs) == 2
    assert notes == ["4 of 6 pictures of x have no partner"]
    alone = read_setting(paint(tmp_path / "z", make_set({"a": 9}), lambda item, k: 2 if item.number == 9 else None))
    with pytest.raises(ErnieError, match="no picture of x has prompt and seed of one of z"):
        verdicts.match(first, alone)


def test_a_scorer_passes_pictures_and_chooses_between_two(sides):
    found = verdicts.judge_by_scorer(sides, Red(), threshold=131, margin=9)
    told = [(v.setting, v.number, v.seed, v.outcome, v.value) for v in found.verdicts if not v.other_setting]
    assert told[:6] == [
        ("base", 1, 0, "fail", 110.0),
        ("base", 1, 1, "fail", 111.0),
        ("base", 2, 1000, "fail", 120.0),
        ("base", 2, 1001, "fail", 121.0),
        ("base", 3, 2000, "fail", 130.0),
        ("base", 3, 2001, "pass", 131.0),
    ]
    assert {t[0] for t in told[6:]} == {"turbo"}
    assert {v.criterion for v in found.verdicts} == {"fidelity"}
    pairs = [v for v in found.verdicts if v.other_setting]
    assert [(v.number, v.outcome, v.value, v.other_value) for v in pairs] == [
        (1, "second", 110.0, 170.0),
        (1, "second", 111.0, 171.0),
        (2, "second", 120.0, 140.0),
        (2, "second", 121.0, 141.0),
        (3, "first", 130.0, 110.0),
        (3, "first", 131.0, 111.0),
    ]
    same = verdicts.judge_by_scorer(sides, Red(), threshold=0, margin=20).verdicts
    assert [v.outcome for v in same if v.other_setting] == ["second", "second", "same", "same", "same", "same"]


def test_a_scorer_where_less_is_better_is_turned_round(sides):
    low = Red()
    low.higher_is_better = False
    found = verdicts.judge_by_scorer(sides, low, threshold=130).verdicts
    assert [v.outcome for v in found if v.setting == "base" and not v.other_setting] == ["pass"] * 5 + ["fail"]
    assert [v.outcome for v in found if v.other_setting] == ["first"] * 4 + ["second"] * 2


def test_a_scorer_that_reads_prompts_judges_alignment_with_the_right_prompt(sides):
    scorer = RedOfPrompt()
    found = verdicts.judge_by_scorer(sides, scorer, threshold=1)
    assert {v.criterion for v in found.verdicts} == {"alignment"}
    assert scorer.seen[:3] == [("color 0\nand more", 110.0), ("color 0\nand more", 111.0), ("color 1\nand more", 120.0)]
    assert (
        verdicts.judge_by_scorer(sides, scorer, criterion="fidelity", threshold=1).verdicts[0].criterion == "fidelity"
    )
    with pytest.raises(ErnieError, match="red does not read the prompt and cannot judge alignment"):
        verdicts.judge_by_scorer(sides, Red(), criterion="alignment", threshold=1)


def test_unreadable_and_missing_pictures_are_named(sides, tmp_path):
    first, second = sides
    first.pictures[1].file.write_bytes(b"no")
    second.pictures[0].file.unlink()
    found = verdicts.judge_by_scorer((first, read_setting(second.folder)), Red(), threshold=1)
    assert any(first.pictures[1].file.name in note for note in found.notes)
    assert "1 pictures of turbo are not made yet" in found.notes
    assert "1 of 6 pictures of base have no partner" in found.notes
    assert sum(not v.other_setting for v in found.verdicts) == 10
    assert sum(bool(v.other_setting) for v in found.verdicts) == 4


def test_wrong_settings_and_values_are_refused(sides, tmp_path):
    first, second = sides
    with pytest.raises(ErnieError, match="the same folder is given twice"):
        verdicts.judge_by_scorer((first, first), Red(), threshold=1)
    other = read_setting(paint(tmp_path / "o", make_set({"a": 1}, name="other"), lambda item, k: 1))
    with pytest.raises(ErnieError, match="different prompt sets \\(set and other\\)"):
        verdicts.judge_by_scorer((first, other), Red(), threshold=1)
    for bad in ({"threshold": math.nan}, {"threshold": 1, "margin": -1}, {"threshold": 1, "margin": math.inf}):
        with pytest.raises(ErnieError, match="threshold must be a number and margin 0 or more"):
            verdicts.judge_by_scorer(sides, Red(), **bad)
    for picture in (*first.pictures, *second.pictures):
        picture.file.write_bytes(b"no")
    with pytest.raises(ErnieError, match="none of 12 pictures could be read"):
        verdicts.judge_by_scorer(sides, Red(), threshold=1)


def test_folders_of_one_name_are_told_apart(tmp_path):
    prompts = make_set({"a": 1})
    both = [read_setting(paint(tmp_path / x / "run", prompts, lambda item, k: 1)) for x in "xy"]
    assert [s.name for s in verdicts.name_settings(both)] == ["x/run", "y/run"]


def test_a_verdict_of_two_cannot_be_one_of_one():
    told = {"judge": "j", "number": 1, "prompt": "p", "category": "c", "seed": 0, "setting": "a", "file": "f"}
    with pytest.raises(ErnieError, match="one picture is pass, fail"):
        verdicts.Verdict(criterion="fidelity", outcome="first", **told)
    with pytest.raises(ErnieError, match="two pictures is first, same, second"):
        verdicts.Verdict(criterion="fidelity", outcome="pass", other_setting="b", **told)
    with pytest.raises(ErnieError, match="for alignment or fidelity"):
        verdicts.Verdict(criterion="beauty", outcome="pass", **told)


# --- rates --------------------------------------------------------------------------------------------------------


def one(outcome, *, prompt="p", category="c", setting="a", number=1, value=None, judge="j"):
    return verdicts.Verdict(
        judge=judge,
        criterion="alignment",
        outcome=outcome,
        number=number,
        prompt=prompt,
        category=category,
        seed=0,
        setting=setting,
        file="f",
        value=value,
    )


def two(outcome, *, prompt="p", category="c", number=1):
    return verdicts.Verdict(
        **{**one("pass", prompt=prompt, category=category, number=number).__dict__, "outcome": outcome}
        | {"other_setting": "b", "other_file": "g"}
    )


def test_one_verdict_per_prompt_is_wilsons_interval_as_it_stands():
    told = [one("pass" if i < 13 else "fail", prompt=str(i), number=i) for i in range(20)]
    everything, named = rates.pass_rates(told)
    assert (everything.category, named.category) == ("", "c")
    rate = everything.rates["a"]
    assert rate.interval == wilson(13, 20)
    assert (rate.count, rate.total, rate.prompts, rate.effective) == (13, 20, 20, 20)


def test_pictures_that_always_agree_count_as_their_prompts():
    told = [one("pass" if i < 13 else "fail", prompt=str(i), number=i) for i in range(20) for _ in range(4)]
    rate = rates.pass_rates(told)[0].rates["a"]
    assert rate.interval.low == pytest.approx(wilson(13, 20).low)
    assert rate.effective == pytest.approx(20)


def test_pictures_that_have_nothing_to_do_with_each_other_count_each():
    rng = np.random.default_rng(0)
    told = [
        one("pass" if rng.random() < 0.5 else "fail", prompt=str(i), number=i) for i in range(400) for _ in range(4)
    ]
    rate = rates.pass_rates(told)[0].rates["a"]
    assert rate.effective == pytest.approx(1600, rel=0.12)


def test_what_cannot_tell_is_taken_with_care():
    assert rates.intraclass([[(4, 4), (4, 4)]]) == 1.0
    assert rates.intraclass([[(1, 1), (0, 1)]]) == 1.0
    assert rates.intraclass([[(2, 4), (2, 4), (2, 4)]]) == 0.0
    told = [one("pass", prompt=str(i)) for i in range(3) for _ in range(5)]
    rate = rates.pass_rates(told)[0].rates["a"]
    assert rate.interval.high == 1.0
    assert rate.interval.low == pytest.approx(wilson(3, 3).low)


def test_the_intraclass_correlation_is_that_of_the_textbook():
    """Balanced, one group: (MSB - MSW) / (MSB + (m - 1) MSW) of a one-way table."""
    rng = np.random.default_rng(1)
    table = (rng.random((12, 5)) < rng.random((12, 1))).astype(float)
    between = 5 * ((table.mean(1) - table.mean()) ** 2).sum() / 11
    within = ((table - table.mean(1, keepdims=True)) ** 2).sum() / (12 * 4)
    expected = (between - within) / (between + 4 * within)
    found = rates.intraclass([[(int(row.sum()), 5) for row in table]])
    assert found == pytest.approx(expected)


def test_intervals_hold_what_they_promise():
    """Prompts of 4 pictures whose chances differ, 16 categories: the true rate lies inside about 95 times of 100."""
    rng = np.random.default_rng(2)
    inside = {"effective": 0, "naive": 0}
    trials = 300
    for _ in range(trials):
        groups = [[(int(rng.binomial(4, rng.beta(1.5, 1.5))), 4) for _ in range(6)] for _ in range(16)]
        interval, _ = rates.clustered(groups[0], rates.intraclass(groups))
        naive = wilson(sum(s for s, _ in groups[0]), 24)
        inside["effective"] += interval.low <= 0.5 <= interval.high
        inside["naive"] += naive.low <= 0.5 <= naive.high
    assert inside["effective"] / trials >= 0.92
    assert inside["naive"] / trials < 0.92


def test_categories_come_in_the_order_of_the_set_and_all_first():
    told = [
        one("pass", prompt="y", category="late", number=9),
        one("fail", prompt="x", category="early", number=2),
        one("pass", prompt="x", category="early", number=2),
    ]
    found = rates.pass_rates(told)
    assert [(p.category, p.rates["a"].count, p.rates["a"].total, p.rates["a"].ids) for p in found] == [
        ("", 2, 3, (0, 1, 2)),
        ("early", 1, 2, (1, 2)),
        ("late", 1, 1, (0,)),
    ]
    assert [p.category for p in rates.pass_rates([one("pass", category="")])] == [""]


def test_the_difference_of_two_settings_is_over_shared_prompts():
    told = [one("fail", prompt=str(i), setting="a", value=1.0) for i in range(12)]
    told += [one("pass" if i < 9 else "fail", prompt=str(i), setting="b", value=2.0 + i) for i in range(12)]
    told += [one("pass", prompt="only b", setting="b", value=2.0)]
    found = rates.pass_rates(told)[0]
    assert found.difference.value == pytest.approx(0.75)
    assert 0.3 < found.difference.low < 0.75 < found.difference.high <= 1
    assert found.means["a"].value == 1.0
    assert math.isnan(found.means["a"].low)
    assert found.means["b"].low < found.means["b"].value < found.means["b"].high
    assert rates.pass_rates(told[:12])[0].difference is None


def test_wins_losses_and_no_difference_add_up():
    told = [two("first", prompt=str(i), number=i) for i in range(8)]
    told += [two("same", prompt=str(i), number=i) for i in range(8)]
    told += [two("second", prompt="x", category="d", number=9)] * 2
    everything, c, d = rates.win_rates(told)
    assert {o: r.count for o, r in everything.rates.items()} == {"first": 8, "same": 8, "second": 2}
    assert sum(r.interval.value for r in everything.rates.values()) == pytest.approx(1)
    assert everything.settings == ("a", "b")
    assert everything.p_value == pytest.approx(2 * (1 + 9) / 2**9)  # 8 prompts against 1
    assert {o: r.count for o, r in d.rates.items()} == {"first": 0, "same": 0, "second": 2}
    assert c.p_value == pytest.approx(2 / 2**8)


def test_judges_are_kept_apart():
    found = rates.pass_rates([one("pass", judge="x"), one("fail", judge="y")])
    assert [(p.judge, p.category, p.rates["a"].count) for p in found] == [
        ("x", "", 1),
        ("x", "c", 1),
        ("y", "", 0),
        ("y", "c", 0),
    ]
