"""Workflow files as one internal form: reading, changing values, checking, running.

The internal form is ComfyUI's API format, `{node id: {"class_type", "inputs", "_meta"}}`, where an input that is a list
`[node id, output index]` is a link. UI files (what the page saves) are turned into it the way the page does when it
queues: muted nodes vanish, bypassed nodes pass on the input of the same type, Reroute, PrimitiveNode and notes are
resolved, subgraphs are unfolded (ids become `9:5`), and widget values are taken in the order of the node's schema.

Checks and list handling follow ComfyUI 0.12.1's rules; the messages are ours.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ernie_core.errors import ErnieError, Interrupted
from . import run_coroutine

logger = logging.getLogger(__name__)

MUTED, BYPASSED = 2, 4  # node modes of the page
NOTE_TYPES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR")
CONTROLS = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20  # ids of a subgraph's two ends

NodeClasses = Mapping[str, Any]
Prompt = dict[str, dict[str, Any]]


class NodeFailed(Exception):
    """A node raised while it ran; `__cause__` is what it raised."""


@dataclass(kw_only=True)
class Workflow:
    """A readable graph."""

    prompt: Prompt
    page: dict[str, Any] | None
    """The UI-format file, or None for an API-format file; goes into saved pictures."""
    places: dict[tuple[str, str], tuple[Any, Any]] = field(default_factory=dict)
    """(node id, input) -> (container, key) of its value in `page`."""


# ---------------------------------------------------------------------------------------------------- inputs by schema


def iter_inputs(cls: Any) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Yield (id, type, options, required) of each input in schema order."""
    table = cls.INPUT_TYPES()
    for group in ("required", "optional"):
        for name, spec in table.get(group, {}).items():
            kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
            if isinstance(kind, list | tuple):
                kind, options = "COMBO", {"options": list(kind), **options}
            yield name, kind, options, group == "required"


def has_widget(kind: str, options: Mapping[str, Any]) -> bool:
    """Say whether the page draws a widget for this input, and so saves a value for it."""
    return not options.get("forceInput") and options.get("widgetType", kind).split(",")[0] in WIDGET_TYPES


# ---------------------------------------------------------------------------------------------------- reading


def read_workflow(path: Path, classes: NodeClasses) -> Workflow:
    """Read a UI-format or API-format .json file, or a .png that carries a workflow."""
    try:
        data = _read_png(path) if path.suffix.lower() == ".png" else json.loads(path.read_text("utf-8"))
    except FileNotFoundError as e:
        raise ErnieError(f"workflow file expected, {path} does not exist; give the path of a .json or .png.") from e
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ErnieError(f"workflow file expected, {path} cannot be read: {e}; save it again in ComfyUI.") from e
    return parse_workflow(data, classes)


def _read_png(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            chunks = dict(image.info)
    except UnidentifiedImageError as e:
        raise ErnieError(f"a PNG expected, {path} is none; give a .json or a picture saved by ComfyUI.") from e
    for chunk in ("workflow", "prompt"):
        if chunk in chunks:
            return json.loads(chunks[chunk])
    raise ErnieError(f"a picture with a workflow inside expected, {path} carries none; give its .json file.")


def parse_workflow(data: Any, classes: NodeClasses) -> Workflow:
    """Turn a parsed file into a Workflow; raises ErnieError naming every unknown node type at once."""
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        return _parse_page(data, classes)
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict):
        data = data["prompt"]
    if not isinstance(data, dict) or not data or not all(_is_api_node(node) for node in data.values()):
        raise ErnieError(
            "a workflow expected (UI format with `nodes` and `links`, or API format with a `class_type` per node), "
            "got something else; save it with Workflow > Save or Export (API) in ComfyUI."
        )
    check_types({node["class_type"] for node in data.values()}, classes)
    prompt = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in data.items()}
    return Workflow(prompt=prompt, page=None)


