"""Optuna's samplers and pruners by name."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from runner.errors import UserError, did_you_mean, nearest
from runner.sweep.record import first_line
from runner.sweep.search.settings import SearchConfig
from runner.sweep.space import points

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


_SHORT = {
    "sampler": {"tpe": "TPESampler", "random": "RandomSampler", "nsga2": "NSGAIISampler"},
    "pruner": {
        "median": "MedianPruner",
        "halving": "SuccessiveHalvingPruner",
        "hyperband": "HyperbandPruner",
    },
}
_OURS = {"sampler": "grid", "pruner": "none"}
# cannot be made from a config's values, or there is one of our own
_EXCLUDED = {"BaseSampler", "BaseGASampler", "PartialFixedSampler", "GridSampler", "BruteForceSampler"}
_EXCLUDED |= {"BasePruner", "PatientPruner", "NopPruner"}
_Samplers = Callable[[int, int], "BaseSampler"]  # a trial's number, its place among the trials → its sampler


def sampler_factory(config: SearchConfig, space: dict[str, BaseDistribution]) -> tuple[_Samplers, int | None]:
    """Return what makes a trial's sampler, seeded by the search's seed and the trial's number; a grid's size.

    Raises:
        UserError: unknown sampler or option.
    """
    import optuna

    if config.sampler == "grid":
        return _grid_factory(config, space)
    cls = _class("sampler", config.sampler, config.sampler_options)
    one_seed = cls is optuna.samplers.QMCSampler  # its points are one sequence

    def make(number: int, place: int) -> BaseSampler:
        seed = config.seed if one_seed else _trial_seed(config.seed, number)
        sampler: BaseSampler = _construct("sampler", cls, config.sampler_options | {"seed": seed})
        return sampler

    return make, None


def _grid_factory(config: SearchConfig, space: dict[str, BaseDistribution]) -> tuple[_Samplers, int]:
    """Return every setting once, in an order that the seed gives, so that the first few lie anywhere in the grid."""
    from optuna.samplers import PartialFixedSampler, RandomSampler

    if config.sampler_options:
        raise UserError("sweep.sampler_options: sampler=grid takes none.")
    settings = points(space)
    random.Random(config.seed).shuffle(settings)

    def make(number: int, place: int) -> BaseSampler:
        with ignore_experimental():
            fixed = settings[place % len(settings)]
            return PartialFixedSampler(fixed, RandomSampler(_trial_seed(config.seed, number)))

    return make, len(settings)


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
    cls = _class("pruner", name, options)
    _construct("pruner", cls, options)
    return lambda: _construct("pruner", cls, options)


def _class(kind: str, name: str, options: dict[str, Any]) -> type:
    """Return the class of `optuna.samplers` or `optuna.pruners` of a short or its own name, which takes the options."""
    import optuna

    # the class
    module, short = getattr(optuna, f"{kind}s"), _SHORT[kind]
    full_names = [full for full in module.__all__ if full.endswith(kind.title()) and full not in _EXCLUDED]
    chosen = short.get(name, name)
    if chosen not in full_names:
        names = [_OURS[kind], *short, *(full for full in full_names if full not in short.values())]
        close = nearest(name, [*names, *full_names])
        raise UserError(
            f"sweep.{kind}={name}: unknown {kind}.{did_you_mean(close)} Available: {', '.join(names)}.",
            f"sweep.{kind}={name}",
            f"sweep.{kind}={close}" if close else None,
        )
    cls: type = getattr(module, chosen)

    # its arguments, of which the search itself gives the seed
    takes = [argument for argument in inspect.signature(cls).parameters if argument != "seed"]
    for option in options:
        if option not in takes:
            problem = f"{chosen} takes no {option}.{did_you_mean(nearest(option, takes))}"
            problem = "set sweep.seed instead." if option == "seed" else problem
            raise UserError(f"sweep.{kind}_options.{option}: {problem} Available: {', '.join(takes)}.")
    return cls


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
