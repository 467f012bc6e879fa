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

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.nn.positions import RotaryPosEncoding, inverse_frequencies
from experiments.nn.rotation import Layout

B, H, L, D = 8, 16, 1024, 64
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}

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


def torchtune_way() -> Way | None:
    """torchtune's, on its own (B, L, H, D)."""
    try:
        from torchtune.modules import RotaryPositionalEmbeddings
    except ImportError:
        print("torchtune is not installed: skipped")
        return None
    return RotaryPositionalEmbeddings(dim=D, max_seq_len=L)


def lucidrains_way() -> Way | None:
    """rotary-embedding-torch's, its cache filled by a float32 call."""
    try:
        from rotary_embedding_torch import RotaryEmbedding
    except ImportError:
        print("rotary-embedding-torch is not installed: skipped")
        return None
    module = RotaryEmbedding(dim=D, cache_if_possible=True)
    with torch.no_grad():
        module.rotate_queries_or_keys(torch.zeros(1, 1, L, D))
        module.freqs.requires_grad_(False)
    return module.rotate_queries_or_keys


def ways(x: Tensor) -> dict[str, tuple[Way, Tensor]]:
    """Every way with the input that it takes."""
    buffer = torch.empty_like(x)

    def ours(layout: Layout) -> tuple[Way, Tensor]:
        return RotaryPosEncoding(D, layout=layout), x

    found: dict[str, tuple[Way | None, Tensor]] = {
        "copy into a ready buffer": (lambda x: buffer.copy_(x), x),
        "copy into a fresh result": (lambda x: x.clone(), x),
        "ours, interleaved": ours("interleaved"),
        "ours, half": ours("half"),
        "rotate_half, float32 tables": (rotate_half_way(), x),
        "torchtune": (torchtune_way(), x.transpose(1, 2).contiguous()),
        "rotary-embedding-torch": (lucidrains_way(), x),
    }
    return {name: (way, given) for name, (way, given) in found.items() if way is not None}


def forward(way: Way, x: Tensor) -> Callable[[], None]:
    def once() -> None:
        with torch.no_grad():
            way(x)

    return once


def forward_and_backward(way: Way, x: Tensor) -> Callable[[], None]:
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)

    def once() -> None:
        torch.autograd.grad(way(leaf), leaf, gradient)

    return once


def two_copies(way: Way, x: Tensor) -> Callable[[], None]:
    def once() -> None:
        with torch.no_grad():
            kept = way(x)
            way(kept)

    return once


def seconds(once: Callable[[], None], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        once()
    return (time.perf_counter() - begun) / calls


def measure(turns: dict[str, Callable[[], None]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds of each, a number per round; one round before the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, once in turns.items():
            once()  # what the way before it left in the caches is no part of it
            found = seconds(once, calls)
            if number:
                times[name].append(found)
    return times


def report(title: str, times: dict[str, list[float]], unit: str) -> None:
    header = ["way", "ms", f"in {unit}", "times ours, interleaved", "times ours, half"]
    print(f"\n{title}\n| {' | '.join(header)} |\n{'| --- ' * len(header)}|")
    for name, found in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(found, times[other], strict=True))
            for other in ("copy into a fresh result", "ours, interleaved", "ours, half")
        ]
        print(f"| {name} | {statistics.median(found) * 1e3:.2f} | {' | '.join(f'{r:.2f}' for r in ratios)} |")


def exactness(all_ways: dict[str, tuple[Way, Tensor]], x: Tensor) -> None:
    """The greatest error of each way against equation (3) in float64 of the very same input."""
    angle = torch.arange(L).double()[:, None] * inverse_frequencies(D)
    cos, sin = angle.cos(), angle.sin()
    half = {"ours, half", "rotate_half, float32 tables"}
    for name, (way, given) in all_ways.items():
        if name.startswith("copy"):
            continue
        wide = x.double()
        members = wide.chunk(2, dim=-1) if name in half else (wide[..., 0::2], wide[..., 1::2])
        turned = (members[0] * cos - members[1] * sin, members[1] * cos + members[0] * sin)
        exact = torch.cat(turned, dim=-1) if name in half else torch.stack(turned, dim=-1).flatten(-2)
        with torch.no_grad():
            found = way(given)
        found = found.transpose(1, 2) if name == "torchtune" else found
        print(f"error of {name}: {float((found.double() - exact).abs().max()):.2g}")


def run(memory: str, rounds: int, calls: int) -> None:
    """All tables in the memory that this process was started with."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(B, H, L, D, generator=torch.Generator().manual_seed(0)).to(dtype)
        all_ways = ways(x)
        name = f"{str(dtype).removeprefix('torch.')}, {memory} memory"
        once = {key: forward(way, given) for key, (way, given) in all_ways.items()}
        report(f"{name}, forward", measure(once, rounds, calls), "copies")
        both = {
            key: (two_copies if key.startswith("copy") else forward_and_backward)(way, given)
            for key, (way, given) in all_ways.items()
        }
        report(f"{name}, forward and backward", measure(both, rounds, calls), "two copies")
        print()
        exactness(all_ways, x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds")
    parser.add_argument("--calls", type=int, default=3, help="calls of a way per round")
    parser.add_argument("--threads", type=int, default=2, help="threads of every way")
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
    torch.set_num_threads(arguments.threads)
    print(
        f"\ntorch {torch.__version__}, {arguments.threads} threads, load {os.getloadavg()[0]:.2f} at the start"
    )
    run(arguments.memory, arguments.rounds, arguments.calls)


if __name__ == "__main__":
    main()
