"""Prompt lists are read row by row, and nothing that was made is made again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ernie_pack.ernie_core.batch import (
    MANIFEST,
    MAX_SEED,
    Row,
    append_manifest,
    fingerprint,
    hash_pixels,
    read_image,
    read_manifest,
    read_rows,
    run_folder,
    run_rows,
)
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from PIL import Image

DEFAULTS = Row(label="", prompt="", negative="", seed=7, width=64, height=32, steps=4, cfg=4.0, shift=4.0)


def prompts(rows: list[Row]) -> list[str]:
    return [row.prompt for row in rows]


def test_text_gives_one_row_per_line_and_counts_seeds_up():
    rows, problems = read_rows("a red apple\n\n# a comment\na blue door", DEFAULTS)
    assert prompts(rows) == ["a red apple", "a blue door"]
    assert [row.seed for row in rows] == [7, 8]
    assert [row.label for row in rows] == ["row 1", "row 4"]
    assert not problems


def test_seeds_wrap_around_at_64_bits():
    rows, _ = read_rows("a\nb", Row(**{**DEFAULTS.__dict__, "seed": MAX_SEED}))
    assert [row.seed for row in rows] == [MAX_SEED, 0]


def test_csv_columns_override_the_defaults(tmp_path: Path):
    (tmp_path / "list.csv").write_text(
        'prompt,negative,seed,width,height,steps,cfg,shift\n"red, round",blurry,3,128,64,8,1,3\nplain,,,,,,,\n'
    )
    rows, problems = read_rows("list.csv", DEFAULTS, folder=tmp_path)
    first = Row(
        label="row 1", prompt="red, round", negative="blurry", seed=3, width=128, height=64, steps=8, cfg=1.0, shift=3.0
    )
    assert rows[0] == first
    assert rows[1] == Row(**{**DEFAULTS.__dict__, "label": "row 2", "prompt": "plain", "seed": 8})
    assert not problems


def test_a_sampler_column_and_rows_without_it(tmp_path: Path):
    """euler is neutral: such a row has the hash that it had before there was a choice, so old folders go on."""
    (tmp_path / "list.csv").write_text("prompt,sampler\nred,heun\nred,\nred,euler\nred,eulr\n")
    rows, problems = read_rows("list.csv", replace(DEFAULTS, sampler="unipc"), folder=tmp_path, count_seeds=False)
    assert [row.sampler for row in rows] == ["heun", "unipc", "euler"]
    assert "sampler" not in rows[2].settings()
    assert rows[2].hash == "69c6b2370ca9"  # computed before the field existed
    assert len({row.hash for row in rows}) == 3
    (problem,) = problems
    assert "sampler must be euler, heun" in str(problem)
    assert "got 'eulr'" in str(problem)


def test_jsonl_and_byte_order_mark(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"Prompt": "\u732b", "seed": 0}, ensure_ascii=False).encode())
    rows, _ = read_rows(str(path), DEFAULTS)
    assert (rows[0].prompt, rows[0].seed) == ("\u732b", 0)


def test_a_folder_is_read_file_by_file_in_name_order(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not a prompt")
    rows, _ = read_rows(str(tmp_path), DEFAULTS)
    assert [(row.label, row.prompt) for row in rows] == [("a.txt row 1", "first"), ("b.txt row 1", "second")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "good"}\n{broken', "row 2: is not JSON"),
        ("x.jsonl", '{"prompt": "good"}\n["a"]', "row 2: must be an object"),
        ("x.jsonl", '{"prompt": "good"}\n{"prompt": " "}', "row 2: has no prompt"),
        (
            "x.jsonl",
            '{"prompt": "good"}\n{"prompt": "a", "sed": 1}',
            "row 2: has unknown columns sed; known are prompt",
        ),
        (
            "x.csv",
            "prompt,width\ngood,64\nbad,1000",
            "row 2: width must be a multiple of 16, got 1000; use 992 or 1008",
        ),
        ("x.csv", "prompt,seed\ngood,1\nbad,red", "row 2: seed must be a whole number, got 'red'"),
        ("x.csv", "prompt,seed\ngood,1\nbad,-4", "row 2: seed must lie between 0 and"),
        ("x.csv", "prompt,steps\ngood,1\nbad,0", "row 2: steps must be at least 1, got 0"),
        ("x.csv", "prompt,cfg\ngood,1\nbad,nan", "row 2: cfg must be 0 or more, got nan"),
        ("x.csv", "prompt\ngood\nred, round", "row 2: has 2 cells, the header has 1"),
        ("x.txt", b"good\n\xff\xfe bad", "row 2: is not UTF-8 text"),
    ],
)
def test_a_bad_row_is_named_and_the_good_ones_stay(tmp_path: Path, name: str, content, message: str):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, problems = read_rows(name, DEFAULTS, folder=tmp_path)
    assert prompts(rows) == ["good"]
    assert message in str(problems[0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no usable row .it holds no prompts"),
        ("missing.csv", "no such prompt file: missing.csv"),
        ("empty", "holds no .txt, .csv, .jsonl file"),
        ("header.csv", "header: needs a column named prompt, got text"),
    ],
)
def test_nothing_usable_is_an_error(tmp_path: Path, source: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "header.csv").write_text("text\nred")
    with pytest.raises(ErnieError, match=message):
        read_rows(source, DEFAULTS, folder=tmp_path)


def test_the_hash_follows_the_picture_not_the_place():
    (a,), _ = read_rows("apple", DEFAULTS)
    moved = Row(**{**a.__dict__, "label": "row 9"})
    assert a.hash == moved.hash
    for field, value in [("prompt", "pear"), ("seed", 8), ("width", 80), ("steps", 5), ("cfg", 1.0), ("shift", 3.0)]:
        assert Row(**{**a.__dict__, field: value}).hash != a.hash, field


class Studio:
    """Counts what it makes; the picture's grey is the seed."""

    def __init__(self, fail_at: int | None = None):
        self.made: list[str] = []
        self.encoded: list[str] = []
        self.fail_at = fail_at

    def run(self, rows: list[Row], folder: Path):
        return run_rows(rows, folder, encode=self.encode, generate=self.generate, save=self.save, on_row=self.on_row)

    def on_row(self, number: int, total: int, row: Row) -> None:
        if number == self.fail_at:
            raise Interrupted

    def encode(self, text: str) -> str:
        self.encoded.append(text)
        return text.upper()

    def generate(self, row: Row, positive: str, negative: str | None):
        assert positive == row.prompt.upper()
        assert negative == (None if row.cfg == 1 else row.negative.upper())
        self.made.append(row.prompt)
        return torch.full((row.height, row.width, 3), row.seed / 255)

    def save(self, image, path: Path, row: Row) -> None:
        Image.fromarray((image * 255).round().byte().numpy()).save(path)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path):
    rows, _ = read_rows("one\ntwo\nthree", DEFAULTS)
    first = Studio(fail_at=3)
    with pytest.raises(Interrupted):
        first.run(rows, tmp_path)
    assert first.made == ["one", "two"]

    second = Studio()
    result = second.run(rows, tmp_path)
    assert second.made == ["three"]
    assert (result.made, result.kept) == (1, 2)
    assert [float(read_image(path)[0, 0, 0] * 255) for path in result.files] == [7, 8, 9]


