"""Properties of position encodings, each as a function that returns the number to compare with a tolerance.

    PE(p + k) = M_k PE(p)                                        Vaswani et al. 2017, §3.5, last paragraph   (1)
    PE(p) · PE(q) = Σ_i cos((p − q) θ_i)        ‖PE(p)‖² = D/2                                               (2)
    ‖R_m x‖ = ‖x‖        R_m R_n = R_{m+n}        R_m block-diagonal: Su et al. 2021 (RoFormer), eq. 15      (3)
    ⟨R_m q, R_n k⟩ = ⟨R_{m−n} q, k⟩: a function of m − n                                       ibid., eq. 16 (4)
    attention without positions permutes with its tokens: f(P X) = P f(X)                                    (5)

The closed forms here are written with Python's `math`, one number at a time, so that they share no line with what
they test. Encodings are arguments, so that the tests can try a broken one.

How exact a number can be follows from its dtype's unit roundoff u = ε/2 (Higham 2002, §2.2), see `table_tolerance`
and `rotation_tolerance`.

Letters in shapes: L length, D size, S starts, W window, H heads, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from experiments.nn.exactness import largest, unit_roundoff
from experiments.nn.positions import layout_permutation
from experiments.nn.rotation import Layout, rotate

Rotary = Callable[[Tensor, Tensor], Tensor]  # x (1, 1, L, D) and positions (L,) → x rotated

# θ_i, p θ_i and their sines and cosines, in float64: the exponent's rounding is multiplied by ln 10⁴ ≈ 9 in the
# power, on both sides of a comparison; relative to the angle, which is at most the position
_ANGLE_ROUNDINGS = 24


def _angle_tolerance(last: int) -> float:
    """Return how far angles in float64 may be apart at position `last`, in radians."""
    return _ANGLE_ROUNDINGS * unit_roundoff(torch.float64) * last


def table_tolerance(dtype: torch.dtype, last: int) -> float:
    """Return how far a sine or cosine of a float64 angle, rounded once, may be off up to position `last`."""
    return unit_roundoff(dtype) + _angle_tolerance(last)


def rotation_tolerance(dtype: torch.dtype, last: int) -> float:
    """Return how far a rotated vector may be off, relative to its norm, up to position `last`.

    x_a cos − x_b sin has three roundings in each term, (1 + u)³: table, product, sum. By Cauchy-Schwarz that is
    3u ‖(x_a, x_b)‖ for each of the two, 3√2 u for the pair. Half precision is computed in float32, and its
    result rounded once.
    """
    computed = dtype if dtype == torch.float64 else torch.float32
    last_rounding = 0.0 if dtype == computed else unit_roundoff(dtype)
    return 3 * math.sqrt(2) * unit_roundoff(computed) + last_rounding + _angle_tolerance(last)


# absolute


def sinusoids(length: int, d_model: int) -> Tensor:
    """Compute PE of positions 0 … length − 1 from the formula: (L, D) float64."""
    theta = [10000.0 ** (-2 * (c // 2) / d_model) for c in range(d_model)]
    wave = [math.cos if c % 2 else math.sin for c in range(d_model)]
    rows = [[wave[c](p * theta[c]) for c in range(d_model)] for p in range(length)]
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def table_error(
    encoding: nn.Module, expected: Tensor, dtype: torch.dtype, device: torch.device | None = None
) -> float:
    """Return max |PE − closed form| (L, D), where PE is what the encoding adds to zeros of the dtype."""
    zeros = torch.zeros(1, *expected.shape, dtype=dtype, device=device)
    return float((encoding(zeros)[0].cpu().double() - expected).abs().max())


def shift_matrix(k: int, d_model: int) -> Tensor:
    """Compute M_k of equation (1), (D, D) float64: a rotation by k θ_i per pair, sine and cosine in this order."""
    matrix = torch.zeros(d_model, d_model, dtype=torch.float64)
    for a in range(0, d_model, 2):
        angle = k * 10000.0 ** (-a / d_model)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix[a : a + 2, a : a + 2] = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    return matrix


def shift_error(table: Tensor, steps: Sequence[int]) -> float:
    """Return max |PE(p + k) − M_k PE(p)| of a table (L, D) over all p and the given k, equation (1)."""
    errors = [table[k:] - table[:-k] @ shift_matrix(k, table.shape[1]).t() for k in steps]
    return largest(float(error.abs().max()) for error in errors)


def similarity_error(table: Tensor) -> float:
    """Return max |PE(p) · PE(q) − Σ_i cos((p − q) θ_i)| over D/2, all p and q of a table (L, D), equation (2)."""
    L, D = table.shape
    theta = [10000.0 ** (-2 * i / D) for i in range(D // 2)]
    by_offset = [sum(math.cos(k * t) for t in theta) for k in range(L)]
    p = torch.arange(L)
    expected = torch.tensor(by_offset, dtype=torch.float64)[(p[:, None] - p).abs()]  # (L, L)
    return float((table @ table.t() - expected).abs().max()) / (D / 2)


# rotary


def rotation_matrix(position: int, dim: int, base: float, layout: Layout) -> Tensor:
    """Compute R_m of RoFormer's eq. 15, (D, D) float64, with the pairs where the layout has them."""
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + dim // 2)
        angle = position * base ** (-2 * i / dim)
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


