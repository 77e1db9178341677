"""What the data looks like and what a run on it will cost, before it starts: text, numbers and pictures.

Memory is estimated with the formulas of the reference notes (checked there against published tables): the base in its
precision, 4 bytes per adapter weight for the master copy, 4 for its gradient and 2 for the cast, the optimiser's state,
and activations counted in units U of one block's boundary [tokens, width]: one U per block where blocks are recomputed
and 40 U for the block at work, else 30 U per block. Time is not estimated but measured on real steps, and scaled to the
other sizes by their floating-point operations.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ..config import MAX_TEXT_TOKENS, SIZE_MULTIPLE, DiTConfig
from ..errors import ErnieError
from ..model.dit import DiT
from ..model.text_encoder import Tokenizer
from ..weights.checkpoint import build_tokenizer, read_component
from .adapters import AdapterConfig, find_linears, split_size
from .buckets import BatchPlan, Entry, Picture, place_pictures
from .captions import all_texts
from .items import Dataset, Item, OnProgress
from .pairs import Pairs
from .pictures import load_image, near_duplicates
from .prompts import Prompts
from .recipe import OptimiserConfig, OptimiserName, Precision, Recipe

GB = 10**9
TOKEN_LIMITS = (256, 512, MAX_TEXT_TOKENS)
"""Beyond 256, bf16 positions go wrong in some trainers; 512 is what others cut at; beyond 2048 we cut."""
PROBE_TEXT_TOKENS = 256
_CONTEXT_BYTES = 0.5 * GB  # CUDA context and workspaces
_LIVE_UNITS, _KEPT_UNITS = 40, 30
_CHARACTERS_PER_TOKEN = 4.5  # of English captions; only where no tokenizer is at hand
_STATE_BYTES: dict[OptimiserName, float] = {"adamw": 8, "adamw8bit": 2.1, "prodigy": 16, "adafactor": 0.1}
_SHOWN = 10
_PAPER, _INK, _BAR, _CUT = (255, 255, 255), (40, 40, 46), (38, 92, 196), (206, 84, 30)


class Cost(Protocol):
    """What a probe measured of one optimiser step (batch_size x accumulation samples of one size)."""

    @property
    def seconds(self) -> tuple[float, ...]: ...
    @property
    def peak_bytes(self) -> int | None: ...


Probe = Callable[[tuple[int, int]], Cost]
"""(width, height) in pixels -> the cost of steps at that size with PROBE_TEXT_TOKENS of text."""


# --- cost ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a step holds on the device."""

    base: float
    adapter: float
    """Master weights, gradients, casts, optimiser state and the averaged copy."""
    activations: float

    @property
    def total(self) -> float:
        """With the 0.5 GB that a CUDA context takes."""
        return self.base + self.adapter + self.activations + _CONTEXT_BYTES


@lru_cache(maxsize=8)
def num_weights(config: DiTConfig) -> int:
    """All weights of the transformer."""
    return sum(p.numel() for p in DiT(config, device="meta").parameters())


def num_linear_weights(config: DiTConfig) -> int:
    """Weights of the seven matrices of all blocks."""
    return config.num_layers * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_hidden_size)


def num_adapter_weights(model: nn.Module, config: AdapterConfig) -> int:
    """Trainable weights of an adapter on `model`, which may be on the meta device."""
    total = 0
    for linear in find_linears(model, config.targets, config.exclude).values():
        rows, columns = linear.out_features, linear.in_features
        if config.algorithm == "lokr":
            (out1, out2), (in1, in2) = split_size(rows, config.factor), split_size(columns, config.factor)
            thin = config.rank < min(out2, in2) / 2
            total += out1 * in1 + (config.rank * (out2 + in2) if thin else out2 * in2)
        else:
            total += config.rank * (rows + columns) + (rows if config.algorithm == "dora" else 0)
    return total


