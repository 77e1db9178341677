"""4-bit weights: bitsandbytes' own bytes and numbers, written out; errors of rounding within the levels' distances.

The numbers are of bitsandbytes 0.50.2 on a CPU: quantize_4bit and dequantize_4bit of WEIGHT, blocks of 64.
"""

import itertools
import json

import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError
from ernie_pack.ernie_core.weights.four_bit import (
    NF4,
    FourBitLinear,
    is_four_bit,
    quantise_nf4,
    read_bitsandbytes,
)

THOUSANDTHS = [
    *(-56, -58, -13, -22, 42, 35, -16, -106, 16, -63, 17, 15, 6, 62, 56, -12, -68, -85, 28, 40, 30, -78, -17, 93),
    *(38, -29, -9, 9, 69, 79, 47, -42, -31, 2, -25, 12, 22, 6, 32, 22, -5, 40, -14, 3, 26, 115, -73, -79, -34, 44),
    *(53, 9, -12, -20, 27, -20, -22, 37, 76, 171, -77, -62, 91, -28, -28, 46, 56, 64, -74, 128, -24, 17, -81, -27),
    *(-24, -25, -53, 56, -7, 40, -5, 34, -42, 0, 42, -20, 52, 18, -12, 115, -94, -2, -52, -48, 2, 36, 82, -68, 17),
    *(26, -131, -85, -11, 14, 12, 4, 17, 23, 23, -43, 39, -46, -11, -122, -4, -2, 48, 17, -46, -3, -31, -23, 96),
    *(-20, 6, 58, 46, 69),
]
WEIGHT = torch.tensor(THOUSANDTHS).view(2, 64) / 1000
BYTES = {
    "nf4": [
        *(68, 102, 170, 97, 131, 136, 123, 182, 50, 154, 147, 109, 165, 104, 204, 164, 87, 88, 151, 153, 122, 103),
        *(158, 50, 90, 184, 102, 150, 106, 207, 51, 213, 91, 204, 47, 89, 21, 85, 60, 107, 122, 71, 181, 201, 111),
        *(23, 51, 122, 210, 153, 1, 104, 135, 153, 148, 179, 96, 119, 185, 55, 69, 229, 140, 189),
    ],
    "fp4": [
        *(204, 158, 118, 234, 108, 102, 20, 73, 205, 103, 109, 229, 126, 145, 69, 127, 225, 225, 97, 102, 151, 145),
        *(98, 221, 231, 65, 158, 110, 231, 83, 220, 94, 244, 85, 211, 230, 174, 238, 197, 148, 151, 192, 78, 70, 227),
        *(169, 204, 23, 45, 102, 186, 150, 97, 102, 108, 76, 155, 153, 70, 201, 254, 46, 21, 69),
    ],
}
FP4 = [0.0, 0.005208333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25, 0.0, -0.005208333, -2 / 3, -1.0, -1 / 3, -0.5, -1 / 6]
LEVELS = {"nf4": list(NF4), "fp4": [*FP4, -0.25]}
FIRST_ROW = {
    "nf4": [-0.0486395, -0.0486395, -0.0155696, -0.0155696, 0.0420852, 0.0420852, -0.0155696, -0.119049, 0.0136082],
    "fp4": [-0.057, -0.057, -0.0008906, -0.0285, 0.04275, 0.0285, -0.0285, -0.114, 0.0285],
}
SECOND_ROW = {
    ("nf4", False): [-0.0242053, 0.0442669, 0.057733, 0.057733, -0.0687846, 0.131, -0.0242053, 0.0210819],
    ("nf4", True): [-0.0242313, 0.0443144, 0.057795, 0.057795, -0.0688584, 0.1311406, -0.0242313, 0.0211045],
    ("fp4", False): [-0.03275, 0.0436667, 0.0655, 0.0655, -0.0655, 0.131, -0.0218333, 0.0218333],
    ("fp4", True): [-0.0327852, 0.0437135, 0.0655703, 0.0655703, -0.0655703, 0.1311406, -0.0218568, 0.0218568],
}


def stored(kind="nf4", *, nested=False, name="a.weight", **changes):
    """WEIGHT as bitsandbytes writes it."""
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [2, 64]}
    tensors = {
        name: torch.tensor(BYTES[kind], dtype=torch.uint8)[:, None],
        f"{name}.absmax": torch.tensor([0.171, 0.131]),
        f"{name}.quant_map": torch.tensor(LEVELS[kind]),
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1509999930858612}
        shares = torch.linspace(-1, 1, 256)  # only the two that are used are bitsandbytes'
        shares[0], shares[255] = -0.992968738079071, 1.0
        tensors[f"{name}.absmax"] = torch.tensor([255, 0], dtype=torch.uint8)
        tensors |= {f"{name}.nested_absmax": torch.tensor([0.0200000107]), f"{name}.nested_quant_map": shares}
    text = json.dumps(state | changes).encode()
    return tensors | {f"{name}.quant_state.bitsandbytes__{kind}": torch.tensor(list(text), dtype=torch.uint8)}


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA, appendix E: eight even steps of probability above zero, seven below, scaled to 1; offset 0.9677083."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1)
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    assert (levels / levels.max()).tolist() == pytest.approx(NF4, abs=1e-6)


