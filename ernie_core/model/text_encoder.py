"""The text encoder: tokenizer, and the first 25 of 26 layers of a Mistral language model.

Source: `text_encoder/config.json` and `tokenizer/` of baidu/ERNIE-Image; ErnieImagePipeline.encode_prompt
(diffusers 0.42.1), which takes hidden_states[-2]; transformers' MistralModel, whose decoder layers run here
unchanged.
Conventions that are easily got wrong: one BOS in front, no EOS; "" is one token, [BOS]; the last layer and
the final norm do not exist here; rope is YaRN (factor 16), which stretches frequencies even below 16384
positions; right padding is harmless because attention is causal; q is wider than the hidden size (32 heads of
128 against 3072). The first token's activations reach about 600, and fp16 overflows further on: bf16 or fp32
only.

Shape letters: B batch, T text tokens, D width, K head dim.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import MAX_TEXT_TOKENS
from ..errors import CheckpointError, ErnieError

logger = logging.getLogger(__name__)

Rope = Literal["yarn", "plain"]

# The first special tokens of a tekken file that does not list them (Mistral tekken_240911), in order of id.
TEKKEN_SPECIALS = tuple(
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] "
    "[TOOL_CONTENT]".split()
)

# config.json names that shape the network; everything else in the file is bookkeeping
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


class Tokenizer:
    """Text to token ids and back; wraps a byte-level BPE `tokenizers.Tokenizer` that knows <s> and </s>."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
        missing = [name for name, token_id in ids.items() if token_id is None]
        if missing:
            raise CheckpointError(f"the tokenizer has no token {' or '.join(missing)}: it belongs to another model.")
        self.bos_id: int = ids["<s>"]
        self.eos_id: int = ids["</s>"]

    @classmethod
    def from_json(cls, source: Path | str) -> Tokenizer:
        """Read a `tokenizer.json`: a path, or the file's text (recognised by its opening brace)."""
        import tokenizers

        text = str(source)
        if isinstance(source, Path) or not text.lstrip().startswith("{"):
            text = Path(source).read_text(encoding="utf-8")
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except CheckpointError:
            raise
        except Exception as e:  # the tokenizers library raises nothing narrower
            raise CheckpointError(f"not a readable tokenizer.json: {e}") from e

    @classmethod
    def from_tekken(cls, data: bytes) -> Tokenizer:
        """Convert the bytes of a tekken.json (1.5 s and more at 131072 entries; keep the result).

        A token's id is its rank plus the number of specials. The file has no merge list; every way to cut a
        token into two known tokens is a merge, in the order of the token's rank, which is how transformers
        converts it too.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors

        try:
            file = json.loads(data)
            settings, entries = file["config"], file["vocab"]
            specials = sorted(file.get("special_tokens") or [], key=lambda entry: entry["rank"])
            names = [str(entry["token_str"]) for entry in specials] or list(TEKKEN_SPECIALS)
            num_specials = int(settings.get("default_num_special_tokens") or len(names))
            names += [f"<SPECIAL_{i}>" for i in range(len(names), num_specials)]
            pattern = settings["pattern"]
            num_ranks = int(settings.get("default_vocab_size") or len(entries) + num_specials) - num_specials
            alphabet = _byte_alphabet()
            tokens = [
                base64.b64decode(e["token_bytes"]).decode("latin-1").translate(alphabet) for e in entries[:num_ranks]
            ]
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"not a readable tekken.json: {type(e).__name__}: {e}") from e

        ranks = {token: rank for rank, token in enumerate(tokens)}
        merges: list[tuple[str, str]] = []
        for token in tokens:
            cuts: list[tuple[int, int]] = []
            for i in range(1, len(token)):
                left = ranks.get(token[:i])
                if left is not None and (right := ranks.get(token[i:])) is not None:
                    cuts.append((left, right))
            merges += [(tokens[left], tokens[right]) for left, right in sorted(cuts)]
        vocab = {token: rank + num_specials for token, rank in ranks.items()}
        vocab |= {name: i for i, name in enumerate(names[:num_specials])}
        # ignore_merges: a whole word that is in the vocabulary is taken as it stands, as tiktoken does
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names[:num_specials]])
        return cls(tokenizer)

    def to_json(self) -> str:
        """The text of a `tokenizer.json` that `from_json` (and transformers) read back."""
        return self._tokenizer.to_str()

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, max_tokens: int | None = MAX_TEXT_TOKENS, bos: bool = True) -> list[int]:
        """Token ids of `text`, with exactly one BOS in front whatever the post-processor would add.

        Names of special tokens in the text ("[INST]") become those tokens, as in the official pipeline. A
        text that begins with "<s>" already has its BOS. Ids beyond `max_tokens` (BOS included; None = no
        limit) are cut off with a warning. Half an emoji (a lone surrogate) becomes U+FFFD. `bos=False` adds none.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if max_tokens is not None and len(ids) > max_tokens:
            logger.warning(
                "the prompt has %d tokens; only the first %d are used, the last %d are cut off",
                len(ids),
                max_tokens,
                len(ids) - max_tokens,
            )
            ids = ids[:max_tokens]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; incomplete characters become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class TextStream:
    """Text of a growing list of ids; a character cut across tokens appears when it is whole."""

    _MAX_PENDING = 4  # a UTF-8 character has at most four bytes, and a token at least one

    def __init__(self, tokenizer: Tokenizer):
        self.text = ""
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take one more id; returns the whole text so far."""
        self._pending.append(token_id)
        piece = self._tokenizer.decode(self._pending)
        if not piece.endswith("\ufffd") or len(self._pending) >= self._MAX_PENDING:
            self.text += piece
            self._pending.clear()
        return self.text


def _language_model(config: Mapping[str, Any], num_layers: int, rope: Rope) -> Any:
    """A transformers model of `config` with `num_layers` layers, on the meta device but for its rope."""
    try:
        import transformers
    except ImportError as e:
        raise ErnieError(
            f"the text encoder needs the package transformers >= 5.0; pip install -U transformers ({e})"
        ) from e
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ErnieError(
            f"the text encoder needs the package transformers >= 5.0, got {transformers.__version__}; "
            "pip install -U transformers"
        )
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise CheckpointError(f"the text encoder's config.json lacks {', '.join(missing)}.")
    if config.get("sliding_window"):
        raise CheckpointError(
            f"sliding-window attention ({config['sliding_window']}) is not ERNIE-Image's; expected null."
        )

    values = {name: config[name] for name in (*_REQUIRED, *_OPTIONAL) if config.get(name) is not None}
    values |= {"num_hidden_layers": num_layers, "sliding_window": None, "attn_implementation": "sdpa"}
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if rope == "plain":
        theta = parameters.get("rope_theta") or config.get("rope_theta") or 1e6
        parameters = {"rope_type": "default", "rope_theta": theta}
    # Ministral 3 is Mistral plus a query scale of 1 + beta * log(1 + position // 16384): 1 for any prompt of
    # ours, but the enhancer's context is longer. The released text encoder is "mistral": no such scale.
    scaled = config.get("model_type") == "ministral3" and parameters.get("llama_4_scaling_beta") is not None
    if not scaled:  # keys that only Ministral 3 knows
        parameters = {
            k: v for k, v in parameters.items() if k not in ("llama_4_scaling_beta", "max_position_embeddings")
        }
    if parameters:
        values["rope_parameters"] = parameters
    model_config: Any = (transformers.Ministral3Config if scaled else transformers.MistralConfig)(**values)
    model_class: Any = transformers.Ministral3Model if scaled else transformers.MistralModel
    with torch.device("meta"):
        model = model_class(model_config)
    with torch.device("cpu"):
        model.rotary_emb = type(model.rotary_emb)(model_config)
    return model


def _replace_weights(module: nn.Module, ops: Any, factory: dict[str, Any]) -> None:
    """Replace every Linear and Embedding below `module` by the class of `ops`; norm gains become ones."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            bias = child.bias is not None
            setattr(module, name, ops.Linear(child.in_features, child.out_features, bias=bias, **factory))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, ops.Embedding(child.num_embeddings, child.embedding_dim, **factory))
        else:
            for key, gain in list(child.named_parameters(recurse=False)):
                setattr(child, key, nn.Parameter(torch.ones(gain.shape, **factory)))
            _replace_weights(child, ops, factory)


