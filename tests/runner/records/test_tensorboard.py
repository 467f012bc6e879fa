"""What TensorBoard itself says of our runs, asked over HTTP as its pages ask it."""

from __future__ import annotations

import csv
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
from urllib.request import Request, urlopen

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPO = Path(__file__).resolve().parents[3]
GALLERY = Path(__file__).parents[1] / "gallery"
DEADLINE = 900.0  # seconds that TensorBoard may take to start and to read everything
METRICS = ("loss", "accuracy", "precision", "recall", "f1")
READINGS = ("learning_rate", "grad_norm", "grad_norm_clipped", "samples_per_second")
# one process, for torch alone takes seconds: a run that is killed and resumed, a 2 × 2 sweep, variants, an evaluation
RUNS = """
import glob, os, signal, sys
import runner.build.builder
from runner.cli import main
from runner.records.tracker import Tracker

gallery, toys = (["--config-dir", folder] for folder in sys.argv[1:])
kill = ["loop.epochs=2", "loop.save_every=3", "task.signal_at=8", "outputs=outputs/killed"]
child = os.fork()
if child == 0:
    os._exit(main([*gallery, "experiment=gallery", "threads=1", *kill]))
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
assert not main([*gallery, f"resume={glob.glob('outputs/killed/gallery/*')[0]}"])

Tracker.curves = Tracker.figure = Tracker.animation = lambda *_, **__: None  # these have been seen
quick = ["threads=1", "loop.epochs=1"]
grid = ["optimizer=sgd,adam", "loop.clip_norm=1,null"]
assert not main([*gallery, "-m", "experiment=gallery", *quick, *grid])
assert not main([*toys, "experiment=toy_variants", *quick])
[best] = glob.glob("outputs/gallery/sweeps/*/0_*/checkpoints/best.pt")
assert not main([*gallery, "mode=eval", f"checkpoint={best}"])
"""


class Board:
    """A TensorBoard over a logdir, and what it answers."""

    def __init__(self, url: str, outputs: Path):
        self.url, self.outputs = url, outputs

    def raw(self, path: str, **query: Any) -> bytes:
        with urlopen(f"{self.url}/data/{path}?{urlencode(query)}", timeout=DEADLINE) as answer:
            return answer.read()

    def get(self, path: str, **query: Any) -> Any:
        return json.loads(self.raw(path, **query))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.url}/data/{path}", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=DEADLINE) as answer:
            return json.loads(answer.read())

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        return [(step, value) for _, step, value in self.get("plugin/scalars/scalars", run=run, tag=tag)]

    def has_read_all(self) -> bool:
        """Whether the last point of every curve of every metrics.csv is there; an evaluation has no curve."""
        there = self.get("plugin/scalars/tags")
        for folder in (
            path.parent for path in self.outputs.glob("**/metrics.csv") if "eval" not in path.parts
        ):
            run = str(folder.relative_to(self.outputs))
            for tag, points in recorded(folder).items():
                if tag not in there.get(run, {}) or self.scalars(run, tag)[-1][0] != points[-1][0]:
                    return False
        return True

    def run(self, pattern: str) -> str:
        [found] = (run for run in self.get("runs") if re.fullmatch(pattern, run))
        return found

    def folder(self, pattern: str) -> Path:
        return self.outputs / self.run(pattern)


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that a run's metrics.csv holds, by tag."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name not in ("step", "epoch", "split") and text:
                    point = (int(row["step"]), float(text))
                    curves.setdefault(f"{name}/{row['split']}", []).append(point)
    return curves


def wait_until(done: Callable[[], Any], server: subprocess.Popen[str]) -> Any:
    """What `done` returns as soon as that is true."""
    end = time.monotonic() + DEADLINE
    while not (found := done()):
        assert server.poll() is None and time.monotonic() < end, "TensorBoard has ended, or is late"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    home = tmp_path_factory.mktemp("board")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNS, str(GALLERY), str(REPO / "tests" / "toys")]
    made = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr

    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "outputs", "--port", "0"]
    log = home / "tensorboard.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1"], cwd=home, stdout=file, stderr=file, text=True
        )
    try:
        url = wait_until(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()), server).group()
        board = Board(url, home / "outputs")
        wait_until(board.has_read_all, server)
        yield board
    finally:
        server.terminate()
        server.wait(timeout=DEADLINE)


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
    curves, run = recorded(board.folder(pattern)), board.run(pattern)
    tags = set(board.get("plugin/scalars/tags")[run])
    assert tags == set(curves)
    for variant in variants:
        assert tags >= {f"{m}{variant}/{split}" for m in METRICS for split in ("train", "val", "test")}
        assert tags >= {f"{reading}{variant}/train" for reading in ("grad_norm", "grad_norm_clipped")}
    assert tags >= {"learning_rate/train", "samples_per_second/train"}
    for tag, points in curves.items():  # TensorBoard keeps scalars in single precision
        assert board.scalars(run, tag) == [(step, float(np.float32(value))) for step, value in points], tag


def test_a_resumed_run_goes_on_without_overlap(board: Board) -> None:
    run, folder = board.run("killed/.*"), board.folder("killed/.*")
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    for tag in board.get("plugin/scalars/tags")[run]:
        over_http = [step for step, _ in board.scalars(run, tag)]
        on_disk = [event.step for event in events.Scalars(tag)]
        assert over_http == on_disk == sorted(set(over_http)), tag
    assert [step for step, _ in board.scalars(run, "loss/train")] == [2, 4, 5, 6, 8, 10]
    assert [step for step, _ in board.scalars(run, "loss/val")] == [0, 5, 10]
    assert [event.step for event in events.Images("curves")] == [0, 5, 10]


