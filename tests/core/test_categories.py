"""Sorting pictures into a tree: laws of the walk, parity with transformers, the cache, and the stage."""

import math
import pickle
import time

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.curation import categories, image_text
from ernie_pack.ernie_core.curation.categories import (
    Assignment,
    Categories,
    ImageTextCategoriser,
    choose,
    descend,
    path_log_probabilities,
    sentences,
    step_log_probabilities,
)
from ernie_pack.ernie_core.curation.engines import run_stage
from ernie_pack.ernie_core.curation.manifest import read_rows, write_rows
from ernie_pack.ernie_core.curation.taxonomy import parse_taxonomy
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from PIL import Image
from tiny_image_text import write_siglip_folder
from tiny_scorers import open_clip_tensors, write_clip_folder, write_clip_tokenizer

TREE = parse_taxonomy(
    "a\n  b\n    c\n    d\n  e\n  f\n    g\n    h\n    i\nj\nk\n  l\n    m\n      n\n      o\n  p | a pear\n"
)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 2, (6, len(TREE)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    return folder, write_clip_folder(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "siglip"
    return folder, write_siglip_folder(folder)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 28), (28, 61), (28, 28))]


def slow_steps(row, method):
    """Written out: one softmax at a time."""

    def below(i):
        return [i] if not TREE.children(i) else [leaf for child in TREE.children(i) for leaf in below(child)]

    def mass(i):
        return math.exp(row[i]) if method == "names" else sum(math.exp(row[leaf]) for leaf in below(i))

    return [math.log(mass(i) / sum(mass(k) for k in TREE.children(int(TREE.parents[i])))) for i in range(len(TREE))]


@pytest.mark.parametrize("method", categories.METHODS)
def test_steps_are_those_of_one_softmax_at_a_time(logits, method):
    expected = [slow_steps(row, method) for row in logits]
    assert np.allclose(step_log_probabilities(logits, TREE, method), expected, atol=1e-12)


@pytest.mark.parametrize("method", categories.METHODS)
def test_the_leaves_of_a_tree_share_all_of_the_probability(logits, method):
    paths = path_log_probabilities(step_log_probabilities(logits, TREE, method), TREE)
    assert np.allclose(np.exp(paths[:, TREE.leaves]).sum(axis=1), 1, atol=1e-12)


def test_products_over_leaves_are_one_softmax_over_all_leaves(logits):
    paths = path_log_probabilities(step_log_probabilities(logits, TREE, "leaves"), TREE)
    flat = np.exp(logits[:, TREE.leaves])
    assert np.allclose(np.exp(paths[:, TREE.leaves]), flat / flat.sum(axis=1, keepdims=True), atol=1e-12)


def test_a_walk_that_keeps_all_ends_in_the_largest_product(logits):
    steps = step_log_probabilities(logits, TREE)
    paths = path_log_probabilities(steps, TREE)
    for beam in (0, len(TREE)):
        for row, products in zip(steps, paths, strict=True):
            ends = descend(row, TREE, beam)
            order = sorted(TREE.leaves.tolist(), key=lambda leaf: -products[leaf])
            assert [leaf for leaf, _ in ends] == order
            assert np.allclose([log_p for _, log_p in ends], products[order])
    assert choose(steps, TREE, beam=len(TREE)) == choose(steps, TREE)


def test_a_walk_with_one_place_takes_the_best_child_each_time(logits):
    for row in step_log_probabilities(logits, TREE):
        place = -1
        while children := TREE.children(place):
            place = max(children, key=lambda child: row[child])
        assert [leaf for leaf, _ in descend(row, TREE, 1)] == [place]


def test_no_walk_finds_more_than_the_one_that_keeps_all(logits):
    for row in step_log_probabilities(logits, TREE):
        best = descend(row, TREE)[0][1]
        assert all(descend(row, TREE, beam)[0][1] <= best + 1e-12 for beam in (1, 2, 3, 5))


