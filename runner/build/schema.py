"""Config values against the annotations of constructors."""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from runner.config.command import show
from runner.errors import within


@dataclass
class Root:
    """Hold the keys of `config.yaml` with their types; nodes stay dicts, for their own classes."""

    name: str
    description: str
    task: dict[str, Any]
    seed: int
    device: str
    precision: Literal["float32", "bfloat16"]
    threads: int | None
    compile: bool | Literal["reduce-overhead", "max-autotune"]
    deterministic: bool
    objective: str | None
    direction: Literal["maximize", "minimize"]
    mode: str
    checkpoint: str | None
    resume: str | None
    outputs: str
    trust: str | None
    data: dict[str, Any] | None
    model: dict[str, Any] | None
    loop: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    # runs of earlier versions lack these
    figures: bool = True
    init: str | None = None
    freeze: str | list[str] | None = None

    def __post_init__(self) -> None:
        within(0, 2**63, seed=self.seed)
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name must be a folder's name (letters, digits, _, -, dots), got {self.name!r}")
        if self.objective is not None and not self.objective.endswith("/val"):
            raise ValueError(f"objective must be a metric of val, such as accuracy/val, got {self.objective}")
        if (self.objective or "").startswith("loss") and self.direction == "maximize":
            raise ValueError(f"direction must be minimize for objective={self.objective}, got maximize")


def choices(annotation: Any) -> list[str]:
    """Return the words that an annotation allows."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [word for choice in get_args(annotation) for word in choices(choice)]


INVALID = object()
_SEQUENCES = (list, tuple, Sequence)


def coerce(value: Any, annotation: Any) -> Any:
    """Convert a value to the annotated type (an int is a float too); return INVALID where it does not fit."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value

    # choices and unions
    if origin is Literal:
        return value if any(value == choice and type(value) is type(choice) for choice in inner) else INVALID
    if origin in (Union, types.UnionType):
        fits = (coerce(value, choice) for choice in inner)
        return next((fitted for fitted in fits if fitted is not INVALID), INVALID)

    # lists and mappings
    kind = origin or annotation
    if kind in _SEQUENCES:
        return _coerce_sequence(value, kind, inner)
    if kind in (dict, Mapping):
        return value if isinstance(value, dict) else INVALID

    # single values; true is no 1
    if isinstance(value, bool) and annotation in (int, float):
        return INVALID
    if annotation is float:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else INVALID
    if annotation is Path:
        return Path(value) if isinstance(value, str) else INVALID
    return value if isinstance(annotation, type) and isinstance(value, annotation) else INVALID


def _coerce_sequence(value: Any, kind: type, inner: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return INVALID
    if kind is not tuple or not inner or inner[-1] is Ellipsis:
        inner = (inner[0] if inner else Any,) * len(value)
    if len(value) != len(inner):
        return INVALID
    items = [coerce(item, expected) for item, expected in zip(value, inner, strict=True)]
    return INVALID if INVALID in items else items if kind is list else tuple(items)


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping such as {a: 1}",
    Mapping: "a mapping such as {a: 1}",
    type(None): "null",
    Path: "a path",
}


def describe(annotation: Any) -> str:
    """Describe a type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        named = [choice for choice in inner if describe(choice) != getattr(choice, "__name__", "")]
        return " or ".join(dict.fromkeys(describe(choice) for choice in named or inner))
    if origin in _SEQUENCES:
        kind = inner[0] if inner else Any
        item = describe(kind).removeprefix("a ").removeprefix("an ")
        fixed = origin is tuple and inner[-1] is not Ellipsis
        return f"a list of {f'{len(inner)} ' if fixed else ''}{item}s, such as [1,2],"
    return _WORDS.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def describe_value(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str) else show(value)


def signature(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a constructor, annotated as far as their types can be read, else with Any."""
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):
        hints = {}
    takes_any = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in inspect.signature(cls).parameters.values() if p.kind not in takes_any]
    return {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in named}
