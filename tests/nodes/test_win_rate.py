"""Win Rate and Choose Pairs: what comes out and is written, every widget, what is refused, who is asked."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.batch import Row, append_manifest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring import judgments
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from PIL import Image

DEFAULTS = {
    **{"before": ["before"], "after": ["after"], "name": ["report"], "tournament": [""], "prompts": [""]},
    **{"shown": [4], "batch_size": [3]},
}
ROW = {"label": "", "negative": "", "width": 32, "height": 32, "steps": 2, "cfg": 4.0, "shift": 4.0}
SEEDS, PROMPTS = 3, ("a fox", "a boat")


@pytest.fixture
def sides(tmp_path):
    """Folders before and after in the output folder; after is brighter, but for one picture."""
    rng = np.random.default_rng(0)
    for side, scale in (("before", 60), ("after", 120)):
        folder = tmp_path / "output" / side
        folder.mkdir(parents=True)
        for prompt in PROMPTS:
            for seed in range(SEEDS):
                row = Row(prompt=prompt, seed=seed, **ROW)
                brightness = 20 if (side, prompt, seed) == ("after", "a boat", 2) else scale
                pixels = rng.integers(0, brightness, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{row.hash}.png")
                append_manifest(folder, row, f"{row.hash}.png")
    return tmp_path / "output" / "before", tmp_path / "output" / "after"


@pytest.fixture
def rate(run, sides):
    def call(**changes):
        scorer = {"scorer": [BuiltinScorer(measure="contrast")]}
        done = run("ErnieWinRate", **DEFAULTS | scorer | changes)
        return dict(zip(("image", "win_rate", "table", "report"), done.result, strict=True)) | {"ui": done.ui}

    return call


def play(tmp_path, sides, better, *, name="both", annotator="ann"):
    """A whole tournament of both sides, answered by `better`(side of the left, side of the right)."""
    pictures = tuple(
        judgments.Picture(path=str(path.resolve()), prompt=prompt)
        for folder in sides
        for path in sorted(folder.glob("*.png"))
        for prompt in [next(e["prompt"] for e in read(folder) if e["file"] == path.name)]
    )
    with judgments.open_store(tmp_path / "user" / "judgments.sqlite") as store:
        setup = judgments.Setup(name=name, annotator=annotator, pictures=pictures, per_prompt=True)
        id_ = judgments.begin(store, setup)
        while (asked := judgments.current(store, id_)) is not None:
            shown = [judgments.picture_path(store, id_, n).parent.name for n in (asked.left, asked.right)]
            judgments.answer(store, id_, asked.id, better(*shown))
        return list(judgments.judgment_rows(store, id_))


def read(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_it_says_how_often_after_is_better_and_the_files_say_the_same(rate, tmp_path):
    found = rate()
    assert found["win_rate"] == pytest.approx(5 / 6)
    assert found["image"].shape[0] == 1
    assert found["image"].shape[3] == 3
    assert "6 pictures before and after" in found["report"]
    assert "after wins 83.3 % [" in found["report"]
    out = tmp_path / "output" / "report"
    rows = list(csv.DictReader(io.StringIO((out / "comparisons.csv").read_text())))
    assert [Path(r["before"]).parent.name for r in rows] == ["before"] * 6
    assert [Path(r["after"]).parent.name for r in rows] == ["after"] * 6
    for row in rows:
        gain = float(row["after_value"]) - float(row["before_value"])
        assert row["better"] == ("after" if gain > 0 else "before")
    told = json.loads((out / "win_rate.json").read_text())
    assert told["judges"][0]["wins"] == sum(r["better"] == "after" for r in rows) == 5
    assert (told["before"], told["after"], told["matches"]) == ("before", "after", 6)
    assert found["table"] == (out / "prompts.csv").read_bytes().decode()


def test_exchanged_sides_turn_it_over(rate):
    assert rate(before=["after"], after=["before"])["win_rate"] == pytest.approx(1 / 6)


def test_a_tournament_speaks_before_the_scorer(rate, tmp_path, sides, recording):
    def before_is_better(left, right):
        return "tie" if left == right else "left" if left == "before" else "right"

    recording.user_folder().mkdir(exist_ok=True)
    rows = play(tmp_path, sides, before_is_better)
    found = rate(tournament=["both"])
    between = sum(Path(r["left"]).parent != Path(r["right"]).parent for r in rows)
    assert found["win_rate"] == 0
    judges = json.loads((tmp_path / "output" / "report" / "win_rate.json").read_text())["judges"]
    assert [j["judge"] for j in judges] == ["tournament both", "built-in contrast"]
    assert judges[0]["losses"] == judges[0]["comparisons"] == between > 0


def test_without_a_judge_it_shows_and_waits(rate):
    found = rate(scorer=None, tournament=["nobody"])
    assert found["win_rate"] == "BLOCKED"
    assert "the tournament 'nobody' has no judgment of before against after yet" in found["report"]
    assert "nothing is judged" in found["report"]
    assert found["image"].shape[1] > 100


def test_pictures_of_the_graph(rate):
    rng = torch.Generator().manual_seed(0)
    before = torch.rand(3, 32, 32, 3, generator=rng) * 0.2
    after = [(picture * 3)[None] for picture in before]  # a list, as a batch hands it on
    found = rate(before_images=[before], after_images=after, prompts=["one\ntwo\nthree"])
    assert found["win_rate"] == 1
    assert [row["prompt"] for row in csv.DictReader(io.StringIO(found["table"]))] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"before": [""]}, "before is empty"),
        ({"after": ["nowhere"]}, "there is no folder 'nowhere'"),
        ({"after": ["before"]}, "same folder"),
        ({"name": ["../out"]}, "name must be a folder inside the output folder"),
        ({"before_images": [torch.zeros(1, 8, 8, 3)]}, "after_images are missing"),
        ({"after_images": [torch.zeros(1, 8, 8, 3)]}, "before_images are missing"),
        (
            {"before_images": [torch.zeros(1, 8, 8, 3)], "after_images": [torch.zeros(2, 8, 8, 3)]},
            "got 1 and 2 pictures",
        ),
    ],
)
def test_what_does_not_fit_is_refused(rate, changes, message):
    with pytest.raises(ErnieError, match=message):
        rate(**changes)


def test_a_damaged_picture_is_named(rate, sides):
    victim = next(sides[1].glob("*.png"))
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(ErnieError, match=victim.name):
        rate()


def test_every_widget_matters(rate, tmp_path):
    def look(**changes):
        found = rate(**changes)
        return found["report"], found["image"].shape

    base = look()
    assert look(shown=[0])[1] != base[1]
    assert not (tmp_path / "output" / "elsewhere").exists()
    assert look(name=["elsewhere"])[0] != base[0]
    assert (tmp_path / "output" / "elsewhere" / "win_rate.json").is_file()
    assert "comparisons.csv" not in look(name=[""])[0]
    assert look(batch_size=[1])[0] == base[0], "the batch changes the speed alone"


def test_a_new_judgment_or_picture_is_a_new_fingerprint(node_classes, rate, sides, recording):
    node = node_classes["ErnieWinRate"]
    given = {"tournament": ["both"], "before": ["before"], "after": (None,)}
    first = node.fingerprint_inputs(**given)
    assert node.fingerprint_inputs(**given) == first
    next(sides[0].glob("*.png")).unlink()
    assert node.fingerprint_inputs(**given) != first


# --- Choose Pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tournament", "scorer"])
def test_only_the_chosen_pairs_are_asked_for(run, node_classes, source):
    node, pairs = node_classes["ErnieChoosePairs"], {"tournament": "A", "scorer": "B"}
    assert node.check_lazy_status(source=source, tournament=None, scorer=None) == [source]
    assert node.check_lazy_status(source=source, **pairs) == []
    assert run("ErnieChoosePairs", source=source, **pairs).result == (pairs[source],)
    with pytest.raises(ErnieError, match=f"no pairs are connected to {source}"):
        run("ErnieChoosePairs", source=source, **pairs | {source: None})
    assert node.check_lazy_status(source=source) == [], "what is not connected cannot be asked for"
