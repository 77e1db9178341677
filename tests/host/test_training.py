"""Training inside a running ComfyUI: the tiny model, its worker process, interrupt and resume, core's LoRA nodes."""

from __future__ import annotations

import time
from pathlib import Path

import core_loaders
import pytest
import torch
from comfyui_server import HostError
from ernie_pack.ernie_core.training.job import status
from ernie_pack.ernie_core.training.state import Job
from ernie_pack.ernie_core.weights.checkpoint import read_header
from host_graph import Graph, defaults, difference
from safetensors.torch import load_file

pytestmark = pytest.mark.host

SAME = 1e-3  # fp32; changed weights against changed outputs, summed over the steps
FILES = {
    "model_name": "ernie-image.safetensors",
    "encoder_name": "ministral-3-3b.safetensors",
    "vae_name": "flux2-vae.safetensors",
}
SMALL = {"steps": 4, "rank": 4, "resolution": "64", "precision": "fp32", "learning_rate": 0.01, "warmup": 0}


@pytest.fixture(scope="module")
def has_core_model(comfyui_folder):
    return "class ErnieImage(" in (comfyui_folder / "comfy" / "supported_models.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(has_core_model, start_comfyui):
    """A ComfyUI with nodes that load core's classes, where it has them; hides the server of the other tests."""
    with start_comfyui(*([Path(core_loaders.__file__)] if has_core_model else [])) as server:
        yield server


@pytest.fixture(scope="module")
def nodes(server):
    return server.get_json("/object_info")


@pytest.fixture
def graph(nodes):
    """A Graph; `add_training(graph, name)` puts a small training run into it."""
    return Graph()


@pytest.fixture
def add_training(nodes):
    """add_training(graph, name, **changes of Recipe and Train) -> link to Train's first output."""

    def add(graph, name, *, kind="ErnieRecipe", process="worker", wait=True, action="start or resume", **recipe):
        if kind == "ErnieRecipe":
            path = defaults(nodes, "ErnieDatasetFolder", path="ernie_train")
            data = {"dataset": graph.add("ErnieDatasetFolder", **path)}
        else:
            path = defaults(nodes, "ErniePairsFolder", path="ernie_pairs")
            data = {"pairs": graph.add("ErniePairsFolder", **path)}
        return graph.add(
            "ErnieTrain",
            recipe=graph.add(kind, **defaults(nodes, kind, name=name, **SMALL | recipe)),
            models=graph.add("ErnieTrainingModels", **defaults(nodes, "ErnieTrainingModels", **FILES)),
            action=action,
            wait=wait,
            process=process,
            **data,
        )

    return add


def job_of(server, name) -> Job:
    return Job(server.base / "output" / "ernie_jobs" / name)


def lora_of(server, name) -> dict:
    return load_file(server.base / "models" / "loras" / f"{name}.safetensors")


def steps_of(job) -> list[int]:
    return [event["step"] for event in job.events() if event["event"] == "step"]


def test_a_lora_is_trained_and_loaded_by_core(graph, add_training, nodes, latents, server, need):
    need("LoraModelLoader")
    lora = add_training(graph, "trained")
    held = graph.add("LoraModelLoader", **defaults(nodes, "LoraModelLoader", model=graph.model, lora=lora))
    plain, by_socket = latents(graph, graph.ernie_sampler(), graph.ernie_sampler(model=held))
    assert status(job_of(server, "trained")).state == "finished"
    assert difference(plain, by_socket) > 10 * SAME, "the LoRA changed nothing"

    graph = Graph()
    name = "trained.safetensors"
    core = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=name, strength_model=1.0)
    ours = graph.add("ErnieLoadLora", **defaults(nodes, "ErnieLoadLora", model=graph.model, lora_name=name))
    from_file, by_us, under_ksampler = latents(
        graph, graph.ernie_sampler(model=core), graph.ernie_sampler(model=ours), graph.ksampler(model=core)
    )
    assert torch.equal(by_socket, from_file)
    assert difference(from_file, by_us) < SAME
    assert difference(from_file, under_ksampler) < SAME


def test_core_saves_the_lora_that_train_hands_on(graph, add_training, nodes, server, need):
    need("SaveLoRA")
    lora = add_training(graph, "trained")
    graph.add("SaveLoRA", **defaults(nodes, "SaveLoRA", lora=lora, prefix="test/handed_on"))
    server.run(graph.prompt)
    (file,) = (server.base / "output" / "test").glob("handed_on*.safetensors")
    saved, trained = load_file(file), lora_of(server, "trained")
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


def test_this_process_trains_what_the_worker_does(graph, add_training, server):
    add_training(graph, "worker")
    add_training(graph, "inside", process="this one")
    server.run(graph.prompt)
    there, here = lora_of(server, "worker"), lora_of(server, "inside")
    assert there.keys() == here.keys()
    assert all(torch.allclose(there[n].float(), here[n].float(), atol=1e-3, rtol=0.05) for n in there)


