"""Optuna's samplers and pruners by name."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from runner.errors import UserError, first_line, unknown
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
    """Return what makes a trial's sampler, seeded by the search's seed and the trial's number; a grid's size."""
    import optuna

    cls = _class("sampler", config.sampler, config.sampler_options)
    one_seed = cls is optuna.samplers.QMCSampler  # its points are one sequence

    # a grid has every setting once, in an order that the seed gives: the first few lie anywhere in it
    settings = [] if cls else points(space)
    random.Random(config.seed).shuffle(settings)

    def make(number: int, place: int) -> BaseSampler:
        # 32 bits that are as good as independent for every (seed, number)
        digest = hashlib.sha256(f"{config.seed} {number}".encode()).digest()
        seed = config.seed if one_seed else int.from_bytes(digest[:4], "little")
        options = config.sampler_options | {"seed": seed}
        sampler: BaseSampler = _construct("sampler", cls or optuna.samplers.RandomSampler, options)
        if not settings:
            return sampler
        with ignore_experimental():
            return optuna.samplers.PartialFixedSampler(settings[place % len(settings)], sampler)

    return make, len(settings) or None


def pruner_factory(name: str, options: dict[str, Any]) -> Callable[[], BasePruner]:
    """Return what makes pruners of the given name."""
    import optuna

    cls = _class("pruner", name, options) or optuna.pruners.NopPruner
    _construct("pruner", cls, options)
    return lambda: _construct("pruner", cls, options)


def _class(kind: str, name: str, options: dict[str, Any]) -> type | None:
    """Return the class of `optuna.samplers` or `optuna.pruners` of a short or its own name, None for one of ours.

    Raises:
        UserError: unknown name or option.
    """
    import optuna

    # the class
    module, short = getattr(optuna, f"{kind}s"), _SHORT[kind]
    full_names = [full for full in module.__all__ if full.endswith(kind.title()) and full not in _EXCLUDED]
    chosen = short.get(name, name)
    if chosen not in (_OURS[kind], *full_names):
        raise unknown(kind, name, [_OURS[kind], *short, *full_names], f"sweep.{kind}={name}")
    cls: type | None = getattr(module, chosen, None)

    # its arguments, of which the search itself gives the seed
    takes = [argument for argument in inspect.signature(cls).parameters if argument != "seed"] if cls else []
    if "seed" in options:
        raise UserError(f"sweep.{kind}_options: set sweep.seed.")
    for option in options:
        if option not in takes:
            raise unknown(f"sweep.{kind}_options of {chosen}", option, takes)
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
