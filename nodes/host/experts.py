"""Experts on a MODEL: who is evaluated at which noise level."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from ...ernie_core.errors import ErnieError
from ...ernie_core.sampling.experts import Expert, seats
from .guidance import GUIDANCE_KEY
from .models import check_model
from .style import STYLE_KEY

logger = logging.getLogger(__name__)

EXPERTS_KEY = "ernie_experts"


def set_experts(model, experts: Sequence[Expert], *, blend: float = 0.0):
    """A clone of `model` whose noise levels are denoised by `experts`, models and guidance strengths.

    Their LoRAs are applied before, with `apply_lora`. An expert's MODEL is brought to the device when its band begins.
    Patches on an expert's own MODEL act while it is evaluated, those on the outcome while the base is; what changes
    predictions, such as guidance, is the outcome's for all.

    Raises:
        ErnieError: the model has experts already, or an expert is no ERNIE-Image MODEL.
    """
    from comfy.patcher_extension import WrappersMP

    check_model(model)
    if model.get_attachment(EXPERTS_KEY) is not None:
        raise ErnieError("the model has experts already: put all of them into one chain of Expert (ERNIE) nodes.")
    if all(e.model is None and e.cfg is None for e in experts):
        return model
    for expert in experts:
        if expert.model is not None:
            check_model(expert.model)
            if expert.model.get_attachment(GUIDANCE_KEY) is not None:
                logger.warning(
                    "The guidance on the model of the expert for noise levels %g to %g is not used: put it on the "
                    "mixture, where it acts on all experts.",
                    expert.band.start,
                    expert.band.end,
                )
            if expert.model.get_attachment(STYLE_KEY) is not None:
                logger.warning(
                    "The style statistics on the model of the expert for noise levels %g to %g are not used: put them "
                    "on the mixture, where they act on all experts.",
                    expert.band.start,
                    expert.band.end,
                )
            if expert.model.model is model.model:
                logger.warning(
                    "The expert for noise levels %g to %g is the base with other patches: its weights are changed and "
                    "changed back within each picture. Give the Expert node the LoRA instead of a model.",
                    expert.band.start,
                    expert.band.end,
                )
    turns = _Turns()

    def predict(executor, x, timestep, model_options, seed):
        guider = executor.class_obj
        asked = seats(experts, float(timestep.max()), cfg=guider.cfg, blend=blend)
        total = None
        for seat in asked:
            with turns.seated(guider, seat, x, model_options) as options:
                found = executor(x, timestep, options, seed)
            if len(asked) == 1:
                return found
            total = seat.share * found if total is None else total + seat.share * found
        return total

    def run(executor, *args, **kwargs):
        try:
            return executor(*args, **kwargs)
        finally:
            turns.finish()

    patched = model.clone()
    patched.set_attachments(EXPERTS_KEY, tuple(experts))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, EXPERTS_KEY, predict)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, EXPERTS_KEY, run)
    return patched


class _Turns:
    """Which expert's weights are on the device in this sampling run."""

    def __init__(self) -> None:
        self.loaded = None  # patcher of the last evaluation; None = the guider's own, which the host has loaded
        self.ran: list = []

    @contextlib.contextmanager
    def seated(self, guider, seat, x, model_options) -> Iterator[dict]:
        """Let `guider` ask the seat's model under its cfg; gives the options to call it with."""
        import comfy.model_management as mm

        if seat.cfg != 1 and not guider.conds.get("negative"):
            raise ErnieError(
                f"the expert at cfg {seat.cfg:g} compares with a negative prompt, but the sampler got none. Connect "
                "Encode Prompt with an empty text, or set the expert's cfg to 1."
            )
        patcher = seat.model
        if patcher is not self.loaded:
            needed = patcher if patcher is not None else guider.model_patcher
            mm.load_models_gpu([needed], memory_required=needed.model.memory_required([x.shape[0] * 2, *x.shape[1:]]))
            if patcher is not None and patcher not in self.ran:
                patcher.pre_run()
                self.ran.append(patcher)
            self.loaded = patcher
        before = guider.inner_model, guider.cfg
        guider.cfg = seat.cfg
        try:
            if patcher is None:
                yield model_options
            else:
                guider.inner_model = patcher.model
                yield _options_of(patcher, model_options)
        finally:
            guider.inner_model, guider.cfg = before

    def finish(self) -> None:
        for patcher in self.ran:
            patcher.cleanup()
        self.loaded, self.ran = None, []


def _options_of(patcher, run_options: dict) -> dict:
    """The run's options with what `patcher` carries for its own network in the place of the base's."""
    import comfy.model_patcher
    from comfy.patcher_extension import WrappersMP, merge_nested_dicts

    own = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    run_inside = run_options.get("transformer_options", {})
    inside = own.setdefault("transformer_options", {})
    for name, found in (("wrappers", patcher.wrappers), ("callbacks", patcher.callbacks)):
        merge_nested_dicts(inside.setdefault(name, {}), found, copy_dict1=False)
    around_network = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    inside["wrappers"] = {
        **{kind: w for kind, w in run_inside.get("wrappers", {}).items() if kind not in around_network},
        **{kind: w for kind, w in inside["wrappers"].items() if kind in around_network},
    }
    inside["sample_sigmas"] = run_inside.get("sample_sigmas")
    return {**run_options, "transformer_options": inside}