def test_an_unsure_picture_gets_the_branch_that_is_sure_and_the_next_best_outside_of_it(logits):
    steps = step_log_probabilities(logits, TREE)
    paths = np.exp(path_log_probabilities(steps, TREE))
    for row, found, sure in zip(paths, choose(steps, TREE), choose(steps, TREE, min_confidence=0.4), strict=True):
        assert found.category.startswith(sure.category)
        assert sure.category == "" or sure.confidence >= 0.4
        assert math.isclose(found.confidence, math.prod(found.levels), abs_tol=3e-4)
        longer = [n for n in TREE.way(TREE.place(found.category)) if len(TREE.paths[n]) > len(sure.category)]
        assert all(row[n] < 0.4 for n in longer)
        others = [i for i in TREE.leaves if not f"{TREE.paths[i]}/".startswith(f"{sure.category}/")]
        if sure.category:
            assert sure.runner_up == TREE.paths[max(others, key=lambda i: row[i])]
    assert {a.category for a in choose(steps, TREE, min_confidence=1.0)} == {""}


def test_a_tree_of_one_leaf_leaves_no_choice():
    tree = parse_taxonomy("all")
    found = choose(step_log_probabilities(np.array([[3.0]]), tree), tree)
    assert found == [Assignment(category="all", confidence=1.0, levels=(1.0,))]


# --- models -----------------------------------------------------------------------------------------------------------


def categoriser(folder, tmp_path, **options):
    return ImageTextCategoriser(folder, TREE, cache=tmp_path / "cache", **options)


def test_clip_gives_the_logits_of_transformers(clip, pictures, tmp_path):
    import transformers

    folder, model = clip
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    texts = sentences(TREE, "a picture of {name}")
    with torch.inference_mode():
        given = tokenizer(texts, padding=True, return_tensors="pt") | images(pictures, return_tensors="pt")
        expected = model(**given).logits_per_image.numpy()
    assert np.abs(categoriser(folder, tmp_path).logits(pictures) - expected).max() < 1e-4


def test_siglip_gives_the_logits_of_transformers(siglip, pictures, tmp_path):
    import transformers

    folder, model = siglip
    processor = transformers.AutoProcessor.from_pretrained(str(folder))
    texts = sentences(TREE, "a picture of {name}")
    with torch.inference_mode():
        given = processor(
            text=texts, images=pictures, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
        )
        expected = model(**given).logits_per_image.numpy()
    found = categoriser(folder, tmp_path).logits(pictures)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected - expected.mean()).max() > 0.1  # else every answer would pass


def test_an_open_clip_file_is_read_too(pictures, tmp_path):
    from safetensors.torch import save_file

    write_clip_tokenizer(tmp_path / "m")
    save_file({k: t.contiguous() for k, t in open_clip_tensors().items()}, str(tmp_path / "m" / "c.safetensors"))
    found = categoriser(tmp_path / "m" / "c.safetensors", tmp_path).assign(pictures)
    assert all(TREE.place(a.category) in TREE.leaves for a in found)


def test_one_picture_gets_the_same_alone_and_among_others(siglip, pictures, tmp_path):
    sorter = categoriser(siglip[0], tmp_path)
    assert [sorter.assign([p])[0] for p in pictures] == sorter.assign(pictures)


def test_sentences_are_computed_once_and_kept_on_the_disk(siglip, tmp_path, monkeypatch):
    asked = []
    texts = image_text._Auto.texts
    monkeypatch.setattr(image_text._Auto, "texts", lambda self, t: asked.extend(t) or texts(self, t))
    first = categoriser(siglip[0], tmp_path)
    first.prepare()
    assert sorted(asked) == sorted(set(sentences(TREE, "a picture of {name}")))
    again = categoriser(siglip[0], tmp_path)
    assert np.array_equal(again._features(), first._features())
    assert len(asked) == len(TREE)
    grown = ImageTextCategoriser(siglip[0], parse_taxonomy("a\nq\n"), cache=tmp_path / "cache")
    grown.prepare()
    assert asked[len(TREE) :] == ["a picture of q"]  # what other trees share is there
    asked.clear()
    categoriser(siglip[0], tmp_path, precision="bf16").prepare()
    assert len(asked) == len(TREE)  # another model's are others
    kept = next((tmp_path / "cache").iterdir())
    kept.write_bytes(kept.read_bytes()[:50])
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"damaged")
    asked.clear()
    assert np.array_equal(categoriser(siglip[0], tmp_path)._features(), first._features())
    assert len(asked) == len(TREE)


