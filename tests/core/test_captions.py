"""Captions: what is asked, what becomes of answers, tries and failures, and the stage; and categories by asking."""

import pickle

import numpy as np
import pytest
from ernie_pack.ernie_core.curation.answers import LENGTHS
from ernie_pack.ernie_core.curation.asked_categories import LanguageCategoriser
from ernie_pack.ernie_core.curation.builtin_labels import BuiltinCaptioner
from ernie_pack.ernie_core.curation.captions import Captions, LanguageCaptioner, best_text, report
from ernie_pack.ernie_core.curation.categories import Assignment, Categories
from ernie_pack.ernie_core.curation.engines import run_stage
from ernie_pack.ernie_core.curation.manifest import read_rows, write_rows
from ernie_pack.ernie_core.curation.own_labels import OwnLabels
from ernie_pack.ernie_core.curation.taxonomy import parse_taxonomy
from ernie_pack.ernie_core.curation.vision_language import LimitReached, LocalWriter
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.tiny.scenes import all_scenes, canonical_caption, draw
from PIL import Image
from tiny_image_text import write_vlm_folder
from told_writer import Told

PICTURE = Image.new("RGB", (8, 8))
GOOD = {
    "type": "poster",
    "text": ["SALE", "\u5168\u573a"],
    "entities": ["Rome"],
    "long": 'A poster with "SALE" and "\u5168\u573a" on it.',
    "medium": 'A poster, "SALE", "\u5168\u573a".',
    "short": "A poster.",
    "tags": ["poster", "sale"],
    "prompt": "sale poster",
}


def describe(*calls, rows=None, **options):
    writer = Told(*calls)
    rows = rows or [{"id": str(i)} for i in range(len(calls[0]))]
    return LanguageCaptioner(writer, **options).describe(rows, [PICTURE] * len(rows)), writer


def test_a_good_answer_becomes_columns_as_it_is():
    (found,), writer = describe([GOOD])
    assert found == {
        "description": {"type": "poster", "entities": ["Rome"], "text": ["SALE", "\u5168\u573a"]},
        "captions": {k: GOOD[k] if k != "tags" else "poster, sale" for k in LENGTHS},
        "caption_notes": [],
    }
    assert len(writer.asked) == 1


def test_only_what_was_lost_is_asked_again_warmer_and_with_another_seed():
    lost = GOOD | {"long": "A poster with SALE on it."}
    found, writer = describe([GOOD, lost, "nothing"], [GOOD, "nothing"], [GOOD])
    assert found == [found[0]] * 3
    assert [len(texts) for texts, *_ in writer.asked] == [3, 2, 1]
    assert [t for *_, t, _ in writer.asked] == [0.0, 0.7, 0.7]
    assert len({seed for _, seeds, *_ in writer.asked for seed in seeds}) == 6


def test_text_that_stays_lost_is_added_in_quotes_and_noted():
    lost = GOOD | {"long": "A poster with 'SALE'.", "medium": "A poster."}
    (found,), writer = describe([lost])
    assert len(writer.asked) == 3
    assert found["captions"]["long"].startswith("A poster with 'SALE'. ")
    assert '"\u5168\u573a"' in found["captions"]["long"]
    assert '"SALE"' in found["captions"]["medium"]
    assert len(found["caption_notes"]) == 3
    assert found["captions"]["short"] == GOOD["short"]


def test_of_several_tries_the_one_with_fewest_faults_is_kept():
    worse = {"long": GOOD["long"], "text": GOOD["text"]}
    better = {k: v for k, v in GOOD.items() if k != "tags"}
    (found,), _ = describe([worse], [better], [worse])
    assert found["captions"].keys() == set(LENGTHS) - {"tags"}
    assert found["caption_notes"] == ["no tags caption"]


def test_an_answer_that_cannot_be_read_fails_its_row_with_what_it_said():
    (good, bad), _ = describe([GOOD, "I think it is a fox"], ["I think it is a fox"])
    assert good["captions"]
    assert isinstance(bad, ErnieError)
    assert "no JSON object: 'I think it is a fox'" in str(bad)


def test_what_the_writer_gave_up_is_not_asked_again():
    found, writer = describe([GOOD, LimitReached("not asked: 3")])
    assert str(found[1]) == "not asked: 3"
    assert len(writer.asked) == 1


