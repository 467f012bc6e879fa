"""Whole runs of the toys, through the door and from Python."""

from __future__ import annotations

import csv
import json
import multiprocessing
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runner import run as run_experiment
from runner.engine import checkpoint
from runner.engine.folders import make_run_folder
from runner.engine.job import Result
from runner.errors import UserError
from runner.task import Run

VARIANTS = ("experiment=toy_variants", "threads=1", "loop.epochs=2")
GENERATIVE = ("experiment=toy_generative", "threads=1", "loop.epochs=2")
pytestmark = pytest.mark.usefixtures("clean_process")


@pytest.fixture
def go(toys):
    """`go("experiment=toy_variants")`: from Python, with the toys."""
    return lambda *overrides: run_experiment(*overrides, config_dir=toys)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def weights(folder: Path, variant: str = "") -> dict[str, Tensor]:
    return last(folder)["model"][variant]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_checks_only(cli, toys, last_run):
    done = cli("experiment=toy_checks", "threads=1", config_dir=toys)
    assert done.status == 0 and "pass" in done.out
    found = summary(last_run())
    assert found["status"] == "done"
    (check,) = found["checks"]
    assert check["name"] == "norm" and check["passed"] and check["measured"] <= check["tolerance"] == 1e-10
    assert (last_run() / "tables" / "norm.csv").exists()
    header, row = csv.reader((last_run() / "tables" / "checks.csv").read_text(encoding="utf-8").splitlines())
    assert header == ["check", "claim", "measured", "tolerance", "result"]
    assert row == ["norm", "‖Qx‖ = ‖x‖", repr(check["measured"]), "≤ 1e-10", "pass"]


def test_failed_check_fails_the_run(cli, toys, last_run):
    done = cli("experiment=toy_checks", "threads=1", "task.error=0.1", config_dir=toys)
    assert done.status == 1
    assert "FAIL" in done.out and "Traceback" not in done.err
    found = summary(last_run())
    assert found["status"] == "failed" and found["error"] == "Checks failed: norm."
    again = cli(f"resume={last_run()}", config_dir=toys)
    assert again.status == 1, "what failed is not finished, and fails again"
    assert len(summary(last_run())["checks"]) == 1


def test_crash_is_a_traceback_and_a_failed_run(go, last_run):
    with pytest.raises(RuntimeError, match="crashed on purpose"):
        go("experiment=toy_checks", "threads=1", "task.crash=true")
    assert summary(last_run())["status"] == "failed"
    assert summary(last_run())["error"] == "RuntimeError: crashed on purpose"
    assert "in before" in (last_run() / "run.log").read_text()


def test_variants(cli, toys, last_run):
    assert cli(*VARIANTS, config_dir=toys).status == 0
    found = summary(last_run())
    assert found["status"] == "done" and found["steps"] == 16
    for name in ("narrow", "wide"):
        after, before = found["metrics"]["test"], found["metrics"]["before"]["test"]
        assert after[f"accuracy.{name}"] > 0.8 > before[f"accuracy.{name}"]
        for split in ("train", "val", "test"):
            assert {
                f"{metric}.{name}" for metric in ("loss", "accuracy", "precision", "recall", "f1")
            } <= set(found["metrics"][split])
    assert found["best"]["metric"] == "accuracy.wide/val"
    vals = {
        int(row["step"]): float(row["accuracy.wide"]) for row in rows(last_run()) if row["split"] == "val"
    }
    assert found["best"]["value"] == max(vals.values()) == vals[found["best"]["step"]]


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_a_variant_alone_is_what_it_is_beside_another(go, name):
    """Bit for bit: the same weights to begin with, and no dropout, whose stream both would share."""
    objective = f"objective=accuracy.{name}/val"
    common = (*VARIANTS, "model.dropout=0", "loop.clip_norm=0.3", "optimizer=adam", "optimizer.lr=0.05")
    beside = go(*common, objective)
    alone = go(*common, objective, f"task.names=[{name}]")
    assert list(last(alone.folder)["model"]) == [name]
    assert same(weights(alone.folder, name), weights(beside.folder, name))
    one, other = last(alone.folder)["optimizer"][name], last(beside.folder)["optimizer"][name]
    assert str(one) == str(other)
    assert alone.metrics["test"].items() <= beside.metrics["test"].items()


