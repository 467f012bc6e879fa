"""The shape of the repository: imports run one way, every config composes and builds, every key is explained."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from runner.app import make_job
from runner.config.command import Command
from tests.conftest import REPO

CONF = REPO / "conf"

# a module of the runner imports only from lines above its own: the contract, config, one run, a sweep, the program
LAYERS = """
build.__init__ config.__init__ engine.__init__ records.__init__ sweep.__init__ sweep.figures.__init__
errors
files streams records.console
metrics data device figures schedule spreadsheet engine.checkpoint engine.signals
outputs
config.command
config.setup
config.options config.hydra_errors
config.mistakes config.hydra_job config.values
config.compose
config.show
records.tracker records.provenance
task
engine.state
engine.monitor engine.job engine.folders engine.classification
engine.weights
engine.loop engine.report engine.prepare
engine.session
build.schema build.trust
build.builder compare
build.job
sweep.record sweep.isolation sweep.grid
sweep.space
sweep.leaderboard sweep.work sweep.search.storage
sweep.search.settings
sweep.search.__init__ sweep.search.samplers
sweep.search.study sweep.figures.scales
sweep.figures.settings sweep.figures.curves sweep.figures.optuna sweep.launch sweep.plan sweep.display
sweep.figures.draw sweep.store
sweep.run
app arguments new
completion
cli
__main__
__init__
"""
LAYER = {name: number for number, line in enumerate(LAYERS.splitlines()) for name in line.split()}
EXPERIMENTS_MAY_USE = {"task", "data", "metrics", "figures", "errors", "files", "streams", "spreadsheet"}


def modules(package: str) -> list[Path]:
    return sorted((REPO / package).rglob("*.py"))


def imports(file: Path, at_import: bool = False) -> set[str]:
    """Return the modules that a file imports, or, `at_import`, only those outside functions; none for typing."""
    found = set()
    for node in statements(ast.parse(file.read_text(encoding="utf-8")), at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{file} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if is_module(name)} or {node.module}
    return found


def statements(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        for_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        late = at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if not for_typing and not late:
            yield child
            yield from statements(child, at_import)


def is_module(name: str) -> bool:
    path = REPO.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def names(found: set[str], package: str) -> set[str]:
    """Return the modules of one package among imports; the package itself is its `__init__`."""
    inside = {name for name in found if name == package or name.startswith(f"{package}.")}
    short = {name.removeprefix(package).removeprefix(".") or "__init__" for name in inside}
    return {f"{name}.__init__" if REPO.joinpath(package, name).is_dir() else name for name in short}


def roots(found: set[str]) -> set[str]:
    return {name.split(".")[0] for name in found}


TEMPLATES = modules("runner/templates")  # each an experiment and its test
FILES = {
    ".".join(file.relative_to(REPO / "runner").with_suffix("").parts): file
    for file in modules("runner")
    if file not in TEMPLATES
}


def test_imports_are_read_as_python_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b, c\nfrom runner import config\nfrom runner.errors import nearest\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import never\n"
        "def f():\n    from runner.engine import Job\n    import late\n"
    )
    early = {"a.b", "c", "runner.config", "runner.errors", "typing"}
    assert imports(file, at_import=True) == early
    assert imports(file) == early | {"runner.engine", "late"}


def test_the_runner_imports_downwards_and_knows_no_experiment() -> None:
    assert set(FILES) == set(LAYER)
    for name, file in FILES.items():
        used = names(imports(file, at_import=name == "__init__"), "runner")  # it reaches up when it is called
        assert {other for other in used if LAYER[other] >= LAYER[name]} == set(), name
        assert not {"experiments", "tests"} & roots(imports(file)), name


def test_hydra_stops_at_the_entry_points() -> None:
    using = [name for name, file in FILES.items() if {"hydra", "omegaconf"} & roots(imports(file))]
    assert {name.split(".")[0] for name in using} <= {"cli", "app", "config", "sweep"}


CONFIG = {name for name in LAYER if name.startswith("config.") and name != "config.__init__"}
PROGRAM = {"__init__", "__main__", "cli", "app", "arguments", "completion", "new"}
BEFORE_TORCH = {*PROGRAM, "engine.folders", "files", "errors", *CONFIG}


@pytest.mark.parametrize("name", sorted(BEFORE_TORCH))
def test_what_answers_before_torch_imports_neither_it_nor_what_does(name: str) -> None:
    found = imports(FILES[name], at_import=True)
    assert roots(found) <= {"runner", "hydra", "omegaconf", "yaml", "__future__", *sys.stdlib_module_names}
    assert names(found, "runner") <= BEFORE_TORCH


@pytest.mark.parametrize(
    "file",
    [*modules("experiments"), *(file for file in TEMPLATES if not file.name.startswith("test_"))],
    ids=lambda file: str(file.relative_to(REPO)),
)
def test_experiments_use_the_contract_alone_and_never_each_other(file: Path) -> None:
    place, found = file.relative_to(REPO).parts[1], imports(file)
    assert names(found, "runner") <= (set() if place == "nn" else EXPERIMENTS_MAY_USE)
    ours = {place} if place in ("nn", "data") else {"nn", "data", place}
    assert roots(names(found, "experiments")) <= ours
    assert not {"hydra", "omegaconf"} & roots(found)
    if place == "nn":
        assert roots(found) <= {"torch", "experiments", "__future__", *sys.stdlib_module_names}


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


TRIPLES = list(itertools.product(options("experiment"), options("optimizer"), options("schedule")))
S = len(options("schedule"))


@pytest.mark.parametrize(
    ("experiment", "optimizer", "schedule"),
    [  # quick: each experiment with each optimizer, the schedules in turn
        pytest.param(*triple, marks=() if n % S == n // S % S else pytest.mark.slow)
        for n, triple in enumerate(TRIPLES)
    ],
)
def test_every_combination_builds_and_nothing_leaks_between_options(
    clean_process: None, tmp_path: Path, experiment: str, optimizer: str, schedule: str
) -> None:
    chosen = [f"experiment={experiment}", f"optimizer={optimizer}", f"schedule={schedule}"]
    job = make_job(Command.parse(chosen))
    assert job is not None
    for group, option in (("optimizer", optimizer), ("schedule", schedule)):
        own = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8"))
        assert set(job.config[group]) == set(own)
        assert job.config[group]["_target_"] == own["_target_"]
    assert not list(tmp_path.iterdir())  # checked without a folder, and without the data


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_opens_with_its_command_and_every_debug_option_builds(
    clean_process: None, name: str
) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# @package _global_\n# python -m runner experiment={name}\n")
    for debug in options("debug"):
        assert make_job(Command.parse([f"experiment={name}", f"debug={debug}"])) is not None


@pytest.mark.parametrize("preset", options("preset"))
def test_a_preset_names_its_command_which_builds(clean_process: None, preset: str) -> None:
    text = (CONF / "preset" / f"{preset}.yaml").read_text(encoding="utf-8")
    [command] = re.findall(rf"^# .*python -m runner (experiment=\S+ preset={preset})$", text, re.MULTILINE)
    assert make_job(Command.parse(command.split())) is not None


explained_keys = runpy.run_path(str(REPO / "docs" / "generate_cli.py"))["explained_keys"]


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_every_key_has_its_meaning_on_its_line(file: Path) -> None:
    """An experiment that sets a key of `config.yaml` or of a group's option explains nothing."""
    known: set[str] = set()
    if file.parent.name in ("experiment", "preset", "debug"):
        known = {key for key, *_ in explained_keys(CONF / "config.yaml")}
        for group in ("data", "model", "loop", "optimizer", "schedule"):
            for option in CONF.glob(f"{group}/*.yaml"):
                known |= {f"{group}.{key}" for key, *_ in explained_keys(option)}
    assert [key for key, _, meaning in explained_keys(file) if key not in known and not meaning] == []


PIP_NAMES = {"hydra": "hydra-core", "yaml": "pyyaml", "PIL": "pillow"}


def other_peoples(at_import: bool = False) -> set[str]:
    """Return the packages that ours import, by the names that pip knows."""
    known = sys.stdlib_module_names | {"conf", "experiments", "runner"}
    files = [file for package in ("conf", "experiments", "runner") for file in modules(package)]
    found = {name for file in files for name in roots(imports(file, at_import))} - known
    return {PIP_NAMES.get(name, name.replace("_", "-")) for name in found}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    features = {re.split(r"[<>=\[]", line)[0] for line in extras["features"] + extras["optuna"]}
    # torch-fidelity installs a package `tests`, so it is no extra of ours; a message names it.
    # joblib comes with Hydra's launcher of that name, safetensors with the peers
    optional = features | {"torch-fidelity", "joblib", "safetensors"}
    assert other_peoples() - declared == optional
    assert declared <= other_peoples()
    assert other_peoples(at_import=True) == declared  # what is optional is asked for inside a function
