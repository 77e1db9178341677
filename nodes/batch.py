"""Many pictures from a list of prompts."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .rows import default_row, missing_sockets, model_inputs, open_studio, remake_input, remake_row, run_rows
from .sampling import (
    CUSTOM,
    MAX_SEED,
    PRESETS,
    SAMPLER_TOOLTIP,
    cfg_input,
    sampler_input,
    shift_input,
    size_inputs,
    steps_input,
)
from .wildcards import find_wildcards

CATEGORY = "ERNIE/batch"
ROW_TOOLTIP = " For rows without a %s column."


def row_inputs() -> list:
    """What a row of a list may say itself; these are for rows without that column."""
    return [
        io.String.Input("negative", multiline=True, default="", tooltip="Negative prompt." + ROW_TOOLTIP % "negative"),
        *size_inputs("Picture %s in pixels, a multiple of 16. For rows without that column."),
        io.Combo.Input(
            "preset",
            options=[*PRESETS, CUSTOM],
            default=next(iter(PRESETS)),
            tooltip="Official steps / cfg of the two models, for rows without those columns. custom takes "
            "steps and "
            "cfg from below.",
        ),
        steps_input(tooltip="Model evaluations, 1 to 1000, when preset is custom." + ROW_TOOLTIP % "steps"),
        cfg_input(
            "Strength of the prompt against the negative, 0 to 100, 1 = off, when preset is custom."
            + ROW_TOOLTIP % "cfg"
        ),
        shift_input("Share of the steps at high noise, 4 is official, 1 = even." + ROW_TOOLTIP % "shift"),
    ]


class ErnieBatchFromPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieBatchFromPrompts",
            display_name="Batch from Prompts (ERNIE)",
            category=CATEGORY,
            description="Makes one picture per row of a prompt list and goes on where an interrupted run stopped.",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "source",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line (# starts a comment); or the path of a .txt, .csv or .jsonl file, "
                    "or of a folder of them. csv and jsonl may have the columns prompt, negative, seed, width, height, "
                    "steps, cfg, shift, sampler. The folder of an earlier run: its pictures again, same prompts, seeds "
                    "and settings. Relative paths start in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "name",
                    default="batch",
                    tooltip="Folder inside the output folder. A row whose picture is already there is not made "
                    "again: take a "
                    "new name when you change model or LoRA.",
                ),
                *row_inputs(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Row 1 gets this seed, row 2 the next, and so on." + ROW_TOOLTIP % "seed",
                ),
                io.Boolean.Input(
                    "collect",
                    default=True,
                    tooltip="On: hand all pictures on as a list, also those made before. Off: only write files, for "
                    "lists "
                    "too long for memory (12 MB per picture of 1024 x 1024).",
                ),
                io.Boolean.Input(
                    "wildcards",
                    default=False,
                    tooltip="On: options in braces, separated by bars, and names of lists in input/wildcards between "
                    "double underscores are chosen from, in prompt and negative; the help page shows every form. Off "
                    "(neutral): these signs are plain text.",
                    optional=True,
                ),
                io.Int.Input(
                    "variations",
                    default=1,
                    min=1,
                    max=100_000,
                    tooltip="Pictures per row, 1 to 100000, 1 = neutral: the second gets the next seed and its own "
                    "choices, and so on.",
                    optional=True,
                ),
                remake_input(),
                io.String.Input(
                    "made_with",
                    default="",
                    tooltip="What else makes the pictures, such as lora_path of Train: the folder's name gets a number "
                    "of it (of the file's content, where it is a file), so that another LoRA paints into another "
                    "folder. Empty (neutral): name alone.",
                    optional=True,
                ),
                sampler_input(optional=True, tooltip=SAMPLER_TOOLTIP + ROW_TOOLTIP % "sampler"),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="The pictures in row order; empty when collect is off.",
                    is_output_list=True,
                ),
                io.String.Output(
                    display_name="report", tooltip="How many were made and kept, and which rows failed why."
                ),
                io.String.Output(
                    display_name="folder", tooltip="Path of the run's folder, for Tournament, Score Images, Win Rate."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def check_lazy_status(cls, **inputs) -> list[str]:
        return missing_sockets(inputs, ("model", "clip", "vae"))

    @classmethod
    def fingerprint_inputs(cls, source, name, wildcards: bool = False, made_with: str | None = "", **others) -> list:
        """Changes with the files read and with what lies in the folder, so that a deleted picture is made again."""
        from ..ernie_core.batch import fingerprint

        places = {"inputs": host.input_folder(), "output": host.output_folder()}
        state = fingerprint(source, name, made_with=made_with, **places)
        return [*state, *(find_wildcards().state() if wildcards else [])]

    @classmethod
    def execute(
        cls, model, clip, vae, source, name, collect, seed, wildcards=False, variations=1, remake=0, made_with="",
        **settings,
    ) -> io.NodeOutput:  # fmt: skip
        from ..ernie_core.batch import name_run, read_image, read_rows, run_folder, vary_rows

        studio = open_studio(models=[model], clip=clip, vae=vae, hidden=cls.hidden, made_with=made_with)
        name = name_run(name, made_with)
        folder = str(run_folder(host.output_folder(), name))
        if remake:
            image, report = remake_row(name, remake, studio)
            return io.NodeOutput([image], report, folder, ui={"text": [report]})
        rows, problems = read_rows(source, default_row(seed=seed, **settings), folder=host.input_folder())
        choices = find_wildcards() if wildcards else None
        rows, more = vary_rows(rows, variations=variations, wildcards=choices, seed=seed)
        result = run_rows(rows, name, studio)
        images = [read_image(path)[None] for path in result.files] if collect else []
        report = result.report([*problems, *more])
        return io.NodeOutput(images, report, folder, ui={"text": [report]})
