"""Scoring through the nodes, without ComfyUI: what they hand on, write and refuse."""

import csv
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_scorers as tiny
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.scoring.best_of import JOURNAL
from ernie_pack.ernie_core.scoring.builtin import MEASURES, BuiltinScorer
from ernie_pack.ernie_core.scoring.clip_based import NAMES
from ernie_pack.ernie_core.scoring.ernie_aes import PROMPT_STYLES
from ernie_pack.ernie_core.scoring.loading import KINDS, list_builtin
from ernie_pack.ernie_core.scoring.network import PRECISIONS
from ernie_pack.standalone import host, load_node_classes
from PIL import Image
from random_models import write_random_models

nodes = importlib.import_module("ernie_pack.nodes.scoring")

DEFAULTS = {
    "ErnieLoadScorer": {"kind": "auto", "precision": "default", "backbone": "find", "question": "artimuse"},
    "ErnieScoreImages": {
        **{"folder": [""], "prompts": [""], "batch_size": [8], "draw": [False], "collect": [True]},
        **{"save": ["nothing"], "name": ["scores"]},
    },
    "ErnieFilterByScore": {"rule": ["top k"], "threshold": [50.0], "k": [1], "share": [0.5], "per_prompt": [False]},
    "ErnieScoreReport": {"shown": [2], "name": [""]},
    "ErnieBestOfN": {
        **{"source": "a fox", "name": "best", "choice": "custom", "n": 3, "keep": 1, "rejected": "delete"},
        **{"batch_size": 2, "negative": "", "width": 64, "height": 64, "preset": "custom", "steps": 1, "cfg": 1.0},
        **{"shift": 4.0, "seed": 7},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = write_random_models(tmp_path_factory.mktemp("models"))
    tiny.write_clip_folder(root / "clip_vision" / "clip")
    tiny.write_internvl(root / "scorers" / "ERNIE-Image-Aes")
    torch.save(tiny.laion_head("linear", 24), root / "scorers" / "head.pth")
    return root


@pytest.fixture
def session(models, tmp_path, monkeypatch):
    new = host.Session(models=models, output=tmp_path / "out", input=tmp_path / "input")
    monkeypatch.setattr(host, "session", new)
    return new


@pytest.fixture
def classes(session):
    return load_node_classes()


@pytest.fixture
def call(classes):
    def run(node_id, **inputs):
        clone = classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        output = clone.EXECUTE_NORMALIZED(**DEFAULTS.get(node_id, {}) | inputs)
        return SimpleNamespace(result=output.result, ui=output.ui)

    return run


def pictures(count=4, side=32):
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0.1, 1, count)[:, None, None, None]
    return torch.rand(count, side, side, 3, generator=generator) * ramp


@pytest.fixture
def folder(session):
    path = session.input / "photos"
    (path / "cats").mkdir(parents=True)
    for i, picture in enumerate(pictures()):
        place = path / "cats" if i % 2 else path
        Image.fromarray((picture * 255).byte().numpy()).save(place / f"{i}.png")
    return path


# --- Load Scorer -----------------------------------------------------------------------------------------------------


def test_the_lists_on_the_nodes_are_the_engine_s(classes):
    assert nodes.MEASURES == MEASURES
    assert list(nodes.BUILTIN) == list_builtin()
    assert set(nodes.KINDS) == set(KINDS) == {"auto", *NAMES}
    assert set(nodes.PRECISIONS) == {"default", *PRECISIONS}
    assert nodes.QUESTIONS == PROMPT_STYLES
    (names, *_) = classes["ErnieLoadScorer"].INPUT_TYPES()["required"]["scorer_name"]
    options = names if isinstance(names, list) else classes["ErnieLoadScorer"].GET_SCHEMA().inputs[0].options
    assert {"built-in combined", "scorers/ERNIE-Image-Aes/", "scorers/head.pth", "clip_vision/clip/"} <= set(options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("built-in sharpness", {}, "built-in sharpness"),
        ("scorers/ERNIE-Image-Aes/", {"precision": "fp32"}, "ERNIE-Image-Aes"),
        ("scorers/ERNIE-Image-Aes/", {"precision": "int8", "question": "plain"}, "ERNIE-Image-Aes"),
        ("scorers/ERNIE-Image-Aes/", {"precision": "nf4"}, "ERNIE-Image-Aes"),
        ("scorers/head.pth", {}, "LAION aesthetic"),
        ("clip_vision/clip/", {}, "CLIP score"),
        ("clip_vision/clip/", {"kind": "pickscore"}, "PickScore"),
    ],
)
def test_loading_and_scoring(call, name, options, expected):
    scorer = call("ErnieLoadScorer", scorer_name=name, **options).result[0]
    assert scorer.name == expected
    values = call("ErnieScoreImages", scorer=[scorer], images=[pictures(3)], prompts=["a fox"]).result[2]
    assert len(values) == 3
    assert all(np.isfinite(values))


