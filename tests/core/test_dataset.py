"""Training data: every format compiles to the same items, and nothing is left out in silence."""

import json
from dataclasses import replace
from pathlib import Path

import broken_images as odd
import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.training.captions import Caption, CaptionRules
from ernie_pack.ernie_core.training.dataset import (
    DatasetOptions,
    balance_concepts,
    dataset_from_images,
    detect_format,
    join_datasets,
    read_dataset,
    read_manifest,
    write_manifest,
)
from PIL import Image

SIZES = [(64, 48), (48, 64), (80, 80)]


@pytest.fixture
def folder(tmp_path):
    return odd.write_pictures(tmp_path / "pics", SIZES)


def texts(dataset):
    return {item.image.name: [caption.text for caption in item.captions] for item in dataset.items}


def said(dataset, kind="problems"):
    return "\n".join(map(str, getattr(dataset, kind)))


# --- formats ---


def as_kohya(folder):
    root = folder.parent / "kohya"
    root.mkdir()
    folder.rename(root / "3_pics")
    return root


def as_musubi_toml(folder):
    path = folder.parent / "data.toml"
    path.write_text('[general]\nnum_repeats = 3\ncaption_extension = ".txt"\n[[datasets]]\nimage_directory = "pics"\n')
    return path


def as_sd_scripts_toml(folder):
    path = folder.parent / "data.toml"
    path.write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pics'\nnum_repeats = 3\n")
    return path


def as_diffusion_pipe(folder):
    path = folder.parent / "dataset.toml"
    path.write_text("[[directory]]\npath = 'pics'\nnum_repeats = 3\n")
    return path


def as_aitoolkit_json(folder):
    job = {"job": "extension", "config": {"process": [{"datasets": [{"folder_path": str(folder), "num_repeats": 3}]}]}}
    path = folder.parent / "job.json"
    path.write_text(json.dumps(job))
    return path


def as_aitoolkit_yaml(folder):
    pytest.importorskip("yaml")
    path = folder.parent / "job.yaml"
    path.write_text(
        f"config:\n  process:\n  - datasets:\n    - folder_path: '{folder}'\n      caption_ext: txt\n"
        "      num_repeats: 3\n"
    )
    return path


def rows(image, text):
    return [{image: f"{i}.png", text: f"caption {i}", "repeats": 3, "concept": "pics"} for i in range(len(SIZES))]


def as_hf_jsonl(folder):
    lines = [json.dumps(row) for row in rows("file_name", "text")]
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return folder


