"""One picture of a batch of ten thousand, or of a grid, is made again bit for bit from the run's file alone."""

import json
import time

import pytest
from ernie_pack.ernie_core import batch
from ernie_pack.ernie_core.batch import file_name, hash_pixels
from ernie_pack.ernie_core.runs import RUN, read_run
from ernie_pack.standalone import cli
from random_models import write_random_models

ROW = 7_777
SIZE = {
    "width": 64,
    "height": 32,
    "preset": "custom",
    "steps": 2,
    "cfg": 2.0,
    "shift": 4.0,
    "seed": 3,
    "collect": False,
}
SOCKETS = {"model": ["4", 0], "clip": ["2", 0], "vae": ["3", 0]}
LORA = {"strength": 0.5, "blocks": "", "start": 1.0, "end": 0.0, "allow_unmatched": False}
GRAPH = {
    "1": ("ErnieLoadDiffusionModel", {"model_name": "ernie-image.safetensors", "weight_dtype": "default"}),
    "2": ("ErnieLoadTextEncoder", {"encoder_name": "ministral-3-3b.safetensors", "rope": "yarn"}),
    "3": ("ErnieLoadVAE", {"vae_name": "flux2-vae.safetensors", "weight_dtype": "default"}),
    "4": ("ErnieLoadLora", {"model": ["1", 0], "lora_name": "my_style.safetensors", **LORA}),
}
BATCH = (
    "ErnieBatchFromPrompts",
    SOCKETS | SIZE | {"source": "list.txt", "name": "many/foxes", "negative": "{bad|worse}"},
)
AXES = {"x_axis": "seed", "x_values": "1-3", "y_axis": "LoRA", "y_values": "none, my_subject:2", "z_axis": "none"}
GRID = (
    "ErnieXYGrid",
    SOCKETS | SIZE | AXES | {"prompt": "a fox", "name": "grid", "negative": "", "z_values": "", "cell_px": 0},
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(models, tmp_path):
    """run(node, *arguments) -> exit code of the command line, for a graph that ends in `node`."""
    (tmp_path / "list.txt").write_text("a {red|blue|green} {2$$fox|cat|owl}\n")

    def call(node, *arguments):
        graph = {k: {"class_type": t, "inputs": i} for k, (t, i) in (GRAPH | {"9": node}).items()}
        (tmp_path / "graph.json").write_text(json.dumps(graph))
        places = ("--models", str(models), "--out", str(tmp_path / "out"), "--input", str(tmp_path))
        return cli.main([str(tmp_path / "graph.json"), *places, *arguments])

    return call


@pytest.fixture
def remake(models, tmp_path):
    return lambda *arguments: cli.main(["remake", *map(str, arguments), "--models", str(models)])


def ten_thousand(run, monkeypatch):
    """A run of ten thousand rows, of which only one picture is made."""
    make = batch.run_rows
    with monkeypatch.context() as patch:
        patch.setattr(batch, "run_rows", lambda rows, *a, **k: make([rows[ROW - 1]], *a, **k))
        node = (BATCH[0], BATCH[1] | {"wildcards": True, "variations": 10_000})
        assert run(node) == 0


def test_row_7777_of_ten_thousand_is_made_again_bit_for_bit(run, remake, tmp_path, monkeypatch, capsys):
    ten_thousand(run, monkeypatch)
    folder = tmp_path / "out" / "many" / "foxes"
    row = read_run(folder).row(ROW)
    before = hash_pixels(folder / file_name(row))
    line = (folder / "manifest.jsonl").read_text()
    others = [json.dumps({**json.loads(line), "hash": f"{i:012}", "file": f"{i}.png"}) for i in range(9_999)]
    (folder / "manifest.jsonl").write_text("\n".join([*others, line]))
    (tmp_path / "list.txt").unlink()  # neither the list nor the other pictures are needed
    start = time.perf_counter()
    assert remake(folder / RUN, "--row", ROW) == 0
    seconds = time.perf_counter() - start
    assert "bit-equal to the picture of the run" in capsys.readouterr().out
    assert hash_pixels(folder / f"remade_{file_name(row)}") == before
    assert seconds < 20  # about 1 s on an idle core: nothing is read slowly


def test_it_is_made_again_elsewhere(run, remake, tmp_path, monkeypatch):
    ten_thousand(run, monkeypatch)
    folder = tmp_path / "out" / "many" / "foxes"
    assert remake(folder, "--row", ROW, "--out", tmp_path / "again") == 0
    (made,) = (tmp_path / "again").rglob("*.png")
    assert made.name.startswith("remade_")
    assert not list(folder.glob("remade_*"))


def test_a_cell_of_a_grid_is_made_again(run, remake, tmp_path):
    assert run(GRID) == 0
    folder = tmp_path / "out" / "grid"
    for number in (1, 6):
        assert remake(folder, "--row", number) == 0
    run_file = json.loads((folder / RUN).read_text())
    assert [m["name"] for m in run_file["models"]][-2:] == ["my_style.safetensors", "my_subject.safetensors"]
    assert len(run_file["models"]) == 5
    assert run_file["made_with"]["host"] == "standalone"


def test_another_picture_is_said_with_what_changed(run, remake, tmp_path, capsys):
    assert run((BATCH[0], BATCH[1] | {"source": "one\ntwo"})) == 0
    folder = tmp_path / "out" / "many" / "foxes"
    values = json.loads((folder / RUN).read_text())
    values["prompt"]["4"]["inputs"]["strength"] = -1.0
    values["made_with"]["torch"] = "1.0"
    (folder / RUN).write_text(json.dumps(values))
    assert remake(folder, "--row", 2) == 1
    assert "not the picture of the run: torch was 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(("row", "reason"), [("3", "rows 1 to 2"), ("0", "rows 1 to 2")])
def test_bad_rows_are_refused(run, remake, tmp_path, capsys, row, reason):
    assert run((BATCH[0], BATCH[1] | {"source": "one\ntwo"})) == 0
    assert remake(tmp_path / "out" / "many" / "foxes", "--row", row) == 2
    assert reason in capsys.readouterr().err


def test_a_missing_run_is_refused(remake, tmp_path, capsys):
    assert remake(tmp_path, "--row", "1") == 2
    assert "cannot be read" in capsys.readouterr().err
