"""Reading: every layout gives back what was written, and each wrong file gets the message that helps."""

import dataclasses
import errno
import json
import logging
import os
import pickle
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.model.enhancer import Enhancer
from ernie_pack.ernie_core.model.text_encoder import TextEncoder, Tokenizer
from ernie_pack.ernie_core.weights import checkpoint
from ernie_pack.ernie_core.weights.checkpoint import (
    build_enhancer,
    build_text_encoder,
    build_transformer,
    build_vae,
    read_component,
    read_header,
    save_folder_component,
    save_single_file,
    write_safetensors,
)
from ernie_pack.ernie_core.weights.layouts import KINDS, PREFIXES
from ernie_pack.ernie_core.weights.quantise import LayerQuantisation, quantise_fp8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_components import DIT, assert_same_weights, make_component
from tiny_text import tekken_bytes

LANGUAGE = ("text_encoder", "enhancer")
TOKENIZER_JSON = Tokenizer.from_tekken(tekken_bytes()).to_json()


@pytest.fixture(scope="module")
def made():
    return {kind: make_component(kind) for kind in KINDS}


def rewrite(source: Path, target: Path, change) -> Path:
    """Copy a safetensors file with `change(tensors)` applied; its metadata is kept."""
    with safe_open(str(source), framework="pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, metadata=metadata)
    return target


def assert_reads_back(path, original):
    found = read_component(path, original.kind)
    assert found.kind == original.kind
    assert found.source == Path(path)
    assert {k: found.config[k] for k in original.config} == original.config
    assert_same_weights(found.state_dict, original.state_dict)
    return found


@pytest.mark.parametrize("layout", ["comfyui", "official"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_reads_back(tmp_path, made, kind, layout):
    save_single_file(made[kind], tmp_path / "a.safetensors", layout=layout)
    found = assert_reads_back(tmp_path / "a.safetensors", made[kind])
    assert found.tokenizer == (made[kind].tokenizer if layout == "comfyui" else None)


@pytest.mark.parametrize(("kind", "prefix"), [(kind, prefix) for kind in KINDS for prefix in PREFIXES[kind]])
def test_every_prefix_reads_back(tmp_path, made, kind, prefix):
    save_single_file(made[kind], tmp_path / "a.safetensors", prefix=prefix)
    assert_reads_back(tmp_path / "a.safetensors", made[kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_storage_type_reads_back_as_it_is(tmp_path, kind, dtype):
    component = make_component(kind, dtype)
    save_single_file(component, tmp_path / "a.safetensors")
    assert assert_reads_back(tmp_path / "a.safetensors", component).quantisation is None


@pytest.mark.parametrize("max_shard_bytes", [None, 60_000])
@pytest.mark.parametrize("kind", KINDS)
def test_an_official_folder_reads_back_from_root_sub_folder_and_file(tmp_path, made, kind, max_shard_bytes):
    component = made[kind]
    if kind in LANGUAGE:
        component = dataclasses.replace(component, tokenizer=TOKENIZER_JSON)
    sub = save_folder_component(component, tmp_path, max_shard_bytes=max_shard_bytes)
    (tmp_path / "model_index.json").write_text("{}")
    files = sorted(sub.glob("*.safetensors"))
    assert len(files) == 1 if max_shard_bytes is None else len(files) > 1
    for path in (tmp_path, sub, files[0]):
        assert assert_reads_back(path, component).tokenizer == component.tokenizer


def test_a_full_checkpoint_gives_each_of_its_parts(tmp_path, made):
    tensors = {}
    for kind, prefix in (
        ("transformer", "model.diffusion_model."),
        ("text_encoder", "text_encoders.ministral3_3b.transformer.model."),
        ("vae", "vae."),
    ):
        save_single_file(made[kind], tmp_path / kind, prefix=prefix)
        tensors |= load_file(tmp_path / kind)
    metadata = {"config": json.dumps(made["text_encoder"].config)}
    tensors |= {"text_encoders.ministral3_3b.logit_scale": torch.ones(())}
    save_file(tensors, tmp_path / "all.safetensors", metadata=metadata)
    for kind in ("transformer", "text_encoder", "vae"):
        found = read_component(tmp_path / "all.safetensors", kind)
        assert_same_weights(found.state_dict, made[kind].state_dict)


def test_unused_parts_of_a_text_encoder_file_are_left_out(tmp_path, made):
    save_single_file(made["text_encoder"], tmp_path / "a.safetensors")
    unused = {"vision_tower.ln_pre.weight": torch.ones(4), "multi_modal_projector.norm.weight": torch.ones(4)}
    path = rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", lambda t: t.update(unused))
    assert_reads_back(path, made["text_encoder"])


def test_a_file_without_config_is_read_from_its_shapes(tmp_path, made):
    for kind in ("transformer", "vae"):
        save_single_file(made[kind], tmp_path / "a.safetensors")
        bare = tmp_path / "b.safetensors"
        save_file(load_file(tmp_path / "a.safetensors"), bare)
        assert_reads_back(bare, made[kind])


def test_a_vae_file_may_lack_the_batch_counter(tmp_path, made):
    save_single_file(made["vae"], tmp_path / "a.safetensors")
    drop = lambda tensors: tensors.pop("bn.num_batches_tracked")  # noqa: E731
    path = rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", drop)
    assert_reads_back(path, made["vae"])


def test_tensors_are_views_of_the_file_until_used(tmp_path, made):
    save_single_file(made["transformer"], tmp_path / "a.safetensors")
    found = read_component(tmp_path / "a.safetensors", "transformer")
    module = build_transformer(found)
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == found.state_dict[name].data_ptr(), name


def test_attention_of_a_bfl_file_is_stored_as_convolutions(tmp_path, made):
    save_single_file(made["vae"], tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert tensors["decoder.mid.attn_1.proj_out.bias"].shape == (16,)


# --- quantised -------------------------------------------------------------------------------------------------------


def quantised(component):
    """fp8 with scales on every matrix inside the blocks."""
    state_dict, layers = dict(component.state_dict), {}
    for name, tensor in component.state_dict.items():
        if name.startswith("layers.") and tensor.ndim == 2:
            stored, scale = quantise_fp8(tensor)
            layer = name.removesuffix(".weight")
            state_dict[name] = stored
            layers[layer] = LayerQuantisation(options={"format": "float8_e4m3fn"}, tensors={"weight_scale": scale})
    return dataclasses.replace(component, state_dict=state_dict, quantisation=layers)


def as_written(form, prefix):
    """A function that turns the comfy_quant layout of a file into another one."""

    def change(tensors):
        markers = [key for key in tensors if key.endswith(".comfy_quant")]
        if form in ("metadata", "scaled_fp8", "bare"):
            for key in markers:
                del tensors[key]
        if form == "scaled_fp8":
            for key in [key for key in tensors if key.endswith(".weight_scale")]:
                tensors[key.removesuffix("weight_scale") + "scale_weight"] = tensors.pop(key)
            tensors[prefix + "scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)

    return change


@pytest.mark.parametrize("form", ["comfy_quant", "metadata", "scaled_fp8", "bare"])
@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("transformer", ""),
        ("transformer", "model.diffusion_model."),
        ("text_encoder", "model."),
        ("enhancer", "model."),
    ],
)
def test_scaled_fp8_reads_back_and_no_marker_remains(tmp_path, made, kind, prefix, form):
    component = quantised(made[kind])
    save_single_file(component, tmp_path / "a.safetensors", prefix=prefix)
    path = rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", as_written(form, prefix))
    if form == "metadata":
        layers = {prefix + layer: dict(how.options) for layer, how in component.quantisation.items()}
        metadata = {"config": json.dumps(component.config), "_quantization_metadata": json.dumps({"layers": layers})}
        save_file(load_file(path), path, metadata=metadata)
    found = assert_reads_back(path, component)
    assert found.quantisation == component.quantisation


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float8_e4m3fn], ids=str)
def test_building_multiplies_the_scales_in(made, dtype):
    component = quantised(made["transformer"])
    module = build_transformer(component, dtype=dtype)
    weight = module.layers[1].mlp.gate_proj.weight
    true = made["transformer"].state_dict["layers.1.mlp.gate_proj.weight"]
    assert weight.dtype is (dtype if dtype is torch.float32 else torch.bfloat16)
    assert (weight.float() - true).abs().max() <= 2**-4 * true.abs().max()


def test_a_packed_format_is_read_but_not_built(tmp_path, made):
    component = made["transformer"]
    layer = "layers.0.mlp.up_proj"
    rows, columns = component.state_dict[f"{layer}.weight"].shape
    packed = dict(component.state_dict) | {f"{layer}.weight": torch.zeros(rows, columns // 2, dtype=torch.uint8)}
    scales = {"weight_scale": torch.ones(rows, columns // 16), "weight_scale_2": torch.ones(())}
    layers = {layer: LayerQuantisation(options={"format": "nvfp4"}, tensors=scales)}
    save_single_file(dataclasses.replace(component, state_dict=packed, quantisation=layers), tmp_path / "a.safetensors")
    found = read_component(tmp_path / "a.safetensors", "transformer")
    assert found.quantisation[layer].format == "nvfp4"
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the weights are quantised as nvfp4.*host's own loader"):
        build_transformer(found)


def test_another_programs_quantisation_is_named(tmp_path, made):
    save_single_file(made["transformer"], tmp_path / "a.safetensors")
    extra = {"layers.0.mlp.up_proj.weight.absmax": torch.ones(4)}
    path = rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", lambda t: t.update(extra))
    with pytest.raises(CheckpointError, match="is quantised with bitsandbytes"):
        read_component(path, "transformer")


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_built_networks_hold_the_weights(made, dtype):
    transformer = build_transformer(made["transformer"], dtype=dtype)
    assert isinstance(transformer, DiT)
    assert transformer.config == DIT
    wanted = {name: tensor.to(dtype) for name, tensor in made["transformer"].state_dict.items()}
    assert_same_weights(transformer.state_dict(), wanted)
    encoder, tokenizer = build_text_encoder(made["text_encoder"], dtype=dtype)
    assert isinstance(encoder, TextEncoder)
    assert len(encoder.layers) == 3
    assert not hasattr(encoder, "norm")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, made["text_encoder"].state_dict[name].to(dtype))
    assert encoder.encode_ids([tokenizer.encode("the")])[0].shape == (2, 48)
    enhancer = build_enhancer(made["enhancer"], dtype=dtype)
    assert isinstance(enhancer, Enhancer)
    wanted = {name: tensor.to(dtype) for name, tensor in made["enhancer"].state_dict.items()}
    assert_same_weights(enhancer.state_dict(), wanted)


def test_a_built_vae_keeps_fp32_statistics_and_runs_in_channels_last(made):
    vae = build_vae(made["vae"], dtype=torch.bfloat16)
    assert vae.bn.running_mean.dtype is torch.float32
    assert torch.equal(vae.bn.running_var, made["vae"].state_dict["bn.running_var"])
    assert vae.encoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert not vae.training
    assert vae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).shape == (1, 16, 2, 2)


@pytest.mark.parametrize(
    ("stored", "kind", "built"),
    [
        (torch.float16, "transformer", torch.bfloat16),
        (torch.float8_e5m2, "transformer", torch.bfloat16),
        (torch.float32, "transformer", torch.float32),
        (torch.float16, "vae", torch.float16),
        (torch.float16, "text_encoder", torch.bfloat16),
    ],
)
def test_the_default_type_is_one_to_compute_in(stored, kind, built):
    assert checkpoint.stored_dtype(make_component(kind, stored)) is built


def test_a_component_of_another_kind_is_not_built(made):
    with pytest.raises(ErnieError, match=r"expected an ERNIE-Image transformer, got a FLUX.2 VAE"):
        build_transformer(made["vae"])


def test_a_component_that_lost_a_tensor_is_not_built(made):
    state_dict = {k: v for k, v in made["transformer"].state_dict.items() if k != "final_linear.bias"}
    component = dataclasses.replace(made["transformer"], state_dict=state_dict | {"foo": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(final_linear.bias\), 1 extra \(foo\)"):
        build_transformer(component)


def test_a_language_model_without_tokenizer_says_where_it_should_be(tmp_path, made):
    save_single_file(made["text_encoder"], tmp_path / "a.safetensors", layout="official")
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*tensor tekken_model.*tokenizer/tokenizer\.json"):
        build_text_encoder(read_component(tmp_path / "a.safetensors", "text_encoder"))


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\); download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "this is a Git LFS pointer, download"),
        (b"PK\x03\x04" + b"\0" * 90, r"zip archive or PyTorch checkpoint \(\.ckpt, \.pt\); convert it to safetensors"),
        (pickle.dumps({"a": "b" * 99}), "a Python pickle"),
        (b"GGUF" + b"\0" * 90, "GGUF is not supported by this loader yet; use a GGUF pack's loader"),
        (b"\n<!DOCTYPE html><html><body>404 not found, please log in first", "a web page, not the file"),
        (b"hello", "not a safetensors file, whatever its name says"),
        (b"hello world, this is a text of more than 8 bytes", "not a safetensors file, whatever its name says"),
        (struct.pack("<Q", 1000) + b"{" + b" " * 50, "truncated: its header needs 1008 bytes, the file has 59"),
        (struct.pack("<Q", 20) + b'{"a": nothing at all', r"its header is damaged"),
        (struct.pack("<Q", 20) + b'{"a": [1, 2, 3]    }', r"its header is damaged"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:24],
)
def test_files_in_disguise_are_recognised(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_component(path, "transformer")


def test_a_gguf_file_is_refused_by_its_name(tmp_path):
    (tmp_path / "ernie-image-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF is not supported by this loader yet"):
        read_component(tmp_path / "ernie-image-Q8_0.gguf", "transformer")


def test_a_truncated_file_is_refused_with_its_sizes(tmp_path, made):
    path = tmp_path / "a.safetensors"
    save_single_file(made["transformer"], path)
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(CheckpointError, match=f"promises {size} bytes, the file has {size - 100}"):
        read_component(path, "transformer")


def test_a_missing_path_and_an_unknown_kind(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_component(tmp_path / "nowhere.safetensors", "vae")
    with pytest.raises(ErnieError, match="kind must be one of transformer, text_encoder, enhancer, vae, got 'unet'"):
        read_component(tmp_path, "unet")


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_ours_is_named(tmp_path, made, kind):
    names = {"transformer": "ERNIE-Image transformer", "vae": r"FLUX\.2 VAE"}
    other = "transformer" if kind == "vae" else "vae"
    save_single_file(made[other], tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"must be an? .*, but it looks like an? {names[other]}"):
        read_component(tmp_path / "a.safetensors", kind)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"diffusion_model.layers.0.adaLN_sa_ln.lora_A.weight": (4, 4)}, "looks like a LoRA or another adapter"),
        ({"double_blocks.0.a": (1,), "single_blocks.0.b": (1,)}, "looks like a FLUX transformer"),
        ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "an SD or SDXL VAE without the batch-norm statistics"),
        ({"foo": (1,)}, r"nothing this pack knows \(1 tensors; first are foo\)"),
    ],
    ids=["lora", "flux", "sd-vae", "unknown"],
)
def test_strangers_are_named(tmp_path, tensors, message):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_component(tmp_path / "a.safetensors", "transformer")


def test_missing_extra_and_misshapen_tensors_are_counted_and_shown(tmp_path, made):
    save_single_file(made["transformer"], tmp_path / "a.safetensors", prefix="diffusion_model.")

    def spoil(tensors):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            for layer in (0, 1):
                del tensors[f"diffusion_model.layers.{layer}.self_attention.{name}.weight"]
        tensors["diffusion_model.foo"] = torch.ones(1)
        tensors["bar"] = torch.ones(1)
        tensors["diffusion_model.final_linear.bias"] = torch.ones(9)

    path = rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", spoil)
    with pytest.raises(CheckpointError) as caught:
        read_component(path, "transformer")
    message = str(caught.value)
    assert "8 tensors are missing (layers.0.self_attention.to_q.weight, " in message
    assert message.count("self_attention") == 5
    assert "2 are extra (foo, bar)" in message
    assert "1 have the wrong shape (final_linear.bias [9] instead of [8])" in message
    assert "nearest known layout is an ERNIE-Image transformer, prefix 'diffusion_model.'" in message


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("transformer", "hidden_size", 128),
        ("transformer", "num_layers", 36),
        ("transformer", "text_in_dim", 3072),
        ("vae", "latent_channels", 32),
        ("vae", "layers_per_block", 2),
        ("text_encoder", "vocab_size", 131072),
        ("enhancer", "intermediate_size", 9216),
    ],
)
def test_a_config_that_contradicts_the_weights_names_the_field(tmp_path, made, kind, field, value):
    sub = save_folder_component(made[kind], tmp_path)
    config = json.loads((sub / "config.json").read_text())
    config.get("text_config", config)[field] = value
    if field == "hidden_size":
        config["rope_axes_dim"] = [8, 12, 12]
    (sub / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{field} {value}, the weights say"):
        read_component(tmp_path, kind)


def test_a_damaged_config_is_named(tmp_path, made):
    sub = save_folder_component(made["vae"], tmp_path)
    (sub / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        read_component(tmp_path, "vae")


def test_folders_without_the_files_say_what_is_missing(tmp_path, made):
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        read_component(tmp_path, "vae")
    save_folder_component(made["vae"], tmp_path)
    with pytest.raises(CheckpointError, match=r"has no folder transformer \(only vae\)"):
        read_component(tmp_path, "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no folder pe, where an ERNIE-Image prompt enhancer should be"):
        read_component(tmp_path, "enhancer")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.bin").write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file \(only model\.bin, which is not read\)"):
        read_component(tmp_path, "transformer")


def test_a_folder_of_single_files_asks_to_choose(tmp_path, made):
    for name in ("a", "b"):
        save_single_file(made["vae"], tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"has 2 \.safetensors files and no index.*choose one"):
        read_component(tmp_path, "vae")


def test_shards_must_all_be_there_and_agree_with_the_index(tmp_path, made):
    sub = save_folder_component(made["transformer"], tmp_path, max_shard_bytes=60_000)
    first, second, *_ = sorted(sub.glob("*.safetensors"))
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ shards are missing: {second.name}"):
        read_component(tmp_path, "transformer")
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"index.json and its shards disagree"):
        read_component(tmp_path, "transformer")
    second.write_bytes(whole)
    read_component(tmp_path, "transformer")
    next(sub.glob("*.index.json")).write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read_component(tmp_path, "transformer")


