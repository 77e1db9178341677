"""What a plan says of a pool before training, and the dataset that Train draws from."""

import math
import re

import numpy as np
import pytest
from ernie_pack.ernie_core.cli import main
from ernie_pack.ernie_core.curation import dataset as dataset_module
from ernie_pack.ernie_core.curation.dataset import read_planned
from ernie_pack.ernie_core.curation.draws import Draws, read_pool
from ernie_pack.ernie_core.curation.manifest import write_rows
from ernie_pack.ernie_core.curation.mix import describe, draw_mix, named_sampling, plan_mix
from ernie_pack.ernie_core.curation.sampling import ARTICLE, PRESETS, Sampling, make_pool
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.buckets import BatchPlan, Stage
from ernie_pack.ernie_core.training.captions import Caption, draw_caption
from ernie_pack.ernie_core.training.items import DatasetOptions, read_manifest, write_manifest
from PIL import Image
from small_data import write_pictures


def long_tailed(categories=60, seed=0):
    rng = np.random.default_rng(seed)
    counts = np.maximum(1, 600 // np.arange(1, categories + 1) ** 1.5).astype(int)
    category = np.repeat(np.arange(categories), counts)
    return make_pool(category, rng.normal(5, 1, len(category)), [f"c{i:02}" for i in range(categories)])


def rows_of(count=8, folder=None):
    """Rows as the stages leave them; with real files in `folder` if one is given."""
    rows = []
    for i in range(count):
        row = {"id": f"{i:064x}", "source": f"{i}.png", "width": 64, "height": 48, "caption": f"beside {i}"}
        row |= {"category": "a/b" if i < count - 2 else "c", "score": float(i)}
        row |= {"captions": {"keyword": f"tags {i}", "detailed": [f"long {i}", f"longer {i}"]}}
        rows.append(row)
    return rows


@pytest.fixture
def manifest(tmp_path):
    write_rows(tmp_path / "m.jsonl", rows_of())
    return tmp_path / "m.jsonl"


# --- the plan ---


@pytest.mark.parametrize("name", PRESETS)
def test_shares_sum_to_1_and_say_what_draws_do(name):
    pool = long_tailed()
    mix = plan_mix(pool, PRESETS[name])
    assert mix.total == len(pool)
    assert sum(c.pool for c in mix.categories) == pytest.approx(1)
    assert sum(c.drawn for c in mix.categories) == pytest.approx(1)
    drawn = np.bincount(Draws(pool, PRESETS[name]).rows(np.arange(len(pool))), minlength=len(pool))
    assert (drawn > 0).mean() == pytest.approx(mix.seen, abs=0.04)
    many = np.bincount(Draws(pool, PRESETS[name]).rows(np.arange(100 * len(pool))), minlength=len(pool)) / 100
    in_order = many[pool.order]
    for c in mix.categories:
        number = pool.names.index(c.name)
        part = in_order[pool.starts[number] : pool.starts[number + 1]]
        assert part.mean() == pytest.approx(c.each, rel=0.35, abs=0.1)
        assert c.most >= c.each - 1e-9


def test_proportional_changes_nothing():
    mix = plan_mix(long_tailed(), PRESETS["proportional"])
    for c in mix.categories:
        assert c.drawn == pytest.approx(c.pool)
        assert (c.each, c.most) == pytest.approx((1, 1))
    assert mix.effective(drawn=True) == pytest.approx(mix.effective(drawn=False))


def test_head_and_tail_are_what_they_are_said_to_be():
    mix = plan_mix(long_tailed(), Sampling())
    head, tail = mix.end(tail=False), mix.end(tail=True)
    assert sum(c.pool for c in head) >= 0.5 > sum(c.pool for c in head[:-1])
    assert 0 < sum(c.pool for c in tail) <= 0.1
    assert min(c.count for c in head) >= max(c.count for c in tail)
    assert sum(c.drawn for c in head) < sum(c.pool for c in head)
    assert sum(c.drawn for c in tail) > sum(c.pool for c in tail)
    assert mix.effective(drawn=True) > mix.effective(drawn=False)
    alone = plan_mix(make_pool([0, 0], [1.0, 2.0], ["x"]), Sampling())
    assert (len(alone.end(tail=False)), alone.end(tail=True)) == (1, ())
    two = plan_mix(make_pool([0, 0, 1], [1.0, 2.0, 3.0], ["x", "y"]), Sampling())
    assert [c.name for c in two.end(tail=True)] == ["y"]


def test_the_report_says_every_number_and_what_may_hurt():
    pool = make_pool([0] * 80 + [1] * 19 + [2], np.arange(100.0), ["big", "mid", "one"], left_out=[("torn", 3)])
    mix = plan_mix(pool, PRESETS["uniform over categories"])
    text = mix.report()
    assert "100 pictures in 3 categories" in text
    assert "| big | 80 | 0.4 | 80.00% | 33.33% | 0.417 | 0.417 |" in text
    assert "| one | 1 | 0.995 | 1.00% | 33.33% | 33.3 | 33.3 |" in text
    assert "3 rows torn are not drawn" in text
    assert "learnt by heart: one (33 times)" in text
    assert "opposite" not in text
    assert "an article's reading" in plan_mix(pool, PRESETS[ARTICLE]).report()
    unscored = make_pool([0, 1], [math.nan] * 2, ["a", "b"])
    assert "| a | 1 | - | 50.00%" in plan_mix(unscored, PRESETS["proportional"]).report()


def test_a_long_list_shows_both_ends():
    pool = make_pool(np.arange(1000), np.arange(1000.0), [f"{i:04}" for i in range(1000)])
    text = plan_mix(pool, PRESETS["proportional"]).report()
    assert "(800 more)" in text
    assert len(text.splitlines()) < 230
    assert draw_mix(plan_mix(pool, PRESETS["proportional"])).shape == (70 + 41 * 30, 900, 3)


def test_bars_are_as_long_as_their_shares():
    mix = plan_mix(make_pool([0] * 6 + [1] * 2, np.ones(8), ["a", "b"]), PRESETS["uniform over categories"])
    picture = draw_mix(mix)
    for colour, shares in (((176, 180, 190), (0.75, 0.25)), ((38, 92, 196), (0.5, 0.5))):
        found = (picture[56:] == colour).all(axis=2)[:, 250:]
        lengths = [int(found[30 * i : 30 * i + 30].sum(axis=1).max()) for i in range(2)]
        assert lengths == pytest.approx([400 * share / 0.75 for share in shares], abs=2)


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        (
            Sampling(),
            "p(category) ~ n^0.5 q^1 (q = mean score, percentile in the pool); inside a category "
            "exp(score, percentile in the pool / 0.5)",
        ),
        (PRESETS["proportional"], "p(category) ~ n^1; all pictures of a category alike"),
        (Sampling(gamma=0, temperature=0), "p(category) ~ n^0.5; of a category only the best"),
        (
            Sampling(quality="upper", scale="raw", within="rank"),
            "p(category) ~ n^0.5 q^1 (q = score that its best "
            "tenth reaches, as it is); inside a category exp(rank in the category, 1 the best / 0.5)",
        ),
    ],
    ids=["default", "proportional", "best", "rank"],
)
def test_a_sampling_is_said_in_words(sampling, text):
    assert describe(sampling) == text


