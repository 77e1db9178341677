"""Training through the nodes: what they write, when they train, what an interrupt leaves, what they refuse.

The networks are random and tiny; what training achieves is measured elsewhere.
"""

import dataclasses
import importlib
import json
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.training import distillation
from ernie_pack.ernie_core.training.adapters import ADAPTER_ALGORITHMS
from ernie_pack.ernie_core.training.blocks import skip_list
from ernie_pack.ernie_core.training.job import status
from ernie_pack.ernie_core.training.objectives import SIGMA_KINDS
from ernie_pack.ernie_core.training.previews import curve_panels, draw_curves
from ernie_pack.ernie_core.training.recipe import (
    ModelPaths,
    OptimiserName,
    Precision,
    Recipe,
    ScheduleName,
    recipe_from_dict,
)
from ernie_pack.ernie_core.training.state import Job
from ernie_pack.ernie_core.training.teachers import Rule, Teacher, TeacherTable
from ernie_pack.ernie_core.weights.checkpoint import read_header, write_safetensors
from ernie_pack.standalone import graph, host, load_node_classes
from random_models import DIT, LORAS, RELEASED_FILES, write_random_models
from small_data import write_pairs, write_pictures

nodes = importlib.import_module("ernie_pack.nodes.training")
distilling = importlib.import_module("ernie_pack.nodes.distilling")
recipes = importlib.import_module("ernie_pack.nodes.recipes")

SMALL = {"steps": 3, "rank": 2, "resolution": "64", "precision": "fp32", "save_every": 2}
DISTIL = {"student_steps": 2, "fake_warmup": 2, "fake_updates": 2}
RECIPES = ("ErnieRecipe", "ErnieRecipeDPO", "ErnieRecipeDistil")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def classes(models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "session", host.Session(models=models))  # the widgets list its files
        return load_node_classes()


@pytest.fixture
def session(models, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    for folder in models.iterdir():
        if folder.name != "loras":
            (tmp_path / "models" / folder.name).symlink_to(folder)
    new = host.Session(models=tmp_path / "models", output=tmp_path / "out", input=tmp_path / "input")
    monkeypatch.setattr(host, "session", new)
    write_pictures(new.input / "pictures", count=3)
    write_pairs(new.input / "pairs", count=2)
    return new


@pytest.fixture
def node(classes, session):
    """node(node_id, **changes) -> its output, every other widget at its default; called as the host does."""

    def call(node_id: str, **inputs):
        clone = classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {"UNIQUE_ID": "7"}})
        widgets = {
            name: options.get("default", (options.get("options") or [None])[0])
            for name, kind, options, _ in graph.iter_inputs(classes[node_id])
            if graph.has_widget(kind, options)
        }
        return clone.EXECUTE_NORMALIZED(**widgets | inputs)

    return call


@pytest.fixture
def train(node):
    """train(**changes of Train's inputs) -> its output, on three pictures with a small recipe."""

    def call(recipe=None, **inputs):
        sockets = {
            "recipe": recipe or node("ErnieRecipe", **SMALL)[0],
            "models": node("ErnieTrainingModels", **chosen_models())[0],
            "process": "this one",
        }
        if "pairs" not in inputs and "dataset" not in inputs:
            sockets["dataset"] = node("ErnieDatasetFolder", path="pictures")[0]
        return node("ErnieTrain", **sockets | inputs)

    return call


def chosen_models() -> dict[str, str]:
    names = {kind: name.partition("/")[2] for kind, name in RELEASED_FILES.items()}
    return {
        "model_name": names["transformer"],
        "encoder_name": names["text_encoder"],
        "vae_name": names["vae"],
    }


def kinds_of(job) -> list[str]:
    return [event["event"] for event in job.events()]


# --- recipes ---


def test_the_choices_are_those_of_the_engine():
    assert recipes.ALGORITHMS == ADAPTER_ALGORITHMS
    assert recipes.SIGMA_KINDS == SIGMA_KINDS
    assert set(recipes.PRECISIONS) == set(typing.get_args(Precision))
    assert set(recipes.OPTIMISERS) == set(typing.get_args(OptimiserName))
    assert set(recipes.SCHEDULES) == set(typing.get_args(ScheduleName))


