"""Tables of cases in text files, where most of a test is its rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def table(file: Path, title: str, *columns: str) -> pytest.MarkDecorator:
    """Run a test for each row below `[title]` in a file; cells are parted by ` |`, and empty where a row ends."""
    [body] = re.findall(rf"^\[{title}\].*\n((?:.+\n)+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    lines = [[*map(str.strip, re.split(r" +\|(?: |$)", line))] for line in body.splitlines()]
    rows = [[*cells, *[""] * len(columns)][: len(columns)] for cells in lines]
    return pytest.mark.parametrize(columns, rows, ids=lambda cell: cell[:60])
