"""Every experiment that ships is composed, built and run a few steps, on made-up data where its own is fetched.

And what is asked of each of them: a run leaves its figures, is resumed with the same bits, is evaluated alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from experiments.mha_demo.cases import CASES
from experiments.nn.encoder import ENCODINGS
from runner import run
from runner.app import make_job
from runner.config.command import CONF, Command
from runner.engine.job import Result
from runner.engine.prepare import dry_build
from runner.errors import UserError
from tests.experiments.conftest import (
    SIZES,
    STAND_IN,
    checkpoint,
    draw_figures,
    figures_later,
    figures_of,
    saved,
    table,
)

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
# figures that mode=eval draws again, and all of them
AFTER = {
    "mha_demo": {"attention_heads_1", "attention_heads_2", "heads", "ablation", "confusion", "per_class"},
    "posenc_check": {"confusion", "per_class", "length_generalisation"},
    "rnn_fashion": {"before_after", "confusion", "per_class", "mistakes", "gradients_through_time"},
    "ddpm_cifar": {
        *("samples", "learning", "chain", "progressive", "shared", "interpolation", "neighbours"),
        "rate_distortion",
    },
}
FIGURES = {
    "mha_demo": AFTER["mha_demo"] | {f"steps_{case.name}" for case in CASES} | {"scale"},
    "posenc_check": AFTER["posenc_check"]
    | {"encoding_table", "encoding_similarity", "wavelengths", "rotation"}
    | {"relative_position", "rotary_decay", "word_order"},
    "rnn_fashion": AFTER["rnn_fashion"] | {"clipping"},
    "ddpm_cifar": AFTER["ddpm_cifar"] | {"forward"},
}
CHECKS_AFTER = {
    "mha_demo": {"one_head_ceiling", "heads_2_learnt", "heads_2_needed"},
    "posenc_check": {f"trained_{name}" for name in ENCODINGS},
}
ANIMATIONS = {"posenc_check": ("turning", 20), "ddpm_cifar": ("chain", 4)}  # name, different frames
# half of a run, all of it, and every source of randomness
RESUMED = {
    "mha_demo": ("loop.steps=10", "loop.steps=20", "schedule=constant", "loop.eval_every=10"),
    "posenc_check": (
        *("loop.steps=4", "loop.steps=8", "schedule=constant", "loop.eval_every=4"),
        *("model.random_start=9", "data.train_size=400", "data.val_size=100", "data.test_size=200"),
    ),
    "rnn_fashion": (
        *("loop.epochs=1", "loop.epochs=2", "schedule=constant", "loop.ema=0.9"),
        *("model.dropout=0.3", "data.flip=0.5", "data.shift=2"),
    ),
    "ddpm_cifar": ("loop.steps=4", "loop.steps=8", "model.dropout=0.1"),
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
        result = finished(name)
        assert figures_of(result.folder) == FIGURES[name]
    else:
        result = run(*overrides_of(name), "debug=fast", "threads=1", config_dir=STAND_IN)
    assert_complete(result)


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
    [networks] = built
    for network in networks.values() if isinstance(networks, dict) else [networks]:
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_picture_shows_something(name: str, finished: Callable[[str], Result]) -> None:
    folder = finished(name).folder
    drawn = draw_figures(folder)
    assert set(drawn) == FIGURES[name]
    for figure, pixels in drawn.items():
        ink = (pixels[..., :3] < 0.9).any(-1).mean()
        assert min(pixels.shape[:2]) >= 150 and 0.01 < ink < 0.95, (figure, pixels.shape, ink)
    if name in ANIMATIONS:
        animation, count = ANIMATIONS[name]
        with Image.open(folder / "figures" / f"{animation}.gif") as film:
            assert len({frame.convert("L").tobytes() for frame in ImageSequence.Iterator(film)}) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", AFTER)
def test_evaluating_the_checkpoint_draws_the_same(
    name: str, finished: Callable[[str], Result], clean_process: None
) -> None:
    result = finished(name)
    again = run("mode=eval", checkpoint(result), config_dir=STAND_IN)
    trained, evaluated = draw_figures(result.folder, *AFTER[name]), draw_figures(again.folder)
    assert set(evaluated) == AFTER[name]
    for figure, pixels in evaluated.items():
        np.testing.assert_array_equal(pixels, trained[figure], figure)
    for file in (again.folder / "tables").glob("*.csv"):
        rows = table(again.folder, file.stem)
        assert rows and all(row in table(result.folder, file.stem) for row in rows), file
    # checks of what was learnt are made again, those of the formulas are not
    assert {check.name for check in again.checks} == CHECKS_AFTER.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(
    name: str, small: Callable[..., Result], clean_process: None
) -> None:
    half, all_of_it, *random = RESUMED[name]
    whole, first = small(name, *random, all_of_it), small(name, *random, half)
    with figures_later():
        resumed = run(f"resume={first.folder}", all_of_it, config_dir=STAND_IN)
    # so few steps are no training: networks need not have learnt anything
    assert whole.status == resumed.status == "done" and resumed.folder == first.folder
    assert resumed.metrics["test"] == whole.metrics["test"] and resumed.checks == whole.checks
    one, other = saved(whole), saved(resumed)
    for part in ("model", "optimizer", "ema", "task"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    for file in (whole.folder / "tables").glob("*.csv"):
        one, other = (sorted(table(r.folder, file.stem), key=str) for r in (whole, resumed))
        assert one == other, file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *(("mha_demo", setting) for setting in ("task.heads=[2,4]", "task.demo_heads=4", "data.slots=4")),
        *(
            ("rnn_fashion", f"model.{setting}")
            for setting in ("readout=last", "readout=mean", "init=identity")
        ),
        *(("rnn_fashion", setting) for setting in ("loop.clip_norm=null", "optimizer=adamw")),
        *((name, s) for name in ("mha_demo", "rnn_fashion") for s in ("precision=bfloat16", "loop.ema=0.9")),
        *(("mha_demo", setting) for setting in ("loop.eval_batches=1", "data.eval_batch_size=3")),
    ],
)
def test_other_settings_run_to_the_end(
    name: str, setting: str, small: Callable[..., Result], clean_process: None
) -> None:
    sizes = ("data.train_size=128", "data.val_size=16", "data.test_size=32") * (name == "mha_demo")
    result = small(name, *sizes, "debug=fast", setting)
    assert result.status == "done" and len(figures_of(result.folder)) == len(FIGURES[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("mha_demo", {"heads_2_learnt", "heads_2_needed"}),
        ("posenc_check", {"trained_absolute", "trained_rotary"}),
    ],
)
def test_networks_held_to_their_claims_too_early_end_the_run_and_are_named(
    name: str, failed: set[str], cli: Callable, last_run: Callable[[], Path]
) -> None:
    sizes = ("data.train_size=400", "data.val_size=100", "data.test_size=200")
    with figures_later():
        outcome = cli(*SIZES[name], *sizes, "debug=fast", "task.claims_from=1")
    assert outcome.status == 1, outcome.err
    words = (outcome.out + outcome.err).split("Checks failed: ")[1]
    summary = json.loads((last_run() / "summary.json").read_text())
    assert summary["status"] == "failed" and all(check in words for check in failed)
    assert {check["name"] for check in summary["checks"] if not check["passed"]} == failed
    assert {row["check"] for row in table(last_run(), "checks")} > failed  # all that was found is kept


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("posenc_check", "task.d_model=7", "d_model must be divisible by 2, got 7"),
        ("posenc_check", "task.d_model=258", "d_model must lie in [2, 256], got 258"),
        ("posenc_check", "task.length=0", "length must be at least 1"),
        ("posenc_check", "task.claims_from=0", "claims_from must be at least 1"),
        ("posenc_check", "task.formula_rows=65", "formula_rows must lie in [0, length = 64], got 65"),
        ("posenc_check", "data=lookups", "data must be sentences, the task that this experiment is about"),
        ("mha_demo", "task.heads=[]", "heads must be different numbers from 1 on, got []"),
        ("mha_demo", "task.heads=[2,2]", "heads must be different numbers from 1 on, got [2, 2]"),
        ("mha_demo", "task.heads=[0,1]", "heads must be different numbers from 1 on, got [0, 1]"),
        ("mha_demo", "task.heads=[3]", "heads must divide model.d_model=16, which 3 does not"),
        ("mha_demo", "model.d_model=0", "d_model must be at least 1"),
        ("mha_demo", "task.demo_heads=1", "demo_heads must be at least 2"),
        ("mha_demo", "task.demo_d_model=9", "demo_d_model must be divisible by demo_heads = 2, got 9"),
        ("mha_demo", "task.queries=10", "queries must be at least 500"),
        ("mha_demo", "data=sentences", "data must be lookups, the task that this experiment is about"),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, setting: str, words: str, clean_process: None) -> None:
    blamed = "task.data" if setting.startswith("data=") else setting
    with pytest.raises(UserError, match="^" + re.escape(f"{blamed}: {words}")):
        make_job(Command.parse([f"experiment={name}", setting]))
