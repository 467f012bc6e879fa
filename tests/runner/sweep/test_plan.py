"""What a sweep will do: files that sweep and choose launchers, jobs that are checked once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runner.config import compose
from runner.config.command import Command
from runner.engine import prepare
from runner.sweep import grid, plan
from runner.sweep.record import read_records
from tests.conftest import Outcome
from tests.runner.sweep.helpers import TOYS

Cli = Callable[..., Outcome]


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str, str], list[str]]:
    """`mine(defaults, rest)`: the flags for an experiment `mine` that trains nothing, with these YAML lines."""

    def write(defaults: str, rest: str) -> list[str]:
        folder = tmp_path / "conf" / "experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.yaml").write_text(
            f"# @package _global_\n{f'defaults:{chr(10)}  - {defaults}{chr(10)}' * bool(defaults)}"
            "name: mine\ndescription: nothing\ntask:\n  _target_: planned_toys.Nothing\n  size: 0\n" + rest
        )
        (tmp_path / "conf" / "planned_toys.py").write_text((TOYS / "toys.py").read_text())
        return ["--config-dir", str(tmp_path / "conf"), "-m", "experiment=mine", "threads=1"]

    return write


def test_space_or_search_in_an_experiment_file(mine: Any, cli: Cli, tmp_path: Path) -> None:
    flags = mine("", 'sweep: {space: {task.size: "1,2", seed: "0,1"}}\n')
    done = cli(*flags, "task.size=5,6,7", "sweep.dir=sweep")  # the command line has the last word
    assert done.status == 0, done.out + done.err
    swept = [record.swept for record in read_records(tmp_path / "sweep")]
    assert [(s["task.size"], s["seed"]) for s in swept] == list(itertools.product("567", "01"))

    pytest.importorskip("optuna")
    flags = mine(
        "override /sweep: optuna", 'sweep: {n_trials: 3, space: {task.size: "int(interval(1,9))"}}\n'
    )
    refused = cli(*flags, "dry_run=true")
    assert refused.status == 2 and "objective=METRIC/val" in refused.err
    done = cli(*flags, "dry_run=true", "objective=accuracy/val")
    assert done.status == 0, done.out + done.err
    assert "task.size  int(interval(1,9))" in done.out and "3 trials in all" in done.out
    assert not (tmp_path / "outputs").exists()


def test_launcher_in_an_experiment_file(
    joblib: None, mine: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = mine("override /hydra/launcher: joblib", "hydra: {launcher: {n_jobs: 3}}\n")
    used = []
    monkeypatch.setattr("runner.sweep.run.launch", lambda _, __, launcher, ___: used.append(launcher))
    cli(*flags, "seed=0,1", "sweep.dir=sweep")
    cli(*flags[:3], "resume=sweep")
    cli(*flags, "seed=0,1", "sweep.dir=other", "hydra/launcher=basic")  # the command line has the last word
    assert [(chosen.name, chosen.slots) for chosen in used] == [("joblib", 3), ("joblib", 3), ("basic", 1)]


@pytest.mark.parametrize(
    ("defaults", "rest", "message"),
    [
        ("", 'hydra: {sweeper: {params: {seed: "1,2"}}}\n', "sweep: {space: {KEY: VALUES}}"),
        ("override /hydra/launcher: jobli", "", "jobli"),
    ],
)
def test_hydra_settings_in_an_experiment_file(
    defaults: str, rest: str, message: str, mine: Any, cli: Cli, tmp_path: Path
) -> None:
    done = cli(*mine(defaults, rest), "seed=0,1")
    assert done.status == 2 and message in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "outputs").exists()


def test_what_is_alike_is_composed_and_built_once(
    clean_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed, built = [], []
    template, dry_build = compose.compose_template, plan.dry_build
    monkeypatch.setattr(grid, "compose_template", lambda call: composed.append(call) or template(call))
    monkeypatch.setattr(plan, "dry_build", lambda job, known: built.append(job) or dry_build(job, known))
    command = Command.parse(["experiment=toy_paced", "seed=0,1"], TOYS, multirun=True)
    planned = plan.Plan(command, grid.without_sweep(command.overrides))
    for number in range(12):
        swept = {"seed": str(number % 3), "optimizer": ("sgd", "adam")[number % 2]}
        swept |= {"optimizer.lr": f"0.{number + 1}", "model.hidden": str(4 + number // 6)}
        record = planned.record(number, grid.parse_texts(swept))
    single = compose.compose_command(Command.parse(record.overrides, TOYS))
    assert single.config == record.config  # the job alone, by the command line that it was given
    assert (len(composed), len(built)) == (2, 2)  # one per optimizer, one per network


def test_dry_build_has_no_weights_and_may_fail(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Command.parse(["experiment=toy_paced"], TOYS)
    job: Any = plan.build_job(compose.compose_command(call), call)
    prepare.dry_build(job)
    assert {parameter.device.type for parameter in job.task.network.parameters()} == {"meta"}

    # one that wants numbers may fail, one that is broken may not
    monkeypatch.setattr(job.task, "build", lambda _: nn.Linear(int(torch.ones(1)), 1))
    prepare.dry_build(job)
    wrong = {"weight": torch.ones(5, 5)}
    monkeypatch.setattr(job.task, "build", lambda _: nn.Linear(2, 3).load_state_dict(wrong, strict=False))
    with pytest.raises(RuntimeError, match="size mismatch"):
        prepare.dry_build(job)