def _is_api_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def check_types(types: set[str], classes: NodeClasses) -> None:
    """Raise ErnieError that names all types without a class."""
    unknown = sorted(types - set(classes))
    if unknown:
        raise ErnieError(
            f"unknown node type{'s' * (len(unknown) > 1)}: {', '.join(unknown)}. Standalone has this pack's nodes "
            "and a small set of core nodes (`python -m standalone --list`); run it in ComfyUI, or mute these nodes."
        )


@dataclass(kw_only=True)
class _Level:
    """One graph of a UI file: the root, or one use of a subgraph."""

    prefix: str
    nodes: dict[int, dict[str, Any]]
    links: dict[int, tuple[int, int]]  # link id -> (origin node id, origin slot)
    ends: dict[int, int] = field(default_factory=dict)  # subgraph output slot -> link id
    inputs: list[dict[str, Any]] = field(default_factory=list)  # of the subgraph's definition
    host: dict[str, Any] | None = None  # the node that stands for this subgraph
    outer: _Level | None = None


@dataclass(frozen=True)
class _Place:
    """A value that lies in the page file: `container[key]`."""

    container: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.container[self.key]


def _level(graph: Mapping[str, Any], prefix: str, **extra: Any) -> _Level:
    links, ends = {}, {}
    for link in graph.get("links") or []:
        if isinstance(link, dict):
            number, origin, slot = link["id"], link["origin_id"], link["origin_slot"]
            target, target_slot = link["target_id"], link["target_slot"]
        else:
            number, origin, slot, target, target_slot = link[:5]
        links[number] = (origin, slot)
        if target == SUBGRAPH_OUTPUT:
            ends[target_slot] = number
    return _Level(prefix=prefix, nodes={n["id"]: n for n in graph["nodes"]}, links=links, ends=ends, **extra)


def _parse_page(page: dict[str, Any], classes: NodeClasses) -> Workflow:
    page = json.loads(json.dumps(page))  # ours to change
    subgraphs = {g["id"]: g for g in (page.get("definitions") or {}).get("subgraphs") or []}
    levels: dict[str, _Level] = {}
    try:
        root = _level(page, "")
        _unfold(root, subgraphs, levels, depth=0)
        placed = [(level, node) for level in levels.values() for node in level.nodes.values()]
        real = [(lv, n) for lv, n in placed if _is_real(n, subgraphs)]
        check_types({n["type"] for _, n in real}, classes)
        prompt: Prompt = {}
        places: dict[tuple[str, str], tuple[Any, Any]] = {}
        for level, node in real:
            node_id = f"{level.prefix}{node['id']}"
            inputs: dict[str, Any] = {}
            for name, source in _page_inputs(level, node, levels, classes[node["type"]]):
                if isinstance(source, _Place):
                    places[node_id, name] = (source.container, source.key)
                    inputs[name] = source.value
                else:
                    inputs[name] = source
            title = node.get("title") or node["type"]
            prompt[node_id] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise ErnieError(
            "a UI-format workflow expected, its nodes or links are not as ComfyUI saves them "
            f"({type(e).__name__}: {e}); open it in ComfyUI and save it again."
        ) from e
    _finish_values(prompt, classes, places)
    return Workflow(prompt=prompt, page=page, places=places)


def _is_real(node: Mapping[str, Any], subgraphs: Mapping[str, Any]) -> bool:
    virtual = node["type"] in (*NOTE_TYPES, "Reroute", "PrimitiveNode") or node["type"] in subgraphs
    return not virtual and node.get("mode", 0) not in (MUTED, BYPASSED)


def _unfold(level: _Level, subgraphs: Mapping[str, Any], levels: dict[str, _Level], *, depth: int) -> None:
    """Add `level` and, below it, one level for each live subgraph node."""
    if depth > 16:
        raise ErnieError("subgraphs up to 16 deep expected, these contain themselves; remove the inner use.")
    levels[level.prefix] = level
    for node in level.nodes.values():
        graph = subgraphs.get(node["type"])
        if graph is not None and node.get("mode", 0) not in (MUTED, BYPASSED):
            prefix = f"{level.prefix}{node['id']}:"
            inner = _level(graph, prefix, inputs=graph.get("inputs") or [], host=node, outer=level)
            _unfold(inner, subgraphs, levels, depth=depth + 1)


