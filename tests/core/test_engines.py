"""Running stages: the same bytes with every engine, every number of workers and every interruption."""

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from curation_stages import Double
from ernie_pack.ernie_core.curation.engines import run_stage
from ernie_pack.ernie_core.curation.manifest import Manifest, read_rows, write_rows
from ernie_pack.ernie_core.errors import ErnieError, Interrupted

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"number": i, "text": f"row {i}"} for i in range(41)]
ROWS[7] = {"text": "no number"}
ROWS[11] = {**ROWS[11], "kept": False, "dropped_by": "size: too small"}
ROWS[13] = {**ROWS[13], "problem": "cut"}


@pytest.fixture
def source(tmp_path):
    write_rows(tmp_path / "source.jsonl", ROWS)
    return tmp_path / "source.jsonl"


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def computed(path):
    return [json.loads(line) for line in path.read_text().split()] if path.exists() else []


def test_rows_get_columns_a_reason_or_a_failure_and_none_is_lost(source, tmp_path):
    stage = Double(fails=(5,), raises=(6,), nan=(9,))
    summary = run_stage(stage, Manifest(source), tmp_path / "out.jsonl")
    rows = list(read_rows(tmp_path / "out.jsonl"))
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
    assert rows[3] == {**ROWS[3], "double": 6, "note": "\u9b5a", "made_by": {"double": "double 1"}}
    assert rows[5] == {**ROWS[5], "failed": {"double": "cannot double 5"}}
    assert rows[6] == {**ROWS[6], "failed": {"double": "RuntimeError: no 6"}}
    assert "not plain JSON" in rows[9]["failed"]["double"]
    assert rows[7] == {**ROWS[7], "passed_by": {"double": "has no number"}}
    assert rows[11]["passed_by"] == {"double": "dropped by size: too small"}
    assert rows[13]["passed_by"] == {"double": "has a problem"}
    assert (summary.rows, summary.made, summary.kept, summary.passed_by, summary.failed) == (41, 38, 0, 3, 3)
    assert not (tmp_path / "out.jsonl.parts").exists()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_worker_processes_give_the_bytes_of_this_process(source, tmp_path, workers):
    stage = Double(fails=(5,), raises=(6,), nan=(9,))
    run_stage(stage, source, tmp_path / "here.jsonl")
    run_stage(stage, source, tmp_path / "there.jsonl", engine="processes", workers=workers)
    assert sha(tmp_path / "there.jsonl") == sha(tmp_path / "here.jsonl")


def test_a_worker_that_dies_is_replaced_and_a_row_that_kills_workers_fails_alone(source, tmp_path):
    run_stage(Double(), source, tmp_path / "here.jsonl")
    once = Double(dies_once=tmp_path / "died")
    run_stage(once, source, tmp_path / "once.jsonl", engine="processes", workers=2)
    assert (tmp_path / "died").exists()
    assert sha(tmp_path / "once.jsonl") == sha(tmp_path / "here.jsonl")
    summary = run_stage(Double(dies=(6,)), source, tmp_path / "out.jsonl", engine="processes", workers=2)
    rows = list(read_rows(tmp_path / "out.jsonl"))
    assert [row.get("number") for row in rows if "failed" in row] == [6]
    assert "signal 9" in rows[6]["failed"]["double"]
    assert summary.failed == 1


@pytest.mark.parametrize("engine", ["here", "processes"])
def test_what_a_stage_cannot_run_without_stops_the_run_and_keeps_what_is_made(source, tmp_path, engine):
    with pytest.raises(ErnieError, match="no model there"):
        run_stage(Double(cannot_run="no model there"), source, tmp_path / "out.jsonl", engine=engine, workers=1)
    assert not (tmp_path / "out.jsonl").exists()
    assert run_stage(Double(), source, tmp_path / "out.jsonl").made == 38


