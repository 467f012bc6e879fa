"""Milliseconds of multi-head attention: ours, the usual ways, and the limit of the matrix products.

    python -m tests.benchmarks.attention                         # float32 and bfloat16, 2 threads, 15 rounds
    python -m tests.benchmarks.attention --rounds 40 --dtype float32

Batch 8, length 512, model size 512, 8 heads, self-attention. All ways take turns in one process. The limit is
the products that the formula asks for, all of them also under a causal mask, by mm and bmm into ready buffers:
12.9 GFLOP forward, 38.7 with the backward pass. Forward is measured as in use (eval, no_grad), forward and
backward as in training. Printed are medians over the rounds; shares and ratios are medians of each round's own.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention
from tests.benchmarks.common import Row, make_parser, print_table, ratio, seconds, start, take_turns

B, L, D, H = 8, 512, 512, 8
DH = D // H
KINDS = {  # causal, with weights
    "without weights": (False, False),
    "without weights, causal": (True, False),
    "with weights": (False, True),
    "with weights, causal": (True, True),
}


class Way(nn.Module):
    """An attention, and how it is called."""

    def __init__(self, attention: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.attention, self.call = attention, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.attention, x)


def theirs(causal: bool, dtype: torch.dtype, **ways: bool) -> Way:
    """nn.MultiheadAttention with all that makes it quick: the float mask and the hint that it is causal."""
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype) if causal else None
    ways["is_causal"] = causal
    return Way(
        nn.MultiheadAttention(D, H, batch_first=True), lambda a, x: a(x, x, x, attn_mask=mask, **ways)[0]
    )


def fused_projection(causal: bool) -> Way:
    """F.scaled_dot_product_attention behind one projection to queries, keys and values."""

    def call(layers: nn.Module, x: Tensor) -> Tensor:
        q, k, v = layers["qkv"](x).view(B, L, 3, H, DH).permute(2, 0, 3, 1, 4)  # (B, H, L, Dh) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return layers["out"](y.transpose(1, 2).reshape(B, L, D))

    return Way(nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "out": nn.Linear(D, D)}), call)


def torchtune_attention(causal: bool) -> Way:
    modules = importlib.import_module("torchtune.modules")
    layers = {name: nn.Linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    sizes = {"embed_dim": D, "num_heads": H, "num_kv_heads": H, "head_dim": DH}
    return Way(modules.MultiHeadAttention(**sizes, **layers, is_causal=causal), lambda a, x: a(x, x))


def networks(causal: bool, weights: bool, dtype: torch.dtype) -> dict[str, Way]:
    """The ways of one kind of attention, ours first."""
    how = {"causal": causal, "need_weights": weights}
    found = {"ours": Way(MultiHeadAttention(D, H), lambda a, x: a(x, x, x, **how)[0])}
    if weights:
        for name, average in (("averaged", True), ("per head", False)):
            ways = {"need_weights": True, "average_attn_weights": average}
            found[f"nn.MultiheadAttention, {name}"] = theirs(causal, dtype, **ways)
        return found
    found["nn.MultiheadAttention"] = theirs(causal, dtype, need_weights=False)
    found["SDPA behind one projection"] = fused_projection(causal)
    with suppress(ImportError):
        found["torchtune"] = torchtune_attention(causal)
    return found


class Limit:
    """The matrix products alone, of the same shapes and layouts, into buffers that are there."""

    def __init__(self, dtype: torch.dtype):
        def new(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype)

        self.x, self.y, self.w, self.dw = new(B * L, D), new(B * L, D), new(D, D), new(D, D)
        self.q, self.k, self.v, self.heads = (new(B * H, L, DH) for _ in range(4))
        self.scores = new(B * H, L, L)

    def forward(self) -> None:
        for _ in range(4):  # queries, keys, values, and what is joined
            torch.mm(self.x, self.w.t(), out=self.y)
        torch.bmm(self.q, self.k.mT, out=self.scores)
        torch.bmm(self.scores, self.v, out=self.heads)

    def backward(self) -> None:
        for _ in range(4):
            torch.mm(self.y, self.w, out=self.x)
            torch.mm(self.y.t(), self.x, out=self.dw)
        torch.bmm(self.scores.mT, self.v, out=self.heads)  # of the values
        torch.bmm(self.q, self.v.mT, out=self.scores)  # of the weights
        torch.bmm(self.scores, self.k, out=self.heads)  # of the queries
        torch.bmm(self.scores.mT, self.q, out=self.heads)  # of the keys

    @torch.no_grad()
    def time(self) -> Row:
        """Seconds forward, and forward and backward."""
        gc.collect()
        forward = seconds(self.forward)
        both = forward + seconds(self.backward)
        for x in (self.x, self.y, self.scores):
            x.normal_()  # of size one again: products of products would grow until they overflow
        return forward, both


def time_network(network: nn.Module, x: Tensor, gradient: Tensor) -> Row:
    """Seconds forward, and forward and backward."""
    network.eval()
    with torch.no_grad():
        forward = seconds(lambda: network(x))
    network.train().zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    return forward, seconds(lambda: network(leaf).backward(gradient))


def measure(dtype: torch.dtype, rounds: int) -> dict[tuple[str, str], list[Row]]:
    """Times by (kind, way); two rounds before the first are not counted."""
    ways = {(kind, name): way for kind in KINDS for name, way in networks(*KINDS[kind], dtype).items()}
    torch.manual_seed(0)
    x, gradient, limit = torch.randn(B, L, D).to(dtype), torch.randn(B, L, D).to(dtype), Limit(dtype)
    calls = {key: partial(time_network, way.to(dtype), x, gradient) for key, way in ways.items()}
    return take_turns({("limit", ""): limit.time, **calls}, rounds, uncounted=2)


def report(dtype: torch.dtype, times: dict[tuple[str, str], list[Row]]) -> None:
    """The table in docs/benchmarks.md."""
    limit = times.pop(("limit", ""))
    pair = " and ".join(f"{statistics.median(row) * 1e3:.1f}" for row in limit)
    print(f"\n{dtype}; the limit, forward and forward+backward: {pair} ms\n")
    header, rows = ["weights, mask", "way"], []
    for name in ("forward", "forward+backward"):
        header += [f"{name}, ms", "share of the limit", "ours is faster by"]
    for (kind, name), own in times.items():
        rows.append([kind, name])
        for row, bound, ours in zip(own, limit, times[kind, "ours"], strict=True):
            rows[-1] += [f"{statistics.median(row) * 1e3:.1f}", f"{ratio(bound, row):.0%}"]
            rows[-1].append(f"{ratio(row, ours):.2f}×")
    print_table(header, rows)


def main() -> None:
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes to measure")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    start(arguments)
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        report(dtype, measure(dtype, arguments.rounds))


if __name__ == "__main__":
    main()
