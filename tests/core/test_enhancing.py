"""Asking for a detailed prompt: quotes found, kept or reported; variants, instructions, and what lies on the disk."""

import json
import logging

import pytest
from ernie_pack.ernie_core.enhancing.disk_cache import DiskCache, fingerprint
from ernie_pack.ernie_core.enhancing.quotes import missing_texts, quoted_texts
from ernie_pack.ernie_core.enhancing.writing import (
    PRESETS,
    Answer,
    Request,
    answer_requests,
    instruction,
    retry_seed,
    variants,
)
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.enhancer import default_system_prompt, make_processors

ASK = Request(prompt='a sign "OPEN"', width=64, height=64, seed=5, settings={"temperature": 0.6})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign "OPEN 24/7", a cup', ["OPEN 24/7"]),
        ("it's the cat's hat, dogs' bowls", []),
        ("a shirt with 'Rock 'n' Roll' on it", ["Rock 'n"]),
        ("titled 'Night Shift', bold", ["Night Shift"]),
        ("don't write 'SALE' here", ["SALE"]),
        ("\u5199\u6709\u201c\u6625\u5929\u201d\u7684\u95e8\u724c", ["\u6625\u5929"]),
        ("\u300c\u5317\u53e3\u300d\u3068\u300e\u51fa\u53e3\u300f", ["\u5317\u53e3", "\u51fa\u53e3"]),
        ("\u00abBonjour\u00bb und \u201eTag\u201c", ["Bonjour", "Tag"]),
        ("\u2018Hello\u2019 it\u2019s", ["Hello"]),
        ('a 5" by 7" frame', []),
        ('a lone " mark', []),
        ('""', []),
        ('"A" and "A" and "B"', ["A", "B"]),
        ('"say \u201chi\u201d now"', ["say \u201chi\u201d now"]),
        ('\u5199\u7740"\u6625"\u5b57', ["\u6625"]),
        ("", []),
    ],
)
def test_quoted_text_is_found(prompt, expected):
    assert quoted_texts(prompt) == expected


def test_a_text_counts_as_kept_only_letter_by_letter():
    assert missing_texts('"Grand Opening" and "50%"', "A banner says Grand opening, 50% off.") == ["Grand Opening"]


def writer(*answers):
    """A `write` that hands out answers in turn, and what it was asked."""
    asked, rest = [], iter(answers)

    def write(seeds, numbers):
        asked.append((list(seeds), list(numbers)))
        return [next(rest) for _ in seeds]

    return write, asked


def test_an_answer_that_keeps_its_quotes_is_left_as_it_is():
    write, asked = writer("the sign OPEN glows")
    assert answer_requests(write, [ASK], [0]) == [Answer(text="the sign OPEN glows")]
    assert asked == [([5], [0])]


def test_only_answers_that_lost_text_are_written_anew_with_seeds_of_their_own():
    write, asked = writer("OPEN a", "lost", "OPEN c", "OPEN b")
    answers = answer_requests(write, variants(ASK, 3), [0, 1, 2])
    assert [a.text for a in answers] == ["OPEN a", "OPEN b", "OPEN c"]
    assert asked == [([5, 6, 7], [0, 1, 2]), ([retry_seed(6, 1)], [1])]
    assert answers[1].notes == ("quoted text was lost at first: written 2 times",)


def test_what_stays_lost_is_added_or_reported_and_never_without_a_word(caplog):
    for quotes, text in (("append", 'lost The picture shows the text "OPEN".'), ("report", "lost")):
        write, asked = writer(*["lost"] * 3)
        ask = Request(**{**vars(ASK), "quotes": quotes})
        with caplog.at_level(logging.WARNING):
            (answer,) = answer_requests(write, [ask], [0])
        assert len(asked) == 3
        assert answer.text == text
        assert "OPEN" in answer.notes[-1]
        assert '"OPEN"' in caplog.text
        caplog.clear()


def test_the_added_sentence_is_in_the_answers_language_and_keeps_the_text_verbatim():
    ask = Request(**{**vars(ASK), "prompt": 'shows \u201csay "hi"\u201d', "retries": 0})
    for reply in ("lost", "\u4e00\u53ea\u732b\u5750\u5728\u6728\u684c\u4e0a"):
        write, _ = writer(reply)
        (answer,) = answer_requests(write, [ask], [0])
        assert missing_texts(ask.prompt, answer.text) == []
        assert answer.text.startswith(reply)


