"""Logging, evaluation, best checkpoint and timing while a run trains."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from runner.engine.state import (
    LoopConfig,
    Objective,
    Progress,
    Pruned,
    TrainingState,
    epoch_steps,
    evaluate,
    total_steps,
)
from runner.errors import room_for
from runner.records.console import Bar, format_cell
from runner.task import Run, Task, metric_name

log = logging.getLogger("runner")


class Monitor:
    """What is read, measured, kept and told of a run while it trains."""

    def __init__(
        self,
        task: Task,
        run: Run,
        training: TrainingState,
        settings: LoopConfig,
        objective: Objective,
        save: Callable[[str], None],
        judge: Callable[[int, float], bool] | None,
    ):
        assert run.data is not None
        self.task, self.run, self.training, self.progress = task, run, training, training.progress
        self.objective, self.save, self.judge = objective, save, judge
        self.steps_per_epoch = epoch_steps(run.data.batch_size, len(run.splits["train"]), settings)
        self.steps = total_steps(settings, self.steps_per_epoch)
        self.eval_every = settings.eval_every or self.steps_per_epoch
        self.samples_per_step = run.data.batch_size * settings.accumulate
        # FLOP/s of all processes, for a task that says what a sample costs
        known = task.flops_per_sample is not None
        with room_for(
            "the matrices of the ceiling of utilisation", "a smaller model or data.batch_size leaves more"
        ):
            self.ceiling = run.compute.matmul_rate() * run.world_size if known else math.nan
        self.clock, self.bar = Clock(run), Bar(self.steps, self.progress.step)

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.progress.step / self.steps_per_epoch

    def report(self) -> None:
        """Read what the device has summed, into the records."""
        self.training.readings.require_finite()
        if self.training.readings.steps == 0:
            return
        values = self.training.measured()
        values["samples_per_second"] = self.clock.read(self.progress) * self.samples_per_step
        if self.task.flops_per_sample is not None:
            values["utilisation"] = values["samples_per_second"] * self.task.flops_per_sample / self.ceiling
        self.run.tracker.metrics("train", self.progress.step, self.epoch, values)
        shown = ("loss", "accuracy", "learning_rate", "samples_per_second")
        self.bar.show({name: value for name, value in values.items() if name.split(".")[0] in shown})

    def look(self) -> None:
        """Evaluate, keep the best, and draw the curves so far."""
        run, progress = self.run, self.progress
        self.report()
        self.clock.read(progress)
        values = evaluate(self.task, run, self.training, "val") if "val" in run.splits else {}
        if values:
            run.tracker.metrics("val", progress.step, self.epoch, values)
            log.info(line(run, progress, self.steps, self.steps_per_epoch, values, self.objective))
        if values or progress.step:  # without val there are curves as soon as there are steps
            run.tracker.curves(f"{run.name}, seed {run.seed}")
        progress.evaluated = progress.step
        if self.objective.improved(values, progress):
            self.save("best")
        self.save("last")
        self.clock.restart()
        self.hear(values)

    def hear(self, values: dict[str, float]) -> None:
        """Tell the judge of an evaluation, which counts from 1, and end where it sees no use in going on."""
        step = self.progress.step
        if self.judge is None or self.objective.name is None or step == 0:
            return
        if self.judge(math.ceil(step / self.eval_every), self.objective.value(values)) and step < self.steps:
            raise Pruned


class Clock:
    """Seconds spent in training steps; evaluation and saving do not count."""

    def __init__(self, run: Run):
        self.run = run
        self.restart()

    def restart(self) -> None:
        self.start, self.first = time.perf_counter(), self.run.step

    def read(self, progress: Progress) -> float:
        """Add the time since the last reading to `progress` and return the steps per second in it."""
        self.run.compute.synchronize()
        elapsed, steps = time.perf_counter() - self.start, progress.step - self.first
        progress.seconds += elapsed
        self.restart()
        return steps / elapsed if elapsed > 0 else 0.0


def line(
    run: Run,
    progress: Progress,
    steps: int,
    steps_per_epoch: int,
    values: dict[str, float],
    objective: Objective,
) -> str:
    """The permanent line of one evaluation: loss, accuracy and the objective's metric.

    Several variants leave room for val alone, more than two for one metric each.
    """
    chosen = (objective.name or "loss").removesuffix("/val").split(".")[0]
    metrics = dict.fromkeys(("loss", "accuracy", chosen))
    at = [f"epoch {progress.step / steps_per_epoch:.3g}", f"step {progress.step}/{steps}"]
    if len(run.networks) < 2:
        rows = [row for row in run.tracker.history if row["split"] == "train"]
        shown = [f"train {found}" for row in rows[-1:] if (found := listed(row, metrics))]
        shown.append(f"val {listed(values, metrics)}")
    elif len(run.networks) == 2:
        shown = ["val", *(f"{name} {listed(values, metrics, name)}" for name in run.networks)]
    else:
        cells = {name: format_cell(values.get(metric_name(chosen, name))) for name in run.networks}
        shown = [f"val {chosen}", *(f"{name} {cell}" for name, cell in cells.items())]
    return " | ".join([*at, *shown, f"{progress.seconds:.1f} s"])


def listed(values: dict[str, Any], metrics: Iterable[str], variant: str = "") -> str:
    """The metrics that there are, by name: `loss 0.4100, accuracy 0.9250`."""
    names = {metric: metric_name(metric, variant) for metric in metrics}
    return ", ".join(f"{m} {format_cell(values[name])}" for m, name in names.items() if name in values)


@contextlib.contextmanager
def profiled(wanted: bool, run: Run) -> Iterator[Callable[[], None]]:
    """Where wanted, a trace of steps 5 to 15 as `trace.json`, for chrome://tracing or Perfetto."""
    if not wanted:
        yield lambda: None
        return
    path = run.folder / "trace.json"
    window = torch.profiler.schedule(wait=4, warmup=1, active=10, repeat=1)
    on_ready: Callable[[torch.profiler.profile], None] = lambda p: p.export_chrome_trace(str(path))  # noqa: E731
    with torch.profiler.profile(schedule=window, on_trace_ready=on_ready) as profiler:
        yield profiler.step
    log.info(f"Trace: {path} (open it in chrome://tracing or ui.perfetto.dev)")
    log.info(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
