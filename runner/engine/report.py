"""What a run says at its start and its end, and `summary.json`."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from runner.engine.job import TRAIN, Job, Result
from runner.engine.state import Progress
from runner.files import replace_file
from runner.records.console import metric_order, quote, shown_path, text_table
from runner.task import Check, Run

PACKAGES = ("torch", "torchvision", "torchmetrics", "hydra-core", "tensorboard", "matplotlib")


def header(job: Job, run: Run, resumed_at: int | None) -> str:
    """The lines that a run starts with."""
    how = "" if job.mode == TRAIN else f", mode={job.mode}"
    lines = {"folder": shown_path(run.folder), "device": run.compute.describe() + compiled(job.compile)}
    if resumed_at is not None:
        lines["resumed"] = f"at step {resumed_at}"
    if run.splits:
        lines["data"] = f"{type(run.data).__name__}: {split_sizes(run)}"
    for variant, network in run.networks.items():
        label = f"network {variant}".strip()
        lines[label] = f"{type(network).__name__}, {parameters(network):,} parameters"
    lines["seed"] = str(run.seed)
    lines["git"] = git_commit() or "not a checkout"
    usual = "the experiment's defaults" if job.mode == TRAIN else "as it was trained"
    lines["differs"] = ", ".join(job.changes) or f"nothing: {usual}"
    lines["watch"] = watch(job.outputs)
    width = max(map(len, lines))
    return "\n".join([f"{job.name}{how}", *(f"  {key.ljust(width)}  {text}" for key, text in lines.items())])


def compiled(wanted: bool | str) -> str:
    """How the networks are compiled, as the end of a line."""
    return f", compiled ({wanted})" if isinstance(wanted, str) else ", compiled" * wanted


def split_sizes(run: Run) -> str:
    """The samples of train, val and test; of other splits that there are many."""
    usual = [name for name in ("train", "val", "test") if name in run.splits]
    more = len(run.splits) - len(usual)
    sizes = " · ".join(f"{name} {len(run.splits[name]):,}" for name in usual)
    return f"{sizes} samples" + (f", and {more} more splits" if more else "")


def watch(folder: Path) -> str:
    """The TensorBoard command for a folder, by its path where the environment is not activated."""
    beside = Path(sys.executable).with_name("tensorboard")
    program = "tensorboard" if shutil.which("tensorboard") or not beside.exists() else quote(beside)
    return f"{program} --logdir {quote(folder)}"


def footer(job: Job, run: Run, progress: Progress, result: Result) -> str:
    """The lines that a run ends with: tables, best checkpoint, time, memory, and what to type next."""
    blocks = []
    if result.checks:
        # an exact zero is shown as 0, for 0.0000 may be rounded
        rows = [[*row[:2], row[2] or 0, *row[3:]] for row in check_rows(result.checks)]
        blocks.append(text_table(CHECK_HEADER, rows, left=2))
    if result.status in ("done", "failed") and result.metrics.get("test"):
        blocks.append(before_after_table(progress.before, result.metrics["test"]))
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
    if result.error:
        blocks.append(f"FAILED: {result.error}")
    if job.mode == TRAIN and job.folder is None:  # a sweep says what to do next, not each of its jobs
        blocks.append(next_commands(job, run, progress, result))
    return "\n" + "\n\n".join(blocks)


def next_commands(job: Job, run: Run, progress: Progress, result: Result) -> str:
    """The commands that a reader is likely to want now."""
    folder = quote(run.folder)
    resume = f"{job.command} resume={folder}"
    if result.status == "interrupted":
        return f"Interrupted at step {progress.step}. Go on with:\n  {resume}"
    if result.status == "failed":
        saved = run.folder / "checkpoints" / "last.pt"
        return f"The last good state is {shown_path(saved)}." if saved.exists() else "Nothing was saved."
    if not run.networks:
        return f"Everything is in {shown_path(run.folder)}."
    checkpoint = quote(run.folder / "checkpoints" / ("best.pt" if result.best else "last.pt"))
    key = "epochs" if job.settings.steps is None else "steps"
    longer = 2 * getattr(job.settings, key) or 1
    rows = [
        ("evaluate", f"{job.command} mode=eval checkpoint={checkpoint}"),
        ("resume", f"{resume} loop.{key}={longer:g}"),
        ("sweep", f"{job.command} -m experiment={job.name} seed=0,1,2"),
    ]
    return "Next:\n" + "\n".join(f"  {what.ljust(10)}{command}" for what, command in rows)


def before_after_table(before: dict[str, float], after: dict[str, float]) -> str:
    """The test metrics before and after training."""
    names = sorted(after, key=metric_order)
    if not before:
        return text_table(["test", "value"], [[name, after[name]] for name in names])
    return text_table(["test", "before", "after"], [[name, before.get(name), after[name]] for name in names])


CHECK_HEADER = ["check", "claim", "measured", "tolerance", "result"]


def check_rows(checks: list[Check]) -> list[list[Any]]:
    """A row per check, as CHECK_HEADER says: name, what is claimed, measured, its bound, pass or FAIL."""
    return [
        [
            check.name,
            check.claim,
            check.measured,
            f"{'≥' if check.at_least else '≤'} {check.tolerance:.3g}",
            "pass" if check.passed else "FAIL",
        ]
        for check in checks
    ]


def collect_metrics(
    history: list[dict[str, Any]], progress: Progress, test: dict[str, Any]
) -> dict[str, Any]:
    """metrics.<split>.<metric>: train as last read, val at the best step (else the last), test, and before."""
    found: dict[str, Any] = {}
    for row in history:
        if row["split"] == "train" or (row["split"] == "val" and row["step"] == progress.best_step):
            found[row["split"]] = {k: v for k, v in row.items() if k not in ("step", "epoch", "split")}
    if "val" not in found:
        last = next((row for row in reversed(history) if row["split"] == "val"), None)
        found |= (
            {"val": {k: v for k, v in last.items() if k not in ("step", "epoch", "split")}} if last else {}
        )
    if progress.before:
        found["before"] = {"test": progress.before}
    return found | test


def write_summary(job: Job, run: Run, progress: Progress, result: Result) -> None:
    """`summary.json`, written aside and renamed."""
    train_metrics = result.metrics.get("train", {})
    summary = {
        "status": result.status,
        "error": result.error,
        "experiment": job.name,
        "mode": job.mode,
        "metrics": result.metrics,
        "best": result.best,
        "checks": [asdict(check) | {"passed": check.passed} for check in result.checks],
        "steps": progress.step,
        "seconds": result.seconds,
        "training_seconds": progress.seconds,
        "samples_per_second": train_metrics.get("samples_per_second"),
        "peak_memory_bytes": run.compute.peak_memory(),
        "parameters": {name or "network": parameters(network) for name, network in run.networks.items()},
        "seed": run.seed,
        "device": run.compute.describe(),
        "data": None if run.data is None else {"name": type(run.data).__name__, "digest": run.data.digest()},
        "git": git_commit(),
        "versions": versions(),
        "changes": job.changes,
        "finished": datetime.now().isoformat(timespec="seconds"),
    }
    text = json.dumps(finite(summary), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(run.folder / "summary.json", text.encode())


def finite(value: Any) -> Any:
    """The same with null for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings worth a column in the HParams page: dotted keys without paths and plumbing.

    A node's own name stands for its class (`optimizer`: SGD; a task's is its experiment's), and null stays, so
    that the runs of a sweep have the same columns.
    """
    flat = {"experiment": config["name"]} | {key: config.get(key) for key in ("seed", "precision")}
    for node in ("model", "optimizer", "schedule", "loop", "data", "task"):
        flat |= flatten(config.get(node) or {}, node)
    named = {
        key.removesuffix("._target_"): str(value).rpartition(".")[2] if key.endswith("._target_") else value
        for key, value in flat.items()
    }
    dropped = ("task", "root", "eval_batch_size", "log_every", "save_every", "eval_batches", "profile")
    return {key: value for key, value in named.items() if key.rpartition(".")[2] not in dropped}


def flatten(node: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Nested dicts as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        path = f"{prefix}.{key}"
        flat |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return flat


def parameters(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, `+changes` where the working tree differs; None without git."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # the checkout must be ours
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@cache  # reading them takes as long as a short job
def versions() -> dict[str, str]:
    """Python's version and those of the packages that numbers depend on."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
