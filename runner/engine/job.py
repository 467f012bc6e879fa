"""What a run needs to start and what it returns: plain values between building, running and reporting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from runner.data import Data
from runner.engine.state import LoopConfig, Objective, PruneCallback, Schedule
from runner.task import Check, Task

TRAIN = "train"  # the only mode that trains: the others start from a checkpoint


@dataclass
class Job:
    """All that one run needs: composed, checked and built, before there is a network or a folder."""

    name: str
    task: Task
    data: Data | None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Schedule
    loop: LoopConfig
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
    config_dir: Path | None = None  # the user's own YAML files and modules
    trust: str | None = None  # a package of the user's
    command: str = "python -m runner"  # how the program was called, up to its arguments
    changes: list[str] = field(default_factory=list)  # what differs from the experiment's defaults
    mode: str = TRAIN
    checkpoint: Path | None = None  # whose weights are used, if `mode` does not train
    resume: Path | None = None  # the run folder to continue
    rerun: Path | None = None  # the run folder whose config is run again, in a new one
    figures: bool = True  # whether pictures are drawn
    init: Path | None = None  # the checkpoint whose weights training starts from, where they fit
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that are not trained
    folder: Path | None = None  # chosen by the caller, such as a job's in a sweep
    quiet: bool = False  # print nothing: run.log has it
    columns: tuple[str, ...] = ()  # of the HParams page, also those that this run lacks; (): its own
    should_prune: PruneCallback | None = None
    # whether to save and end; None: the run takes the signals itself
    stop: Callable[[], bool] | None = None
    # what surrounds all of it, and what calls the part that has a folder, given both
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    inside: Callable[[Path, Callable[[], Result]], Result] = lambda folder, run: run()
    chdir: bool = False  # whether the run's folder is the current one while the task works


@dataclass
class Result:
    """The outcome of a run. `model` is the trained network, or a dict of them where there are several variants."""

    status: str  # done, failed, interrupted or pruned
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    model: nn.Module | dict[str, nn.Module] | None = None
    exit_status: int = 0
