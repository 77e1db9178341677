"""LoRA files as each trainer writes them, from made-up adapters; and what each does to a weight, written out in numpy.

Nothing here uses the code under test. Spellings: fact sheets of the trainers and files they published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
DOWN_UP = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a trainer names a module and the two factors of a LoRA."""

    module: Callable[[str], str]
    leaves: Mapping[str, str]
    glue: str = "."
    alpha: bool = False
    dialect: str
    """What the code under test should call it."""


def _dotted(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path


def _flat(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path.replace(".", "_")


SPELLINGS: dict[str, Spelling] = {
    "diffusers": Spelling(module=_dotted("transformer."), leaves=LEAVES, dialect="diffusers"),
    "ai-toolkit": Spelling(module=_dotted("diffusion_model."), leaves=LEAVES, dialect="comfyui"),
    "diffusion-pipe": Spelling(module=_dotted("diffusion_model."), leaves=LEAVES, dialect="comfyui"),
    "musubi": Spelling(module=_flat("lora_unet_"), leaves=DOWN_UP, alpha=True, dialect="kohya"),
    "OneTrainer diffusers": Spelling(module=_dotted("transformer."), leaves=LEAVES, dialect="diffusers"),
    "OneTrainer comfy": Spelling(
        module=_dotted("diffusion_model."), leaves=LEAVES, alpha=True, dialect="onetrainer_comfy"
    ),
    "OneTrainer original": Spelling(module=_dotted(""), leaves=DOWN_UP, alpha=True, dialect="onetrainer_original"),
    "OneTrainer kohya": Spelling(module=_flat("lora_unet_"), leaves=DOWN_UP, alpha=True, dialect="kohya"),
    "OneTrainer legacy": Spelling(
        module=_dotted("transformer."), leaves=DOWN_UP, alpha=True, dialect="onetrainer_legacy"
    ),
    "SimpleTuner": Spelling(module=_dotted("transformer."), leaves=LEAVES, dialect="diffusers"),
    "SimpleTuner LyCORIS": Spelling(module=_flat("lycoris_"), leaves=DOWN_UP, alpha=True, dialect="lycoris"),
    "DiffSynth": Spelling(
        module=_dotted(""),
        leaves={"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"},
        dialect="bare",
    ),
    "raw PEFT": Spelling(module=_dotted("base_model.model."), leaves=LEAVES, dialect="peft"),
    "raw PEFT with an adapter name": Spelling(
        module=_dotted("base_model.model."),
        leaves={"lora_A": "lora_A.my_style.weight", "lora_B": "lora_B.my_style.weight"},
        dialect="peft",
    ),
    "older diffusers": Spelling(
        module=_dotted("transformer."),
        leaves={"lora_A": "lora.down.weight", "lora_B": "lora.up.weight"},
        dialect="diffusers",
    ),
    "attention processors": Spelling(
        module=_dotted("transformer."),
        leaves={"lora_A": "lora.down.weight", "lora_B": "lora.up.weight"},
        glue="_",
        dialect="diffusers",
    ),
    "kohya for transformers": Spelling(
        module=_flat("lora_transformer_"), leaves=DOWN_UP, alpha=True, dialect="lora_transformer"
    ),
}

ALGORITHMS = ("lora", "lokr", "lokr factors", "lokr both factors", "loha", "diff", "dora", "dora columns", "dokr")


def make_factors(algorithm: str, rows: int, columns: int, *, rank: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of one module's adapter under LyCORIS's names (LoRA: lora_A, lora_B), in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    if algorithm in ("lora", "dora", "dora columns"):
        tensors = {"lora_A": normal(rank, columns), "lora_B": normal(rows, rank)}
    elif algorithm in ("lokr", "dokr"):
        tensors = {"lokr_w1": normal(2, 4), "lokr_w2": normal(rows // 2, columns // 4)}
    elif algorithm == "lokr factors":
        tensors = {
            "lokr_w1": normal(4, 2),
            "lokr_w2_a": normal(rows // 4, rank),
            "lokr_w2_b": normal(rank, columns // 2),
        }
    elif algorithm == "lokr both factors":
        tensors = {"lokr_w1_a": normal(4, rank), "lokr_w1_b": normal(rank, 4)}
        tensors |= {"lokr_w2_a": normal(rows // 4, rank), "lokr_w2_b": normal(rank, columns // 4)}
    elif algorithm == "loha":
        tensors = {f"hada_w{i}_a": normal(rows, rank) for i in (1, 2)}
        tensors |= {f"hada_w{i}_b": normal(rank, columns) for i in (1, 2)}
    else:
        assert algorithm == "diff", algorithm
        tensors = {"diff": normal(rows, columns)}
    if algorithm in ("dora", "dokr"):
        tensors["dora_scale"] = normal(rows, 1).abs() + 1
    if algorithm == "dora columns":
        tensors["dora_scale"] = normal(1, columns).abs() + 1
    return tensors


def has_rank(algorithm: str) -> bool:
    """Whether alpha means anything for it."""
    return algorithm not in ("lokr", "dokr", "diff")


def expected_change(tensors: Mapping[str, Tensor], weight: Tensor, *, alpha: float | None) -> np.ndarray:
    """What the adapter adds to `weight`, by the formulas of the papers, in float64."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    w = weight.double().numpy()
    if "lora_A" in t:
        rank, change = t["lora_A"].shape[0], t["lora_B"] @ t["lora_A"]
    elif "diff" in t:
        rank, change = None, t["diff"]
    elif "hada_w1_a" in t:
        rank = t["hada_w1_b"].shape[0]
        change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    else:
        rank = t["lokr_w2_b"].shape[0] if "lokr_w2_b" in t else None
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        change = np.kron(w1, w2)
    if alpha is not None and rank is not None:
        change = change * (alpha / rank)
    if "dora_scale" in t:
        whole = w + change
        axis = 1 if t["dora_scale"].shape[0] == w.shape[0] else 0
        norms = np.sqrt((whole**2).sum(axis=axis, keepdims=True))
        change = whole * t["dora_scale"] / norms - w
    return change


def spell(
    trainer: str, adapters: Mapping[str, Mapping[str, Tensor]], *, alpha: float | None = None
) -> dict[str, Tensor]:
    """The tensors of a file by `trainer`; `alpha` is written where that trainer writes one (None = the rank)."""
    how = SPELLINGS[trainer]
    file: dict[str, Tensor] = {}
    for path, tensors in adapters.items():
        name = how.module(path)
        for leaf, tensor in tensors.items():
            known = leaf in how.leaves
            file[f"{name}{how.glue if known else '.'}{how.leaves.get(leaf, leaf)}"] = tensor
        if how.alpha:
            rank = next((t.shape[0] for n, t in tensors.items() if n in ("lora_A", "lokr_w2_b", "hada_w1_b")), 1)
            file[f"{name}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    return file


def random_lora(shapes: Mapping[str, tuple[int, ...]], *, rank: int = 2, size: float = 0.1, seed: int = 0) -> dict:
    """A file by ai-toolkit that adapts every matrix of the blocks: {key: tensor}."""
    generator = torch.Generator().manual_seed(seed)
    file: dict[str, Tensor] = {}
    for path, shape in shapes.items():
        if path.startswith("layers.") and len(shape) == 2:
            a, b = (torch.randn(*s, generator=generator) for s in ((rank, shape[1]), (shape[0], rank)))
            file[f"diffusion_model.{path}.lora_A.weight"] = a * shape[1] ** -0.5
            file[f"diffusion_model.{path}.lora_B.weight"] = b * size
    return file
