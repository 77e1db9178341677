"""Distribution matching distillation in flow form: which way a few-step student's pictures are pushed. Pure functions.

A student paints x in a few steps without guidance. Two scores are asked about x made noisy again: the *real* one, of
frozen teachers with guidance, and the *fake* one, of a network that learns what the student paints. Both speak in
velocities; x0 = x_sigma - sigma v, so the direction in which the student's pictures lie from the teachers' is

    x0_fake - x0_real = sigma (v_real - v_fake)          (a sign slip here looks like blur that never trains)

and x is moved against it. Guidance is the usual form, v_uncond + g (v_cond - v_uncond); papers that write
v_cond + w (v_cond - v_uncond) mean g = w + 1 (`cfg_of_extra`).

Sources: DMD2 (arXiv 2405.14867); Decoupled DMD (arXiv 2511.22677); DP-DMD, which keeps the teacher's first step for
diversity (arXiv 2602.03139); several teachers, ERNIE-Image report (arXiv 2605.25347, 2.2.3). Its gate is not published;
ours is a table (`teachers`).

Shape letters: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import BASE, TURBO
from ..errors import ErnieError
from ..sampling.schedule import make_sigmas
from .objectives import SigmaSampling, make_generator
from .teachers import TeacherTable

Rollout = Literal["euler", "renoise"]
GradientStep = Literal["random", "last", "all"]
Form = Literal["plain", "decoupled"]


@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """The network that learns the student's distribution: an adapter of its own on the same base."""

    rank: int | None = None
    """None = the student's; never less."""
    lr: float = 1e-4
    """Constant. Twice the student's or more: it has to keep up."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Of AdamW; without momentum, as its target moves."""
    clip: float = 1.0
    steps_per_student: int = 5
    """Updates for each one of the student (two time scales, DMD2)."""
    warmup: int = 100
    """Updates before the student's first: until then it is the base and knows nothing of the student."""
    sigmas: SigmaSampling = field(default_factory=lambda: SigmaSampling(kind="uniform", shift=1.0))
    """Noise levels that it learns at."""
    fresh: bool = False
    """Whether every update paints new pictures. Else those that the student's update painted serve all of the step's,
    with new noise each time: a step costs one rollout."""
    initial_lora: str = ""
    """LoRA file that it starts from; empty: from the student's start where that has one, else from nothing. After a
    first stage of trajectories it starts from the student, where both have one size."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ErnieError(f"distil.fake.rank must be at least 1, or left out for the student's; got {self.rank}.")
        if not self.lr > 0:
            raise ErnieError(f"distil.fake.lr must be above 0, got {self.lr:g}.")
        if self.steps_per_student < 1:
            raise ErnieError(f"distil.fake.steps_per_student must be at least 1, got {self.steps_per_student}.")
        if self.warmup < 0:
            raise ErnieError(f"distil.fake.warmup must be 0 (none) or more, got {self.warmup}.")

    @property
    def warmup_steps(self) -> int:
        """Steps of the run that train it alone."""
        return math.ceil(self.warmup / self.steps_per_student)


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How a student for a few steps is made out of teachers for many."""

    steps: int = TURBO.steps
    """Of the student's grid, which is the sampler's."""
    shift: float = BASE.shift
    """Of the student's grid."""
    sigmas: tuple[float, ...] = ()
    """In place of steps and shift: any grid, falling from 1 to 0."""
    cfg: float = BASE.cfg
    """Guidance of teachers that have none of their own, in the usual form; 1 = none."""
    prompts: str = ""
    """What to paint, one prompt per line (`prompts.read_prompts`); empty: the captions of the job's dataset."""
    table: TeacherTable = field(default_factory=TeacherTable)
    """Who teaches what; without rules the base teaches everything."""
    form: Form = "plain"
    """plain: guided scores at one noise level. decoupled: matching (DM) at any level, guidance (CA) only at levels
    below the one that the student painted at."""
    rollout: Rollout = "euler"
    """How the student paints while it learns. euler: as the sampler does. renoise: new noise on each clean estimate
    (DMD2), for samplers that do so."""
    gradient: GradientStep = "random"
    """Whose output is matched. random: the clean estimate of one step, drawn anew (DMD2). last: that of the last step.
    all: the finished picture, with the gradient through every step; slower, and exact for the sampler's pictures."""
    noise: SigmaSampling = field(default_factory=lambda: SigmaSampling(kind="uniform", low=0.02, high=0.98, shift=1.0))
    """Noise levels that the two scores are asked at."""
    trajectory_steps: int = 0
    """First steps of the run in which the student learns the teacher's way on its grid by plain regression, before any
    matching; 0 = none. A student that starts from nothing needs a few hundred, one that starts from a LoRA fewer."""
    trajectory_substeps: int = 4
    """The teacher's steps within each step of the student's grid."""
    trajectory_bank: int = 4
    """Noises per prompt whose trajectories are computed once and kept in the cache."""
    floor: float = 0.05
    """Least value of the normaliser mean |x - x0_real|, in units of a latent's standard deviation."""
    fake: FakeConfig = field(default_factory=FakeConfig)
    anchor_weight: float = 0.0
    """Weight of the first step's plain error against the teacher's own start; 0 = off, 0.05 in DP-DMD. The first step
    then learns nothing else: its graph is cut."""
    anchor_steps: int = 6
    """Teacher steps that the start is taken from ..."""
    anchor_of: int = 12
    """... of a grid of so many."""
    gan_weight: float = 0.0
    """Weight of a critic that tells the student's pictures from the dataset's by the fake network's features; 0 = off,
    0.005 in DMD2, 0.03 in FastGen. Needs a dataset of pictures."""
    patience: int = 50
    """Steps that a sign of ill health must last before the alarm; see `Health`."""
    stop_on_alarm: bool = False
    """Whether the run ends with the first alarm."""

    def __post_init__(self) -> None:
        grid = self.sigmas
        if grid and (len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or any(b >= a for a, b in pairwise(grid))):
            raise ErnieError(f"distil.sigmas must fall from 1 to 0, got {list(grid)}.")
        if self.steps < 1:
            raise ErnieError(f"distil.steps must be at least 1, got {self.steps}.")
        if not self.shift > 0:
            raise ErnieError(f"distil.shift must be above 0 (1 = none), got {self.shift:g}.")
        if not self.cfg >= 0:
            raise ErnieError(f"distil.cfg must be 0 or more (1 = no guidance), got {self.cfg:g}.")
        for name, low in (("trajectory_steps", 0), ("trajectory_substeps", 1), ("trajectory_bank", 1), ("patience", 1)):
            if getattr(self, name) < low:
                raise ErnieError(f"distil.{name} must be at least {low}, got {getattr(self, name)}.")
        if not self.floor > 0:
            raise ErnieError(f"distil.floor must be above 0, got {self.floor:g}.")
        if not self.noise.low > 0:
            raise ErnieError("distil.noise.low must be above 0: without noise the scores say nothing.")
        for where, sampling in (("noise", self.noise), ("fake.sigmas", self.fake.sigmas)):
            if sampling.kind == "weighted":
                raise ErnieError(f"distil.{where}: the kind weighted weighs losses, which these have none of.")
        for name in ("anchor_weight", "gan_weight"):
            if not getattr(self, name) >= 0:
                raise ErnieError(f"distil.{name} must be 0 (off) or more, got {getattr(self, name):g}.")
        if self.anchor_weight and not 1 <= self.anchor_steps < self.anchor_of:
            raise ErnieError(
                f"distil.anchor_steps must lie between 1 and anchor_of - 1 = {self.anchor_of - 1}, got "
                f"{self.anchor_steps}."
            )
        if self.anchor_weight and len(self.grid()) < 3:
            raise ErnieError(
                "distil.anchor_weight takes the first step for itself; a student of one step has no other."
            )

    def grid(self) -> Tensor:
        """The student's sigmas, falling from 1 to 0 (fp32, CPU)."""
        return torch.tensor(self.sigmas) if self.sigmas else make_sigmas(self.steps, shift=self.shift)

    def chosen_step(self, *, seed: int, step: int) -> int:
        """Whose clean estimate is matched in student step `step`: each of the grid's once before any comes again."""
        last = len(self.grid()) - 2
        if self.gradient != "random":
            return last
        first = 1 if self.anchor_weight else 0
        turn, place = divmod(step, last + 1 - first)
        order = torch.randperm(last + 1 - first, generator=make_generator("chosen step", seed, turn))
        return first + int(order[place])


