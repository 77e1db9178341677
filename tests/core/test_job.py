"""A job as others see it: states from the folder alone, a worker process that outlives nobody's patience."""

import time

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.job import format_seconds, log_tail, report, start_worker, status, watch
from ernie_pack.ernie_core.training.recipe import ModelPaths, Recipe
from ernie_pack.ernie_core.training.state import Job


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path / "job")
    job.write_recipe(Recipe(name="cat", models=ModelPaths(transformer=str(tmp_path / "nowhere")), steps=10))
    return job


def step(job, number, **more):
    job.append(
        {"event": "step", "step": number, "loss": 1 / number, "lr": 1e-4, "grad_norm": 1.0, "seconds": 2.0, **more}
    )


def test_states_are_read_from_the_folder(job):
    assert status(job).state == "new"
    with job.lock():
        step(job, 1)
        step(job, 2)
        now = status(job)
        assert (now.state, now.step, now.steps, now.loss, now.seconds_left) == ("running", 2, 10, 0.5, 16.0)
    dead = status(job)
    assert dead.state == "stopped"
    assert "without a word" in dead.message
    job.append({"event": "stopped", "message": "stopped at step 2"})
    assert status(job).message == "stopped at step 2"
    job.append({"event": "failed", "message": "NaN"})
    assert (status(job).state, status(job).message) == ("failed", "NaN")
    job.append({"event": "finished", "message": "finished"})
    assert status(job).state == "finished"


def test_alarms_are_shown_once_each(job):
    for _ in range(2):
        job.append({"event": "alarm", "step": 3, "message": "the winner's error"})
    assert status(job).alarms == ("the winner's error",)
    assert "**alarm**: the winner's error" in report(job).text


def test_a_report_tells_the_numbers(job):
    for i in range(1, 5):
        step(job, i)
    job.append({"event": "bad_step", "step": 5, "message": "x"})
    text = report(job)
    assert "step 4 of 10" in text.text
    assert "NaN: 1" in text.text
    assert "2.00 s a step" in text.text
    assert text.curves.dtype == np.uint8
    assert text.samples is None


def test_a_worker_that_fails_is_never_taken_for_one_that_finished(job):
    worker = start_worker(job)
    seen = []
    last = watch(job, seen.append, worker=worker, seconds=0.1)
    assert last.state == "failed"
    assert "manifest" in last.message
    assert worker.wait(10) == 1
    assert "error:" in log_tail(job)


def test_a_running_job_gets_no_second_worker(job):
    with job.lock(), pytest.raises(ErnieError, match="running already"):
        start_worker(job)


def test_watching_ends_where_the_watcher_raises(job):
    class Enough(Exception):
        pass

    def stop(_):
        raise Enough

    with job.lock(), pytest.raises(Enough):
        watch(job, stop)
    assert time.monotonic() > 0


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (75, "1 min 15 s"), (3700, "1 h 1 min")])
def test_times_are_told_as_people_do(seconds, text):
    assert format_seconds(seconds) == text
