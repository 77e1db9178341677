"""Prompt sets: the tables that benchmarks come as, what was taken from which column, seeds, and a folder's index."""

import json

import pytest
from ernie_pack.ernie_core.batch import Row, file_name
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.evaluation import prompt_sets as engine
from PIL import Image

ROW = Row(label="", prompt="", negative="", seed=7, width=64, height=64, steps=2, cfg=1.0, shift=4.0)
TEXT, KIND, ORIGIN = "\u6587\u672c", "\u7c7b\u522b", "\u6765\u6e90"  # ViLG-300's own column names
VILG = (
    f"Prompt,{TEXT},{KIND},{ORIGIN}\n"
    "A red car.,\u7ea2,color,DrawBench\n"
    '"A stack of 3 plates. A blue plate is on the top,\nsitting on a ""blue"" plate.",\u4e09,DALL-E,DrawBench\n'
    "One car.,\u4e00,counting,ViLG\n"
)


def write(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def test_the_shape_of_vilg_300_is_read_with_line_breaks_in_cells(tmp_path):
    found = engine.read_prompt_set(write(tmp_path, "ViLG-300.csv", VILG))
    assert [(i.number, i.category, i.source, i.translation) for i in found.items] == [
        (1, "color", "DrawBench", "\u7ea2"),
        (2, "DALL-E", "DrawBench", "\u4e09"),
        (3, "counting", "ViLG", "\u4e00"),
    ]
    assert found.items[1].prompt == 'A stack of 3 plates. A blue plate is on the top,\nsitting on a "blue" plate.'
    assert found.columns == {"prompt": "Prompt", "translation": TEXT, "category": KIND, "source": ORIGIN}
    assert (found.unused, found.problems) == ((), ())
    assert f"category from the column '{KIND}'" in found.report()
    assert "3 prompts in 3 categories" in found.report()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"], ids=["comma", "tab", "semicolon", "bar"])
def test_delimiters_line_ends_and_byte_order_marks_change_nothing(tmp_path, delimiter, ends, encoding):
    cells = [["Prompts", "Category"], ['"a, b; c\td|e\nf"', "x"], ["second one", "y"]]
    text = "\n".join(delimiter.join(row) for row in cells).replace("\n", ends)
    found = engine.read_prompt_set(write(tmp_path, "set.csv", text, encoding))
    assert [(i.prompt, i.category) for i in found.items] == [("a, b; c\td|e\nf", "x"), ("second one", "y")]


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("drawbench.csv", "Prompts,Category\na,b\n", {"prompt": "Prompts", "category": "Category"}),
        (
            "parti.tsv",
            "Prompt\tCategory\tChallenge\tNote\na\tb\tc\td\n",
            {"prompt": "Prompt", "category": "Category"},
        ),
        ("geneval.jsonl", '{"tag": "b", "prompt": "a", "include": []}\n', {"prompt": "prompt", "category": "tag"}),
        ("list.json", '[{"text": "a", "class": "b"}]', {"prompt": "text", "category": "class"}),
        (
            "fact.csv",
            "Prompt,(Chinese text),category,source\na,z,b,c\n",
            {"prompt": "Prompt", "translation": "(Chinese text)", "category": "category", "source": "source"},
        ),
        ("zh.csv", f"{TEXT},{KIND}\na,b\n", {"prompt": TEXT, "category": KIND}),
        ("plain.csv", "prompt\na\n", {"prompt": "prompt"}),
        ("lines.txt", "a\n# no\n", {"prompt": "prompt"}),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v and len(v) < 16 else "",
)
def test_known_benchmarks_are_recognised(tmp_path, name, text, columns):
    found = engine.read_prompt_set(write(tmp_path, name, text))
    assert found.columns == columns
    assert [i.prompt for i in found.items] == ["a"]
    assert [i.category for i in found.items] == (["b"] if "category" in columns else [""])


def test_a_column_can_be_named(tmp_path):
    path = write(tmp_path, "x.csv", "prompt,what is asked,group\na,b,c\n")
    found = engine.read_prompt_set(path, columns={"prompt": "what is asked", "category": "group"})
    assert [(i.prompt, i.category) for i in found.items] == [("b", "c")]
    assert found.unused == ("prompt",)
    with pytest.raises(ErnieError, match="no column 'kind' for category; it has 'prompt', 'what is asked', 'group'"):
        engine.read_prompt_set(path, columns={"category": "kind"})


