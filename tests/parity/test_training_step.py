"""Training steps against diffusers' transformer with peft's LoRA: same weights, noise, sigmas and text; fp32."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ernie_pack.bench.pairs import make_dit_pair
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.sampling.latents import mix_noise
from ernie_pack.ernie_core.training.adapters import BLOCK_LINEARS, Adapter, AdapterConfig, Views
from ernie_pack.ernie_core.training.blocks import BlockStream, run_blocks
from ernie_pack.ernie_core.training.objectives import (
    DpoConfig,
    SigmaSampling,
    dpo_coefficients,
    dpo_loss,
    draw_noise,
    draw_sigmas,
    sft_loss,
)

pytestmark = pytest.mark.parity

CONFIG = DiTConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=3,
    ffn_hidden_size=96,
    text_in_dim=48,
    in_channels=8,
    out_channels=8,
    rope_axes_dim=(4, 6, 6),
)
RANK, ALPHA, HEIGHT, WIDTH = 4, 6.0, 4, 6
LIMIT = 1e-5  # of each factor's largest gradient


def data(*, lengths=(7, 7, 3, 5), seed=0, first=0):
    """Noised latents, targets and texts as the trainer makes them."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    x0 = torch.randn(batch, 8, HEIGHT, WIDTH, generator=generator)
    text = torch.randn(batch, max(lengths), 48, generator=generator)
    for row, n in zip(text, lengths, strict=True):
        row[n:] = 0
    noise = torch.stack([draw_noise(x0.shape[1:], seed=seed, number=first + i) for i in range(batch)])
    sigmas = draw_sigmas(SigmaSampling(), seed=seed, first=first, count=batch, tokens=HEIGHT * WIDTH)
    x = torch.stack([mix_noise(a, n, float(s)) for a, n, s in zip(x0, noise, sigmas, strict=True)])
    return SimpleNamespace(x=x, target=noise - x0, timesteps=1000 * sigmas, text=text, lengths=lengths, sigmas=sigmas)


def part(batch, rows):
    lengths = tuple(batch.lengths[i] for i in rows)
    return SimpleNamespace(
        x=batch.x[rows],
        target=batch.target[rows],
        timesteps=batch.timesteps[rows],
        text=batch.text[rows],
        lengths=lengths,
    )


class Both:
    """Our transformer with an adapter and diffusers' with peft's, equal in every number."""

    def __init__(self):
        from peft import LoraConfig

        self.ours, self.theirs = make_dit_pair(CONFIG, dtype=torch.float32)
        targets = r"layers\.\d+\.(" + "|".join(BLOCK_LINEARS).replace(".", r"\.") + ")"
        self.theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        self.theirs.train()
        self.adapter = Adapter(self.ours, AdapterConfig(rank=RANK, alpha=ALPHA), seed=0)
        self.views = Views(self.ours)
        self.views.add("policy", self.adapter)
        self.run_block = run_blocks()
        generator = torch.Generator().manual_seed(3)
        peers = dict(self.theirs.named_parameters())
        self.pairs = {}
        with torch.no_grad():
            for name, p in self.adapter.named_parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator)
                self.pairs[name] = (p, peers[f"{name}.default.weight"])
                self.pairs[name][1].copy_(p)
        assert sum(p.requires_grad for p in peers.values()) == len(self.pairs)

    def our_velocity(self, batch, *views):
        with self.views.active(*views):
            return self.ours(batch.x, batch.timesteps, batch.text, text_lengths=batch.lengths, run_block=self.run_block)

    def their_velocity(self, batch, *, adapted=True):
        if not adapted:
            self.theirs.disable_adapters()
        out = self.theirs(batch.x, batch.timesteps, batch.text, torch.tensor(batch.lengths), return_dict=False)[0]
        if not adapted:
            self.theirs.enable_adapters()
        return out

    def sft(self, batch):
        return sft_loss(self.our_velocity(batch, "policy"), batch.target)

    def zero(self):
        for pair in self.pairs.values():
            for p in pair:
                p.grad = None

    def worst(self):
        """Largest difference of a gradient, relative to the largest entry of the peer's."""
        return max(float((p.grad - q.grad).abs().max() / q.grad.abs().max()) for p, q in self.pairs.values())


@pytest.fixture
def both():
    return Both()


