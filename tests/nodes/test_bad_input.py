"""What a user is told about bad input, through the nodes and on real networks in miniature.

Each message says what was expected, what came, and what to do.
"""

import errno
import importlib
import json
import logging
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError, Interrupted
from ernie_pack.ernie_core.weights.checkpoint import (
    Component,
    read_component,
    save_folder_component,
    save_single_file,
    write_safetensors,
)
from ernie_pack.standalone import host, load_node_classes
from PIL import Image
from random_models import DIT, RELEASED_FILES, write_random_models
from safetensors import SafetensorError

WIDTH = DIT.text_in_dim
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Good single files under their released names."""
    return write_random_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def official(models, tmp_path_factory) -> Path:
    """The same networks as an official folder; the transformer in shards."""
    folder = tmp_path_factory.mktemp("official")
    for kind, name in RELEASED_FILES.items():
        component = read_component(models / name, kind)
        size = sum(tensor.nbytes for tensor in component.state_dict.values())
        save_folder_component(component, folder, max_shard_bytes=size // 2)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def classes(models) -> dict[str, type]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "session", host.Session(models=models))  # the loaders' widgets list its files
        return load_node_classes()


@pytest.fixture
def root(tmp_path) -> Path:
    """A models folder to put bad files into."""
    return tmp_path / "models"


@pytest.fixture
def node(classes, models, root, tmp_path, monkeypatch):
    """node(node_id, **inputs) -> outputs. Reads `root` if a test has made it, else the good models."""
    (tmp_path / "input").mkdir()

    def call(node_id: str, **inputs):
        used = root if root.exists() else models
        session = host.Session(models=used, output=tmp_path / "out", input=tmp_path / "input")
        monkeypatch.setattr(host, "session", session)
        clone = classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {"UNIQUE_ID": "7"}})
        return clone.EXECUTE_NORMALIZED(**inputs).result

    return call


@pytest.fixture(scope="module")
def loaded(classes, models) -> dict:
    """MODEL, CLIP, VAE and ERNIE_ENHANCER, loaded once by the nodes."""
    sockets = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "session", host.Session(models=models))
        for slot in FILE_SLOTS:
            clone = classes[slot.node].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
            name = Path(RELEASED_FILES[slot.kind]).name
            sockets[slot.socket] = clone.EXECUTE_NORMALIZED(**{slot.input: name}, **slot.widgets).result[0]
    return sockets


# --- loader slots ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place that a weight file is chosen for: a widget of a loader, or a part of a whole folder."""

    node: str
    input: str
    kind: str
    socket: str
    part: str
    """Its sub-folder in an official folder."""
    folder: str
    """Its folder among the host's models."""
    expected: str
    advice: str
    widgets: dict

    def __str__(self) -> str:
        return self.kind if self.folder else f"folder-{self.kind}"


_LOADERS = (
    ("ErnieLoadDiffusionModel", "model_name", "model", "transformer", {"weight_dtype": "default"}),
    ("ErnieLoadTextEncoder", "encoder_name", "clip", "text_encoder", {"rope": "yarn"}),
    ("ErnieLoadPromptEnhancer", "enhancer_name", "enhancer", "pe", {}),
    ("ErnieLoadVAE", "vae_name", "vae", "vae", {"weight_dtype": "default"}),
)
_EXPECTED = (
    ("an ERNIE-Image transformer", "ernie-image.safetensors or ernie-image-turbo.safetensors"),
    ("an ERNIE-Image text encoder", "ministral-3-3b.safetensors"),
    ("an ERNIE-Image prompt enhancer", "ernie-image-prompt-enhancer.safetensors"),
    (r"a FLUX\.2 VAE", "flux2-vae.safetensors"),
)
WHOLE = {"weight_dtype": "default", "rope": "yarn", "load_enhancer": True, "download": False}

