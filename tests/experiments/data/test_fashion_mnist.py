"""Fashion-MNIST: where it comes from, what a batch of it looks like, and the real files."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torchvision import datasets

from experiments.data import download, fashion_mnist
from experiments.data.fashion_mnist import FashionMNIST
from experiments.data.files import SourceError, read_verified
from experiments.data.images import to_signed
from runner.data import Split, train_batch
from runner.errors import UserError
from tests.experiments.data.conftest import Server, assert_whole, contents, held, pairs, refusal, write

RNG = np.random.default_rng(0)
IMAGES = {name: RNG.integers(0, 256, (N, 28, 28), np.uint8) for name, N in (("train", 40), ("t10k", 10))}
LABELS = {name: RNG.permutation(len(images)).astype(np.uint8) % 10 for name, images in IMAGES.items()}


def idx(array: np.ndarray) -> bytes:
    """Return an idx file of bytes: two zeros, the type, the number of dimensions, the sizes, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


FILES = {f"{name}-images-idx3-ubyte": idx(images) for name, images in IMAGES.items()}
FILES |= {f"{name}-labels-idx1-ubyte": idx(labels) for name, labels in LABELS.items()}
ZIPPED = {f"{name}.gz": gzip.compress(content) for name, content in FILES.items()}
LAST = "t10k-labels-idx1-ubyte"
PACKAGE = "dataset-fashion-mnist"


@pytest.fixture(autouse=True)
def nowhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files instead of the real ones, and no source has them: a test opens the one that it means."""
    if request.node.get_closest_marker("slow"):
        return
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in ZIPPED.items()]
    monkeypatch.setattr(fashion_mnist, "_DIGESTS", digests)
    monkeypatch.setattr(fashion_mnist, "_PACKAGE_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "no_programs"))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Where the files have to lie under the root."""
    return tmp_path / "root" / "FashionMNIST" / "raw"


@pytest.fixture
def mirror(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """torchvision's only mirror, which has the files."""
    write(server.folder, ZIPPED)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [server.url])
    return server


def load(raw: Path, seed: int = 0) -> dict[str, Split]:
    return FashionMNIST(str(raw.parents[1]), val_size=10).load(seed)


def assert_loads(raw: Path) -> None:
    """What loads is what the small files hold."""
    train, test = (pairs(IMAGES[name], LABELS[name]) for name in IMAGES)
    assert_whole(lambda seed: load(raw, seed), train, test, raw, FILES)
    assert np.array_equal(load(raw)["test"].inputs.numpy(), IMAGES["t10k"])


