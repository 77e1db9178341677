"""The step cache's node, and the whole of it on a miniature model through standalone."""

import importlib
import logging
import re

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.sampling.cache import StepCache
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.standalone import host
from random_models import DIT, write_random_models

NODE = {"model": "MODEL", "threshold": 0.1, "start": 1.0, "end": 0.0, "max_skips": 3}


def test_the_settings_reach_the_host(run, recording):
    assert run("ErnieStepCache", **NODE | {"threshold": 0.25, "start": 0.9, "end": 0.2, "max_skips": 7}).result == (
        "MODEL",
    )
    expected = StepCache(threshold=0.25, start=0.9, end=0.2, max_skips=7)
    assert recording.calls == [("set_step_cache", "MODEL", expected)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 2.0}, "threshold must lie between 0"),
        ({"start": 0.2, "end": 0.6}, "1 >= start >= end >= 0, got 0.2 and 0.6"),
        ({"max_skips": -1}, "max_skips must be 0 or more"),
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


def test_threshold_0_is_the_model_itself(model):
    assert host.set_step_cache(model, StepCache(threshold=0.0)) is model


def test_each_run_starts_afresh_and_says_what_it_left_out(model):
    fast = host.set_step_cache(model, StepCache(threshold=1.0, max_skips=2), node_id="9")
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
