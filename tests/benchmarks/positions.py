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
import subprocess
import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from experiments.nn.positions import RotaryPosEncoding, inverse_frequencies
from tests.benchmarks.common import Row, installed, make_parser, ratio, seconds, show_table, start, take_turns

B, H, L, D = 8, 16, 1024, 64
LIMITS = {"MMAP_MAX": 0, "TRIM_THRESHOLD": 1 << 40, "TOP_PAD": 1 << 28}
MEMORY = {  # what the allocator is told
    "kept": {f"MALLOC_{name}_": str(n) for name, n in LIMITS.items()},
    "fresh": {},
}
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
    ways = {
        "copy into a ready buffer": buffer.copy_,
        "copy into a fresh result": torch.clone,
        "ours, interleaved": RotaryPosEncoding(D, layout="interleaved"),
        "ours, half": RotaryPosEncoding(D, layout="half"),
        "rotate_half, float32 tables": rotate_half_way(),
        **installed({"torchtune": torchtune_way, "rotary-embedding-torch": lucidrains_way}),
    }
    swapped = x.transpose(1, 2).contiguous()  # (B, L, H, D)
    return {name: (way, swapped if name == "torchtune" else x) for name, way in ways.items()}


def time_way(name: str, way: Way, x: Tensor, backward: bool, calls: int) -> Callable[[], Row]:
    """Measure the forward pass alone, or with the backward pass, for which a copy is made twice."""
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)

    @torch.no_grad()
    def forward() -> None:
        result = way(x)
        if backward:
            way(result)

    def both() -> None:
        torch.autograd.grad(way(leaf), leaf, gradient)

    def measure() -> Row:
        once = both if backward and not name.startswith("copy") else forward
        once()  # what the way before it left in the caches is no part of it
        return (seconds(once, calls),)

    return measure


def report(times: dict[str, list[Row]], unit: str) -> None:
    others = ("copy into a fresh result", "ours, interleaved", "ours, half")
    rows = [
        [name, f"{median(own) * 1e3:.2f}", *(f"{ratio(own, times[other][0]):.2f}" for other in others)]
        for name, (own,) in times.items()
    ]
    show_table(["way", "ms", f"in {unit}", "times ours, interleaved", "times ours, half"], rows)


def print_errors(ways: dict[str, tuple[Way, Tensor]], x: Tensor) -> None:
    """The greatest error of each way against equation (3) in float64 of the very same input."""
    angle = torch.arange(L).double()[:, None] * inverse_frequencies(D)
    turn = torch.polar(torch.ones_like(angle), angle)  # (L, D/2), of complex numbers
    for name, (way, given) in ways.items():
        if name.startswith("copy"):
            continue
        half = name in HALF
        pairs = x.double().unflatten(-1, (2, D // 2)).mT if half else x.double().unflatten(-1, (D // 2, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        with torch.no_grad():
            found = way(given).transpose(1, 2) if name == "torchtune" else way(given)
        error = found.double() - (turned.mT if half else turned).flatten(-2)
        print(f"error of {name}: {float(error.abs().max()):.2g}")


def run(memory: str, rounds: int, calls: int) -> None:
    """All tables in the memory that this process was started with."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(B, H, L, D, generator=torch.Generator().manual_seed(0)).to(dtype)
        ways = make_ways(x)
        for backward in (False, True):
            turns = {name: time_way(name, *way, backward, calls) for name, way in ways.items()}
            print(f"\n{dtype}, {memory} memory, forward{' and backward' if backward else ''}")
            report(take_turns(turns, rounds), "two copies" if backward else "copies")
        print()
        print_errors(ways, x)


def main() -> None:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--calls", type=int, default=3, help="calls of a way per round")
    parser.add_argument("--memory", choices=MEMORY, nargs="+", default=[*MEMORY], help="one of the two alone")
    parser.add_argument("--here", action="store_true", help="in this process, as its allocator is")
    arguments = parser.parse_args()
    if not arguments.here:
        for memory in arguments.memory:
            command = [sys.executable, "-m", "tests.benchmarks.positions", "--here", "--memory", memory]
            command += [f"--{key}={getattr(arguments, key)}" for key in ("rounds", "calls", "threads")]
            subprocess.run(command, env=os.environ | MEMORY[memory], check=True)
        return
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it says that its own kernels are not used
    print()
    start(arguments)
    run(arguments.memory[0], arguments.rounds, arguments.calls)


if __name__ == "__main__":
    main()
