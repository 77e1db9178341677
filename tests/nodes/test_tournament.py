"""The tournament's nodes and routes without ComfyUI: every widget, what comes out, what is refused."""

import csv
import importlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_port import load_port
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring import judgments
from ernie_pack.ernie_core.scoring.scorer import Scores
from ernie_pack.ernie_core.training.pairs import read_pairs
from PIL import Image
from small_data import write_pairs, write_pictures

nodes = importlib.import_module("ernie_pack.nodes.tournament")

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    **{
        "name": "cats",
        "annotator": "ann",
        "folder": "cats",
        "prompts": "a cat",
        "rounds": 3,
        "top_k": 2,
        "order_seed": 0,
    },
    **{"meet": "all pictures", "until_complete": "wait", "result": "this annotator", "question": "Better?"},
    **{"pairs_from": "best against worst", "min_gap": 0.0, "max_per_prompt": 0, "save_pairs": False},
    **{"repeat_share": 0.0, "pass_share": 0.8},
}
OUTPUTS = ("images", "scores", "pairs", "ranking", "complete", "summary")


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "input" / "cats", count=6, captions=False)


@pytest.fixture
def tournament(run, folder):
    """tournament(**changes) -> outputs by name."""

    def call(**changes):
        done = run("ErnieTournament", **DEFAULTS | changes)
        return dict(zip(OUTPUTS, done.result, strict=True)) | {"ui": done.ui}

    return call


@pytest.fixture
def call(recording):
    """call("GET /ernie/...", body) -> answer, through the route's own handler."""

    def ask(route, body=None):
        address, _, query = route.partition("?")
        method, *parts = address.replace(" ", "/").split("/")
        for pattern, handle in nodes.ROUTES.items():
            its_method, *its_parts = pattern.replace(" ", "/").split("/")
            if its_method == method and len(its_parts) == len(parts):
                pairs = list(zip(its_parts, parts, strict=True))
                if all(a == b or a.startswith("{") for a, b in pairs):
                    path = {a.strip("{}"): b for a, b in pairs if a.startswith("{")}
                    return handle(path, dict(p.split("=") for p in query.split("&") if p), body or {})
        raise AssertionError(f"no route {route}")

    return ask


@pytest.fixture
def answer_all(call):
    """Answer everything: the picture with the higher number is better, as the browser would say it."""

    def play(id_=1, count=None, given=None):
        done = 0
        state = call(f"GET /ernie/tournaments/{id_}")
        while state["questions"] and (count is None or done < count):
            q = state["questions"][0]
            told = given or ("left" if q["left"] > q["right"] else "right")
            state = call(f"POST /ernie/tournaments/{id_}/answer", {"question": q["id"], "answer": told})
            done += 1
        return state

    return play


# --- the node -------------------------------------------------------------------------------------------------


def test_it_waits_says_how_much_is_left_and_then_gives_everything(tournament, answer_all, folder):
    first = tournament()
    assert first["complete"] is False
    assert [first[k] for k in ("images", "scores", "pairs", "ranking")] == [["BLOCKED"], *["BLOCKED"] * 3]
    assert first["summary"].startswith("cats, ann: 9 judgments left, 0 done (round 1 of 3)")
    assert first["ui"]["ernie_tournament"][0]["left"] == 9
    answer_all(count=4)
    assert "5 judgments left, 4 done" in tournament()["summary"]
    answer_all()
    last = tournament()
    assert last["complete"] is True
    best, _ = last["images"]
    assert best.shape == (1, 64, 64, 3)
    shown = [Path(f).name for f in last["scores"].files]
    assert shown[0] == "05.png"
    pixels = torch.tensor(np.asarray(Image.open(folder / shown[0]).convert("RGB")))
    assert torch.equal((best[0] * 255).round().byte(), pixels)
    assert last["scores"].values == tuple(sorted(last["scores"].values, reverse=True))
    rows = list(csv.DictReader(io.StringIO(last["ranking"])))
    assert [r["image"] for r in rows] == shown
    assert int(rows[0]["tier"]) == 10
    assert last["pairs"].pairs[0].chosen.image.name == "05.png"
    assert last["pairs"].pairs[0].captions[0].text == "a cat"


