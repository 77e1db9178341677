"""The step cache's node, and the whole of it on a miniature model through standalone."""

import importlib
import logging
import re

import pytest
import torch
from ernie_pack.ernie_core.config import CACHE_SIGNALS
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.sampling.cache import StepCache
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.standalone import host
from lora_dialects import random_lora
from random_models import DIT, write_random_models

caching = importlib.import_module("ernie_pack.ernie_core.sampling.cache")

NODE = {"model": "MODEL", "threshold": 0.1, "start": 1.0, "end": 0.0, "max_skips": 3}


def test_the_settings_reach_the_host(run, recording):
    assert run("ErnieStepCache", **NODE | {"threshold": 0.25, "start": 0.9, "end": 0.2, "max_skips": 7}).result == (
        "MODEL",
    )
    expected = StepCache(threshold=0.25, start=0.9, end=0.2, max_skips=7, signal="first_block")
    assert recording.calls == [("set_step_cache", "MODEL", expected)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 2.0}, "threshold must lie between 0"),
        ({"start": 0.2, "end": 0.6}, "1 >= start >= end >= 0, got 0.2 and 0.6"),
        ({"max_skips": -1}, "max_skips must be 0 or more"),
        ({"signal": "output"}, "signal first_block or modulated_input expected, got 'output'"),
    ],
)
def test_values_that_a_link_brings_are_checked(run, recording, change, message):
    with pytest.raises(ErnieError, match=message):
        run("ErnieStepCache", **NODE | change)
    assert not recording.calls


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = importlib.import_module("ernie_pack.ernie_core.weights.checkpoint")
    folder = write_random_models(tmp_path_factory.mktemp("models"))
    return host.make_model(
        checkpoint.read_component(folder / "diffusion_models" / "ernie-image.safetensors", "transformer")
    )


def sample(model, **changes):
    texts = torch.randn(2, 1, 3, DIT.text_in_dim, generator=torch.Generator().manual_seed(0))
    settings = {
        "positive": [[texts[0], {}]],
        "negative": [[texts[1], {}]],
        "latent": {"samples": torch.zeros(1, 128, 2, 2)},
        "sigmas": make_sigmas(12),
        "cfg": 3.0,
        "seed": 3,
    }
    return host.sample(model, **settings | changes)["samples"]


def shown():
    return host.session.shown.pop("9", None)


@pytest.mark.parametrize("signal", CACHE_SIGNALS)
def test_threshold_0_is_the_model_itself(model, signal):
    assert host.set_step_cache(model, StepCache(threshold=0.0, signal=signal)) is model


@pytest.mark.parametrize("signal", CACHE_SIGNALS)
def test_each_run_starts_afresh_and_says_what_it_left_out(model, signal):
    fast = host.set_step_cache(model, StepCache(threshold=1.0, max_skips=2, signal=signal), node_id="9")
    first, said = sample(fast), shown()
    assert 0 < int(re.fullmatch(r"(\d+) of 24 evaluations left out \(\d+ %\)", said)[1]) < 24
    assert torch.equal(sample(fast), first)
    assert shown() == said
    assert not torch.equal(sample(model), first)


def test_an_interrupt_leaves_nothing_behind(model, monkeypatch):
    fast = host.set_step_cache(model, StepCache(threshold=1.0), node_id="9")
    before = sample(fast)
    shown()

    def stop():
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(host, "throw_if_interrupted", stop)
        with pytest.raises(Interrupted):
            sample(fast)
    assert shown() == "0 of 2 evaluations left out (0 %)"
    assert torch.equal(sample(fast), before)


def test_two_caches_on_a_model_are_named(model, caplog):
    once = host.set_step_cache(model, StepCache(threshold=0.5))
    with caplog.at_level(logging.WARNING):
        host.set_step_cache(once, StepCache(threshold=0.1))
    assert "The Step Cache (ERNIE) before this one is not used" in caplog.text


# ------------------------------------------------------------------------------------------- what must not be mixed

STEPS = 12
ALL = {"threshold": 1.0, "max_skips": 1000}  # leaves out whatever it may


def whole_evaluations(model, signal):
    sample(host.set_step_cache(model, StepCache(**ALL, signal=signal), node_id="9"), sigmas=make_sigmas(STEPS))
    left_out, total = map(int, re.match(r"(\d+) of (\d+) ", shown()).groups())
    return total - left_out, total


@pytest.fixture
def every_change_is_small(monkeypatch):
    """So that only what must be kept apart makes an evaluation whole."""
    monkeypatch.setattr(caching, "relative_change", lambda *_: 0.0)


@pytest.mark.usefixtures("every_change_is_small")
@pytest.mark.parametrize("signal", CACHE_SIGNALS)
def test_a_lora_with_a_range_and_without_it_are_kept_apart(model, signal):
    """The first evaluation of each prompt beyond the LoRA's edge is whole: nothing of the LoRA reaches past it."""
    weights = importlib.import_module("ernie_pack.ernie_core.weights.lora")
    shapes = weights.module_shapes(model.dit)
    lora = weights.parse_lora(random_lora(weights.weight_shapes(model.dit.state_dict()), size=0.05), shapes)
    strengths = weights.module_strengths(lora, 1.0, "", shapes)
    assert whole_evaluations(model, signal) == (2, 2 * STEPS)
    assert whole_evaluations(host.apply_lora(model, lora, strengths, start=1.0, end=0.5), signal) == (4, 2 * STEPS)
    assert model.dit.active_loras == ()


@pytest.mark.usefixtures("every_change_is_small")
@pytest.mark.parametrize("signal", CACHE_SIGNALS)
def test_the_pass_of_skip_layer_guidance_has_a_cache_of_its_own(model, signal):
    """Three predictions a step, of which the first of each is whole."""
    guidance = importlib.import_module("ernie_pack.ernie_core.sampling.guidance")
    guided = host.add_guidance(model, [guidance.SkipLayers(blocks=(1,), scale=2.0)])
    assert whole_evaluations(guided, signal) == (3, 3 * STEPS)
