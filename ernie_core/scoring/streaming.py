"""Scorers on cards smaller than their weights, without a host that manages memory: one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..training.blocks import BlockStream


def stacked_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of all stacks (ModuleLists that lie in no other), in the order in which they were built."""
    stacks = [name for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    return [layer for name in outer for layer in network.get_submodule(name).children()]


def stream_layers(network: nn.Module, device: torch.device | str) -> BlockStream:
    """Keep the layers' weights in RAM from now on; each is on `device` while it runs, the next one on its way.

    All else of the network moves to `device` for good. The network must be frozen and is called as before; its layers
    must run in the order of `stacked_layers`, or it takes longer.
    """
    layers = stacked_layers(network)
    stream = BlockStream(network, device, layers)

    def streamed(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with stream.block(index, then=stream.following(index, (), trains=False, backward=False)):
                return forward(*args, **kwargs)

        return run

    for index, layer in enumerate(layers):
        layer.forward = streamed(index, layer.forward)
    return stream
