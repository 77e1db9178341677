"""The report by category: every number can be counted again from its verdicts; files come back."""

import csv
import io
import json

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.evaluation import report as engine
from ernie_pack.ernie_core.evaluation.prompt_sets import read_setting
from ernie_pack.ernie_core.evaluation.verdicts import Verdicts, join, judge_by_scorer
from painted_settings import Red, RedOfPrompt, make_set, paint
from PIL import Image


@pytest.fixture
def verdicts(tmp_path):
    prompts = make_set({"color": 12, "counting": 4, "a | b": 1})
    rng = np.random.default_rng(0)
    sides = [
        read_setting(
            paint(tmp_path / name, prompts, lambda item, k, low=low: int(rng.integers(low, 250)), seeds=2, cfg=cfg)
        )
        for name, low, cfg in (("base", 0, 1.0), ("turbo", 60, 4.0))
    ]
    return join(judge_by_scorer(sides, scorer, threshold=120, margin=10) for scorer in (Red(), RedOfPrompt()))


@pytest.fixture
def report(verdicts):
    return engine.make_report("run", verdicts)


def rows(text):
    return list(csv.DictReader(io.StringIO(text.lstrip("\ufeff"), newline="")))


def test_every_share_can_be_counted_again_from_the_table_of_verdicts(report):
    told = rows(report.verdicts_csv())
    assert len(told) == 2 * (2 * 34 + 34)
    found = rows(report.rates_csv())
    assert len(found) == 2 * 4 * (2 + 3)  # judges x (all and three categories) x (two settings and three outcomes)
    same = ("judge", "criterion", "setting", "other_setting")
    for rate in found:
        mine = [
            v
            for v in told
            if all(v[name] == rate[name] for name in same) and rate["category"] in ("(all)", v["category"])
        ]
        assert len(mine) == int(rate["verdicts"])
        assert sum(v["outcome"] == rate["outcome"] for v in mine) == int(rate["count"])
        assert float(rate["share"]) == pytest.approx(int(rate["count"]) / int(rate["verdicts"]))
        assert float(rate["low"]) <= float(rate["share"]) <= float(rate["high"])
        assert int(rate["prompts"]) == len({v["prompt"] for v in mine})
        assert rate["few"] == str(int(rate["prompts"]) < 10)


def test_the_json_names_the_verdicts_behind_each_number(report):
    told = json.loads(report.to_json())
    for rate in told["rates"]:
        mine = [report.verdicts[i] for i in rate["ids"]]
        assert len(mine) == rate["verdicts"]
        assert sum(v.outcome == rate["outcome"] for v in mine) == rate["count"]
        assert {v.setting for v in mine} == {rate["setting"]}
    assert len(told["differences"]) == 8
    assert {m["setting"] for m in told["mean_scores"]} == {"base", "turbo"}
    assert all(0 < s["sign_test_p"] <= 1 for s in told["sign_tests"])


def test_the_text_has_a_table_per_judge_and_question_and_says_few(report):
    text = report.to_markdown()
    for title in (
        "## fidelity, pass or fail, by red",
        "## alignment, pass or fail, by red of prompt",
        "## fidelity, base against turbo, by red",
    ):
        assert title in text
    section = text.split("## fidelity, pass or fail, by red\n\n")[1].split("\n\n")[0].splitlines()
    assert section[0] == "| category | n | base | turbo | turbo minus base | mean score base | mean score turbo |"
    assert section[2].startswith("| (all) | 17 | ")
    assert section[3].startswith("| color | 12 | ")
    assert section[4].startswith("| counting | 4, few | ")
    assert section[5].startswith("| a \\| b | 1, few | ")
    assert "95 % intervals" in text
    assert "base better | no difference | turbo better | sign test p" in text


def test_files_are_written_and_verdicts_come_back(report, tmp_path):
    paths = engine.write_report(report, tmp_path / "out")
    assert {p.name for p in paths} == {"report.md", "rates.csv", "verdicts.csv", "report.json", "report.png"}
    assert [p for p in (tmp_path / "out").iterdir() if p not in paths] == []
    with Image.open(tmp_path / "out" / "report.png") as image:
        assert image.size == report.picture().shape[1::-1]
    back = engine.read_verdicts(tmp_path / "out" / "verdicts.csv")
    assert back.verdicts == report.verdicts
    assert engine.make_report("run", back).rates_csv() == report.rates_csv()


