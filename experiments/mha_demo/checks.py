"""Checks against the formulas, against PyTorch, and of what the trained networks have learnt."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from experiments.mha_demo import claims
from experiments.mha_demo.cases import CASES, CEILING, PADDED, SIZES, Case, Inputs, StatisticsBySize
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import attention_steps
from experiments.nn.exactness import largest, rounding
from runner.task import Run

_ERRORS = 5  # standard errors that a mean over random scores may be off: one in two million would be


def check_steps(run: Run, layer: MultiHeadAttention, inputs: Inputs) -> None:
    """Check the weights, the masks and the parts of the layer under every mask."""
    row_sums, blocked, leaks, parts = [], [], [], []
    for case in CASES:
        query, source = inputs[case.name]
        q, k, v = claims.projected(layer, query, source)

        # weights, of the five steps and of the layer
        for weights in (
            attention_steps(q, k, v, case.blocked).weights,
            layer(query, source, source, **case.masks)[1],
        ):
            row_sums.append(claims.row_sum_error(weights))
            blocked.append(claims.largest_blocked(weights, case.blocked))

        # masked tokens, and the layer from its parts
        leaks.append(claims.leak(partial(_step_output, q, case), k, v, case.blocked))
        leaks.append(claims.leak(partial(_layer_output, layer, query, case), source, source, case.blocked))
        parts.append(claims.layer_error(attention_steps, layer, query, source, case.blocked, **case.masks))

    tolerance = _layer_rounding(layer, len(PADDED))
    run.check(
        "rows_sum_to_one", "Σ_j weight_ij = 1 under every mask", largest(row_sums), rounding(len(PADDED))
    )
    run.check("masked_is_zero", "a masked weight is exactly 0", largest(blocked), 0.0)
    run.check("masked_never_leaks", "masked keys and values of 1e10 change nothing", largest(leaks), 0.0)
    run.check("steps_make_the_layer", "split, five steps, join = the layer", largest(parts), tolerance)


def _step_output(q: Tensor, case: Case, k: Tensor, v: Tensor) -> Tensor:
    return attention_steps(q, k, v, case.blocked).output


def _layer_output(layer: MultiHeadAttention, query: Tensor, case: Case, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = layer(query, key, value, **case.masks)[0]
    return output


def _attention_rounding(*terms: int) -> float:
    """Return the tolerance of consecutive sums of so many terms in float64; softmax doubles the error before it."""
    return 2 * rounding(*terms)


def _layer_rounding(layer: MultiHeadAttention, S: int) -> float:
    return _attention_rounding(layer.d_model, layer.head_dim, S, layer.d_model)


def check_agreement(run: Run, layer: MultiHeadAttention, inputs: Inputs) -> None:
    """Compare the five steps with torch's fused kernel and the layer with torch's: the worst of the cases."""
    fused, theirs = [], []
    for case in CASES:
        q, k, v = claims.projected(layer, *inputs[case.name])
        fused.append(claims.fused_agreement(attention_steps, q, k, v, case.blocked))
        theirs.append(claims.torch_agreement(layer, *inputs[case.name], case.blocked, **case.masks))

    S = len(PADDED)
    for quantity in ("output", "weights", "gradients"):
        passes = 2 if quantity == "gradients" else 1  # the backward pass is as long as the forward one
        run.check(
            f"fused_{quantity}",
            f"{quantity} of the five steps = F.scaled_dot_product_attention's",
            largest(errors[quantity] for errors in fused),
            passes * _attention_rounding(layer.head_dim, S),
        )
        run.check(
            f"torch_{quantity}",
            f"{quantity} of the layer = nn.MultiheadAttention's, same weights",
            largest(errors[quantity] for errors in theirs),
            passes * _layer_rounding(layer, S),
        )


def check_layer(run: Run, layer: MultiHeadAttention, x: Tensor) -> None:
    """Check order, both paths through the layer, and a query that may attend to nothing."""
    # order
    order = torch.randperm(x.shape[1], generator=run.generator("order"))
    error = claims.equivariance_error(layer, x, order)
    run.check("permutation", "f(P x) = P f(x) without positions", error, _layer_rounding(layer, x.shape[1]))

    # with weights and without
    single = MultiHeadAttention(layer.d_model, layer.num_heads)
    single.load_state_dict(layer.state_dict())
    paths = largest(claims.paths_difference(single, x.float(), causal) for causal in (False, True))
    run.check("paths", "float32 output with weights = without (fused)", paths, 1e-6)

    # a row that is masked altogether
    rows = [claims.masked_row(layer, x, need_weights) for need_weights in (True, False)]
    error = largest(number for row in rows for number in (row.weight, row.output))
    run.check("masked_row", "all masked: zero weights, output of zeros", error, 0.0)
    not_finite = max(row.not_finite for row in rows)
    run.check("masked_row_finite", "all masked: numbers that are not finite, gradients too", not_finite, 0)


def check_split(run: Run, layer: MultiHeadAttention, x: Tensor) -> None:
    """Check how projecting before the split into heads relates to projecting after it."""
    error, tolerance = (
        claims.split_difference(claims.block_diagonal(layer), x),
        _layer_rounding(layer, x.shape[1]),
    )
    run.check(
        "split_block_diagonal", "project-then-split = split-then-project, block-diagonal W", error, tolerance
    )
    difference = claims.split_difference(layer, x)
    run.check("split_general", "… and another function for a full W", difference, 0.1, at_least=True)


def check_scale(run: Run, raw: StatisticsBySize, scaled: StatisticsBySize) -> None:
    """Check that standard deviations lie within their errors of √d_k and 1, and the gradients of softmax."""
    # standard deviations
    off = largest(abs(stats.std - d_k**0.5) / stats.std_error for d_k, stats in raw.items())
    run.check("raw_std", "std of q·k = √d_k, off by standard errors", off, _ERRORS)
    off = largest(abs(stats.std - 1) / stats.std_error for stats in scaled.values())
    run.check("scaled_std", "std of q·k/√d_k = 1, off by standard errors", off, _ERRORS)

    # gradients
    gradients = [stats.gradient for stats in scaled.values()]
    ratio, claim = min(gradients) / max(gradients), "softmax's gradient: least / most over d_k, scaled"
    run.check("scaled_gradient", claim, ratio, 0.95, at_least=True)
    ratio = raw[SIZES[-1]].gradient / raw[SIZES[0]].gradient
    # where one weight takes all, a gradient is left to the queries alone whose two best scores lie within
    # about 1 of each other, and their share falls as 1/√d_k: an eighth from 16 to 1024
    run.check("raw_gradient", "… and d_k = 1024 / d_k = 16, not scaled", ratio, 0.25)


def check_heads(run: Run, shares: dict[str, Tensor], ablated: dict[str, list[Tensor]], trained: bool) -> None:
    """Check one head's ceiling and, of networks that are `trained`, that several heads have learnt the task."""
    for name, share in shares.items():
        both, heads = float(share[0]), len(ablated[name])
        if heads == 1:
            run.check("one_head_ceiling", "one head answers at most 3 of 4 questions", both, CEILING)
        elif trained:
            claim = f"{heads} heads answer both questions"
            run.check(f"{name}_learnt", claim, both, 0.99, at_least=True)

    if trained and "heads_2" in ablated:
        fall = min(float(shares["heads_2"][0] - without[0]) for without in ablated["heads_2"])
        run.check(
            "heads_2_needed", "without either of 2 heads the accuracy falls by", fall, 0.25, at_least=True
        )
