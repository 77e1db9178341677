"""A run's file holds what any of its pictures needs, is found quickly, and an earlier one is never lost."""

import json
import time
from dataclasses import replace

import pytest
from ernie_pack.ernie_core.batch import Row
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.runs import RUN, Run, differences, fingerprint_file, read_run, write_run

ROW = Row(label="row 1", prompt="a red fox", negative="", seed=7, width=64, height=32, steps=4, cfg=4.0, shift=4.0)
MADE_WITH = {"torch": "2.13.0", "device": "cpu"}


def make_run(rows=(ROW,), **changes):
    values = {"node": "6", "prompt": {"6": {"class_type": "X", "inputs": {}}}, "made_with": MADE_WITH, "models": []}
    return Run(rows=[row.settings() for row in rows], **(values | changes))


def test_a_run_reads_back_and_one_row_of_ten_thousand_is_found_at_once(tmp_path):
    rows = [replace(ROW, label=f"row {i}", prompt=f"fox {i}", seed=i, loras=(("a", 0.5),)) for i in range(10_000)]
    write_run(tmp_path, make_run(rows))
    start = time.perf_counter()
    row = read_run(tmp_path).row(7777)
    seconds = time.perf_counter() - start
    assert row == rows[7776]
    assert row.hash == rows[7776].hash
    assert seconds < 2  # 0.03 to 0.1 s on an idle core


def test_the_same_run_stays_and_another_keeps_the_earlier(tmp_path):
    write_run(tmp_path, make_run())
    write_run(tmp_path, make_run())
    assert [p.name for p in tmp_path.iterdir()] == [RUN]
    write_run(tmp_path, make_run([replace(ROW, seed=8)]))
    (earlier,) = tmp_path.glob("run_*.json")
    assert read_run(earlier).row(1) == ROW
    assert read_run(tmp_path).row(1).seed == 8


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_row_that_is_not_there_is_said(number):
    with pytest.raises(ErnieError, match=f"rows 1 to 1; row {number} is none"):
        make_run().row(number)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not the file of a run"),
        ("[]", "is not the file of a run"),
        ('{"format": 1}', "is not the file of a run .KeyError"),
        ('{"format": 9}', "has format 9, this pack reads format 1"),
        (None, "cannot be read"),
    ],
)
def test_damaged_and_missing_files_are_said(tmp_path, text, reason):
    if text is not None:
        (tmp_path / RUN).write_text(text)
    with pytest.raises(ErnieError, match=reason):
        read_run(tmp_path)


def test_a_full_disk_keeps_the_earlier_run(tmp_path, monkeypatch):
    import errno
    import os

    write_run(tmp_path, make_run())

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ErnieError, match="could not be written"):
        write_run(tmp_path, make_run([replace(ROW, seed=8)]))
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["rows"][0]["seed"] == 7


def test_fingerprints_tell_files_apart(tmp_path):
    one, two = tmp_path / "a.safetensors", tmp_path / "b" / "a.safetensors"
    two.parent.mkdir()
    data = bytearray(range(256)) * 20_000  # 5 MB: more than all pieces together
    one.write_bytes(data)
    two.write_bytes(data)
    assert fingerprint_file(one) == fingerprint_file(two) == fingerprint_file(two.parent)
    data[-1] ^= 1
    two.write_bytes(data)
    assert fingerprint_file(one) != fingerprint_file(two)
    two.write_bytes(data[:-1])
    assert fingerprint_file(two)["size"] == len(data) - 1
    (tmp_path / "empty").touch()
    assert fingerprint_file(tmp_path / "empty")["size"] == 0


def test_what_changed_is_named():
    model = {"kind": "vae", "name": "v.safetensors", "size": 1, "sample": "x"}
    run = make_run(models=[model])
    assert differences(run, MADE_WITH, [model]) == []
    found = differences(run, {**MADE_WITH, "torch": "3"}, [{**model, "sample": "y"}])
    assert found == ["torch was 2.13.0, is 3", "the file v.safetensors is not the one that it was"]
