"""One training step of a LoRA against a plain diffusers + peft loop: time, peak memory, and what a block keeps.

A step is the forward pass, the velocity error and the backward pass; the optimiser is the same for both and left out.
The peer is written as diffusers' own LoRA scripts are: `add_adapter`, fp32 factors, autocast where the base is bf16,
`enable_gradient_checkpointing`. On a GPU the same at full size with random weights, and the memory of a whole step,
AdamW included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ernie_core.config import SIZE_MULTIPLE, DiTConfig
from ..ernie_core.model.attention import attention
from ..ernie_core.model.dit import Block, DiT
from ..ernie_core.training.adapters import BLOCK_LINEARS, Adapter, AdapterConfig, Views, find_linears
from ..ernie_core.training.blocks import BlockStream, run_blocks
from ..ernie_core.training.objectives import sft_loss
from ..ernie_core.weights.quantise import QuantisedLinear, quantise_rows
from .compare import Row, compare, cpu_dtype, cuda_seconds, process_seconds
from .dit import REDUCED
from .inputs import forward_inputs
from .pairs import make_dit_pair, randomise

RANK = 16
TARGET_UNITS = 30
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, where and how; the defaults are the CPU's."""

    dit: DiTConfig = REDUCED
    device: str = "cpu"
    dtype: torch.dtype = field(default_factory=lambda: cpu_dtype()[0])
    px: int = 512
    batch: int = 1
    text_tokens: int = 77
    rounds: int = 15
    seconds: Callable[[Callable[[], Any]], float] = process_seconds

    def inputs(self) -> tuple[Any, Tensor]:
        """The inputs of a forward pass and the target velocity."""
        given = forward_inputs(
            self.dit,
            side=self.px // SIZE_MULTIPLE,
            text_lengths=[self.text_tokens] * self.batch,
            dtype=self.dtype,
            device=self.device,
        )
        target = torch.randn(given.ours[0].shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        return given, target


Step = Callable[[], Tensor]


def our_step(model: DiT, bench: Bench, *, checkpoint: bool, stream: BlockStream | None = None) -> tuple[Step, Adapter]:
    """A step that returns its loss and leaves gradients in the adapter."""
    adapter = Adapter(model, AdapterConfig(rank=RANK), seed=0, device=bench.device)
    views = Views(model)
    views.add("policy", adapter)
    given, target = bench.inputs()
    run_block = run_blocks(checkpoint=checkpoint, stream=stream)

    def step() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), views.active("policy"):
            adapter.zero_grad()
            loss = sft_loss(model(*given.ours, run_block=run_block), target).mean()
            loss.backward()
        return loss.detach()

    return step, adapter


