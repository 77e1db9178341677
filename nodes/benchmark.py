"""Benchmarks: scorers against people, and prompt following out of what an OCR or a detector found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..ernie_core.errors import ErnieError
from . import host
from .dataset import find_path
from .training import to_image

if TYPE_CHECKING:
    import numpy as np

    from ..ernie_core.scoring.benchmark import Ratings

CATEGORY = "ERNIE/scoring"
Scorer = io.Custom("ERNIE_SCORER")
MORE_SCORERS = ("scorer_2", "scorer_3", "scorer_4")
BENCHMARKS = ("LongText-Bench English", "LongText-Bench Chinese", "GenEval")
MODELS = ("ERNIE-Image", "ERNIE-Image-Turbo")
FOLDER = "ernie_benchmarks"
KEPT_SCORES = ".scores"
SHOWN_LINES = 14  # on the node; the output has them all


def samples_input() -> io.Int.Input:
    return io.Int.Input(
        "samples",
        default=1000,
        min=100,
        max=100_000,
        tooltip="Resamples that the 95 % intervals are made of, 100 to 100000. More make their ends steadier; 1000 is "
        "usual.",
    )


def name_input(default: str) -> io.String.Input:
    return io.String.Input(
        "name",
        default=default,
        tooltip=f"Folder in output/{FOLDER} for the report and its pictures; files of an earlier run are replaced.",
    )


def report_outputs(what: str) -> list[io.Output]:
    return [
        io.String.Output(display_name="report", tooltip="All numbers and problems, as Markdown."),
        io.Image.Output(display_name="charts", tooltip=what),
    ]


class ErnieAestheticBenchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        more = "Another scorer, compared on the same images."
        return io.Schema(
            node_id="ErnieAestheticBenchmark",
            display_name="Aesthetic Benchmark (ERNIE)",
            category=CATEGORY,
            description="Compares scorers with the scores of people: SRCC, PLCC, KRCC and bias by category.",
            is_output_node=True,
            inputs=[
                Scorer.Input("scorer", tooltip="The scorer to compare with people, from Load Scorer."),
                *[Scorer.Input(name, optional=True, tooltip=more) for name in MORE_SCORERS],
                io.String.Input(
                    "ratings",
                    default="",
                    tooltip="A .json, .jsonl or .csv file with the columns image, gt_score (or score) and, if there "
                    "are, category and prompt; a folder with one such table; or a folder of folders named by their "
                    "score. Relative paths start in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "image_folder",
                    default="",
                    tooltip="Where the table's image names start. Empty (neutral): beside the table, or in images/ "
                    "there.",
                ),
                io.String.Input(
                    "score_column",
                    default="",
                    tooltip="Column with the human score. Empty (neutral): the first of gt_score, human_score, human, "
                    "mos, mean_score, rating, aesthetic_score, score, tier, label.",
                ),
                name_input("benchmark"),
                io.Int.Input(
                    "batch_size",
                    default=8,
                    min=1,
                    max=256,
                    tooltip="Images that a scorer sees at once, 1 to 256. Changes speed and memory, not the numbers.",
                ),
                samples_input(),
            ],
            outputs=[
                *report_outputs("Tables, scatter plots, and SRCC and bias by category, below each other."),
                io.Image.Output(
                    display_name="disagreements",
                    tooltip="Per scorer the images that it likes more, and less, than people do.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, ratings: str | None = "", **others) -> list:
        """Changes when the table or the folder does. What is linked comes as None."""
        path = find_path(ratings or "")
        files = [path, *(path.iterdir() if path.is_dir() else ())]
        return [ratings, *sorted((str(f), f.stat().st_mtime_ns) for f in files if f.exists())]

    @classmethod
    def execute(
        cls,
        scorer,
        ratings: str,
        image_folder: str,
        score_column: str,
        name: str,
        batch_size: int,
        samples: int,
        scorer_2=None,
        scorer_3=None,
        scorer_4=None,
    ) -> io.NodeOutput:
        from ..ernie_core.scoring.benchmark import run_benchmark, write_benchmark

        scorers = [s for s in (scorer, scorer_2, scorer_3, scorer_4) if s is not None]
        folder, node_id = report_folder(name), cls.hidden.unique_id
        rated = read_rated(ratings, image_folder, score_column, node_id)
        settings = {"batch_size": batch_size, "samples": samples, "cache_folder": kept_scores()}
        found = run_benchmark(scorers, rated, on_progress=progress_of(scorers, node_id), **settings)
        write_benchmark(found, folder)
        return show_report(cls, f"{found.to_markdown()}\nWritten to {folder}\n", *stack_charts(found.pictures()))


class ErniePromptBenchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        results = (
            "Results of the pictures of %s: for LongText-Bench what an OCR read (results.jsonl, a table with image and "
            "ocr, or a folder of .txt files), for GenEval detections or judged pictures. Empty: no such column."
        )
        return io.Schema(
            node_id="ErniePromptBenchmark",
            display_name="Prompt Following Benchmark (ERNIE)",
            category=CATEGORY,
            description="Scores LongText-Bench or GenEval, given OCR text or detections, beside the published columns.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "benchmark",
                    options=list(BENCHMARKS),
                    default=BENCHMARKS[0],
                    tooltip="Which rules: words (English) or characters (Chinese) that can be read, or objects, "
                    "numbers, colours and places that were found.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    tooltip="The benchmark's own file: text_prompts.jsonl, text_prompts_zh.jsonl or "
                    "evaluation_metadata.jsonl. Relative paths start in ComfyUI's input folder.",
                ),
                io.String.Input("without_enhancer", default="", tooltip=results % "the prompts as they are"),
                io.String.Input("with_enhancer", default="", tooltip=results % "the enhanced prompts"),
                io.Combo.Input(
                    "model",
                    options=list(MODELS),
                    default=MODELS[0],
                    tooltip="Whose published columns stand beside yours.",
                ),
                name_input("prompt_following"),
                samples_input(),
            ],
            outputs=report_outputs("Your columns and the published ones, in one table."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls, prompts: str | None = "", without_enhancer: str | None = "", with_enhancer: str | None = "", **others
    ) -> list:
        """Changes when one of the files does. What is linked comes as None."""
        files = [find_path(text) for text in (prompts, without_enhancer, with_enhancer) if text and text.strip()]
        return [(str(f), f.stat().st_mtime_ns) for f in files if f.exists()]

    @classmethod
    def execute(
        cls,
        benchmark: str,
        prompts: str,
        without_enhancer: str,
        with_enhancer: str,
        model: str,
        name: str,
        samples: int,
    ) -> io.NodeOutput:
        from ..ernie_core.scoring import benchmark as engine

        folder = report_folder(name)
        files = columns(without_enhancer, with_enhancer)
        settings = {"model": model, "samples": samples}
        prompts_file = needed_path("prompts", prompts)
        if benchmark == "GenEval":
            found = engine.benchmark_geneval(prompts_file, files, **settings)
        else:
            language = "en" if benchmark.endswith("English") else "zh"
            found = engine.benchmark_longtext(prompts_file, files, language=language, **settings)
        engine.write_prompt_report(found, folder)
        return show_report(cls, f"{found.text}\nWritten to {folder}\n", found.picture)


def read_rated(ratings: str, image_folder: str, score_column: str, node_id: str | None) -> Ratings:
    """The rated set that the widgets name; raises what `read_ratings` raises."""
    from ..ernie_core.scoring.benchmark import read_ratings

    return read_ratings(
        needed_path("ratings", ratings),
        image_folder=find_path(image_folder) if image_folder.strip() else None,
        score_column=score_column,
        on_progress=reading_of(node_id),
    )


def kept_scores() -> Path:
    """Where scores of every benchmark are kept."""
    return host.output_folder() / FOLDER / KEPT_SCORES


def stack_charts(pictures: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(charts, contact sheets) of a benchmark, each below each other."""
    from ..ernie_core.scoring.charts import stack_pictures

    sheets = [p for name, p in pictures.items() if name.startswith("extremes")]
    return stack_pictures([p for name, p in pictures.items() if not name.startswith("extremes")]), stack_pictures(
        sheets
    )


