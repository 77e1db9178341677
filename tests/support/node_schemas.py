"""Print the published interface of the nodes as JSON.

    python tests/support/node_schemas.py > tests/nodes/schemas.json

Run it when an id, an input, a default or an output changed on purpose, and look at the difference: saved workflows
depend on all of them.
"""

import asyncio
import importlib
import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Widgets that list files: what they offer is the machine's, not ours.
FILE_LISTS = {
    *("model_name", "encoder_name", "enhancer_name", "vae_name", "turbo_name", "folder"),
    *("initial_lora", "reference_lora", "lora_name", "lora_1", "lora_2", "lora_3", "lora_4", "base_name", "tuned_name"),
    *("scorer_name", "backbone"),
}
WIDGET_KEYS = ("default", "min", "max", "step", "options", "multiline", "lazy")


def describe(cls) -> dict:
    """One node class as plain data, without the texts that may be reworded."""
    schema = cls.GET_SCHEMA()
    inputs = {}
    for item in schema.inputs:
        settings = {k: v for k, v in item.as_dict().items() if k in WIDGET_KEYS and v not in (None, False)}
        if item.id in FILE_LISTS:
            settings.pop("options", None)
        inputs[item.id] = {"type": item.get_io_type(), **settings} | ({"optional": True} if item.optional else {})
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "inputs": inputs,
        "outputs": [
            f"{out.display_name}: {out.io_type}{' list' if out.is_output_list else ''}" for out in schema.outputs
        ],
    }


def find_classes() -> dict[str, type]:
    """Node id -> class, for all nodes of the extension."""
    extension = importlib.import_module("ernie_pack.nodes").ErnieExtension()
    return {cls.__name__: cls for cls in asyncio.run(extension.get_node_list())}


def load_nodes() -> dict[str, type]:
    """The node classes outside a test run: loads the pack, and lets the recording host list the files."""
    from recording_host import RecordingHost

    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    importlib.import_module("ernie_pack.standalone").load_pack()
    classes = find_classes()
    for node in classes.values():
        sys.modules[node.__module__].host = RecordingHost(ROOT)
    return classes


if __name__ == "__main__":
    described = {node_id: describe(node) for node_id, node in load_nodes().items()}
    sys.stdout.write(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
