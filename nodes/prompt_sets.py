"""Pictures of a prompt set with categories: what an evaluation by category looks at."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from . import host
from .loading import Enhancer
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

CATEGORY = "ERNIE/evaluation"
EXAMPLE = "example"
TEXTS = ("prompt", "translation")


class ErniePromptSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErniePromptSet",
            display_name="Prompt Set (ERNIE)",
            category=CATEGORY,
            description="Paints a table of prompts with categories in one setting, the same seeds in every setting.",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "prompts",
                    default=EXAMPLE,
                    tooltip="A .csv, .tsv, .txt, .json or .jsonl file with a column of prompts and, if there are, of "
                    "categories, sources and translations, such as ViLG-300 or DrawBench; relative paths start in "
                    "ComfyUI's input folder. example: 48 prompts in 16 categories that come with the pack.",
                ),
                io.String.Input(
                    "name",
                    default="prompt_set/base",
                    tooltip="Folder inside the output folder; its last part names the setting in reports. A picture "
                    "that is already there is not made again: take a new name when you change model or LoRA.",
                ),
                io.Int.Input(
                    "per_category",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Only the first so many prompts of each category, 0 to 10000, for a quick look. 0 "
                    "(neutral) = all.",
                ),
                io.Int.Input(
                    "seeds_per_prompt",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Pictures per prompt, 1 to 1000, with seeds that count up. More make a report surer, but "
                    "less than more prompts would.",
                ),
                io.String.Input(
                    "negative", multiline=True, default="", tooltip="Negative prompt of every picture. Empty: none."
                ),
                *size_inputs("Picture %s in pixels, a multiple of 16."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default=next(iter(PRESETS)),
                    tooltip="Official steps / cfg of the two models. custom takes steps and cfg from below.",
                ),
                steps_input(tooltip="Model evaluations, 1 to 1000, when preset is custom."),
                cfg_input("Strength of the prompt against the negative, 0 to 100, 1 = off, when preset is custom."),
                shift_input("Share of the steps at high noise, 4 is official, 1 = even."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the set's first prompt; each prompt has a thousand of its own from there. Two "
                    "settings of one seed paint the same noise.",
                ),
                io.Boolean.Input(
                    "enhance",
                    default=False,
                    tooltip="On: the connected enhancer writes every prompt out first. Off (neutral): prompts as "
                    "they are.",
                ),
                io.Boolean.Input(
                    "collect",
                    default=False,
                    tooltip="On: hand all pictures on as a list. Off (neutral): only write files.",
                ),
                io.String.Input(
                    "categories",
                    default="",
                    optional=True,
                    tooltip="Only these categories, separated by commas. Empty (neutral): all.",
                ),
                io.Combo.Input(
                    "text",
                    options=list(TEXTS),
                    default=TEXTS[0],
                    optional=True,
                    tooltip="What is painted of a row: its prompt, or its translation, such as ViLG-300's Chinese.",
                ),
                io.String.Input(
                    "prompt_column",
                    default="",
                    optional=True,
                    tooltip="Name of the column with the prompts. Empty (neutral): found by the usual names, and told.",
                ),
                io.String.Input(
                    "category_column",
                    default="",
                    optional=True,
                    tooltip="Name of the column with the categories. Empty (neutral): found by the usual names, and "
                    "told.",
                ),
                remake_input(),
                io.String.Input(
                    "made_with",
                    default="",
                    optional=True,
                    tooltip="What else makes the pictures, such as lora_path of Train: the folder's name gets a "
                    "number of it. Empty (neutral): name alone.",
                ),
                sampler_input(optional=True, tooltip=SAMPLER_TOOLTIP),
                Enhancer.Input(
                    "enhancer", optional=True, lazy=True, tooltip="Prompt enhancer, loaded only when enhance is on."
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="folder", tooltip="Path of the setting's folder, for the judges and for distances."
                ),
                io.Image.Output(
                    display_name="images",
                    tooltip="The pictures in the order of the set; empty when collect is off.",
                    is_output_list=True,
                ),
                io.String.Output(
                    display_name="report", tooltip="What was read from which column, counts, and which rows failed why."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def check_lazy_status(cls, enhance=False, **inputs) -> list[str]:
        return missing_sockets(inputs, ("model", "clip", "vae", *(["enhancer"] if enhance else [])))

    @classmethod
    def fingerprint_inputs(cls, prompts: str | None, name: str | None, made_with: str | None = "", **others) -> list:
        """Changes with the table and with what lies in the folder, so that a deleted picture is made again."""
        from ..ernie_core.batch import fingerprint

        path = find_prompts(prompts or "")
        table = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)] if path.is_file() else []
        places = {"inputs": host.input_folder(), "output": host.output_folder()}
        return [*table, *fingerprint("", name, made_with=made_with, **places)]

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, name, per_category, seeds_per_prompt, enhance, collect, categories="",
        text=TEXTS[0], prompt_column="", category_column="", remake=0, made_with="", enhancer=None, **settings,
    ) -> io.NodeOutput:  # fmt: skip
        from ..ernie_core.batch import name_run, read_image, run_folder
        from ..ernie_core.evaluation import prompt_sets as engine

        studio = open_studio(
            models=[model], clip=clip, vae=vae, hidden=cls.hidden, enhancer=enhancer, made_with=made_with
        )
        name = name_run(name, made_with)
        folder = run_folder(host.output_folder(), name)
        if remake:
            image, report = remake_row(name, remake, studio)
            return io.NodeOutput(str(folder), [image], report, ui={"text": [report]})
        columns = {"prompt": prompt_column, "category": category_column}
        table = engine.read_prompt_set(find_prompts(prompts), columns=columns)
        chosen = engine.choose(table, categories=categories.split(","), per_category=per_category)
        row = default_row(**settings, enhance=enhance)
        rows = engine.make_rows(chosen, row, seeds=seeds_per_prompt, translated=text == TEXTS[1])
        engine.write_setting(folder, chosen, rows)
        result = run_rows([row for part in rows for row in part], name, studio)
        images = [read_image(path)[None] for path in result.files] if collect else []
        report = f"{result.report([])}\n{chosen.report()}"
        return io.NodeOutput(str(folder), images, report, ui={"text": [report]})


def find_prompts(text: str) -> Path:
    """The file that is meant: in the input folder, elsewhere, or the one that comes with the pack."""
    from ..ernie_core.evaluation.prompt_sets import EXAMPLE as SHIPPED

    named = text.strip().strip('"')
    return SHIPPED if named == EXAMPLE else host.input_folder() / Path(named).expanduser()
