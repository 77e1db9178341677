"""Runs that ask the model under several prompts at once: editing, inversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...ernie_core.sampling.guidance import Denoise, GuidanceRun, Rule
from .guidance import install, take_guidance
from .models import check_model
from .runtime import throw_if_interrupted
from .sampling import check_conditioning, checked_latent


def sample_branches(
    model,
    *,
    branches: Mapping[str, tuple[list, list | None, float]],
    latent: dict[str, Tensor],
    sigmas: Tensor,
    run: Callable[..., Tensor],
    steps: int,
) -> dict:
    """LATENT that `run` makes of a picture with the model under several prompts.

    Every branch is guided by the host's own sampling function: hooks, LoRA, guidance patches, wrappers, areas, previews
    and interrupt act on each of them.

    Args:
        branches: {name: (positive, negative, cfg)}; negative None for cfg 1 only.
        latent: its noise_mask says where the picture may change.
        sigmas: the noise levels of the run, for those hooks that ask.
        run: called as run({name: denoise}, x0_BCHW, on_step=, mask_BCHW=None or a mask); returns the new picture.
        steps: how many times `run` calls on_step.

    Raises:
        ErnieError: model, latent or conditioning are not ERNIE-Image's, or the latent holds NaN.
    """
    import comfy.model_management as mm
    import comfy.samplers
    import comfy.utils
    import latent_preview

    network = check_model(model)
    samples = checked_latent(model, latent)
    if len(sigmas) < 2:  # strength 0
        return {**latent, "samples": samples}
    for name, (positive, negative, _) in branches.items():
        for kind, conditioning in (("prompt", positive), ("negative", negative)):
            if conditioning is not None:
                check_conditioning(network, f"{name} {kind}", conditioning)
    model, rules = take_guidance(model)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(
        {
            f"{name} {kind}": conditioning
            for name, (positive, negative, _) in branches.items()
            for kind, conditioning in (("positive", positive), ("negative", negative))
            if conditioning is not None
        }
    )
    out = guider.sample(
        torch.zeros_like(samples),
        samples,
        _branch_sampler(run, branches, rules),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": out.to(mm.intermediate_device())}


def _branch_sampler(run: Callable[..., Tensor], branches: Mapping[str, Any], rules: Sequence[Rule]) -> Any:
    import comfy.model_patcher
    import comfy.samplers
    from tqdm.auto import tqdm

    class BranchSampler(comfy.samplers.Sampler):
        """`run` as a sampler of the host."""

        def sample(
            self,
            model_wrap,
            sigmas,
            extra_args,
            callback,
            noise,
            latent_image=None,
            denoise_mask=None,
            disable_pbar=False,
        ):
            ones = noise.new_ones(noise.shape[0])

            def make(name: str) -> Denoise:
                options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
                if rules:  # they remember what they saw: each branch has its own
                    install(options, GuidanceRun(rules, sigmas))

                def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
                    throw_if_interrupted()
                    with _asking(model_wrap, name, branches[name][2]):
                        x0 = model_wrap(x_BCHW, sigma * ones, model_options=options, seed=extra_args["seed"])
                    return (x_BCHW - x0) / sigma

                return denoise

            with tqdm(disable=disable_pbar) as bar:

                def on_step(step: int, steps: int, x_BCHW: Tensor, x0_BCHW: Tensor) -> None:
                    bar.total = steps
                    bar.update()
                    if callback is not None:
                        callback(step, x0_BCHW, x_BCHW, steps)

                return run(
                    {name: make(name) for name in branches}, latent_image, on_step=on_step, mask_BCHW=denoise_mask
                )

    return BranchSampler()


@contextmanager
def _asking(guider, branch: str, cfg: float) -> Iterator[None]:
    """The guider as if this branch were its only one: whoever wraps its prediction sees ordinary prompts and cfg."""
    before = guider.conds, guider.cfg
    pair = {kind: guider.conds.get(f"{branch} {kind}") for kind in ("positive", "negative")}
    guider.conds, guider.cfg = {kind: conds for kind, conds in pair.items() if conds is not None}, cfg
    try:
        yield
    finally:
        guider.conds, guider.cfg = before
