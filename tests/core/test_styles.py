"""Prompt styles: shares, what must stay, rules, a language model's answers, and the stage."""

from collections import Counter

import pytest
from ernie_pack.ernie_core.curation.captions import best_text
from ernie_pack.ernie_core.curation.styles import (
    PRESETS,
    STYLES,
    LanguageRewriter,
    RuleRewriter,
    Source,
    Styles,
    check_shares,
    draw_style,
    faults,
    instruction,
    named_facts,
    report,
    write_by_rules,
)
from ernie_pack.ernie_core.curation.vision_language import EnhancerWriter
from ernie_pack.ernie_core.enhancing.quotes import quoted_spans, quoted_texts
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.tiny.scenes import all_scenes, canonical_caption, facts
from told_writer import Told

POSTER = (
    'A vintage poster with the words "SUMMER SALE" and \u201c50% off, today\u201d above a beach near New York. Palms.'
)
CHINESE = (
    "\u4e00\u5f20\u6d77\u62a5\uff0c\u5199\u7740\u201c\u6625\u5b63\u4fc3\u9500\u201d\uff0c"
    "\u80cc\u666f\u662f\u6a31\u82b1\u3002"
)
CAPTIONS = [
    POSTER,
    CHINESE,
    "a large red star in the center on a sky background",
    "A dog runs on the beach",
    "my dog",
    "An image of the sign 'Bj\u00f6rn's 5\" disks, 'quoted' and more",
    'Only "a, b. c; d" here',
    "\u65e0\u6807\u70b9",
    ".",
    "  {thing} and {nothing}  ",
]


def source(caption, **columns):
    return Source.of({"caption": caption, **columns})


# --- shares -----------------------------------------------------------------------------------------------------------


def test_styles_come_in_their_shares_and_follow_seed_and_id_only():
    shares = check_shares({"keyword": 1, "detailed": 3, "natural": 0})
    drawn = [draw_style(shares, 5, f"row {i}") for i in range(4000)]
    assert Counter(drawn)["detailed"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert set(drawn) == {"keyword", "detailed"}
    assert [draw_style(shares, 5, f"row {i}") for i in range(3999, -1, -1)] == drawn[::-1]
    assert [draw_style(shares, 6, f"row {i}") for i in range(100)] != drawn[:100]


def test_every_preset_is_one_and_as_it_is_changes_nothing():
    for shares in PRESETS.values():
        assert sum(check_shares(shares).values()) == pytest.approx(1)
    stage = Styles(RuleRewriter(), PRESETS["as it is"])
    for caption, made in zip(CAPTIONS, stage([{"id": c, "caption": c} for c in CAPTIONS]), strict=True):
        assert made == {"prompts": {"original": caption}, "prompt_style": "original", "prompt_notes": []}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"poem": 1}, "styles must be some of keyword, .*got poem"),
        ({"keyword": -1}, "got keyword -1"),
        ({"keyword": float("nan")}, "got keyword nan"),
        ({"keyword": 0}, "got only zeros"),
        ({}, "got only zeros"),
    ],
    ids=["unknown", "negative", "nan", "zeros", "nothing"],
)
def test_shares_that_cannot_be_are_named(shares, message):
    with pytest.raises(ErnieError, match=message):
        check_shares(shares)


# --- what must stay ---------------------------------------------------------------------------------------------------


def test_lost_unquoted_and_invented_texts_are_found():
    assert faults(POSTER, POSTER) == []
    assert faults(POSTER, POSTER.replace("SUMMER", "Summer")) == ['"SUMMER SALE" was lost', '"Summer SALE" is new']
    assert faults(POSTER, POSTER.replace('"', "")) == ['"SUMMER SALE" lost its quotation marks']
    assert faults(POSTER, POSTER + ' and "FREE"') == ['"FREE" is new']
    assert faults(POSTER, POSTER.replace("New York", "a city")) == ["New York was lost"]
    assert faults(POSTER, POSTER.replace("New York", "new york")) == []


