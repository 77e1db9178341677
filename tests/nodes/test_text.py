"""Enhance Prompt: skipped when off, asked once, honest when nothing is connected."""

import collections
import importlib
from types import SimpleNamespace

import pytest
from ernie_pack.ernie_core.errors import ErnieError

WIDGETS = {
    **{"prompt": "a cat", "width": 64, "height": 64, "seed": 0, "temperature": 0.6, "top_p": 0.95, "top_k": 0},
    **{"min_p": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 8, "enabled": True},
}


def asked(recording) -> int:
    return sum(call[0] == "enhance" for call in recording.calls)


def test_switched_off_it_needs_no_enhancer_and_changes_nothing(run, node_classes, recording):
    assert node_classes["ErnieEnhancePrompt"].check_lazy_status(**(WIDGETS | {"enabled": False}), enhancer=None) == []
    assert run("ErnieEnhancePrompt", **(WIDGETS | {"enabled": False})).result == (
        *("a cat", "a cat", ["a cat"], "switched off"),
    )
    assert not recording.calls


def test_switched_on_the_enhancer_is_asked_for(node_classes, recording):
    assert node_classes["ErnieEnhancePrompt"].check_lazy_status(**WIDGETS, enhancer=None) == ["enhancer"]
    assert node_classes["ErnieEnhancePrompt"].check_lazy_status(**WIDGETS, enhancer=object()) == []


def test_both_texts_come_out(run, recording):
    enhancer = recording.make_enhancer("component")
    assert run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer).result[:2] == ("a detailed a cat", "a cat")


def test_the_same_question_is_asked_once(run, recording):
    enhancer = recording.make_enhancer("component")
    for seed in (0, 1, 0):
        run("ErnieEnhancePrompt", **(WIDGETS | {"seed": seed}), enhancer=enhancer)
    assert asked(recording) == 2


def test_what_was_asked_before_is_found_on_the_disk_unless_it_shall_not(run, recording):
    enhancer = recording.make_enhancer("component")
    first = run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer).result
    again = run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer).result
    assert first[:3] == again[:3]
    assert (first[3], again[3]) == ("1: seed 0; written", "1: seed 0; kept from before")
    assert asked(recording) == 1
    run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer, cache=False)
    assert asked(recording) == 2


def test_another_model_file_is_asked_again(run, recording):
    enhancer = recording.make_enhancer("component")
    run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer)
    enhancer.fingerprint = "another"
    run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer)
    assert asked(recording) == 2


def test_variants_are_a_list_and_only_new_ones_are_written(run, recording):
    enhancer = recording.make_enhancer("component")
    run("ErnieEnhancePrompt", **WIDGETS | {"seed": 1}, enhancer=enhancer)
    result = run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer, variants=3).result
    assert result[2] == ["a detailed a cat"] * 3
    assert recording.calls[-1][4] == [0, 2]
    assert result[3].splitlines() == ["1: seed 0; written", "2: seed 1; kept from before", "3: seed 2; written"]


def test_lost_quotes_are_tried_again_then_added_and_told(run, recording):
    enhancer = recording.make_enhancer("component")
    text, original, _, report = run(
        "ErnieEnhancePrompt", **WIDGETS | {"prompt": 'a sign "LOST"'}, enhancer=enhancer
    ).result
    assert text == 'a detailed a sign "..." The picture shows the text "LOST".'
    assert original == 'a sign "LOST"'
    assert report.endswith('written 3 times; "LOST" added at the end')
    assert asked(recording) == 3


