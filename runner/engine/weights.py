"""What training starts from and leaves alone: the weights of a checkpoint, and frozen parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from runner.engine import checkpoint
from runner.engine.folders import require_checkpoint
from runner.errors import UserError, did_you_mean, nearest

_LISTED = 6  # names in a message


def start_from(path: Path, networks: dict[str, nn.Module]) -> str:
    """Copy the tensors of a checkpoint whose names and shapes agree; say which were copied and which were not.

    A variant takes those of its name, or of the only network that the checkpoint has.

    Raises:
        UserError: the file cannot be read, or nothing in it fits.
    """
    require_checkpoint(path, "init")
    kind, source = checkpoint.load_weights(path)
    only = next(iter(source.values())) if len(source) == 1 else {}

    # copy what agrees
    copied, left = [], {}
    for variant, network in networks.items():
        saved = source.get(variant, only)
        for name, tensor in _tensors(network.state_dict()):
            full, other = _full_name(variant, name), saved.get(name)
            if isinstance(other, Tensor) and other.shape == tensor.shape:
                tensor.copy_(other)
                copied.append(full)
            else:
                there = f"there {tuple(other.shape)}" if isinstance(other, Tensor) else "not there"
                left[full] = f"{full} {tuple(tensor.shape)} ({there})"

    # say it
    if not copied:
        names = [_full_name(variant, name) for variant, saved in source.items() for name in saved]
        here = _listed(left.values())
        raise UserError(
            f"init={path}: nothing in it fits this network. There: {_listed(names)}. Here: {here}."
        )
    count = f"{len(copied)} of {len(copied) + len(left)}"
    text = f"{kind} of {path}, {count} tensors: {_listed(_grouped(copied, left))}"
    return f"{text}; as initialised: {_listed(left.values())}" if left else text


def freeze(patterns: list[str], networks: dict[str, nn.Module]) -> str:
    """Take the parameters whose names match a pattern out of the training; say which.

    Raises:
        UserError: a pattern matches none, or a network has nothing left to train.
    """
    # every pattern has to match: names, or names with their variant
    parameters = [
        (_full_name(variant, name), name, parameter)
        for variant, network in networks.items()
        for name, parameter in network.named_parameters()
    ]
    for pattern in patterns:
        frozen = [
            p for full, name, p in parameters if fnmatchcase(full, pattern) or fnmatchcase(name, pattern)
        ]
        if not frozen:
            raise _no_match(pattern, patterns, [full for full, *_ in parameters])
        for parameter in frozen:
            parameter.requires_grad_(False)

    # something has to be left
    for variant, network in networks.items():
        if not any(parameter.requires_grad for parameter in network.parameters()):
            which = f" of {variant}" if variant else ""
            raise UserError(f"{_line(patterns)} leaves no parameter{which} to train.", _line(patterns), "")

    trained = [full for full, _, p in parameters if p.requires_grad]
    fixed = {full: p.numel() for full, _, p in parameters if not p.requires_grad}
    return f"{_listed(_grouped(list(fixed), trained))} ({sum(fixed.values()):,} parameters)"


def _no_match(pattern: str, patterns: list[str], names: list[str]) -> UserError:
    """Build the error for a pattern that no parameter's name matches, with the nearest that some do."""
    parts = [name.split(".") for name in names]
    groups = dict.fromkeys(".".join(path[:n]) + ".*" for path in parts for n in range(1, len(path)))
    close = nearest(pattern, [*groups, *names])
    right = None if close is None else _line([close if other == pattern else other for other in patterns])
    tops = dict.fromkeys(path[0] + ".*" * (len(path) > 1) for path in parts)
    message = f"freeze={pattern} matches no parameter.{did_you_mean(close)} Available: {_listed(tops)}."
    return UserError(message, _line(patterns), right)


def _line(patterns: list[str]) -> str:
    """Return the argument of the command line."""
    return f"freeze={patterns[0]}" if len(patterns) == 1 else f"freeze=[{','.join(patterns)}]"


def _tensors(state: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _full_name(variant: str, name: str) -> str:
    return f"{variant}.{name}" if variant else name


def _grouped(names: list[str], others: Collection[str]) -> list[str]:
    """Shorten names to `encoder.*` where all that begins with `encoder.` is among them."""
    groups = []
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) + "." for n in range(1, len(parts)))
        whole = (prefix for prefix in prefixes if not any(other.startswith(prefix) for other in others))
        prefix = next(whole, None)
        groups.append(name if prefix is None else f"{prefix}*")
    return list(dict.fromkeys(groups))


def _listed(names: Collection[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = list(names)[:_LISTED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
