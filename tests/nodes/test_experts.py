"""Experts on a real network in miniature: who acts where, what it costs, and what bad input is told."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.weights.checkpoint import build_transformer, read_component
from ernie_pack.ernie_core.weights.lora import module_shapes
from ernie_pack.nodes import experts as expert_nodes
from ernie_pack.nodes import lora as lora_nodes
from ernie_pack.standalone import host, load_node_classes
from lora_dialects import random_lora
from random_models import RELEASED_FILES, write_random_models
from safetensors.torch import load_file, save_file

SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
EXPERT = {"start": 1.0, "end": 0.5, "lora_name": "none", "strength": 1.0, "cfg": -1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = write_random_models(tmp_path_factory.mktemp("models"))
    component = read_component(folder / RELEASED_FILES["transformer"], "transformer")
    shapes = module_shapes(build_transformer(component, dtype=torch.float32))
    (folder / "loras").mkdir(exist_ok=True)
    for i, name in enumerate("ab"):
        save_file(random_lora(shapes, rank=2 + i, seed=i), folder / "loras" / f"{name}.safetensors")
    return folder


@pytest.fixture
def node(models, tmp_path, monkeypatch):
    """node(node_id, **inputs) -> outputs."""
    monkeypatch.setattr(host, "session", host.Session(models=models, output=tmp_path / "out"))
    for module in (expert_nodes, lora_nodes):
        monkeypatch.setattr(module, "host", host)
    classes = load_node_classes()

    def call(node_id, **inputs):
        clone = classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        return clone.EXECUTE_NORMALIZED(**inputs).result

    return call


@pytest.fixture
def mixed(node):
    """mixed(model, *changes, blend=0) -> (MODEL, report) of one Expert per change."""

    def make(model, *changes, blend=0.0):
        chain = {}
        for change in changes:
            (found,) = node("ErnieExpert", **EXPERT | chain | change)
            chain = {"experts": found}
        return node("ErnieMixExperts", model=model, blend=blend, **chain)

    return make


def read_model(models, seed=None):
    component = read_component(models / RELEASED_FILES["transformer"], "transformer")
    dit = build_transformer(component, dtype=torch.float32).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in dit.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return host.Model(dit=dit)


@pytest.fixture
def model(models):
    return read_model(models)


def paint(model, *, cfg=2.0, negative=True, sigmas=SIGMAS):
    generator = torch.Generator().manual_seed(0)
    texts = [[[torch.randn(1, n, model.dit.config.text_in_dim, generator=generator), {}]] for n in (3, 1)]
    latent = {"samples": torch.zeros(1, 128, 2, 2)}
    negative = texts[1] if negative else None
    found = host.sample(model, positive=texts[0], negative=negative, latent=latent, sigmas=sigmas, cfg=cfg, seed=1)
    return found["samples"]


def with_lora(node, model, name):
    load = {"strength": 1.0, "blocks": "", "start": 1.0, "end": 0.0, "allow_unmatched": False}
    return node("ErnieLoadLora", model=model, lora_name=f"{name}.safetensors", **load)[0]


HIGH_A = {"lora_name": "a.safetensors"}
LOW_A = {"start": 0.5, "end": 0.0, "lora_name": "a.safetensors"}
LOW_B = {"start": 0.5, "end": 0.0, "lora_name": "b.safetensors"}


def test_the_same_expert_everywhere_is_the_plain_model_to_the_bit(node, mixed, model):
    plain = paint(model)
    assert torch.equal(paint(mixed(model, {"model": model}, {"start": 0.5, "end": 0.0, "model": model})[0]), plain)
    assert torch.equal(paint(mixed(model, {"cfg": 2.0}, {"start": 0.5, "end": 0.0, "cfg": 2.0})[0]), plain)
    same, _ = mixed(model, HIGH_A, LOW_A)
    assert torch.equal(paint(same), paint(with_lora(node, model, "a")))


def test_each_band_has_its_own_expert(mixed, model):
    both, _ = mixed(model, HIGH_A, LOW_B)
    first, _ = mixed(model, HIGH_A)
    second, _ = mixed(model, LOW_B)
    high, low = SIGMAS[:3], SIGMAS[3:]
    assert torch.equal(paint(both, sigmas=high), paint(first, sigmas=high))
    assert torch.equal(paint(both, sigmas=low), paint(second, sigmas=low))
    assert not torch.equal(paint(both), paint(first))
    assert torch.equal(paint(second, sigmas=high), paint(model, sigmas=high))


def test_another_model_takes_its_band(mixed, models, model):
    other = read_model(models, seed=3)
    found, report = mixed(model, {"model": other})
    assert torch.equal(paint(found, sigmas=SIGMAS[:3]), paint(other, sigmas=SIGMAS[:3]))
    assert torch.equal(paint(found, sigmas=SIGMAS[3:]), paint(model, sigmas=SIGMAS[3:]))
    assert report.splitlines() == ["1 to 0.5: an expert", "0.5 to 0: the model itself"]


def test_ten_experts_cost_what_one_model_costs(mixed, models, monkeypatch):
    calls = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    experts = [read_model(models, seed=i) for i in range(10)]
    bands = [
        {"model": expert, "start": round(1 - i / 10, 1), "end": round(0.9 - i / 10, 1)}
        for i, expert in enumerate(experts)
    ]
    found, _ = mixed(read_model(models), *bands)
    paint(found, cfg=1.0, negative=False, sigmas=torch.linspace(0.95, -0.05, 11).clamp(min=0))
    assert [experts.index(next(e for e in experts if e.dit is dit)) for dit in calls] == list(range(10))


def test_cfg_of_a_band_and_the_negative_it_saves(mixed, model, monkeypatch):
    calls = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    found, _ = mixed(model, {"cfg": 1.0})
    paint(found)  # two steps above 0.5 and three below it
    assert len(calls) == 3 + 2 * 2
    assert torch.equal(paint(found, sigmas=SIGMAS[:3]), paint(model, cfg=1.0, negative=False, sigmas=SIGMAS[:3]))


def test_a_blend_runs_from_one_expert_to_the_other(mixed, models, model):
    other = read_model(models, seed=3)
    edge = torch.tensor([0.5, 0.45])
    found, _ = mixed(model, {"model": other}, blend=0.2)
    middle = (paint(other, sigmas=edge) + paint(model, sigmas=edge)) / 2
    torch.testing.assert_close(paint(found, sigmas=edge), middle, rtol=0, atol=1e-5)
    loras, _ = mixed(model, HIGH_A, LOW_B, blend=0.2)
    hard, _ = mixed(model, HIGH_A, LOW_B)
    assert torch.equal(paint(loras, sigmas=SIGMAS[:2]), paint(hard, sigmas=SIGMAS[:2]))
    assert not torch.equal(paint(loras, sigmas=edge), paint(hard, sigmas=edge))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"start": 0.8}], "two experts claim the noise levels 0.8 to 0.5"),
        ([{"start": 0.2}], "must run down from start to end"),
        ([{"lora_name": "gone.safetensors"}], "gone.safetensors"),
    ],
)
def test_wrong_experts_say_what_to_do(mixed, model, changes, message):
    with pytest.raises(ErnieError, match=message):
        mixed(model, *changes)


def test_a_model_with_a_lora_has_it_before_it_becomes_an_expert(mixed, model):
    with pytest.raises(ErnieError, match="has a model and a LoRA; give it one of them"):
        mixed(model, HIGH_A | {"model": model})


def test_a_trained_lora_is_taken_as_it_comes(node, mixed, model, models):
    tensors = load_file(models / "loras" / "a.safetensors")
    found, report = mixed(model, {"lora": tensors})
    assert torch.equal(paint(found), paint(mixed(model, HIGH_A)[0]))
    assert report.splitlines()[0] == "1 to 0.5: the connected LoRA, strength 1"
    with pytest.raises(ErnieError, match=r"two LoRAs, the input lora and a\.safetensors"):
        node("ErnieExpert", **EXPERT | HIGH_A, lora=tensors)


def test_two_mixtures_are_not_stacked(mixed, model):
    found, _ = mixed(model, {"cfg": 1.0})
    with pytest.raises(ErnieError, match="has experts already: put all of them into one chain"):
        mixed(found, {"cfg": 3.0})


def test_an_expert_that_needs_a_negative_says_so(mixed, model):
    found, _ = mixed(model, {"cfg": 3.0})
    with pytest.raises(ErnieError, match="negative prompt expected for the expert at cfg 3"):
        paint(found, cfg=1.0, negative=False)


def test_a_negative_prompt_in_the_attention_acts_on_all_lora_experts_before_and_after_mixing(mixed, model):
    text_BTD = torch.randn(1, 2, model.dit.config.text_in_dim, generator=torch.Generator().manual_seed(5))

    def under(model):
        return host.add_nag(model, [[text_BTD, {}]], scale=5.0, alpha=0.5)

    before, _ = mixed(under(model), HIGH_A, LOW_B)
    mixture, _ = mixed(model, HIGH_A, LOW_B)
    assert torch.equal(paint(before), paint(under(mixture)))
    assert not torch.allclose(paint(before), paint(mixture), atol=1e-3)
    assert not torch.allclose(paint(before), paint(under(model)), atol=1e-3)
