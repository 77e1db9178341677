"""Batch from Prompts: rows reach the sampler with their own settings, and a second run makes nothing."""

import json
from types import SimpleNamespace

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.samplers import Sampler

WIDGETS = {
    **{"source": "one\ntwo", "name": "run", "negative": "bad", "width": 32, "height": 48, "preset": "custom"},
    **{"steps": 2, "cfg": 3.0, "shift": 4.0, "seed": 10, "collect": True},
    **{"wildcards": False, "variations": 1},
}
SOCKETS = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}


def batch(run, **changes):
    return run("ErnieBatchFromPrompts", **(SOCKETS | WIDGETS | changes))


def samples(recording) -> list:
    return [call[1:] for call in recording.calls if call[0] == "sample"]


def test_each_row_is_sampled_with_its_own_seed(run, recording):
    images, report, _ = batch(run).result
    assert [(call[1], call[6]) for call in samples(recording)] == [([["one", {}]], 10), ([["two", {}]], 11)]
    assert len(images) == 2
    assert images[0].shape == (1, 3, 2, 3)
    assert report.startswith("2 made, 0 already there, 0 not usable")


def test_a_second_run_makes_nothing_and_gives_the_same_pictures(run, recording):
    first = batch(run).result
    recording.calls.clear()
    second = batch(run).result
    assert not samples(recording)
    assert all((a == b).all() for a, b in zip(first[0], second[0], strict=True))
    assert second[1].startswith("0 made, 2 already there")


def test_columns_override_the_widgets(run, recording, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "list.csv").write_text("prompt,seed,width,steps,cfg\nred,99,64,5,1\n")
    batch(run, source="list.csv")
    ((_, positive, negative, shape, sigmas, cfg, seed, _),) = samples(recording)
    assert (positive, negative, list(shape), len(sigmas), cfg, seed) == ([["red", {}]], None, [1, 1, 3, 4], 6, 1.0, 99)


def test_the_sampler_of_the_widget_and_of_the_column_reach_the_host(run, recording, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "list.csv").write_text("prompt,sampler\nred,heun\nblue,\n")
    batch(run, source="list.csv", sampler="dpmpp_2m")
    assert [call[-1] for call in samples(recording)] == [Sampler(name="heun"), Sampler(name="dpmpp_2m")]


def test_an_unreadable_row_is_reported_and_the_others_are_made(run, recording, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "list.jsonl").write_text('{"prompt": "red"}\n{broken\n{"prompt": "blue"}')
    images, report, _ = batch(run, source="list.jsonl").result
    assert len(images) == 2
    assert "row 2: is not JSON" in report


def test_pictures_carry_their_settings(run, recording):
    batch(run)
    entries = next(call[2] for call in recording.calls if call[0] == "save_png")
    assert entries["ernie_prompt"] == "one"
    assert entries["ernie_seed"] == "10"
    json.dumps(entries)


def test_collect_off_returns_no_pictures(run, recording):
    images, _, _ = batch(run, collect=False).result
    assert images == []


def test_an_empty_list_is_an_error_before_anything_runs(run, recording):
    with pytest.raises(ErnieError, match="no usable row"):
        batch(run, source="# nothing")
    assert not recording.calls


def test_progress_names_the_row_and_can_stop(run, recording, monkeypatch):
    from ernie_pack.nodes.rows import Studio

    shown = []
    monkeypatch.setattr(type(recording), "show_text", lambda self, node, text: shown.append((node, text)))
    studio = Studio(models=[], clip=None, vae=None, hidden=SimpleNamespace(unique_id="7"))
    studio.announce(2, 9, SimpleNamespace(label="row 4", prompt="a cat"))
    assert shown == [("7", "2 of 9 (row 4): a cat")]


def write_colours(tmp_path):
    folder = tmp_path / "input" / "wildcards"
    folder.mkdir(parents=True)
    (folder / "colours.txt").write_text("red\nblue\n")


def test_braces_are_plain_text_until_wildcards_is_on(run, recording, tmp_path):
    write_colours(tmp_path)
    batch(run, source="a {x} __colours__")
    assert samples(recording)[0][1] == [["a {x} __colours__", {}]]


def test_variations_count_seeds_up_and_choose_anew(run, recording, tmp_path):
    write_colours(tmp_path)
    _, report, _ = batch(run, source="a __colours__ fox\n{broken", wildcards=True, variations=6).result
    found = [(call[1][0][0], call[6]) for call in samples(recording)]
    assert [seed for _, seed in found] == list(range(10, 16))
    assert {text for text, _ in found} == {"a red fox", "a blue fox"}
    assert "row 2 variation 1 and 5 more: the prompt has a { without its }" in report
    assert "12 made" not in report


def test_the_same_choices_are_made_again(run, recording, tmp_path):
    write_colours(tmp_path)
    batch(run, source="a __colours__ fox", wildcards=True, variations=6)
    recording.calls.clear()
    _, report, _ = batch(run, source="a __colours__ fox", wildcards=True, variations=6).result
    assert not samples(recording)
    assert report.startswith("0 made, 6 already there")


def test_no_row_with_a_prompt_left_is_an_error(run, recording):
    with pytest.raises(ErnieError, match=r"no row is usable .*left no prompt"):
        batch(run, source="{}", wildcards=True)
    assert not recording.calls


def test_the_batch_makes_the_choices_of_the_wildcards_node(run, recording):
    text = "{a|b|c|d} {a|b|c|d}"
    batch(run, source=f"{text}\n{text}", wildcards=True)
    rows = [call[1][0][0] for call in samples(recording)]
    assert rows == [run("ErnieWildcards", text=text, seed=10, row=i, folder="wildcards").result[0] for i in (0, 1)]


def test_weights_of_words_are_said_to_be_plain_text(run):
    prompt, report = run("ErnieWildcards", text="a (red:1.2) fox", seed=0, row=0, folder="wildcards").result
    assert prompt == "a (red:1.2) fox"
    assert report.endswith("Read as plain text, not as weights: (red:1.2)")
