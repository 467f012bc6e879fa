"""From a plain config to objects: `_target_` resolved under trust, arguments held against annotations.

This is the one place that turns text into classes. What it may name: classes of `experiments`, of
`torch.optim`, of the runner itself, and of files under a folder that the *caller* named. A config that was
stored with a run cannot widen that.
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
    quotations,
    signature,
)
from runner.build.trust import is_class_of, is_inside, require_ours
from runner.config.command import Command, show
from runner.config.compose import Composed, to_yaml
from runner.data import Data
from runner.engine.folders import CONFIG_FILE
from runner.engine.job import Job
from runner.engine.state import LoopConfig, Objective
from runner.errors import UserError, did_you_mean, nearest
from runner.task import Task

FORGOTTEN = "expected the constructor of {0} to begin with super().__init__{1}."


class Builder:
    """Builds the nodes of one config; `call` says whom the user trusts, `composed` where keys were written."""

    def __init__(self, composed: Composed, command: Command, trust: str | None):
        self.composed, self.command, self.trust = composed, command, trust

    def fail(self, path: str, message: str, right: str | None = None) -> UserError:
        """The error of one key: where it was written, and in the corrected command `right` or its default."""
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
        """Where the key, or the nearest node above it, was last written."""
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
        """The object that a node with `_target_` describes; `given` are arguments that come from us."""
        cls, arguments = self.arguments(path, node, given)
        return self.construct(path, cls, arguments | given)

    def factory(self, path: str, node: dict[str, Any]) -> Callable[..., nn.Module]:
        """A call that gives a fresh object each time, with the node's arguments and the call's."""
        cls, arguments = self.arguments(path, node, None)

        def fresh(**more: Any) -> nn.Module:
            try:
                inspect.signature(cls).bind(**arguments | more)
            except TypeError as error:
                what = f"{cls.__name__} is not what this task builds, with {', '.join(more) or 'no argument'}"
                raise self.fail(f"{path}._target_", f"{what}: {error}.") from None
            return self.construct(path, cls, arguments | more, more)

        return fresh

    def arguments(
        self, path: str, node: dict[str, Any], given: dict[str, Any] | None
    ) -> tuple[type, dict[str, Any]]:
        """The class of a node, and its arguments checked; with `given` None some may still be missing."""
        cls = self.resolve(f"{path}._target_", node.get("_target_"))
        parameters = signature(cls)
        hints = parameter_types(cls)
        found = {}
        for key, value in node.items():
            if key == "_target_":
                continue
            if key not in parameters:
                names = [name for name in parameters if name not in (given or {})]
                raise self.unknown(f"{path}.{key}", f"{cls.__name__} takes no {key}", key, names)
            found[key] = self.value(f"{path}.{key}", value, hints.get(key, Any))
        missing = [
            n for n, p in parameters.items() if p.default is p.empty and n not in found | (given or {})
        ]
        if missing and given is not None:
            raise UserError(
                f"{path}: {cls.__name__} needs {', '.join(missing)}, which the config does not give."
            )
        return cls, found

    def unknown(self, path: str, what: str, key: str, names: Iterable[str]) -> UserError:
        """A key that nothing takes, with the nearest that something does."""
        names = list(names)
        close = nearest(key, names)
        hint = did_you_mean(close)
        error = self.fail(path, f"{what}.{hint} It takes: {', '.join(names)}.")
        error.right = error.wrong.replace(key, close, 1) if error.wrong and close else ""
        return error

    def construct(
        self, path: str, cls: type, arguments: dict[str, Any], from_task: Container[str] = ()
    ) -> Any:
        """Call the class; a ValueError of its is the user's to mend."""
        try:
            return cls(**arguments)
        except ValueError as error:
            raise self.refused(path, arguments, error, from_task) from None
        except AttributeError as error:
            if "before Module.__init__()" not in str(error):  # torch's words for a network that forgot it
                raise
            raise self.fail(f"{path}._target_", FORGOTTEN.format(cls.__name__, "()")) from None

    def refused(
        self, path: str, arguments: dict[str, Any], error: Exception, from_task: Container[str] = ()
    ) -> UserError:
        """What a constructor said of its arguments, as the error of the key that it is about."""
        text = str(error).strip().rstrip(".")
        key = self.blamed(path, arguments, text)
        if key.rpartition(".")[2] in from_task:
            return UserError(f"{key}, as the task sets it: {text}.")
        return self.fail(key, f"{text}.")

    def blamed(self, path: str, arguments: dict[str, Any], message: str) -> str:
        """The key that a constructor's message is about: one that it names, else one whose value it quotes.

        Of several, the one that was typed and is not as it was by default.
        """
        prefix = f"{path}." if path else ""
        words = set(re.findall(r"[\w.+-]*\w", message.lower()))
        naming = [key for key in arguments if key.lower() in words]
        quoting = [key for key, value in arguments.items() if words & quotations(value)]

        def innocence(key: str) -> tuple[bool, bool]:
            typed = self.composed.written.get(prefix + key)
            return (
                typed not in self.composed.overrides,
                typed == f"{prefix}{key}={self._default(prefix + key)}",
            )

        suspects = sorted(naming or quoting, key=innocence)
        return prefix + suspects[0] if suspects else path

    def value(self, path: str, value: Any, annotation: Any) -> Any:
        """One argument, of the annotated type; a nested node is built."""
        if isinstance(value, dict) and "_target_" in value:
            return self.node(path, value)
        fitted = coerce(value, annotation)
        if fitted is INVALID:
            close = nearest(value, choices(annotation)) if isinstance(value, str) else None
            hint = did_you_mean(close)
            finite = "finite " if isinstance(value, float) and not math.isfinite(value) else ""
            wanted = describe(annotation).replace("a number", f"a {finite}number")
            message = f"{wanted} is wanted, not {describe_value(value)}.{hint}"
            raise self.fail(path, message, f"{path}={close}" if close else None)
        return fitted

    def resolve(self, path: str, target: Any) -> type:
        """The class that `_target_` names, if it is one that may be named."""
        if not isinstance(target, str) or "." not in target:
            raise self.fail(path, f"a class is wanted, written module.Class, not {describe_value(target)}.")
        module_name, _, class_name = target.rpartition(".")
        if not self.trusted(module_name):
            raise self.fail(path, f"{target} may not be named: {self.trust_rule(module_name)}")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                raise self.fail(path, f"there is no module {module_name}.") from None
            raise
        cls = getattr(module, class_name, None)
        if not isinstance(cls, type):
            names = [name for name, value in vars(module).items() if is_class_of(value, module_name)]
            close = nearest(class_name, names)
            hint = f" Did you mean {module_name}.{close}?" if close else f" It has: {', '.join(names)}."
            right = f"{path}={module_name}.{close}" if close else None
            raise self.fail(path, f"{module_name} has no class {class_name}.{hint}", right)
        if not self.trusted(cls.__module__):
            raise self.fail(path, f"{target} comes from {cls.__module__}: {self.trust_rule(cls.__module__)}")
        return cls

    def require_subclass(self, key: str, node: dict[str, Any], kind: type, what: str) -> None:
        """Refuse a node whose class is of the wrong kind, before its arguments are looked at."""
        path, target = f"{key}._target_", node.get("_target_")
        if not issubclass(self.resolve(path, target), kind):
            raise self.fail(path, f"{target} is not {what}.")

    def trusted(self, module: str) -> bool:
        """Whether classes of the module may be named: ours, torch.optim's, or the caller's own."""
        if module == "experiments" or module.startswith("experiments."):
            require_ours("experiments")
            return True
        if (
            module in ("runner.schedule", "runner.sweep.search", "runner.sweep.search.settings")
            or module == "torch.optim"
            or module.startswith("torch.optim.")
        ):
            return True
        if self.trust is not None and (module == self.trust or module.startswith(self.trust + ".")):
            return True
        folder = self.command.config_dir
        return folder is not None and is_inside(module.split(".")[0], folder.resolve())

    def trust_rule(self, module: str) -> str:
        """What may be named, and how to allow a module of the user's own."""
        package = module.split(".")[0]
        rule = "only classes of experiments, of torch.optim and of files under --config-dir may be."
        if package in sys.stdlib_module_names or package == "torch":
            return rule
        return f"{rule} If {package} is yours, give its folder as --config-dir, or add trust={package}."