def test_ignored_quotes_change_nothing_and_greedy_text_is_not_asked_twice():
    for change, notes in (({"quotes": "ignore"}, 0), ({"settings": {"temperature": 0}, "quotes": "report"}, 1)):
        write, asked = writer("lost")
        (answer,) = answer_requests(write, [Request(**{**vars(ASK), **change})], [0])
        assert answer.text == "lost"
        assert len(answer.notes) == notes
        assert len(asked) == 1


def test_the_try_that_lost_least_is_taken():
    ask = Request(**{**vars(ASK), "prompt": '"A1" "B2" "C3"', "quotes": "report"})
    write, _ = writer("A1", "A1 B2", "C3")
    assert answer_requests(write, [ask], [0])[0].text == "A1 B2"


def test_seeds_wrap_and_stay_in_range():
    assert [r.seed for r in variants(Request(**{**vars(ASK), "seed": 2**64 - 1}), 2)] == [2**64 - 1, 0]
    assert 0 <= retry_seed(2**64 - 1, 5) < 2**64
    with pytest.raises(ErnieError, match="variants must be 1 or more, got 0"):
        variants(ASK, 0)


def test_neutral_choices_leave_the_official_instruction():
    assert instruction() is None
    for choice in ({"language": "English"}, {"length": "short"}, {"length": "words", "words": 33}):
        text = instruction(**choice)
        assert text.startswith(default_system_prompt())
        assert len(text) > len(default_system_prompt())
    assert "33" in instruction(length="words", words=33)
    assert instruction(language="English", length="long") != instruction(language="Chinese", length="long")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"language": "Klingon"}, "language must be one of auto, as the prompt, English"),
        ({"length": "epic"}, "length must be one of auto, short"),
        ({"length": "words", "words": 0}, "words must be 1 or more, got 0"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(choice, words):
    with pytest.raises(ErnieError, match=words):
        instruction(**choice)


def test_presets_are_settings_that_the_model_takes():
    for settings in PRESETS.values():
        make_processors(**settings)
    assert PRESETS["core"] == {
        "temperature": 0.6,
        "top_p": 0.8,
        "top_k": 64,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
    }


def key(**changes):
    return {"enhancer": "x", **ASK.as_dict(), **changes}


def test_what_was_kept_is_found_again_by_exactly_its_key(tmp_path):
    cache, answer = DiskCache(tmp_path / "new"), Answer(text='caf\u00e9 \u96ea \ud83d "x"', notes=("n",))
    assert cache.get(key()) is None
    cache.put(key(), answer)
    assert DiskCache(tmp_path / "new").get(key()) == answer
    for changes in ({"seed": 6}, {"width": 80}, {"enhancer": "y"}, {"settings": {"temperature": 0.7}}, {"system": ""}):
        assert cache.get(key(**changes)) is None
    assert [p.suffix for p in (tmp_path / "new").iterdir()] == [".json"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"text": 3}', '{"text": "t", "notes": [], "key": {}}'])
def test_a_damaged_file_is_passed_over_with_a_warning_and_replaced(tmp_path, caplog, damage):
    cache = DiskCache(tmp_path)
    cache.put(key(), Answer(text="good"))
    (file,) = tmp_path.iterdir()
    file.write_text(damage, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert cache.get(key()) is None
    assert "cannot be read" in caplog.text
    cache.put(key(), Answer(text="again"))
    assert cache.get(key()) == Answer(text="again")


def test_a_full_disk_costs_the_entry_not_the_answer(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with caplog.at_level(logging.WARNING):
        DiskCache(tmp_path).put(key(), Answer(text="good"))
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_longest_unused_are_forgotten(tmp_path):
    import os

    cache = DiskCache(tmp_path, max_files=3)
    for seed in range(3):
        cache.put(key(seed=seed), Answer(text=str(seed)))
    for age, file in enumerate(sorted(tmp_path.iterdir(), key=lambda f: json.loads(f.read_text())["key"]["seed"])):
        os.utime(file, (1000 + age, 1000 + age))
    assert cache.get(key(seed=0))
    cache.put(key(seed=3), Answer(text="3"))
    assert [bool(cache.get(key(seed=seed))) for seed in range(4)] == [True, False, True, True]


def test_another_file_under_the_same_name_is_another_model(tmp_path):
    file = tmp_path / "pe.safetensors"
    file.write_bytes(b"1")
    first, folder = fingerprint(file), fingerprint(tmp_path)
    assert fingerprint(str(file)) == first
    file.write_bytes(b"22")
    assert fingerprint(file) != first
    assert fingerprint(tmp_path) != folder
