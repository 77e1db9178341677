"""Three-axis rotation: recorded vectors and laws. The vectors were worked out by hand from the published formulas."""

import pytest
import torch
from ernie_pack.ernie_core.model.rope import angles, apply_rope, positions, rope_table

AXES = (32, 48, 48)
THETA = 256


def table(height, width, lengths, **options):
    return rope_table(
        height, width, lengths, axes_dim=AXES, theta=THETA, device="cpu", dtype=torch.float64, options=options or None
    )


def test_inverse_frequencies_are_the_recorded_ones():
    one = angles(torch.ones(1, 3, dtype=torch.float64), AXES, THETA)[0]
    first = [1, 0.707107, 0.5, 0.353553]
    torch.testing.assert_close(one[:4], torch.tensor(first, dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(one[15]) == pytest.approx(0.005524, abs=1e-6)
    torch.testing.assert_close(
        one[16:19], torch.tensor([1, 0.793701, 0.629961], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert float(one[39]) == pytest.approx(0.004922, abs=1e-6)
    assert torch.equal(one[16:40], one[40:])  # the y and x axes turn alike


def test_angles_at_7_3_5_are_the_recorded_ones():
    theta = angles(torch.tensor([[7.0, 3.0, 5.0]], dtype=torch.float64), AXES, THETA)[0]
    recorded = {0: 7, 1: 4.94975, 15: 0.03867, 16: 3, 31: 0.09375, 32: 0.07441, 39: 0.01476, 40: 5, 63: 0.02461}
    assert {i: round(float(theta[i]), 5) for i in recorded} == recorded


def test_a_rotated_head_is_the_recorded_one():
    """Position (7, 3, 5): row 3, column 5 of an image whose text has 7 tokens; x[i] = (i + 1) / 128."""
    cos, sin = table(4, 6, [7])
    token = 3 * 6 + 5
    x = ((torch.arange(128, dtype=torch.float64) + 1) / 128).reshape(1, 1, 1, 128)
    out = apply_rope(x, (cos[:, token : token + 1], sin[:, token : token + 1])).flatten()
    recorded = {
        **{0: -0.32774, 1: -0.32698, 2: 0.51427, 31: 0.22082, 32: -0.36217, 63: 0.40419},
        **{64: 0.50699, 79: 0.62678, 80: 0.05215, 127: 1.01200},
    }
    assert {i: round(float(out[i]), 5) for i in recorded} == recorded


def test_the_image_comes_first_and_stands_at_the_text_length():
    found = positions(2, 3, 5, 5).tolist()
    assert found[:6] == [[5, y, x] for y in range(2) for x in range(3)]
    assert found[6:] == [[j, 0, 0] for j in range(5)]


def test_the_partners_turn_by_different_angles():
    """A fused kernel with one angle per pair would pass most other tests."""
    cos, _ = table(4, 4, [3])
    assert not torch.allclose(cos[..., :64], cos[..., 64:])
    assert torch.equal(cos[..., 0::2], cos[..., 1::2])


def test_position_zero_is_left_alone():
    cos, sin = table(1, 1, [1])
    x = torch.randn(1, 1, 2, 128, dtype=torch.float64)
    assert torch.equal(apply_rope(x, (cos[:, 1:], sin[:, 1:])), x)  # text token 0 stands at (0, 0, 0)


def test_rotation_leaves_its_input_alone_and_keeps_the_dtype():
    rope = rope_table(2, 2, [3], axes_dim=AXES, theta=THETA, device="cpu", dtype=torch.bfloat16)
    x = torch.randn(1, 7, 2, 128).bfloat16()
    before = x.clone()
    assert apply_rope(x, rope).dtype == torch.bfloat16
    assert torch.equal(x, before)


def test_a_ragged_table_holds_each_samples_own_table():
    cos, sin = table(3, 2, [4, 2, 4])
    assert cos.shape == sin.shape == (3, 6 + 4, 1, 128)
    for row, n in enumerate((4, 2, 4)):
        alone_cos, alone_sin = table(3, 2, [n])
        assert torch.equal(cos[row, : 6 + n], alone_cos[0])
        assert torch.equal(sin[row, : 6 + n], alone_sin[0])


def test_equal_lengths_share_one_table():
    assert table(3, 2, [4, 4, 4])[0].shape[0] == 1


def test_far_positions_stay_apart():
    """In bf16 the positions 256 and 257 would be the same number."""
    cos, _ = rope_table(1, 300, [1], axes_dim=AXES, theta=THETA, device="cpu", dtype=torch.float32)
    assert not torch.equal(cos[0, 256], cos[0, 257])


@pytest.mark.parametrize(
    "options", [{}, {"scale_x": 1.0, "scale_y": 1.0, "shift_t": 0.0, "shift_x": 0.0, "shift_y": 0.0}]
)
def test_neutral_options_change_nothing(options):
    assert torch.equal(table(3, 4, [5], **options)[0], table(3, 4, [5])[0])


@pytest.mark.parametrize(
    ("options", "axis", "change"),
    [
        ({"scale_y": 2.0}, 1, lambda p: p * 2),
        ({"scale_x": 0.5}, 2, lambda p: p * 0.5),
        ({"shift_t": 3.0}, 0, lambda p: p + 3),
        ({"shift_y": -2.0}, 1, lambda p: p - 2),
        ({"shift_x": 1.0}, 2, lambda p: p + 1),
        ({"scale_y": 2.0, "shift_y": 1.0}, 1, lambda p: p * 2 + 1),
    ],
)
def test_an_option_moves_its_axis_of_the_image_only(options, axis, change):
    plain, moved = positions(3, 4, 5, 5), positions(3, 4, 5, 5, options=options)
    expected = plain.clone()
    expected[:12, axis] = change(plain[:12, axis])
    assert torch.equal(moved, expected)
