"""ComfyUI as host: the only file that touches comfy.*, folder_paths, latent_preview and server.

The port that the nodes use; `standalone/host.py` offers the same functions without ComfyUI. Facts about the host are
from 0.12.1 and 0.33.0. Host modules are imported where they are used, so that this file can be imported anywhere.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import urllib.parse
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ernie_core.config import BASE, MAX_TEXT_TOKENS, DiTConfig
from ..ernie_core.errors import CheckpointError, ErnieError
from ..ernie_core.model.dit import DiT
from ..ernie_core.model.rope import RopeTable
from ..ernie_core.model.vae import VAE
from ..ernie_core.sampling.inputs import LATENT_CHANNELS, check_latent, check_text
from ..ernie_core.sampling.latents import latent_size
from ..ernie_core.sampling.samplers import sample_euler
from ..ernie_core.sampling.schedule import NUM_TRAIN_TIMESTEPS

logger = logging.getLogger(__name__)

TOKENS_KEY = "ministral3_3b"  # the name core's own ERNIE tokenizer gives its tokens

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


# --- the host itself -------------------------------------------------------------------------------------------------


def host_version() -> tuple[int, ...] | None:
    """(0, 33, 0) for ComfyUI 0.33.0; None when it does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    parts = __version__.split("+")[0].split("-")[0].split(".")
    return tuple(int(p) for p in parts if p.isdigit())


def throw_if_interrupted() -> None:
    """Raise the host's own exception when the user pressed cancel."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


def is_interrupted() -> bool:
    """Whether the user pressed cancel and `throw_if_interrupted` has not been called since."""
    import comfy.model_management

    return comfy.model_management.processing_interrupted()


def block_output() -> Any:
    """What an output holds when there is nothing to hand on yet: nodes behind it do not run."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(None)


def unload_models() -> None:
    """Give the accelerator's memory back, for another process to use."""
    import comfy.model_management as mm

    mm.unload_all_models()
    mm.soft_empty_cache()


def progress(total: int):
    """The host's progress bar: `.update_absolute(value, total, preview)`; preview = ("JPEG", PIL image, longest side)
    or None."""
    import comfy.utils

    return comfy.utils.ProgressBar(total)


def show_text(node_id: str | None, text: str) -> None:
    """Show `text` on the node while it runs."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if node_id is not None and server is not None:
        server.send_progress_text(text, node_id)


# --- routes ----------------------------------------------------------------------------------------------------------

MAX_BODY_BYTES = 65_536


Values = Mapping[str, Any]


def serve(
    routes: Mapping[str, Callable[[Values, Values, Values], Values | bytes]], statuses: Mapping[type[Exception], int]
) -> None:
    """Offer routes such as "GET /ernie/things/{id}"; nothing happens where no server runs.

    Each is called with (what stands for the names in braces, the query, the JSON object of a POST), in a thread of its
    own, for this server's own pages only: a page elsewhere gets 403. A mapping is answered as JSON, bytes as a JPEG;
    an ErnieError becomes {"error": text} with its status in `statuses`, else 400.
    """
    try:
        from server import PromptServer
    except ImportError:  # a program that loads packs without the host's server
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    for route, handle in routes.items():
        method, path = route.split(" ")
        server.routes.route(method, path)(_make_handler(method, handle, statuses))


def _make_handler(method: str, handle: Callable, statuses: Mapping[type[Exception], int]) -> Callable:
    import asyncio

    from aiohttp import web

    def refuse(status: int, text: str) -> web.Response:
        return web.json_response({"error": text}, status=status)

    async def answer(request: web.Request) -> web.Response:
        if not is_same_origin(request.headers):
            return refuse(403, "only pages of this ComfyUI may ask this")
        body: Any = {}
        if method == "POST":
            if request.content_type != "application/json":
                return refuse(415, "the body must be application/json")
            if (request.content_length or 0) > MAX_BODY_BYTES:
                return refuse(413, f"the body must have at most {MAX_BODY_BYTES} bytes")
            data = bytearray()
            async for chunk in request.content.iter_chunked(MAX_BODY_BYTES):
                data += chunk
                if len(data) > MAX_BODY_BYTES:
                    return refuse(413, f"the body must have at most {MAX_BODY_BYTES} bytes")
            try:
                body = json.loads(data or b"{}")
            except (ValueError, RecursionError):
                return refuse(400, "the body is not JSON")
            if not isinstance(body, dict):
                return refuse(400, "the body must be a JSON object")
        try:
            found = await asyncio.to_thread(handle, request.match_info, request.query, body)
        except ErnieError as e:
            return refuse(next((n for kind, n in statuses.items() if isinstance(e, kind)), 400), str(e))
        if isinstance(found, bytes):
            headers = {"Cache-Control": "private, max-age=600", "X-Content-Type-Options": "nosniff"}
            return web.Response(body=found, content_type="image/jpeg", headers=headers)
        return web.json_response(found, headers={"Cache-Control": "no-store"})

    return answer


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a page of this server, or from no page at all.

    Browsers send Sec-Fetch-Site where they trust the connection, and Origin with every POST; Referer is the last word
    where both are missing. A program that sends none of them is no page.
    """
    if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        return False
    host = headers.get("Host", "").lower()
    for name in ("Origin", "Referer"):
        if headers.get(name):
            try:
                came_from = urllib.parse.urlsplit(headers[name]).netloc.lower()
            except ValueError:
                return False
            if not host or came_from != host:
                return False
    return True


