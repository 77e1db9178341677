"""The end of the preference loop: which pairs train, and whether the pictures are better after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .dataset import Pairs
from .scoring import CATEGORY, Scorer, as_image, batch_size_input, find_folder, first, lines_of, reporter, split
from .tournament import folder_stamp, store_path

SOURCES = ("tournament", "scorer")


class ErnieChoosePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieChoosePairs",
            display_name="Choose Pairs (ERNIE)",
            category=CATEGORY,
            description="Hands on the pairs of a tournament or of a scorer, and asks only for those that are chosen.",
            inputs=[
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    default=SOURCES[0],
                    tooltip="Whose pairs go on: tournament, or scorer. What leads to the other one alone does not run.",
                ),
                Pairs.Input("tournament", optional=True, lazy=True, tooltip="From Tournament: a person's answers."),
                Pairs.Input("scorer", optional=True, lazy=True, tooltip="From Pairs from Scores: a scorer's numbers."),
            ],
            outputs=[Pairs.Output(display_name="pairs", tooltip="The chosen pairs, for Train.")],
        )

    @classmethod
    def check_lazy_status(cls, source: str, **pairs) -> list[str]:
        return [source] if source in pairs and pairs[source] is None else []

    @classmethod
    def execute(cls, source: str, tournament=None, scorer=None) -> io.NodeOutput:
        chosen = {"tournament": tournament, "scorer": scorer}[source]
        if chosen is None:
            raise ErnieError(f"source is {source}, and no pairs are connected to {source}: connect them, or change it.")
        return io.NodeOutput(chosen)


class ErnieWinRate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieWinRate",
            display_name="Win Rate (ERNIE)",
            category=CATEGORY,
            description="Shows the same prompts and seeds before and after a change, and how often after is better.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "before",
                    default="",
                    tooltip="Folder of the pictures before the change: the folder output of a batch, or a folder in "
                    "the input or output folder. Not read when before_images are connected.",
                ),
                io.String.Input(
                    "after",
                    default="",
                    tooltip="Folder of the same prompts and seeds after the change. Not read when after_images are "
                    "connected.",
                ),
                io.String.Input(
                    "name",
                    default="win_rate",
                    tooltip="Folder inside the output folder for win_rate.json, prompts.csv and comparisons.csv. Empty "
                    "(neutral): none.",
                ),
                io.String.Input(
                    "tournament",
                    default="",
                    tooltip="Name of a tournament in which both folders met: every judgment of a picture before "
                    "against one after counts, of all its annotators. Empty (neutral): none.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="Of connected pictures: one line per picture, or one for all. Not read for folders, whose "
                    "pictures say their own.",
                ),
                io.Int.Input(
                    "shown",
                    default=12,
                    min=0,
                    max=200,
                    tooltip="How many pairs are drawn side by side, 0 to 200, evenly spread over all. 0 (neutral): "
                    "none.",
                ),
                batch_size_input(),
                Scorer.Input("scorer", optional=True, tooltip="From Load Scorer: the better score wins."),
                io.Image.Input("before_images", optional=True, tooltip="Pictures before, a batch or a list."),
                io.Image.Input(
                    "after_images", optional=True, tooltip="The same prompts and seeds after, in the same order."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="Rates, table and pictures: before always left, after right."
                ),
                io.Float.Output(
                    display_name="win_rate",
                    tooltip="Share that after wins, 0 to 1, ties as half: of the tournament where it has judgments, "
                    "else of the scorer. Waits while there is neither.",
                ),
                io.String.Output(display_name="table", tooltip="CSV: wins, ties and losses by judge and prompt."),
                io.String.Output(display_name="report", tooltip="The rates with 95 % intervals, and what is amiss."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, tournament: Any = "", before: Any = "", after: Any = "", **others) -> str:
        """Changes with every judgment and with the pictures. What is linked comes as None."""
        from ..ernie_core.scoring import judgments

        name, *folders = (
            value[0] if isinstance(value, (list, tuple)) else value for value in (tournament, before, after)
        )
        with judgments.open_store(store_path()) as store:
            answers = judgments.fingerprint(store, None if name is None else name.strip())
        return " ".join([answers, *(folder_stamp(folder or "") for folder in folders)])

    @classmethod
    def execute(
        cls, before, after, name, tournament, prompts, shown, batch_size, scorer=None, before_images=None,
        after_images=None,
    ) -> io.NodeOutput:  # fmt: skip
        from ..ernie_core.scoring.win_rate import draw_sheet, prompt_table, summarise

        sides = (first(before), first(after))
        matches, problems = find_matches(sides, split(before_images), split(after_images), first(prompts))
        rates, more = judge(matches, first(tournament), first(scorer), first(batch_size), cls.hidden.unique_id)
        problems += more
        if first(name).strip():
            problems.append(save_rates(rates, first(name), sides, len(matches), problems))
        text = "\n".join([summarise(rates, matches=len(matches)), *problems])
        sheet = as_image(draw_sheet(matches, rates, shown=first(shown)))
        rate = rates[0].rate.value if rates else host.block_output()
        return io.NodeOutput(sheet, rate, prompt_table(rates), text, ui={"text": [text]})


def find_matches(sides: tuple[str, str], before: list, after: list, prompts: str) -> tuple[list, list[str]]:
    """What is compared with what, from the graph or from two folders, and what is amiss with it."""
    from ..ernie_core.scoring.win_rate import match_folders, match_pictures

    if before or after:
        if not (before and after):
            missing = "after_images" if before else "before_images"
            raise ErnieError(f"{missing} are missing: connect both before_images and after_images, or neither.")
        return match_pictures(before, after, lines_of(prompts)), []
    for side, folder in zip(("before", "after"), sides, strict=True):
        if not folder.strip():
            raise ErnieError(f"{side} is empty: give the folder of its pictures, or connect {side}_images.")
    return match_folders(*(find_folder(folder) for folder in sides))


def judge(matches: list, tournament: str, scorer, batch_size: int, node_id: str | None) -> tuple[list, list[str]]:
    """A rate per judge, the tournament's first, and a line per judge that could not say anything."""
    from ..ernie_core.scoring.win_rate import compare_by_scorer, win_rate

    rates, problems = [], []
    if tournament.strip():
        found = tournament_comparisons(matches, tournament.strip())
        if found:
            rates.append(win_rate(f"tournament {tournament.strip()}", found))
        else:
            problems.append(
                f"the tournament {tournament.strip()!r} has no judgment of before against after yet: give it both "
                "folders (folder and folder_2), answer it, and run again"
            )
    if scorer is not None:
        report = reporter(node_id, 2 * len(matches), scorer.name)
        compared = compare_by_scorer(matches, scorer, batch_size=batch_size, on_scored=report)
        rates.append(win_rate(scorer.name, compared))
    if not rates:
        problems.append("nothing is judged: connect a scorer, or name a tournament")
    return rates, problems


