"""Figures of the trained network, which do not depend on the batch, and the mosaics that they are made of."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.ddpm_cifar import figures, mosaics, progress
from experiments.ddpm_cifar.mosaics import to_bytes
from runner import figures as plots
from runner.errors import UserError
from tests.experiments.conftest import IMAGE_SIZE, T
from tests.experiments.ddpm_cifar.conftest import MEASURES, built


@pytest.mark.parametrize("steps", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_pictures_show_the_same_whatever_the_batch_and_keep_to_it(
    root: Path, steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(sample_batch: int) -> dict[str, np.ndarray[Any, Any]]:
        """Draw the reverse process with a network that takes no batch of more than 7."""
        task, run = built(root, noisy=True, picture_steps=steps, sample_batch=sample_batch)
        forward = task.network.forward

        def crowded(x: Tensor, t: Tensor) -> Tensor:
            if len(x) > 7:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(x, t)

        monkeypatch.setattr(task.network, "forward", crowded)
        figures.draw_reverse(run, task.sampling, task.picture_steps)
        figures.draw_interpolation(run, task.sampling, task.picture_steps)
        assert run.frames["chain"] == task.picture_steps + 1 + 12
        return {
            f"{name} {i}": np.asarray(axes.images[0].get_array()).astype(int)
            for name, figure in run.figures.items()
            for i, axes in enumerate(figure.axes)
        }

    one, other = drawn(7), drawn(3)
    assert set(one) == {"chain 0", "progressive 0", "shared 0", "shared 1", "interpolation 0"}
    for name in one:
        assert abs(one[name] - other[name]).max() <= 1 and one[name].std() > 10, name
    with pytest.raises(UserError) as error:
        drawn(8)
    assert error.value.right == "task.sample_batch=4"


def test_an_interpolation_of_an_image_with_itself_does_not_change_with_lambda(root: Path) -> None:
    task, run = built(root, picture_steps=5)
    ends = run.splits["test"].inputs[:1].float().div(127.5).sub(1).repeat(2, 1, 1, 1)
    weights = torch.linspace(0, 1, 3).view(-1, 1, 1, 1)
    for t in (-1, 6, T - 1):
        mixed = figures._mixture(task.sampling, ends, weights, t, 5)
        assert mixed.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert int((mixed.int() - mixed[:1].int()).abs().max()) <= 1
    assert torch.equal(figures._mixture(task.sampling, ends, weights, -1, 5)[:1], to_bytes(ends[:1]))


def test_the_table_of_steps_has_the_measures_of_each_and_of_real_images(root: Path) -> None:
    task, run = built(root, noisy=True)
    figures.draw_steps(run, task.sampling, task.measures, (25, 5))
    header, rows = run.tables["steps"]
    few, many, real = (dict(zip(header, row, strict=True)) for row in rows)
    assert (few["steps"], many["steps"], real["steps"]) == (5, 25, "real images")
    values = task.measures.measure("test")  # in 5 steps, as usual
    assert set(header) >= MEASURES and not {"fd_pixels_real", "kd_pixels_real"} & set(header)
    assert all(few[name] == pytest.approx(values[name]) for name in MEASURES)
    assert many["fd_pixels"] != pytest.approx(few["fd_pixels"])
    assert real["fd_pixels"] == values["fd_pixels_real"] and real["recall"] is None


def test_learning_is_drawn_from_two_evaluations_on(root: Path) -> None:
    _, run = built(root)
    images = torch.zeros(8, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    figures.draw_learning(run, [0], [images])
    assert not run.figures
    figures.draw_learning(run, list(range(25)), [images] * 25)
    labels = [label.get_text() for label in run.figures["learning"].axes[0].get_yticklabels()]
    assert len(labels) == 10 and labels[0] == "step 0" and labels[-1] == "step 24"


def test_all_that_takes_long_has_a_bar_that_ends_full(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[str, int, list[int]]] = []

    @contextlib.contextmanager
    def bar(total: int, desc: str, **_: object) -> Iterator[SimpleNamespace]:
        bars.append((desc, total, []))
        yield SimpleNamespace(update=bars[-1][2].append)

    task, run = built(root, picture_steps=2, eval_steps=(3,), bits_images=1, final_bits_images=1)
    monkeypatch.setattr(progress, "tqdm", bar)
    task.eval("val")
    task.after(run)
    assert all(sum(parts) == total for _, total, parts in bars), bars
    labels = " ".join(label for label, _, _ in bars)
    for words in (
        *("loss of val", "samples by ddim", "features of 8 images of val", "features of 8 samples"),
        *("measures of 8 images", "distances between 8 real images", "bits/dim of", "the reverse process"),
        "the nearest of 40 training images",
    ):
        assert words in labels, words
    assert {"steps", "numbers"} <= set(run.tables) and "steps" in run.figures


# mosaics


def test_a_mosaic_has_every_image_in_its_place() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    pixels = mosaics._mosaic(images, 3, gap=1)
    assert pixels.shape == (5, 11, 3)
    assert pixels[::3, ::4, 1].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert bool((pixels[2] == 255).all()) and bool((pixels[:, 3] == 255).all())


def test_a_title_that_is_longer_than_its_images_are_wide_is_whole() -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    title = "samples and the nearest of 59,500 training images (pixels)"
    with plots.style():
        figure = mosaics.table_of_images(images, (), ["a", "b"], title)
        figure.canvas.draw()
        box = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert figure.get_suptitle() == title and box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_bytes_are_the_nearest_and_stay_in_range() -> None:
    exact = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert to_bytes(exact).tolist() == list(range(256))
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


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
