"""Noise levels follow their densities, losses are what their formulas say, and DPO's coefficients are as analysed."""

import math
from dataclasses import asdict

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.attention import attention
from ernie_pack.ernie_core.sampling.schedule import shift_sigmas
from ernie_pack.ernie_core.training.objectives import (
    SIGMA_KINDS,
    AutoBeta,
    DpoConfig,
    SigmaSampling,
    dpo_coefficients,
    dpo_loss,
    draw_noise,
    draw_sigmas,
    is_drawn,
    keyword_attention,
    loss_weights,
    region_weights,
    resolution_shift,
    sdpo_scale,
    sft_loss,
)
from train_models import make_inputs, make_model

TOKENS = 1024  # 512 px


def draw(sampling, count=4096, *, seed=0, first=0, tokens=TOKENS):
    return draw_sigmas(sampling, seed=seed, first=first, count=count, tokens=tokens)


# --- noise levels -------------------------------------------------------------------------------------------


def plain_sample(kind, mean, std, count):
    """Draws of the unshifted density by the definition of its kind, with torch's own generators."""
    generator = torch.Generator().manual_seed(11)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if kind == "logit_normal":
        return torch.sigmoid(mean + std * torch.randn(count, generator=generator, dtype=torch.float64))
    return {"style": 1 - u**3, "detail": u**3}.get(kind, u)


def kolmogorov_smirnov(one, two):
    """Largest distance of the two empirical distribution functions."""
    at = torch.cat([one, two]).double().sort().values
    f, g = (torch.searchsorted(x.double().sort().values, at, right=True) / len(x) for x in (one, two))
    return float((f - g).abs().max())


@pytest.mark.parametrize("strata", [1, 16])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.3, 0.8)], ids=["whole", "window"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", SIGMA_KINDS)
def test_sigmas_follow_their_density(kind, shift, window, strata):
    mean, std = (0.4, 1.3) if kind == "logit_normal" else (0.0, 1.0)
    low, high = window
    sampling = SigmaSampling(kind=kind, mean=mean, std=std, shift=shift, low=low, high=high, strata=strata)
    found = draw(sampling, 3000)
    expected = shift_sigmas(plain_sample(kind, mean, std, 100_000), shift)
    expected = expected[(expected > low) & (expected < high)]
    assert low <= found.min() <= found.max() <= high
    # 1.63 sqrt(1/n + 1/m): the 1 % point of the two-sample statistic
    assert kolmogorov_smirnov(found, expected) < 1.63 * math.sqrt(1 / len(found) + 1 / len(expected))


def test_a_wrong_density_would_be_noticed():
    found, expected = draw(SigmaSampling(shift=1.0), 3000), plain_sample("logit_normal", 0.2, 1.0, 100_000)
    assert kolmogorov_smirnov(found, expected) > 1.63 * math.sqrt(1 / 3000 + 1e-5)


@pytest.mark.parametrize("kind", SIGMA_KINDS)
@pytest.mark.parametrize("strata", [4, 16])
def test_every_stratum_is_hit_once_per_round(kind, strata):
    sigmas = draw(SigmaSampling(kind=kind, shift=1.0, strata=strata), 40 * strata).double()
    quantile = {
        "logit_normal": lambda s: torch.special.ndtr(torch.logit(s)),
        "style": lambda s: 1 - (1 - s) ** (1 / 3),
        "detail": lambda s: s ** (1 / 3),
    }.get(kind, lambda s: s)(sigmas)
    buckets = (quantile * strata).floor().long().view(40, strata)
    assert torch.equal(buckets.sort(dim=1).values, torch.arange(strata).expand(40, strata))
    assert len({tuple(row) for row in buckets.tolist()}) > 10, "the order must change from round to round"


def test_sigmas_belong_to_their_sample_number():
    sampling = SigmaSampling()
    whole = draw(sampling, 100, first=37)
    one_by_one = torch.cat([draw(sampling, 1, first=n) for n in range(37, 137)])
    assert torch.equal(whole, one_by_one)
    assert not torch.equal(whole, draw(sampling, 100, first=37, seed=1))
    mixed = draw_sigmas(sampling, seed=0, first=37, count=2, tokens=[TOKENS, 4096])
    assert torch.equal(mixed, torch.cat([whole[:1], draw(sampling, 1, first=38, tokens=4096)]))
    assert mixed.dtype is torch.float32


@pytest.mark.parametrize(("px", "shift"), [(512, 1.88), (768, 2.33), (1024, 3.16), (2048, 4.0)])
def test_the_shift_follows_the_resolution(px, shift):
    assert resolution_shift((px // 16) ** 2) == pytest.approx(shift, abs=0.005)
    by_rule, by_hand = (draw(SigmaSampling(shift=s), 64, tokens=(px // 16) ** 2) for s in (None, shift))
    torch.testing.assert_close(by_rule, by_hand, atol=2e-3, rtol=0)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.2, 0.9)], ids=["whole", "window"])
@pytest.mark.parametrize("shift", [1.0, None])
@pytest.mark.parametrize("kind", SIGMA_KINDS)
def test_weights_have_mean_one(kind, shift, window):
    sampling = SigmaSampling(kind=kind, shift=shift, low=window[0], high=window[1])
    weights = loss_weights(sampling, draw(sampling, 16 * 256), tokens=TOKENS)
    assert float(weights.mean()) == pytest.approx(1, abs=2e-3)
    assert bool(weights.std() > 0.05) == (kind == "weighted")


def test_the_bell_is_highest_in_the_middle():
    sampling = SigmaSampling(kind="weighted", shift=1.0)
    low, middle, high = loss_weights(sampling, torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert low == pytest.approx(high, rel=1e-4)
    assert middle > 1 > low > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "cosine"}, "one of logit_normal, uniform, style, detail, weighted; got 'cosine'"),
        ({"low": 0.5, "high": 0.5}, "low 0.5 and high 0.5"),
        ({"high": 1.5}, "high 1.5"),
        ({"std": 0.0}, "std must be above 0"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"strata": 0}, "strata must be at least 1"),
        ({"kind": "uniform", "mean": 1.0}, "belong to the kind logit_normal, not to uniform"),
    ],
    ids=str,
)
def test_samplings_that_cannot_be_are_refused(options, words):
    with pytest.raises(ErnieError, match=words):
        SigmaSampling(**options)


