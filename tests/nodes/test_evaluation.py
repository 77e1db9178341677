"""Evaluation by category without ComfyUI: the runner, the judges, the report, distances, and the panel's routes."""

import csv
import importlib
import io
import json

import pytest
from ernie_pack.ernie_core.batch import read_manifest_entries
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.evaluation import verdict_store
from ernie_pack.ernie_core.evaluation.prompt_sets import read_setting
from ernie_pack.ernie_core.evaluation.verdicts import Verdicts
from ernie_pack.ernie_core.sampling.samplers import Sampler
from ernie_pack.ernie_core.scoring.judgments import Stale, Unknown
from painted_settings import Red, make_set, paint
from PIL import Image
from tiny_vision import write_vision_model

judging = importlib.import_module("ernie_pack.nodes.judging")

SOCKETS = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}
SET = {
    **{"prompts": "set.csv", "name": "run/base", "per_category": 0, "seeds_per_prompt": 2, "negative": "bad"},
    **{"width": 32, "height": 48, "preset": "custom", "steps": 2, "cfg": 3.0, "shift": 4.0, "seed": 10},
    **{"enhance": False, "collect": True},
}
TABLE = (
    'Prompt,Chinese text,Category,Other\n"a red\ncar",rot,color,blau\na dog,hund,color,b\ntwo cats,katzen,counting,c\n'
)
PEOPLE = {
    **{"first": "base", "second": "turbo", "name": "eval", "annotator": "ann", "mode": "side by side"},
    **{"criteria": "alignment and fidelity", "until_complete": "current standing", "result": "all annotators"},
    **{"order_seed": 0},
}
SCORER = {
    **{"first": "base", "second": "turbo", "criterion": "auto", "threshold": 100.0, "margin": 0.0},
    **{"batch_size": 3},
}


# --- the runner ---------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt_set(run, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "set.csv").write_text(TABLE, encoding="utf-8")

    def call(**changes):
        done = run("ErniePromptSet", **SOCKETS | SET | changes)
        return dict(zip(("folder", "images", "report"), done.result, strict=True)) | {"ui": done.ui}

    return call


def samples(recording) -> list:
    return [call[1:] for call in recording.calls if call[0] == "sample"]


def test_every_prompt_is_painted_with_its_seeds_and_the_folder_says_which(prompt_set, recording, tmp_path):
    done = prompt_set()
    found = [(call[1][0][0], call[6]) for call in samples(recording)]
    texts = ("a red\ncar", "a dog", "two cats")
    assert found == [(text, 10 + 1000 * k + i) for k, text in enumerate(texts) for i in (0, 1)]
    assert done["folder"] == str(tmp_path / "output" / "run" / "base")
    assert len(done["images"]) == 6
    assert "category from the column 'Category'" in done["report"]
    assert "6 made, 0 already there" in done["report"]
    setting = read_setting(tmp_path / "output" / "run" / "base")
    assert [(p.number, p.category, p.seed) for p in setting.pictures[:3]] == [
        *((1, "color", 10), (1, "color", 11), (2, "color", 1010)),
    ]
    entries = {e["file"]: e["prompt"] for e in read_manifest_entries(setting.folder)}
    assert all(entries[p.file.name] == p.prompt for p in setting.pictures)


def test_a_second_run_makes_nothing_and_one_with_more_seeds_only_those(prompt_set, recording):
    prompt_set()
    recording.calls.clear()
    assert "0 made, 6 already there" in prompt_set()["report"]
    assert samples(recording) == []
    assert "3 made, 6 already there" in prompt_set(seeds_per_prompt=3)["report"]


def test_any_picture_can_be_made_again(prompt_set):
    prompt_set()
    assert "row 3 (row 2): bit-equal to the picture of the run" in prompt_set(remake=3)["report"]


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"per_category": 1}, lambda c: len(c) == 4),
        ({"seeds_per_prompt": 1}, lambda c: len(c) == 3),
        ({"negative": "ugly"}, lambda c: c[0][2] == [["ugly", {}]]),
        ({"width": 64}, lambda c: list(c[0][3])[-1] == 4),
        ({"height": 64}, lambda c: list(c[0][3])[-2] == 4),
        ({"preset": "Turbo 8 / 1"}, lambda c: len(c[0][4]) == 9 and c[0][5] == 1.0),
        ({"steps": 5}, lambda c: len(c[0][4]) == 6),
        ({"cfg": 1.0}, lambda c: c[0][5] == 1.0 and c[0][2] is None),
        ({"shift": 2.0}, lambda c: 0.6 < float(c[0][4][1]) < 0.7),
        ({"seed": 0}, lambda c: c[2][6] == 1000),
        ({"categories": "Counting, "}, lambda c: [x[1][0][0] for x in c] == ["two cats"] * 2),
        ({"text": "translation"}, lambda c: c[2][1] == [["hund", {}]]),
        ({"prompt_column": "Other"}, lambda c: c[0][1] == [["blau", {}]]),
        ({"category_column": "Other", "categories": "c"}, lambda c: c[0][1] == [["two cats", {}]]),
        ({"sampler": "heun"}, lambda c: c[0][-1] == Sampler(name="heun")),
        ({"prompts": "example", "per_category": 1}, lambda c: len(c) == 32),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_every_widget_reaches_the_sampler(prompt_set, recording, change, seen):
    prompt_set(**change)
    assert seen(samples(recording))