def as_diffsynth_csv(folder):
    lines = ["image,prompt,repeats,concept", *(f"{i}.png,caption {i},3,pics" for i in range(len(SIZES)))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def as_diffsynth_json(folder):
    (folder / "metadata.json").write_text(json.dumps(rows("image", "prompt")))
    return folder


def as_manifest(folder):
    like = {"repeats": 3, "concept": "pics"}
    dataset = read_dataset(folder)
    write_manifest(replace(dataset, items=tuple(replace(i, **like) for i in dataset.items)), folder / "manifest.jsonl")
    return folder


FOREIGN = [
    *(as_kohya, as_musubi_toml, as_sd_scripts_toml, as_diffusion_pipe, as_aitoolkit_json, as_aitoolkit_yaml),
    *(as_hf_jsonl, as_diffsynth_csv, as_diffsynth_json, as_manifest),
]


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_every_format_compiles_to_the_same_items(make, folder):
    plain = read_dataset(folder)
    assert said(plain) == ""
    read = read_dataset(make(folder))
    facts = ("captions", "repeats", "concept", "width", "height", "sha256", "perceptual_hash", "weight", "boxes")
    got = [{name: getattr(item, name) for name in facts} for item in read.items]
    expected = [
        {name: getattr(replace(item, repeats=3, concept="pics"), name) for name in facts} for item in plain.items
    ]
    assert got == expected
    assert all(item.image.is_file() for item in read.items)


def test_a_manifest_reads_back_equal(folder):
    (folder / "0-masklabel.png").write_bytes(odd.encode(Image.new("L", SIZES[0], 200)))
    options = DatasetOptions(
        rules=CaptionRules(trigger="sks", dropout=0.1), styles=(("caption", 2.0),), matte=(1, 2, 3)
    )
    dataset = read_dataset(folder, options=options)
    dataset = replace(
        dataset,
        items=tuple(
            replace(item, boxes=((0.0, 0.25, 0.5, 1.0),), keywords=("red",), resolutions=(256, 512), max_upscale=1.5)
            for item in dataset.items
        ),
    )
    for path in (folder / "manifest.jsonl", folder.parent / "elsewhere" / "manifest.jsonl"):
        write_manifest(dataset, path)
        assert read_manifest(path) == dataset


def test_a_manifest_moves_with_its_folder(folder, tmp_path):
    write_manifest(read_dataset(folder), folder / "manifest.jsonl")
    moved = folder.rename(tmp_path / "moved")
    assert [item.image.parent for item in read_dataset(moved).items] == [moved] * 3


def test_a_picture_that_changed_or_went_since_the_manifest_is_listed(folder):
    write_manifest(read_dataset(folder), folder / "manifest.jsonl")
    (folder / "0.png").write_bytes(odd.encode(Image.new("RGB", (32, 32))))
    (folder / "1.png").unlink()
    read = read_manifest(folder / "manifest.jsonl")
    assert [(item.image.name, item.width) for item in read.items] == [("0.png", 32), ("2.png", 80)]
    assert "0.png: it or its mask has changed since" in said(read)
    assert "1.png: left out: cannot be read any more" in said(read)


def test_a_damaged_manifest_is_refused(folder):
    write_manifest(read_dataset(folder), folder / "manifest.jsonl")
    path = folder / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ErnieError, match=r"row 4 is not JSON.*the manifest is damaged"):
        read_manifest(path)


# --- options of foreign files ---


def test_sd_scripts_options_are_inherited_and_honoured(folder):
    odd.write_pictures(folder.parent / "7_sks dog", [(64, 64)], captions=False)
    path = folder.parent / "data.toml"
    path.write_text(
        """
[general]
shuffle_caption = true
keep_tokens = 2
caption_separator = ";"
[[datasets]]
resolution = [512, 288]
bucket_no_upscale = true
  [[datasets.subsets]]
  image_dir = "pics"
  keep_tokens = 1
  caption_dropout_rate = 0.25
  caption_prefix = "photo,"
  alpha_mask = true
  [[datasets.subsets]]
  image_dir = "7_sks dog"
  class_tokens = "sks dog"
  num_repeats = 7
"""
    )
    read = read_dataset(path)
    first, last = read.items[0], read.items[-1]
    assert first.rules == CaptionRules(shuffle=True, keep_tokens=1, separator=";", dropout=0.25)
    assert last.rules == CaptionRules(shuffle=True, keep_tokens=2, separator=";")
    assert first.captions == (Caption("caption", "photo, caption 0"),)
    assert (last.captions, last.repeats, last.concept) == ((Caption("caption", "sks dog"),), 7, "sks dog")
    assert {item.resolutions for item in read.items} == {(384,)}  # 384^2 = 512 x 288
    assert {item.max_upscale for item in read.items} == {1.0}
    assert (first.alpha, last.alpha) == ("mask", None)
    assert said(read) == ""
    assert "1 pictures without a caption get 'sks dog'" in said(read, "notes")


UNSUPPORTED = {
    "flip_aug = true": "flip_aug = True is not honoured: latents are cached unflipped",
    "random_crop = true": "random_crop = True is not honoured: crops are central",
    "is_reg = true": "is_reg = true is not honoured",
    "enable_bucket = false": "enable_bucket = false is not honoured",
    "token_warmup_step = 9": "token_warmup_step = 9 is not honoured: it is not known here",
    "control_directory = 'x'": "control_directory = 'x' is not honoured: pictures to edit are not trained",
}


