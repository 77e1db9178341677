"""LoRAs added to the outputs of a model's modules while it runs: the weights stay as they are, in any precision.

For LoRAs that act between two noise levels, where changing weights would mean moving them at every border, and for
hosts that share one model among several uses. A module's LoRAs act one after the other, as if each had been added to
the weight that the one before left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ErnieError
from ..sampling.experts import Band
from .lora import Lora, LoraLayer, dora_axis, dora_ratio, kronecker_factors

_COLUMNS = 1024  # columns of a weight that are read at once for a DoRA norm


@dataclass(frozen=True, kw_only=True)
class LoraUse:
    """A LoRA in use: how strongly per module, and between which noise levels."""

    lora: Lora
    strengths: Mapping[str, float]
    """{module path: strength}, as `module_strengths` gives it."""
    start: float = 1.0
    """Highest noise level (sigma, 1 = pure noise) at which it acts, included."""
    end: float = 0.0
    """Lowest noise level, not included: two ranges that meet never act together."""
    blend: float = 0.0
    """Width of the ramp across an edge, over which two ranges that meet hand over."""

    def __post_init__(self) -> None:
        _ = self.band  # checks the levels

    @property
    def band(self) -> Band:
        return Band(start=self.start, end=self.end)

    def share(self, sigmas_B: Tensor) -> Tensor:
        """How far it acts, per sample, 0 to 1."""
        return self.band.share(sigmas_B, self.blend)


class LoraStack(nn.Module):
    """Several LoRAs as one module, so that a host's memory manager moves their tensors like weights."""

    def __init__(self, uses: Sequence[LoraUse]):
        super().__init__()
        self.uses = tuple(uses)
        self._layers: dict[str, list[tuple[int, str]]] = {}
        self.tensors = nn.ModuleDict()
        for i, use in enumerate(self.uses):
            for path in use.strengths:
                name = f"{i}/{path}".replace(".", "/")
                self._layers.setdefault(path, []).append((i, name))
                self.tensors[name] = _tensors_module(use.lora.layers[path])

    @contextlib.contextmanager
    def applied(
        self, model: nn.Module, sigmas_B: Tensor | None = None, ratios: dict[Any, Tensor] | None = None
    ) -> Iterator[None]:
        """Add every LoRA that acts at `sigmas_B` (None = all) to `model` until the block ends, however it ends.

        `ratios` keeps what a DoRA reads from the weights; pass one dict per sampling run.
        """
        shares = [None if sigmas_B is None else use.share(sigmas_B) for use in self.uses]
        active = [True if share is None else bool(share.any()) for share in shares]
        everywhere = [share is None or bool((share == 1).all()) for share in shares]
        handles = []
        before = getattr(model, "active_loras", ())
        try:
            model.active_loras = (*before, *active)  # type: ignore[assignment]
            for path, layers in self._layers.items():
                here = [
                    _Part(
                        layer=_layer_of(self.uses[i].lora.layers[path], self.tensors[name]),
                        strength=self.uses[i].strengths[path],
                        share=None if everywhere[i] else shares[i],
                        key=(path, *(j for j, _ in layers if active[j] and j <= i)),
                    )
                    for i, name in layers
                    if active[i]
                ]
                if here:
                    module = model.get_submodule(path)
                    handles.append(module.register_forward_hook(_make_hook(here, {} if ratios is None else ratios)))
            yield
        finally:
            model.active_loras = before  # type: ignore[assignment]
            for handle in handles:
                handle.remove()


def _tensors_module(layer: LoraLayer) -> nn.Module:
    module = nn.Module()
    for name, tensor in layer.tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    if layer.dora_scale is not None:
        module.register_parameter("dora_scale", nn.Parameter(layer.dora_scale, requires_grad=False))
    return module


