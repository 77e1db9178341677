"""`curate categories`, `captions`, `styles`, `scores`: from files to files, without a model and with tiny ones."""

import json

import numpy as np
import pytest
from chat_server import event, running_chat_server
from ernie_pack.ernie_core import cli
from ernie_pack.ernie_core.curation import captions, label_commands, styles
from ernie_pack.ernie_core.curation.manifest import read_rows, write_rows
from ernie_pack.tiny.scenes import all_scenes, canonical_caption, draw
from PIL import Image
from tiny_image_text import write_siglip_folder


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    """Rows of drawn scenes."""
    folder, rng = tmp_path_factory.mktemp("pile"), np.random.default_rng(0)
    made = []
    for i, scene in enumerate(all_scenes()[::3001]):
        Image.fromarray(draw(scene, rng)).save(folder / f"{i}.png")
        made.append({"id": str(i), "source": str(folder / f"{i}.png"), "caption": canonical_caption(scene)})
    return made


@pytest.fixture
def curate(pile, tmp_path, capsys):
    """curate(stage, source, target, *options) -> (exit code, what was printed); 0.jsonl is there."""
    write_rows(tmp_path / "0.jsonl", pile)

    def run(stage, source, target, *options):
        files = [str(tmp_path / f"{name}.jsonl") for name in (source, target)]
        code = cli.main(["curate", stage, *files, *map(str, options)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def rows(tmp_path, name):
    return list(read_rows(tmp_path / f"{name}.jsonl"))


def test_choices_are_those_of_the_engine():
    assert label_commands.FORMS == captions.FORMS
    assert tuple(styles.PRESETS) == label_commands.PRESETS


def test_the_whole_way_without_a_model(curate, tmp_path):
    function = ("--function", "ernie_pack.tiny.labels:label")
    code, said = curate("categories", 0, 1, *function, "--picture", tmp_path / "tail.png")
    assert code == 0
    assert "effective categories" in said
    code, said = curate("captions", 1, 2, *function)
    assert code == 0
    assert "5 lengths" in said or "long (" in said
    code, said = curate("styles", 2, 3, "--share", "keyword=1", "--share", "detailed=3")
    assert code == 0
    assert "asked for 75.0%" in said
    code, said = curate("scores", 3, 4, "--scorer", "built-in contrast", "--picture", tmp_path / "scores.png")
    assert code == 0
    assert "by category" in said
    for row in rows(tmp_path, 4):
        assert row["captions"]["medium"] == row["caption"]
        assert row["category"].split("/")[0] in row["caption"]
        assert row["prompts"].keys() == {row["prompt_style"]} <= {"keyword", "detailed"}
        assert row["score_of"] == "built-in contrast"
        assert set(row["made_by"]) == {"categories", "captions", "styles", "scores"}
    assert Image.open(tmp_path / "tail.png").height > 100
    assert Image.open(tmp_path / "scores.png").height > 100


def test_labels_of_the_pixels_are_what_comes_without_options(curate, tmp_path):
    assert curate("categories", 0, 1)[0] == 0
    assert curate("captions", 1, 2)[0] == 0
    assert all(row["category"].startswith("graphic/") for row in rows(tmp_path, 2))


def test_an_image_text_model_sorts_into_a_tree_of_ones_own(curate, tmp_path):
    write_siglip_folder(tmp_path / "siglip")
    (tmp_path / "tree.txt").write_text("a\n  b\n  c\nd\n", encoding="utf-8")
    options = ("--model", tmp_path / "siglip", "--taxonomy", tmp_path / "tree.txt", "--method", "leaves")
    code, said = curate("categories", 0, 1, *options)
    assert code == 0
    assert "of 3 leaves are unused" in said
    assert {row["category"] for row in rows(tmp_path, 1)} <= {"a/b", "a/c", "d"}
    assert any((tmp_path / "text_features").iterdir())


def test_a_server_gets_nothing_without_leave_and_its_limits_hold(curate, tmp_path):
    answer = json.dumps({"long": "A shape.", "text": []})
    good = (200, {}, [event(answer), event(None, finish_reason="stop")], 0)
    with running_chat_server(good) as (url, requests):
        options = ("--server", url, "--lengths", "long", "--max-requests", 2, "--concurrency", 1)
        code, said = curate("captions", 0, 1, *options)
        assert (code, requests) == (1, [])
        assert "add --send" in said
        code, said = curate("captions", 0, 1, *options, "--send")
        assert code == 0
        assert len(requests) == 2
        assert "max_requests 2 is reached" in said
        assert "2 questions" in said
        made = [row.get("captions") for row in rows(tmp_path, 1)]
        assert made.count({"long": "A shape."}) == 2
        options = ("--server", url, "--lengths", "long", "--send")  # without the limit: only the rest is asked
        assert curate("captions", 0, 1, *options)[0] == 0
        assert len(requests) == len(made)
        assert all(row["captions"] for row in rows(tmp_path, 1))


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("categories", ["--model", "m", "--function", "f:g"], "exclude each other"),
        ("categories", ["--taxonomy", "t.txt"], "--taxonomy is read with"),
        ("captions", ["--vlm", "v", "--server", "http://x"], "exclude each other"),
        ("captions", ["--vlm", "nowhere"], "no config.json"),
        ("styles", ["--share", "keyword"], "STYLE=NUMBER"),
        ("styles", ["--share", "poem=1"], "styles must be some of"),
        ("scores", ["--scorer", "built-in beauty"], "built-in combined"),
        ("categories", ["--beam", "3"], "--beam would not be read: give --model"),
        ("captions", ["--language", "Chinese"], "--language would not be read: give --vlm or --server"),
        ("captions", ["--max-spend", "3"], "--max-spend would not be read: give --server"),
        ("styles", ["--temperature", "1", "--retries", "0"], "--temperature, --retries would not be read"),
    ],
    ids=[
        "two ways",
        "tree alone",
        "two models",
        "no model",
        "no number",
        "no style",
        "no scorer",
        "beam",
        "language",
        "spend",
        "warmth",
    ],
)
def test_what_cannot_be_is_told(curate, stage, options, message):
    code, said = curate(stage, 0, 1, *options)
    assert code == 1
    assert message in said