def test_a_shift_by_resolution_needs_the_resolution():
    with pytest.raises(ErnieError, match="number of image tokens"):
        draw_sigmas(SigmaSampling(), seed=0, first=0, count=1)
    with pytest.raises(ErnieError, match=r"one per sample \(2\), got 1"):
        draw_sigmas(SigmaSampling(), seed=0, first=0, count=2, tokens=[5])


def test_noise_is_normal_and_belongs_to_its_sample():
    noise = draw_noise((128, 16, 16), seed=3, number=5)
    assert torch.equal(noise, draw_noise((128, 16, 16), seed=3, number=5))
    others = [draw_noise((128, 16, 16), seed=s, number=n) for s, n in ((3, 6), (4, 5))]
    for other in others:
        correlation = float((noise * other).mean())
        assert abs(correlation) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert float(noise.var()) == pytest.approx(1, abs=0.03)


def test_a_share_of_samples_is_drawn():
    drawn = [is_drawn(0.3, "region", seed=0, number=n) for n in range(2000)]
    assert abs(sum(drawn) - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5
    assert drawn == [is_drawn(0.3, "region", seed=0, number=n) for n in range(2000)]
    assert drawn != [is_drawn(0.3, "keyword", seed=0, number=n) for n in range(2000)]
    assert all(is_drawn(1.0, "region", seed=0, number=n) for n in range(100))
    assert not any(is_drawn(0.0, "region", seed=0, number=n) for n in range(100))


# --- velocity error -----------------------------------------------------------------------------------------


def test_the_true_velocity_has_no_error():
    x0, noise = torch.randn(2, 4, 6, 5), draw_noise((4, 6, 5), seed=0, number=0)
    assert torch.equal(sft_loss(noise - x0, noise - x0), torch.zeros(2))
    assert (sft_loss(x0 - noise, noise - x0) > 1).all()


def test_errors_are_means_per_sample_in_fp32():
    velocity, target = torch.randn(3, 4, 6, 5).bfloat16(), torch.randn(3, 4, 6, 5)
    found = sft_loss(velocity, target)
    assert found.dtype is torch.float32
    expected = torch.stack([((v.float() - t) ** 2).mean() for v, t in zip(velocity, target, strict=True)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["HW", "BHW", "B1HW"])
def test_a_mask_is_divided_by_its_area(form):
    velocity, target = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    mask = torch.zeros(2, 1, 6, 5)
    mask[:, :, 1:3, 2:4] = 1
    given = {"HW": mask[0, 0], "BHW": mask[:, 0], "B1HW": mask}[form]
    expected = sft_loss(velocity[:, :, 1:3, 2:4], target[:, :, 1:3, 2:4])
    torch.testing.assert_close(sft_loss(velocity, target, given), expected)
    torch.testing.assert_close(sft_loss(velocity, target, given * 0.25), expected)


def test_a_region_is_not_divided_out():
    velocity, target = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    region = region_weights([(0, 0, 1, 0.5)], 6, 5)
    error = (velocity - target) ** 2
    expected = (error.sum((1, 2, 3)) + 0.1 * error[:, :, :3].sum((1, 2, 3))) / (4 * 6 * 5)
    torch.testing.assert_close(sft_loss(velocity, target, region=region), expected)
    mask = torch.zeros(6, 5)
    mask[:2] = 1
    torch.testing.assert_close(
        sft_loss(velocity, target, mask, region=region), 1.1 * sft_loss(velocity[:, :, :2], target[:, :, :2])
    )


def test_masks_that_cannot_be_used_are_refused():
    x = torch.zeros(2, 4, 6, 5)
    with pytest.raises(ErnieError, match="nothing of its picture"):
        sft_loss(x, x, torch.stack([torch.ones(6, 5), torch.zeros(6, 5)]))
    with pytest.raises(ErnieError, match=r"must be \[2, 1, 6, 5\], got \(1, 1, 5, 6\)"):
        sft_loss(x, x, torch.ones(5, 6))


def test_regions_weigh_what_they_cover():
    weights = region_weights([(0.25, 0.5, 0.75, 1.0), (0.5, 0.5, 1.0, 0.75)], 4, 4, w_l=0.2)
    inside = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]])
    torch.testing.assert_close(weights, 1 + 0.2 * inside)
    torch.testing.assert_close(region_weights([(0, 0, 0.375, 1.0)], 1, 4), torch.tensor([[1.1, 1.05, 1.0, 1.0]]))
    tiny = region_weights([(0.3, 0.3, 0.31, 0.31)], 4, 4)
    assert tiny.max() > 1, "a box smaller than a cell must count"
    mask = torch.zeros(64, 64)
    mask[32:, 16:48] = 1
    torch.testing.assert_close(region_weights(mask, 4, 4), region_weights([(0.25, 0.5, 0.75, 1.0)], 4, 4))
    assert torch.equal(region_weights([], 2, 3), torch.ones(2, 3))
    for box in ((0.5, 0, 0.5, 1), (0, 0, 1.2, 1), (10, 10, 90, 90)):
        with pytest.raises(ErnieError, match="shares of the picture"):
            region_weights([box], 4, 4)
    with pytest.raises(ErnieError, match="w_l must be 0"):
        region_weights([], 4, 4, w_l=-1)


