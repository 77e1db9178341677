"""The processes that train together, and sums over them."""

from __future__ import annotations

import datetime
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """End the group; nothing can be summed afterwards."""
        if self.size > 1:
            torch.distributed.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def join_world(device: str | None = None) -> World:
    """This process's place among those that a launcher started (its environment variables), or alone."""
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available() and device != "cpu"
    place = torch.device(device or (f"cuda:{local}" if cuda else "cpu"))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not torch.distributed.is_initialized():
        # Caching and samples are made by one process while the others wait: hours, not the default minutes.
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12))
    return World(rank=rank, size=size, device=place)


class Sums:
    """Metric sums and counts of one step; kept on the device until the step ends."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values_B: Tensor) -> None:
        self.values[name].append(values_B.detach().float().flatten())

    def take(self, other: Sums) -> None:
        """Add what another one has seen."""
        for name, parts in other.values.items():
            self.values[name] += parts

    def means(self, world: World, names: Sequence[str]) -> dict[str, float]:
        """Means over all samples of all processes, for `names` that any process has seen."""
        flat = torch.zeros(len(names), 2, dtype=torch.float64)
        for row, name in zip(flat, names, strict=True):
            for part in self.values.get(name, ()):
                row[0] += part.sum().double().cpu()
                row[1] += part.numel()
        flat = world.sum(flat.to(world.device) if world.device.type == "cuda" else flat).cpu()
        return {n: float(s / c) for n, (s, c) in zip(names, flat.tolist(), strict=True) if c}
