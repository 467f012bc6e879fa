"""From a plain config to objects: `_target_` resolved under trust, arguments checked against annotations.

This is the one place that turns text into classes.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn
from torch.optim import Optimizer

from runner.build.schema import (
    INVALID,
    Root,
    choices,
    coerce,
    describe,
    describe_value,
    parameter_types,
    signature,
)
from runner.build.trust import Trust, is_class_of
from runner.config.command import Command, show
from runner.config.compose import Composed, to_yaml
from runner.data import Data
from runner.engine.folders import CONFIG_FILE
from runner.engine.job import Job
from runner.engine.state import LoopConfig, Objective
from runner.errors import UserError, did_you_mean, nearest
from runner.task import Task

_FORGOTTEN = "expected the constructor of {0} to begin with super().__init__{1}."


class Builder:
    """Build the nodes of one config. `composed` says where each key was written, for the messages."""

    def __init__(self, composed: Composed, trust: Trust):
        self.composed, self.trust = composed, trust

    def fail(self, path: str, message: str, right: str | None = None) -> UserError:
        """Return the error of one key: where it was written; the correction is `right`, else the key's default."""
        origin = self._origin(path)
        typed = origin if origin in self.composed.overrides else None
        where = f"{typed}: " if typed else f"{path}{f' ({origin})' if origin else ''}: "
        if typed is None:
            return UserError(f"{where}{message}")
        default = self._default(path)
        if right is None and default is not None:
            right = f"{path}={default}"
        return UserError(f"{where}{message}", typed, None if right == typed else right)

    def _origin(self, path: str) -> str:
        """Return where the key, or the nearest node above it, was last written."""
        parts = path.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((self.composed.written[key] for key in above if key in self.composed.written), "")

    def _default(self, path: str) -> str | None:
        node: Any = self.composed.base
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        return None if isinstance(node, dict) else show(node)

    def node(self, path: str, node: dict[str, Any], **given: Any) -> Any:
        """Build the object of a node with `_target_`; `given` are arguments that the config does not hold."""
        cls, arguments = self.arguments(path, node, given)
        return self.construct(path, cls, arguments | given)

    def factory(self, path: str, node: dict[str, Any]) -> Callable[..., nn.Module]:
        """Return a function that builds a new object each time, from the node's arguments and its own."""
        cls, arguments = self.arguments(path, node, None)

        def make(**more: Any) -> nn.Module:
            try:
                inspect.signature(cls).bind(**arguments | more)
            except TypeError as error:
                takes = ", ".join(more) or "no argument"
                message = (
                    f"expected a class that takes what the task gives ({takes}); {cls.__name__}: {error}."
                )
                raise self.fail(f"{path}._target_", message) from None
            network: nn.Module = self.construct(path, cls, arguments | more, more)
            return network

        return make

    def arguments(
        self, path: str, node: dict[str, Any], given: dict[str, Any] | None
    ) -> tuple[type, dict[str, Any]]:
        """Return the class of a node and its checked arguments; with `given` None some may still be missing."""
        cls = self.resolve(f"{path}._target_", node.get("_target_"))
        parameters = signature(cls)
        hints = parameter_types(cls)

        # each argument that the node holds
        arguments = {}
        for key, value in node.items():
            if key == "_target_":
                continue
            if key not in parameters:
                names = [name for name in parameters if name not in (given or {})]
                raise self.unknown(f"{path}.{key}", f"{cls.__name__} takes no {key}", key, names)
            arguments[key] = self.value(f"{path}.{key}", value, hints.get(key, Any))

        # those without a default
        if given is not None:
            held = arguments | given
            missing = [n for n, p in parameters.items() if p.default is p.empty and n not in held]
            if missing:
                raise UserError(f"{path}: {cls.__name__} needs {', '.join(missing)}, missing in the config.")
        return cls, arguments

    def unknown(self, path: str, what: str, key: str, names: Iterable[str]) -> UserError:
        """Return the error of a key that nothing takes, with the nearest name that is taken."""
        names = list(names)
        close = nearest(key, names)
        hint = did_you_mean(close)
        error = self.fail(path, f"{what}.{hint} It takes: {', '.join(names)}.")
        error.right = error.wrong.replace(key, close, 1) if error.wrong and close else ""
        return error

    def construct(
        self, path: str, cls: type, arguments: dict[str, Any], from_task: Container[str] = ()
    ) -> Any:
        """Call the class; its ValueErrors become errors of the config."""
        try:
            return cls(**arguments)
        except ValueError as error:
            raise self.refused(path, arguments, error, from_task) from None
        except AttributeError as error:
            if "before Module.__init__()" not in str(error):  # torch's words for a network that forgot it
                raise
            raise self.fail(f"{path}._target_", _FORGOTTEN.format(cls.__name__, "()")) from None

    def refused(
        self, path: str, arguments: dict[str, Any], error: Exception, from_task: Container[str] = ()
    ) -> UserError:
        """Return a constructor's error as the error of the key that it is about."""
        text = str(error).strip().rstrip(".")
        key = self._blamed(path, arguments, text)
        if key.rpartition(".")[2] in from_task:
            return UserError(f"{key}, as the task sets it: {text}.")
        return self.fail(key, f"{text}.")

    def _blamed(self, path: str, arguments: dict[str, Any], message: str) -> str:
        """Return the key that a message names, else one whose value it quotes; of several a typed, changed one."""
        prefix = f"{path}." if path else ""
        words = set(re.findall(r"[\w.+-]*\w", message.lower()))

        def values(value: Any) -> set[str]:
            return {str(item).lower() for item in (value if isinstance(value, list | tuple) else [value])}

        named = [key for key in arguments if key.lower() in words]
        suspects = named or [key for key, value in arguments.items() if words & values(value)]
        lines = {key: self.composed.written.get(prefix + key) for key in suspects}
        typed = [key for key, line in lines.items() if line in self.composed.overrides]
        changed = [key for key in typed if lines[key] != f"{prefix}{key}={self._default(prefix + key)}"]
        return prefix + (changed or typed or suspects)[0] if suspects else path

    def value(self, path: str, value: Any, annotation: Any) -> Any:
        """Return one argument in the annotated type; build a nested node.

        Raises:
            UserError: the value does not fit.
        """
        if isinstance(value, dict) and "_target_" in value:
            return self.node(path, value)
        fitted = coerce(value, annotation)
        if fitted is not INVALID:
            return fitted

        # expected, given, and the nearest choice
        expected = describe(annotation)
        if isinstance(value, float) and not math.isfinite(value):
            expected = expected.replace("a number", "a finite number")
        close = nearest(value, choices(annotation)) if isinstance(value, str) else None
        message = f"expected {expected}, got {describe_value(value)}.{did_you_mean(close)}"
        raise self.fail(path, message, f"{path}={close}" if close else None)

    def resolve(self, path: str, target: Any) -> type:
        """Return the class that `_target_` names.

        Raises:
            UserError: it does not exist, or may not be named.
        """
        if not isinstance(target, str) or "." not in target:
            raise self.fail(path, f"expected a class, module.Class, got {describe_value(target)}.")

        # the module, before it is imported
        module_name, _, class_name = target.rpartition(".")
        if not self.trust.allows(module_name):
            raise self.fail(path, f"{target} may not be named: {self.trust.rule(module_name)}")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                raise self.fail(path, f"module {module_name} does not exist.") from None
            raise

        # the class, and where it comes from
        cls = getattr(module, class_name, None)
        if not isinstance(cls, type):
            names = [name for name, value in vars(module).items() if is_class_of(value, module_name)]
            close = nearest(class_name, names)
            hint = f" Did you mean {module_name}.{close}?" if close else f" It has: {', '.join(names)}."
            right = f"{path}={module_name}.{close}" if close else None
            raise self.fail(path, f"{module_name} has no class {class_name}.{hint}", right)
        if not self.trust.allows(cls.__module__):
            raise self.fail(path, f"{target} comes from {cls.__module__}: {self.trust.rule(cls.__module__)}")
        return cls

    def require_subclass(self, key: str, node: dict[str, Any], kind: type, what: str) -> None:
        """Raise UserError where a node's class is not a subclass, before its arguments are checked."""
        path, target = f"{key}._target_", node.get("_target_")
        if not issubclass(self.resolve(path, target), kind):
            raise self.fail(path, f"expected {what}, got {target}.")


