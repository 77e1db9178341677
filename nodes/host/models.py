"""MODEL: our DiT under the host's memory manager, and what can be done to it."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ernie_core.config import BASE, DiTConfig
from ...ernie_core.errors import CheckpointError, ErnieError
from ...ernie_core.model.dit import DiT, RunBlock, call_block
from ...ernie_core.model.rope import RopeTable
from ...ernie_core.sampling.inputs import LATENT_CHANNELS
from ...ernie_core.sampling.nag import nag_from, nag_inputs
from ...ernie_core.sampling.regions import REGIONS_KEY, RegionPlan, check_alone
from ...ernie_core.sampling.schedule import NUM_TRAIN_TIMESTEPS

logger = logging.getLogger(__name__)

STEP_CACHE_KEY = "ernie_step_cache"
NAG_KEY = "ernie_nag"  # in transformer_options

DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def make_model(component, *, weight_dtype: str = "default"):
    """A MODEL around our DiT: the host's memory manager, LoRA, hooks and wrappers all reach it."""
    return _load_model(component, weight_dtype, disable_dynamic=False)


def reload_model(path: Path, weight_dtype: str, disable_dynamic: bool = False):
    """`make_model` from disk: how the host makes an independent copy (training, multi-GPU, torch.compile)."""
    from ...ernie_core.weights.checkpoint import read_component

    return _load_model(read_component(path, "transformer"), weight_dtype, disable_dynamic)


def patcher_class(disable_dynamic: bool = False):
    import comfy.model_patcher as mp

    return mp.ModelPatcher if disable_dynamic else getattr(mp, "CoreModelPatcher", mp.ModelPatcher)


def _load_model(component, weight_dtype: str, disable_dynamic: bool):
    import comfy.model_management as mm
    import comfy.utils

    config_class, model_class = _model_classes()
    state_dict = _host_state_dict(component, keep_quantised=weight_dtype == "default")
    config = config_class({"image_model": "ernie", **component.config})
    config.quant_config = comfy.utils.detect_layer_quantization(state_dict, "")
    device, supported = mm.get_torch_device(), config.supported_inference_dtypes
    if weight_dtype != "default":
        dtype = DTYPES[weight_dtype]
    else:
        stored = None if config.quant_config else comfy.utils.weight_dtype(state_dict)
        count = comfy.utils.calculate_parameters(state_dict)
        dtype = mm.unet_dtype(model_params=count, supported_dtypes=list(supported), weight_dtype=stored)
    cast = mm.unet_manual_cast(None if config.quant_config else dtype, device, supported)
    config.set_inference_dtype(dtype, cast)

    model = model_class(config)
    patcher = patcher_class(disable_dynamic)(model, load_device=device, offload_device=mm.unet_offload_device())
    load_strictly(model.diffusion_model, state_dict, assign=patcher.is_dynamic(), what=str(component.source))
    patcher.cached_patcher_init = (reload_model, (component.source, weight_dtype))
    return patcher


def _host_state_dict(component, *, keep_quantised: bool) -> dict[str, Tensor]:
    """Weights as the host's layers read them: quantised, with scales, if the host knows how, else multiplied out."""
    from comfy.quant_ops import QUANT_ALGOS

    from ...ernie_core.weights.quantise import dequantise, to_comfy_layout

    layers = component.quantisation or {}
    if keep_quantised and all(how.format in QUANT_ALGOS for how in layers.values()):
        return to_comfy_layout(component.state_dict, layers)
    return dequantise(component.state_dict, layers, torch.bfloat16)


def load_strictly(module: torch.nn.Module, state_dict: dict[str, Tensor], *, assign: bool, what: str) -> None:
    """Load every tensor, none left over, none missing; the host's quantised layers read their own extra keys."""
    missing, unexpected = module.load_state_dict(state_dict, strict=False, assign=assign)
    if missing or unexpected:
        raise CheckpointError(
            f"{what} does not fit: {len(missing)} tensors missing ({', '.join(missing[:5])}), "
            f"{len(unexpected)} unknown ({', '.join(unexpected[:5])})."
        )


