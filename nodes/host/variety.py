"""Seed variety on a MODEL, for every sampler and guider that samples through the host."""

from __future__ import annotations

import logging

from ...ernie_core.sampling.variety import Variety, VarietyRun
from .models import check_model

logger = logging.getLogger(__name__)

VARIETY_KEY = "ernie_variety"


def set_variety(model, variety: Variety):
    """A clone of `model` that paints under a noisy prompt while the noise level is high; `model` itself at strength 0.

    Every sampling run makes a fresh `VarietyRun` of the noise that it starts from and puts it into its own copy of the
    model options. The guider's conditioning named "positive" is exchanged around each prediction, so whoever asks under
    the prompt, experts and skip-layer guidance too, gets the same features.

    Raises:
        ErnieError: not an ERNIE-Image model, ours or core's.
    """
    check_model(model)
    if variety.is_neutral:
        return model
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    if patched.get_attachment(VARIETY_KEY) is not None:
        logger.warning(
            "The Seed Variety (ERNIE) before this one is not used: one model has one. Remove one of the two."
        )
    patched.set_attachments(VARIETY_KEY, variety)
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE):
        patched.remove_wrappers_with_key(kind, VARIETY_KEY)

    def sample(executor, noise, *args, **kwargs):
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        options[VARIETY_KEY] = VarietyRun(variety, noise)
        return executor(noise, *args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, VARIETY_KEY, sample)
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, VARIETY_KEY, _predict)
    return patched


def _predict(executor, x, timestep, model_options, seed):
    guider, sigma = executor.class_obj, float(timestep.max())
    # The guider's own options: an expert's do not carry what lies on the mixture.
    run = guider.model_options.get("transformer_options", {}).get(VARIETY_KEY)
    before = guider.conds
    if run is None or run.amount(sigma) == 0 or not before.get("positive"):
        return executor(x, timestep, model_options, seed)
    guider.conds = {**before, "positive": [_vary(run, cond, sigma) for cond in before["positive"]]}
    try:
        return executor(x, timestep, model_options, seed)
    finally:
        guider.conds = before


def _vary(run: VarietyRun, cond: dict, sigma: float) -> dict:
    """One of the host's conditionings with the features of this noise level, the same in everything else."""
    features = cond["model_conds"].get("c_crossattn")
    if features is None:
        return cond
    varied = type(features)(run.vary(features.cond, sigma))
    return {**cond, "model_conds": {**cond["model_conds"], "c_crossattn": varied}}
