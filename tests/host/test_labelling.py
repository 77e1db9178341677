"""The labelling nodes in a running ComfyUI: models under its memory manager, a server, interrupts, and the page."""

from __future__ import annotations

import json

import pytest
from chat_server import event, running_chat_server
from comfyui_server import HostError
from ernie_pack.ernie_core.curation.captions import LanguageCaptioner
from ernie_pack.ernie_core.curation.categories import Categories, ImageTextCategoriser
from ernie_pack.ernie_core.curation.manifest import read_rows
from ernie_pack.ernie_core.curation.taxonomy import parse_taxonomy
from ernie_pack.ernie_core.curation.vision_language import LocalWriter, Question
from host_graph import Graph, defaults
from PIL import Image
from small_data import write_pictures
from tiny_image_text import VLM_KINDS, write_siglip_folder, write_vlm_folder

pytestmark = pytest.mark.host

TREE = "things\n  star\n  circle\nplaces"


@pytest.fixture(scope="module")
def server(start_comfyui):
    """A ComfyUI with a SigLIP in miniature; hides the server of the other tests."""
    with start_comfyui() as server:
        models = server.base / "models"
        write_siglip_folder(models / "clip_vision" / "siglip")
        write_pictures(server.base / "input" / "pile", count=5)
        yield server


@pytest.fixture(scope="module")
def nodes(server):
    return server.get_json("/object_info")


@pytest.fixture
def pipe(server, nodes):
    """pipe((node, inputs), ...) -> (rows of the last manifest, reports): Ingest, then these one after the other."""

    def run(*stages, name):
        graph = Graph()
        graph.prompt.clear()
        link = graph.add("ErnieCurateIngest", **defaults(nodes, "ErnieCurateIngest", paths="pile", name=name))
        shown = []
        for kind, given in stages:
            given = {k: v(graph) if callable(v) else v for k, v in given.items()}
            link = graph.add(kind, **defaults(nodes, kind) | {"manifest": link} | given)
            shown.append(graph.add("PreviewAny", source=[link[0], 1])[0])
            if "picture" in nodes[kind]["output_name"]:
                graph.add("PreviewImage", images=[link[0], 2])
        finished = server.run(graph.prompt)
        last = max((server.base / "output" / "curation" / name).glob("*.jsonl"))
        return list(read_rows(last)), [str(finished.outputs[node]["text"]) for node in shown]

    return run


def captioner(nodes, kind, **given):
    return lambda graph: graph.add(kind, **defaults(nodes, kind) | given)


def test_the_whole_way_without_a_model(pipe):
    scorer = {"scorer_name": "built-in combined", "kind": "auto", "precision": "default", "backbone": "find"}
    rows, reports = pipe(
        ("ErnieCurateCategories", {}),
        ("ErnieCurateCaptions", {}),
        ("ErnieCurateCaptionStyles", {}),
        ("ErnieCurateScores", {"scorer": lambda g: g.add("ErnieLoadScorer", question="artimuse", **scorer)}),
        name="plain",
    )
    assert len(rows) == 5
    for row in rows:
        assert {"ingest", "categories", "captions", "styles", "scores"} == set(row["made_by"])
        assert row["prompts"]
    for text, part in zip(
        reports, ("effective categories", "with captions", "asked for 25.0%", "by category"), strict=True
    ):
        assert part in text


def test_siglip_under_the_memory_manager_sorts_as_the_engine_alone(server, pipe, tmp_path):
    rows, _ = pipe(
        ("ErnieCurateCategories", {"model_name": "clip_vision/siglip/", "taxonomy": TREE, "method": "leaves"}),
        name="siglip",
    )
    folder = server.base / "models" / "clip_vision" / "siglip"
    here = Categories(ImageTextCategoriser(folder, parse_taxonomy(TREE), cache=tmp_path, method="leaves"))
    for row, made in zip(rows, here(rows), strict=True):
        assert row["category"] == made["category"]
        assert row["category_confidence"] == pytest.approx(made["category_confidence"], abs=2e-3)
    assert list((server.base / "user").rglob("text_features/*.safetensors"))


@pytest.mark.parametrize("kind", sorted(VLM_KINDS))
def test_a_local_model_under_the_memory_manager_writes_what_the_engine_alone_does(server, pipe, nodes, kind):
    if kind != "llava":
        pytest.importorskip("torchvision", reason=f"transformers' processor of {kind} needs torchvision")
    write_vlm_folder(server.base / "models" / "VLM" / kind, kind)
    model = captioner(nodes, "ErnieLoadCaptioner", model_name=f"VLM/{kind}/", precision="fp32", max_side=64)
    plain = {"form": "plain", "max_tokens": 6, "retries": 0, "instruction": "Be brief."}
    rows, _ = pipe(("ErnieCurateCaptions", plain | {"captioner": model}), name=kind)
    writer = LocalWriter(server.base / "models" / "VLM" / kind, precision="fp32", max_side_px=64)
    here = LanguageCaptioner(writer, lengths=["long"], **plain)
    for row in rows:
        (answer,) = writer.write(
            [Question(here.question({}), Image.open(row["source"]))], seeds=[0], temperature=0, max_tokens=6
        )
        made = row["captions"]["long"] if "captions" in row else row["failed"]["captions"]
        assert " ".join(str(answer).split()) in made or "failed" in row


def test_a_server_is_asked_only_with_leave_and_up_to_its_limit(server, pipe, nodes):
    answer = json.dumps({"best": 1, "second": 2, "long": "A shape.", "text": []})
    with running_chat_server((200, {}, [event(answer), event(None, finish_reason="stop")], 0)) as (url, requests):
        silent = captioner(nodes, "ErnieServerCaptioner", url=url)
        with pytest.raises(HostError, match="send_pictures"):
            pipe(("ErnieCurateCaptions", {"captioner": silent}), name="silent")
        assert requests == []
        allowed = captioner(nodes, "ErnieServerCaptioner", url=url, send_pictures=True, max_requests=3, concurrency=1)
        rows, (report,) = pipe(("ErnieCurateCaptions", {"captioner": allowed, "lengths": "long"}), name="served")
        assert len(requests) == 3
        assert sum("captions" in row for row in rows) == 3
        assert "max_requests 3 is reached" in report
