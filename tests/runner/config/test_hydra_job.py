"""Hydra's own node at work: what a task and its callbacks see here is what they see under `hydra.main`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from runner import run
from runner.config.command import CONF
from runner.config.options import literal
from tests.conftest import Outcome

OWN = {
    "experiment/seen.yaml": """# @package _global_
name: seen
description: writes what it sees
task: {_target_: seen.Seen, name: "${hydra:job.name}", num: "${hydra:job.num}", cwd: "${hydra:runtime.cwd}"}
seed: 3
hydra:
  job: {name: "named_${name}"}
""",
    "seen.py": """
import json, logging, os
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from runner.task import Task

def write(event, **what):
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps({"event": event, **what}) + "\\n")

def observe(name, num, cwd):
    own = HydraConfig.get()
    output = Path(own.runtime.output_dir)
    logging.getLogger("mine").debug("a line of the log")
    write(
        "task", name=name, num=num, cwd=cwd, job=own.job.get("num"), choice=own.runtime.choices.optimizer,
        overrides=sorted(own.overrides.task), dirname=own.job.override_dirname, mode=str(own.mode),
        variable=os.environ.get("MINE"), inside=Path.cwd().resolve() == output.resolve(),
        level=logging.getLogger("mine").getEffectiveLevel(), root=logging.getLogger().level,
    )

class Seen(Task):
    def __init__(self, name: str, num: int | None, cwd: str):
        self.given = name, num, cwd
        HydraConfig.get()

    def after(self, run):
        observe(*self.given)

class Mine(Callback):
    def __init__(self, tag: str = "mine"):
        self.tag, self.jobs = tag, 0

    def on_run_start(self, config, **kwargs): write("run_start", tag=self.tag, seed=config.seed, given=sorted(kwargs))
    def on_run_end(self, config, job_return, **kwargs): write("run_end", status=str(job_return.status))
    def on_multirun_start(self, config, **kwargs): write("multirun_start", given=sorted(kwargs))
    def on_multirun_end(self, config, **kwargs): write("multirun_end", jobs=self.jobs)
    def on_job_start(self, config, task_function, **kwargs):
        self.jobs += 1
        write("job_start", num=config.hydra.job.get("num"), output=Path(config.hydra.runtime.output_dir).is_dir())
    def on_job_end(self, config, job_return, **kwargs):
        write("job_end", status=str(job_return.status), overrides=sorted(job_return.overrides))
""",
    "app.py": """
import sys, hydra
from seen import observe

@hydra.main(config_path=sys.argv.pop(1), config_name="config", version_base="1.3")
def main(config):
    observe(config.task.name, config.task.num, config.task.cwd)

main()
""",
}
CALLBACK = "+hydra.callbacks.mine={_target_:seen.Mine,tag:x}"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in OWN.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.txt"))
    yield tmp_path / "own"
    sys.modules.pop("seen", None)


def events(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "seen.txt").read_text()
    (tmp_path / "seen.txt").unlink()
    return [json.loads(line) for line in text.splitlines()]


def stock(own: Path, *overrides: str) -> list[dict[str, Any]]:
    """Return what the same task sees under `hydra.main`, in `stock/` or `stock/NUMBER`."""
    places = ["hydra.run.dir=stock", "hydra.sweep.dir=stock", f"hydra.searchpath=['file://{own}']"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(own), str(CONF.parent)])}
    command = [sys.executable, str(own / "app.py"), str(CONF), *overrides, *places]
    subprocess.run(command, cwd=own.parent, env=environment, check=True, capture_output=True, timeout=300)
    return events(own.parent)


def without_levels(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave the levels of loggers out: here Python's logging stays as it is unless it is asked for."""
    return [{key: value for key, value in event.items() if key not in ("level", "root")} for event in seen]


SINGLE = [
    ["optimizer=adam", "+hydra.job.env_set.MINE=4", CALLBACK],
    ["hydra.job.chdir=true", "hydra.verbose=mine", "hydra.job.name=short"],
    ["hydra.verbose=true", "hydra/job_logging=stdout"],
]


@pytest.mark.parametrize("overrides", SINGLE, ids=" ".join)
def test_a_run_sees_what_it_sees_under_hydra_main(
    own: Path, clean_process: None, tmp_path: Path, overrides: list[str]
) -> None:
    command = ["experiment=seen", "threads=1", *overrides]
    folder = run(*command, config_dir=own).folder
    ours, theirs, logging_asked = events(tmp_path), stock(own, *command), CALLBACK not in overrides
    assert without_levels(ours) == without_levels(theirs)
    assert not logging_asked or ours == theirs

    # the same three files, with the same keys; what differs are places, and the search path that we pass
    files = [
        {
            name: yaml.safe_load((place / ".hydra" / f"{name}.yaml").read_text())
            for name in ("hydra", "overrides")
        }
        for place in (folder, tmp_path / "stock")
    ]
    for content in files:
        node = content["hydra"]["hydra"]
        del node["runtime"]["config_sources"], node["runtime"]["output_dir"], node["run"], node["sweep"]
        lines = node["overrides"]["hydra"]
        node["overrides"]["hydra"] = sorted(line for line in lines if not re.search(r"\.(dir|mode)=", line))
    assert files[0] == files[1]
    logs = [sorted(path.name for path in place.glob("*.log")) for place in (folder, tmp_path / "stock")]
    assert set(logs[0]) - {"run.log"} == (set(logs[1]) if logging_asked else set())


