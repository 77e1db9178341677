"""Compare Images hands the page the addresses of its pictures, and refuses what is none."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError

A, B = torch.zeros(2, 16, 16, 3), torch.ones(1, 24, 16, 3)


def compare(run, **changes):
    return run("ErnieCompareImages", **({"image_a": A, "image_b": B, "label_a": "x", "label_b": ""} | changes)).ui


def test_both_batches_and_labels_reach_the_page(run):
    (shown,) = compare(run)["ernie_compare"]
    assert [len(shown["a"]), len(shown["b"]), shown["label_a"], shown["label_b"]] == [2, 1, "x", ""]
    assert shown["a"][1] == {"filename": "1.png", "subfolder": "", "type": "temp"}


def test_alpha_is_left_out(run, recording):
    compare(run, image_a=torch.rand(1, 8, 8, 4))
    assert len(recording.calls[0][1][0][0][0]) == 3


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.zeros(0, 8, 8, 3), r"image_b must hold pictures \[B, H, W, 3\], got \[0, 8, 8, 3\]"),
        (torch.zeros(8, 8, 3), "must hold pictures"),
        (torch.zeros(1, 8, 8, 1), "must hold pictures"),
        (torch.full((1, 8, 8, 3), float("nan")), "image_b holds NaN"),
    ],
)
def test_what_is_no_picture_is_refused(run, image, reason):
    with pytest.raises(ErnieError, match=reason):
        compare(run, image_b=image)
