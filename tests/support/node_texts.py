"""Print the nodes' English texts in the format of the front end's locale files.

    python tests/support/node_texts.py > locales/en/nodeDefs.json

Run it when a text of a schema changed; then bring locales/zh/nodeDefs.json up to date by hand.
"""

import json
import sys

from node_schemas import load_nodes


def describe_texts(cls) -> dict:
    """What people read on one node: its title, description, and a name and tooltip for each input and output."""
    schema = cls.GET_SCHEMA()
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs},
        "outputs": {
            str(place): {"name": output.display_name, "tooltip": output.tooltip}
            for place, output in enumerate(schema.outputs)
        },
    }


if __name__ == "__main__":
    texts = {node_id: describe_texts(node) for node_id, node in load_nodes().items()}
    sys.stdout.write(json.dumps(texts, indent=2, ensure_ascii=False) + "\n")
