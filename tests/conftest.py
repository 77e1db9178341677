"""Load the pack once, under one name, as the host does; the repo root never joins sys.path."""

import importlib.util
import os
import sys
from pathlib import Path

# One thread: matrix products are split by the load of the machine otherwise, and equal sums are no longer equal bits.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location(
    "ernie_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
sys.modules["ernie_pack"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["ernie_pack"])
