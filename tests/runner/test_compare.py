"""Comparing runs: what differs is shown, what does not is left out, and a wrong path names the runs there are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from runner.compare import compare
from runner.errors import UserError
from tests.conftest import TOYS, Outcome

BASE = """
{name: toy, seed: 0, objective: accuracy/val, direction: maximize, mode: train, outputs: outputs,
 optimizer: {_target_: torch.optim.SGD, lr: 0.1}, data: {root: here, flip: null}}
"""
SUMMARY = """
{status: done, error: null, best: {epoch: 3.0}, steps: 12, seconds: 4.5, parameters: {network: 10}, git: abc,
 metrics: {train: {loss: 0.1, grad_norm: 2.0}, val: {loss: 0.5, accuracy: 0.75},
           test: {loss: 0.625, accuracy: 0.5}, before: {test: {loss: 2.5}}},
 device: "cpu (1 thread), float32", data: {name: Toy, digest: abababababababab},
 versions: {python: 3.11.7, torch: 2.14.1}}
"""


def changed(content: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the content with dotted keys set."""
    node = OmegaConf.create(yaml.safe_load(content))
    for key, value in changes.items():
        OmegaConf.update(node, key, value, merge=False)
    return OmegaConf.to_container(node)


def make_run(folder: Path, config: Any = None, summary: Any = None, rows: str = "") -> Path:
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
    summary |= {"git": {"runner": {"repository": "there", "commit": "abd+changes"}, "folder": None}}
    two = make_run(tmp_path / "two", config, summary | {"versions.torch": "2.15.0", "device": "cuda:0"})
    text = compare([one, two])
    found, expected = lines_of(text), {
        "optimizer.lr": ["0.1", "0.3"],
        "data.flip": ["null", "0.5"],
        "optimizer.nesterov": ["–", "true"],
        "accuracy/val": ["0.7500", "0.8125", "+0.0625"],
        "loss/test": ["0.6250", "0.5000", "-0.1250"],
        "loss/test before": ["2.5000", "2.5000", "+0.0000"],
        "seconds": ["4.5", "9"],
        "torch": ["2.14.1", "2.15.0"],
        "device": ["cpu (1 thread), float32", "cuda:0"],
        "git runner": ["abc", "abd+changes"],  # the first as older versions wrote it
    }  # fmt: skip
    assert found.items() >= expected.items()
    left_out = {
        "seed",
        "outputs",
        "data.root",
        "optimizer._target_",
        "python",
        "git folder",
        "status",
        "steps",
    }
    assert not left_out & set(found) and "grad_norm" not in text
    assert "B − A" in text and f"toy, done: {two}" in text
    swapped = lines_of(compare([two, one]))
    assert swapped["optimizer.lr"] == ["0.3", "0.1"] and swapped["accuracy/val"][2] == "-0.0625"


def test_three_runs_have_a_column_each_and_no_difference(tmp_path: Path) -> None:
    text = compare([make_run(tmp_path / f"{n}", {"seed": n}, {"metrics.val.loss": n / 4}) for n in range(3)])
    expected = {"seed": ["0", "1", "2"], "loss/val": ["0.0000", "0.2500", "0.5000"]}
    assert lines_of(text).items() >= expected.items() and "−" not in text


def test_what_is_missing_or_not_finite_is_a_dash(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", {}, {"metrics.val.loss": None, "best": None, "error": "Oops\nmore"})
    two = make_run(tmp_path / "b", {}, {"metrics": {}})
    expected = {"loss/val": ["–", "–", "–"], "accuracy/val": ["0.7500", "–", "–"]}
    expected |= {"error": ["Oops", "–"], "best epoch": ["–", "3"]}
    assert lines_of(compare([one, two])).items() >= expected.items()


@pytest.mark.parametrize(
    ("config", "best"),
    [({}, "0.7500"), ({"direction": "minimize"}, "0.2500"), ({"objective": None}, "0.5000")],
)
def test_a_run_that_was_killed_is_compared_as_far_as_it_came(
    tmp_path: Path, config: dict[str, Any], best: str
) -> None:
    head = "step,epoch,split,accuracy,loss\n"
    rows = (
        "0,0.0,test,0.125,2.5\n0,0.0,val,nan,2.5\n4,1.0,val,0.75,1.5\n8,2.0,val,0.25,3.5\n12,3.0,val,0.5,\n"
    )
    killed = make_run(tmp_path / "killed", config, rows=head + rows + "16,4.0,val,0.9")  # cut short
    text = compare([make_run(tmp_path / "done"), killed])
    found = lines_of(text)
    assert found["accuracy/val"][1] == best and found["loss/test before"] == ["2.5000", "2.5000", "+0.0000"]
    assert found["accuracy/test"] == ["0.5000", "–", "–"] and "seconds" not in found
    assert ["not ended" in line for line in text.splitlines()[:2]] == [False, True]

    # one that has measured nothing yet, and one that was tested after training alone
    waiting = make_run(tmp_path / "waiting", rows=head)
    assert lines_of(compare([killed, waiting]))["accuracy/val"] == [best, "–", "–"]
    (waiting / "metrics.csv").unlink()
    assert lines_of(compare([killed, waiting]))["accuracy/val"] == [best, "–", "–"]
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
    later = {"figures": True, "init": None, "freeze": None}  # which an earlier version did not store
    assert "The configs are equal." in compare([one, make_run(tmp_path / "three", later)])


def test_a_wrong_path_names_the_runs_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("outputs/toy/2026-01-01_00-00-00"))
    job = make_run(Path("outputs/toy/sweeps/2026-01-02_00-00-00/0_seed=1"))
    Path("empty").mkdir()
    (make_run(Path("other")) / "summary.json").write_text('{"status": "do')
    for wrong, names in {
        "outputs/toy": [str(run), str(job), "holds no .hydra/config.yaml"],
        "outputs": [str(run), str(job)],
        "outputs/toy/2026-01-01_00-00-01": [str(run), "no such folder"],
        "outputs/tyo/2026-01-01_00-00-00": [str(run)],
        str(job.parent): [str(job)],
        f"{run}/checkpoints/bets.pt": [str(run), "no such folder"],
        "nowhere": ["no such folder"],
        "empty": ["There are no runs in"],
        f"{run}/summary.json": ["expected different runs"],
        "other": ["summary.json cannot be read"],
    }.items():
        with pytest.raises(UserError) as error:
            compare([Path(wrong), run])
        assert all(text in str(error.value) for text in (wrong, *names)), error.value
    with pytest.raises(UserError, match=r"runs=\[RUN_A,RUN_B\]"):
        compare([run])


def test_two_real_runs(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """What the engine writes is what is read here."""
    folders, accuracies = [], []
    for lr in ("0.2", "0.0001"):
        common = ("experiment=gallery", "threads=1", "loop.epochs=1")
        assert cli(*common, f"optimizer.lr={lr}", f"outputs=lr{lr}", config_dir=TOYS).status == 0
        folders += (tmp_path / f"lr{lr}" / "gallery").iterdir()
        summary = json.loads((folders[-1] / "summary.json").read_text())
        accuracies.append(summary["metrics"]["test"]["accuracy"])
    found = lines_of(compare(folders))
    assert found["optimizer.lr"] == ["0.2", "0.0001"] and not any("outputs" in name for name in found)
    expected = [*accuracies, accuracies[1] - accuracies[0]]
    assert [float(cell) for cell in found["accuracy/test"]] == pytest.approx(expected, abs=5e-5)
