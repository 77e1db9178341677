"""The hardware adviser: what to load on this machine, from the files at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .sampling import size_inputs

CATEGORY = "ERNIE/tools"
THIS = "this machine"
CARDS = (
    *(THIS, "RTX 5090 32 GB", "RTX 5070 Ti 16 GB", "RTX 4090 24 GB", "RTX 4060 8 GB", "RTX 3090 24 GB"),
    *("RTX 3060 12 GB", "RTX 2080 Ti 11 GB", "RX 9070 XT 16 GB", "RX 7900 XTX 24 GB", "Arc A770 16 GB"),
)
KINDS = {"diffusion_models": ("transformer",), "text_encoders": ("text_encoder", "enhancer"), "vae": ("vae",)}


class ErnieHardwareAdviser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieHardwareAdviser",
            display_name="Hardware Adviser (ERNIE)",
            category=CATEGORY,
            description="Says which of the model files at hand to load on this machine, why, and the memory that they "
            "take.",
            is_output_node=True,
            inputs=[
                *size_inputs("Picture %s in pixels, a multiple of 16, that the memory is computed for."),
                io.Int.Input(
                    "text_tokens",
                    default=256,
                    min=1,
                    max=2048,
                    tooltip="Length of the prompt in tokens, 1 to 2048; an enhanced prompt has some hundreds.",
                ),
                io.Combo.Input(
                    "card",
                    options=list(CARDS),
                    default=THIS,
                    tooltip="this machine: the card that is here. Others: what would be right with that card in it.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What to load, why, what it takes, and warnings."),
                io.String.Output(
                    display_name="table", tooltip="Every file of ERNIE-Image that was found, as a Markdown table."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_others) -> list:
        """Changes with the files in the model folders."""
        return [(name, path.stat().st_mtime_ns if path.exists() else 0) for name, path, _ in files_at_hand()[0]]

    @classmethod
    def execute(cls, width: int, height: int, text_tokens: int, card: str) -> io.NodeOutput:
        from ..ernie_core.adviser import advise, read_machine, with_card
        from ..ernie_core.weights.inventory import look_at_all

        machine = read_machine(host.models_folder())
        if card != THIS:
            machine = with_card(machine, card)
        files, gone = files_at_hand()
        found, problems = look_at_all(files)
        advice = advise(machine, found, width, height, text_tokens=text_tokens, problems=[*gone, *problems])
        return io.NodeOutput(advice.report(), advice.table(), ui={"text": [advice.report()]})


def files_at_hand() -> tuple[list[tuple[str, Path, Any]], list[str]]:
    """((name, path, networks it may hold) of every model file the host lists, why others cannot be found)."""
    found, gone = [], []
    for folder, kinds in KINDS.items():
        for name in host.list_models(folder):
            try:
                found.append((name, Path(host.model_path(folder, name)), kinds))
            except ErnieError as e:
                gone.append(str(e))
    return found, gone
