"""A prompt for a picture with text in it, field by field."""

from __future__ import annotations

from comfy_api.latest import io

from ..ernie_core import layout_prompt
from . import host

CATEGORY = "ERNIE/text"


class ErnieLayoutPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLayoutPrompt",
            display_name="Layout Prompt (ERNIE)",
            category=CATEGORY,
            description="Makes the prompt of a picture with text in it: poster, cover, infographic, comic or stickers.",
            inputs=[
                io.Combo.Input(
                    "layout",
                    options=layout_prompt.layouts(),
                    tooltip="What is laid out. comic and stickers have a panel per line of body and a grid.",
                ),
                io.Combo.Input(
                    "language",
                    options=layout_prompt.languages(),
                    tooltip="Language of the sentences around your fields: en English, zh Chinese. The fields stay as "
                    "they are.",
                ),
                io.String.Input(
                    "subject",
                    multiline=True,
                    default="",
                    tooltip="What the picture shows, in your words; text to show goes between quotation marks. Empty "
                    "(neutral) is left out.",
                ),
                io.String.Input(
                    "style",
                    default="",
                    tooltip="How it is made, such as flat vector art in two colours. Empty (neutral) is left out.",
                ),
                io.String.Input(
                    "title",
                    default="",
                    tooltip="The largest text, one line, without quotation marks around it. Empty (neutral) is left "
                    "out.",
                ),
                io.String.Input(
                    "subtitle",
                    default="",
                    tooltip="A smaller text, one line, without quotation marks around it. Empty (neutral) is left out.",
                ),
                io.String.Input(
                    "body",
                    multiline=True,
                    default="",
                    tooltip="poster, cover, infographic: further texts to show, one per line. comic, stickers: one "
                    "panel per line, what happens in your words and its text between quotation marks. Empty (neutral) "
                    "is left out.",
                ),
                *(
                    io.Int.Input(
                        name,
                        default=2,
                        min=1,
                        max=layout_prompt.MAX_SIDE,
                        tooltip=f"{name.capitalize()} of the grid of panels, 1 to {layout_prompt.MAX_SIDE}. Unused "
                        "(neutral) in poster, cover and infographic.",
                    )
                    for name in ("columns", "rows")
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoder: connected, its tokens are counted exactly and more than 2048 are refused. "
                    "Not connected (neutral): they are estimated from the words.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt, for Enhance Prompt or Encode Prompt."),
                io.String.Output(
                    display_name="report", tooltip="Words and tokens of the prompt, and every text that is to be seen."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip=None, **fields) -> io.NodeOutput:
        page = layout_prompt.LayoutPrompt(**fields)
        prompt = page.write()
        counted = host.count_tokens(clip, prompt) if clip is not None else None
        report = layout_prompt.report(page, prompt, counted)
        return io.NodeOutput(prompt, report, ui={"text": [f"{prompt}\n\n{report}"]})
