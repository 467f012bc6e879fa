"""From the config of a run to its job: the nodes that every run has, built in order."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn
from torch.optim import Optimizer

from runner.build.builder import FORGOTTEN, Builder
from runner.build.schema import Root, coerce, returned, signature
from runner.build.trust import Trust
from runner.config.command import Command, text
from runner.config.compose import Composed
from runner.config.options import to_yaml
from runner.config.setup import import_own_code
from runner.data import Data
from runner.engine.folders import CONFIG_FILE, OVERRIDES_FILE
from runner.engine.job import Job
from runner.engine.state import LoopConfig, Objective
from runner.errors import UserError
from runner.task import Task


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
        given["data"] = build.node("data", root.data, Data)
        if not hasattr(given["data"], "batch_size"):
            name = type(given["data"]).__name__
            build.fail("data._target_", FORGOTTEN.format(name, "(batch_size, eval_batch_size)"))

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
    with contextlib.nullcontext() if composed.hydra is None else composed.hydra.active():
        job = _build_job(composed, command)
    if composed.hydra is not None:
        job.around, job.inside, job.chdir = composed.hydra.around, composed.hydra.run, composed.hydra.chdir
    return job


def build_callbacks(nodes: dict[str, Any], command: Command) -> list[Any]:
    """Build what `hydra.callbacks` names, from classes that the caller trusts.

    Raises:
        UserError: an unknown argument, a wrong type, a class that may not be named.
    """
    import_own_code(command)
    written = {o.key_or_group: text(o) for o in command.overrides}
    build = Builder(Composed({}, command.typed, written=written), _trust(command))
    return [build.node(f"hydra.callbacks.{name}", node) for name, node in nodes.items()]


def _trust(command: Command) -> Trust:
    return Trust(command.options.get("trust"), command.config_dir)


def _build_job(composed: Composed, command: Command) -> Job:
    build = Builder(composed, _trust(command))
    root = _build_root(build)
    given = _task_arguments(build, root)
    optimizer = _optimizer_factory(build, root.optimizer)
    loop = build.arguments("loop", LoopConfig, root.loop, (), "the loop")
    return Job(
        name=root.name,
        loop=build.construct("loop", LoopConfig, loop),
        task=build.node("task", root.task, Task, **given),
        data=given.get("data"),
        optimizer=optimizer,
        schedule=build.node("schedule", root.schedule, Callable),
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
    made = returned(cls)
    assert made is not None and issubclass(made, Optimizer)
    closure = inspect.signature(made.step).parameters.get("closure")
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
