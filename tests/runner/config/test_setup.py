"""`hydra_setup.py` under `--config-dir`: resolvers and ConfigStore nodes, there before anything is composed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from runner import run
from runner.config.command import CONF, SWEEP_KEYS, Command
from runner.config.compose import compose_command
from runner.config.options import groups
from tests.conftest import Outcome

SETUP = """
import enum, os, pathlib
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from numbers_of_mine import double

class Kind(enum.Enum):
    FLAT = 1
    DEEP = 2

@dataclass
class Head:
    width: int = 8
    kind: Kind = Kind.FLAT
    home: pathlib.Path = pathlib.Path("/home")

OmegaConf.register_new_resolver("double", double)
OmegaConf.register_new_resolver("pair", lambda a: (a, double(a)))
OmegaConf.register_new_resolver("unplain", lambda: {1})
ConfigStore.instance().store(group="head", name="stored", node=Head)
with open(pathlib.Path(__file__).parent / "imports.txt", "a") as file:
    file.write(f"{os.getpid()}\\n")
"""
EXPERIMENT = """# @package _global_
defaults: [/head: stored, _self_]
name: mine
description: nothing
task: {_target_: nothing_of_mine.Nothing, size: "${double:${head.width}}"}
vars: {pair: "${pair:${head.width}}", width: "${head.width}"}
seed: "${vars.width}"
"""


@pytest.fixture
def own(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a setup of its own; what that registers is forgotten afterwards."""
    files = {
        "hydra_setup.py": SETUP,
        "numbers_of_mine.py": "def double(a): return 2 * a\n",
        "experiment/mine.yaml": EXPERIMENT,
        "nothing_of_mine.py": (toys / "toys.py").read_text(),
    }
    for name, text in files.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    monkeypatch.setattr(ConfigStore.instance(), "repo", copy.copy(ConfigStore.instance().repo))
    monkeypatch.setattr(BaseContainer, "_resolvers", dict(BaseContainer._resolvers))
    yield tmp_path / "own"
    for name in ("hydra_setup", "numbers_of_mine", "nothing_of_mine"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("more", [[], ["head.width=3", "head.kind=DEEP", "task.size=${double:2}"]])
def test_ones_own_resolvers_and_nodes_compose_as_in_hydra(
    own: Path, clean_process: None, more: list[str]
) -> None:
    overrides = ["experiment=mine", *more]
    ours = compose_command(Command.parse(overrides, own)).config
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"hydra.searchpath=['file://{own}']", *overrides])
    expected = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(expected, dict)
    expected["vars"]["pair"] = list(expected["vars"]["pair"])  # YAML has neither tuples
    expected["head"]["home"] = str(expected["head"]["home"])  # nor paths
    assert ours == {k: v for k, v in expected.items() if k not in (*SWEEP_KEYS, "runs")}
    assert groups(Command.parse([], own))["head"] == {"stored": Path("ConfigStore/head/stored.yaml")}


def test_it_is_imported_once_however_many_runs_a_process_has(
    own: Path, clean_process: None, last_run: Callable[[], Path]
) -> None:
    first = run("experiment=mine", "threads=1", config_dir=own)
    again = run("experiment=mine", "threads=1", config_dir=own)
    assert first.metrics == again.metrics
    assert run(f"resume={first.folder}", "loop.steps=2", config_dir=own).status == "done"
    assert len((own / "imports.txt").read_text().split()) == 1


def test_a_run_folder_names_no_code(own: Path, clean_process: None, cli: Callable[..., Outcome]) -> None:
    folder = run("experiment=mine", "threads=1", config_dir=own).folder
    (own / "hydra_setup.py").rename(folder / "hydra_setup.py")
    (folder / ".hydra" / "hydra_setup.py").write_text("raise SystemExit('ran')")
    for name in ("hydra_setup", "numbers_of_mine", "nothing_of_mine"):
        sys.modules.pop(name)
    assert cli(f"resume={folder}", "loop.steps=2", config_dir=own).status == 0
    assert len((own / "imports.txt").read_text().split()) == 1 and "hydra_setup" not in sys.modules


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ("import missing_module\n", "hydra_setup.py, line 1: ModuleNotFoundError: No module named"),
        ("x = 1\nx = (\n", "hydra_setup.py, line 2: SyntaxError: '('"),
        ("\nfrom numbers_of_mine import double\ndouble(None)\n", "numbers_of_mine.py, line 1: TypeError"),
        ("raise SystemExit(3)", "hydra_setup.py, line 1: SystemExit: 3"),
        (SETUP.replace('"pair"', '"double"'), "line 19: ValueError: resolver 'double' is already registered"),
        (SETUP.replace("(a, double(a))", "{a}"),
         "vars.pair cannot be resolved: expected a number, a text, a list or a mapping, got set."),
    ],
)  # fmt: skip
def test_a_mistake_in_it_is_one_message(
    own: Path, cli: Callable[..., Outcome], setup: str, words: str
) -> None:
    (own / "hydra_setup.py").write_text(setup)
    done = cli("experiment=mine", config_dir=own)
    assert done.status == 2 and words in done.err and "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1 and not Path("outputs").exists()


@pytest.mark.slow
def test_workers_of_a_launcher_import_it_too(own: Path, process: Callable[..., Outcome]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = ["experiment=mine", "head.width=2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = process("-m", *command, "threads=1", config_dir=own)
    assert done.status == 0 and "2 ok" in done.out, done
    imports = (own / "imports.txt").read_text().split()
    assert len(imports) > 1 and len(imports) == len(set(imports))  # once in each process
