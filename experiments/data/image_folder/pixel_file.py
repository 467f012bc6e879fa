"""A file of decoded images that is mapped into memory: their bytes, then what they are (JSON), then its length."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedRandom
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.errors import UserError

LENGTH = struct.Struct(">Q")


@dataclass(frozen=True)
class Stored:
    """Images (N, C, H, W) uint8 that lie in a file and are read when they are looked at, and what they are."""

    images: Tensor
    about: dict[str, Any]


def read(path: Path, key: str) -> Stored | None:
    """The images of a file, if it is there, whole and of this key."""
    try:
        with path.open("rb") as file:
            file.seek(-LENGTH.size, os.SEEK_END)
            [length] = LENGTH.unpack(file.read(LENGTH.size))
            start = file.seek(-LENGTH.size - length, os.SEEK_END)
            about = json.loads(file.read(length))
        if about["key"] != key or prod(about["shape"]) != start:
            return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, struct.error):
        return None
    mapped = torch.from_file(str(path), shared=False, size=start, dtype=torch.uint8)
    return Stored(mapped.view(about["shape"]), about)


def finish(file: BufferedRandom, rows: Sequence[int], shape: Sequence[int], about: dict[str, Any]) -> None:
    """Move the images of these rows (ascending) together, and say at the end what they are.

    `shape` is that of one image. `about` is given the `shape` of all and the sha256 `digest` of their bytes.
    """
    stride = prod(shape)
    for place, row in enumerate(rows):
        if place != row:
            file.seek(row * stride)
            image = file.read(stride)
            file.seek(place * stride)
            file.write(image)
    file.truncate(len(rows) * stride)
    file.seek(0)
    about = about | {"shape": [len(rows), *shape], "digest": hashlib.file_digest(file, "sha256").hexdigest()}
    text = json.dumps(about).encode()
    file.write(text + LENGTH.pack(len(text)))
    file.flush()
    os.fsync(file.fileno())


def writable_place(places: Sequence[Path]) -> Path:
    """The first folder that may be written, made where it is not.

    Raises:
        UserError: none may.
    """
    problems = {}
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as error:
            problems[str(place)] = error.strerror or str(error)
    *others, last = problems
    reasons = [*(f"{place}: {problems[place]}" for place in others), problems[last]]
    raise no_room(last, "; ".join(reversed(reasons)))


def require_room(place: Path, size: int) -> None:
    """Refuse to begin what would fill the disk, `size` bytes."""
    free = shutil.disk_usage(place).free
    if free < size:
        raise no_room(place, f"they take {amount(size)}, and {amount(free)} are free")


def amount(size: int) -> str:
    """Bytes in the unit in which they are counted, to three digits: 512 B, 3.07 kB, 184 MB."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def no_room(place: object, reason: str) -> UserError:
    """The decoded images cannot be kept there."""
    return UserError(
        f"The decoded images cannot be put into {place}: {reason}. data.cache=FOLDER chooses another place."
    )