def test_bad_rows_are_named_and_the_others_kept(tmp_path):
    text = 'prompt,category\na,b\n,empty\nc,d,e\nf\n\n"g, h",i\na,b\n'
    found = engine.read_prompt_set(write(tmp_path, "x.csv", text))
    assert [(i.number, i.prompt, i.category) for i in found.items] == [
        (1, "a", "b"),
        (4, "f", ""),
        (6, "g, h", "i"),
        (7, "a", "b"),
    ]
    assert [p.label for p in found.problems] == ["row 3", "row 2", "twice"]
    lines = '{"prompt": "a"}\nnonsense\n[1]\n{"prompt": ["x"]}\n{"prompt": 7}\n'
    found = engine.read_prompt_set(write(tmp_path, "x.jsonl", lines))
    assert [i.prompt for i in found.items] == ["a", "7"]
    assert [p.label for p in found.problems] == ["row 2", "row 3", "row 4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "is empty"),
        ("x.csv", "a,b\nc,d\n", "needs a column of prompts, such as prompt, prompts"),
        ("x.csv", "prompt,category\n", "it has a header only"),
        ("x.csv", "prompt\n\n \n", "no usable prompt"),
        ("x.json", "{", "is not valid JSON"),
        ("x.jsonl", "nonsense\n", "needs a column of prompts"),
        ("x.xlsx", "PK", "must be a file that ends with"),
    ],
    ids=["empty", "no_prompts", "header_only", "blank_rows", "json", "jsonl", "kind"],
)
def test_what_is_no_prompt_set_is_refused(tmp_path, name, text, message):
    with pytest.raises(ErnieError, match=message):
        engine.read_prompt_set(write(tmp_path, name, text))


def test_a_missing_file_and_another_encoding_are_refused(tmp_path):
    with pytest.raises(ErnieError, match="there is no such file"):
        engine.read_prompt_set(tmp_path / "none.csv")
    with pytest.raises(ErnieError, match="not UTF-8"):
        engine.read_prompt_set(write(tmp_path, "x.csv", f"prompt\n{TEXT}\n", "gb18030"))


def test_the_example_has_the_sixteen_categories_and_a_translation_each():
    found = engine.read_prompt_set(engine.EXAMPLE)
    assert (len(found), found.problems, found.unused) == (48, (), ())
    assert set(found.counts().values()) == {3}
    assert len(found.counts()) == 16
    assert all(i.translation and i.source == "own" for i in found.items)
    assert sum("\n" in i.prompt for i in found.items) >= 8


def test_categories_and_numbers_are_chosen_and_seeds_stay():
    whole = engine.read_prompt_set(engine.EXAMPLE)
    few = engine.choose(whole, categories=["Reddit ", "COLOR"], per_category=2)
    assert few.counts() == {"color": 2, "Reddit": 2}
    seeds = {r.prompt: [r.seed for r in part] for part in engine.make_rows(whole, ROW, seeds=3) for r in part[:1]}
    for part in engine.make_rows(few, ROW, seeds=2):
        assert part[0].seed == seeds[part[0].prompt][0]
        assert [r.seed for r in part] == [part[0].seed, part[0].seed + 1]
    with pytest.raises(ErnieError, match="no category 'colour'; it has 'color', "):
        engine.choose(whole, categories=["colour"])


def test_translations_are_painted_when_asked_for():
    whole = engine.read_prompt_set(engine.EXAMPLE)
    rows = engine.make_rows(whole, ROW, translated=True)
    assert [part[0].prompt for part in rows] == [i.translation for i in whole.items]
    without = engine.PromptSet(name="x", items=(engine.PromptItem(number=4, prompt="a"),))
    with pytest.raises(ErnieError, match="row 4 of x has no translation"):
        engine.make_rows(without, ROW, translated=True)
    with pytest.raises(ErnieError, match="seeds_per_prompt must lie between 1 and 1000, got 0"):
        engine.make_rows(whole, ROW, seeds=0)
    with pytest.raises(ErnieError, match="multiple of 16"):
        engine.make_rows(whole, Row(**{**ROW.__dict__, "width": 65}))


def test_a_folder_says_which_picture_is_of_which_prompt(tmp_path):
    chosen = engine.choose(engine.read_prompt_set(engine.EXAMPLE), per_category=1)
    rows = engine.make_rows(chosen, ROW, seeds=2)
    engine.write_setting(tmp_path, chosen, rows)
    with pytest.raises(ErnieError, match="holds none of the 32 pictures"):
        engine.read_setting(tmp_path)
    for part in rows[:3]:
        for row in part:
            Image.new("RGB", (16, 16)).save(tmp_path / file_name(row))
    found = engine.read_setting(tmp_path)
    assert (found.name, found.prompts, found.missing) == (tmp_path.name, "example_prompts", 26)
    assert [(p.number, p.category, p.seed, p.file.name) for p in found.pictures] == [
        (i.number, i.category, r.seed, file_name(r))
        for i, part in zip(chosen.items[:3], rows[:3], strict=True)
        for r in part
    ]
    assert found.pictures[0].prompt == chosen.items[0].prompt


def test_a_folder_without_or_with_a_damaged_index_is_refused(tmp_path):
    with pytest.raises(ErnieError, match="no folder of a prompt set"):
        engine.read_setting(tmp_path)
    for text, message in (("{", "cannot be read"), (json.dumps({"format": 9}), "format 9, this pack reads 1")):
        (tmp_path / "setting.json").write_text(text)
        with pytest.raises(ErnieError, match=message):
            engine.read_setting(tmp_path)


def test_an_index_leads_to_no_other_folder(tmp_path):
    item = {"number": 1, "prompt": "a", "pictures": [{"seed": 1, "file": "../../secret.png", "text": "a"}]}
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "setting.json").write_text(json.dumps({"format": 1, "prompts": "x", "items": [item]}))
    with pytest.raises(ErnieError, match="holds none"):
        engine.read_setting(folder)
