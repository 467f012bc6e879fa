"""Where a run comes from: git commits and changes, the user's own modules, the packages; kept in `code/`."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from runner.errors import UserError
from runner.files import atomic_path, read_json
from runner.records.console import shown_path, text_table

__all__ = ["Provenance", "collect", "commits", "differences", "keep", "kept_code"]

_CODE, _PACKAGES = "code", "packages.txt"
_HOME = Path(__file__).resolve().parents[2]
_OURS = ("runner", "experiments", "conf")
_TIMEOUT = 2.0  # seconds for one call of git
_LIMIT = 1_000_000  # bytes that are read of what git prints
_ROWS_SHOWN = 30  # of what differs from the environment of another run

# its folder as `repository`, and `commit`, with `+changes` where files differ from it
Checkout = dict[str, str]


@dataclass(frozen=True)
class Provenance:
    """The repositories by place (runner, folder, config_dir), None where there is none, and the files of `code/`."""

    git: dict[str, Checkout | None]
    files: dict[str, bytes]


def collect(config_dir: Path | None, trust: str | None, again: bool) -> Provenance:
    """Return where the code that this process has imported comes from.

    The jobs of a sweep share one answer, for what is imported stays as it was; `again` looks once more.
    """
    places = {"runner": _HOME, "folder": Path.cwd()}
    if config_dir is not None:
        places["config_dir"] = config_dir.resolve()
    below = f"{places['config_dir']}{os.sep}" if config_dir is not None else None

    # what is imported: ours, and the user's by the path that its name gives it
    ours, own, others = [], {}, {"__main__", *sys.stdlib_module_names}
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        if package in others:  # thousands of modules
            continue
        file = getattr(module, "__dict__", {}).get("__file__")  # asked, a lazy module would import itself
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        if package in _OURS:
            ours.append(file)
        elif "site-packages" in file:
            others.add(package)
        elif package == trust or (below is not None and file.startswith(below)):
            path = name.replace(".", "/")
            own[f"{path}/__init__.py" if file.endswith("__init__.py") else f"{path}.py"] = file

    if again:
        _collect.cache_clear()
    return _collect(tuple(places.items()), tuple(ours), tuple(own.items()))


@cache
def _collect(
    places: tuple[tuple[str, Path], ...], ours: tuple[str, ...], own: tuple[tuple[str, str], ...]
) -> Provenance:
    # the user's modules, and the packages
    files = {_PACKAGES: _packages()}
    for name, file in own:
        with contextlib.suppress(OSError):  # it was removed since
            files[name] = Path(file).read_bytes()

    # the repositories, each asked once
    imported = {*ours, *(file for _, file in own)}
    inside = {folder: _repository(folder) for folder in {Path(file).parent for file in imported}}
    git: dict[str, Checkout | None] = {}
    asked: dict[Path, Checkout | None] = {}
    for place, folder in places:
        root = _repository(folder)
        if root is None or (place == "runner" and root != folder):  # installed within another repository
            git[place] = None
            continue
        if root not in asked:
            theirs = [file for file in imported if inside[Path(file).parent] == root]
            asked[root], patch = _describe(root, theirs, set(ours))
            if patch:
                files[f"{place}.patch"] = patch
        git[place] = asked[root]
    return Provenance(git, files)


def _repository(folder: Path) -> Path | None:
    """Return the working tree of git that a folder lies in."""
    with contextlib.suppress(OSError):  # a parent may not be read
        return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)
    return None


def _describe(root: Path, imported: list[str], ours: set[str]) -> tuple[Checkout | None, bytes]:
    """Return the state of a repository, and a patch of its changes; imported files that it lacks are changes.

    The user's own files are kept whole, so that of these the patch has only ours.
    """
    # the commit, and what differs from it
    status = _git(root, "status", "--porcelain=v2", "--branch", "--untracked-files=no") or b""
    commit = re.search(rb"^# branch\.oid ([0-9a-f]{12,})$", status, re.MULTILINE)
    if commit is None:  # no git, no commit yet, or it takes too long
        return None, b""
    changed = [line for line in status.splitlines() if not line.startswith(b"#")]
    listed = _git(root, "ls-files", "--others", "-z", "--", *imported) if imported else b""
    untracked = [os.fsdecode(name) for name in (listed or b"").split(b"\0") if name]

    checkout = {"repository": str(root), "commit": commit[1][:12].decode()}
    if not changed and not untracked:
        return checkout, b""
    checkout["commit"] += "+changes"

    # the patch
    new = [name for name in untracked if str(root / name) in ours]
    if not changed and not new:
        return checkout, b""
    diffs = [_diff(root, "HEAD")] if changed else []
    diffs += [_diff(root, "--no-index", "--", os.devnull, name) for name in new]
    patch = b"".join(diff or b"" for diff in diffs)
    about = f"# changes to commit {commit[1].decode()} of {root}\n"
    if None in diffs or len(patch) > _LIMIT:
        about += f"# left out: more than {_LIMIT:,} bytes, or {_TIMEOUT:g} s; what differs:\n"
        patch = b"".join(b"# %s\n" % line for line in [*changed, *map(os.fsencode, new)])
    return checkout, about.encode() + patch


def _diff(root: Path, *arguments: str) -> bytes | None:
    """Return a diff that `git apply` takes, whatever the user's settings are."""
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    return _git(root, "diff", *plain, *arguments)


