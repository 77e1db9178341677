"""Picture files as upright sRGB, whatever they are stored as; what cannot be read says why."""

import sys

import broken_images as odd
import numpy as np
import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.pictures import load_image, load_mask, near_duplicates, perceptual_hash
from PIL import Image

LEFT, RIGHT = np.s_[:, : odd.WIDTH // 2], np.s_[:, odd.WIDTH // 2 :]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation):
    loaded = load_image(odd.oriented(orientation))
    assert np.array_equal(loaded.rgb_HWC, odd.upright())
    assert loaded.notes == ()


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_jpeg_is_turned_upright_too(orientation):
    loaded = load_image(odd.oriented(orientation, "JPEG"))
    assert np.abs(loaded.rgb_HWC[4:12, 4:18].astype(int) - odd.CORNERS["red"]).mean() < 8


def test_alpha_turns_with_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = np.zeros((odd.HEIGHT, odd.WIDTH, 1), dtype=np.uint8)
    alpha[: odd.HEIGHT // 2] = 255  # upright: the top is opaque
    stored = odd.STORED[6](np.concatenate([odd.upright(), alpha], axis=2))
    data = odd.encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif.tobytes())
    assert np.array_equal(load_image(data).alpha_HW, alpha[..., 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P alpha", "L"])
def test_transparent_parts_get_the_matte_colour(mode):
    loaded = load_image(odd.with_alpha(mode), matte=(1, 2, 3))
    assert (loaded.rgb_HWC[LEFT] == (1, 2, 3)).all()
    right = {"LA": (100, 100, 100), "L": (100, 100, 100), "P": (200, 100, 50), "P alpha": (200, 100, 50)}
    expected = odd.upright()[RIGHT] if mode == "RGBA" else right[mode]
    assert (loaded.rgb_HWC[RIGHT] == expected).all()
    assert (loaded.alpha_HW[LEFT] == 0).all()
    assert (loaded.alpha_HW[RIGHT] == 255).all()


def test_half_transparent_is_mixed_with_the_matte():
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = 51  # a fifth
    assert (load_image(odd.encode(Image.fromarray(pixels)), matte=(255, 0, 100)).rgb_HWC == (204, 0, 80)).all()


def test_an_opaque_alpha_channel_is_no_alpha():
    assert load_image(odd.encode(Image.fromarray(odd.upright()).convert("RGBA"))).alpha_HW is None


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (40000, 156), (65535, 255)])
def test_sixteen_bits_are_scaled_by_257(value, expected):
    loaded = load_image(odd.sixteen_bit(value))
    assert (loaded.rgb_HWC == expected).all()
    assert "16-bit" in loaded.notes[0]


def test_fractions_from_0_to_1_are_scaled_and_others_refused():
    assert load_image(odd.floats(1.0)).rgb_HWC.max() == 255
    with pytest.raises(ErnieError, match="from 0 to 1000, not 0 to 1; save it as 8 or 16 bit"):
        load_image(odd.floats(1000.0))


def test_cmyk_keeps_its_colours():
    loaded = load_image(odd.cmyk())
    assert np.abs(loaded.rgb_HWC[4:12, 4:20].astype(int) - odd.CORNERS["red"]).max() < 25
    assert "CMYK" in loaded.notes[0]


def test_a_colour_profile_is_applied():
    """Linear 128/255 is 0.2159's inverse: sRGB 188."""
    assert np.abs(load_image(odd.profiled()).rgb_HWC.astype(int) - 188).max() <= 1


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_noted():
    assert (load_image(odd.profiled(odd.srgb_profile())).rgb_HWC == 128).all()
    loaded = load_image(odd.profiled(b"no profile"))
    assert (loaded.rgb_HWC == 128).all()
    assert "profile that cannot be applied" in loaded.notes[0]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_used_and_noted(format):
    loaded = load_image(odd.animated(format))
    assert np.abs(loaded.rgb_HWC.astype(int) - (255, 0, 0)).max() <= 3
    assert loaded.notes == ("has 3 frames; the first is used",)


@pytest.mark.parametrize("name", odd.BROKEN)
def test_what_cannot_be_read_is_an_error_with_the_reason(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(odd.BROKEN[name])
    with pytest.raises(ErnieError, match=name) as error:
        load_image(path)
    expected = {"empty.png": "0 bytes", "bomb.png": "exceeds limit", "float.tif": "floating-point"}
    assert expected.get(name, "cannot be decoded") in str(error.value)


def test_unicode_paths_are_read(tmp_path):
    path = tmp_path / "\u56fe \u00e9\U0001f600.png"
    path.write_bytes(odd.encode(Image.fromarray(odd.upright())))
    assert np.array_equal(load_image(path).rgb_HWC, odd.upright())


def test_a_mask_is_brightness_times_alpha(tmp_path):
    pixels = np.full((16, 16, 4), 255, dtype=np.uint8)
    pixels[:8, :, 3] = 0
    pixels[8:, :8, :3] = 100
    path = tmp_path / "mask.png"
    path.write_bytes(odd.encode(Image.fromarray(pixels)))
    mask = load_mask(path)
    assert (mask[:8] == 0).all()
    assert (mask[8:, :8] == 100).all()
    assert (mask[8:, 8:] == 255).all()


def test_perceptual_hashes_survive_scaling_and_compression_and_tell_pictures_apart():
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(c).resize((256, 192), Image.Resampling.BICUBIC) for c in coarse]
    smaller = pictures[0].resize((128, 96), Image.Resampling.LANCZOS)
    lossy = load_image(odd.encode(pictures[0], "JPEG", quality=60)).rgb_HWC
    hashes = [perceptual_hash(np.asarray(p)) for p in (*pictures, smaller)] + [perceptual_hash(lossy)]
    assert near_duplicates(hashes) == [(0, 3), (0, 4), (3, 4)]


def test_flat_pictures_of_different_colours_are_no_duplicates():
    hashes = [perceptual_hash(np.full((32, 32, 3), c, dtype=np.uint8)) for c in ((255, 0, 0), (0, 0, 255), (255, 0, 0))]
    assert near_duplicates(hashes) == [(0, 2)]


def test_duplicates_are_found_across_blocks():
    generator = np.random.default_rng(1)
    hashes = [generator.bytes(19).hex() for _ in range(1100)]
    hashes[1050] = hashes[3]
    assert near_duplicates(hashes) == [(3, 1050)]


def test_a_pillow_without_littlecms_says_that_profiles_are_left_out(monkeypatch):
    import PIL

    monkeypatch.delattr(PIL, "ImageCms", raising=False)
    monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
    loaded = load_image(odd.profiled(b"any"))
    assert (loaded.rgb_HWC == 128).all()
    assert "built without littlecms" in loaded.notes[0]
