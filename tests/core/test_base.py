"""The frozen base: what is quantised, what never is, and that adapters learn on it what they learn on the original."""

import json
import logging

import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.training.adapters import Adapter, AdapterConfig, Views
from ernie_pack.ernie_core.training.base import load_base
from ernie_pack.ernie_core.training.blocks import run_blocks
from ernie_pack.ernie_core.weights.checkpoint import write_safetensors
from ernie_pack.ernie_core.weights.quantise import QuantisedLinear, quantise_fp8, quantise_rows
from train_models import CONFIG, gradients, make_inputs, make_model, shake

EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MATRICES = 7 * CONFIG.num_layers


def write_model(path, *, dtype=torch.bfloat16, change=lambda weights: weights):
    weights = {name: tensor.to(dtype) for name, tensor in make_model().state_dict().items()}
    write_safetensors(change(weights), path, metadata={"config": json.dumps(CONFIG.to_dict())})
    return path


def quantised_file(form):
    """A change of the weights into one of the 8-bit forms found in files; some of the rest is in 8 bits too."""

    def change(weights):
        out = dict(weights)
        for name, weight in weights.items():
            layer = name.removesuffix(".weight")
            if weight.ndim != 2 or not (layer.startswith("layers.") or layer == "adaLN_modulation.1"):
                continue
            if form == "plain fp8":
                out[name] = weight.to(torch.float8_e4m3fn)
                continue
            if form == "fp8 scaled":
                stored, scale = quantise_fp8(weight)
                options = {"format": "float8_e4m3fn"}
            else:
                stored, scale = quantise_rows(weight, "int8")
                options = {"format": "int8_tensorwise"}
            marker = torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)
            out |= {name: stored, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": marker}
        return out

    return change


def velocity(model, dtype=torch.bfloat16):
    with torch.no_grad():
        return model(*make_inputs(dtype=dtype), text_lengths=(7, 4)).float()


def relative(one, two):
    return float((one - two).norm() / two.norm())


@pytest.fixture
def file(tmp_path):
    return write_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp8", "int8", "stored"])
def test_a_base_is_frozen_and_for_inference(precision, file):
    with torch.inference_mode():  # as a host may call us
        model = load_base(file, precision=precision)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers())), "could not be kept for backward"
    expected = torch.float32 if precision == "fp32" else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {expected}
    limit = {"fp8": 0.08, "int8": 0.03}.get(precision, 0.02)
    assert relative(velocity(model, expected), velocity(make_model(), torch.float32)) < limit