def _git(root: Path, *arguments: str) -> bytes | None:
    """Return what git prints, cut behind the limit; None where it is missing, fails or takes too long."""
    # no lock that another git would wait for, no program that the repository's settings name
    flags = ("--no-optional-locks", "--literal-pathspecs", "-c", "core.fsmonitor=false", "-C", str(root))
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set where a hook of git has called us
    try:
        process = subprocess.Popen(
            ["git", *flags, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in elsewhere},
            start_new_session=True,  # so that what git has started ends with it
        )  # fmt: skip
    except OSError:
        return None

    def kill() -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    with process:
        timer = threading.Timer(_TIMEOUT, kill)
        timer.start()
        assert process.stdout is not None
        output = process.stdout.read(_LIMIT + 1)
        if len(output) > _LIMIT:
            kill()
        timer.cancel()
    # 1: two files differ
    return output if process.returncode in (0, 1) or len(output) > _LIMIT else None


def _packages() -> bytes:
    """Return the installed packages, `name==version`, below the Python that runs."""
    lines: dict[str, str] = {}
    for distribution in distributions():
        with contextlib.suppress(ValueError):  # not UTF-8
            # `distribution.metadata` takes ten times as long: it parses all of the file
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
            head = dict(re.findall(r"^(Name|Version): *(\S+)", text.partition("\n\n")[0], re.MULTILINE))
            if len(head) == 2:  # the first of two with one name is imported
                lines.setdefault(head["Name"].lower(), f"{head['Name']}=={head['Version']}")
    about = f"# Python {platform.python_version()}, {sys.platform} {platform.machine()}"
    return "\n".join([about, *(lines[name] for name in sorted(lines)), ""]).encode()


def keep(files: dict[str, bytes], folder: Path, sweep: Path | None, resumed: bool) -> None:
    """Write `code/` into a run's folder, or once into its sweep's; a resume leaves it as the start wrote it.

    A job has one of its own where that of the sweep is another, as after an edit between two commands.
    """
    if sweep is not None:
        with contextlib.suppress(OSError):  # another job was faster
            if not (sweep / _CODE).exists():
                _write(sweep / _CODE, files)
        if resumed or all(_read(sweep / _CODE / name) == content for name, content in files.items()):
            return
    if not (folder / _CODE).exists():
        _write(folder / _CODE, files)


def _write(place: Path, files: dict[str, bytes]) -> None:
    with atomic_path(place, sync=False) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def kept_code(run: Path) -> Path | None:
    """Return the `code/` of a run: its own, or that of its sweep."""
    places = (run / _CODE, run.resolve().parent / _CODE)
    return next((place for place in places if (place / _PACKAGES).is_file()), None)


def commits(git: Any) -> dict[str, str | None]:
    """Return the commits of a summary as facts, by place; before 0.2 it named the runner's alone."""
    places = git if isinstance(git, dict) else {"runner": {"commit": git}}
    return {f"git {place}": checkout["commit"] if checkout else None for place, checkout in places.items()}


def differences(run: Path, now: Provenance, facts: dict[str, Any]) -> str:
    """Return how this environment differs from that of an earlier run; `facts` are the device and versions now."""
    summary: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # it is damaged
        summary = read_json(run / "summary.json") or {}
    is_known = "versions" in summary  # not where a job of a sweep failed before it began
    code = kept_code(run)
    if not is_known and code is None:
        return (
            f"{shown_path(run)} says nothing of its environment: it holds neither summary.json nor {_CODE}/."
        )

    # what the summary says; of --config-dir, the files say more than its commit
    then = {"device": summary["device"], **summary["versions"], **commits(summary["git"])} if is_known else {}
    then.pop("git config_dir", None)
    current = {name: (facts | commits(now.git)).get(name) for name in then}

    # packages and files
    changed = []
    if code is not None:
        then |= _versions(_read(code / _PACKAGES))
        current |= _versions(now.files[_PACKAGES])
        changed = _changed_files(code, now.files)

    # the table
    names = [name for name in dict.fromkeys([*then, *current]) if then.get(name) != current.get(name)]
    rows = [[name, then.get(name), current.get(name)] for name in names]
    rows += [[name, f"as in {_CODE}/", "another"] for name in changed]
    if not rows:
        return f"The environment is that of {shown_path(run)}."
    more = f"\nand {len(rows) - _ROWS_SHOWN} more: compare {_CODE}/{_PACKAGES}" * (len(rows) > _ROWS_SHOWN)
    return text_table(["environment", "then", "now"], rows[:_ROWS_SHOWN]) + more


def _versions(packages: bytes | None) -> dict[str, str]:
    return dict(re.findall(r"^([^#\s]+)==(\S+)$", (packages or b"").decode(), re.MULTILINE))


def _changed_files(code: Path, files: dict[str, bytes]) -> list[str]:
    """Return the files of `code/` that are others now: modules that both have, and the runner's changes."""
    modules = [name for name in files if name.endswith(".py") and (code / name).exists()]
    return [name for name in (*modules, "runner.patch") if _read(code / name) != files.get(name)]
