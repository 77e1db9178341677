"""Training data: what people already have becomes a dataset or pairs, and is looked at before it is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host

CATEGORY = "ERNIE/training data"
Dataset = io.Custom("ERNIE_DATASET")
Pairs = io.Custom("ERNIE_PAIRS")

ADVANCED = {"advanced": True}  # folded away by pages that know the word
AS_SOURCE = "as the source says"
FORMATS = ("auto", "folder", "kohya", "toml", "aitoolkit", "metadata", "manifest")
MISSING_CAPTIONS = ("error", "empty", "default")
ALPHAS = (AS_SOURCE, "matte", "mask")
BALANCES = ("as they are", "equal")
SHOWN_LINES = 12  # on the node; the output has them all

_folders: dict[Path, set[Path]] = {}  # of the pictures that a dataset file names


def caption_inputs() -> list[io.Input]:
    """What becomes of captions, for every source of pictures."""
    return [
        io.String.Input(
            "trigger",
            default="",
            tooltip="Word that calls the concept: it replaces [trigger] in captions, or is put in front of them. "
            "Empty (neutral): captions as they are.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of the steps that see the empty prompt in place of the caption, 0 to 1; 0.05 to 0.1 is "
            "usual. 0 (neutral) = as the source says, else none.",
        ),
    ]


def missing_caption_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "missing_caption",
            options=list(MISSING_CAPTIONS),
            default="error",
            tooltip="What a picture without caption gets. error: the run is refused, with the names. empty: the empty "
            "prompt. default: the text below.",
        ),
        io.String.Input(
            "default_caption", default="", tooltip="The caption for missing_caption default; else not read."
        ),
    ]


def repeats_input() -> io.Int.Input:
    return io.Int.Input(
        "repeats",
        default=1,
        min=1,
        max=10_000,
        tooltip="How often each picture comes per epoch, 1 to 10000, times what the source says. 1 = once.",
    )


def dataset_input() -> io.Input:
    return Dataset.Input(
        "dataset", optional=True, tooltip="Another dataset, trained together with this one as a concept of its own."
    )


def balance_input() -> io.Combo.Input:
    return io.Combo.Input(
        "balance",
        options=list(BALANCES),
        default=BALANCES[0],
        tooltip="equal: every concept (folder or connected dataset) comes equally often, by repeating the smaller "
        "ones. as they are (neutral): by their pictures and repeats.",
    )


class ErnieDatasetFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieDatasetFolder",
            display_name="Dataset Folder (ERNIE)",
            category=CATEGORY,
            description="Reads pictures with captions from a folder or from another trainer's dataset file.",
            inputs=[
                io.String.Input(
                    "path",
                    default="",
                    tooltip="A folder of pictures with .txt captions of the same names, of kohya folders (10_name), "
                    "or with metadata.jsonl or .csv; or a .toml (kohya, musubi, diffusion-pipe), .yaml (ai-toolkit), "
                    ".jsonl or .csv file. Relative paths start in ComfyUI's input folder.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="auto",
                    tooltip="How to read it. auto looks at what is there; the others insist on one format.",
                    extra_dict=ADVANCED,
                ),
                *caption_inputs(),
                *missing_caption_inputs(),
                repeats_input(),
                io.Float.Input(
                    "loss_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Factor of the error of these pictures, 0 to 100. 1 = neutral; below 1 for pictures that "
                    "should only keep the model from forgetting.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "shuffle_tags",
                    default=False,
                    tooltip="On: comma-separated tags change places from step to step. Off (neutral): as the source "
                    "says, else they stay.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "keep_tags",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="How many tags in front stay in place when tags are shuffled, 0 to 100. 0 = as the source "
                    "says, else none.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "styles",
                    default="",
                    tooltip="How often each kind of caption is drawn where a picture has several, such as keyword 1, "
                    "sentence 3. Empty (neutral): all kinds alike.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "caption_per_line",
                    default=False,
                    tooltip="On: each line of a caption file is a caption of its own, one of which is drawn per step. "
                    "Off (neutral): the file is one caption.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "alpha",
                    options=list(ALPHAS),
                    default=AS_SOURCE,
                    tooltip="What transparent parts are. matte: painted in the matte colour. mask: left out of the "
                    "error as well.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "matte",
                    default="#ffffff",
                    tooltip="Colour under transparent parts, as #rrggbb.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "mask_folder",
                    default="",
                    tooltip="Folder of masks with the pictures' names; white is trained, black is not. NAME-masklabel."
                    "png beside a picture is found without it. Empty (neutral): only those.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "mask_floor",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Weight of what a mask hides, 0 to 1. 0 = as the source says, else none; 1 = masks off.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "max_aspect",
                    default=3.0,
                    min=1.0,
                    max=16.0,
                    step=0.25,
                    tooltip="Longest side ratio, 1 to 16; longer pictures are cropped in the middle.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "max_upscale",
                    default=1.3,
                    min=1.0,
                    max=16.0,
                    step=0.1,
                    tooltip="Largest enlargement of small pictures, 1 to 16; smaller ones are trained smaller.",
                    extra_dict=ADVANCED,
                ),
                balance_input(),
                dataset_input(),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="The pictures, for Train and Preflight."),
                io.String.Output(display_name="summary", tooltip="Counts, and everything that was found wrong."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, path: str | None = "", mask_folder: str | None = "", **others) -> str:
        """Changes with the files. What is linked comes as None."""
        return "".join(fingerprint(find_path(text)) for text in (path, mask_folder) if text and text.strip())

    @classmethod
    def execute(cls, path, format, repeats, loss_weight, balance, dataset=None, **options) -> io.NodeOutput:
        from ..ernie_core.training.dataset import read_dataset

        source = existing(path)
        read = read_dataset(source, format, make_options(**options), on_progress=on_progress())
        remember(source, read.items)
        return finish(weigh(read, source.stem, repeats, loss_weight), dataset, balance, cls.hidden.unique_id)


class ErnieDatasetImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieDatasetImages",
            display_name="Dataset Images (ERNIE)",
            category=CATEGORY,
            description="Makes a dataset of pictures from the graph, kept as files so that training can resume.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One caption per line, one line per picture; or a single line for all of them.",
                ),
                io.String.Input(
                    "name",
                    default="pictures",
                    tooltip="Folder in output/ernie_datasets for the pictures; also the name of the concept.",
                ),
                *caption_inputs(),
                repeats_input(),
                balance_input(),
                io.Mask.Input("masks", optional=True, tooltip="One mask per picture: white is trained, black is not."),
                dataset_input(),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="The pictures, for Train and Preflight."),
                io.String.Output(display_name="summary", tooltip="Counts, and everything that was found wrong."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, captions, name, repeats, balance, masks=None, dataset=None, **options) -> io.NodeOutput:
        from ..ernie_core.batch import run_folder
        from ..ernie_core.training.dataset import dataset_from_images

        lines = [line.strip() for line in captions.splitlines() if line.strip()]
        folder = run_folder(host.output_folder() / "ernie_datasets", name)
        read = dataset_from_images(
            images, lines or [""], folder, masks_BHW=masks, options=make_options(missing_caption="empty", **options)
        )
        return finish(weigh(read, folder.name, repeats, 1.0), dataset, balance, cls.hidden.unique_id)


class ErniePairsFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErniePairsFolder",
            display_name="Pairs Folder (ERNIE)",
            category=CATEGORY,
            description="Reads pairs of a better and a worse picture for one prompt, for preference training.",
            inputs=[
                io.String.Input(
                    "path",
                    default="",
                    tooltip="A folder with chosen and rejected (or w and l) pictures of the same names and .txt "
                    "prompts; or a .jsonl, .json, .csv or .parquet file with prompt, chosen and rejected, or with "
                    "ranked or scored pictures. Relative paths start in ComfyUI's input folder.",
                ),
                io.Float.Input(
                    "min_margin",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.1,
                    tooltip="Smallest difference of scores or ranks that makes a pair, 0 to 1000000. 0 = every pair.",
                ),
                io.Int.Input(
                    "max_per_prompt",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Pairs kept per prompt, those with the largest margins, 0 to 10000. 0 (neutral) = all.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that see the empty prompt, 0 to 1. 0 (neutral) = none.",
                ),
                *missing_caption_inputs(),
            ],
            outputs=[
                Pairs.Output(display_name="pairs", tooltip="The pairs, for Train."),
                io.String.Output(display_name="summary", tooltip="Counts, and everything that was found wrong."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, path: str | None = "", **others) -> str:
        """Changes with the files. What is linked comes as None."""
        return fingerprint(find_path(path)) if path and path.strip() else ""

    @classmethod
    def execute(cls, path, min_margin, max_per_prompt, caption_dropout, **captions) -> io.NodeOutput:
        from ..ernie_core.training.pairs import read_pairs

        source = existing(path)
        pairs = read_pairs(
            source,
            make_options("", caption_dropout, **captions),
            min_margin=min_margin,
            max_pairs_per_prompt=max_per_prompt or None,
            on_progress=on_progress(),
        )
        remember(source, (item for pair in pairs.pairs for item in (pair.chosen, pair.rejected)))
        return io.NodeOutput(pairs, show(cls.hidden.unique_id, pairs.report()))


def find_path(path: str) -> Path:
    """Where `path` is: absolute, or in the host's input folder."""
    return (host.input_folder() / Path(path.strip()).expanduser()).absolute()


