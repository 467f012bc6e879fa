"""Search spaces in Hydra's override grammar, as Optuna's distributions, and drawn values as overrides again.

    optimizer=sgd,adam      choice(sgd,adam)         one of these, in no order; any values that can be typed
    model.layers=range(1,5)                          1, 2, 3 or 4; range(0.1,0.5,0.1): 0.1, 0.2, 0.3 or 0.4
    optimizer.momentum=interval(0,0.99)              any real number from the first to the last
    model.hidden_size=int(interval(16,256))          any whole number, both ends included
    optimizer.lr=tag(log,interval(1e-4,1e-1))        by its logarithm: as likely in 1e-4…1e-3 as in 1e-2…1e-1

An interval is of real numbers also where its ends are whole, as it is in Hydra's grammar, which makes floats
of them; `int(…)` asks for whole ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from runner.config.command import text, value_text
from runner.errors import UserError
from runner.sweep import grid

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_ALLOWED = (
    "A search takes a,b,c or choice(a,b,c), range(start,stop,step), interval(low,high), "
    "int(interval(low,high)), and tag(log,…) around a range or an interval"
)
_MAX_POINTS = 100_000  # of a grid


def import_optuna() -> Any:
    """Import Optuna, where it is installed, and silence its log: what matters is on our screen."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f"A search needs Optuna ({error}): pip install 'formula-runner[optuna]'. "
            "A grid needs nothing: sweep=grid."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def read_space(space: Mapping[str, Override]) -> dict[str, BaseDistribution]:
    """Return the distribution of every key from its override."""
    import_optuna()
    return {key: _distribution(override) for key, override in space.items()}


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution

    # what a search cannot draw from
    sweep = override.value()
    tags: set[str] = getattr(sweep, "tags", set())
    _require(override.is_sweep_override(), override, "one value is nothing to search.")
    _require(tags <= {"log"}, override, f"unknown tag {', '.join(sorted(tags - {'log'}))}.")
    _require(not getattr(sweep, "shuffle", False), override, "a search has no order to shuffle.")

    if isinstance(sweep, RangeSweep):
        return _range(override, sweep)
    if isinstance(sweep, IntervalSweep):
        return _interval(override, sweep)
    _require(not tags, override, "a choice has no logarithm.")
    # texts, so that `null`, `true`, `[1,2]` and what is quoted survive
    return CategoricalDistribution(list(map(value_text, grid.values(override))))


def _range(override: Override, sweep: RangeSweep) -> BaseDistribution:
    """Return equal steps from the start to before the stop, counted in decimals, as they were written."""
    from optuna.distributions import FloatDistribution, IntDistribution

    # the ends
    assert sweep.start is not None and sweep.stop is not None
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    finite = start.is_finite() and stop.is_finite() and step.is_finite() and step != 0
    _require(finite, override, "expected finite ends and a step that is not 0.")
    count = math.ceil((stop - start) / step)  # at least 1: the override has been parsed
    low, high = sorted((start, start + step * (count - 1)))

    log = "log" in sweep.tags
    if all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step)):
        unit_steps = abs(step) == 1 and low >= 1
        _require(unit_steps or not log, override, "tag(log,…) of a range needs steps of 1 from 1 or more.")
        return IntDistribution(int(low), int(high), log=log, step=1 if log else int(abs(step)))
    _require(not log, override, "equal steps are not equal on a log scale: use tag(log,interval(low,high)).")
    return FloatDistribution(float(low), float(high), step=float(abs(step)))


def _interval(override: Override, sweep: IntervalSweep) -> BaseDistribution:
    """Return any number from the low to the high end; whole ones where it was cast by `int(…)`."""
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    assert low is not None and high is not None
    finite = math.isfinite(low) and math.isfinite(high)
    _require(finite and low <= high, override, "expected a finite low and a finite high end.")
    if isinstance(low, int) and isinstance(high, int):
        _require(low >= 1 or not log, override, "tag(log,…) of whole numbers must begin at 1 or more.")
        return IntDistribution(low, high, log=log)
    _require(low > 0 or not log, override, "tag(log,…) must begin above 0.")
    return FloatDistribution(low, high, log=log)


def _require(valid: bool, override: Override, problem: str) -> None:
    if not valid:
        line = text(override)
        raise UserError(f"{line}: {problem} {_ALLOWED}.", line, "")


def texts(values: dict[str, Any], space: dict[str, BaseDistribution]) -> dict[str, str]:
    """Return one setting as override texts, in the space's order; each is parsed to exactly its value."""
    # through Optuna's own number: an enqueued 1 is 1.0 where the key takes any real number
    numbers = {key: distribution.to_internal_repr(values[key]) for key, distribution in space.items()}
    return {key: str(space[key].to_external_repr(number)) for key, number in numbers.items()}


def corners(space: dict[str, BaseDistribution]) -> list[dict[str, str]]:
    """Return the settings that stand for all: the first values, each other end alone, and all the last together.

    Their number is linear in that of the keys. Every end of every key is among them, but not every
    combination of ends.
    """
    ends = {key: _ends(distribution) for key, distribution in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    last = {key: values[-1] for key, values in ends.items()}
    others = [first | {key: value} for key, values in ends.items() for value in values[1:]]
    settings = [texts(setting, space) for setting in (first, *others, last)]
    return [setting for place, setting in enumerate(settings) if setting not in settings[:place]]


def _ends(distribution: Any) -> list[Any]:
    """Return where a distribution begins and ends; every choice of one that has no order."""
    choices = getattr(distribution, "choices", None)
    return list(choices or dict.fromkeys((distribution.low, distribution.high)))


def points(space: dict[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Return every setting of a discrete space, the last key varying fastest."""
    columns = [_values(key, distribution) for key, distribution in space.items()]
    count = math.prod(map(len, columns))
    if count > _MAX_POINTS:
        raise UserError(
            f"sweep.sampler=grid would have {count:,} points, more than {_MAX_POINTS:,}. "
            "Give the keys fewer values, or use sweep.sampler=random."
        )
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*columns)]


def _values(key: str, distribution: Any) -> list[Any]:
    if hasattr(distribution, "choices"):
        return list(distribution.choices)
    if distribution.step is None:
        raise UserError(
            f"{key}: sweep.sampler=grid needs discrete values, and an interval is continuous. Use "
            f"{key}=a,b,c, {key}=range(start,stop,step), or another sampler."
        )
    # in decimals, as they were written
    low, high, step = (Decimal(str(d)) for d in (distribution.low, distribution.high, distribution.step))
    number = type(distribution.low)  # int or float
    return [number(low + step * place) for place in range(int((high - low) / step) + 1)]