def test_two_folders_meet(tournament, answer_all, folder):
    write_pictures(folder.parent / "dogs", count=2, captions=False)
    assert tournament(folder_2="dogs", rounds=1)["ui"]["ernie_tournament"][0]["num_pictures"] == 8
    answer_all()
    labels = {row["image"] for row in csv.DictReader(io.StringIO(tournament(folder_2="dogs", rounds=1)["ranking"]))}
    assert labels == {f"cats/{i:02}.png" for i in range(6)} | {f"dogs/{i:02}.png" for i in range(2)}
    with pytest.raises(ErnieError, match="one of them is given twice"):
        tournament(name="twice", folder_2="cats")
    with pytest.raises(ErnieError, match="got 'nowhere'"):
        tournament(name="lost", folder_2="nowhere")


def test_current_standing_does_not_wait(tournament, answer_all):
    tournament()
    answer_all(count=3)
    now = tournament(until_complete="current standing", top_k=5)
    assert now["complete"] is False
    assert len(now["images"]) == 5
    assert len(now["scores"].values) == 6


def test_files_are_written(tournament, answer_all, tmp_path):
    tournament()
    answer_all()
    out = tmp_path / "output" / "ernie_tournaments" / "cats"
    tournament(save_pairs=True)
    table = json.loads((out / "ranking.json").read_text())
    assert [row["place"] for row in table] == sorted(row["place"] for row in table)
    assert {"image", "score", "tier", "prompt"} <= table[0].keys()
    assert (out / "ranking.csv").read_bytes().startswith(b"\xef\xbb\xbfplace")
    (judged,) = out.glob("judgments_*.jsonl")
    assert len(judged.read_text().splitlines()) == 9
    assert len(read_pairs(out / "pairs.jsonl")) == len(list((out / "chosen").glob("*.png"))) > 0


def test_pictures_of_the_graph_are_kept_and_go_on_where_they_were(tournament, answer_all, tmp_path):
    images = torch.rand(4, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    tournament(images=images, folder="")
    answer_all(count=1)
    assert "1 done" in tournament(images=images.clone(), folder="")["summary"]
    kept = list((tmp_path / "output" / "ernie_tournaments" / "cats" / "pictures").iterdir())
    assert len(kept) == 4
    with pytest.raises(ErnieError, match="'cats' of ann has other pictures or prompts"):
        tournament(images=1 - images, folder="")


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"rounds": 2}, 6), ({"rounds": 5}, 15), ({"rounds": 0}, 15), ({"repeat_share": 0.5}, 9 + 2 * 2)],
)
def test_rounds_and_repeats_are_the_number_of_questions(tournament, change, expected):
    assert tournament(**change)["ui"]["ernie_tournament"][0]["left"] == expected


def test_question_annotator_and_name_are_shown(tournament, call):
    tournament(question="  ")
    tournament(annotator="bob", question="Which one is sharper?")
    listed = call("GET /ernie/tournaments")["tournaments"]
    assert {(t["name"], t["annotator"], t["question"]) for t in listed} == {
        ("cats", "ann", nodes.QUESTION),
        ("cats", "bob", "Which one is sharper?"),
    }


def test_another_seed_is_another_order(tournament, call):
    asked = []
    for i, seed in enumerate((0, 0, 1)):
        tournament(order_seed=seed, annotator=str(i))
        asked.append([(q["left"], q["right"]) for q in call(f"GET /ernie/tournaments/{i + 1}")["questions"]])
    assert asked[0] == asked[1] != asked[2]


def test_prompts_come_from_the_widget_or_from_beside_the_pictures(tournament, call, folder):
    lines = "\n".join(["a cat"] * 3 + ["a dog"] * 3)
    tournament(prompts=lines, meet="same prompt only")
    for q in call("GET /ernie/tournaments/1")["questions"]:
        assert (q["left"] < 3) == (q["right"] < 3)
        assert q["prompt"] == ("a cat" if q["left"] < 3 else "a dog")
    (folder / "00.txt").write_text("beside")
    with judgments.open_store(nodes.store_path()) as store:
        tournament(prompts="", name="dogs")
        prompts = [p for (p,) in store.execute("SELECT prompt FROM pictures WHERE tournament=2 ORDER BY number")]
    assert prompts == ["beside", "", "", "", "", ""]
    with pytest.raises(ErnieError, match="6 pictures need 1 or 6 prompts, one per line; got 2"):
        tournament(prompts="a\nb", name="birds")


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"pairs_from": "best against worst"}, 3),
        ({"pairs_from": "every pair"}, 15),
        ({"pairs_from": "judged pairs"}, 9),
        ({"pairs_from": "every pair", "max_per_prompt": 2}, 2),
    ],
)
def test_pairs_are_made_as_asked(tournament, answer_all, change, count):
    tournament(rounds=3)
    answer_all()
    pairs = tournament(**change)["pairs"]
    # Judged pairs that all judgments together contradict, and equals, are left out.
    assert count - 3 <= len(pairs) <= count
    for pair in pairs.pairs:
        assert pair.margin > 0


