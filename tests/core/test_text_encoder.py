"""Tokenizer and text encoder: laws that need no reference implementation."""

import base64
import json
import logging
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.model.text_encoder import TEKKEN_SPECIALS, TextEncoder, TextStream, Tokenizer
from tiny_text import tekken_bytes, text_config
from torch import nn


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_tekken(tekken_bytes())


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TextEncoder(text_config()).eval()


def test_a_tekken_id_is_the_rank_plus_the_number_of_specials(tokenizer):
    assert tokenizer.encode("a", bos=False) == [32 + ord("a")]
    assert tokenizer.encode("the", bos=False) == [32 + 257]
    assert len(tokenizer) == 32 + 259


def test_specials_missing_from_a_tekken_file_get_their_known_names(tokenizer):
    ids = [tokenizer.encode(name, bos=False) for name in TEKKEN_SPECIALS]
    assert ids == [[i] for i in range(20)]
    assert tokenizer.encode("<SPECIAL_20><SPECIAL_31>", bos=False) == [20, 31]


def test_specials_listed_in_a_tekken_file_are_used():
    file = json.loads(tekken_bytes())
    names = ["<unk>", "<s>", "</s>", "<odd>"]
    file["special_tokens"] = [{"rank": i, "token_str": n, "is_control": True} for i, n in reversed([*enumerate(names)])]
    assert Tokenizer.from_tekken(json.dumps(file).encode()).encode("<odd><SPECIAL_4>") == [1, 3, 4]


def test_vocabulary_beyond_the_declared_size_is_left_out():
    file = json.loads(tekken_bytes())
    file["config"]["default_vocab_size"] = 32 + 257
    assert len(Tokenizer.from_tekken(json.dumps(file).encode()).encode("the", bos=False)) == 2


@pytest.mark.parametrize("text", ["", "the cat", "the  \n\t cat\u0301 \U0001f600 \u4e2d\u6587 'x' 12"])
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_json_round_trip_keeps_every_id(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    text = "the thin cat [INST] \u00e9"
    for other in (
        Tokenizer.from_json(path),
        Tokenizer.from_json(str(path)),
        Tokenizer.from_json(tokenizer.to_json()),
    ):
        assert other.encode(text) == tokenizer.encode(text)


def test_there_is_one_bos_whatever_the_post_processor_does(tokenizer):
    file = json.loads(tokenizer.to_json())
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    adding = Tokenizer.from_json(json.dumps(file))
    for text in ("", "the cat", "<s>the cat"):
        ids = adding.encode(text)
        assert ids == tokenizer.encode(text)
        assert ids.index(1) == 0
        assert ids.count(1) == 1
    assert adding.encode("") == [1]
    assert adding.encode("", bos=False) == []


def test_a_long_prompt_is_cut_with_a_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode("x " * 3000)
    assert len(ids) == 2048
    assert ids[0] == 1
    assert "only the first 2048 are used" in caplog.text
    assert len(tokenizer.encode("x " * 3000, max_tokens=None)) > 3000


def test_decode_leaves_out_special_tokens(tokenizer):
    assert tokenizer.decode([1, *tokenizer.encode("cat", bos=False), 2, 11]) == "cat"


@pytest.mark.parametrize("data", [b"not json", b"{}", b'{"config": {"pattern": ""}, "vocab": [{}]}'], ids=len)
def test_a_file_that_is_no_tekken_is_named_so(data):
    with pytest.raises(CheckpointError, match=r"not a readable tekken\.json"):
        Tokenizer.from_tekken(data)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match=r"not a readable tokenizer\.json"):
        Tokenizer.from_json("{}")
    with pytest.raises(CheckpointError, match="no token <s> or </s>"):
        Tokenizer.from_json(
            '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'
        )


def test_streamed_text_grows_and_ends_as_the_whole_text(tokenizer):
    text = "the \U0001f600 cat \u4e2d\u6587!"
    stream = TextStream(tokenizer)
    seen = [stream.push(i) for i in tokenizer.encode(text)]
    assert seen[-1] == text
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert not any("\ufffd" in s for s in seen)


def test_keys_are_bare_and_the_last_layer_and_norm_are_absent(encoder):
    keys = set(encoder.state_dict())
    config = text_config()
    layer = {
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
    }
    kept = range(config["num_hidden_layers"] - 1)
    assert keys == {"embed_tokens.weight"} | {f"layers.{n}.{name}" for n in kept for name in layer}


def test_right_padding_and_company_do_not_change_a_prompt(encoder):
    batch = [[1], [1, 40, 50, 60, 70], [1, *range(32, 200)]]
    together = encoder.encode_ids(batch)
    assert [tuple(h.shape) for h in together] == [(len(ids), 48) for ids in batch]
    for hidden, ids in zip(together, batch, strict=True):
        assert torch.allclose(hidden, encoder.encode_ids([ids])[0], atol=1e-5)


def test_a_permuted_batch_gives_the_permuted_result(encoder):
    batch = [[1, 40], [1, 50, 60], [1, 70, 80]]
    forward, backward = encoder.encode_ids(batch), encoder.encode_ids(batch[::-1])
    for a, b in zip(forward, backward[::-1], strict=True):  # not bit for bit: threads share a batch out by row
        assert torch.allclose(a, b, atol=1e-5)


