"""The distillation objective on a small model: who is asked what, who is trained, and what a step paints."""

import json
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.attention import attention
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.training import trainer as trainer_module
from ernie_pack.ernie_core.training.adapters import Adapter, AdapterConfig
from ernie_pack.ernie_core.training.dataset import read_dataset
from ernie_pack.ernie_core.training.distil import Distil
from ernie_pack.ernie_core.training.distillation import (
    DistilConfig,
    FakeConfig,
    Health,
    PooledHead,
    clean_estimate,
    direction,
    normaliser,
)
from ernie_pack.ernie_core.training.feed import Batch
from ernie_pack.ernie_core.training.job import create_job, own_prompts, status
from ernie_pack.ernie_core.training.learner import Learner
from ernie_pack.ernie_core.training.losses import Turn
from ernie_pack.ernie_core.training.objectives import SigmaSampling
from ernie_pack.ernie_core.training.prompts import (
    Prompts,
    make_prompt,
    read_prompts,
    read_prompts_manifest,
    write_prompts_manifest,
)
from ernie_pack.ernie_core.training.recipe import DepthConfig, ModelPaths, OptimiserConfig, Recipe, SampleConfig
from ernie_pack.ernie_core.training.teachers import Rule, Teacher, TeacherTable
from ernie_pack.ernie_core.training.trainer import train
from ernie_pack.ernie_core.training.trajectories import (
    TrajectoryCache,
    state_at,
    teacher_velocities,
    trajectory_noise,
)
from ernie_pack.ernie_core.training.world import Sums
from random_models import write_random_models
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training_jobs import small_job, small_prompts, small_recipe, write_pictures

FAKE = FakeConfig(warmup=0, steps_per_student=2, lr=1e-2)
EMPTY = torch.full((1, 4), 7.0)
TABLE = TeacherTable(
    teachers=(Teacher(name="shapes", lora="shapes.safetensors", cfg=3.0), Teacher(name="ink", lora="ink.safetensors")),
    rules=(
        Rule(tags=("shapes",), terms=("DM",), low=0.5, weights={"shapes": 0.75, "ink": 0.25}),
        Rule(tags=("shapes",), weights={"ink": 1.0}),
    ),
)


class AskedModel:
    """A velocity of its arguments, another one for each view, that remembers who was asked for what."""

    def __init__(self):
        self.calls = []
        self.scale = nn.Parameter(torch.tensor(0.9))

    def __call__(self, x, sigmas, texts, view, attend, *, on_block=None):
        assert attend is attention
        if on_block is not None:
            on_block(0, x.flatten(2).transpose(1, 2) * self.scale)
        names = tuple(v if isinstance(v, str) else next(iter(v)) for v in view)
        self.calls.append((names, sigmas.clone(), tuple(float(t.mean()) for t in texts), torch.is_grad_enabled()))
        words = torch.tensor([float(t.mean()) for t in texts]).view(-1, 1, 1, 1)
        factor = {(): 0.5, ("policy",): self.scale, ("fake",): 0.8, ("teacher shapes",): 0.3, ("teacher ink",): 0.1}
        return factor[names] * x + 0.01 * words * sigmas.view(-1, 1, 1, 1) + 0.1 * x.mean((1, 2, 3), keepdim=True)

    def asked(self, *view):
        return [call for call in self.calls if call[0] == view]


def make_objective(config, *, folder=None, **changes):
    recipe = Recipe(name="x", models=ModelPaths(transformer="m"), objective="distil", distil=config, **changes)
    adapter = Adapter(nn.ModuleDict({"a": nn.Linear(2, 2)}), AdapterConfig(targets=("a",)), seed=0)
    head = PooledHead(3, seed=0) if config.gan_weight else None
    fake = Learner(adapter, OptimiserConfig(), steps=4, head=head)
    trajectories = TrajectoryCache(
        folder or "none", teachers="", sigmas=config.grid(), substeps=config.trajectory_substeps
    )
    return Distil(
        recipe, empty_text=EMPTY, student=adapter, fake=fake, trajectories=trajectories, device=torch.device("cpu")
    )


