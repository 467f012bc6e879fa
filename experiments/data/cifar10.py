"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of animals and vehicles, 32 × 32 pixels, ten classes."""

from __future__ import annotations

import hashlib
import logging
import pickle
import tarfile
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10 as Torchvision
from torchvision.datasets.utils import download_url

from experiments.data.download import fetching, probe
from experiments.data.files import (
    Absent,
    Source,
    Unavailable,
    digest_of_files,
    ensure_files,
    home_of,
    read_verified,
)
from experiments.data.images import ImageData, held_out
from runner.data import Split

log = logging.getLogger("runner")

ARCHIVE = Torchvision.filename  # cifar-10-python.tar.gz
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER = Torchvision.base_folder  # in the archive, and below `root` where torchvision unpacked it
TRAIN = {  # sha256 of the files in the archive
    "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
    "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
    "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
    "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
    "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
}
TEST = {"test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"}
SIZE = 32


class CIFAR10(ImageData):
    """Train, val and test as uint8 images (N, 3, 32, 32); batches are float32 (B, 3, 32, 32) in [−1, 1].

    `root` is the folder that holds torchvision's files, or shall; `val_size` images are kept from the 50,000
    of training, as many of each class (0: there is no val split); in training each image is mirrored with
    probability `flip`.
    """

    class_names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def __init__(
        self,
        root: str = "~/.cache/formula-runner",
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_size: int = 1000,
        flip: float = 0.5,
    ):
        super().__init__(batch_size, eval_batch_size, flip)
        if val_size % 10 or not 0 <= val_size < 50_000:
            raise ValueError(f"val_size must be a multiple of 10 in [0, 49990], not {val_size}")
        self.root, self.val_size = home_of(root), val_size

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, SIZE, SIZE

    def load(self, seed: int) -> dict[str, Split]:
        """The splits, on the CPU; the files are fetched first where they are not in `root`."""
        folder = self.root / FOLDER
        sources = [
            Source(f"{ARCHIVE} in {self.root}", lambda scratch: unpacked(self.root / ARCHIVE, scratch)),
            Source("torchvision's address", from_host),
        ]
        ensure_files("CIFAR-10", folder, TRAIN | TEST, sources, ways_out(self.root))
        images, targets = read(folder, TRAIN)
        rest, val = held_out(targets, self.val_size // len(self.class_names), seed)
        splits = {"train": Split(images[rest], targets[rest])}
        if self.val_size:
            splits["val"] = Split(images[val], targets[val])
        return splits | {"test": Split(*read(folder, TEST))}

    def digest(self) -> str:
        """One sha256 for the six files, which were verified."""
        return digest_of_files(TRAIN | TEST)


def read(folder: Path, digests: dict[str, str]) -> tuple[Tensor, Tensor]:
    """The images (N, 3, 32, 32) uint8 and targets (N,) int64 of these files, one after the other."""
    images, targets = [], []
    for name, digest in digests.items():
        # unpickling runs whatever the bytes say, so it is done to these very bytes and no others
        entry = pickle.loads(read_verified(folder, name, digest), encoding="latin1")
        images.append(torch.from_numpy(entry["data"]).view(-1, 3, SIZE, SIZE))
        targets.append(torch.tensor(entry["labels"]))
    return torch.cat(images), torch.cat(targets)


def unpacked(archive: Path, scratch: Path) -> Path:
    """The files of a verified archive, unpacked into `scratch`; no others, whatever their names."""
    if not archive.is_file():
        raise Absent("it is not there")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != ARCHIVE_SHA256:
        raise Unavailable(f"it is damaged ({archive.stat().st_size:,} bytes, wrong sha256)")
    with tarfile.open(archive) as tar:
        for name in TRAIN | TEST:
            member = tar.extractfile(f"{FOLDER}/{name}")
            assert member is not None, "an archive of that digest holds these files"
            (scratch / name).write_bytes(member.read())
    return scratch


def from_host(scratch: Path) -> Path:
    """Download the archive from where torchvision does."""
    problem = probe(Torchvision.url)
    if problem is not None:
        raise Unavailable(f"{Torchvision.url} {problem}")
    log.info(f"  torchvision's address: fetching 170 MB from {Torchvision.url}")
    with fetching():
        download_url(Torchvision.url, scratch, ARCHIVE)
    return unpacked(scratch / ARCHIVE, scratch)


def ways_out(root: Path) -> list[str]:
    """What to do where the files cannot be had."""
    return [
        f"To place it by hand, put {ARCHIVE} (170 MB) into {root}:",
        f"  sha256 {ARCHIVE_SHA256}, md5 {Torchvision.tgz_md5}",
        "Or learn from other images:",
        "  data=image_folder data.root=PATH  a folder, a zip or a tar of yours",
        "  data=fashion_mnist  70,000 grey images of garments",
        "For instance, in minutes of a CPU:",
        "  python -m runner experiment=ddpm_cifar data=fashion_mnist preset=ddpm_small",
    ]
