"""Trees of categories: both file forms, level order, and what a wrong file says."""

import json
import time

import numpy as np
import pytest
from ernie_pack.ernie_core.curation.taxonomy import STARTER, load_taxonomy, parse_taxonomy
from ernie_pack.ernie_core.errors import ErnieError

TEXT = """\
# mine
animals
\tbirds
\t\towl
\t\tcrane | a crane, the bird   # not the machine
\tfish
things
    crane
"""
PATHS = ("animals", "things", "animals/birds", "animals/fish", "things/crane", "animals/birds/owl")


def test_indented_lines_become_a_tree_in_level_order():
    tree = parse_taxonomy(TEXT)
    assert tree.paths == (*PATHS, "animals/birds/crane")
    assert tree.texts[-1] == "a crane, the bird"
    assert tree.texts[4] == "crane"
    assert [tree.paths[i] for i in tree.leaves] == ["animals/fish", "things/crane", *tree.paths[-2:]]


def test_json_gives_the_same_tree():
    nested = {"animals": {"birds": ["owl", "crane | a crane, the bird"], "fish": None}, "things": {"crane": {}}}
    tree, lines = parse_taxonomy(json.dumps(nested), is_json=True), parse_taxonomy(TEXT)
    assert (tree.paths, tree.texts, tree.key) == (lines.paths, lines.texts, lines.key)


def test_every_place_is_consistent_with_its_path():
    tree = load_taxonomy(STARTER)
    for place, path in enumerate(tree.paths):
        assert tree.place(path) == place
        assert "/".join(tree.names[i] for i in tree.way(place)) == path
        assert [tree.parents[child] for child in tree.children(place)] == [place] * len(tree.children(place))
    firsts = [int(tree.parents[i]) for i in tree.family_starts]
    assert firsts == [-1, *(i for i in range(len(tree)) if tree.children(i))]
    assert sum(end - first for first, end in tree.levels) == len(tree)
    assert all(len(tree.children(place)) == 0 for place in tree.leaves)


def test_the_starter_tree_has_a_few_hundred_leaves_and_every_text_is_its_own():
    tree = load_taxonomy(STARTER)
    assert 300 <= len(tree.leaves) <= 1000
    assert len(tree.levels) == 3
    assert all(len(tree.children(i)) <= 40 for i in range(-1, len(tree)))


def test_ten_thousand_leaves_are_read_in_a_second():
    lines = []
    for a in range(20):
        lines.append(f"a{a}")
        for b in range(25):
            lines += [f" b{b}", *(f"  leaf {a} {b} {c}" for c in range(20))]
    start = time.perf_counter()
    tree = parse_taxonomy("\n".join(lines))
    assert len(tree.leaves) == 10_000
    assert np.array_equal(np.unique(tree.families), np.arange(len(tree.family_starts)))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no categories"),
        ("# nothing\n", "holds no categories"),
        ("a\n    b\n  c\n", "line 3: 'c' is indented by 2 columns"),
        ("a\n  b\n  b\n", "line 3: 'b' stands twice under a"),
        ("a\na\n", "line 2: 'a' stands twice under the first level"),
        ("a\n  shirt/top\n", "line 2: a name must not be empty or hold \"/\", got 'shirt/top'"),
        ("| text", "must not be empty"),
    ],
    ids=["empty", "comments only", "indentation", "twice", "twice above", "slash", "no name"],
)
def test_a_wrong_line_is_named(text, message):
    with pytest.raises(ErnieError, match=message):
        parse_taxonomy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "objects, lists of names"),
        ('{"a": {"b": 3}}', "objects, lists of names"),
    ],
    ids=["cut", "number", "number below"],
)
def test_wrong_json_is_named(text, message):
    with pytest.raises(ErnieError, match=message):
        parse_taxonomy(text, is_json=True)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(ErnieError, match=r"none\.txt cannot be read"):
        load_taxonomy(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ErnieError, match="UTF-8"):
        load_taxonomy(tmp_path / "a.txt")
