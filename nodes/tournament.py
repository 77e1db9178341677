"""Tournaments of pictures: a person answers which of two looks better, and the answers become a ranking and pairs.

The node brings the pictures and reads the results; in between the page (web/tournament.js) asks and answers through
the routes below and in panel_routes.py, and every answer is on the disk before the next question is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .dataset import ADVANCED, Pairs, on_progress, show
from .panel_routes import Sessions, public
from .scoring import check_files

if TYPE_CHECKING:
    from ..ernie_core.scoring.judgments import Progress, Ranked, Setup
    from ..ernie_core.scoring.pairs import Preference

CATEGORY = "ERNIE/scoring"
Scores = io.Custom("ERNIE_SCORES")

QUESTION = "Which one looks better?"
MEETS = ("all pictures", "same prompt only")
UNTIL = ("wait", "current standing")
RESULTS = ("this annotator", "all annotators")
PAIRS_FROM = ("best against worst", "every pair", "judged pairs")
RULES = ("best against worst", "every pair")
SHOWN_RANKS = 10  # on the node; the output has them all


def pair_inputs(unit: str) -> list[io.Input]:
    """Which pairs are made of values."""
    return [
        io.Float.Input(
            "min_gap",
            default=0.5 if unit == "strength" else 0.0,
            min=0.0,
            max=1e6,
            step=0.05,
            tooltip=(
                "Least difference of strength that makes a pair, 0 to 1000000: at 0.5 the better one wins 62 of 100 "
                "judgments, at 1 73. With all annotators it is a difference of ranks between 0 and 1. 0 = any."
                if unit == "strength"
                else "Least difference of the scores that makes a pair, 0 to 1000000, in the scorer's own numbers. "
                "0 = any."
            ),
        ),
        io.Int.Input(
            "max_per_prompt",
            default=0,
            min=0,
            max=10_000,
            tooltip="Pairs kept per prompt, those with the widest gaps, 0 to 10000. 0 (neutral) = all.",
        ),
        io.Boolean.Input(
            "save_pairs",
            default=False,
            tooltip="On: pairs are also written as folders chosen and rejected and pairs.jsonl, for other trainers. "
            "Off (neutral): only the output.",
        ),
    ]


class ErnieTournament(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieTournament",
            display_name="Tournament (ERNIE)",
            category=CATEGORY,
            description="Asks a person which of two pictures looks better until all are ranked by a Swiss tournament.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "name",
                    default="tournament",
                    tooltip="Name of the tournament: the same name and annotator go on where they were.",
                ),
                io.String.Input(
                    "annotator",
                    default="me",
                    tooltip="Who answers. Each person plays a tournament of their own under the same name.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Folder of pictures: a name in ComfyUI's input or output folder, or a whole path in these "
                    "or in the ernie_images folders of extra_model_paths.yaml. Not read when images are connected.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line, one line per picture; or a single line for all. Empty: the .txt "
                    "beside a picture, else the prompt in its metadata.",
                ),
                io.Int.Input(
                    "rounds",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="How often every picture is shown, 0 to 1000. 0: by the number of pictures (8 for 64, 12 "
                    "for 1000, 16 for 10000); more give a surer ranking.",
                ),
                io.Combo.Input(
                    "meet",
                    options=list(MEETS),
                    default=MEETS[0],
                    tooltip="Which pictures are shown together. same prompt only: a ranking for each prompt, as pairs "
                    "for training need it.",
                ),
                io.Combo.Input(
                    "until_complete",
                    options=list(UNTIL),
                    default=UNTIL[0],
                    tooltip="While answers are missing. wait: nodes behind this one do not run. current standing: they "
                    "get what is known now.",
                ),
                io.Combo.Input(
                    "result",
                    options=list(RESULTS),
                    default=RESULTS[0],
                    tooltip="Whose ranking comes out. all annotators: the mean of everybody's ranks; answers of "
                    "different people are never mixed.",
                ),
                io.Int.Input(
                    "top_k",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="How many pictures come out as images, best first, 1 to 1000.",
                ),
                io.Combo.Input(
                    "pairs_from",
                    options=list(PAIRS_FROM),
                    default=PAIRS_FROM[0],
                    tooltip="Pairs of the same prompt. best against worst: the best with the worst, the second with "
                    "the last but one. every pair: all of them. judged pairs: those that were shown and decided.",
                ),
                *pair_inputs("strength"),
                io.String.Input(
                    "question",
                    default=QUESTION,
                    tooltip="What is asked above the two pictures.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "repeat_share",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of questions that come a second time with sides changed, 0 to 1: they tell how "
                    "steady the answers are and do not count otherwise. 0 (neutral) = none.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "pass_share",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the calibration that must be right before the tournament begins, 0 to 1. Not "
                    "read without calibration.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "order_seed",  # not "seed": pages give that one a control that changes it with every run
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Seed of sides and order of a new tournament, 0 to 2147483647.",
                    extra_dict=ADVANCED,
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of the graph; they are kept as files in output/ernie_tournaments.",
                ),
                Pairs.Input(
                    "calibration",
                    optional=True,
                    tooltip="Pairs whose better one is known: they are asked first, and who fails cannot go on.",
                ),
                io.String.Input(
                    "folder_2",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="A second folder whose pictures meet those of the first, such as before and after "
                    "training. Not read when images are connected.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The top_k best pictures, best first."
                ),
                Scores.Output(display_name="scores", tooltip="Strength of every picture, best first."),
                Pairs.Output(display_name="pairs", tooltip="Preference pairs, for Train."),
                io.String.Output(
                    display_name="ranking", tooltip="The whole ranking as a CSV table, with tiers 1 to 10."
                ),
                io.Boolean.Output(display_name="complete", tooltip="Whether everything was answered."),
                io.String.Output(display_name="summary", tooltip="How far it is, agreement, files, what was wrong."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = "", folder: str | None = "", folder_2=None, **others) -> str:
        """Changes with every answer, and with the files of the folder. What is linked comes as None."""
        from ..ernie_core.scoring import judgments

        with judgments.open_store(store_path()) as store:
            answers = judgments.fingerprint(store, None if name is None else name.strip())
        return f"{answers} {folder_stamp(folder or '')} {folder_stamp(folder_2 or '')}"

    @classmethod
    def execute(
        cls, name, annotator, folder, prompts, rounds, meet, until_complete, result, top_k, pairs_from, min_gap,
        max_per_prompt, save_pairs, question, repeat_share, pass_share, order_seed, images=None, calibration=None,
        folder_2=None,
    ) -> io.NodeOutput:  # fmt: skip
        from ..ernie_core.scoring import judgments

        setup = judgments.Setup(
            name=name.strip(),
            annotator=annotator.strip(),
            pictures=collect(images, (folder, folder_2), name, prompts, (cls.hidden.prompt, cls.hidden.extra_pnginfo)),
            rounds=rounds,
            question=question.strip() or QUESTION,
            seed=order_seed,
            per_prompt=meet == MEETS[1],
            repeat_share=repeat_share,
            calibration=known_pairs(calibration),
            pass_share=pass_share,
        )
        pairs = {"pairs_from": pairs_from, "min_gap": min_gap, "save_pairs": save_pairs}
        merged, most = result == RESULTS[1], max_per_prompt or None
        wanted = Wanted(**pairs, max_per_prompt=most, top_k=top_k, merged=merged)
        return report(cls.hidden.unique_id, setup, wanted, wait=until_complete == UNTIL[0])


class ErniePairsFromScores(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErniePairsFromScores",
            display_name="Pairs from Scores (ERNIE)",
            category=CATEGORY,
            description="Makes preference pairs of pictures of the same prompt whose scores are far enough apart.",
            inputs=[
                Scores.Input("scores", tooltip="What a scorer or a tournament said about the pictures."),
                io.String.Input(
                    "name",
                    default="pairs",
                    tooltip="Folder in output/ernie_pairs for pictures of the graph and for saved pairs.",
                ),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default=RULES[0],
                    tooltip="Which pictures of a prompt make pairs. best against worst: the best with the worst, the "
                    "second with the last but one; with max_per_prompt 1 just the first. every pair: all of them.",
                ),
                *pair_inputs("score"),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The scored pictures in the same order, where scores do not name files.",
                ),
            ],
            outputs=[
                Pairs.Output(display_name="pairs", tooltip="Preference pairs, for Train."),
                io.String.Output(display_name="summary", tooltip="Counts, and everything that was found wrong."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, scores, name, rule, min_gap, max_per_prompt, save_pairs, images=None) -> io.NodeOutput:
        from ..ernie_core.batch import run_folder
        from ..ernie_core.scoring.pairs import prefer

        folder = run_folder(host.output_folder() / "ernie_pairs", name)
        pictures = valued(scores, images, folder / "pictures", (cls.hidden.prompt, cls.hidden.extra_pnginfo))
        chosen = prefer(pictures, rule, min_gap=min_gap, max_per_prompt=max_per_prompt or None)
        made, lines = finish_pairs(chosen, scores.scorer, folder if save_pairs else None)
        return io.NodeOutput(made, show(cls.hidden.unique_id, "\n".join([made.report(), *lines])))


# --- pictures -------------------------------------------------------------------------------------------------------


def store_path() -> Path:
    """The file that holds everybody's judgments."""
    return host.user_folder() / "judgments.sqlite"


