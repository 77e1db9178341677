"""The tournament in a running ComfyUI: answered by real keys and clicks, reloaded, killed, attacked."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import sqlite3
import tempfile
import threading
from pathlib import Path

import comfyui_page
import comfyui_server
import pytest
from small_data import write_pairs, write_pictures
from small_runs import ROOT
from tournament_page import OPEN, PANEL, click_node_button, open_by_command, wait_for_question

pytestmark = pytest.mark.host

COUNT, ROUNDS = 6, 3
JUDGMENTS = COUNT // 2 * ROUNDS


class Place:
    """A ComfyUI that can be killed and started again with the same files on the same port."""

    def __init__(self, folder: Path):
        self.folder, self.base, self.port = (
            folder,
            Path(tempfile.mkdtemp(prefix="ernie-t.")),
            comfyui_server.free_port(),
        )
        write_pictures(self.base / "input" / "cats", count=COUNT, captions=False)
        self.running = contextlib.ExitStack()

    def start(self):
        run = comfyui_server.running_comfyui(self.folder, self.base, port=self.port)
        self.server = self.running.enter_context(run)
        return self.server

    def kill(self):
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()

    def answers(self) -> list[tuple]:
        """(question, answer) of everything on the disk that counts."""
        with sqlite3.connect(self.base / "user" / "__ernie_image" / "judgments.sqlite") as store:
            return store.execute("SELECT question, answer FROM actions WHERE undone IS NULL ORDER BY id").fetchall()


@pytest.fixture(scope="module")
def place(comfyui_folder):
    place = Place(comfyui_folder)
    if place.start().version < (0, 12):
        place.running.close()
        pytest.skip("this ComfyUI is too old for the pack, which says so")
    yield place
    place.running.close()
    shutil.rmtree(place.base, ignore_errors=True)


@pytest.fixture(scope="module")
def browser(place):
    missing = comfyui_page.why_no_browser()
    if missing:
        pytest.skip(missing)
    with comfyui_page.open_page(
        place.server.url, lambda name, value: place.server.post(f"/settings/{name}", value)
    ) as page:
        yield page


@pytest.fixture(scope="module")
def workflow(tmp_path_factory) -> Path:
    """workflows/tournament.json with this test's pictures."""
    graph = json.loads((ROOT / "workflows" / "tournament.json").read_text("utf-8"))
    node = next(n for n in graph["nodes"] if n["type"] == "ErnieTournament")
    values = node["widgets_values"]
    values[0], values[1], values[2], values[3], values[4] = "cats", "ann", "cats", "a cat", ROUNDS
    path = tmp_path_factory.mktemp("workflow") / "tournament.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


@pytest.fixture
def shot(browser, pictures_folder):
    return lambda name: browser.page.screenshot(path=str(pictures_folder / f"tournament_{name}.png"))


def real_errors(browser) -> list[str]:
    return [text for text in browser.errors if not comfyui_page.NOISE.search(text)]


# The tests of this file are one evening with the tournament: each goes on where the one before it stopped.


def test_the_node_has_a_button_and_the_first_run_brings_the_pictures(browser, workflow, shot, place):
    seen = browser.open_workflow(workflow)
    assert seen.problems == []
    assert next(n for n in seen.page["nodes"] if n["type"] == "ErnieTournament")["widgets_values"][:3] == [
        *("cats", "ann", "cats"),
    ]
    click_node_button(browser.page, "ErnieTournament", "open_tournament")
    run = browser.page.locator(f"{PANEL} [data-action=run]")
    run.wait_for()
    assert "has not begun" in browser.page.locator(PANEL).inner_text()
    run.click()
    wait_for_question(browser.page)
    shot("question")
    assert place.answers() == []
    text = browser.page.locator(PANEL).inner_text()
    assert "Which one looks better?" in text
    assert f"0 of {JUDGMENTS}" in text
    assert "a cat" in text