def test_the_jobs_of_a_sweep_see_what_they_see_under_hydra_main(
    own: Path, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    command = ["experiment=seen", "threads=1", "seed=5,6", "optimizer=adam,sgd", CALLBACK]
    assert cli("-m", *command, config_dir=own).status == 0
    ours = events(tmp_path)
    assert [event["event"] for event in ours] == [
        "multirun_start", *["job_start", "task", "job_end"] * 4, "multirun_end",
    ]  # fmt: skip
    assert without_levels(ours) == without_levels(stock(own, "-m", *command))


def test_a_resume_and_an_evaluation_take_hydras_node_from_the_caller_and_values_from_the_run(
    own: Path, cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(
        "experiment=seen", "optimizer=adam", "threads=1", "hydra.job.name=first", config_dir=own
    ).folder
    [first] = events(tmp_path)
    monkeypatch.chdir(tmp_path / "own")

    # what a stranger may have written into the folder
    file = tmp_path / folder / ".hydra" / "hydra.yaml"
    content = yaml.safe_load(file.read_text())
    content["hydra"]["callbacks"] = {"evil": {"_target_": "seen.Mine"}}
    content["hydra"]["job"]["env_set"] = {"MINE": "evil"}
    content["hydra"]["runtime"]["choices"]["model"] = "${oc.env:SEEN}"
    file.write_text(yaml.safe_dump(content))

    evaluate = ["mode=eval", f"checkpoint={tmp_path / folder}/checkpoints/last.pt"]
    for command in ([f"resume={tmp_path / folder}", "loop.epochs=20"], evaluate):
        typed = "+hydra.job.env_set.MINE=typed"
        assert cli(*command, typed, config_dir=own).status == 0
        [again] = [event for event in events(tmp_path) if event["event"] == "task"]
        assert {**again, "overrides": []} == {
            **first, "overrides": [], "dirname": again["dirname"], "variable": "typed",
        }  # fmt: skip
    monkeypatch.chdir(tmp_path)


def test_what_a_run_has_stored_is_data(own: Path, clean_process: None, cli: Callable[..., Outcome]) -> None:
    (own / "hydra_setup.py").write_text(
        "from omegaconf import OmegaConf\n"
        "OmegaConf.register_new_resolver('ran', lambda: open('ran', 'w').close(), replace=True)\n"
    )
    folder = run("experiment=seen", "threads=1", config_dir=own).folder
    stored = folder / ".hydra" / "config.yaml"
    stored.write_text(yaml.safe_dump(yaml.safe_load(stored.read_text()) | {"description": "${ran:}"}))
    assert cli(f"resume={folder}", "loop.epochs=20", config_dir=own).status == 0
    assert yaml.safe_load(stored.read_text())["description"] == "${ran:}" and not Path("ran").exists()
    OmegaConf.clear_resolver("ran")


@pytest.mark.parametrize("text", ["${x}", "a \\${x} b", "\\\\${x}\\", "${", "c:\\d\\${a:${b}}", "plain \\"])
def test_a_literal_text_is_interpolated_to_itself(text: str) -> None:
    config = OmegaConf.create(literal({"a": [text]}))
    assert OmegaConf.to_container(config, resolve=True) == {"a": [text]}


@pytest.mark.parametrize(
    ("subdir", "names"),
    [
        ("'${hydra.job.num}/${hydra.job.override_dirname}'", ["0/experiment=seen,seed=1,threads=1", "1/"]),
        ("'${name}_${seed}'", ["seen_1", "seen_2"]),
        ("same", "would share same"),
        ("/tmp", "expected a folder of the sweep's"),
        ("../x", "expected a folder of the sweep's"),
        ("'${nothing}'", "hydra.sweep.subdir=${nothing}"),
    ],
)
def test_the_folders_of_jobs_are_named_by_sweep_subdir_and_never_shared(
    own: Path, cli: Callable[..., Outcome], tmp_path: Path, subdir: str, names: list[str] | str
) -> None:
    command = ["experiment=seen", "threads=1", "seed=1,2", "sweep.dir=sweep", f"hydra.sweep.subdir={subdir}"]
    done = cli("-m", *command, config_dir=own)
    if isinstance(names, str):
        assert done.status == 2 and names in done.err and not (tmp_path / "sweep").exists()
        return
    assert done.status == 0, done.err
    found = sorted(str(path.parent.relative_to("sweep")) for path in Path("sweep").rglob("summary.json"))
    assert [f.startswith(name) for f, name in zip(found, names, strict=True)] == [True, True]


def test_a_number_of_ones_own_makes_no_new_job_of_an_old_one(own: Path, cli: Callable[..., Outcome]) -> None:
    command = ["-m", "experiment=seen", "threads=1", "sweep.dir=sweep"]
    assert cli(*command, "seed=1,2", config_dir=own).status == 0
    assert "4 jobs\n" in cli(*command, "seed=3,2,1,4", config_dir=own).out
    saved = [json.loads(Path(f"sweep/.sweep/jobs/{number}.json").read_text()) for number in range(4)]
    assert [(job["config"]["seed"], job["config"]["task"]["num"]) for job in saved] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 3),
    ]
