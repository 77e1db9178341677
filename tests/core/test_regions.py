"""Laws of regional prompts: one region is a plain prompt, groups are a dense mask, and texts stay in their regions."""

import logging

import pytest
import torch
import torch.nn.functional as F
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.pipeline import make_denoise
from ernie_pack.ernie_core.sampling.regions import (
    REGIONS_KEY,
    RegionPlan,
    Regions,
    add_region,
    check_alone,
    check_region_mask,
    region_weights,
)
from random_models import DIT

ROWS, COLUMNS = 4, 6
WIDTH = DIT.text_in_dim


def text(length, seed):
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def left():
    mask = torch.zeros(1, ROWS, COLUMNS)
    mask[..., : COLUMNS // 2] = 1
    return mask


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return DiT(DIT).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 128, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def denoise(dit, x, conditioning):
    ((joined, extras),) = conditioning
    run = make_denoise(dit, [joined[0]] * len(x), ROWS, COLUMNS, regions=extras.get(REGIONS_KEY))
    return run(x, 0.7)


def test_one_region_everywhere_is_its_prompt_bit_for_bit(dit, x):
    base, region = [[text(5, 1), {}]], [[text(3, 2), {}]]
    everywhere = add_region(base, region, torch.ones(1, 64, 64), 1.0)
    assert torch.equal(denoise(dit, x, everywhere), denoise(dit, x, region))


def test_no_region_is_the_base_prompt_bit_for_bit(dit, x):
    base, region = [[text(5, 1), {}]], [[text(3, 2), {}]]
    assert add_region(base, region, left(), 0.0) is base
    nowhere = add_region(base, region, torch.zeros(1, 64, 64), 1.0)
    assert torch.equal(denoise(dit, x, nowhere), denoise(dit, x, base))


def dense(weights_RL, lengths):
    """What is added to the scores [S, S], written out."""
    image = weights_RL.shape[1]
    total = image + sum(lengths)
    bias = torch.full((total, total), -torch.inf)
    bias[:image, :image] = 0
    start = image
    for weights, length in zip(weights_RL, lengths, strict=True):
        end = start + length
        bias[:image, start:end] = weights.log()[:, None]
        bias[start:end, :image] = weights.log()[None]
        bias[start:end, start:end] = 0
        start = end
    return bias


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.25])
def test_groups_are_a_dense_mask(strength):
    regions = Regions(lengths=(3,), masks_HW=()).plus(2, left()[0] * strength).plus(4, (1 - left()[0]).clone())
    soft = regions.plus(2, torch.linspace(0, 1, ROWS * COLUMNS).reshape(ROWS, COLUMNS))
    for each in (regions, soft):
        plan = RegionPlan(each, ROWS, COLUMNS, text_length=sum(each.lengths))
        weights = region_weights(each, ROWS, COLUMNS)
        kept = weights.amax(dim=1) > 0
        lengths = [n for n, keep in zip(each.lengths, kept, strict=True) if keep]
        tokens = ROWS * COLUMNS + sum(lengths)
        q, k, v = torch.randn(3, 2, tokens, 4, 8, generator=torch.Generator().manual_seed(3))
        expected = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=dense(weights[kept], lengths)
        ).transpose(1, 2)
        torch.testing.assert_close(plan.through()(q, k, v, None), expected, atol=1e-5, rtol=1e-4)


def test_weights_of_0_and_1_need_no_mask():
    """So that any attention backend serves."""
    regions = Regions(lengths=(3,), masks_HW=()).plus(2, left()[0])

    def refuse(*_):
        pytest.fail("a mask was asked for")

    q = torch.randn(1, ROWS * COLUMNS + 5, 2, 8)
    RegionPlan(regions, ROWS, COLUMNS, text_length=5).through(attend_biased=refuse)(q, q, q, None)


def test_a_text_reaches_its_region_only():
    regions = Regions(lengths=(3,), masks_HW=()).plus(2, left()[0])
    attend = RegionPlan(regions, ROWS, COLUMNS, text_length=5).through()
    q, k, v = torch.randn(3, 1, ROWS * COLUMNS + 5, 2, 8)
    other = v.clone()
    other[:, -2:] += 1
    changed = (attend(q, k, other, None) != attend(q, k, v, None)).flatten(2).any(-1)[0, : ROWS * COLUMNS]
    assert torch.equal(changed, left().flatten() == 1)


