"""Rows in, rows out: JSONL and Parquet, whole or not at all, and pictures from files and shards."""

import importlib.util
import json
import os

import pytest
from broken_images import png_of, tar_of
from ernie_pack.ernie_core.curation.manifest import (
    Manifest,
    count_rows,
    open_picture,
    read_bytes,
    read_rows,
    read_shard,
    step_name,
    write_rows,
)
from ernie_pack.ernie_core.errors import ErnieError

ROWS = [
    {"source": "/a.png", "width": 3, "score": 1, "made_by": {"ingest": "k"}, "kept": False},
    {"source": "/\u732b.png", "score": 0.25, "caption": 'line\u2028one\n"two"', "tags": ["a", 1, None]},
    {"source": "/c.png", "mixed": 1, "big": 2**70, "none": None},
    {"source": os.fsdecode(b"/latin \xe9.png"), "mixed": "one", "width": -5},
    {},
]
PARQUET = pytest.param(
    "x.parquet",
    marks=pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="Parquet needs pyarrow"),
)


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", PARQUET])
def test_what_is_written_reads_back(tmp_path, name):
    assert write_rows(tmp_path / name, iter(ROWS)) == 5
    assert list(read_rows(tmp_path / name)) == ROWS
    assert count_rows(tmp_path / name) == len(Manifest(tmp_path / name)) == 5
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_plain_columns_of_parquet_are_of_plain_kinds(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    rows = [{"n": 1, "x": 1, "t": "a", "b": True, "nested": {"a": 1}}, {"n": 2, "x": 0.5, "t": "b", "b": False}]
    write_rows(tmp_path / "x.parquet", rows)
    schema = parquet.read_schema(tmp_path / "x.parquet")
    assert {f.name: str(f.type) for f in schema} == {
        **{"n": "int64", "x": "double", "t": "string", "b": "bool", "nested": "string"}
    }


def test_jsonl_keeps_readable_text(tmp_path):
    write_rows(tmp_path / "x", ROWS)
    assert "\u732b" in (tmp_path / "x").read_text(encoding="utf-8")


def test_a_half_written_last_line_is_left_out_and_any_other_damage_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n{"a": 3')
    assert list(read_rows(path)) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a": 2}')  # whole, though its line does not end
    assert list(read_rows(path)) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ErnieError, match="line 2 is not JSON"):
        list(read_rows(path))
    path.write_bytes(b"[1]\n")
    with pytest.raises(ErnieError, match="line 1 must be an object"):
        list(read_rows(path))


def test_relative_sources_start_at_the_manifest(tmp_path):
    write_rows(tmp_path / "x", [{"source": "in/../a.png"}, {"source": ""}])
    assert [r["source"] for r in read_rows(tmp_path / "x")] == [str(tmp_path / "a.png"), ""]


@pytest.mark.parametrize("name", ["x.jsonl", PARQUET])
def test_an_earlier_file_stays_when_writing_fails(tmp_path, name):
    write_rows(tmp_path / name, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise RuntimeError("the middle of it")

    with pytest.raises(RuntimeError):
        write_rows(tmp_path / name, rows())
    with pytest.raises(ErnieError, match="not plain JSON"):
        write_rows(tmp_path / name, [{"a": float("nan")}])
    assert list(read_rows(tmp_path / name)) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_no_file_a_wrong_file_and_no_pyarrow_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ErnieError, match="there is no manifest"):
        next(read_rows(tmp_path / "none"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    if importlib.util.find_spec("pyarrow"):
        with pytest.raises(ErnieError, match="no Parquet file"):
            next(read_rows(tmp_path / "x.parquet"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ErnieError, match="pip install pyarrow"):
        write_rows(tmp_path / "x.parquet", [])


def test_members_of_a_shard_are_found_by_name_also_where_it_comes_twice(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of([("a.png", png_of(1)), ("b#.png", png_of(2)), ("a.png", png_of(3))]))
    assert list(read_shard(tmp_path / "s.tar").members) == ["a.png", "b#.png", "a.png#2"]
    for name, seed in (("a.png", 1), ("b#.png", 2), ("a.png#2", 3)):
        assert read_bytes(f"{tmp_path}/s.tar#{name}") == png_of(seed)
    with pytest.raises(ErnieError, match=r"no member c\.png"):
        read_bytes(f"{tmp_path}/s.tar#c.png")
    (tmp_path / "s.tar").write_bytes(tar_of([("a.png", png_of(4))]))  # an index that was kept is not believed
    assert read_bytes(f"{tmp_path}/s.tar#a.png") == png_of(4)


def test_a_row_without_a_source_has_no_picture():
    with pytest.raises(ErnieError, match="no source"):
        open_picture({"caption": "a fox"})


def test_following_manifests_of_two_branches_have_names_of_their_own(tmp_path):
    first = Manifest(tmp_path / step_name(1, "ingest", "settings"))
    small, large = first.next("filter", "256"), first.next("filter", "1024")
    assert small.name.startswith("02_filter_")
    assert small != large
    assert first.next("filter", "256") == small
    assert Manifest(small).next("scores", "k") != Manifest(large).next("scores", "k")
    assert Manifest(tmp_path / "mine.jsonl").next("scores", "k").name.startswith("01_scores_")
    assert json.dumps(small.name)
