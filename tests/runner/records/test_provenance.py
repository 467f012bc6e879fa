"""Where a run comes from: repositories in any state, the modules and packages that are kept, and running again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.records import provenance
from tests.conftest import TOYS, Outcome
from tests.runner.engine.helpers import assert_equal, parts, rows, summary

Cli = Callable[..., Outcome]
COMMAND = ("experiment=toy_variants", "threads=1", "loop.steps=2")


@pytest.fixture(autouse=True)
def own_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let git read no settings of this machine's, and commit as somebody."""
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for role in ("AUTHOR", "COMMITTER"):
        settings |= {f"GIT_{role}_NAME": "a", f"GIT_{role}_EMAIL": "a@b"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_own(folder: Path) -> Path:
    """Copy the toys, as an experiment of one's own, with a package that they import and a module that they do not."""
    shutil.copytree(TOYS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "helper").mkdir()
    for name, text in {"helper/__init__.py": "", "helper/layers.py": "width = 2\n", "unused.py": ""}.items():
        (folder / name).write_text(text)

    # by another name: a test before may have imported the toys
    module = (folder / "toys.py").rename(folder / "own_toys.py")
    text = module.read_text(encoding="utf-8")
    module.write_text(text.replace("import os\n", "import os\nimport helper.layers\n"), encoding="utf-8")
    for file in folder.rglob("*.yaml"):
        file.write_text(file.read_text(encoding="utf-8").replace("toys.", "own_toys."), encoding="utf-8")
    return folder


def commit(folder: Path) -> str:
    """Commit all of a folder, in a repository of its own; return the commit."""
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "x")
    return git(folder, "rev-parse", "HEAD")[:12]


@pytest.fixture
def repository(clean_process: None, tmp_path: Path) -> Path:
    """Return the current folder as a repository with one commit."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "sub" / "b.bin").write_bytes(bytes(range(256)))
    commit(tmp_path)
    return tmp_path


def collected() -> tuple[str | None, str]:
    """Return the state of the current folder, and its patch."""
    origin = provenance.collect(None, None, again=True)
    checkout = origin.git["folder"]
    return checkout and checkout["commit"], origin.files.get("folder.patch", b"").decode()


def edit(root: Path) -> None:
    (root / "a.txt").write_text("one\n2")


def rename(root: Path) -> None:
    git(root, "mv", "a.txt", "sub/ü c.txt")
    (root / "sub" / "ü c.txt").chmod(0o755)


def set_style(root: Path) -> None:
    for key, value in {"diff.noprefix": "true", "color.ui": "always", "diff.external": "false"}.items():
        git(root, "config", key, value)
    edit(root)


@pytest.mark.parametrize("change", [edit, rename, set_style])
def test_the_patch_makes_the_changes_again(repository: Path, tmp_path: Path, change: Callable) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert collected() == (head[:12], "")
    git(repository, "clone", "-q", ".", "clone")
    change(repository)
    state, patch = collected()
    assert state == f"{head[:12]}+changes" and head in patch
    (tmp_path / "clone" / "x.patch").write_text(patch)
    git(tmp_path / "clone", "apply", "x.patch")
    tracked = git(repository, "-c", "core.quotePath=false", "ls-files").splitlines()
    for name in tracked:
        assert (tmp_path / "clone" / name).read_bytes() == (repository / name).read_bytes()


def no_repository(root: Path) -> None:
    shutil.rmtree(root / ".git")


def no_commit(root: Path) -> None:
    no_repository(root)
    git(root, "init", "-q")


def bare(root: Path) -> None:
    git(root, "clone", "-q", "--bare", ".", "bare.git")
    os.chdir("bare.git")
    no_repository(root)


def damaged(root: Path) -> None:
    (root / ".git" / "HEAD").write_text("nothing")


def no_git(root: Path) -> None:
    os.environ["PATH"] = str(root)


def stuck_git(root: Path) -> None:
    (root / "git").write_text("#!/bin/sh\n/bin/sleep 60\n")
    (root / "git").chmod(0o755)
    no_git(root)


@pytest.mark.parametrize("spoil", [no_repository, no_commit, bare, damaged, no_git, stuck_git])
def test_without_an_answer_of_git_there_is_no_state(
    repository: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(provenance, "_TIMEOUT", 0.3 if spoil is stuck_git else 60)
    monkeypatch.setattr(provenance, "_HOME", repository / "sub")  # whose repository is not the runner's
    spoil(repository)
    assert collected() == (None, "")


def test_a_hook_of_another_repository_may_call(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collected()
    monkeypatch.setenv("GIT_DIR", str(repository / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(repository / "index"))
    assert collected() == expected != (None, "")


def test_what_is_untracked_or_binary_or_large_is_named_only(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "notes.txt").write_text("not mine to keep")
    assert collected() == (git(repository, "rev-parse", "HEAD")[:12], "")
    (repository / "sub" / "b.bin").write_bytes(bytes(reversed(range(256))))
    _, patch = collected()
    assert "Binary files a/sub/b.bin and b/sub/b.bin differ" in patch

    (repository / "a.txt").write_text("a longer line\n" * 40)
    monkeypatch.setattr(provenance, "_LIMIT", 400)
    _, patch = collected()
    assert "more than 400 bytes" in patch and "a.txt" in patch and "sub/b.bin" in patch
    assert all(line.startswith("#") for line in patch.splitlines()) and "two" not in patch


def test_an_experiment_that_is_not_committed_yet_is_in_the_patch(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout of the runner: its own files are not kept, but for what the commit lacks."""
    file = repository / "experiments" / "new" / "task.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n\f\ny = 2")
    monkeypatch.setattr(provenance, "_HOME", repository)
    monkeypatch.setitem(sys.modules, "experiments.new.task", type(sys)("experiments.new.task"))
    sys.modules["experiments.new.task"].__file__ = str(file)
    origin = provenance.collect(None, None, again=True)
    assert origin.git["runner"] == origin.git["folder"]
    assert str(origin.git["runner"]["commit"]).endswith("+changes")

    assert set(origin.files) == {"packages.txt", "runner.patch"}
    (repository / "x.patch").write_bytes(origin.files["runner.patch"])
    content = file.read_bytes()
    file.unlink()
    git(repository, "apply", "x.patch")
    assert file.read_bytes() == content