@pytest.mark.parametrize(("node_id", "objective"), zip(RECIPES[:2], ("sft", "dpo"), strict=True))
def test_the_defaults_are_those_of_the_engine(node, node_id, objective):
    (recipe,) = node(node_id).args
    assert recipe == Recipe(name="my_lora", models=ModelPaths(transformer=""), objective=objective)


def test_the_defaults_of_a_distillation_are_those_of_the_engine(node):
    (recipe,) = node("ErnieRecipeDistil").args
    wanted = Recipe(name="my_lora", models=ModelPaths(transformer=""), objective="distil", steps=1000)
    assert recipe == dataclasses.replace(wanted, optimiser=dataclasses.replace(wanted.optimiser, lr=5e-5))
    assert (*distilling.FORMS,) == typing.get_args(distillation.Form)
    assert (*distilling.GRADIENTS,) == typing.get_args(distillation.GradientStep)
    assert (*distilling.ROLLOUTS,) == typing.get_args(distillation.Rollout)


@pytest.mark.parametrize("node_id", RECIPES)
def test_every_widget_of_a_recipe_has_its_place(classes, session, node_id):
    names = {item.id for item in classes[node_id].GET_SCHEMA().inputs} - {"settings", "teachers", "start_lora"}
    assert names <= recipes.PATHS.keys()
    values = recipe_from_dict({"name": "a", "models": {"transformer": ""}}).to_dict()
    for name in names:
        place = values
        for key in recipes.PATHS[name]:
            place = place[key]


def test_settings_reach_every_other_part_of_a_recipe(node):
    text = 'tensorboard = true\n[adapter]\ntargets = ["layers.*.mlp.*"]\n[sigmas]\nshift = 3'
    (recipe,) = node("ErnieRecipe", settings=text, rank=8).args
    assert recipe.tensorboard
    assert recipe.adapter.targets == ("layers.*.mlp.*",)
    assert (recipe.adapter.rank, recipe.sigmas.shift) == (8, 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank = ", "settings is not valid TOML"),
        ("stepss = 3", "stepss is not a setting of a recipe: did you mean 'steps'"),
        ("[optimiser]\nlr = 1", "settings: optimiser.lr is the widget learning_rate of this node: set it there"),
        ("steps = 1", "settings: steps is the widget steps of this node"),
        ('objective = "dpo"', "settings: objective is chosen by the recipe node"),
        ('[models]\nvae = "x"', "settings: models.vae are chosen by Training Models"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(node, text, message):
    with pytest.raises(ErnieError, match=message):
        node("ErnieRecipe", settings=text)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("auto", ()),
        ("1024", (((1024,), None),)),
        ("512 + 1024", (((512, 1024), None),)),
        ("256:400, 512:900,1024", (((256,), 400), ((512,), 900), ((1024,), None))),
        (" curriculum ", (((256,), 750), ((512,), 1200), ((1024,), None))),
    ],
)
def test_resolutions_are_read(node, text, stages):
    (recipe,) = node("ErnieRecipe", resolution=text).args
    assert tuple((s.resolutions, s.until_step) for s in recipe.stages) == stages


@pytest.mark.parametrize("text", ["", "large", "512:", "512:x", "512,,1024", "-512"])
def test_a_resolution_in_another_way_is_refused(node, text):
    with pytest.raises(ErnieError, match="resolution must be auto, curriculum, or like 1024"):
        node("ErnieRecipe", resolution=text)


def test_sample_prompts_are_lines(node):
    (recipe,) = node("ErnieRecipe", sample_prompts=" a star \n\na ring\n").args
    assert recipe.samples.prompts == ("a star", "a ring")


# --- preflight ---


