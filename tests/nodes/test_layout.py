"""Layout Prompt: the engine's prompt, and the exact count where a text encoder is connected."""

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.layout_prompt import LayoutPrompt

FIELDS = {
    **{"layout": "poster", "language": "en", "subject": "a fox", "style": "", "title": "OPEN", "subtitle": ""},
    **{"body": "Free entry", "columns": 2, "rows": 2},
}


def test_the_prompt_is_the_engines_and_both_texts_are_shown(run, recording):
    output = run("ErnieLayoutPrompt", **FIELDS)
    prompt, report = output.result
    assert prompt == LayoutPrompt(**FIELDS).write()
    assert "about" in report
    assert output.ui["text"] == [f"{prompt}\n\n{report}"]
    assert not recording.calls


def test_a_connected_encoder_counts_and_refuses_what_it_would_cut(run, recording):
    prompt, report = run("ErnieLayoutPrompt", **FIELDS, clip="CLIP").result
    assert recording.calls == [("count_tokens", "CLIP", prompt)]
    assert f"{len(prompt.split())} tokens of 2048" in report
    with pytest.raises(ErnieError, match="tokens and the text encoder reads 2048"):
        run("ErnieLayoutPrompt", **FIELDS | {"subject": "x " * 3000}, clip="CLIP")


def test_fields_that_do_not_fit_stop_the_node(run, recording):
    with pytest.raises(ErnieError, match="5 lines, one per panel"):
        run("ErnieLayoutPrompt", **FIELDS | {"layout": "comic", "body": "a\nb\nc\nd\ne"})
