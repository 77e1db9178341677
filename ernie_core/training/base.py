"""The frozen transformer that adapters are trained on, in the precision that fits the card.

8-bit bases are weight-only: every product is in bf16 with the weight multiplied out for the call. Only the seven
matrices of each block are stored in 8 bits, 98 % of the model; adaLN, embedders, norms and the final layer stay in
bf16, because every block depends on them and they are small.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import DiTConfig
from ..errors import CheckpointError, ErnieError
from ..model.dit import DiT
from ..weights.checkpoint import Component, build_transformer, read_component
from ..weights.quantise import (
    FP8_DTYPES,
    LayerQuantisation,
    QuantisedLinear,
    check_readable,
    dequantise,
    quantise_rows,
)
from .adapters import DEFAULT_TARGETS

logger = logging.getLogger(__name__)

BasePrecision = Literal["bf16", "fp32", "fp8", "int8", "stored"]
BASE_PRECISIONS: tuple[BasePrecision, ...] = ("bf16", "fp32", "fp8", "int8", "stored")


def load_base(path: Path | str, *, precision: BasePrecision = "bf16", device: torch.device | str = "cpu") -> DiT:
    """The transformer of a file or folder, frozen and ready to train adapters on.

    Args:
        path: as `read_component` takes it.
        precision: "bf16" and "fp32" multiply 8-bit files out; "fp8" (e4m3) and "int8" quantise the blocks' matrices by
            row, unless the file has them in 8 bits already: those stay as they are; "stored" = 8-bit matrices stay,
            the rest is bf16 (fp32 where the file is).
        device: of the weights. Layers are moved one by one, so no second copy of the model exists.

    Raises:
        ErnieError: an unknown precision.
        CheckpointError: the file is no ERNIE-Image transformer, is quantised in a way that is not read, or one of its
            layers cannot be quantised (which one, and why).
    """
    if precision not in BASE_PRECISIONS:
        raise ErnieError(f"precision must be one of {', '.join(BASE_PRECISIONS)}; got {precision!r}.")
    # Weights made in inference mode, as a host may run us, could never be saved for backward.
    with torch.inference_mode(False), torch.no_grad():
        component = read_component(path, "transformer")
        if precision in ("bf16", "fp32"):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            model = build_transformer(component, dtype=dtype, device=device)
        else:
            model = _build_8_bit(component, precision, device)
        return model.eval().requires_grad_(False)


def _build_8_bit(component: Component, precision: BasePrecision, device: torch.device | str) -> DiT:
    quantisation = component.quantisation or {}
    check_readable(quantisation)
    stored = component.state_dict
    fp32 = precision == "stored" and all(t.dtype is torch.float32 for t in stored.values())
    dtype = torch.float32 if fp32 else torch.bfloat16
    model = DiT(DiTConfig.from_dict(component.config), dtype=dtype, device="meta")
    rest: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        module = model.get_submodule(layer)
        inside = leaf == "weight" and any(fnmatchcase(layer, target) for target in DEFAULT_TARGETS)
        how = quantisation.get(layer)
        if inside and isinstance(module, nn.Linear) and (precision != "stored" or tensor.element_size() == 1):
            parent, _, child = layer.rpartition(".")
            weight, scale = _quantised(layer, tensor, how, precision, device)
            # No matrix of a block has a bias.
            setattr(model.get_submodule(parent), child, QuantisedLinear(weight, scale))
        else:
            plain = dequantise({name: tensor}, {layer: how}, dtype)[name] if how and leaf == "weight" else tensor
            rest[name] = plain.to(device=device, dtype=dtype)
    _, unexpected = model.load_state_dict(rest, strict=False, assign=True)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unexpected or left:
        raise CheckpointError(
            f"{component.source} does not fit: {len(left)} tensors missing ({', '.join(left[:5]) or 'none'}), "
            f"{len(unexpected)} extra ({', '.join(unexpected[:5]) or 'none'})."
        )
    kept = {m.weight.dtype for m in model.modules() if isinstance(m, QuantisedLinear)}
    if precision != "stored" and any((dtype is torch.int8) != (precision == "int8") for dtype in kept):
        logger.warning("%s holds %s weights and keeps them; %s was asked for", component.source, kept, precision)
    return model


def _quantised(
    layer: str,
    weight: Tensor,
    how: LayerQuantisation | None,
    precision: BasePrecision,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """(8-bit weight, scale) on `device`: as the file has them, or made from a plain weight."""
    try:
        if weight.element_size() > 1:
            assert precision in ("fp8", "int8"), precision
            weight, scale = quantise_rows(weight, precision)
        else:
            scale = None if how is None else how.tensors.get("weight_scale")
            if scale is None and weight.dtype not in FP8_DTYPES.values():
                raise CheckpointError(f"the weight is {weight.dtype} without a scale; the file is incomplete.")
            scale = torch.ones(()) if scale is None else scale  # fp8 files by plain casting have none
            if precision != "stored" and (weight.dtype is torch.int8) != (precision == "int8"):
                logger.warning(
                    "%s is stored as %s and stays so; precision %s was asked", layer, weight.dtype, precision
                )
        return weight.to(device), scale.to(device)
    except CheckpointError as e:
        raise CheckpointError(f"the layer {layer} cannot be kept in 8 bits: {e}") from e
