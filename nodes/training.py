"""Training: looking at a run before it starts, running it, and looking at it.

Training itself happens in a process of its own that reads the job folder, so the graph's memory and its models are not
touched.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..ernie_core.errors import ErnieError, Interrupted
from . import host
from .dataset import Dataset, Pairs, on_progress, show
from .recipes import ADVANCED, CATEGORY, TrainingModels, TrainingRecipe

TrainingJob = io.Custom("ERNIE_JOB")
LoraModel = io.Custom("LORA_MODEL")  # core's: a state dict

PREVIEW_PX = 1024
PREVIEW_SECONDS = 3.0  # between two pictures on the node
ACTIONS = ("start or resume", "start over", "attach")
PROCESSES = ("worker", "this one")


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

        data: Any = pairs if dataset is None else dataset
        if (dataset is None) == (pairs is None) and not brings_prompts(recipe, dataset, pairs):
            raise ErnieError("Preflight looks at one of dataset and pairs: connect exactly one of them.")
        if recipe is not None:
            data = choose_data(recipe, dataset, pairs)
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
                TrainingRecipe.Input("recipe", tooltip="From Recipe (ERNIE), Recipe DPO or Recipe Distil."),
                TrainingModels.Input("models", tooltip="From Training Models (ERNIE)."),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="Pictures with captions, for Recipe (ERNIE); for Recipe Distil, in place of its prompts.",
                ),
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


def brings_prompts(recipe, dataset, pairs) -> bool:
    """Whether a distillation is to practise on the prompts of its recipe."""
    return recipe is not None and recipe.objective == "distil" and dataset is None and pairs is None


def choose_data(recipe, dataset, pairs) -> Any:
    """The input that the recipe asks for; the recipe's own prompts where a distillation has no dataset.

    Raises:
        ErnieError: it is not connected, or the other one is.
    """
    if brings_prompts(recipe, dataset, pairs):
        from ..ernie_core.training.job import own_prompts

        return own_prompts(recipe)
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
                io.Image.Output(
                    display_name="curves",
                    tooltip="Loss, gradient norm, DPO's errors, a distillation's health.",
                ),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The newest grid of samples; while there is none, nodes behind it do not run.",
                ),
                io.String.Output(display_name="report", tooltip="State, settings, speed and alarms, as Markdown."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = "", **others) -> int:
        """Changes with what the job has written. What is linked comes as None."""
        return modified(host.jobs_folder() / (name or "") / "progress.jsonl")

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
