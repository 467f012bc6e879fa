"""Whole runs of the toys, from the command line and from Python."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runner import run as run_experiment
from runner.engine import checkpoint
from runner.engine.folders import make_run_folder
from runner.task import Run
from tests.runner.engine.helpers import assert_equal, parts, rows, summary, table, weights

VARIANTS = ("experiment=toy_variants", "threads=1", "loop.epochs=2")
GENERATIVE = ("experiment=toy_generative", "threads=1", "loop.epochs=2")
CHECKS = ("experiment=toy_checks", "threads=1")
BOTH = pytest.mark.parametrize("experiment", [VARIANTS, GENERATIVE], ids=["variants", "generative"])
FINISHED = {}  # results and folders of `finished`, by the overrides
pytestmark = pytest.mark.usefixtures("clean_process")


@pytest.fixture
def go(toys):
    """`go("experiment=toy_variants")`: from Python, with the toys."""
    return lambda *overrides: run_experiment(*overrides, config_dir=toys)


@pytest.fixture
def finished(go, tmp_path, tmp_path_factory):
    """`finished(GENERATIVE)`: the result of a run that is made once, with a folder of this test's own."""

    def call(overrides):
        if overrides not in FINISHED:
            result = go(*overrides)
            FINISHED[overrides] = result, shutil.move(result.folder, tmp_path_factory.mktemp("finished"))
        result, kept = FINISHED[overrides]
        return replace(result, folder=Path(shutil.copytree(kept, tmp_path / result.folder)))

    return call


@pytest.fixture
def typed(cli, toys):
    """`typed("experiment=toy_variants")`: from the command line, with the toys."""
    return lambda *overrides: cli(*overrides, config_dir=toys)


@pytest.fixture
def toy_module(toys, monkeypatch):
    """The module of the toys, for patches."""
    monkeypatch.syspath_prepend(str(toys))
    import toys as module

    return module


def saved(folder, name="best"):
    return folder / "checkpoints" / f"{name}.pt"


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# how a run ends


def test_checks_only(typed, last_run):
    done = typed(*CHECKS)
    assert done.status == 0 and "pass" in done.out and summary(last_run())["status"] == "done"
    (check,) = summary(last_run())["checks"]
    assert check["name"] == "norm" and check["passed"] and check["measured"] <= check["tolerance"] == 1e-10
    assert (last_run() / "tables" / "norm.csv").exists()
    row = {"check": "norm", "claim": "‖Qx‖ = ‖x‖", "measured": repr(check["measured"])}
    assert table(last_run() / "tables" / "checks.csv") == [row | {"tolerance": "≤ 1e-10", "result": "pass"}]


def test_failed_check_fails_the_run(typed, last_run):
    done = typed(*CHECKS, "task.error=0.1")
    assert done.status == 1 and "FAILED: Checks failed: norm." in done.out and "Traceback" not in done.err
    assert summary(last_run()).items() >= {"status": "failed", "error": "Checks failed: norm."}.items()
    assert (last_run() / "run.log").read_text(encoding="utf-8") == done.out
    assert typed(f"resume={last_run()}").status == 1, "what failed is not finished, and fails again"
    assert len(summary(last_run())["checks"]) == 1


@pytest.mark.parametrize(
    ("overrides", "bad", "noticed", "kept"),
    [
        (("task.blow_up_at=9", "loop.log_every=4"), 10, 12, 8),
        (("task.blow_up_at=9", "loop.log_every=100"), 10, 16, 8),
        (("task.blow_up_at=1", "loop.log_every=50", "loop.save_every=3"), 2, 3, 0),
    ],
    ids=["recording", "evaluating", "saving"],
)
def test_non_finite_loss_stops_the_run(typed, last_run, overrides, bad, noticed, kept):
    done = typed(*VARIANTS, *overrides)
    assert done.status == 1 and "Traceback" not in done.err
    assert f"stopped being a finite number at step {bad}." in done.out
    result, state = summary(last_run()), parts(last_run())
    assert result["status"] == "failed" and f"step {bad}." in result["error"]
    assert (result["steps"], state["step"]) == (noticed, kept)
    assert checkpoint.find_tensor(lambda t: ~torch.isfinite(t), state) is None
    assert all(int(row["step"]) < bad for row in rows(last_run())), "no metrics of a broken network"