def test_the_base_fills_what_regions_leave():
    regions = Regions(lengths=(3,), masks_HW=()).plus(2, left()[0] * 0.8).plus(2, left()[0] * 0.5)
    weights = region_weights(regions, ROWS, COLUMNS)
    assert weights[:, 0].tolist() == pytest.approx([0.1, 0.8, 0.5])
    assert weights[:, -1].tolist() == [1, 0, 0]


def test_masks_of_any_size_are_stretched():
    small = Regions(lengths=(1, 1), masks_HW=(left()[0],))
    large = Regions(lengths=(1, 1), masks_HW=(left()[0].repeat_interleave(16, 0).repeat_interleave(16, 1),))
    assert torch.equal(region_weights(small, ROWS, COLUMNS), region_weights(large, ROWS, COLUMNS))


def test_positions_are_those_of_a_picture_of_one_text_alone(dit):
    regions = Regions(lengths=(3,), masks_HW=()).plus(2, left()[0])
    c = dit.config
    settings = {"axes_dim": c.rope_axes_dim, "theta": c.rope_theta, "device": "cpu", "dtype": torch.float32}
    cos, _ = RegionPlan(regions, ROWS, COLUMNS, text_length=5).rope(**settings)
    inside = left().flatten() == 1
    for length, where, start in ((3, ~inside, 0), (2, inside, 3)):
        alone, _ = dit.rope(ROWS, COLUMNS, [length], device="cpu", dtype=torch.float32)
        image = ROWS * COLUMNS
        assert torch.equal(cos[0, :image][where], alone[0, :image][where])
        assert torch.equal(cos[0, image + start : image + start + length], alone[0, image:])


def test_regions_are_added_to_each_entry_and_to_regions():
    base = [[text(4, 1), {"start_percent": 0.0}], [text(6, 2), {}]]
    once = add_region(base, [[text(3, 3), {"pooled_output": None}]], left(), 1.0)
    twice = add_region(once, [[text(2, 4), {}]], 1 - left(), 0.5)
    assert [each[0].shape[1] for each in twice] == [9, 11]
    assert [each[1][REGIONS_KEY].lengths for each in twice] == [(4, 3, 2), (6, 3, 2)]
    assert twice[0][1]["start_percent"] == 0.0
    assert REGIONS_KEY not in base[0][1]


# --- bad input -------------------------------------------------------------------------------------------------------

PLAIN = [[text(3, 1), {}]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 8, 8), r"one mask \[1, height, width\] expected, got \[2, 8, 8\]"),
        (torch.ones(8), r"one mask .* expected, got \[8\]"),
        (torch.full((1, 8, 8), float("nan")), "a mask of finite numbers expected"),
        (torch.full((1, 8, 8), 2.0), "a mask between 0 and 1 expected, this one runs from 2 to 2"),
    ],
)
def test_masks_that_are_none_are_refused(mask, message):
    with pytest.raises(ErnieError, match=message):
        check_region_mask(mask)


def test_bad_prompts_and_strengths_are_refused():
    with pytest.raises(ErnieError, match=r"strength must lie between 0 .* got 1.5"):
        add_region(PLAIN, PLAIN, left(), 1.5)
    with pytest.raises(ErnieError, match="one plain prompt expected as region, 2 came"):
        add_region(PLAIN, PLAIN * 2, left(), 1.0)
    with pytest.raises(ErnieError, match="it has regions itself"):
        add_region(PLAIN, add_region(PLAIN, PLAIN, left(), 1.0), left(), 1.0)
    with pytest.raises(ErnieError, match=r"must come from one text encoder, got widths .* and 7"):
        add_region(PLAIN, [[torch.zeros(1, 3, 7), {}]], left(), 1.0)


def test_what_is_set_on_the_regions_prompt_is_not_dropped_silently(caplog):
    with caplog.at_level(logging.WARNING):
        add_region(PLAIN, [[text(3, 2), {"start_percent": 0.5, "pooled_output": None}]], left(), 1.0)
    assert "start_percent of the region's prompt are not used" in caplog.text


def test_a_text_that_changed_behind_the_node_is_named(dit, x):
    ((joined, extras),) = add_region(PLAIN, PLAIN, left(), 1.0)
    with pytest.raises(ErnieError, match="6 tokens long together, the conditioning has 8"):
        denoise(dit, x, [[torch.cat([joined, joined[:, :2]], dim=1), extras]])


def test_a_negative_prompt_in_the_attention_is_refused_beside_regions():
    check_alone(False)
    with pytest.raises(ErnieError, match="cannot act together"):
        check_alone(True)