@pytest.mark.parametrize("name", ["scorers/ERNIE-Image-Aes/", "clip_vision/clip/"])
def test_a_card_too_small_for_the_weights_gets_them_layer_by_layer(call, monkeypatch, name):
    options = {"images": [pictures(3)], "prompts": ["a fox"]}
    expected = call("ErnieScoreImages", scorer=[call("ErnieLoadScorer", scorer_name=name).result[0]], **options)
    monkeypatch.setattr(host, "_too_large", lambda _network: True)
    streamed = []
    streaming = importlib.import_module("ernie_pack.ernie_core.scoring.streaming")
    monkeypatch.setattr(streaming, "BlockStream", recorded(streamed, streaming.BlockStream))
    scorer = call("ErnieLoadScorer", scorer_name=name).result[0]
    for _ in range(2):
        assert call("ErnieScoreImages", scorer=[scorer], **options).result[2] == pytest.approx(expected.result[2])
    assert len(streamed) == 1


def recorded(calls, function):
    return lambda *args: calls.append(args) or function(*args)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"scorer_name": "built-in combined", "precision": "int8"}, "has no weights"),
        ({"scorer_name": "scorers/gone.pt"}, "it is not there"),
        ({"scorer_name": "vae/../../x"}, "it is not there"),
        ({"scorer_name": "scorers/head.pth", "backbone": "scorers/ERNIE-Image-Aes/"}, "must be a CLIP"),
        ({"scorer_name": "clip_vision/clip/", "precision": "fp8"}, "precision fp8 is for ERNIE-Image-Aes"),
    ],
)
def test_what_cannot_be_loaded(call, inputs, message):
    with pytest.raises(ErnieError, match=message):
        call("ErnieLoadScorer", **inputs)


# --- Score Images ----------------------------------------------------------------------------------------------------


def scored(call, **inputs):
    inputs = {"scorer": [BuiltinScorer(measure="exposure")], "images": [pictures()]} | inputs
    return call("ErnieScoreImages", **inputs)


def test_batches_and_lists_are_scored_in_order(call):
    batch = pictures()
    out = scored(call, images=[batch[:3], torch.rand(1, 16, 48, 3)])
    images, scores, values, report = out.result
    assert [tuple(i.shape) for i in images] == [(1, 32, 32, 3)] * 3 + [(1, 16, 48, 3)]
    assert torch.equal(torch.cat(images[:3]), batch[:3])
    assert list(scores.values) == values == [*BuiltinScorer(measure="exposure").score(batch[:3]), values[3]]
    assert report.startswith("4 scored by built-in exposure, 0 not usable")
    assert out.ui == {"text": [report]}


def test_numbers_are_drawn_on_copies(call):
    batch = pictures(side=96)
    before = batch.clone()
    images = scored(call, images=[batch], draw=[True]).result[0]
    assert torch.equal(batch, before)
    changed = [(a[0] - b).abs().amax(-1) > 0.02 for a, b in zip(images, batch, strict=True)]
    assert all(c[:20, :20].float().mean() > 0.3 for c in changed)
    assert not any(c[60:, 60:].any() for c in changed)


