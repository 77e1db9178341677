"""What the nodes promise to saved workflows and to the people who read them."""

import json
from pathlib import Path

import pytest
from node_schemas import describe

# Made by `python tests/support/node_schemas.py > tests/nodes/schemas.json`.
PINNED = json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8"))


def test_no_node_appears_or_vanishes_unnoticed(node_classes):
    assert sorted(node_classes) == sorted(PINNED)


@pytest.mark.parametrize("node_id", sorted(PINNED))
def test_the_interface_is_the_pinned_one(node_classes, recording, node_id):
    assert json.loads(json.dumps(describe(node_classes[node_id]))) == PINNED[node_id]


@pytest.mark.parametrize("node_id", sorted(PINNED))
def test_everything_is_explained(node_classes, recording, node_id):
    cls = node_classes[node_id]
    schema = cls.GET_SCHEMA()
    assert cls.__name__ == schema.node_id == node_id
    assert schema.category.split("/")[0] == "ERNIE"
    assert schema.description.endswith(".")
    assert ". " not in schema.description, "one sentence"
    for item in schema.inputs:
        assert (item.tooltip or "").endswith("."), item.id
    for output in schema.outputs:
        assert output.display_name, output.io_type
        assert (output.tooltip or "").endswith("."), output.display_name


@pytest.mark.parametrize("node_id", sorted(PINNED))
def test_every_number_says_its_range(node_classes, recording, node_id):
    for item in node_classes[node_id].GET_SCHEMA().inputs:
        if item.get_io_type() in ("INT", "FLOAT"):
            settings = item.as_dict()
            assert settings["min"] <= settings["default"] <= settings["max"], item.id


@pytest.mark.parametrize("node_id", sorted(PINNED))
def test_linked_inputs_are_no_fault_of_the_fingerprint(node_classes, recording, node_id):
    """The host asks before it knows what links bring: None, or (None,) for nodes that take lists."""
    cls = node_classes[node_id]
    schema = cls.GET_SCHEMA()
    if any(
        "fingerprint_inputs" in vars(base) for base in cls.__mro__ if base.__module__.startswith("ernie_pack.nodes")
    ):
        unknown = (None,) if schema.is_input_list else None
        cls.fingerprint_inputs(**{item.id: unknown for item in schema.inputs})
