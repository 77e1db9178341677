"""Who teaches what: weights add up to 1 everywhere, hand over in straight lines, and read as they are written."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training import teacher_chart
from ernie_pack.ernie_core.training import teachers as t

LAYOUT, TEXT, ART = (t.Teacher(name=name, lora=f"{name}.safetensors") for name in ("layout", "text", "art"))
WHO = (LAYOUT, TEXT, ART)
LEVELS = [i / 200 for i in range(201)]


def random_table(seed: int, blend: float) -> t.TeacherTable:
    """A table with rules of every kind that `draw` allows; those that would never act are left out."""
    draw = random.Random(seed)
    rules: list[t.Rule] = []
    for _ in range(12):
        low, high = sorted(draw.sample([0, 0.1, 0.25, 0.4, 0.55, 0.7, 1], 2))
        parts = [draw.randint(1, 8) for _ in range(draw.randint(1, 3))]
        names = draw.sample(["base", "layout", "text", "art"], len(parts))
        rule = t.Rule(
            tags=tuple(draw.sample(["poster", "photo"], draw.randint(0, 2))),
            low=low,
            high=high,
            terms=tuple(draw.sample(t.TERMS, draw.randint(1, 2))),
            weights={name: part / sum(parts) for name, part in zip(names, parts, strict=True)},
        )
        try:
            t.TeacherTable(teachers=WHO, rules=(*rules, rule))
        except ErnieError:
            continue
        rules.append(rule)
    return t.TeacherTable(teachers=WHO, rules=tuple(rules), blend=blend)


def slow_weights(table: t.TeacherTable, tag: str, sigma: float, term: t.Term, parts: int = 4000) -> dict[str, float]:
    """The mean of the first matching rule's weights over the window, by many samples."""
    total = dict.fromkeys(["base", *(teacher.name for teacher in WHO)], 0.0)
    for i in range(parts):
        level = min(1.0, max(0.0, sigma + table.blend * ((i + 0.5) / parts - 0.5)))
        matching = [r for r in table.rules if (not r.tags or tag in r.tags) and term in r.terms]
        matching = [r for r in matching if r.low < level <= r.high or (level == 0 and r.low == 0)]
        for name, weight in (matching[0].weights if matching else {"base": 1.0}).items():
            total[name] += weight / parts
    return total


