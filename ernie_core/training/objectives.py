"""What training minimises: noise levels, velocity error, ERNIE-ViLG 2.0's two devices, and DPO. Pure functions.

x_sigma = (1 - sigma) x0 + sigma noise, target velocity = noise - x0. Everything random is a function of (seed, number
of the sample in the run), drawn on the CPU: any sample of any step can be asked for alone, on any machine.

Sources: logit-normal density, SD3 (arXiv 2403.03206); shift by resolution, FLUX (mu linear in image tokens, 0.5 at
256 and 1.15 at 4096); cubic densities, T2I-Adapter (arXiv 2302.08453, 3.4); region loss and keyword attention,
ERNIE-ViLG 2.0 (arXiv 2210.15257); DPO and its anchors, ERNIE-Image report (arXiv 2605.25347, 2.2.2); the safeguard,
Diffusion-SDPO (arXiv 2511.03317).

Shape letters: B batch · P pairs · C latent channels · H, W latent grid · S joint tokens · N heads · K head dim.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ErnieError
from ..model.attention import AttentionFunction, attention
from ..sampling.schedule import shift_sigmas

SigmaKind = Literal["logit_normal", "uniform", "style", "detail", "weighted"]
SIGMA_KINDS: tuple[SigmaKind, ...] = ("logit_normal", "uniform", "style", "detail", "weighted")
Reduction = Literal["mean", "sum"]
Box = tuple[float, float, float, float]

MAX_SHIFT = 4.0  # of the resolution-dependent rule; the released scheduler's own value


def make_generator(purpose: str, *numbers: int | str) -> torch.Generator:
    """A CPU generator that is a function of its arguments: other purposes and numbers give independent draws."""
    digest = hashlib.blake2b(" ".join([purpose, *map(str, numbers)]).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def is_drawn(share: float, purpose: str, *, seed: int, number: int) -> bool:
    """Whether sample `number` belongs to the `share` (0 to 1) of samples that a training device applies to."""
    draw = torch.rand((), generator=make_generator(purpose, seed, number), dtype=torch.float64)
    return float(draw) < share


# --- noise levels -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SigmaSampling:
    """The density that training draws sigma from, before and after the shift."""

    kind: SigmaKind = "logit_normal"
    """logit_normal: sigmoid(mean + std * normal). uniform. style: 1 - u^3, mostly high noise. detail: u^3, mostly low
    noise. weighted: uniform, with losses weighted by a bell (`loss_weights`)."""
    mean: float = 0.0
    """logit_normal only."""
    std: float = 1.0
    """logit_normal only."""
    shift: float | None = None
    """s' = k s / (1 + (k - 1) s) on every kind; None = by resolution (`resolution_shift`), 1 = none."""
    low: float = 0.0
    """The density is cut off below this sigma, not clamped to it ..."""
    high: float = 1.0
    """... and above this one."""
    strata: int = 16
    """Each run of this many consecutive samples hits every quantile bucket once; 1 = independent draws."""

    def __post_init__(self) -> None:
        if self.kind not in SIGMA_KINDS:
            raise ErnieError(f"sigma kind must be one of {', '.join(SIGMA_KINDS)}; got {self.kind!r}.")
        if not 0 <= self.low < self.high <= 1:
            raise ErnieError(f"sigmas must lie in 0 <= low < high <= 1, got low {self.low:g} and high {self.high:g}.")
        if not self.std > 0:
            raise ErnieError(f"std must be above 0, got {self.std:g}.")
        if self.shift is not None and not self.shift > 0:
            raise ErnieError(f"shift must be above 0 (1 = none), got {self.shift:g}.")
        if self.strata < 1:
            raise ErnieError(f"strata must be at least 1 (1 = independent draws), got {self.strata}.")
        if self.kind != "logit_normal" and (self.mean, self.std) != (0.0, 1.0):
            raise ErnieError(f"mean and std belong to the kind logit_normal, not to {self.kind}; leave them 0 and 1.")


def resolution_shift(tokens: int) -> float:
    """exp(mu) for `tokens` image tokens: 1.88 at 512 px, 2.33 at 768 px, 3.16 at 1024 px, never above 4."""
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return min(math.exp(mu), MAX_SHIFT)


