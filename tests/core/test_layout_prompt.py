"""Prompts out of fields: every text between marks once, nothing dangling, and what cannot be written is said."""

import itertools
import re
import string

import pytest
from ernie_pack.ernie_core.enhancing.quotes import missing_texts, quoted_texts, stray_mark
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.layout_prompt import (
    LayoutPrompt,
    count_words,
    estimate_tokens,
    languages,
    layouts,
    report,
    templates,
)

FIELDS = {
    "subject": "a fox under a sign that reads \u201cNIGHT\u201d",
    "style": "flat vector art",
    "title": "SUMMER 2049",
    "subtitle": "it's {free}",
}
PANELS = {"comic": 'the fox jumps: "Hop!"\na door', "stickers": 'a fox with "HI"\na moon'}
every_pair = pytest.mark.parametrize(("language", "layout"), list(itertools.product(languages(), layouts())))


def page(layout="poster", language="en", **fields):
    return LayoutPrompt(layout=layout, language=language, **fields)


def slots(language, layout):
    sentences = templates()[language]["layouts"][layout].items()
    return [(name, sorted(f for _, f, _, _ in string.Formatter().parse(text) if f)) for name, text in sentences]


def test_both_languages_have_the_same_slots_in_the_same_order():
    assert languages() == ["en", "zh"]
    assert list(templates()["en"]["layouts"]) == list(templates()["zh"]["layouts"])
    for layout in layouts():
        assert slots("en", layout) == slots("zh", layout)


@every_pair
def test_every_text_is_quoted_once_and_in_its_order(language, layout):
    body = PANELS.get(layout, "Doors open at 8\n\u5165\u573a\u514d\u8d39")
    prompt = page(layout, language, **FIELDS, body=body).write()
    texts = quoted_texts(body) if layout in PANELS else body.splitlines()
    assert quoted_texts(prompt) == ["NIGHT", "SUMMER 2049", "it's {free}", *texts]
    for text in quoted_texts(prompt):
        assert prompt.count(text) == 1
    assert "\n" not in prompt


@every_pair
def test_an_empty_field_takes_its_sentence_with_it_and_leaves_the_others(language, layout):
    fields = FIELDS | {"body": PANELS.get(layout, "Doors open at 8\nFree")}
    whole = page(layout, language, **fields).write()
    words = templates()[language]
    for count in range(1, len(fields) + 1):
        for names in itertools.combinations(fields, count):
            some = {name: fields[name] for name in names}
            if set(some) == {"style"}:
                continue
            prompt = page(layout, language, **some).write()
            assert prompt == page(layout, language, **(dict.fromkeys(fields, " \n ") | some)).write()
            assert not re.search(r"\s\s|\{|[:\uff1a,\u3001][.\u3002]|[.\u3002]{2}| $", prompt.replace("{free}", ""))
            if "subject" in some:  # without it the opening is another one, and without body the number of panels
                sentences = prompt.split(words["stop"] + words["space"])
                parts = set(whole.replace(words["stop"], "\n").split("\n"))
                known = [s for s in sentences if s.strip(words["stop"]).strip() in {p.strip() for p in parts}]
                assert len(known) >= len(sentences) - ("body" not in some)


def test_panels_keep_their_order_and_numbers():
    lines = [f"thing {chr(97 + i)}" for i in range(12)]
    prompt = page("comic", body="\n\n".join(lines), columns=3, rows=4).write()
    found = re.findall(r"Panel (\d+): (thing \w)\.", prompt)
    assert found == [(str(i), line) for i, line in enumerate(lines, 1)]
    assert "12 panels in a grid of 3 columns and 4 rows" in prompt


@pytest.mark.parametrize("language", languages())
@pytest.mark.parametrize("text", ['the "best"', "\u201cbest\u201d", 'a "b" \u201cc\u201d', "12\" 'x'", "\u300ca\u300d"])
def test_marks_inside_a_text_choose_other_marks_around_it(language, text):
    prompt = page(language=language, title=text, body=f"{text}\nend").write()
    assert quoted_texts(prompt) == [text, "end"]
    assert missing_texts(prompt, f"it reads {text} to the end") == []


def test_full_stops_are_not_doubled():
    assert page(subject="a cat.", title="Go!").write() == 'A poster. It shows: a cat. The large title reads "Go!"'
    assert page(subject="a cat").write() == "A poster. It shows: a cat."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"title": 'a "b" \u201cc\u201d \u300cd\u300d'},
            "title holds every kind of quotation marks: leave one kind out",
        ),
        ({"title": "\u300c", "body": 'x"\u201d\u300c'}, "line 1 of body holds every kind"),
        ({"subject": 'a sign "OPEN'}, 'subject has a " without its partner'),
        ({"subject": "a cat", "style": "\u201cold"}, "style has a \u201c without its partner"),
        ({"subject": "the '90s"}, "subject has a ' without its partner"),
        ({"layout": "comic", "body": 'one\nsays "Hi'}, 'line 2 of body has a " without its partner'),
        ({"title": "one\ntwo"}, "title must be one line, got 2: put the other lines into body"),
        ({"subtitle": "one\u2028two"}, "subtitle must be one line, got 2"),
        ({}, "nothing to lay out: fill in subject, title, subtitle or body"),
        ({"style": "oil", "title": " \n"}, "nothing to lay out"),
        ({"layout": "comic", "subject": "x", "columns": 0}, "columns must be 1 to 12, got 0"),
        ({"layout": "stickers", "subject": "x", "rows": 13}, "rows must be 1 to 12, got 13"),
        ({"layout": "comic", "body": "a\nb\nc\nd\ne"}, "5 lines, one per panel, and the grid of 2 x 2 holds 4: raise"),
        ({"layout": "flyer", "subject": "x"}, "layout must be one of poster, cover, .*got 'flyer'"),
        ({"language": "de", "subject": "x"}, "language must be one of en, zh, got 'de'"),
    ],
)
def test_what_cannot_be_written_is_said(fields, message):
    with pytest.raises(ErnieError, match=message):
        page(**fields).write()


def test_a_mark_is_stray_only_without_its_partner():
    assert [stray_mark(t) for t in ("it's 12\" wide", '"a" \u300cb\u300d', "the dogs' park")] == [None] * 3
    assert [stray_mark(t) for t in ('a "b', "b\u201d", "\u300ea", "x 'y")] == ['"', "\u201d", "\u300e", "'"]


def test_the_report_counts_and_lists():
    comic = page("comic", subject="a cat", body='jumps: "Hop!"')
    prompt = comic.write()
    lines = report(comic, prompt, 57).splitlines()
    assert lines[0].endswith("words, 57 tokens of 2048")
    assert lines[1:] == ["shows: Hop!", "not described: 3 of 4 panels"]
    assert f"about {estimate_tokens(prompt)} tokens" in report(comic, prompt)
    assert (count_words("don't stop, 2049 \u4f60\u597d!"), estimate_tokens("one two three \u4f60")) == (5, 5)


def test_a_prompt_that_is_too_long_is_refused_when_counted_and_doubted_when_estimated():
    long = page(subject="word " * 2000)
    prompt = long.write()
    assert "Probably too long" in report(long, prompt)
    assert "Probably too long" not in report(long, prompt, 2048)
    with pytest.raises(ErnieError, match="has 2049 tokens and the text encoder reads 2048: shorten"):
        report(long, prompt, 2049)