def test_keys_and_clicks_answer_undo_skip_and_zoom(browser, shot, place):
    page = browser.page
    first = wait_for_question(page)
    page.keyboard.press("ArrowLeft")
    second = wait_for_question(page, not_=first)
    page.keyboard.press("u")
    assert wait_for_question(page, not_=second) == first
    assert place.answers() == []
    page.locator(f"{PANEL} .side.right").click()
    assert wait_for_question(page, not_=first) == second
    assert place.answers() == [(int(first), "right")]
    page.keyboard.press("s")
    third = wait_for_question(page, not_=second)
    page.keyboard.press("Backspace")  # takes the skip back
    assert wait_for_question(page, not_=third) == second
    box = page.locator(f"{PANEL} .side.left").bounding_box()
    page.keyboard.press("z")
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    origins = page.evaluate(f"() => [...document.querySelectorAll('{PANEL} .side img')].map((i) => i.style.cssText)")
    assert len(set(origins)) == 1, "both pictures show the same place"
    assert "scale(3)" in origins[0]
    shot("zoom")
    page.keyboard.press("Escape")  # leaves the zoom, not the panel
    page.keyboard.press("ArrowDown")
    assert wait_for_question(page, not_=second) == third
    assert place.answers() == [(int(first), "right"), (int(second), "tie")]
    page.keyboard.press("2")
    wait_for_question(page, not_=third)
    assert place.answers()[-1] == (int(third), "right")
    assert real_errors(browser) == []


def test_keys_do_not_reach_comfyui_while_the_panel_is_open(browser):
    page = browser.page
    before = page.evaluate("() => (window.comfyAPI?.app?.app ?? window.app).graph._nodes.length")
    for key in ("Delete", "q", "w", "r", "m", "Control+a", "Delete"):
        page.keyboard.press(key)
    assert page.locator(PANEL).count() == 1
    assert page.evaluate("() => (window.comfyAPI?.app?.app ?? window.app).graph._nodes.length") == before


def test_a_reload_in_the_middle_goes_on(browser, place, shot):
    page = browser.page
    waiting = wait_for_question(page)
    kept = place.answers()
    page.reload()
    page.wait_for_function(comfyui_page.IS_READY, timeout=120_000)
    page.wait_for_timeout(1500)
    page.evaluate(OPEN)
    page.locator(f"{PANEL} .list").wait_for()
    shot("sessions")
    assert f"{JUDGMENTS - len(kept)} judgments left, {len(kept)} done" in page.locator(f"{PANEL} .list").inner_text()
    page.locator(f"{PANEL} .list button").first.click()
    assert wait_for_question(page) == waiting
    assert place.answers() == kept


def test_the_server_is_killed_and_comes_back_and_nothing_is_lost(browser, place):
    page = browser.page
    waiting = wait_for_question(page)
    page.keyboard.press("ArrowLeft")
    then = wait_for_question(page, not_=waiting)
    kept = place.answers()
    assert kept[-1] == (int(waiting), "left")
    place.kill()
    page.keyboard.press("ArrowRight")
    page.get_by_text("The server does not answer").wait_for(timeout=20_000)
    assert place.answers() == kept, "nothing answered is lost, and nothing is made up"
    place.start()
    page.wait_for_function(
        "() => document.querySelector('#ernie-tournament .news').classList.contains('calm')", timeout=60_000
    )
    assert wait_for_question(page) == then
    page.keyboard.press("ArrowRight")
    wait_for_question(page, not_=then)
    assert place.answers() == [*kept, (int(then), "right")]
    browser.errors.clear()  # the page says that its server was gone


