"""How a student for a few steps is made out of teachers for many: the recipe of a distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from .recipes import ADVANCED, CATEGORY, TrainingRecipe, advanced_inputs, common_inputs, make_recipe
from .teachers import Teachers

FORMS = ("plain", "decoupled")
GRADIENTS = ("random", "last", "all")
ROLLOUTS = ("euler", "renoise")
NOT_READ = ("noise_levels", "noise_start", "noise_end", "skip_blocks", "skip_share")


class ErnieRecipeDistil(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieRecipeDistil",
            display_name="Recipe Distil (ERNIE)",
            category=CATEGORY,
            description="Describes how a LoRA learns to paint in a few steps at cfg 1 what its teachers paint in many.",
            inputs=[
                *common_inputs(steps=1000, learning_rate=5e-5),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What to practise on, one prompt per line; tag: prompt where the tag is one that the table "
                    "of teachers names. The more and the more varied, the better; no pictures are needed. Empty: the "
                    "captions of the dataset at Train.",
                ),
                Teachers.Input(
                    "teachers",
                    optional=True,
                    tooltip="From Teacher Table (ERNIE): which LoRAs teach what. Not connected (neutral): the model "
                    "teaches everything.",
                ),
                io.String.Input(
                    "start_lora",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="Path of a LoRA that student and fake score begin with, from Extract LoRA or Train. Not "
                    "connected (neutral): initial_lora.",
                ),
                io.Int.Input(
                    "student_steps",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Steps that the student will be sampled with, 1 to 64. It learns on exactly this grid.",
                ),
                io.Float.Input(
                    "student_shift",
                    default=4.0,
                    min=0.1,
                    max=20.0,
                    step=0.1,
                    tooltip="Shift that it will be sampled with, 0.1 to 20. 4 = the official schedule, 1 = none.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "teacher_cfg",
                    default=4.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance of the teachers, 0 to 30, which the student learns to do without. 4 = official, "
                    "1 (neutral) = none. A teacher in the table may have its own.",
                ),
                io.Int.Input(
                    "trajectory_steps",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="First steps, in which the student learns the teachers' way by plain regression, 0 to "
                    "1000000; cheap and steady. 0 (neutral) = none. From nothing take about a third of all steps.",
                ),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    default="plain",
                    tooltip="plain: matching and guidance at one noise level. decoupled: guidance only at levels "
                    "cleaner than the student's own; stronger, and drifts sooner.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "gradient",
                    options=list(GRADIENTS),
                    default="random",
                    tooltip="Which of the student's steps an update changes. random: one of them, drawn anew. last: "
                    "the last. all: every one, through the whole picture; exact, needs as many times the memory.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "rollout",
                    options=list(ROLLOUTS),
                    default="euler",
                    tooltip="How the student paints while it learns. euler: as Sampler (ERNIE) does. renoise: new "
                    "noise at each step, for samplers that add noise.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "fake_updates",
                    default=5,
                    min=1,
                    max=50,
                    tooltip="Updates of the fake score for each one of the student, 1 to 50. More where the report "
                    "says that it lags.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "fake_learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=1e-7,
                    tooltip="Learning rate of the fake score, 0.0000001 to 1; about twice the student's.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "fake_rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Size of the fake score's adapter, 0 to 1024, at least the student's. 0 (neutral) = the "
                    "same.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "fake_warmup",
                    default=100,
                    min=0,
                    max=100_000,
                    tooltip="Updates of the fake score before the student's first, 0 to 100000. 0 = none.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "anchor_weight",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Holds the student's first step to the teachers' own start, so that seeds stay different, "
                    "0 to 10; DP-DMD has 0.05. 0 (neutral) = off.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "gan_weight",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="Weight of a critic that compares with the pictures of the dataset at Train, 0 to 10; "
                    "0.005 to 0.03 in the papers. 0 (neutral) = off.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "stop_on_alarm",
                    default=False,
                    tooltip="On: the run ends with the first alarm (collapse, lag, or a push astray for 50 steps). Off "
                    "(neutral): it is only said.",
                    extra_dict=ADVANCED,
                ),
                *(widget for widget in advanced_inputs() if widget.id not in NOT_READ),
            ],
            outputs=[TrainingRecipe.Output(display_name="recipe", tooltip="The recipe, for Train and Preflight.")],
        )

    @classmethod
    def execute(cls, settings: str, teachers=None, start_lora=None, **widgets) -> io.NodeOutput:
        from ..ernie_core.training.teachers import with_files

        recipe = make_recipe("distil", widgets, settings)
        if start_lora and recipe.initial_lora:
            raise ErnieError("start_lora is connected and initial_lora chosen: set initial_lora to none.")
        if start_lora:
            recipe = replace(recipe, initial_lora=str(Path(start_lora).absolute()))
        if teachers is not None:
            table = with_files(teachers, lambda name: Path(name).absolute())  # another process reads them
            recipe = replace(recipe, distil=replace(recipe.distil, table=table))
        return io.NodeOutput(recipe)
