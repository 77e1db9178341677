"""Before against after: who meets whom, who wins, and what the numbers are worth (against scipy)."""

import json

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.batch import Row, append_manifest, name_run, read_rows
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring import win_rate as engine
from ernie_pack.ernie_core.scoring.pairs import read_settings
from PIL import Image, PngImagePlugin

ROW = Row(label="", prompt="a fox", negative="", seed=0, width=16, height=16, steps=2, cfg=4.0, shift=4.0)


class Red:
    """The score of a picture is how red it is."""

    name, reads_prompt, higher_is_better, low, high = "red", False, True, None, None

    def score(self, images, prompts=None, *, batch_size=8, on_scored=None):
        return [float(image[0, 0, 0]) for image in images]


class Green(Red):
    """The less red the better."""

    name, higher_is_better = "green", False


def paint(folder, pictures, *, made_with="", manifest=True):
    """A run's folder: {(prompt, seed): redness}."""
    folder.mkdir(parents=True, exist_ok=True)
    for (prompt, seed), red in pictures.items():
        row = Row(**{**ROW.__dict__, "prompt": prompt, "seed": seed})
        entries = PngImagePlugin.PngInfo()
        for name, text in {"prompt": prompt, "seed": str(seed), "made_with": made_with}.items():
            if text:
                entries.add_text(f"ernie_{name}", text)
        file = f"{row.hash}_{seed}.png"
        Image.new("RGB", (16, 16), (red, 0, 0)).save(folder / file, pnginfo=entries)
        if manifest:
            append_manifest(folder, row, file)
    return folder


def compare(before, after, scorer=None):
    matches, problems = engine.match_folders(before, after)
    return matches, engine.compare_by_scorer(matches, scorer or Red(), batch_size=2), problems


def test_pictures_meet_by_prompt_and_seed_and_the_sides_keep_their_names(tmp_path):
    before = paint(tmp_path / "b", {("a fox", 1): 10, ("a fox", 2): 90, ("a cat", 1): 50})
    after = paint(tmp_path / "a", {("a cat", 1): 50, ("a fox", 2): 20, ("a fox", 1): 30}, made_with="x")
    matches, found, problems = compare(before, after)
    assert problems == []
    assert [(c.prompt, c.seed, c.before_value, c.after_value, c.better) for c in found] == [
        ("a fox", 1, 10.0, 30.0, "after"),
        ("a fox", 2, 90.0, 20.0, "before"),
        ("a cat", 1, 50.0, 50.0, "tie"),
    ]
    assert all(m.before.parent == before and m.after.parent == after for m in matches)


def test_exchanging_the_sides_turns_the_rate_over(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (2, 20))
    sides = [paint(tmp_path / str(s), {("p", i): int(v) for i, v in enumerate(values[s])}) for s in range(2)]
    there, back = (engine.win_rate("red", compare(*order)[1]) for order in (sides, sides[::-1]))
    assert there.rate.value == pytest.approx(1 - back.rate.value)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.rate.low == pytest.approx(1 - back.rate.high)
    less = engine.win_rate("green", compare(*sides, Green())[1])
    assert less.rate.value == pytest.approx(back.rate.value), "where lower is better"


def test_metadata_does_where_there_is_no_manifest(tmp_path):
    pictures = {("a fox", 1): 10, ("a cat", 2): 20}
    before = paint(tmp_path / "b", pictures, manifest=False)
    after = paint(tmp_path / "a", {k: v + 5 for k, v in pictures.items()}, manifest=False)
    assert {(c.prompt, c.seed, c.better) for c in compare(before, after)[1]} == {
        ("a fox", 1, "after"),
        ("a cat", 2, "after"),
    }


def test_pictures_without_seeds_meet_by_name(tmp_path):
    for side, red in (("b", 10), ("a", 20)):
        (tmp_path / side).mkdir()
        for name in ("one", "two"):
            Image.new("RGB", (8, 8), (red, 0, 0)).save(tmp_path / side / f"{name}.png")
    matches, found, _ = compare(tmp_path / "b", tmp_path / "a")
    assert [m.before.name for m in matches] == [m.after.name for m in matches] == ["one.png", "two.png"]
    assert [c.better for c in found] == ["after", "after"]


def test_what_has_no_partner_is_told(tmp_path):
    before = paint(tmp_path / "b", {("p", 1): 1, ("p", 2): 1})
    after = paint(tmp_path / "a", {("p", 1): 2})
    assert engine.match_folders(before, after)[1] == ["1 of 2 pictures of before have no partner and are left out"]


def test_exchanged_folders_are_noticed(tmp_path):
    before = paint(tmp_path / "b", {("p", 1): 1})
    after = paint(tmp_path / "a", {("p", 1): 2}, made_with="my.safetensors")
    assert engine.match_folders(before, after)[1] == []
    (told,) = engine.match_folders(after, before)[1]
    assert "made with my.safetensors" in told
    assert "exchanged" in told


