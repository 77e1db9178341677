"""Mixture of denoising experts: who paints which noise levels."""

from __future__ import annotations

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .lora import NONE, file_state, lora_input, strength_input

CATEGORY = "ERNIE/experts"
Experts = io.Custom("ERNIE_EXPERTS")
LoraModel = io.Custom("LORA_MODEL")


def level_input(id: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(id, default=default, min=0.0, max=1.0, step=0.01, round=0.0001, tooltip=tooltip)


class ErnieExpert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieExpert",
            display_name="Expert (ERNIE)",
            category=CATEGORY,
            description="Names who denoises a band of noise levels: a LoRA, another model, or another cfg.",
            inputs=[
                level_input("start", 1.0, "Noise level (sigma) from which it acts, 0 to 1. 1 = from pure noise."),
                level_input("end", 0.5, "Noise level (sigma) down to which it acts, 0 to 1. 0 = to the end."),
                lora_input(
                    "lora_name",
                    "A file from models/loras that is added to the model inside the band; changing from one to the "
                    "next reloads nothing. none (neutral): no LoRA.",
                    optional=True,
                ),
                strength_input("strength"),
                io.Float.Input(
                    "cfg",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance strength inside the band, 0 to 100; 1 = none, one model call. -1 (neutral) = the "
                    "sampler's.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Another ERNIE-Image model for the band; it takes the memory of a second model. Not "
                    "together with a LoRA.",
                ),
                LoraModel.Input("lora", optional=True, tooltip="A LoRA from Train (ERNIE) in the place of a file."),
                Experts.Input("experts", optional=True, tooltip="Experts of other bands, from the node before."),
            ],
            outputs=[Experts.Output(display_name="experts", tooltip="This expert and those before, for Mix Experts.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others) -> list:
        return [] if lora_name == NONE else file_state(lora_name)

    @classmethod
    def execute(
        cls, start: float, end: float, lora_name: str, strength: float, cfg: float, model=None, lora=None, experts=()
    ) -> io.NodeOutput:
        from ..ernie_core.sampling.experts import Band, Expert

        if lora is not None and lora_name != NONE:
            raise ErnieError(
                f"the expert has two LoRAs, the input lora and {lora_name}; choose none or disconnect lora."
            )
        named = "the connected LoRA" if lora is not None else lora_name
        expert = Expert(
            band=Band(start=start, end=end),
            model=model,
            lora=lora if lora is not None else None if lora_name == NONE else lora_name,
            strength=strength,
            cfg=None if cfg < 0 else cfg,
            label="" if named == NONE else named,
        )
        return io.NodeOutput((*experts, expert))


class ErnieMixExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieMixExperts",
            display_name="Mix Experts (ERNIE)",
            category=CATEGORY,
            description="Makes one model of experts for bands of noise levels, one evaluation per step as before.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model; it denoises every level that no expert claims."),
                Experts.Input("experts", tooltip="A chain of Expert (ERNIE) nodes, in any order, without overlaps."),
                io.Float.Input(
                    "blend",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Width in sigma over which neighbours hand over, 0 to 1. 0 (neutral) = at once. LoRAs "
                    "blend at no cost, two models are both evaluated there.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The mixture, for any sampler."),
                io.String.Output(display_name="report", tooltip="Who denoises which noise levels."),
            ],
        )

    @classmethod
    def execute(cls, model, experts, blend: float) -> io.NodeOutput:
        from ..ernie_core.sampling.experts import order_experts, report_experts

        ordered = order_experts([own_levels(e, model) for e in experts], blend)
        mixture = host.set_experts(add_loras(model, ordered, blend), ordered, blend=blend)
        return io.NodeOutput(mixture, report_experts(ordered, blend))


def own_levels(expert, model):
    """`expert`, or, where its model is the very one that it is mixed into, the levels that stay the model's own."""
    from dataclasses import replace

    return replace(expert, model=None) if expert.model is model else expert


def add_loras(model, experts, blend: float):
    """`model` with the LoRA of every expert, each inside its band.

    Raises:
        ErnieError: a file is missing, or not for this model.
    """
    from ..ernie_core.weights.lora import module_strengths, parse_lora, read_lora

    shapes = host.lora_shapes(model)
    for expert in experts:
        if expert.lora is not None:
            is_file = isinstance(expert.lora, str)
            lora = read_lora(host.lora_path(expert.lora), shapes) if is_file else parse_lora(expert.lora, shapes)
            strengths = module_strengths(lora, expert.strength, "", shapes)
            band = expert.band
            model = host.apply_lora(model, lora, strengths, start=band.start, end=band.end, blend=blend)
    return model