def _build_root(build: Builder) -> Root:
    """Check the keys of the root: complete, known, and of their types."""
    # names
    config = {"data": None, "model": None, **build.composed.config}  # no option chosen, no node
    hints = get_type_hints(Root)
    for key in config:
        if key not in hints:
            raise build.unknown(key, f"unknown key {key}", key, hints)
    missing = [key for key in hints if key not in config]
    if missing:
        raise UserError(f"the config lacks {', '.join(missing)}.")

    # values; nodes are built later, by their own classes
    nodes = {k: v for k, v in config.items() if isinstance(v, dict) and coerce(v, hints[k]) is v}
    plain = {key: build.value(key, config[key], hint) for key, hint in hints.items() if key not in nodes}
    root: Root = build.construct("", Root, plain | nodes)
    return root


def _task_arguments(build: Builder, root: Root) -> dict[str, Any]:
    """Build what the task's constructor asks for by name: the data set, and a factory of networks."""
    build.require_subclass("task", root.task, Task, "a runner.task.Task")
    takes = signature(build.resolve("task._target_", root.task["_target_"]))
    given: dict[str, Any] = {}

    # data
    if "data" in takes:
        if root.data is None:
            raise UserError(f"{root.name} needs data: add data=NAME.")
        build.require_subclass("data", root.data, Data, "a runner.data.Data")
        given["data"] = build.node("data", root.data)
        if not hasattr(given["data"], "batch_size"):
            name = type(given["data"]).__name__
            raise build.fail("data._target_", _FORGOTTEN.format(name, "(batch_size, eval_batch_size)"))

    # network
    if "model" in takes:
        if root.model is None:
            raise UserError(f"{root.name} needs a network: add model=NAME.")
        build.require_subclass("model", root.model, nn.Module, "a torch.nn.Module")
        given["model"] = build.factory("model", root.model)
    return given


