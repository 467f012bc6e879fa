"""Config values against the annotations of constructors and functions."""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import EnumType
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
    if isinstance(annotation, EnumType):
        return list(annotation.__members__)
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

    # lists, mappings and functions
    kind = origin or annotation
    if kind is Callable:
        return value if callable(value) else INVALID
    if kind in _SEQUENCES:
        return _coerce_sequence(value, kind, inner)
    if kind in (dict, Mapping):
        return value if isinstance(value, dict) else INVALID

    # single values; true is no 1
    if isinstance(value, bool) and annotation in (int, float):
        return INVALID
    if annotation is float:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else INVALID
    if isinstance(annotation, EnumType) and isinstance(value, str):
        return annotation.__members__.get(value, INVALID)
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
    list: "a list such as [1,2]",
    dict: "a mapping such as {a: 1}",
    Mapping: "a mapping such as {a: 1}",
    type(None): "null",
    Callable: "a function",
    Path: "a path",
}


def describe(annotation: Any) -> str:
    """Describe a type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal or isinstance(annotation, EnumType):
        return "one of " + ", ".join(map(str, inner or choices(annotation)))
    if origin in (Union, types.UnionType):
        plain = [choice for choice in inner if describe(choice) != getattr(choice, "__name__", "")]
        named = inner if set(plain) <= {type(None)} else plain
        return " or ".join(dict.fromkeys(map(describe, named)))
    if origin in _SEQUENCES:
        kind = inner[0] if inner else Any
        item = describe(kind).removeprefix("a ").removeprefix("an ")
        fixed = origin is tuple and inner[-1] is not Ellipsis
        return f"a list of {f'{len(inner)} ' if fixed else ''}{item}s, such as [1,2],"
    return _WORDS.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def describe_value(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str) else show(value)


def signature(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a constructor or function, with Any where no annotation can be read.

    A function that passes **kwargs on has the optional ones of the class that it returns, too.
    """
    hints = _hints(call)
    parameters = inspect.signature(call).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in named}
    if isinstance(call, types.FunctionType) and _takes(call, inspect.Parameter.VAR_KEYWORD):
        passed_on = signature(returned(call) or object)
        found |= {name: p for name, p in passed_on.items() if name not in found and p.default is not p.empty}
    return found


def takes_positional(call: Callable[..., Any]) -> bool:
    """Return whether it takes any number of positional arguments."""
    return _takes(call, inspect.Parameter.VAR_POSITIONAL)


def takes_any_keyword(call: Callable[..., Any]) -> bool:
    """Return whether a function passes arguments on of which no signature is known."""
    passes_on = isinstance(call, types.FunctionType) and _takes(call, inspect.Parameter.VAR_KEYWORD)
    return passes_on and _takes(returned(call) or object, inspect.Parameter.VAR_KEYWORD)


def returned(call: Callable[..., Any]) -> type | None:
    """Return the class of what a class or a function makes; None where a function does not say it."""
    made = call if isinstance(call, type) else _hints(call).get("return")
    return made if isinstance(made, type) and made not in (Any, type(None)) else None


def is_kind(made: type, annotation: Any) -> bool:
    """Return whether objects of a class fit an annotation, as far as that can be told."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(is_kind(made, choice) for choice in inner)
    expected = origin or annotation
    try:
        return expected is Any or not isinstance(expected, type) or issubclass(made, expected)
    except TypeError:  # a protocol that is not runtime-checkable
        return True


def inner_annotation(annotation: Any) -> Any:
    """Return the annotation of the items of a list, or of the values of a mapping."""
    for choice in (annotation, *get_args(annotation)):
        inner = [item for item in get_args(choice) if item is not Ellipsis]
        if get_origin(choice) in (*_SEQUENCES, dict, Mapping) and inner:
            return inner[-1]
    return Any


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(call.__init__ if isinstance(call, type) else call)  # type: ignore[misc]
    except (NameError, TypeError):
        return {}


def _takes(call: Callable[..., Any], kind: Any) -> bool:
    return any(parameter.kind is kind for parameter in inspect.signature(call).parameters.values())
