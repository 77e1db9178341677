"""Every example workflow: its file is sound, its nodes and inputs exist, and it runs on a model in miniature."""

import importlib
import json
import re

import pytest
import torch
from ernie_pack.standalone import graph, host, load_node_classes, load_pack
from PIL import Image
from random_models import RELEASED_FILES, TURBO_FILE, write_random_models
from small_runs import ROOT, WORKFLOWS, saved_pictures, shrink, write_inputs

NAMES = [
    "batch_prompts",
    "benchmark_scorers",
    "best_of_n",
    "compare",
    "curate_folder",
    "curate_to_lora",
    "distil_turbo",
    "edit_words",
    "enhanced_prompt",
    "enhancer_on_off",
    "enhancer_variants",
    "evaluate_prompts",
    "experts",
    "guidance",
    "hardware_adviser",
    "hires_fix",
    "image_to_image",
    "inpaint",
    "label_folder",
    "lora_report",
    "lora_stack",
    "make_lora_fast",
    "mixed_with_core_nodes",
    "outpaint",
    "poster",
    "preference_loop",
    "regional_prompts",
    "score_folder",
    "seed_variety",
    "step_cache",
    "text_to_image",
    "tournament",
    "train_dpo",
    "train_experts",
    "train_lora",
    "turbo",
    "turbo_negative",
    "variation",
    "wildcards",
    "xy_grid",
]
HUB = "https://huggingface.co/Comfy-Org/ERNIE-Image/resolve/main/"  # as core's own ERNIE-Image blueprints have it
MODEL_WIDGETS = {"model_name", "base_name", "tuned_name", "encoder_name", "enhancer_name", "vae_name"}
WITHOUT_A_FILE = {"built-in labels"}  # what stands in such a widget and needs no file
WITHOUT_MODELS = {"benchmark_scorers", "curate_folder", "hardware_adviser", "label_folder", "lora_report"}
WITHOUT_MODELS |= {"score_folder", "tournament"}
DRAWN_BY_THE_PAGE = {"MarkdownNote"}
PAGE_ONLY_WIDGETS = {"PreviewAny"}  # the page gives it widgets that its schema does not have
TRAINING = {"ErnieDatasetFolder", "ErnieTrainingModels", "ErnieRecipe", "ErnieTrain"}
MAX_PICTURE_BYTES = 60_000


def ids(path):
    return path.stem


every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=ids)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def classes(models, tmp_path, monkeypatch):
    """Every node that standalone has; its loaders list the miniature model's files."""
    load_pack()
    session = host.Session(models=models, output=tmp_path / "out", input=tmp_path)
    monkeypatch.setattr(host, "session", session)
    write_inputs(tmp_path, side_px=64)
    return load_node_classes()


def real_nodes(page):
    return [node for node in page["nodes"] if node["type"] not in DRAWN_BY_THE_PAGE]


def test_the_promised_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == NAMES


@every_workflow
def test_the_file_is_as_the_page_saves_it(path):
    page = read(path)
    assert page["version"] == 0.4
    ids = [node["id"] for node in page["nodes"]]
    assert len(ids) == len(set(ids))
    assert page["last_node_id"] == max(ids)
    assert page["last_link_id"] == max(link[0] for link in page["links"])
    for node in page["nodes"]:
        assert len(node["pos"]) == len(node["size"]) == 2, node["id"]
        assert node["mode"] == 0, node["id"]


@every_workflow
def test_links_agree_with_both_their_ends(path):
    page = read(path)
    nodes = {node["id"]: node for node in page["nodes"]}
    seen = set()
    for number, origin, slot, target, target_slot, kind in page["links"]:
        assert number not in seen
        seen.add(number)
        output, entry = nodes[origin]["outputs"][slot], nodes[target]["inputs"][target_slot]
        assert number in output["links"]
        assert entry["link"] == number
        assert kind == output["type"]
        assert entry["type"] in (kind, "*"), (nodes[target]["type"], entry["name"])
    for node in page["nodes"]:
        ends = {slot["link"] for slot in node["inputs"]} | {n for slot in node["outputs"] for n in slot["links"]}
        assert ends - {None} <= seen, node["id"]


@every_workflow
def test_nodes_and_groups_leave_each_other_room(path):
    page, title = read(path), 30
    boxes = {
        f"{n['id']} {n['type']}": (n["pos"][0], n["pos"][1] - title, n["size"][0], n["size"][1] + title)
        for n in page["nodes"]
    }
    groups = {g["title"]: g["bounding"] for g in page["groups"]}
    assert groups
    for found in (boxes, groups):
        names = list(found)
        touching = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if overlap(found[a], found[b])]
        assert not touching
    for name, box in boxes.items():
        inside = [g for g in groups.values() if overlap(box, g)]
        assert all(contains(g, box) for g in inside), name


def overlap(a, b):
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def contains(outer, inner):
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and inner[0] + inner[2] <= outer[0] + outer[2]
        and inner[1] + inner[3] <= outer[1] + outer[3]
    )


