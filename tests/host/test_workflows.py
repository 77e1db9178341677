"""Every example workflow in ComfyUI's page and through its HTTP API."""

import json

import pytest
from comfyui_server import HostError
from small_runs import WORKFLOWS, saved_pictures, shrink

pytestmark = pytest.mark.host

SIDE_PX, STEPS = 128, 4
RUNS = (
    "ErnieBatchFromPrompts",
    "ErnieBestOfN",
    "ErnieXYGrid",
    "ErniePromptSet",
)  # their pictures go into a folder of their own
LONG = 1000  # steps; far more than are done before the interrupt

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="session", autouse=True)
def _say_where_pictures_are(pictures_folder, request):
    yield
    if any(pictures_folder.iterdir()):
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            reporter = request.config.pluginmanager.getplugin("terminalreporter")
            reporter.write_line(f"\npictures of the pages: {pictures_folder}")


@every_workflow
def test_the_page_shows_it_without_a_fault(path, browser, pictures_folder):
    picture = pictures_folder / f"{path.stem}.png"
    seen = browser.open_workflow(path, picture=picture)
    assert picture.stat().st_size > 0
    assert seen.problems == []


@every_workflow
def test_it_runs(path, server, api_workflows):
    prompt, page = api_workflows[path.stem]
    small = shrink(prompt, side_px=SIDE_PX, steps=STEPS)
    before = server.log_text()
    if path.stem == "lora_report":  # it looks at the job of that workflow
        server.run(shrink(api_workflows["train_lora"][0], side_px=SIDE_PX, steps=STEPS))
    finished = server.run(small, page=page)
    files = [file for file in finished.files() if file["type"] == "output"]
    made = saved_pictures(small)
    if any(node["class_type"] in RUNS for node in small.values()):
        folder = server.base / "output" / "ERNIE" / path.stem
        root = server.base / "output"
        found = [p.relative_to(root) for p in sorted(folder.rglob("*.png")) if not p.name.startswith("sheet_")]
        files = [{"filename": p.name, "subfolder": p.parent.as_posix()} for p in found]
    assert len(files) == made
    enhances = any(node["class_type"] == "ErnieEnhancePrompt" for node in small.values())
    for file in files:
        image = server.picture(file)
        check_picture(image)
        assert enhances == ("ernie_enhanced" in image.info)  # core's SaveImage writes what our node noted
    assert complaints(server.log_text()[len(before) :]) == []


def complaints(log):
    """Lines of a log that warn or report a failure; what follows from the few words that the test allows is none."""
    words = ("WARNING", "ERROR", "Traceback", "not loaded", "lora key")
    few = ("was cut at", "lost quoted text")
    lines = (line for line in log.splitlines() if any(w in line for w in words))
    return [line for line in lines if not any(f in line for f in few)]


def check_picture(image):
    assert image.height == SIDE_PX
    # alone, widened by as much, or two stitched with a 16 px gap
    assert image.width in (SIDE_PX, 2 * SIDE_PX, 2 * SIDE_PX + 16)
    assert any(high - low > 8 for low, high in image.getextrema()), "the picture is one colour"
    assert json.loads(image.info["workflow"])["nodes"]
    assert all("class_type" in node for node in json.loads(image.info["prompt"]).values())


def test_an_interrupt_stops_the_sampler_and_leaves_the_queue_free(server, api_workflows):
    prompt, page = api_workflows["text_to_image"]
    long = shrink(prompt, side_px=SIDE_PX, steps=LONG)
    for node in long.values():
        if node["class_type"] == "ErnieSampler":
            node["inputs"] |= {"steps": LONG, "seed": 12345}
    before = len(server.log_text())
    running = server.queue(long, page=page)
    # The progress bar of the sampler is in the log once a step is done.
    server.wait_until(lambda: f"/{LONG} [" in server.log_text()[before:], "the sampler steps")
    server.interrupt()
    assert server.wait(running, timeout_s=60).status == "interrupted"
    server.wait_until(server.is_idle, "the queue is free")
    server.run(shrink(prompt, side_px=SIDE_PX, steps=2), page=page)


def test_a_batch_goes_on_where_it_was_stopped(server, api_workflows):
    prompt, page = api_workflows["batch_prompts"]
    small = shrink(prompt, side_px=SIDE_PX, steps=60)
    batch = next(node for node in small.values() if node["class_type"] == "ErnieBatchFromPrompts")
    batch["inputs"]["name"] = "ERNIE/stopped"
    folder = server.base / "output" / "ERNIE" / "stopped"
    running = server.queue(small, page=page)
    server.wait_until(lambda: list(folder.glob("*.png")), "the first picture is there")
    server.interrupt()
    status = server.wait(running).status
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    server.run(small, page=page)
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert status == "interrupted"
    assert len(kept) < len(after) == saved_pictures(small)
    assert kept.items() <= after.items(), "a finished picture was made again"


def test_a_wrong_value_is_refused_before_anything_runs(server, api_workflows):
    prompt, _ = api_workflows["text_to_image"]
    bad = shrink(prompt, side_px=SIDE_PX, steps=2)
    for node in bad.values():
        if node["class_type"] == "ErnieSampler":
            node["inputs"]["steps"] = 0
    with pytest.raises(HostError, match="smaller than min"):
        server.queue(bad)
