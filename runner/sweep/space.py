"""Search spaces in Hydra's override grammar, as Optuna's distributions, and drawn values as overrides again.

    optimizer=sgd,adam      choice(sgd,adam)         one of these, in no order; any values that can be typed
    model.layers=range(1,5)                          1, 2, 3 or 4; range(0.1,0.5,0.1): 0.1, 0.2, 0.3 or 0.4
    optimizer.momentum=interval(0,0.99)              any real number from the first to the last
    model.hidden_size=int(interval(16,256))          any whole number, both ends included
    optimizer.lr=tag(log,interval(1e-4,1e-1))        by its logarithm: as likely in 1e-4…1e-3 as in 1e-2…1e-1

An interval is of real numbers also where its ends are whole, as it is in Hydra's grammar, which makes floats
of them; `int(…)` is what asks for whole ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from runner.config.command import text
from runner.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ALLOWED = (
    "A search takes a,b,c or choice(a,b,c), range(start,stop,step), interval(low,high), "
    "int(interval(low,high)), and tag(log,…) around a range or an interval"
)
MOST_POINTS = 100_000  # of a grid
WORDS = {"True": "true", "False": "false"}  # Hydra gives Python's


def import_optuna() -> Any:
    """Optuna, with its own log silenced: what matters is on our screen.

    Raises:
        UserError: it is not installed.
    """
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
    """The distribution of every key from its override.

    Raises:
        UserError: a text is no search space.
    """
    import_optuna()
    return {key: read_override(override) for key, override in space.items()}


def read_override(override: Override) -> BaseDistribution:
    """The distribution of one override."""
    sweep = override.value()
    if not override.is_sweep_override():
        raise wrong(override, "one value is nothing to search.")
    tags: set[str] = getattr(sweep, "tags", set())
    if tags - {"log"}:
        raise wrong(override, f"there is no tag {', '.join(sorted(tags - {'log'}))}.")
    if getattr(sweep, "shuffle", False):
        raise wrong(override, "shuffle has no meaning in a search, which has no order.")
    if isinstance(sweep, RangeSweep):
        return read_range(override, sweep)
    if isinstance(sweep, IntervalSweep):
        return read_interval(override, sweep)
    if tags:
        raise wrong(override, "a choice has no logarithm.")
    return categorical(override)


def categorical(override: Override) -> BaseDistribution:
    """One of the texts, so that `null`, `true`, `[1,2]` and what is quoted survive."""
    from optuna.distributions import CategoricalDistribution

    texts = (WORDS.get(value, value) for value in override.sweep_string_iterator())
    return CategoricalDistribution(list(dict.fromkeys(texts)))


def read_range(override: Override, sweep: RangeSweep) -> BaseDistribution:
    """Equal steps from the start; the stop is not one of them. Counted in decimals, as they were written."""
    from optuna.distributions import FloatDistribution, IntDistribution

    assert sweep.start is not None and sweep.stop is not None
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    if not (start.is_finite() and stop.is_finite() and step.is_finite()) or step == 0:
        raise wrong(override, "a range has finite ends and a step that is not 0.")
    count = math.ceil((stop - start) / step)  # at least 1: the override has been parsed
    low, high = sorted((start, start + step * (count - 1)))
    log = "log" in sweep.tags
    if all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step)):
        if log and (abs(step) != 1 or low < 1):
            raise wrong(override, "tag(log,…) of a range takes steps of 1 from 1 or more.")
        return IntDistribution(int(low), int(high), log=log, step=1 if log else int(abs(step)))
    if log:
        raise wrong(override, "tag(log,…) takes an interval here: equal steps are not equal on a log scale.")
    return FloatDistribution(float(low), float(high), step=float(abs(step)))


def read_interval(override: Override, sweep: IntervalSweep) -> BaseDistribution:
    """Any number from the low to the high end; whole ones where it was cast by `int(…)`."""
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    assert low is not None and high is not None
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise wrong(override, "an interval goes from a finite low to a finite high end.")
    if isinstance(low, int) and isinstance(high, int):
        if log and low < 1:
            raise wrong(override, "tag(log,…) of whole numbers begins at 1 or more.")
        return IntDistribution(low, high, log=log)
    if log and low <= 0:
        raise wrong(override, "tag(log,…) begins above 0.")
    return FloatDistribution(low, high, log=log)


def wrong(override: Override, reason: str) -> UserError:
    """The error of one override."""
    line = text(override)
    return UserError(f"{line}: {reason} {ALLOWED}.", line, "")


def value_text(value: Any, distribution: BaseDistribution) -> str:
    """A drawn value as override text, which is read back as exactly this value."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(distribution, CategoricalDistribution):
        return str(value)
    return repr(float(value)) if isinstance(distribution, FloatDistribution) else str(int(value))


def texts(values: dict[str, Any], space: dict[str, BaseDistribution]) -> dict[str, str]:
    """One setting as override texts, in the space's order."""
    return {key: value_text(values[key], distribution) for key, distribution in space.items()}


def ends(distribution: BaseDistribution) -> list[Any]:
    """Where a distribution begins and ends; every choice of one that has no order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return list(dict.fromkeys((distribution.low, distribution.high)))


def corners(space: dict[str, BaseDistribution]) -> list[dict[str, str]]:
    """The settings that stand for all: the first values, each other end alone, and all the last together.

    Their number is linear in that of the keys. What every key may be is in them; which values may meet is
    not, apart from the two extremes.
    """
    first = {key: ends(distribution)[0] for key, distribution in space.items()}
    last = {key: ends(distribution)[-1] for key, distribution in space.items()}
    others = [first | {key: end} for key, distribution in space.items() for end in ends(distribution)[1:]]
    settings = [texts(setting, space) for setting in (first, *others, last)]
    return [setting for place, setting in enumerate(settings) if setting not in settings[:place]]


def points(space: dict[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every setting of a space that has an end of them, the last key varying fastest.

    Raises:
        UserError: a key takes any real number, or there are too many settings.
    """
    columns = [countable(key, distribution) for key, distribution in space.items()]
    count = math.prod(map(len, columns))
    if count > MOST_POINTS:
        raise UserError(
            f"sweep.sampler=grid would have {count:,} points; it takes {MOST_POINTS:,}. "
            "Give the keys fewer values, or take sweep.sampler=random."
        )
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*columns)]


def countable(key: str, distribution: BaseDistribution) -> list[Any]:
    """Every value of one key."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        raise UserError(
            f"{key}: an interval has no end of values, sweep.sampler=grid needs some: give "
            f"{key}=range(start,stop,step) or {key}=a,b,c, or take another sampler."
        )
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    count = int((Decimal(str(distribution.high)) - low) / step) + 1
    return [float(low + step * place) for place in range(count)]
