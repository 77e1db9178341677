"""Calibrating the step cache on an official folder, in miniature: the tiny model's, at 64 px."""

import json

import pytest
from ernie_pack.bench import cache_saves, calibrate_cache, cli, guidance_helps, tiny_runs
from ernie_pack.ernie_core.sampling import calibration
from ernie_pack.ernie_core.sampling.cache import StepCache
from ernie_pack.tiny.package import FOLDER


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "calibrations")
    for module in (tiny_runs, guidance_helps):
        monkeypatch.setattr(module, "WORK", tmp_path / "out")
    for module in (cache_saves, calibrate_cache):
        monkeypatch.setattr(module, "STEPS", 6)
        monkeypatch.setattr(module, "CACHES", {"modulated_input 1": StepCache(threshold=1.0, signal="modulated_input")})
    monkeypatch.setattr(calibrate_cache, "OFFICIAL_SIDE", 4)
    monkeypatch.setattr(calibrate_cache, "OFFICIAL_PROMPTS", ("a red star", "a blue ring"))
    return tmp_path


def test_a_folder_gets_a_calibration_that_the_node_reads_and_a_table(miniature):
    rows = list(calibrate_cache.measure(folder=FOLDER))
    assert [row.name.split(",")[0] for row in rows] == ["calibration 7x192.json", "step cache", "step cache"]
    assert "left out" in rows[-1].ours
    (path,) = (miniature / "calibrations").iterdir()
    made_with = json.loads(path.read_text())["made_with"]
    assert made_with["model"] == FOLDER.name
    assert made_with["pairs"] == 2 * 2 * 5  # prompts, branches, steps but the first
    assert made_with["pixels"] == 64


def test_a_model_is_for_calibrate_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["cfg", "--model", "folder"])
    assert "read by calibrate alone" in capsys.readouterr().err
