"""The transformer: shapes of the release, invariances, and the host's patches. Parity is tests/parity/test_dit.py."""

import math

import pytest
import torch
from ernie_pack.bench.pairs import randomise
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.attention import attention
from ernie_pack.ernie_core.model.dit import DiT, timestep_embedding

CONFIG = DiTConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    ffn_hidden_size=96,
    text_in_dim=24,
    in_channels=8,
    out_channels=8,
    rope_axes_dim=(4, 6, 6),
)
# Shorter sums run through other vector code than longer ones: the last bits of fp32 differ.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def dit():
    model = DiT(CONFIG).eval().requires_grad_(False)
    randomise(model)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 3, 5, generator=generator)
    return x, torch.tensor([900.0, 300.0]), torch.randn(2, 7, 24, generator=generator)


def one(inputs, i, length=None):
    x, t, text = (v[i : i + 1] for v in inputs)
    return x, t, text[:, :length]


def test_the_released_size():
    model = DiT(DiTConfig(), device="meta")
    state = model.state_dict()
    assert len(state) == 409
    assert sum(t.numel() for t in state.values()) == 8_033_490_048
    layer = {k: tuple(v.shape) for k, v in state.items() if k.startswith("layers.35.")}
    assert len(layer) == 11
    assert sum(math.prod(shape) for shape in layer.values()) == 218_112_256


def test_released_names_and_shapes():
    state = {k: tuple(v.shape) for k, v in DiT(DiTConfig(num_layers=1), device="meta").state_dict().items()}
    block = "layers.0."
    assert state == {
        "x_embedder.proj.weight": (4096, 128, 1, 1),
        "x_embedder.proj.bias": (4096,),
        "text_proj.weight": (4096, 3072),
        "time_embedding.linear_1.weight": (4096, 4096),
        "time_embedding.linear_1.bias": (4096,),
        "time_embedding.linear_2.weight": (4096, 4096),
        "time_embedding.linear_2.bias": (4096,),
        "adaLN_modulation.1.weight": (24576, 4096),
        "adaLN_modulation.1.bias": (24576,),
        block + "adaLN_sa_ln.weight": (4096,),
        block + "self_attention.to_q.weight": (4096, 4096),
        block + "self_attention.to_k.weight": (4096, 4096),
        block + "self_attention.to_v.weight": (4096, 4096),
        block + "self_attention.norm_q.weight": (128,),
        block + "self_attention.norm_k.weight": (128,),
        block + "self_attention.to_out.0.weight": (4096, 4096),
        block + "adaLN_mlp_ln.weight": (4096,),
        block + "mlp.gate_proj.weight": (12288, 4096),
        block + "mlp.up_proj.weight": (12288, 4096),
        block + "mlp.linear_fc2.weight": (4096, 12288),
        "final_norm.linear.weight": (8192, 4096),
        "final_norm.linear.bias": (8192,),
        "final_linear.weight": (128, 4096),
        "final_linear.bias": (128,),
    }


def test_the_timestep_embedding_at_500_is_the_recorded_one():
    found = timestep_embedding(torch.tensor([500.0]), 4096)[0]
    sines, cosines = found[:2048], found[2048:]
    index = [0, 1, 1024, 2047]
    # the phase reaches 500, where fp32 counts in steps of 3e-5
    assert sines[index].tolist() == pytest.approx([-0.46777, 0.98275, -0.95892, 0.05020], abs=4e-5)
    assert cosines[index].tolist() == pytest.approx([-0.88385, 0.18493, 0.28366, 0.99874], abs=4e-5)


def test_timesteps_are_not_rounded_to_the_models_dtype(inputs):
    model = DiT(CONFIG, dtype=torch.bfloat16).eval().requires_grad_(False)
    randomise(model)
    x, _, text = (v.bfloat16() for v in one(inputs, 0))
    # 965.517 and 964 are the same number in bf16
    out = [model(x, torch.tensor([t]), text) for t in (965.517, 964.0)]
    assert not torch.equal(*out)


def test_velocity_has_the_latents_shape_and_dtype(dit, inputs):
    assert dit(*inputs).shape == inputs[0].shape
    model = DiT(CONFIG, dtype=torch.bfloat16).eval().requires_grad_(False)
    randomise(model)
    assert model(inputs[0].bfloat16(), inputs[1], inputs[2]).dtype == torch.bfloat16


