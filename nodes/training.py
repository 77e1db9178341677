"""Training: which models, by which recipe, on which data; running it, and looking at it.

A recipe node only fills in the engine's `Recipe`. Training itself happens in a process of its own that reads the job
folder, so the graph's memory and its models are not touched.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui

from ..ernie_core.errors import ErnieError, Interrupted
from . import host
from .dataset import Dataset, Pairs, on_progress, show

CATEGORY = "ERNIE/training"
TrainingModels = io.Custom("ERNIE_TRAINING_MODELS")
TrainingRecipe = io.Custom("ERNIE_RECIPE")
TrainingJob = io.Custom("ERNIE_JOB")
LoraModel = io.Custom("LORA_MODEL")  # core's: a state dict

NONE = "none"
ADVANCED = {"advanced": True}  # folded away by pages that know the word
PREVIEW_PX = 1024
PREVIEW_SECONDS = 3.0  # between two pictures on the node

ALGORITHMS = ("lora", "lokr", "dora")
PRECISIONS = ("bf16", "fp32", "fp8", "int8", "stored")
OPTIMISERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
SCHEDULES = ("cosine", "constant", "linear")
SIGMA_KINDS = ("logit_normal", "uniform", "style", "detail", "weighted")
REDUCTIONS = ("mean", "sum")
ACTIONS = ("start or resume", "start over", "attach")
PROCESSES = ("worker", "this one")


class ErnieTrainingModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        transformers = host.list_models("diffusion_models")
        return io.Schema(
            node_id="ErnieTrainingModels",
            display_name="Training Models (ERNIE)",
            category=CATEGORY,
            description="Names the files that training reads; nothing is loaded into the graph.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=transformers,
                    tooltip="The transformer to train on, best the Base model: a file from models/diffusion_models, or "
                    "a folder in the official layout (ends with /).",
                ),
                io.Combo.Input(
                    "encoder_name",
                    options=host.list_models("text_encoders"),
                    tooltip="The text encoder: a file from models/text_encoders, or an official folder.",
                ),
                io.Combo.Input(
                    "vae_name",
                    options=host.list_models("vae"),
                    tooltip="The FLUX.2 VAE: a file from models/vae, or an official folder.",
                ),
                io.Combo.Input(
                    "turbo_name",
                    options=[NONE, *transformers],
                    default=NONE,
                    tooltip="ERNIE-Image-Turbo, to see the sample prompts at its settings as well, since that is how "
                    "most LoRAs are used. none (neutral): samples of the trained model only.",
                ),
            ],
            outputs=[TrainingModels.Output(display_name="models", tooltip="Paths of the files, for Train.")],
        )

    @classmethod
    def execute(cls, model_name: str, encoder_name: str, vae_name: str, turbo_name: str) -> io.NodeOutput:
        from ..ernie_core.training.recipe import ModelPaths

        paths = ModelPaths(
            transformer=absolute("diffusion_models", model_name),
            text_encoder=absolute("text_encoders", encoder_name),
            vae=absolute("vae", vae_name),
            turbo="" if turbo_name == NONE else absolute("diffusion_models", turbo_name),
        )
        return io.NodeOutput(paths)


def absolute(kind: str, name: str) -> str:
    """The path that another process can read."""
    return str(host.model_path(kind, name).absolute())


# --- recipes ---------------------------------------------------------------------------------------------------------

# Where the value of a widget stands in a recipe.
PATHS: dict[str, tuple[str, ...]] = {
    "name": ("name",),
    "steps": ("steps",),
    "learning_rate": ("optimiser", "lr"),
    "algorithm": ("adapter", "algorithm"),
    "rank": ("adapter", "rank"),
    "alpha": ("adapter", "alpha"),
    "resolution": ("stages",),
    "batch_size": ("batch_size",),
    "accumulation": ("accumulation",),
    "precision": ("precision",),
    "seed": ("seed",),
    "save_every": ("save_every",),
    "sample_prompts": ("samples", "prompts"),
    "sample_every": ("samples", "every"),
    "sample_width": ("samples", "width"),
    "sample_height": ("samples", "height"),
    "optimiser": ("optimiser", "name"),
    "schedule": ("optimiser", "schedule"),
    "warmup": ("optimiser", "warmup"),
    "ema": ("optimiser", "ema"),
    "noise_levels": ("sigmas", "kind"),
    "region_weight": ("region_weight",),
    "keyword_weight": ("keyword_weight",),
    "skip_blocks": ("depth", "skip"),
    "skip_share": ("depth", "share"),
    "stream": ("stream",),
    "initial_lora": ("initial_lora",),
    "beta": ("dpo", "beta"),
    "anchor_win": ("dpo", "anchor_win"),
    "anchor_lose": ("dpo", "anchor_lose"),
    "reduction": ("dpo", "reduction"),
    "anchor_reduction": ("dpo", "anchor_reduction"),
    "auto_beta": ("dpo", "auto_beta"),
    "sdpo_mu": ("dpo", "sdpo_mu"),
    "reference_lora": ("reference_lora",),
    "reference_bank": ("reference_bank",),
}
OFF_AT_ZERO = ("alpha", "auto_beta", "sdpo_mu")  # None in a recipe
AUTO = "auto"  # the resolution that a recipe has when it says nothing


def common_inputs() -> list[io.Input]:
    """What every recipe asks for first."""
    return [
        io.String.Input(
            "name",
            default="my_lora",
            tooltip="Name of the job folder (output/ernie_jobs) and of the finished file in models/loras.",
        ),
        io.Int.Input(
            "steps",
            default=1500,
            min=1,
            max=1_000_000,
            tooltip="Optimiser steps, 1 to 1000000. A finished job goes on when this is raised.",
        ),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-7,
            max=10.0,
            step=1e-6,
            round=1e-7,
            tooltip="Size of a step at its peak, 0.0000001 to 10. 0.0001 suits adamw, 1 prodigy, which finds its own.",
        ),
        io.Combo.Input(
            "algorithm",
            options=list(ALGORITHMS),
            default="lora",
            tooltip="lora: read everywhere. lokr: Kronecker factors, smaller files. dora: LoRA with trained "
            "magnitudes, slower.",
        ),
        io.Int.Input(
            "rank",
            default=32,
            min=1,
            max=1024,
            tooltip="Size of the adapter, 1 to 1024: how much it can hold, and how large the file is. Not read by lokr "
            "factors that are whole.",
        ),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.5,
            tooltip="Scale of the adapter times rank, 0 to 1024. 0 (neutral) = the rank, so scale 1; half the rank "
            "halves what a step changes.",
            extra_dict=ADVANCED,
        ),
        io.String.Input(
            "resolution",
            default=AUTO,
            tooltip="Picture area as the side of a square in pixels; pictures keep their shape. 512+1024: each picture "
            "at both. 256:400, 512:900, 1024: a curriculum, at 256 until step 400, at 512 until step 900, then at "
            "1024. auto (neutral): as the dataset's file says, else 1024.",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Pictures computed at once, 1 to 256."),
        io.Int.Input(
            "accumulation",
            default=2,
            min=1,
            max=1024,
            tooltip="Batches per optimiser step, 1 to 1024: as a larger batch, in more time and no more memory. "
            "1 = none.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="bf16",
            tooltip="Type that the frozen model is kept in; the adapter itself is always fp32. fp8 and int8 halve the "
            "memory, stored leaves the file's own quantised weights as they are.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="Number that all noise, order and draws follow from: the same seed repeats the run.",
        ),
        io.Int.Input(
            "save_every",
            default=250,
            min=1,
            max=1_000_000,
            tooltip="Steps between two checkpoints, 1 to 1000000. An interrupt saves as well.",
        ),
        io.String.Input(
            "sample_prompts",
            multiline=True,
            default="",
            tooltip="One prompt per line, painted on the way from always the same noise. Empty (neutral): no samples.",
        ),
        io.Int.Input(
            "sample_every",
            default=250,
            min=0,
            max=1_000_000,
            tooltip="Steps between two grids of samples, 0 to 1000000. 0 = only at the end.",
        ),
        *(
            io.Int.Input(
                f"sample_{side}",
                default=1024,
                min=16,
                max=8192,
                step=16,
                tooltip=f"{side.capitalize()} of a sample in pixels, 16 to 8192, a multiple of 16.",
                extra_dict=ADVANCED,
            )
            for side in ("width", "height")
        ),
    ]


def advanced_inputs() -> list[io.Input]:
    """What few people change, and the text for everything else."""
    return [
        io.Combo.Input(
            "optimiser",
            options=list(OPTIMISERS),
            default="adamw",
            tooltip="adamw needs nothing. adamw8bit saves memory (package bitsandbytes, GPU only). prodigy finds the "
            "learning rate itself (package prodigyopt). adafactor needs the least memory.",
            extra_dict=ADVANCED,
        ),
        io.Combo.Input(
            "schedule",
            options=list(SCHEDULES),
            default="cosine",
            tooltip="How the learning rate falls after the warm-up: to a tenth along a cosine or a line, or not at "
            "all (constant).",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "warmup",
            default=50,
            min=0,
            max=100_000,
            tooltip="Steps in which the learning rate rises to its peak, 0 to 100000. 0 = at once.",
            extra_dict=ADVANCED,
        ),
        io.Float.Input(
            "ema",
            default=0.0,
            min=0.0,
            max=0.9999,
            step=0.0001,
            round=0.0001,
            tooltip="Decay of a running average of the adapter that is saved in its place, 0 to 0.9999. 0 (neutral) = "
            "none; 0.99 averages about 100 steps.",
            extra_dict=ADVANCED,
        ),
        io.Combo.Input(
            "noise_levels",
            options=list(SIGMA_KINDS),
            default="logit_normal",
            tooltip="Which noise levels are trained most. logit_normal: the middle. uniform: all alike. style: high "
            "noise, composition. detail: low noise. weighted: uniform with weighted losses.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "skip_blocks",
            default=0,
            min=0,
            max=64,
            tooltip="Elastic depth: how many blocks are left out in some of the steps, 0 to 64, so that the LoRA also "
            "serves Reduced Depth (ERNIE). 0 (neutral) = off.",
            extra_dict=ADVANCED,
        ),
        io.Float.Input(
            "skip_share",
            default=0.25,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of the steps that run with skip_blocks left out, 0 to 1.",
            extra_dict=ADVANCED,
        ),
        io.Boolean.Input(
            "stream",
            default=False,
            tooltip="Keep the model in RAM and bring its blocks to the GPU one by one: slower, for little GPU memory. "
            "Off (neutral): the whole model is on the GPU.",
            extra_dict=ADVANCED,
        ),
        io.Combo.Input(
            "initial_lora",
            options=[NONE, *host.list_loras()],
            default=NONE,
            tooltip="A file from models/loras that training goes on from. none (neutral): from nothing.",
            extra_dict=ADVANCED,
        ),
        io.String.Input(
            "settings",
            multiline=True,
            default="",
            tooltip="Every other setting of a recipe, in TOML; for example [adapter] targets, [optimiser] betas, "
            "[sigmas] shift, checkpointing, tensorboard. An unknown name is an error that suggests the right one. "
            "Empty (neutral): defaults.",
            extra_dict=ADVANCED,
        ),
    ]


class ErnieRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieRecipe",
            display_name="Recipe (ERNIE)",
            category=CATEGORY,
            description="Describes how a LoRA is trained to paint what a dataset shows.",
            inputs=[
                *common_inputs(),
                io.Float.Input(
                    "region_weight",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Extra weight of the error inside the boxes of the dataset, 0 to 10. 0 (neutral) = off; "
                    "ERNIE-ViLG 2.0 used 0.1.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "keyword_weight",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Extra attention of the picture to the keywords of the dataset while training, 0 to 10. "
                    "0 (neutral) = off; ERNIE-ViLG 2.0 used 0.01.",
                    extra_dict=ADVANCED,
                ),
                *advanced_inputs(),
            ],
            outputs=[TrainingRecipe.Output(display_name="recipe", tooltip="The recipe, for Train and Preflight.")],
        )

    @classmethod
    def execute(cls, settings: str, **widgets) -> io.NodeOutput:
        return io.NodeOutput(make_recipe("sft", widgets, settings))


class ErnieRecipeDPO(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieRecipeDPO",
            display_name="Recipe DPO (ERNIE)",
            category=CATEGORY,
            description="Describes how a LoRA learns a preference from pairs of a better and a worse picture.",
            inputs=[
                *common_inputs(),
                io.Float.Input(
                    "beta",
                    default=0.05,
                    min=1e-4,
                    max=1e6,
                    step=0.01,
                    round=1e-4,
                    tooltip="How strongly winner and loser are pulled apart, 0.0001 to 1000000, on the scale of "
                    "reduction. 0.05 is the report's value, meant for sum.",
                ),
                io.Float.Input(
                    "anchor_win",
                    default=0.35,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Weight of the ordinary loss on the winner, 0 to 100, which keeps it painted well. 0.35 is "
                    "the report's value, 0 = none.",
                ),
                io.Float.Input(
                    "anchor_lose",
                    default=0.15,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Weight of the ordinary loss on the loser, 0 to 100. 0.15 is the report's value, 0 = none.",
                ),
                io.Combo.Input(
                    "reduction",
                    options=list(REDUCTIONS),
                    default="sum",
                    tooltip="Errors inside the preference: summed over a picture, or their mean. With sum the loser "
                    "is pushed away until the pair is won; with mean for both reductions it never is: see the help.",
                ),
                io.Combo.Input(
                    "anchor_reduction",
                    options=list(REDUCTIONS),
                    default="mean",
                    tooltip="The same for the two anchors; mean is gentle against a summed preference.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "auto_beta",
                    default=0.0,
                    min=0.0,
                    max=0.49,
                    step=0.01,
                    tooltip="Steers beta so that pairs still pull with this share of their full force, 0 to 0.49; 0.2 "
                    "is a good start. 0 (neutral) = beta stays as set.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "sdpo_mu",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Safeguard of Diffusion-SDPO: weakens the loser's gradient so that it cannot harm the "
                    "winner, 0 to 1; the paper has 0.6. 0 (neutral) = off.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "reference_lora",
                    options=[NONE, *host.list_loras()],
                    default=NONE,
                    tooltip="A file from models/loras on the reference model. none (neutral): the model alone.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "reference_bank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Noises per pair whose reference errors are computed once and kept, 0 to 1024: saves "
                    "two of the four forward passes of a step. 0 (neutral) = new noise every time.",
                    extra_dict=ADVANCED,
                ),
                *advanced_inputs(),
            ],
            outputs=[TrainingRecipe.Output(display_name="recipe", tooltip="The recipe, for Train.")],
        )

    @classmethod
    def execute(cls, settings: str, **widgets) -> io.NodeOutput:
        return io.NodeOutput(make_recipe("dpo", widgets, settings))


def make_recipe(objective: str, widgets: Mapping[str, object], settings: str):
    """The engine's `Recipe` from a node's widgets and its TOML text; its models are filled in by Train.

    Raises:
        ErnieError: the text is not TOML, names an unknown setting, or one that has a widget.
    """
    from ..ernie_core.training.recipe import parse_toml, recipe_from_dict

    given = parse_toml(settings, Path("settings"))
    owned = {PATHS[name]: f"is the widget {name} of this node: set it there" for name in widgets}
    owned |= {("objective",): "is chosen by the recipe node", ("models",): "are chosen by Training Models (ERNIE)"}
    for path in list_paths(given):
        if path in owned or path[:1] in owned:
            raise ErnieError(f"settings: {'.'.join(path)} {owned.get(path) or owned[path[:1]]}.")
    values: dict = {"objective": objective, "models": {"transformer": ""}}
    for name, value in widgets.items():
        put(values, PATHS[name], read_widget(name, value))
    for path, value in list_paths(given).items():
        put(values, path, value)
    return recipe_from_dict(values)


def list_paths(table: Mapping, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every value of nested tables by its path."""
    found: dict[tuple[str, ...], object] = {}
    for key, value in table.items():
        found |= list_paths(value, (*above, key)) if isinstance(value, Mapping) else {(*above, key): value}
    return found


