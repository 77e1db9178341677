"""Blocks in training: recomputed, streamed and left-out blocks give the numbers of plain ones, for less memory."""

from itertools import pairwise

import pytest
import torch
from ernie_pack.bench.train_step import PeakMemory, kept_bytes
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.training.adapters import Adapter, AdapterConfig, Views
from ernie_pack.ernie_core.training.blocks import BlockStream, gated_gelu, run_blocks, skip_list
from ernie_pack.ernie_core.weights.quantise import QuantisedLinear, quantise_rows
from torch.utils.flop_counter import FlopCounterMode
from train_models import CONFIG, gradients, make_inputs, make_model, shake

DEEP = DiTConfig(**{**CONFIG.to_dict(), "num_layers": 6, "rope_axes_dim": (4, 6, 6)})


class Setup:
    """A model with a shaken adapter, and one training step of it."""

    def __init__(self, *, config=CONFIG, quantise=False, dtype=torch.float32, **options):
        self.model = make_model(config, dtype=dtype)
        if quantise:
            for block in self.model.layers:
                mlp = block.mlp
                for name in ("gate_proj", "up_proj", "linear_fc2"):
                    setattr(mlp, name, QuantisedLinear(*quantise_rows(getattr(mlp, name).weight, "int8")))
        self.inputs = make_inputs(config, dtype=dtype)
        self.adapter = shake(Adapter(self.model, AdapterConfig(**{"rank": 4, **options}), seed=0))
        self.views = Views(self.model)
        self.views.add("policy", self.adapter)

    def velocity(self, run_block=None, seed=None):
        options = {} if run_block is None else {"run_block": run_block}
        inputs = self.inputs if seed is None else make_inputs(self.model.config, seed=seed)
        with self.views.active("policy"):
            return self.model(*inputs, text_lengths=(7, 4), **options)

    def step(self, run_block=None):
        """(velocity, gradients); the backward pass runs outside the view."""
        velocity = self.velocity(run_block)
        return velocity.detach(), gradients(self.adapter, velocity.float().square().mean())


def assert_same(one, two):
    assert torch.equal(one[0], two[0])
    for name, gradient in one[1].items():
        assert torch.equal(gradient, two[1][name]), name


# --- the numbers --------------------------------------------------------------------------------------------

SETUPS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "int8 base": {"quantise": True},
    "dora": {"algorithm": "dora"},
    "lokr": {"algorithm": "lokr"},
    "one block adapted": {"targets": ("layers.1.*",)},
    "modulation adapted": {"targets": ("layers.2.mlp.*", "adaLN_modulation.1", "text_proj")},
}


@pytest.fixture(params=SETUPS.values(), ids=SETUPS.keys())
def setup(request):
    return Setup(**request.param)


def test_training_blocks_compute_what_blocks_compute(setup):
    assert torch.equal(setup.velocity(run_blocks(checkpoint=False)), setup.velocity())
    with torch.no_grad():
        assert torch.equal(setup.velocity(run_blocks()), setup.velocity())
    plain, lean = setup.step(), setup.step(run_blocks(checkpoint=False))
    tolerance = 2e-2 if setup.inputs[0].dtype is torch.bfloat16 else 2e-6
    for name, gradient in plain[1].items():
        difference = (lean[1][name] - gradient).norm() / gradient.norm()
        assert difference <= tolerance, (name, float(difference))


def test_recomputed_gradients_are_kept_ones_to_the_bit(setup):
    assert_same(setup.step(run_blocks()), setup.step(run_blocks(checkpoint=False)))


def test_streamed_is_resident_to_the_bit(setup):
    expected = setup.step(run_blocks())
    with torch.no_grad():
        base = setup.velocity()
    stream = BlockStream(setup.model, "cpu")
    run_block = run_blocks(stream=stream)
    for _ in range(2):
        assert_same(setup.step(run_block), expected)
        with torch.no_grad():
            assert torch.equal(setup.velocity(run_block), base)


def test_blocks_run_the_same_way_beside_the_hosts_patches(setup):
    calls = []
    run_block = run_blocks()

    def counted(index, *inputs):
        calls.append(index)
        return run_block(index, *inputs)

    with torch.no_grad(), setup.views.active("policy"):
        options = {"run_block": counted, "text_lengths": (7, 4)}
        found = setup.model(*setup.inputs, transformer_options={"patches": {}}, **options)
        assert torch.equal(found, setup.velocity())  # with gradients some processors take other kernels
    assert calls == [0, 1, 2]


def test_the_gated_gelu_has_the_right_gradient():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gated_gelu, (gate, up))
    assert torch.equal(gated_gelu(gate, up), torch.nn.functional.gelu(gate) * up)


