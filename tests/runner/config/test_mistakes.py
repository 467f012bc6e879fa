"""What is typed wrongly: one message that names it and what to type instead, exit status 2, nothing written."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runner.app import make_job
from runner.config.command import CONF, Command
from tests.conftest import Outcome

Cli = Callable[..., Outcome]
TRY = "  try: python -m runner "

# argv, what the message must hold, the corrected arguments (None: none is shown)
STOPS_BEFORE_DATA: list[tuple[str, list[str], str | None]] = [
    ("experiment=rnn_fashon", ["experiment=rnn_fashion?"], "experiment=rnn_fashion"),
    ("experiment=rnn", ["experiment=rnn_fashion?"], "experiment=rnn_fashion"),
    ("experiment=RNN_Fashion", ["experiment=rnn_fashion?"], "experiment=rnn_fashion"),
    ("experiment=quite_another", ["no such experiment", "rnn_fashion"], None),
    ("experiment=[rnn_fashion]", ["takes one name"], None),
    ("experiment=null", ["No experiment is chosen", "rnn_fashion"], None),
    ("experiment=", ["no such experiment"], None),
    ("seed=3", ["No experiment is chosen", "rnn_fashion"], None),
    ("mode=eval", ["looks at a trained network", "checkpoint=RUN_DIR"], None),
    ("experimnt=rnn_fashion", ["no key experimnt", "experiment?"], "experiment=rnn_fashion"),
    ("rnn_fashion", ["chosen as experiment=rnn_fashion"], "experiment=rnn_fashion"),
    ("experiment rnn_fashion", ["without spaces: experiment=rnn_fashion"], None),
    ("experiment = rnn_fashion", ["without spaces: experiment=rnn_fashion"], None),
    ("R optimizer=sdg", ["optimizer=sgd?", "adam, adam_fused, adamw, sgd"], "R optimizer=sgd"),
    ("R optimizr=sgd", ["no key optimizr", "optimizer?"], "R optimizer=sgd"),
    ("R optimizer=[sgd,adam]", ["optimizer takes one name", "adam, adam_fused, adamw, sgd"], "R"),
    ("R optimizer=null", ["every run needs one", "adam, adam_fused, adamw, sgd"], "R"),
    ("R optimizer/adam=1", ["chosen as optimizer=adam"], "R optimizer=adam"),
    ("R +optimizer=adam", ["chosen as optimizer=adam"], "R optimizer=adam"),
    ("R optimizer@loop=adam", ["chosen as optimizer=adam"], "R optimizer=adam"),
    ("R schedule=cos", ["schedule=cosine?"], "R schedule=cosine"),
    ("R debug=fats", ["debug=fast?", "fast, overfit, profile"], "R debug=fast"),
    ("R optimzer.lr=1", ["no key optimzer.lr", "optimizer.lr?"], "R optimizer.lr=1"),
    ("R optimzer.lrr=1", ["optimizer.lr?"], "R optimizer.lr=1"),
    ("R lr=1", ["optimizer.lr?"], "R optimizer.lr=1"),
    ("R model.lr=1", ["optimizer.lr?"], "R optimizer.lr=1"),
    ("R loop.epoch=3", ["loop.epochs?"], "R loop.epochs=3"),
    ("R model.hiden_size=3", ["model.hidden_size?"], "R model.hidden_size=3"),
    ("R flux=3", ["no key flux", "optimizer, outputs"], "R"),
    ("R seed.x=3", ["seed is one value"], "R"),
    (
        "R optimizer=adam optimizer.momentum=0.5",
        ["a key of optimizer=sgd", "optimizer.betas"],
        "R optimizer=adam",
    ),
    (
        "R schedule=constant schedule.final=0.1",
        ["schedule=cosine and schedule=linear"],
        "R schedule=constant",
    ),
    ("R optimizer.lr=fast", ["a number is wanted, not 'fast'"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr=[1,2]", ["a number is wanted, not [1,2]"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr={a:1}", ["a number is wanted, not {a:1}"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr=null", ["a number is wanted, not null"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr=nan", ["a finite number is wanted, not nan"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr=inf", ["a finite number is wanted, not inf"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr=", ["a number is wanted, not ''"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr=-1", ["learning rate"], "R optimizer.lr=DEFAULT"),
    ("R optimizer.lr=${sede}", ["optimizer.lr=${sede}", "'sede' not found"], None),
    (
        "R optimizer=adam optimizer.betas=0.9",
        ["a list of 2 numbers"],
        "R optimizer=adam optimizer.betas=[0.9,0.999]",
    ),
    (
        "R optimizer=adam optimizer.betas=[0.9]",
        ["a list of 2 numbers"],
        "R optimizer=adam optimizer.betas=[0.9,0.999]",
    ),
    ("R optimizer=adam optimizer.betas=[0.9,7]", ["beta"], "R optimizer=adam optimizer.betas=[0.9,0.999]"),
    (
        "R optimizer.nesterov=true optimizer.momentum=0",
        ["optimizer.momentum=0: Nesterov"],
        "R optimizer.nesterov=true optimizer.momentum=DEFAULT",
    ),
    ("R +optimizer.foreach=true +optimizer.fused=true", ["foreach", "fused"], None),
    ("R data.batch_size=0", ["batch_size must be at least 1, not 0"], "R data.batch_size=DEFAULT"),
    ("R data.batch_size=many", ["a whole number is wanted"], "R data.batch_size=DEFAULT"),
    ("R model.hidden_size=1.5", ["a whole number is wanted, not 1.5"], "R model.hidden_size=DEFAULT"),
    ("R model.hidden_size=big", ["a whole number is wanted, not 'big'"], "R model.hidden_size=DEFAULT"),
    ("R model.init=xaver", ["not 'xaver'", "Did you mean xavier?", "orthogonal"], "R model.init=xavier"),
    ("R precision=float16", ["Did you mean bfloat16?", "float32"], "R precision=bfloat16"),
    (
        "R compile=maybe",
        ["true or false or one of reduce-overhead, max-autotune is wanted"],
        "R compile=false",
    ),
    ("R threads=two", ["a whole number or null is wanted"], "R threads=null"),
    ("R seed=-1", ["seed must lie in [0, 2**63)"], "R seed=0"),
    ("R seed=1.5", ["a whole number is wanted, not 1.5"], "R seed=0"),
    ("R seed=true", ["a whole number is wanted, not true"], "R seed=0"),
    ("R seed=null", ["a whole number is wanted, not null"], "R seed=0"),
    ("R seed=???", ["seed needs a value"], None),
    ("R seed={a:1}", ["a whole number is wanted, not {a:1}"], "R seed=0"),
    ("R seed", ["Settings are written key=value"], "R"),
    ("R =3", ["the key before the = is missing"], "R"),
    ("R optimizer.lr = 0.1", ["without spaces around the =: optimizer.lr=0.1"], None),
    ("R 'optimizer.lr = 0.1'", ["no spaces around the ="], "R optimizer.lr=0.1"),
    ("R 'seed=1 threads=1'", ["two settings in one argument"], None),
    ("R optimizer.lr==0.1", ["two ="], "R optimizer.lr=0.1"),
    ('R "optimizer.lr=\'0.1"', ["' has no partner"], "R"),
    ("R optimizer.lr=[0.1", ["[ has no partner"], "R"),
    ("R loop.clip_norm=0", ["clip_norm must be above 0"], "R loop.clip_norm=DEFAULT"),
    ("R loop.epochs=-1", ["epochs must be at least 0"], "R loop.epochs=DEFAULT"),
    ("R loop.steps=-1", ["steps must be at least 0, not -1"], "R loop.steps=null"),
    ("R loop.ema=1", ["ema must lie in [0, 1)"], "R loop.ema=null"),
    ("R loop.patience=0", ["patience must be at least 1"], "R loop.patience=null"),
    ("R schedule.final=2", ["final must lie in [0, 1]"], "R schedule.final=0.0"),
    ("R schedule.warmup=-1", ["warmup must be at least 0"], "R schedule.warmup=0"),
    ("R direction=up", ["one of maximize, minimize"], "R direction=maximize"),
    ("R objective=accuracy", ["a metric of the val split"], "R objective=accuracy/val"),
    ("R objective=accuracy/test", ["a metric of the val split"], "R objective=accuracy/val"),
    ("R name=../x", ["a folder's name"], "R name=rnn_fashion"),
    ("R name=", ["a folder's name"], "R name=rnn_fashion"),
    ("R outputs=", ["outputs takes a folder"], None),
    ("R task=null", ["task holds several keys", "task.loss"], None),
    ("R data=null", ["needs data: add data=NAME"], None),
    ("R model=null", ["needs a network: add model=NAME"], None),
    ("R ~optimizer.lr", ["keys cannot be removed", "optimizer.lr=VALUE"], "R"),
    ("R ~seed", ["keys cannot be removed"], "R"),
    ("R +optimizer.lrr=1", ["optimizer.lr?"], "R optimizer.lr=1"),
    ("R +optimizer.lr=1", ["is there already"], "R optimizer.lr=1"),
    ("R +optimizer.maximise=true", ["SGD takes no maximise", "maximize?"], "R +optimizer.maximize=true"),
    ("R +flux=1", ["no key flux"], "R"),
    ("R ++flux.capacitor=1", ["no key flux.capacitor"], "R"),
    ("R seed=1,2", ["a sweep: add -m"], "-m R seed=1,2"),
    ("R seed=range(0,3)", ["a sweep: add -m"], "-m R seed=range(0,3)"),
    ("R hydra.run.dir=x", ["Hydra's own settings", "write outputs=x"], "R outputs=x"),
    ("R hydra/launcher=basic", ["a launcher is for a sweep: add -m"], "-m R hydra/launcher=basic"),
    ("R hydra.launcher.n_jobs=2", ["a launcher is for a sweep: add -m"], "-m R hydra.launcher.n_jobs=2"),
    ("-m R seed=1,2 hydra/launcher=jobli", ["hydra/launcher=joblib"], "-m R seed=1,2 hydra/launcher=joblib"),
    ("-m R seed=1,2 hydra.launcher.n_jobs=2", ["no setting n_jobs", "hydra/launcher=NAME"], "-m R seed=1,2"),
    (
        "-m R seed=1,2 hydra.lancher.n_jobs=2",
        ["hydra.launcher.n_jobs?"],
        "-m R seed=1,2 hydra.launcher.n_jobs=2",
    ),
    ("-m R seed=1,2 hydra/luancher=joblib", ["hydra/launcher?"], "-m R seed=1,2 hydra/launcher=joblib"),
    ("-m R seed=1,2 hydra.launcher=joblib", ["hydra/launcher?"], "-m R seed=1,2 hydra/launcher=joblib"),
    (
        "-m R seed=1,2 hydra.sweper.n_trials=3",
        ["hydra.sweeper.n_trials?"],
        "-m R seed=1,2 hydra.sweeper.n_trials=3",
    ),
    ("-m R seed=1,2 hydra.sweeper.n_trails=3", ["write sweep.n_trials=3"], "-m R seed=1,2 sweep.n_trials=3"),
    (
        "-m R seed=1,2 hydra.sweeper.direction=minimize",
        ["write direction"],
        "-m R seed=1,2 direction=minimize",
    ),
    ("-m R seed=1,2 hydra.sweeper.sampler.seed=3", ["write sweep.seed=3"], "-m R seed=1,2 sweep.seed=3"),
    ("-m R seed=1,2 hydra.sweeper.unheard=3", ["what sweep=optuna takes"], "-m R seed=1,2"),
    ("-m R seed=1,2 hydra/sweeper=optuna", ["sweep=optuna"], "-m R seed=1,2 sweep=optuna"),
    ("R on_error=stop", ["is for a sweep: add -m"], "-m R on_error=stop"),
    ("R sweep=optuna", ["is for a sweep: add -m"], "-m R sweep=optuna"),
    ("-m R on_error=retry", ["continue, stop, or retry:N"], "-m R on_error=retry:1"),
    ("-m R seed=1,2 sweep.dir=a,b", ["one value for the whole sweep"], None),
    ("-m R seed=1,2 sweep.n_trials=3", ["n_trials"], None),
    ("R --epochs 3", ["no dashes: loop.epochs=3"], "R loop.epochs=3"),
    ("R --batch-size=3", ["no dashes: data.batch_size=3"], "R data.batch_size=3"),
    ("R --multrun", ["--multirun?"], None),
    ("R --frobnicate", ["--frobnicate is not an option"], "R"),
    ("R --config-dir", ["--config-dir", "expected one argument"], None),
    ("R --config-dir nowhere", ["nowhere: there is no such folder"], None),
    ("R --cfg jobb", ["--cfg job"], None),
    ("R --cfg job optimzer.lr=1", ["optimizer.lr?"], "R optimizer.lr=1"),
    ("R --cfg job -m seed=1,2", ["one run"], None),
    ("-sc instal=bash", ["-sc install=bash"], None),
    ("-sc query=bash", ["-sc install=bash"], None),
    ("R -m seed=interval(0,1)", ["interval", "seed=a,b,c"], None),
    ("R -m seed=glob(*)", ["glob is not used"], None),
    ("R -m seed=range(3,0)", ["holds no value"], None),
    ("R -m optimizer.lr=0.1,fast", ["optimizer.lr=fast", "a number is wanted"], "-m R optimizer.lr=0.1,0.05"),
    ("R -m optimizer=adam,sdg seed=1,2", ["optimizer=sgd?"], "-m R optimizer=adam,sgd seed=1,2"),
    ("R -m optimzer.lr=1,2", ["optimizer.lr?"], "-m R optimizer.lr=1,2"),
    ("R resume=x checkpoint=y", ["give one of them"], None),
    ("R checkpoint=x.pt", ["add mode=eval", "resume=RUN_DIR"], None),
    ("mode=eval checkpoint=x.pt", ["checkpoint=x.pt: there is no such file"], None),
    ("mode=eval checkpoint=", ["checkpoint takes the path of a checkpoint"], None),
    ("resume=x", ["resume=x: there is no such folder"], None),
    ("resume=", ["resume takes the path of a run's folder"], None),
    ("resume=x mode=eval", ["there is no such folder"], None),
    ("R trust=[a,b]", ["trust takes the name of a package"], None),
    ("R task._target_=subprocess.Popen", ["may not be named"], None),
    ("R task._target_=nowhere.Task", ["may not be named", "trust=nowhere"], None),
    ("R task._target_=experiments.rnn_fashion.RNNFashon", ["experiments.rnn_fashion.RNNFashion?"], None),
    ("R task._target_=RNNFashion", ["module.Class"], None),
    ("R optimizer._target_=torch.optim.SGDD", ["torch.optim.SGD?"], "R optimizer._target_=torch.optim.SGD"),
    ("R optimizer._target_=torch.nn.Linear", ["may not be named"], None),
    ("R model._target_=torch.optim.SGD", ["is not a torch.nn.Module"], None),
]

# these look at the networks or the data; the toys read no files
NEEDS_DATA: list[tuple[str, list[str]]] = [
    ("experiment=toy_variants mode=evel", ["mode=eval?", "train, eval"]),
    ("experiment=toy_checks mode=sample", ["sample is not a mode of toy_checks", "train, eval"]),
    ("experiment=toy_generative mode=sample", ["checkpoint=RUN_DIR/checkpoints/best.pt"]),
    ("experiment=toy_variants threads=0", ["threads=0", "between 1 and"]),
    ("experiment=toy_variants data.batch_size=121", ["data.batch_size=121 is more than the 120 training"]),
    ("experiment=toy_variants threads=100000", ["threads=100000", "between 1 and"]),
    ("experiment=toy_variants device=tpu", ["device=tpu is not on this machine", "auto, cpu"]),
    ("experiment=toy_variants device=cuda", ["device=cuda is not on this machine", "auto, cpu"]),
    ("experiment=toy_variants device=cuda:3", ["device=cuda:3 is not on this machine", "auto, cpu"]),
    ("experiment=toy_variants device=mps", ["device=mps is not on this machine", "auto, cpu"]),
    ("experiment=toy_variants task.wide=0", ["model.hidden, as the task sets it"]),
    ("experiment=toy_variants model.dropout=2", ["model.dropout=2", "between 0 and 1"]),
    ("experiment=toy_variants outputs=a_file", ["No folder can be made in a_file"]),
]


def split(line: str) -> list[str]:
    """A row as arguments, `R` being the experiment that most rows need."""
    return ["experiment=rnn_fashion" if word == "R" else word for word in shlex.split(line)]


def with_default(arguments: list[str]) -> list[str]:
    """The arguments, `key=DEFAULT` with the value that Hydra alone composes for rnn_fashion."""
    if not any("DEFAULT" in word for word in arguments):
        return arguments
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["experiment=rnn_fashion"])
    defaults = {word: OmegaConf.select(config, word.partition("=")[0]) for word in arguments}
    return [word.replace("DEFAULT", str(defaults[word])) for word in arguments]


def require_mistake(done: Outcome, holds: list[str], folder: Path, present: set[str] = frozenset()) -> None:
    """One message with these words, exit status 2, no traceback, nothing of Hydra's, nothing written."""
    assert done.status == 2, done
    assert done.err.startswith("error: ")
    for words in holds:
        assert words in done.err
    for foreign in ("Traceback", "Hydra ", "omegaconf", "struct", "Could not override", "primary config"):
        assert foreign not in done.err
    assert len(done.err.strip().splitlines()) == 1 + (TRY.strip() in done.err)
    assert {path.name for path in folder.iterdir()} == set(present)


