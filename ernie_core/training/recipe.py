"""A recipe: everything that decides what a training run computes. Read from TOML, kept as recipe.json in its job.

The defaults are the ones this field agrees on for an 8B flow-matching transformer: rank 32 on the seven linears of
every block, AdamW 1e-4, logit-normal noise levels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

from torch import Tensor

from ..config import BASE, TURBO
from ..errors import ErnieError
from ..sampling.schedule import make_sigmas
from .adapters import AdapterConfig
from .buckets import Stage
from .distillation import DistilConfig
from .objectives import DpoConfig, SigmaSampling

Objective = Literal["sft", "dpo", "distil"]
Precision = Literal["bf16", "fp32", "fp8", "int8", "stored"]
OptimiserName = Literal["adamw", "adamw8bit", "prodigy", "adafactor"]
ScheduleName = Literal["constant", "cosine", "linear"]
SaveDtype = Literal["bf16", "fp32"]
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class ModelPaths:
    """Where the networks are; an official folder may stand in every place."""

    transformer: str
    text_encoder: str = ""
    """Empty: the same folder as `transformer`."""
    vae: str = ""
    """Empty: the same folder as `transformer`."""
    turbo: str = ""
    """Transformer of ERNIE-Image-Turbo, for the samples at its settings; empty: no such samples."""

    def path(self, kind: Literal["transformer", "text_encoder", "vae", "turbo"]) -> Path:
        """Where to read `kind`."""
        return Path(getattr(self, kind) or self.transformer)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """How gradients become steps."""

    name: OptimiserName = "adamw"
    lr: float = 1e-4
    """Peak learning rate; 1.0 is usual for prodigy, which scales it itself."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    warmup: int = 50
    """Optimiser steps until the peak."""
    schedule: ScheduleName = "cosine"
    floor: float = 0.1
    """Where cosine and linear end, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm over all factors; 0 = no limit."""
    ema: float = 0.0
    """Decay of a second, averaged adapter, 0 = none, 0.99 follows about 100 steps."""


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Elastic depth (ERNIE 5.0, arXiv 2602.04705, section 3.3): some steps run with blocks left out."""

    skip: int = 0
    """Blocks left out in the reduced steps; 0 = off."""
    share: float = 0.25
    """Share of the steps that run reduced."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Pictures made on the way, always from the same noise."""

    prompts: tuple[str, ...] = ()
    every: int = 250
    """Optimiser steps between two grids; 0 = only at the end."""
    seed: int = 0
    width: int = 1024
    height: int = 1024
    base_steps: int = BASE.steps
    """Not for distil, whose students are painted on their own grid."""
    base_cfg: float = BASE.cfg
    turbo_steps: int = TURBO.steps
    turbo_cfg: float = TURBO.cfg


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Sizes are per process: `batch_size` samples a micro-batch, `accumulation` of them a step."""

    name: str
    models: ModelPaths
    objective: Objective = "sft"
    steps: int = 1500
    batch_size: int = 1
    accumulation: int = 2
    seed: int = 0
    precision: Precision = "bf16"
    """Of the frozen base; the adapter's master weights are fp32 always."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    initial_lora: str = ""
    """LoRA file the adapter starts from; empty: from nothing."""
    reference_lora: str = ""
    """DPO: LoRA on the reference model; empty: the base alone."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    sigmas: SigmaSampling = field(default_factory=SigmaSampling)
    stages: tuple[Stage, ...] = ()
    """Resolution curriculum; empty: 1024 throughout."""
    region_weight: float = 0.0
    """w_l of ERNIE-ViLG 2.0: extra weight of the loss inside boxes; the paper's value is 0.1."""
    keyword_weight: float = 0.0
    """w_a of ERNIE-ViLG 2.0: extra attention of image tokens to keywords; the paper's value is 0.01."""
    device_share: float = 0.5
    """Share of the samples that region and keyword weighting apply to (the paper's value)."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    reference_bank: int = 0
    """DPO: noises per pair whose reference errors are computed once and kept; 0 = new noise every time."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    checkpointing: bool = True
    """Recompute the blocks' activations in the backward pass: a third more time for a fraction of the memory."""
    stream: bool = False
    """Keep the blocks' weights in RAM and bring them to the device one by one."""
    save_every: int = 250
    keep: int = 4
    """Checkpoints kept besides the last."""
    save_dtype: SaveDtype = "bf16"
    """Of the LoRA file; the state that a run resumes from is fp32."""
    samples: SampleConfig = field(default_factory=SampleConfig)
    tensorboard: bool = False
    comment: str = ""

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("accumulation", 1), ("save_every", 1), ("keep", 0)):
            if getattr(self, name) < low:
                raise ErnieError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if not self.name or any(c in self.name for c in '/\\:*?"<>|') or self.name.startswith("."):
            raise ErnieError(f"name must be usable as a file name, got {self.name!r}.")
        for name in ("region_weight", "keyword_weight"):
            if getattr(self, name) < 0:
                raise ErnieError(f"{name} must be 0 (off) or more, got {getattr(self, name):g}.")
        if not self.optimiser.lr > 0:
            raise ErnieError(f"optimiser.lr must be above 0, got {self.optimiser.lr:g}.")
        for where, share in (("device_share", self.device_share), ("depth.share", self.depth.share)):
            if not 0 <= share <= 1:
                raise ErnieError(f"{where} must lie between 0 and 1, got {share:g}.")
        if not 0 <= self.optimiser.ema < 1:
            raise ErnieError(f"optimiser.ema must be 0 (off) or a decay below 1, got {self.optimiser.ema:g}.")
        if self.stream and not self.checkpointing:
            raise ErnieError("stream needs checkpointing: the backward pass brings the weights again. Switch it on.")
        if self.objective != "sft" and (self.region_weight or self.keyword_weight):
            raise ErnieError(
                f"region_weight and keyword_weight belong to the objective sft; set them to 0 for {self.objective}."
            )
        if self.objective != "dpo" and (self.reference_lora or self.reference_bank):
            raise ErnieError(
                f"reference_lora and reference_bank belong to the objective dpo; leave them empty for {self.objective}."
            )
        if self.objective != "distil" and self.distil != DistilConfig():
            raise ErnieError(
                f"the settings [distil] belong to the objective distil; leave them out for {self.objective}."
            )
        if self.objective == "distil" and self.sigmas != SigmaSampling():
            raise ErnieError("sigmas belong to sft and dpo; distil has its own, distil.noise and distil.fake.sigmas.")
        if self.objective == "distil" and self.depth.skip:
            raise ErnieError("depth leaves blocks out of the teachers as well; set depth.skip to 0 for distil.")
        at = self.samples
        if self.objective == "distil" and (at.base_steps, at.base_cfg) != (BASE.steps, BASE.cfg):
            raise ErnieError("a student's samples are painted on its own grid at cfg 1: leave samples.base_* out.")
        fake_rank = self.distil.fake.rank or self.adapter.rank
        if fake_rank < self.adapter.rank:
            raise ErnieError(
                f"distil.fake.rank must be at least the student's {self.adapter.rank}, got {fake_rank}: it has to "
                "learn whatever the student paints."
            )

    @property
    def effective_lr(self) -> float:
        """lr * alpha / rank: what two recipes with different scales can be compared by."""
        a = self.adapter
        return self.optimiser.lr * (a.alpha if a.alpha is not None else a.rank) / a.rank

    def sampled_on(self) -> tuple[Tensor, float]:
        """(sigmas, cfg) of the pictures made on the way: a student's are painted on its own grid without guidance."""
        if self.objective == "distil":
            return self.distil.grid(), 1.0
        return make_sigmas(self.samples.base_steps), self.samples.base_cfg

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def hash(self) -> str:
        """Sixteen hex digits of everything that decides the numbers; not of names, comments, samples and logs."""
        free = {"name", "comment", "samples", "tensorboard", "keep", "save_every", "save_dtype", "steps"}
        kept = {k: v for k, v in self.to_dict().items() if k not in free}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that a parsed TOML or JSON file describes.

    Raises:
        ErnieError: a key that does not exist (with the nearest one), a value of the wrong type or out of range.
    """
    return build_settings(Recipe, values, "")


def read_recipe(path: Path | str) -> Recipe:
    """A recipe from a .toml or .json file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ErnieError(f"the recipe {path} cannot be read: {e}") from e
    return recipe_from_dict(parse_toml(text, path) if path.suffix == ".toml" else _parse_json(text, path))


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """TOML as dictionaries.

    Raises:
        ErnieError: it is not TOML, or Python is 3.10 and the package tomli is not there.
    """
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as e:
            raise ErnieError(f"{path.name} is TOML, which Python 3.10 reads with the package tomli: install it.") from e
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ErnieError(f"{path} is not valid TOML: {e}.") from e


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as e:
        raise ErnieError(f"{path} is not valid JSON: {e}.") from e
    if not isinstance(values, dict):
        raise ErnieError(f"{path} must hold one recipe (an object), got {type(values).__name__}.")
    return values


