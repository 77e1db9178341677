"""The nodes without ComfyUI: the standalone vocabulary, and a host that records."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from ernie_pack.standalone import load_pack

load_pack()

from node_schemas import find_classes  # noqa: E402
from recording_host import RecordingHost  # noqa: E402

NODES = Path(__file__).resolve().parents[2] / "nodes"
NODE_FILES = [path.stem for path in sorted(NODES.glob("*.py")) if "import host\n" in path.read_text(encoding="utf-8")]


@pytest.fixture(scope="session")
def node_classes() -> dict[str, type]:
    return find_classes()


@pytest.fixture
def recording(monkeypatch, tmp_path) -> RecordingHost:
    host = RecordingHost(tmp_path)
    (tmp_path / "output").mkdir()
    for name in NODE_FILES:
        monkeypatch.setattr(importlib.import_module(f"ernie_pack.nodes.{name}"), "host", host)
    checkpoint = importlib.import_module("ernie_pack.ernie_core.weights.checkpoint")
    monkeypatch.setattr(
        checkpoint, "read_component", lambda path, kind: f"{kind} of {path.relative_to(tmp_path).as_posix()}"
    )
    return host


@pytest.fixture
def run(node_classes, recording):
    """run(node_id, **inputs) -> outputs, as the host would call it: through a class clone with hidden inputs."""

    def call(node_id: str, **inputs):
        clone = node_classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        output = clone.EXECUTE_NORMALIZED(**inputs)
        return SimpleNamespace(result=output.result, ui=output.ui)

    return call
