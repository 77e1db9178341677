"""Prompt enhancer: laws that need no reference implementation."""

import json
import logging

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.model.enhancer import (
    CHAT_TEMPLATE,
    Enhancer,
    default_system_prompt,
    draw_token,
    make_processors,
    render_prompt,
)
from ernie_pack.ernie_core.model.kv_cache import KeyValueCache
from ernie_pack.ernie_core.model.text_encoder import Tokenizer
from tiny_text import tekken_bytes, text_config
from torch.nn.functional import one_hot

OFF = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_tekken(tekken_bytes())


@pytest.fixture
def enhancer(tokenizer):
    torch.manual_seed(0)
    enhancer = Enhancer(text_config("ministral3") | {"vocab_size": len(tokenizer)}, tokenizer).eval()
    torch.nn.init.normal_(enhancer.embed_tokens.weight, std=0.05)  # flat logits: every token is likely
    return enhancer


def _say(enhancer, monkeypatch, text):
    """Make the model's likeliest continuation `text`, then </s>, whatever it read."""
    size = enhancer.embed_tokens.num_embeddings
    ids = iter([*enhancer.tokenizer.encode(text, bos=False), enhancer.tokenizer.eos_id])
    monkeypatch.setattr(enhancer, "run_layers", lambda *_: one_hot(torch.tensor([[next(ids)]]), size).float())
    monkeypatch.setattr(enhancer, "norm", torch.nn.Identity())
    monkeypatch.setattr(enhancer, "output_weight", lambda _: 100 * torch.eye(size))


def test_the_prompt_travels_as_json_behind_one_bos(tokenizer):
    prompt = 'say "hi" \\ \n <b> \u96ea'
    text = render_prompt(prompt, 512, 384)
    head, user = text.split("[INST]")
    assert head == f"<s>[SYSTEM_PROMPT]{default_system_prompt()}[/SYSTEM_PROMPT]"
    assert user.endswith("[/INST]")
    assert json.loads(user.removesuffix("[/INST]")) == {"prompt": prompt, "width": 512, "height": 384}
    assert "\u96ea" in user
    assert "\n" not in text
    assert tokenizer.encode(text).count(tokenizer.bos_id) == 1


def test_another_instruction_takes_the_place_of_the_official_one():
    user = '[INST]{"prompt": "cat", "width": 16, "height": 32}[/INST]'
    text = render_prompt("cat", 16, 32, system="Write in English.")
    assert text == "<s>[SYSTEM_PROMPT]Write in English.[/SYSTEM_PROMPT]" + user


def test_the_template_is_the_official_file():
    data = CHAT_TEMPLATE.read_bytes()
    assert len(data) == 615
    assert len(default_system_prompt()) == 107


@pytest.mark.parametrize("size", [(0, 512), (512, -16), (512.5, 512)], ids=str)
def test_a_size_that_is_no_number_of_pixels_is_refused(size):
    with pytest.raises(ErnieError, match=r"(width|height) must be a whole number of pixels, 1 or more, got"):
        render_prompt("cat", *size)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -1, r"0 \(greedy\) or more, got -1"),
        ("temperature", float("nan"), "got nan"),
        ("top_p", 0, r"above 0 and at most 1 \(1 = off\), got 0"),
        ("top_p", 1.5, "got 1.5"),
        ("top_k", -1, r"0 \(off\) or more, got -1"),
        ("min_p", 2, "got 2"),
        ("repetition_penalty", 0, r"above 0 \(1 = off\), got 0"),
        ("max_new_tokens", 0, "1 or more, got 0"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(enhancer, name, value, expected):
    with pytest.raises(ErnieError, match=f"{name} must be .*{expected}"):
        enhancer.enhance("cat", 64, 64, **{name: value})


def test_processors_at_their_neutral_values_change_nothing():
    scores = torch.randn(1, 50)
    assert torch.equal(make_processors(**OFF)(torch.arange(5)[None], scores), scores)


@pytest.mark.parametrize(
    ("setting", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 0.6}, 2), ({"min_p": 0.5}, 2), ({"temperature": 0.01, "min_p": 0.5}, 1)],
    ids=str,
)
def test_each_cut_keeps_what_it_should(setting, kept):
    scores = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log()
    cut = make_processors(**OFF | setting)(torch.tensor([[0]]), scores)
    assert int(cut.isfinite().sum()) == kept