def test_preflight_needs_no_model(node):
    report, pictures = node("ErniePreflight", dataset=node("ErnieDatasetFolder", path="pictures")[0]).args
    assert "3" in report
    assert len(pictures) == 3
    assert all(p.shape[0] == 1 and p.shape[3] == 3 and 0 <= p.min() < p.max() <= 1 for p in pictures)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_preflight_measures_real_steps_of_the_recipe(node, session, objective):
    if objective == "sft":
        data = {"dataset": node("ErnieDatasetFolder", path="pictures")[0]}
    else:
        data = {"pairs": node("ErniePairsFolder", path="pairs")[0]}
    recipe = node("ErnieRecipe" if objective == "sft" else "ErnieRecipeDPO", **SMALL)[0]
    models = node("ErnieTrainingModels", **chosen_models())[0]
    without, _ = node("ErniePreflight", recipe=recipe, **data).args
    with_models, _ = node("ErniePreflight", recipe=recipe, models=models, **data).args
    assert "cannot be read" not in without + with_models
    measured = [line for line in with_models.splitlines() if line not in without.splitlines()]
    assert any("step" in line and " s" in line for line in measured), with_models
    assert not host.jobs_folder().exists(), "a measurement leaves nothing behind"


def test_preflight_counts_real_tokens_with_models_alone(node):
    dataset = node("ErnieDatasetFolder", path="pictures")[0]
    models = node("ErnieTrainingModels", **chosen_models())[0]
    guessed, counted = (node("ErniePreflight", dataset=dataset, models=m)[0] for m in (None, models))
    assert "estimated" in guessed
    assert counted != guessed


def test_preflight_looks_at_one_kind_of_data(node):
    dataset = node("ErnieDatasetFolder", path="pictures")[0]
    pairs = node("ErniePairsFolder", path="pairs")[0]
    for given in ({}, {"dataset": dataset, "pairs": pairs}):
        with pytest.raises(ErnieError, match="one of dataset and pairs: connect exactly one of them"):
            node("ErniePreflight", **given)
    with pytest.raises(ErnieError, match=r"\(dpo\) trains on pairs, which is not connected"):
        node("ErniePreflight", dataset=dataset, recipe=node("ErnieRecipeDPO")[0])


def test_preflight_counts_prompts_and_measures_steps_of_a_distillation(node):
    recipe = node("ErnieRecipeDistil", **SMALL, **DISTIL, prompts="a star\na red ring\na star")[0]
    models = node("ErnieTrainingModels", **chosen_models())[0]
    text, pictures = node("ErniePreflight", recipe=recipe, models=models).args
    assert "3 prompts, 3 samples per epoch" in text
    assert "## Pictures" not in text
    assert "1 exact" in text
    assert "measured" in text
    assert len(pictures) == 3


# --- training ---


def test_a_lora_is_trained_published_and_handed_on(train, session):
    lora, path, folder = train().args
    file = session.models / "loras" / "my_lora.safetensors"
    assert path == str(file)
    assert lora.keys() == read_header(file)[0].keys()
    assert all(name.startswith("diffusion_model.layers.") for name in lora)
    assert any(t.float().abs().max() > 0 for name, t in lora.items() if "lora_B" in name), "it learnt nothing"
    job = Job(folder)
    assert status(job).state == "finished"
    assert job.recipe().models.path("vae").is_absolute()
    assert "finished" in session.shown["7"]


def test_a_student_is_distilled_from_prompts_alone(train, node, session):
    recipe = node("ErnieRecipeDistil", **SMALL, **DISTIL, prompts="a star\na ring")[0]
    models = node("ErnieTrainingModels", **chosen_models())[0]
    lora, path, _ = node("ErnieTrain", recipe=recipe, models=models, process="this one").args
    assert any(t.float().abs().max() > 0 for name, t in lora.items() if "lora_B" in name), "it learnt nothing"
    metadata = read_header(Path(path))[1]
    assert json.loads(metadata["ernie.sampling"])["steps"] == 2
    report, curves = (node("ErnieTrainingReport", name="my_lora").args[i] for i in (2, 0))
    assert "sample with 2 steps, shift 4, cfg 1" in report
    assert "teachers: base at cfg 4" in report
    assert curves.shape[1] == 6 * 260  # loss, lag, way, contrast, terms, gradient


