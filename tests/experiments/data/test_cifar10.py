"""CIFAR-10: where it comes from, that nothing unverified is unpickled, what a batch looks like."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from experiments.data import cifar10
from experiments.data.cifar10 import CIFAR10
from experiments.data.files import SourceError
from runner.data import Split, train_batch
from tests.experiments.data.conftest import Server, assert_whole, contents, pairs, refusal, tar_of, write

RNG = np.random.default_rng(0)
BATCHES = {  # six small files like the real ones: rows of 3072 bytes, red, green, blue, and their labels
    name: (RNG.integers(0, 256, (20, 3072), dtype=np.uint8), RNG.permutation(20) % 10)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
}
FILES = {
    name: pickle.dumps({"data": rows, "labels": labels.tolist()}, protocol=2)
    for name, (rows, labels) in BATCHES.items()
}
NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
FILES["batches.meta"] = pickle.dumps({"label_names": NAMES.split()}, protocol=2)
ARCHIVE_NAME = "cifar-10-python.tar.gz"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


MORE = FILES | {"../../evil": b"evil"}  # which has no business there
ARCHIVE = tar_of(((f"cifar-10-batches-py/{name}", content) for name, content in MORE.items()), "gz")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files instead of the real ones, which no server has."""
    for names in ("_TRAIN", "_TEST"):
        monkeypatch.setattr(cifar10, names, {name: sha256(FILES[name]) for name in getattr(cifar10, names)})
    monkeypatch.setattr(cifar10, "_ARCHIVE_SHA256", sha256(ARCHIVE))
    monkeypatch.setattr(cifar10.Torchvision, "url", f"http://127.0.0.1:1/{ARCHIVE_NAME}")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root where torchvision has unpacked the archive."""
    write(tmp_path / "root" / "cifar-10-batches-py", FILES)
    return tmp_path / "root"


@pytest.fixture
def host(server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that torchvision's address serves."""
    monkeypatch.setattr(cifar10.Torchvision, "url", server.url + ARCHIVE_NAME)
    return write(server.folder, {ARCHIVE_NAME: ARCHIVE})


def load(root: Path, seed: int = 0) -> dict[str, Split]:
    return CIFAR10(str(root), val_size=10).load(seed)


def assert_loads(root: Path) -> None:
    """What loads is what the small files hold, and nothing of the archive is anywhere else."""
    images, labels = (np.concatenate(parts) for parts in zip(*BATCHES.values(), strict=True))
    train, test = pairs(images[:100], labels[:100]), pairs(images[100:], labels[100:])
    assert_whole(lambda seed: load(root, seed), train, test, root / "cifar-10-batches-py", FILES)
    assert not list(root.parent.rglob("evil"))


def test_archive_in_root_is_unpacked_once(tmp_path, said):
    root = write(tmp_path / "root", {ARCHIVE_NAME: ARCHIVE})
    load(root)
    assert f"{ARCHIVE_NAME} in" in said[-1] and "verified" in said[-1]
    (root / ARCHIVE_NAME).unlink()
    said.clear()
    assert_loads(root)
    assert said == []


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.path,)


def test_nothing_unverified_is_unpickled(root, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap)
    (tmp_path / "sprung").unlink()  # the trap works
    write(root / "cifar-10-batches-py", {"data_batch_3": trap})
    refusal(lambda: load(root), "data_batch_3 is damaged")
    with pytest.raises(SourceError):  # changed since it was verified
        cifar10._read(root / "cifar-10-batches-py", cifar10._TRAIN)
    assert not (tmp_path / "sprung").exists()


def test_a_download_is_announced_with_its_size_and_verified(tmp_path, host, said, capfd):
    assert_loads(tmp_path / "root")
    assert any("170 MB" in line for line in said)
    assert capfd.readouterr().err == ""  # there is no terminal here, so there is no bar


def test_archive_of_other_content_is_not_opened(tmp_path, host):
    root = write(tmp_path / "root", {ARCHIVE_NAME: ARCHIVE[:-1]})
    write(host, {ARCHIVE_NAME: tar_of([("cifar-10-batches-py/data_batch_1", b"other")], "gz")})
    sources = (f"{ARCHIVE_NAME} in {root}", "torchvision's address")
    refusal(lambda: load(root), *(f"{source}: {ARCHIVE_NAME} is damaged (" for source in sources))
    assert contents(root / "cifar-10-batches-py") == {}


def test_no_source_at_all_says_what_to_type_instead(tmp_path):
    address = f"torchvision's address: http://127.0.0.1:1/{ARCHIVE_NAME} cannot be reached: "
    by_hand = f"put {ARCHIVE_NAME} (170 MB) into {tmp_path}"
    digests = (sha256(ARCHIVE), "c58f30108f718f92721af3b95e74349a")
    others = ("data=image_folder data.root=PATH", "data=fashion_mnist")
    error = refusal(lambda: load(tmp_path), address, by_hand, *digests, *others, f"{ARCHIVE_NAME} in ")
    assert str(error).startswith("could not obtain CIFAR-10")


def test_train_is_what_torchvision_reads_and_a_batch_is_of_the_loop(root, monkeypatch):
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)  # by the real files' md5
    peer = datasets.CIFAR10(str(root), train=True)
    data = CIFAR10(str(root), batch_size=16, val_size=0)
    data.as_images()  # which it gives anyway
    train = data.load(0)["train"]
    assert train.targets.tolist() == peer.targets and tuple(peer.classes) == CIFAR10.class_names
    assert np.array_equal(train.inputs.permute(0, 2, 3, 1).numpy(), peer.data)
    batch = train_batch(data, train, seed=0, step=3)
    assert batch.inputs.shape == (16, 3, 32, 32) and batch.inputs.dtype == torch.float32
    assert batch.targets.dtype == torch.int64