def _shift_of(sampling: SigmaSampling, tokens: int | None) -> float:
    if sampling.shift is not None:
        return sampling.shift
    if tokens is None:
        raise ErnieError("the shift follows the resolution (shift None): the number of image tokens must be given.")
    return resolution_shift(tokens)


def _sigma_of_quantile(sampling: SigmaSampling, u: Tensor, shift: float) -> Tensor:
    if sampling.kind == "logit_normal":
        sigma = torch.sigmoid(sampling.mean + sampling.std * torch.special.ndtri(u))
    elif sampling.kind == "style":
        sigma = 1 - (1 - u) ** 3  # written so that the quantile rises with sigma
    elif sampling.kind == "detail":
        sigma = u**3
    else:
        sigma = u
    return shift_sigmas(sigma, shift)


def _quantile_of_sigma(sampling: SigmaSampling, sigma: Tensor, shift: float) -> Tensor:
    sigma = shift_sigmas(sigma, 1 / shift).clamp(0, 1)  # rounding takes 1 beyond 1
    if sampling.kind == "logit_normal":
        return torch.special.ndtr((torch.logit(sigma) - sampling.mean) / sampling.std)
    if sampling.kind == "style":
        return 1 - (1 - sigma) ** (1 / 3)
    if sampling.kind == "detail":
        return sigma ** (1 / 3)
    return sigma


def _window(sampling: SigmaSampling, shift: float) -> Tensor:
    """Quantiles [2] of the lowest and highest sigma."""
    return _quantile_of_sigma(sampling, torch.tensor([sampling.low, sampling.high], dtype=torch.float64), shift)


def _stratified(strata: int, seed: int, turn: int) -> Tensor:
    """Quantiles [strata] of one round: one inside every bucket, in random order."""
    generator = make_generator("sigma", seed, turn)
    buckets = torch.randperm(strata, generator=generator)
    return (buckets + torch.rand(strata, generator=generator, dtype=torch.float64)) / strata


def draw_sigmas(
    sampling: SigmaSampling,
    *,
    seed: int,
    first: int,
    count: int,
    tokens: int | Sequence[int | None] | None = None,
) -> Tensor:
    """Sigmas [count] (fp32, CPU, inside (0, 1)) of the run's samples `first`, `first` + 1, ...

    `tokens`: image tokens of the samples, one number or one each; needed where the shift follows the resolution.
    Stateless: sample n gets the same sigma whoever asks, and in whatever batch.
    """
    if tokens is None or isinstance(tokens, int):
        tokens = [tokens] * count
    if len(tokens) != count:
        raise ErnieError(f"tokens must be one number or one per sample ({count}), got {len(tokens)}.")
    strata, sigmas = sampling.strata, torch.empty(count, dtype=torch.float64)
    start, end = first // strata, -(-(first + count) // strata)
    u = torch.cat([_stratified(strata, seed, turn) for turn in range(start, end)])[first - start * strata :][:count]
    for number in set(tokens):
        here = torch.tensor([n == number for n in tokens])
        shift = _shift_of(sampling, number)
        low, high = _window(sampling, shift)
        sigmas[here] = _sigma_of_quantile(sampling, low + u[here] * (high - low), shift)
    # fp32 rounds the outermost quantiles onto 0 and 1, where x0 or the noise would be absent.
    return sigmas.float().clamp(1e-6, 1 - 1e-6)


def loss_weights(sampling: SigmaSampling, sigmas_B: Tensor, *, tokens: int | None = None) -> Tensor:
    """Weights [B] (fp32) of the losses at these sigmas; their mean over the sampled density is 1.

    All ones but for the kind "weighted": there the bell exp(-2 (u - 1/2)^2) - exp(-1/2) over the position u on the
    unshifted grid, the "weighted" timesteps of ai-toolkit.
    """
    if sampling.kind != "weighted":
        return torch.ones(sigmas_B.shape, dtype=torch.float32, device=sigmas_B.device)
    shift = _shift_of(sampling, tokens)
    low, high = _window(sampling, shift).tolist()

    def integral(u: float) -> float:
        return math.sqrt(math.pi / 8) * math.erf(math.sqrt(2) * (u - 0.5)) - u * math.exp(-0.5)

    mean = (integral(high) - integral(low)) / (high - low)
    u_B = _quantile_of_sigma(sampling, sigmas_B.double(), shift)
    return ((torch.exp(-2 * (u_B - 0.5) ** 2) - math.exp(-0.5)) / mean).float()


