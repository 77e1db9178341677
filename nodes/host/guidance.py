"""Guidance rules on a MODEL, for every sampler and guider that samples through the host."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ...ernie_core.sampling.guidance import GuidanceRun, Rule, SkipLayers, check_blocks, without_neutral
from .models import check_model, hand_on

logger = logging.getLogger(__name__)

GUIDANCE_KEY = "ernie_guidance"


def add_guidance(model, rules: Sequence[Rule]):
    """A clone of `model` that samples under these rules too, or `model` itself where none changes anything.

    The rules lie on the MODEL as the attachment `ernie_guidance`, in the order in which they were added. Every sampling
    run makes a fresh `GuidanceRun` of them and puts it into its own copy of the model options, which the host drops
    at the end of the run.

    Raises:
        ErnieError: not an ERNIE-Image model, ours or core's, or it has no such block to skip.
    """
    blocks = len(check_model(model).layers)
    added = without_neutral(rules)
    check_blocks(added, blocks)
    if not added:
        return model
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    rules = (*(patched.get_attachment(GUIDANCE_KEY) or ()), *added)
    patched.set_attachments(GUIDANCE_KEY, rules)
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, GUIDANCE_KEY)

    def sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        run = GuidanceRun(rules, sigmas)
        install(executor.class_obj.model_options, run)
        out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if run.evaluations_saved:
            logger.info("Guidance (ERNIE): %d evaluations of the negative prompt were saved.", run.evaluations_saved)
        return out

    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, GUIDANCE_KEY, sample)
    return patched


def take_guidance(model) -> tuple[Any, tuple[Rule, ...]]:
    """(`model` without its guidance rules, the rules), for runs that `install` them by themselves."""
    rules = tuple(model.get_attachment(GUIDANCE_KEY) or ())
    if not rules:
        return model, ()
    from comfy.patcher_extension import WrappersMP

    bare = model.clone()
    bare.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, GUIDANCE_KEY)
    return bare, rules


def install(model_options: dict[str, Any], run: GuidanceRun) -> None:
    """Let one run's rules act through the host's own hooks in `model_options`, which are this run's alone.

    Foreign functions before and after guidance keep working. A foreign guidance formula keeps working beside rules that
    only leave calls out; where rules change the formula it is named in a warning and not used.
    """
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    add_wrapper_with_key(
        WrappersMP.CALC_COND_BATCH, GUIDANCE_KEY, _predictions(run), model_options, is_model_options=True
    )
    if run.changes_difference:
        foreign = model_options.get("sampler_cfg_function")
        if foreign is not None:
            logger.warning(
                "The guidance of %s on this model is not used: Guidance (ERNIE) sets its own. Remove one of the two.",
                _name_of(foreign),
            )
        model_options["sampler_cfg_function"] = _formula(run)
    if run.weak_rules:
        before = model_options.get("sampler_post_cfg_function", [])
        # First of all, as the rule belongs to guidance and what others do comes after it.
        model_options["sampler_post_cfg_function"] = [_push(run), *before]


def _name_of(function) -> str:
    """Where a function comes from, such as nodes_apg.APG.execute; the host calls a pack's module by its path."""
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", repr(function))
    return f"{PurePath(module).name.rpartition('.')[2]}.{name.partition('.<locals>')[0]}"


def _level(timestep: Tensor) -> float:
    return float(timestep.max())


def _predictions(run: GuidanceRun):
    """The host's pair of predictions (x0), with the calls that no rule needs left out.

    Where the unconditional one is not made the conditional one stands in for it, so that every formula, foreign ones
    too, gives the conditional one.
    """

    def wrap(executor, model, conds, x, timestep, model_options):
        if len(conds) != 2:  # other guiders' calls, and the one without some blocks
            return executor(model, conds, x, timestep, model_options)
        sigma = _level(timestep)
        if run.is_held(sigma):
            return [x.clone(), x.clone()]
        if conds[1] is None or not run.wants_uncond(sigma):
            out = executor(model, [conds[0], None], x, timestep, model_options)
            return [out[0], out[0]]
        cond, uncond = executor(model, conds, x, timestep, model_options)
        run.observe(x, sigma, (x - cond) / sigma, (x - uncond) / sigma)
        if run.ended_B is not None:
            uncond = torch.where(run.ended_B[:, None, None, None], cond, uncond)
        return [cond, uncond]

    return wrap


def _formula(run: GuidanceRun):
    def guide(args: dict[str, Any]) -> Tensor:
        """x - x0, as the host wants it."""
        x, sigma = args["input"], _level(args["sigma"])
        if run.is_held(sigma) or args["cond_denoised"] is args["uncond_denoised"]:
            return x - args["cond_denoised"]
        cond, uncond = (x - args[name] for name in ("cond_denoised", "uncond_denoised"))
        return sigma * run.combine(x, sigma, cond / sigma, uncond / sigma, args["cond_scale"])

    return guide


def _push(run: GuidanceRun):
    def push(args: dict[str, Any]) -> Tensor:
        import comfy.samplers

        x, model, sigma = args["input"], args["model"], _level(args["sigma"])
        if run.is_held(sigma) or args["cond"] is None:
            return args["denoised"]
        weak: list[tuple[SkipLayers, Tensor]] = []
        for rule in run.wants_weak(sigma):
            with _without(model.diffusion_model, rule.blocks):
                options = args["model_options"]
                weak.append((rule, comfy.samplers.calc_cond_batch(model, [args["cond"]], x, args["sigma"], options)[0]))
        return run.push(args["denoised"], args["cond_denoised"], weak)

    return push


@contextmanager
def _without(network, blocks: Sequence[int]) -> Iterator[None]:
    """These blocks hand on what they get; on core's network too, which knows no block replacement."""
    layers = [network.layers[i] for i in blocks]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = hand_on
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
