"""Images per second of the paper's U-Net: ours, diffusers' and lucidrains', beside the machine's matrix products.

    python -m tests.benchmarks.ddpm                                  # CPU: float32 and bfloat16, batch 16
    python -m tests.benchmarks.ddpm --device cuda --batch 128        # a GPU; --compile adds compiled networks
    python -m tests.benchmarks.ddpm --channels 32 --mult 1 2 2 --blocks 1 --attention 8    # a small network

Training is forward, backward, clipping to norm 1, fused Adam and the running average; denoising one call without
gradients. All ways see the same images, batch and precision, in one process, taking turns; printed are the best rounds,
and the median over rounds of the ratio to ours in the same precision, in the better of its memory formats. lucidrains'
`Unet` (28.5 million parameters for the paper's 35.7) is another, smaller network, for want of the paper's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner.engine.loop import clip
from runner.engine.state import Ema
from tests.benchmarks.common import Row, installed, make_parser, ratio, seconds, show_table, start, take_turns

SIZE, CHANNELS = 32, 3
SIDE = 2048  # of the matrices whose product is the ceiling


def make_networks(arguments: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network, those alone that are installed."""
    channels, mult, blocks = arguments.channels, tuple(arguments.mult), arguments.blocks
    ours = partial(UNet, CHANNELS, channels, mult, blocks, tuple(arguments.attention), SIZE, dropout=0.1)

    def diffusers() -> nn.Module:
        """The same network, with torch's own initial weights."""
        from diffusers import UNet2DModel

        network = UNet2DModel.from_config(ours().to_diffusers()[1])
        network.register_forward_hook(lambda _, __, output: output.sample)
        return network

    def lucidrains() -> nn.Module:
        from denoising_diffusion_pytorch import Unet

        return Unet(dim=channels, dim_mults=mult, channels=CHANNELS, dropout=0.1)

    makers = {"ours": ours, "diffusers": diffusers, "lucidrains (smaller)": lucidrains}
    return {name: makers[name] for name in installed(makers)}


@dataclass
class Way:
    """One network in one mode."""

    name: str
    network: nn.Module
    bfloat16: bool
    channels_last: bool
    batch: int
    device: torch.device

    def __post_init__(self) -> None:
        format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.network.to(self.device).to(memory_format=format)
        images = torch.rand(self.batch, CHANNELS, SIZE, SIZE, device=self.device) * 2 - 1
        self.images = images.contiguous(memory_format=format)
        self.process, self.average = GaussianDiffusion(), Ema(self.network, 0.9999, warmup=False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-4, fused=True)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def train(self) -> None:
        """One step of the recipe, on images that stay the same."""
        t = torch.randint(0, self.process.timesteps, (self.batch,), device=self.device)
        with self.autocast():
            noise = torch.randn_like(self.images)
            loss = self.process.loss_simple(self.network, self.images, t, noise).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(0)

    @torch.no_grad()
    def denoise(self) -> None:
        """One call of the network as a sampler makes it."""
        with self.autocast():
            self.network(self.images, torch.full((self.batch,), 500, device=self.device))

    def time(self) -> Row:
        """Seconds of a training step, and of a call."""
        self.network.train()
        trained = seconds_on(self.device, self.train)
        self.network.eval()
        return trained, seconds_on(self.device, self.denoise)


def make_ways(arguments: argparse.Namespace, device: torch.device) -> list[Way]:
    """Every network in every mode; a compiled one once, in bfloat16."""
    ways = []
    modes = [(precision, last, "") for precision in arguments.precision for last in (False, True)]
    if arguments.compile:
        modes.append(("bfloat16", True, ", compiled"))
    for name, make in make_networks(arguments).items():
        for precision, last, compiled in modes:
            mode = f"{name}, {precision}{', channels last' if last else ''}{compiled}"
            ways.append(Way(mode, make(), precision == "bfloat16", last, arguments.batch, device))
            if compiled:
                ways[-1].network.compile()
    return ways


def seconds_on(device: torch.device, work: Callable[[], object], calls: int | None = None) -> float:
    if device.type == "cuda":
        return seconds(work, calls or 20, torch.cuda.synchronize)
    return seconds(work, calls or 1)


def ceiling(device: torch.device) -> Row:
    """FLOP/s of a product of square matrices in bfloat16, the better of two."""
    side = 4 * SIDE if device.type == "cuda" else SIDE
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    torch.mm(a, b)
    return (2 * side**3 / min(seconds_on(device, lambda: torch.mm(a, b), 2) for _ in range(2)),)


def count_flops(network: nn.Module) -> tuple[int, int]:
    """FLOP per image of a training step (forward and backward), and of a call."""
    x, t = torch.randn(1, CHANNELS, SIZE, SIZE), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as both:
        out = network(x, t)
        forward = both.get_total_flops()
        out.sum().backward()
    return both.get_total_flops(), forward


def report(ways: list[Way], times: dict[str, list[Row]], flops: tuple[int, int], peak: float) -> None:
    """One row per way: the best round, its share of the products' rate in bfloat16, and how much faster ours is."""
    rows = []
    for way in ways:
        mine = [one.name for one in ways if one.name.startswith("ours") and one.bfloat16 == way.bfloat16]
        # float32 convolutions and products are different libraries' on a CPU: the one is no limit of the other
        comparable = way.bfloat16 and not way.name.startswith("lucidrains")
        cells, ratios = [way.name], []
        for task, (own, cost) in enumerate(zip(times[way.name], flops, strict=True)):
            rate = way.batch / min(own)
            cells += [f"{rate:,.1f}", f"{rate * cost / peak:.0%}" if comparable else "–"]
            ratios.append(f"{ratio(own, min((times[name][task] for name in mine), key=min)):.2f}×")
        rows.append([*cells, ", ".join(ratios)])
    header = ["way", "trains img/s", "share of mm", "denoises img/s", "share of mm", "ours is faster by"]
    show_table(header, rows)


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--channels", type=int, default=128, help="of the first level")
    parser.add_argument("--mult", type=int, nargs="+", default=[1, 2, 2, 2], help="of each level's channels")
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks of a level")
    parser.add_argument("--attention", type=int, nargs="+", default=[16], help="sizes with attention")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], help="of the forward pass")
    parser.add_argument("--compile", action="store_true", help="compiled networks too")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    start(arguments, f"{device}, {torch.cuda.get_device_name() if gpu else f'{arguments.threads} threads'}")

    ways = make_ways(arguments, device)
    flops = count_flops(make_networks(arguments)["ours"]())
    print(f"{flops[1] / 1e9:.2f} GFLOP per image and call, {flops[0] / 1e9:.2f} per training image")
    calls = {"": partial(ceiling, device), **{way.name: way.time for way in ways}}
    times = take_turns(calls, arguments.rounds)
    peak = max(times[""][0])
    print(f"matrix products in bfloat16: {peak / 1e12:.2f} TFLOP/s")
    report(ways, times, flops, peak)


if __name__ == "__main__":
    main()