def test_generative(go, cli, toys):
    result = go(*GENERATIVE)
    assert result.status == "done" and result.exit_status == 0
    assert set(result.metrics["test"]) == {"loss", "spread"}, "its own evaluation"
    assert "noise" in result.metrics["train"]
    assert last(result.folder)["task"]["batches_seen"] == 16
    assert isinstance(result.model, torch.nn.Module)

    saved = result.folder / "checkpoints" / "best.pt"
    assert cli("mode=sample", f"checkpoint={saved}", config_dir=toys).status == 0
    (look,) = (result.folder / "eval").iterdir()
    with (look / "tables" / "samples.csv").open(newline="") as file:
        found = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    averaged = checkpoint.load(saved)["ema"][""]
    network = type(result.model)(outputs=2).eval()
    for parameter, value in zip(network.parameters(), averaged, strict=True):
        parameter.data.copy_(value)
    points = torch.randn(5, 2, generator=Run.generator(_Seed(0), "sample"))
    assert torch.allclose(torch.tensor(found), network(points).detach()), "with the averaged weights"

    refused = cli("mode=samples", f"checkpoint={saved}", config_dir=toys)
    assert refused.status == 2
    assert "mode=sample? Available: train, eval, sample." in refused.err


def test_in_a_mode_of_the_task_its_keys_may_stand_bare(go, cli, toys):
    result = go(*GENERATIVE)
    saved = result.folder / "checkpoints" / "last.pt"
    assert cli("mode=sample", f"checkpoint={saved}", "n=3", "seed=7", config_dir=toys).status == 0
    (look,) = (result.folder / "eval").iterdir()
    assert len((look / "tables" / "samples.csv").read_text().splitlines()) == 1 + 3

    refused = cli("mode=sample", f"checkpoint={saved}", "n=three", config_dir=toys)
    assert refused.status == 2 and "task.n=three" in refused.err
    for mode in ("eval", "train"):  # there every key has its whole name
        refused = cli(f"mode={mode}", f"checkpoint={saved}", "n=3", config_dir=toys)
        assert refused.status == 2
    refused = cli("mode=eval", f"checkpoint={saved}", "n=3", config_dir=toys)
    assert "Did you mean task.n?" in refused.err


def test_a_mode_without_data_reads_none(go, cli, toys):
    saved = go(*GENERATIVE).folder / "checkpoints" / "last.pt"
    assert cli("mode=sample", f"checkpoint={saved}", "data.lost=true", config_dir=toys).status == 0
    refused = cli("mode=eval", f"checkpoint={saved}", "data.lost=true", config_dir=toys)
    assert refused.status == 2 and "the blobs are lost" in refused.err


@pytest.mark.parametrize("experiment", [VARIANTS, GENERATIVE], ids=["variants", "generative"])
def test_without_val_the_objective_is_refused_before_there_is_a_folder(cli, toys, tmp_path, experiment):
    refused = cli(*experiment, "data.splits=[train,test]", config_dir=toys)
    assert refused.status == 2 and "needs a val split" in refused.err and "try: " in refused.err
    assert "objective=null" in refused.err.splitlines()[-1] and not (tmp_path / "outputs").exists()
    assert cli(*experiment, "data.splits=[train,test]", "objective=null", config_dir=toys).status == 0


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class _Seed:
    """Stands for a run of which the seed alone is asked."""

    def __init__(self, seed: int):
        self.seed = seed


def test_from_python_and_through_the_door_are_one(go, cli, toys, last_run):
    result = go(*GENERATIVE)
    assert cli(*GENERATIVE, config_dir=toys).status == 0
    assert last_run() != result.folder
    assert same(weights(last_run()), weights(result.folder))
    assert summary(last_run())["metrics"]["test"] == result.metrics["test"]