# --- files -----------------------------------------------------------------------------------------------------------


def models_folder() -> Path:
    """Where downloaded official folders go: models/ernie."""
    import folder_paths

    return Path(folder_paths.models_dir) / "ernie"


def output_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory())


def input_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_input_directory())


def user_folder() -> Path:
    """Where people's judgments are kept: user/__ernie_image (the host never serves names that begin with __)."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "__ernie_image"


def picture_folders() -> list[Path]:
    """Folders whose pictures may be shown to the browser: input, output, and ernie_images of extra_model_paths.yaml."""
    import folder_paths

    paths, _ = folder_paths.folder_names_and_paths.get("ernie_images", ([], set()))
    return [input_folder(), output_folder(), *map(Path, paths)]


def jobs_folder() -> Path:
    """Where training jobs are kept: output/ernie_jobs."""
    return output_folder() / "ernie_jobs"


def loras_folder() -> Path:
    """Where a finished LoRA goes: the first of the host's LoRA folders."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("loras")[0])


def list_loras() -> list[str]:
    """File names in the host's LoRA folders."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """Where `name`, an entry of `list_loras()`, lies.

    Raises:
        ErnieError: it is not there any more.
    """
    import folder_paths

    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ErnieError(f"{name} is not in models/loras any more. Refresh the node list and choose again.")
    return Path(path)


def _official_folders(kind: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of folders in the official layout, up to two levels below the host's model folders."""
    import folder_paths

    roots = [Path(p) for p in folder_paths.get_folder_paths(kind)]
    roots += [models_folder(), Path(folder_paths.models_dir) / "diffusers"]
    for root in dict.fromkeys(roots):
        if not root.is_dir():
            continue
        whole = [p.parent for pattern in ("*/", "*/*/") for p in root.glob(f"{pattern}model_index.json")]
        parts = [
            p.parent
            for pattern in ("*/", "*/*/")
            for p in root.glob(f"{pattern}config.json")
            if not any(p.is_relative_to(w) for w in whole) and any(p.parent.glob("*.safetensors"))
        ]
        for path in sorted(whole + parts):
            yield f"{path.relative_to(root).as_posix()}/", path


def list_models(kind: str) -> list[str]:
    """File names of a model folder of the host, then official folders (ending with "/")."""
    import folder_paths

    folders = dict(_official_folders(kind))
    files = [n for n in folder_paths.get_filename_list(kind) if not n.replace(os.sep, "/").startswith(tuple(folders))]
    return [*files, *folders]


def model_path(kind: str, name: str) -> Path:
    """Where `name`, an entry of `list_models(kind)`, lies.

    Raises:
        ErnieError: it is not there any more.
    """
    import folder_paths

    if name.endswith("/"):
        path = dict(reversed(list(_official_folders(kind)))).get(name)
    else:
        path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ErnieError(f"{name} is not in the model folder {kind} any more. Refresh the node list and choose again.")
    return Path(path)


