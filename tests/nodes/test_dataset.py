"""Training data through the nodes: what people point them at, what they say about it, what they refuse."""

import importlib

import pytest
import torch
from ernie_pack.ernie_core.batch import read_image
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training import dataset as engine
from ernie_pack.ernie_core.training.pictures import load_mask
from small_data import draw, write_pairs, write_pictures

nodes = importlib.import_module("ernie_pack.nodes.dataset")

FOLDER = {"format": "auto", "repeats": 1, "loss_weight": 1.0, "balance": "as they are", "missing_caption": "error"}
CAPTIONS = {"trigger": "", "caption_dropout": 0.0}
PAIRS = {"min_margin": 0.0, "max_per_prompt": 0, "caption_dropout": 0.0, "missing_caption": "error"}
IMAGES = {"captions": "a square", "name": "graph", "repeats": 1, "balance": "as they are", **CAPTIONS}


@pytest.fixture
def inputs(tmp_path):
    """The host's input folder."""
    folder = tmp_path / "input"
    write_pictures(folder / "cat", count=3)
    write_pictures(folder / "dog", count=1)
    return folder


@pytest.fixture
def read(run, inputs):
    """read(path, **changes) -> (dataset, summary)."""

    def call(path, **changes):
        return run("ErnieDatasetFolder", path=path, **FOLDER | CAPTIONS | changes).result

    return call


def test_a_folder_is_found_in_the_input_folder_and_anywhere(read, inputs):
    relative, summary = read("cat")
    absolute, _ = read(str(inputs / "cat"))
    assert relative == absolute
    assert [i.captions[0].text for i in relative.items] == [f"a square, number {n}" for n in range(3)]
    assert summary.startswith("3 images, 3 samples per epoch")


@pytest.mark.parametrize("path", ["", "  ", "nothing/here"])
def test_a_path_that_is_not_there_says_where_it_was_looked_for(read, path):
    with pytest.raises(ErnieError, match=r"path must be a folder or file with training data.*input.*give a whole path"):
        read(path)


def test_a_missing_caption_is_refused_or_filled(read, inputs):
    (inputs / "cat" / "01.txt").unlink()
    with pytest.raises(ErnieError, match=r"01\.png"):
        read("cat")
    filled, _ = read("cat", missing_caption="default", default_caption="a cat")
    assert filled.items[1].captions[0].text == "a cat"


def test_a_broken_picture_is_in_the_summary_and_on_the_node(read, inputs, recording, monkeypatch):
    shown = []
    monkeypatch.setattr(recording, "show_text", lambda node_id, text: shown.append(text), raising=False)
    (inputs / "cat" / "bad.png").write_bytes(b"")
    (inputs / "cat" / "bad.txt").write_text("a cat")
    dataset, summary = read("cat")
    assert len(dataset) == 3
    assert "bad.png" in summary
    assert "0 bytes" in summary
    assert shown == [summary]


def test_the_node_shows_the_first_lines_only(monkeypatch, recording):
    shown = []
    monkeypatch.setattr(recording, "show_text", lambda node_id, text: shown.append(text), raising=False)
    report = "\n".join(map(str, range(100)))
    assert nodes.show("7", report) == report
    assert shown[0].splitlines()[-1] == "... and 88 more lines in the output"
    assert len(shown[0].splitlines()) == nodes.SHOWN_LINES + 1


def test_repeats_and_weight_multiply_those_of_the_source(read, inputs):
    (inputs / "kohya").mkdir()
    (inputs / "dog").rename(inputs / "kohya" / "3_dog")
    dataset, _ = read("kohya", repeats=2, loss_weight=0.5)
    assert (dataset.items[0].repeats, dataset.items[0].weight) == (6, 0.5)


def test_two_datasets_are_joined_and_balanced(read):
    cats, _ = read("cat")
    both, _ = read("dog", dataset=cats)
    assert both.concepts == {"cat": 3, "dog": 1}
    balanced, summary = read("dog", dataset=cats, balance="equal")
    assert balanced.concepts == {"cat": 3, "dog": 3}
    assert "2 concepts" in summary


def test_caption_widgets_reach_the_engines_rules(read):
    dataset, _ = read(
        "cat", trigger=" sks ", caption_dropout=0.1, shuffle_tags=True, keep_tags=1, styles="Keyword 1, long text 3"
    )
    rules = dataset.options.rules
    assert (rules.trigger, rules.dropout, rules.shuffle, rules.keep_tokens) == ("sks", 0.1, True, 1)
    assert dataset.options.styles == (("keyword", 1.0), ("long text", 3.0))


def test_neutral_widgets_leave_it_to_the_source(read):
    dataset, _ = read("cat")
    assert dataset.options == engine.DatasetOptions()


