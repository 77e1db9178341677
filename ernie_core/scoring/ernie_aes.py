"""ERNIE-Image-Aes: an 8-billion vision-language model that rates how a picture looks, 0 to 100.

It is InternVL3-8B (InternViT, pixel shuffle, projector, Qwen2), trained as ArtiMuse and then by Baidu. The published
files bring their own Python; here the weights go into transformers' own InternVL classes under other names, and no
downloaded code runs. A score is one forward pass: the model is asked to answer with one of 101 two-letter tokens; the
probabilities of these tokens at the last position make an expected value.

Sources: ArtiMuse (arXiv 2507.14533; eval_image.py, modeling_artimuse.py and conversation.py of thunderbolt215/ArtiMuse
at 750d980) for prompt, picture and score; transformers 5 `models/internvl` for the network. ERNIE-Image-Aes' own page
refers to ArtiMuse for how it is used. ArtiMuse takes the softmax in bf16; here it is in fp32, which moves a score by
some tenths.

Shape letters: B pictures, C = 3 colours, H, W pixels, S tokens.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import CheckpointError, ErnieError
from ..weights.four_bit import FourBit, is_four_bit, read_bitsandbytes
from .network import Bring, Place, Precision, Weights, fill, require_transformers, stay
from .scorer import BatchScorer

logger = logging.getLogger(__name__)

SYSTEM = Path(__file__).with_name("internvl_system.txt")  # of the template internvl2_5; not ASCII
SCORE_TOKENS = tuple(
    first + chr(ord("a") + i) for first, count in (("a", 26), ("c", 25), ("d", 25), ("e", 25)) for i in range(count)
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"
PromptStyle = Literal["artimuse", "plain"]
PROMPT_STYLES: tuple[PromptStyle, ...] = ("artimuse", "plain")


def question(style: PromptStyle = "artimuse") -> str:
    """What the model is asked.

    `artimuse`: as ArtiMuse's own score() asks, indented by eight blanks, as the model was trained; `plain`: the same
    words without indentation, as other programs ask. Scores of the two differ.
    """
    if style not in PROMPT_STYLES:
        raise ErnieError(f"prompt must be one of {', '.join(PROMPT_STYLES)}, got {style!r}.")
    indent = " " * 8 if style == "artimuse" else ""
    blank = " " if style == "artimuse" else ""  # the original's first three lines end in one
    lines = [
        f"{indent}Rate the aesthetics score of the image in 0-100.{blank}",
        f"{indent}In the output format, numbers are replaced by 2 corresponding letters,{blank}",
        f"{indent}and the mapping relationship is:{blank}",
    ]
    for first, low, high, dots in (("a", 0, 25, " ,"), ("c", 26, 50, ","), ("d", 51, 75, ","), ("e", 76, 100, ",")):
        shown = ", ".join(f"{low + i}-{first}{'abcd'[i]}" for i in range(4))
        end = "." if high == 100 else ","
        # the first line has "... ," with a blank before the comma
        lines.append(
            f"{indent}score {low} to {high}: {shown}, ...{dots} {high}-{first}{chr(ord('a') + high - low)}{end}"
        )
    lines += ["", f"{indent}The answer only outputs 2 corresponding letters."]
    text = "\n".join(lines)
    return f"\n{text}\n{indent}" if style == "artimuse" else text


@functools.cache
def default_system() -> str:
    """The system message of InternVL's template internvl2_5 (in Chinese)."""
    return SYSTEM.read_text(encoding="utf-8").rstrip("\n")


def render(num_image_tokens: int, *, style: PromptStyle = "artimuse", system: str | None = None) -> str:
    """The whole text that the model reads; the picture stands where the CONTEXT tokens are."""
    system = default_system() if system is None else system
    image = START + CONTEXT * num_image_tokens + END
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{image}\n{question(style)}<|im_end|>\n<|im_start|>assistant\n"
    )