def draw_noise(shape_CHW: Sequence[int], *, seed: int, number: int) -> Tensor:
    """Unit normal noise [C, H, W] (fp32, CPU) of the run's sample `number`."""
    return torch.randn(*shape_CHW, generator=make_generator("noise", seed, number))


# --- velocity error -----------------------------------------------------------------------------------------


def sft_loss(
    velocity_BCHW: Tensor, target_BCHW: Tensor, weight_map: Tensor | None = None, *, region: Tensor | None = None
) -> Tensor:
    """Mean squared velocity error [B] of each sample, in fp32.

    Args:
        weight_map: mask or weights, broadcast to [B, 1, H, W]; the mean is the weighted one, sum(w e) / sum(w), so a
            small mask does not mean a small loss.
        region: factors of the same shape that are not divided out: `region_weights` as in ERNIE-ViLG 2.0.

    Raises:
        ErnieError: a sample's `weight_map` is zero everywhere.
    """
    error_BCHW = (velocity_BCHW.float() - target_BCHW.float()).square()
    if region is not None:
        error_BCHW = error_BCHW * _as_map(region, error_BCHW)
    if weight_map is None:
        return error_BCHW.flatten(1).mean(1)
    weight = _as_map(weight_map, error_BCHW).expand(error_BCHW.shape[0], 1, *error_BCHW.shape[2:])
    area_B = weight.flatten(1).sum(1)
    if not bool((area_B > 0).all()):
        raise ErnieError("a mask leaves nothing of its picture to learn from; enlarge it or leave the picture out.")
    return (error_BCHW.mean(1, keepdim=True) * weight).flatten(1).sum(1) / area_B


def _as_map(weights: Tensor, like_BCHW: Tensor) -> Tensor:
    """[H, W], [B, H, W] or [B, 1, H, W] as [B or 1, 1, H, W]."""
    if weights.ndim == 2:
        weights = weights[None]
    if weights.ndim == 3:
        weights = weights[:, None]
    batch, _, *grid = like_BCHW.shape
    if weights.ndim != 4 or weights.shape[0] not in (1, batch) or weights.shape[1] != 1 or [*weights.shape[2:]] != grid:
        raise ErnieError(f"a weight map must be [{batch}, 1, {grid[0]}, {grid[1]}], got {tuple(weights.shape)}.")
    return weights.to(device=like_BCHW.device, dtype=torch.float32)


def region_weights(regions: Sequence[Box] | Tensor, height: int, width: int, w_l: float = 0.1) -> Tensor:
    """Loss weights [H, W] (fp32): 1 + `w_l` inside the regions, 1 outside (ERNIE-ViLG 2.0).

    A cell that a region covers in part gets the part. Overlaps count once.

    Args:
        regions: boxes (left, top, right, bottom) as shares of the picture, 0 to 1; or a mask of any size, 0 to 1.
        height: cells of the latent grid.
        width: cells of the latent grid.
        w_l: extra weight; the paper's value is 0.1.

    Raises:
        ErnieError: a box that is empty or leaves the picture, or a negative weight.
    """
    if w_l < 0:
        raise ErnieError(f"w_l must be 0 (off) or more, got {w_l:g}.")
    if not isinstance(regions, Sequence):
        inside = F.adaptive_avg_pool2d(regions.float()[None, None], (height, width))[0, 0]
        return 1 + w_l * inside.clamp(0, 1)
    inside = torch.zeros(height, width)
    for box in regions:
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ErnieError(
                f"a box must be (left, top, right, bottom) as shares of the picture with 0 <= left < right <= 1 and "
                f"0 <= top < bottom <= 1, got {tuple(box)}."
            )
        rows, columns = _covered(top, bottom, height), _covered(left, right, width)
        inside = torch.maximum(inside, rows[:, None] * columns[None, :])
    return 1 + w_l * inside