FILE_SLOTS = [
    Slot(
        node=node_id,
        input=name,
        kind=kind,
        socket=socket,
        part=part,
        folder=RELEASED_FILES[kind].partition("/")[0],
        expected=expected,
        advice=advice,
        widgets=widgets,
    )
    for (node_id, name, socket, part, widgets), (expected, advice), kind in zip(
        _LOADERS, _EXPECTED, RELEASED_FILES, strict=True
    )
]
FOLDER_SLOTS = [
    Slot(**(vars(slot) | {"node": "ErnieLoadImageModel", "input": "folder", "folder": "", "widgets": WHOLE}))
    for slot in FILE_SLOTS
]

every_slot = pytest.mark.parametrize("slot", FILE_SLOTS + FOLDER_SLOTS, ids=str)
every_file_slot = pytest.mark.parametrize("slot", FILE_SLOTS, ids=str)


@pytest.fixture
def load(node, root, official, monkeypatch):
    """load(slot, content) puts the bytes, or the good file they came from, into the slot and runs its loader."""

    def refuse(*_, **__):
        pytest.fail("a network was built before every file was checked")

    def put(slot: Slot, content: bytes | Path, name: str = "chosen.safetensors"):
        if slot.folder:
            target = root / slot.folder / name
        else:
            copy_folder(official, root / "whole")
            for file in (root / "whole" / slot.part).glob("*.safetensors*"):
                file.unlink()
            target, name = root / "whole" / slot.part / name, "whole/"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return run(slot, name)

    def run(slot: Slot, name: str):
        for maker in ("make_model", "make_clip", "make_vae", "make_enhancer"):
            monkeypatch.setattr(host, maker, refuse)
        return node(slot.node, **{slot.input: name}, **slot.widgets)

    put.run = run
    return put


def copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def test_the_good_files_load(node, models, official, root):
    """So that whatever the tests below see is the doing of the bad file."""
    for slot in FILE_SLOTS:
        assert node(slot.node, **{slot.input: Path(RELEASED_FILES[slot.kind]).name}, **slot.widgets)
    copy_folder(official, root / "whole")
    assert None not in node("ErnieLoadImageModel", folder="whole/", **WHOLE)


