"""How far apart two sets of feature vectors are: the measures of a generative model, from their formulas.

    N samples of D features: x real, y fake; μ mean, S covariance; N_k(x) the ball around x up to its k-th
    nearest neighbour within x's own set, x itself left out

All is float64, because the distances are small differences of large numbers; a device that has none (MPS) is
spared and the CPU computes. Matrices of N × N are never whole: they come in tiles, so 50,000 samples fit anywhere.
Where a measure takes `done`, it is called after each tile with the number of pairs of samples in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.nn.checks import at_least, floating, shaped, within

Done = Callable[[int], object] | None

TILE = 2048  # rows and columns of a tile, 32 MiB
ROUNDING = 16 * torch.finfo(torch.float64).eps  # what is left of ‖x − y‖² / (‖x‖² + ‖y‖²) where x = y


class TwoSample(NamedTuple):
    """Shares of samples that are recognised as what they are: of all, of the real, of the fake."""

    accuracy: float
    real: float
    fake: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: fakes that could be real, reals that could be faked, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


class DensityCoverage(NamedTuple):
    """Density, 1 in expectation for equal distributions and unbounded; coverage in [0, 1]."""

    density: float
    coverage: float


class Neighbours(NamedTuple):
    """Per query, nearest first: Euclidean distances (Q, k) float64 and indices (Q, k) int64."""

    distances: Tensor
    indices: Tensor


@torch.no_grad()
def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ_x − μ_y‖² + tr(S_x + S_y − 2 (S_x S_y)^½) of (N, D) and (M, D): Heusel et al. 2017, eq. 6.

    With S = RᵀR, the eigenvalues of S_x S_y are those of (R_x R_yᵀ)(R_x R_yᵀ)ᵀ, so the last trace is the sum of
    the singular values of R_x R_yᵀ: real whatever the rank, and no larger than min(N, D) × min(M, D).

    Raises:
        ValueError: the sets are not matrices of equal width, too small, or not finite.
    """
    real, fake = _matched(2, real=real, fake=fake)
    shift = mean(real) - mean(fake)  # (D,)
    R_x, R_y = _root_of_covariance(real), _root_of_covariance(fake)
    # LAPACK's bidiagonal method on the CPU: the Jacobi sweeps that CUDA prefers are slow at this size
    overlap = torch.linalg.svdvals((R_x @ R_y.T).cpu()).sum()
    distance = shift.square().sum() + R_x.square().sum() + R_y.square().sum()
    return max(0.0, float(distance) - 2 * float(overlap))


def mean(x: Tensor) -> Tensor:
    """(N, D) → (D,) in float64."""
    return torch.stack([block.double().sum(0) for block in x.split(TILE)]).sum(0) / len(x)


def _root_of_covariance(x: Tensor) -> Tensor:
    """R with RᵀR = S, the unbiased covariance of x (N, D): (min(N, D), D), by QR over blocks of rows.

    The covariance itself is not formed: squaring would cost half of the digits.
    """
    N, D = x.shape
    centre, R = mean(x), x.new_empty(0, D, dtype=torch.float64)
    for block in x.split(max(TILE, D)):
        R = torch.cat([R, (block.double() - centre) / (N - 1) ** 0.5])
        if len(R) > D:
            R = torch.linalg.qr(R, mode="r")[1]
    return R


@torch.no_grad()
def kernel_distance(real: Tensor, fake: Tensor, done: Done = None) -> float:
    """Return the unbiased MMD² of (N, D), (M, D): Gretton et al. 2012, eq. 3; kernel of Bińkowski et al. 2018, sec. 4.

    Without bias, so around 0 for equal distributions, and negative as often as not. N² + M² + N M pairs.

    Raises:
        ValueError: as `frechet_distance`.
    """
    real, fake = _matched(2, real=real, fake=fake)
    between = _kernel_sum(real, fake, done) / (len(real) * len(fake))
    return _mean_kernel_within(real, done) + _mean_kernel_within(fake, done) - 2 * between


def _cubic_kernel(dot: Tensor, D: int) -> Tensor:
    """k(x, y) = (x·y / D + 1)³ from the products x·y."""
    return (dot / D + 1).pow(3)


