"""Caches: an entry is what the network makes, a stale one is never read, a damaged one is made again."""

import json
import os
import shutil
from dataclasses import replace

import broken_images as odd
import numpy as np
import pytest
import torch
from ernie_pack.bench.pairs import randomise
from ernie_pack.ernie_core.config import VAEConfig
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.model.vae import VAE
from ernie_pack.ernie_core.training import caching
from ernie_pack.ernie_core.training.buckets import BatchPlan, Stage
from ernie_pack.ernie_core.training.caching import (
    LatentCache,
    TextCache,
    build_latents,
    build_texts,
    component_hash,
    encoder_key,
    load_picture,
    module_hash,
    vae_key,
)
from ernie_pack.ernie_core.training.captions import CaptionRules, all_texts
from ernie_pack.ernie_core.training.dataset import DatasetOptions, read_dataset
from ernie_pack.ernie_core.weights.checkpoint import save_folder_component
from PIL import Image
from tiny_components import make_component

CONFIG = VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def vae():
    model = VAE(CONFIG).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    randomise(model)
    return model


@pytest.fixture
def folder(tmp_path):
    return odd.write_pictures(tmp_path / "pics", [(64, 64), (100, 64), (64, 100)])


def pictures_of(dataset, *resolutions):
    plan = BatchPlan(dataset.items, dataset.options, stages=(Stage(resolutions=resolutions or (64,)),))
    return sorted(plan.pictures(), key=lambda picture: (picture.item.image.name, picture.fit))


def open_latents(folder, options=None, vae="vae 1", **more):
    return LatentCache(folder / "cache", vae=vae, options=options, **more)


# --- latents ---