def test_a_folder_its_categories_and_what_is_written(call, folder, session):
    (folder / "broken.png").write_bytes(b"x")
    images, scores, _, report = scored(call, images=None, folder=["photos"], save=["table and pictures"]).result
    assert scores.labels == ("0.png", "2.png", "cats/1.png", "cats/3.png")
    assert scores.categories == ("", "", "cats", "cats")
    assert len(images) == 4
    assert "1 not usable" in report
    assert "broken.png" in report
    out = session.output / "scores"
    rows = list(csv.DictReader((out / "scores.csv").open(newline="")))
    assert [float(r["score"]) for r in rows] == pytest.approx(scores.values)
    assert json.loads((out / "scores.json").read_text())["scorer"] == "built-in exposure"
    best = scores.order()[0]
    (first,) = out.glob("1_*.png")
    with Image.open(first) as image:
        assert float(image.info["ernie_score"]) == pytest.approx(scores.values[best], rel=1e-4)
        assert image.info["ernie_scorer"] == "built-in exposure"
    assert len(list(out.glob("*.png"))) == 4


def test_large_folders_need_not_be_handed_on(call, folder):
    images, scores, *_ = scored(call, images=None, folder=["photos"], collect=[False]).result
    assert (images, len(scores)) == ([], 4)


def test_an_interrupt_stops_scoring(call, session):
    session.interrupted = True
    with pytest.raises(Interrupted):
        scored(call)


def test_the_node_runs_again_when_the_folder_changes(classes, folder):
    fingerprint = classes["ErnieScoreImages"].fingerprint_inputs
    before = fingerprint(folder=["photos"])
    assert fingerprint(folder=["photos"]) == before
    (folder / "0.png").unlink()
    assert fingerprint(folder=["photos"]) != before
    assert fingerprint(folder=["nowhere"]) == ["nowhere"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": None}, "got neither"),
        ({"folder": ["photos"]}, "got both"),
        ({"images": None, "folder": ["nowhere"]}, "no folder 'nowhere'"),
        ({"prompts": ["a\nb"]}, "one prompt or 4 lines expected"),
        ({"batch_size": [0]}, "batch_size"),
        ({"images": [torch.full((1, 8, 8, 3), float("nan"))]}, "NaN"),
        ({"images": [torch.zeros(1, 8, 8, 2)]}, "height, width, 3"),
        ({"save": ["table"], "name": ["../up"]}, "inside the output folder"),
    ],
)
def test_what_cannot_be_scored(call, folder, inputs, message):
    with pytest.raises(ErnieError, match=message):
        scored(call, **inputs)


def test_a_scorer_that_reads_prompts_asks_for_them(call):
    scorer = call("ErnieLoadScorer", scorer_name="clip_vision/clip/").result[0]
    with pytest.raises(ErnieError, match="no prompt came"):
        scored(call, scorer=[scorer])
    scores = scored(call, scorer=[scorer], prompts=["a\nb\nc\nd"]).result[1]
    assert scores.prompts == ("a", "b", "c", "d")


# --- Filter by Score -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options", "count"),
    [
        ("top k", {"k": [3]}, 3),
        ("top share", {"share": [0.25]}, 1),
        ("threshold", {"threshold": [-1.0]}, 4),
        ("threshold", {"threshold": [101.0]}, 0),
    ],
)
def test_filtering(call, rule, options, count):
    batch = pictures()
    scores = scored(call, images=[batch]).result[1]
    inputs = {"scores": [scores], "images": [batch], "rule": [rule]} | options
    kept, rejected, kept_scores, other_scores, report = call("ErnieFilterByScore", **inputs).result
    assert (len(kept), len(rejected)) == (len(kept_scores), len(other_scores)) == (count, 4 - count)
    if 0 < count < 4:
        assert min(kept_scores.values) >= max(other_scores.values)
        place = scores.labels.index(kept_scores.labels[0])
        assert torch.equal(kept[0][0], batch[place])
    assert f"{count} kept" in report