def test_collect_off_hands_out_no_pictures_and_names_make_other_folders(prompt_set, tmp_path):
    assert prompt_set(collect=False)["images"] == []
    assert prompt_set(name="run/other")["folder"].endswith("other")
    assert prompt_set(made_with="lora v2")["folder"].rpartition("base_")[2].isalnum()


def test_the_enhancer_is_asked_for_only_when_on(prompt_set, recording, node_classes):
    cls = node_classes["ErniePromptSet"]
    missing = {"model": None, "clip": None, "vae": None, "enhancer": None}
    assert cls.check_lazy_status(enhance=False, **missing) == ["model", "clip", "vae"]
    assert cls.check_lazy_status(enhance=True, **missing) == ["model", "clip", "vae", "enhancer"]
    with pytest.raises(ErnieError, match="asks for the enhancer, but none is connected"):
        prompt_set(enhance=True)
    prompt_set(enhance=True, enhancer=recording.make_enhancer("pe"))
    assert samples(recording)[0][1] != [["a red\ncar", {}]]


def test_the_runner_notices_a_changed_table_and_a_deleted_picture(prompt_set, node_classes, tmp_path):
    def look():
        return node_classes["ErniePromptSet"].fingerprint_inputs(prompts="set.csv", name="run/base")

    empty = look()
    prompt_set()
    full = look()
    next((tmp_path / "output" / "run" / "base").glob("*.png")).unlink()
    less = look()
    (tmp_path / "input" / "set.csv").write_text(TABLE + "x,y,color,z\n", encoding="utf-8")
    assert len({str(seen) for seen in (empty, full, less, look())}) == 4
    assert node_classes["ErniePromptSet"].fingerprint_inputs(prompts=None, name=None) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "none.csv"}, "there is no such file"),
        ({"prompts": ""}, "must be a file that ends with"),
        ({"prompt_column": "nope"}, "has no column 'nope' for prompt"),
        ({"categories": "nope"}, "has no category 'nope'"),
        ({"name": "../out"}, "name must be a folder inside the output folder"),
        ({"seeds_per_prompt": 0}, "seeds_per_prompt must lie between 1 and 1000"),
        ({"width": 33}, "multiple of 16"),
        ({"cfg": float("nan")}, "cfg must be 0 or more"),
        ({"remake": 4}, "run.json"),
    ],
    ids=["file", "empty", "column", "category", "name", "seeds", "size", "nan", "remake"],
)
def test_the_runner_refuses_before_anything_is_painted(prompt_set, recording, change, message):
    with pytest.raises(ErnieError, match=message):
        prompt_set(**change)
    assert samples(recording) == []


# --- judges and report --------------------------------------------------------------------------------------------


@pytest.fixture
def sides(recording, tmp_path):
    """Folders base and turbo in the output folder; turbo is redder for all prompts but one."""
    prompts = make_set({"color": 3, "counting": 2})
    for name, red in (("base", lambda item, k: 90 + k), ("turbo", lambda item, k: 80 if item.number == 5 else 150)):
        paint(tmp_path / "output" / name, prompts, red, seeds=2, cfg=4.0 if name == "turbo" else 1.0)
    return tmp_path / "output" / "base", tmp_path / "output" / "turbo"


@pytest.fixture
def people(run, sides):
    def call(**changes):
        done = run("ErnieJudgeByPeople", **PEOPLE | changes)
        return dict(zip(("verdicts", "complete", "summary"), done.result, strict=True)) | {"ui": done.ui}

    return call


@pytest.fixture
def scored(run, sides):
    def call(**changes):
        return run("ErnieJudgeByScorer", **{"scorer": Red()} | SCORER | changes).result

    return call