def _kernel_sum(x: Tensor, y: Tensor, done: Done) -> float:
    """Σ_i Σ_j k(x_i, y_j)."""
    D = x.shape[1]
    return sum(float(_cubic_kernel(a.double() @ b.double().T, D).sum()) for _, _, a, b in _tiles(x, y, done))


def _mean_kernel_within(x: Tensor, done: Done) -> float:
    """Return the mean of k(x_i, x_j) over i ≠ j."""
    N, D = x.shape
    diagonal = sum(float(_cubic_kernel(block.double().square().sum(1), D).sum()) for block in x.split(TILE))
    return (_kernel_sum(x, x, done) - diagonal) / (N * (N - 1))


@torch.no_grad()
def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(c|x) ‖ p(c))) of class probabilities (N, C): Salimans et al. 2016, sec. 4.

    Mean and standard deviation over `splits` equal parts of the set in its order, as the score is reported.

    Raises:
        ValueError: rows that are no distributions, or fewer of them than parts.
    """
    shaped("probabilities", probabilities, "N", "C")
    within(1, len(probabilities), closed=True, term="len(probabilities)", splits=splits)
    p = exact(probabilities).double()
    if not bool((p >= 0).all()) or not torch.allclose(p.sum(1), p.new_ones(()), atol=1e-4):
        raise ValueError("probabilities must be rows that are not negative and sum to 1")
    parts = p.tensor_split(splits)  # (N / splits, C) each
    nats = [(torch.xlogy(q, q) - torch.xlogy(q, q.mean(0))).sum(1).mean() for q in parts]
    scores = torch.stack(nats).exp()
    return float(scores.mean()), float(scores.std(correction=0))


@torch.no_grad()
def two_sample_accuracy(real: Tensor, fake: Tensor, done: Done = None) -> TwoSample:
    """How well each sample's nearest neighbour tells which set it is from: Lopez-Paz & Oquab 2017, sec. 3.

    Leave-one-out 1-NN over both (N, D) together. 0.5: no telling apart, which is best; 1: apart; 0: copies. A
    neighbour in each set at the same distance counts half. The sets have equal size, or 0.5 would not be chance.
    (N + M)² pairs.

    Raises:
        ValueError: as `frechet_distance`, or the sets differ in size.
    """
    real, fake = _matched(2, real=real, fake=fake)
    shaped("fake", fake, *real.shape)
    of_real, of_fake = (_recognised(own, other, done) for own, other in ((real, fake), (fake, real)))
    return TwoSample((of_real + of_fake) / 2, of_real, of_fake)


def _recognised(own: Tensor, other: Tensor, done: Done) -> float:
    """Return the share of `own` whose nearest neighbour, itself left out, is in `own`."""
    inside = nearest(own, own, 1, leave_out_self=True, done=done)[0]
    outside = nearest(own, other, 1, done=done)[0]
    return float(((inside < outside).double() + (inside == outside).double() / 2).mean())


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, k: int = 3, done: Done = None) -> PrecisionRecall:
    """Improved precision and recall of (N, D) and (M, D): Kynkäänniemi et al. 2019, eqs 1 and 2.

    Precision is the share of fakes within ∪ N_k(x), recall that of reals within ∪ N_k(y); F1 their harmonic
    mean. Outliers among the reals have large balls, so noise can have a high precision: read the two together.
    N² + M² + N M pairs.

    Raises:
        ValueError: as `frechet_distance`, or k is not in [1, size − 1].
    """
    real, fake = _matched(2, real=real, fake=fake)
    around_real, around_fake = _radii(real, k, done), _radii(fake, k, done)
    could_be_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    could_be_faked = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, x, y in _tiles(real, fake, done):
        d = _squared_distances(x, y)
        could_be_real[columns] |= (d <= around_real[rows, None]).any(0)
        could_be_faked[rows] |= (d <= around_fake[columns]).any(1)
    precision, recall = float(could_be_real.double().mean()), float(could_be_faked.double().mean())
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return PrecisionRecall(precision, recall, f1)


@torch.no_grad()
def density_coverage(real: Tensor, fake: Tensor, k: int = 5, done: Done = None) -> DensityCoverage:
    """Density and coverage of (N, D) and (M, D): Naeem et al. 2020, sec. 3.

    Density is the number of balls N_k(x) that a fake lies in, over k; coverage the share of balls with a fake in.
    N² + N M pairs.

    Raises:
        ValueError: as `frechet_distance`, or k is not in [1, N − 1].
    """
    real, fake = _matched(2, real=real, fake=fake)
    around_real = _radii(real, k, done)
    fakes_within = torch.zeros(len(real), dtype=torch.int64, device=real.device)
    for rows, _, x, y in _tiles(real, fake, done):
        fakes_within[rows] += (_squared_distances(x, y) <= around_real[rows, None]).sum(1)
    density = float(fakes_within.sum()) / (k * len(fake))
    return DensityCoverage(density, float((fakes_within > 0).double().mean()))


@torch.no_grad()
def nearest_neighbours(query: Tensor, reference: Tensor, k: int, done: Done = None) -> Neighbours:
    """Find the k samples of reference (N, D) that are nearest to each of query (Q, D). Q N pairs.

    Raises:
        ValueError: as `frechet_distance`, or k is not in [1, N].
    """
    query, reference = _matched(1, query=query, reference=reference)
    within(1, len(reference), closed=True, term="len(reference)", k=k)
    squares, indices = nearest(query, reference, k, done=done)
    return Neighbours(squares.sqrt(), indices)


def _radii(x: Tensor, k: int, done: Done) -> Tensor:
    """Return the squared radius of N_k(x) for each of x: (N,)."""
    within(1, len(x) - 1, closed=True, term="other samples", k=k)
    return nearest(x, x, k, leave_out_self=True, done=done)[0][:, -1]


def nearest(
    x: Tensor, y: Tensor, k: int, leave_out_self: bool = False, done: Done = None
) -> tuple[Tensor, Tensor]:
    """Squared distances (N, k), ascending, and indices (N, k) of each row's nearest in y; its own left out."""
    squares = x.new_full((len(x), k), torch.inf, dtype=torch.float64)
    indices = x.new_zeros(len(x), k, dtype=torch.int64)
    for rows, columns, a, b in _tiles(x, y, done):
        d = _squared_distances(a, b)
        if leave_out_self and rows == columns:
            d.fill_diagonal_(torch.inf)
        d, index = d.topk(min(k, d.shape[1]), largest=False)
        squares[rows], order = torch.cat([squares[rows], d], dim=1).topk(k, largest=False)
        indices[rows] = torch.cat([indices[rows], index + columns.start], dim=1).gather(1, order)
    return squares, indices


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² (N, M) in float64 by one product; what is below its rounding error is 0, as of copies."""
    x, y = x.double(), y.double()
    norms = x.square().sum(1)[:, None] + y.square().sum(1)  # (N, M)
    d = torch.addmm(norms, x, y.T, alpha=-2)
    return d.masked_fill_(d <= ROUNDING * norms, 0)


def _tiles(x: Tensor, y: Tensor, done: Done = None) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """All pairs of blocks of rows of x and y: where they are, and the blocks; `done` gets their number of pairs."""
    for i in range(0, len(x), TILE):
        for j in range(0, len(y), TILE):
            a, b = x[i : i + TILE], y[j : j + TILE]
            yield slice(i, i + TILE), slice(j, j + TILE), a, b
            if done is not None:
                done(len(a) * len(b))


def _matched(least: int, **sets: Tensor) -> list[Tensor]:
    """Two sets of `least` or more feature vectors on a device that has float64, checked."""
    width: int | str = "D"
    for name, features in sets.items():
        floating(**{name: features})
        shaped(name, features, "N", width)
        at_least(least, **{f"len({name})": len(features)})
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} must be finite: it holds NaN or infinite features")
        width = features.shape[1]
    return [exact(features) for features in sets.values()]


def exact(x: Tensor) -> Tensor:
    """x where float64 can be computed: MPS has none."""
    return x.cpu() if x.device.type == "mps" else x