def test_a_half_written_manifest_line_does_not_lose_the_others(tmp_path: Path):
    rows, _ = read_rows("one\ntwo", DEFAULTS)
    Studio().run(rows, tmp_path)
    manifest = tmp_path / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-20])
    studio = Studio()
    studio.run(rows, tmp_path)
    assert studio.made == ["two"]
    assert len(read_manifest(tmp_path)) == 2


def test_a_deleted_picture_is_made_again(tmp_path: Path):
    rows, _ = read_rows("one\ntwo", DEFAULTS)
    Studio().run(rows, tmp_path).files[0].unlink()
    studio = Studio()
    studio.run(rows, tmp_path)
    assert studio.made == ["one"]


def test_equal_rows_share_one_picture_and_equal_prompts_one_encoding(tmp_path: Path):
    (row, other), _ = read_rows("same\nsame", DEFAULTS)
    studio = Studio()
    result = studio.run([row, other, row], tmp_path)
    assert studio.made == ["same", "same"]  # two seeds
    assert studio.encoded == ["same", ""]
    assert result.files[0] == result.files[2] != result.files[1]


def test_the_negative_is_not_encoded_at_cfg_1(tmp_path: Path):
    rows, _ = read_rows("one", Row(**{**DEFAULTS.__dict__, "cfg": 1.0}))
    studio = Studio()
    studio.run(rows, tmp_path)
    assert studio.encoded == ["one"]


