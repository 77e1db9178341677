"""Scores: a number for every picture, and what follows from it: filters, best of N, reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .batch import row_inputs
from .rows import Studio
from .sampling import CUSTOM, MAX_SEED, preset_settings

CATEGORY = "ERNIE/scoring"
Scorer = io.Custom("ERNIE_SCORER")
Scores = io.Custom("ERNIE_SCORES")

FIND, DEFAULT = "find", "default"
KINDS = ("auto", "clip", "pickscore", "hpsv2")
PRECISIONS = (DEFAULT, "fp32", "bf16", "fp16", "int8", "fp8", "nf4")
QUESTIONS = ("artimuse", "plain")
SAVES = ("nothing", "table", "table and pictures")
RULES = ("threshold", "top k", "top share")
RERANK = "rerank 4, keep 1"
REJECTED = ("delete", "keep")
MEASURES = ("combined", "sharpness", "cleanliness", "exposure", "contrast", "colourfulness", "text_legibility")
BUILTIN = tuple(f"built-in {measure}" for measure in MEASURES)


def batch_size_input() -> io.Int.Input:
    return io.Int.Input(
        "batch_size",
        default=8,
        min=1,
        max=256,
        tooltip="Pictures that the scorer sees at once, 1 to 256: speed against memory. Scores stay the same.",
    )


class ErnieLoadScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadScorer",
            display_name="Load Scorer (ERNIE)",
            category=CATEGORY,
            description="Loads what gives pictures a score: ERNIE-Image-Aes, LAION, PickScore, HPS v2, ImageReward, "
            "CLIP, or a measure that needs no model.",
            inputs=[
                io.Combo.Input(
                    "scorer_name",
                    options=[*BUILTIN, *host.list_scorers()],
                    tooltip="A built-in measure, or a file or folder (ends with /) from models/scorers, "
                    "models/aesthetic or "
                    "models/clip_vision. What it is follows from its content.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="auto",
                    tooltip="Which score a CLIP gives. auto: by its name, pickscore and hpsv2 where that says so, else "
                    "the plain CLIP score. Other scorers: auto only.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=DEFAULT,
                    tooltip="Type of the weights. default: bf16 for ERNIE-Image-Aes (13.7 GB), its own for a file in "
                    "4 bits, fp32 for the others. int8 and fp8 take half of ERNIE-Image-Aes' memory, nf4 a quarter "
                    "(3.9 GB), at some cost in exactness.",
                ),
                io.Combo.Input(
                    "backbone",
                    options=[FIND, *host.list_scorers()],
                    default=FIND,
                    tooltip="CLIP ViT-L/14 for a LAION head. find: the first that fits in those folders. Not read "
                    "for others.",
                ),
                io.Combo.Input(
                    "question",
                    options=list(QUESTIONS),
                    default="artimuse",
                    tooltip="How ERNIE-Image-Aes is asked. artimuse: as it was trained. plain: without indentation, "
                    "as some other programs do. Not read for others.",
                ),
            ],
            outputs=[Scorer.Output(display_name="scorer", tooltip="Scorer for Score Images, Best of N and others.")],
        )

    @classmethod
    def execute(cls, scorer_name: str, kind: str, precision: str, backbone: str, question: str) -> io.NodeOutput:
        from ..ernie_core.scoring.loading import find_builtin, load_scorer

        builtin = find_builtin(scorer_name)
        if builtin is not None:
            if (kind, precision, backbone) != ("auto", DEFAULT, FIND):
                raise ErnieError(
                    f"{scorer_name} has no weights: set kind to auto, precision to {DEFAULT} and backbone to {FIND}."
                )
            return io.NodeOutput(builtin)
        scorer = load_scorer(
            host.scorer_path(scorer_name),
            kind=kind,
            backbone=None if backbone == FIND else host.scorer_path(backbone),
            backbones=(host.scorer_path(name) for name in host.list_scorers()),
            tokenizer_folders=host.tokenizer_folders(),
            precision=None if precision == DEFAULT else precision,
            style=question,
            ops=host.scorer_layers(),
            place=host.place_scorer,
        )
        return io.NodeOutput(scorer)


class ErnieScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieScoreImages",
            display_name="Score Images (ERNIE)",
            category=CATEGORY,
            description="Gives every picture a number: from the graph, or all pictures of a folder.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                Scorer.Input("scorer", tooltip="From Load Scorer."),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Folder with pictures, its sub-folders are categories; relative paths start in the input "
                    "folder, "
                    "then in the output folder. Empty: the pictures of the input images.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="For scorers that read prompts: one for all, or one line per picture. Empty: the text file "
                    "beside a picture, or what this pack wrote into its PNG.",
                ),
                batch_size_input(),
                io.Boolean.Input(
                    "draw",
                    default=True,
                    tooltip="On: the number is drawn on the pictures handed on. Off: as they came.",
                ),
                io.Boolean.Input(
                    "collect",
                    default=True,
                    tooltip="On: hand the pictures on. Off: only their scores, for folders too large for memory.",
                ),
                io.Combo.Input(
                    "save",
                    options=list(SAVES),
                    default="nothing",
                    tooltip="What is written into the output folder under name. table: scores.csv and scores.json. "
                    "table and "
                    "pictures: also PNG copies with the score inside; the originals are never changed.",
                ),
                io.String.Input("name", default="scores", tooltip="Folder inside the output folder for save."),
                io.Image.Input("images", optional=True, tooltip="Pictures, a batch or a list; when folder is empty."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="The scored pictures in order, with their numbers when draw is on.",
                ),
                Scores.Output(
                    display_name="scores", tooltip="All scores, for Filter by Score, Score Report and pairs."
                ),
                io.Float.Output(display_name="values", is_output_list=True, tooltip="The numbers as a list."),
                io.String.Output(display_name="report", tooltip="Scores in order, best first, and what went wrong."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: Any = "", **others) -> list:
        """Changes with the pictures of the folder."""
        folder = first(folder) or ""
        try:
            path = find_folder(folder) if folder.strip() else None
        except ErnieError:
            return [folder]
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path is not None else []
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found]

    @classmethod
    def execute(cls, scorer, folder, prompts, batch_size, draw, collect, save, name, images=None) -> io.NodeOutput:
        folder, save = first(folder).strip(), first(save)
        pictures = split(images)
        if bool(folder) == bool(pictures):
            raise ErnieError("either images or folder must be given, got " + ("both." if pictures else "neither."))
        options = (first(scorer), lines_of(first(prompts)), first(batch_size), cls.hidden.unique_id)
        scores, problems = score_pictures(pictures, *options) if pictures else score_folder(folder, *options)
        if save != SAVES[0]:
            target = save_table(scores, first(name))
            if save == SAVES[2]:
                save_pictures(scores, pictures, target, cls.hidden)
        out = list(drawn(scores, pictures, draw=first(draw))) if first(collect) else []
        text = describe(scores, problems)
        return io.NodeOutput(out, scores, list(scores.values), text, ui={"text": [text]})


class ErnieFilterByScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieFilterByScore",
            display_name="Filter by Score (ERNIE)",
            category=CATEGORY,
            description="Parts scored pictures into those to keep and the others.",
            is_input_list=True,
            inputs=[
                Scores.Input("scores", tooltip="From Score Images."),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default="top k",
                    tooltip="threshold: scores of at least the threshold. top k: the k best. top share: the best "
                    "share.",
                ),
                io.Float.Input(
                    "threshold",
                    default=50.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Least score to keep, -1000 to 1000, in the scorer's own numbers, for rule threshold.",
                ),
                io.Int.Input(
                    "k", default=1, min=1, max=100_000, tooltip="How many to keep, 1 to 100000, for rule top k."
                ),
                io.Float.Input(
                    "share",
                    default=0.5,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    tooltip="Share to keep, 0.001 to 1, rounded up, for rule top share. 1 (neutral) keeps all.",
                ),
                io.Boolean.Input(
                    "per_prompt", default=False, tooltip="On: k and share count within each prompt. Off: among all."
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The scored pictures in the same order; pictures of a folder are read from there.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="kept", is_output_list=True, tooltip="Pictures to keep, in their order."),
                io.Image.Output(display_name="rejected", is_output_list=True, tooltip="The others, in their order."),
                Scores.Output(display_name="kept_scores", tooltip="Scores of the kept ones."),
                Scores.Output(display_name="rejected_scores", tooltip="Scores of the others."),
                io.String.Output(display_name="report", tooltip="How many were kept, and the scores at the border."),
            ],
        )

    @classmethod
    def execute(cls, scores, rule, threshold, k, share, per_prompt, images=None) -> io.NodeOutput:
        from ..ernie_core.scoring.scorer import choose

        scores, rule = first(scores), first(rule)
        pictures = split(images)
        check_match(scores, pictures)
        limit = first({"threshold": threshold, "top k": k, "top share": share}[rule])
        option = {"threshold": "threshold", "top k": "top_k", "top share": "top_share"}[rule]
        places = choose(scores, **{option: limit}, per_prompt=first(per_prompt))
        others = [i for i in range(len(scores)) if i not in set(places)]
        kept, rejected = scores.chosen(places), scores.chosen(others)
        report = f"{len(kept)} kept, {len(rejected)} not ({rule} {limit:g}, {scores.scorer})"
        report += "".join(span(name, part) for name, part in (("kept", kept), ("not kept", rejected)))
        images = [[to_image(scores, pictures, i) for i in part] for part in (places, others)]
        return io.NodeOutput(*images, kept, rejected, report)


class ErnieBestOfN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieBestOfN",
            display_name="Best of N (ERNIE)",
            category=CATEGORY,
            description="Makes N pictures per prompt, scores them and keeps the best; goes on where an interrupted run "
            "stopped.",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="ERNIE-Image model, from these loaders or from core's."),
                io.Clip.Input("clip", tooltip="Text encoder, from these loaders or from core's."),
                io.Vae.Input("vae", tooltip="FLUX.2 VAE, from these loaders or from core's."),
                Scorer.Input("scorer", tooltip="What decides, from Load Scorer."),
                io.String.Input(
                    "source",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line (# starts a comment); or the path of a .txt, .csv or .jsonl file, as "
                    "for Batch "
                    "from Prompts.",
                ),
                io.String.Input(
                    "name",
                    default="best_of_n",
                    tooltip="Folder inside the output folder. Candidates that were scored there are not made again: "
                    "take a "
                    "new name when you change model or LoRA.",
                ),
                io.Combo.Input(
                    "choice",
                    options=[CUSTOM, RERANK],
                    default=CUSTOM,
                    tooltip="custom: n and keep from below. rerank 4, keep 1: as ERNIE-ViLG 2.0 does with CLIP; needs "
                    "a scorer that reads the prompt.",
                ),
                io.Int.Input("n", default=4, min=1, max=4096, tooltip="Candidates per prompt, 1 to 4096; 1 makes one."),
                io.Int.Input("keep", default=1, min=1, max=4096, tooltip="How many of them to keep, 1 to 4096."),
                io.Combo.Input(
                    "rejected",
                    options=list(REJECTED),
                    default="delete",
                    tooltip="What becomes of the others. delete: files go, scores stay. keep: they go to the "
                    "folder "
                    "rejected, for preference pairs.",
                ),
                batch_size_input(),
                *row_inputs(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Each prompt's first candidate gets this seed, its second the next, and so on; a seed "
                    "column goes before.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The kept pictures, best first in each prompt."
                ),
                Scores.Output(display_name="kept", tooltip="Scores of the kept pictures, which name their files."),
                Scores.Output(
                    display_name="candidates",
                    tooltip="Scores of all candidates, for Score Report and, when rejected ones are kept, for pairs.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was made and kept, best score and mean per prompt."
                ),
                io.String.Output(display_name="folder", tooltip="Path of the run's folder: the kept pictures."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str, name: str, **others) -> list:
        """Changes with the prompt files and with what lies in the folder."""
        from ..ernie_core.batch import fingerprint

        return fingerprint(source, name, inputs=host.input_folder(), output=host.output_folder())

    @classmethod
    def execute(
        cls, model, clip, vae, scorer, source, name, choice, n, keep, rejected, batch_size, **row
    ) -> io.NodeOutput:
        from ..ernie_core.batch import read_image, run_folder
        from ..ernie_core.scoring.best_of import run_best_of

        n, keep = check_choice(scorer, choice, n, keep)
        groups, problems = candidates(source, n, **row)
        folder = run_folder(host.output_folder(), name)
        result = run_best_of(
            groups,
            folder,
            scorer,
            keep=keep,
            rejected=rejected,
            batch_size=batch_size,
            **best_of_callbacks(model, clip, vae, cls.hidden, n * len(groups)),
        )
        images = [read_image(Path(file))[None] for file in result.kept.files]
        report = "\n".join([*best_lines(result), f"in {folder}", *(str(p) for p in problems)])
        return io.NodeOutput(images, result.kept, result.candidates, report, str(folder), ui={"text": [report]})


class ErnieScoreReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieScoreReport",
            display_name="Score Report (ERNIE)",
            category=CATEGORY,
            description="Draws what scores say: histogram, tables by prompt and category, best and worst pictures.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                Scores.Input("scores", tooltip="From Score Images or Best of N; several are drawn beside each other."),
                io.Int.Input(
                    "shown",
                    default=6,
                    min=0,
                    max=48,
                    tooltip="How many of the best and of the worst pictures are drawn, 0 to 48. 0 (neutral): none.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Folder inside the output folder for scores.csv and scores.json. Empty (neutral): none.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The scored pictures in the same order, where scores do not name files.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The report as one picture."),
                io.String.Output(display_name="report", tooltip="The same numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, scores, shown, name, images=None) -> io.NodeOutput:
        from ..ernie_core.scoring.report import draw_report, summarise

        sets = [s for s in scores if s is not None]
        pictures = split(images)
        if pictures and len(sets) > 1:
            raise ErnieError("images belong to one set of scores, got several; leave images unconnected.")
        if pictures:
            check_match(sets[0], pictures)
        if first(name).strip():
            save_tables(sets, first(name))
        sheet = draw_report(sets, lambda one, place: read_picture(one, pictures, place), shown=first(shown))
        text = summarise(sets)
        return io.NodeOutput(as_image(sheet), text, ui={"text": [text]})


# --- between nodes and engine ----------------------------------------------------------------------------------------


def first(values: Any) -> Any:
    """A widget's value, which comes as a list of one, linked as (None,), to a node that takes lists."""
    return values[0] if isinstance(values, (list, tuple)) else values


