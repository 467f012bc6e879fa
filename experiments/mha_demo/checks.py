"""Checks against the formulas and against PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from experiments.mha_demo import claims
from experiments.mha_demo.cases import CASES, ERRORS, PADDED, SIZES, Case, Found
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import attention_steps
from experiments.nn.exactness import largest, rounding
from runner.task import Run


def check_steps(run: Run, layer: MultiHeadAttention, inputs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """What every mask has to leave true."""
    sums, blocked, leaks, parts = [], [], [], []
    for case in CASES:
        query, source = inputs[case.name]
        q, k, v = claims.projected(layer, query, source)
        by_steps, by_layer = partial(step_output, q, case), partial(layer_output, layer, query, case)
        for weights in (
            attention_steps(q, k, v, case.blocked).weights,
            layer(query, source, source, **case.masks)[1],
        ):
            sums.append(claims.row_sum_error(weights))
            blocked.append(claims.largest_blocked(weights, case.blocked))
        leaks.append(claims.leak(by_steps, k, v, case.blocked))
        leaks.append(claims.leak(by_layer, source, source, case.blocked))
        parts.append(claims.layer_error(attention_steps, layer, query, source, case.blocked, **case.masks))
    S, D, Dh = len(PADDED), layer.d_model, layer.head_dim
    run.check("rows_sum_to_one", "Σ_j weight_ij = 1 under every mask", largest(sums), rounding(S))
    run.check("masked_is_zero", "a masked weight is exactly 0", largest(blocked), 0.0)
    run.check("masked_never_leaks", "masked keys and values of 1e10 change nothing", largest(leaks), 0.0)
    run.check(
        "steps_make_the_layer",
        "split, five steps, join = the layer",
        largest(parts),
        attention_rounding(D, Dh, S, D),
    )


def step_output(q: Tensor, case: Case, k: Tensor, v: Tensor) -> Tensor:
    """What the five steps put out."""
    return attention_steps(q, k, v, case.blocked).output


def layer_output(layer: MultiHeadAttention, query: Tensor, case: Case, key: Tensor, value: Tensor) -> Tensor:
    """What the layer puts out."""
    return layer(query, key, value, **case.masks)[0]


def attention_rounding(*terms: int) -> float:
    """The tolerance of sums of so many terms in a row, in float64, of which softmax doubles what comes before."""
    return 2 * rounding(*terms)


def check_agreement(run: Run, layer: MultiHeadAttention, inputs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The five steps against torch's fused kernel, the layer against torch's: the worst of the cases."""
    fused, theirs = [], []
    for case in CASES:
        q, k, v = claims.projected(layer, *inputs[case.name])
        fused.append(claims.fused_agreement(attention_steps, q, k, v, case.blocked))
        theirs.append(claims.torch_agreement(layer, *inputs[case.name], case.blocked, **case.masks))
    S, D, Dh = len(PADDED), layer.d_model, layer.head_dim
    for what in ("output", "weights", "gradients"):
        times = 2 if what == "gradients" else 1  # a way back is as long as the way there
        run.check(
            f"fused_{what}",
            f"{what} of the five steps = F.scaled_dot_product_attention's",
            largest(found[what] for found in fused),
            times * attention_rounding(Dh, S),
        )
        run.check(
            f"torch_{what}",
            f"{what} of the layer = nn.MultiheadAttention's, same weights",
            largest(found[what] for found in theirs),
            times * attention_rounding(D, Dh, S, D),
        )


def check_layer(run: Run, layer: MultiHeadAttention, x: Tensor) -> None:
    """Order, both ways through the layer, and a query that may look nowhere."""
    order = torch.randperm(x.shape[1], generator=run.generator("order"))
    tolerance = attention_rounding(layer.d_model, layer.head_dim, x.shape[1], layer.d_model)
    run.check(
        "permutation",
        "f(P x) = P f(x) without positions",
        claims.equivariance_error(layer, x, order),
        tolerance,
    )
    single = MultiHeadAttention(layer.d_model, layer.num_heads)
    single.load_state_dict(layer.state_dict())
    paths = largest(claims.paths_difference(single, x.float(), causal) for causal in (False, True))
    run.check("paths", "float32 output with weights = without (fused)", paths, 1e-6)
    rows = [claims.masked_row(layer, x, need_weights) for need_weights in (True, False)]
    nothing = largest(number for row in rows for number in (row.weight, row.output))
    run.check("masked_row", "all masked: zero weights, output of zeros", nothing, 0.0)
    bad = max(row.not_finite for row in rows)
    run.check("masked_row_finite", "all masked: numbers that are not finite, gradients too", bad, 0)


def check_split(run: Run, layer: MultiHeadAttention, x: Tensor) -> None:
    """How projecting before the split into heads relates to projecting after it."""
    tolerance = attention_rounding(layer.d_model, layer.head_dim, x.shape[1], layer.d_model)
    same = claims.split_difference(claims.block_diagonal(layer), x)
    run.check(
        "split_block_diagonal", "project-then-split = split-then-project, block-diagonal W", same, tolerance
    )
    other = claims.split_difference(layer, x)
    run.check("split_general", "… and another function for a full W", other, 0.1, at_least=True)


def check_scale(run: Run, raw: Found, scaled: Found) -> None:
    """Standard deviations within their standard errors of √d_k and 1; what softmax makes of them."""
    off = largest(abs(found.std - d_k**0.5) / found.std_error for d_k, found in raw.items())
    run.check("raw_std", "std of q·k = √d_k, off by standard errors", off, ERRORS)
    off = largest(abs(found.std - 1) / found.std_error for found in scaled.values())
    run.check("scaled_std", "std of q·k/√d_k = 1, off by standard errors", off, ERRORS)
    kept = min(found.gradient for found in scaled.values()) / max(found.gradient for found in scaled.values())
    run.check(
        "scaled_gradient", "softmax's gradient: least / most over d_k, scaled", kept, 0.95, at_least=True
    )
    left = raw[SIZES[-1]].gradient / raw[SIZES[0]].gradient
    # where one weight takes all, a gradient is left to the queries alone whose two best scores lie within
    # about 1 of each other, and their share falls as 1/√d_k: an eighth from 16 to 1024
    run.check("raw_gradient", "… and d_k = 1024 / d_k = 16, not scaled", left, 0.25)
