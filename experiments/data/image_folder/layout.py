"""Which split, class and row the images of a folder or an archive have, by their names alone."""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

SPLITS = ("train", "val", "test")  # folders of these names are the splits, where there is a `train`


class Layout:
    """The place of each image file; `outside` are those outside all splits.

    Folders that hold everything do not count, so a folder and an archive of it are laid out alike.
    """

    def __init__(self, names: Sequence[str]):
        common = posixpath.commonpath([posixpath.dirname(name) for name in names])
        self._prefix = f"{common}/" if common else ""
        paths = [self._parts(name) for name in names]
        self._has_splits = any(path[0] == "train" and len(path) > 1 for path in paths)
        self.outside = sorted(name for name in names if self.split_of(name) is None)
        self.files = sorted((name for name in names if self.split_of(name) is not None), key=self._rank)

    def _parts(self, name: str) -> list[str]:
        """Return the folders below the common one, and the file."""
        return name[len(self._prefix) :].split("/")

    def split_of(self, name: str) -> str | None:
        """Return the split of an image, or None outside all, where there are folders for them."""
        if not self._has_splits:
            return "train"
        folder, *rest = self._parts(name)
        return folder if folder in SPLITS and rest else None

    def _class_of(self, name: str) -> str | None:
        """Return the first folder below the split's own, if there is one."""
        folders = self._parts(name)[int(self._has_splits) : -1]
        return folders[0] if folders else None

    def _rank(self, name: str) -> tuple[int, bytes]:
        """Order by split, and within a split by a digest: it looks random and never changes."""
        split, text = self.split_of(name), "/".join(self._parts(name))
        assert split is not None
        return SPLITS.index(split), hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    def about(self, names: Sequence[str]) -> dict[str, Any]:
        """Return how many of these images each split has, the classes, and the class of each image."""
        counts = Counter(self.split_of(name) for name in names)
        labels = [self._class_of(name) for name in names]
        classes = sorted({label for label in labels if label is not None}) if None not in labels else []
        number = {label: index for index, label in enumerate(classes)}
        return {
            "splits": {split: counts[split] for split in SPLITS},
            "class_names": classes,
            "targets": [number[label] for label in labels if label is not None] if classes else None,
        }
