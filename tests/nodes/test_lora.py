"""The LoRA nodes on real files in miniature: every widget matters, files are whole, messages say what to do."""

import json

import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.weights.checkpoint import build_transformer, read_component, save_single_file
from ernie_pack.ernie_core.weights.lora import DIALECTS, read_lora, weight_shapes
from ernie_pack.nodes import lora as lora_nodes
from ernie_pack.standalone import host, load_node_classes
from lora_dialects import make_factors, random_lora, spell
from random_models import RELEASED_FILES, write_random_models
from safetensors.torch import load_file, save_file

BASE, OTHER = "ernie-image.safetensors", "other.safetensors"
LOAD = {
    "lora_name": "a.safetensors",
    "strength": 1.0,
    "blocks": "",
    "start": 1.0,
    "end": 0.0,
    "allow_unmatched": False,
}
NO_STACK = {f"lora_{i}": "none" for i in (2, 3)} | {f"strength_{i}": 1.0 for i in (1, 2, 3)}
NO_STACK |= {f"blocks_{i}": "" for i in (1, 2, 3)}
MERGE = {"model_name": BASE, "lora_1": "a.safetensors", **NO_STACK, "allow_unmatched": False, "name": "m"}
EXTRACT = {"base_name": BASE, "tuned_name": OTHER, "rank": 4, "energy": 1.0, "vectors": False, "dtype": "bf16"}
RESIZE = {"model_name": BASE, "lora_name": "b.safetensors", "rank": 2, "energy": 1.0}
CONVERT = {"model_name": BASE, "lora_name": "a.safetensors", "dialect": "comfyui", "rank": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A models folder: two checkpoints, four LoRAs."""
    folder = write_random_models(tmp_path_factory.mktemp("models"))
    component = read_component(folder / RELEASED_FILES["transformer"], "transformer")
    shapes = weight_shapes(component.state_dict)
    (folder / "loras").mkdir(exist_ok=True)
    for i, name in enumerate("abc"):
        save_file(random_lora(shapes, rank=2 + i, seed=i), folder / "loras" / f"{name}.safetensors")
    dora = {p: make_factors("dora", *s, seed=9) for p, s in shapes.items() if p.startswith("layers.") and len(s) == 2}
    save_file(spell("ai-toolkit", dora), folder / "loras" / "dora.safetensors")
    strangers = {"transformer.layers.7.mlp.up_proj": make_factors("lora", 96, 64)}
    mixed = random_lora(shapes) | {
        f"{path}.{leaf}.weight": t for path, tensors in strangers.items() for leaf, t in tensors.items()
    }
    save_file(mixed, folder / "loras" / "mixed.safetensors")
    state = {name: t + 0.05 * torch.randn(t.shape).to(t) for name, t in component.state_dict.items()}
    other = type(component)(kind="transformer", config=component.config, state_dict=state, source=component.source)
    save_single_file(other, folder / "diffusion_models" / OTHER)
    return folder


@pytest.fixture
def models(made, tmp_path):
    """The same in a folder that a test may write into."""
    for kind in ("diffusion_models", "loras"):
        (tmp_path / "models" / kind).mkdir(parents=True)
        for file in (made / kind).iterdir():
            (tmp_path / "models" / kind / file.name).hardlink_to(file)
    return tmp_path / "models"


@pytest.fixture
def node(models, tmp_path, monkeypatch):
    """node(node_id, **inputs) -> outputs."""
    monkeypatch.setattr(host, "session", host.Session(models=models, output=tmp_path / "out"))
    monkeypatch.setattr(lora_nodes, "host", host)
    classes = load_node_classes()

    def call(node_id, **inputs):
        clone = classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {"UNIQUE_ID": "7"}})
        return clone.EXECUTE_NORMALIZED(**inputs).result

    return call


@pytest.fixture
def model(models):
    component = read_component(models / "diffusion_models" / BASE, "transformer")
    return host.Model(dit=build_transformer(component, dtype=torch.float32).eval())


def velocity(model, sigmas=(1.0, 0.5, 0.1)):
    """What the model says at some noise levels, through the host's own sampler: one step from each."""
    generator = torch.Generator().manual_seed(0)
    text = [[torch.randn(1, 3, model.dit.config.text_in_dim, generator=generator), {}]]
    latent = {"samples": torch.randn(1, 128, 2, 2, generator=generator)}
    return [
        host.sample(
            model, positive=text, negative=None, latent=latent, sigmas=torch.tensor([s, 0.05]), cfg=1.0, seed=1
        )["samples"]
        for s in sigmas
    ]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- loading ------------------------------------------------------------------------------------------------


def test_the_loader_says_what_matched(node, model):
    patched, report = node("ErnieLoadLora", model=model, **LOAD)
    assert report.splitlines() == ["14 of 14 matched", "14 LoRA; rank 2; dialect comfyui"]
    assert host.session.shown["7"] == report
    assert not same(velocity(patched), velocity(model))
    assert patched.dit is model.dit, "the weights are shared"


@pytest.mark.parametrize(
    "change",
    [{"lora_name": "b.safetensors"}, {"strength": 0.5}, {"blocks": "0:0"}, {"start": 0.4}, {"end": 0.4}],
    ids=lambda c: next(iter(c)),
)
def test_every_setting_of_the_loader_matters(node, model, change):
    default, _ = node("ErnieLoadLora", model=model, **LOAD)
    changed, _ = node("ErnieLoadLora", model=model, **LOAD | change)
    assert not same(velocity(default), velocity(changed))


def test_a_range_leaves_the_other_noise_levels_alone(node, model):
    patched, _ = node("ErnieLoadLora", model=model, **LOAD | {"start": 0.6, "end": 0.3})
    high, middle, low = (torch.equal(a, b) for a, b in zip(velocity(patched), velocity(model), strict=True))
    assert (high, middle, low) == (True, False, True)


@pytest.mark.parametrize(
    "change", [{"strength": 0.0}, {"blocks": "all:0"}, {"start": 0.5, "end": 0.5}], ids=["strength", "blocks", "range"]
)
def test_a_neutral_loader_hands_the_model_on(node, model, change):
    patched, report = node("ErnieLoadLora", model=model, **LOAD | change)
    assert patched is model
    assert report.startswith("14 of 14 matched")


def test_loaders_stack(node, model):
    first, _ = node("ErnieLoadLora", model=model, **LOAD)
    both, _ = node("ErnieLoadLora", model=first, **LOAD | {"lora_name": "b.safetensors", "strength": -0.5})
    other, _ = node("ErnieLoadLora", model=model, **LOAD | {"lora_name": "b.safetensors", "strength": -0.5})
    other, _ = node("ErnieLoadLora", model=other, **LOAD)
    for one, two in zip(velocity(both), velocity(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not same(velocity(first), velocity(both))


def test_unmatched_parts_are_an_error_unless_allowed(node, model):
    changes = LOAD | {"lora_name": "mixed.safetensors"}
    with pytest.raises(CheckpointError, match=r"14 of 15 adapted modules match.*Turn on allow_unmatched"):
        node("ErnieLoadLora", model=model, **changes)
    _, report = node("ErnieLoadLora", model=model, **changes | {"allow_unmatched": True})
    assert report.startswith("14 of 15 matched")
    assert "left out: transformer.layers.7.mlp.up_proj" in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "heads:1"}, "block weights are entries such as"),
        ({"blocks": "9:1"}, "must name blocks from 0 to 1"),
        ({"start": 0.2, "end": 0.8}, "must run down from start to end"),
        ({"lora_name": "gone.safetensors"}, "gone.safetensors"),
    ],
)
def test_wrong_settings_of_the_loader_say_what_to_do(node, model, change, message):
    with pytest.raises(ErnieError, match=message):
        node("ErnieLoadLora", model=model, **LOAD | change)


