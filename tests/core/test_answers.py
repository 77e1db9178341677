"""Reading answers: every form that models write JSON in, and nothing that they did not write."""

import json

import pytest
from ernie_pack.ernie_core.curation.answers import instructions, is_refusal, read_description, read_object
from ernie_pack.ernie_core.errors import ErnieError

WHOLE = {"type": "poster", "text": ["SALE \u201350 %", 'a "b"'], "long": "x {y}, z"}


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(WHOLE),
        "```json\n" + json.dumps(WHOLE, indent=2) + "\n```",
        '<think>maybe {"type": 1}?</think>Here it is: ' + json.dumps(WHOLE) + "\nHope it helps {really}!",
        json.dumps(WHOLE)[:-1] + ",\n}",
        str(WHOLE),
    ],
    ids=["plain", "fenced", "talk", "trailing comma", "single quotes"],
)
def test_every_form_of_an_object_is_read(answer):
    assert read_object(answer) == (WHOLE, False)


def test_line_breaks_inside_of_texts_are_borne():
    assert read_object('{"long": "a\nb"}') == ({"long": "a\nb"}, False)


@pytest.mark.parametrize("end", range(1, 60))
def test_of_an_answer_that_was_cut_only_complete_fields_are_kept(end):
    text = '{"type": "a, b", "text": ["c, d", "e"], "long": "it\'s {f}, g"}'[:end]
    whole = {"type": "a, b", "text": ["c, d", "e"], "long": "it's {f}, g"}
    try:
        found, was_cut = read_object(text)
    except ErnieError:
        assert end < 17
        return
    assert was_cut
    assert found.items() <= whole.items() if "text" not in found else found["text"] == ["c, d", "e"]


@pytest.mark.parametrize("answer", ["", "A fox.", "[1, 2]", "{}", "{nonsense", "{'a'"], ids=range(6))
def test_what_is_no_object_is_an_error(answer):
    with pytest.raises(ErnieError, match=r"no JSON object|is empty"):
        read_object(answer)


def test_fields_are_found_by_their_other_names_and_unknown_ones_are_noted():
    answer = json.dumps(
        {"Image Type": "photo", "visible_text": "OPEN", "keywords": "a; b,c", "Caption": "L", "mood": "m"}
    )
    description, captions, notes = read_description(answer)
    assert description == {"type": "photo", "text": ["OPEN"]}
    assert captions == {"long": "L", "tags": "a, b, c"}
    assert notes == ["field 'mood' left out"]


def test_placeholders_and_wrong_kinds_become_nothing():
    answer = {"type": "N/A", "subject": None, "scene": 3, "style": ["a", "b"], "text": "none", "entities": [{"x": 1}]}
    description, captions, notes = read_description(json.dumps(answer | {"short": "s"}))
    assert description == {"style": "a, b", "text": []}
    assert captions == {"short": "s"}
    assert notes == ["field scene was of a wrong kind", "field entities was of a wrong kind"]


def test_texts_with_places_and_numbers_are_read_as_texts():
    answer = {"text": [{"text": "\u8425\u4e1a\u4e2d", "position": "top"}, 2024, " two \n lines "], "long": "l"}
    assert read_description(json.dumps(answer))[0] == {"text": ["\u8425\u4e1a\u4e2d", "2024", "two lines"]}


def test_nothing_that_is_in_the_result_was_not_in_the_answer():
    answer = '{"type": "poster", "text": ["SALE"], "long": "A poster", "tags": ["x", "y"]}'
    description, captions, _ = read_description(answer)
    for value in (*description.values(), *captions.values()):
        for part in value if isinstance(value, list) else value.split(", "):
            assert part in answer


def test_an_answer_with_other_fields_only_is_an_error():
    with pytest.raises(ErnieError, match="none of the fields asked for"):
        read_description('{"a": 1}')


def test_apologies_are_known_in_both_languages():
    assert is_refusal(" I\u2019m sorry, but I can't help.")
    assert is_refusal(instructions()["refusals"][-1] + "...")
    assert not is_refusal("A sorry sight: an old house.")