def test_a_preset_that_is_not_there_names_those_that_are():
    assert named_sampling("tempered") == Sampling()
    with pytest.raises(ErnieError, match=re.escape("one of tempered, proportional, uniform")):
        named_sampling("balanced")


# --- the dataset ---


def test_a_dataset_has_the_draws_of_its_plan(manifest):
    for name in ("tempered", "uniform over categories"):
        data, pool = read_planned(manifest, PRESETS[name])
        mix = plan_mix(pool, PRESETS[name])
        assert sum(item.draws for item in data.items) == pytest.approx(len(data)) == pytest.approx(8)
        assert data.concepts == pytest.approx({c.name: 8 * c.drawn for c in mix.categories})
        assert [item.image.name for item in data.items] == [f"{i}.png" for i in range(8)]
    shares = [item.draws for item in read_planned(manifest, Sampling())[0].items]
    assert sorted(shares[:6]) == shares[:6]  # scores ascend inside a/b
    assert shares[6] < shares[7]


def test_a_plan_that_draws_all_alike_trains_all_alike(manifest):
    data, _ = read_planned(manifest, PRESETS["proportional"])
    assert [item.draws for item in data.items] == pytest.approx([1.0] * 8)


def test_captions_of_all_styles_are_drawn_in_their_ratio(manifest):
    options = DatasetOptions(styles=(("keyword", 1.0), ("detailed", 3.0)))
    data, _ = read_planned(manifest, Sampling(), options)
    item = data.items[3]
    assert item.captions == (
        Caption("caption", "beside 3"),
        Caption("keyword", "tags 3"),
        Caption("detailed", "long 3"),
        Caption("detailed", "longer 3"),
    )
    drawn = [draw_caption(item, data.options, seed=0, number=n) for n in range(4000)]
    assert drawn.count("tags 3") / 4000 == pytest.approx(0.25, abs=0.03)
    assert drawn.count("long 3") / 4000 == pytest.approx(0.375, abs=0.03)
    assert "beside 3" not in drawn


def test_styles_that_pictures_lack_are_said(manifest):
    data, _ = read_planned(manifest, Sampling(), DatasetOptions(styles=(("poem", 1.0),)))
    assert any("8 of 8 pictures" in str(p) and "styles asked for" in str(p) for p in data.problems)


