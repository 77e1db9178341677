"""Scoring in a running ComfyUI: every kind of scorer under its memory manager, best of N, interrupts, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_budget
import tiny_scorers as tiny
import torch
from comfyui_server import HostError
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.ernie_core.scoring.loading import load_scorer
from host_graph import Graph
from small_data import write_pictures

pytestmark = pytest.mark.host

PROMPT = "a red square"


@pytest.fixture(scope="module")
def server(start_comfyui):
    """A ComfyUI whose model folders hold small scorers; hides the server of the other tests."""
    with start_comfyui(Path(small_budget.__file__)) as server:
        models = server.base / "models"
        tiny.write_internvl(models / "scorers" / "ERNIE-Image-Aes")
        tiny.write_clip_folder(models / "clip_vision" / "clip")
        torch.save(tiny.laion_head("mlp", 24), models / "scorers" / "head.pth")
        write_pictures(server.base / "input" / "photos" / "first", count=4, captions=False)
        write_pictures(server.base / "input" / "photos" / "second", count=2, captions=False)
        yield server


def loader(graph, name, **options):
    inputs = {"kind": "auto", "precision": "default", "backbone": "find", "question": "artimuse"} | options
    return graph.add("ErnieLoadScorer", scorer_name=name, **inputs)


def score(graph, scorer, **options):
    inputs = {"folder": "photos", "prompts": PROMPT, "batch_size": 4, "draw": True, "collect": True}
    return graph.add("ErnieScoreImages", scorer=scorer, **inputs | {"save": "table", "name": "scores"} | options)


def files(server):
    return sorted((server.base / "input" / "photos").rglob("*.png"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("built-in combined", {}),
        ("scorers/ERNIE-Image-Aes/", {"precision": "fp32"}),
        ("scorers/ERNIE-Image-Aes/", {"precision": "int8"}),
        ("scorers/ERNIE-Image-Aes/", {"precision": "nf4"}),
        ("scorers/head.pth", {}),
        ("clip_vision/clip/", {"kind": "pickscore"}),
    ],
)
def test_the_numbers_are_those_of_the_engine_alone(server, name, options):
    """The same pictures scored in this process, without ComfyUI's layers and memory manager."""
    graph = Graph()
    folder = "scores_" + "".join(c for c in f"{name}{options}" if c.isalnum())
    scored = score(graph, loader(graph, name, **options), name=folder)
    graph.add("PreviewImage", images=scored)
    server.run(graph.prompt)
    made = json.loads((server.base / "output" / folder / "scores.json").read_text(encoding="utf-8"))
    if name.startswith("built-in"):
        here = BuiltinScorer()
    else:
        models = server.base / "models"
        here = load_scorer(
            models / name, backbone=models / "clip_vision" / "clip" if "head" in name else None, **options
        )
    expected = here.score(files(server), PROMPT)
    assert made["values"] == pytest.approx(expected, abs=1e-3)
    assert set(made["categories"]) == {"first", "second"}


@pytest.mark.parametrize("share", [0.01, 0.6])
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_card_that_is_too_small_holds_a_part_of_the_scorer(server, precision, share):
    """What fits is held, layer by layer; the rest comes for each call; nothing that cannot come is left behind."""
    graph = Graph()
    scorer = loader(graph, "scorers/ERNIE-Image-Aes/", precision=precision)
    image = graph.add("LoadImage", image=files(server)[0].relative_to(server.base / "input").as_posix())
    node, _ = graph.add("ScoreWithSmallBudget", scorer=scorer, image=image, share=share)
    made = json.loads(server.run(graph.prompt).outputs[node]["text"][0])
    expected = load_scorer(server.base / "models" / "scorers" / "ERNIE-Image-Aes", precision=precision)
    assert made["values"] == pytest.approx(expected.score(files(server)[:1]), abs=1e-3)
    quantised = {"int8": {"MovedLinear"}, "nf4": {"FourBitLinear"}}.get(precision, set())
    assert set(made["kinds"]) == {"Conv2d", "Embedding", "LayerNorm", "Linear"} | quantised
    assert made["left"] == 0
    assert made["streamed"] > 0
    assert (made["layers"] > 0) == (share > 0.5)
    assert (made["held"] > 0) == (share > 0.5)
    assert made["bytes"] < made["of"]


def test_best_of_n_on_the_host(server):
    graph = Graph()
    best = graph.add(
        "ErnieBestOfN",
        model=graph.model,
        clip=graph.clip,
        vae=graph.vae,
        scorer=loader(graph, "built-in combined"),
        source=f"{PROMPT}\na blue boat",
        **{"name": "best", "choice": "custom", "n": 4, "keep": 1, "rejected": "keep", "batch_size": 2},
        **{"negative": "", "width": 128, "height": 128, "preset": "custom", "steps": 3, "cfg": 4.0, "shift": 4.0},
        seed=5,
    )
    report = graph.add("ErnieScoreReport", scores=[best[0], 2], shown=2, name="")
    graph.add("PreviewImage", images=report)
    graph.add("PreviewImage", images=best)
    finished = server.run(graph.prompt)
    folder = server.base / "output" / "best"
    assert len(list(folder.glob("*.png"))) == 2
    assert len(list((folder / "rejected").glob("*.png"))) == 6
    assert len(finished.files()) == 3
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    graph.prompt[best[0]]["inputs"]["keep"] = 2
    server.run(graph.prompt)
    assert {p.name for p in folder.glob("*.png")} >= {p.name for p in before if p.parent == folder}
    assert sorted(p.name for p in folder.rglob("*.png")) == sorted(p.name for p in before)


def test_an_interrupt_keeps_the_candidates(server):
    graph = Graph()
    best = graph.add(
        "ErnieBestOfN",
        model=graph.model,
        clip=graph.clip,
        vae=graph.vae,
        scorer=loader(graph, "built-in combined"),
        source=PROMPT,
        **{"name": "stopped", "choice": "custom", "n": 64, "keep": 1, "rejected": "keep", "batch_size": 1},
        **{"negative": "", "width": 128, "height": 128, "preset": "custom", "steps": 10, "cfg": 4.0, "shift": 4.0},
        seed=5,
    )
    graph.add("PreviewImage", images=best)
    folder = server.base / "output" / "stopped"
    running = server.queue(graph.prompt)
    server.wait_until(lambda: len(list(folder.rglob("*.png"))) >= 2, "two candidates are there")
    server.interrupt()
    assert server.wait(running).status == "interrupted"
    kept = list(folder.rglob("*.png"))
    assert 2 <= len(kept) < 64
    assert (folder / "candidates.jsonl").read_text(encoding="utf-8").count("\n") >= len(kept) - 1


def test_what_is_wrong_reaches_the_user(server):
    graph = Graph()
    graph.add("PreviewImage", images=score(graph, loader(graph, "clip_vision/clip/"), prompts=""))
    with pytest.raises(HostError, match="none of 6 pictures could be scored"):
        server.run(graph.prompt)
