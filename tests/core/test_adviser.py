"""The hardware adviser: choices on cards that are not here, memory against written-out sums, files by their headers."""

import math
from types import SimpleNamespace

import pytest
import torch
from ernie_pack.ernie_core import cli
from ernie_pack.ernie_core.adviser import (
    CARDS,
    Machine,
    advise,
    amd_generation,
    nvidia_generation,
    read_machine,
    stage_need,
    with_card,
)
from ernie_pack.ernie_core.adviser_rules import FORMATS, RULES, VERDICTS, rule_for
from ernie_pack.ernie_core.config import DiTConfig, VAEConfig
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.model.vae import VAE
from ernie_pack.ernie_core.weights.inventory import Found, look, look_at_all
from random_models import write_random_models
from safetensors.torch import load_file, save_file

GENERATIONS = (
    *("blackwell", "hopper", "ada", "ampere", "turing", "volta", "older", "rdna4", "rdna3", "rdna2", "rdna1", "cdna"),
    *("amd", "apple", "arc", "cpu"),
)
SIZES = {"bf16": 16_067_025_160, "fp16": 16_067_025_160, "fp8": 8_220_000_000, "int8": 8_220_000_000}
SIZES |= {"nvfp4": 4_780_000_000}


def shapes_of(make):
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in make().state_dict().items()}


@pytest.fixture(scope="module")
def dit_shapes():
    return shapes_of(lambda: DiT(DiTConfig()))


@pytest.fixture(scope="module")
def vae_shapes():
    return shapes_of(lambda: VAE(VAEConfig()))


@pytest.fixture(scope="module")
def transformer(dit_shapes):
    """A released transformer in these numbers."""
    return lambda format, name=None: Found(
        name=name or f"{format}.safetensors", kind="transformer", format=format, bytes=SIZES[format], shapes=dit_shapes
    )


@pytest.fixture(scope="module")
def decoder(vae_shapes):
    return Found(name="flux2-vae", kind="vae", format="bf16", bytes=168_000_000, shapes=vae_shapes)


def language_model(kind="enhancer", format="bf16", size=6_857_000_000):
    shapes = {f"layers.{i}.self_attn.k_proj.weight": (1024, 3072) for i in range(26)} | {"norm.weight": (3072,)}
    return Found(name=f"{kind} {format}", kind=kind, format=format, bytes=size, shapes=shapes)


def machine(generation="ampere", card_gb=24.0, **changes):
    vendor = {"rdna": "amd", "cdna": "amd", "amd": "amd", "apple": "apple", "arc": "intel", "cpu": "cpu"}
    found = next((v for start, v in vendor.items() if generation.startswith(start)), "nvidia")
    return Machine(vendor=found, name=generation, generation=generation, card_gb=card_gb, **{"ram_gb": 64.0} | changes)


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_kind_of_card_has_a_rule_for_all_numbers(generation, format):
    rule = rule_for(generation, format)
    assert rule.verdict in VERDICTS
    assert len(rule.why) > 10
    assert rule.source


def test_every_row_of_the_table_can_be_reached():
    reached = {id(rule_for(generation, format)) for generation in GENERATIONS for format in FORMATS}
    assert {id(rule) for rule in RULES} == reached
    assert {name for rule in RULES for name in rule.on} <= set(GENERATIONS)


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (machine("blackwell", 32, cuda=(13, 0)), "nvfp4"),
        (machine("ada", 24), "int8"),
        (machine("ampere", 24), "int8"),
        (machine("ampere", 12), "int8"),
        (machine("turing", 16), "int8"),
        (machine("hopper", 141), "bf16"),
        (machine("rdna4", 16), "fp8"),
        (machine("rdna3", 24), "bf16"),
        (machine("rdna3", 16), "fp8"),
        (machine("apple", 64), "bf16"),
        (machine("apple", 16), "int8"),
        (machine("arc", 16), "fp8"),
        (machine("cpu", 0, ram_gb=64.0), "bf16"),
    ],
    ids=lambda value: f"{value.generation} {value.card_gb}" if isinstance(value, Machine) else None,
)
def test_what_is_chosen_of_all_published_files(transformer, where, wanted):
    files = [transformer(format) for format in ("bf16", "fp16", "fp8", "int8", "nvfp4")]
    for order in (files, files[::-1]):
        (chosen,) = [c for c in advise(where, order, 1024, 1024).choices if c.chosen]
        assert chosen.found.format == wanted


@pytest.mark.parametrize(
    ("where", "format", "said"),
    [
        (machine("ampere"), "fp8", "30-series cards have no fp8 units.*0.84 it/s"),
        (machine("ampere"), "fp16", "65504"),
        (machine("cpu"), "fp16", "65504"),
        (machine("rdna3"), "int8", "slower than fp8.*#14777"),
        (machine("rdna2"), "int8", "crash the driver"),
        (machine("apple"), "fp8", "does not have support for that dtype"),
        (machine("turing"), "bf16", "no bf16 units"),
        (machine("ada", ram_gb=8.0), "int8", r"main memory \(8.0 GB\) is smaller than the largest file"),
        (machine("blackwell", cuda=(12, 8)), "nvfp4", "built for CUDA 12.8; 13 is needed"),
        (machine("ampere", cuda=(12, 8)), "int8", "built for CUDA 12.8; 13 is needed"),
        (machine("ampere"), "bf16", r"a file in int8 \(8.2 GB\) would do better here than bf16.safetensors"),
        (machine("ampere", 12), "bf16", "does not fit 11.0 GB: streamed"),
    ],
)
def test_warnings(transformer, where, format, said):
    import re

    text = advise(where, [transformer(format)], 1024, 1024).report()
    assert re.search(said, text), text