def cfg_of_extra(extra: float) -> float:
    """The usual guidance strength of the form v_cond + extra (v_cond - v_uncond)."""
    return extra + 1


def guidance(v_cond: Tensor, v_uncond: Tensor, cfg: float | Tensor) -> Tensor:
    """What guidance adds to the conditional velocity: (g - 1)(v_cond - v_uncond), zero at cfg 1."""
    return (cfg - 1) * (v_cond - v_uncond)


def direction(v_real: Tensor, v_fake: Tensor, sigmas_B: Tensor) -> Tensor:
    """x0_fake - x0_real = sigma (v_real - v_fake), from velocities at the same x_sigma: where x must not go."""
    return _column(sigmas_B, v_real) * (v_real - v_fake)


def clean_estimate(x: Tensor, velocity: Tensor, sigmas_B: Tensor) -> Tensor:
    """x0 = x_sigma - sigma v."""
    return x - _column(sigmas_B, x) * velocity


def normaliser(x: Tensor, x0_real: Tensor, floor: float) -> Tensor:
    """mean |x - x0_real| of each sample, at least `floor`; shaped to divide a direction by."""
    distance_B = (x - x0_real).abs().flatten(1).mean(1).clamp(min=floor)
    return _column(distance_B, x)


def matching_loss(x: Tensor, push: Tensor) -> Tensor:
    """Loss [B] whose gradient with respect to x is push / (elements of a sample): 0.5 mean (x - stop(x - push))^2."""
    target = (x - push).detach()
    return 0.5 * (x - target).square().flatten(1).mean(1)