def tournament_comparisons(matches: list, name: str) -> list:
    """Of all annotators of a tournament; none where it has not begun."""
    from ..ernie_core.scoring import judgments
    from ..ernie_core.scoring.win_rate import compare_by_judgments

    with judgments.open_store(store_path()) as store:
        ids = judgments.annotators(store, name)
        rows = [row for id_ in ids.values() for row in judgments.judgment_rows(store, id_)]
    return compare_by_judgments(matches, rows)


def save_rates(rates: list, name: str, sides: tuple[str, str], matches: int, problems: list[str]) -> str:
    """Write win_rate.json, prompts.csv and comparisons.csv; returns a line that says where."""
    from ..ernie_core.batch import run_folder
    from ..ernie_core.scoring.win_rate import comparison_table, prompt_table, to_json
    from ..ernie_core.weights.checkpoint import write_text

    folder = run_folder(host.output_folder(), name)
    told = dict(zip(("before", "after"), (Path(side.strip()).name or "images" for side in sides), strict=True))
    write_text(folder / "win_rate.json", to_json(rates, **told, matches=matches, problems=problems))
    write_text(folder / "prompts.csv", prompt_table(rates))
    write_text(folder / "comparisons.csv", comparison_table(rates))
    return f"win_rate.json, prompts.csv and comparisons.csv are in {folder}"