def test_no_warning_where_all_is_well(transformer, decoder):
    files = [transformer("int8"), decoder, language_model("text_encoder")]
    advice = advise(machine("ampere", 24, cuda=(13, 0)), files, 1024, 1024)
    assert advice.warnings == ()
    assert all(c.chosen and c.fits for c in advice.choices)


def test_files_that_main_memory_holds_only_in_turn(transformer):
    files = [transformer("bf16"), language_model("text_encoder"), language_model()]
    said = advise(machine("ampere", 24, ram_gb=24.0), files, 1024, 1024).warnings
    assert any("does not hold all files at once (29.8 GB)" in warning for warning in said)


def test_base_and_turbo_are_chosen_each(transformer):
    files = [transformer("bf16"), transformer("int8"), transformer("int8", "turbo-int8"), transformer("fp8", "Turbo")]
    chosen = {c.found.name for c in advise(machine("ampere"), files, 1024, 1024).choices if c.chosen}
    assert chosen == {"int8.safetensors", "turbo-int8"}


def test_of_encoders_the_most_exact_that_fits():
    both = [language_model("text_encoder"), language_model("text_encoder", "fp8", 3_800_000_000)]
    for card, wanted in ((12, "bf16"), (7, "fp8")):
        (chosen,) = [c for c in advise(machine("ampere", card), both, 1024, 1024).choices if c.chosen]
        assert chosen.found.format == wanted


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_transformer_s_memory_is_the_written_out_sum(transformer):
    need = stage_need(transformer("bf16"), 1024, 1024, text_tokens=256)
    assert need.weights == pytest.approx(16.067, abs=1e-3)
    assert need.activations == pytest.approx(15 * (64 * 64 + 256) * 4096 * 2 / 1e9)  # 0.53 GB


def test_the_decoder_s_peaks_are_the_published_ones(decoder):
    """2.8 GiB at 1024 x 1024 and 10.3 GiB at 2048 x 2048: one formula within a tenth of both."""
    for side, peak in ((1024, 2.8), (2048, 10.3)):
        total = stage_need(decoder, side, side, text_tokens=256).total * 1e9 / 2**30
        assert total == pytest.approx(peak, rel=0.15)
    small = advise(machine("ada", 8), [decoder], 2048, 2048).choices[0]
    assert small.need.tiled
    assert small.fits
    assert small.need.activations == stage_need(decoder, 512, 512, text_tokens=256).activations


def test_the_enhancer_keeps_106_kb_per_token():
    """26 layers, keys and values of 8 heads of 128 numbers in bf16."""
    short, long = (stage_need(language_model(), 512, 512, text_tokens=n).activations for n in (256, 1256))
    assert (long - short) * 1e9 / 1000 == pytest.approx(106_496 + 15 * 3072 * 2)


def test_more_pixels_and_longer_prompts_never_take_less(transformer, decoder):
    for found in (transformer("int8"), decoder, language_model()):
        sums = [stage_need(found, s, s, text_tokens=t).total for s, t in ((512, 64), (512, 512), (1024, 512))]
        assert sums == sorted(sums)


# --- machines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *(((6, 1), "older"), ((7, 0), "volta"), ((7, 5), "turing"), ((8, 0), "ampere"), ((8, 6), "ampere")),
        *(((8, 9), "ada"), ((9, 0), "hopper"), ((10, 0), "blackwell"), ((12, 0), "blackwell")),
    ],
)
def test_compute_capabilities(capability, name):
    assert nvidia_generation(capability) == name


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(("gfx1201", "rdna4"), ("gfx1100", "rdna3"), ("gfx1151", "rdna3"), ("gfx1030", "rdna2"), ("gfx1010", "rdna1")),
        *(("gfx90a:sramecc+:xnack-", "cdna"), ("gfx942", "cdna"), ("gfx906", "amd")),
    ],
)
def test_architectures_of_amd(architecture, name):
    assert amd_generation(architecture) == name


@pytest.mark.parametrize("hip", [None, "7.1"])
def test_the_card_that_torch_sees(monkeypatch, tmp_path, hip):
    card = SimpleNamespace(name="Card", major=8, minor=6, total_memory=12e9, gcnArchName="gfx1100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.8")
    found = read_machine(tmp_path)
    expected = ("amd", "rdna3", None) if hip else ("nvidia", "ampere", (12, 8))
    assert (found.vendor, found.generation, found.cuda) == expected
    assert found.card_gb == 12.0
    assert found.ram_gb > 0.5
    assert found.disk_free_gb > 0


