"""LoRA nodes: load and stack, merge into a checkpoint, extract, resize, convert."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host

CATEGORY = "ERNIE/LoRA"
NONE = "none"
STACK = 3  # LoRAs that one merge takes; more are merged in a second run
DTYPES = ("bf16", "fp16", "fp32")
DIALECTS = (
    "comfyui",
    "diffusers",
    "kohya",
    "onetrainer_comfy",
    "onetrainer_original",
    "onetrainer_legacy",
    "peft",
    "bare",
    "lycoris",
    "lora_transformer",
)
MAX_RANK = 4096

BLOCKS_TOOLTIP = (
    "Weights of single blocks, such as 0-11:0.5, 12-35:1, attention:0.8, 12-23 mlp:0, other:0 or all:0. The last entry "
    "that names a module holds; what none names keeps weight 1. Empty (neutral): 1 everywhere."
)
STRENGTH_TOOLTIP = (
    "How strongly it acts, -100 to 100. 1 = as trained, 0 (neutral) = not at all, negative = the opposite."
)
UNMATCHED_TOOLTIP = (
    "On: leave out parts that this model does not have, and list them. Off: they are an error. A file of which nothing "
    "fits is always an error."
)
NAME_TOOLTIP = "File name in %s, without .safetensors; it may hold a sub-folder."
OVERWRITE_TOOLTIP = "On: replace a file of this name. Off: a file of this name is an error."
FITS_TOOLTIP = (
    "The checkpoint that the LoRA is for: names and sizes are checked against it. Its weights are read for DoRA only."
)
ENERGY_TOOLTIP = (
    "Share of each matrix's squared change to hold, 0.01 to 1: the smallest rank that does is taken, up to the rank "
    "above. 1 (neutral): always the rank above."
)


def lora_input(id: str, tooltip: str, *, optional: bool = False) -> io.Combo.Input:
    names = host.list_loras()
    if optional:
        return io.Combo.Input(id, options=[NONE, *names], default=NONE, tooltip=tooltip)
    return io.Combo.Input(id, options=names, tooltip=tooltip)


def checkpoint_input(id: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(id, options=host.list_models("diffusion_models"), tooltip=tooltip)


def strength_input(id: str) -> io.Float.Input:
    return io.Float.Input(id, default=1.0, min=-100.0, max=100.0, step=0.05, round=0.001, tooltip=STRENGTH_TOOLTIP)


def rank_input(tooltip: str, *, default: int, min: int = 1) -> io.Int.Input:
    return io.Int.Input("rank", default=default, min=min, max=MAX_RANK, tooltip=tooltip)


def energy_input() -> io.Float.Input:
    return io.Float.Input("energy", default=1.0, min=0.01, max=1.0, step=0.01, round=0.0001, tooltip=ENERGY_TOOLTIP)


def file_inputs(default: str, folder: str) -> list:
    return [
        io.String.Input("name", default=default, tooltip=NAME_TOOLTIP % folder),
        io.Boolean.Input("overwrite", default=False, tooltip=OVERWRITE_TOOLTIP),
    ]


def file_outputs(what: str) -> list:
    return [
        io.String.Output(display_name="path", tooltip=f"Where the {what} was written."),
        io.String.Output(display_name="report", tooltip="What was read and what was written."),
    ]


def new_file(folder: Path, name: str, *, overwrite: bool) -> Path:
    """The path of `name` below `folder`, ending in .safetensors; ErnieError when it may not be written."""
    cleaned = name.strip().removesuffix(".safetensors")
    path = (folder / f"{cleaned}.safetensors").resolve()
    if not cleaned or cleaned.endswith(("/", "\\")) or not path.is_relative_to(folder.resolve()):
        raise ErnieError(f"name must be a file name inside {folder}, got {name!r}; leave out '..' and absolute paths.")
    if path.exists() and not overwrite:
        raise ErnieError(f"{path} is there already: choose another name, or turn on overwrite.")
    return path


def report_progress(node_id: str | None, what: str):
    """on_progress(done, total) of the engine, with the host's bar; the user can stop it."""
    bar = host.progress(1)

    def tell(done: int, total: int) -> None:
        host.throw_if_interrupted()
        bar.update_absolute(done, total)
        if done % 20 == 0 or done == total:
            host.show_text(node_id, f"{what}: {done} of {total}")

    return tell


def read_for(component, name: str, *, allow_unmatched: bool = False):
    """The LoRA `name`, checked against a checkpoint."""
    from ..ernie_core.weights.lora import read_lora, weight_shapes

    shapes = weight_shapes(component.state_dict)
    return read_lora(host.lora_path(name), shapes, allow_unmatched=allow_unmatched)


def read_checkpoint(name: str):
    from ..ernie_core.weights.checkpoint import read_component

    return read_component(host.model_path("diffusion_models", name), "transformer")