@functools.cache
def _model_classes() -> tuple[type, type]:
    """(model config, model): made on first use, because their bases are the host's."""
    import comfy.conds
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models_base

    class ErnieConfig(comfy.supported_models_base.BASE):
        unet_extra_config: dict = {}
        sampling_settings = {"multiplier": float(NUM_TRAIN_TIMESTEPS), "shift": BASE.shift}
        latent_format = comfy.latent_formats.Flux2
        memory_usage_factor = 10.0  # as core's ERNIE
        supported_inference_dtypes = [torch.bfloat16, torch.float32]  # the residual stream exceeds fp16's range
        vae_key_prefix = ["vae."]
        text_encoder_key_prefix = ["text_encoders."]

        def model_type(self, state_dict, prefix=""):
            return comfy.model_base.ModelType.FLOW

    # The host maps LoRA keys that begin with "transformer." for some of its classes only: from 0.19 on for ErnieImage;
    # before, HiDream is one of them, and being one has no other effect.
    base = getattr(comfy.model_base, "ErnieImage", comfy.model_base.HiDream)

    class ErnieModel(base):
        def __init__(self, model_config, device=None):
            # Not base.__init__: that would build core's transformer.
            comfy.model_base.BaseModel.__init__(
                self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=_adapter_class()
            )
            self._scaled_sampling = None

        def encode_adm(self, **kwargs):
            return None

        def extra_conds(self, **kwargs):
            out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
            if kwargs.get("cross_attn") is not None:
                out["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
            if kwargs.get(REGIONS_KEY) is not None:
                out[REGIONS_KEY] = comfy.conds.CONDConstant(kwargs[REGIONS_KEY])
            return out

        def process_timestep(self, timestep, **kwargs):
            """Timesteps on the 0-1000 scale, also when ModelSamplingAuraFlow or ModelSamplingFlux made them 0-1."""
            top = float(self.model_sampling.timestep(1.0))  # plain numbers: nothing waits for the device
            if top == NUM_TRAIN_TIMESTEPS:
                return timestep
            if self._scaled_sampling is not self.model_sampling:
                self._scaled_sampling = self.model_sampling
                logger.warning(
                    "The sampling node on this model counts timesteps to %g, ERNIE-Image needs %d: they are scaled. "
                    "ModelSamplingSD3 sets the shift without this.",
                    top,
                    NUM_TRAIN_TIMESTEPS,
                )
            return timestep * (NUM_TRAIN_TIMESTEPS / top)

    return ErnieConfig, ErnieModel


@functools.cache
def _adapter_class() -> type:
    from comfy.ldm.modules.attention import optimized_attention
    from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

    class HostDiT(DiT):
        """Our DiT with the host's calling convention."""

        def __init__(self, *, dtype, device, operations, image_model, **config):
            super().__init__(DiTConfig.from_dict(config), ops=operations, dtype=dtype, device=device)
            self.dtype = dtype
            self._run_tables: dict[int, dict[tuple, Any]] = {}

        def _tables_of_run(self, options: dict[str, Any]) -> dict[tuple, Any]:
            """What is computed once per sampling run and gone with it.

            A run is known by its sigmas, a tensor that the host hands to every call and drops at the end.
            """
            sigmas = options.get("sample_sigmas")
            if sigmas is None:
                return {}
            if id(sigmas) not in self._run_tables:
                weakref.finalize(sigmas, self._run_tables.pop, id(sigmas), None)
            return self._run_tables.setdefault(id(sigmas), {})

        def _rope_of_run(self, x, text_length: int, options: dict[str, Any]) -> RopeTable:
            """The table for this latent and text, computed once per sampling run."""
            tables = self._tables_of_run(options)
            rope_options = options.get("rope_options") or {}
            key = (*x.shape[2:], text_length, x.device, x.dtype, *sorted(rope_options.items()))
            if key not in tables:
                tables[key] = self.rope(
                    *x.shape[2:], [text_length], device=x.device, dtype=x.dtype, options=rope_options
                )
            return tables[key]

        def _regions_of_run(
            self, regions, x, text_length: int, options: dict[str, Any]
        ) -> tuple[RegionPlan, RopeTable]:
            """Who attends to whom and where all tokens stand, computed once per sampling run."""
            tables = self._tables_of_run(options)
            rope_options = options.get("rope_options") or {}
            key = (id(regions), *x.shape[2:], text_length, x.device, x.dtype, *sorted(rope_options.items()))
            if key not in tables:
                p, c = self.config.patch_size, self.config
                plan = RegionPlan(regions, x.shape[2] // p, x.shape[3] // p, text_length=text_length, device=x.device)
                rope = plan.rope(
                    axes_dim=c.rope_axes_dim, theta=c.rope_theta, device=x.device, dtype=x.dtype, options=rope_options
                )
                tables[key] = plan, rope
            return tables[key]

        def forward(self, x, timesteps, context=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
            return WrapperExecutor.new_class_executor(
                self._forward, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
            ).execute(x, timesteps, context, control, transformer_options, **kwargs)

        def _forward(self, x, timesteps, context, control, transformer_options, **kwargs):
            if control is not None:
                raise ErnieError("ERNIE-Image has no ControlNet: remove the ControlNet node from the conditioning.")
            options = dict(transformer_options)  # the DiT writes block_index and others into it

            def attend(q_BSNK, k_BSNK, v_BSNK, lengths):
                assert lengths is None, "the host runs prompts of different lengths one after the other"
                heads = q_BSNK.shape[2]
                q, k, v = (t.flatten(2) for t in (q_BSNK, k_BSNK, v_BSNK))
                out = optimized_attention(q, k, v, heads, transformer_options=options)
                return out.unflatten(-1, (heads, -1))

            def attend_biased(q_BSNK, k_BSNK, v_BSNK, bias_S):
                heads = q_BSNK.shape[2]
                q, k, v = (t.flatten(2) for t in (q_BSNK, k_BSNK, v_BSNK))
                mask = bias_S.expand(1, 1, q.shape[1], -1)
                out = optimized_attention(q, k, v, heads, mask=mask, transformer_options=options)
                return out.unflatten(-1, (heads, -1))

            regions = kwargs.get(REGIONS_KEY)
            nag = options.get(NAG_KEY)
            if nag is not None and nag.acts_at(float(options["sigmas"].max())):
                check_alone(regions is not None)
                return self._forward_with_nag(nag, x, timesteps, context, attend, options)
            if regions is None:
                rope = self._rope_of_run(x, context.shape[1], options)
            else:
                plan, rope = self._regions_of_run(regions, x, context.shape[1], options)
                attend, context = plan.through(attend, attend_biased), context[:, plan.text_index]
            run_block = self._run_block(timesteps, options)
            return super().forward(
                x, timesteps, context, rope=rope, attend=attend, run_block=run_block, transformer_options=options
            )

        def _run_block(self, timesteps, options: dict[str, Any], *part: Any) -> RunBlock:
            """What a step cache of this run makes of the blocks.

            Apart are: prompts, in whatever batches the host asks for them, this network, which LoRAs act, and which
            blocks are left out (Reduced Depth, and skip-layer guidance, which asks the same prompt again); `part`: what
            of a batch is run by itself, and with what tokens.
            """
            run = options.get(STEP_CACHE_KEY)
            if run is None:
                return call_block
            left_out = tuple(i for i, layer in enumerate(self.layers) if "forward" in vars(layer))
            key = (
                id(self),
                self.active_loras,
                tuple(options.get("uuids", options.get("cond_or_uncond", ()))),
                left_out,
                *part,
            )
            return run.run_block(key, float(timesteps[0]) / NUM_TRAIN_TIMESTEPS)

        def _forward_with_nag(self, nag, x, timesteps, context, attend, options):
            """Under a negative prompt in the attention, but for what is predicted under a negative prompt already."""

            def predict(i: int, rows: slice, is_cond: bool):
                inputs = {"text_BTD": context[rows], "attend": attend}
                if is_cond:
                    image_tokens = x.shape[2] * x.shape[3] // self.config.patch_size**2
                    rope_for = functools.partial(self._rope_of_run, x, options=options)
                    inputs = nag_inputs(nag, context[rows].to(x.dtype), image_tokens, rope_for, attend)
                else:
                    inputs["rope"] = self._rope_of_run(x, context.shape[1], options)
                inputs["run_block"] = self._run_block(timesteps, options, NAG_KEY, i)
                # Each call gets its own copy: the DiT writes into it.
                return super(HostDiT, self).forward(x[rows], timesteps[rows], **inputs, transformer_options={**options})

            kinds = options.get("cond_or_uncond") or [0]
            size = len(x) // len(kinds)
            parts = [predict(i, slice(i * size, (i + 1) * size), kind == 0) for i, kind in enumerate(kinds)]
            return torch.cat(parts)

    return HostDiT


def add_nag(model, negative: list, **settings: float):
    """A clone of `model` with a negative prompt in its attention (see `Nag`); `model` itself at neutral settings.

    It lies in transformer_options, where every sampler and guider of the host carries it. One per model: a second one
    takes the place of the first and says so.

    Raises:
        ErnieError: not our ERNIE-Image network (core's offers no place to look twice), or `negative` is no prompt of
            it.
    """
    network = check_model(model)
    if not isinstance(network, DiT):
        raise ErnieError(
            "the negative prompt needs this pack's ERNIE-Image network, this is ComfyUI's own: load the same file with "
            "Load Diffusion Model (ERNIE)."
        )
    nag = nag_from(negative, network.config.text_in_dim, **settings)
    if nag.is_neutral:
        return model
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    if NAG_KEY in options:
        logger.warning("This model had a negative prompt in its attention already: only the last one acts.")
    options[NAG_KEY] = nag
    return patched


def set_shift(model, shift: float):
    """A clone of `model` that samples with `shift`, or `model` itself when it already does."""
    import comfy.model_sampling as sampling

    current = model.get_model_object("model_sampling")
    is_flow = isinstance(current, sampling.ModelSamplingDiscreteFlow) and isinstance(current, sampling.CONST)
    if is_flow and current.multiplier == NUM_TRAIN_TIMESTEPS and current.shift == shift:
        return model
    if "model_sampling" in model.object_patches:
        logger.warning(
            "The shift of the ModelSampling node on this model is not used: the sampler sets %g. "
            "Set the sampler's shift instead.",
            shift,
        )

    class ErnieSampling(sampling.ModelSamplingDiscreteFlow, sampling.CONST):
        pass

    patched = model.clone()
    replacement = ErnieSampling(model.model.model_config)
    replacement.set_parameters(shift=shift, multiplier=NUM_TRAIN_TIMESTEPS)
    patched.add_object_patch("model_sampling", replacement)
    return patched


def check_model(model) -> Any:
    """The transformer inside `model`; ErnieError unless it is an ERNIE-Image one, ours or core's."""
    if model is None:
        raise ErnieError("the model is empty: connect Load Diffusion Model (ERNIE) or a UNETLoader.")
    network = model.get_model_object("diffusion_model")
    channels = model.get_model_object("latent_format").latent_channels
    if channels != LATENT_CHANNELS or not hasattr(network, "adaLN_modulation"):
        raise ErnieError(
            f"the model must be ERNIE-Image ({LATENT_CHANNELS} latent channels), got {type(model.model).__name__} "
            f"({channels} latent channels). Load it with Load Diffusion Model (ERNIE), or sample it with KSampler."
        )
    return network


def num_blocks(model) -> int:
    """How many transformer blocks an ERNIE-Image MODEL has, ours or core's."""
    return len(check_model(model).layers)


def skip_blocks(model, blocks: Sequence[int]):
    """A clone of `model` whose blocks of these numbers hand on what they get.

    Their `forward` is patched, not the block: weights stay where the memory manager and LoRAs expect them. Works on
    core's ERNIE model too, which knows no block replacement.
    """
    patched = model.clone()
    for i in blocks:
        patched.add_object_patch(f"diffusion_model.layers.{i}.forward", hand_on)
    return patched


def hand_on(x: Tensor, *_others, **_more) -> Tensor:
    """What stands for the `forward` of a block that is left out."""
    return x