def test_several_templates_are_averaged(siglip, tmp_path):
    one, two = (
        categoriser(siglip[0], tmp_path, templates=[t])._features() for t in ("a {name}", "{path}, {parent}: {name}")
    )
    both = categoriser(siglip[0], tmp_path, templates=["a {name}", " ", "{path}, {parent}: {name}"])._features()
    mean = (one + two) / np.linalg.norm(one + two, axis=1, keepdims=True)
    assert np.allclose(both, mean, atol=1e-6)
    assert sentences(TREE, "{path}, {parent}: {name}")[-1] == "k, l, m, o, m: o"


def test_the_key_changes_with_all_that_decides_the_answer(siglip, clip, tmp_path):
    base = categoriser(siglip[0], tmp_path)
    changed = [
        categoriser(clip[0], tmp_path),
        categoriser(siglip[0], tmp_path, templates=["{name}"]),
        categoriser(siglip[0], tmp_path, method="leaves"),
        categoriser(siglip[0], tmp_path, beam=3),
        categoriser(siglip[0], tmp_path, min_confidence=0.5),
        categoriser(siglip[0], tmp_path, precision="bf16"),
        ImageTextCategoriser(siglip[0], parse_taxonomy("a\nb\n"), cache=tmp_path),
    ]
    assert len({base.key(), *(c.key() for c in changed)}) == len(changed) + 1
    assert categoriser(siglip[0], tmp_path / "elsewhere", device="cpu").key() == base.key()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "x"}, "method must be one of names, leaves, got 'x'"),
        ({"beam": -1}, "beam must be 0"),
        ({"min_confidence": float("nan")}, "between 0 and 1, got nan"),
        ({"templates": ["a picture"]}, r"must hold \{name\}.*got 'a picture'"),
        ({"templates": [" "]}, "got 'none'"),
    ],
    ids=["method", "beam", "confidence", "template", "no template"],
)
def test_a_wrong_setting_is_named(siglip, tmp_path, options, message):
    with pytest.raises(ErnieError, match=message):
        categoriser(siglip[0], tmp_path, **options)


def test_a_model_of_another_kind_is_named(tmp_path):
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(str(tmp_path / "bert"))
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    sorter = categoriser(tmp_path / "bert", tmp_path)
    with pytest.raises(CheckpointError, match="bert"):
        sorter.assign([Image.new("RGB", (8, 8))])


# --- the stage --------------------------------------------------------------------------------------------------------


def write_manifest(folder, pictures):
    rows = []
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
        rows.append({"id": str(i), "source": str(folder / f"{i}.png"), "caption": ""})
    (folder / "bad.png").write_bytes(b"no picture")
    rows.insert(1, {"id": "bad", "source": str(folder / "bad.png"), "caption": ""})
    write_rows(folder / "in.jsonl", rows)
    return folder / "in.jsonl"


def test_the_stage_adds_its_columns_and_names_the_picture_that_cannot_be_read(siglip, pictures, tmp_path):
    stage = Categories(categoriser(siglip[0], tmp_path), batch_size=2)
    summary = run_stage(stage, write_manifest(tmp_path, pictures), tmp_path / "out.jsonl")
    assert (summary.rows, summary.failed) == (4, 1)
    rows = list(read_rows(tmp_path / "out.jsonl"))
    assert "bad" in rows[1]["id"]
    assert set(rows[1]["failed"]) == {"categories"}
    for row in (rows[0], rows[2], rows[3]):
        assert set(stage.adds) <= row.keys()
        assert 0 < row["category_confidence"] <= 1
        assert TREE.place(row["category_runner_up"]) is not None
    again = pickle.loads(pickle.dumps(stage))  # as a worker process gets it: with its model unloaded
    run_stage(again, tmp_path / "in.jsonl", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert again.categoriser._model is not stage.categoriser._model


def test_ten_thousand_leaves_and_a_hundred_pictures_take_seconds():
    lines = []
    for a in range(20):
        lines.append(f"a{a}")
        for b in range(25):
            lines += [f" b{b}", *(f"  leaf {a} {b} {c}" for c in range(20))]
    tree = parse_taxonomy("\n".join(lines))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(tree), 64)).astype(np.float32)
    pictures = rng.normal(size=(100, 64)).astype(np.float32)
    start = time.perf_counter()
    steps = step_log_probabilities(pictures @ features.T, tree)
    found = choose(steps, tree)
    assert len({a.category for a in found}) > 50
    assert time.perf_counter() - start < 3
