"""People judge the pictures of a prompt set: pass or fail, or which of two settings is better, without knowing which.

The node brings the pictures and reads the verdicts; in between the page (web/evaluation.js) asks and answers through
the routes of panel_routes.py, and every answer is on the disk before the next question is sent.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..ernie_core.errors import ErnieError
from . import host
from .dataset import ADVANCED, show
from .panel_routes import Sessions, public
from .prompt_sets import CATEGORY
from .tournament import RESULTS, UNTIL, find_folder, folder_stamp

if TYPE_CHECKING:
    from ..ernie_core.evaluation.verdict_store import Progress

Verdicts = io.Custom("ERNIE_VERDICTS")
MODES = ("side by side", "pass or fail")
ASKED = ("alignment and fidelity", "alignment", "fidelity")


def setting_inputs(second: str) -> list[io.Input]:
    """The folders of one setting or two."""
    return [
        io.String.Input(
            "first",
            default="",
            tooltip="Folder of the first setting: the folder output of Prompt Set, or its name in the output folder.",
        ),
        io.String.Input("second", default="", tooltip=second),
    ]


class ErnieJudgeByPeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieJudgeByPeople",
            display_name="Judge by People (ERNIE)",
            category=CATEGORY,
            description="Asks a person whether pictures of a prompt set pass, or which of two settings is better.",
            is_output_node=True,
            inputs=[
                *setting_inputs("Folder of the second setting, same prompts and seeds. Empty: pass or fail only."),
                io.String.Input(
                    "name",
                    default="evaluation",
                    tooltip="Name of the evaluation: the same name and annotator go on where they were.",
                ),
                io.String.Input(
                    "annotator",
                    default="me",
                    tooltip="Who answers. Each person answers all questions under the same name, in another order.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="side by side: two settings' pictures of one prompt and seed, with no difference as an "
                    "answer. pass or fail: one picture at a time, those of both settings mixed.",
                ),
                io.Combo.Input(
                    "criteria",
                    options=list(ASKED),
                    default=ASKED[0],
                    tooltip="What is asked of each picture or pair. alignment: does it show what the prompt says. "
                    "fidelity: is it a clean and convincing picture.",
                ),
                io.Combo.Input(
                    "until_complete",
                    options=list(UNTIL),
                    default=UNTIL[1],
                    tooltip="While answers are missing. wait: nodes behind this one do not run. current standing: they "
                    "get what is known now.",
                ),
                io.Combo.Input(
                    "result",
                    options=list(RESULTS),
                    default=RESULTS[1],
                    tooltip="Whose verdicts come out. all annotators: everybody's, each under their own name, with "
                    "Cohen's kappa of every two.",
                ),
                io.Int.Input(
                    "order_seed",  # not "seed": pages give that one a control that changes it with every run
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Seed of order and sides of a new evaluation, 0 to 2147483647.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                Verdicts.Output(display_name="verdicts", tooltip="The answers, for Evaluation Report."),
                io.Boolean.Output(display_name="complete", tooltip="Whether everything was answered."),
                io.String.Output(display_name="summary", tooltip="How far it is, agreement, and what is amiss."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = "", first: str | None = "", second=None, **others) -> str:
        """Changes with every answer and with the folders. What is linked comes as None."""
        from ..ernie_core.evaluation import verdict_store

        with verdict_store.open_store(store_path()) as store:
            answers = verdict_store.fingerprint(store, None if name is None else name.strip())
        return f"{answers} {folder_stamp(first or '')} {folder_stamp(second or '')}"

    @classmethod
    def execute(
        cls, first, second, name, annotator, mode, criteria, until_complete, result, order_seed
    ) -> io.NodeOutput:
        from ..ernie_core.evaluation import verdict_store
        from ..ernie_core.evaluation.verdicts import CRITERIA

        setup = verdict_store.Setup(
            name=name.strip(),
            annotator=annotator.strip(),
            mode=mode,
            settings=read_settings(first, second),
            criteria=CRITERIA if criteria == ASKED[0] else (criteria,),
            seed=order_seed,
        )
        everybody, wait = result == RESULTS[1], until_complete == UNTIL[0]
        return hand_out(cls.hidden.unique_id, setup, everybody=everybody, wait=wait)


def store_path() -> Path:
    """The file that holds everybody's verdicts."""
    return host.user_folder() / "verdicts.sqlite"


def read_settings(first: str, second: str) -> tuple:
    """The settings behind one folder or two, inside of what may be shown; "" for no second one.

    Raises:
        ErnieError: the first is empty, or a folder is none of a prompt set.
    """
    from ..ernie_core.evaluation.prompt_sets import read_setting

    if not first.strip():
        raise ErnieError("first is empty: connect the folder of Prompt Set, or give its name in the output folder.")
    return tuple(read_setting(find_folder(folder)) for folder in (first, second) if folder.strip())


def hand_out(node_id: str | None, setup, *, everybody: bool, wait: bool) -> io.NodeOutput:
    """The node's outputs as the evaluation stands."""
    from ..ernie_core.evaluation import verdict_store as engine
    from ..ernie_core.evaluation.verdicts import join

    with engine.open_store(store_path()) as store:
        id_ = engine.begin(store, setup)
        state = engine.progress(store, id_)
        ids = engine.annotators(store, setup.name).values() if everybody else [id_]
        found = join(engine.read_verdicts(store, i) for i in ids)
        lines = [tell(state), *(engine.agreement(store, setup.name) if everybody else []), *found.notes]
    summary = show(node_id, "\n".join(lines))
    verdicts = host.block_output() if wait and not state.complete else found
    return io.NodeOutput(verdicts, state.complete, summary, ui={"ernie_evaluation": [public(state)]})


def tell(state: Progress) -> str:
    """One line: how far it is."""
    who = f"{state.name}, {state.annotator}, {state.mode}"
    if state.complete:
        return f"{who}: complete, {state.done} verdicts on {state.num_pictures} pictures"
    return f"{who}: {state.left} verdicts left, {state.done} done; press Open evaluation to answer"


SESSIONS = Sessions(
    word="evaluation",
    engine_name="evaluation.verdict_store",
    store_path=store_path,
    list_all="list_evaluations",
    question=asdict,
)
ROUTES = SESSIONS.routes()