@pytest.mark.parametrize("line", UNSUPPORTED)
def test_an_option_that_is_not_supported_is_listed(line, folder):
    path = folder.parent / "data.toml"
    path.write_text(f"[[datasets]]\nimage_directory = 'pics'\n{line}\n")
    assert UNSUPPORTED[line] in said(read_dataset(path))


def test_an_option_without_effect_is_noted_and_one_that_is_off_is_not(folder):
    path = folder.parent / "data.toml"
    path.write_text("[[datasets]]\nimage_directory = 'pics'\nbatch_size = 4\nflip_aug = false\ncolor_aug = false\n")
    read = read_dataset(path)
    assert said(read) == ""
    assert said(read, "notes") == "data.toml dataset 1: batch_size = 4 has no effect: it is set in the recipe"


def test_a_musubi_jsonl_dataset_is_read(folder):
    lines = [json.dumps({"image_path": str(folder / f"{i}.png"), "caption": f"text {i}"}) for i in range(3)]
    (folder.parent / "list.jsonl").write_text("\n".join(lines))
    path = folder.parent / "data.toml"
    path.write_text("[[datasets]]\nimage_jsonl_file = 'list.jsonl'\nnum_repeats = 2\n")
    read = read_dataset(path)
    assert texts(read) == {f"{i}.png": [f"text {i}"] for i in range(3)}
    assert {item.repeats for item in read.items} == {2}


def test_aitoolkit_options_are_honoured(folder):
    masks = folder.parent / "masks"
    for i, size in enumerate(SIZES[:2]):
        masks.mkdir(exist_ok=True)
        (masks / f"{i}.png").write_bytes(odd.encode(Image.new("L", size, 255)))
    for i in range(2):
        (folder / f"{i}.txt").unlink()
        (folder / f"{i}.json").write_text(json.dumps({"caption": f"long {i}", "caption_short": f"short {i}"}))
    block = {
        "dataset_path": str(folder),
        "caption_ext": "json",
        "default_caption": "a thing",
        "resolution": [512, 768],
        "mask_path": str(masks),
        "mask_min_value": 0.1,
        "caption_dropout_rate": 0.05,
        "shuffle_tokens": True,
        "keep_tokens": 1,
        "loss_multiplier": 0.5,
        "cache_latents_to_disk": True,
        "flip_x": True,
        "flip_y": False,
    }
    job = {"config": {"process": [{"trigger_word": "p3r5on", "datasets": [block], "train": {"lr": 1}}]}}
    path = folder.parent / "job.json"
    path.write_text(json.dumps(job))
    read = read_dataset(path)
    first, last = read.items[0], read.items[2]
    assert first.rules == CaptionRules(trigger="p3r5on", shuffle=True, keep_tokens=1, dropout=0.05)
    assert first.captions == (Caption("caption", "long 0"), Caption("short", "short 0"))
    assert last.captions == (Caption("caption", "a thing"),)
    assert (first.resolutions, first.weight, first.mask_floor, first.mask) == ((512, 768), 0.5, 0.1, masks / "0.png")
    assert "2.png: has no mask in" in said(read)
    assert "flip_x = True is not honoured" in said(read)
    assert "flip_y" not in said(read)
    assert "cache_latents_to_disk = True has no effect" in said(read, "notes")
    assert "only its datasets and trigger_word are read" in said(read, "notes")


def test_options_of_the_call_go_over_those_of_the_file(folder):
    path = folder.parent / "data.toml"
    path.write_text("[[datasets]]\nimage_directory = 'pics'\nshuffle_caption = true\nkeep_tokens = 3\n")
    read = read_dataset(path, options=DatasetOptions(rules=CaptionRules(shuffle=False)))
    assert read.options.rules.over(read.items[0].rules) == CaptionRules(shuffle=False, keep_tokens=3)


