"""The adviser's node: the files of the model folders in, text out; what is broken is said."""

import importlib

import pytest
from ernie_pack.ernie_core.adviser import CARDS
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.standalone import host, load_node_classes
from random_models import write_random_models

nodes = importlib.import_module("ernie_pack.nodes.adviser")
DEFAULTS = {"width": 1024, "height": 1024, "text_tokens": 256, "card": nodes.THIS}


@pytest.fixture
def session(tmp_path, monkeypatch):
    new = host.Session(models=write_random_models(tmp_path / "models"), output=tmp_path / "out", input=tmp_path / "in")
    monkeypatch.setattr(host, "session", new)
    return new


@pytest.fixture
def advise(session):
    node = load_node_classes()["ErnieHardwareAdviser"]

    def call(**inputs):
        return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**DEFAULTS | inputs)

    return call


def test_the_choices_are_the_engine_s():
    assert (nodes.THIS, *CARDS) == nodes.CARDS


def test_every_network_gets_a_file(advise):
    report, table = advise().result
    for stage in ("enhance the prompt", "encode the prompt", "sample", "decode"):
        assert f"- {stage}: " in report
    assert "ernie-image.safetensors" in table
    assert "1024 x 1024" in report
    assert advise().ui == {"text": [report]}


@pytest.mark.parametrize(
    "changes", [{"width": 2048}, {"height": 512}, {"text_tokens": 2048}, {"card": "RTX 3060 12 GB"}], ids=str
)
def test_every_widget_matters(advise, changes):
    assert advise(**changes).result != advise().result


def test_a_broken_file_is_said_and_the_others_go_on(advise, session):
    (session.models / "vae" / "cut.safetensors").write_bytes(b"\0" * 20)
    report, _ = advise().result
    assert "Not read: " in report
    assert "cut.safetensors" in report
    assert "- decode: flux2-vae.safetensors" in report


def test_empty_folders(advise, session, tmp_path):
    session.models = tmp_path / "nothing"
    assert "no file of ERNIE-Image was found" in advise().result[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1000}, "multiple of 16"),
        ({"text_tokens": 3000}, "1 to 2048"),
        ({"card": "GTX"}, "card must be one of"),
    ],
)
def test_bad_input(advise, changes, message):
    with pytest.raises(ErnieError, match=message):
        advise(**changes)


def test_it_runs_again_when_a_file_comes(session):
    node = load_node_classes()["ErnieHardwareAdviser"]
    before = node.fingerprint_inputs(**DEFAULTS)
    assert node.fingerprint_inputs(**DEFAULTS) == before
    source = session.models / "vae" / "flux2-vae.safetensors"
    (session.models / "vae" / "second.safetensors").write_bytes(source.read_bytes())
    assert node.fingerprint_inputs(**DEFAULTS) != before


def test_a_file_that_went_away_is_said(monkeypatch, advise):
    gone = host.model_path

    def lose(kind, name):
        if kind == "vae":
            raise ErnieError(f"{name} is not there any more")
        return gone(kind, name)

    monkeypatch.setattr(nodes.host, "model_path", lose)
    assert "Not read: flux2-vae.safetensors is not there any more" in advise().result[0]
