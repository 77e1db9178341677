"""Presets, defaults and the errors of the sampling nodes."""

import logging

import pytest
import torch
from ernie_pack.ernie_core.config import BASE, OFFICIAL_SIZES, SAMPLERS, TURBO
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.samplers import Sampler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas

LATENT = {"samples": torch.zeros(1, 128, 2, 2)}
TEXT = [["p", {}]]


def sampled(recording):
    (call,) = [c for c in recording.calls if c[0] == "sample"]
    return dict(
        zip(("model", "positive", "negative", "shape", "sigmas", "cfg", "seed", "sampler"), call[1:], strict=True)
    )


def sampler(run, **changes):
    widgets = {"preset": "Base 50 / 4", "steps": 50, "cfg": 4.0, "shift": 4.0, "seed": 5, "denoise": 1.0}
    sockets = {"model": "MODEL", "positive": TEXT, "negative": TEXT, "latent_image": LATENT}
    return run("ErnieSampler", **(sockets | widgets | changes))


@pytest.mark.parametrize(("preset", "settings"), [("Base 50 / 4", BASE), ("Turbo 8 / 1", TURBO)])
def test_presets_are_the_official_settings(run, recording, preset, settings):
    sampler(run, preset=preset)
    call = sampled(recording)
    assert call["sigmas"] == make_sigmas(settings.steps, shift=settings.shift).tolist()
    assert call["cfg"] == settings.cfg


def test_custom_reads_steps_and_cfg(run, recording):
    sampler(run, preset="custom", steps=3, cfg=2.0, shift=3.0, denoise=0.5)
    call = sampled(recording)
    assert call["sigmas"] == make_sigmas(3, shift=3.0, denoise=0.5).tolist()
    assert call["cfg"] == 2.0
    assert ("set_shift", "MODEL", 3.0) in recording.calls


def test_a_preset_that_overrides_a_changed_widget_says_so(run, recording, caplog):
    with caplog.at_level(logging.WARNING):
        sampler(run, steps=30)
    assert "steps 30 is not used: preset 'Base 50 / 4' sets 50" in caplog.text


def test_untouched_widgets_cause_no_warning(run, recording, caplog):
    with caplog.at_level(logging.WARNING):
        sampler(run, preset="Turbo 8 / 1", negative=None)
    assert not caplog.records


def test_cfg_without_a_negative_is_an_error(run, recording):
    with pytest.raises(
        ErnieError, match=r"cfg 4 compares with a negative prompt, but the input negative is not connected"
    ):
        sampler(run, negative=None)
    assert not recording.calls


def test_turbo_needs_no_negative(run, recording):
    sampler(run, preset="Turbo 8 / 1", negative=None)
    assert sampled(recording)["negative"] is None


@pytest.mark.parametrize("size", OFFICIAL_SIZES, ids=str)
def test_official_sizes_can_be_chosen(run, recording, size):
    run("ErnieEmptyLatent", size=f"{size[0]} x {size[1]}", width=64, height=64, batch_size=1)
    assert recording.calls == [("empty_latent", *size, 1)]


def test_custom_size_reads_width_and_height(run, recording):
    run("ErnieEmptyLatent", size="custom", width=640, height=480, batch_size=3)
    assert recording.calls == [("empty_latent", 640, 480, 3)]


def test_sigmas_are_the_official_grid(run, recording):
    (sigmas,) = run("ErnieSigmas", steps=8, shift=4.0, denoise=1.0).result
    assert (sigmas[:3] * 1000).tolist() == pytest.approx([1000, 965.517, 923.077], abs=1e-3)


def test_the_sampler_is_euler_unless_another_is_chosen(run, recording):
    """Saved workflows and API calls from before the widget have no such input."""
    sampler(run)
    assert sampled(recording)["sampler"] == Sampler(name="euler")


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_chosen_sampler_reaches_the_host(run, recording, name):
    sampler(run, sampler=name)
    assert sampled(recording)["sampler"] == Sampler(name=name)


def test_the_new_widget_stands_behind_those_of_saved_workflows(node_classes):
    """The page keeps widget values by their place."""
    assert [i.id for i in node_classes["ErnieSampler"].GET_SCHEMA().inputs][-1] == "sampler"


def test_sampler_select_hands_over_name_and_eta(run, recording):
    assert run("ErnieSamplerSelect", sampler="dpmpp_2m_sde", eta=0.25).result == ("SAMPLER",)
    assert recording.calls == [("make_sampler", Sampler(name="dpmpp_2m_sde", eta=0.25))]


def test_an_eta_that_is_not_read_is_named(run, recording, caplog):
    with caplog.at_level(logging.WARNING):
        run("ErnieSamplerSelect", sampler="heun", eta=0.5)
    assert "eta 0.5 is not used: heun draws no new noise. Choose euler_ancestral or dpmpp_2m_sde." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run("ErnieSamplerSelect", sampler="heun", eta=1.0)
        run("ErnieSamplerSelect", sampler="euler_ancestral", eta=0.5)
    assert not caplog.records
