"""What filters take out, and that the banded search finds what comparing all pairs finds."""

import hashlib

import numpy as np
import pytest
from ernie_pack.ernie_core.curation.filters import Filters, filter_rows, keep_first_of_alike
from ernie_pack.ernie_core.curation.manifest import read_rows, write_rows
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.pictures import near_duplicates


def hashes(count, seed=0):
    """Families of perceptual hashes: some far apart, some a few bits or levels from each other, some equal."""
    draw = np.random.default_rng(seed)
    out = []
    while len(out) < count:
        base = draw.integers(0, 256, 19, dtype=np.uint8)
        for _ in range(int(draw.integers(1, 6))):
            bits = np.unpackbits(base[:16])
            bits[draw.choice(128, int(draw.integers(0, 12)), replace=False)] ^= 1
            colour = np.clip(base[16:].astype(int) + draw.integers(-8, 9, 3), 0, 255).astype(np.uint8)
            out.append(np.packbits(bits).tobytes() + colour.tobytes())
        out.append(bytes(16) + bytes([int(draw.integers(0, 4))] * 3))  # flat pictures
    return out[:count]


@pytest.mark.parametrize("bits", [0, 3, 6, 15])
def test_it_finds_what_comparing_all_pairs_finds(bits):
    made = hashes(500)
    alike = {}
    for i, j in near_duplicates([h.hex() for h in made], max_bits=bits):
        alike.setdefault(j, []).append(i)
    kept = []  # the greedy rule, written out
    for j in range(len(made)):
        owners = [i for i in alike.get(j, []) if kept[i] == i]
        kept.append(min(owners) if owners else j)
    found = keep_first_of_alike(made, bits)
    assert found == kept
    assert 0 < sum(i != k for i, k in enumerate(found)) < 499


def test_a_chain_of_small_steps_is_not_one_picture():
    flat = [bytes(16)]
    for step in range(1, 5):  # four bits further each time
        flat.append(np.packbits(np.arange(128) < 4 * step).tobytes())
    found = keep_first_of_alike([h + b"\x80\x80\x80" for h in flat], 6)
    assert found == [0, 0, 2, 2, 4]


def test_no_pictures_are_no_duplicates():
    assert keep_first_of_alike([], 6) == []


def row(number, width=512, height=512, *, same_as=None, hash_of=None, size=1000):
    base = number if hash_of is None else hash_of
    bits = np.random.default_rng(base).integers(0, 256, 16, dtype=np.uint8).tobytes()
    return {
        "source": f"/pictures/{number}.png",
        "id": hashlib.sha256(bytes([number if same_as is None else same_as])).hexdigest(),
        **{"width": width, "height": height, "bytes": size, "phash": (bits + b"\x80\x80\x80").hex()},
    }


@pytest.fixture
def filtered(tmp_path):
    def run(rows, **filters):
        write_rows(tmp_path / "in.jsonl", rows)
        summary = filter_rows(tmp_path / "in.jsonl", tmp_path / "out.jsonl", Filters(**filters))
        return summary, list(read_rows(tmp_path / "out.jsonl"))

    return run


def test_size_and_aspect_say_what_was_wanted_and_the_rows_stay(filtered):
    rows = [row(0, 255, 800), row(1, 256, 800), row(2, 5000, 400), row(3, 900, 300), {"source": "/x", "problem": "cut"}]
    summary, out = filtered(rows, min_side=256, max_side=4096, max_aspect=3.0, min_pixels=1000)
    assert [{k: v for k, v in r.items() if k not in ("kept", "dropped_by")} for r in out] == rows
    assert out[0]["dropped_by"] == "size: 255 x 800; the shorter side must have 256"
    assert out[1]["dropped_by"] == "aspect: 3.12; at most 3"
    assert out[2]["dropped_by"] == "size: 5000 x 400; the longer side may have 4096"
    assert "kept" not in out[3]
    assert "kept" not in out[4]
    assert (summary.kept, summary.passed_by, summary.dropped) == (1, 1, {"size": 2, "aspect": 1})


def test_of_duplicates_the_largest_is_kept_and_the_others_name_it(filtered):
    rows = [
        row(0, 512, 512, hash_of=7),
        row(1, 1024, 1024, hash_of=7),  # the largest, wherever it stands
        row(2, 1024, 1024, same_as=1, hash_of=7),
        row(3, 1024, 1000, hash_of=7, size=10),
        row(4),
    ]
    _, out = filtered(rows, exact=True, near_bits=6)
    assert [r.get("kept") for r in out] == [False, None, False, False, None]
    assert out[0]["dropped_by"] == "near duplicate: looks the same as /pictures/1.png"
    assert out[2]["dropped_by"] == "exact duplicate: the same file as /pictures/1.png"
    _, out = filtered(rows, exact=True)
    assert [r.get("kept") for r in out] == [None, None, False, None, None]


def test_a_picture_that_is_dropped_for_its_size_takes_no_duplicate_with_it(filtered):
    _, out = filtered([row(0, 9000, 9000, hash_of=7), row(1, hash_of=7)], max_side=4096, near_bits=6)
    assert [r.get("kept") for r in out] == [False, None]


def test_what_was_dropped_before_stays_so_for_the_same_reason(filtered):
    before = row(0) | {"kept": False, "dropped_by": "score: 2 below 3"}
    summary, out = filtered([before, row(1, hash_of=0)], near_bits=6, min_side=4096)
    assert out[0] == before
    assert summary.dropped == {"size": 1}


def test_neutral_filters_keep_every_byte(filtered, tmp_path):
    filtered([row(i, hash_of=0) for i in range(5)])
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "in.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_side": -1}, "min_side must be 0"),
        ({"max_aspect": 0.5}, "max_aspect must be 0"),
        ({"near_bits": 16}, "near_bits must lie between -1"),
        ({"max_aspect": float("nan")}, "max_aspect must be 0"),
    ],
    ids=["side", "aspect", "bits", "nan"],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ErnieError, match=message):
        Filters(**settings)


def test_a_manifest_is_not_filtered_onto_itself(tmp_path):
    write_rows(tmp_path / "a.jsonl", [row(0)])
    with pytest.raises(ErnieError, match="source and target at once"):
        filter_rows(tmp_path / "a.jsonl", tmp_path / "a.jsonl", Filters())
