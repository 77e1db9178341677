"""A pool on the disk is the pool in memory; rows are read at random; what cannot be drawn is counted."""

import errno
import json
import multiprocessing
from itertools import count

import numpy as np
import pytest
from ernie_pack.ernie_core.curation import draws as module
from ernie_pack.ernie_core.curation.draws import ONE_CATEGORY, Draws, open_pool, read_pool
from ernie_pack.ernie_core.curation.manifest import read_rows, write_rows
from ernie_pack.ernie_core.curation.sampling import PRESETS, Sampling
from ernie_pack.ernie_core.errors import ErnieError


def make_rows(number=300, seed=0):
    rng = np.random.default_rng(seed)
    kinds = ["animal/bird/owl", "animal/bird/hen", "animal/fish", "thing"]
    return [
        {"id": f"{i:x}", "source": f"{i}.png", "category": kinds[int(k)], "score": float(s), "caption": "x" * (i % 7)}
        for i, k, s in zip(range(number), rng.integers(0, 4, number) ** 2 // 3, rng.normal(5, 1, number), strict=True)
    ]


@pytest.fixture
def manifest(tmp_path):
    write_rows(tmp_path / "04_scores.jsonl", make_rows())
    return tmp_path / "04_scores.jsonl"


def test_a_pool_on_the_disk_draws_what_the_one_in_memory_draws(manifest):
    in_memory, _ = read_pool(manifest)
    numbers = np.arange(2000)
    for sampling in PRESETS.values():
        if sampling.scale == "raw":
            continue
        for _ in range(2):  # made, then found
            kept = Draws(open_pool(manifest), sampling, seed=1)
            assert np.array_equal(kept.rows(numbers), Draws(in_memory, sampling, seed=1).rows(numbers))


def test_drawn_rows_are_read_whole(manifest):
    rows = list(read_rows(manifest))
    draws = Draws(open_pool(manifest), Sampling())
    drawn = draws.batch(7, 20)
    assert draws.read(drawn) == [rows[i] for i in drawn]
    assert all(row["source"].startswith(str(manifest.parent)) for row in draws.read(drawn))


def test_rows_are_found_behind_empty_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in make_rows(5)]
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode() + b'\n{"id": "half')
    draws = Draws(open_pool(path), PRESETS["proportional"])
    assert sorted({row["id"] for row in draws.read(draws.rows(np.arange(200)))}) == ["0", "1", "2", "3", "4"]


def test_a_pool_is_made_once_and_again_when_the_manifest_changes(manifest, monkeypatch):
    made = count()
    plain = module.read_pool
    monkeypatch.setattr(module, "read_pool", lambda *a, **o: (next(made), plain(*a, **o))[1])
    assert len(open_pool(manifest)) == len(open_pool(manifest)) == 300
    assert next(made) == 1
    write_rows(manifest, make_rows(50))
    assert len(open_pool(manifest)) == 50
    assert len(open_pool(manifest, depth=1)) == 50
    assert next(made) == 4


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (0, ("animal/bird/hen", "animal/bird/owl", "animal/fish", "thing")),
        (2, ("animal/bird", "animal/fish", "thing")),
        (1, ("animal", "thing")),
    ],
)
def test_a_category_is_as_deep_as_asked(manifest, depth, names):
    pool = open_pool(manifest, depth=depth)
    assert pool.names == tuple(sorted({"/".join(r["category"].split("/")[: depth or None]) for r in make_rows()}))
    assert set(pool.names) <= set(names)
    for name, start, end in zip(pool.names, pool.starts[:-1], pool.starts[1:], strict=True):
        rows = [make_rows()[i] for i in pool.order[start:end]]
        assert all(row["category"].startswith(name) for row in rows)
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


def test_what_cannot_be_drawn_is_counted_and_never_drawn(tmp_path):
    rows = make_rows(100)
    rows[3] |= {"kept": False, "dropped_by": "size"}
    rows[4] = {"source": "4.png", "problem": "is cut"}
    for i in (5, 6):
        del rows[i]["category"]
    rows[6].pop("score")
    rows[7]["score"] = None
    rows[8]["score"] = True
    write_rows(tmp_path / "m.jsonl", rows)
    pool = open_pool(tmp_path / "m.jsonl")
    assert dict(pool.left_out) == {
        "that a filter dropped": 1,
        "whose file is no usable picture": 1,
        "without a category": 2,
        "without a score": 2,
    }
    assert len(pool) == 94
    assert not {3, 4, 5, 6, 7, 8} & set(pool.order.tolist())


def test_without_categories_and_scores_all_rows_are_one_category(tmp_path):
    write_rows(tmp_path / "m.jsonl", [{"source": f"{i}.png"} for i in range(10)])
    pool = open_pool(tmp_path / "m.jsonl")
    assert (pool.names, len(pool), pool.is_scored, pool.left_out) == ((ONE_CATEGORY,), 10, False, ())
    with pytest.raises(ErnieError, match="needs scores"):
        Draws(pool, Sampling())
    assert set(Draws(pool, PRESETS["proportional"]).rows(np.arange(200)).tolist()) == set(range(10))


def test_parquet_is_drawn_from_but_not_read_row_by_row(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is optional")
    write_rows(tmp_path / "m.parquet", make_rows())
    write_rows(tmp_path / "m.jsonl", make_rows())
    one, other = (Draws(open_pool(tmp_path / f"m.{kind}"), Sampling()) for kind in ("parquet", "jsonl"))
    assert np.array_equal(one.batch(0, 100), other.batch(0, 100))
    with pytest.raises(ErnieError, match="from JSONL only"):
        one.read(one.batch(0, 1))


def _open(path, results):
    pool = open_pool(path)
    results.put(Draws(pool, Sampling(), seed=2).batch(0, 50).tolist())


def test_several_processes_that_make_a_pool_at_once_see_the_same(manifest):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_open, args=(manifest, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2]
    assert not list(manifest.parent.rglob("*.part*"))


@pytest.mark.parametrize("where", ["the pool", "the sums"])
def test_a_full_disk_leaves_nothing_half_written(manifest, monkeypatch, where):
    if where == "the sums":
        open_pool(manifest)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ErnieError, match="No space left"):
        Draws(open_pool(manifest), Sampling())
    monkeypatch.undo()
    assert not list(manifest.parent.rglob("*.part*"))
    assert len(Draws(open_pool(manifest), Sampling()).batch(0, 8)) == 8


def test_making_a_pool_tells_how_far_it_is_and_can_be_stopped(manifest, monkeypatch):
    monkeypatch.setattr(module, "_REPORT_EVERY", 100)
    said = []
    open_pool(manifest, on_progress=lambda *call: said.append(call))
    assert said == [(done, 300, "reading the manifest") for done in (0, 100, 200)]

    def stop(done, _total, _what):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_pool(manifest, depth=1, on_progress=stop)
    assert len(list((manifest.parent / "04_scores.jsonl.pool").iterdir())) == 1


def test_a_manifest_that_is_not_there_or_changed_says_so(manifest, tmp_path):
    with pytest.raises(ErnieError, match="there is no manifest"):
        open_pool(tmp_path / "none.jsonl")
    with pytest.raises(ErnieError, match="depth must be 0"):
        open_pool(manifest, depth=-1)
    draws = Draws(open_pool(manifest), Sampling())
    manifest.write_text("short\n")
    with pytest.raises(ErnieError, match="has changed since its pool was made"):
        draws.read(draws.batch(0, 50))