def make_batch(*tags, first=0):
    numbers = tuple(range(first, first + len(tags)))
    return Batch(
        numbers=numbers,
        keys=tuple(map(str, numbers)),
        tags=tags,
        captions=tuple(f"prompt {n}" for n in numbers),
        shape_CHW=(3, 2, 2),
        latents_BCHW=None,
        lose_BCHW=None,
        texts=tuple(torch.full((2 + i, 4), float(i)) for i in range(len(tags))),
        masks_BHW=None,
        regions_BHW=None,
        keyword_columns=(None,) * len(tags),
        weights_B=torch.ones(len(tags)),
    )


# --- painting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["all", "last"])
def test_the_student_paints_what_the_sampler_would(gradient):
    objective, model, batch = make_objective(DistilConfig(gradient=gradient)), AskedModel(), make_batch("", "")
    noise = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    painted = objective.paint(batch, model, noise, 7)

    def denoise(x, sigma):
        return model(x, torch.full((2,), sigma), batch.texts, ("policy",), attention)

    assert torch.equal(painted, sample_euler(denoise, noise, objective.config.grid()))
    assert painted.requires_grad


@pytest.mark.parametrize(("gradient", "expected"), [("all", 8), ("last", 1)])
def test_the_gradient_goes_through_the_steps_that_were_asked_for(gradient, expected):
    objective, model = make_objective(DistilConfig(gradient=gradient)), AskedModel()
    objective.paint(make_batch(""), model, torch.randn(1, 3, 2, 2), 7)
    assert [grad for *_, grad in model.asked("policy")].count(True) == expected


def test_a_renoised_estimate_is_made_of_the_clean_one_and_new_noise():
    objective, model = make_objective(DistilConfig(rollout="renoise", steps=2)), AskedModel()
    batch, noise = make_batch(""), torch.randn(1, 3, 2, 2)
    painted = objective.paint(batch, model, noise, 1)
    x0 = noise - model(noise, torch.ones(1), batch.texts, ("policy",), attention)
    sigma = float(objective.grid[1])
    x = (1 - sigma) * x0 + sigma * objective._noise(batch, "renoise", 0)
    expected = x - sigma * model(x, torch.tensor([sigma]), batch.texts, ("policy",), attention)
    assert torch.allclose(painted, expected, atol=1e-6)


# --- the student's update -----------------------------------------------------------------------------------


def student_gradient(config, batch):
    objective, model, sums = make_objective(config), AskedModel(), Sums()
    objective.losses(batch, model, sums, Turn(step=0)).sum().backward()
    return objective, model, sums


def test_the_plain_gradient_is_the_formula_written_out():
    config = DistilConfig(gradient="last", cfg=3.0, fake=FAKE)
    batch = make_batch("", "")
    objective, model, sums = student_gradient(config, batch)
    got = float(model.scale.grad)

    model = AskedModel()
    x = objective.paint(batch, model, objective._noise(batch, "rollout"), 7)
    sigmas = student_gradient(config, batch)[1].asked("fake")[0][1]
    with torch.no_grad():
        column = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - column) * x + column * objective._noise(batch, "matching")
        cond = model(noisy, sigmas, batch.texts, (), attention)
        uncond = model(noisy, sigmas, (EMPTY, EMPTY), (), attention)
        real = uncond + 3.0 * (cond - uncond)
        fake = model(noisy, sigmas, batch.texts, ("fake",), attention)
        x0_real = clean_estimate(noisy, real, sigmas)
        push = direction(real, fake, sigmas) / normaliser(x, x0_real, config.floor)
    (x * push / x[0].numel()).sum().backward()
    assert got == pytest.approx(float(model.scale.grad), rel=1e-5)
    assert float(torch.cat(sums.values["loss_dm"]).mean()) > 0