def test_files_in_root_are_read_without_a_message(raw, said):
    wrong = (torch.zeros(40, 28, 28, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    for name in ("training.pt", "test.pt"):  # by an old torchvision, which prefers them
        torch.save(wrong, write(raw.parent / "processed", {}) / name)
    assert_loads(write(raw, FILES))
    assert said == []


def test_damaged_file_in_root_is_named_and_replaced(raw, tmp_path, said):
    write(raw, FILES | {LAST: FILES[LAST][:-1]})
    write(tmp_path / "debian", ZIPPED)
    assert_loads(raw)
    assert f"{LAST} is damaged" in said[0]


def test_mirror_that_answers_is_used(raw, mirror, said, capfd, monkeypatch):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{mirror.url}moved/", mirror.url])
    socket.setdefaulttimeout(123)
    try:
        assert_loads(raw)
        assert socket.getdefaulttimeout() == 123  # put back
    finally:
        socket.setdefaulttimeout(None)
    assert {f"GET /{name}" for name in ZIPPED} <= set(mirror.requests)
    assert sum("/moved/" in request for request in mirror.requests) == 1  # not once for each file
    assert any("downloading" in line and "127.0.0.1" in line for line in said)
    assert capfd.readouterr().err == ""  # there is no terminal here, so there is no bar


def test_mirror_that_refuses_is_one_line(raw, mirror, said, monkeypatch):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{mirror.url}moved/"])
    refusal(lambda: load(raw), "torchvision's mirrors: ", "HTTP Error 404")
    assert len([line for line in said if line.startswith("  torchvision's mirrors")]) == 1
    assert len(mirror.requests) == 1  # the other three files are not asked for


def test_mirror_that_is_silent_or_falls_silent_is_given_up(raw, mirror, monkeypatch):
    """torchvision itself would wait for ever."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    mirror.go.clear()
    with pytest.raises(UserError, match=r"mirrors: .*(no answer within 0\.2 seconds|timed out)"):
        load(raw)
    monkeypatch.setattr(download, "_probe", lambda _: None)  # as if it had answered
    refusal(lambda: load(raw), "mirrors: ", "timed out")
    mirror.go.set()


def test_name_lookup_that_hangs_is_given_up(monkeypatch):
    """A lookup has no time limit of its own."""
    end = threading.Event()
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: end.wait(60) and io.BytesIO())
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    assert download._probe("http://nowhere.invalid/") == "no answer within 0.05 seconds"
    end.set()


def test_mirror_of_altered_files(raw, mirror, monkeypatch):
    packed = f"{LAST}.gz"
    write(mirror.folder, {packed: ZIPPED[packed][:-1]})
    refusal(lambda: load(raw), "mirrors: ", "corrupted")  # by torchvision's own digest
    assert contents(raw) == {}
    write(mirror.folder, ZIPPED)
    monkeypatch.setitem(fashion_mnist._DIGESTS, LAST, "0" * 64)
    refusal(lambda: load(raw), f"mirrors: {LAST} is damaged")  # and by ours


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Programs named apt-get and dpkg-deb, made of these lines; both write what they were called with."""
    folder = f'"$3{tmp_path}/debian"'
    unpack = f"/bin/mkdir -p {folder}; /bin/cp {write(tmp_path / 'package', ZIPPED)}/* {folder}"

    def make(apt_get: str, dpkg_deb: str = unpack) -> Path:
        for name, body in {"apt-get": apt_get, "dpkg-deb": dpkg_deb}.items():
            script = f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n{body}\n'
            (write(tmp_path / "programs", {name: script.encode()}) / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "programs"))
        return tmp_path / "calls"

    return make


GIVE = 'for last; do :; done; echo package > "${last}_1.0_all.deb"'
OWN = 'case "$*" in *State::Lists=*download*) ;; *update) exit 0;; *) echo "E: no lists" >&2; exit 100;; esac'


@pytest.mark.parametrize(
    ("apt_get", "commands"),
    [(GIVE, ["download"]), (f"{OWN}\n{GIVE}", ["download", "update", "download"])],
)
def test_debian_package(raw, debian, said, apt_get, commands):
    """Where there are no lists of packages, they are downloaded into the scratch folder, which needs no root."""
    calls = debian(apt_get)
    assert_loads(raw)
    *apt, dpkg = calls.read_text().splitlines()
    assert [call.removesuffix(f" {PACKAGE}").split()[-1] for call in apt] == commands
    assert [str(raw) in call for call in apt] == [False, True, True][: len(apt)]
    assert dpkg.startswith("dpkg-deb -x ") and f"{PACKAGE}_1.0_all.deb" in dpkg
    assert any("apt-get" in line for line in said)


def test_debian_package_that_fails(raw, debian):
    def fails(reason: str, *programs: str) -> None:
        debian(*programs)
        refusal(lambda: load(raw), f"Debian's package {PACKAGE}: {reason}")

    fails("E: Unable to locate", 'printf "Reading lists\\nE: Unable to locate\\nW: old\\n" >&2; exit 100')
    fails("apt-get ended with status 7", "exit 7")
    fails("apt-get left no package", "exit 0")
    fails("dpkg-deb: error: no package", GIVE, "echo 'dpkg-deb: error: no package' >&2; exit 2")
    fails("train-images-idx3-ubyte not found", GIVE, "exit 0")


def test_no_source_at_all(raw):
    mirrors = "torchvision's mirrors: http://127.0.0.1:1/train-images-idx3-ubyte.gz cannot be reached: "
    others = ("/debian, where Debian's package puts them: ", f"Debian's package {PACKAGE}: apt-get not found")
    digests = [f"{name}  {digest}" for name, digest in fashion_mnist._DIGESTS.items()]
    error = refusal(lambda: load(raw), f"{raw}: ", mirrors, *others, f"these files into {raw}", *digests)
    assert str(error).startswith("could not obtain Fashion-MNIST")
    assert contents(raw) == {}


def test_as_images_pads_the_same_splits_with_black_and_scales(raw):
    data = FashionMNIST(str(write(raw, FILES).parents[1]), batch_size=16, val_size=10, shift=2, flip=0.5)
    before = data.load(0)
    batch = train_batch(data, before["train"], seed=0, step=3)
    assert batch.inputs.shape == (16, 28, 28) and batch.inputs.dtype == torch.float32
    data.as_images()
    splits = data.load(0)
    for name, rows in before.items():
        assert torch.equal(splits[name].inputs, pad(rows.inputs, (2, 2, 2, 2))[:, None])
        assert torch.equal(splits[name].targets, rows.targets)
    assert torch.equal(data.transform(splits["test"].inputs, None), to_signed(splits["test"].inputs))
    batch = train_batch(data, splits["train"], seed=0, step=3)
    assert batch.inputs.shape == (16, 1, 32, 32) and batch.inputs.min() == -1


@pytest.mark.slow
def test_real_files_load_as_they_are(tmp_path):
    """Where this machine has them already, in the user's cache or from Debian's package."""
    raw = tmp_path / "FashionMNIST" / "raw"
    places = [Path("~/.cache/formula-runner/FashionMNIST/raw").expanduser(), fashion_mnist._PACKAGE_FOLDER]
    for place in places:
        with contextlib.suppress(SourceError):
            write(
                raw, {name: read_verified(place, name, sha) for name, sha in fashion_mnist._DIGESTS.items()}
            )
    if not raw.exists():
        pytest.skip(f"the real files are in none of {places}")
    splits = FashionMNIST(str(tmp_path)).load(0)
    counts = {name: torch.bincount(split.targets).tolist() for name, split in splits.items()}
    assert counts == {"train": [5_500] * 10, "val": [500] * 10, "test": [1_000] * 10}

    # the bytes after the header, with the mean and deviation of the standardisation
    kinds = (("images-idx3", 16), ("labels-idx1", 8))
    images, labels = (
        np.frombuffer((raw / f"train-{kind}-ubyte").read_bytes(), np.uint8, offset=header)
        for kind, header in kinds
    )
    assert held(splits["train"], splits["val"]) == pairs(images.reshape(-1, 28, 28), labels)
    share, white = np.bincount(images, minlength=256) / images.size, np.arange(256) / 255
    mean = share @ white
    assert abs(mean - fashion_mnist._MEAN) < 5e-5
    assert abs(np.sqrt(share @ (white - mean) ** 2) - fashion_mnist._STD) < 5e-5

    # images, labels and names as torchvision's, and the first as published
    test = datasets.FashionMNIST(tmp_path, train=False)
    assert torch.equal(splits["test"].inputs, test.data) and torch.equal(splits["test"].targets, test.targets)
    assert test.targets[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert tuple(test.classes) == FashionMNIST.class_names