def test_nothing_that_is_there_is_made_again(source, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out.jsonl"
    stage = Double(log=log, fails=(5,))
    run_stage(stage, source, out)
    first = sha(out)
    assert len(computed(log)) == 38
    log.unlink()
    summary = run_stage(stage, source, out)  # into the same target
    assert (computed(log), sha(out), summary.kept) == ([5], first, 37)  # only the failure is tried again
    log.unlink()
    run_stage(stage, out, tmp_path / "again.jsonl")  # the columns came with the source
    assert computed(log) == [5]
    assert sha(tmp_path / "again.jsonl") == first
    log.unlink()
    changed = [{"number": 100}, *ROWS[:20], *ROWS[22:], {"number": 101}]
    write_rows(source, changed)  # rows came and went
    run_stage(stage, source, out)
    assert computed(log) == [100, 5, 101]
    assert [r["double"] for r in read_rows(out) if "double" in r] == [
        2 * r["number"] for r in changed if "number" in r and r["number"] != 5 and not r.keys() & {"kept", "problem"}
    ]
    log.unlink()
    run_stage(Double(log=log, version=2), source, out)  # another key: all of it
    assert len(computed(log)) == 38


def test_a_stage_that_failed_leaves_the_columns_that_were_there(tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"number": 5, "double": "by hand"}])
    run_stage(Double(fails=(5,)), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert next(read_rows(tmp_path / "out.jsonl"))["double"] == "by hand"


def test_stopping_keeps_what_is_made(source, tmp_path):
    run_stage(Double(), source, tmp_path / "whole.jsonl")
    log, out, asked = tmp_path / "log", tmp_path / "out.jsonl", []
    with pytest.raises(Interrupted, match="Run again"):
        run_stage(Double(log=log), source, out, should_stop=lambda: asked.append(1) or len(asked) == 3)
    assert not out.exists()
    run_stage(Double(log=log), source, out)
    assert sorted(computed(log)) == [r["number"] for r in ROWS if "number" in r and not r.keys() & {"kept", "problem"}]
    assert sha(out) == sha(tmp_path / "whole.jsonl")


def test_a_log_cut_or_torn_anywhere_costs_only_what_is_damaged(source, tmp_path):
    out = tmp_path / "out.jsonl"
    parts, asked = tmp_path / "out.jsonl.parts", []
    run_stage(Double(), source, tmp_path / "whole.jsonl")
    with pytest.raises(Interrupted):
        run_stage(Double(), source, out, should_stop=lambda: asked.append(1) or len(asked) == 6)
    data = parts.read_bytes()
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        parts.write_bytes(data[:cut])
        run_stage(Double(), source, out)
        assert sha(out) == sha(tmp_path / "whole.jsonl"), cut
        out.unlink()
    lines = data.splitlines(keepends=True)
    parts.write_bytes(lines[0] + b"\0" * 30 + b"\n" + b"".join(lines[2:]))  # what a power cut leaves
    log = tmp_path / "log"
    run_stage(Double(log=log), source, out)
    assert sha(out) == sha(tmp_path / "whole.jsonl")
    assert len(computed(log)) == 38 - 5 * 4


SCRIPT = """
import importlib.util, sys
sys.path[:0] = [{root!r} + "/tests/support"]
place = {{"submodule_search_locations": [{root!r}]}}
spec = importlib.util.spec_from_file_location("ernie_pack", {root!r} + "/__init__.py", **place)
sys.modules["ernie_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["ernie_pack"])
from curation_stages import Double
from ernie_pack.ernie_core.curation.engines import run_stage
run_stage(Double(seconds=0.01), {source!r}, {out!r}, engine={engine!r}, workers={workers})
"""


@pytest.mark.parametrize(("engine", "workers"), [("here", 1), ("processes", 2)])
def test_killed_at_random_points_it_ends_as_if_it_had_not_been(source, tmp_path, engine, workers):
    run_stage(Double(), source, tmp_path / "whole.jsonl")
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    script = SCRIPT.format(root=str(ROOT), source=str(source), out=str(out), engine=engine, workers=workers)
    draw = random.Random(f"{engine} kills")
    command = [sys.executable, "-c", script]
    for size in sorted(draw.randrange(1200) for _ in range(4)):  # bytes of the log, of about 1500
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not (parts.exists() and parts.stat().st_size >= size):
            time.sleep(draw.uniform(0.0, 0.01))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert parts.stat().st_size >= size
    assert not out.exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=True).returncode == 0
    assert sha(out) == sha(tmp_path / "whole.jsonl")
    assert not parts.exists()