def test_later_tokens_do_not_reach_earlier_ones(encoder):
    a, b = encoder.encode_ids([[1, 40, 50, 60], [1, 40, 90, 91]])
    assert torch.allclose(a[:2], b[:2], atol=1e-6)
    assert (a[2:] - b[2:]).abs().min(dim=-1).values.max() > 0


def test_an_empty_batch_is_empty(encoder):
    assert encoder.encode_ids([]) == []


def test_bad_ids_are_refused_with_numbers(encoder):
    with pytest.raises(ErnieError, match="without tokens"):
        encoder.encode_ids([[1], []])
    with pytest.raises(ErnieError, match="token id 5000 is outside the text encoder's vocabulary of 320"):
        encoder.encode_ids([[1, 5000]])


def test_gradients_reach_every_parameter(encoder):
    encoder.encode_padded(torch.tensor([[1, 40, 50], [1, 60, 0]])).square().mean().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_encoding_prompts_tracks_no_gradients(encoder):
    assert not encoder.encode_ids([[1, 40]])[0].requires_grad


def test_fp16_is_refused_in_the_constructor_and_at_work(encoder):
    with pytest.raises(ErnieError, match="cannot run in float16"):
        TextEncoder(text_config(), dtype=torch.float16)
    with pytest.raises(ErnieError, match="cannot run in float16"):
        encoder.half().encode_ids([[1]])


def test_bf16_runs_in_bf16_with_fp32_rope(encoder):
    exact = encoder.encode_ids([[1, *range(32, 300)]])[0]
    rounded = encoder.bfloat16().encode_ids([[1, *range(32, 300)]])[0]
    assert rounded.dtype is torch.bfloat16
    assert encoder.inverse_frequencies.dtype is torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.99


def test_plain_rope_is_unscaled():
    config = text_config()
    plain, yarn = (TextEncoder(config, rope=rope, device="meta").inverse_frequencies for rope in ("plain", "yarn"))
    half = config["head_dim"] // 2
    assert torch.allclose(plain, 1e6 ** (-torch.arange(half) / half), rtol=1e-6)
    assert (yarn < plain * 0.99).any()


def test_the_wrapping_config_file_is_understood():
    text = text_config()
    wrapped = TextEncoder({"model_type": "mistral3", "text_config": text, "vision_config": {}}, device="meta")
    assert wrapped.state_dict().keys() == TextEncoder(text, device="meta").state_dict().keys()


def test_an_incomplete_config_names_what_is_missing():
    config = text_config()
    del config["intermediate_size"], config["num_hidden_layers"]
    with pytest.raises(CheckpointError, match="lacks intermediate_size, num_hidden_layers"):
        TextEncoder(config)
    with pytest.raises(CheckpointError, match="sliding-window"):
        TextEncoder(text_config() | {"sliding_window": 512})


def test_old_transformers_is_named_with_its_version(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ErnieError, match=r"transformers >= 5\.0, got 4\.57\.6"):
        TextEncoder(text_config())


class _CastingOps:
    """Weights stay where and what they are; each use casts them to the input, as the host's ops do."""

    made: ClassVar[list[nn.Module]] = []

    class Linear(nn.Linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            _CastingOps.made.append(self)

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x))

    class Embedding(nn.Embedding):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            _CastingOps.made.append(self)

        def forward(self, ids, out_dtype=None):
            return super().forward(ids).to(out_dtype)


def test_every_linear_and_embedding_comes_from_the_given_ops(encoder):
    _CastingOps.made.clear()
    hosted = TextEncoder(text_config(), ops=_CastingOps)
    hosted.load_state_dict(encoder.state_dict())
    assert [m for m in hosted.modules() if isinstance(m, nn.Linear | nn.Embedding)] == [
        m for m in hosted.modules() if m in _CastingOps.made
    ]
    assert torch.equal(hosted.encode_ids([[1, 40]])[0], encoder.encode_ids([[1, 40]])[0])


def test_the_host_decides_the_dtype_of_activations(encoder):
    hosted = TextEncoder(text_config(), ops=_CastingOps, dtype=torch.bfloat16)
    hosted.load_state_dict(encoder.state_dict())
    assert hosted.encode_ids([[1, 40]])[0].dtype is torch.bfloat16
    hosted.compute_dtype = torch.float32
    assert hosted.encode_ids([[1, 40]])[0].dtype is torch.float32
    hosted.embed_tokens.to(torch.float8_e4m3fn)
    hosted.compute_dtype = None
    assert hosted.embed(torch.tensor([[1]])).dtype is torch.bfloat16


def test_rope_survives_a_build_on_the_meta_device(encoder):
    with torch.device("meta"):
        empty = TextEncoder(text_config(), device="meta")
    empty.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(empty.encode_ids([[1, 40, 50]])[0], encoder.encode_ids([[1, 40, 50]])[0])


def test_the_byte_alphabet_covers_every_byte(tokenizer):
    file = json.loads(tekken_bytes())
    raw = [base64.b64decode(e["token_bytes"]) for e in file["vocab"][:256]]
    assert raw == [bytes([i]) for i in range(256)]
    assert all(len(tokenizer.encode(chr(i), bos=False)) == (1 if i < 128 else 2) for i in range(1, 256))
