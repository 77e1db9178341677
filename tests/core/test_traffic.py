"""What one step costs beyond matrix products and attention: counted, not timed, so that it holds on every machine."""

import pytest
import torch
from ernie_pack.bench.traffic import TARGET_KERNELS, TARGET_UNITS, Kernel, count_kernels, count_our_block, stored_bytes
from ernie_pack.ernie_core.config import DiTConfig
from ernie_pack.ernie_core.model import dit as dit_module
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.pipeline import make_denoise
from ernie_pack.ernie_core.sampling.guidance import with_cfg
from ernie_pack.ernie_core.sampling.samplers import sample_euler
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONFIG = DiTConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=3,
    ffn_hidden_size=96,
    text_in_dim=24,
    in_channels=8,
    out_channels=8,
    rope_axes_dim=(4, 6, 6),
)


def names(kernels: list[Kernel]) -> list[str]:
    return [k.name for k in kernels]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_stays_within_its_traffic(batch):
    found, kernels = count_our_block(batch=batch)
    assert found <= TARGET_UNITS
    assert kernels <= TARGET_KERNELS
    assert found == pytest.approx(43.1, abs=0.1)  # a change for the better belongs in bench/RESULTS.md


@pytest.mark.parity
def test_the_counter_finds_diffusers_published_figures():
    from ernie_pack.bench.traffic import count_diffusers_block

    found, kernels = count_diffusers_block()
    assert found == pytest.approx(170.0, abs=0.1)
    assert kernels == 64


def test_views_matrix_products_and_attention_are_free():
    x = torch.empty(2, 6, 4, 8, device="meta")

    def function():
        x.transpose(1, 2).flatten(2).chunk(2, dim=-1)[0][:, None].expand(-1, 3, -1, -1)
        torch.nn.functional.linear(x, torch.empty(5, 8, device="meta"))
        torch.nn.functional.scaled_dot_product_attention(x, x, x)

    # flattening the transposed tensor is a copy, and the only one
    assert names(count_kernels(function)) == ["clone"]


def test_operands_count_at_their_stored_size():
    x = torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    row = torch.empty(1, 8, dtype=torch.bfloat16, device="meta")
    assert stored_bytes(row.expand(4, 8)) == 16
    cases = [
        (lambda: x + row, 64 + 16 + 64),
        (lambda: x + row.expand(4, 8), 64 + 16 + 64),
        (lambda: x.add_(x), 64 + 64 + 64),
        (lambda: x[:, :4].mul_(2), 32 + 32),
        (lambda: x.fill_(0), 64),
        (lambda: x.copy_(row), 16 + 64),
        (lambda: x.float(), 64 + 128),
        (lambda: x.to(torch.bfloat16), 0),
        (lambda: torch.nn.functional.rms_norm(x, (8,), row[0]), 64 + 16 + 64),
    ]
    assert [sum(k.bytes for k in count_kernels(function)) for function, _ in cases] == [n for _, n in cases]


class Watch(TorchDispatchMode):
    """Names of all operations; reading a value back or copying from the CPU to the (meta) device is a wait."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        self.seen.append(name)
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.ndim}
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "item") or len(devices) > 1:
            self.waits.append(name)
        return out


def step(lengths):
    """One denoising step of the engine on the meta device, watched."""
    model = DiT(CONFIG, dtype=torch.bfloat16, device="meta").eval()
    denoise = make_denoise(model, [torch.empty(n, 24, device="meta") for n in lengths], 4, 4)
    x = torch.empty(len(lengths), 8, 4, 4, device="meta")
    with Watch() as watch:
        denoise(x, 0.5)
    return watch


@pytest.mark.parametrize("lengths", [(5,), (5, 5), (5, 2, 7)], ids=["one", "equal", "ragged"])
def test_no_step_waits_for_the_device(lengths):
    assert step(lengths).waits == []


def test_the_watch_notices_a_wait():
    with Watch() as watch:
        torch.ones(3).to("meta")
        torch.ones(()).item()
    assert watch.waits == ["_to_copy", "_local_scalar_dense"]


def test_no_mask_exists_when_lengths_are_equal(monkeypatch):
    masks = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None):
        masks.append(attn_mask)
        return sdpa(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    step((5, 5))
    assert masks == [None] * CONFIG.num_layers
    masks.clear()
    step((5, 2))
    assert [m.shape for m in masks] == [(2, 1, 1, 16 + 5)] * CONFIG.num_layers


def test_a_run_computes_rope_once_per_branch_and_modulation_once_per_step(monkeypatch):
    tables = []
    rope_table = dit_module.rope_table
    monkeypatch.setattr(dit_module, "rope_table", lambda *a, **k: tables.append(a) or rope_table(*a, **k))
    model = DiT(CONFIG).eval()
    modulations = []
    model.adaLN_modulation.register_forward_hook(lambda *_: modulations.append(1))
    texts = torch.randn(2, 5, 24)
    cond, uncond = (make_denoise(model, [text], 4, 4) for text in texts)
    sample_euler(with_cfg(cond, uncond, 4.0), torch.randn(1, 8, 4, 4), make_sigmas(6))
    assert len(tables) == 2
    assert len(modulations) == 2 * 6
