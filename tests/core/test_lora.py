"""LoRA files: every dialect and algorithm against written-out formulas; blocks, ranges, merging, extracting."""

import dataclasses
import json

import lora_dialects
import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.weights.checkpoint import (
    build_transformer,
    read_component,
    save_single_file,
    write_safetensors_in_turn,
)
from ernie_pack.ernie_core.weights.lora import (
    DIALECTS,
    Lora,
    LoraLayer,
    lora_tensors,
    module_shapes,
    module_strengths,
    parse_block_weights,
    parse_lora,
    peft_config,
    read_lora,
    weight_shapes,
    write_lora,
)
from ernie_pack.ernie_core.weights.lora_edit import (
    concatenate_loras,
    extract_lora,
    factor_pair,
    low_rank,
    merge_loras,
    resize_lora,
    truncated_svd,
)
from ernie_pack.ernie_core.weights.lora_hooks import LoraStack, LoraUse
from ernie_pack.ernie_core.weights.quantise import LayerQuantisation, quantise_fp8
from lora_dialects import ALGORITHMS, SPELLINGS, expected_change, has_rank, make_factors, spell
from safetensors.torch import load_file, save_file
from tiny_components import DIT, make_component

COMPONENT = make_component("transformer")
SHAPES = weight_shapes(COMPONENT.state_dict)
PATHS = (
    "layers.0.self_attention.to_q",
    "layers.1.self_attention.to_out.0",
    "layers.1.mlp.gate_proj",
    "layers.0.mlp.linear_fc2",
    "adaLN_modulation.1",
)


def weight_of(path):
    return COMPONENT.state_dict[f"{path}.weight"]


def adapters(algorithm, paths=PATHS, **options):
    return {path: make_factors(algorithm, *SHAPES[path], seed=i, **options) for i, path in enumerate(paths)}


def make_lora(algorithm="lora", paths=PATHS, **options):
    return parse_lora(spell("ai-toolkit", adapters(algorithm, paths, **options)), SHAPES)


def matrices(shapes=SHAPES):
    return [path for path, shape in shapes.items() if len(shape) == 2]


def change_of(layer, path):
    return layer.delta(weight_of(path)).double().numpy()


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("trainer", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_every_dialect_of_every_algorithm_does_what_its_formula_says(trainer, algorithm, alpha):
    made = adapters(algorithm)
    lora = parse_lora(spell(trainer, made, alpha=alpha), SHAPES)
    assert lora.summary == f"{len(PATHS)} of {len(PATHS)} matched"
    assert lora.dialect == SPELLINGS[trainer].dialect or (trainer == "ai-toolkit" and lora.dialect == "comfyui")
    written = SPELLINGS[trainer].alpha and alpha is not None and has_rank(algorithm)
    for path, tensors in made.items():
        expected = expected_change(tensors, weight_of(path), alpha=alpha if written else None)
        found = change_of(lora.layers[path], path)
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=path)


def test_flat_names_are_looked_up_whatever_underscores_the_modules_have():
    made = {path: make_factors("lora", *SHAPES[path]) for path in matrices()}
    lora = parse_lora(spell("musubi", made), SHAPES)
    assert set(lora.layers) == set(made)
    assert "layers.1.self_attention.to_out.0" in lora.layers
    assert "time_embedding.linear_1" in lora.layers


def test_flat_names_are_unambiguous_in_the_released_model():
    flat = [path.replace(".", "_") for path in module_shapes(DiT(DiTConfig(), device="meta"))]
    assert len(set(flat)) == len(flat)


def test_shapes_come_from_modules_or_from_tensors():
    model = DiT(DIT, device="meta")
    assert module_shapes(model) == SHAPES
    assert len([p for p in module_shapes(DiT(DiTConfig(), device="meta")) if p.startswith("layers.")]) == 36 * 11


def test_a_convolution_is_adapted_by_factors_of_four_axes_or_two():
    path, shape = "x_embedder.proj", SHAPES["x_embedder.proj"]
    flat = make_factors("lora", shape[0], shape[1])
    deep = {"lora_A": flat["lora_A"][:, :, None, None], "lora_B": flat["lora_B"][:, :, None, None]}
    weight = COMPONENT.state_dict["x_embedder.proj.weight"]
    for tensors in (flat, deep):
        layer = parse_lora(spell("musubi", {path: tensors}), SHAPES).layers[path]
        assert layer.delta(weight).shape == weight.shape
        expected = expected_change(flat, weight.flatten(1), alpha=None)
        np.testing.assert_allclose(layer.delta(weight).flatten(1).double(), expected, rtol=1e-5, atol=1e-6)


