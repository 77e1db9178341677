"""The command line: `python -m standalone WORKFLOW [--set ...] [--out DIR]`, or `remake RUN.json --row N`.

Exit codes: 0 done · 1 a node failed · 2 bad command line, or the workflow was refused before anything ran ·
130 stopped by Ctrl-C. Results are printed on stdout (a path per saved file, then the text that nodes show),
progress and errors go to stderr. Pictures that were finished stay in every case.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..ernie_core.batch import MANIFEST, BatchResult, Row, file_name, hash_pixels
from ..ernie_core.errors import ErnieError, Interrupted
from ..ernie_core.runs import RUN, read_run, recorded_pixels
from . import graph, host, load_node_classes
from .rows_elsewhere import ENGINES, Cluster, make_elsewhere, make_job

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m standalone",
        description="Run a ComfyUI workflow of this pack without ComfyUI.",
        epilog="Exit codes: 0 done, 1 a node failed, 2 refused before anything ran, 130 stopped by Ctrl-C. "
        "`python -m standalone remake RUN.json --row N` makes one picture of a batch or grid again.",
    )
    parser.add_argument(
        "workflow", nargs="?", type=Path, help=".json (UI or API format), or a .png saved with a workflow"
    )
    parser.add_argument(
        "--set",
        dest="values",
        action="append",
        default=[],
        metavar="[NODE.]INPUT=VALUE",
        help="change an input; NODE is an id, a title or a type, and may be left out where one node has the input "
        "(nodes that feed only `negative` do not count)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures (default: out)")
    parser.add_argument(
        "--input", type=Path, help="folder LoadImage reads (default: input, beside the workflow or here)"
    )
    parser.add_argument("--models", type=Path, help="folder with models (default: $ERNIE_MODELS, else the tiny model)")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model in place of the released files")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="who makes the rows of batches and grids: this process (serial), or workers of a Ray cluster (ray)",
    )
    parser.add_argument("--address", help="of the Ray cluster, host:port or auto (default: one is started here)")
    parser.add_argument(
        "--workers", type=int, default=0, help="with --engine ray: processes, each with its models (default: the GPUs)"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the inputs --set can change, or without a workflow all node types and models",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["remake"]:
        return remake(make_remake_parser().parse_args(arguments[1:]))
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.workflow is None and not args.list:
        parser.error("a workflow file expected; for example workflows/text_to_image.json")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.captureWarnings(True)
    try:
        configure(args)
        classes = load_node_classes()
        if args.workflow is None:
            list_offer(classes)
            return EXIT_DONE
        workflow = graph.read_workflow(args.workflow, classes)
        for item in args.values:
            target, equals, text = item.partition("=")
            if not equals:
                raise ErnieError(f"--set INPUT=VALUE expected, got {item!r}; write --set {item}=VALUE.")
            graph.set_value(workflow, target, text, classes)
        if args.list:
            list_inputs(workflow, classes)
            return EXIT_DONE
        graph.validate(workflow.prompt, classes)
        send_rows(args, workflow)
    except ErnieError as e:
        tell(f"error: {e}")
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return run(workflow, classes)


def make_remake_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m standalone remake",
        description="Make one picture of a batch or grid again, from its run.json, and compare it bit by bit.",
        epilog="Exit codes: 0 bit-equal, 1 another picture or a node failed, 2 refused before anything ran.",
    )
    parser.add_argument("run", type=Path, help="run.json, or the folder of the run")
    parser.add_argument("--row", type=int, required=True, help="number of the row, from 1")
    parser.add_argument("--out", type=Path, help="output folder (default: beside the run's pictures)")
    parser.add_argument("--models", type=Path, help="folder with models (default: $ERNIE_MODELS, else the tiny model)")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model in place of the released files")
    parser.add_argument("--input", type=Path, help="folder LoadImage reads (default: input)")
    return parser


def remake(args: argparse.Namespace) -> int:
    """Run only what one row of a run needs; the node makes it and compares."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        made = read_run(args.run)
        row = made.row(args.row)
        folder = args.run if args.run.is_dir() else args.run.parent
        if made.prompt is None or made.node is None:
            raise ErnieError("this run.json holds no graph: make the row again with the node's own remake input.")
        depth = len(Path(str(made.prompt[made.node]["inputs"].get("name", "")).strip()).parts)
        name = Path(*folder.resolve().parts[-depth:])  # as it is called now, with what made_with added
        output = args.out or folder.resolve().parents[depth - 1]
        if args.out is not None:
            (output / name).mkdir(parents=True, exist_ok=True)
            for file in (RUN, MANIFEST):
                source = args.run if file == RUN and args.run.is_file() else folder / file
                if source.is_file() and source.resolve() != (output / name / file).resolve():
                    shutil.copyfile(source, output / name / file)
        elif not args.run.is_dir() and args.run.name != RUN:
            raise ErnieError(f"{args.run} is an earlier run: name a folder for the picture with --out.")
        args.workflow, args.out = None, output
        configure(args)
        classes = load_node_classes()
        workflow = graph.parse_workflow(made.prompt, classes)
        workflow.prompt[made.node]["inputs"] |= {"remake": args.row, "name": name.as_posix(), "made_with": ""}
        graph.validate(workflow.prompt, classes)
    except ErnieError as e:
        tell(f"error: {e}")
        return EXIT_REFUSED
    code = run(workflow, classes)
    if code != EXIT_DONE:
        return code
    again = hash_pixels(output / name / f"remade_{file_name(row)}")
    return EXIT_DONE if again == recorded_pixels(output / name, row) else EXIT_FAILED