def test_a_newly_written_file_of_the_same_name_is_read_again(node, models):
    before = lora_nodes.ErnieLoadLora.fingerprint_inputs("a.safetensors", strength=1.0)
    assert before == lora_nodes.ErnieLoadLora.fingerprint_inputs("a.safetensors", strength=1.0)
    (models / "loras" / "a.safetensors").unlink()
    save_file({"x": torch.zeros(3)}, models / "loras" / "a.safetensors")
    assert before != lora_nodes.ErnieLoadLora.fingerprint_inputs("a.safetensors", strength=1.0)


# --- files --------------------------------------------------------------------------------------------------

FILES = {
    "ErnieMergeLora": (
        MERGE,
        [
            *({f"lora_{i}": "b.safetensors"} for i in (1, 2, 3)),
            {"strength_1": 0.5},
            {"blocks_1": "0:0"},
            *({f"lora_{i}": "b.safetensors", f"strength_{i}": 0.5} for i in (2, 3)),
            *({f"lora_{i}": "b.safetensors", f"blocks_{i}": "0:0"} for i in (2, 3)),
            {"model_name": OTHER},
        ],
    ),
    "ErnieExtractLora": (
        EXTRACT,
        [
            {"base_name": OTHER, "tuned_name": BASE},
            {"rank": 3},
            {"energy": 0.1},
            {"vectors": True},
            {"dtype": "fp32"},
        ],
    ),
    "ErnieResizeLora": (
        RESIZE,
        [
            {"lora_name": "a.safetensors"},
            {"rank": 1},
            {"energy": 0.5},
            {"lora_name": "dora.safetensors"},
            {"lora_name": "dora.safetensors", "model_name": OTHER},
        ],
    ),
    "ErnieConvertLora": (CONVERT, [{"lora_name": "b.safetensors"}, {"dialect": "kohya"}, {"rank": 1}]),
}


