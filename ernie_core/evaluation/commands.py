"""`python -m ernie_core.cli evaluate ...`: prompt sets, reports and distances without a graph.

A command is a function that adds its arguments and sets `run`, which does the work and yields lines for people.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CACHE = ".features.sqlite"


OpenScorer = Callable[[str, str | None], Any]


def add_commands(parser: argparse.ArgumentParser, open_scorer: OpenScorer) -> None:
    """Add the commands; each sets `run(args) -> lines to print`. `open_scorer`: (name, device) -> Scorer."""
    kinds = parser.add_subparsers(dest="kind", required=True)
    prompts = kinds.add_parser("prompts", help="what a prompt set holds and which column was taken for what")
    prompts.add_argument("file", type=Path, help=".csv, .tsv, .txt, .json or .jsonl; ViLG-300, DrawBench, ...")
    prompts.add_argument("--prompt-column", default="")
    prompts.add_argument("--category-column", default="")
    prompts.set_defaults(run=_prompts)
    report = kinds.add_parser("report", help="pass rates and wins by category, of one setting or two")
    report.add_argument("folders", nargs="*", type=Path, help="one or two folders of Prompt Set, for --scorer")
    report.add_argument("--scorer", action="append", default=[], help="as for benchmark; may be given several times")
    report.add_argument("--threshold", type=float, default=50.0, help="least score that passes (default: 50)")
    report.add_argument("--margin", type=float, default=0.0, help="scores this close are no difference (default: 0)")
    report.add_argument("--store", type=Path, help="verdicts.sqlite of the page, for --name")
    report.add_argument("--name", default="", help="name of an evaluation by people; every annotator counts")
    report.add_argument("--verdicts", action="append", type=Path, default=[], help="a verdicts.csv of another judge")
    report.add_argument("--out", type=Path, required=True, help="folder for the report")
    _add_machine(report, batch=8)
    report.set_defaults(run=functools.partial(_report, open_scorer=open_scorer))
    distance = kinds.add_parser("distance", help="FID and CMMD between two folders of pictures")
    distance.add_argument("first", type=Path)
    distance.add_argument("second", type=Path)
    distance.add_argument("--model", type=Path, required=True, help="folder of a vision model, or a CLIP's file")
    distance.add_argument("--out", type=Path, help="the .json to write; its folder keeps the features")
    _add_machine(distance, batch=16)
    distance.set_defaults(run=_distance)


def _add_machine(command: argparse.ArgumentParser, *, batch: int) -> None:
    command.add_argument("--batch", type=int, default=batch, help=f"pictures at once (default: {batch})")
    command.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    from .prompt_sets import read_prompt_set

    found = read_prompt_set(args.file, columns={"prompt": args.prompt_column, "category": args.category_column})
    yield found.report()


def _report(args: argparse.Namespace, *, open_scorer: OpenScorer) -> Iterator[str]:
    from ..errors import ErnieError
    from . import verdict_store
    from .prompt_sets import read_setting
    from .report import make_report, read_verdicts, write_report
    from .verdicts import Verdicts, join, judge_by_scorer

    if bool(args.name) != bool(args.store):
        raise ErnieError("--name and --store belong together: the name of an evaluation and the file that holds it.")
    if bool(args.scorer) != bool(args.folders) or len(args.folders) > 2:
        raise ErnieError("--scorer needs one folder of Prompt Set or two, and folders need a --scorer.")
    parts: list[Verdicts] = []
    settings = [read_setting(folder) for folder in args.folders]
    for name in args.scorer:
        scorer = open_scorer(name, args.device)
        told = {"threshold": args.threshold, "margin": args.margin, "batch_size": args.batch}
        yield f"{scorer.name}: {sum(len(s.pictures) for s in settings)} pictures"
        parts.append(judge_by_scorer(settings, scorer, **told))
    if args.store is not None:
        if not args.store.is_file():
            raise ErnieError(f"there is no {args.store}; the page keeps it as verdicts.sqlite in its user folder.")
        with verdict_store.open_store(args.store) as store:
            ids = verdict_store.annotators(store, args.name)
            if not ids:
                raise ErnieError(f"{args.store} has no evaluation {args.name!r}.")
            parts += [verdict_store.read_verdicts(store, id_) for id_ in ids.values()]
            parts.append(Verdicts(notes=tuple(verdict_store.agreement(store, args.name))))
    parts += [read_verdicts(path) for path in args.verdicts]
    found = make_report(args.out.name, join(parts))
    write_report(found, args.out)
    yield found.to_markdown()
    yield f"Written to {args.out}"


def _distance(args: argparse.Namespace) -> Iterator[str]:
    import torch

    from ..training.items import write_whole
    from .features import load_feature_model, measure_folders

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def place(network: torch.nn.Module) -> Callable[[], torch.device]:
        network.to(device)
        return lambda: device

    model = load_feature_model(args.model, place=place)
    cache = None if args.out is None else args.out.parent / CACHE
    found = measure_folders(args.first, args.second, model, cache=cache, batch_size=args.batch)
    if args.out is not None:
        write_whole(args.out, found.to_json().encode())
    yield found.report()
