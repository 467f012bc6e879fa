"""The command line: what it answers, from where it can be called, whom it trusts, and what is a bug."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import runner
from runner import UserError
from runner.config.command import CONF, Command
from runner.config.compose import compose_command
from tests.conftest import Outcome

Cli = Callable[..., Outcome]

# what the console script does, for each command in turn; whether torch was imported on the way
DRIVER = """
import json, sys
from hydra.core.global_hydra import GlobalHydra
from runner.cli import main
for argv, status in json.loads(sys.stdin.read()):
    sys.argv = ["runner", *argv]
    try:
        ended = main()
    except SystemExit as end:
        ended = end.code or 0
    GlobalHydra.instance().clear()
    assert (ended, "torch" in sys.modules) == (status, False), (argv, ended)
"""


@pytest.mark.parametrize("own", [False, True])
def test_alone_it_lists_experiments_and_commands_within_100_columns(
    cli: Cli, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    program = "/a/long/path/to/the/interpreter/bin/python3.11 -m runner"
    monkeypatch.setattr(sys, "orig_argv", program.split())
    done = cli(config_dir=toys if own else None)
    assert done.status == 2
    for file in [*CONF.glob("experiment/*.yaml"), *(toys.glob("experiment/*.yaml") if own else [])]:
        description = yaml.safe_load(file.read_text())["description"]
        assert f" {file.stem} {description} " in " ".join(done.out.split())
    listed = ["experiment=NAME", "-m ", "mode=eval checkpoint=", "resume=", "--cfg job", "tensorboard "]
    assert [command for command in listed if command not in done.out] == []
    assert max(map(len, done.out.splitlines())) <= 100 or own
    mistaken = cli("experiment=rnn_fashion", "optimzer.lr=1")  # what is proposed begins as it was called
    assert f"try: {program} experiment=rnn_fashion optimizer.lr=1" in mistaken.err
    assert not list(tmp_path.iterdir())


def test_help_names_every_group_option_and_root_key(cli: Cli, toys: Path) -> None:
    done = cli("--help", config_dir=toys)
    assert done.status == 0
    for file in [*CONF.glob("*/*.yaml"), *toys.glob("*/*.yaml")]:
        assert file.parent.name in done.out and file.stem in done.out
    for key in ("seed", "device", "precision", "threads", "objective", "outputs"):
        assert f"\n  {key}: " in done.out


def test_cfg_job_prints_the_composed_config(cli: Cli, tmp_path: Path) -> None:
    overrides = ["experiment=rnn_fashion", "optimizer=adam", "optimizer.lr=0.1", "loop.epochs=3"]
    done = cli(*overrides, "--cfg", "job")
    assert done.status == 0 and yaml.safe_load(done.out) == compose_command(Command.parse(overrides)).config
    assert not list(tmp_path.iterdir())


def test_a_reader_who_has_seen_enough_is_no_bug(environment: dict[str, str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "runner", "--help"]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_needs_no_torch_does_not_import_it(environment: dict[str, str], tmp_path: Path) -> None:
    commands = {
        "": 2,
        "--help": 0,
        "experiment=rnn_fashion --cfg job": 0,
        "experiment=rnn_fashion --info defaults": 0,
        "experiment=rnn_fashion optimzer.lr=1": 2,
        "experiment=rnn_fashon": 2,
        "experiment=rnn_fashion optimizer=sdg": 2,
        "experiment=rnn_fashion seed=1,2": 2,
        "experiment=rnn_fashion logger=wandb": 2,
        "resume=nowhere": 2,
        "--shell-completion install=bash": 0,
        "-sc query=bash": 0,
    }
    environment |= {"COMP_LINE": "runner experiment=rnn_f", "COMP_POINT": "23"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([(command.split(), status) for command, status in commands.items()]),
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loop.log_every=wandb" not in done.stderr  # a proposal that its type alone makes wrong
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_completion_in_bash(environment: dict[str, str], tmp_path: Path) -> None:
    """The stock completion, installed as --help says, asked as bash asks when Tab is pressed."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    script = tmp_path / "runner"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom runner.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    completed = {
        "runner experiment=rnn_f": "experiment=rnn_fashion",
        "runner experiment=rnn_fashion optimizer=adamw": "optimizer=adamw",
        "runner experiment=rnn_fashion optimizer.weight": "optimizer.weight_decay=",
    }
    ask = 'eval "$(runner -sc install=bash)"; complete -p runner\n'
    for typed in completed:
        ask += (
            f'COMP_LINE="{typed}"; COMP_POINT={len(typed)}; COMP_WORDS=({typed}); '
            'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); hydra_bash_completion; printf "%s\\n" "${COMPREPLY[@]}"\n'
        )
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
    done = subprocess.run([bash, "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True)
    first, *rest = done.stdout.splitlines()
    assert "hydra_bash_completion runner" in first and rest == list(completed.values())


def own_folder(parent: Path, task: str = "own_task.Doubles", module: str = "own_task") -> Path:
    """An experiment as a user writes it, YAML and module, in a folder outside the repository."""
    own = parent / "own files"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "doubles.yaml").write_text(
        f"# @package _global_\nname: doubles\ndescription: twice two\ntask:\n  _target_: {task}\n  number: 2\n"
    )
    (own / f"{module}.py").write_text(
        "import dataclasses, pathlib, runner.task\n"
        f"pathlib.Path({str(parent / 'imported')!r}).touch()\n"
        "@dataclasses.dataclass\n"
        "class Doubles(runner.task.Task):\n"
        "    number: int\n"
        "    def before(self, run):\n"
        "        run.table('doubles', ['twice'], [[2 * self.number]])\n"
    )
    return own


def test_a_stored_run_of_ones_own_needs_the_folder_named_again(
    cli: Cli, tmp_path: Path, last_run: Callable[[], Path]
) -> None:
    own = own_folder(tmp_path)
    done = cli("experiment=doubles", "task.number=21", "threads=1", config_dir=own)
    assert done.status == 0, done.err
    assert (last_run() / "tables" / "doubles.csv").read_text().split() == ["twice", "42"]
    for name in ("own_task", "own_task.Doubles"):
        sys.modules.pop(name, None)
    sys.path.remove(str(own))
    refused = cli(f"resume={last_run()}", "loop.epochs=2")
    assert refused.status == 2
    assert "own_task.Doubles may not be named" in refused.err and "--config-dir" in refused.err


def test_trust_names_a_package_that_python_finds(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_run: Callable[[], Path]
) -> None:
    own = own_folder(tmp_path, "elsewhere_task.Doubles", "elsewhere_task")
    shutil.move(own / "elsewhere_task.py", tmp_path / "elsewhere_task.py")
    monkeypatch.syspath_prepend(tmp_path)
    refused = cli("experiment=doubles", "threads=1", config_dir=own)
    assert refused.status == 2
    assert "elsewhere_task.Doubles may not be named" in refused.err and "trust=elsewhere_task" in refused.err
    assert not (tmp_path / "imported").exists()  # refused before any line of it ran
    done = cli("experiment=doubles", "threads=1", "trust=elsewhere_task", config_dir=own)
    assert done.status == 0, done.err
    assert (last_run() / "tables" / "doubles.csv").read_text().split() == ["twice", "4"]


def test_neither_a_run_folder_nor_a_checkpoint_can_widen_the_trust(
    cli: Cli, toys: Path, last_run: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "evil_was_here"  # where the module, which Python finds, is imported
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def hostile(config: dict[str, Any]) -> dict[str, Any]:
        return config | {"task": config["task"] | {"_target_": "evil.Evil"}, "trust": "evil"}

    cli("experiment=toy_variants", "threads=1", "loop.steps=1", config_dir=toys)
    stored, saved = last_run() / ".hydra" / "config.yaml", last_run() / "checkpoints" / "last.pt"
    parts = torch.load(saved, weights_only=True)
    torch.save(parts | {"config": hostile(parts["config"])}, tmp_path / "evil.pt")
    stored.write_text(yaml.safe_dump(hostile(yaml.safe_load(stored.read_text()))))
    for command in ([f"resume={last_run()}", "loop.epochs=9"], ["mode=eval", "checkpoint=evil.pt"]):
        done = cli(*command, config_dir=toys)
        assert done.status == 2 and "evil.Evil may not be named" in done.err
        assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("shadow", ["experiments/__init__.py", "experiments.py"])
def test_a_shadow_of_our_experiments_is_named(
    process: Callable[..., Outcome], tmp_path: Path, shadow: str
) -> None:
    (tmp_path / shadow).parent.mkdir(exist_ok=True)
    (tmp_path / shadow).write_text("")
    done = process("experiment=rnn_fashion", "threads=1", "loop.steps=1")
    assert done.status == 2
    assert "hides the runner's own" in done.err and str(tmp_path) in done.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_bug_shows_a_traceback_and_ends_with_1(process: Callable[..., Outcome], toys: Path) -> None:
    done = process("experiment=toy_checks", "task.crash=true", "threads=1", config_dir=toys)
    assert done.status == 1
    assert "Traceback" in done.err and "RuntimeError: crashed on purpose" in done.err


def test_from_python(clean_process: None, toys: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimzer\.lr.*optimizer\.lr"):
        runner.run("experiment=toy_variants", "optimzer.lr=1", config_dir=toys)
    assert not list(tmp_path.iterdir())
    result = runner.run("experiment=toy_variants", "threads=1", "loop.steps=3", config_dir=str(toys))
    assert (result.status, result.exit_status) == ("done", 0)
    assert result.folder.resolve().is_relative_to(tmp_path)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert result.metrics["test"] == summary["metrics"]["test"]
    weights = {name: dict(network.state_dict()) for name, network in result.model.items()}
    best = torch.load(result.folder / "checkpoints" / "best.pt", weights_only=True)
    torch.testing.assert_close(weights, best["model"], rtol=0, atol=0)
    assert set(weights) == {"narrow", "wide"}
    with pytest.raises(UserError, match="finished"):
        runner.run(f"resume={result.folder}", config_dir=toys)