def matching_health(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> dict[str, Tensor]:
    """Per sample [B]: is the pull towards the teacher, and how far is there to go?

    dm_cos: cosine between x0_real - x, the way to the teacher, and x0_real - x0_fake, the way that is taken. Near 1 the
    fake score knows the student's pictures (x0_fake is x); near 0 or below it lags behind and the push is its error.
    dm_mag_ratio: |x0_real - x0_fake| over |x0_real - x|. Falls towards 0 as the two distributions come together.
    x_std: standard deviation of the student's pictures; what falls or grows far from the start's is collapse.
    """
    wanted, taken = (x0_real - x).flatten(1), (x0_real - x0_fake).flatten(1)
    length = wanted.norm(dim=1).clamp(min=1e-12)
    return {
        "dm_cos": torch.cosine_similarity(wanted, taken, dim=1, eps=1e-12),
        "dm_mag_ratio": taken.norm(dim=1) / length,
        "x_std": x.flatten(1).std(dim=1),
    }


class PooledHead(nn.Module):
    """Logit [B] that features come from a real picture: their mean over the image's tokens, and two layers.

    Pooled, because a head that judges every token froze the poses in others' hands. Its start is a function of `seed`.
    """

    def __init__(self, width: int, *, seed: int):
        super().__init__()
        generator = make_generator("gan head", seed)
        self.norm = nn.LayerNorm(width)
        self.inner, self.out = nn.Linear(width, width), nn.Linear(width, 1)
        with torch.no_grad():
            for layer in (self.inner, self.out):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / math.sqrt(width))
                layer.bias.zero_()

    def forward(self, features_BSD: Tensor, tokens: int) -> Tensor:
        pooled = features_BSD[:, :tokens].float().mean(1)
        return self.out(F.silu(self.inner(self.norm(pooled)))).flatten()


def critic_loss(real_B: Tensor, painted_B: Tensor) -> Tensor:
    """Loss [B] of a critic with these logits for pictures and for the student's (non-saturating, as in DMD2)."""
    return F.softplus(-real_B) + F.softplus(painted_B)


def deceiver_loss(painted_B: Tensor) -> Tensor:
    """Loss [B] of the student before that critic."""
    return F.softplus(-painted_B)


@dataclass
class Health:
    """The stop rule. Each metric is averaged with decay 0.95; an alarm means that it was beyond its bound for
    `patience` steps in a row. The fields are the whole state: save and restore them.

    - collapse: x_std outside 0.7 to 1.4 of its mean over the student's first 10 steps;
    - lag: the fake score's loss on pictures that it has not seen is more than 1.5 of that on those it has;
    - astray: dm_cos below 0, so the push is the fake score's error and not the teachers' pull.
    """

    averages: dict[str, float] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)
    """Steps in a row beyond each bound."""
    steps: int = 0
    first_std: float = 0.0

    def update(self, metrics: Mapping[str, float], *, patience: int) -> str | None:
        """Take in a step of the student; the alarm on the step that one is due, each once in a row of bad steps."""
        for name in ("x_std", "dm_cos", "fake_fresh", "fake_seen"):
            if name in metrics:
                self.averages[name] = 0.95 * self.averages.get(name, metrics[name]) + 0.05 * metrics[name]
        if "x_std" not in metrics:
            return None
        self.steps += 1
        if self.steps <= 10:
            self.first_std += (metrics["x_std"] - self.first_std) / self.steps
        now = self.averages
        size = now["x_std"] / self.first_std
        lag = now["fake_fresh"] / now["fake_seen"] if now.get("fake_seen") else 1.0
        signs = {
            f"the pictures' contrast is {size:.2f} of what it was at the start: the student collapses. Go back to a "
            "checkpoint before it; lower its learning rate or the guidance": not 0.7 < size < 1.4,
            f"the fake score's loss on new pictures is {lag:.2f} of that on pictures it has seen: it lags behind. Give "
            "it more updates (distil.fake.steps_per_student) or a higher learning rate, the student a lower one": (
                lag > 1.5
            ),
            "the push does not point towards the teachers (dm_cos below 0): the fake score does not know the student. "
            "Lower the student's learning rate, or warm the fake score up for longer": now["dm_cos"] < 0,
        }
        due = None
        for name, (message, bad) in zip(("collapse", "lag", "astray"), signs.items(), strict=True):
            self.beyond[name] = self.beyond.get(name, 0) + 1 if bad else 0
            if self.beyond[name] == patience:
                due = f"{message}. It has been so for {patience} steps."
        return due


def _column(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(like).view(-1, *[1] * (like.ndim - 1))