def test_filtering_pictures_of_a_folder(call, folder):
    scores = scored(call, images=None, folder=["photos"]).result[1]
    kept, rejected, *_ = call("ErnieFilterByScore", scores=[scores]).result
    assert (len(kept), len(rejected)) == (1, 3)


def test_filtering_needs_the_same_pictures(call):
    scores = scored(call).result[1]
    with pytest.raises(ErnieError, match="must be the 4 scored pictures, got 2"):
        call("ErnieFilterByScore", scores=[scores], images=[pictures(2)])
    with pytest.raises(ErnieError, match="name no files"):
        call("ErnieFilterByScore", scores=[scores])


# --- Best of N -------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(call, classes):
    def load(node_id, **inputs):
        return classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**inputs).result[0]

    return {
        "model": load("ErnieLoadDiffusionModel", model_name="ernie-image.safetensors", weight_dtype="fp32"),
        "clip": load("ErnieLoadTextEncoder", encoder_name="ministral-3-3b.safetensors", rope="yarn"),
        "vae": load("ErnieLoadVAE", vae_name="flux2-vae.safetensors", weight_dtype="fp32"),
        "scorer": BuiltinScorer(measure="sharpness"),
    }


def test_best_of_n_keeps_the_best_and_goes_on(call, parts, session):
    inputs = parts | {"source": "a fox\na boat", "n": 3, "keep": 2}
    images, kept, candidates, report, _ = call("ErnieBestOfN", **inputs).result
    out = session.output / "best"
    assert len(images) == len(kept) == len(list(out.glob("*.png"))) == 4
    assert len(candidates) == 6
    assert kept.prompts == ("a fox", "a fox", "a boat", "a boat")
    for prompt in ("a fox", "a boat"):
        part, chosen = candidates.by("prompts")[prompt], kept.by("prompts")[prompt]
        assert list(chosen.values) == sorted(part.values, reverse=True)[:2]
        assert part.labels == ("seed 7", "seed 8", "seed 9")
    assert report.startswith("6 made, 0 already there, 4 kept")
    again = call("ErnieBestOfN", **inputs).result
    assert again[3].startswith("0 made, 6 already there, 4 kept")
    assert again[1] == kept
    assert (out / JOURNAL).read_text(encoding="utf-8").count("\n") == 6
    with Image.open(kept.files[0]) as image:
        assert image.info["ernie_prompt"] == "a fox"


def test_a_candidate_is_the_picture_of_its_seed(call, parts, classes):
    _, kept, _, _, _ = call("ErnieBestOfN", **parts, n=1).result
    latent = host.sample(
        parts["model"],
        positive=host.encode_prompt(parts["clip"], "a fox"),
        negative=None,
        latent=host.empty_latent(64, 64, 1),
        sigmas=importlib.import_module("ernie_pack.ernie_core.sampling.schedule").make_sigmas(1, shift=4.0),
        cfg=1.0,
        seed=7,
    )
    expected = host.decode(parts["vae"], latent)[0]
    with Image.open(kept.files[0]) as image:
        assert np.abs(np.asarray(image) / 255 - expected.numpy()).max() < 1 / 254


PAIRS = {"name": "loop", "rule": "best against worst", "min_gap": 0.0, "max_per_prompt": 0, "save_pairs": False}


def test_rejected_candidates_become_pairs(call, parts, session):
    _, _, candidates, _, _ = call("ErnieBestOfN", **parts, rejected="keep").result
    assert all(candidates.files)
    assert len(list((session.output / "best" / "rejected").glob("*.png"))) == 2
    order = candidates.order()
    made, told = call("ErniePairsFromScores", **PAIRS | {"scores": candidates, "save_pairs": True}).result
    (pair,) = made.pairs
    assert (str(pair.chosen.image), str(pair.rejected.image)) == tuple(candidates.files[order[i]] for i in (0, -1))
    assert pair.rejected.image.parent.name == "rejected"
    assert pair.captions[0].text == "a fox"
    assert pair.margin == pytest.approx(candidates.values[order[0]] - candidates.values[order[-1]])
    assert "pairs.jsonl" in told
    table = session.output / "ernie_pairs" / "loop" / "pairs.jsonl"
    seeds = {side: info["seed"] for side, info in json.loads(table.read_text("utf-8"))["info"].items()}
    labels = [candidates.labels[order[i]] for i in (0, -1)]
    assert [f"seed {seeds[side]}" for side in ("chosen", "rejected")] == labels, "each picture's own, not the graph's"


