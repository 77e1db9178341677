"""What to load on this machine, and what it will take: card, main memory and the headers of the files at hand.

Memory of a stage = bytes of the weights, from the file's header, plus activations by the formulas below. Speeds are
never predicted, only quoted (adviser_rules.py). Nothing is loaded and no tensor is read. GB = 10^9 bytes.

Formulas: a block of the transformer holds about 15 tensors of [tokens, width] in bf16 at its peak (counted on the meta
device), tokens = width/16 * height/16 + text; a prefix of the language models keeps keys and values of all layers; the
decoder of the VAE peaks at 11.2 tensors of [height, width, channels of its last level] (2.8 GiB at 1024 x 1024, 10.3
GiB at 2048 x 2048 for the FLUX.2 VAE: data-archetype/capacitor_decoder, model card). 0.7 GB for CUDA's context and
kernels on cards. Of a card's memory 1 GB is left to the system.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from .adviser_rules import FORMATS, PUBLISHED_BYTES, PUBLISHED_SOURCE, VERDICTS, Format, Rule, rule_for
from .config import MAX_TEXT_TOKENS, DiTConfig, VAEConfig, check_size
from .errors import ErnieError
from .weights.inventory import Found
from .weights.layouts import Kind

Vendor = Literal["nvidia", "amd", "apple", "intel", "cpu"]
GB = 1e9
FP32_GENERATIONS = ("cpu", "turing", "volta", "older")  # no bf16 units, or none that can be counted on
LEFT_TO_SYSTEM_GB = 1.0
CONTEXT_GB = 0.7
BLOCK_TENSORS = 15
DECODER_TENSORS = 11.2
TILE_PX = 512
ENHANCER_TOKENS = 2048  # of the answer, at most
STAGES: dict[Kind, str] = {
    "enhancer": "enhance the prompt",
    "text_encoder": "encode the prompt",
    "transformer": "sample",
    "vae": "decode",
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What counts of a computer."""

    vendor: Vendor
    name: str
    generation: str
    """turing, ampere, ada, hopper, blackwell, volta, older; rdna1 to rdna4, cdna, amd; apple; arc; cpu."""
    card_gb: float
    """Memory of the card; of an Apple machine the memory that it shares; 0 without a card."""
    ram_gb: float
    disk_free_gb: float | None = None
    system: str = ""
    cuda: tuple[int, ...] | None = None
    """CUDA's version that PyTorch was built for."""

    @property
    def usable_gb(self) -> float:
        """What weights and activations may take on the device."""
        if self.vendor == "cpu":
            return max(0.0, self.ram_gb - 2 * LEFT_TO_SYSTEM_GB)
        return max(0.0, self.card_gb - LEFT_TO_SYSTEM_GB)


def nvidia_generation(capability: tuple[int, int]) -> str:
    """The generation of a compute capability (CUDA programming guide)."""
    major, minor = capability
    if major >= 10:
        return "blackwell"
    names = {(9, None): "hopper", (8, 9): "ada", (8, None): "ampere", (7, 5): "turing", (7, None): "volta"}
    return names.get((major, minor)) or names.get((major, None)) or "older"


def amd_generation(architecture: str) -> str:
    """The generation of a gfx name such as gfx1100 (LLVM AMDGPU usage)."""
    name = architecture.split(":")[0]
    for start, generation in (("gfx12", "rdna4"), ("gfx11", "rdna3"), ("gfx103", "rdna2"), ("gfx101", "rdna1")):
        if name.startswith(start):
            return generation
    return "cdna" if name.startswith(("gfx908", "gfx90a", "gfx94", "gfx95")) else "amd"


# Cards to ask about without having them: makers' memory sizes; the rest of the machine stays as it is.
CARDS: dict[str, tuple[Vendor, str, float]] = {
    "RTX 5090 32 GB": ("nvidia", "blackwell", 32),
    "RTX 5070 Ti 16 GB": ("nvidia", "blackwell", 16),
    "RTX 4090 24 GB": ("nvidia", "ada", 24),
    "RTX 4060 8 GB": ("nvidia", "ada", 8),
    "RTX 3090 24 GB": ("nvidia", "ampere", 24),
    "RTX 3060 12 GB": ("nvidia", "ampere", 12),
    "RTX 2080 Ti 11 GB": ("nvidia", "turing", 11),
    "RX 9070 XT 16 GB": ("amd", "rdna4", 16),
    "RX 7900 XTX 24 GB": ("amd", "rdna3", 24),
    "Arc A770 16 GB": ("intel", "arc", 16),
}


