"""Resume, evaluate, sample from, export and compare what an earlier version wrote.

`tests/old_folders/README.md` says which commit wrote the folders, by which commands. The expected figures are those
that it reached by the same commands, uninterrupted, to three digits, because another CPU rounds otherwise.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.data.cifar10 import CIFAR10
from experiments.data.fashion_mnist import FashionMNIST
from runner import figures
from runner.data import Split
from tests.conftest import REPO
from tests.runner.engine.helpers import summary
from tests.runner.engine.helpers import table as rows

GRID, SEARCH = Path("outputs/spirals/sweeps/grid"), Path("outputs/spirals/sweeps/search")
RESUMED = {  # run: losses on test
    "rnn_fashion/stopped": {"loss": 1.85262},
    "ddpm_cifar/folder": {"loss": 1.01246, "bits_per_dim": 8.55626},
    "posenc_check/stopped": {"loss.none": 1.40997, "loss.absolute": 1.42822, "loss.rotary": 1.41604},
    "mha_demo/stopped": {"loss.heads_1": 1.54385, "loss.heads_2": 1.52214},
}
EVALUATED = {  # checkpoint: split and metrics, as measured in training
    "rnn_fashion/stopped/checkpoints/best.pt": ("val", {"accuracy": 0.35, "loss": 1.86775}),
    "ddpm_cifar/done/checkpoints/best.pt": ("test", {"loss": 1.00844, "bits_per_dim": 9.06395}),
}
SAMPLED = {  # checkpoint: side of an image, mean pixel of four
    "ddpm_cifar/done/checkpoints/best.pt": (32, 130.2),
    "ddpm_cifar/folder/checkpoints/last.pt": (8, 129.3),
}
GRID_LOSSES = [0.61046, 0.61576, 0.61428, 0.61575]  # on test, by job
SEARCH_LOSSES = [0.60569, 0.62314, 0.61572]
DRAWN = [0.2483, 0.01509, 0.4317, 0.01399, 0.03154]  # learning rates of the trials


def stand_in(shape: tuple[int, ...]) -> Callable[..., dict[str, Split]]:
    """Return a `load` that gives random images of ten classes."""

    def load(self: Any, seed: int) -> dict[str, Split]:
        random = torch.Generator().manual_seed(0)
        classes = torch.randint(256, (10, *shape), generator=random)
        splits = {}
        for name, size in (("train", 64), ("val", 20), ("test", 30)):
            targets = torch.arange(size) % 10
            noise = torch.randint(256, (size, *shape), generator=random)
            splits[name] = Split(((classes[targets] + noise) // 2).to(torch.uint8), targets)
        return splits

    return load


@pytest.fixture(autouse=True)
def old_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the folders into the current one; replace the images by stand-ins; leave pictures blank."""
    shutil.copytree(REPO / "tests" / "old_folders", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(FashionMNIST, "load", stand_in((28, 28)))
    monkeypatch.setattr(CIFAR10, "load", stand_in((3, 32, 32)))
    monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)
    monkeypatch.setattr("runner.figures.curves", lambda *_: figures.new()[0])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return the folder of the swept experiment, for `--config-dir`."""
    return tmp_path / "mine"


def metrics(folder: Path, split: str) -> dict[str, float]:
    return summary(folder)["metrics"][split]


def agree(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-3)


def evaluated(checkpoint: str) -> Path:
    """Return the one folder that evaluating or sampling the checkpoint left."""
    [folder] = (Path("outputs") / checkpoint).parents[1].glob("eval/*")
    return folder


def jobs(sweep: Path) -> list[Path]:
    """Return the folders of a sweep's jobs, by number."""
    return sorted(sweep.glob("[0-9]*"), key=lambda job: int(job.name.partition("_")[0]))


@pytest.fixture
def succeed(cli: Callable) -> Callable[..., str]:
    """Run a command that ends well; return what it printed."""

    def call(*argv: str, config_dir: Path | None = None) -> str:
        outcome = cli(*argv, config_dir=config_dir)
        assert outcome.status == 0, outcome.out + outcome.err
        return outcome.out

    return call


