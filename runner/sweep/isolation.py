"""Undo what one job does to the process before the next: random state, threads, switches, memory."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the process's global state on leaving."""
    # python
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)  # noqa: PTH109 (put back as it was)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    # torch
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark, gradients = torch.backends.cudnn.benchmark, torch.is_grad_enabled()

    with warnings.catch_warnings():
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.benchmark = benchmark
            torch.set_grad_enabled(gradients)
            sys.path[:] = path
            os.chdir(folder)
            if environment != dict(os.environ):
                os.environ.clear()
                os.environ.update(environment)


def release_memory() -> None:
    """Free what only cycles keep alive, then what the device's allocator holds for later."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
