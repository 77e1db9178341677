"""Captions are drawn by seed and sample number alone; every text that can be drawn is known ahead."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.text_encoder import Tokenizer
from ernie_pack.ernie_core.training.captions import (
    Caption,
    CaptionRules,
    all_texts,
    apply_trigger,
    draw_caption,
    draw_uniform,
    keyword_columns,
    shuffle_tags,
)
from ernie_pack.ernie_core.training.items import DatasetOptions
from tiny_text import tekken_bytes

NO_RULES = CaptionRules()


@dataclass(frozen=True)
class Entry:
    captions: tuple = ()
    rules: CaptionRules = NO_RULES


ENTRY = Entry(
    (
        *(Caption("caption", "red apple, on a table, photo, 4k, still life"), Caption("caption", "an apple")),
        *(Caption("keyword", "apple, red"), Caption("sentence", "A red apple lies there, alone, at night.")),
    )
)


def draws(entry, count=4000, seed=0, **options):
    rules = CaptionRules(**{k: options.pop(k) for k in list(options) if k in CaptionRules.__dataclass_fields__})
    options = DatasetOptions(rules=rules, **options)
    return Counter(draw_caption(entry, options, seed=seed, number=n) for n in range(count)), options


def test_drawing_is_a_function_of_seed_and_number():
    options = DatasetOptions(rules=CaptionRules(shuffle=True, dropout=0.2))

    def run(seed, numbers):
        return {n: draw_caption(ENTRY, options, seed=seed, number=n) for n in numbers}

    forward = run(3, range(50))
    assert run(3, reversed(range(50))) == forward
    assert run(4, range(50)) != forward


def test_a_draw_never_changes_between_versions():
    """Golden: BLAKE2b of the key; a resumed run depends on it."""
    assert draw_uniform("dropout", 0, 0) == 0.09009033039914771
    assert shuffle_tags("a, b, c, d, e", 1) == "c, d, b, a, e"


@pytest.mark.parametrize("dropout", [0.05, 0.3])
def test_dropout_gives_the_empty_prompt_at_its_rate(dropout):
    counts, _ = draws(ENTRY, dropout=dropout)
    assert abs(counts[""] / 4000 - dropout) < 4 * math.sqrt(dropout * (1 - dropout) / 4000)


def test_without_dropout_the_empty_prompt_is_never_drawn_and_with_1_always():
    assert draws(ENTRY)[0][""] == 0
    assert set(draws(ENTRY, dropout=1.0)[0]) == {""}


def test_styles_are_drawn_by_their_weights():
    counts, _ = draws(ENTRY, styles=(("keyword", 1.0), ("sentence", 3.0), ("unknown", 5.0)))
    assert set(counts) == {"apple, red", "A red apple lies there, alone, at night."}
    assert abs(counts["apple, red"] / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_without_a_mix_all_styles_come_alike_and_captions_of_a_style_too():
    counts, _ = draws(ENTRY)
    for text, share in (("apple, red", 1 / 3), ("an apple", 1 / 6)):
        assert abs(counts[text] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_a_mix_that_names_none_of_the_styles_leaves_all():
    assert set(draws(ENTRY, styles=(("other", 1.0),))[0]) == set(draws(ENTRY)[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True}, {"shuffle": True, "keep_tokens": 1, "dropout": 0.1, "trigger": "sks"}, {"dropout": 1.0}],
    ids=["plain", "shuffle", "all", "dropped"],
)
@pytest.mark.parametrize("styles", [(), (("keyword", 1.0), ("sentence", 0.0))])
def test_the_texts_known_ahead_are_exactly_those_that_can_be_drawn(options, styles):
    counts, made = draws(ENTRY, styles=styles, **options)
    assert set(all_texts([ENTRY], made)) == set(counts) | {""}
    assert all_texts([ENTRY], made)[0] == ""


def test_shuffling_keeps_the_tags_the_first_ones_and_every_sentence():
    counts, _ = draws(ENTRY, shuffle=True, keep_tokens=2, shuffle_variants=3)
    orders = [text for text in counts if "4k" in text]
    assert 1 < len(orders) <= 3
    assert all(text.startswith("red apple, on a table, ") for text in orders)
    assert {tuple(sorted(text.split(", "))) for text in orders} == {
        ("4k", "on a table", "photo", "red apple", "still life")
    }
    assert "A red apple lies there, alone, at night." in counts


def test_a_separator_of_ones_own():
    assert sorted(shuffle_tags("a, b; c ;; d", 0, separator=";").split("; ")) == ["a, b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a [trigger] in [trigger] style", "a sks in sks style"),
        ("a dog", "sks, a dog"),
        ("an SKS dog", "an SKS dog"),
        ("", "sks"),
    ],
)
def test_a_trigger_replaces_its_mark_or_goes_in_front(text, expected):
    assert apply_trigger(text, "sks") == expected
    assert apply_trigger(text, "") == text


def test_the_rules_of_the_options_go_over_those_of_the_entry():
    entry = Entry((Caption("caption", "x"),), CaptionRules(trigger="own", dropout=1.0))
    assert draws(entry, dropout=0.0)[0] == {"own, x": 4000}
    assert set(draws(entry, trigger="other", dropout=0.0)[0]) == {"other, x"}
    assert set(draws(entry)[0]) == {""}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"dropout": 1.5}, "between 0 and 1, got 1.5"),
        ({"keep_tokens": -1}, "0 or more"),
        ({"separator": " "}, "visible"),
    ],
)
def test_rules_out_of_range_say_so(rules, message):
    with pytest.raises(ErnieError, match=message):
        CaptionRules(**rules)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_tekken(tekken_bytes())


def columns(text, keywords, tokenizer):
    """Columns by cutting the text at every token: what each token spells, read off one by one."""
    ids = tokenizer.encode(text)
    return [tokenizer.decode([ids[c]]) for c in keyword_columns(text, keywords, tokenizer)]


def test_keyword_columns_spell_the_keywords(tokenizer):
    assert "".join(columns("the Red apple, a redhead and red", ["red"], tokenizer)) == "Redred"
    assert "".join(columns("the cat", ["the cat"], tokenizer)) == "the cat"
    assert columns("the cat", ["dog", ""], tokenizer) == []


def test_keyword_columns_never_hold_the_bos_and_lie_inside_the_text(tokenizer):
    text = "cat \U0001f431 \u732b\u306e\u7d75 cat"
    found = keyword_columns(text, ["cat", "\u732b", "\U0001f431"], tokenizer)
    assert 0 not in found
    assert max(found) < len(tokenizer.encode(text))
    # 3 + 3 letters, 4 bytes of the emoji, 3 bytes of the character that stands inside a word
    assert len(found) == 3 + 4 + 3 + 3
