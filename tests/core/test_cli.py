"""The command line does what the nodes do: train, resume, stop, report, preflight, LoRA tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ernie_pack.ernie_core.cli import main
from ernie_pack.ernie_core.training.job import PACK_ROOT, status
from ernie_pack.ernie_core.training.state import Job
from ernie_pack.ernie_core.weights.lora import find_dialect
from PIL import Image
from random_models import RELEASED_FILES, write_random_models
from safetensors.torch import load_file
from training_jobs import write_pictures

JOB = """
name = "cat"
steps = {steps}
batch_size = {batch_size}
accumulation = 1
precision = "fp32"
[models]
transformer = "{transformer}"
text_encoder = "{text_encoder}"
vae = "{vae}"
[adapter]
rank = 2
[optimiser]
warmup = 1
[[stages]]
resolutions = [64]
[data]
path = "pictures"
trigger = "sks"
dropout = 0.1
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def job_file(models, tmp_path):
    def write(*, steps=3, batch_size=2, **more):
        write_pictures(tmp_path / "pictures", count=5)
        paths = {kind: (models / RELEASED_FILES[kind]).as_posix() for kind in ("transformer", "text_encoder", "vae")}
        path = tmp_path / "job.toml"
        lines = "".join(f"{k} = {json.dumps(v)}\n" for k, v in more.items())
        path.write_text(lines + JOB.format(steps=steps, batch_size=batch_size, **paths), encoding="utf-8")
        return str(path)

    return write


