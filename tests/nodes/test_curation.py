"""The curation nodes: a folder in, a dataset out, every widget seen in what comes of it."""

import importlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
from broken_images import encode, png_of, write_pile
from ernie_pack.ernie_core.curation.manifest import Manifest, read_rows, write_rows
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.training.dataset import DatasetOptions, read_dataset
from PIL import Image
from small_data import write_pictures

nodes = importlib.import_module("ernie_pack.nodes.curation")

HERE = {"engine": "here", "workers": 0, "address": ""}
INGEST = {"paths": "pile", "name": "run", **HERE}
FILTER = {"min_side": 0, "max_side": 0, "max_aspect": 0.0, "same_file": False, "near_bits": -1}
CAPTIONS = {"trigger": "", "caption_dropout": 0.0, "missing_caption": "empty", "default_caption": ""}
EXPORT = {"styles": "", "files": "copy", "also": "nothing", "shard_size": 1024, **CAPTIONS}


def smooth(side):
    """One picture at any size."""
    pixels = np.random.default_rng(3).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture
def pile(tmp_path):
    """Good pictures with captions, a copy, a small and a long one, and forty files in any state."""
    folder = tmp_path / "input" / "pile"
    write_pictures(folder / "3_cat", count=3)
    (folder / "small.png").write_bytes(png_of(1, 32, 32))
    (folder / "long.png").write_bytes(png_of(2, 320, 64))
    (folder / "copy a.png").write_bytes(smooth(96))
    (folder / "copy b.png").write_bytes(smooth(96))
    (folder / "nearly.png").write_bytes(smooth(120))
    (folder / "copy a.short.txt").write_text("noise", encoding="utf-8")
    write_pile(folder / "mixed", 40)
    return folder


@pytest.fixture
def manifest(run, pile):
    return run("ErnieCurateIngest", **INGEST).result[0]


def kept(manifest):
    return [r for r in manifest.rows() if "id" in r and r.get("kept") is not False]


def test_a_folder_becomes_a_manifest_and_the_node_says_so(run, pile, tmp_path, recording, monkeypatch):
    shown = []
    monkeypatch.setattr(recording, "show_text", lambda node_id, text: shown.append(text), raising=False)
    manifest, report = run("ErnieCurateIngest", **INGEST).result
    files = [p for p in pile.rglob("*") if p.is_file() and p.suffix != ".txt"]
    lonely = [p for p in pile.rglob("*lonely.txt")]
    assert len(manifest) == len(files) + len(lonely)
    assert manifest.path.parent == tmp_path / "output" / "curation" / "run"
    assert manifest.path.name.startswith("01_ingest_")
    assert f"{len(manifest)} rows" in report
    assert shown == [report]


def test_every_widget_of_the_ingest_matters(run, pile, manifest):
    more, _ = run("ErnieCurateIngest", **INGEST | {"paths": f"pile/3_cat\n\n{pile / 'small.png'}"}).result
    assert len(more) == 4
    elsewhere, _ = run("ErnieCurateIngest", **INGEST | {"name": "other"}).result
    assert elsewhere.path.parent.name == "other"
    there, _ = run("ErnieCurateIngest", **INGEST | {"name": "there", "engine": "processes", "workers": 2}).result
    assert there.path.read_bytes() == manifest.path.read_bytes()
    with pytest.raises(ErnieError, match="address 'x:1' is for engine ray, not here"):
        run("ErnieCurateIngest", **INGEST | {"address": "x:1"})
    with pytest.raises(ErnieError, match="workers must be 0"):
        run("ErnieCurateIngest", **INGEST | {"engine": "processes", "workers": -1})


def test_workers_reach_the_engine(run, pile, monkeypatch):
    asked = []
    workers = importlib.import_module("ernie_pack.ernie_core.curation.engines")
    monkeypatch.setattr(
        workers, "run_processes", lambda stage, batches, n: asked.append(n) or workers.run_here(stage, batches)
    )
    for n in (1, 3):
        run("ErnieCurateIngest", **INGEST | {"name": f"w{n}", "engine": "processes", "workers": n})
    assert asked == [1, 3]


@pytest.mark.parametrize(
    ("widget", "value", "gone"),
    [
        ("min_side", 64, "small.png"),
        ("max_side", 300, "long.png"),
        ("max_aspect", 4.0, "long.png"),
        ("same_file", True, "copy b.png"),
        ("near_bits", 6, "copy a.png"),
    ],
)
def test_every_widget_of_the_filter_matters(run, manifest, widget, value, gone):
    before, _ = run("ErnieCurateFilter", manifest=manifest, **FILTER).result
    after, report = run("ErnieCurateFilter", manifest=manifest, **FILTER | {widget: value}).result
    assert len(kept(before)) == len(kept(manifest))
    names = {Path(r["source"]).name for r in kept(after)}
    assert gone not in names
    assert "0 (00).png" not in names
    assert "dropped:" in report
    assert before.path != after.path
    assert after.path.name.startswith("02_filter_")


def test_the_report_shows_pictures_and_keeps_files(run, manifest):
    dropped, _ = run("ErnieCurateFilter", manifest=manifest, **FILTER | {"same_file": True}).result
    sheet, text, folder = run("ErnieCurationReport", manifest=dropped, pictures=24).result
    assert sheet.shape[0] == 1
    assert sheet.shape[3] == 3
    assert "dropped by exact duplicate" in text
    assert {p.name for p in Path(folder).iterdir()} == {"report.md", "problems.jsonl", "kept.png", "dropped.png"}
    fewer, _, other = run("ErnieCurationReport", manifest=dropped, pictures=2).result
    assert fewer.shape != sheet.shape
    assert other != folder


