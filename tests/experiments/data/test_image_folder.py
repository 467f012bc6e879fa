"""Folders and archives of images: what is read and how, what is left out and said, what is kept for the next run."""

from __future__ import annotations

import inspect
import io
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from experiments.data.image_folder import containers, decoding, pixel_file
from experiments.data.image_folder import dataset as image_folder
from experiments.data.image_folder.dataset import ImageFolder, Layout
from experiments.data.image_folder.decoding import Unreadable, decode
from runner.data import Split, train_batch
from runner.errors import UserError

REPO = Path(__file__).resolve().parents[3]
JPEG_COPY = "FORMULA_RUNNER_CIFAR_JPEG"  # names the archive of CIFAR-10's 60,000 images as JPEG files


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, and so the cache, is a folder of the test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pixels(number: int, height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    """The made-up image of this number: uint8 (H, W, C), or (H, W) where it is grey."""
    shape = (height, width, channels) if channels == 3 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **how: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(array).save(target, kind, **how)
    return target.getvalue()


def tree(names: list[str]) -> dict[str, bytes]:
    """One image per name, each another."""
    return {name: encoded(pixels(number)) for number, name in enumerate(names)}


CLASSES = tree(
    [
        f"{split}/{label}/{i}.png"
        for split, n in (("train", 12), ("test", 4))
        for label in ("ant", "bee")
        for i in range(n)
    ]
)
FLAT = tree([f"{i:02}.png" for i in range(40)])


def as_folder(place: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def as_zip(place: Path, files: dict[str, bytes]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place.with_suffix(".zip"), "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return place.with_suffix(".zip")


def as_tar(packing: str) -> Callable[[Path, dict[str, bytes]], Path]:
    def make(place: Path, files: dict[str, bytes]) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        path = place.with_suffix(f".tar.{packing}" if packing else ".tar")
        with tarfile.open(path, f"w:{packing}") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    return make


KINDS = {
    "folder": as_folder,
    "zip": as_zip,
    "tar": as_tar(""),
    "tar.gz": as_tar("gz"),
    "tar.xz": as_tar("xz"),
}


def load(root: Path, **arguments: object) -> dict[str, Split]:
    return ImageFolder(str(root), **arguments).load(0)  # type: ignore[arg-type]


def images_in(splits: dict[str, Split], *names: str) -> set[bytes]:
    """The images of these splits, as bytes (C, H, W)."""
    return {image.numpy().tobytes() for name in names or splits for image in splits[name].inputs}


def stored_as(number: int) -> bytes:
    """A made-up image as a split holds it."""
    return pixels(number).transpose(2, 0, 1).tobytes()


def left(root: Path) -> list[str]:
    """What is in the folder for decoded images beside those of `root`, the lock apart."""
    place = root / image_folder.BESIDE
    return sorted(path.name for path in place.rglob("*") if path.name != ".lock") if place.exists() else []


# what is read


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_archives_give_the_same_splits(tmp_path: Path, kind: str) -> None:
    data = ImageFolder(str(KINDS[kind](tmp_path / "things", CLASSES)), val_size=5)
    splits = data.load(0)
    assert {name: tuple(split.inputs.shape) for name, split in splits.items()} == {
        "train": (19, 3, 32, 32),
        "val": (5, 3, 32, 32),
        "test": (8, 3, 32, 32),
    }
    assert {split.inputs.dtype for split in splits.values()} == {torch.uint8}
    names = list(CLASSES)
    for name, own in (("train", names[:24]), ("test", names[24:])):
        held = images_in(splits, *(("train", "val") if name == "train" else ("test",)))
        assert held == {stored_as(names.index(file)) for file in own}
    assert data.class_names == ("ant", "bee")
    number = {stored_as(number): int("/bee/" in name) for number, name in enumerate(names)}
    for split in splits.values():
        assert split.targets is not None
        assert split.targets.tolist() == [number[image.numpy().tobytes()] for image in split.inputs]
    reference = ImageFolder(str(as_folder(tmp_path / "reference", CLASSES)), val_size=5)
    assert torch.equal(reference.load(1)["val"].inputs, splits["val"].inputs)
    assert reference.digest() == data.digest() is not None


def test_folders_around_everything_mean_nothing(tmp_path: Path) -> None:
    wrapped = {f"some/wrapper/{name}": content for name, content in CLASSES.items()}
    data, plain = (
        ImageFolder(str(as_zip(tmp_path / "a", wrapped))),
        ImageFolder(str(as_zip(tmp_path / "b", CLASSES))),
    )
    assert torch.equal(data.load(0)["train"].inputs, plain.load(0)["train"].inputs)
    assert data.digest() == plain.digest() and data.class_names == ("ant", "bee")


def test_without_folders_there_are_no_targets_and_all_splits_are_shares(tmp_path: Path) -> None:
    data = ImageFolder(str(as_folder(tmp_path, FLAT)), val_size=0.1, test_size=6)
    splits = data.load(0)
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "val": 4, "test": 6}
    assert len(images_in(splits)) == 40
    assert all(split.targets is None for split in splits.values()) and data.class_names == ()


def test_classes_are_none_where_an_image_lies_in_no_folder(tmp_path: Path) -> None:
    data = ImageFolder(str(as_folder(tmp_path, CLASSES | {"train/extra.png": GOOD})))
    assert all(split.targets is None for split in data.load(0).values()) and data.class_names == ()


def test_splits_need_not_be(tmp_path: Path) -> None:
    assert list(load(as_folder(tmp_path, FLAT), val_size=0, test_size=0)) == ["train"]
    assert list(load(tmp_path, val_size=0.001, test_size=0)) == ["train", "val"]  # one at least


def test_image_keeps_its_split_when_others_are_added(tmp_path: Path) -> None:
    before = load(as_folder(tmp_path, FLAT), val_size=10, test_size=10)
    more = {f"more{i}.png": encoded(pixels(100 + i)) for i in range(4)}
    after = load(as_folder(tmp_path, more), val_size=10, test_size=10)
    moved = {name: len(images_in(before, name) - images_in(after, name)) for name in ("val", "test")}
    assert moved["val"] <= 4 and moved["test"] <= 8
    assert len(images_in(after)) == 44


def test_what_is_no_image_and_what_is_hidden_is_not_looked_at(tmp_path: Path, said: list[str]) -> None:
    other = {"labels.csv": b"a,b", "._00.png": b"x", ".git/00.png": b"x", "__MACOSX/00.png": b"x"}
    assert len(images_in(load(as_folder(tmp_path, FLAT | other)))) == 40
    assert len(said) == 1  # that they are decoded


def test_links_are_followed_once_and_pipes_not_waited_for(tmp_path: Path) -> None:
    real = as_folder(tmp_path / "real", FLAT)
    root = tmp_path / "root"
    root.mkdir()
    (root / "things").symlink_to(real)
    (real / "loop").symlink_to(root)
    (root / "nowhere.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe.png")
    splits = load(root)
    assert sum(map(len, splits.values())) == len(images_in(splits)) == 40


def test_jpeg_is_what_pillow_reads(tmp_path: Path) -> None:
    files = {f"{i}.jpg": encoded(pixels(i), "JPEG", quality=90) for i in range(5)}
    splits = load(as_folder(tmp_path, files))
    peer = {np.asarray(Image.open(tmp_path / name)).transpose(2, 0, 1).tobytes() for name in files}
    assert images_in(splits) == peer


# one image


def one(array: np.ndarray, kind: str = "PNG", size: int = 32, channels: int = 3, **how: object) -> np.ndarray:
    return decode(encoded(array, kind, **how), size, channels).pixels


def test_middle_square_is_cut_out() -> None:
    wide = pixels(0, 32, 61)
    assert np.array_equal(one(wide), wide[:, 14:46].transpose(2, 0, 1))
    tall = pixels(0, 61, 32)
    assert np.array_equal(one(tall), tall[14:46].transpose(2, 0, 1))


def test_resizing_has_no_aliases() -> None:
    """Stripes of one pixel, which no four times smaller image can show: plain sampling would give 0 or 255."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = one(stripes)[:, 2:-2, 2:-2].astype(float)
    assert np.abs(inner - 127.5).max() < 8
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[None, :, None], 128, 0).repeat(3, 2)
    found = one(ramp)[0, 16, 2:-2]
    assert np.abs(found - (4 * np.arange(32)[2:-2] + 1.5)).max() <= 1  # the mean of four pixels each


def test_enlarging_is_smooth_and_keeps_what_is_there() -> None:
    """A ramp stays one, the 8 pixels' values at the places where they were; one pixel becomes a plain square."""
    values = 16 * np.arange(8, dtype=np.uint8) + 40
    ramp = np.repeat(values[None, :, None], 8, 0).repeat(3, 2)
    found = one(ramp)[0, 16].astype(float)
    places = (np.arange(32) + 0.5) / 4 - 0.5  # of the new pixels, counted in old ones
    inner = slice(8, -8)  # farther from the edge than the filter is wide
    assert np.abs(found - (16 * places + 40))[inner].max() <= 1.5
    assert (np.diff(found) >= -1).all()
    dot = pixels(3, 1, 1)
    assert np.array_equal(one(dot), np.broadcast_to(dot[0, 0][:, None, None], (3, 32, 32)))


def test_large_jpeg_is_read_at_less_cost_and_looks_the_same() -> None:
    y, x = np.mgrid[0:400, 0:400] / 400
    smooth = np.stack((255 * x, 255 * y, 127 + 100 * np.sin(6 * x + 4 * y)), 2).astype(np.uint8)
    difference = one(smooth, "JPEG", quality=95).astype(int) - one(smooth).astype(int)
    assert np.abs(difference).max() <= 6


def test_colour_becomes_grey_and_grey_colour() -> None:
    colour = pixels(0)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(one(colour, channels=1)[0] - luma).max() <= 1
    grey = pixels(0, channels=1)
    assert np.array_equal(one(grey), np.broadcast_to(grey, (3, 32, 32)))
    assert decode(encoded(grey), 32, 3).grey and not decode(encoded(colour), 32, 3).grey


def test_sixteen_bits_are_cut_to_eight() -> None:
    deep = (pixels(0, channels=1).astype(np.uint16) << 8) | 77
    assert np.array_equal(one(deep, channels=1)[0], deep >> 8)


def test_transparent_parts_are_white() -> None:
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:16] = (10, 20, 30, 255)
    found = one(clear)
    assert (found[:, 16:] == 255).all() and found[:, 0, 0].tolist() == [10, 20, 30]
    palette = Image.fromarray(pixels(0)).quantize(4)
    target = io.BytesIO()
    palette.save(target, "PNG", transparency=0)
    found = decode(target.getvalue(), 32, 3).pixels
    assert (found[:, np.asarray(palette) == 0] == 255).all()


def test_picture_is_turned_as_its_camera_said() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image = pixels(0, 40, 32)
    assert np.array_equal(one(image, exif=exif), np.rot90(image, -1)[:, 4:36].transpose(2, 0, 1))


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of this size by its header, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


GOOD = encoded(pixels(0))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image at all",
        GOOD[:-40],
        GOOD[:200] + bytes(len(GOOD) - 200),
        png_that_says(64, 64),
        png_that_says(20_000, 20_000),
        png_that_says(10_100, 10_100),
        EPS,
        encoded(pixels(0, channels=1).astype(np.float32), "TIFF"),
    ],
    ids=["empty", "text", "cut", "zeros", "no_pixels", "bomb", "large", "eps", "floats"],
)
def test_what_cannot_be_read_says_why_and_raises_nothing_else(content: bytes) -> None:
    with pytest.raises(Unreadable, match=r"."):
        decode(content, 32, 3)