@every_workflow
def test_every_node_input_and_widget_exists(path, classes):
    for node in real_nodes(read(path)):
        assert node["type"] in classes, node["type"]
        declared = list(graph.iter_inputs(classes[node["type"]]))
        known = {name: kind for name, kind, _, _ in declared}
        for slot in node["inputs"]:
            assert slot["name"] in known, (node["type"], slot["name"])
            assert slot["type"].split(",")[0] == known[slot["name"]].split(",")[0], (node["type"], slot["name"])
        assert len(node["outputs"]) == len(classes[node["type"]].RETURN_TYPES)
        assert [slot["type"] for slot in node["outputs"]] == list(classes[node["type"]].RETURN_TYPES)
        if node["type"] in PAGE_ONLY_WIDGETS:
            continue
        widgets = [options for _, kind, options, _ in declared if graph.has_widget(kind, options)]
        seeds = sum(bool(options.get("control_after_generate")) for options in widgets)
        assert len(node["widgets_values"]) == len(widgets) + seeds, node["type"]


@every_workflow
def test_seeds_stay_as_they_are(path):
    controls = {v for n in real_nodes(read(path)) for v in n["widgets_values"] if v in graph.CONTROLS}
    assert controls <= {"fixed"}


@every_workflow
def test_each_loader_offers_the_download_of_its_file(path, classes):
    places = dict(reversed(name.split("/")) for name in (*RELEASED_FILES.values(), TURBO_FILE))
    workflow = graph.parse_workflow(read(path), classes)
    loaders = 0
    for node in real_nodes(read(path)):
        chosen = workflow.prompt[str(node["id"])]["inputs"]
        files = [chosen[name] for name in sorted(MODEL_WIDGETS & chosen.keys()) if chosen[name] not in WITHOUT_A_FILE]
        offered = sorted(node["properties"].get("models", []), key=lambda m: files.index(m["name"]))
        assert [m["name"] for m in offered] == files, node["type"]
        for model in offered:
            loaders += 1
            assert model["directory"] == places[model["name"]]
            assert model["url"] == f"{HUB}{model['directory']}/{model['name']}"
    assert loaders >= 3 or path.stem in WITHOUT_MODELS


@every_workflow
def test_notes_say_where_each_file_goes(path):
    page = read(path)
    notes = "\n".join(n["widgets_values"][0] for n in page["nodes"] if n["type"] == "MarkdownNote")
    for node in real_nodes(page):
        for model in node["properties"].get("models", []):
            row = next(line for line in notes.splitlines() if f"[{model['name']}]({model['url']})" in line)
            assert f"`models/{model['directory']}`" in row
            assert re.search(r"[\d.]+ GB", row)


@every_workflow
def test_a_picture_lies_beside_it(path):
    picture = path.with_suffix(".jpg")
    assert picture.is_file(), f"{picture.relative_to(ROOT)} is missing"
    assert picture.stat().st_size <= MAX_PICTURE_BYTES
    with Image.open(picture) as image:
        assert image.format == "JPEG"
        assert min(image.size) >= 128
        assert any(high - low > 32 for low, high in image.convert("RGB").getextrema())


@every_workflow
def test_it_runs_without_comfyui(path, classes):
    workflow = graph.read_workflow(path, classes)
    workflow.prompt = shrink(workflow.prompt, side_px=64, steps=2)
    graph.validate(workflow.prompt, classes)
    if path.stem == "lora_report":
        train_the_job(classes)
    torch.manual_seed(0)
    result = graph.run_prompt(workflow, classes)
    assert set(result.finished) == set(workflow.prompt)
    saved = [p for p in host.session.saved if "preview" not in p.relative_to(host.session.output).parts]
    saved = [p for p in saved if p.is_file()]  # candidates that were not kept are gone
    saved = [p for p in saved if not p.name.startswith("sheet_")]  # pictures of pictures, of another size
    assert len(saved) == saved_pictures(workflow.prompt)
    for file in saved:
        with Image.open(file) as image:
            assert image.height == 64
            assert any(high - low > 8 for low, high in image.getextrema()), "the picture is one colour"
            assert json.loads(image.info["workflow"])["nodes"]
            assert json.loads(image.info["prompt"]) == workflow.prompt


def train_the_job(classes):
    """Make the job that lora_report looks at, by the workflow that comes before it."""
    workflow = graph.read_workflow(ROOT / "workflows" / "train_lora.json", classes)
    workflow.prompt = shrink(workflow.prompt, side_px=64, steps=2)
    workflow.prompt = {n: node for n, node in workflow.prompt.items() if node["class_type"] in TRAINING}
    graph.run_prompt(workflow, classes)


def test_core_and_our_sampler_paint_the_same_picture(classes):
    path = next(p for p in WORKFLOWS if p.stem == "mixed_with_core_nodes")
    workflow = graph.read_workflow(path, classes)
    workflow.prompt = shrink(workflow.prompt, side_px=64, steps=4)
    graph.validate(workflow.prompt, classes)
    graph.run_prompt(workflow, classes)
    read_image = importlib.import_module("ernie_pack.ernie_core.batch").read_image
    first, second = (read_image(file) for file in host.session.saved)
    assert (first - second).abs().max() <= 2 / 255