def test_guidance_is_asked_for_with_the_real_empty_prompt_and_only_where_it_counts():
    _, model, _ = student_gradient(DistilConfig(fake=FAKE), make_batch("", ""))
    (_, _, texts, grad) = model.asked()[0]
    assert texts == (0.0, 1.0, 7.0, 7.0)  # one call: with the prompts, then without
    assert not grad
    _, model, _ = student_gradient(DistilConfig(cfg=1.0, fake=FAKE), make_batch("", ""))
    assert [call[2] for call in model.asked()] == [(0.0, 1.0)]
    assert [call[2] for call in model.asked("fake")] == [(0.0, 1.0)]  # never guided


def test_the_tables_teachers_are_asked_with_its_weights():
    objective, model = make_objective(DistilConfig(table=TABLE, cfg=2.0, fake=FAKE)), AskedModel()
    batch = make_batch("shapes", "", "shapes")
    x, sigmas = torch.randn(3, 3, 2, 2), torch.tensor([0.9, 0.9, 0.2])
    got = sum(objective._ask(batch, x, sigmas, model, ("CA", "DM")))
    expected = torch.zeros_like(x)
    for i, tag in enumerate(batch.tags):
        row, s = x[i : i + 1], sigmas[i : i + 1]

        def v(view, text, row=row, s=s):
            return model(row, s, (text,), view, attention)

        for term in ("DM", "CA"):
            for name, weight in TABLE.weights(tag=tag, sigma=float(s), term=term).items():
                view = () if name == "base" else (f"teacher {name}",)
                cond, uncond = v(view, batch.texts[i]), v(view, EMPTY)
                cfg = 3.0 if name == "shapes" else 2.0
                expected[i : i + 1] += weight * (cond if term == "DM" else (cfg - 1) * (cond - uncond))
    assert torch.allclose(got, expected, atol=1e-6)


def test_hard_routing_costs_one_forward_per_term():
    table = TeacherTable(
        teachers=TABLE.teachers,
        rules=(Rule(terms=("CA",), weights={"shapes": 1.0}), Rule(terms=("DM",), weights={"ink": 1.0})),
    )
    _, model, _ = student_gradient(DistilConfig(table=table, fake=FAKE), make_batch("", ""))
    assert [len(model.asked(*view)) for view in ((), ("teacher shapes",), ("teacher ink",))] == [0, 1, 1]
    assert model.asked("teacher ink")[0][2] == (0.0, 1.0)  # DM alone needs no empty prompt


def test_decoupled_guidance_stays_below_the_level_that_was_painted_at():
    config = DistilConfig(form="decoupled", fake=FAKE)
    for step in range(8):
        objective, model, sums = make_objective(config), AskedModel(), Sums()
        objective.losses(make_batch("", "", ""), model, sums, Turn(step=step))
        painted_at = float(config.grid()[config.chosen_step(seed=0, step=step)])
        matching, guiding = model.asked()
        assert len(matching[2]) == 3  # without guidance
        assert len(guiding[2]) == 6
        assert float(guiding[1].max()) <= max(painted_at, config.noise.low + 1e-3) + 1e-6
        assert {"loss_dm", "loss_ca"} <= sums.values.keys()


def test_the_anchor_takes_the_first_step_for_itself():
    config = DistilConfig(steps=3, anchor_weight=0.5, anchor_steps=2, anchor_of=4, fake=FAKE)
    batch, model, sums = make_batch(""), AskedModel(), Sums()
    objective = make_objective(config)
    objective.losses(batch, model, sums, Turn(step=0)).sum().backward()
    assert len(model.asked()) == 3  # two steps of the anchor and the scores
    noise = objective._noise(batch, "rollout")
    far = sample_euler(
        lambda x, sigma: objective.teach(batch, x, sigma, model), noise, torch.tensor([1.0, 12 / 13, 0.8])
    )
    v = model(noise, torch.ones(1), batch.texts, ("policy",), attention)
    error = (v - (noise - far) / 0.2).square().mean()
    assert float(torch.cat(sums.values["anchor"])) == pytest.approx(float(error.detach()), rel=1e-4)


# --- the teachers' way --------------------------------------------------------------------------------------