def configure(args: argparse.Namespace) -> None:
    """Point the host at the folders of this run."""
    models = args.models or (Path(os.environ["ERNIE_MODELS"]) if os.environ.get("ERNIE_MODELS") else None)
    if models is not None and not args.tiny and not models.is_dir():
        raise ErnieError(f"a folder with models expected, {models} is none; give an existing one with --models.")
    beside = args.workflow.parent / "input" if args.workflow else Path("input")
    host.session = host.Session(
        models=None if args.tiny else models,
        output=args.out,
        input=args.input or (beside if beside.is_dir() else Path("input")),
    )


def send_rows(args: argparse.Namespace, workflow: graph.Workflow) -> None:
    """Have the rows of batches and grids made by workers, if the command line says so."""
    if args.engine == "serial":
        if args.address or args.workers:
            raise ErnieError("--address and --workers are for --engine ray: add it, or leave them out.")
        return
    if args.workers < 0:
        raise ErnieError(f"--workers must be 0 (one per GPU) or more, got {args.workers}.")
    cluster = Cluster(address=args.address, workers=args.workers)

    def make(rows: Sequence[Row], folder: Path, studio: Any) -> BatchResult:
        job = make_job(workflow, studio.hidden.unique_id)
        return make_elsewhere(rows, folder, job, cluster, on_row=studio.announce)

    host.session.make_rows = make


def run(workflow: graph.Workflow, classes: graph.NodeClasses) -> int:
    """Run a checked workflow, print what it made, return the exit code."""
    result = graph.RunResult()
    started = time.monotonic()
    code = EXIT_DONE
    with soft_interrupt():
        try:
            graph.run_prompt(workflow, classes, result=result, around=announce)
        except (Interrupted, KeyboardInterrupt):
            tell("stopped; what was finished is kept.")
            code = EXIT_INTERRUPTED
        except (graph.NodeFailed, ErnieError) as e:
            tell(f"error: {e}")
            if e.__cause__ is not None and not isinstance(e.__cause__, ErnieError):
                logging.getLogger(__name__).error("details", exc_info=e.__cause__)
            code = EXIT_FAILED
    for path in host.session.saved:
        print(path)
    for node_id, text in texts(result).items():
        print(f"[{node_id}] {text}")
    tell(f"{len(result.finished)} nodes in {time.monotonic() - started:.1f} s")
    return code


def texts(result: graph.RunResult) -> dict[str, str]:
    """Return what nodes showed as text, by node id."""
    shown = dict(host.session.shown)
    shown |= {node_id: "\n".join(map(str, ui["text"])) for node_id, ui in result.ui.items() if ui.get("text")}
    return shown


@contextlib.contextmanager
def announce(node_id: str, title: str) -> Iterator[None]:
    """Name the running node on the progress line; afterwards say how long it took."""
    host.throw_if_interrupted()
    host.session.label = f"{node_id} {title}"
    started = time.monotonic()
    yield
    tell(f"{node_id} {title}: {time.monotonic() - started:.1f} s")


@contextlib.contextmanager
def soft_interrupt() -> Iterator[None]:
    """First Ctrl-C: stop after the current step. Second: stop at once."""

    def ask(_signal: int, _frame: object) -> None:
        if host.session.interrupted:
            raise KeyboardInterrupt
        host.session.interrupted = True
        tell("stopping after this step; press Ctrl-C again to stop at once.")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def list_inputs(workflow: graph.Workflow, classes: graph.NodeClasses) -> None:
    for node_id, name, kind, options in graph.iter_settable(workflow, classes):
        value = workflow.prompt[node_id]["inputs"].get(name)
        choices = options.get("options")
        hint = f"  one of {', '.join(map(str, choices))}" if choices else ""
        print(f"{node_id}.{name}={value!r}  {kind}{hint}")


def list_offer(classes: graph.NodeClasses) -> None:
    for node_id in sorted(classes):
        print(node_id)
    for kind in host.PARTS:
        print(f"{kind}: {', '.join(host.list_models(kind)) or 'none'}")


def tell(text: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}{text}", file=sys.stderr, flush=True)