def test_the_question_names_what_is_asked_for():
    writer = Told([GOOD])
    everything = LanguageCaptioner(writer).question({})
    assert all(f'"{name}"' in everything for name in (*LENGTHS, "type", "entities", "text"))
    some = LanguageCaptioner(writer, lengths=["short"], language="Chinese", instruction="Mind the hats.")
    assert '"long"' not in some.question({})
    assert "Chinese" in some.question({})
    assert some.question({}).endswith("Mind the hats.")
    row = {"caption": "my dog", "category": "animals/dog"}
    assert "my dog" not in some.question(row)
    hinted = LanguageCaptioner(writer, hints=True)
    assert "my dog" in hinted.question(row)
    assert "animals/dog" in hinted.question(row)
    assert hinted.question({}) == everything


def test_lengths_that_were_not_asked_for_are_left_out():
    (found,), _ = describe([GOOD], lengths=["short", "tags"])
    assert found["captions"].keys() == {"short", "tags"}


def test_the_plain_form_takes_a_paragraph_and_no_apology():
    (good, bad, empty), _ = describe(
        ['A shop\nwith "OPEN".', "I'm sorry, but no.", ""], ["I'm sorry, but no.", ""], form="plain", lengths=["long"]
    )
    assert good["captions"] == {"long": 'A shop with "OPEN".'}
    assert good["description"] == {"text": ["OPEN"]}
    assert "refused: \"I'm sorry" in str(bad)
    assert "empty" in str(empty)


def test_the_key_changes_with_all_that_decides_the_captions():
    settings = [
        *({}, {"lengths": ["long"]}, {"form": "plain"}, {"language": "Chinese"}, {"hints": True}, {"retries": 0}),
        *({"instruction": "x"}, {"temperature": 0.5}, {"max_tokens": 99}, {"seed": 1}),
    ]
    keys = {LanguageCaptioner(Told([GOOD]), **options).key() for options in settings}
    assert len(keys) == len(settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ["huge"]}, "lengths must be some of long, .*got huge"),
        ({"lengths": []}, "got none"),
        ({"form": "x"}, "form must be one of"),
        ({"temperature": float("nan")}, "between 0 and 2, got nan"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"retries": -1}, "retries must be 0 or more"),
        ({"language": " "}, "language is empty"),
    ],
    ids=["length", "none", "form", "temperature", "tokens", "retries", "language"],
)
def test_a_wrong_setting_is_named(options, message):
    with pytest.raises(ErnieError, match=message):
        LanguageCaptioner(Told([GOOD]), **options)


def test_the_fullest_text_of_a_row_is_found():
    row = {"caption": "beside", "captions": {"tags": "t", "short": "s"}}
    assert best_text(row) == "s"
    assert best_text(row | {"prompts": {"keyword": "p", "natural": "q"}, "prompt_style": "natural"}) == "q"
    assert best_text({"caption": "beside", "captions": {}}) == "beside"
    assert best_text({}) == ""


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i, scene in enumerate(all_scenes()[::3000][:4]):
        Image.fromarray(draw(scene, rng)).save(tmp_path / f"{i}.png")
        rows.append({"id": str(i), "source": str(tmp_path / f"{i}.png"), "caption": canonical_caption(scene)})
    (tmp_path / "bad.png").write_bytes(b"")
    rows.append({"id": "bad", "source": str(tmp_path / "bad.png"), "caption": ""})
    write_rows(tmp_path / "in.jsonl", rows)
    return tmp_path / "in.jsonl"


def test_a_local_models_nonsense_fails_row_by_row_and_stops_nothing(manifest, tmp_path):
    write_vlm_folder(tmp_path / "vlm", "llava")
    captioner = LanguageCaptioner(LocalWriter(tmp_path / "vlm"), max_tokens=6, retries=0)
    summary = run_stage(Captions(captioner), manifest, tmp_path / "out.jsonl")
    assert (summary.rows, summary.failed) == (5, 5)
    text = report(list(read_rows(tmp_path / "out.jsonl")))
    assert "0 pictures with captions" in text
    assert text.count("no JSON object") + text.count("is empty") >= 4
    assert "bad.png: " in text
    plain = LanguageCaptioner(LocalWriter(tmp_path / "vlm"), max_tokens=6, retries=0, form="plain", lengths=["long"])
    stage = pickle.loads(pickle.dumps(Captions(plain, batch_size=3)))
    assert run_stage(stage, manifest, tmp_path / "plain.jsonl").failed == 1
    assert report(read_rows(tmp_path / "plain.jsonl")).startswith("4 pictures with captions: 4 long")


