"""What one update changes: an adapter, what is trained along with it, and the optimiser they share."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .optimisers import lr_at, make_optimiser, pack_state, unpack_state
from .recipe import OptimiserConfig
from .world import World


class Learner:
    """An adapter in training.

    Args:
        adapter: its trainable weights.
        config: of its optimiser, its learning rate and its running average.
        steps: of the whole run, for the schedule.
        head: a further module that the same optimiser trains; it is saved to be resumed and never exported.
    """

    def __init__(self, adapter: Adapter, config: OptimiserConfig, *, steps: int, head: nn.Module | None = None):
        self.adapter, self.config, self.steps, self.head = adapter, config, steps, head
        self.average = copy.deepcopy(adapter).requires_grad_(False) if config.ema else None
        modules = [adapter] if head is None else [adapter, head]
        self.weights = [w for module in modules for w in module.parameters() if w.requires_grad]
        self.optimiser = make_optimiser(self.weights, config)

    @property
    def result(self) -> Adapter:
        """What a run is for: the running average where there is one."""
        return self.average or self.adapter

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    def sum_gradients(self, world: World) -> None:
        """Sum the gradients over the processes; one that had no sample in this step adds zeros."""
        if world.size == 1:
            return
        flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in self.weights])
        world.sum(flat)
        for w, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
            w.grad = part.view_as(w)

    def clip(self) -> float:
        """The gradient's norm, before it is cut to the limit."""
        return float(nn.utils.clip_grad_norm_(self.weights, self.config.clip or math.inf))

    def rate_at(self, step: int) -> float:
        return lr_at(self.config, step, self.steps)

    def update(self, step: int) -> None:
        """Apply the gradients with the learning rate of `step`."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_at(step)
        self.optimiser.step()
        if self.average is not None:
            trained = (w for w in self.adapter.parameters() if w.requires_grad)
            with torch.no_grad():
                for average, weight in zip(self.average.parameters(), trained, strict=True):
                    average.lerp_(weight, 1 - self.config.ema)

    # --- checkpoints ---

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) to go on from; `unpack` undoes it."""
        state, values = pack_state(self.optimiser)
        tensors = {f"optimiser.{name}": w for name, w in state.items()}
        for part, module in self._modules().items():
            tensors |= {f"{part}.{name}": w for name, w in module.state_dict().items()}
        return tensors, values

    def unpack(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Put back what `pack` gave, bit by bit."""
        for part, module in self._modules().items():
            module.load_state_dict(part_of(tensors, part))
        unpack_state(self.optimiser, part_of(tensors, "optimiser"), values)

    def _modules(self) -> dict[str, nn.Module]:
        named = {"adapter": self.adapter, "average": self.average, "head": self.head}
        return {name: module for name, module in named.items() if module is not None}


def part_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries below `name`, without it."""
    return {key.removeprefix(f"{name}."): w for key, w in tensors.items() if key.startswith(f"{name}.")}
