"""Mosaics: every image in its place, whole titles, and files that are whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.ddpm_cifar import mosaics
from runner import figures
from runner.errors import UserError


def test_a_mosaic_has_every_image_in_its_place() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    pixels = mosaics._mosaic(images, 3, gap=1)
    assert pixels.shape == (5, 11, 3)
    assert pixels[::3, ::4, 1].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert bool((pixels[2] == 255).all()) and bool((pixels[:, 3] == 255).all())


def test_a_title_that_is_longer_than_its_images_are_wide_is_whole() -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    title = "samples and the nearest of 59,500 training images (pixels)"
    with figures.style():
        figure = mosaics.table_of_images(images, (), ["a", "b"], title)
        FigureCanvasAgg(figure).draw()
        written = figure.get_suptitle(), figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert written[0] == title and written[1].x0 >= 0 and written[1].x1 <= figure.bbox.x1


def test_bytes_are_the_nearest_and_stay_in_range() -> None:
    exact = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert mosaics.to_bytes(exact).tolist() == list(range(256))
    assert mosaics.to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    write = Mock(side_effect=[None, None, full, full])
    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(np, "savez", Mock(side_effect=full))
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    for call, name in (
        (mosaics.write_images, "samples"),
        (mosaics.write_mosaic, "grid.png"),
        (mosaics.write_archive, "samples.npz"),
    ):
        with pytest.raises(UserError, match="No space left"):
            call(tmp_path / name, images)
    assert write.call_count == 4 and list(tmp_path.iterdir()) == []
