"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of garments, 28 × 28 pixels, ten classes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import datasets

from experiments.data import download
from experiments.data.download import fetching, probe
from experiments.data.files import Source, Unavailable, digest_of_files, ensure_files, home_of
from experiments.data.images import ImageData, held_out, signed
from runner.data import Split
from runner.streams import BatchRandom

log = logging.getLogger("runner")

DIGESTS = {  # sha256 of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PACKAGE = "dataset-fashion-mnist"  # Debian's
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where it puts the files
MEAN, STD = 0.2860, 0.3530  # of the 60,000 images' pixels, as shares of white
SIZE = 28
PADDING = 2  # black pixels on each side of an image that a network is to make: 32 halves often


class FashionMNIST(ImageData):
    """Train, val and test as uint8 images (N, 28, 28); batches are standardised rows (B, 28, 28).

    After `as_images`, for networks that make images: uint8 (N, 1, 32, 32), black round the edge, and batches
    (B, 1, 32, 32) in [−1, 1].

    `root` is the folder that holds the files, or shall; `val_size` images are kept from training, as many of
    each class (0: there is no val split); in training each image is shifted by up to `shift` pixels both ways
    and, with probability `flip`, mirrored.
    """

    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )

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
        if val_size % 10 or not 0 <= val_size < 60_000:
            raise ValueError(f"val_size must be a multiple of 10 in [0, 59990], not {val_size}")
        if not 0 <= shift < SIZE:
            raise ValueError(f"shift must lie in [0, {SIZE}), not {shift}")
        self.root = home_of(root)
        self.val_size, self.shift = val_size, shift
        self.form: Literal["rows", "images"] = "rows"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, SIZE + 2 * PADDING, SIZE + 2 * PADDING

    def as_images(self) -> None:
        """Give images with a channel, in [−1, 1], 32 × 32 pixels, from now on."""
        self.form = "images"

    def load(self, seed: int) -> dict[str, Split]:
        """The splits, on the CPU; the files are fetched first where they are not in `root`."""
        sources = [
            Source(f"{PACKAGE_FOLDER}, where Debian's package puts them", lambda _: PACKAGE_FOLDER),
            Source("torchvision's mirrors", from_mirrors),
            Source(f"Debian's package {PACKAGE}", from_package),
        ]
        ensure_files("Fashion-MNIST", self.root / "FashionMNIST" / "raw", DIGESTS, sources)
        train, test = (Reader(self.root, train=train) for train in (True, False))
        rest, val = held_out(train.targets, self.val_size // len(self.class_names), seed)
        splits = {"train": Split(self.stored(train.data[rest]), train.targets[rest])}
        if self.val_size:
            splits["val"] = Split(self.stored(train.data[val]), train.targets[val])
        return splits | {"test": Split(self.stored(test.data), test.targets)}

    def stored(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) as a split holds them: as they are, or (N, 1, 32, 32)."""
        return images if self.form == "rows" else pad(images, [PADDING] * 4)[:, None]

    def digest(self) -> str:
        """One sha256 for the four files, which were verified."""
        return digest_of_files(DIGESTS)

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        """uint8 → float32, standardised or (images) in [−1, 1]; in training shifted and mirrored first."""
        if draws is not None and (self.shift or self.flip):
            inputs = self.augment(inputs, draws)
        return signed(inputs) if self.form == "images" else (inputs.float() - 255 * MEAN) / (255 * STD)

    def augment(self, images: Tensor, draws: BatchRandom) -> Tensor:
        """Each image shifted, black coming in at the edge, and mirrored, by one look-up of its pixels."""
        H, W = images.shape[-2:]  # one channel, with an axis of its own or without
        s = self.shift
        offset = draws.integers(0, 2 * s + 1, 2)  # (B, 2): down and right, in the padded image
        rows = offset[:, :1] + torch.arange(H, device=images.device)  # (B, H)
        columns = offset[:, 1:] + torch.arange(W, device=images.device)  # (B, W)
        if self.flip:
            columns = torch.where(draws.uniform(1) < self.flip, columns.flip(1), columns)
        index = rows[:, :, None] * (W + 2 * s) + columns[:, None, :]  # (B, H, W)
        return pad(images, (s, s, s, s)).flatten(1).gather(1, index.flatten(1)).view(images.shape)


class Reader(datasets.FashionMNIST):
    """torchvision's data set, of the four verified files alone.

    torchvision prefers a `processed/*.pt` that an old version of it left, whatever is in there; a class of
    another name does not see it.
    """

    @property
    def raw_folder(self) -> str:
        return str(Path(self.root) / "FashionMNIST" / "raw")


def from_mirrors(scratch: Path) -> Path:
    """Download with torchvision, from those of its mirrors that answer."""
    answers = {mirror: probe(mirror + Reader.resources[0][0]) for mirror in datasets.FashionMNIST.mirrors}
    alive = [mirror for mirror, problem in answers.items() if problem is None]
    if not alive:
        raise Unavailable("; ".join(f"{mirror} {problem}" for mirror, problem in answers.items()))
    log.info(f"  torchvision's mirrors: fetching 31 MB from {alive[0]}")

    class Fetcher(Reader):
        mirrors = alive

    with fetching():
        Fetcher(scratch, download=True)
    return scratch / "FashionMNIST" / "raw"


def from_package(scratch: Path) -> Path:
    """Fetch Debian's package with apt-get and unpack it, which needs no root."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Unavailable(f"there is no {program} here")
    log.info(f"  Debian's package {PACKAGE}: fetching 31 MB with apt-get")
    try:
        apt_get(["download", PACKAGE], scratch)
    except Unavailable as reason:  # a fresh image has no package lists
        log.info(f"  Debian's package {PACKAGE}: {reason}. Fetching package lists first")
        download_with_own_lists(scratch)
    package = next(scratch.glob(f"{PACKAGE}_*.deb"), None)
    if package is None:
        raise Unavailable("apt-get left no package")
    call(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked" / PACKAGE_FOLDER.relative_to("/")


def download_with_own_lists(scratch: Path) -> None:
    """What root would do by `apt-get update`, in a folder of our own."""
    own = [f"-oDir::State::Lists={scratch / 'lists'}", f"-oDir::Cache={scratch / 'cache'}"]
    (scratch / "lists" / "partial").mkdir(parents=True)
    (scratch / "cache").mkdir()
    apt_get([*own, "update"], scratch)
    apt_get([*own, "download", PACKAGE], scratch)


def apt_get(arguments: list[str], folder: Path) -> None:
    """Run apt-get in `folder`, patient for seconds only."""
    limits = [f"-oAcquire::{protocol}::Timeout={download.PATIENCE}" for protocol in ("http", "https")]
    call(["apt-get", "-q", *limits, "-oAcquire::Retries=1", *arguments], folder)


def call(command: list[str], folder: Path) -> None:
    """Run a program; Unavailable with its last word where it fails."""
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("W:")]
        raise Unavailable((errors or [f"{command[0]} ended with status {done.returncode}"])[-1])
