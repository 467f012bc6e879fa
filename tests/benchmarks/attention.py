"""Milliseconds of multi-head attention: ours, `nn.MultiheadAttention`, and the limit of the matrix products.

    python -m tests.benchmarks.attention                         # float32 and bfloat16, 2 threads, 15 rounds
    python -m tests.benchmarks.attention --rounds 40 --dtype float32

Batch 8, length 512, model size 512, 8 heads, self-attention. All ways take turns in one process. The limit is
the products that the formula asks for, all of them also under a causal mask, by mm and bmm into ready buffers:
12.9 GFLOP forward, 38.7 with the backward pass. Forward is measured as in use (eval, no_grad), forward and
backward as in training. Printed are medians over the rounds; shares and ratios are medians of each round's own.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention
from tests.benchmarks.common import Row, make_parser, ratio, seconds, show_table, start, take_turns

B, L, D, H = 8, 512, 512, 8
KINDS = {  # causal, with weights
    "without weights": (False, False),
    "without weights, causal": (True, False),
    "with weights": (False, True),
    "with weights, causal": (True, True),
}
Way = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]  # layers, and how they are called


def theirs(causal: bool, dtype: torch.dtype, **how: bool) -> Way:
    """nn.MultiheadAttention with all that makes it quick: the float mask and the hint that it is causal."""
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype) if causal else None
    call = partial(nn.MultiheadAttention.__call__, attn_mask=mask, is_causal=causal, **how)
    return nn.MultiheadAttention(D, H, batch_first=True), lambda a, x: call(a, x, x, x)[0]


def networks(causal: bool, weights: bool, dtype: torch.dtype) -> dict[str, Way]:
    """The ways of one kind of attention, ours first."""
    how, torchs = {"causal": causal, "need_weights": weights}, "nn.MultiheadAttention"
    ours = MultiHeadAttention(D, H), lambda a, x: a(x, x, x, **how)[0]
    if not weights:
        return {"ours": ours, torchs: theirs(causal, dtype, need_weights=False)}
    averaged, per_head = (theirs(causal, dtype, average_attn_weights=average) for average in (True, False))
    return {"ours": ours, f"{torchs}, averaged": averaged, f"{torchs}, per head": per_head}


def make_limit(dtype: torch.dtype) -> Callable[[], Row]:
    """The matrix products alone, of the same shapes and layouts, into buffers that are there."""

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    (x, y), (w, dw) = (new(2, B * L, D), new(2, D, D))
    q, k, v, heads = new(4, B * H, L, D // H)
    scores = new(B * H, L, L)
    forward = [
        *[(torch.mm, x, w.t(), y)] * 4,  # queries, keys, values, and what is joined
        *[(torch.bmm, q, k.mT, scores), (torch.bmm, scores, v, heads)],
    ]
    backward = [
        *[(torch.mm, y, w, x), (torch.mm, y.t(), x, dw)] * 4,
        (torch.bmm, scores.mT, v, heads),  # of the values
        (torch.bmm, q, v.mT, scores),  # of the weights
        (torch.bmm, scores, k, heads),  # of the queries
        (torch.bmm, scores.mT, q, heads),  # of the keys
    ]

    def multiply(products: list[tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]]) -> None:
        for product, a, b, out in products:
            product(a, b, out=out)

    @torch.no_grad()
    def time() -> Row:
        gc.collect()
        once = seconds(partial(multiply, forward))
        both = once + seconds(partial(multiply, backward))
        for z in (x, y, scores):
            z.normal_()  # of size one again: products of products would grow until they overflow
        return once, both

    return time


def time_network(way: Way, x: Tensor, gradient: Tensor) -> Row:
    """Seconds forward, and forward and backward."""
    network, call = way
    network.eval()
    with torch.no_grad():
        forward = seconds(lambda: call(network, x))
    network.train().zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    return forward, seconds(lambda: call(network, leaf).backward(gradient))


def measure(dtype: torch.dtype, rounds: int) -> dict[tuple[str, str], list[Row]]:
    """Times by (kind, way); two rounds before the first are not counted."""
    ways = {(kind, name): way for kind in KINDS for name, way in networks(*KINDS[kind], dtype).items()}
    torch.manual_seed(0)
    x, gradient = torch.randn(2, B, L, D).to(dtype)
    calls = {("limit", ""): make_limit(dtype)}
    for key, (network, call) in ways.items():
        calls[key] = partial(time_network, (network.to(dtype), call), x, gradient)
    return take_turns(calls, rounds, uncounted=2)


def report(dtype: torch.dtype, times: dict[tuple[str, str], list[Row]]) -> None:
    """The table in docs/benchmarks.md."""
    limit = times.pop(("limit", ""))
    pair = " and ".join(f"{median(row) * 1e3:.1f}" for row in limit)
    print(f"\n{dtype}; the limit, forward and forward+backward: {pair} ms\n")
    header, rows = ["weights, mask", "way"], []
    for name in ("forward", "forward+backward"):
        header += [f"{name}, ms", "share of the limit", "ours is faster by"]
    for key, own in times.items():
        rows.append([*key])
        for row, bound, ours in zip(own, limit, times[key[0], "ours"], strict=True):
            rows[-1] += [f"{median(row) * 1e3:.1f}", f"{ratio(bound, row):.0%}", f"{ratio(row, ours):.2f}×"]
    show_table(header, rows)


def main() -> None:
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes to measure")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    start(arguments)
    for dtype in (getattr(torch, name) for name in arguments.dtype):
        report(dtype, measure(dtype, arguments.rounds))


if __name__ == "__main__":
    main()
