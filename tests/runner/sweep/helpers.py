"""What the tests of sweeps share: made-up jobs, the commands of the toys, and a sweep's files read back."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from runner.sweep.record import Record, job_name
from runner.sweep.search.study import Search
from tests.conftest import TOYS
from tests.runner.engine.helpers import summary, table
from tests.tables import table as table_of

FLAGS = ["--config-dir", str(TOYS), "-m"]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]

cases = partial(table_of, Path(__file__).with_name("cases.txt"))


def make_record(
    number: int, swept: dict[str, str], value: float | None = None, status: str = "done", **more: Any
) -> Record:
    """Return a job as it is read from its sweep's folder; its config holds what is swept."""
    config: dict[str, Any] = {"name": "toy", "seed": 0, "outputs": "outputs"}
    for key, text in swept.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = text
        with contextlib.suppress(ValueError):
            node[last] = json.loads(text)
    measured = {} if value is None else {"loss": 1 - value, "accuracy": value - 0.01}
    given = {
        "objective": "accuracy/val",
        "direction": "maximize",
        "metrics": {"test": measured},
        "status": status,
    }
    given |= {"seconds": 10.0 + number if status == "done" else None} | more
    return Record(number, job_name(number, swept), swept, config, f"{number:016x}", value=value, **given)


def tell(search: Search, number: int, value: float | None = None, status: str = "done", **more: Any) -> None:
    """Tell a search how a job ended."""
    given = {"metrics": {"val": {"accuracy": value}}, "seconds": 1.0}
    search.tell(number, make_record(number, {}, value, status, **(given | more)))


def missing(names: str, text: object) -> list[str]:
    """Return which of the names, parted by `; `, a message lacks."""
    return [name for name in names.split("; ") if name not in str(text)]


def timeless_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file without what differs between two runs of the same: seconds."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in table(path)]


def statuses(sweep: Path) -> list[str]:
    """Return how each job ended, by number."""
    return [row["status"] for row in table(sweep / "runs.csv")]


def done(sweep: Path) -> set[str]:
    """Return the folders of the jobs that are done or pruned."""
    folders = [path.parent for path in sweep.glob("*/summary.json")]
    return {folder.name for folder in folders if summary(folder)["status"] in ("done", "pruned")}


def logs(sweep: Path) -> dict[str, bytes]:
    """Return what the jobs that are done or pruned have logged, and when they ended."""
    files = ("run.log", "summary.json")
    return {name: b"".join((sweep / name / file).read_bytes() for file in files) for name in done(sweep)}


def jobs(sweep: Path) -> list[str]:
    """Return the folders of the jobs."""
    return sorted(path.name for path in sweep.iterdir() if path.name[0].isdigit())