def test_every_pair_of_the_candidates_of_each_prompt(call, parts):
    candidates = call("ErnieBestOfN", **parts | {"source": "a fox\na boat"}, rejected="keep").result[2]
    pairs = call("ErniePairsFromScores", **PAIRS | {"scores": candidates, "rule": "every pair"}).result[0].pairs
    assert sorted(p.captions[0].text for p in pairs) == ["a boat"] * 3 + ["a fox"] * 3
    assert all(p.margin > 0 for p in pairs)


def test_pairs_need_the_rejected_ones(call, parts):
    candidates = call("ErnieBestOfN", **parts).result[2]
    with pytest.raises(ErnieError, match="2 of 3 scored pictures were deleted: set rejected of Best of N to keep"):
        call("ErniePairsFromScores", **PAIRS | {"scores": candidates})


def test_reranking_as_ernie_vilg_2_does(call, parts, session):
    clip_scorer = call("ErnieLoadScorer", scorer_name="clip_vision/clip/").result[0]
    inputs = parts | {"scorer": clip_scorer, "choice": "rerank 4, keep 1", "n": 2, "keep": 2}
    images, kept, candidates, _, _ = call("ErnieBestOfN", **inputs).result
    assert (len(images), len(candidates)) == (1, 4)
    assert kept.values[0] == max(candidates.values)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"keep": 4}, r"keep must be at most n \(3\)"),
        ({"choice": "rerank 4, keep 1"}, "does not read it"),
        ({"source": ""}, "no usable row"),
        ({"name": ".."}, "inside the output folder"),
        ({"width": 50}, "multiple"),
    ],
)
def test_best_of_n_refuses(call, parts, inputs, message):
    with pytest.raises(ErnieError, match=message):
        call("ErnieBestOfN", **parts | inputs)


# --- Score Report ----------------------------------------------------------------------------------------------------


def test_the_report_is_a_picture_and_text(call, folder, session):
    scores = scored(call, images=None, folder=["photos"]).result[1]
    image, text = call("ErnieScoreReport", scores=[scores], name=["tables"]).result
    assert (image.ndim, image.shape[-1], image.dtype) == (4, 3, torch.float32)
    assert float(image.std()) > 0.05
    assert text.count("category  ") == 2
    assert (session.output / "tables" / "scores.csv").is_file()
    several = call("ErnieScoreReport", scores=[scores, scores], shown=[0]).result
    assert several[1].count("4 pictures") == 2


def test_the_report_refuses(call):
    scores = scored(call).result[1]
    with pytest.raises(ErnieError, match="one set of scores"):
        call("ErnieScoreReport", scores=[scores, scores], images=[pictures()])
    with pytest.raises(ErnieError, match="must be the 4 scored pictures"):
        call("ErnieScoreReport", scores=[scores], images=[pictures(1)])


# --- every widget ----------------------------------------------------------------------------------------------------

