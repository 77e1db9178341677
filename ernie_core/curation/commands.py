"""`python -m ernie_core.cli curate STAGE SOURCE TARGET ...`: one command per stage.

A command is a function that adds its arguments and sets `run`, which does the work and yields lines for people.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from ..errors import ErnieError
from . import label_commands
from .engines import Engine
from .filters import Filters, filter_rows
from .ingest import ingest
from .sampling import PRESETS, Quality, Sampling, Scale, Within


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command per stage; each sets `run(args) -> lines to print`."""
    stages = parser.add_subparsers(dest="stage", required=True)
    for add in (_add_ingest, _add_filter, _add_labelling, _add_report, _add_plan, _add_export):
        add(stages)


def add_files(command: argparse.ArgumentParser) -> None:
    """SOURCE and TARGET of a stage that goes from manifest to manifest."""
    command.add_argument("source", type=Path, help="manifest (.jsonl or .parquet)")
    command.add_argument("target", type=Path, help="manifest to write")


def add_engine(command: argparse.ArgumentParser) -> None:
    """--engine, --address, --workers: what `engine_settings` reads."""
    command.add_argument(
        "--engine", choices=get_args(Engine), default="here", help="this process, worker processes, or Ray Data"
    )
    command.add_argument("--address", default="", help="of a Ray cluster (default: one is started here)")
    command.add_argument("--workers", type=int, default=0, help="processes (default: one per CPU)")


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `run_stage` from the command line, with progress on standard error."""
    return {"engine": args.engine, "address": args.address, "workers": args.workers, "on_progress": show_progress}


def show_progress(done: int, total: int, what: str) -> None:
    """One line that is written over itself, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{what}: {done} of {total}" + ("\n" if done == total else ""))
        sys.stderr.flush()


# --- ingest and filter ------------------------------------------------------------------------------------------


def _add_ingest(stages: Any) -> None:
    command = stages.add_parser("ingest", help="decode, measure and hash every picture of folders, shards or tables")
    command.add_argument("source", type=Path, nargs="+", help="folders, .tar shards, tables, other trainers' files")
    command.add_argument("target", type=Path, help="manifest to write (.jsonl or .parquet)")
    add_engine(command)
    command.set_defaults(run=_ingest)


def _ingest(args: argparse.Namespace) -> Iterator[str]:
    yield str(ingest(args.source, args.target, **engine_settings(args)))


def _add_filter(stages: Any) -> None:
    command = stages.add_parser("filter", help="take out what is too small, too long, or there twice")
    add_files(command)
    command.add_argument("--min-side", type=int, default=0, metavar="PX", help="of the shorter side")
    command.add_argument("--max-side", type=int, default=0, metavar="PX", help="of the longer side")
    command.add_argument("--min-pixels", type=int, default=0, help="width times height")
    command.add_argument("--max-aspect", type=float, default=0.0, help="longest side ratio")
    command.add_argument("--duplicates", action="store_true", help="keep files with the same bytes once")
    command.add_argument(
        "--near-bits", type=int, default=-1, help="keep pictures once whose hashes differ in no more of 128 bits (6)"
    )
    command.set_defaults(run=_filter)


def _filter(args: argparse.Namespace) -> Iterator[str]:
    filters = Filters(
        min_side=args.min_side,
        max_side=args.max_side,
        min_pixels=args.min_pixels,
        max_aspect=args.max_aspect,
        exact=args.duplicates,
        near_bits=args.near_bits,
    )
    yield str(filter_rows(args.source, args.target, filters, on_progress=show_progress))


# --- labelling ----------------------------------------------------------------------------------------------------


def _add_labelling(stages: Any) -> None:
    for name in ("categories", "captions", "styles", "scores"):
        getattr(label_commands, f"add_{name}")(stages, add_files, add_engine)
        stages.choices[name].set_defaults(run=_label)


def _label(args: argparse.Namespace) -> Iterator[str]:
    return getattr(label_commands, args.stage)(args, engine_settings(args))


# --- report and export --------------------------------------------------------------------------------------------


def _add_report(stages: Any) -> None:
    command = stages.add_parser(
        "report", help="counts per stage, failures by row, what filters took out, a contact sheet"
    )
    command.add_argument("source", type=Path, help="manifest (.jsonl or .parquet)")
    command.add_argument("--out", type=Path, help="folder for report.md, problems.jsonl, kept.png and dropped.png")
    command.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> Iterator[str]:
    from .report import look_over, write_report

    found = look_over(args.source, on_progress=show_progress)
    if args.out is not None:
        write_report(found, args.out)
    yield found.text


