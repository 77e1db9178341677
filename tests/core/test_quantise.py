"""8-bit weights: what is read back is what was stored, within the rounding of the format."""

import json

import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError
from ernie_pack.ernie_core.weights.quantise import (
    FP8_DTYPES,
    LayerQuantisation,
    check_readable,
    dequantise,
    is_companion,
    quantise_fp8,
    read_quantisation,
    to_comfy_layout,
)


def marker(**options):
    return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("name", FP8_DTYPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_dequantised_weights_are_within_fp8_rounding(name, size):
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) * size
    stored, scale = quantise_fp8(weight, FP8_DTYPES[name])
    how = LayerQuantisation(options={"format": name}, tensors={"weight_scale": scale})
    back = dequantise({"a.weight": stored}, {"a": how}, torch.float32)["a.weight"]
    half_step = {"float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}[name]
    smallest = torch.finfo(FP8_DTYPES[name]).smallest_normal * scale
    assert ((back - weight).abs() <= half_step * weight.abs().clamp(min=smallest) * (1 + 1e-6)).all()


def test_a_zero_weight_stays_zero():
    stored, scale = quantise_fp8(torch.zeros(2, 2))
    assert scale == 1
    assert not stored.float().any()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1)], ids=str)
def test_int8_scales_are_per_tensor_or_per_row(shape):
    scale = torch.rand(shape) + 0.5
    how = LayerQuantisation(options={"format": "int8_tensorwise"}, tensors={"weight_scale": scale})
    stored = torch.tensor([[1, -2], [3, 4], [-128, 127]], dtype=torch.int8)
    back = dequantise({"a.weight": stored, "b": stored}, {"a": how}, torch.float32)
    rows = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    torch.testing.assert_close(back["a.weight"], stored.float() * rows)
    assert back["b"] is stored


def test_a_scale_of_another_shape_is_refused():
    how = LayerQuantisation(options={"format": "float8_e4m3fn"}, tensors={"weight_scale": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"one number or one per row \(2\), got shape \(4,\)"):
        dequantise({"a.weight": torch.ones(2, 4)}, {"a": how}, torch.float32)


@pytest.mark.parametrize("form", ["comfy_quant", "metadata", "scaled_fp8", "bare"])
def test_every_way_to_write_fp8_scales_reads_the_same(form):
    scale, inputs = torch.tensor(0.25), torch.tensor(2.0)
    companions = {"a.weight_scale": scale, "a.input_scale": inputs}
    metadata = {}
    if form == "comfy_quant":
        companions["a.comfy_quant"] = marker(format="float8_e4m3fn")
    elif form == "metadata":
        layers = {"a": {"format": "float8_e4m3fn"}}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    elif form == "scaled_fp8":
        companions = {"a.scale_weight": scale, "a.scale_input": inputs, "scaled_fp8": torch.zeros(0)}
    dtypes = {"a.weight": torch.float8_e4m3fn, "b.weight": torch.bfloat16}
    found = read_quantisation(companions, dtypes, metadata)
    assert found.keys() == {"a"}
    assert found["a"].format == "float8_e4m3fn"
    assert found["a"].tensors == {"weight_scale": scale, "input_scale": inputs}


def test_a_scale_beside_a_plain_weight_is_no_quantisation():
    companions = {"a.scale_weight": torch.ones(()), "scaled_fp8": torch.zeros(2)}
    assert read_quantisation(companions, {"a.weight": torch.bfloat16}, {}) == {}


def test_the_host_layout_reads_back_and_holds_the_markers():
    stored, scale = quantise_fp8(torch.randn(4, 4))
    layers = {"a": LayerQuantisation(options={"format": "float8_e4m3fn"}, tensors={"weight_scale": scale})}
    full = to_comfy_layout({"a.weight": stored}, layers)
    assert full.keys() == {"a.weight", "a.weight_scale", "a.comfy_quant"}
    companions = {name: tensor for name, tensor in full.items() if is_companion(name)}
    assert read_quantisation(companions, {"a.weight": stored.dtype}, {}) == layers


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"format": "nvfp4"}, "nvfp4"),
        ({"format": "mxfp8"}, "mxfp8"),
        ({"format": "int8_tensorwise", "convrot": True}, r"rotation \(convrot\)"),
    ],
)
def test_formats_that_cannot_be_read_are_named(options, named):
    with pytest.raises(CheckpointError, match=rf"{named}.*host's own loader, or take a bf16 or fp8 file"):
        check_readable({"a": LayerQuantisation(options=options)})


def test_a_packed_format_without_a_marker_is_recognised():
    companions = {"a.weight_scale": torch.ones(1), "a.weight_scale_2": torch.ones(())}
    assert read_quantisation(companions, {"a.weight": torch.uint8}, {})["a"].format == "nvfp4"


def test_a_marker_that_is_not_json_is_refused():
    companions = {"a.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"a\.comfy_quant does not hold JSON"):
        read_quantisation(companions, {"a.weight": torch.float8_e4m3fn}, {})


def test_a_scale_without_a_weight_is_refused():
    with pytest.raises(CheckpointError, match="layer a has scales but no weight"):
        read_quantisation({"a.weight_scale": torch.ones(())}, {}, {})