def test_a_gap_that_nobody_reaches_blocks_the_pairs_and_says_why(tournament, answer_all):
    tournament()
    answer_all()
    done = tournament(min_gap=100.0)
    assert done["pairs"] == "BLOCKED"
    assert "no pairs: the tournament cats gives no pair" in done["summary"]


def test_several_annotators_are_merged_and_compared(tournament, answer_all):
    tournament()
    tournament(annotator="bob")
    answer_all(1)
    answer_all(2, given="left")
    merged = tournament(result="all annotators")
    assert all(0 < v < 1 for v in merged["scores"].values)
    assert "ann and bob: Kendall's tau" in merged["summary"]
    alone = tournament()
    assert alone["scores"].values != merged["scores"].values


def test_a_calibration_comes_first_and_its_share_decides(tournament, answer_all, call, tmp_path):
    pairs = read_pairs(write_pairs(tmp_path / "input" / "known", count=4) / "pairs.jsonl")
    strict = {"calibration": pairs, "annotator": "strict", "pass_share": 1.0}
    assert "(calibration)" in tournament(**strict)["summary"]
    state = answer_all(given="left")
    assert state["tournament"]["stage"] == "refused"
    assert "the calibration was not passed" in tournament(**strict)["summary"]
    assert call("POST /ernie/tournaments/1/calibrate")["tournament"]["stage"] == "calibrating"
    tournament(calibration=pairs, annotator="mild", pass_share=0.0)
    assert answer_all(2, count=4, given="left")["tournament"]["stage"] == "judging"


def test_a_calibration_from_elsewhere_is_refused(tournament, tmp_path):
    pairs = read_pairs(write_pairs(tmp_path / "elsewhere", count=1) / "pairs.jsonl")
    with pytest.raises(ErnieError, match=r"calibration's picture .* must lie in ComfyUI's input or output folder"):
        tournament(calibration=pairs)


@pytest.mark.parametrize("named", ["", " ", "nothing", "..", "../..", "/etc", "/", "cats/../../elsewhere", "~"])
def test_folders_elsewhere_are_refused(tournament, tmp_path, named):
    write_pictures(tmp_path / "elsewhere", count=3)
    with pytest.raises(ErnieError, match="must be a folder of pictures in ComfyUI's input or output folder"):
        tournament(folder=named)


def test_a_link_out_of_the_input_folder_is_refused(tournament, tmp_path):
    write_pictures(tmp_path / "elsewhere", count=3)
    (tmp_path / "input" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ErnieError, match="add its place as ernie_images"):
        tournament(folder="link")


def test_a_folder_without_pictures_says_so(tournament, tmp_path):
    (tmp_path / "input" / "empty").mkdir()
    with pytest.raises(ErnieError, match=r"must hold at least two pictures .* it holds 0"):
        tournament(folder="empty")


@pytest.mark.parametrize("change", ["answer", "undo", "picture"])
def test_a_change_is_noticed(tournament, answer_all, call, folder, recording, change):
    cls = nodes.ErnieTournament
    tournament()
    answer_all(count=1)
    before = cls.fingerprint_inputs(name="cats", folder="cats")
    assert cls.fingerprint_inputs(name="cats", folder="cats") == before
    if change == "answer":
        answer_all(count=1)
    elif change == "undo":
        call("POST /ernie/tournaments/1/undo")
    else:
        (folder / "00.png").touch()
        os.utime(folder / "00.png", (1, 1))
    assert cls.fingerprint_inputs(name="cats", folder="cats") != before
    assert cls.fingerprint_inputs(name=None, folder=None), "both are linked"