def refuse_fp16(dtype: torch.dtype | None) -> None:
    """Raise ErnieError for torch.float16."""
    if dtype is torch.float16:
        raise ErnieError(
            "the text encoder cannot run in float16: its activations exceed 65504; use bfloat16 or float32."
        )


class Decoder(nn.Module):
    """Embedding and causal decoder layers of a Mistral-family language model.

    The modules are transformers' own, hoisted out of its model class, so that state_dict() has the bare names
    `embed_tokens.weight`, `layers.N...` and, where it is asked for, `norm.weight`. Rope frequencies are a
    plain attribute, not a buffer: they stay fp32 whatever `.to(dtype)` does, and follow the input's device.
    """

    compute_dtype: torch.dtype | None = None
    """Dtype of activations where `ops` casts weights; None = the embedding's (bfloat16 for 8-bit storage)."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        num_layers: int,
        ops: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rope: Rope = "yarn",
        final_norm: bool = False,
    ):
        super().__init__()
        refuse_fp16(dtype)
        model = _language_model(config, num_layers, rope)
        _replace_weights(model, ops or nn, {"dtype": dtype, "device": device})
        self.embed_tokens: nn.Embedding = model.embed_tokens
        self.layers: nn.ModuleList = model.layers
        if final_norm:
            self.norm: nn.Module = model.norm
        self.inverse_frequencies: Tensor = model.rotary_emb.inv_freq.detach().clone()
        self._cos_scale: float = model.rotary_emb.attention_scaling

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embeddings [B, T, D] of `ids_BT`, in the dtype that the layers run in."""
        weight_dtype = self.embed_tokens.weight.dtype
        dtype = self.compute_dtype or (torch.bfloat16 if weight_dtype.itemsize == 1 else weight_dtype)
        refuse_fp16(dtype)
        if type(self.embed_tokens).forward is nn.Embedding.forward:
            return self.embed_tokens(ids_BT)
        return self.embed_tokens(ids_BT, out_dtype=dtype)  # casting Embeddings take the dtype to emit (comfy.ops)

    def run_layers(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Hidden states [B, T, D] after the last layer held here.

        `cache`: a transformers cache that holds the prefix of these ids, and is extended by them; one new
        token at a time once it is not empty. Runs on the device of `ids_BT`.
        """
        start = 0 if cache is None else cache.get_seq_length()
        length = ids_BT.shape[1]
        assert start == 0 or length == 1, (start, length)  # sdpa's causal mask is aligned to the first key
        x_BTD = self.embed(ids_BT)
        positions_1T = torch.arange(start, start + length, device=ids_BT.device)[None]
        # fp32: bf16 cannot tell positions beyond 256 apart
        angles_1TK = positions_1T[..., None].float() * self.inverse_frequencies.to(ids_BT.device)
        angles_1TK = torch.cat([angles_1TK, angles_1TK], dim=-1)
        rotation = tuple((part * self._cos_scale).to(x_BTD.dtype) for part in (angles_1TK.cos(), angles_1TK.sin()))
        for layer in self.layers:
            x_BTD = layer(
                x_BTD,
                attention_mask=None,  # with sdpa: causal
                position_ids=positions_1T,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rotation,
            )
        return x_BTD


class TextEncoder(Decoder):
    """Prompt tokens to the hidden states that condition the DiT: all layers but the last, no final norm."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        ops: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rope: Rope = "yarn",
    ):
        """Build with `ops`' own initial weights.

        Args:
            config: the text_config of `text_encoder/config.json`, or that whole file.
            ops: namespace with Linear and Embedding; None = torch.nn.
            dtype: of weights and activations; float16 is refused.
            rope: "yarn" = frequencies as the config says (the released ones are YaRN); "plain" = unscaled, as
                ComfyUI core computes them.
        """
        config = config.get("text_config", config)
        num_layers = int(config.get("num_hidden_layers") or 0)
        super().__init__(config, num_layers=num_layers - 1, ops=ops, dtype=dtype, device=device, rope=rope)

    def encode_padded(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] of right-padded ids, with gradients; rows past a prompt's end are noise."""
        return self.run_layers(ids_BT)

    @torch.no_grad()
    def encode_ids(self, batch: Sequence[Sequence[int]], *, device: torch.device | str | None = None) -> list[Tensor]:
        """Hidden states [T_i, D] per prompt at its true length, all prompts in one call.

        `device` None = where the embedding lies. Raises ErnieError on an empty prompt or an id outside the
        vocabulary.
        """
        if not batch:
            return []
        num_embeddings = self.embed_tokens.num_embeddings
        for ids in batch:
            if not ids:
                raise ErnieError('a prompt without tokens; encode "" as [BOS].')
            if max(ids) >= num_embeddings:
                raise ErnieError(
                    f"token id {max(ids)} is outside the text encoder's vocabulary of {num_embeddings}: "
                    "the tokenizer belongs to another model."
                )
        longest = max(map(len, batch))
        rows = [[*ids, *([0] * (longest - len(ids)))] for ids in batch]
        ids_BT = torch.tensor(rows, dtype=torch.long, device=device or self.embed_tokens.weight.device)
        hidden_BTD = self.run_layers(ids_BT)
        return [hidden_TD[: len(ids)] for hidden_TD, ids in zip(hidden_BTD, batch, strict=True)]
