"""ddpm_cifar on made-up images: what it learns, samples, measures, draws, writes and remembers."""

from __future__ import annotations

import contextlib
import csv
import errno
import inspect
import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from PIL import Image
from torch import Tensor

from experiments.data.image_folder.dataset import ImageFolder
from experiments.ddpm_cifar import mosaics as pictures
from experiments.ddpm_cifar import task as ddpm_cifar
from experiments.ddpm_cifar.task import DDPM
from experiments.nn import diffusion, safetensors, samplers
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner import figures, run
from runner.data import train_batch
from runner.device import select
from runner.engine.job import Result
from runner.errors import UserError
from runner.schedule import Constant
from runner.task import Run

SIZE, T, COUNTS = 8, 25, {"train": 40, "val": 8, "test": 12}
FIGURES = {
    "samples",
    "learning",
    "forward",
    "chain",
    "progressive",
    "shared",
    "interpolation",
    "neighbours",
    "rate_distortion",
    "curves",
}
MEASURES = {"accuracy", "precision", "recall", "f1", "density", "coverage", "fd_pixels", "kd_pixels"}


def draw_images(folder: Path, counts: dict[str, int] = COUNTS, mode: str = "RGB") -> Path:
    """A bright square somewhere on a dark ground, colour by class."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            pixels = np.full((SIZE, SIZE, 3), 20, np.uint8)
            row, column = random.integers(0, SIZE - 3, 2)
            pixels[row : row + 3, column : column + 3, number % 3] = 200 + random.integers(0, 50)
            path = folder / split / f"class_{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(path)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def small(root: Path) -> tuple[str, ...]:
    return (
        "experiment=ddpm_cifar",
        "data=image_folder",
        f"data.root={root}",
        f"data.size={SIZE}",
        "data.batch_size=8",
        "data.eval_batch_size=8",
        "threads=1",
        "model.base_channels=32",
        "model.channel_mult=[1,1]",
        "model.num_res_blocks=1",
        "model.attention_resolutions=[4]",
        f"task.diffusion.timesteps={T}",
        "task.samples=8",
        "task.steps=5",
        "task.sample_batch=5",
        "task.features=pixels",
        "task.bits_images=2",
        "task.final_bits_images=3",
        "optimizer.lr=0.001",
        "schedule.warmup=2",
        "loop.steps=8",
        "loop.eval_every=4",
        "loop.log_every=2",
        "loop.ema=0.9",
    )


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(*small(root), f"outputs={tmp_path_factory.mktemp('finished')}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are left out, for tests that are not about them."""
    monkeypatch.setattr(DDPM, "before", lambda *_: None)
    monkeypatch.setattr(DDPM, "after", lambda *_: None)
    monkeypatch.setattr("runner.records.tracker.Tracker.figure", lambda *_: None)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(result: Result, split: str) -> list[dict[str, float]]:
    """The rows of `metrics.csv` of a split."""
    with (result.folder / "metrics.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row.pop("split") == split]
    return [{name: float(text) for name, text in row.items() if text} for row in found]


def checkpoint(result: Result) -> str:
    return f"checkpoint={result.folder}/checkpoints/best.pt"


# what a run leaves


def test_every_evaluation_has_the_curves_of_all_experiments_and_its_own(finished: Result) -> None:
    quarters = {f"loss_quarter_{i}" for i in (1, 2, 3, 4)}
    for split in ("val", "test"):
        wanted = MEASURES | quarters | {"loss", "bits_per_dim", "fd_pixels_real", "kd_pixels_real"}
        assert all(wanted <= set(row) for row in rows_of(finished, split))
    assert all({"loss", *quarters} <= set(row) for row in rows_of(finished, "train"))
    assert [row["step"] for row in rows_of(finished, "val")] == [0, 4, 8]


def test_the_loss_before_training_is_one_and_is_the_mean_of_its_quarters(finished: Result) -> None:
    first = rows_of(finished, "val")[0]
    assert first["loss"] == pytest.approx(1, abs=0.1)  # ε = 0, against standard normal noise
    quarters = [first[f"loss_quarter_{i}"] for i in (1, 2, 3, 4)]
    assert sum(quarters) / 4 == pytest.approx(first["loss"], rel=1e-5)
    assert all(0.4 < loss < 1.6 for loss in quarters)  # 1 to 3 of the 8 images have their t in each


def test_training_quarters_average_to_the_loss(finished: Result) -> None:
    for row in rows_of(finished, "train"):
        quarters = [row[f"loss_quarter_{i}"] for i in (1, 2, 3, 4)]
        assert sum(quarters) / 4 == pytest.approx(row["loss"], rel=1e-5)


def test_it_learns(root: Path, quick: None, clean_process: None) -> None:
    result = run(
        *small(root), "loop.steps=120", "loop.eval_every=120", "optimizer.lr=0.003", "data.batch_size=32"
    )
    losses = [row["loss"] for row in rows_of(result, "val")]
    assert losses[-1] < 0.5 * losses[0]
    bits = [row["bits_per_dim"] for row in rows_of(result, "val")]
    assert bits[-1] < bits[0]


def test_every_picture_shows_something(finished: Result) -> None:
    found = {path.stem: imread(path) for path in (finished.folder / "figures").glob("*.png")}
    assert set(found) == FIGURES
    for name, pixels in found.items():
        ink = (np.asarray(pixels)[..., :3] < 0.9).any(-1).mean()
        assert min(pixels.shape[:2]) >= 150 and 0.01 < ink < 0.95, (name, pixels.shape, ink)
    with Image.open(finished.folder / "figures" / "chain.gif") as movie:
        assert movie.n_frames > T


def test_the_numbers_add_up(finished: Result) -> None:
    rows = {row["number"]: row for row in table(finished.folder, "numbers")}
    for split in ("train", "test"):
        bits, rate, distortion = (
            float(rows[f"{name}, {split}"]["here"]) for name in ("bits/dim", "rate L₁ … L_T", "distortion L₀")
        )
        assert bits == pytest.approx(rate + distortion) and distortion > 0
    assert float(table(finished.folder, "rate_distortion")[-1]["rate"]) == pytest.approx(
        float(rows["rate L₁ … L_T, test"]["here"])
    )
    assert {"fd_pixels_real, train", "fd_pixels_real, test"} <= set(rows)
    for name in MEASURES:
        assert float(rows[f"{name}, test"]["here"]) == pytest.approx(finished.metrics["test"][name])


def test_the_distance_of_the_summary_is_that_of_the_images_that_mode_sample_writes(
    finished: Result, root: Path, clean_process: None
) -> None:
    looked = run("mode=sample", checkpoint(finished), "task.n=8")
    fake = np.load(looked.folder / "samples.npz")["arr_0"]
    data = ImageFolder(str(root), SIZE)
    real = data.load(0)["test"].inputs[:8].permute(0, 2, 3, 1).numpy()
    x, y = (images.reshape(8, -1).astype(float) / 255 for images in (real, fake))
    # features are flattened by channel first here and there alike: a distance does not see the order
    product = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real.clip(0)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T))
    distance -= 2 * np.sqrt(product).sum()
    assert finished.metrics["test"]["fd_pixels"] == pytest.approx(distance, rel=1e-3)