def ask(place, method, path, body=None, **headers) -> tuple[int, bytes]:
    """(status, body) with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, names)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


JSON = {"Content_Type": "application/json"}


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_pages_elsewhere_and_bad_requests_are_refused(place, prefix):
    before = place.answers()
    root = f"{prefix}/ernie/tournaments"
    waiting = json.loads(ask(place, "GET", f"{root}/1")[1])["questions"][0]["id"]
    good = {"question": waiting, "answer": "left"}
    host = f"127.0.0.1:{place.port}"
    refused = [
        (403, "POST", "/1/answer", good, JSON | {"Origin": "http://evil.example"}),
        (403, "POST", "/1/answer", good, JSON | {"Origin": f"http://127.0.0.1:{place.port + 1}"}),
        (403, "POST", "/1/answer", good, JSON | {"Origin": "null"}),
        (403, "POST", "/1/answer", good, JSON | {"Referer": "http://evil.example/"}),
        (403, "POST", "/1/answer", good, JSON | {"Sec_Fetch_Site": "same-site"}),
        (403, "POST", "/1/undo", {}, JSON | {"Origin": "http://evil.example"}),
        (403, "GET", "/1/pictures/0", None, {"Sec_Fetch_Site": "cross-site"}),
        (403, "GET", "/1", None, {"Referer": "http://evil.example/"}),
        (415, "POST", "/1/answer", good, {"Content_Type": "text/plain"}),
        (415, "POST", "/1/answer", good, {"Content_Type": "application/x-www-form-urlencoded"}),
        (415, "POST", "/1/undo", {}, {}),
        (413, "POST", "/1/answer", b" " * 70_000 + json.dumps(good).encode(), JSON),
        (400, "POST", "/1/answer", b"{", JSON),
        (400, "POST", "/1/answer", b"[]", JSON),
        (400, "POST", "/1/answer", b"[" * 60_000, JSON),
        (400, "POST", "/1/answer", {"question": waiting, "answer": "best"}, JSON),
        (400, "POST", "/1/answer", {"question": [waiting], "answer": "left"}, JSON),
        (400, "POST", "/1/answer", {"question": True, "answer": "left"}, JSON),
        (409, "POST", "/1/answer", {"question": waiting + 1, "answer": "left"}, JSON),
        (404, "POST", "/99/answer", good, JSON),
        (400, "POST", "/1e0/undo", {}, JSON),
        (400, "POST", "/-1/undo", {}, JSON),
        (400, "GET", "/one", None, {}),
        (400, "GET", f"/{'9' * 40}", None, {}),
        (404, "GET", f"/1/pictures/{COUNT}", None, {}),
        (400, "GET", "/1/pictures/0?side=9999999", None, {}),
        (400, "GET", "/1/pictures/%2e%2e%2f%2e%2e%2fcats%2f00.png", None, {}),
        (400, "GET", "/1/ranking", None, {}),
    ]
    for status, method, path, body, headers in refused:
        got, answer = ask(place, method, root + path, body, **headers)
        assert got == status, (method, path, headers, got, answer[:200])
    for path in ("/1/pictures/../../../cats/00.png", "/../../input/cats/00.png", "//etc/passwd"):
        got, answer = ask(place, "GET", root + path)
        assert got in (400, 403, 404), path
        assert b"PNG" not in answer
    assert place.answers() == before
    assert json.loads(ask(place, "GET", f"{root}/1", Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[1])


def test_a_page_elsewhere_in_a_real_browser_changes_nothing(browser, place):
    """A page of another origin tries everything that needs no permission."""

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>elsewhere</title>")

        def log_message(self, *_):
            pass

    before = place.answers()
    waiting = json.loads(ask(place, "GET", "/ernie/tournaments/1")[1])["questions"][0]["id"]
    elsewhere = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    context = browser.page.context.browser.new_context()
    page = context.new_page()
    try:
        page.goto(f"http://127.0.0.1:{elsewhere.server_port}/")
        seen = page.evaluate(
            """async ([url, question]) => {
              const body = JSON.stringify({ question, answer: 'left' })
              const headers = { 'Content-Type': 'application/json' }
              const root = url + '/ernie/tournaments/1'
              const tries = [
                () => fetch(root + '/answer', { method: 'POST', mode: 'no-cors', body }),
                () => fetch(root + '/answer', { method: 'POST', body, headers }),
                () => fetch(root + '/undo', { method: 'POST', mode: 'no-cors' }),
                () => fetch(root),
                () => new Promise((done, failed) => {
                  const image = new Image(); image.onload = () => done({ status: 'shown' }); image.onerror = failed
                  image.src = root + '/pictures/0'
                })
              ]
              const out = []
              for (const t of tries) out.push(await t().then((r) => r.status, () => 'failed'))
              return out
            }""",
            [place.server.url, waiting],
        )
    finally:
        context.close()
        elsewhere.shutdown()
    assert seen == [0, "failed", 0, "failed", "failed"], "0 is an answer that the page may not read"
    assert place.answers() == before


def test_the_tournament_is_answered_to_the_end_and_the_workflow_goes_on(browser, place, workflow, shot):
    page = browser.page
    question = None
    while page.locator(f"{PANEL}[data-complete=true]").count() == 0:
        question = wait_for_question(page, not_=question)
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "(was) => { const p = document.querySelector('#ernie-tournament');"
            " return p.dataset.complete === 'true' || (p.dataset.ready === 'true' && p.dataset.question !== was) }",
            arg=question,
            timeout=30_000,
        )
    assert len([a for a in place.answers() if a[1] != "skip"]) == JUDGMENTS
    page.locator(f"{PANEL} .best img").last.wait_for()
    page.wait_for_timeout(500)
    shot("complete")
    page.keyboard.press("Escape")
    assert page.locator(PANEL).count() == 0
    assert real_errors(browser) == []

    prompt = browser.open_workflow(workflow).prompt
    finished = place.server.run(prompt)
    node = next(n for n, d in prompt.items() if d["class_type"] == "ErnieTournament")
    assert finished.outputs[node]["ernie_tournament"][0]["complete"] is True
    assert len([f for f in finished.files() if f["type"] == "temp"]) == 4, "the best four are shown"
    table = json.loads((place.base / "output" / "ernie_tournaments" / "cats" / "ranking.json").read_text())
    assert len(table) == COUNT
    # After an undo the same prompt is not taken from the cache.
    assert ask(place, "POST", "/ernie/tournaments/1/undo", {}, **JSON)[0] == 200
    again = place.server.run(prompt)
    assert again.outputs[node]["ernie_tournament"][0]["left"] == 1
    assert not [f for f in again.files() if f["type"] == "temp"], "what is behind it waits"


def open_second(browser, place, name, **inputs) -> None:
    """Run a second tournament by the API and open it."""
    graph = {
        "1": {"class_type": "ErnieTournament", "inputs": SECOND | {"name": name} | inputs},
        "2": {"class_type": "ErniePairsFolder", "inputs": KNOWN},
    }
    place.server.run(graph)
    open_by_command(browser.page, name)


SECOND = {
    **{"name": "", "annotator": "ann", "folder": "cats", "prompts": "a cat", "rounds": 1, "meet": "all pictures"},
    **{"until_complete": "wait", "result": "this annotator", "top_k": 1, "pairs_from": "every pair", "min_gap": 0.0},
    **{"max_per_prompt": 0, "save_pairs": False, "question": "Which one is calmer?", "repeat_share": 0.0},
    **{"pass_share": 1.0, "order_seed": 0},
}
KNOWN = {
    **{"path": "known/pairs.jsonl", "min_margin": 0.0, "max_per_prompt": 0, "caption_dropout": 0.0},
    **{"missing_caption": "error", "default_caption": ""},
}


def test_a_calibration_is_failed_tried_again_and_passed(browser, place, shot):
    write_pairs(place.base / "input" / "known", count=2)
    page = browser.page
    open_second(browser, place, "calibrated", calibration=["2", 0])
    question = None
    for _ in range(2):
        question = wait_for_question(page, not_=question)
        assert "Calibration" in page.locator(PANEL).inner_text()
        page.keyboard.press("ArrowDown")
    page.locator(f"{PANEL} [data-action=tryAgain]").wait_for()
    shot("refused")
    assert "0 of 2 answers were right" in page.locator(PANEL).inner_text()
    page.locator(f"{PANEL} [data-action=tryAgain]").click()
    for _ in range(2):  # the better one is the bright one: its side is in the order of the store's questions
        question = wait_for_question(page, not_=question)
        with sqlite3.connect(place.base / "user" / "__ernie_image" / "judgments.sqlite") as store:
            ((expected,),) = store.execute("SELECT expected FROM questions WHERE id=?", (int(question),)).fetchall()
        page.locator(f"{PANEL} .side.{expected}").click()
    wait_for_question(page, not_=question)
    text = page.locator(PANEL).inner_text()
    assert "Round 1 of 1" in text
    assert "Which one is calmer?" in text
    page.keyboard.press("Escape")


def test_a_picture_that_is_gone_says_so_and_is_skipped(browser, place):
    page = browser.page
    write_pictures(place.base / "input" / "two", count=2, captions=False)
    open_second(browser, place, "gone", folder="two")
    wait_for_question(page)
    page.keyboard.press("Escape")
    (place.base / "input" / "two" / "00.png").write_bytes(b"no picture")
    page.reload()
    page.wait_for_function(comfyui_page.IS_READY, timeout=120_000)
    page.wait_for_timeout(1500)
    open_by_command(page, "gone")
    page.get_by_text("This picture cannot be shown").wait_for()
    before = len(place.answers())
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(500)
    assert len(place.answers()) == before, "what was not seen is not judged"
    page.keyboard.press("s")
    page.wait_for_timeout(700)
    page.keyboard.press("s")
    page.locator(f"{PANEL}[data-complete=true]").wait_for()
    assert [given for _, given in place.answers()[-2:]] == ["skip", "skip"]
    page.keyboard.press("Escape")
    browser.errors.clear()


def test_a_workflow_that_fails_is_not_hidden_behind_the_panel(browser, place, workflow, tmp_path):
    page = browser.page
    graph = json.loads(workflow.read_text("utf-8"))
    next(n for n in graph["nodes"] if n["type"] == "ErnieTournament")["widgets_values"][0:3] = [
        "lost",
        "ann",
        "nowhere",
    ]
    (tmp_path / "lost.json").write_text(json.dumps(graph))
    browser.open_workflow(tmp_path / "lost.json")
    click_node_button(page, "ErnieTournament", "open_tournament")
    page.locator(f"{PANEL} [data-action=run]").click()
    page.wait_for_function(f"() => !document.querySelector('{PANEL}')", timeout=20_000)
    assert "folder must be a folder of pictures" in place.server.log_text()
    page.reload()
    page.wait_for_function(comfyui_page.IS_READY, timeout=120_000)
    browser.errors.clear()


def test_it_speaks_chinese(browser, place, shot):
    place.server.post("/settings/Comfy.Locale", "zh")
    page = browser.page
    try:
        page.reload()
        page.wait_for_function(comfyui_page.IS_READY, timeout=120_000)
        page.wait_for_timeout(1500)
        open_by_command(page)
        wait_for_question(page)
        text = page.locator(PANEL).inner_text()
        assert "\u54ea\u4e00\u5f20\u66f4\u597d\u770b" in text  # which one looks better
        shot("chinese")
        page.keyboard.press("Escape")
    finally:
        place.server.post("/settings/Comfy.Locale", "en")


def test_the_vue_renderer_has_the_button_too(browser, place, workflow, shot):
    if place.server.version < (0, 33):
        pytest.skip("the Vue renderer of this ComfyUI is an early experiment")
    page = browser.page
    place.server.post("/settings/Comfy.VueNodes.Enabled", True)
    try:
        page.reload()
        page.wait_for_function(comfyui_page.IS_READY, timeout=120_000)
        page.wait_for_timeout(1500)
        browser.errors.clear()
        browser.open_workflow(workflow)
        shot("vue")
        page.get_by_role("button", name=re.compile("Open tournament")).first.click()
        wait_for_question(page)
        page.keyboard.press("Escape")
        assert real_errors(browser) == []
    finally:
        place.server.post("/settings/Comfy.VueNodes.Enabled", False)