@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_only_the_matrices_of_the_blocks_are_quantised(precision, file):
    model = load_base(file, precision=precision)
    eight = {name for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(eight) == MATRICES
    assert all(name.startswith("layers.") for name in eight)
    assert {model.get_submodule(name).weight.dtype for name in eight} == {EIGHT_BIT[precision]}
    plain = load_base(file).state_dict()
    for name, tensor in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in eight:
            assert torch.equal(tensor, plain[name]), name
    for name in eight:
        exact = plain[f"{name}.weight"].float()
        step = exact.abs().amax(1, keepdim=True) / (127 if precision == "int8" else 448 / 32)
        assert ((model.get_submodule(name).dequantised(torch.float32) - exact).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("form", ["fp8 scaled", "plain fp8", "int8"])
def test_quantised_files_stay_as_they_are(form, tmp_path, caplog):
    path = write_model(tmp_path / "model.safetensors", change=quantised_file(form))
    dtype = torch.int8 if form == "int8" else torch.float8_e4m3fn
    multiplied = load_base(path, precision="bf16")
    assert not any(isinstance(m, QuantisedLinear) for m in multiplied.modules())
    for precision in ("stored", "int8" if form == "int8" else "fp8"):
        model = load_base(path, precision=precision)
        eight = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
        assert len(eight) == MATRICES
        assert {m.weight.dtype for m in eight.values()} == {dtype}
        assert model.adaLN_modulation[1].weight.dtype is torch.bfloat16
        assert torch.equal(velocity(model), velocity(multiplied)), "the same weights in another place"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        other = load_base(path, precision="fp8" if form == "int8" else "int8")
    assert "keeps them" in caplog.text
    assert torch.equal(velocity(other), velocity(multiplied))


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_point_where_those_of_the_exact_base_point(precision, checkpoint, file):
    def step(model, dtype):
        adapter = shake(Adapter(model, AdapterConfig(rank=4), seed=0), size=0.02)
        views = Views(model)
        views.add("policy", adapter)
        inputs = make_inputs(dtype=dtype)
        with views.active("policy"):
            out = model(*inputs, text_lengths=(7, 4), run_block=run_blocks(checkpoint=checkpoint))
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        return gradients(adapter, (out.float() - target).square().mean())

    found = step(load_base(file, precision=precision), torch.bfloat16)
    exact = step(load_base(file, precision="fp32"), torch.float32)
    cosines = {k: float(torch.cosine_similarity(found[k].flatten(), g.flatten(), dim=0)) for k, g in exact.items()}
    assert min(cosines.values()) >= 0.99, min(cosines, key=cosines.get)


def test_a_quantised_layer_differentiates_like_its_multiplied_out_weight():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    for format in EIGHT_BIT:
        layer = QuantisedLinear(*quantise_rows(weight, format), bias=torch.randn(12))
        plain = torch.nn.Linear(8, 12)
        plain.weight.data, plain.bias.data = layer.dequantised(torch.float32), layer.bias
        x = torch.randn(2, 3, 8, requires_grad=True)
        found, expected = layer(x), plain(x)
        assert torch.equal(found, expected)
        g = torch.randn(2, 3, 12)
        torch.testing.assert_close(
            torch.autograd.grad(found, x, g)[0], torch.autograd.grad(expected, x, g)[0], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("format", EIGHT_BIT)
def test_rows_are_scaled_one_by_one(format):
    weight = torch.randn(4, 32) * torch.tensor([[1e-4], [1.0], [1e3], [0.0]])
    stored, scale = quantise_rows(weight, format)
    assert scale.shape == (4, 1)
    back = stored.float() * scale
    assert ((back - weight).norm(dim=1) <= 0.04 * weight.norm(dim=1)).all()
    assert not back[3].any()
    assert (stored.float().abs().amax(1)[:3] == (127 if format == "int8" else 448)).all()


@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_a_layer_that_cannot_be_quantised_is_an_error(precision, tmp_path):
    def change(weights):
        weights["layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
        return weights

    path = write_model(tmp_path / "model.safetensors", change=change)
    with pytest.raises(CheckpointError, match=r"the layer layers\.1\.mlp\.up_proj cannot be kept in 8 bits: the"):
        load_base(path, precision=precision)


def test_an_8_bit_weight_without_its_scale_is_an_error(tmp_path):
    def change(weights):
        name = "layers.0.mlp.up_proj.weight"
        return weights | {name: quantise_rows(weights[name], "int8")[0]}

    path = write_model(tmp_path / "model.safetensors", change=change)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj cannot be kept in 8 bits: .*without a scale"):
        load_base(path, precision="stored")


def test_wrong_scales_and_names_are_refused(file, tmp_path):
    with pytest.raises(CheckpointError, match=r"one number or one per row \(4\), got shape \(3,\)"):
        QuantisedLinear(torch.zeros(4, 2, dtype=torch.int8), torch.ones(3))
    with pytest.raises(ErnieError, match="one of bf16, fp32, fp8, int8, stored; got 'nf4'"):
        load_base(file, precision="nf4")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_base(tmp_path / "absent.safetensors")


def test_an_8_bit_base_halves_the_memory(file):
    def size(model):
        return sum(t.numel() * t.element_size() for b in model.layers for t in (*b.parameters(), *b.buffers()))

    whole = size(load_base(file))
    assert size(load_base(file, precision="int8")) < 0.6 * whole
    assert isinstance(load_base(file), DiT)