def test_a_batch_of_two_is_two_batches_of_one(dit, inputs):
    both = dit(*inputs)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], dit(*one(inputs, i)), **CLOSE)


@pytest.mark.parametrize("lengths", [(7, 3), (2, 7), (1, 4)])
def test_a_ragged_batch_is_each_prompt_at_its_true_length(lengths, dit, inputs):
    both = dit(*inputs, text_lengths=lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(both[i : i + 1], dit(*one(inputs, i, n)), **CLOSE)


def test_padding_text_does_not_change_the_picture(dit, inputs):
    x, t, text = one(inputs, 0, 4)
    plain = dit(x, t, text)
    for filler in (0.0, 50.0):
        padded = torch.nn.functional.pad(text, (0, 0, 0, 6), value=filler)
        torch.testing.assert_close(dit(x, t, padded, text_lengths=[4]), plain, **CLOSE)


def test_a_permuted_batch_gives_the_permuted_result(dit, inputs):
    x, t, text = inputs
    out = dit(x, t, text, text_lengths=[7, 3])
    swapped = dit(x.flip(0), t.flip(0), text.flip(0), text_lengths=[3, 7])
    torch.testing.assert_close(swapped, out.flip(0), **CLOSE)


def test_text_and_timestep_matter(dit, inputs):
    x, t, text = inputs
    out = dit(x, t, text)
    assert not torch.allclose(dit(x, t + 100, text), out, atol=1e-3)
    assert not torch.allclose(dit(x, t, text.flip(1)), out, atol=1e-3)


def test_a_table_made_once_gives_the_same_numbers(dit, inputs):
    rope = dit.rope(3, 5, [7, 3], device="cpu", dtype=torch.float32)
    assert torch.equal(dit(*inputs, text_lengths=[7, 3], rope=rope), dit(*inputs, text_lengths=[7, 3]))


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_leave_and_enter_in_the_same_order(patch, inputs):
    """With the blocks and the final norm out of the way, embedding by identity comes out as it went in."""
    channels = 8 * patch**2
    config = DiTConfig(**{**CONFIG.to_dict(), "rope_axes_dim": (4, 6, 6), "num_layers": 0, "patch_size": patch})
    model = DiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    # The reference's output order within a patch is row, column, channel; the embedding's is channel, row, column.
    identity = torch.eye(channels).reshape(8, patch, patch, channels).permute(1, 2, 0, 3).reshape(channels, channels)
    model.x_embedder.proj.weight[:channels] = torch.eye(channels).reshape(channels, 8, patch, patch)
    model.final_linear.weight[:, :channels] = identity
    model.final_norm.norm = torch.nn.Identity()
    x = torch.randn(1, 8, 4, 6)
    torch.testing.assert_close(model(x, torch.tensor([500.0]), torch.zeros(1, 2, 24)), x)


def test_an_attention_function_handed_in_is_used(dit, inputs):
    calls = []

    def attend(q, k, v, lengths):
        calls.append((q.shape, lengths))
        return attention(q, k, v, lengths)

    out = dit(*inputs, text_lengths=[7, 3], attend=attend)
    assert calls == [((2, 15 + 7, 4, 16), [15 + 7, 15 + 3])] * 2
    assert torch.equal(out, dit(*inputs, text_lengths=[7, 3]))
    assert not torch.allclose(dit(*inputs, attend=lambda q, k, v, lengths: v), out, atol=1e-3)


def test_equal_lengths_are_handed_on_as_nothing_padded(dit, inputs):
    seen = []
    dit(*inputs, text_lengths=[7, 7], attend=lambda q, k, v, lengths: seen.append(lengths) or v)
    dit(*inputs, text_lengths=[4, 4], attend=lambda q, k, v, lengths: seen.append(lengths) or v)
    assert seen == [None] * 4


def test_every_weight_takes_part(inputs):
    model = DiT(CONFIG)
    randomise(model)
    model(*inputs, text_lengths=[7, 3]).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_given_ops_supply_every_layer_with_weights(inputs):
    class Ops:
        made = 0

    for name in ("Linear", "Conv2d", "RMSNorm", "LayerNorm"):

        def make(*args, _name=name, **kwargs):
            Ops.made += 1
            return getattr(torch.nn, _name)(*args, **kwargs)

        setattr(Ops, name, staticmethod(make))
    model = DiT(CONFIG, ops=Ops)
    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, torch.nn.SiLU)]
    assert len(leaves) == Ops.made


