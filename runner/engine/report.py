"""Header and footer of a run on the screen, and `summary.json`."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import sys
from dataclasses import asdict
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from runner.config.command import quote
from runner.config.options import leaves
from runner.engine.job import TRAIN, Job, Result
from runner.engine.state import Progress
from runner.files import replace_file
from runner.records.console import metric_order, shown_path, text_table
from runner.records.provenance import Provenance, differences
from runner.records.tracker import FIRST_COLUMNS
from runner.task import Check, Run, Task

CHECK_HEADER = ["check", "claim", "measured", "tolerance", "result"]
# settings that have no column in the HParams page
_NO_COLUMN = ("task", "root", "eval_batch_size", "log_every", "save_every", "eval_batches", "profile")
_PACKAGES = ("torch", "torchvision", "torchmetrics", "hydra-core", "tensorboard", "matplotlib")


def header(job: Job, run: Run, resumed_at: int | None, notes: dict[str, str], origin: Provenance) -> str:
    """Return the lines that a run starts with; `notes` say what else its networks start from."""
    lines = {"folder": shown_path(run.folder), "device": run.compute.describe()}
    if job.compile:
        lines["device"] += ", compiled" + f" ({job.compile})" * isinstance(job.compile, str)
    if resumed_at is not None:
        lines["resumed"] = f"at step {resumed_at}"

    # data and networks
    if run.splits:
        usual = [name for name in ("train", "val", "test") if name in run.splits]
        sizes = " · ".join(f"{name} {len(run.splits[name]):,}" for name in usual)
        more = len(run.splits) - len(usual)
        others = f", and {more} more splits" if more else ""
        lines["data"] = f"{type(run.data).__name__}: {sizes} samples{others}"
    for variant, network in run.networks.items():
        label = f"network {variant}".strip()
        lines[label] = f"{type(network).__name__}, {_num_parameters(network):,} parameters"
    lines |= notes

    # where it comes from, and where to watch it
    if job.rerun is not None:
        lines["rerun of"] = shown_path(job.rerun)
    lines["seed"] = str(run.seed)
    states = [f"{place} {checkout['commit']}" for place, checkout in origin.git.items() if checkout]
    lines["git"] = ", ".join(states) or "no repository"
    lines["overrides"] = ", ".join(job.changes) or "none"
    lines["tensorboard"] = tensorboard_command(job.outputs)

    mode = "" if job.mode == TRAIN else f", mode={job.mode}"
    width = max(map(len, lines))
    blocks = [f"{job.name}{mode}", *(f"  {key.ljust(width)}  {text}" for key, text in lines.items())]
    if job.rerun is not None:
        facts = {"device": run.compute.describe(), **_versions()}
        blocks.append(f"\n{differences(job.rerun, origin, facts)}\n")
    return "\n".join(blocks)


def tensorboard_command(folder: Path) -> str:
    """Return the command that shows a folder, with the program's path where the environment is not activated."""
    beside = Path(sys.executable).with_name("tensorboard")
    activated = shutil.which("tensorboard") or not beside.exists()
    program = "tensorboard" if activated else quote(shown_path(beside))
    return f"{program} --logdir {quote(shown_path(folder))}"


def footer(job: Job, run: Run, progress: Progress, result: Result) -> str:
    """Return the lines that a run ends with: tables, best checkpoint, time, memory, and what to type next."""
    blocks = []

    # tables
    if result.checks:
        # an exact zero is shown as 0, for 0.0000 may be rounded
        rows = [[*row[:2], row[2] or 0, *row[3:]] for row in check_rows(result.checks)]
        blocks.append(text_table(CHECK_HEADER, rows, left=2))
    if result.status in ("done", "failed"):
        blocks += _metric_tables(job.mode, progress.before, result.metrics)

    # best checkpoint, time and memory
    facts = []
    if result.best is not None and job.mode == TRAIN:
        facts.append(
            f"best {result.best['metric']} {result.best['value']:.4f} at epoch {result.best['epoch']:.3g}: "
            f"{shown_path(run.folder / result.best['checkpoint'])}"
        )
    memory = run.compute.peak_memory() / 2**20
    trained = f"{progress.seconds:.1f} s of training, " * (job.mode == TRAIN)
    facts.append(f"{result.seconds:.1f} s in all, {trained}peak memory {memory:,.0f} MiB")
    blocks.append("\n".join(facts))

    # what went wrong, and what to type next; a sweep says that itself, not each of its jobs
    if result.error:
        blocks.append(f"FAILED: {result.error}")
    if job.mode == TRAIN and job.folder is None:
        blocks.append(_next_commands(job, run, progress, result))
    return "\n" + "\n\n".join(blocks)


