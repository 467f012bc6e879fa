"""How many images are measured, the distances between real ones, and the paper's numbers beside ours."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from experiments.ddpm_cifar import measures
from experiments.ddpm_cifar.paper import _TABLE_4, beside_the_paper, rate_distortion_table, summary_table
from experiments.nn.diffusion import Bound, rate_distortion
from tests.experiments.conftest import draw_images
from tests.experiments.ddpm_cifar.conftest import built


def test_an_untrained_network_is_measured_by_fewer_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_MAX_UNTRAINED", 7)
    task, run = built(root, samples=11)
    for trains, step, eval_limit, numbers in (
        (True, 1, None, (11, 8)),
        (False, 0, None, (11, 8)),  # mode=eval
        (True, 1, 1, (8, 8)),  # batches of 8
        (True, 0, None, (7, 7)),
        (True, 0, 1, (7, 7)),
    ):
        run.tracker.trains, run.step, run.eval_limit = trains, step, eval_limit
        assert (task.measures.num_samples, task.measures.num_images("val")) == numbers

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
    train: int,
    samples: int,
    split: str,
    numbers: list[str],
    enough: int | None,
    tmp_path: Path,
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


# beside the paper


def bound(B: int, T: int) -> Bound:
    """Made-up terms of B images."""
    draw = torch.Generator().manual_seed(0)
    terms, prior = torch.rand(B, T, generator=draw), torch.rand(B, generator=draw)
    return Bound(terms.sum(1) + prior, terms, prior, torch.rand(B, T, generator=draw))


@pytest.mark.parametrize(("T", "comparable"), [(1000, True), (25, False)])
def test_table_4_has_every_tenth_step_and_the_papers_where_t_is_the_same(T: int, comparable: bool) -> None:
    rate, rmse = rate_distortion(bound(3, T))
    _, rows = rate_distortion_table(rate, rmse)
    assert [row[0] for row in rows] == [max(1, round(tenth * T / 10)) for tenth in range(1, 11)]
    for steps, here, theirs, error, their_error in rows:
        assert (here, error) == (float(rate[steps - 1]), float(rmse[steps - 1]))
        assert (theirs, their_error) == (_TABLE_4[steps] if comparable else (None, None))


def test_the_papers_numbers_stand_beside_ours() -> None:
    its = bound(5, 10)
    measured = {"train": (60, {"fid": 5.0, "is": 9.0}), "test": (50, {"fid": 7.0, "recall": 0.5})}
    _, rows = summary_table({"train": its, "test": its}, measured)

    # bits per dimension with their standard error, and their two parts
    assert [row[4] for row in rows[:6]] == [3.72, None, None, 3.75, 1.78, 1.97]
    bits, rate, distortion = rows[3:6]
    assert bits[2] == pytest.approx(rate[2] + distortion[2])
    assert distortion[2] == pytest.approx(float(its.terms[:, 0].mean()))
    assert bits[3] == pytest.approx(float(its.total.std()) / math.sqrt(5))
    assert math.isnan(summary_table({"test": bound(1, 10)}, {})[1][0][3])

    # measures with the images behind them, and FID with the paper's of its split
    assert rows[6:] == [
        ["fid, train", 60, 5.0, None, 3.17],
        ["is, train", 60, 9.0, None, 9.46],
        ["fid, test", 50, 7.0, None, 5.24],
        ["recall, test", 50, 0.5, None, None],
    ]

    # as text, what the paper has
    lines = beside_the_paper(rows).splitlines()
    assert len(lines) == 1 + 7 and re.search(r"fid, test +7\.0000 +paper 5\.24", lines[-1])
