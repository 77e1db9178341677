"""The guidance nodes: what reaches the host, neutral settings, what is refused or said; on a network in miniature."""

import logging

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.sampling.cache import StepCache
from ernie_pack.ernie_core.sampling.experts import Band, Expert
from ernie_pack.ernie_core.sampling.guidance import AdaptiveSkip, Interval, Projection, Rescale, SkipLayers, ZeroStar
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.ernie_core.sampling.variety import Variety
from ernie_pack.standalone import host, load_node_classes
from random_models import DIT, random_weights

GUIDANCE = {
    "method": "cfg",
    "start": 1.0,
    "end": 0.0,
    "rescale": 0.0,
    "skip_similarity": 1.0,
    "eta": 0.0,
    "momentum": 0.0,
    "norm_threshold": 0.0,
    "zero_steps": 0,
}
SKIP_LAYERS = {"scale": 0.0, "blocks": "1", "start": 1.0, "end": 0.0}
VARIETY = {"strength": 0.0, "start": 0.9, "end": 0.8, "rescale": 1.0}
NEGATIVE = {"scale": 1.0, "start": 1.0, "end": 0.0, "tau": 2.5, "alpha": 0.25}


@pytest.fixture(scope="module")
def model():
    dit = DiT(DIT)
    dit.load_state_dict({n: t.float() for n, t in random_weights(dit.state_dict(), seed=3).items()})
    return host.Model(dit=dit.eval())


def text(seed, tokens=3):
    return [[torch.randn(1, tokens, DIT.text_in_dim, generator=torch.Generator().manual_seed(seed)), {}]]


def sample(model, *, cfg=4.0, batch=1, seed=3):
    return host.sample(
        model,
        positive=text(1),
        negative=text(2, tokens=2),
        latent=host.empty_latent(32, 48, batch),
        sigmas=make_sigmas(4),
        cfg=cfg,
        seed=seed,
    )["samples"]


def patch(node_id, model, **changes):
    defaults = {
        "ErnieGuidance": GUIDANCE,
        "ErnieSkipLayerGuidance": SKIP_LAYERS,
        "ErnieNegativeForTurbo": {**NEGATIVE, "negative": text(2, tokens=2)},
        "ErnieSeedVariety": VARIETY,
    }[node_id]
    return load_node_classes()[node_id].execute(model=model, **defaults | changes)[0]


def given(recording):
    return recording.calls[-1][2]


def test_guidance_hands_over_its_rules(run, recording):
    run("ErnieGuidance", model="MODEL", **GUIDANCE | {"rescale": 0.7, "end": 0.2})
    assert given(recording) == (Interval(start=1.0, end=0.2), AdaptiveSkip(similarity=1.0), Rescale(share=0.7))
    run("ErnieGuidance", model="MODEL", **GUIDANCE | {"method": "apg", "norm_threshold": 2.0})
    assert given(recording)[-1] == Projection(eta=0.0, momentum=0.0, norm_threshold=2.0)
    run("ErnieGuidance", model="MODEL", **GUIDANCE | {"method": "cfg-zero*", "zero_steps": 2})
    assert given(recording)[-1] == ZeroStar(zero_steps=2)
    run("ErnieSkipLayerGuidance", model="MODEL", **SKIP_LAYERS | {"scale": 2.0, "blocks": ""})
    assert given(recording) == (SkipLayers(blocks=(12, 13, 14), scale=2.0),)


def test_settings_of_another_method_are_named(run, recording, caplog):
    with caplog.at_level(logging.WARNING):
        run("ErnieGuidance", model="MODEL", **GUIDANCE)
        run("ErnieGuidance", model="MODEL", **GUIDANCE | {"method": "apg", "eta": 0.5})
        assert not caplog.records
        run("ErnieGuidance", model="MODEL", **GUIDANCE | {"method": "cfg-zero*", "eta": 0.5})
    assert "eta 0.5 is not used by method 'cfg-zero*': it belongs to 'apg'." in caplog.text


@pytest.mark.parametrize(
    "node_id", ["ErnieGuidance", "ErnieSkipLayerGuidance", "ErnieNegativeForTurbo", "ErnieSeedVariety"]
)
def test_neutral_settings_are_the_model_itself(model, node_id):
    assert patch(node_id, model) is model


@pytest.mark.parametrize(
    ("node_id", "changes"),
    [
        ("ErnieGuidance", {"start": 0.9}),
        ("ErnieGuidance", {"rescale": 0.7}),
        ("ErnieGuidance", {"skip_similarity": 0.1}),
        ("ErnieGuidance", {"method": "apg"}),
        ("ErnieGuidance", {"method": "cfg-zero*"}),
        ("ErnieSkipLayerGuidance", {"scale": 2.0}),
        ("ErnieNegativeForTurbo", {"scale": 5.0}),
        ("ErnieSeedVariety", {"strength": 1.0}),
    ],
)
def test_each_setting_acts_and_leaves_the_model_as_it_was(model, node_id, changes):
    plain = sample(model)
    patched = patch(node_id, model, **changes)
    assert not torch.allclose(sample(patched), plain, atol=1e-3)
    assert torch.equal(sample(patched), sample(patched))
    assert torch.equal(sample(model), plain)


