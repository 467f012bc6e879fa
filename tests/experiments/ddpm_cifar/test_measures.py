"""How many images are measured, and the distances between real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from experiments.ddpm_cifar import measures
from tests.experiments.conftest import draw_images
from tests.experiments.ddpm_cifar.conftest import built


def test_an_untrained_network_is_measured_by_fewer_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_MAX_UNTRAINED", 7)
    task, run = built(root, samples=11)
    numbers = []
    for trains, step, eval_limit in (
        (True, 0, None),
        (True, 1, None),
        (False, 0, None),  # mode=eval
        (True, 1, 1),  # batches of 8
        (True, 0, 1),
    ):
        run.tracker.trains, run.step, run.eval_limit = trains, step, eval_limit
        numbers.append((task.measures.num_samples, task.measures.num_images("val")))
    assert numbers == [(7, 7), (11, 8), (11, 8), (8, 8), (7, 7)]

    # the last measures stay with the number of their images
    values = {split: task.measures.measure(split) for split in ("val", "test")}
    assert task.measures.last == {split: (7, values[split]) for split in ("val", "test")}


@pytest.mark.parametrize(
    ("train", "samples", "split", "numbers", "enough"),
    [
        (14, 12, "train", ["12", "2"], 7),
        (10, 12, "test", ["12", "10"], 10),
        (11, 6, "train", ["6", "5"], None),
    ],
)
def test_distances_between_real_images_that_are_left_out_are_explained_once(
    tmp_path: Path,
    train: int,
    samples: int,
    split: str,
    numbers: list[str],
    enough: int | None,
    said: list[str],
) -> None:
    root = draw_images(tmp_path, {"train": train, "val": 6, "test": 12})
    task, _ = built(root, samples=samples)
    for _ in range(2):
        assert "fd_pixels_real" not in task.measures.measure(split)
    [line] = [text for text in said if "left out" in text]
    assert line.startswith(f"fd_pixels_real and kd_pixels_real of {split} ")
    assert re.findall(r" (\d+)\b", line) == numbers
    assert line.endswith(f"task.samples={enough}." if enough else "more training images are needed.")

    # the advice is right, and no image is compared with itself
    if enough:
        assert built(root, samples=enough)[0].measures.measure(split)["fd_pixels_real"] > 0


def test_the_bound_is_of_the_same_images_whatever_the_batch(root: Path) -> None:
    (one, _), (other, _) = built(root, noisy=True, sample_batch=2), built(root, noisy=True, sample_batch=5)
    whole, parts = (task.measures.bound("test", 5) for task in (one, other))
    torch.testing.assert_close(whole.total, parts.total, rtol=1e-4, atol=1e-4)
    assert whole.terms.shape == (5, 25) and not torch.equal(whole.total[0], whole.total[1])