def test_format_that_is_not_named_is_not_opened() -> None:
    """Pillow opens many, among them some that start another program."""
    content = encoded(pixels(0), "PCX")
    Image.open(io.BytesIO(content)).load()
    with pytest.raises(Unreadable, match="cannot identify"):
        decode(content, 32, 3)


def test_too_many_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 32 * 33)
    decode(encoded(pixels(0, 32, 33)), 32, 3)
    with pytest.raises(Unreadable, match="34 × 32 pixels are too many"):
        decode(encoded(pixels(0, 32, 34)), 32, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow's, which decode_all silences
def test_every_cut_and_many_flips_are_read_or_refused() -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        content = bytearray(encoded(pixels(0), kind))
        for place in random.integers(0, len(content), 60):
            for damaged in (
                content[:place],
                content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :],
            ):
                try:
                    found = decode(bytes(damaged), 32, 3)
                except Unreadable:
                    continue
                assert found.pixels.shape == (3, 32, 32)


# what is left out


BROKEN = {"05.png": b"broken", "11.png": GOOD[:90], "38.png": b""}


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_files_are_counted_and_named_in_one_line(
    tmp_path: Path, said: list[str], kind: str
) -> None:
    root = KINDS[kind](tmp_path / "things", FLAT | BROKEN)
    splits = load(root)
    good = {stored_as(number) for number, name in enumerate(FLAT) if name not in BROKEN}
    assert images_in(splits) == good
    assert sum(map(len, splits.values())) == 37
    [line] = [line for line in said if "left out" in line]
    assert "3 of 40 images are left out: 3 cannot be read (05.png" in line
    assert load(root).keys() == splits.keys() and said[-1] == line  # also where nothing is decoded


