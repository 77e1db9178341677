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
