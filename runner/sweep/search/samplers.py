"""Optuna's samplers and pruners by name."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from runner.errors import UserError, did_you_mean, nearest
from runner.sweep.record import first_line
from runner.sweep.search.settings import SearchConfig
from runner.sweep.space import points

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


_SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "nsga2": "NSGAIISampler"}
_PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner"}
# cannot be made from a config's values, and grids, of which there is one of our own
_NOT_SAMPLERS = ("BaseSampler", "BaseGASampler", "PartialFixedSampler", "GridSampler", "BruteForceSampler")
_NOT_PRUNERS = ("BasePruner", "PatientPruner", "NopPruner")


@dataclass
class _SamplerFactory:
    """Makes the sampler of one trial: seeded by the search's seed and the trial's number."""

    make: Callable[[int, int], BaseSampler]
    points: int | None = None  # of a grid

    def __call__(self, number: int, place: int) -> BaseSampler:
        with ignore_experimental():
            return self.make(number, place)


def sampler_factory(config: SearchConfig, space: dict[str, BaseDistribution]) -> _SamplerFactory:
    """Return what makes samplers of the given name, from a trial's number and its place among the trials.

    Raises:
        UserError: unknown sampler or option.
    """
    import optuna

    if config.sampler == "grid":
        return _grid_factory(config, space)
    classes = _classes(optuna.samplers, "Sampler", _NOT_SAMPLERS)
    cls = _choose("sampler", config.sampler, _SAMPLERS, classes, ["grid"])
    _check_options("sampler", cls, config.sampler_options, ["seed"])
    one_seed = cls is optuna.samplers.QMCSampler  # its points are one sequence

    def make(number: int, place: int) -> BaseSampler:
        seed = config.seed if one_seed else _trial_seed(config.seed, number)
        sampler: BaseSampler = _construct("sampler", cls, config.sampler_options | {"seed": seed})
        return sampler

    return _SamplerFactory(make)


def _grid_factory(config: SearchConfig, space: dict[str, BaseDistribution]) -> _SamplerFactory:
    """Return every setting once, in an order that the seed gives, so that the first few lie anywhere in the grid."""
    from optuna.samplers import PartialFixedSampler, RandomSampler

    if config.sampler_options:
        raise UserError("sweep.sampler_options: sampler=grid takes none.")
    settings = points(space)
    random.Random(config.seed).shuffle(settings)

    def make(number: int, place: int) -> BaseSampler:
        fixed = settings[place % len(settings)]
        return PartialFixedSampler(fixed, RandomSampler(_trial_seed(config.seed, number)))

    return _SamplerFactory(make, len(settings))


def _trial_seed(seed: int, number: int) -> int:
    """Return a seed of 32 bits that is as good as independent for every (seed, number)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


def pruner_factory(name: str, options: dict[str, Any]) -> Callable[[], BasePruner]:
    """Return what makes pruners of the given name.

    Raises:
        UserError: unknown pruner or option.
    """
    import optuna

    if name == "none":
        if options:
            raise UserError("sweep.pruner_options: pruner=none takes none.")
        return optuna.pruners.NopPruner
    cls = _choose("pruner", name, _PRUNERS, _classes(optuna.pruners, "Pruner", _NOT_PRUNERS), ["none"])
    _check_options("pruner", cls, options, [])
    _construct("pruner", cls, options)
    return lambda: _construct("pruner", cls, options)


def _classes(module: ModuleType, ending: str, excluded: tuple[str, ...]) -> dict[str, type]:
    """Return the classes of one of Optuna's modules that a config can make."""
    names = [name for name in module.__all__ if name.endswith(ending) and name not in excluded]
    return {name: getattr(module, name) for name in names}


def _choose(kind: str, name: str, short: dict[str, str], classes: dict[str, type], ours: list[str]) -> type:
    """Return a class by its short or its own name."""
    cls = classes.get(short.get(name, name))
    if cls is None:
        names = [*ours, *short, *(full for full in classes if full not in short.values())]
        close = nearest(name, [*names, *classes])
        raise UserError(
            f"sweep.{kind}={name}: unknown {kind}.{did_you_mean(close)} Available: {', '.join(names)}.",
            f"sweep.{kind}={name}",
            f"sweep.{kind}={close}" if close else None,
        )
    return cls


def _check_options(kind: str, cls: type, options: dict[str, Any], reserved: list[str]) -> None:
    """Refuse options that are no arguments of the class, or that the search gives itself."""
    takes = [name for name in inspect.signature(cls).parameters if name not in reserved]
    for name in options:
        if name not in takes:
            problem = f"{cls.__name__} takes no {name}.{did_you_mean(nearest(name, takes))}"
            problem = f"set sweep.{name} instead." if name in reserved else problem
            raise UserError(f"sweep.{kind}_options.{name}: {problem} Available: {', '.join(takes)}.")


def _construct(kind: str, cls: type, options: dict[str, Any]) -> Any:
    """Build one of Optuna's objects, its refusal as one message."""
    try:
        with ignore_experimental():
            return cls(**options)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"sweep.{kind}_options: {cls.__name__}: {first_line(error)}") from None


@contextlib.contextmanager
def ignore_experimental() -> Iterator[None]:
    """Silence Optuna's warnings that an interface may change."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
