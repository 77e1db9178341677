"""How a row becomes a picture: what Batch from Prompts and XY Grid have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .sampling import preset_settings

# The official pipeline's; one seed, so that rows differ in what they say they differ in.
ENHANCER_SETTINGS = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(kw_only=True)
class Studio:
    """Models, and the last one that was patched or loaded for a row: rows come in an order that changes it least."""

    models: Sequence[Any]
    """The connected MODELs, first to last; None where there is none."""
    clip: Any
    vae: Any
    hidden: Any
    enhancer: Any = None
    max_new_tokens: int = 2048
    made_with: str = ""
    """What the user says that the connected models were made with, such as the path of a LoRA; goes into pictures."""
    _key: tuple = ()
    _model: Any = None
    _written: dict[tuple, str] = field(default_factory=dict)

    def encode(self, text: str) -> list:
        host.throw_if_interrupted()
        return host.encode_prompt(self.clip, text)

    def write(self, row) -> str:
        """The text to encode: the prompt, or what the enhancer makes of it."""
        if not row.enhance:
            return row.prompt
        key = (row.prompt, row.width, row.height)
        if key not in self._written:
            if self.enhancer is None:
                raise ErnieError(f"{row.label} asks for the enhancer, but none is connected.")
            settings = {**ENHANCER_SETTINGS, "max_new_tokens": self.max_new_tokens}
            (self._written[key],) = self.enhancer.enhance_variants(
                *key, seeds=[0], on_token=lambda _, text: host.show_text(self.hidden.unique_id, text), **settings
            )
        return self._written[key]

    def model(self, row):
        """The row's MODEL with its LoRAs."""
        from ..ernie_core.weights.lora import module_strengths, read_lora

        key = (row.checkpoint, row.variant, row.loras)
        if self._model is None or key != self._key:
            base = self._model if self._model is not None and key[:2] == self._key[:2] and not self._key[2] else None
            self._model = None  # frees a checkpoint before the next one is read
            model = self._base(row) if base is None else base
            for name, strength in row.loras:
                shapes = host.lora_shapes(model)
                lora = read_lora(host.lora_path(name), shapes)
                model = host.apply_lora(model, lora, module_strengths(lora, strength, "", shapes))
            self._key, self._model = key, model
        return self._model

    def _base(self, row):
        from ..ernie_core.weights.checkpoint import read_component

        if row.checkpoint:
            path = host.model_path("diffusion_models", row.checkpoint)
            return host.make_model(read_component(path, "transformer"), weight_dtype="default")
        model = self.models[row.variant - 1] if row.variant <= len(self.models) else None
        if model is None:
            raise ErnieError(f"{row.label} asks for model {row.variant}, which is not connected.")
        return model

    def generate(self, row, positive, negative):
        """One picture [H, W, 3] in [0, 1]."""
        from ..ernie_core.sampling.samplers import Sampler
        from ..ernie_core.sampling.schedule import make_sigmas

        latent = host.sample(
            host.set_shift(self.model(row), row.shift),
            positive=positive,
            negative=negative,
            latent=host.empty_latent(row.width, row.height, 1),
            sigmas=make_sigmas(row.steps, shift=row.shift),
            cfg=row.cfg,
            seed=row.seed,
            sampler=Sampler(name=row.sampler),
        )
        return host.decode(self.vae, latent)[0]

    def save(self, image, path, row) -> None:
        from ..ernie_core.batch import row_entries

        entries = row_entries(row) | ({"enhanced": self.write(row)} if row.enhance else {})
        if self.made_with.strip():  # of a path its last part: pictures are passed on, and say nothing of this machine
            entries["made_with"] = Path(self.made_with.strip()).name
        self._save_png(image, path, {f"ernie_{name}": value for name, value in entries.items()})

    def save_sheet(self, image, path) -> None:
        """A labelled picture of pictures [H, W, 3] in [0, 1], with the workflow inside."""
        self._save_png(image, path, {})

    def _save_png(self, image, path, entries: dict[str, str]) -> None:
        prompt, extra = self.hidden.prompt, self.hidden.extra_pnginfo
        host.save_png(image, path, prompt=prompt, extra_pnginfo=extra, entries=entries)

    def announce(self, number: int, total: int, row) -> None:
        host.throw_if_interrupted()
        host.show_text(self.hidden.unique_id, f"{number} of {total} ({row.label}): {row.prompt[:80]}")

    def painters(self) -> dict[str, Any]:
        """What the engine's `make_image` needs."""
        return {"encode": self.encode, "write": self.write, "generate": self.generate}

    def callbacks(self) -> dict[str, Any]:
        """What the engine's `run_rows` needs."""
        return {**self.painters(), "save": self.save, "on_row": self.announce}


def open_studio(**settings) -> Studio:
    """The studio of a node, which a worker takes before the node reads its rows."""
    studio = Studio(**settings)
    host.take_studio(studio)
    return studio