def test_many_are_counted_and_few_are_named(tmp_path: Path, said: list[str]) -> None:
    load(as_folder(tmp_path, FLAT | {f"{i:02}.png": b"x" for i in range(9)}))
    assert "9 cannot be read (00.png: " in said[-1] and "6 more)" in said[-1] and "03.png" not in said[-1]


def test_images_beside_the_split_folders_are_named(tmp_path: Path, said: list[str]) -> None:
    stray = tree(["extra/a.png", "b.png", "train.png"])
    assert sum(map(len, load(as_folder(tmp_path, CLASSES | stray)).values())) == 32
    assert "3 outside the folders train, val and test (b.png, extra/a.png, train.png)" in said[-1]


def test_targets_stay_with_their_images_where_some_are_left_out(tmp_path: Path) -> None:
    broken = {name: b"x" for name in list(CLASSES)[::3]}
    splits = load(as_folder(tmp_path, CLASSES | broken), val_size=4)
    number = {stored_as(number): int("/bee/" in name) for number, name in enumerate(CLASSES)}
    for split in splits.values():
        assert split.targets is not None
        assert split.targets.tolist() == [number[image.numpy().tobytes()] for image in split.inputs]
    assert sum(map(len, splits.values())) == len(CLASSES) - len(broken)


def test_large_member_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(containers, "MAX_BYTES", 10_000)
    for kind in KINDS:
        load(KINDS[kind](tmp_path / kind, FLAT | {"00.png": bytes(20_000)}))
        assert "1 cannot be read (00.png: more than 10,000 bytes)" in said[-1]


