"""The LoRA file that a run writes: what its header says, and the proof that it holds what was trained."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .. import VERSION
from ..errors import ErnieError
from ..weights.layouts import Shape
from ..weights.lora import Lora, folded, read_lora, write_lora
from .recipe import Recipe, SaveDtype
from .state import file_hash

SOFTWARE = "ernie-image"


def write_trained(
    lora: Lora, path: Path, shapes: Mapping[str, Shape], *, dtype: SaveDtype, metadata: Mapping[str, str]
) -> None:
    """Write `lora` in the dialect that ComfyUI, diffusers and the trainers read, read it back and compare.

    Raises:
        ErnieError: a module is missing in what was read back, or a number differs.
    """
    kept_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    layers = {}
    for name, layer in lora.layers.items():
        layer = folded(layer)
        tensors = {k: v.detach().cpu().to(kept_dtype) for k, v in layer.tensors.items()}
        dora = None if layer.dora_scale is None else layer.dora_scale.detach().cpu().to(kept_dtype)
        layers[name] = replace(layer, tensors=tensors, dora_scale=dora)
    write_lora(replace(lora, layers=layers), path, metadata=metadata)
    read = read_lora(path, shapes).layers
    wrong = set(read) ^ set(layers)
    for name in set(read) & set(layers):
        wanted, found = layers[name], read[name]
        pairs = [(v, found.tensors.get(k)) for k, v in wanted.tensors.items()]
        pairs += [] if wanted.dora_scale is None else [(wanted.dora_scale, found.dora_scale)]
        if not all(b is not None and torch.equal(a.flatten(), b.flatten()) for a, b in pairs):
            wrong.add(name)
    if wrong:
        raise ErnieError(
            f"{path.name} reads back different from what was trained in {len(wrong)} of {len(layers)} modules "
            f"({sorted(wrong)[0]}, ...). The file is not used; the checkpoint before it is whole."
        )


def lora_metadata(
    recipe: Recipe, *, step: int, averaged: bool, base_hash: str, data_hash: str, trigger: str, items: int
) -> dict[str, str]:
    """The header of a trained LoRA: what LoRA managers show (ss_*, modelspec.*) and what it takes to repeat the run.

    Args:
        base_hash: of the transformer's files.
        data_hash, trigger, items: of the training data.
    """
    a, o = recipe.adapter, recipe.optimiser
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Ernie-Image/lora",
        "modelspec.implementation": "https://huggingface.co/baidu/ERNIE-Image",
        "modelspec.title": recipe.name,
        "modelspec.date": now,
        "modelspec.prediction_type": "flow_velocity",
        "modelspec.description": recipe.comment,
        "modelspec.trigger_phrase": trigger,
        "ss_base_model_version": "ernie_image",
        "ss_output_name": recipe.name,
        "ss_network_module": f"{SOFTWARE}.{a.algorithm}",
        "ss_network_dim": a.rank,
        "ss_network_alpha": a.rank,  # the file is folded: scale 1 everywhere
        "ss_network_args": json.dumps({"targets": a.targets, "trained_alpha": a.alpha or a.rank}),
        "ss_learning_rate": o.lr,
        "ss_optimizer": o.name,
        "ss_lr_scheduler": o.schedule,
        "ss_steps": step,
        "ss_max_train_steps": recipe.steps,
        "ss_batch_size_per_device": recipe.batch_size,
        "ss_gradient_accumulation_steps": recipe.accumulation,
        "ss_num_train_images": items,
        "ss_seed": recipe.seed,
        "ss_timestep_sampling": recipe.sigmas.kind,
        "ss_discrete_flow_shift": "resolution" if recipe.sigmas.shift is None else recipe.sigmas.shift,
        "ss_sd_model_hash": base_hash,
        "ss_tag_frequency": json.dumps({"dataset": {trigger: items}} if trigger else {}),
        "ernie.objective": recipe.objective,
        "ernie.base_precision": recipe.precision,
        "ernie.base_hash": base_hash,
        "ernie.data_hash": data_hash,
        "ernie.recipe": json.dumps(_without_paths(recipe), sort_keys=True),
        "ernie.recipe_hash": recipe.hash(),
        "ernie.averaged": str(averaged).lower(),
        "ernie.software": json.dumps({"name": SOFTWARE, "version": VERSION, "torch": torch.__version__}),
    }
    if recipe.objective == "distil":
        values |= _distil_metadata(recipe)
    return {name: str(value) for name, value in values.items() if value != ""}


def _distil_metadata(recipe: Recipe) -> dict[str, object]:
    """How a few-step student is sampled, and who taught it."""
    distil = recipe.distil
    names = distil.table.used()
    teachers = [asdict(distil.table.teacher(name)) for name in names]
    for teacher in teachers:
        if teacher["lora"]:
            path = Path(teacher["lora"])
            teacher |= {"lora": path.name, "sha256": file_hash(path)}
    return {
        "ernie.sampling": json.dumps(
            {"steps": len(distil.grid()) - 1, "shift": distil.shift, "cfg": 1.0, "sigmas": distil.grid().tolist()}
        ),
        "ernie.teachers": json.dumps(teachers),
    }


def _without_paths(recipe: Recipe) -> dict:
    """The recipe with file names for paths: a header travels, and nobody needs to know whose disk it came from."""
    values = recipe.to_dict()
    values["models"] = {kind: Path(path).name for kind, path in values["models"].items()}
    for name in ("initial_lora", "reference_lora"):
        values[name] = Path(values[name]).name
    values["distil"]["prompts"] = ""  # `data_hash` says which
    values["distil"]["fake"]["initial_lora"] = Path(values["distil"]["fake"]["initial_lora"]).name
    for teacher in values["distil"]["table"]["teachers"]:
        teacher["lora"] = Path(teacher["lora"]).name
    return values
