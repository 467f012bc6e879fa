"""What a run needs to start, and what it came to: plain values, between those who build, run and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from runner.data import Data
from runner.engine.state import LoopConfig, Objective, Schedule
from runner.task import Check, Task

TRAIN = "train"  # the mode that is not a look at a checkpoint


@dataclass
class Job:
    """All that one run needs, composed, checked and built; no network and no folder yet."""

    name: str
    task: Task
    data: Data | None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Schedule
    settings: LoopConfig
    objective: Objective
    seed: int
    device: str
    precision: str
    threads: int | None
    compile: bool | str  # or a mode of torch.compile
    deterministic: bool
    outputs: Path  # where runs go
    config: dict[str, Any]  # resolved, plain: stored in every checkpoint
    files: dict[str, str]  # written into the run's folder at its start, by relative path
    command: str = "python -m runner"  # how the door was called, up to its arguments
    changes: list[str] = field(default_factory=list)  # what differs from the experiment's defaults
    mode: str = TRAIN
    checkpoint: Path | None = None  # whose weights `mode` looks at
    resume: Path | None = None  # the run folder to go on in
    folder: Path | None = None  # a folder of the caller's choosing, such as a sweep's job
    quiet: bool = False  # say nothing on the screen: run.log has it
    columns: tuple[str, ...] = ()  # of the HParams page, also those that this run has not; (): its own
    judge: Callable[[int, float], bool] | None = (
        None  # told every evaluation's number and objective; True: stop
    )
    stop: Callable[[], bool] | None = None  # whether to save and end; None: the run takes the signals itself


@dataclass
class Result:
    """What a run came to. `model` is the trained network, one per variant in a dict where there are several."""

    status: str  # done, failed, interrupted or pruned
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    model: nn.Module | dict[str, nn.Module] | None = None
    exit_status: int = 0