def test_built_in_captions_say_what_was_measured_and_never_stand_before_what_somebody_wrote(manifest, tmp_path):
    rows = list(read_rows(manifest))
    for row in rows[1:]:
        row["caption"] = ""
    write_rows(manifest, rows)
    run_stage(Captions(BuiltinCaptioner()), manifest, tmp_path / "out.jsonl")
    written, *bare, bad = read_rows(tmp_path / "out.jsonl")
    assert "captions" in bad["failed"]
    assert best_text(written) == written["caption"] != ""
    assert written["description"]["type"] == "graphic"
    for row in bare:
        assert set(row["captions"]) == set(LENGTHS)
        assert "graphic" in row["captions"]["long"]
        assert row["caption_notes"] == ["measured on the pixels: no object is named"]


def test_a_function_of_ones_own_labels_drawn_scenes_as_they_were_drawn(manifest, tmp_path):
    labels = OwnLabels("ernie_pack.tiny.labels:label")
    run_stage(Captions(labels), manifest, tmp_path / "a.jsonl")
    run_stage(pickle.loads(pickle.dumps(Categories(labels))), tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    *rows, bad = read_rows(tmp_path / "b.jsonl")
    assert set(bad["failed"]) == {"captions", "categories"}
    for row in rows:
        assert row["captions"]["medium"] == row["caption"]
        shape, color = row["category"].split("/")
        assert f"{color} {shape}" in row["caption"]
        assert row["category_confidence"] > 0.8


def test_a_function_that_is_none_or_says_nonsense_is_named(monkeypatch):
    from ernie_pack.tiny import labels

    for name in ("ernie_pack.tiny.labels:nothing", "no_such_module:f", "label"):
        with pytest.raises(ErnieError, match=r"package\.module:function"):
            OwnLabels(name)
    own = OwnLabels("ernie_pack.tiny.labels:label")
    for said, message in (
        (3, "must return a dict, got int"),
        ({}, "gave no caption"),
        ({"captions": {"x": "y"}}, "lengths x"),
    ):
        monkeypatch.setattr(labels, "label", lambda _picture, said=said: said)
        (found,) = own.describe([{}], [PICTURE])
        assert isinstance(found, ErnieError)
        assert message in str(found)


# --- categories by asking ---------------------------------------------------------------------------------------------

TREE = parse_taxonomy("a\n b\n c | the sea\nd\n e\n  f\n  g\n h\n")


def sort(*calls):
    writer = Told(*calls)
    return LanguageCategoriser(writer, TREE).assign([PICTURE] * len(calls[0])), writer


def test_a_model_is_asked_level_by_level_and_its_second_choice_kept():
    found, writer = sort(
        [{"best": 1, "second": 2}, 'I say {"best": "2"}'], ["2", {"best": 1, "second": 2}], [{"best": 2}]
    )
    assert found[0] == Assignment(category="a/c", confidence=None, runner_up="d")
    assert found[1] == Assignment(category="d/e/g", confidence=None, runner_up="d/h")
    assert [len(texts) for texts, *_ in writer.asked] == [2, 2, 1]
    assert "2. the sea" in writer.asked[1][0][0]
    assert all(t == 0 for *_, t, _ in writer.asked)


def test_none_of_them_ends_at_the_branch():
    found, _ = sort([{"best": 0}, {"best": 2, "second": 2}], [{"best": 0, "second": 1}])
    assert found[0].category == ""
    assert (found[1].category, found[1].runner_up) == ("d", "d/e")


def test_an_answer_that_is_no_choice_is_asked_again_and_fails_in_the_end():
    found, writer = sort(["well", {"best": 9}], ["1", {"best": -2}], [{"best": 9}], ["1"])
    assert found[0].category == "a/b"
    assert "a number from 0 to 2 was asked for" in str(found[1])
    assert [len(texts) for texts, *_ in writer.asked] == [2, 2, 1, 1]


def test_a_branch_that_is_too_wide_is_named():
    with pytest.raises(ErnieError, match="a has 201 categories"):
        LanguageCategoriser(Told(["1"]), parse_taxonomy("a\n" + "".join(f" {i}\n" for i in range(201))))
