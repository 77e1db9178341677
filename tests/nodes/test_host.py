"""What of the ComfyUI port can be tested without ComfyUI: versions, saving, checks before long work."""

import asyncio
import errno
import importlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from comfyui_port import load_port
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NODES = len(json.loads((ROOT / "tests" / "nodes" / "schemas.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def host():
    """nodes/host/ itself; under its own name the standalone host is loaded."""
    return load_port()


def fake_module(monkeypatch, name: str, **content) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        if i > 1:
            monkeypatch.setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[path], raising=False)
    for key, value in content.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


@pytest.mark.parametrize(
    ("text", "version"), [("0.33.0", (0, 33, 0)), ("0.12.1+local", (0, 12, 1)), ("0.3.64-rc1", (0, 3, 64))]
)
def test_the_version_is_read(host, monkeypatch, text, version):
    fake_module(monkeypatch, "comfyui_version", __version__=text)
    assert host.host_version() == version


def test_an_unknown_version_is_none(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    assert host.host_version() is None


@pytest.mark.parametrize(("version", "count"), [((0, 3, 64), 0), ((0, 11, 9), 0), ((0, 12, 0), NODES), (None, NODES)])
def test_an_old_host_gets_one_polite_line_and_no_nodes(monkeypatch, caplog, version, count):
    nodes = importlib.import_module("ernie_pack.nodes")
    importlib.import_module("ernie_pack.nodes.tournament")  # before: a file that is imported below keeps that host
    fake = SimpleNamespace(host_version=lambda: version, watch_queue=lambda look: None)
    monkeypatch.setattr(nodes, "host", fake)
    with caplog.at_level(logging.WARNING):
        extension = asyncio.run(sys.modules["ernie_pack"].comfy_entrypoint())
    assert len(asyncio.run(extension.get_node_list())) == count
    assert len(caplog.records) == (0 if count else 1)
    if not count:
        assert "need ComfyUI 0.12 or newer and this is 0." in caplog.text


@pytest.fixture
def png(host, monkeypatch, tmp_path):
    """png(disable_metadata) writes a picture and returns its path."""

    def write(disable_metadata: bool = False) -> Path:
        fake_module(monkeypatch, "comfy.cli_args", args=SimpleNamespace(disable_metadata=disable_metadata))
        image = torch.tensor([[[0.0, 0.5, 1.0], [-1.0, 2.0, 1.0]]])
        host.save_png(
            image,
            tmp_path / "a.png",
            prompt={"1": {}},
            extra_pnginfo={"workflow": {"nodes": []}},
            entries={"ernie_seed": "7"},
        )
        return tmp_path / "a.png"

    return write


def test_a_picture_carries_its_workflow(png):
    with Image.open(png()) as image:
        assert image.text == {"prompt": '{"1": {}}', "workflow": '{"nodes": []}', "ernie_seed": "7"}
        assert list(image.getdata()) == [(0, 127, 255), (0, 255, 255)]


def test_disable_metadata_is_honoured(png):
    with Image.open(png(disable_metadata=True)) as image:
        assert not image.text


def test_a_full_disk_leaves_nothing_half_written(host, png, monkeypatch, tmp_path):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host.pictures.os, "fsync", full)
    with pytest.raises(ErnieError, match=r"a\.png could not be written \(No space left on device\)"):
        png()
    assert list(tmp_path.iterdir()) == []


def network(width: int = 48):
    return SimpleNamespace(text_proj=SimpleNamespace(in_features=width), adaLN_modulation=object())


def model(channels: int = 128, **parts):
    objects = {"latent_format": SimpleNamespace(latent_channels=channels), "diffusion_model": network(), **parts}
    return SimpleNamespace(get_model_object=objects.__getitem__, model=SimpleNamespace())


def test_an_ernie_model_passes(host):
    assert host.models.check_model(model()).text_proj.in_features == 48


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the model is empty: connect Load Diffusion Model"),
        (
            model(channels=16),
            r"must be ERNIE-Image \(128 latent channels\), got SimpleNamespace \(16 latent channels\)",
        ),
        (model(diffusion_model=SimpleNamespace()), "or sample it with KSampler"),
    ],
    ids=["none", "channels", "flux2"],
)
def test_another_model_is_refused_before_sampling(host, value, message):
    with pytest.raises(ErnieError, match=message):
        host.models.check_model(value)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 16, 8, 8), r"latent \[batch, 128, .*got \[1, 16, 8, 8\].*make it with Empty Latent \(ERNIE\)"),
        (torch.zeros(1, 128, 1, 8, 8), r"got \[1, 128, 1, 8, 8\]"),
        (torch.full((1, 128, 2, 2), float("nan")), "holds NaN or infinite values"),
    ],
    ids=["channels", "video", "nan"],
)
def test_another_latent_is_refused_before_sampling(host, monkeypatch, samples, message):
    fake_module(monkeypatch, "comfy.sample")
    with pytest.raises(ErnieError, match=message):
        host.sampling.checked_latent(model(), {"samples": samples})


def test_another_conditioning_is_refused_before_sampling(host):
    with pytest.raises(ErnieError, match=r"positive \[batch, tokens, 48\] expected, got \[1, 3, 4096\]: another model"):
        host.sampling.check_conditioning(network(), "positive", [[torch.zeros(1, 3, 4096), {}]])


def test_an_empty_conditioning_is_refused_before_sampling(host):
    with pytest.raises(ErnieError, match="negative is empty: encode a prompt"):
        host.sampling.check_conditioning(network(), "negative", [])


def test_a_long_prompt_is_cut_with_a_count(host, caplog):
    tokenizer = host.text.ClipTokenizer(SimpleNamespace(encode=lambda text, max_tokens: list(range(3001))))
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer.tokenize_with_weights("x")[host.text.TOKENS_KEY]
    assert [len(section) for section in tokens] == [2048]
    assert "has 3001 tokens, the text encoder reads 2048: the last 953 are cut off" in caplog.text


def test_brackets_in_a_prompt_are_text(host):
    seen = []
    tokenizer = host.text.ClipTokenizer(SimpleNamespace(encode=lambda text, max_tokens: seen.append(text) or [1, 5]))
    assert tokenizer.tokenize_with_weights("(word:1.2)")[host.text.TOKENS_KEY] == [[(1, 1.0), (5, 1.0)]]
    assert seen == ["(word:1.2)"]


def test_weights_that_do_not_fit_are_counted_and_named(host):
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"file.x does not fit: 1 tensors missing \(bias\), 1 unknown \(other\)"):
        host.models.load_strictly(layer, {"weight": layer.weight, "other": layer.bias}, assign=False, what="file.x")
