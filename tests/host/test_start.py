"""How the pack comes up in a real ComfyUI."""

import json
import re

import pytest
from comfyui_server import PACK_NAME, answers
from small_runs import ROOT, WORKFLOWS

pytestmark = pytest.mark.host

OUR_NODES = set(json.loads((ROOT / "tests" / "nodes" / "schemas.json").read_text(encoding="utf-8")))
COLOUR = re.compile(r"\x1b\[[\d;]*m")
FAILURE = re.compile(r"IMPORT FAILED|Cannot import|Error while calling comfy_entrypoint|Traceback|SyntaxWarning")


def start_log(server):
    return server.log_text().split("To see the GUI go to")[0]


def about_us(text):
    """Log lines that name the pack, less the one that says how long its import took."""
    plain = COLOUR.sub("", text)
    lines = [line for line in plain.splitlines() if PACK_NAME in line or "ERNIE" in line.upper()]
    timing = re.compile(rf"^(\[INFO\])?\s*[\d.]+ seconds: .*{PACK_NAME}$")
    return [line for line in lines if not timing.match(line)]


def test_the_pack_loads_without_a_word(server):
    text = start_log(server)
    assert f"/{PACK_NAME}" in text, "the log lists the pack among the custom nodes"
    assert not FAILURE.search(text), FAILURE.search(text)
    assert about_us(text) == []


def test_every_node_is_there_with_its_texts(nodes):
    ours = {name for name in nodes if name.startswith("Ernie")}
    assert ours == OUR_NODES
    for name in ours:
        info = nodes[name]
        assert info["category"].startswith("ERNIE/")
        assert info["description"]
        assert all(info["output_name"]), name
        for group in ("required", "optional"):
            for input_name, spec in info["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), (name, input_name)


def test_loaders_list_the_files_of_comfyuis_model_folders(nodes):
    def choices(node, name):
        kind, options = nodes[node]["input"]["required"][name]
        return kind if isinstance(kind, list) else options["options"]

    assert "ernie-image.safetensors" in choices("ErnieLoadDiffusionModel", "model_name")
    assert "ministral-3-3b.safetensors" in choices("ErnieLoadTextEncoder", "encoder_name")
    assert "ernie-image-prompt-enhancer.safetensors" in choices("ErnieLoadPromptEnhancer", "enhancer_name")
    assert "flux2-vae.safetensors" in choices("ErnieLoadVAE", "vae_name")


def test_the_template_browser_offers_the_workflows(server):
    offered = server.get_json("/api/workflow_templates")
    assert sorted(offered.get(PACK_NAME, [])) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        address = f"/api/workflow_templates/{PACK_NAME}/{path.stem}"
        assert server.get(f"{address}.json") == path.read_bytes()
        if path.with_suffix(".jpg").is_file():
            assert server.get(f"{address}.jpg") == path.with_suffix(".jpg").read_bytes()


def test_help_pages_are_served(server):
    folder = ROOT / "web" / "docs"
    if not folder.is_dir():
        pytest.skip("the pack has no help pages yet")
    for node in OUR_NODES:
        for page in (f"{node}.md", f"{node}/zh.md"):
            assert (folder / page).is_file(), page
            assert server.get(f"/extensions/{PACK_NAME}/docs/{page}") == (folder / page).read_bytes()


def test_an_old_comfyui_gets_one_polite_line(any_server):
    if any_server.version >= (0, 12):
        pytest.skip("this ComfyUI is new enough")
    assert answers(any_server)
    text = start_log(any_server)
    assert not FAILURE.search(text), FAILURE.search(text)
    lines = about_us(text)
    assert len(lines) == 1, lines
    assert "need ComfyUI 0.12 or newer" in lines[0]
    assert not [name for name in any_server.get_json("/object_info") if name.startswith("Ernie")]