def estimate_memory(
    config: DiTConfig,
    *,
    precision: Precision,
    num_trainable: int,
    tokens: int,
    sequences: int,
    optimiser: OptimiserConfig | None = None,
    checkpointing: bool = True,
    stream: bool = False,
) -> Memory:
    """Bytes of a training step.

    Args:
        config: of the transformer.
        precision: of the frozen base; "stored" counts as bf16, the most it can be.
        num_trainable: adapter weights.
        tokens: image and text tokens of one sequence.
        sequences: that go through the model with gradients at once: samples, or two per pair.
        optimiser: for its state; None = AdamW.
        checkpointing: whether blocks are recomputed in the backward pass.
        stream: whether only two blocks' weights are on the device at a time.
    """
    optimiser = optimiser or OptimiserConfig()
    total = num_weights(config)
    blocks = num_linear_weights(config)
    eight_bit = precision in ("fp8", "int8")
    width = 4 if precision == "fp32" else 2
    on_device = blocks * min(1.0, 2 / config.num_layers) if stream else blocks
    base = on_device * (1 if eight_bit else width) + (total - blocks) * width
    if eight_bit:  # the largest matrix, multiplied out for its call
        base += config.hidden_size * config.ffn_hidden_size * width
    each = 4 + 4 + 2 + _STATE_BYTES[optimiser.name] + (4 if optimiser.ema else 0)
    unit = tokens * config.hidden_size * width * sequences
    units = config.num_layers + _LIVE_UNITS if checkpointing else config.num_layers * _KEPT_UNITS
    return Memory(base=base, adapter=num_trainable * each, activations=unit * units)


def step_flops(config: DiTConfig, *, tokens: int, checkpointing: bool = True) -> float:
    """Floating-point operations of forward and backward for one sequence: no gradients of frozen weights.

    Linear layers run once forward, once backward, and once more when recomputed; attention's backward is 2.5 of its
    forward.
    """
    linear = 2 * num_linear_weights(config) * tokens
    attention = 4 * tokens**2 * config.hidden_size * config.num_layers
    return (3 * linear + 4.5 * attention) if checkpointing else (2 * linear + 3.5 * attention)


# --- report -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One stage of the curriculum."""

    first_step: int
    last_step: int
    """The step after its last one."""
    buckets: dict[tuple[int, int], int]
    """(width, height) -> samples per epoch."""
    samples_per_epoch: int
    batches_per_epoch: int
    partial_batches: int
    """Of an epoch: with fewer samples than batch size x processes."""
    epochs: float
    """Expected ones where the data is drawn from by a sampling plan."""
    flops: float
    """Floating-point operations of all its steps, over all processes."""
    seconds: float | None
    """All its steps; None where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found. `text` says it all; the rest is for code."""

    text: str
    """Markdown."""
    pictures: dict[str, np.ndarray]
    """Named buckets, crops and tokens: uint8 [H, 900, 3]."""
    stages: tuple[StageFacts, ...]
    crops: tuple[Picture, ...]
    """By the share that is cut off, most first; only what loses more than 1 %."""
    upscaled: tuple[Picture, ...]
    """Enlarged, most first."""
    small: tuple[Picture, ...]
    """Trained smaller than asked because enlarging is limited, smallest first."""
    tokens: dict[str, int]
    """Text -> tokens, BOS included."""
    tokens_counted: bool
    """False where the tokens are estimated from characters."""
    concepts: dict[str, float]
    """Samples per epoch; expected ones where the data is drawn from by a sampling plan."""
    duplicates: int
    near_duplicates: int
    cache_bytes: int
    memory: Memory
    """At the largest size."""
    cost: Cost | None
    seconds: float | None
    """The whole run; None where nothing was measured."""