def test_other_settings_are_refused(tmp_path):
    before, after = (tmp_path / side for side in ("b", "a"))
    for folder, steps in ((before, 2), (after, 3)):
        folder.mkdir()
        row = Row(**{**ROW.__dict__, "steps": steps})
        Image.new("RGB", (16, 16)).save(folder / "x.png")
        append_manifest(folder, row, "x.png")
    with pytest.raises(ErnieError, match=r"steps of x\.png and x\.png is 2 before and 3 after"):
        engine.match_folders(before, after)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({("q", 1): 1}, "no picture of .* has the prompt and seed of one in"),
        ({}, "holds no pictures"),
        (None, "after must be a folder"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, after, message):
    before = paint(tmp_path / "b", {("p", 1): 1})
    other = tmp_path / "a" if after is None else paint(tmp_path / "a", after)
    with pytest.raises(ErnieError, match=message):
        engine.match_folders(before, other)
    with pytest.raises(ErnieError, match="same folder"):
        engine.match_folders(before, before)


def test_two_pictures_of_one_seed_on_a_side_are_refused(tmp_path):
    before = paint(tmp_path / "b", {("p", 1): 1})
    Image.new("RGB", (16, 16)).save(before / "z.png")
    append_manifest(before, Row(**{**ROW.__dict__, "prompt": "p", "seed": 1, "steps": 9}), "z.png")
    with pytest.raises(ErnieError, match="two pictures of one prompt and seed"):
        engine.match_folders(before, paint(tmp_path / "a", {("p", 1): 1}))


def test_pictures_of_the_graph(tmp_path):
    dark, light = torch.zeros(8, 8, 3), torch.ones(8, 8, 3)
    matches = engine.match_pictures([dark, light], [light, dark], ["p"])
    found = engine.compare_by_scorer(matches, Red(), batch_size=2)
    assert [c.better for c in found] == ["after", "before"]
    for before, after, message in (
        ([dark], [dark, dark], "got 1 and 2 pictures"),
        ([], [], "got 0 and 0"),
        ([dark], [torch.zeros(8, 9, 3)], "picture 1 is 8 x 8 and 9 x 8"),
    ):
        with pytest.raises(ErnieError, match=message):
            engine.match_pictures(before, after)
    with pytest.raises(ErnieError, match="need 1 or 2 prompts"):
        engine.match_pictures([dark, dark], [dark, dark], ["a", "b", "c"])


def test_judgments_between_the_sides_count_and_no_others(tmp_path):
    pictures = {("p", 1): 1, ("p", 2): 1, ("q", 1): 1}
    before, after = paint(tmp_path / "b", pictures), paint(tmp_path / "a", pictures)
    matches, _ = engine.match_folders(before, after)
    (p1, p2, q) = matches

    def row(left, right, answer, kind="pair"):
        return {"left": str(left.resolve()), "right": str(right.resolve()), "answer": answer, "kind": kind}

    rows = [
        row(p1.before, p1.after, "right"),
        row(p1.after, p1.before, "left"),
        row(p2.after, p1.before, "right"),  # another seed of the same prompt
        row(q.before, q.after, "tie"),
        row(q.before, q.after, "skip"),
        row(q.after, q.before, "left", kind="repeat"),
        row(p1.before, p2.before, "left"),  # one side only
        row(p1.before, q.after, "left"),  # two prompts
        row(p1.before, tmp_path / "other.png", "left"),
    ]
    found = engine.compare_by_judgments(matches, rows)
    assert [(c.better, c.seed) for c in found] == [("after", 1), ("after", 1), ("before", None), ("tie", 1)]
    assert all(c.before.startswith(str(before)) and c.after.startswith(str(after)) for c in found)