def test_a_preference_is_trained(graph, add_training, server):
    add_training(graph, "preference", kind="ErnieRecipeDPO", process="this one")
    server.run(graph.prompt)
    events = [e for e in job_of(server, "preference").events() if e["event"] == "step"]
    assert len(events) == 4
    assert all(0 <= e["accuracy"] <= 1 for e in events)


def add_distillation(graph, nodes, name, *, process="worker", lora="none", text="", **recipe):
    """A small distillation, taught by `lora` where one is given; link to Train's first output."""
    settings = {**SMALL, "student_steps": 8, "fake_updates": 1, "fake_warmup": 1, "prompts": "a red star\na blue ring"}
    table = graph.add("ErnieTeacherTable", **defaults(nodes, "ErnieTeacherTable", lora_1=lora, text=text))
    kind = "ErnieRecipeDistil"
    return graph.add(
        "ErnieTrain",
        recipe=graph.add(kind, **defaults(nodes, kind, name=name, teachers=table, **settings | recipe)),
        models=graph.add("ErnieTrainingModels", **defaults(nodes, "ErnieTrainingModels", **FILES)),
        action="start or resume",
        wait=True,
        process=process,
    )


def test_a_student_is_distilled_from_a_lora_and_paints_by_core_in_8_steps(
    graph, add_training, nodes, latents, server, need
):
    need("LoraModelLoader")
    add_training(graph, "trained")
    server.run(graph.prompt)
    graph = Graph()
    lora = add_distillation(graph, nodes, "fast", lora="trained.safetensors", text="* | * | * | trained")
    held = graph.add("LoraModelLoader", **defaults(nodes, "LoraModelLoader", model=graph.model, lora=lora))
    few = {"steps": 8, "cfg": 1.0}
    plain, by_socket = latents(graph, graph.ernie_sampler(**few), graph.ernie_sampler(model=held, **few))
    assert difference(plain, by_socket) > SAME, "the student learnt nothing"
    done = [e for e in job_of(server, "fast").events() if e["event"] == "step"]
    assert len(done) == 4
    assert {"dm_cos", "loss_fake"} <= done[-1].keys()

    graph = Graph()
    core = graph.add(
        "LoraLoader",
        model=graph.model,
        clip=graph.clip,
        lora_name="fast.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    from_file, under_ksampler = latents(
        graph, graph.ernie_sampler(model=core, **few), graph.ksampler(model=core, **few)
    )
    assert torch.equal(by_socket, from_file)
    assert difference(from_file, under_ksampler) < SAME
    _, metadata = read_header(server.base / "models" / "loras" / "fast.safetensors")
    assert '"lora": "trained.safetensors"' in metadata["ernie.teachers"]


def test_a_distillation_inside_is_the_workers_and_its_health_is_shown(graph, nodes, server):
    add_distillation(graph, nodes, "worker8", trajectory_steps=2)
    add_distillation(graph, nodes, "inside8", process="this one", trajectory_steps=2)
    server.run(graph.prompt)
    there, here = lora_of(server, "worker8"), lora_of(server, "inside8")
    assert there.keys() == here.keys()
    assert all(torch.allclose(there[n].float(), here[n].float(), atol=1e-3, rtol=0.05) for n in there)
    graph = Graph()
    report = graph.add("ErnieTrainingReport", name="inside8")
    graph.add("SaveImage", images=report, filename_prefix="test/health")
    graph.add("PreviewAny", source=[report[0], 2])
    finished = server.run(graph.prompt)
    assert any("sample with 8 steps, shift 4, cfg 1" in str(shown) for shown in finished.outputs.values())
    (curves,) = [f for f in finished.files() if f["type"] == "output"]
    assert server.picture(curves).height > 4 * 260


def test_a_distillation_without_prompts_is_an_error_of_the_node(graph, nodes, server):
    add_distillation(graph, nodes, "empty", prompts="")
    with pytest.raises(HostError, match="distillation needs prompts"):
        server.run(graph.prompt)