def test_differences_of_norms_and_biases_are_read():
    file = {
        "diffusion_model.layers.0.adaLN_sa_ln.diff": torch.full((64,), 0.5),
        "lora_unet_layers_1_adaLN_mlp_ln.w_norm": torch.full((64,), 0.25),
        "transformer.adaLN_modulation.1.diff_b": torch.full((384,), 0.125),
    }
    lora = parse_lora(file, SHAPES)
    assert lora.summary == "3 of 3 matched"
    assert torch.equal(lora.layers["layers.0.adaLN_sa_ln"].delta(torch.ones(64)), torch.full((64,), 0.5))
    assert lora.layers["layers.1.adaLN_mlp_ln"].algorithm == "diff"
    bias_only = lora.layers["adaLN_modulation.1"]
    assert not bias_only.has_weight
    assert not bias_only.delta(weight_of("adaLN_modulation.1")).any()
    assert bias_only.bias_delta().unique().item() == 0.125


def test_the_bias_of_an_up_factor_counts_with_the_scale():
    path = "adaLN_modulation.1"
    tensors = spell("raw PEFT", {path: make_factors("lora", *SHAPES[path], rank=4)})
    tensors[f"base_model.model.{path}.lora_B.bias"] = torch.ones(SHAPES[path][0])
    config = {"r": 4, "lora_alpha": 2}
    lora = parse_lora(tensors, SHAPES, {"lora_adapter_metadata": json.dumps(config)})
    assert lora.layers[path].bias_delta().unique().item() == 0.5


# --- alpha --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 16, "lora_alpha": 16, "alpha_pattern": {"to_q": 1}, "rank_pattern": {"to_q": 4}}, 0.25),
        ({"r": 4, "alpha": 12}, 3.0),
        ({"r": 4}, 1.0),
    ],
    ids=["diffusers", "PEFT", "rank-stabilised", "patterns", "LoHa and LoKr", "no alpha"],
)
def test_alpha_comes_from_the_peft_config_where_the_file_has_no_other(config, scale):
    path = "layers.0.self_attention.to_q"
    made = {path: make_factors("lora", *SHAPES[path], rank=4)}
    metadata = {"lora_adapter_metadata": json.dumps(config), "title": "kept"}
    lora = parse_lora(spell("diffusers", made), SHAPES, metadata)
    assert lora.layers[path].scale == pytest.approx(scale)
    assert lora.metadata == {"title": "kept"}
    own = parse_lora(spell("musubi", made, alpha=1.0), SHAPES, metadata)
    assert own.layers[path].scale == 0.25


def test_a_config_beside_the_file_counts_where_the_file_is_pefts_or_alone(tmp_path):
    path = "layers.0.self_attention.to_q"
    tensors = spell("raw PEFT", {path: make_factors("lora", *SHAPES[path], rank=4)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    save_file(tensors, tmp_path / "style.safetensors")
    assert read_lora(tmp_path / "style.safetensors", SHAPES).layers[path].scale == 2.0
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert read_lora(tmp_path / "adapter_model.safetensors", SHAPES).layers[path].scale == 2.0
    assert read_lora(tmp_path / "style.safetensors", SHAPES).layers[path].scale == 1.0


def test_a_whole_lokr_ignores_the_alpha_of_its_file_and_heeds_pefts_config():
    path = "layers.0.self_attention.to_q"
    made = {path: make_factors("lokr", *SHAPES[path])}
    plain = expected_change(made[path], weight_of(path), alpha=None)
    filed = parse_lora(spell("SimpleTuner LyCORIS", made, alpha=1e10), SHAPES)
    np.testing.assert_allclose(change_of(filed.layers[path], path), plain, rtol=1e-5, atol=1e-6)
    config = {"lora_adapter_metadata": json.dumps({"r": 64, "alpha": 16})}
    scaled = parse_lora(spell("raw PEFT", made), SHAPES, config)
    np.testing.assert_allclose(change_of(scaled.layers[path], path), 0.25 * plain, rtol=1e-5, atol=1e-6)


# --- refusing -----------------------------------------------------------------------------------------------

FOREIGN = {
    "FLUX": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "SDXL": "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_q.lora_down.weight",
    "SD 1.5 or SDXL": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    "Qwen-Image": "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
    "Z-Image or Lumina": "diffusion_model.layers.0.attention.to_q.lora_A.weight",
    "Wan": "diffusion_model.blocks.0.cross_attn.q.lora_A.weight",
    "FLUX.2": "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight",
    "SD3": "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
    "a language model": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("allow", [False, True])
def test_a_lora_of_another_model_is_refused_by_name(what, allow):
    down = FOREIGN[what]
    up = down.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
    with pytest.raises(CheckpointError, match=f"^0 of 1 adapted modules match.*looks like a LoRA for {what}\\."):
        parse_lora({down: torch.zeros(4, 64), up: torch.zeros(64, 4)}, SHAPES, allow_unmatched=allow)


def test_a_lora_of_another_size_says_so_with_the_shapes():
    made = {path: make_factors("lora", 128, 128) for path in PATHS[:2]}
    with pytest.raises(CheckpointError, match=r"to_q \[128, 128\] instead of \[64, 64\].*ERNIE-Image of another size"):
        parse_lora(spell("diffusers", made), SHAPES)


def test_unmatched_modules_are_an_error_that_lists_five_unless_allowed():
    made = adapters("lora") | {f"layers.{n}.self_attention.to_q": make_factors("lora", 64, 64) for n in range(2, 9)}
    file = spell("ai-toolkit", made)
    with pytest.raises(
        CheckpointError, match=r"5 of 12 adapted modules match.*layers\.6\.[^,]*, \.\.\.\..*allow_unmatched"
    ):
        parse_lora(file, SHAPES)
    lora = parse_lora(file, SHAPES, allow_unmatched=True)
    assert lora.summary == "5 of 12 matched"
    assert set(lora.layers) == set(PATHS)
    assert len(lora.unmatched) == 7


def test_a_text_encoder_part_counts_as_unmatched():
    file = spell("musubi", adapters("lora"))
    file |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 2)}
    file |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="5 of 6 adapted modules match"):
        parse_lora(file, SHAPES)
    assert parse_lora(file, SHAPES, allow_unmatched=True).summary == "5 of 6 matched"


