"""From the command line to one plain, resolved config, with a message for whatever does not fit.

Everything here answers without importing torch: misspelt groups, options and keys are found by composing
alone. Types and ranges are checked against the constructors, in `build.py`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from runner.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
PATHS = ("checkpoint", "resume", "outputs")  # keys that name a file or a folder
OPEN_NODES = ("sweep.sampler_options.", "sweep.pruner_options.")  # whose keys are those of others
SWEEP_KEYS = ("sweep", "dry_run", "on_error")  # of a sweep, not of its jobs
RUN_OPTIONS = {  # of the call, not of the run, and what they take
    "mode": "train, eval or a mode of the experiment's own",
    "checkpoint": "the path of a checkpoint, RUN_DIR/checkpoints/best.pt",
    "resume": "the path of a run's folder",
    "trust": "the name of a package",
    "outputs": "a folder",
    "runs": "the folders of two runs or more, [A,B]",
}


@dataclass(frozen=True)
class Command:
    """One call of the door: its overrides, and the folder of the user's own YAML and modules."""

    overrides: list[str]
    config_dir: Path | None = None
    multirun: bool = False
    program: str = "python -m runner"

    @property
    def prefix(self) -> str:
        """The call up to its overrides, for the commands that the screen proposes."""
        kept = [o for o in self.overrides if o.startswith(("trust=", "outputs="))]
        return " ".join([self.flags(), *map(quote, kept)])

    def flags(self, multirun: bool = False) -> str:
        """Program and flags, without overrides."""
        folder = [] if self.config_dir is None else ["--config-dir", quote(str(self.config_dir))]
        return " ".join([self.program, *folder, *(["-m"] * multirun)])

    def corrected(self, wrong: str, right: str) -> str:
        """The whole command with one argument replaced; `-m` as `right` is put before the overrides."""
        if right == "-m":
            return " ".join([self.flags(True), *map(quote, self.overrides)])
        replaced = [right if override == wrong else override for override in self.overrides]
        return " ".join([self.flags(self.multirun), *(quote(o) for o in replaced if o)])

    def with_more(self, override: str) -> str:
        """The whole command with one argument more."""
        return " ".join([self.flags(self.multirun), *map(quote, [*self.overrides, override])])

    def folders(self) -> list[Path]:
        """Where YAML is looked for, the first that has a file wins."""
        return [CONF] if self.config_dir is None else [CONF, self.config_dir]


def quote(argument: str) -> str:
    """An argument as it is typed in a shell; in double quotes where it holds single ones."""
    if "'" in argument and not set(argument) & set('"$`\\!'):
        return f'"{argument}"'
    return shlex.quote(argument)