def test_another_card_in_the_same_machine():
    here = machine("cpu", 0.0, ram_gb=31.0)
    for card, (vendor, generation, size) in CARDS.items():
        made = with_card(here, card)
        assert (made.vendor, made.generation, made.card_gb, made.ram_gb) == (vendor, generation, size, 31.0)
        assert str(size) in card
    with pytest.raises(ErnieError, match=r"RTX 3060 12 GB.*got 'RTX 1'"):
        with_card(here, "RTX 1")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


def test_files_are_told_by_their_headers_alone(models, monkeypatch):
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", None)
    kinds = ("transformer", "text_encoder", "enhancer", "vae")
    files = [(p.name, p, kinds) for p in sorted(models.rglob("*.safetensors"))]
    found, _ = look_at_all(files)
    seen = {f.name: f for f in found}
    for name, kind in (
        ("ernie-image.safetensors", "transformer"),
        ("ministral-3-3b.safetensors", "text_encoder"),
        ("ernie-image-prompt-enhancer.safetensors", "enhancer"),
        ("flux2-vae.safetensors", "vae"),
    ):
        assert seen[name].kind == kind
        path = next(p for n, p, _ in files if n == name)
        assert 0.5 * path.stat().st_size < seen[name].bytes <= path.stat().st_size
    advice = advise(machine("ampere"), found, 64, 64)
    assert sum(c.chosen for c in advice.choices) >= 4
    assert advice.table().count("\n") == len(found) + 1


@pytest.mark.parametrize(
    ("dtype", "companion", "format"),
    [
        (torch.bfloat16, None, "bf16"),
        (torch.float16, None, "fp16"),
        (torch.float32, None, "fp32"),
        (torch.float8_e4m3fn, "weight_scale", "fp8"),
        (torch.int8, "weight_scale", "int8"),
        (torch.uint8, "weight_scale_2", "nvfp4"),
        (torch.uint8, "weight.absmax", "nf4"),
    ],
)
def test_the_numbers_of_most_bytes_count(models, tmp_path, dtype, companion, format):
    path = next(models.rglob("ernie-image.safetensors"))
    tensors = {}
    for name, tensor in load_file(path).items():
        inside = ".mlp." in name or ".self_attention.to_" in name
        tensors[name] = tensor.clamp(-1, 1).to(dtype) if inside or dtype.is_floating_point else tensor.half()[..., :0]
        if inside and companion:
            tensors[f"{name.removesuffix('.weight')}.{companion}"] = torch.ones(1)
    if dtype is torch.float16:
        tensors["x_embedder.proj.bias"] = tensors["x_embedder.proj.bias"].float()
    save_file(tensors, tmp_path / "other.safetensors")
    (found,) = look("other", tmp_path / "other.safetensors", ("transformer",))
    assert found.format == format


def test_what_cannot_be_read_is_said_and_the_rest_goes_on(models, tmp_path):
    good = next(models.rglob("flux2-vae.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-1000])
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html>" + b" " * 100)
    save_file(
        {"lora_unet_a.lora_down.weight": torch.ones(1, 1), "lora_unet_a.lora_up.weight": torch.ones(1, 1)},
        tmp_path / "lora.safetensors",
    )
    names = ("cut.safetensors", "page.safetensors", "lora.safetensors", "gone.safetensors")
    files = [(name, tmp_path / name, ("vae",)) for name in names]
    found, problems = look_at_all([*files, ("good", good, ("vae",))])
    assert [f.name for f in found] == ["good"]
    for problem, said in zip(problems, ("truncated", "web page", "looks like a LoRA", "does not exist"), strict=True):
        assert said in problem
    assert advise(machine(), found, 64, 64, problems=problems).report().count("Not read: ") == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1000}, "multiple of 16, got 1000"),
        ({"height": 0}, "multiple of 16, got 0"),
        ({"text_tokens": 0}, "1 to 2048, got 0"),
        ({"text_tokens": 4000}, "1 to 2048, got 4000"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    with pytest.raises(ErnieError, match=message):
        advise(machine(), [], **{"width": 512, "height": 512, "text_tokens": 256} | changes)


def test_no_files_at_all():
    advice = advise(machine(), [], 512, 512)
    assert "no file of ERNIE-Image was found" in advice.report()
    assert advice.warnings == ()


def test_from_the_command_line(models, capsys):
    assert cli.main(["adviser", str(models), "--width", "64", "--height", "64", "--card", "RTX 3060 12 GB"]) == 0
    said = capsys.readouterr().out
    assert "ernie-image.safetensors" in said
    assert "RTX 3060 12 GB, ampere" in said
    assert cli.main(["adviser", str(models / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["adviser", "--card", "RTX 1"]) == 1


def test_look_refuses_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        look("x", tmp_path / "x", ("vae",))


def test_usable_memory():
    assert math.isclose(machine(card_gb=8.0).usable_gb, 7.0)
    assert machine("cpu", 0.0, ram_gb=1.0).usable_gb == 0.0
