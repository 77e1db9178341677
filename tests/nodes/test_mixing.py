"""Curate Sampling Plan: widgets become the engine's plan, and what comes out can be trained."""

import math

import pytest
import torch
from ernie_pack.ernie_core.curation.manifest import Manifest, write_rows
from ernie_pack.ernie_core.curation.sampling import PRESETS, Sampling
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.nodes import mixing

WIDGETS = {
    "preset": mixing.AS_SET,
    "alpha": 0.5,
    "gamma": 1.0,
    "quality": "mean",
    "scale": "percentile",
    "within": "score",
    "temperature": 0.5,
    "depth": 0,
    "styles": "",
    "trigger": "",
    "caption_dropout": 0.0,
    "missing_caption": "error",
    "default_caption": "",
}


def make_rows():
    kinds = ["animal/bird"] * 12 + ["animal/fish"] * 4 + ["plant"] * 2
    return [
        {
            "id": f"{i:064x}",
            "source": f"{i}.png",
            "width": 64,
            "height": 48,
            "caption": "beside",
            "captions": {"keyword": f"tags {i}", "detailed": f"long {i}"},
            "category": kind,
            "score": 40.0 + (7 * i) % 18,
        }
        for i, kind in enumerate(kinds)
    ]


@pytest.fixture
def manifest(tmp_path):
    write_rows(tmp_path / "m.jsonl", make_rows())
    return Manifest(tmp_path / "m.jsonl")


def draws(output):
    return [item.draws for item in output.result[0].items]


def test_it_gives_a_dataset_a_report_and_a_picture(run, manifest):
    data, report, picture = run("ErnieSamplingPlan", manifest=manifest, **WIDGETS).result
    assert len(data) == 18
    assert data.is_drawn
    assert "18 pictures in 3 categories" in report
    assert "| plant | 2 |" in report
    assert "## Data" in report
    assert picture.shape == (1, 70 + 3 * 30, 900, 3)
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() < picture.max() <= 1


def test_the_presets_of_the_node_are_those_of_the_engine():
    assert (mixing.AS_SET, *PRESETS) == mixing.PRESETS


def test_the_defaults_of_the_widgets_are_the_tempered_preset(run, manifest):
    as_set = run("ErnieSamplingPlan", manifest=manifest, **WIDGETS)
    tempered = run("ErnieSamplingPlan", manifest=manifest, **(WIDGETS | {"preset": "tempered"}))
    assert draws(as_set) == draws(tempered)
    names = ("alpha", "gamma", "quality", "scale", "within", "temperature")
    assert mixing.make_sampling(mixing.AS_SET, **{name: WIDGETS[name] for name in names}) == Sampling()


OTHER = {
    "preset": "proportional",
    "alpha": 1.0,
    "gamma": 3.0,
    "quality": "upper",
    "scale": "raw",
    "within": "rank",
    "temperature": 100.0,
    "depth": 1,
    "styles": "keyword 1",
    "trigger": "sks",
    "caption_dropout": 0.1,
}


@pytest.mark.parametrize("name", OTHER)
def test_every_widget_changes_what_comes_out(run, manifest, name):
    plain = run("ErnieSamplingPlan", manifest=manifest, **WIDGETS).result
    other = run("ErnieSamplingPlan", manifest=manifest, **(WIDGETS | {name: OTHER[name]})).result
    assert (plain[0], plain[1]) != (other[0], other[1])


def test_the_widgets_for_missing_captions_are_read(run, tmp_path):
    rows = make_rows()
    rows[0] |= {"caption": "", "captions": {}}
    write_rows(tmp_path / "m.jsonl", rows)
    call = {"manifest": Manifest(tmp_path / "m.jsonl")} | WIDGETS
    with pytest.raises(ErnieError, match="1 of 18 pictures have no caption"):
        run("ErnieSamplingPlan", **call)
    empty = run("ErnieSamplingPlan", **(call | {"missing_caption": "empty"})).result[0]
    default = run("ErnieSamplingPlan", **(call | {"missing_caption": "default", "default_caption": "a thing"})).result[
        0
    ]
    assert empty.items[0].captions[0].text == ""
    assert default.items[0].captions[0].text == "a thing"


def test_a_temperature_of_100_is_none_and_0_is_the_best_alone(run, manifest):
    assert mixing.make_sampling(mixing.AS_SET, temperature=100.0).temperature == math.inf
    best = run("ErnieSamplingPlan", manifest=manifest, **(WIDGETS | {"temperature": 0.0})).result[0]
    assert sum(item.draws > 0 for item in best.items) == 3


def test_a_manifest_that_is_gone_or_unscored_says_so(run, tmp_path):
    with pytest.raises(ErnieError, match="there is no manifest"):
        run("ErnieSamplingPlan", manifest=Manifest(tmp_path / "none.jsonl"), **WIDGETS)
    rows = [{k: v for k, v in row.items() if k != "score"} for row in make_rows()]
    write_rows(tmp_path / "m.jsonl", rows)
    with pytest.raises(ErnieError, match="needs scores, and no row of the manifest has one"):
        run("ErnieSamplingPlan", manifest=Manifest(tmp_path / "m.jsonl"), **WIDGETS)
    (tmp_path / "m.jsonl").write_text("not json\n{}\n")
    with pytest.raises(ErnieError, match="line 1 is not JSON"):
        run("ErnieSamplingPlan", manifest=Manifest(tmp_path / "m.jsonl"), **WIDGETS)


def test_reading_can_be_interrupted(run, recording, manifest, monkeypatch):
    def stop():
        raise Interrupted("stopped")

    monkeypatch.setattr(recording, "throw_if_interrupted", stop)
    with pytest.raises(Interrupted):
        run("ErnieSamplingPlan", manifest=manifest, **WIDGETS)
