"""Guidance: neutral values, linearity, and one call where one is enough."""

import pytest
import torch
from ernie_pack.ernie_core.sampling.guidance import cfg_velocity, with_cfg


class Counting:
    def __init__(self, value):
        self.value = value
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        return torch.full_like(x, self.value)


def test_cfg_1_is_the_conditional_prediction_and_0_the_unconditional():
    cond, uncond = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(cfg_velocity(cond, uncond, 1.0), cond)
    assert torch.equal(cfg_velocity(cond, uncond, 0.0), uncond)


def test_cfg_goes_from_the_unconditional_through_the_conditional():
    assert cfg_velocity(torch.tensor(3.0), torch.tensor(1.0), 4.0) == 9


def test_equal_predictions_are_left_alone_by_any_cfg():
    v = torch.randn(5)
    assert torch.equal(cfg_velocity(v, v, 7.5), v)


@pytest.mark.parametrize("cfg", [1.0, 0.5, 0.0])
def test_cfg_up_to_1_makes_one_call(cfg):
    cond, uncond = Counting(2.0), Counting(5.0)
    out = with_cfg(cond, uncond, cfg)(torch.zeros(1), 0.5)
    assert (float(out), cond.calls, uncond.calls) == (2.0, 1, 0)


def test_without_a_negative_there_is_one_call():
    cond = Counting(2.0)
    assert float(with_cfg(cond, None, 4.0)(torch.zeros(1), 0.5)) == 2.0


def test_cfg_above_1_makes_one_call_each():
    cond, uncond = Counting(2.0), Counting(1.0)
    out = with_cfg(cond, uncond, 4.0)(torch.zeros(1), 0.5)
    assert (float(out), cond.calls, uncond.calls) == (5.0, 1, 1)


def test_guidance_is_reckoned_in_fp32():
    """bf16 keeps 8 bits: the difference of close predictions, times 4, would show it."""
    cond, uncond = torch.tensor([1.0078125]).bfloat16(), torch.tensor([1.0]).bfloat16()
    out = with_cfg(lambda x, s: cond, lambda x, s: uncond, 4.1)(torch.zeros(1), 0.5)
    assert out.dtype == torch.float32
    assert float(out) == pytest.approx(1 + 4.1 * 0.0078125, abs=1e-7)
