"""Sampling plans: how often each picture of a manifest is trained on, looked at before anything is."""

from __future__ import annotations

import math

from comfy_api.latest import io

from .curation import CATEGORY, manifest_input
from .dataset import Dataset, caption_inputs, make_options, missing_caption_inputs, on_progress, show
from .recipes import ADVANCED
from .training import to_image

AS_SET = "as set below"
PRESETS = (AS_SET, "tempered", "proportional", "uniform over categories", "article: count x mean score")
QUALITIES = ("mean", "upper")
SCALES = ("percentile", "raw")
WITHIN = ("score", "rank")
ALL_ALIKE = 100.0  # temperature from which on there is none


class ErnieSamplingPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieSamplingPlan",
            display_name="Curate Sampling Plan (ERNIE)",
            category=CATEGORY,
            description="Makes a dataset of a manifest that is drawn by category and score, and shows the mix.",
            inputs=[
                manifest_input(),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=AS_SET,
                    tooltip="as set below: by the six widgets below. tempered: their defaults. proportional: every "
                    "picture alike. uniform over categories: every category alike. article: an article's reading of "
                    "the report, which lets frequent categories dominate.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Exponent of a category's size, 0 to 2: a category of four times the pictures is drawn "
                    "4^alpha times as often. 1 (neutral) = by size, 0 = all categories alike.",
                ),
                io.Float.Input(
                    "gamma",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Exponent of a category's quality, -10 to 10: above 0 favours categories with good scores. "
                    "0 (neutral) = quality does not count.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(QUALITIES),
                    default=QUALITIES[0],
                    tooltip="What a category's quality is. mean: of its scores. upper: the score that its best tenth "
                    "reaches.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "scale",
                    options=list(SCALES),
                    default=SCALES[0],
                    tooltip="How scores count. percentile: their place among all pictures, 0 to 1, so that every "
                    "scorer's unit is right. raw: as they are; qualities must be above 0.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "within",
                    options=list(WITHIN),
                    default=WITHIN[0],
                    tooltip="What the temperature acts on. score: the score. rank: the place in the category, 1 for "
                    "the best, 0 for the worst.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "temperature",
                    default=0.5,
                    min=0.0,
                    max=ALL_ALIKE,
                    step=0.05,
                    tooltip="Of the draw inside a category, 0 to 100: a picture that is better by this much is drawn "
                    "2.7 times as often. 0 = only the best, 100 (neutral) = all alike.",
                ),
                io.Int.Input(
                    "depth",
                    default=0,
                    min=0,
                    max=16,
                    tooltip="How many parts of a category's path count, 0 to 16: 1 makes animal/bird a part of animal. "
                    "0 (neutral) = the whole path.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "styles",
                    default="",
                    tooltip="How often each kind of caption is drawn where a picture has several, such as keyword 1, "
                    "detailed 3. Empty (neutral): all kinds alike.",
                ),
                *caption_inputs(),
                *missing_caption_inputs(),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="The pictures with their draws, for Train."),
                io.String.Output(display_name="report", tooltip="Shares and repeats by category, and warnings."),
                io.Image.Output(display_name="picture", tooltip="Each category's share of the pictures and draws."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, manifest, preset, depth, styles, **widgets) -> io.NodeOutput:
        from ..ernie_core.curation.dataset import read_planned
        from ..ernie_core.curation.mix import draw_mix, plan_mix

        plan = {name: widgets.pop(name) for name in ("alpha", "gamma", "quality", "scale", "within", "temperature")}
        sampling = make_sampling(preset, **plan)
        options = make_options(styles=styles, **widgets)
        dataset, pool = read_planned(manifest.path, sampling, options, depth=depth, on_progress=on_progress())
        mix = plan_mix(pool, sampling)
        report = f"{mix.report()}\n\n## Data\n\n{dataset.report()}"
        return io.NodeOutput(dataset, show(cls.hidden.unique_id, report), to_image(draw_mix(mix)))


def make_sampling(preset: str, *, temperature: float, **plan):
    """The engine's `Sampling` from the preset, or from the widgets."""
    from ..ernie_core.curation.mix import named_sampling
    from ..ernie_core.curation.sampling import Sampling

    if preset != AS_SET:
        return named_sampling(preset)
    return Sampling(temperature=math.inf if temperature >= ALL_ALIKE else temperature, **plan)