def split(images: Any) -> list:
    """Pictures [H, W, C], one by one, of batches and lists; nothing is copied."""
    return [picture for batch in images or [] if batch is not None for picture in batch]


def lines_of(prompts: str) -> list[str]:
    return [line.strip() for line in prompts.splitlines() if line.strip()]


def match_prompts(given: list[str], count: int) -> Any:
    """None where nothing was given, one text for all, or one per picture."""
    if not given:
        return None
    if len(given) == 1:
        return given[0]
    if len(given) != count:
        raise ErnieError(f"one prompt or {count} lines expected, one per picture, got {len(given)}.")
    return given


def score_pictures(pictures: list, scorer, prompts: list[str], batch_size: int, node_id) -> tuple[Any, tuple[str, ...]]:
    """Scores of pictures of the graph, and no problems."""
    from ..ernie_core.scoring.scorer import make_scores

    texts = match_prompts(prompts, len(pictures))
    report = reporter(node_id, len(pictures), scorer.name)
    values = scorer.score(pictures, texts, batch_size=batch_size, on_scored=report)
    return make_scores(scorer, values, prompts=texts), ()


def score_folder(folder: str, scorer, prompts: list[str], batch_size: int, node_id) -> tuple[Any, tuple[str, ...]]:
    """Scores of a folder's pictures, and a line per picture that could not be used."""
    from ..ernie_core.scoring.files import list_pictures, score_files

    path = find_folder(folder)
    files = list_pictures(path)
    texts = match_prompts(prompts, len(files))
    report = reporter(node_id, len(files), scorer.name)
    done = score_files(scorer, files, folder=path, prompts=texts, batch_size=batch_size, on_scored=report)
    return done.scores, done.problems