def prepare(rgb_HWC: np.ndarray, side_px: int = 448) -> Tensor:
    """[C, side, side] fp32 of uint8 [H, W, 3]: squashed to a square (bicubic), ImageNet's mean and deviation."""
    square = Image.fromarray(rgb_HWC).resize((side_px, side_px), Image.Resampling.BICUBIC)
    pixels_HWC = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)
    return ((pixels_HWC - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, 0)


def expected_score(logits_BV: Tensor, token_ids: Tensor) -> Tensor:
    """[B] in 0..100: softmax over the 101 score tokens only, times their numbers."""
    probabilities = logits_BV[:, token_ids].float().softmax(dim=-1)
    return probabilities @ torch.arange(len(SCORE_TOKENS), dtype=torch.float32, device=logits_BV.device)


# --- names -----------------------------------------------------------------------------------------------------------

# published name -> transformers' name, for a whole name or what follows a layer's number
_PATCHES = "model.vision_tower.embeddings.patch_embeddings.projection"
_PLAIN = {
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.weight": f"{_PATCHES}.weight",
    "vision_model.embeddings.patch_embedding.bias": f"{_PATCHES}.bias",
    "mlp1.0.weight": "model.multi_modal_projector.layer_norm.weight",
    "mlp1.0.bias": "model.multi_modal_projector.layer_norm.bias",
    "mlp1.1.weight": "model.multi_modal_projector.linear_1.weight",
    "mlp1.1.bias": "model.multi_modal_projector.linear_1.bias",
    "mlp1.3.weight": "model.multi_modal_projector.linear_2.weight",
    "mlp1.3.bias": "model.multi_modal_projector.linear_2.bias",
    "language_model.lm_head.weight": "lm_head.weight",
}
_IN_VISION_LAYER = {
    "attn.proj.weight": "attention.projection_layer.weight",
    "attn.proj.bias": "attention.projection_layer.bias",
    "attn.q_norm.weight": "attention.q_norm.weight",
    "attn.k_norm.weight": "attention.k_norm.weight",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_VISION_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)")
_CONVERTED = ("vision_tower.", "multi_modal_projector.")  # transformers 4's own names lack "model."


def transformers_names(name: str) -> tuple[str, ...]:
    """Where a published tensor goes: one name; three for a fused qkv, whose rows are q, k and v; () when unknown."""
    if name in _PLAIN:
        return (_PLAIN[name],)
    if name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")):
        return (name,)
    if name.startswith(_CONVERTED):
        return (f"model.{name}",)
    if name.startswith("language_model.model."):
        return ("model.language_model." + name.removeprefix("language_model.model."),)
    found = _VISION_LAYER.fullmatch(name)
    if found is None:
        return ()
    layer, leaf = f"model.vision_tower.encoder.layer.{found[1]}", found[2]
    if leaf in ("attn.qkv.weight", "attn.qkv.bias"):
        return tuple(f"{layer}.attention.{part}_proj.{leaf.rpartition('.')[2]}" for part in "qkv")
    return (f"{layer}.{_IN_VISION_LAYER[leaf]}",) if leaf in _IN_VISION_LAYER else ()


def to_transformers(tensors: Mapping[str, Tensor | FourBit], source: Path) -> dict[str, Tensor | FourBit]:
    """The state dict under transformers' names; views of the given tensors.

    Raises CheckpointError: a name that is not InternVL's (the first five).
    """
    made: dict[str, Tensor | FourBit] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        targets = transformers_names(name)
        if not targets:
            unknown.append(name)
        elif len(targets) == 1:
            made[targets[0]] = tensor
        else:
            made |= dict(zip(targets, tensor.chunk(3), strict=True))
    if unknown:
        raise CheckpointError(f"{source} has {len(unknown)} tensors that InternVL has not: {', '.join(unknown[:5])}.")
    return made


def is_internvl(names: Iterable[str]) -> bool:
    """Whether these are the tensors of an InternVL model, in its own names or transformers'."""
    names = set(names)
    return bool(names & {"mlp1.0.weight", "multi_modal_projector.linear_1.weight"}) or (
        "model.multi_modal_projector.linear_1.weight" in names
    )


# --- network ---------------------------------------------------------------------------------------------------------


def make_config(config: Mapping[str, Any], source: Path) -> Any:
    """transformers' InternVLConfig of a config.json in InternVL's own form (internvl_chat) or transformers'.

    Raises CheckpointError: another kind of model, or settings that the network here does not have.
    """
    transformers = require_transformers()
    if config.get("model_type") == "internvl":
        return transformers.InternVLConfig.from_dict(dict(config))
    text, vision = config.get("llm_config"), config.get("vision_config")
    if config.get("model_type") != "internvl_chat" or not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        raise CheckpointError(
            f"{source} must come with InternVL's config.json (model_type internvl_chat), got model_type "
            f"{config.get('model_type')!r}; choose the folder of the model, with all its files."
        )
    family = (text.get("architectures") or [text.get("model_type")])[0]
    rope = dict(text.get("rope_scaling") or {})
    for what, given, ok in (
        ("language model", family, family in ("Qwen2ForCausalLM", "qwen2")),
        ("ps_version", config.get("ps_version", "v2"), config.get("ps_version", "v2") == "v2"),
        ("select_layer", config.get("select_layer", -1), config.get("select_layer", -1) == -1),
        # dynamic scaling begins beyond the trained length, which a score's prompt never reaches
        ("rope_scaling", rope, rope.get("rope_type", rope.get("type", "default")) in ("default", "dynamic")),
        ("use_sliding_window", text.get("use_sliding_window"), not text.get("use_sliding_window")),
    ):
        if not ok:
            raise CheckpointError(f"{source}: {what} {given!r} is not that of ERNIE-Image-Aes (Qwen2, v2, -1).")
    kept = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "hidden_act", "max_position_embeddings", "rms_norm_eps", "head_dim"),
    )
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    text_config = transformers.Qwen2Config(
        **{name: text[name] for name in kept if text.get(name) is not None},
        rope_parameters={"rope_type": "default", "rope_theta": float(text.get("rope_theta", 1e6))},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "norm_type")
    side = int(config.get("force_image_size") or vision.get("image_size") or 448)
    if side != int(vision.get("image_size") or side):
        raise CheckpointError(f"{source}: force_image_size {side} differs from image_size {vision['image_size']}.")
    vision_config = transformers.InternVLVisionConfig(
        **{name: vision[name] for name in (*kept, "layer_norm_eps") if vision.get(name) is not None},
        attention_bias=bool(vision.get("qkv_bias", True)),
        use_qk_norm=bool(vision.get("qk_normalization", False)),
        image_size=side,
        patch_size=int(vision.get("patch_size") or 14),
    )
    ratio = float(config.get("downsample_ratio") or 0.5)
    return transformers.InternVLConfig(
        vision_config=vision_config, text_config=text_config, downsample_ratio=ratio, tie_word_embeddings=tied
    )


