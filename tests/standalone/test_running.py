"""Checks before a run, and what a run does."""

import graph_nodes
import pytest
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.standalone.comfy_api import io
from ernie_pack.standalone.graph import NodeFailed, RunResult, Workflow, run_prompt, validate
from graph_nodes import CLASSES, api_graph


@pytest.fixture(autouse=True)
def _no_calls():
    graph_nodes.calls.clear()


def make(prompt):
    nodes = {k: {"class_type": kind, "inputs": inputs} for k, (kind, inputs) in prompt.items()}
    return Workflow(prompt=nodes, page=None)


def shown(prompt, classes=CLASSES):
    workflow = make(prompt)
    validate(workflow.prompt, classes)
    result = run_prompt(workflow, classes)
    return [text for ui in result.ui.values() for text in ui["text"]]


def test_a_small_graph_runs_to_its_output():
    workflow = Workflow(prompt=api_graph(), page=None)
    validate(workflow.prompt, CLASSES)
    result = run_prompt(workflow, CLASSES)
    assert result.ui == {"3": {"text": ["3=4"]}}
    assert result.finished == ["1", "2", "3"]


def test_each_node_runs_once_however_many_read_it():
    prompt = {
        "1": ("Number", {"seed": 1, "plus": 0}),
        "2": ("Add", {"a": ["1", 0], "b": ["1", 0], "sign": "+"}),
        "3": ("Show", {"value": ["2", 0]}),
        "4": ("Show", {"value": ["1", 0]}),
    }
    assert shown(prompt) == ["3=2", "4=1"]
    assert [c for c in graph_nodes.calls if c[0] == "Number"] == [("Number", 1, 0)]


def test_nodes_no_output_needs_do_not_run_nor_are_they_checked():
    prompt = {
        "1": ("Fails", {}),
        "2": ("Add", {}),
        "3": ("Show", {"value": ["4", 0]}),
        "4": ("Text", {"text": "x"}),
    }
    assert shown(prompt) == ["3=x"]


@pytest.mark.parametrize(("first", "answer"), [(True, "4=yes"), (False, "4=1")])
def test_the_branch_a_lazy_input_does_not_pick_does_not_run(first, answer):
    prompt = {
        "1": ("Text", {"text": "yes"}) if first else ("Fails", {}),
        "2": ("Fails", {}) if first else ("Number", {"seed": 1, "plus": 0}),
        "3": ("Pick", {"first": first, "one": ["1", 0], "two": ["2", 0]}),
        "4": ("Show", {"value": ["3", 0]}),
    }
    assert shown(prompt) == [answer]


def test_a_list_output_runs_its_reader_once_per_item():
    prompt = {
        "1": ("Range", {"count": 3}),
        "2": ("Add", {"a": ["1", 0], "b": 10, "sign": "+"}),
        "3": ("Show", {"value": ["2", 0]}),
    }
    assert shown(prompt) == ["3=10", "3=11", "3=12"]


def test_shorter_lists_repeat_their_last_item():
    prompt = {
        "1": ("Range", {"count": 3}),
        "2": ("Range", {"count": 2}),
        "3": ("Add", {"a": ["1", 0], "b": ["2", 0], "sign": "+"}),
        "4": ("Show", {"value": ["3", 0]}),
    }
    assert shown(prompt) == ["4=0", "4=2", "4=3"]


def test_an_input_list_node_gets_all_items_in_one_call():
    prompt = {
        "1": ("Range", {"count": 4}),
        "2": ("Sum", {"values": ["1", 0]}),
        "3": ("Show", {"value": ["2", 0]}),
    }
    assert shown(prompt) == ["3=6"]


