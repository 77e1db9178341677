"""Step caching on a MODEL, for every sampler that samples through the host."""

from __future__ import annotations

import logging

from ...ernie_core.errors import ErnieError
from ...ernie_core.model.dit import DiT
from ...ernie_core.sampling.cache import StepCache, StepCacheRun
from .models import STEP_CACHE_KEY, check_model
from .runtime import show_text

logger = logging.getLogger(__name__)


def set_step_cache(model, cache: StepCache, *, node_id: str | None = None):
    """A clone of `model` that leaves evaluations out by these rules, or `model` itself where none can be left out.

    Every sampling run makes a fresh `StepCacheRun` and puts it into its own copy of the model options, which the host
    drops at the end of the run, interrupted or not; how much was left out is then logged and shown on the node
    `node_id`.

    Raises:
        ErnieError: not an ERNIE-Image model, or core's own transformer, which has no place for it.
    """
    network = check_model(model)
    if cache.is_neutral:
        return model
    if not isinstance(network, DiT):
        raise ErnieError(
            "core's own ERNIE-Image transformer has no place for a step cache: load the model with "
            "Load Diffusion Model (ERNIE)."
        )
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    if patched.get_attachment(STEP_CACHE_KEY) is not None:
        logger.warning("The Step Cache (ERNIE) before this one is not used: one model has one. Remove one of the two.")
    patched.set_attachments(STEP_CACHE_KEY, cache)
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, STEP_CACHE_KEY)

    def sample(executor, *args, **kwargs):
        run = StepCacheRun.of(cache, network.config)
        executor.class_obj.model_options.setdefault("transformer_options", {})[STEP_CACHE_KEY] = run
        try:
            return executor(*args, **kwargs)
        finally:
            logger.info("Step Cache (ERNIE): %s.", run.report())
            show_text(node_id, run.report())

    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, STEP_CACHE_KEY, sample)
    return patched