def test_another_models_latent_is_named(dit, inputs):
    with pytest.raises(ErnieError, match="the latent must have 8 channels, got 16: it is another model's latent"):
        dit(torch.zeros(2, 16, 3, 5), *inputs[1:])


def test_another_models_conditioning_is_named(dit, inputs):
    with pytest.raises(ErnieError, match="the conditioning must be 24 wide, got 4096: encode the prompt with"):
        dit(*inputs[:2], torch.zeros(2, 7, 4096))


# --- the host's transformer_options ---


def test_options_without_patches_give_the_same_numbers(dit, inputs):
    plain = dit(*inputs)
    for options in ({}, {"patches": {}}, {"patches": {}, "patches_replace": {}, "sigmas": torch.ones(1)}):
        assert torch.equal(dit(*inputs, transformer_options=options), plain)


@pytest.mark.parametrize("kind", ["single_block", "double_block"])
def test_replacing_a_block_by_its_original_is_the_identity(kind, dit, inputs):
    seen = []

    def replace(args, extra):
        seen.append((args["transformer_options"]["block_index"], args["img"].shape))
        return extra["original_block"](args)

    options = {"patches_replace": {"dit": {(kind, i): replace for i in range(2)}}}
    assert torch.equal(dit(*inputs, transformer_options=options), dit(*inputs))
    assert seen == [(0, (2, 22, 64)), (1, (2, 22, 64))]


def test_a_replacement_may_skip_its_block(dit, inputs):
    options = {"patches_replace": {"dit": {("single_block", 0): lambda args, extra: {"img": args["img"]}}}}
    skipped = dit(*inputs, transformer_options=options)
    model = DiT(DiTConfig(**{**CONFIG.to_dict(), "rope_axes_dim": (4, 6, 6), "num_layers": 1}))
    kept = {k.replace("layers.1.", "layers.0."): v for k, v in dit.state_dict().items() if "layers.0." not in k}
    model.load_state_dict(kept)
    assert torch.equal(skipped, model(*inputs))


@pytest.mark.parametrize("kind", ["single_block", "double_block"])
def test_a_patch_may_change_the_image_tokens(kind, dit, inputs):
    seen = []

    def patch(args):
        seen.append((args["block_index"], args["img"].shape, args["txt"].shape))
        return {"img": args["img"] * 1.5}

    out = dit(*inputs, transformer_options={"patches": {kind: [patch]}})
    assert seen == [(0, (2, 15, 64), (2, 7, 64)), (1, (2, 15, 64), (2, 7, 64))]
    assert not torch.allclose(out, dit(*inputs), atol=1e-3)


def test_a_patch_that_returns_nothing_changes_nothing(dit, inputs):
    assert torch.equal(dit(*inputs, transformer_options={"patches": {"single_block": [lambda args: {}]}}), dit(*inputs))


def test_a_post_input_patch_sees_both_streams_and_may_change_them(dit, inputs):
    def identity(args):
        assert args["img"].shape == (2, 15, 64)
        assert args["txt"].shape == (2, 7, 64)
        return args

    def silence(args):
        return {"img": args["img"], "txt": torch.zeros_like(args["txt"])}

    plain = dit(*inputs)
    assert torch.equal(dit(*inputs, transformer_options={"patches": {"post_input": [identity]}}), plain)
    silent = dit(*inputs, transformer_options={"patches": {"post_input": [silence]}})
    torch.testing.assert_close(silent, dit(*inputs[:2], torch.zeros_like(inputs[2])))


def test_options_tell_each_block_where_it_is(dit, inputs):
    options = {"patches": {"single_block": [lambda args: seen.append(dict(args["transformer_options"])) or {}]}}
    seen = []
    dit(*inputs, transformer_options=options)
    keys = ("block_index", "total_blocks", "block_type", "img_slice")
    assert [[o[k] for k in keys] for o in seen] == [[0, 2, "single", [0, 15]], [1, 2, "single", [0, 15]]]


def test_rope_options_at_rest_change_nothing_and_otherwise_something(dit, inputs):
    plain = dit(*inputs)
    rest = {"scale_x": 1.0, "scale_y": 1.0, "shift_t": 0.0, "shift_x": 0.0, "shift_y": 0.0}
    assert torch.equal(dit(*inputs, transformer_options={"rope_options": rest}), plain)
    for key in rest:
        moved = dit(*inputs, transformer_options={"rope_options": rest | {key: 2.5}})
        assert not torch.allclose(moved, plain, atol=1e-4), key
