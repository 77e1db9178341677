"""The objective "distil" as the trainer calls it: a student and its critic on one frozen base, teachers beside them.

A step is one update of the student and several of the fake score (`FakeConfig.steps_per_student`), which learn from
the pictures that the student has just painted: one rollout serves all of them, with other noise each time. The first
steps train the fake score alone. Everything drawn is a function of (seed, sample, update), so a resumed run repeats.

All roles are views of one model: "policy" (the student), "fake", "teacher NAME" for each teacher with a LoRA; the base
is no view at all. Guidance is the teachers' alone, against the real empty prompt's embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..model.attention import attention
from ..model.dit import DiT
from ..sampling.latents import mix_noise
from ..sampling.samplers import sample_euler
from ..sampling.schedule import make_sigmas
from ..weights.lora import module_shapes, read_lora
from .adapters import Adapter, Views
from .caching import component_hash
from .distillation import (
    Health,
    PooledHead,
    clean_estimate,
    critic_loss,
    deceiver_loss,
    direction,
    guidance,
    matching_health,
    matching_loss,
    normaliser,
)
from .feed import Batch, model_hashes_path
from .learner import Learner
from .losses import Objective, Turn, Velocity, View
from .objectives import SigmaSampling, draw_noise, draw_sigmas, make_generator, sft_loss
from .recipe import OptimiserConfig, Recipe
from .state import Job, file_hash
from .teachers import TERMS, Teacher, Term
from .trajectories import TrajectoryCache, state_at, teacher_velocities, trajectory_noise
from .world import Sums


def make_distil(job: Job, recipe: Recipe, views: Views, empty_text: Tensor, device: torch.device) -> Distil:
    """The objective, with the fake score and the teachers added to `views`.

    Raises:
        ErnieError: a LoRA that cannot be read or is for another model.
    """
    fake, model = recipe.distil.fake, cast(DiT, views.model)
    start = fake.initial_lora or recipe.initial_lora
    if start:
        adapter = _read_adapter(start, views, device, trainable=True)
    else:
        config = replace(recipe.adapter, rank=fake.rank or recipe.adapter.rank, dropout=0.0)
        adapter = Adapter(model, config, seed=recipe.seed + 1, device=device)
    views.add("fake", adapter)
    for teacher in map(recipe.distil.table.teacher, recipe.distil.table.used()):
        if teacher.lora:
            views.add(_view_name(teacher), _read_adapter(teacher.lora, views, device, trainable=False))
    config = OptimiserConfig(lr=fake.lr, betas=fake.betas, clip=fake.clip, warmup=0, schedule="constant")
    head = None
    if recipe.distil.gan_weight:
        head = PooledHead(model.config.hidden_size, seed=recipe.seed).to(device)
    return Distil(
        recipe,
        empty_text=empty_text,
        student=views.adapters["policy"],
        fake=Learner(adapter, config, steps=recipe.steps, head=head),
        middle=len(model.layers) // 2,
        trajectories=_open_trajectories(job, recipe),
        device=device,
    )


def _open_trajectories(job: Job, recipe: Recipe) -> TrajectoryCache:
    """Where the teachers' ways are kept: by everything that decides what they say."""
    config, memo = recipe.distil, model_hashes_path(job)
    teachers = [asdict(config.table.teacher(name)) for name in config.table.used()]
    for teacher in teachers:
        teacher["lora"] = file_hash(Path(teacher["lora"])) if teacher["lora"] else ""
    said = {
        "cfg": config.cfg,
        "rules": [asdict(rule) for rule in config.table.rules],
        "blend": config.table.blend,
        "teachers": teachers,
        "base": component_hash(recipe.models.path("transformer"), "transformer", memo=memo),
        "encoder": component_hash(recipe.models.path("text_encoder"), "text_encoder", memo=memo),
        "precision": recipe.precision,
    }
    return TrajectoryCache(
        job.cache_folder,
        teachers=json.dumps(said, sort_keys=True),
        sigmas=config.grid(),
        substeps=config.trajectory_substeps,
    )


def _read_adapter(path: str, views: Views, device: torch.device, *, trainable: bool) -> Adapter:
    lora = read_lora(Path(path), module_shapes(views.model))
    return Adapter.from_lora(views.model, lora, trainable=trainable, device=device)