# --- keyword attention --------------------------------------------------------------------------------------

IMAGE = 6


def written_out(q, k, v, lengths, columns, w_a):
    """softmax(logits + log W_a) V with the whole matrix, row by row."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        n = k.shape[1] if lengths is None else lengths[b]
        weights = torch.ones(q.shape[1], n, dtype=q.dtype)
        if columns[b] is not None:
            weights[:IMAGE, :IMAGE] = 1 + w_a
            for c in columns[b]:
                weights[:IMAGE, IMAGE + c] = 1 + w_a
        for head in range(q.shape[2]):
            logits = q[b, :, head] @ k[b, :n, head].t() / q.shape[-1] ** 0.5
            out[b, :, head] = torch.softmax(logits + weights.log(), -1) @ v[b, :n, head]
    return out


@pytest.mark.parametrize("lengths", [None, (11, 8)], ids=["equal", "ragged"])
def test_keywords_draw_attention_as_written_out(lengths):
    q, k, v = (torch.randn(2, 11, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    columns = [[0, 3], [1]]
    found = keyword_attention(columns, 0.5, IMAGE)(q, k, v, lengths)
    expected = written_out(q, k, v, lengths, columns, 0.5)
    kept = torch.ones(2, 11, dtype=torch.bool)
    if lengths is not None:
        kept = torch.arange(11) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(found[kept], expected[kept])
    plain = attention(q, k, v, lengths)
    assert (found - plain)[:, :IMAGE].abs().max() > 1e-2
    torch.testing.assert_close(found[:, IMAGE:][kept[:, IMAGE:]], plain[:, IMAGE:][kept[:, IMAGE:]])
    for mine, theirs in zip(
        *(torch.autograd.grad(y[kept].square().sum(), (q, k, v)) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_samples_without_keywords_are_left_alone():
    q, k, v = (torch.randn(3, 9, 2, 8) for _ in range(3))
    found = keyword_attention([None, [], [2]], 0.5, IMAGE)(q, k, v, None)
    plain = attention(q, k, v)
    torch.testing.assert_close(found[0], plain[0])
    for i in (1, 2):  # image tokens look harder at each other even when no keyword is given
        assert (found[i] - plain[i]).abs().max() > 1e-3


def test_weight_zero_is_the_plain_attention():
    assert keyword_attention([[0], [1]], 0.0, IMAGE) is attention
    assert keyword_attention([None, None], 0.01, IMAGE) is attention
    with pytest.raises(ErnieError, match="w_a must be 0"):
        keyword_attention([[0]], -0.1, IMAGE)
    with pytest.raises(ErnieError, match="given for 1 samples, the batch has 2"):
        keyword_attention([[0]], 0.1, IMAGE)(*(torch.randn(2, 9, 2, 8) for _ in range(3)), None)


def test_no_matrix_of_all_tokens_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, sizes = 500, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    q, k, v = (torch.randn(1, tokens, 1, 8) for _ in range(3))
    with Sizes():
        keyword_attention([[0]], 0.01, 400)(q, k, v, None)
    assert 0 < max(sizes) <= tokens * 8


def test_the_transformer_takes_it():
    model, (x, t, text) = make_model(), make_inputs()
    plain = model(x, t, text, text_lengths=(7, 4))
    weighted = model(x, t, text, text_lengths=(7, 4), attend=keyword_attention([[0, 5], None], 0.5, 24))
    assert (weighted - plain)[0].abs().max() > 1e-3
    torch.testing.assert_close(weighted[1], plain[1], atol=1e-5, rtol=0)


# --- preferences --------------------------------------------------------------------------------------------

N = 128 * 32 * 32


def pair(seed=0, count=4):
    """Errors of policy and reference on winners and losers, the policy's with gradient."""
    generator = torch.Generator().manual_seed(seed)
    errors = [torch.rand(count, generator=generator) + 0.5 for _ in range(4)]
    return [e.requires_grad_(i < 2) for i, e in enumerate(errors)]