def _covered(start: float, end: float, cells: int) -> Tensor:
    """Share [cells] of each cell that the interval covers."""
    edges = torch.arange(cells + 1, dtype=torch.float64)
    low, high = edges[:-1].clamp(min=start * cells), edges[1:].clamp(max=end * cells)
    return (high - low).clamp(min=0).float()


# --- keyword attention --------------------------------------------------------------------------------------


def keyword_attention(
    keyword_columns: Sequence[Sequence[int] | None], w_a: float, image_tokens: int
) -> AttentionFunction:
    """The `attend` of a DiT in which image tokens look harder at image tokens and keywords (ERNIE-ViLG 2.0).

    The paper multiplies the logits by W_a = 1 + w_a where the query is an image token and the key an image token or a
    keyword. That weakens a key whose logit is negative. We use the monotone form: the *weight* of such a key is
    multiplied by 1 + w_a before normalisation, which is log(1 + w_a) added to its logit. To first order both are the
    same where the logit is 1. Queries of the text see no change.

    Image and text queries run in two calls, so the bias is one row per sample and never an S x S matrix.

    Args:
        keyword_columns: per sample the text token indices (0 = first) of its keywords; None = this sample plainly.
        w_a: the paper's value is 0.01; 0 gives the plain attention itself.
        image_tokens: image tokens of the joint sequence, which come first.

    Raises:
        ErnieError: a negative `w_a`.
    """
    if w_a < 0:
        raise ErnieError(f"w_a must be 0 (off) or more, got {w_a:g}.")
    if w_a == 0 or all(columns is None for columns in keyword_columns):
        return attention

    def attend(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, lengths: Sequence[int] | None) -> Tensor:
        batch, tokens = k_BSNK.shape[:2]
        if len(keyword_columns) != batch:
            raise ErnieError(f"keywords are given for {len(keyword_columns)} samples, the batch has {batch}.")
        bias_BS = torch.zeros(batch, tokens, dtype=q_BSNK.dtype, device=q_BSNK.device)
        for i, columns in enumerate(keyword_columns):
            if columns is not None:
                bias_BS[i, :image_tokens] = math.log1p(w_a)
                for column in columns:
                    bias_BS[i, image_tokens + column] = math.log1p(w_a)
            if lengths is not None:
                bias_BS[i, lengths[i] :] = -math.inf
        q, k, v = (x.transpose(1, 2) for x in (q_BSNK[:, :image_tokens], k_BSNK, v_BSNK))
        # Not expanded: a kernel that must pad the bias would otherwise write out the whole of it.
        image = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BS[:, None, None]).transpose(1, 2)
        text = attention(q_BSNK[:, image_tokens:], k_BSNK, v_BSNK, lengths, backend="sdpa")
        return torch.cat([image, text], dim=1)

    return attend


