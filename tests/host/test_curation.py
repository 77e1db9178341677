"""Curation in a running ComfyUI: a pile of files in, a dataset out, worker processes under its module names."""

from __future__ import annotations

import pytest
from broken_images import write_pile
from comfyui_server import HostError
from ernie_pack.ernie_core.curation.ingest import ingest
from ernie_pack.ernie_core.curation.manifest import read_rows
from ernie_pack.ernie_core.training.dataset import DatasetOptions, read_dataset
from host_graph import Graph
from small_data import write_pictures

pytestmark = pytest.mark.host

HERE = {"engine": "here", "workers": 0, "address": ""}
FILTER = {"min_side": 32, "max_side": 0, "max_aspect": 3.0, "same_file": True, "near_bits": -1}
EXPORT = {
    **{"styles": "", "files": "copy", "also": "WebDataset shards", "shard_size": 1024, "trigger": ""},
    **{"caption_dropout": 0.0, "missing_caption": "default", "default_caption": "a thing"},
}


@pytest.fixture(scope="module")
def server(start_comfyui):
    """A ComfyUI with a pile of pictures in its input folder; hides the server of the other tests."""
    with start_comfyui() as server:
        write_pictures(server.base / "input" / "pile" / "3_square", count=4)
        write_pile(server.base / "input" / "pile" / "mixed", 120)
        yield server


def curate(server, name, **how):
    """Run the whole graph; returns its folder."""
    graph = Graph()
    taken = graph.add("ErnieCurateIngest", paths="pile", name=name, **HERE | how)
    kept = graph.add("ErnieCurateFilter", manifest=taken, **FILTER)
    seen = graph.add("ErnieCurationReport", manifest=kept, pictures=12)
    graph.add("PreviewImage", images=seen)
    graph.add("ErnieCurateExport", manifest=kept, **EXPORT)
    finished = server.run(graph.prompt)
    assert len(finished.files()) == 1  # the contact sheet
    return server.base / "output" / "curation" / name


@pytest.mark.parametrize("engine", ["here", "processes"])
def test_the_manifest_is_that_of_the_engine_alone(server, tmp_path, engine):
    folder = curate(server, engine, engine=engine, workers=0 if engine == "here" else 2)
    manifest = next(folder.glob("01_ingest_*.jsonl"))
    ingest([server.base / "input" / "pile"], tmp_path / "alone.jsonl")
    assert manifest.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    exported = next(folder.glob("03_export_*"))
    dataset = read_dataset(exported, options=DatasetOptions(missing_caption="empty"))
    kept = [r for r in read_rows(next(folder.glob("02_filter_*.jsonl"))) if "id" in r and "kept" not in r]
    assert len(dataset) == len(kept) > 4
    assert len(list((exported / "shards").glob("*.tar"))) == 1
    report = next(folder.glob("03_report_*"))
    assert (report / "report.md").stat().st_size > 100
    assert (report / "kept.png").stat().st_size > 1000


def test_a_path_that_is_not_there_and_a_cluster_that_is_not_there_are_said(server):
    for inputs, message in (
        ({"paths": "nowhere"}, "path must be a folder or file"),
        ({"paths": "pile", "engine": "ray", "address": "127.0.0.1:1"}, "pip install ray|no Ray cluster"),
    ):
        graph = Graph()
        taken = graph.add("ErnieCurateIngest", **{"name": "bad", **HERE, **inputs})
        graph.add("ErnieCurationReport", manifest=taken, pictures=1)
        with pytest.raises(HostError, match=message):
            server.run(graph.prompt)


def test_a_second_run_makes_nothing_again(server):
    folder = curate(server, "twice")
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("images/*/*.jpg")}
    curate(server, "twice")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("images/*/*.jpg")} == stamps
    assert len(list(folder.glob("01_ingest_*.jsonl"))) == 1
