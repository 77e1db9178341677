"""Layout Prompt in a running ComfyUI: what it writes, what it counts, what it refuses."""

import pytest
from comfyui_server import HostError
from ernie_pack.ernie_core.layout_prompt import LayoutPrompt
from ernie_pack.ernie_core.weights.checkpoint import read_component
from ernie_pack.standalone import host

pytestmark = pytest.mark.host

FIELDS = {
    **{"layout": "comic", "language": "zh", "subject": "a fox", "style": "ink", "title": "NIGHT", "subtitle": ""},
    **{"body": 'it jumps: "Hop!"\na door', "columns": 2, "rows": 1},
}
OURS = {"class_type": "ErnieLoadTextEncoder", "inputs": {"encoder_name": "ministral-3-3b.safetensors", "rope": "yarn"}}


def graph(clip=None, **fields):
    """The node with both outputs shown."""
    prompt = {"1": {"class_type": "ErnieLayoutPrompt", "inputs": FIELDS | fields}}
    for i in (0, 1):
        prompt[f"show{i}"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", i]}}
    if clip is not None:
        prompt |= {"clip": clip}
        prompt["1"]["inputs"] |= {"clip": ["clip", 0]}
    return prompt


def texts(finished):
    return [finished.outputs[f"show{i}"]["text"][0] for i in (0, 1)]


def test_the_prompt_is_the_engines(server):
    prompt, report = texts(server.run(graph()))
    assert prompt == LayoutPrompt(**FIELDS).write()
    assert "about" in report
    assert report.endswith("shows: NIGHT\nshows: Hop!")


def test_a_connected_encoder_counts_exactly(server):
    prompt, report = texts(server.run(graph(OURS)))
    path = server.base / "models" / "text_encoders" / OURS["inputs"]["encoder_name"]
    clip = host.make_clip(read_component(path, "text_encoder"))
    assert f", {host.count_tokens(clip, prompt)} tokens of 2048" in report


def test_too_many_tokens_are_refused(server):
    with pytest.raises(HostError, match="tokens and the text encoder reads 2048: shorten the fields"):
        server.run(graph(OURS, subject="word " * 2100))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"columns": 0}, "smaller than min"),
        ({"body": "a\nb\nc"}, "3 lines, one per panel, and the grid of 2 x 1 holds 2"),
        ({"title": "a\nb"}, "title must be one line, got 2"),
        ({"subject": 'says "no'}, 'subject has a " without its partner'),
    ],
)
def test_bad_fields_are_said(server, fields, message):
    with pytest.raises(HostError) as error:
        server.run(graph(**fields))
    assert message in str(error.value).replace('\\"', '"')