def build_settings(cls: type[C], values: Any, where: str) -> C:
    """A settings dataclass from parsed TOML or JSON; `where` names the table in errors (see `recipe_from_dict`)."""
    if not isinstance(values, Mapping):
        raise ErnieError(f"{where or 'the recipe'} must be a table of settings, got {values!r}.")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}."
            raise ErnieError(f"{f'{where}.' if where else ''}{key} is not a setting of a recipe: {hint}")
    given = {key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()}
    try:
        return cls(**given)
    except TypeError as e:
        raise ErnieError(f"{where or 'the recipe'} is not complete: {e}.") from e


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type of a field; ErnieError when it cannot be one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return build_settings(typing.cast(type, hint), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ErnieError(f"{where} must be one of {', '.join(map(str, arguments))}; got {value!r}.")
        return value
    if origin in (UnionType, typing.Union):
        if value is None:
            return None
        for choice in arguments:
            if choice is not type(None):
                try:
                    return _convert(choice, value, where)
                except ErnieError:
                    continue
        raise ErnieError(f"{where} must be {hint}, got {value!r}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ErnieError(f"{where} must be a list, got {value!r}.")
        inner = arguments[:1] * len(value) if arguments[-1:] == (Ellipsis,) else arguments
        if len(inner) != len(value):
            raise ErnieError(f"{where} must have {len(inner)} entries, got {len(value)}.")
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ErnieError(f"{where} must be a table, got {value!r}.")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ErnieError(f"{where} must be of type {hint.__name__}, got {value!r}.")
    return value