def test_metadata_columns_become_masks_boxes_keywords_and_styles(folder):
    (folder / "mask.png").write_bytes(odd.encode(Image.new("L", SIZES[0], 255)))
    row = {
        "file_name": "0.png",
        "prompt": "a cat",
        "caption_short": "cat",
        "keyword": ["cat, grass", "animal"],
        "instruction": "draw a cat",
        "mask": "mask.png",
        "boxes": [[16, 12, 64, 100], [0, 0, 0.5, 0.5], [90, 0, 100, 10]],
        "keywords": "cat, grass",
        "weight": 0.5,
        "aesthetic": 7.5,
    }
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    read = read_dataset(folder)
    (item,) = read.items
    assert set(item.captions) == {
        *(Caption("caption", "a cat"), Caption("short", "cat"), Caption("keyword", "cat, grass")),
        *(Caption("keyword", "animal"), Caption("instruction", "draw a cat")),
    }
    assert item.boxes == ((0.25, 0.25, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5))
    assert (item.keywords, item.weight, item.mask) == (("cat", "grass"), 0.5, folder / "mask.png")
    assert "box [90.0, 0.0, 100.0, 10.0] is left out: it covers nothing of 64 x 48" in said(read)
    assert "the column aesthetic (1 of 1 rows) is not known here and not used" in said(read)
    assert "2 pictures are in the folder but in no row" in said(read)


def test_bad_rows_are_listed_and_the_others_used(folder):
    lines = [
        *('{"file_name": "0.png", "text": "good"}', "{broken", '["list"]', '{"text": "no picture"}', ""),
        *('{"file_name": "missing.png", "text": "x"}', '{"file_name": "1.png", "text": 5}'),
        '{"file_name": "2.png", "text": "x", "boxes": [1, 2, 3]}',
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    read = read_dataset(folder)
    assert texts(read) == {"0.png": ["good"]}
    for number, reason in (
        *((2, "is not JSON"), (3, "must be an object"), (4, "names no picture"), (6, "there is no picture")),
        *((7, "text must be text, got 5"), (8, "boxes must be")),
    ):
        assert f"metadata.jsonl row {number}: left out" in said(read)
        assert reason in said(read)


# --- folders ---


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ErnieError, match=r"holds no pictures; expected .png"):
        read_dataset(tmp_path)


def test_a_folder_of_broken_pictures_is_an_error_with_the_reasons(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ErnieError, match=r"no usable picture. The first of 1 problems: .*a.png: left out: .*0 bytes"):
        read_dataset(tmp_path)


def test_broken_pictures_are_listed_and_the_others_used(folder):
    for name, data in odd.BROKEN.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("caption")
    (folder / "phone.heic").write_bytes(b"x")
    read = read_dataset(folder)
    assert len(read.items) == 3
    for name in (*odd.BROKEN, "phone.heic"):
        assert f"{name}: left out: " in said(read)


def test_missing_captions_are_an_error_unless_a_policy_says_otherwise(folder):
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text(" \n")
    with pytest.raises(ErnieError, match=r"2 of 3 pictures have no caption \(0.png, 1.png\)"):
        read_dataset(folder)
    empty = read_dataset(folder, options=DatasetOptions(missing_caption="empty"))
    assert texts(empty) == {"0.png": [""], "1.png": [""], "2.png": ["caption 2"]}
    assert "2 of 3 pictures have no caption (0.png, 1.png): they are trained with the empty prompt" in said(empty)
    default = read_dataset(folder, options=DatasetOptions(missing_caption="default", default_caption="a thing"))
    assert texts(default)["0.png"] == ["a thing"]
    with pytest.raises(ErnieError, match=r"needs a default_caption"):
        DatasetOptions(missing_caption="default")