# --- preferences --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """The preference loss of the ERNIE-Image report; see `dpo_loss` for what the reductions do."""

    beta: float = 0.05
    """On the scale of `reduction`: 0.05 over summed errors is 0.05 times the latent's elements over mean ones."""
    anchor_win: float = 0.35
    """Weight of the winner's plain velocity error."""
    anchor_lose: float = 0.15
    """Weight of the loser's plain velocity error."""
    reduction: Reduction = "sum"
    """Of the errors inside the preference term."""
    anchor_reduction: Reduction = "mean"
    """Of the errors in the two anchors."""
    auto_beta: float | None = None
    """None = beta as given; else the gradient factor that beta is steered to (`AutoBeta`), such as 0.2."""
    sdpo_mu: float | None = None
    """None = off; else the safeguard's mu (`sdpo_scale`), such as 0.6."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ErnieError(f"beta must be above 0, got {self.beta:g}.")
        if self.anchor_win < 0 or self.anchor_lose < 0:
            raise ErnieError(
                f"anchors must be 0 (off) or more, got {self.anchor_win:g} on the winner and {self.anchor_lose:g} on "
                "the loser."
            )
        for name in ("reduction", "anchor_reduction"):
            if getattr(self, name) not in ("mean", "sum"):
                raise ErnieError(f"{name} must be mean or sum, got {getattr(self, name)!r}.")
        if self.auto_beta is not None and not 0 < self.auto_beta < 0.5:
            raise ErnieError(f"auto_beta must lie between 0 and 0.5, got {self.auto_beta:g}.")
        if self.sdpo_mu is not None and not 0 <= self.sdpo_mu <= 1:
            raise ErnieError(f"sdpo_mu must lie between 0 and 1, got {self.sdpo_mu:g}.")


def _elements(reduction: Reduction, elements: int | None) -> float:
    if reduction == "mean":
        return 1.0
    if elements is None:
        raise ErnieError("the reduction sum needs the number of elements of a latent.")
    return float(elements)


def sdpo_scale(residual_win: Tensor, residual_lose: Tensor, mu: float) -> Tensor:
    """Factor [P] in [0, 1] on the loser's gradient that keeps the winner's error from rising to first order.

    clip((1 - mu) |r_w|^2 / (r_w . r_l), 0, 1) where r_w . r_l > 0, else 1; r = velocity - target [P, ...], the
    gradient of the error with respect to the model's output. mu 1 silences the loser wherever the two agree in
    direction, mu 0 lets the winner's error stand still at worst. Source: Diffusion-SDPO, arXiv 2511.03317.
    """
    r_w, r_l = (r.detach().float().flatten(1) for r in (residual_win, residual_lose))
    along = (r_w * r_l).sum(1)
    bounded = ((1 - mu) * r_w.square().sum(1) / along.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return torch.where(along > 0, bounded, torch.ones_like(bounded))


def dpo_loss(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    config: DpoConfig,
    *,
    beta: float | None = None,
    elements: int | None = None,
    residual_win: Tensor | None = None,
    residual_lose: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair [P] and its metrics, from the errors `sft_loss` gives (means; reductions are made here).

    With l = the squared velocity error against the true target, same noise and same sigma for all four:

        margin = (l_ref(win) - l_pol(win)) - (l_ref(lose) - l_pol(lose))
        loss   = -log sigmoid(beta margin) + anchor_win l_pol(win) + anchor_lose l_pol(lose)

    Its gradient is (anchor_win + beta s) grad l_pol(win) + (anchor_lose - beta s) grad l_pol(lose), where
    s = sigmoid(-beta margin) is 0.5 at the start and falls to 0 as the margin grows. The report (2.2.2) gives beta
    0.05, anchors 0.35 and 0.15, and not the reduction, which decides what the loss does:

    - one reduction for all terms (mean and mean, or sum and sum): the loser's coefficient is at least
      0.15 - 0.05 = 0.10. The loser is always attracted, at about a third of the winner's weight, never repelled.
      Nothing can collapse, but this is fine-tuning on both pictures.
    - summed errors in the preference term and mean ones in the anchors (our default): beta counts N = 128 H W times,
      524,288 at 1024 px. The loser is repelled until beta N s has fallen below its anchor; the anchors only hold once
      the pair is won. 0.05 lies among the published betas on this scale (Diffusion-DPO for SDXL: 0.038).

    Errors may be given for mean as well as for sum, because the sum is `elements` times the mean.

    Args:
        policy_win: error [P] of the trained model on the winner, with gradient.
        policy_lose: the same on the loser.
        reference_win: error [P] of the reference model, without gradient.
        reference_lose: the same on the loser.
        config: constants and reductions.
        beta: in place of `config.beta`, as `AutoBeta` steers it.
        elements: of one latent, C * H * W (or the mask's area * C); needed by the reduction sum.
        residual_win: velocity - target [P, C, H, W] of the policy; needed by `config.sdpo_mu`.
        residual_lose: the same on the loser.

    Returns:
        The loss, and per pair, without gradient: preference (the DPO term), margin, accuracy (ties count 1/2),
        negative_margin, gradient_factor (s), beta, win_error, lose_error, win_excess and lose_excess (policy minus
        reference; a winner that stays above 0 is the alarm), win_alarm (1 where it is above 0), safeguard (the factor
        on the loser's gradient). Errors in them are means, the margin is on the scale of `config.reduction`.

    Raises:
        ErnieError: `elements` or the residuals are needed and not given.
    """
    beta = config.beta if beta is None else beta
    scale, anchor_scale = _elements(config.reduction, elements), _elements(config.anchor_reduction, elements)
    policy_win, policy_lose, reference_win, reference_lose = (
        error.float() for error in (policy_win, policy_lose, reference_win, reference_lose)
    )
    reference_win, reference_lose = reference_win.detach(), reference_lose.detach()
    safeguard = torch.ones_like(reference_win)
    repelled = policy_lose
    if config.sdpo_mu is not None:
        if residual_win is None or residual_lose is None:
            raise ErnieError("the safeguard sdpo_mu needs the residuals of the winner and of the loser.")
        safeguard = sdpo_scale(residual_win, residual_lose, config.sdpo_mu)
        # The value stays, the gradient is scaled.
        repelled = policy_lose.detach() + safeguard * (policy_lose - policy_lose.detach())

    margin = scale * ((reference_win - policy_win) - (reference_lose - repelled))
    preference = -F.logsigmoid(beta * margin)
    anchors = anchor_scale * (config.anchor_win * policy_win + config.anchor_lose * policy_lose)
    loss = preference + anchors
    margin, win, lose = margin.detach(), policy_win.detach(), policy_lose.detach()
    return loss, {
        "preference": preference.detach(),
        "margin": margin,
        "accuracy": ((margin > 0).float() + (margin >= 0).float()) / 2,
        "negative_margin": (margin < 0).float(),
        "gradient_factor": torch.sigmoid(-beta * margin),
        "beta": torch.full_like(margin, beta),
        "win_error": win,
        "lose_error": lose,
        "win_excess": win - reference_win,
        "lose_excess": lose - reference_lose,
        "win_alarm": (win > reference_win).float(),
        "safeguard": safeguard,
    }