def span(name: str, scores) -> str:
    """Lowest and highest score, as a line of a report; "" where there are none."""
    return f"\n{name}: {min(scores.values):.4g} to {max(scores.values):.4g}" if len(scores) else ""


def check_choice(scorer, choice: str, n: int, keep: int) -> tuple[int, int]:
    """Candidates per prompt, and how many of them are kept."""
    if choice == RERANK:
        n, keep = 4, 1
        if not scorer.reads_prompt:
            raise ErnieError(
                f"{RERANK} compares pictures with their prompt, {scorer.name} does not read it: load a CLIP, or set "
                "choice to custom."
            )
    if keep > n:
        raise ErnieError(f"keep must be at most n ({n}), got {keep}.")
    return n, keep


def candidates(source: str, n: int, *, preset: str, steps: int, cfg: float, **row) -> tuple[list[list], list]:
    """Per prompt its rows with seeds counted up from the prompt's own, and what could not be read."""
    from dataclasses import replace

    from ..ernie_core.batch import MAX_SEED as LAST_SEED
    from ..ernie_core.batch import Row, read_rows

    steps, cfg = preset_settings(preset, steps, cfg)
    defaults = Row(label="", prompt="", steps=steps, cfg=cfg, **row)
    rows, problems = read_rows(source, defaults, folder=host.input_folder(), count_seeds=False)
    return [[replace(row, seed=(row.seed + i) & LAST_SEED) for i in range(n)] for row in rows], problems


