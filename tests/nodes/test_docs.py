"""Help pages and translations say what the schemas say, for every node, in English and in Chinese."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest
from node_schemas import FILE_LISTS
from node_texts import describe_texts

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
SCHEMAS = json.loads((ROOT / "tests" / "nodes" / "schemas.json").read_text(encoding="utf-8"))
NODE_IDS = sorted(SCHEMAS)
LANGUAGES = ("en", "zh")
SECTIONS = 6  # when, inputs, outputs, wiring, core, errors
EMPTY = {"en": "empty", "zh": "\u7a7a"}
SWITCH = {"en": {True: "on", False: "off"}, "zh": {True: "\u5f00", False: "\u5173"}}
RANGE = {"en": "{} to {}", "zh": "{} \u81f3 {}"}
HAN = re.compile("[\u4e00-\u9fff]")
# What the front end's translations would read as placeholders, links and plurals.
TRANSLATION_SYNTAX = re.compile(r"[{}@|]")

each_node = pytest.mark.parametrize("node_id", NODE_IDS)
each_language = pytest.mark.parametrize("language", LANGUAGES)


def page_path(node_id: str, language: str) -> Path:
    return DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"


def read_page(node_id: str, language: str) -> list[str]:
    """The page's parts: what comes before the first section, then each section."""
    return page_path(node_id, language).read_text(encoding="utf-8").split("\n## ")


def read_table(section: str) -> list[list[str]]:
    """Cells of the rows of the section's table, without the head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def name_in(cell: str) -> str:
    """The id in a row's first cell: `steps`, in Chinese with the translated name before it."""
    return re.fullmatch(r"(?:[^`]+ )?`(\w+)`", cell).group(1)


def read_locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def show(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


@pytest.fixture
def schema(node_classes, recording):
    """schema(node_id) -> its schema."""
    return lambda node_id: node_classes[node_id].GET_SCHEMA()


def test_the_pages_are_those_of_the_nodes(node_classes):
    expected = {page_path(node_id, language) for node_id in node_classes for language in LANGUAGES}
    assert set(DOCS.rglob("*.md")) == expected


@each_language
@each_node
def test_a_page_is_whole(schema, node_id, language):
    head, *sections = read_page(node_id, language)
    title, sentence = (line for line in head.splitlines() if line)
    assert title == "# " + read_locale(language)[node_id]["display_name"]
    assert sentence.endswith((".", "\u3002"))
    assert len(sections) == SECTIONS
    assert all(len(section.splitlines()) > 2 for section in sections)


@each_language
@each_node
def test_a_page_names_every_input_and_output(schema, node_id, language):
    inputs, outputs = (read_table(section) for section in read_page(node_id, language)[2:4])
    assert [name_in(row[0]) for row in inputs] == [item.id for item in schema(node_id).inputs]
    assert [name_in(row[0]) for row in outputs] == [out.display_name for out in schema(node_id).outputs]
    assert [row[2].split()[0] for row in outputs] == [f"`{out.io_type}`" for out in schema(node_id).outputs]


@each_language
@each_node
def test_a_page_has_the_numbers_of_the_schema(schema, node_id, language):
    rows = read_table(read_page(node_id, language)[2])
    for item, (_, _, unit, span, default, _) in zip(schema(node_id).inputs, rows, strict=True):
        kind, settings = item.get_io_type(), item.as_dict()
        if kind in ("INT", "FLOAT"):
            start = RANGE[language].format(show(settings["min"]), show(settings["max"]))
            assert re.match(re.escape(start) + r"(?!\d)", span), item.id
            assert default == f"`{show(settings['default'])}`", item.id
        elif kind == "COMBO" and item.id not in FILE_LISTS:
            assert re.findall("`(.+?)`", span) == list(settings["options"]), item.id
            assert default == f"`{settings.get('default') or settings['options'][0]}`", item.id
        elif kind == "BOOLEAN":
            assert default == SWITCH[language][settings["default"]], item.id
        elif kind == "STRING":
            assert default == (f"`{settings['default']}`" if settings["default"] else EMPTY[language]), item.id
        elif kind != "COMBO":
            assert unit == f"`{kind}`", item.id


@functools.cache
def messages() -> list[str]:
    """Every text in the engine and the nodes, with an ellipsis where values go."""
    found = []
    for path in (*(ROOT / "ernie_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub("%[dgs]", "\u2026", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\u2026" for p in node.values)
                found.append("".join(parts))
    return [text.replace("`", "'") for text in found]


@each_language
@each_node
def test_the_errors_on_a_page_are_real(node_id, language):
    rows = read_table(read_page(node_id, language)[6])
    assert rows
    for quoted, advice in rows:
        assert advice
        gap = ".{0,40}?"  # a value may be named
        pattern = gap.join(re.escape(part) for part in quoted.strip("`").split("\u2026"))
        assert any(re.search(pattern, text) for text in messages()), quoted


@each_node
def test_both_languages_explain_the_same_errors(node_id):
    english, chinese = ([row[0] for row in read_table(read_page(node_id, each)[6])] for each in LANGUAGES)
    assert english == chinese


@each_node
def test_the_chinese_page_is_chinese(node_id):
    head, *sections = read_page(node_id, "zh")
    assert all(HAN.search(part) for part in (head, *sections))
    for section in sections[1], sections[2]:
        assert all(HAN.search(row[1]) for row in read_table(section))


def test_english_texts_are_those_of_the_schemas(node_classes, recording):
    # Made by `python tests/support/node_texts.py > locales/en/nodeDefs.json`: the front end shows these, not the
    # schemas' texts, wherever a translation exists.
    assert read_locale("en") == {node_id: describe_texts(cls) for node_id, cls in node_classes.items()}


def test_chinese_texts_cover_the_schemas_and_no_more(node_classes, recording):
    english, chinese = read_locale("en"), read_locale("zh")
    assert list(chinese) == list(english)
    for node_id, texts in english.items():
        after_seed = {
            "control_after_generate"
            for item in node_classes[node_id].GET_SCHEMA().inputs
            if item.as_dict().get("control_after_generate")
        }
        assert chinese[node_id].keys() == texts.keys(), node_id
        assert chinese[node_id]["inputs"].keys() - after_seed == texts["inputs"].keys(), node_id
        assert chinese[node_id]["outputs"].keys() == texts["outputs"].keys(), node_id


@each_node
def test_chinese_texts_are_chinese(node_id):
    texts = read_locale("zh")[node_id]
    assert HAN.search(texts["display_name"])
    assert HAN.search(texts["description"])
    for place in (*texts["inputs"].values(), *texts["outputs"].values()):
        assert place["name"]
        assert "tooltip" not in place or (HAN.search(place["tooltip"]) and place["tooltip"].endswith("\u3002"))


@each_language
def test_no_text_is_read_as_a_placeholder(language):
    def texts(value):
        return [t for v in value.values() for t in texts(v)] if isinstance(value, dict) else [value]

    assert not [text for text in texts(read_locale(language)) if TRANSLATION_SYNTAX.search(text)]