@pytest.mark.parametrize("experiment", [VARIANTS, GENERATIVE], ids=["variants", "generative"])
def test_looking_never_changes_the_run(go, experiment):
    """Evaluations at other steps, of fewer batches, other logging, other saving: equal weights, bit for bit."""
    base = (*experiment, "objective=null")
    plain = go(*base)
    looks = [
        ("loop.eval_every=3",),
        ("loop.eval_every=7", "loop.eval_batches=1", "data.eval_batch_size=17"),
        ("loop.log_every=1", "loop.save_every=2"),
        ("loop.log_every=5", "deterministic=true"),
    ]
    for overrides in looks:
        looked = go(*base, *overrides)
        parts = [last(folder) for folder in (plain.folder, looked.folder)]
        for part in ("model", "optimizer", "ema", "task"):
            assert repr(parts[0][part]) == repr(parts[1][part]), (overrides, part)
            assert _bits(parts[0][part]) == _bits(parts[1][part]), (overrides, part)


def _bits(state: Any) -> list[bytes]:
    return [tensor.numpy().tobytes() for _, tensor in checkpoint._tensors(state)]


def test_the_seed_decides_all(go):
    one, again, other = go(*VARIANTS), go(*VARIANTS), go(*VARIANTS, "seed=1")
    assert same(weights(one.folder, "wide"), weights(again.folder, "wide"))
    assert one.metrics["test"] == again.metrics["test"]
    assert not same(weights(one.folder, "wide"), weights(other.folder, "wide"))


@pytest.mark.parametrize("experiment", [VARIANTS, GENERATIVE], ids=["variants", "generative"])
def test_eval_reproduces_the_test_metrics_exactly(go, cli, toys, tmp_path, monkeypatch, experiment):
    """From another folder, after the run was moved, from the checkpoint alone."""
    result = go(*experiment)
    recorded = summary(result.folder)["metrics"]["test"]
    look = cli("mode=eval", f"checkpoint={result.folder / 'checkpoints' / 'best.pt'}", config_dir=toys)
    assert look.status == 0
    (folder,) = (result.folder / "eval").iterdir()
    assert summary(folder)["metrics"]["test"] == recorded
    assert summary(folder)["mode"] == "eval"

    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    saved = tmp_path / "elsewhere" / "alone.pt"
    shutil.copy(result.folder / "checkpoints" / "best.pt", saved)
    shutil.rmtree(tmp_path / "outputs")
    monkeypatch.chdir(tmp_path / "elsewhere" / "deep")
    assert cli("mode=eval", "checkpoint=../alone.pt", config_dir=toys).status == 0
    (folder,) = Path("outputs").glob("toy_*/eval/*")
    assert summary(folder)["metrics"]["test"] == recorded


def test_eval_of_a_run_without_objective_is_of_its_last_step(go):
    result = go(*VARIANTS, "objective=null")
    assert result.best is None
    assert not (result.folder / "checkpoints" / "best.pt").exists()
    look = go("mode=eval", f"checkpoint={result.folder / 'checkpoints' / 'last.pt'}")
    assert look.metrics["test"] == result.metrics["test"]


def test_eval_of_another_network_is_told(cli, go, toys):
    saved = go(*VARIANTS).folder / "checkpoints" / "best.pt"
    told = cli("mode=eval", f"checkpoint={saved}", "task.wide=32", config_dir=toys)
    assert told.status == 2 and "does not fit this network: size mismatch" in told.err
    assert not (saved.parent.parent / "eval").exists()
    told = cli("mode=eval", f"checkpoint={saved}", "task.names=[other]", config_dir=toys)
    assert told.status == 2 and "does not fit this network" in told.err


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_non_finite_loss_stops_the_run(cli, toys, last_run, log_every):
    done = cli(*VARIANTS, "task.blow_up_at=9", f"loop.log_every={log_every}", config_dir=toys)
    assert done.status == 1 and "Traceback" not in done.err
    assert "stopped being a finite number at step 10." in done.out
    found = summary(last_run())
    assert found["status"] == "failed" and "step 10." in found["error"]
    assert found["steps"] == {1: 10, 4: 12, 100: 16}[log_every], "at the next reading"
    parts = last(last_run())
    assert parts["step"] == 8
    assert checkpoint.find_tensor(lambda t: ~torch.isfinite(t), parts) is None
    assert all(int(row["step"]) < 10 for row in rows(last_run())), "no reading of a broken network is kept"