def put(table: dict, path: tuple[str, ...], value: object) -> None:
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = value


def read_widget(name: str, value):
    """A widget's value as a recipe has it."""
    if name in OFF_AT_ZERO:
        return value or None
    if name == "sample_prompts":
        return [line.strip() for line in value.splitlines() if line.strip()]
    if name == "resolution":
        return read_stages(value)
    if name in ("initial_lora", "reference_lora"):
        return "" if value == NONE else str(host.lora_path(value).absolute())
    return value


def read_stages(text: str) -> list[dict]:
    """`256:400, 512+1024` as stages: at 256 until step 400, then every picture at 512 and at 1024; auto needs none.

    Raises:
        ErnieError: it is written in another way.
    """
    stages: list[dict] = []
    for part in text.split(",") if text.strip() != AUTO else ():
        sides, colon, until = part.replace(" ", "").partition(":")
        numbers = sides.split("+")
        if not all(n.isdecimal() for n in numbers) or (colon and not until.isdecimal()):
            raise ErnieError(
                f"resolution must be auto, or like 1024, 512+1024 or 256:400, 1024 (side:until step), got {text!r}."
            )
        stages.append({"resolutions": [int(n) for n in numbers]} | ({"until_step": int(until)} if colon else {}))
    return stages


# --- before it starts ----------------------------------------------------------------------------------------------


