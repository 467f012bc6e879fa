"""Comparing runs: what differs is shown, what does not is left out, and a wrong path names the runs there are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.compare import compare
from runner.errors import UserError
from tests.conftest import Outcome

GALLERY = Path(__file__).parent / "gallery"
BASE: dict[str, Any] = {
    "name": "toy",
    "seed": 0,
    "objective": "accuracy/val",
    "direction": "maximize",
    "mode": "train",
    "outputs": "outputs",
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "data": {"root": "here", "flip": None},
}
SUMMARY: dict[str, Any] = {
    "status": "done",
    "error": None,
    "metrics": {
        "train": {"loss": 0.1, "grad_norm": 2.0},
        "val": {"loss": 0.5, "accuracy": 0.75},
        "test": {"loss": 0.625, "accuracy": 0.5},
        "before": {"test": {"loss": 2.5}},
    },
    "best": {"epoch": 3.0},
    "steps": 12,
    "seconds": 4.5,
    "parameters": {"network": 10},
    "device": "cpu (1 thread), float32",
    "data": {"name": "Toy", "digest": "ab" * 32},
    "git": "abc",
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
}


def changed(node: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy with dotted keys set."""
    copy = json.loads(json.dumps(node))
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = copy
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return copy


def make_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    ended: bool = True,
) -> Path:
    """A run's folder as the engine leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(
        yaml.safe_dump(changed(BASE, config or {}), sort_keys=False)
    )
    if ended:
        (folder / "summary.json").write_text(json.dumps(changed(SUMMARY, summary or {})))
    return folder


def lines_of(text: str) -> dict[str, list[str]]:
    """The cells of each line of the tables, by the first, which may hold single spaces."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {name: cells for name, *cells in rows}


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", {"outputs": "there", "data.root": "elsewhere"})
    two = make_run(
        tmp_path / "two",
        {"optimizer.lr": 0.3, "data.flip": 0.5, "optimizer.nesterov": True},
        {
            "metrics.val.accuracy": 0.8125,
            "metrics.test.loss": 0.5,
            "seconds": 9.0,
            "versions.torch": "2.15.0",
            "device": "cuda:0",
        },
    )
    text = compare([one, two])
    found = lines_of(text)
    assert found["optimizer.lr"] == ["0.1", "0.3"]
    assert found["data.flip"] == ["null", "0.5"] and found["optimizer.nesterov"] == ["–", "true"]
    assert found["accuracy/val"] == ["0.7500", "0.8125", "+0.0625"]
    assert found["loss/test"] == ["0.6250", "0.5000", "-0.1250"]
    assert found["loss/test before"] == ["2.5000", "2.5000", "+0.0000"]
    assert found["seconds"] == ["4.5", "9"] and found["torch"] == ["2.14.1", "2.15.0"]
    assert found["device"] == ["cpu (1 thread), float32", "cuda:0"]
    left_out = {"seed", "outputs", "data.root", "optimizer._target_", "python", "git", "status", "steps"}
    assert not left_out & set(found) and "grad_norm" not in text
    assert "B − A" in text and f"toy, done: {two}" in text
    swapped = lines_of(compare([two, one]))
    assert swapped["optimizer.lr"] == ["0.3", "0.1"] and swapped["accuracy/val"][2] == "-0.0625"


def test_three_runs_have_a_column_each_and_no_difference(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / str(seed), {"seed": seed}, {"metrics.val.loss": seed / 4}) for seed in range(3)
    ]
    text = compare(runs)
    found = lines_of(text)
    assert found["seed"] == ["0", "1", "2"] and found["loss/val"] == ["0.0000", "0.2500", "0.5000"]
    assert "−" not in text


