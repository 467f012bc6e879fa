"""Folders and archives of images: what is read, what is left out and reported, what is stored for the next run."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.data.image_folder import ImageFolder, containers, dataset
from experiments.data.image_folder.decoding import Unreadable
from experiments.data.image_folder.layout import Layout
from runner.data import Split, train_batch
from runner.errors import UserError
from tests.experiments.data.conftest import held, pairs, race, refusal, sizes, stop_at_gate, tar_of, write
from tests.experiments.data.test_decoding import GOOD, encoded, pixels

STORED = ".formula-runner/images-32x32x3.bytes"
KINDS = ("folder", "zip", "tar", "tar.gz", "tar.xz")
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, and so the cache, is a folder of the test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "formula-runner" / "image_folder"


def tree(names: Iterable[str], first: int = 0) -> Files:
    """Return one image per name, each another."""
    return {name: encoded(pixels(number)) for number, name in enumerate(names, first)}


CLASSES = tree(f"train/{label}/{i}.png" for label in ("ant", "bee") for i in range(12))
CLASSES |= tree([f"test/{name[6:]}" for name in list(CLASSES)[::3]], 24)
LABELS = [int("/bee/" in name) for name in CLASSES]
FLAT = tree(f"{i:02}.png" for i in range(40))


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return write(tmp_path / "things", FLAT)


def stored(numbers: Iterable[int], labels: Iterable[int] = ()) -> list[bytes]:
    """Return `pairs` of made-up images as splits hold them."""
    return pairs([pixels(number).transpose(2, 0, 1) for number in numbers], labels)


def make(kind: str, place: Path, files: Files, *more: tuple[str, bytes], cut: int | None = None) -> Path:
    """Write the files as a folder, or as an archive of this suffix up to byte `cut`, and return its path."""
    if kind == "folder":
        return write(place, files)
    path, members = place.with_name(f"{place.name}.{kind}"), [*files.items(), *more]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(*member)
    else:
        path.write_bytes(tar_of(((f"./{name}", content) for name, content in members), kind[4:]))
    path.write_bytes(path.read_bytes()[:cut])
    return path


def load(root: Path, **arguments: Any) -> dict[str, Split]:
    return ImageFolder(str(root), **arguments).load(0)


def images(root: Path, **arguments: Any) -> list[bytes]:
    """Return `pairs` of all splits."""
    return held(*load(root, **arguments).values())


def decoded_files(root: Path) -> list[str]:
    """Return what is in the folder for decoded images beside those of `root`, except the lock."""
    return sorted(path.name for path in (root / ".formula-runner").rglob("*") if path.name != ".lock")


def refused(root: Path, *parts: str, **arguments: Any) -> UserError:
    """Return the refusal of the images, with these parts; nothing decoded is left."""
    error = refusal(lambda: load(root, **arguments), *parts)
    assert decoded_files(root) == []
    return error


def decoded_anew(said: list[str]) -> int:
    """Return how many times images were decoded since the last call."""
    lines, said[:] = [*said], []
    return sum(line.startswith("Decoding") for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_archives_give_the_same_splits(tmp_path, kind):
    data = ImageFolder(str(make(kind, tmp_path / "things", CLASSES)), val_size=5)
    assert data.digest() is None
    splits = data.load(0)
    assert sizes(splits) == {"train": 19, "val": 5, "test": 8}
    assert held(splits["train"], splits["val"]) == stored(range(24), LABELS[:24])
    assert held(splits["test"]) == stored(range(24, 32), LABELS[24:])
    assert data.class_names == ("ant", "bee")

    # whatever the seed, and the folders around everything
    wrapped = {f"some/wrapper/{name}": content for name, content in CLASSES.items()}
    other = ImageFolder(str(make(kind, tmp_path / "other", wrapped)), val_size=5)
    assert torch.equal(other.load(1)["val"].inputs, splits["val"].inputs)
    assert other.class_names == data.class_names and other.digest() == data.digest() is not None


def test_sizes_of_what_is_held_out(flat):
    assert sizes(load(flat, val_size=0.1, test_size=6)) == {"train": 30, "val": 4, "test": 6}
    assert sizes(load(flat, val_size=0, test_size=0)) == {"train": 40}
    assert sizes(load(flat, val_size=0.001, test_size=0)) == {"train": 39, "val": 1}  # one at least


def test_without_classes_there_are_no_targets(tmp_path, flat):
    mixed = write(tmp_path / "mixed", CLASSES | tree(["train/extra.png"], 32))
    for root, split in ((flat, [34, 2, 4]), (mixed, [24, 1, 8])):
        data = ImageFolder(str(root))
        assert [len(part) for part in data.load(0).values()] == split and data.class_names == ()
        assert images(root) == stored(range(sum(split)))


def test_image_keeps_its_split_when_others_are_added(tmp_path):
    before = load(write(tmp_path, FLAT), val_size=10, test_size=10)
    after = load(write(tmp_path, tree(("a.png", "b.png", "c.png", "d.png"), 40)), val_size=10, test_size=10)
    moved = {name: len({*held(before[name])} - {*held(after[name])}) for name in ("val", "test")}
    assert moved["val"] <= 4 and moved["test"] <= 8
    assert held(*after.values()) == stored(range(44))


def test_rows_do_not_follow_the_names():
    """Of each half of the names, half is in each half of the rows."""
    first = Layout([f"{i:05}.png" for i in range(4000)]).files[:2000]
    assert sum(name < "02000" for name in first) == pytest.approx(1000, abs=4.5 * 16)  # hypergeometric


def test_links_are_followed_once_and_what_is_no_image_is_ignored(tmp_path, said):
    other = {"labels.csv": b"a,b", "._00.png": b"x", ".git/00.png": b"x", "__MACOSX/00.png": b"x"}
    real, root = write(tmp_path / "real", FLAT | other), write(tmp_path / "root", {})
    (root / "things").symlink_to(real)
    (real / "loop").symlink_to(root)
    (root / "nowhere.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe.png")
    assert images(root) == stored(range(40))
    assert len(said) == 1  # that they are decoded


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_and_small_files_are_counted_and_named(tmp_path, said, kind, monkeypatch):
    monkeypatch.setattr(containers, "_MAX_BYTES", 10_000)
    small = {"a.png": encoded(pixels(500, 1, 90)), "b.png": encoded(pixels(501, 31, 90))}
    broken = {"05.png": bytes(20_000), "11.png": GOOD[:90], "38.png": b""}
    root = make(kind, tmp_path / "things", FLAT | broken | small)
    usable = images(root)
    assert {*usable} > {*stored({*range(40)} - {5, 11, 38})} and len(usable) == 39
    notes = said[-2:]
    assert (
        "3 of 42 images are left out: 3 cannot be read (05.png: more than 10,000 bytes, 11.png: " in notes[0]
    )
    assert "2 of 39 images are smaller than 32 pixels and are enlarged (a.png, b.png)" in notes[1]
    assert images(root) == usable and said[-2:] == notes  # also where nothing is decoded
    assert load(root, size=1)["train"].inputs.shape[1:] == (3, 1, 1) and "enlarged" not in said[-1]

    # nothing is read beyond the limit
    endless: Any = SimpleNamespace(read=lambda size=-1: bytes(size if size <= 10_001 else -1))  # an error
    assert isinstance(containers._read_limited(endless), Unreadable)


def test_targets_stay_with_their_images_where_some_are_left_out(tmp_path, said):
    stray = tree(["extra/a.png", "b.png", "train.png"])
    broken = dict.fromkeys(list(CLASSES)[::3], b"x")
    kept = [number for number in range(32) if number % 3]
    expected = stored(kept, [LABELS[number] for number in kept])
    assert images(write(tmp_path, CLASSES | stray | broken), val_size=4) == expected
    assert "14 of 35 images are left out: 11 cannot be read (test/ant/0.png: " in said[-1]
    assert "8 more); " in said[-1] and "train/bee" not in said[-1]  # few are named
    assert "3 outside the folders train, val and test (b.png, extra/a.png, train.png)" in said[-1]


def test_encrypted_member_is_left_out(tmp_path, said):
    path = make("zip", tmp_path / "things", FLAT)
    content = bytearray(path.read_bytes())
    for flag in (6, content.index(b"PK\x01\x02") + 8):  # of the member, and in the table of members
        content[flag] |= 1
    path.write_bytes(content)
    assert images(path) == stored(range(1, 40))
    assert "1 cannot be read (00.png: " in said[-1] and "encrypted" in said[-1]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_leaves_nothing_outside_and_the_last_of_a_name_is_taken(tmp_path, kind):
    evil = tree(["../../evil.png", "a/../../evil.png", "/evil.png"], 75)
    again = [("00.png", b"x"), ("01.png", encoded(pixels(78))), ("02.png", b"x"), ("02.png", FLAT["02.png"])]
    root = make(kind, write(tmp_path / "deep" / "er", {}) / "things", FLAT | evil, *again)
    assert images(root) == stored([77, 78, *range(2, 40)])
    assert not list(tmp_path.rglob("evil.png"))


def test_what_has_no_images_for_training_is_refused(tmp_path, flat):
    refused(tmp_path / "none", "no such folder or file")
    refused(flat / "00.png", "expected a folder, a zip")
    for kind in KINDS:
        refused(make(kind, tmp_path / "text", {"a.txt": b"x"}), "contains no images")

    # damaged archives, and images
    refused(make("zip", tmp_path / "cut", FLAT, cut=-400), "cut.zip: expected a folder, a zip")  # no table
    for kind in KINDS[2:]:
        refused(make(kind, tmp_path / "cut", FLAT, cut=-40_000), "is damaged: ")
    container = containers.open_container(make("tar.xz", tmp_path / "a", FLAT))
    names = container.names()
    make("tar.xz", tmp_path / "a", FLAT, cut=-300)  # after it was listed
    refusal(lambda: list(container.contents(names)), "cannot be read or is damaged: ")
    refused(write(tmp_path / "broken", dict.fromkeys(FLAT, b"x")), "none of 40 images")

    # none for training
    only_test = CLASSES | dict.fromkeys(list(CLASSES)[:24], b"x")
    refused(write(tmp_path / "test", only_test), "/train can be used: 24 of 32 images are left out")
    settings = "data.val_size=20 and data.test_size=0.5 leave none of the 40 training images"
    refusal(lambda: load(flat, val_size=20, test_size=0.5), settings)


def test_grey_where_colour_was_asked(tmp_path):
    greys = [pixels(i, channels=1) for i in range(9)]
    write(tmp_path, {f"{i}.png": encoded(grey) for i, grey in enumerate(greys)})
    assert refused(tmp_path, "grey").right == "data.channels=1"
    assert load(tmp_path, channels=1)["train"].inputs.shape[1:] == (1, 32, 32)
    assert images(tmp_path, channels=1) == pairs(greys)
    load(write(tmp_path, {"colour.png": GOOD}))  # some grey among colour are nothing to refuse


def test_decoded_images_are_used_again_until_something_changes(flat, said):
    def decodes(**arguments: Any) -> int:
        load(flat, **arguments)
        return decoded_anew(said)

    assert decodes() and decoded_files(flat) == ["images-32x32x3.bytes"]
    assert not decodes(val_size=3, test_size=0, flip=0.0)
    assert decodes(size=16) and decodes(channels=1)
    (flat / "00.png").write_bytes(encoded(pixels(99)))
    assert decodes() and images(flat) == stored([99, *range(1, 40)])
    (flat / "00.png").unlink()
    assert decodes() and images(flat) == stored(range(1, 40))
    (flat / "39.png").rename(flat / "39_.png")  # the same file, still the last
    assert decodes()
    os.utime(flat / "02.png", (1, 1))
    assert decodes()
    assert decoded_files(flat) == ["images-16x16x3.bytes", "images-32x32x1.bytes", "images-32x32x3.bytes"]


def test_those_of_an_archive_are_in_the_cache(tmp_path, cache, said):
    path = make("zip", tmp_path / "things", FLAT)
    assert images(path) == images(path) == stored(range(40)) and decoded_anew(said) == 1
    make("zip", tmp_path / "things", FLAT | tree(["new.png"], 40))
    assert images(path) == stored(range(41)) and decoded_anew(said)
    assert [file.name[:11] for file in cache.glob("*.bytes")] == ["things.zip-"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["home", "things.zip"]


def test_cache_may_be_chosen_and_shared(tmp_path, flat, said):
    other = write(tmp_path / "other" / flat.name, CLASSES)
    for root, number in ((flat, 40), (other, 32)) * 2:
        assert len(images(root, cache=str(tmp_path / "cache"))) == number
        assert decoded_files(root) == []
    assert decoded_anew(said) == 2


def test_damaged_file_of_decoded_images_is_made_anew(flat):
    load(flat)
    whole = (flat / STORED).read_bytes()
    for damaged in (whole[1:], b"", whole[:-9], bytes(3072) + whole):  # the last is longer
        (flat / STORED).write_bytes(damaged)
        assert images(flat) == stored(range(40)) and (flat / STORED).read_bytes() == whole


def test_splits_are_mapped_and_not_loaded(flat):
    splits, path = load(flat), flat / STORED
    assert sys.platform != "linux" or str(path) in Path("/proc/self/maps").read_text()
    assert len({split.inputs.untyped_storage().data_ptr() for split in splits.values()}) == 1  # one map
    before = path.read_bytes()
    splits["train"].inputs.zero_()
    assert path.read_bytes() == before
    batch = train_batch(ImageFolder(str(flat), batch_size=8), load(flat)["train"], seed=0, step=2)
    assert batch.inputs.shape == (8, 3, 32, 32) and batch.targets is None
    assert -1 <= batch.inputs.min() < batch.inputs.max() <= 1


def test_lack_of_space_is_reported_first_and_a_disk_that_fills_up_meanwhile_leaves_nothing(flat, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
        refused(flat, "12.3 MB", "10.0 MB are free", "data.cache=FOLDER", size=320)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        refused(flat, "cannot write decoded images", "data.cache=FOLDER")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert images(flat) == stored(range(40))


def test_those_of_a_read_only_folder_are_in_the_cache(tmp_path, flat, cache):
    (flat / ".formula-runner").write_text("a file where the folder would be stops root, too")
    load(flat)
    assert list(cache.glob("things-*.bytes"))
    (tmp_path / "blocked").write_text("")
    refused(flat, "cannot write decoded images", cache=str(tmp_path / "blocked"), size=16)


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_one_process_at_a_time_decodes(tmp_path, flat, said, end):
    def slow() -> None:
        decode_all = dataset.decode_all
        dataset.decode_all = lambda *arguments: stop_at_gate(tmp_path) or decode_all(*arguments)
        load(flat)

    race(tmp_path, said, slow, lambda: load(flat), end)
    assert decoded_anew(said) == (end == "is killed")
    assert images(flat) == stored(range(40))
    assert decoded_files(flat) == ["images-32x32x3.bytes"]
