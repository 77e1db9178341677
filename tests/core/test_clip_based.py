"""Scorers from files: which kind a file is, what it needs beside it, and errors; the numbers are in tests/parity."""

import numpy as np
import pytest
import tiny_scorers as tiny
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.scoring.builtin import MEASURES
from ernie_pack.ernie_core.scoring.clip_based import KEPT_PROMPTS, Prompts, prepare_cropped, prepare_padded
from ernie_pack.ernie_core.scoring.files import list_weights
from ernie_pack.ernie_core.scoring.loading import find_builtin, list_builtin, load_scorer
from ernie_pack.ernie_core.scoring.network import read_weights
from safetensors.torch import save_file


def pictures(count=3):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder as people have it."""
    root = tmp_path_factory.mktemp("scorers")
    tiny.write_clip_folder(root / "PickScore_v1", features=32)
    tiny.write_clip_folder(root / "clip-vit-large-patch14", seed=1)
    torch.save(tiny.laion_head("mlp", 24), root / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save({"state_dict": tiny.open_clip_tensors()}, root / "HPS_v2.1_compressed.pt")
    tiny.write_clip_tokenizer(root / "tokenizer")
    tiny.write_internvl(root / "ERNIE-Image-Aes")
    (root / "reward").mkdir()
    vocabulary = tiny.write_bert_vocabulary(root / "reward")
    torch.save(tiny.image_reward_tensors(vocabulary), root / "reward" / "ImageReward.pt")
    return root


def test_files_and_folders_are_listed(models):
    assert list(list_weights(models)) == [
        "ERNIE-Image-Aes/",
        "HPS_v2.1_compressed.pt",
        "PickScore_v1/",
        "clip-vit-large-patch14/",
        "reward/ImageReward.pt",
        "sac+logos+ava1-l14-linearMSE.pth",
    ]
    assert list(list_weights(models / "nothing")) == []


@pytest.mark.parametrize(
    ("file", "name", "reads_prompt", "limits"),
    [
        ("PickScore_v1", "PickScore", True, (None, None)),
        ("clip-vit-large-patch14", "CLIP score", True, (0, 100)),
        ("HPS_v2.1_compressed.pt", "HPS v2", True, (-1, 1)),
        ("sac+logos+ava1-l14-linearMSE.pth", "LAION aesthetic", False, (None, None)),
        ("ERNIE-Image-Aes", "ERNIE-Image-Aes", False, (0, 100)),
        ("reward/ImageReward.pt", "ImageReward", True, (None, None)),
    ],
)
def test_what_a_file_is_follows_from_its_tensors(models, file, name, reads_prompt, limits):
    backbones = [models / n.rstrip("/") for n in list_weights(models)]
    scorer = load_scorer(models / file, backbones=backbones, tokenizer_folders=[models / "tokenizer"])
    assert (scorer.name, scorer.reads_prompt, scorer.higher_is_better) == (name, reads_prompt, True)
    assert (scorer.low, scorer.high) == limits
    batches = []
    values = scorer.score(pictures(), "a red fox", batch_size=2, on_scored=batches.append)
    assert (len(values), batches) == (3, [2, 3])
    assert all((limits[0] is None or v >= limits[0]) and (limits[1] is None or v <= limits[1]) for v in values)


def test_built_in_scorers_have_names():
    assert len(list_builtin()) == len(MEASURES)
    assert list_builtin()[0] == "built-in combined"
    assert all(find_builtin(name).name == name for name in list_builtin())
    assert find_builtin("x.pth") is None


def test_batches_change_nothing(models):
    scorer = load_scorer(models / "PickScore_v1")
    prompts = ["fox", "a boat", "fox"]
    alone = [scorer.score([i], p)[0] for i, p in zip(pictures(), prompts, strict=True)]
    assert scorer.score(iter(pictures()), iter(prompts), batch_size=3) == pytest.approx(alone, abs=1e-5)
    half = load_scorer(models / "PickScore_v1", precision="bf16").score(pictures(), prompts)
    assert half == pytest.approx(alone, abs=0.5)


def test_a_prompt_is_read_once(models, monkeypatch):
    scorer = load_scorer(models / "PickScore_v1")
    kept = Prompts(scorer.network, scorer.tokenizer)
    calls = []
    monkeypatch.setattr(scorer.network.text_model, "forward", spy(scorer.network.text_model.forward, calls))
    with torch.no_grad():
        kept.features(["a", "b", "a"], torch.device("cpu"))
        kept.features(["b", "a"], torch.device("cpu"))
        assert calls == [2]
        for i in range(KEPT_PROMPTS + 5):
            kept.features([f"p {i}"], torch.device("cpu"))
    assert len(kept._kept) == KEPT_PROMPTS


def spy(function, calls):
    def call(input_ids, **more):
        calls.append(len(input_ids))
        return function(input_ids, **more)

    return call


def test_a_long_prompt_is_cut_with_a_warning(models, caplog):
    scorer = load_scorer(models / "PickScore_v1")
    ids = Prompts(scorer.network, scorer.tokenizer).ids(["x" * 200, "x"])
    assert ids.shape == (2, 77)
    assert ids[0, -1] == ids[1, 2] == tiny.CLIP_VOCABULARY - 1
    assert "CLIP reads the first 77" in caplog.text


def test_pictures_are_cropped_or_padded():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255
    cropped, padded = prepare_cropped(picture), prepare_padded(picture)
    assert cropped.shape == padded.shape == (3, 224, 224)
    white = (1 - 0.48145466) / 0.26862954
    assert float(cropped[0, :, 2:-2].min()) == pytest.approx(white, abs=0.02), "only the middle third is left"
    assert float(padded[0].mean()) == pytest.approx(white / 9 + (-0.48145466 / 0.26862954) * 8 / 9, abs=0.05)
    for shape in ((1, 1), (1, 500), (700, 3), (224, 224)):
        for fit in (prepare_cropped, prepare_padded):
            assert fit(np.zeros((*shape, 3), np.uint8)).shape == (3, 224, 224)


def test_old_buffers_are_left_out(models, tmp_path):
    weights = read_weights(models / "PickScore_v1")
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    for name in ("config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((models / "PickScore_v1" / name).read_bytes())
    save_file({**{k: v.clone() for k, v in weights.tensors.items()}, **extra}, tmp_path / "model.safetensors")
    ours = load_scorer(tmp_path, kind="pickscore").score(pictures(), "fox")
    # Not to the bit: tensors read from two files lie differently in memory, and kernels follow.
    assert ours == pytest.approx(load_scorer(models / "PickScore_v1").score(pictures(), "fox"), abs=1e-5)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("ERNIE-Image-Aes", {"kind": "hpsv2"}, "set kind to auto"),
        ("sac+logos+ava1-l14-linearMSE.pth", {"kind": "clip"}, "set kind to auto"),
        ("PickScore_v1", {"kind": "nonsense"}, "kind must be one of"),
        ("PickScore_v1", {"precision": "int8"}, "precision int8 is for ERNIE-Image-Aes"),
        ("sac+logos+ava1-l14-linearMSE.pth", {}, "needs OpenAI's CLIP"),
        ("sac+logos+ava1-l14-linearMSE.pth", {"backbone": "PickScore_v1"}, "24 features, this one has 32"),
        ("sac+logos+ava1-l14-linearMSE.pth", {"backbone": "ERNIE-Image-Aes"}, "must be a CLIP"),
        ("HPS_v2.1_compressed.pt", {}, "has no tokenizer"),
        ("nowhere.pt", {}, "does not exist"),
        ("nowhere", {}, "does not exist"),
    ],
)
def test_what_is_wrong_is_said(models, file, options, message):
    if "backbone" in options:
        options = {"backbone": models / options["backbone"]}
    with pytest.raises(ErnieError, match=message):
        load_scorer(models / file, **options)


def write(folder, name, tensors):
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("dit.safetensors", {"layers.0.weight": torch.ones(2, 2)}, "no scorer that is known"),
        ("many.pth", {"weight": torch.ones(3, 8), "bias": torch.ones(3)}, "no scorer that is known"),
        ("a.pt", [1, 2], "no state dict"),
        ("empty.pt", {}, "no state dict"),
        (
            "vision.pt",
            {k: v for k, v in tiny.open_clip_tensors().items() if "visual" in k},
            "picture side of a CLIP only",
        ),
        ("less.pt", {k: v for k, v in tiny.open_clip_tensors().items() if "ln_post" not in k}, "2 tensors missing"),
        ("more.pt", tiny.open_clip_tensors() | {"score_predictor.w": torch.ones(1)}, "1 tensors that CLIP has not"),
        ("odd.pt", tiny.open_clip_tensors(width=96), "96 wide is none of the published"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, tensors, message):
    tiny.write_clip_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_scorer(write(tmp_path, name, tensors))


class Code:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="never run"):
        load_scorer(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_files(tmp_path, models):
    whole = (models / "HPS_v2.1_compressed.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.pt").write_bytes(b"")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><p>not found")
    for name in ("half.pt", "none.pt", "page.safetensors"):
        with pytest.raises(CheckpointError):
            load_scorer(tmp_path / name)


def test_a_tokenizer_of_another_model(models, tmp_path):
    import json

    for name in ("config.json", "model.safetensors", "merges.txt", "vocab.json"):
        (tmp_path / name).write_bytes((models / "PickScore_v1" / name).read_bytes())
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"zzz": len(vocabulary)}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="515 tokens, the model 514"):
        load_scorer(tmp_path)
