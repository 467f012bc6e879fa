"""Fashion-MNIST: where it comes from, how it is split, what a batch of it looks like, and the real files."""

from __future__ import annotations

import functools
import gzip
import hashlib
import inspect
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchvision import datasets

from experiments.data import download, fashion_mnist
from experiments.data.fashion_mnist import FashionMNIST
from experiments.data.files import faults, read_verified
from experiments.data.images import stratified
from runner.data import train_batch
from runner.errors import UserError
from runner.streams import BatchRandom

REPO = Path(__file__).resolve().parents[3]
RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8),
    "t10k": RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8),
}
LABELS = {name: RNG.permutation(len(images)).astype(np.uint8) % 10 for name, images in IMAGES.items()}


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an idx file: two zeros, the type, the number of dimensions, the sizes, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


FILES = {f"{name}-images-idx3-ubyte": idx(images) for name, images in IMAGES.items()} | {
    f"{name}-labels-idx1-ubyte": idx(labels) for name, labels in LABELS.items()
}
ZIPPED = {f"{name}.gz": gzip.compress(content) for name, content in FILES.items()}


@pytest.fixture(autouse=True)
def nowhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files instead of the real ones, and no source has them: a test opens the one that it means."""
    if "real" in request.fixturenames:
        return
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in ZIPPED.items()]
    monkeypatch.setattr(fashion_mnist, "DIGESTS", digests)
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "no_programs"))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Where the files have to lie under the root."""
    return tmp_path / "root" / "FashionMNIST" / "raw"


def write(folder: Path, content: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def loaded(raw: Path, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The splits of the small files, as arrays."""
    splits = FashionMNIST(str(raw.parents[1]), val_size=10).load(seed)
    found = {}
    for name, split in splits.items():
        assert split.targets is not None and split.inputs.dtype == torch.uint8
        assert split.targets.dtype == torch.int64
        found[name] = (split.inputs.numpy(), split.targets.numpy())
    return found


def test_without_val_all_images_are_trained_on(raw: Path) -> None:
    write(raw, FILES)
    splits = FashionMNIST(str(raw.parents[1]), val_size=0).load(0)
    assert list(splits) == ["train", "test"]
    assert splits["train"].targets is not None
    found = rows(splits["train"].inputs.numpy(), splits["train"].targets.numpy())
    assert found == rows(IMAGES["train"], LABELS["train"])


def rows(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Each image with its label, in an order that depends on nothing else."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True))


def assert_whole(raw: Path) -> None:
    """What loads is what the small files hold, and the folder holds these and nothing half done."""
    splits = loaded(raw)
    train, val = (rows(*splits[name]) for name in ("train", "val"))
    assert sorted(train + val) == rows(IMAGES["train"], LABELS["train"])
    assert np.array_equal(splits["test"][0], IMAGES["t10k"])
    assert np.array_equal(splits["test"][1], LABELS["t10k"])
    assert {p.name: p.read_bytes() for p in raw.iterdir() if p.name != ".lock"} == FILES


# where the files come from


def test_files_in_root_are_read_without_a_word(raw: Path, said: list[str]) -> None:
    write(raw, FILES)
    assert_whole(raw)
    assert said == []


def test_damaged_file_in_root_is_named_and_replaced(raw: Path, tmp_path: Path, said: list[str]) -> None:
    write(raw, FILES | {"t10k-labels-idx1-ubyte": FILES["t10k-labels-idx1-ubyte"][:-1]})
    write(tmp_path / "debian", ZIPPED)
    assert_whole(raw)
    assert "t10k-labels-idx1-ubyte is damaged" in said[0]


def test_what_an_old_torchvision_cached_is_not_read(raw: Path) -> None:
    write(raw, FILES)
    processed = raw.parent / "processed"
    processed.mkdir()
    wrong = (torch.zeros(40, 28, 28, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    for name in ("training.pt", "test.pt"):
        torch.save(wrong, processed / name)
    assert_whole(raw)


@pytest.mark.parametrize("content", [FILES, ZIPPED], ids=["unpacked", "gz"])
def test_debian_folder(raw: Path, tmp_path: Path, content: dict[str, bytes]) -> None:
    write(tmp_path / "debian", content)
    assert_whole(raw)


class Answer(SimpleHTTPRequestHandler):
    """Files of a folder; `refused` is what the server says instead, and `held` what it waits for, if anything."""

    refused = 0
    held: threading.Event | None = None
    asked: ClassVar[list[str]]

    def send_head(self):  # type: ignore[no-untyped-def]
        self.asked.append(f"{self.command} {self.path}")
        if self.held is not None and self.command == "GET":
            self.held.wait(20)
        if self.refused:
            self.send_error(self.refused)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answer]]:
    """torchvision's only mirror is a server of this process, which serves the folder `mirror`."""

    class Fresh(Answer):
        asked: ClassVar[list[str]] = []  # made anew for every test

    write(tmp_path / "mirror", ZIPPED)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Fresh, directory=str(tmp_path / "mirror"))
    )
    threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    yield Fresh
    server.shutdown()
    server.server_close()