def test_endless_file_is_read_to_the_limit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            assert 0 <= size <= 1001, "else the memory fills up"
            return bytes(size)

    monkeypatch.setattr(containers, "MAX_BYTES", 1000)
    assert isinstance(containers.limited(Endless()), Unreadable)  # type: ignore[arg-type]


def test_encrypted_member_is_left_out(tmp_path: Path, said: list[str]) -> None:
    path = as_zip(tmp_path / "things", FLAT)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1  # the flag in the table of members
    content[6] |= 1
    path.write_bytes(content)
    load(path)
    assert "1 cannot be read (00.png: " in said[-1] and "encrypted" in said[-1]


def test_archive_leaves_nothing_outside(tmp_path: Path) -> None:
    names = ["../../evil.png", "/evil.png", "a/../../evil.png", "good.png"]
    for kind in ("zip", "tar"):
        load(KINDS[kind](tmp_path / "deep" / "er" / "things", tree(names) | FLAT))
    assert not list(tmp_path.rglob("evil.png"))


def test_name_twice_in_a_tar_counts_once_and_the_last_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "things.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [
            *FLAT.items(),
            ("00.png", b"x"),
            ("01.png", encoded(pixels(77))),
            ("02.png", b"x"),
            ("02.png", FLAT["02.png"]),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = images_in(load(path))
    assert len(found) == 39 and stored_as(77) in found and stored_as(2) in found
    assert stored_as(0) not in found and stored_as(1) not in found


# what is refused


