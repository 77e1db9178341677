"""Preference pairs from every format in use."""

import io
import json
from dataclasses import replace

import broken_images as odd
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.captions import Caption, draw_caption
from ernie_pack.ernie_core.training.items import DatasetOptions
from ernie_pack.ernie_core.training.pairs import read_pairs, read_pairs_manifest, write_pairs_manifest
from PIL import Image


def said(read, kind="problems"):
    return "\n".join(map(str, getattr(read, kind)))


def names(read):
    return [(pair.chosen.image.parent.name, pair.chosen.image.stem, pair.rejected.image.stem) for pair in read.pairs]


@pytest.fixture
def root(tmp_path):
    odd.write_pictures(tmp_path / "chosen", [(64, 48), (48, 64)], seed=1)
    odd.write_pictures(tmp_path / "rejected", [(64, 48), (48, 64)], captions=False, seed=2)
    return tmp_path


def as_rows(root, **more):
    rows = [
        {"prompt": f"caption {i}", "chosen": f"chosen/{i}.png", "rejected": f"rejected/{i}.png", **more}
        for i in range(2)
    ]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "pairs.jsonl"


def test_two_folders_with_equal_stems_are_pairs(root):
    read = read_pairs(root)
    assert names(read) == [("chosen", "0", "0"), ("chosen", "1", "1")]
    assert [pair.captions for pair in read.pairs] == [(Caption("caption", f"caption {i}"),) for i in range(2)]
    assert all(pair.chosen.sha256 != pair.rejected.sha256 and pair.rejected.width for pair in read.pairs)
    assert draw_caption(read.pairs[1], read.options, seed=0, number=0) == "caption 1"
    assert said(read) == said(read, "notes") == ""
    assert read.report() == "2 pairs for 2 prompts"


def test_kohya_preference_folders_are_pairs_with_repeats(tmp_path):
    odd.write_pictures(tmp_path / "4_cat" / "w", [(32, 32)], seed=1)
    odd.write_pictures(tmp_path / "4_cat" / "l", [(32, 32)], captions=False, seed=2)
    (pair,) = read_pairs(tmp_path).pairs
    assert (pair.repeats, pair.concept, pair.chosen.image.parent.name) == (4, "cat", "w")


@pytest.mark.parametrize("place", ["rejected/0.txt", "0.txt"])
def test_a_prompt_may_lie_beside_the_other_picture_or_above(root, place):
    (root / "chosen" / "0.txt").rename(root / place)
    assert read_pairs(root).pairs[0].captions == (Caption("caption", "caption 0"),)


def test_unmatched_broken_equal_and_promptless_pairs_are_listed(root):
    odd.write_pictures(root / "chosen", [(32, 32)] * 6, seed=3)
    odd.write_pictures(root / "rejected", [(32, 32)] * 5, captions=False, seed=4)
    (root / "rejected" / "0.png").write_bytes(odd.truncated())
    (root / "rejected" / "1.png").write_bytes((root / "chosen" / "1.png").read_bytes())
    (root / "chosen" / "2.txt").unlink()
    (root / "chosen" / "3.txt").write_bytes(b"\xff")
    read = read_pairs(root, DatasetOptions(missing_caption="empty"))
    assert names(read) == [("chosen", "2", "2"), ("chosen", "4", "4")]
    assert "there is no 5 in rejected" in said(read)
    assert "0.png: left out: its pair needs 0.png, which cannot be used" in said(read)
    assert "1.png: left out: it is the same file as 1.png, nothing is preferred" in said(read)
    assert "3.png: left out: 3.txt is not UTF-8" in said(read)
    assert "1 of 2 pictures have no caption (2.png)" in said(read)
    with pytest.raises(ErnieError, match=r"1 of 2 pictures have no caption"):
        read_pairs(root)


def test_pairs_of_different_aspect_are_listed(root):
    (root / "rejected" / "0.png").write_bytes(odd.encode(Image.fromarray(odd.upright(90, 30))))
    assert "has another aspect than 0.png (64 x 48, 90 x 30): both are cropped" in said(read_pairs(root))


def test_rows_are_pairs(root):
    folders, rows = read_pairs(root), read_pairs(as_rows(root))
    assert [(p.chosen.sha256, p.rejected.sha256, p.captions) for p in rows.pairs] == [
        (p.chosen.sha256, p.rejected.sha256, p.captions) for p in folders.pairs
    ]
    assert [p.margin for p in read_pairs(as_rows(root, margin=2.5)).pairs] == [2.5, 2.5]
    assert [p.margin for p in read_pairs(as_rows(root, scores=[7, 4])).pairs] == [3, 3]


def test_a_row_with_a_mask_masks_both_pictures(root):
    (root / "mask.png").write_bytes(odd.encode(Image.new("L", (64, 48), 255)))
    row = {"prompt": "x", "chosen": "chosen/0.png", "rejected": "rejected/0.png", "mask": "mask.png", "judge": 3}
    (root / "pairs.jsonl").write_text(json.dumps(row))
    read = read_pairs(root / "pairs.jsonl")
    assert read.pairs[0].chosen.mask == read.pairs[0].rejected.mask == root / "mask.png"
    assert read.pairs[0].chosen.mask_sha256 == read.pairs[0].rejected.mask_sha256 != ""
    assert "the column judge (1 of 1 rows) is not known here" in said(read)


