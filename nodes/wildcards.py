"""A prompt with choices, made."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .sampling import MAX_SEED

CATEGORY = "ERNIE/text"
FOLDER = "wildcards"


def find_wildcards(folder: str = FOLDER):
    """The reader of the wildcard files in `folder` of the input folder."""
    from ..ernie_core.wildcards import Wildcards

    return Wildcards(folder=host.input_folder() / folder.strip())


class ErnieWildcards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieWildcards",
            display_name="Wildcards (ERNIE)",
            category=CATEGORY,
            description="Makes the choices of a prompt: options in braces, weights, picks of several, lists in files.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip="A prompt with options in braces, separated by bars, and names of lists in files between "
                    "double underscores; the help page shows every form. Weights of words such as (word:1.2) are no "
                    "choices and stay plain text: this text encoder has none.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="What the choices follow from: the same seed makes the same ones on every machine.",
                ),
                io.Int.Input(
                    "row",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Number of a prompt under one seed, 0 to 10000000: row 0 here is what Batch from Prompts "
                    "makes of its first row.",
                ),
                io.String.Input(
                    "folder",
                    default=FOLDER,
                    tooltip="Folder with the .txt files, one option per line, inside ComfyUI's input folder; an "
                    "absolute path works too.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt with every choice made."),
                io.String.Output(
                    display_name="report", tooltip="The prompt, and pieces that look like weights but are plain text."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = FOLDER, **others) -> list:
        """Changes with the files of choices. What is linked comes as None."""
        return [] if folder is None else find_wildcards(folder).state()

    @classmethod
    def execute(cls, text: str, seed: int, row: int, folder: str) -> io.NodeOutput:
        from ..ernie_core.wildcards import find_weighting

        prompt = find_wildcards(folder).expand(text, seed=seed, row=row)
        weighted = find_weighting(prompt)
        note = f"\nRead as plain text, not as weights: {', '.join(weighted)}" if weighted else ""
        return io.NodeOutput(prompt, prompt + note, ui={"text": [prompt + note]})