@pytest.mark.parametrize(
    "data",
    [b"\xef\xbb\xbfred\r\napple\r\n", "red\r\napple".encode("utf-16"), b"red\rapple", b"  red\napple  "],
    ids=["utf-8 bom crlf", "utf-16", "cr", "spaces"],
)
def test_byte_order_marks_and_line_ends_do_not_reach_the_caption(data, folder):
    (folder / "0.txt").write_bytes(data)
    assert texts(read_dataset(folder))["0.png"] == ["red\napple"]


def test_a_caption_that_is_not_text_is_listed_with_its_picture(folder):
    (folder / "0.txt").write_bytes(b"caf\xe9 noir")
    (folder / "1.txt").unlink()
    (folder / "1.json").write_text("[1]")
    read = read_dataset(folder, options=DatasetOptions(missing_caption="empty"))
    assert texts(read) == {"2.png": ["caption 2"]}
    assert "0.png: left out: 0.txt is not UTF-8 text (byte 3); save it as UTF-8" in said(read)
    assert "1.png: left out: 1.json is no caption file" in said(read)


def test_pictures_that_share_a_stem_share_the_caption_and_are_listed(folder):
    (folder / "0.jpg").write_bytes(odd.encode(Image.fromarray(odd.upright()), "JPEG"))
    read = read_dataset(folder)
    assert texts(read)["0.jpg"] == texts(read)["0.png"] == ["caption 0"]
    assert "names 2 pictures (0.jpg, 0.png) that share a caption" in said(read)


def test_the_suffix_in_a_folder_name_does_not_confuse_captions(tmp_path):
    """ComfyUI's loader replaces ".png" anywhere in the path."""
    folder = odd.write_pictures(tmp_path / "data.png_set", [(32, 32)])
    assert texts(read_dataset(folder)) == {"0.png": ["caption 0"]}


def test_unicode_names_and_dots_in_names_are_read(tmp_path):
    for name in ("\u4e2d\u6587 \U0001f431", "a.b", "a"):
        (tmp_path / f"{name}.png").write_bytes(odd.encode(Image.fromarray(odd.upright(48 + len(name), 48))))
        (tmp_path / f"{name}.txt").write_text(f"of {name}", encoding="utf-8")
    read = read_dataset(tmp_path)
    assert texts(read) == {f"{name}.png": [f"of {name}"] for name in ("\u4e2d\u6587 \U0001f431", "a.b", "a")}
    assert all(caption.style == "caption" for item in read.items for caption in item.captions)


def test_suffix_files_hold_captions_of_a_style(folder):
    (folder / "0.keyword.txt").write_text("red, round")
    (folder / "0.instruction.txt").write_text("paint it")
    (folder / "0.caption").write_text("other extension")
    read = read_dataset(folder)
    assert set(read.items[0].captions) == {
        *(Caption("caption", "caption 0"), Caption("caption", "other extension")),
        *(Caption("keyword", "red, round"), Caption("instruction", "paint it")),
    }
    assert said(read) == said(read, "notes") == ""


def test_lines_become_captions_of_their_own_if_asked(folder):
    (folder / "0.txt").write_text("one\n\ntwo\none\n")
    assert texts(read_dataset(folder))["0.png"] == ["one\n\ntwo\none"]
    assert texts(read_dataset(folder, options=DatasetOptions(caption_per_line=True)))["0.png"] == ["one", "two"]


def test_captions_without_pictures_and_other_files_are_listed(folder):
    (folder / "lonely.txt").write_text("x")
    (folder / "notes.docx").write_bytes(b"x")
    read = read_dataset(folder)
    assert "lonely.txt: is a caption without a picture" in said(read)
    assert "not read: 1 x .docx" in said(read, "notes")


def test_sub_folders_are_concepts_and_hidden_ones_are_not_read(folder):
    odd.write_pictures(folder / "cats" / "old", [(40, 40)], seed=7)
    odd.write_pictures(folder / ".cache", [(40, 40)], seed=8)
    assert read_dataset(folder).concepts == {"": 3, "cats": 1}