def build_network(weights: Weights, *, precision: Precision = "bf16", ops: Any = None) -> nn.Module:
    """transformers' InternVLForConditionalGeneration with these weights.

    int8, fp8 and nf4 hold for the matrices of the vision and language layers, 86 % of the model; embeddings,
    projector, norms and output stay in bf16. nf4 keeps the weights of files that bitsandbytes made in 4 bits.

    Raises:
        CheckpointError: missing or extra tensors, or a config.json of another model.
    """
    transformers = require_transformers()
    config = make_config(weights.config, weights.source)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        network = transformers.InternVLForConditionalGeneration(config)
    tensors = to_transformers(read_bitsandbytes(weights.tensors, weights.source), weights.source)
    embedding = tensors.get("model.language_model.embed_tokens.weight")
    if config.tie_word_embeddings and embedding is not None:
        tensors.setdefault("lm_head.weight", embedding)
    return fill(
        network,
        tensors,
        precision=precision,
        source=weights.source,
        ops=ops,
        in_low_bits=lambda layer: ".layers." in layer or ".encoder.layer." in layer,
    )


def read_tokenizer(folder: Path | None, source: Path) -> Any:
    """The tokenizer beside the weights: tokenizer.json, or vocab.json and merges.txt.

    Raises CheckpointError: it is not there, or lacks one of the picture's or score's tokens.
    """
    transformers = require_transformers()
    if folder is None:
        raise CheckpointError(f"{source}: choose the model's folder; its tokenizer and config.json are needed too.")
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json and no vocab.json; download the tokenizer's files too.")
    try:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {e}; download it again.") from e
    return tokenizer


