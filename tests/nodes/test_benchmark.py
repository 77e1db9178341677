"""The benchmark nodes on drawn pictures and written results: every widget matters, bad input is named."""

import json
import shutil
from types import SimpleNamespace

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring import geneval, longtext
from ernie_pack.ernie_core.scoring.benchmark import _SCORE_KEYS
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.nodes import benchmark as benchmark_nodes
from ernie_pack.nodes import dataset as dataset_nodes
from ernie_pack.standalone import host
from rated_images import draw_rated, write_rows

AESTHETIC = {"ratings": "set", "image_folder": "", "score_column": "", "name": "b", "batch_size": 8, "samples": 100}
PROMPT = {
    "benchmark": "LongText-Bench English",
    "prompts": "text_prompts.jsonl",
    "without_enhancer": "plain.jsonl",
    "with_enhancer": "enhanced.jsonl",
    "model": "ERNIE-Image",
    "name": "p",
    "samples": 100,
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    rows = draw_rated(folder, 18, size=48)
    for row in rows:
        row["votes"] = len(rows) - row["gt_score"]
    write_rows(folder / "gt.json", rows)
    return folder


@pytest.fixture
def session(drawn, tmp_path, monkeypatch):
    """An input folder with a rated set and results of LongText-Bench and GenEval."""
    shutil.copytree(drawn, tmp_path / "input/set")
    rows = json.loads((drawn / "gt.json").read_text())
    write_rows(tmp_path / "input/few.json", [row | {"image": row["image"].split("/")[1]} for row in rows[:9]])
    prompts = [{"prompt": f"p{i}", "text": [f"w{i} x{i} \u4e00"], "prompt_id": i, "length": "short"} for i in range(8)]
    for name in ("text_prompts.jsonl", "other_prompts.jsonl"):
        write_rows(tmp_path / "input" / name, prompts if name.startswith("text") else prompts[:5])
    for name, words in {"plain": "w{0}", "enhanced": "w{0} x{0}", "other": "w{0} x{0} \u4e00"}.items():
        rows = [{"image": f"{i}.png", "ocr": words.format(i) if i % 3 else "W"} for i in range(8)]
        write_rows(tmp_path / f"input/{name}.jsonl", rows)
    metadata = [{"tag": t, "prompt": t, "include": [{"class": "cup", "count": 1}]} for t in geneval.TASKS]
    write_rows(tmp_path / "input/evaluation_metadata.jsonl", metadata)
    cup = [{"class": "cup", "score": 0.99, "box": [0, 0, 9, 9]}]
    detections = [{"image": f"{i:05d}/samples/0000.png", "detections": cup if i < 3 else []} for i in range(6)]
    write_rows(tmp_path / "input/detections.jsonl", detections)
    new = host.Session(models=tmp_path / "models", output=tmp_path / "out", input=tmp_path / "input")
    monkeypatch.setattr(host, "session", new)
    monkeypatch.setattr(benchmark_nodes, "host", host)
    monkeypatch.setattr(dataset_nodes, "host", host)
    return new


@pytest.fixture
def run(session):
    """run(node class, **inputs) -> its outputs, as the host calls it."""

    def call(cls, **inputs):
        return cls.PREPARE_CLASS_CLONE({"hidden_inputs": {"UNIQUE_ID": "7"}}).EXECUTE_NORMALIZED(**inputs)

    return call


@pytest.fixture
def aesthetic(run):
    def call(*measures, **changes):
        names = ("scorer", "scorer_2", "scorer_3", "scorer_4")
        scorers = [BuiltinScorer(measure=m) for m in measures or ("sharpness",)]
        return run(
            benchmark_nodes.ErnieAestheticBenchmark, **dict(zip(names, scorers, strict=False)), **AESTHETIC | changes
        )

    return call


@pytest.fixture
def prompt(run):
    return lambda **changes: run(benchmark_nodes.ErniePromptBenchmark, **PROMPT | changes)


def test_scorers_are_compared_and_the_report_is_written(aesthetic, session):
    report, charts, disagreements = aesthetic("sharpness", "contrast", "exposure").result
    for name in ("sharpness", "contrast", "exposure"):
        assert f"| built-in {name} |" in report
    assert "Published on ERIA-1K" in report
    assert charts.shape[0] == disagreements.shape[0] == 1
    assert charts.shape[3] == 3
    assert 0 <= charts.min() < charts.max() <= 1
    assert charts.shape[1] > 3 * 560  # three scatter plots at least
    folder = session.output / "ernie_benchmarks/b"
    assert {"report.md", "report.json", "scores.csv", "table.png"} <= {p.name for p in folder.iterdir()}
    assert report.startswith((folder / "report.md").read_text("utf-8"))
    assert session.shown["7"].startswith("# Aesthetic benchmark")


def test_pictures_and_text_are_shown_under_the_node(aesthetic, prompt):
    assert len(aesthetic().ui["images"]) == 2
    shown = prompt().ui
    assert len(shown["images"]) == 1
    assert shown["text"][0].startswith("# LongText-Bench English")


@pytest.mark.parametrize(
    "change",
    [
        {"ratings": "few.json", "image_folder": "set/images"},
        {"score_column": "votes"},
        {"samples": 200},
        {"name": "other"},
    ],
    ids=str,
)
def test_every_widget_of_the_aesthetic_benchmark_matters(aesthetic, change):
    assert aesthetic(**change).result[0] != aesthetic().result[0]


def test_the_image_folder_matters(aesthetic):
    with pytest.raises(ErnieError, match="there is no image"):
        aesthetic(ratings="few.json")


def test_the_batch_size_reaches_the_scorer_and_changes_no_number(run, session):
    sizes = []

    class Watched:
        name, low, high, higher_is_better, reads_prompt, key = "watched", 0.0, 100.0, True, False, ""
        inner = BuiltinScorer(measure="contrast")

        def score(self, images, prompts=None, *, batch_size=8, on_scored=None):
            sizes.append(batch_size)
            return self.inner.score(images)

    def call(size, name):
        shutil.rmtree(session.output, ignore_errors=True)
        changes = {"batch_size": size, "name": name}
        return run(benchmark_nodes.ErnieAestheticBenchmark, scorer=Watched(), **AESTHETIC | changes).result[0]

    assert call(5, "b") == call(8, "b")
    assert set(sizes) == {5, 8}


@pytest.mark.parametrize(
    "change",
    [
        {"benchmark": "LongText-Bench Chinese"},
        {"prompts": "other_prompts.jsonl"},
        {"without_enhancer": "other.jsonl"},
        {"with_enhancer": "other.jsonl"},
        {"with_enhancer": ""},
        {"model": "ERNIE-Image-Turbo"},
        {"samples": 200},
        {"name": "other"},
    ],
    ids=str,
)
def test_every_widget_of_the_prompt_benchmark_matters(prompt, change):
    assert prompt(**change).result[0] != prompt().result[0]


def test_geneval_runs_from_files(prompt):
    files = {"prompts": "evaluation_metadata.jsonl", "without_enhancer": "detections.jsonl", "with_enhancer": ""}
    report, table = prompt(benchmark="GenEval", **files).result
    assert "| overall | 0.5000 [0.500, 0.500] | 0.8856 | 0.8728 |" in report
    assert table.shape[0] == 1


def test_the_choices_and_tooltips_are_those_of_the_engine():
    assert set(benchmark_nodes.MODELS) == set(geneval.PUBLISHED) == set(longtext.PUBLISHED)
    inputs = {i.id: i for i in benchmark_nodes.ErnieAestheticBenchmark.GET_SCHEMA().inputs}
    assert ", ".join(_SCORE_KEYS) in inputs["score_column"].tooltip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ratings": ""}, "ratings must be a file or folder, got ''"),
        ({"ratings": "nowhere"}, "there is no .*nowhere. Put it into"),
        ({"ratings": "set/images"}, "neither a table of human scores"),
        ({"ratings": "set/images/000.png"}, r"000\.png is a \.png"),
        ({"image_folder": "nowhere"}, "there is no image folder"),
        ({"score_column": "beauty"}, "expected the column beauty, got image, gt_score"),
        ({"name": ""}, "name must be a folder inside the output folder"),
        ({"name": "../../x"}, "name must be a folder inside the output folder"),
        ({"measures": ("contrast", "contrast")}, "'built-in contrast' is connected twice"),
    ],
    ids=str,
)
def test_bad_input_of_the_aesthetic_benchmark_is_named(aesthetic, change, text):
    change = dict(change)
    with pytest.raises(ErnieError, match=text):
        aesthetic(*change.pop("measures", ()), **change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompts": ""}, "prompts must be a file or folder, got ''"),
        ({"prompts": "evaluation_metadata.jsonl"}, "is no prompt of LongText-Bench: expected prompt, text"),
        ({"benchmark": "GenEval"}, "is no prompt of GenEval"),
        ({"without_enhancer": "", "with_enhancer": ""}, "both are empty"),
        ({"without_enhancer": "lost.jsonl"}, "there is no file .*lost.jsonl"),
        ({"without_enhancer": "enhanced.jsonl"}, "both columns hold the same results"),
        ({"without_enhancer": "text_prompts.jsonl"}, "holds no OCR text that could be used"),
        ({"name": "/tmp"}, "name must be a folder inside the output folder"),
    ],
    ids=str,
)
def test_bad_input_of_the_prompt_benchmark_is_named(prompt, change, text):
    with pytest.raises(ErnieError, match=text):
        prompt(**change)