def build_root(build: Builder) -> Root:
    """The keys of the root, each there, known and of its type."""
    config = {"data": None, "model": None, **build.composed.config}  # no option chosen, no node
    hints = get_type_hints(Root)
    for key in config:
        if key not in hints:
            raise build.unknown(key, f"a run has no {key}", key, hints)
    missing = [key for key in hints if key not in config]
    if missing:
        raise UserError(f"The config lacks {', '.join(missing)}.")
    nodes = {k: v for k, v in config.items() if isinstance(v, dict) and coerce(v, hints[k]) is v}
    plain = {key: build.value(key, config[key], hint) for key, hint in hints.items() if key not in nodes}
    return build.construct("", Root, plain | nodes)


def constructed_for_task(build: Builder, root: Root) -> dict[str, Any]:
    """What the task's constructor asks for by name: the data set, and a factory of networks."""
    build.require_subclass("task", root.task, Task, "a runner.task.Task")
    takes = signature(build.resolve("task._target_", root.task["_target_"]))
    given: dict[str, Any] = {}
    if "data" in takes:
        if root.data is None:
            raise UserError(f"{root.name} needs data: add data=NAME.")
        build.require_subclass("data", root.data, Data, "a runner.data.Data")
        given["data"] = build.node("data", root.data)
        if not hasattr(given["data"], "batch_size"):
            name = type(given["data"]).__name__
            raise build.fail("data._target_", FORGOTTEN.format(name, "(batch_size, eval_batch_size)"))
    if "model" in takes:
        if root.model is None:
            raise UserError(f"{root.name} needs a network: add model=NAME.")
        build.require_subclass("model", root.model, nn.Module, "a torch.nn.Module")
        given["model"] = build.factory("model", root.model)
    return given


