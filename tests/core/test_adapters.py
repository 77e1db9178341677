"""Adapters and views: what is active changes the model by exactly the merged weights, what is not leaves no trace."""

import copy

import pytest
import torch
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.training.adapters import (
    ADAPTER_ALGORITHMS,
    DEFAULT_TARGETS,
    ActiveViews,
    Adapter,
    AdapterConfig,
    Views,
    split_size,
)
from ernie_pack.ernie_core.weights.lora import Lora, LoraLayer, read_lora, write_lora
from ernie_pack.ernie_core.weights.quantise import QuantisedLinear, quantise_rows
from train_models import gradients, largest_error, make_inputs, make_model, shake

CONFIGS = {
    "lora": AdapterConfig(rank=4),
    "lora, alpha": AdapterConfig(rank=4, alpha=8.0),
    "lokr": AdapterConfig(algorithm="lokr", rank=2, factor=4, alpha=1.0),
    "lokr, whole": AdapterConfig(algorithm="lokr", rank=64, factor=8, alpha=32.0),
    "dora": AdapterConfig(algorithm="dora", rank=4, alpha=2.0),
}


def run(model, inputs, **options):
    return model(*inputs, text_lengths=(7, 4), **options)


def merged(model, adapter, strength=1.0):
    """A copy of the model with the adapter's change added to its weights."""
    copy = DiT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for path, layer in adapter.to_lora().layers.items():
            weight = copy.get_submodule(path).weight
            weight += strength * layer.delta(weight)
    return copy


def quantised(model, format="fp8"):
    """The same model with the blocks' matrices in 8 bits."""
    for block in model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, QuantisedLinear(*quantise_rows(linear.weight, format)))
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def inputs():
    return make_inputs()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def adapter(request, model):
    return shake(Adapter(model, request.param, seed=0))


# --- what is trained ----------------------------------------------------------------------------------------


def test_by_default_the_seven_matrices_of_every_block_are_trained():
    model = DiT(DiTConfig(), device="meta")
    adapter = Adapter(model, AdapterConfig(rank=16), seed=0)
    assert len(adapter.factors) == 252
    assert sum(p.numel() for p in adapter.parameters()) == 81_920 * 16 * 36
    assert len(DEFAULT_TARGETS) == 7
    others = {name.split(".")[0] for name, _ in model.named_parameters()} - {"layers"}
    assert others
    assert not others & {path.split(".")[0] for path in adapter.factors}


