"""The loaders hand over what was chosen; nothing is downloaded unasked."""

import importlib

import pytest
from ernie_pack.ernie_core.errors import ErnieError

WIDGETS = {"weight_dtype": "default", "rope": "yarn", "load_enhancer": False, "download": False}


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Calls of the engine's find_or_download, which here finds nothing and fetches nothing."""
    module = importlib.import_module("ernie_pack.ernie_core.weights.download")
    calls = []

    def refuse(repo_id, models_folder, *, kinds, confirm, on_progress):
        calls.append((repo_id, models_folder, kinds, confirm))
        on_progress(1, 2, "file")
        return tmp_path / "fetched"

    monkeypatch.setattr(module, "find_or_download", refuse)
    return calls


def test_a_loader_reads_its_own_kind(run, recording):
    run("ErnieLoadDiffusionModel", model_name="a.safetensors", weight_dtype="bf16")
    run("ErnieLoadTextEncoder", encoder_name="a.safetensors", rope="plain")
    run("ErnieLoadPromptEnhancer", enhancer_name="b.safetensors")
    run("ErnieLoadVAE", vae_name="v1.safetensors", weight_dtype="fp32")
    made = [call for call in recording.calls if call[0].startswith("make_")]
    assert made == [
        ("make_model", "transformer of diffusion_models/a.safetensors", "bf16"),
        ("make_clip", "text_encoder of text_encoders/a.safetensors", "plain"),
        ("make_enhancer", "enhancer of text_encoders/b.safetensors"),
        ("make_vae", "vae of vae/v1.safetensors", "fp32"),
    ]


def test_all_at_once_reads_every_part_of_the_folder(run, recording, downloads):
    model, clip, vae, enhancer = run(
        "ErnieLoadImageModel", folder="official/", **(WIDGETS | {"load_enhancer": True})
    ).result
    assert (model, clip, vae) == ("MODEL", "CLIP", "VAE")
    assert enhancer is not None
    assert not downloads


def test_without_the_enhancer_its_weights_are_not_read(run, recording):
    assert run("ErnieLoadImageModel", folder="official/", **WIDGETS).result[3] is None
    assert not any(call[0] == "make_enhancer" for call in recording.calls)


@pytest.mark.parametrize("download", [False, True], ids=["off", "on"])
def test_a_repository_is_asked_for_with_the_users_consent_only(run, recording, downloads, tmp_path, download):
    run("ErnieLoadImageModel", folder="baidu/ERNIE-Image", **(WIDGETS | {"download": download}))
    assert downloads == [("baidu/ERNIE-Image", tmp_path / "models", ("transformer", "text_encoder", "vae"), download)]


def test_download_off_says_size_repository_and_folder(run, recording, tmp_path):
    with pytest.raises(ErnieError, match=r"baidu/ERNIE-Image is not complete in .*models.*ERNIE-Image: .*23\.9 GB"):
        run("ErnieLoadImageModel", folder="baidu/ERNIE-Image", **WIDGETS)


def test_a_folder_that_was_downloaded_elsewhere_is_used(run, recording, downloads, monkeypatch):
    monkeypatch.setattr(type(recording), "list_models", lambda self, kind: ["sub/ERNIE-Image/"])
    module = importlib.import_module("ernie_pack.ernie_core.weights.download")
    monkeypatch.setattr(module, "is_present", lambda folder, kind: True)
    run("ErnieLoadImageModel", folder="baidu/ERNIE-Image", **WIDGETS)
    assert not downloads
    assert ("make_vae", "vae of diffusion_models/sub/ERNIE-Image", "default") in recording.calls


def test_complete_folders_are_offered_before_repositories(node_classes, recording, tmp_path):
    official = tmp_path / "diffusion_models" / "official"
    official.mkdir(parents=True)
    (official / "model_index.json").touch()
    folder = next(i for i in node_classes["ErnieLoadImageModel"].GET_SCHEMA().inputs if i.id == "folder")
    assert folder.as_dict()["options"] == ["official/", "baidu/ERNIE-Image", "baidu/ERNIE-Image-Turbo"]
