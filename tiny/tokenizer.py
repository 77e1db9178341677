"""The tiny model's tokenizer: byte-level BPE of about a thousand entries, in both released file forms.

Ids as in the released "tekken" vocabulary, in miniature: 20 special tokens (same ids 0..19), then the 256
bytes, then merged entries in the order training found them. An id is a tekken rank plus 20 (released: 1000).

A tekken file stores no merges: its reader joins, at every step, the neighbours whose concatenation has the
lowest rank. `build_tokenizer` therefore throws the trained merge list away and writes every way of cutting
each entry into two entries, in rank order. Both forms then follow the same rule and give the same ids.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..ernie_core.model.text_encoder import TEKKEN_SPECIALS
from .scenes import (
    VALUES,
    all_scenes,
    canonical_caption,
    caption,
    long_description,
    named_facts,
    short_prompt,
)

VOCAB_SIZE = 1024
"""Upper limit; training stops earlier when nothing is left to merge."""
MODEL_MAX_LENGTH = 2048  # tokenizer_config.json of the released model
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before merging: the LLaMA 3 pattern, the one that ComfyUI 0.33 reads tekken with."""
CHAT_TEMPLATE = Path(__file__).resolve().parents[1] / "ernie_core" / "model" / "pe_chat_template.jinja"
_CORPUS_SCENES = 1500


def make_corpus() -> list[str]:
    """The texts that the vocabulary is trained on: captions, prompts, descriptions, enhancer requests."""
    scenes = all_scenes()
    rng = np.random.default_rng(0)
    # Twice, so that each word becomes one entry both at the start of a text and after a space.
    words = sorted({word for values in VALUES.values() for value in values for word in value.split()})
    texts = [form for word in words for form in (word, f" {word}")] * 2
    for index in rng.choice(len(scenes), size=_CORPUS_SCENES, replace=False):
        scene = scenes[index]
        prompt = short_prompt(scene, rng)
        request = json.dumps({"prompt": prompt, "width": 128, "height": 128})
        described = long_description(named_facts(scene), rng)
        texts += [canonical_caption(scene), caption(scene, rng), prompt, request, described]
    # Written once per few requests: the fixed Chinese instruction is as long as a description.
    texts += [_system_prompt()] * (_CORPUS_SCENES // 10)
    return texts


@cache
def _trained_entries() -> tuple[bytes, ...]:
    """All byte strings of the vocabulary by rank: the 256 bytes, then the merged ones."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TEKKEN_SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
        min_frequency=2,
    )
    trained.train_from_iterator(make_corpus(), trainer)
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    merged = [_to_bytes(text) for text, _ in by_id if len(text) > 1]
    return (*(bytes([value]) for value in range(256)), *merged)


def build_tokenizer(*, prepend_bos: bool = True) -> Tokenizer:
    """The tokenizer, trained anew (under a second, always the same).

    `prepend_bos` is for the text encoder's `tokenizer/`; the enhancer's `pe_tokenizer/` adds nothing, because
    its chat template writes the `<s>` itself.
    """
    entries = _trained_entries()
    offset = len(TEKKEN_SPECIALS)
    vocab = {text: index for index, text in enumerate(TEKKEN_SPECIALS)}
    vocab.update({_to_text(entry): rank + offset for rank, entry in enumerate(entries)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_implied_merges(entries)))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in TEKKEN_SPECIALS])
    if prepend_bos:
        bos = TEKKEN_SPECIALS[1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 1)]
        )
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """The content of `tokenizer_config.json`, with the released file's class and tokens."""
    return {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": MODEL_MAX_LENGTH,
        "tokenizer_class": "TokenizersBackend",
        "clean_up_tokenization_spaces": False,
    }


def save_tokenizer(folder: Path) -> None:
    """Write the text encoder's `tokenizer.json` and `tokenizer_config.json` into a new or old folder."""
    _save(folder, build_tokenizer())


def save_pe_tokenizer(folder: Path) -> None:
    """Write the enhancer's tokenizer files, with its `chat_template.jinja`, into a new or old folder."""
    _save(folder, build_tokenizer(prepend_bos=False))
    (folder / "chat_template.jinja").write_bytes(CHAT_TEMPLATE.read_bytes())


def _save(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n", encoding="utf-8")


def to_tekken_bytes(tokenizer: Tokenizer) -> bytes:
    """The same vocabulary as a tekken.json, as mistral-common and the single-file text encoders hold it.

    `tokenizer` is one that `build_tokenizer` made. Readers get its ids, less the `<s>` in front.
    """
    offset = len(TEKKEN_SPECIALS)
    by_id = sorted((index, text) for text, index in tokenizer.get_vocab().items() if index >= offset)
    vocab = []
    for index, text in by_id:
        entry = _to_bytes(text)
        vocab.append(
            {
                "rank": index - offset,
                "token_bytes": base64.b64encode(entry).decode("ascii"),
                "token_str": _readable(entry),
            }
        )
    content: Mapping[str, object] = {
        "config": {
            "pattern": SPLIT_PATTERN,
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": len(vocab) + offset,
            "default_num_special_tokens": offset,
            "version": "v7",
        },
        "vocab": vocab,
        "special_tokens": [
            {"rank": index, "token_str": text, "is_control": True} for index, text in enumerate(TEKKEN_SPECIALS)
        ],
    }
    return json.dumps(content, ensure_ascii=False).encode("utf-8")


def _system_prompt() -> str:
    """The fixed instruction inside the enhancer's chat template."""
    match = re.search(r"\[SYSTEM_PROMPT\](.+?)\[/SYSTEM_PROMPT\]", CHAT_TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    assert match, f"no system prompt in {CHAT_TEMPLATE.name}"
    return match[1]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _implied_merges(entries: tuple[bytes, ...]) -> list[tuple[str, str]]:
    """Every cut of every entry into two entries, by the entry's rank, then by the ranks of the two parts."""
    ranks = {entry: rank for rank, entry in enumerate(entries)}
    merges = []
    for entry in entries:
        cuts = [(entry[:at], entry[at:]) for at in range(1, len(entry))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return [(_to_text(left), _to_text(right)) for left, right in merges]


@cache
def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    return {value: chr(value) for value in plain} | {value: chr(256 + k) for k, value in enumerate(others)}


def _to_text(entry: bytes) -> str:
    return "".join(_byte_letters()[value] for value in entry)


def _to_bytes(text: str) -> bytes:
    values = {letter: value for value, letter in _byte_letters().items()}
    return bytes(values[letter] for letter in text)


def _readable(entry: bytes) -> str | None:
    """The entry as text, or None where it is not whole UTF-8 (as tekken files write it)."""
    try:
        return entry.decode("utf-8")
    except UnicodeDecodeError:
        return None