def test_repetition_penalty_lowers_what_was_said_and_works_when_greedy():
    scores = torch.tensor([[2.0, 1.9, -1.0]])
    process = make_processors(**OFF | {"temperature": 0, "repetition_penalty": 2.0, "top_k": 1})
    assert process(torch.tensor([[0, 2]]), scores).tolist() == [[1.0, pytest.approx(1.9), -2.0]]


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    counts = torch.bincount(
        torch.tensor([draw_token(probabilities.log()[None], generator) for _ in range(4000)]), minlength=6
    )
    assert counts[probabilities == 0].sum() == 0
    assert (counts / 4000 - probabilities).abs().max() < 0.03


def test_a_seed_is_a_text_and_another_seed_another(enhancer):
    a, b, c = (enhancer.enhance("cat", 64, 64, seed=seed, max_new_tokens=20) for seed in (3, 3, 4))
    assert a == b != c


def test_the_global_generator_is_neither_read_nor_moved(enhancer):
    torch.manual_seed(1)
    a = enhancer.enhance("cat", 64, 64, max_new_tokens=10)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())
    torch.manual_seed(2)
    assert enhancer.enhance("cat", 64, 64, max_new_tokens=10) == a


def test_greedy_ignores_the_seed(enhancer):
    a, b = (enhancer.enhance("cat", 64, 64, seed=seed, temperature=0, max_new_tokens=20) for seed in (3, 4))
    assert a == b


def test_cached_steps_equal_whole_passes(enhancer):
    from transformers import DynamicCache

    ids = torch.tensor([[1, *range(40, 60)]])
    cache = DynamicCache()
    steps = [enhancer.run_layers(part, cache) for part in (ids[:, :9], *ids[:, 9:].split(1, dim=1))]
    assert torch.allclose(torch.cat(steps, dim=1), enhancer.run_layers(ids), atol=1e-5)


def test_our_cache_gives_what_transformers_gives_bit_for_bit(enhancer):
    from transformers import DynamicCache

    ids = torch.tensor([[1, *range(40, 60)]])
    steps = [
        [enhancer.run_layers(part, cache) for part in (ids[:, :9], *ids[:, 9:].split(1, dim=1))]
        for cache in (KeyValueCache(21), DynamicCache())
    ]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*steps, strict=True))


def test_the_cache_takes_its_memory_once(enhancer):
    cache = KeyValueCache(30)
    enhancer.run_layers(torch.tensor([[1, 40, 41]]), cache)
    places = [t.data_ptr() for t in cache._keys + cache._values]
    for token in range(42, 60):
        enhancer.run_layers(torch.tensor([[token]]), cache)
    assert [t.data_ptr() for t in cache._keys + cache._values] == places
    assert cache.get_seq_length() == 21


def test_a_cache_that_was_cut_or_repeated_goes_on_as_if_new(enhancer):
    start, token = torch.tensor([[1, 40, 41, 42]]), torch.tensor([[50]])
    fresh, cache = KeyValueCache(9), KeyValueCache(9)
    enhancer.run_layers(start, fresh)
    enhancer.run_layers(start, cache)
    expected = enhancer.run_layers(token, fresh)
    rows = enhancer.run_layers(token.expand(3, 1), cache.repeat(3))
    assert torch.allclose(rows, expected.expand(3, -1, -1), atol=1e-5)
    enhancer.run_layers(torch.tensor([[60]]), cache)
    cache.cut(4)
    assert torch.equal(enhancer.run_layers(token, cache), expected)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_each_variant_is_what_its_seed_says_alone(enhancer, at_once):
    seeds = [3, 9, 4, 3]
    texts = enhancer.enhance_variants("cat", 64, 64, seeds=seeds, max_new_tokens=20, at_once=at_once)
    assert texts == [enhancer.enhance("cat", 64, 64, seed=seed, max_new_tokens=20) for seed in seeds]
    assert texts[0] == texts[3] != texts[1]


