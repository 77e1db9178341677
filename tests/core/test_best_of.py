"""Best of N: the best are kept, few pictures are held, an interrupted run goes on, nothing is made twice."""

import dataclasses
import gc
import weakref

import pytest
import torch
from ernie_pack.ernie_core.batch import Row
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.scoring.best_of import JOURNAL, run_best_of
from PIL import Image

ROW = Row(label="", prompt="fox", negative="", seed=0, width=16, height=16, steps=1, cfg=4.0, shift=4.0)


class Red:
    """The score of a picture is how red it is; candidates' redness follows from their seeds."""

    name, key = "red", "1"
    low = high = None
    reads_prompt = False

    def __init__(self, higher_is_better=True):
        self.higher_is_better = higher_is_better
        self.batches = []

    def score(self, images, prompts=None, *, batch_size=8, on_scored=None):
        self.batches.append(len(images))
        return [float(i[0, 0, 0]) for i in images]


def redness(seed):
    return (seed * 37) % 101


class Studio:
    """Makes pictures and counts them; `alive` = how many exist at once."""

    def __init__(self):
        self.made, self.encoded, self.alive, self.most = [], [], 0, 0

    def generate(self, row, positive, negative):
        self.made.append((row.prompt, row.seed))
        picture = torch.full((4, 4, 3), redness(row.seed) / 255)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(picture, self._gone)
        return picture

    def _gone(self):
        self.alive -= 1

    def encode(self, text):
        self.encoded.append(text)
        return text

    def save(self, image, path, row):
        Image.fromarray((image * 255).round().byte().numpy()).save(path)

    def run(self, folder, groups, scorer=None, **options):
        options = {"keep": 1, "batch_size": 4} | options
        tools = {"encode": self.encode, "generate": self.generate, "save": self.save}
        return run_best_of(groups, folder, scorer or Red(), **tools, **options)


def group(count, prompt="fox", first=0):
    return [dataclasses.replace(ROW, prompt=prompt, seed=first + i) for i in range(count)]


def seeds_in(folder):
    return sorted(int(p.stem.split("_")[1]) for p in folder.glob("*.png"))


def best_seeds(count, keep):
    return sorted(sorted(range(count), key=lambda s: -redness(s))[:keep])


def test_the_best_of_each_prompt_are_kept_best_first(tmp_path):
    result = Studio().run(tmp_path, [group(10), group(10, "boat")], keep=3)
    assert seeds_in(tmp_path) == sorted(best_seeds(10, 3) * 2)
    assert not (tmp_path / "rejected").exists()
    assert result.kept.prompts == ("fox",) * 3 + ("boat",) * 3
    assert list(result.kept.values[:3]) == sorted((redness(s) for s in range(10)), reverse=True)[:3]
    assert len(result.candidates) == result.made == 20
    assert [bool(f) for f in result.candidates.files].count(True) == 6


def test_64_candidates_are_never_held_together(tmp_path):
    studio, scorer = Studio(), Red()
    studio.run(tmp_path, [group(64)], scorer, keep=2)
    gc.collect()
    assert len(studio.made) == 64
    assert studio.most <= 2
    assert set(scorer.batches) == {4}
    assert seeds_in(tmp_path) == best_seeds(64, 2)


def test_rejected_ones_can_stay_for_pairs(tmp_path):
    result = Studio().run(tmp_path, [group(6)], keep=2, rejected="keep")
    assert seeds_in(tmp_path) == best_seeds(6, 2)
    assert seeds_in(tmp_path / "rejected") == sorted(set(range(6)) - set(best_seeds(6, 2)))
    assert all(result.candidates.files)


def test_where_lower_is_better(tmp_path):
    Studio().run(tmp_path, [group(8)], Red(higher_is_better=False))
    assert seeds_in(tmp_path) == [min(range(8), key=redness)]


@pytest.mark.parametrize("rejected", ["delete", "keep"])
def test_an_interrupt_keeps_what_is_done_and_the_next_run_goes_on(tmp_path, rejected):
    studio = Studio()

    def stop(number, total, row):
        assert total == 12
        if number == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.run(tmp_path, [group(12)], rejected=rejected, on_candidate=stop)
    assert len(studio.made) == 7
    assert len(list(tmp_path.rglob("*.png"))) == (1 + 3 if rejected == "delete" else 7)  # 3 are not scored yet
    result = studio.run(tmp_path, [group(12)], rejected=rejected)
    assert studio.made == [("fox", s) for s in range(12)], "nothing twice"
    assert result.made == 5
    assert seeds_in(tmp_path) == best_seeds(12, 1)


def test_a_second_run_makes_nothing_and_more_candidates_only_the_new(tmp_path):
    studio = Studio()
    studio.run(tmp_path, [group(5)])
    again = studio.run(tmp_path, [group(5)])
    assert (again.made, len(studio.made), studio.encoded) == (0, 5, ["fox", ""])
    studio.run(tmp_path, [group(9)])
    assert studio.made[5:] == [("fox", s) for s in range(5, 9)]
    assert seeds_in(tmp_path) == best_seeds(9, 1)


def test_keeping_more_than_before_makes_the_deleted_ones_again(tmp_path):
    studio = Studio()
    studio.run(tmp_path, [group(6)], keep=1)
    result = studio.run(tmp_path, [group(6)], keep=3)
    assert seeds_in(tmp_path) == best_seeds(6, 3)
    assert all(result.kept.files)


def test_a_journal_with_a_torn_line_and_of_another_scorer(tmp_path):
    studio = Studio()
    studio.run(tmp_path, [group(4)])
    journal = tmp_path / JOURNAL
    lines = journal.read_text(encoding="utf-8").splitlines()
    journal.write_text("\n".join([*lines[:3], lines[3][:20]]), encoding="utf-8")
    studio.run(tmp_path, [group(4)])
    assert len(studio.made) <= 5
    other = Red()
    other.name = "other"
    studio.run(tmp_path, [group(4)], other)
    assert sum(other.batches) == 4


def test_at_cfg_1_no_negative_is_encoded(tmp_path):
    studio = Studio()
    studio.run(tmp_path, [[dataclasses.replace(r, cfg=1.0) for r in group(3)]])
    assert studio.encoded == ["fox"]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 4}, {"rejected": "burn"}])
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(ErnieError, match="must"):
        Studio().run(tmp_path, [group(3)], **options)
    assert list(tmp_path.iterdir()) == []
