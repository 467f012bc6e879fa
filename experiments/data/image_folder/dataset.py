"""Any folder, zip or tar of images, decoded once into a file of bytes that is mapped into memory, not loaded.

Which images are kept for val and test is decided by the digests of their names: it is the same for every seed and
on every machine, and most stay where they are when images are added. The bytes lie in that order, so each split
is a piece of the file, and more than the memory holds can be learnt from on the CPU.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from io import BufferedRandom
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.data.files import home_of, locked, scratch_folder
from experiments.data.image_folder.containers import Container, Folder, opened
from experiments.data.image_folder.decoding import Unreadable, decode_all
from experiments.data.image_folder.layout import SPLITS, Layout
from experiments.data.image_folder.pixel_file import (
    Stored,
    finish,
    no_room,
    read,
    require_room,
    writable_place,
)
from experiments.data.images import ImageData
from runner.data import Split
from runner.errors import UserError

log = logging.getLogger("runner")

BESIDE = ".formula-runner"  # the folder in that of the images for their decoded bytes
CACHE = Path("~/.cache/formula-runner/image_folder")  # the folder for those of archives
VERSION = 2  # of how images are decoded and laid out: another one decodes anew
EXAMPLES = 3  # files that are named where more are counted


class ImageFolder(ImageData):
    """Splits of uint8 images (N, C, size, size), mapped from a file; batches are float32 in [−1, 1].

    `root` is a folder, a zip or a tar. Its folders `train`, `val` and `test` are the splits where there is a
    `train`; a split without a folder is taken from the training images: `val_size` and `test_size` of them, a
    share below 1 or a number (0: no such split). The folders below are the classes and become targets, where
    every image lies in one; else there are no targets. Images are cut to the square in their middle and
    resized to `size` pixels, smaller ones too, in colour (`channels` 3) or grey (1). `cache` is the folder for
    the decoded bytes; null is a folder in `root`, or the user's cache where `root` is an archive or may not be
    written. In training each image is mirrored with probability `flip`.
    """

    def __init__(
        self,
        root: str | None = None,
        size: int = 32,
        channels: Literal[1, 3] = 3,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_size: float = 0.05,
        test_size: float = 0.1,
        flip: float = 0.5,
        cache: str | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, flip)
        if not root:
            raise ValueError("root must name a folder, a zip or a tar of images: data.root=PATH")
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {channels}")
        for name, value in (("val_size", val_size), ("test_size", test_size)):
            if not (0 <= value < 1 or (value >= 1 and float(value).is_integer())):
                raise ValueError(f"{name} must be a share in [0, 1) or a whole number, not {value}")
        self.root = home_of(root)
        self.size, self.channels = size, channels
        self.held_out = {"val": val_size, "test": test_size}
        self.cache = None if cache is None else home_of(cache, "cache")
        self.known: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def load(self, seed: int) -> dict[str, Split]:
        """The splits, on the CPU; decoded first where they are not yet, or have changed since.

        Raises:
            UserError: there are no such images, or no room for what they are decoded to; nothing is left.
        """
        container = opened(self.root)
        files = [self.file(place) for place in self.places(container)]
        key = digest_of(VERSION, container.state())
        stored = next((found for file in files if (found := read(file, key))), None)
        stored = stored or self.decoded(container, key, files)
        for note in stored.about["notes"]:
            log.info(f"{self.root}: {note}.")
        self.class_names = tuple(stored.about["class_names"])
        self.known = digest_of(
            stored.about["digest"], stored.about["targets"], stored.about["splits"], self.held_out
        )
        return self.splits(stored)

    def digest(self) -> str | None:
        """One sha256 of the decoded bytes, their classes and their splits; None before they are read."""
        return self.known

    def places(self, container: Container) -> list[Path]:
        """The folders where the bytes may lie, the best first."""
        if self.cache is not None:
            return [self.cache]
        beside = [self.root / BESIDE] if isinstance(container, Folder) else []
        return [*beside, CACHE.expanduser()]

    def file(self, place: Path) -> Path:
        """The file of bytes in a folder that other images may share."""
        whole = self.root.resolve()
        name = "images" if place == self.root / BESIDE else f"{whole.name}-{digest_of(str(whole))[:8]}"
        return place / f"{name}-{self.size}x{self.size}x{self.channels}.bytes"

    def decoded(self, container: Container, key: str, files: Sequence[Path]) -> Stored:
        """Decode all images into one of the files, whole or not at all, one process at a time."""
        place = writable_place([file.parent for file in files])
        path = self.file(place)
        try:
            with locked(place):
                found = read(path, key)  # another process may have been faster
                if found is None:
                    layout = self.layout(container)
                    require_room(place, len(layout.files) * self.channels * self.size**2)
                    with scratch_folder(place) as scratch:
                        with (scratch / "bytes").open("w+b") as file:
                            self.decode_into(file, container, layout, key)
                        (scratch / "bytes").replace(path)
                    found = read(path, key)
        except OSError as error:
            raise no_room(place, error.strerror or str(error)) from None
        assert found is not None, "what was written just now can be read"
        return found

    def layout(self, container: Container) -> Layout:
        """Where each image goes; this reads through a tar."""
        names = container.listed()
        if not names:
            raise UserError(f"data.root={self.root} holds no images (jpg, png, webp, bmp, gif, tif or ppm).")
        return Layout(names)

    def decode_into(self, file: BufferedRandom, container: Container, layout: Layout, key: str) -> None:
        """Write the images that can be read, and what they are."""
        files, shape = layout.files, (self.channels, self.size, self.size)
        log.info(f"Decoding {len(files):,} images of {self.root} to {self.size} × {self.size} pixels, once.")
        row_of = {name: row for row, name in enumerate(files)}
        faults: dict[str, Unreadable] = {}
        small: set[str] = set()
        coloured = False
        decoded = decode_all(container.contents(files), self.size, self.channels, torch.get_num_threads())
        with tqdm(total=len(files), unit=" images", disable=None, leave=False, dynamic_ncols=True) as bar:
            for name, found in decoded:
                bar.update()
                if isinstance(found, Unreadable):
                    faults[name] = found
                    continue
                faults.pop(name, None)  # a tar may hold a name twice: the last one counts
                (small.add if found.enlarged else small.discard)(name)
                coloured = coloured or not found.grey
                file.seek(row_of[name] * found.pixels.nbytes)
                file.write(found.pixels.data)
        kept = [name for name in files if name not in faults]
        self.require_usable(layout, kept, faults, coloured)
        notes = [left_out(layout, faults), enlarged(sorted(small & set(kept)), len(kept), self.size)]
        about = {"key": key, "notes": list(filter(None, notes)), **layout.about(kept)}
        finish(file, [row_of[name] for name in kept], shape, about)

    def require_usable(
        self, layout: Layout, kept: Sequence[str], faults: dict[str, Unreadable], coloured: bool
    ) -> None:
        """Refuse what nothing can be learnt from."""
        if not kept:
            name, reason = next(iter(faults.items()))
            raise UserError(f"None of {len(faults):,} images of {self.root} can be read: {name}: {reason}.")
        if self.channels == 3 and not coloured:
            raise UserError(
                f"All {len(kept):,} images of {self.root} are grey, and data.channels=3 asks for colour: "
                "data.channels=1 takes them as they are.",
                "data.channels=3",
                "data.channels=1",
            )
        if not any(layout.split_of(name) == "train" for name in kept):
            raise UserError(
                f"None of the images of {self.root}/train can be used: {left_out(layout, faults)}."
            )

    def splits(self, stored: Stored) -> dict[str, Split]:
        """The pieces of the file: those with a folder of their own, and those taken from training."""
        counts: dict[str, int] = stored.about["splits"]
        targets = None if stored.about["targets"] is None else torch.tensor(stored.about["targets"])
        taken = {
            name: number_of(size, counts["train"]) for name, size in self.held_out.items() if not counts[name]
        }
        if sum(taken.values()) >= counts["train"]:
            sizes = " and ".join(f"data.{name}_size={self.held_out[name]:g}" for name in taken)
            raise UserError(
                f"{self.root} has {counts['train']:,} images for training, of which {sizes} leave none."
            )
        pieces = taken | {"train": counts["train"] - sum(taken.values())}
        pieces |= {name: counts[name] for name in self.held_out if name not in taken}
        ends = torch.tensor(list(pieces.values())).cumsum(0).tolist()
        found = {
            name: piece(stored.images, targets, end - pieces[name], end)
            for name, end in zip(pieces, ends, strict=True)
        }
        return {name: found[name] for name in SPLITS if pieces[name]}


def left_out(layout: Layout, faults: dict[str, Unreadable]) -> str:
    """How many files are not learnt from, why, and which, or ""."""
    groups = {
        "cannot be read": [f"{name}: {fault}" for name, fault in faults.items()],
        "outside the folders train, val and test": layout.outside,
    }
    parts = [f"{len(group):,} {what} ({examples(group)})" for what, group in groups.items() if group]
    if not parts:
        return ""
    total = len(layout.files) + len(layout.outside)
    return f"{sum(map(len, groups.values())):,} of {total:,} images are left out: {'; '.join(parts)}"


def enlarged(small: Sequence[str], total: int, size: int) -> str:
    """How many images have fewer pixels than they are learnt with, and which, or ""."""
    if not small:
        return ""
    return f"{len(small):,} of {total:,} images are smaller than {size} pixels and are enlarged ({examples(small)})"


def examples(group: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = [f"{len(group) - EXAMPLES:,} more"] if len(group) > EXAMPLES else []
    shown = [text.encode(errors="replace").decode() for text in sorted(group)[:EXAMPLES]]
    return ", ".join(shown + more)


def number_of(size: float, total: int) -> int:
    """A share (below 1) of `total`, at least one unless it is 0, or the number itself."""
    return int(size) if size >= 1 or size == 0 else max(1, round(size * total))


def piece(images: Tensor, targets: Tensor | None, start: int, stop: int) -> Split:
    """Some rows of all; the images are not copied."""
    return Split(images[start:stop], None if targets is None else targets[start:stop])


def digest_of(*values: object) -> str:
    """A sha256 of values that are written out the same wherever they are equal."""
    return hashlib.sha256(repr(values).encode(errors="backslashreplace")).hexdigest()
