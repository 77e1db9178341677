"""NAG in the attention: exact where the formula says so, the same as the paper's doubled batch, cheap."""

import math

import pytest
import torch
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.attention import attention
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.model.rope import apply_rope
from ernie_pack.ernie_core.pipeline import make_denoise
from ernie_pack.ernie_core.sampling.nag import Nag, nag_inputs, push_away
from random_models import random_weights
from torch.utils.flop_counter import FlopCounterMode

CONFIG = DiTConfig(
    hidden_size=48,
    num_attention_heads=3,
    num_layers=2,
    ffn_hidden_size=64,
    text_in_dim=20,
    in_channels=8,
    out_channels=8,
    rope_axes_dim=(4, 6, 6),
)
ROWS, COLUMNS = 3, 4
TOKENS = ROWS * COLUMNS


@pytest.fixture(scope="module")
def dit():
    dit = DiT(CONFIG).double()
    dit.load_state_dict({n: t.double() for n, t in random_weights(dit.state_dict(), seed=1).items()})
    return dit.eval()


def text(tokens, seed, batch=1):
    return torch.randn(batch, tokens, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(batch=1):
    return torch.randn(batch, 8, ROWS, COLUMNS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def run(dit, positive, nag=None, sigma=0.7, x=None):
    x = noisy(len(positive)) if x is None else x
    return make_denoise(dit, list(positive), ROWS, COLUMNS, nag=nag)(x, sigma)


POSITIVE, NEGATIVE = text(5, 1), text(3, 2)


@pytest.mark.parametrize("neutral", [{"scale": 1.0}, {"alpha": 0.0}, {"start": 0.5, "end": 0.5}])
def test_neutral_settings_are_the_plain_prediction_bit_for_bit(dit, neutral):
    assert torch.equal(run(dit, POSITIVE, Nag(text_BTD=NEGATIVE, **neutral)), run(dit, POSITIVE))


def test_outside_of_its_range_it_is_the_plain_prediction_bit_for_bit(dit):
    nag = Nag(text_BTD=NEGATIVE, start=0.6, end=0.2)
    assert torch.equal(run(dit, POSITIVE, nag, sigma=0.7), run(dit, POSITIVE))
    assert not torch.allclose(run(dit, POSITIVE, nag, sigma=0.5), run(dit, POSITIVE, sigma=0.5), atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 3, 5, 8])
def test_scale_0_is_the_prediction_under_the_negative_prompt(dit, tokens):
    """The image then sees the negative prompt alone; positions included, whatever both lengths are."""
    negative = text(tokens, 4)
    nag = Nag(text_BTD=negative, scale=0.0, alpha=1.0, tau=100.0)
    torch.testing.assert_close(run(dit, POSITIVE, nag), run(dit, negative), rtol=1e-6, atol=1e-6)


def test_a_negative_that_is_the_prompt_changes_nothing(dit):
    torch.testing.assert_close(
        run(dit, POSITIVE, Nag(text_BTD=POSITIVE, scale=7.0, alpha=0.5)), run(dit, POSITIVE), rtol=1e-6, atol=1e-6
    )


def test_it_equals_the_papers_doubled_batch(dit):
    """Both prompts as two samples of a batch, each with its own copy of the image, mixed after every attention."""
    nag = Nag(text_BTD=NEGATIVE, scale=4.0, tau=1.2, alpha=0.6)

    def sequence(texts):
        image, projected = dit.x_embedder(noisy()), dit.text_proj(texts)
        rope = dit.rope(ROWS, COLUMNS, [texts.shape[1]], device="cpu", dtype=torch.float64)
        return torch.cat([image, projected], dim=1), rope

    with torch.no_grad():
        (x_pos, rope_pos), (x_neg, rope_neg) = sequence(POSITIVE), sequence(NEGATIVE)
        c, modulation = dit.modulation(torch.tensor([700.0]), torch.float64)
        for block in dit.layers:
            outputs = []
            for x, rope in ((x_pos, rope_pos), (x_neg, rope_neg)):
                a = block.self_attention
                n = torch.addcmul(modulation[0], block.adaLN_sa_ln(x), modulation[1])
                q, k, v = (proj(n).unflatten(-1, (a.heads, -1)) for proj in (a.to_q, a.to_k, a.to_v))
                q, k = apply_rope(a.norm_q(q), rope), apply_rope(a.norm_k(k), rope)
                outputs.append(attention(q, k, v).flatten(2))
            mixed = slow_push(outputs[0][:, :TOKENS], outputs[1][:, :TOKENS], nag)
            states = []
            for x, out in ((x_pos, outputs[0]), (x_neg, outputs[1])):
                out = torch.cat([mixed, out[:, TOKENS:]], dim=1)
                x = torch.addcmul(x, modulation[2], block.self_attention.to_out[0](out))
                n = torch.addcmul(modulation[3], block.adaLN_mlp_ln(x), modulation[4])
                states.append(torch.addcmul(x, modulation[5], block.mlp(n)))
            x_pos, x_neg = states
        wanted = dit.final_linear(dit.final_norm(x_pos[:, :TOKENS], c))
        wanted = wanted.unflatten(1, (ROWS, COLUMNS)).permute(0, 3, 1, 2)
    torch.testing.assert_close(run(dit, POSITIVE, nag), wanted, rtol=1e-5, atol=1e-5)


def slow_push(z_pos, z_neg, nag):
    """The paper's equations, number by number."""
    out = z_pos.clone()
    for b in range(z_pos.shape[0]):
        for t in range(z_pos.shape[1]):
            pos, neg = z_pos[b, t].tolist(), z_neg[b, t].tolist()
            pushed = [nag.scale * p - (nag.scale - 1) * n for p, n in zip(pos, neg, strict=True)]
            ratio = sum(map(abs, pushed)) / sum(map(abs, pos))
            held = [v * min(ratio, nag.tau) / ratio for v in pushed]
            out[b, t] = torch.tensor(
                [nag.alpha * h + (1 - nag.alpha) * p for h, p in zip(held, pos, strict=True)], dtype=z_pos.dtype
            )
    return out


@pytest.mark.parametrize("tau", [1.0, 1.5, 100.0])
def test_the_formula_is_the_papers(tau):
    z_pos, z_neg = (torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    nag = Nag(text_BTD=NEGATIVE, scale=4.0, tau=tau, alpha=0.4)
    torch.testing.assert_close(push_away(z_pos, z_neg, nag), slow_push(z_pos, z_neg, nag), rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_pictures_one_by_one(dit):
    positive, nag = text(5, 6, batch=3), Nag(text_BTD=NEGATIVE, scale=3.0, alpha=0.7)
    x = noisy(3)
    together = run(dit, positive, nag, x=x)
    alone = torch.cat([run(dit, positive[i : i + 1], nag, x=x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_image_tokens_run_once(dit):
    """What it adds are the negative's tokens, not a second image."""
    seen = []
    hook = dit.layers[0].mlp.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape[:2])))
    run(dit, POSITIVE, Nag(text_BTD=NEGATIVE))
    hook.remove()
    assert seen == [(1, TOKENS + 5 + 3)]


def test_what_it_adds_to_a_step_of_the_released_model_at_1024_px():
    """A negative of 30 tokens beside a prompt of 100: a seventh, where a second call adds nearly all of it again."""
    config = DiTConfig(num_layers=2)
    with torch.device("meta"):
        dit = DiT(config, dtype=torch.bfloat16)
    x, timestep = torch.empty(1, 128, 64, 64, dtype=torch.bfloat16), torch.empty(1)

    def count(**inputs):
        with FlopCounterMode(display=False) as counter:
            dit(x.to("meta"), timestep.to("meta"), **inputs)
        return counter.get_total_flops()

    def text(tokens):
        return torch.empty(1, tokens, config.text_in_dim, dtype=torch.bfloat16, device="meta")

    def rope_for(tokens):
        return dit.rope(64, 64, [tokens], device="meta", dtype=torch.bfloat16)

    plain = count(text_BTD=text(100), rope=rope_for(100))
    second = count(text_BTD=text(30), rope=rope_for(30))
    nag = count(**nag_inputs(Nag(text_BTD=text(30)), text(100), 64 * 64, rope_for, attention))
    assert nag / plain == pytest.approx(1.14, abs=0.01)
    assert second / plain > 0.95


def test_prompts_of_different_lengths_are_refused(dit):
    with pytest.raises(ErnieError, match="needs prompts of one length"):
        make_denoise(dit, [POSITIVE[0], NEGATIVE[0]], ROWS, COLUMNS, nag=Nag(text_BTD=NEGATIVE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": -1.0}, r"scale must lie between 0 and 100"),
        ({"scale": math.nan}, r"scale must lie between 0 and 100"),
        ({"tau": 0.5}, r"tau must lie between 1 and 100"),
        ({"alpha": 1.5}, r"alpha must lie between 0 and 1"),
        ({"start": 0.2, "end": 0.6}, r"start must not be below end"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ErnieError, match=message):
        Nag(text_BTD=NEGATIVE, **changes)