def check(
    data: Dataset | Pairs | Prompts,
    recipe: Recipe | None = None,
    *,
    probe: Probe | None = None,
    world_size: int = 1,
    on_progress: OnProgress | None = None,
) -> Preflight:
    """Look at `data` as `recipe` would train it.

    Args:
        data: pictures, pairs or prompts.
        recipe: None = 1024 px, one picture at a time, the released model, tokens estimated.
        probe: measures steps at the largest size; None = no times.
        world_size: processes that will train.
        on_progress: called with (done, total, what); may raise to stop.

    Raises:
        ErnieError: the data is empty, or `probe` raised it (models that cannot be used, out of memory).
    """
    report = on_progress or _ignore
    pairs, pictures = isinstance(data, Pairs), not isinstance(data, Prompts)
    entries = data.pairs if isinstance(data, Pairs) else data.items
    report(0, 4, "planning batches")
    batch, accumulation = (recipe.batch_size, recipe.accumulation) if recipe else (1, 1)
    plan = BatchPlan(
        entries,
        data.options,
        stages=recipe.stages if recipe else (),
        batch_size=batch,
        accumulation=accumulation,
        world_size=world_size,
        seed=recipe.seed if recipe else 0,
    )
    config, tokenizer, model_notes = _read_models(recipe)

    report(1, 4, "counting tokens")
    texts = all_texts(entries, data.options)
    tokens = {text: _count_tokens(text, tokenizer) for text in texts}
    longest = max(tokens.values())

    report(2, 4, "looking for duplicates")
    items = _distinct_items(data)
    same = sum(count - 1 for count in Counter(item.sha256 for item in items).values())
    alike = _count_alike(items, data.options.near_duplicate_bits)

    largest = max((size for s in range(len(plan.stages)) for size in plan.bucket_counts(s)), key=math.prod)
    checkpointing = recipe.checkpointing if recipe else True
    adapter = recipe.adapter if recipe else AdapterConfig()
    memory = estimate_memory(
        config,
        precision=recipe.precision if recipe else "bf16",
        num_trainable=_num_trainable(recipe, adapter, config),
        tokens=_cells(largest) + longest,
        sequences=batch * _sequences(recipe, pairs=pairs),
        optimiser=recipe.optimiser if recipe else None,
        checkpointing=checkpointing,
        stream=recipe.stream if recipe else False,
    )
    report(3, 4, "measuring steps")
    cost = probe(largest) if probe is not None else None
    rate = None
    if cost is not None:
        flops = step_flops(config, tokens=_cells(largest) + PROBE_TEXT_TOKENS, checkpointing=checkpointing)
        rate = float(np.median(cost.seconds)) / (flops * batch * accumulation)
    mean_tokens = sum(tokens.values()) / len(tokens)
    stages = tuple(
        _stage_facts(plan, s, recipe.steps if recipe else None, config, mean_tokens, checkpointing, rate)
        for s in range(len(plan.stages))
    )
    placed = plan.pictures() if pictures else ()
    facts = Preflight(
        text="",
        pictures={},
        stages=stages,
        crops=_ranked((p for p in placed if p.fit.crop_loss > 0.01), lambda p: p.fit.crop_loss),
        upscaled=_ranked((p for p in placed if p.fit.scale > 1 + 1e-9), lambda p: p.fit.scale),
        small=_too_small(plan) if pictures else (),
        tokens=tokens,
        tokens_counted=tokenizer is not None,
        concepts=_concepts(entries),
        duplicates=same,
        near_duplicates=alike,
        cache_bytes=_cache_bytes(placed, tokens, config),
        memory=memory,
        cost=cost,
        seconds=None if rate is None else sum(stage.seconds or 0 for stage in stages),
    )
    drawn = {
        "buckets": draw_buckets(stages),
        "crops": draw_crops(facts.crops, data.options.matte),
        "tokens": draw_tokens(list(tokens.values())),
    }
    text = _write(facts, data, recipe, largest, model_notes)
    report(4, 4, "measuring steps")
    return Preflight(**{**vars(facts), "text": text, "pictures": drawn})


def _num_trainable(recipe: Recipe | None, adapter: AdapterConfig, config: DiTConfig) -> int:
    """Weights of the adapter, and of the fake score's beside it in a distillation."""
    model = DiT(config, device="meta")
    count = num_adapter_weights(model, adapter)
    if recipe is not None and recipe.objective == "distil":
        count += num_adapter_weights(model, replace(adapter, rank=recipe.distil.fake.rank or adapter.rank))
    return count


def _sequences(recipe: Recipe | None, *, pairs: bool) -> int:
    """Sequences of one sample that keep activations at once."""
    if recipe is not None and recipe.objective == "distil":
        return len(recipe.distil.grid()) - 1 if recipe.distil.gradient == "all" else 1
    return 2 if pairs else 1


def _ignore(done: int, total: int, what: str) -> None:
    del done, total, what


def _read_models(recipe: Recipe | None) -> tuple[DiTConfig, Tokenizer | None, list[str]]:
    """The transformer's sizes and the tokenizer, and what could not be read of them."""
    if recipe is None or not recipe.models.transformer:  # a recipe whose models are not chosen yet
        return DiTConfig(), None, []
    config, tokenizer, notes = DiTConfig(), None, []
    try:
        component = read_component(recipe.models.path("transformer"), "transformer")
        config = DiTConfig.from_dict(component.config)
    except ErnieError as e:
        notes.append(f"the transformer cannot be read, so memory is that of the released model: {e}")
    try:
        tokenizer = build_tokenizer(read_component(recipe.models.path("text_encoder"), "text_encoder"))
    except ErnieError as e:
        notes.append(f"the text encoder cannot be read, so tokens are estimated: {e}")
    return config, tokenizer, notes