# --- pairs from scores ----------------------------------------------------------------------------------------

FROM_SCORES = {"name": "pairs", "rule": "best against worst", "min_gap": 0.0, "max_per_prompt": 0, "save_pairs": False}


def scores_for(files=(), *, values=(1.0, 2.0, 3.0, 4.0), higher=True):
    files = tuple(map(str, files)) or ("",) * len(values)
    labels, prompts = ("x",) * len(values), ("a cat",) * len(values)
    return Scores(
        scorer="test", values=values, labels=labels, prompts=prompts, categories=("",) * len(values), files=files,
        higher_is_better=higher,
    )  # fmt: skip


def test_scores_become_pairs(run, folder, tmp_path):
    files = sorted(folder.glob("*.png"))[:4]
    pairs, summary = run("ErniePairsFromScores", scores=scores_for(files), **FROM_SCORES).result
    assert [(p.chosen.image, p.rejected.image) for p in pairs.pairs] == [(files[3], files[0]), (files[2], files[1])]
    assert summary.startswith("2 pairs for 1 prompts")
    low, _ = run("ErniePairsFromScores", scores=scores_for(files, higher=False), **FROM_SCORES).result
    assert low.pairs[0].chosen.image == files[0]
    wide, _ = run("ErniePairsFromScores", scores=scores_for(files), **FROM_SCORES | {"min_gap": 2.0}).result
    assert len(wide) == 1
    every, _ = run("ErniePairsFromScores", scores=scores_for(files), **FROM_SCORES | {"rule": "every pair"}).result
    assert len(every) == 6
    one, _ = run("ErniePairsFromScores", scores=scores_for(files), **FROM_SCORES | {"max_per_prompt": 1}).result
    assert len(one) == 1
    _, told = run("ErniePairsFromScores", scores=scores_for(files), **FROM_SCORES | {"save_pairs": True}).result
    assert len(read_pairs(tmp_path / "output" / "ernie_pairs" / "pairs")) == 2
    assert "pairs are in" in told