def test_equal_runs_say_so(tmp_path: Path) -> None:
    text = compare([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    assert "The configs are equal." in text and "seconds" not in text


def test_what_is_missing_or_not_finite_is_a_dash(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", {}, {"metrics.val.loss": None, "best": None, "error": "Oops\nmore"})
    two = make_run(tmp_path / "b", {}, {"metrics": {}})
    found = lines_of(compare([one, two]))
    assert found["loss/val"] == ["–", "–", "–"] and found["accuracy/val"] == ["0.7500", "–", "–"]
    assert found["error"] == ["Oops", "–"] and found["best epoch"] == ["–", "3"]


@pytest.mark.parametrize(("direction", "best"), [("maximize", "0.7500"), ("minimize", "0.2500")])
def test_a_run_that_was_killed_is_compared_as_far_as_it_came(
    tmp_path: Path, direction: str, best: str
) -> None:
    killed = make_run(tmp_path / "killed", {"direction": direction}, ended=False)
    rows = [
        "step,epoch,split,accuracy,loss",
        "0,0.0,test,0.125,2.5",
        "0,0.0,val,nan,2.5",
        "4,1.0,val,0.75,1.5",
        "8,2.0,val,0.25,3.5",
        "12,3.0,val,0.5,",
        "16,4.0,val,0.9",  # which the kill cut short
    ]
    (killed / "metrics.csv").write_text("\n".join(rows))
    text = compare([make_run(tmp_path / "done"), killed])
    found = lines_of(text)
    assert found["accuracy/val"][1] == best and found["loss/test before"] == ["2.5000", "2.5000", "+0.0000"]
    assert found["accuracy/test"] == ["0.5000", "–", "–"]
    assert "not ended" in text.splitlines()[1] and "not ended" not in text.splitlines()[0]
    assert "seconds" not in found


def test_a_run_without_an_objective_gives_its_last_evaluation(tmp_path: Path) -> None:
    killed = make_run(tmp_path / "killed", {"objective": None}, ended=False)
    (killed / "metrics.csv").write_text("step,epoch,split,loss\n0,0,val,1\n4,1,val,3\n8,2,val,2\n")
    waiting = make_run(tmp_path / "waiting", ended=False)
    assert lines_of(compare([killed, waiting]))["loss/val"] == ["2.0000", "–", "–"]


def test_a_path_inside_a_run_stands_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", {"seed": 1})
    (one / "checkpoints").mkdir()
    (one / "checkpoints" / "best.pt").touch()
    whole = compare([one, two])
    assert compare([one / "checkpoints" / "best.pt", two / "summary.json"]) == whole
    monkeypatch.chdir(tmp_path)
    assert lines_of(compare([Path("one/checkpoints"), Path("two")]))["seed"] == ["0", "1"]


def test_a_wrong_path_names_the_runs_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = Path("outputs")
    run = make_run(outputs / "toy" / "2026-01-01_00-00-00")
    job = make_run(outputs / "toy" / "sweeps" / "2026-01-02_00-00-00" / "0_seed=1")
    for wrong, told in [
        ("outputs/toy", [str(run), str(job), "holds no .hydra/config.yaml"]),
        ("outputs", [str(run), str(job)]),
        ("outputs/toy/2026-01-01_00-00-01", [str(run), "does not exist"]),
        ("outputs/tyo/2026-01-01_00-00-00", [str(run)]),
        (f"{job.parent}", [str(job)]),
        (f"{run}/checkpoints/bets.pt", ["does not exist", str(run)]),
        ("nowhere", ["does not exist"]),
    ]:
        with pytest.raises(UserError) as error:
            compare([Path(wrong), run])
        assert wrong in str(error.value) and all(text in str(error.value) for text in told), error.value
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="There are no runs in"):
        compare([empty, run])


def test_the_same_run_twice_and_one_run_alone_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="expected different runs"):
        compare([run, run / "summary.json"])
    with pytest.raises(UserError, match=r"runs=\[A,B\]"):
        compare([run])
    other = make_run(tmp_path / "other")
    (other / "summary.json").write_text('{"status": "do')
    with pytest.raises(UserError, match=r"summary\.json cannot be read"):
        compare([run, other])


def test_two_real_runs(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """What the engine writes is what is read here."""
    for lr in ("0.2", "0.0001"):
        arguments = (
            "experiment=gallery",
            "threads=1",
            "loop.epochs=1",
            f"optimizer.lr={lr}",
            f"outputs=lr{lr}",
        )
        assert cli(*arguments, config_dir=GALLERY).status == 0
    folders = [next((tmp_path / f"lr{lr}" / "gallery").iterdir()) for lr in ("0.2", "0.0001")]
    found = lines_of(compare(folders))
    assert found["optimizer.lr"] == ["0.2", "0.0001"] and not any("outputs" in name for name in found)
    tests = [
        json.loads((folder / "summary.json").read_text())["metrics"]["test"]["accuracy"] for folder in folders
    ]
    shown = [float(cell) for cell in found["accuracy/test"]]
    assert all(
        math.isclose(a, b, abs_tol=5e-5) for a, b in zip(shown, [*tests, tests[1] - tests[0]], strict=True)
    )