def collect(images, folders: tuple[str, str | None], name: str, prompts: str, metadata: tuple[Any, Any]) -> tuple:
    """The tournament's `Picture`s, from the graph or from one folder or two."""
    from ..ernie_core.batch import run_folder
    from ..ernie_core.scoring.judgments import Picture
    from ..ernie_core.scoring.pairs import read_prompt

    if images is not None:
        kept = run_folder(host.output_folder() / "ernie_tournaments", name) / "pictures"
        files = keep_images(images, kept, metadata)
    else:
        given = [folders[0], *(folder for folder in folders[1:] if folder)]
        files = [file for folder in given for file in list_pictures(find_folder(folder))]
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if len(lines) not in (0, 1, len(files)):
        raise ErnieError(f"{len(files)} pictures need 1 or {len(files)} prompts, one per line; got {len(lines)}.")
    # Files of the graph hold the graph that made them, not always the picture's own prompt.
    found = lines * len(files) if len(lines) == 1 else lines or [read_prompt(file) for file in files]
    several = len({file.parent for file in files}) > 1
    labels = [f"{file.parent.name}/{file.name}" if several else file.name for file in files]
    named = zip(files, labels, found, strict=True)
    return tuple(Picture(path=str(file), label=label, prompt=text) for file, label, text in named)


