"""The measuring instruments: near zero on what is right, far from it on what is broken, by hand where it can be."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding
from experiments.posenc_check import claims

D = 16
POSITIONS = torch.tensor([0, 1, 5, 1000, 131_072])
EXACT = 1e-9
Rotary = Callable[[Tensor, Tensor], Tensor]


def vectors(N: int = len(POSITIONS)) -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def wrong_sign(x: Tensor, positions: Tensor) -> Tensor:
    """R_{−m}: keeps every norm and every relative score, and is another rotation."""
    turned = RotaryPosEncoding(D)(x * torch.tensor([1.0, -1.0]).repeat(D // 2), positions)
    return turned * torch.tensor([1.0, -1.0]).repeat(D // 2)


def stretched(x: Tensor, positions: Tensor) -> Tensor:
    """Vectors that grow with their position."""
    return RotaryPosEncoding(D)(x, positions) * (1 + 0.01 * (positions.double() + 1).log())[:, None]


def added(x: Tensor, positions: Tensor) -> Tensor:
    """Positions added in place of turned: keeps none of the claims."""
    return x + AbsPosEncoding(D).table(int(positions.max()) + 1)[positions]


# closed forms


def test_sinusoids_by_hand() -> None:
    table = claims.sinusoids(3, 4)
    wanted = [
        [0.0, 1.0, 0.0, 1.0],
        [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)],
        [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)],
    ]
    assert torch.allclose(table, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-15)


def test_shift_matrix_is_a_power_of_one_step() -> None:
    one, seven = claims.shift_matrix(1, D), claims.shift_matrix(7, D)
    assert torch.allclose(torch.linalg.matrix_power(one, 7), seven, rtol=0, atol=1e-14)
    assert torch.allclose(one @ one.t(), torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-15)


def test_rotation_matrix_by_hand() -> None:
    c, s, C, S = math.cos(2), math.sin(2), math.cos(0.02), math.sin(0.02)
    interleaved = [[c, -s, 0, 0], [s, c, 0, 0], [0, 0, C, -S], [0, 0, S, C]]
    half = [[c, 0, -s, 0], [0, C, 0, -S], [s, 0, c, 0], [0, S, 0, C]]
    for layout, wanted in (("interleaved", interleaved), ("half", half)):
        found = claims.rotation_matrix(2, 4, 10000.0, layout)  # type: ignore[arg-type]
        assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-15)


# tolerances


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tolerances_bound_what_is_right_without_being_wide(dtype: torch.dtype) -> None:
    """Over many vectors the error comes within a factor of eight of the bound, and stays below it."""
    positions = torch.arange(2000)
    x = torch.randn(2000, D, dtype=torch.float64).to(dtype)
    found = claims.rotation_error(RotaryPosEncoding(D), x, positions, 10000.0, "interleaved")
    tolerance = claims.rotation_tolerance(dtype, 0)
    assert found <= claims.rotation_tolerance(dtype, 2000)
    assert dtype == torch.float64 or found > tolerance / 8
    table = claims.table_error(AbsPosEncoding(D).eval(), claims.sinusoids(500, D), dtype)
    assert table <= claims.table_tolerance(dtype, 500)
    assert dtype == torch.float64 or table > claims.table_tolerance(dtype, 0) / 8


# what is added


def test_absolute_encoding_meets_its_claims() -> None:
    table = AbsPosEncoding(D).table(300)
    assert claims.table_error(AbsPosEncoding(D).eval(), claims.sinusoids(300, D), torch.float64) < EXACT
    assert claims.shift_error(table, (1, 9, 200)) < EXACT
    assert claims.similarity_error(table) < EXACT


class Half(nn.Module):
    """Sines first, cosines behind: another table."""

    def forward(self, x: Tensor) -> Tensor:
        table = AbsPosEncoding(D).table(x.shape[1]).to(x.dtype)
        return x + torch.cat((table[:, 0::2], table[:, 1::2]), 1)


def test_broken_tables_are_measured_as_such() -> None:
    table = AbsPosEncoding(D).table(300)
    assert claims.table_error(Half(), claims.sinusoids(300, D), torch.float64) > 0.5
    learned = torch.randn(300, D, dtype=torch.float64)
    wrapped = table[torch.arange(300) % 128]
    for broken in (learned, wrapped, table.flip(1), table * 1.01 + 0.01):
        assert claims.shift_error(broken, (1, 9, 200)) > 1e-3
    for broken in (learned, wrapped, table * 1.01):
        assert claims.similarity_error(broken) > 1e-3


# what is turned


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rotary_encoding_meets_its_claims(layout: claims.Layout) -> None:
    rotary, x = RotaryPosEncoding(D, 500.0, layout), vectors()
    assert claims.rotation_error(rotary, x, POSITIONS, 500.0, layout) < EXACT
    assert claims.norm_error(rotary, x, POSITIONS) < EXACT
    assert claims.composition_error(rotary, x, POSITIONS, POSITIONS.flip(0)) < EXACT
    scores = claims.window_scores(rotary, x[0], x[1], (0, 100, 5000), 12)
    assert float(claims.relative_spread(scores).max()) < EXACT


@pytest.mark.parametrize("broken", [wrong_sign, stretched, added, claims.angles_in_dtype(D, 9999.0)])
def test_another_rotation_is_measured_as_such(broken: Rotary) -> None:
    assert claims.rotation_error(broken, vectors(), POSITIONS, 10000.0, "interleaved") > 1e-3


@pytest.mark.parametrize("broken", [stretched, added])
def test_what_is_no_rotation_is_measured_as_such(broken: Rotary) -> None:
    assert claims.norm_error(broken, vectors(), POSITIONS) > 1e-3
    assert claims.composition_error(broken, vectors(), POSITIONS, POSITIONS.flip(0)) > 1e-3
    scores = claims.window_scores(broken, *vectors(2), (0, 100), 12)
    assert float(claims.relative_spread(scores).max()) > 1e-3


def test_wrong_sign_keeps_what_only_the_closed_form_tells() -> None:
    assert claims.norm_error(wrong_sign, vectors(), POSITIONS) < EXACT
    scores = claims.window_scores(wrong_sign, *vectors(2), (0, 100), 12)
    assert float(claims.relative_spread(scores).max()) < EXACT


def test_scores_and_spread_by_loops() -> None:
    """Every pair on its own, with matrices."""
    q, k = vectors(2)
    starts, W = (0, 50), 5
    scores = claims.window_scores(stretched, q, k, starts, W)
    by_offset: dict[int, list[float]] = {}
    for (s, start), m, n in product(enumerate(starts), range(W), range(W)):
        R_m, R_n = (
            claims.rotation_matrix(start + place, D, 10000.0, "interleaved")
            * (1 + 0.01 * math.log(start + place + 1))
            for place in (m, n)
        )
        wanted = float((R_m @ q) @ (R_n @ k) / (q.norm() * k.norm()))
        assert float(scores[s, m, n]) == pytest.approx(wanted, abs=1e-12)
        by_offset.setdefault(m - n, []).append(wanted)
    spread = [max(by_offset[offset]) - min(by_offset[offset]) for offset in range(1 - W, W)]
    assert claims.relative_spread(scores).tolist() == pytest.approx(spread, abs=1e-12)


def test_exact_scores_are_those_of_the_offset() -> None:
    q, k = vectors(2)
    found = claims.exact_scores(RotaryPosEncoding(D), q, k, 6)
    for m, n in product(range(6), range(6)):
        R = claims.rotation_matrix(m - n, D, 10000.0, "interleaved")
        assert float(found[m, n]) == pytest.approx(float((R @ q) @ k / (q.norm() * k.norm())), abs=1e-12)


def test_layouts_are_one_function_after_the_permutation_and_two_without() -> None:
    interleaved, half = RotaryPosEncoding(D), RotaryPosEncoding(D, layout="half")
    same, apart = claims.layout_errors(interleaved, half, vectors(), POSITIONS)
    assert same < EXACT and apart > 0.1
    same, _ = claims.layout_errors(interleaved, interleaved, vectors(), POSITIONS)
    assert same > 0.1


@pytest.mark.parametrize(
    ("dtype", "start", "off"),
    [(torch.float32, 131_072, 1e-4), (torch.bfloat16, 1000, 0.05)],
)
def test_angles_in_the_dtype_lose_the_position(dtype: torch.dtype, start: int, off: float) -> None:
    q, k = vectors(2).to(dtype)
    exact = claims.exact_scores(RotaryPosEncoding(D), q, k, 32)
    naive = claims.window_scores(claims.angles_in_dtype(D), q, k, (start,), 32)[0]
    ours = claims.window_scores(RotaryPosEncoding(D), q, k, (start,), 32)[0]
    assert float((naive - exact).abs().max()) > off
    assert float((ours - exact).abs().max()) <= 2 * claims.rotation_tolerance(dtype, start + 32)


def not_a_number(x: Tensor, positions: Tensor) -> Tensor:
    """One number that is none, at the second position."""
    return RotaryPosEncoding(D)(x, positions).index_fill(2, torch.tensor([1]), math.nan)


def test_what_is_no_number_is_never_passed_over() -> None:
    table = AbsPosEncoding(D).table(300)
    table[200, 3] = math.nan
    assert math.isnan(claims.shift_error(table, (1, 150, 290))) and math.isnan(claims.similarity_error(table))
    assert math.isnan(claims.rotation_error(not_a_number, vectors(), POSITIONS, 10000.0, "interleaved"))
    assert math.isnan(claims.norm_error(not_a_number, vectors(), POSITIONS))
    assert math.isnan(claims.composition_error(not_a_number, vectors(), POSITIONS, POSITIONS))
    scores = claims.window_scores(not_a_number, *vectors(2), (0, 9), 4)
    assert math.isnan(float(claims.relative_spread(scores).max()))


# decay


def test_scores_by_distance_by_matrices() -> None:
    q, k = vectors(3), vectors(3).flip(0)
    distances = torch.tensor([0, 4, 100])
    found = claims.scores_by_distance(RotaryPosEncoding(D), q, k, distances)
    for n, (d, distance) in product(range(3), enumerate(distances.tolist())):
        R = claims.rotation_matrix(distance, D, 10000.0, "interleaved")
        wanted = float((R @ q[n]) @ k[n] / (q[n].norm() * k[n].norm()))
        assert float(found[n, d]) == pytest.approx(wanted, abs=1e-12)


def test_decay_bound_by_loops() -> None:
    distances = torch.tensor([0, 3, 50])
    wanted = []
    for d in distances.tolist():
        sums = [
            abs(sum(cmath.exp(1j * d * 10000.0 ** (-2 * i / D)) for i in range(j)))
            for j in range(1, D // 2 + 1)
        ]
        wanted.append(sum(sums) / sum(range(1, D // 2 + 1)))
    assert claims.decay_bound(D, distances).tolist() == pytest.approx(wanted, abs=1e-12)
    assert wanted[0] == 1.0


# order


def test_differences_of_reordered_outputs_by_hand() -> None:
    outputs = torch.tensor([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])
    moved = outputs[[2, 0, 1]] + torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = claims.token_differences(outputs, moved, [2, 0, 1])
    assert found.tolist() == pytest.approx([0.2, 0.0, 0.0])  # the token whose place is 1 is number 0
    assert claims.pooled_difference(outputs, moved) == pytest.approx(1 / 3 / 5)
    assert claims.pooled_difference(outputs, outputs[[1, 2, 0]]) == 0.0