@pytest.mark.parametrize("run", RESUMED)
def test_interrupted_run_resumes(run: str, succeed: Callable) -> None:
    folder = Path("outputs") / run
    before = rows(folder / "metrics.csv")
    succeed(f"resume={folder}")
    assert summary(folder)["status"] == "done"
    measured = metrics(folder, "test")
    assert {name: measured[name] for name in RESUMED[run]} == agree(RESUMED[run])
    after = rows(folder / "metrics.csv")
    assert len(after) > len(before) and after[: len(before)] == before


def test_finished_run_trains_longer(succeed: Callable, mine: Path) -> None:
    folder = GRID / "0_seed=0,lr=0.1"
    succeed(f"resume={folder}", "loop.epochs=3", config_dir=mine)
    assert summary(folder)["status"] == "done" and summary(folder)["steps"] == 60


@pytest.mark.parametrize(
    "checkpoint",
    [pytest.param(name, marks=pytest.mark.slow if "ddpm" in name else ()) for name in EVALUATED],
)
def test_checkpoint_is_evaluated(checkpoint: str, succeed: Callable) -> None:
    succeed("mode=eval", f"checkpoint=outputs/{checkpoint}")
    split, expected = EVALUATED[checkpoint]
    measured = metrics(evaluated(checkpoint), split)
    assert {name: measured[name] for name in expected} == agree(expected)


@pytest.mark.parametrize("checkpoint", SAMPLED)
def test_checkpoint_samples(checkpoint: str, succeed: Callable) -> None:
    succeed("mode=sample", f"checkpoint=outputs/{checkpoint}")
    folder, (size, mean) = evaluated(checkpoint), SAMPLED[checkpoint]
    images = np.load(folder / "samples.npz")["arr_0"]
    assert images.shape == (4, size, size, 3) and images.mean() == pytest.approx(mean, abs=1)
    assert len(list((folder / "samples").glob("*.png"))) == 4


@pytest.mark.parametrize("checkpoint", SAMPLED)
def test_checkpoint_is_exported(checkpoint: str, succeed: Callable) -> None:
    succeed("mode=export", f"checkpoint=outputs/{checkpoint}")
    [weights] = evaluated(checkpoint).rglob("*.safetensors")
    assert json.loads((weights.parent / "config.json").read_text())["sample_size"] == SAMPLED[checkpoint][0]


def test_runs_are_compared(succeed: Callable) -> None:
    printed = succeed("mode=compare", f"runs=['{jobs(GRID)[0]}','{jobs(GRID)[1]}']")
    assert re.search(r"optimizer\.lr +0\.1 +0\.3", printed)


@pytest.mark.parametrize(
    ("sweep", "losses"), [(GRID, GRID_LOSSES), (SEARCH, SEARCH_LOSSES)], ids=["grid", "search"]
)
def test_sweep_resumes(sweep: Path, losses: list[float], succeed: Callable, mine: Path) -> None:
    done = (jobs(sweep)[0] / "summary.json").read_bytes()
    succeed("-m", f"resume={sweep}", config_dir=mine)
    assert (jobs(sweep)[0] / "summary.json").read_bytes() == done
    assert sweep == SEARCH or len(rows(sweep / "runs.csv")) == len(jobs(sweep)) == len(losses)
    assert [metrics(job, "test")["loss"] for job in jobs(sweep)[: len(losses)]] == agree(losses)

    # the leaderboard: of the grid by rank, of the search by trial
    board = [(row["jobs"], float(row["optimizer.lr"])) for row in rows(sweep / "leaderboard.csv")]
    if sweep == GRID:
        assert [lr for _, lr in board] == [0.1, 0.3]
    else:
        assert [dict(board)[f"{trial}"] for trial in range(5)] == agree(DRAWN)


def test_grid_recognises_its_jobs(succeed: Callable, mine: Path) -> None:
    """The same command recognises the four jobs, and adds the two of another seed."""
    command = ("experiment=spirals", "threads=1", "device=cpu", "model.hidden=4", "loop.epochs=2")
    values = ("seed=0,1,2", "optimizer.lr=0.1,0.3", f"sweep.dir={GRID}", "dry_run=true")
    assert succeed("-m", *command, *values, config_dir=mine).startswith("6 jobs\n")
