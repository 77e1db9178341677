"""Imports `nodes/host/`, ComfyUI's side of the port, where the standalone host stands under its name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "nodes" / "host"
NAME = "ernie_pack.nodes.comfyui_host"


def load_port() -> ModuleType:
    """The package, loaded once; its modules are attributes (`port.sampling`)."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]
