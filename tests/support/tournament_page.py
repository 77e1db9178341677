"""The tournament's panel in a page: opened by its command, answered by clicks."""

from __future__ import annotations

import re

OPEN = "() => (window.comfyAPI?.app?.app ?? window.app).extensionManager.command.execute('Ernie.Tournament.Open')"
PANEL = "#ernie-tournament"


def wait_for_question(page, *, not_: str | None = None) -> str:
    """The id of the question whose pictures can be seen."""
    page.wait_for_function(
        "(was) => { const p = document.querySelector('#ernie-tournament');"
        " return p?.dataset.ready === 'true' && p.dataset.question && p.dataset.question !== was }",
        arg=not_,
        timeout=30_000,
    )
    return page.evaluate("() => document.querySelector('#ernie-tournament').dataset.question")


def open_by_command(page, name="cats") -> None:
    page.evaluate(OPEN)
    page.locator(f"{PANEL} .list button", has_text=re.compile(f"^{name}")).first.click()


def answer_by_clicks(page, better) -> int:
    """Click to the end of the open tournament, as `better`(question id) says: "left", "right" or "tie"; count them."""
    question, clicks = None, 0
    while page.locator(f"{PANEL}[data-complete=true]").count() == 0:
        question = wait_for_question(page, not_=question)
        given = better(int(question))
        if given == "tie":
            page.keyboard.press("ArrowDown")
        else:
            page.locator(f"{PANEL} .side.{given}").click()
        clicks += 1
        page.wait_for_function(
            "(was) => { const p = document.querySelector('#ernie-tournament');"
            " return p.dataset.complete === 'true' || (p.dataset.ready === 'true' && p.dataset.question !== was) }",
            arg=question,
            timeout=30_000,
        )
    return clicks