def _page_inputs(
    level: _Level, node: dict[str, Any], levels: Mapping[str, _Level], cls: Any
) -> Iterator[tuple[str, Any]]:
    """Yield (input, link or _Place): widget values first, replaced by links where there are any."""
    found: dict[str, Any] = dict(_widget_places(node, cls))
    for slot in node.get("inputs") or []:
        if slot.get("link") is None:
            continue
        source = _resolve(level, slot["link"], slot.get("type"), levels)
        if source is not None:
            found[slot["name"]] = source
    known = {name for name, *_ in iter_inputs(cls)}
    for name in found.keys() - known:
        logger.warning("node %s (%s): input %r is not known here and is left out.", node["id"], node["type"], name)
    yield from ((name, source) for name, source in found.items() if name in known)


def _widget_places(node: dict[str, Any], cls: Any) -> Iterator[tuple[str, _Place]]:
    """Yield the place of each widget value; the page keeps them as one list in widget order."""
    values = node.get("widgets_values")
    widgets = [(name, options) for name, kind, options, _ in iter_inputs(cls) if has_widget(kind, options)]
    if isinstance(values, dict):
        yield from ((name, _Place(values, name)) for name, _ in widgets if name in values)
        return
    values = values or []
    index = 0
    for name, options in widgets:
        if index >= len(values):
            return  # the page keeps a new node's default here; _finish_values does the same
        yield name, _Place(values, index)
        index += 1
        if options.get("control_after_generate") and index < len(values):
            if values[index] not in CONTROLS:
                raise ErnieError(
                    f"node {node['id']} ({node['type']}): after the value of {name} one of {', '.join(CONTROLS)} "
                    f"expected, got {values[index]!r}; open the workflow in ComfyUI and save it again."
                )
            index += 1
        if options.get("image_upload"):
            index += 1  # the upload button saves the word "image"


def _resolve(level: _Level, link: int, kind: Any, levels: Mapping[str, _Level], hops: int = 0) -> Any:
    """Follow a link to `[node id, slot]`, to a _Place (PrimitiveNode, promoted widget), or None where it ends."""
    if link not in level.links:
        return None
    if hops > 1000:
        raise ErnieError("links that lead to a node expected, these run in a circle; remove the loop of Reroutes.")
    origin, slot = level.links[link]
    if origin == SUBGRAPH_INPUT:
        return _resolve_outside(level, slot, kind, levels, hops)
    node = level.nodes[origin]
    mode = node.get("mode", 0)
    if mode == MUTED:
        return None
    if mode == BYPASSED:
        inner = _bypass_link(node, slot, kind)
        return None if inner is None else _resolve(level, inner, kind, levels, hops + 1)
    if node["type"] == "Reroute":
        inner = node["inputs"][0].get("link")
        return None if inner is None else _resolve(level, inner, kind, levels, hops + 1)
    if node["type"] == "PrimitiveNode":
        return _Place(node["widgets_values"], 0)
    below = levels.get(f"{level.prefix}{origin}:")
    if below is not None:
        return _resolve(below, below.ends[slot], kind, levels, hops + 1) if slot in below.ends else None
    return [f"{level.prefix}{origin}", slot]


def _resolve_outside(level: _Level, slot: int, kind: Any, levels: Mapping[str, _Level], hops: int) -> Any:
    """Follow a subgraph's input to what is linked to it outside, or to the value its own widget holds."""
    name = level.inputs[slot]["name"]
    sockets = level.host.get("inputs") or []
    socket = next((s for s in sockets if s["name"] == name), None)
    if socket is None:
        return None
    if socket.get("link") is not None:
        return _resolve(level.outer, socket["link"], kind, levels, hops + 1)
    # Pages that give each use of a subgraph its own values save them in the order of its widget sockets.
    values = level.host.get("widgets_values")
    widgets = [s["name"] for s in sockets if s.get("widget")]
    if isinstance(values, list) and name in widgets and len(values) == len(widgets):
        return _Place(values, widgets.index(name))
    return None


