"""Every experiment that ships is composed, built and run a few steps, on made-up data where its own is fetched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runner import run
from runner.app import make_job
from runner.config.command import CONF, Command
from runner.engine.job import Result
from runner.engine.prepare import dry_build
from tests.experiments.conftest import SIZES, STAND_IN

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


def overrides_of(experiment: str, *more: str) -> list[str]:
    """The overrides of a small job, with made-up data where the experiment's lies in files, below `data.root`."""
    overrides = [f"experiment={experiment}", *more, *SMALL.get(experiment, [])]
    job = make_job(Command.parse(overrides))
    assert job is not None
    return [*overrides, *["data=fake_images"] * ("root" in (job.config["data"] or {}))]


def assert_complete(result: Result) -> None:
    assert result.status == "done", result.error
    measured = {name.split(".")[0] for name in result.metrics["test"]}  # apart from the variant
    assert "loss" in measured
    assert "accuracy" not in measured or measured >= {"precision", "recall", "f1"}
    assert all(check.passed for check in result.checks)


@pytest.mark.curves
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs(name: str, finished: Callable[[str], Result], clean_process: None) -> None:
    if name in SIZES:  # a longer run, which the experiment's own tests share
        assert_complete(finished(name))
    else:
        assert_complete(run(*overrides_of(name), "debug=fast", "threads=1", config_dir=STAND_IN))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_runs(preset: str, clean_process: None) -> None:
    overrides = overrides_of(experiment_of(preset), f"preset={preset}")
    assert_complete(run(*overrides, "debug=fast", "threads=1", config_dir=STAND_IN))


@pytest.mark.parametrize(
    "command",
    [[name] for name in EXPERIMENTS] + [[experiment_of(preset), f"preset={preset}"] for preset in PRESETS],
    ids=" ".join,
)
def test_dry_build_makes_the_networks_without_weights(
    command: list[str], clean_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sweep does before its first job: the networks are really built, and take no memory."""
    job = make_job(Command.parse(overrides_of(*command), config_dir=STAND_IN))
    assert job is not None
    built: list[torch.nn.Module] = []
    build = job.task.build
    monkeypatch.setattr(job.task, "build", lambda run: built.append(build(run)) or built[0])
    dry_build(job)
    [networks] = built  # empty where the build needed numbers, which the dry build cannot give
    for network in networks.values() if isinstance(networks, dict) else [networks]:
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