def test_variants_may_end_at_different_lengths(enhancer, caplog):
    seeds = range(12)
    enhancer.eos_ids = frozenset(range(40, 60))
    seen: dict[int, str] = {}
    texts = enhancer.enhance_variants(
        "cat", 64, 64, seeds=seeds, max_new_tokens=40, at_once=5, on_token=lambda row, text: seen.update({row: text})
    )
    assert texts == [enhancer.enhance("cat", 64, 64, seed=seed, max_new_tokens=40) for seed in seeds]
    assert len({len(text) for text in texts}) > 3
    assert all(texts[row] == text.strip() for row, text in seen.items() if "\ufffd" not in text + texts[row])


def test_variants_read_the_prompt_once(enhancer, monkeypatch):
    lengths = []
    embed = enhancer.embed
    monkeypatch.setattr(enhancer, "embed", lambda ids: (lengths.append(tuple(ids.shape)), embed(ids))[1])
    enhancer.enhance_variants("cat", 64, 64, seeds=[1, 2, 3], max_new_tokens=4, at_once=3)
    assert lengths == [(1, len(enhancer.tokenizer.encode(render_prompt("cat", 64, 64)))), *[(3, 1)] * 3]


def test_the_prefix_is_read_once(enhancer, monkeypatch):
    lengths = []
    embed = enhancer.embed
    monkeypatch.setattr(enhancer, "embed", lambda ids: (lengths.append(ids.shape[1]), embed(ids))[1])
    enhancer.enhance("cat", 64, 64, max_new_tokens=6, temperature=0)
    assert lengths[0] == len(enhancer.tokenizer.encode(render_prompt("cat", 64, 64)))
    assert set(lengths[1:]) == {1}


def test_the_answer_ends_at_eos_without_specials_or_margins(enhancer, monkeypatch, caplog):
    seen = []
    _say(enhancer, monkeypatch, "  a \U0001f600 [INST]cat \u4e2d\n")
    with caplog.at_level(logging.WARNING):
        text = enhancer.enhance("x", 64, 64, on_token=seen.append)
    assert text == "a \U0001f600 cat \u4e2d"
    assert seen[-1].strip() == text
    assert not any("\ufffd" in s for s in seen)
    assert caplog.text == ""


def test_an_answer_that_is_cut_is_returned_with_one_warning(enhancer, monkeypatch, caplog):
    _say(enhancer, monkeypatch, "a long story")
    with caplog.at_level(logging.WARNING):
        assert enhancer.enhance("x", 64, 64, max_new_tokens=6) == "a long"
    assert caplog.text.count("cut at 6 tokens") == 1


def test_an_empty_answer_gives_the_prompt_back_with_a_warning(enhancer, monkeypatch, caplog):
    _say(enhancer, monkeypatch, " \n")
    with caplog.at_level(logging.WARNING):
        assert enhancer.enhance("my cat", 64, 64) == "my cat"
    assert "original prompt is used" in caplog.text


def test_on_token_cancels_by_raising(enhancer):
    seen = []

    def stop(text):
        seen.append(text)
        if len(seen) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        enhancer.enhance("cat", 64, 64, on_token=stop, max_new_tokens=50)
    assert len(seen) == 3


def test_a_prompt_beyond_the_context_is_refused_with_counts(tokenizer):
    config = text_config("ministral3") | {"vocab_size": len(tokenizer), "max_position_embeddings": 400}
    small = Enhancer(config, tokenizer)
    length = len(tokenizer.encode(render_prompt("x" * 500, 64, 64), max_tokens=None))
    with pytest.raises(
        ErnieError, match=f"has {length} tokens; the enhancer holds 400.*leave out {length - 399} or more"
    ):
        small.enhance("x" * 500, 64, 64)


def test_the_context_also_bounds_the_answer(tokenizer, caplog):
    length = len(tokenizer.encode(render_prompt("x", 64, 64)))
    config = text_config("ministral3") | {"vocab_size": len(tokenizer), "max_position_embeddings": length + 5}
    seen = []
    Enhancer(config | {"eos_token_id": []}, tokenizer).enhance("x", 64, 64, on_token=seen.append)
    assert len(seen) == 5
    assert "cut at 5 tokens" in caplog.text


def test_keys_are_bare_with_all_layers_and_the_norm(enhancer):
    keys = enhancer.state_dict().keys()
    assert {"embed_tokens.weight", "norm.weight", "layers.3.mlp.up_proj.weight"} <= keys
    assert len(keys) == 2 + 4 * 9