Q = "diffusion_model.layers.0.self_attention.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_A.weight": None}, "lacks lora_A: half a pair"),
        ({f"{Q}.lora_B.weight": None}, "lacks lora_B: half a pair"),
        ({f"{Q}.lora_A.weight": torch.zeros(5, 64)}, r"ranks of lora_B \[64, 3\] and lora_A \[5, 64\] differ"),
        ({f"{Q}.lora_A.weight": torch.full((3, 64), torch.nan)}, "lora_A holds NaN or infinite"),
        ({f"{Q}.lora_A.weight": torch.zeros(3, 64, dtype=torch.int8)}, "instead of floating-point"),
        ({f"{Q}.lokr_w1": torch.zeros(2, 2)}, "holds lora and lokr"),
        ({f"{Q}.lora_mid.weight": torch.zeros(2, 2)}, "Tucker"),
        ({f"{Q}.alpha": torch.zeros(3)}, "alpha must be one number"),
        ({f"{Q}.dora_scale": torch.ones(1, 1)}, "one number instead of one per row"),
        ({"transformer.layers.0.self_attention.to_q.lora_A.weight": torch.zeros(3, 64),
          "transformer.layers.0.self_attention.to_q.lora_B.weight": torch.zeros(64, 3)}, "adapted twice"),
        ({f"{Q}.lora_down.weight": torch.zeros(3, 64)}, "two tensors for lora_A"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("allow", [False, True])
def test_damaged_adapters_are_refused_whatever_is_allowed(change, message, allow):
    file = spell("ai-toolkit", adapters("lora")) | change
    with pytest.raises(CheckpointError, match=message):
        parse_lora({k: v for k, v in file.items() if v is not None}, SHAPES, allow_unmatched=allow)


@pytest.mark.parametrize("leaf", ["oft_blocks", "lokr_t2", "hada_t1", "set_weight", "a1.weight"])
def test_algorithms_that_are_not_read_are_named(leaf):
    file = spell("ai-toolkit", adapters("lora", PATHS[1:])) | {f"{Q}.{leaf}": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="which is not read here"):
        parse_lora(file, SHAPES)


def test_a_checkpoint_is_no_lora_and_is_named():
    with pytest.raises(CheckpointError, match=r"no LoRA in it.*looks like an ERNIE-Image transformer"):
        parse_lora(COMPONENT.state_dict, SHAPES)
    with pytest.raises(CheckpointError, match="no LoRA in it"):
        parse_lora({}, SHAPES)


def test_a_truncated_file_is_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    write_lora(make_lora(), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_lora(cut, SHAPES)


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_writing_and_reading_keeps_every_effect_or_says_that_the_dialect_cannot(dialect, algorithm, alpha, tmp_path):
    lora = parse_lora(spell("musubi", adapters(algorithm), alpha=alpha), SHAPES)
    how = DIALECTS[dialect]
    holds = algorithm == "lora" or not how.only_lora or (algorithm == "dora" and how.dora is not None)
    if not holds:
        with pytest.raises(ErnieError, match=f"the dialect {dialect} cannot hold"):
            lora_tensors(lora, dialect)
        return
    file = tmp_path / "written.safetensors"
    write_lora(lora, file, dialect=dialect)
    back = read_lora(file, SHAPES)
    assert back.dialect == dialect or algorithm.startswith(("lokr", "loha", "diff", "dokr"))
    assert back.layers.keys() == lora.layers.keys()
    assert any(key.endswith(".alpha") for key in load_file(file)) == (how.alpha and has_rank(algorithm))
    for path, layer in lora.layers.items():
        np.testing.assert_allclose(change_of(back.layers[path], path), change_of(layer, path), rtol=1e-5, atol=1e-6)


def test_the_default_is_what_all_read_with_metadata_and_without_alpha(tmp_path):
    made = parse_lora(spell("musubi", adapters("lora"), alpha=1.5), SHAPES, {"lora_adapter_metadata": "{}"})
    file = tmp_path / "a.safetensors"
    write_lora(made, file, metadata={"ss_steps": "250", "lora_adapter_metadata": '{"lora_alpha": 9, "r": 3}'})
    assert {key.split(".", 1)[0] for key in load_file(file)} == {"diffusion_model"}
    assert {key.rsplit(".", 2)[1] for key in load_file(file)} == {"lora_A", "lora_B"}
    back = read_lora(file, SHAPES)
    assert back.metadata == {"format": "pt", "ss_steps": "250"}
    path = PATHS[0]
    assert back.layers[path].scale == 1.0
    np.testing.assert_allclose(change_of(back.layers[path], path), change_of(made.layers[path], path), rtol=1e-5)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    write_lora(make_lora(), file)
    before = file.read_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ErnieError, match="the disk is full"):
        write_lora(make_lora("lora", PATHS[:1]), file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_peft_folder_gets_its_config(tmp_path):
    lora = parse_lora(spell("musubi", adapters("lora", rank=4), alpha=2.0), SHAPES)
    write_lora(lora, tmp_path / "adapter_model.safetensors", dialect="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 4, False)
    assert config == peft_config(lora)
    back = read_lora(tmp_path / "adapter_model.safetensors", SHAPES)
    for path in PATHS:
        np.testing.assert_allclose(change_of(back.layers[path], path), change_of(lora.layers[path], path), rtol=1e-5)


def test_an_empty_lora_and_an_unknown_dialect_are_refused(tmp_path):
    with pytest.raises(ErnieError, match="adapts no module"):
        write_lora(Lora(layers={}), tmp_path / "a.safetensors")
    with pytest.raises(ErnieError, match="dialect must be one of comfyui, diffusers"):
        write_lora(make_lora(), tmp_path / "a.safetensors", dialect="klingon")


# --- strength per block -------------------------------------------------------------------------------------

ALL = Lora(
    layers={path: LoraLayer(algorithm="diff", tensors={"diff": torch.zeros(shape)}) for path, shape in SHAPES.items()}
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("0:0.5", {"layers.0.": 0.5}),
        ("0-1:0.25", {"layers.": 0.25}),
        ("attention:0.5", {"layers.0.self_attention.": 0.5, "layers.1.self_attention.": 0.5}),
        ("1 mlp: 2; 0: 3", {"layers.1.mlp.": 2.0, "layers.0.": 3.0}),
        ("1 to_out:0.5\nother:4", {"layers.1.self_attention.to_out": 0.5, "": 4.0}),
        ("all:0.5, 0-0:-1", {"layers.0.": -1.0, "layers.1.": 0.5, "": 0.5}),
        ("0:3, 0:0.5", {"layers.0.": 0.5}),
        ("to_q:2", {"layers.0.self_attention.to_q": 2.0, "layers.1.self_attention.to_q": 2.0}),
    ],
)
def test_block_weights_reach_the_modules_they_name(text, expected):
    strengths = module_strengths(ALL, 0.5, text, SHAPES)
    for path in SHAPES:
        prefixes = [p for p in expected if (path.startswith(p) if p else not path.startswith("layers."))]
        weight = expected[max(prefixes, key=len)] if prefixes else 1.0
        assert strengths[path] == 0.5 * weight, path


def test_zero_strength_and_zero_weights_leave_modules_out():
    assert module_strengths(ALL, 0.0, "all:3", SHAPES) == {}
    assert set(module_strengths(ALL, 1.0, "all:0, 1 mlp:1", SHAPES)) == {
        p for p in SHAPES if p.startswith("layers.1.mlp")
    }


@pytest.mark.parametrize(
    "text", ["0.5", "0-1", "3:1", "1-0:1", "0:x", "0:nan", "head:1", "0 other:1", "0-1-2:1", ":1", "-1:1", "0 all:1"]
)
def test_a_wrong_block_weight_says_how_to_write_one(text):
    with pytest.raises(ErnieError, match=r"block weights are entries such as|must name blocks from 0 to 1"):
        parse_block_weights(text, 2)


# --- at the outputs, between noise levels -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A DiT whose activations stay small, in fp64 so that only the law can differ."""
    torch.manual_seed(0)
    model = DiT(DIT).double().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0)
    return model


def run(model, batch=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIT.in_channels, 4, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, 5, DIT.text_in_dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model(x, torch.full((batch,), 500.0), text)


def merged(model, uses):
    """The model with weights changed in place of outputs, one LoRA after the other."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for use in uses:
        for path, strength in use.strengths.items():
            layer = use.lora.layers[path]
            weight = state[f"{path}.weight"]
            weight += strength * layer.delta(weight.float()).double()
            if layer.bias_delta() is not None:
                state[f"{path}.bias"] += strength * layer.bias_delta().double()
    other = DiT(DIT).double().eval()
    other.load_state_dict(state)
    return other


def use_of(algorithm, *, start=1.0, end=0.0, strength=0.7, paths=None, seed=0):
    paths = paths or [*PATHS, "layers.0.self_attention.to_v", "final_norm.linear"]
    made = {p: make_factors(algorithm, *SHAPES[p], seed=seed + i) for i, p in enumerate(paths)}
    lora = parse_lora(spell("ai-toolkit", made), SHAPES)
    return LoraUse(lora=lora, strengths=dict.fromkeys(paths, strength), start=start, end=end)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_at_the_outputs_it_does_what_it_does_in_the_weights(model, algorithm):
    use = use_of(algorithm)
    with LoraStack([use]).applied(model):
        found = run(model)
    expected = run(merged(model, [use]))
    assert (expected - run(model)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_stack_acts_in_order_dora_included(model):
    uses = [use_of("lora", seed=1), use_of("dora", seed=2), use_of("dora columns", seed=3), use_of("lokr", seed=4)]
    with LoraStack(uses).applied(model):
        found = run(model)
    torch.testing.assert_close(found, run(merged(model, uses)), rtol=1e-4, atol=1e-5)


def test_convolutions_norms_and_biases_change_at_the_outputs_too(model):
    conv = make_factors("dora", 64, 8)
    made = {
        "x_embedder.proj": {"lora_A": conv["lora_A"][:, :, None, None], "lora_B": conv["lora_B"][:, :, None, None]},
        "layers.0.adaLN_sa_ln": {"diff": torch.linspace(-1, 1, 64)},
        "layers.1.self_attention.norm_q": {"diff": torch.linspace(-1, 1, 16)},
        "time_embedding.linear_1": {**make_factors("dora", 64, 64), "diff_b": torch.linspace(-1, 1, 64)},
    }
    lora = parse_lora(spell("ai-toolkit", made), SHAPES)
    columns = {
        "x_embedder.proj": make_factors("dora columns", 64, 8),
        "time_embedding.linear_1": make_factors("dora", 64, 64, seed=4),
    }
    second = parse_lora(spell("ai-toolkit", columns), SHAPES)
    uses = [LoraUse(lora=one, strengths=dict.fromkeys(one.layers, 0.6)) for one in (lora, second)]
    with LoraStack(uses).applied(model):
        found = run(model)
    torch.testing.assert_close(found, run(merged(model, uses)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sigma", "acts"), [(1.0, False), (0.81, False), (0.8, True), (0.5, True), (0.4, False), (0.1, False)]
)
def test_it_acts_between_its_noise_levels_only(model, sigma, acts):
    stack = LoraStack([use_of("lora", start=0.8, end=0.4)])
    plain = run(model)
    with stack.applied(model, torch.tensor([sigma])):
        assert torch.equal(run(model), plain) != acts


def test_ranges_that_meet_act_at_each_level_exactly_once(model):
    uses = [use_of("lora", start=1.0, end=0.5), use_of("lora", start=0.5, end=0.0)]
    for level in torch.linspace(0.05, 1, 20):
        assert sum(float(use.share(level[None])) for use in uses) == 1


def test_samples_at_other_noise_levels_in_one_batch_each_get_their_own(model):
    uses = [use_of("lora", start=1.0, end=0.5, seed=1), use_of("dora", start=0.9, end=0.1, seed=5)]
    stack, sigmas = LoraStack(uses), torch.tensor([0.95, 0.7, 0.3])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, DIT.in_channels, 4, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(3, 5, DIT.text_in_dim, generator=generator, dtype=torch.float64)
    with torch.no_grad(), stack.applied(model, sigmas):
        together = model(x, sigmas * 1000, text)
    # The last has the DoRA alone, whose norm in a mixed batch is that of the whole stack.
    for i in (0, 1):
        with torch.no_grad(), stack.applied(model, sigmas[i : i + 1]):
            alone = model(x[i : i + 1], sigmas[i : i + 1] * 1000, text[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        plain = model(x, sigmas * 1000, text)
    assert all((together[i] - plain[i]).abs().max() > 1e-3 for i in range(3))


def test_an_empty_range_changes_no_bit_and_a_reversed_one_is_refused(model):
    stack = LoraStack([use_of("lora", start=0.5, end=0.5)])
    for sigma in (1.0, 0.5, 0.2):
        with stack.applied(model, torch.tensor([sigma])):
            assert torch.equal(run(model), run(model))
            assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ErnieError, match="must run down from start to end"):
        use_of("lora", start=0.2, end=0.8)


def test_nothing_stays_on_the_model_after_an_error(model):
    before = run(model)
    with pytest.raises(RuntimeError, match="stop"), LoraStack([use_of("dora")]).applied(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(run(model), before)


def test_a_module_that_is_not_there_leaves_nothing_behind(model):
    use = use_of("lora")
    broken = dataclasses.replace(use, strengths={**use.strengths, "layers.9.mlp.up_proj": 1.0}, lora=Lora(
        layers={**use.lora.layers, "layers.9.mlp.up_proj": use.lora.layers[PATHS[0]]}
    ))  # fmt: skip
    with pytest.raises(AttributeError), LoraStack([broken]).applied(model):
        pass
    assert not any(m._forward_hooks for m in model.modules())


# --- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_merged_checkpoint_holds_the_sum(algorithm, tmp_path):
    lora = make_lora(algorithm)
    strengths = module_strengths(lora, 0.5, "1:2", SHAPES)
    merge_loras(COMPONENT, [(lora, strengths)], tmp_path / "merged.safetensors", names=["a 0.5"])
    merged_file = read_component(tmp_path / "merged.safetensors", "transformer")
    assert merged_file.config == COMPONENT.config
    assert json.loads(merged_file.metadata["ernie_merged"]) == ["a 0.5"]
    tensors = adapters(algorithm)
    for name, tensor in COMPONENT.state_dict.items():
        path = name.removesuffix(".weight")
        if path in tensors:
            expected = tensor.numpy() + strengths[path] * expected_change(tensors[path], tensor, alpha=None)
            np.testing.assert_allclose(merged_file.state_dict[name].numpy(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(merged_file.state_dict[name], tensor), name


def test_merging_a_stack_is_merging_one_after_the_other(tmp_path):
    one, two = make_lora("lora"), make_lora("dora")
    whole = dict.fromkeys(PATHS, 0.5)
    merge_loras(COMPONENT, [(one, whole), (two, whole)], tmp_path / "both.safetensors")
    merge_loras(COMPONENT, [(one, whole)], tmp_path / "first.safetensors")
    first = read_component(tmp_path / "first.safetensors", "transformer")
    merge_loras(first, [(two, whole)], tmp_path / "second.safetensors")
    left, right = (load_file(tmp_path / f"{name}.safetensors") for name in ("both", "second"))
    for name in left:
        torch.testing.assert_close(left[name], right[name])


def test_merging_into_a_bf16_file_rounds_once(tmp_path):
    component = make_component("transformer", torch.bfloat16)
    lora = make_lora("lora")
    merge_loras(component, [(lora, dict.fromkeys(PATHS, 1.0))], tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")
    for path in PATHS:
        weight = component.state_dict[f"{path}.weight"].float()
        expected = (weight + lora.layers[path].delta(weight)).bfloat16()
        assert torch.equal(found[f"{path}.weight"], expected)


def test_an_8_bit_checkpoint_becomes_bf16_and_loses_its_scales(tmp_path):
    state, layers = dict(COMPONENT.state_dict), {}
    for path in ("layers.0.self_attention.to_q", "layers.0.mlp.up_proj"):
        stored, scale = quantise_fp8(state[f"{path}.weight"])
        state[f"{path}.weight"] = stored
        layers[path] = LayerQuantisation(options={"format": "float8_e4m3fn"}, tensors={"weight_scale": scale})
    component = dataclasses.replace(COMPONENT, state_dict=state, quantisation=layers)
    save_single_file(component, tmp_path / "fp8.safetensors")
    component = read_component(tmp_path / "fp8.safetensors", "transformer")
    lora = make_lora("lora")
    merge_loras(component, [(lora, dict.fromkeys(PATHS, 1.0))], tmp_path / "merged.safetensors")
    found = read_component(tmp_path / "merged.safetensors", "transformer")
    assert found.quantisation is None
    path = PATHS[0]
    true = state[f"{path}.weight"].float() * layers[path].tensors["weight_scale"]
    assert torch.equal(found.state_dict[f"{path}.weight"], (true + lora.layers[path].delta(true)).bfloat16())
    untouched = "layers.0.mlp.up_proj"
    true = state[f"{untouched}.weight"].float() * layers[untouched].tensors["weight_scale"]
    assert torch.equal(found.state_dict[f"{untouched}.weight"], true.bfloat16())


def test_an_interrupted_merge_leaves_no_file(tmp_path):
    def stop(done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_loras(COMPONENT, [(make_lora(), {})], tmp_path / "merged.safetensors", on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_bias_that_the_model_lacks_is_refused_before_anything_is_written(tmp_path):
    lora = parse_lora({f"{Q}.diff_b": torch.ones(64)}, SHAPES)
    with pytest.raises(ErnieError, match="has none in this model"):
        merge_loras(COMPONENT, [(lora, dict.fromkeys(lora.layers, 1.0))], tmp_path / "merged.safetensors")
    assert not list(tmp_path.iterdir())


def test_tensors_written_in_turn_are_the_file_that_is_written_at_once(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(3, dtype=torch.int64),
        "c": torch.ones(3, dtype=torch.bfloat16),
        "d": torch.ones(5).to(torch.float8_e4m3fn),
        "e": torch.empty(0),
    }
    like = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_safetensors_in_turn(like, tensors.__getitem__, tmp_path / "a.safetensors", metadata={"k": "v"})
    found = load_file(tmp_path / "a.safetensors")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())


# --- extracting ---------------------------------------------------------------------------------------------


def tuned_component(rank=None, scale=1.0):
    """COMPONENT with every matrix changed: by full rank, or by `rank`."""
    generator = torch.Generator().manual_seed(9)
    state = {}
    for name, tensor in COMPONENT.state_dict.items():
        change = torch.randn(tensor.shape, generator=generator)
        if rank is not None and tensor.ndim >= 2:
            rows, columns = tensor.flatten(1).shape
            change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        state[name] = tensor + scale * change.reshape(tensor.shape)
    return dataclasses.replace(COMPONENT, state_dict=state)


def test_extracting_at_full_rank_with_vectors_is_exact(tmp_path):
    tuned = tuned_component()
    found = extract_lora(COMPONENT, tuned, rank=10_000, vectors=True, dtype=torch.float32)
    assert found.captured == pytest.approx(1.0, abs=1e-6)
    assert not found.left_out
    write_lora(found.lora, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", SHAPES)
    merge_loras(COMPONENT, [(lora, dict.fromkeys(lora.layers, 1.0))], tmp_path / "merged.safetensors")
    merged_file = load_file(tmp_path / "merged.safetensors")
    for name, tensor in tuned.state_dict.items():
        torch.testing.assert_close(merged_file[name], tensor, rtol=1e-4, atol=2e-5)


def test_extracting_is_optimal_by_eckart_and_young():
    tuned = tuned_component()
    found = extract_lora(COMPONENT, tuned, rank=5, dtype=torch.float32)
    lost = whole = 0.0
    for path in matrices():
        change = (tuned.state_dict[f"{path}.weight"] - weight_of(path)).double()
        values = torch.linalg.svdvals(change)
        error = (change - found.lora.layers[path].product().double()).square().sum().item()
        assert error == pytest.approx(values[5:].square().sum().item(), rel=1e-4), path
        lost, whole = lost + error, whole + change.square().sum().item()
    embedder = (tuned.state_dict["x_embedder.proj.weight"] - COMPONENT.state_dict["x_embedder.proj.weight"]).flatten(1)
    values = torch.linalg.svdvals(embedder.double())
    lost, whole = lost + values[5:].square().sum().item(), whole + values.square().sum().item()
    assert found.captured == pytest.approx(1 - lost / whole, rel=1e-5)
    assert len(found.left_out) == len([t for t in COMPONENT.state_dict.values() if t.ndim == 1])


def test_extracting_finds_a_low_rank_change_with_its_rank():
    found = extract_lora(COMPONENT, tuned_component(rank=3), rank=16, dtype=torch.float32)
    assert {layer.rank for layer in found.lora.layers.values()} == {3}
    assert found.captured == pytest.approx(1.0, abs=1e-6)


def test_energy_takes_the_smallest_rank_that_holds_it():
    matrix = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))  # squares 16, 9, 4, 1 of 30
    for energy, rank in ((0.5, 1), (0.6, 2), (0.9, 3), (0.97, 4), (1.0, 4)):
        down, _, share = low_rank(matrix, 4, energy)
        assert down.shape[0] == rank
        assert share >= min(energy, 1.0) - 1e-6
    assert low_rank(matrix, 2, 0.97)[0].shape[0] == 2


def test_modules_that_do_not_differ_are_left_out_and_equal_files_refused():
    state = dict(COMPONENT.state_dict)
    state[f"{PATHS[0]}.weight"] = state[f"{PATHS[0]}.weight"] + 1
    tuned = dataclasses.replace(COMPONENT, state_dict=state)
    found = extract_lora(COMPONENT, tuned, rank=2)
    assert set(found.lora.layers) == {PATHS[0]}
    assert found.equal == len(matrices()) + 1 - 1
    assert "1 modules, rank 1, 100.00 %" in found.summary
    with pytest.raises(ErnieError, match="do not differ in any matrix"):
        extract_lora(COMPONENT, COMPONENT, rank=2)


def test_checkpoints_of_two_sizes_are_no_pair():
    state = dict(COMPONENT.state_dict)
    del state["layers.1.mlp.up_proj.weight"]
    with pytest.raises(ErnieError, match="must be of one size"):
        extract_lora(COMPONENT, dataclasses.replace(COMPONENT, state_dict=state), rank=2)


@pytest.mark.parametrize(("rank", "energy"), [(0, 1.0), (4, 0.0), (4, 1.5)])
def test_ranks_and_energies_out_of_range_are_refused(rank, energy):
    with pytest.raises(ErnieError, match="rank must be at least 1 and energy"):
        extract_lora(COMPONENT, tuned_component(), rank=rank, energy=energy)
    with pytest.raises(ErnieError, match="rank must be at least 1 and energy"):
        resize_lora(make_lora(), rank, energy=energy)


def test_a_large_matrix_is_decomposed_near_its_optimum():
    """Beyond the size of a whole SVD, on a spectrum that falls slowly (the hard case), by less than 1 %."""
    torch.manual_seed(0)
    size, rank = 1100, 16
    left, right = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    values = torch.arange(1, size + 1).float().pow(-0.5)
    matrix = (left * values) @ right
    _, found, _ = truncated_svd(matrix, rank)
    assert found.shape[0] < size // 3, "the whole SVD ran"
    torch.testing.assert_close(found[:rank], values[:rank], rtol=1e-2, atol=0)
    down, up, share = low_rank(matrix, rank)
    optimum = values[rank:].square().sum().sqrt()
    assert (matrix - up @ down).norm() <= 1.01 * optimum
    assert share == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), rel=1e-2)


# --- resizing and adding up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "lokr factors", "lokr both factors", "loha", "diff"])
def test_resizing_is_the_best_of_its_rank_and_whole_at_full_rank(algorithm):
    lora = parse_lora(spell("musubi", adapters(algorithm), alpha=1.5), SHAPES)
    small, share = resize_lora(lora, 2)
    lost = whole = 0.0
    for path in PATHS:
        change = lora.layers[path].product().double()
        values = torch.linalg.svdvals(change)
        error = (change - small.layers[path].product().double()).square().sum().item()
        assert error == pytest.approx(values[2:].square().sum().item(), rel=1e-3, abs=1e-6)
        assert small.layers[path].rank == 2
        lost, whole = lost + error, whole + values.square().sum().item()
    assert share == pytest.approx(1 - lost / whole, rel=1e-4)
    large, share = resize_lora(lora, 1000)
    assert share == pytest.approx(1.0, abs=1e-6)
    for path in PATHS:
        assert large.layers[path].algorithm == "lora"
        torch.testing.assert_close(large.layers[path].product(), lora.layers[path].product(), rtol=1e-3, atol=1e-5)


def test_a_resized_lora_never_needs_the_large_matrix(monkeypatch):
    lora = make_lora("lora")
    monkeypatch.setattr(LoraLayer, "product", lambda *_: pytest.fail("the product was multiplied out"))
    resize_lora(lora, 2)


@pytest.mark.parametrize("algorithm", ["lokr factors", "loha"])
def test_exact_factors_of_kronecker_and_elementwise_products(algorithm):
    layer = parse_lora(spell("musubi", adapters(algorithm, PATHS[2:3], rank=2), alpha=3.0), SHAPES).layers[PATHS[2]]
    down, up = factor_pair(layer)
    assert down.shape[0] < min(SHAPES[PATHS[2]])
    torch.testing.assert_close(up @ down, layer.product(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["dora", "dora columns", "dokr"])
def test_a_dora_is_resized_with_its_checkpoint_only(algorithm):
    lora = make_lora(algorithm)
    with pytest.raises(ErnieError, match="name the checkpoint"):
        resize_lora(lora, 1000)
    plain, _ = resize_lora(lora, 1000, base=COMPONENT)
    for path in PATHS:
        np.testing.assert_allclose(
            plain.layers[path].product().numpy(), change_of(lora.layers[path], path), rtol=1e-3, atol=1e-4
        )


def test_resizing_keeps_norms_biases_and_convolutions():
    made = {
        "x_embedder.proj": {"lora_A": torch.randn(3, 8, 1, 1), "lora_B": torch.randn(64, 3, 1, 1)},
        "layers.0.adaLN_sa_ln": {"diff": torch.ones(64)},
        "time_embedding.linear_1": {**make_factors("lora", 64, 64), "diff_b": torch.ones(64)},
    }
    lora = parse_lora(spell("ai-toolkit", made), SHAPES)
    small, _ = resize_lora(lora, 1)
    assert small.layers["x_embedder.proj"].tensors["lora_A"].shape == (1, 8, 1, 1)
    assert torch.equal(small.layers["layers.0.adaLN_sa_ln"].tensors["diff"], torch.ones(64))
    assert torch.equal(small.layers["time_embedding.linear_1"].tensors["diff_b"], torch.ones(64))
    assert parse_lora(lora_tensors(small, "kohya"), SHAPES).summary == "3 of 3 matched"


def test_adding_up_is_exactly_the_sum():
    one = parse_lora(spell("musubi", adapters("lora", PATHS[:3]), alpha=1.5), SHAPES)
    two = make_lora("lora", PATHS[1:], rank=2)
    both = concatenate_loras([(one, dict.fromkeys(one.layers, 0.5)), (two, dict.fromkeys(two.layers, -2.0))])
    assert set(both.layers) == set(PATHS)
    assert both.layers[PATHS[1]].rank == 5
    for path in PATHS:
        expected = torch.zeros(SHAPES[path])
        for lora, strength in ((one, 0.5), (two, -2.0)):
            if path in lora.layers:
                expected += strength * lora.layers[path].product()
        torch.testing.assert_close(both.layers[path].product(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("algorithm", "name"), [("lokr", "LoKr"), ("loha", "LoHa"), ("dora", "DoRA")])
def test_what_cannot_be_added_up_says_so(algorithm, name):
    lora = make_lora(algorithm)
    with pytest.raises(ErnieError, match=f"is a {name}, which cannot be added up"):
        concatenate_loras([(lora, dict.fromkeys(PATHS, 1.0))])


def test_the_merged_model_runs_like_the_hooked_one(tmp_path):
    """From file to file: write, read, merge, build, and the picture-making numbers agree."""
    component = dataclasses.replace(
        COMPONENT, state_dict={n: 0.1 * t if t.ndim > 1 else t for n, t in COMPONENT.state_dict.items()}
    )
    save_file(lora_dialects.random_lora(SHAPES), tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", SHAPES)
    strengths = module_strengths(lora, 0.8, "1:0.5", SHAPES)
    merge_loras(component, [(lora, strengths)], tmp_path / "merged.safetensors")
    built = build_transformer(read_component(tmp_path / "merged.safetensors", "transformer")).double()
    hooked = build_transformer(component).double()
    with LoraStack([LoraUse(lora=lora, strengths=strengths)]).applied(hooked):
        found = run(hooked)
    torch.testing.assert_close(found, run(built), rtol=1e-4, atol=1e-4)
