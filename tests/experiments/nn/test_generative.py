"""The measures of a generative model beside torchmetrics, SciPy and scikit-learn, and in cases known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from experiments.nn import generative
from experiments.nn.generative import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
    two_sample_accuracy,
)
from tests.experiments.nn.helpers import F64, refused


def sets(N: int, M: int, D: int) -> tuple[Tensor, Tensor]:
    """Two overlapping clouds of correlated features, float32."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=draw) / math.sqrt(D)
    real = torch.randn(N, D, generator=draw) @ mix + 1
    fake = 1.1 * torch.randn(M, D, generator=draw) @ mix + 1 + 0.3 * torch.randn(D, generator=draw)
    return real, fake


# Fréchet distance


class AsItIs(nn.Identity):
    """For torchmetrics, to which the features are then given as images."""

    num_features = 0


@pytest.mark.parametrize(("N", "M", "D"), [(60, 45, 8), (20, 15, 48), (60, 15, 30), (15, 60, 30)])
def test_frechet_is_that_of_torchmetrics(N: int, M: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsItIs, "num_features", D)
    reference = FrechetInceptionDistance(feature=AsItIs()).set_dtype(F64)
    real, fake = (x.double() for x in sets(N, M, D))
    reference.update(real, real=True)
    reference.update(fake, real=False)
    assert frechet_distance(real, fake) == pytest.approx(float(reference.compute()), rel=1e-6)


def test_frechet_of_a_shift_is_its_square_whatever_the_rank() -> None:
    for N, D in ((100, 10), (10, 100)):
        x = sets(N, 2, D)[0].double()
        x = torch.cat([x, x, torch.full((N, 3), 0.7)], dim=1)  # features copied, and constant
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(x, x + 3) == pytest.approx(9 * (2 * D + 3), rel=1e-12)


# kernel distance, inception score


def test_kernel_distance_of_unequal_sets_is_the_mean_over_pairs() -> None:
    """Without the diagonals, so without bias."""
    real, fake = (x.double().numpy() for x in sets(9, 14, 5))
    within = [polynomial_kernel(x, degree=3)[~np.eye(len(x), dtype=bool)].mean() for x in (real, fake)]
    expected = sum(within) - 2 * polynomial_kernel(real, fake, degree=3).mean()
    assert kernel_distance(*sets(9, 14, 5)) == pytest.approx(expected, rel=1e-10)


def test_inception_score_of_sure_classes_is_their_number_and_of_ignorance_one() -> None:
    assert inception_score(torch.eye(7), splits=1) == pytest.approx((7, 0))
    assert inception_score(torch.full((20, 5), 0.2)) == pytest.approx((1, 0))
    sure, half = torch.eye(4), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]).repeat(2, 1)  # 4 and 2
    assert inception_score(torch.cat([sure, half]), splits=2) == pytest.approx((3, 1))
    assert inception_score(torch.eye(4), splits=2) == pytest.approx((2, 0))  # each part has its own p(c)
    p = torch.randn(50, 6, dtype=F64).mul(2).softmax(1)
    expected = math.exp(entropy(p, p.mean(0, keepdim=True), axis=1).mean())
    assert inception_score(p, splits=1)[0] == pytest.approx(expected, rel=1e-12)


# neighbours: scikit-learn's search as the reference