def test_non_finite_found_when_saving(cli, toys, last_run):
    done = cli(*VARIANTS, "task.blow_up_at=1", "loop.save_every=3", "loop.log_every=50", config_dir=toys)
    assert done.status == 1
    assert summary(last_run())["steps"] == 3 and last(last_run())["step"] == 0


def test_non_finite_gradient_of_a_finite_loss(go, toys, monkeypatch):
    """√x at 0 is 0, its slope is not."""
    monkeypatch.syspath_prepend(str(toys))
    import toys as module

    true_judge = module.Variants.judge

    def judge(self: Any, logits: Tensor, batch: Any) -> Any:
        output = true_judge(self, logits, batch)
        if torch.is_grad_enabled() and self.run.step == 5:
            output.loss = output.loss + (logits.sum() * 0).abs().sqrt()
        return output

    monkeypatch.setattr(sys.modules["toys"].Variants, "judge", judge)
    result = go(*VARIANTS)
    assert result.status == "failed" and result.exit_status == 1
    assert "at step 6." in str(result.error)


def test_bfloat16_trains(go):
    result = go(*GENERATIVE, "precision=bfloat16")
    exact = go(*GENERATIVE)
    assert result.metrics["test"]["loss"] == pytest.approx(exact.metrics["test"]["loss"], rel=0.05)
    assert not same(weights(result.folder), weights(exact.folder))
    assert all(tensor.dtype == torch.float32 for tensor in weights(result.folder).values())


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("mode", ["true", "reduce-overhead"])
def test_compiled_run(go, mode):
    """The same network, up to the order of sums, under the same names."""
    plain = go(*VARIANTS, "task.names=[wide]", "model.dropout=0")
    compiled = go(*VARIANTS, "task.names=[wide]", "model.dropout=0", f"compile={mode}")
    one, other = weights(plain.folder, "wide"), weights(compiled.folder, "wide")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_debug_fast(go):
    result = go("experiment=toy_variants", "threads=1", "debug=fast")
    assert result.status == "done" and summary(result.folder)["steps"] == 10


def test_debug_overfit(go):
    """One batch, until it is known by heart."""
    result = go("experiment=toy_variants", "threads=1", "debug=overfit", "model.dropout=0", "data.noise=0")
    assert result.metrics["train"]["loss.wide"] < 0.02
    assert result.metrics["train"]["accuracy.wide"] == 1