@pytest.mark.parametrize("blend", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_weights_are_positive_and_add_up_to_one_at_every_level_and_edge(seed, blend):
    table = random_table(seed, blend)
    for tag in ("poster", "photo", "", "never named"):
        for term in t.TERMS:
            for sigma in {*LEVELS, *table.edges(tag=tag, term=term)}:
                weights = table.weights(tag=tag, sigma=sigma, term=term)
                assert all(weight > 0 for weight in weights.values())
                assert abs(math.fsum(weights.values()) - 1) < 1e-12
                assert set(weights) <= set(table.used())


@pytest.mark.parametrize("blend", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_a_slow_average_of_the_first_rule_that_matches(seed, blend):
    table = random_table(seed, blend)
    for tag in ("poster", ""):
        for sigma in (0.0, 0.07, 0.25, 0.41, 0.8, 1.0):
            for term in t.TERMS:
                slow = slow_weights(table, tag, sigma, term)
                fast = table.weights(tag=tag, sigma=sigma, term=term)
                assert {n: fast.get(n, 0.0) for n in slow} == pytest.approx(slow, abs=2e-3)


def test_neighbours_hand_over_in_a_straight_line_and_the_ends_have_none():
    table = t.TeacherTable(teachers=WHO, rules=t.by_sigma(("layout", "art"), [0.6]), blend=0.2)
    for sigma, layout in ((1.0, 1), (0.7, 1), (0.65, 0.75), (0.6, 0.5), (0.55, 0.25), (0.5, 0), (0.0, 0)):
        weights = table.weights(tag="", sigma=sigma, term="DM")
        assert weights.get("layout", 0) == pytest.approx(layout)
    assert table.weights(tag="", sigma=1.0, term="DM") == {"layout": 1.0}


def test_an_empty_table_asks_the_base():
    table = t.TeacherTable()
    assert table.weights(tag="x", sigma=0.5, term="CA") == {t.BASE: 1.0}
    assert table.used() == (t.BASE,)
    assert table.teacher(t.BASE) == t.Teacher(name=t.BASE)
    assert t.read_table("") == t.read_table("# nothing\n\n") == table


def test_the_first_rule_that_matches_wins_and_a_band_holds_its_upper_edge():
    rules = (*t.by_tag({"poster": "text"}), *t.by_sigma(("layout", "art"), [0.5]))
    table = t.TeacherTable(teachers=WHO, rules=rules)
    assert table.weights(tag="poster", sigma=0.9, term="CA") == {"text": 1.0}
    assert table.weights(tag="photo", sigma=0.51, term="CA") == {"layout": 1.0}
    assert table.weights(tag="photo", sigma=0.5, term="CA") == {"art": 1.0}
    assert table.weights(tag="photo", sigma=0.0, term="DM") == {"art": 1.0}


def test_terms_may_have_teachers_of_their_own():
    table = t.TeacherTable(teachers=WHO, rules=t.by_objective(ca="text", dm="art", tags=("poster",)))
    assert table.weights(tag="poster", sigma=0.3, term="CA") == {"text": 1.0}
    assert table.weights(tag="poster", sigma=0.3, term="DM") == {"art": 1.0}
    assert table.weights(tag="", sigma=0.3, term="DM") == {"base": 1.0}
    assert table.used() == ("base", "text", "art")


def test_the_article_s_bands_are_its_steps_on_the_official_grid():
    from ernie_pack.ernie_core.sampling.schedule import make_sigmas

    grid = make_sigmas(50).tolist()
    first, second, third = t.article_bands("a", "b", "c")
    assert (first.high, third.low) == (1.0, 0.0)
    assert (first.low, second.low) == (pytest.approx(grid[20], abs=5e-4), pytest.approx(grid[35], abs=5e-4))
    plain = t.article_bands("a", "b", "c", shift=1)
    assert [rule.low for rule in plain] == [0.6, 0.3, 0.0]


@pytest.mark.parametrize("seed", range(20))
def test_a_table_reads_as_it_is_written(seed):
    table = random_table(seed, 0.125 if seed % 2 else 0.0)
    assert t.read_table(t.write_table(table)) == table


def test_a_text_as_people_write_it():
    table = t.read_table(
        """
        # who
        teacher base | cfg 3.5
        teacher big hearts|my hearts v2.safetensors |strength 0.8| cfg 5
        teacher plain | x.safetensors

        heart, poster | 1 - .4 | ca | big hearts .75 , plain .25
        heart | * | * | big hearts
        * | 0.3 - 0 | DM | plain
        blend 0.05
        """
    )
    assert table.blend == 0.05
    assert table.teacher("base") == t.Teacher(name="base", cfg=3.5)
    hearts = t.Teacher(name="big hearts", lora="my hearts v2.safetensors", strength=0.8, cfg=5)
    assert table.teacher("big hearts") == hearts
    assert table.rules[0] == t.Rule(
        tags=("heart", "poster"), high=1, low=0.4, terms=("CA",), weights={"big hearts": 0.75, "plain": 0.25}
    )
    assert table.weights(tag="heart", sigma=0.2, term="CA") == {"big hearts": 1.0}
    assert table.tags == ("heart", "poster")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", r"line 1 .*'nonsense'.*expected one of"),
        ("\n* | 1 - 0 | CA", r"line 2 .*expected one of"),
        ("* | 1 - 0 | CA | nobody", r"asks the teacher 'nobody', but the table has only base"),
        ("* | 0 - 1 | CA | base", r"line 1 .*run down from high to low"),
        ("* | 1 | CA | base", r"must be HIGH - LOW, for instance 1 - 0.5, or \*; got '1'"),
        ("* | 1 - nan | CA | base", r"run down from high to low"),
        ("* | 1 - x | CA | base", r"a noise level must be a number, got 'x'"),
        ("* | 1 - 0 | XY | base", r"the terms must be CA or DM, or \* for both; got 'XY'"),
        ("* | 1 - 0 | CA | base 0.5", r"add up to 1; got {'base': 0.5}, which add up to 0.5"),
        ("* | 1 - 0 | CA | base -1, base 2", r"each teacher must be named once"),
        ("* | 1 - 0 | CA | base nan", r"must be numbers of 0 or more"),
        ("* | 1 - 0 | CA | ", r"each teacher must be named once"),
        ("* | 1 - 0 | CA, DM | base\nx | 1 - 0 | CA | base", r"rule 2 \(x \| 1 - 0 \| CA \| base\) never acts"),
        ("teacher a | f\nteacher a | g", r"two teachers are called 'a'"),
        ("teacher | f", r"a teacher's name must be one or more words"),
        ("teacher v 2 | f", r"must not end in a number.*'v_2'"),
        ("teacher a | f | strong 2", r"expected strength or cfg with a number, once each, got 'strong 2'"),
        ("teacher a | f | cfg -1", r"cfg of teacher 'a' must be 0 or more"),
        ("teacher a | strength 0.5", r"has the strength 0.5 but no LoRA"),
        ("blend 2", r"blend must lie between 0 \(a hard edge\) and 1, got 2"),
        ("blend wide", r"the width of the blend must be a number, got 'wide'"),
        ("blend 0.1\nblend 0.2", r"line 2 .*blend is given twice"),
        ("teacher x | 1 - 0 | CA | base", r"expected strength or cfg"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(text, message):
    with pytest.raises(ErnieError, match=message):
        t.read_table(text)


@pytest.mark.parametrize("sigma", [-0.1, 1.1, float("nan")])
def test_a_level_that_does_not_exist_is_refused(sigma):
    with pytest.raises(ErnieError, match="sigma must lie between 0 and 1"):
        t.TeacherTable().weights(tag="", sigma=sigma, term="DM")


def test_rows_for_by_sigma_must_fit():
    with pytest.raises(ErnieError, match="2 teachers need 1 edges between them, got 2"):
        t.by_sigma(("a", "b"), [0.5, 0.2])


def test_the_picture_shows_who_teaches_where():
    table = t.TeacherTable(
        teachers=WHO,
        rules=(*t.by_objective(ca="text", dm="art", tags=("poster",)), *t.by_sigma(("layout", "base"), [0.5])),
    )
    picture = teacher_chart.draw_table(table)
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (760, 3)
    bars = picture[[30 + 30 * row + 10 for row in range(3)]]  # poster CA, poster DM, other prompts
    colours = {name: teacher_chart._COLOURS[i] for i, name in enumerate(table.used())}
    assert [tuple(row[300]) for row in bars] == [colours["text"], colours["art"], colours["layout"]]
    assert tuple(bars[2][700]) == colours["base"]


def test_the_picture_holds_more_teachers_than_it_has_colours():
    many = [t.Teacher(name=f"t{i}x", lora="f") for i in range(14)]
    table = t.TeacherTable(
        teachers=tuple(many), rules=t.by_sigma([m.name for m in many], [1 - (i + 1) / 14 for i in range(13)])
    )
    assert teacher_chart.draw_table(table).shape[0] > 14 * 20


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("hearts.safetensors", "hearts"),
        ("styles/ink, wash #2.safetensors", "ink_ wash _2"),
        ("a\\b.safetensors", "b"),
        ("style 2.safetensors", "style_2_lora"),
        ("7.safetensors", "7_lora"),
        (".safetensors", "lora"),
    ],
)
def test_a_file_gives_its_teacher_a_name_that_a_table_can_hold(file, name):
    assert t.name_of(file) == name
    table = t.make_table(f"* | * | * | {name}", [file], "as written")
    assert t.read_table(t.write_table(table)) == table
    assert table.used() == (name,)


def test_presets_come_behind_the_text_and_read_back():
    files = ["a.safetensors", "b.safetensors", "c.safetensors"]
    by_tag = t.make_table("", files, "by tag")
    assert by_tag.weights(tag="b", sigma=0.3, term="CA") == {"b": 1.0}
    assert by_tag.weights(tag="", sigma=0.3, term="CA") == {"base": 1.0}
    levels = t.make_table("", files, "by noise level", 0.1)
    assert [levels.weights(tag="", sigma=s, term="DM") for s in (0.9, 0.5, 0.1)] == [{"a": 1}, {"b": 1}, {"c": 1}]
    assert levels.blend == 0.1
    terms = t.make_table("poster | * | * | base", files[:2], "by term")
    assert terms.weights(tag="poster", sigma=0.3, term="CA") == {"base": 1.0}
    assert [terms.weights(tag="", sigma=0.3, term=term) for term in t.TERMS] == [{"a": 1}, {"b": 1}]
    article = t.make_table("", files, "the article's bands")
    assert article.rules == t.article_bands("a", "b", "c")
    for table in (by_tag, levels, terms, article):
        assert t.read_table(t.write_table(table)) == table


@pytest.mark.parametrize(
    ("text", "files", "preset", "blend", "message"),
    [
        ("", ["a.s"], "as written", 0, r"no rule asks a.s: choose a preset, write a line such as '\* \| 1 - 0"),
        ("", [], "by tag", 0, r"'by tag' is for 1 or more LoRAs, got 0: none"),
        ("", ["a", "b", "c"], "by term", 0, r"'by term' is for 2 LoRAs, got 3: a, b, c"),
        ("", ["a"], "by noise level", 0, r"is for 2 or more LoRAs, got 1"),
        ("", ["a"], "by hand", 0, r"the preset must be one of as written, by tag, .*; got 'by hand'"),
        ("", ["a", "b"], "the article's bands", 0, r"is for 3 LoRAs, got 2"),
        ("", ["a", "x/a.safetensors"], "by tag", 0, r"two teachers are called 'a'"),
        ("* | * | * | a\nblend 0.2", ["a"], "as written", 0.1, r"blend is 0.1 and the text says 0.2"),
        ("* | * | * | base", ["a"], "by tag", 0, r"rule 2 \(a \| 1 - 0 \| CA, DM \| a\) never acts"),
    ],
)
def test_a_table_that_leaves_something_out_says_so(text, files, preset, blend, message):
    with pytest.raises(ErnieError, match=message):
        t.make_table(text, files, preset, blend)


def test_files_are_found_by_name_and_absolute_paths_stay(tmp_path):
    here = tmp_path / "mine.safetensors"
    here.write_bytes(b"x")
    table = t.read_table(f"teacher a | {here}\nteacher b | b.safetensors\nteacher base | cfg 3")
    found = t.with_files(table, lambda name: tmp_path / "loras" / name)
    assert [teacher.lora for teacher in found.teachers] == [str(here), str(tmp_path / "loras" / "b.safetensors"), ""]
