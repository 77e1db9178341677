"""The two forms of the tiny tokenizer are one: the same ids, which turn back into the text."""

from __future__ import annotations

import base64
import itertools
import json

import pytest
from ernie_pack.tiny import tokenizer as t
from ernie_pack.tiny.scenes import VALUES
from tokenizers import Tokenizer

CORPUS = sorted(set(t.make_corpus()))[::15]
ODD_TEXTS = [
    "",
    " ",
    "\n\n  tabs\tand é ü 4096 pixels!",
    "An unusual RED thing, isn't it?",
    "\u732b\u3068\u72ac \U0001f600",
]


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return t.build_tokenizer(prepend_bos=False)


def tekken_ids(content: dict, text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode as a tekken reader does: join the neighbours whose concatenation ranks lowest."""
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"]}
    ids = []
    pieces, letters = tokenizer.pre_tokenizer.pre_tokenize_str(text), t._byte_letters()
    values = {letter: value for value, letter in letters.items()}
    for piece, _ in pieces:
        parts = [bytes([values[letter]]) for letter in piece]
        while len(parts) > 1:
            joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] == len(ranks):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [ranks[part] + content["config"]["default_num_special_tokens"] for part in parts]
    return ids


def test_special_tokens_have_the_released_ids(plain):
    for index, text in enumerate(t.TEKKEN_SPECIALS):
        assert plain.token_to_id(text) == index
        assert plain.encode(text).ids == [index]
    assert (t.TEKKEN_SPECIALS[11], t.TEKKEN_SPECIALS[17], len(t.TEKKEN_SPECIALS)) == (
        "<pad>",
        "[SYSTEM_PROMPT]",
        20,
    )


def test_vocabulary_is_small_and_covers_every_byte(plain):
    assert plain.get_vocab_size() <= t.VOCAB_SIZE
    assert {plain.token_to_id(letter) for letter in t._byte_letters().values()} == set(range(20, 276))


def test_building_twice_gives_the_same_tokenizer(plain):
    t._trained_entries.cache_clear()
    assert t.build_tokenizer(prepend_bos=False).to_str() == plain.to_str()


def test_every_word_is_one_token(plain):
    words = {word for values in VALUES.values() for value in values for word in value.split()}
    for word in words | {"background"}:
        assert len(plain.encode(f" {word}").ids) == 1, word


@pytest.mark.parametrize("texts", [CORPUS, ODD_TEXTS], ids=["corpus", "odd"])
def test_decoding_gives_the_text_back(plain, texts):
    for text in texts:
        assert plain.decode(plain.encode(text).ids) == text


@pytest.mark.parametrize("texts", [CORPUS, ODD_TEXTS], ids=["corpus", "odd"])
def test_tekken_form_gives_the_same_ids(plain, texts):
    content = json.loads(t.to_tekken_bytes(plain))
    for text in texts:
        assert tekken_ids(content, text, plain) == plain.encode(text).ids, text


def test_mistral_common_reads_the_tekken_form(plain, tmp_path):
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    path = tmp_path / "tekken.json"
    path.write_bytes(t.to_tekken_bytes(plain))
    reader = tekken.Tekkenizer.from_file(path)
    assert reader.n_words == plain.get_vocab_size()
    for text in CORPUS + ODD_TEXTS:
        assert reader.encode(text, bos=False, eos=False) == plain.encode(text).ids, text


def test_bos_comes_first_only_for_the_text_encoder(plain):
    with_bos = t.build_tokenizer()
    assert with_bos.encode("a red circle").ids == [1, *plain.encode("a red circle").ids]
    assert with_bos.encode("").ids == [1]
    assert plain.encode("").ids == []


def test_saved_files_read_back(plain, tmp_path):
    t.save_tokenizer(tmp_path / "tokenizer")
    t.save_pe_tokenizer(tmp_path / "pe_tokenizer")
    text = "a small red circle at the top on a grey background"
    for name, expected in (
        ("tokenizer", [1, *plain.encode(text).ids]),
        ("pe_tokenizer", plain.encode(text).ids),
    ):
        assert Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")).encode(text).ids == expected
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert (config["pad_token"], config["model_max_length"]) == ("<pad>", 2048)
    template = (tmp_path / "pe_tokenizer" / "chat_template.jinja").read_bytes()
    assert template == t.CHAT_TEMPLATE.read_bytes()


def test_an_enhancer_request_has_each_special_token_once(plain):
    request = json.dumps({"prompt": "a red circle", "width": 128, "height": 128})
    text = f"<s>[SYSTEM_PROMPT]{t._system_prompt()}[/SYSTEM_PROMPT][INST]{request}[/INST]"
    ids = plain.encode(text).ids
    assert [index for index in ids if index < len(t.TEKKEN_SPECIALS)] == [1, 17, 18, 3, 4]
    assert plain.decode(ids, skip_special_tokens=False) == text
