"""Workflow files become the same graph whatever format they come in."""

import json
import random

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.standalone.graph import expand_dynamic_prompt, parse_workflow, read_workflow, set_value
from graph_nodes import CLASSES, api_graph, page_graph


def node(number, kind, *, inputs=(), outputs=(), values=(), mode=0):
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
        "outputs": [{"type": t, "links": []} for t in outputs],
        "widgets_values": list(values),
    }


def prompt_of(nodes, links, **extra):
    return parse_workflow({"nodes": nodes, "links": links, **extra}, CLASSES).prompt


def test_page_and_api_files_give_the_same_prompt():
    assert parse_workflow(page_graph(), CLASSES).prompt == parse_workflow(api_graph(), CLASSES).prompt


def test_the_control_after_a_seed_does_not_shift_the_values_behind_it():
    inputs = parse_workflow(page_graph(), CLASSES).prompt["1"]["inputs"]
    assert inputs == {"seed": 7, "plus": 2}


def test_a_missing_control_word_is_refused_by_name():
    graph = page_graph()
    graph["nodes"][0]["widgets_values"] = [7, 2]
    with pytest.raises(ErnieError, match=r"node 1 \(Number\): after the value of seed one of fixed.*got 2"):
        parse_workflow(graph, CLASSES)


def test_values_the_file_does_not_have_are_the_defaults():
    graph = page_graph()
    graph["nodes"][0]["widgets_values"] = [7]
    assert parse_workflow(graph, CLASSES).prompt["1"]["inputs"]["plus"] == 0


def test_a_linked_widget_keeps_its_place_in_the_values():
    graph = page_graph()
    graph["nodes"][1]["inputs"].append({"name": "b", "type": "INT", "link": 3, "widget": {"name": "b"}})
    graph["links"].append([3, 1, 0, 2, 1, "INT"])
    inputs = parse_workflow(graph, CLASSES).prompt["2"]["inputs"]
    assert inputs == {"a": ["1", 0], "b": ["1", 0], "sign": "-"}


def test_unknown_types_are_named_all_at_once():
    graph = api_graph() | {
        "8": {"class_type": "Zebra", "inputs": {}},
        "9": {"class_type": "Apple", "inputs": {}},
    }
    with pytest.raises(ErnieError, match="unknown node types: Apple, Zebra"):
        parse_workflow(graph, CLASSES)


def test_a_muted_unknown_node_is_no_trouble():
    graph = page_graph()
    graph["nodes"].append(node(9, "Zebra", mode=2))
    assert "9" not in parse_workflow(graph, CLASSES).prompt


def test_reroutes_and_primitives_are_resolved():
    nodes = [
        node(1, "PrimitiveNode", outputs=["INT"], values=[42, "fixed"]),
        node(2, "Number", outputs=["INT"], values=[0, "fixed", 0], inputs=[("seed", "INT", 1)]),
        node(3, "Reroute", outputs=["*"], inputs=[("", "*", 2)]),
        node(4, "Show", inputs=[("value", "*", 3)], values=["="]),
    ]
    links = [[1, 1, 0, 2, 0, "INT"], [2, 2, 0, 3, 0, "INT"], [3, 3, 0, 4, 0, "INT"]]
    prompt = prompt_of(nodes, links)
    assert prompt["2"]["inputs"]["seed"] == 42
    assert prompt["4"]["inputs"]["value"] == ["2", 0]


def test_a_bypassed_node_passes_on_the_input_of_its_output_type():
    graph = page_graph()
    graph["nodes"][1]["mode"] = 4
    assert parse_workflow(graph, CLASSES).prompt["3"]["inputs"]["value"] == ["1", 0]


def test_a_muted_node_leaves_its_reader_without_a_link():
    graph = page_graph()
    graph["nodes"][1]["mode"] = 2
    assert "value" not in parse_workflow(graph, CLASSES).prompt["3"]["inputs"]