@pytest.fixture
def call(recording):
    """call("GET /ernie/...", body) -> answer, through the route's own handler."""

    def ask(route, body=None, **query):
        method, address = route.split(" ")
        for known, handle in judging.ROUTES.items():
            kind, pattern = known.split(" ")
            parts, wanted = address.split("/"), pattern.split("/")
            fits = len(parts) == len(wanted) and all(
                w == p or w.startswith("{") for p, w in zip(parts, wanted, strict=True)
            )
            if method == kind and fits:
                names = {w[1:-1]: p for p, w in zip(parts, wanted, strict=True) if w.startswith("{")}
                return handle(names, query, body or {})
        raise AssertionError(route)

    return ask


def answer_all(call, give):
    """Answer the open evaluation to its end through the routes."""
    (state,) = [e for e in call("GET /ernie/evaluations")["evaluations"] if not e["complete"]]
    asked = call(f"GET /ernie/evaluations/{state['id']}")
    while asked["questions"]:
        question = asked["questions"][0]
        body = {"question": question["id"], "answer": give(question)}
        asked = call(f"POST /ernie/evaluations/{state['id']}/answer", body)
    return asked["evaluation"]


def test_people_answer_through_the_routes_and_the_verdicts_come_out(people, call, tmp_path):
    first = people()
    assert (first["complete"], len(first["verdicts"])) == (False, 0)
    assert first["ui"]["ernie_evaluation"][0]["left"] == 20
    assert "20 verdicts left, 0 done; press Open evaluation" in first["summary"]
    done = answer_all(call, lambda q: "tie" if q["criterion"] == "fidelity" else "left")
    assert done["complete"]
    found = people()
    assert found["complete"]
    outcomes = {(v.criterion, v.outcome) for v in found["verdicts"].verdicts}
    assert outcomes == {("fidelity", "same"), ("alignment", "first"), ("alignment", "second")}
    assert "complete, 20 verdicts on 20 pictures" in found["summary"]
    assert (tmp_path / "user" / "verdicts.sqlite").is_file()


def test_what_the_page_gets_names_no_setting_and_no_file(people, call):
    people()
    told = json.dumps([call("GET /ernie/evaluations"), call("GET /ernie/evaluations/1")])
    for secret in ("base", "turbo", ".png", "category", 'color"', "seed"):
        assert secret not in told.replace("order_seed", "")
    data = call("GET /ernie/evaluations/1/pictures/3")
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (16, 16))
        assert "ernie" not in str(image.info)


def test_answers_can_be_taken_back_and_wrong_ones_are_refused(people, call):
    people()
    question = call("GET /ernie/evaluations/1")["questions"][0]["id"]
    call("POST /ernie/evaluations/1/answer", {"question": question, "answer": "left"})
    back = call("POST /ernie/evaluations/1/undo", {})
    assert (back["undone"], back["questions"][0]["id"]) == (True, question)
    assert call("POST /ernie/evaluations/1/undo", {})["undone"] is False
    with pytest.raises(Stale):
        call("POST /ernie/evaluations/1/answer", {"question": question + 1, "answer": "left"})
    for body in (
        {"question": question, "answer": "pass"},
        {"question": question},
        {"answer": "left"},
        {"question": -1},
    ):
        with pytest.raises(ErnieError):
            call("POST /ernie/evaluations/1/answer", body)
    for path in ("evaluations/9", "evaluations/1/pictures/99"):
        with pytest.raises(Unknown):
            call(f"GET /ernie/{path}")
    with pytest.raises(ErnieError, match="side must lie between"):
        call("GET /ernie/evaluations/1/pictures/0", side="1")
    with pytest.raises(ErnieError, match="must be a whole number"):
        call("GET /ernie/evaluations/x")


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"mode": "pass or fail"}, lambda d: "40 verdicts left" in d["summary"]),
        ({"mode": "pass or fail", "second": ""}, lambda d: "20 verdicts left" in d["summary"]),
        ({"criteria": "fidelity"}, lambda d: "10 verdicts left" in d["summary"]),
        ({"name": "other"}, lambda d: d["summary"].startswith("other, ann, side by side")),
        ({"annotator": "bob"}, lambda d: d["summary"].startswith("eval, bob")),
        ({"until_complete": "wait"}, lambda d: not isinstance(d["verdicts"], Verdicts)),
        ({"first": "turbo", "second": "base"}, lambda d: "20 verdicts left" in d["summary"]),
    ],
    ids=["mode", "one", "criteria", "name", "annotator", "wait", "sides"],
)
def test_every_widget_of_the_panel_node_matters(people, change, seen):
    assert seen(people(**change))