def test_an_interrupt_saves_frees_the_queue_and_the_next_run_finishes_the_same(graph, add_training, server):
    add_training(graph, "whole", steps=40)
    server.run(graph.prompt)
    stopped = Graph()
    add_training(stopped, "stopped", steps=40)
    running = server.queue(stopped.prompt)
    job = job_of(server, "stopped")
    server.wait_until(lambda: job.exists() and len(steps_of(job)) >= 3, "the worker has done three steps")
    server.interrupt()
    assert server.wait(running, timeout_s=60).status == "interrupted"
    assert not job.is_running()
    reached = status(job)
    assert reached.state == "stopped"
    assert job.load().step == reached.step < 40
    assert not (server.base / "models" / "loras" / "stopped.safetensors").exists()
    server.wait_until(server.is_idle, "the queue is free")
    other = Graph()
    other.add("SaveLatent", samples=other.ernie_sampler(steps=1), filename_prefix="test/after_interrupt")
    server.run(other.prompt)

    server.run(stopped.prompt)
    assert steps_of(job) == list(range(1, 41))
    first, second = lora_of(server, "whole"), lora_of(server, "stopped")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_queue_does_not_train_again(add_training, server):
    for _ in range(2):  # by ComfyUI's cache of outputs, then by the finished job
        graph = Graph()
        add_training(graph, "trained")
        server.run(graph.prompt)
        server.post("/free", {"free_memory": True, "unload_models": True})
        time.sleep(0.5)
    assert steps_of(job_of(server, "trained")) == [1, 2, 3, 4]
    assert sum(e["event"] == "finished" for e in job_of(server, "trained").events()) == 1


def test_without_waiting_the_queue_is_free_while_the_worker_trains(graph, add_training, nodes, server):
    lora = add_training(graph, "background", steps=60, wait=False)
    held = graph.add("LoraModelLoader", **defaults(nodes, "LoraModelLoader", model=graph.model, lora=lora))
    graph.add("SaveLatent", samples=graph.ernie_sampler(model=held, steps=1), filename_prefix="test/behind_train")
    finished = server.run(graph.prompt)
    assert not finished.files(), "what is behind the LoRA waits for it"
    job = job_of(server, "background")
    server.wait_until(job.is_running, "the worker has started")
    other = Graph()
    other.add("SaveLatent", samples=other.ernie_sampler(steps=1, seed=99), filename_prefix="test/meanwhile")
    assert server.run(other.prompt).files()
    assert job.is_running(), "the worker was quicker than one picture: give it more steps"
    watching = Graph()
    add_training(watching, "background", steps=60, action="attach")
    server.run(watching.prompt)
    assert status(job).state == "finished"
    assert [f["filename"] for f in server.run(graph.prompt).files() if f["type"] == "output"]


def test_a_failure_is_an_error_of_the_node(graph, add_training, server):
    add_training(graph, "impossible", settings='[adapter]\ntargets = ["nothing.*"]')
    with pytest.raises(HostError, match=r"the training of impossible ended at step 0 of 4: .*nothing"):
        server.run(graph.prompt)
    assert not (server.base / "models" / "loras" / "impossible.safetensors").exists()


def test_the_report_shows_a_job(add_training, server):
    graph = Graph()
    add_training(graph, "trained")
    server.run(graph.prompt)
    graph = Graph()
    report = graph.add("ErnieTrainingReport", name="trained")
    graph.add("SaveImage", images=report, filename_prefix="test/curves")
    graph.add("PreviewAny", source=[report[0], 2])
    finished = server.run(graph.prompt)
    (curves,) = [f for f in finished.files() if f["type"] == "output"]
    assert server.picture(curves).width >= 600
    assert any("step 4 of 4" in str(shown) for shown in finished.outputs.values())


@pytest.mark.parametrize("kind", ["ours", "core"])
def test_reduced_depth_leaves_blocks_out(kind, graph, latents, has_core_model):
    if kind == "core" and not has_core_model:
        pytest.skip("this ComfyUI has no ERNIE model of its own")
    model = graph.model if kind == "ours" else graph.add("CoreModel", file="ernie-image.safetensors")
    none = graph.add("ErnieReducedDepth", model=model, blocks=0)
    two = graph.add("ErnieReducedDepth", model=model, blocks=2)
    again = graph.add("ErnieReducedDepth", model=graph.model, blocks=2)
    whole, same, less, ours = latents(graph, *(graph.ernie_sampler(model=m) for m in (model, none, two, again)))
    assert torch.equal(whole, same)
    assert difference(whole, less) > 10 * SAME
    assert difference(less, ours) < SAME


def test_depth_is_whole_again_without_the_node(graph, latents):
    reduced = graph.add("ErnieReducedDepth", model=graph.model, blocks=2)
    before, less, after = latents(
        graph, graph.ksampler(), graph.ksampler(model=reduced), graph.ksampler(denoise=0.999, model=graph.model)
    )
    assert difference(before, less) > 10 * SAME
    graph = Graph()
    (again,) = latents(graph, graph.ksampler())
    assert torch.equal(before, again)
    assert after.isfinite().all()


def test_the_file_says_what_it_was_trained_with(add_training, server):
    graph = Graph()
    add_training(graph, "trained")
    server.run(graph.prompt)
    _, metadata = read_header(server.base / "models" / "loras" / "trained.safetensors")
    assert metadata["ss_output_name"] == "trained"
    assert str(server.base) not in str(metadata), "a path of this machine"
