"""The command line: what it answers, from where it can be called, whom it trusts, and what is a bug."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml

import runner
from runner import UserError
from runner.completion import candidates
from runner.config.command import CONF, Command
from runner.config.compose import compose_command
from tests.conftest import Outcome

Cli = Callable[..., Outcome]

# the console script, as it is installed
MAIN = """
import sys
sys.argv[0] = "runner"
from runner.cli import main
sys.exit(main())
"""

# what it does, for each command in turn; whether torch was imported on the way
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


SHOWN = [
    "--cfg job",
    "--cfg all --package hydra.job",
    "--cfg job experiment=rnn_fashion optimizer=adam optimizer.lr=0.1 ~model.dropout model.init=${precision}",
    "--cfg job --resolve -p model experiment=rnn_fashion model.hidden_size=${data.batch_size}",
    "--cfg job --package seed experiment=rnn_fashion seed=7",
    "--cfg hydra --package hydra.overrides experiment=rnn_fashion loop=default +optimizer.maximize=true",
    "--info",
    "--info config experiment=rnn_fashion debug=fast seed=3",
    "--info defaults experiment=rnn_fashion optimizer=adam",
    "--info defaults-tree experiment=ddpm_cifar",
    "--info searchpath experiment=rnn_fashion",
]


@pytest.mark.parametrize("flags", SHOWN)
def test_it_shows_what_hydra_shows(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], flags: str
) -> None:
    ours = cli(*flags.split())
    assert ours.status == 0 and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["runner", *flags.split()])
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "runner")  # the name of the job
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # to which Hydra adds its own
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(lambda cfg: None)()
    assert ours.out.split("\n") == [*capfd.readouterr().out.strip("\n").split("\n"), ""]


def test_of_a_sweep_it_shows_the_first_options(cli: Cli) -> None:
    swept = ["experiment=rnn_fashion", "seed=1,2", "optimizer=adam,sgd", "sweep=optuna", "sweep.n_trials=3"]
    done = cli("-m", "--cfg", "job", *swept, "optimizer.lr=interval(0,1)")
    config = compose_command(Command.parse(["experiment=rnn_fashion", "optimizer=adam"])).config
    shown = yaml.safe_load(done.out)
    assert {key: shown[key] for key in config} == config and shown["sweep"]["n_trials"] == 3
    assert done.out.startswith("# ") and "seed=1,2 optimizer=adam,sgd optimizer.lr=interval(0,1)" in done.out


def test_help_of_an_experiment_shows_its_keys_and_what_they_mean(cli: Cli) -> None:
    done = cli("--help", "experiment=rnn_fashion", "preset=rnn_best", "optimizer=adam", "optimizer.lr=0.3")
    assert done.status == 0
    for words in (
        "optimizer=adam:", "optimizer.lr=0.3 learning rate at its highest; the schedule scales it",
        "model.hidden_size=512 units of the hidden state", "task.loss.label_smoothing=0.0 probability mass",
        "seed=0 decides every random number", "a vanilla tanh RNN reads Fashion-MNIST",
    ):  # fmt: skip
        assert words in " ".join(done.out.split())
    assert "._target_" not in done.out and max(map(len, done.out.splitlines())) <= 100


def test_the_flags_alone(cli: Cli) -> None:
    assert hydra.__version__ in cli("--version").out
    listed = cli("--hydra-help").out
    assert "hydra/launcher: basic" in listed and "--info" in listed
    assert "--config-name" not in listed and "hydra/sweeper" not in listed
    one = cli("--run", "--cfg", "job", "hydra.mode=RUN", "experiment=rnn_fashion")
    assert one.status == 0 and one.out == cli("--cfg", "job", "experiment=rnn_fashion").out


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
        "new two-spirals": 2,
        "rerun nowhere": 2,
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


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("runner experiment=rnn_f", "experiment=rnn_fashion"),
        ("python -m runner experiment=rnn_fashion optimizer=adamw", "optimizer=adamw"),
        ("runner -m experiment=rnn_fashion seed=1,2 optimizer.weight", "optimizer.weight_decay="),
        ("runner --config-dir TOYS experiment=toy_va", "experiment=toy_variants"),
        ("runner --config-dir TOYS experiment=toy_generative mode=", "mode=train mode=eval mode=compare mode=sample"),
        ("runner experiment=rnn_fashion mode=", "mode=train mode=eval mode=compare"),
        ("runner mode=exp", "mode=export"),
        ("runner mode=eval checkpoint=", "checkpoint=runs/"),
        ("runner mode=eval checkpoint=runs/", "checkpoint=runs/best.pt checkpoint=runs/one/"),
        ("runner resume=runs/", "resume=runs/one/"),
        ("runner resume=no/such/", ""),
        ("runner data.root=./ru", "data.root=./runs/"),
        ("runner --cf", "--cfg"),
        ("runner --cfg h", "hydra"),
        ("runner experiment=rnn_fashion --info de", "defaults defaults-tree"),
        ("runner -cd ru", "runs/"),
        ("runner -cd nowhere experiment=rnn", ""),
        ("runner experiment=rnn_fashon optim", ""),
        ("runner --cfg --cfg seed 'opt", ""),
    ],
)  # fmt: skip
def test_what_a_line_may_become(
    clean_process: None, toys: Path, tmp_path: Path, typed: str, expected: str
) -> None:
    for name in ("runs/best.pt", "runs/notes.txt", "runs/one/x", ".hidden/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert candidates(typed.replace("TOYS", str(toys))) == expected.split()


# how each shell is asked what it makes of a line
ASK = {
    "bash": """eval "$({0} -sc install=bash)"; ask() {{ COMP_LINE="$1"; COMP_POINT=${{#1}}
        "$(complete -p {1} | grep -o '[^ ]*_completion')"; printf '%s\\n' "${{COMPREPLY[@]}}"; }}; """,
    "zsh": """compdef() {{ fn=$1 }}; compadd() {{ shift 4; print -rl -- $@ }}; eval "$({0} -sc install=zsh)"
        ask() {{ words=(${{=1}}); CURRENT=$#words; PREFIX=$words[-1]; $fn }}; """,
    "fish": """{0} -sc install=fish | source; function ask; complete -C"$argv[1]"; end; """,
}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["runner", "python -m runner"])
@pytest.mark.parametrize("shell", ASK)
def test_completion_in_a_shell(environment: dict[str, str], tmp_path: Path, shell: str, program: str) -> None:
    """The script that each shell is given, asked as the shell asks when Tab is pressed."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    for name, code in (
        ("runner", f'exec {sys.executable} -c "$MAIN" "$@"'),
        ("python", f'exec {sys.executable} "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}", "MAIN": MAIN}
    lines = f'ask "{program} experiment=rnn_f"; ask "{program} mode=exp"'
    command = [shell, "-c", ASK[shell].format(program, program.split()[0]) + lines]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["experiment=rnn_fashion", "mode=export"], done


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
    run = last_run()
    for command in (
        [f"resume={run}", "loop.epochs=9"],
        ["mode=eval", "checkpoint=evil.pt"],
        ["rerun", f"{run}"],
    ):
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
