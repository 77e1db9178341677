"""The trainer's laws: resuming changes nothing, neither do the number of processes, samples, or how a batch is cut."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core import VERSION
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.training import trainer as trainer_module
from ernie_pack.ernie_core.training.adapters import AdapterConfig
from ernie_pack.ernie_core.training.buckets import Stage
from ernie_pack.ernie_core.training.dataset import read_dataset
from ernie_pack.ernie_core.training.distillation import DistilConfig, FakeConfig
from ernie_pack.ernie_core.training.job import PACK_ROOT, create_job, start_worker, status, watch
from ernie_pack.ernie_core.training.learner import Learner
from ernie_pack.ernie_core.training.objectives import DpoConfig
from ernie_pack.ernie_core.training.recipe import DepthConfig, OptimiserConfig, SampleConfig
from ernie_pack.ernie_core.training.trainer import train
from ernie_pack.ernie_core.weights.lora import read_lora
from random_models import write_random_models
from safetensors import safe_open
from safetensors.torch import load_file
from training_jobs import model_paths, small_job, small_recipe, write_pictures


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


def state(job):
    return load_file(job.checkpoint_path(job.newest_step()) / "state.safetensors")


def run(folder, recipe, **options):
    job = small_job(folder, recipe)
    train(job, device="cpu", **options)
    return job


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def losses(job):
    return [e.get("loss") for e in job.events() if e["event"] == "step"]


def drawn_job(folder, recipe):
    """A job on pictures that a sampling plan draws."""
    data = folder.parent / "drawn"
    if not data.exists():
        write_pictures(data, count=5)
    read = read_dataset(data)
    items = (replace(item, draws=0.5 + i) for i, item in enumerate(read.items))
    return create_job(folder, recipe, replace(read, items=tuple(items)))


DPO = {"objective": "dpo", "dpo": DpoConfig(auto_beta=0.2, sdpo_mu=0.6), "batch_size": 1}
FAKE = FakeConfig(warmup=2, steps_per_student=2, lr=1e-2)
DISTIL = {"objective": "distil", "distil": DistilConfig(steps=3, fake=FAKE)}

RUNS = {
    "sft": {},
    "dropout": {"adapter": AdapterConfig(rank=2, dropout=0.3)},
    "dora": {"adapter": AdapterConfig(rank=2, algorithm="dora")},
    "lokr": {"adapter": AdapterConfig(rank=2, algorithm="lokr", factor=4)},
    "average": {"optimiser": OptimiserConfig(lr=1e-2, warmup=1, ema=0.9)},
    "prodigy": {"optimiser": OptimiserConfig(name="prodigy", lr=1.0, warmup=1)},
    "adafactor": {"optimiser": OptimiserConfig(name="adafactor", lr=1e-2, warmup=1)},
    "depth": {"depth": DepthConfig(skip=0, share=0.5)},
    "stages": {"stages": (Stage(resolutions=(32,), until_step=3), Stage(resolutions=(64,)))},
    "dpo": DPO,
    "dpo with a bank": {**DPO, "reference_bank": 3},
    "distil": DISTIL,
    "distil after a first stage": {
        "objective": "distil",
        "distil": DistilConfig(steps=2, trajectory_steps=3, trajectory_bank=1, fake=FakeConfig(warmup=0, lr=1e-2)),
    },
    "distil with a critic": {
        "objective": "distil",
        "distil": DistilConfig(steps=2, gan_weight=0.1, fake=FakeConfig(warmup=0, lr=1e-2, steps_per_student=1)),
    },
    "distil with an average": {**DISTIL, "optimiser": OptimiserConfig(lr=1e-2, warmup=1, ema=0.9)},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(name, models, tmp_path):
    recipe = small_recipe(models, **RUNS[name])
    whole = run(tmp_path / "whole", recipe)
    parts = run(tmp_path / "parts", recipe, until=2)
    assert parts.newest_step() == 2
    train(parts, until=3, device="cpu")
    train(parts, device="cpu")
    assert same(state(whole), state(parts))
    assert losses(whole) == losses(parts)
    assert load_file(whole.lora_path).keys() == load_file(parts.lora_path).keys()
    assert same(load_file(whole.lora_path), load_file(parts.lora_path))


def test_a_run_on_drawn_items_resumes_bit_equal_and_is_not_that_on_rounds(models, tmp_path):
    recipe = small_recipe(models)
    whole, parts = drawn_job(tmp_path / "whole", recipe), drawn_job(tmp_path / "parts", recipe)
    train(whole, device="cpu")
    for until in (1, 4, None):
        train(parts, until=until, device="cpu")
    assert losses(whole) == losses(parts)
    assert same(state(whole), state(parts))
    rounds = run(tmp_path / "rounds", recipe)
    assert losses(rounds) != losses(whole)


def test_training_changes_what_it_should_and_nothing_else(models, tmp_path):
    before = {p: p.read_bytes() for p in models.rglob("*.safetensors")}
    job = run(tmp_path / "job", small_recipe(models))
    found = state(job)
    ups = [w for k, w in found.items() if k.startswith("adapter.") and k.endswith("lora_B")]
    assert ups
    assert all(w.abs().max() > 0 for w in ups)
    assert {p: p.read_bytes() for p in models.rglob("*.safetensors")} == before


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(models, tmp_path):
    first, again = (run(tmp_path / n, small_recipe(models)) for n in ("a", "b"))
    other = run(tmp_path / "c", small_recipe(models, seed=1))
    assert same(state(first), state(again))
    assert not same(state(first), state(other))


def test_samples_on_the_way_change_nothing(models, tmp_path):
    plain = run(tmp_path / "plain", small_recipe(models))
    samples = SampleConfig(prompts=("a red square", "a ring"), every=2, width=64, height=48, base_steps=2)
    drawn = run(tmp_path / "drawn", small_recipe(models, samples=samples))
    assert same(state(plain), state(drawn))
    assert sorted(p.name for p in drawn.samples_folder.iterdir()) == [f"step-{i:06}.png" for i in (0, 2, 4, 6)]


def gradients_close(left, right):
    """Adam turns a gradient that is all rounding into a step of full size: compare moments, not weights."""
    a, b = state(left), state(right)
    moments = [k for k in a if k.endswith("exp_avg")]
    return moments and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-7) for k in moments)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4, "accumulation": 1},
        {"batch_size": 4, "accumulation": 1, "checkpointing": False},
        {"batch_size": 4, "accumulation": 1, "stream": True},
    ],
    ids=["one batch", "not recomputed", "streamed"],
)
def test_how_a_step_is_computed_does_not_matter(changes, models, tmp_path):
    base = small_recipe(models, steps=1, **{"batch_size": 4, "accumulation": 1})
    assert gradients_close(run(tmp_path / "a", base), run(tmp_path / "b", replace(base, **changes)))


@pytest.mark.parametrize("gradient", ["random", "all"])
@pytest.mark.parametrize(
    "changes",
    [{"checkpointing": True}, {"checkpointing": True, "stream": True}],
    ids=["recomputed", "streamed"],
)
def test_how_a_step_of_a_distillation_is_computed_does_not_matter(changes, gradient, models, tmp_path):
    """One of the student and one of its fake score, with a critic, from the same pictures."""
    config = DistilConfig(steps=2, gradient=gradient, gan_weight=0.1, fake=replace(FAKE, warmup=0, steps_per_student=1))
    common = {"steps": 1, "batch_size": 4, "accumulation": 1, "checkpointing": False}
    base = small_recipe(models, objective="distil", distil=config, **common)
    left, right = run(tmp_path / "a", base), run(tmp_path / "b", replace(base, **changes))
    assert gradients_close(left, right)
    assert any(k.startswith("fake.optimiser") for k in state(left))


def test_accumulated_gradients_are_those_of_one_batch(models, tmp_path):
    # seven pictures of one size: batches of seven hold the same samples as seven of one, in whatever order
    one = run(tmp_path / "one", small_recipe(models, steps=1, batch_size=7, accumulation=1))
    many = run(tmp_path / "many", small_recipe(models, steps=1, batch_size=7, accumulation=1, checkpointing=False))
    assert gradients_close(one, many)


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
from ernie_core.training.state import Job
from ernie_core.training.trainer import train
train(Job(sys.argv[2]), device="cpu")
"""


