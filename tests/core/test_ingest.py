"""From a pile of files to rows: every file is there, whatever state it is in, and every picture is measured."""

import gzip
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_images import HEIGHT, WIDTH, animated, cmyk, encode, oriented, png_of, tar_of, upright, write_pile
from ernie_pack.ernie_core import cli
from ernie_pack.ernie_core.curation.ingest import Ingest, ingest
from ernie_pack.ernie_core.curation.manifest import open_picture, read_rows, write_rows
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def taken(tmp_path):
    """taken(path, ...) -> rows of an ingest."""

    def run(*paths, **how):
        ingest(paths, tmp_path / "out" / "01_ingest.jsonl", **how)
        return list(read_rows(tmp_path / "out" / "01_ingest.jsonl"))

    return run


def by_name(rows):
    return {r["source"].rpartition("/")[2]: r for r in rows}


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pile")
    return folder, write_pile(folder, 1000)


def test_of_a_thousand_mixed_files_each_is_there_once_and_none_stops_the_run(pile, taken):
    folder, expected = pile
    rows = taken(folder)
    assert len(rows) == len(expected) == 1000
    assert {r["source"] for r in rows} == {str(path) for path in expected}
    for row in rows:
        good = expected[Path(row["source"])]
        assert ("id" in row, "problem" in row) == (good, not good), row
        if good:
            data = Path(row["source"]).read_bytes()
            assert row["id"] == hashlib.sha256(data).hexdigest()
            assert row["bytes"] == len(data)
            assert (row["width"], row["height"]) in ((WIDTH, HEIGHT), (HEIGHT, WIDTH))
            assert len(row["phash"]) == 38
    assert 300 < sum(expected.values()) < 500


def test_worker_processes_write_the_bytes_of_this_process(pile, tmp_path):
    for name, how in {"here": {}, "there": {"engine": "processes", "workers": 2}}.items():
        ingest([pile[0]], tmp_path / f"{name}.jsonl", **how)
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


def test_what_each_picture_is(tmp_path, taken):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "turned.jpg").write_bytes(oriented(6, "JPEG"))
    (tmp_path / "in" / "cmyk.jpg").write_bytes(cmyk())
    (tmp_path / "in" / "moves.gif").write_bytes(animated())
    (tmp_path / "in" / "wrong.jpg").write_bytes(encode(Image.fromarray(upright())))
    (tmp_path / "in" / "old.heic").write_bytes(b"\0\0\0\x18ftypheic")
    rows = by_name(taken(tmp_path / "in"))
    turned = rows["turned.jpg"]
    assert (turned["width"], turned["height"], turned["orientation"], turned["format"]) == (WIDTH, HEIGHT, 6, "JPEG")
    assert "CMYK" in rows["cmyk.jpg"]["notes"][0]
    assert rows["moves.gif"]["notes"] == ["has 3 frames; the first is used"]
    assert rows["wrong.jpg"]["notes"] == ["is named .jpg and holds PNG"]
    assert "save it as PNG" in rows["old.heic"]["problem"]
    assert open_picture(turned).getpixel((1, 1))[0] > 200  # upright: the red corner is top left


def test_captions_of_every_kind_find_their_pictures(tmp_path, taken):
    folder = tmp_path / "in"
    (folder / "10_fox").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "10_fox/d.png"):
        (folder / name).write_bytes(png_of(hash(name) % 1000))
    (folder / "a.txt").write_text("a red fox", encoding="utf-8")
    (folder / "a.short.txt").write_text("fox", encoding="utf-8")
    (folder / "b.png.caption").write_bytes("an \u732b".encode("utf-16"))
    (folder / "c.json").write_text(json.dumps({"caption": "c", "author": "me"}), encoding="utf-8")
    (folder / "10_fox" / "d.txt").write_bytes(b"\xfa broken")
    (folder / "lonely.txt").write_text("nobody", encoding="utf-8")
    rows = by_name(taken(folder))
    assert rows["a.png"]["caption"] == "a red fox"
    assert rows["a.png"]["given"] == {"captions": {"caption": ["a red fox"], "short": ["fox"]}}
    assert rows["b.png"]["caption"] == "an \u732b"
    assert (rows["c.png"]["caption"], rows["c.png"]["given"]) == ("c", {"author": "me"})
    assert rows["d.png"]["given"]["concept"] == "fox"
    assert rows["d.png"]["given"]["repeats"] == 10
    assert "d.txt" in rows["d.png"]["given"]["caption_problem"]
    assert "id" in rows["d.png"]  # a broken caption does not cost the picture
    assert rows["lonely.txt"]["problem"] == "it is a caption without a picture"


