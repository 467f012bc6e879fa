"""CIFAR-10: where it comes from, that nothing unverified is unpickled, how it is split, what a batch looks like."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchvision import datasets

from experiments.data import cifar10
from experiments.data.cifar10 import CIFAR10
from runner.data import Split, train_batch
from runner.errors import UserError
from runner.streams import BatchRandom

REPO = Path(__file__).resolve().parents[3]
RNG = np.random.default_rng(0)
BATCHES = {  # six small files like the real ones: rows of 3072 bytes, red, green, blue, and their labels
    name: (RNG.integers(0, 256, (20, 3072), dtype=np.uint8), RNG.permutation(20) % 10)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
}
FILES = {
    name: pickle.dumps({"data": rows, "labels": labels.tolist()}, protocol=2)
    for name, (rows, labels) in BATCHES.items()
}
FILES["batches.meta"] = pickle.dumps({"label_names": list(CIFAR10.class_names)}, protocol=2)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def packed(files: dict[str, bytes]) -> bytes:
    """The files as the archive has them, with one more that has no business there."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, content in {**files, "../../evil": b"evil"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


ARCHIVE = packed(FILES)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files instead of the real ones, which no server has."""
    monkeypatch.setattr(cifar10, "TRAIN", {name: sha256(FILES[name]) for name in cifar10.TRAIN})
    monkeypatch.setattr(cifar10, "TEST", {name: sha256(FILES[name]) for name in cifar10.TEST})
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", sha256(ARCHIVE))
    monkeypatch.setattr(cifar10.Torchvision, "url", "http://127.0.0.1:1/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "*")


def write(folder: Path, content: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root where torchvision has unpacked the archive."""
    write(tmp_path / "root" / "cifar-10-batches-py", FILES)
    return tmp_path / "root"


def load(root: Path, seed: int = 0, val_size: int = 10) -> dict[str, Split]:
    return CIFAR10(str(root), val_size=val_size).load(seed)


def rows(split: Split) -> list[bytes]:
    """Each image with its label, in an order that depends on nothing else."""
    assert split.targets is not None
    pairs = zip(split.inputs.numpy(), split.targets.tolist(), strict=True)
    return sorted(image.tobytes() + bytes([label]) for image, label in pairs)


def rows_of(names: list[str]) -> list[bytes]:
    pairs = (pair for name in names for pair in zip(*BATCHES[name], strict=True))
    return sorted(row.tobytes() + bytes([label]) for row, label in pairs)


def assert_whole(root: Path) -> None:
    """What loads is what the small files hold, and the root holds nothing half done."""
    splits = load(root)
    assert {split.inputs.dtype for split in splits.values()} == {torch.uint8}
    assert {split.inputs.shape[1:] for split in splits.values()} == {(3, 32, 32)}
    assert sorted(rows(splits["train"]) + rows(splits["val"])) == rows_of(list(cifar10.TRAIN))
    assert rows(splits["test"]) == rows_of(["test_batch"])
    assert {path.name for path in (root / "cifar-10-batches-py").iterdir()} - {".lock"} <= set(FILES)
    assert not list(root.parent.rglob("evil"))


# where the files come from


def test_what_torchvision_unpacked_is_read_without_a_word(root: Path, said: list[str]) -> None:
    assert_whole(root)
    assert said == []


def test_archive_in_root_is_unpacked_once(tmp_path: Path, said: list[str]) -> None:
    root = write(tmp_path / "root", {"cifar-10-python.tar.gz": ARCHIVE})
    assert_whole(root)
    assert "cifar-10-python.tar.gz in" in said[-1] and "verified" in said[-1]
    (root / "cifar-10-python.tar.gz").unlink()
    assert_whole(root)


def test_archive_of_other_content_is_not_opened(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"cifar-10-python.tar.gz": ARCHIVE[:-1]})
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz in .*: it is damaged .*wrong sha256"):
        load(root)


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.path,)