def test_packages_are_those_that_python_imports() -> None:
    lines = provenance.collect(None, None, again=True).files["packages.txt"].decode().splitlines()
    assert lines[0].startswith("# Python 3.") and len(lines) > 50
    listed = dict(line.split("==") for line in lines[1:])
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    assert set(listed) == names > {"torch", "hydra-core"}
    assert list(listed) == sorted(listed, key=str.lower)
    assert all(listed[name] == importlib.metadata.version(name) for name in names)


def kept(code: Path) -> dict[str, str]:
    files = (path for path in code.rglob("*") if path.is_file() and path.name != "packages.txt")
    return {str(path.relative_to(code)): path.read_text(encoding="utf-8") for path in files}


def forget(own: Path) -> None:
    """Forget the modules of a folder, as a new process would."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(f"{own}{os.sep}"):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry != str(own)]


def test_a_run_is_run_again_from_its_folder_alone(
    cli: Cli, tmp_path: Path, last_run: Callable[[], Path]
) -> None:
    own = make_own(tmp_path / "mine")
    state = commit(own)
    (own / "helper" / "layers.py").write_text("width = 3\n")
    done = cli(*COMMAND, "seed=3", config_dir=own)
    assert done.status == 0, done.err
    first = tmp_path / "elsewhere" / "a run"
    shutil.move(last_run(), first)

    # the state, and the modules that were imported
    git = summary(first)["git"]
    assert git["config_dir"] == {"repository": str(own), "commit": f"{state}+changes"}
    assert git["folder"] is None and f"config_dir {state}+changes" in done.out
    files = kept(first / "code")
    assert "-width = 2\n+width = 3\n" in files.pop("config_dir.patch")
    files.pop("runner.patch", None)  # of whoever tests what is not committed
    expected = ("own_toys.py", "helper/__init__.py", "helper/layers.py")
    assert files == {name: (own / name).read_text(encoding="utf-8") for name in expected}

    # the user's folder is lost; the message says what to type
    forget(own)
    shutil.rmtree(own)
    refused = cli("rerun", str(first))
    assert refused.status == 2 and not list((tmp_path / "outputs" / "toy_variants").iterdir())
    typed = shlex.split(refused.err.partition("python -m runner ")[2])
    again = cli(*typed)
    assert again.status == 0, again.err
    assert f"The environment is that of {first.relative_to(tmp_path)}." in again.out

    # the same run, bit for bit
    second = last_run()
    columns = [{k: v for k, v in row.items() if k != "samples_per_second"} for row in rows(first)]
    assert columns == [{k: v for k, v in row.items() if k in columns[0]} for row in rows(second)]
    assert_equal(parts(first)["model"], parts(second)["model"])
    for name in ("config.yaml", "overrides.yaml", "changes.txt"):
        assert (second / ".hydra" / name).read_text() == (first / ".hydra" / name).read_text()
    assert files.items() <= kept(second / "code").items()


def differing(out: str) -> dict[str, list[str]]:
    """Return the rows of the table of what differs."""
    table = re.search(r"^environment.*\n─.*\n((?:.+\n)+)", out, re.MULTILINE)
    cells = (re.split(r"\s{2,}", line.strip()) for line in table[1].splitlines()) if table else []
    return {name: values for name, *values in cells}


def change_summary(run: Path, **changes: Any) -> None:
    (run / "summary.json").write_text(json.dumps(summary(run) | changes))


def test_a_rerun_says_how_the_environment_differs(cli: Cli, toys: Path, last_run: Callable[[], Path]) -> None:
    cli(*COMMAND, config_dir=toys)
    run, code = last_run(), last_run() / "code"
    versions = summary(run)["versions"]
    change_summary(
        run, device="cuda:0", versions=versions | {"python": "3.9.1"},
        git={"runner": {"repository": "there", "commit": "abc"}, "folder": None, "config_dir": None},
    )  # fmt: skip
    listed = (code / "packages.txt").read_text()
    torch = importlib.metadata.version("torch")
    assert listed.count(f"\ntorch=={torch}\n") == 1
    (code / "packages.txt").write_text(listed.replace(f"\ntorch=={torch}\n", "\ntorch==1.0\nlost==2\n"))
    (code / "toys.py").write_text("another")

    again = cli("rerun", str(run), "seed=7", config_dir=toys)
    assert again.status == 0, again.err
    found, now = differing(again.out), summary(last_run())
    expected = {"device": ["cuda:0", now["device"]], "python": ["3.9.1", versions["python"]]}
    expected |= {"torch": ["1.0", torch], "lost": ["2", "–"], "toys.py": ["as in code/", "another"]}
    runner = now["git"]["runner"]
    expected |= {"git runner": ["abc", runner["commit"] if runner else "–"]}
    found.pop("runner.patch", None)
    assert found == expected
    assert now["seed"] == 7 and "seed=7 (0)" in now["changes"] and "loop.steps=2 (null)" in now["changes"]
    assert (last_run() / "run.log").read_text(encoding="utf-8") == again.out

    # without a record of packages, what the summary has; without either, that
    shutil.rmtree(code)
    older = cli("rerun", str(run), config_dir=toys)
    assert set(differing(older.out)) == {"device", "python", "git runner"}
    (run / "summary.json").write_text("{")
    assert "says nothing of its environment" in cli("rerun", str(run), config_dir=toys).out


def test_an_evaluation_names_its_own_command(cli: Cli, toys: Path, last_run: Callable[[], Path]) -> None:
    cli(*COMMAND, config_dir=toys)
    checkpoint = last_run() / "checkpoints" / "last.pt"
    assert cli("mode=eval", f"checkpoint={checkpoint}", config_dir=toys).status == 0
    [evaluation] = (last_run() / "eval").iterdir()
    refused = cli("rerun", str(evaluation), config_dir=toys)
    assert refused.status == 2 and f"for mode=eval use checkpoint={checkpoint}" in refused.err


def test_a_sweep_keeps_the_code_once_and_a_job_what_was_edited(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.sweep.run.draw", lambda *_: [])
    asked: list[tuple[str, ...]] = []
    ask = provenance._git
    monkeypatch.setattr(provenance, "_git", lambda root, *words: asked.append(words) or ask(root, *words))
    provenance._collect.cache_clear()
    own, sweep = make_own(tmp_path / "mine"), tmp_path / "sweep"
    commit(own)
    command = ("-m", *COMMAND, "sweep.dir=sweep")
    assert cli(*command, "seed=0,1", config_dir=own).status == 0
    assert [words[0] for words in asked].count("status") <= 2, "the repositories are asked once for all jobs"
    assert kept(sweep / "code")["helper/layers.py"] == "width = 2\n" and not list(sweep.glob("*_seed*/code"))

    # another command on the same sweep, after an edit
    forget(own)
    provenance._collect.cache_clear()
    (own / "helper" / "layers.py").write_text("width = 3\n")
    assert cli(*command, "seed=0,1,2", config_dir=own).status == 0
    [edited] = sweep.glob("*_seed*/code")
    assert edited.parent.name == "2_seed-2" and kept(edited)["helper/layers.py"] == "width = 3\n"

    # a job is run again with the code of its sweep, in a folder of its own
    forget(own)
    shutil.rmtree(own)
    refused = cli("rerun", str(sweep / "0_seed-0"))
    typed = shlex.split(refused.err.partition("python -m runner ")[2])
    assert typed[1] == str(sweep / "code")
    again = cli(*typed)
    assert again.status == 0 and differing(again.out) == {}, again.out + again.err
    refused = cli("rerun", "sweep")
    assert refused.status == 2 and "sweep/0_seed-0" in refused.err
