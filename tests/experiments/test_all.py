"""Every experiment that ships is composed, built and run a few steps, on made-up data where its own is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runner.app import make_job
from runner.config.command import CONF, Command
from runner.engine.prepare import dry_build

STAND_IN = Path(__file__).parent / "stand_in"
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
PRESETS = sorted(file.stem for file in (CONF / "preset").glob("*.yaml"))


# what makes an experiment small enough for a test, where it is large
SMALL = {
    "rnn_fashion": ["model.hidden_size=16"],
    "ddpm_cifar": [
        *("model.base_channels=8", "model.channel_mult=[1,2]", "model.num_res_blocks=1"),
        *("model.attention_resolutions=[16]", "data.batch_size=4", "compile=false", "precision=float32"),
        *("task.diffusion.timesteps=40", "task.steps=4", "task.picture_steps=4", "task.features=pixels"),
        *("task.samples=12", "task.bits_images=2", "task.final_bits_images=2"),
    ],
}


def experiment_of(preset: str) -> str:
    """A preset is named by the first word of its experiment: rnn_best belongs to rnn_fashion."""
    [name] = [name for name in EXPERIMENTS if name.split("_")[0] == preset.split("_")[0]]
    return name


def is_fetched(overrides: list[str]) -> bool:
    """Whether the data of an experiment lies in files, below its `data.root`."""
    job = make_job(Command.parse(overrides))
    assert job is not None
    return "root" in (job.config["data"] or {})


def run_a_few_steps(cli: Callable, last_run: Callable[[], Path], experiment: str, *more: str) -> None:
    overrides = [f"experiment={experiment}", *more, *SMALL.get(experiment, [])]
    made_up = ["data=fake_images"] if is_fetched(overrides) else []
    outcome = cli(*overrides, *made_up, "debug=fast", "threads=1", config_dir=STAND_IN)
    assert outcome.status == 0, outcome.err
    summary = json.loads((last_run() / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 10
    measured = {name.split(".")[0] for name in summary["metrics"]["test"]}  # apart from the variant
    assert "loss" in measured
    assert "accuracy" not in measured or measured >= {"precision", "recall", "f1"}
    assert all(check["passed"] for check in summary["checks"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs(name: str, cli: Callable, last_run: Callable[[], Path]) -> None:
    run_a_few_steps(cli, last_run, name)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_runs(preset: str, cli: Callable, last_run: Callable[[], Path]) -> None:
    run_a_few_steps(cli, last_run, experiment_of(preset), f"preset={preset}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_rehearsed_without_weights(
    name: str, clean_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sweep does before its first job: the networks are really built, and take no memory."""
    overrides = [f"experiment={name}", *SMALL.get(name, [])]
    job = make_job(
        Command.parse([*overrides, *["data=fake_images"] * is_fetched(overrides)], config_dir=STAND_IN)
    )
    assert job is not None
    built: list[torch.nn.Module] = []
    build = job.task.build
    monkeypatch.setattr(job.task, "build", lambda run: built.append(build(run)) or built[0])
    dry_build(job)
    [networks] = built  # else the build wanted numbers, and the rehearsal found nothing
    for network in networks.values() if isinstance(networks, dict) else [networks]:
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