class ErnieAes(BatchScorer[Tensor]):
    """ERNIE-Image-Aes (or ArtiMuse itself) as a scorer, 0 to 100; see the module's text."""

    low: float | None = 0.0
    high: float | None = 100.0
    higher_is_better = True
    reads_prompt = False

    key: str = ""

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        *,
        name: str = "ERNIE-Image-Aes",
        style: PromptStyle = "artimuse",
        system: str | None = None,
        place: Place = stay,
    ):
        """`network`: of `build_network`; `system`: instead of the template's; `place`: the host's memory manager.

        Raises ErnieError: the tokenizer lacks a score token or a picture's token.
        """
        self.name = name
        self.network: Any = network
        config = self.network.config
        vision = config.vision_config
        self.side_px = int(vision.image_size[0])
        patches = self.side_px // int(vision.patch_size[0])
        num_image_tokens = int(patches**2 * config.downsample_ratio**2)
        ids = [tokenizer.convert_tokens_to_ids(token) for token in (*SCORE_TOKENS, CONTEXT, START, END)]
        unknown = getattr(tokenizer, "unk_token_id", None)
        lost = [
            token
            for token, i in zip((*SCORE_TOKENS, CONTEXT, START, END), ids, strict=True)
            if i is None or i < 0 or i == unknown or i >= config.text_config.vocab_size
        ]
        if lost:
            raise CheckpointError(
                f"the tokenizer has no {', '.join(lost[:5])} ({len(lost)} of {len(ids)} tokens of the score are "
                "missing): it belongs to another model; take all files of one download."
            )
        self.score_ids = torch.tensor(ids[: len(SCORE_TOKENS)])
        config.image_token_id = ids[len(SCORE_TOKENS)]
        text = render(num_image_tokens, style=style, system=system)
        self.prompt_ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        found = int((self.prompt_ids == config.image_token_id).sum())
        if found != num_image_tokens:
            raise CheckpointError(
                f"the tokenizer makes {found} picture tokens of {num_image_tokens}: it belongs to another model."
            )
        self._keep_what_is_used()
        self._bring: Bring = place(network)

    @torch.no_grad()
    def _keep_what_is_used(self) -> None:
        """Cut both vocabularies to the tokens of the prompt and of the score: 2.2 GB of ERNIE-Image-Aes in bf16."""
        used, self.prompt_ids = self.prompt_ids.unique(return_inverse=True)
        config = self.network.config
        config.image_token_id = int((used == config.image_token_id).nonzero())
        embedding, head = self.network.get_input_embeddings(), self.network.lm_head
        embedding.weight = nn.Parameter(embedding.weight[used.to(embedding.weight.device)], requires_grad=False)
        head.weight = nn.Parameter(head.weight[self.score_ids.to(head.weight.device)], requires_grad=False)
        embedding.num_embeddings, head.out_features = len(used), len(self.score_ids)
        self.score_ids = torch.arange(len(self.score_ids))

    def prepare(self, rgb_HWC: np.ndarray) -> Tensor:
        return prepare(rgb_HWC, self.side_px)

    def start(self) -> Callable[[list[Tensor], list[str]], Sequence[float]]:
        return lambda made, _texts: self.score_pixels(torch.stack(made)).tolist()

    @torch.inference_mode()
    def score_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """[B] on the CPU, of prepared pictures."""
        device = self._bring()
        ids_BS = self.prompt_ids.to(device).expand(len(pixels_BCHW), -1)
        dtype = self.network.model.vision_tower.embeddings.cls_token.dtype
        pixels = pixels_BCHW.to(device, dtype)
        out = self.network(input_ids=ids_BS, pixel_values=pixels, use_cache=False, logits_to_keep=1)
        return expected_score(out.logits[:, -1], self.score_ids.to(device)).cpu()


def load_ernie_aes(
    weights: Weights,
    *,
    precision: Precision | None = None,
    style: PromptStyle = "artimuse",
    ops: Any = None,
    place: Place = stay,
) -> ErnieAes:
    """The scorer of a folder; its name is the folder's. Raises as `build_network` and `read_tokenizer` do.

    `precision`: None = nf4 for a file in 4 bits, bf16 for others.
    """
    precision = precision or ("nf4" if is_four_bit(weights.tensors) else "bf16")
    tokenizer = read_tokenizer(weights.folder, weights.source)
    network = build_network(weights, precision=precision, ops=ops)
    name = weights.folder.name if weights.folder is not None else "ERNIE-Image-Aes"
    return ErnieAes(network, tokenizer, name=name, style=style, place=place)
