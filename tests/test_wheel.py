"""The wheel holds all that a run needs, and runs from an empty folder without this checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.slow
SOURCES = ("conf", "experiments", "runner", "pyproject.toml", "README.md", "LICENSE")


def pip(*arguments: str | Path) -> None:
    quiet = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *arguments, *quiet], check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout; offline, with the setuptools here."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, folder / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / "src" / name)
    pip("wheel", folder / "src", "--wheel-dir", folder, "--no-build-isolation")
    [built] = folder.glob("*.whl")
    return built


def test_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = {
        str(path.relative_to(REPO))
        for package in ("conf", "experiments", "runner")
        for path in (REPO / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == tracked


def test_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip("install", wheel, "--target", site)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    stand_in = REPO / "tests" / "experiments" / "stand_in"
    script = next((site / "bin").glob("runner*"))
    for program in ([sys.executable, "-m", "runner"], [sys.executable, str(script)]):
        call = ["--config-dir", str(stand_in), "experiment=rnn_fashion", "data=fake_images", "debug=fast"]
        done = subprocess.run([*program, *call], cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "test       before   after" in done.stdout
    summaries = [
        json.loads(f.read_text()) for f in (empty / "outputs" / "rnn_fashion").glob("*/summary.json")
    ]
    assert [summary["git"]["runner"] for summary in summaries] == [
        None,
        None,
    ]  # the wheel ran, not the checkout
