"""Shared by the tests of experiments: a run of each, whose figures are drawn when a test asks for them."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from openpyxl import Workbook, load_workbook
from PIL import Image

from runner import figures, run
from runner.engine.job import Result
from runner.records.tracker import Tracker
from runner.streams import generator
from tests.conftest import LIMIT
from tests.runner.engine.helpers import table as read_csv

STAND_IN = Path(__file__).parent / "stand_in"
IMAGES = {"train": 40, "val": 8, "test": 12}  # drawn for ddpm_cifar
IMAGE_SIZE, T = 8, 25
# sizes of a small run
SIZES = {
    "mha_demo": (
        *("experiment=mha_demo", "threads=1", "task.heads=[1,2]", "task.queries=500"),
        *("data.train_size=8192", "data.val_size=256", "data.test_size=512"),
    ),
    "posenc_check": (
        *("experiment=posenc_check", "threads=1", "task.length=12", "task.d_model=8", "task.formula_rows=3"),
        *("data.lengths=[16,24]", "data.length_size=200", "model.num_layers=1"),
    ),
    "rnn_fashion": ("experiment=rnn_fashion", "data=fake_images", "threads=1", "model.hidden_size=24"),
    "ddpm_cifar": (
        *("experiment=ddpm_cifar", "threads=1", "data=image_folder", f"data.size={IMAGE_SIZE}"),
        *("data.batch_size=8", "data.eval_batch_size=8"),
        *("model.base_channels=32", "model.channel_mult=[1,1]", "model.num_res_blocks=1"),
        *("model.attention_resolutions=[4]", f"task.diffusion.timesteps={T}", "task.features=pixels"),
        *("task.samples=8", "task.steps=5", "task.sample_batch=5", "task.picture_steps=3"),
        *("task.bits_images=2", "task.final_bits_images=3", "optimizer.lr=0.001", "schedule.warmup=2"),
        *("loop.steps=8", "loop.eval_every=4", "loop.log_every=2", "loop.ema=0.9"),
    ),
}
# long enough to learn what the checks ask for; rnn_fashion's learning rate leaves mistakes to draw
TRAINING = {
    "mha_demo": ("loop.steps=300", "loop.eval_every=100", "optimizer.lr=0.01", "task.claims_from=300"),
    "posenc_check": ("loop.steps=300", "loop.eval_every=150", "optimizer.lr=0.015", "task.claims_from=300"),
    "rnn_fashion": ("loop.epochs=3", "optimizer.lr=0.02"),
    "ddpm_cifar": (),
}


_waiting: dict[Path, Callable[[], None]] = {}  # what draws a figure of a run, by its path


@contextlib.contextmanager
def figures_later() -> Iterator[None]:
    """Runs inside make their figures and leave them to `draw_figures`: drawing is most of a small run's time."""

    def figure(self: Tracker, name: str, figure: Figure, step: int) -> None:
        assert self.folder is not None
        path = self.folder / "figures" / f"{name}.png"
        _waiting[path] = partial(figures.save, figure, path)

    def animation(self: Tracker, name: str, figure: Figure, draw: Any, frames: int, fps: int, _: int) -> None:
        assert self.folder is not None
        path = self.folder / "figures" / f"{name}.gif"
        _waiting[path] = partial(figures.save_animation, figure, draw, frames, fps, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "figure", figure)
        patch.setattr(Tracker, "animation", animation)
        patch.setattr(Tracker, "curves", lambda *_: None)
        yield


def figures_of(folder: Path) -> set[str]:
    """Return the names of a run's figures, drawn or not."""
    paths = {*_waiting, *(folder / "figures").glob("*")}
    return {path.stem for path in paths if path.parent.parent == folder and path.suffix == ".png"}


def draw_figures(folder: Path, *names: str) -> dict[str, np.ndarray[Any, Any]]:
    """Draw what a run has left to be drawn, some or all; return the pixels by name."""
    (folder / "figures").mkdir(exist_ok=True)
    for path in [path for path in _waiting if path.parent.parent == folder]:
        if path.stem in names or not names:
            _waiting.pop(path)()
    return {path.stem: imread(path) for path in (folder / "figures").glob("*.png")}


def draw_images(folder: Path, counts: dict[str, int] = IMAGES, mode: str = "RGB") -> Path:
    """Write images of a bright square on a dark ground, coloured by class."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 20, np.uint8)
            row, column = random.integers(0, IMAGE_SIZE - 3, 2)
            pixels[row : row + 3, column : column + 3, number % 3] = 200 + random.integers(0, 50)
            path = folder / split / f"class_{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(path)
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ddpm_cifar's images."""
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def small(root: Path) -> Callable[..., Result]:
    """`small(NAME, *overrides)`: a run of an experiment of `SIZES`, which draws no figures."""

    def run_small(name: str, *overrides: str) -> Result:
        data = (f"data.root={root}",) if name == "ddpm_cifar" else ()
        with figures_later():
            return run(*SIZES[name], *data, *overrides, config_dir=STAND_IN)

    return run_small


@pytest.fixture(scope="session")
def finished(
    small: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Result]:
    """`finished(NAME)`: the trained run of an experiment of `SIZES`, one per session."""
    results: dict[str, Result] = {}

    def result_of(name: str) -> Result:
        if name not in results:
            results[name] = small(name, *TRAINING[name], f"outputs={tmp_path_factory.mktemp(name)}")
        return results[name]

    return result_of


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest, finished: Callable[[str], Result]) -> Result:
    """The trained run of the experiment that the test's folder is named after."""
    return finished(request.path.parent.name)


def checkpoint(result: Result) -> str:
    """Return the argument that names a run's best checkpoint."""
    return f"checkpoint={result.folder}/checkpoints/best.pt"


def saved(result: Result) -> dict[str, Any]:
    """Return the content of a run's last checkpoint."""
    return torch.load(result.folder / "checkpoints" / "last.pt", weights_only=True)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of `tables/NAME.csv`."""
    return read_csv(folder / "tables" / f"{name}.csv")


def recomputed(folder: Path, *books: Path) -> list[Workbook]:
    """Return workbooks after LibreOffice has evaluated their formulas into `folder`; skip where there is none."""
    soffice = shutil.which("soffice")
    if soffice is None:
        pytest.skip("LibreOffice (soffice) is not installed")
    profile = f"-env:UserInstallation={(folder / 'profile').as_uri()}"
    command = [soffice, profile, "--headless", "--convert-to", "xlsx", "--outdir", folder, *books]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)
    return [load_workbook(folder / book.name, data_only=True) for book in books]


def failed_checks(check: Callable[[Any], None]) -> set[str]:
    """Return the names of the checks that fail among those that `check` makes of a run, which keeps nothing."""
    passed: dict[str, bool] = {}

    def keep(name: str, claim: str, measured: float, tolerance: float, at_least: bool = False) -> None:
        passed[name] = measured >= tolerance if at_least else measured <= tolerance

    check(Mock(seed=0, device=torch.device("cpu"), generator=partial(generator, 0), check=keep))
    assert passed
    return {name for name, held in passed.items() if not held}


def broken_claims(errors: dict[str, float], exact: float) -> set[str]:
    """Return the claims whose error is large or no number; the others have to be next to zero."""
    broken = {name for name, error in errors.items() if not error <= 1e-3}
    assert all(error < exact for name, error in errors.items() if name not in broken), errors
    return broken


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that the runner's log was given."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("runner")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture
def seeded() -> Iterator[None]:
    """Start torch's global stream at seed 0, on one thread; put both back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