def test_the_dataset_goes_through_its_file_and_the_batches_follow_it(tmp_path):
    folder = write_pictures(tmp_path / "pics", count=6)
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".jpg"))
    import hashlib

    rows = [
        {
            "id": hashlib.sha256(file.read_bytes()).hexdigest(),
            "source": str(file),
            "width": 64,
            "height": 64,
            "caption": "x",
            "category": "rare" if i == 0 else "common",
        }
        for i, file in enumerate(files)
    ]
    write_rows(tmp_path / "m.jsonl", rows)
    data, _ = read_planned(tmp_path / "m.jsonl", PRESETS["uniform over categories"])
    write_manifest(data, tmp_path / "job" / "manifest.jsonl")
    back = read_manifest(tmp_path / "job" / "manifest.jsonl")
    assert [item.draws for item in back.items] == [item.draws for item in data.items]
    assert not back.problems
    plan = BatchPlan(back.items, back.options, stages=(Stage(resolutions=(64,)),), batch_size=4)
    concepts = [s.entry.concept for step in range(500) for s in plan.batch_at(step)]
    assert concepts.count("rare") / 2000 == pytest.approx(0.5, abs=0.05)


def test_what_is_left_out_is_a_problem_of_the_dataset(tmp_path):
    rows = rows_of()
    rows[0] = {"source": "0.png", "problem": "is cut"}
    rows[1] |= {"kept": False}
    write_rows(tmp_path / "m.jsonl", rows)
    data, _ = read_planned(tmp_path / "m.jsonl", Sampling())
    assert sorted(map(str, data.problems)) == [
        "1 rows: left out: that a filter dropped",
        "1 rows: left out: whose file is no usable picture",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "s.tar#1.png"}, r"s\.tar#1\.png lies inside a shard. Export"),
        ({"width": None}, "has no size or no id. Run the ingest stage"),
        ({"id": ""}, "has no size or no id"),
        ({"source": ""}, "names no picture"),
        ({"caption": "", "captions": {}}, "1 of 8 pictures have no caption"),
    ],
    ids=["shard", "no size", "no id", "no source", "no caption"],
)
def test_rows_that_train_cannot_read_say_what_to_do(tmp_path, change, message):
    rows = rows_of()
    rows[2] |= change
    write_rows(tmp_path / "m.jsonl", rows)
    with pytest.raises(ErnieError, match=message):
        read_planned(tmp_path / "m.jsonl", Sampling())


def test_more_rows_than_train_takes_are_refused_before_they_are_read(manifest, monkeypatch):
    monkeypatch.setattr(dataset_module, "MOST_ROWS", 5)
    with pytest.raises(ErnieError, match=r"m\.jsonl has 8 pictures; Train takes 5 at most"):
        read_planned(manifest, Sampling())


def test_reading_a_plan_draws_what_the_pool_draws(manifest):
    """The share of every row is one number, whether Train draws it or a loop over `Draws` does."""
    data, pool = read_planned(manifest, Sampling())
    drawn = np.bincount(Draws(read_pool(manifest)[0], Sampling()).rows(np.arange(80_000)), minlength=8) / 10_000
    assert len(pool) == 8
    np.testing.assert_allclose(drawn, [item.draws for item in data.items], rtol=0.06)


# --- from a terminal ---


def test_the_command_shows_the_mix_and_writes_what_train_reads(manifest, tmp_path, capsys):
    assert main(["curate", "plan", str(manifest), "--picture", str(tmp_path / "mix.png")]) == 0
    said = capsys.readouterr().out
    assert "8 pictures in 2 categories" in said
    assert Image.open(tmp_path / "mix.png").size == (900, 130)
    target = tmp_path / "out" / "data.jsonl"
    arguments = ["--alpha", "0", "--gamma", "0", "--temperature", "inf", "--styles", "keyword 1", "--dropout", "0.1"]
    assert main(["curate", "plan", str(manifest), str(target), *arguments]) == 0
    back = read_manifest(target, check=False)
    expected, _ = read_planned(manifest, PRESETS["uniform over categories"])
    assert [item.draws for item in back.items] == [item.draws for item in expected.items]
    assert (back.options.styles, back.options.rules.dropout) == ((("keyword", 1.0),), 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tempered", "--alpha", "1"], "leave --alpha out"),
        (["--alpha", "9"], "alpha must lie between"),
        (["--styles", "keyword 1"], "name a TARGET"),
        (["--depth", "-1"], "depth must be 0"),
    ],
    ids=["both", "range", "no target", "depth"],
)
def test_a_command_that_makes_no_sense_says_so(manifest, capsys, arguments, message):
    assert main(["curate", "plan", str(manifest), *arguments]) == 1
    assert message in capsys.readouterr().err