LENGTHS = {"equal": (7, 7, 7, 7), "unequal": (7, 2, 5, 6)}
BLOCKS = {
    "kept": lambda model: run_blocks(checkpoint=False),
    "recomputed": lambda model: run_blocks(),
    "streamed": lambda model: run_blocks(stream=BlockStream(model, "cpu")),
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_gradients_are_those_of_diffusers_and_peft(lengths, blocks, both):
    both.run_block = blocks(both.ours)
    if blocks is not BLOCKS["kept"]:
        both.theirs.enable_gradient_checkpointing()
    batch = data(lengths=lengths)
    loss = both.sft(batch).mean()
    loss.backward()
    expected = F.mse_loss(both.their_velocity(batch), batch.target)
    expected.backward()
    assert float(loss.detach() - expected.detach()) == pytest.approx(0, abs=1e-6)
    assert both.worst() <= LIMIT


def test_a_wrong_step_would_be_noticed(both):
    """Text of the wrong length, or timesteps on the wrong scale, move gradients by far more than the bound."""
    batch = data(lengths=(7, 3))
    F.mse_loss(both.their_velocity(batch), batch.target).backward()
    for change in ({"lengths": (7, 7)}, {"timesteps": batch.sigmas}, {"target": -batch.target}):
        for p, _ in both.pairs.values():
            p.grad = None
        both.sft(SimpleNamespace(**(vars(batch) | change))).mean().backward()
        assert both.worst() > 100 * LIMIT, change


def test_four_of_one_are_one_of_four(both):
    """Accumulation: the sum of single samples' gradients, each divided by the number of samples."""
    batch = data(lengths=(7, 2, 5, 6))
    both.sft(batch).mean().backward()
    whole = {name: p.grad.clone() for name, (p, _) in both.pairs.items()}
    both.zero()
    for i in range(4):
        (both.sft(part(batch, [i])).sum() / 4).backward()
    for name, (p, _) in both.pairs.items():
        assert (p.grad - whole[name]).abs().max() <= LIMIT * whole[name].abs().max(), name


def test_a_sample_does_not_see_its_neighbours(both):
    batch = data(lengths=(7, 2, 5, 6))
    losses = both.sft(batch).detach()
    order = [2, 0, 3, 1]
    torch.testing.assert_close(both.sft(part(batch, order)).detach(), losses[order], rtol=1e-5, atol=1e-6)


def test_the_loss_curves_overlay(both):
    """Twenty steps of AdamW on fresh noise, both from the same start."""
    ours, theirs = (
        torch.optim.AdamW([pair[i] for pair in both.pairs.values()], lr=3e-3, weight_decay=1e-2) for i in (0, 1)
    )
    both.theirs.enable_gradient_checkpointing()
    curves = ([], [])
    for step in range(20):
        batch = data(lengths=(7, 2), first=2 * step)  # the same pictures, new noise
        both.zero()
        for optimiser, curve, loss in (
            (ours, curves[0], both.sft(batch).mean()),
            (theirs, curves[1], F.mse_loss(both.their_velocity(batch), batch.target)),
        ):
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
            optimiser.step()
            curve.append(float(loss.detach()))
    # AdamW divides by the gradient's size, so the last digits of tiny gradients grow; the curves stay together.
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=2e-4, atol=0)
    fixed = data(lengths=(7, 2))
    with torch.no_grad():
        end = float(both.sft(fixed).mean())
    assert end < 0.9 * curves[0][0], (end, curves[0][0])


@pytest.mark.parametrize("two_passes", [False, True], ids=["one pass", "two passes"])
@pytest.mark.parametrize(
    "config",
    [
        DpoConfig(),
        DpoConfig(reduction="mean", beta=8.0, anchor_lose=0.0),
        DpoConfig(reduction="mean", anchor_reduction="mean"),
        DpoConfig(sdpo_mu=0.6),
    ],
    ids=["sum and mean", "mean, beta 8", "the report with one reduction", "safeguard"],
)
def test_dpo_gradients_are_written_out_ones(config, two_passes, both):
    """Two pairs, same noise and sigma for winner and loser; the reference is the adapter switched off."""
    win = data(lengths=(7, 3))
    lose = data(lengths=(7, 3), seed=0)
    other = torch.randn(2, 8, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(9))
    noise = torch.stack([draw_noise((8, HEIGHT, WIDTH), seed=0, number=i) for i in range(2)])
    lose.x = torch.stack([mix_noise(a, n, float(s)) for a, n, s in zip(other, noise, win.sigmas, strict=True)])
    lose.target = noise - other
    elements = 8 * HEIGHT * WIDTH

    def reference(batch):
        with torch.no_grad():
            return sft_loss(both.our_velocity(batch), batch.target)

    def policy(batch):
        velocity = both.our_velocity(batch, "policy")
        return sft_loss(velocity, batch.target), (velocity - batch.target).detach()

    references = reference(win), reference(lose)
    if two_passes:
        with torch.no_grad():
            (e_win, r_win), (e_lose, r_lose) = policy(win), policy(lose)
    else:
        (e_win, r_win), (e_lose, r_lose) = policy(win), policy(lose)
    loss, metrics = dpo_loss(
        e_win, e_lose, *references, config, elements=elements, residual_win=r_win, residual_lose=r_lose
    )
    if two_passes:
        for batch, factor in zip((win, lose), dpo_coefficients(metrics, config, elements=elements), strict=True):
            (factor * policy(batch)[0]).mean().backward()
    else:
        loss.mean().backward()

    def squares(batch, adapted):
        return (both.their_velocity(batch, adapted=adapted) - batch.target).square().flatten(1)

    pw, pl = squares(win, True), squares(lose, True)
    with torch.no_grad():
        rw, rl = squares(win, False), squares(lose, False)
    scale = 1 if config.reduction == "mean" else elements
    pull = pl.mean(1)
    if config.sdpo_mu is not None:
        out_w, out_l = (both.their_velocity(b) - b.target for b in (win, lose))
        inner = (out_w * out_l).flatten(1).sum(1).detach()
        lam = ((1 - config.sdpo_mu) * out_w.detach().square().flatten(1).sum(1) / inner).clamp(0, 1)
        lam = torch.where(inner > 0, lam, torch.ones_like(lam))
        pull = lam * pull + (1 - lam) * pull.detach()
    difference = scale * ((pw.mean(1) - pull) - (rw.mean(1) - rl.mean(1)))
    expected = -F.logsigmoid(-config.beta * difference)
    expected = expected + config.anchor_win * pw.mean(1) + config.anchor_lose * pl.mean(1)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    expected.mean().backward()
    assert (config.sdpo_mu is None) == bool((metrics["safeguard"] == 1).all()), "the safeguard must be at work"
    assert both.worst() <= LIMIT


def test_the_reference_is_the_base_of_diffusers(both):
    batch = data(lengths=(7, 3))
    with torch.no_grad():
        found, expected = both.our_velocity(batch), both.their_velocity(batch, adapted=False)
        adapted = both.our_velocity(batch, "policy")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (adapted - found).abs().max() > 0.05
