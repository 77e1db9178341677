"""Runs the pack's nodes and workflow files without ComfyUI: `python -m standalone WORKFLOW`.

`load_pack` brings the repository up as one package, gives it the node vocabulary (`comfy_api.latest`) where ComfyUI is
absent, and puts `standalone.host` in the place of `nodes.host`. Nothing else here is imported until it is called.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parents[1]
PACK_NAME = "ernie_pack"


def load_pack() -> ModuleType:
    """Return the pack, loaded once under the name `ernie_pack`, with the standalone host in place of ComfyUI's."""
    pack = sys.modules.get(PACK_NAME)
    if pack is None:
        spec = importlib.util.spec_from_file_location(
            PACK_NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        pack = importlib.util.module_from_spec(spec)
        sys.modules[PACK_NAME] = pack
        spec.loader.exec_module(pack)
    if "comfy_api" not in sys.modules and importlib.util.find_spec("comfy_api") is None:
        importlib.import_module(f"{PACK_NAME}.standalone.comfy_api").install()
    host = importlib.import_module(f"{PACK_NAME}.standalone.host")
    sys.modules[f"{PACK_NAME}.nodes.host"] = host
    if (nodes := sys.modules.get(f"{PACK_NAME}.nodes")) is not None:
        nodes.host = host
    return pack


def load_node_classes() -> dict[str, type]:
    """Return every node class by its id: the pack's own and the core nodes that standalone offers."""
    load_pack()
    core = importlib.import_module(f"{PACK_NAME}.standalone.core_nodes")
    extension = importlib.import_module(f"{PACK_NAME}.nodes").ErnieExtension()
    own = run_coroutine(extension.get_node_list())
    return {cls.GET_SCHEMA().node_id: cls for cls in (*core.NODES, *own)}


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return what a coroutine gives, also where a loop runs in this thread already: notebooks, browser drivers."""
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, coroutine).result()