# --- MODEL -----------------------------------------------------------------------------------------------------------


def make_model(component, *, weight_dtype: str = "default"):
    """A MODEL around our DiT: the host's memory manager, LoRA, hooks and wrappers all reach it."""
    return _load_model(component, weight_dtype, disable_dynamic=False)


def reload_model(path: Path, weight_dtype: str, disable_dynamic: bool = False):
    """`make_model` from disk: how the host makes an independent copy (training, multi-GPU, torch.compile)."""
    from ..ernie_core.weights.checkpoint import read_component

    return _load_model(read_component(path, "transformer"), weight_dtype, disable_dynamic)


def _patcher_class(disable_dynamic: bool = False):
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
        dtype = _DTYPES[weight_dtype]
    else:
        stored = None if config.quant_config else comfy.utils.weight_dtype(state_dict)
        count = comfy.utils.calculate_parameters(state_dict)
        dtype = mm.unet_dtype(model_params=count, supported_dtypes=list(supported), weight_dtype=stored)
    cast = mm.unet_manual_cast(None if config.quant_config else dtype, device, supported)
    config.set_inference_dtype(dtype, cast)

    model = model_class(config)
    patcher = _patcher_class(disable_dynamic)(model, load_device=device, offload_device=mm.unet_offload_device())
    load_strictly(model.diffusion_model, state_dict, assign=patcher.is_dynamic(), what=str(component.source))
    patcher.cached_patcher_init = (reload_model, (component.source, weight_dtype))
    return patcher


def _host_state_dict(component, *, keep_quantised: bool) -> dict[str, Tensor]:
    """Weights as the host's layers read them: quantised, with scales, if the host knows how, else multiplied out."""
    from comfy.quant_ops import QUANT_ALGOS

    from ..ernie_core.weights.quantise import dequantise, to_comfy_layout

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
            self._run_tables: dict[int, dict[tuple, RopeTable]] = {}

        def _rope_of_run(self, x, text_length: int, options: dict[str, Any]) -> RopeTable:
            """The table for this latent and text, computed once per sampling run and gone with it.

            A run is known by its sigmas, a tensor that the host hands to every call and drops at the end.
            """
            sigmas = options.get("sample_sigmas")
            tables: dict[tuple, RopeTable] = {}
            if sigmas is not None:
                if id(sigmas) not in self._run_tables:
                    weakref.finalize(sigmas, self._run_tables.pop, id(sigmas), None)
                tables = self._run_tables.setdefault(id(sigmas), tables)
            rope_options = options.get("rope_options") or {}
            key = (*x.shape[2:], text_length, x.device, x.dtype, *sorted(rope_options.items()))
            if key not in tables:
                tables[key] = self.rope(
                    *x.shape[2:], [text_length], device=x.device, dtype=x.dtype, options=rope_options
                )
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

            rope = self._rope_of_run(x, context.shape[1], options)
            return super().forward(x, timesteps, context, rope=rope, attend=attend, transformer_options=options)

    return HostDiT


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


def num_blocks(model) -> int:
    """How many transformer blocks an ERNIE-Image MODEL has, ours or core's."""
    return len(_check_model(model).layers)


def skip_blocks(model, blocks: Sequence[int]):
    """A clone of `model` whose blocks of these numbers hand on what they get.

    Their `forward` is patched, not the block: weights stay where the memory manager and LoRAs expect them. Works on
    core's ERNIE model too, which knows no block replacement.
    """
    patched = model.clone()
    for i in blocks:
        patched.add_object_patch(f"diffusion_model.layers.{i}.forward", _hand_on)
    return patched


def _hand_on(x: Tensor, *_others, **_more) -> Tensor:
    return x


# --- LoRA ------------------------------------------------------------------------------------------------------------

RANGED_KEY = "ernie_loras"


def checkpoints_folder() -> Path:
    """Where a merged transformer goes: models/diffusion_models, else the first of the host's folders for these."""
    import folder_paths

    folders = [Path(p) for p in folder_paths.get_folder_paths("diffusion_models")]  # models/unet comes first
    return next((folder for folder in folders if folder.name == "diffusion_models"), folders[0])