def test_a_latent_is_the_posterior_mean_of_the_trained_pixels(folder, vae, tmp_path):
    dataset = read_dataset(folder)
    cache = open_latents(tmp_path)
    assert build_latents(cache, pictures_of(dataset), vae) == 3
    for picture in pictures_of(dataset):
        pixels, mask = load_picture(picture, dataset.options)
        assert pixels.shape == (picture.fit.height, picture.fit.width, 3)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = vae.encode(image.contiguous(memory_format=torch.channels_last))[0]
        latent = cache.latent(picture)
        assert latent.dtype == torch.float32
        assert torch.equal(latent, expected)
        assert latent.shape == (16, picture.fit.height // 16, picture.fit.width // 16)
        assert mask is cache.mask(picture) is None


def test_a_picture_of_its_own_size_is_not_resampled(folder):
    (first, *_) = pictures_of(read_dataset(folder))
    pixels, _ = load_picture(first, DatasetOptions())
    assert np.array_equal(pixels, np.asarray(Image.open(first.item.image)))


def test_latents_can_be_stored_in_half_the_space(folder, vae, tmp_path):
    dataset = read_dataset(folder)
    full, half = open_latents(tmp_path), open_latents(tmp_path, dtype=torch.bfloat16)
    for cache in (full, half):
        build_latents(cache, pictures_of(dataset), vae)
    (picture, *_) = pictures_of(dataset)
    assert half.path(picture) != full.path(picture)
    assert torch.equal(half.latent(picture), full.latent(picture).to(torch.bfloat16))


def test_nothing_is_made_twice(folder, vae, tmp_path):
    cache = open_latents(tmp_path)
    pictures = pictures_of(read_dataset(folder), 64, 48)
    assert build_latents(cache, pictures, vae) == 6
    assert cache.missing(pictures) == []
    assert build_latents(cache, pictures, None or vae) == 0


@pytest.mark.parametrize(
    "change",
    ["picture", "size", "matte", "alpha", "vae", "mask", "mask floor", "orientation", "rules", "version"],
)
def test_a_change_of_anything_that_decides_a_latent_makes_the_entry_missing(change, folder, vae, tmp_path, monkeypatch):
    (folder / "0-masklabel.png").write_bytes(odd.encode(Image.new("L", (64, 64), 255)))
    dataset = read_dataset(folder)
    cache, options, size = open_latents(tmp_path), dataset.options, 64
    build_latents(cache, pictures_of(dataset), vae)
    if change == "picture":
        pixels = np.asarray(Image.open(folder / "0.png")).copy()
        pixels[0, 0, 0] ^= 1
        (folder / "0.png").write_bytes(odd.encode(Image.fromarray(pixels)))
    elif change == "orientation":
        exif = Image.Exif()
        exif[0x0112] = 3
        (folder / "0.png").write_bytes(odd.encode(Image.open(folder / "0.png"), exif=exif.tobytes()))
    elif change == "mask":
        (folder / "0-masklabel.png").write_bytes(odd.encode(Image.new("L", (64, 64), 254)))
    elif change == "mask floor":
        options = replace(options, mask_floor=0.1)
    elif change == "matte":
        options = replace(options, matte=(0, 0, 0))
    elif change == "alpha":
        options = replace(options, alpha="mask")
    elif change == "rules":
        monkeypatch.setattr(caching, "RULES", "2")
    elif change == "version":
        monkeypatch.setattr(caching, "VERSION", 2)
    elif change == "size":
        size = 48
    dataset = read_dataset(folder, options=options)
    cache = open_latents(tmp_path, options, vae="vae 2" if change == "vae" else "vae 1")
    first = pictures_of(dataset, size)[0]
    assert first.item.image.name == "0.png"
    assert cache.missing([first]) == [first]
    with pytest.raises(ErnieError, match=r"is missing"):
        cache.latent(first)


def test_a_caption_is_no_part_of_a_latent(folder, vae, tmp_path):
    build_latents(open_latents(tmp_path), pictures_of(read_dataset(folder)), vae)
    (folder / "0.txt").write_text("another")
    assert open_latents(tmp_path).missing(pictures_of(read_dataset(folder))) == []


def test_a_moved_picture_keeps_its_latent(folder, vae, tmp_path):
    build_latents(open_latents(tmp_path), pictures_of(read_dataset(folder)), vae)
    moved = folder.rename(tmp_path / "moved")
    assert open_latents(tmp_path).missing(pictures_of(read_dataset(moved))) == []


def test_a_picture_that_changes_between_reading_and_encoding_is_an_error(folder, vae, tmp_path):
    dataset = read_dataset(folder)
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(ErnieError, match=r"1.png has changed since the dataset was read"):
        build_latents(open_latents(tmp_path), pictures_of(dataset), vae)
    (folder / "1.png").unlink()
    with pytest.raises(ErnieError, match=r"1.png cannot be read any more"):
        build_latents(open_latents(tmp_path), pictures_of(dataset), vae)


def test_an_interrupted_build_goes_on_where_it_stopped(folder, vae, tmp_path):
    pictures = pictures_of(read_dataset(folder))

    def stop(done, total, what):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_latents(open_latents(tmp_path), pictures, vae, on_progress=stop)
    calls = []
    assert build_latents(open_latents(tmp_path), pictures, vae, on_progress=lambda *c: calls.append(c)) == 1
    assert calls == [(0, 1, "encoding pictures"), (1, 1, "encoding pictures")]
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_entry_is_found_and_made_again(keep, folder, vae, tmp_path):
    cache, pictures = open_latents(tmp_path), pictures_of(read_dataset(folder))
    build_latents(cache, pictures, vae)
    before = cache.latent(pictures[1])
    path = cache.path(pictures[1])
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.missing(pictures) == [pictures[1]]
    with pytest.raises(ErnieError, match=r"is damaged.*it is made anew"):
        cache.latent(pictures[1])
    assert build_latents(cache, pictures, vae) == 1
    assert torch.equal(cache.latent(pictures[1]), before)


def test_an_entry_of_something_else_is_not_read(folder, vae, tmp_path):
    cache, pictures = open_latents(tmp_path), pictures_of(read_dataset(folder))
    build_latents(cache, pictures, vae)
    shutil.copy(cache.path(pictures[0]), cache.path(pictures[1]))
    assert cache.missing(pictures) == [pictures[1]]
    with pytest.raises(ErnieError, match=r"belongs to something else"):
        cache.latent(pictures[1])


def test_nan_is_never_cached(folder, tmp_path):
    broken = VAE(CONFIG).eval()
    broken.quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(ErnieError, match=r"NaN or infinity of .*0.png"):
        build_latents(open_latents(tmp_path), pictures_of(read_dataset(folder)), broken)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# --- masks ---


def test_a_mask_is_the_mean_over_each_cell_of_the_crop(tmp_path, vae):
    folder = odd.write_pictures(tmp_path / "pics", [(128, 64)])
    mask = np.zeros((64, 128), dtype=np.uint8)
    mask[:, 32:64] = 255  # the left half of the central crop 32..96
    mask[8:16, 64:80] = 255  # half of one cell
    (folder / "0-masklabel.png").write_bytes(odd.encode(Image.fromarray(mask)))
    options = DatasetOptions(max_aspect=1.0, mask_floor=0.2)
    dataset = read_dataset(folder, options=options)
    (picture,) = pictures_of(dataset)
    assert picture.fit.box == (32, 0, 96, 64)
    cache = open_latents(tmp_path, options)
    build_latents(cache, [picture], vae)
    expected = torch.zeros(4, 4)
    expected[:, :2] = 1
    expected[0, 2] = 0.5
    assert torch.allclose(cache.mask(picture), 0.2 + 0.8 * expected, atol=1e-6)


def test_alpha_is_a_mask_if_asked_and_multiplies_with_the_mask(tmp_path, vae):
    pixels = np.full((64, 64, 4), 255, dtype=np.uint8)
    pixels[:32, :, 3] = 0
    folder = tmp_path / "pics"
    folder.mkdir()
    (folder / "0.png").write_bytes(odd.encode(Image.fromarray(pixels)))
    (folder / "0.txt").write_text("x")
    options = DatasetOptions(alpha="mask")
    (picture,) = pictures_of(read_dataset(folder, options=options))
    _, weights = load_picture(picture, options)
    assert weights.tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] * 2
    assert load_picture(picture, DatasetOptions())[1] is None
    half = Image.new("L", (32, 32), 255)  # a mask of half the picture's size
    half.paste(0, (0, 0, 16, 32))
    (folder / "0-masklabel.png").write_bytes(odd.encode(half))
    (picture,) = pictures_of(read_dataset(folder, options=options))
    _, weights = load_picture(picture, options)
    assert weights.tolist() == [[0.0] * 4] * 2 + [[0.0, 0.0, 1.0, 1.0]] * 2