def peer_step(model: Any, bench: Bench, *, checkpoint: bool) -> Step:
    """The same step by diffusers and peft."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    if not getattr(model, "peft_config", None):
        targets = r"layers\.\d+\.(" + "|".join(BLOCK_LINEARS).replace(".", r"\.") + ")"
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        cast_training_params(model, dtype=torch.float32)
    model.train()
    if checkpoint:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()
    given, target = bench.inputs()
    factors = [p for p in model.parameters() if p.requires_grad]
    mixed = bench.dtype is torch.bfloat16

    def step() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            for p in factors:
                p.grad = None
            with torch.autocast(torch.device(bench.device).type, torch.bfloat16, enabled=mixed):
                velocity = model(*given.peer, return_dict=False)[0]
            loss = F.mse_loss(velocity.float(), target.float())
            loss.backward()
        return loss.detach()

    return step


# --- what is kept -------------------------------------------------------------------------------------------


def kept_bytes(forward: Callable[[], Tensor], constant: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that `forward` saves for its backward pass, without those of `constant`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in constant}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out  # the graph must live until all is counted, or storages would be used twice
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside: those alive now, and the most at any time. `constant` ones do not count."""

    def __init__(self, constant: Iterable[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in constant}
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class _OneBlock(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList([block])


def block_units(*, tokens: int = 512, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[float, float]:
    """U kept per block of (ours, diffusers + peft) at full width; the count per token hardly depends on `tokens`."""
    from diffusers.models.transformers.transformer_ernie_image import ErnieImageSharedAdaLNBlock
    from peft import LoraConfig, inject_adapter_in_model

    config = DiTConfig()
    unit = tokens * config.hidden_size * dtype.itemsize
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    block = Block(config, nn, dtype=dtype, device=device).requires_grad_(False)
    randomise(block)
    holder = _OneBlock(block)
    adapter = Adapter(holder, AdapterConfig(rank=RANK), seed=0)
    views = Views(holder)
    views.add("policy", adapter)
    x, table = draw(1, tokens, config.hidden_size).requires_grad_(), draw(1, tokens, 1, config.head_dim)
    modulation: Any = tuple(draw(1, 1, config.hidden_size) for _ in range(6))
    run_block = run_blocks(checkpoint=False)
    with views.active("policy"):
        ours = kept_bytes(
            lambda: run_block(0, block, x, modulation, (table, table), None, attention),
            [*block.parameters(), *adapter.parameters(), table, *modulation],
        )
    views.close()

    with torch.device("meta"):
        peer = ErnieImageSharedAdaLNBlock(config.hidden_size, config.num_attention_heads, config.ffn_hidden_size)
    peer = peer.to(dtype).to_empty(device=device).requires_grad_(False)
    peer.load_state_dict(block.state_dict(), assign=True)
    targets = [name.split(".")[-1] if name[-1] != "0" else "to_out.0" for name in BLOCK_LINEARS]
    peer = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), peer)
    for name, p in peer.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    angles = draw(1, tokens, 1, config.head_dim, dtype=torch.float32)
    x_SBD = draw(tokens, 1, config.hidden_size).requires_grad_()
    # As its transformer hands it: expanded over the tokens and made contiguous, one set for all blocks.
    temb = [draw(tokens, 1, config.hidden_size) for _ in range(6)]
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
        theirs = kept_bytes(lambda: peer(x_SBD, angles, temb, mask), [*peer.parameters(), angles, mask, *temb])
    return ours / unit, theirs / unit


def units_row(*, dtype: torch.dtype = torch.bfloat16, tokens: int = 512, device: str = "cpu") -> Row:
    ours, theirs = block_units(dtype=dtype, tokens=tokens, device=device)
    return Row(
        name=f"kept for backward per block, full width, LoRA r{RANK}, {str(dtype).removeprefix('torch.')} ({device})",
        ours=f"{ours:.1f} U",
        peer_name="diffusers + peft",
        peer=f"{theirs:.1f} U",
        ratios=(theirs / ours,),
        target=f"<= {TARGET_UNITS} U",
        met=ours <= TARGET_UNITS,
    )


# --- steps --------------------------------------------------------------------------------------------------


def _words(bench: Bench, *, checkpoint: bool) -> str:
    kind = str(bench.dtype).removeprefix("torch.")
    return f"{bench.px} px B={bench.batch}, {kind}, {'checkpointed' if checkpoint else 'all kept'}"


def step_row(ours: DiT, theirs: Any, bench: Bench, *, checkpoint: bool, name: str, **targets: Any) -> Row:
    """The time of a step against the peer's."""
    return compare(
        f"{name}, {_words(bench, checkpoint=checkpoint)}",
        ours=our_step(ours, bench, checkpoint=checkpoint)[0],
        peer=peer_step(theirs, bench, checkpoint=checkpoint),
        peer_name="diffusers + peft",
        rounds=bench.rounds,
        seconds=bench.seconds,
        **targets,
    )


def peak_row(ours: DiT, theirs: Any, bench: Bench, *, checkpoint: bool) -> Row:
    """The most that a step's tensors take at any time, weights and factors aside."""
    step, adapter = our_step(ours, bench, checkpoint=checkpoint)
    peaks = []
    for run, modules in ((step, (ours, adapter)), (peer_step(theirs, bench, checkpoint=checkpoint), (theirs,))):
        with PeakMemory(t for m in modules for t in (*m.parameters(), *m.buffers())) as memory:
            run()
        peaks.append(memory.peak)
    return Row(
        name=f"peak of a step's own tensors, {_words(bench, checkpoint=checkpoint)}",
        ours=f"{peaks[0] / 1e6:.1f} MB",
        peer_name="diffusers + peft",
        peer=f"{peaks[1] / 1e6:.1f} MB",
        ratios=(peaks[1] / peaks[0],),
        target="less",
        met=peaks[0] < peaks[1],
    )


def cpu_rows() -> Iterator[Row]:
    """A reduced model: fp32, and bf16 where this CPU multiplies in it."""
    yield units_row()
    yield units_row(dtype=torch.float32)
    for dtype in sorted({torch.float32, cpu_dtype()[0]}, key=str):
        bench = Bench(dtype=dtype)
        pair = make_dit_pair(bench.dit, dtype=dtype)
        torch.set_flush_denormal(True)  # as in training; after diffusers' imports, of which numpy's warns about it
        for checkpoint in (True, False):
            yield step_row(*pair, bench, checkpoint=checkpoint, name=f"LoRA r{RANK} step, width 1024", at_least=1.15)
            yield peak_row(*pair, bench, checkpoint=checkpoint)


# --- full size on a GPU -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """A limit on the GPU memory of a training step (10^9 bytes, torch's peak of allocated memory)."""

    px: int
    gigabytes: float
    int8: bool = False
    stream: bool = False


CEILINGS = (
    Ceiling(px=512, gigabytes=18.0),
    Ceiling(px=1024, gigabytes=20.0),
    Ceiling(px=512, gigabytes=10.3, int8=True),
    Ceiling(px=1024, gigabytes=12.2, int8=True),
    Ceiling(px=512, gigabytes=7.5, stream=True),
)


def quantise_blocks(model: DiT) -> None:
    """Put the blocks' matrices into 8 bits, as `load_base` does when it reads a file."""
    for path, linear in find_linears(model, AdapterConfig().targets).items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantisedLinear(*quantise_rows(linear.weight, "int8")))


