"""How the blocks of the transformer run in training: recomputed, streamed, left out. Values for `DiT.forward`'s
`run_block`.

Three savings over autograd's own way, with the same numbers:

- GELU is computed again in backward, so only gate and up are kept of the MLP (`gated_gelu`);
- a recomputed block does not compute the product of its last matrix again where nothing in backward needs the value,
  which is so with LoRA and LoKr: almost a quarter of the block (`_last_product`);
- weights that are streamed are read from RAM and never written back.

Source of elastic depth: ERNIE 5.0, arXiv 2602.04705, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from ..errors import ErnieError
from ..model.attention import AttentionFunction
from ..model.dit import Block, Modulation, RunBlock
from ..model.rope import RopeTable
from ..weights.quantise import QuantisedLinear, multiply_out
from .adapters import ActiveViews

OnBlock = Callable[[int, Tensor], None]
"""on_block(index, x_BSD)"""
_ALIGNMENT = 256  # bytes; what the fastest copies and matrix kernels ask for


# --- one block ----------------------------------------------------------------------------------------------


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.gelu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (gate, up) = grads, ctx.saved_tensors
        grad_up = F.gelu(gate).mul_(grad)
        return torch.ops.aten.gelu_backward(grad * up, gate), grad_up


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up; keeps its two arguments for backward and not the GELU between them."""
    return cast(Tensor, _GatedGelu.apply(gate, up))


def train_block(
    block: Block,
    x_BSD: Tensor,
    modulation: Modulation,
    rope: RopeTable,
    lengths: Sequence[int] | None,
    attend: AttentionFunction,
) -> Tensor:
    """`Block.forward` to the bit, keeping less for backward."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
    n = torch.addcmul(shift_a, block.adaLN_sa_ln(x_BSD), scale_a)
    x_BSD = torch.addcmul(x_BSD, gate_a, block.self_attention(n, rope, lengths, attend))
    n = torch.addcmul(shift_m, block.adaLN_mlp_ln(x_BSD), scale_m)
    mlp = block.mlp
    return torch.addcmul(x_BSD, gate_m, mlp.linear_fc2(gated_gelu(mlp.gate_proj(n), mlp.up_proj(n))))


class _FrozenProduct(torch.autograd.Function):
    """x W^T for a frozen W, or a tensor of that shape with nothing in it where only the graph is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, wants_value: bool) -> Tensor:
        ctx.save_for_backward(weight, scale)
        if wants_value:
            return F.linear(x, _in_dtype(weight, scale, x.dtype))
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, scale) = grads, ctx.saved_tensors
        return grad @ _in_dtype(weight, scale, grad.dtype), None, None, None