def test_a_lazy_input_that_was_not_picked_blocks_nothing_though_its_node_has_run():
    class Blocks(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Blocks", outputs=[io.Int.Output()])

        @classmethod
        def execute(cls):
            return io.NodeOutput(block_execution="not today")

    for first, answer in ((False, ["5=1"]), (True, [])):
        prompt = {
            "1": ("Blocks", {}),
            "2": ("Show", {"value": ["1", 0]}),
            "3": ("Number", {"seed": 1, "plus": 0}),
            "4": ("Pick", {"first": first, "one": ["1", 0], "two": ["3", 0]}),
            "5": ("Show", {"value": ["4", 0]}),
        }
        assert shown(prompt, CLASSES | {"Blocks": Blocks}) == answer


def test_a_blocked_output_keeps_its_readers_from_running():
    class Blocks(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Blocks", outputs=[io.Int.Output()])

        @classmethod
        def execute(cls):
            return io.NodeOutput(block_execution="not today")

    prompt = {"1": ("Blocks", {}), "2": ("Show", {"value": ["1", 0]})}
    assert shown(prompt, CLASSES | {"Blocks": Blocks}) == []
    assert graph_nodes.calls == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"seed": -1, "plus": 0}, r"node 1 \(Number\): seed: at least 0 expected, got -1"),
        ({"seed": 101, "plus": 0}, "seed: at most 100 expected, got 101"),
        ({"seed": "many", "plus": 0}, "seed: INT expected, got 'many'"),
        ({"seed": 1}, "plus: required input is missing"),
        ({"seed": ["9", 0], "plus": 0}, "seed: a link to a node expected, node 9 does not exist"),
        ({"seed": ["4", 0], "plus": 0}, r"seed: INT expected, node 4 \(Text\) gives STRING"),
        ({"seed": ["4", 3], "plus": 0}, "seed: output 0 to 0 of node 4 expected, got 3"),
    ],
)
def test_a_bad_input_is_refused_before_anything_runs(inputs, message):
    prompt = {"1": ("Number", inputs), "4": ("Text", {"text": ""}), "3": ("Show", {"value": ["1", 0]})}
    with pytest.raises(ErnieError, match=message):
        validate(make(prompt).prompt, CLASSES)


def test_a_choice_that_does_not_exist_lists_those_that_do():
    prompt = api_graph()
    prompt["2"]["inputs"]["sign"] = "*"
    with pytest.raises(ErnieError, match=r"sign: one of \+, - expected, got '\*'"):
        validate(prompt, CLASSES)


def test_all_complaints_come_in_one_message():
    prompt = api_graph()
    prompt["2"]["inputs"]["sign"] = "*"
    prompt["1"]["inputs"]["seed"] = -1
    with pytest.raises(ErnieError, match=r"(?s)node 1 .*node 2 "):
        validate(prompt, CLASSES)


def test_numbers_come_in_the_type_of_their_input():
    prompt = api_graph()
    prompt["1"]["inputs"]["seed"] = "7"
    validate(prompt, CLASSES)
    assert prompt["1"]["inputs"]["seed"] == 7


def test_a_loop_is_named():
    prompt = {
        "1": ("Sum", {"values": ["2", 0]}),
        "2": ("Sum", {"values": ["1", 0]}),
        "3": ("Show", {"value": ["1", 0]}),
    }
    with pytest.raises(ErnieError, match="1 -> 2 -> 1"):
        validate(make(prompt).prompt, CLASSES)


def test_a_graph_without_an_output_is_refused():
    with pytest.raises(ErnieError, match="add a SaveImage node"):
        validate(make({"1": ("Text", {"text": ""})}).prompt, CLASSES)


def test_a_node_can_check_its_own_input():
    class Even(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Even", is_output_node=True, inputs=[io.Int.Input("number", max=1)])

        @classmethod
        def validate_inputs(cls, number):
            return number % 2 == 0 or "an even number expected"

    classes = {"Even": Even}
    validate(make({"1": ("Even", {"number": 4})}).prompt, classes)  # naming an input switches off its range check
    with pytest.raises(ErnieError, match="an even number expected"):
        validate(make({"1": ("Even", {"number": 3})}).prompt, classes)


def test_a_failing_node_is_named_and_what_was_finished_is_known():
    prompt = {
        "1": ("Text", {"text": "x"}),
        "2": ("Show", {"value": ["1", 0]}),
        "3": ("Fails", {}),
        "4": ("Show", {"value": ["3", 0]}),
    }
    result = RunResult()
    with pytest.raises(NodeFailed, match=r"node 3 \(Fails\) failed: on purpose"):
        run_prompt(make(prompt), CLASSES, result=result)
    assert result.finished == ["1", "2"]


def test_an_interrupt_is_not_reported_as_a_failure():
    class Stops(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Stops", is_output_node=True)

        @classmethod
        def execute(cls):
            raise Interrupted

    with pytest.raises(Interrupted):
        run_prompt(make({"1": ("Stops", {})}), {"Stops": Stops})


def test_a_node_cannot_keep_state_on_its_class():
    class Keeps(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Keeps", is_output_node=True)

        @classmethod
        def execute(cls):
            cls.count = 1

    with pytest.raises(NodeFailed, match="keep state at module level"):
        run_prompt(make({"1": ("Keeps", {})}), {"Keeps": Keeps})
