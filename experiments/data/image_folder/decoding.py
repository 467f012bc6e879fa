"""Decode image files of any kind and size to small squares of bytes; say why a file cannot be read."""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no EPS, which would start a program
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of images without colour
_MAX_PIXELS = 100_000_000  # of one image; a small file can hold more than the memory does
_CHUNK_FILES, _CHUNK_BYTES = 32, 4_000_000  # what a thread is given at once


class Unreadable(Exception):
    """An image that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class _Square:
    """A decoded image: uint8 (C, size, size); whether the file was grey or smaller than that."""

    pixels: np.ndarray
    grey: bool
    enlarged: bool


Content = bytes | Unreadable  # of a file
_Decoded = _Square | Unreadable


def decode(content: bytes, size: int, channels: int) -> _Square:
    """Return the largest square in the middle of an image, `size` pixels wide, in colour (3) or grey (1).

    It is turned as its camera said, transparent parts are white, 16 bits are cut to 8, smaller images are enlarged;
    of several pictures in a file it is the first.

    Raises:
        Unreadable: the bytes are no image, are damaged, or hold too many pixels.
    """
    # the whole image
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise Unreadable(f"{width} × {height} pixels are too many")
            grey = image.mode in _GREY
            image.draft(image.mode, (2 * size, 2 * size))  # a JPEG decodes to 1/2, 1/4, 1/8 for less
            whole = _opaque(ImageOps.exif_transpose(image)).convert("RGB" if channels == 3 else "L")
    except Exception as error:  # a damaged file makes Pillow's decoders raise whatever they run into
        reason = " ".join(str(error).split()) or type(error).__name__
        unknown = isinstance(error, UnidentifiedImageError)
        raise Unreadable("not an image of a known format" if unknown else reason) from None

    # its middle without aliases, channels first
    side = min(whole.size)
    left, top = ((length - side) // 2 for length in whole.size)
    middle = whole.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    pixels = np.asarray(middle)  # (S, S, C) or (S, S)
    square = np.ascontiguousarray(pixels.reshape(size, size, channels).transpose(2, 0, 1))
    return _Square(square, grey, min(width, height) < size)


def _opaque(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits per value and nothing transparent."""
    if image.mode == "F":
        raise Unreadable("its pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in image.mode.upper() or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def decode_all(
    files: Iterable[tuple[str, Content]], size: int, channels: int, threads: int
) -> Iterator[tuple[str, _Decoded]]:
    """Yield each file's name and image, in the given order; few are in memory at a time."""

    def attempt(content: Content) -> _Decoded:
        try:
            return content if isinstance(content, Unreadable) else decode(content, size, channels)
        except Unreadable as reason:
            return reason

    def work(chunk: list[tuple[str, Content]]) -> list[tuple[str, _Decoded]]:
        return [(name, attempt(content)) for name, content in chunk]

    # a queue of chunks, in order
    pending: deque[Future[list[tuple[str, _Decoded]]]] = deque()
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged files, which are counted
        try:
            for chunk in _chunks(files):
                pending.append(pool.submit(work, chunk))
                if len(pending) > 2 * threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _chunks(files: Iterable[tuple[str, Content]]) -> Iterator[list[tuple[str, Content]]]:
    """Yield the files in lists that are short in number and in bytes."""
    chunk: list[tuple[str, Content]] = []
    num_bytes = 0
    for name, content in files:
        chunk.append((name, content))
        num_bytes += len(content) if isinstance(content, bytes) else 0
        if len(chunk) == _CHUNK_FILES or num_bytes > _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk
