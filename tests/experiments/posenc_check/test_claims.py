"""The measuring instruments: near zero on what is right, far from it on what is broken, by hand where it can be."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.nn.attention import MultiHeadAttention
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding
from experiments.posenc_check import checks, claims, setups
from experiments.posenc_check.checks import check_absolute, check_rotary, check_word_order
from tests.experiments.conftest import broken_claims, failed_checks

D = 16
POSITIONS = torch.tensor([0, 1, 5, 1000, 131_072])
TABLE = AbsPosEncoding(D).table(300)


def vectors(N: int = len(POSITIONS)) -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def assert_equal(actual: Tensor, expected: list[Any]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


# what is broken


class WrongSign(RotaryPosEncoding):
    """Turns backwards, R_{−m}: keeps every norm and every relative score."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        signs, D = torch.tensor([1.0, -1.0], dtype=x.dtype), x.shape[-1]  # of each pair's two numbers
        signs = signs.repeat(D // 2) if self.layout == "interleaved" else signs.repeat_interleave(D // 2)
        return super().forward(x * signs, positions) * signs


class RoundedAngles(RotaryPosEncoding):
    """Counts positions in bfloat16."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        positions = torch.arange(x.shape[2]) if positions is None else positions
        return super().forward(x, positions.bfloat16().long())


class NoNumber(RotaryPosEncoding):
    """One vector of the layout that is measured last is NaN."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        second = torch.tensor([1] if self.layout == "half" else [], dtype=torch.long)
        return super().forward(x, positions).index_fill(2, second, math.nan)


class WrongScale(AbsPosEncoding):
    """√d_model too large."""

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return x + math.sqrt(self.d_model) * (super().forward(x, offset) - x)


class Wrapped(AbsPosEncoding):
    """Begins again after 1,024 positions."""

    def table(self, length: int, *args: object, **options: object) -> Tensor:
        return super().table(1024).repeat(math.ceil(length / 1024), 1)[:length]


class Causal(MultiHeadAttention):
    """Sees the order by itself."""

    def forward(self, *args: Tensor, causal: bool = False, **options: bool) -> object:  # type: ignore[override]
        return super().forward(*args, causal=True, **options)


def stretched(x: Tensor, positions: Tensor) -> Tensor:
    """Vectors that grow with their position."""
    return RotaryPosEncoding(D)(x, positions) * (1 + 0.01 * (positions.double() + 1).log())[:, None]


def added(x: Tensor, positions: Tensor) -> Tensor:
    """Positions added in place of turned: keeps none of the claims."""
    return x + AbsPosEncoding(D).table(int(positions.max()) + 1)[positions]


# closed forms


def test_sinusoids_by_hand() -> None:
    waves = list(product((1, 0.01), (math.sin, math.cos)))
    assert_equal(claims.sinusoids(3, 4), [[wave(p * theta) for theta, wave in waves] for p in range(3)])


def test_rotation_matrix_by_hand() -> None:
    c, s, C, S = math.cos(2), math.sin(2), math.cos(0.02), math.sin(0.02)
    interleaved = [[c, -s, 0, 0], [s, c, 0, 0], [0, 0, C, -S], [0, 0, S, C]]
    half = [[c, 0, -s, 0], [0, C, 0, -S], [s, 0, c, 0], [0, S, 0, C]]
    assert_equal(claims.rotation_matrix(2, 4, 10000.0, "interleaved"), interleaved)
    assert_equal(claims.rotation_matrix(2, 4, 10000.0, "half"), half)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tolerances_bound_what_is_right_without_being_wide(dtype: torch.dtype) -> None:
    """Over many vectors the error comes within a factor of eight of the bound, and stays below it."""
    x, encoding = vectors(2000).to(dtype), AbsPosEncoding(D).eval()
    turned = claims.rotation_error(RotaryPosEncoding(D), x, torch.arange(2000), 10000.0, "interleaved")
    table = claims.table_error(encoding, claims.sinusoids(500, D), dtype)
    assert turned <= claims.rotation_tolerance(dtype, 2000) and table <= claims.table_tolerance(dtype, 500)
    if dtype != torch.float64:
        assert turned > claims.rotation_tolerance(dtype, 0) / 8
        assert table > claims.table_tolerance(dtype, 0) / 8


# claims


@pytest.mark.parametrize(
    ("table", "broken"),
    [
        (TABLE, set()),
        (TABLE[:, [*range(0, D, 2), *range(1, D, 2)]], {"closed form", "shift"}),  # sines, then cosines
        (TABLE.flip(1), {"closed form", "shift"}),
        (TABLE * 1.01, {"closed form", "similarity"}),
        (TABLE + 0.01, {"closed form", "shift", "similarity"}),
        # sines alone, which position 0 has none of
        (TABLE * torch.tensor([1.1, 1.0]).repeat(D // 2), {"closed form", "shift", "similarity"}),
        (TABLE[torch.arange(300) % 128], {"closed form", "shift", "similarity"}),
        (vectors(300), {"closed form", "shift", "similarity"}),  # as if learnt
        (
            TABLE.where(torch.arange(300 * D).view(-1, D) != 3203, math.nan),
            {"closed form", "shift", "similarity"},
        ),
    ],
)
def test_broken_tables_are_measured_as_such(table: Tensor, broken: set[str]) -> None:
    errors = {
        "closed form": claims.table_error(lambda x: x + table, claims.sinusoids(300, D), torch.float64),
        "shift": claims.shift_error(table, (290, 150, 1)),
        "similarity": claims.similarity_error(table),
    }
    assert broken_claims(errors, 1e-9) == broken


@pytest.mark.parametrize(
    ("rotary", "broken"),
    [
        (RotaryPosEncoding(D), set()),
        (RotaryPosEncoding(D, layout="half"), set()),
        (RotaryPosEncoding(D, 500.0), set()),
        (WrongSign(D), {"closed form"}),
        (claims.angles_in_dtype(D, 9999.0), {"closed form"}),
        (stretched, {"closed form", "norm", "composition", "relative"}),
        (added, {"closed form", "norm", "composition", "relative"}),
        (NoNumber(D, layout="half"), {"closed form", "norm", "composition", "relative"}),
    ],
)
def test_rotary_encoding_meets_its_claims_and_no_other_does(rotary: Callable, broken: set[str]) -> None:
    x, layout, base = vectors(), getattr(rotary, "layout", "interleaved"), getattr(rotary, "base", 10000.0)
    scores = claims.window_scores(rotary, x[0], x[1], (0, 100, 5000), 12)
    errors = {
        "closed form": claims.rotation_error(rotary, x, POSITIONS, base, layout),
        "norm": claims.norm_error(rotary, x, POSITIONS),
        "composition": claims.composition_error(rotary, x, POSITIONS, POSITIONS.flip(0)),
        "relative": float(claims.relative_spread(scores).max()),
    }
    assert broken_claims(errors, 1e-9) == broken


LAYOUTS = {"rotary_layouts", "rotary_layouts_differ"}


def for_dtypes(*names: str) -> set[str]:
    return {f"{name}_{dtype}" for name in names for dtype in ("float64", "float32", "bfloat16")}


@pytest.mark.parametrize(
    ("check", "broken", "caught"),
    [
        *((check, None, set()) for check in (check_absolute, check_rotary, check_word_order)),
        (check_absolute, WrongScale, for_dtypes("absolute_closed_form")),
        (check_absolute, Wrapped, {"absolute_shift"}),
        (check_rotary, WrongSign, for_dtypes("rotary_closed_form")),
        (
            check_rotary,
            RoundedAngles,
            {"rotary_composition"} | for_dtypes("rotary_closed_form", "rotary_relative"),
        ),
        (check_rotary, NoNumber, LAYOUTS | for_dtypes("rotary_closed_form", "rotary_relative")),
        (check_word_order, Causal, {"order_none_tokens", "order_none_pooled"}),
    ],
)
def test_a_broken_encoding_fails_the_claims_that_it_breaks_and_no_others(
    check: Callable, broken: type | None, caught: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken is not None:
        module = setups if broken is Causal else checks
        monkeypatch.setattr(module, broken.__base__.__name__, broken)
    assert failed_checks(check) == caught


def test_layouts_are_one_function_after_the_permutation_and_two_without() -> None:
    interleaved, half = RotaryPosEncoding(D), RotaryPosEncoding(D, layout="half")
    same, apart = claims.layout_errors(interleaved, half, vectors(), POSITIONS)
    not_permuted, _ = claims.layout_errors(interleaved, interleaved, vectors(), POSITIONS)
    assert same < 1e-9 and apart > 0.1 and not_permuted > 0.1


# scores


def score(q: Tensor, k: Tensor, m: int, n: int, growth: float = 0.0) -> float:
    """⟨R_m q, R_n k⟩ / (‖q‖ ‖k‖) with matrices, vectors being `stretched`."""
    R_m, R_n = (
        claims.rotation_matrix(p, D, 10000.0, "interleaved") * (1 + growth * math.log(abs(p) + 1))
        for p in (m, n)
    )
    return float((R_m @ q) @ (R_n @ k) / (q.norm() * k.norm()))


def test_scores_and_their_spread_by_matrices() -> None:
    q, k = vectors(2)
    W = range(5)
    scores = claims.window_scores(stretched, q, k, (0, 50), len(W))
    assert_equal(scores, [[[score(q, k, s + m, s + n, 0.01) for n in W] for m in W] for s in (0, 50)])
    by_offset = [[float(scores[s, m, m - d]) for s in (0, 1) for m in W if m - d in W] for d in range(-4, 5)]
    assert_equal(claims.relative_spread(scores), [max(same) - min(same) for same in by_offset])

    # of one rotation, at any distance
    rotary = RotaryPosEncoding(D)
    assert_equal(claims.exact_scores(rotary, q, k, len(W)), [[score(q, k, m - n, 0) for n in W] for m in W])
    qs, ks, distances = vectors(3), vectors(3).flip(0), [0, 4, 100]
    expected = [[score(q, k, d, 0) for d in distances] for q, k in zip(qs, ks, strict=True)]
    assert_equal(claims.scores_by_distance(rotary, qs, ks, torch.tensor(distances)), expected)


@pytest.mark.parametrize(
    ("dtype", "start", "off"), [(torch.float32, 131_072, 1e-4), (torch.bfloat16, 1000, 0.05)]
)
def test_angles_in_the_dtype_lose_the_position(dtype: torch.dtype, start: int, off: float) -> None:
    q, k = vectors(2).to(dtype)
    exact = claims.exact_scores(RotaryPosEncoding(D), q, k, 32)
    naive, ours = (
        float((claims.window_scores(rotary, q, k, (start,), 32)[0] - exact).abs().max())
        for rotary in (claims.angles_in_dtype(D), RotaryPosEncoding(D))
    )
    assert naive > off and ours <= 2 * claims.rotation_tolerance(dtype, start + 32)


def test_decay_bound_by_loops() -> None:
    lengths = range(1, D // 2 + 1)
    expected = [
        sum(abs(sum(cmath.exp(1j * d * 10000.0 ** (-2 * i / D)) for i in range(j))) for j in lengths)
        / sum(lengths)
        for d in (0, 3, 50)
    ]
    assert expected[0] == 1.0
    assert_equal(claims.decay_bound(D, torch.tensor([0, 3, 50])), expected)


def test_differences_of_reordered_outputs_by_hand() -> None:
    outputs = torch.tensor([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])
    moved = outputs[[2, 0, 1]] + torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    differences = claims.token_differences(outputs, moved, [2, 0, 1])
    assert differences.tolist() == pytest.approx([0.2, 0.0, 0.0])  # the token whose place is 1 is number 0
    assert claims.pooled_difference(outputs, moved) == pytest.approx(1 / 3 / 5)
    assert claims.pooled_difference(outputs, outputs[[1, 2, 0]]) == 0.0