def coefficients(config, errors, **options):
    loss, _ = dpo_loss(*errors, config, elements=N, **options)
    return torch.autograd.grad(loss.sum(), errors[:2])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_at_the_start_the_preference_is_undecided(reduction):
    win, lose, *_ = pair()
    loss, metrics = dpo_loss(win, lose, win.detach(), lose.detach(), DpoConfig(reduction=reduction), elements=N)
    assert torch.equal(metrics["preference"], torch.full((4,), math.log(2)))
    assert torch.equal(metrics["accuracy"], torch.full((4,), 0.5))
    assert torch.equal(metrics["gradient_factor"], torch.full((4,), 0.5))
    torch.testing.assert_close(loss, math.log(2) + 0.35 * win + 0.15 * lose)


def test_the_loss_is_the_reports():
    pw, pl, rw, rl = pair()
    config = DpoConfig(reduction="mean")
    expected = -torch.log(torch.sigmoid(-0.05 * ((pw - pl) - (rw - rl)))) + 0.35 * pw + 0.15 * pl
    torch.testing.assert_close(dpo_loss(pw, pl, rw, rl, config)[0], expected)
    both = DpoConfig(reduction="sum", anchor_reduction="sum", beta=0.05 / N, anchor_win=0.35 / N, anchor_lose=0.15 / N)
    torch.testing.assert_close(dpo_loss(pw, pl, rw, rl, both, elements=N)[0], expected)