def test_kohya_folders_without_a_number_are_listed(folder):
    root = as_kohya(folder)
    odd.write_pictures(root / "other", [(40, 40)])
    odd.write_pictures(root / "0_off", [(40, 40)])
    (root / "5_empty").mkdir()
    read = read_dataset(root)
    assert read.concepts == {"pics": 9}
    assert "1 pictures in folder other are left out" in said(read)
    assert "0_off: left out: 0 repeats" in said(read)


def test_equal_and_similar_pictures_are_noted(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "copy.txt").write_text("again")
    smooth = Image.fromarray(np.random.default_rng(5).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    for name, size in (("large", (200, 200)), ("small", (100, 100))):
        (folder / f"{name}.png").write_bytes(odd.encode(smooth.resize(size, Image.Resampling.BICUBIC)))
        (folder / f"{name}.txt").write_text(name)
    read = read_dataset(folder)
    assert len(read.items) == 6
    assert "copy.png" in said(read, "notes")
    assert "is the same file as" in said(read, "notes")
    assert "small.png; all are trained" in said(read, "notes")
    assert len(read.notes) == 2
    assert len(read_dataset(folder, options=DatasetOptions(near_duplicate_bits=-1)).notes) == 1


def test_masks_are_found_checked_and_never_pictures(folder):
    (folder / "0-masklabel.png").write_bytes(odd.encode(Image.new("L", SIZES[0], 255)))
    (folder / "1-masklabel.png").write_bytes(odd.encode(Image.new("L", (64, 10), 255)))
    (folder / "2-masklabel.png").write_bytes(odd.truncated())
    read = read_dataset(folder)
    assert [item.mask and item.mask.name for item in read.items] == ["0-masklabel.png", None, None]
    assert "1.png: its mask is left out, and it is trained whole: the mask is 64 x 10, the picture 48 x 64" in said(
        read
    )
    assert "2.png: its mask is left out, and it is trained whole: " in said(read)
    with pytest.raises(ErnieError, match=r"there is no mask folder nowhere"):
        read_dataset(folder, options=DatasetOptions(mask_folder="nowhere"))


def test_a_mask_folder_inside_the_dataset_is_not_read_as_pictures(folder):
    (folder / "masks").mkdir()
    for i, size in enumerate(SIZES):
        (folder / "masks" / f"{i}.jpg").write_bytes(odd.encode(Image.new("L", size, 255), "JPEG"))
    read = read_dataset(folder, options=DatasetOptions(mask_folder="masks", mask_floor=0.2))
    assert [item.mask.name for item in read.items] == ["0.jpg", "1.jpg", "2.jpg"]
    assert {item.mask_floor for item in read.items} == {0.2}


def test_tiny_pictures_are_listed(folder):
    (folder / "dot.png").write_bytes(odd.encode(Image.new("RGB", (8, 40))))
    (folder / "dot.txt").write_text("dot")
    assert "dot.png: left out: 8 x 40 pixels; 16 x 16 is the least" in said(read_dataset(folder))


def test_animations_are_noted(folder):
    (folder / "film.gif").write_bytes(odd.animated())
    (folder / "film.txt").write_text("film")
    read = read_dataset(folder)
    assert len(read.items) == 4
    assert "film.gif: has 3 frames; the first is used" in said(read, "notes")


def test_reading_tells_how_far_it_is_and_can_be_stopped(folder):
    calls = []
    read_dataset(folder, on_progress=lambda *call: calls.append(call[:2]))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def stop(done, total, what):
        if done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        read_dataset(folder, on_progress=stop)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.xyz", "", "is no dataset"),
        ("data.toml", "a = ", "is not valid TOML"),
        ("data.toml", "a = 1", "has neither"),
        ("job.json", '{"config": {"process": []}}', "without datasets"),
        ("job.json", '{"config": 3}', "is no ai-toolkit job"),
        ("list.parquet", "", "pairs are read as pairs"),
    ],
)
def test_a_file_that_is_no_dataset_says_so(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ErnieError, match=message):
        read_dataset(tmp_path / name)