def dpo_coefficients(
    metrics: Mapping[str, Tensor], config: DpoConfig, *, elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """Factors [P] of the winner's and of the loser's mean error in the gradient of `dpo_loss`.

    With them the two pictures of a pair can be trained one after the other: errors of both without gradient first,
    `dpo_loss` on those, then factor * error backward for each. Same gradient, half the activations, one forward more.
    """
    push = metrics["beta"] * metrics["gradient_factor"] * _elements(config.reduction, elements)
    anchor_scale = _elements(config.anchor_reduction, elements)
    win = anchor_scale * config.anchor_win + push
    lose = anchor_scale * config.anchor_lose - push * metrics["safeguard"]
    return win, lose


@dataclass
class AutoBeta:
    """Beta that holds the mean gradient factor near a target: beta = -logit(target) / EMA of |margin|.

    sigmoid(-beta |margin|) is then the target for a margin of usual size, whatever the resolution and the reduction.
    SimpleTuner's rule, without its factor 1/2 on the margin. The fields are the whole state: save and restore them.
    """

    target: float = 0.2
    decay: float = 0.99
    low: float = 1e-3
    """Bounds on the scale of summed errors; `update` converts them for mean ones."""
    high: float = 1.0
    average: float = 0.0
    """Moving average of |margin|; 0 = nothing seen yet (margins are exactly 0 before the first update)."""
    updates: int = 0

    def update(self, mean_margin: float) -> None:
        """Take in the mean |margin| of one optimiser step (over all processes)."""
        if mean_margin > 0:
            self.average = self.decay * self.average + (1 - self.decay) * mean_margin
            self.updates += 1

    def beta(self, config: DpoConfig, *, elements: int | None = None) -> float:
        """The beta to use now; `config.beta` until a margin has been seen."""
        if not self.updates:
            return config.beta
        to_mean = _elements("sum", elements) if config.reduction == "mean" else 1.0
        seen = self.average / (1 - self.decay**self.updates)
        beta = math.log(1 / self.target - 1) / seen
        return min(max(beta, self.low * to_mean), self.high * to_mean)