def launch(job, processes):
    """As accelerate launch and torchrun do: environment variables and one process each."""
    port = 29500 + os.getpid() % 2000
    common = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", TWO_PROCESSES, str(PACK_ROOT), str(job.folder)]
    running = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for r in range(processes)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {**DPO, "dpo": DpoConfig(auto_beta=0.2)}, DISTIL], ids=["sft", "dpo", "distil"]
)
def test_two_processes_are_one_with_twice_the_batch(changes, models, tmp_path):
    """Seven pictures in batches of four: one process has no sample in some steps' last batch."""
    recipe = small_recipe(models, **{**changes, "batch_size": 2, "accumulation": 1, "steps": 5})
    two = small_job(tmp_path / "two", recipe)
    launch(two, 2)
    one = run(tmp_path / "one", replace(recipe, batch_size=4))
    assert [x for x in losses(two) if x] == pytest.approx([x for x in losses(one) if x], rel=1e-3)
    counts = [e["samples"] for e in two.events() if e["event"] == "step"]
    assert set(counts) == {3, 4}
    assert sum(counts[:4]) == 14
    # Adam makes a full step of a gradient that is all rounding, so single weights may differ; the whole does not.
    a, b = (torch.cat([w.flatten() for _, w in sorted(load_file(j.lora_path).items())]) for j in (one, two))
    assert (a - b).norm() < 0.01 * a.norm()