@pytest.mark.parametrize("text", ["keyword", "3", "keyword x", "a 1, 2"])
def test_styles_in_another_way_are_refused(read, text):
    with pytest.raises(ErnieError, match="styles must be like 'keyword 1, sentence 3'"):
        read("cat", styles=text)


@pytest.mark.parametrize("text", ["", "#fff", "white", "#12345g", "#11223344"])
def test_a_colour_in_another_way_is_refused(read, text):
    with pytest.raises(ErnieError, match="matte must be a colour like #ffffff"):
        read("cat", matte=text)


@pytest.mark.parametrize("change", ["new", "touched", "gone"])
def test_a_change_of_the_files_is_noticed(inputs, recording, change):
    cls = nodes.ErnieDatasetFolder
    before = cls.fingerprint_inputs(path="cat")
    assert cls.fingerprint_inputs(path="cat") == before
    caption = inputs / "cat" / "00.txt"
    if change == "new":
        write_pictures(inputs / "cat", count=4)
    elif change == "touched":
        caption.write_text("a dog")
    else:
        caption.unlink()
    assert cls.fingerprint_inputs(path="cat") != before
    assert cls.fingerprint_inputs() == cls.fingerprint_inputs(path="")


def test_a_change_behind_a_dataset_file_is_noticed(read, inputs, recording):
    cls = nodes.ErnieDatasetFolder
    (inputs / "elsewhere").mkdir()
    table = inputs / "elsewhere" / "data.jsonl"
    table.write_text('{"file_name": "../cat/00.png", "text": "a cat"}\n')
    dataset, _ = read("elsewhere/data.jsonl")
    assert len(dataset) == 1
    before = cls.fingerprint_inputs(path="elsewhere/data.jsonl")
    assert cls.fingerprint_inputs(path="elsewhere/data.jsonl") == before
    draw(7).save(inputs / "cat" / "00.png")
    assert cls.fingerprint_inputs(path="elsewhere/data.jsonl") != before


def test_pictures_of_the_graph_become_files_that_stay(run, tmp_path, inputs):
    images = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    dataset, _ = run("ErnieDatasetImages", images=images, **IMAGES | {"captions": "a cat\n\na dog\n"}).result
    folder = tmp_path / "output" / "ernie_datasets" / "graph"
    assert {item.image.parent for item in dataset.items} == {folder}
    assert [item.captions[0].text for item in dataset.items] == ["a cat", "a dog"]
    for image, item in zip(images, dataset.items, strict=True):
        assert (read_image(item.image) - image).abs().max() <= 0.5 / 255 + 1e-6
    again, _ = run("ErnieDatasetImages", images=images, **IMAGES | {"captions": "a cat\n\na dog\n"}).result
    assert again == dataset


def test_one_caption_is_for_all_and_none_is_the_empty_prompt(run, inputs):
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    one, _ = run("ErnieDatasetImages", images=images, **IMAGES).result
    assert {item.captions[0].text for item in one.items} == {"a square"}
    none, _ = run("ErnieDatasetImages", images=images, **IMAGES | {"captions": "", "name": "bare"}).result
    assert all(not item.captions or item.captions[0].text == "" for item in none.items)
    with pytest.raises(ErnieError, match="2 pictures need 1 or 2 captions, got 3"):
        run("ErnieDatasetImages", images=images, **IMAGES | {"captions": "a\nb\nc"})


def test_a_name_outside_of_the_folder_is_refused(run, inputs):
    with pytest.raises(ErnieError, match="name must be a folder inside the output folder"):
        run("ErnieDatasetImages", images=torch.rand(1, 32, 32, 3), **IMAGES | {"name": "../../elsewhere"})


def test_masks_of_the_graph_belong_to_their_pictures(run, inputs):
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 32, 32)
    masks[0, :16], masks[1, 16:] = 1, 1
    dataset, _ = run("ErnieDatasetImages", images=images, masks=masks, **IMAGES).result
    for item, mask in zip(dataset.items, masks, strict=True):
        assert torch.equal(torch.from_numpy(load_mask(item.mask).copy()).float() / 255, mask)


def test_pairs_are_read(run, inputs):
    write_pairs(inputs / "pairs", count=3)
    pairs, summary = run("ErniePairsFolder", path="pairs", **PAIRS).result
    assert len(pairs) == 3
    assert summary.startswith("3 pairs for 1 prompts")
    assert all("bright" in pair.chosen.image.name for pair in pairs.pairs)
    best, _ = run("ErniePairsFolder", path="pairs", **PAIRS | {"max_per_prompt": 1}).result
    assert [pair.margin for pair in best.pairs] == [max(pair.margin for pair in pairs.pairs)]


def test_pairs_are_no_dataset_and_say_so(read, inputs):
    write_pairs(inputs / "pairs", count=1)
    (inputs / "folders" / "chosen").mkdir(parents=True)
    (inputs / "folders" / "rejected").mkdir()
    with pytest.raises(ErnieError, match="read it as pairs"):
        read("folders")