def test_the_first_stage_regresses_to_the_teachers_way_and_computes_it_once(tmp_path):
    config = DistilConfig(steps=2, trajectory_steps=1, trajectory_substeps=3, trajectory_bank=1, fake=FAKE)
    objective, model, batch = make_objective(config, folder=tmp_path), AskedModel(), make_batch("", "")
    assert [turn.learner for turn in objective.turns(0)] == ["policy"]
    sums = Sums()
    objective.losses(batch, model, sums, Turn(step=0)).sum().backward()
    assert len(model.asked()) == 2 * 3  # guided: one call for both
    assert not any(grad for *_, grad in model.asked())
    assert [grad for *_, grad in model.asked("policy")] == [True]
    assert float(model.scale.grad) != 0
    losses = torch.cat(sums.values["trajectory"])
    for i in range(2):
        noise = trajectory_noise((3, 2, 2), key=f"{(3, 2, 2)} prompt {i}", turn=0)[None]
        one = make_batch("", first=i)
        one = replace(one, texts=batch.texts[i : i + 1])
        velocities = teacher_velocities(
            lambda x, s, one=one: objective.teach(one, x, s, model), noise, objective.grid, substeps=3
        )
        place = objective._place(i)
        x = state_at(noise, velocities, objective.grid, place)
        v = model(x, objective.grid[place : place + 1], one.texts, ("policy",), attention)
        assert float(losses[i]) == pytest.approx(float((v - velocities[place]).square().mean().detach()), rel=1e-4)
    model.calls.clear()
    objective.losses(batch, model, Sums(), Turn(step=0))
    assert not model.asked()
    assert sorted(objective._place(n) for n in range(2)) == [0, 1]


# --- the fake score's update --------------------------------------------------------------------------------


def test_one_rollout_serves_the_whole_step():
    objective, model, batch = make_objective(DistilConfig(fake=FAKE)), AskedModel(), make_batch("", "")
    for turn in objective.turns(0):
        objective.losses(batch, model, Sums(), turn)
    rollouts = len(model.asked("policy"))
    assert rollouts == 1 + objective.config.chosen_step(seed=0, step=0)
    noisy = [sigmas.tolist() for _, sigmas, *_ in model.asked("fake")[1:]]
    assert len(noisy) == 2
    assert noisy[0] != noisy[1]


def test_fresh_pictures_are_painted_where_they_are_asked_for():
    config = DistilConfig(gradient="last", fake=replace(FAKE, fresh=True, steps_per_student=3))
    objective, model, batch = make_objective(config), AskedModel(), make_batch("", "")
    for turn in objective.turns(0):
        objective.losses(batch, model, Sums(), turn)
    assert len(model.asked("policy")) == 8 * 3


def test_the_first_steps_are_the_fake_scores_alone():
    objective = make_objective(DistilConfig(fake=replace(FAKE, warmup=4)))
    assert [[t.learner for t in objective.turns(step)] for step in (1, 2)] == [
        ["fake", "fake"],
        ["policy", "fake", "fake"],
    ]


# --- the critic ---------------------------------------------------------------------------------------------


def test_the_critic_learns_from_pictures_and_the_student_from_the_critic():
    objective, model, sums = make_objective(DistilConfig(steps=2, gan_weight=0.5, fake=FAKE)), AskedModel(), Sums()
    fake = objective.learners["fake"]
    batch = replace(make_batch("", ""), latents_BCHW=torch.randn(2, 3, 2, 2))
    objective.losses(batch, model, sums, Turn(step=0)).sum().backward()
    assert float(model.scale.grad) != 0
    fake.clear()
    objective.losses(batch, model, sums, Turn(step=0, learner="fake")).sum().backward()
    assert all(float(w.grad.abs().max()) > 0 for w in fake.head.parameters() if w.ndim > 1)
    assert {"gan", "critic"} <= sums.values.keys()


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


def states(job, step):
    return load_file(job.checkpoint_path(step) / "state.safetensors")


def changed(before, after, prefix):
    return any(not torch.equal(before[k], after[k]) for k in before if k.startswith(prefix))


