"""The node over the table of teachers: what its widgets do, and what bad input is told."""

from __future__ import annotations

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.teachers import TeacherTable, read_table
from ernie_pack.nodes import lora as lora_nodes
from ernie_pack.nodes import teachers as teacher_nodes
from ernie_pack.standalone import host, load_node_classes

SETTINGS = {f"lora_{i}": "none" for i in range(1, 5)} | {"preset": "as written", "text": "", "blend": 0.0}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(**inputs) -> (table, picture, text) with the LoRAs hearts, ink and sub/glow in the folder."""
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    for name in ("hearts", "ink", "sub/glow"):
        (tmp_path / "loras" / f"{name}.safetensors").write_bytes(name.encode())
    monkeypatch.setattr(host, "session", host.Session(models=tmp_path, output=tmp_path / "out"))
    for module in (teacher_nodes, lora_nodes):
        monkeypatch.setattr(module, "host", host)
    node = load_node_classes()["ErnieTeacherTable"]

    def run(**inputs):
        return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**SETTINGS | inputs).result

    return run


def test_nothing_chosen_is_the_base_alone(table):
    found, picture, text = table()
    assert found == TeacherTable()
    assert text == ""
    assert picture.shape[0] == 1
    assert picture.shape[-1] == 3
    assert picture.dtype == torch.float32


@pytest.mark.parametrize("slot", ["lora_1", "lora_2", "lora_3", "lora_4"])
def test_every_slot_gives_a_teacher_with_its_file(table, tmp_path, slot):
    found, _, text = table(**{slot: "sub/glow.safetensors"}, preset="by tag")
    assert found.weights(tag="glow", sigma=0.5, term="CA") == {"glow": 1.0}
    assert found.teacher("glow").lora == str(tmp_path / "loras" / "sub" / "glow.safetensors")
    assert text == "teacher glow | sub/glow.safetensors\nglow | 1 - 0 | CA, DM | glow"


@pytest.mark.parametrize(
    ("preset", "asked"),
    [
        ("by noise level", {(0.9, "CA"): "hearts", (0.9, "DM"): "hearts", (0.1, "CA"): "ink"}),
        ("by term", {(0.9, "CA"): "hearts", (0.9, "DM"): "ink", (0.1, "CA"): "hearts"}),
    ],
)
def test_presets_take_the_loras_in_their_order(table, preset, asked):
    found = table(lora_1="hearts.safetensors", lora_3="ink.safetensors", preset=preset)[0]
    for (sigma, term), name in asked.items():
        assert found.weights(tag="", sigma=sigma, term=term) == {name: 1.0}


def test_the_text_says_more_and_its_report_is_taken_back(table):
    said = "teacher soft | ink.safetensors | strength 0.5\nposter | 1 - 0.5 | DM | soft 0.5, hearts 0.5"
    found, picture, text = table(lora_1="hearts.safetensors", text=said, blend=0.2)
    assert found.blend == 0.2
    assert found.weights(tag="poster", sigma=0.5, term="DM") == pytest.approx(
        {"soft": 0.25, "hearts": 0.25, "base": 0.5}
    )
    again, same, text_again = table(text=text)
    assert (again, text_again) == (found, text)
    assert torch.equal(picture, same)
    assert [rule.weights for rule in read_table(text).rules] == [rule.weights for rule in found.rules]


def test_a_file_that_was_trained_again_is_seen(table, tmp_path):
    node = load_node_classes()["ErnieTeacherTable"]
    chosen = SETTINGS | {"lora_1": "hearts.safetensors", "preset": "by tag"}
    before = node.fingerprint_inputs(**chosen)
    assert node.fingerprint_inputs(**chosen) == before
    (tmp_path / "loras" / "hearts.safetensors").write_bytes(b"trained again")
    assert node.fingerprint_inputs(**chosen) != before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"lora_1": "gone.safetensors", "preset": "by tag"}, r"'gone.safetensors' expected in .*it is not there"),
        ({"text": "teacher x | gone.safetensors\n* | * | * | x"}, r"'gone.safetensors' expected in"),
        ({"lora_1": "ink.safetensors"}, r"no rule asks ink"),
        (
            {"lora_1": "ink.safetensors", "lora_2": "ink.safetensors", "preset": "by tag"},
            r"two teachers are called 'ink'",
        ),
        ({"lora_1": "ink.safetensors", "preset": "by term"}, r"is for 2 LoRAs, got 1: ink"),
        ({"text": "what"}, r"line 1 of the table of teachers \('what'\): expected one of"),
        ({"blend": 1.5}, r"blend must lie between 0 \(a hard edge\) and 1, got 1.5"),
        ({"blend": float("nan")}, r"blend must lie between 0"),
    ],
    ids=["no file", "no file in the text", "idle", "twice", "too few", "nonsense", "too wide", "nan"],
)
def test_bad_input_is_named(table, inputs, message):
    with pytest.raises(ErnieError, match=message):
        table(**inputs)
