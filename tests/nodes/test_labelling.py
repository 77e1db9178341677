"""The labelling nodes: widgets become the engine's settings, manifests follow each other, nothing is sent unasked."""

import contextlib
import json

import numpy as np
import pytest
from chat_server import event, running_chat_server
from ernie_pack.ernie_core.curation import captions, categories, styles, vision_language
from ernie_pack.ernie_core.curation.manifest import Manifest, write_rows
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.nodes import labelling
from ernie_pack.tiny.scenes import all_scenes, canonical_caption, draw
from PIL import Image
from tiny_image_text import write_siglip_folder, write_vlm_folder
from told_writer import Told

WIDGET_KINDS = ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
LABEL_NODES = ("ErnieCurateCategories", "ErnieCurateCaptions", "ErnieCurateCaptionStyles", "ErnieCurateScores")


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
def manifest(pile, tmp_path):
    folder = tmp_path / "output" / "curation" / "pile"
    folder.mkdir(parents=True)
    write_rows(folder / "01_ingest_0.jsonl", pile)
    return Manifest(folder / "01_ingest_0.jsonl")


@pytest.fixture
def label(run, node_classes, manifest):
    """label(node_id, **changes) -> outputs, the other widgets at their defaults, on the manifest of drawn scenes."""

    def call(node_id, **changes):
        widgets = {}
        for item in node_classes[node_id].GET_SCHEMA().inputs:
            if item.get_io_type() in WIDGET_KINDS:
                settings = item.as_dict()
                widgets[item.id] = settings.get("default", (settings.get("options") or [None])[0])
        sockets = {} if node_id in ("ErnieLoadCaptioner", "ErnieServerCaptioner") else {"manifest": manifest}
        return run(node_id, **(sockets | widgets | changes)).result

    return call


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip") / "clip"
    write_siglip_folder(folder)
    return folder


@pytest.fixture
def with_siglip(siglip, recording, monkeypatch):
    monkeypatch.setattr(recording, "scorer_path", lambda _name: siglip)
    return "clip_vision/clip/"


def test_the_choices_are_those_of_the_engine():
    assert labelling.METHODS == categories.METHODS
    assert labelling.FORMS == captions.FORMS
    assert (labelling.CUSTOM, *styles.PRESETS) == labelling.PRESETS
    assert labelling.PRECISIONS == vision_language.PRECISIONS
    assert (labelling.TEMPLATE,) == categories.TEMPLATES


def test_every_node_writes_the_next_manifest_and_nothing_is_made_twice(label):
    sorted_, report, picture = label("ErnieCurateCategories")
    assert sorted_.path.name.startswith("02_categories_")
    assert "effective categories" in report
    assert picture.ndim == 4
    described, report = label("ErnieCurateCaptions", manifest=sorted_)
    assert "0 pictures with captions" in report  # they have one that somebody wrote
    styled, report = label("ErnieCurateCaptionStyles", manifest=described)
    assert "asked for 25.0%" in report
    scored, report, picture = label("ErnieCurateScores", manifest=styled, scorer=BuiltinScorer())
    assert scored.path.name.startswith("05_scores_")
    assert "by category" in report
    rows = list(scored.rows())
    assert set(rows[0]["made_by"]) == {"categories", "captions", "styles", "scores"}
    assert all(row["prompts"] and row["category"] and row["description"] for row in rows)
    again = label("ErnieCurateScores", manifest=styled, scorer=BuiltinScorer())
    assert again[0] == scored
    assert " 0 made" in again[1]


@pytest.mark.parametrize("node_id", LABEL_NODES)
def test_a_cancel_keeps_what_is_made(label, recording, monkeypatch, node_id):
    def cancel():
        raise Interrupted

    monkeypatch.setattr(recording, "throw_if_interrupted", cancel)
    more = {"scorer": BuiltinScorer()} if node_id == "ErnieCurateScores" else {}
    with pytest.raises(Interrupted):
        label(node_id, **more)


def test_an_image_text_model_sorts_into_the_tree_that_is_written_out(label, with_siglip, recording, tmp_path):
    tree = "a\n  b\n  c\nd"
    made, report, _ = label("ErnieCurateCategories", model_name=with_siglip, taxonomy=tree)
    assert {row["category"] for row in made.rows()} <= {"a/b", "a/c", "d"}
    assert "of 3 leaves" in report
    assert ("place_scorer", "SiglipModel") in [call[:2] for call in recording.calls]
    assert any((tmp_path / "user" / "text_features").iterdir())
    (tmp_path / "input").mkdir(exist_ok=True)
    (tmp_path / "input" / "tree.txt").write_text(tree, encoding="utf-8")
    same = label("ErnieCurateCategories", model_name=with_siglip, taxonomy="tree.txt")
    assert same[0] == made


