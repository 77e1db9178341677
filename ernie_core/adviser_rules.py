"""What is known about number formats on kinds of cards: the adviser's rules as a table, each row with its source.

A verdict is about speed and soundness, never about whether something fits; that is computed (adviser.py). Where nobody
has published a figure the row says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["bf16", "fp32", "fp16", "fp8", "int8", "nvfp4", "mxfp8", "nf4", "other"]
Verdict = Literal["best", "good", "works", "slow", "avoid"]
FORMATS: tuple[Format, ...] = get_args(Format)
VERDICTS: tuple[Verdict, ...] = ("best", "good", "works", "slow", "avoid")  # best first

BEDOVYY = "Bedovyy/ERNIE-Image-Quantized, model card"
BENCH = "anla1234-itachi/comfyui-quant-bench (another model, 1 run each)"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one format is worth on some generations of cards."""

    on: tuple[str, ...]
    """Generations, as `Machine.generation` names them; () = all."""
    format: Format
    verdict: Verdict
    why: str
    source: str


# The first row that fits a generation and a format counts.
RULES: tuple[Rule, ...] = (
    Rule(
        on=(),
        format="fp16",
        verdict="avoid",
        why="activations between the blocks exceed fp16's largest number 65504; pictures turn black or NaN",
        source="ncnn port of ERNIE-Image, README; ComfyUI supported_models.py, ErnieImage: bfloat16 and float32 only",
    ),
    # --- NVIDIA
    Rule(
        on=("blackwell",),
        format="nvfp4",
        verdict="best",
        why="RTX 5090, Turbo: 2.72 s a picture, int8 3.05, fp8 3.32, bf16 4.87. Needs a PyTorch built for CUDA 13; "
        "read in ComfyUI only",
        source=BEDOVYY + "; comfy-kitchen requirements",
    ),
    Rule(
        on=("blackwell",),
        format="int8",
        verdict="good",
        why="RTX 5090, Turbo: 4.31 it/s, bf16 2.09",
        source=BEDOVYY,
    ),
    Rule(
        on=("blackwell",),
        format="fp8",
        verdict="good",
        why="RTX 5090, Turbo: 3.69 it/s, bf16 2.09",
        source=BEDOVYY,
    ),
    Rule(
        on=("blackwell",),
        format="mxfp8",
        verdict="good",
        why="RTX 5090, a video model: 9.68 s/it, bf16 16.14. Read in ComfyUI only",
        source="ComfyUI #12907",
    ),
    Rule(
        on=("ada",),
        format="int8",
        verdict="best",
        why="L40S: 7.5 s, fp8 12.1, bf16 15.4",
        source=BENCH,
    ),
    Rule(on=("ada",), format="fp8", verdict="good", why="L40S: 12.1 s, bf16 15.4", source=BENCH),
    Rule(
        on=("ada",),
        format="nvfp4",
        verdict="works",
        why="no nvfp4 units: L40S 10.1 s, int8 7.5. Read in ComfyUI only",
        source=BENCH,
    ),
    Rule(
        on=("hopper",),
        format="fp8",
        verdict="good",
        why="has fp8 units; no figure for ERNIE-Image is published, so measure",
        source="CUDA programming guide: fp8 from compute capability 8.9",
    ),
    Rule(
        on=("hopper",),
        format="bf16",
        verdict="best",
        why="the card holds it and nothing is lost: H100, 1024, 50 steps 13 to 15.5 s in SGLang",
        source="SGLang #34306",
    ),
    Rule(
        on=("ampere",),
        format="int8",
        verdict="best",
        why="RTX 3090, Turbo: 1.66 it/s, bf16 0.88, fp8 0.84; RTX 3060: 0.82, 0.26, 0.39. Needs a PyTorch built for "
        "CUDA 13: with 12.8 an A100 was three times slower than with fp8",
        source=BEDOVYY + "; ComfyUI #14824",
    ),
    Rule(
        on=("ampere",),
        format="fp8",
        verdict="slow",
        why="30-series cards have no fp8 units: RTX 3090, Turbo 0.84 it/s, bf16 0.88, int8 1.66. It saves memory only",
        source=BEDOVYY,
    ),
    Rule(
        on=("ampere",),
        format="nvfp4",
        verdict="slow",
        why="no nvfp4 units: RTX 3090, Turbo 0.83 it/s, int8 1.66. It saves memory only. Read in ComfyUI only",
        source=BEDOVYY,
    ),
    Rule(
        on=("turing", "volta", "older"),
        format="bf16",
        verdict="slow",
        why="no bf16 units: products are in fp32. No figure for ERNIE-Image is published",
        source="CUDA programming guide: bf16 from compute capability 8.0",
    ),
    Rule(
        on=("turing",),
        format="int8",
        verdict="works",
        why="has int8 units (compute capability 7.5); no figure for ERNIE-Image is published",
        source="CUDA programming guide",
    ),
    Rule(
        on=("turing",),
        format="nf4",
        verdict="avoid",
        why="bitsandbytes' 4-bit product collapsed into a near-constant picture on a Quadro RTX 5000",
        source="Veetance model card",
    ),
    Rule(
        on=("turing", "volta", "older"),
        format="fp8",
        verdict="slow",
        why="no fp8 units and no bf16 units: it saves memory only",
        source="CUDA programming guide: fp8 from compute capability 8.9",
    ),
    # --- AMD
    Rule(
        on=("rdna3",),
        format="int8",
        verdict="avoid",
        why="two to three times slower than fp8 (43 to 56 s, fp8 19)",
        source="ComfyUI #14777",
    ),
    Rule(
        on=("rdna4",),
        format="int8",
        verdict="avoid",
        why="RX 9070 XT: falls back to a very slow path unless comfy-kitchen's Triton product is chosen by hand",
        source="comfy-kitchen #78",
    ),
    Rule(
        on=("rdna2", "rdna1", "cdna", "amd"),
        format="int8",
        verdict="avoid",
        why="on RDNA2 the product can crash the driver; elsewhere it is slower than fp8 or unmeasured",
        source="comfy-kitchen #133; ComfyUI #14777",
    ),
    Rule(
        on=("rdna4",),
        format="fp8",
        verdict="good",
        why="RX 9070, FLUX: 1.87 s/it with fp8 products, 3.27 without; start ComfyUI with --fast "
        "--supports-fp8-compute",
        source="ComfyUI #8242",
    ),
    Rule(
        on=("rdna3", "rdna2", "rdna1", "cdna", "amd"),
        format="fp8",
        verdict="works",
        why="multiplied out to bf16: it saves memory, not time",
        source="ComfyUI #14777, #11519",
    ),
    Rule(
        on=("rdna3", "rdna4", "rdna2", "rdna1", "cdna", "amd"),
        format="nvfp4",
        verdict="avoid",
        why="NVIDIA's format",
        source="comfy-kitchen",
    ),
    # --- Apple
    Rule(
        on=("apple",),
        format="fp8",
        verdict="avoid",
        why="PyTorch on Apple has no fp8 before September 2026: 'MPS backend ... does not have support for that dtype'",
        source="pytorch #148420, #194074; ComfyUI #9263",
    ),
    Rule(
        on=("apple",),
        format="bf16",
        verdict="good",
        why="M4 Pro, Turbo 1024: 137 s a picture with PyTorch",
        source="treadon's MLX port, README",
    ),
    Rule(
        on=("apple",),
        format="int8",
        verdict="works",
        why="no int8 units for matrices that PyTorch uses; it saves memory. No figure for ComfyUI is published",
        source="none",
    ),
    # --- Intel
    Rule(
        on=("arc",),
        format="bf16",
        verdict="good",
        why="Arc has bf16 units, older integrated graphics has not. No figure for ERNIE-Image is published",
        source="ComfyUI #9322; OpenVINO pack's table is empty",
    ),
    Rule(
        on=("arc",),
        format="fp8",
        verdict="works",
        why="multiplied out: it saves memory, not time",
        source="intel-extension-for-pytorch #687",
    ),
    # --- no card
    Rule(
        on=("cpu",),
        format="bf16",
        verdict="good",
        why="where the processor has AMX: 700 GFLOP/s on two cores, fp32 129; elsewhere set weight_dtype to fp32",
        source="measured on a Xeon for this pack",
    ),
    Rule(
        on=("cpu",),
        format="fp32",
        verdict="works",
        why="exact; twice the memory of bf16",
        source="measured on a Xeon for this pack",
    ),
    Rule(
        on=("cpu",),
        format="fp8",
        verdict="slow",
        why="every weight is multiplied out for each call; it saves memory only",
        source="PyTorch has no fp8 product on CPUs",
    ),
    # --- everything else
    Rule(
        on=(),
        format="bf16",
        verdict="good",
        why="what the model is published in: nothing is lost",
        source="baidu/ERNIE-Image",
    ),
    Rule(on=(), format="fp32", verdict="works", why="exact; twice the memory of bf16 and slower", source="arithmetic"),
    Rule(
        on=(),
        format="int8",
        verdict="works",
        why="half the memory of bf16; no figure for this card is published",
        source="none",
    ),
    Rule(
        on=(),
        format="nvfp4",
        verdict="avoid",
        why="made for 50-series cards; read in ComfyUI only",
        source=BEDOVYY,
    ),
    Rule(
        on=(),
        format="mxfp8",
        verdict="avoid",
        why="made for 50-series cards; read in ComfyUI only",
        source="ComfyUI #12907",
    ),
    Rule(
        on=(),
        format="nf4",
        verdict="avoid",
        why="the loaders of this pack do not read 4-bit transformers and encoders",
        source="weights/layouts.py",
    ),
    Rule(
        on=(),
        format="other",
        verdict="avoid",
        why="quantised in a way that is not read here; take the loader it was made for",
        source="weights/layouts.py",
    ),
)


def rule_for(generation: str, format: Format) -> Rule:
    """The row that counts for this format on this generation of cards."""
    return next(rule for rule in RULES if rule.format == format and (not rule.on or generation in rule.on))


# What can be had where a folder lacks it: format -> bytes of the transformer, published files.
PUBLISHED_BYTES: dict[Format, int] = {
    "bf16": 16_067_025_160,
    "fp8": 8_220_000_000,
    "int8": 8_220_000_000,
    "nvfp4": 4_780_000_000,
}
PUBLISHED_SOURCE = "Comfy-Org/ERNIE-Image (bf16); " + BEDOVYY + " (fp8, int8, nvfp4)"