def test_the_order_follows_from_the_seed(people, call):
    orders = []
    for k, changes in enumerate(({}, {"name": "b"}, {"name": "c", "order_seed": 1}), start=1):
        people(**changes)
        orders.append([q["prompt"] for q in call(f"GET /ernie/evaluations/{k}")["questions"]])
    assert orders[0] == orders[1] != orders[2]


def test_one_annotator_or_all(people, call):
    for who in ("ann", "bob"):
        people(annotator=who)
        answer_all(call, lambda q: "left")
    alone, both = (people(result=r)["verdicts"] for r in ("this annotator", "all annotators"))
    assert {v.judge for v in alone.verdicts} == {"ann"}
    assert {v.judge for v in both.verdicts} == {"ann", "bob"}
    assert "ann and bob, alignment: Cohen's kappa" in people()["summary"]


def test_the_panel_node_notices_answers(people, call, node_classes):
    look = node_classes["ErnieJudgeByPeople"].fingerprint_inputs
    people()
    before = look(name="eval", first="base", second="turbo")
    question = call("GET /ernie/evaluations/1")["questions"][0]["id"]
    call("POST /ernie/evaluations/1/answer", {"question": question, "answer": "left"})
    assert look(name="eval", first="base", second="turbo") != before
    assert look(name=None, first=None, second=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": ""}, "first is empty"),
        ({"second": ""}, "side by side needs the folders of 2 settings"),
        ({"second": "base"}, "the same folder is given twice"),
        ({"first": "../output/base/.."}, "no folder of a prompt set|folder must be a folder"),
        ({"first": "/etc"}, "folder must be a folder of pictures in ComfyUI's input or output folder"),
        ({"name": ""}, "name must be 1 to 200 characters"),
        ({"annotator": "a\nb"}, "annotator must be"),
    ],
    ids=["empty", "one", "same", "outside", "system", "name", "annotator"],
)
def test_the_panel_node_refuses(people, change, message):
    with pytest.raises(ErnieError, match=message):
        people(**change)


def test_pictures_outside_of_the_allowed_folders_are_not_shown(people, call, sides, tmp_path, recording, monkeypatch):
    people()
    monkeypatch.setattr(type(recording), "picture_folders", lambda self: [tmp_path / "input"])
    with pytest.raises(Unknown, match="outside of the folders"):
        call("GET /ernie/evaluations/1/pictures/0")


def test_a_scorer_judges_both_ways(scored):
    verdicts, summary = scored()
    assert summary.startswith("red: 30 verdicts on base and turbo")
    passed = [(v.setting, v.number) for v in verdicts.verdicts if v.outcome == "pass"]
    assert passed == [("turbo", n) for n in (1, 2, 3, 4) for _ in (0, 1)]
    assert [v.outcome for v in verdicts.verdicts if v.other_setting] == ["second"] * 8 + ["first"] * 2


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"second": ""}, lambda v: len(v) == 10),
        ({"first": "turbo", "second": "base"}, lambda v: v.verdicts[0].setting == "turbo"),
        ({"criterion": "fidelity"}, lambda v: v.verdicts[0].criterion == "fidelity"),
        ({"threshold": 151.0}, lambda v: not any(x.outcome == "pass" for x in v.verdicts)),
        ({"margin": 20.0}, lambda v: sum(x.outcome == "same" for x in v.verdicts) == 2),
        ({"batch_size": 1}, lambda v: len(v) == 30),
    ],
    ids=["second", "sides", "criterion", "threshold", "margin", "batch"],
)
def test_every_widget_of_the_scorer_node_matters(scored, change, seen):
    assert seen(scored(**change)[0])


def test_a_scorer_that_reads_no_prompt_cannot_judge_alignment(scored):
    with pytest.raises(ErnieError, match="cannot judge alignment"):
        scored(criterion="alignment")


def test_the_report_has_every_judge_and_its_files(run, scored, people, call, tmp_path):
    people()
    answer_all(call, lambda q: "tie")
    by_people = people()["verdicts"]
    done = run("ErnieEvaluationReport", verdicts=scored()[0], verdicts_2=by_people, name="a/report", file="")
    image, text, rates, folder = done.result
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert "# Evaluation: report" in text
    for title in ("fidelity, pass or fail, by red", "alignment, base against turbo, by ann"):
        assert f"## {title}" in text
    assert {r["judge"] for r in csv.DictReader(io.StringIO(rates))} == {"red", "ann"}
    assert folder == str(tmp_path / "output" / "ernie_evaluations" / "a" / "report")
    written = {p.name for p in (tmp_path / "output" / "ernie_evaluations" / "a" / "report").iterdir()}
    assert written == {"report.md", "rates.csv", "verdicts.csv", "report.json", "report.png"}
    again = run(
        "ErnieEvaluationReport",
        verdicts=Verdicts(),
        name="b",
        file=str(tmp_path / "output/ernie_evaluations/a/report/verdicts.csv"),
    )
    assert again.result[2] == rates