def test_nodes_in_a_row_act_together(model):
    first, second = {"start": 0.95}, {"rescale": 0.5}
    one = patch("ErnieGuidance", model, **first, **second)
    row = patch("ErnieGuidance", patch("ErnieGuidance", model, **second), **first)
    assert torch.equal(sample(one), sample(row))


def test_a_negative_prompt_acts_at_cfg_1_and_beside_guidance(model):
    """At scale 0 and alpha 1 the image sees the negative prompt alone, whatever the prompt."""

    def step(model, positive):
        latent, sigmas = host.empty_latent(32, 48, 1), torch.tensor([1.0, 0.5, 0.0])
        return host.sample(model, positive=positive, negative=None, latent=latent, sigmas=sigmas, cfg=1.0, seed=3)[
            "samples"
        ]

    only = patch("ErnieNegativeForTurbo", model, scale=0.0, alpha=1.0, tau=100.0)
    torch.testing.assert_close(step(only, text(1)), step(model, text(2, tokens=2)), rtol=1e-3, atol=1e-3)
    both = patch("ErnieGuidance", patch("ErnieNegativeForTurbo", model, scale=5.0), rescale=0.5)
    assert not torch.allclose(sample(both), sample(patch("ErnieGuidance", model, rescale=0.5)), atol=1e-3)


def test_a_second_negative_prompt_is_named(model, caplog):
    once = patch("ErnieNegativeForTurbo", model, scale=5.0)
    with caplog.at_level(logging.WARNING):
        twice = patch("ErnieNegativeForTurbo", once, scale=3.0)
    assert "only the last one acts" in caplog.text
    assert torch.equal(sample(twice), sample(patch("ErnieNegativeForTurbo", model, scale=3.0)))


def test_seed_variety_hands_over_its_settings(run, recording):
    run("ErnieSeedVariety", model="MODEL", strength=0.7, start=0.95, end=0.5, rescale=0.3)
    assert given(recording) == Variety(strength=0.7, start=0.95, end=0.5, rescale=0.3)


def test_seed_variety_leaves_the_negative_prompt_and_the_levels_below_its_range_alone(model):
    """One step at cfg 0 shows the prediction under the negative prompt alone."""

    def step(model, cfg, start):
        latent, sigmas = host.empty_latent(32, 48, 1), torch.tensor([start, 0.0])
        return host.sample(model, positive=text(1), negative=text(2), latent=latent, sigmas=sigmas, cfg=cfg, seed=3)[
            "samples"
        ]

    varied = patch("ErnieSeedVariety", model, strength=1.0, end=0.7)
    assert torch.equal(step(varied, 0.0, 1.0), step(model, 0.0, 1.0))
    assert torch.equal(step(varied, 4.0, 0.7), step(model, 4.0, 0.7))
    assert not torch.allclose(step(varied, 1.0, 1.0), step(model, 1.0, 1.0), atol=1e-3)


def test_seed_variety_of_a_batch_is_that_of_its_pictures(model):
    varied = patch("ErnieSeedVariety", model, strength=1.0)
    both = sample(varied, batch=2)

    def alone(place):
        latent = {**host.empty_latent(32, 48, 1), "batch_index": [place]}
        return host.sample(
            varied, positive=text(1), negative=text(2, tokens=2), latent=latent, sigmas=make_sigmas(4), cfg=4.0, seed=3
        )["samples"]

    torch.testing.assert_close(both, torch.cat([alone(0), alone(1)]), rtol=1e-4, atol=1e-4)


def test_a_second_seed_variety_is_named(model, caplog):
    once = patch("ErnieSeedVariety", model, strength=1.0)
    with caplog.at_level(logging.WARNING):
        twice = patch("ErnieSeedVariety", once, strength=0.5)
    assert "The Seed Variety (ERNIE) before this one is not used" in caplog.text
    assert torch.equal(sample(twice), sample(patch("ErnieSeedVariety", model, strength=0.5)))


# What a patch does beside others; each as documented.


def cached(model, threshold=1.0):
    return host.set_step_cache(model, StepCache(threshold=threshold, start=1.0, end=0.0, max_skips=1))


def mixture(model, expert=None, cfg=None):
    """Experts above and below noise level 0.8: the model itself, and `expert` at `cfg`."""
    upper, lower = Band(start=1.0, end=0.8), Band(start=0.8, end=0.0)
    return host.set_experts(model, [Expert(band=upper), Expert(band=lower, model=expert, cfg=cfg)])


