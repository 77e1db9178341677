"""What an evaluation ends in: verdicts of a scorer, rates by category, the distance of two folders of pictures."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .dataset import find_path, show
from .judging import Verdicts, read_settings, setting_inputs
from .prompt_sets import CATEGORY
from .scoring import Scorer, batch_size_input, find_folder, reporter
from .tournament import folder_stamp
from .training import to_image

FOLDER = "ernie_evaluations"
CACHE = ".features.sqlite"
NO_MODEL = "choose a model"
AUTO = "auto"
CRITERIA = (AUTO, "alignment", "fidelity")
JUDGES = 4


class ErnieJudgeByScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieJudgeByScorer",
            display_name="Judge by Scorer (ERNIE)",
            category=CATEGORY,
            description="Lets a scorer say which pictures of a prompt set pass, and which of two settings is better.",
            inputs=[
                Scorer.Input("scorer", tooltip="From Load Scorer."),
                *setting_inputs("Folder of the second setting, same prompts and seeds. Empty (neutral): none."),
                io.Combo.Input(
                    "criterion",
                    options=list(CRITERIA),
                    default=AUTO,
                    tooltip="What the scorer's numbers stand for. auto: alignment for scorers that read the prompt "
                    "(CLIP, PickScore, ...), fidelity for the others.",
                ),
                io.Float.Input(
                    "threshold",
                    default=50.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Least score that passes, -1000 to 1000, in the scorer's own numbers. Pass rates of "
                    "scorers are only as good as this number: side by side needs none.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Scores no further apart than this are no difference, 0 to 1000. 0 (neutral) = only equal "
                    "ones.",
                ),
                batch_size_input(),
            ],
            outputs=[
                Verdicts.Output(display_name="verdicts", tooltip="For Evaluation Report."),
                io.String.Output(display_name="summary", tooltip="How many verdicts, and what is amiss."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, first: str | None = "", second: str | None = "", **others) -> str:
        """Changes with the folders. What is linked comes as None."""
        return f"{folder_stamp(first or '')} {folder_stamp(second or '')}"

    @classmethod
    def execute(cls, scorer, first, second, criterion, threshold, margin, batch_size) -> io.NodeOutput:
        from ..ernie_core.evaluation.verdicts import judge_by_scorer

        settings = read_settings(first, second)
        found = judge_by_scorer(
            settings,
            scorer,
            criterion=None if criterion == AUTO else criterion,
            threshold=threshold,
            margin=margin,
            batch_size=batch_size,
            on_scored=reporter(cls.hidden.unique_id, sum(len(s.pictures) for s in settings), scorer.name),
        )
        summary = "\n".join([f"{scorer.name}: {len(found)} verdicts on {' and '.join(s.name for s in settings)}",
                             *found.notes])  # fmt: skip
        return io.NodeOutput(found, show(cls.hidden.unique_id, summary))


class ErnieEvaluationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        more = "Verdicts of another judge, in tables of their own."
        return io.Schema(
            node_id="ErnieEvaluationReport",
            display_name="Evaluation Report (ERNIE)",
            category=CATEGORY,
            description="Pass rates and wins by category with 95 % intervals, every number traceable to its verdicts.",
            is_output_node=True,
            inputs=[
                Verdicts.Input("verdicts", tooltip="From Judge by People or Judge by Scorer."),
                *[Verdicts.Input(f"verdicts_{i}", optional=True, tooltip=more) for i in range(2, JUDGES + 1)],
                io.String.Input(
                    "name",
                    default="report",
                    tooltip=f"Folder in output/{FOLDER} for report.md, rates.csv, verdicts.csv, report.json and "
                    "report.png; files of an earlier run are replaced.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    tooltip="A verdicts.csv of another judge, such as your own program: the columns judge, criterion, "
                    "outcome, number, prompt, category, seed, setting, file. Relative paths start in the input "
                    "folder. Empty (neutral): none.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Charts and tables below each other."),
                io.String.Output(display_name="report", tooltip="All tables as Markdown."),
                io.String.Output(display_name="rates", tooltip="CSV: a row per rate, with its interval and counts."),
                io.String.Output(display_name="folder", tooltip="Path of the report's folder."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = "", **others) -> list:
        """Changes with the file. What is linked comes as None."""
        path = find_path(file or "")
        return [file, path.stat().st_mtime_ns if path.is_file() else 0]

    @classmethod
    def execute(cls, verdicts, name, file, **others) -> io.NodeOutput:
        from ..ernie_core.batch import run_folder
        from ..ernie_core.evaluation.report import make_report, read_verdicts, write_report
        from ..ernie_core.evaluation.verdicts import join

        folder = run_folder(host.output_folder() / FOLDER, name)
        parts = [verdicts, *(others[key] for key in sorted(others) if others[key] is not None)]
        if file.strip():
            parts.append(read_verdicts(find_path(file)))
        found = make_report(Path(name.strip()).name, join(parts))
        write_report(found, folder)
        text = found.to_markdown()
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(to_image(found.picture()), text, found.rates_csv(), str(folder), ui={"text": [text]})


class ErnieFolderDistance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieFolderDistance",
            display_name="Distance of Folders (ERNIE)",
            category=CATEGORY,
            description="FID and CMMD between two folders of pictures, with features of a vision model that you have.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[NO_MODEL, *host.list_scorers()],
                    default=NO_MODEL,
                    tooltip="A vision model from models/clip_vision, models/scorers or models/aesthetic: a folder of "
                    "CLIP, SigLIP, DINOv2, ResNet or any other of transformers with a pooled output, or a CLIP's file. "
                    "CMMD's authors take CLIP ViT-L/14 at 336 px.",
                ),
                io.String.Input(
                    "first",
                    default="",
                    tooltip="Folder with pictures, sub-folders included, such as real ones; relative paths start in "
                    "the input folder, then in the output folder.",
                ),
                io.String.Input("second", default="", tooltip="The other folder, such as painted ones."),
                io.Int.Input(
                    "batch_size",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Pictures that the model sees at once, 1 to 256: speed against memory. Numbers stay the "
                    "same.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="fid", tooltip="Frechet distance of the raw features; 0 = the same."),
                io.Float.Output(
                    display_name="cmmd",
                    tooltip="1000 x squared MMD, unbiased, of features of length 1; about 0 = alike.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Both with counts, CMMD as published, warnings, unreadable pictures."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, first: str | None = "", second: str | None = "", **others) -> list:
        """Changes with the pictures. What is linked comes as None."""
        return [stamp(first or ""), stamp(second or "")]

    @classmethod
    def execute(cls, model_name, first, second, batch_size) -> io.NodeOutput:
        from ..ernie_core.evaluation.features import load_feature_model, measure_folders

        if model_name == NO_MODEL:
            raise ErnieError(f"model_name is '{NO_MODEL}': put a CLIP or another vision model into models/clip_vision.")
        folders = [find_folder(folder) for folder in (first, second)]
        model = load_feature_model(host.scorer_path(model_name), place=host.place_scorer)
        found = measure_folders(
            *folders,
            model,
            cache=host.output_folder() / FOLDER / CACHE,
            batch_size=batch_size,
            on_progress=progress_of(cls.hidden.unique_id),
        )
        report = show(cls.hidden.unique_id, found.report())
        return io.NodeOutput(found.distances.fid, found.distances.cmmd, report, ui={"text": [report]})


def stamp(folder: str) -> list:
    """Changes with the pictures of a folder and below; empty where there is none, which the run itself reports."""
    try:
        files = sorted(find_folder(folder).rglob("*")) if folder.strip() else []
    except ErnieError:
        return []
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def progress_of(node_id: str | None):
    """on_progress(what, done, total) with the host's bar; the user can stop it."""
    bar = host.progress(1)

    def tell(what: str, done: int, total: int) -> None:
        host.throw_if_interrupted()
        bar.update_absolute(done, total)
        host.show_text(node_id, f"{what}: {done} of {total}")

    return tell