@torch.no_grad()
def turn(rotary: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    """Rotate vectors x (L, D) at positions (L,), (L, D)."""
    rotated: Tensor = rotary(x[None, None], positions.to(x.device))[0, 0]
    return rotated


def rotation_error(rotary: Rotary, x: Tensor, positions: Tensor, base: float, layout: Layout) -> float:
    """Return max ‖rotary(x) − R_m x‖ / ‖x‖ over vectors x (L, D) at positions (L,)."""
    matrices = torch.stack([rotation_matrix(m, x.shape[1], base, layout) for m in positions.tolist()])
    expected = (matrices @ x.cpu().double().unsqueeze(-1)).squeeze(-1)  # (L, D)
    return _relative_distance(turn(rotary, x, positions), expected)


def _relative_distance(actual: Tensor, expected: Tensor) -> float:
    """Return max ‖actual − expected‖ / ‖expected‖ over rows (L, D)."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def norm_error(rotary: Rotary, x: Tensor, positions: Tensor) -> float:
    """Return max |‖R_m x‖ / ‖x‖ − 1| over vectors x (L, D) at positions (L,), equation (3)."""
    ratio = turn(rotary, x, positions).cpu().double().norm(dim=-1) / x.cpu().double().norm(dim=-1)
    return float((ratio - 1).abs().max())


def composition_error(rotary: Rotary, x: Tensor, m: Tensor, n: Tensor) -> float:
    """Return max ‖R_m R_n x − R_{m+n} x‖ / ‖x‖ over vectors x (L, D) and positions m, n (L,), equation (3)."""
    return _relative_distance(turn(rotary, turn(rotary, x, n), m), turn(rotary, x, m + n))


def window_scores(rotary: Rotary, q: Tensor, k: Tensor, starts: Sequence[int], window: int) -> Tensor:
    """Return ⟨R_m q, R_n k⟩ / (‖q‖ ‖k‖) for all (m, n) of each window: (S, W, W) float64, of q and k (D,).

    The rotation is in the dtype of q and k, the product in float64: it is the rotation that is measured.
    """
    positions = (torch.tensor(starts)[:, None] + torch.arange(window)).flatten()  # (S·W,)

    def rotated(x: Tensor) -> Tensor:
        rows = turn(rotary, x.expand(len(positions), -1), positions).cpu().double()
        unit: Tensor = rows / x.cpu().double().norm()
        return unit.view(len(starts), window, -1)  # (S, W, D)

    return rotated(q) @ rotated(k).transpose(1, 2)


def exact_scores(rotary: Rotary, q: Tensor, k: Tensor, window: int) -> Tensor:
    """Return ⟨R_{m−n} q, k⟩ / (‖q‖ ‖k‖) for all (m, n) of a window, (W, W) float64: equation (4), right side."""
    at_zero = window_scores(rotary, q.cpu().double(), k.cpu().double(), [0], window)[0]
    by_offset = torch.cat((at_zero[0, 1:].flip(0), at_zero[:, 0]))  # (2W − 1,), m or n being 0
    place = torch.arange(window)
    return by_offset[place[:, None] - place + window - 1]


def relative_spread(scores: Tensor) -> Tensor:
    """Return how far scores (S, W, W) of one offset m − n = 1 − W … W − 1 are apart: (2W − 1,), 0 by equation (4)."""
    S, W, _ = scores.shape
    place = torch.arange(W)
    offset = (place[:, None] - place + W - 1).expand(S, W, W).flatten()
    bounds = torch.zeros(2, 2 * W - 1, dtype=scores.dtype)
    for row, reduce in enumerate(("amax", "amin")):
        bounds[row].scatter_reduce_(0, offset, scores.flatten(), reduce, include_self=False)
    return bounds[0] - bounds[1]


def layout_errors(interleaved: Rotary, half: Rotary, x: Tensor, positions: Tensor) -> tuple[float, float]:
    """Return the distance of the layouts over ‖x‖ for vectors x (L, D): after the permutation, and as they are.

    The permutation takes x to the half layout before it is rotated, and back afterwards.
    """
    forward, back = layout_permutation(x.shape[1], "half"), layout_permutation(x.shape[1], "interleaved")
    expected = turn(interleaved, x, positions)
    permuted = turn(half, x[:, forward], positions)[:, back]
    return _relative_distance(permuted, expected), _relative_distance(turn(half, x, positions), expected)


def angles_in_dtype(dim: int, base: float = 10000.0) -> Rotary:
    """Return the rotation as it is often written, with the angles in the dtype of x, to compare with float64 angles."""

    def rotary(x: Tensor, positions: Tensor) -> Tensor:
        theta = base ** -(torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
        angle = positions.to(x.dtype)[:, None] * theta.to(x.dtype)  # (L, D/2)
        return rotate(x, angle.cos(), angle.sin(), "interleaved")

    return rotary


# decay of the score with the distance


@torch.no_grad()
def scores_by_distance(rotary: Rotary, q: Tensor, k: Tensor, distances: Tensor) -> Tensor:
    """Return ⟨R_d q, k⟩ / (‖q‖ ‖k‖) for vectors q and k (N, D) and distances d (L,): (N, L)."""
    L = len(distances)
    rotated = rotary(q[:, None, None].expand(-1, 1, L, -1), distances)[:, 0]  # (N, L, D)
    scores: Tensor = (rotated @ k.unsqueeze(-1)).squeeze(-1) / (q.norm(dim=1) * k.norm(dim=1))[:, None]
    return scores


def decay_bound(dim: int, distances: Tensor, base: float = 10000.0) -> Tensor:
    """Return (2/D) Σ_j |S_j| over its value at 0, S_j = Σ_{i<j} exp(i d θ_i), for distances (L,): RoFormer §3.4.3."""
    theta = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = distances.double()[:, None] * theta  # (L, D/2)
    sums = torch.polar(torch.ones_like(angle), angle).cumsum(1)  # S_1 … S_{D/2}
    mean = sums.abs().mean(1)
    return mean / torch.arange(1, dim // 2 + 1, dtype=torch.float64).mean()  # |S_j| = j at distance 0


# the same tokens in another order


def token_differences(outputs: Tensor, reordered: Tensor, order: Sequence[int]) -> Tensor:
    """Return ‖f(X)_t − f(X P)_t‖ of each token t, over the mean norm of f(X), for outputs (L, D): (L,).

    `order[j]` is the token at place j of the other order: zeros by equation (5) where there are no positions.
    """
    moved = torch.empty_like(reordered)
    moved[torch.tensor(order)] = reordered
    differences: Tensor = (outputs - moved).norm(dim=1) / outputs.norm(dim=1).mean()
    return differences


def pooled_difference(outputs: Tensor, reordered: Tensor) -> float:
    """Return the distance of the mean outputs over tokens, (L, D) each, over the mean norm of a token's output."""
    return float((outputs.mean(0) - reordered.mean(0)).norm() / outputs.norm(dim=1).mean())