def device() -> torch.device:
    """Where long computations outside a model run."""
    import comfy.model_management as mm

    return mm.get_torch_device()


def lora_shapes(model) -> dict[str, tuple[int, ...]]:
    """{module path: weight shape} of an ERNIE-Image MODEL, ours or core's."""
    from ..ernie_core.weights.lora import module_shapes

    return module_shapes(_check_model(model))


def apply_lora(model, lora, strengths: Mapping[str, float], *, start: float = 1.0, end: float = 0.0):
    """A clone of `model` with a LoRA; `model` itself where that changes nothing.

    At all noise levels it is patched into the weights as the host's own loader does, DoRA by our formula: the host
    divides by the norm of the weight alone where the magnitude is one per row. Between two noise levels it is added to
    the outputs of the modules while the model runs.

    Args:
        strengths: {module path: strength}, without those at 0.
        start, end: noise levels from and down to which it acts; 1 and 0 = always, equal = never.

    Raises:
        ErnieError: the noise levels run upwards, or the model has no such weight or bias.
    """
    from ..ernie_core.weights.lora_hooks import LoraStack, LoraUse

    network = _check_model(model)
    use = LoraUse(lora=lora, strengths=dict(strengths), start=start, end=end)
    if not strengths or start == end:
        return model
    patched = model.clone()
    if use.is_whole:
        _patch_weights(patched, network, lora, strengths)
    else:
        earlier = patched.get_attachment(RANGED_KEY)
        _act_in_range(patched, LoraStack([*(earlier.uses if earlier else ()), use]))
    return patched


def _patch_weights(patcher, network: torch.nn.Module, lora, strengths: Mapping[str, float]) -> None:
    from ..ernie_core.weights.lora_edit import check_biases

    check_biases(lora, strengths, dict(network.named_parameters()))
    patches = _weight_patches({path: lora.layers[path] for path in strengths})
    for strength in dict.fromkeys(strengths.values()):
        chosen = {key: p for key, p in patches.items() if strengths[_module_of(key)] == strength}
        taken = patcher.add_patches(chosen, strength)
        if len(taken) != len(chosen):
            lost = next(key for key in chosen if key not in taken)
            raise ErnieError(f"the model has no {lost}, which the LoRA changes: it is another model's.")


def _module_of(key: str) -> str:
    return key.removeprefix("diffusion_model.").rpartition(".")[0]


def _weight_patches(layers: Mapping[str, Any]) -> dict[str, Any]:
    """{the host's weight key: patch}, made by the host's own reader, but for DoRA."""
    import comfy.lora

    patches: dict[str, Any] = {}
    file: dict[str, Tensor] = {}
    leaves = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    for path, layer in layers.items():
        key = f"diffusion_model.{path}"
        if layer.dora_scale is not None:
            patches[f"{key}.weight"] = _dora_class().of(layer)
            if layer.bias_delta() is not None:
                patches[f"{key}.bias"] = ("diff", (layer.bias_delta(),))
            continue
        file |= {f"{key}.{leaves.get(name, name)}": tensor for name, tensor in layer.tensors.items()}
        if layer.alpha is not None and layer.rank is not None:
            file[f"{key}.alpha"] = torch.tensor(layer.alpha)
    names = {key: f"{key}.weight" for key in (f"diffusion_model.{path}" for path in layers)}
    return patches | comfy.lora.load_lora(file, names, log_missing=True)


@functools.cache
def _dora_class() -> type:
    from comfy.weight_adapter import WeightAdapterBase

    from ..ernie_core.weights.lora import LoraLayer

    class DoraAdapter(WeightAdapterBase):
        """A DoRA whose norms are those of weight + change, as it was trained."""

        name = "dora"

        def __init__(self, loaded_keys, weights):  # the host copies an adapter by these two
            self.loaded_keys = loaded_keys
            self.weights = weights

        @classmethod
        def of(cls, layer):
            return cls(set(), (layer.algorithm, layer.alpha, layer.dora_scale, tuple(layer.tensors.items())))

        def calculate_weight(
            self,
            weight,
            key,
            strength,
            strength_model,
            offset,
            function,
            intermediate_dtype=torch.float32,
            original_weight=None,
        ):
            algorithm, alpha, dora_scale, tensors = self.weights
            layer = LoraLayer(algorithm=algorithm, tensors=dict(tensors), alpha=alpha, dora_scale=dora_scale)
            weight += function(strength * layer.delta(weight)).to(weight.dtype)
            return weight

    return DoraAdapter


