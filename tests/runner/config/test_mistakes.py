"""Mistakes on the command line and in YAML files: one message that says what to type, status 2, nothing written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runner import app
from runner import cli as command_line
from runner.config.command import CONF
from runner.sweep import plan
from tests.conftest import Outcome

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
R optimizer.nesterov=true optimizer.momentum=0 | optimizer.momentum=0 | R optimizer.nesterov=true optimizer.momentum=DEFAULT
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
-m R seed=1,2 sweep.dir=a,b             | sweep.dir                    |
-m R seed=1,2 sweep.n_trials=3          | n_trials                     |
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
R task._target_=subprocess.Popen        | subprocess.Popen             |
R task._target_=nowhere.Task            | nowhere.Task; trust=nowhere  |
R task._target_=experiments.rnn_fashion.RNNFashon | experiments.rnn_fashion.RNNFashion? |
R task._target_=RNNFashion              | module.Class                 |
R optimizer._target_=torch.optim.SGDD   | torch.optim.SGD?             | R optimizer._target_=torch.optim.SGD
R optimizer._target_=torch.nn.Linear    | torch.nn.Linear              |
R model._target_=torch.optim.SGD        | torch.nn.Module              |
"""

# these look at the networks or the data; the toys read no files
NEED_DATA = """
experiment=toy_variants mode=evel             | mode=eval?; train, eval
experiment=toy_checks mode=sample             | sample; toy_checks; train, eval
experiment=toy_generative mode=sample         | checkpoint=RUN_DIR/checkpoints/best.pt
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


def require_mistake(done: Outcome, names: str, folder: Path, present: frozenset[str] = frozenset()) -> None:
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
    monkeypatch.setattr(app, "run_command", app.run_command)
    for command in proposed(done):
        if "-m" in command:
            assert cli(*command, "dry_run=true").status == 0
        elif "--cfg" in command:
            assert cli(*command).status == 0
        else:
            assert app.make_job(command_line.Command.parse(command)) is not None


@pytest.mark.parametrize("typed", DROPPED.strip().splitlines())
def test_what_would_be_refused_is_not_proposed(cli: Cli, tmp_path: Path, typed: str) -> None:
    done = cli(*split(typed))
    require_mistake(done, "error: ", tmp_path)
    assert proposed(done) == []


def test_what_is_refused_by_its_type_is_not_proposed_without_torch_either(
    process: Callable[..., Outcome],
) -> None:
    assert proposed(process("experiment=rnn_fashion", "logger=wandb")) == []


@pytest.mark.parametrize(("typed", "message"), GOLDEN.items())
def test_messages_word_by_word(cli: Cli, typed: str, message: str) -> None:
    assert cli(*split(typed)).err.splitlines()[0] == f"error: {message}"
