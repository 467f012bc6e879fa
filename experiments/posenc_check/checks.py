"""Checks of the encodings against their formulas, and of what the trained networks have learnt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.nn.exactness import largest, unit_roundoff
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding
from experiments.posenc_check import claims, setups
from experiments.posenc_check.figures import draw_relative, draw_word_order
from runner.metrics import accuracy
from runner.task import Run

_SHIFTS = (1, 7, 100, 4000)
_LAST = setups.STARTS[-1] + setups.WINDOW
_FAR = (0, 1, 2, 63, 1000, 4095, 4096, 32_768, 131_072)  # positions of single vectors
_LEARNT = 0.99  # accuracy
_STANDARD_ERRORS = 4.0


def check_absolute(run: Run) -> None:
    """Check equations (1) and (2) of `claims`, and the closed form in each dtype."""
    # closed form
    encoding = AbsPosEncoding(setups.CLAIM_DIM, max_len=setups.TABLE_LENGTH).eval()
    expected = claims.sinusoids(setups.TABLE_LENGTH, setups.CLAIM_DIM)
    for dtype in setups.DTYPES:
        run.check(
            f"absolute_closed_form_{setups.name_of(dtype)}",
            f"PE is sin and cos of p θ_i, p < {setups.TABLE_LENGTH:,}",
            claims.table_error(encoding, expected, dtype, _device(run, dtype)),
            claims.table_tolerance(dtype, setups.TABLE_LENGTH),
        )

    # shift: PE(p), the entries of M_k and PE(p + k) are each off by `exact` at most, (1 + 2 √2) of it
    table = encoding.table(setups.TABLE_LENGTH)
    exact = claims.table_tolerance(torch.float64, setups.TABLE_LENGTH)
    claim = f"PE(p + k) = M_k PE(p), k = {', '.join(map(str, _SHIFTS))}"
    run.check("absolute_shift", claim, claims.shift_error(table, _SHIFTS), 4 * exact)

    # similarity: a sum over D products, relative to D / 2
    claim = "PE(p)·PE(q) = Σ cos((p − q) θ_i), and so ‖PE‖² = D/2"
    tolerance = 4 * exact + setups.CLAIM_DIM * unit_roundoff(torch.float64)
    run.check("absolute_similarity", claim, claims.similarity_error(table[:512]), tolerance)


def _device(run: Run, dtype: torch.dtype) -> torch.device:
    """Return the run's device, the CPU for float64, which not every device has."""
    return torch.device("cpu") if dtype == torch.float64 else run.device


def check_rotary(run: Run) -> None:
    """Check equations (3) and (4) of `claims` in each dtype, and the two layouts."""
    interleaved = RotaryPosEncoding(setups.CLAIM_DIM, setups.BASE)
    half = RotaryPosEncoding(setups.CLAIM_DIM, setups.BASE, layout="half")
    positions = torch.tensor(_FAR)
    x = torch.randn(len(_FAR), setups.CLAIM_DIM, dtype=torch.float64, generator=run.generator("vectors"))
    exact = claims.rotation_tolerance(torch.float64, _LAST)

    # closed form and norm
    for dtype in setups.DTYPES:
        x_, tolerance = x.to(_device(run, dtype), dtype), claims.rotation_tolerance(dtype, _LAST)
        errors = [claims.rotation_error(r, x_, positions, setups.BASE, r.layout) for r in (interleaved, half)]
        name, claim = f"rotary_closed_form_{setups.name_of(dtype)}", "R_m x is the matrix times x"
        run.check(name, claim, largest(errors), tolerance)
        error = claims.norm_error(interleaved, x_, positions)
        run.check(f"rotary_norm_{setups.name_of(dtype)}", "‖R_m x‖ = ‖x‖", error, tolerance)

    # composition: R_m R_n x and R_{m+n} x are three rotations
    error = claims.composition_error(interleaved, x, positions, positions.flip(0))
    run.check("rotary_composition", "R_m R_n = R_{m+n}", error, 3 * exact)

    # layouts
    permuted, unpermuted = claims.layout_errors(interleaved, half, x, positions)
    run.check("rotary_layouts", "interleaved = half after the permutation", permuted, 2 * exact)
    run.check(
        "rotary_layouts_differ", "and without it they are not", unpermuted, setups.TELL_APART, at_least=True
    )

    _check_relative(run, interleaved, half)