def test_names_are_the_ones_given_or_those_that_capitals_show():
    text = 'Behind Anna stands the Eiffel Tower in Paris. The sign says "Buy Now Here".'
    assert named_facts(text) == ["Anna", "Eiffel Tower", "Paris"]
    assert named_facts(text, ["eiffel tower", "Rome"]) == ["eiffel tower"]
    assert named_facts(CHINESE) == []


def test_spans_of_quoted_text_hold_the_marks():
    for caption in CAPTIONS:
        spans = quoted_spans(caption)
        inner = [caption[a + 1 : b - 1].strip() for a, b in spans]
        assert list(dict.fromkeys(inner)) == quoted_texts(caption)


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("number", range(len(CAPTIONS)))
def test_rules_keep_all_that_must_stay_and_leave_no_template_open(number, style):
    caption = CAPTIONS[number]
    for row in map(str, range(6)):
        made = write_by_rules(source(caption), style, 0, row)
        assert made.strip()
        assert faults(caption, made) == []
        assert ("{" in made) == ("{" in caption)


def test_rules_write_each_style_as_it_is_written():
    star = source(CAPTIONS[2])
    assert write_by_rules(star, "keyword") == "large red star, center, sky background"
    assert write_by_rules(star, "detailed") == "A large red star in the center on a sky background."
    verbs = {write_by_rules(star, "instruction", 0, str(i)).split()[0] for i in range(40)}
    assert verbs == {"Draw", "Create", "Generate", "Paint", "Make"}
    assert all("a large red star" in write_by_rules(star, "natural", 0, str(i)) for i in range(9))
    assert "of a dog runs" not in "".join(
        write_by_rules(source(CAPTIONS[3]), "instruction", 0, str(i)) for i in range(40)
    )
    assert write_by_rules(source("An image of a fox."), "keyword") == "fox"


def test_rules_use_the_captions_of_several_lengths_and_the_description():
    captions = {"long": POSTER, "medium": "A fox.", "tags": "beach, sale", "short": "A poster."}
    row = {"captions": captions, "description": {"style": "retro", "layout": "Text above.", "entities": ["New York"]}}
    known = source("beside", **row)
    assert known.text == POSTER
    assert write_by_rules(known, "keyword") == 'beach, sale, "SUMMER SALE", "50% off, today", New York'
    assert write_by_rules(known, "detailed") == POSTER + " Layout: Text above. Style: retro."
    assert faults(POSTER, write_by_rules(known, "natural"), ["New York"]) == []  # the medium one lacks all of it
    plain = source("", captions={"long": "A red fox in the snow.", "short": "A fox."}, description={})
    assert write_by_rules(plain, "instruction").rstrip(".").endswith("a fox")


def test_rules_keep_every_fact_of_drawn_scenes():
    for scene in all_scenes()[::997]:
        caption = canonical_caption(scene)
        for style in STYLES:
            assert facts(write_by_rules(source(caption), style, 1, caption)) == facts(caption)


# --- a language model -------------------------------------------------------------------------------------------------


def rewrite(*calls, caption=POSTER, style="keyword", **options):
    writer = Told(*calls)
    rewriter = LanguageRewriter(writer, **options)
    return rewriter.rewrite([(str(i), source(caption), style) for i in range(len(calls[0]))]), writer


GOOD = 'poster, "SUMMER SALE", "50% off, today", beach, New York'


def test_an_answer_that_lost_something_is_written_anew():
    (first, second), writer = rewrite([GOOD, "poster"], [f"```\n{GOOD}\n```"])
    assert first == second == GOOD
    assert [len(texts) for texts, *_ in writer.asked] == [2, 1]
    assert writer.asked[0][0][0] == POSTER
    assert writer.systems[0] == [instruction("keyword")] * 2
    assert len({seed for _, seeds, *_ in writer.asked for seed in seeds}) == 3


def test_the_original_is_never_asked_for():
    (found,), writer = rewrite([GOOD], style="original")
    assert found == POSTER
    assert writer.asked == []


