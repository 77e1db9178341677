"""The one attention call site.

Backends by name, all with the same result within rounding: `sdpa` (torch), `xformers`
(memory_efficient_attention), `flash3` (flash_attn_interface), `sage` (sageattention, lossy: never chosen by itself).
A host hands its own function to `DiT.forward` instead.

Shape letters: B batch · S tokens · N heads · K head dim. `lengths[b]` tokens of sample b are real, the rest is padding
at the end; None means nothing is padded, and then no backend sees a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ErnieError

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Sequence[int] | None], Tensor]


def _pack(x_BSNK: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([x[:n] for x, n in zip(x_BSNK, lengths, strict=True)])


def _unpack(packed: Tensor, lengths: Sequence[int], padded: int) -> Tensor:
    out = packed.new_zeros(len(lengths), padded, *packed.shape[1:])
    for row, part, n in zip(out, packed.split(list(lengths)), lengths, strict=True):
        row[:n] = part
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> Tensor:
    mask = None
    if lengths is not None:
        # Filled in place: a tensor made from the list would be copied to the device, and every block would wait for it.
        mask = torch.ones(len(lengths), 1, 1, k.shape[1], dtype=torch.bool, device=q.device)
        for row, n in zip(mask, lengths, strict=True):
            row[..., n:].fill_(False)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    if lengths is None:
        return memory_efficient_attention(q, k, v)
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(lengths))
    packed = memory_efficient_attention(*(_pack(x, lengths)[None] for x in (q, k, v)), attn_bias=bias)
    return _unpack(packed[0], lengths, q.shape[1])


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    edges = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    for edge, end in zip(edges[1:], accumulate(lengths), strict=True):
        edge.fill_(end)
    return edges


def _flash3(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> Tensor:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    if lengths is None:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # early releases also return the log-sum-exp
    edges = _cumulative(lengths, q.device)
    out = flash_attn_varlen_func(
        *(_pack(x, lengths) for x in (q, k, v)), edges, edges, max_seqlen_q=max(lengths), max_seqlen_k=max(lengths)
    )
    return _unpack(out[0] if isinstance(out, tuple) else out, lengths, q.shape[1])


def _sage(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> Tensor:
    from sageattention import sageattn, sageattn_varlen

    if lengths is None:
        return sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
    edges = _cumulative(lengths, q.device)
    packed = sageattn_varlen(
        *(_pack(x, lengths) for x in (q, k, v)), edges, edges, max(lengths), max(lengths), is_causal=False
    )
    return _unpack(packed, lengths, q.shape[1])


# name -> (function, module it needs)
_BACKENDS: dict[str, tuple[AttentionFunction, str | None]] = {
    "sdpa": (_sdpa, None),
    "xformers": (_xformers, "xformers"),
    "flash3": (_flash3, "flash_attn_interface"),
    "sage": (_sage, "sageattention"),
}
BACKEND_NAMES = tuple(_BACKENDS)


def choose_backend(q_BSNK: Tensor, *, ragged: bool) -> str:
    """Name of the fastest exact backend for these inputs.

    FlashAttention-3 where it is installed and the card is Hopper; for ragged batches xformers, whose block-diagonal
    mask keeps the flash kernel where SDPA's boolean mask loses it; SDPA otherwise and always on the CPU, in fp32 and
    under autograd (only SDPA serves all three).
    """
    half = q_BSNK.dtype in (torch.bfloat16, torch.float16)
    if q_BSNK.device.type != "cuda" or not half or q_BSNK.requires_grad:
        return "sdpa"
    hopper = torch.cuda.get_device_capability(q_BSNK.device)[0] == 9
    if hopper and find_spec("flash_attn_interface"):
        return "flash3"
    if ragged and find_spec("xformers"):
        return "xformers"
    return "sdpa"


def attention(
    q_BSNK: Tensor,
    k_BSNK: Tensor,
    v_BSNK: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Full bidirectional attention [B, S, N, K], scale 1/sqrt(K), keys beyond `lengths` left out.

    Rows beyond `lengths` come out undefined (callers never read them). `backend` None: `choose_backend`.

    Raises:
        ErnieError: unknown backend, or its package is not installed.
    """
    name = backend or choose_backend(q_BSNK, ragged=lengths is not None)
    if name not in _BACKENDS:
        raise ErnieError(f"attention backend must be one of {', '.join(BACKEND_NAMES)}; got {name!r}.")
    function, module = _BACKENDS[name]
    if module and find_spec(module) is None:
        raise ErnieError(f"attention backend {name!r} needs the package {module}; install it or choose 'sdpa'.")
    return function(q_BSNK, k_BSNK, v_BSNK, lengths)