def _check_relative(run: Run, interleaved: RotaryPosEncoding, half: RotaryPosEncoding) -> None:
    """Check, draw and tabulate that ⟨R_m q, R_n k⟩ of each window depends on m − n alone, per dtype."""
    q, k = torch.randn(2, setups.CLAIM_DIM, dtype=torch.float64, generator=run.generator("query and key"))
    errors = {}
    for dtype in setups.DTYPES:
        # the spread over windows: two scores, of two rotated vectors each
        name = setups.name_of(dtype)
        q_, k_ = (vector.to(_device(run, dtype), dtype) for vector in (q, k))
        scores = [
            claims.window_scores(rotary, q_, k_, setups.STARTS, setups.WINDOW)
            for rotary in (interleaved, half)
        ]
        run.check(
            f"rotary_relative_{name}",
            f"⟨R_m q, R_n k⟩ depends on m − n alone: spread over windows at 0 to {setups.STARTS[-1]:,}",
            largest(float(claims.relative_spread(by_window).max()) for by_window in scores),
            4 * claims.rotation_tolerance(dtype, _LAST),
        )

        # the error by dtype of the angles; exact for the operands as the dtype rounds them
        exact = claims.exact_scores(interleaved, q_, k_, setups.WINDOW)
        by_angles = {"float64": scores[0]}
        if dtype != torch.float64:
            naive = claims.angles_in_dtype(setups.CLAIM_DIM, setups.BASE)
            by_angles[name] = claims.window_scores(naive, q_, k_, setups.STARTS, setups.WINDOW)
        for angles, by_window in by_angles.items():
            errors[name, angles] = (by_window - exact).abs().amax((1, 2)).tolist()

    header = ["dtype", "angles in", *(f"window at {start:,}" for start in setups.STARTS)]
    run.table("relative_position", header, [[*names, *values] for names, values in errors.items()])
    draw_relative(run, claims.window_scores(interleaved, q, k, setups.STARTS, setups.WINDOW), errors)


def check_word_order(run: Run) -> None:
    """Check equation (5) on 我爱你 and 你爱我 through one attention layer, and what breaks it; draw both."""
    none, *others = setups.reordered_setups(run)

    # without positions
    claim = "no positions, no mask: 你爱我 gives the vectors of 我爱你 in other places"
    run.check("order_none_tokens", claim, float(none.tokens.max()), setups.EXACT)
    run.check("order_none_pooled", "and so the same mean", none.pooled, setups.EXACT)

    # with an encoding or a mask
    for setup in others:
        name, claim = f"order_{setup.title.split()[0]}", f"{setup.title}: the means differ"
        run.check(name, claim, setup.pooled, setups.TELL_APART, at_least=True)
    draw_word_order(run, [none, *others])


def check_trained(run: Run, confusions: dict[str, Tensor]) -> None:
    """Check that networks learn the task with either encoding, and nothing without; confusion counts (C, C)."""
    # without positions, chance
    none = confusions["none"]
    chance = 1 / len(none)
    error = math.sqrt(chance * (1 - chance) / float(none.sum()))
    claim = f"without positions nothing is learnt: |test accuracy − chance, {chance:.2f}|"
    run.check("trained_none", claim, abs(float(accuracy(none)) - chance), _STANDARD_ERRORS * error)

    # with positions
    for name in ("absolute", "rotary"):
        claim = f"with {name} positions who does what to whom is learnt: test accuracy"
        run.check(f"trained_{name}", claim, float(accuracy(confusions[name])), _LEARNT, at_least=True)