def _count_tokens(text: str, tokenizer: Tokenizer | None) -> int:
    if tokenizer is not None:
        return len(tokenizer.encode(text, max_tokens=None))
    wide = sum(ord(c) > 0x2E7F for c in text)  # a Chinese or Japanese character is about one token
    return 1 + wide + math.ceil((len(text) - wide) / _CHARACTERS_PER_TOKEN)


def _distinct_items(data: Dataset | Pairs | Prompts) -> list[Item]:
    if not isinstance(data, Pairs):
        return list(data.items)
    found: dict[str, Item] = {}
    for pair in data.pairs:  # a picture in several pairs is no duplicate
        found |= {str(pair.chosen.image): pair.chosen, str(pair.rejected.image): pair.rejected}
    return list(found.values())


def _count_alike(items: Sequence[Item], bits: int) -> int:
    known = [item for item in items if item.perceptual_hash]
    if bits < 0:
        return 0
    found = near_duplicates([item.perceptual_hash for item in known], max_bits=bits)
    return sum(known[i].sha256 != known[j].sha256 for i, j in found)


def _cells(size: tuple[int, int]) -> int:
    return math.prod(size) // SIZE_MULTIPLE**2


def _stage_facts(
    plan: BatchPlan,
    stage: int,
    steps: int | None,
    config: DiTConfig,
    text_tokens: float,
    checkpointing: bool,
    rate: float | None,
) -> StageFacts:
    counts = plan.bucket_counts(stage)
    full = plan.batch_size * plan.world_size
    batches = plan.batches_per_epoch(stage)
    first = min(plan.first_step(stage), steps) if steps is not None else plan.first_step(stage)
    end = plan.stages[stage].until_step if stage + 1 < len(plan.stages) else steps
    last = first + math.ceil(batches / plan.accumulation) if end is None else max(first, min(end, steps or end))
    flops = sum(
        count * step_flops(config, tokens=round(_cells(size) + text_tokens), checkpointing=checkpointing)
        for size, count in counts.items()
    )
    num_batches = (last - first) * plan.accumulation
    return StageFacts(
        first_step=first,
        last_step=last,
        buckets=counts,
        samples_per_epoch=plan.samples_per_epoch(stage),
        batches_per_epoch=batches,
        partial_batches=0 if plan.is_drawn else sum(count % full > 0 for count in counts.values()),
        epochs=num_batches / batches,
        flops=flops / batches * num_batches,
        seconds=None if rate is None else rate * flops / batches / plan.world_size * num_batches,
    )


def _ranked(found: Iterable[Picture], key: Callable[[Picture], float]) -> tuple[Picture, ...]:
    """The largest by `key` first; of a picture at several sizes, the worst."""
    worst: dict[str, Picture] = {}
    for picture in sorted(found, key=lambda p: (-key(p), str(p.item.image))):
        worst.setdefault(str(picture.item.image), picture)
    return tuple(worst.values())


def _too_small(plan: BatchPlan) -> tuple[Picture, ...]:
    """Pictures that would be trained larger if enlarging were not limited, by their trained size."""
    free = replace(plan.options, max_upscale=math.inf)
    found: list[Picture] = []
    for settings in plan.stages:
        for entry in plan.entries:
            for resolution in plan.resolutions_of(entry, settings):
                placed = place_pictures(entry, resolution, plan.options)
                unlimited = place_pictures(_unlimited(entry), resolution, free)
                if _cells(placed[0].fit[:2]) < _cells(unlimited[0].fit[:2]):
                    found.append(placed[0])
    return _ranked(found, lambda p: -p.fit.width * p.fit.height)


def _unlimited(entry: Entry) -> Entry:
    if isinstance(entry, Item):
        return replace(entry, max_upscale=None)
    return replace(entry, **{side: replace(getattr(entry, side), max_upscale=None) for side in ("chosen", "rejected")})


