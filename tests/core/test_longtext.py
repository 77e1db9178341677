"""LongText-Bench's rule: what was asked for and read counts; order and extra text do not."""

import json
import random

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.longtext import (
    TextPrompt,
    match_text,
    read_ocr,
    read_text_prompts,
    score_longtext,
)

# (language, asked for, read, matched, wanted): each line is one clause of the rule
RULE = [
    ("en", "Fresh Brews", "FRESH BREWS", 2, 2),  # case
    ("en", "EVERY MORNING, EVERY DAY", "every morning day", 3, 4),  # how often counts
    ("en", "a b c", "c b a", 3, 3),  # order does not
    ("en", "sale", "big sale today 50", 1, 1),  # extra text does not
    ("en", "well-known", "wellknown", 1, 1),  # punctuation is removed, not replaced
    ("en", "well known", "wellknown", 0, 2),
    ("en", "it's 9:30", "its 930", 2, 2),
    ("en", "na\u00efve caf\u00e9", "naive cafe", 0, 2),  # accents count
    ("en", "na\u00efve caf\u00e9", "NA\u00cfVE Caf\u00e9", 2, 2),
    ("en", "\u00f1and\u00fa", "and\u00fa", 1, 1),  # an accent outside the list is removed
    ("en", "one\u3000two", "one two\n", 2, 2),  # any white space
    ("en", "open", "", 0, 1),
    ("en", "no text here", "No text recognized.", 0, 3),  # what the OCR says when it sees nothing
    ("zh", "\u6bcf\u65e5\u65b0\u9c9c", "\u9c9c\u65b0\u6bcf", 3, 4),
    ("zh", "\u672c\u5730\uff0c\u59cb\u4e8e1998", "\u672c\u5730\u59cb\u4e8e 1998", 8, 8),
    ("zh", "OK", "ok", 0, 2),  # Chinese mode keeps case, as published
    ("zh", "\u4e00\u4e00", "\u4e00", 1, 2),
]


@pytest.mark.parametrize(("language", "wanted", "read", "matched", "total"), RULE, ids=ascii)
def test_the_published_rule(language, wanted, read, matched, total):
    found = match_text(wanted, read, language)
    assert (found.matched, found.wanted) == (matched, total)
    assert len(found.missing) == total - matched


def test_all_places_of_a_prompt_are_one_text():
    found = match_text(["one two", "two three"], "two two one", "en")
    assert (found.matched, found.wanted, found.missing) == (3, 4, ("three",))


@pytest.mark.parametrize("seed", range(5))
def test_recall_does_not_change_with_order_and_never_falls_with_more_text(seed):
    rng = random.Random(seed)
    words = [rng.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(12)]
    read = words[: rng.randint(0, 12)]
    first = match_text(" ".join(words), " ".join(read), "en")
    shuffled = rng.sample(read, len(read))
    assert match_text(" ".join(words), " ".join(shuffled), "en").matched == first.matched == len(read)
    assert match_text(" ".join(words), " ".join([*read, "alpha", "noise"]), "en").matched >= first.matched


def test_nothing_to_read_is_an_error():
    with pytest.raises(ErnieError, match="no text is asked for"):
        match_text("...!", "x", "en")


PROMPTS = [
    TextPrompt(id=0, prompt="p0", text=("one two three four",), category="sign", length="short"),
    TextPrompt(id=1, prompt="p1", text=("five", "six"), category="slide", length="short"),
    TextPrompt(id=7, prompt="p7", text=("seven",), category="sign", length="long"),
]


def test_the_score_adds_up_words_not_pictures():
    found = score_longtext(PROMPTS, [("0.png", 0, "one two three four"), ("1.png", 1, ""), ("7.png", 7, "seven")], "en")
    assert found.score.value == pytest.approx(5 / 7)
    assert {c: (n, s.value) for c, n, s in found.by_category} == {"sign": (2, 1.0), "slide": (1, 0.0)}
    assert {c: n for c, n, _ in found.by_length} == {"short": 2, "long": 1}


def test_the_interval_treats_pictures_of_one_prompt_as_one():
    """Four equal pictures per prompt say no more than one does."""
    one = [(f"{p.id}.png", p.id, p.text[0]) for p in PROMPTS]
    four = [(f"{p.id}_{k}.png", p.id, p.text[0]) for p in PROMPTS for k in range(4)]
    assert score_longtext(PROMPTS, four, "en").score == score_longtext(PROMPTS, one, "en").score