def refusal(root: Path, **arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        load(root, **arguments)
    return str(caught.value)


def test_no_such_path(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"data.root={tmp_path / 'none'}: there is no such folder or file."


def test_neither_folder_nor_archive(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(GOOD)
    assert "is neither a folder nor a zip or a tar" in refusal(tmp_path / "file")


@pytest.mark.parametrize("kind", KINDS)
def test_no_images(tmp_path: Path, kind: str) -> None:
    root = KINDS[kind](tmp_path / "things", {"readme.txt": b"nothing"})
    assert "holds no images" in refusal(root)


def test_empty_folder(tmp_path: Path) -> None:
    assert "holds no images" in refusal(tmp_path)


def test_all_unreadable(tmp_path: Path) -> None:
    assert "None of 40 images of" in refusal(as_folder(tmp_path, dict.fromkeys(FLAT, b"x")))
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_images_are_enlarged_and_counted(tmp_path: Path, said: list[str], kind: str) -> None:
    small = {name: encoded(pixels(500 + i, 1 + 30 * i, 90)) for i, name in enumerate(("a.png", "b.png"))}
    root = KINDS[kind](tmp_path / "things", FLAT | small)
    splits = load(root)
    assert sum(map(len, splits.values())) == 42
    [line] = [line for line in said if "enlarged" in line]
    assert "2 of 42 images are smaller than 32 pixels and are enlarged (a.png, b.png)" in line
    assert load(root).keys() == splits.keys() and said[-1] == line  # also where nothing is decoded
    assert load(root, size=1)["train"].inputs.shape[1:] == (3, 1, 1) and "enlarged" not in said[-1]


def test_grey_where_colour_was_asked(tmp_path: Path) -> None:
    files = {f"{i}.png": encoded(pixels(i, channels=1)) for i in range(9)}
    with pytest.raises(UserError) as caught:
        load(as_folder(tmp_path, files))
    assert "are grey" in str(caught.value) and caught.value.right == "data.channels=1"
    assert left(tmp_path) == []
    splits = load(tmp_path, channels=1)
    assert splits["train"].inputs.shape[1:] == (1, 32, 32)
    assert images_in(splits) == {pixels(i, channels=1).tobytes() for i in range(9)}
    load(as_folder(tmp_path, {"colour.png": GOOD}))  # some grey among colour are nothing to refuse


def test_nothing_left_for_training(tmp_path: Path) -> None:
    message = refusal(as_folder(tmp_path, FLAT), val_size=20, test_size=0.5)
    assert "40 images for training, of which data.val_size=20 and data.test_size=0.5 leave none" in message
    only_test = CLASSES | {name: b"x" for name in CLASSES if name.startswith("train")}
    assert "/train can be used: 24 of 32 images are left out" in refusal(as_folder(tmp_path / "b", only_test))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_tar_that_ends_early_is_refused(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path / "things", FLAT)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "cannot be read, or is damaged: " in refusal(path)


def test_tar_that_is_damaged_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    path = KINDS["tar.xz"](tmp_path / "things", FLAT)
    container = containers.opened(path)
    names = container.listed()
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot be read, or is damaged: "):
        list(container.contents(names))


def test_zip_without_its_table_is_refused(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "things", FLAT)
    path.write_bytes(path.read_bytes()[:-400])
    assert str(path) in refusal(path)


# what is kept


def decoded_anew(said: list[str]) -> bool:
    """Whether images were decoded since this was asked last."""
    found = any(line.startswith("Decoding") for line in said)
    said.clear()
    return found


def test_decoded_images_are_used_again_until_something_changes(tmp_path: Path, said: list[str]) -> None:
    root = as_folder(tmp_path / "things", FLAT)
    load(root)
    assert decoded_anew(said) and left(root) == ["images-32x32x3.bytes"]
    load(root, val_size=3, test_size=0, flip=0.0)
    assert not decoded_anew(said)
    load(root, size=16)
    assert decoded_anew(said)
    load(root, channels=1)
    assert decoded_anew(said)
    (root / "00.png").write_bytes(encoded(pixels(99)))
    found = load(root)
    assert decoded_anew(said) and stored_as(99) in images_in(found)
    (root / "00.png").unlink()
    assert len(images_in(load(root))) == 39
    (root / "39.png").rename(root / "39_.png")  # the same file, still the last
    decoded_anew(said)
    load(root)
    assert decoded_anew(said)
    os.utime(root / "02.png", (1, 1))
    load(root)
    assert decoded_anew(said)
    assert left(root) == ["images-16x16x3.bytes", "images-32x32x1.bytes", "images-32x32x3.bytes"]


def test_archive_keeps_them_in_the_cache(tmp_path: Path, home: Path, said: list[str]) -> None:
    path = as_zip(tmp_path / "things", FLAT)
    load(path)
    assert decoded_anew(said)
    load(path)
    assert not decoded_anew(said)
    cache = home / ".cache" / "formula-runner" / "image_folder"
    assert [p.name.startswith("things.zip-") for p in cache.iterdir() if p.name != ".lock"] == [True]
    as_zip(tmp_path / "things", FLAT | {"new.png": GOOD})
    assert len(images_in(load(path))) == 40  # GOOD is image 0 again
    assert decoded_anew(said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "things.zip"]


def test_cache_may_be_chosen_and_shared(tmp_path: Path, said: list[str]) -> None:
    one, two = as_folder(tmp_path / "a" / "things", FLAT), as_folder(tmp_path / "b" / "things", CLASSES)
    for _ in range(2):
        assert len(images_in(load(one, cache=str(tmp_path / "cache")))) == 40
        assert len(images_in(load(two, cache=str(tmp_path / "cache")))) == 32
    assert len([line for line in said if line.startswith("Decoding")]) == 2
    assert left(one) == left(two) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "no_text", "longer"])
def test_damaged_file_of_decoded_images_is_made_anew(tmp_path: Path, said: list[str], damage: str) -> None:
    root = as_folder(tmp_path / "things", FLAT)
    load(root)
    [path] = (root / image_folder.BESIDE).glob("*.bytes")
    content = path.read_bytes()
    text = content[40 * 3072 :]
    path.write_bytes(
        {"cut": content[1:], "empty": b"", "no_text": content[:-9], "longer": bytes(3072) + content}[damage]
    )
    decoded_anew(said)
    assert len(images_in(load(root))) == 40
    assert decoded_anew(said) and path.read_bytes()[40 * 3072 :] == text


def test_splits_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "things", FLAT)
    splits = load(root)
    [path] = (root / image_folder.BESIDE).glob("*.bytes")
    assert str(path) in Path("/proc/self/maps").read_text() if sys.platform == "linux" else True
    bases = {split.inputs.untyped_storage().data_ptr() for split in splits.values()}
    assert len(bases) == 1  # pieces of one map
    before = path.read_bytes()
    splits["train"].inputs.zero_()
    assert path.read_bytes() == before
    moved = splits["val"].to(torch.device("cpu"))
    batch = train_batch(ImageFolder(str(root), batch_size=8), load(root)["train"], seed=0, step=2)
    assert len(moved) == 2 and batch.inputs.shape == (8, 3, 32, 32) and batch.targets is None
    assert -1 <= batch.inputs.min() < batch.inputs.max() <= 1


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = as_folder(tmp_path / "things", FLAT)
    monkeypatch.setattr(
        pixel_file.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100_000)
    )
    message = refusal(root)
    assert "they take 123 kB, and 100 kB are free. data.cache=FOLDER chooses another place." in message
    assert left(root) == []


