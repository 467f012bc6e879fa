"""Device, precision, threads and determinism are chosen once and said out loud."""

from __future__ import annotations

import os

import pytest
import torch

from runner import device
from runner.errors import UserError

pytestmark = pytest.mark.usefixtures("clean_process")


def test_auto_is_the_best_there_is(monkeypatch):
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert device.select("auto", "float32", 1, False).device.type == best
    monkeypatch.setattr(device, "available", lambda: ["cpu", "cuda", "cuda:0", "mps"])
    assert device.select("auto", "float32", 1, False).device.type == "cuda"
    monkeypatch.setattr(device, "available", lambda: ["cpu", "mps"])
    assert device.select("auto", "float32", 1, False).device.type == "mps"


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cpu:1", "CPU", ""])
def test_what_is_not_there_lists_what_is(name):
    with pytest.raises(UserError, match=f"device={name} is not on this machine. Available: auto, cpu"):
        device.select(name, "float32", 1, False)


def test_cuda_devices_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.available()[:4] == ["cpu", "cuda", "cuda:0", "cuda:1"]


def test_threads_are_set(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for threads in {1, cores}:
        assert device.select("cpu", "float32", threads, False).threads == threads
        assert torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device.select("cpu", "float32", None, False).threads == 1 == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "10000")
    assert device.select("cpu", "float32", None, False).threads == cores
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert device.select("cpu", "float32", None, False).threads == cores == torch.get_num_threads()


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_out_of_range(threads):
    with pytest.raises(UserError, match=f"threads={threads} must lie between 1 and"):
        device.select("cpu", "float32", threads, False)


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic(wanted):
    device.select("cpu", "float32", 1, wanted)
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert torch.backends.cudnn.benchmark != wanted


def test_precision_is_that_of_the_matrix_products():
    def product(precision: str) -> torch.dtype:
        with device.select("cpu", precision, 1, False).autocast():
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert product("bfloat16") == torch.bfloat16
    assert product("float32") == torch.float32


def test_description_and_memory():
    compute = device.select("cpu", "bfloat16", 1, False)
    assert compute.describe() == "cpu (1 thread), bfloat16"
    before = compute.peak_memory()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])  # touched, so resident
    assert compute.peak_memory() >= before
    assert compute.peak_memory() > 64 * 2**20


def test_rate_of_matrix_products_counts_two_operations_per_term(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 10.5])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    compute = device.Compute(torch.device("cpu"), "bfloat16", 1)
    assert compute.matmul_rate(side=4, rounds=2) == 2 * 4**3 / 0.5  # the best round
