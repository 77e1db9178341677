"""Bands of noise levels and who denoises them."""

from dataclasses import replace

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.experts import (
    Band,
    Expert,
    mix,
    order_experts,
    report_experts,
    seats,
    uniform_bands,
)

LEVELS = torch.linspace(0, 1, 1001, dtype=torch.float64)


def expert(start, end, **others):
    return Expert(band=Band(start=start, end=end), **others)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_uniform_bands_give_every_level_to_exactly_one(count):
    total = sum(band.share(LEVELS) for band in uniform_bands(count))
    assert torch.equal(total, torch.ones_like(LEVELS))


@pytest.mark.parametrize("blend", [0.01, 0.1, 0.2])
def test_blended_shares_add_up_to_one_and_change_by_a_straight_line(blend):
    bands = [Band(start=1, end=0.6), Band(start=0.6, end=0.3), Band(start=0.3, end=0)]
    total = sum(band.share(LEVELS, blend) for band in bands)
    torch.testing.assert_close(total, torch.ones_like(LEVELS), rtol=0, atol=1e-12)
    edge = torch.tensor([0.6 - blend / 2, 0.6, 0.6 + blend / 2], dtype=torch.float64)
    torch.testing.assert_close(bands[0].share(edge, blend), torch.tensor([0, 0.5, 1]).double(), rtol=0, atol=1e-9)


def test_the_ends_of_the_noise_levels_have_no_ramp():
    whole = Band()
    assert torch.equal(whole.share(LEVELS, 0.5), torch.ones_like(LEVELS))


def test_a_step_is_one_evaluation():
    ten = order_experts([Expert(band=band, model=object()) for band in uniform_bands(10)])
    for i, sigma in enumerate((0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15, 0.05)):
        (only,) = seats(ten, sigma, cfg=4)
        assert only.model is ten[i].model
        assert (only.cfg, only.share) == (4, 1)


def test_the_edge_belongs_to_the_lower_band():
    ordered = order_experts([expert(1, 0.5, cfg=1), expert(0.5, 0, cfg=2)])
    assert [seats(ordered, sigma, cfg=9)[0].cfg for sigma in (0.5001, 0.5, 0.4999)] == [1, 2, 2]


def test_gaps_are_the_models_own():
    (only,) = seats(order_experts([expert(0.9, 0.6, model="x", cfg=2)]), 0.3, cfg=5)
    assert (only.model, only.cfg, only.share) == (None, 5, 1)


def test_experts_on_the_same_network_blend_in_one_evaluation():
    ordered = order_experts([expert(1, 0.5, cfg=1), expert(0.5, 0, cfg=3)], 0.2)
    (only,) = seats(ordered, 0.55, cfg=9, blend=0.2)
    assert only.model is None
    assert only.share == pytest.approx(1)
    assert only.cfg == pytest.approx(0.75 * 1 + 0.25 * 3)


def test_two_models_are_both_asked_where_they_blend():
    ordered = order_experts([expert(1, 0.5, model="high"), expert(0.5, 0, model="low", cfg=2)], 0.2)
    found = seats(ordered, 0.45, cfg=4, blend=0.2)
    assert [(seat.model, seat.cfg) for seat in found] == [("high", 4), ("low", 2)]
    assert [seat.share for seat in found] == pytest.approx([0.25, 0.75])


def test_neighbours_that_are_the_same_expert_are_joined():
    model = object()
    ordered = order_experts([replace(expert(0.5, 0, model=model), label="b"), expert(1, 0.5, model=model)])
    assert [e.band for e in ordered] == [Band()]
    apart = order_experts([expert(1, 0.5, lora="x"), expert(0.5, 0, lora="x", strength=0.5)])
    assert len(apart) == 2


def test_the_mixture_is_the_weighted_sum():
    x = torch.randn(2, 3, 4, 4)
    constants = {"high": 1.0, None: 3.0}
    ordered = order_experts([expert(1, 0.5, model="high", cfg=2)], 0.1)
    denoise = mix(lambda model, cfg: lambda x, sigma: constants[model] * cfg * x, ordered, cfg=1, blend=0.1)
    assert torch.equal(denoise(x, 0.9), 2 * x)
    assert torch.equal(denoise(x, 0.1), 3 * x)
    torch.testing.assert_close(denoise(x, 0.525), (0.75 * 2 + 0.25 * 3) * x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: expert(0.2, 0.8), "must run down from start to end"),
        (lambda: expert(1.2, 0.8), "within 1 and 0, got 1.2"),
        (lambda: expert(1, 0, model="a", lora="b"), "has a model and a LoRA"),
        (lambda: order_experts([expert(1, 0.4), expert(0.6, 0)]), "claim the noise levels 0.6 to 0.4: let one end"),
        (lambda: order_experts([expert(0.5, 0.5)]), "never acts"),
        (lambda: order_experts([expert(0.5, 0.4)], 0.2), "wider than the band 0.5 to 0.4"),
        (lambda: order_experts([], 2), "blend must lie between"),
        (lambda: uniform_bands(0), "must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(ErnieError, match=message):
        make()


def test_the_report_names_every_level():
    ordered = order_experts([expert(0.9, 0.5, lora="a", label="a.safetensors", cfg=3), expert(0.3, 0.1, model="m")])
    assert report_experts(ordered, 0.1).splitlines() == [
        "1 to 0.9: the model itself",
        "0.9 to 0.5: a.safetensors, strength 1, cfg 3",
        "0.5 to 0.3: the model itself",
        "0.3 to 0.1: an expert",
        "0.1 to 0: the model itself",
        "blended over 0.1 at each edge",
    ]
