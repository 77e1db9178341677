"""Teacher Table in a running ComfyUI: the files it lists, the picture it draws, the text that it takes back."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_server import HostError
from ernie_pack.ernie_core.training.teacher_chart import draw_table
from ernie_pack.ernie_core.training.teachers import make_table, write_table

pytestmark = pytest.mark.host

EMPTY = {f"lora_{i}": "none" for i in range(1, 5)} | {"preset": "as written", "text": "", "blend": 0.0}


@pytest.fixture(scope="module")
def files(server) -> list[str]:
    """Two LoRAs that the widgets list."""
    listed = server.get_json("/object_info/ErnieTeacherTable")["ErnieTeacherTable"]["input"]["required"]["lora_1"]
    options = listed[1]["options"] if listed[0] == "COMBO" else listed[0]
    assert options[0] == "none"
    return options[1:3]


def graph(**inputs):
    prompt = {"1": {"class_type": "ErnieTeacherTable", "inputs": EMPTY | inputs}}
    prompt["picture"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}}
    return prompt | {"text": {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}}}


def run(server, **inputs) -> tuple[np.ndarray, str]:
    finished = server.run(graph(**inputs))
    picture = server.picture(finished.outputs["picture"]["images"][0])
    return np.asarray(picture.convert("RGB")), finished.outputs["text"]["text"][0]


def test_picture_and_text_are_the_engines_and_the_text_goes_back_in(server, files):
    chosen = {"lora_1": files[0], "lora_3": files[1], "preset": "by noise level", "blend": 0.1}
    picture, text = run(server, **chosen)
    table = make_table("", files, "by noise level", 0.1)
    assert text == write_table(table)
    assert np.array_equal(picture, draw_table(table))
    again, same = run(server, text=text)
    assert same == text
    assert np.array_equal(again, picture)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "* | 1 - 0 | CA | base 0.5"}, "line 1 of the table of teachers"),
        ({"text": "teacher x | gone.safetensors\n* | * | * | x"}, "gone.safetensors is not in models/loras any more"),
        ({"preset": "by term"}, "is for 2 LoRAs, got 0: none"),
        ({"blend": 2.0}, "bigger than max"),
    ],
    ids=["weights", "file", "preset", "blend"],
)
def test_bad_input_is_named(server, inputs, message):
    with pytest.raises(HostError, match=message):
        server.run(graph(**inputs))
