"""A training job as others see it: make it, start its worker process, watch it, stop it, report on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import ErnieError
from .captions import CaptionRules
from .dataset import read_dataset
from .feed import Data
from .items import Dataset, DatasetOptions, join_datasets, write_manifest
from .pairs import Pairs, read_pairs, write_pairs_manifest
from .previews import curve_panels, draw_curves
from .prompts import Prompts, read_prompts, write_prompts_manifest
from .recipe import Recipe, build_settings, parse_toml, recipe_from_dict
from .state import Job, file_hash

PACK_ROOT = Path(__file__).resolve().parents[2]

TRAINED_ON: dict[str, tuple[tuple[type, ...], str]] = {
    "sft": ((Dataset,), "a dataset of pictures"),
    "dpo": ((Pairs,), "preference pairs"),
    "distil": ((Prompts, Dataset), "prompts or a dataset of pictures"),
}
"""Objective -> what it takes, in types and in words."""

JobState = Literal["new", "running", "stopped", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a job stands."""

    state: JobState
    """`stopped`: not running and not finished, on request or because the process died; it can be resumed."""
    step: int
    steps: int
    loss: float | None
    seconds_left: float | None
    message: str
    """One line: what it is doing, or why it ended."""
    alarms: tuple[str, ...] = ()


def create_job(folder: Path | str, recipe: Recipe, data: Data, *, start_over: bool = False) -> Job:
    """The job folder for `recipe` on `data`: a new one, or the one that has begun with the same two.

    Args:
        start_over: delete what the folder has trained so far; caches stay.

    Raises:
        ErnieError: data of another kind than the objective's; a process trains in the folder; or it has trained with
            other settings or other data; or a LoRA file that it names is not there.
    """
    if recipe.distil.prompts and not isinstance(data, Prompts):
        raise ErnieError("the recipe has prompts of its own (distil.prompts): leave the dataset out, or the prompts.")
    if recipe.distil.gan_weight and isinstance(data, Prompts):
        raise ErnieError("distil.gan_weight needs real pictures: connect a dataset of pictures, or set it to 0.")
    kinds, needed = TRAINED_ON[recipe.objective]
    if not isinstance(data, kinds):
        raise ErnieError(f"the objective {recipe.objective} needs {needed}, got {type(data).__name__.lower()}.")
    for what, path in _loras(recipe).items():
        if not Path(path).is_file():
            raise ErnieError(f"{what} {path} is not there (any more): choose another file, or put it back.")
    job = Job(folder)
    if start_over and job.exists():
        job.start_over()
    job.folder.mkdir(parents=True, exist_ok=True)
    fresh = job.folder / ".manifest.jsonl.new"
    write_data(data, fresh)
    try:
        trained = job.newest_step() is not None
        if trained and job.manifest_path.is_file() and file_hash(job.manifest_path) != file_hash(fresh):
            raise ErnieError(
                f"the job {job.folder.name} has trained {job.newest_step()} steps on other data. Give the job a new "
                "name, or start it over."
            )
        job.write_recipe(recipe)
        os.replace(fresh, job.manifest_path)
    finally:
        fresh.unlink(missing_ok=True)
    return job


def _loras(recipe: Recipe) -> dict[str, str]:
    """Every LoRA file that the run will read, by what it is; known now, not after the base has been loaded."""
    distil = recipe.distil
    named = {
        "initial_lora": recipe.initial_lora,
        "reference_lora": recipe.reference_lora,
        "distil.fake.initial_lora": distil.fake.initial_lora,
        **{f"the LoRA of teacher {name}": distil.table.teacher(name).lora for name in distil.table.used()},
    }
    return {what: path for what, path in named.items() if path}


def write_data(data: Data, path: Path) -> None:
    """Write the manifest of any kind."""
    if isinstance(data, Pairs):
        write_pairs_manifest(data, path)
    elif isinstance(data, Prompts):
        write_prompts_manifest(data, path)
    else:
        write_manifest(data, path)


