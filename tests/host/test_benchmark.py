"""Benchmarks inside a running ComfyUI: the numbers of the engine, an interrupt, bad input."""

from __future__ import annotations

import json

import pytest
from comfyui_server import HostError
from ernie_pack.ernie_core.scoring.benchmark import read_ratings, run_benchmark
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.ernie_core.scoring.geneval import TASKS
from host_graph import Graph, defaults
from PIL import Image
from rated_images import draw_rated, write_rows

pytestmark = pytest.mark.host


@pytest.fixture
def add_benchmark(nodes):
    """add_benchmark(graph, *measures, **widgets) -> number of the benchmark's node."""

    def add(graph, *measures, **widgets):
        links = {}
        for name, measure in zip(("scorer", "scorer_2", "scorer_3"), measures, strict=False):
            chosen = defaults(nodes, "ErnieLoadScorer", scorer_name=f"built-in {measure}")
            links[name] = graph.add("ErnieLoadScorer", **chosen)
        return graph.add("ErnieAestheticBenchmark", **defaults(nodes, "ErnieAestheticBenchmark", **links, **widgets))

    return add


def report_of(server, name) -> dict:
    return json.loads((server.base / "output/ernie_benchmarks" / name / "report.json").read_text("utf-8"))


def test_the_numbers_are_those_of_the_engine(server, add_benchmark):
    folder = server.base / "input/rated"
    write_rows(folder / "metadata.csv", draw_rated(folder, 20))
    graph = Graph()
    link = add_benchmark(graph, "sharpness", "contrast", ratings="rated", name="numbers", samples=200)
    graph.add("PreviewAny", source=link)
    finished = server.run(graph.prompt)
    expected = run_benchmark(
        [BuiltinScorer(measure=m) for m in ("sharpness", "contrast")], read_ratings(folder), samples=200
    )
    assert report_of(server, "numbers")["measured"] == json.loads(expected.to_json())["measured"]
    previews = [file for file in finished.files() if file["type"] == "temp"]
    assert len(previews) == 2  # charts and disagreements, under the node
    charts = server.picture(previews[0])
    assert charts.width >= 900
    assert any(high - low > 100 for low, high in charts.getextrema())
    assert Image.open(server.base / "output/ernie_benchmarks/numbers/scatter_2.png").size == (900, 560)


def test_an_interrupted_benchmark_keeps_its_scores_and_goes_on(server, add_benchmark):
    folder = server.base / "input/many"
    write_rows(folder / "gt.json", draw_rated(folder, 160, size=512))
    graph = Graph()
    add_benchmark(graph, "combined", ratings="many", name="many", batch_size=1, samples=100)
    kept = server.base / "output/ernie_benchmarks/.scores"

    def scored() -> int:
        return sum(len(file.read_text().splitlines()) for file in kept.glob("built-in-combined-*.jsonl"))

    before = scored()  # of other tests
    running = server.queue(graph.prompt)
    server.wait_until(lambda: scored() >= before + 3, "three images are scored")
    server.interrupt()
    assert server.wait(running, timeout_s=60).status == "interrupted"
    stopped = scored() - before
    assert 3 <= stopped < 160
    server.run(graph.prompt)
    assert scored() - before == 160, "no image is scored twice"
    assert report_of(server, "many")["images"] == 160


def test_geneval_is_scored_from_files(server, nodes):
    folder = server.base / "input"
    write_rows(
        folder / "meta.jsonl", [{"tag": t, "prompt": t, "include": [{"class": "cup", "count": 1}]} for t in TASKS]
    )
    cup = [{"class": "cup", "score": 0.99, "box": [0, 0, 9, 9]}]
    rows = [{"image": f"{i:05d}/samples/0000.png", "detections": cup if i % 2 else []} for i in range(6)]
    write_rows(folder / "found.jsonl", rows)
    graph = Graph()
    widgets = {"benchmark": "GenEval", "prompts": "meta.jsonl", "with_enhancer": "found.jsonl", "name": "geneval"}
    graph.add("ErniePromptBenchmark", **defaults(nodes, "ErniePromptBenchmark", **widgets))
    server.run(graph.prompt)
    assert report_of(server, "geneval")["with enhancer"]["overall"]["value"] == 0.5


def test_bad_input_is_an_error_of_the_node(server, add_benchmark):
    graph = Graph()
    add_benchmark(graph, "sharpness", ratings="nowhere")
    with pytest.raises(HostError, match="ratings must be a file or folder, got 'nowhere'"):
        server.run(graph.prompt)
