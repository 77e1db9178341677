"""The job folder: nothing that was saved is ever lost, whatever moment the process dies at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training import state as state_module
from ernie_pack.ernie_core.training.recipe import ModelPaths, Recipe
from ernie_pack.ernie_core.training.state import Job
from ernie_pack.ernie_core.weights.checkpoint import write_safetensors


def tensors(value):
    return {"adapter.a": torch.full((3, 5), float(value)), "optimiser.0.step": torch.tensor(float(value))}


def save(job, step, keep=4):
    def write_lora(path):
        write_safetensors({"lora": torch.full((2,), float(step))}, path)

    return job.save(step, tensors(step), {"note": step}, write_lora, keep=keep)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "job")


def test_a_checkpoint_comes_back_bit_by_bit(job):
    odd = {
        "nan": torch.tensor([float("nan"), -0.0, 1e-45]),
        "bf16": torch.randn(4).bfloat16(),
        "count": torch.tensor(7),
    }
    job.save(3, odd, {"x": [1, 0.1, None]}, lambda p: write_safetensors({"l": torch.zeros(1)}, p), keep=0)
    found = job.load()
    assert found.step == 3
    assert found.values["x"] == [1, 0.1, None]
    for name, tensor in odd.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert (
            found.tensors[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
        )


def test_old_checkpoints_go_only_beyond_the_number_to_keep(job):
    for step in (1, 2, 3, 4):
        save(job, step, keep=1)
    assert sorted(p.name for p in (job.folder / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert job.newest_step() == 4


def test_before_the_first_checkpoint_there_is_nothing_to_load(job):
    assert job.load() is None
    assert job.newest_step() is None


@pytest.mark.parametrize("name", ["state.safetensors", "lora.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(job, name, damage, caplog):
    save(job, 1)
    file = save(job, 2) / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        file.write_bytes({"cut": data[:-3], "empty": b"", "flipped": flipped}[damage])
    found = job.load()
    if found.step == 2:  # a flipped bit in the note of state.json is still valid JSON of the same step
        assert (name, damage) == ("state.json", "flipped")
    else:
        assert found.step == 1
        assert "step-000002" in caplog.text


def test_where_no_checkpoint_is_whole_it_says_so(job):
    (save(job, 1) / "state.safetensors").write_bytes(b"")
    with pytest.raises(ErnieError, match="none of the 1 checkpoints"):
        job.load()


# Every call by which a save touches the disk. Failing or dying at the n-th of them is dying at any byte: what lies
# between two of them is only ever a half-written temporary file.
CALLS = ("replace", "fsync")


def disk_calls(job, monkeypatch, *, fail_at=None):
    count = 0

    def watched(name):
        original = getattr(os, name)

        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == fail_at:
                raise OSError(28, "No space left on device")
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, watched(name))
        try:
            save(job, 2, keep=0)
        except ErnieError:
            return count, True
    return count, False


def test_a_full_disk_at_any_moment_keeps_a_whole_checkpoint(tmp_path, monkeypatch):
    total, _ = disk_calls(Job(tmp_path / "count"), monkeypatch)
    assert total >= 8
    for moment in range(1, total + 1):
        job = Job(tmp_path / str(moment))
        save(job, 1, keep=0)
        _, failed = disk_calls(job, monkeypatch, fail_at=moment)
        assert failed
        found = Job(job.folder).load()
        assert found.step in (1, 2)
        assert torch.equal(found.tensors["adapter.a"], tensors(found.step)["adapter.a"])
        save(job, 3)  # and it goes on
        assert job.load().step == 3


KILLED = """
import importlib.util, os, sys, signal
root, folder, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, root)
import torch
from ernie_core.training.state import Job
from ernie_core.weights.checkpoint import write_safetensors
count = 0
def watched(original):
    def call(*arguments, **options):
        global count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call
job = Job(folder)
def save(step):
    job.save(step, {"adapter.a": torch.full((3, 5), float(step)), "optimiser.0.step": torch.tensor(float(step))}, {},
             lambda p: write_safetensors({"lora": torch.full((2,), float(step))}, p), keep=0)
save(1)
os.replace, os.fsync = watched(os.replace), watched(os.fsync)
save(2)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
@pytest.mark.parametrize("moment", [1, 4, 7, 9])
def test_sigkill_while_saving_keeps_a_whole_checkpoint(tmp_path, moment):
    root = Path(state_module.__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "job"), str(moment)]
    ended = subprocess.run(command, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    found = Job(tmp_path / "job").load()
    assert found.step in (1, 2)
    assert torch.equal(found.tensors["adapter.a"], tensors(found.step)["adapter.a"])


def test_what_reads_back_different_is_not_published(job, monkeypatch):
    save(job, 1)
    original = state_module.write_safetensors
    monkeypatch.setattr(state_module, "write_safetensors", lambda t, p: original({k: v + 1 for k, v in t.items()}, p))
    with pytest.raises(ErnieError, match="reads back different"):
        save(job, 2)
    assert job.load().step == 1


def test_one_process_trains_in_a_folder(job):
    assert not job.is_running()
    with job.lock():
        assert job.is_running()
        with pytest.raises(ErnieError, match="another process"), Job(job.folder).lock():
            pass
    assert not job.is_running()
    with job.lock():
        pass


def test_events_survive_a_line_that_was_cut_off(job):
    job.folder.mkdir()
    for step in (1, 2, 3):
        job.append({"event": "step", "step": step, "loss": 0.1 * step, "lr": 1.0, "grad_norm": 2.0, "seconds": 1.0})
    with job.progress_path.open("a") as file:
        file.write('{"event":"step","ste')
    assert [e["step"] for e in job.events()] == [1, 2, 3]
    job.rewind_events(2)
    job.append({"event": "step", "step": 3, "loss": 9.0})
    assert [e["loss"] for e in job.events()] == pytest.approx([0.1, 0.2, 9.0])
    rows = (job.folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,lr")
    assert [r.split(",")[0] for r in rows[1:]] == ["1", "2", "3"]


def recipe(**changes):
    return Recipe(name="a", models=ModelPaths(transformer="/nowhere"), **changes)


def test_a_job_that_has_trained_takes_no_other_recipe(job):
    job.write_recipe(recipe(seed=1))
    job.write_recipe(recipe(seed=2))  # nothing trained yet
    save(job, 5)
    job.write_recipe(recipe(seed=2, steps=9999, comment="longer"))  # computes the same, further
    with pytest.raises(ErnieError, match=r"trained 5 steps with other settings .*seed"):
        job.write_recipe(recipe(seed=3))
    assert job.recipe().seed == 2
    job.append({"event": "step", "step": 5})
    job.start_over()
    assert job.load() is None
    assert job.events() == []
    job.write_recipe(recipe(seed=3))


def test_a_folder_that_is_no_job_says_so(tmp_path):
    with pytest.raises(ErnieError, match=r"not a training job"):
        Job(tmp_path).recipe()
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ErnieError, match="damaged"):
        Job(tmp_path).recipe()


def test_recipes_survive_the_folder(job):
    job.write_recipe(recipe(steps=7))
    assert job.recipe() == recipe(steps=7)
    assert json.loads(job.recipe_path.read_text())["steps"] == 7