def _view_name(teacher: Teacher) -> str:
    return f"teacher {teacher.name}"


class Distil(Objective):
    """Distribution matching distillation with any number of teachers; see `distillation` for the mathematics."""

    metric_names = (
        *("loss_fake", "fake_fresh", "fake_seen", "loss_dm", "loss_ca", "anchor"),
        *("gan", "critic", "dm_cos", "dm_mag_ratio", "x_std", "trajectory"),
    )

    def __init__(
        self,
        recipe: Recipe,
        *,
        empty_text: Tensor,
        student: Adapter,
        fake: Learner,
        trajectories: TrajectoryCache,
        device: torch.device,
        middle: int = 0,
    ):
        """`middle`: the block whose output the critic sees."""
        self.recipe, self.config, self.empty_text = recipe, recipe.distil, empty_text
        self.student = student
        self.learners, self.middle = {"fake": fake}, middle
        self.device = device
        self.grid = self.config.grid()
        self.health = Health()
        self.trajectories = trajectories
        self.painted: dict[int, Tensor] = {}
        """The student's pictures of the step at hand [C, H, W], by the sample's number."""

    def turns(self, step: int) -> Sequence[Turn]:
        fake, early = self.config.fake, self.config.trajectory_steps
        self.painted.clear()
        if step == early > 0:
            self._follow_student()
        if step < early:
            return (Turn(step=step),)
        fakes = [Turn(step=step, learner="fake", index=i) for i in range(fake.steps_per_student)]
        return fakes if step < early + fake.warmup_steps else [Turn(step=step), *fakes]

    def losses(self, batch: Batch, velocity: Velocity, sums: Sums, turn: Turn) -> Tensor:
        if turn.learner == "fake":
            return self._fake_losses(batch, velocity, sums, turn)
        if turn.step < self.config.trajectory_steps:
            return self._trajectory_losses(batch, velocity, sums)
        return self._student_losses(batch, velocity, sums, turn)

    # --- the student ---

    def _student_losses(self, batch: Batch, velocity: Velocity, sums: Sums, turn: Turn) -> Tensor:
        config = self.config
        chosen = config.chosen_step(seed=self.recipe.seed, step=turn.step)
        noise = self._noise(batch, "rollout")
        anchor = None
        if config.anchor_weight:
            anchor, start = self._anchor(batch, noise, velocity)
            sums.add("anchor", anchor)
            x = self.paint(batch, velocity, start, chosen, first=1)
        else:
            x = self.paint(batch, velocity, noise, chosen)
        self._remember(batch, x)
        with torch.no_grad():
            painted_at = 1.0 if config.gradient == "all" else float(self.grid[chosen])
            push = self._push(batch, x.detach(), painted_at, velocity, sums)
        losses = matching_loss(x, push)
        if anchor is not None:
            losses = losses + config.anchor_weight * anchor
        if config.gan_weight:
            deceived = self._deceive(batch, x, velocity)
            sums.add("gan", deceived)
            losses = losses + config.gan_weight * deceived
        return losses * batch.weights_B.to(losses)

    def paint(self, batch: Batch, velocity: Velocity, x: Tensor, chosen: int, *, first: int = 0) -> Tensor:
        """The student's clean estimate [B, C, H, W] after step `chosen`, from `x` at the grid's sigma `first`.

        With `gradient` "all" the finished picture and the gradient of all steps, else that of the last one taken.
        """

        def student(x: Tensor, sigma: float) -> Tensor:
            return velocity(x, torch.full((len(x),), sigma), batch.texts, ("policy",), attention).float()

        if self.config.rollout == "renoise":
            return self._paint_renoised(batch, student, x, chosen, first)
        if self.config.gradient == "all":
            return sample_euler(student, x, self.grid[first:])
        with torch.no_grad():
            x = sample_euler(student, x, self.grid[first : chosen + 1])
        sigma = float(self.grid[chosen])
        return x - sigma * student(x, sigma)

    def _paint_renoised(self, batch: Batch, student, x: Tensor, chosen: int, first: int) -> Tensor:
        through = self.config.gradient == "all"
        for i in range(first, chosen):
            with torch.set_grad_enabled(through and torch.is_grad_enabled()):
                sigma, following = float(self.grid[i]), float(self.grid[i + 1])
                x = mix_noise(x - sigma * student(x, sigma), self._noise(batch, "renoise", i).to(x), following)
        sigma = float(self.grid[chosen])
        return x - sigma * student(x, sigma)

    def _anchor(self, batch: Batch, noise: Tensor, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """(error [B] of the student's first step against the teachers' mean one, the state after it, cut off)."""
        config = self.config
        fine = make_sigmas(config.anchor_of, shift=config.shift)[: config.anchor_steps + 1]
        with torch.no_grad():
            far = sample_euler(lambda x, sigma: self.teach(batch, x, sigma, velocity), noise, fine)
            wanted = (noise.to(far) - far) / (1 - float(fine[-1]))
        sigma, following = float(self.grid[0]), float(self.grid[1])
        v = velocity(noise, torch.full((len(noise),), sigma), batch.texts, ("policy",), attention).float()
        return sft_loss(v, wanted), (noise.to(v) + (following - sigma) * v).detach()

    # --- the teachers' way, before any matching ---

    def _trajectory_losses(self, batch: Batch, velocity: Velocity, sums: Sums) -> Tensor:
        """Error [B] of one step of the grid each against the teachers' mean velocity over it."""
        names, noises = [], []
        for number, caption in zip(batch.numbers, batch.captions, strict=True):
            turn = int(torch.randint(self.config.trajectory_bank, (), generator=make_generator("turn", number)))
            names.append((f"{batch.shape_CHW} {caption}", turn))
            noises.append(trajectory_noise(batch.shape_CHW, key=names[-1][0], turn=turn))
        velocities = self._recall(batch, names, torch.stack(noises), velocity)
        steps = [self._place(number) for number in batch.numbers]
        x = torch.stack([state_at(n, v, self.grid, i) for n, v, i in zip(noises, velocities, steps, strict=True)])
        wanted = torch.stack([v[i] for v, i in zip(velocities, steps, strict=True)])
        predicted = velocity(x, self.grid[steps], batch.texts, ("policy",), attention)
        losses = sft_loss(predicted, wanted.to(predicted.device))
        sums.add("trajectory", losses)
        return losses * batch.weights_B.to(losses)

    def _recall(
        self, batch: Batch, names: Sequence[tuple[str, int]], noise: Tensor, velocity: Velocity
    ) -> list[Tensor]:
        """The teachers' velocities [N, C, H, W] of each sample, from the cache or computed and kept."""
        cache = self.trajectories
        keys = [cache.key(name, turn, tag) for (name, turn), tag in zip(names, batch.tags, strict=True)]
        missing = [i for i, key in enumerate(keys) if not cache.has(key)]
        if missing:
            asked, substeps = batch.take(missing), self.config.trajectory_substeps
            found = teacher_velocities(
                lambda x, sigma: self.teach(asked, x, sigma, velocity),
                noise[missing].to(self.device),
                self.grid,
                substeps=substeps,
            )
            for place, i in enumerate(missing):
                cache.keep(keys[i], found[:, place])
        return [cache.velocities(key) for key in keys]

    def _place(self, number: int) -> int:
        """The step of the grid that a sample is trained at: each once before any comes again."""
        turn, place = divmod(number, len(self.grid) - 1)
        order = torch.randperm(len(self.grid) - 1, generator=make_generator("place", self.recipe.seed, turn))
        return int(order[place])

    # --- the teachers ---

    def teach(self, batch: Batch, x: Tensor, sigma: float, velocity: Velocity) -> Tensor:
        """Guided velocity [B, C, H, W] of the teachers that the table names at this noise level."""
        sigmas = torch.full((len(x),), sigma)
        conditional, guided = self._ask(batch, x, sigmas, velocity, TERMS)
        return conditional + guided

    def _ask(
        self, batch: Batch, x: Tensor, sigmas: Tensor, velocity: Velocity, terms: Sequence[Term]
    ) -> tuple[Tensor, Tensor]:
        """(sum W_DM v_cond, sum W_CA (g - 1)(v_cond - v_uncond)), zero where a term is not asked for.

        One forward per teacher that counts for any sample, with and without its prompt in one batch.
        """
        config, table = self.config, self.config.table
        of = list(zip(batch.tags, sigmas.tolist(), strict=True))
        asked = {term: [table.weights(tag=tag, sigma=sigma, term=term) for tag, sigma in of] for term in terms}
        conditional = guided = torch.zeros_like(x, dtype=torch.float32)
        for teacher in map(table.teacher, table.used()):
            cfg = config.cfg if teacher.cfg is None else teacher.cfg
            share = {t: torch.tensor([w.get(teacher.name, 0.0) for w in weights]) for t, weights in asked.items()}
            nobody = torch.zeros(len(x))
            dm, ca = share.get("DM", nobody), share.get("CA", nobody) * float(cfg != 1)
            rows, bare = torch.nonzero(dm + ca).flatten(), torch.nonzero(ca).flatten()
            if not len(rows):
                continue
            view: View = ({_view_name(teacher): teacher.strength},) if teacher.lora else ()
            both = torch.cat([rows, bare])
            texts = [*(batch.texts[i] for i in rows.tolist()), *(self.empty_text for _ in bare)]
            v = velocity(x[both.to(x.device)], sigmas[both], texts, view, attention).float()
            v_cond, v_uncond = v[: len(rows)], v[len(rows) :]
            if dm.any():
                conditional = conditional.index_add(0, rows.to(v.device), _weigh(dm[rows], v_cond))
            if len(bare):
                of_bare = v_cond[torch.isin(rows, bare).to(v.device)]
                guided = guided.index_add(0, bare.to(v.device), _weigh(ca[bare], guidance(of_bare, v_uncond, cfg)))
        return conditional, guided

    def _push(self, batch: Batch, x: Tensor, painted_at: float, velocity: Velocity, sums: Sums) -> Tensor:
        """Where x must not go, each term divided by its own normaliser."""
        config = self.config
        terms: Sequence[Term] = TERMS if config.form == "plain" else ("DM",)
        sigmas, noisy = self._renoise(batch, x, config.noise, "matching")
        conditional, guided = self._ask(batch, noisy, sigmas, velocity, terms)
        real = conditional + guided
        fake = velocity(noisy, sigmas, batch.texts, ("fake",), attention).float()
        x0_real, x0_fake = (clean_estimate(noisy, v, sigmas) for v in (real, fake))
        push = direction(real, fake, sigmas) / normaliser(x, x0_real, config.floor)
        sums.add("loss_dm", 0.5 * push.square().flatten(1).mean(1))
        for name, values in matching_health(x, x0_real, x0_fake).items():
            sums.add(name, values)
        if config.form == "decoupled":
            below = replace(config.noise, high=max(min(config.noise.high, painted_at), config.noise.low + 1e-3))
            sigmas, noisy = self._renoise(batch, x, below, "guidance")
            conditional, guided = self._ask(batch, noisy, sigmas, velocity, TERMS)
            x0_real = clean_estimate(noisy, conditional + guided, sigmas)
            pull = direction(guided, torch.zeros_like(guided), sigmas) / normaliser(x, x0_real, config.floor)
            sums.add("loss_ca", 0.5 * pull.square().flatten(1).mean(1))
            push = push + pull
        return push

    # --- the fake score ---

    def _follow_student(self) -> None:
        """Let the fake score begin where the first stage has led the student, if both have one size.

        The student then answers with the teachers' guided velocity, and that is the score of what it paints.
        """
        fake, student = self.learners["fake"].adapter, self.student
        same = fake.state_dict().keys() == student.state_dict().keys()
        if same and all(a.shape == b.shape for a, b in zip(fake.parameters(), student.parameters(), strict=True)):
            fake.load_state_dict(student.state_dict())

    def _fake_losses(self, batch: Batch, velocity: Velocity, sums: Sums, turn: Turn) -> Tensor:
        config = self.config
        missing = any(number not in self.painted for number in batch.numbers)
        if missing or (config.fake.fresh and turn.index):
            # Before the student learns: its pictures are of use from every step of its grid, as later.
            chosen = config.chosen_step(seed=self.recipe.seed, step=turn.step)
            with torch.no_grad():
                noise = self._noise(batch, "rollout", *([turn.index] if turn.index else []))
                self._remember(batch, self.paint(batch, velocity, noise, chosen))
        x = torch.stack([self.painted[number] for number in batch.numbers])
        noise = self._noise(batch, "fake", turn.index).to(x)
        sigmas = self._sigmas(batch, config.fake.sigmas, "fake", turn.index)
        noisy = mix_noise(x, noise, sigmas.to(x)[:, None, None, None])
        predicted, judged = self._judge(batch, noisy, sigmas, velocity)
        losses = sft_loss(predicted, noise - x)
        sums.add("fake_seen" if turn.index else "fake_fresh", losses)
        if config.gan_weight:
            assert batch.latents_BCHW is not None
            real = mix_noise(batch.latents_BCHW.to(x), noise, sigmas.to(x)[:, None, None, None])
            critic = critic_loss(self._judge(batch, real, sigmas, velocity)[1], judged)
            sums.add("critic", critic)
            losses = losses + config.gan_weight * critic
        return losses * batch.weights_B.to(losses)

    # --- the critic ---

    def _judge(self, batch: Batch, noisy: Tensor, sigmas: Tensor, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """(the fake network's velocity, the critic's logit [B] that the picture is real; zeros without a critic)."""
        head, seen = self.learners["fake"].head, []

        def keep(index: int, x_BSD: Tensor) -> None:
            if index == self.middle:
                seen.append(x_BSD)

        predicted = velocity(noisy, sigmas, batch.texts, ("fake",), attention, on_block=keep if head else None)
        tokens = batch.shape_CHW[1] * batch.shape_CHW[2]
        return predicted, head(seen[0], tokens) if head else torch.zeros(len(noisy))

    def _deceive(self, batch: Batch, x: Tensor, velocity: Velocity) -> Tensor:
        """Loss [B] of the student before the critic; the gradient that the critic gets of it is thrown away."""
        sigmas, noisy = self._renoise(batch, x, self.config.noise, "gan")
        return deceiver_loss(self._judge(batch, noisy, sigmas, velocity)[1])

    def _remember(self, batch: Batch, x: Tensor) -> None:
        self.painted |= dict(zip(batch.numbers, x.detach().unbind(), strict=True))

    # --- health ---

    def after_step(self, metrics: Mapping[str, float]) -> str | None:
        alarm = self.health.update(metrics, patience=self.config.patience)
        self.done = self.done or (alarm is not None and self.config.stop_on_alarm)
        return alarm

    def state(self) -> dict[str, Any]:
        return {"health": asdict(self.health), "done": self.done}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.health, self.done = Health(**state["health"]), state["done"]

    # --- draws ---

    def _noise(self, batch: Batch, purpose: str, *more: int) -> Tensor:
        seed = _derived(self.recipe.seed, purpose, *more)
        noise = torch.stack([draw_noise(batch.shape_CHW, seed=seed, number=n) for n in batch.numbers])
        return noise.to(self.device)

    def _sigmas(self, batch: Batch, sampling: SigmaSampling, purpose: str, *more: int) -> Tensor:
        seed, tokens = _derived(self.recipe.seed, purpose, *more), batch.shape_CHW[1] * batch.shape_CHW[2]
        return torch.cat([draw_sigmas(sampling, seed=seed, first=n, count=1, tokens=tokens) for n in batch.numbers])

    def _renoise(self, batch: Batch, x: Tensor, sampling: SigmaSampling, purpose: str) -> tuple[Tensor, Tensor]:
        """(sigmas [B], x made noisy at them)."""
        sigmas = self._sigmas(batch, sampling, purpose)
        return sigmas, mix_noise(x, self._noise(batch, purpose).to(x), sigmas.to(x)[:, None, None, None])


def _weigh(weights_B: Tensor, v: Tensor) -> Tensor:
    return weights_B.to(v)[:, None, None, None] * v


def _derived(seed: int, purpose: str, *numbers: int) -> int:
    """Another stream of draws for each purpose."""
    return int(torch.randint(1 << 62, (), generator=make_generator(purpose, seed, *numbers)))
