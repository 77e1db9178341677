"""What importing the pack costs a host that starts: seconds and modules, each time in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from .compare import Row

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("diffusers", "transformers", "xformers", "flash_attn", "flash_attn_interface", "sageattention", "accelerate")
LIMIT_S = 0.3
RUNS = 7

# Runs in the fresh interpreter: the pack is imported; then, with torch and a node vocabulary there as they are in
# ComfyUI (a second load of the pack lends its own), the entry point is asked for its nodes.
PROGRAM = """
import asyncio, importlib, importlib.util, json, sys, time
root = sys.argv[1]
def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
before = set(sys.modules)
start = time.perf_counter()
pack = load("pack", root)
alone = time.perf_counter() - start, sorted(set(sys.modules) - before)
import torch
if importlib.util.find_spec("comfy_api") is None:
    load("stand_in", root)
    importlib.import_module("stand_in.standalone.comfy_api").install()
before = set(sys.modules)
start = time.perf_counter()
async def ask():
    return await (await pack.comfy_entrypoint()).get_node_list()
nodes = asyncio.run(ask())
asked = time.perf_counter() - start, sorted(set(sys.modules) - before)
print(json.dumps({"alone": alone, "asked": asked, "nodes": len(nodes)}))
"""


def import_once() -> dict:
    """Seconds and new modules of the import alone, and of the entry point's answer."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the pack did not import:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def heavy_modules(modules: list[str], also: tuple[str, ...] = ()) -> list[str]:
    return sorted({m.split(".")[0] for m in modules} & {*HEAVY, *also})


def measure() -> list[Row]:
    runs = [import_once() for _ in range(RUNS)]
    rows = []
    for key, name, also in (
        ("alone", "import of the pack", ("torch", "numpy", "PIL", "safetensors", "einops")),
        ("asked", f"import and registration of its {runs[0]['nodes']} nodes, after torch", ()),
    ):
        seconds = median(run[key][0] for run in runs)
        modules = runs[0][key][1]
        heavy = heavy_modules(modules, also)
        rows.append(
            Row(
                name=name,
                ours=f"{1000 * seconds:.3g} ms, {len(modules)} modules, heavy: {', '.join(heavy) or 'none'}",
                target=f"<= {LIMIT_S} s, no heavy module",
                met=seconds <= LIMIT_S and not heavy,
            )
        )
    return rows