def test_targets_and_exclude_are_patterns(model):
    config = AdapterConfig(targets=("layers.*.to_q", "layers.1.mlp.*", "text_proj"), exclude=("layers.0.*",))
    names = [path.removeprefix("layers.") for path in Adapter(model, config, seed=0).factors]
    assert names == [
        *("text_proj", "1.self_attention.to_q", "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.linear_fc2"),
        "2.self_attention.to_q",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("layers.*.to_x",)}, r"target pattern 'layers.\*.to_x' matches none of the model's 27 linear"),
        ({"targets": ("layers.*", "img_in")}, "target pattern 'img_in' matches none"),
        ({"exclude": ("blocks.*",)}, r"exclude pattern 'blocks.\*' matches none"),
        ({"exclude": ("layers.*",)}, "exclude leaves no linear layer"),
        ({"targets": ()}, "at least one pattern"),
        ({"algorithm": "loha"}, "one of lora, lokr, dora; got 'loha'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be 0"),
        ({"factor": 0}, "factor must be at least 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_meant_is_refused(options, words, model):
    with pytest.raises(ErnieError, match=words):
        Adapter(model, AdapterConfig(**options), seed=0)


@pytest.mark.parametrize("algorithm", ADAPTER_ALGORITHMS)
def test_the_start_depends_on_seed_and_layer_only(algorithm, model):
    config = AdapterConfig(algorithm=algorithm, rank=4, factor=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Adapter(model, config, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    few = AdapterConfig(algorithm=algorithm, rank=4, factor=4, targets=("layers.1.*",))
    for name, tensor in Adapter(model, few, seed=5).state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
    other = Adapter(model, config, seed=6).state_dict()
    drawn = [name for name, tensor in first.state_dict().items() if tensor.any() and "dora_scale" not in name]
    assert drawn
    assert not any(torch.equal(other[name], first.state_dict()[name]) for name in drawn)


def test_lora_starts_as_every_trainer_starts_it(model):
    factors = Adapter(model, AdapterConfig(rank=16), seed=0).factors["layers.0.mlp.linear_fc2"]
    a, bound = factors.lora_A, 96**-0.5
    assert not factors.lora_B.any()
    assert a.abs().max() <= bound
    assert abs(a.std().item() / (bound / 3**0.5) - 1) < 0.05


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_at_the_start_nothing_changes(config, model, inputs):
    base = run(model, inputs)
    views = Views(model)
    views.add("policy", Adapter(model, config, seed=0))
    with views.active("policy"):
        torch.testing.assert_close(run(model, inputs).detach(), base, atol=3e-6, rtol=0)


def test_parameter_names_are_those_of_a_lora_file(model):
    names = [name for name, _ in Adapter(model, AdapterConfig(rank=4), seed=0).named_parameters()]
    assert names[:2] == ["layers.0.self_attention.to_q.lora_A", "layers.0.self_attention.to_q.lora_B"]
    assert "layers.2.self_attention.to_out.0.lora_B" in names
    assert len(names) == 2 * 7 * 3


def test_a_copy_stands_alone(adapter):
    """As an averaged adapter is made."""
    twin = copy.deepcopy(adapter)
    assert list(twin.state_dict()) == list(adapter.state_dict())
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    for path, factors in adapter.factors.items():
        assert twin.factors[path] is twin.get_submodule(path)
        for name, p in factors.named_parameters():
            torch.testing.assert_close(twin.factors[path].get_parameter(name), p + 1)


@pytest.mark.parametrize(("size", "factor", "expected"), [(4096, 8, (8, 512)), (12288, 16, (16, 768)), (7, 4, (1, 7))])
def test_kronecker_sizes_divide(size, factor, expected):
    assert split_size(size, factor) == expected


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_an_active_adapter_is_its_merged_weights(strength, adapter, model, inputs):
    views = Views(model)
    views.add("policy", adapter)
    base = run(model, inputs)
    with torch.no_grad(), views.active({"policy": strength}):
        found = run(model, inputs)
    expected = run(merged(model, adapter, strength), inputs).detach()
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


def test_several_adapters_add_up(model, inputs):
    views = Views(model)
    for i, name in enumerate(("lora", "dora", "lokr")):
        adapter = shake(Adapter(model, CONFIGS[name], seed=i), seed=i)
        views.add(name, adapter)
    delta = {}
    for adapter in views.adapters.values():
        for path, layer in adapter.to_lora().layers.items():
            delta[path] = delta.get(path, 0) + layer.delta(model.get_submodule(path).weight)
    with torch.no_grad(), views.active("lora", "dora", {"lokr": 1.0}):
        found = run(model, inputs)
    views.close()
    with torch.no_grad():
        for path, change in delta.items():
            model.get_submodule(path).weight += change
    torch.testing.assert_close(found, run(model, inputs), atol=1e-5, rtol=0)


def test_gradients_reach_every_factor_and_nothing_else(adapter, model, inputs):
    views = Views(model)
    views.add("policy", adapter)
    with views.active("policy"):
        run(model, inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_right(name, bias):
    """Against finite differences in float64. DoRA's norm is a constant in backward, so there only at a fixed norm."""
    holder = torch.nn.Sequential(torch.nn.Linear(8, 12, bias=bias, dtype=torch.float64)).requires_grad_(False)
    config = CONFIGS[name]
    config = AdapterConfig(
        algorithm=config.algorithm, rank=2 if config.rank < 64 else 64, factor=2, alpha=config.alpha, targets=("0",)
    )
    adapter = shake(Adapter(holder, config, seed=0, dtype=torch.float64), size=0.5)
    views = Views(holder)
    views.add("policy", adapter)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    factors = adapter.factors["0"]
    parameters = list(adapter.parameters())
    if config.algorithm == "dora":
        norm = factors.dora_scale.detach().flatten() / factors.ratio(holder[0]).detach()
        factors.ratio = lambda linear: factors.dora_scale.flatten() / norm

    def function(x, *_):
        with views.active({"policy": 0.7}):
            return holder(x)

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_the_norm_of_dora_has_no_gradient():
    """DoRA, section 4.3: the gradient is that of the direction times magnitude / norm."""
    holder = torch.nn.Sequential(torch.nn.Linear(8, 12, bias=False)).requires_grad_(False)
    adapter = shake(Adapter(holder, AdapterConfig(algorithm="dora", rank=2, targets=("0",)), seed=0), size=0.5)
    views = Views(holder)
    views.add("policy", adapter)
    x = torch.randn(5, 8)
    with views.active("policy"):
        found = gradients(adapter, holder(x).square().sum())
    a, b, m = (adapter.get_parameter(f"0.{name}") for name in ("lora_A", "lora_B", "dora_scale"))
    whole = holder[0].weight + b @ a
    y = x @ (m * whole / whole.detach().norm(dim=1, keepdim=True)).t()
    expected = gradients(adapter, y.square().sum())
    assert largest_error(found, expected) < 1e-5


def test_dropout_is_for_training_only(model, inputs):
    adapter = shake(Adapter(model, AdapterConfig(rank=4, dropout=0.5), seed=0))
    views = Views(model)
    views.add("policy", adapter)
    with torch.no_grad(), views.active("policy"):
        assert not torch.equal(run(model, inputs), run(model, inputs))
        adapter.eval()
        assert torch.equal(run(model, inputs), run(model, inputs))
    torch.testing.assert_close(run(merged(model, adapter), inputs), run_active(views, inputs), atol=5e-6, rtol=0)


def run_active(views, inputs):
    with torch.no_grad(), views.active(*views.adapters):
        return run(views.model, inputs)


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["bf16", "fp8", "int8"])
def test_factors_stay_fp32_over_any_base(base, inputs):
    model = make_model(dtype=torch.bfloat16)
    if base != "bf16":
        quantised(model, base)
    adapter = shake(Adapter(model, AdapterConfig(rank=4), seed=0))
    views = Views(model)
    views.add("policy", adapter)
    low = tuple(t if i == 1 else t.bfloat16() for i, t in enumerate(inputs))
    with views.active("policy"):
        out = run(model, low)
        out.float().square().mean().backward()
    assert out.dtype is torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_updates_below_bf16_rounding_are_kept(model):
    adapter = Adapter(make_model(dtype=torch.bfloat16), AdapterConfig(rank=4), seed=0)
    a = adapter.factors["layers.0.mlp.up_proj"].lora_A
    before = a.detach().clone()
    with torch.no_grad():
        a *= 1 + 1e-4
    assert (a != before).float().mean() > 0.99
    assert (a.bfloat16() != before.bfloat16()).float().mean() < 0.1


# --- views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["fp32", "fp8", "int8"])
def test_without_active_views_the_model_is_the_base_to_the_bit(base, inputs):
    model = make_model()
    if base != "fp32":
        quantised(model, base)
    expected = run(model, inputs)
    views = Views(model)
    for name in ("policy", "reference"):
        views.add(name, shake(Adapter(model, AdapterConfig(rank=4), seed=0)))
    assert torch.equal(run(model, inputs), expected)
    with views.active("policy"):
        changed = run(model, inputs)
        assert not torch.equal(changed, expected)
        with views.active():
            assert torch.equal(run(model, inputs), expected)
        assert torch.equal(run(model, inputs), changed)
    with pytest.raises(RuntimeError), views.active("policy"), views.active("reference"):  # noqa: PT012
        run(model, inputs)
        raise RuntimeError
    assert torch.equal(run(model, inputs), expected)
    with pytest.raises(ErnieError), views.active("policy"):
        model(inputs[0][:, :3], *inputs[1:])
    assert torch.equal(run(model, inputs), expected)
    with views.active({"policy": 0.0}):
        torch.testing.assert_close(run(model, inputs), expected, atol=0, rtol=0)


def test_closing_removes_every_hook(model, inputs):
    views, others = Views(model), Views(model)
    views.add("a", shake(Adapter(model, AdapterConfig(rank=2, targets=("layers.0.*",)), seed=0)))
    views.add("b", shake(Adapter(model, AdapterConfig(rank=2, targets=("layers.*.to_q",)), seed=0)))
    others.add("c", shake(Adapter(model, AdapterConfig(rank=2), seed=0)))

    def hooks():
        return sum(len(m._forward_hooks) for m in model.modules())

    assert hooks() == 9 + 21
    views.remove("a")
    assert hooks() == 3 + 21
    views.close()
    assert hooks() == 21
    with others.active("c"):
        assert not torch.equal(run(model, inputs), run(make_model(), inputs))
    others.close()
    assert hooks() == 0


def test_active_views_can_be_taken_up_again(model, inputs):
    """As the recomputation of a block does, long after the `with` block has ended."""
    views = Views(model)
    views.add("policy", shake(Adapter(model, AdapterConfig(rank=4), seed=0)))
    with views.active({"policy": 0.5}):
        expected, held = run(model, inputs), ActiveViews()
    base = run(model, inputs)
    with held.restored():
        assert torch.equal(run(model, inputs), expected)
    assert torch.equal(run(model, inputs), base)


def test_views_are_named_once_and_known(model):
    views = Views(model)
    adapter = Adapter(model, AdapterConfig(rank=4), seed=0)
    views.add("policy", adapter)
    with pytest.raises(ErnieError, match="there is a view 'policy' already"):
        views.add("policy", adapter)
    with pytest.raises(ErnieError, match="no view 'reference'; known are policy"), views.active("reference"):
        pass
    with pytest.raises(ErnieError, match="no view 'x'"):
        views.remove("x")
    with views.active("policy"), pytest.raises(ErnieError, match="'policy' is active"):
        views.remove("policy")
    small = make_model(DiTConfig(**{**model.config.to_dict(), "num_layers": 2, "rope_axes_dim": (4, 6, 6)}))
    with pytest.raises(ErnieError, match=r"no linear layer layers\.2\.self_attention\.to_q"):
        Views(small).add("policy", adapter)


# --- files --------------------------------------------------------------------------------------------------


def test_a_file_gives_the_adapter_back(adapter, model, inputs, tmp_path):
    write_lora(adapter.to_lora({"step": "7"}), tmp_path / "lora.safetensors", dialect="comfyui")
    shapes = {path: tuple(model.get_submodule(path).weight.shape) for path in adapter.factors}
    lora = read_lora(tmp_path / "lora.safetensors", shapes)
    again = Adapter.from_lora(model, lora, trainable=False)
    assert list(again.factors) == list(adapter.factors)
    assert not any(p.requires_grad for p in again.parameters())
    views = Views(model)
    views.add("one", adapter)
    views.add("two", again)
    with torch.no_grad(), views.active("one"):
        expected = run(model, inputs)
    with torch.no_grad(), views.active("two"):
        torch.testing.assert_close(run(model, inputs), expected, atol=2e-6, rtol=0)


def test_an_adapter_from_a_file_trains_on(adapter, model, inputs):
    again = Adapter.from_lora(model, adapter.to_lora(), trainable=True)
    views = Views(model)
    views.add("policy", again)
    with views.active("policy"):
        run(model, inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in again.parameters())


def test_a_small_factor_in_two_parts_is_multiplied_out(model, inputs):
    generator = torch.Generator().manual_seed(0)
    shapes = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2": (16, 16)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    layer = LoraLayer(algorithm="lokr", tensors=tensors, alpha=1.0)
    views = Views(model)
    lora = Lora(layers={"layers.1.self_attention.to_v": layer})
    views.add("file", Adapter.from_lora(model, lora, trainable=False))
    found = run_active(views, inputs)
    views.close()
    weight = model.layers[1].self_attention.to_v.weight
    weight.data += layer.delta(weight)
    torch.testing.assert_close(found, run(model, inputs), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (LoraLayer(algorithm="loha", tensors={}), "holds a loha"),
        (LoraLayer(algorithm="diff", tensors={"diff": torch.zeros(64, 64)}), "holds a diff"),
        (LoraLayer(algorithm="lora", tensors={"diff_b": torch.zeros(64)}), "a change of the bias"),
        (LoraLayer(algorithm="lora", tensors={}, dora_scale=torch.ones(1, 64)), "a DoRA magnitude per column"),
    ],
    ids=["loha", "diff", "bias", "column"],
)
def test_what_has_no_trainable_form_is_refused(layer, words, model):
    with pytest.raises(ErnieError, match=words):
        Adapter.from_lora(model, Lora(layers={"layers.0.self_attention.to_q": layer}), trainable=True)
    with pytest.raises(ErnieError, match=r"adapts layers\.9, which is no linear layer"):
        Adapter.from_lora(model, Lora(layers={"layers.9": layer}), trainable=True)