def test_a_lora_teaches_through_the_table(train, node, session):
    train()
    table = node("ErnieTeacherTable", lora_1="my_lora.safetensors", text="* | * | * | my_lora")[0]
    recipe = node("ErnieRecipeDistil", **SMALL, **DISTIL, name="fast", prompts="a star", teachers=table)[0]
    assert recipe.distil.table.used() == ("my_lora",)
    models = node("ErnieTrainingModels", **chosen_models())[0]
    _, fast, _ = node("ErnieTrain", recipe=recipe, models=models, process="this one").args
    (teacher,) = json.loads(read_header(Path(fast))[1]["ernie.teachers"])
    assert teacher["lora"] == "my_lora.safetensors"


def test_a_distillation_begins_with_the_lora_that_is_linked(node, session):
    linked = str(session.output / "start.safetensors")
    assert node("ErnieRecipeDistil", start_lora=linked)[0].initial_lora == linked
    chosen = {"initial_lora": LORAS[0]}
    (session.models / "loras").mkdir()
    (session.models / "loras" / LORAS[0]).touch()
    assert node("ErnieRecipeDistil", **chosen)[0].initial_lora.endswith(LORAS[0])
    with pytest.raises(ErnieError, match="set initial_lora to none"):
        node("ErnieRecipeDistil", start_lora=linked, **chosen)


@pytest.mark.parametrize(
    "widget", ["teacher_cfg", "student_shift", "fake_learning_rate", "gan_weight", "anchor_weight"]
)
def test_a_number_that_is_none_is_refused(node, widget):
    with pytest.raises(ErnieError, match="got nan"):
        node("ErnieRecipeDistil", prompts="a star", **{widget: float("nan")})


def test_a_lora_that_has_gone_is_named_before_anything_is_loaded(node, session, tmp_path):
    models = node("ErnieTrainingModels", **chosen_models())[0]
    gone = tmp_path / "gone.safetensors"
    recipe = node("ErnieRecipeDistil", **SMALL, prompts="a star", start_lora=str(gone))[0]
    with pytest.raises(ErnieError, match=r"initial_lora .*gone.safetensors is not there"):
        node("ErnieTrain", recipe=recipe, models=models, process="this one")
    teachers = TeacherTable(teachers=(Teacher(name="ink", lora=str(gone)),), rules=(Rule(weights={"ink": 1.0}),))
    recipe = node("ErnieRecipeDistil", **SMALL, prompts="a star", teachers=teachers)[0]
    with pytest.raises(ErnieError, match=r"the LoRA of teacher ink .*gone.safetensors is not there"):
        node("ErnieTrain", recipe=recipe, models=models, process="this one")


def test_a_distillation_wants_prompts_or_pictures(node):
    models = node("ErnieTrainingModels", **chosen_models())[0]
    recipe = node("ErnieRecipeDistil", **SMALL)[0]
    with pytest.raises(ErnieError, match="distillation needs prompts"):
        node("ErnieTrain", recipe=recipe, models=models)
    with pytest.raises(ErnieError, match=r"\(distil\) trains on dataset, which is not connected"):
        node("ErnieTrain", recipe=recipe, models=models, pairs=node("ErniePairsFolder", path="pairs")[0])
    own = node("ErnieRecipeDistil", **SMALL, prompts="a star")[0]
    with pytest.raises(ErnieError, match="has prompts of its own"):
        node("ErnieTrain", recipe=own, models=models, dataset=node("ErnieDatasetFolder", path="pictures")[0])


@pytest.mark.parametrize("process", ["this one", pytest.param("worker", marks=pytest.mark.slow)])
def test_the_node_shows_progress_curves_and_samples(train, node, monkeypatch, process):
    bars, texts = [], []

    def update(value, total, preview=None):
        bars.append((value, total, preview))

    monkeypatch.setattr(nodes.host, "progress", lambda total: SimpleNamespace(update_absolute=update))
    monkeypatch.setattr(nodes.host, "show_text", lambda node_id, text: texts.append((node_id, text)))
    samples = {"sample_prompts": "a star", "sample_width": 64, "sample_height": 64}
    recipe = node("ErnieRecipe", **SMALL | samples, settings="[samples]\nbase_steps = 2")[0]
    bars.clear()
    train(recipe, process=process)
    assert bars[-1][:2] == (3, 3)
    kind, picture, longest = [preview for _, _, preview in bars if preview is not None][-1]
    assert (kind, longest) == ("JPEG", nodes.PREVIEW_PX)
    curves = draw_curves(curve_panels(Job(host.jobs_folder() / "my_lora").events()))
    assert picture.width == curves.shape[1]
    assert picture.height > curves.shape[0], "no samples under the curves"
    assert {node_id for node_id, _ in texts} == {"7"}
    assert any("step 3 of 3, loss" in text for _, text in texts)