def test_clipping_is_seen(board: Board) -> None:
    for job, limit in (("0", 1.0), ("1", np.inf)):
        run = board.run(rf".*/{job}_[^/]*")
        before, after = (dict(board.scalars(run, f"{n}/train")) for n in ("grad_norm", "grad_norm_clipped"))
        assert after == pytest.approx({step: min(norm, limit) for step, norm in before.items()}, rel=1e-5)


def test_custom_scalars_overlay_train_and_val(board: Board) -> None:
    layout = board.get("plugin/custom_scalars/layout")
    overlay, gradient = layout["category"]
    assert (overlay["title"], gradient["title"]) == ("train and val", "gradient")
    titles = [chart["title"] for chart in overlay["chart"]]
    assert titles == [*METRICS, "confidence"]  # each once, though six runs of two experiments lie there
    for pattern, variants in (("killed/.*", [""]), ("toy_variants/.*", [".narrow", ".wide"])):
        for chart in [*overlay["chart"][:5], *gradient["chart"]]:
            shown: set[str] = set()
            for tag in chart["multiline"]["tag"]:
                answer = board.get("plugin/custom_scalars/scalars", run=board.run(pattern), tag=tag)
                assert answer["regex_valid"]
                shown |= {name for name, points in answer["tag_to_events"].items() if points}
            if chart in gradient["chart"]:
                wanted = {f"{name}{v}/train" for name in ("grad_norm", "grad_norm_clipped") for v in variants}
            else:
                wanted = {f"{chart['title']}{v}/{split}" for split in ("train", "val") for v in variants}
            assert shown == wanted


def test_images_are_the_figures(board: Board) -> None:
    run, folder = board.run("killed/.*"), board.folder("killed/.*")
    tags = board.get("plugin/images/tags")[run]
    assert set(tags) == {"curves", "predictions", "turning"}
    for tag in tags:
        ending = "gif" if tag == "turning" else "png"
        *_, last = board.get("plugin/images/images", run=run, tag=tag, sample=0)
        picture = board.raw(f"plugin/images/individualImage?{last['query']}&")
        assert picture == (folder / "figures" / f"{tag}.{ending}").read_bytes()


def test_precision_recall_curves_per_class(board: Board) -> None:
    run = board.run("killed/.*")
    classes = ("Ankle boot", "T-shirt/top", "裙子")
    assert set(board.get("plugin/pr_curves/tags")[run]) == {f"test/{name}" for name in classes}
    for name in classes:
        [entry] = board.get("plugin/pr_curves/pr_curves", run=run, tag=f"test/{name}")[run]
        precision, recall = entry["precision"], entry["recall"]
        whole = max(range(len(recall)), key=lambda i: (recall[i], -precision[i]))
        assert recall[whole] == 1 and precision[whole] == pytest.approx(1 / 3)  # everything taken for it
        assert all(0 <= value <= 1 for value in [*precision, *recall])
        assert recall == sorted(recall, reverse=True)


def test_hparams_hold_each_run_once_with_its_settings_and_results(board: Board) -> None:
    body = {
        "experimentName": "",
        "allowedStatuses": [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")],
        "colParams": [{"metric": {"group": "", "tag": "accuracy/test"}}],
        "startIndex": 0,
        "sliceSize": 100,
    }
    found = board.post("plugin/hparams/session_groups", body)["sessionGroups"]
    groups = {group["name"]: group for group in found}
    assert set(groups) == {run for run in board.get("runs") if "/eval/" not in run}
    for pattern, optimizer, limit in ((".*/0_.*", "SGD", 1.0), (".*/3_.*", "Adam", "null")):
        [name] = (run for run in groups if re.fullmatch(pattern, run))
        [session] = groups[name]["sessions"]
        assert session["name"] == name and session["status"] == "STATUS_SUCCESS"
        values = groups[name]["hparams"]
        assert values["optimizer"] == optimizer and values["loop.clip_norm"] == limit
        assert values["experiment"] == "gallery" and values["model.dropout"] == 0.1
        measured = {m["name"]["tag"]: m["value"] for m in groups[name]["metricValues"]}
        assert measured["accuracy/test"] == board.scalars(name, "accuracy/test")[-1][1]


def test_hparams_have_the_columns_of_all_runs_and_what_differs_first(board: Board) -> None:
    asked = {"experimentName": "", "includeMetrics": True}
    experiment = board.post("plugin/hparams/experiment", asked)
    columns = [info["name"] for info in experiment["hparamInfos"]]
    differing = [info["name"] for info in experiment["hparamInfos"] if info.get("differs")]
    assert columns[: len(differing)] == differing
    assert {"optimizer", "optimizer.lr", "loop.clip_norm", "experiment"} <= set(differing)
    assert {"task.wide", "task.end", "seed", "precision", "data.batch_size"} <= set(columns)
    metrics = [info["name"] for info in experiment["metricInfos"]]
    assert not any(name.get("group") for name in metrics)  # a look at a checkpoint adds no columns
    assert {"accuracy/test", "accuracy.wide/val"} <= {name["tag"] for name in metrics}


def test_text_holds_the_config_and_the_tables(board: Board) -> None:
    run = board.run("killed/.*")
    assert len(board.get("plugin/text/tags")[run]) == 3
    for name, texts in {
        "config": ("gallery.Gallery", "save_every: 3"),
        "counts": ("<table>", "裙子"),
        "checks": ("finite", "|x| &lt; ∞", "≤ 0.5", "pass"),
    }.items():
        [found] = board.get("plugin/text/text", run=run, tag=f"{name}/text_summary")
        assert all(text in found["text"] for text in texts)