# --- stopping ---


def test_a_stop_is_saved_and_said(models, tmp_path):
    job = small_job(tmp_path / "job", small_recipe(models))

    def stop_at_three(event):
        if event["event"] == "step" and event["step"] == 3:
            raise Interrupted("enough")

    with pytest.raises(Interrupted, match="stopped at step 3 of 6; saved"):
        train(job, device="cpu", on_event=stop_at_three)
    assert job.newest_step() == 3
    assert status(job).state == "stopped"
    assert not job.stop_requested() or job.is_running() is False
    train(job, device="cpu")
    assert same(state(job), state(run(tmp_path / "whole", small_recipe(models))))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_a_killed_worker_goes_on_bit_equal(models, tmp_path):
    recipe = small_recipe(models, steps=400, save_every=3)
    job = small_job(tmp_path / "job", recipe)
    worker = start_worker(job)
    deadline = time.monotonic() + 90
    while (job.newest_step() or 0) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    now = status(job)
    assert now.state == "stopped"
    assert "without a word" in now.message
    step = job.load().step
    assert step >= 6
    until = step + 4
    train(job, until=until, device="cpu")
    whole = run(tmp_path / "whole", recipe, until=until)
    assert same(state(job), state(whole))
    steps = [e["step"] for e in job.events() if e["event"] == "step"]
    assert steps == list(range(1, until + 1))


@pytest.mark.slow
def test_a_worker_is_asked_to_stop_and_stops(models, tmp_path):
    job = small_job(tmp_path / "job", small_recipe(models, steps=100_000, save_every=100_000))
    worker = start_worker(job)
    while status(job).step < 2:
        assert worker.poll() is None
        time.sleep(0.05)
    job.request_stop()
    last = watch(job, lambda _: None, worker=worker)
    assert last.state == "stopped"
    assert job.newest_step() == last.step
    assert worker.wait(10) == 3


# --- what goes wrong ---


def test_nan_is_counted_thrown_away_and_shown(models, tmp_path, monkeypatch):
    recipe = small_recipe(models)
    job = small_job(tmp_path / "job", recipe)
    original = trainer_module.Trainer._gradients

    def poison(self, turn, learner):
        sums = original(self, turn, learner)
        if turn.step in (2, 3):
            learner.weights[0].grad[0, 0] = float("nan")
        return sums

    monkeypatch.setattr(trainer_module.Trainer, "_gradients", poison)
    train(job, device="cpu")
    bad = [e for e in job.events() if e["event"] == "bad_step"]
    assert [e["step"] for e in bad] == [3, 4]
    assert "grad_norm not finite" in bad[0]["message"]
    assert all(w.isfinite().all() for w in state(job).values())
    assert [e["step"] for e in job.events() if e["event"] == "step"] == [1, 2, 5, 6]


def test_nothing_but_nan_ends_the_run_with_the_last_good_weights(models, tmp_path, monkeypatch):
    job = small_job(tmp_path / "job", small_recipe(models, steps=40))
    train(job, until=2, device="cpu")
    good = {k: v for k, v in state(job).items() if k.startswith("adapter.")}
    monkeypatch.setattr(Learner, "sum_gradients", lambda self, _: self.weights[0].grad.fill_(float("inf")))
    with pytest.raises(ErnieError, match=r"not finite in 10 steps in a row\. The weights are those of step 2, saved"):
        train(job, device="cpu")
    assert status(job).state == "failed"
    assert same(good, {k: v for k, v in state(job).items() if k.startswith("adapter.")})