def _concepts(entries: Sequence[Entry]) -> dict[str, float]:
    counts: defaultdict[str, float] = defaultdict(float)
    for entry in entries:
        counts[entry.concept] += entry.times
    return dict(counts)


def _cache_bytes(pictures: Sequence[Picture], tokens: dict[str, int], config: DiTConfig) -> int:
    """fp32 latents and masks, bf16 text features."""
    cells = sum(_cells((p.fit.width, p.fit.height)) * (config.in_channels + bool(p.item.mask)) for p in pictures)
    dim = config.text_in_dim or 0
    return 4 * cells + 2 * dim * sum(min(n, MAX_TEXT_TOKENS) for n in tokens.values())


# --- text ---------------------------------------------------------------------------------------------------


def format_time(seconds: float) -> str:
    """`75` as 1 min 15 s."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.2g} s"


def format_bytes(count: float) -> str:
    """`1.5e9` as 1.5 GB (10^9 bytes)."""
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 10**6:.3g} MB"


def _write(
    facts: Preflight,
    data: Dataset | Pairs | Prompts,
    recipe: Recipe | None,
    largest: tuple[int, int],
    model_notes: list[str],
) -> str:
    kind = "pairs" if isinstance(data, Pairs) else "prompts" if isinstance(data, Prompts) else "images"
    what = f"{len(data)} {kind}"
    drawn = isinstance(data, Dataset) and data.is_drawn
    how = ", drawn at random by a sampling plan: numbers per epoch are expected ones" if drawn else ""
    lines = ["# Preflight", "", f"{what}, {sum(facts.concepts.values()):.0f} samples per epoch{how}."]
    lines += ["", "## Problems", ""]
    problems = [*map(str, data.problems), *model_notes, *_warnings(facts, recipe)]
    lines += [f"- {p}" for p in problems] or ["none found"]
    if len(facts.stages) > 1:
        lines += ["", "## Curriculum", "", *_curriculum_lines(facts.stages)]
    for number, stage in enumerate(facts.stages, start=1):
        lines += ["", f"## Stage {number}: steps {stage.first_step} to {stage.last_step}", ""]
        lines.append(
            f"{stage.epochs:.1f} epochs of {stage.samples_per_epoch} samples in {stage.batches_per_epoch} batches, "
            f"{stage.partial_batches} of them not full."
        )
        lines += ["", "| size | samples per epoch | share |", "|---|---|---|"]
        ordered = sorted(stage.buckets.items(), key=lambda bucket: (-bucket[1], bucket[0]))
        every = max(1, sum(stage.buckets.values()))
        lines += [f"| {w} x {h} | {count} | {count / every:.1%} |" for (w, h), count in ordered[: 2 * _SHOWN]]
        if len(ordered) > 2 * _SHOWN:
            rest = sum(count for _, count in ordered[2 * _SHOWN :])
            lines.append(f"| {len(ordered) - 2 * _SHOWN} other sizes | {rest} | {rest / every:.1%} |")
    if len(facts.concepts) > 1:
        total = sum(facts.concepts.values())
        lines += ["", "## Concepts", "", "| concept | samples per epoch | share |", "|---|---|---|"]
        lines += [f"| {name or '(none)'} | {n:.4g} | {n / total:.1%} |" for name, n in sorted(facts.concepts.items())]
    lines += ["", "## Pictures", ""] if kind != "prompts" else ["", "## Prompts", ""]
    lines += _picture_lines(facts) if kind != "prompts" else []
    lines.append(f"- {facts.duplicates} exact and {facts.near_duplicates} near duplicates")
    lines += ["", "## Captions", "", *_caption_lines(facts)]
    lines += ["", "## Cost", ""]
    lines.append(f"- cache on disk: {format_bytes(facts.cache_bytes)}")
    m = facts.memory
    precision = recipe.precision if recipe else "bf16"
    lines.append(
        f"- memory at {largest[0]} x {largest[1]}, estimated: {format_bytes(m.total)} (base in {precision} "
        f"{format_bytes(m.base)}, adapter and optimiser {format_bytes(m.adapter)}, activations "
        f"{format_bytes(m.activations)}, a GPU's context {format_bytes(_CONTEXT_BYTES)})"
    )
    if facts.cost is None or facts.seconds is None:
        lines.append("- time: not measured")
    else:
        steps = ", ".join(f"{s:.3g}" for s in facts.cost.seconds)
        if facts.cost.peak_bytes is not None:
            lines.append(f"- memory, measured: {format_bytes(facts.cost.peak_bytes)}")
        lines.append(f"- steps at {largest[0]} x {largest[1]}, measured: {steps} s")
        lines.append(f"- time of the whole run, scaled from these: {format_time(facts.seconds)}")
    if data.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in data.notes)]
    return "\n".join(lines)


def _picture_lines(facts: Preflight) -> list[str]:
    """What happens to pictures on their way to their size."""
    lines = _list(facts.crops, "are cropped by more than 1 %", lambda p: f"{p.fit.crop_loss:.1%} cut off")
    lines += _list(facts.upscaled, "are enlarged", lambda p: f"{p.fit.scale:.2f} times")
    return lines + _list(
        facts.small, "are trained smaller than asked, to limit enlarging", lambda p: f"{p.fit.width} x {p.fit.height}"
    )


def _curriculum_lines(stages: Sequence[StageFacts]) -> list[str]:
    """What each stage has of the steps, of the samples and of the work."""
    steps = [stage.last_step - stage.first_step for stage in stages]
    samples = [stage.epochs * stage.samples_per_epoch for stage in stages]
    lines = [
        "| stage | mean area | steps | share of steps | share of samples | share of compute |",
        "|---|" + 5 * "---|",
    ]
    for number, stage in enumerate(stages, start=1):
        count = max(1, sum(stage.buckets.values()))
        side = math.sqrt(sum(n * math.prod(size) for size, n in stage.buckets.items()) / count)
        shares = (part[number - 1] / (sum(part) or 1) for part in (steps, samples, [stage.flops for stage in stages]))
        lines.append(f"| {number} | {side:.0f}^2 px | {steps[number - 1]} | {' | '.join(f'{s:.1%}' for s in shares)} |")
    return lines


def _warnings(facts: Preflight, recipe: Recipe | None) -> list[str]:
    """What is not wrong with any one file, but will be felt."""
    found: list[str] = []
    cut = [text for text, count in facts.tokens.items() if count > MAX_TEXT_TOKENS]
    if cut and facts.tokens_counted:
        found.append(f"{len(cut)} captions are longer than {MAX_TEXT_TOKENS} tokens and are cut: {cut[0][:60]!r} ...")
    for number, stage in enumerate(facts.stages, start=1):
        if recipe and stage.partial_batches > stage.batches_per_epoch / 2 and recipe.batch_size > 1:
            found.append(
                f"stage {number}: {stage.partial_batches} of {stage.batches_per_epoch} batches are not full, as few "
                "pictures share a size; batch_size 1 with more accumulation trains every sample alike"
            )
        if stage.last_step == stage.first_step:
            found.append(f"stage {number} has no steps")
    return found


def _list(found: Sequence[Picture], what: str, value: Callable[[Picture], str]) -> list[str]:
    lines = [f"- {len(found)} {what}"]
    lines += [f"  - {p.item.image.name}: {value(p)}" for p in found[:_SHOWN]]
    return lines + ([f"  - and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])


def _caption_lines(facts: Preflight) -> list[str]:
    counts = np.array([count for text, count in facts.tokens.items() if text] or [1])
    how = "" if facts.tokens_counted else ", estimated from characters"
    lines = [
        f"- {len([t for t in facts.tokens if t])} texts to encode, and the empty prompt",
        f"- tokens each{how}: {counts.min()} to {counts.max()}, median {int(np.median(counts))}, 95 % below "
        f"{math.ceil(float(np.quantile(counts, 0.95)))}",
    ]
    return lines + [f"- {int((counts > limit).sum())} above {limit} tokens" for limit in TOKEN_LIMITS]


# --- pictures -----------------------------------------------------------------------------------------------

_WIDTH = 900
_ROW = 22


def _font(px: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(px)


def _readable(text: str, most: int) -> str:
    """`text` in letters that the built-in font has, cut to `most`."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def draw_buckets(stages: Sequence[StageFacts]) -> np.ndarray:
    """Bars of samples per size, stage by stage, each with its outline: uint8 [H, 900, 3]."""
    rows = [sorted(stage.buckets.items(), key=lambda b: (-b[1], b[0])) for stage in stages]
    shown = [row[: 3 * _SHOWN] for row in rows]
    height = sum(_ROW * (len(row) + 2) for row in shown) + 10
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen, y = ImageDraw.Draw(sheet), 6
    for number, (stage, row, all_sizes) in enumerate(zip(stages, shown, rows, strict=True), start=1):
        hidden = f", the {len(row)} largest shown" if len(row) < len(all_sizes) else ""
        title = f"stage {number}: {stage.samples_per_epoch} samples in {len(all_sizes)} sizes{hidden}"
        pen.text((8, y), title, fill=_INK, font=_font(14))
        y += _ROW
        most = max(count for _, count in row)
        for (width, high), count in row:
            scale = 15 / max(width, high)
            pen.rectangle((8, y + 2, 8 + width * scale, y + 2 + high * scale), outline=_INK)
            pen.text((40, y + 3), f"{width} x {high}", fill=_INK, font=_font(12))
            end = 150 + 660 * count / most
            pen.rectangle((150, y + 3, end, y + _ROW - 4), fill=_BAR)
            pen.text((end + 6, y + 3), str(count), fill=_INK, font=_font(12))
            y += _ROW
        y += _ROW
    return np.asarray(sheet)