def _in_dtype(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if scale is None else multiply_out(weight, scale, dtype)


@contextmanager
def _last_product(block: Block, *, wants_value: bool) -> Iterator[None]:
    """Replace the product of the block's last matrix, in the forward pass and again, without a value, in recomputation.

    In both, because recomputation must keep the same tensors in the same order as the forward pass did.
    """
    linear = cast(nn.Linear | QuantisedLinear, block.mlp.linear_fc2)
    scale = linear.weight_scale if isinstance(linear, QuantisedLinear) else None
    linear.forward = lambda input: cast(Tensor, _FrozenProduct.apply(input, linear.weight, scale, wants_value))
    try:
        yield
    finally:
        del linear.forward


# --- all blocks ---------------------------------------------------------------------------------------------


def run_blocks(*, checkpoint: bool = True, skip: Collection[int] = (), stream: BlockStream | None = None) -> RunBlock:
    """A `run_block` for `DiT.forward`.

    Args:
        checkpoint: keep only the input of each block and compute the rest again in backward. The views that were
            active in the forward pass are active again then, whatever is active at that moment.
        skip: blocks left out (elastic depth), such as `skip_list` gives.
        stream: where the weights come from; None = they are on the device.

    Raises:
        ErnieError: streaming without checkpointing (backward would need weights that have left the device), or `skip`
            names blocks that the streamed model does not have.
    """
    skipped = frozenset(skip)
    if stream is not None:
        if not checkpoint:
            raise ErnieError("streamed blocks need checkpointing: backward brings their weights again. Switch it on.")
        if any(index not in range(len(stream)) for index in skipped):
            raise ErnieError(f"skip must name blocks 0 to {len(stream) - 1}, got {sorted(skipped)}.")

    def run_block(
        index: int,
        block: Block,
        x_BSD: Tensor,
        modulation: Modulation,
        rope: RopeTable,
        lengths: Sequence[int] | None,
        attend: AttentionFunction,
    ) -> Tensor:
        if index in skipped:
            return x_BSD
        trains = torch.is_grad_enabled()
        backward = keeps_value = False

        def run(x_BSD: Tensor) -> Tensor:
            inputs = (x_BSD, modulation, rope, lengths, attend)
            place = nullcontext()
            if stream is not None:
                place = stream.block(index, then=stream.following(index, skipped, trains=trains, backward=backward))
            with place:
                if not checkpoint or not trains:
                    return train_block(block, *inputs)
                with _last_product(block, wants_value=keeps_value or not backward):
                    return train_block(block, *inputs)

        if not checkpoint or not trains:
            return run(x_BSD)
        views = ActiveViews()
        # The gradients of a gate, and of DoRA's magnitude, are made from the value of the last product.
        keeps_value = any(m.requires_grad for m in modulation) or views.read_output_of(block.mlp.linear_fc2)

        @contextmanager
        def again() -> Iterator[None]:
            nonlocal backward
            backward = True
            try:
                with views.restored():
                    yield
            finally:
                backward = False

        return run_checkpointed(run, x_BSD, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    return run_block


def watched(run_block: RunBlock, on_block: OnBlock) -> RunBlock:
    """`run_block`, telling `on_block` what each block gave."""

    def run(index: int, block: nn.Module, x_BSD: Tensor, *others: Any) -> Tensor:
        x_BSD = run_block(index, cast(Block, block), x_BSD, *others)
        on_block(index, x_BSD)
        return x_BSD

    return cast(RunBlock, run)


def skip_list(num_layers: int, count: int) -> tuple[int, ...]:
    """The `count` blocks to leave out of `num_layers`, ascending; a shorter list is always part of a longer one.

    Blocks are taken from the middle, each as far from those already taken as can be, so that no two neighbours go
    before they must. The first and last ninth of the blocks, at least two each, are never left out.

    Raises:
        ErnieError: `count` is negative or more than may be left out.
    """
    edge = max(2, num_layers // 9)
    free = list(range(edge, num_layers - edge))
    if not 0 <= count <= len(free):
        raise ErnieError(f"of {num_layers} blocks 0 to {len(free)} can be left out, got {count}.")
    taken = [edge - 1, num_layers - edge]  # the fixed blocks keep their distance too
    for _ in range(count):
        best = max(free, key=lambda i: (min(abs(i - t) for t in taken), -abs(2 * i - num_layers + 1), -i))
        free.remove(best)
        taken.append(best)
    return tuple(sorted(taken[2:]))


# --- streaming ----------------------------------------------------------------------------------------------


class BlockStream:
    """Frozen blocks of `model` (None: its `layers`) in RAM, one of them and the next on `device`.

    Every block's weights lie in one piece of (on CUDA: pinned) memory and are copied to one of two places on the
    device; nothing is ever copied back. On CUDA the next block is copied by a second stream while the present one
    computes. All else of the model is moved to `device` for good. Between uses a block's parameters are its tensors in
    RAM, so the model can be read and saved as usual.

    Raises:
        ErnieError: a block has parameters that train.
    """

    def __init__(self, model: nn.Module, device: torch.device | str, blocks: Iterable[nn.Module] | None = None):
        self.device = torch.device(device)
        blocks = cast(nn.ModuleList, model.layers) if blocks is None else blocks
        self._tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        if any(tensor.requires_grad for tensors in self._tensors for tensor in tensors):
            raise ErnieError("only frozen blocks can be streamed; freeze the base (requires_grad_(False)) first.")
        pinned = self.device.type == "cuda"
        self._host = [_gather(tensors, pinned=pinned) for tensors in self._tensors]
        streamed = {id(tensor) for tensors in self._tensors for tensor in tensors}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in streamed:
                tensor.data = tensor.data.to(self.device)
        largest = max(host.numel() for host in self._host)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._held: list[int | None] = [None, None]
        """The block in each slot."""
        self._used = 0
        """The slot of the block that ran last."""
        self._copies = torch.cuda.Stream(self.device) if pinned else None
        self._arrived = [torch.cuda.Event() for _ in range(2)] if pinned else []

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def resident_bytes(self) -> int:
        """Bytes of block weights on the device, always: two of the largest block."""
        return sum(slot.numel() for slot in self._slots)

    def following(self, index: int, skipped: Collection[int], *, trains: bool, backward: bool) -> int | None:
        """The block that will probably be wanted after `index`; a wrong guess costs time only."""
        order = [i for i in range(len(self)) if i not in skipped]
        place = order.index(index) + (-1 if backward else 1)
        if 0 <= place < len(order):
            return order[place]
        # After the last block of a forward pass comes backward, or another forward pass.
        return None if backward or trains else order[0]

    @contextmanager
    def block(self, index: int, *, then: int | None = None) -> Iterator[None]:
        """Give block `index` its weights on the device for the time of the context; begin to bring block `then`."""
        if index not in self._held:
            self._bring(index, 1 - self._used)
        self._used = slot = self._held.index(index)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])
        if then is not None and then not in self._held:
            self._bring(then, 1 - slot)
        tensors = self._tensors[index]
        home = [tensor.data for tensor in tensors]
        for tensor, data in zip(tensors, _scatter(self._slots[slot], tensors), strict=True):
            tensor.data = data
        try:
            yield
        finally:
            for tensor, data in zip(tensors, home, strict=True):
                tensor.data = data

    def _bring(self, index: int, slot: int) -> None:
        self._held[slot] = index
        target = self._slots[slot][: self._host[index].numel()]
        if self._copies is None:
            target.copy_(self._host[index])
            return
        # All that has been asked of the block that was here must be done before it is written over.
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            target.copy_(self._host[index], non_blocking=True)
            self._arrived[slot].record()


def _offsets(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor starts in a flat piece of memory, and the bytes of all."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of `flat` with the shapes and dtypes of `tensors`."""
    return [
        flat[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
        for start, like in zip(_offsets(tensors)[0], tensors, strict=True)
    ]


def _gather(tensors: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """All `tensors` in one flat piece of RAM, of which they become views."""
    flat = torch.empty(_offsets(tensors)[1], dtype=torch.uint8, pin_memory=pinned)
    for tensor, view in zip(tensors, _scatter(flat, tensors), strict=True):
        view.copy_(tensor.data)
        tensor.data = view
    return flat