def test_one_graph_from_a_folder_to_the_dataset_that_dataset_folder_would_read(run, manifest, tmp_path):
    dataset, folder, report = run("ErnieCurateExport", manifest=manifest, **EXPORT).result
    read = read_dataset(folder, options=DatasetOptions(missing_caption="empty"))
    assert dataset.items == read.items
    assert len(dataset) == len(kept(manifest))
    assert Path(folder).parent == tmp_path / "output" / "curation" / "run"
    assert "left out - no usable picture" in report
    assert {i.concept for i in dataset.items} >= {"cat"}


def test_every_widget_of_the_export_matters(run, manifest, tmp_path):
    base, folder, _ = run("ErnieCurateExport", manifest=manifest, **EXPORT).result
    short, other, _ = run("ErnieCurateExport", manifest=manifest, **EXPORT | {"styles": "short, long"}).result
    assert other != folder
    assert [c.text for i in short.items for c in i.captions if c.text] == ["noise"]
    with pytest.raises(ErnieError, match="have no caption"):
        run("ErnieCurateExport", manifest=manifest, **EXPORT | {"missing_caption": "error"})
    filled = EXPORT | {"missing_caption": "default", "default_caption": "a cat", "trigger": "sks"}
    dataset, _, _ = run("ErnieCurateExport", manifest=manifest, **filled | {"caption_dropout": 0.5}).result
    assert any(c.text == "a cat" for i in dataset.items for c in i.captions)
    assert (dataset.options.rules.trigger, dataset.options.rules.dropout) == ("sks", 0.5)
    assert base.options.rules.trigger is None


def test_hard_links_shards_and_tables_are_written_when_asked_for(run, manifest, tmp_path):
    def folder(**changes):
        return Path(run("ErnieCurateExport", manifest=manifest, **EXPORT | changes).result[1])

    copied = folder()
    name = next(iter(read_rows(copied / "metadata.jsonl")))["file_name"]
    assert (copied / name).stat().st_nlink == 1
    (copied / name).unlink()
    assert (folder(files="hard link") / name).stat().st_nlink == 2
    assert len(list(folder(also="WebDataset shards").glob("shards/*.tar"))) == 1
    with tarfile.open(next(copied.glob("shards/*.tar"))) as tar:
        assert len(tar.getnames()) == 3 * len(kept(manifest))
    big = manifest.path.with_name("01_big.jsonl")
    rows = kept(manifest)
    write_rows(big, [r | {"filler": "x" * 900_000} for r in rows[:3]])
    shards = run("ErnieCurateExport", manifest=Manifest(big), **EXPORT | {"also": "WebDataset shards", "shard_size": 1})
    assert len(list(Path(shards.result[1]).glob("shards/*.tar"))) == 3
    assert len(list(read_rows(folder(also="JSONL table") / "table.jsonl"))) == len(kept(manifest))
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    assert len(list(read_rows(folder(also="Parquet table") / "table.parquet"))) == len(kept(manifest))


def test_a_run_that_is_repeated_makes_nothing_again(run, manifest):
    _, report = run("ErnieCurateIngest", **INGEST).result
    assert "0 made" in report


def test_the_fingerprint_follows_the_files(node_classes, recording, pile):
    node = node_classes["ErnieCurateIngest"]
    before = node.fingerprint_inputs(paths="pile", name="x")
    assert node.fingerprint_inputs(paths="pile", name="y") == before
    (pile / "new.png").write_bytes(png_of(9))
    assert node.fingerprint_inputs(paths="pile") != before
    assert node.fingerprint_inputs(paths=None) == ""


@pytest.mark.parametrize("paths", ["", "nothing/here", "pile\nnothing/here"])
def test_a_path_that_is_not_there_says_where_it_was_looked_for(run, pile, paths):
    with pytest.raises(ErnieError, match="path must be a folder or file"):
        run("ErnieCurateIngest", **INGEST | {"paths": paths})


def test_a_name_that_leads_elsewhere_is_refused(run, pile):
    with pytest.raises(ErnieError, match="name must be a folder inside"):
        run("ErnieCurateIngest", **INGEST | {"name": "../../elsewhere"})


def test_a_manifest_that_was_deleted_says_so(run, manifest):
    manifest.path.unlink()
    for node, inputs in (
        ("ErnieCurateFilter", FILTER),
        ("ErnieCurationReport", {"pictures": 3}),
        ("ErnieCurateExport", EXPORT),
    ):
        with pytest.raises(ErnieError, match="there is no manifest"):
            run(node, manifest=manifest, **inputs)


def test_an_interrupt_leaves_what_is_made_and_the_next_run_ends_it(run, pile, recording, monkeypatch):
    def interrupt():
        raise Interrupted("cancelled")

    with monkeypatch.context() as patch:
        patch.setattr(recording, "throw_if_interrupted", interrupt, raising=False)
        with pytest.raises(Interrupted):
            run("ErnieCurateIngest", **INGEST)
    manifest, _ = run("ErnieCurateIngest", **INGEST).result
    assert len(kept(manifest)) > 8
