"""A few nodes without an engine, and small graphs of them, for tests of the standalone runner."""

from ernie_pack.standalone.comfy_api import io, ui

calls: list[tuple] = []  # (node, arguments) of every execution; tests clear it


class Number(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Number",
            inputs=[
                io.Int.Input("seed", default=1, min=0, max=100, control_after_generate=True),
                io.Int.Input("plus", default=0),
            ],
            outputs=[io.Int.Output(display_name="number")],
        )

    @classmethod
    def execute(cls, seed, plus):
        calls.append(("Number", seed, plus))
        return io.NodeOutput(seed + plus)


class Range(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Range",
            inputs=[io.Int.Input("count", default=3)],
            outputs=[io.Int.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, count):
        return io.NodeOutput(list(range(count)))


class Add(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Add",
            inputs=[
                io.Int.Input("a", force_input=True),
                io.Int.Input("b", default=10),
                io.Combo.Input("sign", options=["+", "-"]),
            ],
            outputs=[io.Int.Output()],
        )

    @classmethod
    def execute(cls, a, b, sign):
        calls.append(("Add", a, b, sign))
        return io.NodeOutput(a + b if sign == "+" else a - b)


class Sum(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Sum",
            is_input_list=True,
            inputs=[io.Int.Input("values", force_input=True)],
            outputs=[io.Int.Output()],
        )

    @classmethod
    def execute(cls, values):
        return io.NodeOutput(sum(values))


class Pick(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Pick",
            inputs=[
                io.Boolean.Input("first", default=True),
                io.AnyType.Input("one", lazy=True),
                io.AnyType.Input("two", lazy=True),
            ],
            outputs=[io.AnyType.Output()],
        )

    @classmethod
    def check_lazy_status(cls, first, one=None, two=None):
        wanted = "one" if first else "two"
        return [wanted] if {"one": one, "two": two}[wanted] is None else []

    @classmethod
    def execute(cls, first, one, two):
        return io.NodeOutput(one if first else two)


class Fails(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Fails", outputs=[io.Int.Output()])

    @classmethod
    def execute(cls):
        raise RuntimeError("on purpose")


class Show(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Show",
            is_output_node=True,
            inputs=[
                io.AnyType.Input("value"),
                io.String.Input("prefix", default="=", dynamic_prompts=True, optional=True),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, value, prefix="="):
        calls.append(("Show", value))
        return io.NodeOutput(ui=ui.PreviewText(f"{cls.hidden.unique_id}{prefix}{value}"))


class Text(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Text", inputs=[io.String.Input("text", default="")], outputs=[io.String.Output()])

    @classmethod
    async def execute(cls, text):
        return io.NodeOutput(text)


CLASSES = {cls.GET_SCHEMA().node_id: cls for cls in (Number, Range, Add, Sum, Pick, Fails, Show, Text)}


def page_graph() -> dict:
    """Number -> Add -> Show as the page saves it: the seed is followed by its control, `a` is a socket."""
    return {
        "nodes": [
            {
                "id": 1,
                "type": "Number",
                "mode": 0,
                "inputs": [],
                "outputs": [{"type": "INT", "links": [1]}],
                "widgets_values": [7, "fixed", 2],
            },
            {
                "id": 2,
                "type": "Add",
                "mode": 0,
                "inputs": [{"name": "a", "type": "INT", "link": 1}],
                "outputs": [{"type": "INT", "links": [2]}],
                "widgets_values": [5, "-"],
            },
            {
                "id": 3,
                "type": "Show",
                "title": "Result",
                "mode": 0,
                "inputs": [{"name": "value", "type": "*", "link": 2}],
                "outputs": [],
                "widgets_values": ["="],
            },
            {
                "id": 4,
                "type": "MarkdownNote",
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "widgets_values": ["hello"],
            },
        ],
        "links": [[1, 1, 0, 2, 0, "INT"], [2, 2, 0, 3, 0, "INT"]],
        "version": 0.4,
    }


def api_graph() -> dict:
    """The same graph as the page exports it."""
    return {
        "1": {"class_type": "Number", "inputs": {"seed": 7, "plus": 2}, "_meta": {"title": "Number"}},
        "2": {"class_type": "Add", "inputs": {"b": 5, "sign": "-", "a": ["1", 0]}, "_meta": {"title": "Add"}},
        "3": {
            "class_type": "Show",
            "inputs": {"prefix": "=", "value": ["2", 0]},
            "_meta": {"title": "Result"},
        },
    }
