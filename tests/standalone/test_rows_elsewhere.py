"""Rows made by workers of a Ray cluster: the same files as by one process, and a killed worker loses nothing."""

import importlib.util
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from ernie_pack.ernie_core.batch import hash_pixels
from ernie_pack.standalone import cli
from random_models import write_random_models

GRAPH = {
    "1": ("ErnieLoadDiffusionModel", {"model_name": "ernie-image.safetensors", "weight_dtype": "default"}),
    "2": ("ErnieLoadTextEncoder", {"encoder_name": "ministral-3-3b.safetensors", "rope": "yarn"}),
    "3": ("ErnieLoadVAE", {"vae_name": "flux2-vae.safetensors", "weight_dtype": "default"}),
}
SIZE = {"width": 64, "height": 32, "preset": "custom", "steps": 2, "cfg": 2.0, "shift": 4.0, "seed": 3}
BATCH = SIZE | {
    **{"model": ["1", 0], "clip": ["2", 0], "vae": ["3", 0], "source": "a {red|blue} fox\nan owl", "name": "run"},
    **{"negative": "bad", "collect": False, "wildcards": True, "variations": 5},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(models, tmp_path):
    """run(folder, *arguments, **inputs) -> exit code of the command line."""

    def call(folder, *arguments, **inputs):
        nodes = GRAPH | {"9": ("ErnieBatchFromPrompts", BATCH | inputs)}
        (tmp_path / "graph.json").write_text(
            json.dumps({k: {"class_type": t, "inputs": i} for k, (t, i) in nodes.items()})
        )
        places = ("--models", str(models), "--out", str(tmp_path / folder), "--input", str(tmp_path))
        return cli.main([str(tmp_path / "graph.json"), *places, *arguments])

    return call


def hashes(folder):
    return {p.name: hash_pixels(p) for p in (folder / "run").glob("*.png")}


def lines(folder):
    found = [json.loads(line) for line in (folder / "run" / "manifest.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda entry: entry["hash"])


def test_what_belongs_to_ray_is_not_ignored(run, capsys):
    assert run("out", "--workers", "2") == 2
    assert "are for --engine ray" in capsys.readouterr().err
    assert run("out", "--engine", "ray", "--workers", "-1") == 2
    assert "--workers must be 0" in capsys.readouterr().err


def test_without_the_package_it_says_what_to_install(run, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("out", "--engine", "ray") == 1
    assert "pip install ray" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no cluster was started: pip install ray")
def test_two_workers_make_the_files_of_one_process_and_a_killed_one_loses_nothing(run, tmp_path, capfd):
    import ray

    assert run("serial") == 0
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    killed = []

    def kill_one():
        """Kill a worker once the first picture is there."""
        while not list((tmp_path / "killed" / "run").glob("*.png")):
            time.sleep(0.02)
        for entry in os.listdir("/proc"):
            if entry.isdecimal() and int(entry) != os.getpid():
                try:
                    name = Path(f"/proc/{entry}/cmdline").read_bytes()
                except OSError:
                    continue
                if name.startswith(b"ray::Actor") and is_ours(int(entry)):
                    os.kill(int(entry), signal.SIGKILL)
                    killed.append(int(entry))
                    return

    def is_ours(process):
        """Whether it descends from this test's own cluster."""
        while process > 1:
            if process == os.getpid():
                return True
            try:
                process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                return False
        return False

    try:
        assert run("plain", "--engine", "ray", "--workers", "2") == 0
        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        assert run("killed", "--engine", "ray", "--workers", "2") == 0
        killer.join(timeout=5)
        assert run("killed", "--engine", "ray", "--workers", "2") == 0  # everything is there: no worker is started
        assert "0 made, 10 already there" in capfd.readouterr().out
    finally:
        ray.shutdown()
    assert len(killed) == 1
    serial = hashes(tmp_path / "serial")
    assert len(serial) == 10
    for folder in ("plain", "killed"):
        assert hashes(tmp_path / folder) == serial
        assert lines(tmp_path / folder) == lines(tmp_path / "serial")
        files = sorted((tmp_path / folder / "run").glob("*.png"))
        assert [p.read_bytes() for p in files] == [
            p.read_bytes() for p in sorted((tmp_path / "serial" / "run").glob("*.png"))
        ]
        assert not list((tmp_path / folder / "run").glob(".*"))