def test_rows_that_contradict_themselves_are_listed(root):
    good = {"prompt": "x", "chosen": "chosen/0.png", "rejected": "rejected/0.png"}
    bad = [
        *(good | {"scores": [1, 2]}, good | {"scores": [1, 1]}, good | {"margin": 0}, good | {"chosen": "no.png"}),
        *({"prompt": "x"}, good | {"scores": "high"}),
    ]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, [good, *bad])))
    read = read_pairs(root / "pairs.jsonl")
    assert len(read.pairs) == 1
    for number, reason in ((2, "rejected picture has the higher score"), (4, "margin must be"), (5, "no picture")):
        assert any(p.label == f"pairs.jsonl row {number}" and reason in p.reason for p in read.problems)
    assert "row 6: left out: it is no pair" in said(read)
    assert "row 7: left out" in said(read)
    assert "row 3: left out: a tie" in said(read, "notes")


GROUP_SIZE = 4


@pytest.fixture
def group(tmp_path):
    odd.write_pictures(tmp_path, [(32, 32)] * GROUP_SIZE, captions=False)

    def write(**values):
        row = {"prompt": "p", "images": [f"{i}.png" for i in range(GROUP_SIZE)], **values}
        (tmp_path / "groups.jsonl").write_text(json.dumps(row))
        return tmp_path / "groups.jsonl"

    return write


def expanded(read):
    return {(pair.chosen.image.stem, pair.rejected.image.stem): pair.margin for pair in read.pairs}


def test_a_ranked_group_becomes_every_pair_with_its_margin(group):
    read = read_pairs(group(ranks=[2, 1, 4, 2]))
    assert expanded(read) == {("1", "0"): 1, ("0", "2"): 2, ("1", "2"): 3, ("1", "3"): 1, ("3", "2"): 2}
    assert "1 ties are left out" in said(read, "notes")
    assert expanded(read_pairs(group(scores=[-2, -1, -4, -2]))) == expanded(read)


def test_pairs_can_be_limited_by_margin_and_per_prompt(group):
    path = group(scores=[0.1, 0.9, 0.5, 0.4])
    wide = read_pairs(path, min_margin=0.35)
    assert {k: round(v, 6) for k, v in expanded(wide).items()} == {
        ("1", "0"): 0.8,
        ("2", "0"): 0.4,
        ("1", "2"): 0.4,
        ("1", "3"): 0.5,
    }
    assert "2 pairs below the least margin 0.35 are left out" in said(wide, "notes")
    few = read_pairs(path, max_pairs_per_prompt=2)
    assert set(expanded(few)) == {("1", "0"), ("1", "3")}
    assert "4 pairs beyond 2 per prompt are left out" in said(few, "notes")


@pytest.mark.parametrize("values", [{}, {"ranks": [1, 2, 3, 4], "scores": [1, 2, 3, 4]}, {"ranks": [1, 2]}])
def test_a_group_that_cannot_be_ranked_is_listed(group, values):
    with pytest.raises(ErnieError, match=r"holds no usable pair .groups.jsonl row 1: left out"):
        read_pairs(group(**values))


def test_a_manifest_of_pairs_reads_back_equal(root):
    read = read_pairs(as_rows(root, scores=[3, 1]))
    read = replace(read, options=replace(read.options, styles=(("caption", 1.0),)))
    write_pairs_manifest(read, root / "job" / "manifest.jsonl")
    assert read_pairs_manifest(root / "job" / "manifest.jsonl") == read
    assert read_pairs(root / "job") == read
    (root / "rejected" / "0.png").unlink()
    left = read_pairs_manifest(root / "job" / "manifest.jsonl")
    assert names(left) == [("chosen", "1", "1")]
    assert "0.png: left out" in said(left)


def test_pickapic_rows_are_pairs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def picture(value):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (value, 0, 0)).save(buffer, "JPEG")
        return buffer.getvalue()

    table = {
        "jpg_0": [picture(10), picture(20), picture(30), b"bad"],
        "jpg_1": [picture(110), picture(120), picture(130), picture(140)],
        "label_0": [1.0, 0.0, 0.5, 1.0],
        "caption": ["a", "b", "c", "d"],
        "best_image_uid": ["x"] * 4,
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "pick.parquet")
    read = read_pairs(tmp_path / "pick.parquet")
    red = [[Image.open(side.image).getpixel((0, 0))[0] for side in (p.chosen, p.rejected)] for p in read.pairs]
    assert [(round(a, -1), round(b, -1)) for a, b in red] == [(10, 110), (120, 20)]
    assert [pair.captions[0].text for pair in read.pairs] == ["a", "b"]
    assert "row 3: left out: a tie" in said(read, "notes")
    assert "cannot be used" in said(read)


def test_without_pyarrow_the_error_names_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "pick.parquet").write_bytes(b"x")
    with pytest.raises(ErnieError, match=r"needs the package pyarrow"):
        read_pairs(tmp_path / "pick.parquet")


def test_what_holds_no_pairs_says_so(tmp_path):
    with pytest.raises(ErnieError, match=r"no file or folder"):
        read_pairs(tmp_path / "x")
    with pytest.raises(ErnieError, match=r"expected the folders chosen and rejected, or w and l"):
        read_pairs(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ErnieError, match=r"expected .jsonl"):
        read_pairs(tmp_path / "x.txt")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "rejected").mkdir()
    with pytest.raises(ErnieError, match=r"no usable pair .nothing was found"):
        read_pairs(tmp_path)
