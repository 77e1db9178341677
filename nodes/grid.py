"""Compare: a grid over up to three settings."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .loading import Enhancer
from .rows import Studio, default_row, missing_sockets, model_inputs, open_studio, remake_input, remake_row, run_rows
from .sampling import CUSTOM, MAX_SEED, PRESETS, cfg_input, shift_input, size_inputs, steps_input
from .text import MAX_NEW_TOKENS

CATEGORY = "ERNIE/compare"
VARIANTS = 4
# What ernie_core.grid.AXES offers; a test holds the two together (the engine is not imported before a node runs).
AXES = ("none", "seed", "steps", "cfg", "shift", "sampler", "LoRA", "prompt part", "enhancer", "checkpoint", "model")
VALUES_TOOLTIP = (
    "Values of the %s axis, separated by commas or one per line; numbers may be ranges (1-4, 0-1:0.25). LoRA: "
    "file:strength, + joins several. Prompt part: the part to replace, then what replaces it. Model: 1, 2:name."
)


def axis_inputs(letter: str, default: str, values: str, what: str) -> list:
    return [
        io.Combo.Input(
            f"{letter}_axis", options=list(AXES), default=default, tooltip=f"The setting that changes {what}."
        ),
        io.String.Input(f"{letter}_values", default=values, multiline=True, tooltip=VALUES_TOOLTIP % letter),
    ]


class ErnieXYGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieXYGrid",
            display_name="XY Grid (ERNIE)",
            category=CATEGORY,
            description="Makes a labelled grid over up to three settings, with every picture as a file of its own.",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                *model_inputs(),
                io.String.Input("prompt", multiline=True, default="", tooltip="What every picture shows."),
                io.String.Input(
                    "name",
                    default="grid",
                    tooltip="Folder inside the output folder. A picture that is already there is not made again: take "
                    "a new name when you change model or LoRA in front of this node.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="Negative prompt of every picture."),
                *size_inputs("Picture %s in pixels, a multiple of 16."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default=next(iter(PRESETS)),
                    tooltip="Official steps / cfg of the two models, where no axis changes them. custom takes steps "
                    "and cfg from below.",
                ),
                steps_input(tooltip="Model evaluations, 1 to 1000, when preset is custom and no axis is steps."),
                cfg_input(
                    "Strength of the prompt against the negative, 0 to 100, 1 = off, when preset is custom and no axis "
                    "is cfg."
                ),
                shift_input("Share of the steps at high noise, 4 is official, 1 = even, when no axis is shift."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Noise number of every picture, when no axis is seed.",
                ),
                *axis_inputs("x", "cfg", "1, 2, 4", "from left to right"),
                *axis_inputs("y", "seed", "0-2", "from top to bottom"),
                *axis_inputs("z", "none", "", "from sheet to sheet"),
                io.Int.Input(
                    "cell_px",
                    default=384,
                    min=0,
                    max=4096,
                    tooltip="Longest side of a picture on the sheets in pixels, 0 to 4096, 0 (neutral) = as large as "
                    "it is. Sheets stay below 8192 pixels. The single files are always whole.",
                ),
                io.Boolean.Input(
                    "collect",
                    default=False,
                    tooltip="On: hand the single pictures on as a list too. Off: files and sheets only.",
                ),
                Enhancer.Input(
                    "enhancer",
                    optional=True,
                    lazy=True,
                    tooltip="Prompt enhancer, loaded only when an axis is enhancer and has the value on.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=MAX_NEW_TOKENS,
                    min=1,
                    max=MAX_NEW_TOKENS,
                    optional=True,
                    tooltip="Longest text of the enhancer in tokens, 1 to 2048; 2048 is the official value.",
                ),
                *(
                    io.Model.Input(
                        f"model_{i}",
                        optional=True,
                        lazy=True,
                        tooltip=f"Model {i} of an axis that is model: any patched MODEL. Not loaded otherwise.",
                    )
                    for i in range(2, VARIANTS + 1)
                ),
                remake_input(),
            ],
            outputs=[
                io.Image.Output(display_name="sheets", tooltip="The labelled sheets, one per value of the z axis."),
                io.Image.Output(
                    display_name="images",
                    tooltip="The single pictures, x fastest, z slowest; empty when collect is off.",
                    is_output_list=True,
                ),
                io.String.Output(display_name="report", tooltip="How many were made and kept, and where they are."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def check_lazy_status(cls, **inputs) -> list[str]:
        chosen = {inputs.get(f"{letter}_axis") for letter in "xyz"}
        wanted = ["model", "clip", "vae", *(["enhancer"] if "enhancer" in chosen else [])]
        wanted += [f"model_{i}" for i in range(2, VARIANTS + 1)] if "model" in chosen else []
        return missing_sockets(inputs, wanted)

    @classmethod
    def fingerprint_inputs(cls, name: str, **others) -> list:
        """Changes with what lies in the folder, so that a deleted picture is made again."""
        from ..ernie_core.batch import fingerprint

        return fingerprint("", name, inputs=host.input_folder(), output=host.output_folder())

    @classmethod
    def execute(
        cls, model, clip, vae, name, cell_px, collect, enhancer=None, max_new_tokens=MAX_NEW_TOKENS, remake=0, **inputs
    ) -> io.NodeOutput:
        from ..ernie_core.batch import read_image
        from ..ernie_core.grid import make_cells

        models = [model, *(inputs.pop(f"model_{i}", None) for i in range(2, VARIANTS + 1))]
        studio = open_studio(
            models=models, clip=clip, vae=vae, hidden=cls.hidden, enhancer=enhancer, max_new_tokens=max_new_tokens
        )
        if remake:
            image, report = remake_row(name, remake, studio)
            return io.NodeOutput(image, [image], report, ui={"text": [report]})
        axes = read_axes(inputs, models, enhancer)
        cells = make_cells(default_row(**inputs), axes)
        result = run_rows([cell.row for cell in cells], name, studio)
        files = {cell.place: path for cell, path in zip(cells, result.files, strict=True)}
        sheets, notes = make_sheets(default_row(**inputs), axes, files, cell_px, studio)
        images = [read_image(files[place])[None] for place in sorted(files, key=lambda p: p[::-1])] if collect else []
        report = "\n".join([result.report([]), *notes])
        return io.NodeOutput(sheets, images, report, ui={"text": [report]})


def read_axes(inputs: dict, models: list, enhancer) -> list:
    """The three axes of the widgets, which are taken out of `inputs`."""
    from ..ernie_core.grid import Offers, parse_axis

    chosen = [(inputs.pop(f"{letter}_axis"), inputs.pop(f"{letter}_values")) for letter in "xyz"]
    names = {name for name, _ in chosen}
    connected = max(i for i, model in enumerate(models, start=1) if model is not None or i == 1)
    offers = Offers(
        loras=host.list_loras() if "LoRA" in names else (),
        checkpoints=host.list_models("diffusion_models") if "checkpoint" in names else (),
        variants=connected,
        has_enhancer=enhancer is not None,
    )
    return [parse_axis(name, text, offers) for name, text in chosen]


def make_sheets(row, axes: list, files: dict, cell_px: int, studio: Studio) -> tuple:
    """(the sheets [Z, H, W, 3], lines for the report); each sheet is also a file."""
    import hashlib

    import torch

    from ..ernie_core.batch import read_pixels
    from ..ernie_core.grid import describe, draw_sheets
    from ..ernie_core.lettering import undrawable

    head = describe(row, axes)
    made = draw_sheets(axes, lambda *place: read_pixels(files[place]), head=head, cell_px=cell_px)
    sheets, notes = [], []
    for z, pixels in enumerate(made):
        host.throw_if_interrupted()
        sheets.append(torch.tensor(pixels).float() / 255)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:12]
        path = files[0, 0, 0].with_name(f"sheet_{digest}.png")
        if not path.is_file():
            studio.save_sheet(sheets[-1], path)
        notes.append(f"sheet {z + 1}: {path.name}")
    labels = [value.label for axis in axes for value in axis.values]
    if lost := undrawable(" ".join([*head, *labels])):
        notes.append(f"no font on this machine shows {lost}: these are question marks on the sheets.")
    return torch.stack(sheets), notes