def test_what_is_not_there_or_is_of_another_kind_says_so(folder):
    with pytest.raises(ErnieError, match=r"there is no file or folder"):
        read_dataset(folder / "nothing")
    with pytest.raises(ErnieError, match=r"format must be one of auto, folder"):
        read_dataset(folder, "zip")
    with pytest.raises(ErnieError, match=r"'toml' is read from a .toml file"):
        read_dataset(folder, "toml")
    (folder / "chosen").mkdir()
    (folder / "rejected").mkdir()
    with pytest.raises(ErnieError, match=r"read it as pairs"):
        detect_format(folder)


def test_a_folder_that_a_foreign_file_names_but_is_not_there_is_listed(folder):
    path = folder.parent / "data.toml"
    path.write_text("[[datasets]]\nimage_directory = 'pics'\n[[datasets]]\nimage_directory = 'gone'\n")
    assert "gone: left out: there is no such folder" in said(read_dataset(path))


def test_names_that_are_no_valid_unicode_survive_the_manifest(tmp_path):
    import os
    import sys

    if sys.platform != "linux":
        pytest.skip("file names are Unicode here")
    folder = odd.write_pictures(tmp_path / "pics", [(32, 32)])
    for suffix in (".png", ".txt"):
        os.rename(folder / f"0{suffix}", os.fsencode(folder) + b"/caf\xe9" + suffix.encode())
    dataset = read_dataset(folder)
    write_manifest(dataset, folder / "manifest.jsonl")
    assert read_manifest(folder / "manifest.jsonl") == dataset
    assert texts(dataset) == {"caf\udce9.png": ["caption 0"]}


