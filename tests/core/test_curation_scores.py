"""Scores in a manifest: the stage by any scorer, and the table by category against numbers written out."""

import math
import pickle
import statistics

import numpy as np
import pytest
from ernie_pack.ernie_core.curation.engines import run_stage
from ernie_pack.ernie_core.curation.manifest import read_rows, write_rows
from ernie_pack.ernie_core.curation.scores import ScorePictures, ScorerFile, tabulate
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.ernie_core.scoring.loading import load_scorer
from PIL import Image
from tiny_scorers import write_clip_folder


@pytest.fixture
def manifest(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        blur = Image.fromarray(rng.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)).resize((64 + 9 * i, 64))
        blur.save(tmp_path / f"{i}.png")
        rows.append(
            {
                "id": str(i),
                "source": str(tmp_path / f"{i}.png"),
                "caption": "a fox" if i else "",
                "category": "ab"[i % 2],
            }
        )
    rows.append({"id": "gone", "source": str(tmp_path / "gone.png"), "caption": "x"})
    write_rows(tmp_path / "in.jsonl", rows)
    return tmp_path / "in.jsonl"


def test_scores_are_those_of_the_scorer_and_a_picture_that_is_gone_is_named(manifest, tmp_path):
    stage = pickle.loads(pickle.dumps(ScorePictures(ScorerFile("built-in sharpness"), batch_size=2)))
    assert run_stage(stage, manifest, tmp_path / "out.jsonl").failed == 1
    *rows, gone = read_rows(tmp_path / "out.jsonl")
    expected = BuiltinScorer(measure="sharpness").score([row["source"] for row in rows])
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert {row["score_of"] for row in rows} == {"built-in sharpness"}
    assert "score" not in gone
    assert gone["failed"].keys() == {"scores"}


def test_several_scorers_have_a_column_each_and_do_not_undo_each_other(manifest, tmp_path):
    run_stage(ScorePictures(BuiltinScorer()), manifest, tmp_path / "a.jsonl")
    second = ScorePictures(BuiltinScorer(measure="contrast"), column="contrast")
    run_stage(second, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    row = next(read_rows(tmp_path / "b.jsonl"))
    assert (row["score_of"], row["contrast_of"]) == ("built-in combined", "built-in contrast")
    assert set(row["made_by"]) == {"scores", "scores.contrast"}
    assert (
        run_stage(ScorePictures(BuiltinScorer()), tmp_path / "b.jsonl", tmp_path / "c.jsonl").made == 1
    )  # the failed one


def test_a_scorer_of_a_file_reads_the_captions_in_any_process(manifest, tmp_path):
    write_clip_folder(tmp_path / "clip")
    stage = pickle.loads(pickle.dumps(ScorePictures(ScorerFile(str(tmp_path / "clip")), batch_size=2)))
    run_stage(stage, manifest, tmp_path / "out.jsonl")
    first, *rows, _ = read_rows(tmp_path / "out.jsonl")
    assert first["failed"] == {"scores": "CLIP score reads the caption, and there is none."}
    expected = load_scorer(tmp_path / "clip").score([row["source"] for row in rows], "a fox")
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=2e-4)


def test_a_wrong_name_is_told(tmp_path):
    with pytest.raises(ErnieError, match="built-in combined"):
        ScorerFile("built-in beauty")
    with pytest.raises(ErnieError, match="column must be a name"):
        ScorePictures(BuiltinScorer(), column="a b")
    with pytest.raises(ErnieError, match="batch_size must be 1"):
        ScorePictures(BuiltinScorer(), batch_size=0)
    with pytest.raises(ErnieError):
        ScorerFile(str(tmp_path / "none.safetensors"))


def test_the_table_has_the_numbers_of_each_category_best_first(tmp_path):
    values = {"a": [1.0, 2.0, 6.0], "b": [9.0], "": [0.5, 0.25]}
    rows = [{"category": c, "score": v, "score_of": "s", "source": "x"} for c, vs in values.items() for v in vs]
    rows += [{"category": "a"}, {"category": "a", "score": 99.0, "kept": False}, {"score": math.nan}]
    table = tabulate(rows, shown=2)
    assert [name for name, *_ in table.rows()] == ["b", "a", "(none)"]
    assert table.rows()[1] == ["a", "3", "3", f"{statistics.pstdev(values['a']):.4g}", "2", "1", "6"]
    assert table.without == 2
    assert [value for value, _ in table.best] == [9.0, 6.0]
    assert [value for value, _ in table.worst] == [0.25, 0.5]
    assert "score by s: 6 pictures, 2 without" in table.describe()
    assert table.draw().shape[2] == 3


def test_nothing_to_tabulate_is_said():
    table = tabulate([{"category": "a"}], "aes")
    assert table.describe() == "no row has a aes (1 rows)"
    with pytest.raises(ErnieError, match="Curate Scores"):
        table.draw()


def test_the_pictures_at_both_ends_are_drawn(manifest, tmp_path):
    run_stage(ScorePictures(BuiltinScorer()), manifest, tmp_path / "out.jsonl")
    few = tabulate(read_rows(tmp_path / "out.jsonl"), shown=0).draw()
    assert tabulate(read_rows(tmp_path / "out.jsonl")).draw().shape[0] > few.shape[0] + 200