def existing(path: str) -> Path:
    """`find_path`, or an error that says what belongs there."""
    found = find_path(path)
    if not path.strip() or not found.exists():
        raise ErnieError(
            f"path must be a folder or file with training data, got {path!r}: there is no {found}. "
            "Put the folder into ComfyUI's input folder and give its name, or give a whole path."
        )
    return found


def fingerprint(path: Path) -> str:
    """A hash of names, sizes and times of the files that a dataset is read from.

    A file of another trainer names folders anywhere: they are known once it was read.
    """
    files = path.rglob("*") if path.is_dir() else [path, *(f for d in _folders.get(path, ()) for f in d.glob("*"))]
    digest = hashlib.sha256("".join(sorted(iter_stamps(files))).encode())
    return digest.hexdigest()


def iter_stamps(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        if file.is_file():
            state = file.stat()
            yield f"{file} {state.st_size} {state.st_mtime_ns}\n"


def remember(path: Path, items: Iterable) -> None:
    """Keep which folders the pictures of a dataset file lie in."""
    if path.is_file():
        _folders[path] = {item.image.parent for item in items}


def make_options(
    trigger: str,
    caption_dropout: float,
    *,
    shuffle_tags: bool = False,
    keep_tags: int = 0,
    styles: str = "",
    alpha: str = AS_SOURCE,
    matte: str = "#ffffff",
    mask_folder: str = "",
    mask_floor: float = 0.0,
    **others,
):
    """The engine's `DatasetOptions` from widgets, whose neutral values leave it to the source."""
    from ..ernie_core.training.captions import CaptionRules, read_styles
    from ..ernie_core.training.dataset import DatasetOptions

    rules = CaptionRules(
        trigger=trigger.strip() or None,
        dropout=caption_dropout or None,
        shuffle=shuffle_tags or None,
        keep_tokens=keep_tags or None,
    )
    return DatasetOptions(
        rules=rules,
        styles=read_styles(styles),
        alpha=None if alpha == AS_SOURCE else alpha,
        matte=read_colour(matte),
        mask_folder=str(existing(mask_folder)) if mask_folder.strip() else "",
        mask_floor=mask_floor or None,
        **others,
    )


def read_colour(text: str) -> tuple[int, int, int]:
    """`#ff8000` as (255, 128, 0)."""
    digits = text.strip().removeprefix("#")
    try:
        red, green, blue = bytes.fromhex(digits)
    except ValueError as e:
        raise ErnieError(f"matte must be a colour like #ffffff, got {text!r}.") from e
    return red, green, blue


def weigh(dataset, concept: str, repeats: int, loss_weight: float):
    """`dataset` with every item's repeats and weight multiplied; those of no concept are of `concept`."""
    items = (
        replace(i, concept=i.concept or concept, repeats=i.repeats * repeats, weight=i.weight * loss_weight)
        for i in dataset.items
    )
    return replace(dataset, items=tuple(items))


def finish(dataset, other, balance: str, node_id: str | None) -> io.NodeOutput:
    """The node's outputs: joined with another dataset, balanced, and reported on the node."""
    from ..ernie_core.training.dataset import balance_concepts, join_datasets

    if other is not None:
        dataset = join_datasets([other, dataset])
    if balance == "equal":
        dataset = balance_concepts(dataset, "equal")
    return io.NodeOutput(dataset, show(node_id, dataset.report()))


def show(node_id: str | None, report: str) -> str:
    """`report`, its first lines also on the node."""
    lines = report.splitlines()
    more = [f"... and {len(lines) - SHOWN_LINES} more lines in the output"] if len(lines) > SHOWN_LINES else []
    host.show_text(node_id, "\n".join([*lines[:SHOWN_LINES], *more]))
    return report


def on_progress():
    """A callback for the engine that moves the node's bar and can be interrupted."""
    bar = host.progress(1)

    def report(done: int, total: int, _what: str) -> None:
        host.throw_if_interrupted()
        bar.update_absolute(done, max(total, 1))

    return report