def test_each_update_changes_its_own_adapter_and_teachers_never(models, tmp_path):
    config = DistilConfig(steps=2, fake=FakeConfig(warmup=2, steps_per_student=1, lr=1e-2))
    recipe = small_recipe(models, objective="distil", distil=config, save_every=1, steps=4, keep=9)
    job = small_job(tmp_path / "job", recipe)
    train(job, device="cpu")
    one, two, three = (states(job, step) for step in (1, 2, 3))
    assert not changed(one, two, "adapter.")  # the fake score warms up
    assert changed(one, two, "fake.adapter.")
    assert changed(two, three, "adapter.")
    assert changed(two, three, "fake.adapter.")
    done = [e for e in job.events() if e["event"] == "step"]
    assert "loss" not in done[1]
    assert {"loss", "loss_fake", "lr_fake", "grad_norm_fake", "dm_cos", "dm_mag_ratio", "x_std"} <= done[2].keys()


def test_after_the_first_stage_the_fake_score_follows_the_student(models, tmp_path):
    config = DistilConfig(steps=2, trajectory_steps=2, trajectory_bank=1, fake=replace(FAKE, warmup=2))
    recipe = small_recipe(models, objective="distil", distil=config, save_every=1, steps=3, keep=9)
    job = small_job(tmp_path / "job", recipe)
    train(job, device="cpu")
    two, three = states(job, 2), states(job, 3)
    names = [k for k in two if k.startswith("adapter.")]
    assert any(not torch.equal(two[k], two[f"fake.{k}"]) for k in names)
    assert all(float((two[k] - three[f"fake.{k}"]).abs().max()) <= 2 * 2 * FAKE.lr for k in names)


def test_the_finished_picture_is_guided_at_every_level():
    config = DistilConfig(form="decoupled", gradient="all", fake=FAKE)
    levels = []
    for first in range(0, 60, 3):
        objective, model = make_objective(config), AskedModel()
        objective.losses(make_batch("", "", "", first=first), model, Sums(), Turn(step=0))
        levels.append(float(model.asked()[1][1].max()))
    assert max(levels) > 0.8


