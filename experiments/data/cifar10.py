"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of animals and vehicles, 32 × 32 pixels, ten classes."""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10 as Torchvision
from torchvision.datasets.utils import download_url

from experiments.data.download import answering, downloading
from experiments.data.files import Source, digest_of_files, ensure_files, expand_folder, read_verified
from experiments.data.images import ImageData, check_val_size, hold_out_val
from runner.data import Split

log = logging.getLogger("runner")

_ARCHIVE = Torchvision.filename  # cifar-10-python.tar.gz
_ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_FOLDER = Torchvision.base_folder  # in the archive, and below `root` where torchvision unpacked it
_TRAIN = {  # sha256 of the files in the archive
    "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
    "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
    "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
    "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
    "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
}
_TEST = {"test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"}
_SIZE = 32
_OTHER_IMAGES = """Or train on other images:
  data=image_folder data.root=PATH  a folder, a zip or a tar of yours
  data=fashion_mnist  70,000 grey images of garments
For instance, in minutes on a CPU:
  python -m runner experiment=ddpm_cifar data=fashion_mnist preset=ddpm_small"""


class CIFAR10(ImageData):
    """Train, val and test as uint8 images (N, 3, 32, 32); batches are float32 (B, 3, 32, 32) in [−1, 1].

    `root` is the folder of torchvision's files, downloaded if missing; `val_size` of the 50,000 training images, as
    many of each class, are held out (0: no val split); in training each image is mirrored with probability `flip`.
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    shape = (3, _SIZE, _SIZE)

    def __init__(
        self,
        root: str = "~/.cache/formula-runner",
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_size: int = 1000,
        flip: float = 0.5,
    ):
        super().__init__(batch_size, eval_batch_size, flip)
        check_val_size(val_size, 50_000)
        self.root, self.val_size = expand_folder(root), val_size

    def load(self, seed: int) -> dict[str, Split]:
        """Return the splits, on the CPU; obtain the files first if they are not in `root`."""
        folder = self.root / _FOLDER
        sources = [
            Source(f"{_ARCHIVE} in {self.root}", lambda scratch: _unpack(self.root / _ARCHIVE, scratch)),
            Source("torchvision's address", _download),
        ]
        hints = [
            f"To place it by hand, put {_ARCHIVE} (170 MB) into {self.root}:",
            f"  sha256 {_ARCHIVE_SHA256}, md5 {Torchvision.tgz_md5}",
            _OTHER_IMAGES,
        ]
        ensure_files("CIFAR-10", folder, _TRAIN | _TEST, sources, hints)
        return hold_out_val(_read(folder, _TRAIN), _read(folder, _TEST), self.val_size, seed)

    def digest(self) -> str:
        """Return one sha256 for the six files, which were verified."""
        return digest_of_files(_TRAIN | _TEST)


def _read(folder: Path, digests: dict[str, str]) -> Split:
    """Return the images (N, 3, 32, 32) uint8 and targets (N,) int64 of these files, one after the other."""
    images, targets = [], []
    for name, digest in digests.items():
        # unpickling runs whatever the bytes say, so unpickle these verified bytes and no others
        entry = pickle.loads(read_verified(folder, name, digest), encoding="latin1")
        images.append(torch.from_numpy(entry["data"]).view(-1, 3, _SIZE, _SIZE))
        targets.append(torch.tensor(entry["labels"]))
    return Split(torch.cat(images), torch.cat(targets))


def _unpack(archive: Path, scratch: Path) -> Path:
    """Unpack the six files of the archive, once verified, into `scratch`; no others, whatever their names."""
    content = read_verified(archive.parent, archive.name, _ARCHIVE_SHA256)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for name in _TRAIN | _TEST:
            member = tar.extractfile(f"{_FOLDER}/{name}")
            assert member is not None, "an archive of that digest holds these files"
            (scratch / name).write_bytes(member.read())
    return scratch


def _download(scratch: Path) -> Path:
    """Download the archive from where torchvision does."""
    [url] = answering([Torchvision.url])
    log.info(f"  torchvision's address: downloading 170 MB from {url}")
    with downloading():
        download_url(url, scratch, _ARCHIVE)
    return _unpack(scratch / _ARCHIVE, scratch)