def test_amounts_are_in_the_unit_in_which_they_are_counted() -> None:
    amounts = {0: "0 B", 999: "999 B", 3072: "3.07 kB", 184_320_000: "184 MB", 2_000_000_000: "2 GB"}
    amounts |= {999_499: "999 kB", 999_500: "1 MB", 999_999_999: "1 GB", 1_234_567_890_123: "1.23 TB"}
    assert {size: pixel_file.amount(size) for size in amounts} == amounts


def test_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "things", FLAT)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        message = refusal(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be put into" in message and "data.cache=FOLDER" in message
    assert left(root) == []
    assert len(images_in(load(root))) == 40


def test_read_only_folder_keeps_them_in_the_cache(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = as_folder(tmp_path / "things", FLAT)
    (root / image_folder.BESIDE).write_text(
        "a file where the folder would be, which root may not write either"
    )
    load(root)
    assert list((home / ".cache" / "formula-runner" / "image_folder").glob("things-*.bytes"))
    (tmp_path / "blocked").write_text("")
    assert "cannot be put into" in refusal(root, cache=str(tmp_path / "blocked"), size=16)


# Begins to decode, says so, and goes on when it is let.
PROCESS = """
import sys, time
from pathlib import Path
from experiments.data.image_folder import dataset

here = Path(sys.argv[1])
all_of = dataset.decode_all

def slowly(*arguments):
    (here / "begun").touch()
    while not (here / "go").exists():
        time.sleep(0.005)
    return all_of(*arguments)

dataset.decode_all = slowly
dataset.ImageFolder(str(here / "things")).load(0)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    """Until the condition holds, or a minute has gone."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("other", ["finishes", "is killed"])
def test_one_process_at_a_time_decodes(
    tmp_path: Path, environment: dict[str, str], said: list[str], other: str
) -> None:
    root = as_folder(tmp_path / "things", FLAT)
    process = subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], env=environment)
    try:
        wait_for((tmp_path / "begun").exists)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(load, root)
            wait_for(lambda: any(line.startswith("Waiting for another run") for line in said))
            if other == "is killed":
                process.kill()
            else:
                (tmp_path / "go").touch()
            assert len(images_in(waiting.result(60))) == 40
        assert (process.wait(60) == 0) == (other == "finishes")
    finally:
        process.kill()
        process.wait()
    assert decoded_anew(said) == (other == "is killed")
    assert left(root) == ["images-32x32x3.bytes"]