def distances_to(x: Tensor, y: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices of the k nearest in y, by brute force in float64."""
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(y.double().numpy())
    return search.kneighbors(x.double().numpy())


def inside(x: Tensor, centres: Tensor, k: int) -> np.ndarray:
    """Which of x lie in which ball up to the k-th neighbour of a centre: (len(x), len(centres)) of bool."""
    radius = distances_to(centres, centres, k + 1)[0][:, -1]  # the first neighbour is the centre itself
    d = np.linalg.norm(x.double().numpy()[:, None] - centres.double().numpy()[None], axis=2)
    return d <= radius


def test_neighbours_are_those_of_scikit_learn() -> None:
    query, reference = sets(30, 41, 6)
    for k in (1, 3, 10):
        found, expected = nearest_neighbours(query, reference, k), distances_to(query, reference, k)
        np.testing.assert_allclose(found.distances, expected[0], rtol=1e-12)
        np.testing.assert_array_equal(found.indices, expected[1])


def test_a_copy_is_at_distance_zero_and_a_near_copy_is_not_even_far_from_the_origin() -> None:
    reference = sets(300, 2, 64)[0].double() / 3 + 1000  # whose squares are not exact in float64
    copies = nearest_neighbours(reference, reference, 1)
    assert torch.equal(copies.indices[:, 0], torch.arange(300)) and not copies.distances.any()
    near = nearest_neighbours(reference + 1e-3, reference, 1)  # √64 × 10⁻³ away
    assert near.distances[:, 0].tolist() == pytest.approx([8e-3] * 300, rel=1e-3)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_count_what_lies_in_balls(k: int) -> None:
    """Three and five neighbours by default, as in the papers."""
    real, fake = sets(50, 40, 4)
    found, within = precision_recall(real, fake, k), inside(fake, real, k)
    precision, recall = within.any(1).mean(), inside(real, fake, k).any(1).mean()
    assert 0 < precision != recall <= 1
    assert found == pytest.approx((precision, recall, 2 / (1 / precision + 1 / recall)))
    assert (precision_recall(real, fake) == found) == (k == 3)
    density, coverage = density_coverage(real, fake, k)
    assert (density, coverage) == pytest.approx((within.sum() / (k * 40), within.any(0).mean()))
    assert 0 < coverage < 1 and (density_coverage(real, fake) == (density, coverage)) == (k == 5)


def test_two_sample_accuracy_is_leave_one_out_over_both_sets() -> None:
    real, fake = sets(40, 40, 4)
    both, label = torch.cat([real, fake]), np.repeat([0, 1], 40)
    right = label[distances_to(both, both, 2)[1][:, 1]] == label
    assert two_sample_accuracy(real, fake) == (right.mean(), right[:40].mean(), right[40:].mean())
    assert 0.5 < right.mean() < 1 and right[:40].mean() != right[40:].mean()


def test_what_is_apart_copied_or_a_single_mode() -> None:
    real, fake = sets(30, 30, 4)
    assert two_sample_accuracy(real, fake + 100) == (1, 1, 1)
    assert two_sample_accuracy(real, real) == (0, 0, 0)
    assert two_sample_accuracy(torch.ones(5, 3), torch.ones(5, 3)) == (0.5, 0.5, 0.5)  # ties count half
    assert precision_recall(real, fake + 100) == (0, 0, 0)
    assert density_coverage(real, fake + 100) == (0, 0)
    collapsed = real[:1].repeat(30, 1)
    assert precision_recall(real, collapsed)[:2] == (1, 1 / 30)
    assert density_coverage(real, collapsed).coverage < 0.5


# all of them


def neighbours(x: Tensor, y: Tensor, **more: Any) -> list[float]:
    return torch.cat(nearest_neighbours(x, y, 3, **more)).flatten().tolist()


# how often each looks at all pairs of two sets of one size
MEASURES = {frechet_distance: 0, kernel_distance: 3, two_sample_accuracy: 4, precision_recall: 3}
MEASURES |= {density_coverage: 2, neighbours: 1}


@pytest.mark.parametrize(("measure", "times"), MEASURES.items())
def test_tiles_and_autocast_change_nothing_and_all_pairs_are_reported(
    measure: Callable[..., Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = sets(9, 9, 6)
    whole = measure(real, fake)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(real, fake) == pytest.approx(whole, rel=1e-12)
    for tile in (1, 4, 9):
        monkeypatch.setattr(generative, "TILE", tile)
        counts: list[int] = []
        done = {"done": counts.append} if times else {}
        assert measure(real, fake, **done) == pytest.approx(whole, rel=1e-9)
        assert sum(counts) == times * 9 * 9 and set(counts) <= {1, 4, 16, 81}


ONES = torch.ones(5, 2)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.ones(5), ONES, r"\(N, D\), got \(5,\)"),
        (ONES, ONES.byte(), "float.*uint8"),
        (ONES, ONES[:0], r"len.*at least [12], got 0"),
        (ONES, torch.ones(5, 3), r"\(N, 2\), got \(5, 3\)"),
        (ONES[:2], torch.tensor([[0, 1], [1, math.nan]]), "finite"),
    ],
)
def test_what_are_no_two_sets_is_refused(
    measure: Callable[[Tensor, Tensor], Any], real: Tensor, fake: Tensor, message: str
) -> None:
    with refused(message):
        measure(real, fake)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda real, fake: precision_recall(real, fake, k=4), r"k .*\[1, other .* = 3\], got 4"),
        (lambda real, fake: density_coverage(real, fake, k=0), r"k .*\[1, other .* = 5\], got 0"),
        (lambda real, fake: nearest_neighbours(real, fake, 5), r"k .*\[1, len\(reference\) = 4\], got 5"),
        (two_sample_accuracy, r"fake.*\(6, 3\), got \(4, 3\)"),
        (lambda *_: inception_score(torch.ones(4, 3), 1), "probabilities.*sum"),
        (lambda *_: inception_score(torch.tensor([[1.5, -0.5]]), 1), "probabilities.*negative"),
        (lambda *_: inception_score(torch.eye(3)[0], 1), "probabilities.*N, C"),
        (lambda *_: inception_score(torch.eye(3)), r"splits.*\[1, len.* = 3\], got 10"),
    ],
)
def test_counts_and_probabilities_that_do_not_fit_are_refused(
    call: Callable[[Tensor, Tensor], Any], message: str
) -> None:
    with refused(message):
        call(*sets(6, 4, 3))