def build_job(composed: Composed, command: Command, options: dict[str, Any]) -> Job:
    """Check and build everything of a run but its networks; write nothing.

    Raises:
        UserError: an unknown argument, a wrong type, a value out of range, a class that may not be named.
    """
    # the user's own modules
    if command.config_dir is not None and str(command.config_dir.resolve()) not in sys.path:
        sys.path.insert(0, str(command.config_dir.resolve()))

    # the nodes
    build = Builder(composed, Trust(options.get("trust"), command.config_dir))
    root = _build_root(build)
    given = _task_arguments(build, root)
    build.require_subclass("optimizer", root.optimizer, Optimizer, "a torch.optim.Optimizer")
    optimizer_class, optimizer_arguments = build.arguments("optimizer", root.optimizer, {"params": None})
    return Job(
        name=root.name,
        loop=build.construct("loop", LoopConfig, _loop_arguments(build, root.loop)),
        task=build.node("task", root.task, **given),
        data=given.get("data"),
        optimizer=_optimizer_factory(build, optimizer_class, optimizer_arguments),
        schedule=build.node("schedule", root.schedule),
        objective=Objective(root.objective, root.direction),
        seed=root.seed,
        device=root.device,
        precision=root.precision,
        threads=root.threads,
        compile=root.compile,
        deterministic=root.deterministic,
        outputs=Path(root.outputs),
        config=composed.config,
        files={CONFIG_FILE: to_yaml(composed.config), ".hydra/overrides.yaml": to_yaml(composed.overrides)},
        command=command.prefix,
        changes=composed.changes(),
        mode=root.mode,
        checkpoint=None if root.checkpoint is None else Path(root.checkpoint),
    )


def _loop_arguments(build: Builder, node: dict[str, Any]) -> dict[str, Any]:
    """Check the keys of the loop and their types."""
    hints = get_type_hints(LoopConfig)
    for key in node:
        if key not in hints:
            raise build.unknown(f"loop.{key}", f"the loop takes no {key}", key, hints)
    return {key: build.value(f"loop.{key}", value, hints[key]) for key, value in node.items()}


def _optimizer_factory(
    build: Builder, cls: type, arguments: dict[str, Any]
) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Return a function that makes the optimiser of one network's parameters."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = build.construct("optimizer", cls, arguments | {"params": parameters})
        return optimizer

    closure = inspect.signature(cls.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise build.fail(
            "optimizer._target_",
            f"expected an optimizer whose step needs no closure, got {cls.__name__}.",
        )

    # try the values now, on a parameter of no size, not after the data were read
    try:
        make([nn.Parameter()])
    except RuntimeError as error:  # so says torch that two options exclude each other
        raise build.refused("optimizer", arguments, error) from None
    return make