@pytest.mark.parametrize(
    ("node_id", "change"),
    [(node_id, change) for node_id, (_, changes) in FILES.items() for change in changes],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_every_setting_of_a_node_that_writes_matters(node, node_id, change):
    settings, _ = FILES[node_id]
    first, first_report = node(node_id, **settings | {"name": "one", "overwrite": False})
    second, second_report = node(node_id, **settings | change | {"name": "two", "overwrite": False})
    left, right = load_file(first), load_file(second)
    assert left.keys() != right.keys() or any(
        left[k].shape != right[k].shape or left[k].dtype != right[k].dtype or not torch.equal(left[k], right[k])
        for k in left
    )
    assert first_report.startswith("one.safetensors: ")
    assert second_report.startswith("two.safetensors: ")


@pytest.mark.parametrize("node_id", FILES)
def test_a_file_is_never_overwritten_unasked(node, node_id):
    settings, changes = FILES[node_id]
    path, _ = node(node_id, **settings | {"name": "sub/one", "overwrite": False})
    before = load_file(path)
    with pytest.raises(ErnieError, match="is there already: choose another name, or turn on overwrite"):
        node(node_id, **settings | changes[0] | {"name": "sub/one.safetensors", "overwrite": False})
    assert load_file(path).keys() == before.keys()
    again, _ = node(node_id, **settings | changes[0] | {"name": "sub/one", "overwrite": True})
    assert again == path
    after = load_file(path)
    assert any(k not in after or not torch.equal(after[k].float(), v.float()) for k, v in before.items())


@pytest.mark.parametrize("node_id", FILES)
@pytest.mark.parametrize("name", ["", "  ", "../up", "/etc/x", "sub/"])
def test_a_file_stays_in_its_folder(node, node_id, name):
    settings, _ = FILES[node_id]
    with pytest.raises(ErnieError, match="name must be a file name inside"):
        node(node_id, **settings | {"name": name, "overwrite": False})


def test_a_merged_checkpoint_is_the_model_with_the_loras(node, models):
    stack = {"lora_1": "dora.safetensors", "strength_1": 0.5, "lora_2": "b.safetensors", "blocks_2": "1:0.25"}
    path, report = node("ErnieMergeLora", **MERGE | stack | {"overwrite": False})
    assert path == str(models / "diffusion_models" / "m.safetensors")
    assert "dora.safetensors at 0.5, 14 of 14 matched + b.safetensors at 1 (1:0.25), 14 of 14 matched" in report
    assert json.loads(read_component(path, "transformer").metadata["ernie_merged"])[0].startswith("dora.safetensors at")
    component = read_component(models / "diffusion_models" / BASE, "transformer")
    patched = host.Model(dit=build_transformer(component, dtype=torch.float32).eval())
    for name, changes in (("dora", {"strength": 0.5}), ("b", {"blocks": "1:0.25"})):
        patched, _ = node("ErnieLoadLora", model=patched, **LOAD | {"lora_name": f"{name}.safetensors"} | changes)
    merged = build_transformer(read_component(path, "transformer"), dtype=torch.float32).eval()
    for one, two in zip(velocity(host.Model(dit=merged)), velocity(patched), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0.05 * float(two.abs().max()))  # the file is bf16


def test_an_unmatched_part_stops_a_merge_unless_allowed(node):
    with pytest.raises(CheckpointError, match="14 of 15"):
        node("ErnieMergeLora", **MERGE | {"lora_1": "mixed.safetensors", "overwrite": False})
    _, report = node(
        "ErnieMergeLora", **MERGE | {"lora_1": "mixed.safetensors", "overwrite": False, "allow_unmatched": True}
    )
    assert "14 of 15 matched" in report


def test_an_interrupted_merge_leaves_nothing(node, models, monkeypatch):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    monkeypatch.setattr(host, "throw_if_interrupted", stop)
    before = sorted(models.rglob("*"))
    with pytest.raises(Stop):
        node("ErnieMergeLora", **MERGE | {"overwrite": False})
    assert sorted(models.rglob("*")) == before


def test_an_extracted_lora_leads_from_one_checkpoint_to_the_other(node, models):
    path, report = node(
        "ErnieExtractLora", **EXTRACT | {"rank": 64, "vectors": True, "dtype": "fp32", "name": "x", "overwrite": False}
    )
    assert path == str(models / "loras" / "x.safetensors")
    assert "100.00 % of the difference" in report
    node("ErnieMergeLora", **MERGE | {"lora_1": "x.safetensors", "overwrite": False})
    merged = read_component(models / "diffusion_models" / "m.safetensors", "transformer").state_dict
    other = read_component(models / "diffusion_models" / OTHER, "transformer").state_dict
    for name, tensor in other.items():
        torch.testing.assert_close(merged[name].float(), tensor.float(), rtol=1e-2, atol=1e-3)  # both bf16


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_converted_lora_reads_back_the_same(node, models, dialect):
    path, report = node("ErnieConvertLora", **CONVERT | {"dialect": dialect, "name": "new", "overwrite": False})
    assert path.endswith("new/adapter_model.safetensors" if dialect == "peft" else "new.safetensors")
    assert (models / "loras" / "new" / "adapter_config.json").is_file() == (dialect == "peft")
    assert f"14 of 14 matched, comfyui to {dialect}, 100.00 %" in report
    shapes = weight_shapes(read_component(models / "diffusion_models" / BASE, "transformer").state_dict)
    one, two = (read_lora(p, shapes) for p in (models / "loras" / "a.safetensors", path))
    for module, layer in one.layers.items():
        torch.testing.assert_close(two.layers[module].product(), layer.product())


def test_the_widget_lists_every_dialect_of_the_engine():
    assert set(lora_nodes.DIALECTS) == set(DIALECTS)


def test_a_dora_is_converted_as_a_plain_lora_where_the_reader_needs_one(node):
    settings = CONVERT | {"lora_name": "dora.safetensors", "dialect": "diffusers", "name": "d", "overwrite": False}
    with pytest.raises(ErnieError, match="is a DoRA, which the dialect diffusers cannot hold"):
        node("ErnieConvertLora", **settings)
    path, report = node("ErnieConvertLora", **settings | {"rank": 64})
    assert "100.00 % of the change" in report
    assert not any("dora" in key for key in load_file(path))


@pytest.mark.parametrize(("node_id", "settings"), [("ErnieConvertLora", CONVERT), ("ErnieResizeLora", RESIZE)])
def test_the_checkpoint_of_a_dora_matters(node, node_id, settings):
    settings = settings | {"lora_name": "dora.safetensors", "rank": 4, "overwrite": False}
    files = [node(node_id, **settings | {"model_name": m, "name": m})[0] for m in (BASE, OTHER)]
    one, two = (load_file(file) for file in files)
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[key], two[key]) for key in one)