def test_what_cannot_be_had_falls_back_to_the_original_and_is_reported():
    for answer, note in (
        ("poster", '"SUMMER SALE" was lost'),
        ("", "empty"),
        ("Sorry, I can't.", "refused"),
        ("x" * 7000, "7000 char"),
    ):
        stage = Styles(LanguageRewriter(Told([answer]), retries=1), {"keyword": 1})
        (made,) = stage([{"id": "a", "caption": POSTER}])
        assert (made["prompts"], made["prompt_style"]) == ({"original": POSTER}, "original")
        assert note in made["prompt_notes"][0]
        assert made["prompt_notes"][0].startswith("keyword: ")
        text = report([{"source": "a.png", **made}], {"keyword": 1})
        assert "keyword: 0 prompts; drawn 100.0%, asked for 100.0%" in text
        assert "a.png: original kept, keyword: " in text


def test_a_prompt_enhancer_is_asked_with_the_instruction_as_its_own():
    class Enhancer:
        fingerprint = "e"

        def enhance_variants(self, prompt, _width, _height, *, seeds, system, **settings):
            assert (prompt, system, settings["temperature"]) == (POSTER, instruction("natural"), 0.6)
            return [f"{GOOD} {seed % 2}" for seed in seeds]

    made = LanguageRewriter(EnhancerWriter(Enhancer())).rewrite([("a", source(POSTER), "natural")])
    assert made[0].startswith(GOOD)


# --- the stage --------------------------------------------------------------------------------------------------------


def test_a_row_gets_the_same_prompt_whatever_lies_beside_it():
    rows = [{"id": str(i), "caption": c} for i, c in enumerate(CAPTIONS)]
    stage = Styles(RuleRewriter(), PRESETS["even"])
    assert stage(rows) == [stage([row])[0] for row in rows]
    assert len({made["prompt_style"] for made in stage(rows)}) > 2
    assert Styles(RuleRewriter(1), PRESETS["even"], seed=1)(rows) != stage(rows)


def test_a_row_without_a_caption_is_told_what_to_do():
    (made,) = Styles(RuleRewriter(), PRESETS["even"])([{"id": "a", "caption": " "}])
    assert "Curate Captions" in made["failed"]
    assert "a: there is no caption" in report([{"id": "a", "failed": {"styles": made["failed"]}}], PRESETS["even"])


def test_the_prompt_is_then_the_rows_best_text():
    row = {"id": "a", "caption": CAPTIONS[2]}
    (made,) = Styles(RuleRewriter(), {"instruction": 1})([row])
    assert best_text(row | made) == made["prompts"]["instruction"] != row["caption"]


def test_every_style_can_be_written_and_the_drawn_one_is_the_same():
    rows = [{"id": str(i), "caption": c} for i, c in enumerate(CAPTIONS)]
    one = Styles(RuleRewriter(), PRESETS["even"])(rows)
    for few, all_ in zip(one, Styles(RuleRewriter(), PRESETS["even"], every=True)(rows), strict=True):
        assert set(all_["prompts"]) == set(PRESETS["even"])
        assert all_["prompts"].items() >= few["prompts"].items()
        assert all_["prompt_style"] == few["prompt_style"]


def test_the_key_changes_with_all_that_decides_the_prompt():
    stages = [
        Styles(RuleRewriter(), PRESETS["even"]),
        Styles(RuleRewriter(1), PRESETS["even"]),
        Styles(RuleRewriter(), PRESETS["even"], seed=1),
        Styles(RuleRewriter(), PRESETS["even"], every=True),
        Styles(RuleRewriter(), {"keyword": 1}),
        *(Styles(LanguageRewriter(Told([]), **o), {"keyword": 1}) for o in ({}, {"retries": 0}, {"temperature": 0.1})),
    ]
    assert len({stage.key() for stage in stages}) == len(stages)
    assert Styles(RuleRewriter(), dict.fromkeys(STYLES[:4], 7.0)).key() == stages[0].key()