def best_of_callbacks(model, clip, vae, hidden, total: int) -> dict:
    """What the engine's `run_best_of` needs from the host."""
    bar = host.progress(total)
    studio = Studio(models=[model], clip=clip, vae=vae, hidden=hidden)

    def announce(number: int, total: int, row) -> None:
        host.throw_if_interrupted()
        bar.update_absolute(number - 1, total)
        host.show_text(hidden.unique_id, f"candidate {number} of {total}, seed {row.seed}: {row.prompt[:80]}")

    return {
        "encode": studio.encode,
        "generate": studio.generate,
        "save": studio.save,
        "on_candidate": announce,
    }


def find_folder(folder: str) -> Path:
    """The folder that a text names."""
    path = Path(folder.strip().strip('"')).expanduser()
    for candidate in (path,) if path.is_absolute() else (host.input_folder() / path, host.output_folder() / path):
        if candidate.is_dir():
            return candidate
    raise ErnieError(f"there is no folder {folder!r}, neither in the input folder nor in the output folder.")


def reporter(node_id: str | None, total: int, name: str):
    """What is called after each batch: shows how far it is, and stops when the user wants to."""
    bar = host.progress(total)

    def report(done: int) -> None:
        host.throw_if_interrupted()
        bar.update_absolute(done, total)
        host.show_text(node_id, f"{done} of {total}: {name}")

    return report


