"""From a plain config to objects: `_target_` resolved under trust, arguments checked against annotations.

This is the one place that turns text into classes.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from torch import nn
from torch.optim import Optimizer

from runner.build.schema import INVALID, Root, choices, coerce, describe, describe_value, signature
from runner.build.trust import Trust, lies_in
from runner.config.command import Command, show
from runner.config.compose import Composed, to_yaml
from runner.config.options import leaves
from runner.config.setup import import_own_code
from runner.data import Data
from runner.engine.folders import CONFIG_FILE, OVERRIDES_FILE
from runner.engine.job import Job
from runner.engine.state import LoopConfig, Objective
from runner.errors import UserError, did_you_mean, nearest
from runner.outputs import FORGOTTEN_INIT
from runner.task import Task

T = TypeVar("T")
_FORGOTTEN = "expected the constructor of {0} to begin with super().__init__{1}."


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
        parts, written = path.split("."), self.composed.written
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

    def node(self, path: str, node: dict[str, Any], **given: Any) -> Any:
        """Build the object of a node with `_target_`; `given` are arguments that the config does not hold."""
        cls = self.resolve(path, node)
        return self.construct(path, cls, self.arguments(path, cls, node, given) | given)

    def factory(self, path: str, cls: type[T], node: dict[str, Any]) -> Callable[..., T]:
        """Return a function that builds a new object each time, from the node's arguments and its own."""
        arguments = self.arguments(path, cls, node, None)

        def make(**more: Any) -> T:
            try:
                inspect.signature(cls).bind(**arguments | more)
            except TypeError as error:
                takes = ", ".join(more) or "no argument"
                expected = f"expected a class that takes what the task gives ({takes})"
                self.fail(f"{path}._target_", f"{expected}; {cls.__name__}: {error}.")
            return self.construct(path, cls, arguments | more, more)

        return make

    def arguments(
        self, path: str, cls: type, node: dict[str, Any], given: Collection[str] | None, name: str = ""
    ) -> dict[str, Any]:
        """Return the checked arguments of a class; with `given` None some may still be missing."""
        parameters, name, prefix = signature(cls), name or cls.__name__, f"{path}." if path else ""

        # each argument that the node holds
        arguments = {}
        for key, value in node.items():
            if key == "_target_":
                continue
            if key not in parameters:
                names = [parameter for parameter in parameters if parameter not in (given or ())]
                close = nearest(key, names)
                message = f"{name} takes no {key}.{did_you_mean(close)} It takes: {', '.join(names)}."
                right = self._origin(f"{prefix}{key}").replace(key, close, 1) if close else ""
                self.fail(f"{prefix}{key}", message, right)
            arguments[key] = self.value(f"{prefix}{key}", value, parameters[key].annotation)

        # those without a default
        needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
        missing = [key for key in needed if key not in {*arguments, *(needed if given is None else given)}]
        if missing:
            where = f"{path}: " if path else ""
            raise UserError(f"{where}{name} needs {', '.join(missing)}, missing in the config.")
        return arguments

    def construct(
        self, path: str, cls: type[T], arguments: dict[str, Any], from_task: Collection[str] = ()
    ) -> T:
        """Call the class; its ValueErrors become errors of the config."""
        try:
            built = cls(**arguments)
        except ValueError as error:
            self.blame(path, arguments, error, from_task)
        except AttributeError as error:
            if FORGOTTEN_INIT not in str(error):
                raise
            self.fail(f"{path}._target_", _FORGOTTEN.format(cls.__name__, "()"))
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

    def value(self, path: str, value: Any, annotation: Any) -> Any:
        """Return one argument in the annotated type; build a nested node."""
        if isinstance(value, dict) and "_target_" in value:
            return self.node(path, value)
        fitted = coerce(value, annotation)
        if fitted is INVALID:  # say what was expected, what was given, and the nearest choice
            expected = describe(annotation)
            if isinstance(value, float) and not math.isfinite(value):
                expected = expected.replace("a number", "a finite number")
            close = nearest(value, choices(annotation)) if isinstance(value, str) else None
            message = f"expected {expected}, got {describe_value(value)}.{did_you_mean(close)}"
            self.fail(path, message, f"{path}={close}" if close else None)
        return fitted

    def resolve(self, path: str, node: dict[str, Any]) -> type:
        """Return the class that a node's `_target_` names, if it exists and may be named."""
        path, target = f"{path}._target_", node.get("_target_")
        if not isinstance(target, str) or "." not in target:
            self.fail(path, f"expected a class, module.Class, got {describe_value(target)}.")

        # the module, before it is imported
        module_name, _, class_name = target.rpartition(".")
        if not self.trust.allows(module_name):
            self.fail(path, f"{target} may not be named: {self.trust.rule(module_name)}")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                self.fail(path, f"module {module_name} does not exist.")
            raise

        # the class, and where it comes from
        cls = getattr(module, class_name, None)
        if not isinstance(cls, type):
            classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
            names = [name for name, value in classes.items() if lies_in(value.__module__, module_name)]
            close = nearest(class_name, names)
            meant = f"{module_name}.{close}" if close else None
            hint = did_you_mean(meant) or f" It has: {', '.join(names)}."
            self.fail(path, f"{module_name} has no class {class_name}.{hint}", meant and f"{path}={meant}")
        if not self.trust.allows(cls.__module__):
            self.fail(path, f"{target} comes from {cls.__module__}: {self.trust.rule(cls.__module__)}")
        return cls

    def subclass(self, path: str, node: dict[str, Any], kind: type[T], expected: str) -> type[T]:
        """Return the class of a node if it is a subclass of `kind`, which messages call `expected`."""
        cls = self.resolve(path, node)
        if not issubclass(cls, kind):
            self.fail(f"{path}._target_", f"expected {expected}, got {node['_target_']}.")
        return cls


def _build_root(build: Builder) -> Root:
    """Check the keys of the root that a run has: complete, and of their types; others are read by interpolations."""
    hints = get_type_hints(Root)
    config = {"data": None, "model": None, **build.composed.config}  # no option chosen, no node
    config = {key: value for key, value in config.items() if key in hints}
    # built later, by their own classes
    nodes = {k: v for k, v in config.items() if isinstance(v, dict) and coerce(v, hints.get(k)) is v}
    plain = {key: value for key, value in config.items() if key not in nodes}
    return build.construct("", Root, build.arguments("", Root, plain, nodes, "a run") | nodes)


def _task_arguments(build: Builder, root: Root) -> dict[str, Any]:
    """Build what the task's constructor asks for by name: the data set, and a factory of networks."""
    takes = signature(build.subclass("task", root.task, Task, "a runner.task.Task"))
    given: dict[str, Any] = {}

    # data
    if "data" in takes:
        if root.data is None:
            raise UserError(f"{root.name} needs data: add data=NAME.")
        build.subclass("data", root.data, Data, "a runner.data.Data")
        given["data"] = build.node("data", root.data)
        if not hasattr(given["data"], "batch_size"):
            name = type(given["data"]).__name__
            build.fail("data._target_", _FORGOTTEN.format(name, "(batch_size, eval_batch_size)"))

    # network
    if "model" in takes:
        if root.model is None:
            raise UserError(f"{root.name} needs a network: add model=NAME.")
        network = build.subclass("model", root.model, nn.Module, "a torch.nn.Module")
        given["model"] = build.factory("model", network, root.model)
    return given


def build_job(composed: Composed, command: Command) -> Job:
    """Check and build everything of a run but its networks; write nothing.

    Raises:
        UserError: an unknown argument, a wrong type, a value out of range, a class that may not be named.
    """
    import_own_code(command)
    build = Builder(composed, Trust(command.options.get("trust"), command.config_dir))
    root = _build_root(build)
    given = _task_arguments(build, root)
    optimizer = _optimizer_factory(build, root.optimizer)
    loop = build.arguments("loop", LoopConfig, root.loop, (), "the loop")
    return Job(
        name=root.name,
        loop=build.construct("loop", LoopConfig, loop),
        task=build.node("task", root.task, **given),
        data=given.get("data"),
        optimizer=optimizer,
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
        files={CONFIG_FILE: to_yaml(composed.config), OVERRIDES_FILE: to_yaml(composed.overrides)},
        config_dir=command.config_dir,
        trust=command.options.get("trust"),
        command=command.prefix,
        changes=composed.changes(),
        mode=root.mode,
        checkpoint=None if root.checkpoint is None else Path(root.checkpoint),
        figures=root.figures,
        init=None if root.init is None else Path(root.init),
        freeze=[root.freeze] if isinstance(root.freeze, str) else root.freeze or [],
    )


def _optimizer_factory(build: Builder, node: dict[str, Any]) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Return a function that makes the optimiser of one network's parameters."""
    cls = build.subclass("optimizer", node, Optimizer, "a torch.optim.Optimizer")
    arguments = build.arguments("optimizer", cls, node, ("params",))
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        expected = "an optimizer whose step needs no closure"
        build.fail("optimizer._target_", f"expected {expected}, got {cls.__name__}.")

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return cls(parameters, **arguments)

    # try the values now, on a parameter of no size, not after the data were read
    try:
        make([nn.Parameter()])
    except (ValueError, RuntimeError) as error:  # the latter says that two options exclude each other
        build.blame("optimizer", arguments, error)
    return make