def test_swapping_winner_and_loser_flips_the_sign():
    pw, pl, rw, rl = pair()
    config = DpoConfig(reduction="mean", anchor_win=0, anchor_lose=0)
    _, one = dpo_loss(pw, pl, rw, rl, config)
    _, two = dpo_loss(pl, pw, rl, rw, config)
    torch.testing.assert_close(one["margin"], -two["margin"])
    torch.testing.assert_close(one["accuracy"], 1 - two["accuracy"])
    torch.testing.assert_close(one["gradient_factor"], 1 - two["gradient_factor"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("margin", [-30.0, -1.0, 0.0, 1.0, 30.0])
def test_with_one_reduction_the_loser_is_never_repelled(reduction, margin):
    win, lose = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    scale = N if reduction == "sum" else 1
    errors = [win, lose, torch.tensor([1.0 + margin / scale]), torch.tensor([1.0])]
    g_win, g_lose = coefficients(DpoConfig(reduction=reduction, anchor_reduction=reduction), errors)
    s = 1 / (1 + math.exp(0.05 * margin))
    assert float(g_win) / scale == pytest.approx(0.35 + 0.05 * s, rel=1e-3)
    assert float(g_lose) / scale == pytest.approx(0.15 - 0.05 * s, rel=1e-3)
    assert float(g_lose) / scale >= 0.1 - 1e-6


def test_with_a_summed_preference_and_mean_anchors_the_loser_is_repelled_until_the_pair_is_won():
    config = DpoConfig()
    assert (config.reduction, config.anchor_reduction) == ("sum", "mean")
    win, lose = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    g_win, g_lose = coefficients(config, [win, lose, win.detach(), lose.detach()])
    assert float(g_win) == pytest.approx(0.35 + 0.05 * N / 2, rel=1e-5)
    assert float(g_lose) == pytest.approx(0.15 - 0.05 * N / 2, rel=1e-5)
    g_win, g_lose = coefficients(config, [win, lose, torch.tensor([1.01]), torch.tensor([1.0])])
    assert float(g_lose) == pytest.approx(0.15, rel=1e-3)
    assert float(g_win) == pytest.approx(0.35, rel=1e-3)


def test_gradients_on_a_linear_model_are_the_formula():
    """v = W x with its gradient written out: 2 (W x - target) x^T / N for each error."""
    generator = torch.Generator().manual_seed(0)
    x_w, x_l, t_w, t_l = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    w, ref = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    w.requires_grad_()
    config = DpoConfig(beta=3.0, reduction="mean")

    def error(weight, x, t):
        return (x @ weight.t() - t).square().mean(1)

    errors = [error(m, x, t) for m in (w, ref) for x, t in ((x_w, t_w), (x_l, t_l))]
    loss, _ = dpo_loss(*errors, config)
    found = torch.autograd.grad(loss.mean(), w)[0]
    pw, pl, rw, rl = (e.detach() for e in errors)
    s = torch.sigmoid(3.0 * ((pw - pl) - (rw - rl)))
    expected = torch.zeros_like(w)
    for i in range(5):
        for factor, x, t in ((0.35 + 3 * s[i], x_w[i], t_w[i]), (0.15 - 3 * s[i], x_l[i], t_l[i])):
            expected += factor * torch.outer(2 * (w.detach() @ x - t) / 8, x) / 5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_mean_reduction_does_not_know_the_resolution():
    errors = pair()
    config = DpoConfig(reduction="mean", beta=2000.0)
    small, large = (dpo_loss(*errors, config, elements=n)[1] for n in (N // 4, N))
    assert torch.equal(small["margin"], large["margin"])
    small, large = (dpo_loss(*errors, DpoConfig(), elements=n)[1] for n in (N // 4, N))
    torch.testing.assert_close(4 * small["margin"], large["margin"])
    with pytest.raises(ErnieError, match="needs the number of elements"):
        dpo_loss(*errors, DpoConfig())


@pytest.mark.parametrize("mu", [None, 0.6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_passes_give_the_gradient_of_one(reduction, mu):
    errors, (r_w, r_l) = pair(), torch.randn(2, 4, 3, 5, 5)
    config = DpoConfig(beta=0.7, reduction=reduction, sdpo_mu=mu)
    options = {"residual_win": r_w, "residual_lose": r_l, "elements": 75}
    loss, metrics = dpo_loss(*errors, config, **options)
    expected = torch.autograd.grad(loss.sum(), errors[:2])
    _, alone = dpo_loss(*(e.detach() for e in errors), config, **options)
    assert all(torch.equal(alone[k], metrics[k]) for k in metrics)
    for found, one in zip(dpo_coefficients(alone, config, elements=75), expected, strict=True):
        torch.testing.assert_close(found, one)


def test_the_safeguard_scales_the_losers_gradient_and_no_value():
    errors = pair()
    residual_win = torch.randn(4, 3, 5, 5)
    # one pair opposed, one orthogonal, one parallel and longer, one parallel and shorter
    along = torch.tensor([-1.0, 0.0, 2.0, 0.1])[:, None, None, None]
    residual_lose = residual_win * along
    options = {"residual_win": residual_win, "residual_lose": residual_lose, "elements": N}
    plain, safe = DpoConfig(beta=0.5, reduction="mean"), DpoConfig(beta=0.5, reduction="mean", sdpo_mu=0.6)
    assert torch.equal(dpo_loss(*errors, plain, **options)[0], dpo_loss(*errors, safe, **options)[0])
    scale = sdpo_scale(residual_win, residual_lose, 0.6)
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 0.4 / 2.0, 1.0]))
    (w0, l0), (w1, l1) = (
        torch.autograd.grad(dpo_loss(*errors, c, **options)[0].sum(), errors[:2]) for c in (plain, safe)
    )
    torch.testing.assert_close(w0, w1)
    torch.testing.assert_close(l1 - 0.15, scale * (l0 - 0.15))
    with pytest.raises(ErnieError, match="needs the residuals"):
        dpo_loss(*errors, safe)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_the_safeguard_keeps_the_winners_error_from_rising(mu):
    """To first order, for a step in output space against the gradient of the preference term."""
    generator = torch.Generator().manual_seed(0)
    r_w, r_l = (torch.randn(50, 20, generator=generator) + 0.7 for _ in range(2))
    r_l *= 2
    scale = sdpo_scale(r_w, r_l, mu)
    assert ((scale >= 0) & (scale <= 1)).all()
    assert (scale < 1).any()
    rise = (r_w * (-(r_w - scale[:, None] * r_l))).sum(1)
    assert (rise <= 1e-4).all()
    unguarded = (r_w * (-(r_w - 3 * r_l))).sum(1)
    assert (unguarded > 0).any()


def test_a_winner_above_the_reference_raises_the_alarm():
    one = torch.ones(3)
    _, metrics = dpo_loss(torch.tensor([0.9, 1.0, 1.2]), one * 2, one, one, DpoConfig(reduction="mean"))
    assert metrics["win_alarm"].tolist() == [0, 0, 1]
    torch.testing.assert_close(metrics["win_excess"], torch.tensor([-0.1, 0.0, 0.2]))
    assert metrics["accuracy"].tolist() == [1, 1, 1], "the margin grows all the same: this is what the alarm is for"
    assert metrics["lose_excess"].tolist() == [1, 1, 1]
    assert metrics["negative_margin"].tolist() == [0, 0, 0]
    assert not any(m.requires_grad for m in metrics.values())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_auto_beta_steers_the_gradient_factor(reduction):
    config, auto = DpoConfig(reduction=reduction, auto_beta=0.2), AutoBeta(target=0.2)
    assert auto.beta(config, elements=N) == config.beta
    auto.update(0.0)
    assert auto.beta(config, elements=N) == config.beta, "margins are 0 before the first step"
    usual = 20.0 if reduction == "sum" else 20.0 / N
    for i in range(200):
        auto.update(usual * (0.5 if i % 2 else 1.5))
    beta = auto.beta(config, elements=N)
    assert 1 / (1 + math.exp(beta * usual)) == pytest.approx(0.2, abs=0.01)
    assert AutoBeta(**asdict(auto)).beta(config, elements=N) == beta
    low, high = AutoBeta(target=0.2), AutoBeta(target=0.2)
    low.update(1e9)
    high.update(1e-9)
    to_mean = N if reduction == "mean" else 1
    assert low.beta(config, elements=N) == 1e-3 * to_mean
    assert high.beta(config, elements=N) == 1.0 * to_mean


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"anchor_lose": -0.1}, "0.35 on the winner and -0.1 on the loser"),
        ({"reduction": "none"}, "reduction must be mean or sum"),
        ({"auto_beta": 0.5}, "auto_beta must lie between 0 and 0.5"),
        ({"sdpo_mu": 1.5}, "sdpo_mu must lie between 0 and 1"),
    ],
    ids=str,
)
def test_preferences_that_cannot_be_are_refused(options, words):
    with pytest.raises(ErnieError, match=words):
        DpoConfig(**options)