def masked(text: str) -> str:
    """A text for the screen or a file: the passwords of databases' URLs in it are ***."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"((?:password|passwd|pwd)=)[^&\s'\"]*", r"\1***", text)


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{show(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def parse(overrides: list[str]) -> list[Override]:
    """Overrides in Hydra's grammar.

    Raises:
        UserError: one cannot be parsed.
    """
    parser = OverridesParser.create()
    parsed = []
    for number, line in enumerate(overrides):
        if "=" not in line and not line.startswith("~"):
            raise not_a_setting(overrides, number)
        try:
            override = parser.parse_override(grammar(line))
            override.input_line = line
        except HydraException:  # its text names tokens of a grammar
            raise unreadable(line) from None
        if not override.key_or_group:
            raise UserError(f"{line}: the key before the = is missing.", line, "")
        if override.is_sweep_override():
            check_values(override)
        parsed.append(override)
    return parsed


def grammar(line: str) -> str:
    """The override as Hydra reads it: a path that exists stands for itself, whatever its characters.

    The folders of a sweep's jobs are named by what is swept: `0_seed=0,optimizer.lr=0.1`.
    """
    key, _, value = line.partition("=")
    if key == "runs" and value.startswith("[") and value.endswith("]"):
        return f"runs=[{','.join(quoted(f'={path}')[1:] for path in paths_in(value[1:-1]))}]"
    if key.startswith(OPEN_NODES):
        return f"++{line}"  # any key may be there
    return quoted(line) if key in PATHS and value and Path(value).exists() else line


def paths_in(text: str) -> list[str]:
    """The paths of a list, of which those that exist may hold commas: `A/0_seed=0,lr=0.1,A/1_seed=1,lr=0.1`."""
    words = [word.strip() for word in text.split(",")]
    paths = []
    while words:
        lengths = (n for n in range(len(words), 0, -1) if Path(",".join(words[:n])).exists())
        length = next(lengths, 1)
        paths.append(",".join(words[:length]))
        del words[:length]
    return paths


def not_a_setting(overrides: list[str], number: int) -> UserError:
    """A word without `=`: often the shell has cut `key = value` in three."""
    word, after = overrides[number], "".join(overrides[number + 1 : number + 3])
    if after.startswith("="):
        value = after.removeprefix("=").partition(" ")[0]
        return UserError(f"A setting is one word, without spaces around the =: {word}={value}.")
    return UserError(f"{word} is not a setting. Settings are written key=value, such as seed=1.", word, "")


def unreadable(line: str) -> UserError:
    """What is wrong with an override that Hydra's grammar does not know, and what to type instead."""
    key, _, value = line.partition("=")
    open_ones = [a for a, b in ("[]", "{}", "()") if value.count(a) != value.count(b)]
    open_ones += [mark for mark in "'\"" if value.count(mark) % 2]
    if key != key.strip() or value.startswith(" "):
        reason, right = "there must be no spaces around the =", f"{key.strip()}={value.strip()}"
    elif value.startswith("="):
        reason, right = "there are two =", f"{key}={value.lstrip('=')}"
    elif re.search(r"\s[~+]*[\w.@/]+=", value):
        return UserError(f"{line}: these are two settings in one argument; write them without quotes around.")
    elif open_ones:
        return UserError(f"{line} cannot be read: {' and '.join(open_ones)} has no partner.", line, "")
    else:
        reason, right = "a value with special characters is put in quotes", quoted(line)
    return UserError(f"{line} cannot be read: {reason}.", line, right)


def quoted(text: str) -> str:
    """An override with its value as one quoted string."""
    key, _, value = text.partition("=")
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def check_values(override: Override) -> None:
    """A sweep names its values, and has some."""
    line, key = text(override), override.key_or_group
    if isinstance(override.value(), Glob):
        raise UserError(f"{line}: glob is not used here; name the values: {key}=a,b,c.", line, "")
    try:
        empty = not override.is_interval_sweep() and not any(True for _ in override.sweep_iterator())
    except (ValueError, HydraException) as error:  # range(1,5,0)
        raise UserError(f"{line} cannot be read: {error}.", line, "") from None
    if empty:
        raise UserError(f"{line} holds no value.", line, "")


def is_launcher(override: Override) -> bool:
    """Whether it chooses or sets the launcher of a sweep: hydra/launcher=NAME, hydra.launcher.KEY=VALUE."""
    key = override.key_or_group
    return key == "hydra/launcher" or key.startswith("hydra.launcher.")


def text(override: Override) -> str:
    """The override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def run_options(command: Command) -> dict[str, Any]:
    """The values of the keys that say what to do, read before anything is composed.

    Raises:
        UserError: one of them is empty, or not a word.
    """
    found: dict[str, Any] = {}
    for override in parse(command.overrides):
        key, line = override.key_or_group, text(override)
        if key not in RUN_OPTIONS or override.is_sweep_override() or override.is_delete():
            continue
        value = override.value()
        wrong = not isinstance(value, list) if key == "runs" else isinstance(value, bool | list | dict)
        if wrong or value == "":
            raise UserError(f"{line}: {key} takes {RUN_OPTIONS[key]}.")
        found[key] = value if value is None or key == "runs" else str(value)
    return found