def test_manifest_lines_hold_the_row(tmp_path: Path):
    (row,), _ = read_rows("\u732b", DEFAULTS)
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    append_manifest(tmp_path, row, "a.png")
    entry = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert entry["prompt"] == "\u732b"
    assert entry["hash"] == row.hash
    assert entry["pixels"] == hash_pixels(tmp_path / "a.png")


def test_what_is_neutral_does_not_change_a_rows_hash():
    """Pictures made before a setting existed are still found: this hash is that of release 0.1.0."""
    assert DEFAULTS.hash == "38608311469e"
    assert "loras" not in DEFAULTS.settings()
    assert replace(DEFAULTS, enhance=True).hash != DEFAULTS.hash


def test_a_row_survives_json():
    row = replace(DEFAULTS, loras=(("a.safetensors", 0.5),), checkpoint="b", variant=2, enhance=True)
    again = Row.from_settings(json.loads(json.dumps(row.settings())))
    assert again == row
    assert again.hash == row.hash
    with pytest.raises(ErnieError, match="missing seed"):
        Row.from_settings({k: v for k, v in row.settings().items() if k != "seed"})
    with pytest.raises(ErnieError, match="unknown colour"):
        Row.from_settings({**row.settings(), "colour": 1})


def test_the_pixels_hash_is_of_pixels_and_size(tmp_path: Path):
    for name, size, comment in (("a", (4, 2), 1), ("b", (4, 2), 9), ("c", (2, 4), 1)):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png", compress_level=comment)
    a, b, c = (hash_pixels(tmp_path / f"{name}.png") for name in "abc")
    assert a == b != c


def test_a_picture_that_did_not_arrive_whole_is_not_in_the_manifest(tmp_path: Path):
    studio = Studio()
    studio.save = lambda image, path, row: path.write_bytes(b"half a picture")
    rows, _ = read_rows("one", DEFAULTS)
    with pytest.raises(ErnieError, match="cannot be read as a picture"):
        studio.run(rows, tmp_path)
    assert read_manifest(tmp_path) == {}


@pytest.mark.parametrize("name", ["", " ", "..", "../elsewhere", "."])
def test_a_run_stays_inside_the_output_folder(tmp_path: Path, name: str):
    with pytest.raises(ErnieError, match="must be a folder inside the output folder"):
        run_folder(tmp_path / "output", name)


def test_the_report_counts_and_names(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "good"}\n{broken')
    rows, problems = read_rows("x.jsonl", DEFAULTS, folder=tmp_path)
    report = Studio().run(rows, tmp_path).report(problems)
    assert report.startswith("1 made, 0 already there, 1 not usable")
    assert "row 2: is not JSON" in report


def test_the_fingerprint_changes_with_prompt_files_and_with_deleted_pictures(tmp_path: Path):
    source, output = tmp_path / "list.txt", tmp_path / "output"
    source.write_text("one")

    def look():
        return fingerprint("list.txt", "run", inputs=tmp_path, output=output)

    empty = look()
    rows, _ = read_rows("list.txt", DEFAULTS, folder=tmp_path)
    files = Studio().run(rows, run_folder(output, "run")).files
    made = look()
    assert made != empty
    assert made == look()
    files[0].unlink()
    deleted = look()
    assert deleted != made
    source.write_text("one\ntwo")
    assert look() != deleted
