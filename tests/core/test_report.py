"""The score report: its numbers, and a picture that holds what it should."""

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.report import draw_report, summarise, table_rows
from ernie_pack.ernie_core.scoring.scorer import Scores


def scores(values=(1.0, 5.0, 3.0, 9.0), **more):
    count = len(values)
    base = {
        "labels": tuple(f"{i}.png" for i in range(count)),
        "prompts": tuple("ab"[i % 2] for i in range(count)),
        "categories": ("",) * count,
    }
    return Scores(scorer="s", values=tuple(values), **(base | more))


def test_tables_hold_mean_deviation_median_and_ends():
    assert table_rows(scores(), "prompts") == [("b", 2, 7, 2, 7, 5, 9), ("a", 2, 2, 1, 2, 1, 3)]
    assert [row[0] for row in table_rows(scores(higher_is_better=False), "prompts")] == ["a", "b"]
    assert table_rows(scores(), "categories")[0][0] == "(none)"


def test_the_text_leaves_out_tables_of_one_group():
    text = summarise([scores()])
    assert "s: 4 pictures" in text
    assert text.count("prompt  ") == 2
    assert "category" not in text
    with pytest.raises(ErnieError, match="no scores"):
        summarise([])
    with pytest.raises(ErnieError, match="no scores"):
        draw_report([scores(())], lambda one, place: None)


def test_best_and_worst_are_drawn_and_lost_pictures_left_out():
    asked = []

    def read(one, place):
        asked.append(place)
        return None if place == 3 else np.full((20, 30, 3), 10 * place, np.uint8)

    sheet = draw_report([scores()], read, shown=2)
    assert asked == [3, 1, 2, 0, 2]  # best first, the lost one made up for; then worst first
    assert sheet.dtype == np.uint8
    small = draw_report([scores()], read, shown=0)
    assert small.shape[0] < sheet.shape[0]
    two = draw_report([scores(), scores((2.0, 4.0))], read, shown=0)
    assert two.shape[0] > small.shape[0]