def keep_images(images, folder: Path, metadata: tuple[Any, Any]) -> list[Path]:
    """A PNG per picture, named by place and content: the same pictures are the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, image_HWC in enumerate(images, start=1):
        pixels = (image_HWC[..., :3].clamp(0, 1) * 255).byte().cpu().numpy()
        digest = hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest()[:12]
        file = (folder / f"{number:05}_{digest}.png").resolve()
        if not file.is_file():
            host.save_png(image_HWC[..., :3], file, prompt=metadata[0], extra_pnginfo=metadata[1], entries={})
        files.append(file)
    return files


def find_folder(folder: str) -> Path:
    """The folder that is meant, inside of what the host allows."""
    named = folder.strip()
    roots = [root.resolve() for root in host.picture_folders()]
    tried = [(root / Path(named).expanduser()).resolve() for root in roots] if named else []
    for path in tried:
        if path.is_dir() and any(path.is_relative_to(root) for root in roots):
            return path
    raise ErnieError(
        f"folder must be a folder of pictures in ComfyUI's input or output folder, got {folder!r}. Put it there, or "
        "add its place as ernie_images to extra_model_paths.yaml; or connect images."
    )


def list_pictures(folder: Path) -> list[Path]:
    from ..ernie_core.training.pictures import SUFFIXES

    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if len(files) < 2:
        raise ErnieError(f"{folder} must hold at least two pictures ({', '.join(SUFFIXES)}), it holds {len(files)}.")
    return files


def folder_stamp(folder: str) -> str:
    """Changes when pictures or their texts do; empty where there is no folder, which the run itself reports."""
    from .dataset import fingerprint

    try:
        return fingerprint(find_folder(folder)) if folder.strip() else ""
    except (ErnieError, OSError):
        return ""


def known_pairs(pairs) -> tuple:
    """(better, worse) `Picture`s of a calibration."""
    from ..ernie_core.scoring.judgments import Picture

    if pairs is None:
        return ()
    sides = [(pair.chosen.image.resolve(), pair.rejected.image.resolve()) for pair in pairs.pairs]
    roots = [root.resolve() for root in host.picture_folders()]
    for path in (path for pair in sides for path in pair):
        if not any(path.is_relative_to(root) for root in roots):
            raise ErnieError(
                f"the calibration's picture {path} must lie in ComfyUI's input or output folder to be shown; put it "
                "there, or add its place as ernie_images to extra_model_paths.yaml."
            )
    return tuple((Picture(path=str(a)), Picture(path=str(b))) for a, b in sides)


def valued(scores, images, folder: Path, metadata: tuple[Any, Any]) -> list:
    """The `Valued` pictures behind scores, kept as files where they come from the graph; more is better."""
    from ..ernie_core.scoring.pairs import Valued

    if images is not None:
        if len(images) != len(scores.values):
            raise ErnieError(
                f"images and scores must be of the same pictures, got {len(images)} and {len(scores.values)}."
            )
        files = keep_images(images, folder, metadata)
    else:
        check_files(scores)
        files = [Path(file) for file in scores.files]
    sign = 1.0 if scores.higher_is_better else -1.0
    told = zip(files, scores.values, scores.prompts, strict=True)
    return [Valued(path=file, value=sign * value, prompt=prompt) for file, value, prompt in told]


# --- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a tournament's node is to hand out."""

    pairs_from: str
    min_gap: float
    max_per_prompt: int | None
    save_pairs: bool
    top_k: int
    merged: bool
    """Whether everybody's ranking is asked for."""