# --- texts ---


def encode(texts):
    return [torch.arange(2.0 * (1 + len(t))).reshape(-1, 2) + len(t) for t in texts]


def test_text_features_come_back_unpadded_and_the_empty_prompt_is_always_there(tmp_path):
    cache = TextCache(tmp_path, encoder="encoder 1")
    texts = ["a", "a long one", "\U0001f431 \u4e2d", "half an emoji \ud83d"]
    assert build_texts(cache, texts, encode) == 5
    for text in ["", *texts]:
        assert torch.equal(cache.text(text), encode([text])[0])
    assert cache.missing(texts) == []
    assert build_texts(cache, texts, encode) == 0


def test_another_caption_encoder_or_dtype_makes_the_entry_missing(tmp_path):
    build_texts(TextCache(tmp_path, encoder="encoder 1"), ["a"], encode)
    assert TextCache(tmp_path, encoder="encoder 2").missing(["a"]) == ["", "a"]
    assert TextCache(tmp_path, encoder="encoder 1", dtype=torch.bfloat16).missing(["a"]) == ["", "a"]
    cache = TextCache(tmp_path, encoder="encoder 1")
    assert cache.missing(["a "]) == ["a "]
    with pytest.raises(ErnieError, match=r"of 'a ' is missing"):
        cache.text("a ")