def test_pictures_of_the_graph_stand_for_files(run, folder, tmp_path):
    images = torch.rand(4, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    pairs, _ = run("ErniePairsFromScores", scores=scores_for(), images=images, **FROM_SCORES | {"name": "made"}).result
    assert pairs.pairs[0].chosen.image.parent == (tmp_path / "output" / "ernie_pairs" / "made" / "pictures").resolve()
    with pytest.raises(ErnieError, match="these scores name no files"):
        run("ErniePairsFromScores", scores=scores_for(), **FROM_SCORES)
    with pytest.raises(ErnieError, match="must be of the same pictures, got 3 and 4"):
        run("ErniePairsFromScores", scores=scores_for(), images=images[:3], **FROM_SCORES)
    with pytest.raises(ErnieError, match="test gives no pair: no two pictures of one prompt differ enough"):
        run("ErniePairsFromScores", scores=scores_for(), images=images, **FROM_SCORES | {"min_gap": 9.0})


# --- routes ---------------------------------------------------------------------------------------------------


def test_a_picture_is_sent_as_a_jpeg_of_the_size_asked_for(tournament, call):
    tournament()
    data = call("GET /ernie/tournaments/1/pictures/0?side=64")
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    with Image.open(io.BytesIO(call("GET /ernie/tournaments/1/pictures/0"))) as image:
        assert image.size == (64, 64), "never enlarged"


@pytest.mark.parametrize("side", ["0", "63", "8193", "-1", "1e3", "99999999999999999999", "", "64.0", "\u0661"])
def test_sizes_out_of_range_are_refused(tournament, call, side):
    tournament()
    with pytest.raises(ErnieError, match="side must"):
        nodes.SESSIONS.get_picture({"id": "1", "number": "0"}, {"side": side}, {})


@pytest.mark.parametrize("id_", ["0x1", "-1", "1.0", "", "../1", "9" * 30, "one", "1 OR 1=1", None, True, [1]])
def test_bad_ids_are_refused(tournament, id_):
    tournament()
    with pytest.raises(ErnieError, match="must be a whole number"):
        nodes.SESSIONS.get_state({"id": id_}, {}, {})
    with pytest.raises(ErnieError, match="must be a whole number"):
        nodes.SESSIONS.get_picture({"id": "1", "number": id_}, {}, {})
    with pytest.raises(ErnieError, match="must be a whole number"):
        nodes.SESSIONS.post_answer({"id": "1"}, {}, {"question": id_, "answer": "left"})


def test_what_is_not_there_is_unknown(tournament, call):
    tournament()
    for route in ("GET /ernie/tournaments/2", "GET /ernie/tournaments/1/pictures/6", "POST /ernie/tournaments/9/undo"):
        with pytest.raises(judgments.Unknown):
            call(route)
    with pytest.raises(judgments.Stale):
        call("POST /ernie/tournaments/1/answer", {"question": 99, "answer": "left"})
    with pytest.raises(ErnieError, match="an answer is one of"):
        call("POST /ernie/tournaments/1/answer", {"question": 1, "answer": {"$ne": 1}})


def test_a_picture_that_left_the_allowed_folders_is_not_sent(tournament, call, folder, tmp_path):
    tournament()
    file = folder / "00.png"
    file.rename(tmp_path / "secret.png")
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(judgments.Unknown, match="outside of the folders"):
        call("GET /ernie/tournaments/1/pictures/0")
    file.unlink()
    with pytest.raises(judgments.Unknown, match="not there any more"):
        call("GET /ernie/tournaments/1/pictures/0")


def test_what_is_no_picture_is_not_sent(tournament, call, folder):
    tournament()
    (folder / "00.png").write_text("root:x:0:0")
    with pytest.raises(ErnieError):
        call("GET /ernie/tournaments/1/pictures/0")


def test_the_ranking_is_kept_from_the_annotator_until_the_end(tournament, call, answer_all):
    tournament()
    with pytest.raises(ErnieError, match="it would sway the answers"):
        call("GET /ernie/tournaments/1/ranking")
    answer_all()
    best = call("GET /ernie/tournaments/1/ranking")["best"]
    assert (best[0]["label"], best[0]["number"], best[0]["tier"]) == ("05.png", 5, 10)


def test_undo_by_route(tournament, call, answer_all):
    tournament()
    first = call("GET /ernie/tournaments/1")["questions"][0]
    answer_all(count=1)
    state = call("POST /ernie/tournaments/1/undo")
    assert state["undone"] is True
    assert state["questions"][0] == first
    assert call("POST /ernie/tournaments/1/undo")["undone"] is False


SAME = {"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"Host": "127.0.0.1:8188"}, True),
        (SAME, True),
        (SAME | {"Sec-Fetch-Site": "none"}, True),
        ({"Host": "box:8188", "Referer": "http://BOX:8188/"}, True),
        (SAME | {"Sec-Fetch-Site": "cross-site"}, False),
        (SAME | {"Sec-Fetch-Site": "same-site"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "http://evil.example"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:9999"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "null"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8188.evil.example"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "http://[bad"}, False),
        ({"Host": "127.0.0.1:8188", "Referer": "http://evil.example/127.0.0.1:8188"}, False),
        (SAME | {"Referer": "http://evil.example/"}, False),
        ({"Origin": "http://127.0.0.1:8188"}, False),
    ],
)
def test_only_pages_of_this_server_may_ask(headers, allowed):
    assert load_port().routes.is_same_origin(headers) is allowed


@pytest.mark.parametrize(
    ("name", "scripts"),
    [
        ("erniePanel", ("panel.js", "tournament.js", "evaluation.js")),
        ("ernieTournament", ("panel.js", "tournament.js")),
        ("ernieEvaluation", ("panel.js", "evaluation.js")),
    ],
    ids=["shared", "tournament", "evaluation"],
)
def test_texts_of_the_page_are_there_in_both_languages(name, scripts):
    english, chinese = (
        json.loads((ROOT / "locales" / language / "main.json").read_text("utf-8"))[name] for language in ("en", "zh")
    )
    assert english.keys() == chinese.keys()
    script = "".join((ROOT / "web" / file).read_text("utf-8") for file in scripts)
    for key in english:
        stem = key.removesuffix("OfOne").removesuffix("OfTwo")  # these are put together from the criterion
        assert f"'{stem}'" in script, f"{key} is not used"
        assert english[key].count("{") == chinese[key].count("{"), key