def check_match(scores, pictures: list) -> None:
    if pictures and len(pictures) != len(scores):
        raise ErnieError(f"images must be the {len(scores)} scored pictures, got {len(pictures)}.")
    if not pictures:
        check_files(scores)


def check_files(scores) -> None:
    """Raise unless every picture behind the scores is a file."""
    missing = sum(not file for file in scores.files)
    if missing == len(scores):
        raise ErnieError("these scores name no files: connect the scored pictures to images as well.")
    if missing:
        raise ErnieError(
            f"{missing} of {len(scores)} scored pictures were deleted: set rejected of Best of N to keep and run again."
        )


def read_picture(scores, pictures: list, place: int):
    """uint8 [H, W, 3] of a scored picture, or None where it is no more."""
    from ..ernie_core.scoring.scorer import to_rgb

    if pictures:
        return to_rgb(pictures[place])
    file = scores.files[place]
    return to_rgb(Path(file)) if file and Path(file).is_file() else None


def to_image(scores, pictures: list, place: int):
    """IMAGE [1, H, W, 3] of a scored picture."""
    from ..ernie_core.batch import read_image

    return pictures[place][None] if pictures else read_image(Path(scores.files[place]))[None]


def as_image(picture):
    """IMAGE [1, H, W, 3] of uint8 [H, W, 3]."""
    import numpy as np
    import torch

    return torch.from_numpy(picture.astype(np.float32) / 255)[None]