def test_an_edited_caption_file_is_encoded_anew_and_the_others_are_not(folder, tmp_path):
    def texts():
        dataset = read_dataset(folder, options=DatasetOptions(rules=CaptionRules(trigger="sks")))
        return all_texts(dataset.items, dataset.options)

    cache = TextCache(tmp_path, encoder="encoder 1")
    assert build_texts(cache, texts(), encode) == 4
    (folder / "1.txt").write_text("changed")
    assert cache.missing(texts()) == ["sks, changed"]


def test_encoding_of_texts_is_interrupted_and_resumed_and_repaired(tmp_path):
    cache = TextCache(tmp_path, encoder="e")

    def stop(done, total, what):
        assert (total, what) == (4, "encoding captions")
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_texts(cache, ["a", "b", "c"], encode, on_progress=stop)
    assert cache.missing(["a", "b", "c"]) == ["b", "c"]
    cache.path("a").write_bytes(cache.path("a").read_bytes()[:-1])
    assert build_texts(cache, ["a", "b", "c"], encode) == 3


def test_text_features_that_are_not_finite_are_never_cached(tmp_path):
    with pytest.raises(ErnieError, match=r"made NaN or infinity of ''"):
        build_texts(
            TextCache(tmp_path, encoder="e"), ["a"], lambda texts: [torch.full((2, 2), float("inf")) * len(texts[0])]
        )


# --- what networks are ---


@pytest.fixture
def models(tmp_path):
    root = tmp_path / "model"
    for kind in ("vae", "text_encoder"):
        component = make_component(kind)
        save_folder_component(component, root)
    (root / "tokenizer").mkdir(exist_ok=True)
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    return root


def flip_a_byte(path, place=-1):
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    ("file", "vae_changes", "encoder_changes"),
    [
        ("vae/diffusion_pytorch_model.safetensors", True, False),
        ("vae/config.json", True, False),
        ("text_encoder/model.safetensors", False, True),
        ("text_encoder/config.json", False, True),
        ("tokenizer/tokenizer.json", False, True),
    ],
)
@pytest.mark.parametrize("memo", [True, False], ids=["memo", "no memo"])
def test_one_changed_byte_of_a_network_changes_its_key_alone(file, vae_changes, encoder_changes, memo, models):
    place = models.parent / "memo.json" if memo else None

    def keys():
        return (
            vae_key(models, dtype=torch.float32, memo=place),
            encoder_key(models, dtype=torch.float32, memo=place),
        )

    before = keys()
    assert keys() == before
    flip_a_byte(models / file)
    after = keys()
    assert (after[0] != before[0], after[1] != before[1]) == (vae_changes, encoder_changes)


def test_a_copied_network_keeps_its_key_and_dtype_and_rope_are_part_of_it(models):
    copy = shutil.copytree(models, models.parent / "copy")
    assert component_hash(copy, "vae") == component_hash(models, "vae")
    keys = {
        encoder_key(models, dtype=torch.float32),
        encoder_key(models, dtype=torch.bfloat16),
        encoder_key(models, dtype=torch.float32, rope="plain"),
    }
    assert len(keys) == 3


def test_a_memo_saves_reading_and_a_damaged_one_does_no_harm(models, monkeypatch):
    memo = models.parent / "memo.json"
    expected = component_hash(models, "vae", memo=memo)
    assert len(json.loads(memo.read_text())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(caching, "_hash_file", lambda path: pytest.fail(f"{path} was read again"))
        assert component_hash(models, "vae", memo=memo) == expected
    for damage in ("{", "[1]"):
        memo.write_text(damage)
        assert component_hash(models, "vae", memo=memo) == expected


def test_a_loaded_network_is_known_by_its_weights(vae):
    before = module_hash(vae)
    assert module_hash(vae) == before
    other = VAE(CONFIG)
    other.load_state_dict(vae.state_dict())
    assert module_hash(other) == before
    other.quant_conv.bias.data[0] += 1e-6
    assert module_hash(other) != before
