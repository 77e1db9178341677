"""Trainable LoRA, LoKr and DoRA beside a frozen transformer, and views that switch them on and off.

The factors are fp32 and are cast to the activations' dtype at each call, so that small updates are not rounded away
whatever the base is stored in. A view adds to the output of a Linear; weights are never touched, and with no view
active the model computes what it computes without this module, to the bit.

Sources: LoRA (arXiv 2106.09685), LoKr (LyCORIS, arXiv 2309.14859), DoRA (arXiv 2402.09353; the norm is a constant in
the backward pass, section 4.3).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ErnieError
from ..weights.lora import Lora, LoraLayer, dora_axis, kronecker_factors
from ..weights.quantise import QuantisedLinear
from .objectives import make_generator

AdapterAlgorithm = Literal["lora", "lokr", "dora"]
ADAPTER_ALGORITHMS: tuple[AdapterAlgorithm, ...] = ("lora", "lokr", "dora")
Linear = nn.Linear | QuantisedLinear

# Every matrix of every block and nothing else: what all trainers of this model agree to train and all loaders read.
BLOCK_LINEARS = (
    *("self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
)
DEFAULT_TARGETS = tuple(f"layers.*.{name}" for name in BLOCK_LINEARS)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which adapter, how large, and on which linear layers."""

    algorithm: AdapterAlgorithm = "lora"
    rank: int = 32
    alpha: float | None = None
    """The update is multiplied by alpha / rank; None = rank, so by 1."""
    targets: tuple[str, ...] = DEFAULT_TARGETS
    """Patterns (* and ?) over module paths; each must match a linear layer."""
    exclude: tuple[str, ...] = ()
    """Patterns over the matched paths that are left out again."""
    factor: int = 8
    """LoKr only: size of the small factor; the large one is low-rank where `rank` is below half of its smaller side."""
    dropout: float = 0.0
    """Share of the input that the low-rank path does not see while training."""

    def __post_init__(self) -> None:
        if self.algorithm not in ADAPTER_ALGORITHMS:
            raise ErnieError(f"algorithm must be one of {', '.join(ADAPTER_ALGORITHMS)}; got {self.algorithm!r}.")
        if self.rank < 1:
            raise ErnieError(f"rank must be at least 1, got {self.rank}.")
        if self.alpha is not None and not self.alpha > 0:
            raise ErnieError(f"alpha must be above 0 (rank = scale 1), got {self.alpha:g}.")
        if not self.targets:
            raise ErnieError("targets must name at least one pattern, such as layers.*.mlp.*; got none.")
        if self.factor < 1:
            raise ErnieError(f"factor must be at least 1, got {self.factor}.")
        if not 0 <= self.dropout < 1:
            raise ErnieError(f"dropout must be 0 (off) or a share below 1, got {self.dropout:g}.")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def find_linears(model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()) -> dict[str, Linear]:
    """{path: linear layer} of those that any of `targets` matches and none of `exclude`, in the model's order.

    Raises:
        ErnieError: a pattern that matches nothing, or nothing is left.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    for what, patterns, paths in (("target", targets, linears), ("exclude", exclude, linears)):
        idle = [pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in paths)]
        if idle:
            raise ErnieError(
                f"the {what} pattern {idle[0]!r} matches none of the model's {len(linears)} linear layers; their names "
                f"look like {', '.join(list(linears)[-3:])}."
            )
    found = {
        path: module
        for path, module in linears.items()
        if any(fnmatchcase(path, p) for p in targets) and not any(fnmatchcase(path, p) for p in exclude)
    }
    if not found:
        raise ErnieError("exclude leaves no linear layer to train; take a pattern out of it.")
    return found


def true_weight(linear: Linear) -> Tensor:
    """The weight [out, in] in fp32, multiplied out if it is stored in 8 bits."""
    return linear.dequantised(torch.float32) if isinstance(linear, QuantisedLinear) else linear.weight.detach().float()


# --- one layer ----------------------------------------------------------------------------------------------


class LinearCall(NamedTuple):
    """A base layer, what it was given, and what it made of that."""

    linear: Linear
    x: Tensor
    out: Tensor


class _AddLowRank(torch.autograd.Function):
    """out += scale (x A^T) B^T in place: one pass over `out`; keeps x, which its neighbours share, and x A^T."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.to(x.dtype).t()
        out.view(-1, out.shape[-1]).addmm_(inner, b.to(out.dtype).t(), alpha=scale)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, inner, a, b) = grads, ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        _, wants_x, wants_a, wants_b, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        if wants_x or wants_a:
            grad_inner = grad_rows @ (b * ctx.scale).to(grad.dtype)
            grad_a = (grad_inner.t() @ rows).to(a.dtype) if wants_a else None
            grad_x = (grad_inner @ a.to(grad.dtype)).view_as(x) if wants_x else None
        if wants_b:
            grad_b = (grad_rows.t() @ inner).to(b.dtype) * ctx.scale
        return grad, grad_x, grad_a, grad_b, None


