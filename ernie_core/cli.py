"""Command line: `python -m ernie_core.cli COMMAND`, run from the pack's folder.

train     train a job: a job folder, or a job.toml that one is made from
status    where a job stands
stop      ask a running job to save and end
report    numbers, loss curves and samples of a job, as files
preflight what the data looks like and what the run will cost, before it starts
lora      inspect, convert, resize, extract, merge LoRA files
adviser   which files to load on this machine, why, and what they will take
curate    from a pile of pictures to a training set: ingest, filter, label, score, mix, export
evaluate  prompt sets with categories: what they hold, verdicts as rates with intervals, FID and CMMD of two folders
benchmark scorers against people (aesthetic); LongText-Bench and GenEval from OCR text and detections
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ErnieError, Interrupted

JOBS_FOLDER = Path("jobs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 refused or failed, 2 usage, 3 stopped on request (saved)."""
    parser = argparse.ArgumentParser(
        prog="python -m ernie_core.cli", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a job folder or a job.toml")
    train.add_argument("job", type=Path, help="job folder, or a recipe in TOML with [data]")
    train.add_argument("--folder", type=Path, help=f"where the job of a .toml goes (default: {JOBS_FOLDER}/NAME)")
    train.add_argument("--until", type=int, metavar="STEP", help="stop (saved) at this step")
    train.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    train.add_argument("--start-over", action="store_true", help="delete the job's checkpoints first")
    for name, what in (("status", "where a job stands"), ("stop", "ask a running job to save and end")):
        commands.add_parser(name, help=what).add_argument("job", type=Path)
    report = commands.add_parser("report", help="write report.md, curves.png and samples.png")
    report.add_argument("job", type=Path)
    report.add_argument("--out", type=Path, help="folder (default: the job folder)")
    preflight = commands.add_parser("preflight", help="look at the data of a job.toml and measure three steps")
    preflight.add_argument("job", type=Path)
    preflight.add_argument("--out", type=Path, help="folder for the pictures (default: none are written)")
    preflight.add_argument("--no-probe", action="store_true", help="do not load the model to measure steps")
    preflight.add_argument("--device")
    adviser = commands.add_parser("adviser", help="which files to load on this machine, why, and what they will take")
    adviser.add_argument("models", type=Path, nargs="*", help="files, official folders, or folders with files")
    adviser.add_argument("--width", type=int, default=1024)
    adviser.add_argument("--height", type=int, default=1024)
    adviser.add_argument("--text-tokens", type=int, default=256, help="length of the prompt (default: 256)")
    adviser.add_argument("--card", help="ask about another card: 'RTX 3060 12 GB', ...; any other name lists them")
    _add_lora_commands(commands)
    _add_benchmark_commands(commands)
    _add_curate_commands(commands)
    _add_evaluate_commands(commands)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return _COMMANDS[args.command](args)
    except Interrupted as e:
        print(f"stopped: {e}")
        return 3
    except ErnieError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def _train(args: argparse.Namespace) -> int:
    from .training.job import create_job, read_job_file
    from .training.recipe import parse_toml
    from .training.state import Job
    from .training.trainer import train
    from .training.world import join_world

    world = join_world(args.device)
    job = Job(args.job)
    if args.job.is_file():
        name = str(parse_toml(args.job.read_text(encoding="utf-8-sig"), args.job).get("name", "unnamed"))
        job = Job(args.folder or JOBS_FOLDER / name)
    if world.leads:  # the others wait: one process writes the job
        if args.job.is_file():
            recipe, data = read_job_file(args.job)
            print(data.report())
            create_job(job.folder, recipe, data, start_over=args.start_over)
        elif args.start_over:
            job.start_over()
    world.barrier()
    path = train(job, until=args.until, device=args.device, on_event=_print_event)
    if world.leads:
        print(f"LoRA: {path}")
    world.leave()
    return 0


_SHORT = {"grad_norm": "|g|", "grad_norm_fake": "|g|_fake"}


def _print_event(event: Mapping[str, Any]) -> None:
    if event["event"] == "step":
        # A distillation's fake score has numbers of its own, and some steps have no others.
        parts = [f"{_SHORT.get(k, k)} {v:.4g}" for k, v in event.items() if k.startswith(("loss", "lr", "grad_norm"))]
        print(f"step {event['step']}  {'  '.join(parts)}  {event['seconds']:.2f} s", flush=True)
    else:
        print(event.get("message") or event["event"], flush=True)


def _status(args: argparse.Namespace) -> int:
    from .training.job import format_seconds, status
    from .training.state import Job

    now = status(Job(args.job))
    left = f", {format_seconds(now.seconds_left)} left" if now.state == "running" and now.seconds_left else ""
    loss = "" if now.loss is None else f", loss {now.loss:.4f}"
    print(f"{now.state}: step {now.step} of {now.steps}{loss}{left}")
    for line in filter(None, (now.message, *now.alarms)):
        print(line)
    return 0


def _stop(args: argparse.Namespace) -> int:
    from .training.state import Job

    job = Job(args.job)
    if not job.is_running():
        raise ErnieError(f"no process is training in {args.job}.")
    job.request_stop()
    print("asked to stop: it saves after the step it is at.")
    return 0


def _report(args: argparse.Namespace) -> int:
    from PIL import Image

    from .training.job import report
    from .training.state import Job, write_text

    found = report(Job(args.job))
    folder = args.out or args.job
    write_text(folder / "report.md", found.text + "\n")
    Image.fromarray(found.curves).save(folder / "curves.png")
    if found.samples is not None:
        Image.fromarray(found.samples).save(folder / "samples.png")
    print(found.text)
    return 0


def _preflight(args: argparse.Namespace) -> int:
    from PIL import Image

    from .training.job import read_job_file
    from .training.preflight import check
    from .training.probe import probe

    recipe, data = read_job_file(args.job)
    found = check(data, recipe, probe=None if args.no_probe else lambda size: probe(recipe, size, device=args.device))
    print(found.text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, picture in found.pictures.items():
            Image.fromarray(picture).save(args.out / f"{name}.png")
    return 0


def _adviser(args: argparse.Namespace) -> int:
    from .adviser import advise, read_machine, with_card
    from .weights.inventory import look_everywhere

    machine = read_machine(Path.cwd())
    if args.card is not None:
        machine = with_card(machine, args.card)
    found, problems = look_everywhere(args.models)
    advice = advise(machine, found, args.width, args.height, text_tokens=args.text_tokens, problems=problems)
    print(advice.report(), advice.table(), sep="\n\n")
    return 0


# --- LoRA files ---------------------------------------------------------------------------------------------


def _add_lora_commands(commands: Any) -> None:
    tools = commands.add_parser("lora", help="work on LoRA files").add_subparsers(dest="tool", required=True)

    def add(name: str, what: str, *files: str) -> argparse.ArgumentParser:
        tool = tools.add_parser(name, help=what)
        for file in files:
            tool.add_argument(file, type=Path)
        tool.add_argument("--model", type=Path, required=True, help="the transformer it is for: a file or a folder")
        return tool

    add("inspect", "what a file holds and whether it fits", "lora")
    add("convert", "write it in another dialect", "lora", "out").add_argument("--dialect", default="comfyui")
    add("resize", "write it with another rank", "lora", "out").add_argument("--rank", type=int, required=True)
    extract = add("extract", "what a tuned checkpoint adds to --model, as a LoRA", "tuned", "out")
    extract.add_argument("--rank", type=int, required=True)
    merge = add("merge", "write --model with a LoRA in its weights", "lora", "out")
    merge.add_argument("--strength", type=float, default=1.0)


def _lora(args: argparse.Namespace) -> int:
    from .weights.checkpoint import read_component
    from .weights.lora import module_strengths, read_lora, report_lora, weight_shapes, write_lora
    from .weights.lora_edit import extract_lora, merge_loras, resize_lora

    base = read_component(args.model, "transformer")
    shapes = weight_shapes(base.state_dict)
    if args.tool == "extract":
        found = extract_lora(base, read_component(args.tuned, "transformer"), rank=args.rank)
        write_lora(found.lora, args.out)
        print(found.summary)
        return 0
    lora = read_lora(args.lora, shapes)
    strengths = module_strengths(lora, getattr(args, "strength", 1.0), "", shapes)
    print(report_lora(lora, strengths))
    if args.tool == "convert":
        write_lora(lora, args.out, dialect=args.dialect)
    elif args.tool == "resize":
        small, held = resize_lora(lora, args.rank, base=base)
        write_lora(small, args.out)
        print(f"rank {args.rank} holds {held:.2%} of the change")
    elif args.tool == "merge":
        merge_loras(base, [(lora, strengths)], args.out, names=[args.lora.stem])
    return 0


# --- benchmarks ---------------------------------------------------------------------------------------------


def _add_benchmark_commands(commands: Any) -> None:
    kinds = commands.add_parser("benchmark", help="compare with people and with published numbers")
    kinds = kinds.add_subparsers(dest="kind", required=True)
    aesthetic = kinds.add_parser("aesthetic", help="scorers against human scores: SRCC, PLCC, KRCC, bias")
    aesthetic.add_argument("ratings", type=Path, help="folder, .json, .jsonl or .csv with images and human scores")
    aesthetic.add_argument(
        "--scorer",
        action="append",
        required=True,
        help="a weight file or folder, or one of the built-in: 'built-in combined'; may be given several times",
    )
    aesthetic.add_argument("--images", type=Path, help="where the image names start (default: beside the table)")
    aesthetic.add_argument("--score-column", default="", help="column with the human score (default: the known ones)")
    aesthetic.add_argument("--batch", type=int, default=8)
    aesthetic.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    for name, what in (("longtext", "text that an OCR read in pictures"), ("geneval", "objects that were detected")):
        kind = kinds.add_parser(name, help=what)
        kind.add_argument("prompts", type=Path, help="the benchmark's own prompts file (.jsonl)")
        kind.add_argument("--without-enhancer", type=Path, help="results of the prompts as they are")
        kind.add_argument("--with-enhancer", type=Path, help="results of the enhanced prompts")
        kind.add_argument("--model", default="ERNIE-Image", help="whose published columns stand beside")
        if name == "longtext":
            kind.add_argument("--language", default="en", help="en or zh")
    for kind in list(kinds.choices.values()):
        kind.add_argument("--out", type=Path, required=True, help="folder for the report")
        kind.add_argument("--samples", type=int, default=1000, help="bootstrap resamples")
        kind.add_argument("--seed", type=int, default=0)
    listed = kinds.add_parser("prompts", help="a benchmark's prompts as a list for Batch from Prompts")
    listed.add_argument("prompts", type=Path, help="the benchmark's own prompts file (.jsonl)")
    listed.add_argument("--out", type=Path, required=True, help="the .csv to write")
    listed.add_argument("--copies", type=int, default=4, help="pictures per prompt")
    listed.add_argument("--seed", type=int, default=0, help="seed of the first of them")


def _benchmark(args: argparse.Namespace) -> int:
    from .scoring import benchmark as bench
    from .training.state import write_text

    if args.kind == "aesthetic":
        ratings = bench.read_ratings(args.ratings, image_folder=args.images, score_column=args.score_column)
        found = bench.run_benchmark(
            [_open_scorer(name, args.device) for name in args.scorer],
            ratings,
            batch_size=args.batch,
            samples=args.samples,
            seed=args.seed,
            cache_folder=args.out / "cache",
            on_progress=lambda done, total, name: print(f"{name}: {done} of {total}", flush=True),
        )
        bench.write_benchmark(found, args.out)
        print(found.to_markdown())
        return 0
    if args.kind == "prompts":
        text = bench.list_prompts(args.prompts, copies=args.copies, seed=args.seed)
        write_text(args.out, text)
        print(f"{len(text.splitlines()) - 1} rows: {args.out}")
        return 0
    given = {"without enhancer": args.without_enhancer, "with enhancer": args.with_enhancer}
    files = {column: file for column, file in given.items() if file is not None}
    settings = {"model": args.model, "samples": args.samples, "seed": args.seed}
    if args.kind == "geneval":
        report = bench.benchmark_geneval(args.prompts, files, **settings)
    else:
        report = bench.benchmark_longtext(args.prompts, files, language=args.language, **settings)
    bench.write_prompt_report(report, args.out)
    print(report.text)
    return 0


# --- curation -----------------------------------------------------------------------------------------------


def _add_curate_commands(commands: Any) -> None:
    from .curation.commands import add_commands

    add_commands(commands.add_parser("curate", help="from a pile of pictures to a training set"))


def _add_evaluate_commands(commands: Any) -> None:
    from .evaluation.commands import add_commands

    add_commands(commands.add_parser("evaluate", help="prompt sets, reports by category, FID and CMMD"), _open_scorer)


def _run_lines(args: argparse.Namespace) -> int:
    """Commands that say themselves what they do, and yield lines."""
    for line in args.run(args):
        print(line, flush=True)
    return 0


def _open_scorer(name: str, device: str | None) -> Any:
    import torch

    from .scoring.loading import find_builtin, list_builtin, load_scorer

    builtin = find_builtin(name)
    if builtin is not None:
        return builtin
    if not Path(name).exists():
        raise ErnieError(
            f"no scorer {name!r}: expected a weight file or folder, or one of {', '.join(list_builtin())}."
        )
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def place(network: torch.nn.Module):
        network.to(target)
        return lambda: target

    return load_scorer(Path(name), place=place)


_COMMANDS = {
    "adviser": _adviser,
    "benchmark": _benchmark,
    "curate": _run_lines,
    "evaluate": _run_lines,
    "train": _train,
    "status": _status,
    "stop": _stop,
    "report": _report,
    "preflight": _preflight,
    "lora": _lora,
}


if __name__ == "__main__":
    sys.exit(main())