def test_a_second_queue_does_not_train_again(train):
    first = train()
    events = len(Job(first[2]).events())
    for action in ("start or resume", "start over", "attach"):
        again = train(action=action)
        assert all(torch.equal(a, b) for a, b in zip(first[0].values(), again[0].values(), strict=True))
        assert len(Job(first[2]).events()) == events, action


def test_more_steps_go_on_from_where_it_stopped(train, node):
    job = Job(train()[2])
    train(node("ErnieRecipe", **SMALL | {"steps": 5})[0])
    steps = [e["step"] for e in job.events() if e["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5]
    assert status(job).state == "finished"


def test_other_settings_need_another_name_or_a_new_start(train, node):
    job = Job(train()[2])
    other = node("ErnieRecipe", **SMALL | {"seed": 1})[0]
    with pytest.raises(ErnieError, match=r"has trained 3 steps with other settings \(changed: seed\)"):
        train(other)
    train(other, action="start over")
    assert job.recipe().seed == 1
    assert [e["step"] for e in job.events() if e["event"] == "step"] == [1, 2, 3]


def test_fewer_steps_than_were_trained_are_refused(train, node):
    train()
    fewer = node("ErnieRecipe", **SMALL | {"steps": 2})[0]
    with pytest.raises(ErnieError, match=r"has trained 3 steps already, steps asks for 2\. Raise steps, start it over"):
        train(fewer)
    job = Job(train(fewer, action="start over")[2])
    assert status(job).step == 2


def test_this_process_cannot_train_in_the_background(train):
    with pytest.raises(ErnieError, match="switch wait on, or choose worker"):
        train(wait=False)


def test_other_data_needs_another_name_or_a_new_start(train, node, session):
    train()
    write_pictures(session.input / "pictures", count=4)
    with pytest.raises(ErnieError, match="has trained 3 steps on other data"):
        train()
    train(action="start over")


def test_a_preference_is_trained_from_pairs(train, node):
    recipe = node("ErnieRecipeDPO", **SMALL)[0]
    pairs = node("ErniePairsFolder", path="pairs")[0]
    job = Job(train(recipe, pairs=pairs)[2])
    steps = [e for e in job.events() if e["event"] == "step"]
    assert len(steps) == 3
    assert all("accuracy" in e for e in steps)


def test_the_input_of_the_other_recipe_is_refused(train, node):
    pairs = node("ErniePairsFolder", path="pairs")[0]
    dataset = node("ErnieDatasetFolder", path="pictures")[0]
    dpo = node("ErnieRecipeDPO", **SMALL)[0]
    with pytest.raises(ErnieError, match=r"\(sft\) trains on dataset, which is not connected: connect Dataset Folder"):
        train(pairs=pairs)
    with pytest.raises(ErnieError, match=r"\(dpo\) trains on pairs, which is not connected: connect Pairs Folder"):
        train(dpo, dataset=dataset)
    with pytest.raises(ErnieError, match=r"\(dpo\) trains on pairs alone: disconnect the other input"):
        train(dpo, dataset=dataset, pairs=pairs)


def interrupt_after(session, monkeypatch, step):
    """Press cancel when the job has done `step` steps."""
    append = Job.append

    def watched(job, event):
        append(job, event)
        session.interrupted |= event["event"] == "step" and event["step"] == step

    monkeypatch.setattr(Job, "append", watched)


def test_an_interrupt_saves_and_the_next_queue_goes_on(train, node, session, monkeypatch):
    recipe = node("ErnieRecipe", **SMALL | {"steps": 6, "name": "stopped"})[0]
    whole = train(node("ErnieRecipe", **SMALL | {"steps": 6, "name": "whole"})[0])
    interrupt_after(session, monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(recipe)
    job = Job(host.jobs_folder() / "stopped")
    assert not job.is_running()
    assert status(job).state == "stopped"
    assert job.load().step == status(job).step == 3
    assert not (session.models / "loras" / "stopped.safetensors").exists()
    session.interrupted = False
    resumed = train(recipe)
    assert [e["step"] for e in job.events() if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].values(), resumed[0].values(), strict=True))


def test_a_failure_is_told_with_its_reason(train, node, session, monkeypatch):
    trainer = importlib.import_module("ernie_pack.ernie_core.training.trainer")

    def fail(self, step):
        raise ErnieError("the loss is not a number.")

    monkeypatch.setattr(trainer.Trainer, "train_step", fail)
    with pytest.raises(ErnieError, match="the loss is not a number"):
        train()
    assert not (session.models / "loras").exists()


def test_a_lora_of_the_same_name_from_elsewhere_is_kept(train, session):
    foreign = session.models / "loras" / "my_lora.safetensors"
    write_safetensors({"a": torch.ones(1)}, foreign)
    before = foreign.read_bytes()
    path = train()[1]
    assert path.endswith("my_lora_2.safetensors")
    assert foreign.read_bytes() == before
    assert train()[1] == path


def test_a_lora_of_an_earlier_run_of_the_job_is_replaced(train, node):
    first = train()
    other = train(node("ErnieRecipe", **SMALL | {"seed": 1})[0], action="start over")
    assert first[1] == other[1]
    assert any(not torch.equal(a, b) for a, b in zip(first[0].values(), other[0].values(), strict=True))


def test_a_deleted_lora_is_noticed(train, classes, session):
    cls = classes["ErnieTrain"]
    nodes._published.clear()
    train()
    before = cls.fingerprint_inputs(wait=True)
    assert cls.fingerprint_inputs(wait=True) == before
    (session.models / "loras" / "my_lora.safetensors").unlink()
    assert cls.fingerprint_inputs(wait=True) != before
    train()
    assert cls.fingerprint_inputs(wait=True) == before
    assert cls.fingerprint_inputs(wait=False) != cls.fingerprint_inputs(wait=False)


# --- the worker process ---


@pytest.mark.slow
def test_the_worker_trains_as_this_process_does(train, node):
    here = train(node("ErnieRecipe", **SMALL | {"name": "here"})[0])
    there = train(node("ErnieRecipe", **SMALL | {"name": "there"})[0], process="worker")
    assert here[0].keys() == there[0].keys()
    tensors = zip(here[0].values(), there[0].values(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in tensors)


@pytest.mark.slow
def test_without_waiting_the_graph_goes_on_and_attach_waits(train, node, session):
    recipe = node("ErnieRecipe", **SMALL | {"steps": 40})[0]
    with pytest.raises(ErnieError, match="attach: the job my_lora is not running; choose start or resume"):
        train(recipe, action="attach", process="worker")
    started = train(recipe, process="worker", wait=False)
    assert isinstance(started[0], graph.Blocked)
    assert isinstance(started[1], graph.Blocked)
    assert "in the background" in session.shown["7"]
    job = Job(started[2])
    while not job.is_running():
        assert status(job).state != "failed", status(job).message
    with pytest.raises(ErnieError, match="is running with other settings or other data"):
        train(node("ErnieRecipe", **SMALL | {"steps": 40, "seed": 3})[0], process="worker")
    with pytest.raises(ErnieError, match="is running: interrupt it before it is started over"):
        train(recipe, action="start over", process="worker")
    lora, path, _ = train(recipe, action="attach", process="worker").args
    assert lora.keys() == read_header(Path(path))[0].keys()
    assert kinds_of(job).count("finished") == 1


@pytest.mark.slow
def test_an_interrupt_stops_the_worker_after_it_has_saved(train, node, session, monkeypatch):
    recipe = node("ErnieRecipe", **SMALL | {"steps": 5000})[0]
    real = nodes.host.is_interrupted

    def pressed():
        job = Job(host.jobs_folder() / "my_lora")
        session.interrupted |= any(e["event"] == "step" for e in job.events())
        return real()

    monkeypatch.setattr(nodes.host, "is_interrupted", pressed)
    with pytest.raises(Interrupted):
        train(recipe, process="worker")
    job = Job(host.jobs_folder() / "my_lora")
    assert not job.is_running()
    assert job.load().step == status(job).step > 0
    assert status(job).state == "stopped"


@pytest.mark.slow
def test_an_interrupt_before_the_worker_is_up_reaches_it(train, session, monkeypatch):
    monkeypatch.setattr(nodes.host, "unload_models", lambda: setattr(session, "interrupted", True))
    with pytest.raises(Interrupted):
        train(process="worker")
    job = Job(host.jobs_folder() / "my_lora")
    assert not job.is_running()
    assert status(job).state == "stopped"
    assert status(job).step < 3
    monkeypatch.undo()
    session.interrupted = False
    monkeypatch.setattr(host, "session", session)
    assert status(Job(train()[2])).state == "finished"


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_with_its_log(train, node, session):
    recipe = node("ErnieRecipe", **SMALL)[0]
    models = dataclasses.replace(node("ErnieTrainingModels", **chosen_models())[0], transformer="/nowhere/model")
    with pytest.raises(ErnieError, match=r"the training of my_lora ended at step 0 of 3: .*/nowhere/model") as error:
        train(recipe, models=models, process="worker")
    assert "The end of" in str(error.value)
    assert not (session.models / "loras").exists()


# --- report and depth ---


def test_the_report_of_a_job(train, node):
    folder = train(
        node(
            "ErnieRecipe",
            **SMALL,
            sample_prompts="a star",
            sample_width=64,
            sample_height=64,
            settings="[samples]\nbase_steps = 2",
        )[0]
    )[2]
    by_name, by_socket = node("ErnieTrainingReport", name="my_lora"), node("ErnieTrainingReport", name="", job=folder)
    curves, samples, text = by_name.args
    assert curves.shape[0] == samples.shape[0] == 1
    assert curves.shape[3] == samples.shape[3] == 3
    assert 0 <= curves.min() < curves.max() <= 1
    assert "step 3 of 3" in text
    assert text == by_socket[2]
    assert len(by_name.ui["images"]) == 2


def test_without_samples_what_is_behind_them_does_not_run(train, node):
    train()
    assert isinstance(node("ErnieTrainingReport", name="my_lora")[1], graph.Blocked)


def test_a_report_of_no_job_names_those_that_are_there(train, node):
    with pytest.raises(ErnieError, match="there is no training job 'cat'; there are: none"):
        node("ErnieTrainingReport", name="cat")
    train()
    for name in ("cat", "../ernie_jobs/my_lora", ""):
        with pytest.raises(ErnieError, match=f"there is no training job '{name}'; there are: my_lora"):
            node("ErnieTrainingReport", name=name)


def test_reduced_depth_of_no_blocks_is_the_same_model(run, recording):
    model = object()
    assert run("ErnieReducedDepth", model=model, blocks=0).result[0] is model
    assert recording.calls == []


def test_reduced_depth_leaves_out_what_training_left_out(run, recording):
    run("ErnieReducedDepth", model="MODEL", blocks=3)
    assert recording.calls == [("skip_blocks", "MODEL", skip_list(36, 3))]


def test_a_skipped_block_hands_on_what_it_gets(classes, session):
    """By the host port: the same velocity as a model whose block adds nothing."""
    from ernie_pack.ernie_core.model.dit import DiT

    torch.manual_seed(0)
    dit = DiT(DIT)
    model = host.Model(dit=dit)
    arguments = {
        "positive": [[torch.randn(1, 3, DIT.text_in_dim), {}]],
        "negative": None,
        "latent": host.empty_latent(64, 64, 1),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "cfg": 1.0,
        "seed": 3,
    }
    skipped = host.sample(host.skip_blocks(model, (1,)), **arguments)["samples"]
    whole = host.sample(model, **arguments)["samples"]
    with torch.no_grad():
        dit.layers[1].self_attention.to_out[0].weight.zero_()
        dit.layers[1].mlp.linear_fc2.weight.zero_()
    assert torch.equal(skipped, host.sample(model, **arguments)["samples"])
    assert not torch.equal(skipped, whole)
