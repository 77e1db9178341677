"""Fit what a change of the first block's input means for the output, for the step cache's signal `modulated_input`.

Plain sampling, one picture at a time; every evaluation but a run's first gives a pair per prompt: relative L1 change
of the modulated input, and of the velocity. The polynomial goes to ernie_core/sampling/calibrations, one file per shape
of network. `python -m bench calibrate` makes ernie-image-tiny's, which is shipped; `python -m bench calibrate --model
FOLDER` makes that of an official folder (on a GPU that holds it; bf16, 1024 px) and prints what every threshold of both
signals then leaves out and costs there. Pairs are kept in out/bench/calibration_SHAPE.json; delete it to measure anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ernie_core.config import BASE
from ..ernie_core.model.dit import Modulation, RunBlock, call_block
from ..ernie_core.pipeline import Pipeline
from ..ernie_core.sampling.cache import StepCacheRun, modulated_input, relative_change
from ..ernie_core.sampling.calibration import Calibration, calibration_path, fit_calibration, write_calibration
from ..tiny.scenes import heldout_prompts
from .cache_saves import CACHES, CFG, STEPS, WHOLE, compare, row_of, sample
from .compare import Row
from .guidance_helps import SIDE, kept
from .tiny_runs import load_tiny, remember

HELD_BACK = 150  # the first held-out prompt that is used: cache_saves judges by earlier ones
PROMPTS = 8
OFFICIAL_SIDE = 64
OFFICIAL_PROMPTS = (
    "a red fox in the snow, morning light",
    "portrait of an old fisherman, 85 mm photograph",
    'a poster that says "GRAND OPENING" in bold red letters',
    "aerial view of a harbour town, watercolour",
    "a glass teapot on a wooden table, studio light, shallow depth of field",
    "a four-panel comic about a cat that learns to paint",
)


class Watch(StepCacheRun):
    """Leaves nothing out and writes down how far input and velocity move from evaluation to evaluation."""

    def __init__(self, blocks: int):
        super().__init__(WHOLE, blocks)
        self.modulated: dict[Hashable, Tensor] = {}
        self.before: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self.inputs: list[float] = []
        self.outputs: list[float] = []

    def run_block(self, key: Hashable, sigma: float, run_block: RunBlock = call_block) -> RunBlock:
        def run(index: int, block: Any, x_BSD: Tensor, modulation: Modulation, *inputs: Any) -> Tensor:
            if index == 0:
                self.modulated[key] = modulated_input(block, x_BSD, modulation)
            return run_block(index, block, x_BSD, modulation, *inputs)

        return super().run_block(key, sigma, run)

    def see(self, key: Hashable, velocity: Tensor) -> None:
        if key in self.before:
            modulated, velocity_before = self.before[key]
            self.inputs.append(relative_change(modulated, self.modulated[key]))
            self.outputs.append(relative_change(velocity_before, velocity))
        self.before[key] = (self.modulated[key], velocity)


def collect(pipeline: Pipeline, texts: Sequence[str], side: int, name: str) -> tuple[list[float], list[float]]:
    """Pairs of changes over plain runs of all texts."""
    results = kept(name)
    for number, text in enumerate(texts):
        if text not in results:
            watch = Watch(len(pipeline.transformer.layers))
            sample(pipeline, watch, text, 1000 + number, side=side, see=watch.see)
            results[text] = {"inputs": watch.inputs, "outputs": watch.outputs}
            remember(name, results)
    found = [results[text] for text in texts]
    return [x for f in found for x in f["inputs"]], [y for f in found for y in f["outputs"]]


def explained(calibration: Calibration, inputs: Sequence[float], outputs: Sequence[float]) -> float:
    """Share of the output changes' variance."""
    y = np.asarray(outputs)
    return float(1 - np.mean((y - [calibration(x) for x in inputs]) ** 2) / y.var())


def measure(load: Callable[[], Pipeline] = load_tiny, folder: Path | None = None) -> Iterator[Row]:
    if folder is None:
        pipeline, side, model = load(), SIDE, "ernie-image-tiny"
        texts = [text for _, text in heldout_prompts(200)[HELD_BACK : HELD_BACK + PROMPTS]]
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = Pipeline.from_folder(folder, device=device, enhancer=False)
        side, model, texts = OFFICIAL_SIDE, folder.name, list(OFFICIAL_PROMPTS)
    path = calibration_path(pipeline.transformer.config)
    inputs, outputs = collect(pipeline, texts, side, f"calibration_{path.stem}")
    made_with = {
        "model": model, "prompts": texts, "pixels": 16 * side, "steps": STEPS, "shift": BASE.shift, "cfg": CFG,
        "pairs": len(inputs), "command": "python -m bench calibrate",
    }  # fmt: skip
    calibration = fit_calibration(inputs, outputs)
    made_with["explained"] = round(explained(calibration, inputs, outputs), 3)
    write_calibration(path, replace(calibration, made_with=made_with))
    powers = ", ".join(str(i) for i, c in enumerate(reversed(calibration.coefficients)) if c > 0)
    yield Row(
        name=f"calibration {path.name}, {len(inputs)} pairs",
        ours=f"powers {powers or 'none'}, input changes {calibration.low:.4f} to {calibration.high:.4f}",
        target="reported as found",
        met=None,
        untold=f"{100 * made_with['explained']:.0f} % of the variance of the output's change explained",
    )
    if folder is not None:  # the tiny model's table is `python -m bench cache`, judged by what the pictures show too
        for name, _, found in compare(pipeline, CACHES, texts, side=side):
            yield row_of(name, found)