def test_an_objective_that_is_not_measured_is_refused_before_there_is_a_folder(typed, tmp_path):
    without_val = (*GENERATIVE, "data.splits=[train,test]")
    refused = typed(*without_val)
    assert refused.status == 2 and "val split" in refused.err
    assert "try: " in refused.err and "objective=null" in refused.err.splitlines()[-1]
    impatient = typed(*without_val, "objective=null", "loop.patience=2")
    assert impatient.status == 2 and "objective=METRIC/val" in impatient.err
    assert not (tmp_path / "outputs").exists()
    assert typed(*without_val, "objective=null").status == 0


def test_runs_in_threads_and_folders_that_threads_make_at_once(go, tmp_path):
    """A notebook's or a server's thread may not set signal handlers; the run does without."""
    with ThreadPoolExecutor(6) as pool:
        assert pool.submit(go, *CHECKS).result().status == "done"
        folders = list(pool.map(lambda _: make_run_folder(tmp_path / "toy"), range(120)))
    assert sorted(folders) == sorted((tmp_path / "toy").iterdir()) and len(folders) == 120


# what a run measures


def test_each_variant_learns_and_has_its_own_metrics(finished):
    result = finished(VARIANTS)
    metrics = result.metrics
    assert result.status == "done" and result.best["metric"] == "accuracy.wide/val"
    for name in ("narrow", "wide"):
        assert metrics["test"][f"accuracy.{name}"] > 0.8 > metrics["before"]["test"][f"accuracy.{name}"]
        usual = {f"{metric}.{name}" for metric in ("loss", "accuracy", "precision", "recall", "f1")}
        assert all(usual <= set(metrics[split]) for split in ("train", "val", "test"))


def test_a_variant_alone_is_what_it_is_beside_another(go):
    """Bit for bit: the same weights to begin with, and no dropout, whose stream both would share."""
    common = (*VARIANTS, "model.dropout=0", "loop.clip_norm=0.3", "optimizer=adam", "objective=null")
    beside = go(*common)
    assert beside.best is None and not saved(beside.folder).exists()
    evaluated = go("mode=eval", f"checkpoint={saved(beside.folder, 'last')}")
    assert evaluated.metrics["test"] == beside.metrics["test"], "of the last step"
    for name in ("narrow", "wide"):
        alone = go(*common, f"task.names=[{name}]")
        assert list(parts(alone.folder)["model"]) == [name]
        for part in ("model", "optimizer"):
            assert_equal(*(parts(run.folder)[part][name] for run in (alone, beside)))
        assert alone.metrics["test"].items() <= beside.metrics["test"].items()


def test_a_task_with_an_evaluation_a_state_and_a_mode_of_its_own(finished, typed):
    result = finished(GENERATIVE)
    assert result.status == "done" and result.exit_status == 0
    assert set(result.metrics["test"]) == {"loss", "spread"} and "noise" in result.metrics["train"]
    assert parts(result.folder)["task"]["batches_seen"] == 16

    def sample(*overrides):
        assert typed("mode=sample", f"checkpoint={saved(result.folder)}", *overrides).status == 0
        found = table(max((result.folder / "eval").iterdir()) / "tables" / "samples.csv")
        return torch.tensor([[float(cell) for cell in row.values()] for row in found])

    # with the averaged weights
    network = type(result.model)(outputs=2).eval()
    for parameter, value in zip(network.parameters(), parts(result.folder, "best")["ema"][""], strict=True):
        parameter.data.copy_(value)
    points = torch.randn(5, 2, generator=Run.generator(SimpleNamespace(seed=0), "sample"))
    torch.testing.assert_close(sample(), network(points).detach())

    # in its mode the task's keys need no prefix, and the data are not read
    assert len(sample("n=3", "seed=7", "data.lost=true")) == 3
    for arguments, message in {
        ("mode=sample", "n=three"): "task.n=three",
        ("mode=eval", "n=3"): "task.n",
        ("mode=train", "n=3"): "mode",
        ("mode=eval", "data.lost=true"): "the blobs are lost",
        ("mode=samples",): "train, eval, sample.",
    }.items():
        refused = typed(*arguments, f"checkpoint={saved(result.folder)}")
        assert refused.status == 2 and message in refused.err


