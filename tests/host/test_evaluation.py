"""Evaluation by category in a running ComfyUI: painted, judged by real keys and clicks, reported, measured."""

from __future__ import annotations

import csv
import functools
import json
import re
import sqlite3

import comfyui_page
import pytest
import tournament_page
from comfyui_server import HostError
from ernie_pack.ernie_core.evaluation.features import load_feature_model, measure_folders
from ernie_pack.ernie_core.evaluation.prompt_sets import EXAMPLE, choose, read_prompt_set, read_setting
from ernie_pack.ernie_core.evaluation.report import make_report, read_verdicts
from host_graph import Graph, defaults
from small_runs import EVALUATED, ROOT, shrink
from tiny_vision import write_vision_model

pytestmark = pytest.mark.host

PANEL = "#ernie-evaluation"
OPEN = "() => (window.comfyAPI?.app?.app ?? window.app).extensionManager.command.execute('Ernie.Evaluation.Open')"
PAIRS = len(EVALUATED)  # one prompt of each
QUESTIONS = 2 * PAIRS


@pytest.fixture
def small(api_workflows):
    """evaluate_prompts in API format, small, under a name of its own."""

    def make(name, **people):
        prompt, page = api_workflows["evaluate_prompts"]
        made = shrink(prompt, side_px=64, steps=2)
        for node in made.values():
            if node["class_type"] == "ErniePromptSet":
                node["inputs"]["name"] = node["inputs"]["name"].replace("ERNIE/evaluate_prompts", f"ERNIE/{name}")
            if node["class_type"] in ("ErnieJudgeByPeople", "ErnieEvaluationReport"):
                node["inputs"]["name"] = name
            if node["class_type"] == "ErnieJudgeByPeople":
                node["inputs"] |= people
        return made, page

    return make


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    """workflows/evaluate_prompts.json, small, as a file for the page."""
    graph = json.loads((ROOT / "workflows" / "evaluate_prompts.json").read_text("utf-8"))
    for node in graph["nodes"]:
        values = node.get("widgets_values")
        names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        if node["type"] == "ErniePromptSet":
            names.insert(names.index("seed") + 1, "control")
            told = {"width": 128, "height": 128, "preset": "custom", "steps": 4, "categories": ", ".join(EVALUATED)}
            told["name"] = values[names.index("name")].replace("evaluate_prompts", "evaluate_page")
            for name, value in told.items():
                values[names.index(name)] = value
        if node["type"] in ("ErnieJudgeByPeople", "ErnieEvaluationReport"):
            values[names.index("name")] = "evaluate_page"
    path = tmp_path_factory.mktemp("workflow") / "evaluate_page.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


def answers(server) -> list[tuple]:
    """(criterion, answer) of everything on the disk that counts, oldest first."""
    with sqlite3.connect(server.base / "user" / "__ernie_image" / "verdicts.sqlite") as store:
        return store.execute(
            "SELECT q.criterion, a.answer FROM actions a JOIN questions q ON q.id=a.question "
            "WHERE a.undone IS NULL ORDER BY a.id"
        ).fetchall()


def rows(path) -> list[dict]:
    return list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))


def test_the_workflow_paints_judges_and_reports_and_does_nothing_twice(server, small):
    prompt, page = small("evaluated")
    server.run(prompt, page=page)
    root = server.base / "output"
    chosen = choose(read_prompt_set(EXAMPLE), categories=EVALUATED, per_category=1)
    for name in ("base", "turbo"):
        setting = read_setting(root / "ERNIE" / "evaluated" / name)
        assert [(p.number, p.prompt, p.seed) for p in setting.pictures] == [
            (i.number, i.prompt, 1000 * (i.number - 1)) for i in chosen.items
        ]
    folder = root / "ernie_evaluations" / "evaluated"
    told = read_verdicts(folder / "verdicts.csv")
    assert len(told) == 3 * PAIRS
    assert make_report("evaluated", told).rates_csv().encode() == (folder / "rates.csv").read_bytes()[3:]  # its BOM
    assert "me has 4 questions of evaluated left to answer" in (folder / "report.md").read_text("utf-8")
    kept = {p: p.stat().st_mtime_ns for p in (root / "ERNIE" / "evaluated").rglob("*.png")}
    server.run(prompt, page=page)
    assert {p: p.stat().st_mtime_ns for p in (root / "ERNIE" / "evaluated").rglob("*.png")} == kept


