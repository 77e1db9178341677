"""The preference loop in a running ComfyUI, from prompts to the win rate, its tournaments answered by real clicks.

One graph, queued three times: it paints and waits; trains, paints again and waits; reports. The clicks follow a rule on
what the pictures show (the smaller object is better), so that there is a preference to find in every file.
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import tournament_page
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.ernie_core.scoring.metrics import wilson
from ernie_pack.tiny.measure import measure
from ernie_pack.tiny.preference import open_prompts
from PIL import Image
from small_runs import shrink

pytestmark = pytest.mark.host

PROMPTS, SEEDS, STEPS, TRAINED = 3, 3, 12, 6
SIDE_PX = 128
FIRST = PROMPTS * 3  # judgments: three pictures meet in three rounds of one pair each
ROUNDS = 2
SECOND = PROMPTS * SEEDS * ROUNDS  # six pictures, three pairs a round


def diameter(picture: Image.Image) -> float:
    return measure(np.asarray(picture.convert("RGB"))).diameter or 1.0


def wish(left: float, right: float) -> str:
    """What the rule clicks; differences below two pixels are a tie."""
    if abs(left - right) < 2 / SIDE_PX:
        return "tie"
    return "left" if left < right else "right"


class Loop:
    """The graph in miniature, and what it leaves on the disk."""

    def __init__(self, server, prompt):
        self.server, self.prompt = server, shrink(prompt, side_px=SIDE_PX, steps=STEPS)
        self.output = server.base / "output"
        self.sizes: dict[str, float] = {}
        texts = "\n".join(text for _, text in open_prompts(PROMPTS, heldout=False, seed=5))
        for node in self.prompt.values():
            inputs = node["inputs"]
            match node["class_type"]:
                case "ErnieChoosePairs":
                    inputs["source"] = "tournament"
                case "ErnieBatchFromPrompts":
                    inputs["name"] = inputs["name"].replace("ERNIE/preference_loop", "loop")
                    if isinstance(inputs["source"], str):
                        inputs |= {"source": texts, "variations": SEEDS, "seed": 40}
                case "ErnieTournament":
                    inputs |= {"min_gap": 0.0, "save_pairs": True}
                    inputs["name"] = inputs["name"].replace("preference_loop", "clicks")
                    inputs["rounds"] = ROUNDS if "after" in inputs["name"] else 0
                case "ErnieWinRate":
                    inputs |= {"name": "loop/report", "tournament": "clicks after"}
                case "ErnieRecipeDPO":
                    inputs |= {"name": "loop", "steps": TRAINED, "learning_rate": 0.002, "warmup": 0}

    def run(self):
        return self.server.run(self.prompt, timeout_s=400)

    def folder(self, side: str) -> Path:
        (found,) = self.output.glob("loop/before" if side == "before" else "loop/after_????????")
        return found

    def judge(self, id_: int):
        """A callback that clicks by the rule, on the pictures that the page is shown."""

        def better(question: int) -> str:
            state = self.server.get_json(f"/ernie/tournaments/{id_}")
            asked = state["questions"][0]
            assert asked["id"] == question
            return wish(*(self.size(id_, asked[side]) for side in ("left", "right")))

        return better

    def size(self, id_: int, number: int) -> float:
        address = f"/ernie/tournaments/{id_}/pictures/{number}"
        if address not in self.sizes:
            self.sizes[address] = diameter(Image.open(io.BytesIO(self.server.get(address))))
        return self.sizes[address]

    def judgments(self, id_: int) -> list[tuple[str, str, str, str]]:
        """(prompt, left file, right file, answer) of a tournament, from the database itself."""
        query = (
            "SELECT a.prompt, a.path, b.path, q.answer FROM questions q "
            "JOIN pictures a ON a.tournament=q.tournament AND a.number=q.left "
            "JOIN pictures b ON b.tournament=q.tournament AND b.number=q.right "
            "WHERE q.tournament=? AND q.status='done' ORDER BY q.id"
        )
        with sqlite3.connect(self.server.base / "user" / "__ernie_image" / "judgments.sqlite") as store:
            return store.execute(query, (id_,)).fetchall()

    def report(self) -> dict:
        return json.loads((self.output / "loop" / "report" / "win_rate.json").read_text("utf-8"))

    def comparisons(self) -> list[dict[str, str]]:
        text = (self.output / "loop" / "report" / "comparisons.csv").read_text("utf-8")
        return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def loop(server, api_workflows):
    return Loop(server, api_workflows["preference_loop"][0])


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]


# The tests of this file are one loop: each goes on where the one before it stopped.


def test_it_paints_and_waits_for_the_tournament(loop):
    loop.run()
    made = entries(loop.folder("before"))
    assert len(made) == PROMPTS * SEEDS
    assert len({e["prompt"] for e in made}) == PROMPTS
    for entry in made:
        with Image.open(loop.folder("before") / entry["file"]) as image:
            told = {k: image.info[f"ernie_{k}"] for k in ("prompt", "seed", "steps", "cfg", "shift")}
        assert told == {k: str(entry[k]) for k in told}, "each picture says its own seed and settings"
    assert not (loop.output / "ernie_jobs").is_dir() or not (loop.output / "ernie_jobs" / "loop").is_dir()
    assert not list(loop.output.glob("loop/after*"))
    assert not list(loop.output.glob("loop/report*"))


def test_after_the_clicks_the_same_graph_trains_and_paints_again(loop, browser, pictures_folder):
    tournament_page.open_by_command(browser.page, "clicks")
    assert tournament_page.answer_by_clicks(browser.page, loop.judge(1)) == FIRST
    browser.page.screenshot(path=str(pictures_folder / "loop_answered.png"))
    browser.page.keyboard.press("Escape")
    assert len(loop.judgments(1)) == FIRST
    loop.run()

    files = {p.name: p for p in loop.folder("before").glob("*.png")}
    rows = [
        json.loads(line)
        for line in (loop.output / "ernie_tournaments" / "clicks" / "pairs.jsonl").read_text("utf-8").splitlines()
    ]
    assert rows, "the rule found no pair: other prompts or seeds are needed"
    by_seed = {(e["prompt"], e["seed"]): files[e["file"]] for e in entries(loop.folder("before"))}
    for row in rows:
        chosen, rejected = (by_seed[row["prompt"], row["info"][side]["seed"]] for side in ("chosen", "rejected"))
        with Image.open(chosen) as better, Image.open(rejected) as worse:
            assert diameter(better) < diameter(worse), "the clicks' preference is the pair's"
    events = [json.loads(x) for x in (loop.output / "ernie_jobs" / "loop" / "progress.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, TRAINED + 1))
    assert (loop.server.base / "models" / "loras" / "loop.safetensors").is_file()

    before, after = (entries(loop.folder(side)) for side in ("before", "after"))
    same = ("hash", "prompt", "negative", "seed", "width", "height", "steps", "cfg", "shift")
    assert [[e[k] for k in same] for e in after] == [[e[k] for k in same] for e in before]
    changed = 0
    for old, new in zip(before, after, strict=True):
        with Image.open(loop.folder("before") / old["file"]) as a, Image.open(loop.folder("after") / new["file"]) as b:
            assert b.info["ernie_made_with"] == "loop.safetensors"
            changed += not np.array_equal(np.asarray(a), np.asarray(b))
    assert changed == len(before), "the LoRA is on the model"


def test_the_scorers_report_is_what_its_files_say(loop):
    told = loop.report()
    (judge,) = told["judges"]
    assert told["matches"] == judge["comparisons"] == PROMPTS * SEEDS
    rows, scorer = loop.comparisons(), BuiltinScorer(measure="combined")
    for row in rows:
        values = scorer.score([np.asarray(Image.open(row[side]).convert("RGB")) for side in ("before", "after")])
        assert [float(row[f"{side}_value"]) for side in ("before", "after")] == pytest.approx(values, rel=1e-4)
        assert Path(row["before"]).parent == loop.folder("before").resolve()
        assert Path(row["after"]).parent == loop.folder("after").resolve()
        better = "after" if values[1] > values[0] else "before" if values[1] < values[0] else "tie"
        assert row["better"] == better
    check_rate(judge, rows)


def check_rate(judge: dict, rows: list[dict[str, str]]) -> None:
    count = {better: sum(row["better"] == better for row in rows) for better in ("after", "tie", "before")}
    assert [judge[k] for k in ("wins", "ties", "losses")] == list(count.values())
    points = count["after"] + count["tie"] / 2
    expected = wilson(points, len(rows))
    assert judge["rate"] == pytest.approx(points / len(rows))
    assert judge["wilson_95"] == pytest.approx([expected.low, expected.high])
    assert sum(p["wins"] for p in judge["prompts"]) == count["after"]


def test_the_blind_tournament_is_clicked_and_counts(loop, browser, pictures_folder):
    tournament_page.open_by_command(browser.page, "clicks after")
    clicks = tournament_page.answer_by_clicks(browser.page, loop.judge(2))
    browser.page.keyboard.press("Escape")
    judged = loop.judgments(2)
    assert clicks == len(judged) == SECOND
    finished = loop.run()

    sides = {loop.folder(side).resolve(): side for side in ("before", "after")}
    between = [
        (prompt, {sides[Path(left).parent]: "left", sides[Path(right).parent]: "right"}, answer)
        for prompt, left, right, answer in judged
        if Path(left).parent != Path(right).parent
    ]
    told = loop.report()
    assert [j["judge"] for j in told["judges"]] == ["tournament clicks after", "built-in combined"]
    judge = told["judges"][0]
    assert judge["comparisons"] == len(between) > 0
    assert judge["wins"] == sum(answer == places["after"] for _, places, answer in between)
    assert judge["losses"] == sum(answer == places["before"] for _, places, answer in between)
    check_rate(judge, [row for row in loop.comparisons() if row["judge"] == judge["judge"]])

    report = next(n for n, d in loop.prompt.items() if d["class_type"] == "ErnieWinRate")
    shown = "\n".join(finished.outputs[report]["text"])
    assert f"after wins {100 * judge['rate']:.1f} %" in shown
    sheet = next(n for n, d in loop.prompt.items() if d["_meta"]["title"].startswith("Before (left)"))
    (file,) = finished.files(sheet)
    picture = loop.server.picture(file)
    picture.save(pictures_folder / "loop_sheet.png")
    assert picture.width > 4 * 256


def test_nothing_is_made_again(loop):
    def state():
        return {p: p.stat().st_mtime_ns for p in loop.output.rglob("loop*/**/*.png")}

    before = state()
    loop.run()
    assert state() == before
    assert len(loop.judgments(1)) + len(loop.judgments(2)) == FIRST + SECOND
