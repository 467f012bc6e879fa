"""Milliseconds of multi-head attention: ours, the usual ways, and the limit of the matrix products.

    python -m tests.benchmarks.attention                         # float32 and bfloat16, 2 threads, 15 rounds
    python -m tests.benchmarks.attention --rounds 40 --dtype float32

Batch 8, length 512, model size 512, 8 heads, self-attention. All ways take turns in one process. The limit is
the products that the formula asks for, all of them also under a causal mask, by mm and bmm into ready buffers:
12.9 GFLOP forward, 38.7 with the backward pass. Forward is measured as in use (eval, no_grad), forward and
backward as in training. Printed are medians over the rounds; shares and ratios are medians of each round's own.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nn.attention import MultiHeadAttention

B, L, D, H = 8, 512, 512, 8
DH = D // H
Way = Callable[[Tensor], Tensor]


class FusedProjection(nn.Module):
    """F.scaled_dot_product_attention behind one projection to queries, keys and values."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, L, 3, H, DH).permute(2, 0, 3, 1, 4)  # (B, H, L, Dh) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(B, L, D))


class Ours(nn.Module):
    """MultiHeadAttention as it is called."""

    def __init__(self, causal: bool, weights: bool):
        super().__init__()
        self.attention, self.causal, self.weights = MultiHeadAttention(D, H), causal, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, causal=self.causal, need_weights=self.weights)[0]


class Theirs(nn.Module):
    """nn.MultiheadAttention with all that makes it quick: the float mask and the hint that it is causal."""

    def __init__(self, causal: bool, weights: bool, average: bool = True):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, H, batch_first=True)
        self.causal, self.weights, self.average = causal, weights, average
        mask = nn.Transformer.generate_square_subsequent_mask(L) if causal else None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(
            x,
            x,
            x,
            attn_mask=self.mask,
            is_causal=self.causal,
            need_weights=self.weights,
            average_attn_weights=self.average,
        )[0]


def torchtune_attention(causal: bool) -> nn.Module | None:
    """torchtune's MultiHeadAttention, None where it is not installed."""
    try:
        modules = importlib.import_module("torchtune.modules")
    except ImportError:
        return None
    layers = {name: nn.Linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    sizes = {"embed_dim": D, "num_heads": H, "num_kv_heads": H, "head_dim": DH}
    attention = modules.MultiHeadAttention(**sizes, **layers, is_causal=causal)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x)

    return Both()


def networks(causal: bool, weights: bool) -> dict[str, nn.Module]:
    """The ways of one kind of attention, ours first."""
    found: dict[str, nn.Module] = {"ours": Ours(causal, weights)}
    if weights:
        found["nn.MultiheadAttention, averaged"] = Theirs(causal, True)
        found["nn.MultiheadAttention, per head"] = Theirs(causal, True, average=False)
        return found
    found["nn.MultiheadAttention"] = Theirs(causal, False)
    found["SDPA behind one projection"] = FusedProjection(causal)
    torchtune = torchtune_attention(causal)
    if torchtune is not None:
        found["torchtune"] = torchtune
    return found


class Limit:
    """The matrix products alone, of the same shapes and layouts, into buffers that are there."""

    def __init__(self, dtype: torch.dtype):
        def new(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype)

        self.x, self.w, self.dw = new(B * L, D), new(D, D), new(D, D)
        self.y = new(B * L, D)
        self.q, self.k, self.v = new(B * H, L, DH), new(B * H, L, DH), new(B * H, L, DH)
        self.scores, self.heads = new(B * H, L, L), new(B * H, L, DH)

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

    def renew(self) -> None:
        """Numbers of size one again: products of products would grow until they overflow."""
        for x in (self.x, self.y, self.scores):
            x.normal_()


@dataclass
class Times:
    """Seconds of one way, a number per round: of the forward pass, and of forward and backward."""

    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_network(network: nn.Module, x: Tensor, gradient: Tensor, times: Times) -> None:
    """One round of one way."""
    network.eval()
    with torch.no_grad():
        times.forward.append(seconds(lambda: network(x)))
    network.train()
    network.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    times.both.append(seconds(lambda: network(leaf).backward(gradient)))


def time_limit(limit: Limit, times: Times) -> None:
    """One round of the products alone."""
    with torch.no_grad():
        forward = seconds(limit.forward)
        times.forward.append(forward)
        times.both.append(forward + seconds(limit.backward))
        limit.renew()


def measure(dtype: torch.dtype, rounds: int) -> dict[tuple[str, str], Times]:
    """Times by (kind, way), all ways taking turns; two rounds before the first are not counted."""
    kinds = {
        "without weights": (False, False),
        "without weights, causal": (True, False),
        "with weights": (False, True),
        "with weights, causal": (True, True),
    }
    ways = {
        (kind, name): network.to(dtype)
        for kind, (causal, weights) in kinds.items()
        for name, network in networks(causal, weights).items()
    }
    torch.manual_seed(0)
    x, gradient, limit = torch.randn(B, L, D).to(dtype), torch.randn(B, L, D).to(dtype), Limit(dtype)
    times = {key: Times() for key in [*ways, ("limit", "")]}
    for number in range(-2, rounds):
        counted = times if number >= 0 else {key: Times() for key in times}
        gc.collect()
        time_limit(limit, counted["limit", ""])
        for key, network in ways.items():
            time_network(network, x, gradient, counted[key])
    return times


def median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def report(dtype: torch.dtype, times: dict[tuple[str, str], Times]) -> None:
    """The table in docs/benchmarks.md."""
    limit = times["limit", ""]
    pair = f"{statistics.median(limit.forward) * 1e3:.1f} and {statistics.median(limit.both) * 1e3:.1f} ms"
    print(f"\n{dtype}; the limit, forward and forward+backward: {pair}\n")
    header = ["weights, mask", "way", "forward, ms", "share of the limit", "ours is faster by"]
    header += ["forward+backward, ms", "share of the limit", "ours is faster by"]
    print(f"| {' | '.join(header)} |\n{'| --- ' * len(header)}|")
    for (kind, name), t in times.items():
        if kind == "limit":
            continue
        cells = []
        for own, bound, ours in (
            (t.forward, limit.forward, times[kind, "ours"].forward),
            (t.both, limit.both, times[kind, "ours"].both),
        ):
            cells += [f"{statistics.median(own) * 1e3:.1f}", f"{median_ratio(bound, own):.0%}"]
            cells.append(f"{median_ratio(own, ours):.2f}×")
        print(f"| {kind} | {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of every way")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes to measure")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {arguments.threads} threads, load {load:.2f} at the start")
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        report(dtype, measure(dtype, arguments.rounds))


if __name__ == "__main__":
    main()
