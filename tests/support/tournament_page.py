"""The panel of tournaments and evaluations in a page: opened by command or button, answered by keys and clicks."""

from __future__ import annotations

import re

OPEN = "() => (window.comfyAPI?.app?.app ?? window.app).extensionManager.command.execute('Ernie.Tournament.Open')"
PANEL = "#ernie-tournament"


def wait_for_question(page, *, not_: str | None = None, panel: str = PANEL) -> str:
    """The id of the question whose pictures can be seen."""
    page.wait_for_function(
        "([panel, was]) => { const p = document.querySelector(panel);"
        " return p?.dataset.ready === 'true' && p.dataset.question && p.dataset.question !== was }",
        arg=[panel, not_],
        timeout=60_000,
    )
    return page.evaluate("(panel) => document.querySelector(panel).dataset.question", panel)


def click_node_button(page, node_type: str, widget: str) -> None:
    """Click the button that the canvas draws on the node."""
    x, y = page.evaluate(
        """([type, name]) => {
      const app = window.comfyAPI?.app?.app ?? window.app
      const node = app.graph._nodes.find((n) => n.type === type)
      const widget = node.widgets.find((w) => w.name === name)
      app.canvas.ds.scale = 1
      app.canvas.ds.offset = [40 - node.pos[0], 90 - node.pos[1]]
      app.canvas.draw(true, true)
      const rect = app.canvas.canvas.getBoundingClientRect()
      const y = node.pos[1] + (widget.last_y ?? widget.y) + 10
      const at = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, y])
      return [rect.x + at[0], rect.y + at[1]]
    }""",
        [node_type, widget],
    )
    page.mouse.click(x, y)


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