def file_state(name: str | None) -> list:
    """Changes when the file behind a LoRA's name does, so that a newly trained one of the same name is read.

    None is what the host says of a name that is linked.
    """
    if name is None:
        return []
    try:
        stat = host.lora_path(name).stat()
    except (ErnieError, OSError):
        return [name]
    return [name, stat.st_mtime_ns, stat.st_size]


class ErnieLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadLora",
            display_name="Load LoRA (ERNIE)",
            category=CATEGORY,
            description="Applies a LoRA, LoKr, LoHa or DoRA of any trainer to a model and says what matched.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image transformer, ours or core's; chain several LoRAs."),
                lora_input("lora_name", "A file from models/loras, written by any trainer."),
                strength_input("strength"),
                io.String.Input("blocks", default="", multiline=True, tooltip=BLOCKS_TOOLTIP),
                io.Float.Input(
                    "start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Noise level (sigma) from which it acts, 0 to 1. 1 (neutral) = from pure noise.",
                ),
                io.Float.Input(
                    "end",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Noise level (sigma) down to which it acts, 0 to 1, itself not. 0 (neutral) = to the end.",
                ),
                io.Boolean.Input("allow_unmatched", default=False, tooltip=UNMATCHED_TOOLTIP),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA; weights on disk stay."),
                io.String.Output(display_name="report", tooltip="How many adapted modules matched, and which did not."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others) -> list:
        return file_state(lora_name)

    @classmethod
    def execute(
        cls, model, lora_name, strength: float, blocks: str, start: float, end: float, allow_unmatched: bool
    ) -> io.NodeOutput:
        from ..ernie_core.weights.lora import module_strengths, read_lora, report_lora

        shapes = host.lora_shapes(model)
        lora = read_lora(host.lora_path(lora_name), shapes, allow_unmatched=allow_unmatched)
        strengths = module_strengths(lora, strength, blocks, shapes)
        patched = host.apply_lora(model, lora, strengths, start=start, end=end)
        report = report_lora(lora, strengths)
        host.show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(patched, report)


class ErnieMergeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        stack = [
            item
            for i in range(1, STACK + 1)
            for item in (
                lora_input(f"lora_{i}", f"LoRA {i} from models/loras; none = no LoRA {i}.", optional=i > 1),
                strength_input(f"strength_{i}"),
                io.String.Input(f"blocks_{i}", default="", tooltip=BLOCKS_TOOLTIP),
            )
        ]
        return io.Schema(
            node_id="ErnieMergeLora",
            display_name="Merge LoRAs into Checkpoint (ERNIE)",
            category=CATEGORY,
            description="Writes a checkpoint with up to three LoRAs merged into its weights, file to file.",
            inputs=[
                checkpoint_input("model_name", "The checkpoint to start from; it stays as it is."),
                *stack,
                io.Boolean.Input("allow_unmatched", default=False, tooltip=UNMATCHED_TOOLTIP),
                *file_inputs("ernie-image-merged", "models/diffusion_models"),
            ],
            outputs=file_outputs("checkpoint"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_1: str, lora_2: str, lora_3: str, **others) -> list:
        return [file_state(name) for name in (lora_1, lora_2, lora_3) if name != NONE]

    @classmethod
    def execute(cls, model_name: str, allow_unmatched: bool, name: str, overwrite: bool, **stack) -> io.NodeOutput:
        from ..ernie_core.weights.lora_edit import merge_loras

        path = new_file(host.checkpoints_folder(), name, overwrite=overwrite)
        component = read_checkpoint(model_name)
        uses, names = read_stack(component, stack, allow_unmatched=allow_unmatched)
        on_progress = report_progress(cls.hidden.unique_id, "Tensors merged")
        merge_loras(component, uses, path, names=names, on_progress=on_progress)
        report = f"{path.name}: {model_name} + {' + '.join(names)}"
        return io.NodeOutput(str(path), report, ui={"text": [report]})


def read_stack(component, stack: dict, *, allow_unmatched: bool) -> tuple[list, list[str]]:
    """((LoRA, strengths) of each that was chosen, what to call them)."""
    from ..ernie_core.weights.lora import module_strengths, weight_shapes

    shapes = weight_shapes(component.state_dict)
    uses, names = [], []
    for i in range(1, STACK + 1):
        file, strength, blocks = (stack[f"{what}_{i}"] for what in ("lora", "strength", "blocks"))
        if file == NONE:
            continue
        lora = read_for(component, file, allow_unmatched=allow_unmatched)
        uses.append((lora, module_strengths(lora, strength, blocks, shapes)))
        names.append(f"{file} at {strength:g}" + (f" ({blocks})" if blocks.strip() else "") + f", {lora.summary}")
    return uses, names


class ErnieExtractLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieExtractLora",
            display_name="Extract LoRA (ERNIE)",
            category=CATEGORY,
            description="Finds the LoRA that leads from one checkpoint to another, such as from Base to Turbo.",
            inputs=[
                checkpoint_input("base_name", "The checkpoint to subtract."),
                checkpoint_input("tuned_name", "The checkpoint that the LoRA is to lead to."),
                rank_input(
                    "Largest rank, 1 to 4096. Higher holds more of the difference in a larger file.", default=64
                ),
                energy_input(),
                io.Boolean.Input(
                    "vectors",
                    default=False,
                    tooltip="On: also take the differences of norms and biases; diffusers refuses the file then. Off "
                    "(neutral): matrices only.",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES), default="bf16", tooltip="Type of the factors; fp32 doubles the file."
                ),
                *file_inputs("extracted", "models/loras"),
            ],
            outputs=file_outputs("LoRA"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, base_name, tuned_name, rank, energy, vectors, dtype, name, overwrite) -> io.NodeOutput:
        from ..ernie_core.weights.lora import factor_dtype, write_lora
        from ..ernie_core.weights.lora_edit import extract_lora

        path = new_file(host.loras_folder(), name, overwrite=overwrite)
        found = extract_lora(
            read_checkpoint(base_name),
            read_checkpoint(tuned_name),
            rank=rank,
            energy=energy,
            vectors=vectors,
            dtype=factor_dtype(dtype),
            device=host.device(),
            on_progress=report_progress(cls.hidden.unique_id, "Tensors compared"),
        )
        write_lora(found.lora, path, metadata={"ernie_extracted": f"{tuned_name} - {base_name}: {found.summary}"})
        report = f"{path.name}: {found.summary}"
        return io.NodeOutput(str(path), report, ui={"text": [report]})


class ErnieResizeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieResizeLora",
            display_name="Resize LoRA (ERNIE)",
            category=CATEGORY,
            description="Writes the plain LoRA of a smaller rank that is nearest to a LoRA, LoKr, LoHa or DoRA.",
            inputs=[
                checkpoint_input("model_name", FITS_TOOLTIP),
                lora_input("lora_name", "The LoRA from models/loras to start from; it stays as it is."),
                rank_input("Largest rank, 1 to 4096. A rank as large as the LoRA's keeps all of it.", default=16),
                energy_input(),
                *file_inputs("resized", "models/loras"),
            ],
            outputs=file_outputs("LoRA"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others) -> list:
        return file_state(lora_name)

    @classmethod
    def execute(cls, model_name, lora_name, rank: int, energy: float, name: str, overwrite: bool) -> io.NodeOutput:
        from ..ernie_core.weights.lora import write_lora
        from ..ernie_core.weights.lora_edit import resize_lora

        path = new_file(host.loras_folder(), name, overwrite=overwrite)
        base = read_checkpoint(model_name)
        on_progress = report_progress(cls.hidden.unique_id, "Modules resized")
        small, held = resize_lora(read_for(base, lora_name), rank, energy=energy, base=base, on_progress=on_progress)
        write_lora(small, path)
        report = f"{path.name}: rank {small.ranks}, {100 * held:.2f} % of the change of {lora_name}"
        return io.NodeOutput(str(path), report, ui={"text": [report]})


class ErnieConvertLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieConvertLora",
            display_name="Convert LoRA (ERNIE)",
            category=CATEGORY,
            description="Writes a LoRA in the spelling that another program reads.",
            inputs=[
                checkpoint_input("model_name", FITS_TOOLTIP),
                lora_input("lora_name", "The LoRA from models/loras to start from; it stays as it is."),
                io.Combo.Input(
                    "dialect",
                    options=list(DIALECTS),
                    default="comfyui",
                    tooltip="comfyui: ComfyUI, diffusers and trainers read it. kohya: musubi and sd-scripts. peft: a "
                    "folder with adapter_config.json. The help page lists all.",
                ),
                rank_input(
                    "0 (neutral): keep the algorithm. 1 to 4096: make a plain LoRA of this rank first, for programs "
                    "that cannot read LoKr, LoHa or DoRA.",
                    default=0,
                    min=0,
                ),
                *file_inputs("converted", "models/loras"),
            ],
            outputs=file_outputs("LoRA"),
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others) -> list:
        return file_state(lora_name)

    @classmethod
    def execute(cls, model_name, lora_name, dialect: str, rank: int, name: str, overwrite: bool) -> io.NodeOutput:
        from ..ernie_core.weights.lora import write_lora
        from ..ernie_core.weights.lora_edit import resize_lora

        file = f"{name.removesuffix('.safetensors')}/adapter_model" if dialect == "peft" else name
        path = new_file(host.loras_folder(), file, overwrite=overwrite)
        base = read_checkpoint(model_name)
        lora = read_for(base, lora_name)
        before, held = lora.dialect, 1.0
        if rank:
            lora, held = resize_lora(lora, rank, base=base)
        write_lora(lora, path, dialect=dialect)
        report = f"{path.name}: {lora.summary}, {before} to {dialect}, {100 * held:.2f} % of the change"
        return io.NodeOutput(str(path), report, ui={"text": [report]})