def test_a_negative_prompt_and_a_step_cache_act_together(model, caplog):
    once = patch("ErnieNegativeForTurbo", model, scale=5.0)
    with caplog.at_level(logging.INFO):
        skipping = sample(cached(once), cfg=1.0)
    assert "1 of 4 evaluations left out" in caplog.text
    assert not torch.equal(skipping, sample(once, cfg=1.0))  # it does skip
    assert not torch.allclose(skipping, sample(cached(model), cfg=1.0), atol=1e-3)  # and the negative acts
    never = cached(once, threshold=1e-9)
    assert torch.equal(sample(never, cfg=1.0), sample(once, cfg=1.0))


def test_a_negative_prompt_acts_on_the_outcome_of_experts_that_are_loras_or_cfg(model):
    """An expert's cfg only: base and expert are one network, so experts of equal cfg are no experts."""
    once = patch("ErnieNegativeForTurbo", model, scale=5.0)
    assert torch.equal(sample(mixture(once, cfg=4.0)), sample(once))
    assert not torch.allclose(sample(mixture(once, cfg=1.0)), sample(once), atol=1e-3)


def test_an_experts_own_model_brings_its_own_negative_prompt_and_not_the_bases(model):
    once = patch("ErnieNegativeForTurbo", model, scale=5.0)
    below = patch("ErnieNegativeForTurbo", model, scale=5.0, start=0.8)
    above = patch("ErnieNegativeForTurbo", model, scale=5.0, end=0.8)
    torch.testing.assert_close(sample(mixture(model, expert=once)), sample(below), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(mixture(once, expert=model)), sample(above), rtol=1e-4, atol=1e-4)


def test_guidance_and_seed_variety_of_a_mixture_are_those_of_all_experts(model):
    for node_id, changes in (("ErnieGuidance", {"rescale": 0.7}), ("ErnieSeedVariety", {"strength": 1.0, "end": 0.5})):
        patched = patch(node_id, model, **changes)
        torch.testing.assert_close(sample(mixture(patched, expert=model)), sample(patched), rtol=1e-4, atol=1e-4)


def test_skip_layers_is_the_difference_to_the_reduced_model(model):
    """One step at cfg 1: x0 + scale (x0 - x0 of the network without the block)."""

    def step(model):
        latent, sigmas = host.empty_latent(32, 48, 1), torch.tensor([1.0, 0.0])
        return host.sample(model, positive=text(1), negative=None, latent=latent, sigmas=sigmas, cfg=1.0, seed=3)[
            "samples"
        ]

    plain, weak = step(model), step(host.skip_blocks(model, [1]))
    torch.testing.assert_close(
        step(patch("ErnieSkipLayerGuidance", model, scale=2.0)), plain + 2 * (plain - weak), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("node_id", "changes", "message"),
    [
        ("ErnieGuidance", {"start": 0.2, "end": 0.5}, r"start must not be below end.*Swap them"),
        ("ErnieGuidance", {"rescale": float("nan")}, r"rescale must lie between 0 and 1"),
        ("ErnieGuidance", {"skip_similarity": 1.5}, r"similarity must lie between 0 and 1"),
        ("ErnieGuidance", {"method": "apg", "momentum": 1.0}, r"momentum must lie inside -1 to 1"),
        ("ErnieGuidance", {"method": "cfg-zero*", "zero_steps": -1}, r"zero_steps must lie between 0 and 1000"),
        ("ErnieSkipLayerGuidance", {"scale": 1.0, "blocks": "2"}, r"blocks 0 to 1, there is no block 2"),
        ("ErnieSkipLayerGuidance", {"scale": 1.0, "blocks": "0-1"}, r"all 2 blocks would be skipped"),
        ("ErnieSkipLayerGuidance", {"blocks": "first"}, r"block numbers such as 12, 13 or 12-14 expected, got 'first'"),
        ("ErnieSkipLayerGuidance", {"blocks": "1-2-3"}, r"got '1-2-3'"),
        ("ErnieSkipLayerGuidance", {"scale": -1.0}, r"scale must lie between 0 and 100"),
        ("ErnieNegativeForTurbo", {"scale": -1.0}, r"scale must lie between 0 and 100"),
        ("ErnieSeedVariety", {"strength": 5.0}, r"strength must lie between 0 and 4"),
        ("ErnieSeedVariety", {"strength": float("nan")}, r"strength must lie between 0 and 4"),
        ("ErnieSeedVariety", {"strength": 1.0, "start": 0.2, "end": 0.5}, r"start must not be below end.*Swap them"),
        ("ErnieNegativeForTurbo", {"negative": []}, r"one prompt expected as negative, 0 came"),
        (
            "ErnieNegativeForTurbo",
            {"negative": [[torch.zeros(1, 2, 7), {}]]},
            r"negative \[batch, tokens, \d+\] expected",
        ),
        (
            "ErnieNegativeForTurbo",
            {"negative": [[torch.full((1, 2, DIT.text_in_dim), float("nan")), {}]]},
            r"it holds NaN",
        ),
    ],
)
def test_bad_settings_are_refused(model, node_id, changes, message):
    with pytest.raises(ErnieError, match=message):
        patch(node_id, model, **changes)