def test_mode_eval_holds_numbers_of_steps_against_each_other(finished: Result, clean_process: None) -> None:
    looked = run("mode=eval", checkpoint(finished), "task.eval_steps=[25,5]", "task.picture_steps=5")
    few, many, real = table(looked.folder, "steps")
    assert (few["steps"], many["steps"], real["steps"]) == ("5", "25", "real images")
    for name in MEASURES:  # 5 are the steps of the evaluation itself, which makes the same images
        assert float(few[name]) == pytest.approx(looked.metrics["test"][name])
    assert float(many["fd_pixels"]) != pytest.approx(float(few["fd_pixels"]))
    assert float(real["fd_pixels"]) == pytest.approx(looked.metrics["test"]["fd_pixels_real"])
    assert (looked.folder / "figures" / "steps.png").exists()


def test_real_images_have_one_distance_at_all_evaluations(finished: Result) -> None:
    assert len({row["fd_pixels_real"] for row in rows_of(finished, "val")}) == 1
    assert len({row["fd_pixels"] for row in rows_of(finished, "val")}) == 3


def test_an_untrained_network_is_measured_by_fewer_images(
    root: Path, quick: None, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    monkeypatch.setattr(ddpm_cifar, "UNTRAINED", 6)
    counts: list[tuple[int, str, int]] = []
    compared = DDPM.compared

    def counted(task: DDPM, split: str, images: Tensor) -> dict[str, float]:
        counts.append((task.run.step, split, len(images)))
        return compared(task, split, images)

    monkeypatch.setattr(DDPM, "compared", counted)
    run(*small(root), "objective=null", "loop.steps=1")
    assert counts == [(0, "test", 6), (0, "val", 6), (1, "val", 8), (1, "test", 8)]
    untrained = run(*small(root), "objective=null", "loop.steps=0")
    del counts[:]
    run("mode=eval", f"checkpoint={untrained.folder}/checkpoints/last.pt")  # whoever looks wants all
    assert counts == [(0, "val", 8), (0, "test", 8)]


@pytest.mark.parametrize(
    ("counts", "samples", "message"),
    [
        (
            {"train": 14, "val": 6, "test": 12},
            12,
            r"of train .* the 12 .* and there are 2\. task\.samples=7 has",
        ),
        (
            {"train": 10, "val": 6, "test": 12},
            12,
            r"of test .* the 12 .* and there are 10\. task\.samples=10 has",
        ),
        (
            {"train": 11, "val": 6, "test": 12},
            6,
            r"of train .* there are 5\. more training images have them\.",
        ),
    ],
)
def test_distances_between_real_images_that_are_left_out_are_explained_once(
    tmp_path: Path, counts: dict[str, int], samples: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = built(draw_images(tmp_path / "images", counts), samples=samples)
    said: list[str] = []
    monkeypatch.setattr(task.waiting, "say_once", said.append)
    split = message.split()[1]
    for _ in range(2):
        values = task.measures(split)
    assert "fd_pixels_real" not in values
    left_out = [text for text in said if "left out" in text]
    assert len(left_out) == 1 and re.search(f"^fd_pixels_real and kd_pixels_real {message}", left_out[0])
    advice = re.search(r"task\.samples=(\d+) has them", left_out[0])
    if advice:
        task.samples = int(advice[1])
        assert "fd_pixels_real" in task.measures(split)


def test_the_papers_preset_learns_from_all_images_and_measures_at_the_end(
    tmp_path: Path, clean_process: None
) -> None:
    folder = draw_images(tmp_path / "images", {"train": 40, "test": 12})
    quickly = ("task.picture_steps=5", "task.bits_images=0")
    result = run(*small(folder), "preset=ddpm_paper", *quickly)
    assert result.status == "done" and "train 40 · test 12 samples" in (result.folder / "run.log").read_text()
    assert not rows_of(result, "val")
    assert [row["step"] for row in rows_of(result, "test")] == [0, 8]
    assert {path.stem for path in (result.folder / "figures").glob("*.png")} >= FIGURES
    assert float(table(result.folder, "numbers")[0]["images"]) == 3


def test_all_that_takes_long_has_a_bar_that_ends_full(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, made = built(root, picture_steps=5, eval_steps=(3,))
    moved: list[tuple[str, int, list[int]]] = []

    @contextlib.contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        moved.append((what, total, []))
        yield moved[-1][2].append

    monkeypatch.setattr(task.waiting, "bar", bar)
    monkeypatch.setattr(made, "figure", lambda *_: None)
    task.eval("val")
    task.after(made)
    assert all(sum(parts) == total for _, total, parts in moved), moved
    begun = " ".join(what for what, _, _ in moved)
    for word in (
        "loss of val",
        "samples by ddim",
        "features of 8 images of val",
        "features of 8 samples",
        "measures of 8 images",
        "distances between 8 real images",
        "bits/dim of",
        "the reverse process",
        "the nearest of 40 training images",
    ):
        assert word in begun, word


def test_an_evaluation_is_announced_before_it_starts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built(root)
    said: list[str] = []
    monkeypatch.setattr(task.waiting, "announce", lambda what, seconds: said.append(f"{what}: {seconds:g}"))
    monkeypatch.setattr(task, "pace", lambda batch: 100.0 * batch)

    def called(*_: object) -> Tensor:
        raise RuntimeError(f"after {said}")

    monkeypatch.setattr(task.network, "forward", called)
    with pytest.raises(RuntimeError, match=r"after \['loss of test: 800'\]"):  # one batch of 8
        task.losses("test")


def test_a_cpus_pace_is_measured_on_a_small_part(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built(root)
    seen: list[int] = []
    monkeypatch.setattr(task.network, "forward", lambda x, t: seen.append(len(x)))
    clock = iter((1.0, 3.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert task.pace(80) == 2.0 * 80 / 16 and set(seen) == {16}
    assert task.pace(160) == 2.0 * 160 / 16  # measured once


# noise and images belong to numbers


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_same_seed_gives_the_same_image_whatever_the_batch(
    finished: Result, sampler: str, clean_process: None
) -> None:
    def images(*overrides: str) -> np.ndarray:
        looked = run("mode=sample", checkpoint(finished), f"task.sampler={sampler}", *overrides)
        return np.load(looked.folder / "samples.npz")["arr_0"].astype(int)

    one, other = images("task.n=7", "task.sample_batch=3"), images("task.n=5", "task.sample_batch=5")
    assert one.shape == (7, SIZE, SIZE, 3)
    assert abs(one[:5] - other).max() <= 1
    assert abs(images("task.n=5", "seed=1") - other).max() > 20


def test_any_sampler_is_tried_on_a_network_that_was_trained_with_noisy_ddim(
    finished: Result, clean_process: None
) -> None:
    def images(sampler: str, eta: float) -> np.ndarray:
        overrides = (f"task.sampler={sampler}", f"task.eta={eta}", "task.n=2")
        looked = run("mode=sample", checkpoint(finished), *overrides)
        return np.load(looked.folder / "samples.npz")["arr_0"].astype(int)

    for sampler in ("ddpm", "dpm++"):
        np.testing.assert_array_equal(images(sampler, 1.0), images(sampler, 0.0))
    assert abs(images("ddim", 1.0) - images("ddim", 0.0)).max() > 20


def test_mode_sample_writes_the_same_images_as_pngs_and_as_numbers(
    finished: Result, clean_process: None
) -> None:
    looked = run("mode=sample", checkpoint(finished), "task.n=3", "task.steps=null", "task.sampler=ddpm")
    images = np.load(looked.folder / "samples.npz")["arr_0"]
    files = sorted((looked.folder / "samples").glob("*.png"))
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    for file, image in zip(files, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
    assert min(Image.open(looked.folder / "grid.png").size) > SIZE


@pytest.mark.parametrize("mode", ["sample", "export"])
def test_images_are_made_where_neither_the_data_nor_the_feature_network_is_at_hand(
    finished: Result, mode: str, clean_process: None
) -> None:
    absent = ("data.root=/nowhere", "task.weights=/nowhere/either", "data.batch_size=9999")
    looks = [run(f"mode={mode}", checkpoint(finished), "task.n=3", *more).folder for more in ((), absent)]
    what = {"sample": "samples/*.png", "export": "diffusers/**/*.*"}[mode]
    written = [{path.name: path.read_bytes() for path in look.glob(what)} for look in looks]
    assert len(written[0]) >= 3 and written[0] == written[1]


def test_measures_want_the_data(finished: Result, cli: Callable) -> None:
    outcome = cli("mode=eval", checkpoint(finished), "data.root=/nowhere")
    assert outcome.status == 2 and "/nowhere" in outcome.err


def test_the_archive_is_what_guided_diffusions_evaluator_reads(finished: Result, clean_process: None) -> None:
    """One stored array of that name, whose header says bytes, row after row."""
    looked = run("mode=sample", checkpoint(finished), "task.n=3")
    with zipfile.ZipFile(looked.folder / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)  # type: ignore[no-untyped-call]
        header = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
        assert header == ((3, SIZE, SIZE, 3), False, np.dtype("uint8")) and len(archive.namelist()) == 1
        assert len(file.read()) == 3 * SIZE * SIZE * 3


# going on, and several processes


def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(
    root: Path, quick: None, clean_process: None
) -> None:
    whole = run(*small(root), "model.dropout=0.1")
    first = run(*small(root), "model.dropout=0.1", "loop.steps=4")
    resumed = run(f"resume={first.folder}", "loop.steps=8")
    assert resumed.metrics["test"] == whole.metrics["test"]
    saved = [torch.load(r.folder / "checkpoints" / "last.pt", weights_only=True) for r in (whole, resumed)]
    for part in ("model", "ema"):
        one, other = (s[part][""] for s in saved)
        one, other = (list(p.values()) if isinstance(p, dict) else p for p in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    seen = [s["task"]["seen"] for s in saved]
    assert seen[0]["steps"] == seen[1]["steps"] == [0, 4, 8]
    assert all(torch.equal(a, b) for a, b in zip(seen[0]["samples"], seen[1]["samples"], strict=True))


def built(root: Path, **changed: Any) -> tuple[DDPM, Run]:
    """A task with its network, outside a run."""
    data = ImageFolder(str(root), SIZE, batch_size=8, eval_batch_size=8)
    settings = {"features": "pixels", "samples": 8, "steps": 5, **changed}

    def model(**given: Any) -> UNet:
        return UNet(
            base_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(4,),
            dropout=0.0,
            **given,
        )

    task = DDPM(model, data, GaussianDiffusion(T), **settings)
    made = Run("test", 0, select("cpu", "float32", 1, False), data, data.load(0))
    torch.manual_seed(0)
    task.run = made
    made.networks = {"": task.build(made)}
    return task, made


def trained(root: Path, world_size: int, dtype: torch.dtype, warmup: int = 0, steps: int = 20) -> Tensor:
    """Parameters (P,) after steps of the experiment's recipe on gradients that are averaged over processes."""
    task, made = built(root)
    task.network.to(dtype)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Constant(warmup)(step, steps))
    assert made.data is not None
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(world_size):
            batch = train_batch(made.data, made.splits["train"], 0, step, rank, world_size)
            torch.manual_seed(10 + rank)  # processes do not share the global stream
            (task.train(replace(batch, inputs=batch.inputs.to(dtype))).loss / world_size).backward()
        torch.nn.utils.clip_grad_norm_(task.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return torch.nn.utils.parameters_to_vector(task.network.parameters()).detach()


def test_two_slices_of_each_batch_are_the_whole_batch(root: Path) -> None:
    """In float64, where what is left is no rounding that Adam has enlarged."""
    before = torch.nn.utils.parameters_to_vector(built(root)[0].network.parameters()).detach()
    whole, sliced = (trained(root, world_size, torch.float64) for world_size in (1, 2))
    assert float((whole - sliced).abs().max()) < 1e-9
    assert float((whole - before).abs().max()) > 1e-3


def test_two_slices_are_the_whole_batch_in_float32_and_with_the_warm_up_that_ships(root: Path) -> None:
    before = torch.nn.utils.parameters_to_vector(built(root)[0].network.parameters()).detach()
    whole, sliced = (trained(root, world_size, torch.float32, warmup=5000) for world_size in (1, 2))
    assert float((whole - sliced).abs().max()) < 1e-5
    moved = (whole - before).norm()
    assert (
        float((whole - sliced).norm() / moved) < 1e-3
    )  # none of them moves by more than 1e-5 in so few steps


@pytest.mark.parametrize("loss", ["simple", "vlb"])
def test_both_losses_train(root: Path, loss: str) -> None:
    task, made = built(root, loss=loss)
    assert made.data is not None
    output = task.train(train_batch(made.data, made.splits["train"], 0, 0))
    output.loss.backward()
    if loss == "simple":
        batch = train_batch(made.data, made.splits["train"], 0, 0)
        batch.draws.integers(0, T)
        assert float(output.loss.detach()) == pytest.approx(
            float(batch.draws.normal(3, SIZE, SIZE).square().mean())
        )
    grads = [p.grad for p in task.network.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in grads) and any(bool(g.any()) for g in grads)


def test_a_sweep_over_the_losses_is_ranked_by_the_bound(
    root: Path, tmp_path: Path, quick: None, cli: Callable
) -> None:
    few = ("loop.steps=2", "loop.eval_every=2", "objective=bits_per_dim/val")
    assert cli("-m", *small(root), *few, "task.loss=simple,vlb").status == 0
    [board] = (tmp_path / "outputs" / "ddpm_cifar" / "sweeps").glob("*/leaderboard.csv")
    with board.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["task.loss"] for row in rows} == {"simple", "vlb"}
    bits = [float(row["bits_per_dim/val"]) for row in rows]
    assert bits == sorted(bits) and all(0 < value < 20 for value in bits)


# diffusers reads what is exported


def test_diffusers_opens_the_export_and_makes_the_same_images(finished: Result, clean_process: None) -> None:
    diffusers = pytest.importorskip("diffusers")
    looked = run("mode=export", checkpoint(finished))
    pipeline = diffusers.DDPMPipeline.from_pretrained(str(looked.folder / "diffusers"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(5), num_inference_steps=T, output_type="np").images
    stream = torch.Generator().manual_seed(5)
    network = looked.model
    assert isinstance(network, UNet)

    def draw(step: int = 0) -> Tensor:
        return torch.randn(2, 3, SIZE, SIZE, generator=stream)

    ours = samplers.sample(GaussianDiffusion(T), network.eval(), draw(), draw=draw)
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)
    assert (
        json.loads((looked.folder / "diffusers" / "model_index.json").read_text())["_class_name"]
        == "DDPMPipeline"
    )


def test_safetensors_reads_what_is_written() -> None:
    peer = pytest.importorskip("safetensors.torch")
    weights = {
        "a": torch.randn(2, 3),
        "b.c": torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(5).bfloat16(),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
    }
    read = peer.load(safetensors.dumps(weights))
    assert read.keys() == weights.keys()
    assert all(
        torch.equal(read[name], weights[name]) and read[name].dtype == weights[name].dtype for name in weights
    )
    with pytest.raises(ValueError, match="flag is torch"):
        safetensors.dumps({"flag": torch.ones(1, dtype=torch.bool)})


# pictures


def test_a_mosaic_has_every_image_in_its_place() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    whole = pictures.mosaic(images, 3, gap=1)
    assert whole.shape == (5, 11, 3)
    assert whole[::3, ::4, 1].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert bool((whole[2] == 255).all()) and bool((whole[:, 3] == 255).all())


def test_a_title_that_is_longer_than_its_images_are_wide_is_whole() -> None:
    images = torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)
    title = "samples and the nearest of 59,500 training images (pixels)"
    with figures.style():
        figure = pictures.table_of_images(images, (), ["a", "b"], title)
        FigureCanvasAgg(figure).draw()
        written = figure.get_suptitle(), figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert written[0] == title and written[1].x0 >= 0 and written[1].x1 <= figure.bbox.x1


def test_bytes_are_the_nearest_and_stay_in_range() -> None:
    exact = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert pictures.to_bytes(exact).tolist() == list(range(256))
    assert pictures.to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_an_interpolation_of_an_image_with_itself_does_not_change_with_lambda(root: Path) -> None:
    task, made = built(root, picture_steps=5)
    ends = made.splits["test"].inputs[:1].float().div(127.5).sub(1).repeat(2, 1, 1, 1)
    share = torch.linspace(0, 1, 3).view(-1, 1, 1, 1)
    for t in (-1, 6, T - 1):
        mixed = task.mixture(ends, share, t)
        assert mixed.shape == (3, 3, SIZE, SIZE)
        assert int((mixed.int() - mixed[:1].int()).abs().max()) <= 1
    assert torch.equal(task.mixture(ends, share, -1)[:1], pictures.to_bytes(ends[:1]))


def test_pictures_show_the_same_whatever_the_batch_and_keep_to_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(sample_batch: int) -> dict[str, Tensor]:
        """What the pictures of the reverse process are made of, from a network that takes no larger batch."""
        task, made = built(root, picture_steps=5, sample_batch=sample_batch)
        torch.nn.init.normal_(task.network.conv_out.weight, std=0.1)
        forward, shown = task.network.forward, {}

        def crowded(x: Tensor, t: Tensor) -> Tensor:
            if len(x) > 7:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(x, t)

        def panels(parts: list[tuple[str, Tensor]], title: str, *_: object) -> Any:
            shown[title] = torch.cat([part[1] for part in parts])

        monkeypatch.setattr(task.network, "forward", crowded)
        monkeypatch.setattr(pictures, "panels", panels)
        monkeypatch.setattr(made, "figure", lambda *_: None)
        monkeypatch.setattr(made, "animation", lambda *_: None)
        torch.manual_seed(0)
        task.draw_reverse(made)
        task.draw_interpolation(made)
        return shown

    one, other = images(7), images(3)
    assert len(one) == 4 and one.keys() == other.keys()
    for title in one:
        assert int((one[title].int() - other[title].int()).abs().max()) <= 1, title
        assert one[title].float().std() > 10
    with pytest.raises(UserError, match=r"at task\.sample_batch=8; try task\.sample_batch=4$"):
        images(8)


# what a user can get wrong


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.n=0", "n must be at least 1"),
        ("task.samples=2", "samples must be at least 6"),
        ("task.steps=26", r"steps must lie in \[1, 25\]"),
        ("task.picture_steps=0", "picture_steps must lie in"),
        ("task.eval_steps=[5,26]", r"eval_steps must lie in \[1, 25\].*not 26"),
        ("task.eta=2.0", "eta must lie in"),
        ("task.sampler=euler", "one of ddpm, ddim, dpm\\+\\+"),
        ("task.diffusion.schedule=sqrt", "one of linear, cosine"),
        ("task.weights=/nowhere", "weights=/nowhere"),
        ("data.size=7", r"data\.size must be divisible by 2, for 2 levels, not 7\.\n  try: .* data\.size=8 "),
        ("data=lookups", "data"),
    ],
)
def test_a_mistake_is_one_clear_message(root: Path, override: str, message: str, cli: Callable) -> None:
    outcome = cli(*small(root), override)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert re.search(message, outcome.err), outcome.err


ATTENDED = "model.attention_resolutions=[16]: of images "


@pytest.mark.parametrize(
    ("size", "message", "instead"),
    [
        (28, "data.size must be divisible by 8, for 4 levels, not 28.", 32),
        (36, "data.size must be divisible by 8, for 4 levels, not 36.", 32),
        (30, "data.size must be divisible by 8, for 4 levels, not 30.", 32),
        (44, "data.size must be divisible by 8, for 4 levels, not 44.", 32),  # 48 has no level of 16
        (1, "data.size must be divisible by 8, for 4 levels, not 1.", 16),
        (
            48,
            f"{ATTENDED}48 pixels high the levels' heights are [48, 24, 12, 6], so it can be [12]; or data.size=32.",
            32,
        ),
        (
            8,
            f"{ATTENDED}8 pixels high the levels' heights are [8, 4, 2, 1], so it can be [8]; or data.size=16.",
            16,
        ),
        (0, "data.size=0: size must be at least 1, not 0.", 32),
        (-8, "data.size=-8: size must be at least 1, not -8.", 32),
    ],
)
def test_a_size_that_cannot_be_halved_is_told_before_images_are_decoded(
    root: Path, tmp_path: Path, size: int, message: str, instead: int, cli: Callable
) -> None:
    cache = tmp_path / "cache"
    outcome = cli(
        "experiment=ddpm_cifar",
        "data=image_folder",
        f"data.root={root}",
        f"data.cache={cache}",
        f"data.size={size}",
    )
    first, second = outcome.err.splitlines()
    assert outcome.status == 2 and first == f"error: {message}"
    assert second.startswith("  try: ") and second.endswith(f" data.size={instead}")
    assert not cache.exists() and not (tmp_path / "outputs").exists()
    with torch.device("meta"):
        UNet(image_size=instead)


@pytest.mark.parametrize(
    ("overrides", "told", "instead"),
    [
        ("data.size=32 model.attention_resolutions=[7]", "it can be [8]; or data.size=56.", "[8]'"),
        (
            "data.size=48 model.attention_resolutions=[24,16]",
            "[24, 16]: of images 48 .* be [24, 12].",
            "[24,12]'",
        ),
        ("data=fashion_mnist model.attention_resolutions=[15]", "so it can be [16].", "[16]'"),
        ("data.size=96 model.attention_resolutions=[16,17]", "so it can be [12].", "[12]'"),
        (
            "data.size=100 model.attention_resolutions=[16,17]",
            "heights that no data.size has together.",
            None,
        ),
        (
            "data.size=99 model.channel_mult=[1,1,1,1,1,1,1,1,1,1,1,1]",
            "model.channel_mult has too many",
            None,
        ),
    ],
)
def test_where_no_size_will_do_the_key_that_decides_is_named(
    overrides: str, told: str, instead: str | None, root: Path, cli: Callable
) -> None:
    outcome = cli("experiment=ddpm_cifar", "data=image_folder", f"data.root={root}", *overrides.split())
    first, *more = outcome.err.splitlines()
    assert outcome.status == 2 and all(part in first for part in told.split(" .* "))
    assert [line.endswith(instead) for line in more] == [True] if instead else more == []


def test_levels_that_images_of_one_size_cannot_have_are_told(cli: Callable, tmp_path: Path) -> None:
    overrides = ("model.channel_mult=[1,1,1,1,1,1,1]", f"data.root={tmp_path}")
    outcome = cli("experiment=ddpm_cifar", "data=fashion_mnist", *overrides)
    assert (
        outcome.status == 2
        and "model.channel_mult: the height of the images must be divisible by 64" in outcome.err
    )


def test_grey_images_are_learnt_as_grey(tmp_path: Path, quick: None, clean_process: None) -> None:
    grey = draw_images(tmp_path / "grey", mode="L")
    result = run(*small(grey), "data.channels=1")
    assert result.status == "done" and isinstance(result.model, UNet) and result.model.in_channels == 1


def test_too_few_images_are_refused(tmp_path: Path, cli: Callable) -> None:
    outcome = cli(*small(draw_images(tmp_path / "few", {"train": 20, "val": 2, "test": 8})))
    assert outcome.status == 2 and "val has 2 images" in outcome.err and "6 are needed" in outcome.err
    assert "data.val_size=N" in outcome.err


def test_a_checkpoint_of_another_network_is_refused(finished: Result, cli: Callable) -> None:
    outcome = cli("mode=sample", checkpoint(finished), "model.base_channels=64")
    assert outcome.status == 2 and "does not fit this network" in outcome.err


def test_too_little_memory_names_the_batch_to_try(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built(root, sample_batch=6)

    def full(*_: object) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(task.network, "forward", full)
    with pytest.raises(UserError, match=r"at task.sample_batch=6; try task.sample_batch=3"):
        task.generate(range(6))
    with pytest.raises(UserError, match=r"at data.eval_batch_size=8; try data.eval_batch_size=4"):
        task.losses("val")


def test_other_errors_of_a_network_stay_what_they_are(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built(root)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(task.network, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        task.generate(range(6))


def test_a_full_disk_is_named_and_leaves_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left"):
        pictures.write_archive(tmp_path / "samples.npz", torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_half_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_bytes, []

    def fills_up(path: Path, content: bytes) -> int:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(UserError, match="No space left"):
        pictures.write_images(tmp_path / "samples", images, range(4))
    with pytest.raises(UserError, match="No space left"):
        pictures.write_mosaic(tmp_path / "grid.png", images, 2)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def test_the_derivation_names_functions_and_tests_that_there_are() -> None:
    here = Path(__file__).parent
    text = (here.parents[2] / "docs" / "ddpm.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in here.rglob("test_*.py"))
    functions = "".join(inspect.getsource(module) for module in (diffusion, samplers))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    named = re.findall(r"`(?:GaussianDiffusion\.)?(\w+)\(\)`", text)
    assert len(named) > 8
    for name in named:
        assert f"def {name}(" in functions, name