def test_the_seed_decides_all_from_python_and_from_the_command_line(finished, go, typed, last_run):
    result = finished(GENERATIVE)
    done = typed(*GENERATIVE)
    assert done.status == 0 and last_run() != result.folder
    assert re.search(r"\| val loss [\d.]+, spread [\d.]+ \|", done.out), "a metric of the task's own"
    assert_equal(weights(last_run()), weights(result.folder))
    assert summary(last_run())["metrics"]["test"] == result.metrics["test"]
    with pytest.raises(AssertionError):
        assert_equal(weights(go(*GENERATIVE, "seed=1").folder), weights(result.folder))


@BOTH
def test_evaluation_never_changes_the_run(go, experiment):
    """Evaluations at other steps, of fewer batches, other logging, other saving: equal weights, bit for bit."""
    base = (*experiment, "objective=null")
    plain = parts(go(*base).folder)
    for overrides in [
        ("loop.eval_every=3", "loop.log_every=1", "loop.save_every=2"),
        ("loop.eval_every=7", "loop.eval_batches=1", "data.eval_batch_size=17", "deterministic=true"),
    ]:
        evaluated = parts(go(*base, *overrides).folder)
        for part in ("model", "optimizer", "ema", "task"):
            assert_equal(evaluated[part], plain[part], f"{overrides} {part}")


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_before_sees_the_untrained_network_and_after_the_best(go, toy_module, monkeypatch, ema):
    """The best by accuracy comes before the last step here; averaged weights where there are any."""
    seen = {"before": [], "after": []}

    for name, parameters in seen.items():

        def hook(self, run, parameters=parameters):
            assert not run.networks["wide"].training
            parameters += [parameter.detach().clone() for parameter in run.networks["wide"].parameters()]

        monkeypatch.setattr(toy_module.Variants, name, hook)
    result = go(*VARIANTS, "loop.steps=16", "loop.eval_every=2", f"loop.ema={ema}")
    best = parts(result.folder, "best")
    assert best["step"] == result.best["step"] < 16
    expected = best["ema"]["wide"] if best["ema"] else list(best["model"]["wide"].values())
    assert_equal(seen["after"], expected)
    assert not any(map(torch.equal, seen["before"], seen["after"]))
    assert all(map(torch.equal, result.model["wide"].parameters(), expected)), "which the caller gets"


# evaluating a checkpoint


@BOTH
def test_eval_reproduces_the_test_metrics_exactly(finished, typed, tmp_path, monkeypatch, experiment):
    """From another folder, after the run was moved, from the checkpoint alone."""
    result = finished(experiment)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    shutil.move(saved(result.folder), tmp_path / "elsewhere" / "alone.pt")
    shutil.rmtree(tmp_path / "outputs")
    monkeypatch.chdir(tmp_path / "elsewhere" / "deep")
    assert typed("mode=eval", "checkpoint=../alone.pt").status == 0
    (folder,) = Path("outputs").glob("toy_*/eval/*")
    assert summary(folder)["metrics"]["test"] == result.metrics["test"] and summary(folder)["mode"] == "eval"