def test_the_report_refuses(run, scored, tmp_path):
    with pytest.raises(ErnieError, match="there are no verdicts to report on"):
        run("ErnieEvaluationReport", verdicts=Verdicts(), name="x", file="")
    with pytest.raises(ErnieError, match="name must be a folder inside the output folder"):
        run("ErnieEvaluationReport", verdicts=scored()[0], name="", file="")
    with pytest.raises(ErnieError, match="cannot be read"):
        run("ErnieEvaluationReport", verdicts=scored()[0], name="x", file="none.csv")


def test_a_full_disk_leaves_no_half_report(run, scored, tmp_path, monkeypatch):
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    verdicts = scored()[0]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ErnieError, match="No space left on device"):
        run("ErnieEvaluationReport", verdicts=verdicts, name="x", file="")
    assert list((tmp_path / "output" / "ernie_evaluations" / "x").iterdir()) == []


# --- distances ----------------------------------------------------------------------------------------------------


@pytest.fixture
def distance(run, sides, recording, monkeypatch, tmp_path):
    write_vision_model(tmp_path / "models" / "vit", "vit")
    monkeypatch.setattr(type(recording), "scorer_path", lambda self, name: tmp_path / "models" / name)

    def call(**changes):
        told = {"model_name": "vit", "first": "base", "second": "turbo", "batch_size": 4}
        return run("ErnieFolderDistance", **told | changes).result

    return call


def test_folders_are_compared_and_the_features_kept(distance, tmp_path, sides):
    fid, cmmd, report = distance()
    assert fid > 0
    assert cmmd > 0
    assert "base (10 pictures) against turbo (10)" in report
    assert "FID of 10 pictures is too high" in report
    assert "base: 8 pictures are the same file as another one and count again" in report
    assert (tmp_path / "output" / "ernie_evaluations" / ".features.sqlite").is_file()
    assert distance(batch_size=1)[:2] == pytest.approx((fid, cmmd), rel=1e-3)
    assert distance(first="turbo", second="base")[0] == pytest.approx(fid, rel=1e-6)


def test_distances_name_what_is_missing(distance, tmp_path):
    with pytest.raises(ErnieError, match="model_name is 'choose a model'"):
        distance(model_name="choose a model")
    with pytest.raises(ErnieError, match="there is no folder 'nowhere'"):
        distance(second="nowhere")
    with pytest.raises(ErnieError, match="both folders are"):
        distance(second="base")
    (tmp_path / "output" / "one").mkdir()
    with pytest.raises(ErnieError, match="holds no pictures"):
        distance(second="one")
    Image.new("RGB", (8, 8)).save(tmp_path / "output" / "one" / "a.png")
    with pytest.raises(ErnieError, match="two pictures at least"):
        distance(second="one")


def test_an_interrupt_stops_between_batches_and_keeps_what_was_done(distance, recording, monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    seen = []

    def stop(self):
        seen.append(1)
        if len(seen) == 2:
            raise Stop

    monkeypatch.setattr(type(recording), "throw_if_interrupted", stop)
    with pytest.raises(Stop):
        distance(batch_size=1)
    assert len(seen) == 2


def test_nodes_notice_changed_folders(node_classes, sides, recording):
    look = node_classes["ErnieFolderDistance"].fingerprint_inputs
    before = look(first="base", second="turbo")
    next(sides[0].glob("*.png")).unlink()
    assert look(first="base", second="turbo") != before
    assert look(first=None, second="nowhere") == [[], []]
    report = node_classes["ErnieEvaluationReport"].fingerprint_inputs
    assert report(file="x.csv") == ["x.csv", 0]
    assert node_classes["ErnieJudgeByScorer"].fingerprint_inputs(first="base", second=None) != " "


def test_evaluations_of_the_store_are_listed_latest_first(people, call, tmp_path):
    people()
    people(name="b")
    (one, two) = call("GET /ernie/evaluations")["evaluations"]
    assert (one["name"], two["name"]) == ("b", "eval")
    with verdict_store.open_store(tmp_path / "user" / "verdicts.sqlite") as store:
        assert verdict_store.annotators(store, "b") == {"ann": one["id"]}
