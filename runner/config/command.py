"""The command line, parsed once: overrides in Hydra's grammar, options of the run, swept values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from runner.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
PATHS = ("checkpoint", "resume", "rerun", "outputs")  # keys that name a file or a folder
OPEN_NODES = ("sweep.sampler_options.", "sweep.pruner_options.")  # which take any key, for Optuna's classes
SWEEP_KEYS = ("sweep", "dry_run", "on_error")  # of a sweep, not of its jobs
RUN_OPTIONS = {  # what to do with a config, not part of it, and what each expects
    "mode": "train, eval or a mode of the experiment",
    "checkpoint": "the path of a checkpoint, RUN_DIR/checkpoints/best.pt",
    "resume": "the path of a run folder",
    "rerun": "the path of a run folder",
    "trust": "the name of a package",
    "outputs": "a folder",
    "runs": "two run folders or more, [A,B]",
}


@dataclass(frozen=True)
class Command:
    """One command: its parsed overrides, and the flags that go with them."""

    overrides: list[Override]
    config_dir: Path | None = None  # the user's own YAML files and modules
    multirun: bool = False
    program: str = "python -m runner"

    @classmethod
    def parse(
        cls,
        argv: Sequence[str],
        config_dir: Path | None = None,
        multirun: bool = False,
        program: str = "python -m runner",
    ) -> Command:
        """Parse the arguments that are not flags, each once.

        Raises:
            UserError: one is no override, or cannot be parsed.
        """
        overrides = []
        for number, word in enumerate(argv):
            if "=" not in word and not word.startswith("~"):
                # the shell has split `key = value` in three, or `key =value` in two
                following = "".join(argv[number + 1 : number + 3])
                if following.startswith("="):
                    value = following.removeprefix("=").partition(" ")[0]
                    raise UserError(f"write overrides without spaces around '=': {word}={value}")
                raise UserError(f"{word}: expected an override key=value, such as seed=1.", word, "")
            overrides.append(parse_override(word))
        return cls(overrides, config_dir, multirun, program)

    @property
    def typed(self) -> list[str]:
        """The overrides as they were typed."""
        return [text(override) for override in self.overrides]

    @cached_property
    def options(self) -> dict[str, Any]:
        """The values of RUN_OPTIONS that were typed.

        Raises:
            UserError: one of them is empty, or of the wrong type.
        """
        options: dict[str, Any] = {}
        for override in self.overrides:
            key = override.key_or_group
            if key not in RUN_OPTIONS or override.is_sweep_override() or override.is_delete():
                continue
            value = override.value()
            is_list = key == "runs"
            unfit = not isinstance(value, list) if is_list else isinstance(value, bool | list | dict)
            if unfit or value == "":
                raise UserError(f"{text(override)}: expected {RUN_OPTIONS[key]}.")
            options[key] = value if value is None or is_list else str(value)
        return options

    @property
    def swept(self) -> dict[str, Override]:
        """The overrides that name several values, by key."""
        return {o.get_key_element(): o for o in self.overrides if o.is_sweep_override()}

    @property
    def prefix(self) -> str:
        """How a proposed command begins: program, flags, where experiments and runs are found, Hydra's node."""
        return self.keeping("trust", "outputs")

    def keeping(self, *keys: str) -> str:
        """Return program and flags with the overrides of these keys, and those of Hydra's own node."""
        own = [o for o in self.overrides if is_hydra(o) and not is_launcher(o)]
        kept = [text(o) for o in self.overrides if o.key_or_group in keys or o in own]
        return " ".join([self.flags(), *map(quote, kept)])

    def flags(self) -> str:
        """Return program and flags, without overrides and without `-m`."""
        folder = [] if self.config_dir is None else ["--config-dir", quote(str(self.config_dir))]
        return " ".join([self.program, *folder])


def parse_override(line: str) -> Override:
    """Parse one override in Hydra's grammar.

    Raises:
        UserError: it cannot be parsed, or sweeps no values.
    """
    key, _, value = line.partition("=")
    # folders of older sweeps are named `0_seed=0,lr=0.1`, which would be read as a sweep
    is_path = key in PATHS and value and Path(value).exists()
    try:
        override = OverridesParser.create().parse_override(quoted(line) if is_path else line)
    except HydraException:  # its text names tokens of a grammar
        raise _unreadable(line) from None
    override.input_line = line

    if not override.key_or_group:
        raise UserError(f"{line}: expected a key before '='.", line, "")
    if override.is_sweep_override():
        _require_values(override)
    return override


def text(override: Override) -> str:
    """Return the override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def value_text(override: Override) -> str:
    """Return the value of an override as it was typed."""
    return text(override).partition("=")[2]


def is_launcher(override: Override) -> bool:
    """Return whether it selects or sets a launcher: hydra/launcher=NAME, hydra.launcher.KEY=VALUE."""
    key = override.key_or_group
    return key == "hydra/launcher" or key.startswith("hydra.launcher.")


def is_hydra(override: Override) -> bool:
    """Return whether it sets Hydra's own node or selects one of its options: a launcher, logging, callbacks."""
    return re.match(r"hydra[./]", override.key_or_group) is not None


def is_of_sweep(override: Override) -> bool:
    """Return whether it sets a sweep itself, not its jobs."""
    return override.key_or_group.split(".")[0] in SWEEP_KEYS


def quote(argument: str) -> str:
    """Quote an argument for a shell; in double quotes where it holds single ones."""
    if "'" in argument and not set(argument) & set('"$`\\!'):
        return f'"{argument}"'
    return shlex.quote(argument)


def quoted(line: str) -> str:
    """Return an override with its value as one quoted string."""
    key, _, value = line.partition("=")
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def masked(message: str) -> str:
    """Replace the passwords of database URLs in a text by ***."""
    message = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", message)
    return re.sub(r"((?:password|passwd|pwd)=)[^&\s'\"]*", r"\1***", message)


def show(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{show(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _unreadable(line: str) -> UserError:
    """Build the error for an override that Hydra's grammar refuses, with a repair where one is obvious."""
    key, _, value = line.partition("=")
    unbalanced = [a for a, b in ("[]", "{}", "()") if value.count(a) != value.count(b)]
    unbalanced += [mark for mark in "'\"" if value.count(mark) % 2]

    if key != key.strip() or value.startswith(" "):
        reason, right = "write it without spaces around '='", f"{key.strip()}={value.strip()}"
    elif value.startswith("="):
        reason, right = "expected one '=', got two", f"{key}={value.lstrip('=')}"
    elif re.search(r"\s[~+]*[\w.@/]+=", value):
        return UserError(f"{line}: two overrides in one argument; write them without quotes around both.")
    elif unbalanced:
        reason, right = f"unbalanced {' and '.join(unbalanced)}", ""
    else:
        reason, right = "quote a value with special characters", quoted(line)
    return UserError(f"{line} cannot be parsed: {reason}.", line, right)


def _require_values(override: Override) -> None:
    """Raise UserError unless a sweep names its values, and has some."""
    line, key = text(override), override.key_or_group
    if isinstance(override.value(), Glob):
        raise UserError(f"{line}: glob is not supported; list the values: {key}=a,b,c.", line)
    try:
        if not override.is_interval_sweep() and not any(True for _ in override.sweep_iterator()):
            raise UserError(f"{line}: expected values, got none.", line)
    except (ValueError, HydraException) as error:  # range(1,5,0)
        raise UserError(f"{line} cannot be parsed: {error}.", line) from None