def test_a_table_in_the_folder_captions_it_and_what_it_lacks_is_taken_too(tmp_path, taken):
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "1.png").write_bytes(png_of(1))
    (tmp_path / "in" / "2.png").write_bytes(png_of(2))
    lines = ['{"file_name": "train/1.png", "text": "one", "aesthetic": 5.5}', '{"file_name": "3.png", "text": "x"}']
    lines += ["not json", '{"text": "no picture"}']
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "in" / "metadata.csv").write_text("file_name,text\n", encoding="utf-8")
    rows = taken(tmp_path / "in")
    named = by_name(rows)
    assert named["1.png"]["caption"] == "one"
    assert named["1.png"]["given"]["aesthetic"] == 5.5
    assert named["2.png"]["caption"] == ""
    assert named["3.png"]["problem"] == "there is no such picture (metadata.jsonl row 2)"
    problems = [r["problem"] for r in rows if "problem" in r]
    assert any("row 3 is not JSON" in p for p in problems)
    assert any("row 4 names no picture" in p for p in problems)
    assert any("metadata.jsonl says what its pictures are" in p for p in problems)
    assert len(rows) == 6


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "toml"])
def test_tables_and_dataset_files_of_others_are_read(tmp_path, taken, kind):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "1.png").write_bytes(png_of(1))
    (tmp_path / "p" / "1.txt").write_text("one", encoding="utf-8")
    table = tmp_path / f"list.{kind}"
    rows = [{"image": "p/1.png", "prompt": "one", "score": 4}, {"image": "p/2.png", "prompt": "two", "score": 5}]
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        write_rows(table, rows)
    elif kind == "csv":
        table.write_text("image,prompt,score\np/1.png,one,4\np/2.png,two,5\n", encoding="utf-8")
    elif kind == "toml":
        table.write_text('[[datasets]]\nimage_directory = "p"\nnum_repeats = 3\nflip_aug = true\n', encoding="utf-8")
    else:
        lines = map(json.dumps, rows) if kind == "jsonl" else [json.dumps(rows)]
        table.write_text("\n".join(lines), encoding="utf-8")
    found = by_name(taken(table))
    assert found["1.png"]["caption"] == "one"
    assert "id" in found["1.png"]
    if kind == "toml":
        assert found["1.png"]["given"]["repeats"] == 3
        assert "flip_aug" in found["list.toml"]["problem"]
    else:
        assert str(found["1.png"]["given"]["score"]) == "4"
        assert "cannot be read" in found["2.png"]["problem"]


def test_pictures_inside_a_parquet_table_are_refused_with_a_way_out(tmp_path, taken):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    column = [{"bytes": png_of(1), "path": "1.png"}]
    parquet.write_table(pyarrow.table({"image": column}), tmp_path / "hub.parquet")
    with pytest.raises(ErnieError, match="write them as files or tar shards"):
        taken(tmp_path / "hub.parquet")


def test_shards_give_their_members_and_say_where_they_break(tmp_path, taken):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = tar_of(
        [("a/1.png", png_of(1)), ("a/1.txt", b"one"), ("a/1.png", png_of(2)), ("b.png", b"no"), ("x.txt", b"")]
    )
    (folder / "0.tar").write_bytes(whole)
    long = tar_of([("1.png", png_of(3)), ("2.png", png_of(4))])
    (folder / "1.tar").write_bytes(long[: 1536 + len(png_of(3))])
    (folder / "2.tar").write_bytes(long[:512] + bytes(100) + b"\xff" * 5000)
    (folder / "3.tar").write_bytes(b"no tar at all" * 100)
    (folder / "4.tar").write_bytes(gzip.compress(whole))
    (folder / "5.tar").write_bytes(b"")
    rows = by_name(taken(folder))
    assert rows["1.png"]["caption"] == "one"
    assert rows["1.png#2"]["id"] == hashlib.sha256(png_of(2)).hexdigest()
    assert open_picture(rows["1.png#2"]).size == (WIDTH, HEIGHT)
    assert "cannot be decoded" in rows["0.tar#b.png"]["problem"]
    assert "without a picture" in rows["0.tar#x.txt"]["problem"]
    assert rows["1.tar#1.png"]["id"] == hashlib.sha256(png_of(3)).hexdigest()
    assert "damaged" in rows["1.tar"]["problem"]
    assert "3.tar is no tar file" in rows["3.tar"]["problem"]
    assert "compressed; unpack it" in rows["4.tar"]["problem"]
    assert "problem" in rows["5.tar"]
    assert "2.tar" in rows or "2.tar#1.png" in rows


def test_links_folders_and_pipes_named_like_pictures_are_reported(tmp_path, taken):
    folder = tmp_path / "in"
    (folder / "album.png").mkdir(parents=True)
    (folder / "album.png" / "1.png").write_bytes(png_of(1))
    (folder / "nothing.png").symlink_to(tmp_path / "gone.png")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / os.fsdecode(b"latin \xe9.png")).write_bytes(png_of(2))
    rows = by_name(taken(folder))
    assert "it is a folder" in rows["album.png"]["problem"]
    assert "id" in rows["1.png"]
    assert rows["nothing.png"]["problem"] == "it is a link to nothing"
    assert "read already" in rows["circle"]["problem"]
    assert rows["pipe.png"]["problem"] == "it is no regular file"
    latin = rows[os.fsdecode(b"latin \xe9.png")]
    assert open_picture(latin).size == (WIDTH, HEIGHT)
    assert len(rows) == 6


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_reported(tmp_path, taken):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(png_of(1))
    (tmp_path / "in" / "1.png").chmod(0)
    assert "Permission denied" in taken(tmp_path / "in")[0]["problem"]


