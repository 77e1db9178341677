"""LoRA files and effects against the programs that wrote or read them: peft, diffusers' ERNIE-Image loader."""

from __future__ import annotations

import json

import pytest
import torch
from ernie_pack.ernie_core.weights.lora import Lora, module_shapes, parse_lora, read_lora, write_lora
from ernie_pack.ernie_core.weights.lora_hooks import LoraStack, LoraUse
from lora_dialects import make_factors, spell
from safetensors.torch import load_file, save_file
from tiny_components import DIT

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "linear_fc2"]
SAME = {"rtol": 1e-5, "atol": 1e-5}


def make_transformer(seed=0):
    torch.manual_seed(seed)
    config = DIT.to_dict()
    model = diffusers.ErnieImageTransformer2DModel(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0)
    return model


def run(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, DIT.in_channels, 4, 4, generator=generator)
    text = torch.randn(1, 5, DIT.text_in_dim, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, torch.tensor([5]), return_dict=False)[0]


def shake(model):
    """Give every adapter tensor values: some start at zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
        elif any(word in name for word in ("lora_", "lokr_", "hada_")):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
    "lora, rank-stabilised": lambda: peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=TARGETS),
    "lora, ranks by pattern": lambda: peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=TARGETS, rank_pattern={"to_q": 8}, alpha_pattern={"mlp.up_proj": 1}
    ),
    "lora with biases": lambda: peft.LoraConfig(
        r=4, lora_alpha=2, lora_bias=True, target_modules=["time_embedding.linear_1", "adaLN_modulation.1"]
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=TARGETS),
    "lokr, whole": lambda: peft.LoKrConfig(r=64, alpha=16, decompose_factor=4, target_modules=TARGETS),
    "lokr, factors": lambda: peft.LoKrConfig(r=2, alpha=1, decompose_factor=4, target_modules=TARGETS),
    "lokr, both factors": lambda: peft.LoKrConfig(
        r=1, alpha=2, decompose_factor=8, decompose_both=True, target_modules=TARGETS
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=2, target_modules=TARGETS),
    "embedder": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=["x_embedder.proj"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_own_files_do_what_peft_computes(kind, tmp_path):
    """Saved by peft with its config, read here: added to outputs, and added to weights."""
    plain = make_transformer()
    before = run(plain)
    adapted = peft.get_peft_model(make_transformer(), CONFIGS[kind]()).eval()
    shake(adapted)
    expected = run(adapted)
    assert (expected - before).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors", module_shapes(plain))
    assert lora.dialect == "peft"
    assert len(lora.layers) == sum(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in adapted.modules())
    with LoraStack([LoraUse(lora=lora, strengths=dict.fromkeys(lora.layers, 1.0))]).applied(plain):
        torch.testing.assert_close(run(plain), expected, **SAME)
    torch.testing.assert_close(run(merge(plain, lora)), expected, **SAME)


def merge(model, lora):
    for path, layer in lora.layers.items():
        module = model.get_submodule(path)
        module.weight.data += layer.delta(module.weight)
        if layer.bias_delta() is not None:
            module.bias.data += layer.bias_delta()
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_an_adapter_folder_that_we_wrote(dora, tmp_path):
    plain = make_transformer()
    shapes = module_shapes(plain)
    lora = our_lora(shapes, "dora" if dora else "lora")
    write_lora(lora, tmp_path / "adapter_model.safetensors", dialect="peft")
    found = run(peft.PeftModel.from_pretrained(make_transformer(), tmp_path).eval())
    torch.testing.assert_close(found, run(merge(plain, lora)), **SAME)


def our_lora(shapes, algorithm="lora") -> Lora:
    made = {
        path: make_factors(algorithm, *shape, rank=3 if "to_q" in path else 5, seed=i)
        for i, (path, shape) in enumerate(shapes.items())
        if path.endswith(tuple(TARGETS))
    }
    return parse_lora(spell("musubi", made, alpha=2.0), shapes)


class Pipeline(diffusers.loaders.lora_pipeline.ErnieImageLoraLoaderMixin):
    """The part of ErnieImagePipeline that loads LoRAs, around a transformer alone."""

    hf_device_map = None

    def __init__(self, transformer):
        self.transformer = transformer
        self.components = {"transformer": transformer}


@pytest.mark.parametrize("dialect", ["comfyui", "diffusers", "peft"])
def test_diffusers_loads_what_we_write_with_the_same_effect(dialect, tmp_path):
    plain = make_transformer()
    lora = our_lora(module_shapes(plain))
    name = "adapter_model.safetensors" if dialect == "peft" else "style.safetensors"
    write_lora(lora, tmp_path / name, dialect=dialect, metadata={"ss_steps": "250"})
    pipeline = Pipeline(make_transformer())
    before = run(pipeline.transformer)
    pipeline.load_lora_weights(str(tmp_path), weight_name=name, adapter_name="style")
    found = run(pipeline.transformer)
    torch.testing.assert_close(found, run(merge(plain, lora)), **SAME)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (8, 2)])
def test_a_file_of_diffusers_loads_here_with_the_same_effect(rank, alpha, tmp_path):
    """Its alpha is in the metadata only."""
    plain = make_transformer()
    pipeline = Pipeline(make_transformer())
    pipeline.transformer.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    shake(pipeline.transformer)
    layers = peft.get_peft_model_state_dict(pipeline.transformer)
    from diffusers.training_utils import _collate_lora_metadata

    metadata = _collate_lora_metadata({"transformer": pipeline.transformer})
    Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    (file,) = tmp_path.glob("*.safetensors")
    lora = read_lora(file, module_shapes(plain))
    assert lora.dialect == "diffusers"
    assert lora.summary == "14 of 14 matched"
    assert {layer.scale for layer in lora.layers.values()} == {alpha / rank}
    torch.testing.assert_close(run(merge(plain, lora)), run(pipeline.transformer), **SAME)


def test_a_file_that_was_read_with_its_alpha_is_written_without_the_config_that_holds_it(tmp_path):
    """Or diffusers would scale twice."""
    plain = make_transformer()
    shapes = module_shapes(plain)
    tensors = {f"transformer.{k}": v for k, v in _bare(our_lora(shapes)).items()}
    config = json.dumps({"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.peft_type": "LORA"})
    save_file(tensors, tmp_path / "old.safetensors", metadata={"lora_adapter_metadata": config})
    lora = read_lora(tmp_path / "old.safetensors", shapes)
    write_lora(lora, tmp_path / "new.safetensors")
    assert load_file(tmp_path / "new.safetensors")
    pipeline = Pipeline(make_transformer())
    pipeline.load_lora_weights(str(tmp_path), weight_name="new.safetensors", adapter_name="style")
    torch.testing.assert_close(run(pipeline.transformer), run(merge(plain, lora)), **SAME)


def _bare(lora):
    return {f"{path}.{leaf}.weight": t for path, layer in lora.layers.items() for leaf, t in layer.tensors.items()}
