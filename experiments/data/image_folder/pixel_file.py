"""A file of decoded images, mapped into memory: their bytes, then their description (JSON), then its length."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Sequence
from io import BufferedRandom
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.errors import UserError

_LENGTH = struct.Struct(">Q")
MappedImages = tuple[Tensor, dict[str, Any]]  # (N, C, H, W) uint8 that are read on access; their description


def map_images(path: Path, key: str) -> MappedImages | None:
    """Map the images of a file, or return None unless it is there, whole and of this key."""
    # the description
    try:
        with path.open("rb") as file:
            file.seek(-_LENGTH.size, os.SEEK_END)
            [length] = _LENGTH.unpack(file.read(_LENGTH.size))
            start = file.seek(-_LENGTH.size - length, os.SEEK_END)
            about = json.loads(file.read(length))
        if about["key"] != key or prod(about["shape"]) != start:
            return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, struct.error):
        return None

    # the images
    mapped = torch.from_file(str(path), shared=False, size=start, dtype=torch.uint8)
    return mapped.view(about["shape"]), about


def finish_file(
    file: BufferedRandom, rows: Sequence[int], shape: Sequence[int], about: dict[str, Any]
) -> None:
    """Keep the images of these rows (ascending) alone, and append their description.

    `shape` is that of one image. To `about` are added the `shape` of all and the sha256 `digest` of their bytes.
    """
    # move the images together
    stride = prod(shape)
    for place, row in enumerate(rows):
        if place != row:
            file.seek(row * stride)
            image = file.read(stride)
            file.seek(place * stride)
            file.write(image)
    file.truncate(len(rows) * stride)

    # append the description
    file.seek(0)
    about = about | {"shape": [len(rows), *shape], "digest": hashlib.file_digest(file, "sha256").hexdigest()}
    text = json.dumps(about).encode()
    file.write(text + _LENGTH.pack(len(text)))
    file.flush()
    os.fsync(file.fileno())


def writable_folder(folders: Sequence[Path]) -> Path:
    """Return the first folder that may be written, made where it is missing; raise UserError where none may."""
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise cannot_write("; ".join(problems))


def cannot_write(problems: str) -> UserError:
    """Build the error for decoded images that cannot be stored: folders and reasons."""
    return UserError(f"cannot write decoded images to {problems}; choose another: data.cache=FOLDER")