def _act_in_range(patcher, stack) -> None:
    """Let `stack` act on every call of the model; its tensors come and go with the model's."""
    import comfy.model_patcher
    from comfy.patcher_extension import WrappersMP

    ratios: dict[Any, Tensor] = {}

    def call(executor, x, t, *args, **kwargs):
        with stack.applied(executor.class_obj.diffusion_model, t, ratios):
            return executor(x, t, *args, **kwargs)

    def run(executor, *args, **kwargs):
        ratios.clear()
        try:
            return executor(*args, **kwargs)
        finally:
            ratios.clear()

    beside = comfy.model_patcher.ModelPatcher(
        stack, load_device=patcher.load_device, offload_device=patcher.offload_device
    )
    patcher.set_attachments(RANGED_KEY, stack)
    patcher.set_additional_models(RANGED_KEY, [beside])
    for kind, wrapper in ((WrappersMP.APPLY_MODEL, call), (WrappersMP.OUTER_SAMPLE, run)):
        patcher.remove_wrappers_with_key(kind, RANGED_KEY)
        patcher.add_wrapper_with_key(kind, RANGED_KEY, wrapper)


# --- CLIP ------------------------------------------------------------------------------------------------------------


def make_clip(component, *, rope: str = "yarn"):
    """A CLIP around our text encoder; CLIPTextEncode and other nodes work with it."""
    return _load_clip(component, rope)


def reload_clip(path: Path, rope: str, disable_dynamic: bool = False):
    from ..ernie_core.weights.checkpoint import read_component

    return _load_clip(read_component(path, "text_encoder"), rope, disable_dynamic=disable_dynamic).patcher