WIDGETS = [
    ("ErnieLoadScorer", "scorer_name", "built-in sharpness", {}),
    ("ErnieLoadScorer", "kind", "pickscore", {"scorer_name": "clip_vision/clip/"}),
    ("ErnieLoadScorer", "precision", "bf16", {"scorer_name": "clip_vision/clip/"}),
    ("ErnieLoadScorer", "backbone", "scorers/ERNIE-Image-Aes/", {"scorer_name": "scorers/head.pth"}),
    ("ErnieLoadScorer", "question", "plain", {"scorer_name": "scorers/ERNIE-Image-Aes/"}),
    ("ErnieScoreImages", "folder", ["photos/cats"], {}),
    ("ErnieScoreImages", "prompts", ["a boat"], {}),
    ("ErnieScoreImages", "batch_size", [1], {}),
    ("ErnieScoreImages", "draw", [True], {}),
    ("ErnieScoreImages", "collect", [False], {}),
    ("ErnieScoreImages", "save", ["table"], {}),
    ("ErnieScoreImages", "name", ["elsewhere"], {"save": ["table"]}),
    ("ErnieFilterByScore", "rule", ["threshold"], {}),
    ("ErnieFilterByScore", "threshold", [0.0], {"rule": ["threshold"]}),
    ("ErnieFilterByScore", "k", [2], {}),
    ("ErnieFilterByScore", "share", [1.0], {"rule": ["top share"]}),
    ("ErnieFilterByScore", "per_prompt", [True], {}),
    ("ErnieBestOfN", "source", "a boat", {}),
    ("ErnieBestOfN", "name", "elsewhere", {}),
    ("ErnieBestOfN", "choice", "rerank 4, keep 1", {}),
    ("ErnieBestOfN", "n", 2, {}),
    ("ErnieBestOfN", "keep", 2, {}),
    ("ErnieBestOfN", "rejected", "keep", {}),
    ("ErnieBestOfN", "batch_size", 1, {}),
    ("ErnieBestOfN", "negative", "a cat", {"cfg": 4.0}),
    ("ErnieBestOfN", "width", 96, {}),
    ("ErnieBestOfN", "height", 96, {}),
    ("ErnieBestOfN", "preset", "Turbo 8 / 1", {}),
    ("ErnieBestOfN", "steps", 2, {}),
    ("ErnieBestOfN", "cfg", 4.0, {}),
    ("ErnieBestOfN", "shift", 1.0, {"steps": 3}),
    ("ErnieBestOfN", "seed", 8, {}),
    ("ErnieScoreReport", "shown", [1], {}),
    ("ErnieScoreReport", "name", ["tables"], {}),
]


@pytest.fixture
def observe(call, parts, folder, session, monkeypatch):
    """observe(node_id, **inputs) -> everything that comes out of the node or is written, from a fresh start."""
    import shutil

    batches = []
    clip_scorer = call("ErnieLoadScorer", scorer_name="clip_vision/clip/").result[0]
    plain = clip_scorer._score_batch
    monkeypatch.setattr(clip_scorer, "_score_batch", lambda x, *more: (batches.append(len(x)), plain(x, *more))[1])
    scores = call("ErnieScoreImages", scorer=[BuiltinScorer()], folder=["photos"], prompts=["a\nb\na\nb"]).result[1]
    sockets = {
        "ErnieLoadScorer": {"scorer_name": "built-in combined"},
        "ErnieScoreImages": {"scorer": [clip_scorer], "folder": ["photos"], "prompts": ["a fox"]},
        "ErnieFilterByScore": {"scores": [scores]},
        "ErnieBestOfN": parts | {"scorer": clip_scorer},
        "ErnieScoreReport": {"scores": [scores]},
    }

    def look(node_id, **inputs):
        shutil.rmtree(session.output, ignore_errors=True)
        batches.clear()
        try:
            result = call(node_id, **sockets[node_id] | inputs).result
        except ErnieError as e:
            return str(e)
        if node_id == "ErnieLoadScorer":
            result = (result[0].key, result[0].name)
        written = sorted(p.relative_to(session.output).as_posix() for p in session.output.rglob("*") if p.is_file())
        return [seen(value) for value in result], written, list(batches)

    return look


def seen(value):
    """Something that is equal for equal outputs; pictures by their bytes."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), hash(value.numpy().tobytes())
    return [seen(v) for v in value] if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("node_id", "widget", "other", "context"), WIDGETS, ids=lambda v: v if type(v) is str else "")
def test_every_widget_matters(observe, node_id, widget, other, context):
    assert observe(node_id, **context) != observe(node_id, **context | {widget: other})


def test_no_widget_is_left_out_above(classes):
    kinds = ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    everything = {(n, i.id) for n in DEFAULTS for i in classes[n].GET_SCHEMA().inputs if i.get_io_type() in kinds}
    assert {(n, w) for n, w, *_ in WIDGETS} == everything
