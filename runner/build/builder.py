"""From a plain config to objects: `_target_` resolved under trust, arguments checked against annotations.

This is the one place that turns text into classes and functions.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any, Literal, NoReturn, TypeVar

from torch import Tensor, nn

from runner.build.schema import (
    INVALID,
    choices,
    coerce,
    describe,
    describe_value,
    inner_annotation,
    is_kind,
    returned,
    signature,
    takes_any_keyword,
    takes_positional,
)
from runner.build.trust import Trust, lies_in
from runner.config.command import show
from runner.config.compose import Composed
from runner.config.options import leaves
from runner.errors import UserError, did_you_mean, nearest
from runner.outputs import FORGOTTEN_INIT

T = TypeVar("T")
_SETTINGS = {  # Hydra's, of how a node is built, and what each expects
    "_target_": Any,
    "_args_": list,
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["all", "partial", "object"],  # which are the same here: arguments are plain already
}
_RETURNED = (nn.Module, Tensor, float)  # by functions that may be named, beside classes that may be named
FORGOTTEN = "expected the constructor of {0} to begin with super().__init__{1}."


class Builder:
    """Build the nodes of one config. `composed` says where each key was written, for the messages."""

    def __init__(self, composed: Composed, trust: Trust):
        self.composed, self.trust = composed, trust

    def fail(self, path: str, message: str, right: str | None = None) -> NoReturn:
        """Raise the error of one key, with where it was written; `right` corrects it, or else its default does."""
        origin = self._origin(path)
        if origin not in self.composed.overrides:
            raise UserError(f"{path}{f' ({origin})' if origin else ''}: {message}") from None
        right = self._default_line(path) if right is None else right
        raise UserError(f"{origin}: {message}", origin, None if right == origin else right) from None

    def _origin(self, path: str) -> str:
        """Return where a key, or else the nearest node above it, was last written."""
        parts, written = re.sub(r"\[\d+\]", "", path).split("."), self.composed.written
        above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((written[key] for key in above if key in written), "")

    def _is_typed(self, path: str) -> bool:
        """Return whether the command line gives the key another value than its default."""
        line = self.composed.written.get(path)
        return line in self.composed.overrides and line != self._default_line(path)

    def _default_line(self, path: str) -> str | None:
        """Return the override that sets the key to its default, if it has one."""
        defaults = dict(leaves(self.composed.base))
        return f"{path}={show(defaults[path])}" if path in defaults else None

    def node(self, path: str, node: dict[str, Any], annotation: Any = Any, **given: Any) -> Any:
        """Build the object of a node with `_target_`; `given` are arguments that the config does not hold."""
        call = self.resolve(path, node)
        if node.get("_partial_") is not True:
            self._require_kind(path, node, call, annotation)
            return self.construct(path, call, self.arguments(path, call, node, given) | given)

        # a function of what is still missing
        if not is_kind(functools.partial, annotation):
            expected = f"expected {describe(annotation)}, got a function"
            self.fail(f"{path}._partial_", f"{expected}: leave out _partial_.", "")
        self._require_kind(path, node, call, Any)
        arguments = self.arguments(path, call, node, None) | given
        return functools.partial(call, *arguments.pop("_args_", ()), **arguments)

    def factory(self, path: str, call: Callable[..., T], node: dict[str, Any]) -> Callable[..., T]:
        """Return a function that builds a new object each time, from the node's arguments and its own."""
        arguments = self.arguments(path, call, node, None)

        def make(**more: Any) -> T:
            given = arguments | more
            try:
                inspect.signature(call).bind(*given.get("_args_", ()), **_keywords(given))
            except TypeError as error:
                takes = ", ".join(more) or "no argument"
                expected = f"expected a class that takes what the task gives ({takes})"
                self.fail(f"{path}._target_", f"{expected}; {call.__name__}: {error}.")
            return self.construct(path, call, given, more)

        return make

    def arguments(
        self,
        path: str,
        call: Callable[..., Any],
        node: dict[str, Any],
        given: Collection[str] | None,
        name: str = "",
    ) -> dict[str, Any]:
        """Return the checked arguments of a call; with `given` None some may still be missing."""
        parameters, name, prefix = signature(call), name or call.__name__, f"{path}." if path else ""
        settings = {key: node[key] for key in _SETTINGS if key in node and "_target_" in node}
        for key, value in settings.items():
            self.value(f"{path}.{key}", value, _SETTINGS[key], builds=False)
        builds = settings.get("_recursive_", True)

        # each argument that the node holds
        arguments = self._positional(path, call, node, given or (), builds) if "_args_" in settings else {}
        for key, value in node.items():
            if key == "_target_" or key in settings:
                continue
            if key in arguments:
                self.fail(f"{prefix}{key}", f"{key} is given in {prefix}_args_ too.", "")
            if key not in parameters and not takes_any_keyword(call):
                names = [parameter for parameter in parameters if parameter not in (given or ())]
                close = nearest(key, names)
                message = f"{name} takes no {key}.{did_you_mean(close)} It takes: {', '.join(names)}."
                right = self._origin(f"{prefix}{key}").replace(key, close, 1) if close else ""
                self.fail(f"{prefix}{key}", message, right)
            annotation = parameters[key].annotation if key in parameters else Any
            arguments[key] = self.value(f"{prefix}{key}", value, annotation, builds)

        # those without a default
        needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
        needed = [] if "_args_" in arguments else needed
        missing = [key for key in needed if key not in {*arguments, *(needed if given is None else given)}]
        if missing:
            where = f"{path}: " if path else ""
            raise UserError(f"{where}{name} needs {', '.join(missing)}, missing in the config.")
        return arguments

    def _positional(
        self, path: str, call: Callable[..., Any], node: dict[str, Any], given: Collection[str], builds: bool
    ) -> dict[str, Any]:
        """Return the values of `_args_` by name; as they are where the call takes any number of them."""
        parameters = [p for p in signature(call).values() if p.kind is not p.KEYWORD_ONLY]
        named = [
            p for p in parameters if p.name not in given and p.name in inspect.signature(call).parameters
        ]
        values = node["_args_"]
        annotations = [p.annotation for p in named] + [Any] * len(values)
        typed = [
            self.value(f"{path}._args_[{number}]", value, annotation, builds)
            for number, (value, annotation) in enumerate(zip(values, annotations, strict=False))
        ]
        if len(values) <= len(named):
            return {parameter.name: value for parameter, value in zip(named, typed, strict=False)}
        if not takes_positional(call):
            message = f"{call.__name__} takes at most {len(named)} of them, got {len(values)}."
            self.fail(f"{path}._args_", message)
        return {"_args_": typed}

    def construct(
        self,
        path: str,
        call: Callable[..., T],
        arguments: dict[str, Any],
        from_task: Collection[str] = (),
    ) -> T:
        """Call the class or function; its ValueErrors become errors of the config."""
        try:
            built = call(*arguments.get("_args_", ()), **_keywords(arguments))
        except ValueError as error:
            self.blame(path, arguments, error, from_task)
        except AttributeError as error:
            if FORGOTTEN_INIT not in str(error):
                raise
            self.fail(f"{path}._target_", FORGOTTEN.format(call.__name__, "()"))
        except TypeError as error:  # from where a function passes its arguments on
            match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if match is None or match[1] not in arguments or match[1] in inspect.signature(call).parameters:
                raise
            self.fail(f"{path}.{match[1]}", f"{call.__name__} takes no {match[1]}.", "")

        # a function may not keep what its annotation says
        kind = returned(call)
        if kind is not None and not isinstance(built, kind):
            returns = f"is said to return {kind.__name__} and returned {type(built).__name__}"
            self.fail(f"{path}._target_", f"{call.__name__} {returns}.")
        return built

    def blame(
        self, path: str, arguments: dict[str, Any], error: Exception, from_task: Collection[str] = ()
    ) -> NoReturn:
        """Raise a constructor's error as the error of the key that it names, of several of a typed one.

        One that names none is about the only key that was typed, else about the node.
        """
        message, prefix = str(error).strip().rstrip("."), f"{path}." if path else ""
        named = [prefix + word for word in re.findall(r"\w+", message.lower()) if word in arguments]
        typed = [prefix + key for key in arguments if self._is_typed(prefix + key)]
        only = typed if len(typed) == 1 else []
        key = next(iter([key for key in named if key in typed] or named or only), path)
        if key.rpartition(".")[2] in from_task:
            raise UserError(f"{key}, as the task sets it: {message}.") from None
        self.fail(key, f"{message}.")

    def value(self, path: str, value: Any, annotation: Any, builds: bool = True) -> Any:
        """Return one argument in the annotated type; build the nodes in it unless the config says not to."""
        if _holds_node(value):
            return self._nested(path, value, annotation) if builds else value
        fitted = coerce(value, annotation)
        if fitted is INVALID:  # say what was expected, what was given, and the nearest choice
            expected = describe(annotation)
            if isinstance(value, float) and not math.isfinite(value):
                expected = expected.replace("a number", "a finite number")
            close = nearest(value, choices(annotation)) if isinstance(value, str) else None
            message = f"expected {expected}, got {describe_value(value)}.{did_you_mean(close)}"
            self.fail(path, message, f"{path}={close}" if close else None)
        return fitted

    def _nested(self, path: str, value: Any, annotation: Any) -> Any:
        """Return a value with its nodes built, in lists and mappings too."""
        if isinstance(value, dict) and "_target_" in value:
            return self.node(path, value, annotation)
        if not is_kind(type(value), annotation):
            self.fail(path, f"expected {describe(annotation)}, got a {type(value).__name__} of nodes.")
        inner = inner_annotation(annotation)
        if isinstance(value, dict):
            return {key: self.value(f"{path}.{key}", item, inner) for key, item in value.items()}
        return [self.value(f"{path}[{number}]", item, inner) for number, item in enumerate(value)]

    def resolve(self, path: str, node: dict[str, Any]) -> Callable[..., Any]:
        """Return the class or function that a node's `_target_` names, if it exists and may be named."""
        path, target = f"{path}._target_", node.get("_target_")
        if not isinstance(target, str) or "." not in target:
            self.fail(path, f"expected a class, module.Class, got {describe_value(target)}.")

        # the module, before it is imported
        module_name, _, name = target.rpartition(".")
        if not self.trust.allows(module_name):
            self.fail(path, f"{target} may not be named: {self.trust.rule(module_name)}")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                self.fail(path, f"module {module_name} does not exist.")
            raise

        # the class or function, and where it comes from
        found = getattr(module, name, None)
        if not isinstance(found, type | FunctionType) or name.startswith("_"):
            public = [key for key, value in vars(module).items() if isinstance(value, type | FunctionType)]
            own = [key for key in public if lies_in(str(getattr(module, key).__module__), module_name)]
            names = [key for key in own if not key.startswith("_")]
            close = nearest(name, names)
            meant = f"{module_name}.{close}" if close else None
            hint = did_you_mean(meant) or f" It has: {', '.join(names)}."
            self.fail(
                path, f"{module_name} has no class or function {name}.{hint}", meant and f"{path}={meant}"
            )
        if not self.trust.allows(found.__module__):
            self.fail(path, f"{target} comes from {found.__module__}: {self.trust.rule(found.__module__)}")
        if isinstance(found, FunctionType):
            self._require_return(path, target, found)
        return found

    def _require_return(self, path: str, target: str, function: FunctionType) -> None:
        """Raise UserError unless a function says that it returns what a class that may be named makes.

        A stored config can therefore call none that writes, downloads or deletes.
        """
        kind = returned(function)
        if kind is None:
            says = f"def {function.__name__}(...) -> torch.nn.Module"
            self.fail(
                path, f"expected a class, or a function that says what class it returns, such as {says}."
            )
        if not issubclass(kind, _RETURNED) and not self.trust.allows(kind.__module__):
            may = "a network, a tensor, a number or an object of a class that may be named"
            self.fail(path, f"expected a function that returns {may}; {target} returns {kind.__name__}.")

    def _require_kind(
        self, path: str, node: dict[str, Any], call: Callable[..., Any], annotation: Any
    ) -> None:
        """Raise UserError unless what a node makes fits its place."""
        made = returned(call)
        if made is not None and not is_kind(made, annotation):
            got = node["_target_"] if made is call else f"{node['_target_']}, which returns {made.__name__}"
            hint = " Add _partial_: true." if is_kind(functools.partial, annotation) else ""
            self.fail(f"{path}._target_", f"expected {describe(annotation)}, got {got}.{hint}")

    def subclass(self, path: str, node: dict[str, Any], kind: type[T], expected: str) -> Callable[..., T]:
        """Return the class or function of a node if it makes a `kind`, which messages call `expected`."""
        call = self.resolve(path, node)
        made = returned(call)
        if made is None or not issubclass(made, kind):
            self.fail(f"{path}._target_", f"expected {expected}, got {node['_target_']}.")
        return call


def _keywords(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "_args_"}


def _holds_node(value: Any) -> bool:
    """Return whether a node with `_target_` is, or lies in, a value."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_holds_node, value.values()))
    return isinstance(value, list) and any(map(_holds_node, value))