class LoraFactors(nn.Module):
    """scale B A: A [rank, in] drawn as nn.Linear draws its weight, B [out, rank] zero."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scale, self.dropout = scale, dropout

    def add_to(self, out: Tensor, call: LinearCall, strength: float) -> Tensor:
        x = F.dropout(call.x, self.dropout, self.training)
        return cast(Tensor, _AddLowRank.apply(out, x, self.lora_A, self.lora_B, self.scale * strength))

    def to_layer(self) -> LoraLayer:
        alpha = None if self.scale == 1 else self.scale * self.lora_A.shape[0]
        return LoraLayer(algorithm="lora", tensors=_plain(lora_A=self.lora_A, lora_B=self.lora_B), alpha=alpha)


class LokrFactors(nn.Module):
    """scale w1 (x) w2, a Kronecker product; w2 is whole or the product of two thin factors. The product is not formed.

    w1 [out1, in1] and the inner w2_a are drawn as nn.Linear draws its weight, w2 or w2_b is zero.
    """

    def __init__(self, w1: Tensor, w2: Tensor | tuple[Tensor, Tensor], scale: float, dropout: float = 0.0):
        super().__init__()
        self.lokr_w1 = nn.Parameter(w1)
        if isinstance(w2, tuple):
            self.lokr_w2_a, self.lokr_w2_b = map(nn.Parameter, w2)
        else:
            self.lokr_w2 = nn.Parameter(w2)
        self.whole = not isinstance(w2, tuple)
        self.scale, self.dropout = scale, dropout

    def add_to(self, out: Tensor, call: LinearCall, strength: float) -> Tensor:
        x = F.dropout(call.x, self.dropout, self.training)
        w1 = self.lokr_w1.to(x.dtype) * (self.scale * strength)
        thick = (self.lokr_w2,) if self.whole else (self.lokr_w2_b, self.lokr_w2_a)
        inner = x.unflatten(-1, (w1.shape[1], -1))
        for factor in thick:
            inner = F.linear(inner, factor.to(x.dtype))
        return out + (w1 @ inner).flatten(-2).to(out.dtype)

    def to_layer(self) -> LoraLayer:
        # A LoKr of two whole factors has no place for alpha in most readers, so the scale goes into the small factor.
        tensors = _plain(lokr_w1=self.lokr_w1 * self.scale)
        if self.whole:
            tensors |= _plain(lokr_w2=self.lokr_w2)
        else:
            tensors |= _plain(lokr_w2_a=self.lokr_w2_a, lokr_w2_b=self.lokr_w2_b)
        return LoraLayer(algorithm="lokr", tensors=tensors)


class DoraFactors(LoraFactors):
    """Rows of W + scale B A, brought to the trainable norms `dora_scale` [out, 1]; at first those of W."""

    def __init__(
        self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0, *, weight: Tensor, magnitude: Tensor | None
    ):
        super().__init__(a, b, scale, dropout)
        square = weight.square().sum(1, keepdim=True).to(a.device)
        self.dora_scale = nn.Parameter((square.sqrt() if magnitude is None else magnitude).to(a.device, a.dtype))
        self.register_buffer("weight_square", square, persistent=False)
        self.weight_square: Tensor

    def ratio(self, linear: Linear) -> Tensor:
        """dora_scale over the norms of W + scale B A, [out], without forming the sum."""
        with torch.no_grad():
            a, b = self.lora_A.float(), self.lora_B.float() * self.scale
            weight = true_weight(linear).to(a.device)
            cross = ((weight @ a.t()) * b).sum(1, keepdim=True)
            square = self.weight_square + 2 * cross + ((b @ (a @ a.t())) * b).sum(1, keepdim=True)
            norm = square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return (self.dora_scale / norm).flatten()

    def add_to(self, out: Tensor, call: LinearCall, strength: float) -> Tensor:
        x = F.dropout(call.x, self.dropout, self.training)
        ratio = self.ratio(call.linear)
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), (self.lora_B * self.scale).to(x.dtype))
        product = call.out if call.linear.bias is None else call.out - call.linear.bias
        return out + strength * ((ratio - 1).to(out.dtype) * product + ratio.to(out.dtype) * low)

    def to_layer(self) -> LoraLayer:
        plain = super().to_layer()
        magnitude = _plain(dora_scale=self.dora_scale)["dora_scale"]
        return LoraLayer(algorithm="lora", tensors=plain.tensors, alpha=plain.alpha, dora_scale=magnitude)


Factors = LoraFactors | LokrFactors


def _plain(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def split_size(size: int, factor: int) -> tuple[int, int]:
    """(small, large) whole factors of `size`: the largest divisor up to `factor` that is not above the other."""
    small = max(d for d in range(1, min(factor, math.isqrt(size)) + 1) if size % d == 0)
    return small, size // small


def _draw(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(columns): kaiming with a = sqrt(5), the start of nn.Linear and of every LoRA trainer."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def _make_factors(config: AdapterConfig, linear: Linear, generator: torch.Generator, place: dict[str, Any]) -> Factors:
    out_size, in_size = linear.out_features, linear.in_features
    if config.algorithm == "lokr":
        (out1, out2), (in1, in2) = split_size(out_size, config.factor), split_size(in_size, config.factor)
        w1 = _draw((out1, in1), generator).to(**place)
        if config.rank < min(out2, in2) / 2:
            w2_a = _draw((out2, config.rank), generator).to(**place)
            return LokrFactors(w1, (w2_a, torch.zeros(config.rank, in2, **place)), config.scale, config.dropout)
        return LokrFactors(w1, torch.zeros(out2, in2, **place), config.scale, config.dropout)
    a = _draw((config.rank, in_size), generator).to(**place)
    b = torch.zeros(out_size, config.rank, **place)
    if config.algorithm == "dora":
        return DoraFactors(a, b, config.scale, config.dropout, weight=true_weight(linear), magnitude=None)
    return LoraFactors(a, b, config.scale, config.dropout)


def _read_factors(path: str, layer: LoraLayer, linear: Linear, place: dict[str, Any]) -> Factors:
    strange = None
    if layer.algorithm not in ("lora", "lokr"):
        strange = f"a {layer.algorithm}"
    elif layer.bias_delta() is not None:
        strange = "a change of the bias"
    elif layer.dora_scale is not None and (layer.algorithm == "lokr" or dora_axis(layer.dora_scale) == 0):
        strange = "a DoRA magnitude per column or on a LoKr"
    if strange is not None:
        raise ErnieError(
            f"{path} holds {strange}, which cannot be trained here; convert the file to a LoRA first (resize it)."
        )
    tensors = {name: tensor.to(**place) for name, tensor in layer.tensors.items()}
    if layer.algorithm == "lokr":
        w1, w2 = kronecker_factors(tensors)
        thin = (tensors["lokr_w2_a"], tensors["lokr_w2_b"]) if "lokr_w2" not in tensors else None
        return LokrFactors(w1, thin or w2, layer.scale)
    a, b = tensors["lora_A"], tensors["lora_B"]
    if layer.dora_scale is not None:
        magnitude = layer.dora_scale.reshape(-1, 1)
        return DoraFactors(a, b, layer.scale, weight=true_weight(linear), magnitude=magnitude)
    return LoraFactors(a, b, layer.scale)


# --- all layers ---------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Trainable factors for every matched Linear of `model`, which is only read.

    Parameters are named as in a LoRA file (`layers.0.self_attention.to_q.lora_A`) and come in the model's order. Their
    start is a function of `seed` and the layer's path: the same on every device, and whatever other layers are
    trained. At the start the update is zero.

    Args:
        model: the transformer.
        config: algorithm, size and targets.
        seed: of the start.
        dtype: of the master weights.
        device: of the master weights; None = where each layer's weight is.

    Raises:
        ErnieError: a target pattern matches no linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.factors: dict[str, Factors] = {}
        """By module path; the same objects as the submodules."""
        for path, linear in find_linears(model, config.targets, config.exclude).items():
            place = {"dtype": dtype, "device": device or linear.weight.device}
            self._attach(path, _make_factors(config, linear, make_generator("adapter", seed, path), place))

    def _attach(self, path: str, factors: Factors) -> None:
        node: nn.Module = self
        *parents, leaf = path.split(".")
        for name in parents:
            if name not in node._modules:
                node.add_module(name, nn.Module())
            node = node.get_submodule(name)
        node.add_module(leaf, factors)
        self.factors[path] = factors

    def to_lora(self, metadata: Mapping[str, str] | None = None) -> Lora:
        """The adapter as a file's content, on the CPU."""
        layers = {path: factors.to_layer() for path, factors in self.factors.items()}
        return Lora(layers=layers, metadata=dict(metadata or {}))

    @classmethod
    def from_lora(
        cls,
        model: nn.Module,
        lora: Lora,
        *,
        trainable: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Adapter:
        """The adapter that a file describes: to train it on, or frozen as part of a reference model.

        Raises:
            ErnieError: a module that is not a linear layer of `model`, or an algorithm that has no such form (LoHa,
                plain differences, a DoRA magnitude per column, changes of the bias).
        """
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter.factors = {}
        linears = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
        absent = [path for path in lora.layers if path not in linears]
        if absent or not lora.layers:
            raise ErnieError(
                f"the LoRA adapts {absent[0] if absent else 'nothing'}, which is no linear layer of this model; choose "
                "a LoRA of this transformer's linear layers."
            )
        for path in (path for path in linears if path in lora.layers):
            place = {"dtype": dtype, "device": device or linears[path].weight.device}
            adapter._attach(path, _read_factors(path, lora.layers[path], linears[path], place))
        return adapter.requires_grad_(trainable)


# --- views --------------------------------------------------------------------------------------------------

_Active = dict[str, list[tuple[Factors, float]]]


class Views:
    """Named adapters on one model, of which any set is active at a time; at first none.

    One forward hook per adapted Linear. Without active adapters the hook does nothing, so the model is the base to
    the bit.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._paths: dict[nn.Module, str] = {}
        """Of the layers that have a hook."""
        self._active: _Active = {}
        self._names: frozenset[str] = frozenset()
        _LIVE.add(self)

    def add(self, name: str, adapter: Adapter) -> None:
        """Make `adapter` known as `name`.

        Raises:
            ErnieError: the name is taken, or the model lacks one of the adapter's layers.
        """
        if name in self.adapters:
            raise ErnieError(f"there is a view {name!r} already; remove it first.")
        linears = {path: module for path, module in self.model.named_modules() if isinstance(module, Linear)}
        absent = [path for path in adapter.factors if path not in linears]
        if absent:
            raise ErnieError(f"the adapter is for another model: this one has no linear layer {absent[0]}.")
        self.adapters[name] = adapter
        for path in adapter.factors:
            if path not in self._hooks:
                self._hooks[path] = linears[path].register_forward_hook(self._make_hook(path))
                self._paths[linears[path]] = path

    def remove(self, name: str) -> None:
        """Forget the view `name`, and the hooks that only it needed.

        Raises:
            ErnieError: there is none, or it is active.
        """
        self._known(name)
        if name in self._names:
            raise ErnieError(f"the view {name!r} is active; leave its `with` block first.")
        del self.adapters[name]
        needed = {path for adapter in self.adapters.values() for path in adapter.factors}
        for path in [path for path in self._hooks if path not in needed]:
            self._hooks.pop(path).remove()
            del self._paths[self.model.get_submodule(path)]

    def close(self) -> None:
        """Remove every hook and forget every view."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._paths, self.adapters, self._active, self._names = {}, {}, {}, {}, frozenset()

    @contextmanager
    def active(self, *views: str | Mapping[str, float]) -> Iterator[None]:
        """Run the model with exactly these views, added up; none = the base. What was active before returns after.

        A mapping gives strengths: `active({"policy": 0.5})`; names alone have strength 1.
        """
        strengths: dict[str, float] = {}
        for view in views:
            strengths |= {view: 1.0} if isinstance(view, str) else dict(view)
        active: _Active = {}
        for name, strength in strengths.items():
            for path, factors in self._known(name).factors.items():
                active.setdefault(path, []).append((factors, strength))
        for entries in active.values():
            # DoRA reads the base's output, which LoRA writes over: DoRA goes first.
            entries.sort(key=lambda entry: not isinstance(entry[0], DoraFactors))
        with self._set(active, frozenset(strengths)):
            yield

    @contextmanager
    def _set(self, active: _Active, names: frozenset[str]) -> Iterator[None]:
        before = self._active, self._names
        self._active, self._names = active, names
        try:
            yield
        finally:
            self._active, self._names = before

    def _known(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ErnieError(f"there is no view {name!r}; known are {', '.join(self.adapters) or 'none'}.")
        return self.adapters[name]

    def _make_hook(self, path: str):
        def hook(linear: Linear, args: tuple[Tensor], base: Tensor) -> Tensor | None:
            entries = self._active.get(path)
            if not entries:
                return None
            call = LinearCall(linear, args[0], base)
            out = base
            for factors, strength in entries:
                out = factors.add_to(out, call, strength)
            return out

        return hook


_LIVE: weakref.WeakSet[Views] = weakref.WeakSet()


class ActiveViews:
    """What is active now in every `Views` of the process, to be restored when a block is run again in backward."""

    def __init__(self) -> None:
        self._states = [(views, views._active, views._names) for views in _LIVE]

    def read_output_of(self, linear: nn.Module) -> bool:
        """Whether backward needs the value that `linear` gave: DoRA's does, LoRA's and LoKr's do not."""
        ours = 0
        for views, active, _ in self._states:
            if linear in views._paths:
                ours += 1
                if any(isinstance(factors, DoraFactors) for factors, _ in active.get(views._paths[linear], ())):
                    return True
        return len(linear._forward_hooks) > ours  # what a foreign hook needs is unknown

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            for views, active, names in self._states:
                stack.enter_context(views._set(active, names))
            yield