def drawn(scores, pictures: list, *, draw: bool) -> Iterator:
    """IMAGE [1, H, W, 3] of each, with its number on it if wanted."""
    from ..ernie_core.scoring.charts import draw_number
    from ..ernie_core.scoring.scorer import to_rgb

    for place, value in enumerate(scores.values):
        image = to_image(scores, pictures, place)
        yield as_image(draw_number(to_rgb(image[0]), f"{value:.4g}")) if draw else image


def save_tables(sets: list, name: str) -> None:
    """`save_table` of each; numbered where there are several."""
    for i, scores in enumerate(sets, start=1):
        save_table(scores, name, "scores" if len(sets) == 1 else f"scores_{i}")


def save_table(scores, name: str, stem: str = "scores") -> Path:
    """Write scores.csv and scores.json into the folder of this name; returns the folder."""
    from ..ernie_core.batch import run_folder
    from ..ernie_core.weights.checkpoint import write_text

    folder = run_folder(host.output_folder(), name)
    write_text(folder / f"{stem}.csv", scores.to_csv())
    write_text(folder / f"{stem}.json", scores.to_json())
    return folder


def save_pictures(scores, pictures: list, folder: Path, hidden) -> None:
    """PNG copies with scorer, score and prompt inside; names begin with the rank."""
    digits = len(str(len(scores)))
    for row, place in zip(scores.rows(), range(len(scores)), strict=True):
        stem = Path(row["label"]).with_suffix("").as_posix().replace("/", "_").replace(" ", "_")
        entries = {"ernie_score": f"{row['score']:.6g}", "ernie_scorer": scores.scorer}
        if row["prompt"]:
            entries["ernie_prompt"] = row["prompt"]
        host.save_png(
            to_image(scores, pictures, place)[0],
            folder / f"{row['rank']:0{digits}}_{stem}.png",
            prompt=hidden.prompt,
            extra_pnginfo=hidden.extra_pnginfo,
            entries=entries,
        )


def describe(scores, problems: tuple[str, ...]) -> str:
    """A line per picture, best first, and what could not be scored."""
    shown = 50
    lines = [f"{len(scores)} scored by {scores.scorer}, {len(problems)} not usable"]
    order = scores.order()
    lines += [f"{scores.values[i]:.4g}  {scores.labels[i]}" for i in order[:shown]]
    if len(order) > shown:
        lines.append(f"... and {len(order) - shown} more")
    return "\n".join([*lines, *problems])


def best_lines(result) -> list[str]:
    """What was made, then best score, mean of the candidates and prompt, a line per prompt."""
    known = len(result.candidates) - result.made
    lines = [f"{result.made} made, {known} already there, {len(result.kept)} kept"]
    for prompt, part in result.candidates.by("prompts").items():
        best = part.values[part.order()[0]]
        lines.append(f"best {best:.4g}, mean {sum(part.values) / len(part):.4g} of {len(part)}: {prompt[:80]}")
    return lines