def missing_sockets(inputs: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the lazy sockets `names` that are connected and not computed; none where rows are made elsewhere."""
    return [name for name in names if name in inputs and inputs[name] is None] if host.makes_rows_here() else []


def run_rows(rows, name: str, studio: Studio):
    """Make what is not there yet in the folder `name`, whose run.json tells how; returns the engine's result."""
    from ..ernie_core.batch import run_folder
    from ..ernie_core.runs import write_run

    folder = run_folder(host.output_folder(), name)
    write_run(folder, describe_run(rows, studio.hidden))
    return host.run_rows(rows, folder, studio)


def describe_run(rows, hidden):
    """The run of these rows: graph, versions, model files."""
    from ..ernie_core.runs import Run

    graph = needed_graph(hidden.prompt, hidden.unique_id)
    return Run(
        rows=[row.settings() for row in rows],
        node=hidden.unique_id,
        prompt=graph,
        made_with=made_with(),
        models=model_files(graph or {}, {name for row in rows for name in (row.checkpoint, *dict(row.loras))}),
    )


def made_with() -> dict[str, str]:
    from ..ernie_core.runs import describe_machine

    version = host.host_version()
    shown = f"ComfyUI {'.'.join(map(str, version))}" if version else "standalone"
    return {"host": shown, **describe_machine(str(host.device()))}


def needed_graph(prompt, node_id: str | None):
    """The part of an API-format graph that a node needs, itself included; None where the host hides the graph."""
    if not prompt or node_id is None or str(node_id) not in prompt:
        return None
    needed, left = {}, [str(node_id)]
    while left:
        name = left.pop()
        if name in prompt and name not in needed:
            needed[name] = prompt[name]
            links = [v for v in prompt[name].get("inputs", {}).values() if isinstance(v, list) and len(v) == 2]
            left += [str(origin) for origin, _ in links]
    return {name: node for name, node in prompt.items() if name in needed}


def model_files(graph, names: set[str]) -> list[dict]:
    """Fingerprints of the model files that the graph's widgets and the rows name."""
    from ..ernie_core.runs import fingerprint_file

    texts = names | {v for node in graph.values() for v in node.get("inputs", {}).values() if isinstance(v, str)}
    found = []
    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        offered = host.list_loras() if kind == "loras" else host.list_models(kind)
        for name in sorted(texts & set(offered)):
            path = host.lora_path(name) if kind == "loras" else host.model_path(kind, name)
            if path.exists():
                found.append({"kind": kind, "name": name, **fingerprint_file(path)})
    return found


def remake_row(name: str, number: int, studio: Studio) -> tuple:
    """(the picture [1, H, W, 3] of row `number` of the run in folder `name`, made again; whether it is the same)."""
    from ..ernie_core.batch import file_name, hash_pixels, make_image, read_image, run_folder
    from ..ernie_core.runs import RUN, differences, read_run, recorded_pixels

    folder = run_folder(host.output_folder(), name)
    run = read_run(folder / RUN)
    row = run.row(number)
    studio.announce(1, 1, row)
    path = folder / f"remade_{file_name(row)}"
    studio.save(make_image(row, **studio.painters()), path, row)
    before = recorded_pixels(folder, row)
    if before is None:
        said = "the run has no finished picture of it to compare with"
    elif before == hash_pixels(path):
        said = "bit-equal to the picture of the run"
    else:
        changed = differences(run, made_with(), model_files(run.prompt or {}, {row.checkpoint, *dict(row.loras)}))
        said = f"not the picture of the run: {'; '.join(changed) or 'the graph in front of this node may differ'}"
    return read_image(path)[None], f"row {number} ({row.label}): {said}\n{path.name}"


def model_inputs() -> list[io.Input]:
    """What a picture is made with; lazy, since a run whose pictures are there, or made elsewhere, loads nothing."""
    return [
        io.Model.Input("model", lazy=True, tooltip="ERNIE-Image model, from these loaders or from core's."),
        io.Clip.Input("clip", lazy=True, tooltip="Text encoder, from these loaders or from core's."),
        io.Vae.Input("vae", lazy=True, tooltip="FLUX.2 VAE, from these loaders or from core's."),
    ]


def remake_input() -> io.Int.Input:
    return io.Int.Input(
        "remake",
        default=0,
        min=0,
        max=10_000_000,
        optional=True,
        tooltip="Number of a row in the folder's run.json to make again alone, and to compare bit by bit with the "
        "picture of the run; prompts and settings come from there. 0 (neutral) = make the whole run.",
    )


def default_row(*, preset: str, steps: int, cfg: float, prompt: str = "", **settings):
    """A row with the widgets' values."""
    from ..ernie_core.batch import Row

    steps, cfg = preset_settings(preset, steps, cfg)
    return Row(label="", prompt=prompt, steps=steps, cfg=cfg, **settings)
