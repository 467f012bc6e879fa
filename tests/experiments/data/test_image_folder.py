"""Folders and archives of images: what is read, what is left out and reported, what is stored for the next run."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.data.image_folder import ImageFolder, containers, dataset, pixel_file
from experiments.data.image_folder.decoding import Unreadable
from experiments.data.image_folder.layout import Layout
from runner.data import Split, train_batch
from runner.errors import UserError
from tests.experiments.data.conftest import race, refusal, stop_at_gate, write
from tests.experiments.data.test_decoding import GOOD, encoded, pixels

KINDS = ("folder", "zip", "tar", "tar.gz", "tar.xz")
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, and so the cache, is a folder of the test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "formula-runner" / "image_folder"


def tree(names: list[str]) -> Files:
    """Return one image per name, each another."""
    return {name: encoded(pixels(number)) for number, name in enumerate(names)}


CLASSES = tree([f"train/{label}/{i}.png" for label in ("ant", "bee") for i in range(12)])
CLASSES |= {f"test/{name[6:]}": encoded(pixels(24 + i)) for i, name in enumerate(list(CLASSES)[::3])}
FLAT = tree([f"{i:02}.png" for i in range(40)])


def make(kind: str, place: Path, files: Files, *more: tuple[str, bytes], cut: int | None = None) -> Path:
    """Write the files as a folder, or as an archive of this suffix up to byte `cut`, and return its path."""
    if kind == "folder":
        return write(place, files)
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f"{place.name}.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, f"w:{kind[4:]}") as tar:  # type: ignore[call-overload]
            for name, content in [*files.items(), *more]:
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.write_bytes(path.read_bytes()[:cut])
    return path


def load(root: Path, **arguments: Any) -> dict[str, Split]:
    return ImageFolder(str(root), **arguments).load(0)


def refused(root: Path, *parts: str, **arguments: Any) -> None:
    """The images are refused with a message of these parts, and nothing decoded is left."""
    refusal(lambda: load(root, **arguments), *parts)
    assert decoded_files(root) == []


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return write(tmp_path / "things", FLAT)


def images_in(splits: dict[str, Split], *names: str) -> set[bytes]:
    """Return the images of these splits, or of all, as bytes (C, H, W)."""
    return {image.numpy().tobytes() for name in names or splits for image in splits[name].inputs}


def stored(number: int) -> bytes:
    """Return a made-up image as a split holds it."""
    return pixels(number).transpose(2, 0, 1).tobytes()


def decoded_files(root: Path) -> list[str]:
    """Return what is in the folder for decoded images beside those of `root`, except the lock."""
    return sorted(path.name for path in (root / ".formula-runner").rglob("*") if path.name != ".lock")


def assert_targets(splits: dict[str, Split]) -> None:
    """Each image of CLASSES has its own class."""
    label = {stored(number): int("/bee/" in name) for number, name in enumerate(CLASSES)}
    for split in splits.values():
        assert split.targets is not None
        assert split.targets.tolist() == [label[image.numpy().tobytes()] for image in split.inputs]


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_archives_give_the_same_splits(tmp_path: Path, kind: str) -> None:
    data = ImageFolder(str(make(kind, tmp_path / "things", CLASSES)), val_size=5)
    assert data.digest() is None
    splits = data.load(0)
    assert {name: len(split) for name, split in splits.items()} == {"train": 19, "val": 5, "test": 8}
    assert {(split.inputs.dtype, split.inputs.shape[1:]) for split in splits.values()} == {
        (torch.uint8, (3, 32, 32))
    }
    assert images_in(splits, "train", "val") == {stored(number) for number in range(24)}
    assert images_in(splits, "test") == {stored(number) for number in range(24, 32)}
    assert data.class_names == ("ant", "bee")
    assert_targets(splits)

    # whatever the seed, and the folders around everything
    wrapped = {f"some/wrapper/{name}": content for name, content in CLASSES.items()}
    other = ImageFolder(str(make(kind, tmp_path / "other", wrapped)), val_size=5)
    assert torch.equal(other.load(1)["val"].inputs, splits["val"].inputs)
    assert other.class_names == data.class_names and other.digest() == data.digest() is not None


@pytest.mark.parametrize(
    ("files", "arguments", "sizes"),
    [
        (FLAT, {"val_size": 0.1, "test_size": 6}, {"train": 30, "val": 4, "test": 6}),
        (FLAT, {"val_size": 0, "test_size": 0}, {"train": 40}),
        (FLAT, {"val_size": 0.001, "test_size": 0}, {"train": 39, "val": 1}),  # one at least
        (CLASSES | {"train/extra.png": encoded(pixels(99))}, {}, {"train": 24, "val": 1, "test": 8}),
    ],
)
def test_without_classes_there_are_no_targets(
    tmp_path: Path, files: Files, arguments: dict[str, float], sizes: dict[str, int]
) -> None:
    data = ImageFolder(str(write(tmp_path, files)), **arguments)  # type: ignore[arg-type]
    splits = data.load(0)
    assert {name: len(split) for name, split in splits.items()} == sizes
    assert len(images_in(splits)) == len(files)
    assert all(split.targets is None for split in splits.values()) and data.class_names == ()


def test_image_keeps_its_split_when_others_are_added(tmp_path: Path) -> None:
    before = load(write(tmp_path, FLAT), val_size=10, test_size=10)
    more = {f"more{i}.png": encoded(pixels(100 + i)) for i in range(4)}
    after = load(write(tmp_path, more), val_size=10, test_size=10)
    moved = {name: len(images_in(before, name) - images_in(after, name)) for name in ("val", "test")}
    assert moved["val"] <= 4 and moved["test"] <= 8
    assert len(images_in(after)) == 44


def test_rows_do_not_follow_the_names() -> None:
    """Of each half of the names, half is in each half of the rows."""
    first = Layout([f"{i:05}.png" for i in range(4000)]).files[:2000]
    assert abs(sum(name < "02000" for name in first) - 1000) < 4.5 * 16  # hypergeometric: 1000 ± 16


def test_links_are_followed_once_and_what_is_no_image_is_ignored(tmp_path: Path, said: list[str]) -> None:
    other = {"labels.csv": b"a,b", "._00.png": b"x", ".git/00.png": b"x", "__MACOSX/00.png": b"x"}
    real, root = write(tmp_path / "real", FLAT | other), write(tmp_path / "root", {})
    (root / "things").symlink_to(real)
    (real / "loop").symlink_to(root)
    (root / "nowhere.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe.png")
    splits = load(root)
    assert sum(map(len, splits.values())) == len(images_in(splits)) == 40
    assert len(said) == 1  # that they are decoded


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_and_small_files_are_counted_and_named(
    tmp_path: Path, said: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_MAX_BYTES", 10_000)
    small = {name: encoded(pixels(500 + i, 1 + 30 * i, 90)) for i, name in enumerate(("a.png", "b.png"))}
    broken = {"05.png": bytes(20_000), "11.png": GOOD[:90], "38.png": b""}
    root = make(kind, tmp_path / "things", FLAT | broken | small)
    splits = load(root)
    assert images_in(splits) >= {stored(number) for number, name in enumerate(FLAT) if name not in broken}
    assert sum(map(len, splits.values())) == 39
    notes = said[-2:]
    assert (
        "3 of 42 images are left out: 3 cannot be read (05.png: more than 10,000 bytes, 11.png: " in notes[0]
    )
    assert "2 of 39 images are smaller than 32 pixels and are enlarged (a.png, b.png)" in notes[1]
    assert load(root).keys() == splits.keys() and said[-2:] == notes  # also where nothing is decoded
    assert load(root, size=1)["train"].inputs.shape[1:] == (3, 1, 1) and "enlarged" not in said[-1]


def test_targets_stay_with_their_images_where_some_are_left_out(tmp_path: Path, said: list[str]) -> None:
    stray = tree(["extra/a.png", "b.png", "train.png"])
    splits = load(write(tmp_path, CLASSES | stray | {name: b"x" for name in list(CLASSES)[::3]}), val_size=4)
    assert_targets(splits)
    assert sum(map(len, splits.values())) == 21
    assert "14 of 35 images are left out: 11 cannot be read (test/ant/0.png: " in said[-1]
    assert "8 more); " in said[-1] and "train/bee" not in said[-1]  # few are named
    assert "3 outside the folders train, val and test (b.png, extra/a.png, train.png)" in said[-1]


def test_endless_file_is_read_to_the_limit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_MAX_BYTES", 1000)
    endless: Any = SimpleNamespace(read=lambda size=-1: bytes(size if size <= 1001 else -1))  # an error
    assert isinstance(containers._read_limited(endless), Unreadable)


def test_encrypted_member_is_left_out(tmp_path: Path, said: list[str]) -> None:
    path = make("zip", tmp_path / "things", FLAT)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the table of members
    content[6] |= 1
    path.write_bytes(content)
    load(path)
    assert "1 cannot be read (00.png: " in said[-1] and "encrypted" in said[-1]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_leaves_nothing_outside(tmp_path: Path, kind: str) -> None:
    names = ["../../evil.png", "/evil.png", "a/../../evil.png", "good.png"]
    load(make(kind, tmp_path / "deep" / "er" / "things", tree(names) | FLAT))
    assert not list(tmp_path.rglob("evil.png"))


def test_name_twice_in_a_tar_counts_once_and_the_last_is_taken(tmp_path: Path) -> None:
    again = [("00.png", b"x"), ("01.png", encoded(pixels(77))), ("02.png", b"x"), ("02.png", FLAT["02.png"])]
    splits = load(make("tar", tmp_path / "things", FLAT, *again))
    assert images_in(splits) == {stored(number) for number in (77, *range(2, 40))}
    assert sum(map(len, splits.values())) == 39


ONLY_TEST = CLASSES | {name: b"x" for name in CLASSES if name.startswith("train")}
TEXT = {"a.txt": b"x"}


@pytest.mark.parametrize(
    ("kind", "files", "cut", "message"),
    [
        ("folder", {}, None, "contains no images"),
        ("folder", dict.fromkeys(FLAT, b"x"), None, "none of 40 images"),
        ("folder", ONLY_TEST, None, "/train can be used: 24 of 32 images are left out"),
        ("zip", FLAT, -400, "a.zip"),  # without its table
        *((kind, FLAT, -40_000, "is damaged: ") for kind in KINDS[2:]),
        *((kind, TEXT, None, "contains no images") for kind in KINDS),
    ],
    ids=str,
)
def test_refused(tmp_path: Path, kind: str, files: Files, cut: int | None, message: str) -> None:
    refused(make(kind, tmp_path / "a", files, cut=cut), message)


def test_neither_folder_nor_archive_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder or file")
    refused(write(tmp_path, FLAT) / "00.png", "expected a folder, a zip")


def test_tar_that_is_damaged_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    container = containers.open_container(make("tar.xz", tmp_path / "a", FLAT))
    names = container.names()
    make("tar.xz", tmp_path / "a", FLAT, cut=-300)
    with pytest.raises(UserError, match="cannot be read or is damaged: "):
        list(container.contents(names))


def test_grey_where_colour_was_asked(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.png": encoded(pixels(i, channels=1)) for i in range(9)})
    with pytest.raises(UserError, match="grey") as caught:
        load(tmp_path)
    assert caught.value.right == "data.channels=1"
    assert decoded_files(tmp_path) == []
    splits = load(tmp_path, channels=1)
    assert splits["train"].inputs.shape[1:] == (1, 32, 32)
    assert images_in(splits) == {pixels(i, channels=1).tobytes() for i in range(9)}
    load(write(tmp_path, {"colour.png": GOOD}))  # some grey among colour are nothing to refuse


def test_nothing_left_for_training(flat: Path) -> None:
    parts = ("data.val_size=20 and data.test_size=0.5", "40 training images")
    refusal(lambda: load(flat, val_size=20, test_size=0.5), *parts)


def decoded_anew(said: list[str]) -> bool:
    """Return whether images were decoded since the last call."""
    decoded = any(line.startswith("Decoding") for line in said)
    said.clear()
    return decoded


def test_decoded_images_are_used_again_until_something_changes(flat: Path, said: list[str]) -> None:
    def decodes(**arguments: Any) -> bool:
        load(flat, **arguments)
        return decoded_anew(said)

    assert decodes() and decoded_files(flat) == ["images-32x32x3.bytes"]
    assert not decodes(val_size=3, test_size=0, flip=0.0)
    assert decodes(size=16) and decodes(channels=1)
    (flat / "00.png").write_bytes(encoded(pixels(99)))
    assert decodes() and stored(99) in images_in(load(flat))
    (flat / "00.png").unlink()
    assert decodes() and len(images_in(load(flat))) == 39
    (flat / "39.png").rename(flat / "39_.png")  # the same file, still the last
    assert decodes()
    os.utime(flat / "02.png", (1, 1))
    assert decodes()
    assert decoded_files(flat) == ["images-16x16x3.bytes", "images-32x32x1.bytes", "images-32x32x3.bytes"]


def test_those_of_an_archive_are_in_the_cache(tmp_path: Path, cache: Path, said: list[str]) -> None:
    for files, anew in ((FLAT, True), (FLAT, False), (FLAT | {"new.png": encoded(pixels(99))}, True)):
        path = tmp_path / "things.zip"
        if anew:
            make("zip", tmp_path / "things", files)
        assert len(images_in(load(path))) == len({*files.values()})
        assert decoded_anew(said) == anew
    assert [file.name.startswith("things.zip-") for file in cache.glob("*.bytes")] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "things.zip"]


def test_cache_may_be_chosen_and_shared(tmp_path: Path, said: list[str]) -> None:
    roots = {write(tmp_path / "a" / "things", FLAT): 40, write(tmp_path / "b" / "things", CLASSES): 32}
    for root, number in [*roots.items(), *roots.items()]:
        assert len(images_in(load(root, cache=str(tmp_path / "cache")))) == number
        assert decoded_files(root) == []
    assert len([line for line in said if line.startswith("Decoding")]) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "no_text", "longer"])
def test_damaged_file_of_decoded_images_is_made_anew(flat: Path, said: list[str], damage: str) -> None:
    load(flat)
    [path] = flat.glob(".formula-runner/*.bytes")
    content = path.read_bytes()
    damaged = {"cut": content[1:], "empty": b"", "no_text": content[:-9], "longer": bytes(3072) + content}
    path.write_bytes(damaged[damage])
    decoded_anew(said)
    assert len(images_in(load(flat))) == 40
    assert decoded_anew(said) and path.read_bytes()[40 * 3072 :] == content[40 * 3072 :]


def test_splits_are_mapped_and_not_loaded(flat: Path) -> None:
    splits = load(flat)
    [path] = flat.glob(".formula-runner/*.bytes")
    assert str(path) in Path("/proc/self/maps").read_text() if sys.platform == "linux" else True
    assert len({split.inputs.untyped_storage().data_ptr() for split in splits.values()}) == 1  # one map
    before = path.read_bytes()
    splits["train"].inputs.zero_()
    assert path.read_bytes() == before
    batch = train_batch(ImageFolder(str(flat), batch_size=8), load(flat)["train"], seed=0, step=2)
    assert batch.inputs.shape == (8, 3, 32, 32) and batch.targets is None
    assert -1 <= batch.inputs.min() < batch.inputs.max() <= 1


def test_lack_of_space_is_reported_first(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10_000_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(pixel_file.shutil, "disk_usage", lambda _: usage)
    refused(flat, "12.3 MB", "10.0 MB are free", "data.cache=FOLDER", size=320)


def test_disk_that_fills_up_meanwhile_leaves_nothing(flat: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        refused(flat, "cannot write decoded images", "data.cache=FOLDER")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(images_in(load(flat))) == 40


def test_those_of_a_read_only_folder_are_in_the_cache(tmp_path: Path, flat: Path, cache: Path) -> None:
    (flat / ".formula-runner").write_text("a file where the folder would be stops root, too")
    load(flat)
    assert list(cache.glob("things-*.bytes"))
    (tmp_path / "blocked").write_text("")
    refused(flat, "cannot write decoded images", cache=str(tmp_path / "blocked"), size=16)


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_one_process_at_a_time_decodes(tmp_path: Path, flat: Path, said: list[str], end: str) -> None:
    def slow() -> None:
        decode_all = dataset.decode_all
        dataset.decode_all = lambda *arguments: stop_at_gate(tmp_path) or decode_all(*arguments)
        load(flat)

    race(tmp_path, said, slow, lambda: load(flat), end)
    assert decoded_anew(said) == (end == "is killed")
    assert len(images_in(load(flat))) == 40
    assert decoded_files(flat) == ["images-32x32x3.bytes"]