def test_recomputation_sees_the_views_of_its_forward_pass():
    """Two adapters of one shape: a mix-up would be silent but for the numbers."""
    setup = Setup()
    other = shake(Adapter(setup.model, AdapterConfig(rank=4), seed=1), seed=9)
    setup.views.add("other", other)
    run_block = run_blocks()
    expected = setup.step(run_blocks(checkpoint=False))[1]
    loss = setup.velocity(run_block).square().mean()
    with setup.views.active("other"):
        found = gradients(setup.adapter, loss)
        inside = setup.model(*setup.inputs)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)
    with setup.views.active("other"):
        assert torch.equal(setup.model(*setup.inputs), inside), "what was active must be active again"


def test_dropout_is_the_same_in_recomputation():
    setup = Setup(dropout=0.3)
    torch.manual_seed(0)
    one = setup.step(run_blocks())
    torch.manual_seed(0)
    assert_same(setup.step(run_blocks(checkpoint=False)), one)


@pytest.mark.parametrize("streamed", [False, True])
def test_any_order_of_passes_gives_the_same_gradients(streamed):
    """DPO: two reference passes without gradient, two graphs alive at once, one backward pass through both."""
    setup = Setup(config=DEEP)

    def pair_gradients(run_block):
        with torch.no_grad():
            reference = [setup.velocity(run_block, seed=seed) for seed in (5, 6)]
        errors = [
            (setup.velocity(run_block, seed=seed) - ref + 1).square().mean()
            for seed, ref in zip((5, 6), reference, strict=True)
        ]
        return reference[0], gradients(setup.adapter, errors[0] - 0.3 * errors[1])

    expected = pair_gradients(run_blocks(checkpoint=False))
    stream = BlockStream(setup.model, "cpu") if streamed else None
    found = pair_gradients(run_blocks(stream=stream))
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_an_exception_inside_leaves_everything_as_it_was():
    setup = Setup()
    expected = setup.step(run_blocks())
    stream = BlockStream(setup.model, "cpu")

    def broken(*_):
        raise KeyError("attention")

    with pytest.raises(KeyError), setup.views.active("policy"):
        setup.model(*setup.inputs, run_block=run_blocks(stream=stream), attend=broken)
    assert_same(setup.step(run_blocks(stream=stream)), expected)
    assert "forward" not in vars(setup.model.layers[0].mlp.linear_fc2)


# --- memory and arithmetic ----------------------------------------------------------------------------------


def kept_by(setup, run_block):
    """Bytes of distinct storages kept between forward and backward, model and adapter aside."""
    constant = [t for m in (setup.model, setup.adapter) for t in (*m.parameters(), *m.buffers())]
    return kept_bytes(lambda: setup.velocity(run_block), constant)


def test_checkpointing_keeps_one_tensor_per_block():
    setup = Setup(config=DEEP)
    unit = 2 * (4 * 6 + 7) * 64 * 4  # one [B, S, D] tensor in fp32
    kept, checkpointed = (kept_by(setup, run_blocks(checkpoint=c)) / unit for c in (False, True))
    few = Setup(config=CONFIG)
    per_block = (checkpointed - kept_by(few, run_blocks()) / unit) / 3
    assert per_block == pytest.approx(1, abs=0.01)
    assert kept > 6 * 15


def peak_bytes(run_block, **options):
    setup = Setup(config=DEEP, **options)
    with PeakMemory([*setup.model.parameters(), *setup.adapter.parameters(), *setup.inputs]) as memory:
        setup.step(run_block)
    assert memory.alive == 0, "what a step made must be gone after it"
    return memory.peak


def test_the_peak_of_a_step_falls():
    kept = peak_bytes(run_blocks(checkpoint=False))
    assert peak_bytes(run_blocks()) < 0.4 * kept
    assert peak_bytes(None) > 1.05 * kept, "training blocks keep less than plain ones"


def test_an_8_bit_base_leaves_no_copy_behind():
    """The bytes kept are the same whether the weights had to be multiplied out or not."""
    for checkpoint in (False, True):
        plain, quantised = (
            kept_by(Setup(quantise=q, dtype=torch.bfloat16), run_blocks(checkpoint=checkpoint)) for q in (False, True)
        )
        assert quantised == plain


def test_the_last_product_is_not_computed_again():
    setup = Setup(config=DEEP)

    def flops(run_block):
        with FlopCounterMode(display=False) as counter:
            setup.step(run_block)
        return counter.get_total_flops()

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        setup.velocity()
    forward, kept, recomputed = counter.get_total_flops(), flops(run_blocks(checkpoint=False)), flops(run_blocks())
    tokens, width, ffn = 2 * (4 * 6 + 7), 64, 96
    last = 6 * 2 * tokens * ffn * width
    outside = forward - 6 * 2 * tokens * (4 * width * width + 3 * width * ffn)
    assert recomputed < kept + forward - last
    assert recomputed - kept > forward - last - outside - 1, "the rest must be recomputed"
    assert recomputed <= 3.0 * forward
    assert kept <= 2.1 * forward


# --- elastic depth ------------------------------------------------------------------------------------------