def test_a_missing_table_and_a_batch_folder_are_named(server, small):
    prompt, page = small("refused")
    for node in prompt.values():
        if node["class_type"] == "ErniePromptSet":
            node["inputs"]["prompts"] = "nowhere.csv"
    with pytest.raises(HostError, match="there is no such file"):
        server.run(prompt, page=page)
    prompt, page = small("refused")
    for node in prompt.values():
        if node["class_type"] in ("ErnieJudgeByPeople", "ErnieJudgeByScorer"):
            node["inputs"] |= {"first": "ernie_scores", "second": ""}
    with pytest.raises(HostError, match="no folder of a prompt set"):
        server.run(prompt, page=page)


def test_an_interrupted_set_goes_on(server, small):
    prompt, page = small("stopped")
    prompt = {n: node for n, node in prompt.items() if not node["class_type"].startswith(("ErnieJudge", "ErnieEval"))}
    prompt = {n: node for n, node in prompt.items() if not node["class_type"].startswith("Preview")}
    for node in prompt.values():
        if node["class_type"] == "ErniePromptSet":
            node["inputs"] |= {"steps": 60, "preset": "custom", "seeds_per_prompt": 3}
    folder = server.base / "output" / "ERNIE" / "stopped"
    running = server.queue(prompt, page=page)
    server.wait_until(lambda: list(folder.rglob("*.png")), "the first picture is there")
    server.interrupt()
    status = server.wait(running).status
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    server.run(prompt, page=page)
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    assert status == "interrupted"
    assert len(kept) < len(after) == 2 * 3 * PAIRS
    assert kept.items() <= after.items(), "a finished picture was made again"


def test_distances_are_those_of_the_engine(server, nodes, small):
    folder = server.base / "models" / "clip_vision" / "vit"
    write_vision_model(folder, "vit")
    prompt, page = small("measured")
    server.run(prompt, page=page)
    sides = [server.base / "output" / "ERNIE" / "measured" / name for name in ("base", "turbo")]
    expected = measure_folders(*sides, load_feature_model(folder))
    graph = Graph()
    told = {"model_name": "clip_vision/vit/", "first": "ERNIE/measured/base", "second": "ERNIE/measured/turbo"}
    link = graph.add("ErnieFolderDistance", **defaults(server.get_json("/object_info"), "ErnieFolderDistance", **told))
    graph.add("PreviewAny", source=[link[0], 2])
    finished = server.run(graph.prompt)
    text = json.dumps(finished.outputs)
    fid = float(re.search(r"FID ([\d.e+-]+)", text)[1])
    assert fid == pytest.approx(expected.distances.fid, rel=1e-3)
    assert "is too high: it is biased upwards with few pictures" in text


# --- the panel ----------------------------------------------------------------------------------------------------
# One evening with the evaluation: each test goes on where the one before it stopped.


@pytest.fixture
def shot(browser, pictures_folder):
    return lambda name: browser.page.screenshot(path=str(pictures_folder / f"evaluation_{name}.png"))


wait_for_question = functools.partial(tournament_page.wait_for_question, panel=PANEL)


def heading(page) -> str:
    return page.locator(f"{PANEL} .ask > div").first.inner_text()


def test_the_button_opens_the_panel_and_the_first_run_brings_the_pictures(browser, workflow, shot):
    seen = browser.open_workflow(workflow)
    assert seen.problems == []
    tournament_page.click_node_button(browser.page, "ErnieJudgeByPeople", "open_evaluation")
    run = browser.page.locator(f"{PANEL} [data-action=run]")
    run.wait_for()
    assert "has not begun" in browser.page.locator(PANEL).inner_text()
    run.click()
    wait_for_question(browser.page)
    shot("question")
    text = browser.page.locator(PANEL).inner_text()
    assert heading(browser.page) == "Alignment: which one shows better what the prompt says?"
    assert f"0 of {QUESTIONS}" in text
    assert "No difference" in text
    assert "base" not in text
    assert "turbo" not in text


