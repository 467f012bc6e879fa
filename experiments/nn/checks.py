"""Checks of arguments: each message begins with the argument's name, says the rule, and then what was given."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

__all__ = ["at_least", "divisible", "floating", "one_of", "shaped", "within"]


def at_least(least: int, case: str = "", /, **numbers: int) -> None:
    """Raise ValueError where a number is below `least`; `case` says when that holds, for the message."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}{case and f' with {case}'}, got {number}")


def within(low: float, high: float, closed: bool = False, term: str = "", **numbers: float) -> None:
    """Raise ValueError where a number lies outside [low, high), or [low, high] if `closed`.

    `term` says what the upper end is, for the message.
    """
    end = f"{term} = {high}" if term else high
    for name, number in numbers.items():
        if not (low <= number <= high if closed else low <= number < high):
            raise ValueError(f"{name} must lie in [{low}, {end}{']' if closed else ')'}, got {number}")


def divisible(divisor: int, term: str = "", **numbers: int) -> None:
    """Raise ValueError where a number is no multiple of the divisor; `term` says what that is, for the message."""
    by = f"{term} = {divisor}" if term else divisor
    for name, number in numbers.items():
        if number % divisor:
            raise ValueError(f"{name} must be divisible by {by}, got {number}")


def one_of(choices: Collection[str], **words: str) -> None:
    """Raise ValueError where a word is none of the choices."""
    for name, word in words.items():
        if word not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {word}")


def shaped(name: str, x: Tensor, *sizes: int | str) -> None:
    """Raise ValueError where x has not these sizes; a letter stands for any."""
    fits = [isinstance(size, str) or size == given for size, given in zip(sizes, x.shape, strict=False)]
    if x.ndim != len(sizes) or not all(fits):
        raise ValueError(f"{name} must be {str(sizes).replace(chr(39), '')}, got {tuple(x.shape)}")


def floating(**tensors: Tensor) -> None:
    """Raise ValueError where a tensor holds integers or booleans."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}")