def test_the_stamp_of_a_tree_changes_with_its_file(node_classes, recording, tmp_path):
    (tmp_path / "input").mkdir(exist_ok=True)
    path = tmp_path / "input" / "tree.txt"
    stamp = node_classes["ErnieCurateCategories"].fingerprint_inputs
    none = stamp(taxonomy="tree.txt")
    path.write_text("a", encoding="utf-8")
    one = stamp(taxonomy="tree.txt")
    path.write_text("a\nb", encoding="utf-8")
    assert (
        len({str(s) for s in (none, one, stamp(taxonomy="tree.txt"), stamp(taxonomy=None), stamp(taxonomy="a\nb"))})
        == 5
    )


SERVER = {"send_pictures": True, "url": "http://127.0.0.1:1/v1"}
CHANGES = {  # (widget's new value, what else is set so that it is read)
    "ErnieCurateCategories": {
        "taxonomy": "x\n y\nz",
        "template": "the {name}",
        "method": "leaves",
        "beam": 1,
        "min_confidence": 0.5,
        "precision": "bf16",
    },
    "ErnieCurateCaptions": {
        "lengths": "short",
        "form": "plain",
        "language": "Chinese",
        "hints": True,
        "instruction": "Mind the hats.",
        "temperature": 0.5,
        "max_tokens": 99,
        "retries": 0,
        "draw_seed": 1,
    },
    "ErnieCurateCaptionStyles": {
        "preset": "as it is",
        "shares": "keyword 2, natural 1",
        "every": True,
        "temperature": 0.5,
        "max_tokens": 99,
        "retries": 0,
        "draw_seed": 1,
    },
    "ErnieCurateScores": {"column": "aes"},
}


@pytest.fixture
def keys(monkeypatch):
    """Keys of the stages that nodes run, and their batch sizes; they are not run."""
    seen = []

    def note(stage, manifest):
        seen.append((stage.key(), stage.name, stage.batch_size))
        return manifest, ""

    monkeypatch.setattr(labelling, "run", note)
    return seen


@pytest.mark.parametrize(("node_id", "widget"), [(n, w) for n, ws in CHANGES.items() for w in ws], ids=str)
def test_every_widget_reaches_the_stage(label, keys, with_siglip, node_id, widget):
    context = {
        "ErnieCurateCategories": {"model_name": with_siglip, "taxonomy": "a\n b\n c\nd"},
        "ErnieCurateCaptions": {"captioner": Told(["{}"])},
        "ErnieCurateCaptionStyles": {"captioner": Told(["{}"]), "preset": "custom"},
        "ErnieCurateScores": {"scorer": BuiltinScorer()},
    }[node_id]
    label(node_id, **context)
    label(node_id, **(context | {widget: CHANGES[node_id][widget]}))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("node_id", ["ErnieCurateCategories", "ErnieCurateCaptions", "ErnieCurateScores"])
def test_the_batch_size_reaches_the_stage(label, keys, node_id):
    context = {"scorer": BuiltinScorer()} if node_id == "ErnieCurateScores" else {}
    label(node_id, **context, batch_size=3)
    assert keys[0][2] == 3


def test_the_model_that_is_chosen_sorts(label, keys, with_siglip):
    label("ErnieCurateCategories")
    label("ErnieCurateCategories", model_name=with_siglip)
    label("ErnieCurateCategories", captioner=Told(["1"]))
    assert len({key for key, *_ in keys}) == 3


@pytest.mark.parametrize(
    ("node_id", "changes", "message"),
    [
        ("ErnieCurateCategories", {"taxonomy": "a\nb"}, "built-in labels have categories of their own"),
        ("ErnieCurateCategories", {"beam": 2}, "beam 2 would not be read: choose an image-text model"),
        ("ErnieCurateCategories", {"model_name": "m", "captioner": Told(["1"])}, "got both: set model_name"),
        ("ErnieCurateCategories", {"taxonomy": "none.txt", "captioner": Told(["1"])}, "none.txt"),
        ("ErnieCurateCaptions", {"language": "Chinese"}, "language 'Chinese' would not be read: connect a captioner"),
        ("ErnieCurateCaptions", {"lengths": "huge"}, "lengths must be some of"),
        ("ErnieCurateCaptions", {"lengths": ""}, "got none"),
        ("ErnieCurateCaptionStyles", {"retries": 5}, "retries 5 would not be read: connect a captioner or an enhancer"),
        ("ErnieCurateCaptionStyles", {"preset": "custom", "shares": "poem 1"}, "styles must be some of"),
        ("ErnieCurateCaptionStyles", {"preset": "custom", "shares": "keyword"}, "styles must be like"),
        ("ErnieCurateCaptionStyles", {"captioner": Told([]), "enhancer": 1}, "got both; disconnect one"),
        ("ErnieCurateScores", {"scorer": BuiltinScorer(), "column": "my score"}, "column must be a name"),
        ("ErnieServerCaptioner", {}, "switch send_pictures on to allow it"),
        ("ErnieServerCaptioner", SERVER | {"max_spend": 1.0}, "needs price_in or price_out"),
        ("ErnieServerCaptioner", SERVER | {"url": "here"}, "url must begin with"),
        ("ErnieLoadCaptioner", {"model_name": "VLM/gone/"}, "no config.json"),
    ],
    ids=range(16),
)
def test_what_would_be_ignored_or_cannot_be_is_refused(label, node_id, changes, message):
    with pytest.raises(ErnieError, match=message):
        label(node_id, **changes)


