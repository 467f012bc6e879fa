"""Mistakes on the command line and in YAML files: one message that says what to type, status 2, nothing written."""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from runner import app
from runner import cli as command_line
from runner.config.command import CONF, Command
from runner.errors import UserError
from runner.sweep import plan
from tests.conftest import Outcome
from tests.tables import table

Cli = Callable[..., Outcome]
Mistake = Callable[..., list[list[str]]]
TRY = "  try: python -m runner "
FOREIGN = ("Traceback", "Hydra ", "omegaconf", "struct", "Could not override", "primary config")
MISTAKES = Path(__file__).with_name("mistakes.txt")
HEAD = "# @package _global_\nname: mine\ndescription: d\n"
TASK = "task:\n  _target_: mine_task.Mine\n"

mistakes = functools.partial(table, MISTAKES)


@functools.cache
def rnn_fashion() -> DictConfig:
    """Return what Hydra alone composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["experiment=rnn_fashion"])


def split(line: str) -> list[str]:
    """Return a cell as arguments."""
    words = ["experiment=rnn_fashion" if word == "R" else word for word in shlex.split(line)]
    defaults = {w: str(OmegaConf.select(rnn_fashion(), w.partition("=")[0])) for w in words if "DEFAULT" in w}
    return [word.replace("DEFAULT", defaults.get(word, "")) for word in words]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def mistake(cli: Cli, tmp_path: Path) -> Mistake:
    """`mistake(words, "optimizer.lr; Available")`: call the command and return the commands that it proposes.

    One message with these words, exit status 2, no traceback, nothing of Hydra's, nothing written.
    """

    def call(words: list[str], names: str = "", config_dir: Path | None = None) -> list[list[str]]:
        before = files(tmp_path)
        done = cli(*words, config_dir=config_dir)
        assert done.status == 2, done
        assert done.err.startswith("error: ")
        assert [word for word in names.split("; ") if word not in done.err] == [], done.err
        assert [word for word in FOREIGN if word in done.err] == []
        _, *tried = done.err.strip("\n").split("\n")
        assert len(tried) <= 1 and all(line.startswith(TRY) for line in tried)
        assert files(tmp_path) == before
        return [shlex.split(line.removeprefix(TRY)) for line in tried]

    return call


@mistakes("corrected", "typed", "names", "right")
def test_a_mistake_is_named_and_what_is_proposed_is_accepted(
    mistake: Mistake, cli: Cli, monkeypatch: pytest.MonkeyPatch, typed: str, names: str, right: str
) -> None:
    monkeypatch.setattr(command_line, "is_accepted", lambda *_, **__: True)  # the test itself tries them
    proposed = mistake(split(typed), names)
    assert proposed == ([split(right)] if right else [])

    monkeypatch.setattr(plan, "dry_build", lambda job, loaded: {})  # loads data
    for command in proposed:
        if "-m" in command:
            assert cli(*command, "dry_run=true").status == 0
        elif {"--cfg", "--info", "--help"} & {*command}:
            assert cli(*command).status == 0
        else:
            assert app.make_job(Command.parse(command)) is not None


@mistakes("dropped", "typed", "names")
def test_what_would_be_refused_is_not_proposed(mistake: Mistake, typed: str, names: str) -> None:
    assert mistake(split(typed), names) == []


def test_a_bare_key_of_the_task_is_corrected_where_it_stands() -> None:
    arguments = argparse.Namespace(overrides=["mode=sample", "n=three"], multirun=False)
    corrected = command_line._corrected(UserError("", "task.n=three", "task.n=2"), arguments)
    assert corrected is not None and corrected.overrides == ["mode=sample", "task.n=2"]


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint\n", b"PK\x03\x04 a damaged archive", b"root:x:0", None]
)
def test_a_file_that_is_no_checkpoint(mistake: Mistake, tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")  # another program's
    else:
        (tmp_path / "x.pt").write_bytes(content)
    mistake(["mode=eval", "checkpoint=x.pt"], "x.pt")


@mistakes("launcher", "typed", "names", "right")
def test_a_setting_of_the_launcher(mistake: Mistake, typed: str, names: str, right: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert mistake(split(typed), names) == ([split(right)] if right else [])


TRAINED: list[Path] = []


@pytest.fixture
def trained(cli: Cli, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, made once."""
    if not TRAINED:
        outputs = tmp_path_factory.mktemp("trained")
        command = ["experiment=toy_variants", "threads=1", "loop.steps=1", f"outputs={outputs}"]
        assert cli(*command, config_dir=toys).status == 0
        TRAINED.extend(outputs.glob("*/*"))
    return TRAINED[0]


