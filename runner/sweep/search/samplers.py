"""Optuna's samplers and pruners by name."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.errors import UserError, did_you_mean, nearest
from runner.sweep.search.settings import SearchConfig
from runner.sweep.search.storage import first_line
from runner.sweep.space import points

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "nsga2": "NSGAIISampler"}
PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner"}
# what cannot be made from a config's values, and grids, of which there is one of our own
NOT_SAMPLERS = ("BaseSampler", "BaseGASampler", "PartialFixedSampler", "GridSampler", "BruteForceSampler")
NOT_PRUNERS = ("BasePruner", "PatientPruner", "NopPruner")


@dataclass
class SamplerMaker:
    """Makes the sampler of one trial: seeded by the search's seed and the trial's number."""

    make: Callable[[int, int], BaseSampler]
    points: int | None = None  # of a grid

    def __call__(self, number: int, place: int) -> BaseSampler:
        with quiet():
            return self.make(number, place)


def sampler_maker(settings: SearchConfig, space: dict[str, BaseDistribution]) -> SamplerMaker:
    """What makes samplers of the given name.

    Raises:
        UserError: there is no such sampler, or it does not take an option.
    """
    import optuna

    if settings.sampler == "grid":
        return grid_maker(settings, space)
    known = classes(optuna.samplers, "Sampler", NOT_SAMPLERS)
    cls = choose("sampler", settings.sampler, SAMPLERS, known, ["grid"])
    check_options("sampler", cls, settings.sampler_options, ["seed"])
    whole = cls is optuna.samplers.QMCSampler  # its points are one sequence, which has one seed

    def make(number: int, place: int) -> BaseSampler:
        seed = settings.seed if whole else trial_seed(settings.seed, number)
        return construct("sampler", cls, settings.sampler_options | {"seed": seed})

    return SamplerMaker(make)


def grid_maker(settings: SearchConfig, space: dict[str, BaseDistribution]) -> SamplerMaker:
    """Every setting once, in an order that the seed gives, so that the first few lie anywhere in the grid."""
    from optuna.samplers import PartialFixedSampler, RandomSampler

    if settings.sampler_options:
        raise UserError("sweep.sampler_options: sampler=grid takes none.")
    settings_in_order = points(space)
    random.Random(settings.seed).shuffle(settings_in_order)

    def make(number: int, place: int) -> BaseSampler:
        fixed = settings_in_order[place % len(settings_in_order)]
        return PartialFixedSampler(fixed, RandomSampler(trial_seed(settings.seed, number)))

    return SamplerMaker(make, len(settings_in_order))


def trial_seed(seed: int, number: int) -> int:
    """A seed of 32 bits that is as good as independent for every (seed, number)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


def pruner_maker(name: str, options: dict) -> Callable[[], BasePruner]:
    """What makes pruners of the given name.

    Raises:
        UserError: there is no such pruner, or it does not take an option.
    """
    import optuna

    if name == "none":
        if options:
            raise UserError("sweep.pruner_options: pruner=none takes none.")
        return optuna.pruners.NopPruner
    cls = choose("pruner", name, PRUNERS, classes(optuna.pruners, "Pruner", NOT_PRUNERS), ["none"])
    check_options("pruner", cls, options, [])
    construct("pruner", cls, options)
    return lambda: construct("pruner", cls, options)


def classes(module: Any, ending: str, left_out: tuple[str, ...]) -> dict[str, type]:
    """The classes of one of Optuna's modules that a config can make."""
    names = [name for name in module.__all__ if name.endswith(ending) and name not in left_out]
    return {name: getattr(module, name) for name in names}


def choose(what: str, name: str, short: dict[str, str], known: dict[str, type], ours: list[str]) -> type:
    """A class by its short or its own name."""
    cls = known.get(short.get(name, name))
    if cls is None:
        names = [*ours, *short, *(full for full in known if full not in short.values())]
        close = nearest(name, [*names, *known])
        raise UserError(
            f"sweep.{what}={name}: there is no such {what}.{did_you_mean(close)} There are: {', '.join(names)}.",
            f"sweep.{what}={name}",
            f"sweep.{what}={close}" if close else None,
        )
    return cls


def check_options(what: str, cls: type, options: dict, ours: list[str]) -> None:
    """Every option is an argument of the class, and none that the search gives itself."""
    takes = [name for name in inspect.signature(cls).parameters if name not in ours]
    for name in options:
        if name in ours:
            raise UserError(f"sweep.{what}_options.{name}: this is what sweep.{name} says.")
        if name not in takes:
            raise UserError(
                f"sweep.{what}_options.{name}: {cls.__name__} takes no {name}."
                f"{did_you_mean(nearest(name, takes))} It takes: {', '.join(takes)}."
            )


def construct(what: str, cls: type, options: dict) -> Any:
    """One object of Optuna's, or its refusal as one message."""
    try:
        with quiet():
            return cls(**options)
    except ImportError as error:
        raise UserError(f"sweep.{what}: {cls.__name__} needs a package more: {first_line(error)}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"sweep.{what}_options: {cls.__name__}: {first_line(error)}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings that an interface may change."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
