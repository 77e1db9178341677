"""Core's two LoRA loaders in standalone: from a file, from the socket that Train fills, at a strength."""

import pytest
import torch
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.weights.checkpoint import write_safetensors
from ernie_pack.standalone import host, load_node_classes
from random_models import DIT, random_weights

MODULES = ("layers.0.self_attention.to_q", "layers.1.mlp.linear_fc2")


@pytest.fixture(scope="module")
def dit():
    dit = DiT(DIT)
    dit.load_state_dict({n: t.float() for n, t in random_weights(dit.state_dict(), seed=3).items()})
    return dit.eval()


@pytest.fixture
def lora(dit, tmp_path, monkeypatch):
    """A rank-2 LoRA as core hands it on; also a file of the session."""
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(host, "session", host.Session(models=tmp_path / "models", output=tmp_path / "out"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in MODULES:
        rows, columns = dit.get_submodule(module).weight.shape
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = 0.05 * torch.randn(rows, 2, generator=generator)
    write_safetensors(tensors, host.loras_folder() / "small.safetensors")
    return tensors


def sample(model):
    return host.sample(
        model,
        positive=[[torch.randn(1, 3, DIT.text_in_dim, generator=torch.Generator().manual_seed(1)), {}]],
        negative=None,
        latent=host.empty_latent(64, 64, 1),
        sigmas=torch.tensor([1.0, 0.5, 0.0]),
        cfg=1.0,
        seed=3,
    )["samples"]


def load(node_id, **inputs):
    return load_node_classes()[node_id].execute(**inputs)[0]


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_file_and_socket_paint_as_the_merged_weights(dit, lora, strength):
    model = host.Model(dit=dit)
    by_file = load("LoraLoaderModelOnly", model=model, lora_name="small.safetensors", strength_model=strength)
    by_socket = load("LoraModelLoader", model=model, lora=lora, strength_model=strength)
    merged = DiT(DIT)
    merged.load_state_dict(dit.state_dict())
    with torch.no_grad():
        for module in MODULES:
            down, up = (lora[f"diffusion_model.{module}.lora_{side}.weight"] for side in "AB")
            merged.get_submodule(module).weight += strength * up @ down
    wanted = sample(host.Model(dit=merged.eval()))
    assert torch.equal(sample(by_file), sample(by_socket))
    assert torch.allclose(sample(by_file), wanted, atol=1e-4)
    assert not torch.allclose(sample(model), wanted, atol=1e-2)


def test_strength_zero_is_the_model_itself(dit, lora):
    model = host.Model(dit=dit)
    assert load("LoraModelLoader", model=model, lora=lora, strength_model=0.0) is model


def test_the_files_of_the_session_are_offered(lora):
    cls = load_node_classes()["LoraLoaderModelOnly"]
    offered = next(item for item in cls.GET_SCHEMA().inputs if item.id == "lora_name").as_dict()["options"]
    assert offered == ["small.safetensors"]