def test_skipped_blocks_are_left_out():
    setup = Setup(config=DEEP)
    found = setup.step(run_blocks(skip=(1, 4)))
    short = setup.model
    kept = torch.nn.ModuleList(block for i, block in enumerate(short.layers) if i not in (1, 4))
    whole, short.layers = short.layers, kept
    expected = setup.velocity()
    short.layers = whole
    assert torch.equal(found[0], expected)
    assert all(("layers.1." in name or "layers.4." in name) == (g is None) for name, g in found[1].items())
    stream = BlockStream(setup.model, "cpu")
    streamed = setup.step(run_blocks(skip=(1, 4), stream=stream))
    assert torch.equal(streamed[0], expected)


@pytest.mark.parametrize("layers", [7, 12, 36])
def test_skip_lists_are_nested_and_spare_the_ends(layers):
    edge = max(2, layers // 9)
    lists = [skip_list(layers, count) for count in range(layers - 2 * edge + 1)]
    for count, (one, two) in enumerate(pairwise(lists)):
        assert len(one) == count
        assert list(one) == sorted(one)
        assert set(one) < set(two)
    assert lists[-1] == tuple(range(edge, layers - edge))
    with pytest.raises(ErnieError, match=f"of {layers} blocks 0 to {layers - 2 * edge} can be left out"):
        skip_list(layers, layers - 2 * edge + 1)


def test_neighbours_are_not_skipped_before_they_must():
    six = skip_list(36, 6)
    assert min(b - a for a, b in pairwise(six)) >= 3


# --- streaming ----------------------------------------------------------------------------------------------


def test_two_blocks_are_resident_at_most():
    setup = Setup(config=DEEP, quantise=True)
    block = setup.model.layers[0]
    size = sum(t.numel() * t.element_size() for t in (*block.parameters(), *block.buffers()))
    stream = BlockStream(setup.model, "cpu")
    assert 2 * size <= stream.resident_bytes < 2 * size + 2 * 256 * len([*block.parameters(), *block.buffers()])
    slots = {slot.untyped_storage().data_ptr() for slot in stream._slots}
    assert len(slots) == 2
    at_work = []

    def watch(module, args, output):
        at_work.append({t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())})

    for block in setup.model.layers:
        block.self_attention.register_forward_hook(watch)
    setup.step(run_blocks(stream=stream))
    assert len(at_work) == 12, "forward and recomputation of six blocks"
    assert all(len(places) == 1 and places <= slots for places in at_work)
    homes = {t.untyped_storage().data_ptr() for block in setup.model.layers for t in block.parameters()}
    assert len(homes) == 6
    assert not homes & slots


def test_nothing_is_written_back():
    setup = Setup(config=DEEP)
    before = {k: v.clone() for k, v in setup.model.state_dict().items()}
    stream = BlockStream(setup.model, "cpu")
    addresses = [host.data_ptr() for host in stream._host]
    versions = [host._version for host in stream._host]
    setup.step(run_blocks(stream=stream))
    assert [host.data_ptr() for host in stream._host] == addresses
    assert [host._version for host in stream._host] == versions
    assert all(torch.equal(v, before[k]) for k, v in setup.model.state_dict().items())


def test_the_next_block_is_brought_in_time():
    """A step asks for each block forwards, then backwards; only the first is not there before it is asked for."""
    setup = Setup(config=DEEP)
    stream = BlockStream(setup.model, "cpu")
    late, brought = [], []
    bring, block = stream._bring, stream.block

    def watched_bring(index, slot):
        brought.append(index)
        bring(index, slot)

    def watched_block(index, *, then):
        if index not in stream._held:
            late.append(index)
        return block(index, then=then)

    stream._bring, stream.block = watched_bring, watched_block
    run_block = run_blocks(stream=stream)
    setup.step(run_block)
    assert late == [0]
    assert brought == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0], "10 copies for 12 uses"
    setup.step(run_block)
    with torch.no_grad():
        setup.velocity(run_block)
        setup.velocity(run_block)
    assert late == [0]


def test_streams_refuse_what_they_cannot_do():
    model = make_model()
    stream = BlockStream(model, "cpu")
    with pytest.raises(ErnieError, match="need checkpointing"):
        run_blocks(checkpoint=False, stream=stream)
    with pytest.raises(ErnieError, match=r"blocks 0 to 2, got \[3\]"):
        run_blocks(skip=(3,), stream=stream)
    with pytest.raises(ErnieError, match="only frozen blocks"):
        BlockStream(DiT(CONFIG), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_streaming_to_a_gpu_is_resident_on_it():
    setup = Setup(config=DEEP)
    setup.adapter.to("cuda")
    setup.inputs = tuple(t.cuda() for t in setup.inputs)
    streamed = setup.step(run_blocks(stream=BlockStream(setup.model, "cuda")))
    setup.model.cuda()
    resident = setup.step(run_blocks())
    torch.testing.assert_close(streamed[0], resident[0])
    for name, gradient in resident[1].items():
        torch.testing.assert_close(streamed[1][name], gradient)