def _layer_of(layer: LoraLayer, tensors: nn.Module) -> LoraLayer:
    """`layer` with the tensors where the memory manager has put them."""
    now = dict(tensors.named_parameters())
    return LoraLayer(
        algorithm=layer.algorithm,
        tensors={name: now[name] for name in layer.tensors},
        alpha=layer.alpha,
        dora_scale=now.get("dora_scale"),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One LoRA on one module."""

    layer: LoraLayer
    strength: float
    share: Tensor | None
    """[B] how far it acts on each sample; None = wholly on all."""
    key: tuple
    """Of a DoRA ratio: it depends on the LoRAs that act before."""


def _make_hook(parts: Sequence[_Part], ratios: dict[Any, Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return _output(module, args[0], parts, ratios, out)

    return hook


def _output(
    module: nn.Module, x: Tensor, parts: Sequence[_Part], ratios: dict[Any, Tensor], out: Tensor | None = None
) -> Tensor:
    """What `module` gives for `x` with `parts` added in order; `out` is what it gives without them, if known."""
    if not parts:
        return module.forward(x) if out is None else out
    *before, part = parts
    layer = part.layer
    y = _output(module, x, before, ratios, out)
    strength: float | Tensor = part.strength
    if part.share is not None:
        strength = part.strength * _per_sample(part.share, x)
    change = None
    if layer.has_weight and layer.dora_scale is None:
        change = _product(module, layer, x)
    elif layer.has_weight:
        change = _dora_change(module, x, y, part, before, ratios)
    bias = layer.bias_delta()
    if bias is not None:
        bias = _beside(bias, x).reshape(_along_channels(module, x))
        change = bias if change is None else change + bias
    return y if change is None else y + strength * change.to(y.dtype)


def _beside(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.to(device=x.device, dtype=x.dtype)


def _product(module: nn.Module, layer: LoraLayer, x: Tensor) -> Tensor:
    """The change of the weight, before DoRA, times `x`."""
    t = {name: _beside(tensor, x) for name, tensor in layer.tensors.items() if name != "diff_b"}
    if isinstance(module, nn.Conv2d):
        delta = layer.product(x.device).reshape(module.out_channels, -1, *module.kernel_size)
        return F.conv2d(x, _beside(delta, x), None, module.stride, module.padding)
    if hasattr(module, "in_features") or isinstance(module, nn.Linear):
        if layer.algorithm == "lora":
            return layer.scale * F.linear(F.linear(x, t["lora_A"]), t["lora_B"])
        if layer.algorithm == "lokr":
            w1, w2 = kronecker_factors(t)
            grouped = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
            return layer.scale * torch.einsum("ij,...jk->...ik", w1, F.linear(grouped, w2)).flatten(-2)
        return F.linear(x, _beside(layer.product(x.device), x))
    eps = getattr(module, "eps", None)  # a norm's output is linear in its weight
    return F.rms_norm(x, (x.shape[-1],), t["diff"], eps)


def _dora_change(
    module: nn.Module, x: Tensor, y: Tensor, part: _Part, before: Sequence[_Part], ratios: dict[Any, Tensor]
) -> Tensor:
    """(weight + change, its rows or columns set to the magnitude) times `x`, less `y` = weight times `x` + bias."""
    assert part.layer.dora_scale is not None
    axis = dora_axis(part.layer.dora_scale)
    if part.key not in ratios:
        ratios[part.key] = _read_ratio(module, x, part, before, ratios)
    ratio = _beside(ratios[part.key], x)
    if axis == 0:
        scaled = x * ratio.flatten().reshape(_along_channels(module, x))
        return _output(module, scaled, before, ratios) + _product(module, part.layer, scaled) - y
    rows = ratio.flatten().reshape(_along_channels(module, y))
    bias = _bias(module, x, before)
    straight = y if bias is None else y - bias
    return rows * (straight + _product(module, part.layer, x)) - straight


def _along_channels(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    return (1, -1, *[1] * (x.ndim - 2)) if isinstance(module, nn.Conv2d) else (-1,)


def _bias(module: nn.Module, x: Tensor, before: Sequence[_Part]) -> Tensor | None:
    """The bias as the parts before leave it, shaped to be added to an output."""
    own = getattr(module, "bias", None)
    terms = [] if own is None else [_beside(own, x).reshape(_along_channels(module, x))]
    for part in before:
        delta = part.layer.bias_delta()
        if delta is not None:
            term = part.strength * _beside(delta, x).reshape(_along_channels(module, x))
            terms.append(term if part.share is None else term * _per_sample(part.share, x))
    return sum(terms[1:], terms[0]) if terms else None


def _per_sample(share_B: Tensor, x: Tensor) -> Tensor:
    return share_B.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _read_ratio(
    module: nn.Module, x: Tensor, part: _Part, before: Sequence[_Part], ratios: dict[Any, Tensor]
) -> Tensor:
    """`dora_ratio` for the weight that acts: it is read as outputs for unit vectors, whatever it is stored in.

    The norm of a sample-wise mix of LoRAs is that of all of them: in one batch noise levels differ only by chance.
    """
    assert part.layer.dora_scale is not None
    if isinstance(module, nn.Conv2d):
        inputs = module.in_channels // module.groups
        if module.kernel_size != (1, 1):
            raise ErnieError("a DoRA on a convolution of more than one pixel cannot act in a part of the noise levels.")
    else:
        inputs = int(module.in_features)  # pyright: ignore
    before = [_Part(layer=p.layer, strength=p.strength, share=None, key=p.key) for p in before]
    zero = _output(module, _columns(module, x, 0, 1, inputs) * 0, before, ratios)
    parts = []
    for first in range(0, inputs, _COLUMNS):
        last = min(first + _COLUMNS, inputs)
        out = _output(module, _columns(module, x, first, last, inputs), before, ratios) - zero
        parts.append(out.reshape(last - first, -1).float().T)
    whole = torch.cat(parts, dim=1) + part.layer.product(x.device)
    return dora_ratio(part.layer.dora_scale, whole)


def _columns(module: nn.Module, x: Tensor, first: int, last: int, inputs: int) -> Tensor:
    """Unit vectors `first` to `last` as inputs of the module, one per sample."""
    unit = torch.zeros(last - first, inputs, device=x.device, dtype=x.dtype)
    unit[:, first:last].fill_diagonal_(1)
    return unit.reshape(last - first, inputs, 1, 1) if isinstance(module, nn.Conv2d) else unit
