"""`runner new NAME`: write an experiment of the user's own, its task, data, YAML and test, from a template.

Each folder of `templates/` is an experiment called NAME that runs as it stands, behind `--config-dir`. It is
copied to any folder; or, at the root of a clone of this repository, to where the clone keeps such files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import keyword
import re
import sys
from pathlib import Path
from typing import NoReturn

import yaml

from runner.config.command import CONF, Command, parse_override, quote
from runner.config.options import experiments
from runner.errors import UserError, raise_first, unknown

_TEMPLATES = Path(__file__).parent / "templates"
_CLONE = CONF.parent  # where the package is installed instead, there are no tests


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; expected {self.prog} NAME [--template TEMPLATE] [--dir DIR].")


def write_experiment(argv: list[str], program: str) -> str:
    """Write the files of a new experiment; return their names, and the commands that run and test it.

    Raises:
        UserError: the name or the template cannot be used, or a file exists; nothing was written.
    """
    arguments = _read_arguments(argv, program)
    name, folder = arguments.name, arguments.dir
    raise_first([_name_error(name)])

    # the files: in a clone if no folder is named
    files = _read_template(arguments.template, name)
    in_clone = folder is None and Path.cwd() == _CLONE and (_CLONE / "tests").is_dir()
    folder = folder or Path()
    placed = _place_in_clone(files, name) if in_clone else {folder / path: files[path] for path in files}
    raise_first([_place_error(name, list(placed))])
    _write(placed)

    # the commands
    flags = "" if in_clone else f" --config-dir {quote(str(folder))}"
    [test] = [quote(str(path)) for path in placed if path.name == f"test_{name}.py"]
    pytest = re.sub("runner('?)$", r"pytest\1", program)
    commands = [f"{program}{flags} experiment={name}", f"{pytest} {test}", *["make docs"] * in_clone]
    return "\n  ".join(["Wrote:", *map(str, placed)]) + "\n\n" + "\n  ".join(["Next:", *commands])


def _read_arguments(argv: list[str], program: str) -> argparse.Namespace:
    templates = sorted(path.name for path in _TEMPLATES.iterdir())
    about = "Write an experiment of your own: task, data, YAML and test, which run at once."
    parser = _Parser(f"{program} new", description=about, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="of the experiment, and of its module")
    parser.add_argument(
        "--template", default="classifier", help=f"{', '.join(templates)}; default: %(default)s"
    )
    parser.add_argument("--dir", type=Path, help="where to write; default: the current folder")
    arguments = parser.parse_args(argv)
    if arguments.template not in templates:
        raise unknown("template", arguments.template, templates)
    return arguments


def _name_error(name: str) -> UserError | None:
    """Return the error where a name is no identifier, or something that YAML or Hydra reads as a value."""
    word = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    if word and {yaml.safe_load(name), parse_override(f"name={name}").value()} == {name}:
        return None
    other = re.sub(r"\W", "_", name, flags=re.ASCII)
    other = other if other != name and other.isidentifier() else f"my_{other}"
    return UserError(f"expected a name that can be imported, got {name!r}; use another, such as {other}.")


def _place_error(name: str, files: list[Path]) -> UserError | None:
    """Return the error where an experiment or a file exists, or the new module would hide another."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    is_folder = spec is not None and [*(spec.submodule_search_locations or ())] == [str(Path.cwd() / name)]
    existing = [str(path) for path in files if path.exists()]

    if name in experiments(Command([])):
        reason = f"{name} is an experiment already"
    elif existing:
        reason = f"{existing[0]} exists"
    elif name in sys.modules or (spec is not None and not (is_folder and spec.origin is None)):
        reason = f"{name} is a Python module, which {name}.py would hide"
    else:
        return None
    return UserError(f"{reason}; use another name, such as my_{name}.")


def _read_template(template: str, name: str) -> dict[str, str]:
    """Return the files of a template, by their paths, with `name` in place of NAME."""
    folder = _TEMPLATES / template
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".yaml")]
    texts = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return {path.replace("NAME", name): text.replace("NAME", name) for path, text in texts.items()}


def _place_in_clone(files: dict[str, str], name: str) -> dict[Path, str]:
    """Return the files of a template as a clone has them: a package, an option of `conf`, a test."""
    options, test, package = files[f"experiment/{name}.yaml"], files[f"test_{name}.py"], f"experiments.{name}"
    classes = sorted(re.findall(rf"_target_: {name}\.(\w+)", options))
    listed = ", ".join(f'"{cls}"' for cls in classes)
    options = options.replace(f"_target_: {name}.", f"_target_: {package}.")
    test = test.replace(", config_dir=Path(__file__).parent", "")
    return {
        Path(f"experiments/{name}/__init__.py"): (
            f"from {package}.task import {', '.join(classes)}\n\n__all__ = [{listed}]\n"
        ),
        Path(f"experiments/{name}/task.py"): files[f"{name}.py"],
        Path(f"conf/experiment/{name}.yaml"): re.sub(
            "# .*: runner .* exp", "# python -m runner exp", options
        ),
        Path(f"tests/experiments/test_{name}.py"): test.replace("Path)", "Path, clean_process: None)"),
    }


def _write(files: dict[Path, str]) -> None:
    """Write new files, all or none.

    Raises:
        UserError: one could not be written.
    """
    try:
        with contextlib.ExitStack() as undo:
            for path, text in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("x", encoding="utf-8") as file:
                    undo.callback(path.unlink)
                    file.write(text)
            undo.pop_all()
    except OSError as error:
        raise UserError(f"{error}: nothing was written; name another folder with --dir.") from None