# of other models, as their files name them
STRANGERS = {
    "LoRA": (["diffusion_model.layers.0.self_attention.to_q.lora_A.weight"], "a LoRA or another adapter"),
    "FLUX": (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "a FLUX transformer"),
    "SDXL": (
        ["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
        "an SDXL checkpoint",
    ),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
    "CLIP": (["text_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP text encoder"),
    "Qwen3": (
        ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.post_attention_layernorm.weight"],
        "a Qwen3 language model",
    ),
    "unknown": (["foo"], r"nothing this pack knows \(1 tensors; first are foo\)"),
}


@every_slot
@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_models_file_is_named(load, tmp_path, slot, stranger):
    keys, looks_like = STRANGERS[stranger]
    write_safetensors({key: torch.zeros(4, 4) for key in keys}, tmp_path / "a.safetensors")
    message = f"must be {slot.expected}, but it looks like {looks_like}.*Choose a file such as {slot.advice}"
    with pytest.raises(CheckpointError, match=message):
        load(slot, tmp_path / "a.safetensors")


@every_slot
def test_a_vae_of_another_family_is_named(load, tmp_path, slot):
    write_safetensors({"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "a.safetensors")
    message = f"must be {slot.expected}, but it looks like an SD or SDXL VAE without the batch-norm statistics"
    with pytest.raises(CheckpointError, match=message):
        load(slot, tmp_path / "a.safetensors")


LOOKS_LIKE = {
    "transformer": "an ERNIE-Image transformer",
    "text_encoder": r"a Mistral language model \(text encoder or prompt enhancer\)",
    "vae": r"a FLUX\.2 VAE",
}


@pytest.mark.parametrize(
    ("slot", "other"),
    [
        pytest.param(slot, other, id=f"{slot}-{other}")
        for slot in FILE_SLOTS + FOLDER_SLOTS
        for other in LOOKS_LIKE
        if other != slot.kind and (other, slot.kind) != ("text_encoder", "enhancer")
    ],
)
def test_our_own_files_in_the_wrong_slot_are_named(load, models, slot, other):
    message = f"must be {slot.expected}, but it looks like {LOOKS_LIKE[other]}.*Choose a file such as {slot.advice}"
    with pytest.raises(CheckpointError, match=message):
        load(slot, models / RELEASED_FILES[other])


def test_the_enhancer_in_the_text_encoders_folder_is_used_with_a_warning(node, official, root, caplog):
    """The two have the same tensors; only evidence beside the weights tells them apart."""
    copy_folder(official, root / "official")
    shutil.rmtree(root / "official" / "text_encoder")
    copy_folder(root / "official" / "pe", root / "official" / "text_encoder")
    with caplog.at_level(logging.WARNING):
        node("ErnieLoadTextEncoder", encoder_name="official/", rope="yarn")
    assert "looks like an ERNIE-Image prompt enhancer, but is used as an ERNIE-Image text encoder" in caplog.text


@every_slot
def test_a_file_that_lacks_tensors_says_how_many_and_which(load, models, tmp_path, slot):
    component = read_component(models / RELEASED_FILES[slot.kind], slot.kind)
    weights = dict(component.state_dict)
    name = next(name for name in reversed(weights) if name.startswith(("layers.1", "decoder.up_blocks.1")))
    del weights[name]
    weights["foo"] = torch.zeros(1)
    values = {k: getattr(component, k) for k in ("kind", "config", "tokenizer", "source")}
    save_single_file(Component(**values, state_dict=weights), tmp_path / "a.safetensors")
    message = (
        rf"1 tensors are missing \({name}\), 1 are extra \(foo\), 0 have the wrong shape.*nearest known layout is "
        rf"{slot.expected}.*Download it again, or choose one such as {slot.advice}"
    )
    with pytest.raises(CheckpointError, match=message):
        load(slot, tmp_path / "a.safetensors")


@every_slot
@pytest.mark.parametrize("cut", ["in the weights", "in the header", "after ten bytes"])
def test_a_truncated_file_says_both_sizes(load, models, slot, cut):
    whole = (models / RELEASED_FILES[slot.kind]).read_bytes()
    size = {"in the weights": len(whole) - 100, "in the header": 500, "after ten bytes": 10}[cut]
    message = rf"is truncated: its header (promises|needs) \d+ bytes, the file has {size}; download it again"
    with pytest.raises(CheckpointError, match=message):
        load(slot, whole[:size])


DISGUISES = {
    "zero bytes": (b"", r"is empty \(0 bytes\); download it again"),
    "checkpoint": (b"PK\x03\x04" + b"\0" * 99, r"not a safetensors file: .*checkpoint \(.ckpt, .pt\); convert it"),
    "pickle": (pickle.dumps({"a": "b" * 99}), r"not a safetensors file: .*pickle .*can run code; convert it"),
    "web page": (b"<!DOCTYPE html><html>log in first</html>", "not a safetensors file: this is a web page.*repeat it"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "not a safetensors file: this is a Git LFS pointer, download the file itself",
    ),
    "GGUF": (b"GGUF" + b"\0" * 99, "not a safetensors file: GGUF is not supported.*use a GGUF pack's loader"),
    "text": (b"Not Found, or something else" * 9, "not a safetensors file, whatever its name says; download it again"),
    "damaged header": (b"\x14" + b"\0" * 7 + b'{"a": nothing at all', "its header is damaged.*download it again"),
}


@every_slot
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_renamed_file_is_recognised(load, slot, disguise):
    content, message = DISGUISES[disguise]
    with pytest.raises(CheckpointError, match=message):
        load(slot, content)


@every_file_slot
@pytest.mark.parametrize(("suffix", "disguise"), [("ckpt", "checkpoint"), ("pt", "pickle"), ("gguf", "GGUF")])
def test_other_formats_under_their_own_names_are_refused(load, slot, suffix, disguise):
    content, message = DISGUISES[disguise]
    with pytest.raises(CheckpointError, match=message.removeprefix("not a safetensors file: ")):
        load(slot, content, f"chosen.{suffix}")


@every_file_slot
def test_a_file_that_is_gone_lists_what_there_is(load, root, slot):
    (root / slot.folder).mkdir(parents=True)
    (root / slot.folder / "other.safetensors").touch()
    with pytest.raises(ErnieError, match=r"'gone\.safetensors' expected in .*not there; there are: other\.safetens"):
        load.run(slot, "gone.safetensors")


# a part of an official folder, chosen in its own loader or in Load ERNIE-Image


@every_slot
def test_a_missing_shard_is_named(load, official, root, slot):
    copy_folder(official, root / "official")
    lost = sorted((root / "official" / slot.part).glob("*-of-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d shards are missing: {lost.name}; download them"):
        load.run(slot, "official/")


@every_slot
def test_a_config_that_contradicts_the_weights_names_the_field(load, official, root, slot):
    shutil.copytree(official, root / "official")
    file = root / "official" / slot.part / "config.json"
    config = json.loads(file.read_text())
    field = {"transformer": "num_layers", "vae": "latent_channels"}.get(slot.kind, "intermediate_size")
    config.get("text_config", config)[field] = 7
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config.json says {field} 7, the weights say \d+\. Download it again"):
        load.run(slot, "official/")


@every_slot
@pytest.mark.parametrize(
    ("left", "message"),
    [
        (None, r"has no \.safetensors file; download the folder again"),
        ("model.bin", r"has no \.safetensors file \(only model\.bin, which is not read\); download the folder"),
    ],
    ids=["empty", "other-format"],
)
def test_a_folder_without_weights_says_so(load, official, root, slot, left, message):
    copy_folder(official, root / "official")
    for file in (root / "official" / slot.part).iterdir():
        file.unlink()
    if left:
        (root / "official" / slot.part / left).write_bytes(b"1")
    with pytest.raises(CheckpointError, match=rf"{slot.part} {message}"):
        load.run(slot, "official/")


@pytest.mark.parametrize("slot", FOLDER_SLOTS, ids=str)
def test_a_folder_that_lacks_a_part_names_it(load, official, root, slot):
    copy_folder(official, root / "official")
    shutil.rmtree(root / "official" / slot.part)
    message = f"has no folder {slot.part}, where {slot.expected} should be; download it"
    if slot.kind == "transformer":  # without it, this is no folder of diffusion models at all
        message = r"'official/' expected in .*diffusion_models, it is not there.*choose another"
    with pytest.raises(ErnieError, match=message):
        load.run(slot, "official/")


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (1000, 1024, "width must be a multiple of 16, got 1000; use 992 or 1008"),
        (1024, 1001, "height must be a multiple of 16, got 1001; use 992 or 1008"),
        (1024, 8, "height must be a multiple of 16, got 8; use 16"),
        (0, 1024, "width must be a multiple of 16, got 0; use 16"),
    ],
)
def test_a_size_that_does_not_fit_names_the_nearest_that_do(node, width, height, message):
    with pytest.raises(ErnieError, match=message):
        node("ErnieEmptyLatent", size="custom", width=width, height=height, batch_size=1)


def test_a_batch_of_a_size_that_does_not_fit_names_the_nearest_that_do(batch):
    message = r"no usable row \(row 1: width must be a multiple of 16, got 1000; use 992 or 1008.*Correct these rows"
    with pytest.raises(ErnieError, match=message):
        batch("one", width=1000)


# --- prompts -----------------------------------------------------------------------------------------------


@pytest.fixture
def encode(node, loaded):
    return lambda prompt: node("ErnieEncodePrompt", clip=loaded["clip"], prompt=prompt)[0]


@pytest.fixture
def sampler(node, loaded, encode):
    """sampler(**changes) -> LATENT of two steps on 32 x 32 pixels."""

    def call(**changes):
        inputs = {"model": loaded["model"], "latent_image": {"samples": torch.zeros(1, 128, 2, 2)}, "seed": 1}
        inputs |= {"preset": "custom", "steps": 2, "cfg": 2.0, "shift": 4.0, "denoise": 1.0}
        inputs |= {name: encode("") for name in ("positive", "negative") if name not in changes}
        return node("ErnieSampler", **(inputs | changes))[0]

    return call


def test_an_empty_prompt_is_one_token_and_paints(encode, sampler, caplog):
    with caplog.at_level(logging.WARNING):
        conditioning = encode("")
        samples = sampler(positive=conditioning)["samples"]
    assert conditioning[0][0].shape == (1, 1, WIDTH)
    assert samples.isfinite().all()
    assert not caplog.records


def test_a_prompt_of_3000_tokens_is_cut_with_a_warning_that_counts(encode, sampler, caplog):
    with caplog.at_level(logging.WARNING):
        conditioning = encode("a" * 2999)  # a token each, and the one in front
    assert conditioning[0][0].shape == (1, 2048, WIDTH)
    assert "has 3000 tokens; only the first 2048 are used, the last 952 are cut off" in caplog.text
    assert sampler(positive=conditioning)["samples"].isfinite().all()


def test_a_prompt_of_2048_tokens_is_not_cut(encode, caplog):
    with caplog.at_level(logging.WARNING):
        assert encode("a" * 2047)[0][0].shape == (1, 2048, WIDTH)
    assert not caplog.records


@pytest.mark.parametrize(
    "emoji", ["\U0001f34e", "\U0001f468\u200d\U0001f469\u200d\U0001f467\ufe0f"], ids=["one", "joined"]
)
def test_a_prompt_of_10000_emoji_works(encode, sampler, caplog, emoji):
    with caplog.at_level(logging.WARNING):
        conditioning = encode((emoji * 10_000)[:10_000])
    assert conditioning[0][0].shape == (1, 2048, WIDTH)
    assert "only the first 2048 are used" in caplog.text
    assert sampler(positive=conditioning)["samples"].isfinite().all()


@pytest.mark.parametrize(
    "prompt", ["cut \ud83d", "\udf4e cut", "\0", "\n\t "], ids=["half", "other-half", "nul", "space"]
)
def test_odd_characters_in_a_prompt_work(encode, prompt):
    assert encode(prompt)[0][0].isfinite().all()


def test_an_emoji_in_two_halves_is_the_emoji(encode):
    assert torch.equal(encode("\ud83c\udf4e")[0][0], encode("\U0001f34e")[0][0])


# --- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_with_nan_is_refused_before_sampling(sampler, monkeypatch, value):
    monkeypatch.setattr(host, "_make_denoise", lambda *_: pytest.fail("sampling began"))
    samples = torch.zeros(1, 128, 2, 2)
    samples[0, 5, 1, 1] = value
    message = "latent of finite numbers expected, this one holds NaN or infinite values; look at the node that made it"
    with pytest.raises(ErnieError, match=message):
        sampler(latent_image={"samples": samples})


def test_a_model_that_paints_nan_says_where_to_look(sampler, loaded, monkeypatch):
    bias = loaded["model"].dit.final_linear.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, float("nan")))
    with pytest.raises(
        ErnieError, match=r"ended in NaN or infinite values. Look for NaN in the input latent, a broken LoRA"
    ):
        sampler()


OTHER_LATENTS = [(1, 4, 8, 8), (1, 16, 8, 8), (1, 32, 8, 8), (1, 128, 1, 2, 2), (1, 64, 16)]


@pytest.mark.parametrize("shape", OTHER_LATENTS, ids=str)
def test_a_latent_of_another_model_is_refused(sampler, shape):
    message = (
        rf"a latent \[batch, 128, .* expected, got \[{', '.join(map(str, shape))}\]: .*another model's; make it with"
    )
    with pytest.raises(ErnieError, match=message):
        sampler(latent_image={"samples": torch.zeros(shape)})


@pytest.mark.parametrize("shape", OTHER_LATENTS, ids=str)
def test_a_latent_of_another_model_is_not_decoded(node, loaded, shape):
    with pytest.raises(ErnieError, match=r"a latent \[batch, 128, .* expected, got .*another model's; make it with"):
        node("VAEDecode", samples={"samples": torch.zeros(shape)}, vae=loaded["vae"])


def test_core_samplers_refuse_the_same(node, loaded, encode):
    inputs = {"model": loaded["model"], "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "denoise": 1.0}
    inputs |= {"scheduler": "simple", "positive": encode(""), "negative": encode("")}
    with pytest.raises(ErnieError, match=r"a latent \[batch, 128, .* expected, got \[1, 4, 8, 8\]"):
        node("KSampler", **inputs, latent_image={"samples": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize("name", ["positive", "negative"])
@pytest.mark.parametrize("shape", [(1, 77, 768), (1, 77, 2048), (1, 512, 4096), (1, 3, WIDTH + 1), (1, WIDTH)], ids=str)
def test_conditioning_of_another_model_is_refused(sampler, name, shape):
    came = ", ".join(map(str, shape))
    message = (
        rf"{name} \[batch, tokens, {WIDTH}\] expected, got \[{came}\]: another model's text encoder made it; "
        "encode the prompt with Load Text Encoder"
    )
    with pytest.raises(ErnieError, match=message):
        sampler(**{name: [[torch.zeros(shape), {"pooled_output": None}]]})


def test_conditioning_with_nan_is_refused(sampler):
    features = torch.full((1, 3, WIDTH), float("nan"))
    with pytest.raises(ErnieError, match=r"positive of finite numbers expected, it holds NaN .*look at the node"):
        sampler(positive=[[features, {}]])


@pytest.mark.parametrize("count", [0, 2])
def test_combined_conditioning_is_refused_by_count(sampler, encode, count):
    message = f"one conditioning expected as negative without ComfyUI, {count} came; run this in ComfyUI"
    with pytest.raises(ErnieError, match=message):
        sampler(negative=encode("") * count)


def test_a_missing_negative_is_asked_for(sampler):
    message = (
        "cfg 2 compares with a negative prompt, but the input negative is not connected. Connect Encode Prompt with an "
        "empty text, or set cfg to 1"
    )
    with pytest.raises(ErnieError, match=message):
        sampler(negative=None)


def test_without_cfg_no_negative_is_needed(sampler):
    assert sampler(negative=None, cfg=1.0)["samples"].isfinite().all()


# --- batches -----------------------------------------------------------------------------------------------


@pytest.fixture
def batch(node, loaded):
    """batch(source, **changes) -> (images, report), one step on 32 x 32 pixels."""

    def call(source, **changes):
        widgets = {"name": "run", "negative": "", "width": 32, "height": 32, "preset": "custom", "steps": 1}
        widgets |= {"cfg": 1.0, "shift": 4.0, "seed": 1, "collect": True}
        sockets = {name: loaded[name] for name in ("model", "clip", "vae")}
        return node("ErnieBatchFromPrompts", **sockets, source=source, **(widgets | changes))[:2]

    return call


CSV = """prompt,width,seed,steps
a red apple,32,1,
,32,2,
a pear,1000,3,
a plum,160000,4,
a fig,32,red,
a date,32,-1,
a lime,32,5,1000000000
a kiwi, ripe,32,6,
a blue bowl,48,7,
"""
CSV_TROUBLES = [
    "row 2: has no prompt",
    "row 3: width must be a multiple of 16, got 1000; use 992 or 1008",
    "row 4: width and height must be at most 8192, got 160000 and 32",
    "row 5: seed must be a whole number, got 'red'",
    "row 6: seed must lie between 0 and 18446744073709551615, got -1",
    "row 7: steps must be at most 1000, got 1000000000",
    "row 8: has 5 cells, the header has 4; put a prompt with commas in double quotes",
]
JSONL = '{"prompt": "a red apple"}\n{broken\n["a pear"]\n{"prompt": "a fig", "sed": 3}\n{"prompt": "a blue bowl"}\n'
JSONL_TROUBLES = [
    "row 2: is not JSON",
    'row 3: must be an object such as {"prompt": "a red apple"}',
    "row 4: has unknown columns sed; known are prompt, negative, seed",
]


@pytest.mark.parametrize(
    ("name", "content", "troubles"), [("list.csv", CSV, CSV_TROUBLES), ("list.jsonl", JSONL, JSONL_TROUBLES)]
)
def test_unreadable_rows_are_named_and_the_good_ones_run(batch, tmp_path, name, content, troubles):
    (tmp_path / "input" / name).write_text(content)
    images, report = batch(name)
    assert len(images) == 2
    assert report.startswith(f"2 made, 0 already there, {len(troubles)} not usable")
    for trouble in troubles:
        assert trouble in report
    assert len(list((tmp_path / "out" / "run").glob("*.png"))) == 2


def test_unreadable_files_of_a_folder_are_named_and_the_good_ones_run(batch, tmp_path):
    folder = tmp_path / "input" / "lists"
    (folder / "a folder.csv").mkdir(parents=True)
    (folder / "b.txt").write_bytes("a pear".encode("utf-16"))
    (folder / "c.csv").write_text("text\na pear")
    (folder / "d.txt").write_text("a blue bowl")
    images, report = batch("lists")
    assert len(images) == 1
    assert "a folder.csv: cannot be read (" in report
    assert "b.txt row 1: is not UTF-8 text; save the file as UTF-8" in report
    assert "c.csv header: needs a column named prompt, got text" in report


def test_a_damaged_picture_of_an_earlier_run_is_named(batch, tmp_path):
    batch("one\ntwo")
    picture = sorted((tmp_path / "out" / "run").glob("*.png"))[0]
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ErnieError, match=rf"{picture.name} cannot be read as a picture .*Delete it and run again"):
        batch("one\ntwo")
    picture.unlink()
    assert batch("one\ntwo")[1].startswith("1 made, 1 already there")


def test_an_interrupt_keeps_the_pictures_that_were_finished(batch, tmp_path, monkeypatch):
    """The user stops while the second of three is sampled; the next run makes only what is missing."""

    def show_text(_node_id, text):
        host.session.interrupted = text.startswith("2 of 3")

    with monkeypatch.context() as patch:
        patch.setattr(host, "show_text", show_text)
        with pytest.raises(Interrupted):
            batch("one\ntwo\nthree")
    kept = list((tmp_path / "out" / "run").glob("*.png"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    images, report = batch("one\ntwo\nthree")
    assert len(images) == 3
    assert report.startswith("2 made, 1 already there, 0 not usable")
    assert kept[0].stat().st_mtime_ns == before


def test_an_interrupted_enhancer_remembers_no_half_text(node, loaded, monkeypatch):
    widgets = {"prompt": "a cat", "enabled": True, "width": 64, "height": 64, "seed": 0, "temperature": 0.6}
    widgets |= {"top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 6}
    shown = []

    def show_text(_node_id, text):
        shown.append(text)
        host.session.interrupted = len(shown) == 2

    with monkeypatch.context() as patch:
        patch.setattr(host, "show_text", show_text)
        with pytest.raises(Interrupted):
            node("ErnieEnhancePrompt", enhancer=loaded["enhancer"], **widgets)
    enhanced, original, *_ = node("ErnieEnhancePrompt", enhancer=loaded["enhancer"], **widgets)
    assert original == "a cat"
    assert len(enhanced) > len(shown[-1])


# --- full disk ---------------------------------------------------------------------------------------------


def fill_disk(monkeypatch, moment: str, *, after: int = 0) -> None:
    """Let the disk be full from the `after`-th picture on, when a file is opened, written or flushed."""
    left = after

    def full_after(real):
        def act(*args, **options):
            nonlocal left
            if left <= 0:
                if moment == "written":
                    args[1].write(b"\x89PNG\r\n\x1a\n half a picture")
                raise FULL
            left -= 1
            return real(*args, **options)

        return act

    owner, name = {
        "opened": ("tempfile", "mkstemp"),
        "written": ("PIL.Image", "Image.save"),
        "flushed": ("os", "fsync"),
    }[moment]
    target = importlib.import_module(owner)
    *path, name = name.split(".")
    for part in path:
        target = getattr(target, part)
    monkeypatch.setattr(target, name, full_after(getattr(target, name)))


@pytest.mark.parametrize("moment", ["opened", "written", "flushed"])
def test_a_full_disk_leaves_no_half_picture(node, tmp_path, monkeypatch, moment):
    node("SaveImage", images=torch.zeros(1, 16, 16, 3), filename_prefix="a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fill_disk(monkeypatch, moment)
    message = (
        r"a_00002_\.png could not be written \(No space left on device\)\. Free some space or choose another folder"
    )
    with pytest.raises(ErnieError, match=message):
        node("SaveImage", images=torch.ones(1, 16, 16, 3), filename_prefix="a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# flushed: each picture, then its line in the manifest
@pytest.mark.parametrize(("moment", "after"), [("opened", 1), ("written", 1), ("flushed", 2), ("flushed", 3)])
def test_a_batch_on_a_full_disk_keeps_what_it_has_and_goes_on_later(batch, tmp_path, monkeypatch, moment, after):
    with monkeypatch.context() as patch:
        fill_disk(patch, moment, after=after)
        with pytest.raises(ErnieError, match=r"could not be written \(No space left on device\)\. Free some space"):
            batch("one\ntwo\nthree")
    folder = tmp_path / "out" / "run"
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.endswith(".part")]
    for picture in folder.glob("*.png"):
        with Image.open(picture) as image:
            image.load()
    images, report = batch("one\ntwo\nthree")
    assert len(images) == 3
    assert report.startswith(("2 made, 1 already there", "1 made, 2 already there"))
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    assert len({json.loads(line)["hash"] for line in lines}) == 3


@pytest.mark.parametrize("moment", ["begun", "written", "flushed"])
@pytest.mark.parametrize("kind", ["text_encoder", "vae"])
def test_a_full_disk_keeps_the_old_weights_and_leaves_no_half_file(models, tmp_path, monkeypatch, kind, moment):
    path = tmp_path / "models" / RELEASED_FILES[kind]
    component = read_component(models / RELEASED_FILES[kind], kind)
    save_single_file(component, path)
    before = path.read_bytes()

    def full(*args, **_):
        raise FULL

    def stops_half_way(_tensors, file, metadata):
        Path(file).write_bytes(before[: len(before) // 2])
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if moment == "begun":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    elif moment == "written":
        monkeypatch.setattr("safetensors.torch.save_file", stops_half_way)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ErnieError, match=rf"the disk is full: .*{path.name} needs \d+ bytes .*Nothing was written"):
        save_single_file(component, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_folder_that_met_a_full_disk_is_not_taken_for_a_whole_one(node, models, root, monkeypatch):
    component = read_component(models / RELEASED_FILES["transformer"], "transformer")
    calls = 0
    fsync = os.fsync

    def full_at_the_second(descriptor):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise FULL
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_at_the_second)
        with pytest.raises(ErnieError, match="the disk is full"):
            save_folder_component(component, root / "half", max_shard_bytes=100_000)
    (root / "half" / "model_index.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"not an ERNIE-Image transformer: the tensor .* missing\. Download it again"
    ):
        node("ErnieLoadDiffusionModel", model_name="half/", weight_dtype="default")
