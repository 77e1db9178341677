"""The stand-in for comfy_api.latest describes nodes as ComfyUI 0.12.1 does."""

import asyncio

import pytest
from ernie_pack.standalone import load_node_classes
from ernie_pack.standalone.comfy_api import io


@pytest.mark.parametrize(
    "make",
    [
        lambda: io.Schema(node_id="X", has_intermediate_output=True),
        lambda: io.Schema(node_id="X", essentials_category="image"),
        lambda: io.Int.Input("x", maximum=3),
        lambda: io.Int.Input("x", widget_type="FLOAT"),
        lambda: io.Image.Input("x", default=1),
        lambda: io.Combo.Input("x", options=[], force_input=True),
        lambda: io.Latent.Output(names=[]),
    ],
)
def test_arguments_0_12_1_does_not_know_are_type_errors(make):
    with pytest.raises(TypeError):
        make()


def test_inputs_turn_into_the_pairs_the_page_reads():
    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id="Node",
                inputs=[
                    io.Float.Input(
                        "cfg",
                        default=4.0,
                        min=0.0,
                        max=30.0,
                        step=0.1,
                        round=0.01,
                        display_mode=io.NumberDisplay.slider,
                    ),
                    io.String.Input("prompt", multiline=True, dynamic_prompts=True, force_input=True),
                    io.Combo.Input("file", ["a", "b"], upload=io.UploadType.image, extra_dict={"advanced": True}),
                    io.Custom("ERNIE_ENHANCER").Input("enhancer", optional=True, lazy=True),
                ],
            )

    assert Node.INPUT_TYPES() == {
        "required": {
            "cfg": (
                "FLOAT",
                {"default": 4.0, "min": 0.0, "max": 30.0, "step": 0.1, "round": 0.01, "display": "slider"},
            ),
            "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True, "forceInput": True}),
            "file": (
                "COMBO",
                {"options": ["a", "b"], "image_upload": True, "advanced": True, "multiselect": False},
            ),
        },
        "optional": {"enhancer": ("ERNIE_ENHANCER", {"lazy": True})},
    }


def test_types_keep_their_own_sockets():
    assert io.Model.Output(display_name="model").io_type == "MODEL"
    assert io.Image.Input("x").io_type == "IMAGE"
    assert io.Custom("A").Input("x").io_type == "A"
    template = io.MatchType.Template("t", [io.Image, io.Mask])
    assert io.MatchType.Input("x", template).as_dict()["template"]["allowed_types"] == "IMAGE,MASK"
    assert io.MultiType.Input(io.Int.Input("n", default=3), types=[io.Float]).get_io_type() == "INT,FLOAT"


def test_output_nodes_are_given_prompt_and_workflow():
    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Node", is_output_node=True, outputs=[io.Image.Output()])

    schema = Node.GET_SCHEMA()
    assert schema.hidden == [io.Hidden.prompt, io.Hidden.extra_pnginfo]
    assert schema.outputs[0].id == "_0_IMAGE_"
    assert Node.PREPARE_CLASS_CLONE({"hidden_inputs": {"PROMPT": {1: 2}}}).hidden.prompt == {1: 2}


def test_two_inputs_of_one_name_are_refused():
    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Node", inputs=[io.Int.Input("a"), io.Int.Input("a")])

    with pytest.raises(ValueError, match=r"Input ids must be unique, but \['a'\]"):
        Node.GET_SCHEMA()


def test_nodes_load_where_a_loop_runs_already():
    async def in_a_notebook():
        return load_node_classes()

    assert "ErnieSampler" in asyncio.run(in_a_notebook())
