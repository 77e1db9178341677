"""Every backend gives SDPA's numbers.

The packages of the other backends have no CPU kernels; stand-ins with their published signatures compute by softmax, so
that packing, layouts and arguments are tested here, and only the kernels themselves are left to a GPU.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.attention import BACKEND_NAMES, attention, choose_backend

RAGGED = [5, 9, 1]


def softmax_attention(q, k, v, *, blocks=None):
    """Attention over [B, S, N, K] by its definition; `blocks` are the edges of samples packed along S."""
    score = torch.einsum("bsnk,btnk->bnst", q, k) * q.shape[-1] ** -0.5
    if blocks is not None:
        sample = torch.bucketize(torch.arange(q.shape[1]), torch.tensor(blocks[1:-1]), right=True)
        score = score.masked_fill(sample[:, None] != sample[None, :], float("-inf"))
    return torch.einsum("bnst,btnk->bsnk", score.softmax(-1), v)


def install(monkeypatch, name, **contents):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def calls():
    return []


@pytest.fixture
def xformers(monkeypatch, calls):
    class BlockDiagonalMask:
        def __init__(self, edges):
            self.edges = edges

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert isinstance(q_seqlen, list)
            return cls([0, *torch.tensor(q_seqlen).cumsum(0).tolist()])

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        calls.append(query.shape)
        if attn_bias is None:
            return softmax_attention(query, key, value)
        assert query.shape[0] == 1, "a block-diagonal mask takes one packed sequence"
        return softmax_attention(query, key, value, blocks=attn_bias.edges)

    fmha = ModuleType("xformers.ops.fmha")
    fmha.attn_bias = ModuleType("xformers.ops.fmha.attn_bias")
    fmha.attn_bias.BlockDiagonalMask = BlockDiagonalMask
    install(monkeypatch, "xformers")
    install(monkeypatch, "xformers.ops", fmha=fmha, memory_efficient_attention=memory_efficient_attention)


def install_flash3(monkeypatch, calls, answer):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        calls.append(q.shape)
        return answer(softmax_attention(q, k, v))

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, causal=False):
        calls.append(q.shape)
        assert q.ndim == 3
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        return answer(softmax_attention(q[None], k[None], v[None], blocks=cu_seqlens_q.tolist())[0])

    install(
        monkeypatch,
        "flash_attn_interface",
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )


@pytest.fixture
def flash3(monkeypatch, calls):
    install_flash3(monkeypatch, calls, answer=lambda out: out)


@pytest.fixture
def flash3_early(monkeypatch, calls):
    """Early releases also return the log-sum-exp."""
    install_flash3(monkeypatch, calls, answer=lambda out: (out, None))


@pytest.fixture
def sage(monkeypatch, calls):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        calls.append(q.shape)
        assert tensor_layout == "NHD"
        return softmax_attention(q, k, v)

    def sageattn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False):
        calls.append(q.shape)
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_k.diff().max())
        return softmax_attention(q[None], k[None], v[None], blocks=cu_seqlens_q.tolist())[0]

    install(monkeypatch, "sageattention", sageattn=sageattn, sageattn_varlen=sageattn_varlen)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 9, 2, 8, generator=generator) for _ in range(3)]


def valid_rows(out, lengths):
    return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])


def test_sdpa_is_attention_by_its_definition(qkv):
    torch.testing.assert_close(attention(*qkv, backend="sdpa"), softmax_attention(*qkv))


def test_sdpa_leaves_padded_keys_out(qkv):
    out = attention(*qkv, RAGGED, backend="sdpa")
    for row, n in enumerate(RAGGED):
        alone = softmax_attention(*(x[row : row + 1, :n] for x in qkv))
        torch.testing.assert_close(out[row, :n], alone[0])


@pytest.mark.parametrize("lengths", [None, RAGGED, [9, 9, 9]], ids=["uniform", "ragged", "all full"])
@pytest.mark.parametrize("package", ["xformers", "flash3", "flash3_early", "sage"])
def test_a_backend_gives_sdpas_numbers(package, lengths, qkv, calls, request):
    request.getfixturevalue(package)
    backend = package.removesuffix("_early")
    out = attention(*qkv, lengths, backend=backend)
    expected = attention(*qkv, lengths, backend="sdpa")
    assert out.shape == expected.shape
    rows = lengths or [9, 9, 9]
    torch.testing.assert_close(valid_rows(out, rows), valid_rows(expected, rows))
    assert len(calls) == 1


@pytest.mark.parametrize("backend", ["xformers", "flash3", "sage"])
def test_a_ragged_batch_is_packed_to_its_true_tokens(backend, qkv, calls, request):
    request.getfixturevalue(backend)
    attention(*qkv, RAGGED, backend=backend)
    tokens = [size for size in calls[0] if size == sum(RAGGED)]
    assert len(tokens) == 1


@pytest.mark.parametrize("backend", ["xformers", "flash3", "sage"])
def test_a_uniform_batch_keeps_its_layout(backend, qkv, calls, request):
    request.getfixturevalue(backend)
    attention(*qkv, backend=backend)
    assert calls == [(3, 9, 2, 8)]


def test_an_unknown_backend_is_answered_with_the_known_ones(qkv):
    with pytest.raises(ErnieError, match=f"must be one of {', '.join(BACKEND_NAMES)}; got 'spda'"):
        attention(*qkv, backend="spda")


@pytest.mark.parametrize(
    ("backend", "package"),
    [("xformers", "xformers"), ("flash3", "flash_attn_interface"), ("sage", "sageattention")],
)
def test_a_missing_package_is_named(backend, package, qkv, monkeypatch):
    monkeypatch.setattr("ernie_pack.ernie_core.model.attention.find_spec", lambda name: None)
    with pytest.raises(ErnieError, match=f"{backend!r} needs the package {package}; install it or choose 'sdpa'"):
        attention(*qkv, backend=backend)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_cpu_always_takes_sdpa(ragged, qkv, xformers, sage):
    assert choose_backend(qkv[0], ragged=ragged) == "sdpa"
    assert choose_backend(qkv[0].bfloat16(), ragged=ragged) == "sdpa"


class OnCard:
    """What `choose_backend` reads of a tensor on a card."""

    def __init__(self, dtype=torch.bfloat16, requires_grad=False):
        self.device = torch.device("cuda", 0)
        self.dtype = dtype
        self.requires_grad = requires_grad


@pytest.mark.parametrize(
    ("capability", "installed", "ragged", "tensor", "expected"),
    [
        ((9, 0), {"flash_attn_interface", "xformers", "sageattention"}, False, OnCard(), "flash3"),
        ((9, 0), {"flash_attn_interface", "xformers"}, True, OnCard(), "flash3"),
        ((8, 9), {"flash_attn_interface", "xformers"}, True, OnCard(), "xformers"),
        ((8, 9), {"xformers"}, False, OnCard(), "sdpa"),
        ((9, 0), {"xformers"}, True, OnCard(torch.float32), "sdpa"),
        ((9, 0), {"flash_attn_interface", "xformers"}, True, OnCard(requires_grad=True), "sdpa"),
        ((9, 0), {"sageattention"}, False, OnCard(), "sdpa"),
        ((9, 0), set(), True, OnCard(), "sdpa"),
    ],
)
def test_the_fastest_exact_backend_is_chosen(capability, installed, ragged, tensor, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        "ernie_pack.ernie_core.model.attention.find_spec", lambda name: object() if name in installed else None
    )
    assert choose_backend(tensor, ragged=ragged) == expected