def test_the_bytes_are_those_of_bitsandbytes():
    made = quantise_nf4(WEIGHT)
    assert made.codes.tolist() == BYTES["nf4"]
    assert made.absmax.tolist() == pytest.approx([0.171, 0.131])


@pytest.mark.parametrize("nested", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_files_of_bitsandbytes_give_its_numbers(kind, nested):
    plain = {"a.bias": torch.ones(2), "b.weight": torch.ones(3)}
    tensors = stored(kind, nested=nested) | plain
    assert is_four_bit(tensors)
    read = read_bitsandbytes(tensors, "here")
    assert read.keys() == {"a.weight", *plain}
    assert all(read[name] is tensor for name, tensor in plain.items())
    made = read["a.weight"].dequantised(torch.float32)
    assert made[0, :9].tolist() == pytest.approx(FIRST_ROW[kind], abs=1e-6)
    assert made[1, :8].tolist() == pytest.approx(SECOND_ROW[kind, nested], abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 64), (5, 48), (3, 31), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_no_number_is_further_off_than_half_the_widest_gap(shape, size):
    """0.152 of its block's largest absolute value; and every number is one of the block's levels."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    made = quantise_nf4(weight)
    back = made.dequantised(torch.float32)
    assert back.shape == weight.shape
    largest = made.absmax.repeat_interleave(64)[: weight.numel()].view(shape)
    gap = max(b - a for a, b in itertools.pairwise(NF4))
    assert ((back - weight).abs() <= gap / 2 * largest * (1 + 1e-5)).all()
    again = quantise_nf4(back)
    assert torch.equal(again.codes, made.codes)


def test_large_matrices_go_through_in_pieces():
    """More numbers than are worked on at once, with a last block that is cut short."""
    weight = torch.randn(2100, 2001, generator=torch.Generator().manual_seed(0))
    back = quantise_nf4(weight).dequantised(torch.float32)
    error = float((back - weight).norm() / weight.norm())
    assert 0.08 < error < 0.10  # 0.092 for normal numbers in blocks of 64
    assert float((back[-1] - weight[-1]).norm() / weight[-1].norm()) < 0.12


def test_zeros_stay_zeros():
    assert not quantise_nf4(torch.zeros(2, 64)).dequantised(torch.float32).any()


def test_rows_are_cut_like_a_tensor_s():
    weight = torch.randn(6, 32)
    parts = quantise_nf4(weight).chunk(3)
    whole = quantise_nf4(weight).dequantised(torch.float32)
    assert torch.equal(torch.cat([part.dequantised(torch.float32) for part in parts]), whole)
    with pytest.raises(CheckpointError, match=r"\(6, 31\) cannot be cut into 3"):
        quantise_nf4(torch.randn(6, 31)).chunk(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_with_the_multiplied_out_weight(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 64), torch.randn(3)
    layer = FourBitLinear(quantise_nf4(weight), bias)
    x = torch.randn(2, 5, 64, dtype=dtype)
    expected = x @ quantise_nf4(weight).dequantised(dtype).T + bias.to(dtype)
    # The bias is added inside the product's rounding or after it, as the processor has it: an ulp of the terms.
    torch.testing.assert_close(layer(x), expected, rtol=0.016, atol=1e-5 if dtype == torch.float32 else 0.04)
    assert sum(t.nbytes for t in layer.buffers()) == 3 * 64 // 2 + 4 * 3 + 4 * 16 + 4 * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_undefined_weights_are_refused(bad):
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    with pytest.raises(CheckpointError, match="infinite or undefined"):
        quantise_nf4(weight)


def without(leaf, **options):
    return {name: tensor for name, tensor in stored(**options).items() if not name.endswith(leaf)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(".absmax"), "a.weight has no absmax; the file is incomplete"),
        (without(".quant_map"), "has no quant_map"),
        (without("a.weight"), "has no a.weight"),
        (without(".nested_quant_map", nested=True), "has no nested_quant_map"),
        (stored(shape=[2, 63]), r"must be \(63, 2, 16\) for shape \(2, 63\), got \(64, 2, 16\)"),
        (stored(blocksize=128), r"must be \(64, 1, 16\)"),
        (stored() | {"a.weight.quant_state.bitsandbytes__nf4": torch.tensor([3], dtype=torch.uint8)}, "cannot be read"),
    ],
    ids=["absmax", "map", "weight", "nested map", "shape", "block", "state"],
)
def test_incomplete_files_say_what_is_missing(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        read_bitsandbytes(tensors, "here")
