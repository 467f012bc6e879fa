"""Checks against the formulas, against PyTorch, and of what the trained networks have learnt."""

from __future__ import annotations

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
    errors = [_case_errors(layer, *inputs[case.name], case) for case in CASES]
    row_sums, blocked, leaks, parts = (largest(error) for error in zip(*errors, strict=True))
    S = len(PADDED)
    run.check("rows_sum_to_one", "Σ_j weight_ij = 1 under every mask", row_sums, rounding(S))
    run.check("masked_is_zero", "a masked weight is exactly 0", blocked, 0.0)
    run.check("masked_never_leaks", "masked keys and values of 1e10 change nothing", leaks, 0.0)
    run.check("steps_make_the_layer", "split, five steps, join = the layer", parts, _layer_rounding(layer, S))


def _case_errors(layer: MultiHeadAttention, query: Tensor, source: Tensor, case: Case) -> tuple[float, ...]:
    """Return how far the sums of weights, masked weights, masked tokens' influence and the layer's parts are off."""
    q, k, v = claims.projected(layer, query, source)
    blocked, masks = case.blocked, case.masks

    # of the five steps and of the layer
    both = (attention_steps(q, k, v, blocked).weights, layer(query, source, source, **masks)[1])
    leaks = (
        claims.leak(lambda k, v: attention_steps(q, k, v, blocked).output, k, v, blocked),
        claims.leak(lambda k, v: layer(query, k, v, **masks)[0], source, source, blocked),
    )
    return (
        largest(claims.row_sum_error(weights) for weights in both),
        largest(claims.largest_blocked(weights, blocked) for weights in both),
        largest(leaks),
        claims.layer_error(attention_steps, layer, query, source, blocked, **masks),
    )


def _layer_rounding(layer: MultiHeadAttention, S: int) -> float:
    """Return the tolerance of a layer's consecutive sums in float64; softmax doubles the error before it."""
    return 2 * rounding(layer.d_model, layer.head_dim, S, layer.d_model)


def check_agreement(run: Run, layer: MultiHeadAttention, inputs: Inputs) -> None:
    """Compare the five steps with torch's fused kernel and the layer with torch's: the worst of the cases."""
    # differences by case
    fused, theirs = [], []
    for case in CASES:
        q, k, v = claims.projected(layer, *inputs[case.name])
        fused.append(claims.fused_agreement(attention_steps, q, k, v, case.blocked))
        theirs.append(claims.torch_agreement(layer, *inputs[case.name], case.blocked, **case.masks))

    # the largest of each quantity
    S = len(PADDED)
    for quantity in ("output", "weights", "gradients"):
        passes = 2 if quantity == "gradients" else 1  # the backward pass is as long as the forward one
        run.check(
            f"fused_{quantity}",
            f"{quantity} of the five steps = F.scaled_dot_product_attention's",
            largest(errors[quantity] for errors in fused),
            passes * 2 * rounding(layer.head_dim, S),
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
    weights, outputs, not_finite = (largest(numbers) for numbers in zip(*rows, strict=True))
    run.check("masked_row", "all masked: zero weights, output of zeros", largest((weights, outputs)), 0.0)
    run.check("masked_row_finite", "all masked: numbers that are not finite, gradients too", not_finite, 0)


def check_split(run: Run, layer: MultiHeadAttention, x: Tensor) -> None:
    """Check how projecting before the split into heads relates to projecting after it."""
    claim = "project-then-split = split-then-project"
    error = claims.split_difference(claims.block_diagonal(layer), x)
    run.check("split_block_diagonal", f"{claim}, block-diagonal W", error, _layer_rounding(layer, x.shape[1]))
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
            run.check(f"{name}_learnt", f"{heads} heads answer both questions", both, 0.99, at_least=True)

    if trained and "heads_2" in ablated:
        fall = min(float(shares["heads_2"][0] - without[0]) for without in ablated["heads_2"])
        claim = "without either of 2 heads the accuracy falls by"
        run.check("heads_2_needed", claim, fall, 0.25, at_least=True)
