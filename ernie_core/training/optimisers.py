"""Optimisers by name, the learning rate as a function of the step, and optimiser states that need no pickle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ErnieError
from .recipe import OptimiserConfig


def lr_at(config: OptimiserConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) of `steps`: linear warm-up, then the schedule down to the floor.

    A function of its arguments only, so that a resumed run has nothing to replay.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.floor + (1 - config.floor) * share)


def make_optimiser(parameters: Iterable[nn.Parameter], config: OptimiserConfig) -> torch.optim.Optimizer:
    """The optimiser over `parameters`.

    Raises:
        ErnieError: its package is not installed, or it cannot run on the device of the parameters.
    """
    weights = list(parameters)
    device = weights[0].device.type
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(weights, betas=config.betas, eps=config.eps, fused=True, **common)
    if config.name == "adafactor":
        return torch.optim.Adafactor(weights, **common)
    if config.name == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as e:
            raise ErnieError("optimiser prodigy needs the package prodigyopt; install it or choose adamw.") from e
        return Prodigy(
            weights, betas=config.betas, eps=config.eps, use_bias_correction=True, safeguard_warmup=True, **common
        )
    if device == "cpu":
        raise ErnieError("optimiser adamw8bit runs on a GPU only; choose adamw.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as e:
        raise ErnieError("optimiser adamw8bit needs the package bitsandbytes; install it or choose adamw.") from e
    return AdamW8bit(weights, betas=config.betas, eps=config.eps, **common)


def pack_state(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain values) of the optimiser's state, for a safetensors and a JSON file; `unpack_state` undoes it."""
    state = optimiser.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"state": {}, "groups": []}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values["state"].setdefault(str(index), {})[name] = _plain(value)
    for group in state["param_groups"]:
        values["groups"].append({k: _plain(v) for k, v in group.items() if k != "params"})
    return tensors, values


def unpack_state(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put a state from `pack_state` back, bit by bit.

    Raises:
        ErnieError: the state is of another optimiser or another number of parameters.
    """
    current = optimiser.state_dict()
    if len(values["groups"]) != len(current["param_groups"]):
        raise ErnieError("the saved optimiser state has other parameter groups than this optimiser: start a new job.")
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    for index, entries in values["state"].items():
        state.setdefault(int(index), {}).update(entries)
    count = sum(len(group["params"]) for group in current["param_groups"])
    if state and max(state) >= count:
        raise ErnieError(f"the saved optimiser state has {max(state) + 1} parameters, the adapter {count}.")
    groups = [
        {**saved, "params": group["params"]}
        for saved, group in zip(values["groups"], current["param_groups"], strict=True)
    ]
    for saved, group in zip(groups, current["param_groups"], strict=True):
        for key, value in group.items():  # JSON knows no tuples
            if isinstance(value, tuple):
                saved[key] = tuple(saved[key])
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if hasattr(value, "item"):  # numpy scalars
        return value.item()
    return list(value) if isinstance(value, tuple) else value