def build_job(composed: Composed, command: Command, door: dict[str, Any]) -> Job:
    """Everything of a run but its networks, checked and built; nothing is written.

    Raises:
        UserError: an unknown argument, a wrong type, a value out of range, a class that may not be named.
    """
    if command.config_dir is not None and str(command.config_dir.resolve()) not in sys.path:
        sys.path.insert(0, str(command.config_dir.resolve()))
    build = Builder(composed, command, door.get("trust"))
    root = build_root(build)
    given = constructed_for_task(build, root)
    build.require_subclass("optimizer", root.optimizer, Optimizer, "a torch.optim.Optimizer")
    optimizer_class, optimizer_arguments = build.arguments("optimizer", root.optimizer, {"params": None})
    return Job(
        name=root.name,
        loop=build.construct("loop", LoopConfig, loop_arguments(build, root.loop)),
        task=build.node("task", root.task, **given),
        data=given.get("data"),
        optimizer=optimizer_factory(build, optimizer_class, optimizer_arguments),
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


def loop_arguments(build: Builder, node: dict[str, Any]) -> dict[str, Any]:
    """The loop's settings, typed."""
    hints = get_type_hints(LoopConfig)
    for key in node:
        if key not in hints:
            raise build.unknown(f"loop.{key}", f"the loop takes no {key}", key, hints)
    return {key: build.value(f"loop.{key}", value, hints[key]) for key, value in node.items()}


def optimizer_factory(
    build: Builder, cls: type, arguments: dict[str, Any]
) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """What makes the optimiser of one network's parameters."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return build.construct("optimizer", cls, arguments | {"params": parameters})

    closure = inspect.signature(cls.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise build.fail("optimizer._target_", f"{cls.__name__} wants to evaluate the loss itself.")
    try:  # out-of-range values are told now, on a parameter of no size, not after the data was read
        make([nn.Parameter()])
    except RuntimeError as error:  # so says torch that two options exclude each other
        raise build.refused("optimizer", arguments, error) from None
    return make
