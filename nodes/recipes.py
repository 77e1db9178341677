"""What a training run is described by: which models, and by which recipe.

A recipe node only fills in the engine's `Recipe`; what has no widget is said in TOML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host

CATEGORY = "ERNIE/training"
TrainingModels = io.Custom("ERNIE_TRAINING_MODELS")
TrainingRecipe = io.Custom("ERNIE_RECIPE")

NONE = "none"
ADVANCED = {"advanced": True}  # folded away by pages that know the word

ALGORITHMS = ("lora", "lokr", "dora")
PRECISIONS = ("bf16", "fp32", "fp8", "int8", "stored")
OPTIMISERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
SCHEDULES = ("cosine", "constant", "linear")
SIGMA_KINDS = ("logit_normal", "uniform", "style", "detail", "weighted")
REDUCTIONS = ("mean", "sum")


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
    "noise_start": ("sigmas", "high"),
    "noise_end": ("sigmas", "low"),
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
    "prompts": ("distil", "prompts"),
    "student_steps": ("distil", "steps"),
    "student_shift": ("distil", "shift"),
    "teacher_cfg": ("distil", "cfg"),
    "form": ("distil", "form"),
    "gradient": ("distil", "gradient"),
    "rollout": ("distil", "rollout"),
    "trajectory_steps": ("distil", "trajectory_steps"),
    "fake_updates": ("distil", "fake", "steps_per_student"),
    "fake_learning_rate": ("distil", "fake", "lr"),
    "fake_rank": ("distil", "fake", "rank"),
    "fake_warmup": ("distil", "fake", "warmup"),
    "anchor_weight": ("distil", "anchor_weight"),
    "gan_weight": ("distil", "gan_weight"),
    "stop_on_alarm": ("distil", "stop_on_alarm"),
}
OFF_AT_ZERO = ("alpha", "auto_beta", "sdpo_mu", "fake_rank")  # None in a recipe
AUTO = "auto"  # the resolution that a recipe has when it says nothing
CURRICULUM = "curriculum"  # the stages of the engine's preset


def common_inputs(*, steps: int = 1500, learning_rate: float = 1e-4) -> list[io.Input]:
    """What every recipe asks for first."""
    return [
        io.String.Input(
            "name",
            default="my_lora",
            tooltip="Name of the job folder (output/ernie_jobs) and of the finished file in models/loras.",
        ),
        io.Int.Input(
            "steps",
            default=steps,
            min=1,
            max=1_000_000,
            tooltip="Optimiser steps, 1 to 1000000. A finished job goes on when this is raised.",
        ),
        io.Float.Input(
            "learning_rate",
            default=learning_rate,
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
            "1024. curriculum: at 256 for half of the steps, at 512 until 80 % of them, then at 1024. auto (neutral): "
            "as the dataset's file says, else 1024.",
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
            "checkpointing, tensorboard. An unknown name is an error that suggests the right one. "
            "Empty (neutral): defaults.",
            extra_dict=ADVANCED,
        ),
        *(
            io.Float.Input(
                f"noise_{edge}",
                default=default,
                min=0.0,
                max=1.0,
                step=0.01,
                round=0.0001,
                tooltip=f"{which} noise level (sigma) that is trained, 0 to 1; {default:g} (neutral) = all. Narrower "
                "for an expert of a band, see Expert (ERNIE).",
                extra_dict=ADVANCED,
            )
            for edge, which, default in (("start", "Highest", 1.0), ("end", "Lowest", 0.0))
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
        put(values, PATHS[name], read_widget(name, value, widgets["steps"]))
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


def read_widget(name: str, value, steps):
    """A widget's value as a recipe of `steps` has it."""
    if name in OFF_AT_ZERO:
        return value or None
    if name == "sample_prompts":
        return [line.strip() for line in value.splitlines() if line.strip()]
    if name == "resolution":
        return read_stages(value, steps)
    if name in ("initial_lora", "reference_lora"):
        return "" if value == NONE else str(host.lora_path(value).absolute())
    return value


def read_stages(text: str, steps: int) -> list[dict]:
    """`256:400, 512+1024` as stages: at 256 until step 400, then every picture at 512 and at 1024; auto needs none.

    Raises:
        ErnieError: it is written in another way, or there are fewer `steps` than a curriculum has stages.
    """
    if text.strip() == CURRICULUM:
        from ..ernie_core.training.buckets import curriculum

        return [asdict(stage) for stage in curriculum(steps)]
    stages: list[dict] = []
    for part in text.split(",") if text.strip() != AUTO else ():
        sides, colon, until = part.replace(" ", "").partition(":")
        numbers = sides.split("+")
        if not all(n.isdecimal() for n in numbers) or (colon and not until.isdecimal()):
            raise ErnieError(
                "resolution must be auto, curriculum, or like 1024, 512+1024 or 256:400, 1024 (side:until step), got "
                f"{text!r}."
            )
        stages.append({"resolutions": [int(n) for n in numbers]} | ({"until_step": int(until)} if colon else {}))
    return stages