def test_a_link_to_a_folder_above_is_not_followed(folder):
    try:
        (folder / "up").symlink_to(folder.parent, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    read = read_dataset(folder)
    assert len(read.items) == 3
    assert "up: left out: it is a link to a folder that it lies in" in said(read)


@pytest.mark.parametrize(
    ("name", "content", "hidden", "package"),
    [
        ("data.toml", "[[datasets]]\nimage_directory = 'pics'\n", ("tomllib", "tomli"), "tomli"),
        ("job.yaml", "config:\n  process: []\n", ("yaml",), "PyYAML"),
    ],
)
def test_a_format_whose_package_is_missing_names_it(name, content, hidden, package, folder, monkeypatch):
    import sys

    for module in hidden:
        monkeypatch.setitem(sys.modules, module, None)
    (folder.parent / name).write_text(content)
    with pytest.raises(ErnieError, match=f"the package {package}: install it"):
        read_dataset(folder.parent / name)


# --- pictures from the graph ---


def test_pictures_from_the_graph_are_written_once(tmp_path):
    images = torch.rand(3, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    images[2] = images[0]
    masks = torch.zeros(1, 32, 48)
    masks[:, :16] = 1
    first = dataset_from_images(images, ["a", "b", "c"], tmp_path / "set", masks_BHW=masks)
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.png")}
    again = dataset_from_images(images, ["a", "b", "c"], tmp_path / "set", masks_BHW=masks)
    assert again == first
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.png")} == files
    assert len(first.items) == 2
    assert sorted(c.text for item in first.items for c in item.captions) == ["a", "b", "c"]
    assert all(item.mask is not None for item in first.items)
    assert "2 pictures of the batch are equal" in said(first, "notes")
    stored = np.asarray(Image.open(first.items[0].image))
    assert np.array_equal(stored, (images[0] * 255).round().byte().numpy())
    assert read_dataset(tmp_path / "set", options=DatasetOptions(caption_per_line=True)).items != ()


def test_what_the_graph_cannot_train_says_so(tmp_path):
    images = torch.rand(2, 32, 32, 3)
    with pytest.raises(ErnieError, match=r"2 pictures need 1 or 2 captions, got 3"):
        dataset_from_images(images, ["a"] * 3, tmp_path)
    with pytest.raises(ErnieError, match=r"masks must be as many and as large as the pictures, got \[2, 8, 8\]"):
        dataset_from_images(images, ["a"], tmp_path, masks_BHW=torch.rand(2, 8, 8))
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ErnieError, match=r"NaN"):
        dataset_from_images(images, ["a"], tmp_path)


# --- several datasets ---


def concepts(folder, counts):
    for concept, count in counts.items():
        odd.write_pictures(folder / concept, [(32, 32)] * count, seed=len(concept))
    return read_dataset(folder, options=DatasetOptions(near_duplicate_bits=-1))


def test_balance_gives_concepts_equal_shares_and_drops_nothing(tmp_path):
    dataset = concepts(tmp_path / "all", {"cat": 2, "mouse": 5, "elephant": 10})
    assert balance_concepts(dataset, "equal").concepts == {"cat": 10, "mouse": 10, "elephant": 10}
    weighted = balance_concepts(dataset, {"cat": 2.0}).concepts
    assert weighted == {"cat": 20, "mouse": 10, "elephant": 10}
    assert all(item.repeats >= 1 for item in balance_concepts(dataset, {"elephant": 0.01}).items)


def test_balance_with_a_rest_differs_by_at_most_one_repeat(tmp_path):
    balanced = balance_concepts(concepts(tmp_path / "all", {"cat": 4, "mouse": 10}), "equal")
    cats = sorted(item.repeats for item in balanced.items if item.concept == "cat")
    assert cats == [2, 2, 3, 3]
    assert balanced.concepts == {"cat": 10, "mouse": 10}


def test_balance_refuses_what_makes_no_sense(tmp_path):
    dataset = concepts(tmp_path / "all", {"cat": 1, "mouse": 1})
    with pytest.raises(ErnieError, match=r"there is no concept dog; expected cat, mouse"):
        balance_concepts(dataset, {"dog": 1})
    with pytest.raises(ErnieError, match=r"must be above 0"):
        balance_concepts(dataset, {"cat": 0})


def test_joined_datasets_keep_their_own_rules_and_find_duplicates(folder, tmp_path):
    other = odd.write_pictures(tmp_path / "other", [(64, 48)])  # the same first picture
    one = read_dataset(folder, options=DatasetOptions(rules=CaptionRules(trigger="a"), max_upscale=1.0, alpha="mask"))
    two = read_dataset(other, options=DatasetOptions(rules=CaptionRules(trigger="b", dropout=0.1)))
    joined = join_datasets([one, two])
    assert [item.rules.trigger for item in joined.items] == ["a", "a", "a", "b"]
    assert [item.rules.dropout for item in joined.items] == [None, None, None, 0.1]
    assert [item.max_upscale for item in joined.items] == [1.0, 1.0, 1.0, 1.3]
    assert [joined.options.alpha_of(item) for item in joined.items] == ["mask"] * 3 + ["matte"]
    assert "is the same file as" in said(joined, "notes")
    with pytest.raises(ErnieError, match=r"need the same matte"):
        join_datasets([one, replace(two, options=replace(two.options, matte=(0, 0, 0)))])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_aspect": 0.5}, "max_aspect must be at least 1"),
        ({"missing_caption": "skip"}, "error, empty, default"),
        ({"matte": (0, 0, 300)}, "0 to 255"),
        ({"styles": (("a", -1.0),)}, "0 or more"),
        ({"alpha": "drop"}, "matte, mask"),
        ({"shuffle_variants": 0}, "at least 1"),
    ],
)
def test_options_out_of_range_say_so(values, message):
    with pytest.raises(ErnieError, match=message):
        DatasetOptions(**values)


def test_the_report_says_everything(folder):
    (folder / "bad.png").write_bytes(b"")
    report = read_dataset(folder).report()
    assert report.startswith("3 images, 3 samples per epoch, 1 concepts\n")
    assert "problem - " in report
    assert str(Path("pics") / "bad.png") in report