def test_workers_end_with_the_run(source, tmp_path):
    stage = Double(seconds=0.2, batch_size=1)
    with pytest.raises(Interrupted):
        run_stage(stage, source, tmp_path / "o", engine="processes", workers=2, should_stop=lambda: True)
    deadline = time.monotonic() + 5
    while children := [p for p in _children() if b"serve()" in p[1]]:
        assert time.monotonic() < deadline, children


def _children():
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == os.getpid() and stat[0] != "Z":
                    yield entry, Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue


def test_another_run_on_the_same_target_is_refused(source, tmp_path):
    def again(*_):
        with pytest.raises(ErnieError, match="another process is making"):
            run_stage(Double(), source, tmp_path / "out.jsonl")

    run_stage(Double(), source, tmp_path / "out.jsonl", on_progress=lambda d, t, n: d or again())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "spark"}, "engine must be one of here, processes, ray; got 'spark'"),
        ({"workers": -1}, "workers must be 0"),
        ({"workers": 3}, 'engine "here" has one worker, got 3'),
        ({"address": "head:6379"}, 'an address is for engine "ray"'),
    ],
    ids=["engine", "negative workers", "workers here", "address here"],
)
def test_settings_that_mean_nothing_are_refused(source, tmp_path, settings, message):
    with pytest.raises(ErnieError, match=message):
        run_stage(Double(), source, tmp_path / "out.jsonl", **settings)


def test_a_manifest_is_not_written_over_itself_and_must_be_there(source, tmp_path):
    with pytest.raises(ErnieError, match="source and target at once"):
        run_stage(Double(), source, source)
    with pytest.raises(ErnieError, match="no manifest"):
        run_stage(Double(), tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ErnieError, match="cannot be written"):
        run_stage(Double(), source, source / "out.jsonl")


def test_a_stage_that_adds_what_it_does_not_say_is_refused(source, tmp_path):
    with pytest.raises(ErnieError, match="gave note, which it does not say"):
        run_stage(Double(adds=("double",)), source, tmp_path / "out.jsonl")


def test_progress_counts_rows_to_their_end(source, tmp_path):
    seen = []
    run_stage(Double(), source, tmp_path / "out.jsonl", on_progress=lambda *call: seen.append(call))
    assert seen[0] == (0, 41, "double")
    assert seen[-1] == (41, 41, "double")
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)


def test_without_ray_it_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ErnieError, match="pip install ray"):
        run_stage(Double(), source, tmp_path / "out.jsonl", engine="ray")


def test_without_the_data_part_of_ray_it_says_what_to_install(source, tmp_path, monkeypatch):
    class Ray:
        exceptions = SimpleNamespace(RayError=OSError)

        def __getattr__(self, name):
            return lambda *_, **__: {"GPU": 0}

    monkeypatch.setitem(sys.modules, "ray", Ray())
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ErnieError, match=r"pip install 'ray\[data\]'"):
        run_stage(Double(), source, tmp_path / "out.jsonl", engine="ray")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no cluster was started: pip install ray")
def test_ray_data_gives_the_bytes_of_this_process_whatever_dies(source, tmp_path):
    import ray

    stage = Double(fails=(5,), raises=(6,), nan=(9,))
    run_stage(stage, source, tmp_path / "here.jsonl")
    run_stage(Double(), source, tmp_path / "plain.jsonl")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        run_stage(stage, source, tmp_path / "ray.jsonl", engine="ray", workers=2)
        once = Double(dies_once=tmp_path / "died")
        run_stage(once, source, tmp_path / "once.jsonl", engine="ray", workers=2)
        summary = run_stage(Double(dies=(6,)), source, tmp_path / "killer.jsonl", engine="ray", workers=2)
        with pytest.raises(ErnieError, match="no model there"):
            run_stage(Double(cannot_run="no model there"), source, tmp_path / "none", engine="ray", workers=1)
    finally:
        ray.shutdown()
    assert sha(tmp_path / "ray.jsonl") == sha(tmp_path / "here.jsonl")
    assert (tmp_path / "died").exists()
    assert sha(tmp_path / "once.jsonl") == sha(tmp_path / "plain.jsonl")
    assert [r["number"] for r in read_rows(tmp_path / "killer.jsonl") if "failed" in r] == [6]
    assert summary.failed == 1
