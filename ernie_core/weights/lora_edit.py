"""Merging LoRAs into a checkpoint, extracting one from two checkpoints, and changing a LoRA's rank or number.

Checkpoints are read and written tensor by tensor: two of 16 GB need the memory of their largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ErnieError
from .checkpoint import CONFIG_KEY, Component, write_safetensors_in_turn
from .layouts import Shape
from .lora import Lora, LoraLayer, kronecker_factors, weight_shapes
from .quantise import check_readable, dequantise_weight

Progress = Callable[[int, int], None]
"""on_progress(done, total): after each tensor; it may raise to stop."""

_EXACT_SIZE = 1024  # up to this many rows or columns a whole SVD is cheap
_OVERSAMPLES = 32
_POWER_STEPS = 6
MERGED_KEY = "ernie_merged"  # safetensors metadata of a merged checkpoint: which LoRAs, how strongly


def true_weight(component: Component, name: str) -> Tensor:
    """A tensor of a checkpoint in fp32, an 8-bit weight multiplied out."""
    tensor = component.state_dict[name]
    how = (component.quantisation or {}).get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    return tensor.float() if how is None else dequantise_weight(tensor, how, torch.float32)


# --- into a checkpoint --------------------------------------------------------------------------------------


def merge_loras(
    component: Component,
    uses: Sequence[tuple[Lora, Mapping[str, float]]],
    path: Path | str,
    *,
    names: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> None:
    """Write the transformer with LoRAs merged into its weights as a single file, whole or not at all.

    Weights keep their dtype, 8-bit ones become bfloat16 (all of them, so that the file has one precision). LoRAs are
    added in order, in fp32, and rounded once.

    Args:
        uses: (LoRA, {module path: strength}) each, the strengths as `module_strengths` gives them.
        names: of the LoRAs, for the file's metadata.

    Raises:
        CheckpointError: weights in a format that cannot be multiplied out.
        ErnieError: a LoRA changes a bias that the model does not have, or the disk is full.
    """
    layers = component.quantisation or {}
    check_readable(layers)
    state_dict = component.state_dict
    for lora, strengths in uses:
        check_biases(lora, strengths, state_dict)
    like = {name: torch.empty(t.shape, dtype=_merged_dtype(t), device="meta") for name, t in state_dict.items()}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(component.config)}
    if names:
        metadata[MERGED_KEY] = json.dumps(list(names))
    done = 0

    def make(name: str) -> Tensor:
        nonlocal done
        module, _, kind = name.rpartition(".")
        changes = [(lora.layers[module], s[module]) for lora, s in uses if module in s]
        if not changes:
            tensor = state_dict[name]
            tensor = tensor if tensor.dtype == like[name].dtype else true_weight(component, name)
        else:
            tensor = true_weight(component, name).clone()
            for layer, strength in changes:
                delta = layer.delta(tensor) if kind == "weight" else layer.bias_delta()
                if delta is not None:
                    tensor += strength * delta.float().reshape(tensor.shape)
        done += 1
        if on_progress is not None:
            on_progress(done, len(like))
        return tensor.to(like[name].dtype)

    write_safetensors_in_turn(like, make, path, metadata=metadata)


def _merged_dtype(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.element_size() == 1 else tensor.dtype


def check_biases(lora: Lora, paths: Mapping[str, float], names: Mapping[str, object]) -> None:
    """Raise ErnieError when a module's bias would change but the model has none; `names` are its tensors'."""
    for path in paths:
        if lora.layers[path].bias_delta() is not None and f"{path}.bias" not in names:
            raise ErnieError(
                f"the LoRA changes the bias of {path}, which has none in this model; it is another model's."
            )


# --- out of two checkpoints ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """A LoRA that leads from one checkpoint to another."""

    lora: Lora
    captured: float
    """Share of the squared difference, over all matrices, that it holds; 1 = all."""
    left_out: tuple[str, ...]
    """Tensors that differ but are no matrices (norms, biases) and were not asked for."""
    equal: int
    """Matrices that do not differ."""

    @property
    def summary(self) -> str:
        ranks = sorted(layer.rank for layer in self.lora.layers.values() if layer.rank is not None)
        span = (
            f"rank {ranks[0]} to {ranks[-1]}" if ranks and ranks[0] != ranks[-1] else f"rank {ranks[0] if ranks else 0}"
        )
        lines = [f"{len(self.lora.layers)} modules, {span}, {100 * self.captured:.2f} % of the difference"]
        if self.equal:
            lines.append(f"{self.equal} matrices are equal in both")
        if self.left_out:
            lines.append(f"{len(self.left_out)} norms and biases differ and are left out")
        return "; ".join(lines)


def extract_lora(
    base: Component,
    tuned: Component,
    *,
    rank: int,
    energy: float = 1.0,
    vectors: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Extraction:
    """The LoRA of at most `rank` that is nearest to tuned - base, matrix by matrix (truncated SVD).

    Args:
        energy: per matrix, the smallest rank that holds this share of the squared difference is taken; 1 = `rank`,
            less where the difference has less.
        vectors: also take the differences of norms and biases, as they are. ComfyUI and this pack read them,
            diffusers refuses the file then.
        dtype: of the factors.
        device: where the SVDs run.

    Raises:
        ErnieError: the two are no pair, do not differ, or a setting is out of range.
    """
    if rank < 1 or not 0 < energy <= 1:
        raise ErnieError(f"rank must be at least 1 and energy within 0 and 1, got {rank} and {energy:g}.")
    _check_pair(base, tuned)
    layers: dict[str, LoraLayer] = {}
    left_out: list[str] = []
    whole = held = 0.0
    equal = 0
    names = list(base.state_dict)
    for done, name in enumerate(names, start=1):
        module, _, kind = name.rpartition(".")
        difference = true_weight(tuned, name).to(device) - true_weight(base, name).to(device)
        if not torch.isfinite(difference).all():
            raise ErnieError(f"{name} holds NaN or infinite values in one of the two checkpoints.")
        if difference.ndim < 2:
            if difference.any() and vectors:
                key = "diff_b" if kind == "bias" else "diff"
                had = layers.get(module)
                tensors = dict(had.tensors) if had else {}
                tensors[key] = difference.to("cpu", dtype)
                layers[module] = LoraLayer(algorithm=had.algorithm if had else "diff", tensors=tensors)
            elif difference.any():
                left_out.append(name)
        elif not difference.any():
            equal += 1
        else:
            down, up, part = low_rank(difference.flatten(1), rank, energy)
            total = float(difference.double().square().sum())
            whole, held = whole + total, held + part * total
            tensors = conv_factors(down, up, tuple(difference.shape))
            had = layers.get(module)
            layers[module] = LoraLayer(
                algorithm="lora",
                tensors={key: t.to("cpu", dtype).contiguous() for key, t in tensors.items()}
                | ({"diff_b": had.tensors["diff_b"]} if had else {}),
            )
        if on_progress is not None:
            on_progress(done, len(names))
    if not layers:
        raise ErnieError(f"{tuned.source} and {base.source} do not differ in any matrix: there is nothing to extract.")
    return Extraction(
        lora=Lora(layers=layers), captured=held / whole if whole else 1.0, left_out=tuple(left_out), equal=equal
    )


def _check_pair(base: Component, tuned: Component) -> None:
    one, other = weight_shapes(base.state_dict), weight_shapes(tuned.state_dict)
    if one != other:
        strange = [path for path in {**one, **other} if one.get(path) != other.get(path)]
        raise ErnieError(
            f"the two checkpoints must be of one size, but {len(strange)} weights differ in shape ({strange[0]}: "
            f"{one.get(strange[0])} and {other.get(strange[0])})."
        )
    for component in (base, tuned):
        check_readable(component.quantisation or {})


def low_rank(matrix: Tensor, rank: int, energy: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """(down [r, in], up [out, r], share of the squared matrix): the best approximation up @ down of rank r <= `rank`.

    r is the smallest that holds the share `energy`. Both factors get the square roots of the singular values.
    """
    left, values, right = truncated_svd(matrix, rank)
    return _cut(left, values, right, rank, energy, float(matrix.double().square().sum()))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [out, k], S [k], V^T [k, in]), the leading k >= min(rank, size) singular triplets, largest first.

    A small matrix or a large rank is decomposed whole. Otherwise by subspace iteration from seeded random vectors
    (Halko, Martinsson, Tropp 2011, algorithm 4.4), whose error at the last kept value is below a per cent of it.
    """
    size = min(matrix.shape)
    if size <= _EXACT_SIZE or 3 * rank >= size:
        return torch.linalg.svd(matrix, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    width = min(size, rank + _OVERSAMPLES)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def _cut(
    left: Tensor, values: Tensor, right: Tensor, rank: int, energy: float, total: float
) -> tuple[Tensor, Tensor, float]:
    squares = values.double().square()
    kept = min(rank, _true_rank(values, (left.shape[0], right.shape[1])))
    if energy < 1 and total > 0:
        enough = int((squares.cumsum(0) < energy * total).sum()) + 1
        kept = min(kept, enough)
    root = values[:kept].sqrt()
    share = min(1.0, float(squares[:kept].sum()) / total) if total > 0 else 1.0
    return root[:, None] * right[:kept], left[:, :kept] * root, share


def _true_rank(values: Tensor, shape: Sequence[int]) -> int:
    """How many singular values lie above the rounding of the largest, at least 1."""
    return max(1, int((values > values[0] * max(shape) * torch.finfo(values.dtype).eps).sum()))


def conv_factors(down: Tensor, up: Tensor, shape: Shape) -> dict[str, Tensor]:
    """lora_A and lora_B for a weight of `shape`: a convolution's have its kernel and a 1x1 kernel."""
    ones = [1] * (len(shape) - 2)
    return {"lora_A": down.reshape(-1, *shape[1:]), "lora_B": up.reshape(*up.shape, *ones)}


# --- LoRAs --------------------------------------------------------------------------------------------------


def resize_lora(
    lora: Lora,
    rank: int,
    *,
    energy: float = 1.0,
    base: Component | None = None,
    on_progress: Progress | None = None,
) -> tuple[Lora, float]:
    """(plain LoRA of at most `rank`, share of the squared change that it holds); no large matrix is made for a LoRA.

    LoKr, LoHa and matrix differences become LoRAs too; a rank as large as theirs keeps them whole. Changes of norms
    and biases stay as they are.

    Args:
        energy: per module, the smallest rank that holds this share is taken.
        base: the checkpoint, which DoRA needs: its change depends on the weight.

    Raises:
        ErnieError: a DoRA without `base`, or a setting out of range.
    """
    if rank < 1 or not 0 < energy <= 1:
        raise ErnieError(f"rank must be at least 1 and energy within 0 and 1, got {rank} and {energy:g}.")
    layers: dict[str, LoraLayer] = {}
    whole = held = 0.0
    for done, (path, layer) in enumerate(lora.layers.items(), start=1):
        if layer.algorithm == "diff" and layer.tensors.get("diff", torch.empty(0)).ndim < 2:
            layers[path] = layer
            continue
        down, up, share, total, shape = _resized(path, layer, rank, energy, base)
        dtype = next(t.dtype for name, t in layer.tensors.items() if name != "diff_b")
        tensors = {name: t.to(dtype).contiguous() for name, t in conv_factors(down, up, shape).items()}
        tensors |= {name: t for name, t in layer.tensors.items() if name == "diff_b"}
        layers[path] = LoraLayer(algorithm="lora", tensors=tensors)
        whole, held = whole + total, held + share * total
        if on_progress is not None:
            on_progress(done, len(lora.layers))
    return replace(lora, layers=layers), held / whole if whole else 1.0


def _resized(
    path: str, layer: LoraLayer, rank: int, energy: float, base: Component | None
) -> tuple[Tensor, Tensor, float, float, Shape]:
    """(down, up, share, squared norm of the change, shape of the weight)."""
    if layer.dora_scale is not None:
        if base is None:
            raise ErnieError(f"{path} is a DoRA, whose change depends on the weight: name the checkpoint it is for.")
        weight = true_weight(base, f"{path}.weight")
        change = layer.delta(weight).flatten(1)
        down, up, share = low_rank(change, rank, energy)
        return down, up, share, float(change.double().square().sum()), tuple(weight.shape)
    pair = factor_pair(layer)
    if pair is None:
        change = layer.product().flatten(1)
        down, up, share = low_rank(change, rank, energy)
        return down, up, share, float(change.double().square().sum()), _weight_shape(layer, change)
    # up @ down = Qu (Ru Rd^T) Qd^T: the small middle matrix has the singular values of the product.
    down, up = pair
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    small = torch.linalg.svd(left.R @ right.R.T)
    total = float(small.S.double().square().sum())
    down, up, share = _cut(left.Q @ small.U, small.S, small.Vh @ right.Q.T, rank, energy, total)
    return down, up, share, total, _weight_shape(layer, None, pair)


def _weight_shape(layer: LoraLayer, change: Tensor | None, pair: tuple[Tensor, Tensor] | None = None) -> Shape:
    if layer.algorithm == "lora":
        return (layer.tensors["lora_B"].shape[0], *layer.tensors["lora_A"].shape[1:])
    if layer.algorithm == "diff":
        return tuple(layer.tensors["diff"].shape)
    if pair is not None:
        return pair[1].shape[0], pair[0].shape[1]
    assert change is not None
    return tuple(change.shape)


def factor_pair(layer: LoraLayer) -> tuple[Tensor, Tensor] | None:
    """(down [k, in], up [out, k]) with up @ down the change, in fp32, where k is smaller than the weight; else None.

    Exact: a Kronecker product of two products is the product of two Kronecker products, and an elementwise product of
    two products is that of their column-wise (Khatri-Rao) products.
    """
    t = {name: tensor.float() for name, tensor in layer.tensors.items()}
    if layer.dora_scale is not None or layer.algorithm == "diff":
        return None
    if layer.algorithm == "lora":
        return t["lora_A"].flatten(1), layer.scale * t["lora_B"].flatten(1)
    if layer.algorithm == "loha":
        up = (t["hada_w1_a"][:, :, None] * t["hada_w2_a"][:, None, :]).flatten(1)
        down = (t["hada_w1_b"][:, None, :] * t["hada_w2_b"][None, :, :]).flatten(0, 1)
    else:
        w1, w2 = (m.flatten(1) for m in kronecker_factors(t))
        pairs = [torch.linalg.svd(m, full_matrices=False) for m in (w1, w2)]
        ranks = [_true_rank(p.S, m.shape) for p, m in zip(pairs, (w1, w2), strict=True)]
        up = torch.kron(*(p.U[:, :r] * p.S[:r] for p, r in zip(pairs, ranks, strict=True)))
        down = torch.kron(*(p.Vh[:r].contiguous() for p, r in zip(pairs, ranks, strict=True)))
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return None
    return down, layer.scale * up


def concatenate_loras(uses: Sequence[tuple[Lora, Mapping[str, float]]]) -> Lora:
    """One LoRA whose change is exactly the sum of strength * change of each; ranks add up.

    Args:
        uses: (LoRA, {module path: strength}) each, the strengths as `module_strengths` gives them.

    Raises:
        ErnieError: one of them is a LoKr, LoHa or DoRA, whose sum is none: resize it to a plain LoRA first.
    """
    parts: dict[str, list[tuple[LoraLayer, float]]] = {}
    for lora, strengths in uses:
        for path, strength in strengths.items():
            parts.setdefault(path, []).append((lora.layers[path], strength))
    layers: dict[str, LoraLayer] = {}
    for path, several in parts.items():
        tensors: dict[str, Tensor] = {}
        for layer, strength in several:
            if layer.dora_scale is not None or layer.algorithm in ("lokr", "loha"):
                kind = "DoRA" if layer.dora_scale is not None else {"lokr": "LoKr", "loha": "LoHa"}[layer.algorithm]
                raise ErnieError(
                    f"{path} is a {kind}, which cannot be added up: make a plain LoRA of it first (resize)."
                )
            _add_layer(path, tensors, layer, strength)
        layers[path] = LoraLayer(algorithm="lora" if "lora_A" in tensors else "diff", tensors=tensors)
    return Lora(layers=layers)


def _add_layer(path: str, tensors: dict[str, Tensor], layer: LoraLayer, strength: float) -> None:
    """Add strength * layer to the factors and differences in `tensors`."""
    for name, tensor in layer.tensors.items():
        if name == "lora_A":
            tensors[name] = torch.cat([tensors[name], tensor]) if name in tensors else tensor
            continue
        factor = strength * (layer.scale if name == "lora_B" else 1.0)
        scaled = tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)
        if name not in tensors:
            tensors[name] = scaled
        else:
            tensors[name] = torch.cat([tensors[name], scaled], dim=1) if name == "lora_B" else tensors[name] + scaled
    if "lora_A" in tensors and "diff" in tensors:
        raise ErnieError(f"{path} is a LoRA in one file and a difference in another: resize the second first.")