def read_job_file(path: Path | str) -> tuple[Recipe, Data]:
    """Recipe and data of a job.toml: a recipe with one table [data], or several [[data]] that are joined.

    A data table has `path` (relative to the file), optionally `format`, and the settings of `DatasetOptions`; those of
    `CaptionRules` (trigger, dropout, ...) may stand beside them. A recipe with [distil] prompts needs no data table.

    Raises:
        ErnieError: not TOML, a setting that does not exist, or data that cannot be used.
    """
    path = Path(path)
    try:
        values = parse_toml(path.read_text(encoding="utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as e:
        raise ErnieError(f"{path} cannot be read: {e}") from e
    tables = values.pop("data", None)
    if not tables and values.get("distil", {}).get("prompts"):
        recipe = recipe_from_dict(_absolute_models(values, path.parent))
        return recipe, own_prompts(recipe)
    if not tables:
        raise ErnieError(f'{path.name} needs a table [data] with at least path = "folder".')
    recipe = recipe_from_dict(_absolute_models(values, path.parent))
    read = [_read_table(dict(t), path.parent, recipe) for t in (tables if isinstance(tables, list) else [tables])]
    if recipe.objective == "dpo":
        if len(read) > 1:
            raise ErnieError("the objective dpo takes one [data] table.")
        return recipe, read[0]
    return recipe, read[0] if len(read) == 1 else join_datasets([d for d in read if isinstance(d, Dataset)])


def _absolute_models(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """The recipe's values with paths made absolute: a job runs in its own folder."""
    models = values.get("models")
    if isinstance(models, dict):
        values = {**values, "models": {k: str((base / v).resolve()) if v else v for k, v in models.items()}}
    loras = {k: str((base / values[k]).resolve()) for k in ("initial_lora", "reference_lora") if values.get(k)}
    values = {**values, **loras}
    fake = values.get("distil", {}).get("fake", {})
    teachers = values.get("distil", {}).get("table", {}).get("teachers", [])
    for place, key in ((fake, "initial_lora"), *((teacher, "lora") for teacher in teachers)):
        if place.get(key):
            place[key] = str((base / place[key]).resolve())
    return values


def own_prompts(recipe: Recipe) -> Prompts:
    """The data of a recipe that brings its own prompts, tagged as its table of teachers knows them.

    Raises:
        ErnieError: it has none.
    """
    if not recipe.distil.prompts.strip():
        raise ErnieError("distillation needs prompts: write them into the recipe, or give it a dataset.")
    return read_prompts(recipe.distil.prompts, tags=recipe.distil.table.tags)


def _read_table(table: dict[str, Any], base: Path, recipe: Recipe) -> Dataset | Pairs:
    if not isinstance(table.get("path"), str):
        raise ErnieError("a [data] table needs path, the folder or file of the data.")
    source = base / table.pop("path")
    format = table.pop("format", "auto")
    rules = {k: table.pop(k) for k in [f.name for f in fields(CaptionRules)] if k in table}
    options = build_settings(DatasetOptions, {**table, **({"rules": rules} if rules else {})}, "data")
    return read_pairs(source, options) if recipe.objective == "dpo" else read_dataset(source, format, options)


def status(job: Job) -> Status:
    """Read from the folder alone, so any process may ask at any time."""
    steps = job.recipe().steps
    events = job.events()
    done = [e for e in events if e["event"] == "step"]
    step = done[-1]["step"] if done else 0
    last = events[-1] if events else None
    running = job.is_running()
    state: JobState = "running" if running else "new" if last is None else "stopped"
    message = ""
    if last is not None:
        message = str(last.get("message", ""))
        if not running and last["event"] in ("finished", "failed"):
            state = last["event"]
        elif not running and last["event"] not in ("stopped",):
            message = f"the process ended at step {step} without a word (killed, or out of memory): resume it."
    recent = [e["seconds"] for e in done[-20:]]
    left = sum(recent) / len(recent) * (steps - step) if recent else None
    alarms = tuple(dict.fromkeys(e["message"] for e in events if e["event"] == "alarm"))
    loss = next((e["loss"] for e in reversed(done) if "loss" in e), None)
    return Status(state=state, step=step, steps=steps, loss=loss, seconds_left=left, message=message, alarms=alarms)


def start_worker(job: Job, *, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start a process that trains `job`, from its last checkpoint or from nothing; it outlives this one.

    Raises:
        ErnieError: one is running already.
    """
    if job.is_running():
        raise ErnieError(f"the job {job.folder.name} is running already: attach to it.")
    env = {**os.environ, **(environment or {})}
    # The engine is importable from the pack's folder whatever that is called.
    env["PYTHONPATH"] = os.pathsep.join([str(PACK_ROOT), *filter(None, [env.get("PYTHONPATH")])])
    options: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
    with job.log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ernie_core.cli", "train", str(job.folder.resolve())],
            cwd=job.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **options,
        )


def watch(
    job: Job, on_status: Callable[[Status], None], *, worker: subprocess.Popen | None = None, seconds: float = 0.5
):
    """Call `on_status` until the job is neither running nor starting; `on_status` may raise to stop watching.

    Returns the last status.
    """
    while True:
        starting = worker is not None and worker.poll() is None
        now = status(job)
        on_status(now)
        if now.state != "running" and not starting:
            return now
        time.sleep(seconds)


def log_tail(job: Job, lines: int = 15) -> str:
    """The end of the worker's own output, for an error message."""
    if not job.log_path.exists():
        return ""
    return "\n".join(job.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a person wants to see of a job."""

    text: str
    """Markdown."""
    curves: np.ndarray
    """uint8 [H, W, 3]."""
    samples: np.ndarray | None
    """The newest sample grid, uint8 [H, W, 3]."""


def report(job: Job) -> Report:
    """Numbers, curves and the newest samples of a job, running or not."""
    from PIL import Image

    now = status(job)
    recipe = job.recipe()
    events = job.events()
    counts = {kind: sum(e["event"] == kind for e in events) for kind in ("bad_step", "out_of_memory", "saved")}
    a, o = recipe.adapter, recipe.optimiser
    left = f", {format_seconds(now.seconds_left)} left" if now.state == "running" and now.seconds_left else ""
    lines = [
        f"# {recipe.name}",
        f"{now.state}: step {now.step} of {now.steps}{left}",
        "",
        f"- objective {recipe.objective}, {a.algorithm} rank {a.rank}",
        f"- learning rate {o.lr:g} ({o.name}, {o.schedule}), effective (x alpha / rank) {recipe.effective_lr:g}",
        f"- {recipe.batch_size} x {recipe.accumulation} samples a step, base in {recipe.precision}, seed {recipe.seed}",
        f"- checkpoints written: {counts['saved']}; steps thrown away because of NaN: {counts['bad_step']}; "
        f"out of memory: {counts['out_of_memory']}",
    ]
    if recipe.objective == "distil":
        lines += _distil_lines(recipe)
    done = [e for e in events if e["event"] == "step"]
    if done:
        losses, seconds = [e["loss"] for e in done[-50:] if "loss" in e], np.median([e["seconds"] for e in done])
        loss = f"loss {np.mean(losses):.4f} (last 50 steps)" if losses else "the fake score warms up"
        lines.append(f"- {loss}, {seconds:.2f} s a step")
    if now.message:
        lines.append(f"- {now.message}")
    lines += [f"- **alarm**: {alarm}" for alarm in now.alarms]
    grids = sorted(job.samples_folder.glob("step-*.png"))
    samples = np.asarray(Image.open(grids[-1]).convert("RGB")) if grids else None
    return Report(text="\n".join(lines), curves=draw_curves(curve_panels(events)), samples=samples)


def _distil_lines(recipe: Recipe) -> list[str]:
    """Who is distilled into how many steps, and the stop rule."""
    distil = recipe.distil
    last = "ends the run" if distil.stop_on_alarm else "is only said"
    rules = ", ".join(f"{rule.weights} for {', '.join(rule.tags) or 'all prompts'}" for rule in distil.table.rules)
    return [
        f"- sample with {len(distil.grid()) - 1} steps, shift {distil.shift:g}, cfg 1",
        f"- teachers: {', '.join(distil.table.used())} at cfg {distil.cfg:g}" + (f"; {rules}" if rules else ""),
        f"- first {distil.trajectory_steps} steps: the teachers' way; then the fake score alone for "
        f"{distil.fake.warmup_steps} steps; then both",
        f"- alarm after {distil.patience} steps of collapse, of lag or of a push astray; it {last}",
    ]


def format_seconds(seconds: float) -> str:
    """`75` as 1 min 15 s."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
