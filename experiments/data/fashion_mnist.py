"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of garments, 28 × 28 pixels, ten classes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import datasets

from experiments.data import download
from experiments.data.download import answering, downloading
from experiments.data.files import Source, SourceError, digest_of_files, ensure_files, expand_folder
from experiments.data.images import ImageData, check_val_size, hold_out_val, to_signed
from runner.data import Split
from runner.errors import within
from runner.streams import BatchRandom

log = logging.getLogger("runner")

_DIGESTS = {  # sha256 of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_PACKAGE = "dataset-fashion-mnist"  # Debian's
_PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where it puts the files
_MEAN, _STD = 0.2860, 0.3530  # of the 60,000 images' pixels, as shares of white
_SIZE = 28
_PADDING = 2  # black pixels on each side of an image that a network generates: 32 can be halved often


class FashionMNIST(ImageData):
    """Train, val and test as uint8 images (N, 28, 28); batches are standardised rows (B, 28, 28).

    After `as_images`, for networks that generate images: uint8 (N, 1, 32, 32), padded with black, and batches
    (B, 1, 32, 32) in [−1, 1].

    `root` is the folder of the files, fetched if missing; `val_size` of the training images, as many of each class,
    are held out (0: no val split); in training each image is shifted by up to `shift` pixels both ways and, with
    probability `flip`, mirrored.
    """

    class_names = tuple(datasets.FashionMNIST.classes)
    shape = (1, _SIZE + 2 * _PADDING, _SIZE + 2 * _PADDING)

    def __init__(
        self,
        root: str = "~/.cache/formula-runner",
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_size: int = 5000,
        shift: int = 0,
        flip: float = 0.0,
    ):
        super().__init__(batch_size, eval_batch_size, flip)
        check_val_size(val_size, 60_000)
        within(0, _SIZE, shift=shift)
        self.root = expand_folder(root)
        self.val_size, self.shift = val_size, shift
        self.form: Literal["rows", "images"] = "rows"

    def as_images(self) -> None:
        """Switch to images with a channel, in [−1, 1], 32 × 32 pixels."""
        self.form = "images"

    def load(self, seed: int) -> dict[str, Split]:
        """Return the splits, on the CPU; obtain the files first if they are not in `root`."""
        sources = [
            Source(f"{_PACKAGE_FOLDER}, where Debian's package puts them", lambda _: _PACKAGE_FOLDER),
            Source("torchvision's mirrors", _from_mirrors),
            Source(f"Debian's package {_PACKAGE}", _from_package),
        ]
        folder = self.root / "FashionMNIST" / "raw"
        ensure_files("Fashion-MNIST", folder, _DIGESTS, sources)

        # all images of both: (N, 28, 28) or, as images, (N, 1, 32, 32)
        splits = []
        for name in ("train", "t10k"):
            images = _read(folder / f"{name}-images-idx3-ubyte", _SIZE, _SIZE)
            images = images if self.form == "rows" else pad(images, [_PADDING] * 4)[:, None]
            splits.append(Split(images, _read(folder / f"{name}-labels-idx1-ubyte").long()))
        return hold_out_val(splits[0], splits[1], self.val_size, seed)

    def digest(self) -> str:
        """Return one sha256 for the four files, which were verified."""
        return digest_of_files(_DIGESTS)

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        """Standardise uint8, or scale it to [−1, 1] (as images); in training shift and mirror first."""
        if draws is not None and (self.shift or self.flip):
            inputs = self._augment(inputs, draws)
        return to_signed(inputs) if self.form == "images" else (inputs.float() - 255 * _MEAN) / (255 * _STD)

    def _augment(self, images: Tensor, draws: BatchRandom) -> Tensor:
        """Shift each image, with black coming in at the edge, and mirror it, by one lookup of its pixels."""
        # the place of each pixel in the padded image
        H, W = images.shape[-2:]  # one channel, with an axis of its own or without
        s = self.shift
        offset = draws.integers(0, 2 * s + 1, 2)  # (B, 2): down and right
        rows = offset[:, :1] + torch.arange(H, device=images.device)  # (B, H)
        columns = offset[:, 1:] + torch.arange(W, device=images.device)  # (B, W)
        if self.flip:
            columns = torch.where(draws.uniform(1) < self.flip, columns.flip(1), columns)

        # look them up
        index = rows[:, :, None] * (W + 2 * s) + columns[:, None, :]  # (B, H, W)
        return pad(images, (s, s, s, s)).flatten(1).gather(1, index.flatten(1)).view(images.shape)


def _read(path: Path, *shape: int) -> Tensor:
    """Return the uint8 entries (N, *shape) of a verified idx file; its header is a magic number and the sizes."""
    header = 4 * (2 + len(shape))  # bytes
    return torch.from_numpy(np.fromfile(path, np.uint8, offset=header)).view(-1, *shape)


def _from_mirrors(scratch: Path) -> Path:
    """Download with torchvision, from those of its mirrors that answer."""
    theirs = datasets.FashionMNIST
    name = theirs.resources[0][0]
    alive = [url.removesuffix(name) for url in answering([mirror + name for mirror in theirs.mirrors])]
    log.info(f"  torchvision's mirrors: downloading 31 MB from {alive[0]}")

    class Fetcher(theirs):  # type: ignore[misc, valid-type]  # torchvision has no types
        mirrors = alive

    with downloading():
        return Path(Fetcher(scratch, download=True).raw_folder)


def _from_package(scratch: Path) -> Path:
    """Download Debian's package with apt-get and unpack it, which needs no root."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise SourceError(f"{program} not found")

    # download; a fresh image has no package lists
    log.info(f"  Debian's package {_PACKAGE}: downloading 31 MB with apt-get")
    limits = [f"-oAcquire::{protocol}::Timeout={download.TIMEOUT}" for protocol in ("http", "https")]
    apt_get = ["apt-get", "-q", *limits, "-oAcquire::Retries=1"]
    try:
        _call([*apt_get, "download", _PACKAGE], scratch)
    except SourceError as reason:
        log.info(f"  Debian's package {_PACKAGE}: {reason}. Downloading package lists first")
        apt_get += [f"-oDir::State::Lists={scratch / 'lists'}", f"-oDir::Cache={scratch / 'cache'}"]
        (scratch / "lists" / "partial").mkdir(parents=True)
        (scratch / "cache").mkdir()
        _call([*apt_get, "update"], scratch)
        _call([*apt_get, "download", _PACKAGE], scratch)

    # unpack
    package = next(scratch.glob(f"{_PACKAGE}_*.deb"), None)
    if package is None:
        raise SourceError("apt-get left no package")
    _call(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked" / _PACKAGE_FOLDER.relative_to("/")


def _call(command: list[str], folder: Path) -> None:
    """Run a program; raise SourceError with its last error message if it fails."""
    environment = os.environ | {"LC_ALL": "C"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if not line.startswith("W:")]
        raise SourceError((errors or [f"{command[0]} ended with status {result.returncode}"])[-1])