def _bypass_link(node: Mapping[str, Any], slot: int, kind: Any) -> int | None:
    """Return the link a bypassed node passes on: the input beside the output if the types agree, else the first."""
    inputs = node.get("inputs") or []
    outputs = node.get("outputs") or []
    kind = outputs[slot]["type"] if slot < len(outputs) and outputs[slot].get("type") not in (None, "*") else kind
    order = ([inputs[slot]] if slot < len(inputs) else []) + inputs
    for socket in order:
        if socket.get("type") == kind:
            return socket.get("link")
    return next((s.get("link") for s in order if s.get("type") == "*"), None)


def _finish_values(prompt: Prompt, classes: NodeClasses, places: Mapping[tuple[str, str], Any]) -> None:
    """Do what the page does on queueing: defaults for values it did not save, dynamic prompts, lists wrapped."""
    for node_id, node in prompt.items():
        inputs = node["inputs"]
        for name, kind, options, _ in iter_inputs(classes[node["class_type"]]):
            if has_widget(kind, options) and name not in inputs:
                default = options.get("default")
                if default is None and options.get("options"):
                    default = options["options"][0]
                inputs[name] = "" if default is None and kind == "STRING" else default
                if inputs[name] is None:
                    del inputs[name]
            elif (node_id, name) in places and isinstance(inputs[name], list):
                inputs[name] = {"__value__": inputs[name]}
            elif (node_id, name) in places and options.get("dynamicPrompts") and isinstance(inputs[name], str):
                inputs[name] = expand_dynamic_prompt(inputs[name], random.Random())


def expand_dynamic_prompt(text: str, rng: random.Random) -> str:
    """Drop // and /* */ comments and pick one of each `{a|b}`, as the page does for widgets that ask for it."""
    text = re.sub(r"/\*.*?\*/|(?<!:)//[^\n]*", "", text, flags=re.DOTALL)
    choice = re.compile(r"(?<!\\)\{([^{}]*\|[^{}]*)(?<!\\)\}")
    while (found := choice.search(text)) is not None:
        text = text[: found.start()] + rng.choice(found.group(1).split("|")) + text[found.end() :]
    return text.replace("\\{", "{").replace("\\}", "}")


# ---------------------------------------------------------------------------------------------------- changing values


def is_link(value: Any) -> bool:
    return isinstance(value, list)