class ErniePreflight(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErniePreflight",
            display_name="Preflight (ERNIE)",
            category=CATEGORY,
            description="Reports what the training data looks like and what a run on it would cost.",
            is_output_node=True,
            inputs=[
                Dataset.Input("dataset", optional=True, tooltip="Pictures to look at; either these or pairs."),
                Pairs.Input("pairs", optional=True, tooltip="Pairs to look at; either these or a dataset."),
                TrainingRecipe.Input(
                    "recipe",
                    optional=True,
                    tooltip="Its resolution and batches are used; without it, 1024 and one picture at a time.",
                ),
                TrainingModels.Input(
                    "models",
                    optional=True,
                    tooltip="With these, captions are counted in real tokens; with a recipe too, three real steps are "
                    "measured for time and memory.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Sizes, crops, captions, duplicates, memory, time."),
                io.Image.Output(
                    display_name="pictures",
                    tooltip="Pictures per size, the strongest crops, and how long captions are.",
                    is_output_list=True,
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset=None, pairs=None, recipe=None, models=None) -> io.NodeOutput:
        from ..ernie_core.training.preflight import check
        from ..ernie_core.training.probe import probe
        from ..ernie_core.training.recipe import Recipe

        if (dataset is None) == (pairs is None):
            raise ErnieError("Preflight looks at one of dataset and pairs: connect exactly one of them.")
        data = pairs if dataset is None else dataset
        if recipe is not None:
            choose_data(recipe, dataset, pairs)
        measured = recipe is not None and models is not None
        if models is not None:
            recipe = replace(recipe or Recipe(name="preflight", models=models), models=models)
        if measured:
            host.unload_models()
        measure = (lambda size: probe(recipe, size)) if measured else None
        found = check(data, recipe, probe=measure, on_progress=on_progress())
        pictures = [to_image(picture) for picture in found.pictures.values()]
        return io.NodeOutput(show(cls.hidden.unique_id, found.text), pictures)


# --- running ---------------------------------------------------------------------------------------------------------

_published: dict[str, int] = {}  # finished files by their time, so that a deleted one is noticed


class ErnieTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieTrain",
            display_name="Train (ERNIE)",
            category=CATEGORY,
            description="Trains a LoRA in a process of its own and puts the finished file into models/loras.",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                TrainingRecipe.Input("recipe", tooltip="From Recipe (ERNIE) or Recipe DPO (ERNIE)."),
                TrainingModels.Input("models", tooltip="From Training Models (ERNIE)."),
                Dataset.Input("dataset", optional=True, tooltip="Pictures with captions, for Recipe (ERNIE)."),
                Pairs.Input("pairs", optional=True, tooltip="Pairs of pictures, for Recipe DPO (ERNIE)."),
                io.Combo.Input(
                    "action",
                    options=list(ACTIONS),
                    default=ACTIONS[0],
                    tooltip="start or resume: go on where the job stands; a finished one is handed on at once. start "
                    "over: forget its checkpoints first, unless it has finished with these same settings. attach: "
                    "only watch a running job, start nothing.",
                ),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    tooltip="On: wait for the end, with progress on the node; an interrupt saves and stops the job. "
                    "Off: start it and go on; queue again to see where it is. Nodes behind lora wait for the end.",
                ),
                io.Combo.Input(
                    "process",
                    options=list(PROCESSES),
                    default=PROCESSES[0],
                    tooltip="worker: a process of its own, which survives a restart of ComfyUI. this one: inside "
                    "ComfyUI, where a second process is not possible.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                LoraModel.Output(display_name="lora", tooltip="The trained LoRA, for core's LoraModelLoader."),
                io.String.Output(display_name="lora_path", tooltip="Path of its file in models/loras."),
                TrainingJob.Output(display_name="job", tooltip="The job, for Training Report."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, wait: bool = True, **others) -> object:
        """Changes when a finished file was deleted or exchanged; at each queueing of a job that is not waited for."""
        if not wait:
            return time.time()
        return sorted(path for path, written in _published.items() if modified(Path(path)) != written)

    @classmethod
    def execute(cls, recipe, models, action, wait, process, dataset=None, pairs=None) -> io.NodeOutput:
        data = choose_data(recipe, dataset, pairs)
        job = open_job(replace(recipe, models=models), data, action)
        node_id = cls.hidden.unique_id
        if not is_done(job):
            run_job(job, action=action, wait=wait, process=process, node_id=node_id)
        if not is_done(job):
            return io.NodeOutput(host.block_output(), host.block_output(), job.folder)
        path = publish(job)
        return io.NodeOutput(read_lora(path), str(path), job.folder, ui=show_report(job, node_id, cls))


def choose_data(recipe, dataset, pairs):
    """The input that the recipe asks for.

    Raises:
        ErnieError: it is not connected, or the other one is.
    """
    wanted, node = ("pairs", "Pairs Folder") if recipe.objective == "dpo" else ("dataset", "Dataset Folder")
    given, other = (pairs, dataset) if wanted == "pairs" else (dataset, pairs)
    if given is None:
        raise ErnieError(
            f"this recipe ({recipe.objective}) trains on {wanted}, which is not connected: connect {node} (ERNIE)."
        )
    if other is not None:
        raise ErnieError(
            f"this recipe ({recipe.objective}) trains on {wanted} alone: disconnect the other input, or use the other "
            "recipe node."
        )
    return given


def open_job(recipe, data, action: str):
    """The job of this recipe's name, with recipe and data in its folder.

    Raises:
        ErnieError: it has trained, or is training, with other settings or other data; it is to be attached to and does
            not run.
    """
    from ..ernie_core.training.job import create_job
    from ..ernie_core.training.state import Job

    job = Job(host.jobs_folder() / recipe.name)
    running = job.is_running()
    if action == "attach" and not running and not (job.exists() and is_done(job)):
        raise ErnieError(f"attach: the job {recipe.name} is not running; choose start or resume.")
    if action == "attach" or running:
        if not is_same(job, recipe, data):
            raise ErnieError(
                f"the job {recipe.name} {'is running' if running else 'was trained'} with other settings or other "
                "data. Put them back, or give this recipe another name."
            )
        if action == "start over":
            raise ErnieError(f"the job {recipe.name} is running: interrupt it before it is started over.")
        return job
    kept = job.exists() and is_done(job) and is_same(job, recipe, data)
    start_over = action == "start over" and not kept
    trained = job.newest_step() or 0
    if trained > recipe.steps and not start_over:
        raise ErnieError(
            f"the job {recipe.name} has trained {trained} steps already, steps asks for {recipe.steps}. Raise steps, "
            f"start it over, or take an earlier LoRA from {job.folder / 'checkpoints'}."
        )
    return create_job(job.folder, recipe, data, start_over=start_over)


def is_same(job, recipe, data) -> bool:
    """Whether the job computes what this recipe on this data does."""
    from ..ernie_core.training.job import write_data
    from ..ernie_core.training.state import file_hash

    old = job.recipe()
    if (old.hash(), old.steps) != (recipe.hash(), recipe.steps):
        return False
    asked = job.folder / ".manifest.jsonl.asked"
    write_data(data, asked)
    try:
        return file_hash(asked) == file_hash(job.manifest_path)
    finally:
        asked.unlink(missing_ok=True)


def is_done(job) -> bool:
    """Whether the job has trained all its steps and its LoRA is there."""
    from ..ernie_core.training.job import status

    now = status(job)
    return now.state == "finished" and now.step >= now.steps and job.lora_path.is_file()


def run_job(job, *, action: str, wait: bool, process: str, node_id: str | None) -> None:
    """Start the job where nothing runs it yet, and wait for its end where that is asked for.

    Raises:
        ErnieError: it ended before its last step, with what it said last.
    """
    from ..ernie_core.training.job import start_worker, watch

    tell = make_teller(job, node_id, stops_job=action != "attach")
    worker = None
    if action != "attach" and not job.is_running():
        if process == "this one" and not wait:
            raise ErnieError("process this one trains while the graph waits: switch wait on, or choose worker.")
        host.unload_models()
        if process == "this one":
            return train_here(job, tell)
        worker = start_worker(job)
    if not wait:
        return host.show_text(node_id, f"{job.folder.name} trains in the background. Queue again to see where it is.")
    last = watch(job, tell, worker=worker)
    host.throw_if_interrupted()
    if not is_done(job):
        raise ErnieError(explain_end(job, last))
    return None


def explain_end(job, last) -> str:
    """Why a job is over before its last step, with the end of its log."""
    from ..ernie_core.training.job import log_tail

    return (
        f"the training of {job.folder.name} ended at step {last.step} of {last.steps}: "
        f"{last.message or 'its process did not start'}\nThe end of {job.log_path}:\n{log_tail(job)}"
    )


def train_here(job, tell) -> None:
    """Train inside this process, on the thread of the graph."""
    import torch

    from ..ernie_core.training.job import status
    from ..ernie_core.training.trainer import train

    def on_event(event: Mapping) -> None:
        if event["event"] != "message":
            tell(status(job))

    try:
        with torch.inference_mode(False), torch.enable_grad():  # nodes run without gradients
            train(job, on_event=on_event)
    except Interrupted:
        host.throw_if_interrupted()
        raise
    tell(status(job))


def make_teller(job, node_id: str | None, *, stops_job: bool):
    """A callback that shows a job's status on the node and, where `stops_job`, hands an interrupt on to it."""
    from ..ernie_core.training.job import format_seconds

    bar = host.progress(1)
    shown: dict = {"what": None, "time": 0.0}

    def tell(now) -> None:
        if host.is_interrupted():
            if not stops_job:
                host.throw_if_interrupted()
            job.request_stop()  # again at each call: a process that is just starting forgets what came before
            return host.show_text(node_id, f"stopping after step {now.step}: the state is saved first")
        picture, what = None, (now.state, now.step)
        is_due = now.state != "running" or time.monotonic() - shown["time"] > PREVIEW_SECONDS
        if now.step and what != shown["what"] and is_due:
            shown.update(what=what, time=time.monotonic())
            picture = ("JPEG", draw_progress(job), PREVIEW_PX)
        bar.update_absolute(now.step, now.steps, picture)
        loss = "" if now.loss is None else f", loss {now.loss:.4f}"
        left = "" if now.seconds_left is None else f", {format_seconds(now.seconds_left)} left"
        lines = [f"{now.state}: step {now.step} of {now.steps}{loss}{left}", now.message, *now.alarms]
        return host.show_text(node_id, "\n".join(filter(None, lines)))

    return tell


def draw_progress(job):
    """Curves and the newest samples, one above the other, as a PIL image."""
    from PIL import Image

    from ..ernie_core.training.job import report

    found = report(job)
    curves = Image.fromarray(found.curves)
    if found.samples is None:
        return curves
    samples = Image.fromarray(found.samples)
    samples = samples.resize((curves.width, max(1, samples.height * curves.width // samples.width)))
    sheet = Image.new("RGB", (curves.width, curves.height + samples.height))
    sheet.paste(curves, (0, 0))
    sheet.paste(samples, (0, curves.height))
    return sheet


def publish(job) -> Path:
    """Copy the finished LoRA into the host's LoRA folder, whole or not at all; returns where it is.

    A file of the same name that this job has not made is left alone: the LoRA gets a number.
    """
    from ..ernie_core.training.dataset import write_whole

    data, name = job.lora_path.read_bytes(), job.lora_path.stem
    path, number = host.loras_folder() / job.lora_path.name, 2
    while path.exists() and path.read_bytes() != data and not is_trained_as(path, name):
        path, number = path.with_name(f"{name}_{number}.safetensors"), number + 1
    if not path.exists() or path.read_bytes() != data:
        write_whole(path, data)
    _published[str(path)] = modified(path)
    return path


def is_trained_as(path: Path, name: str) -> bool:
    """Whether a file is the LoRA of a job of this name."""
    from ..ernie_core.weights.checkpoint import CheckpointError, read_header

    try:
        _, metadata = read_header(path)
    except CheckpointError:
        return False
    return metadata.get("ss_output_name") == name and "ernie.recipe" in metadata


def modified(path: Path) -> int:
    """When a file was written; 0 when it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def read_lora(path: Path) -> dict:
    """A LoRA file as core's nodes hand it on."""
    from safetensors.torch import load_file

    return load_file(path)


# --- looking at it ---------------------------------------------------------------------------------------------------


class ErnieTrainingReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieTrainingReport",
            display_name="Training Report (ERNIE)",
            category=CATEGORY,
            description="Shows the curves, the newest samples and the numbers of a job, running or not.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="Name of a job in output/ernie_jobs. Not read while job is connected.",
                ),
                TrainingJob.Input("job", optional=True, tooltip="The job, from Train."),
            ],
            outputs=[
                io.Image.Output(display_name="curves", tooltip="Loss, gradient norm and, for DPO, the errors."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The newest grid of samples; while there is none, nodes behind it do not run.",
                ),
                io.String.Output(display_name="report", tooltip="State, settings, speed and alarms, as Markdown."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str = "", **others) -> int:
        """Changes with what the job has written."""
        return modified(host.jobs_folder() / name / "progress.jsonl")

    @classmethod
    def execute(cls, name: str, job=None) -> io.NodeOutput:
        from ..ernie_core.training.job import report

        found = report(find_job(name) if job is None else find_job(job.name))
        samples = host.block_output() if found.samples is None else to_image(found.samples)
        host.show_text(cls.hidden.unique_id, found.text)
        return io.NodeOutput(to_image(found.curves), samples, found.text, ui=show_pictures(found, cls))


def find_job(name: str):
    """The job of this name.

    Raises:
        ErnieError: there is none, with the names of those that are there.
    """
    from ..ernie_core.training.state import Job

    job = Job(host.jobs_folder() / name)
    if not name or Path(name).name != name or not job.exists():
        there = sorted(path.parent.name for path in host.jobs_folder().glob("*/recipe.json"))
        raise ErnieError(f"there is no training job {name!r}; there are: {', '.join(there) or 'none'}.")
    return job


def to_image(pixels_HWC):
    """uint8 as IMAGE [1, H, W, 3]."""
    import torch

    return torch.from_numpy(pixels_HWC.copy()).float()[None] / 255


def show_report(job, node_id: str | None, cls) -> dict:
    """What Train shows when it is done."""
    from ..ernie_core.training.job import report

    found = report(job)
    host.show_text(node_id, found.text)
    return show_pictures(found, cls)


def show_pictures(found, cls) -> dict:
    """Curves and samples under the node, and the text for pages that draw it."""
    pictures = [found.curves] if found.samples is None else [found.curves, found.samples]
    files = [file for p in pictures for file in ui.PreviewImage(to_image(p), cls=cls).as_dict()["images"]]
    return {"images": files, "text": [found.text]}


class ErnieReducedDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieReducedDepth",
            display_name="Reduced Depth (ERNIE)",
            category="ERNIE/model",
            description="Runs a model with some of its blocks left out, faster, as elastic depth trained it.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, ours or core's, with or without LoRA."),
                io.Int.Input(
                    "blocks",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many blocks are left out, 0 to 64; never the first and last few. 0 (neutral) = the "
                    "whole model. Take the skip_blocks that the LoRA was trained with.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model at that depth.")],
        )

    @classmethod
    def execute(cls, model, blocks: int) -> io.NodeOutput:
        from ..ernie_core.training.blocks import skip_list

        if blocks == 0:
            return io.NodeOutput(model)
        return io.NodeOutput(host.skip_blocks(model, skip_list(host.num_blocks(model), blocks)))