def _add_export(stages: Any) -> None:
    command = stages.add_parser("export", help="what was kept, as a folder to train on, WebDataset shards, or a table")
    command.add_argument("source", type=Path, help="manifest (.jsonl or .parquet)")
    command.add_argument("target", type=Path, help="folder; of a table, the .parquet or .jsonl file")
    command.add_argument("--format", choices=("folder", "shards", "table"), default="folder")
    command.add_argument("--styles", nargs="*", default=[], help="caption styles to write (default: all)")
    command.add_argument("--shard-mb", type=int, default=1024, help="largest size of a shard, in MB of 1048576 bytes")
    command.add_argument("--name", default="pictures", help="what shards are called: NAME-000000.tar")
    command.add_argument("--link", action="store_true", help="hard links in place of copies, in a folder")
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> Iterator[str]:
    from . import export

    if args.format == "folder":
        found = export.export_folder(
            args.source, args.target, styles=args.styles, link=args.link, on_progress=show_progress
        )
    elif args.format == "shards":
        found = export.export_shards(
            args.source,
            args.target,
            name=args.name,
            shard_bytes=args.shard_mb << 20,
            styles=args.styles,
            on_progress=show_progress,
        )
    else:
        found = export.export_table(args.source, args.target, styles=args.styles)
    yield str(found)


# --- plan -------------------------------------------------------------------------------------------------------


def _add_plan(stages: Any) -> None:
    command = stages.add_parser("plan", help="how often each category and picture is drawn, and the dataset for that")
    command.add_argument("source", type=Path, help="manifest (.jsonl or .parquet) with categories and scores")
    command.add_argument(
        "target", type=Path, nargs="?", help="dataset to write (.jsonl), for [data] path of a job.toml; default: none"
    )
    command.add_argument("--picture", type=Path, help="PNG of the mix to write")
    command.add_argument("--preset", choices=PRESETS, help="instead of the settings below")
    default = Sampling()
    for name, what in (
        ("alpha", "exponent of a category's size; 1 = by size, 0 = all alike"),
        ("gamma", "exponent of a category's quality; 0 = quality does not count"),
        ("temperature", "of the draw inside a category; 0 = only the best, inf = all alike"),
    ):
        command.add_argument(f"--{name}", type=float, help=f"{what} (default: {getattr(default, name):g})")
    for name, choices in (("quality", Quality), ("scale", Scale), ("within", Within)):
        command.add_argument(f"--{name}", choices=get_args(choices), help=f"(default: {getattr(default, name)})")
    command.add_argument("--depth", type=int, default=0, help="parts of a category's path that count (default: all)")
    command.add_argument("--styles", default="", help="how often each kind of caption, such as 'keyword 1, detailed 3'")
    command.add_argument("--dropout", type=float, default=0.0, help="share of steps that see the empty prompt")
    command.add_argument("--trigger", default="", help="word that calls the concept")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> Iterator[str]:
    from PIL import Image

    from ..training.captions import CaptionRules, read_styles
    from ..training.items import DatasetOptions, write_manifest
    from .dataset import read_planned
    from .draws import open_pool
    from .manifest import replacing
    from .mix import draw_mix, plan_mix

    names = ("alpha", "gamma", "temperature", "quality", "scale", "within")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.preset and given:
        raise ErnieError(f"--preset {args.preset!r} says all of it; leave {', '.join(f'--{n}' for n in given)} out.")
    sampling = PRESETS[args.preset] if args.preset else Sampling(**given)
    written: list[str] = []
    if args.target is None:
        pool = open_pool(args.source, depth=args.depth, on_progress=show_progress)
        if args.styles or args.dropout or args.trigger:
            raise ErnieError("--styles, --dropout and --trigger belong to a dataset: name a TARGET to write it to.")
    else:
        rules = CaptionRules(trigger=args.trigger or None, dropout=args.dropout or None)
        options = DatasetOptions(rules=rules, styles=read_styles(args.styles))
        dataset, pool = read_planned(args.source, sampling, options, depth=args.depth, on_progress=show_progress)
        write_manifest(dataset, args.target)
        written = [f"{args.target}: {dataset.report()}"]
    mix = plan_mix(pool, sampling)
    yield mix.report()
    if args.picture:
        with replacing(args.picture) as file:
            Image.fromarray(draw_mix(mix)).save(file, "PNG")
    yield from written
