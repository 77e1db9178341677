"""Both prompts of Enhance Prompt in the pictures of a run, also where the host reuses what the node gave before.

The host hands one dictionary of notes to every node of a run, and its saving nodes write it into their PNGs. A node
whose output is reused is not called, so its note is made when the run is queued, or as soon as the text is there.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

NAME = "ernie_enhanced"
NODE = "ErnieEnhancePrompt"
MAX_KEPT = 1000  # runs and texts; the host's own history is longer

_runs: deque[tuple[dict, dict[str, str]]] = deque(maxlen=MAX_KEPT)
_notes: OrderedDict[str, dict] = OrderedDict()


def note_in_pictures(hidden, original: str, enhanced: list[str]) -> None:
    """Write both prompts beside the workflow of this run, and of all that are to have the same text.

    The host hands no dictionary to a run that came without a page.
    """
    note = {"node": hidden.unique_id, "original": original, "enhanced": enhanced}
    _write(hidden.extra_pnginfo, note)
    if not isinstance(hidden.prompt, Mapping):
        return
    key = _ancestry(hidden.prompt, hidden.unique_id)
    _notes[key] = note
    while len(_notes) > MAX_KEPT:
        _notes.popitem(last=False)
    for pnginfo, keys in tuple(_runs):
        if keys.get(hidden.unique_id) == key:
            _write(pnginfo, note)


def note_queued_run(request: Mapping[str, Any]) -> None:
    """Write what is known already into a run that is being queued; its request is not checked yet."""
    prompt, extra = request.get("prompt"), request.get("extra_data")
    pnginfo = extra.get("extra_pnginfo") if isinstance(extra, Mapping) else None
    if not isinstance(prompt, Mapping) or not isinstance(pnginfo, dict):
        return
    nodes = [n for n, node in prompt.items() if isinstance(node, Mapping) and node.get("class_type") == NODE]
    keys = {node_id: _ancestry(prompt, node_id) for node_id in nodes}
    if keys:
        _runs.append((pnginfo, keys))
    for key in keys.values():
        if key in _notes:
            _write(pnginfo, _notes[key])


def _write(pnginfo, note: dict) -> None:
    """Add a note in the place of an earlier one of the same node."""
    if isinstance(pnginfo, dict):
        others = pnginfo.get(NAME)
        kept = [other for other in others if other["node"] != note["node"]] if _are_notes(others) else []
        pnginfo[NAME] = [*kept, note]


def _are_notes(value) -> bool:
    """Whether `value` is a list of ours; what a caller sent under that name may be anything."""
    return isinstance(value, list) and all(isinstance(other, dict) and "node" in other for other in value)


def _ancestry(prompt: Mapping[str, Any], node_id: str) -> str:
    """All that decides a node's output, as text: itself and the nodes it reads, with their settings."""
    found: dict[str, list] = {}
    waiting = [node_id]
    while waiting:
        current = waiting.pop()
        node = prompt.get(current)
        if current in found or not isinstance(node, Mapping):
            continue
        inputs = node.get("inputs")
        inputs = inputs if isinstance(inputs, Mapping) else {}
        found[current] = [node.get("class_type"), dict(inputs)]
        links = (value for value in inputs.values() if isinstance(value, list) and len(value) == 2)
        waiting += [link[0] for link in links if isinstance(link[0], str)]
    return json.dumps(found, sort_keys=True, default=str)