def test_old_workflows_ask_what_they_asked_before(run, recording):
    """Without the inputs that came later: the official instruction, one seed, the five settings."""
    run("ErnieEnhancePrompt", **WIDGETS, enhancer=recording.make_enhancer("component"))
    settings = {k: WIDGETS[k] for k in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    settings |= {"max_new_tokens": 8, "system": None}
    assert recording.calls[-1] == ("enhance", "a cat", 64, 64, [0], sorted(settings.items()))


def test_both_prompts_go_where_saving_nodes_look(node_classes, recording):
    pnginfo = {"workflow": {}}
    hidden = {"UNIQUE_ID": "7", "EXTRA_PNGINFO": pnginfo}
    for _ in range(2):
        clone = node_classes["ErnieEnhancePrompt"].PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
        clone.EXECUTE_NORMALIZED(**WIDGETS, enhancer=recording.make_enhancer("component"))
    assert pnginfo["ernie_enhanced"] == [{"node": "7", "original": "a cat", "enhanced": ["a detailed a cat"]}]


@pytest.fixture
def picture_notes(monkeypatch):
    """The module, with nothing remembered."""
    module = importlib.import_module("ernie_pack.nodes.picture_notes")
    monkeypatch.setattr(module, "_runs", collections.deque(maxlen=3))
    monkeypatch.setattr(module, "_notes", collections.OrderedDict())
    monkeypatch.setattr(module, "MAX_KEPT", 3)
    return module


def queued(words="a cat", steps=4, *, enhance="ErnieEnhancePrompt"):
    """A request as the page makes it; `words` come over a link."""
    prompt = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": words}},
        "7": {"class_type": enhance, "inputs": {"prompt": ["1", 0], "seed": 3}},
        "8": {"class_type": "ErnieSampler", "inputs": {"steps": steps, "positive": ["7", 0]}},
    }
    return {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": {}}}}


def notes_in(request):
    return request["extra_data"]["extra_pnginfo"].get("ernie_enhanced")


def execute_enhance(picture_notes, request, *texts):
    pnginfo = request["extra_data"]["extra_pnginfo"]
    hidden = SimpleNamespace(unique_id="7", prompt=request["prompt"], extra_pnginfo=pnginfo)
    picture_notes.note_in_pictures(hidden, "a cat", list(texts))


def test_runs_that_reuse_the_text_have_its_note(picture_notes):
    first, waiting, other = queued(), queued(steps=8), queued("a dog")
    for request in (first, waiting, other):
        picture_notes.note_queued_run(request)
    assert [notes_in(r) for r in (first, waiting, other)] == [None] * 3
    execute_enhance(picture_notes, first, "one")
    later = queued(steps=9)
    picture_notes.note_queued_run(later)
    note = [{"node": "7", "original": "a cat", "enhanced": ["one"]}]
    assert [notes_in(r) for r in (first, waiting, later, other)] == [note, note, note, None]


def test_a_text_that_is_written_anew_takes_the_place_of_the_note(picture_notes):
    execute_enhance(picture_notes, queued(), "one")
    again = queued()
    picture_notes.note_queued_run(again)
    execute_enhance(picture_notes, again, "two")
    assert [note["enhanced"] for note in notes_in(again)] == [["two"]]


@pytest.mark.parametrize("sent", [3, ["x"], [{}], None])
def test_what_a_caller_sent_under_the_name_is_replaced(picture_notes, sent):
    request = queued()
    request["extra_data"]["extra_pnginfo"]["ernie_enhanced"] = sent
    execute_enhance(picture_notes, request, "one")
    assert [note["enhanced"] for note in notes_in(request)] == [["one"]]


def test_no_more_is_remembered_than_allowed(picture_notes):
    for i in range(9):
        request = queued(f"cat {i}")
        picture_notes.note_queued_run(request)
        execute_enhance(picture_notes, request, "text")
    assert (len(picture_notes._runs), len(picture_notes._notes)) == (3, 3)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"prompt": [], "extra_data": {"extra_pnginfo": {}}},
        {"prompt": {"7": None, "8": {"class_type": "ErnieEnhancePrompt"}}, "extra_data": {"extra_pnginfo": {}}},
        {"prompt": {"7": {"class_type": "ErnieEnhancePrompt", "inputs": {"prompt": ["7", 0]}}}, "extra_data": None},
        {
            "prompt": {"7": {"class_type": "ErnieEnhancePrompt", "inputs": {"prompt": ["7", 0], "x": [[], 0]}}},
            "extra_data": {"extra_pnginfo": {}},
        },
    ],
)
def test_a_malformed_request_is_left_to_the_host(picture_notes, request_):
    picture_notes.note_queued_run(request_)
    assert not picture_notes._notes


def test_nothing_connected_is_an_error_that_says_what_to_do(run, recording):
    with pytest.raises(ErnieError, match="needs an enhancer: connect Load Prompt Enhancer"):
        run("ErnieEnhancePrompt", **WIDGETS)


SERVER = {"url": "http://127.0.0.1:9/v1/", "model": "m", "key_variable": "", "timeout": 7, "retries": 0}


def test_a_server_is_asked_only_when_prompts_may_be_sent(run):
    with pytest.raises(ErnieError, match="switch send_prompts on to allow it"):
        run("ErnieServerEnhancer", **SERVER, send_prompts=False)
    (enhancer,) = run("ErnieServerEnhancer", **SERVER, send_prompts=True).result
    assert (enhancer.url, enhancer.model) == ("http://127.0.0.1:9/v1/chat/completions", "m")
    assert (enhancer.timeout_s, enhancer.retries, enhancer.key_variable) == (7, 0, "")
    with pytest.raises(ErnieError, match="cannot be reached"):
        run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer)
