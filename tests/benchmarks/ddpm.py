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
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner.engine.loop import clip
from runner.engine.state import Ema

SIZE, CHANNELS = 32, 3
SIDE = 2048  # of the matrices whose product is the ceiling


@dataclass
class Way:
    """One network in one mode; seconds per step or call, a number per round."""

    name: str
    network: nn.Module
    bfloat16: bool
    channels_last: bool
    train: list[float] = field(default_factory=list)
    denoise: list[float] = field(default_factory=list)


def ours(arguments: argparse.Namespace) -> nn.Module:
    return UNet(
        CHANNELS,
        arguments.channels,
        tuple(arguments.mult),
        arguments.blocks,
        tuple(arguments.attention),
        SIZE,
        dropout=0.1,
    )


class Theirs(nn.Module):
    """diffusers' `UNet2DModel` with our configuration: the same network, with torch's own initial weights."""

    def __init__(self, config: dict):
        super().__init__()
        from diffusers import UNet2DModel

        self.network = UNet2DModel.from_config(config)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, return_dict=False)[0]


def lucidrains(arguments: argparse.Namespace) -> nn.Module | None:
    """The U-Net of denoising-diffusion-pytorch, where it is installed."""
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError:
        return None
    return Unet(dim=arguments.channels, dim_mults=tuple(arguments.mult), channels=CHANNELS, dropout=0.1)


def networks(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Each network's name and what makes it."""
    config = UNet.to_diffusers(ours(arguments))[1]  # type: ignore[arg-type]
    yield "ours", lambda: ours(arguments)
    try:
        Theirs(config)
        yield "diffusers", lambda: Theirs(config)
    except ImportError:
        print("diffusers is not installed: left out")
    if lucidrains(arguments) is None:
        print("denoising-diffusion-pytorch is not installed: lucidrains' left out")
    else:
        yield "lucidrains (smaller)", lambda: lucidrains(arguments)  # type: ignore[arg-type, return-value]


def make_ways(arguments: argparse.Namespace, device: torch.device) -> list[Way]:
    """Every network in every mode; a compiled one once, in bfloat16."""
    ways = []
    for name, make in networks(arguments):
        for precision in arguments.precision:
            for last in (False, True):
                network = make().to(device)
                network = network.to(memory_format=torch.channels_last if last else torch.contiguous_format)
                mode = f"{precision}{', channels last' if last else ''}"
                ways.append(Way(f"{name}, {mode}", network, precision == "bfloat16", last))
        if arguments.compile:
            network = make().to(device).to(memory_format=torch.channels_last)
            network.compile()
            ways.append(Way(f"{name}, bfloat16, channels last, compiled", network, True, True))
    return ways


def training_step(way: Way, batch: int, device: torch.device) -> Callable[[], None]:
    """One step of the recipe, on images that stay the same."""
    network, process = way.network.train(), GaussianDiffusion()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, fused=True)
    average = Ema(network, 0.9999, warmup=False)
    x_0 = torch.rand(batch, CHANNELS, SIZE, SIZE, device=device) * 2 - 1
    if way.channels_last:
        x_0 = x_0.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        t = torch.randint(0, process.timesteps, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=way.bfloat16):
            loss = process.loss_simple(network, x_0, t, torch.randn_like(x_0)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip(network.parameters(), 1.0)
        optimizer.step()
        average.update(0)

    return step


def denoising_call(way: Way, batch: int, device: torch.device) -> Callable[[], None]:
    """One call of the network as a sampler makes it."""
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, device=device)
    if way.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=device)

    @torch.no_grad()
    def call() -> None:
        way.network.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=way.bfloat16):
            way.network(x, t)

    return call


def seconds(work: Callable[[], None], device: torch.device, repeat: int) -> float:
    """By the clock, the device awaited."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    wait()
    return (time.perf_counter() - start) / repeat


def ceiling(device: torch.device) -> float:
    """FLOP/s of a product of square matrices in bfloat16, the better of two."""
    side = 4 * SIDE if device.type == "cuda" else SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / min(seconds(lambda: torch.mm(a, b), device, 2) for _ in range(2))


def flops(arguments: argparse.Namespace) -> tuple[int, int]:
    """FLOP per image of our network, of a call and of a training step (forward and backward)."""
    network, x, t = ours(arguments), torch.randn(1, CHANNELS, SIZE, SIZE), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        out = network(x, t)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def measure(ways: list[Way], arguments: argparse.Namespace, device: torch.device) -> float:
    """All ways take turns, a round before the first is not counted; FLOP/s of the best products in bfloat16."""
    peak = 0.0
    training = [training_step(way, arguments.batch, device) for way in ways]
    denoising = [denoising_call(way, arguments.batch, device) for way in ways]
    repeat = 20 if device.type == "cuda" else 1
    for number in range(arguments.rounds + 1):
        peak = max(peak, ceiling(device))
        for way, step, call in zip(ways, training, denoising, strict=True):
            way.network.train()
            trained, called = seconds(step, device, repeat), seconds(call, device, repeat)
            if number:
                way.train.append(trained)
                way.denoise.append(called)
    return peak


def report(ways: list[Way], batch: int, per_image: tuple[int, int], peak: float) -> None:
    """One row per way: the best round, its share of the products' rate in bfloat16, and how much faster ours is."""
    header = ["way", "trains img/s", "share of mm", "denoises img/s", "share of mm", "ours is faster by"]
    print(f"| {' | '.join(header)} |\n{'| --- ' * len(header)}|")
    for way in ways:
        mine = [one for one in ways if one.name.startswith("ours") and one.bfloat16 == way.bfloat16]
        cells, ratios = [way.name], []
        for task, cost in (("train", per_image[1]), ("denoise", per_image[0])):
            times = getattr(way, task)
            fastest = min((getattr(one, task) for one in mine), key=min)
            rate = batch / min(times)
            # float32 convolutions and products are different libraries' on a CPU: the one is no limit of the other
            known = way.bfloat16 and not way.name.startswith("lucidrains")
            cells += [f"{rate:,.1f}", f"{rate * cost / peak:.0%}" if known else "–"]
            ratio = statistics.median(theirs / ours for theirs, ours in zip(times, fastest, strict=True))
            ratios.append(f"{ratio:.2f}×")
        print(f"| {' | '.join([*cells, ', '.join(ratios)])} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--threads", type=int, default=2, help="threads on the CPU")
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--channels", type=int, default=128, help="of the first level")
    parser.add_argument("--mult", type=int, nargs="+", default=[1, 2, 2, 2], help="of each level's channels")
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks of a level")
    parser.add_argument("--attention", type=int, nargs="+", default=[16], help="sizes with attention")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], help="of the forward pass")
    parser.add_argument("--compile", action="store_true", help="compiled networks too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{arguments.threads} threads"
    print(f"torch {torch.__version__}, {device}, {name}, load {os.getloadavg()[0]:.2f} at the start")
    per_image = flops(arguments)
    print(f"{per_image[0] / 1e9:.2f} GFLOP per image and call, {per_image[1] / 1e9:.2f} per training image")
    ways = make_ways(arguments, device)
    peak = measure(ways, arguments, device)
    print(f"matrix products in bfloat16: {peak / 1e12:.2f} TFLOP/s")
    report(ways, arguments.batch, per_image, peak)


if __name__ == "__main__":
    main()