def memory_row(bench: Bench, ceiling: Ceiling) -> Row:
    """Two whole steps with AdamW on random weights; the peak of the second includes the optimiser's state."""
    model = DiT(bench.dit, dtype=bench.dtype, device="cpu" if ceiling.stream else bench.device)
    model.eval().requires_grad_(False)
    randomise(model)
    if ceiling.int8:
        quantise_blocks(model)
    stream = BlockStream(model, bench.device) if ceiling.stream else None
    step, adapter = our_step(model, bench, checkpoint=True, stream=stream)
    optimiser = torch.optim.AdamW(adapter.parameters(), fused=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step()
        optimiser.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / GB
    base = "bf16 base, streamed" if ceiling.stream else "int8 base" if ceiling.int8 else "bf16 base"
    return Row(
        name=f"memory of a LoRA r{RANK} step with AdamW, {base}, {_words(bench, checkpoint=True)}",
        ours=f"{peak:.2f} GB",
        target=f"<= {ceiling.gigabytes:g} GB",
        met=peak <= ceiling.gigabytes,
    )


def gpu_rows() -> Iterator[Row]:
    """H12 and the training ceilings, for an H200; on another card read the ratios and the memory."""
    place: dict[str, Any] = {"dit": DiTConfig(), "device": "cuda", "dtype": torch.bfloat16, "text_tokens": 256}
    yield units_row(tokens=4352, device="cuda")
    for ceiling in CEILINGS:
        yield memory_row(Bench(px=ceiling.px, **place), ceiling)
        torch.cuda.empty_cache()
    pair = make_dit_pair(DiTConfig(), dtype=torch.bfloat16, device="cuda")
    for px, batch in ((1024, 1), (512, 4)):
        bench = Bench(px=px, batch=batch, seconds=cuda_seconds, **place)
        yield step_row(*pair, bench, checkpoint=True, name=f"H12 LoRA r{RANK} step", at_least=1.3, at_most_ms=460)


def measure() -> Iterator[Row]:
    yield from cpu_rows()
    if torch.cuda.is_available():
        yield from gpu_rows()
    else:
        yield Row(
            name="LoRA step at full size (H12, memory)", ours="needs CUDA", target="see bench/RESULTS.md", met=None
        )