def test_a_file_that_cannot_be_opened_is_reported(tmp_path, taken, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(png_of(1))
    (tmp_path / "in" / "2.png").write_bytes(png_of(2))

    def refuse(path, *arguments, **options):
        if str(path).endswith("1.png"):
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments, **options)

    monkeypatch.setattr("ernie_pack.ernie_core.curation.manifest.open", refuse, raising=False)
    rows = by_name(taken(tmp_path / "in"))
    assert "Permission denied" in rows["1.png"]["problem"]
    assert "id" in rows["2.png"]


def test_only_files_that_changed_are_read_again(tmp_path, taken, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.png").write_bytes(png_of(n))
    first = taken(folder)
    read = []
    monkeypatch.setattr(
        Ingest, "__call__", lambda self, rows: read.extend(r["source"] for r in rows) or [{}] * len(rows)
    )
    assert taken(folder) == first
    assert read == []
    (folder / "2.png").write_bytes(png_of(22))
    os.utime(folder / "2.png", ns=(0, 12345))
    (folder / "3.png").unlink()
    (folder / "7.png").write_bytes(png_of(7))
    taken(folder)
    assert [Path(r).name for r in read] == ["2.png", "7.png"]


def test_a_manifest_is_looked_at_anew_with_its_columns(tmp_path, taken):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "1.png").write_bytes(png_of(1))
    rows = taken(folder)
    write_rows(tmp_path / "scored.jsonl", [rows[0] | {"score": 7.5, "made_by": rows[0]["made_by"] | {"scores": "k"}}])
    again = taken(tmp_path / "scored.jsonl")
    assert again[0] == rows[0] | {"score": 7.5, "made_by": rows[0]["made_by"] | {"scores": "k"}}


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["none"], "there is no file or folder"), ([], "at least one"), (["empty"], "no files in")],
    ids=["missing", "none", "empty"],
)
def test_nothing_to_read_is_an_error_before_any_work(tmp_path, taken, paths, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ErnieError, match=message):
        taken(*(tmp_path / p for p in paths))
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_stopping_is_possible_while_files_are_listed_and_while_they_are_read(pile, tmp_path):
    for calls in (1, 5):
        asked = []
        with pytest.raises(Interrupted, match="Run again"):
            ingest(
                [pile[0]],
                tmp_path / "o.jsonl",
                should_stop=lambda asked=asked, n=calls: asked.append(1) or len(asked) >= n,
            )
        assert not (tmp_path / "o.jsonl").exists()


def test_a_full_disk_leaves_nothing_half_written(pile, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ernie_pack.ernie_core.curation.manifest.os.fsync", full)
    with pytest.raises(ErnieError, match="No space left on device"):
        ingest([pile[0]], tmp_path / "o.jsonl")
    assert list(tmp_path.iterdir()) == []


COMMAND = (sys.executable, "-m", "ernie_core.cli", "curate", "ingest")


@pytest.mark.parametrize(
    ("engine", "kills"), [("here", 1), pytest.param("processes", 3, marks=pytest.mark.slow)], ids=["here", "processes"]
)
def test_killed_at_random_points_the_command_ends_with_the_same_bytes(pile, tmp_path, engine, kills):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    ingest([pile[0]], whole)
    parts = tmp_path / "out.jsonl.parts"
    command = [*COMMAND, str(pile[0]), str(out), "--engine", engine, "--workers", "1" if engine == "here" else "2"]
    draw = random.Random(f"{engine} ingest")
    for size in sorted(draw.randrange(1, 120_000) for _ in range(kills)):  # bytes of the log, of about 170,000
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not (parts.exists() and parts.stat().st_size >= size):
            time.sleep(draw.uniform(0.0, 0.004))
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ingest([pile[0]], out, engine=engine)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == hashlib.sha256(whole.read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_the_command_says_what_it_did(pile, tmp_path, capsys):
    assert cli.main(["curate", "ingest", str(pile[0]), str(tmp_path / "1.jsonl")]) == 0
    assert "1000 rows, 1000 made" in capsys.readouterr().out
    arguments = ["--min-side", "32", "--duplicates", "--near-bits", "6"]
    assert cli.main(["curate", "filter", str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl"), *arguments]) == 0
    assert "exact duplicate" in capsys.readouterr().out
    assert cli.main(["curate", "ingest", str(tmp_path / "none"), str(tmp_path / "3.jsonl")]) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no cluster was started: pip install ray")
def test_ray_data_writes_the_bytes_of_this_process(pile, tmp_path):
    ingest([pile[0]], tmp_path / "here.jsonl")
    ingest([pile[0]], tmp_path / "ray.jsonl", engine="ray", workers=2)
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
