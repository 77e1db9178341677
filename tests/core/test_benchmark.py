"""The benchmark: rated sets in every shape, scores that are kept, and a report that says what was measured."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from ernie_pack.ernie_core.batch import Row, read_rows
from ernie_pack.ernie_core.cli import main
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.benchmark import (
    PUBLISHED,
    Rating,
    Ratings,
    ScoreCache,
    benchmark_geneval,
    benchmark_longtext,
    list_prompts,
    read_ratings,
    report_geneval,
    report_longtext,
    run_benchmark,
    write_benchmark,
)
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.ernie_core.scoring.geneval import TASKS, ObjectResult, summarise
from ernie_pack.ernie_core.scoring.longtext import TextPrompt, score_longtext
from ernie_pack.ernie_core.scoring.metrics import krcc, plcc, srcc
from PIL import Image
from rated_images import draw_rated, write_rows

ROW = Row(label="", prompt="", negative="", seed=0, width=64, height=64, steps=2, cfg=1.0, shift=4.0)


class StubScorer:
    """A scorer with a formula, which remembers what it was shown."""

    low, high, higher_is_better, reads_prompt = None, None, True, False

    def __init__(self, name="stub", formula=None, *, reads_prompt=False, higher_is_better=True, key=""):
        self.name, self.key, self.reads_prompt, self.higher_is_better = name, key, reads_prompt, higher_is_better
        self.formula = formula or (lambda image, prompt: float(image.astype(float).mean()))
        self.calls, self.shown = [], 0

    def score(self, images, prompts=None, *, batch_size=8, on_scored=None):
        images = list(images)
        prompts = [""] * len(images) if prompts is None else list(prompts)
        self.calls.append(len(images))
        self.shown += len(images)
        return [self.formula(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    return folder, draw_rated(folder)


@pytest.fixture
def rated(drawn, tmp_path):
    """(folder of its own with the images, rows)"""
    folder, rows = drawn
    shutil.copytree(folder / "images", tmp_path / "set/images")
    return tmp_path / "set", [dict(row) for row in rows]


def values_of(ratings):
    return [(r.image.name, r.human, r.category) for r in ratings.ratings]


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gt.json", "gt.jsonl", "gt.csv", "metadata.csv", "metadata.jsonl"])
def test_a_table_is_read_by_its_path_and_in_its_folder(rated, name):
    folder, rows = rated
    if name.startswith("metadata"):  # Hugging Face's imagefolder
        rows = [{"file_name": r["image"], "score": r["gt_score"], "category": r["category"]} for r in rows]
    table = write_rows(folder / name, rows)
    found = read_ratings(table)
    assert [(n, s) for n, s, _ in values_of(found)] == [
        (f"{i:03d}.png", r.get("gt_score", r.get("score"))) for i, r in enumerate(rows)
    ]
    assert [c for *_, c in values_of(found)] == [r["category"] for r in rows]
    assert read_ratings(folder).ratings == found.ratings
    assert not found.problems


def test_the_json_of_artimuse_is_read_with_its_images_elsewhere(rated, tmp_path):
    folder, rows = rated
    table = write_rows(tmp_path / "labels/test.json", [{"image": f"{i:03d}.png", "gt_score": i + 1} for i in range(5)])
    assert len(read_ratings(table, image_folder=folder / "images")) == 5
    with pytest.raises(ErnieError, match=r"there is no image .*000\.png"):
        read_ratings(table)
    with pytest.raises(ErnieError, match="there is no image folder"):
        read_ratings(table, image_folder=tmp_path / "nowhere")
    assert rows


def test_a_json_object_of_scores_is_read(rated):
    folder, _ = rated
    (folder / "gt.json").write_text(json.dumps({"000.png": {"score": 3}, "001.png": {"score": 4}}))
    assert [r.human for r in read_ratings(folder / "gt.json").ratings] == [3, 4]


def test_folders_named_by_their_score_are_tiers(rated, tmp_path):
    folder, _ = rated
    for tier, names in {"1": ["000.png"], "9.5": ["001.png", "002.png"], "notes": ["003.png"]}.items():
        (tmp_path / "tiers" / tier).mkdir(parents=True)
        for name in names:
            shutil.copy(folder / "images" / name, tmp_path / "tiers" / tier)
    found = read_ratings(tmp_path / "tiers")
    assert [r.human for r in found.ratings] == [1, 9.5, 9.5]
    assert "notes: left out: the folder's name is no score" in map(str, found.problems)


def test_the_column_with_the_score_can_be_named(rated):
    folder, rows = rated
    table = write_rows(folder / "gt.csv", [row | {"Votes mean": i} for i, row in enumerate(rows)])
    assert [r.human for r in read_ratings(table, score_column="votes mean").ratings] == list(range(len(rows)))
    with pytest.raises(ErnieError, match="expected the column beauty"):
        read_ratings(table, score_column="beauty")


def test_rows_that_cannot_be_used_are_listed_and_the_others_are(rated):
    folder, rows = rated
    shutil.copy(folder / "images/000.png", folder / "images/copy.png")
    bad = [
        {"image": "images/lost.png", "gt_score": 3},
        {"image": "images/000.png", "gt_score": 99},
        {"image": "images/copy.png", "gt_score": 4},
        {"image": "images/001.png", "gt_score": "good"},
        {"image": "images/002.png", "gt_score": float("nan")},
        {"gt_score": 1},
        {"image": "images/003.png"},
        3,
    ]
    found = read_ratings(write_rows(folder / "gt.json", rows + bad))
    reasons = [str(p) for p in found.problems]
    for text in (
        "there is no image",
        "000.png is rated again",
        "the first counts",
        "it has no human score: expected the column gt_score",
        "it names no image: expected one of image, file_name",
        "its score must be a number, got 'good'",
        "its score must be a finite number, got nan",
        "must be an object, got 3",
        "copy.png is the same image as 000.png",
    ):
        assert any(text in reason for reason in reasons), (text, reasons)
    assert len(found) == len(rows) + 1  # the copy counts
    assert found.ratings[0].human == rows[0]["gt_score"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda f: f / "none.csv", r"none\.csv is no such file"),
        (lambda f: f / "none", "none is no such file"),
        (lambda f: f / "images", "neither a table of human scores"),
        (lambda f: f / "images/000.png", r"000\.png is a \.png"),
        (lambda f: write_rows(f / "a.json", [{"x": 1}]), "holds no rated image: a.json row 1: left out: it names no"),
        (lambda f: (write_rows(f / "a.json", [{"x": 1}]), write_rows(f / "b.json", [{"x": 1}]))[0].parent, "several"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_rated_set_is_an_error(rated, make, text):
    with pytest.raises(ErnieError, match=text):
        read_ratings(make(rated[0]))


# --- measuring -------------------------------------------------------------------------------------------------


@pytest.fixture
def ratings(rated):
    folder, rows = rated
    return read_ratings(write_rows(folder / "gt.json", rows))


def test_the_numbers_are_those_of_the_scores_and_ratings(ratings):
    found = run_benchmark([BuiltinScorer(measure="sharpness")], ratings, samples=50)
    (result,) = found.results
    human = [r.human for r in ratings.ratings]
    assert result.overall.srcc.value == srcc(result.scores.values, human)
    assert result.overall.plcc.value == plcc(result.scores.values, human)
    assert result.overall.krcc.value == krcc(result.scores.values, human)
    assert result.overall.n == len(human) == 24
    assert result.overall.srcc.value > 0.6  # it sees the blur that the ratings follow


def test_a_scorer_over_rates_the_category_that_people_like_less(ratings):
    (result,) = run_benchmark([BuiltinScorer(measure="sharpness")], ratings, samples=200).results
    assert result.biases[0].category == "film photography"
    assert result.biases[0].verdict == "over-rated"
    assert {c.category: c.n for c in result.categories} == dict.fromkeys(
        ("photography", "illustration/anime", "film photography"), 8
    )


def test_where_lower_is_better_the_agreement_is_turned(ratings):
    up = StubScorer("up")
    down = StubScorer("down", lambda image, prompt: -up.formula(image, prompt), higher_is_better=False)
    found = run_benchmark([up, down], ratings, samples=50)
    assert found.results[0].overall == found.results[1].overall
    assert found.results[0].biases == found.results[1].biases
    assert found.differences[0][2].value == 0


def test_several_scorers_are_compared_pair_by_pair(ratings):
    scorers = [BuiltinScorer(measure=m) for m in ("sharpness", "contrast", "exposure")]
    found = run_benchmark(scorers, ratings, samples=100)
    assert [(a, b) for a, b, _ in found.differences] == [
        ("built-in sharpness", "built-in contrast"),
        ("built-in sharpness", "built-in exposure"),
        ("built-in contrast", "built-in exposure"),
    ]
    by_name = {r.name: r.overall.srcc.value for r in found.results}
    for a, b, difference in found.differences:
        assert difference.value == pytest.approx(by_name[a] - by_name[b])


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100])
def test_the_batch_size_changes_no_number_and_is_never_passed(ratings, batch_size):
    scorer = StubScorer()
    (result,) = run_benchmark([scorer], ratings, batch_size=batch_size, samples=20).results
    assert max(scorer.calls) <= batch_size
    assert result == run_benchmark([StubScorer()], ratings, samples=20).results[0]


def test_a_scorer_that_reads_prompts_gets_each_images_own(ratings):
    scorer = StubScorer("prompted", lambda image, prompt: float(prompt.split()[1]), reads_prompt=True)
    (result,) = run_benchmark([scorer], ratings, samples=20, batch_size=7).results
    assert result.scores.values == tuple(map(float, range(24)))


def test_a_scorer_that_reads_prompts_needs_them(rated):
    folder, rows = rated
    for row in rows[:3]:
        del row["prompt"]
    ratings = read_ratings(write_rows(folder / "gt.json", rows))
    with pytest.raises(ErnieError, match="3 of 24 ratings have none; give the table a column prompt"):
        run_benchmark([StubScorer(reads_prompt=True)], ratings)


def test_an_image_that_cannot_be_decoded_is_listed_once_and_counts_for_no_scorer(ratings):
    ratings.ratings[2].image.write_bytes(b"not a picture")
    found = run_benchmark([StubScorer("a"), StubScorer("b")], ratings, samples=20)
    assert [len(r.scores) for r in found.results] == [23, 23]
    assert [str(p) for p in found.problems if "002.png" in str(p)] == [str(found.problems[0])]


def test_an_image_that_one_scorer_refuses_counts_for_none(ratings):
    def refuse(image, prompt):
        if image.mean() > threshold:
            raise ErnieError("too bright for me")
        return float(image.mean())

    means = sorted(np.asarray(Image.open(r.image)).mean() for r in ratings.ratings)
    threshold = (means[-2] + means[-1]) / 2
    found = run_benchmark([StubScorer("a"), StubScorer("picky", refuse)], ratings, samples=20)
    assert [len(r.scores) for r in found.results] == [23, 23]
    assert "picky: too bright for me" in str(found.problems[0])


def test_a_scorer_that_refuses_everything_is_an_error(ratings):
    def fail(image, prompt):
        raise ErnieError("its weights are broken")

    with pytest.raises(ErnieError, match="its weights are broken"):
        run_benchmark([StubScorer("a", fail)], ratings)


def test_scorers_that_cannot_be_told_apart_or_none_are_errors(ratings):
    with pytest.raises(ErnieError, match="'stub' is connected twice"):
        run_benchmark([StubScorer(), StubScorer()], ratings)
    with pytest.raises(ErnieError, match="at least one scorer"):
        run_benchmark([], ratings)


def test_one_image_is_no_benchmark(ratings):
    one = Ratings(name="one", ratings=ratings.ratings[:1])
    with pytest.raises(ErnieError, match="two images at least, and 1 of 1"):
        run_benchmark([StubScorer()], one)


def test_a_constant_scorer_is_reported_with_the_reason_and_without_numbers(ratings):
    found = run_benchmark([StubScorer("same", lambda i, p: 5.0), StubScorer()], ratings, samples=20)
    assert found.results[0].overall.srcc is None
    assert "same: all scores are 5" in found.to_markdown()
    assert found.differences == ()
    assert json.loads(found.to_json())["measured"][0]["overall"]["srcc"] is None
    assert found.pictures()["table"].ndim == 3


# --- keeping scores --------------------------------------------------------------------------------------------


def test_what_was_scored_is_not_scored_again(ratings, tmp_path):
    first, second = StubScorer(key="w1"), StubScorer(key="w1")
    a = run_benchmark([first], ratings, samples=20, cache_folder=tmp_path / "kept")
    b = run_benchmark([second], ratings, samples=20, cache_folder=tmp_path / "kept")
    assert (first.shown, second.shown) == (24, 0)
    assert a.results == b.results


def test_an_interrupted_run_goes_on_where_it_was(ratings, tmp_path):
    def stop(done, total, name):
        if done >= 10:
            raise KeyboardInterrupt

    scorer = StubScorer(key="w")
    with pytest.raises(KeyboardInterrupt):
        run_benchmark([scorer], ratings, batch_size=5, cache_folder=tmp_path, on_progress=stop)
    assert scorer.shown == 10
    run_benchmark([scorer], ratings, batch_size=5, samples=20, cache_folder=tmp_path)
    assert scorer.shown == 24


def test_a_torn_last_line_costs_one_image_only(ratings, tmp_path):
    scorer = StubScorer(key="w")
    run_benchmark([scorer], ratings, samples=20, cache_folder=tmp_path)
    (file,) = tmp_path.glob("stub-*.jsonl")
    file.write_bytes(file.read_bytes()[:-9])
    again = StubScorer(key="w")
    run_benchmark([again], ratings, samples=20, cache_folder=tmp_path)
    assert again.shown == 1
    third = StubScorer(key="w")
    run_benchmark([third], ratings, samples=20, cache_folder=tmp_path)
    assert third.shown == 0


def test_other_weights_of_the_same_name_are_scored_anew(ratings, tmp_path):
    run_benchmark([StubScorer(key="w1")], ratings, samples=20, cache_folder=tmp_path)
    other = StubScorer(key="w2")
    run_benchmark([other], ratings, samples=20, cache_folder=tmp_path)
    assert other.shown == 24


def test_without_a_key_a_batch_is_tried_and_other_numbers_are_noticed(ratings, tmp_path):
    run_benchmark([StubScorer()], ratings, samples=20, cache_folder=tmp_path)
    same = StubScorer()
    run_benchmark([same], ratings, samples=20, batch_size=4, cache_folder=tmp_path)
    assert same.shown == 4
    other = StubScorer(formula=lambda image, prompt: float(image.astype(float).std()))
    found = run_benchmark([other], ratings, samples=20, batch_size=4, cache_folder=tmp_path)
    assert other.shown == 28
    assert "24 kept scores are of other weights" in str(found.problems[0])
    assert found.results == run_benchmark([other], ratings, samples=20).results


def test_kept_scores_belong_to_the_prompt_where_it_is_read(ratings, tmp_path):
    def scorer():
        return StubScorer("p", lambda image, prompt: float(len(prompt)), reads_prompt=True, key="w")

    run_benchmark([scorer()], ratings, samples=20, cache_folder=tmp_path)
    changed = Ratings(
        name="x",
        ratings=tuple(
            Rating(**{**vars(r), "prompt": r.prompt + "!"}) if i < 4 else r for i, r in enumerate(ratings.ratings)
        ),
    )
    again = scorer()
    run_benchmark([again], changed, samples=20, cache_folder=tmp_path)
    assert again.shown == 4


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ErnieError, match="cannot be written"):
        ScoreCache(tmp_path / "file", StubScorer()).add({"a": 1.0})


# --- the report ------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(ratings):
    return run_benchmark([BuiltinScorer(measure=m) for m in ("sharpness", "combined")], ratings, samples=50)


def test_what_was_published_is_labelled_and_apart_from_what_was_measured(benchmark):
    text = benchmark.to_markdown()
    measured, published = text.split("## Published on ERIA-1K (ERNIE-Image report, Table 2); not measured here")
    for name, (rho, r) in PUBLISHED.items():
        assert f"| {name} | {rho:.4f} | {r:.4f} |" in published
        assert name not in measured
    assert "## Measured here on gt: 24 images" in measured
    assert "| built-in sharpness |" in measured
    assert "over-rated" in published  # the bias tables come after


def test_the_published_numbers_are_those_of_the_report():
    assert PUBLISHED == {
        "LAION-AES": (0.2944, 0.3138),
        "ArtiMuse": (0.4277, 0.4704),
        "UniPercept": (0.4533, 0.4748),
        "ERNIE-Image-Aes": (0.7445, 0.7598),
    }


def test_the_files_hold_the_same_numbers(benchmark, tmp_path):
    paths = write_benchmark(benchmark, tmp_path / "out")
    assert all(p.is_file() and p.stat().st_size for p in paths)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/scores.csv").read_text("utf-8-sig"))))
    human = [float(r["human"]) for r in rows]
    content = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    for result in content["measured"]:
        values = [float(r[result["scorer"]]) for r in rows]
        assert result["overall"]["srcc"]["value"] == pytest.approx(srcc(values, human))
    assert Image.open(tmp_path / "out/scatter_1.png").size == (900, 560)


def test_every_picture_is_drawn(benchmark):
    pictures = benchmark.pictures()
    assert set(pictures) == {"table"} | {
        f"{k}_{i}" for k in ("scatter", "categories", "bias", "extremes") for i in (1, 2)
    }
    assert all(p.dtype == np.uint8 and p.ndim == 3 for p in pictures.values())


def test_a_set_without_categories_has_no_tables_of_them(ratings):
    plain = Ratings(name="x", ratings=tuple(Rating(**{**vars(r), "category": ""}) for r in ratings.ratings))
    found = run_benchmark([StubScorer()], plain, samples=20)
    assert found.results[0].categories == found.results[0].biases == ()
    assert set(found.pictures()) == {"table", "scatter_1", "extremes_1"}


# --- prompt following ------------------------------------------------------------------------------------------


def judged(right):
    return summarise(
        [ObjectResult(image=f"{t}/{i}", task=t, prompt=f"{t}{i}", correct=i < right) for t in TASKS for i in range(4)],
        samples=20,
    )


def test_the_columns_with_and_without_enhancer_stand_beside_each_other():
    found = report_geneval({"without enhancer": judged(3), "with enhancer": judged(2)}, "ERNIE-Image")
    first = next(line for line in found.text.splitlines() if line.startswith("| overall"))
    cells = [c.strip() for c in first.strip("|").split("|")]
    assert cells[1].startswith("0.7500")
    assert cells[2].startswith("0.5000")
    assert cells[3:] == ["0.8856", "0.8728"]
    assert set(found.numbers) == {"without enhancer", "with enhancer"}


def test_longtext_stands_beside_its_own_language_and_model():
    prompts = [TextPrompt(id=i, prompt="p", text=("\u4e00\u4e8c",), length="short") for i in range(3)]
    half = score_longtext(prompts, [(str(i), i, "\u4e00") for i in range(3)], "zh", samples=20)
    found = report_longtext({"with enhancer": half}, "ERNIE-Image-Turbo")
    assert "| score | 0.5000 [0.500, 0.500] | 0.9675 | 0.9636 |" in found.text
    assert "LongText-Bench Chinese: ERNIE-Image-Turbo" in found.text
    assert found.picture.dtype == np.uint8


GENEVAL_PROMPTS = [
    {"tag": task, "prompt": f"a photo of {task}", "include": [{"class": "cup", "count": 1}]} for task in TASKS
]


def geneval_files(folder, right):
    """(prompts file, detections: a cup in the first `right` pictures)"""
    found = [{"class": "cup", "score": 0.99, "box": [0, 0, 9, 9]}]
    rows = [{"image": f"{i:05d}/samples/0000.png", "detections": found if i < right else []} for i in range(6)]
    prompts = write_rows(folder / "evaluation_metadata.jsonl", GENEVAL_PROMPTS)
    return prompts, write_rows(folder / f"detections_{right}.jsonl", rows)


def test_geneval_from_files_of_detections_and_of_judged_pictures(tmp_path):
    prompts, detections = geneval_files(tmp_path, right=3)
    rows = [{"filename": t, "tag": t, "prompt": t, "correct": t == "colors"} for t in TASKS]
    results = write_rows(tmp_path / "results.jsonl", rows)
    files = {"without enhancer": detections, "with enhancer": results}
    found = benchmark_geneval(prompts, files, model="ERNIE-Image", samples=20)
    assert found.numbers["without enhancer"]["overall"]["value"] == pytest.approx(0.5)
    assert found.numbers["with enhancer"]["overall"]["value"] == pytest.approx(1 / 6)
    assert [w["reason"] for w in found.numbers["without enhancer"]["wrong"]] == ["expected 1 cup, found 0"] * 3


def test_longtext_from_files(tmp_path):
    prompts = write_rows(tmp_path / "text_prompts.jsonl", [{"prompt": "p", "text": ["one two"], "prompt_id": 0}])
    plain = write_rows(tmp_path / "plain.jsonl", [{"image": "0.png", "ocr_results": "one"}])
    enhanced = write_rows(tmp_path / "enhanced.jsonl", [{"image": "0.png", "ocr_results": "TWO one"}, {"x": 1}])
    files = {"without enhancer": plain, "with enhancer": enhanced}
    found = benchmark_longtext(prompts, files, language="en", model="ERNIE-Image")
    assert "| score | 0.5000 | 1.0000 | 0.9679 | 0.9804 |" in found.text
    assert "## with enhancer: 1 problems" in found.text
    with pytest.raises(ErnieError, match="language must be one of en, zh, got 'fr'"):
        benchmark_longtext(prompts, files, language="fr", model="ERNIE-Image")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "SDXL"}, "model must be one of ERNIE-Image, ERNIE-Image-Turbo, got 'SDXL'"),
        ({"columns": {"enhanced": 1}}, "columns must be of without enhancer, with enhancer"),
        ({"columns": {}}, "got none"),
        ({"columns": {"without enhancer": 1, "with enhancer": 1}}, "the same results"),
        ({"columns": {"without enhancer": 1, "with enhancer": "copy"}}, "the same results"),
        ({"columns": {"without enhancer": "lost"}}, "there is no file"),
    ],
    ids=str,
)
def test_columns_that_cannot_be_are_errors(tmp_path, change, text):
    prompts, first = geneval_files(tmp_path, right=1)
    files = {1: first, "copy": shutil.copy(first, tmp_path / "copy.jsonl"), "lost": tmp_path / "lost.jsonl"}
    columns = {c: files[f] for c, f in change.get("columns", {"without enhancer": 1}).items()}
    with pytest.raises(ErnieError, match=text):
        benchmark_geneval(prompts, columns, model=change.get("model", "ERNIE-Image"))


# --- the command line ------------------------------------------------------------------------------------------


def test_the_command_line_compares_scorers_and_goes_on_from_kept_scores(rated, tmp_path, capsys):
    folder, rows = rated
    write_rows(folder / "gt.json", rows)
    arguments = ["benchmark", "aesthetic", str(folder), "--out", str(tmp_path / "out"), "--samples", "30"]
    arguments += ["--scorer", "built-in sharpness", "--scorer", "built-in contrast", "--batch", "10"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "built-in contrast: 10 of 24" in first
    assert "| built-in sharpness |" in first
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert [m["scorer"] for m in report["measured"]] == ["built-in sharpness", "built-in contrast"]
    assert main(arguments) == 0
    assert "built-in contrast: 10 of 24" not in capsys.readouterr().out


def test_the_command_line_reports_both_columns(tmp_path, capsys):
    prompts, first = geneval_files(tmp_path, right=2)
    _, second = geneval_files(tmp_path, right=5)
    arguments = ["benchmark", "geneval", str(prompts), "--without-enhancer", str(first), "--with-enhancer", str(second)]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--model", "ERNIE-Image-Turbo", "--samples", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "out/report.md").read_text("utf-8").strip()
    numbers = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert [round(c["overall"]["value"], 4) for c in numbers.values()] == [0.3333, 0.8333]
    assert "| 0.8667 | 0.8510 |" in printed
    assert Image.open(tmp_path / "out/table.png").width > 400


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["aesthetic", "none.json", "--scorer", "built-in sharpness"], "none.json is no such file"),
        (["aesthetic", ".", "--scorer", "built-in beauty"], "one of built-in combined"),
        (["longtext", "none.jsonl"], "got none"),
        (["longtext", "none.jsonl", "--with-enhancer", "lost.jsonl"], "there is no file"),
    ],
    ids=str,
)
def test_the_command_line_refuses_with_a_reason(tmp_path, arguments, text, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "set.json", draw_rated(tmp_path, 2, size=16))
    assert main(["benchmark", *arguments, "--out", "out"]) == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_become_a_list_that_the_batch_reads(tmp_path, capsys):
    prompts, _ = geneval_files(tmp_path, right=1)
    texts = write_rows(tmp_path / "t.jsonl", [{"prompt": 'say "a, b"\nthen c', "text": ["a"], "prompt_id": 0}])
    assert main(["benchmark", "prompts", str(prompts), "--out", str(tmp_path / "g.csv"), "--copies", "2"]) == 0
    assert "12 rows" in capsys.readouterr().out
    rows, problems = read_rows(str(tmp_path / "g.csv"), ROW)
    assert not problems
    assert [(r.prompt, r.seed) for r in rows[:3]] == [
        *(("a photo of single_object", 0), ("a photo of single_object", 1), ("a photo of two_object", 0)),
    ]
    (tmp_path / "t.csv").write_text(list_prompts(texts, copies=1, seed=5), encoding="utf-8", newline="")
    ((row,), problems) = read_rows(str(tmp_path / "t.csv"), ROW)
    assert (row.prompt, row.seed) == ('say "a, b"\nthen c', 5)
    with pytest.raises(ErnieError, match="copies must be 1 or more, got 0"):
        list_prompts(prompts, copies=0)
    with pytest.raises(ErnieError, match="is no prompt of LongText-Bench"):
        list_prompts(write_rows(tmp_path / "x.jsonl", [{"caption": "x"}]))
