"""Checkpoints: named parts in one file, whole or absent; read with `weights_only=True`."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.errors import UserError
from runner.files import atomic_path

_PARTS = ("model", "optimizer", "ema", "step", "progress", "task", "config")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def save(path: Path, parts: dict[str, Any]) -> None:
    """Write the parts to `path`, so that a kill at any instant leaves the old file or the new one."""
    # an open file, because torch would name the archive inside after a path
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(parts, file)


def load(path: Path) -> dict[str, Any]:
    """Read the parts of a checkpoint onto the CPU, running no code that the file may hold.

    Raises:
        UserError: there is no such file, or it is not a whole checkpoint of this runner.
    """
    parts: dict[str, Any] = _read(path, "checkpoint")
    _require_parts(parts, path, "checkpoint")
    return parts


def load_weights(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """Read what `init` names: return the kind of its weights, and those by variant.

    They are the averaged weights where it is clear whose each is, else the trained ones; or a `state_dict` that
    another program has saved.

    Raises:
        UserError: there is no such file, or it is neither.
    """
    parts = _read(path, "init")
    if isinstance(parts, dict) and parts and all(isinstance(value, Tensor) for value in parts.values()):
        return "weights", {"": parts}
    _require_parts(parts, path, "init")
    weights: dict[str, dict[str, Any]] = parts["model"]

    # averages have no names: the parameters', in their order, if there is nothing else, such as buffers
    averages = {
        variant: dict(zip(state, parts["ema"].get(variant, ()), strict=False))
        for variant, state in weights.items()
    }
    for variant, state in weights.items():
        if [t.shape for t in averages[variant].values()] != [t.shape for t in state.values()]:
            return "trained weights", weights
    return "averaged weights", averages


def _read(path: Path, key: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, and its texts advise to run the file's code
        if not path.is_file():
            problem = "expected a file, got a folder" if path.is_dir() else "no such file"
        elif zipfile.is_zipfile(path) and isinstance(error, pickle.UnpicklingError):
            problem = "it holds code, expected tensors and plain values"
        else:
            problem = f"truncated, or another format ({path.stat().st_size:,} bytes)"
        raise UserError(f"{key}={path} cannot be read: {problem}.") from None


def _require_parts(parts: Any, path: Path, key: str) -> None:
    """Raise UserError for a file of another program."""
    missing = [name for name in _PARTS if not isinstance(parts, dict) or name not in parts]
    if missing:
        raise UserError(f"{key}={path} is not a checkpoint of this runner: no {', '.join(missing)}.")


def find_tensor(bad: Callable[[Tensor], Tensor], state: Any) -> str | None:
    """Return the dotted path of the first floating-point tensor with an element that is `bad`, or None."""
    tensors = ((path, leaf) for path, leaf in _leaves(state) if isinstance(leaf, Tensor))
    return next((path for path, t in tensors if t.is_floating_point() and bool(bad(t).any())), None)


def find_unsafe(state: Any) -> str | None:
    """Say where the state holds what `weights_only=True` refuses to load, such as NumPy's numbers, or None."""
    for path, leaf in _leaves(state):
        if not isinstance(leaf, Tensor) and type(leaf) not in _PLAIN:
            return f"holds a {type(leaf).__module__}.{type(leaf).__qualname__} at {path}"
    return None


def _leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, state