def with_card(machine: Machine, card: str) -> Machine:
    """The machine with another card of `CARDS` in it. Raises ErnieError: an unknown name."""
    if card not in CARDS:
        raise ErnieError(f"card must be one of {', '.join(CARDS)}; got {card!r}.")
    vendor, generation, size = CARDS[card]
    return replace(machine, vendor=vendor, name=card, generation=generation, card_gb=float(size), cuda=None)


def read_machine(folder: Path | None = None) -> Machine:
    """This machine: the first card that PyTorch sees, main memory, and the free disk space of `folder`."""
    import torch

    disk = shutil.disk_usage(folder).free / GB if folder is not None and folder.exists() else None
    common = {"ram_gb": read_ram() / GB, "disk_free_gb": disk, "system": platform.system()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        amd = torch.version.hip is not None
        generation = amd_generation(card.gcnArchName) if amd else nvidia_generation((card.major, card.minor))
        built = None if amd or not torch.version.cuda else tuple(int(n) for n in torch.version.cuda.split("."))
        vendor: Vendor = "amd" if amd else "nvidia"
        return Machine(
            vendor=vendor,
            name=card.name,
            generation=generation,
            card_gb=card.total_memory / GB,
            cuda=built,
            **common,
        )
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        card = torch.xpu.get_device_properties(0)
        return Machine(vendor="intel", name=card.name, generation="arc", card_gb=card.total_memory / GB, **common)
    if torch.backends.mps.is_available():
        name = f"Apple {platform.machine()}"
        return Machine(vendor="apple", name=name, generation="apple", card_gb=common["ram_gb"], **common)
    return Machine(vendor="cpu", name=platform.processor() or "CPU", generation="cpu", card_gb=0.0, **common)


def read_ram() -> int:
    """Bytes of main memory; of the container's limit where that is less. Raises ErnieError where nothing tells."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()))
    if not found:
        try:
            import psutil
        except ImportError as e:
            raise ErnieError("the size of main memory cannot be read here; pip install psutil.") from e
        found.append(psutil.virtual_memory().total)
    return min(found)


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one stage takes on the device, in GB."""

    weights: float
    activations: float
    tiled: bool = False
    """Whether the VAE decodes in tiles."""

    @property
    def total(self) -> float:
        return self.weights + self.activations


def stage_need(
    found: Found, width: int, height: int, *, text_tokens: int, tiled: bool = False, number_bytes: int = 2
) -> Need:
    """Weights as stored, and activations at this picture size in numbers of so many bytes, without CUDA's context."""
    weights = found.bytes / GB
    if found.kind == "vae":
        config = VAEConfig.from_state_dict(_Shapes(found.shapes))
        pixels = min(width, TILE_PX) * min(height, TILE_PX) if tiled else width * height
        return Need(
            weights=weights,
            activations=DECODER_TENSORS * pixels * config.decoder_widths[0] * number_bytes / GB,
            tiled=tiled,
        )
    if found.kind == "transformer":
        config = DiTConfig.from_state_dict(_Shapes(found.shapes))
        tokens = (width // 16) * (height // 16) + text_tokens
        return Need(weights=weights, activations=BLOCK_TENSORS * tokens * config.hidden_size * number_bytes / GB)
    keys = [shape for name, shape in found.shapes.items() if name.endswith("self_attn.k_proj.weight")]
    tokens = text_tokens + (ENHANCER_TOKENS if found.kind == "enhancer" else 0)
    kept = sum(2 * shape[0] * number_bytes for shape in keys) if found.kind == "enhancer" else 0
    hidden = found.shapes["norm.weight"][0] if "norm.weight" in found.shapes else keys[0][1]
    return Need(weights=weights, activations=(kept * tokens + BLOCK_TENSORS * text_tokens * hidden * number_bytes) / GB)


class _Shapes(dict[str, "_Shape"]):
    """Shapes where a state dict is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__({name: _Shape(shape) for name, shape in shapes.items()})


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


# --- advice ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A file with what is known and computed about it on the machine."""

    found: Found
    rule: Rule
    need: Need
    fits: bool
    """Whether the whole stage fits on the device."""
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the adviser has to say."""

    machine: Machine
    size: tuple[int, int]
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...] = ()
    """Files that could not be read, and why."""

    def table(self) -> str:
        """All files as Markdown: what each would take and what is known about its numbers on this card."""
        lines = [
            "| stage | file | numbers | weights GB | at work GB | on the device | verdict | why | source |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for c in self.choices:
            mark = "**" if c.chosen else ""
            held = "whole" if c.fits else "in part, streamed"
            held += ", tiled" if c.need.tiled else ""
            lines.append(
                f"| {STAGES[c.found.kind]} | {mark}{c.found.name}{mark} | {c.found.format} | {c.need.weights:.2f} | "
                f"{c.need.total:.2f} | {held} | {' | '.join(_reasons(c))} |"
            )
        return "\n".join(lines)

    def report(self) -> str:
        """What to load, why and what it takes, then the warnings."""
        m = self.machine
        card = f"{m.name}, {m.generation}, {m.card_gb:.1f} GB" if m.vendor != "cpu" else f"no card ({m.name})"
        disk = "" if m.disk_free_gb is None else f", {m.disk_free_gb:.0f} GB of disk free"
        lines = [f"{card}; {m.ram_gb:.1f} GB of main memory{disk}", f"{self.size[0]} x {self.size[1]} pixels:"]
        for c in (c for c in self.choices if c.chosen):
            place = "fits" if c.fits else f"does not fit {m.usable_gb:.1f} GB: streamed from main memory in part"
            tiles = ", VAEDecodeTiled" if c.need.tiled else ""
            _, why, source = _reasons(c)
            lines.append(
                f"- {STAGES[c.found.kind]}: {c.found.name} ({c.found.format}), {c.need.weights:.2f} GB of weights, "
                f"{c.need.total:.2f} GB at work, {place}{tiles}."
                + (f" Numbers: {why} [{source}]" if why != "-" else "")
            )
        if not any(c.chosen for c in self.choices):
            lines.append("- no file of ERNIE-Image was found")
        lines += [f"Warning: {warning}" for warning in self.warnings]
        lines += [f"Not read: {problem}" for problem in self.problems]
        return "\n".join(lines)


def _reasons(choice: Choice) -> tuple[str, str, str]:
    """Verdict, why and source; figures of speed are the transformer's and say nothing of other networks."""
    rule = choice.rule
    if choice.found.kind == "transformer" or rule.verdict == "avoid":
        return rule.verdict, rule.why, rule.source
    return "works", "-", "-"


def advise(
    machine: Machine,
    files: Sequence[Found],
    width: int,
    height: int,
    *,
    text_tokens: int = 256,
    problems: Iterable[str] = (),
) -> Advice:
    """What to load of `files` on `machine` for pictures of this size.

    Of each network (base and Turbo are two) the file is chosen whose numbers are worth most on the card; one that does
    not fit whole loses two steps, and of equals the smaller one is taken.

    Raises:
        ErnieError: a size that is no multiple of 16, or text_tokens outside 1 to 2048.
    """
    check_size(width, height)
    if not 1 <= text_tokens <= MAX_TEXT_TOKENS:
        raise ErnieError(f"text_tokens must be 1 to {MAX_TEXT_TOKENS}, got {text_tokens}.")
    choices = [_weigh(machine, found, width, height, text_tokens) for found in files]
    best: dict[tuple[Kind, bool], Choice] = {}
    for choice in sorted(choices, key=_rank):
        best.setdefault((choice.found.kind, choice.found.kind == "transformer" and choice.found.turbo), choice)
    order = list(STAGES)
    marked = [replace(c, chosen=any(c is taken for taken in best.values())) for c in choices]
    marked.sort(key=lambda c: (order.index(c.found.kind), not c.chosen, c.found.name))
    return Advice(
        machine=machine,
        size=(width, height),
        choices=tuple(marked),
        warnings=tuple(_warnings(machine, [c for c in marked if c.chosen])),
        problems=tuple(problems),
    )


def _weigh(machine: Machine, found: Found, width: int, height: int, text_tokens: int) -> Choice:
    rule = rule_for(machine.generation, cast(Format, found.format))
    context = CONTEXT_GB if machine.vendor != "cpu" else 0.0
    number_bytes = 4 if machine.generation in FP32_GENERATIONS else 2
    need = stage_need(found, width, height, text_tokens=text_tokens, number_bytes=number_bytes)
    if found.kind == "vae" and need.total + context > machine.usable_gb:
        need = stage_need(found, width, height, text_tokens=text_tokens, tiled=True, number_bytes=number_bytes)
    return Choice(found=found, rule=rule, need=need, fits=need.total + context <= machine.usable_gb)


def _rank(choice: Choice) -> tuple[int, int, int]:
    """Lower is better. Only the transformer's speed matters; of the others the most exact file that fits is taken."""
    place, order = 0 if choice.fits else 2, FORMATS.index(cast(Format, choice.found.format))
    if choice.found.kind == "transformer":
        return VERDICTS.index(choice.rule.verdict) + place, choice.found.bytes, order
    return 4 * (choice.rule.verdict == "avoid") + place + (choice.found.format not in ("bf16", "fp32")), 0, order


def _warnings(machine: Machine, chosen: Sequence[Choice]) -> Iterable[str]:
    for c in chosen:
        name, numbers = c.found.name, c.found.format
        verdict, why, source = _reasons(c)
        if verdict in ("avoid", "slow"):
            yield f"{name} is {numbers}: {why} [{source}]."
        if numbers in ("nvfp4", "int8") and machine.cuda is not None and machine.cuda < (13,):
            built = ".".join(map(str, machine.cuda))
            yield (
                f"{name} is {numbers} and this PyTorch is built for CUDA {built}; 13 is needed for ComfyUI's fast "
                "products [ComfyUI #14824]."
            )
        if c.found.kind == "transformer":
            yield from _better(machine, c)
    if machine.generation in FP32_GENERATIONS and machine.vendor != "cpu" and chosen:
        yield "this card has no bf16 units and the model does not hold in fp16: products are in fp32, and slow."
    if not chosen:
        return
    every, largest = (f(c.need.weights for c in chosen) for f in (sum, max))
    if machine.vendor == "cpu":
        return
    if machine.ram_gb < largest + LEFT_TO_SYSTEM_GB:
        yield (
            f"main memory ({machine.ram_gb:.1f} GB) is smaller than the largest file ({largest:.1f} GB) with what the "
            "system needs: it will swap, or the program is ended. Take a smaller file."
        )
    elif machine.ram_gb < every + LEFT_TO_SYSTEM_GB:
        yield (
            f"main memory ({machine.ram_gb:.1f} GB) does not hold all files at once ({every:.1f} GB): they are read "
            "from disk again whenever the stage changes."
        )


def _better(machine: Machine, chosen: Choice) -> Iterable[str]:
    """Published numbers of the same network that this card would do better with."""
    if not chosen.found.bytes > 0.2 * PUBLISHED_BYTES["nvfp4"]:
        return  # not a released network: there are no other files of it
    context = CONTEXT_GB if machine.vendor != "cpu" else 0.0
    for other, size in PUBLISHED_BYTES.items():
        rule = rule_for(machine.generation, other)
        fits = size / GB + chosen.need.activations + context <= machine.usable_gb
        rank = VERDICTS.index(rule.verdict) + (0 if fits else 2)
        if rank < _rank(chosen)[0] and rule.verdict in ("best", "good"):
            yield (
                f"a file in {other} ({size / GB:.1f} GB) would do better here than {chosen.found.name}: {rule.why} "
                f"[{rule.source}; sizes: {PUBLISHED_SOURCE}]."
            )
            return
