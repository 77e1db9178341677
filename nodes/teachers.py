"""Who teaches what in a distillation: LoRAs and the base, by prompt, noise level and term."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .lora import NONE, file_state, lora_input
from .training import to_image

Teachers = io.Custom("ERNIE_TEACHERS")
SLOTS = ("lora_1", "lora_2", "lora_3", "lora_4")
PRESETS = ("as written", "by tag", "by noise level", "by term", "the article's bands")


class ErnieTeacherTable(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieTeacherTable",
            display_name="Teacher Table (ERNIE)",
            category="ERNIE/training",
            description="Says which LoRAs teach a few-step student, by prompt tag, noise level and term.",
            inputs=[
                *(
                    lora_input(
                        slot,
                        "A file from models/loras that teaches; its name in the table is the file's. none (neutral): "
                        "no teacher here, the base alone.",
                        optional=True,
                    )
                    for slot in SLOTS
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=PRESETS[0],
                    tooltip="Rules behind those of the text. by tag: each LoRA for prompts with its name as tag. by "
                    "noise level: equal bands, the first LoRA at high noise. by term: the first LoRA for CA, the "
                    "second for DM. the article's bands: three bands of an article, not the report's. as written "
                    "(neutral): none.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="Rules, one per line, the first that matches wins; see the help page for their form. Empty "
                    "(neutral): none.",
                ),
                io.Float.Input(
                    "blend",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Width in sigma over which neighbouring bands hand over, 0 to 1. 0 (neutral) = at once, "
                    "or what the text says. Where two LoRAs blend, both are evaluated.",
                ),
            ],
            outputs=[
                Teachers.Output(display_name="teachers", tooltip="The table, for Recipe Distil."),
                io.Image.Output(display_name="picture", tooltip="Who teaches what at which noise level."),
                io.String.Output(display_name="report", tooltip="The whole table as text, which the input text takes."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, preset: str, text: str, blend: float, **slots) -> list:
        return [preset, text, blend, *(file_state(name) for name in chosen(slots))]

    @classmethod
    def execute(cls, preset: str, text: str, blend: float, **slots) -> io.NodeOutput:
        from ..ernie_core.training.teacher_chart import draw_table
        from ..ernie_core.training.teachers import make_table, with_files, write_table

        table = make_table(text, chosen(slots), preset, blend)
        return io.NodeOutput(with_files(table, host.lora_path), to_image(draw_table(table)), write_table(table))


def chosen(slots) -> list[str]:
    """The LoRA files of the slots that have one, in the slots' order."""
    return [slots[slot] for slot in SLOTS if slots.get(slot, NONE) != NONE]
