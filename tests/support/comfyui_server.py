"""Starts an existing ComfyUI folder headless with this pack in it, and talks to it over HTTP.

The folder stays untouched: models, output, user data and the link to the pack live in a base directory of the
test's own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "ComfyUI-ERNIE-Image"  # the folder users have: it is part of the addresses of help pages and templates
TEST_KEY_VARIABLE, TEST_KEY = "ERNIE_TEST_KEY", "sk-0f5b9f64-a-key-of-tests"  # every server here has it
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 15


class HostError(Exception):
    """ComfyUI did not start, refused a workflow, or a node failed."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What the history says of one run."""

    status: str
    """"success", "error" or "interrupted"."""
    outputs: dict[str, dict[str, list]]
    messages: list[list]

    def files(self, node: str | None = None) -> list[dict[str, str]]:
        """{filename, subfolder, type} of everything that was saved, by one node or by all."""
        chosen = [self.outputs.get(node, {})] if node is not None else self.outputs.values()
        lists = [items for shown in chosen for items in shown.values()]
        return [item for items in lists for item in items if isinstance(item, dict) and "filename" in item]

    def error(self) -> str:
        details = [data for kind, data in self.messages if kind == "execution_error"]
        return "; ".join(f"{d.get('node_type')}: {d.get('exception_message', '').strip()}" for d in details)


@dataclass(kw_only=True)
class ComfyUI:
    """A running server."""

    url: str
    base: Path
    log: Path
    version: tuple[int, ...]
    process: subprocess.Popen

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, body: Any) -> tuple[int, dict]:
        """(HTTP status, answer)."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as e:
            return e.code, json.loads(e.read() or b"{}")

    def queue(self, prompt: dict, *, page: dict | None = None) -> str:
        """Queue an API-format workflow as the page does; returns its id."""
        extra = {"extra_pnginfo": {"workflow": page}} if page is not None else {}
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex, "extra_data": extra})
        if status != 200 or answer.get("node_errors"):
            raise HostError(f"refused ({status}): {json.dumps(answer, ensure_ascii=False)[:2000]}")
        return answer["prompt_id"]

    def wait(self, prompt_id: str, *, timeout_s: float = 240) -> Finished:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            self.check_alive()
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                messages = entry["status"]["messages"]
                kinds = {kind for kind, _ in messages}
                status = "interrupted" if "execution_interrupted" in kinds else entry["status"]["status_str"]
                return Finished(status=status, outputs=entry["outputs"], messages=messages)
            time.sleep(0.1)
        raise HostError(f"no end after {timeout_s} s; the log ends with\n{self.log_text()[-2000:]}")

    def run(self, prompt: dict, *, page: dict | None = None, timeout_s: float = 240) -> Finished:
        """Run a workflow to its end.

        Raises:
            HostError: it was refused or a node failed.
        """
        finished = self.wait(self.queue(prompt, page=page), timeout_s=timeout_s)
        if finished.status != "success":
            raise HostError(f"{finished.status}: {finished.error()}\n{self.log_text()[-2000:]}")
        return finished

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def is_idle(self) -> bool:
        queue = self.get_json("/queue")
        return not queue["queue_running"] and not queue["queue_pending"]

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            self.check_alive()
            if time.monotonic() > end:
                raise HostError(f"waited {timeout_s} s for: {what}")
            time.sleep(0.05)

    def fetch(self, file: dict[str, str]) -> bytes:
        names = {"subfolder": "", "type": "output"} | file
        return self.get("/view?" + urllib.parse.urlencode(names))

    def picture(self, file: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(self.fetch(file)))

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise HostError(f"ComfyUI ended with code {self.process.returncode}:\n{self.log_text()[-3000:]}")


def read_version(folder: Path) -> tuple[int, ...]:
    """(0, 33, 0), from the file that every ComfyUI since 0.3 has."""
    text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    return tuple(map(int, re.search(r'"(\d+(?:\.\d+)*)', text).group(1).split(".")))


def interpreter() -> str:
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def has_cuda() -> bool:
    probe = [interpreter(), "-c", "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running_comfyui(
    folder: Path, base: Path, *, extra_packs: Iterable[Path] = (), port: int | None = None
) -> Iterator[ComfyUI]:
    """ComfyUI in `folder` with this pack and the models in `base`/models; stopped at the end, whatever happens.

    Args:
        extra_packs: files or folders that ComfyUI loads as custom node packs as well.
        port: None = one that is free.

    Raises:
        HostError: it ends or does not answer; the message has the end of its log.
    """
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, pack in ((PACK_NAME, PACK), *((pack.name, pack) for pack in extra_packs)):
        if not (base / "custom_nodes" / name).is_symlink():  # a server that comes back finds its own
            (base / "custom_nodes" / name).symlink_to(pack, target_is_directory=pack.is_dir())
    log, port = base / "comfyui.log", port or free_port()
    command = [interpreter(), "main.py", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
    command += ["--base-directory", str(base)]
    known = (folder / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    if '"--database-url"' in known:  # the default lies inside ComfyUI's folder
        command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
    if '"--disable-api-nodes"' in known:  # paid remote nodes ask the network
        command += ["--disable-api-nodes"]
    if not has_cuda():
        command += ["--cpu"]
    quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    quiet |= {TEST_KEY_VARIABLE: TEST_KEY}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = ComfyUI(url=f"http://127.0.0.1:{port}", base=base, log=log, version=read_version(folder), process=process)
    try:
        server.wait_until(lambda: answers(server), "ComfyUI answers", timeout_s=START_TIMEOUT_S)
        yield server
    finally:
        stop(process)


def answers(server: ComfyUI) -> bool:
    try:
        server.get("/system_stats")
    except OSError:
        return False
    return True


def stop(process: subprocess.Popen) -> None:
    """End the server and everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