@pytest.mark.parametrize(("kind", "used_as"), [("text_encoder", "enhancer"), ("enhancer", "text_encoder")])
def test_a_language_model_in_the_other_place_is_used_with_a_warning(tmp_path, made, caplog, kind, used_as):
    sub = save_folder_component(made[kind], tmp_path)
    with caplog.at_level(logging.WARNING):
        found = read_component(sub, used_as)
        assert "looks like" in caplog.text
        caplog.clear()
        read_component(sub, kind)
        assert not caplog.records
    assert_same_weights(found.state_dict, made[kind].state_dict)


def test_a_config_in_the_metadata_that_is_another_programs_is_left_alone(tmp_path, made, caplog):
    save_single_file(made["transformer"], tmp_path / "a.safetensors")
    for config, said in (('{"transformer": {}}', "of another kind"), ("{", "not JSON")):
        save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata={"config": config})
        assert_reads_back(tmp_path / "b.safetensors", made["transformer"])
        assert said in caplog.text


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(ErnieError, match=r"the disk is full: .*a\.safetensors needs 400 bytes"):
        write_safetensors({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors({"a": torch.zeros(1)}, path)
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(ErnieError, match="the disk is full"):
        write_safetensors({"a": torch.zeros(100)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_a_single_file_needs_a_tekken_tokenizer(tmp_path, made):
    component = dataclasses.replace(made["enhancer"], tokenizer=TOKENIZER_JSON)
    with pytest.raises(ErnieError, match=r"bytes of a tekken\.json"):
        save_single_file(component, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_header_of_a_written_file(tmp_path, made):
    save_single_file(made["text_encoder"], tmp_path / "a.safetensors")
    shapes, metadata = read_header(tmp_path / "a.safetensors")
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (128, 48)
    assert shapes["tekken_model"] == (len(tekken_bytes()),)
    assert json.loads(metadata["config"])["head_dim"] == 32
