"""Fewer evaluations of the model."""

from __future__ import annotations

from comfy_api.latest import io

from ..ernie_core.config import CACHE_SIGNALS
from . import host


class ErnieStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieStepCache",
            display_name="Step Cache (ERNIE)",
            category="ERNIE/model",
            description="Leaves most of the network out in steps where little has changed, for the 50-step model.",
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model from these loaders, with or without LoRA."),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="How much the signal may have changed since the last whole evaluation, as a share of it, "
                    "0 to 1. Higher leaves more out and follows the picture less. 0 (neutral) = nothing.",
                ),
                io.Float.Input(
                    "start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Noise level (sigma) from which evaluations may be left out, 0 to 1. 1 (neutral) = from "
                    "the beginning.",
                ),
                io.Float.Input(
                    "end",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Noise level (sigma) down to which evaluations may be left out, 0 to 1, itself not. 0 "
                    "(neutral) = to the end.",
                ),
                io.Int.Input(
                    "max_skips",
                    default=3,
                    min=0,
                    max=1000,
                    tooltip="How many evaluations of a prompt in a row are left out at most, 0 to 1000. 0 (neutral) = "
                    "none.",
                ),
                io.Combo.Input(
                    "signal",
                    options=list(CACHE_SIGNALS),
                    default=CACHE_SIGNALS[0],
                    tooltip="What is compared. first_block: what the first block adds; it always runs. "
                    "modulated_input: what the first block would read, rescaled by a calibration and summed up; no "
                    "block runs where it is left out. The same threshold means another thing for each.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with the cache; after each run the node says what it saved.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, threshold: float, start: float, end: float, max_skips: int, signal: str = CACHE_SIGNALS[0]
    ) -> io.NodeOutput:
        from ..ernie_core.sampling.cache import StepCache

        cache = StepCache(threshold=threshold, start=start, end=end, max_skips=max_skips, signal=signal)
        return io.NodeOutput(host.set_step_cache(model, cache, node_id=cls.hidden.unique_id))