def test_what_does_not_fit_the_prompts_is_listed():
    found = score_longtext(PROMPTS, [("a", 0, "one"), ("a", 0, "one two"), ("b", 5, "x")], "en")
    text = "\n".join(map(str, found.problems))
    assert "a: left out: it was read before" in text
    assert "b: left out: there is no prompt 5" in text
    assert "2 of 3 prompts have no picture and are not counted: 1, 7" in text
    assert (found.score.value, len(found.results)) == (0.25, 1)
    with pytest.raises(ErnieError, match="no picture belongs to one of the 3 prompts"):
        score_longtext(PROMPTS, [("b", 5, "x")], "en")


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_published_prompts_file_is_read(tmp_path):
    row = {"category": "sign", "length": "short", "prompt": "p", "text": ["A b", "c"], "text_length": 3, "prompt_id": 4}
    (prompt,) = read_text_prompts(write_lines(tmp_path / "text_prompts.jsonl", [row]))
    assert prompt == TextPrompt(id=4, prompt="p", text=("A b", "c"), category="sign", length="short")


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"prompt": "p", "text": 3}], "expected prompt, text"),
        ([{"text": ["a"]}], "got text"),
        ([{"prompt": "p", "text": ["a"], "prompt_id": 1}, {"prompt": "q", "text": ["a"], "prompt_id": 1}], "1 twice"),
        ([{"prompt": "p", "text": ["a"], "prompt_id": "x"}], "whole number, got 'x'"),
        ([], "no prompts"),
    ],
    ids=str,
)
def test_other_files_are_no_prompts_file(tmp_path, rows, text):
    with pytest.raises(ErnieError, match=text):
        read_text_prompts(write_lines(tmp_path / "prompts.jsonl", rows))


@pytest.mark.parametrize("kind", ["published", "jsonl", "csv", "folder", "prompt"])
def test_ocr_text_is_read_in_each_shape(tmp_path, kind):
    read = {0: "one two", 1: "six", 7: ""}
    path = tmp_path / "results.jsonl"
    if kind == "published":
        rows = [{"image": f"/x/{i}_0.png", "prompt": "?", "ocr_gt": [], "ocr_results": t} for i, t in read.items()]
        write_lines(path, rows)
    elif kind == "jsonl":
        write_lines(path, [{"prompt_id": i, "ocr": t} for i, t in read.items()])
    elif kind == "prompt":
        write_lines(path, [{"image": f"pic{i}.png", "prompt": f"p{i}", "ocr_text": t} for i, t in read.items()])
    elif kind == "csv":
        path = tmp_path / "ocr.csv"
        path.write_text("image,ocr\n" + "".join(f"{i}.png,{t}\n" for i, t in read.items()), encoding="utf-8")
    else:
        path = tmp_path / "texts"
        path.mkdir()
        for i, text in read.items():
            (path / f"{i}_0.txt").write_text(text, encoding="utf-8")
    readings, problems = read_ocr(path, PROMPTS)
    assert {i: text for _, i, text in readings} == read
    assert not problems
    assert score_longtext(PROMPTS, readings, "en").score.value == pytest.approx(3 / 7)


def test_the_prompt_goes_before_a_file_name_that_is_a_hash_of_digits(tmp_path):
    rows = [{"image": "00000001_5.png", "prompt": "p7", "ocr": "seven"}]
    readings, _ = read_ocr(write_lines(tmp_path / "a.jsonl", rows), PROMPTS)
    assert readings == [("00000001_5.png", 7, "seven")]


def test_a_table_without_ocr_text_is_not_read_as_pictures_without_text(tmp_path):
    rows = [{"prompt": "p0", "text": ["one"], "prompt_id": 0}]
    with pytest.raises(ErnieError, match="it has none of the columns ocr_results"):
        read_ocr(write_lines(tmp_path / "prompts.jsonl", rows), PROMPTS)
    (tmp_path / "a.csv").write_text("image,prompt_id\n0.png,0\n")
    with pytest.raises(ErnieError, match="it has none of the columns ocr_results"):
        read_ocr(tmp_path / "a.csv", PROMPTS)


def test_rows_that_cannot_be_used_are_listed_and_a_file_of_them_is_an_error(tmp_path):
    rows = [
        {"prompt_id": 0, "ocr": "one"},
        {"image": "cat.png", "ocr": "x"},
        {"other": 1},
        {"prompt_id": "x", "ocr": ""},
    ]
    readings, problems = read_ocr(write_lines(tmp_path / "a.jsonl", rows), PROMPTS)
    assert len(readings) == 1
    assert [p.label for p in problems] == ["a.jsonl row 2", "a.jsonl row 3", "a.jsonl row 4"]
    with pytest.raises(ErnieError, match="no OCR text that could be used"):
        read_ocr(write_lines(tmp_path / "b.jsonl", rows[1:]), PROMPTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ErnieError, match=r"holds no \.txt files"):
        read_ocr(tmp_path / "empty", PROMPTS)