def test_a_job_file_is_trained_in_a_folder_of_its_name(job_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", job_file(), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "step 3  loss" in said
    assert "LoRA: " in said
    job = Job("jobs/cat")
    assert job.lora_path.is_file()
    assert status(job).state == "finished"


def test_a_run_is_stopped_and_resumed(job_file, tmp_path, capsys):
    folder = str(tmp_path / "job")
    assert main(["train", job_file(steps=4), "--folder", folder, "--until", "2", "--device", "cpu"]) == 0
    assert main(["status", folder]) == 0
    assert "stopped: step 2 of 4" in capsys.readouterr().out
    assert main(["train", folder, "--device", "cpu"]) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert main(["train", folder, "--start-over", "--until", "1", "--device", "cpu"]) == 0
    assert Job(folder).newest_step() == 1


def test_a_report_is_written_as_files(job_file, tmp_path, capsys):
    folder = str(tmp_path / "job")
    main(["train", job_file(), "--folder", folder, "--device", "cpu"])
    assert main(["report", folder, "--out", str(tmp_path / "out")]) == 0
    assert "step 3 of 3" in (tmp_path / "out" / "report.md").read_text()
    assert Image.open(tmp_path / "out" / "curves.png").width == 900


def test_preflight_measures_and_draws(job_file, tmp_path, capsys):
    assert main(["preflight", job_file(), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "5 images" in said
    assert "measured" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["buckets.png", "crops.png", "tokens.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere"], "is not a training job"),
        (["status", "nowhere"], "is not a training job"),
        (["stop", "nowhere"], "no process is training"),
        (["train", "{no_data}"], r"needs a table [data]"),
        (["train", "{bad_key}"], "rankk is not a setting of a recipe: did you mean 'rank'"),
        (["train", "{bad_data}"], "there is no file or folder"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {
        "no_data": 'name = "a"\n[models]\ntransformer = "x"\n',
        "bad_key": 'name = "a"\n[models]\ntransformer = "x"\n[adapter]\nrankk = 3\n[data]\npath = "."\n',
        "bad_data": 'name = "a"\n[models]\ntransformer = "x"\n[data]\npath = "gone"\n',
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.toml").write_text(text)
    files = {name: f"{name}.toml" for name in texts}
    assert main([a.format(**files) for a in arguments]) == 1
    assert message in capsys.readouterr().err


def test_paths_in_a_job_file_are_relative_to_it(models, tmp_path, monkeypatch):
    from ernie_pack.ernie_core.training.job import read_job_file

    write_pictures(tmp_path / "pictures", count=1)
    (tmp_path / "job.toml").write_text(
        'name = "a"\ninitial_lora = "x.safetensors"\n[models]\ntransformer = "m"\n[[data]]\npath = "pictures"\n'
        '[[data]]\npath = "pictures"\ntrigger = "sks"\n'
    )
    monkeypatch.chdir(models)
    recipe, data = read_job_file(tmp_path / "job.toml")
    assert recipe.models.transformer == str(tmp_path / "m")
    assert recipe.initial_lora == str(tmp_path / "x.safetensors")
    assert len(data.items) == 2


DISTILLED = """
objective = "distil"
{head}
[distil]
steps = 2
prompts = '''
ink: a star
a ring
'''
fake = {{warmup = 2, steps_per_student = 2}}
[distil.table]
rules = [{{tags = ["ink"], weights = {{base = 1.0}}}}]
"""


def test_a_student_is_distilled_without_any_graph(job_file, tmp_path, capsys):
    from ernie_pack.ernie_core.training.job import read_job_file

    path = tmp_path / "distil.toml"
    head = Path(job_file()).read_text(encoding="utf-8").partition("[data]")[0]
    path.write_text(DISTILLED.format(head=head), encoding="utf-8")
    folder = str(tmp_path / "job")
    assert main(["train", str(path), "--folder", folder, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "2 prompts: 1 ink, 1 without a tag" in out
    assert "loss_fake" in out
    assert main(["report", folder]) == 0
    assert main(["preflight", str(path), "--no-probe"]) == 0
    assert "2 prompts" in capsys.readouterr().out
    with path.open("a", encoding="utf-8") as file:
        file.write('teachers = [{name = "ink", lora = "ink.safetensors"}]\n')
    recipe, _ = read_job_file(path)
    assert recipe.distil.table.teachers[0].lora == str(tmp_path / "ink.safetensors")


def test_lora_files_are_looked_at_and_rewritten(job_file, models, tmp_path, capsys):
    folder = tmp_path / "job"
    main(["train", job_file(), "--folder", str(folder), "--device", "cpu"])
    lora, model = str(folder / "cat.safetensors"), str(models / RELEASED_FILES["transformer"])
    out = tmp_path / "out.safetensors"
    capsys.readouterr()
    assert main(["lora", "inspect", lora, "--model", model]) == 0
    assert "14 of 14 matched" in capsys.readouterr().out
    assert main(["lora", "convert", lora, str(out), "--dialect", "kohya", "--model", model]) == 0
    assert find_dialect(load_file(out)) == "kohya"
    assert main(["lora", "resize", lora, str(out), "--rank", "1", "--model", model]) == 0
    assert load_file(out)["diffusion_model.layers.0.self_attention.to_q.lora_A.weight"].shape[0] == 1
    merged = tmp_path / "merged.safetensors"
    assert main(["lora", "merge", lora, str(merged), "--strength", "0.5", "--model", model]) == 0
    assert main(["lora", "extract", str(merged), str(out), "--rank", "2", "--model", model]) == 0
    assert main(["lora", "inspect", model, "--model", model]) == 1
    assert "error:" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_are_one_with_twice_the_batch(job_file, tmp_path):
    """--multi_gpu is accelerate's word for one process per device; without GPUs ours take the CPU."""
    pytest.importorskip("accelerate")
    # fixed flags: what the user's own accelerate configuration says must not matter here
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(29500 + os.getpid() % 2000), "-m", "ernie_core.cli"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    two = tmp_path / "two"
    ended = subprocess.run(
        [*launcher, "train", job_file(steps=4), "--folder", str(two), "--device", "cpu"],
        cwd=PACK_ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    one = tmp_path / "one"
    assert main(["train", job_file(steps=4, batch_size=4), "--folder", str(one), "--device", "cpu"]) == 0
    losses = [[e["loss"] for e in Job(f).events() if e["event"] == "step"] for f in (two, one)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
