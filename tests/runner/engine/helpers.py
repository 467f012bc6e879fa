"""What the tests of runs share: the files of a run folder read back, and its weights compared bit for bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.engine import checkpoint


def summary(folder: Path) -> dict[str, Any]:
    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def rows(folder: Path, split: str | None = None) -> list[dict[str, str]]:
    """Return the rows of `metrics.csv`, of a split or all."""
    return [row for row in table(folder / "metrics.csv") if split in (None, row["split"])]


def parts(folder: Path, name: str = "last") -> dict[str, Any]:
    """Return the parts of a run's checkpoint."""
    return checkpoint.load(folder / "checkpoints" / f"{name}.pt")


def weights(folder: Path, variant: str = "") -> dict[str, Tensor]:
    return parts(folder)["model"][variant]


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Assert that nested dicts and lists of tensors and plain values are equal to the last bit."""
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), f"{path}: {(one - other).abs().max()}"
    elif isinstance(one, list | tuple):
        assert_equal(dict(enumerate(one)), dict(enumerate(other)), path)
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    else:
        assert one == other, path