def test_out_of_memory_is_tried_again_sample_by_sample(models, tmp_path, monkeypatch):
    original = trainer_module.Trainer._backward

    def full(self, turn, learner, batches, *, checkpoint):
        if turn.step == 1 and any(len(batch.numbers) > 1 for batch in batches):
            raise torch.OutOfMemoryError("no memory")
        return original(self, turn, learner, batches, checkpoint=checkpoint)

    recipe = small_recipe(models, steps=2)
    whole = run(tmp_path / "whole", recipe)
    monkeypatch.setattr(trainer_module.Trainer, "_backward", full)
    job = run(tmp_path / "job", recipe)
    assert [e["step"] for e in job.events() if e["event"] == "out_of_memory"] == [2]
    assert losses(job) == pytest.approx(losses(whole), rel=1e-5)

    def always(self, turn, learner, batches, *, checkpoint):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(trainer_module.Trainer, "_backward", always)
    with pytest.raises(ErnieError, match="does not fit into memory"):
        run(tmp_path / "never", recipe)


def test_another_recipe_or_other_data_is_refused(models, tmp_path):
    job = run(tmp_path / "job", small_recipe(models), until=2)
    with pytest.raises(ErnieError, match=r"trained 2 steps with other settings .*seed"):
        small_job(tmp_path / "job", small_recipe(models, seed=9))
    with pytest.raises(ErnieError, match="trained 2 steps on other data"):
        small_job(tmp_path / "job", small_recipe(models), count=3)
    train(job, device="cpu")


def test_the_wrong_kind_of_data_is_refused(models, tmp_path):
    from ernie_pack.ernie_core.training.job import create_job
    from ernie_pack.ernie_core.training.state import Job

    run(tmp_path / "job", small_recipe(models), until=1)
    dataset = small_job(tmp_path / "job", small_recipe(models))
    assert dataset.newest_step() == 1
    from ernie_pack.ernie_core.training.dataset import read_manifest

    with pytest.raises(ErnieError, match="the objective dpo needs preference pairs"):
        create_job(tmp_path / "dpo", small_recipe(models, **DPO), read_manifest(dataset.manifest_path))
    empty = Job(tmp_path / "empty")
    empty.write_recipe(small_recipe(models))
    with pytest.raises(ErnieError, match=r"no manifest\.jsonl"):
        train(empty, device="cpu")


# --- what comes out ---


def test_the_lora_says_what_it_is(models, tmp_path):
    job = run(tmp_path / "job", small_recipe(models, comment="for the test"))
    with safe_open(str(job.lora_path), framework="pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_steps"] == "6"
    assert metadata["modelspec.architecture"] == "Ernie-Image/lora"
    assert metadata["ernie.recipe_hash"] == job.recipe().hash()
    assert json.loads(metadata["ernie.software"])["version"] == VERSION
    assert str(models) not in str(metadata)  # nobody's disk is named
    assert all(k.startswith("diffusion_model.layers.") for k in keys)
    assert not any(k.endswith("alpha") for k in keys)


def test_the_average_is_what_is_written(models, tmp_path):
    recipe = small_recipe(
        models, optimiser=OptimiserConfig(lr=1e-2, warmup=1, ema=0.5), adapter=AdapterConfig(rank=2, alpha=4)
    )
    job = run(tmp_path / "job", recipe)
    found = state(job)
    average = found["average.layers.0.self_attention.to_q.lora_B"]
    assert not torch.equal(average, found["adapter.layers.0.self_attention.to_q.lora_B"])
    written = load_file(job.lora_path)["diffusion_model.layers.0.self_attention.to_q.lora_B.weight"]
    assert torch.allclose(written, 2 * average, atol=1e-7)


def test_training_goes_on_from_a_lora(models, tmp_path):
    first = run(tmp_path / "first", small_recipe(models))
    second = run(tmp_path / "second", small_recipe(models, initial_lora=str(first.lora_path)), until=1)
    start = load_file(first.lora_path)["diffusion_model.layers.0.self_attention.to_q.lora_A.weight"]
    now = state(second)["adapter.layers.0.self_attention.to_q.lora_A"]
    assert now.shape == start.shape
    assert (now - start).abs().max() < 0.1 < start.abs().max()