def report(node_id: str | None, setup: Setup, wanted: Wanted, *, wait: bool) -> io.NodeOutput:
    """The node's outputs as the tournament stands."""
    from ..ernie_core.batch import run_folder
    from ..ernie_core.scoring import judgments

    folder = run_folder(host.output_folder() / "ernie_tournaments", setup.name)
    with judgments.open_store(store_path()) as store:
        id_ = judgments.begin(store, setup)
        state = judgments.progress(store, id_)
        ui = {"ernie_tournament": [public(state)]}
        lines = [tell(state)]
        if wait and not state.complete:
            blocked = host.block_output()
            summary = show(node_id, "\n".join(lines))
            return io.NodeOutput([blocked], blocked, blocked, blocked, False, summary, ui=ui)
        ranking = judgments.rank_merged(store, setup.name) if wanted.merged else judgments.rank(store, id_)
        lines += [
            *agreement_lines(store, judgments, id_, setup.name),
            *save_results(store, judgments, id_, ranking, folder),
        ]
        preferences = choose(store, judgments, setup.name, id_, ranking, wanted)
    pairs, more = try_pairs(preferences, setup.name, folder if wanted.save_pairs else None)
    lines += [*more, *(f"{r.place}. {r.label}  {r.value:.2f}  tier {r.tier}" for r in ranking[:SHOWN_RANKS])]
    summary = show(node_id, "\n".join(lines))
    images = [load(Path(ranked.path)) for ranked in ranking[: wanted.top_k]]
    return io.NodeOutput(images, scores_of(setup.name, ranking), pairs, table(ranking), state.complete, summary, ui=ui)


def tell(state: Progress) -> str:
    """One line: how far it is."""
    who = f"{state.name}, {state.annotator}"
    if state.complete:
        return f"{who}: complete, {state.done} judgments on {state.num_pictures} pictures"
    if state.stage == "refused":
        right = f"{state.calibration_right} of {state.calibration_total}"
        return f"{who}: the calibration was not passed ({right} right); open the tournament to try again"
    now = "calibration" if state.stage == "calibrating" else f"round {state.round} of {state.rounds}"
    return f"{who}: {state.left} judgments left, {state.done} done ({now}); press Open tournament to answer"


def agreement_lines(store, judgments, id_: int, name: str) -> list[str]:
    lines = []
    steady = judgments.consistency(store, id_)
    if steady.repeated:
        lines.append(f"same answer to {steady.same} of {steady.repeated} repeated pairs (kappa {steady.kappa:.2f})")
    for a in judgments.agree(store, name):
        lines.append(
            f"{a.first} and {a.second}: Kendall's tau {a.tau:.2f} on {a.shared_pictures} shared pictures, "
            f"Cohen's kappa {a.kappa:.2f} on {a.shared_pairs} shared pairs"
        )
    return lines


def save_results(store, judgments, id_: int, ranking: list[Ranked], folder: Path) -> list[str]:
    """Write ranking.csv, ranking.json and the annotator's judgments; returns a line that says where."""
    import json

    from ..ernie_core.training.items import write_lines, write_whole

    who = hashlib.sha256(judgments.progress(store, id_).annotator.encode()).hexdigest()[:8]
    write_whole(folder / "ranking.csv", table(ranking).encode("utf-8-sig"))
    rows = [{"image": r.path, "score": r.value, "tier": r.tier, "place": r.place, "prompt": r.prompt} for r in ranking]
    write_whole(folder / "ranking.json", json.dumps(rows, ensure_ascii=False, indent=1).encode())
    write_lines(folder / f"judgments_{who}.jsonl", judgments.judgment_rows(store, id_))
    return [f"ranking.csv, ranking.json and judgments_{who}.jsonl are in {folder}"]


def table(ranking: list[Ranked]) -> str:
    """CSV: one row per picture, best first."""
    import csv
    import io as text

    columns = ("place", "image", "score", "low", "high", "tier", "points", "buchholz", "judged", "prompt", "path")
    out = text.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(columns)
    for r in ranking:
        numbers = (f"{v:.4f}" for v in (r.value, r.low, r.high))
        writer.writerow((r.place, r.label, *numbers, r.tier, r.points, r.buchholz, r.judged, r.prompt, r.path))
    return out.getvalue()


