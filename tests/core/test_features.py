"""Features of folders: the right vector of each model, whatever the batch; the cache; what cannot be read."""

import os

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.evaluation import features as engine
from PIL import Image
from tiny_vision import KINDS, SIDE_PX, write_vision_model


def draw(folder, count, *, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        size = (40 + 3 * i, 48, 3)
        Image.fromarray(rng.integers(0, 256, size).astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    return {kind: (root / kind, write_vision_model(root / kind, kind)) for kind in KINDS}


@pytest.fixture
def siglip(models):
    return engine.load_feature_model(models["siglip"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_becomes_the_pooled_vector_of_its_model(models, kind):
    folder, network = models[kind]
    model = engine.load_feature_model(folder)
    picture = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3)).astype(np.uint8)  # nothing to resize
    if kind == "resnet":  # crop_pct enlarges before it cuts
        found = model.run([picture])
        assert found.shape == (1, 16)
        return
    mean, std = torch.tensor([0.5, 0.45, 0.4]), torch.tensor([0.25, 0.26, 0.27])
    pixels = ((torch.from_numpy(picture).float() / 255 - mean) / std).movedim(-1, 0)[None]
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            hidden = network.vision_model(pixel_values=pixels).pooler_output
            expected = network.visual_projection(hidden) if kind == "clip" else hidden
        else:
            expected = network(pixel_values=pixels).pooler_output
    assert model.run([picture]) == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_clip_without_preprocessing_is_read_as_clip(models, tmp_path):
    (tmp_path / "clip").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "clip" / name).write_bytes((models["clip"][0] / name).read_bytes())
    model = engine.load_feature_model(tmp_path / "clip")
    found = model.run([np.zeros((50, 40, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    assert found.shape == (2, 12)
    assert not np.allclose(found[0], found[1])


def test_the_batch_and_the_order_change_nothing(siglip, tmp_path):
    folder = draw(tmp_path / "a", 5)
    alone = engine.read_features(folder, siglip, batch_size=1)
    together = engine.read_features(folder, siglip, batch_size=4)
    assert [f.name for f in alone.files] == [f"{i:02}.png" for i in range(5)]
    assert alone.features_ND == pytest.approx(together.features_ND, abs=1e-6)
    assert alone.problems == ()


def test_known_pictures_are_not_computed_again(siglip, models, tmp_path):
    folder, cache = draw(tmp_path / "a", 5), tmp_path / "features.sqlite"
    first = engine.read_features(folder, siglip, cache=cache, batch_size=2)
    (folder / "04.png").rename(folder / "moved.png")  # the same bytes elsewhere are the same picture
    draw(tmp_path / "a" / "more", 1, seed=5)
    seen = []
    counted = engine.FeatureModel(
        name="x", key=siglip.key, run=lambda pictures: seen.append(len(pictures)) or siglip.run(pictures)
    )
    again = engine.read_features(folder, counted, cache=cache, batch_size=2)
    assert seen == [1]
    assert again.num_kept == 5
    assert np.array_equal(again.features_ND[:4], first.features_ND[:4])
    other = engine.load_feature_model(models["vit"][0])
    assert engine.read_features(folder, other, cache=cache).num_kept == 0


def test_an_interrupted_run_goes_on(siglip, tmp_path):
    folder, cache = draw(tmp_path / "a", 6), tmp_path / "features.sqlite"

    def stop(done, total):
        assert total == 6
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.read_features(folder, siglip, cache=cache, batch_size=2, on_progress=stop)
    rest = []
    found = engine.read_features(
        folder, siglip, cache=cache, batch_size=2, on_progress=lambda done, total: rest.append(done)
    )
    assert (found.num_kept, rest) == (4, [6])


def test_unreadable_pictures_are_named_and_copies_counted(siglip, tmp_path):
    folder = draw(tmp_path / "a", 3)
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes()[:80])
    (folder / "note.jpg").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    found = engine.read_features(folder, siglip)
    assert [f.name for f in found.files] == ["00.png", "01.png", "copy.png"]
    assert len(found.features_ND) == 3
    named = [line.split(":")[0] for line in found.problems[:-1]]
    assert named == ["02.png", "empty.png", "note.jpg"]
    assert found.problems[-1].startswith("1 pictures are the same file as another one")


def test_nothing_usable_is_an_error(siglip, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ErnieError, match="holds no pictures"):
        engine.read_features(tmp_path / "a", siglip)
    (tmp_path / "a" / "x.png").write_bytes(b"no")
    with pytest.raises(ErnieError, match="none of 1 pictures"):
        engine.read_features(tmp_path / "a", siglip)
    with pytest.raises(ErnieError, match="not a folder"):
        engine.read_features(tmp_path / "b", siglip)


def test_a_model_with_missing_weights_is_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "vit"
    write_vision_model(folder, "vit")
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("pooler")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2 tensors of the model are not in its files \(pooler.dense.bias"):
        engine.load_feature_model(folder)


def test_what_is_no_vision_model_is_refused(tmp_path, models):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        engine.load_feature_model(tmp_path / "empty")
    with pytest.raises(CheckpointError):
        engine.load_feature_model(tmp_path / "nowhere")
    folder = tmp_path / "vit"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((models["vit"][0] / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        engine.load_feature_model(folder)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded as a vision model"):
        engine.load_feature_model(folder)


def test_a_damaged_or_foreign_cache_is_named(siglip, tmp_path):
    folder, cache = draw(tmp_path / "a", 2), tmp_path / "features.sqlite"
    cache.write_bytes(os.urandom(5000))
    with pytest.raises(ErnieError, match=r"features in .* cannot be read or written"):
        engine.read_features(folder, siglip, cache=cache)


def test_nan_features_are_refused(tmp_path):
    model = engine.FeatureModel(
        name="x", key="k", run=engine._in_order(lambda pictures: np.full((len(pictures), 2), np.nan))
    )
    with pytest.raises(ErnieError, match="NaN or infinite"):
        engine.read_features(draw(tmp_path / "a", 2), model)