@pytest.mark.parametrize(("line", "holds", "right"), STOPS_BEFORE_DATA, ids=lambda row: str(row)[:60])
def test_a_mistake_is_told_and_corrected(
    cli: Cli, tmp_path: Path, line: str, holds: list[str], right: str | None
) -> None:
    done = cli(*split(line))
    require_mistake(done, holds, tmp_path)
    proposed = [shown.removeprefix(TRY) for shown in done.err.splitlines() if shown.startswith(TRY)]
    if right is not None:
        assert [shlex.split(command) for command in proposed] == [with_default(split(right))]
    for command in proposed:  # whatever is proposed must itself be right
        if "-m" not in shlex.split(command):
            assert make_job(Command.parse(shlex.split(command))) is not None


@pytest.mark.parametrize(("line", "holds"), NEEDS_DATA, ids=lambda row: str(row)[:60])
def test_a_mistake_that_only_the_machine_or_the_data_show(
    cli: Cli, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, holds: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "a_file").write_text("in the way")
    require_mistake(cli(*split(line), config_dir=toys), holds, tmp_path, {"a_file"})


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint\n", b"PK\x03\x04 a damaged archive", b"root:x:0"]
)
def test_a_file_that_is_no_checkpoint(cli: Cli, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    require_mistake(cli("mode=eval", "checkpoint=x.pt"), ["checkpoint=x.pt"], tmp_path, {"x.pt"})


def test_a_checkpoint_of_something_else(cli: Cli, tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")
    done = cli("mode=eval", "checkpoint=x.pt")
    require_mistake(done, ["not a checkpoint of this runner"], tmp_path, {"x.pt"})


def test_a_folder_that_is_no_run(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    require_mistake(cli("resume=here"), ["resume=here is not a run folder"], tmp_path, {"here"})


def test_a_launcher_s_setting_that_is_misspelt_is_told_with_the_nearest(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = cli("-m", "experiment=rnn_fashion", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_job=2")
    require_mistake(
        done, ["no setting n_job. Did you mean hydra.launcher.n_jobs? It takes: n_jobs, "], tmp_path
    )
    assert done.err.splitlines()[1].endswith("hydra/launcher=joblib hydra.launcher.n_jobs=2")
    done = cli("-m", "experiment=rnn_fashion", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.color=2")
    require_mistake(done, ["no setting color. It takes: n_jobs, "], tmp_path)
    done = cli(
        "-m", "experiment=rnn_fashion", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=two"
    )
    require_mistake(done, ["hydra.launcher.n_jobs=two: Value 'two'", "to Integer"], tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Folders as seven runs of two experiments leave them, the oldest first, relative to the current one."""
    outputs = Path("outputs")
    found = [outputs / "toy" / f"2026-01-0{day}_12-00-00" for day in range(1, 7)] + [outputs / "other" / "x"]
    for age, folder in enumerate(found):
        for file in (".hydra/config.yaml", "checkpoints/best.pt", "checkpoints/last.pt"):
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_text("name: toy\n")
            os.utime(tmp_path / folder / file, (age, age))
    return found


TOY_RUNS = "There are: {runs[5]}, {runs[4]}, {runs[3]}, {runs[2]}, {runs[1]} and 1 more."


@pytest.mark.parametrize(
    ("typed", "holds", "right"),
    [
        (
            "outputs/toy/2026-01-03_12-00-01",
            ["no such folder. Did you mean {runs[2]}?", TOY_RUNS],
            "{runs[2]}",
        ),
        (
            "outptus/tyo/2026-01-03_12-00-00/",
            ["no such folder. Did you mean {runs[2]}?", TOY_RUNS],
            "{runs[2]}",
        ),
        ("outputs/toy/the_last_one", ["no such folder. There", TOY_RUNS], None),
        ("nowhere", ["no such folder. There are: {runs[6]}, {runs[5]}, "], None),
        ("outputs", ["is not a run folder", "There are: {runs[6]}, {runs[5]}, "], None),
    ],
)
def test_a_mistyped_resume_names_the_runs_there_are(
    cli: Cli, tmp_path: Path, runs: list[Path], typed: str, holds: list[str], right: str | None
) -> None:
    done = cli(f"resume={typed}")
    require_mistake(done, [text.format(runs=runs) for text in holds], tmp_path, {"outputs"})
    tried = done.err.splitlines()[1:]
    assert tried == ([] if right is None else [f"{TRY}resume={right.format(runs=runs)}"])


@pytest.mark.parametrize(
    ("typed", "holds", "right"),
    [
        ("{runs[2]}/checkpoints/bets.pt", ["Did you mean {runs[2]}/checkpoints/best.pt?", "last.pt."], "best"),
        ("{runs[2]}/best.pt", ["There are: {runs[2]}/checkpoints/best.pt, {runs[2]}/checkpoints/last.pt."], "best"),
        ("{runs[2]}", ["this is a folder", "There are: {runs[2]}/checkpoints/best.pt, "], "best"),
        ("outputs/tyo/2026-01-03_12-00-00/checkpoints/best.pt", ["There are: {runs[5]}/checkpoints/best.pt, "], "best"),
        ("outputs/toy", ["this is a folder", "There are: {runs[5]}/checkpoints/best.pt, "], None),
        ("x.pt", ["no such file. There are: {runs[6]}/checkpoints/best.pt, "], None),
    ],
)  # fmt: skip
def test_a_mistyped_checkpoint_names_those_there_are(
    cli: Cli, tmp_path: Path, runs: list[Path], typed: str, holds: list[str], right: str | None
) -> None:
    done = cli("mode=eval", f"checkpoint={typed.format(runs=runs)}")
    require_mistake(done, [text.format(runs=runs) for text in holds], tmp_path, {"outputs"})
    best = f"{runs[2]}/checkpoints/best.pt"
    tried = done.err.splitlines()[1:]
    assert tried == ([] if right is None else [f"{TRY}mode=eval checkpoint={best}"])


@pytest.mark.parametrize("near", ["outputs/toy_variants", "{run}/checkpoints", "{run}/checkpoints/last.pt"])
def test_a_resume_of_what_is_near_a_run_folder_proposes_the_run(
    cli: Cli, toys: Path, tmp_path: Path, last_run: Callable[[], Path], near: str
) -> None:
    cli("experiment=toy_variants", "threads=1", "loop.steps=1", config_dir=toys)
    run = last_run()
    done = cli(f"resume={near.format(run=run)}", config_dir=toys)
    require_mistake(done, ["is not a run folder"], tmp_path, {"outputs"})
    proposed = shlex.split(done.err.splitlines()[1].removeprefix(TRY))[-1]
    assert Path(proposed.removeprefix("resume=")).resolve() == run.resolve()


@pytest.mark.parametrize(
    ("override", "holds"),
    [
        ("optimizer.lr=1", ["a resume may change loop.epochs"]),
        ("optimzer.lr=1", ["a resume may change loop.epochs"]),
        ("optimizer=adam", ["a resume may change loop.epochs"]),
        ("experiment=toy_checks", ["a resume may change loop.epochs"]),
        ("loop.epochs=-1", ["epochs must be at least 0"]),
        ("loop.epochs=many", ["a number is wanted"]),
        ("~loop.epochs", ["keys cannot be removed"]),
        ("loop.epochs=5,6", ["a sweep: add -m"]),
        ("mode=eval", ["checkpoints/best.pt"]),
        ("loop.epochs=9 device=tpu", ["device=tpu is not on this machine"]),
        ("loop.steps=0", ["stands at step 1 ", "beyond the 0 steps"]),
    ],
)
def test_a_resume_takes_few_overrides_and_leaves_the_folder_as_it_was(
    cli: Cli, toys: Path, last_run: Callable[[], Path], override: str, holds: list[str]
) -> None:
    cli("experiment=toy_variants", "threads=1", "loop.steps=1", config_dir=toys)
    run = last_run()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = cli(f"resume={run}", *override.split(), config_dir=toys)
    assert done.status == 2 and "Traceback" not in done.err
    for words in holds:
        assert words in done.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("override", "holds"),
    [
        ("optimizer=adam", ["come from the checkpoint"]),
        ("model.hiden=3", ["model.hidden?"]),
        ("model.hidden=9", ["does not fit this network"]),
        ("mode=evel", ["mode=eval?"]),
        ("data.eval_batch_size=0", ["eval_batch_size must be at least 1"]),
    ],
)
def test_a_look_at_a_checkpoint_with_a_wrong_override(
    cli: Cli, toys: Path, last_run: Callable[[], Path], override: str, holds: list[str]
) -> None:
    cli("experiment=toy_variants", "threads=1", "loop.steps=1", config_dir=toys)
    run = last_run()
    mode = [] if override.startswith("mode=") else ["mode=eval"]
    done = cli(*mode, f"checkpoint={run}/checkpoints/last.pt", override, config_dir=toys)
    assert done.status == 2 and "Traceback" not in done.err
    for words in holds:
        assert words in done.err
    assert not (run / "eval").exists()


HEAD = "# @package _global_\nname: mine\ndescription: d\n"
TASK = "task:\n  _target_: mine_task.Mine\n"


@pytest.mark.parametrize(
    ("yaml_text", "holds"),
    [
        (HEAD + "task: [1,\n  a: b\n", ["mine.yaml, line 6", "expected"]),
        (HEAD + "task:\n\t_target_: x\n", ["mine.yaml, line 5"]),
        ("", ["mine.yaml must hold keys and values"]),
        ("- a\n- b\n", ["mine.yaml must hold keys and values"]),
        ("name: mine\ndescription: d\n" + TASK, ["# @package _global_"]),
        (HEAD, ["task needs a value"]),
        ("# @package _global_\ndescription: d\n" + TASK, ["name needs a value"]),
        (HEAD + "task: mine_task.Mine\n", ["mine.yaml", "a mapping"]),
        (HEAD + "task:\n  size: 3\n", ["task._target_", "module.Class"]),
        (HEAD + TASK + "optimzer:\n  lr: 1\n", ["optimzer", "Did you mean optimizer?"]),
        (HEAD + TASK + "optimizer:\n  lrr: 1\n", ["optimizer.lrr (in", "mine.yaml", "Did you mean lr?"]),
        (HEAD + TASK + "optimizer:\n  lr: fast\n", ["optimizer.lr (in", "mine.yaml", "a number is wanted"]),
        (HEAD + TASK + "  sise: 3\n", ["task.sise", "Mine takes no sise", "Did you mean size?"]),
        (HEAD + TASK + "  size: big\n", ["task.size", "a whole number is wanted"]),
        (HEAD + TASK + "  size: -1\n", ["task.size", "size must be positive"]),
        (HEAD + TASK + "  size: ${loop.epoch}\n", ["task.size", "loop.epoch"]),
        (HEAD + "defaults:\n  - override /modle: rnn\n" + TASK, ["there is no group modle", "mean model?"]),
        (HEAD + "defaults:\n  - override /model: rn\n" + TASK, ["no such model", "rnn? There are:"]),
        (HEAD + "defaults:\n  - /model: rnn\n" + TASK, ["write `override /model: rnn`"]),
        (HEAD + "task:\n  _target_: mine_task.Mien\n", ["mine_task has no class Mien", "mine_task.Mine?"]),
        (HEAD + "task:\n  _target_: mine_tsk.Mine\n", ["there is no module mine_tsk"]),
        (HEAD + "task:\n  _target_: mine_task.Popen\n", ["mine_task.Popen comes from subprocess"]),
    ],
)
def test_a_mistake_in_a_yaml_file_of_ones_own(
    cli: Cli, tmp_path: Path, yaml_text: str, holds: list[str]
) -> None:
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text(yaml_text)
    (own / "mine_task.py").write_text(
        "from subprocess import Popen\nfrom runner.task import Task\n"
        "class Mine(Task):\n"
        "    def __init__(self, size: int = 1):\n"
        "        if size < 0:\n            raise ValueError(f'size must be positive, not {size}')\n"
    )
    require_mistake(cli("experiment=mine", config_dir=own), holds, tmp_path, {"own"})


def test_an_unreadable_yaml_file_does_not_hide_the_other_experiments(cli: Cli, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text("a: [")
    done = cli(config_dir=own)
    assert done.status == 2
    assert re.search(r"^  mine +\(cannot be used", done.out, re.MULTILINE)
    assert "  rnn_fashion  " in done.out


def test_a_file_with_the_name_of_one_of_the_runners_is_refused(cli: Cli, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "model").mkdir(parents=True)
    (own / "model" / "rnn.yaml").write_text("hidden_size: 3\n")
    done = cli("experiment=rnn_fashion", config_dir=own)
    require_mistake(done, ["has the name of the runner's own", "rename it"], tmp_path, {"own"})


def test_a_network_of_another_experiment_is_one_message(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    for model in ("encoder", "rnn"):
        outcome = cli("experiment=mha_demo", f"model={model}", "debug=fast", "threads=1")
        assert outcome.status == 2 and "is not what this task builds, with" in outcome.err
        assert "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir())


def test_an_objective_of_a_file_is_mended_on_the_command_line(cli: Cli) -> None:
    outcome = cli("experiment=mha_demo", "task.heads=[1,4]", "debug=fast", "threads=1")
    assert outcome.status == 2
    command = "experiment=mha_demo 'task.heads=[1,4]' debug=fast threads=1 objective=loss.heads_4/val"
    assert f"  try: python -m runner {command}" in outcome.err
