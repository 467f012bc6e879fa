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


def save(path: Path, parts: dict[str, Any]) -> None:
    """Write the parts to `path`, so that a kill at any instant leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # an open file, because torch would name the archive inside after a path
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(parts, file)


def load(path: Path) -> dict[str, Any]:
    """Read the parts of a checkpoint onto the CPU, running no code that the file may hold.

    Raises:
        UserError: there is no such file, or it is not a whole checkpoint of this runner.
    """
    try:
        parts: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, and its texts advise to run the file's code
        raise UserError(f"checkpoint={path} cannot be read: {_problem(path, error)}.") from None

    missing = [name for name in _PARTS if not isinstance(parts, dict) or name not in parts]
    if missing:
        raise UserError(f"checkpoint={path} is not a checkpoint of this runner: no {', '.join(missing)}.")
    return parts


def _problem(path: Path, error: Exception) -> str:
    if not path.is_file():
        return "expected a file, got a folder" if path.is_dir() else "no such file"
    if zipfile.is_zipfile(path) and isinstance(error, pickle.UnpicklingError):
        return "it holds code, expected tensors and plain values"
    return f"truncated, or another format ({path.stat().st_size:,} bytes)"


def find_tensor(bad: Callable[[Tensor], Tensor], state: Any) -> str | None:
    """Return the dotted path of the first floating-point tensor with an element that is `bad`, or None."""
    for path, tensor in _tensors(state):
        if tensor.is_floating_point() and bool(bad(tensor).any()):
            return path
    return None


def _tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield path, state
    for key, value in _items(state):
        yield from _tensors(value, f"{path}.{key}".lstrip("."))


def _items(state: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(state, dict):
        yield from state.items()
    elif isinstance(state, list | tuple):
        yield from enumerate(state)


def find_unsafe(state: Any, path: str = "") -> str | None:
    """Say where the state holds what `weights_only=True` refuses to load, such as NumPy's numbers, or None."""
    if isinstance(state, dict | list | tuple):
        problems = (find_unsafe(value, f"{path}.{key}".lstrip(".")) for key, value in _items(state))
        return next((problem for problem in problems if problem is not None), None)
    if isinstance(state, Tensor) or type(state) in (bool, int, float, complex, str, bytes, type(None)):
        return None
    return f"holds a {type(state).__module__}.{type(state).__qualname__} at {path}"
