"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

# name on the command line -> module; `all` runs them in this order
BENCHMARKS = {
    "traffic": "traffic",
    "import": "import_time",
    "dit": "dit",
    "cfg": "cfg",
    "vae": "vae",
    "gpu": "gpu",
    "train": "train_step",
    "enhancer": "enhancer",
    "scoring": "scoring",
    "tournament": "tournament",
    "ingest": "ingest",
    "labelling": "labelling",
}

# Trained and judged on the tiny model: minutes each, so `all` leaves them out and `lessons` runs them; TRAINING.md.
LESSONS = {
    "lora": "lora_learns",
    "dpo": "dpo_prefers",
    "edit": "edit_words",
    "options": "regions_styles_depth",
    "experts": "band_experts",
    "guidance": "guidance_helps",
    "inpaint": "inpaint_fits",
    "negative": "negative_helps",
    "variety": "variety_helps",
    "samplers": "samplers_pay",
    "calibrate": "calibrate_cache",
    "cache": "cache_saves",
    "loop": "preference_loop",
    "categories": "prompt_categories",
    "draws": "drawing",
    "tail": "long_tail",
    "distil": "distil_students",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks and print one table; 0 unless one could not run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        choices=[*BENCHMARKS, "all", *LESSONS, "lessons"],
        metavar="NAME",
        help=f"{'|'.join(BENCHMARKS)}, all of these; or, minutes each: {'|'.join(LESSONS)}, all of these: lessons",
    )
    parser.add_argument(
        "--model", type=Path, help="official folder to calibrate the step cache on; read by calibrate, given alone"
    )
    asked = parser.parse_args(arguments)
    names = asked.names
    if asked.model is not None and names != ["calibrate"]:
        parser.error("--model is read by calibrate alone: python -m bench calibrate --model FOLDER")
    if "all" in names:
        names = list(BENCHMARKS)
    if "lessons" in names:
        names = list(LESSONS)

    import torch

    from .compare import heading_lines, table_line

    # Several threads on a shared machine measure the neighbours.
    torch.set_num_threads(1)
    for line in heading_lines():
        print(line)
    for name in names:
        options = {} if asked.model is None else {"folder": asked.model}
        for row in importlib.import_module(f".{(BENCHMARKS | LESSONS)[name]}", __package__).measure(**options):
            print(table_line(row.cells()), flush=True)
    return 0
