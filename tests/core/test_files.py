"""Scoring a folder: what counts as its pictures, prompts and categories, and what cannot be used."""

import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.builtin import BuiltinScorer
from ernie_pack.ernie_core.scoring.files import list_pictures, read_prompt, score_files
from ernie_pack.ernie_core.scoring.scorer import score_stream
from PIL import Image
from PIL.PngImagePlugin import PngInfo


class Brightness:
    """Reads prompts; its number is the picture's mean plus the prompt's length."""

    name, key = "brightness", "1"
    low = high = None
    higher_is_better = True
    reads_prompt = True

    def score(self, images, prompts=None, *, batch_size=8, on_scored=None):
        return score_stream(
            images,
            prompts,
            prepare=lambda rgb: float(rgb.mean()),
            run=lambda made, texts: [m + len(t) for m, t in zip(made, texts, strict=True)],
            reads_prompt=True,
            name=self.name,
            batch_size=batch_size,
            on_scored=on_scored,
        )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / ".trash").mkdir()
    for name, value in (("b.png", 20), ("a.png", 10), ("cats/c.jpg", 30), (".trash/x.png", 9), ("e.png", 40)):
        info = PngInfo()
        if name == "a.png":
            info.add_text("ernie_prompt", "xx")
        more = {"pnginfo": info} if name.endswith("png") else {}
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name, **more)
    (tmp_path / "b.txt").write_text("\ufeffyyy\n", encoding="utf-8")
    (tmp_path / "cats" / "c.txt").write_text("z")
    (tmp_path / "d.png").write_bytes(b"no picture")
    (tmp_path / "notes.md").write_text("no")
    return tmp_path


def test_which_files_and_prompts(folder):
    files = list_pictures(folder)
    assert [p.relative_to(folder).as_posix() for p in files] == ["a.png", "b.png", "cats/c.jpg", "d.png", "e.png"]
    assert [read_prompt(p) for p in files] == ["xx", "yyy", "z", "", ""]


def test_a_folder_s_scores_have_labels_categories_prompts_and_files(folder):
    counts = []
    done = score_files(Brightness(), list_pictures(folder), folder=folder, batch_size=2, on_scored=counts.append)
    scores = done.scores
    assert scores.labels == ("a.png", "b.png", "cats/c.jpg")
    assert scores.values == (12, 23, pytest.approx(31, abs=1))
    assert scores.categories == ("", "", "cats")
    assert scores.prompts == ("xx", "yyy", "z")
    assert scores.files == tuple(str((folder / n).resolve()) for n in ("a.png", "b.png", "cats/c.jpg"))
    assert counts == [2, 3]
    assert [p.split(":")[0] for p in done.problems] == ["d.png", "e.png"]
    assert "has no prompt" in done.problems[1]


def test_a_scorer_without_prompts_takes_all_that_can_be_read(folder):
    done = score_files(BuiltinScorer(measure="exposure"), list_pictures(folder), folder=folder, batch_size=2)
    assert done.scores.labels == ("a.png", "b.png", "cats/c.jpg", "e.png")
    assert len(done.problems) == 1
    assert "d.png" in done.problems[0]


def test_given_prompts_stand_for_those_of_the_files(folder):
    files = list_pictures(folder)
    assert score_files(Brightness(), files, prompts="q").scores.values == (11, 21, pytest.approx(31, abs=1), 41)
    with pytest.raises(ErnieError, match="5 pictures and 2 prompts"):
        score_files(Brightness(), files, prompts=["a", "b"])


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ErnieError, match="holds no pictures"):
        list_pictures(tmp_path)
    with pytest.raises(ErnieError, match="is not a folder"):
        list_pictures(tmp_path / "none")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ErnieError, match=r"none of 1 pictures could be scored .*empty file"):
        score_files(BuiltinScorer(), list_pictures(tmp_path))


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """Peak of the arrays that Python holds, for 4 and for 24 pictures of 3 MB each."""
    import tracemalloc

    for i in range(24):
        Image.fromarray(np.full((1000, 1000, 3), i, np.uint8)).save(tmp_path / f"{i}.png", compress_level=1)
    peaks = []
    for count in (4, 24):
        tracemalloc.start()
        score_files(Brightness(), list_pictures(tmp_path)[:count], prompts="p", batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
