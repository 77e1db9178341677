"""The report: every count adds up, every problem is listed, and the sheets show the pictures."""

import json

import numpy as np
import pytest
from broken_images import png_of, write_pile
from ernie_pack.ernie_core import cli
from ernie_pack.ernie_core.curation.filters import Filters, filter_rows
from ernie_pack.ernie_core.curation.ingest import ingest
from ernie_pack.ernie_core.curation.manifest import Manifest, read_rows, write_rows
from ernie_pack.ernie_core.curation.report import LISTED, look_over, problems, write_report
from ernie_pack.ernie_core.errors import ErnieError
from PIL import Image


@pytest.fixture
def manifest(tmp_path):
    write_pile(tmp_path / "in", 120)
    ingest([tmp_path / "in"], tmp_path / "1.jsonl")
    filter_rows(tmp_path / "1.jsonl", tmp_path / "2.jsonl", Filters(exact=True, min_side=32))
    rows = list(read_rows(tmp_path / "2.jsonl"))
    good = [r for r in rows if "id" in r and "kept" not in r]
    good[0] |= {"failed": {"captions": "the server said no"}}
    for n, row in enumerate(good[1:]):
        row |= {"category": "animals" if n % 3 else "food/bread", "score": n / 10}
    write_rows(tmp_path / "2.jsonl", rows)
    return Manifest(tmp_path / "2.jsonl")


def test_every_row_is_counted_once(manifest):
    found = look_over(manifest)
    assert found.rows == 120 == found.usable + found.broken + sum(found.dropped.values())
    assert found.dropped.keys() == {"exact duplicate"}
    assert f"{found.usable} usable" in found.text
    assert "stage ingest: 120 made" in found.text
    assert "stage captions: 0 made, 1 failed" in found.text
    assert "categories: 2" in found.text
    assert "score: " in found.text


def test_every_problem_is_listed_in_the_file_and_the_first_in_the_text(manifest, tmp_path):
    found = look_over(manifest)
    write_report(found, tmp_path / "out")
    listed = list(read_rows(tmp_path / "out" / "problems.jsonl"))
    assert listed == list(problems(manifest))
    assert len(listed) == found.broken + 1
    assert {"stage": "captions", "reason": "the server said no"}.items() <= next(
        line for line in listed if line["stage"] == "captions"
    ).items()
    assert f"{len(listed)} problems, the first {LISTED}" in found.text
    assert sum(line.startswith("  /") for line in found.text.splitlines()) == LISTED
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.md", "problems.jsonl", "kept.png", "dropped.png"}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "kept.png")), found.kept_sheet)


def test_the_sheets_show_the_same_pictures_in_any_order(manifest, tmp_path):
    first = look_over(manifest, shown=5)
    rows = [r for r in manifest.rows() if "id" in r]
    write_rows(tmp_path / "other.jsonl", rows[::-1])
    other = look_over(tmp_path / "other.jsonl", shown=5)
    assert first.kept_sheet.shape == other.kept_sheet.shape
    assert first.sheet().shape[0] == first.kept_sheet.shape[0] + first.dropped_sheet.shape[0]


def test_a_picture_that_went_leaves_a_grey_place(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(png_of(1))
    ingest([tmp_path / "in"], tmp_path / "m.jsonl")
    (tmp_path / "in" / "1.png").unlink()
    sheet = look_over(tmp_path / "m.jsonl").kept_sheet
    assert (sheet == 128).all(axis=-1).sum() > 10_000


def test_nothing_to_report_is_an_error(tmp_path):
    write_rows(tmp_path / "m.jsonl", [])
    with pytest.raises(ErnieError, match="is empty"):
        look_over(tmp_path / "m.jsonl")
    with pytest.raises(ErnieError, match="no manifest"):
        look_over(tmp_path / "none.jsonl")


def test_the_command_prints_and_writes_it(manifest, tmp_path, capsys):
    assert cli.main(["curate", "report", str(manifest.path), "--out", str(tmp_path / "out")]) == 0
    assert "120 rows" in capsys.readouterr().out
    assert "120 rows" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "problems.jsonl").read_bytes().splitlines()[0])
