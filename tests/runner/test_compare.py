"""Comparing runs: what differs is shown, what does not is left out, and a wrong path names the runs there are."""

from __future__ import annotations

import json
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
    folder: Path, config: dict[str, Any] | None = None, summary: dict[str, Any] | None = None, rows: str = ""
) -> Path:
    """A run's folder as the engine leaves it; with `rows` of metrics.csv as a kill leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(changed(BASE, config or {})))
    if rows:
        (folder / "metrics.csv").write_text(rows)
    else:
        (folder / "summary.json").write_text(json.dumps(changed(SUMMARY, summary or {})))
    return folder


def lines_of(text: str) -> dict[str, list[str]]:
    """The cells of each line of the tables, by the first, which may hold single spaces."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {name: cells for name, *cells in rows}


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", {"outputs": "there", "data.root": "elsewhere"})
    config = {"optimizer.lr": 0.3, "data.flip": 0.5, "optimizer.nesterov": True}
    summary = {"metrics.val.accuracy": 0.8125, "metrics.test.loss": 0.5, "seconds": 9.0}
    two = make_run(tmp_path / "two", config, summary | {"versions.torch": "2.15.0", "device": "cuda:0"})
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
    runs = [make_run(tmp_path / str(n), {"seed": n}, {"metrics.val.loss": n / 4}) for n in range(3)]
    text = compare(runs)
    found = lines_of(text)
    assert found["seed"] == ["0", "1", "2"] and found["loss/val"] == ["0.0000", "0.2500", "0.5000"]
    assert "−" not in text


def test_what_is_missing_or_not_finite_is_a_dash(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", {}, {"metrics.val.loss": None, "best": None, "error": "Oops\nmore"})
    two = make_run(tmp_path / "b", {}, {"metrics": {}})
    found = lines_of(compare([one, two]))
    assert found["loss/val"] == ["–", "–", "–"] and found["accuracy/val"] == ["0.7500", "–", "–"]
    assert found["error"] == ["Oops", "–"] and found["best epoch"] == ["–", "3"]


@pytest.mark.parametrize(
    ("config", "best"),
    [({}, "0.7500"), ({"direction": "minimize"}, "0.2500"), ({"objective": None}, "0.5000")],
)
def test_a_run_that_was_killed_is_compared_as_far_as_it_came(
    tmp_path: Path, config: dict[str, Any], best: str
) -> None:
    rows = [
        "step,epoch,split,accuracy,loss",
        "0,0.0,test,0.125,2.5",
        "0,0.0,val,nan,2.5",
        "4,1.0,val,0.75,1.5",
        "8,2.0,val,0.25,3.5",
        "12,3.0,val,0.5,",
        "16,4.0,val,0.9",  # which the kill cut short
    ]
    killed = make_run(tmp_path / "killed", config, rows="\n".join(rows))
    text = compare([make_run(tmp_path / "done"), killed])
    found = lines_of(text)
    assert found["accuracy/val"][1] == best and found["loss/test before"] == ["2.5000", "2.5000", "+0.0000"]
    assert found["accuracy/test"] == ["0.5000", "–", "–"]
    assert "not ended" in text.splitlines()[1] and "not ended" not in text.splitlines()[0]
    assert "seconds" not in found

    # one that has measured nothing yet
    waiting = make_run(tmp_path / "waiting")
    (waiting / "summary.json").unlink()
    assert lines_of(compare([killed, waiting]))["accuracy/val"] == [best, "–", "–"]

    # one that was tested after training alone
    tested = make_run(tmp_path / "tested", rows="step,epoch,split,loss\n4,1,test,0.5\n")
    assert lines_of(compare([killed, tested]))["loss/test"] == ["–", "0.5000", "–"]


def test_a_path_inside_a_run_stands_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", {"seed": 1})
    (one / "checkpoints").mkdir()
    (one / "checkpoints" / "best.pt").touch()
    whole = compare([one, two])
    assert "seconds" not in whole
    assert compare([one / "checkpoints" / "best.pt", two / "summary.json"]) == whole
    monkeypatch.chdir(tmp_path)
    assert lines_of(compare([Path("one/checkpoints"), Path("two")]))["seed"] == ["0", "1"]
    assert "The configs are equal." in compare([one, make_run(tmp_path / "three")])


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
    common = ("experiment=gallery", "threads=1", "loop.epochs=1")
    for lr in ("0.2", "0.0001"):
        done = cli(*common, f"optimizer.lr={lr}", f"outputs=lr{lr}", config_dir=GALLERY)
        assert done.status == 0
    folders = [next((tmp_path / f"lr{lr}" / "gallery").iterdir()) for lr in ("0.2", "0.0001")]
    found = lines_of(compare(folders))
    assert found["optimizer.lr"] == ["0.2", "0.0001"] and not any("outputs" in name for name in found)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    first, second = (summary["metrics"]["test"]["accuracy"] for summary in summaries)
    shown = [float(cell) for cell in found["accuracy/test"]]
    assert shown == pytest.approx([first, second, second - first], abs=5e-5)