def _next_commands(job: Job, run: Run, progress: Progress, result: Result) -> str:
    resume = f"{job.command} resume={quote(shown_path(run.folder))}"

    # ended early, or nothing was trained
    if result.status == "interrupted":
        return f"Interrupted at step {progress.step}. Resume with:\n  {resume}"
    if result.status == "failed":
        last = run.folder / "checkpoints" / "last.pt"
        return f"Last good checkpoint: {shown_path(last)}" if last.exists() else "No checkpoint was saved."
    if not run.networks:
        return f"Results: {shown_path(run.folder)}"

    checkpoint = run.folder / "checkpoints" / ("best.pt" if result.best else "last.pt")
    key = "epochs" if job.loop.steps is None else "steps"
    longer = 2 * getattr(job.loop, key) or 1
    commands = {
        "evaluate": f"{job.command} mode=eval checkpoint={quote(shown_path(checkpoint))}",
        "resume": f"{resume} loop.{key}={longer:g}",
        "sweep": f"{job.command} -m experiment={job.name} seed=0,1,2",
    }
    return "Next:\n" + "\n".join(f"  {name.ljust(10)}{command}" for name, command in commands.items())


def _metric_tables(mode: str, before: dict[str, float], metrics: dict[str, Any]) -> list[str]:
    """Return a table of the metrics: of test before and after training, else of the splits that were evaluated."""
    test = metrics.get("test")
    if mode == TRAIN and test:
        columns = {"before": before, "after": test} if before else {"value": test}
    else:
        columns = {name: values for name, values in metrics.items() if name != "before" and values}
        if mode == TRAIN:
            columns.pop("train", None)

    names = sorted({name for values in columns.values() for name in values}, key=metric_order)
    rows = [[name, *(values.get(name) for values in columns.values())] for name in names]
    return [text_table(["test" if mode == TRAIN and test else "metric", *columns], rows)] if rows else []


def why_no_metrics(run: Run, task: Task) -> str:
    """Say why mode=eval has measured nothing."""
    if not run.networks:
        reason = f"{run.name} builds no network"
    elif not run.splits:
        reason = f"{run.name} has no data"
    else:
        reason = f"{type(task).__name__}.eval returns no metric"
    return f"No metrics: {reason}. What it draws, tabulates and checks is in {shown_path(run.folder)}."


def check_rows(checks: list[Check]) -> list[list[Any]]:
    """Return a row per check with the columns of CHECK_HEADER."""
    limits = [f"{'≥' if check.at_least else '≤'} {check.tolerance:.3g}" for check in checks]
    return [
        [check.name, check.claim, check.measured, limit, "pass" if check.passed else "FAIL"]
        for check, limit in zip(checks, limits, strict=True)
    ]


def collect_metrics(
    history: list[dict[str, Any]], progress: Progress, test: dict[str, Any]
) -> dict[str, Any]:
    """Return metrics by split: the last of train, val at the best step (else the last), test, and before."""
    best = [row for row in history if (row["split"], row["step"]) == ("val", progress.best_step)]
    rows = {row["split"]: row for row in (*history, *best) if row["split"] in ("train", "val")}
    metrics: dict[str, Any] = {
        split: {key: value for key, value in row.items() if key not in FIRST_COLUMNS}
        for split, row in rows.items()
    }
    return metrics | ({"before": {"test": progress.before}} if progress.before else {}) | test


def write_summary(job: Job, run: Run, progress: Progress, result: Result, origin: Provenance) -> None:
    """Write `summary.json` atomically."""
    data = run.data
    parameters = {name or "network": _num_parameters(network) for name, network in run.networks.items()}
    summary = {
        # outcome
        "status": result.status,
        "error": result.error,
        "experiment": job.name,
        "mode": job.mode,
        "metrics": result.metrics,
        "best": result.best,
        "checks": [asdict(check) | {"passed": check.passed} for check in result.checks],
        # cost
        "steps": progress.step,
        "seconds": result.seconds,
        "training_seconds": progress.seconds,
        "samples_per_second": result.metrics.get("train", {}).get("samples_per_second"),
        "peak_memory_bytes": run.compute.peak_memory(),
        "parameters": parameters,
        # what ran, and on what
        "seed": run.seed,
        "device": run.compute.describe(),
        "data": None if data is None else {"name": type(data).__name__, "digest": data.digest()},
        "git": origin.git,
        "versions": _versions(),
        "changes": job.changes,
        "finished": datetime.now().isoformat(timespec="seconds"),
    }
    text = json.dumps(_null_for_nan(summary), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(run.folder / "summary.json", text.encode())


def _null_for_nan(value: Any) -> Any:
    """Return the same with None for every NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def main_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings worth a column in the HParams page, by dotted key, without paths and plumbing.

    A node's own name stands for its class (`optimizer`: SGD; a task's is its experiment's), and null stays, so
    that the runs of a sweep have the same columns.
    """
    settings = {"experiment": config["name"]} | {key: config.get(key) for key in ("seed", "precision")}
    for node in ("model", "optimizer", "schedule", "loop", "data", "task"):
        for key, value in leaves(config.get(node) or {}, node):
            if key.endswith("._target_"):
                key, value = key.removesuffix("._target_"), str(value).rpartition(".")[2]
            settings[key] = value
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] not in _NO_COLUMN}


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@cache  # reading them takes as long as a short job
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
