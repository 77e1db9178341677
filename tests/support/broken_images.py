"""Odd and broken picture files, drawn so that the right reading of each is known."""

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 48, 32
CORNERS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "white": (250, 250, 250)}


def upright(width=WIDTH, height=HEIGHT):
    """Top left red, top right green, bottom left blue, bottom right white."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    h, w = height // 2, width // 2
    picture[:h, :w], picture[:h, w:] = CORNERS["red"], CORNERS["green"]
    picture[h:, :w], picture[h:, w:] = CORNERS["blue"], CORNERS["white"]
    return picture


# Stored pixels that EXIF orientation n (tag 274: where the stored row 0 and column 0 are seen) makes upright.
STORED = {
    1: lambda a: a,  # row 0 at the top, column 0 at the left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.transpose(1, 0, 2),  # left, top
    6: lambda a: a[:, ::-1].transpose(1, 0, 2),  # right, top: stored[r, c] = upright[c, W - 1 - r]
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda a: a[::-1].transpose(1, 0, 2),  # left, bottom: stored[r, c] = upright[H - 1 - c, r]
}


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def oriented(orientation, format="PNG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright())))
    return encode(image, format, exif=exif.tobytes())


def with_alpha(mode):
    """The left half is transparent; `mode` RGBA, LA, PA, P (one transparent entry) or L (tRNS)."""
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[:, : WIDTH // 2] = 0
    if mode == "RGBA":
        return encode(Image.fromarray(np.dstack([upright(), alpha])))
    if mode == "LA":
        return encode(Image.fromarray(np.dstack([np.full_like(alpha, 100), alpha])))
    indices = (alpha > 0).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(indices)
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([10, 20, 30, 200, 100, 50])
        return encode(image, transparency=0)
    if mode == "P alpha":  # a tRNS chunk with an alpha for every entry
        image = Image.frombytes("P", (WIDTH, HEIGHT), indices.tobytes())
        image.putpalette([10, 20, 30, 200, 100, 50])
        return encode(image, transparency=bytes([0, 255]))
    assert mode == "L"
    return encode(Image.fromarray(np.where(indices > 0, 100, 7).astype(np.uint8)), transparency=7)


def sixteen_bit(value=40000):
    return encode(Image.fromarray(np.full((HEIGHT, WIDTH), value, dtype=np.uint16)))


def floats(high=1.0):
    return encode(
        Image.fromarray(np.linspace(0, high, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)), "TIFF"
    )


def cmyk():
    return encode(Image.fromarray(upright()).convert("CMYK"), "JPEG", quality=95)


def linear_profile():
    """An ICC v2 profile: sRGB's primaries with a straight tone curve, so that value 128 means about 188 in sRGB."""

    def s15(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(x, y, z):
        return b"XYZ \0\0\0\0" + s15(x) + s15(y) + s15(z)

    text = b"linear test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.43607, 0.22249, 0.01392),
        b"gXYZ": xyz(0.38515, 0.71687, 0.09708),
        b"bXYZ": xyz(0.14307, 0.06061, 0.71410),
        **{name: b"curv\0\0\0\0" + struct.pack(">I", 0) for name in (b"rTRC", b"gTRC", b"bTRC")},
    }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + s15(0.9642) + s15(1.0) + s15(0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def profiled(profile=None):
    image = Image.fromarray(np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8))
    return encode(image, icc_profile=linear_profile() if profile is None else profile)


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def animated(format="GIF"):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    return encode(frames[0], format, save_all=True, append_images=frames[1:])


def truncated(format="PNG", keep=0.6):
    generator = np.random.default_rng(0)
    data = encode(Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
    return data[: int(len(data) * keep)]


def bomb():
    """A PNG header that promises 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"this is not a picture\n" * 20,
    "page.png": b"<!DOCTYPE html><html></html>",
    "cut.png": truncated("PNG"),
    "cut.jpg": truncated("JPEG"),
    "cut.webp": truncated("WEBP"),
    "cut.gif": truncated("GIF", 0.5),
    "header.png": truncated("PNG", 0.002),
    "bomb.png": bomb(),
    "float.tif": floats(1000.0),
}


def write_pictures(folder, sizes, *, captions=True, seed=0):
    """Noise pictures 0.png, 1.png ... of the given (width, height), each with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / f"{i}.png").write_bytes(encode(Image.fromarray(pixels)))
        if captions:
            (folder / f"{i}.txt").write_text(f"caption {i}", encoding="utf-8")
    return folder


def tar_of(members):
    """The bytes of a tar with (name, data) members; names may come twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def png_of(seed, width=WIDTH, height=HEIGHT):
    """A small PNG that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def write_pile(folder, count, *, seed=0):
    """`count` files in every state that files are found in; returns {path: whether its picture can be used}.

    Good ones among them are odd too: CMYK, 16 bit, animated, turned by EXIF, wrong suffixes, names in any script.
    """
    good = {
        "plain.png": lambda n: png_of(n),
        "jpeg.jpg": lambda n: encode(Image.open(io.BytesIO(png_of(n))), "JPEG", quality=90),
        "turned.jpg": lambda n: oriented(n % 8 + 1, "JPEG"),
        "cmyk.jpg": lambda n: cmyk(),
        "sixteen.png": lambda n: sixteen_bit(n % 65536),
        "animated.gif": lambda n: animated(),
        "alpha.png": lambda n: with_alpha("RGBA"),
        "palette.png": lambda n: with_alpha("P"),
        "profiled.png": lambda n: profiled(),
        "is a png.jpg": lambda n: png_of(n),
        "no suffix": lambda n: png_of(n),
        "\u732b\u3068\u72ac \U0001f98a.png": lambda n: png_of(n),
        "quote'\"\\ new\nline.png": lambda n: png_of(n),
        "trailing. .PNG": lambda n: png_of(n),
        "# hash 100%.png": lambda n: png_of(n),
    }
    bad = {
        **{name: lambda n, data=data: data for name, data in BROKEN.items()},
        "text as.png": lambda n: f"just words {n}".encode(),
        "zeros.png": lambda n: bytes(n % 5000),
        "tiny.png": lambda n: png_of(n, 8, 8),
        "words.docx": lambda n: b"PK\3\4" + bytes(n % 100),
        "film.mp4": lambda n: b"\0\0\0\x18ftypmp42" + bytes(n % 300),
        "raw.heic": lambda n: b"\0\0\0\x18ftypheic" + bytes(n % 300),
        "cut later.png": lambda n: png_of(n)[: -20 - n % 200],
        "flipped bit.png": lambda n: bytes(b ^ (i == 60) for i, b in enumerate(png_of(n))),
        "lonely.txt": lambda n: b"a caption without a picture",
    }
    generator = np.random.default_rng(seed)
    expected = {}
    for number in range(count):
        kinds = good if generator.random() < 0.4 else bad
        name = sorted(kinds)[int(generator.integers(len(kinds)))]
        path = folder / f"{number % 7}" / f"{number:04d} {name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kinds[name](number))
        expected[path] = kinds is good
    return expected
