"""LoRAs on a MODEL."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ernie_core.errors import ErnieError
from .models import check_model

RANGED_KEY = "ernie_loras"


def lora_shapes(model) -> dict[str, tuple[int, ...]]:
    """{module path: weight shape} of an ERNIE-Image MODEL, ours or core's."""
    from ...ernie_core.weights.lora import module_shapes

    return module_shapes(check_model(model))


def apply_lora(
    model, lora, strengths: Mapping[str, float], *, start: float = 1.0, end: float = 0.0, blend: float = 0.0
):
    """A clone of `model` with a LoRA; `model` itself where that changes nothing.

    At all noise levels it is patched into the weights as the host's own loader does, DoRA by our formula: the host
    divides by the norm of the weight alone where the magnitude is one per row. Between two noise levels it is added to
    the outputs of the modules while the model runs.

    Args:
        strengths: {module path: strength}, without those at 0.
        start, end: noise levels from and down to which it acts; 1 and 0 = always, equal = never.
        blend: width of the ramp across an edge.

    Raises:
        ErnieError: the noise levels run upwards, or the model has no such weight or bias.
    """
    from ...ernie_core.weights.lora_hooks import LoraStack, LoraUse

    network = check_model(model)
    use = LoraUse(lora=lora, strengths=dict(strengths), start=start, end=end, blend=blend)
    if not strengths or start == end:
        return model
    patched = model.clone()
    if use.band.is_whole:
        _patch_weights(patched, network, lora, strengths)
    else:
        earlier = patched.get_attachment(RANGED_KEY)
        _act_in_range(patched, LoraStack([*(earlier.uses if earlier else ()), use]))
    return patched


def _patch_weights(patcher, network: torch.nn.Module, lora, strengths: Mapping[str, float]) -> None:
    from ...ernie_core.weights.lora_edit import check_biases

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

    from ...ernie_core.weights.lora import LoraLayer

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
