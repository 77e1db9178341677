"""Learning rates by step, and optimiser states that survive a safetensors and a JSON file bit by bit."""

import itertools
import json

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.optimisers import lr_at, make_optimiser, pack_state, unpack_state
from ernie_pack.ernie_core.training.recipe import OptimiserConfig

CPU_OPTIMISERS = ("adamw", "adafactor", "prodigy")


def test_warm_up_rises_evenly_to_the_peak():
    config = OptimiserConfig(lr=1.0, warmup=4, schedule="constant")
    assert [lr_at(config, s, 100) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_fall_from_the_peak_to_the_floor(schedule):
    config = OptimiserConfig(lr=2.0, warmup=10, schedule=schedule, floor=0.1)
    rates = [lr_at(config, s, 110) for s in range(10, 111)]
    assert rates[0] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(2.0 * 0.55)
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_a_run_shorter_than_its_warm_up_stays_finite():
    config = OptimiserConfig(lr=1.0, warmup=50)
    assert [0 < lr_at(config, s, 3) < 1 for s in range(3)] == [True] * 3


def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 8, generator=generator)) for _ in range(3)]


def run(parameters, optimiser, first, last):
    for step in range(first, last):
        for i, w in enumerate(parameters):
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimiser.step()


@pytest.mark.parametrize("name", CPU_OPTIMISERS)
def test_a_resumed_optimiser_goes_on_bit_by_bit(name):
    config = OptimiserConfig(name=name, lr=1.0 if name == "prodigy" else 1e-2)
    whole = weights()
    run(whole, make_optimiser(whole, config), 0, 12)

    parts = weights()
    optimiser = make_optimiser(parts, config)
    run(parts, optimiser, 0, 5)
    tensors, values = pack_state(optimiser)
    tensors, values = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(values))
    resumed = make_optimiser(parts, config)
    unpack_state(resumed, tensors, values)
    run(parts, resumed, 5, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    # the state mattered: without it the end is another one
    cold = weights()
    run(cold, make_optimiser(cold, config), 0, 5)
    run(cold, make_optimiser(cold, config), 5, 12)
    assert not torch.equal(whole[0], cold[0])


@pytest.mark.parametrize("name", CPU_OPTIMISERS)
def test_every_optimiser_walks_downhill(name):
    config = OptimiserConfig(name=name, lr=1.0 if name == "prodigy" else 3e-2, weight_decay=0.0)
    (w,) = [torch.nn.Parameter(torch.full((8, 8), 3.0))]
    optimiser = make_optimiser([w], config)
    for _ in range(400):
        optimiser.zero_grad()
        (w**2).mean().backward()
        optimiser.step()
    assert float(w.abs().mean()) < 1.5


def test_a_state_of_another_adapter_is_refused():
    parameters = weights()
    optimiser = make_optimiser(parameters, OptimiserConfig())
    run(parameters, optimiser, 0, 1)
    tensors, values = pack_state(optimiser)
    with pytest.raises(ErnieError, match="3 parameters, the adapter 1"):
        unpack_state(make_optimiser(parameters[:1], OptimiserConfig()), tensors, values)


def test_eight_bit_adamw_says_what_it_needs():
    with pytest.raises(ErnieError, match="runs on a GPU only"):
        make_optimiser(weights(), OptimiserConfig(name="adamw8bit"))


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ErnieError, match="needs the package prodigyopt"):
        make_optimiser(weights(), OptimiserConfig(name="prodigy"))