def test_keys_answer_undo_skip_and_zoom(browser, server, shot):
    page = browser.page
    start = len(answers(server))
    first = wait_for_question(page)
    page.keyboard.press("ArrowDown")
    second = wait_for_question(page, not_=first)
    assert heading(page).startswith("Fidelity: which one")
    shot("fidelity")
    page.keyboard.press("u")
    assert wait_for_question(page, not_=second) == first
    assert answers(server)[start:] == []
    page.locator(f"{PANEL} .side.right").click()
    assert wait_for_question(page, not_=first) == second
    page.keyboard.press("s")
    third = wait_for_question(page, not_=second)
    page.keyboard.press("Backspace")
    assert wait_for_question(page, not_=third) == second
    page.keyboard.press("z")
    styles = page.evaluate(f"() => [...document.querySelectorAll('{PANEL} .side img')].map((i) => i.style.cssText)")
    assert all("scale(3)" in style for style in styles)
    page.keyboard.press("Escape")  # leaves the zoom, not the panel
    page.keyboard.press("Space")
    assert wait_for_question(page, not_=second) == third
    assert answers(server)[start:] == [("alignment", "right"), ("fidelity", "tie")]


def test_a_reload_in_the_middle_goes_on_and_the_end_is_said(browser, server, shot, workflow):
    page = browser.page
    waiting = wait_for_question(page)
    page.reload()
    page.wait_for_function(comfyui_page.IS_READY, timeout=120_000)
    page.wait_for_timeout(1500)
    page.evaluate(OPEN)
    page.locator(f"{PANEL} .list").wait_for()
    assert "2 verdicts left, 2 done" in page.locator(f"{PANEL} .list").inner_text()
    shot("sessions")
    page.locator(f"{PANEL} .list button", has_text="evaluate_page").first.click()
    assert wait_for_question(page) == waiting
    page.keyboard.press("1")
    last = wait_for_question(page, not_=waiting)
    page.keyboard.press("2")
    page.locator(f"{PANEL}[data-complete=true]").wait_for()
    shot("complete")
    assert int(last) > int(waiting)
    assert "All verdicts are in" in page.locator(PANEL).inner_text()
    assert [a for _, a in answers(server)][-2:] == ["left", "right"]
    page.keyboard.press("u")
    assert wait_for_question(page) == last
    page.keyboard.press("2")
    page.locator(f"{PANEL}[data-complete=true]").wait_for()
    page.keyboard.press("Escape")
    assert page.locator(PANEL).count() == 0


def test_the_verdicts_are_in_the_report_of_the_next_run(browser, server, workflow, shot):
    seen = browser.open_workflow(workflow)
    server.run(seen.prompt, page=seen.page)
    folder = server.base / "output" / "ernie_evaluations" / "evaluate_page"
    text = (folder / "report.md").read_text("utf-8")
    assert "## alignment, base against turbo, by me" in text
    assert "left to answer" not in text
    mine = [row for row in rows(folder / "verdicts.csv") if row["judge"] == "me"]
    assert len(mine) == QUESTIONS
    assert {row["outcome"] for row in mine} <= {"first", "second", "same"}
    browser.page.wait_for_timeout(500)
    shot("report")


def test_pass_or_fail_asks_one_picture_at_a_time(browser, server, small, shot):
    prompt, page_format = small("passing", mode="pass or fail", annotator="ann")
    server.run(prompt, page=page_format)
    page = browser.page
    page.evaluate(OPEN)
    page.locator(f"{PANEL} .list button", has_text=re.compile("^passing")).first.click()
    question = wait_for_question(page)
    assert heading(page) == "Alignment: does the picture show what the prompt says?"
    assert page.locator(f"{PANEL} .side").count() == 1
    shot("pass")
    start = len(answers(server))
    for key in ("ArrowRight", "ArrowLeft", "1", "2", "p", "f", "ArrowRight"):
        page.keyboard.press(key)
        question = wait_for_question(page, not_=question)
    page.keyboard.press("ArrowLeft")
    page.locator(f"{PANEL}[data-complete=true]").wait_for()
    given = answers(server)[start:]
    assert [a for _, a in given] == ["pass", "fail", "pass", "fail", "pass", "fail", "pass", "fail"]
    assert [c for c, _ in given] == ["alignment", "fidelity"] * 4
    page.keyboard.press("Escape")
    server.run(prompt, page=page_format)
    folder = server.base / "output" / "ernie_evaluations" / "passing"
    found = {(r["criterion"], r["category"]): r for r in rows(folder / "rates.csv") if r["judge"] == "ann"}
    assert float(found["alignment", "(all)"]["share"]) == 1.0
    assert float(found["fidelity", "(all)"]["share"]) == 0.0
    errors = [text for text in browser.errors if not comfyui_page.NOISE.search(text)]
    assert errors == []
