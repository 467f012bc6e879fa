"""Milliseconds of a rotary encoding on (8, 16, 1024, 64): ours, the usual ways, and a copy of the same memory.

    python -m tests.benchmarks.positions               # memory of the process's own, then fresh pages
    python -m tests.benchmarks.positions --memory kept

A result of 33.5 MB is above glibc's threshold for memory of its own: by default each call gets fresh pages from
the kernel, and to fault them in costs many times the arithmetic, for every way alike. With `kept` the allocator
is told to reuse what it has (MALLOC_MMAP_MAX_=0 and a high MALLOC_TRIM_THRESHOLD_), as it does for smaller
results by itself. The limit is measured in the same turns and the same way: a copy into a fresh result (`clone`),
twice for forward and backward; a copy into a ready buffer stands beside it. The ways take turns in one process;
printed are medians over the rounds, and medians of the ratios within a round.
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.nn.positions import RotaryPosEncoding, inverse_frequencies
from tests.benchmarks.common import Row, make_parser, print_table, ratio, seconds, start, take_turns

B, H, L, D = 8, 16, 1024, 64
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
HALF = ("ours, half", "rotate_half, float32 tables")  # the ways that rotate x_i with x_{i + D/2}

Way = Callable[[Tensor], Tensor]


def rotate_half_way() -> Way:
    """The usual lines for the half layout: float32 tables, the input cast to float32 and the result back."""
    angle = torch.arange(L).double()[:, None] * inverse_frequencies(D)
    cos, sin = (torch.cat((table, table), dim=-1).float() for table in (angle.cos(), angle.sin()))

    def rotate(x: Tensor) -> Tensor:
        wide = x.float()
        rotated = torch.cat((-wide[..., D // 2 :], wide[..., : D // 2]), dim=-1)
        return (wide * cos + rotated * sin).to(x.dtype)

    return rotate


def torchtune_way() -> Way:
    """torchtune's, on its own (B, L, H, D)."""
    from torchtune.modules import RotaryPositionalEmbeddings

    return RotaryPositionalEmbeddings(dim=D, max_seq_len=L)


def lucidrains_way() -> Way:
    """rotary-embedding-torch's, its cache filled by a float32 call."""
    from rotary_embedding_torch import RotaryEmbedding

    module = RotaryEmbedding(dim=D, cache_if_possible=True)
    with torch.no_grad():
        module.rotate_queries_or_keys(torch.zeros(1, 1, L, D))
        module.freqs.requires_grad_(False)
    return module.rotate_queries_or_keys


def make_ways(x: Tensor) -> dict[str, tuple[Way, Tensor]]:
    """Every way with the input that it takes."""
    buffer = torch.empty_like(x)
    found: dict[str, tuple[Way, Tensor]] = {
        "copy into a ready buffer": (lambda x: buffer.copy_(x), x),
        "copy into a fresh result": (lambda x: x.clone(), x),
        "ours, interleaved": (RotaryPosEncoding(D, layout="interleaved"), x),
        "ours, half": (RotaryPosEncoding(D, layout="half"), x),
        "rotate_half, float32 tables": (rotate_half_way(), x),
    }
    peers = {"torchtune": torchtune_way, "rotary-embedding-torch": lucidrains_way}
    for name, make in peers.items():
        try:
            found[name] = make(), x.transpose(1, 2).contiguous() if name == "torchtune" else x
        except ImportError:
            print(f"{name} is not installed: skipped")
    return found


def time_way(name: str, way: Way, x: Tensor, backward: bool, calls: int) -> Callable[[], Row]:
    """Measure the forward pass alone, or with the backward pass, for which a copy is made twice."""
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)

    @torch.no_grad()
    def copy_twice() -> None:
        kept = way(x)
        way(kept)

    def both() -> None:
        torch.autograd.grad(way(leaf), leaf, gradient)

    def measure() -> Row:
        once = (
            (copy_twice if name.startswith("copy") else both) if backward else torch.no_grad()(lambda: way(x))
        )
        once()  # what the way before it left in the caches is no part of it
        return (seconds(once, calls),)

    return measure


def report(title: str, times: dict[str, list[Row]], unit: str) -> None:
    print(f"\n{title}")
    others = ("copy into a fresh result", "ours, interleaved", "ours, half")
    print_table(
        ["way", "ms", f"in {unit}", "times ours, interleaved", "times ours, half"],
        [
            [name, f"{statistics.median(own) * 1e3:.2f}", *(f"{ratio(own, times[o][0]):.2f}" for o in others)]
            for name, (own,) in times.items()
        ],
    )


def print_errors(ways: dict[str, tuple[Way, Tensor]], x: Tensor) -> None:
    """The greatest error of each way against equation (3) in float64 of the very same input."""
    angle = torch.arange(L).double()[:, None] * inverse_frequencies(D)
    cos, sin = angle.cos(), angle.sin()
    for name, (way, given) in ways.items():
        if name.startswith("copy"):
            continue
        wide = x.double()
        members = wide.chunk(2, dim=-1) if name in HALF else (wide[..., 0::2], wide[..., 1::2])
        turned = (members[0] * cos - members[1] * sin, members[1] * cos + members[0] * sin)
        exact = torch.cat(turned, dim=-1) if name in HALF else torch.stack(turned, dim=-1).flatten(-2)
        with torch.no_grad():
            found = way(given)
        found = found.transpose(1, 2) if name == "torchtune" else found
        print(f"error of {name}: {float((found.double() - exact).abs().max()):.2g}")


def run(memory: str, rounds: int, calls: int) -> None:
    """All tables in the memory that this process was started with."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(B, H, L, D, generator=torch.Generator().manual_seed(0)).to(dtype)
        ways = make_ways(x)
        for backward in (False, True):
            turns = {name: time_way(name, *way, backward, calls) for name, way in ways.items()}
            title = f"{str(dtype).removeprefix('torch.')}, {memory} memory, forward"
            title, unit = (f"{title} and backward", "two copies") if backward else (title, "copies")
            report(title, take_turns(turns, rounds), unit)
        print()
        print_errors(ways, x)


def main() -> None:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--calls", type=int, default=3, help="calls of a way per round")
    parser.add_argument("--memory", choices=["kept", "fresh"], help="one of the two alone")
    parser.add_argument("--here", action="store_true", help="in this process, as its allocator is")
    arguments = parser.parse_args()
    if not arguments.here:
        for memory in [arguments.memory] if arguments.memory else ["kept", "fresh"]:
            command = [sys.executable, "-m", "tests.benchmarks.positions", "--here", "--memory", memory]
            command += [f"--{key}={getattr(arguments, key)}" for key in ("rounds", "calls", "threads")]
            subprocess.run(command, env={**os.environ, **(KEPT if memory == "kept" else {})}, check=True)
        return
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it says that its own kernels are not used
    print()
    start(arguments)
    run(arguments.memory, arguments.rounds, arguments.calls)


if __name__ == "__main__":
    main()
