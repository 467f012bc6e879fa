"""Checkpoints: named parts in one file, whole or not there; read with `weights_only=True`."""

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

PARTS = ("model", "optimizer", "ema", "step", "progress", "task", "config")


def save(path: Path, parts: dict[str, Any]) -> None:
    """Write the parts to `path`, so that a kill at any instant leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:  # a file: its archive has no name
        torch.save(parts, file)


def load(path: Path) -> dict[str, Any]:
    """Read the parts of a checkpoint onto the CPU, running no code that the file may hold.

    Raises:
        UserError: there is no such file, or it is not a whole checkpoint of this runner.
    """
    if not path.is_file():
        what = "this is a folder; its file is wanted, such as checkpoints/best.pt of a run"
        what = what if path.is_dir() else "there is no such file"
        raise UserError(f"checkpoint={path}: {what}.")
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, and its texts advise to run the file's code
        whole = zipfile.is_zipfile(path) and isinstance(error, pickle.UnpicklingError)
        what = "it holds code, not numbers alone" if whole else "it was cut short, or is another program's"
        raise UserError(
            f"checkpoint={path} cannot be read: {what} ({path.stat().st_size:,} bytes)."
        ) from None
    missing = [name for name in PARTS if not isinstance(parts, dict) or name not in parts]
    if missing:
        raise UserError(
            f"checkpoint={path} is not a checkpoint of this runner: it lacks {', '.join(missing)}."
        )
    return parts


def tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and lists, with its dotted path."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from tensors(value, f"{path}.{number}")


def first_with(bad: Callable[[Tensor], Tensor], state: Any) -> str | None:
    """The path of the first floating-point tensor with an element that is `bad`, or None."""
    for path, tensor in tensors(state):
        if tensor.is_floating_point() and bool(bad(tensor).any()):
            return path
    return None


def first_foreign(state: Any, path: str = "") -> str | None:
    """Says where the state holds what `weights_only=True` refuses to load (NumPy's numbers, say), or None."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        found = (first_foreign(value, f"{path}.{key}".lstrip(".")) for key, value in items)
        return next((where for where in found if where is not None), None)
    if isinstance(state, Tensor) or type(state) in (bool, int, float, complex, str, bytes, type(None)):
        return None
    return f"holds a {type(state).__module__}.{type(state).__qualname__} at {path}"
