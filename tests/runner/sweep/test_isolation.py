"""A job leaves the process as it found it, however it ends."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner.sweep.isolation import isolated


def state() -> dict[str, Any]:
    """What a job could change for the next."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "grad": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "path": list(sys.path),
        "filters": list(warnings.filters),
    }


def disturb(folder: Path) -> None:
    """Change all of it."""
    torch.rand(3), random.random(), np.random.rand()
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.set_grad_enabled(False)
    os.environ["A_JOB_WAS_HERE"] = "1"
    os.environ.pop("PATH")
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("end", [None, RuntimeError, SystemExit, KeyboardInterrupt])
def test_the_process_is_put_back(end: type[BaseException] | None, tmp_path: Path) -> None:
    before = state()
    with contextlib.nullcontext() if end is None else pytest.raises(end), isolated():
        disturb(tmp_path)
        changed = state()
        assert all(changed[key] != before[key] for key in before)
        if end is not None:
            raise end("on purpose")
    assert state() == before
