"""Any folder, zip or tar of images, decoded once into a file of bytes that is mapped into memory, not loaded.

Which images are held out for val and test is decided by the digests of their names: it is the same for every seed and
on every machine, and most images keep their split when others are added. The bytes lie in that order, so each split
is a piece of the file, and a data set may be larger than the memory of the CPU.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from io import BufferedRandom
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.data.files import expand_folder, locked, scratch_folder
from experiments.data.image_folder import pixel_file
from experiments.data.image_folder.containers import Container, Folder, open_container
from experiments.data.image_folder.decoding import Unreadable, decode_all
from experiments.data.image_folder.layout import SPLITS, Layout
from experiments.data.images import ImageData
from runner.data import Split
from runner.errors import UserError, at_least

log = logging.getLogger("runner")

_BESIDE = ".formula-runner"  # the folder in that of the images for their decoded bytes
_CACHE = Path("~/.cache/formula-runner/image_folder")  # the folder for those of archives
_VERSION = 2  # of how images are decoded and laid out: another one decodes anew
_EXAMPLES = 3  # files that are named where more are counted


class ImageFolder(ImageData):
    """Splits of uint8 images (N, C, size, size), mapped from a file; batches are float32 in [−1, 1].

    `root` is a folder, a zip or a tar. Its folders `train`, `val` and `test` are the splits if there is a `train`; a
    split without a folder is held out of the training images: `val_size` and `test_size` of them, a share below 1 or a
    number (0: no such split). The folders below are the classes and become targets if every image lies in one; else
    there are no targets. Images are cut to the square in their middle and resized to `size` pixels, smaller ones too,
    in colour (`channels` 3) or grey (1). `cache` is the folder for the decoded bytes; null is a folder in `root`, or
    the user's cache if `root` is an archive or read-only. In training each image is mirrored with probability `flip`.
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
        at_least(1, size=size)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        for name, value in (("val_size", val_size), ("test_size", test_size)):
            if not (0 <= value < 1 or (value >= 1 and float(value).is_integer())):
                raise ValueError(f"{name} must be a share in [0, 1) or a whole number, got {value}")
        self.root = expand_folder(root or "")
        self.size, self.channels, self.shape = size, channels, (channels, size, size)
        self.held_out = {"val": val_size, "test": test_size}
        self.cache = None if cache is None else expand_folder(cache, "cache")
        self._digest: str | None = None

    def load(self, seed: int) -> dict[str, Split]:
        """Return the splits, on the CPU; decode the images first if they are new or have changed.

        Raises:
            UserError: there are no such images, or no space for what they are decoded to; nothing is left.
        """
        # the decoded images
        container = open_container(self.root)
        beside = [self.root / _BESIDE] if isinstance(container, Folder) else []
        folders = [*beside, _CACHE.expanduser()] if self.cache is None else [self.cache]
        files = [self._file(folder) for folder in folders]
        key = _digest_of(_VERSION, container.state())
        decoded = next((mapped for file in files if (mapped := pixel_file.map_images(file, key))), None)
        decoded = decoded or self._decode(container, key, files)

        # what is known of them
        images, about = decoded
        for note in about["notes"]:
            log.info(f"{self.root}: {note}.")
        self.class_names = tuple(about["class_names"])
        self._digest = _digest_of(about["digest"], about["targets"], about["splits"], self.held_out)
        return self._splits(images, about)

    def digest(self) -> str | None:
        """Return one sha256 of the decoded bytes, their classes and their splits; None before `load`."""
        return self._digest

    def _file(self, folder: Path) -> Path:
        """Return the file of bytes in a folder that other images may share."""
        root = self.root.resolve()
        name = "images" if folder == self.root / _BESIDE else f"{root.name}-{_digest_of(str(root))[:8]}"
        return folder / f"{name}-{self.size}x{self.size}x{self.channels}.bytes"

    def _decode(self, container: Container, key: str, files: Sequence[Path]) -> pixel_file.MappedImages:
        """Decode all images into one of the files, whole or not at all, one process at a time."""
        folder = pixel_file.writable_folder([file.parent for file in files])
        path = self._file(folder)
        try:
            with locked(folder):
                # another process may have been faster
                if decoded := pixel_file.map_images(path, key):
                    return decoded

                # which images, and whether they fit
                names = container.names()
                if not names:
                    formats = "jpg, png, webp, bmp, gif, tif or ppm"
                    raise UserError(f"data.root={self.root} contains no images ({formats})")
                layout = Layout(names)
                size, free = len(layout.files) * prod(self.shape), shutil.disk_usage(folder).free
                if free < size:
                    raise OSError(f"they take {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free")

                # write aside, then rename
                with scratch_folder(folder) as scratch:
                    with (scratch / "bytes").open("w+b") as file:
                        self._decode_into(file, container, layout, key)
                    (scratch / "bytes").replace(path)
                decoded = pixel_file.map_images(path, key)
        except OSError as error:
            raise pixel_file.cannot_write(f"{folder}: {error.strerror or error}") from None
        assert decoded is not None, "the file was written just now"
        return decoded

    def _decode_into(self, file: BufferedRandom, container: Container, layout: Layout, key: str) -> None:
        """Write the images that can be read, and their description."""
        files = layout.files
        row_of = {name: row for row, name in enumerate(files)}
        errors: dict[str, Unreadable] = {}
        small: set[str] = set()
        coloured = False

        # each image into its row
        log.info(f"Decoding {len(files):,} images of {self.root} to {self.size} × {self.size} pixels, once.")
        results = decode_all(container.contents(files), self.size, self.channels, torch.get_num_threads())
        with tqdm(total=len(files), unit=" images", disable=None, leave=False, dynamic_ncols=True) as bar:
            for name, result in results:
                bar.update()
                if isinstance(result, Unreadable):
                    errors[name] = result
                    continue
                errors.pop(name, None)  # a tar may hold a name twice: the last one counts
                (small.add if result.enlarged else small.discard)(name)
                coloured = coloured or not result.grey
                file.seek(row_of[name] * result.pixels.nbytes)
                file.write(result.pixels.data)

        # close the gaps and describe
        usable = [name for name in files if name not in errors]
        self._require_usable(layout, usable, errors, coloured)
        notes = [_left_out(layout, errors)] * bool(errors or layout.outside)
        if enlarged := sorted(small & set(usable)):
            smaller = f"are smaller than {self.size} pixels and are enlarged ({_examples(enlarged)})"
            notes.append(f"{len(enlarged):,} of {len(usable):,} images {smaller}")
        about = {"key": key, "notes": notes, **layout.about(usable)}
        pixel_file.finish_file(file, [row_of[name] for name in usable], self.shape, about)

    def _require_usable(
        self, layout: Layout, usable: Sequence[str], errors: dict[str, Unreadable], coloured: bool
    ) -> None:
        """Raise UserError where no training image is left, or grey images would be learnt in colour."""
        if not usable:
            name, reason = next(iter(errors.items()))
            raise UserError(f"none of {len(errors):,} images of {self.root} can be read: {name}: {reason}")
        if self.channels == 3 and not coloured:
            raise UserError(
                f"expected colour images (data.channels=3), got {len(usable):,} grey ones in {self.root}; "
                "try data.channels=1",
                "data.channels=3",
                "data.channels=1",
            )
        if not any(layout.split_of(name) == "train" for name in usable):
            raise UserError(f"no image of {self.root}/train can be used: {_left_out(layout, errors)}")

    def _splits(self, images: Tensor, about: dict[str, Any]) -> dict[str, Split]:
        """Cut the file into the splits with a folder of their own and those held out of training."""
        # the size of each
        counts: dict[str, int] = about["splits"]
        N = counts["train"]
        taken = {  # at least one, unless the share is 0
            name: int(size) if size >= 1 or size == 0 else max(1, round(size * N))
            for name, size in self.held_out.items()
            if not counts[name]
        }
        if sum(taken.values()) >= N:
            settings = " and ".join(f"data.{name}_size={self.held_out[name]:g}" for name in taken)
            raise UserError(f"{settings} leave none of the {N:,} training images of {self.root}")
        sizes = taken | {"train": N - sum(taken.values())}
        sizes |= {name: counts[name] for name in self.held_out if name not in taken}

        # the pieces, not copied
        inputs = torch.split(images, list(sizes.values()))
        targets: Sequence[Tensor | None] = [None] * len(sizes)
        if about["targets"] is not None:
            targets = torch.split(torch.tensor(about["targets"]), list(sizes.values()))
        pieces = {name: Split(x, y) for name, x, y in zip(sizes, inputs, targets, strict=True)}
        return {name: pieces[name] for name in SPLITS if sizes[name]}


def _left_out(layout: Layout, errors: dict[str, Unreadable]) -> str:
    """Return how many files are left out, why, and which."""
    groups = {
        "cannot be read": [f"{name}: {error}" for name, error in errors.items()],
        "outside the folders train, val and test": layout.outside,
    }
    parts = [f"{len(group):,} {reason} ({_examples(group)})" for reason, group in groups.items() if group]
    total = len(layout.files) + len(layout.outside)
    return f"{sum(map(len, groups.values())):,} of {total:,} images are left out: {'; '.join(parts)}"


def _examples(group: Sequence[str]) -> str:
    """Return the first few, and how many more there are."""
    more = [f"{len(group) - _EXAMPLES:,} more"] if len(group) > _EXAMPLES else []
    names = [text.encode(errors="replace").decode() for text in sorted(group)[:_EXAMPLES]]
    return ", ".join(names + more)


def _digest_of(*values: object) -> str:
    """Return a sha256 of values whose text is the same wherever they are equal."""
    return hashlib.sha256(repr(values).encode(errors="backslashreplace")).hexdigest()
