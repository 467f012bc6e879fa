"""Logging, evaluation, best checkpoint and timing while a run trains."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch

from runner.engine.state import Objective, Progress, PruneCallback, Pruned, TrainingState
from runner.errors import out_of_memory_hint
from runner.outputs import metric_name
from runner.records.console import METRICS, format_cell, live_line, log, short_metrics
from runner.task import Run

_BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
_OWN_SHOWN = 3  # metrics of the task's own in the line of an evaluation; the records hold all


@dataclass
class Monitor:
    """Record, evaluate and save a run while it trains, and report it to the pruner."""

    state: TrainingState
    objective: Objective
    save: Callable[[str], None]
    should_prune: PruneCallback | None

    def __post_init__(self) -> None:
        state, config = self.state, self.state.config
        self.run, self.flops = state.run, state.task.flops_per_sample
        assert self.run.data is not None
        self.steps = config.total_steps(state.steps_per_epoch)
        self.eval_every = config.eval_every or state.steps_per_epoch
        self.samples_per_step = self.run.data.batch_size * config.accumulate

        # peak FLOP/s of all processes, for a task that counts its own
        self.peak_flops = math.nan
        if self.flops is not None:
            with out_of_memory_hint("measuring matrix products", "a smaller model or data.batch_size"):
                self.peak_flops = self.run.compute.matmul_rate() * self.run.world_size

        self.clock, self.bar = _Clock(self.run), live_line(self.steps, state.progress.step, _BAR)

    def record(self) -> None:
        """Write the metrics of the steps since the last call to the records."""
        state = self.state
        state.gradients.require_finite()
        if state.gradients.steps == 0:
            return

        values = state.collect()
        values["samples_per_second"] = speed = self.clock.read(state.progress) * self.samples_per_step
        if self.flops is not None:
            values["utilisation"] = speed * self.flops / self.peak_flops

        state.record("train", values)
        self.bar.set_postfix_str(short_metrics(values))

    def evaluate(self) -> None:
        """Evaluate on val, draw the curves, save the state and the best, and report to the pruner."""
        run, progress = self.run, self.state.progress
        self.record()
        self.clock.read(progress)

        # metrics of val
        values = self.state.evaluate("val") if "val" in run.splits else {}
        if values:
            log.info(self._evaluation_line(values))

        # curves, as soon as there is a point: without val after the first steps
        if values or progress.step:
            run.tracker.curves(f"{run.name}, seed {run.seed}")

        # checkpoints
        progress.evaluated = progress.step
        if self.objective.improved(values, progress):
            self.save("best")
        self.save("last")

        self.clock.restart()
        self._report_to_pruner(values)

    def report_last_evaluation(self) -> None:
        """Report the evaluation of the present step, if it is in the records, to the pruner."""
        if self.state.progress.evaluated == self.state.progress.step:
            rows = (row for row in reversed(self.run.tracker.history) if row["split"] == "val")
            self._report_to_pruner(next(rows, {}))

    def _report_to_pruner(self, values: dict[str, float]) -> None:
        """Report the objective to the pruner; raise Pruned if it says stop."""
        step = self.state.progress.step
        if self.should_prune is None or self.objective.name is None or step == 0:
            return
        number = math.ceil(step / self.eval_every)
        if self.should_prune(number, self.objective.value(values)) and step < self.steps:
            raise Pruned

    def _evaluation_line(self, values: dict[str, float]) -> str:
        """Return the line of one evaluation for the screen: loss, accuracy, the objective's metric, the task's own.

        Two variants show no training metrics, more than two show one metric each.
        """
        # metrics and place
        run, progress = self.run, self.state.progress
        objective = (self.objective.name or "loss").removesuffix("/val").split(".")[0]
        metrics = dict.fromkeys(("loss", "accuracy", objective))
        bases = dict.fromkeys(name.split(".")[0] for name in values)
        own = [name for name in bases if name not in (*METRICS, objective)]
        of_val = [*metrics, *own[:_OWN_SHOWN]]
        cells = [f"epoch {self.state.epoch(progress.step):.3g}", f"step {progress.step}/{self.steps}"]

        # cells by the number of variants
        if len(run.networks) < 2:
            rows = [row for row in run.tracker.history if row["split"] == "train"]
            texts = [f"train {text}" for row in rows[-1:] if (text := _metrics_text(row, metrics))]
            cells += [*texts, f"val {_metrics_text(values, of_val)}"]
        elif len(run.networks) == 2:
            texts = [f"{name} {_metrics_text(values, of_val, name)}" for name in run.networks]
            cells += ["val", *texts]
        else:
            numbers = {name: format_cell(values.get(metric_name(objective, name))) for name in run.networks}
            cells += [f"val {objective}", *(f"{name} {number}" for name, number in numbers.items())]

        return " | ".join([*cells, f"{progress.seconds:.1f} s"])


class _Clock:
    """Measure the seconds spent in training steps; evaluation and saving do not count."""

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


def _metrics_text(values: dict[str, Any], metrics: Iterable[str], variant: str = "") -> str:
    names = {metric: metric_name(metric, variant) for metric in metrics}
    return ", ".join(f"{m} {format_cell(values[name])}" for m, name in names.items() if name in values)


@contextlib.contextmanager
def profiled(enabled: bool, run: Run) -> Iterator[Callable[[], None]]:
    """Trace steps 5 to 15 into `trace.json`, for chrome://tracing or Perfetto; yield what to call at each step."""
    if not enabled:
        yield lambda: None
        return

    path = run.folder / "trace.json"
    window = torch.profiler.schedule(wait=4, warmup=1, active=10, repeat=1)
    export = methodcaller("export_chrome_trace", str(path))
    with torch.profiler.profile(schedule=window, on_trace_ready=export) as profiler:
        yield profiler.step
    log.info(f"Trace: {path} (open it in chrome://tracing or ui.perfetto.dev)")
    log.info(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
