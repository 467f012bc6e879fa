"""What a sweep combines: the swept values of the command line and of the sweep's space, every one with every other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from hydra.core.override_parser.types import Override

from runner.config.command import SWEEP_KEYS, Command, is_launcher, parse, text
from runner.errors import UserError


def swept_overrides(command: Command, space: dict[str, str]) -> dict[str, Override]:
    """What is swept, by key: the space of the YAML files, with the command line's overrides instead where there are.

    Raises:
        UserError: a line of the space cannot be parsed.
    """
    typed = parse(command.overrides)
    fixed = {override.key_or_group for override in typed if not override.is_sweep_override()}
    written = parse([f"{key}={values}" for key, values in space.items() if key not in fixed])
    found = {override.get_key_element(): override for override in written}
    return found | {o.get_key_element(): o for o in typed if o.is_sweep_override()}


def combinations(swept: dict[str, Override]) -> Iterator[dict[str, str]]:
    """Every combination: override text by key, the last key varying fastest.

    Raises:
        UserError: a key is swept in a way that a grid does not have.
    """
    values = {key: list(dict.fromkeys(texts(override))) for key, override in swept.items()}
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def texts(override: Override) -> list[str]:
    """The values of one override, as they would be typed."""
    if not override.is_sweep_override():
        return [text(override).partition("=")[2]]
    if override.is_interval_sweep():
        key = override.key_or_group
        raise UserError(
            f"{text(override)}: an interval has no end of values, a grid needs some: give "
            f"{key}=a,b,c or {key}=range(start,stop,step), or search: sweep=optuna."
        )
    words = {"True": "true", "False": "false"}  # Hydra gives Python's; what was quoted keeps its quotes
    return [words.get(value, value) for value in override.sweep_string_iterator()]


def lines(swept: dict[str, str]) -> list[str]:
    """The overrides of one combination."""
    return [f"{key}={value}" for key, value in swept.items()]


def as_typed(error: UserError, command: Command) -> UserError:
    """One job's error with the correction made in what was typed: its key, or the one value of several."""
    if error.wrong is None or error.wrong in command.overrides:
        return error
    key, _, value = error.wrong.partition("=")
    typed = next((override for override in command.overrides if override.startswith(f"{key}=")), None)
    if typed is None or not error.right:
        return UserError(str(error))
    right_key, _, right_value = error.right.partition("=")
    among = rf"(?<![\w.-]){re.escape(value)}(?![\w.-])"  # the whole word: not the rn of rnn
    values = typed.removeprefix(key)
    if value != right_value:
        values = re.sub(among, lambda _: right_value, values, count=1)
    return UserError(str(error), typed, right_key + values)


def without_sweep(overrides: Iterable[Override]) -> list[str]:
    """The fixed overrides that every job has: neither swept, nor of the sweep itself."""
    return [
        text(o)
        for o in overrides
        if not o.is_sweep_override() and not is_launcher(o) and o.key_or_group.split(".")[0] not in SWEEP_KEYS
    ]
