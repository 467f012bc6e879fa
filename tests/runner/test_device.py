"""Device, precision, threads and determinism: selected once, for the process."""

from __future__ import annotations

import pytest
import torch

from runner import device
from runner.errors import UserError
from tests.conftest import CORES

pytestmark = pytest.mark.usefixtures("clean_process")


def select(name: str = "cpu", precision: str = "float32", threads: int | None = 1) -> device.Compute:
    return device.select(name, precision, threads, deterministic=False)


def test_auto_is_the_best_available(monkeypatch):
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert select("auto").device.type == best
    for names in (["cpu", "cuda", "cuda:0", "mps"], ["cpu", "mps"]):
        monkeypatch.setattr(device, "available", lambda names=names: names)
        assert select("auto").device.type == names[1]


def test_cuda_devices_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.available()[:4] == ["cpu", "cuda", "cuda:0", "cuda:1"]


def test_an_unknown_device_lists_what_is_available():
    for name in ("tpu", "cuda:99", "cpu:1", "CPU", ""):
        with pytest.raises(UserError, match=f"device={name} is not on this machine. Available: auto, cpu"):
            select(name)


@pytest.mark.parametrize(
    ("threads", "allowed", "expected"),
    [(1, None, 1), (CORES, None, CORES), (None, "1", 1), (None, "10000", CORES), (None, None, CORES)],
)
def test_threads_are_set(monkeypatch, threads, allowed, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert select(threads=threads).threads == expected == torch.get_num_threads()
    for wrong in (0, -1, 100_000):
        with pytest.raises(UserError, match=f"threads={wrong}: expected 1 to") as caught:
            select(threads=wrong)
        assert caught.value.right == f"threads={CORES}"


@pytest.mark.parametrize(("deterministic", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_algorithms_and_precision_of_the_matrix_products(deterministic, precision):
    compute = device.select("cpu", precision, 1, deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic != torch.backends.cudnn.benchmark
    with compute.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, precision)


def test_description_and_memory():
    compute = select(precision="bfloat16")
    assert compute.describe() == "cpu (1 thread), bfloat16"
    before = compute.peak_memory()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])  # touched, so resident
    assert compute.peak_memory() >= max(before, 64 * 2**20)


def test_rate_of_matrix_products_counts_two_operations_per_term(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 10.5])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    compute = device.Compute(torch.device("cpu"), "bfloat16", 1)
    assert compute.matmul_rate(side=4, rounds=2) == 2 * 4**3 / 0.5  # the best round
