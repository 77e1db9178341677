"""Stands in for `comfy_api.latest` where ComfyUI is absent: the V3 node vocabulary as of ComfyUI 0.12.1.

Written from the observed public behaviour, for the parts a node needs to describe itself and to run. An argument that
0.12.1 does not know is a TypeError here too, so a node that loads here loads there.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import ModuleType

from . import _io as io
from . import _ui as ui

IO, UI = io, ui


class ComfyExtension(ABC):
    """What an entry point returns: the list of a pack's nodes."""

    async def on_load(self) -> None:  # noqa: B027 - overriding it is allowed, not asked for
        """Never called here, as on ComfyUI 0.12.1."""

    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""


def install() -> None:
    """Make `from comfy_api.latest import io, ui, ComfyExtension` find this package."""
    parent = ModuleType("comfy_api", "Stand-in for ComfyUI's versioned API.")
    parent.__path__ = []
    latest = sys.modules[__name__]
    parent.latest = latest
    sys.modules["comfy_api"] = parent
    sys.modules["comfy_api.latest"] = latest


__all__ = ["IO", "UI", "ComfyExtension", "io", "ui"]
