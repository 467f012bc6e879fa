"""Checks of the encodings against their formulas."""

from __future__ import annotations

import torch

from experiments.nn.exactness import largest, unit_roundoff
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding
from experiments.posenc_check import claims
from experiments.posenc_check.figures import draw_relative, draw_word_order
from experiments.posenc_check.setups import (
    BASE,
    CLAIM_DIM,
    DTYPES,
    EXACT,
    FAR,
    LAST,
    SHIFTS,
    STARTS,
    TABLE_LENGTH,
    TELL_APART,
    WINDOW,
    device_of,
    reordered_setups,
    short,
)
from runner.task import Run


def check_absolute(run: Run) -> None:
    """Equations (1) and (2) of position_claims, and the closed form in each dtype."""
    encoding = AbsPosEncoding(CLAIM_DIM, max_len=TABLE_LENGTH).eval()
    wanted = claims.sinusoids(TABLE_LENGTH, CLAIM_DIM)
    for dtype in DTYPES:
        run.check(
            f"absolute_closed_form_{short(dtype)}",
            f"PE is sin and cos of p θ_i, p < {TABLE_LENGTH:,}",
            claims.table_error(encoding, wanted, dtype, device_of(run, dtype)),
            claims.table_tolerance(dtype, TABLE_LENGTH),
        )
    table = encoding.table(TABLE_LENGTH)
    exact = claims.table_tolerance(torch.float64, TABLE_LENGTH)
    # PE(p), the entries of M_k and PE(p + k) are each off by `exact` at most: (1 + 2 √2) of it
    claim = f"PE(p + k) = M_k PE(p), k = {', '.join(map(str, SHIFTS))}"
    run.check("absolute_shift", claim, claims.shift_error(table, SHIFTS), 4 * exact)
    # a sum over D products, relative to D / 2
    claim = "PE(p)·PE(q) = Σ cos((p − q) θ_i), and so ‖PE‖² = D/2"
    tolerance = 4 * exact + CLAIM_DIM * unit_roundoff(torch.float64)
    run.check("absolute_similarity", claim, claims.similarity_error(table[:512]), tolerance)


def check_rotary(run: Run) -> None:
    """Equations (3) and (4) of position_claims in each dtype, and the two layouts."""
    interleaved = RotaryPosEncoding(CLAIM_DIM, BASE)
    half = RotaryPosEncoding(CLAIM_DIM, BASE, layout="half")
    far = torch.tensor(FAR)
    x = torch.randn(len(FAR), CLAIM_DIM, dtype=torch.float64, generator=run.generator("vectors"))
    for dtype in DTYPES:
        name, y = short(dtype), x.to(device_of(run, dtype), dtype)
        tolerance = claims.rotation_tolerance(dtype, LAST)
        found = [claims.rotation_error(rotary, y, far, BASE, rotary.layout) for rotary in (interleaved, half)]
        run.check(f"rotary_closed_form_{name}", "R_m x is the matrix times x", largest(found), tolerance)
        error = claims.norm_error(interleaved, y, far)
        run.check(f"rotary_norm_{name}", "‖R_m x‖ = ‖x‖", error, tolerance)
    # R_m R_n x and R_{m+n} x: three rotations
    error = claims.composition_error(interleaved, x, far, far.flip(0))
    tolerance = 3 * claims.rotation_tolerance(torch.float64, LAST)
    run.check("rotary_composition", "R_m R_n = R_{m+n}", error, tolerance)
    same, apart = claims.layout_errors(interleaved, half, x, far)
    tolerance = 2 * claims.rotation_tolerance(torch.float64, LAST)
    run.check("rotary_layouts", "interleaved = half after the permutation", same, tolerance)
    run.check("rotary_layouts_differ", "and without it they are not", apart, TELL_APART, at_least=True)
    check_relative(run, interleaved, half)


def check_relative(run: Run, interleaved: RotaryPosEncoding, half: RotaryPosEncoding) -> None:
    """⟨R_m q, R_n k⟩ over all (m, n) of every window depends on m − n alone, per dtype; and the picture of it."""
    q, k = torch.randn(2, CLAIM_DIM, dtype=torch.float64, generator=run.generator("query and key"))
    errors = {}
    for dtype in DTYPES:
        q_, k_ = (vector.to(device_of(run, dtype), dtype) for vector in (q, k))
        scores = [claims.window_scores(rotary, q_, k_, STARTS, WINDOW) for rotary in (interleaved, half)]
        run.check(
            f"rotary_relative_{short(dtype)}",
            f"⟨R_m q, R_n k⟩ depends on m − n alone: spread over windows at 0 to {STARTS[-1]:,}",
            largest(float(claims.relative_spread(found).max()) for found in scores),
            4 * claims.rotation_tolerance(dtype, LAST),  # two scores, and two turned vectors in each
        )
        exact = claims.exact_scores(interleaved, q_, k_, WINDOW)  # of the operands as the dtype has them
        rotations = {"float64": scores[0]}
        if dtype != torch.float64:
            naive = claims.angles_in_dtype(CLAIM_DIM, BASE)
            rotations[short(dtype)] = claims.window_scores(naive, q_, k_, STARTS, WINDOW)
        for angles, found in rotations.items():
            errors[short(dtype), angles] = (found - exact).abs().amax((1, 2)).tolist()
    header = ["dtype", "angles in", *(f"window at {start:,}" for start in STARTS)]
    run.table("relative_position", header, [[*names, *values] for names, values in errors.items()])
    draw_relative(run, claims.window_scores(interleaved, q, k, STARTS, WINDOW), errors)


def check_word_order(run: Run) -> None:
    """我爱你 and 你爱我 through one attention layer: equation (5), and what breaks it."""
    setups = {setup.title: setup for setup in reordered_setups(run)}
    none = setups.pop("no positions")
    run.check(
        "order_none_tokens",
        "no positions, no mask: 你爱我 gives the vectors of 我爱你 in other places",
        float(none.tokens.max()),
        EXACT,
    )
    run.check("order_none_pooled", "and so the same mean", none.pooled, EXACT)
    for title, setup in setups.items():
        name = f"order_{title.split()[0]}"
        run.check(name, f"{title}: the means differ", setup.pooled, TELL_APART, at_least=True)
    draw_word_order(run, [none, *setups.values()])
