"""Device, precision, threads and determinism: selected once, before anything is built."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from dataclasses import dataclass

import torch

from runner.errors import UserError


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes: the device, the precision of the forward pass, the CPU threads."""

    device: torch.device
    precision: str
    threads: int

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a forward pass: autocast to bfloat16, or none in float32."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def describe(self) -> str:
        """Return one line for the screen, such as `cpu (2 threads), float32`."""
        notes = {"cpu": f" ({self.threads} thread{'s' * (self.threads != 1)})"}
        if self.device.type == "cuda":
            notes["cuda"] = f" ({torch.cuda.get_device_name(self.device)})"
        return f"{self.device}{notes.get(self.device.type, '')}, {self.precision}"

    def synchronize(self) -> None:
        """Wait for the device, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def matmul_rate(self, side: int = 1024, rounds: int = 5) -> float:
        """Return the best FLOP/s of products of (side, side) matrices in the run's precision, an upper bound."""
        side = side if self.device.type == "cpu" else 8 * side  # a GPU is not filled by a small product
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        matrix = torch.ones(side, side, dtype=dtype, device=self.device)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            matrix @ matrix
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return 2 * side**3 / min(seconds)

    def peak_memory(self) -> int:
        """Return the bytes at the peak so far: the device's on CUDA, the process's resident memory elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available() -> list[str]:
    """Return the names that `device=` takes on this machine."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def select(device: str, precision: str, threads: int | None, deterministic: bool) -> Compute:
    """Select the device, and set threads and determinism for the process, if the machine has them."""
    # device
    names = available()
    if device != "auto" and device not in names:
        line, right = f"device={device}", f"device={device.lower() if device.lower() in names else 'auto'}"
        listed = ", ".join(["auto", *names])
        raise UserError(f"{line} is not on this machine. Available: {listed}.", line, right)

    # threads: at most the cores, or what OMP_NUM_THREADS allows
    cores = num_cores()
    if threads is not None and not 1 <= threads <= cores:
        line = f"threads={threads}"
        raise UserError(f"{line}: expected 1 to {cores}, this machine's cores.", line, f"threads={cores}")
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or (min(cores, int(allowed)) if allowed.isdigit() else cores) or 1

    # the process
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
    torch.backends.cudnn.benchmark = not deterministic

    best = next(name for name in ("cuda", "mps", "cpu") if name in names)
    return Compute(torch.device(best if device == "auto" else device), precision, threads)
