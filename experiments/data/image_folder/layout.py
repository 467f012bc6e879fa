"""Which split, class and row the images of a folder or an archive have, by their names alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

SPLITS = ("train", "val", "test")  # folders of these names are what they say, where there is a `train`


class Layout:
    """The place of each image file; those outside all splits have none.

    Folders around everything mean nothing, so a folder and an archive of it are laid out alike.
    """

    def __init__(self, names: Sequence[str]):
        self.prefix = common_folder(names)
        self.has_splits = any(self.parts(name)[0] == "train" and len(self.parts(name)) > 1 for name in names)
        placed = [name for name in names if self.split_of(name) is not None]
        self.outside = sorted(name for name in names if self.split_of(name) is None)
        self.files = sorted(placed, key=self.rank)

    def parts(self, name: str) -> list[str]:
        """The folders below the common one, and the file."""
        return name[len(self.prefix) :].split("/")

    def split_of(self, name: str) -> str | None:
        """The split of an image; None outside all, where there are folders for them."""
        if not self.has_splits:
            return "train"
        folder, *rest = self.parts(name)
        return folder if folder in SPLITS and rest else None

    def class_of(self, name: str) -> str | None:
        """The first folder in the split's own, if there is one."""
        folders = self.parts(name)[int(self.has_splits) : -1]
        return folders[0] if folders else None

    def rank(self, name: str) -> tuple[int, bytes]:
        """Splits one after the other, and in each an order that looks like chance and never changes."""
        split, text = self.split_of(name), "/".join(self.parts(name))
        assert split is not None
        return SPLITS.index(split), hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    def about(self, kept: Sequence[str]) -> dict[str, Any]:
        """How many of the images that are kept each split has, the classes, and the class of each image."""
        counts = Counter(self.split_of(name) for name in kept)
        classes = [self.class_of(name) for name in kept]
        names = sorted({name for name in classes if name is not None}) if None not in classes else []
        number = {name: index for index, name in enumerate(names)}
        return {
            "splits": {split: counts[split] for split in SPLITS},
            "class_names": names,
            "targets": [number[name] for name in classes if name is not None] if names else None,
        }


def common_folder(names: Sequence[str]) -> str:
    """The folders that all names begin with: "a/b/", or ""."""
    *folders, _ = names[0].split("/")
    prefix = ""
    for folder in folders:
        longer = f"{prefix}{folder}/"
        if not all(name.startswith(longer) for name in names):
            break
        prefix = longer
    return prefix