def scores_of(name: str, ranking: list[Ranked]):
    """The ranking as ERNIE_SCORES."""
    from ..ernie_core.scoring.scorer import Scores as EngineScores

    return EngineScores(
        scorer=f"tournament {name}",
        values=tuple(r.value for r in ranking),
        labels=tuple(r.label for r in ranking),
        prompts=tuple(r.prompt for r in ranking),
        categories=("",) * len(ranking),
        files=tuple(r.path for r in ranking),
    )


def choose(store, judgments, name: str, id_: int, ranking: list[Ranked], wanted: Wanted) -> list[Preference]:
    """The preferences that the node was asked for."""
    from ..ernie_core.scoring.pairs import Preference, Valued, keep_judged, prefer

    pictures = {r.path: Valued(path=Path(r.path), value=r.value, prompt=r.prompt) for r in ranking}
    limits: dict[str, Any] = {"min_gap": wanted.min_gap, "max_per_prompt": wanted.max_per_prompt}
    if wanted.pairs_from != PAIRS_FROM[2]:
        return prefer(list(pictures.values()), wanted.pairs_from, **limits)  # type: ignore[arg-type]
    judged: dict[tuple[str, str], Preference] = {}
    for who in judgments.annotators(store, name).values() if wanted.merged else [id_]:
        for row in judgments.judgment_rows(store, who):
            if row["kind"] == "pair" and row["answer"] in ("left", "right"):
                sides = (row["left"], row["right"])
                best, worst = sides if row["answer"] == "left" else sides[::-1]
                judged[best, worst] = Preference(chosen=pictures[best], rejected=pictures[worst])
    return keep_judged(judged.values(), **limits)


def try_pairs(preferences: list[Preference], name: str, folder: Path | None) -> tuple[Any, list[str]]:
    """(pairs or a blocked output, lines that say what came of it)."""
    try:
        pairs, lines = finish_pairs(preferences, f"the tournament {name}", folder)
    except ErnieError as e:
        return host.block_output(), [f"no pairs: {e}"]
    return pairs, [pairs.report(), *lines]


def finish_pairs(preferences: list[Preference], source: str, folder: Path | None) -> tuple[Any, list[str]]:
    """(Pairs, lines that say where they were written)."""
    from ..ernie_core.scoring.pairs import make_pairs, write_pairs
    from ..ernie_core.training.dataset import DatasetOptions

    options = DatasetOptions(missing_caption="empty")
    pairs = make_pairs(preferences, options, source=source, on_progress=on_progress())
    return pairs, [] if folder is None else [f"pairs are in {write_pairs(pairs, folder)}"]


def load(path: Path):
    """IMAGE [1, H, W, 3] of a file."""
    import torch

    from ..ernie_core.training.pictures import load_image

    return torch.tensor(load_image(path).rgb_HWC).float()[None] / 255


# --- routes: what the page asks besides what every kind of panel asks -----------------------------------------------


def question_of(question) -> dict[str, Any]:
    return {name: getattr(question, name) for name in ("id", "round", "left", "right", "prompt")}


SESSIONS = Sessions(
    word="tournament",
    engine_name="scoring.judgments",
    store_path=store_path,
    list_all="list_tournaments",
    question=question_of,
)


def post_calibrate(path: Mapping, _query: Mapping, _body: Mapping) -> dict[str, Any]:
    id_ = SESSIONS.id(path)
    with SESSIONS.open() as store:
        SESSIONS.engine.calibrate_again(store, id_)
        return SESSIONS.state(store, id_)


def get_ranking(path: Mapping, _query: Mapping, _body: Mapping) -> dict[str, Any]:
    """The best pictures of a finished tournament."""
    from ..ernie_core.scoring import judgments

    id_ = SESSIONS.id(path)
    with SESSIONS.open() as store:
        if not judgments.progress(store, id_).complete:
            raise ErnieError("the ranking is shown when everything was answered: it would sway the answers.")
        best = judgments.rank(store, id_, intervals=False)[:SHOWN_RANKS]
        numbers = judgments.picture_numbers(store, id_, [r.path for r in best])
    return {"best": [{"place": r.place, "label": r.label, "number": numbers[r.path], "tier": r.tier} for r in best]}


ROUTES = {
    **SESSIONS.routes(),
    "GET /ernie/tournaments/{id}/ranking": get_ranking,
    "POST /ernie/tournaments/{id}/calibrate": post_calibrate,
}