def test_debug_profile(go):
    result = go("experiment=toy_variants", "threads=1", "debug=profile")
    trace = json.loads((result.folder / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{n}" for n in range(5, 15)}
    assert any("addmm" in name for name in names)


def test_patience_needs_an_objective(cli, toys, tmp_path):
    told = cli(*VARIANTS, "objective=null", "loop.patience=2", config_dir=toys)
    assert told.status == 2 and "set objective=METRIC/val" in told.err
    assert not (tmp_path / "outputs").exists()


def test_patience_ends_a_run(go):
    result = go(*VARIANTS, "loop.epochs=100", "optimizer.lr=1e-12", "loop.patience=2")
    assert result.status == "done"
    assert summary(result.folder)["steps"] == 16 + result.best["step"]


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_before_sees_the_untrained_network_and_after_the_best(go, toys, monkeypatch, ema):
    """The best by accuracy comes before the last step here; averaged weights where there are any."""
    monkeypatch.syspath_prepend(str(toys))
    import toys as module

    seen: dict[str, list[Tensor]] = {}

    def spy(name: str) -> Any:
        def hook(self: Any, run: Any) -> None:
            assert not run.networks["wide"].training
            seen[name] = [parameter.detach().clone() for parameter in run.networks["wide"].parameters()]

        return hook

    monkeypatch.setattr(module.Variants, "before", spy("before"))
    monkeypatch.setattr(module.Variants, "after", spy("after"))
    result = go(*VARIANTS, "loop.steps=16", "loop.eval_every=2", f"loop.ema={ema}")
    best = checkpoint.load(result.folder / "checkpoints" / "best.pt")
    assert best["step"] == result.best["step"] < 16
    wanted = best["ema"]["wide"] if best["ema"] else list(best["model"]["wide"].values())
    assert all(map(torch.equal, seen["after"], wanted))
    assert not any(map(torch.equal, seen["before"], seen["after"]))
    assert all(map(torch.equal, result.model["wide"].parameters(), wanted)), "which is what the caller gets"


def _claim(parent: Path, count: int, queue: Any) -> None:
    queue.put([make_run_folder(parent) for _ in range(count)])


def test_folders_are_claimed_without_a_race(tmp_path):
    """Threads and processes that ask in the same second."""
    processes = multiprocessing.get_context("fork")
    queue = processes.Queue()
    workers = [processes.Process(target=_claim, args=(tmp_path / "toy", 20, queue)) for _ in range(3)]
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.extend(make_run_folder(tmp_path / "toy") for _ in range(20)))
        for _ in range(3)
    ]
    for one in (*workers, *threads):
        one.start()
    for _ in workers:
        found += queue.get(timeout=60)
    for one in (*workers, *threads):
        one.join()
    assert len(found) == len(set(found)) == 120
    assert sorted(found) == sorted((tmp_path / "toy").iterdir())


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make a folder in"):
        make_run_folder(tmp_path / "file" / "toy")


def test_run_outside_the_main_thread(go):
    """A notebook's or a server's thread may not take signals; the run does without."""
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(go("experiment=toy_checks", "threads=1")))
    thread.start()
    thread.join()
    assert found[0].status == "done"


def test_signal_handlers_are_given_back(go):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    go("experiment=toy_checks", "threads=1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("toys.Blobs.load", "loading the data; try fewer or smaller samples"),
        ("runner.data.Split.to", "loading the data; try fewer or smaller samples"),
        ("toys.Generative.build", "building the network; try a smaller model"),
        ("torch.nn.Module.to", "building the network; try a smaller model"),
        ("runner.engine.state.Ema.__init__", "building the network; .*loop.ema=null"),
        ("toys.Generative.train", "at data.eval_batch_size=50; try data.eval_batch_size=25"),
    ],
)
def test_a_lack_of_memory_is_reported_before_there_is_a_folder(
    cli, toys, tmp_path, monkeypatch, place, remedy
):
    cli("experiment=toy_nothing", config_dir=toys)  # the toys are imported
    monkeypatch.setattr(place, out_of_memory)
    monkeypatch.delattr("toys.Generative.eval")  # the objective is then looked for in one batch
    refused = cli(*GENERATIVE, config_dir=toys)
    assert refused.status == 2 and "Traceback" not in refused.err
    assert re.search(f"^error: out of memory {remedy}", refused.err), refused.err
    assert not (tmp_path / "outputs" / "toy_generative").exists()


def test_a_lack_of_memory_while_resuming_changes_nothing(go, cli, toys, monkeypatch):
    folder = go(*GENERATIVE, "optimizer=adam").folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", out_of_memory)
    refused = cli(f"resume={folder}", "loop.epochs=5", config_dir=toys)
    assert refused.status == 2 and "out of memory building the network; try" in refused.err
    assert "optimizer=sgd" in refused.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_lack_of_memory_after_the_folder_is_made_fails_the_run(cli, toys, last_run, monkeypatch):
    cli("experiment=toy_nothing", config_dir=toys)
    monkeypatch.setattr("runner.device.Compute.matmul_rate", out_of_memory)
    monkeypatch.setattr("toys.Generative.flops_per_sample", 1.0)
    failed = cli(*GENERATIVE, config_dir=toys)
    assert failed.status == 1 and "Traceback" not in failed.err
    assert summary(last_run())["status"] == "failed" and last(last_run())["step"] == 0
    assert summary(last_run())["error"].startswith("out of memory measuring matrix products; try")