def outcomes(wins, ties, losses, *, prompts=1):
    better = ["after"] * wins + ["tie"] * ties + ["before"] * losses
    return [engine.Comparison(prompt=f"p{i % prompts}", before="", after="", better=b) for i, b in enumerate(better)]


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (5, 5), (7, 3), (40, 60), (299, 1), (3, 0)])
def test_intervals_and_sign_test_are_scipys(wins, losses):
    stats = pytest.importorskip("scipy.stats")
    rate = engine.win_rate("x", outcomes(wins, 0, losses))
    exact = stats.binomtest(wins, wins + losses)
    ends = exact.proportion_ci(method="wilson")
    assert (rate.rate.low, rate.rate.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    assert rate.p_value == pytest.approx(exact.pvalue, rel=1e-9)


def test_the_interval_over_prompts_is_scipys_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    found = [
        engine.Comparison(prompt=f"p{p}", before="", after="", better="after" if rng.random() < chance else "before")
        for p, chance in enumerate(rng.random(40))
        for _ in range(4)
    ]
    ours = engine.win_rate("x", found)
    points = np.array([p.points for p in ours.prompts])
    counts = np.array([p.count for p in ours.prompts])
    theirs = stats.bootstrap(
        (points, counts),
        lambda p, c, axis=-1: p.sum(axis) / c.sum(axis),
        paired=True,
        n_resamples=4000,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    assert (ours.by_prompt.low, ours.by_prompt.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.by_prompt.value == ours.rate.value == points.sum() / counts.sum()
    assert ours.by_prompt.high - ours.by_prompt.low > ours.rate.high - ours.rate.low, "pictures of a prompt are alike"


def test_a_tie_is_half_a_win():
    rate = engine.win_rate("x", outcomes(1, 2, 1, prompts=2))
    assert (rate.rate.value, rate.p_value) == (0.5, 1.0)
    assert engine.win_rate("x", outcomes(0, 4, 0)).p_value == 1.0
    with pytest.raises(ErnieError, match="compared nothing"):
        engine.win_rate("x", [])


def test_files_say_what_was_found(tmp_path):
    pictures = {(p, s): 10 * s for p in ("p", "q") for s in (1, 2)}
    before = paint(tmp_path / "b", pictures)
    after = paint(tmp_path / "a", {k: 25 - v for k, v in pictures.items()})
    _, found, _ = compare(before, after)
    rate = engine.win_rate("red", found)
    told = json.loads(engine.to_json([rate], before="b", after="a", matches=4, problems=[]))
    assert told["judges"][0]["wins"] == 2
    assert told["judges"][0]["prompts"] == [
        {"prompt": p, "wins": 1, "ties": 0, "losses": 1, "rate": 0.5} for p in ("p", "q")
    ]
    lines = engine.comparison_table([rate]).splitlines()
    assert lines[0] == "judge,prompt,seed,before,after,before_value,after_value,better"
    assert len(lines) == 5
    assert engine.prompt_table([rate]).splitlines()[1] == "red,p,2,1,0,1,0.500000"
    assert "after wins 50.0 % [" in engine.summarise([rate], matches=4)
    assert "2 prompts are few" in engine.summarise([rate], matches=4)
    many = engine.win_rate("x", outcomes(15, 0, 5, prompts=10))
    assert "are few" not in engine.summarise([many], matches=20)
    single = engine.to_json([engine.win_rate("x", outcomes(1, 0, 0))], before="b", after="a", matches=1, problems=[])
    assert json.loads(single)["judges"][0]["by_prompt_95"] == [None, None], "no bare NaN in JSON"
    assert "NaN" not in single


def test_the_sheet_has_before_on_the_left(tmp_path):
    before = paint(tmp_path / "b", {("p", 1): 250})
    after = paint(tmp_path / "a", {("p", 1): 120})
    matches, found, _ = compare(before, after)
    sheet = engine.draw_sheet(matches, [engine.win_rate("red", found)], cell_px=64)
    row = sheet[-40].astype(int)  # through the middle of the pictures
    reds = [value[0] for value in row if value[1] == value[2] == 0]
    assert reds[0] == 250
    assert reds[-1] == 120
    none = engine.draw_sheet(matches, [], shown=0)
    assert none.shape[2] == 3


# --- the folder of a run, painted again ---------------------------------------------------------------------------


def test_a_runs_folder_is_a_prompt_list(tmp_path):
    paint(tmp_path / "b", {("a fox", 7): 1, ("a cat", 3): 1})
    defaults = Row(**{**ROW.__dict__, "prompt": "", "width": 512, "steps": 50, "seed": 99})
    rows, problems = read_rows(str(tmp_path / "b"), defaults)
    assert problems == []
    assert [(r.prompt, r.seed, r.width, r.steps) for r in rows] == [("a fox", 7, 16, 2), ("a cat", 3, 16, 2)]
    assert [r.hash for r in rows] == [
        Row(**{**ROW.__dict__, "prompt": p, "seed": s}).hash for p, s in (("a fox", 7), ("a cat", 3))
    ]


def test_a_run_with_settings_that_no_column_holds_is_not_painted_without_them(tmp_path):
    paint(tmp_path / "b", {("a fox", 7): 1})
    row = Row(**{**ROW.__dict__, "prompt": "a cat", "loras": (("x.safetensors", 1.0),)})
    Image.new("RGB", (16, 16)).save(tmp_path / "b" / "z.png")
    append_manifest(tmp_path / "b", row, "z.png")
    rows, problems = read_rows(str(tmp_path / "b"), ROW)
    assert [r.prompt for r in rows] == ["a fox"]
    assert "has unknown columns loras" in str(problems[0])


def test_another_lora_paints_into_another_folder(tmp_path):
    lora = tmp_path / "x.safetensors"
    names = {name_run("after", ""), name_run("after", "words"), name_run("after", str(lora))}
    for content in (b"one", b"two"):
        lora.write_bytes(content)
        names.add(name_run("after", str(lora)))
    assert "after" in names
    assert len(names) == 5
    assert name_run("after", str(lora)) == name_run("after", f" {lora} "), "the same file is the same folder"
    assert name_run("", "words") == "", "an empty name stays an error"


def test_a_batchs_pictures_say_their_own_seed_not_the_graphs(tmp_path):
    graph = {"1": {"class_type": "ErnieBatchFromPrompts", "inputs": {"seed": 5, "steps": 50, "model": ["2", 0]}}}
    info = PngImagePlugin.PngInfo()
    for name, text in {
        "prompt": json.dumps(graph),
        "ernie_prompt": "a fox",
        "ernie_seed": "8",
        "ernie_steps": "9",
    }.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    assert read_settings(tmp_path / "x.png") == {"prompt": "a fox", "seed": 8, "steps": 9}
