"""XY Grid on networks in miniature: each cell is the picture that its settings make alone, nothing is made twice."""

import json

import pytest
import torch
from ernie_pack.ernie_core.batch import read_image
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.standalone import host, load_node_classes
from PIL import Image
from random_models import RELEASED_FILES, write_random_models
from safetensors import safe_open
from safetensors.torch import save_file

WIDGETS = {
    **{"prompt": "a red fox", "name": "grid", "negative": "bad", "width": 64, "height": 32, "preset": "custom"},
    **{"steps": 2, "cfg": 2.0, "shift": 4.0, "seed": 5, "x_axis": "none", "x_values": "", "y_axis": "none"},
    **{"y_values": "", "z_axis": "none", "z_values": "", "cell_px": 0, "collect": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Five files, two LoRAs, and one more transformer with other weights."""
    folder = write_random_models(tmp_path_factory.mktemp("models"))
    with safe_open(folder / RELEASED_FILES["transformer"], "pt") as file:
        tensors = {name: file.get_tensor(name) * 0.9 for name in file.keys()}  # noqa: SIM118
        save_file(tensors, folder / "diffusion_models" / "other.safetensors", metadata=file.metadata())
    return folder


@pytest.fixture
def node(models, tmp_path, monkeypatch):
    """node(id, **inputs) -> outputs, on the standalone host."""
    monkeypatch.setattr(host, "session", host.Session(models=models, output=tmp_path / "out", input=tmp_path))
    classes = load_node_classes()

    def call(node_id, **inputs):
        clone = classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        return clone.EXECUTE_NORMALIZED(**inputs).result

    return call


@pytest.fixture
def sockets(node):
    (model,) = node("ErnieLoadDiffusionModel", model_name="ernie-image.safetensors", weight_dtype="default")
    (clip,) = node("ErnieLoadTextEncoder", encoder_name="ministral-3-3b.safetensors", rope="yarn")
    (vae,) = node("ErnieLoadVAE", vae_name="flux2-vae.safetensors", weight_dtype="default")
    return {"model": model, "clip": clip, "vae": vae}


@pytest.fixture
def grid(node, sockets):
    """grid(**changes) -> (sheets, images, report)"""
    return lambda **changes: node("ErnieXYGrid", **(sockets | WIDGETS | changes))


@pytest.fixture
def alone(node, sockets):
    """alone(...) -> the picture of these settings, step by step through the other nodes."""

    def paint(model=None, prompt="a red fox", steps=2, cfg=2.0, shift=4.0, seed=5, sampler="euler"):
        encoded = {
            name: node("ErnieEncodePrompt", clip=sockets["clip"], prompt=text)[0]
            for name, text in (("positive", prompt), ("negative", "bad"))
        }
        (latent,) = node("ErnieEmptyLatent", size="custom", width=64, height=32, batch_size=1)
        settings = {
            "preset": "custom",
            "steps": steps,
            "cfg": cfg,
            "shift": shift,
            "seed": seed,
            "denoise": 1.0,
            "sampler": sampler,
        }
        (latent,) = node("ErnieSampler", model=model or sockets["model"], latent_image=latent, **encoded, **settings)
        return (host.decode(sockets["vae"], latent) * 255).to(torch.uint8)

    return paint


def as_bytes(image):
    return (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("axis", "values", "settings"),
    [
        ("seed", "5, 6", [{"seed": 5}, {"seed": 6}]),
        ("steps", "1, 3", [{"steps": 1}, {"steps": 3}]),
        ("cfg", "1, 3", [{"cfg": 1.0}, {"cfg": 3.0}]),
        ("shift", "1, 4", [{"shift": 1.0}, {"shift": 4.0}]),
        ("sampler", "euler, heun", [{"sampler": "euler"}, {"sampler": "heun"}]),
        ("prompt part", "red, blue", [{"prompt": "a red fox"}, {"prompt": "a blue fox"}]),
    ],
)
def test_each_cell_is_the_picture_that_its_settings_make_alone(grid, alone, axis, values, settings):
    _, images, _ = grid(x_axis=axis, x_values=values)
    assert len(images) == len(settings)
    for image, changes in zip(images, settings, strict=True):
        assert torch.equal(as_bytes(image), alone(**changes)), changes
    assert not torch.equal(images[0], images[1])


def test_loras_act_as_the_loader_node_does(grid, alone, node, sockets):
    _, images, _ = grid(
        x_axis="LoRA", x_values="none, my_style:0.5, my_style:0.5 + my_subject", y_axis="seed", y_values="5,6"
    )
    load = {"blocks": "", "start": 1.0, "end": 0.0, "allow_unmatched": False}
    one, _ = node("ErnieLoadLora", model=sockets["model"], lora_name="my_style.safetensors", strength=0.5, **load)
    two, _ = node("ErnieLoadLora", model=one, lora_name="my_subject.safetensors", strength=1.0, **load)
    for i, model in enumerate((None, one, two)):
        for j in (0, 1):
            assert torch.equal(as_bytes(images[3 * j + i]), alone(model=model, seed=5 + j)), (i, j)


def test_checkpoints_and_models_are_those_that_they_name(grid, alone, node):
    other = node("ErnieLoadDiffusionModel", model_name="other.safetensors", weight_dtype="default")[0]
    assert not torch.equal(alone(model=other), alone())
    _, images, _ = grid(x_axis="checkpoint", x_values="connected, other")
    assert [torch.equal(as_bytes(i), alone(model=m)) for i, m in zip(images, (None, other), strict=True)] == [True] * 2
    _, images, _ = grid(x_axis="model", x_values="1, 2:other", model_2=other, name="models")
    assert [torch.equal(as_bytes(i), alone(model=m)) for i, m in zip(images, (None, other), strict=True)] == [True] * 2


def test_the_enhancer_writes_the_prompt_where_it_is_on(grid, alone, node, tmp_path):
    (enhancer,) = node("ErnieLoadPromptEnhancer", enhancer_name="ernie-image-prompt-enhancer.safetensors")
    _, images, _ = grid(x_axis="enhancer", x_values="off, on", enhancer=enhancer, max_new_tokens=4)
    assert torch.equal(as_bytes(images[0]), alone())
    texts = [Image.open(p).info for p in (tmp_path / "out" / "grid").glob("*_5.png")]
    (written,) = (info["ernie_enhanced"] for info in texts if "ernie_enhanced" in info)
    assert torch.equal(as_bytes(images[1]), alone(prompt=written))


def test_the_enhancer_and_the_other_models_are_loaded_only_when_an_axis_needs_them(node):
    cls = load_node_classes()["ErnieXYGrid"]
    others = {"enhancer": None, "model_2": None, "x_axis": "seed", "y_axis": "none", "z_axis": "none"}
    assert cls.check_lazy_status(**others) == []
    assert cls.check_lazy_status(**(others | {"y_axis": "enhancer"})) == ["enhancer"]
    assert cls.check_lazy_status(**(others | {"z_axis": "model"})) == ["model_2"]


def test_a_second_run_makes_nothing_and_a_longer_axis_only_what_is_new(grid):
    first = grid(x_axis="seed", x_values="1-2", y_axis="cfg", y_values="1, 2")
    assert first[2].startswith("4 made, 0 already there")
    again = grid(x_axis="seed", x_values="1-2", y_axis="cfg", y_values="1, 2")
    assert again[2].startswith("0 made, 4 already there")
    assert torch.equal(first[0], again[0])
    longer = grid(x_axis="seed", x_values="1-3", y_axis="cfg", y_values="1, 2")
    assert longer[2].startswith("2 made, 4 already there")
    assert longer[0].shape[2] > first[0].shape[2]


def test_an_interrupted_grid_goes_on(grid, monkeypatch):
    from ernie_pack.nodes.rows import Studio

    announce = Studio.announce

    def stop(self, number, total, row):
        announce(self, number, total, row)
        if number == 3:
            raise Interrupted

    monkeypatch.setattr(Studio, "announce", stop)
    with pytest.raises(Interrupted):
        grid(x_axis="seed", x_values="1-4")
    monkeypatch.setattr(Studio, "announce", announce)
    assert grid(x_axis="seed", x_values="1-4")[2].startswith("2 made, 2 already there")


def test_sheets_hold_the_pictures_and_are_files_too(grid, tmp_path):
    sheets, images, report = grid(
        x_axis="seed", x_values="1-3", y_axis="cfg", y_values="1,2", z_axis="steps", z_values="1,2"
    )
    assert sheets.shape[0] == 2
    assert len(images) == 12
    height, width = sheets.shape[1:3]
    found = 0
    for z in range(2):
        sheet = as_bytes(sheets[z])
        for image in images[6 * z : 6 * z + 6]:
            pixels = as_bytes(image)[0]
            spots = (sheet[: height - 31, : width - 63] == pixels[0, 0]).all(-1).nonzero().tolist()
            found += any(torch.equal(sheet[y : y + 32, x : x + 64], pixels) for y, x in spots)
    assert found == 12
    files = sorted((tmp_path / "out" / "grid").glob("sheet_*.png"))
    named = [line.rpartition(" ")[2] for line in report.splitlines() if line.startswith("sheet ")]
    assert sorted(named) == [file.name for file in files]
    assert any(torch.equal(read_image(f), sheets[0]) for f in files)


def test_the_manifest_tells_what_each_file_is(grid, tmp_path):
    grid(x_axis="LoRA", x_values="none, my_style:0.5")
    lines = (tmp_path / "out" / "grid" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line).get("loras") for line in lines] == [None, [["my_style.safetensors", 0.5]]]


OTHERS = {
    **{"prompt": "a red cat", "name": "elsewhere", "negative": "worse", "width": 48, "height": 48, "steps": 3},
    **{"preset": "Turbo 8 / 1", "cfg": 3.0, "shift": 2.0, "seed": 6, "cell_px": 30, "collect": False},
    **{f"{letter}_values": "3, 7" for letter in "xyz"},
}
AXES = {"x_axis": "seed", "x_values": "1", "y_axis": "cfg", "y_values": "2", "z_axis": "shift", "z_values": "4"}


@pytest.mark.parametrize("widget", [*OTHERS, "x_axis", "y_axis", "z_axis"])
def test_every_widget_matters(grid, widget):
    axes = AXES if widget[1:] in ("_values", "_axis") else {}
    changed = OTHERS.get(widget, "steps")
    before, after = grid(**axes), grid(**(axes | {widget: changed}))
    assert [str(value) for value in before] != [str(value) for value in after]


def test_the_enhancers_length_matters(grid, node):
    (enhancer,) = node("ErnieLoadPromptEnhancer", enhancer_name="ernie-image-prompt-enhancer.safetensors")
    on = {"x_axis": "enhancer", "x_values": "on", "enhancer": enhancer}
    made = [grid(**on, max_new_tokens=n, name=str(n))[1][0] for n in (1, 6)]
    assert not torch.equal(*made)


def test_collect_off_hands_on_no_single_pictures(grid):
    assert grid(collect=False)[1] == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x_axis": "seed", "x_values": ""}, "the axis seed has no values"),
        ({"x_axis": "enhancer", "x_values": "off, on"}, "no enhancer is connected"),
        ({"x_axis": "model", "x_values": "1, 2"}, "1 to 1"),
        ({"x_axis": "LoRA", "x_values": "nothing"}, "no LoRA 'nothing'"),
        ({"x_axis": "checkpoint", "x_values": "nothing"}, "no model 'nothing'"),
        ({"x_axis": "prompt part", "x_values": "blue, green"}, "which the prompt does not hold"),
        ({"name": "../elsewhere"}, "name must be a folder inside the output folder"),
        ({"width": 50}, "multiple of 16"),
        ({"x_values": "1"}, "an axis that is none"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(grid, tmp_path, changes, reason):
    with pytest.raises(ErnieError, match=reason):
        grid(**changes)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_full_disk_leaves_nothing_half_written(grid, tmp_path, monkeypatch):
    import errno
    import os

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ErnieError, match="could not be written"):
        grid(x_axis="seed", x_values="1-2")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
