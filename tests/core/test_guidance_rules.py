"""Guidance rules: formulas against slow ones, neutral settings, nothing shared between runs or pictures."""

import math

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.guidance import (
    AdaptiveSkip,
    GuidanceRun,
    Interval,
    Projection,
    Rescale,
    SkipLayers,
    ZeroStar,
    cfg_velocity,
    with_guidance,
    without_neutral,
    zero_star_scale,
)
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas

SIGMAS = make_sigmas(6)
CFG = 3.0
SHAPE = (3, 4, 2, 2)
NEUTRAL = [Interval(), AdaptiveSkip(similarity=1.0), Projection(), Rescale(share=0.0), SkipLayers(blocks=(1,), scale=0)]
ACTIVE = {
    "interval": Interval(start=0.95, end=0.5),
    "skip": AdaptiveSkip(similarity=0.9),
    "zero star": ZeroStar(zero_steps=1),
    "projection": Projection(eta=0.3, momentum=-0.5, norm_threshold=0.4),
    "rescale": Rescale(share=0.7),
    "skip layers": SkipLayers(blocks=(0,), scale=1.5, start=0.9, end=0.2),
}


def start(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Model:
    """A denoiser that pulls towards `target`, a different one per picture; counts its calls."""

    def __init__(self, seed: int, calls=None):
        self.target = start(seed + 10)
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        target = self.target if len(x) == SHAPE[0] else self.target[self.only]
        return torch.tanh(x - target) * (1 + sigma)


def models():
    return Model(1), Model(2), Model(3)


def paint(rules, cfg=CFG, x=None, run=None, only=None):
    cond, uncond, weak = models()
    for model in (cond, uncond, weak):
        model.only = only
    run = run or GuidanceRun(rules, SIGMAS)
    denoise = with_guidance(cond, uncond, cfg, run, without=lambda blocks: weak)
    return sample_euler(denoise, start() if x is None else x, SIGMAS), (cond.calls, uncond.calls, weak.calls)


def plain(cfg=CFG):
    cond, uncond, _ = models()
    return sample_euler(lambda x, s: cfg_velocity(cond(x, s), uncond(x, s), cfg), start(), SIGMAS)


def test_no_rules_and_neutral_rules_are_plain_guidance_bit_for_bit():
    assert without_neutral(NEUTRAL) == ()
    for rules in ([], *([rule] for rule in NEUTRAL), NEUTRAL):
        picture, calls = paint(rules)
        assert torch.equal(picture, plain())
        assert calls == (6, 6, 0)


@pytest.mark.parametrize("rule", ACTIVE.values(), ids=ACTIVE)
def test_each_rule_changes_the_picture(rule):
    assert not torch.allclose(paint([rule])[0], plain(), atol=1e-3)


@pytest.mark.parametrize("rules", [*([r] for r in ACTIVE.values()), list(ACTIVE.values())])
def test_a_batch_equals_its_pictures_one_by_one(rules):
    together, _ = paint(rules)
    alone = torch.cat([paint(rules, x=start()[i : i + 1], only=[i])[0] for i in range(SHAPE[0])])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rules", [*([r] for r in ACTIVE.values()), list(ACTIVE.values())])
def test_nothing_is_left_from_one_run_to_the_next(rules):
    first, _ = paint(rules)
    paint(rules, x=start(7))
    assert torch.equal(paint(rules)[0], first)


def test_the_rules_order_matters_only_inside_a_kind():
    rules = list(ACTIVE.values())
    assert torch.equal(paint(rules)[0], paint(rules[::-1])[0])
    two = [Rescale(share=0.5), Rescale(share=0.5)]
    torch.testing.assert_close(paint(two)[0], paint([Rescale(share=0.75)])[0], rtol=0.05, atol=0.05)


# --- interval, skipping ----------------------------------------------------------------------------------------------


def test_an_empty_interval_is_the_conditional_picture_without_a_second_call():
    picture, calls = paint([Interval(start=0.5, end=0.5)])
    assert torch.equal(picture, sample_euler(Model(1), start(), SIGMAS))
    assert calls == (6, 0, 0)


def test_an_interval_saves_the_calls_outside_of_it():
    inside = [s for s in SIGMAS[:-1].tolist() if 0.5 < s <= 0.95]
    assert paint([ACTIVE["interval"]])[1] == (6, len(inside), 0)
    assert 0 < len(inside) < 6


def test_intervals_intersect():
    both, _ = paint([Interval(start=0.95, end=0.0), Interval(start=1.0, end=0.5)])
    assert torch.equal(both, paint([ACTIVE["interval"]])[0])


def test_agreeing_predictions_end_the_second_call():
    target = start(5)

    def model(offset):
        return lambda x, sigma: (x - target - offset * sigma) / sigma  # x0 = target + offset sigma

    calls = []

    def uncond(x, sigma):
        calls.append(sigma)
        return model(0.7)(x, sigma)

    run = GuidanceRun([AdaptiveSkip(similarity=0.9)], SIGMAS)
    sample_euler(with_guidance(model(0.0), uncond, CFG, run), start(), SIGMAS)

    def agree(s):
        other = target + 0.7 * s
        return torch.nn.functional.cosine_similarity(target.flatten(1), other.flatten(1)).min() >= 0.9

    wanted = next(i for i, s in enumerate(SIGMAS.tolist()) if agree(s)) + 1
    assert len(calls) == wanted < len(SIGMAS) - 1
    assert run.evaluations_saved == len(SIGMAS) - 1 - wanted


def test_similarity_0_keeps_one_guided_step():
    """Predictions that look away from each other disagree at any similarity."""
    run = GuidanceRun([AdaptiveSkip(similarity=0.0)], SIGMAS)
    x, cond = start(), start(1)
    run.observe(x, 1.0, cond, cond * 1.1)
    assert torch.equal(run.combine(x, 1.0, cond, cond * 1.1, CFG), cfg_velocity(cond, cond * 1.1, CFG))
    assert not run.wants_uncond(0.5)


# --- formulas --------------------------------------------------------------------------------------------------------


def slow_projection(differences, cond, *, eta, momentum, norm_threshold, cfg):
    """APG, algorithm 1, one picture as a list of numbers; `differences` are those of all calls so far."""
    average = [0.0] * len(cond)
    for difference in differences:
        average = [d + momentum * a for d, a in zip(difference, average, strict=True)]
    norm = math.sqrt(sum(d * d for d in average))
    limit = norm_threshold * math.sqrt(len(cond))
    factor = min(1.0, limit / norm) if norm_threshold > 0 else 1.0
    d = [factor * v for v in average]
    length = math.sqrt(sum(c * c for c in cond))
    unit = [c / length for c in cond]
    dot = sum(a * b for a, b in zip(d, unit, strict=True))
    orthogonal = [a - dot * b for a, b in zip(d, unit, strict=True)]
    changed = [o + eta * dot * u for o, u in zip(orthogonal, unit, strict=True)]
    return [c + (cfg - 1) * v for c, v in zip(cond, changed, strict=True)]


@pytest.mark.parametrize("norm_threshold", [0.0, 0.4, 50.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_projection_is_the_papers_algorithm(eta, momentum, norm_threshold):
    run = GuidanceRun([Projection(eta=eta, momentum=momentum, norm_threshold=norm_threshold)], SIGMAS)
    history = []
    for call, sigma in enumerate((1.0, 0.8, 0.5)):
        x, cond, uncond = start(call), start(call + 20), start(call + 40)
        velocity = run.combine(x, sigma, cond, uncond, CFG)
        x0_cond, x0_uncond = x - sigma * cond, x - sigma * uncond
        history.append(x0_cond - x0_uncond)
        for i in range(SHAPE[0]):
            wanted = slow_projection(
                [h[i].flatten().tolist() for h in history],
                x0_cond[i].flatten().tolist(),
                eta=eta,
                momentum=momentum,
                norm_threshold=norm_threshold,
                cfg=CFG,
            )
            got = (x - sigma * velocity)[i].flatten()
            torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_projection_with_neutral_settings_is_plain_guidance():
    run = GuidanceRun([Projection(norm_threshold=100.0)], SIGMAS)  # a threshold that nothing reaches
    x, cond, uncond = start(), start(1), start(2)
    torch.testing.assert_close(run.combine(x, 0.7, cond, uncond, CFG), cfg_velocity(cond, uncond, CFG))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescale_moves_the_contrast_of_the_picture(share):
    x, cond, uncond = start(), start(1), start(2)
    guided = x - 0.7 * cfg_velocity(cond, uncond, CFG)
    out = x - 0.7 * GuidanceRun([Rescale(share=share)], SIGMAS).combine(x, 0.7, cond, uncond, CFG)
    for i in range(SHAPE[0]):
        before, wanted = guided[i].std(), (x - 0.7 * cond)[i].std()
        torch.testing.assert_close(out[i].std(), (1 - share) * before + share * wanted)
        torch.testing.assert_close(out[i] / out[i].std(), guided[i] / before, rtol=1e-4, atol=1e-5)


def test_zero_star_scale_is_the_least_squares_one():
    cond, uncond = start(1), start(2)
    for i, scale in enumerate(zero_star_scale(cond, uncond).flatten().tolist()):
        wanted = torch.linalg.lstsq(uncond[i].flatten()[:, None], cond[i].flatten()).solution.item()
        assert scale == pytest.approx(wanted, rel=1e-4)
    assert zero_star_scale(cond, torch.zeros_like(cond)).unique().tolist() == [1.0]


def test_zero_star_with_scale_1_is_plain_guidance():
    cond = start(1)
    side = start(2)
    side = (
        side
        - (side * cond).flatten(1).sum(1)[:, None, None, None]
        * cond
        / cond.square().flatten(1).sum(1)[:, None, None, None]
    )
    uncond = cond + side  # <c, u> = |c|^2; made the same as |u|^2 by shortening
    uncond = uncond * ((cond * uncond).flatten(1).sum(1) / uncond.square().flatten(1).sum(1))[:, None, None, None]
    out = GuidanceRun([ZeroStar()], SIGMAS).combine(start(), 0.7, cond, uncond, CFG)
    torch.testing.assert_close(out, cfg_velocity(cond, uncond, CFG), rtol=1e-4, atol=1e-5)


def test_zero_steps_hold_the_state_without_a_model_call():
    picture, calls = paint([ZeroStar(zero_steps=2)])
    assert calls == (4, 4, 0)
    cond, uncond, _ = models()
    run = GuidanceRun([ZeroStar()], SIGMAS)
    later = sample_euler(with_guidance(cond, uncond, CFG, run), start(), SIGMAS[2:])
    assert torch.equal(picture, later)
    assert torch.equal(paint([ZeroStar(zero_steps=999)])[0], start())


def test_skip_layers_adds_the_difference():
    velocity, cond, weak = (start(i) for i in range(1, 4))
    rule = SkipLayers(blocks=(0,), scale=2.0)
    run = GuidanceRun([rule], SIGMAS)
    torch.testing.assert_close(run.push(velocity, cond, [(rule, weak)]), velocity + 2 * (cond - weak))
    assert paint([ACTIVE["skip layers"]])[1][2] == sum(0.2 < s <= 0.9 for s in SIGMAS.tolist())


def test_skip_layers_acts_at_cfg_1_too():
    cond, _, weak = models()
    rule = SkipLayers(blocks=(0,), scale=2.0)
    out = with_guidance(cond, None, 1.0, GuidanceRun([rule], SIGMAS), without=lambda blocks: weak)(start(), 0.5)
    torch.testing.assert_close(out, cond(start(), 0.5) * 3 - 2 * weak(start(), 0.5))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(start=0.2, end=0.5), r"start must not be below end.*got start 0\.2 and end 0\.5"),
        (lambda: Interval(start=1.5), r"start must lie between 0 and 1"),
        (lambda: Interval(end=math.nan), r"end must lie between 0 and 1"),
        (lambda: AdaptiveSkip(similarity=2.0), r"similarity must lie between 0 and 1"),
        (lambda: Projection(momentum=1.0), r"momentum must lie inside -1 to 1"),
        (lambda: Projection(norm_threshold=-1.0), r"norm_threshold must lie between 0 and 100"),
        (lambda: Rescale(share=math.nan), r"rescale must lie between 0 and 1"),
        (lambda: ZeroStar(zero_steps=-1), r"zero_steps must lie between 0 and 1000"),
        (lambda: SkipLayers(blocks=(0,), scale=-1.0), r"scale must lie between 0 and 100"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ErnieError, match=message):
        make()