@mistakes("late", "typed", "names")
def test_a_mistake_that_shows_late_leaves_everything_as_it_was(
    mistake: Mistake, toys: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch,
    typed: str, names: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "a_file").write_text("in the way")
    shutil.copytree(trained, tmp_path / "run")
    mistake(split(typed), names, toys)


@mistakes("path", "typed", "names", "right")
def test_a_mistyped_path_names_the_newest_runs(
    mistake: Mistake, toys: Path, tmp_path: Path, trained: Path, typed: str, names: str, right: str
) -> None:
    runs = [f"outputs/toy/2026-01-0{day}_12-00-00" for day in range(1, 7)] + ["outputs/other/x"]
    for age, run in enumerate(runs):
        shutil.copytree(trained, tmp_path / run)
        os.utime(tmp_path / run / ".hydra" / "config.yaml", (age, age))
    file = "/checkpoints/best.pt" if "checkpoint=" in typed else ""
    listed = ", ".join(f"{runs[int(number)]}{file}" for number in re.findall(r"\d", names))
    proposed = mistake(typed.format(*runs).split(), listed, toys)
    assert [command[2:] for command in proposed] == ([right.format(*runs).split()] if right else [])


@mistakes("yaml", "content", "names")
def test_a_mistake_in_a_yaml_file_of_ones_own(
    mistake: Mistake, tmp_path: Path, content: str, names: str
) -> None:
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    text = f"{content} ".replace("HEAD ", HEAD).replace("TASK ", TASK)
    (own / "experiment" / "mine.yaml").write_text(text.replace(r"\n", "\n").replace(r"\t", "\t"))
    (own / "mine_task.py").write_text(
        "from subprocess import Popen\n"
        "from runner.data import Data\nfrom runner.task import Task\n"
        "class Mine(Task):\n"
        "    def __init__(self, size: int = 1):\n"
        "        if size < 0:\n            raise ValueError(f'size must be positive, not {size}')\n"
        "class Empty(Data): pass\n"
        "class Reads(Task):\n"
        "    def __init__(self, data): self.data = data\n"
    )
    mistake(["experiment=mine"], names, own)


def test_an_unreadable_yaml_file_does_not_hide_the_other_experiments(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [")
    done = cli(config_dir=tmp_path)
    assert done.status == 2
    assert re.search(r"^  mine +\(cannot be used", done.out, re.MULTILINE)
    assert "  rnn_fashion  " in done.out


def test_a_file_with_the_name_of_one_of_the_runners_is_refused(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "rnn.yaml").write_text("hidden_size: 3\n")
    mistake(["experiment=rnn_fashion"], "model/rnn.yaml; rename it", tmp_path)


@mistakes("node", "typed", "names", "right")
def test_a_node_that_does_not_fit_the_experiment(
    mistake: Mistake, typed: str, names: str, right: str
) -> None:
    assert mistake(typed.split(), names) == ([right.split()] if right else [])


@mistakes("hostile", "typed", "names")
def test_a_hostile_target_is_refused(
    mistake: Mistake, toys: Path, monkeypatch: pytest.MonkeyPatch, typed: str, names: str
) -> None:
    monkeypatch.setattr(torch.optim, "Alias", subprocess.Popen, raising=False)
    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "Alias", subprocess.Popen, raising=False)
    mistake(typed.split(), names, toys)