def test_mirror(raw: Path, mirror: type[Answer], said: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert_whole(raw)
    assert {f"GET /{name}" for name in ZIPPED} <= set(mirror.asked)
    assert any("fetching" in line and "127.0.0.1" in line for line in said)
    assert capfd.readouterr().err == ""  # there is no terminal here, so there is no bar


def test_socket_limit_is_put_back(raw: Path, mirror: type[Answer]) -> None:
    socket.setdefaulttimeout(123)
    try:
        loaded(raw)
        assert socket.getdefaulttimeout() == 123
    finally:
        socket.setdefaulttimeout(None)


def test_mirror_that_refuses_is_one_line(raw: Path, mirror: type[Answer], said: list[str]) -> None:
    mirror.refused = 403
    with pytest.raises(UserError, match=r"torchvision's mirrors: .* HTTP Error 403"):
        loaded(raw)
    assert len([line for line in said if line.startswith("  torchvision's mirrors")]) == 1
    assert len(mirror.asked) == 1  # the other three files are not asked for


def test_mirror_that_is_silent_is_given_up(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never says a word
        port = server.getsockname()[1]
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
        with pytest.raises(UserError, match=r"has not answered within 0\.2 seconds|timed out"):
            loaded(raw)


def test_mirror_that_falls_silent_is_given_up(
    raw: Path, mirror: type[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision itself would wait for ever."""
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    mirror.held = threading.Event()
    with pytest.raises(UserError, match=r"mirrors: .*timed out"):
        loaded(raw)
    mirror.held.set()


def test_name_lookup_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up knows no timeout, so the one who asks must not wait for it."""
    woken = threading.Event()

    def hang(*_: object, **__: object) -> None:
        woken.wait(20)
        raise OSError("it was waited for")

    monkeypatch.setattr(download.urllib.request, "urlopen", hang)
    monkeypatch.setattr(download, "PATIENCE", 0.05)
    assert download.probe("http://nowhere.invalid/") == "has not answered within 0.05 seconds"
    woken.set()


def test_mirror_is_left_for_one_that_answers(
    raw: Path, mirror: type[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = datasets.FashionMNIST.mirrors[0]
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{alive}moved/", alive])
    assert_whole(raw)
    assert len([asked for asked in mirror.asked if "/moved/" in asked]) == 1  # not once for each file


def test_mirror_of_altered_files_is_named(raw: Path, tmp_path: Path, mirror: type[Answer]) -> None:
    name = "t10k-images-idx3-ubyte.gz"
    write(tmp_path / "mirror", {name: ZIPPED[name][:-1]})
    with pytest.raises(UserError, match=r"mirrors: .*corrupted"):  # torchvision 0.26 does not say which file
        loaded(raw)
    assert not (raw / "train-images-idx3-ubyte").exists()


def test_mirror_is_held_against_our_digests_too(
    raw: Path, mirror: type[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "t10k-images-idx3-ubyte"
    monkeypatch.setitem(fashion_mnist.DIGESTS, name, "0" * 64)
    with pytest.raises(UserError, match=f"mirrors: {name} is damaged"):
        loaded(raw)


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Programs named apt-get and dpkg-deb, made of these lines; both write what they were called with."""

    def make(apt_get: str, dpkg_deb: str | None = None) -> Path:
        write(tmp_path / "package", ZIPPED)
        content = f"$3{tmp_path}/debian"
        unpack = dpkg_deb or f'/bin/mkdir -p "{content}"; /bin/cp {tmp_path}/package/* "{content}"'
        programs = tmp_path / "programs"
        programs.mkdir()
        for name, body in {"apt-get": apt_get, "dpkg-deb": unpack}.items():
            lines = ["#!/bin/sh", f'echo "{name} $*" >> {tmp_path}/calls', body, ""]
            (programs / name).write_text("\n".join(lines))
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))
        return tmp_path / "calls"

    return make


GIVE = 'for last; do :; done; echo package > "${last}_1.0_all.deb"'


def test_debian_package(raw: Path, debian: Callable[..., Path], said: list[str]) -> None:
    calls = debian(GIVE)
    assert_whole(raw)
    apt, dpkg = calls.read_text().splitlines()
    assert apt.endswith("download dataset-fashion-mnist")
    assert dpkg.startswith("dpkg-deb -x ") and "dataset-fashion-mnist_1.0_all.deb" in dpkg
    assert any("apt-get" in line for line in said)


def test_debian_package_with_lists_of_our_own(raw: Path, debian: Callable[..., Path]) -> None:
    """An image without package lists: they are fetched into the scratch folder, which needs no root."""
    known = 'case "$*" in *State::Lists=*download*) ;; *update) exit 0;; *) echo "E: no lists" >&2; exit 100;; esac'
    calls = debian(f"{known}\n{GIVE}")
    assert_whole(raw)
    lines = calls.read_text().splitlines()
    assert [line.split()[-1] for line in lines[:3]] == [
        "dataset-fashion-mnist",
        "update",
        "dataset-fashion-mnist",
    ]
    assert str(raw) in lines[1]


def test_debian_package_that_apt_cannot_have(raw: Path, debian: Callable[..., Path]) -> None:
    debian('echo "E: Unable to locate package" >&2; echo "W: a warning" >&2; exit 100')
    with pytest.raises(UserError, match=r"Debian's package .*: E: Unable to locate package"):
        loaded(raw)


@pytest.mark.parametrize(
    ("apt_get", "dpkg_deb", "reason"),
    [
        ("exit 7", None, "apt-get ended with status 7"),
        ("exit 0", None, "apt-get left no package"),
        (GIVE, "echo 'dpkg-deb: error: not a package' >&2; exit 2", "dpkg-deb: error: not a package"),
        (GIVE, "exit 0", "train-images-idx3-ubyte is not there"),
    ],
)
def test_debian_package_that_fails(
    raw: Path, debian: Callable[..., Path], apt_get: str, dpkg_deb: str | None, reason: str
) -> None:
    debian(apt_get, dpkg_deb)
    with pytest.raises(UserError, match=f"Debian's package .*: {reason}"):
        loaded(raw)


def test_no_source_at_all(raw: Path, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        loaded(raw)
    message = str(caught.value)
    for part in (
        "Fashion-MNIST cannot be had",
        f"{raw}: ",
        "/debian, where Debian's package puts them: ",
        "torchvision's mirrors: http://127.0.0.1:1/ cannot be had: ",
        "Debian's package dataset-fashion-mnist: there is no apt-get here",
        f"put these files into {raw}",
        *(f"{name}  {digest}" for name, digest in fashion_mnist.DIGESTS.items()),
    ):
        assert part in message
    assert not any("Traceback" in line for line in said)
    assert [path.name for path in raw.iterdir()] == [".lock"]


# the splits


def test_split_has_as_many_of_each_class_and_depends_on_the_seed_alone(raw: Path) -> None:
    write(raw, FILES)
    one = loaded(raw, seed=1)
    torch.rand(7)
    again, other = loaded(raw, seed=1), loaded(raw, seed=2)
    assert np.array_equal(np.bincount(one["val"][1]), np.ones(10))
    assert np.array_equal(np.bincount(one["train"][1]), np.bincount(LABELS["train"]) - 1)
    for name in ("train", "val", "test"):
        assert np.array_equal(one[name][0], again[name][0]) and np.array_equal(one[name][1], again[name][1])
    assert not np.array_equal(one["val"][0], other["val"][0])
    assert np.array_equal(one["test"][0], other["test"][0])


def test_stratified_takes_every_sample_equally_often() -> None:
    targets = torch.arange(20) % 2
    counts = torch.zeros(20)
    for seed in range(400):
        chosen = stratified(targets, 3, seed)
        assert len(chosen.unique()) == 6 and int(targets[chosen].sum()) == 3
        counts[chosen] += 1
    # binomial(400, 0.3): 120 ± 9.2
    assert counts.sub(120).abs().max() < 4.5 * 9.2


# a batch


def draws(batch_size: int, rows: slice = slice(None), seed: int = 5) -> BatchRandom:
    return BatchRandom(seed, torch.device("cpu"), batch_size, rows)


def some_images(number: int) -> Tensor:
    return torch.randint(1, 256, (number, 28, 28), generator=torch.manual_seed(0)).to(torch.uint8)


def test_evaluation_standardises_and_nothing_else() -> None:
    images = some_images(3)
    given = images.clone()
    found = FashionMNIST(shift=3, flip=1.0).transform(images, None)
    assert found.dtype == torch.float32 and found.shape == (3, 28, 28)
    wanted = (images.double() / 255 - 0.2860) / 0.3530
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(images, given)


def test_training_without_options_is_as_evaluation() -> None:
    data, images = FashionMNIST(), some_images(3)
    assert torch.equal(data.transform(images, draws(3)), data.transform(images, None))


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """The image shifted, pixel by pixel."""
    found = torch.zeros_like(image)
    for y in range(28):
        for x in range(28):
            if 0 <= y - down < 28 and 0 <= x - right < 28:
                found[y, x] = image[y - down, x - right]
    return found


def test_every_shift_up_to_the_limit_and_no_other() -> None:
    images = some_images(1).expand(300, 28, 28)
    found = FashionMNIST(shift=1).augment(images, draws(300))
    possible = {(d, r): moved(images[0], d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)}
    counts = {at: sum(torch.equal(image, wanted) for image in found) for at, wanted in possible.items()}
    assert sum(counts.values()) == 300
    assert min(counts.values()) > 12  # 33 ± 5.4 of each


def test_largest_shift_leaves_a_corner() -> None:
    images = some_images(1).expand(2000, 28, 28)
    found = FashionMNIST(shift=27).augment(images, draws(2000))
    corners = [moved(images[0], d, r) for d in (-27, 27) for r in (-27, 27)]
    lit = (found > 0).flatten(1).sum(1)
    assert int(lit.min()) >= 1  # never all black: one pixel at least remains
    smallest = found[lit == 1]
    assert all(any(torch.equal(image, corner) for corner in corners) for image in smallest)


def test_flip_mirrors_its_share() -> None:
    images = some_images(400)
    mirrored = images.flip(2)
    assert torch.equal(FashionMNIST(flip=1.0).augment(images, draws(400)), mirrored)
    found = FashionMNIST(flip=0.25).augment(images, draws(400))
    as_they_were = (found == images).flatten(1).all(1)
    as_mirrored = (found == mirrored).flatten(1).all(1)
    assert bool((as_they_were ^ as_mirrored).all())
    assert abs(int(as_mirrored.sum()) - 100) < 4.5 * 8.7  # binomial(400, 1/4)


def test_shift_and_flip_together() -> None:
    images = some_images(1).expand(200, 28, 28)
    found = FashionMNIST(shift=1, flip=0.5).augment(images, draws(200))
    shifts = [(d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)]
    possible = [moved(image, d, r) for image in (images[0], images[0].flip(1)) for d, r in shifts]
    seen = [[torch.equal(image, wanted) for wanted in possible].index(True) for image in found]
    assert len(set(seen)) == 18


def test_processes_see_what_one_would() -> None:
    data, images = FashionMNIST(shift=2, flip=0.5), some_images(8)
    whole = data.transform(images, draws(8))
    parts = [data.transform(images[part], draws(8, part)) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.transform(images, draws(8, seed=6)), whole)


def test_batch_of_the_loop(raw: Path) -> None:
    write(raw, FILES)
    data = FashionMNIST(str(raw.parents[1]), batch_size=16, val_size=10, shift=2, flip=0.5)
    batch = train_batch(data, data.load(0)["train"], seed=0, step=3)
    assert batch.inputs.shape == (16, 28, 28) and batch.inputs.dtype == torch.float32
    assert batch.targets is not None and batch.targets.shape == (16,)


# as images, for networks that make them


def test_as_images_pads_with_black_and_scales(raw: Path) -> None:
    write(raw, FILES)
    data = FashionMNIST(str(raw.parents[1]), batch_size=16, val_size=10)
    data.as_images()
    splits = data.load(0)
    wanted = np.pad(IMAGES["t10k"], ((0, 0), (2, 2), (2, 2)))[:, None]  # (10, 1, 32, 32)
    assert np.array_equal(splits["test"].inputs.numpy(), wanted)
    found = data.transform(splits["test"].inputs, None)
    assert found.dtype == torch.float32
    assert np.allclose(found.double().numpy(), wanted / 127.5 - 1, rtol=0, atol=1e-7)
    batch = train_batch(data, splits["train"], seed=0, step=3)
    assert batch.inputs.shape == (16, 1, 32, 32) and batch.inputs.min() == -1


def test_as_images_holds_the_same_images_in_the_same_splits(raw: Path) -> None:
    write(raw, FILES)
    data = FashionMNIST(str(raw.parents[1]), val_size=10)
    data.as_images()
    rows = loaded(raw)
    for name, split in data.load(0).items():
        assert np.array_equal(split.inputs[:, 0, 2:-2, 2:-2].numpy(), rows[name][0])
        assert split.targets is not None and np.array_equal(split.targets.numpy(), rows[name][1])


def test_as_images_are_shifted_and_mirrored_as_the_rows_are() -> None:
    images = some_images(50)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None]
    data = FashionMNIST(shift=2, flip=0.5)
    found = data.augment(padded, draws(50))
    assert found.shape == (50, 1, 32, 32)
    seen = torch.nn.functional.pad(data.augment(images, draws(50)), (2, 2, 2, 2))
    whole = found[:, 0, 4:-4, 4:-4]  # the border apart, where the padding keeps what the rows lose
    assert torch.equal(whole, seen[:, 4:-4, 4:-4])


# arguments


@pytest.mark.parametrize(
    "argument",
    [
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"val_size": -10},
        {"val_size": 5001},
        {"val_size": 60_000},
        {"shift": -1},
        {"shift": 28},
        {"flip": -0.1},
        {"flip": 1.1},
        {"flip": float("nan")},
        {"root": ""},
        {"root": "~no_such_user_here/data"},
    ],
    ids=str,
)
def test_argument_out_of_range_is_named(argument: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))} "):
        FashionMNIST(**argument)  # type: ignore[arg-type]


def test_home_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FashionMNIST("~/data").root == tmp_path / "data"


def test_yaml_gives_every_argument_its_default() -> None:
    node = OmegaConf.to_container(OmegaConf.load(REPO / "conf" / "data" / "fashion_mnist.yaml"))
    assert isinstance(node, dict)
    assert node.pop("_target_") == "experiments.data.fashion_mnist.FashionMNIST"
    parameters = inspect.signature(FashionMNIST).parameters
    assert node == {name: parameter.default for name, parameter in parameters.items()}


def test_digest_is_of_the_four_files(monkeypatch: pytest.MonkeyPatch) -> None:
    before = FashionMNIST().digest()
    assert len(before) == 64 and FashionMNIST(val_size=10).digest() == before
    monkeypatch.setitem(fashion_mnist.DIGESTS, "t10k-labels-idx1-ubyte", "0" * 64)
    assert FashionMNIST().digest() != before


# the real files


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real four files, where this machine has them already."""
    cache = Path("~/.cache/formula-runner/FashionMNIST/raw").expanduser()
    if not faults(cache, fashion_mnist.DIGESTS):
        return cache
    package = Path("/usr/share/datasets/fashion-mnist")
    if not package.is_dir():
        pytest.skip(f"the real files are neither in {cache} nor in {package}")
    raw = tmp_path_factory.mktemp("real") / "FashionMNIST" / "raw"
    write(raw, {name: read_verified(package, name, digest) for name, digest in fashion_mnist.DIGESTS.items()})
    return raw


def images_of(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28)


def labels_of(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8, offset=8)


def test_real_files_load_as_they_are(real: Path) -> None:
    splits = loaded_real(real)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [55_000, 5_000, 10_000]
    counts = {name: torch.bincount(split.targets).tolist() for name, split in splits.items()}  # type: ignore[arg-type]
    assert counts == {"train": [5_500] * 10, "val": [500] * 10, "test": [1_000] * 10}
    kept = rows(
        np.concatenate([splits[name].inputs.numpy() for name in ("train", "val")]),
        np.concatenate([splits[name].targets.numpy() for name in ("train", "val")]),  # type: ignore[union-attr]
    )
    assert kept == rows(
        images_of(real / "train-images-idx3-ubyte"), labels_of(real / "train-labels-idx1-ubyte")
    )
    assert np.array_equal(splits["test"].inputs.numpy(), images_of(real / "t10k-images-idx3-ubyte"))


@functools.cache
def loaded_real(real: Path) -> dict[str, fashion_mnist.Split]:
    return FashionMNIST(str(real.parents[1])).load(0)


def test_real_labels_are_what_torchvision_reads(real: Path) -> None:
    splits = loaded_real(real)
    peer = datasets.FashionMNIST(str(real.parents[1]), train=False)
    assert splits["test"].targets is not None
    assert torch.equal(splits["test"].targets, peer.targets)
    assert peer.targets[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # as published
    assert tuple(peer.classes) == FashionMNIST.class_names


def test_real_pixels_have_the_mean_and_deviation_of_the_standardisation(real: Path) -> None:
    counts = np.bincount(images_of(real / "train-images-idx3-ubyte").reshape(-1), minlength=256)
    share, white = counts / counts.sum(), np.arange(256) / 255
    mean = share @ white
    assert abs(mean - fashion_mnist.MEAN) < 5e-5
    assert abs(np.sqrt(share @ (white - mean) ** 2) - fashion_mnist.STD) < 5e-5
