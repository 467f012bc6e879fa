"""One image file: what it decodes to, and that whatever cannot be read says why and raises nothing else."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from experiments.data.image_folder import decoding
from experiments.data.image_folder.decoding import Unreadable, _Square, decode


def pixels(number: int, height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    """Return the made-up image of this number: uint8 (H, W, C), or (H, W) if grey."""
    shape = (height, width, channels) if channels == 3 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(target, kind, **options)
    return target.getvalue()


GOOD = encoded(pixels(0))
WIDE, TALL, DOT, GREY = pixels(0, 32, 61), pixels(0, 61, 32), pixels(3, 1, 1), pixels(0, channels=1)
DEEP = (GREY.astype(np.uint16) << 8) | 77
EXIF = Image.Exif()
EXIF[0x0112] = 6  # a quarter turn clockwise
CLEAR = np.zeros((32, 32, 4), np.uint8)
CLEAR[:16] = (10, 20, 30, 255)
OPAQUE = np.where(CLEAR[..., 3:] == 255, CLEAR[..., :3], 255)
PALETTE = Image.fromarray(pixels(0)).quantize(4)
ONE_CLEAR = np.where(np.asarray(PALETTE)[..., None] == 0, 255, np.asarray(PALETTE.convert("RGB")))
JPEG = encoded(pixels(1), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("content", "expected"),
    {
        "middle of a wide one": (encoded(WIDE), WIDE[:, 14:46]),
        "middle of a tall one": (encoded(TALL), TALL[14:46]),
        "JPEG as Pillow reads it": (JPEG, np.asarray(Image.open(io.BytesIO(JPEG)))),
        "grey as colour": (encoded(GREY), GREY[..., None].repeat(3, 2)),
        "grey": (encoded(GREY), GREY[..., None]),
        "16 bits cut to 8": (encoded(DEEP), GREY[..., None]),
        "transparent parts white": (encoded(CLEAR), OPAQUE),
        "transparent colour of a palette white": (encoded(PALETTE, transparency=0), ONE_CLEAR),
        "turned as the camera said": (encoded(TALL[:40], exif=EXIF), np.rot90(TALL[:40], -1)[:, 4:36]),
        "one pixel": (encoded(DOT), np.broadcast_to(DOT, (32, 32, 3))),
    }.values(),
)
def test_pixels_are(content, expected):
    assert np.array_equal(decode(content, 32, expected.shape[2]).pixels, expected.transpose(2, 0, 1))


def ramp(values: np.ndarray) -> bytes:
    return encoded(np.repeat(values.astype(np.uint8)[None, :, None], len(values), 0).repeat(3, 2))


STRIPES = np.zeros((128, 128, 3), np.uint8)  # of one pixel: plain sampling would give 0 or 255
STRIPES[:, ::2] = 255
NEW = np.arange(32)  # the pixels of an image of 32, whose centres lie at (NEW + 0.5) / 4 - 0.5 of one of 8
Y, X = np.mgrid[0:400, 0:400] / 400
SMOOTH = np.stack((255 * X, 255 * Y, 127 + 100 * np.sin(6 * X + 4 * Y)), 2).astype(np.uint8)
LARGE = encoded(SMOOTH, "JPEG", quality=95)


@pytest.mark.parametrize(
    ("content", "expected", "edge", "tolerance"),
    {
        "smaller, without aliases": (encoded(STRIPES), 127.5, 2, 8),
        "smaller, the mean of four pixels each": (ramp(np.arange(128)), 4 * NEW + 1.5, 2, 1),
        "larger, a ramp stays one": (ramp(16 * np.arange(8) + 40), 4 * NEW + 34, 8, 1.5),
        "a large JPEG, at less cost": (LARGE, decode(encoded(SMOOTH), 32, 3).pixels, 1, 6),
    }.values(),
)
def test_resizing_is_smooth(content, expected, edge, tolerance):
    result = decode(content, 32, 3).pixels.astype(float)
    assert np.abs((result - expected)[:, edge:-edge, edge:-edge]).max() <= tolerance
    assert np.ndim(expected) != 1 or (np.diff(result) >= -1).all()  # a ramp does not swing


def test_colour_becomes_grey_and_is_told_from_it():
    assert np.abs(decode(GOOD, 32, 1).pixels[0] - pixels(0) @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert decode(encoded(GREY), 32, 3).grey and not decode(GOOD, 32, 3).grey


def resized(width: int, height: int) -> bytes:
    """Return GOOD with another size in its header."""
    header = b"IHDR" + struct.pack(">II", width, height) + GOOD[24:29]
    return GOOD[:12] + header + struct.pack(">I", zlib.crc32(header)) + GOOD[33:]


UNREADABLE = {
    "empty": b"",
    "text": b"no image at all",
    "cut": GOOD[:-40],
    "zeros": GOOD[:200] + bytes(len(GOOD) - 200),
    "too few pixels": resized(64, 64),
    "bomb": resized(20_000, 20_000),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
    "floats": encoded(GREY.astype(np.float32), "TIFF"),
    "a format of Pillow's that we do not open": encoded(pixels(0), "PCX"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_says_why_and_raises_nothing_else(content):
    with pytest.raises(Unreadable, match=r"^[^<>]+$"):  # no address of an object
        decode(content, 32, 3)


def test_too_many_pixels_are_not_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "_MAX_PIXELS", 32 * 33)
    decode(encoded(pixels(0, 32, 33)), 32, 3)
    with pytest.raises(Unreadable, match="34 × 32 pixels are too many"):
        decode(encoded(pixels(0, 32, 34)), 32, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow's, which decode_all silences
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_every_cut_and_many_flips_are_read_or_refused(kind):
    content = encoded(pixels(0), kind)
    for place in np.random.default_rng(0).integers(0, len(content), 60):
        flipped = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        for damaged in (content[:place], flipped):
            with contextlib.suppress(Unreadable):
                assert decode(damaged, 32, 3).pixels.shape == (3, 32, 32)


def test_chunks_are_short_in_number_and_in_bytes(monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1000)
    files = [(str(i), bytes(10 if i < 100 else 900)) for i in range(110)]
    chunks = list(decoding._chunks(files))
    assert [file for chunk in chunks for file in chunk] == files
    assert [len(chunk) for chunk in chunks] == [32, 32, 32, 6, 2, 2, 2, 2]


def test_few_files_are_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK_FILES", 8)
    read = []
    files = ((name, read.append(name) or GOOD) for name in map(str, range(400)))
    for number, (name, result) in enumerate(decoding.decode_all(files, 32, 3, 2)):
        assert name == str(number) and isinstance(result, _Square)
        assert len(read) - number <= 7 * 8