class ClipModel(torch.nn.Module):
    """Our text encoder with the host's calling convention for `CLIP.cond_stage_model`."""

    def __init__(self, encoder: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.encoder.compute_dtype = torch.float32  # as core computes text features, whatever the weights are stored in
        self.dtypes = {dtype}
        self.execution_device: torch.device | None = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        if options.get("layer") not in (None, -2):
            logger.warning("CLIP layer %s is not used: ERNIE-Image reads layer -2.", options["layer"])
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def encode_token_weights(self, tokens: dict[str, list[list[tuple]]]) -> tuple[Tensor, None]:
        """(features [1, T, D] fp32 on the host's intermediate device, no pooled vector)."""
        import comfy.model_management as mm

        ids = [[token[0] for token in section] for section in tokens[TOKENS_KEY]]
        hidden = self.encoder.encode_ids(ids, device=self.execution_device)
        return torch.cat([h[None] for h in hidden]).float().to(mm.intermediate_device()), None

    def generate(self, *args, **kwargs):
        raise ErnieError(
            "the text encoder cannot write text: use Enhance Prompt (ERNIE) with Load Prompt Enhancer (ERNIE)."
        )

    def load_sd(self, sd: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        missing, unexpected = self.encoder.load_state_dict(sd, strict=False)
        return list(missing), list(unexpected)


class ClipTokenizer:
    """Our tokenizer with the host's calling convention: one section, weight 1 everywhere, exactly one BOS."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        ids = self.tokenizer.encode(text, max_tokens=None)
        if len(ids) > MAX_TEXT_TOKENS:
            logger.warning(
                "The prompt has %d tokens, the text encoder reads %d: the last %d are cut off.",
                len(ids),
                MAX_TEXT_TOKENS,
                len(ids) - MAX_TEXT_TOKENS,
            )
            ids = ids[:MAX_TEXT_TOKENS]
        return {TOKENS_KEY: [[(i, 1.0, n) if return_word_ids else (i, 1.0) for n, i in enumerate(ids)]]}

    def untokenize(self, tokens: list[tuple]) -> list[tuple[tuple, str]]:
        return [(token, self.tokenizer.decode([token[0]])) for token in tokens]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def _load_clip(component, rope: str, disable_dynamic: bool = False):
    import comfy.model_management as mm
    import comfy.ops
    import comfy.sd
    import comfy.supported_models_base
    import comfy.utils

    from ..ernie_core.weights.checkpoint import build_text_encoder

    dtype = _storage_dtype(component)
    tokenizer = None

    def build(device, dtype, model_options):
        nonlocal tokenizer
        encoder, tokenizer = build_text_encoder(
            component, ops=comfy.ops.manual_cast, dtype=dtype, device=device, rope=rope
        )
        return ClipModel(encoder, dtype)

    target = comfy.supported_models_base.ClipTarget(lambda **_: ClipTokenizer(tokenizer), build)
    options = {"dtype": dtype, "load_device": mm.text_encoder_device()}
    extra = {"disable_dynamic": True} if disable_dynamic else {}
    parameters = comfy.utils.calculate_parameters(component.state_dict)
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options=options, **extra)
    clip.patcher.cached_patcher_init = (reload_clip, (component.source, rope))
    return clip


def _storage_dtype(component) -> torch.dtype:
    """As in the file, but not fp16, whose range the activations of these language models exceed."""
    from ..ernie_core.weights.checkpoint import stored_dtype

    dtype = stored_dtype(component)
    return torch.bfloat16 if dtype is torch.float16 else dtype


def encode_prompt(clip, text: str):
    """CONDITIONING of one prompt, as CLIPTextEncode makes it."""
    if clip is None:
        raise ErnieError("the text encoder is empty: connect Load Text Encoder (ERNIE) or a CLIPLoader.")
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


# --- VAE -------------------------------------------------------------------------------------------------------------


class HostVAE(VAE):
    """Our VAE with the host's calling convention for `VAE.first_stage_model`."""

    def decode(self, latent_BCHW: Tensor, **options) -> Tensor:
        return super().decode(latent_BCHW)

    def encode(self, image_BCHW: Tensor, **options) -> Tensor:
        return super().encode(image_BCHW)


def make_vae(component, *, weight_dtype: str = "default"):
    """A VAE around our FLUX.2 VAE: VAEDecode, VAEEncode and their tiled kin work with it."""
    return _load_vae(component, weight_dtype)


def reload_vae(path: Path, weight_dtype: str, disable_dynamic: bool = False):
    from ..ernie_core.weights.checkpoint import read_component

    return _load_vae(read_component(path, "vae"), weight_dtype, disable_dynamic=disable_dynamic).patcher


def _load_vae(component, weight_dtype: str, disable_dynamic: bool = False):
    import comfy.model_management as mm
    import comfy.ops
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from ..ernie_core.weights.checkpoint import build_vae

    # The host's VAE object is built around the smallest autoencoder it knows, which ours then replaces: its constructor
    # recognises FLUX.2 at fixed widths only.
    dd = {"double_z": True, "z_channels": 1, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1]}
    params = {"ddconfig": {**dd, "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}, "embed_dim": 1}
    stand_in = AutoencoderKL(**params).state_dict()
    vae = comfy.sd.VAE(sd=stand_in, config={"params": params}, dtype=_DTYPES.get(weight_dtype))
    model = build_vae(component, ops=comfy.ops.disable_weight_init, dtype=vae.vae_dtype, device="cpu")
    model.__class__ = HostVAE
    model.eval().requires_grad_(False)
    for weight in model.parameters():  # with dynamic VRAM the host's Linear keeps the file's type; buffers stay fp32
        weight.data = weight.data.to(vae.vae_dtype)
    mm.archive_model_dtypes(model)
    vae.first_stage_model = model
    vae.patcher = _patcher_class(disable_dynamic)(model, load_device=vae.device, offload_device=mm.vae_offload_device())
    vae.latent_channels = LATENT_CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = 16
    vae.memory_used_decode = lambda shape, dtype: shape[0] * model.decode_bytes(shape[2], shape[3], dtype)
    vae.memory_used_encode = lambda shape, dtype: shape[0] * model.decode_bytes(shape[2] // 16, shape[3] // 16, dtype)
    vae.size = mm.module_size(model)
    vae.patcher.cached_patcher_init = (reload_vae, (component.source, weight_dtype))
    return vae


def decode(vae, latent: dict[str, Tensor]) -> Tensor:
    """IMAGE [B, H, W, 3] in [0, 1]."""
    if vae is None:
        raise ErnieError("the VAE is empty: connect Load VAE (ERNIE) or a VAELoader.")
    images = vae.decode(latent["samples"])
    return images.reshape(-1, *images.shape[-3:])


# --- prompt enhancer -------------------------------------------------------------------------------------------------


class PromptEnhancer:
    """ERNIE_ENHANCER: the engine's enhancer under the host's memory manager."""

    def __init__(self, patcher, source: str):
        self.patcher = patcher
        self.source = source

    def enhance(self, prompt: str, width: int, height: int, *, on_token=None, max_new_tokens: int, **settings) -> str:
        """The detailed prompt; see the engine's `Enhancer.enhance` for the settings."""
        import comfy.model_management as mm

        bar = progress(max_new_tokens)
        count = 0

        def step(text: str) -> None:
            nonlocal count
            throw_if_interrupted()
            count += 1
            bar.update_absolute(min(count, max_new_tokens), max_new_tokens)
            if on_token is not None:
                on_token(text)

        mm.load_models_gpu([self.patcher])
        return self.patcher.model.enhance(
            prompt,
            width,
            height,
            on_token=step,
            max_new_tokens=max_new_tokens,
            device=self.patcher.load_device,
            **settings,
        )


def make_enhancer(component) -> PromptEnhancer:
    """An ERNIE_ENHANCER; its weights come and go as the host's other models do."""
    import comfy.model_management as mm
    import comfy.ops

    from ..ernie_core.weights.checkpoint import build_enhancer

    dtype = _storage_dtype(component)
    offload = mm.text_encoder_offload_device()
    enhancer = build_enhancer(component, ops=comfy.ops.manual_cast, dtype=dtype, device=offload)
    enhancer.eval().requires_grad_(False)
    mm.archive_model_dtypes(enhancer)
    # Not the dynamic patcher: it leaves the embedding on the meta device, and the answer's scores are read from it.
    patcher = _patcher_class(disable_dynamic=True)(
        enhancer, load_device=mm.text_encoder_device(), offload_device=offload
    )
    return PromptEnhancer(patcher, str(component.source))


# --- scorers ---------------------------------------------------------------------------------------------------------


def _scorer_folders() -> dict[str, Path]:
    """Shown name -> folder: where people keep scorers and CLIP."""
    import folder_paths

    models = Path(folder_paths.models_dir)
    found = {name: models / name for name in ("scorers", "aesthetic")}
    for path in reversed(folder_paths.get_folder_paths("clip_vision")):
        found["clip_vision"] = Path(path)
    return found


def list_scorers() -> list[str]:
    """Weight files and model folders (ending with "/") that may be scorers, with the name of their place in front."""
    from ..ernie_core.scoring.files import list_weights

    return [f"{place}/{name}" for place, folder in _scorer_folders().items() for name in list_weights(folder)]


def scorer_path(name: str) -> Path:
    """Where `name`, an entry of `list_scorers()`, lies.

    Raises:
        ErnieError: it is not there any more.
    """
    place, _, rest = name.partition("/")
    path = _scorer_folders().get(place, Path()) / rest
    if not rest or place not in _scorer_folders() or not path.exists():
        raise ErnieError(f"{name} is not there any more. Refresh the node list and choose again.")
    return path


def tokenizer_folders() -> list[Path]:
    """Where CLIP's tokenizer lies that the host brings along."""
    import comfy

    return [Path(next(iter(comfy.__path__))) / "sd1_tokenizer"]


def scorer_layers() -> Any:
    """Layers that the memory manager can hold in part and that compute in the type of their input."""
    import comfy.ops

    return comfy.ops.manual_cast


def place_scorer(network: torch.nn.Module) -> Callable[[], torch.device]:
    """Put a network under the host's memory manager; what is returned brings it to the device and says which."""
    import comfy.model_management as mm

    held = torch.nn.Module()  # the host writes `device` on a model, which transformers' models do not allow
    held.network = network
    mm.archive_model_dtypes(held)
    patcher = _patcher_class(disable_dynamic=True)(
        held, load_device=mm.get_torch_device(), offload_device=mm.text_encoder_offload_device()
    )

    def bring() -> torch.device:
        throw_if_interrupted()
        mm.load_models_gpu([patcher])
        return patcher.load_device

    return bring


# --- sampling --------------------------------------------------------------------------------------------------------


def empty_latent(width: int, height: int, batch_size: int) -> dict[str, Tensor]:
    """LATENT of zeros for a picture of `width` x `height` pixels."""
    import comfy.model_management as mm

    rows, columns = latent_size(width, height)
    return {"samples": torch.zeros(batch_size, LATENT_CHANNELS, rows, columns, device=mm.intermediate_device())}


def _check_model(model) -> Any:
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


def _check_latent(model, latent: dict[str, Tensor]) -> Tensor:
    """The samples to start from; ErnieError when they are another model's or not finite."""
    import comfy.sample

    samples = latent["samples"]
    if latent.get("downscale_ratio_spacial") is not None:  # EmptyLatentImage: zeros that the host fits to the model
        samples = comfy.sample.fix_empty_latent_channels(model, samples, latent["downscale_ratio_spacial"])
    check_latent(samples)
    return samples


def _check_conditioning(network, name: str, conditioning: list) -> None:
    projection = network.text_proj
    width = projection.in_features if projection is not None else network.final_linear.in_features
    if not conditioning:
        raise ErnieError(f"{name} is empty: encode a prompt with Encode Prompt (ERNIE); an empty prompt is enough.")
    for text, _ in conditioning:
        check_text(name, text, width)


def sample(model, *, positive, negative, latent: dict[str, Tensor], sigmas: Tensor, cfg: float, seed: int) -> dict:
    """LATENT after the engine's Euler sampler, with the host's previews, masks, hooks and interrupt.

    The noise is what core's KSampler draws for `seed`. `negative` None: nothing to compare with, for cfg 1 only.

    Raises:
        ErnieError: model, latent or conditioning are not ERNIE-Image's, or the latent holds NaN.
    """
    import comfy.model_management as mm
    import comfy.sample
    import comfy.samplers
    import comfy.utils
    import latent_preview

    network = _check_model(model)
    samples = _check_latent(model, latent)
    conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    for name, conditioning in conds.items():
        _check_conditioning(network, name, conditioning)

    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    out = guider.sample(
        noise,
        samples,
        comfy.samplers.KSAMPLER(_euler),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": out.to(mm.intermediate_device())}


def _euler(model, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable | None, disable: bool) -> Tensor:
    """`sample_euler` as a sampler function of the host, whose `model` answers with x0."""
    from tqdm.auto import tqdm

    ones = x.new_ones(x.shape[0])

    def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
        return (x_BCHW - model(x_BCHW, sigma * ones, **extra_args)) / sigma

    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def on_step(step: int, steps: int, x_BCHW: Tensor, x0_BCHW: Tensor) -> None:
            throw_if_interrupted()
            bar.update()
            if callback is not None:
                level = sigmas[step]
                callback({"i": step, "x": x_BCHW, "denoised": x0_BCHW, "sigma": level, "sigma_hat": level})

        return sample_euler(denoise, x, sigmas, on_step=on_step)


# --- pictures --------------------------------------------------------------------------------------------------------


def save_png(image_HWC: Tensor, path: Path, *, prompt, extra_pnginfo, entries: dict[str, str]) -> None:
    """Write a PNG with its workflow inside, whole or not at all.

    Raises:
        ErnieError: the disk is full or the folder cannot be written to.
    """
    from comfy.cli_args import args
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if not args.disable_metadata:
        host_entries = {"prompt": prompt, **(extra_pnginfo or {})}
        texts = {k: json.dumps(v) for k, v in host_entries.items() if v is not None} | entries
        for key, text in texts.items():
            info.add_text(key, text)
    pixels = (image_HWC.clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as f:
            Image.fromarray(pixels).save(f, format="PNG", pnginfo=info, compress_level=4)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ErnieError(
            f"{path} could not be written ({e.strerror or e}). Free some space or choose another folder."
        ) from e
    finally:
        part.unlink(missing_ok=True)