def test_files_of_other_judges_can_be_read(tmp_path):
    header = "judge,criterion,outcome,number,prompt,category,seed,setting,file,note"
    text = f"{header}\nvlm,alignment,pass,3,a fox,animals,7,base,f.png,x\n"
    (tmp_path / "v.csv").write_text(text)
    (verdict,) = engine.read_verdicts(tmp_path / "v.csv").verdicts
    assert (verdict.judge, verdict.number, verdict.outcome, verdict.value) == ("vlm", 3, "pass", None)
    for bad, message in (
        (text.replace("pass", "maybe"), "one picture is pass, fail"),
        (text.replace(",number", ",no"), "is no verdict"),
        (text.replace(",3,", ",three,"), "is no verdict"),
    ):
        (tmp_path / "v.csv").write_text(bad)
        with pytest.raises(ErnieError, match=message):
            engine.read_verdicts(tmp_path / "v.csv")


def test_nothing_to_report_says_why():
    with pytest.raises(ErnieError, match=r"no verdicts to report on \(ann has 4 questions left\): answer questions"):
        engine.make_report("x", Verdicts(notes=("ann has 4 questions left",)))


def test_the_picture_shows_each_table(report):
    picture = report.picture()
    assert picture.dtype == np.uint8
    assert picture.shape[1] >= 900
    assert picture.std() > 20


# --- the command line ---------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    from ernie_pack.ernie_core import cli

    code = cli.main(["evaluate", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_the_command_line_reads_sets_and_writes_reports(verdicts, tmp_path, capsys):
    from ernie_pack.ernie_core.evaluation.prompt_sets import EXAMPLE

    code, out = command(capsys, "prompts", EXAMPLE)
    assert code == 0
    assert "48 prompts in 16 categories" in out
    folders = tmp_path / "base", tmp_path / "turbo"
    code, out = command(
        capsys, "report", *folders, "--scorer", "built-in contrast", "--threshold", "1", "--out", tmp_path / "out"
    )
    assert code == 0
    assert "## fidelity, base against turbo, by built-in contrast" in out
    first = tmp_path / "out" / "verdicts.csv"
    code, out = command(capsys, "report", "--verdicts", first, "--verdicts", first, "--out", tmp_path / "both")
    assert code == 0
    assert len(rows((tmp_path / "both" / "verdicts.csv").read_text("utf-8-sig"))) == 2 * len(
        rows(first.read_text("utf-8-sig"))
    )


def test_the_command_line_reads_what_people_said(verdicts, tmp_path, capsys):
    from ernie_pack.ernie_core.evaluation import verdict_store

    sides = tuple(read_setting(tmp_path / name) for name in ("base", "turbo"))
    with verdict_store.open_store(tmp_path / "verdicts.sqlite") as store:
        id_ = verdict_store.begin(
            store, verdict_store.Setup(name="n", annotator="ann", mode="side by side", settings=sides)
        )
        for _ in range(6):
            verdict_store.answer(store, id_, verdict_store.upcoming(store, id_, count=1)[0].id, "left")
    told = ("report", "--store", tmp_path / "verdicts.sqlite", "--name")
    code, out = command(capsys, *told, "n", "--out", tmp_path / "out")
    assert code == 0
    assert "## alignment, base against turbo, by ann" in out
    assert "ann has 62 questions of n left to answer" in out
    assert command(capsys, *told, "other", "--out", tmp_path / "out")[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("prompts", "none.csv"),
        ("report", "--out", "x"),
        ("report", "somewhere", "--out", "x"),
        ("report", "--scorer", "built-in contrast", "--out", "x"),
        ("report", "--name", "n", "--out", "x"),
        ("distance", "a", "b", "--model", "nowhere"),
    ],
    ids=["file", "nothing", "folder", "scorer", "name", "model"],
)
def test_the_command_line_refuses_with_code_one(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert command(capsys, *arguments)[0] == 1
    assert not (tmp_path / "x").exists()


def test_the_command_line_measures_folders(verdicts, tmp_path, capsys):
    from tiny_vision import write_vision_model

    write_vision_model(tmp_path / "vit", "vit")
    out = tmp_path / "d" / "distance.json"
    code, text = command(
        capsys, "distance", tmp_path / "base", tmp_path / "turbo", "--model", tmp_path / "vit", "--out", out
    )
    assert code == 0
    assert "FID " in text
    told = json.loads(out.read_text("utf-8"))
    assert told["num_first"] == told["num_second"] == 34
    assert {"fid", "cmmd", "cmmd_published", "warnings", "problems"} <= told.keys()
