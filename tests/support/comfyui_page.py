"""Opens workflows in ComfyUI's own page, in a headless Chromium, and says what a person would meet there.

Needs the package playwright and a Chromium on PATH (or named by CHROMIUM); both are optional.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
READY_TIMEOUT_S = 120
VIEW = {"width": 2400, "height": 1300}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]

# What every bare installation logs: the page asks the vendor's hosts about models, which the tests cut off, reads
# its graph once too early, and looks for user files that a new folder does not have.
NOISE = re.compile(
    r"ERR_BLOCKED_BY_CLIENT|blockedbyclient|Content Security Policy|graph accessed before initialization|favicon|"
    r"user\.css|/userdata[/?]|Failed to load resource: net::",
    re.IGNORECASE,
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Release.Status": "skipped",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    # Texts stay readable on pictures of whole graphs.
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}

IS_READY = """() => {
  const app = window.comfyAPI?.app?.app ?? window.app
  return app?.canvas && app.extensionManager &&
    Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 50 && app.graph
}"""

LOAD = """async ([graph, name]) => {
  await (window.comfyAPI?.app?.app ?? window.app).loadGraphData(graph, true, true, name)
}"""

TO_PROMPT = """async () => {
  try {
    const { output, workflow } = await (window.comfyAPI?.app?.app ?? window.app).graphToPrompt()
    return { output, workflow }
  } catch (e) { return { output: {}, workflow: {}, failure: String(e) } }
}"""

FIT = """async () => {
  const app = window.comfyAPI?.app?.app ?? window.app
  try { await app.extensionManager.command.execute('Comfy.Canvas.FitView') } catch { /* an older page */ }
  app.canvas.setDirty(true, true)
}"""

# Compares what lies on the canvas with the file, and every node with what the page knows of its type.
INSPECT = """(file) => {
  const app = window.comfyAPI?.app?.app ?? window.app
  const LG = window.LiteGraph
  const known = new Set(Object.keys(LG.registered_node_types))
  const drawnOnly = new Set(['Note', 'MarkdownNote', 'Reroute', 'PrimitiveNode'])
  const problems = []
  const nodes = app.graph._nodes
  const byId = new Map(nodes.map((n) => [String(n.id), n]))
  for (const n of nodes) {
    const at = `node ${n.id} (${n.type})`
    if (!known.has(n.type) && !drawnOnly.has(n.type)) problems.push(`${at}: unknown type`)
    if (n.has_errors) problems.push(`${at}: drawn red`)
    for (const w of n.widgets ?? []) {
      const choices = typeof w.options?.values === 'function' ? null : w.options?.values
      if (w.type === 'combo' && Array.isArray(choices) && w.value !== undefined && !choices.includes(w.value)) {
        const few = JSON.stringify(choices.slice(0, 8))
        problems.push(`${at}: ${w.name} holds ${JSON.stringify(w.value)}, not one of ${few}`)
      }
      if (typeof w.value === 'number' && Number.isNaN(w.value)) problems.push(`${at}: ${w.name} is NaN`)
    }
    for (const i of n.inputs ?? []) {
      if (i.link != null && !app.graph.links?.get?.(i.link) && !app.graph.links?.[i.link]) {
        problems.push(`${at}: input ${i.name} has link ${i.link}, which does not exist`)
      }
    }
  }
  const links = app.graph.links instanceof Map ? [...app.graph.links.values()]
    : Object.values(app.graph.links ?? {}).filter(Boolean)
  for (const l of links) {
    const output = byId.get(String(l.origin_id))?.outputs?.[l.origin_slot]
    const input = byId.get(String(l.target_id))?.inputs?.[l.target_slot]
    if (!output || !input) problems.push(`link ${l.id}: one end is missing`)
    else if (!LG.isValidConnection(output.type, input.type)) {
      problems.push(`link ${l.id}: ${output.type} into ${input.type}`)
    }
  }
  const live = new Set(links.map((l) => String(l.id)))
  for (const l of file.links ?? []) if (!live.has(String(l[0]))) problems.push(`link ${l} was dropped`)
  for (const n of file.nodes) {
    const shown = byId.get(String(n.id))
    if (!shown) { problems.push(`node ${n.id} (${n.type}) was dropped`); continue }
    if (drawnOnly.has(n.type) || !Array.isArray(n.widgets_values)) continue
    const saved = (shown.widgets ?? []).filter((w) => w.serialize !== false)
    saved.forEach((w, i) => {
      const was = n.widgets_values[i]
      if (was !== undefined && was !== null && JSON.stringify(w.value) !== JSON.stringify(was)) {
        const [now, before] = [w.value, was].map((v) => JSON.stringify(v))
        problems.push(`node ${n.id} (${n.type}): ${w.name} is ${now}, the file has ${before}`)
      }
    })
  }
  const header = LG.NODE_TITLE_HEIGHT
  const box = ({ id, pos, size }) => ({ id, x: pos[0], y: pos[1] - header, w: size[0], h: size[1] + header })
  const boxes = nodes.map(box)
  for (const a of boxes) for (const b of boxes) {
    if (a.id < b.id && a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h) {
      problems.push(`nodes ${a.id} and ${b.id} overlap`)
    }
  }
  return problems
}"""

DIALOGS = """() =>
  [...document.querySelectorAll('.p-dialog, [role=dialog], .p-toast-message, .comfy-modal, [role=alert]')]
    .filter((e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
    .map((e) => e.innerText.trim().replace(/\\s+/g, ' ').slice(0, 300)).filter(Boolean)"""


@dataclass(kw_only=True)
class Seen:
    """One workflow as the page shows it."""

    problems: list[str]
    prompt: dict[str, Any]
    """API format, as the page would queue it."""
    page: dict[str, Any]
    """UI format, as the page would save it."""
    picture: Path | None = None


@dataclass(kw_only=True)
class Browser:
    """An open page of a running ComfyUI."""

    page: Any
    errors: list[str] = field(default_factory=list)

    def open_workflow(self, path: Path, *, picture: Path | None = None) -> Seen:
        """Load a UI-format file, look at it, and take a picture of it."""
        self.errors.clear()
        file = json.loads(path.read_text(encoding="utf-8"))
        self.page.evaluate(LOAD, [file, path.stem])
        self.page.wait_for_timeout(800)
        problems = self.page.evaluate(INSPECT, file)
        prompt = self.page.evaluate(TO_PROMPT)
        problems += [f"cannot be queued: {prompt['failure']}"] if "failure" in prompt else []
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(1200)
        problems += [f"dialog: {text}" for text in self.page.evaluate(DIALOGS)]
        if picture is not None:
            self.page.screenshot(path=str(picture))
        problems += [f"console: {text}" for text in self.errors if not NOISE.search(text)]
        return Seen(problems=problems, prompt=prompt["output"], page=prompt["workflow"], picture=picture)


def browser_path() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def why_no_browser() -> str | None:
    """What to install, or None when pages can be opened."""
    if importlib.util.find_spec("playwright") is None:
        return "no page was opened: install the Python package playwright"
    if browser_path() is None:
        return f"no page was opened: install Chromium ({' or '.join(BROWSERS[:2])} on PATH), or name one with CHROMIUM"
    return None


@contextlib.contextmanager
def open_page(url: str, post_setting) -> Iterator[Browser]:
    """The page of the server at `url`, ready for workflows; nothing outside this machine is asked.

    `post_setting(name, value)` stores a setting of the page on the server, where the page keeps them.
    """
    for name, value in SETTINGS.items():
        post_setting(name, value)
    chromium = driver().chromium.launch(executable_path=browser_path(), headless=True, args=FLAGS)
    try:
        page = chromium.new_page(viewport=VIEW, locale="en")
        browser = Browser(page=page)
        page.route(lambda address: not address.startswith(url), lambda route: route.abort("blockedbyclient"))
        page.on("console", lambda m: browser.errors.append(describe(m)) if m.type == "error" else None)
        page.on("pageerror", lambda e: browser.errors.append(f"uncaught: {e.message}"))
        page.goto(url, wait_until="domcontentloaded", timeout=60_000)
        page.wait_for_function(IS_READY, timeout=READY_TIMEOUT_S * 1000)
        page.wait_for_timeout(2000)  # the page still puts up its own first graph
        yield browser
    finally:
        chromium.close()


@functools.cache
def driver() -> Any:
    """Playwright, started once: a second one refuses to start in the thread where the first keeps its event loop."""
    from playwright.sync_api import sync_playwright

    started = sync_playwright().start()
    atexit.register(started.stop)
    return started


def describe(message: Any) -> str:
    return f"{message.text} ({(message.location or {}).get('url', '')})"