def subgraph_page(values):
    inner = {
        "id": "uuid",
        "nodes": [node(5, "Number", outputs=["INT"], values=[3, "fixed", 4], inputs=[("plus", "INT", 11)])],
        "links": [
            {"id": 11, "origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0, "type": "INT"},
            {"id": 12, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "INT"},
        ],
        "inputs": [{"name": "plus", "type": "INT", "linkIds": [11]}],
        "outputs": [{"name": "INT", "type": "INT", "linkIds": [12]}],
    }
    outer = node(9, "uuid", outputs=["INT"], values=values)
    outer["inputs"] = [{"name": "plus", "type": "INT", "link": None, "widget": {"name": "plus"}}]
    return {
        "nodes": [outer, node(3, "Show", inputs=[("value", "*", 1)], values=["="])],
        "links": [[1, 9, 0, 3, 0, "INT"]],
        "definitions": {"subgraphs": [inner]},
    }


@pytest.mark.parametrize(("values", "plus"), [([], 4), ([6], 6)], ids=["inner value", "value of this use"])
def test_subgraphs_unfold_with_compound_ids(values, plus):
    prompt = parse_workflow(subgraph_page(values), CLASSES).prompt
    assert prompt["9:5"]["inputs"] == {"seed": 3, "plus": plus}
    assert prompt["3"]["inputs"]["value"] == ["9:5", 0]


def test_a_list_of_nothing_known_is_refused():
    with pytest.raises(ErnieError, match="a workflow expected"):
        parse_workflow({"foo": 1}, CLASSES)


def test_broken_links_tables_are_refused_in_words():
    with pytest.raises(ErnieError, match="open it in ComfyUI and save it again"):
        parse_workflow({"nodes": [{"id": 1}], "links": []}, CLASSES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ErnieError, match=r"nothing\.json does not exist"):
        read_workflow(tmp_path / "nothing.json", CLASSES)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{", "utf-8")
    with pytest.raises(ErnieError, match=r"bad\.json cannot be read"):
        read_workflow(tmp_path / "bad.json", CLASSES)


def test_dynamic_prompts_lose_comments_and_choose_one():
    text = expand_dynamic_prompt("a {red|blue} cat // note\n/* x */at https://x.y \\{kept\\}", random.Random(0))
    assert text in ("a red cat \nat https://x.y {kept}", "a blue cat \nat https://x.y {kept}")


def test_set_changes_the_prompt_and_the_page():
    workflow = parse_workflow(page_graph(), CLASSES)
    set_value(workflow, "1.seed", "9", CLASSES)
    set_value(workflow, "sign", "+", CLASSES)
    set_value(workflow, "Result.prefix", "a=b", CLASSES)
    assert workflow.prompt["1"]["inputs"]["seed"] == 9
    assert workflow.page["nodes"][0]["widgets_values"] == [9, "fixed", 2]
    assert workflow.page["nodes"][1]["widgets_values"] == [5, "+"]
    assert workflow.prompt["3"]["inputs"]["prefix"] == "a=b"
    assert json.dumps(page_graph()) != json.dumps(workflow.page)


def test_an_ambiguous_set_names_the_candidates():
    graph = api_graph() | {"5": {"class_type": "Number", "inputs": {"seed": 1, "plus": 0}}}
    with pytest.raises(ErnieError, match=r"2 nodes have it; use 1\.seed or 5\.seed"):
        set_value(parse_workflow(graph, CLASSES), "seed", "3", CLASSES)


def test_a_bare_name_means_the_node_that_is_not_the_negative():
    graph = {
        "1": {"class_type": "Text", "inputs": {"text": "good"}},
        "2": {"class_type": "Text", "inputs": {"text": ""}},
        "3": {"class_type": "Sampler", "inputs": {"positive": ["1", 0], "negative": ["2", 0]}},
    }
    classes = CLASSES | {"Sampler": CLASSES["Show"]}
    workflow = parse_workflow(graph, classes)
    set_value(workflow, "text", "better", classes)
    assert (workflow.prompt["1"]["inputs"]["text"], workflow.prompt["2"]["inputs"]["text"]) == ("better", "")


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        ("nothing", "1", "it has b, plus, prefix, seed, sign"),
        ("2.a", "1", "2.a is linked to node 1"),
        ("plus", "x", "a whole number expected, got 'x'"),
    ],
)
def test_a_wrong_set_says_what_to_do(target, text, message):
    with pytest.raises(ErnieError, match=message):
        set_value(parse_workflow(api_graph(), CLASSES), target, text, CLASSES)