@pytest.mark.parametrize("node_id", LABEL_NODES)
def test_a_manifest_that_is_gone_is_named(label, tmp_path, node_id):
    more = {"scorer": BuiltinScorer()} if node_id == "ErnieCurateScores" else {}
    with pytest.raises(ErnieError, match="there is no manifest"):
        label(node_id, manifest=Manifest(tmp_path / "gone.jsonl"), **more)


def test_a_manifest_without_pictures_is_reported_and_drawn_as_nothing(label, tmp_path):
    write_rows(tmp_path / "empty.jsonl", [{"source": "x.png", "problem": "broken"}])
    made, report, picture = label("ErnieCurateCategories", manifest=Manifest(tmp_path / "empty.jsonl"))
    assert "no picture has a category" in report
    assert tuple(picture.shape) == (1, 64, 64, 3)
    *_, picture = label("ErnieCurateScores", manifest=made, scorer=BuiltinScorer())
    assert tuple(picture.shape) == (1, 64, 64, 3)


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_a_local_captioner_lies_under_the_hosts_memory_manager(label, recording, tmp_path):
    write_vlm_folder(tmp_path / "VLM" / "vlm", "llava")
    (captioner,) = label("ErnieLoadCaptioner", model_name="VLM/vlm/", precision="bf16", max_side=64)
    assert (captioner.precision, captioner.max_side_px) == ("bf16", 64)
    widgets = {"form": "plain", "max_tokens": 5, "retries": 0}
    made, report = label("ErnieCurateCaptions", captioner=captioner, **widgets)
    assert ("place_scorer", "LlavaForConditionalGeneration") in [call[:2] for call in recording.calls]
    assert all(row["captions"].keys() == {"long"} for row in made.rows() if "failed" not in row)
    assert "failed" in report


@pytest.fixture
def server():
    answer = json.dumps({"best": 1, "second": 2, "long": "A shape.", "text": []})
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(running_chat_server((200, {}, [event(answer), event(None, finish_reason="stop")], 0)))


def test_a_server_describes_sorts_and_counts_until_its_limit(label, server, manifest):
    url, requests = server
    widgets = {"send_pictures": True, "url": url, "model": "qwen", "max_side": 28, "concurrency": 1, "max_requests": 3}
    (captioner,) = label("ErnieServerCaptioner", **widgets)
    made, report = label("ErnieCurateCaptions", captioner=captioner, lengths="long")
    assert "3 questions" in report
    assert "max_requests 3 is reached" in report
    assert [row["captions"]["long"] for row in made.rows() if "captions" in row] == ["A shape."] * 3
    assert len(requests) == 3
    (captioner,) = label("ErnieServerCaptioner", **(widgets | {"max_requests": 0}))
    made, _ = label("ErnieCurateCaptions", captioner=captioner, lengths="long")
    assert len(requests) == len(manifest)  # those that were answered are not asked again
    sorted_, report, _ = label("ErnieCurateCategories", captioner=captioner, taxonomy="a\n b\n c\nd")
    assert {row["category"] for row in sorted_.rows()} == {"a/b"}
    assert "questions" in report


@pytest.mark.parametrize(
    ("widget", "value", "place"),
    [
        ("model", "qwen", lambda w: w.server.model),
        ("url", "http://127.0.0.1:2/v1", lambda w: w.server.url),
        ("key_variable", "MY_KEY", lambda w: w.server.key_variable),
        ("timeout", 7, lambda w: w.server.timeout_s),
        ("retries", 7, lambda w: w.server.retries),
        ("max_side", 99, lambda w: w.max_side_px),
        ("concurrency", 9, lambda w: w.concurrency),
        *((name, 7, lambda w, name=name: getattr(w.limits, name)) for name in ("max_requests", "max_tokens")),
        *((name, 7, lambda w, name=name: getattr(w.limits, name)) for name in ("price_in", "price_out", "per_minute")),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_widget_of_the_server_is_read(label, monkeypatch, widget, value, place):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    (writer,) = label("ErnieServerCaptioner", **(SERVER | {widget: value}))
    found = place(writer)
    assert found == value or str(found).startswith(str(value))


def test_an_enhancer_rewrites_and_falls_back_where_it_loses_something(label, manifest):
    class Enhancer:
        fingerprint = "e"

        def enhance_variants(self, prompt, _width, _height, *, seeds, system, **settings):
            return [f"draw {prompt}" if "star" in prompt else "" for _ in seeds]

    made, report = label(
        "ErnieCurateCaptionStyles", enhancer=Enhancer(), preset="custom", shares="instruction 1", retries=0
    )
    for row in made.rows():
        kept = row["prompts"].get("instruction") == f"draw {row['caption']}"
        assert kept or row["prompts"] == {"original": row["caption"]}
    assert "original kept, instruction: the answer is empty" in report