def test_a_lora_teaches(models, tmp_path):
    teacher = tmp_path / "ink.safetensors"
    source = small_job(tmp_path / "source", small_recipe(models, steps=2))
    teacher.write_bytes(train(source, device="cpu").read_bytes())
    table = TeacherTable(
        teachers=(Teacher(name="ink", lora=str(teacher), strength=0.5),), rules=(Rule(weights={"ink": 1.0}),)
    )
    config = DistilConfig(steps=2, fake=FAKE, table=table)
    plain = DistilConfig(steps=2, fake=FAKE)
    before = teacher.read_bytes()
    results = []
    for name, distil in (("taught", config), ("base", plain)):
        recipe = small_recipe(models, objective="distil", distil=distil, steps=2)
        results.append(load_file(train(small_job(tmp_path / name, recipe), device="cpu")))
    assert teacher.read_bytes() == before
    with safe_open(str(tmp_path / "taught" / "small.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ernie.sampling"])["steps"] == 2
    assert json.loads(metadata["ernie.teachers"]) == [
        {"name": "ink", "lora": "ink.safetensors", "strength": 0.5, "cfg": None, "sha256": sha256(before).hexdigest()}
    ]
    assert str(tmp_path) not in json.dumps(metadata)
    assert any(not torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_samples_are_painted_on_the_students_grid(models, tmp_path, monkeypatch):
    asked = []

    def paint(model, vae, texts, empty, *, sigmas, cfg, **others):
        asked.append((sigmas.tolist(), cfg))
        return [np.zeros((48, 64, 3), np.uint8)]

    monkeypatch.setattr(trainer_module, "sample_pictures", paint)
    samples = SampleConfig(prompts=("a star",), every=0, width=64, height=48)
    config = DistilConfig(sigmas=(1.0, 0.7, 0.0), fake=FAKE)
    recipe = small_recipe(models, objective="distil", distil=config, samples=samples, steps=1)
    train(small_job(tmp_path / "job", recipe), device="cpu")
    assert asked == [(pytest.approx([1, 0.7, 0]), 1.0)] * 2
    with pytest.raises(ErnieError, match=r"leave samples\.base_"):
        small_recipe(models, objective="distil", samples=replace(samples, base_cfg=2.0))


def test_a_critic_needs_pictures(models, tmp_path):
    recipe = small_recipe(models, objective="distil", distil=DistilConfig(gan_weight=0.1))
    with pytest.raises(ErnieError, match="gan_weight needs real pictures"):
        create_job(tmp_path / "job", recipe, small_prompts())


def test_a_recipe_may_bring_its_prompts(models, tmp_path):
    table = TeacherTable(rules=(Rule(tags=("shapes",), weights={"base": 1.0}),))
    recipe = small_recipe(models, objective="distil", distil=DistilConfig(prompts="shapes: a star\nred", table=table))
    assert own_prompts(recipe).tags == {"shapes": 1, "": 1}
    write_pictures(tmp_path / "data", count=2)
    with pytest.raises(ErnieError, match="has prompts of its own"):
        create_job(tmp_path / "job", recipe, read_dataset(tmp_path / "data"))


def test_an_alarm_may_end_the_run(models, tmp_path, monkeypatch):
    monkeypatch.setattr(Health, "update", lambda self, metrics, *, patience: "it collapses" if metrics else None)
    recipe = small_recipe(models, objective="distil", distil=DistilConfig(steps=2, fake=FAKE, stop_on_alarm=True))
    job = small_job(tmp_path / "job", recipe)
    path = train(job, device="cpu")
    assert path == job.lora_path
    assert [e["step"] for e in job.events() if e["event"] == "alarm"] == [1]
    assert status(job).state == "finished"
    train(job, device="cpu")
    assert job.newest_step() == 1


def test_settings_of_another_objective_are_not_passed_over(models):
    with pytest.raises(ErnieError, match=r"settings \[distil\] belong to the objective distil"):
        small_recipe(models, distil=DistilConfig(steps=4))
    with pytest.raises(ErnieError, match="sigmas belong to sft and dpo"):
        small_recipe(models, objective="distil", sigmas=SigmaSampling(kind="style"))
    with pytest.raises(ErnieError, match="depth leaves blocks out of the teachers"):
        small_recipe(models, objective="distil", depth=DepthConfig(skip=1))
    with pytest.raises(ErnieError, match="rank must be at least the student's 8, got 4"):
        small_recipe(
            models, objective="distil", adapter=AdapterConfig(rank=8), distil=DistilConfig(fake=FakeConfig(rank=4))
        )


# --- prompts ------------------------------------------------------------------------------------------------


def test_prompts_have_the_tags_that_the_table_knows():
    found = read_prompts("# a list\nshapes: a star\n\na poster: red\n", tags=("shapes",))
    assert [(i.concept, i.captions[0].text) for i in found.items] == [("shapes", "a star"), ("", "a poster: red")]
    assert found.tags == {"shapes": 1, "": 1}
    with pytest.raises(ErnieError, match="no prompts to train on"):
        read_prompts("\n# nothing")
    with pytest.raises(ErnieError, match="line 1 of the prompts has the tag 'shapes' and no prompt"):
        read_prompts("shapes:", tags=("shapes",))


def test_a_manifest_of_prompts_reads_back(tmp_path):
    prompts = Prompts(items=(make_prompt("a star", tag="shapes", shape=(3, 2)), make_prompt("ein Stern: rot")))
    write_prompts_manifest(prompts, tmp_path / "manifest.jsonl")
    assert read_prompts_manifest(tmp_path / "manifest.jsonl") == prompts
    (tmp_path / "manifest.jsonl").write_text('{"format": "ernie-image prompts", "version": 1}\n{"tag": ""}\n')
    with pytest.raises(ErnieError, match="is damaged"):
        read_prompts_manifest(tmp_path / "manifest.jsonl")