def draw_crops(crops: Sequence[Picture], matte: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """The twelve pictures that lose most, with what is cut off darkened: uint8 [H, 900, 3]."""
    columns, cell, label = 4, _WIDTH // 4, 34
    shown = list(crops[:12])
    if not shown:
        sheet = Image.new("RGB", (_WIDTH, 2 * _ROW), _PAPER)
        ImageDraw.Draw(sheet).text((8, 12), "nothing is cropped by more than 1 %", fill=_INK, font=_font(14))
        return np.asarray(sheet)
    sheet = Image.new("RGB", (_WIDTH, math.ceil(len(shown) / columns) * (cell + label)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(shown):
        x, y = i % columns * cell, i // columns * (cell + label)
        try:
            sheet.paste(_crop_view(picture, cell - 12, matte), (x + 6, y + 6))
        except ErnieError as e:
            pen.text((x + 6, y + 6), _readable(str(e), 34), fill=_CUT, font=_font(11))
        name = _readable(picture.item.image.name, 32)
        pen.text((x + 6, y + cell), name, fill=_INK, font=_font(11))
        fit = picture.fit
        text = f"{fit.source[0]} x {fit.source[1]} to {fit.width} x {fit.height}: {fit.crop_loss:.1%} cut off"
        pen.text((x + 6, y + cell + 14), text, fill=_CUT, font=_font(11))
    return np.asarray(sheet)


def _crop_view(picture: Picture, side: int, matte: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(load_image(picture.item.image, matte=matte).rgb_HWC)
    scale = side / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    box = tuple(round(v * scale) for v in picture.fit.box)
    dark = Image.fromarray((np.asarray(small) * 0.3).astype(np.uint8))
    dark.paste(small.crop(box), box[:2])  # type: ignore[arg-type]
    ImageDraw.Draw(dark).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_CUT, width=2)
    return dark


def draw_tokens(counts: Sequence[int]) -> np.ndarray:
    """A histogram of text lengths with the limits that matter: uint8 [260, 900, 3]."""
    height, left, right, top, bottom = 260, 40, _WIDTH - 20, 34, 226
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), f"tokens per text ({len(counts)} texts)", fill=_INK, font=_font(14))
    end = max(16, max(counts, default=1) + 1)
    bins, edges = np.histogram(counts, bins=min(60, end), range=(0, end))
    most = max(1, int(bins.max()))
    for count, start, stop in zip(bins.tolist(), edges[:-1], edges[1:], strict=True):
        x0, x1 = (left + (right - left) * edge / end for edge in (start, stop))
        if count:
            pen.rectangle((x0, bottom - (bottom - top) * count / most, max(x0, x1 - 2), bottom), fill=_BAR)
    pen.line((left, bottom, right, bottom), fill=_INK)
    pen.text((8, top - 4), str(most), fill=_INK, font=_font(11))
    for mark in (0, *(limit for limit in TOKEN_LIMITS if limit < end), end):
        x = left + (right - left) * mark / end
        if mark in TOKEN_LIMITS:
            pen.line((x, top, x, bottom), fill=_CUT)
        pen.text((min(x, right - 24), bottom + 6), str(mark), fill=_INK, font=_font(11))
    return np.asarray(sheet)
