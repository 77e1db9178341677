"""The end of the pipeline: folders and shards that others read, and read back as what they were."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from broken_images import animated, cmyk, encode, png_of, write_pile
from ernie_pack.ernie_core import cli
from ernie_pack.ernie_core.curation.export import (
    export_folder,
    export_shards,
    export_table,
    read_export,
)
from ernie_pack.ernie_core.curation.ingest import ingest
from ernie_pack.ernie_core.curation.manifest import read_rows, write_rows
from ernie_pack.ernie_core.curation.texts import row_captions
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.training.captions import Caption
from ernie_pack.ernie_core.training.dataset import DatasetOptions, read_dataset
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def manifest(tmp_path):
    """Seven good pictures in three formats, one broken, one dropped; some with captions of several styles."""
    folder = tmp_path / "in" / "10_fox"
    folder.mkdir(parents=True)
    for n in range(5):
        (folder / f"{n}.png").write_bytes(png_of(n))
        (folder / f"{n}.txt").write_text(f"caption {n}", encoding="utf-8")
    (folder / "0.short.txt").write_text("short", encoding="utf-8")
    (folder / "5.jpg").write_bytes(cmyk())
    (folder / "6.gif").write_bytes(animated())
    (folder / "7.ico.png").write_bytes(encode(Image.open(io.BytesIO(png_of(9, 32, 32))), "ICO"))
    (folder / "8.png").write_bytes(b"no")
    ingest([tmp_path / "in"], tmp_path / "m.jsonl")
    rows = list(read_rows(tmp_path / "m.jsonl"))
    dropped = next(r for r in rows if r["source"].endswith("/4.png"))
    dropped |= {"kept": False, "dropped_by": "size: too small"}
    next(r for r in rows if r["source"].endswith("/1.png"))["captions"] = {"long": "a long one", "short": "s"}
    next(r for r in rows if r["source"].endswith("/1.png"))["category"] = "animals/fox"
    write_rows(tmp_path / "m.jsonl", rows)
    return tmp_path / "m.jsonl"


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_dataset_folder_reads_what_was_kept(manifest, tmp_path):
    found = export_folder(manifest, tmp_path / "out")
    assert (found.pictures, found.without_caption) == (7, 3)
    assert found.left_out == {"no usable picture": 1, "dropped by size": 1}
    assert "dropped by size: 1" in str(found)
    options = DatasetOptions(missing_caption="empty")
    read = read_dataset(tmp_path / "out", options=options)
    assert read_export(tmp_path / "out", options).items == read.items
    assert len(read) == 7
    assert not [p for p in read.problems if "no caption" not in str(p)]
    one = next(i for i in read.items if i.concept == "animals/fox")
    assert one.captions == (Caption("caption", "caption 1"), Caption("long", "a long one"), Caption("short", "s"))
    assert {i.concept for i in read.items} == {"animals/fox", "fox"}
    assert {i.repeats for i in read.items} == {10}
    kept = [r for r in read_rows(manifest) if usable(r)]
    assert list(read_rows(tmp_path / "out" / "rows.jsonl")) == kept
    left = list(read_rows(tmp_path / "out" / "left_out.jsonl"))
    assert [Path(r["source"]).name for r in left] == ["4.png", "8.png"]
    by_hash = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in (tmp_path / "out" / "images").rglob("*.*")}
    assert sum(r["id"] in by_hash for r in kept) == 6  # the ICO became a PNG of its pixels


def test_without_captions_the_dataset_asks_for_them(manifest, tmp_path):
    export_folder(manifest, tmp_path / "out")
    with pytest.raises(ErnieError, match="3 of 7 pictures have no caption"):
        read_export(tmp_path / "out")


def test_captions_of_chosen_styles_only(manifest, tmp_path):
    found = export_folder(manifest, tmp_path / "out", styles=["short"])
    assert found.without_caption == 5
    lines = list(read_rows(tmp_path / "out" / "metadata.jsonl"))
    assert sorted(str(line["captions"]) for line in lines if "captions" in line) == [
        "{'short': ['s']}",
        "{'short': ['short']}",
    ]
    assert not any("text" in line for line in lines)


def test_row_captions_come_once_and_in_order():
    row = {
        "caption": "a",
        "given": {"captions": {"caption": ["a"], "tags": ["t"]}},
        "captions": {"long": "l", "x": " "},
    }
    assert row_captions(row) == [Caption("caption", "a"), Caption("tags", "t"), Caption("long", "l")]
    assert row_captions(row, ["long", "caption"]) == [Caption("long", "l"), Caption("caption", "a")]
    assert row_captions({"caption": ""}) == []
    assert row_captions({"prompts": {"Keyword": ["fox", "red"]}}) == [
        Caption("keyword", "fox"),
        Caption("keyword", "red"),
    ]
    assert row_captions({"captions": {"Long": "l"}}, ["LONG"]) == [Caption("long", "l")]


def test_a_second_export_copies_what_is_missing_and_takes_away_what_is_gone(manifest, tmp_path):
    out = tmp_path / "out"
    export_folder(manifest, out)
    first = tree(out)
    rows = {Path(r["source"]).name: r for r in read_rows(manifest)}
    files = {name: next((out / "images").rglob(f"{r['id'][:20]}.*")) for name, r in rows.items() if usable(r)}
    stamps = {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["2.png"].write_bytes(files["2.png"].read_bytes()[:-1] + b"\0")  # what a power cut may leave
    export_folder(manifest, out)
    assert tree(out) == first
    assert {n for n, p in files.items() if p.stat().st_mtime_ns == stamps[n]} >= {"0.png", "5.jpg", "6.gif"}
    (out / "images" / "mine.png").write_bytes(b"not ours")
    write_rows(manifest, [r for name, r in rows.items() if name != "3.png"])
    export_folder(manifest, out)
    assert not files["3.png"].exists()
    assert (out / "images" / "mine.png").exists()
    assert len(tree(out)) == len(first)


def usable(row):
    return "id" in row and "kept" not in row


def test_hard_links_are_the_files_themselves(manifest, tmp_path):
    export_folder(manifest, tmp_path / "out", link=True)
    source = next(r for r in read_rows(manifest) if r["source"].endswith("/2.png"))
    linked = next((tmp_path / "out" / "images").rglob(f"{source['id'][:20]}.png"))
    assert os.path.samefile(linked, source["source"])


@pytest.mark.parametrize("way", ["folder", "shards"])
def test_a_file_that_changed_or_went_is_named_and_the_others_are_exported(manifest, tmp_path, way):
    (tmp_path / "in" / "10_fox" / "2.png").write_bytes(png_of(22))
    (tmp_path / "in" / "10_fox" / "3.png").unlink()
    found = (export_folder if way == "folder" else export_shards)(manifest, tmp_path / "out")
    assert found.pictures == 5
    assert [Path(source).name for source, _ in found.failed] == ["2.png", "3.png"]
    assert "changed since" in found.failed[0][1]
    assert "No such file" in found.failed[1][1]
    left = {Path(r["source"]).name for r in read_rows(tmp_path / "out" / "left_out.jsonl")}
    assert left == {"2.png", "3.png", "4.png", "8.png"}


def test_nothing_to_export_is_an_error_with_the_counts(manifest, tmp_path):
    write_rows(manifest, [r for r in read_rows(manifest) if "id" not in r or "kept" in r])
    with pytest.raises(ErnieError, match="dropped by size: 1, no usable picture: 1"):
        export_folder(manifest, tmp_path / "out")
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    with pytest.raises(ErnieError, match="no manifest"):
        export_table(tmp_path / "none", tmp_path / "t.jsonl")


def test_shards_read_back_as_the_rows_they_were(manifest, tmp_path):
    found = export_shards(manifest, tmp_path / "s", name="set")
    assert [p.name for p in found.shards] == ["set-000000.tar"]
    ingest([tmp_path / "s"], tmp_path / "again.jsonl")
    before = [r for r in read_rows(manifest) if usable(r)]
    after = [r for r in read_rows(tmp_path / "again.jsonl") if "id" in r]
    changed = ("source", "modified", "given", "notes")
    for old, new in zip(before[:-1], after[:-1], strict=True):  # the last is the ICO, which became a PNG
        assert {k: v for k, v in new.items() if k not in changed} == {k: v for k, v in old.items() if k not in changed}
        assert new["given"]["repeats"] == 10
        assert "#" in new["source"]


def test_shards_keep_their_size_and_say_their_hashes(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n:02d}.png").write_bytes(png_of(n, 400, 400))
        (folder / f"{n:02d}.txt").write_text(f"caption {n}", encoding="utf-8")
    ingest([folder], tmp_path / "m.jsonl")
    found = export_shards(tmp_path / "m.jsonl", tmp_path / "s", shard_bytes=1 << 20)
    assert len(found.shards) > 1
    keys = []
    for line, path in zip(read_rows(tmp_path / "s" / "index.jsonl"), found.shards, strict=True):
        assert path.stat().st_size <= 1 << 20
        assert (line["bytes"], line["sha256"]) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) == 3 * line["samples"]
            for name in names[::3]:  # what WebDataset groups by: the name up to its first dot
                key = name.partition(".")[0]
                keys.append(key)
                row = json.load(tar.extractfile(f"{key}.json"))
                assert hashlib.sha256(tar.extractfile(f"{key}.png").read()).hexdigest() == row["id"]
                assert tar.extractfile(f"{key}.txt").read().decode() == row["caption"]
    assert len(set(keys)) == 12
    before = {p: p.stat().st_mtime_ns for p in found.shards}
    export_shards(tmp_path / "m.jsonl", tmp_path / "s", shard_bytes=1 << 20)
    assert {p: p.stat().st_mtime_ns for p in found.shards} == before  # nothing is written again
    export_shards(tmp_path / "m.jsonl", tmp_path / "s")
    assert [p.name for p in sorted((tmp_path / "s").glob("*.tar"))] == ["pictures-000000.tar"]


def test_a_table_holds_the_kept_rows_and_their_first_caption(manifest, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    found = export_table(manifest, tmp_path / "t.parquet", styles=["long", "caption"])
    rows = list(read_rows(tmp_path / "t.parquet"))
    assert found.pictures == len(rows) == 7
    assert [r.get("text") for r in rows] == ["caption 0", "a long one", "caption 2", "caption 3", None, None, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"shard_bytes": 1000}, "at least 1048576 bytes"), ({"name": "../x"}, "plain file name"), ({"name": ""}, "plain")],
    ids=["size", "name", "empty"],
)
def test_shard_settings_that_cannot_be_are_refused(manifest, tmp_path, settings, message):
    with pytest.raises(ErnieError, match=message):
        export_shards(manifest, tmp_path / "s", **settings)


@pytest.mark.parametrize("export", [export_folder, export_shards], ids=["folder", "shards"])
def test_stopping_and_a_full_disk_leave_nothing_that_looks_whole(manifest, tmp_path, monkeypatch, export):
    with pytest.raises(Interrupted, match="Run again"):
        export(manifest, tmp_path / "out", should_stop=lambda: True)
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr("ernie_pack.ernie_core.curation.manifest.os.replace", _full)
        with pytest.raises(ErnieError, match="No space left"):
            export(manifest, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert export(manifest, tmp_path / "out").pictures == 7


def _full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("way", ["folder", pytest.param("shards", marks=pytest.mark.slow)])
def test_killed_on_the_way_it_ends_with_the_same_files(tmp_path, way):
    write_pile(tmp_path / "in", 400)
    ingest([tmp_path / "in"], tmp_path / "m.jsonl")
    command = [sys.executable, "-m", "ernie_core.cli", "curate", "export", str(tmp_path / "m.jsonl")]
    options = ["--format", way, *(["--shard-mb", "1"] if way == "shards" else [])]
    assert cli.main([*command[3:], str(tmp_path / "whole"), *options]) == 0
    for wanted in (60, 5) if way == "shards" else (60,):
        process = subprocess.Popen([*command, str(tmp_path / "out"), *options], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and len([*(tmp_path / "out").rglob("*.*")]) < (wanted if way == "folder" else 1):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert cli.main([*command[3:], str(tmp_path / "out"), *options]) == 0
    whole, out = tree(tmp_path / "whole"), tree(tmp_path / "out")
    assert {k: v for k, v in out.items() if ".part" not in k} == whole
