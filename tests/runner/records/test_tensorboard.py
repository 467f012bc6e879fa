"""What TensorBoard itself says of our runs, asked over HTTP as its pages ask it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runner.records.tracker import read_metrics
from tests.conftest import LIMIT, REPO, TOYS

METRICS = ("loss", "accuracy", "precision", "recall", "f1")
# one process, for torch alone takes seconds: a run that is killed and resumed, a 2 × 2 sweep, variants, an evaluation
RUNS = """
import glob, os, signal, sys
import runner.build.builder
from runner.cli import main
from runner.records.tracker import Tracker

toys = ["--config-dir", sys.argv[1]]
kill = ["loop.epochs=2", "loop.save_every=3", "task.signal_at=8", "outputs=outputs/killed"]
child = os.fork()
if child == 0:
    os._exit(main([*toys, "experiment=gallery", "threads=1", *kill]))
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
assert not main([*toys, f"resume={glob.glob('outputs/killed/gallery/*')[0]}"])

Tracker.curves = Tracker.figure = Tracker.animation = lambda *_, **__: None  # these have been seen
quick = ["threads=1", "loop.epochs=1"]
grid = ["optimizer=sgd,adam", "loop.clip_norm=1,null"]
assert not main([*toys, "-m", "experiment=gallery", *quick, *grid])
assert not main([*toys, "experiment=toy_variants", *quick])
[best] = glob.glob("outputs/gallery/sweeps/*/0_*/checkpoints/best.pt")
assert not main([*toys, "mode=eval", f"checkpoint={best}"])
"""


class Board:
    """A TensorBoard over a logdir, and what it answers."""

    def __init__(self, url: str, outputs: Path):
        self.url, self.outputs = url, outputs

    def raw(self, path: str, body: Any = None, **query: Any) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.url}/data/{path}?{urlencode(query)}", data, headers)
        with build_opener(ProxyHandler({})).open(request, timeout=LIMIT) as answer:
            return answer.read()

    def get(self, path: str, **query: Any) -> Any:
        return json.loads(self.raw(path, **query))

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        return [(step, value) for _, step, value in self.get("plugin/scalars/scalars", run=run, tag=tag)]

    def has_read_all(self) -> bool:
        """Whether the last point of every curve of every metrics.csv is there; an evaluation has no curve."""
        tags = self.get("plugin/scalars/tags")
        runs = [path.parent for path in self.outputs.glob("**/metrics.csv") if "eval" not in path.parts]
        return all(
            tag in tags.get(run := str(folder.relative_to(self.outputs)), {})
            and self.scalars(run, tag)[-1] == points[-1]
            for folder in runs
            for tag, points in recorded(folder).items()
        )

    def run(self, pattern: str) -> str:
        [found] = (run for run in self.get("runs") if re.fullmatch(pattern, run))
        return found


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that a run's metrics.csv holds, by tag, in single precision as TensorBoard keeps them."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(folder / "metrics.csv"):
        for name in row.keys() - {"step", "epoch", "split"}:
            point = (row["step"], float(np.float32(row[name])))
            curves.setdefault(f"{name}/{row['split']}", []).append(point)
    return curves


def wait_until(done: Callable[[], Any], server: subprocess.Popen[str]) -> Any:
    """What `done` returns as soon as that is true."""
    end = time.monotonic() + LIMIT
    while not (found := done()):
        assert server.poll() is None and time.monotonic() < end, "TensorBoard has ended, or is late"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    home = tmp_path_factory.mktemp("board")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNS, str(TOYS)]
    made = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr

    command = [sys.executable, "-m", "tensorboard.main", "--logdir=outputs", "--port=0", "--host=127.0.0.1"]
    log = home / "tensorboard.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=home, stdout=file, stderr=file, text=True)
    try:
        url = wait_until(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()), server).group()
        board = Board(url, home / "outputs")
        wait_until(board.has_read_all, server)
        yield board
    finally:
        server.terminate()
        server.wait(timeout=LIMIT)


@pytest.fixture
def killed(board: Board) -> str:
    """The run that was killed and resumed."""
    return board.run("killed/.*")


def test_a_run_is_one_run(board: Board) -> None:
    settings = ("sgd_clip_norm-1", "sgd_clip_norm-null", "adam_clip_norm-1", "adam_clip_norm-null")
    jobs = [f"gallery/sweeps/STAMP/{number}_optimizer-{text}" for number, text in enumerate(settings)]
    expected = {*jobs, f"{jobs[0]}/eval/STAMP", "killed/gallery/STAMP", "toy_variants/STAMP"}
    runs = [re.sub(r"\d{4}-[\d_-]+", "STAMP", run) for run in board.get("runs")]
    assert len(runs) == len(expected) and set(runs) == expected


@pytest.mark.parametrize(
    ("pattern", "variants"),
    [(".*/0_[^/]*", [""]), ("killed/.*", [""]), ("toy_variants/.*", [".narrow", ".wide"])],
)
def test_curves_are_the_metrics_file(pattern: str, variants: list[str], board: Board) -> None:
    run = board.run(pattern)
    tags, curves = set(board.get("plugin/scalars/tags")[run]), recorded(board.outputs / run)
    usual = {
        f"{metric}{v}/{split}" for metric in METRICS for v in variants for split in ("train", "val", "test")
    }
    usual |= {f"{norm}{v}/train" for norm in ("grad_norm", "grad_norm_clipped") for v in variants}
    assert tags >= usual | {"learning_rate/train", "samples_per_second/train"}
    assert {tag: board.scalars(run, tag) for tag in tags} == curves


def test_a_resumed_run_goes_on_without_overlap(board: Board, killed: str) -> None:
    folder = board.outputs / killed
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    for tag in board.get("plugin/scalars/tags")[killed]:
        over_http = [step for step, _ in board.scalars(killed, tag)]
        on_disk = [event.step for event in events.Scalars(tag)]
        assert over_http == on_disk == sorted(set(over_http)), tag
    assert [step for step, _ in board.scalars(killed, "loss/train")] == [2, 4, 5, 6, 8, 10]
    assert [step for step, _ in board.scalars(killed, "loss/val")] == [0, 5, 10]
    assert [event.step for event in events.Images("curves")] == [0, 5, 10]


def test_custom_scalars_overlay_train_and_val(board: Board, killed: str) -> None:
    overlay, gradient = board.get("plugin/custom_scalars/layout")["category"]
    assert (overlay["title"], gradient["title"]) == ("train and val", "gradient")
    titles = [chart["title"] for chart in overlay["chart"]]
    assert titles == [*METRICS, "confidence"]  # each once, though six runs of two experiments lie there

    def shown(run: str, chart: dict[str, Any]) -> set[str]:
        tags = chart["multiline"]["tag"]
        answers = [board.get("plugin/custom_scalars/scalars", run=run, tag=tag) for tag in tags]
        assert all(answer["regex_valid"] for answer in answers)
        return {name for answer in answers for name, points in answer["tag_to_events"].items() if points}

    for run, variants in ((killed, [""]), (board.run("toy_variants/.*"), [".narrow", ".wide"])):
        for chart in overlay["chart"][:5]:
            tags = {
                f"{chart['title']}{variant}/{split}" for split in ("train", "val") for variant in variants
            }
            assert shown(run, chart) == tags
        norms = {f"{name}{v}/train" for name in ("grad_norm", "grad_norm_clipped") for v in variants}
        assert [shown(run, chart) for chart in gradient["chart"]] == [norms]


def test_images_are_the_figures(board: Board, killed: str) -> None:
    files = {"curves": "curves.png", "predictions": "predictions.png", "turning": "turning.gif"}
    files |= {name: f"{name}.png" for name in ("confusion", "per_class")}
    assert set(board.get("plugin/images/tags")[killed]) == set(files)
    for tag, file in files.items():
        *_, last = board.get("plugin/images/images", run=killed, tag=tag, sample=0)
        picture = board.raw(f"plugin/images/individualImage?{last['query']}&")
        assert picture == (board.outputs / killed / "figures" / file).read_bytes()


def test_precision_recall_curves_per_class(board: Board, killed: str) -> None:
    tags = board.get("plugin/pr_curves/tags")[killed]
    assert set(tags) == {f"test/{name}" for name in ("Ankle boot", "T-shirt/top", "裙子")}
    for tag in tags:
        before, entry = board.get("plugin/pr_curves/pr_curves", run=killed, tag=tag)[killed]
        assert (before["step"], entry["step"]) == (0, 10)
        precision, recall = entry["precision"], entry["recall"]
        assert recall == sorted(recall, reverse=True) and min(*precision, *recall) >= 0
        assert max(*precision, *recall) <= 1
        whole = min(value for value, share in zip(precision, recall, strict=True) if share == 1)
        assert whole == pytest.approx(1 / 3)  # everything taken for it


def test_hparams_hold_each_run_once_with_its_settings_and_results(board: Board) -> None:
    statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    columns = [{"metric": {"group": "", "tag": "accuracy/test"}}]
    body = {"experimentName": "", "startIndex": 0, "sliceSize": 100}
    body |= {"allowedStatuses": statuses, "colParams": columns}
    found = json.loads(board.raw("plugin/hparams/session_groups", body))["sessionGroups"]
    groups = {group["name"]: group for group in found}
    assert set(groups) == {run for run in board.get("runs") if "/eval/" not in run}
    for pattern, optimizer, limit in ((".*/0_.*", "SGD", 1.0), (".*/3_.*", "Adam", "null")):
        [name] = (run for run in groups if re.fullmatch(pattern, run))
        [session] = groups[name]["sessions"]
        assert session["name"] == name and session["status"] == "STATUS_SUCCESS"
        expected = {"optimizer": optimizer, "loop.clip_norm": limit}
        expected |= {"experiment": "gallery", "model.dropout": 0.2}
        assert groups[name]["hparams"].items() >= expected.items()
        measured = {m["name"]["tag"]: m["value"] for m in groups[name]["metricValues"]}
        assert measured["accuracy/test"] == board.scalars(name, "accuracy/test")[-1][1]

    # all jobs of a sweep have the columns of either optimizer
    swept = [set(group["hparams"]) for name, group in groups.items() if "/sweeps/" in name]
    assert len(swept) == 4 and all(columns == swept[0] for columns in swept)
    assert {"optimizer.momentum", "optimizer.betas"} <= swept[0]


def test_hparams_have_the_columns_of_all_runs_and_what_differs_first(board: Board) -> None:
    asked = {"experimentName": "", "includeMetrics": True}
    experiment = json.loads(board.raw("plugin/hparams/experiment", asked))
    columns = [info["name"] for info in experiment["hparamInfos"]]
    differing = [info["name"] for info in experiment["hparamInfos"] if info.get("differs")]
    assert columns[: len(differing)] == differing
    assert {"optimizer", "optimizer.lr", "loop.clip_norm", "experiment"} <= set(differing)
    assert {"task.wide", "task.end", "seed", "precision", "data.batch_size"} <= set(columns)
    metrics = [info["name"] for info in experiment["metricInfos"]]
    assert not any(name.get("group") for name in metrics)  # a look at a checkpoint adds no columns
    assert {"accuracy/test", "accuracy.wide/val"} <= {name["tag"] for name in metrics}


def test_text_holds_the_config_and_the_tables(board: Board, killed: str) -> None:
    assert len(board.get("plugin/text/tags")[killed]) == 4
    for name, texts in {
        "config": ("toys.Gallery", "save_every: 3"),
        "counts": ("<table>", "裙子"),
        "checks": ("finite", "|x| &lt; ∞", "≤ 0.5", "pass"),
    }.items():
        [found] = board.get("plugin/text/text", run=killed, tag=f"{name}/text_summary")
        assert all(text in found["text"] for text in texts)