def test_a_preference_run_starts_at_the_reference(models, tmp_path):
    """At the first step policy and reference are one: margin 0, every gap 0, the loss ln 2 and the anchors."""
    base = run(tmp_path / "base", small_recipe(models))
    for reference in ("", str(base.lora_path)):
        folder = tmp_path / f"dpo{bool(reference)}"
        recipe = small_recipe(
            models, **{**DPO, "dpo": DpoConfig()}, reference_lora=reference, initial_lora=reference, steps=3
        )
        first = next(e for e in run(folder, recipe).events() if e["event"] == "step")
        assert first["margin"] == pytest.approx(0, abs=1e-3)
        assert first["preference"] == pytest.approx(np.log(2), abs=1e-3)
        assert first["win_excess"] == pytest.approx(0, abs=1e-6)
        assert first["accuracy"] == pytest.approx(0.5, abs=0.5)
        anchors = 0.35 * first["win_error"] + 0.15 * first["lose_error"]
        assert first["loss"] == pytest.approx(first["preference"] + anchors, rel=1e-5)


def test_reference_errors_of_the_bank_are_computed_once(models, tmp_path, monkeypatch):
    recipe = small_recipe(models, **DPO, reference_bank=2, steps=12)
    job = small_job(tmp_path / "job", recipe)
    calls = []
    original = trainer_module.Dpo._recall

    def counted(self, names, compute):
        return original(self, names, lambda: calls.append(names) or compute())

    monkeypatch.setattr(trainer_module.Dpo, "_recall", counted)
    train(job, device="cpu")
    asked = 12 * recipe.accumulation
    assert 7 <= len(calls) <= 14 < asked  # seven pairs, two draws each


def test_the_alarm_sounds_when_the_winner_gets_worse(models):
    from ernie_pack.ernie_core.training.losses import ALARM_STEPS, Dpo

    objective = Dpo(small_recipe(models, **DPO), reference=(), errors_path=Path("nowhere"))
    means = {"margin_size": 1.0, "win_excess": 0.01}
    said = [objective.after_step(means) for _ in range(ALARM_STEPS + 20)]
    assert [i for i, text in enumerate(said) if text] == [ALARM_STEPS - 1]
    assert "the winner's error" in said[ALARM_STEPS - 1]
    calm = Dpo(small_recipe(models, **DPO), reference=(), errors_path=Path("nowhere"))
    assert not any(calm.after_step({"margin_size": 1.0, "win_excess": -0.01}) for _ in range(99))


def test_tensorboard_logs_are_written_where_asked(models, tmp_path):
    pytest.importorskip("tensorboard")
    job = run(tmp_path / "job", small_recipe(models, tensorboard=True, steps=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(job.folder / "tensorboard"))
    log.Reload()
    assert [e.value for e in log.Scalars("loss")] == pytest.approx(losses(job), rel=1e-6)


def test_an_overfitted_run_learns_its_noise(models, tmp_path):
    """One picture under noise that is new every step: random frozen weights with rank 16 explain a good part of it."""
    recipe = small_recipe(
        models,
        steps=150,
        batch_size=1,
        accumulation=1,
        adapter=AdapterConfig(rank=16),
        optimiser=OptimiserConfig(lr=1e-2, warmup=5, schedule="constant"),
    )
    job = small_job(tmp_path / "job", recipe, count=1)
    train(job, device="cpu")
    seen = losses(job)
    assert np.mean(seen[-20:]) < 0.75 * np.mean(seen[:10])


def test_the_written_lora_is_the_trained_adapter(models, tmp_path):
    """Base plus the file, read back through the reader that everybody uses, is base plus the adapter."""
    from ernie_pack.ernie_core.training.adapters import Adapter, Views
    from ernie_pack.ernie_core.training.base import load_base
    from ernie_pack.ernie_core.weights.lora import module_shapes

    job = run(tmp_path / "job", small_recipe(models))
    model = load_base(model_paths(models).transformer, precision="fp32")
    x, text = torch.randn(1, 128, 3, 4), torch.randn(1, 5, model.config.text_in_dim)
    with torch.no_grad():
        base = model(x, torch.tensor([500.0]), text)
        views = Views(model)
        trained = Adapter(model, AdapterConfig(rank=2), seed=0)
        trained.load_state_dict(
            {k.removeprefix("adapter."): v for k, v in state(job).items() if k.startswith("adapter.")}
        )
        views.add("trained", trained)
        with views.active("trained"):
            wanted = model(x, torch.tensor([500.0]), text)
        views.close()
        for name, layer in read_lora(job.lora_path, module_shapes(model)).layers.items():
            weight = model.get_submodule(name).weight
            weight += layer.delta(weight)
        found = model(x, torch.tensor([500.0]), text)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert (wanted - base).abs().max() > 1e-3
