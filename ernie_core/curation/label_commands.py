"""Commands that label a manifest: categories, captions, styles, scores.

Without a model they take what can be measured on the pixels, or rules. `--vlm` takes a vision-language model from a
folder, `--server` the user's own server, to which pictures or captions go only with `--send`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ErnieError
from .answers import LENGTHS
from .engines import run_stage

TEXT_FEATURES = "text_features"  # folder beside the target

# As in the modules that use them; written out, since those bring torch and --help should not.
FORMS = ("structured", "plain")
PRESETS = ("even", "mostly detailed", "as it is")


def add_categories(stages: Any, add_files: Any, add_engine: Any) -> None:
    """curate categories SOURCE TARGET"""
    command = stages.add_parser("categories", help="sort pictures into a tree of categories, and count the long tail")
    add_files(command)
    command.add_argument("--model", type=Path, help="CLIP, SigLIP or SigLIP 2: a folder, or a CLIP file")
    command.add_argument("--taxonomy", type=Path, help="tree as text or .json (default: the one that comes along)")
    command.add_argument("--template", action="append", help='sentence, such as "a picture of {name}"; again for more')
    command.add_argument("--method", choices=("names", "leaves"), default="names", help="what branches count as")
    command.add_argument("--beam", type=int, default=0, help="places kept per level (default 0: all)")
    command.add_argument("--min-confidence", type=float, default=0.0, help="below it a picture gets a branch")
    command.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    command.add_argument("--batch-size", type=int, default=16)
    command.add_argument("--picture", type=Path, help="write the long tail as a picture (.png)")
    _add_writer(command, device="of --model or --vlm")
    command.add_argument("--function", metavar="MODULE:NAME", help="a Python function of yours, see own_labels.py")
    add_engine(command)


def add_captions(stages: Any, add_files: Any, add_engine: Any) -> None:
    """curate captions SOURCE TARGET"""
    command = stages.add_parser("captions", help="describe pictures: structured, visible text verbatim, five lengths")
    add_files(command)
    command.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    command.add_argument("--form", choices=FORMS, default="structured", help="plain: one paragraph, no JSON")
    command.add_argument("--language", default="English", help="of the captions; visible text keeps its own")
    command.add_argument("--hints", action="store_true", help="tell the model the caption and category of the row")
    command.add_argument("--instruction", default="", help="sentences added to the question")
    command.add_argument("--batch-size", type=int, default=4)
    _add_writer(command, device="of --vlm", temperature=0.0, max_tokens=1024)
    command.add_argument("--function", metavar="MODULE:NAME", help="a Python function of yours, see own_labels.py")
    add_engine(command)


def add_styles(stages: Any, add_files: Any, add_engine: Any) -> None:
    """curate styles SOURCE TARGET"""
    command = stages.add_parser("styles", help="rewrite captions into the ways people write prompts")
    add_files(command)
    command.add_argument("--preset", choices=PRESETS, default=PRESETS[0], help="shares of the styles")
    command.add_argument("--share", action="append", metavar="STYLE=N", help="shares of your own, in place of a preset")
    command.add_argument("--every", action="store_true", help="write every style of each caption, for mixing later")
    _add_writer(command, device="of --vlm", temperature=0.6, max_tokens=512)
    add_engine(command)


def add_scores(stages: Any, add_files: Any, add_engine: Any) -> None:
    """curate scores SOURCE TARGET"""
    command = stages.add_parser("scores", help="score pictures, and tabulate the scores by category")
    add_files(command)
    command.add_argument("--scorer", default="built-in combined", help="a file, a folder, or a built-in measure")
    command.add_argument("--column", default="score", help="where the score goes (default: score)")
    command.add_argument("--kind", choices=("auto", "clip", "pickscore", "hpsv2"), default="auto")
    command.add_argument("--precision", choices=("fp32", "bf16", "fp16", "int8", "fp8", "nf4"))
    command.add_argument("--device", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--picture", type=Path, help="write the table and the ends as a picture (.png)")
    add_engine(command)


def _add_writer(
    command: argparse.ArgumentParser, *, device: str, temperature: float | None = None, max_tokens: int = 0
) -> None:
    command.add_argument("--vlm", type=Path, metavar="FOLDER", help="vision-language model in transformers' form")
    command.add_argument("--device", help=f"{device}: cpu, cuda, ... (default: cpu)")
    command.add_argument("--max-side", type=int, default=1024, metavar="PX", help="larger pictures are scaled down")
    command.add_argument("--server", metavar="URL", help="of an OpenAI-compatible API, as http://127.0.0.1:8080/v1")
    command.add_argument("--server-model", default="default", metavar="NAME")
    command.add_argument("--key-variable", default="", help="environment variable that holds the key")
    command.add_argument("--send", action="store_true", help="allow sending pictures and captions to --server")
    command.add_argument("--timeout", type=float, default=120.0, metavar="S", help="silence of the server")
    command.add_argument("--concurrency", type=int, default=4, help="questions under way at once")
    for name, kind, what in (
        ("requests", int, "questions"),
        ("tokens", int, "tokens read and written"),
        ("spend", float, "money, with the prices"),
    ):
        command.add_argument(f"--max-{name}", type=kind, default=0, help=f"{what} in all (0: no limit)")
    command.add_argument("--price-in", type=float, default=0.0, help="per million tokens read")
    command.add_argument("--price-out", type=float, default=0.0, help="per million tokens written")
    command.add_argument("--per-minute", type=int, default=0, help="questions in 60 seconds (0: no limit)")
    if temperature is not None:
        command.add_argument("--temperature", type=float, default=temperature)
        command.add_argument("--max-tokens-each", type=int, default=max_tokens, help="longest answer")
        command.add_argument("--retries", type=int, default=2, help="tries after an answer that cannot be taken")
        command.add_argument("--seed", type=int, default=0)
    _keep_neutral(command)


def _writer(args: argparse.Namespace) -> tuple[Any, Any]:
    """(what is asked or None, what says what was spent or None)."""
    from .vision_language import Limits, LocalWriter, ServerWriter

    if args.vlm and args.server:
        raise ErnieError("--vlm and --server exclude each other.")
    if args.vlm:
        return LocalWriter(args.vlm, device=args.device, max_side_px=args.max_side), None
    if not args.server:
        return None, None
    if not args.send:
        raise ErnieError(f"pictures and captions would be sent to {args.server}: add --send to allow it.")
    from ..enhancing.server import ChatServer

    server = ChatServer(args.server, args.server_model, key_variable=args.key_variable, timeout_s=args.timeout)
    names = ("max_requests", "max_tokens", "max_spend", "price_in", "price_out", "per_minute")
    limits = Limits(**{name: getattr(args, name) for name in names})
    ledger = args.target.with_name(f"{args.target.name}.spent.jsonl")
    writer = ServerWriter(server, limits=limits, ledger=ledger, concurrency=args.concurrency, max_side_px=args.max_side)
    return writer, writer.spent


def _keep_neutral(command: argparse.ArgumentParser) -> None:
    names = {name for names in _READ_BY.values() for name in names}
    command.set_defaults(neutral={name: command.get_default(name) for name in names})


_READ_BY = {
    "--model": ("template", "method", "beam", "min_confidence", "precision"),
    "--vlm or --server": (
        *("max_side", "form", "language", "hints", "instruction", "temperature", "max_tokens_each", "retries"),
    ),
    "--server": (
        *("server_model", "key_variable", "send", "timeout", "concurrency", "max_requests", "max_tokens", "max_spend"),
        *("price_in", "price_out", "per_minute"),
    ),
}


def _refuse_unread(args: argparse.Namespace) -> None:
    """Raise where an option was given that nothing in this call reads."""
    given = {
        "--model": bool(getattr(args, "model", None)),
        "--vlm or --server": bool(args.vlm or args.server),
        "--server": bool(args.server),
    }
    for reader, names in _READ_BY.items():
        changed = [n for n in names if not given[reader] and hasattr(args, n) and getattr(args, n) != args.neutral[n]]
        if changed:
            shown = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ErnieError(f"{shown} would not be read: give {reader}, or leave it out.")


def categories(args: argparse.Namespace, how: Mapping[str, Any]) -> Iterator[str]:
    """Sort, then count."""
    _refuse_unread(args)
    from .asked_categories import LanguageCategoriser
    from .builtin_labels import BuiltinCategoriser
    from .categories import TEMPLATES, Categories, ImageTextCategoriser
    from .long_tail import count_categories
    from .manifest import read_rows
    from .own_labels import OwnLabels
    from .taxonomy import STARTER, load_taxonomy

    writer, spent = _writer(args)
    if sum(map(bool, (args.model, args.function, writer))) > 1:
        raise ErnieError("--model, --vlm, --server and --function exclude each other.")
    tree = load_taxonomy(args.taxonomy or STARTER) if args.model or writer else None
    if args.taxonomy and tree is None:
        raise ErnieError(
            "--taxonomy is read with --model, --vlm or --server; the other ways have their own categories."
        )
    if args.model:
        assert tree is not None
        chosen: Any = ImageTextCategoriser(
            args.model,
            tree,
            cache=args.target.parent / TEXT_FEATURES,
            templates=args.template or TEMPLATES,
            method=args.method,
            beam=args.beam,
            min_confidence=args.min_confidence,
            precision=args.precision,
            device=args.device,
        )
        chosen.prepare()
    elif writer is not None:
        assert tree is not None
        chosen = LanguageCategoriser(writer, tree)
    else:
        chosen = OwnLabels(args.function) if args.function else BuiltinCategoriser()
    yield str(run_stage(Categories(chosen, batch_size=args.batch_size), args.source, args.target, **how))
    tail = count_categories(read_rows(args.target), tree)
    yield tail.describe()
    if spent:
        yield spent()
    if args.picture:
        _save(args.picture, tail.draw())


def captions(args: argparse.Namespace, how: Mapping[str, Any]) -> Iterator[str]:
    """Describe, then report."""
    _refuse_unread(args)
    from .builtin_labels import BuiltinCaptioner
    from .captions import Captions, LanguageCaptioner, report
    from .manifest import read_rows
    from .own_labels import OwnLabels

    writer, spent = _writer(args)
    if args.function and writer is not None:
        raise ErnieError("--function excludes --vlm and --server.")
    if writer is not None:
        chosen: Any = LanguageCaptioner(
            writer,
            lengths=["long"] if args.form == "plain" else args.lengths,
            form=args.form,
            language=args.language,
            hints=args.hints,
            instruction=args.instruction,
            temperature=args.temperature,
            max_tokens=args.max_tokens_each,
            retries=args.retries,
            seed=args.seed,
        )
    else:
        chosen = OwnLabels(args.function) if args.function else BuiltinCaptioner(args.lengths)
    yield str(run_stage(Captions(chosen, batch_size=args.batch_size), args.source, args.target, **how))
    yield report(read_rows(args.target))
    if spent:
        yield spent()


def styles(args: argparse.Namespace, how: Mapping[str, Any]) -> Iterator[str]:
    """Rewrite, then report."""
    _refuse_unread(args)
    from .manifest import read_rows
    from .styles import PRESETS, LanguageRewriter, RuleRewriter, Styles, report

    writer, spent = _writer(args)
    shares = read_shares(args.share) if args.share else PRESETS[args.preset]
    if writer is None:
        chosen: Any = RuleRewriter(args.seed)
    else:
        chosen = LanguageRewriter(
            writer,
            temperature=args.temperature,
            max_tokens=args.max_tokens_each,
            retries=args.retries,
            seed=args.seed,
        )
    stage = Styles(chosen, shares, every=args.every, seed=args.seed, batch_size=64 if writer is None else 8)
    yield str(run_stage(stage, args.source, args.target, **how))
    yield report(read_rows(args.target), shares)
    if spent:
        yield spent()


def read_shares(parts: list[str]) -> dict[str, float]:
    """`keyword=1` and the like as a dict.

    Raises ErnieError: another form.
    """
    shares: dict[str, float] = {}
    for part in parts:
        style, _, share = part.partition("=")
        try:
            shares[style.strip()] = float(share)
        except ValueError as e:
            raise ErnieError(f"a share is written as STYLE=NUMBER, such as keyword=1, got {part!r}.") from e
    return shares


def scores(args: argparse.Namespace, how: Mapping[str, Any]) -> Iterator[str]:
    """Score, then tabulate."""
    from .manifest import read_rows
    from .scores import ScorePictures, ScorerFile, tabulate

    scorer = ScorerFile(args.scorer, kind=args.kind, precision=args.precision, device=args.device)
    stage = ScorePictures(scorer, column=args.column, batch_size=args.batch_size)
    yield str(run_stage(stage, args.source, args.target, **how))
    table = tabulate(read_rows(args.target), args.column)
    yield table.describe()
    if args.picture:
        _save(args.picture, table.draw())


def _save(path: Path, picture: Any) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