def test_a_changed_table_is_read_again(session):
    fingerprint = benchmark_nodes.ErnieAestheticBenchmark.fingerprint_inputs
    before = fingerprint(ratings="set")
    assert before == fingerprint(ratings="set")
    rows = json.loads((session.input / "set/gt.json").read_text())
    write_rows(session.input / "set/gt.json", rows[:5])
    assert fingerprint(ratings="set") != before
    assert fingerprint(ratings="nowhere")
    fingerprint = benchmark_nodes.ErniePromptBenchmark.fingerprint_inputs
    files = {k: PROMPT[k] for k in ("prompts", "without_enhancer", "with_enhancer")}
    before = fingerprint(**files)
    write_rows(session.input / "plain.jsonl", [{"prompt_id": 1, "ocr": "longer than it was"}])
    assert fingerprint(**files) != before


def test_the_user_can_stop_it_and_what_was_scored_is_kept(aesthetic, session, monkeypatch):
    class Stopped(Exception):
        pass

    seen = SimpleNamespace(batches=0)

    def stop():
        seen.batches += 1
        if seen.batches > 21:  # 18 pictures are read, then two batches
            raise Stopped

    monkeypatch.setattr(host, "throw_if_interrupted", stop)
    with pytest.raises(Stopped):
        aesthetic(batch_size=4)
    kept = list((session.output / "ernie_benchmarks/.scores").glob("*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in kept] == [12]