# arguments


@pytest.mark.parametrize(
    "argument",
    [
        {"root": None},
        {"root": ""},
        {"size": 0},
        {"channels": 2},
        {"val_size": -0.1},
        {"val_size": 1.5},
        {"test_size": float("nan")},
        {"test_size": -3},
        {"flip": 1.1},
        {"batch_size": 0},
        {"cache": ""},
    ],
    ids=str,
)
def test_argument_out_of_range_is_named(argument: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))} "):
        ImageFolder(**{"root": "somewhere", **argument})  # type: ignore[arg-type]


def test_yaml_gives_every_argument_its_default() -> None:
    node = OmegaConf.to_container(OmegaConf.load(REPO / "conf" / "data" / "image_folder.yaml"))
    assert isinstance(node, dict)
    assert node.pop("_target_") == "experiments.data.image_folder.ImageFolder"
    parameters = inspect.signature(ImageFolder).parameters
    assert node == {name: parameter.default for name, parameter in parameters.items()}


def test_layout_is_even() -> None:
    """Digests know nothing of the names' order: of each half of the names, half is in each half of the rows."""
    names = [f"{i:05}.png" for i in range(4000)]
    first = Layout(names).files[:2000]
    assert abs(sum(name < "02000" for name in first) - 1000) < 4.5 * 16  # hypergeometric: 1000 ± 16


def test_chunks_are_short_in_number_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 1000)
    files = [(str(i), bytes(10 if i < 100 else 900)) for i in range(110)]
    found = list(decoding.chunks(files))
    assert [name for chunk in found for name, _ in chunk] == [name for name, _ in files]
    assert max(map(len, found)) == 32
    assert max(sum(len(content) for _, content in chunk) for chunk in found) <= 1900


def test_few_files_are_in_memory_at_a_time() -> None:
    ahead = 0

    def files():  # type: ignore[no-untyped-def]
        nonlocal ahead
        for number in range(2000):
            ahead += 1
            yield str(number), GOOD

    most = 0
    for name, found in decoding.decode_all(files(), 32, 3, 2):
        assert isinstance(found, decoding.Square)
        most = max(most, ahead - int(name))
    assert most <= 7 * decoding.CHUNK_FILES


# the JPEG copy of CIFAR-10


def test_jpeg_copy_of_cifar10() -> None:
    path = os.environ.get(JPEG_COPY)
    if not path:
        pytest.skip(f"{JPEG_COPY} does not name the archive of CIFAR-10's images as JPEG files")
    data = ImageFolder(path, val_size=0)
    splits = data.load(0)
    assert {name: tuple(split.inputs.shape) for name, split in splits.items()} == {
        "train": (50_000, 3, 32, 32),
        "test": (10_000, 3, 32, 32),
    }
    assert data.class_names[:2] == ("airplane", "automobile") and len(data.class_names) == 10
    assert [torch.bincount(split.targets).tolist() for split in splits.values()] == [[5000] * 10, [1000] * 10]  # type: ignore[arg-type]
    with tarfile.open(path) as archive:
        wanted = {}
        for member in archive:
            if member.name.endswith("/0000.jpg"):
                file = archive.extractfile(member)
                assert file is not None
                wanted[member.name] = np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes()
    assert len(wanted) == 20 and set(wanted.values()) <= images_in(splits)
    means = splits["train"].inputs.float().mean((0, 2, 3)) / 255
    assert torch.allclose(
        means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.005
    )  # the originals' to 0.005
