"""Enhance Prompt: skipped when off, asked once, honest when nothing is connected."""

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
    assert run("ErnieEnhancePrompt", **(WIDGETS | {"enabled": False})).result == ("a cat", "a cat")
    assert not recording.calls


def test_switched_on_the_enhancer_is_asked_for(node_classes, recording):
    assert node_classes["ErnieEnhancePrompt"].check_lazy_status(**WIDGETS, enhancer=None) == ["enhancer"]
    assert node_classes["ErnieEnhancePrompt"].check_lazy_status(**WIDGETS, enhancer=object()) == []


def test_both_texts_come_out(run, recording):
    enhancer = recording.make_enhancer("component")
    assert run("ErnieEnhancePrompt", **WIDGETS, enhancer=enhancer).result == ("a detailed a cat", "a cat")


def test_the_same_question_is_asked_once(run, recording):
    enhancer = recording.make_enhancer("component")
    for seed in (0, 1, 0):
        run("ErnieEnhancePrompt", **(WIDGETS | {"seed": seed}), enhancer=enhancer)
    assert asked(recording) == 2


def test_the_cache_does_not_grow_for_ever(run, recording):
    from ernie_pack.nodes.text import CACHE_SIZE, _enhanced

    enhancer = recording.make_enhancer("component")
    for seed in range(CACHE_SIZE + 3):
        run("ErnieEnhancePrompt", **(WIDGETS | {"seed": seed}), enhancer=enhancer)
    assert len(_enhanced) == CACHE_SIZE


def test_nothing_connected_is_an_error_that_says_what_to_do(run, recording):
    with pytest.raises(ErnieError, match="needs an enhancer: connect Load Prompt Enhancer"):
        run("ErnieEnhancePrompt", **WIDGETS)
