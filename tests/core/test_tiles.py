"""Tiled sampling: the cover and its weights, exactness laws, and what it costs."""

from itertools import pairwise

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.sampling.regions import Regions, region_weights
from ernie_pack.ernie_core.sampling.tiles import Tiles, in_tiles, tile_boxes, tile_weights, with_tiles

SIZES = [(8, 8, 4, 2), (9, 23, 8, 4), (17, 8, 8, 0), (13, 40, 8, 3), (256, 144, 64, 16), (65, 64, 64, 32), (5, 7, 8, 4)]
every_size = pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES)


@every_size
def test_tiles_cover_everything_and_overlap_enough(height, width, tile, overlap):
    boxes = tile_boxes(height, width, tile, overlap)
    seen = torch.zeros(height, width)
    for box in boxes:
        assert (box.height, box.width) == (min(tile, height), min(tile, width))
        box.of(seen).add_(1)
        assert box.of(seen).shape == (box.height, box.width)
    assert seen.min() >= 1
    for axis, size in ((0, height), (1, width)):
        starts = sorted({box[axis] for box in boxes})
        assert all(b - a <= tile - overlap for a, b in pairwise(starts))
        assert starts[-1] + min(tile, size) == size


@every_size
def test_weights_are_exactly_one_in_any_order(height, width, tile, overlap):
    boxes = tile_boxes(height, width, tile, overlap)
    for dtype in (torch.float64, torch.float32):
        for step in (1, -1):
            total = torch.zeros(height, width, dtype=dtype)
            for box, weight in list(zip(boxes, tile_weights(height, width, boxes), strict=True))[::step]:
                assert weight.min() >= 0
                box.of(total).add_(weight.to(dtype))
            assert torch.equal(total, torch.ones_like(total))


def test_weights_rise_smoothly_over_the_whole_overlap():
    boxes = tile_boxes(4, 28, 16, 4)  # one row of two tiles of 4 x 16 that share 4 columns
    assert [box.left for box in boxes] == [0, 12]
    left = tile_weights(4, 28, boxes)[0][0]
    expected = torch.cos(torch.pi / 2 * (torch.arange(4) + 0.5) / 4).square()
    assert torch.equal(left[:12], torch.ones(12, dtype=left.dtype))
    assert (left[12:] - expected).abs().max() <= 0.5 / 1024


@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_field_that_does_not_look_around_is_reproduced_bit_for_bit(height, width, tile, overlap, dtype):
    boxes = tile_boxes(height, width, tile, overlap)
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)

    def field(x, sigma):
        return torch.sin(x) * sigma + 0.1

    out = with_tiles(lambda _i, _box: field, boxes)(x, 0.7)
    assert torch.equal(out, field(x, 0.7))
    constant = in_tiles(lambda _i, _box, part: torch.full_like(part, 0.1), x, boxes)
    assert torch.equal(constant, torch.full_like(x, 0.1))


def test_a_field_that_looks_around_is_the_weighted_mean_written_out():
    boxes = tile_boxes(8, 12, 6, 2)
    x = torch.randn(1, 2, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = in_tiles(lambda i, _box, part: part.mean() + i + 0 * part, x, boxes)
    weights = tile_weights(8, 12, boxes)
    for row in range(8):
        for column in range(12):
            expected = 0.0
            for i, (box, weight) in enumerate(zip(boxes, weights, strict=True)):
                r, c = row - box.top, column - box.left
                if 0 <= r < box.height and 0 <= c < box.width:
                    expected += float(weight[r, c]) * (float(box.of(x).mean()) + i)
            assert out[0, 0, row, column].item() == pytest.approx(expected, abs=1e-12)


def test_one_tile_is_the_denoiser_itself():
    def denoise(x, sigma):
        return x * sigma

    (box,) = Tiles(tile_px=128, overlap_px=32).boxes(8, 8)
    assert with_tiles(lambda _i, _box: denoise, [box]) is denoise


def test_a_picture_of_4096_px_is_called_with_no_more_tokens_than_one_of_1024():
    """25 calls of 4096 image tokens; the whole would be one of 65536, 256 times the attention of one tile."""
    boxes = Tiles(tile_px=1024, overlap_px=256).boxes(256, 256)
    shapes = []
    x = torch.empty(1, 128, 256, 256, device="meta")
    for box in boxes:
        shapes.append(box.of(x).shape)
    assert len(shapes) == 25
    assert {s[2] * s[3] for s in shapes} == {4096}


@pytest.mark.parametrize(("tile", "overlap"), [(100, 0), (128, 24), (0, 0), (128, 80), (128, -16), (-128, 0)])
def test_sizes_off_the_grid_are_refused(tile, overlap):
    with pytest.raises(ErnieError, match="multiples of 16 px with 0 <= overlap <= tile / 2, got"):
        Tiles(tile_px=tile, overlap_px=overlap)


def test_regions_of_a_tile_are_those_of_the_picture_there():
    mask = torch.rand(40, 72, generator=torch.Generator().manual_seed(2))
    regions = Regions(lengths=(3, 4), masks_HW=(mask,))
    whole = region_weights(regions, 10, 18).reshape(2, 10, 18)
    for box in tile_boxes(10, 18, 8, 4):
        part = region_weights(regions.within(box, 10, 18), box.height, box.width)
        assert torch.equal(part.reshape(2, box.height, box.width), box.of(whole))
