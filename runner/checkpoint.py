"""Checkpoints: named parts in one file, written aside, flushed and renamed; read with `weights_only=True`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.errors import UserError

PARTS = ("model", "optimizer", "ema", "step", "progress", "task", "config")


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file or none of it: aside, flushed to the disk, then renamed over `path`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def save(path: Path, parts: dict[str, Any]) -> None:
    """Write the parts to `path`, so that a kill at any instant leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        torch.save(parts, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Read the parts of a checkpoint onto the CPU, running no code that the file may hold.

    Raises:
        UserError: there is no such file, or it is not a whole checkpoint of this runner.
    """
    if not path.is_file():
        raise UserError(f"checkpoint={path}: there is no such file.")
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a truncated or foreign file
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint={path} cannot be read: {reason}") from None
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


def first_non_finite(state: Any) -> str | None:
    """The path of the first tensor that holds a NaN or an infinity, or None."""
    for path, tensor in tensors(state):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return path
    return None
