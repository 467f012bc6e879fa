"""A grid: every combination of the swept values of the command line and of the sweep's space."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.types import Override, Transformer, ValueType

from runner.config.command import (
    Command,
    is_hydra,
    is_launcher,
    is_of_sweep,
    parse_override,
    text,
    value_text,
)
from runner.config.compose import Template, compose_template
from runner.config.options import groups, is_option
from runner.errors import UserError

_MAX_VALUES = 100_000  # of one key: more are a slip, and would be listed for hours


def swept_overrides(command: Command, space: dict[str, str]) -> dict[str, Override]:
    """Return what is swept, by key: the space of the YAML files, replaced by the command line's overrides."""
    fixed = {override.key_or_group for override in command.overrides if not override.is_sweep_override()}
    return parse_texts({key: values for key, values in space.items() if key not in fixed}) | command.swept


def parse_texts(texts: Mapping[str, str]) -> dict[str, Override]:
    """Parse the values that a file or a search gives, by key."""
    overrides = [parse_override(f"{key}={value}") for key, value in texts.items()]
    return {override.get_key_element(): override for override in overrides}


def combinations(swept: dict[str, Override]) -> Iterator[dict[str, Override]]:
    """Yield every combination, by key, the last key varying fastest."""
    columns = {key: values(override) for key, override in swept.items()}
    for combination in itertools.product(*columns.values()):
        yield dict(zip(columns, combination, strict=True))


def values(override: Override) -> list[Override]:
    """Return one override per value, each as it would be typed, none twice.

    Raises:
        UserError: the values cannot be enumerated.
    """
    if not override.is_sweep_override():
        return [override]
    if override.is_interval_sweep():
        key = override.key_or_group
        raise UserError(
            f"{text(override)}: a grid needs discrete values, and an interval is continuous. Use {key}=a,b,c, "
            f"{key}=range(start,stop,step), or a search: sweep=optuna."
        )

    sweep: Any = override.value()
    if override.is_range_sweep() and abs(sweep.stop - sweep.start) > _MAX_VALUES * abs(sweep.step):
        raise UserError(f"{text(override)}: expected at most {_MAX_VALUES:,} values.", text(override))

    # each as it would be typed
    words = {"True": "true", "False": "false"}  # Hydra gives Python's; what was quoted keeps its quotes
    key, single = override.get_key_element(), {}
    for element in override.sweep_iterator():
        value = words.get(str(element), Transformer.str(element))
        line = f"{key}={value}"
        single[value] = replace(override, value_type=ValueType.ELEMENT, _value=element, input_line=line)
    return list(single.values())


def first_options(command: Command) -> list[Override]:
    """Return the first combination of the options of groups that are swept."""
    available = groups(command)
    first = [values(o)[0] for o in command.swept.values() if o.key_or_group in available]
    return [override for override in first if is_option(override, available)]


def compose_options(command: Command, fixed: Iterable[Override], options: Iterable[Override]) -> Template:
    """Compose one combination of options of groups, with the sweep's own settings.

    Raises:
        UserError: an override does not fit; the correction is one of what was typed.
    """
    try:
        return compose_template(of_one(command, fixed, options))
    except UserError as error:
        raise as_typed(error, command) from None


def of_one(command: Command, fixed: Iterable[Override], options: Iterable[Override]) -> Command:
    """Return the command of one combination of options of groups, with the sweep's own settings."""
    own = [o for o in command.overrides if is_of_sweep(o) or (is_hydra(o) and not is_launcher(o))]
    own = [o for o in own if not o.is_sweep_override()]
    return replace(command, overrides=[*fixed, *own, *options])


def texts(swept: Mapping[str, Override]) -> dict[str, str]:
    """Return the values of one combination by key, as they would be typed."""
    return {key: value_text(override) for key, override in swept.items()}


def as_typed(error: UserError, command: Command) -> UserError:
    """Turn one job's correction into one of what was typed: its key, or the one value of several."""
    if error.wrong is None or error.wrong in command.typed:
        return error
    key, _, value = error.wrong.partition("=")
    typed = next((line for line in command.typed if line.startswith(f"{key}=")), None)
    if typed is None or not error.right:
        return UserError(str(error))

    # the key, and the whole word among the values: not the rn of rnn
    right_key, _, right_value = error.right.partition("=")
    values = typed.removeprefix(key)
    if value != right_value:
        whole_word = rf"(?<![\w.-]){re.escape(value)}(?![\w.-])"
        values = re.sub(whole_word, lambda _: right_value, values, count=1)
    return UserError(str(error), typed, right_key + values)


def without_sweep(overrides: Iterable[Override]) -> list[Override]:
    """Return the overrides that every job has: neither swept, nor of the sweep itself."""
    return [o for o in overrides if not (o.is_sweep_override() or is_hydra(o) or is_of_sweep(o))]