def columns(without_enhancer: str, with_enhancer: str) -> Mapping[str, Path]:
    """The result files by column.

    Raises:
        ErnieError: neither is given.
    """
    given = {"without enhancer": without_enhancer, "with enhancer": with_enhancer}
    files = {column: find_path(text) for column, text in given.items() if text.strip()}
    if not files:
        raise ErnieError("without_enhancer or with_enhancer must name a file of results, both are empty.")
    return files


def needed_path(widget: str, text: str) -> Path:
    """Where `text` lies.

    Raises:
        ErnieError: it is empty or not there.
    """
    path = find_path(text)
    if not text.strip() or not path.exists():
        raise ErnieError(
            f"{widget} must be a file or folder, got {text!r}: there is no {path}. Put it into ComfyUI's input folder "
            "and give its name, or give a whole path."
        )
    return path


def report_folder(name: str) -> Path:
    """Where the report goes; ErnieError when `name` leads elsewhere."""
    from ..ernie_core.batch import run_folder

    return run_folder(host.output_folder() / FOLDER, name)


def reading_of(node_id: str | None):
    """on_progress(done, total) while the images are read for the first time."""

    def tell(done: int, total: int) -> None:
        host.throw_if_interrupted()
        if done % 50 == 0:
            host.show_text(node_id, f"reading: {done} of {total} images")

    return tell


def progress_of(scorers: list, node_id: str | None):
    """on_progress(done, total, scorer) over all scorers, with the host's bar; the user can stop it."""
    bar, names = host.progress(1), [s.name for s in scorers]

    def tell(done: int, total: int, scorer: str) -> None:
        host.throw_if_interrupted()
        bar.update_absolute(names.index(scorer) * total + done, len(names) * total)
        host.show_text(node_id, f"{scorer}: {done} of {total} images")

    return tell


def show_report(cls, text: str, *pictures) -> io.NodeOutput:
    """The outputs, with the pictures and the first lines under the node."""
    images = [to_image(p) for p in pictures]
    host.show_text(cls.hidden.unique_id, "\n".join(text.splitlines()[:SHOWN_LINES]))
    files = [file for image in images for file in ui.PreviewImage(image, cls=cls).as_dict()["images"]]
    return io.NodeOutput(text, *images, ui={"images": files, "text": [text]})
