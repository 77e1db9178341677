"""The spread over categories against formulas written out, and known cases."""

import math

import numpy as np
import pytest
from ernie_pack.ernie_core.curation.long_tail import count_categories
from ernie_pack.ernie_core.curation.taxonomy import parse_taxonomy
from ernie_pack.ernie_core.errors import ErnieError


def rows(**counts):
    return [{"category": name} for name, n in counts.items() for _ in range(n)]


def test_equal_categories_are_as_many_as_they_are():
    found = count_categories(rows(a=5, b=5, c=5, d=5))
    assert math.isclose(found.effective, 4)
    assert found.gini == 0
    assert found.head == 0.25


def test_numbers_are_those_of_the_definitions():
    counts = [1, 2, 3, 50, 7, 9, 20, 4, 4, 11, 1]
    found = count_categories(rows(**{f"c{i}": n for i, n in enumerate(counts)}), few=4)
    shares = np.array(counts) / sum(counts)
    assert math.isclose(found.effective, np.prod(shares**-shares))
    pairs = np.abs(np.subtract.outer(counts, counts)).mean()  # Gini is half of the relative mean difference
    assert math.isclose(found.gini, pairs / (2 * np.mean(counts)))
    assert math.isclose(found.head, (50 + 20) / sum(counts))  # a tenth of 11, rounded up
    assert found.tail == (4, 7 / sum(counts))
    assert list(found.counts.values()) == sorted(counts, reverse=True)


def test_rows_without_a_category_and_dropped_ones_do_not_count():
    found = count_categories([*rows(a=2), {"category": ""}, {}, {"category": "a", "kept": False}])
    assert (found.counts, found.without) == ({"a": 2}, 2)
    assert "2 pictures in 1 categories, 2 without one" in found.describe()


def test_unused_leaves_are_named():
    found = count_categories(rows(**{"a/b": 1}), parse_taxonomy("a\n b\n c\nd\n"))
    assert found.unused == ("d", "a/c")
    assert "2 of 3 leaves are unused: d, a/c" in found.describe()


def test_it_is_drawn_and_nothing_to_draw_is_said():
    many = count_categories(rows(**{f"c{i}": 100 // (i + 1) + 1 for i in range(40)}))
    few = count_categories(rows(a=1))
    assert many.draw().shape[0] > few.draw().shape[0] > 100
    nothing = count_categories([{}])
    assert nothing.describe() == "no picture has a category (1 rows)"
    with pytest.raises(ErnieError, match="Curate Categories"):
        nothing.draw()
    with pytest.raises(ErnieError, match="few must be 1 or more, got 0"):
        count_categories([], few=0)
