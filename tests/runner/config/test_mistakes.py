"""Mistakes on the command line and in YAML files: one message that says what to type, status 2, nothing written."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Set
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runner import app
from runner import cli as command_line
from runner.config.command import CONF, Command
from runner.errors import UserError
from runner.sweep import plan
from tests.conftest import REPO, Outcome

pytestmark = pytest.mark.usefixtures("composed_once")

Cli = Callable[..., Outcome]
TRY = "  try: python -m runner "

# typed | what the message must name | the corrected command (nothing: none is proposed)
# R: the experiment that most rows need; DEFAULT: the key's value in it
MISTAKES = r"""
experiment=rnn_fashon                   | 'rnn_fashion'?               | experiment=rnn_fashion
experiment=rnn                          | 'rnn_fashion'?               | experiment=rnn_fashion
experiment=RNN_Fashion                  | 'rnn_fashion'?               | experiment=rnn_fashion
experiment=quite_another                | rnn_fashion                  |
experiment=[rnn_fashion]                | one name                     |
experiment=null                         | experiment=NAME; rnn_fashion |
experiment=                             | rnn_fashion                  |
seed=3                                  | experiment=NAME; rnn_fashion |
mode=eval                               | checkpoint=RUN_DIR           |
experimnt=rnn_fashion                   | 'experiment'?                | experiment=rnn_fashion
rnn_fashion                             | experiment=rnn_fashion       | experiment=rnn_fashion
experiment rnn_fashion                  | experiment=rnn_fashion       |
experiment = rnn_fashion                | experiment=rnn_fashion       |
R optimizer=sdg                         | 'sgd'?; adam, adam_fused, adamw, sgd | R optimizer=sgd
R optimizr=sgd                          | 'optimizer'?                 | R optimizer=sgd
R optimizer=[sgd,adam]                  | one name; adam, adam_fused, adamw, sgd | R
R optimizer=null                        | required; adam, adam_fused, adamw, sgd | R
R optimizer/adam=1                      | optimizer=adam               | R optimizer=adam
R +optimizer=adam                       | optimizer=adam               | R optimizer=adam
R optimizer@loop=adam                   | optimizer=adam               | R optimizer=adam
R seed@loop=1                           | seed=VALUE                   |
R schedule=cos                          | 'cosine'?                    | R schedule=cosine
R debug=fats                            | 'fast'?; fast, overfit, profile | R debug=fast
R optimzer.lr=1                         | 'optimzer.lr'; 'optimizer.lr'? | R optimizer.lr=1
R optimzer.lrr=1                        | 'optimizer.lr'?              | R optimizer.lr=1
R lr=1                                  | 'optimizer.lr'?              | R optimizer.lr=1
R model.lr=1                            | 'optimizer.lr'?              | R optimizer.lr=1
R loop.epoch=3                          | 'loop.epochs'?               | R loop.epochs=3
R model.hiden_size=3                    | 'model.hidden_size'?         | R model.hidden_size=3
R flux=3                                | 'flux'; optimizer, outputs   | R
R seed.x=3                              | seed                         | R
R optimizer=adam optimizer.momentum=0.5 | optimizer=sgd; optimizer.betas | R optimizer=adam
R schedule=constant schedule.final=0.1  | schedule=cosine and schedule=linear | R schedule=constant
R optimizer.lr=fast                     | optimizer.lr=fast            | R optimizer.lr=DEFAULT
R optimizer.lr=[1,2]                    | optimizer.lr=[1,2]           | R optimizer.lr=DEFAULT
R optimizer.lr={a:1}                    | optimizer.lr={a:1}           | R optimizer.lr=DEFAULT
R optimizer.lr=null                     | optimizer.lr=null            | R optimizer.lr=DEFAULT
R optimizer.lr=nan                      | finite; nan                  | R optimizer.lr=DEFAULT
R optimizer.lr=inf                      | finite; inf                  | R optimizer.lr=DEFAULT
R optimizer.lr=                         | optimizer.lr=                | R optimizer.lr=DEFAULT
R optimizer.lr=-1                       | optimizer.lr=-1              | R optimizer.lr=DEFAULT
R optimizer.lr=${sede}                  | optimizer.lr=${sede}; 'sede' |
R optimizer=adam optimizer.betas=0.9    | list of 2 numbers            | R optimizer=adam optimizer.betas=[0.9,0.999]
R optimizer=adam optimizer.betas=[0.9]  | list of 2 numbers            | R optimizer=adam optimizer.betas=[0.9,0.999]
R optimizer=adam optimizer.betas=[0.9,7] | optimizer.betas=[0.9,7]     | R optimizer=adam optimizer.betas=[0.9,0.999]
R optimizer.momentum=0 optimizer.nesterov=true | optimizer.momentum=0 | R optimizer.momentum=DEFAULT optimizer.nesterov=true
R +optimizer.foreach=true +optimizer.fused=true | foreach; fused       |
R data.batch_size=0                     | batch_size; at least 1; 0    | R data.batch_size=DEFAULT
R data.batch_size=many                  | whole number                 | R data.batch_size=DEFAULT
R model.hidden_size=1.5                 | whole number; 1.5            | R model.hidden_size=DEFAULT
R model.hidden_size=big                 | whole number; 'big'          | R model.hidden_size=DEFAULT
R model.init=xaver                      | xavier?; orthogonal          | R model.init=xavier
R precision=float16                     | bfloat16?; float32           | R precision=bfloat16
R compile=maybe                         | reduce-overhead, max-autotune | R compile=false
R threads=two                           | whole number; null           | R threads=null
R seed=-1                               | seed; [0, 2**63)             | R seed=0
R seed=1.5                              | whole number; 1.5            | R seed=0
R seed=true                             | whole number; true           | R seed=0
R seed=null                             | whole number; null           | R seed=0
R seed=???                              | seed needs a value           |
R seed={a:1}                            | whole number; {a:1}          | R seed=0
R seed                                  | key=value                    | R
R =3                                    | key before                   | R
R optimizer.lr = 0.1                    | optimizer.lr=0.1             |
R 'optimizer.lr = 0.1'                  | without spaces               | R optimizer.lr=0.1
R 'seed=1 threads=1'                    | two overrides                |
R optimizer.lr==0.1                     | got two                      | R optimizer.lr=0.1
R "optimizer.lr='0.1"                   | unbalanced '                 | R
R optimizer.lr=[0.1                     | unbalanced [                 | R
R loop.clip_norm=0                      | clip_norm; above 0           | R loop.clip_norm=DEFAULT
R loop.epochs=-1                        | epochs; at least 0           | R loop.epochs=DEFAULT
R loop.steps=-1                         | steps; at least 0; -1        | R loop.steps=null
R loop.ema=1                            | ema; [0, 1)                  | R loop.ema=null
R loop.patience=0                       | patience; at least 1         | R loop.patience=null
R schedule.final=2                      | final; [0, 1]                | R schedule.final=0.0
R schedule.warmup=-1                    | warmup; at least 0           | R schedule.warmup=0
R direction=up                          | maximize, minimize           | R direction=maximize
R objective=accuracy                    | objective; val               | R objective=accuracy/val
R objective=accuracy/test               | objective; val               | R objective=accuracy/val
R name=../x                             | name; folder                 | R name=rnn_fashion
R name=                                 | name; folder                 | R name=rnn_fashion
R outputs=                              | a folder                     |
R task=null                             | task.loss                    |
R data=null                             | data=NAME                    |
R model=null                            | model=NAME                   |
R ~optimizer.lr                         | optimizer.lr=VALUE           | R
R ~seed                                 | seed=VALUE                   | R
R +optimizer.lrr=1                      | 'optimizer.lr'?              | R optimizer.lr=1
R +optimizer.lr=1                       | without the +                | R optimizer.lr=1
R +optimizer.maximise=true              | maximize?                    | R +optimizer.maximize=true
R +flux=1                               | 'flux'                       | R
R ++flux.capacitor=1                    | 'flux.capacitor'             | R
R +head=small                           | 'head'                       | R
R seed=1,2                              | add -m                       | -m R seed=1,2
R seed=range(0,3)                       | add -m                       | -m R seed=range(0,3)
R hydra.run.dir=x                       | outputs=x                    | R outputs=x
R hydra/launcher=basic                  | add -m                       | -m R hydra/launcher=basic
-m R seed=1,2 hydra/launcher=jobli      | 'joblib'?                    | -m R seed=1,2 hydra/launcher=joblib
-m R seed=1,2 hydra.launcher.n_jobs=2   | hydra/launcher=NAME          |
-m R seed=1,2 hydra.lancher.n_jobs=2    | hydra.lancher.n_jobs         |
-m R seed=1,2 hydra/sweeper=optuna      | sweep=optuna                 |
-m R seed=1,2 hydra.sweeper.unheard=3   | sweep=optuna                 |
R on_error=stop                         | add -m                       | -m R on_error=stop
-m R on_error=retry                     | stop                         | -m R on_error=retry:1
-m R seed=1,2 sweep.dir=a,b             | sweep.dir                    | -m R seed=1,2
-m R seed=1,2 sweep.n_trials=3          | n_trials                     | -m R seed=1,2
-m R seed=1,2 seed=3                    | seed=1,2; seed=3             | -m R seed=1,2
R --epochs 3                            | loop.epochs=3                | R loop.epochs=3
R --batch-size=3                        | data.batch_size=3            | R data.batch_size=3
R --multrun                             | --multirun?                  |
R --frobnicate                          | --frobnicate                 | R
R --config-dir                          | --config-dir                 |
R --config-dir nowhere                  | --config-dir nowhere         |
R --cfg jobb                            | --cfg job                    |
R --cfg job optimzer.lr=1               | 'optimizer.lr'?              | R optimizer.lr=1 --cfg job
R --cfg job --resolve                   | --resolve                    | R --cfg job
R --cfg job -m seed=1,2                 | one run                      |
-sc instal=bash                         | -sc install=bash             |
-sc query=bash                          | -sc install=bash             |
R -m seed=interval(0,1)                 | seed=interval(0,1); seed=a,b,c |
R -m seed=glob(*)                       | seed=glob(*)                 |
R -m seed=range(3,0)                    | seed=range(3,0)              |
R -m optimizer.lr=0.1,fast              | optimizer.lr=fast            | -m R optimizer.lr=0.1,0.05
R -m optimizer=adam,sdg seed=1,2        | 'sgd'?                       | -m R optimizer=adam,sgd seed=1,2
R -m optimzer.lr=1,2                    | 'optimizer.lr'?              | -m R optimizer.lr=1,2
R resume=x checkpoint=y                 | resume=; checkpoint=         |
R checkpoint=x.pt                       | mode=eval; resume=RUN_DIR    |
mode=eval checkpoint=x.pt               | checkpoint=x.pt              |
mode=eval checkpoint=                   | path of a checkpoint         |
resume=x                                | resume=x                     |
resume=                                 | path of a run                |
resume=x mode=eval                      | resume=x                     |
mode=compare runs=[a]                   | runs=[RUN_A,RUN_B]           |
mode=compare runs=a                     | runs=a                       |
R trust=[a,b]                           | name of a package            |
R task._target_=subprocess.Popen        | subprocess.Popen             | R task._target_=DEFAULT
R task._target_=nowhere.Task            | nowhere.Task; trust=nowhere  | R task._target_=DEFAULT
R task._target_=experiments.rnn_fashion.RNNFashon | experiments.rnn_fashion.RNNFashion? | R task._target_=DEFAULT
R task._target_=RNNFashion              | module.Class                 | R task._target_=DEFAULT
R optimizer._target_=torch.optim.SGDD   | torch.optim.SGD?             | R optimizer._target_=torch.optim.SGD
R optimizer._target_=torch.nn.Linear    | torch.nn.Linear              | R optimizer._target_=DEFAULT
R model._target_=torch.optim.SGD        | torch.nn.Module              | R model._target_=DEFAULT
"""  # noqa: E501

# these look at the networks or the data; the toys read no files
NEED_DATA = """
experiment=toy_variants mode=evel             | mode=eval?; train, eval
experiment=toy_checks mode=sample             | sample; toy_checks; train, eval
experiment=toy_generative mode=sample         | checkpoint=
experiment=toy_variants threads=0             | threads=0; between 1 and
experiment=toy_variants threads=100000        | threads=100000; between 1 and
experiment=toy_variants data.batch_size=121   | data.batch_size=121; 120
experiment=toy_variants device=tpu            | device=tpu; auto, cpu
experiment=toy_variants device=cuda           | device=cuda; auto, cpu
experiment=toy_variants device=cuda:3         | device=cuda:3; auto, cpu
experiment=toy_variants device=mps            | device=mps; auto, cpu
experiment=toy_variants task.wide=0           | model.hidden
experiment=toy_variants model.dropout=2       | model.dropout=2; between 0 and 1
experiment=toy_variants outputs=a_file        | a_file
"""

# what an error would say is right, but is refused itself: it is not proposed
DROPPED = """
-m R seed=1,2 hydra.sweper.n_trials=3
-m R seed=1,2 hydra.sweeper.sampler.seed=3
experiment=glob(*)
R hydra.mode=MULTIRUN seed=1,2
R data/cifar=small
R tags=[a]
R logger=wandb
R sweep=optuna
R hydra.launcher.n_jobs=2
R hydra.sweep.dir=x
R optimizer.lr=fast model.hidden_size=big
R optimzer.lr=1 modle.hidden_size=3
"""

GOLDEN = {
    "experiment=rnn_fashon": "unknown experiment 'rnn_fashon'; did you mean 'rnn_fashion'? "
    "Available: ddpm_cifar, mha_demo, posenc_check, rnn_fashion.",
    "seed=3": "expected experiment=NAME, one of: ddpm_cifar, mha_demo, posenc_check, rnn_fashion.",
    "R optimzer.lr=1": "unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?",
    "R lr = 1": "write overrides without spaces around '=': lr=1",
    "R seed=[1": "seed=[1 cannot be parsed: unbalanced [.",
    "R 'seed=1 threads=1'": "seed=1 threads=1: two overrides in one argument; write them without quotes around both.",
    "R --epochs 3": "unknown option --epochs; overrides are written key=value, e.g. loop.epochs=3",
    "mode=eval": "mode=eval needs a checkpoint: checkpoint=RUN_DIR/checkpoints/best.pt.",
    "R seed=1,2": "seed=1,2 has several values, which needs a sweep: add -m. "
    "(To give one value with a comma, quote it: \"seed='1,2'\".)",
    "R hydra.run.dir=x": "hydra.run.dir is set by the runner; use outputs=x.",
}


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split(r" +\|(?: |$)", line)] for line in table.strip().splitlines()]


def split(line: str) -> list[str]:
    """Return a row as arguments; DEFAULT is what Hydra alone composes for rnn_fashion."""
    words = ["experiment=rnn_fashion" if word == "R" else word for word in shlex.split(line)]
    if "DEFAULT" not in line:
        return words
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["experiment=rnn_fashion"])
    return [word.replace("DEFAULT", str(OmegaConf.select(config, word.partition("=")[0]))) for word in words]


def require_mistake(done: Outcome, names: str, folder: Path, present: Set[str] = frozenset()) -> None:
    """One message with these words, exit status 2, no traceback, nothing of Hydra's, nothing written."""
    assert done.status == 2, done
    assert done.err.startswith("error: ")
    for words in names.split("; "):
        assert words in done.err
    for foreign in ("Traceback", "Hydra ", "omegaconf", "struct", "Could not override", "primary config"):
        assert foreign not in done.err
    assert len(done.err.strip().splitlines()) == 1 + (TRY.strip() in done.err)
    assert {path.name for path in folder.iterdir()} == set(present)


def proposed(done: Outcome) -> list[list[str]]:
    return [shlex.split(line.removeprefix(TRY)) for line in done.err.splitlines() if line.startswith(TRY)]


@pytest.mark.parametrize(("typed", "names", "right"), rows(MISTAKES), ids=lambda cell: cell[:60])
def test_a_mistake_is_named_and_what_is_proposed_is_accepted(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, names: str, right: str
) -> None:
    monkeypatch.setattr(command_line, "is_accepted", lambda *_, **__: True)  # the test itself tries them
    done = cli(*split(typed))
    require_mistake(done, names, tmp_path)
    assert proposed(done) == ([split(right)] if right else [])

    monkeypatch.setattr(plan, "dry_build", lambda job, loaded: {})  # loads data
    for command in proposed(done):
        if "-m" in command:
            assert cli(*command, "dry_run=true").status == 0
        elif "--cfg" in command:
            assert cli(*command).status == 0
        else:
            assert app.make_job(Command.parse(command)) is not None


@pytest.mark.parametrize("typed", DROPPED.strip().splitlines())
def test_what_would_be_refused_is_not_proposed(cli: Cli, tmp_path: Path, typed: str) -> None:
    done = cli(*split(typed))
    require_mistake(done, "error: ", tmp_path)
    assert proposed(done) == []


def test_a_bare_key_of_the_task_is_corrected_where_it_stands() -> None:
    arguments = argparse.Namespace(overrides=["mode=sample", "n=three"], multirun=False)
    corrected = command_line._corrected(UserError("", "task.n=three", "task.n=2"), arguments)
    assert corrected is not None and corrected.overrides == ["mode=sample", "task.n=2"]


@pytest.mark.parametrize(("typed", "message"), GOLDEN.items())
def test_messages_word_by_word(cli: Cli, typed: str, message: str) -> None:
    assert cli(*split(typed)).err.splitlines()[0] == f"error: {message}"


@pytest.mark.parametrize(("typed", "names"), rows(NEED_DATA), ids=lambda cell: cell[:60])
def test_a_mistake_that_only_the_machine_or_the_data_show(
    cli: Cli, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, names: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "a_file").write_text("in the way")
    require_mistake(cli(*split(typed), config_dir=toys), names, tmp_path, {"a_file"})


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint\n", b"PK\x03\x04 a damaged archive", b"root:x:0", None]
)
def test_a_file_that_is_no_checkpoint(cli: Cli, tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")  # another program's
    else:
        (tmp_path / "x.pt").write_bytes(content)
    require_mistake(cli("mode=eval", "checkpoint=x.pt"), "x.pt", tmp_path, {"x.pt"})


def test_a_setting_of_the_launcher(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = ["-m", "experiment=rnn_fashion", "seed=1,2", "hydra/launcher=joblib"]
    for setting, names, right in [
        ("n_job=2", "'n_jobs'?; backend", "n_jobs=2"),
        ("color=2", "'color'; n_jobs", None),
        ("n_jobs=two", "n_jobs=two; Integer", None),
    ]:
        done = cli(*command, f"hydra.launcher.{setting}")
        require_mistake(done, names, tmp_path)
        assert proposed(done) == ([[*command, f"hydra.launcher.{right}"]] if right else [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, made once."""
    folder = tmp_path_factory.mktemp("trained")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    toys = [
        "--config-dir",
        str(REPO / "tests" / "toys"),
        "experiment=toy_variants",
        "threads=1",
        "loop.steps=1",
    ]
    subprocess.run([sys.executable, "-m", "runner", *toys], cwd=folder, env=environment, check=True)
    return next(folder.glob("outputs/*/*"))


@pytest.fixture
def runs(tmp_path: Path, trained: Path) -> list[str]:
    """Seven runs of two experiments, the oldest first, relative to the current folder."""
    names = [f"outputs/toy/2026-01-0{day}_12-00-00" for day in range(1, 7)] + ["outputs/other/x"]
    for age, name in enumerate(names):
        shutil.copytree(trained, tmp_path / name)
        os.utime(tmp_path / name / ".hydra" / "config.yaml", (age, age))
    return names


@pytest.mark.parametrize(
    ("typed", "listed", "right"),
    [
        ("resume=outputs/toy/the_last_one", [5, 4, 3, 2, 1], None),
        ("resume=outptus/toy/2026-01-03_12-00-00/", [6, 5, 4, 3, 2], None),
        ("resume=outputs", [6, 5, 4, 3, 2], None),
        ("resume=outputs/toy", [5, 4, 3, 2, 1], "resume={5}"),
        ("resume={2}/checkpoints", [], "resume={2}"),
        ("resume={2}/checkpoints/last.pt", [], "resume={2}"),
        ("mode=eval checkpoint={2}/checkpoints/bets.pt", [2], "mode=eval checkpoint={2}/checkpoints/best.pt"),
        ("mode=eval checkpoint={2}/best.pt", [2], "mode=eval checkpoint={2}/checkpoints/best.pt"),
        ("mode=eval checkpoint={2}", [2], "mode=eval checkpoint={2}/checkpoints/best.pt"),
        ("mode=eval checkpoint=outputs/toy", [5, 4, 3, 2, 1], None),
        ("mode=eval checkpoint=x.pt", [6, 5, 4, 3, 2], None),
    ],
)
def test_a_mistyped_path_names_the_newest_runs(
    cli: Cli, toys: Path, tmp_path: Path, runs: list[str], typed: str, listed: list[int], right: str | None
) -> None:
    done = cli(*typed.format(*runs).split(), config_dir=toys)
    file = "/checkpoints/best.pt" if "checkpoint=" in typed else ""
    require_mistake(done, ", ".join(f"{runs[number]}{file}" for number in listed), tmp_path, {"outputs"})
    assert [command[2:] for command in proposed(done)] == ([right.format(*runs).split()] if right else [])


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("resume=run optimizer.lr=1", "loop.epochs, loop.steps"),
        ("resume=run optimzer.lr=1", "loop.epochs, loop.steps"),
        ("resume=run optimizer=adam", "loop.epochs, loop.steps"),
        ("resume=run experiment=toy_checks", "loop.epochs, loop.steps"),
        ("resume=run loop.epochs=-1", "epochs; at least 0"),
        ("resume=run loop.epochs=many", "loop.epochs=many"),
        ("resume=run ~loop.epochs", "loop.epochs=VALUE"),
        ("resume=run loop.epochs=5,6", "add -m"),
        ("resume=run mode=eval", "checkpoint=run/checkpoints/best.pt"),
        ("resume=run loop.epochs=9 device=tpu", "device=tpu"),
        ("resume=run loop.steps=0", "step 1"),
        ("mode=eval checkpoint=run/checkpoints/last.pt optimizer=adam", "the checkpoint decides"),
        ("mode=eval checkpoint=run/checkpoints/last.pt model.hiden=3", "'model.hidden'?"),
        ("mode=eval checkpoint=run/checkpoints/last.pt model.hidden=9", "does not fit this network"),
        ("mode=evel checkpoint=run/checkpoints/last.pt", "mode=eval?"),
        (
            "mode=eval checkpoint=run/checkpoints/last.pt data.eval_batch_size=0",
            "eval_batch_size; at least 1",
        ),
    ],
)
def test_a_mistake_about_a_run_leaves_its_folder_as_it_was(
    cli: Cli, toys: Path, tmp_path: Path, trained: Path, typed: str, names: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    require_mistake(cli(*typed.split(), config_dir=toys), names, tmp_path, {"run"})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


HEAD = "# @package _global_\nname: mine\ndescription: d\n"
TASK = "task:\n  _target_: mine_task.Mine\n"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (HEAD + "task: [1,\n  a: b\n", "mine.yaml, line 6; expected"),
        (HEAD + "task:\n\t_target_: x\n", "mine.yaml, line 5"),
        ("", "mine.yaml: expected keys and values"),
        ("- a\n- b\n", "mine.yaml: expected keys and values"),
        ("name: mine\ndescription: d\n" + TASK, "# @package _global_"),
        (HEAD, "task needs a value"),
        ("# @package _global_\ndescription: d\n" + TASK, "name needs a value"),
        (HEAD + "task: mine_task.Mine\n", "mine.yaml; a mapping"),
        (HEAD + "task:\n  size: 3\n", "task._target_; module.Class"),
        (HEAD + TASK + "optimzer:\n  lr: 1\n", "optimzer; optimizer?"),
        (HEAD + TASK + "optimizer:\n  lrr: 1\n", "optimizer.lrr (in; mine.yaml; lr?"),
        (HEAD + TASK + "optimizer:\n  lr: fast\n", "optimizer.lr (in; mine.yaml; a number"),
        (HEAD + TASK + "  sise: 3\n", "task.sise; Mine takes no sise; size?"),
        (HEAD + TASK + "  size: big\n", "task.size; a whole number"),
        (HEAD + TASK + "  size: -1\n", "task.size; size must be positive"),
        (HEAD + TASK + "  size: ${loop.epoch}\n", "task.size; loop.epoch"),
        (HEAD + "defaults:\n  - override /modle: rnn\n" + TASK, "unknown group 'modle'; 'model'?"),
        (HEAD + "defaults:\n  - override /model: rn\n" + TASK, "unknown model 'rn'; 'rnn'?"),
        (HEAD + "defaults:\n  - /model: rnn\n" + TASK, "write `override /model: rnn`"),
        (HEAD + "task:\n  _target_: mine_task.Mien\n", "mine_task; Mien; mine_task.Mine?"),
        (HEAD + "task:\n  _target_: mine_tsk.Mine\n", "mine_tsk"),
        (HEAD + "task:\n  _target_: mine_task.Popen\n", "mine_task.Popen comes from subprocess"),
    ],
)
def test_a_mistake_in_a_yaml_file_of_ones_own(cli: Cli, tmp_path: Path, content: str, names: str) -> None:
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text(content)
    (own / "mine_task.py").write_text(
        "from subprocess import Popen\nfrom runner.task import Task\n"
        "class Mine(Task):\n"
        "    def __init__(self, size: int = 1):\n"
        "        if size < 0:\n            raise ValueError(f'size must be positive, not {size}')\n"
    )
    require_mistake(cli("experiment=mine", config_dir=own), names, tmp_path, {"own"})


def test_an_unreadable_yaml_file_does_not_hide_the_other_experiments(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [")
    done = cli(config_dir=tmp_path)
    assert done.status == 2
    assert re.search(r"^  mine +\(cannot be used", done.out, re.MULTILINE)
    assert "  rnn_fashion  " in done.out


def test_a_file_with_the_name_of_one_of_the_runners_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "rnn.yaml").write_text("hidden_size: 3\n")
    done = cli("experiment=rnn_fashion", config_dir=tmp_path / "own")
    require_mistake(done, "model/rnn.yaml; rename it", tmp_path, {"own"})


@pytest.mark.parametrize("model", ["encoder", "rnn"])
def test_a_network_of_another_experiment_is_one_message(cli: Cli, tmp_path: Path, model: str) -> None:
    done = cli("experiment=mha_demo", f"model={model}", "debug=fast", "threads=1")
    require_mistake(done, "expected a class that takes what the task gives", tmp_path)


def test_an_objective_of_a_file_is_corrected_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    command = ["experiment=mha_demo", "task.heads=[1,4]", "debug=fast", "threads=1"]
    done = cli(*command)
    require_mistake(done, "objective", tmp_path)
    assert proposed(done) == [[*command, "objective=loss.heads_4/val"]]