def test_nothing_unverified_is_unpickled(root: Path, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap)
    (tmp_path / "sprung").unlink()  # the trap works
    write(root / "cifar-10-batches-py", {"data_batch_3": trap})
    with pytest.raises(UserError, match="data_batch_3 is damaged"):
        load(root)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """torchvision's address is a server of this process, which serves this folder."""

    class Quiet(SimpleHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Say nothing where the client hangs up as soon as it has what it wanted."""

    folder = write(tmp_path / "host", {"cifar-10-python.tar.gz": ARCHIVE})
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
    monkeypatch.setattr(cifar10.Torchvision, "url", url)
    yield folder
    server.shutdown()
    server.server_close()


def test_download(tmp_path: Path, host: Path, said: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert_whole(tmp_path / "root")
    assert any("fetching 170 MB" in line for line in said)
    assert capfd.readouterr().err == ""  # there is no terminal here, so there is no bar


def test_download_of_other_content_is_refused(tmp_path: Path, host: Path) -> None:
    write(host, {"cifar-10-python.tar.gz": packed({"data_batch_1": b"other"})})
    with pytest.raises(UserError, match="torchvision's address: it is damaged"):
        load(tmp_path / "root")
    assert [path.name for path in (tmp_path / "root" / "cifar-10-batches-py").iterdir()] == [".lock"]


def test_no_source_at_all_says_what_to_type_instead(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path / "root")
    message = str(caught.value)
    for part in (
        "CIFAR-10 cannot be had",
        "cifar-10-python.tar.gz in ",
        "torchvision's address: http://127.0.0.1:1/cifar-10-python.tar.gz cannot be had: ",
        f"put cifar-10-python.tar.gz (170 MB) into {tmp_path / 'root'}",
        sha256(ARCHIVE),
        "c58f30108f718f92721af3b95e74349a",
        "data=image_folder data.root=PATH",
        "data=fashion_mnist",
    ):
        assert part in message


# the splits


def test_images_and_labels_are_what_torchvision_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, md5(FILES[name])] for name in cifar10.TRAIN])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(FILES["test_batch"])]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(FILES["batches.meta"])}
    )
    peer = datasets.CIFAR10(str(root), train=True)
    train = load(root, val_size=0)["train"]
    assert train.targets is not None and train.targets.tolist() == peer.targets
    assert np.array_equal(train.inputs.permute(0, 2, 3, 1).numpy(), peer.data)
    assert tuple(peer.classes) == CIFAR10.class_names


def test_val_has_as_many_of_each_class_and_depends_on_the_seed_alone(root: Path) -> None:
    one, again, other = load(root, seed=1), load(root, seed=1), load(root, seed=2)
    assert one["val"].targets is not None
    assert torch.bincount(one["val"].targets).tolist() == [1] * 10
    assert torch.equal(one["val"].inputs, again["val"].inputs)
    assert not torch.equal(one["val"].inputs, other["val"].inputs)
    assert torch.equal(one["test"].inputs, other["test"].inputs)


def test_without_val_all_images_are_for_training(root: Path) -> None:
    splits = load(root, val_size=0)
    assert {name: len(split) for name, split in splits.items()} == {"train": 100, "test": 20}


# a batch


def draws(batch_size: int, rows: slice = slice(None), seed: int = 5) -> BatchRandom:
    return BatchRandom(seed, torch.device("cpu"), batch_size, rows)


def some_images(number: int) -> torch.Tensor:
    return torch.randint(256, (number, 3, 32, 32), generator=torch.manual_seed(0)).to(torch.uint8)


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    images = torch.arange(256, dtype=torch.uint8).expand(3, 256).reshape(1, 3, 16, 16)
    found = CIFAR10().transform(images, None)
    assert found.dtype == torch.float32
    wanted = np.arange(256, dtype=np.float64) / 127.5 - 1
    assert np.allclose(found.double().numpy().reshape(3, 256), wanted, rtol=0, atol=1e-7)
    assert found.min() == -1 and found.max() == 1
    assert torch.equal(images, torch.arange(256, dtype=torch.uint8).expand(3, 256).reshape(1, 3, 16, 16))


def test_flip_mirrors_its_share_in_training_alone() -> None:
    images, data = some_images(400), CIFAR10(flip=0.25)
    as_they_were = data.transform(images, None)
    found = data.transform(images, draws(400))
    same = (found == as_they_were).flatten(1).all(1)
    mirrored = (found == as_they_were.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert abs(int(mirrored.sum()) - 100) < 4.5 * 8.7  # binomial(400, 1/4)
    assert torch.equal(CIFAR10(flip=0.0).transform(images, draws(400)), as_they_were)


def test_processes_see_what_one_would() -> None:
    data, images = CIFAR10(), some_images(8)
    whole = data.transform(images, draws(8))
    parts = [data.transform(images[part], draws(8, part)) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.transform(images, draws(8, seed=6)), whole)


def test_batch_of_the_loop(root: Path) -> None:
    data = CIFAR10(str(root), batch_size=16, val_size=10)
    data.as_images()  # which it gives anyway
    batch = train_batch(data, data.load(0)["train"], seed=0, step=3)
    assert batch.inputs.shape == (16, 3, 32, 32) and batch.inputs.dtype == torch.float32
    assert batch.targets is not None and batch.targets.dtype == torch.int64


# arguments


@pytest.mark.parametrize(
    "argument",
    [
        {"batch_size": 0},
        {"val_size": -10},
        {"val_size": 5001},
        {"val_size": 50_000},
        {"flip": -0.1},
        {"flip": 1.1},
        {"flip": float("nan")},
        {"root": ""},
    ],
    ids=str,
)
def test_argument_out_of_range_is_named(argument: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))} "):
        CIFAR10(**argument)  # type: ignore[arg-type]


def test_yaml_gives_every_argument_its_default() -> None:
    node = OmegaConf.to_container(OmegaConf.load(REPO / "conf" / "data" / "cifar10.yaml"))
    assert isinstance(node, dict)
    assert node.pop("_target_") == "experiments.data.cifar10.CIFAR10"
    parameters = inspect.signature(CIFAR10).parameters
    assert node == {name: parameter.default for name, parameter in parameters.items()}


def test_digest_is_of_the_six_files(monkeypatch: pytest.MonkeyPatch) -> None:
    before = CIFAR10().digest()
    assert len(before) == 64 and CIFAR10(val_size=10).digest() == before
    monkeypatch.setitem(cifar10.TEST, "test_batch", "0" * 64)
    assert CIFAR10().digest() != before