def iter_settable(workflow: Workflow, classes: NodeClasses) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (node id, input, type, options) of every unlinked widget input."""
    for node_id, node in workflow.prompt.items():
        for name, kind, options, _ in iter_inputs(classes[node["class_type"]]):
            if has_widget(kind, options) and not is_link(node["inputs"].get(name)):
                yield node_id, name, kind, options


def set_value(workflow: Workflow, target: str, text: str, classes: NodeClasses) -> None:
    """Set an input from the command line; `target` is `input`, or `node.input` with a node's id, title or type.

    Without a node, nodes that feed nothing but inputs called `negative` are left out where another one has the input:
    `prompt=...` means the prompt. The page file inside `workflow` changes too: a saved picture carries what made it.

    Raises:
        ErnieError: no such input, several of them, or a value of the wrong kind.
    """
    settable = list(iter_settable(workflow, classes))
    node_name, _, name = target.rpartition(".")
    found = [row for row in settable if row[1] == name and (not node_name or _is_named(workflow, row[0], node_name))]
    if not node_name:
        found = [row for row in found if not _is_negative(workflow, row[0])] or found
    if len(found) > 1:
        raise ErnieError(
            f"--set {target}: one input expected, {len(found)} nodes have it; "
            f"use {' or '.join(f'{row[0]}.{name}' for row in found)}."
        )
    if not found:
        raise ErnieError(f"--set {target}: {_why_not_settable(workflow, node_name, name, settable)}")
    node_id, name, kind, options = found[0]
    value = _convert(target, text, kind, options)
    workflow.prompt[node_id]["inputs"][name] = value
    if (node_id, name) in workflow.places:
        container, key = workflow.places[node_id, name]
        container[key] = value
    elif workflow.page is not None:
        logger.warning("--set %s: the workflow inside saved pictures keeps its default for this input.", target)


def _is_negative(workflow: Workflow, node_id: str) -> bool:
    """Say whether all links from this node go to inputs called `negative`."""
    readers = [
        name
        for node in workflow.prompt.values()
        for name, value in node["inputs"].items()
        if is_link(value) and value and str(value[0]) == node_id
    ]
    return bool(readers) and set(readers) == {"negative"}


def _is_named(workflow: Workflow, node_id: str, name: str) -> bool:
    node = workflow.prompt[node_id]
    return name in (node_id, node["class_type"], node.get("_meta", {}).get("title"))


def _why_not_settable(workflow: Workflow, node_name: str, name: str, settable: list) -> str:
    for node_id, node in workflow.prompt.items():
        value = node["inputs"].get(name)
        if is_link(value) and (not node_name or _is_named(workflow, node_id, node_name)):
            return f"a free input expected, {node_id}.{name} is linked to node {value[0]}; set that node's input."
    names = sorted({row[1] for row in settable})
    return f"an input of this workflow expected, it has none of that name; it has {', '.join(names) or 'none'}."


def _convert(target: str, text: str, kind: str, options: Mapping[str, Any]) -> Any:
    kind = options.get("widgetType", kind).split(",")[0]
    if kind == "BOOLEAN":
        words = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if text.lower() not in words:
            raise ErnieError(f"--set {target}: true or false expected, got {text!r}; write {target}=true.")
        return words[text.lower()]
    if kind in ("INT", "FLOAT"):
        try:
            return int(text) if kind == "INT" else float(text)
        except ValueError as e:
            what = "a whole number" if kind == "INT" else "a number"
            raise ErnieError(f"--set {target}: {what} expected, got {text!r}; write {target}=1.") from e
    if kind == "COMBO":
        return next((option for option in options.get("options") or [] if str(option) == text), text)
    return text


# ---------------------------------------------------------------------------------------------------- checking


def needed_nodes(prompt: Prompt, classes: NodeClasses) -> dict[str, list[str]]:
    """Return the nodes that output nodes need, each with the nodes it is linked to, in an order that can run."""
    outputs = [node_id for node_id, node in prompt.items() if classes[node["class_type"]].OUTPUT_NODE]
    if not outputs:
        raise ErnieError("a workflow with an output node expected, this has none; add a SaveImage node.")
    order: dict[str, list[str]] = {}
    for output in outputs:
        _visit(prompt, output, order, ())
    return order


def _visit(prompt: Prompt, node_id: str, order: dict[str, list[str]], path: tuple[str, ...]) -> None:
    if node_id in path:
        circle = " -> ".join((*path[path.index(node_id) :], node_id))
        raise ErnieError(f"a graph without loops expected, nodes {circle} form one; cut one of these links.")
    if node_id in order or node_id not in prompt:
        return  # a link to nowhere is reported with the node it leads to
    links = [str(v[0]) for v in prompt[node_id]["inputs"].values() if is_link(v) and len(v) == 2]
    for origin in links:
        _visit(prompt, origin, order, (*path, node_id))
    order[node_id] = list(dict.fromkeys(links))


def validate(prompt: Prompt, classes: NodeClasses) -> None:
    """Check the nodes that will run as ComfyUI does; raises one ErnieError with all complaints.

    Numbers and strings are converted in place to the type of their input.
    """
    complaints = []
    for node_id in needed_nodes(prompt, classes):
        node = prompt[node_id]
        for text in _complaints(prompt, node_id, classes):
            complaints.append(f"node {node_id} ({_title(node)}): {text}")
    if complaints:
        raise ErnieError("the workflow cannot run:\n  " + "\n  ".join(complaints))


def _title(node: Mapping[str, Any]) -> str:
    title = (node.get("_meta") or {}).get("title")
    return node["class_type"] if title in (None, node["class_type"]) else f'{node["class_type"]} "{title}"'


def _complaints(prompt: Prompt, node_id: str, classes: NodeClasses) -> Iterator[str]:
    node = prompt[node_id]
    cls = classes[node["class_type"]]
    check = _override(cls, "validate_inputs")
    spec = inspect.getfullargspec(check) if check else None
    own = set(spec.args) if spec else set()
    all_own = bool(spec and spec.varkw)
    failed = False
    for name, kind, options, required in iter_inputs(cls):
        if name not in node["inputs"]:
            if required:
                failed = True
                yield f"{name}: required input is missing; link it or give it a value."
            continue
        value = node["inputs"][name]
        if is_link(value):
            trouble = _link_trouble(prompt, value, kind, classes)
        else:
            trouble = _value_trouble(node["inputs"], name, kind, options, ranges=not all_own and name not in own)
        if trouble:
            failed = True
            yield f"{name}: {trouble}"
    if check and not failed:
        values = {k: None if is_link(v) else v for k, v in node["inputs"].items()}
        given = {name: value for name, value in values.items() if all_own or name in own}
        answer = check(**given)
        if answer is not True:
            yield answer if isinstance(answer, str) else f"{', '.join(given)}: not accepted by the node."


def _override(cls: Any, name: str) -> Callable | None:
    """Return the class method if the node defines it itself."""
    method, base = getattr(cls, name), getattr(cls.GET_BASE_CLASS(), name)
    return None if method.__func__ is base.__func__ else method


def _link_trouble(prompt: Prompt, value: list, kind: str, classes: NodeClasses) -> str | None:
    if len(value) != 2:
        return f"a link [node id, output index] expected, got {value}; link it again."
    origin = prompt.get(str(value[0]))
    if origin is None:
        return f"a link to a node expected, node {value[0]} does not exist; link it again."
    types = classes[origin["class_type"]].RETURN_TYPES
    if not isinstance(value[1], int) or not 0 <= value[1] < len(types):
        return f"output 0 to {len(types) - 1} of node {value[0]} expected, got {value[1]}; link it again."
    came = types[value[1]]
    free = ("*", "COMFY_MATCHTYPE_V3")
    if came in free or kind in free or set(came.split(",")) & set(kind.split(",")):
        return None
    return f"{kind} expected, node {value[0]} ({origin['class_type']}) gives {came}; link an output of type {kind}."


def _value_trouble(
    inputs: dict[str, Any], name: str, kind: str, options: Mapping[str, Any], *, ranges: bool
) -> str | None:
    value = inputs[name]
    if isinstance(value, dict) and "__value__" in value:
        value = inputs[name] = value["__value__"]
    kind = options.get("widgetType", kind).split(",")[0]
    if not has_widget(kind, {}):
        return f"a link of type {kind} expected, got the value {value!r}; link a node to it."
    convert = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(kind)
    if convert is not None:
        try:
            value = inputs[name] = convert(value)
        except (TypeError, ValueError, OverflowError):
            return f"{kind} expected, got {value!r}; give it a value of that type."
    if not ranges:
        return None
    low, high = options.get("min"), options.get("max")
    if low is not None and value < low:
        return f"at least {low} expected, got {value}; use {low} or more."
    if high is not None and value > high:
        return f"at most {high} expected, got {value}; use {high} or less."
    if kind == "COMBO":
        choices = options.get("options") or []
        wanted = value if options.get("multiselect") and isinstance(value, list) else [value]
        if any(v not in choices for v in wanted):
            shown = ", ".join(str(c) for c in choices[:20]) + (f" and {len(choices) - 20} more" * (len(choices) > 20))
            return f"one of {shown or 'nothing (no file found)'} expected, got {value!r}; choose one of these."
    return None


# ---------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Blocked:
    """An output that keeps everything behind it from running; `message` is told to the user unless it is None."""

    message: str | None


@dataclass(kw_only=True)
class RunResult:
    """What a run leaves behind."""

    ui: dict[str, dict[str, list]] = field(default_factory=dict)
    """What each node shows, by node id."""
    finished: list[str] = field(default_factory=list)
    """Ids of the nodes that ran, in order."""


def run_prompt(
    workflow: Workflow,
    classes: NodeClasses,
    *,
    result: RunResult | None = None,
    around: Callable[[str, str], contextlib.AbstractContextManager] | None = None,
    only: str | None = None,
) -> RunResult:
    """Run every needed node once, output by output; call `validate` first.

    Args:
        result: filled while the run goes on, so that a caller who catches an exception has what was finished.
        around: entered with (node id, title) around each node.
        only: id of the one output node to run, with what it needs; None = all of them.

    Raises:
        NodeFailed: a node raised; names it.
        Interrupted: the user cancelled.
    """
    result = result or RunResult()
    run = _Run(workflow=workflow, classes=classes, result=result, around=around)
    for node_id in run.links:
        if classes[workflow.prompt[node_id]["class_type"]].OUTPUT_NODE and only in (None, node_id):
            run.compute(node_id)
    return result


class _Run:
    def __init__(self, *, workflow: Workflow, classes: NodeClasses, result: RunResult, around: Any) -> None:
        self.workflow = workflow
        self.classes = classes
        self.result = result
        self.around = around or (lambda *_: contextlib.nullcontext())
        self.links = needed_nodes(workflow.prompt, classes)
        self.outputs: dict[str, list[list]] = {}
        self.asked: dict[str, set[str]] = {}  # node -> lazy inputs that it got; others it does not see, as in ComfyUI
        # one for all nodes of a run, as in ComfyUI: what a node writes into it goes into the pictures saved later
        self.png: dict[str, Any] | None = None if workflow.page is None else {"workflow": workflow.page}
        self.waiting = {n: sum(n in links for links in self.links.values()) for n in self.links}

    def compute(self, node_id: str) -> None:
        """Run a node after the nodes it needs; afterwards let go of what no other node waits for."""
        if node_id in self.result.finished:
            return
        node = self.workflow.prompt[node_id]
        cls = self.classes[node["class_type"]]
        lazy = {name for name, _, options, _ in iter_inputs(cls) if options.get("lazy")}
        for name, value in node["inputs"].items():
            if is_link(value) and name not in lazy:
                self.compute(str(value[0]))
        while asked := self._ask_lazy(node_id, cls, lazy):
            for name in asked:
                self.compute(str(node["inputs"][name][0]))
            self.asked.setdefault(node_id, set()).update(asked)
        with self.around(node_id, _title(node)):
            self.outputs[node_id] = self._execute(node_id, cls)
        self.result.finished.append(node_id)
        for origin in self.links[node_id]:
            self.waiting[origin] -= 1
            if self.waiting[origin] == 0:
                self.outputs.pop(origin, None)

    def _ask_lazy(self, node_id: str, cls: Any, lazy: set[str]) -> list[str]:
        """Return the lazy inputs that the node now asks for and has not asked for before."""
        inputs = self.workflow.prompt[node_id]["inputs"]
        open_ = [n for n in sorted(lazy) if is_link(inputs.get(n)) and n not in self.asked.get(node_id, ())]
        if not open_:
            return []
        answers = self._map(node_id, cls, "check_lazy_status")
        names = {name for answer in answers if not isinstance(answer, Blocked) for name in answer or []}
        return [name for name in open_ if name in names]

    def _values(self, node_id: str, cls: Any) -> dict[str, list]:
        """Return each input as the list of its values; (None,) where a lazy input has not been asked for."""
        node, asked = self.workflow.prompt[node_id], self.asked.get(node_id, ())
        known = {name: options for name, _, options, _ in iter_inputs(cls)}
        values: dict[str, list] = {}
        for name, value in node["inputs"].items():
            if name not in known and not cls.ACCEPT_ALL_INPUTS:
                continue
            if is_link(value) and known.get(name, {}).get("rawLink"):
                values[name] = [value]
            elif is_link(value):
                seen = name in asked or not known.get(name, {}).get("lazy")
                outputs = self.outputs.get(str(value[0])) if seen else None
                values[name] = [None] if outputs is None else outputs[value[1]]
            else:
                values[name] = [value]
        return values

    def _map(self, node_id: str, cls: Any, method: str) -> list:
        """Call a class method once per list item (shorter lists repeat their last), or once with whole lists."""
        values = self._values(node_id, cls)
        hidden = {"UNIQUE_ID": node_id, "PROMPT": self.workflow.prompt, "EXTRA_PNGINFO": self.png}
        bound = getattr(cls.PREPARE_CLASS_CLONE({"hidden_inputs": hidden}), method)
        if cls.INPUT_IS_LIST:
            return [self._call(bound, values, node_id, blocked=[v for vs in values.values() for v in vs])]
        if any(len(v) == 0 for v in values.values()):
            empty = [name for name, v in values.items() if not v]
            raise ErnieError(f"at least one item expected, {', '.join(empty)} is an empty list; feed it something.")
        answers = []
        for i in range(max((len(v) for v in values.values()), default=1)):
            one = {name: v[min(i, len(v) - 1)] for name, v in values.items()}
            answers.append(self._call(bound, one, node_id, blocked=list(one.values())))
        return answers

    def _call(self, bound: Callable, values: Mapping[str, Any], node_id: str, *, blocked: list) -> Any:
        block = next((v for v in blocked if isinstance(v, Blocked)), None)
        if block is not None:
            if block.message is not None:
                logger.warning("node %s did not run: %s", node_id, block.message)
            return Blocked(None)
        answer = bound(**values)
        return run_coroutine(answer) if inspect.iscoroutine(answer) else answer

    def _execute(self, node_id: str, cls: Any) -> list[list]:
        try:
            answers = self._map(node_id, cls, cls.FUNCTION)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as e:  # whatever a node raises is reported with its name
            title = _title(self.workflow.prompt[node_id])
            raise NodeFailed(f"node {node_id} ({title}) failed: {e or type(e).__name__}") from e
        types, is_list = cls.RETURN_TYPES, cls.OUTPUT_IS_LIST
        outputs: list[list] = [[] for _ in types]
        shown: dict[str, list] = {}
        for answer in answers:
            if not isinstance(answer, Blocked):
                if answer.expand is not None:
                    raise NodeFailed(f"node {node_id} ({cls.__name__}) grows new nodes; run this workflow in ComfyUI.")
                ui = answer.ui if isinstance(answer.ui, dict | None) else answer.ui.as_dict()
                for key, items in (ui or {}).items():
                    shown.setdefault(key, []).extend(items)
                if answer.block_execution is not None:
                    answer = Blocked(answer.block_execution)
            for i in range(len(types)):
                if isinstance(answer, Blocked):
                    outputs[i].append(answer)
                elif i < len(answer.args):
                    outputs[i].extend(answer.args[i]) if is_list[i] else outputs[i].append(answer.args[i])
                else:
                    raise NodeFailed(
                        f"node {node_id} ({cls.__name__}) gave {len(answer.args)} of {len(types)} outputs; "
                        "this is a bug in the node."
                    )
        if shown:
            self.result.ui[node_id] = shown
        return outputs
