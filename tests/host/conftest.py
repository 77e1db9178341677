"""One ComfyUI for all host tests: started once with this pack and a model in miniature, stopped at the end.

    make test-host COMFYUI_DIR=/path/to/ComfyUI [COMFYUI_PYTHON=/path/to/its/python]

Without COMFYUI_DIR every test here is skipped and says so. Pages are opened where playwright and a Chromium are found.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import comfyui_page
import comfyui_server
import numpy as np
import pytest
import torch
from comfyui_server import ComfyUI
from ernie_pack.standalone import graph as graph_module
from ernie_pack.standalone import host, load_node_classes
from random_models import write_random_loras, write_random_models, write_turbo
from safetensors.torch import load
from small_runs import WORKFLOWS, write_inputs

SUPPORTED = (0, 12)
TINY = comfyui_server.PACK / "tiny" / "ernie-image-tiny"

file_numbers = itertools.count()


@pytest.fixture(scope="session")
def comfyui_folder() -> Path:
    """The ComfyUI under test; skips where none is named."""
    named = os.environ.get("COMFYUI_DIR")
    if not named:
        pytest.skip("no ComfyUI was started: name its folder with COMFYUI_DIR (make test-host COMFYUI_DIR=...)")
    folder = Path(named).expanduser().resolve()
    assert (folder / "main.py").is_file(), f"COMFYUI_DIR must be ComfyUI's folder, {folder} has no main.py"
    return folder


@pytest.fixture(scope="session")
def has_core_model(comfyui_folder) -> bool:
    """Whether this ComfyUI has an ERNIE-Image model of its own."""
    return "class ErnieImage(" in (comfyui_folder / "comfy" / "supported_models.py").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def start_comfyui(comfyui_folder):
    """Start the ComfyUI under test, with the files or folders given as further custom node packs."""

    @contextlib.contextmanager
    def start(*extra_packs: Path):
        base = Path(tempfile.mkdtemp(prefix="comfyui-test."))
        write_models(base / "models")
        write_inputs(base / "input")
        with comfyui_server.running_comfyui(comfyui_folder, base, extra_packs=extra_packs) as server:
            yield server
        shutil.rmtree(base, ignore_errors=True)

    return start


@pytest.fixture(scope="session")
def any_server(start_comfyui):
    """A running ComfyUI of any version."""
    with start_comfyui() as server:
        yield server


def write_models(folder: Path) -> None:
    """The tiny model under the released file names, or random weights where the trained ones are not there."""
    if TINY.is_dir():
        importlib.import_module("ernie_pack.tiny.package").export_single_files(folder)
        write_turbo(folder)
        write_random_loras(folder)
    else:
        write_random_models(folder)


@pytest.fixture(scope="session")
def server(any_server) -> ComfyUI:
    """A running ComfyUI that the pack supports."""
    if any_server.version < SUPPORTED:
        pytest.skip(f"ComfyUI {dotted(any_server.version)} is too old for the pack, which says so")
    return any_server


@pytest.fixture(scope="session")
def nodes(server) -> dict:
    """What the server says about its node types."""
    return server.get_json("/object_info")


@pytest.fixture
def need(server, nodes):
    """Skip, by name, a test whose core nodes this ComfyUI does not have."""

    def check(*types: str) -> None:
        absent = [name for name in types if name not in nodes]
        if absent:
            pytest.skip(f"ComfyUI {dotted(server.version)} has no {', '.join(absent)}")

    return check


@pytest.fixture
def latents(server):
    """Run a graph and return the tensors of the named LATENT links, in order."""

    def run(graph, *links):
        nodes = [graph.add("SaveLatent", samples=link, filename_prefix=f"test/{next(file_numbers)}") for link in links]
        finished = server.run(graph.prompt)
        found = []
        for node in nodes:
            (file,) = finished.files(node[0])
            found.append(load(server.fetch(file))["latent_tensor"])
        return found

    return run


@pytest.fixture
def standalone_latent(server, tmp_path, monkeypatch):
    """standalone_latent(graph, link) -> what the same graph gives without ComfyUI."""

    def run(graph, link):
        seen = []
        session = host.Session(models=server.base / "models", output=tmp_path, input=server.base / "input")
        monkeypatch.setattr(host, "session", session)
        monkeypatch.setattr(host, "decode", lambda vae, latent: seen.append(latent) or torch.zeros(1, 8, 8, 3))
        prompt = {n: node for n, node in graph.prompt.items() if node["class_type"] != "SaveLatent"}
        decode = {"class_type": "VAEDecode", "inputs": {"samples": link, "vae": graph.vae}}
        prompt |= {"decode": decode, "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}}
        graph_module.run_prompt(graph_module.Workflow(prompt=prompt, page=None), load_node_classes())
        (latent,) = seen
        return latent["samples"]

    return run


@pytest.fixture
def images(server):
    """Run a graph and return the pictures behind the named IMAGE links, as float tensors [H, W, 3]."""

    def run(graph, *links):
        nodes = [graph.add("SaveImage", images=link, filename_prefix=f"test/{next(file_numbers)}") for link in links]
        finished = server.run(graph.prompt)
        found = []
        for node in nodes:
            (file,) = finished.files(node[0])
            found.append(torch.from_numpy(np.asarray(server.picture(file)).copy()).float() / 255)
        return found

    return run


@pytest.fixture
def new_log(server):
    """The part of ComfyUI's log that this test wrote."""
    start = len(server.log_text())
    return lambda: server.log_text()[start:]


@pytest.fixture(scope="session")
def pictures_folder() -> Path:
    """Where pictures of pages go: HOST_PICTURES, else a new folder that stays."""
    folder = Path(os.environ.get("HOST_PICTURES") or tempfile.mkdtemp(prefix="ernie-pages."))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def browser(server):
    """ComfyUI's page in a headless Chromium; skips where there is none."""
    missing = comfyui_page.why_no_browser()
    if missing:
        pytest.skip(missing)

    def post_setting(name: str, value: object) -> None:
        server.post(f"/settings/{name}", value)

    with comfyui_page.open_page(server.url, post_setting) as page:
        yield page


@pytest.fixture(scope="session")
def api_workflows(server, request) -> dict[str, tuple[dict, dict]]:
    """Name -> (API format, UI format) of each workflow: as the page converts it, else as standalone does."""
    if comfyui_page.why_no_browser() is None:
        page = request.getfixturevalue("browser")
        seen = {path.stem: page.open_workflow(path) for path in WORKFLOWS}
        return {name: (one.prompt, one.page) for name, one in seen.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "session", host.Session(models=server.base / "models"))
        classes = load_node_classes()
        prompts = {path.stem: graph_module.read_workflow(path, classes).prompt for path in WORKFLOWS}
    return {path.stem: (prompts[path.stem], json.loads(path.read_text("utf-8"))) for path in WORKFLOWS}


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