def test_eval_of_another_network_is_refused(finished, typed):
    run = finished(VARIANTS).folder
    for override, reason in (("task.wide=32", "size mismatch"), ("task.names=[other]", "'other'")):
        refused = typed("mode=eval", f"checkpoint={saved(run)}", override)
        assert refused.status == 2 and f"does not fit this network: {reason}" in refused.err
    assert not (run / "eval").exists()


# precision, compilation, debugging


def test_bfloat16_trains(finished, go):
    result, exact = go(*GENERATIVE, "precision=bfloat16"), finished(GENERATIVE)
    assert result.metrics["test"]["loss"] == pytest.approx(exact.metrics["test"]["loss"], rel=0.05)
    assert result.metrics["test"]["loss"] != exact.metrics["test"]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in weights(result.folder).values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("mode", ["true", "reduce-overhead"])
def test_compiled_run(go, mode):
    """The same network, up to the order of sums, under the same names."""
    common = (*VARIANTS, "task.names=[wide]", "model.dropout=0")
    one, other = (weights(go(*common, f"compile={compiled}").folder, "wide") for compiled in ("false", mode))
    torch.testing.assert_close(dict(one), dict(other), atol=1e-4, rtol=1e-5)


def test_debug_options_do_what_their_names_say(go):
    """A few steps; one batch, until it is known by heart; a trace of ten steps."""
    common = ("experiment=toy_variants", "threads=1", "model.dropout=0", "data.noise=0")
    assert summary(go(*common, "debug=fast").folder)["steps"] == 10

    overfit = go(*common, "debug=overfit").metrics["train"]
    assert overfit["loss.wide"] < 0.02 and overfit["accuracy.wide"] == 1

    trace = json.loads((go(*common, "debug=profile").folder / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {name for name in names if "Step#" in name} == {f"ProfilerStep#{n}" for n in range(5, 15)}
    assert any("addmm" in name for name in names)


# memory


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("toys.Blobs.load", "loading the data; try fewer or smaller samples"),
        ("runner.data.Split.to", "loading the data; try fewer or smaller samples"),
        ("toys.Generative.build", "building the network; try a smaller model"),
        ("torch.nn.Module.to", "building the network; try a smaller model"),
        ("runner.engine.state.Ema.__init__", "building the network; .*loop.ema=null"),
        ("toys.Generative.train", "at data.batch_size=16; try data.batch_size=8"),
    ],
)
def test_a_lack_of_memory_is_reported_before_there_is_a_folder(
    typed, toy_module, tmp_path, monkeypatch, place, remedy
):
    monkeypatch.setattr(place, out_of_memory)
    monkeypatch.delattr("toys.Generative.eval")  # the objective is then looked for in one batch
    refused = typed(*GENERATIVE)
    assert refused.status == 2 and "Traceback" not in refused.err
    assert re.search(f"^error: out of memory {remedy}", refused.err), refused.err
    assert not (tmp_path / "outputs").exists()


def test_a_lack_of_memory_while_resuming_changes_nothing(go, typed, monkeypatch):
    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    folder = go(*GENERATIVE, "optimizer=adam").folder
    before = contents()
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", out_of_memory)
    refused = typed(f"resume={folder}", "loop.epochs=5")
    assert refused.status == 2 and "out of memory building the network; try" in refused.err
    assert "optimizer=sgd" in refused.err and contents() == before


def test_a_lack_of_memory_after_the_folder_is_made_fails_the_run(typed, toy_module, last_run, monkeypatch):
    monkeypatch.setattr("runner.device.Compute.matmul_rate", out_of_memory)
    monkeypatch.setattr(toy_module.Generative, "flops_per_sample", 1.0)
    failed = typed(*GENERATIVE)
    assert failed.status == 1 and "Traceback" not in failed.err
    assert summary(last_run())["status"] == "failed" and parts(last_run())["step"] == 0
    assert summary(last_run())["error"].startswith("out of memory measuring matrix products; try")
